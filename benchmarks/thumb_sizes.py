"""What the search chooses by model size, beside the rules of thumb that say so without one."""

from __future__ import annotations

from collections.abc import Iterator

from meshwright.cost.economics import DAY
from meshwright.planner.around import Problem
from meshwright.planner.refine import price_of
from meshwright.planner.rules.reshape import reshaped
from meshwright.planner.space import divisors
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.huggingface import load_model
from meshwright.spec.layout import Layout
from meshwright.spec.parameters import count_parameters
from meshwright.spec.workload import Workload
from rules_of_thumb import Thumb, estimator, table

CLUSTER, SEQ, BATCH, RANKS = "h100-superpod", 4096, 512, 256
MODELS = ("qwen3-0.6b", "llama-3.2-3b", "llama-3-8b", "llama-2-13b", "qwen3-32b", "llama-3-70b", "llama-3-405b")


def rule_of(parameters: float) -> tuple[str, int]:
    """What the rules say for so many parameters: (how to split, TP)."""
    kind = (
        "DP" if parameters < 1e9 else "DP + ZeRO-2" if parameters < 1e10 else "3D" if parameters < 1e11 else "3D + ZeRO-3"
    )
    tp = 1 if parameters < 20e9 else 2 if parameters < 70e9 else 4 if parameters < 200e9 else 8
    return kind, tp


def obeys(layout: Layout, kind: str) -> bool:
    split = layout.tp * layout.pp * layout.cp > 1
    if not kind.startswith("3D"):
        return not split and (layout.zero == 2 or not kind.endswith("2"))
    return layout.tp > 1 and layout.pp > 1 and (layout.zero == 3 or not kind.endswith("3"))


def with_tp(layout: Layout, tp: int) -> Iterator[Layout]:
    """Layouts of the same ranks with this TP."""
    rest = layout.world // tp
    for pp in divisors(rest):
        for cp in divisors(min(8, rest // pp)):
            if rest % (pp * cp) == 0:
                for zero, recompute, mb in ((z, r, m) for z in (1, 3) for r in ("none", "full") for m in (1, 2, 4)):
                    schedule = ("zb-v", 2) if pp > 1 and layout.pp > 1 else ("1f1b", 1)
                    found = reshaped(
                        layout, tp=tp, sp=tp > 1, pp=pp, cp=cp, dp=rest // pp // cp, zero=zero, zero_shard=None, recompute=recompute,
                        micro_batch=mb, schedule=schedule[0], chunks=schedule[1],
                    )  # fmt: skip
                    if found is not None:
                        yield found


def sizes() -> Thumb:
    rows = []
    for name in MODELS:
        model = load_model(name)
        best = Problem(model, load_cluster(CLUSTER), Workload(SEQ, BATCH), RANKS).best()
        size = count_parameters(model).total
        kind, tp = rule_of(size)
        if best is None:
            rows.append((name, f"{size / 1e9:.1f} B", f"{kind}, TP {tp}", "nothing fits", "", "", ""))
            continue
        its = estimator(name, CLUSTER, SEQ, BATCH)
        prices = (price_of(its, x) for x in with_tp(best.layout, tp))
        ruled = min((p.step_time_s for p in prices if p is not None and p.fits), default=None)
        cost = "does not fit" if ruled is None else f"{max(0.0, ruled / best.step_time_s - 1):.0%}"
        cost = "0%" if best.layout.tp == tp else cost
        holds = "yes" if obeys(best.layout, kind) else "no"
        same = "yes" if best.layout.tp == tp else f"no: TP {best.layout.tp}"
        rows.append((name, f"{size / 1e9:.1f} B", f"{kind}, TP {tp}", f"`{best.layout}`", holds, same, cost))
    return Thumb(
        "below 1B: DP; 1 to 10B: DP + ZeRO-2; 10 to 100B: 3D; above: 3D + ZeRO-3. TP 1 / 2 / 4 / 8 below 20B / 70B / 200B / above",
        "right in its drift, wrong in its steps",
        f"The best layout by search on {RANKS} x {CLUSTER}, {SEQ:,} tokens, {BATCH} sequences; the last column is how much longer the step "
        "is with the TP of the rule, all else of it chosen again among zb-v or 1F1B, ZeRO 1 or 3, micro-batches to 4, recompute of "
        "nothing or all:\n\n"
        + table(
            ("model", "size", "the rule", "the search", "split as the rule", "TP as the rule", "the rule's TP costs"), rows
        )
        + "\n\nWhere the rules fail: what decides is the memory that state and activations leave free, and how fast the links are, not "
        "the number of parameters. A model that ZeRO-3 alone can hold needs no 3D; in a pipeline ZeRO-3 gathers for every micro-batch, and "
        "the search takes ZeRO-1; context and pipeline parallel send less than tensor parallel, so that the best TP is below the rule's.",
    )


def seventy_searched() -> Thumb:
    best = Problem(load_model("llama-3-70b"), load_cluster(CLUSTER), Workload(4096, 1280), 640).best()
    assert best is not None
    usual = estimator("llama-3-70b", CLUSTER, 4096, 1280).estimate(Layout(dp=20, zero=1, tp=8, sp=True, pp=4))
    return Thumb(
        "70B on 640 H100: then beat the layout by search",
        f"{best.tokens_per_s / usual.tokens_per_s - 1:+.0%} tokens/s",
        f"`{best.layout}`: {best.step_time_s:.2f} s a step, {best.mfu:.1%} MFU, {best.tokens_per_s:,.0f} tokens/s, "
        f"{best.tokens_per_s * DAY / 1e9:.1f} B tokens a day, against {usual.step_time_s:.2f} s of `{usual.layout}`.",
    )
