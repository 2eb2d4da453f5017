"""Records what goes between the operators of a rank: what each gives in forward, what it hands back in backward, and what it sends.

The gradient of an operator's input is what its own backward computed, so the first wrong one names the operator at fault. What goes
into a layer, and the gradient of what comes out of it, are kept too: where they are wrong and the layers on both sides are right, what
went wrong is the way between stages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from meshwright.models.decoder import Decoder, Layer
from meshwright.models.moe import Routing
from meshwright.parallel.ledger import Entry, Ledger

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
    features last: a token's heads side by side. `sent`: by ("forward" or "backward", operator), what was sent in it in the last
    micro-batch, as "all_reduce over tp"; in backward, since the gradient before."""

    outputs: dict[Place, Any] = field(default_factory=dict)
    gradients: dict[Place, Any] = field(default_factory=dict)
    sent: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)

    def map(self, function: Callable[[Any], Any]) -> Record:
        """With each tensor replaced by `function(tensor)`."""
        tensors = ({at: function(value) for at, value in part.items()} for part in (self.outputs, self.gradients))
        return Record(*tensors, self.sent)


def watch(chunks: Sequence[Decoder], ledger: Ledger) -> Record:
    """Install hooks that fill the record that is returned, during the next step. `ledger`: counts what this rank sends."""
    record, last = Record(), Counter(ledger.count)
    for chunk in chunks:
        _ChunkWatch(chunk, record, ledger, last)
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

    def __init__(self, chunk: Decoder, record: Record, ledger: Ledger, last: Counter[Entry]):
        """`last`: what had been sent when the last gradient was kept, of all chunks of the rank."""
        self.record, self.ledger, self.last = record, ledger, last
        self.micro_batch, self.is_running = -1, False
        self.before: dict[str, Counter[Entry]] = {}
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
            if not self.is_running:
                return
            self.before[name] = Counter(self.ledger.count)
            if isinstance(module, Layer):
                self._keep_output(f"{name}.input", name, given[0])
            if not name.endswith(SILENT):
                for at, value in _inputs(name, given):
                    self._keep_gradient(name, at, value)

        return hook

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if not self.is_running:
                return
            for at, value in _outputs(name, module, output):
                self._keep_output(at, name, value)
            if isinstance(module, Layer):
                self._keep_gradient(name, f"{name}.output", output)

        return hook

    def _keep_output(self, at: str, name: str, value: Tensor) -> None:
        self.record.outputs[at, self.micro_batch] = _features_last(name, value.detach()).clone()
        self.record.sent["forward", at] = _since(self.before[name], self.ledger.count)

    def _keep_gradient(self, name: str, at: str, value: Tensor) -> None:
        place = (at, self.micro_batch)

        def keep(gradient: Tensor) -> None:
            self.record.gradients[place] = _features_last(name, gradient).clone()
            self.record.sent["backward", at] = _since(self.last, self.ledger.count)
            self.last.clear()
            self.last.update(self.ledger.count)

        if value.requires_grad:
            value.register_hook(keep)


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


def _since(before: Counter[Entry], now: Counter[Entry]) -> tuple[str, ...]:
    return tuple(f"{entry.op} over {entry.axis}" for entry in sorted(now - before))
