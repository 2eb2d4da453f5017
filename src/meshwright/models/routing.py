"""Which experts a token visits: scores, the choice, and the means to keep experts evenly loaded.

All of it acts on whole sequences, one by one, so that neither the size of a micro-batch nor the layout changes a result.

Shape suffixes: t tokens of all sequences here, S sequences, L tokens of one, D hidden size, E experts, G groups of experts,
k experts of a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.spec.errors import UserError
from meshwright.spec.model import Experts, Model

TINY = 1e-20
"""Keeps weights finite when every sigmoid of a token's experts underflows, as in the reference code of DeepSeek-V3."""


@dataclass(frozen=True)
class Balance:
    """How training keeps experts evenly loaded. All off: the router of the published model.

    `aux_loss`, `z_loss`: factors of `balance_loss` and `z_loss`. `bias_rate`: step of `updated_bias`. `capacity_factor`:
    an expert takes at most that multiple of an even load of each sequence; the rest is dropped. `expert_choice`: experts
    choose tokens, as many as the capacity (factor 1 unless given). A token's experts then depend on the tokens after it,
    which a model that generates does not have. Raises UserError for values out of range and for options that would not act.
    """

    aux_loss: float = 0.0
    z_loss: float = 0.0
    bias_rate: float = 0.0
    capacity_factor: float | None = None
    expert_choice: bool = False

    def __post_init__(self) -> None:
        for name in ("aux_loss", "z_loss", "bias_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}")
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise UserError(f"capacity_factor must be a finite number above 0, got {self.capacity_factor}")
        if self.expert_choice and (self.aux_loss or self.bias_rate):
            given = " and ".join(name for name in ("aux_loss", "bias_rate") if getattr(self, name))
            raise UserError(f"{given} would not act: with expert_choice all experts are equally loaded; leave it out")

    def check(self, model: Model) -> None:
        """Raise UserError where `model` has nothing that an option could act on."""
        if model.experts is None:
            raise UserError(f"{model.name} has no experts to balance")
        if self.bias_rate and not model.experts.selection_bias:
            raise UserError(
                f"bias_rate {self.bias_rate} moves the router's selection bias, which {model.name} ({model.family}) does not "
                "have; try aux_loss"
            )


class Routing(NamedTuple):
    """Each token's experts and their weights.

    `kept_tk`: False where an assignment was dropped, None if all are kept. A dropped one still names an expert and has
    weight zero, so a dispatch that ignores `kept_tk` computes the same, only more.
    """

    experts_tk: Tensor
    weights_tk: Tensor
    scores_tE: Tensor
    logits_tE: Tensor
    kept_tk: Tensor | None = None


