"""A MoE layer whose experts are spread over ranks computes what the plain layer computes in one process."""

from __future__ import annotations

from collections.abc import Iterator

import expert_workers as workers
import pytest
import torch
from fixtures import MIXTRAL, WORKLOAD
from torch import Tensor

from meshwright.parallel.balance import load_metrics, sequence_balance_loss
from meshwright.spec.grid import Grid
from meshwright.spec.layout import Layout
from meshwright.spec.model import Experts, Model
from meshwright.spec.notation import parse_layout
from meshwright.spec.shards import Cut, Shard
from meshwright.testing import RankError, run_distributed

TOLERANCE = 1e-10
E, K, D = 8, 2, 6


def model(**experts: object) -> Model:
    routed = {
        "count": E,
        "top_k": K,
        "ffn": 12,
        "bias": True,
        "router_bias": True,
        "selection_bias": True,
        "score": "sigmoid",
    }
    return Model(
        name="moe", family="deepseek_v3", layers=1, hidden=D, ffn=8, vocab=32, heads=2, kv_heads=2, head_dim=4,
        max_positions=64, moe_layers=(0,), experts=Experts(**{**routed, **experts}),
    )  # fmt: skip


WITH_SHARED = model(shared_ffn=8)
PLAIN = model()
ONE = model(top_k=1, normalized=False)
"""A token visits one expert, so a hot expert gets all of them."""

CASES = (
    # layout, model, hot experts, tokens of each dp rank
    ("dp2 ep2", PLAIN, (), (5, 3)),
    ("dp2 ep2", ONE, (6,), (5, 3)),
    ("dp2 ep2", PLAIN, (0, 3), (0, 7)),
    ("dp4 ep4", PLAIN, (), (3, 0, 2, 7)),
    ("dp4 ep4", ONE, (2,), (4, 1, 2, 3)),
    ("dp4 ep2", PLAIN, (), (3, 1, 2, 7)),
    ("dp2 etp2", PLAIN, (), (5, 3)),
    ("dp4 ep2 etp2", PLAIN, (), (3, 1, 2, 7)),
    ("dp4 ep2 etp2", ONE, (7,), (3, 1, 0, 7)),
    ("tp2 mb1", WITH_SHARED, (), (8,)),
    ("tp2 ep2", WITH_SHARED, (), (8,)),
    ("tp2:sp ep2", WITH_SHARED, (), (8,)),
    ("tp2:sp etp2", WITH_SHARED, (), (8,)),
    ("dp2 tp2 ep4", WITH_SHARED, (1, 2), (8, 4)),
    ("dp2 tp2:sp ep2 etp2", WITH_SHARED, (), (8, 4)),
    ("dp2 tp2 etp2", WITH_SHARED, (), (2, 6)),
)


@pytest.mark.parametrize(
    ("layout", "model", "hot", "counts"), CASES, ids=lambda value: getattr(value, "name", None) or str(value)
)
def test_equals_one_process(layout: str, model: Model, hot: tuple[int, ...], counts: tuple[int, ...]) -> None:
    parsed = parse_layout(f"{layout} fp64")
    reference = workers.one_process(model, hot, counts)
    ranks = run_distributed(workers.one_rank, parsed.world, model, parsed, hot, counts)
    for rank, outcome in enumerate(ranks):
        mine = tokens_of(rank, parsed, counts)
        assert_close("y", outcome.y, reference.y[mine])
        assert_close("dx", outcome.dx, reference.dx[mine])
    for name, shard, gradient in summed_gradients(parsed, ranks):
        assert_close(name, gradient, shard.of(reference.gradients[name]))


def test_a_rank_without_tokens_still_takes_part() -> None:
    outcomes = run_distributed(workers.one_rank, 2, PLAIN, parse_layout("dp2 ep2 fp64"), (), (0, 0))
    for outcome in outcomes:
        assert outcome.y.shape == outcome.dx.shape == (0, D)
        assert all(not gradient.any() for gradient in outcome.gradients.values())


