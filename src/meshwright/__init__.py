"""Meshwright: find, price, prove and run the split of a large language model over a cluster."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshwright.api import estimate, fabric, plan

__version__ = "0.1.0"
__all__ = ["estimate", "fabric", "plan"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # loaded on first use: the command line must start quickly
        from meshwright import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
