"""What ranks do in the tests of 8-bit linears. Imported by the rank processes."""

from __future__ import annotations

from dataclasses import dataclass
from unittest.mock import patch

import workers

from meshwright.parallel.fp8 import Fp8Weight
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload


@dataclass
class Outcome:
    """Of step 1; how many of this rank's weights are linears of its layers, and how many of all its weights are in 8 bits."""

    loss: float
    gradients: workers.Gradients
    linears: int
    eligible: int


def gradients(model: Model, workload: Workload, layout: Layout) -> Outcome:
    """As if the CPU had the matrix units that it emulates."""
    with patch("meshwright.parallel.apply.refuse_fp8"):
        engine = workers.build(model, workload, layout)
    loss, _ = engine.forward_backward(workers.local_batch(model, workload, engine)).tolist()
    named = [item for chunk in engine.chunks for item in chunk.named_parameters()]
    linears = sum(name.startswith("layers.") and parameter.ndim == 2 for name, parameter in named)
    return Outcome(
        loss, list(engine.state.whole_gradients()), linears, sum(isinstance(parameter, Fp8Weight) for _, parameter in named)
    )


def build_on_cpu(model: Model, workload: Workload, layout: Layout) -> None:
    workers.build(model, workload, layout)
