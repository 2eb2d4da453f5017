"""The dry run sees what the engine does: as the ledger of real ranks, as the cost model, and whatever is replayed."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import workers
from fixtures import MODELS, SPARSE, WORKLOAD

from drawn import case
from meshwright.api import check, trace
from meshwright.cost.gradients import turn_of
from meshwright.cost.program import Place, rank_program
from meshwright.cost.traffic import step_traffic
from meshwright.export.chrome import write_chrome
from meshwright.parallel.slots import GradientSlot
from meshwright.schedule.actions import Kind
from meshwright.schedule.buckets import unit_of
from meshwright.spec.errors import UserError
from meshwright.spec.grid import Grid
from meshwright.spec.legality import check_layout
from meshwright.spec.model import Model
from meshwright.spec.notation import parse_layout
from meshwright.spec.workload import Workload
from meshwright.testing import run_distributed
from meshwright.trace.check import check_stage
from meshwright.trace.engine import trace_ranks
from meshwright.trace.result import StageTrace
from meshwright.trace.timeline import in_order

EVERY = MODELS | SPARSE
LONG = Workload(seq=16, global_batch=16)

CHECKED = (
    ("tied", "dp2:zero1 tp2:sp pp2 mb1 fp32"),
    ("tied", "tp2:async pp2x2:interleaved mb1 ac:full fp32"),
    ("untied", "dp2:zero3 tp2 pp2x2:zb-v mb1 fp32"),
    ("gpt2-like", "dp2:zero2 tp2:sp mb2 ac:core+mlp:2 fp32"),
    ("few-kv-heads", "cp4:ring2xulysses2 tp2 mb2 fp32"),
    ("deepseek-v3-like", "dp2 tp2:sp ep2 etp2 pp2 mb2 fp32"),
    ("gpt-oss-like", "cp2:ulysses ep2 mb2 fp32"),
    ("gpt-oss-like", "tp2:sp cp2:ulysses mb2 fp32"),  # sinks beside keys that several ranks hold
)
MORE = (
    ("tied", "pp2x2:dualpipe-v mb1 fp32"),
    ("untied", "pp4:gpipe mb1 ac:full fp32"),
    ("qk-norm", "dp4:zero3x2 mb1 fp32"),
    ("gpt2-like", "cp2:ring pp2:zb-h1 mb1 ac:mlp fp32"),
    ("mixtral-like", "dp4:zero2 ep4 mb1 ac:full fp32"),
    ("qwen3-moe-like", "dp2 ep2 pp2:zb-h1 mb1 fp32"),
    ("deepseek-v3-like", "dp2:zero3 tp2:async ep2 mb2 fp32"),
    ("gpt-oss-like", "tp2 mb4 ac:core+mlp fp32"),
    ("deepseek-v3-like", "dp2 pp2x2:dualpipe-v ep2:async mb1 fp32"),
)


@pytest.mark.parametrize(
    ("name", "layout"), [*CHECKED[:1], *(pytest.param(*one, marks=pytest.mark.parity) for one in (*CHECKED[1:], *MORE))]
)
def test_the_program_says_what_the_engine_does(name: str, layout: str) -> None:
    """Collectives, products, attention, saved tensors and state: every line equal."""
    for stage in check(model=EVERY[name], layout=layout, seq=LONG.seq, global_batch=LONG.global_batch):
        assert stage.lines
        assert not stage.differences


PEAKS = (
    ("llama-tiny", "dp2:zero1 pp2:zb-h1 mb1 ac:full bf16", 512, 8),  # what halves of a backward hand on
    ("llama-tiny", "dp4:zero2 pp2x2:interleaved mb1 bf16 grads:bf16", 512, 16),  # chunks that fill a bucket together
    ("llama-tiny", "dp2:zero1 tp4:async mb4 ac:full bf16 grads:bf16", 2048, 8),  # gradients of outputs put together
    ("llama-tiny", "dp2:zero1 tp4:sp pp2x2:zb-v mb1 ac:full:2 bf16", 2048, 4),  # a norm when all of its layer is put off
    # An embedding, whose parameters no backward needs:
    ("gpt2", "dp8:zero3 pp12:zb-h1 mb1 ac:full bf16 params:fp32 grads:bf16", 128, 8),
)
MORE_PEAKS = (
    ("llama-tiny", "dp2:zero1 tp8:async cp4:ring mb4 fp32", 4096, 16),  # a head in pieces, data and tables of angles
    ("opt-125m", "dp8:zero3 tp2 pp2x2:zb-v mb4 ac:core+norms+mlp:2 bf16 params:fp32 grads:bf16", 1024, 32),
    ("gpt2", "dp64:zero3x2 cp4:ulysses mb4 ac:full:2 bf16", 1024, 512),  # the loss before the head's buffer
    ("opt-125m", "dp2:zero1 pp2x2:interleaved cp4:ulysses mb1 ac:full:2 bf16", 2048, 12),
    ("qwen3-8b", "pp32:gpipe cp8:ulysses mb2 bf16 params:fp32", 1024, 2),  # the head's weight gradient above its logits
    ("opt-6.7b", "dp4:zero2 pp8x2:zb-v cp8:ring2xulysses4 mb4 bf16", 1024, 16),  # gradients that come one after the other
)


@pytest.mark.parametrize(
    ("name", "layout", "seq", "batch"), [*PEAKS, *(pytest.param(*one, marks=pytest.mark.parity) for one in MORE_PEAKS)]
)
def test_a_peak_is_estimated_within_3_percent(name: str, layout: str, seq: int, batch: int) -> None:
    """At the stage that holds most, of models of the catalogue; `python -m benchmarks.trace` for hundreds of layouts."""
    stages = check(model=name, layout=layout, seq=seq, global_batch=batch)
    assert not any(stage.differences for stage in stages)
    assert abs(max(stages, key=lambda stage: stage.peak_bytes).peak_error) < 0.03


@pytest.mark.parametrize("name", ["qk-norm", "gpt2-like", "deepseek-v3-like", "gpt-oss-like"])
def test_gradients_come_in_the_order_that_is_estimated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which buckets are whole at once depends on it. Biases share a bucket with norms, which is complete with a layer's first norm."""
    came: list[str] = []
    added = GradientSlot._added

    def spied(slot: GradientSlot) -> None:
        came.append(slot.shard.name)
        added(slot)

    monkeypatch.setattr(GradientSlot, "_added", spied)
    trace_ranks(EVERY[name], parse_layout("mb1 fp32"), Workload(WORKLOAD.seq, 1), [0])
    weights = [shard for shard in came if not shard.endswith(".bias")]
    layers = {
        unit: [turn_of(one) for one in its] for unit, its in groupby(weights, key=unit_of) if unit.startswith("layers.")
    }
    assert len(layers) == EVERY[name].layers
    assert all(turns == sorted(turns) and len(turns) == len(set(turns)) > 4 for turns in layers.values())


