"""What running costs where the person does not say: failure rates, power, prices, each with its source."""

from __future__ import annotations

from functools import lru_cache

from pydantic import BaseModel, ConfigDict, Field

from meshwright.spec.catalogue import read_data
from meshwright.spec.errors import choices
from meshwright.spec.yaml_edge import validate


class Sourced(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float = Field(ge=0)
    source: str


class EconomicConstants(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    failures_per_node_day: dict[str, Sourced]
    default_failures: str
    restart_seconds: Sourced
    host_copy_bytes_per_s: Sourced
    storage_bytes_per_s: Sourced
    power_load: Sourced
    pue: Sourced
    usd_per_kwh: Sourced
    spares: Sourced
    usd_per_accelerator_hour: dict[str, Sourced]
    """By the first part of the accelerator's name."""

    def failures(self, given: str | None) -> Sourced:
        """Failures of a node in a day: a source's name, or a number of the person's own. Raises UserError for anything else."""
        name = given or self.default_failures
        if name in self.failures_per_node_day:
            return self.failures_per_node_day[name]
        try:
            return Sourced(value=float(name), source="given")
        except ValueError:
            raise choices(
                name, (*self.failures_per_node_day, "a number of failures a node and day"), "failure rate"
            ) from None

    def price(self, accelerator: str) -> Sourced | None:
        """USD for an hour of one; None where nothing is known."""
        return self.usd_per_accelerator_hour.get(accelerator.split("-")[0])


@lru_cache
def load_economic_constants() -> EconomicConstants:
    return validate(EconomicConstants, read_data("economics.yaml"))
