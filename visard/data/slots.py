"""Memory for batches that loader processes write and the training process reads: no copy, no fresh pages.

In: how many batches of how many crops. Out: `Slots`; the training process reserves a slot for each task it gives out,
a loader process writes the crops there, and the slot is free again when nothing refers to the batch any more. Sending
tensors through a queue instead takes a file, a connection and fresh pages for each of them: 80 us a crop (112 px).
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections import deque
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np

from visard.records import UInt8Array


class Slots:
    """So many places for a batch of crops in shared memory. Pickles into a process that is being started, only.

    Args:
        count: slots.
        images: crops a slot has room for.
        size: S, pixels.
    """

    def __init__(self, count: int, images: int, size: int) -> None:
        self._shape = (count, images, size, size, 3)
        # The crops begin at an odd address, see `decode.crops`.
        self._memory = RawArray(ctypes.c_ubyte, 1 + math.prod(self._shape))
        self._free = deque(range(count))
        self._reserved: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {"_shape": self._shape, "_memory": self._memory}  # who has which slot is known where they are given out

    def reserve(self, images: int) -> int | None:
        """A slot for so many crops; None if they do not fit or none is free: the batch then has memory of its own."""
        if images > self._shape[1] or not self._free:
            return None
        slot = self._free.popleft()
        self._reserved.add(slot)
        return slot

    def reclaim(self) -> None:
        """Frees what was reserved and not handed out; only while no process has a task left."""
        self._free.extend(self._reserved)
        self._reserved.clear()

    def rows(self, slot: int, images: int) -> UInt8Array:
        """(images, S, S, 3) uint8: the first crops of a slot, at an odd address as those of `decode.crops`."""
        return np.frombuffer(self._memory, np.uint8)[1:].reshape(self._shape)[slot, :images]

    def hand_out(self, slot: int, images: int) -> UInt8Array:
        """`rows`, which keep their slot until the last tensor or array on them is gone."""
        rows = self.rows(slot, images)
        self._reserved.remove(slot)
        weakref.finalize(rows, self._free.append, slot).atexit = False
        return rows
