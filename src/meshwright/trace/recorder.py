"""Writes down what operators do: storages that come and go, matrix products, and what the ledger is told.

PyTorch's own memory trackers hold on to more than the engine does and are slow; here a storage is watched by a weak reference, so what is
counted ends when the last tensor on it goes, wherever that was kept (autograd's graph included).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from meshwright.schedule.actions import Action
from meshwright.trace.paths import Paths
from meshwright.trace.result import Attended, Category, Change, Event, Product, Section, Storage, Work

_aten = torch.ops.aten
_PLAIN = {_aten.mm: 0, _aten.addmm: 1, _aten.addmm_: 1}
"""Matrix products, and the place of their first factor."""
_BATCHED = {_aten.bmm: 0, _aten.baddbmm: 1, _aten.baddbmm_: 1}
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: (0, 4, False),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (1, 7, True),
}
"""And the places of its queries and of whether it is causal; whether it is a backward."""


class Recorder(TorchDispatchMode):
    """Inside, every operator is recorded in the section that is open. To be entered after a FakeTensorMode, so that operators come here
    first."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = Paths()
        self.sections: list[Section] = []
        self.staying: set[Storage] = set()
        self._seen: dict[int, tuple[weakref.ref[Any], Storage]] = {}
        self._live: set[Storage] = set()
        self._travels: set[Storage] = set()
        self._silent = False
        self.posted = 0
        """Calls that are waited for later than they are made are numbered."""
        self._open("before")

    # --- sections

    def start(
        self, name: str, action: Action | None = None, category: Category = "temporary", work: Work | None = None
    ) -> Work:
        """End the open section and open another: what is made in it and outlives it is of `category`. Returns its work, which another
        section may be given as `work`: it then does the same again, and only the tensors that go from action to action are live."""
        self.stop()
        self._open(name, action, category, work)
        return self._work

    @contextmanager
    def section(self, name: str, action: Action | None = None, category: Category = "temporary") -> Iterator[Work]:
        """`start`, and after it what lies between two sections."""
        yield self.start(name, action, category)
        self.start("between")

    def stop(self) -> None:
        for storage in self._made:
            if storage.category == "temporary" and storage in self._live:
                storage.category = self._category
        if self._work.events or self._own.events:
            self.sections.append(Section(self._name, self._work, self._own, self._action, self._is_replayed))
        self._open("between")

    def _open(
        self, name: str, action: Action | None = None, category: Category = "temporary", work: Work | None = None
    ) -> None:
        self._name, self._action, self._category, self._is_replayed = name, action, category, work is not None
        self._work, self._own = work or Work(), Work()
        self._made: list[Storage] = []

    def travels(self, tensor: Tensor) -> Storage | None:
        """From here on the end of `tensor`'s storage is no part of an action's work, because another action may let go of it. Returns
        the storage, if it was made in the open section."""
        storage = self.storage(tensor)
        self._travels.add(storage)
        if storage.section != len(self.sections):
            return None
        storage.category = "boundary"
        return storage

    def stand_in(self, storage: Storage, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor for what a replayed action hands on; its coming is in the action's work, its end is seen."""
        self._silent = True
        try:
            tensor = torch.empty(shape, dtype=dtype)
        finally:
            self._silent = False
        self._travels.add(storage)
        self._watch(tensor.untyped_storage(), storage)
        return tensor

    def classify(self, tensor: Tensor, category: Category) -> None:
        self.storage(tensor).category = category

    def adopt(self, tensor: Tensor) -> None:
        """Watch what was made before."""
        self._came(tensor)

    def stays(self, tensor: Tensor) -> None:
        """Nobody lets go of `tensor`'s storage, in this step or later."""
        self.staying.add(self.storage(tensor))

    def storage(self, tensor: Tensor) -> Storage:
        return self._seen[tensor.untyped_storage()._cdata][1]

    def is_live(self, storage: Storage) -> bool:
        return storage in self._live

    @property
    def live(self) -> list[Storage]:
        """In the order in which they came."""
        return [storage for _, storage in self._seen.values()]

    # --- events

    def add(self, event: Event) -> None:
        assert not self._is_replayed, "what is inside of an action is replayed, not done"
        self._work.events.append(event)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._silent:
            packet = func.overloadpacket
            if packet is _aten.native_layer_norm:
                out = (out[0], *map(_as_gpus_keep, out[1:]))
            if packet in _PLAIN or packet in _BATCHED or packet in _ATTENTION:
                self._multiplied(packet, args, kwargs or {})
            self._came(out)
        return out

    def _came(self, out: Any) -> None:
        if isinstance(out, Tensor):
            storage = out.untyped_storage()
            if storage._cdata not in self._seen and out.device.type != "meta":
                made = Storage(
                    storage.nbytes(), "temporary", self.paths.here, len(self.sections), str(out.dtype)[6:], tuple(out.shape)
                )
                self._made.append(made)
                self._watch(storage, made)
                self.add(Change(made, +1))
        elif isinstance(out, tuple | list):
            for each in out:
                self._came(each)

    def _watch(self, storage: Any, known: Storage) -> None:
        key = storage._cdata
        self._seen[key] = weakref.ref(storage, partial(self._went, key)), known
        self._live.add(known)

    def _went(self, key: int, _: Any) -> None:
        storage = self._seen.pop(key)[1]
        self._live.discard(storage)
        if storage in self._travels:
            self._own.events.append(Change(storage, -1))
        else:
            self.add(Change(storage, -1))

    def _multiplied(self, packet: Any, args: Any, kwargs: Any) -> None:
        path, backward = self.paths.here, self.paths.in_backward
        if packet in _ATTENTION:
            at, causal, is_backward = _ATTENTION[packet]
            q, k, v = args[at : at + 3]
            is_causal = args[causal] if len(args) > causal else kwargs.get("is_causal", False)
            mask = "causal" if is_causal else "given" if kwargs.get("attn_mask") is not None else ""
            sizes = q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]
            self.add(Attended(path, *sizes, is_backward, k.shape[1], mask))
            return
        batched = packet in _BATCHED
        at = (_BATCHED if batched else _PLAIN)[packet]
        a, b = args[at], args[at + 1]
        groups = a.shape[0] if batched else 1
        self.add(Product(path, a.shape[-2], b.shape[-1], a.shape[-1], groups, backward, packet.__name__.rstrip("_")))


def _as_gpus_keep(statistics: Tensor) -> Tensor:
    """Of a LayerNorm in 16 bits, whose kernel for CPUs keeps them in 16 bits too."""
    return statistics.to(torch.promote_types(statistics.dtype, torch.float32))


@contextmanager
def without_collector() -> Iterator[None]:
    """Cycles are cleared before, and not at moments that depend on how much Python made since the last time."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
