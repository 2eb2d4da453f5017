"""One rank's training loop."""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from meshwright.cost.flops import model_flops_per_token
from meshwright.models.huggingface import SafetensorsReader
from meshwright.models.init import initial_value
from meshwright.parallel.apply import apply
from meshwright.parallel.balance import load_metrics
from meshwright.parallel.ledger import Entry
from meshwright.parallel.mesh import build_mesh
from meshwright.spec.catalogue import accelerator_of_device, load_accelerator, load_cluster
from meshwright.spec.errors import UserError
from meshwright.spec.files import write_text_atomically
from meshwright.train.batches import Batches, PackedTokens, check_vocabulary
from meshwright.train.checkpoint import export_safetensors, load_checkpoint, newest_checkpoint, save_checkpoint
from meshwright.train.corpus import pack
from meshwright.train.launch import rank_device
from meshwright.train.optimizer import Optimizer
from meshwright.train.progress import ProgressLine, packing_progress
from meshwright.train.recipe import Recipe
from meshwright.train.scaler import LossScaler
from meshwright.train.tokenizer import load_tokenizer

SAME_DATA = ("data", "tokenizer", "seq", "global_batch", "seed")
"""Recipe fields that a resumed run must share, or step k would not be the same batch."""


def train(recipe: Recipe, peak_flops: float | None) -> None:
    """Train as `recipe` says; every rank runs this. `peak_flops`: of one accelerator, for MFU.

    Writes the metrics, `report.json` and checkpoints under `recipe.out`.
    Raises UserError for bad data and for a loss that is no longer finite.
    """
    run = Run(recipe, peak_flops)
    try:
        run.run()
    finally:
        run.progress.close()
        run.engine.state.close()


