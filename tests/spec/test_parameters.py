"""Our lists of parameters against the modules that transformers builds, to the last parameter."""

from __future__ import annotations

import json
from math import prod
from typing import Any

import pytest

from meshwright.spec.huggingface import FAMILIES, _catalogue, catalogue_models, load_model, read_config
from meshwright.spec.model import Model
from meshwright.spec.parameters import count_parameters, layer_parameters, parameters

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LLAMA = {
    "model_type": "llama",
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
LLAMA |= {"intermediate_size": 88, "vocab_size": 101, "max_position_embeddings": 64}
MOE = {"num_experts_per_tok": 3, "moe_intermediate_size": 20}
MLA = {"kv_lora_rank": 24, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14, "first_k_dense_replace": 1}
DEEPSEEK = LLAMA | MOE | MLA | {"n_routed_experts": 8, "num_key_value_heads": 6}
GPT2 = {"model_type": "gpt2", "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 40, "vocab_size": 101}
OPT = {
    "model_type": "opt",
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "ffn_dim": 88,
    "vocab_size": 101,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

SMALL: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt2 with its own ffn": GPT2 | {"n_inner": 80, "tie_word_embeddings": False},
    "opt": OPT,
    "opt without bias": OPT | {"enable_bias": False, "max_position_embeddings": 30, "word_embed_proj_dim": 48},
    "llama": LLAMA,
    "llama tied": LLAMA | {"tie_word_embeddings": True, "head_dim": 10, "num_key_value_heads": None},
    "llama biased": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama 3.1": LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}},
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": 16},
    "mixtral": LLAMA | {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2": LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 12, "tie_word_embeddings": True},
    "qwen3 biased": LLAMA | {"model_type": "qwen3", "attention_bias": True},
    "qwen3_moe": LLAMA | MOE | {"model_type": "qwen3_moe", "num_experts": 8, "mlp_only_layers": [1], "head_dim": 12},
    "qwen3_moe every other": LLAMA | MOE | {"model_type": "qwen3_moe", "num_experts": 8, "decoder_sparse_step": 2},
    "deepseek_v2": DEEPSEEK | {"model_type": "deepseek_v2", "q_lora_rank": 18, "n_shared_experts": 2},
    "deepseek_v2 lite": DEEPSEEK | {"model_type": "deepseek_v2", "q_lora_rank": None, "n_shared_experts": 1},
    "deepseek_v2 biased": DEEPSEEK | {"model_type": "deepseek_v2", "attention_bias": True, "mlp_bias": True},
    "deepseek_v3": DEEPSEEK | {"model_type": "deepseek_v3", "n_group": 4, "topk_group": 2, "mlp_bias": True},
    "gpt_oss": LLAMA | {"model_type": "gpt_oss", "num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 12},
    "gpt_oss unbiased": LLAMA
    | {"model_type": "gpt_oss", "num_local_experts": 6, "num_experts_per_tok": 2, "attention_bias": False},
}


def names(model: Model) -> dict[str, tuple[tuple[int, ...], str]]:
    every = parameters(model)
    assert len({p.name for p in every}) == len(every)
    return {p.name: (p.shape, p.role) for p in every}


def test_a_dense_model_lists_the_names_the_decoder_uses_in_model_order() -> None:
    model = read_config(SMALL["qwen3 biased"] | {"num_hidden_layers": 1, "head_dim": 12}, "m", "test")
    assert list(names(model).items()) == [
        ("embedding.tokens.weight", ((101, 48), "vocab")),
        ("layers.0.attention_norm.weight", ((48,), "replicated")),
        ("layers.0.attention.qkv.q.weight", ((72, 48), "column")),
        ("layers.0.attention.qkv.q.bias", ((72,), "column")),
        ("layers.0.attention.qkv.k.weight", ((24, 48), "kv")),
        ("layers.0.attention.qkv.k.bias", ((24,), "kv")),
        ("layers.0.attention.qkv.v.weight", ((24, 48), "kv")),
        ("layers.0.attention.qkv.v.bias", ((24,), "kv")),
        ("layers.0.attention.q_norm.weight", ((12,), "head")),
        ("layers.0.attention.k_norm.weight", ((12,), "head")),
        ("layers.0.attention.out.weight", ((48, 72), "row")),
        ("layers.0.attention.out.bias", ((48,), "replicated")),
        ("layers.0.mlp_norm.weight", ((48,), "replicated")),
        ("layers.0.mlp.gate_up.gate.weight", ((88, 48), "column")),
        ("layers.0.mlp.gate_up.up.weight", ((88, 48), "column")),
        ("layers.0.mlp.down.weight", ((48, 88), "row")),
        ("norm.weight", ((48,), "replicated")),
        ("head.weight", ((101, 48), "vocab")),
    ]


def test_learned_positions_biased_norms_and_a_tied_head() -> None:
    found = names(read_config(OPT | {"max_position_embeddings": 30}, "m", "test"))
    assert found["embedding.positions.weight"] == ((32, 48), "replicated")
    assert found["layers.2.mlp.gate_up.up.bias"] == ((88,), "column")
    assert found["layers.2.mlp.down.bias"] == found["layers.2.mlp_norm.bias"] == ((48,), "replicated")
    assert found["norm.bias"] == ((48,), "replicated")
    assert not {"head.weight", "layers.2.mlp.gate_up.gate.weight", "layers.2.attention.q_norm.weight"} & set(found)


def test_latent_attention_and_shared_experts() -> None:
    found = names(read_config(SMALL["deepseek_v2"], "m", "test"))
    assert found["layers.1.attention.q_down.weight"] == ((18, 48), "replicated")
    assert found["layers.1.attention.q_up.weight"] == ((6 * 16, 18), "column")
    assert found["layers.1.attention.kv_down.weight"] == ((24 + 6, 48), "replicated")
    assert found["layers.1.attention.kv_down_norm.weight"] == ((24,), "replicated")
    assert found["layers.1.attention.kv_up.weight"] == ((6 * 24, 24), "column")
    assert found["layers.1.attention.out.weight"] == ((48, 6 * 14), "row")
    assert found["layers.0.mlp.down.weight"] == ((48, 88), "row")
    assert found["layers.1.moe.router.weight"] == ((8, 48), "replicated")
    assert found["layers.1.moe.experts.gate_up.gate.weight"] == ((8, 20, 48), "expert_column")
    assert found["layers.1.moe.experts.down.weight"] == ((8, 48, 20), "expert_row")
    assert found["layers.1.moe.shared.gate_up.up.weight"] == ((40, 48), "column")
    assert "layers.1.attention.q.weight" in names(read_config(SMALL["deepseek_v2 lite"], "m", "test"))


def test_weight_decay_is_for_matrices_and_not_for_stacked_biases() -> None:
    for p in parameters(read_config(SMALL["gpt_oss"], "m", "test")):
        assert p.decay == (p.name.endswith(".weight") and "norm" not in p.name), p.name


def test_embedding_counts_the_lookup_tables_once() -> None:
    assert count_parameters(read_config(GPT2, "m", "test")).embedding == (101 + 40) * 48
    assert count_parameters(read_config(LLAMA, "m", "test")).embedding == 101 * 48


def test_every_family_is_compared() -> None:
    assert {config["model_type"] for config in SMALL.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", SMALL)
def test_small_models_have_the_parameters_of_transformers(name: str) -> None:
    compare(read_config(SMALL[name], name, "test"), SMALL[name])


@pytest.mark.parametrize("name", catalogue_models())
def test_catalogue_models_have_the_parameters_of_transformers(name: str) -> None:
    compare(load_model(name), _catalogue()[name]["config"])


def compare(model: Model, config: dict[str, Any]) -> None:
    """Totals, active totals and, stronger, the number of elements of each kind of tensor, layer by layer."""
    theirs = build(config)
    shapes = {name: tuple(p.shape) for name, p in theirs.named_parameters()}  # a tied head is listed once
    total = sum(map(prod, shapes.values()))
    routed = sum(prod(shape) for name, shape in shapes.items() if ".experts." in name)
    visited = routed // model.experts.count * model.experts.top_k if model.experts else 0

    counts = count_parameters(model)
    assert counts.total == total == sum(p.numel for p in parameters(model))
    assert counts.active == total - routed + visited
    assert bool(routed) == (model.experts is not None)
    for layer in range(model.layers):
        their_layer = sum(prod(s) for name, s in shapes.items() if f".{layer}." in name)
        assert sum(p.numel for p in layer_parameters(model, layer)) == their_layer, f"layer {layer}"


def build(config: dict[str, Any]) -> Any:
    copied = json.loads(json.dumps(config))  # transformers edits nested objects in place
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**copied))
