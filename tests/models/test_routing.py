"""Routing: the choice, the limits and the losses, by cases small enough to compute by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from their_models import message
from torch import Tensor

from meshwright.models.moe import MoE
from meshwright.models.routing import (
    Balance,
    Router,
    Routing,
    add_loss,
    balance_loss,
    choose_tokens,
    drop_over_capacity,
    expert_capacity,
    updated_bias,
    z_loss,
)
from meshwright.spec.model import Experts, Model

SIZES = {"name": "m", "family": "f", "layers": 1, "hidden": 8, "ffn": 12, "vocab": 11, "heads": 2, "kv_heads": 2}
MODEL = Model(
    **SIZES, head_dim=4, max_positions=64, experts=Experts(count=4, top_k=2, ffn=6), moe_layers=(0,)
)  # fmt: skip


def make_moe(model: Model = MODEL, balance: Balance | None = None) -> MoE:
    torch.manual_seed(3)
    moe = MoE(model).double()
    moe.balance = balance
    return moe


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, MODEL.hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def routing_of(scores: list[list[float]], k: int = 1) -> Routing:
    """As of a router with these scores, with a gradient to them."""
    scores_tE = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    experts_tk = scores_tE.detach().topk(k, dim=1).indices
    return Routing(experts_tk, scores_tE.gather(1, experts_tk), scores_tE, scores_tE)


# --- the choice


def route(experts: Experts, scores: list[float], bias: list[float] | None = None) -> Routing:
    """Of one token whose logits give these scores."""
    router = Router(experts, hidden=1).double()
    logits = torch.tensor(scores, dtype=torch.float64)
    logits = logits.log() if experts.score == "softmax" else logits.logit()
    with torch.no_grad():
        router.weight.copy_(logits.unsqueeze(1))
        if bias is not None:
            router.selection_bias.copy_(torch.tensor(bias))
    return router(torch.ones(1, 1, dtype=torch.float64))


def test_the_best_experts_are_weighed_by_their_scores() -> None:
    routing = route(Experts(count=4, top_k=2, ffn=1, normalized=False, scale=10.0), [0.1, 0.3, 0.2, 0.4])
    assert routing.experts_tk.tolist() == [[3, 1]]
    assert routing.weights_tk[0].tolist() == pytest.approx([4.0, 3.0])
    assert routing.scores_tE[0].tolist() == pytest.approx([0.1, 0.3, 0.2, 0.4])
    normalized = route(Experts(count=4, top_k=2, ffn=1, scale=7.0), [0.1, 0.3, 0.2, 0.4])
    assert normalized.weights_tk[0].tolist() == pytest.approx([4.0, 3.0])


def test_without_a_bias_a_group_is_as_good_as_its_best_expert() -> None:
    experts = Experts(count=4, top_k=1, ffn=1, normalized=False, groups=2, top_groups=1)
    assert route(experts, [0.05, 0.4, 0.25, 0.3]).experts_tk.tolist() == [[1]]
    both = replace(experts, top_k=2)
    assert route(both, [0.05, 0.4, 0.25, 0.3]).experts_tk.tolist() == [[1, 0]]


def test_with_a_bias_a_group_is_the_sum_of_its_best_two() -> None:
    experts = Experts(count=6, top_k=1, ffn=1, score="sigmoid", normalized=False, groups=2, top_groups=1)
    experts = replace(experts, selection_bias=True)
    # The best expert is in the first group, 0.9 + 0.1 against 0.8 + 0.7; the third of a group does not count.
    assert route(experts, [0.9, 0.1, 0.1, 0.8, 0.7, 0.1]).experts_tk.tolist() == [[3]]


def test_the_selection_bias_leads_the_choice_and_not_the_weights() -> None:
    experts = Experts(count=3, top_k=1, ffn=1, score="sigmoid", normalized=False, selection_bias=True)
    routing = route(experts, [0.9, 0.6, 0.5], bias=[-0.5, 0.0, 0.2])
    assert routing.experts_tk.tolist() == [[2]]
    assert routing.weights_tk[0].tolist() == pytest.approx([0.5])


@pytest.mark.parametrize(("dtype", "exact"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_logits_are_never_narrower_than_fp32(dtype: torch.dtype, exact: torch.dtype) -> None:
    router = Router(Experts(count=4, top_k=2, ffn=1, router_bias=True), hidden=8).to(dtype)
    x = tokens(5).to(dtype)
    routing = router(x)
    assert {t.dtype for t in (routing.logits_tE, routing.scores_tE, routing.weights_tk)} == {exact}
    assert torch.equal(routing.logits_tE, x.to(exact) @ router.weight.to(exact).t() + router.bias.to(exact))


def test_sigmoids_that_all_underflow_give_finite_weights() -> None:
    router = Router(Experts(count=2, top_k=1, ffn=1, score="sigmoid"), hidden=1)
    torch.nn.init.constant_(router.weight, -1000.0)
    assert torch.isfinite(router(torch.ones(1, 1)).weights_tk).all()


# --- capacity


def test_capacity_counts_a_sequence() -> None:
    experts = Experts(count=4, top_k=2, ffn=1)
    assert expert_capacity(experts, 8, 1.0) == 4
    assert expert_capacity(experts, 8, 1.01) == 5
    assert expert_capacity(experts, 1, 0.1) == 1
    assert expert_capacity(experts, 8, 100.0) == 8  # an expert sees no token twice


def test_an_expert_drops_the_last_tokens_of_each_sequence() -> None:
    chosen = [[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4], [0.1, 0.9], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1]]
    routing = drop_over_capacity(routing_of(chosen), length=4, capacity=2)
    assert routing.kept_tk is not None
    assert routing.kept_tk.flatten().tolist() == [True, True, True, False, True, True, True, False]
    assert routing.weights_tk.flatten().tolist() == [0.9, 0.8, 0.7, 0.0, 0.9, 0.9, 0.9, 0.0]
    assert routing.experts_tk.flatten().tolist() == [0, 0, 1, 0, 1, 0, 0, 0]


def test_a_token_may_lose_its_first_expert_and_keep_its_second() -> None:
    routing = drop_over_capacity(routing_of([[0.6, 0.4, 0.0], [0.7, 0.0, 0.3]], k=2), length=2, capacity=1)
    assert routing.kept_tk is not None
    assert routing.kept_tk.tolist() == [[True, True], [False, True]]


def test_dropped_tokens_are_counted_and_get_nothing() -> None:
    moe = make_moe(replace(MODEL, experts=Experts(count=4, top_k=1, ffn=6)), Balance(capacity_factor=0.5))
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[2] = 1.0
    y = moe(tokens(2, 8).abs())  # all to expert 2, which takes one of eight
    assert (y[:, 0] != 0).all()
    assert (y[:, 1:] == 0).all()
    assert moe.dropped == 14
    assert moe.load_E is not None
    assert moe.load_E.tolist() == [0, 0, 2, 0]


# --- expert choice


def test_experts_choose_their_best_tokens_of_each_sequence() -> None:
    scores = [[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8], [0.4, 0.6], [0.3, 0.7], [0.2, 0.8], [0.1, 0.9]]
    routing = choose_tokens(routing_of(scores), length=4, capacity=2, scale=10.0)
    chosen = [
        {int(e): round(w.item(), 6) for e, w, kept in zip(*row, strict=True) if kept}
        for row in zip(routing.experts_tk, routing.weights_tk, routing.kept_tk, strict=True)
    ]
    assert chosen == [{0: 9.0}, {1: 4.0}, {0: 7.0}, {1: 8.0}, {0: 4.0}, {0: 3.0}, {1: 8.0}, {1: 9.0}]
    assert routing.experts_tk.shape == (8, 1)


def test_a_token_may_have_all_experts_or_none() -> None:
    routing = choose_tokens(routing_of([[0.9, 0.9], [0.1, 0.2]]), length=2, capacity=1, scale=1.0)
    assert routing.kept_tk is not None
    assert routing.kept_tk.tolist() == [[True, True], [False, False]]
    assert routing.weights_tk.tolist() == [[0.9, 0.9], [0.0, 0.0]]


def test_expert_choice_loads_experts_evenly() -> None:
    moe = make_moe(balance=Balance(expert_choice=True))
    moe(tokens(3, 8))
    assert moe.load_E is not None
    assert moe.load_E.tolist() == [12, 12, 12, 12]  # 3 sequences of 2 * 8 / 4
    assert moe.dropped == 0


# --- sequences are balanced one by one


@pytest.mark.parametrize(
    "balance",
    [
        Balance(aux_loss=0.3, z_loss=0.2),
        Balance(capacity_factor=0.75, aux_loss=0.1),
        Balance(expert_choice=True, capacity_factor=1.5),
    ],
    ids=["losses", "capacity", "expert choice"],
)
def test_the_size_of_a_micro_batch_changes_nothing(balance: Balance) -> None:
    x, dy = tokens(3, 8), tokens(3, 8).flip(0)
    whole, alone = make_moe(balance=balance), make_moe(balance=balance)
    y = whole(x)
    y.backward(dy)
    for i in range(3):
        part = alone(x[i : i + 1])
        part.backward(dy[i : i + 1])
        torch.testing.assert_close(part[0], y[i], rtol=0, atol=1e-12)
    for (name, ours), theirs in zip(whole.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12, msg=name)
    assert torch.equal(whole.load_E, alone.load_E)
    assert whole.dropped == alone.dropped


@pytest.mark.parametrize("options", [{"aux_loss": 0.1}, {"z_loss": 0.1}, {"capacity_factor": 1.0}, {"expert_choice": True}])
def test_parts_of_sequences_are_refused(options: dict[str, Any]) -> None:
    moe = make_moe(balance=Balance(**options))
    said = message(moe, tokens(6))
    assert said.startswith("experts are balanced sequence by sequence, but the 6 tokens")
    moe.length = 4
    assert "are not whole sequences of 4" in message(moe, tokens(6))
    moe.length = 3
    assert moe(tokens(6)).shape == (6, 8)


def test_a_bias_alone_acts_on_no_sequence() -> None:
    assert make_moe(balance=Balance(bias_rate=1e-3))(tokens(6)).shape == (6, 8)


# --- losses


def test_an_even_router_has_a_balance_loss_of_one() -> None:
    routing = routing_of([[0.5, 0.5]] * 4)._replace(experts_tk=torch.tensor([[0], [1], [1], [0]]))
    assert balance_loss(routing, length=2).tolist() == [1.0, 1.0]


def test_balance_loss_by_hand() -> None:
    """Experts get 3/4 and 1/4 of the first sequence and have mean shares 0.6 and 0.4; of the second, everything and 0.75."""
    scores = [[0.8, 0.2], [0.6, 0.4], [0.7, 0.3], [0.3, 0.7], [0.75, 0.25], [0.75, 0.25], [0.75, 0.25], [0.75, 0.25]]
    routing = routing_of(scores)
    loss = balance_loss(routing, length=4)
    assert loss.tolist() == pytest.approx([2 * (0.75 * 0.6 + 0.25 * 0.4), 2 * 0.75])
    loss[0].backward()
    # Shares are scores over their sum, 1 here: d(s0 / (s0 + s1)) / ds0 = s1.
    row = routing.scores_tE.grad[0]
    assert row.tolist() == pytest.approx([2 / 4 * (0.75 - 0.25) * 0.2, -2 / 4 * (0.75 - 0.25) * 0.8])


def test_sigmoid_scores_are_made_shares_first() -> None:
    assert balance_loss(routing_of([[0.9, 0.3]]), length=1).tolist() == pytest.approx([2 * 0.75])


def test_balance_loss_of_several_experts_a_token() -> None:
    """E / k = 1.5: two of three experts, whose shares add up to 0.9."""
    assert balance_loss(routing_of([[0.5, 0.4, 0.1]], k=2), length=1).tolist() == pytest.approx([1.5 * 0.9])


def test_z_loss_by_hand() -> None:
    """Logits of 0 over E experts have a log-sum-exp of ln E."""
    assert z_loss(routing_of([[0.0, 0.0]] * 6), length=3).item() == pytest.approx(2 * math.log(2) ** 2)


def test_an_added_loss_changes_gradients_and_no_value() -> None:
    x = tokens(3).requires_grad_()
    y = add_loss(x * 2, x.square().sum(), factor=0.5)
    assert torch.equal(y, x * 2)
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 + x.detach())


@pytest.mark.parametrize("scale", [1.0, torch.tensor(0.25)])
def test_losses_reach_the_router(scale: float | Tensor) -> None:
    """As if they had been added to the loss of the model."""
    x, dy, balance = tokens(2, 8), tokens(2, 8).flip(0), Balance(aux_loss=0.3, z_loss=0.2)
    inside, outside = make_moe(balance=balance), make_moe()
    inside.loss_scale = scale
    inside(x).backward(dy)
    routing = outside.router(x.flatten(0, 1))
    loss = 0.3 * balance_loss(routing, 8).sum() + 0.2 * z_loss(routing, 8)
    ((outside(x) * dy).sum() + scale * loss).backward()
    for ours, theirs in zip(inside.parameters(), outside.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)
    plain = make_moe()
    plain(x).backward(dy)
    assert not torch.allclose(plain.router.weight.grad, inside.router.weight.grad)


def test_the_bias_moves_towards_an_even_load() -> None:
    bias = updated_bias(torch.tensor([0.0, 0.5, -0.5, 0.0]), torch.tensor([10, 0, 4, 2]), rate=0.1)
    assert bias.tolist() == pytest.approx([-0.1, 0.6, -0.5, 0.1])


# --- errors


@pytest.mark.parametrize("name", ["aux_loss", "z_loss", "bias_rate"])
@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_factors_out_of_range(name: str, value: float) -> None:
    assert message(lambda: Balance(**{name: value})) == f"{name} must be a finite number of at least 0, got {value}"


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_capacity_out_of_range(value: float) -> None:
    assert message(lambda: Balance(capacity_factor=value)).startswith("capacity_factor must be a finite number above 0")


def test_options_that_would_not_act() -> None:
    said = message(lambda: Balance(expert_choice=True, aux_loss=0.1, bias_rate=0.1))
    assert said.startswith("aux_loss and bias_rate would not act")
    assert "m (f) does not have" in message(Balance(bias_rate=1e-3).check, MODEL)
    assert message(Balance().check, replace(MODEL, experts=None, moe_layers=())) == "m has no experts to balance"
    Balance(bias_rate=1e-3).check(replace(MODEL, experts=replace(MODEL.experts, selection_bias=True)))
