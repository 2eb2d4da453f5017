"""What a training run is: read from YAML or from flags, checked before any process starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from meshwright.cost.estimate import Estimator
from meshwright.models.routing import Balance
from meshwright.planner.recompute import Fitted, fit_recompute
from meshwright.schedule.actions import Schedule
from meshwright.schedule.csv import read_schedule
from meshwright.schedule.orders import layout_schedule
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.errors import UserError
from meshwright.spec.huggingface import load_model
from meshwright.spec.layout import Layout
from meshwright.spec.legality import check_layout, micro_batches, refuse_unbuilt, refuse_unrun, refuse_unrunnable_model
from meshwright.spec.model import Model
from meshwright.spec.notation import parse_layout
from meshwright.spec.sizes import parse_bytes
from meshwright.spec.workload import Workload
from meshwright.spec.yaml_edge import read_yaml, validate


class Recipe(BaseModel):
    """One training run. Every field is a key of the YAML file and a flag of `meshwright train`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "llama-tiny"
    """Catalogue name, or path of a Hugging Face config.json."""
    layout: str = "dp1 mb1 fp32"
    schedule_csv: str | None = None
    """A pipeline schedule of your own, one row a stage, instead of the layout's."""
    data: str | None = None
    """File, directory or glob of text, JSONL or Parquet; the standard library's source by default."""
    tokenizer: str | None = None
    """Path of a tokenizer.json; bytes by default."""
    memory_budget: str | int | None = None
    """Bytes of a rank, or such as "60GiB": chooses what the layout recomputes, by the prices of `cluster`."""
    seq: int = Field(default=256, ge=1)
    global_batch: int = Field(default=8, ge=1)
    steps: int = Field(default=50, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    warmup: int = Field(default=10, ge=0)
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = Field(default=1.0, gt=0)
    """Global gradient norm above which gradients are scaled down."""
    aux_loss: float = 0.0
    """Factor of the auxiliary loss that balances experts, sequence by sequence."""
    z_loss: float = 0.0
    """Factor of the loss that keeps the router's logits small."""
    bias_rate: float = 0.0
    """Step of the loss-free balancing bias."""
    capacity_factor: float | None = None
    """An expert takes at most this multiple of an even load of each sequence; the rest is dropped. None: nothing is dropped."""
    expert_choice: bool = False
    """Experts choose tokens, instead of tokens experts."""
    seed: int = 0
    init: str | None = None
    """Directory of Hugging Face safetensors to start from; random weights by default."""
    cluster: str | None = None
    """What MFU is measured against."""
    out: str = "runs/latest"
    """Checkpoints, packed tokens, the loss plot and the report of the run go here."""
    offload_dir: str | None = None
    """Where a layout with offload to files keeps them, on the machine of each rank; `offload` in `out` by default."""
    save_every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`, saved under whatever layout."""
    export: str | None = None
    """Directory to write the trained weights to, as Hugging Face safetensors."""
    json_log: str | None = None
    """Metrics of every step, one JSON object a line; `metrics.jsonl` in `out` by default."""

    @property
    def workload(self) -> Workload:
        return Workload(self.seq, self.global_batch)

    @property
    def parsed_layout(self) -> Layout:
        return parse_layout(self.layout)

    @property
    def balance(self) -> Balance | None:
        """How experts are kept in balance; None where nothing is asked for."""
        asked = Balance(self.aux_loss, self.z_loss, self.bias_rate, self.capacity_factor, self.expert_choice)
        return None if asked == Balance() else asked

    @property
    def out_dir(self) -> Path:
        return Path(self.out)

    @property
    def offload_path(self) -> Path:
        return Path(self.offload_dir) if self.offload_dir else self.out_dir / "offload"

    @property
    def log_path(self) -> Path:
        return Path(self.json_log) if self.json_log else self.out_dir / "metrics.jsonl"

    @property
    def schedule(self) -> Schedule:
        """What the stages do, checked. Raises UserError for micro-batches that the layout's schedule cannot run, and for a table
        that cannot run as written."""
        layout = self.parsed_layout
        count = micro_batches(layout, self.workload)
        if self.schedule_csv is None:
            return layout_schedule(layout, count)
        if layout.async_ep:
            raise UserError(
                f"schedule_csv {self.schedule_csv} with ep{layout.ep}:async: a table says nothing of pairs: leave :async out, or the table"
            )
        return read_schedule(Path(self.schedule_csv), layout.pp, layout.chunks, count)

    def check(self) -> Model:
        """Raise UserError for whatever can be known to be wrong before starting. Returns the model."""
        model, layout = load_model(self.model), self.parsed_layout
        refuse_unrunnable_model(model)
        check_layout(layout, model, self.workload)
        refuse_unbuilt(layout)
        refuse_unrun(layout)
        if self.offload_dir is not None and not (layout.offload != "none" and layout.offload_to == "file"):
            raise UserError(
                f"offload_dir {self.offload_dir} would not be used: {layout} keeps nothing in files; try offload:optimizer@file"
            )
        _ = self.schedule
        if self.balance is not None:
            self.balance.check(model)
        return model


def fit_memory(recipe: Recipe) -> tuple[Recipe, Fitted | None]:
    """The recipe with a layout that stays within its memory budget, and how that was chosen; the same recipe where it has none.

    Raises UserError without a cluster whose rates tell what recompute costs, and when even recomputing all is not enough.
    """
    if recipe.memory_budget is None:
        return recipe, None
    budget = parse_bytes(recipe.memory_budget)
    if recipe.cluster is None:
        raise UserError(
            f"memory_budget {recipe.memory_budget} chooses the recompute that costs the least time on a cluster: say which with --cluster"
        )
    estimator = Estimator(load_model(recipe.model), load_cluster(recipe.cluster), recipe.workload)
    fitted = fit_recompute(estimator, recipe.parsed_layout, budget)
    return recipe.model_copy(update={"layout": str(fitted.best.layout), "memory_budget": None}), fitted


def load_recipe(path: str | None, overrides: dict[str, Any]) -> Recipe:
    """The recipe in the YAML file `path` (none: all defaults) with the given fields replaced."""
    data: dict[str, Any] = read_yaml(path) if path else {}
    data.update({key: value for key, value in overrides.items() if value is not None})
    return validate(Recipe, data, path or "flags")
