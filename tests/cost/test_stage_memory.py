"""What a rank holds, by category."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cost_cases import GPT2, SMALL, WORK

from meshwright.cost.gradients import GradientBuffers
from meshwright.cost.memory import stage_memories, state_bytes
from meshwright.cost.ops import Gemm
from meshwright.cost.peak import ChunkBytes
from meshwright.cost.pieces import layer_piece
from meshwright.cost.program import Place, rank_program
from meshwright.schedule.orders import layout_schedule
from meshwright.spec.huggingface import load_model
from meshwright.spec.model import Model
from meshwright.spec.notation import parse_layout
from meshwright.spec.workload import Workload


@pytest.mark.parametrize(
    ("precision", "state"),
    [
        ("bf16", (2, 4, 12)),
        ("fp32", (4, 4, 8)),
        ("fp64", (8, 8, 16)),
        ("bf16 params:fp32", (4, 4, 8)),
        ("bf16 grads:bf16", (2, 2, 12)),
        ("fp16 params:fp32 grads:fp16", (4, 2, 8)),
    ],
)
def test_state_bytes_of_one_rank(precision: str, state: tuple[int, int, int]) -> None:
    model = load_model("gpt2")
    program = rank_program(model, parse_layout(precision), WORK, Place())
    held = state_bytes(program, parse_layout(precision))
    for name, bytes_ in zip(("parameters", "gradients", "optimizer"), state, strict=True):
        assert held[name] == pytest.approx(124_439_808 * bytes_, rel=1e-3)  # alignment, and the dtypes of vectors


@pytest.mark.parametrize("dp", [2, 4, 16])
def test_zero_1_cuts_the_optimizer_state_by_dp_and_nothing_else(dp: int) -> None:
    plain, cut = parse_layout(f"dp{dp} tp2 pp2 mb1"), parse_layout(f"dp{dp}:zero1 tp2 pp2 mb1")
    whole, part = (
        next(stage_memories(rank_program(SMALL, x, WORK, Place(1)), x, layout_schedule(x, 2), [1], 0)).categories
        for x in (plain, cut)
    )
    assert part["optimizer"] == pytest.approx(whole["optimizer"] / dp, rel=0.02)
    for name in ("parameters", "gradients"):
        assert part[name] == pytest.approx(whole[name], rel=0.01)
    assert {k: part[k] for k in ("activations", "working", "overhead")} == {
        k: whole[k] for k in ("activations", "working", "overhead")
    }


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("model", [SMALL, GPT2], ids=lambda m: m.name)
def test_sequence_parallel_cuts_what_the_norm_regions_keep_by_tp(model: Model, tp: int) -> None:
    """Four hidden states of b s h q a layer: input and normed input of attention and of the MLP, and the statistics of both norms, in
    fp32; the rest is cut by heads already."""
    plain = layer_piece(model, parse_layout(f"tp{tp} mb2"), WORK.seq, None).saved_bytes
    cut = layer_piece(model, parse_layout(f"tp{tp}:sp mb2"), WORK.seq, None).saved_bytes
    statistics = 2 * 2 * WORK.seq * 4 * (1 if model.norm == "rmsnorm" else 2)
    norm_regions = 4 * 2 * WORK.seq * model.hidden * 2 + statistics
    assert plain - cut == norm_regions - norm_regions // tp
    alone = layer_piece(model, parse_layout("mb2"), WORK.seq, None).saved_bytes
    if model.kv_heads % tp == 0:
        assert cut * tp == alone


def test_full_recompute_keeps_only_the_input_of_a_layer() -> None:
    for layout, tokens in (("tp4 mb2 ac:full", 2 * 64), ("tp4:sp mb2 ac:full", 2 * 64 // 4)):
        piece = layer_piece(SMALL, parse_layout(layout), WORK.seq, None)
        assert piece.saved_bytes == tokens * SMALL.hidden * 2
        plain = layer_piece(SMALL, parse_layout(layout.removesuffix(" ac:full")), WORK.seq, None)
        assert piece.working_bytes == plain.saved_bytes + plain.working_bytes


def test_recompute_of_some_layers_keeps_the_others_whole() -> None:
    """Of one chunk of four layers, of two, and of more than there are."""
    model = replace(SMALL, layers=4)

    def saved(text: str) -> int:
        program = rank_program(model, parse_layout(text), WORK, Place(0))
        return sum(piece.saved_bytes * repeat for piece, repeat in program.pieces)

    for base in ("mb1", "tp2:sp mb1", "pp2 mb1"):
        whole, bare = saved(base), saved(f"{base} ac:full")
        layers = 2 if "pp2" in base else 4
        assert saved(f"{base} ac:full:1") == whole - (whole - bare) // layers
        assert saved(f"{base} ac:full:{layers + 1}") == bare


def test_recompute_of_the_mlp_keeps_its_input_alone() -> None:
    plain, again = (layer_piece(SMALL, parse_layout(text), WORK.seq, None) for text in ("mb2", "mb2 ac:mlp"))
    hidden_units = 4 * SMALL.ffn * 2 * WORK.seq * 2  # gate, up, activated gate, and their product
    assert plain.saved_bytes - again.saved_bytes == hidden_units == again.working_bytes - plain.working_bytes
    repeated = [op.name for op in again.recomputed if isinstance(op, Gemm)]
    assert repeated == ["mlp.gate_up.gate", "mlp.gate_up.up", "mlp.down"]
    both = layer_piece(SMALL, parse_layout("mb2 ac:core+mlp"), WORK.seq, None)
    assert again.saved_bytes - both.saved_bytes == SMALL.heads * 2 * WORK.seq * 4  # the log-sum-exp


def test_a_split_backward_hands_on_inputs_and_output_gradients_alone() -> None:
    """Not what was saved; with full recompute that is more than the layers' inputs, which is all that was."""
    for mode, less in (("", True), ("ac:full", False)):
        layout = parse_layout(f"pp2:zb-h1 mb1 {mode} fp32")
        its = ChunkBytes.of(rank_program(SMALL, layout, WORK, Place(0)).chunks[0], layout)
        assert its.deferred > 0
        assert (its.deferred < its.kept) is less


def test_gradients_of_chunks_fill_a_bucket_together() -> None:
    """A bucket of several chunks is whole from the first to come until the last, so more are at once than where one fills each in turn."""
    model, work = load_model("llama-3.2-1b"), Workload(1024, 32)
    one, three = (
        GradientBuffers(rank_program(model, x, work, Place()), x).bytes_of(layout_schedule(x, 8), 0)
        for x in (parse_layout(f"dp4:zero2 tp8:sp {pp} mb1 bf16 grads:bf16") for pp in ("pp2", "pp2x3:interleaved"))
    )
    assert 0 < one < three


def test_activations_are_those_of_the_micro_batches_in_flight() -> None:
    for text, flights in (("pp4 mb1", (4, 3, 2, 1)), ("pp4:gpipe mb1", (16, 16, 16, 16))):
        layout = parse_layout(text)
        for stage, flying in enumerate(flights):
            program = rank_program(SMALL, layout, WORK, Place(stage))
            (held,) = stage_memories(program, layout, layout_schedule(layout, 16), [stage], overhead=7)
            assert held.categories["activations"] == flying * sum(
                piece.saved_bytes * repeat for piece, repeat in program.pieces
            )
            assert held.categories["overhead"] == 7
            assert held.total_bytes == sum(held.categories.values())
