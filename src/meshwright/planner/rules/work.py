"""What is computed, in which kernels, in which numbers."""

from __future__ import annotations

from dataclasses import replace

from meshwright.cost.ops import Gemm, Under
from meshwright.cost.pieces import layer_piece
from meshwright.planner.rules.case import Case, Repair, Rule, Seen
from meshwright.spec.layout import Layout
from meshwright.spec.legality import micro_batches

LARGER = (2, 4, 8)
GAIN = 0.03
"""Share of the seconds of a layer's products that the next larger micro-batch must save for them to be called too small."""
LEAST_NORMAL, LEAST = 2.0**-14, 2.0**-24
"""Of fp16: the smallest normal and the smallest positive number."""
COLUMNS = 128
"""Megatron-LM pads the vocabulary to a multiple of this and tp (--make-vocab-size-divisible-by)."""


def looped_experts(case: Case) -> Seen | None:
    experts = case.model.experts
    if experts is None or case.practice.grouped_products:
        return None
    held = experts.count // case.layout.ep
    if held == 1:
        return None
    return Seen(
        f"{held} experts a rank and layer, each with products and launches of its own",
        case.practised("--grouped-gemm on", grouped_products=True),
    )


def written_scores(case: Case) -> Seen | None:
    attention = case.practice.attention
    if attention not in ("fused-softmax", "unfused"):
        return None
    seq, layout = case.workload.seq, case.layout
    gib = 2 * layout.micro_batch * case.model.heads / layout.tp * seq**2 / layout.cp / 2**30
    return Seen(
        f"{attention} attention writes the scores of {seq:,} x {seq:,} tokens to memory, {gib:.2g} GiB a layer and pass",
        case.practised("--attention flash", attention="flash"),
    )


def whole_norms(case: Case) -> Seen | None:
    if case.layout.tp == 1 or case.layout.sp:
        return None
    repair = case.quickest([replace(case.layout, sp=True)])
    if repair is None:
        return None
    saved = (case.given.peak_bytes - repair.price.peak_bytes) / 2**30
    return Seen(
        f"every tp rank keeps and computes the norms of all tokens: {saved:.1f} GiB a rank for the same bytes on the wire",
        repair,
    )


def unscaled_loss(case: Case) -> Seen | None:
    layout = case.layout
    if layout.precision != "fp16" or case.habits.loss_scaling:
        return None
    repair = case.quickest([replace(layout, precision="bf16")]) or Repair("--loss-scaling on", case.given)
    return Seen(
        f"gradients below {LEAST:.1e} become 0 in fp16 and those below {LEAST_NORMAL:.1e} lose bits: scale the loss "
        "(--loss-scaling on, the engine always does), or use a precision with the range of fp32",
        repair,
        severity="error",
    )


def small_products(case: Case) -> Seen | None:
    layout = case.layout
    more = (replace(layout, micro_batch=layout.micro_batch * factor) for factor in LARGER)
    larger = [x for x in more if case.price(x) is not None]
    if not larger:
        return None
    now, then = _seconds_per_row(case, layout), _seconds_per_row(case, larger[0])
    if 1 - then / now < GAIN:
        return None
    tokens = layout.micro_batch * case.workload.seq // layout.cp
    m = micro_batches(layout, case.workload)
    return Seen(
        f"products of {tokens:,} rows in {m} micro-batches: with mb{larger[0].micro_batch} a layer's take {1 - then / now:.0%} less "
        "for the same tokens",
        case.quickest(larger),
    )


def _seconds_per_row(case: Case, layout: Layout) -> float:
    """Seconds of the products of a layer forward, over the sequences of a micro-batch."""
    moe = case.model.experts is not None
    piece = layer_piece(case.model, layout, case.workload.seq, None, moe, case.workload.expert_imbalance)
    kernels = case.estimator().kernels(layout, shared=True)
    products = [g for op in piece.forward for g in (op.work if isinstance(op, Under) else (op,)) if isinstance(g, Gemm)]
    return sum(kernels.gemm(g) for g in products) / layout.micro_batch


def uneven_vocabulary(case: Case) -> Seen | None:
    layout, vocab = case.layout, case.model.vocab
    unit = COLUMNS * layout.tp
    if vocab % layout.tp == 0:
        return None
    padded = -(-vocab // unit) * unit
    price = case.price(layout, model=replace(case.model, vocab=padded))
    return Seen(
        f"{vocab:,} rows of the vocabulary over tp{layout.tp}: shares differ, and none is a multiple of {COLUMNS}",
        Repair(f"pad the vocabulary to {padded:,}", price) if price else None,
    )


RULES = (
    Rule(
        "experts without grouped products",
        "a product of its own for each expert (--grouped-gemm off)",
        "Gale et al. 2022 (MegaBlocks), arXiv 2211.15841; Megatron-LM --moe-grouped-gemm",
        looped_experts,
    ),
    Rule(
        "long sequences without flash attention",
        "attention whose scores reach memory (--attention fused-softmax or unfused)",
        "Dao et al. 2022, arXiv 2205.14135, section 3: quadratic reads and writes of the scores",
        written_scores,
    ),
    Rule(
        "tensor parallel without sequence parallel",
        "norm regions whole on every tensor-parallel rank",
        "Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2: the same bytes sent, 1/t of the activations",
        whole_norms,
    ),
    Rule(
        "fp16 without loss scaling",
        "fp16 whose gradients nothing keeps above its smallest number (--loss-scaling off)",
        "Micikevicius et al. 2017, arXiv 1710.03740, section 3.2",
        unscaled_loss,
    ),
    Rule(
        "micro-batch too small for its products",
        f"products of a layer that a larger micro-batch makes {GAIN:.0%} quicker for the same tokens",
        "NVIDIA, Matrix Multiplication Background User's Guide, section 3: tiles and waves",
        small_products,
    ),
    Rule(
        "vocabulary not divisible",
        "a vocabulary that tp does not divide",
        "Megatron-LM --make-vocab-size-divisible-by; NVIDIA, Matrix Multiplication Background User's Guide, section 2.2: aligned sizes",
        uneven_vocabulary,
    ),
)