class Router(nn.Module):
    """Scores experts, chooses `top_k` for each token, and weighs them.

    The choice may be led by a bias that does not enter the weights (DeepSeek-V3, arXiv 2412.19437, equation 16), and kept
    to the best `top_groups` of `groups` groups. A group is as good as its best expert (DeepSeek-V2, arXiv 2405.04434,
    section 2.2.2); with the bias, as the sum of its best two (DeepSeek-V3, section 2.1.2).
    """

    selection_bias: Tensor | None

    def __init__(self, experts: Experts, hidden: int):
        super().__init__()
        self.experts = experts
        self.weight = nn.Parameter(torch.empty(experts.count, hidden))
        self.bias = nn.Parameter(torch.empty(experts.count)) if experts.router_bias else None
        self.register_buffer("selection_bias", torch.zeros(experts.count) if experts.selection_bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_tD: Tensor) -> Routing:
        # A rounded logit sends a token to other experts, so logits are exact whatever the dtype of the model.
        exact = torch.promote_types(x_tD.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(exact)
        logits_tE = F.linear(x_tD.to(exact), self.weight.to(exact), bias)
        scores_tE = logits_tE.sigmoid() if self.experts.score == "sigmoid" else logits_tE.softmax(dim=-1)
        experts_tk = self._choose(scores_tE.detach())
        weights_tk = scores_tE.gather(1, experts_tk)
        if self.experts.normalized:
            weights_tk = weights_tk / (weights_tk.sum(dim=-1, keepdim=True) + TINY)
        return Routing(experts_tk, weights_tk * self.experts.scale, scores_tE, logits_tE)

    def _choose(self, scores_tE: Tensor) -> Tensor:
        biased = self.selection_bias is not None
        if self.selection_bias is not None:
            scores_tE = scores_tE + self.selection_bias
        if self.experts.groups > 1:
            scores_tGe = scores_tE.unflatten(-1, (self.experts.groups, -1))
            best = min(2 if biased else 1, scores_tGe.shape[-1])
            worth_tG = scores_tGe.topk(best, dim=-1).values.sum(dim=-1)
            open_tG = torch.zeros_like(worth_tG, dtype=torch.bool)
            open_tG.scatter_(1, worth_tG.topk(self.experts.top_groups, dim=-1).indices, True)
            scores_tE = scores_tGe.masked_fill(~open_tG.unsqueeze(-1), -math.inf).flatten(1)
        return scores_tE.topk(self.experts.top_k, dim=-1).indices


def buffer_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """What checkpoints hold beside `spec.parameters.parameters`: the selection biases, by name."""
    if model.experts is None or not model.experts.selection_bias:
        return {}
    return {f"layers.{layer}.moe.router.selection_bias": (model.experts.count,) for layer in model.moe_layers}


# --- limits: how many tokens an expert takes ---------------------------------------------------------------------------


def expert_capacity(experts: Experts, length: int, factor: float) -> int:
    """Tokens of a sequence that one expert takes at most (Switch, arXiv 2101.03961, equation 3, for k experts a token)."""
    return min(length, math.ceil(experts.top_k * length / experts.count * factor))


def drop_over_capacity(routing: Routing, length: int, capacity: int) -> Routing:
    """Each expert keeps its first `capacity` tokens of each sequence of `length`, and drops the later ones: what it does
    with a token never depends on the tokens after it. The weights of the experts that are left stay as they are."""
    chosen_tE = torch.zeros_like(routing.scores_tE, dtype=torch.int64).scatter_(1, routing.experts_tk, 1)
    place_tE = chosen_tE.view(-1, length, chosen_tE.shape[1]).cumsum(dim=1).view_as(chosen_tE)
    kept_tk = place_tE.gather(1, routing.experts_tk) <= capacity
    return routing._replace(weights_tk=routing.weights_tk * kept_tk, kept_tk=kept_tk)


def choose_tokens(routing: Routing, length: int, capacity: int, scale: float) -> Routing:
    """Expert choice (Zhou et al. 2022, arXiv 2202.09368, section 3.2): each expert takes the `capacity` tokens of each
    sequence that score highest with it, weighed by that score (times `scale`).

    k becomes the most experts that any token here has got; kept assignments come first.
    """
    scores_SLE = routing.scores_tE.view(-1, length, routing.scores_tE.shape[1])
    kept_SLE = torch.zeros_like(scores_SLE, dtype=torch.bool)
    kept_tE = kept_SLE.scatter_(1, scores_SLE.detach().topk(capacity, dim=1).indices, True).view_as(routing.scores_tE)
    most = max(1, int(kept_tE.sum(dim=1).max()))
    experts_tk = kept_tE.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    kept_tk = kept_tE.gather(1, experts_tk)
    return routing._replace(
        experts_tk=experts_tk, weights_tk=routing.scores_tE.gather(1, experts_tk) * kept_tk * scale, kept_tk=kept_tk
    )


# --- losses and the bias ------------------------------------------------------------------------------------------------


def balance_loss(routing: Routing, length: int) -> Tensor:
    """The auxiliary loss of each sequence, without its factor, [S]; 1 when load and scores are even.

    E/k times the sum over experts of the fraction of assignments that an expert gets (times k) and its mean share of the
    scores (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20), which for k = 1 is the loss of Switch (arXiv 2101.03961,
    equation 4) of one sequence. Over a whole batch it would depend on how the batch is cut.
    """
    scores_tE, k = routing.scores_tE, routing.experts_tk.shape[1]
    shares_tE = scores_tE / scores_tE.sum(dim=-1, keepdim=True)
    chosen_tE = torch.zeros_like(shares_tE).scatter_(1, routing.experts_tk, 1.0)
    mean_SE, frequency_SE = (each.view(-1, length, each.shape[1]).mean(dim=1) for each in (shares_tE, chosen_tE))
    return (frequency_SE * mean_SE).sum(dim=1) * (scores_tE.shape[1] / k)


def z_loss(routing: Routing, length: int) -> Tensor:
    """Summed over sequences of `length`, the mean over their tokens of the squared log-sum-exp of the router's logits
    (ST-MoE, arXiv 2202.08906, equation 5). Parts of sequences add up: `length` is that of a whole one."""
    return routing.logits_tE.logsumexp(dim=-1).square().sum() / length


def add_loss(x: Tensor, loss: Tensor, factor: float | Tensor = 1.0) -> Tensor:
    """`x` itself; but where its gradient passes in backward, `factor` times the gradient of `loss` starts.

    So a loss of an inner layer needs no way out of the model, nor out of its pipeline stage.
    """
    return _AddLoss.apply(x, loss, factor)  # type: ignore[no-any-return]


class _AddLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, factor: float | Tensor) -> Tensor:
        ctx.factor = torch.as_tensor(factor, dtype=loss.dtype, device=loss.device)
        ctx.shape = loss.shape
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, ctx.factor.expand(ctx.shape), None


def updated_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """The selection bias after a step in which experts got `load_E` rows: up by `rate` where that is below the mean, down
    where above (DeepSeek-V3, section 2.1.2; Wang et al. 2024, arXiv 2408.15664, algorithm 1)."""
    load = load_E.double()
    return bias_E + rate * (load.mean() - load).sign().to(bias_E.dtype)
