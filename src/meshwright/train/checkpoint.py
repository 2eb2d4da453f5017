"""Checkpoints that do not know the layout: every tensor is saved as a global one, by PyTorch's Distributed Checkpoint.

A rank owns flat ranges of its shards (under ZeRO, a slice of a bucket). A flat range of a row-major tensor is a few
boxes of the global tensor; each rank writes the boxes that it owns and reads the boxes that it needs, so no tensor is
ever gathered, whatever the two layouts.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from meshwright.models.huggingface import save_safetensors
from meshwright.parallel.bucket import FlatBucket
from meshwright.parallel.mesh import Mesh
from meshwright.spec.errors import UserError
from meshwright.spec.files import fsync, write_text_atomically
from meshwright.spec.model import Model
from meshwright.spec.parameters import parameters
from meshwright.spec.shards import Shard
from meshwright.train.optimizer import Optimizer

ABOUT = "meshwright.json"


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular piece of a global tensor and the memory that holds it."""

    offsets: tuple[int, ...]
    global_shape: tuple[int, ...]
    tensor: Tensor

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offsets), self.tensor.shape)


def save_checkpoint(directory: Path, step: int, about: dict[str, Any], mesh: Mesh, optimizer: Optimizer) -> Path:
    """Write `directory/step-NNNNNNNN`; it appears under that name only when it is complete. Every rank calls this."""
    path = directory / f"step-{step:08d}"
    partial = directory / f".{path.name}.partial"
    if mesh.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier()
    boxes = _owned_boxes(mesh, optimizer)
    with _quiet():
        dcp.save(
            {}, storage_writer=dcp.FileSystemWriter(partial), planner=_SavePlanner(boxes), no_dist=not dist.is_initialized()
        )
    if mesh.rank == 0:
        write_text_atomically(partial / ABOUT, json.dumps({"step": step, **about}, indent=1))
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
        fsync(directory)
    _barrier()
    return path


def load_checkpoint(path: Path, mesh: Mesh, optimizer: Optimizer) -> dict[str, Any]:
    """Read this rank's state from `path`, saved under any layout. Returns what was saved about the run.

    Raises UserError when a tensor is missing or has another shape: the checkpoint is of another model.
    """
    about = read_about(path)
    boxes = _held_boxes(optimizer)
    reader = dcp.FileSystemReader(path)
    stored = reader.read_metadata().state_dict_metadata
    for name, pieces in boxes.items():
        found = stored.get(name)
        shape = tuple(found.size) if isinstance(found, TensorStorageMetadata) else None
        if shape != pieces[0].global_shape:
            raise UserError(
                f"checkpoint {path} is of another model: {name} has shape {shape}, expected {pieces[0].global_shape}"
            )
    with _quiet():
        dcp.load({}, storage_reader=reader, planner=_LoadPlanner(boxes), no_dist=not dist.is_initialized())
    optimizer.set_step(int(about["step"]))
    optimizer.state.adopt_weights()
    return about


def export_safetensors(path: Path, model: Model, out: Path) -> Path:
    """The weights of the checkpoint at `path` as Hugging Face safetensors in `out`, whatever layout saved them. One process."""
    whole = {p.name: torch.empty(p.shape) for p in parameters(model)}
    boxes = {f"model.{name}": [Box((0,) * tensor.ndim, tuple(tensor.shape), tensor)] for name, tensor in whole.items()}
    dcp.load({}, storage_reader=dcp.FileSystemReader(path), planner=_LoadPlanner(boxes), no_dist=True)
    buffers = read_about(path).get("buffers", {})
    whole |= {name: torch.tensor(values) for name, values in buffers.items()}
    return save_safetensors(model, whole, whole.__getitem__, out)


def newest_checkpoint(directory: Path) -> Path | None:
    """The complete checkpoint with the highest step, if there is one."""
    return max(directory.glob("step-*"), default=None)


