"""How many bytes of tensors a computation holds at once, counted as torch makes and frees them, on any device.

In: a computation inside `with LiveBytes(...)`. Out: bytes that are alive now, and the most there were.
Every storage that an operator returns is counted once, from its making to its end; what kernels use within themselves
and what an allocator rounds up or keeps is not seen. With torch's fake tensors nothing is computed or allocated, so
that a network of a thousand layers is counted in seconds.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

IntArray = NDArray[np.int64]

GIB = 2**30

SMALL, LARGE = 2, 4
"""Batches at which a network is counted: batch norm of vectors needs two images."""


class LiveBytes(TorchDispatchMode):
    """Counts storages that come into being inside the block.

    Args:
        but: tensors whose storages are not counted, even where an operator returns them (weights written in place).

    Attributes:
        now: bytes alive.
        peak: the most so far.
        peak_with_aside: the most of both what is counted and what was set aside.
        history: `now` and the bytes set aside after every new storage, in order.
    """

    def __init__(self, but: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.peak_with_aside = self._aside = 0
        self.history: list[tuple[int, int]] = []
        self._apart: set[int] = set()
        self._known = {tensor.untyped_storage()._cdata for tensor in but}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        self.peak_with_aside = max(self.peak_with_aside, self.now + self._aside)
        self.history.append((self.now, self._aside))
        weakref.finalize(storage, self._gone, key, size)

    def set_aside(self, tensor: Tensor) -> None:
        """From now on the tensor is not counted in `now`, for good."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._known and storage._cdata not in self._apart:
            self._apart.add(storage._cdata)
            self.now -= storage.nbytes()
            self._aside += storage.nbytes()

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        if key in self._apart:
            self._apart.discard(key)
            self._aside -= size
        else:
            self.now -= size


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each storage once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def worst_lines(small: IntArray, large: IntArray) -> tuple[tuple[float, float], ...]:
    """Bytes at `SMALL` and `LARGE` images, by moment -> (constant, an image) of those that are the worst for some."""
    each = (large - small) / (LARGE - SMALL)
    lines = np.unique(np.stack([each, small - SMALL * each], axis=1), axis=0)
    # Of equal slopes the last is the highest. From the steepest down, a line is worth keeping while it is above the
    # next steeper one at one image, and above their crossing with the one before.
    steepest_first = {float(slope): float(constant) for slope, constant in lines}
    hull: list[tuple[float, float]] = []
    for slope, constant in reversed(steepest_first.items()):
        if hull and constant + slope <= hull[-1][0] + hull[-1][1]:
            continue
        while len(hull) > 1 and _crossing((constant, slope), hull[-2]) >= _crossing(hull[-1], hull[-2]):
            hull.pop()
        hull.append((constant, slope))
    return tuple(hull)


def _crossing(flatter: tuple[float, float], steeper: tuple[float, float]) -> float:
    """The batch from which the steeper line is above."""
    return (flatter[0] - steeper[0]) / (steeper[1] - flatter[1])
