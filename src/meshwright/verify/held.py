"""What each rank of a layout holds of what one process computed: outputs of operators, gradients of their inputs, gradients of
parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from meshwright.parallel.context import cut_tokens
from meshwright.spec.model import Model
from meshwright.spec.shards import TIED_NAME, Shard
from meshwright.verify.ranks import Report, Step
from meshwright.verify.watch import Place

Phase = Literal["forward", "backward", "parameter", "figure"]
"""`forward`: the operator's output differs. `backward`: forward agrees, and the gradient of the operator's input differs. `parameter`:
both agree, and a parameter's own gradient differs: its product or its reduction. `figure`: only the loss or the norm is wrong."""

PHASES: tuple[Phase, ...] = ("forward", "backward")
"""Those that operators are watched in."""


@dataclass(frozen=True)
class Held:
    """What a rank has and should have, in one micro-batch. `scale`: its largest element should be `largest`, in any micro-batch; where one
    counts a single token, gradients are zero but for rounding."""

    coordinates: Mapping[str, int]
    micro_batch: int
    got: Tensor
    expected: Tensor
    scale: Tensor
    sent: tuple[str, ...] = ()
    """What the rank sent in the operator, as "all_reduce over tp"."""

    @property
    def error(self) -> float:
        return relative_error(self.got, self.expected, self.scale)


def relative_error(got: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """Largest difference over the largest element of `scale`, or of `expected`; NaN counts as infinite."""
    if got.shape != expected.shape:
        return torch.inf
    if not got.numel():
        return 0.0
    difference = float((got - expected).abs().max())
    if difference == 0.0:
        return 0.0
    largest = float((expected if scale is None else scale).abs().max())
    error = difference / largest if largest else torch.inf
    return error if error == error else torch.inf


def held_gradients(step: Step, reference: Report, reports: Sequence[Report]) -> Iterator[tuple[Shard, Held]]:
    """Of parameters, by rank."""
    whole = {shard.name: gradient for shard, gradient in reference.gradients}
    scales = {name: _scale(name, whole, step) for name in whole}
    for report in reports:
        for shard, gradient in report.gradients:
            yield shard, Held(report.coordinates, 0, gradient, shard.of(whole[shard.name]), scales[shard.name])


def _scale(name: str, whole: Mapping[str, Tensor], step: Step) -> Tensor:
    """Whose largest element the error of a parameter's gradient is measured against: its own, with two exceptions.

    A key bias without rotary positions shifts all scores of a query alike: its gradient is zero and what is computed is
    rounding, so the query bias of the same layer sets the scale.

    A bias sums up over tokens what its weight sums up times inputs, which are of the order of one. Where that cancels, as of a key bias
    whose positions turn little, or of a router's that has one choice for all tokens, nothing is left in fp32 but the rounding
    of the terms; so there the weight sets the scale if its gradient is larger. In fp64 there is room for it.
    """
    if step.model.rope is None and name.endswith("qkv.k.bias"):
        return whole[name.replace("qkv.k", "qkv.q")]
    weight = whole.get(f"{name.removesuffix('bias')}weight") if name.endswith(".bias") else None
    if step.layout.precision != "fp32" or weight is None:
        return whole[name]
    return torch.maximum(whole[name].abs().max(), weight.abs().max())


def held_values(step: Step, phase: Phase, reference: Report, reports: Sequence[Report]) -> dict[str, list[Held]]:
    """Of operators, in the order in which one process runs them. `reference` and `reports`: of steps that were watched. `phase`:
    forward or backward."""
    whole = _recorded(reference, phase)
    out: dict[str, list[Held]] = {operator: [] for operator, _ in whole}
    largest = _largest(whole)
    per_rank = step.workload.global_batch // (step.layout.dp * step.layout.micro_batch)
    for report in reports:
        assert report.record is not None, "the step was watched"
        shards = {shard.name: shard for shard, _ in report.gradients}
        first = report.coordinates["dp"] * per_rank
        for (operator, micro_batch), got in _recorded(report, phase).items():
            expected = whole[operator, first + micro_batch]
            share = _share(expected, step, report.coordinates, got, shards.get(_weight(step.model, operator)))
            if share is not None:
                sent = report.record.sent.get((phase, operator), ())
                out[operator].append(Held(report.coordinates, micro_batch, got, share, largest[operator], sent))
    return out


def _largest(whole: Mapping[Place, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for (operator, _), value in whole.items():
        here = value.abs().max()
        out[operator] = torch.maximum(out.get(operator, here), here)
    return out


def _recorded(report: Report, phase: Phase) -> dict[Place, Tensor]:
    assert report.record is not None, "the step was watched"
    return report.record.outputs if phase == "forward" else report.record.gradients


def _weight(model: Model, operator: str) -> str:
    return TIED_NAME if operator == "head" and model.tied else f"{operator}.weight"


def _share(whole: Tensor, step: Step, coordinates: Mapping[str, int], like: Tensor, weight: Shard | None) -> Tensor | None:
    """The part of an operator's output, or of its input's gradient, that a rank holds, in the shape that it holds it in.

    Features are cut as the rows of `weight` are, or evenly; where some ranks hold the same ones, as keys and values that are fewer
    than the ranks, each has a part of a sum, and None is returned.
    """
    layout, tp = step.layout, coordinates["tp"]
    mine_BLF = whole.reshape(layout.micro_batch, -1, whole.shape[-1])
    if layout.cp > 1:
        mine_BLF = cut_tokens(mine_BLF, layout, coordinates["cp"])
    features, held = mine_BLF.shape[-1], like.shape[-1]
    rows = [cut for cut in weight.cuts if cut[0] == 0] if weight is not None else []
    if held < features and rows:
        mine_BLF = mine_BLF.narrow(-1, *rows[0][1:])
    elif held * layout.tp == features:
        mine_BLF = mine_BLF.chunk(layout.tp, dim=-1)[tp]
    elif held != features:
        return None
    mine_TF = mine_BLF.flatten(0, 1)
    if mine_TF.numel() == like.numel() * layout.tp:
        mine_TF = mine_TF.chunk(layout.tp)[tp]
    return mine_TF.reshape(like.shape) if mine_TF.numel() == like.numel() else mine_TF