class Run:
    def __init__(self, recipe: Recipe, peak_flops: float | None):
        self.recipe, self.peak_flops = recipe, peak_flops
        self.model = recipe.check()
        self.mesh = build_mesh(recipe.parsed_layout, self.model, rank_device())
        self.is_main = self.mesh.rank == 0
        self.batches = self._data()
        self.engine = apply(
            self.model,
            recipe.workload,
            self.mesh,
            self._initial(),
            recipe.balance,
            recipe.schedule,
            offload_dir=recipe.offload_path,
        )
        self._read_buffers()
        self.optimizer = Optimizer(recipe, self.engine.state)
        self.scaler = LossScaler(self.mesh.layout.precision)
        self.flops_per_token = model_flops_per_token(self.model, recipe.seq)
        self.step_times: list[float] = []
        self.sent: list[tuple[Entry, int, int]] = []
        self.progress = ProgressLine(recipe.steps, show=self.is_main)

    def run(self) -> None:
        recipe, first = self.recipe, self._resume()
        log = self._open_log(first)
        for step in range(first, recipe.steps):
            metrics = self.step(step)
            self.progress.update(metrics)
            if log:
                print(json.dumps(metrics), file=log, flush=True)
            done = step + 1
            if done == recipe.steps or (recipe.save_every and done % recipe.save_every == 0):
                self.save(done)
        self._report()
        if log:
            log.close()

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step. Returns its metrics, equal on every rank but for the times."""
        began = time.perf_counter()
        self.mesh.ledger.clear()
        layout = self.mesh.layout
        data = self.batches.micro_batches(step, self.mesh["dp"].index, layout.dp, layout.micro_batch)
        data = [(tokens.to(self.mesh.device), labels.to(self.mesh.device)) for tokens, labels in data]
        scale = self.scaler.scale
        loss, squared_norm = self.engine.forward_backward(data, scale).tolist()
        accepted = self.scaler.accepts(squared_norm)
        if accepted and not (math.isfinite(loss) and math.isfinite(squared_norm)):
            raise UserError(
                f"the loss is no longer finite at step {step + 1} (loss {loss}): try a lower --lr or a longer --warmup"
            )
        norm, rate = None, 0.0
        if accepted:
            norm, rate = self.optimizer.step(step, squared_norm, scale)
        self.sent = self.mesh.ledger.rows()
        if accepted and self.model.experts is not None:
            self.engine.balance_experts()
        seconds = time.perf_counter() - began
        self.step_times.append(seconds)
        per_second = self.recipe.workload.tokens / seconds
        mfu = per_second * self.flops_per_token / (self.peak_flops * layout.world) if self.peak_flops else None
        return {
            "step": step + 1,
            "loss": loss,
            "grad_norm": norm,
            "lr": rate,
            "step_time_s": seconds,
            "tokens_per_s": per_second,
            "mfu": mfu,
            **self._experts(),
            **({"loss_scale": scale, "skipped": not accepted} if self.scaler.is_dynamic else {}),
        }

    def _experts(self) -> dict[str, float]:
        """How evenly the experts were loaded; booked on no step's traffic."""
        if self.engine.loads is None:
            return {}
        return load_metrics(*self.engine.loads, self.mesh["pp"])

    def save(self, step: int) -> None:
        about = {"recipe": self.recipe.model_dump(), "layout": str(self.mesh.layout), "model": self.model.name}
        about["loss_scale"] = self.scaler.scale
        about["buffers"] = self._all_buffers()
        path = save_checkpoint(self.recipe.out_dir / "checkpoints", step, about, self.mesh, self.optimizer)
        if self.recipe.export and step == self.recipe.steps and self.is_main:
            export_safetensors(path, self.model, Path(self.recipe.export))

    def _all_buffers(self) -> dict[str, list[float]]:
        """Of all stages."""
        mine = {name: buffer.tolist() for name, buffer in self.engine.buffers.items()}
        stages: list[Any] = [mine]
        if dist.is_initialized() and self.model.experts is not None:
            stages = [None] * self.mesh.layout.world
            dist.all_gather_object(stages, mine)
        return {name: values for stage in stages for name, values in stage.items()}

    def _resume(self) -> int:
        if not self.recipe.resume:
            return 0
        path = newest_checkpoint(self.recipe.out_dir / "checkpoints")
        if path is None:
            raise UserError(f"nothing to resume: no checkpoint in {self.recipe.out_dir / 'checkpoints'}")
        about = load_checkpoint(path, self.mesh, self.optimizer)
        saved = about["recipe"]
        changed = [f"{key} {saved[key]}" for key in SAME_DATA if saved[key] != getattr(self.recipe, key)]
        if changed:
            raise UserError(
                f"{path} was saved with {', '.join(changed)}: with another its place in the data would be lost; "
                "use the same, or start anew in another --out"
            )
        for name, buffer in self.engine.buffers.items():
            buffer.copy_(torch.tensor(about["buffers"][name], dtype=buffer.dtype))
        if self.scaler.is_dynamic:
            self.scaler.scale = float(about.get("loss_scale", self.scaler.scale))
        return int(about["step"])

    def _data(self) -> Batches:
        recipe = self.recipe
        tokenizer = load_tokenizer(recipe.tokenizer)
        check_vocabulary(tokenizer, self.model.vocab)
        path = [""]
        if self.is_main:
            with packing_progress() as progress:
                path = [str(pack(recipe.data, tokenizer, recipe.out_dir / "data", progress=progress))]
        if dist.is_initialized():
            dist.broadcast_object_list(path, src=0)
        return Batches(PackedTokens(Path(path[0]), recipe.seq), recipe.global_batch, recipe.seed)

    def _initial(self) -> Any:
        if self.recipe.init is None:
            return lambda shard: shard.of(initial_value(self.model, shard.name, shard.global_shape, self.recipe.seed))
        reader = SafetensorsReader(self.model, Path(self.recipe.init))
        return lambda shard: shard.of(reader.read(shard.name))

    def _read_buffers(self) -> None:
        if self.recipe.init is not None and self.engine.buffers:
            reader = SafetensorsReader(self.model, Path(self.recipe.init))
            for name, buffer in self.engine.buffers.items():
                buffer.copy_(reader.read(name))

    def _open_log(self, first: int) -> Any:
        if not self.is_main:
            return None
        path = self.recipe.log_path
        path.parent.mkdir(parents=True, exist_ok=True)
        if first:  # keep the steps before the checkpoint, drop those that are about to be run again
            kept = (
                [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= first]
                if path.exists()
                else []
            )
            write_text_atomically(path, "".join(line + "\n" for line in kept))
        return path.open("a" if first else "w")

    def _report(self) -> None:
        """What was measured, rank by rank, beside which `meshwright compare` puts the plan."""
        state = self.engine.state
        mine = {
            "rank": self.mesh.rank,
            "stage": self.mesh.stage,
            "tp": self.mesh["tp"].index,
            "state_bytes": {
                "parameters": sum(b.parameter_bytes for b in state.buckets),
                "gradients": sum(b.gradients.nbytes for b in state.buckets),
                "optimizer": self.optimizer.state_bytes(),
                **({"offload": state.offload.working_bytes} if state.offload else {}),
            },
            "away_bytes": state.offload.kept_bytes if state.offload else 0,
            "collectives": [
                {"axis": e.axis, "op": e.op, "group_size": e.group_size, "count": count, "bytes": nbytes}
                for e, count, nbytes in self.sent
            ],
        }
        ranks: list[Any] = [mine]
        if dist.is_initialized():
            ranks = [None] * self.mesh.layout.world
            dist.all_gather_object(ranks, mine)
        if self.is_main and self.step_times:
            warm = self.step_times[min(5, len(self.step_times) // 2) :]
            report = {
                "recipe": self.recipe.model_dump(),
                "layout": str(self.mesh.layout),
                "median_step_time_s": statistics.median(warm),
                "steps_timed": len(warm),
                "ranks": ranks,
            }
            write_text_atomically(self.recipe.out_dir / "report.json", json.dumps(report, indent=1))


def peak_flops(recipe: Recipe) -> float | None:
    """Dense peak of one accelerator in the recipe's precision: of its cluster, of the GPU that is found, of `local` on a CPU."""
    if recipe.cluster is not None:
        accelerator = load_cluster(recipe.cluster).accelerator
    elif torch.cuda.is_available():
        name = accelerator_of_device(torch.cuda.get_device_name())
        if name is None:
            return None
        accelerator = load_accelerator(name)
    else:
        accelerator = load_cluster("local").accelerator
    return accelerator.peak_flops.get(recipe.parsed_layout.precision)
