"""Hugging Face safetensors in and out: files and their errors. `models/names.py` has the names of each family."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from meshwright.models.names import check_family, from_theirs, their_name, to_theirs
from meshwright.models.routing import buffer_shapes
from meshwright.spec.errors import UserError
from meshwright.spec.files import fsync
from meshwright.spec.model import Model
from meshwright.spec.parameters import parameters

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Narrower ones have scales in tensors of their own, and are not the weights without them."""


class SafetensorsReader:
    """Reads our parameters from a directory (or file) of Hugging Face safetensors, one tensor at a time.

    Raises UserError for a family without a table, and for a file or a tensor that is missing, damaged, quantised or of
    another shape than the model's.
    """

    def __init__(self, model: Model, path: Path):
        check_family(model)
        self.model, self.path = model, path
        self._shapes = {parameter.name: parameter.shape for parameter in parameters(model)} | buffer_shapes(model)
        self._where: dict[str, Path] = {}
        for file in _weight_files(path):
            with _opened(file) as opened:
                self._where.update(dict.fromkeys(opened.keys(), file))

    def read(self, name: str) -> Tensor:
        """The whole parameter (or buffer) under our name, in the checkpoint's dtype."""
        if name not in self._shapes:
            raise UserError(f"{self.model.name} has no parameter {name}")
        key, _, part = their_name(self.model, name).partition("#")
        if "*" in key:
            tensor = self._stack([key.replace("*", str(i)) for i in range(self._shapes[name][0])], self._shapes[name][1:])
        else:
            (tensor,) = self._stored([key])
        tensor = from_theirs(key, tensor, part)
        # Whoever cuts the tensor for a rank, or copies it with broadcasting, would not notice.
        if tensor.shape != self._shapes[name]:
            shape, expected = tuple(tensor.shape), self._shapes[name]
            raise UserError(f"{self.path}: {key} gives {name} the shape {shape}, {self.model.name} has {expected}")
        return tensor.contiguous()

    def _stack(self, keys: list[str], shape: tuple[int, ...]) -> Tensor:
        stored = self._stored(keys)
        for key, tensor in zip(keys, stored, strict=True):
            if tensor.shape != shape:
                raise UserError(
                    f"{self.path}: {key} has the shape {tuple(tensor.shape)}, an expert of {self.model.name} has {shape}"
                )
        return torch.stack(stored)

    def _stored(self, keys: list[str]) -> list[Tensor]:
        """Tensors as they are in the files, each of which is opened once."""
        keys = [self._present(key) for key in keys]
        tensors: dict[str, Tensor] = {}
        for file in {self._where[key]: None for key in keys}:
            with _opened(file) as opened:
                tensors |= {key: opened.get_tensor(key) for key in keys if self._where[key] == file}
        for key, tensor in tensors.items():
            if tensor.dtype not in _DTYPES:
                legal = ", ".join(map(str, _DTYPES))
                raise UserError(f"{self.path}: {key} is stored as {tensor.dtype}, which is not built yet; legal: {legal}")
        return [tensors[key] for key in keys]

    def _present(self, key: str) -> str:
        for candidate in (key, key.removeprefix("transformer."), key.removeprefix("model.")):
            if candidate in self._where:
                return candidate
        if f"{key}_blocks" in self._where:
            raise UserError(f"{self.path}: {key} is stored in MXFP4 blocks, which is not built yet: save the model in bf16")
        held = f"{len(self._where)}, such as {next(iter(self._where))}" if self._where else "none"
        raise UserError(f"{self.path}: no tensor {key} (it has {held})")


def to_their_state(model: Model, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our whole parameters (and buffers) under Hugging Face names and in their shapes."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        key, _, part = their_name(model, name).partition("#")
        parts.setdefault(key, {})[part] = tensor
    out: dict[str, Tensor] = {}
    for key, held in parts.items():
        tensor = to_theirs(key, held)
        if "*" in key:
            out |= {key.replace("*", str(i)): expert.contiguous() for i, expert in enumerate(tensor)}
        else:
            out[key] = tensor.contiguous()
    return out


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
