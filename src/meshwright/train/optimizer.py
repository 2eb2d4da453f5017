"""AdamW on the rank's share of the state, its learning rate, and clipping by the global gradient norm."""

from __future__ import annotations

import math

import torch
from torch.optim.adamw import adamw

from meshwright.parallel.bucket import AdamState, FlatBucket
from meshwright.parallel.data import DataParallel
from meshwright.train.recipe import Recipe

EPSILON = 1e-8
"""Added to the root of the second moment (Kingma and Ba 2015, arXiv 1412.6980, section 2)."""


class Optimizer:
    """Steps the owned part of every bucket, one after the other, then publishes the new parameters to the other dp ranks."""

    def __init__(self, recipe: Recipe, state: DataParallel):
        self.recipe, self.state = recipe, state
        self.counters = {bucket: torch.zeros((), dtype=torch.float32, device=bucket.device) for bucket in state.buckets}
        """Steps taken, which Adam's bias correction counts, beside each tensor as its fused kernel wants them."""

    def step(self, step: int, squared_norm: float, loss_scale: float = 1.0) -> tuple[float, float]:
        """Update at step `step` (from 0) with gradients that are `loss_scale` times too large; `squared_norm` is not.

        Returns (gradient norm before clipping, learning rate).
        """
        norm = math.sqrt(squared_norm)
        factor = min(1.0, self.recipe.clip / norm if norm else 1.0) / loss_scale
        rate = learning_rate(self.recipe, step)
        for bucket, state in self.state.states():
            self._update(bucket, state, bucket.update_gradients(factor), rate)
        self.state.publish()
        return norm, rate

    def set_step(self, step: int) -> None:
        """After a resume: Adam's bias correction counts from here."""
        for counter in self.counters.values():
            counter.fill_(step)

    def state_bytes(self) -> int:
        """Of masters, moments and counters that this rank's device holds."""
        return sum(bucket.optimizer_bytes for bucket in self.counters) + sum(c.nbytes for c in self.counters.values())

    def _update(self, bucket: FlatBucket, state: AdamState, gradients: torch.Tensor, rate: float) -> None:
        beta1, beta2 = self.recipe.betas
        adamw(
            [state.weights],
            [gradients],
            [state.exp_avg],
            [state.exp_avg_sq],
            [],
            [self.counters[bucket]],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=rate,
            weight_decay=self.recipe.weight_decay if bucket.plan.decay else 0.0,
            eps=EPSILON,
            maximize=False,
        )


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine down to `min_lr_ratio` of the peak at the last step."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - 1 - recipe.warmup)
    low = recipe.lr * recipe.min_lr_ratio
    return low + (recipe.lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
