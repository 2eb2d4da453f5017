"""What a dry run has seen, without torch: sections of a step, their events, and folds over them.

Memory is counted as live bytes: what storages hold from the operator that makes them until their last reference goes. What an allocator
rounds up, keeps or cannot use for fragmentation is not in it, nor is the inside of a kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from meshwright.schedule.actions import Action
from meshwright.spec.layout import Layout
from meshwright.spec.workload import Workload

Category = Literal[
    "parameters", "gradients", "optimizer", "buffers", "data", "boundary", "activations", "logits", "temporary"
]
CATEGORIES: tuple[Category, ...] = (
    "parameters", "gradients", "optimizer", "buffers", "data", "boundary", "activations", "logits", "temporary",
)  # fmt: skip
"""Of storages:

buffers      flat tensors in which parameters are brought or gradients pass to be reduced, tables of angles, counters of experts
data         token ids and labels
boundary     hidden states and their gradients, received or to be sent
activations  made by a forward and there when it is over, the softmax of the logits among them; and, of a split backward, what its second
             half needs of the first
temporary    gone when the forward, the backward or the update that made them is over
"""


@dataclass(slots=True, eq=False)
class Storage:
    """A piece of memory. `path`: the module that made it; `section`: the number of the section in which it was made."""

    nbytes: int
    category: Category
    path: str
    section: int
    dtype: str = ""
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """A storage comes (sign +1) or goes (-1)."""

    storage: Storage
    sign: int


@dataclass(frozen=True, slots=True)
class Sent:
    """One call of a collective, as the engine's ledger books it.

    `group`: which of the mesh's groups; `peer`: of a send, the index in the group that it goes to; `number`: of a call that is not
    waited for at once, by which `Waited` knows it.
    """

    axis: str
    op: str
    group_size: int
    nbytes: int
    path: str
    group: str = ""
    peer: int = -1
    number: int = 0


@dataclass(frozen=True, slots=True)
class Received:
    """A receive is posted."""

    axis: str
    nbytes: int
    path: str
    group: str
    peer: int
    number: int


@dataclass(frozen=True, slots=True)
class Waited:
    """What comes after needs the call `number`."""

    number: int


@dataclass(frozen=True, slots=True)
class Product:
    """Matrix products: `groups` of (m x k) by (k x n). `backward`: made by a backward."""

    path: str
    m: int
    n: int
    k: int
    groups: int = 1
    backward: bool = False
    op: str = "mm"

    @property
    def flops(self) -> float:
        return 2.0 * self.groups * self.m * self.n * self.k


@dataclass(frozen=True, slots=True)
class Attended:
    """Fused attention of [batch, heads, queries] over so many keys of `kv_heads`. `mask`: "" where every query sees every key, "causal",
    or "given" where there is a tensor that says which."""

    path: str
    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    backward: bool
    kv_heads: int
    mask: str

    @property
    def flops(self) -> float:
        """Two products forward, five backward (FlashAttention-2, arXiv 2307.08691), of half the pairs where they are causal. Under a
        mask that is given, of all pairs."""
        pairs = self.queries * (self.keys - (self.queries - 1) / 2) if self.mask == "causal" else self.queries * self.keys
        widths = 3 * self.head_dim + 2 * self.value_dim if self.backward else self.head_dim + self.value_dim
        return 2.0 * self.batch * self.heads * pairs * widths

    @property
    def elements(self) -> int:
        """Read and written: queries, keys, values and outputs; backward, their gradients too."""
        queries = self.heads * self.queries * (self.head_dim + self.value_dim)
        keys = self.kv_heads * self.keys * (self.head_dim + self.value_dim)
        return self.batch * (queries + keys) * (2 if self.backward else 1)


Event = Change | Sent | Received | Waited | Product | Attended


@dataclass(eq=False)
class Work:
    """Events in order: what one action does. Actions on micro-batches that are alike share one."""

    events: list[Event] = field(default_factory=list)

    @cached_property
    def net(self) -> Counter[Storage]:
        """By storage, come less gone; not those that came and went."""
        out: Counter[Storage] = Counter()
        for change in self.changes:
            out[change.storage] += change.sign
        return Counter({storage: sign for storage, sign in out.items() if sign})

    @cached_property
    def grown(self) -> int:
        """Bytes more at the end than at the beginning."""
        return sum(change.sign * change.storage.nbytes for change in self.changes)

    @cached_property
    def most(self) -> tuple[int, int]:
        """The most bytes above the beginning at any moment, and how many events it takes to get there."""
        here = best = at = 0
        for number, event in enumerate(self.events, 1):
            if isinstance(event, Change):
                here += event.sign * event.storage.nbytes
                if here > best:
                    best, at = here, number
        return best, at

    @property
    def changes(self) -> Iterator[Change]:
        return (event for event in self.events if isinstance(event, Change))


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """A part of the step: an action of the schedule, or what comes before, between and after. `work` may be another section's too;
    `own` is what happened to tensors that go from action to action."""

    name: str
    work: Work
    own: Work
    action: Action | None = None
    replayed: bool = False

    @property
    def parts(self) -> tuple[Work, Work]:
        return self.work, self.own


@dataclass(frozen=True, slots=True)
class Peak:
    """The moment at which most bytes are live."""

    nbytes: int
    section: str
    path: str
    """Of the module that made the storage whose coming made the peak."""
    categories: dict[str, int]
    largest: tuple[tuple[Storage, int], ...]
    """A storage, and how many like it are live; largest together first."""


@dataclass(frozen=True)
class StageTrace:
    """One step of one rank."""

    stage: int
    rank: int
    sections: tuple[Section, ...]

    @cached_property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """Live bytes of each section: the most in it, and at its end."""
        out, here = [], 0
        for section in self.sections:
            most = here
            for part in section.parts:
                most = max(most, here + part.most[0])
                here += part.grown
            out.append((most, here))
        return tuple(out)

    @cached_property
    def peak_bytes(self) -> int:
        return max(most for most, _ in self.levels)

    @cached_property
    def peak(self) -> Peak:
        at = next(i for i, (most, _) in enumerate(self.levels) if most == self.peak_bytes)
        live: Counter[Storage] = Counter()
        for section in self.sections[:at]:
            for part in section.parts:
                live.update(part.net)
        first, second = self.sections[at].parts
        in_first = self.peak_bytes == (self.levels[at - 1][1] if at else 0) + first.most[0]
        if not in_first:
            live.update(first.net)
        part = first if in_first else second
        path = ""
        for event in part.events[: part.most[1]]:
            if isinstance(event, Change):
                live[event.storage] += event.sign
                path = event.storage.path
        return Peak(self.peak_bytes, self.sections[at].name, path, _by_category(live), _largest(live))

    def through_time(self) -> Iterator[tuple[Section, dict[str, int]]]:
        """Live bytes by category at the fullest moment of each section."""
        here: Counter[str] = Counter()
        for section in self.sections:
            best, most, total = here.copy(), sum(here.values()), sum(here.values())
            for part in section.parts:
                if total + part.most[0] > most:
                    most, best = total + part.most[0], here.copy()
                    for event in part.events[: part.most[1]]:
                        if isinstance(event, Change):
                            best[event.storage.category] += event.sign * event.storage.nbytes
                for storage, sign in part.net.items():
                    here[storage.category] += sign * storage.nbytes
                total += part.grown
            yield section, {name: best[name] for name in CATEGORIES if best[name]}

    @cached_property
    def sent(self) -> tuple[tuple[str, str, int, int, int], ...]:
        """(axis, operation, group size, calls, bytes), sorted."""
        calls: Counter[tuple[str, str, int]] = Counter()
        total: Counter[tuple[str, str, int]] = Counter()
        for part, times in self._times.items():
            for event in part.events:
                if isinstance(event, Sent):
                    key = (event.axis, event.op, event.group_size)
                    calls[key] += times
                    total[key] += times * event.nbytes
        return tuple((*key, calls[key], total[key]) for key in sorted(calls))

    @cached_property
    def products(self) -> Counter[Product | Attended]:
        """How often each is computed in the step."""
        out: Counter[Product | Attended] = Counter()
        for part, times in self._times.items():
            for event in part.events:
                if isinstance(event, Product | Attended):
                    out[event] += times
        return out

    @property
    def flops(self) -> float:
        """Of matrix products outside of attention."""
        return sum(product.flops * times for product, times in self.products.items() if isinstance(product, Product))

    @cached_property
    def _times(self) -> Counter[Work]:
        return Counter(part for section in self.sections for part in section.parts)


@dataclass(frozen=True)
class Trace:
    """Steps of some ranks of one layout."""

    model: str
    layout: Layout
    workload: Workload
    stages: tuple[StageTrace, ...]

    @property
    def fullest(self) -> StageTrace:
        return max(self.stages, key=lambda stage: stage.peak_bytes)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "model": self.model,
            "layout": str(self.layout),
            "world": self.layout.world,
            "seq": self.workload.seq,
            "global_batch": self.workload.global_batch,
            "stages": [_stage_dict(stage) for stage in self.stages],
        }


LARGEST = 20
"""Kinds of live tensors in `--json`."""


def _stage_dict(stage: StageTrace) -> dict[str, Any]:
    peak = stage.peak
    return {
        "stage": stage.stage,
        "rank": stage.rank,
        "peak_bytes": peak.nbytes,
        "peak_at": {"section": peak.section, "path": peak.path},
        "categories": peak.categories,
        "largest": [
            {
                "count": n,
                "bytes": s.nbytes,
                "category": s.category,
                "path": s.path,
                "dtype": s.dtype,
                "shape": list(s.shape),
            }
            for s, n in peak.largest[:LARGEST]
        ],
        "collectives": [dict(zip(("axis", "op", "group_size", "count", "bytes"), row, strict=True)) for row in stage.sent],
        "matmul_flops": stage.flops,
        "memory": [
            {"section": section.name, "replayed": section.replayed, "bytes": held} for section, held in stage.through_time()
        ],
    }


def _by_category(live: Counter[Storage]) -> dict[str, int]:
    out: Counter[str] = Counter()
    for storage, count in live.items():
        out[storage.category] += count * storage.nbytes
    return {name: out[name] for name in CATEGORIES if out[name]}


def _largest(live: Counter[Storage]) -> tuple[tuple[Storage, int], ...]:
    alike: dict[tuple[object, ...], tuple[Storage, int]] = {}
    for storage, count in live.items():
        key = (storage.category, storage.path, storage.nbytes, storage.dtype, storage.shape)
        alike[key] = storage, alike[key][1] + count if key in alike else count
    held = [(storage, count) for storage, count in alike.values() if count > 0]
    return tuple(sorted(held, key=lambda pair: -pair[1] * pair[0].nbytes))
