"""Our parameter names as the tensors of Hugging Face checkpoints, on disk.

Each family is a table from our names to theirs. Behind `#` stands the part of a tensor that holds several of ours: a third
(GPT-2 has q, k and v in one matrix) or every second row (GPT-OSS interleaves gate and up). A `*` is the number of an
expert: theirs is a tensor for each, ours one stack of them. Some linears are stored [in, out].
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from meshwright.spec.errors import UserError
from meshwright.spec.model import Model

_LLAMA = {
    r"embedding\.tokens\.weight": r"model.embed_tokens.weight",
    r"layers\.(\d+)\.attention_norm\.weight": r"model.layers.\1.input_layernorm.weight",
    r"layers\.(\d+)\.attention\.qkv\.([qkv])\.(\w+)": r"model.layers.\1.self_attn.\2_proj.\3",
    r"layers\.(\d+)\.attention\.([qk])_norm\.weight": r"model.layers.\1.self_attn.\2_norm.weight",
    r"layers\.(\d+)\.attention\.out\.(\w+)": r"model.layers.\1.self_attn.o_proj.\2",
    r"layers\.(\d+)\.mlp_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight",
    r"layers\.(\d+)\.mlp\.gate_up\.(gate|up)\.(\w+)": r"model.layers.\1.mlp.\2_proj.\3",
    r"layers\.(\d+)\.mlp\.down\.(\w+)": r"model.layers.\1.mlp.down_proj.\2",
    r"norm\.weight": r"model.norm.weight",
    r"head\.weight": r"lm_head.weight",
}
_OPT = {
    r"embedding\.tokens\.weight": r"model.decoder.embed_tokens.weight",
    r"embedding\.positions\.weight": r"model.decoder.embed_positions.weight",
    r"layers\.(\d+)\.attention_norm\.(\w+)": r"model.decoder.layers.\1.self_attn_layer_norm.\2",
    r"layers\.(\d+)\.attention\.qkv\.([qkv])\.(\w+)": r"model.decoder.layers.\1.self_attn.\2_proj.\3",
    r"layers\.(\d+)\.attention\.out\.(\w+)": r"model.decoder.layers.\1.self_attn.out_proj.\2",
    r"layers\.(\d+)\.mlp_norm\.(\w+)": r"model.decoder.layers.\1.final_layer_norm.\2",
    r"layers\.(\d+)\.mlp\.gate_up\.up\.(\w+)": r"model.decoder.layers.\1.fc1.\2",
    r"layers\.(\d+)\.mlp\.down\.(\w+)": r"model.decoder.layers.\1.fc2.\2",
    r"norm\.(\w+)": r"model.decoder.final_layer_norm.\1",
    r"head\.weight": r"lm_head.weight",
}
_GPT2 = {
    r"embedding\.tokens\.weight": r"transformer.wte.weight",
    r"embedding\.positions\.weight": r"transformer.wpe.weight",
    r"layers\.(\d+)\.attention_norm\.(\w+)": r"transformer.h.\1.ln_1.\2",
    r"layers\.(\d+)\.attention\.qkv\.([qkv])\.(\w+)": r"transformer.h.\1.attn.c_attn.\3#\2",
    r"layers\.(\d+)\.attention\.out\.(\w+)": r"transformer.h.\1.attn.c_proj.\2",
    r"layers\.(\d+)\.mlp_norm\.(\w+)": r"transformer.h.\1.ln_2.\2",
    r"layers\.(\d+)\.mlp\.gate_up\.up\.(\w+)": r"transformer.h.\1.mlp.c_fc.\2",
    r"layers\.(\d+)\.mlp\.down\.(\w+)": r"transformer.h.\1.mlp.c_proj.\2",
    r"norm\.(\w+)": r"transformer.ln_f.\1",
    r"head\.weight": r"lm_head.weight",
}
_AT = r"model.layers.\1.mlp."
_ROUTER = {r"layers\.(\d+)\.moe\.router\.weight": _AT + r"gate.weight"}
_EXPERTS = _ROUTER | {
    r"layers\.(\d+)\.moe\.experts\.gate_up\.(gate|up)\.weight": _AT + r"experts.*.\2_proj.weight",
    r"layers\.(\d+)\.moe\.experts\.down\.weight": _AT + r"experts.*.down_proj.weight",
}
_MIXTRAL = _LLAMA | {
    r"layers\.(\d+)\.moe\.router\.weight": r"model.layers.\1.block_sparse_moe.gate.weight",
    r"layers\.(\d+)\.moe\.experts\.gate_up\.gate\.weight": r"model.layers.\1.block_sparse_moe.experts.*.w1.weight",
    r"layers\.(\d+)\.moe\.experts\.gate_up\.up\.weight": r"model.layers.\1.block_sparse_moe.experts.*.w3.weight",
    r"layers\.(\d+)\.moe\.experts\.down\.weight": r"model.layers.\1.block_sparse_moe.experts.*.w2.weight",
}
_DEEPSEEK = (
    _LLAMA
    | _EXPERTS
    | {
        r"layers\.(\d+)\.attention\.q\.weight": r"model.layers.\1.self_attn.q_proj.weight",
        r"layers\.(\d+)\.attention\.q_down\.(\w+)": r"model.layers.\1.self_attn.q_a_proj.\2",
        r"layers\.(\d+)\.attention\.q_down_norm\.weight": r"model.layers.\1.self_attn.q_a_layernorm.weight",
        r"layers\.(\d+)\.attention\.q_up\.weight": r"model.layers.\1.self_attn.q_b_proj.weight",
        r"layers\.(\d+)\.attention\.kv_down\.(\w+)": r"model.layers.\1.self_attn.kv_a_proj_with_mqa.\2",
        r"layers\.(\d+)\.attention\.kv_down_norm\.weight": r"model.layers.\1.self_attn.kv_a_layernorm.weight",
        r"layers\.(\d+)\.attention\.kv_up\.weight": r"model.layers.\1.self_attn.kv_b_proj.weight",
        r"layers\.(\d+)\.moe\.router\.selection_bias": _AT + r"gate.e_score_correction_bias",
        r"layers\.(\d+)\.moe\.shared\.gate_up\.(gate|up)\.(\w+)": _AT + r"shared_experts.\2_proj.\3",
        r"layers\.(\d+)\.moe\.shared\.down\.(\w+)": _AT + r"shared_experts.down_proj.\2",
    }
)
_GPT_OSS = _LLAMA | {
    r"layers\.(\d+)\.attention\.sinks": r"model.layers.\1.self_attn.sinks",
    r"layers\.(\d+)\.moe\.router\.(\w+)": _AT + r"router.\2",
    r"layers\.(\d+)\.moe\.experts\.gate_up\.(gate|up)\.weight": _AT + r"experts.gate_up_proj#\2",
    r"layers\.(\d+)\.moe\.experts\.gate_up\.(gate|up)\.bias": _AT + r"experts.gate_up_proj_bias#\2",
    r"layers\.(\d+)\.moe\.experts\.down\.weight": _AT + r"experts.down_proj",
    r"layers\.(\d+)\.moe\.experts\.down\.bias": _AT + r"experts.down_proj_bias",
}
_FAMILIES = {
    "gpt2": _GPT2,
    "opt": _OPT,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "mixtral": _MIXTRAL,
    "qwen3_moe": _LLAMA | _EXPERTS,
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _DEEPSEEK),
    "gpt_oss": _GPT_OSS,
}
_TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$|\.experts\.(gate_up|down)_proj$")
_THIRDS, _ALTERNATE = ("q", "k", "v"), ("gate", "up")


def check_family(model: Model) -> None:
    """Raise UserError if the checkpoints of the model's family have no table."""
    if model.family not in _FAMILIES:
        raise UserError(f"{model.family} checkpoints cannot be read yet; legal: {', '.join(_FAMILIES)}")


