"""Small models, layouts and machines, and what their programs do in all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from meshwright import api
from meshwright.cost.collectives import WIRE_FACTOR, CollectiveTimes
from meshwright.cost.ops import Attention, Collective, Gemm, Op, Piece, Under
from meshwright.cost.program import Place, Program, rank_program
from meshwright.cost.result import Estimate
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.cluster import Cluster, Measured
from meshwright.spec.collectives import load_collective_constants
from meshwright.spec.layout import Layout
from meshwright.spec.legality import micro_batches
from meshwright.spec.model import Model
from meshwright.spec.parameters import parameters
from meshwright.spec.workload import Workload

H100, LOCAL = load_cluster("h100-superpod"), load_cluster("local")
WORK = Workload(seq=64, global_batch=16)
SMALL = Model(
    name="small", family="llama", layers=8, hidden=48, ffn=96, vocab=96, heads=8, kv_heads=4, head_dim=6, max_positions=64
)
TIED = replace(SMALL, name="tied", tied=True)
GPT2 = replace(
    SMALL, name="gpt2-like", kv_heads=8, gated=False, rope=None, norm="layernorm", tied=True, qkv_bias=True, out_bias=True, mlp_bias=True,
    windows=(None, 16) * 4, vocab=101,
)  # fmt: skip
LAYOUTS = (
    "mb1",
    "dp4 mb2",
    "tp4 mb2",
    "tp4:sp mb1",
    "pp4 mb2",
    "pp2:gpipe mb4",
    "dp2:zero1 tp2:sp pp4 mb1",
    "dp2 tp2 pp2 mb1 order:pp-dp-cp-tp",
)


def programs(model: Model, layout: Layout, work: Workload = WORK) -> Iterator[Program]:
    """One for each stage and tensor-parallel rank; data-parallel ranks run the same."""
    for stage in range(layout.pp):
        for tp_rank in range(layout.tp):
            yield rank_program(model, layout, work, Place(stage, tp_rank))


def work_of(ops: tuple[Op, ...]) -> Iterator[Op]:
    for op in ops:
        yield from op.work if isinstance(op, Under) else (op,)


def flops(pieces: tuple[tuple[Piece, int], ...], kind: type[Gemm] | type[Attention]) -> float:
    return sum(
        repeat * sum(op.flops for op in work_of((*piece.forward, *piece.backward)) if isinstance(op, kind))
        for piece, repeat in pieces
    )


def step_flops(model: Model, layout: Layout, kind: type[Gemm] | type[Attention]) -> float:
    """Of all ranks together."""
    a_pass = sum(flops(program.pieces, kind) for program in programs(model, layout))
    return a_pass * layout.dp * micro_batches(layout, WORK)


def multiplied(model: Model) -> int:
    """Elements of the matrices that multiply: all but lookup tables, norms and biases; a tied table is the head too."""
    matrices = sum(prod(p.shape) for p in parameters(model) if p.decay and not p.name.startswith("embedding."))
    return matrices + (model.vocab * model.hidden if model.tied else 0)


def attention_flops(model: Model) -> float:
    """Of the whole step under the causal mask: 2 products forward and 5 backward."""
    pairs = 0
    for layer in range(model.layers):
        window = model.window(layer) or WORK.seq
        pairs += sum(min(i + 1, window) for i in range(WORK.seq))
    return 7 * 2 * model.heads * model.head_dim * pairs * WORK.global_batch


def wire(c: Collective) -> float:
    """Bytes a rank sends: what a ring puts through each link; a send puts all."""
    return c.bytes if c.op == "send" else WIRE_FACTOR[c.op] * (c.group_size - 1) / c.group_size * c.bytes


def with_measured(cluster: Cluster, measured: Measured) -> Cluster:
    return cluster.model_copy(update={"measured": measured})


def priced(
    layout: str,
    model: str | Model = "llama-3-8b",
    cluster: str | Cluster = "h100-superpod",
    seq: int = 2048,
    batch: int = 16,
) -> Estimate:
    return api.estimate(model=model, cluster=cluster, seq=seq, global_batch=batch, layout=layout)


def times(cluster: Cluster) -> CollectiveTimes:
    return CollectiveTimes(cluster, load_collective_constants())
