"""Experts in balance, over all ranks that share a router: the auxiliary loss, the loss-free bias, and what the metrics show.

Shape suffixes: t tokens of this rank, E all experts, S sequences, l layers with experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.models.moe import MoE, Routing, add_loss, updated_bias
from meshwright.models.routing import Balance, z_loss
from meshwright.parallel.collectives import Group, all_reduce_forward_identity_backward
from meshwright.parallel.mesh import Mesh
from meshwright.spec.errors import UserError


def apply_balance(moe: MoE, balance: Balance, mesh: Mesh, seq: int) -> None:
    """Make `moe` balance its experts as asked, also where the tokens of sequences of `seq` are spread over ranks.

    Raises UserError for options that act on a whole sequence, where no rank has one.
    """
    moe.balance, moe.length = balance, seq
    layout = mesh.layout
    if layout.tp == 1 and layout.cp == 1:
        return
    if balance.capacity_factor is not None or balance.expert_choice:
        given = "expert_choice" if balance.expert_choice else "capacity_factor"
        raise UserError(
            f"{given} looks at whole sequences, but layout '{layout}' spreads each over tp {layout.tp} x cp {layout.cp} ranks: "
            "leave it out, or split over dp, ep and pp only"
        )
    moe.balanced = partial(_balanced, moe, mesh)  # type: ignore[method-assign]


def _balanced(moe: MoE, mesh: Mesh, routing: Routing) -> Routing:
    balance, layout = moe.balance, mesh.layout
    assert balance is not None
    assert moe.length is not None
    if not (torch.is_grad_enabled() and (balance.aux_loss or balance.z_loss)):
        return routing
    tokens, index = len(routing.experts_tk), mesh["tp"].index
    here = torch.arange(index * tokens, (index + 1) * tokens, device=routing.experts_tk.device)
    sequence_t = here // (moe.length // layout.cp)
    aux = sequence_balance_loss(routing, sequence_t, layout.micro_batch, (mesh["tp"], mesh["cp"])).sum() * balance.aux_loss
    loss = aux + z_loss(routing, moe.length) * balance.z_loss
    return routing._replace(weights_tk=add_loss(routing.weights_tk, loss, moe.loss_scale))


def sequence_balance_loss(routing: Routing, sequence_t: Tensor, sequences: int, groups: Sequence[Group]) -> Tensor:
    """The balance loss of each of the micro-batch's `sequences`, without its factor, [sequences] (DeepSeek-V3, arXiv
    2412.19437, equations 17 to 20): the sum over experts of f and P, where f is E/k times the part of the tokens that visit the
    expert, and P is its mean share of a token's scores. Without a gradient through f.

    `sequence_t`: which sequence each token here belongs to. `groups`: those over which the tokens of a sequence are spread (tp,
    cp). The value is whole on every rank; its gradient reaches the scores of this rank's tokens, so the gradients of the router
    add up over `groups` to those of one loss.
    """
    exact = torch.promote_types(routing.scores_tE.dtype, torch.float32)
    scores_tE = routing.scores_tE.to(exact)
    shares_tE = scores_tE / scores_tE.sum(dim=-1, keepdim=True)
    chosen_tE = torch.zeros_like(shares_tE).scatter_(1, routing.experts_tk, 1.0)
    each_tX = torch.cat((shares_tE, chosen_tE, chosen_tE.new_ones(len(chosen_tE), 1)), dim=1)
    sums_SX = each_tX.new_zeros(sequences, each_tX.shape[1]).index_add(0, sequence_t, each_tX)
    for group in groups:
        sums_SX = all_reduce_forward_identity_backward(sums_SX, group)
    experts, k = scores_tE.shape[1], routing.experts_tk.shape[1]
    shares_SE, chosen_SE, tokens_S1 = sums_SX.split((experts, experts, 1), dim=1)
    frequency_SE = chosen_SE.detach() * (experts / k) / tokens_S1
    return (frequency_SE * shares_SE / tokens_S1).sum(dim=1)


def summed_load(moes: Sequence[MoE], groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """(rows that each expert got, rows dropped) of every layer since the counts were last cleared, int64 [layers, E] and
    [layers]. `groups`: those whose ranks bring different tokens (tp, cp, dp). One all-reduce a group, once a step."""
    if not moes:
        return torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    load_lE = torch.stack([moe.load_E for moe in moes])
    counts_lX = torch.cat((load_lE, load_lE.new_tensor([[moe.dropped] for moe in moes])), dim=1)
    for group in groups:
        group.all_reduce(counts_lX)
    return counts_lX[:, :-1], counts_lX[:, -1]


def update_selection_bias(moes: Sequence[MoE], load_lE: Tensor, rate: float) -> None:
    """Balance without a loss (DeepSeek-V3, section 2.1.2), from `summed_load`; the same on every rank that has the layer."""
    for moe, load_E in zip(moes, load_lE, strict=True):
        moe.router.selection_bias.copy_(updated_bias(moe.router.selection_bias, load_E, rate))


def load_metrics(load_lE: Tensor, dropped_l: Tensor, stages: Group | None = None) -> dict[str, float]:
    """What to log of `summed_load`: imbalance (an expert's rows over the mean of its layer: the worst, and the mean over layers
    of each one's worst), the emptiest expert's rows over the mean, the rows of all experts, and the dropped part of them. Of all
    `stages`; a stage may have no layer with experts."""
    relative_lE = load_lE.double() / load_lE.double().mean(dim=1, keepdim=True).clamp_min(1.0)
    worst_l = relative_lE.amax(dim=1)
    largest = torch.tensor([max(worst_l.tolist(), default=0.0), -min(relative_lE.flatten().tolist(), default=torch.inf)])
    sums = torch.stack((worst_l.sum(), worst_l.new_tensor(len(worst_l)), dropped_l.sum(), load_lE.sum() + dropped_l.sum()))
    largest = largest.to(sums)
    if stages is not None:
        stages.all_reduce(largest, op=dist.ReduceOp.MAX)
        stages.all_reduce(sums)
    worst, least = largest.tolist()
    worst_sum, layers, dropped, assigned = sums.tolist()
    return {
        "expert_imbalance_max": worst,
        "expert_imbalance_mean": worst_sum / layers,
        "expert_load_min": -least,
        "expert_rows": assigned,
        "dropped": dropped / max(1, assigned),
    }
