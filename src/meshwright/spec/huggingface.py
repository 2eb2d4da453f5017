"""A `Model` from a Hugging Face `config.json`, from a directory that holds one, or from the catalogue.

One small function per family. An absent key gets the default of that family's configuration class in transformers 5,
except the sizes that every published config states (hidden size, layers, heads, vocabulary, widths, experts): a default
there would price another model in silence. What a `Model` cannot describe is refused, never dropped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from meshwright.spec.errors import UserError, choices
from meshwright.spec.model import Activation, Experts, LatentAttention, Model, Rope

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
"""None of them changes a shape. Only the first two are described in full; see `Rope`."""


def load_model(ref: str) -> Model:
    """The model that `ref` names: a config.json, a directory that holds one, or a catalogue entry. A path wins."""
    path = Path(ref).expanduser()
    if path.is_dir() and (path / "config.json").exists():
        path /= "config.json"
    if path.is_file():
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
        return read_config(_read_json(path), name, str(path))
    catalogue = _catalogue()
    if ref in catalogue:
        return read_config(catalogue[ref]["config"], ref, catalogue[ref]["source"])
    if path.is_dir():
        raise UserError(f"{ref}: this directory holds no config.json")
    if "/" in ref or ref.endswith(".json"):
        raise UserError(f"{ref}: no such file; give a config.json, a directory that holds one, or a catalogue model")
    raise choices(ref, catalogue, "model")


def catalogue_models() -> tuple[str, ...]:
    """The names `load_model` knows without a file."""
    return tuple(_catalogue())


def read_config(config: Mapping[str, Any], name: str, source: str) -> Model:
    """The model described by the keys of a config.json. `source` names the file in errors and in the result.

    Raises UserError for an unknown architecture, a missing or mistyped key, and anything a Model cannot describe.
    """
    keys = _Keys(config, name, source)
    model_type = keys.text("model_type", "")
    architectures = keys.texts("architectures") or ()
    by_class = [ARCHITECTURES[a] for a in architectures if a in ARCHITECTURES]
    family = model_type if model_type in FAMILIES else next(iter(by_class), None)
    if family is None:
        given = model_type or ", ".join(architectures)
        if not given:
            raise keys.error(f"missing key model_type; known: {', '.join(FAMILIES)}")
        raise keys.error(str(choices(given, FAMILIES, "model architecture")))
    model = replace(FAMILIES[family](keys), family=family)
    if model.heads % model.kv_heads:
        raise keys.error(f"num_attention_heads {model.heads} is not a multiple of num_key_value_heads {model.kv_heads}")
    if model.experts and model.experts.top_k > model.experts.count:
        raise keys.error(f"a token cannot visit {model.experts.top_k} experts of {model.experts.count}")
    return model


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON, line {error.lineno} column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: a config.json holds an object, got {type(config).__name__}")
    return config


@lru_cache(maxsize=1)
def _catalogue() -> dict[str, Any]:
    text = (files("meshwright.spec") / "catalogue" / "models.yaml").read_text(encoding="utf-8")
    # The C loader is ten times faster; PyYAML may be built without it.
    entries: dict[str, Any] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return entries


@dataclass(frozen=True, slots=True)
class _Keys:
    """Typed access to a config. A key may go by several names; null counts as absent, except in `optional`."""

    config: Mapping[str, Any]
    name: str
    source: str

    def error(self, message: str) -> UserError:
        return UserError(f"{self.source}: {message}")

    def integer(self, *names: str, default: int | None = None, minimum: int = 1) -> int:
        for name in names:
            if self.config.get(name) is not None:
                return self._integer(name, minimum)
        if default is None:
            raise self.error(f"missing key {' or '.join(names)}")
        return default

    def optional(self, name: str, default: int | None) -> int | None:
        """An integer for which null says something: no window, no compression."""
        if name not in self.config:
            return default
        return None if self.config[name] is None else self._integer(name, 1)

    def _integer(self, name: str, minimum: int) -> int:
        value = self.config[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.error(f"{name} must be an integer of at least {minimum}, got {value!r}")
        return value

    def number(self, name: str, default: float | None) -> float:
        value = self._typed(name, (int, float), "a number", default)
        if value is None:
            raise self.error(f"missing key {name}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._typed(name, bool, "true or false", default))

    def text(self, name: str, default: str) -> str:
        return str(self._typed(name, str, "a string", default))

    def texts(self, name: str) -> Sequence[str] | None:
        return self._list(name, str, "strings")

    def integers(self, name: str) -> Sequence[int]:
        return self._list(name, int, "integers") or ()

    def _list(self, name: str, kind: type, what: str) -> Sequence[Any] | None:
        value: Sequence[Any] | None = self._typed(name, list, f"a list of {what}", None)
        if value is not None and not all(isinstance(item, kind) for item in value):
            raise self.error(f"{name} must be a list of {what}, got {value!r}")
        return value

    def _typed(self, name: str, kind: type | tuple[type, ...], what: str, default: Any) -> Any:
        value = self.config.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(f"{name} must be {what}, got {value!r}")
        return value

    def within(self, name: str) -> _Keys:
        """The keys of a nested object; empty if it is absent."""
        return _Keys(self._typed(name, dict, "an object", {}), self.name, f"{self.source}: {name}")

    def require(self, name: str, legal: Sequence[Any], why: str) -> None:
        """Refuse a value that a Model cannot describe. The first legal value is the default."""
        value = self.config.get(name)
        if value is not None and value not in legal:
            raise self.error(f"{name} = {json.dumps(value)} cannot be described: {why}")


def _gpt2(keys: _Keys) -> Model:
    keys.require("add_cross_attention", (False,), "only decoders without an encoder")
    keys.require("scale_attn_weights", (True,), "attention scores are scaled by 1/sqrt(head_dim)")
    keys.require("scale_attn_by_inverse_layer_idx", (False,), "every layer scales its attention alike")
    hidden = keys.integer("n_embd", "hidden_size")
    return _learned_positions(
        keys,
        hidden=hidden,
        layers=keys.integer("n_layer", "num_hidden_layers"),
        heads=keys.integer("n_head", "num_attention_heads"),
        ffn=keys.integer("n_inner", default=4 * hidden),
        max_positions=keys.integer("n_positions", "max_position_embeddings", default=1024),
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        activation=_activation(keys, "activation_function", "gelu_new"),
    )


def _opt(keys: _Keys) -> Model:
    hidden = keys.integer("hidden_size")
    keys.require("word_embed_proj_dim", (hidden,), f"embeddings are as wide as hidden_size, {hidden}")
    keys.require("do_layer_norm_before", (True,), "only pre-norm blocks")
    keys.require("_remove_final_layer_norm", (False,), "a norm precedes the head")
    keys.require("layer_norm_elementwise_affine", (True,), "norms have weights")
    model = _learned_positions(
        keys,
        hidden=hidden,
        layers=keys.integer("num_hidden_layers"),
        heads=keys.integer("num_attention_heads"),
        ffn=keys.integer("ffn_dim"),
        max_positions=keys.integer("max_position_embeddings", default=2048),
        norm_eps=1e-5,
        activation=_activation(keys, "activation_function", "relu"),
    )
    bias = keys.flag("enable_bias", True)
    return replace(model, position_offset=2, qkv_bias=bias, out_bias=bias, mlp_bias=bias)


def _learned_positions(
    keys: _Keys,
    *,
    hidden: int,
    layers: int,
    heads: int,
    ffn: int,
    max_positions: int,
    norm_eps: float,
    activation: Activation,
) -> Model:
    """What GPT-2 and OPT share: LayerNorm, biases, a plain MLP, learned positions, a tied head."""
    return Model(
        name=keys.name,
        family="",
        source=keys.source,
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        vocab=keys.integer("vocab_size"),
        heads=heads,
        kv_heads=heads,
        head_dim=_head_dim(keys, hidden, heads),
        max_positions=max_positions,
        norm="layernorm",
        norm_eps=norm_eps,
        activation=activation,
        gated=False,
        rope=None,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=keys.flag("tie_word_embeddings", True),
    )
