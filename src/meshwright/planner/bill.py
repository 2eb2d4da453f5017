"""The bill of a training run under one priced layout: from step time to money, with failures and checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from meshwright.cost.economics import HOUR, Bill, Energy, Reliability, energy
from meshwright.cost.result import Estimate
from meshwright.spec.cluster import Cluster
from meshwright.spec.economics import load_economic_constants
from meshwright.spec.errors import UserError
from meshwright.spec.model import Model
from meshwright.spec.parameters import count_parameters
from meshwright.spec.precision import StateBytes


@dataclass(frozen=True, slots=True)
class Terms:
    """What the person knows of their own cluster; None: the catalogue's figure (`economics.yaml`)."""

    failures: str | None = None
    """Failures of a node in a day: a number, or the name of a source."""
    save_seconds: float | None = None
    """How long training waits for a checkpoint. None: the copy of a rank's state to its host."""
    storage_bytes_per_s: float | None = None
    """Of the whole job."""
    restart_seconds: float | None = None
    interval_seconds: float | None = None
    """Between checkpoints. None: the best."""
    usd_per_hour: float | None = None
    usd_per_kwh: float | None = None
    pue: float | None = None
    spares: float | None = None

    def __post_init__(self) -> None:
        for name in ("save_seconds", "restart_seconds", "usd_per_hour", "usd_per_kwh", "spares"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UserError(f"{name.replace('_', ' ')} must be 0 or more, got {value:g}")
        for name in ("interval_seconds", "storage_bytes_per_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name.replace('_', ' ')} must be above 0, got {value:g}")
        if self.pue is not None and not self.pue >= 1:
            raise UserError(f"PUE is what the building draws over what the machines draw, 1 or more, got {self.pue:g}")


def training_bill(estimate: Estimate, model: Model, cluster: Cluster, tokens: float, terms: Terms | None = None) -> Bill:
    """What `tokens` cost under `estimate`. Raises UserError where failures come faster than the job can restart."""
    if not tokens > 0:
        raise UserError(f"tokens must be above 0, got {tokens:g}")
    terms = terms or Terms()
    world = estimate.layout.world
    size = checkpoint_bytes(model, estimate)
    reliability, evidence = _reliability(math.ceil(world / cluster.node.accelerators), size, world, terms)
    productive = tokens / estimate.tokens_per_s
    wall = productive / reliability.effective_ratio
    drawn, power_evidence = _energy(cluster, world, wall, terms)
    usd, price_evidence = _hardware(cluster, world, wall, terms)
    return Bill(
        tokens=tokens,
        accelerators=world,
        productive_seconds=productive,
        wall_seconds=wall,
        interruptions=wall / reliability.between_failures,
        reliability=reliability,
        checkpoint_bytes=size,
        energy=drawn,
        usd_hardware=usd,
        evidence={"throughput": estimate.evidence["compute"]} | evidence | price_evidence | power_evidence,
    )


def _reliability(nodes: int, size: int, world: int, terms: Terms) -> tuple[Reliability, dict[str, str]]:
    c = load_economic_constants()
    rate = c.failures(terms.failures)
    save, saving = _known(terms.save_seconds, size / world / c.host_copy_bytes_per_s.value, c.host_copy_bytes_per_s.source)
    storage, storing = _known(terms.storage_bytes_per_s, c.storage_bytes_per_s.value, c.storage_bytes_per_s.source)
    restart, restarting = _known(terms.restart_seconds, c.restart_seconds.value, c.restart_seconds.source)
    out = Reliability(nodes, rate.value, save, size / storage, restart, terms.interval_seconds or math.inf)
    if terms.interval_seconds is None:
        out = replace(out, interval=out.best_interval)
    if out.interval < out.write:
        raise UserError(
            f"a checkpoint every {out.interval:,.0f} s, but writing one takes {out.write:,.0f} s at {storage / 1e9:g} GB/s: "
            f"save every {out.best_interval:,.0f} s"
        )
    if out.effective_ratio <= 0:
        raise UserError(
            f"a checkpoint every {out.interval:,.0f} s with a failure every {out.between_failures:,.0f} s never gets on: "
            f"save every {out.best_interval:,.0f} s"
        )
    return out, {"failures": rate.source, "save": saving, "storage": storing, "restart": restarting}


def _energy(cluster: Cluster, world: int, wall: float, terms: Terms) -> tuple[Energy | None, dict[str, str]]:
    """None where the catalogue knows no power."""
    c = load_economic_constants()
    node_watts = cluster.node.power_watts
    watts = node_watts / cluster.node.accelerators if node_watts else cluster.accelerator.tdp_watts
    if watts is None:
        return None, {"power": f"none known of {cluster.accelerator.name}"}
    pue, building = _known(terms.pue, c.pue.value, c.pue.source)
    kwh, electricity = _known(terms.usd_per_kwh, c.usd_per_kwh.value, c.usd_per_kwh.source)
    what = "the node's maximum" if node_watts else "the accelerator's TDP alone"
    evidence = {"power": f"{what}; load: {c.power_load.source}", "pue": building, "electricity": electricity}
    return energy(world, watts, wall, kwh, load=c.power_load.value, pue=pue), evidence


def _hardware(cluster: Cluster, world: int, wall: float, terms: Terms) -> tuple[float | None, dict[str, str]]:
    """USD of the accelerators and their spares; None where no price is known."""
    c = load_economic_constants()
    known = c.price(cluster.accelerator.name)
    spares, sparing = _known(terms.spares, c.spares.value, c.spares.source)
    if terms.usd_per_hour is None and known is None:
        return None, {"price": f"none known of {cluster.accelerator.name}: give one"}
    hourly, priced = (
        (terms.usd_per_hour, "given") if known is None else _known(terms.usd_per_hour, known.value, known.source)
    )
    assert hourly is not None
    return world * (1 + spares) * wall / HOUR * hourly, {"price": priced, "spares": sparing}


def _known(given: float | None, usual: float, source: str) -> tuple[float, str]:
    return (usual, source) if given is None else (given, "given")


def checkpoint_bytes(model: Model, estimate: Estimate) -> int:
    """Weights and optimizer state of the whole model, each once; gradients are not saved."""
    bytes_ = StateBytes.of(estimate.layout)
    return count_parameters(model).total * (bytes_.parameter + bytes_.optimizer)
