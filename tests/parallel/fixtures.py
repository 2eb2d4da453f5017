"""Small models that hold every case at once, and the layouts they are split by."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest

from meshwright.spec.model import Experts, LatentAttention, Model, Rope
from meshwright.spec.workload import Workload

WORKLOAD = Workload(seq=16, global_batch=8)

_LLAMA = {
    "family": "llama", "layers": 4, "hidden": 32, "ffn": 48, "vocab": 101, "heads": 8, "kv_heads": 2, "head_dim": 4, "max_positions": 64,
}  # fmt: skip

UNTIED = Model(name="untied", **_LLAMA)
TIED = Model(name="tied", **{**_LLAMA, "tied": True})
FEW_KV_HEADS = Model(name="few-kv-heads", **{**_LLAMA, "kv_heads": 1, "qkv_bias": True, "rope": Rope(theta=100.0)})
QK_NORM = Model(name="qk-norm", **{**_LLAMA, "kv_heads": 1, "qk_norm": True, "tied": True})
GPT2 = Model(
    name="gpt2-like",
    **{
        **_LLAMA, "family": "gpt2", "kv_heads": 8, "norm": "layernorm", "rope": None, "gated": False, "activation": "gelu_tanh",
        "qkv_bias": True, "out_bias": True, "mlp_bias": True, "tied": True, "windows": (None, 8, None, 8),
    },
)  # fmt: skip
_MOE = {**_LLAMA, "family": "mixtral", "moe_layers": (0, 1, 2, 3), "experts": Experts(count=4, top_k=2, ffn=24)}
MIXTRAL = Model(name="mixtral-like", **_MOE)
QWEN_MOE = Model(
    name="qwen3-moe-like",
    **{
        **_MOE,
        "family": "qwen3_moe",
        "qk_norm": True,
        "tied": True,
        "moe_layers": (1, 3),
        "experts": Experts(count=8, top_k=3, ffn=16),
    },
)
DEEPSEEK = Model(
    name="deepseek-v3-like",
    **{
        **_MOE, "family": "deepseek_v3", "kv_heads": 8, "head_dim": 6, "moe_layers": (1, 2, 3),
        "latent": LatentAttention(q_rank=12, kv_rank=8, nope_dim=4, rope_dim=2, value_dim=4),
        "experts": Experts(
            count=8, top_k=2, ffn=16, shared_ffn=16, selection_bias=True, score="sigmoid", scale=2.5, groups=4, top_groups=2
        ),
    },
)  # fmt: skip
GPT_OSS = Model(
    name="gpt-oss-like",
    **{
        **_MOE, "family": "gpt_oss", "sinks": True, "activation": "swiglu_oai", "qkv_bias": True, "out_bias": True,
        "windows": (8, None, 8, None), "experts": Experts(count=4, top_k=2, ffn=16, bias=True, router_bias=True),
    },
)  # fmt: skip
SPARSE = {model.name: model for model in (MIXTRAL, QWEN_MOE, DEEPSEEK, GPT_OSS)}
"""A mixture of experts in every layer or in some, with shared experts, latent attention, groups, sinks and biases."""
MODELS = {model.name: model for model in (UNTIED, TIED, FEW_KV_HEADS, QK_NORM, GPT2)}
"""The vocabulary of 101 divides by nothing; `few-kv-heads` and `qk-norm` have one key-value head for any tp."""

LAYOUTS = (
    "dp2 mb2",
    "tp2 mb4",
    "tp2:sp mb4",
    "pp2 mb2",
    "dp2 tp2 mb2",
    "tp2 pp2 mb2",
    "dp2 pp2 mb1",
    "dp2 tp2:sp pp2 mb2",
    "dp2:zero1 tp2 mb2",
)
"""The layouts of the first release's promise, each with two micro-batches or more."""

# Which models meet every layout in CI; the others, and the second precision, do so in `make parity`.
CI_MODELS = ("tied", "few-kv-heads", "gpt2-like")
CI_SPARSE = ("deepseek-v3-like", "gpt-oss-like")


PARITY_LAYOUTS = (
    "dp2:zero2 pp2x2:dualpipe-v ep2:async mb1 ac:core+norms+activation",
    "dp2:zero1 tp2 pp2x2:dualpipe-v ep4:async mb1 ac:norms+mlp",
    "tp2 pp2x2:dualpipe-v ep2:async mb2 ac:full:1",
    "cp2:ring pp2x2:dualpipe-v ep2:async mb2",
    "tp2:async pp2:zb-h1 mb1 ac:core+norms+activation:1",
    "tp2 pp2x2:dualpipe-v mb1 ac:activation",
    "dp2:zero3 cp2:ulysses mb1 ac:norms+mlp",
    "dp2 tp2:async ep4 mb2 ac:core+norms+activation:1",
    "dp2 tp2:sp ep2 etp2 mb2 ac:norms+mlp",
)
"""Of these, what only `make parity` runs."""


