"""The attention core with sinks, with values of another width, and with rotary rules, against plain arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from meshwright.models.attention import EVERYWHERE, AttentionCore, Where
from meshwright.models.init import INIT_STD, initial_value
from meshwright.models.rotary import Rotary
from meshwright.spec.huggingface import load_model, read_config
from meshwright.spec.model import Rope

BATCH, HEADS, KV_HEADS, LENGTH, WIDTH = 2, 6, 2, 11, 8
DOCUMENTS = torch.tensor([[0] * 4 + [1] * 7, [0] * 11])


def inputs(value_width: int = WIDTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = (
        (BATCH, HEADS, LENGTH, WIDTH),
        (BATCH, KV_HEADS, LENGTH, WIDTH),
        (BATCH, KV_HEADS, LENGTH, value_width),
        (HEADS,),
    )
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def plain(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int, documents: bool) -> Tensor:
    """Softmax over a row of scores and the sink, written out."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    i, j = torch.arange(LENGTH).view(-1, 1), torch.arange(LENGTH)
    hidden = (j > i) | (i - j >= window)
    if documents:
        hidden = hidden | (DOCUMENTS.view(BATCH, 1, -1, 1) != DOCUMENTS.view(BATCH, 1, 1, -1))
    weights = scores.masked_fill(hidden, float("-inf")).exp()
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp().view(1, -1, 1, 1)
    return weights / total @ v


