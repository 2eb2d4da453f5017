"""Counts what a forward leaves alive for its backward. Imported by the rank processes."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from workers import build, local_batch

from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload

SETTLED = 0.1
"""Seconds without a change."""


class LiveStorages(TorchDispatchMode):
    """Remembers every storage that operators make inside it, without keeping it; not those that they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        return out

    def alive(self) -> int:
        """Bytes, each storage once. A thread of gloo lets go of a collective's tensors a moment after it has reported the end, so
        what is counted is what stays."""
        before, now = -1, self._alive_now()
        while now != before:
            time.sleep(SETTLED)
            before, now = now, self._alive_now()
        return now

    def _alive_now(self) -> int:
        return sum(size for storage, size in self.sizes.items() if not storage.expired())


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def kept_for_backward(model: Model, workload: Workload, layout: Layout) -> int:
    """Bytes alive on this rank between the forward and the backward of one micro-batch, beyond those before it."""
    engine = build(model, workload, layout)
    batch, chunk = engine._share(*local_batch(model, workload, engine)[0]), engine.chunks[0]
    chunk(batch.tokens, batch.where)  # what is made once stays: tables of angles
    given = batch.tokens.clone()
    with LiveStorages() as live:
        loss = engine.pipeline.loss(chunk(given, batch.where), batch.labels)
    kept = live.alive() + given.untyped_storage().nbytes() - loss.untyped_storage().nbytes()
    del loss
    return kept