@pytest.mark.parametrize("hot", [(), (2,)])
def test_ledger_does_not_depend_on_the_routing(hot: tuple[int, ...]) -> None:
    """Rows travel out and home, forward and backward; the counts travel once."""
    (rank, *_) = run_distributed(workers.one_rank, 4, PLAIN, parse_layout("dp4 ep2 etp2 fp64"), hot, (3, 1, 2, 7))
    rows = 3 * K * 2 * D * 8
    counts = 4 * (E // 2) * 8
    assert rank.ledger == [("ep", "all_to_all", 4, 5, 4 * rows + counts)]


def test_balance_loss_by_hand() -> None:
    """Two sequences in one process, equations 17 to 20 of the DeepSeek-V3 report written out."""
    routing, sequence_t = workers.routing(seed=0, count=7), torch.tensor([0, 1, 1, 0, 0, 1, 0])
    losses, scores_tE = sequence_balance_loss(routing, sequence_t, 2, ()), routing.scores_tE.detach()
    for sequence in (0, 1):
        members = [t for t in range(7) if sequence_t[t] == sequence]
        expected = 0.0
        for i in range(E):
            visits = sum(i in routing.experts_tk[t] for t in members)
            share = sum(float(scores_tE[t, i] / scores_tE[t].sum()) for t in members)
            expected += E / (K * len(members)) * visits * share / len(members)
        assert float(losses[sequence].detach()) == pytest.approx(expected, rel=1e-12)


def test_balance_loss_of_scattered_sequences() -> None:
    """13 tokens of three sequences on four ranks: the loss of one process, and of its gradient each rank its part."""
    count, sequence_t = 13, torch.arange(13) % 3
    whole = workers.routing(0, count)
    expected = sequence_balance_loss(whole, sequence_t, 3, ())
    expected.sum().backward()
    for rank, (losses, gradient) in enumerate(run_distributed(workers.balance_loss_of_a_part, 4, count, sequence_t, 3)):
        assert_close("loss", losses, expected.detach())
        assert_close("gradient", gradient, whole.scores_tE.grad[rank::4])


def test_load_is_that_of_all_ranks() -> None:
    counts = (5, 1, 2)
    for load_lE, dropped_l, bias, metrics in run_distributed(workers.loads, 3, ONE, (6,), counts):
        assert load_lE[0].tolist() == [0, 0, 0, 0, 0, 0, 8, 0]
        assert load_lE[1].sum() == 8
        assert dropped_l.tolist() == [0, 0]
        assert bias.tolist() == [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, -0.5, 0.5]
        second = load_lE[1].max().item()
        assert metrics == {
            "expert_imbalance_max": 8.0,
            "expert_imbalance_mean": (8.0 + second) / 2,
            "expert_load_min": 0.0,
            "expert_rows": 16,
            "dropped": 0.0,
        }


def test_metrics_by_hand() -> None:
    metrics = load_metrics(torch.tensor([[3, 1], [2, 2]]), torch.tensor([2, 0]))
    assert metrics == {
        "expert_imbalance_max": 1.5,
        "expert_imbalance_mean": 1.25,
        "expert_load_min": 0.5,
        "expert_rows": 10,
        "dropped": 0.2,
    }


def test_tokens_that_tp_does_not_divide_are_refused() -> None:
    with pytest.raises(
        RankError, match=r"UserError: tp 2 ranks route equal parts of a micro-batch's 7 tokens.* try .* = 8"
    ):
        run_distributed(workers.one_rank, 2, PLAIN, parse_layout("tp2 fp64"), (), (7,))


def tokens_of(rank: int, layout: Layout, counts: tuple[int, ...]) -> slice:
    """Where the tokens of a rank's output are among those of all dp ranks."""
    at = Grid(layout).coordinates(rank)
    start, count = sum(counts[: at["dp"]]), counts[at["dp"]]
    if layout.sp:
        count //= layout.tp
        start += at["tp"] * count
    return slice(start, start + count)


def summed_gradients(layout: Layout, ranks: list[workers.Outcome]) -> Iterator[tuple[str, Shard, Tensor]]:
    """The gradients of each part of each parameter, summed over the ranks that hold it as the engine would."""
    sums: dict[tuple[str, tuple[Cut, ...]], Tensor] = {}
    shards: dict[tuple[str, tuple[Cut, ...]], Shard] = {}
    for rank, outcome in enumerate(ranks):
        for name, shard in outcome.shards.items():
            repeats = shard.replicas == "tp" and not shard.partial and Grid(layout).coordinates(rank)["tp"] > 0
            key = (name, shard.cuts)
            shards[key] = shard
            sums[key] = sums.get(key, torch.zeros(())) + (0 if repeats else outcome.gradients[name])
    return ((name, shards[name, cuts], total) for (name, cuts), total in sums.items())


def assert_close(what: str, got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if expected.numel():
        scale = expected.abs().max().clamp_min(1.0)  # gradients that are zero by definition leave rounding
        assert (got - expected).abs().max() <= TOLERANCE * scale, what


@pytest.mark.parametrize("recompute", ["ac:full", "ac:full:1", "ac:mlp"])
def test_tokens_that_run_again_in_backward_are_counted_once(recompute: str) -> None:
    plain, again = (
        run_distributed(workers.expert_loads, 1, MIXTRAL, WORKLOAD, parse_layout(f"mb4 {ac} fp64"))[0]
        for ac in ("", recompute)
    )
    assert len(plain) == MIXTRAL.layers
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