def test_drawn_layouts_are_legal_and_the_same_for_the_same_number() -> None:
    for number in range(3):
        one = case(7, number, 4)
        assert one == case(7, number, 4)
        assert one.layout.world >= 8
        check_layout(one.layout, one.model, one.workload)
        assert {Grid(one.layout).coordinates(rank)["pp"] for rank in one.ranks} == set(one.stages)


def test_statistics_of_a_layer_norm_are_kept_as_gpus_keep_them() -> None:
    stages = check(model=EVERY["gpt2-like"], layout="mb2 bf16", seq=LONG.seq, global_batch=LONG.global_batch)
    assert not any(stage.differences for stage in stages)


def test_a_wrong_program_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout = EVERY["tied"], parse_layout("tp2:sp mb4 fp32")
    (traced,) = trace_ranks(model, layout, WORKLOAD, [0])
    wider = Model(**{**{f: getattr(model, f) for f in model.__dataclass_fields__}, "ffn": model.ffn + 8})
    found = {line.what for line in check_stage(traced, wider, layout, WORKLOAD).differences}
    assert {"state", "saved by a forward", "forward of chunk 0", "backward of chunk 0"} <= found


def same(a: StageTrace, b: StageTrace) -> None:
    assert a.peak_bytes == b.peak_bytes
    assert a.peak.categories == b.peak.categories
    assert a.sent == b.sent
    assert without_layers(a) == without_layers(b)
    if not any(
        s.action and s.action.kind is Kind.BACKWARD_INPUT for s in a.sections
    ):  # whose halves share a few small tensors
        levels = [[(s.name, level) for s, level in zip(t.sections, t.levels, strict=True) if s.action] for t in (a, b)]
        assert levels[0] == levels[1]