def their_name(model: Model, name: str) -> str:
    """The checkpoint's name of our parameter `name`, with `*` for the number of an expert and `#` before a part."""
    check_family(model)
    for ours, theirs in _FAMILIES[model.family].items():
        if match := re.fullmatch(ours, name):
            return match.expand(theirs)
    raise UserError(f"{model.family} checkpoints have no tensor for {name}")


def from_theirs(key: str, tensor: Tensor, part: str) -> Tensor:
    """Our parameter, or a view of it, out of their tensor `key`, with experts already stacked."""
    if _TRANSPOSED.search(key):
        tensor = tensor.mT
    if part in _THIRDS:
        return tensor.chunk(3)[_THIRDS.index(part)]
    return tensor[:, _ALTERNATE.index(part) :: 2] if part else tensor


def to_theirs(key: str, parts: dict[str, Tensor]) -> Tensor:
    """Their tensor `key`, with experts still stacked, out of ours by part."""
    if "" in parts:
        tensor = parts[""]
    elif parts.keys() == set(_THIRDS):
        tensor = torch.cat([parts[part] for part in _THIRDS])
    else:
        tensor = torch.stack([parts[part] for part in _ALTERNATE], dim=2).flatten(1, 2)
    return tensor.mT if _TRANSPOSED.search(key) else tensor