@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "no sinks"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("value_width", [8, 5, 12])
def test_the_core_is_a_softmax_over_what_a_query_sees(
    sinks: bool, window: int | None, documents: bool, value_width: int
) -> None:
    q, k, v, sink = inputs(value_width)
    where = Where(documents_BS=DOCUMENTS) if documents else EVERYWHERE
    y = AttentionCore(window, scale=0.3)(q, k, v, where, sink if sinks else None)
    expected = plain(q, k, v, sink if sinks else None, 0.3, window or LENGTH, documents)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    wanted = (q, k, v, sink) if sinks else (q, k, v)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    mine, reference = (torch.autograd.grad(each, wanted, dy) for each in (y, expected))
    for ours, theirs in zip(mine, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("value_width", [8, 5])
def test_the_fused_kernel_serves(sinks: bool, value_width: int) -> None:
    """The other way keeps a matrix of length x length for each head."""
    q, k, v, sink = inputs(value_width)
    graph = [AttentionCore(3)(q, k, v, EVERYWHERE, sink if sinks else None).grad_fn]
    for node in graph:
        graph += [parent for parent, _ in node.next_functions if parent is not None and parent not in graph]
    assert any("FlashAttention" in node.name() for node in graph)


def test_scores_are_scaled_by_the_width_of_the_keys_unless_told() -> None:
    """With a sink the keys are wider inside."""
    q, k, v, sink = inputs()
    torch.testing.assert_close(
        AttentionCore(None)(q, k, v, EVERYWHERE, sink), plain(q, k, v, sink, WIDTH**-0.5, LENGTH, False)
    )


# --- rotary rules

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9, "intermediate_size": 8}
YARN = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 8.0, "original_max_position_embeddings": 1024}
RULES: dict[str, dict[str, Any]] = {
    "yarn": {"rope_parameters": YARN},
    "yarn with fewer turns": {"rope_parameters": YARN | {"beta_fast": 4.0, "beta_slow": 2}},
    "yarn not truncated": {"rope_parameters": YARN | {"truncate": False}},
    "yarn with few turns": {"rope_parameters": YARN | {"beta_fast": 200.0, "beta_slow": 190.0}},
    "yarn with a step": {"rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 8.0, "truncate": False}},
    "yarn whose factor is the ratio": {"rope_parameters": YARN | {"factor": None}},
    "yarn with an attention factor": {"rope_parameters": YARN | {"attention_factor": 0.7}},
    "yarn with mscale": {"rope_parameters": YARN | {"mscale": 0.9, "mscale_all_dim": 0.5}},
    "yarn with mscale alone": {"rope_parameters": YARN | {"mscale": 0.9}},
    "yarn that shrinks": {"rope_parameters": YARN | {"factor": 0.5}},
    "gpt-oss": {"model_type": "gpt_oss", "num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("name", RULES)
def test_yarn_is_that_of_transformers(name: str) -> None:
    config = SIZES | {"model_type": "llama"} | RULES[name]
    theirs = transformers.AutoConfig.for_model(**config)
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    model = read_config(config, "m", "test")
    assert model.rope is not None
    assert model.rope.yarn is not None
    assert model.rope.yarn.attention_factor == pytest.approx(factor)
    rotary = Rotary(model.rope, model.head_dim)
    torch.testing.assert_close(rotary.frequencies(torch.device("cpu")), frequencies, rtol=1e-6, atol=0)
    cos, _ = rotary.table(3, torch.device("cpu"), torch.float64)
    assert cos[0].tolist() == pytest.approx([factor] * model.head_dim)


@pytest.mark.parametrize("interleaved", [False, True])
def test_positions_may_be_given(interleaved: bool) -> None:
    rotary, x = Rotary(Rope(), 8, interleaved=interleaved), inputs()[0].detach()
    positions = torch.tensor([7, 2, 9])
    part = rotary(x[:, :, positions], Where(positions_L=positions, length=LENGTH))
    assert torch.equal(part, rotary(x, EVERYWHERE)[:, :, positions])


def test_interleaved_dims_turn_by_the_same_angles() -> None:
    halves, pairs = Rotary(Rope(), 8), Rotary(Rope(), 8, interleaved=True)
    x = inputs()[0].detach()
    order = torch.arange(8).view(4, 2).t().flatten()
    torch.testing.assert_close(pairs(x, EVERYWHERE)[..., order], halves(x[..., order], EVERYWHERE))


# --- initial values


@pytest.mark.parametrize(
    ("model", "name", "shape", "std"),
    [
        ("gpt-oss-20b", "layers.0.moe.experts.down.weight", (4, 96, 64), INIT_STD / 48**0.5),
        ("gpt-oss-20b", "layers.0.moe.experts.gate_up.gate.weight", (4, 64, 96), INIT_STD),
        ("gpt-oss-20b", "layers.0.moe.router.weight", (32, 96), INIT_STD),
        ("deepseek-v3", "layers.3.moe.shared.down.weight", (96, 64), INIT_STD / 122**0.5),
        ("deepseek-v3", "layers.0.mlp.down.weight", (96, 64), INIT_STD / 122**0.5),
        ("deepseek-v3", "layers.0.attention.out.weight", (96, 64), INIT_STD / 122**0.5),
        ("deepseek-v3", "layers.0.attention.kv_down.weight", (96, 64), INIT_STD),
        ("deepseek-v3", "layers.0.attention.q_down.weight", (96, 64), INIT_STD),
    ],
)
def test_projections_into_the_residual_stream_start_small(
    model: str, name: str, shape: tuple[int, ...], std: float
) -> None:
    assert float(initial_value(load_model(model), name, shape, seed=0).std()) == pytest.approx(std, rel=0.05)


def test_biases_and_sinks_start_at_zero_and_norms_at_one() -> None:
    model = load_model("gpt-oss-20b")
    for name, shape in {
        "layers.0.attention.sinks": (64,),
        "layers.0.moe.experts.gate_up.up.bias": (32, 2880),
        "layers.0.moe.experts.down.bias": (32, 2880),
        "layers.0.moe.router.bias": (32,),
        "layers.0.moe.router.selection_bias": (32,),
    }.items():
        assert not initial_value(model, name, shape, seed=0).any(), name
    for name in ("layers.0.attention.q_down_norm.weight", "layers.0.attention.kv_down_norm.weight"):
        assert (initial_value(model, name, (24,), seed=0) == 1).all()
