"""Step time of Meshwright beside PyTorch's own parallelism, on this machine with two gloo ranks.

    python benchmarks/peers.py [--repetitions 15] [--cases tp2,dp2,pp2] [--json PATH]

Both sides train the same decoder on the same tokens in the same two processes, one thread each; a step is forward,
backward and gradient reduction, without optimizer. Before anything is timed, their losses and gradients must agree.
Repetitions interleave (A B, B A, A B, ...), so that a slow moment of the machine falls on both: read the ratios, not the
milliseconds.

The other side is set up as its own documentation does, and where there was a choice, the faster way:
  tp2     parallelize_module: torchtitan's Llama 3 plan, with vocab-parallel embedding and loss; one way in for q, k, v and
          one for gate, up. It leaves the norms' gradients as partial sums, which its step here completes.
  dp2     DistributedDataParallel with gradient_as_bucket_view.
  pp2     PipelineStage and Schedule1F1B on the same split of layers; the loss is scaled instead of the gradients.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from meshwright.models.decoder import Decoder, cross_entropy
from meshwright.models.init import initial_value
from meshwright.parallel.apply import Engine, apply
from meshwright.parallel.mesh import build_mesh
from meshwright.parallel.ranks import RankPool
from meshwright.schedule.stages import stage_chunks
from meshwright.spec.model import Model
from meshwright.spec.notation import parse_layout
from meshwright.spec.shards import Shard as ModelShard
from meshwright.spec.workload import Workload
from pairs import Paired, Times, interleaved, print_environment, slowest, write

RANKS = 2
TOLERANCE = 1e-4
"""Relative distance of losses and of each parameter's gradient; both sides sum in fp32, in different orders."""
SEQ = 1024
MODEL = Model(
    name="llama-512x8",
    family="llama",
    layers=8,
    hidden=512,
    ffn=1408,
    vocab=512,
    heads=8,
    kv_heads=4,
    head_dim=64,
    max_positions=SEQ,
)

Batch = list[tuple[Tensor, Tensor]]
"""This rank's micro-batches: token ids and labels, each [1, SEQ]."""


@dataclass(frozen=True)
class Case:
    """One comparison. `target`: the most that ours / theirs may be."""

    name: str
    layout: str
    micro_batches: int
    peer: str
    target: float

    @property
    def family(self) -> str:
        return (
            "zero"
            if "zero" in self.layout
            else "schedules"
            if ":1f1b" not in self.layout and "pp2" in self.layout
            else self.layout[:3]
        )


FAMILIES = ("tp2", "dp2", "pp2", "schedules", "zero")

CASES = (
    Case("tp2", "tp2 mb1 fp32", 1, "parallelize_module", 0.70),
    Case("tp2:sp", "tp2:sp mb1 fp32", 1, "parallelize_module", 0.70),
    Case("dp2", "dp2 mb1 fp32", 1, "DistributedDataParallel", 1.0),
    Case("pp2:1f1b, 4 micro-batches", "pp2:1f1b mb1 fp32", 4, "Schedule1F1B", 1.05),
    Case("pp2:1f1b, 8 micro-batches", "pp2:1f1b mb1 fp32", 8, "Schedule1F1B", 1.05),
    Case("pp2:gpipe, 4 micro-batches", "pp2:gpipe mb1 fp32", 4, "ScheduleGPipe", 1.05),
    Case("pp2x2:interleaved, 4 micro-batches", "pp2x2:interleaved mb1 fp32", 4, "ScheduleInterleaved1F1B", 1.05),
    Case("pp2x2:zb-v, 4 micro-batches", "pp2x2:zb-v mb1 fp32", 4, "ScheduleZBVZeroBubble", 1.05),
    Case("pp2x2:dualpipe-v, 4 micro-batches", "pp2x2:dualpipe-v mb1 fp32", 4, "ScheduleDualPipeV", 1.05),
    Case("dp2:zero2", "dp2:zero2 mb1 fp32", 1, "fully_shard, kept after forward", 1.0),
    Case("dp2:zero3", "dp2:zero3 mb1 fp32", 1, "fully_shard", 1.0),
)


@dataclass
class Side:
    """`step` returns this rank's part of the mean loss: the parts sum to it. `gradients` are by global name."""

    step: Callable[[], Tensor]
    gradients: Callable[[], dict[str, Tensor]]


@dataclass
class Result(Paired):
    case: Case


# --- the two sides ----------------------------------------------------------------------------------------------------


def ours(case: Case, batch: Batch) -> tuple[Side, Engine]:
    layout = parse_layout(case.layout)
    workload = Workload(SEQ, layout.dp * case.micro_batches)
    engine = apply(MODEL, workload, build_mesh(layout, MODEL, torch.device("cpu")), initial_shard)

    def step() -> Tensor:
        loss = engine.gradients(batch) / layout.tp
        if layout.zero:
            engine.state.publish()
        return loss

    return Side(step, lambda: {shard.name: gradient for shard, gradient in engine.state.whole_gradients()}), engine


