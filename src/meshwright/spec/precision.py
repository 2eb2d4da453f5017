"""Bytes per element of the training state, by the layout's precision."""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.spec.layout import Precision


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes per parameter element. `master` is 0 where the parameters are their own master copy.

    bf16 and fp16 keep gradients, master weights and both Adam moments in fp32: 2 + 4 + 12 = 18 bytes a parameter
    (Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1, with fp32 gradient accumulation as in Megatron).
    """

    parameter: int
    gradient: int
    master: int
    moments: int

    @property
    def optimizer(self) -> int:
        return self.master + self.moments


STATE_BYTES: dict[Precision, StateBytes] = {
    "fp64": StateBytes(8, 8, 0, 16),
    "fp32": StateBytes(4, 4, 0, 8),
    "bf16": StateBytes(2, 4, 4, 8),
    "fp16": StateBytes(2, 4, 4, 8),
    "fp8": StateBytes(2, 4, 4, 8),  # bf16, of which the linears make 8-bit factors as they need them
}

UNPRICED: tuple[Precision, ...] = ("fp8",)
"""Run, but without a price: which of the products are made in 8 bits is not in the program."""
