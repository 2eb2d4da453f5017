"""The catalogue holds what its sources say, and a user's cluster is read, refused and written back in their words."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path

import pytest
import yaml

from meshwright.spec import catalogue
from meshwright.spec.catalogue import (
    catalogue_accelerators,
    catalogue_clusters,
    dump_cluster,
    load_accelerator,
    load_cluster,
)
from meshwright.spec.cluster import Accelerator, Cluster, CollectivePoint, MatmulPoint, Measured
from meshwright.spec.collectives import load_collective_constants
from meshwright.spec.errors import UserError

OWN = """\
name: mine
accelerator: h100-sxm
node:
  accelerators: 8
  nics: 8
  nic_bandwidth: 50e9
fabric: {kind: leaf-spine, transport: roce, domain: 8, oversubscription: 2}
source: my rack
"""


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    return str(path)


# --- accelerators

# name: memory GiB, memory TB/s, bf16 TFLOP/s, GB/s per direction, to one neighbour, ring, share of the bf16 peak, TDP
SPOT = {
    "v100-sxm2-32": (32, 0.9, None, 150, 50, 120, None, 300),
    "a100-sxm-40": (40, 1.555, 312, 300, 300, 240, 0.869, 400),
    "a100-sxm-80": (80, 2.039, 312, 300, 300, 240, 0.869, 400),
    "h100-sxm": (80, 3.35, 989, 450, 450, 370.8, 0.803, 700),
    "h100-pcie": (80, 2.0, 756, 300, 300, None, None, 350),
    "h200-sxm": (141, 4.8, 989, 450, 450, 370.8, 0.803, 700),
    "h800-sxm": (80, 3.35, 989, 200, 200, 164.8, None, 700),
    "b200-sxm": (180, 8.0, 2250, 900, 900, 721.8, 0.776, 1000),
    "gb200": (186, 8.0, 2500, 900, 900, 721.8, 0.729, 1200),
    "l40s": (48, 0.864, 362, 31, 31, None, None, 350),
    "mi300x": (192, 5.3, 1307, 448, 64, None, 0.514, 750),
    "mi355x": (288, 8.0, 2500, 535.5, 76.5, None, 0.626, 1400),
    "tpu-v5p": (95, 2.765, 459, 600, 100, None, None, None),
    "trainium3": (144, 4.9, 671, 1280, None, None, None, None),
    "gaudi3": (128, 3.7, 1677, 600, None, None, 0.741, 900),
}


def close(value: float | None, expected: float | None) -> bool:
    return value is expected if value is None or expected is None else math.isclose(value, expected, rel_tol=1e-12)


@pytest.mark.parametrize("name", SPOT)
def test_accelerators_hold_their_sources_figures_in_si_units(name: str) -> None:
    gib, terabytes, teraflops, out, pair, ring, share, watts = SPOT[name]
    part = load_accelerator(name)
    assert part.memory_bytes == gib * 2**30
    assert close(part.memory_bandwidth, terabytes * 1e12)
    assert close(part.peak_flops.get("bf16"), teraflops and teraflops * 1e12)
    assert close(part.scale_up.bandwidth, out * 1e9)
    assert close(part.scale_up.pair_bandwidth, pair and pair * 1e9)
    assert close(part.scale_up.effective_bandwidth, ring and ring * 1e9)
    assert part.matmul_share.get("bf16") == share
    assert part.tdp_watts == watts


def test_other_precisions_are_dense_too() -> None:
    assert load_accelerator("h100-sxm").peak_flops == {
        "fp32": 67e12,
        "tf32": 494.5e12,
        "bf16": 989e12,
        "fp16": 989e12,
        "fp8": 1979e12,
        "int8": 1979e12,
    }
    assert load_accelerator("gb200").peak_flops["fp4"] == 10000e12
    assert load_accelerator("h200-sxm").matmul_share["fp8"] == 0.734


def test_every_accelerator_loads_and_is_sane() -> None:
    assert len(catalogue_accelerators()) == 34  # 33 published parts and `cpu`
    for name in catalogue_accelerators():
        part = load_accelerator(name)
        assert part.name == name
        assert part.source
        assert part.confidence
        assert all(0 < share <= 1 for share in part.matmul_share.values()), name
        if name != "cpu":
            assert 2**34 <= part.memory_bytes < 2**39, name
            assert 1e11 < part.memory_bandwidth < 1e14, name
            assert all(1e13 < peak < 1e17 for peak in part.peak_flops.values()), name
            assert 1e10 < part.scale_up.bandwidth < 1e13, name
        for slower in (part.scale_up.pair_bandwidth, part.scale_up.effective_bandwidth):
            assert slower is None or slower <= part.scale_up.bandwidth, name


# --- clusters

# name: accelerator, accelerators in a node, bytes/s out of a node, domain
CLUSTERS = {
    "a100-superpod": ("a100-sxm-80", 8, 200e9, 8),
    "h100-superpod": ("h100-sxm", 8, 400e9, 8),
    "h200-superpod": ("h200-sxm", 8, 400e9, 8),
    "h800-superpod": ("h800-sxm", 8, 400e9, 8),
    "b200-superpod": ("b200-sxm", 8, 400e9, 8),
    "gb200-nvl72": ("gb200", 4, 200e9, 72),
    "aws-p5": ("h100-sxm", 8, 400e9, 8),
    "h100-roce-rail": ("h100-sxm", 8, 400e9, 8),
    "mi300x-roce": ("mi300x", 8, 400e9, 8),
    "local": ("cpu", 4, 0, 1024),
}


def test_every_reference_cluster_loads() -> None:
    assert catalogue_clusters() == tuple(CLUSTERS)
    for name, (accelerator, size, out, domain) in CLUSTERS.items():
        cluster = load_cluster(name)
        assert (cluster.name, cluster.accelerator) == (name, load_accelerator(accelerator))
        assert (cluster.node.accelerators, cluster.node.nics * cluster.node.nic_bandwidth) == (size, out)
        assert cluster.fabric.domain == domain
        assert cluster.source
        assert cluster.measured is None
        assert cluster.tier(1, size) == "scale-up"


def test_tier_follows_the_domain() -> None:
    assert load_cluster("h100-superpod").tier(1, 16) == load_cluster("h100-superpod").tier(8, 2) == "network"
    assert load_cluster("gb200-nvl72").tier(8, 8) == "scale-up"


def test_loading_is_quick() -> None:
    for cached in (catalogue.read_data, catalogue.load_accelerator, catalogue._catalogue_cluster):
        cached.cache_clear()
    start = time.perf_counter()
    load_cluster("h100-superpod")
    assert time.perf_counter() - start < 0.06


def test_a_users_cluster_names_its_accelerator_or_spells_it_out(tmp_path: Path) -> None:
    by_name = load_cluster(written(tmp_path, OWN))
    assert by_name.accelerator == load_accelerator("h100-sxm")
    assert by_name.fabric.oversubscription == 2
    inline = OWN.replace(
        "accelerator: h100-sxm\n",
        "accelerator:\n  {name: x, title: X, vendor: V, memory_bytes: 64e9, memory_bandwidth: 1e12,\n"
        "   peak_flops: {bf16: 1e14}, scale_up: {name: wire, bandwidth: 1e11}, confidence: high, source: me}\n",
    )
    part = load_cluster(written(tmp_path, inline)).accelerator
    assert (part.name, part.memory_bytes, part.scale_up.kind) == ("x", 64 * 10**9, "other")


def test_a_path_wins_over_a_catalogue_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local").mkdir()
    assert load_cluster("local").name == "local"
    (tmp_path / "aws-p5").write_text(OWN)
    assert load_cluster("aws-p5").name == "mine"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("h100-sxm", "h100-smx", "own.yaml, line 2: accelerator: unknown accelerator 'h100-smx': did you mean h100-sxm"),
        ("nics: 8", "nic: 8", "own.yaml, line 5: node.nic: unknown key 'nic': did you mean nics"),
        ("50e9", "fast", "own.yaml, line 6: node.nic_bandwidth: must be a number, got 'fast'"),
        ("50e9", ".inf", "own.yaml, line 6: node.nic_bandwidth: must be a finite number, got inf"),
        ("50e9", "0", "own.yaml, line 3: node: nics 8 with nic_bandwidth 0: both are above 0, or both are 0"),
        ("roce", "rocee", "own.yaml, line 7: fabric.transport: unknown value 'rocee': did you mean roce"),
        ("roce", "none", "own.yaml, line 7: fabric: kind leaf-spine with transport none: a fabric has both"),
        ("oversubscription: 2", "oversubscription: 0.5", "must be greater than or equal to 1, got 0.5"),
        ("domain: 8, ", "", "own.yaml, line 7: fabric.domain: missing; required here: kind, transport, domain"),
        ("name: mine\n", "", "own.yaml, line 1: name: missing"),
        ("accelerator: h100-sxm", "accelerator: {name: x", "own.yaml, line 3, column 5: not valid YAML"),
    ],
)
def test_a_wrong_cluster_is_refused_where_it_is_wrong(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_cluster(written(tmp_path, OWN.replace(old, new)))


def test_unknown_names() -> None:
    with pytest.raises(UserError, match=r"unknown cluster 'h100-superpd': did you mean h100-superpod.*; or the path"):
        load_cluster("h100-superpd")
    with pytest.raises(UserError, match=r"^nowhere/c\.yml: no such file"):
        load_cluster("nowhere/c.yml")
    with pytest.raises(UserError, match="unknown accelerator 'b20-sxm': did you mean b200-sxm"):
        load_accelerator("b20-sxm")


def test_precisions_must_be_known() -> None:
    data = load_accelerator("h100-sxm").model_dump()
    with pytest.raises(ValueError, match="unknown precision 'bf17': did you mean bf16"):
        Accelerator.model_validate(data | {"peak_flops": {"bf17": 1e12}})
    with pytest.raises(ValueError, match="share of peak_flops, which has no fp8"):
        Accelerator.model_validate(data | {"peak_flops": {"bf16": 1e12}})


# --- writing

MEASURED = Measured(
    source="bench",
    matmul=(MatmulPoint(precision="bf16", m=4096, n=4096, k=1024, active=2, flops_per_s=1.0 / 3 * 1e12),),
    memory_bandwidth=9.1e9,
    collectives=(
        CollectivePoint(op="all_reduce", ranks=4, bytes=0, seconds=22.7e-6),
        CollectivePoint(op="p2p", ranks=2, bytes=1 << 20, seconds=0.1 + 0.2),
    ),
)


@pytest.mark.parametrize("name", CLUSTERS)
def test_dump_round_trips(tmp_path: Path, name: str) -> None:
    for cluster in (load_cluster(name), load_cluster(name).model_copy(update={"measured": MEASURED})):
        assert load_cluster(written(tmp_path, dump_cluster(cluster))) == cluster


def test_dump_spells_out_an_accelerator_that_the_catalogue_does_not_hold(tmp_path: Path) -> None:
    cluster = load_cluster("mi300x-roce")
    assert "accelerator: mi300x\n" in dump_cluster(cluster)
    tuned = cluster.accelerator.model_copy(update={"tdp_watts": 700.0, "notes": "capped: 700 W # here"})
    changed = cluster.model_copy(update={"accelerator": tuned})
    assert load_cluster(written(tmp_path, dump_cluster(changed))) == changed


def test_dumped_numbers_are_legible_here_and_to_yaml_1_1() -> None:
    text = dump_cluster(load_cluster("h100-superpod").model_copy(update={"measured": MEASURED}))
    assert "nic_bandwidth: 50.0e+9" in text
    assert "{op: all_reduce, ranks: 4, bytes: 0, seconds: 22.7e-6}" in text
    elsewhere = yaml.safe_load(text)
    assert elsewhere["measured"]["matmul"][0]["flops_per_s"] == 1.0 / 3 * 1e12
    assert Cluster.model_validate(elsewhere | {"accelerator": load_accelerator("h100-sxm")}).measured == MEASURED


# --- collectives


def test_collective_constants_hold_nccls_figures_where_none_are_measured() -> None:
    constants = load_collective_constants()
    nvlink, network = constants.scale_up["nvlink"], constants.network
    assert (network.protocols["simple"].hop_latency, constants.scale_up["pcie"].protocols["simple"].hop_latency) == (
        14e-6,
        5.7e-6,
    )
    assert (nvlink.p2p_latency, network.p2p_latency) == (12e-6, 22e-6)
    assert nvlink.in_switch is not None
    assert [nvlink.in_switch.gain_of(n) for n in (2, 4, 5, 8, 72)] == [1.0, 1.0, 1.14, 1.30, 1.30]
    assert network.plateau_share == 48.5 / 50


def test_every_link_of_the_catalogue_has_constants() -> None:
    constants = load_collective_constants()
    for name in catalogue_accelerators():
        cluster = load_cluster("h100-superpod").model_copy(update={"accelerator": load_accelerator(name)})
        assert constants.link(cluster, "scale-up").protocols
        assert constants.link(cluster, "network") == constants.network
    assert constants.link(load_cluster("local"), "scale-up") == constants.scale_up["gloo"]


def test_a_constant_without_a_source_is_refused() -> None:
    data = load_collective_constants().network.model_dump()
    del data["sources"]["p2p_latency"]
    with pytest.raises(ValueError, match="sources lacks p2p_latency"):
        type(load_collective_constants().network).model_validate(data)
