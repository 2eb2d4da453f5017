"""What ranks do in the tests of expert parallel: one MoE layer, forward and backward. Imported by the rank processes.

Shape suffixes as in parallel/expert.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from workers import build, local_batch

from meshwright.models.moe import MoE, Routing
from meshwright.parallel.balance import load_metrics, sequence_balance_loss, summed_load, update_selection_bias
from meshwright.parallel.expert import apply_expert_parallel
from meshwright.parallel.linear import WeightGradients
from meshwright.parallel.mesh import build_mesh
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.notation import parse_layout
from meshwright.spec.parameters import layer_parameters
from meshwright.spec.shards import Seat, Shard, Split, shard
from meshwright.spec.workload import Workload

AT = "layers.0.moe."
DENSE = Model(
    name="dense", family="llama", layers=1, hidden=8, ffn=8, vocab=32, heads=2, kv_heads=2, head_dim=4, max_positions=64
)


@dataclass
class Outcome:
    """What one rank, or one process, holds after backward. `gradients` are by the name inside the layer."""

    y: Tensor
    dx: Tensor
    gradients: dict[str, Tensor]
    shards: dict[str, Shard] = field(default_factory=dict)
    load_E: Tensor | None = None
    ledger: list[tuple[str, str, int, int, int]] = field(default_factory=list)


def layer(model: Model, hot: tuple[int, ...]) -> MoE:
    """The layer with weights that depend on their names alone. Every token prefers the experts in `hot`."""
    moe = MoE(model).double()
    with torch.no_grad():
        for i, parameter in enumerate(moe.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64))
        moe.router.selection_bias.zero_()
        moe.router.selection_bias[list(hot)] = 10.0
    return moe


def tokens(model: Model, count: int, replica: int) -> tuple[Tensor, Tensor]:
    """The tokens that dp rank `replica` brings, and the gradient of the layer's output, each [1, count, D]."""
    generator = torch.Generator().manual_seed(100 + replica)
    x, dy = torch.randn(2, 1, count, model.hidden, generator=generator, dtype=torch.float64)
    return x, dy


def one_process(model: Model, hot: tuple[int, ...], counts: tuple[int, ...]) -> Outcome:
    """The plain layer on the tokens of all dp ranks, in one batch."""
    moe = layer(model, hot)
    x, dy = (torch.cat(parts, dim=1) for parts in zip(*(tokens(model, n, i) for i, n in enumerate(counts)), strict=True))
    x.requires_grad_()
    y = moe(x)
    y.backward(dy)
    return Outcome(y.detach()[0], x.grad[0], gradients(moe), load_E=moe.load_E)


def one_rank(model: Model, layout: Layout, hot: tuple[int, ...], counts: tuple[int, ...]) -> Outcome:
    """This rank's share of the layer on its tokens: dp rank i brings counts[i]."""
    mesh = build_mesh(layout, model, torch.device("cpu"))
    dp, tp = mesh["dp"].index, mesh["tp"]
    moe = layer(model, hot)
    weights = WeightGradients()
    apply_expert_parallel(moe, mesh["ep"], tp, weights, etp=layout.etp, sequence=layout.sp, micro_batch=1)
    shards = cut(moe, model, layout, mesh.seat)
    for parameter in moe.parameters():
        weights.keep(parameter, Slot(parameter))
    x, dy = tokens(model, counts[dp], dp)
    if layout.sp:
        x, dy = (part[0].chunk(tp.size)[tp.index].clone() for part in (x, dy))
    x.requires_grad_()
    y = moe(x)
    y.backward(dy)
    rows = [(e.axis, e.op, e.group_size, count, nbytes) for e, count, nbytes in mesh.ledger.rows()]
    flat = [tensor.flatten(0, -2) for tensor in (y.detach(), x.grad)]
    return Outcome(*flat, gradients(moe), shards, moe.load_E, rows)


