"""AdamW on the rank's share of the state, its learning rate, and clipping by the global gradient norm."""

from __future__ import annotations

import math

import torch

from meshwright.parallel.data import DataParallel
from meshwright.train.recipe import Recipe


class Optimizer:
    """Steps the owned part of every bucket, then publishes the new parameters to the other dp ranks."""

    def __init__(self, recipe: Recipe, state: DataParallel):
        self.recipe, self.state = recipe, state
        groups = [
            {
                "params": [b.weights for b in state.buckets if b.plan.decay is decay],
                "weight_decay": recipe.weight_decay if decay else 0.0,
            }
            for decay in (True, False)
        ]
        self.adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.lr, betas=recipe.betas, fused=True)

    def step(self, step: int, squared_norm: float, loss_scale: float = 1.0) -> tuple[float, float]:
        """Update at step `step` (from 0) with gradients that are `loss_scale` times too large; `squared_norm` is not.

        Returns (gradient norm before clipping, learning rate).
        """
        norm = math.sqrt(squared_norm)
        factor = min(1.0, self.recipe.clip / norm if norm else 1.0) / loss_scale
        if factor != 1.0:
            self.state.scale_gradients(factor)
        rate = learning_rate(self.recipe, step)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.state.publish()
        return norm, rate

    def moments(self, bucket: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Both Adam moments of the owned part of a bucket, created as zeros when no step has been taken."""
        weights = self.state.buckets[bucket].weights
        held = self.adam.state[weights]
        if not held:
            held["step"] = torch.zeros((), dtype=torch.float32, device=weights.device)
            held["exp_avg"] = torch.zeros_like(weights)
            held["exp_avg_sq"] = torch.zeros_like(weights)
        return held["exp_avg"], held["exp_avg_sq"]

    def set_step(self, step: int) -> None:
        """After a resume: Adam's bias correction counts from here."""
        for index, bucket in enumerate(self.state.buckets):
            self.moments(index)
            self.adam.state[bucket.weights]["step"].fill_(step)

    def state_bytes(self) -> int:
        masters = sum(b.weights.nbytes for b in self.state.buckets if b.has_master)
        return masters + sum(t.nbytes for held in self.adam.state.values() for t in held.values())


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine down to `min_lr_ratio` of the peak at the last step."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - 1 - recipe.warmup)
    low = recipe.lr * recipe.min_lr_ratio
    return low + (recipe.lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
