"""Can this model, this batch and this many ranks be split by this layout? Refusals name the numbers and the way out."""

from __future__ import annotations

from math import gcd

from meshwright.spec.cluster import Cluster
from meshwright.spec.context import check_context
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.precision import STATE_BYTES, UNRUN
from meshwright.spec.workload import Workload

BUILT_RECOMPUTES = ("none", "selective", "full")


def check_layout(layout: Layout, model: Model, workload: Workload) -> None:
    """Raise UserError for the first thing that does not divide."""
    _check_tensor_parallel(layout, model, workload)
    _check_experts(layout, model, workload)
    _check_imbalance(model, workload)
    check_context(layout, model, workload.seq)
    if layout.recompute == "selective" and "core" in layout.recompute_parts and layout.cp_ring > 1:
        given = "ac:" + ("selective" if layout.recompute_parts == ("core",) else "+".join(layout.recompute_parts))
        raise UserError(
            f"{given}: recompute of the core would change nothing under ring attention, which keeps no scores: leave it out, or "
            "take ac:mlp or ac:full"
        )
    if layout.recompute_parts == ("activation",) and model.activation == "relu" and not model.gated:
        raise UserError(
            f"ac:activation would change nothing for {model.name}: relu keeps only its output, no more than its input; try ac:norms "
            "or ac:mlp"
        )
    if layout.pp * layout.chunks > model.layers:
        raise UserError(
            f"{model.name} has {model.layers} layers, fewer than the {layout.pp * layout.chunks} stages of "
            f"pp{layout.pp}{f'x{layout.chunks}' if layout.chunks > 1 else ''}: pp x chunks is at most {model.layers}"
        )
    if layout.stage_layers is not None and sum(layout.stage_layers) != model.layers:
        given = "-".join(map(str, layout.stage_layers))
        raise UserError(
            f"stages:{given} holds {sum(layout.stage_layers)} layers, but {model.name} has {model.layers}: "
            f"`meshwright layout balance` writes stages of equal cost"
        )
    per_step = layout.dp * layout.micro_batch
    if workload.global_batch % per_step:
        below = workload.global_batch // per_step * per_step
        raise UserError(
            f"global_batch = dp x micro_batch x micro_batches does not hold: dp {layout.dp} x micro_batch {layout.micro_batch} = "
            f"{per_step} does not divide {workload.global_batch}: try a global batch of "
            f"{f'{below} or ' if below else ''}{below + per_step}"
        )
    if model.rope is None and workload.seq > model.max_positions:
        raise UserError(f"{model.name} has {model.max_positions} learned positions, fewer than seq {workload.seq}")


def _check_imbalance(model: Model, workload: Workload) -> None:
    given = workload.expert_imbalance
    if given == 1.0:
        return
    if model.experts is None:
        raise UserError(f"{model.name} has no experts: leave the expert imbalance of {given:g} out")
    most = model.experts.count / model.experts.top_k
    if given > most:
        raise UserError(
            f"expert imbalance {given:g}: one of the {model.experts.count} experts of {model.name} gets at most all tokens, which is "
            f"{most:g} times the mean where each visits {model.experts.top_k}"
        )


def check_world(layout: Layout, ranks: int) -> None:
    """Raise UserError unless the layout fills exactly `ranks` ranks."""
    if layout.world == ranks:
        return
    parts = [f"{axis}{layout.degree(axis)}" for axis in ("pp", "dp", "cp", "tp") if layout.degree(axis) > 1] or ["dp1"]
    if ranks < 1:
        raise UserError(f"gpus must be at least 1, got {ranks}")
    replica = layout.world // layout.dp
    if ranks % replica == 0:
        hint = f"dp{ranks // replica} would fill {ranks}"
    else:
        hint = f"one replica takes {replica}, which does not divide {ranks}"
    raise UserError(f"world = {' x '.join(parts)} = {layout.world} ranks, but {ranks} are given: {hint}")


def check_room(layout: Layout, cluster: Cluster) -> None:
    """Raise UserError when the layout needs more than one node of a cluster whose nodes have no network."""
    if cluster.fabric.kind == "none" and layout.world > cluster.node.accelerators:
        raise UserError(
            f"cluster {cluster.name} is one node of {cluster.node.accelerators} ranks without a network, but the layout needs "
            f"{layout.world}: measure it with `meshwright bench --ranks {layout.world}`, or take a smaller layout"
        )


def micro_batches(layout: Layout, workload: Workload) -> int:
    """Micro-batches a rank runs per step."""
    return workload.global_batch // (layout.dp * layout.micro_batch)


