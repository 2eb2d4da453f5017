"""The layer with experts: rows, gradients, shares of weights and counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_routing import MODEL, make_moe, tokens
from torch import Tensor, nn

from meshwright.models import moe as module
from meshwright.models.mlp import ACTIVATE
from meshwright.models.moe import Experts, MoE, Stacked
from meshwright.spec.model import Experts as ExpertsOf
from meshwright.spec.model import Model

BIASED = Model(
    **{name: getattr(MODEL, name) for name in ("name", "family", "layers", "hidden", "ffn", "vocab", "heads", "kv_heads")},
    head_dim=4,
    max_positions=64,
    experts=ExpertsOf(count=4, top_k=2, ffn=6, bias=True, shared_ffn=10),
    moe_layers=(0,),
)


def one_by_one(moe: MoE, x_tD: Tensor) -> Tensor:
    """Every token by itself through each of its experts."""
    routing, rows = moe.router(x_tD), []
    up, down = moe.experts.gate_up, moe.experts.down
    for x, experts, weights in zip(x_tD, routing.experts_tk.tolist(), routing.weights_tk, strict=True):
        outputs = []
        for e in experts:
            gate, value = (
                F.linear(x, up[part].weight[e], None if up[part].bias is None else up[part].bias[e])
                for part in ("gate", "up")
            )
            bias = None if down.bias is None else down.bias[e]
            outputs.append(F.linear(F.silu(gate) * value, down.weight[e], bias))
        rows.append((torch.stack(outputs) * weights.unsqueeze(1)).sum(dim=0))
    y = torch.stack(rows)
    return y if moe.shared is None else y + moe.shared(x_tD)


def randomised(model: Model) -> MoE:
    moe = make_moe(model)
    with torch.no_grad():
        for parameter in moe.parameters():
            nn.init.normal_(parameter)
    return moe


@pytest.mark.parametrize("model", [MODEL, BIASED], ids=["plain", "biased and shared"])
def test_outputs_and_gradients_are_those_of_tokens_one_by_one(model: Model) -> None:
    moe, x = randomised(model), tokens(13).requires_grad_()
    outputs = moe(x), one_by_one(moe, x)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    wanted = [x, *moe.parameters()]
    mine, reference = (torch.autograd.grad(y, wanted, tokens(13).flip(0)) for y in outputs)
    for ours, theirs in zip(mine, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_tokens_keep_their_shape() -> None:
    moe, x = randomised(BIASED), tokens(2, 5)
    assert torch.equal(moe(x).flatten(0, 1), moe(x.flatten(0, 1)))


def test_experts_without_rows_have_gradients_of_zero() -> None:
    moe = randomised(BIASED)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[:2] = 1.0  # positive tokens: experts 0 and 1
    moe(tokens(1, 7).abs()).square().sum().backward()
    for name, parameter in moe.experts.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad[2:] == 0).all(), name
        assert (parameter.grad[:2] != 0).any(), name


def test_no_tokens_at_all() -> None:
    moe = randomised(BIASED)
    x = tokens(0).requires_grad_()
    moe(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None and not p.grad.any() for p in moe.experts.parameters())


def test_a_share_of_the_experts_and_of_their_width() -> None:
    """Halves of the experts are concatenated, halves of the width are summed."""
    whole, counts, x = randomised(MODEL).experts, [3, 0, 5, 1], tokens(9)
    y = whole(x, counts)
    by_expert = [
        share(whole, slice(0, 2), slice(None))(x[:3], [3, 0]),
        share(whole, slice(2, 4), slice(None))(x[3:], [5, 1]),
    ]
    torch.testing.assert_close(torch.cat(by_expert), y, rtol=0, atol=1e-12)
    by_width = [share(whole, slice(None), cut)(x, torch.tensor(counts)) for cut in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(sum(by_width), y, rtol=0, atol=1e-12)


def share(whole: Experts, experts: slice, width: slice) -> Experts:
    out = Experts(MODEL).double()
    for part, stacked in out.gate_up.items():
        stacked.weight = nn.Parameter(whole.gate_up[part].weight[experts, width].detach())
    out.down.weight = nn.Parameter(whole.down.weight[experts, :, width].detach())
    return out


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 9, 0], [9, 0, 0, 0]])
def test_the_fused_kernel_computes_what_the_loop_does(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is chosen on CUDA only, but the CPU has a form of it."""
    generator = torch.Generator().manual_seed(0)
    stacked = Stacked(4, 16, 8, bias=False).to(torch.bfloat16)
    x, dy = (torch.randn(9, n, generator=generator, dtype=torch.bfloat16) for n in (8, 16))
    results = []
    for fused in (False, True):
        monkeypatch.setattr(module, "_has_grouped_kernel", lambda *_, fused=fused: fused)
        leaf = x.clone().requires_grad_()
        y = Experts.product(None, leaf, stacked.weight, counts)
        results.append((y, *torch.autograd.grad(y, (leaf, stacked.weight), dy)))
    for loop, kernel in zip(*results, strict=True):
        torch.testing.assert_close(kernel, loop, rtol=2**-7, atol=2**-7)


def test_weights_are_not_rounded_to_the_dtype_of_the_rows() -> None:
    """In bf16 the weights would be equal, and nothing left of the difference of the rows; nor of the gradient's."""
    y_tkjD = torch.tensor([256.0, -256.0], dtype=torch.bfloat16).view(1, 2, 1, 1).requires_grad_()
    weights_tk = torch.tensor([[1 + 2**-9, 1.0]]).requires_grad_()
    y = module.weigh(y_tkjD, weights_tk)
    assert y.dtype == torch.bfloat16
    assert y.item() == 0.5
    y.sum().backward()
    assert weights_tk.grad is not None
    assert weights_tk.grad.tolist() == [[256.0, -256.0]]
    assert y_tkjD.grad is not None
    assert y_tkjD.grad.dtype == torch.bfloat16


# --- counts


def test_loads_add_up_until_they_are_cleared() -> None:
    moe = randomised(MODEL)
    chosen = moe.router(tokens(6)).experts_tk.flatten().bincount(minlength=4)
    for times in (1, 2):
        moe(tokens(6))
        assert torch.equal(moe.load_E, chosen * times)
    assert moe.load_E.dtype == torch.int64
    assert not moe.load_E.requires_grad
    assert moe.dropped == 0
    moe.clear_load()
    moe(tokens(6))
    assert torch.equal(moe.load_E, chosen)


# --- the activation of GPT-OSS


def test_swiglu_oai_is_that_of_transformers_beyond_its_limits_too() -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(hidden_size=4, intermediate_size=4, num_local_experts=1)
    theirs = GptOssExperts(config)
    gate, up = torch.randn(2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 8
    assert gate.max() > 7
    assert gate.min() < -7
    assert up.abs().max() > 7
    expected = theirs._apply_gate(torch.stack((gate, up), dim=-1).flatten())
    torch.testing.assert_close(ACTIVATE["swiglu_oai"]((gate, up)), expected, rtol=0, atol=1e-12)
