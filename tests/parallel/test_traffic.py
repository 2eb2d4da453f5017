"""What the program predicts, the engine holds and sends: equal to the byte and to the call."""

from __future__ import annotations

from collections import Counter

import pytest
import workers
from fixtures import CI_MODELS, CI_SPARSE, LAYOUTS, MODELS, MORE_LAYOUTS, SPARSE, SPARSE_LAYOUTS, WORKLOAD, cases

from meshwright.cost.memory import state_bytes
from meshwright.cost.program import Place, rank_program
from meshwright.cost.traffic import step_traffic
from meshwright.spec.legality import micro_batches
from meshwright.spec.model import Model
from meshwright.spec.notation import parse_layout
from meshwright.testing import run_distributed


@pytest.mark.parametrize(
    ("name", "layout", "precision"), cases(MODELS, CI_MODELS, LAYOUTS + MORE_LAYOUTS, ("bf16", "fp32"))
)
def test_predicted_equals_counted(name: str, layout: str, precision: str) -> None:
    check_traffic(MODELS[name], layout, precision)


@pytest.mark.parametrize(("name", "layout", "precision"), cases(SPARSE, CI_SPARSE, SPARSE_LAYOUTS, ("bf16", "fp32")))
def test_predicted_equals_counted_with_experts(name: str, layout: str, precision: str) -> None:
    check_traffic(SPARSE[name], layout, precision)


def check_traffic(model: Model, layout: str, precision: str) -> None:
    parsed = parse_layout(f"{layout} {precision}")
    for rank in run_distributed(workers.held_and_sent, parsed.world, model, WORKLOAD, parsed):
        program = rank_program(model, parsed, WORKLOAD, Place(rank["stage"], *rank["seat"]))
        predicted = [
            (s.axis, s.op, s.group_size, s.count, s.bytes) for s in step_traffic(program, micro_batches(parsed, WORKLOAD))
        ]
        assert rank["ledger"] == predicted
        assert rank["state"] == state_bytes(program, parsed)


DTYPES = (
    "bf16 params:fp32 grads:bf16",
    "bf16 params:fp32",
    "bf16 grads:bf16",
    "fp16 params:fp32 grads:fp16",
    "bf16 params:bf16",
)
DTYPE_CASES = (
    ("tied", "dp2:zero1 tp2:sp mb2"),
    ("untied", "dp2:zero3 pp2 mb1"),
    ("few-kv-heads", "dp2 tp2 pp2 mb2"),
    ("gpt2-like", "dp4:zero2 mb1"),
    ("gpt-oss-like", "dp4:zero3x2 ep4 mb2 ac:selective"),
)


@pytest.mark.parametrize(
    ("case", "dtypes"),
    [
        pytest.param(case, dtypes, marks=[] if dtypes == DTYPES[0] and case in DTYPE_CASES[:3] else [pytest.mark.parity])
        for case in DTYPE_CASES
        for dtypes in DTYPES
    ],
)
def test_predicted_equals_counted_with_dtypes_of_their_own(case: tuple[str, str], dtypes: str) -> None:
    name, layout = case
    check_traffic((MODELS | SPARSE)[name], layout, dtypes)


@pytest.mark.parametrize(
    "layout", ["dp2 tp2:sp pp2 mb1 fp32", "dp2:zero1 tp2 mb1 fp32", "dp4 mb1 fp32", "tp4:async mb1 fp32"]
)
def test_ledger_has_a_witness(layout: str) -> None:
    """The ledger misses no call that reaches torch.distributed, and invents none."""
    parsed = parse_layout(layout)
    for rank in run_distributed(workers.held_and_sent, parsed.world, MODELS["tied"], WORKLOAD, parsed):
        seen_count, seen_bytes = Counter(op for op, _ in rank["calls"]), Counter[str]()
        for op, nbytes in rank["calls"]:
            seen_bytes[op] += nbytes
        told_count, told_bytes = Counter[str](), Counter[str]()
        for _, op, _, count, nbytes in rank["ledger"]:
            told_count[op] += count
            told_bytes[op] += nbytes
        assert told_count == seen_count
        assert told_bytes == seen_bytes


def test_buckets_are_the_modules_memory() -> None:
    """The module's parameters are views of the buckets, which hold nothing beside them but alignment."""
    rank = run_distributed(workers.held_and_sent, 1, MODELS["untied"], WORKLOAD, parse_layout("mb1 fp32"))[0]
    assert rank["held_by_module"] <= rank["state"]["parameters"] <= 1.1 * rank["held_by_module"]
