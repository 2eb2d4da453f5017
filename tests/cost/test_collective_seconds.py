"""Seconds of a collective."""

from __future__ import annotations

from math import log

import pytest
from cost_cases import H100, times, with_measured
from hypothesis import assume, given
from hypothesis import strategies as st

from meshwright.cost.ops import Collective
from meshwright.spec.catalogue import load_accelerator, load_cluster
from meshwright.spec.cluster import Cluster, CollectivePoint, Measured
from meshwright.spec.errors import UserError
from meshwright.spec.huggingface import load_model

SWITCHED = st.sampled_from(("h100-superpod", "a100-superpod", "gb200-nvl72", "aws-p5", "h100-roce-rail", "local"))
RING = st.sampled_from(("all_reduce", "all_gather", "reduce_scatter"))
BYTES = st.integers(1, 10**10)


@given(
    SWITCHED,
    st.sampled_from(("all_reduce", "all_gather", "reduce_scatter", "send")),
    st.integers(2, 64),
    st.sampled_from((1, 2, 8)),
    BYTES,
    BYTES,
)
def test_more_bytes_never_take_less_time(cluster: str, op: str, n: int, stride: int, one: int, other: int) -> None:
    t = times(load_cluster(cluster))
    less, more = sorted((one, other))
    assert t.seconds(Collective("tp", op, n, stride, less)) <= t.seconds(Collective("tp", op, n, stride, more))  # type: ignore[arg-type]


@given(SWITCHED, RING, st.integers(2, 128), st.integers(2, 128), st.sampled_from((1, 2, 8)), BYTES)
def test_more_ranks_never_take_less_time(cluster: str, op: str, one: int, other: int, stride: int, nbytes: int) -> None:
    """But for an all-reduce that the switch sums: 5 ranks of 8 are quicker than 4, which it leaves to the ring."""
    loaded = load_cluster(cluster)
    assume(op != "all_reduce" or not loaded.accelerator.scale_up.sums_in_switch)
    t = times(loaded)
    fewer, more = sorted((one, other))
    assert t.seconds(Collective("tp", op, fewer, stride, nbytes)) <= t.seconds(
        Collective("tp", op, more, stride, nbytes)
    ) * (1 + 1e-12)  # type: ignore[arg-type]


@given(SWITCHED, st.sampled_from(("all_reduce", "all_gather", "reduce_scatter", "send")), st.integers(2, 8), BYTES)
def test_the_network_is_slower_than_scale_up(cluster: str, op: str, n: int, nbytes: int) -> None:
    loaded = load_cluster(cluster)
    t, domain = times(loaded), loaded.fabric.domain
    if loaded.node.nics:
        inside, across = (Collective("tp", op, n, stride, nbytes) for stride in (1, domain))  # type: ignore[arg-type]
        assert (t.link(inside), t.link(across)) == ("scale-up" if n <= domain else "network", "network")
        assert t.seconds(inside) < t.seconds(across)


def test_a_large_all_reduce_by_hand() -> None:
    """2 (n - 1) / n x S over the ring's rate: 370.8 GB/s inside a DGX H100, 0.97 x 50 GB/s of a rank's own NIC between nodes.
    Inside, each rank also copies its own n-th part at about twice that rate, and the switch sums an all-reduce of 8."""
    t = times(H100)
    inside = 0.98 * 370.8e9
    gathered, reduced = (Collective("tp", op, 8, 1, 10**10) for op in ("all_gather", "all_reduce"))  # type: ignore[arg-type]
    assert t.seconds(gathered) == pytest.approx((7 / 8 + 0.49 / 8) * 1e10 / inside, rel=0.01)
    assert t.seconds(reduced) == pytest.approx((2 * 7 / 8 + 0.49 / 8) * 1e10 / (1.3 * 370.8e9), rel=0.01)
    four = Collective("tp", "all_reduce", 4, 1, 10**10)
    assert t.seconds(four) == pytest.approx((2 * 3 / 4 + 0.49 / 4) * 1e10 / inside, rel=0.01)
    assert t.seconds(Collective("dp", "all_reduce", 16, 8, 10**10)) == pytest.approx(2 * 15 / 16 * 1e10 / 48.5e9, rel=0.01)
    assert t.seconds(Collective("dp", "all_gather", 16, 8, 10**10)) == pytest.approx(15 / 16 * 1e10 / 48.5e9, rel=0.01)
    # Eight members in a node share its eight NICs: of a ring the scale-up links are the narrower, of a sum in each node's switch those.
    assert t.seconds(Collective("dp", "all_gather", 64, 1, 10**10)) == pytest.approx(63 / 64 * 1e10 / 370.8e9, rel=0.04)
    assert t.seconds(Collective("dp", "all_reduce", 64, 1, 10**10)) == pytest.approx(
        2 * 63 / 64 * 1e10 / (8 * 48.5e9), rel=0.01
    )
    # Two nodes only exchange, so that the switches are the narrower.
    two = Collective("dp", "all_reduce", 16, 1, 10**10)
    assert t.seconds(two) == pytest.approx(2 * 15 / 16 * 1e10 / (1.3 * 370.8e9), rel=0.01)
    # Of few bytes over many nodes, a tree waits for their logarithm and PAT for less than a ring's steps.
    for op, way in (("all_reduce", "tree"), ("all_gather", "pat")):
        small = Collective("dp", op, 512, 8, 2**20)  # type: ignore[arg-type]
        assert t.algorithm(small) == way
        assert t.algorithm(small._replace(bytes=2**36)) == "ring"
    assert t.seconds(Collective("dp", "all_reduce", 512, 8, 2**20)) == pytest.approx(
        14e-6 + 2 * 9 * 8.5e-6 + 2 * 2**20 / (0.78 * 48.5e9), rel=0.01
    )


