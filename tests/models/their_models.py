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
            if parameter.dim() == 2:
                transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
                values /= parameter.shape[0 if transposed else 1] ** 0.5
            elif name.endswith("weight"):
                values = 0.5 + torch.rand(parameter.shape, generator=generator)
            parameter.copy_(values)


def load_ours(model: Model, path: Path, layers: range | None = None, *, first: bool = True, last: bool = True) -> Decoder:
    decoder, reader = Decoder(model, layers, first=first, last=last), SafetensorsReader(model, path)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            # The last stage of a tied model has a head without the embedding: the same values under another name.
            whole = reader.read("embedding.tokens.weight" if model.tied and name == "head.weight" else name)
            assert whole.shape == parameter.shape  # copy_ would broadcast
            parameter.copy_(whole)
    return decoder


def save_ours(model: Model, decoder: Decoder, directory: Path) -> Path:
    state = dict(decoder.named_parameters())
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
