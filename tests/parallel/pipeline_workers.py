"""What ranks do in the tests of the pipeline: run a small model by a schedule, and again in one piece. Imported by the rank processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.models.attention import Where
from meshwright.parallel.collectives import Group
from meshwright.parallel.ledger import Ledger
from meshwright.parallel.linear import Linear, WeightGradients
from meshwright.parallel.pipeline import MicroBatch, Pipeline, Step
from meshwright.schedule.orders import make_schedule

VOCAB, WIDTH, ROWS, LENGTH = 11, 6, 2, 3


class Block(nn.Module):
    """What stands at one place of the model. Its residual output is saved by nothing."""

    def __init__(self, place: int, places: int):
        super().__init__()
        torch.manual_seed(place)
        self.embedding = nn.Embedding(VOCAB, WIDTH) if place == 0 else None
        self.linear: nn.Module = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False) if place == places - 1 else None
        self.double()

    def forward(self, x: Tensor, where: Where) -> Tensor:
        x = self.embedding(x) if self.embedding is not None else x
        # A micro-batch that met the wrong `where` would show.
        x = x + torch.tanh(self.linear(x)) * where.positions(x.shape[1], x.device)[:, None]
        return x if self.head is None else self.head(x)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


class Slot:
    """Keeps a weight's gradient, and notes when a product comes."""

    def __init__(self, weight: Tensor, log: list[str], chunk: int):
        self.gradient, self.log, self.chunk = torch.zeros_like(weight), log, chunk

    def add_product(self, grad_TO: Tensor, x_TI: Tensor) -> None:
        self.gradient += grad_TO.t() @ x_TI
        self.log.append(f"W.{self.chunk}")

    def add_products(self, grad_nO: Tensor, x_nI: Tensor, counts: Any) -> None:
        raise NotImplementedError


def data_of(micro_batches: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(7)
    out = []
    for i in range(micro_batches):
        tokens, labels = torch.randint(0, VOCAB, (2, ROWS, LENGTH), generator=generator)
        out.append(MicroBatch(tokens, labels, Where(positions_L=torch.arange(LENGTH) + i, length=LENGTH + i)))
    return out


def run_schedules(shapes: list[tuple[Any, ...]], steps: int = 1) -> list[dict[str, Any]]:
    return [run_schedule(*shape, steps=steps) for shape in shapes]


def run_schedule(
    name: str, stages: int, micro_batches: int, chunks: int, paired: bool = False, *, steps: int = 1
) -> dict[str, Any]:
    """Two figures and two lists: the largest error of a gradient, loss and expected loss, what ran, what the schedule says. Two chunks
    of a pair run at the same time, so then both lists are sorted by chunk."""
    rank = dist.get_rank()
    schedule = make_schedule(name, stages, micro_batches, chunks, paired)
    places = stages * chunks
    weights, log = WeightGradients(), []
    group = Group("pp", tuple(range(stages)), rank, dist.group.WORLD, Ledger())
    blocks = [Block(place, places) for place in schedule.placement[rank]]
    slots = []
    for chunk, block in enumerate(blocks):
        slots.append(Slot(block.linear.weight, log, chunk))
        weights.keep(block.linear.weight, slots[-1])
        block.linear = Linear(block.linear, weights)
        block.register_forward_hook(lambda _, __, out, chunk=chunk: noted(out, log, chunk))
    pipeline = Pipeline(blocks, schedule, group, loss_of, (ROWS, LENGTH, WIDTH), torch.float64, weights)
    data, scale = data_of(micro_batches), torch.tensor(0.25, dtype=torch.float64)
    for _ in range(steps):
        log.clear()
        loss = pipeline.run(data, scale)
    whole, expected = in_one_piece(places, data, scale)
    errors = []
    for place, block, slot in zip(schedule.placement[rank], blocks, slots, strict=True):
        mine = {n: p.grad for n, p in block.named_parameters() if n != "linear.weight"} | {"linear.weight": slot.gradient}
        errors += [(mine[n] / steps - p.grad).abs().max().item() for n, p in whole[place].named_parameters()]
    return {
        "error": max(errors),
        "loss": loss.item(),
        "expected": expected.item() if places - 1 in schedule.placement[rank] else 0.0,
        "ran": sorted(log, key=chunk_of) if paired else log,
        "planned": sorted(planned(schedule.actions[rank]), key=chunk_of) if paired else planned(schedule.actions[rank]),
    }


def chunk_of(noticed: str) -> str:
    return noticed.rpartition(".")[2]


def noted(out: Tensor, log: list[str], chunk: int) -> None:
    """Note a forward, and its backward when that comes by."""
    log.append(f"F.{chunk}")
    out.register_hook(lambda _: log.append(f"I.{chunk}"))


def planned(actions: Any) -> list[str]:
    """What the model notices of a stage's actions: each chunk counts its micro-batches itself."""
    notices = {"F": ("F",), "B": ("I", "W"), "I": ("I",), "W": ("W",)}
    return [f"{what}.{a.chunk}" for a in actions if a.kind.is_compute for what in notices[a.kind.value]]


def in_one_piece(places: int, data: list[MicroBatch], scale: Tensor) -> tuple[list[Block], Tensor]:
    blocks = [Block(place, places) for place in range(places)]
    total = torch.zeros((), dtype=torch.float64)
    for tokens, labels, where in data:
        x = tokens
        for block in blocks:
            x = block(x, where)
        loss = loss_of(x, labels) * scale
        loss.backward()
        total += loss.detach()
    return blocks, total


def left_over(*shape: Any) -> dict[str, int]:
    """What a step still holds when it is over, and the most sent tensors that it kept."""
    held: dict[str, int] = {}
    drain = Step.drain

    def watch(step: Step) -> None:
        held["leaving"] = len(step.leaving)
        drain(step)
        held.update(
            {
                what: len(getattr(step, what))
                for what in ("inputs", "gradients", "graphs", "deferred", "outgoing", "arriving")
            }
        )

    Step.drain = watch  # type: ignore[method-assign]
    try:
        run_schedule(*shape)
    finally:
        Step.drain = drain  # type: ignore[method-assign]
    return held
