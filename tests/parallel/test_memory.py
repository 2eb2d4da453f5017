"""What is alive between a forward and its backward, counted, is what the program says that it keeps."""

from __future__ import annotations

from functools import lru_cache

import memory_workers
import pytest

from meshwright.cost.program import Place, rank_program
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.notation import parse_layout
from meshwright.spec.workload import Workload
from meshwright.testing import run_distributed

WORKLOAD = Workload(seq=256, global_batch=4)
_SIZES = {"layers": 4, "hidden": 128, "ffn": 384, "vocab": 512, "heads": 8, "head_dim": 16, "max_positions": 256}
LAYER_NORM = Model(
    name="layer-norm",
    **{
        **_SIZES, "family": "gpt2", "kv_heads": 8, "norm": "layernorm", "rope": None, "gated": False, "activation": "gelu_tanh",
        "qkv_bias": True, "out_bias": True, "mlp_bias": True,
    },
)  # fmt: skip
GATED = Model(name="gated", **{**_SIZES, "family": "llama", "kv_heads": 4})


@lru_cache
def counted(model: Model, layout: Layout) -> tuple[int, ...]:
    return tuple(run_distributed(memory_workers.kept_for_backward, layout.world, model, WORKLOAD, layout))


def predicted(model: Model, layout: Layout) -> int:
    program = rank_program(model, layout, WORKLOAD, Place())
    return sum(piece.saved_bytes * repeat for piece, repeat in program.pieces)


@pytest.mark.parametrize("recompute", ["", "ac:selective", "ac:mlp", "ac:core+mlp", "ac:mlp:2", "ac:full", "ac:full:1"])
@pytest.mark.parametrize("split", ["mb2", "tp2 mb2", "tp2:sp mb2"])
def test_a_forward_keeps_what_the_program_says(split: str, recompute: str) -> None:
    layout = parse_layout(f"{split} {recompute} fp32")
    for kept in counted(LAYER_NORM, layout):
        assert kept == pytest.approx(predicted(LAYER_NORM, layout), rel=0.02)


@pytest.mark.parametrize("recompute", ["ac:selective", "ac:mlp", "ac:core+mlp", "ac:core+mlp:3"])
@pytest.mark.parametrize("split", ["mb2", "tp2:sp mb2"])
def test_recompute_saves_what_the_program_says_to_the_byte(split: str, recompute: str) -> None:
    """Here with a gated MLP. Its RMSNorm has no fused kernel on the CPU and keeps a tensor more than on a GPU, whatever the
    mode: the difference between modes is free of it."""
    plain, again = parse_layout(f"{split} fp32"), parse_layout(f"{split} {recompute} fp32")
    less = predicted(GATED, plain) - predicted(GATED, again)
    assert less > 0
    assert [a - b for a, b in zip(counted(GATED, plain), counted(GATED, again), strict=True)] == [less] * plain.world
