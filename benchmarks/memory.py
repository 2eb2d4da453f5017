"""Memory of a rank beside what `estimate` says of it, counted on this machine with gloo ranks: every storage, as long as it lives.

    python benchmarks/memory.py [--groups zero,sequence,...] [--markdown PATH]

State is what is alive between two steps, and of that, what is kept of the model; activations are the most that is alive at the end of a
forward, beyond state and beyond what is on its way between stages. Bytes are counted, so one run is enough: they are the same on every
run, for one training step as for the next. The rank shown is the one that holds most by the estimate; `difference` is the largest of
any rank.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from memory_ranks import Held, held
from meshwright.cost.gradients import GradientBuffers
from meshwright.cost.memory import in_flight_bytes, state_bytes
from meshwright.cost.program import Place, rank_program
from meshwright.cost.units import unit_buffer_bytes
from meshwright.parallel.ranks import RankPool
from meshwright.schedule.orders import layout_schedule
from meshwright.spec.layout import Layout
from meshwright.spec.legality import micro_batches
from meshwright.spec.model import Experts, Model
from meshwright.spec.notation import parse_layout
from meshwright.spec.workload import Workload

WORKLOAD = Workload(seq=256, global_batch=8)
SIZES = {"layers": 4, "hidden": 128, "ffn": 384, "vocab": 512, "heads": 8, "head_dim": 16, "max_positions": 256}
DENSE = Model(name="dense", **{**SIZES, "family": "llama", "kv_heads": 4})
SPARSE = replace(
    DENSE, name="sparse", family="mixtral", moe_layers=(0, 1, 2, 3), experts=Experts(count=8, top_k=2, ffn=128)
)
LAYER_NORM = Model(
    name="layer-norm",
    **{
        **SIZES, "family": "gpt2", "kv_heads": 8, "norm": "layernorm", "rope": None, "gated": False, "activation": "gelu_tanh",
        "qkv_bias": True, "out_bias": True, "mlp_bias": True,
    },
)  # fmt: skip

What = Literal["kept", "state", "activations"]


@dataclass(frozen=True)
class Group:
    """Layouts whose figures stand in one table; `ratio`: of the first line's figure to each line's."""

    title: str
    what: What
    layouts: tuple[str, ...]
    model: Model = DENSE


GROUPS = {
    "zero": Group(
        "Parameters, gradients and optimizer state under ZeRO, 16 bytes a parameter without (`bf16 grads:bf16`)",
        "kept",
        tuple(
            f"{split} mb1 bf16 grads:bf16" for split in ("dp1", *(f"dp{n}:zero{k}" for k in (1, 2, 3) for n in (2, 4, 8)))
        ),
    ),
    "hybrid": Group(
        "The same in groups of 2 of 4 ranks, with fp32 gradients",
        "kept",
        ("dp1 mb2", *(f"dp4:zero{k}x2 mb2" for k in (1, 2, 3))),
    ),
    "buffers": Group(
        "State with the buffers that ZeRO computes with, whole gradients and gathered parameters",
        "state",
        ("dp1 mb2", "dp4:zero1 mb2", "dp4:zero2 mb2", "dp4:zero3 mb2", "dp4:zero3x2 mb2", "dp4:zero3 mb2 fp32"),
    ),
    "sequence": Group(
        "Activations under tensor and sequence parallel",
        "activations",
        ("dp1 mb2 fp32", "tp2 mb2 fp32", "tp2:sp mb2 fp32", "tp2:async mb2 fp32", "tp4 mb2 fp32", "tp4:sp mb2 fp32"),
    ),
    "recompute": Group(
        "Activations under recompute",
        "activations",
        tuple(
            f"mb2 {mode} fp32".replace("  ", " ")
            for mode in (
                "",
                "ac:norms",
                "ac:selective",
                "ac:activation",
                "ac:norms+activation",
                "ac:mlp",
                "ac:norms+mlp",
                "ac:core+norms+mlp",
                "ac:full:2",
                "ac:full",
            )
        ),
    ),
    "recompute with sequence parallel": Group(
        "The same with sequence parallel, LayerNorm and a plain MLP",
        "activations",
        tuple(
            f"tp2:sp mb2 {mode} bf16".replace("  ", " ")
            for mode in ("", "ac:norms+activation", "ac:core+norms+mlp", "ac:full")
        ),
        LAYER_NORM,
    ),
    "pipeline": Group(
        "Activations in flight in a pipeline",
        "activations",
        tuple(
            f"{pp} mb2 fp32"
            for pp in ("pp2:gpipe", "pp2:1f1b", "pp4:1f1b", "pp2x2:interleaved", "pp2x2:zb-v", "pp2x2:dualpipe-v")
        ),
    ),
    "context": Group(
        "Activations under context parallel",
        "activations",
        ("mb2 fp32", "cp2:ring mb2 fp32", "cp2:ulysses mb2 fp32", "cp4:ring2xulysses2 mb2 fp32"),
    ),
    "experts": Group(
        "Activations with experts: balanced routing is priced, what routers send is counted; mean over ranks",
        "activations",
        (
            "mb2 fp32",
            "mb2 bf16",
            "tp2:sp mb2 bf16",
            "dp2 ep2 mb2 bf16",
            "dp4 ep4 mb2 bf16",
            "dp2 ep2 mb2 ac:norms+activation bf16",
        ),
        SPARSE,
    ),
}


@dataclass(frozen=True)
class Row:
    """Bytes of a rank, as counted and as estimated; `error`: of the rank that differs most, as a share."""

    layout: str
    counted: int
    estimated: int
    error: float


Runner = Callable[[Model, Layout], list[Held]]


def measure(group: Group, run: Runner, layouts: Sequence[str]) -> list[Row]:
    """Of some of the group's layouts. `run`: counts on every rank."""
    rows = []
    for text in layouts:
        layout = parse_layout(text)
        pairs = [(getattr(one, group.what), estimated(group, layout, one)) for one in run(group.model, layout)]
        if group.model.experts is not None:
            pairs = [tuple(sum(column) // len(pairs) for column in zip(*pairs, strict=True))]  # type: ignore[list-item]
        counted, said = max(pairs, key=lambda pair: pair[1])
        rows.append(Row(text, counted, said, max((a / b - 1 for a, b in pairs), key=abs)))
    return rows


def estimated(group: Group, layout: Layout, rank: Held) -> int:
    """The same by formula, as `meshwright estimate` shows it."""
    program = rank_program(group.model, layout, WORKLOAD, Place(rank.stage, *rank.seat))
    schedule = layout_schedule(layout, micro_batches(layout, WORKLOAD))
    if group.what == "activations":
        return in_flight_bytes(program.chunks, schedule, rank.stage, layout)
    kept = sum(state_bytes(program, layout).values())
    if group.what == "kept":
        return kept
    buffers = GradientBuffers(program, layout).bytes_of(schedule, rank.stage)
    return kept + unit_buffer_bytes(program, layout) + buffers


def markdown(group: Group, rows: list[Row]) -> Iterable[str]:
    yield f"**{group.title}** ({group.model.name})\n"
    yield "| layout | counted | estimate | difference | less than the first |"
    yield "|---|---|---|---|---|"
    for row in rows:
        less = f"{rows[0].counted / row.counted:.2f}x"
        yield f"| `{row.layout}` | {row.counted:,} | {row.estimated:,} | {row.error:+.2%} | {less} |"
    yield ""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--groups", default=",".join(GROUPS), help=f"comma-separated: {', '.join(GROUPS)}")
    parser.add_argument("--markdown", type=Path, help="write the tables here too")
    options = parser.parse_args(arguments)
    names = options.groups.split(",")
    if unknown := [name for name in names if name not in GROUPS]:
        parser.error(f"unknown groups {', '.join(unknown)}: legal: {', '.join(GROUPS)}")
    pool, lines = RankPool(), []
    try:
        for name in names:
            group = GROUPS[name]
            rows = measure(
                group, lambda model, layout: pool.run(held, layout.world, model, WORKLOAD, layout), group.layouts
            )
            table = list(markdown(group, rows))
            print("\n".join(table), flush=True)
            lines += table
    finally:
        pool.close()
    if options.markdown:
        options.markdown.write_text("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
