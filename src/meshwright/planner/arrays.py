"""Arrays in which many layouts are priced at once: their types, what of many keys is the same, and rows of some columns."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Distinct(NamedTuple):
    """Of many keys the different ones."""

    keys: Ints
    """Ascending."""
    at: Ints
    """Where each of them is to be found."""
    which: Ints
    """Which of them each key is."""


def distinct(keys: Ints) -> Distinct:
    """What `np.unique` says, which is at home with masked arrays, too, and takes as long to load them as a small search lasts."""
    order = np.argsort(keys)
    ascending = keys[order]
    begins = np.concatenate((np.ones(min(1, len(keys)), dtype=bool), ascending[1:] != ascending[:-1]))
    which = np.empty(len(keys), dtype=np.int64)
    which[order] = np.cumsum(begins) - 1
    return Distinct(ascending[begins], order[begins], which)


A = TypeVar("A", Ints, Floats, Bools)


def taken(of: A, its: Ints) -> A:
    """`of[..., its]`, row after row in memory: an index makes an array of columns, and whatever is done with it after takes three times as
    long."""
    return of.take(its, axis=-1)
