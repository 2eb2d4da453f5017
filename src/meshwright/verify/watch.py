"""Records what goes between the modules of a rank: what each gives in forward, and what it hands back in backward.

The gradient of a module's input is what its own backward computed, so the first wrong one names the module at fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from meshwright.models.decoder import Decoder

Place = tuple[str, int]
"""(module, micro-batch of this rank)."""


@dataclass
class Record:
    """`outputs`: of modules in forward. `gradients`: of the inputs of modules, from backward. In the order of execution."""

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


def parts(chunk: Decoder) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are watched, by their names in the whole model."""
    for name in ("embedding", "norm", "head"):
        if (module := getattr(chunk, name)) is not None:
            yield name, module
    for index, layer in chunk.layers.items():
        yield f"layers.{index}", layer
        for name in ("attention", "mlp", "moe"):
            if (module := getattr(layer, name)) is not None:
                yield f"layers.{index}.{name}", module


class _ChunkWatch:
    """A chunk runs forward once for each micro-batch, in order. Modules that run while it does not are recomputed, and say nothing
    new."""

    def __init__(self, chunk: Decoder, record: Record):
        self.record, self.micro_batch, self.is_running = record, -1, False
        chunk.register_forward_pre_hook(self._begin)
        chunk.register_forward_hook(self._end)
        for name, module in parts(chunk):
            module.register_forward_pre_hook(self._entering(name))
            module.register_forward_hook(self._leaving(name))

    def _begin(self, chunk: nn.Module, given: Any) -> None:
        self.micro_batch += 1
        self.is_running = True

    def _end(self, chunk: nn.Module, given: Any, output: Tensor) -> None:
        self.is_running = False

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            if self.is_running and given[0].requires_grad:
                place = (name, self.micro_batch)
                given[0].register_hook(lambda gradient: self._keep(place, gradient))

        return hook

    def _keep(self, place: Place, gradient: Tensor) -> None:
        self.record.gradients[place] = gradient.clone()

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Tensor) -> None:
            if self.is_running:
                self.record.outputs[name, self.micro_batch] = output.detach().clone()

        return hook