def refuse_unbuilt(layout: Layout) -> None:
    """A mode that this version would ignore is an error, not a silence."""
    for given, built, what in (
        (layout.recompute, BUILT_RECOMPUTES, "recompute mode"),
        (layout.precision, tuple(STATE_BYTES), "precision"),
    ):
        if given not in built:
            raise UserError(f"{what} {given} is not built yet; this version has {', '.join(map(str, built))}")


def refuse_unrun(layout: Layout) -> None:
    """Raise UserError for what can be priced and planned, and not run."""
    if layout.precision in UNRUN:
        legal = ", ".join(name for name in STATE_BYTES if name not in UNRUN)
        raise UserError(f"precision {layout.precision} can be priced and planned, not yet run: legal: {legal}")


def refuse_unrunnable_model(model: Model) -> None:
    """A rotary rule changes no shape, so it can be priced, but the engine must know it."""
    if model.rope is not None and model.rope.scaling is not None:
        raise UserError(f"{model.name}: rotary scaling {model.rope.scaling!r} is not built yet; legal: none, llama3, yarn")


def _check_tensor_parallel(layout: Layout, model: Model, workload: Workload) -> None:
    tp = layout.tp
    if tp == 1:
        return
    if model.heads % tp:
        raise UserError(
            f"tp {tp} does not divide the {model.heads} attention heads of {model.name}: legal tp: {_legal_tp(model)}"
        )
    if model.kv_heads % tp and tp % model.kv_heads:
        raise UserError(
            f"tp {tp} neither divides the {model.kv_heads} key-value heads of {model.name} nor is a multiple of them: "
            f"legal tp: {_legal_tp(model)}"
        )
    if model.experts and model.experts.shared_ffn % tp:
        raise UserError(
            f"tp {tp} does not divide the shared expert's width {model.experts.shared_ffn} of {model.name}: "
            f"legal tp: {_legal_tp(model)}"
        )
    if model.ffn % tp and len(model.moe_layers) < model.layers:
        raise UserError(f"tp {tp} does not divide the MLP width {model.ffn} of {model.name}: legal tp: {_legal_tp(model)}")
    if _idle_vocabulary(model, tp):
        raise UserError(
            f"tp {tp} leaves a rank without any of the {model.vocab} vocabulary rows of {model.name}: legal tp: {_legal_tp(model)}"
        )
    tokens = layout.micro_batch * workload.seq // layout.cp
    if (layout.sp or model.experts) and tokens % tp:
        share = f" / cp {layout.cp}" if layout.cp > 1 else ""
        raise UserError(
            f"{'sequence parallel' if layout.sp else 'expert routing'} cuts the {tokens} tokens of a micro-batch "
            f"(mb {layout.micro_batch} x seq {workload.seq}{share}) into tp {tp} equal parts: it does not divide; "
            f"try seq {-(-workload.seq // (tp * layout.cp)) * tp * layout.cp}"
        )


def _check_experts(layout: Layout, model: Model, workload: Workload) -> None:
    experts = model.experts
    if experts is None:
        if layout.ep > 1 or layout.etp > 1:
            given = " and ".join(f"{axis}{layout.degree(axis)}" for axis in ("ep", "etp") if layout.degree(axis) > 1)
            raise UserError(f"{given} splits experts, but {model.name} is dense: leave it out")
        return
    if experts.count % layout.ep:
        legal = ", ".join(str(n) for n in range(1, experts.count + 1) if experts.count % n == 0)
        raise UserError(f"ep {layout.ep} does not divide the {experts.count} experts of {model.name}: legal ep: {legal}")
    if experts.ffn % layout.etp:
        raise UserError(
            f"etp {layout.etp} does not divide the expert width {experts.ffn} of {model.name}: "
            f"try a divisor such as {gcd(experts.ffn, layout.etp)}"
        )


def _idle_vocabulary(model: Model, tp: int) -> bool:
    return (tp - 1) * -(-model.vocab // tp) >= model.vocab


def _legal_tp(model: Model) -> str:
    """Every degree that heads, key-value heads, MLP width and vocabulary allow."""
    widths = [model.ffn] if len(model.moe_layers) < model.layers else []
    widths += [model.experts.shared_ffn] if model.experts else []
    divides = (n for n in range(1, model.heads + 1) if model.heads % n == 0 and not any(w % n for w in widths))
    shares = (n for n in divides if model.kv_heads % n == 0 or n % model.kv_heads == 0)
    return ", ".join(str(n) for n in shares if n == 1 or not _idle_vocabulary(model, n))
