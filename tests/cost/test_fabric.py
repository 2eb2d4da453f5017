"""Links carry what algorithms say, what enters a switch leaves it, and nothing lost makes anything quicker."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright import api
from meshwright.cli.main import main
from meshwright.cost.collectives import Algorithm
from meshwright.cost.estimate import Estimator
from meshwright.cost.fabric.flows import load_collective
from meshwright.cost.fabric.graph import graphml, loaded_graph
from meshwright.cost.fabric.price import busy_seconds
from meshwright.cost.fabric.routes import Loads, Router
from meshwright.cost.fabric.spread import EVEN, adaptive, hashed, load_odds, max_load
from meshwright.cost.fabric.topology import Topology, place
from meshwright.cost.fabric.traffic import by_axis, step_sends
from meshwright.cost.fabric.whatif import Wired, rank_orders, tolerated, what_if
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.cluster import Cluster
from meshwright.spec.errors import UserError
from meshwright.spec.huggingface import load_model
from meshwright.spec.layout import Layout
from meshwright.spec.notation import parse_layout
from meshwright.spec.workload import Workload

H100 = load_cluster("h100-superpod")
SEVENTY: dict[str, Any] = {"model": "llama-3-70b", "cluster": "h100-superpod", "seq": 4096, "global_batch": 1280}


def cluster(*, nodes: int = 2, per_node: int = 2, base: Cluster = H100, **fabric: Any) -> Cluster:
    """Small nodes, each a domain with a NIC an accelerator, so many of them under a leaf."""
    return base.model_copy(
        update={
            "node": base.node.model_copy(update={"accelerators": per_node, "nics": per_node}),
            "fabric": base.fabric.model_copy(update={"domain": per_node, "unit_nodes": nodes, **fabric}),
        }
    )


def wired(given: Cluster, layout: str, model: str = "llama-3-8b", batch: int = 96, seq: int = 4096) -> Wired:
    return Wired(Estimator(load_model(model), given, Workload(seq, batch)), parse_layout(layout), EVEN)


def loads_of(
    given: Cluster, world: int, source: list[int], target: list[int], lost: tuple[int, int] | None = None
) -> Loads:
    placement = place(given, Layout(dp=world))
    loads = Loads(placement)
    Router(placement, lost).route(loads, np.array(source), np.array(target), 1.0)
    return loads


# --- what links there are


@pytest.mark.parametrize(
    ("nodes", "leaves", "spines", "cores"),
    [(31, 8, 4, 0), (63, 16, 8, 0), (127, 32, 16, 0), (256, 64, 32, 0), (512, 128, 128, 64), (1024, 256, 256, 128), (2048, 512, 512, 256)],
)  # fmt: skip
def test_switches_are_those_of_the_reference_architectures(nodes: int, leaves: int, spines: int, cores: int) -> None:
    """NVIDIA DGX SuperPOD: H100 up to 127 nodes, B200 up to 2,048."""
    t = Topology(H100, nodes)
    assert (t.leaves, t.spines, t.cores) == (leaves, spines, cores)


def test_domains_are_filled_with_whole_groups() -> None:
    rack = load_cluster("gb200-nvl72")
    assert list(place(rack, parse_layout("dp20 tp16:sp mb1")).slot[[63, 64]]) == [63, 72]
    assert list(place(rack, parse_layout("dp20 tp8:sp mb1")).slot[[71, 72]]) == [71, 72]


@pytest.mark.parametrize(("per_node", "domain"), [(8, 8), (3, 2), (4, 12), (8, 2)])
def test_shuffled_nodes_keep_their_ranks(per_node: int, domain: int) -> None:
    given, layout = cluster(per_node=per_node, domain=domain), Layout(dp=48)
    usual, shuffled = place(given, layout), place(given, layout, seed=3)
    assert len(set(shuffled.slot.tolist())) == 48
    assert shuffled.slot.tolist() != usual.slot.tolist()
    together = [[places.domain[a] == places.domain[a + 1] for a in range(47)] for places in (usual, shuffled)]
    assert together[0] == together[1]


# --- routes


def test_same_rail_takes_one_leaf_and_another_rail_a_neighbour_first() -> None:
    """Ranks 0, 1 on node 0 and 2, 3 on node 1: 0 to 2 leaves by NIC 0; 0 to 3 hops to accelerator 1 and leaves by NIC 1."""
    same, other = (loads_of(cluster(), 4, [0], [target]) for target in (2, 3))
    assert same.of["scale-up"].sum() == 0
    assert same.of["nic"].tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    assert other.of["scale-up"].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
    assert other.of["nic"].tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]
    assert same.of["leaf"].sum() == other.of["leaf"].sum() == 0


def test_without_nvlink_another_rail_is_reached_over_a_spine() -> None:
    loads = loads_of(cluster(base=load_cluster("mi300x-roce")), 4, [0], [3])
    assert loads.of["scale-up"].sum() == 0
    assert loads.of["nic"].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert loads.of["leaf"].tolist() == [[1, 0], [0, 1]]


def test_units_and_pods_are_left_over_spines_and_cores() -> None:
    """Units of one node, pods of two: node 0 to 1 over a spine, to 2 over the core as well."""
    given = cluster(nodes=1, pod_nodes=2)
    near, far = (loads_of(given, 8, [0], [target]) for target in (2, 4))
    assert near.of["leaf"][0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert near.of["leaf"][1].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert near.of["core"].sum() == 0
    assert far.of["core"].tolist() == [[1, 0], [0, 1]]


def test_leaf_spine_keeps_a_unit_under_one_leaf() -> None:
    given = cluster(kind="leaf-spine")
    inside, outside = (loads_of(given, 8, [0], [target]) for target in (3, 5))
    assert inside.of["scale-up"].sum() == inside.of["leaf"].sum() == 0
    assert outside.of["leaf"].tolist() == [[1, 0], [0, 1]]


def test_a_lost_nic_is_replaced_by_the_next_rail() -> None:
    """NIC 0 of node 0 is gone: 0 to 2 leaves by NIC 1 and changes rail over a spine; what 2 sends comes in by NIC 1 too."""
    out, back = (loads_of(cluster(), 4, [a], [b], lost=(0, 0)) for a, b in ((0, 2), (2, 0)))
    assert out.of["scale-up"].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
    assert out.of["nic"].tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]
    assert out.of["leaf"].tolist() == [[0, 1], [1, 0]]
    assert back.of["nic"].tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]
    assert back.of["scale-up"].tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


# --- algorithms, by hand


def collective(op: str, world: int, given: Cluster, algorithm: Algorithm = "ring") -> Loads:
    router = Router(place(given, Layout(dp=world)))
    return load_collective(router, op, algorithm, np.arange(world)[None, :], 120.0)


def test_ring_over_two_nodes_shares_the_nics() -> None:
    """All-reduce of 120 bytes over 4 ranks: 2 x 3/4 x 120 = 180 on every edge of a ring, 90 on each of two channels.

    Channel 0 is 0 1 2 3, channel 1 is 1 0 3 2. Of each, the edge inside a node loads scale-up links with 90, and the edge between nodes
    ends on the other rail: its first hop is a scale-up link to the accelerator beside that NIC. So every NIC sends 90 and every
    accelerator 90 + 90 over scale-up links.
    """
    loads = collective("all_reduce", 4, cluster())
    assert loads.of["nic"].tolist() == [[90] * 4] * 2
    assert loads.of["scale-up"].tolist() == [[180] * 4] * 2


def test_all_to_all_over_two_nodes_sends_half_outside() -> None:
    """120 bytes over 4 ranks: 30 to each. Inside, 30; to the same rail outside, 30; to the other rail, 30 by way of a neighbour."""
    loads = collective("all_to_all", 4, cluster())
    assert loads.of["nic"].tolist() == [[60] * 4] * 2
    assert loads.of["scale-up"].tolist() == [[60] * 4] * 2


def test_all_gather_inside_a_node_and_a_sum_in_its_switch() -> None:
    """All-gather of 120 bytes over 4 ranks: 3/4 x 120 on every link. Summed in the switch: 120 x (1 + 1/4) each way."""
    one = cluster(per_node=4)
    assert collective("all_gather", 4, one).of["scale-up"].tolist() == [[90] * 4] * 2
    assert collective("all_reduce", 4, one, "in-switch").of["scale-up"].tolist() == [[150] * 4] * 2


def test_a_tree_over_nodes_sends_each_ranks_part_along_its_rail() -> None:
    """Two nodes of two: each rank exchanges its half of 120 bytes with its like, 60 each way; inside, all 120 up and down a chain of two
    (2 x 1/2 x 120), or summed in the switch, 120 x (1 + 1/2). Four nodes of one: 2 x 3/4 x 120 on every NIC."""
    for algorithm, inside in (("tree", 120), ("switch-tree", 180)):
        loads = collective("all_reduce", 4, cluster(), algorithm)  # type: ignore[arg-type]
        assert loads.of["nic"].tolist() == [[60] * 4] * 2
        assert loads.of["scale-up"].tolist() == [[inside] * 4] * 2
    assert collective("all_reduce", 4, cluster(per_node=1), "tree").of["nic"].tolist() == [[180] * 4] * 2


def test_a_ring_over_uneven_parts_of_domains() -> None:
    """Domains of 2 under 3 ranks of one and 1 of another node: each channel still visits every rank once."""
    loads = collective("reduce_scatter", 3, cluster())
    edges = 2 / 3 * 120
    assert loads.of["nic"][0].sum() == pytest.approx(2 * edges)  # one edge to the second node, one back
    assert loads.of["nic"][0][2:].tolist() == pytest.approx([edges / 2, edges / 2])


# --- a step


LAYOUTS = st.sampled_from(
    [
        "dp4 tp2:sp pp2 mb1",
        "dp6 tp4 mb1",
        "dp3 tp2 pp4x2:interleaved mb1",
        "dp2 tp2:sp pp2 cp4:ring mb1",
        "dp4 cp4:ulysses mb1",
        "dp12:zero3x4 tp2 mb1",
        "tp8:sp dp4 mb1 order:dp-tp-cp-pp",
        "dp2 pp4x2:zb-v tp2:sp mb1",
    ]
)
FABRICS = st.builds(
    cluster,
    nodes=st.integers(1, 3),
    per_node=st.sampled_from([1, 2, 4]),
    base=st.sampled_from([H100, load_cluster("mi300x-roce")]),
    kind=st.sampled_from(["rail-optimised", "leaf-spine"]),
)


@settings(deadline=None, max_examples=40)
@given(FABRICS, LAYOUTS, st.one_of(st.none(), st.integers(0, 5)), st.booleans())
def test_what_enters_a_switch_leaves_it(given: Cluster, layout: str, seed: int | None, loses: bool) -> None:
    """On the graph: domains, NICs, leaves, spines and cores keep nothing, and every flow follows edges that exist."""
    if given.fabric.unit_nodes and given.fabric.unit_nodes > 1:
        given = given.model_copy(update={"fabric": given.fabric.model_copy(update={"pod_nodes": given.fabric.unit_nodes})})
    its = replace(wired(given, layout), seed=seed, lost=(0, 0) if loses and given.node.nics > 1 else None)
    graph = loaded_graph(its.placement.topology, by_axis(its.traffic), step=1.0)
    assert sum(nbytes for *_, nbytes in graph.edges(data="bytes")) > 0
    for name, kind in graph.nodes(data="kind"):
        if kind != "accelerator":
            entered = sum(nbytes for *_, nbytes in graph.in_edges(name, data="bytes"))
            left = sum(nbytes for *_, nbytes in graph.out_edges(name, data="bytes"))
            assert entered == pytest.approx(left, rel=1e-9, abs=1e-6), (name, kind)


@settings(deadline=None, max_examples=20)
@given(FABRICS, LAYOUTS)
def test_accelerators_send_what_the_algorithms_say(given: Cluster, layout: str) -> None:
    """Without hops on the way to another rail, first-hop bytes are those of rings, pairs and sends."""
    its = wired(given.model_copy(update={"fabric": given.fabric.model_copy(update={"kind": "leaf-spine"})}), layout)
    factor = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}
    expected = 0.0
    for sent in step_sends(its.estimator, its.layout):
        n, ranks = sent.kind.group_size, its.layout.world // its.layout.pp * len(sent.stages)
        if sent.kind.axis == "pp" and sent.kind.op == "all_reduce":
            ranks = its.layout.world // its.layout.pp * n
        each = (1 + 1 / n) if sent.kind.algorithm == "in-switch" else factor.get(sent.kind.op, n / (n - 1)) * (n - 1) / n
        here = max(1, min(n, its.estimator.cluster.fabric.domain // sent.kind.stride))
        if "tree" in sent.kind.algorithm and n % here == 0:  # over uneven parts of nodes, the links carry a ring
            nodes = n // here
            inside = 0.0 if here == 1 else 1 + 1 / here if sent.kind.algorithm == "switch-tree" else 2 * (here - 1) / here
            each = 2 * (nodes - 1) / nodes / here + inside
        expected += sent.bytes * each * ranks
    assert its.total.of["scale-up"][0].sum() + its.total.of["nic"][0].sum() == pytest.approx(expected)


@pytest.mark.parametrize(
    "layout", ["dp20 tp8:sp pp4 mb1", "dp20 tp16:sp pp2 mb1", "dp10:zero1 tp8:sp pp8x2:interleaved mb1"]
)
def test_a_fabric_that_holds_nothing_up_takes_the_estimators_time(layout: str) -> None:
    estimated = api.estimate(**SEVENTY, layout=layout).step_time_s
    its = wired(H100, layout, "llama-3-70b", 1280)
    assert its.step() == pytest.approx(estimated, rel=1e-9)


def test_a_405b_step_by_hand() -> None:
    """126 layers of 16,384 on pp16, 2,048 sequences on dp128: 16 micro-batches of 8,192 tokens.

    pp: every NIC sends 2 x 16 x 8192 / 8 x 16,384 x 2 bytes = 1.07 GB; dp: 127/128 x (4 + 2) bytes of a stage's 1/8.
    """
    its = wired(H100, "dp128:zero1 tp8:sp pp16 mb1", "llama-3-405b", 2048, 8192)
    axes = by_axis(its.traffic)
    assert axes["pp"].of["nic"].max() == pytest.approx(2 * 16 * 8192 / 8 * 16_384 * 2, rel=1e-6)
    layer = 2 * 16_384**2 + 2 * 16_384 * 1024 + 3 * 16_384 * 53_248
    assert axes["dp"].of["nic"].max() == pytest.approx(127 / 128 * 6 * 8 * layer / 8, rel=0.01)


def test_pods_of_llama_3() -> None:
    """24,576 accelerators in 8 pods of 3,072 at 1:7 (arXiv 2407.21783): a pod's way up is 3072 x 50 / 7 = 21.9 TB/s.

    With replicas of 128 in order, 128 flows leave a pod: 128 x 50 GB/s = 29 % of it. With nodes in any order 1 - 23/191 of all 3,072 do,
    and need 6.2 times what is there.
    """
    pods = H100.model_copy(update={"fabric": H100.fabric.model_copy(update={"pod_nodes": 384, "core_oversubscription": 7})})
    layout = "dp192:zero1 tp8:sp pp16 mb1 order:tp-cp-pp-dp"
    for seed, share, near in ((None, 128 * 7 / 3072, 0.01), (1, 7 * (1 - 23 / 191), 0.05)):
        its = replace(wired(pods, layout, "llama-3-405b", 3072, 8192), seed=seed)
        dp, capacity = by_axis(its.traffic)["dp"], its.links.capacities
        assert capacity["core"][0] == pytest.approx(21.94e12, rel=1e-3)
        busy = dp.of["core"].mean() / capacity["core"][0] / (dp.of["nic"].mean() / capacity["nic"][0])
        assert busy == pytest.approx(share, rel=near)


def test_a_large_all_reduce_is_summed_in_the_switch_and_a_small_one_is_not() -> None:
    """Of 134 MB, NVLS is the quicker on eight H100; of a few bytes, a ring of low latency (`cost/collectives.py`)."""
    its = wired(H100, "dp4 tp8 mb1", "llama-3-70b", batch=64, seq=8192)
    ways = {sent.kind.algorithm: sent.bytes for sent in its.sends if (sent.kind.axis, sent.kind.op) == ("tp", "all_reduce")}
    assert ways["in-switch"] > ways["ring"]
    sum_in_switch = next(loads for kind, loads in its.traffic.items() if kind.algorithm == "in-switch")
    assert sum_in_switch.of["scale-up"].max() == pytest.approx(ways["in-switch"] * (1 + 1 / 8))


def test_what_crosses_stages_is_counted_once() -> None:
    its = wired(H100, "dp2 tp8 pp4 mb1", batch=64)
    across = [sent for sent in its.sends if (sent.kind.axis, sent.kind.op) == ("pp", "all_reduce")]
    assert [(sent.stages, sent.bytes) for sent in across] == [((0,), 16)]


# --- sharing links


@pytest.mark.parametrize(("flows", "links"), [(1, 4), (3, 2), (4, 3), (5, 4), (6, 2)])
def test_fullest_link_by_enumeration(flows: int, links: int) -> None:
    deals = [max(deal.count(link) for link in range(links)) for deal in product(range(links), repeat=flows)]
    assert max_load(flows, links) == pytest.approx(sum(deals) / len(deals), rel=1e-9)
    pairs = [max(a, b) for a, b in product(deals, repeat=2)]
    assert max_load(flows, links, 2) == pytest.approx(sum(pairs) / len(pairs), rel=1e-9)


def test_alike_leaves_are_waited_for_alike() -> None:
    """Five leaves of 8 flows over 4 links, 1 s were they even: 2 flows of half a second each on a link."""
    seconds = hashed(1).slowest_leaf(np.ones(5), np.full(5, 8), np.full(5, 4))
    assert seconds == pytest.approx(max_load(8, 4, 5) / 2)


def test_many_flows_are_filled_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = max_load(2000, 64, 8)
    monkeypatch.setattr("meshwright.cost.fabric.spread.MANY_FLOWS", 10)
    load_odds.cache_clear()
    assert max_load(2000, 64, 8) == pytest.approx(exact, rel=0.01)
    load_odds.cache_clear()


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.floats(0.1, 9)), min_size=1, max_size=3))
def test_slowest_leaf_by_enumeration(leaves: list[tuple[int, int, float]]) -> None:
    """Every deal of every leaf's flows; a flow is a leaf's seconds, were its links even, over its flows, times its links."""
    flows, links, even = (np.array(each) for each in zip(*leaves, strict=True))

    def times(f: int, p: int, seconds: float) -> list[float]:
        deals = product(range(p), repeat=f)
        return [max(deal.count(link) for link in range(p)) * seconds * p / f for deal in deals] if f else [0.0]

    latest = [max(each) for each in product(*(times(*leaf) for leaf in leaves))]
    assert hashed(1).slowest_leaf(even, flows, links) == pytest.approx(sum(latest) / len(latest))


def test_more_queue_pairs_and_more_links_collide_less() -> None:
    steps = [way.excess(32, 32) for way in (*map(hashed, (1, 2, 4, 8, 16)), adaptive())]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] == pytest.approx(3.53, abs=0.01)
    assert 1 / steps[2] == pytest.approx(0.46, abs=0.005)
    assert max_load(32, 64) / 1 == pytest.approx(1 / 0.37, abs=0.02)  # twice the uplinks: 37 % of the line rate


# --- nothing lost makes anything quicker


BUSY = "dp12 tp2 pp2 mb1 order:dp-tp-cp-pp"


@settings(deadline=None, max_examples=12)
@given(FABRICS, LAYOUTS, st.sampled_from(["scale-up", "pcie", "nic", "leaf", "core"]), st.sampled_from([EVEN, hashed(1)]))
def test_halving_links_is_never_quicker(given: Cluster, layout: str, link: str, spreading: Any) -> None:
    its = replace(wired(given, layout), spreading=spreading)
    assert its.step(its.links.scaled(link, 0.5)) >= its.step() * (1 - 1e-12)


@settings(deadline=None, max_examples=12)
@given(FABRICS, LAYOUTS, st.sampled_from([EVEN, adaptive(), hashed(1), hashed(4)]))
def test_losing_anything_is_never_quicker(given: Cluster, layout: str, spreading: Any) -> None:
    its = replace(wired(given, layout), spreading=spreading)
    for what in ("lose-link", "lose-nic", "slow-gpu=0.5"):
        after = what_if(its, what).step_s
        assert after is None or after >= its.step() * (1 - 1e-12), what


@settings(deadline=None, max_examples=12)
@given(FABRICS, LAYOUTS)
def test_more_bandwidth_is_never_slower(given: Cluster, layout: str) -> None:
    node = given.node.model_copy(update={"nic_bandwidth": 2 * given.node.nic_bandwidth})
    assert wired(given.model_copy(update={"node": node}), layout).step() <= wired(given, layout).step() * (1 + 1e-12)


def test_oversubscription_slows_what_crosses_and_its_limit_is_where_it_says() -> None:
    """Data-parallel rings that leave every unit: a leaf at o:1 sends as much over 1/o of the links."""
    given = cluster(nodes=1)
    steps = []
    for o in (1.0, 2.0, 4.0, 8.0):
        tight = given.model_copy(update={"fabric": given.fabric.model_copy(update={"oversubscription": o})})
        steps.append(wired(tight, BUSY).step())
    assert steps == sorted(steps)
    assert steps[-1] > steps[0] * 1.05
    # On a fabric whose leaves have as many uplinks as it takes, the limit found costs what was asked for.
    many = cluster(nodes=32, per_node=2)
    its = wired(many, "dp128 tp2 mb1 order:dp-tp-cp-pp", batch=128)
    limit = tolerated(its, 0.01)[0].oversubscription
    assert limit is not None
    assert its.step(its.links.scaled("leaf", 1 / limit)) <= its.step() * 1.01
    assert its.step(its.links.scaled("leaf", 1 / limit / 1.02)) > its.step() * 1.01


def test_twice_oversubscribed_takes_twice_as_long() -> None:
    """Every NIC sends to the next stage in another unit: half the uplinks, half the rate."""
    given = cluster(nodes=1, oversubscription=2.0)
    slowed = {(kind.axis, kind.op): factor for kind, factor in wired(given, "tp2 pp4 mb1").slowed().items()}
    assert slowed["pp", "send"] == pytest.approx(2.0, rel=1e-6)


def test_nothing_crosses_a_leaf_that_holds_all() -> None:
    its = wired(cluster(nodes=64), "dp8 tp2:sp mb1")
    (leaf,) = tolerated(its, 0.01)
    assert not leaf.crosses
    assert leaf.oversubscription is None


def test_rank_orders_put_tensor_parallel_inside_the_node() -> None:
    its = wired(H100, "dp4 tp8:sp pp2 mb1 order:dp-cp-tp-pp", batch=64)
    orders = rank_orders(its)
    assert len(orders) == 6
    assert orders[0].layout.order[0] == "tp"
    assert [o.is_given for o in orders].count(True) == 1
    assert [o.step_s for o in orders] == sorted(o.step_s for o in orders)


def test_a_lost_nic_doubles_what_its_neighbour_carries() -> None:
    its = wired(H100, "dp16 tp8:sp mb1", batch=64)
    lost = replace(its, lost=(0, 0))
    assert lost.total.of["nic"][0, 0] == lost.total.of["nic"][1, 0] == 0
    assert lost.total.of["nic"][0, 1] == pytest.approx(2 * its.total.of["nic"][0, 1])
    assert what_if(its, "lose-nic").step_s > its.step()  # type: ignore[operator]


def test_the_only_nic_and_the_only_uplink_stop_the_job() -> None:
    its = wired(cluster(nodes=1, per_node=1), "dp4 mb1")
    assert what_if(its, "lose-nic").step_s is None
    assert what_if(its, "lose-link").step_s is None


def test_one_of_several_nics_of_an_accelerator_leaves_the_others() -> None:
    its = wired(load_cluster("aws-p5"), "dp16 tp8:sp mb1", batch=64)
    whole, less = its.links.capacities["nic"][0], what_if(its, "lose-nic")
    assert whole == pytest.approx(4 * 12.5e9)
    assert "one of the 4" in less.what
    weakened = its.links.weakened("nic", its.busiest("nic"), 3 / 4)
    assert busy_seconds(its.total, weakened)["nic"] == pytest.approx(4 / 3 * busy_seconds(its.total, its.links)["nic"])
    assert less.step_s == its.step(weakened) > its.step()


def test_a_slow_accelerator_costs_no_more_than_if_all_were_slow() -> None:
    its = wired(H100, "dp4 tp8:sp pp4 mb1", batch=64)
    slow, step = what_if(its, "slow-gpu=0.8").step_s, its.step()
    assert slow is not None
    assert step * 1.05 < slow < step / 0.8
    assert what_if(its, "slow-gpu=1").step_s == pytest.approx(step)


# --- refusals, size, the verb


def test_refusals() -> None:
    layout = {**SEVENTY, "layout": "dp20 tp8:sp pp4 mb1"}
    for changed, message in (
        ({"what_if": ["lose-nics"]}, "did you mean lose-nic"),
        ({"what_if": ["slow-gpu=2"]}, "try slow-gpu=0.8"),
        ({"what_if": ["lose-link=3"]}, "unknown what-if 'lose-link=3'"),
        ({"queue_pairs": 4}, "infiniband does not hash flows"),
        ({"slower": 2}, "between 0 and 1"),
        ({"gpus": 512}, "dp16 would fill 512"),
    ):
        with pytest.raises(UserError, match=message):
            api.fabric(**{**layout, **changed})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least 1, got 0"):
        api.fabric(**{**layout, "cluster": "h100-roce-rail", "queue_pairs": 0})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has no network"):
        api.fabric(
            model="llama-3-8b", cluster="local", layout="dp2 tp2 mb1 fp32", seq=64, global_batch=4, what_if=["lose-nic"]
        )


def test_a_machine_without_a_network_has_scale_up_links_alone() -> None:
    seen = api.fabric(model="llama-3-8b", cluster="local", layout="dp2 tp2 mb1 fp32", seq=64, global_batch=4, orders=True)
    assert {use.link_class for use in seen.uses} == {"scale-up"}
    assert seen.step_s == seen.estimated_step_s
    assert seen.hottest(between_nodes=True) is None


def test_sixteen_thousand_accelerators_take_seconds() -> None:
    """In a process of its own, so that its memory is its own: under 2 GiB, and without the graph."""
    code = (
        "import resource, sys; from meshwright import fabric;"
        "fabric(model='llama-3-405b', cluster='h100-superpod', gpus=16384, seq=8192, global_batch=2048,"
        " layout='dp128:zero1 tp8:sp pp16 mb1');"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 'networkx' in sys.modules)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - began < 20
    peak_kib, drew = done.stdout.split()
    assert int(peak_kib) < 2**21
    assert drew == "False"


def test_large_graphs_are_drawn_when_asked_for() -> None:
    seen = api.fabric(**{**SEVENTY, "global_batch": 1024}, layout="dp512:zero1 tp8:sp mb1")
    with pytest.raises(UserError, match="4096 accelerators is large"):
        seen.graph()


def test_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    graph = tmp_path / "links.graphml"
    line = (
        "fabric --model llama-3-8b --cluster h100-roce-rail --gpus 32 --seq 4096 --global-batch 64 --links --orders --json"
    )
    rest = ["--layout", "dp4 tp8:sp mb1", "--what-if", "lose-nic", "--what-if", "slow-gpu=0.9", "--queue-pairs", "4"]
    monkeypatch.setattr(sys, "argv", ["meshwright", *line.split(), *rest, "--graph", str(graph)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    seen = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in seen["what_if"]] == ["lose-nic", "slow-gpu"]
    assert seen["spreading"] == "hashed, 4 queue pairs"
    used = {(use["link_class"], use["axis"]): use for use in seen["link_classes"]}
    assert math.fsum(sum(link["bytes"].values()) for link in seen["links"] if link["link_class"] == "nic") == pytest.approx(
        2 * used["nic", "all"]["total_bytes"]
    )
    again = api.fabric(
        model="llama-3-8b", cluster="h100-roce-rail", seq=4096, global_batch=64, layout="dp4 tp8:sp mb1", queue_pairs=4
    )
    assert graph.read_text() == graphml(again.graph())
