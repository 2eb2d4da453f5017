"""Runs one step of any causal language model of `transformers`, as it is, on one device: forward, backward and AdamW on fake tensors.

The model is built from its config alone: no weights, no network. Nothing is sharded, and nothing of this project's engine takes part.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meshwright.spec.errors import UserError, choices
from meshwright.spec.huggingface import find_config
from meshwright.trace.paths import BACKWARD
from meshwright.trace.recorder import Recorder, without_collector
from meshwright.trace.result import Change, Section, StageTrace, Work

Kept = Literal["bf16", "fp32", "mixed"]
"""bf16 or fp32: weights, gradients and moments; mixed: in fp32, and computed with in bf16 (autocast)."""


@dataclass(frozen=True, slots=True)
class Plain:
    """What is run: `micro_batch` sequences of `seq` tokens, in one micro-batch. `precision`: one of `Kept`. `recompute`: the model's
    gradient checkpointing."""

    seq: int
    micro_batch: int = 1
    precision: str = "bf16"
    recompute: bool = False


def trace_huggingface(ref: str, plain: Plain) -> StageTrace:
    """The model of `ref`: a config.json, a directory that holds one, or a name of the catalogue.

    Raises UserError without `transformers`, for a config that makes no causal language model, and for one whose operators depend on
    values, which fake tensors do not have.
    """
    config = load_config(ref)
    _check(plain)
    model = skeleton(config, plain)
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            return record_step(with_memory(model), plain)
        except (torch._subclasses.fake_tensor.DataDependentOutputException, NotImplementedError, RuntimeError) as error:
            raise UserError(f"{ref}: its step cannot be run without values: {str(error).splitlines()[0]}") from None


def load_config(ref: str) -> Any:
    """A `transformers` config."""
    try:
        from transformers import AutoConfig
    except ImportError:
        raise UserError("transformers is not installed: pip install 'meshwright[hf]'") from None
    keys = find_config(ref)[0]
    if not keys.get("model_type"):
        raise UserError(f"{ref}: missing key model_type, by which transformers knows the model")
    try:
        return AutoConfig.for_model(**keys)
    except (ValueError, TypeError) as error:
        raise UserError(f"{ref}: {str(error).splitlines()[0]}") from None


def _check(plain: Plain) -> None:
    if plain.precision not in get_args(Kept):
        raise choices(plain.precision, get_args(Kept), "precision")
    if plain.seq < 1 or plain.micro_batch < 1:
        raise UserError(f"seq and micro-batch must be at least 1, got {plain.seq} and {plain.micro_batch}")


def skeleton(config: Any, plain: Plain) -> nn.Module:
    """The model on the meta device, in training mode. To be made outside of a FakeTensorMode."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if plain.precision == "bf16" else torch.float32
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise UserError(f"{config.model_type} makes no causal language model: {str(error).splitlines()[0]}") from None
    model.train()
    if plain.recompute:
        if not model.supports_gradient_checkpointing:
            raise UserError(f"{config.model_type} has no gradient checkpointing: leave out the recompute")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # version 6 renames it
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model  # type: ignore[no-any-return]


def with_memory(model: nn.Module) -> nn.Module:
    """`model` with tensors that have no values yet, and in a FakeTensorMode never will."""
    model.to_empty(device="cpu")
    model.tie_weights()  # type: ignore[operator]
    return model


def record_step(model: nn.Module, plain: Plain) -> StageTrace:
    """One step of `model` but the first: the moments are there. Its tensors are fake in a FakeTensorMode, and real outside of one."""
    recorder = Recorder()
    with ExitStack() as stack:
        stack.enter_context(without_collector())
        stack.enter_context(_as_it_runs())
        names = {parameter: name for name, parameter in model.named_parameters()}
        with recorder:
            recorder.start("build", category="buffers")
            for parameter in names:
                recorder.adopt(parameter)
            for buffer in model.buffers():
                recorder.adopt(buffer)
            optimizer = _with_moments(model)
            _classify(recorder, optimizer, names)
            recorder.stop()
            recorder.sections = [Section("state", Work([Change(storage, +1) for storage in recorder.live]), Work())]
            with recorder.paths.followed([model]):
                _step(recorder, model, optimizer, plain, names)
            recorder.stop()
    return StageTrace(0, 0, tuple(recorder.sections))


def _step(
    recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer, plain: Plain, names: dict[nn.Parameter, str]
) -> None:
    recorder.start("begin", category="data")
    tokens = torch.zeros(plain.micro_batch, plain.seq, dtype=torch.int64)
    recorder.start("forward", category="activations")
    with recorder.paths.at("loss"):
        with torch.autocast("cpu", torch.bfloat16) if plain.precision == "mixed" else nullcontext():
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        recorder.paths.mark(loss)
    recorder.start("backward")
    with recorder.paths.at(BACKWARD):
        loss.backward()
    for parameter, name in names.items():
        if parameter.grad is not None:
            storage = recorder.storage(parameter.grad)
            storage.category, storage.path = "gradients", _module(name)
    recorder.start("optimizer")
    with recorder.paths.at("optimizer"):
        optimizer.step()
        optimizer.zero_grad()


def _with_moments(model: nn.Module) -> torch.optim.Optimizer:
    """As the first step leaves it."""
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _classify(recorder: Recorder, optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str]) -> None:
    for parameter, name in names.items():
        held: list[Tensor] = [each for each in optimizer.state[parameter].values() if isinstance(each, Tensor)]
        for tensor, category in ((parameter, "parameters"), *((each, "optimizer") for each in held)):
            storage = recorder.storage(tensor)
            storage.category, storage.path = category, _module(name)  # type: ignore[assignment]


def _module(name: str) -> str:
    return name.rpartition(".")[0]


@contextmanager
def _as_it_runs() -> Iterator[None]:
    """Where transformers would look at values, fake tensors have none: no documents are packed into one sequence here, so that the kernels
    of attention need no mask. And the grouped product of fake tensors takes bf16 alone: the stand-in for old versions of PyTorch takes any.
    """
    from transformers import masking_utils
    from transformers.integrations import moe

    grouped, packed = moe._can_use_grouped_mm, masking_utils.find_packed_sequence_indices
    moe._can_use_grouped_mm = lambda x, weight, offs: weight.dtype is torch.bfloat16 and grouped(x, weight, offs)
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        moe._can_use_grouped_mm, masking_utils.find_packed_sequence_indices = grouped, packed