def tensor_parallel_peer(case: Case, batch: Batch) -> Side:
    sequence = case.layout.startswith("tp2:sp")
    decoder = initialised(Decoder(MODEL))
    parallelize_module(decoder, init_device_mesh("cpu", (RANKS,)), tensor_parallel_plan(sequence))
    ((tokens, labels),) = batch

    def step() -> Tensor:
        decoder.zero_grad()
        with loss_parallel():
            loss = F.cross_entropy(decoder(tokens).flatten(0, 1), labels.flatten())
            loss.backward()
        for parameter in decoder.parameters():
            if isinstance(parameter, DTensor) and parameter.grad.placements != parameter.placements:
                parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
        return whole(loss.detach()) / RANKS

    return Side(step, lambda: {name: whole(gradient) for name, gradient in gradients_of(decoder).items()})


def tensor_parallel_plan(sequence: bool) -> dict[str, ParallelStyle]:
    """By module path. The residual stream is cut along the sequence with sequence parallel, else whole on each rank."""
    stream = Shard(1) if sequence else Replicate()
    enter = PrepareModuleInput(input_layouts=stream, desired_input_layouts=Replicate())
    plan: dict[str, ParallelStyle] = {
        "embedding.tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=stream),
        "head": ColwiseParallel(input_layouts=stream, output_layouts=Shard(-1), use_local_output=False),
        "layers.*.attention": PrepareModuleInput(
            input_layouts=(stream, None),
            desired_input_layouts=(Replicate(), None),  # the second says where the tokens stand
        ),
        "layers.*.attention.qkv.*": ColwiseParallel(),
        "layers.*.attention.out": RowwiseParallel(output_layouts=stream),
        "layers.*.mlp": enter,
        "layers.*.mlp.gate_up.*": ColwiseParallel(),
        "layers.*.mlp.down": RowwiseParallel(output_layouts=stream),
    }
    if sequence:
        plan |= dict.fromkeys(("layers.*.attention_norm", "layers.*.mlp_norm", "norm"), SequenceParallel())
    return plan


def data_parallel_peer(case: Case, batch: Batch) -> Side:
    decoder = initialised(Decoder(MODEL))
    replicated = DistributedDataParallel(decoder, gradient_as_bucket_view=True)
    ((tokens, labels),) = batch

    def step() -> Tensor:
        replicated.zero_grad()
        loss = F.cross_entropy(replicated(tokens).flatten(0, 1), labels.flatten())
        loss.backward()
        return loss.detach() / RANKS

    return Side(step, lambda: gradients_of(decoder))


def pipeline_peer(case: Case, batch: Batch) -> Side:
    layout = parse_layout(case.layout)
    chunks = stage_chunks(MODEL.layers, layout)[dist.get_rank()]
    decoders = [initialised(Decoder(MODEL, c.layers, first=c.first, last=c.last)) for c in chunks]
    places, device = RANKS * layout.chunks, torch.device("cpu")
    stages = [PipelineStage(d, c.place, places, device) for d, c in zip(decoders, chunks, strict=True)]
    first, last = any(c.first for c in chunks), any(c.last for c in chunks)
    tokens, labels = (torch.cat(parts) for parts in zip(*batch, strict=True))
    schedule = getattr(pipelining, case.peer)(
        stages[0] if layout.chunks == 1 else stages,
        len(batch),
        loss_fn=lambda logits, target: cross_entropy(logits, target) / labels.numel(),
        scale_grads=False,
    )

    def step() -> Tensor:
        for decoder in decoders:
            decoder.zero_grad()
        losses: list[Tensor] = []
        schedule.step(*([tokens] if first else []), target=labels if last else None, losses=losses, return_outputs=False)
        return torch.stack(losses).sum().detach() if last else torch.zeros(())

    def gradients() -> dict[str, Tensor]:
        return {name: gradient for decoder in decoders for name, gradient in gradients_of(decoder).items()}

    return Side(step, gradients)


def sharded_peer(case: Case, batch: Batch) -> Side:
    decoder = initialised(Decoder(MODEL))
    reshard = case.peer == "fully_shard"
    for layer in decoder.layers.values():
        fully_shard(layer, reshard_after_forward=reshard)
    fully_shard(decoder, reshard_after_forward=reshard)
    ((tokens, labels),) = batch

    def step() -> Tensor:
        decoder.zero_grad()
        loss = F.cross_entropy(decoder(tokens).flatten(0, 1), labels.flatten())
        loss.backward()
        return loss.detach() / RANKS

    return Side(step, lambda: {name: whole(gradient) for name, gradient in gradients_of(decoder).items()})