class Slot:
    """Keeps the gradient of a weight with the weight, where autograd would."""

    def __init__(self, weight: nn.Parameter):
        self.weight = weight

    def add_product(self, grad_TO: Tensor, x_TI: Tensor) -> None:
        self.add_products(grad_TO, x_TI, [len(x_TI)])

    def add_products(self, grad_nO: Tensor, x_nI: Tensor, counts: Sequence[int]) -> None:
        products = [grad.t() @ x for grad, x in zip(grad_nO.split(counts), x_nI.split(counts), strict=True)]
        gradient = torch.stack(products).view(self.weight.shape)
        self.weight.grad = gradient if self.weight.grad is None else self.weight.grad + gradient


def cut(moe: MoE, model: Model, layout: Layout, seat: Seat) -> dict[str, Shard]:
    """Leave of every parameter what the rank at `seat` holds."""
    out = {}
    for parameter in layer_parameters(model, 0):
        if parameter.name.startswith(AT):
            name = parameter.name.removeprefix(AT)
            out[name] = shard(model, Split.of(layout), seat, parameter)
            path, _, last = name.rpartition(".")
            module = moe.get_submodule(path)
            setattr(module, last, nn.Parameter(out[name].of(module.get_parameter(last).detach()).clone()))
    return out


def gradients(moe: MoE) -> dict[str, Tensor]:
    """Every parameter has one, be it zero."""
    out: dict[str, Any] = {name: parameter.grad for name, parameter in moe.named_parameters()}
    assert None not in out.values(), f"no gradient: {[name for name, grad in out.items() if grad is None]}"
    return out


def routing(seed: int, count: int) -> Routing:
    """A routing of `count` tokens to 2 of 8 experts, with scores that ask for a gradient."""
    generator = torch.Generator().manual_seed(seed)
    scores_tE = torch.rand(count, 8, generator=generator, dtype=torch.float64).requires_grad_()
    weights_tk, experts_tk = scores_tE.topk(2)
    return Routing(experts_tk, weights_tk, scores_tE, scores_tE)


def part(whole: Routing, index: int, of: int) -> Routing:
    """The tokens index, index + of, ..., as leaves: parts of a routing need not be equally long."""
    scores_tE = whole.scores_tE.detach()[index::of].clone().requires_grad_()
    return Routing(whole.experts_tk[index::of], whole.weights_tk[index::of].detach(), scores_tE, scores_tE)


def balance_loss_of_a_part(count: int, sequence_t: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """The loss of each sequence, and the gradient of their sum in this rank's scores; tokens dealt out to tp2 x cp2 ranks."""
    mesh = build_mesh(parse_layout("tp2 cp2 mb1"), DENSE, torch.device("cpu"))
    mine = part(routing(0, count), mesh.rank, 4)
    loss_S = sequence_balance_loss(mine, sequence_t[mesh.rank :: 4], sequences, (mesh["tp"], mesh["cp"]))
    loss_S.sum().backward()
    return loss_S.detach(), mine.scores_tE.grad


def loads(model: Model, hot: tuple[int, ...], counts: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
    """The summed load of two layers after one pass on dp ranks, the new selection bias of the first, and the metrics."""
    mesh = build_mesh(parse_layout(f"dp{len(counts)} mb1"), DENSE, torch.device("cpu"))
    moes = [layer(model, hot), layer(model, ())]
    for moe in moes:
        moe(tokens(model, counts[mesh.rank], mesh.rank)[0])
    load_lE, dropped_l = summed_load(moes, (mesh["dp"],))
    moes[0].router.selection_bias.zero_()
    update_selection_bias(moes, load_lE, rate=0.5)
    return load_lE, dropped_l, moes[0].router.selection_bias, load_metrics(load_lE, dropped_l)


def expert_loads(model: Model, workload: Workload, layout: Layout) -> list[torch.Tensor]:
    """What the experts of each layer got in a step, as counted on this rank."""
    engine = build(model, workload, layout)
    engine.gradients(local_batch(model, workload, engine))
    return [moe.load_E for moe in engine.moes if moe.load_E is not None]
