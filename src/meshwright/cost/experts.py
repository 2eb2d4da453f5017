"""Experts of a layer on one rank: router, dispatch, products, combine, and the shared expert (`parallel/expert.py`). Symbols as in
`parts.py`."""

from __future__ import annotations

from math import ceil

from meshwright.cost.ops import Collective, Elementwise, Gemm
from meshwright.cost.parts import Part, Shapes, activation, gated_mlp, whole_linear
from meshwright.spec.layout import Layout
from meshwright.spec.model import Experts


def experts(s: Shapes, experts: Experts) -> Part:
    """The routed experts, their outputs brought back to every rank of tp, and the shared expert (`parallel/expert.py`)."""
    parts, shared, outputs = routed(s, experts), shared_expert(s, experts), expert_outputs(s, experts)
    return Part(
        (*parts.forward, *outputs.forward, *shared.forward),
        (*shared.backward, *parts.backward, *outputs.backward),
        parts.saved + outputs.saved + shared.saved,
        (*shared.recomputed, *parts.recomputed),
        max(shared.working, parts.working),
        parts.passing,
    )


def shared_expert(s: Shapes, experts: Experts) -> Part:
    """The expert that every token goes to, if there is one."""
    return gated_mlp(s, "moe.shared", experts.shared_ffn // s.layout.tp) if experts.shared_ffn else Part((), (), 0)


def expert_outputs(s: Shapes, experts: Experts) -> Part:
    """Each rank of tp brings its own tokens to the experts; without sequence parallel all of them need all outputs.

    Of the norm's output the router reads an exact copy, and nothing else keeps it but a shared expert: so much is not saved.
    """
    gather = tuple(s.tp("all_gather", s.T * s.model.hidden * s.q) if not s.layout.sp else [])
    is_kept = s.q == s.exact or experts.shared_ffn or s.recomputes("norms")
    return Part(gather, gather, 0 if is_kept else -s.residual_bytes)


def routed(s: Shapes, experts: Experts) -> Part:
    """Router, dispatch, the experts' products, combine. Of the layout it sees u, ep and etp only.

    A rank sends `rows` and gets `here`. This is the one with the fullest expert, whose others get the mean; where it has all of them, they
    share the rest.
    """
    model, layout, D = s.model, s.layout, s.model.hidden
    ranks = layout.ep * layout.etp
    rows, held, ffn = s.u * experts.top_k * layout.etp, experts.count // layout.ep, experts.ffn // layout.etp
    fullest = ceil(rows // held * s.imbalance) if s.imbalance > 1 else 0
    here = rows if layout.ep == 1 or not fullest else rows - rows // held + fullest

    def all_to_all(nbytes: int) -> list[Collective]:
        return [Collective("ep", "all_to_all", ranks, 1, nbytes)] if ranks > 1 else []

    travel = all_to_all(here * D * s.q)
    parts = ("gate", "up") if model.gated else ("up",)
    router = whole_linear(s, "moe.router", s.u, D, experts.count)
    up = [Gemm(f"moe.experts.{part}", here, ffn, D, held, fullest) for part in parts]
    down = Gemm("moe.experts.down", here, D, ffn, held, fullest)
    hidden = activation(s, ffn * here)
    permute = Elementwise("permute", 4 * rows * D * s.q)
    up_back = [back for part in parts for back in _grouped_backward(f"moe.experts.{part}", here, ffn, D, held, fullest)]
    down_back = _grouped_backward("moe.experts.down", here, D, ffn, held, fullest)
    forward = (
        *router.forward, *all_to_all(experts.count * layout.etp * 8), permute, *travel, *up, *hidden.forward, down, *travel, permute,
    )  # fmt: skip
    backward = (
        permute, *travel, *hidden.recomputed, *down_back, *hidden.backward, *up_back, *travel, permute, *router.backward,
    )  # fmt: skip
    biased = (len(parts) + 1) * here * 8 if experts.bias else 0  # the expert of each row, for each product
    saved = hidden.saved + (here + rows) * D * s.q + biased + _routing_saved(s, experts)
    # Outputs, while they are weighed: as they are, and added up over the ranks that share an expert.
    exact = (rows + rows // layout.etp) * D * s.exact if s.q < s.exact else 0
    arrived = (here + rows) * D * s.q if ranks > 1 else 0  # rows that came, on either way, until the forward is over
    return Part(forward, backward, saved, hidden.recomputed, max(hidden.working, exact, s.product_bytes(D, ffn)), arrived)


def fullest_rank(experts: Experts, layout: Layout, imbalance: float) -> float:
    """Rows of the rank with the fullest expert over the mean of ranks."""
    held = experts.count // layout.ep
    return 1.0 if layout.ep == 1 else (held - 1 + imbalance) / held


def _routing_saved(s: Shapes, experts: Experts) -> int:
    """Scores, chosen weights before and after they are made to sum to one, and the sum; the order of rows on each way, in int64; and
    the exact copies of its input and weights that the router reads."""
    visits = s.u * experts.top_k
    weights = (2 * visits + s.u if experts.normalized else visits) * s.exact
    ways = 4 if s.layout.ep * s.layout.etp > 1 else 2
    orders = (ways * visits * s.layout.etp + visits) * 8
    copies = (s.u + experts.count) * s.model.hidden * s.exact if s.q != s.exact else 0
    return s.u * experts.count * s.exact + weights + orders + copies


def _grouped_backward(name: str, rows: int, width: int, inner: int, groups: int, fullest: int) -> tuple[Gemm, ...]:
    """Of weights' gradients those of the experts that get one row more stand apart, where the rows do not divide; so does the fullest."""
    alike = groups - (fullest > 0)
    each, more = divmod(rows - fullest, alike) if alike else (0, 0)
    shares = ((alike - more, each), (more, each + 1), (1, fullest))
    weights = (Gemm(f"{name} dw", width * count, inner, share, count) for count, share in shares if count and share)
    return Gemm(f"{name} dx", rows, inner, width, groups, fullest), *weights
