"""A `Model` from a Hugging Face `config.json`, from a directory that holds one, or from the catalogue."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from meshwright.spec.errors import UserError, choices
from meshwright.spec.families import FAMILIES
from meshwright.spec.keys import Keys
from meshwright.spec.model import Model


def load_model(ref: str) -> Model:
    """The model that `ref` names: a config.json, a directory that holds one, or a catalogue entry. A path wins."""
    return read_config(*find_config(ref))


def find_config(ref: str) -> tuple[dict[str, Any], str, str]:
    """The config of `load_model(ref)`, the model's name and where it is from."""
    path = Path(ref)
    if (path / "config.json").is_file():
        path /= "config.json"
    if path.is_file():
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
        return _read_json(path), name, str(path)
    catalogue = _catalogue()
    if ref in catalogue:
        return catalogue[ref]["config"], ref, catalogue[ref]["source"]
    if path.is_dir():
        raise UserError(f"{ref}: this directory holds no config.json")
    if "/" in ref or ref.endswith(".json"):
        raise UserError(f"{ref}: no such file; give a config.json, a directory that holds one, or a catalogue model")
    raise choices(ref, catalogue, "model")


def catalogue_models() -> tuple[str, ...]:
    """The names `load_model` knows without a file."""
    return tuple(_catalogue())


def read_config(config: Mapping[str, Any], name: str, source: str) -> Model:
    """The model that the keys of a config.json describe. `source` goes into the Model and in front of every error.

    Raises UserError for an unknown architecture, a missing or mistyped key, and anything a Model cannot describe.
    """
    family = _family(Keys(config, source))
    keys = Keys(config, source, FAMILIES[family].aliases)
    model = replace(FAMILIES[family].read(keys), name=name, family=family)
    if model.heads % model.kv_heads:
        raise keys.error(f"num_attention_heads {model.heads} is not a multiple of num_key_value_heads {model.kv_heads}")
    if model.experts and model.experts.top_k > model.experts.count:
        raise keys.error(f"a token cannot visit {model.experts.top_k} experts of {model.experts.count}")
    return model


def _family(keys: Keys) -> str:
    """By `model_type`, else by `architectures`: some models only rename another family (Kimi K2 is a DeepSeek-V3)."""
    model_type, architectures = keys.text("model_type", ""), keys.several("architectures", str)
    if model_type in FAMILIES:
        return model_type
    for name, family in FAMILIES.items():
        if family.architecture in architectures:
            return name
    given = model_type or ", ".join(architectures)
    if not given:
        raise keys.error(f"missing key model_type; legal: {', '.join(FAMILIES)}")
    raise keys.error(str(choices(given, FAMILIES, "architecture")))


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
    # The C loader is several times faster, but PyYAML may be built without it.
    entries: dict[str, Any] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return entries
