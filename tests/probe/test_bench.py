"""A bench of a second or two makes a cluster that can be written, read, and priced with."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("torch")

from meshwright.cost.estimate import Estimator
from meshwright.cost.ops import Attention
from meshwright.probe.bench import CPU_SIZES, GPU_SIZES, Sizes, _own_cluster, measure_cluster
from meshwright.probe.collectives import group_sizes
from meshwright.probe.machine import Machine, this_machine
from meshwright.spec.catalogue import (
    accelerator_of_device,
    catalogue_accelerators,
    dump_cluster,
    load_accelerator,
    load_cluster,
)
from meshwright.spec.cluster import Cluster
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload

KIB, MIB = 2**10, 2**20
SMALL = Sizes(
    matmul=((64, 64, 64), (128, 128, 64)), attention=(64, 128), heads=2, array_bytes=256 * KIB, messages=(KIB, 8 * MIB)
)
TINY = Model(
    name="tiny",
    family="llama",
    layers=2,
    hidden=64,
    ffn=128,
    vocab=256,
    heads=4,
    kv_heads=4,
    head_dim=16,
    max_positions=128,
)


@pytest.fixture(scope="module")
def bench() -> tuple[Cluster, list[tuple[str, float]]]:
    """What a quick bench returned, and what it told on the way."""
    told: list[tuple[str, float]] = []
    cluster = measure_cluster(
        2, precisions=("fp32",), seconds=2.0, base=None, progress=lambda what, done: told.append((what, done)), sizes=SMALL
    )
    return cluster, told


@pytest.fixture(scope="module")
def cluster(bench: tuple[Cluster, list[tuple[str, float]]]) -> Cluster:
    return bench[0]


def test_a_written_cluster_is_read_back_equal(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(dump_cluster(cluster))
    assert load_cluster(str(path)) == cluster


def test_every_kind_of_point_is_there(cluster: Cluster) -> None:
    measured = cluster.measured
    assert measured is not None
    assert {(p.m, p.n, p.k, p.active) for p in measured.matmul} == {(*s, a) for s in SMALL.matmul for a in (1, 2)}
    forward = [Attention("", 1, SMALL.heads, length, 64, 64, None, backward=False).flops for length in SMALL.attention]
    assert {(p.flops, p.active) for p in measured.attention} == {(f, a) for f in forward for a in (1, 2)}
    assert {p.op for p in measured.collectives} == {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p"}
    assert {(p.ranks, p.bytes) for p in measured.collectives} == {(2, size) for size in SMALL.messages}
    assert measured.memory_bandwidth
    assert measured.source.startswith("meshwright bench, ")
    assert cluster.source == measured.source


def test_large_collectives_take_longer(cluster: Cluster) -> None:
    assert cluster.measured is not None
    for op in ("all_reduce", "all_gather", "reduce_scatter", "p2p"):
        small, large = sorted((p for p in cluster.measured.collectives if p.op == op), key=lambda p: p.bytes)
        assert small.seconds < large.seconds, op


def test_the_cluster_is_this_machine(cluster: Cluster) -> None:
    machine, accelerator = this_machine(), cluster.accelerator
    if machine.devices:
        pytest.skip("the accelerator is a GPU's")
    assert cluster.measured is not None
    assert (cluster.node.accelerators, cluster.node.compute_slots) == (2, min(2, machine.cores))
    assert accelerator.memory_bytes == machine.memory_bytes // 2
    alone = [p.flops_per_s for p in cluster.measured.matmul if p.active == 1]
    assert accelerator.peak_flops == {"fp32": max(alone)}
    assert accelerator.name not in catalogue_accelerators()
    sent = next(p for p in cluster.measured.collectives if p.op == "p2p" and p.bytes == max(SMALL.messages))
    assert accelerator.scale_up.bandwidth == pytest.approx(sent.bytes / sent.seconds, rel=1e-3)


def test_estimates_rest_on_the_measurements(cluster: Cluster) -> None:
    assert cluster.measured is not None
    result = Estimator(TINY, cluster, Workload(seq=64, global_batch=4)).estimate(Layout(tp=2, precision="fp32"))
    assert result.evidence["compute"] == f"measured: {cluster.measured.source}"
    assert result.evidence["communication"] == f"measured: {cluster.measured.source}"
    assert result.step_time_s > 0


def test_progress_says_what_and_how_far(bench: tuple[Cluster, list[tuple[str, float]]]) -> None:
    labels, fractions = zip(*bench[1], strict=True)
    assert labels[0] == "fp32 matmul on 2 ranks"
    assert labels[-1] == "done"
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert all(a < b for a, b in pairwise(fractions))


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(UserError, match="unknown precision 'bf61': did you mean bf16"):
        measure_cluster(2, precisions=("bf61",), base=None)
    with pytest.raises(UserError, match="ranks 0: measure with 1 or more"):
        measure_cluster(0, base=None)
    with pytest.raises(UserError, match="a node of local has 4 accelerators"):
        measure_cluster(8, base=load_cluster("local"))
    pod = load_cluster("local").model_copy(update={"name": "tpu-v5p-pod", "accelerator": load_accelerator("tpu-v5p")})
    with pytest.raises(UserError, match="tpu-v5p-pod is made of tpu-v5p"):
        measure_cluster(2, base=pod)
    with pytest.raises(UserError, match="ranks 4 on 2 GPUs"):
        Machine("NVIDIA H100 PCIe", "NVIDIA", cores=16, devices=2, memory_bytes=80 * 2**30).check_ranks(4)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200-sxm"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm-40"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80"),
        ("NVIDIA GH200 480GB", "gh200-96"),
        ("NVIDIA GB200", "gb200"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA H800 PCIe", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_driver_s_name_finds_the_accelerator(said: str, name: str | None) -> None:
    assert accelerator_of_device(said) == name
    assert name is None or name in catalogue_accelerators()


@pytest.mark.parametrize("said", ["NVIDIA H100 80GB HBM3", "NVIDIA GeForce GTX 1080"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_gpus_make_a_cluster_too(cluster: Cluster, said: str, ranks: int, tmp_path: Path) -> None:
    """The figures are a CPU's: only what becomes of them on a machine with 8 GPUs is looked at."""
    machine = Machine(said, "NVIDIA", cores=64, devices=8, memory_bytes=85_000_000_000)
    assert cluster.measured is not None
    measured = cluster.measured if ranks > 1 else cluster.measured.model_copy(update={"collectives": ()})
    made = _own_cluster(machine, ranks, measured, 2e12)
    path = tmp_path / "gpus.yaml"
    path.write_text(dump_cluster(made))
    assert load_cluster(str(path)) == made
    assert (made.node.accelerators, made.node.compute_slots, made.fabric.domain) == (8, None, 8)
    assert made.accelerator.memory_bytes == machine.memory_bytes
    known = accelerator_of_device(said)
    assert made.accelerator.name == (known or "nvidia-geforce-gtx-1080")
    if known:
        assert made.accelerator.peak_flops == load_accelerator(known).peak_flops


def test_groups_and_messages() -> None:
    assert [group_sizes(n) for n in (1, 2, 3, 4, 6, 8)] == [[], [2], [2, 3], [2, 4], [2, 4, 6], [2, 4, 8]]
    assert (CPU_SIZES.messages[0], CPU_SIZES.messages[-1]) == (KIB, 32 * MIB)
    assert (GPU_SIZES.messages[0], GPU_SIZES.messages[-1]) == (KIB, 256 * MIB)