def read_about(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((path / ABOUT).read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a Meshwright checkpoint: {error}") from error


def flat_boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """The flat range [start, end) of a row-major tensor as boxes: (offsets, sizes, flat start), in order."""
    if start >= end:
        return
    if len(shape) <= 1:
        yield (start,), (end - start,), start
        return
    row = 1
    for size in shape[1:]:
        row *= size
    first, last = -(-start // row), end // row
    if first > last:  # inside one row
        index = start // row
        yield from _within_row(shape, index, start, end, row)
        return
    yield from _within_row(shape, first - 1, start, first * row, row)
    if last > first:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]), first * row
    yield from _within_row(shape, last, last * row, end, row)


def _within_row(
    shape: tuple[int, ...], index: int, start: int, end: int, row: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    for offsets, sizes, at in flat_boxes(shape[1:], start - index * row, end - index * row):
        yield (index, *offsets), (1, *sizes), index * row + at


def _owned_boxes(mesh: Mesh, optimizer: Optimizer) -> dict[str, list[Box]]:
    """Of the ranks that hold the same values, the first one writes."""
    owned = [b for b in optimizer.state.buckets if b.replicate.index == 0 and mesh.owns(b.plan.replicas)]
    return _boxes(owned)


def _held_boxes(optimizer: Optimizer) -> dict[str, list[Box]]:
    return _boxes(optimizer.state.buckets)


def _boxes(buckets: list[FlatBucket]) -> dict[str, list[Box]]:
    """Every box of master weights and Adam moments in `buckets`, by name in the checkpoint."""
    out: dict[str, list[Box]] = {}
    for bucket in buckets:
        for kind, flat in zip(("model", "exp_avg", "exp_avg_sq"), bucket.state_at_rest, strict=True):
            for shard, offset in zip(bucket.plan.shards, bucket.plan.offsets, strict=True):
                pieces = list(_shard_boxes(shard, offset, bucket.owned, flat))
                if pieces:
                    out[f"{kind}.{shard.name}"] = pieces
    return out


def _shard_boxes(shard: Shard, offset: int, owned: slice, flat: Tensor) -> Iterator[Box]:
    """The part of `shard`, at `offset` of its bucket, that lies in `owned`; `flat` holds the owned elements."""
    start, end = max(owned.start, offset) - offset, min(owned.stop, offset + shard.numel) - offset
    base = offset - owned.start
    for offsets, sizes, at in flat_boxes(shard.shape, start, end):
        numel = 1
        for size in sizes:
            numel *= size
        starts = {dim: start for dim, start, _ in shard.cuts}
        offsets = tuple(o + starts.get(dim, 0) for dim, o in enumerate(offsets))
        yield Box(offsets, shard.global_shape, flat[base + at : base + at + numel].view(sizes))


class _SavePlanner(DefaultSavePlanner):
    def __init__(self, boxes: dict[str, list[Box]]):
        super().__init__(flatten_state_dict=False)
        self._boxes = {MetadataIndex(name, box.offsets): box for name, pieces in boxes.items() for box in pieces}

    def create_local_plan(self) -> SavePlan:
        items = []
        for index, box in self._boxes.items():
            data = TensorWriteData(box.chunk, TensorProperties.create_from_tensor(box.tensor), torch.Size(box.global_shape))
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        index = write_item.index
        return self._boxes[MetadataIndex(index.fqn, index.offset)].tensor


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self, boxes: dict[str, list[Box]]):
        super().__init__(flatten_state_dict=False)
        self._boxes = boxes
        self._by_index = {MetadataIndex(name, box.offsets): box for name, pieces in boxes.items() for box in pieces}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, pieces in self._boxes.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, stored, [box.chunk for box in pieces])
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index = read_item.dest_index
        tensor = self._by_index[MetadataIndex(index.fqn, index.offset)].tensor
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        return tensor


@contextmanager
def _quiet() -> Iterator[None]:
    """One process without a process group is meant: PyTorch warns of it at every save."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
