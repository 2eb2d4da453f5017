"""Accelerators and clusters by name, as YAML data beside this file with their sources, and a user's own cluster."""

from __future__ import annotations

from decimal import Decimal
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from meshwright.spec.cluster import Accelerator, Cluster
from meshwright.spec.errors import UserError, choices
from meshwright.spec.yaml_edge import Document, parse_yaml, read_yaml, validate

# What `torch.cuda.get_device_name` says (every part, in any case) -> catalogue name; the first match counts.
# One device of an MI250X is half of the catalogue's card, so it is not here.
_DEVICE_NAMES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gb300",), "gb300"),
    (("gb200",), "gb200"),
    (("gh200", "480gb"), "gh200-96"),  # named for its 480 GB of host memory; the part with 144 GB is another
    (("b300",), "b300-sxm"),
    (("b200",), "b200-sxm"),
    (("h200", "nvl"), "h200-nvl"),
    (("h200",), "h200-sxm"),
    (("h800", "pcie"), ""),  # not in the catalogue
    (("h800",), "h800-sxm"),
    (("h100", "nvl"), "h100-nvl"),
    (("h100", "pcie"), "h100-pcie"),
    (("h100",), "h100-sxm"),
    (("h20",), "h20"),
    (("a100", "sxm", "80gb"), "a100-sxm-80"),
    (("a100", "sxm", "40gb"), "a100-sxm-40"),
    (("a100", "pci", "80gb"), "a100-pcie-80"),
    (("a100", "pci", "40gb"), "a100-pcie-40"),
    (("v100-sxm2-32gb",), "v100-sxm2-32"),
    (("l40s",), "l40s"),
    (("rtx 4090",), "rtx-4090"),
    (("mi300x",), "mi300x"),
    (("mi325x",), "mi325x"),
    (("mi350x",), "mi350x"),
    (("mi355x",), "mi355x"),
)


@lru_cache
def read_data(name: str) -> Document:
    """The catalogue file `name`, read once. Not to be changed by the caller."""
    return parse_yaml((files(__name__) / name).read_text(encoding="utf-8"), f"catalogue/{name}")


def catalogue_accelerators() -> tuple[str, ...]:
    return tuple(read_data("accelerators.yaml"))


def catalogue_clusters() -> tuple[str, ...]:
    return tuple(read_data("clusters.yaml"))


@lru_cache
def load_accelerator(name: str) -> Accelerator:
    """The accelerator of that catalogue name; `UserError` with the nearest names if there is none."""
    return validate(Accelerator, _entry("accelerators.yaml", name, "accelerator"), f"catalogue accelerator {name}")


def load_cluster(ref: str) -> Cluster:
    """The cluster that `ref` names: a YAML file if there is one (or the name ends like one), else a catalogue cluster.

    A cluster file holds the keys of `Cluster`; its `accelerator` is a catalogue name or the keys of `Accelerator`.
    """
    if Path(ref).is_file() or ref.endswith((".yaml", ".yml")):
        return _read_cluster(ref)
    if ref not in catalogue_clusters():
        raise UserError(f"{choices(ref, catalogue_clusters(), 'cluster')}; or the path of a YAML file")
    return _catalogue_cluster(ref)


def dump_cluster(cluster: Cluster) -> str:
    """YAML that `load_cluster` reads back as an equal cluster. A catalogue accelerator is written by its name."""
    data = cluster.model_dump(mode="json", exclude_defaults=True)
    name = cluster.accelerator.name
    if name in catalogue_accelerators() and load_accelerator(name) == cluster.accelerator:
        data["accelerator"] = name
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=124)


def _read_cluster(path: str) -> Cluster:
    data = read_yaml(path)
    name = data.get("accelerator")
    if isinstance(name, str):
        try:
            data["accelerator"] = load_accelerator(name)
        except UserError as error:
            raise UserError(f"{path}, line {data.line(['accelerator'])}: accelerator: {error}") from None
    return validate(Cluster, data)


@lru_cache
def _catalogue_cluster(name: str) -> Cluster:
    entry = _entry("clusters.yaml", name, "cluster")
    return validate(Cluster, entry | {"accelerator": load_accelerator(entry["accelerator"])}, f"catalogue cluster {name}")


def _entry(file: str, name: str, what: str) -> dict[str, Any]:
    entries = read_data(file)
    if name not in entries:
        raise choices(name, entries, what)
    return {"name": name, **entries[name]}


class _Dumper(yaml.SafeDumper):
    pass


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    """Large and small figures in steps of a thousand, as they are said: 50.0e+9, not 50000000000.0.

    Point and sign stay, so that readers of YAML 1.1 see a number too.
    """
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return dumper.represent_float(value)
    exact = Decimal(repr(value))
    exponent = exact.adjusted() // 3 * 3
    digits = f"{exact.scaleb(-exponent).normalize():f}"
    return dumper.represent_scalar("tag:yaml.org,2002:float", f"{digits}{'' if '.' in digits else '.0'}e{exponent:+d}")


_Dumper.add_representer(float, _represent_float)


def accelerator_of_device(device_name: str) -> str | None:
    """The catalogue's name of the accelerator that the driver calls `device_name`; None when it has none."""
    lower = device_name.lower()
    return next((name for parts, name in _DEVICE_NAMES if all(part in lower for part in parts)), None) or None