PEERS = {
    "parallelize_module": tensor_parallel_peer,
    "DistributedDataParallel": data_parallel_peer,
    **dict.fromkeys(
        ("Schedule1F1B", "ScheduleGPipe", "ScheduleInterleaved1F1B", "ScheduleZBVZeroBubble", "ScheduleDualPipeV"),
        pipeline_peer,
    ),
    "fully_shard": sharded_peer,
    "fully_shard, kept after forward": sharded_peer,
}


def initialised(decoder: Decoder) -> Decoder:
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(initial_value(MODEL, name, tuple(parameter.shape), seed=0))
    return decoder


def initial_shard(shard: ModelShard) -> Tensor:
    return shard.of(initial_value(MODEL, shard.name, shard.global_shape, seed=0))


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# --- on each rank -----------------------------------------------------------------------------------------------------


def measure(case: Case, repetitions: int) -> Times:
    """This rank's step times of both sides. Raises AssertionError unless both compute the same."""
    torch.set_num_threads(1)
    batch = local_batch(case)
    (mine, engine), theirs = ours(case, batch), PEERS[case.peer](case, batch)
    check_same_work(mine, theirs, engine)
    return interleaved(mine.step, theirs.step, repetitions)


def local_batch(case: Case) -> Batch:
    """Every axis but dp sees the same tokens on both ranks."""
    generator = torch.Generator().manual_seed(dist.get_rank() if parse_layout(case.layout).dp > 1 else 0)
    draws = [torch.randint(0, MODEL.vocab, (1, SEQ), generator=generator) for _ in range(2 * case.micro_batches)]
    return list(zip(draws[::2], draws[1::2], strict=True))


def check_same_work(mine: Side, theirs: Side, engine: Engine) -> None:
    losses = torch.stack([side.step().double() for side in (mine, theirs)])
    dist.all_reduce(losses)
    assert_close("the loss", losses[0], losses[1])
    expected, got = theirs.gradients(), mine.gradients()
    by_name = {shard.name: shard for bucket in engine.state.buckets for shard in bucket.plan.shards}
    assert got.keys() == expected.keys() == by_name.keys()
    for name, gradient in got.items():
        assert_close(f"the gradient of {name}", gradient, by_name[name].of(expected[name]))


def assert_close(what: str, got: Tensor, expected: Tensor) -> None:
    distance = float((got - expected).norm() / expected.norm())
    if not distance <= TOLERANCE:
        raise AssertionError(
            f"{what} differs by {distance:.1e}, more than {TOLERANCE:.0e}: the two sides do not do the same work"
        )


# --- report -----------------------------------------------------------------------------------------------------------


def run_case(pool: RankPool, case: Case, repetitions: int) -> Result:
    ranks = pool.run(measure, RANKS, case, repetitions, timeout=3600.0)
    return Result(case, **slowest(ranks))


def environment() -> dict[str, str | int]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 0,
        "ranks": RANKS,
        "threads per rank": 1,
        "backend": "gloo",
        "load before": f"{os.getloadavg()[0]:.1f}",
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def show(results: list[Result], about: dict[str, str | int]) -> None:
    table = Table(title=f"Step time, {MODEL.name}, {SEQ:,} tokens a micro-batch, fp32")
    for heading in ("case", "against", "ours ms", "theirs ms", "ratio of medians", "middle half of pairs", "at most"):
        table.add_column(heading, justify="left" if heading in ("case", "against") else "right")
    for result in results:
        case = result.case
        colour = "green" if result.ratio <= case.target else "red"
        ratio = f"[{colour}]{result.ratio:.3f}[/]"
        table.add_row(case.name, case.peer, *result.milliseconds, ratio, result.spread, f"{case.target:.2f}")
    console = Console(width=120)
    console.print(table)
    console.print(
        f"{MODEL.layers} layers, hidden {MODEL.hidden}, {MODEL.heads} heads, {MODEL.kv_heads} key-value heads, "
        f"ffn {MODEL.ffn}, vocabulary {MODEL.vocab}; a step is forward, backward and gradient reduction"
    )
    print_environment(console, about)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=15, help="pairs of timed steps, at least 2")
    parser.add_argument("--cases", default=",".join(FAMILIES), help="comma-separated; all but dp2 are several cases each")
    parser.add_argument("--json", type=Path, help="write raw times here")
    options = parser.parse_args(arguments)
    wanted = tuple(options.cases.split(","))
    if unknown := set(wanted) - set(FAMILIES):
        parser.error(f"unknown cases {', '.join(sorted(unknown))}; legal: {', '.join(FAMILIES)}")
    if options.repetitions < 2:
        parser.error(f"a spread needs at least 2 repetitions, got {options.repetitions}")
    about = environment()
    pool = RankPool()
    try:
        results = [run_case(pool, case, options.repetitions) for case in CASES if case.family in wanted]
    finally:
        pool.close()
    show(results, about)
    if options.json:
        write(options.json, about, results, model=asdict(MODEL), seq=SEQ)


if __name__ == "__main__":
    main(sys.argv[1:])