def test_rings_of_cards_behind_several_sockets_have_the_rates_that_were_measured() -> None:
    """From the catalogue by ranks; between them a straight line in log-log."""
    l40s = load_cluster("h100-superpod").model_copy(update={"accelerator": load_accelerator("l40s")})
    for ranks, rate in ((2, 19.6e9), (4, 4.8e9), (8, 1.5e9), (6, 4.8e9 * (1.5 / 4.8) ** (log(6 / 4) / log(2)))):
        seconds = times(l40s).seconds(Collective("tp", "all_gather", ranks, 1, 10**10))
        assert seconds == pytest.approx((ranks - 1) / ranks * 1e10 / rate, rel=1e-3)


def test_a_pair_on_a_mesh_has_one_link_and_no_call_is_quicker_than_its_floor() -> None:
    t = times(load_cluster("mi300x-roce"))
    assert t.seconds(Collective("tp", "all_reduce", 2, 1, 10**10)) == pytest.approx(1e10 / (0.98 * 0.74 * 64e9), rel=0.01)
    a100 = times(load_cluster("a100-superpod"))
    least = [x.seconds(Collective("tp", "all_reduce", 2, 1, 1)) for x in (a100, times(H100))]
    assert least == pytest.approx([8.05e-6 + 2 * 1.17e-6, 0.65 * (8.05e-6 + 2 * 1.17e-6)], rel=1e-4)
    assert times(H100).seconds(Collective("dp", "all_reduce", 2, 8, 1)) == 62e-6


def measured_at(cluster: Cluster, *ranks: int) -> Cluster:
    """10 us and 100 GB/s whatever the group, for messages of 1 kB, 1 MB and 100 MB."""
    points = tuple(
        CollectivePoint(op=op, ranks=n, bytes=nbytes, seconds=1e-5 + nbytes / 1e11)  # type: ignore[arg-type]
        for op in ("all_reduce", "p2p")
        for n in ranks
        for nbytes in (10**3, 10**6, 10**8)
    )
    return with_measured(cluster, Measured(source="my bench", collectives=points))


def test_measured_points_are_used_where_there_are_any() -> None:
    t = times(measured_at(H100, 2, 8))
    for n in (2, 8):
        for nbytes in (10**3, 10**6, 10**8):
            assert t.seconds(Collective("tp", "all_reduce", n, 1, nbytes)) == pytest.approx(1e-5 + nbytes / 1e11)
    assert t.seconds(Collective("pp", "send", 2, 1, 10**6)) == pytest.approx(2e-5)
    between = t.seconds(Collective("tp", "all_reduce", 8, 1, 10**7))
    assert 2e-5 < between < 1e-5 + 1e-3
    assert t.seconds(Collective("tp", "all_reduce", 8, 1, 10**9)) == pytest.approx(10 * (1e-5 + 1e-3)), (
        "beyond the largest: its rate"
    )
    assert t.seconds(Collective("tp", "all_reduce", 8, 1, 1)) == pytest.approx(1e-5 + 1e-8), (
        "below the smallest: its latency"
    )
    gather = Collective("tp", "all_gather", 8, 1, 10**6)
    assert t.seconds(gather) == times(H100).seconds(gather), "not measured"
    assert t.evidence == "measured: my bench"
    assert "formula" in times(H100).evidence


@given(st.integers(2, 8), st.integers(2, 8), BYTES)
def test_between_measured_group_sizes_more_ranks_never_take_less_time(one: int, other: int, nbytes: int) -> None:
    t = times(measured_at(H100, 2, 8))
    fewer, more = sorted((one, other))
    assert t.seconds(Collective("tp", "all_reduce", fewer, 1, nbytes)) <= t.seconds(
        Collective("tp", "all_reduce", more, 1, nbytes)
    ) * (1 + 1e-9)


@pytest.mark.parametrize("op", ["all_reduce", "send"])
def test_what_was_measured_inside_a_node_says_nothing_of_the_network(op: str) -> None:
    across = Collective("dp", op, 8, 8, 10**8)  # type: ignore[arg-type]
    assert times(measured_at(H100, 2, 8)).seconds(across) == times(H100).seconds(across)


def test_a_point_of_no_bytes_is_the_latency() -> None:
    points = [CollectivePoint(op="all_reduce", ranks=8, bytes=n, seconds=t) for n, t in ((0, 1e-5), (10**6, 1e-4))]
    t = times(with_measured(H100, Measured(source="x", collectives=tuple(points))))
    assert t.seconds(Collective("tp", "all_reduce", 8, 1, 1)) == pytest.approx(1e-5)
    assert 1e-5 < t.seconds(Collective("tp", "all_reduce", 8, 1, 10**3)) < 1e-4


def test_a_group_beyond_the_last_link_is_refused() -> None:
    """A domain of 8 without NICs: sixteen ranks have nothing to meet over."""
    fabric = H100.fabric.model_copy(update={"kind": "none", "transport": "none"})
    alone = H100.model_copy(
        update={"node": H100.node.model_copy(update={"nics": 0, "nic_bandwidth": 0.0}), "fabric": fabric}
    )
    with pytest.raises(UserError, match=r"h100-superpod has no NICs.*16 ranks of dp.*domain of 8"):
        times(alone).seconds(Collective("dp", "all_reduce", 16, 1, 100))


LLAMA_70B = load_model("llama-3-70b")
