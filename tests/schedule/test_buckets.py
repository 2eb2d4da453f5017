"""Buckets hold every gradient once, grouped by treatment, in the order in which backward makes them."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.schedule.buckets import (
    ALIGNMENT,
    BUCKET_BYTES_PER_RANK,
    MIN_BUCKET_BYTES,
    TAIL_PART,
    Bucket,
    bucket_bytes,
    plan_buckets,
    unit_of,
)
from meshwright.spec.layout import Layout
from meshwright.spec.precision import STATE_BYTES
from meshwright.spec.shards import Shard

LAYOUTS = st.sampled_from(
    [
        Layout(dp=dp, zero=zero, precision=precision)
        for dp in (2, 8, 20, 128)
        for zero in (0, 1, 2, 3)
        for precision in ("bf16", "fp64")
    ]
)


def aligned(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT


@st.composite
def shard_lists(draw: st.DrawFn) -> list[Shard]:
    """Small and large ones, so that some fill a bucket alone."""
    sizes = draw(st.lists(st.one_of(st.integers(1, 300), st.integers(1, 30 * 2**20)), min_size=1, max_size=20))
    treatments = st.sampled_from(
        [
            (True, None, False),
            (False, None, False),
            (False, "tp", True),
            (False, "tp", False),
            (True, "kv", True),
            (True, "embedding", True),
        ]
    )
    out = []
    for i, numel in enumerate(sizes):
        decay, replicas, partial = draw(treatments)
        out.append(Shard(f"layers.{i // 4}.p{i}", (numel,), (), replicas, partial, decay, False))  # type: ignore[arg-type]
    return out


@settings(max_examples=200, deadline=None)
@given(shard_lists(), LAYOUTS)
def test_buckets(shards: list[Shard], layout: Layout) -> None:
    buckets = plan_buckets(shards, layout)
    limit = bucket_bytes(layout.dp) // STATE_BYTES[layout.precision].gradient

    def treatment(of: Bucket | Shard) -> tuple[object, ...]:
        name = of.shards[0].name if isinstance(of, Bucket) else of.name
        unit = unit_of(name) if layout.zero == 3 and of.decay else None
        return unit, of.decay, of.replicas, of.partial

    assert sorted(s.name for bucket in buckets for s in bucket.shards) == sorted(s.name for s in shards), "every shard once"
    for bucket in buckets:
        assert {treatment(s) for s in bucket.shards} == {treatment(bucket)}
        assert bucket.unit == treatment(bucket)[0]
        ends = [offset + s.numel for offset, s in zip(bucket.offsets, bucket.shards, strict=True)]
        assert all(offset % ALIGNMENT == 0 for offset in bucket.offsets)
        assert bucket.offsets[0] == 0
        gaps = [start - end for end, start in zip(ends, bucket.offsets[1:], strict=False)]
        assert all(0 <= gap < ALIGNMENT for gap in gaps), "disjoint, without holes"
        assert bucket.cuts == layout.state_shards
        assert bucket.numel % bucket.cuts == 0
        assert 0 <= bucket.numel - ends[-1] < ALIGNMENT + bucket.cuts, "room for all, and no more"
        assert sum(s.stop - s.start for s in bucket.gaps) == bucket.numel - sum(s.numel for s in bucket.shards)
        assert bucket.unit or ends[-1] <= limit or len(bucket.shards) == 1

    for kind in {treatment(bucket) for bucket in buckets}:
        its = [b for b in buckets if treatment(b) == kind]
        order = [s for s in reversed(shards) if treatment(s) == kind]
        assert [s for b in its for s in b.shards] == order, "the last layer's gradients are ready first"
        if kind[0] is not None:
            assert len(its) == 1, "a unit is gathered at once"
            continue
        for one, other in pairwise(its[:-1]):
            together = sum(aligned(s.numel) for s in one.shards) + other.shards[0].numel
            assert together > limit, "a bucket is closed only when the next shard does not fit"
        last = its[-1]
        assert len(last.shards) == 1 or sum(aligned(s.numel) for s in last.shards) <= limit // TAIL_PART, (
            "nothing hides the last"
        )


def test_buckets_grow_with_the_group() -> None:
    assert bucket_bytes(1) == bucket_bytes(8) == MIN_BUCKET_BYTES
    assert bucket_bytes(128) == 128 * BUCKET_BYTES_PER_RANK
