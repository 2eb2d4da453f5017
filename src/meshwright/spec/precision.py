"""The dtypes of the training state, and so its bytes per element: the one source for the engine and for the cost model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from meshwright.spec.layout import Layout, Precision

WIDTH: dict[Precision, int] = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2, "fp4": 2}
"""Bytes of an element that is kept. fp8 and fp4 keep bf16: their linears make narrower factors as they need them."""
NARROW: tuple[Precision, ...] = ("fp8", "fp4")
"""bf16 but for the products of linears."""
NARROW_MULTIPLE = 16
"""By which both sizes of a linear must divide to be multiplied so (torch._scaled_mm)."""
UNRUN: tuple[Precision, ...] = ("fp4",)
"""Priced and planned, not built: see `legality.refuse_unrun`."""


@dataclass(frozen=True, slots=True)
class StateDtypes:
    """Of one kind of parameters: computed in, kept in, gradients summed and reduced in, and the optimizer's arithmetic and moments.

    Parameters that are kept narrower than `update` have a master copy in it.
    """

    compute: Precision
    parameter: Precision
    gradient: Precision
    update: Precision

    @classmethod
    def of(cls, layout: Layout, *, cast: bool = True) -> StateDtypes:
        """Of matrices, where `cast`; else of what stays in the compute dtype: vectors and routers, which are next to nothing in
        bytes, and which a cast at every use would cost a kernel each."""
        compute = layout.precision
        update: Precision = "fp32" if WIDTH[compute] < WIDTH["fp32"] else compute
        parameter = layout.parameter_dtype if cast and layout.parameter_dtype is not None else compute
        return cls(compute, parameter, layout.gradient_dtype or update, update)

    @property
    def has_master(self) -> bool:
        return self.parameter != self.update

    @property
    def is_cast(self) -> bool:
        """Whether parameters are kept in another dtype than they are computed in."""
        return self.parameter != self.compute


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes per parameter element. `master` is 0 where the parameters are their own master copy.

    With nothing else said, bf16 and fp16 keep gradients, master weights and both Adam moments in fp32: 2 + 4 + 12 = 18 bytes a
    parameter (Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1, with fp32 gradient accumulation as in Megatron).
    """

    parameter: int
    gradient: int
    master: int
    moments: int
    compute: int
    """Of a parameter where it is computed with."""

    @classmethod
    def of(cls, layout: Layout, *, cast: bool = True) -> StateBytes:
        """See `StateDtypes.of`."""
        return _state_bytes(layout.precision, layout.parameter_dtype if cast else None, layout.gradient_dtype)

    @property
    def optimizer(self) -> int:
        return self.master + self.moments


@lru_cache(maxsize=64)
def _state_bytes(compute: Precision, parameter: Precision | None, gradient: Precision | None) -> StateBytes:
    """Asked for every bucket of every layout of a search."""
    dtypes = StateDtypes.of(Layout(precision=compute, parameter_dtype=parameter, gradient_dtype=gradient))
    update = WIDTH[dtypes.update]
    return StateBytes(
        parameter=WIDTH[dtypes.parameter],
        gradient=WIDTH[dtypes.gradient],
        master=update if dtypes.has_master else 0,
        moments=2 * update,
        compute=WIDTH[dtypes.compute],
    )


STATE_BYTES: dict[Precision, StateBytes] = {precision: StateBytes.of(Layout(precision=precision)) for precision in WIDTH}
"""With nothing but the compute precision said."""


def kept_in(precision: Precision) -> Precision:
    """The precision of everything but the products of linears."""
    return "bf16" if precision in NARROW else precision
