"""The families of models that can be read: one small function each, and the table of them.

An absent key gets the default of that family's configuration class in transformers 5, except the sizes that every
published config states (hidden size, layers, heads, vocabulary, widths, experts): a default there would price another
model in silence. What a `Model` cannot describe is refused, never dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import log

from meshwright.spec.errors import choices
from meshwright.spec.keys import Keys
from meshwright.spec.model import Activation, Experts, LatentAttention, Model, Rope, Yarn

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
ROPE_RULES = ("default", "llama3", "linear", "dynamic", "yarn", "longrope")
"""None of them changes a shape. default, llama3 and yarn are described in full: see `Rope.scaling`."""


def _decoder(
    keys: Keys,
    *,
    max_positions: int,
    ffn: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    theta: float = 10_000.0,
    eps: float = 1e-6,
    activation: str = "silu",
    tied: bool = False,
) -> Model:
    """What every family states; the arguments are a family's defaults. RMSNorm, gated MLP, rotary positions."""
    hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    head_dim = keys.optional("head_dim", head_dim)
    if head_dim is None and hidden % heads:
        raise keys.error(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    activation = keys.text("hidden_act", activation)
    if activation not in ACTIVATIONS:
        raise keys.error(str(choices(activation, ACTIVATIONS, "activation")))
    return Model(
        name="",
        family="",
        source=keys.source,
        layers=keys.integer("num_hidden_layers"),
        hidden=hidden,
        ffn=keys.integer("intermediate_size", ffn),
        vocab=keys.integer("vocab_size"),
        heads=heads,
        kv_heads=keys.optional("num_key_value_heads", kv_heads) or heads,
        head_dim=head_dim or hidden // heads,
        max_positions=keys.integer("max_position_embeddings", max_positions),
        norm_eps=keys.number("rms_norm_eps", eps),
        activation=ACTIVATIONS[activation],
        rope=_rope(keys, theta, max_positions),
        tied=keys.flag("tie_word_embeddings", tied),
    )


def _rope(keys: Keys, theta: float, max_positions: int) -> Rope:
    """From `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before)."""
    rule = _rope_rule(keys)
    if any(isinstance(value, dict) for value in rule.config.values()):
        raise rule.error("a rule for each layer type is not supported: all layers share one")
    for part in (keys, rule):
        part.require("partial_rotary_factor", 1.0, "all dims of a head are rotated")
    kind = rule.text("rope_type", rule.text("type", "default"))
    if kind not in ROPE_RULES:
        raise rule.error(str(choices(kind, ROPE_RULES, "rope_type")))
    theta = rule.number("rope_theta", keys.number("rope_theta", theta))
    longest = keys.integer("max_position_embeddings", max_positions)
    if kind == "yarn":
        return Rope(theta=theta, yarn=_yarn(rule, longest))
    if kind != "llama3":
        return Rope(theta=theta, scaling=None if kind == "default" else kind)
    factors = rule.number("factor"), rule.number("low_freq_factor"), rule.number("high_freq_factor")
    return Rope(theta=theta, llama3=(*factors, rule.integer("original_max_position_embeddings", longest)))


def _rope_rule(keys: Keys) -> Keys:
    rule = keys.within("rope_scaling")
    return rule if rule.config else keys.within("rope_parameters")


def _yarn(rule: Keys, longest: int) -> Yarn:
    original = rule.integer("original_max_position_embeddings", longest)
    factor = rule.number("factor", longest / original)
    mscale, mscale_all_dim = _number_or_none(rule, "mscale"), _number_or_none(rule, "mscale_all_dim")
    if mscale and mscale_all_dim:
        temperature = _yarn_temperature(factor, mscale) / _yarn_temperature(factor, mscale_all_dim)
    else:
        temperature = _yarn_temperature(factor, 1.0)
    return Yarn(
        factor=factor,
        original_positions=original,
        beta_fast=_number_or_none(rule, "beta_fast") or 32.0,
        beta_slow=_number_or_none(rule, "beta_slow") or 1.0,
        truncate=rule.flag("truncate", True),
        attention_factor=_number_or_none(rule, "attention_factor") or temperature,
    )


def _yarn_temperature(factor: float, mscale: float) -> float:
    """arXiv 2309.00071, equation 22, of which `mscale` is 1 there."""
    return 0.1 * mscale * log(factor) + 1.0 if factor > 1 else 1.0


def _number_or_none(keys: Keys, name: str) -> float | None:
    """Zero counts as absent."""
    return keys.number(name) if keys.config.get(name) else None


def _windows(
    keys: Keys, model: Model, window: int | None, slides: Callable[[int], bool] = lambda layer: True
) -> tuple[int | None, ...]:
    """Each layer's window: by `layer_types`, or where `slides` if that is absent. Empty if no layer has one."""
    kinds = keys.several("layer_types", str)
    if not kinds:
        kinds = ["sliding_attention" if slides(layer) else "full_attention" for layer in range(model.layers)]
    if len(kinds) != model.layers:
        raise keys.error(f"layer_types names {len(kinds)} layers, num_hidden_layers is {model.layers}")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise keys.error(str(choices(kind, ("sliding_attention", "full_attention"), "layer type")))
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def _experts(keys: Keys, ffn: int | None = None) -> Experts:
    """The routed experts; `ffn` where the family has no width of its own for them."""
    ffn = keys.integer("moe_intermediate_size") if ffn is None else ffn
    return Experts(count=keys.integer("num_experts"), top_k=keys.integer("num_experts_per_tok"), ffn=ffn)


def _with_experts(model: Model, experts: Experts, layers: Iterable[int]) -> Model:
    layers = tuple(layers)
    return replace(model, experts=experts if layers else None, moe_layers=layers)


def _learned(keys: Keys, *, max_positions: int, activation: str, ffn: int | None = None) -> Model:
    """What GPT-2 and OPT share: LayerNorm, biases, a plain MLP, learned positions, a tied head."""
    model = _decoder(keys, max_positions=max_positions, ffn=ffn, eps=1e-5, activation=activation, tied=True)
    return replace(model, norm="layernorm", gated=False, rope=None, qkv_bias=True, out_bias=True, mlp_bias=True)


def _gpt2(keys: Keys) -> Model:
    keys.require("add_cross_attention", False, "only decoders without an encoder")
    keys.require("scale_attn_weights", True, "attention scores are scaled by 1/sqrt(head_dim)")
    keys.require("scale_attn_by_inverse_layer_idx", False, "every layer scales its attention alike")
    return _learned(keys, max_positions=1024, activation="gelu_new", ffn=4 * keys.integer("hidden_size"))


def _opt(keys: Keys) -> Model:
    keys.require("word_embed_proj_dim", keys.integer("hidden_size"), "embeddings are hidden_size wide")
    keys.require("do_layer_norm_before", True, "only pre-norm blocks")
    keys.require("_remove_final_layer_norm", False, "a norm precedes the head")
    keys.require("layer_norm_elementwise_affine", True, "norms have weights")
    model = _learned(keys, max_positions=2048, activation="relu")
    bias = keys.flag("enable_bias", True)
    # The first two rows of OPT's position table are for padding.
    return replace(model, position_offset=2, qkv_bias=bias, out_bias=bias, mlp_bias=bias)


def _llama(keys: Keys) -> Model:
    bias = keys.flag("attention_bias", False)
    model = _decoder(keys, max_positions=2048)
    return replace(model, qkv_bias=bias, out_bias=bias, mlp_bias=keys.flag("mlp_bias", False))


def _mistral(keys: Keys) -> Model:
    model = _decoder(keys, max_positions=131_072, kv_heads=8)
    return replace(model, windows=_windows(keys, model, keys.optional("sliding_window", 4096)))


def _mixtral(keys: Keys) -> Model:
    model = _decoder(keys, max_positions=131_072, kv_heads=8, theta=1e6, eps=1e-5)
    model = replace(model, windows=_windows(keys, model, keys.optional("sliding_window", None)))
    return _with_experts(model, _experts(keys, model.ffn), range(model.layers))


def _qwen2(keys: Keys) -> Model:
    model = _decoder(keys, max_positions=32_768, kv_heads=32)
    return replace(model, qkv_bias=True, windows=_qwen_windows(keys, model))


def _qwen3(keys: Keys) -> Model:
    bias = keys.flag("attention_bias", False)
    model = _decoder(keys, max_positions=32_768, kv_heads=32, head_dim=128)
    return replace(model, qk_norm=True, qkv_bias=bias, out_bias=bias, windows=_qwen_windows(keys, model))


def _qwen_windows(keys: Keys, model: Model) -> tuple[int | None, ...]:
    """Full attention in the first `max_window_layers` layers, despite the name."""
    window = keys.optional("sliding_window", 4096) if keys.flag("use_sliding_window", False) else None
    full = keys.integer("max_window_layers", 28, minimum=0)
    return _windows(keys, model, window, lambda layer: layer >= full)


def _qwen3_moe(keys: Keys) -> Model:
    bias, dense = keys.flag("attention_bias", False), keys.several("mlp_only_layers", int)
    step = keys.integer("decoder_sparse_step", 1)
    model = _decoder(keys, max_positions=32_768, kv_heads=4)
    model = replace(model, qk_norm=True, qkv_bias=bias, out_bias=bias)
    if keys.flag("use_sliding_window", False):
        # Unlike the dense Qwen 3, transformers knows no `max_window_layers` here: every layer slides.
        model = replace(model, windows=_windows(keys, model, keys.optional("sliding_window", 4096)))
    experts = replace(_experts(keys), normalized=keys.flag("norm_topk_prob", False))
    return _with_experts(model, experts, (i for i in range(model.layers) if i not in dense and (i + 1) % step == 0))


def _gpt_oss(keys: Keys) -> Model:
    keys.require("swiglu_limit", 7.0, "the clamp of the gated activation is fixed")
    keys.require("swiglu_alpha", 1.702, "the slope of the gated activation is fixed")
    bias = keys.flag("attention_bias", True)
    model = _decoder(keys, max_positions=131_072, kv_heads=8, head_dim=64, theta=150_000.0, eps=1e-5)
    if model.rope and not (keys.within("rope_scaling").config or keys.within("rope_parameters").config):
        rule = {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
        model = replace(model, rope=replace(model.rope, yarn=_yarn(Keys(rule, keys.source), model.max_positions)))
    windows = _windows(keys, model, keys.optional("sliding_window", 128), lambda layer: layer % 2 == 0)
    model = replace(model, activation="swiglu_oai", sinks=True, qkv_bias=bias, out_bias=bias, windows=windows)
    return _with_experts(model, replace(_experts(keys, model.ffn), bias=True, router_bias=True), range(model.layers))


def _deepseek_v2(keys: Keys) -> Model:
    method = keys.text("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise keys.error(str(choices(method, ("greedy", "group_limited_greedy"), "topk_method")))
    experts = replace(
        _experts(keys),
        normalized=keys.flag("norm_topk_prob", False),
        scale=keys.number("routed_scaling_factor", 1.0),
        groups=1 if method == "greedy" else keys.integer("n_group"),
        top_groups=1 if method == "greedy" else keys.integer("topk_group"),
    )
    model = _deepseek(keys, max_positions=2048, dense=0, shared=2, experts=experts)
    return replace(model, mlp_bias=keys.flag("mlp_bias", False))


def _deepseek_v3(keys: Keys) -> Model:
    keys.require("rope_interleave", True, "neighbouring dims are rotated against each other")
    experts = replace(
        _experts(keys),
        selection_bias=True,
        score="sigmoid",
        normalized=keys.flag("norm_topk_prob", True),
        scale=keys.number("routed_scaling_factor", 2.5),
        groups=keys.integer("n_group", 8),
        top_groups=keys.integer("topk_group", 4),
    )
    return _deepseek(keys, max_positions=4096, dense=3, shared=1, experts=experts)


def _deepseek(keys: Keys, *, max_positions: int, dense: int, shared: int, experts: Experts) -> Model:
    """Latent attention, shared experts, the first layers dense (arXiv 2405.04434, section 2)."""
    keys.require("moe_layer_freq", 1, "every layer after the dense ones has experts")
    latent = LatentAttention(
        q_rank=keys.optional("q_lora_rank", 1536),
        kv_rank=keys.integer("kv_lora_rank", 512),
        nope_dim=keys.integer("qk_nope_head_dim", 128),
        rope_dim=keys.integer("qk_rope_head_dim", 64),
        value_dim=keys.integer("v_head_dim", 128),
    )
    head_dim, bias = latent.nope_dim + latent.rope_dim, keys.flag("attention_bias", False)
    model = _decoder(keys, max_positions=max_positions, head_dim=head_dim)
    mscale = _number_or_none(_rope_rule(keys), "mscale_all_dim")
    if mscale and model.rope and model.rope.yarn:
        yarn = replace(model.rope.yarn, score_factor=_yarn_temperature(model.rope.yarn.factor, mscale) ** 2)
        model = replace(model, rope=replace(model.rope, yarn=yarn))
    # Each head has its own keys and values once they are decompressed; `head_dim` in a file is only the rotary part.
    model = replace(model, kv_heads=model.heads, head_dim=head_dim, latent=latent, qkv_bias=bias, out_bias=bias)
    experts = replace(experts, shared_ffn=experts.ffn * (keys.optional("n_shared_experts", shared, minimum=0) or 0))
    return _with_experts(model, experts, range(keys.integer("first_k_dense_replace", dense, minimum=0), model.layers))


@dataclass(frozen=True, slots=True)
class Family:
    """What a `model_type` stands for: the class that transformers names in `architectures`, and how its config is read."""

    architecture: str
    read: Callable[[Keys], Model]
    aliases: Mapping[str, str] = field(default_factory=dict)
    """The family's own name of a key, by the name used above."""


_GPT2_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "rms_norm_eps": "layer_norm_epsilon",
    "hidden_act": "activation_function",
}
_OPT_KEYS = {"intermediate_size": "ffn_dim", "hidden_act": "activation_function"}
_LOCAL = {"num_experts": "num_local_experts"}
_ROUTED = {"num_experts": "n_routed_experts"}

FAMILIES = {
    "gpt2": Family("GPT2LMHeadModel", _gpt2, _GPT2_KEYS),
    "opt": Family("OPTForCausalLM", _opt, _OPT_KEYS),
    "llama": Family("LlamaForCausalLM", _llama),
    "mistral": Family("MistralForCausalLM", _mistral),
    "mixtral": Family("MixtralForCausalLM", _mixtral, _LOCAL),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _qwen3_moe, _LOCAL),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", _deepseek_v2, _ROUTED),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", _deepseek_v3, _ROUTED),
    "gpt_oss": Family("GptOssForCausalLM", _gpt_oss, _LOCAL),
}
