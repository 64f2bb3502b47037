"""Which images make up which step: a permutation of the data set a pass, cut into batches, shared out over the ranks.

In: the data set's length, the global batch, the seed. Out: the indices of this rank's share of step k of epoch e, and
a position that is saved with the run. Step k of epoch e is the same set of images at any number of ranks.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np

from visard.data.transforms import scramble_array, stream_base
from visard.errors import UserError
from visard.records import Int64Array


class SamplerState(TypedDict):
    """Where the next step begins, and what the position is a position in."""

    epoch: int
    step: int
    length: int
    batch_global: int
    seed: int


class EpochSampler:
    """Every image once an epoch, in an order that follows from (seed, epoch).

    Global batch k is permutation[k * B : (k + 1) * B]; rank r of W takes its elements from r * B // W up to
    (r + 1) * B // W, so shares differ by one image at most. The rest that fills no batch is left out of the epoch
    (another rest each epoch) unless `drop_last` is False; shares of such a last batch may be empty. If the data set is
    smaller than one batch, the whole of it is the one step of the epoch.

    Args:
        length: N, images in the data set.
        batch_global: B, images a step over all ranks.
        seed: of the run.
        rank, world_size: this process and how many there are.
        drop_last: leave out the smaller last batch, as training does.

    Attributes:
        epoch, step: position; the step that comes next.

    Raises:
        UserError: fewer images a step than ranks.
    """

    def __init__(
        self, length: int, batch_global: int, seed: int, rank: int = 0, world_size: int = 1, *, drop_last: bool = True
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        if length < 1:
            raise UserError("the data set holds no images")
        if batch_global < 1 or min(batch_global, length) < world_size:
            raise UserError(
                f"{min(batch_global, length)} images a step cannot be shared by {world_size} processes; "
                "raise run.batch_global, use more images or fewer processes"
            )
        self.length, self.batch_global, self.seed = length, batch_global, seed
        self.rank, self.world_size = rank, world_size
        keep_rest = not drop_last or length < batch_global
        self.steps = -(-length // batch_global) if keep_rest else length // batch_global
        self.epoch, self.step = 0, 0
        self._order_epoch, self._order = -1, np.empty(0, np.int64)

    def batch(self, epoch: int, step: int) -> Int64Array:
        """(b,) int64, this rank's share of a step's indices; does not depend on or move the position."""
        assert 0 <= step < self.steps, (step, self.steps)
        whole = self._permutation(epoch)[step * self.batch_global : (step + 1) * self.batch_global]
        first, end = (r * len(whole) // self.world_size for r in (self.rank, self.rank + 1))
        return whole[first:end].astype(np.int64)

    def advance(self) -> None:
        """Moves the position to the next step, over the end of an epoch to the next one."""
        self.step += 1
        if self.step == self.steps:
            self.epoch, self.step = self.epoch + 1, 0

    def state_dict(self) -> SamplerState:
        """The position; the same on every rank."""
        return SamplerState(
            epoch=self.epoch, step=self.step, length=self.length, batch_global=self.batch_global, seed=self.seed
        )

    def load_state_dict(self, state: SamplerState) -> None:
        """Goes to a saved position; the number of ranks may be another.

        Raises:
            UserError: the position is in another data set's length, batch or seed, where it means nothing.
        """
        own = self.state_dict()
        for name, setting in (("length", "images"), ("batch_global", "images a step"), ("seed", "as seed")):
            if state[name] != own[name]:  # type: ignore[literal-required]
                raise UserError(
                    f"the saved run has {state[name]} {setting}, this one {own[name]}; "  # type: ignore[literal-required]
                    "resume with the same data, batch_global and seed, or start a new run with --init"
                )
        self.epoch, self.step = state["epoch"], state["step"]

    def _permutation(self, epoch: int) -> Int64Array:
        """Indices in the order of their scrambled numbers, which are distinct since scrambling is a bijection.

        `Generator.permutation` is faster, but numpy may change its stream from one version to the next.
        """
        if epoch != self._order_epoch:
            base = stream_base(self.seed, epoch)
            keys = scramble_array(np.arange(self.length, dtype=np.uint64) + np.uint64(base))
            self._order, self._order_epoch = np.argsort(keys), epoch
        return self._order