def without_layers(traced: StageTrace) -> Counter[object]:
    """Stages that are alike are shown with the layers of the one that was run."""
    out: Counter[object] = Counter()
    for product, times in traced.products.items():
        out[replace(product, path=re.sub(r"layers\.\d+", "layers", product.path))] += times
    return out


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("tied", "dp2:zero1 tp2:sp pp4 mb1"),
        pytest.param("untied", "dp2:zero3 pp4 mb1 ac:full", marks=pytest.mark.parity),
        pytest.param("tied", "dp2:zero2 pp2 mb1", marks=pytest.mark.parity),
        pytest.param("untied", "pp2x2:interleaved mb1", marks=pytest.mark.parity),
        pytest.param("untied", "pp2x2:zb-v mb1", marks=pytest.mark.parity),
        pytest.param("mixtral-like", "dp2 ep2 pp2 mb1", marks=pytest.mark.parity),
        pytest.param("mixtral-like", "dp2 pp2x2:dualpipe-v ep2:async mb1", marks=pytest.mark.parity),
    ],
)
def test_replay_equals_a_full_run(name: str, layout: str) -> None:
    """Micro-batches that are alike are run once, stages that are alike too: nothing that is told depends on it."""
    parsed = parse_layout(layout)
    ranks = [stage * parsed.world // parsed.pp for stage in range(parsed.pp)]
    replayed = trace_ranks(EVERY[name], parsed, LONG, ranks)
    assert any(section.replayed for stage in replayed for section in stage.sections)
    for a, b in zip(replayed, trace_ranks(EVERY[name], parsed, LONG, ranks, every_micro_batch=True), strict=True):
        same(a, b)


@pytest.mark.parametrize("layout", ["dp2 tp2:sp pp2 mb2 fp32"])
def test_real_ranks_send_and_hold_what_was_traced(layout: str) -> None:
    parsed = parse_layout(layout)
    real = run_distributed(workers.held_and_sent, parsed.world, EVERY["tied"], WORKLOAD, parsed)
    ranks = range(parsed.world)
    for rank, traced in zip(real, trace_ranks(EVERY["tied"], parsed, WORKLOAD, ranks), strict=True):
        assert list(traced.sent) == rank["ledger"]
        held = traced.sections[0].work.net
        for name, nbytes in rank["state"].items():
            assert sum(s.nbytes for s in held if s.category == name) == nbytes


def test_a_rank_of_16384() -> None:
    """A cut of Llama-3-405B's layout: what a rank sends depends on the world, what it takes to trace it does not."""
    layout = parse_layout("dp128:zero1 tp8:sp pp16 mb1 fp32")
    wide = Model(**{**{f: getattr(EVERY["tied"], f) for f in EVERY["tied"].__dataclass_fields__}, "layers": 16})
    workload = Workload(seq=16, global_batch=128 * 16)
    (traced,) = trace_ranks(wide, layout, workload, [16_383])
    program = rank_program(wide, layout, workload, Place(15, tp=7))
    assert traced.stage == 15
    assert traced.sent == tuple((s.axis, s.op, s.group_size, s.count, s.bytes) for s in step_traffic(program, 16))


def test_peak_is_explained(tmp_path: Path) -> None:
    traced = trace(model=EVERY["untied"], layout="dp2 pp2 mb1 fp32", seq=16, global_batch=8, stages=[1])
    peak = traced.fullest.peak
    assert sum(peak.categories.values()) == peak.nbytes == sum(count * s.nbytes for s, count in peak.largest)
    assert max(sum(held.values()) for _, held in traced.fullest.through_time()) == peak.nbytes
    assert any(storage.path.startswith("layers.") for storage, _ in peak.largest)
    out = tmp_path / "step.json"
    write_chrome(traced, in_order(traced), out)
    counters = [e["args"] for e in json.loads(out.read_text())["traceEvents"] if e["ph"] == "C"]
    assert max(sum(one.values()) for one in counters) == peak.nbytes


@pytest.mark.parametrize(
    ("layout", "words"), [("dp2:zero1:offload", "offload"), ("pp2 mb1", "stage 5"), ("dp2 mb2 fp8", "fp8")]
)
def test_what_cannot_be_traced_is_refused(layout: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        trace(model=EVERY["untied"], layout=layout, seq=16, global_batch=8, stages=[5] if "stage" in words else [0])
