"""Which module is at work, in backward too.

Forward is followed by hooks of modules. For backward every node of autograd's graph is marked with the module in whose forward it was
made: when a module ends, the nodes between its output and what is marked already are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

_KEY = "meshwright.path"


class Paths:
    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._stack: list[str] = [""]
        self._last = ""
        self._put_off: str | None = None

    @contextmanager
    def followed(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Inside, the modules below these are followed."""
        for root in modules:
            self._names |= {id(module): name for name, module in root.named_modules() if name}
        hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def at(self, path: str) -> Iterator[None]:
        """Where no module is at work, `path` is."""
        before, self._stack = self._stack, [path]
        self._last = path
        try:
            yield
        finally:
            self._stack = before

    def resume(self, path: str, work: Callable[[], None]) -> None:
        """Do what was put off at `path`."""
        self._put_off = path
        try:
            work()
        finally:
            self._put_off = None

    @property
    def in_backward(self) -> bool:
        """Whether autograd is at work, or products that it put off are; forward run again by it does not count."""
        return len(self._stack) == 1 and self._stack[0] == BACKWARD

    @property
    def here(self) -> str:
        if len(self._stack) > 1 or self._stack[0] != BACKWARD:
            return self._stack[-1]
        if self._put_off is not None:
            return self._put_off
        node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
        if node is not None:
            self._last = node.metadata.get(_KEY, self._last)
        return self._last

    def mark(self, tree: Any) -> None:
        """The nodes behind these tensors that are not marked yet are of the module that is at work."""
        nodes = [leaf.grad_fn for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
        while nodes:
            node = nodes.pop()
            if _KEY not in node.metadata:
                node.metadata[_KEY] = self._stack[-1]
                nodes += [before for before, _ in node.next_functions if before is not None]

    def _enter(self, module: nn.Module, args: Any) -> None:
        if (name := self._names.get(id(module))) is not None:
            self.mark(args)
            self._stack.append(name)

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        if id(module) in self._names:
            self.mark(out)
            self._stack.pop()


BACKWARD = "backward"
"""The path of an action that is a backward, outside of modules."""
