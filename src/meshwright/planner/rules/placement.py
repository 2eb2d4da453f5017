"""Communication on links that are too slow for it."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

from meshwright.cost.ops import Collective
from meshwright.cost.program import Place
from meshwright.planner.rules.case import Case, Rule, Seen
from meshwright.planner.rules.reshape import cuts, eased, moved, order_has_price, reshaped
from meshwright.planner.space import divisors
from meshwright.spec.layout import DENSE_AXES, Layout

STARVED = 0.5
"""Share of the rate of an endless message below which a bucket is called starved: half of its time is latency."""
ENDLESS = 64
"""Times the bucket: so many bytes that their latency no longer counts."""


def tensor_across_nodes(case: Case) -> Seen | None:
    layout = case.layout
    if layout.tp == 1 or case.cluster.tier(layout.stride("tp"), layout.tp) == "scale-up":
        return None
    times = case.estimator().times
    nbytes = layout.micro_batch * case.workload.seq // layout.cp * case.model.hidden * 2
    across = times.seconds(Collective("tp", "all_reduce", layout.tp, layout.stride("tp"), nbytes))
    inside = times.seconds(Collective("tp", "all_reduce", min(layout.tp, case.domain), 1, nbytes))
    near = [found for order in (layout.order, DENSE_AXES) if (found := reshaped(layout, order=order))]
    repairs = [c for one in near for c in (one, *cuts(one, "tp", case.domain))]
    within = [x for x in repairs if x.tp == 1 or case.cluster.tier(x.stride("tp"), x.tp) == "scale-up"]
    largest = [x for x in within if x.tp == max(y.tp for y in within)]
    return Seen(
        f"tp{layout.tp} at stride {layout.stride('tp')} leaves the domain of {case.domain}: an all-reduce takes "
        f"{across / inside:.1f} times as long as inside it",
        case.quickest(largest, eased(largest), eased(within)),
    )


def experts_across_nodes(case: Case) -> Seen | None:
    layout = case.layout
    ranks = layout.ep * layout.etp
    if ranks == 1 or case.cluster.tier(1, ranks) == "scale-up":
        return None
    experts = case.model.experts
    if experts is None:
        return None
    rows = layout.micro_batch * case.workload.seq // layout.cp // layout.tp * experts.top_k * layout.etp
    nbytes = rows * case.model.hidden * 2
    times = case.estimator().times
    across = times.seconds(Collective("ep", "all_to_all", ranks, 1, nbytes))
    inside = times.seconds(Collective("ep", "all_to_all", case.domain, 1, nbytes)) if case.domain > 1 else 0.0
    fewer = [(ep, etp) for ep in divisors(layout.ep) for etp in divisors(layout.etp) if ep * etp <= case.domain]
    most = max(ep * etp for ep, etp in fewer)
    near = [found for ep, etp in fewer if ep * etp == most and (found := reshaped(layout, ep=ep, etp=etp))]
    deeper = [x for one in near for f in divisors(one.dp)[:8] for x in moved(one, "dp", one.dp // f, ("pp",))]
    slower = f": an all-to-all takes {across / inside:.1f} times as long as inside it" if inside else ""
    return Seen(
        f"{ranks} ranks share the experts of a layer, more than the domain of {case.domain}{slower}",
        case.quickest(near, eased(near), eased(deeper)),
    )


def starved_buckets(case: Case) -> Seen | None:
    layout = case.layout
    estimator = case.estimator()
    program = estimator.reduced_program(layout, Place(0))
    reductions = program.gradient_reductions or program.scatters
    across = [c for c in reductions if estimator.times.link(c) == "network"]
    if not across:
        return None
    taken = sum(estimator.times.seconds(c) for c in across)
    fed = sum(estimator.times.seconds(c._replace(bytes=ENDLESS * c.bytes)) / ENDLESS for c in across)
    if fed / taken >= STARVED:
        return None
    largest = max(across, key=lambda c: c.bytes)
    what = (
        f"buckets of at most {largest.bytes / 2**20:.1f} MiB over {largest.group_size:,} ranks reach {fed / taken:.0%} of the rate "
        f"of large ones: pieces of {largest.bytes / largest.group_size / 1024:.0f} KiB"
    )
    if case.practice.bucket_bytes is not None:
        return Seen(what, case.practised("leave the buckets to the engine: 4 MiB a rank", bucket_bytes=None))
    fewer = [x for f in divisors(layout.dp)[1:5] for x in moved(layout, "dp", layout.dp // f)]
    return Seen(what, case.quickest(fewer, eased(fewer)))


def off_the_rail(case: Case) -> Seen | None:
    fabric, layout, each = case.cluster.fabric, case.layout, case.cluster.node.accelerators
    if fabric.kind != "rail-optimised" or layout.pp == 1:
        return None
    off, crossing = hops_off_rail(layout.stride("pp"), layout.pp, layout.world, fabric.domain, each)
    if not off:
        return None
    sent = next(c.bytes for c in case.estimate.collectives if c.axis == "pp" and c.op == "send")

    def on_rail(x: Layout) -> bool:
        return (
            order_has_price(x, fabric.domain) and not hops_off_rail(x.stride("pp"), x.pp, x.world, fabric.domain, each)[0]
        )

    rests = permutations([axis for axis in layout.order if axis != "tp"])
    orders = [replace(layout, order=("tp", *rest)) for rest in rests]
    near = [m for one in orders for f in divisors(one.dp)[1:4] for m in moved(one, "dp", one.dp // f, ("tp", "cp"))]
    return Seen(
        f"{off:,} of {crossing:,} hops between stages on different nodes change rail (stride {layout.stride('pp')}, {each} a node): "
        f"up to {sent / 1e9:.3g} GB a rank and step pass the spine, at {fabric.oversubscription:g}:1, or an NVLink hop more",
        case.quickest(*([x for x in tier if on_rail(x)] for tier in (orders, near))),
    )


def hops_off_rail(stride: int, pp: int, world: int, domain: int, each: int) -> tuple[int, int]:
    """Of the hops from a rank to the one of the next stage: (those between domains that change the rail, those between domains).
    `each`: accelerators of a node, of which the same place in every node is on one rail."""
    crossing = [r for r in range(world) if r // stride % pp < pp - 1 and r // domain != (r + stride) // domain]
    return sum(r % each != (r + stride) % each for r in crossing), len(crossing)


RULES = (
    Rule(
        "tensor parallel across nodes",
        "a tensor-parallel group larger than a scale-up domain, or one that its stride takes out of it",
        "Narayanan et al. 2021, arXiv 2104.04473, takeaway 1: tensor parallelism up to the degree of one server",
        tensor_across_nodes,
    ),
    Rule(
        "experts across slow links",
        "an expert-parallel group larger than a scale-up domain",
        "Liu et al. 2025, arXiv 2504.14960: fold expert parallelism into the NVLink domain",
        experts_across_nodes,
    ),
    Rule(
        "data-parallel group larger than its buckets feed",
        "gradient buckets whose reduction is more latency than bytes",
        "NVIDIA, NCCL tuning model (src/graph/tuning.cc): a ring pays its latency once a rank; PyTorch DDP notes: bucket_cap_mb",
        starved_buckets,
    ),
    Rule(
        "stages off their rail",
        "pipeline neighbours on different rails of a rail-optimised fabric",
        "NVIDIA DGX SuperPOD reference architecture: rail i of every node on leaf i; Wang et al. 2023, arXiv 2307.12169",
        off_the_rail,
    ),
)
