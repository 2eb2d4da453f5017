"""What offload keeps away from a rank, what it moves in a step, and the buffers through which that passes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from meshwright.cost.program import Program
from meshwright.schedule.buckets import AHEAD, IN_TURN, Bucket
from meshwright.spec.cluster import Cluster
from meshwright.spec.layout import Layout
from meshwright.spec.precision import StateBytes

PLACES = {"cpu": "host", "file": "file"}
"""Where the bytes are, by the layout's `offload_to`."""


@dataclass(frozen=True, slots=True)
class Away:
    """Bytes of a rank. All are 0 without offload."""

    optimizer: int = 0
    """Kept away: master weights and moments."""
    parameters: int = 0
    """Kept away under offload:all."""
    working: int = 0
    """Held on the device for what passes through it."""
    update_read: int = 0
    """Read in an optimizer step."""
    update_written: int = 0
    first_read: int = 0
    """Of the update: before the first bucket is there, nothing can be stepped."""
    last_written: int = 0
    forward_read: int = 0
    """Read for the forward of a micro-batch."""
    backward_read: int = 0

    @property
    def kept(self) -> int:
        return self.optimizer + self.parameters

    def read(self, micro_batches: int) -> int:
        """In a step."""
        return self.update_read + micro_batches * (self.forward_read + self.backward_read)

    @property
    def written(self) -> int:
        """In a step."""
        return self.update_written


def away(program: Program, layout: Layout) -> Away:
    """See `parallel/offload.py`: the optimizer's state of every bucket is read and written once a step; parameters are read for every
    use, written after the update, and read for it where they are their own master."""
    if layout.offload == "none":
        return Away()
    buckets = program.buckets
    state = [_state(b, layout) for b in buckets]
    parameters = [_parameters(b, layout) for b in buckets]
    read = [s + (p if _is_master(b, layout) else 0) for b, s, p in zip(buckets, state, parameters, strict=True)]
    units: dict[str | None, int] = {}
    for bucket, nbytes in zip(buckets, parameters, strict=True):
        units[bucket.unit] = units.get(bucket.unit, 0) + nbytes
    return Away(
        optimizer=sum(state),
        parameters=sum(parameters),
        working=IN_TURN * max(s + p for s, p in zip(state, parameters, strict=True)) + AHEAD * max(units.values()),
        update_read=sum(read),
        update_written=sum(state) + sum(parameters),
        first_read=read[0],
        last_written=state[-1] + parameters[-1],
        forward_read=_all_parameters(program.brought[0], layout),
        backward_read=_all_parameters(program.brought[1], layout),
    )


def keeps_parameters_away(bucket: Bucket, layout: Layout) -> bool:
    """Vectors and routers stay, as they do under ZeRO-3."""
    return layout.offload == "all" and bucket.unit is not None


@dataclass(frozen=True, slots=True)
class Links:
    """How fast a rank's offloaded state comes and goes, in bytes/s. None: not known."""

    host: float | None
    """In each direction."""
    file: float | None
    """Of this rank's share, both directions together; also None where no files are used."""
    duplex: bool
    """Whether both directions of `host` run at once: not where the rank's memory is the host's."""
    missing: tuple[str, ...]
    """What is not known and should be: its time is left out."""

    @property
    def evidence(self) -> str:
        if self.missing:
            return f"a lower bound: the catalogue has no {' and no '.join(self.missing)}, whose time is left out"
        return "formula: bytes over the rate of the link"

    def seconds(self, read: int, written: int) -> float:
        """Files are read and written while other bytes pass between the host and the device."""
        on_link = (max(read, written) if self.duplex else read + written) / self.host if self.host else 0.0
        return max(on_link, (read + written) / self.file if self.file else 0.0)


@dataclass(frozen=True, slots=True)
class OffloadCost:
    """What offload costs the rank that offloads most: bytes kept on the "host" or in a "file", and moved in a step."""

    where: str
    stage: int
    kept_bytes: int
    read_bytes: int
    written_bytes: int
    time_s: float
    """Of all that is moved in a step."""
    exposed_s: float
    """The part that nothing hides."""


def offload_links(cluster: Cluster, layout: Layout, memory_bandwidth: float) -> Links:
    """`memory_bandwidth`: of a rank while all compute; a copy in the host's memory reads and writes each byte."""
    own, node, missing = cluster.accelerator.host_bandwidth, cluster.node, []
    in_host = own is None and cluster.accelerator.scale_up.kind == "gloo"
    host = memory_bandwidth / 2 if in_host else own
    if host is None:
        missing.append(f"host_bandwidth of {cluster.accelerator.name}")
    file = None
    if layout.offload_to == "file":
        if node.file_bandwidth is None:
            missing.append(f"file_bandwidth of a node of {cluster.name}")
        else:
            file = node.file_bandwidth / min(layout.world, node.accelerators)
    return Links(host, file, not in_host, tuple(missing))


def host_room(cluster: Cluster, layout: Layout) -> float:
    """Bytes of the host's memory for each of its ranks; infinite where that is not known, or files take what is offloaded."""
    node = cluster.node
    if node.host_memory_bytes is None or layout.offload_to != "cpu":
        return float("inf")
    return node.host_memory_bytes / min(layout.world, node.accelerators)


def _state(bucket: Bucket, layout: Layout) -> int:
    return bucket.owned * StateBytes.of(layout, cast=bucket.is_cast).optimizer


def _parameters(bucket: Bucket, layout: Layout) -> int:
    if not keeps_parameters_away(bucket, layout):
        return 0
    return bucket.owned * StateBytes.of(layout, cast=bucket.is_cast).parameter


def _all_parameters(buckets: Iterable[Bucket], layout: Layout) -> int:
    return sum(_parameters(bucket, layout) for bucket in buckets)


def _is_master(bucket: Bucket, layout: Layout) -> bool:
    return StateBytes.of(layout, cast=bucket.is_cast).master == 0
