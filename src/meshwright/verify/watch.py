"""Records what goes between the operators of a rank: what each gives in forward, and what it hands back in backward.

The gradient of an operator's input is what its own backward computed, so the first wrong one names the operator at fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from meshwright.models.decoder import Decoder
from meshwright.models.moe import Routing

Place = tuple[str, int]
"""(operator, micro-batch of this rank)."""

ENDS = ("embedding", "norm", "head")
OPERATORS = (
    "attention_norm", "attention.qkv", "attention.q", "attention.q_down", "attention.q_up", "attention.kv_down", "attention.kv_up",
    "attention.core", "attention.out", "mlp_norm", "mlp.gate_up", "mlp.down", "moe.router", "moe.dispatch", "moe.shared.gate_up",
    "moe.shared.down", "moe",
)  # fmt: skip
"""Of a layer, as far as it has them. What is left out computes nothing that these do not show."""

SILENT = (".q_up", ".kv_up", ".router", ".dispatch")
"""Whose inputs' gradients are not those of one process on every rank. The first two read what all tensor-parallel ranks hold, each
for its own heads, so each has a part of a sum that is taken later; the others may share a tensor with the shared expert. What goes
wrong in them shows in what they read from."""


@dataclass
class Record:
    """`outputs`: of operators in forward. `gradients`: of the inputs of operators, from backward. In the order of execution, with the
    features last: a token's heads side by side."""

    outputs: dict[Place, Any] = field(default_factory=dict)
    gradients: dict[Place, Any] = field(default_factory=dict)

    def map(self, function: Callable[[Any], Any]) -> Record:
        """With each tensor replaced by `function(tensor)`."""
        return Record(*({at: function(value) for at, value in part.items()} for part in (self.outputs, self.gradients)))


def watch(chunks: Sequence[Decoder]) -> Record:
    """Install hooks that fill the record that is returned, during the next step."""
    record = Record()
    for chunk in chunks:
        _ChunkWatch(chunk, record)
    return record


def operators(chunk: Decoder) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are watched, by their names in the whole model."""
    for name in ENDS:
        if (module := getattr(chunk, name)) is not None:
            yield name, module
    for index, layer in chunk.layers.items():
        yield f"layers.{index}", layer
        for name in OPERATORS:
            if (found := _at(layer, name)) is not None:
                yield f"layers.{index}.{name}", found


def _at(layer: nn.Module, path: str) -> nn.Module | None:
    found: Any = layer
    for part in path.split("."):
        found = getattr(found, part, None)
    return found  # type: ignore[no-any-return]


class _ChunkWatch:
    """A chunk runs forward once for each micro-batch, in order. Modules that run while it does not are recomputed, and say nothing
    new."""

    def __init__(self, chunk: Decoder, record: Record):
        self.record, self.micro_batch, self.is_running = record, -1, False
        chunk.register_forward_pre_hook(self._begin)
        chunk.register_forward_hook(self._end)
        for name, module in operators(chunk):
            module.register_forward_pre_hook(self._entering(name))
            module.register_forward_hook(self._leaving(name))

    def _begin(self, chunk: nn.Module, given: Any) -> None:
        self.micro_batch += 1
        self.is_running = True

    def _end(self, chunk: nn.Module, given: Any, output: Tensor) -> None:
        self.is_running = False

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            if self.is_running and not name.endswith(SILENT):
                for at, value in _inputs(name, given):
                    if value.requires_grad:
                        value.register_hook(self._keeper(name, (at, self.micro_batch)))

        return hook

    def _keeper(self, name: str, place: Place) -> Callable[[Tensor], None]:
        def keep(gradient: Tensor) -> None:
            self.record.gradients[place] = _features_last(name, gradient).clone()

        return keep

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if self.is_running:
                for at, value in _outputs(name, module, output):
                    self.record.outputs[at, self.micro_batch] = _features_last(name, value.detach()).clone()

        return hook


def _inputs(name: str, given: tuple[Tensor, ...]) -> Iterator[tuple[str, Tensor]]:
    """The inputs whose gradients count; of attention, queries, keys and values."""
    if name.endswith(".core"):
        yield from ((f"{name}.{letter}", value) for letter, value in zip("qkv", given, strict=False))
    else:
        yield name, given[0]


def _outputs(name: str, module: nn.Module, output: Any) -> Iterator[tuple[str, Tensor]]:
    """Linears that share an input give several; a router's are its logits."""
    if isinstance(module, nn.ModuleDict):
        yield from ((f"{name}.{part}", value) for part, value in zip(module, output, strict=True))
    else:
        yield name, output.logits_tE if isinstance(output, Routing) else output


def _features_last(name: str, value: Tensor) -> Tensor:
    """x_BHLC of attention as x_BLF."""
    return value.transpose(1, 2).flatten(2) if name.endswith(".core") else value
