"""Small random models that transformers makes and saves, and our decoder loaded from their files.

Every weight is drawn so that logits have a standard deviation of about one, which each comparison checks, so an absolute
difference is also a relative one. Matrices are normal with variance 1 / fan-in, which keeps attention scores and features
of order one; norm weights are uniform on [0.5, 1.5] and biases normal, because at ones and zeros, where transformers
starts them, a norm or a bias that is swapped or forgotten changes nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from meshwright.models.decoder import Decoder
from meshwright.models.huggingface import SafetensorsReader, save_safetensors
from meshwright.spec.errors import UserError
from meshwright.spec.huggingface import load_model
from meshwright.spec.model import Model

transformers = pytest.importorskip("transformers")

BATCH, LENGTH = 2, 24

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 101}
SIZES |= {"max_position_embeddings": 64}
# A large epsilon, so that a decoder which reads another one is caught.
LLAMA = SIZES | {"model_type": "llama", "num_key_value_heads": 2, "intermediate_size": 88, "rms_norm_eps": 1e-3}
GPT2 = {"model_type": "gpt2", "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 40, "vocab_size": 101}
GPT2 |= {"layer_norm_epsilon": 1e-3}
OPT = SIZES | {"model_type": "opt", "ffn_dim": 88}
# With 8 dims a head, the four wavelengths are 6.3 (kept), 33 (between), 1,260 and 33,500 (stretched) positions.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64, "rope_theta": 800.0}
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
# Of the four frequencies two are kept, one is slowed by a quarter of the way and one by half of it.
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 2.0, "beta_slow": 0.1, "rope_theta": 100.0}
YARN |= {"original_max_position_embeddings": 64}
MSCALE = YARN | {"mscale": 1.0, "mscale_all_dim": 0.707}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN3_MOE = LLAMA | {"model_type": "qwen3_moe", "head_dim": 12, "moe_intermediate_size": 40, "num_experts": 6}
QWEN3_MOE |= {"num_experts_per_tok": 2, "decoder_sparse_step": 1}
DEEPSEEK = LLAMA | {"model_type": "deepseek_v2", "num_key_value_heads": 6, "moe_intermediate_size": 40}
DEEPSEEK |= {"q_lora_rank": 20, "kv_lora_rank": 24, "qk_nope_head_dim": 10, "qk_rope_head_dim": 8, "v_head_dim": 14}
DEEPSEEK |= {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2, "first_k_dense_replace": 1}
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7}
DEEPSEEK_V3 = DEEPSEEK | {"model_type": "deepseek_v3", "n_group": 4, "topk_group": 2, "n_shared_experts": 1}
GPT_OSS = LLAMA | {"model_type": "gpt_oss", "head_dim": 8, "intermediate_size": 40, "num_local_experts": 4}
GPT_OSS |= {"num_experts_per_tok": 2, "sliding_window": 5}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}

CASES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt2 untied": GPT2 | UNTIED | {"n_inner": 80, "activation_function": "gelu"},
    "opt": OPT,
    "opt untied": OPT | UNTIED,
    "opt without bias": OPT | {"enable_bias": False},
    "llama 2": LLAMA | {"num_key_value_heads": 6},
    "llama 2 tied": LLAMA | TIED,
    "llama biased": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama 3": LLAMA | {"rope_parameters": LLAMA3, "num_key_value_heads": 1},
    "llama 3 tied": LLAMA | TIED | {"rope_parameters": LLAMA3},
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": 5},
    "mistral tied": LLAMA | TIED | {"model_type": "mistral", "sliding_window": 5},
    "qwen2": LLAMA | {"model_type": "qwen2"},
    "qwen2 tied": LLAMA | TIED | {"model_type": "qwen2"},
    "qwen2 windows": LLAMA | WINDOWS | {"model_type": "qwen2"},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 12},
    "qwen3 tied": LLAMA | TIED | {"model_type": "qwen3", "head_dim": 12, "attention_bias": True},
    "llama yarn": LLAMA | {"rope_parameters": YARN},
    "mixtral": MIXTRAL,
    "mixtral tied": MIXTRAL | TIED | {"num_local_experts": 6, "num_experts_per_tok": 1, "sliding_window": 5},
    "qwen3 moe": QWEN3_MOE | {"norm_topk_prob": True},
    "qwen3 moe among dense": QWEN3_MOE | {"mlp_only_layers": [1], "norm_topk_prob": False, "attention_bias": True},
    "deepseek v2": DEEPSEEK | GROUPS | {"rope_parameters": MSCALE},
    "deepseek v2 lite": DEEPSEEK | {"q_lora_rank": None, "attention_bias": True},
    "deepseek v3": DEEPSEEK_V3 | {"rope_parameters": MSCALE | {"mscale": 0.5}},
    "deepseek v3 not normalized": DEEPSEEK_V3 | {"norm_topk_prob": False, "routed_scaling_factor": 0.5},
    "gpt-oss": GPT_OSS,
    "gpt-oss truncated": GPT_OSS | TIED | {"rope_parameters": YARN, "attention_bias": False},
}


@dataclass(frozen=True)
class Saved:
    """A randomised transformers model and the directory it saved itself in."""

    theirs: Any
    directory: Path

    @property
    def model(self) -> Model:
        return load_model(str(self.directory))


def save_theirs(config: dict[str, Any], directory: Path, **options: Any) -> Saved:
    copied = json.loads(json.dumps(config))  # transformers edits nested objects in place
    # Written-out attention: no code in common with the fused kernel that the decoder calls.
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**copied), attn_implementation="eager", dtype=torch.float32
    ).eval()
    randomise(theirs)
    theirs.save_pretrained(directory, **options)
    return Saved(theirs, directory)


def randomise(theirs: Any) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 3:
                values /= parameter.shape[1 if theirs.config.model_type == "gpt_oss" else 2] ** 0.5
            elif parameter.dim() == 2:
                transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
                values /= parameter.shape[0 if transposed else 1] ** 0.5
            elif name.endswith("weight"):
                values = 0.5 + torch.rand(parameter.shape, generator=generator)
            parameter.copy_(values)
        for name, buffer in theirs.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) / 4)


def tensors(decoder: Decoder) -> dict[str, Tensor]:
    """Parameters, each once, and buffers."""
    return dict(decoder.named_parameters()) | dict(decoder.named_buffers())


def load_ours(model: Model, path: Path, layers: range | None = None, *, first: bool = True, last: bool = True) -> Decoder:
    decoder, reader = Decoder(model, layers, first=first, last=last), SafetensorsReader(model, path)
    with torch.no_grad():
        for name, parameter in tensors(decoder).items():
            # The last stage of a tied model has a head without the embedding: the same values under another name.
            whole = reader.read("embedding.tokens.weight" if model.tied and name == "head.weight" else name)
            assert whole.shape == parameter.shape  # copy_ would broadcast
            parameter.copy_(whole)
    return decoder


def save_ours(model: Model, decoder: Decoder, directory: Path) -> Path:
    state = tensors(decoder)
    return save_safetensors(model, state, lambda name: state[name].detach(), directory)


def token_ids(model: Model, length: int = LENGTH) -> Tensor:
    return torch.randint(model.vocab, (BATCH, length), generator=torch.Generator().manual_seed(1))


def logits_of_theirs(theirs: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return theirs(ids, use_cache=False).logits


def largest_difference(ours: Decoder, theirs: Any, ids: Tensor) -> float:
    with torch.no_grad():
        mine, reference = ours(ids), logits_of_theirs(theirs, ids)
    assert mine.shape == reference.shape
    assert 0.5 < reference.std() < 2, "the tolerance is meant for logits of order one"
    return float((mine - reference).abs().max())


def message(call: Any, *args: Any) -> str:
    """The one line of the UserError that `call` ends in."""
    with pytest.raises(UserError) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text
