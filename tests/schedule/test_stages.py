"""Stages that hold the same stand for one another."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cost.program import Place, rank_program
from meshwright.schedule.stages import alike_stages, stage_chunks
from meshwright.spec.huggingface import load_model
from meshwright.spec.layout import Layout
from meshwright.spec.workload import Workload

KINDS = {"1f1b": (1, 3), "interleaved": (2, 2), "zb-v": (2, 2), "dualpipe-v": (2, 2)}


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(["llama-3-8b", "gpt-oss-20b", "deepseek-v3"]),
    layers=st.integers(16, 40),
    stages=st.integers(2, 8),
    schedule=st.sampled_from(sorted(KINDS)),
)
def test_alike_stages_have_the_same_program(name: str, layers: int, stages: int, schedule: str) -> None:
    model = load_model(name)
    windows = tuple((128, None)[i % 2] for i in range(layers)) if model.windows else ()
    sparse = tuple(i for i in range(layers) if i >= 3) if model.moe_layers else ()
    model = replace(model, layers=layers, windows=windows, moe_layers=sparse)
    layout = Layout(pp=stages, schedule=schedule, chunks=KINDS[schedule][0])  # type: ignore[arg-type]
    groups = alike_stages(model, layout)
    assert sorted(stage for members in groups for stage in members) == list(range(stages))
    assert len(stage_chunks(layers, layout)) == stages
    for first, *others in groups:
        program = rank_program(model, layout, Workload(64, 64), Place(first))
        for stage in others:
            other = rank_program(model, layout, Workload(64, 64), Place(stage))
            assert (other.pieces, other.boundary, [b.numel for b in other.buckets]) == (
                program.pieces, program.boundary, [b.numel for b in program.buckets],
            )  # fmt: skip