def cases(models: Iterable[str], in_ci: Iterable[str], layouts: Iterable[str], precisions: tuple[str, str]) -> list[Any]:
    """(model, layout, precision) for pytest: in CI the models `in_ci` in the first precision, and the promised layouts in both."""
    out = []
    for name, layout, precision in product(models, layouts, precisions):
        quick = layout in LAYOUTS or (name in in_ci and precision == precisions[0] and layout not in PARITY_LAYOUTS)
        out.append(pytest.param(name, layout, precision, marks=[] if quick else [pytest.mark.parity]))
    return out


SPARSE_LAYOUTS = (
    "mb4",
    "tp2 mb4",
    "dp2 ep2 mb2",
    "tp2:sp ep2 mb2",
    "tp2 etp2 mb2",
    "dp2 tp2:sp ep2 etp2 mb2",
    "dp2 ep2 pp2 mb2",
    "dp4:zero1 ep2 mb1",
    "dp4:zero2 ep2 mb1",
    "dp4:zero3 ep2 mb1 ac:full",
    "dp4:zero3x2 ep4 mb2 ac:selective",
    "dp2 tp2 ep4 mb2",
    "dp2:zero3 pp2x2:zb-v ep2 mb1",
    "cp2:ring tp2:sp ep4 mb2",
    "cp2:ulysses ep2 mb4",
    "dp2 tp2:async ep4 mb2 ac:full",
    "dp2:zero3 tp2 ep2 pp2:zb-h1 mb1 ac:core+mlp:1",
    "dp2:zero3 tp2 ep2 pp2x2:zb-v mb1 ac:norms+activation",
    "dp2 tp2:async ep4 mb2 ac:core+norms+activation:1",
    "dp2 tp2:sp ep2 etp2 mb2 ac:norms+mlp",
    "dp2:zero1 pp2x2:dualpipe-v ep2:async mb1 ac:full",
    "dp2 tp2:async pp2x2:dualpipe-v ep2:async etp2 mb1",
    "dp2:zero2 pp2x2:dualpipe-v ep2:async mb1 ac:core+norms+activation",
    "dp2:zero1 tp2 pp2x2:dualpipe-v ep4:async mb1 ac:norms+mlp",
    "tp2 pp2x2:dualpipe-v ep2:async mb2 ac:full:1",
    "cp2:ring pp2x2:dualpipe-v ep2:async mb2",
)
"""Experts over any of the other axes."""

MORE_LAYOUTS = (
    "mb1",
    "tp4 mb4",
    "tp4:sp mb4",
    "tp4:async mb4",
    "pp4 mb1",
    "pp2:gpipe mb2",
    "dp4:zero1 mb1",
    "dp2:zero1 pp2 mb1",
    "dp2:zero1 tp2:sp mb2 ac:full",
    "tp2 pp2 mb4 ac:full",
    "dp2 tp2 pp2 mb2 order:pp-dp-cp-tp",
    "dp2:zero2 mb1",
    "dp2:zero2 tp2:sp pp2 mb2",
    "dp2:zero3 mb4 ac:full",
    "dp2:zero3 tp2:sp mb2",
    "dp2:zero3 pp2 mb1",
    "dp4:zero3x2 mb1",
    "dp4:zero1x2 mb1 ac:selective",
    "pp2x2:interleaved mb2",
    "dp2 pp2:zb-h1 mb1",
    "dp2:zero3 pp2x2:zb-v mb1",
    "tp2:sp pp2x2:dualpipe-v mb1",
    "cp2:ring mb2 ac:full",
    "dp2:zero2 cp2:ulysses mb1 ac:selective",
    "cp4:ring2xulysses2 mb4",
    "dp2 cp2:ring tp2:sp mb2",
    "cp2:ring tp2:async mb2 ac:full",
    "dp2:zero3 tp2:async pp2x2:zb-v mb1",
    "dp2:zero1 tp2:async pp2 mb2 ac:selective",
    "dp2:zero3 cp2 pp2:zb-h1 mb1",
    "dp2 pp2 mb1 stages:3-1",
    "tp2:sp pp2:zb-h1 mb2 stages:1-3",
    "dp2:zero3 tp2:sp mb2 ac:core+mlp:2",
    "cp2:ring pp2:zb-h1 mb1 ac:mlp",
    "pp2 mb1 ac:full:1",
    "dp2:zero3 tp2:sp pp2x2:zb-v mb1 ac:norms+activation",
    "tp2:async pp2:zb-h1 mb1 ac:core+norms+activation:1",
    "tp2 pp2x2:dualpipe-v mb1 ac:activation",
    "dp2:zero3 cp2:ulysses mb1 ac:norms+mlp",
)
