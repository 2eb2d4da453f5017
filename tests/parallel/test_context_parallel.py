"""Attention over a sequence that ranks hold in parts, against one process: outputs, gradients, and what is sent."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from context_workers import Case, Outcome, attend_to_my_tokens, in_one_process, inputs
from torch import Tensor

from meshwright.models.attention import AttentionCore, Where, visible
from meshwright.parallel import kernels
from meshwright.parallel.context import cut_tokens
from meshwright.parallel.kernels import Shown, Softmax, attend, attend_backward
from meshwright.spec.context import kv_copies
from meshwright.spec.layout import Layout
from meshwright.testing import run_distributed

RING2, RING4 = Layout(cp=2), Layout(cp=4)
ULYSSES2, ULYSSES4 = Layout(cp=2, cp_ulysses=2), Layout(cp=4, cp_ulysses=4)
NESTED = Layout(cp=4, cp_ulysses=2)
EVERY = (RING2, RING4, ULYSSES2, ULYSSES4, NESTED)
STRADDLING = (7, 20, 21, 37)
"""Starts of documents: none at the edge of a piece, one of a single token."""
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

CASES = {
    "plain": Case(RING2),
    "one sequence": Case(RING2, batch=1),
    "every head its own keys": Case(RING2, kv_heads=4),
    "one key-value head": Case(RING2, kv_heads=1),
    "window": Case(RING2, window=5),
    "window over pieces": Case(RING2, window=19),
    "window as long as the sequence": Case(RING2, window=48),
    "documents": Case(RING2, documents=STRADDLING),
    "documents and window": Case(RING2, documents=STRADDLING, window=11),
    "narrower values": Case(RING2, value_width=5),
    "wider values": Case(RING2, value_width=12),
    "sinks": Case(RING2, sinks=True),
    "sinks, documents, window, narrower values, one sequence": Case(
        RING2, documents=STRADDLING, window=9, value_width=6, batch=1, sinks=True
    ),
}


def name(layout: Layout) -> str:
    return f"ring{layout.cp_ring} ulysses{layout.cp_ulysses}"


@pytest.mark.parametrize("layout", EVERY, ids=name)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attention_in_parts_is_attention_in_one_process(case: Case, layout: Layout) -> None:
    compare(replace(case, layout=layout))


@pytest.mark.parametrize("layout", [RING4, NESTED], ids=name)
def test_a_block_may_need_several_masks(layout: Layout) -> None:
    compare(Case(layout, seq=2400, batch=1, window=700, width=4, value_width=4))


@pytest.mark.parametrize("layout", EVERY, ids=name)
def test_fp32(layout: Layout) -> None:
    compare(Case(layout, dtype=torch.float32, sinks=True, window=19))
    compare(Case(layout, dtype=torch.float32, documents=STRADDLING))


@pytest.mark.parametrize("layout", EVERY, ids=name)
def test_bf16_is_as_exact_as_one_process_in_bf16(layout: Layout) -> None:
    """Sums over blocks are in fp32: no more than rounding of inputs, outputs and what a kernel hands out."""
    case = Case(layout, dtype=torch.bfloat16, heads=8, kv_heads=2, width=16, value_width=16)
    exact = in_one_process(case)
    *whole, _, _ = inputs(case)
    q, k, v, dy = (x.transpose(1, 2) for x in whole)
    wanted = [x.requires_grad_() for x in (q, k, v)]
    y = AttentionCore(None, scale=0.4)(q, k, v, Where())
    alone = (y, *torch.autograd.grad(y, wanted, dy))
    for ours, theirs, truth in zip(whole_outcome(case), alone, exact, strict=False):
        assert distance(ours, truth) < 1.5 * distance(theirs, truth)


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().double() - expected).norm() / expected.norm())


# --- what is sent


@pytest.mark.parametrize("layout", EVERY, ids=name)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_sent_is_what_the_files_say(layout: Layout, kv_heads: int, dtype: torch.dtype) -> None:
    case = Case(layout, kv_heads=kv_heads, value_width=6, dtype=dtype, window=5)
    ring, u, s = layout.cp_ring, layout.cp_ulysses, dtype.itemsize
    tokens, copies = case.batch * case.seq // layout.cp, kv_copies(kv_heads, u)
    expected = []
    if u > 1:
        qkv = tokens * (case.heads * case.width + kv_heads * copies * (case.width + case.value_width)) * s
        out = tokens * case.heads * case.value_width * s
        expected.append(("all_to_all", u, 4, 2 * (qkv + out)))
    if ring > 1:
        n = tokens * u * kv_heads * copies // u * (case.width + case.value_width)
        expected.append(("send", ring, 3 * (ring - 1), (ring - 1) * n * (s + s + max(s, 4))))
    for _, sent in run_distributed(attend_to_my_tokens, layout.cp, case):
        assert sent == expected


# --- blocks without a fused kernel


@pytest.mark.parametrize("kind", ["all", "causal", "mask", "documents"])
def test_the_written_out_block_is_the_fused_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a block of which some queries see nothing."""
    generator = torch.Generator().manual_seed(3)
    q, k, v, y, dy = (torch.randn(2, heads, 6, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4, 4))
    documents = torch.tensor([[0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1]])
    positions = torch.arange(6)
    shown = {
        "all": Shown(),
        "causal": Shown(causal=True),
        "mask": Shown(mask=visible(positions, positions + 2, 3)),
        "documents": Shown(mask=visible(positions, positions, None, documents, documents.flip(1))),
    }[kind]
    whole = Softmax(y, torch.full((2, 4, 6), 4.0, dtype=torch.float64), dy)
    fused = (*attend(q, k, v, shown, 0.3), *attend_backward(q, k, v, whole, shown, 0.3))
    monkeypatch.setattr(kernels, "_fused", lambda *_: False)
    plain = (*attend(q, k, v, shown, 0.3), *attend_backward(q, k, v, whole, shown, 0.3))
    for ours, theirs in zip(plain, fused, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    if shown.mask is not None:
        unseen = ~shown.mask.any(dim=-1).expand(2, 4, 6)
        assert unseen.any()
        assert torch.equal(plain[1] == float("-inf"), unseen)
        assert not plain[0][unseen].any()


# --- comparing


def compare(case: Case) -> None:
    ours, theirs = whole_outcome(case), in_one_process(case)
    for what, got, expected in zip(Outcome._fields, ours, theirs, strict=True):
        if expected is not None:
            assert got is not None
            torch.testing.assert_close(
                got.double(), expected, rtol=0, atol=TOLERANCE[case.dtype], msg=lambda text, what=what: f"{what}: {text}"
            )


def whole_outcome(case: Case) -> Outcome:
    """The ranks' tokens put back in order, and their parts of the sinks' gradient summed."""
    ranks = [outcome for outcome, _ in run_distributed(attend_to_my_tokens, case.layout.cp, case)]
    order = torch.arange(case.seq).unsqueeze(0)
    held = torch.cat([cut_tokens(order, case.layout, i)[0] for i in range(case.layout.cp)])
    parts = [torch.cat(each, dim=2)[:, :, held.argsort()] for each in zip(*(rank[:4] for rank in ranks), strict=True)]
    dsinks = sum(rank.dsinks for rank in ranks) if case.sinks else None
    return Outcome(*parts, dsinks)
