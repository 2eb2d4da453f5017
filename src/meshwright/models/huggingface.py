"""Hugging Face safetensors in and out, for the dense families.

Each family is a table from our parameter names to theirs. GPT-2 keeps its linears transposed (Conv1D) and its q, k and v
in one matrix; everything else is a rename.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from meshwright.spec.errors import UserError
from meshwright.spec.files import fsync
from meshwright.spec.model import Model
from meshwright.spec.parameters import parameters

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
_FAMILIES = {"gpt2": _GPT2, "opt": _OPT} | dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA)
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Narrower ones have scales in tensors of their own, and are not the weights without them."""
_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")


def their_name(model: Model, name: str) -> str:
    """The checkpoint's name of our parameter `name`; a `#q`, `#k`, `#v` suffix means a third of that tensor."""
    for ours, theirs in _table(model).items():
        if match := re.fullmatch(ours, name):
            return match.expand(theirs)
    raise UserError(f"{model.family} checkpoints have no tensor for {name}")


class SafetensorsReader:
    """Reads our parameters from a directory (or file) of Hugging Face safetensors, one tensor at a time.

    Raises UserError for a family without a table, and for a file or a tensor that is missing, damaged, quantised or of
    another shape than the model's.
    """

    def __init__(self, model: Model, path: Path):
        _table(model)
        self.model, self.path = model, path
        self._shapes = {parameter.name: parameter.shape for parameter in parameters(model)}
        self._where: dict[str, Path] = {}
        for file in _weight_files(path):
            with _opened(file) as opened:
                self._where.update(dict.fromkeys(opened.keys(), file))

    def read(self, name: str) -> Tensor:
        """The whole parameter under our name, in the checkpoint's dtype."""
        if name not in self._shapes:
            raise UserError(f"{self.model.name} has no parameter {name}")
        key, _, third = their_name(self.model, name).partition("#")
        key = self._present(key)
        with _opened(self._where[key]) as opened:
            tensor = opened.get_tensor(key)
        if tensor.dtype not in _DTYPES:
            legal = ", ".join(map(str, _DTYPES))
            raise UserError(f"{self.path}: {key} is stored as {tensor.dtype}, which is not built yet; legal: {legal}")
        if _CONV1D.search(key):
            tensor = tensor.t()
        if third:
            tensor = tensor.chunk(3)["qkv".index(third)]
        # Whoever cuts the tensor for a rank, or copies it with broadcasting, would not notice.
        if tensor.shape != self._shapes[name]:
            shape, expected = tuple(tensor.shape), self._shapes[name]
            raise UserError(f"{self.path}: {key} gives {name} the shape {shape}, {self.model.name} has {expected}")
        return tensor.contiguous()

    def _present(self, key: str) -> str:
        for candidate in (key, key.removeprefix("transformer."), key.removeprefix("model.")):
            if candidate in self._where:
                return candidate
        held = f"{len(self._where)}, such as {next(iter(self._where))}" if self._where else "none"
        raise UserError(f"{self.path}: no tensor {key} (it has {held})")


def to_their_state(model: Model, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our whole parameters under Hugging Face names and in their shapes."""
    out: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        key, _, third = their_name(model, name).partition("#")
        if third:
            thirds.setdefault(key, {})[third] = tensor
        else:
            out[key] = tensor
    out |= {key: torch.cat([parts[c] for c in "qkv"]) for key, parts in thirds.items()}
    return {key: (t.t() if _CONV1D.search(key) else t).contiguous() for key, t in out.items()}


def save_safetensors(model: Model, names: Iterable[str], read: Callable[[str], Tensor], directory: Path) -> Path:
    """Write `model.safetensors` with Hugging Face names; `read` gives each whole parameter under our name.

    After a crash the file is the old one or the new one, never a part. Raises UserError if it cannot be written.
    """
    state = to_their_state(model, {name: read(name) for name in names})
    partial, path = directory / ".model.safetensors.partial", directory / "model.safetensors"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            save_file(state, partial, metadata={"format": "pt"})
            fsync(partial)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        fsync(directory)  # the rename itself lives in the directory
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    return path


def _weight_files(path: Path) -> list[Path]:
    """What transformers would read: the whole model in one file, else the shards of the index, else any safetensors."""
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if path.is_file() or whole.is_file():
        return [path if path.is_file() else whole]
    files = _shards(index) if index.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"no .safetensors file in {path}")
    return files


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted({Path(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: not an index, an object whose weight_map names each tensor's file") from None
    for name in names:
        if not (index.parent / name).is_file():
            raise UserError(f"{index} names {name}, which is missing")
    return [index.parent / name for name in names]


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise UserError(f"{file}: not a safetensors file, or a part of one: {error}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None


def _table(model: Model) -> dict[str, str]:
    if model.family not in _FAMILIES:
        raise UserError(f"{model.family} checkpoints cannot be read yet; legal: {', '.join(_FAMILIES)}")
    return _FAMILIES[model.family]
