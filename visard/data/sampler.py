"""Which images make up which step: an order of draws an epoch, cut into batches, shared out over the ranks.

In: the data set's length or labels, the global batch, the seed. Out: the indices of this rank's share of step k of
epoch e, and a position that is saved with the run. Step k of epoch e is the same set of images at any number of ranks.

`EpochSampler` takes every image once, `BalancedSampler` evens out large and small identities, `IdentitySampler` makes
batches of P identities with K images each. How often which identity was drawn before follows from (seed, epoch) by
counting, so nothing but the position is saved.

Letters: N images, C identities that have images, B images a step over all ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NotRequired, TypedDict

import numpy as np

from visard.config import SamplerConfig
from visard.data.draws import Groups, digest, permutation
from visard.data.transforms import scramble, stream_base
from visard.errors import UserError
from visard.records import Int64Array

# Each kind of draw has its own stream.
_OFFSETS, _SHUFFLES, _ROUNDS = 0x0FF5E7, 0x5FF1E5, 0x20BBD5


class SamplerState(TypedDict):
    """Where the next step begins, and what the position is a position in."""

    epoch: int
    step: int
    length: int
    batch_global: int
    seed: int
    order: NotRequired[str]


def build_sampler(
    config: SamplerConfig, labels: Int64Array, batch_global: int, seed: int, rank: int = 0, world_size: int = 1
) -> EpochSampler:
    """The sampler that `config` describes, for training (the rest of an epoch is left out).

    Args:
        labels: (N,) int64 identity of each image, -1 = unlabelled.
        batch_global, seed, rank, world_size: see `EpochSampler`.

    Raises:
        UserError: batch, identities and processes do not fit together.
    """
    if config.kind == "balanced":
        return BalancedSampler(labels, batch_global, seed, rank, world_size, power=config.power)
    if config.kind == "identities":
        return IdentitySampler(
            labels, batch_global, seed, rank, world_size, config.images_per_identity, min_images=config.min_images
        )
    return EpochSampler(len(labels), batch_global, seed, rank, world_size)


class EpochSampler:
    """Every image once an epoch, in an order that follows from (seed, epoch).

    Global batch k is order[k * B : (k + 1) * B]; rank r of W takes its elements from r * B // W up to
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
        steps: an epoch.
        draws: images an epoch, before the rest is left out.
        images_per_step: over all ranks; B, or all draws where they are fewer.
        most_per_rank, least_per_rank: images of a step that a rank gets at most, and of a full step at least.
    """

    order = "uniform"
    """What an epoch's order depends on besides seed and length; a saved position means nothing in another."""
    _unit = 1  # draws that stay together on a rank

    def __init__(
        self, length: int, batch_global: int, seed: int, rank: int = 0, world_size: int = 1, *, drop_last: bool = True
    ) -> None:
        """Raises UserError if there is nothing to draw, or less than one image a step for each rank."""
        if length < 1:
            raise UserError("the data set holds no images; name one that does")
        self._set(length, length, batch_global, seed, rank, world_size, drop_last=drop_last)

    def _set(
        self, length: int, draws: int, batch_global: int, seed: int, rank: int, world_size: int, *, drop_last: bool
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        if batch_global < 1 or min(batch_global, draws) < world_size:
            raise UserError(
                f"{min(batch_global, draws)} images a step cannot be shared by {world_size} processes; "
                "raise run.batch_global, use more images or fewer processes"
            )
        self.length, self.draws, self.batch_global, self.seed = length, draws, batch_global, seed
        self.rank, self.world_size = rank, world_size
        self.images_per_step = min(batch_global, draws)
        self.most_per_rank = -(-self.images_per_step // self._unit // world_size) * self._unit
        self.least_per_rank = self.images_per_step // self._unit // world_size * self._unit
        keep_rest = not drop_last or draws < batch_global
        self.steps = -(-draws // batch_global) if keep_rest else draws // batch_global
        self.epoch, self.step = 0, 0
        self._kept_epoch = -1
        self._kept: tuple[Int64Array, Int64Array | None] = np.empty(0, np.int64), None

    def batch(self, epoch: int, step: int) -> Int64Array:
        """(b,) int64, this rank's share of a step's indices; does not depend on or move the position."""
        return self._order(epoch)[0][self._share(step)].astype(np.int64)

    def repeats(self, epoch: int, step: int) -> Int64Array | None:
        """(b,) int64 numbers that tell draws of one image in one epoch apart; None where each is drawn once."""
        repeats = self._order(epoch)[1]
        return None if repeats is None else repeats[self._share(step)]

    def advance(self) -> None:
        """Moves the position to the next step, over the end of an epoch to the next one."""
        self.step += 1
        if self.step == self.steps:
            self.epoch, self.step = self.epoch + 1, 0

    def state_dict(self) -> SamplerState:
        """The position; the same on every rank."""
        return SamplerState(
            epoch=self.epoch,
            step=self.step,
            length=self.length,
            batch_global=self.batch_global,
            seed=self.seed,
            order=self.order,
        )

    def load_state_dict(self, state: SamplerState) -> None:
        """Goes to a saved position; the number of ranks may be another.

        Raises:
            UserError: the position is in another data set's length, batch, seed or order, where it means nothing.
        """
        own = self.state_dict()
        for name, setting in (("length", "images"), ("batch_global", "images a step"), ("seed", "as seed")):
            if state[name] != own[name]:  # type: ignore[literal-required]
                raise UserError(
                    f"the saved run has {state[name]} {setting}, this one {own[name]}; "  # type: ignore[literal-required]
                    "resume with the same data, batch_global and seed, or start a new run with --init"
                )
        saved = state.get("order", "uniform")  # the only one there was
        if saved != self.order:
            raise UserError(
                f"the saved run draws its images {saved}, this one {self.order}; "
                "resume with the same data and data.sampler, or start a new run with --init"
            )
        self.epoch, self.step = state["epoch"], state["step"]

    def _share(self, step: int) -> slice:
        assert 0 <= step < self.steps, (step, self.steps)
        start = step * self.batch_global
        units = min(self.batch_global, self.draws - start) // self._unit
        first, end = (r * units // self.world_size * self._unit for r in (self.rank, self.rank + 1))
        return slice(start + first, start + end)

    def _order(self, epoch: int) -> tuple[Int64Array, Int64Array | None]:
        if epoch != self._kept_epoch:
            self._kept, self._kept_epoch = self._make_order(epoch), epoch
        return self._kept

    def _make_order(self, epoch: int) -> tuple[Int64Array, Int64Array | None]:
        """The epoch's draws one after the other, and their `repeats`."""
        return permutation(self.draws, stream_base(self.seed, epoch)), None


class _ByIdentity(EpochSampler, ABC):
    """What samplers that draw identities share: each identity's images come shuffled, all before any comes again.

    Unlabelled images are never drawn. An identity that is drawn for the t-th time since the run began gives image
    t mod m of its shuffle t // m, where m, the draws a shuffle lasts, is `_lasts`.
    """

    _groups: Groups
    _lasts: Int64Array

    @abstractmethod
    def _counts(self, epoch: int) -> Int64Array:
        """(C,) int64 draws of each identity in an epoch."""

    def _drawn_before(self, epoch: int) -> Int64Array:
        """(C,) int64 draws of each identity in all epochs before; counted on from the last answer where that can be."""
        known, drawn = getattr(self, "_drawn", (0, np.zeros(len(self._groups.sizes), np.int64)))
        if known > epoch:
            known, drawn = 0, np.zeros_like(drawn)
        for past in range(known, epoch):
            drawn = drawn + self._counts(past)
        self._drawn = epoch, drawn
        return drawn

    def _by_identity(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """The epoch's draws, identity by identity: images and repeats."""
        base = scramble(stream_base(self.seed, 0) ^ _SHUFFLES)
        return self._groups.draw(self._drawn_before(epoch), self._counts(epoch), self._lasts, base)


class BalancedSampler(_ByIdentity):
    """An epoch of as many draws as images in which an identity of n images comes in proportion to n ** power.

    power 0 draws every identity equally often, 1 every image once (as `EpochSampler`, in another order), 0.5 is
    between. The share q of an identity (N n**power / sum) is met by floor(q) or ceil(q) draws an epoch, on average by
    q; it is at least 1.

    Args:
        labels: (N,) int64, -1 = unlabelled: such an image is never drawn.
        power: 0 to 1.
        batch_global, seed, rank, world_size, drop_last: see `EpochSampler`.
    """

    def __init__(
        self,
        labels: Int64Array,
        batch_global: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        power: float = 0.0,
        drop_last: bool = True,
    ) -> None:
        assert 0 <= power <= 1, power
        self._groups = Groups.of(labels, 1)
        self._lasts = self._groups.sizes
        draws = int(self._groups.sizes.sum())
        self._set(len(labels), draws, batch_global, seed, rank, world_size, drop_last=drop_last)
        # Whole numbers, so that no machine rounds a share to the other side; draws * sum must fit 63 bits.
        scale = max(1, min(1024, (1 << 62) // draws**2))
        weights = np.rint(scale * self._groups.sizes.astype(np.float64) ** power).astype(np.int64)
        self._edges = np.cumsum(weights)
        self.order = f"balanced with power {power:g} over labels {digest(labels)}"

    def _counts(self, epoch: int) -> Int64Array:
        """Systematic sampling: the shares laid end to end, each whole number plus a random offset is a draw."""
        whole = int(self._edges[-1])
        offset = scramble(stream_base(self.seed, epoch) ^ _OFFSETS) % whole
        return np.diff((self.draws * self._edges + offset) // whole, prepend=0)

    def _make_order(self, epoch: int) -> tuple[Int64Array, Int64Array | None]:
        images, repeats = self._by_identity(epoch)
        order = permutation(self.draws, stream_base(self.seed, epoch))
        return images[order], repeats[order]


class IdentitySampler(_ByIdentity):
    """Global batches of P identities with K images each, one identity after the other, as triplet losses need them.

    The identities of a batch are different ones. They come in rounds: a shuffle of all identities, cut into batches of
    P (what fills no batch waits for the next round). An epoch has max(1, N // (P K)) steps. An identity's images are
    different ones and come shuffled; those beyond a multiple of K wait for the next shuffle. An identity with fewer
    than K images gives each as often as needed (floor(K / n) or ceil(K / n) times), mirrored and augmented each time
    on its own. A rank gets whole identities, so shares differ by K images at most.

    Args:
        labels: (N,) int64, -1 = unlabelled: such an image is never drawn.
        batch_global: P * K.
        images_per_identity: K.
        min_images: identities with fewer are left out.
        seed, rank, world_size: see `EpochSampler`.

    Raises:
        UserError: the batch is no multiple of K, has more identities than there are, or fewer than processes.
    """

    def __init__(
        self,
        labels: Int64Array,
        batch_global: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        images_per_identity: int = 4,
        *,
        min_images: int = 1,
    ) -> None:
        k, p = images_per_identity, batch_global // images_per_identity
        if batch_global % k:
            raise UserError(f"run.batch_global {batch_global} is no multiple of {k} images an identity (data.sampler)")
        self._groups = Groups.of(labels, min_images)
        sizes = self._groups.sizes
        if p > len(sizes):
            raise UserError(
                f"{p} identities a batch, but only {len(sizes)} have {min_images} images or more; "
                "lower run.batch_global or data.sampler.min_images, or raise data.sampler.images_per_identity"
            )
        if p < world_size:
            raise UserError(
                f"{p} identities a batch cannot be shared by {world_size} processes; "
                "raise run.batch_global or lower data.sampler.images_per_identity"
            )
        draws = max(1, int(sizes.sum()) // batch_global) * batch_global
        self._unit, self._p, self._k = k, p, k
        self._lasts = np.maximum(sizes // k, 1) * k
        self._set(len(labels), draws, batch_global, seed, rank, world_size, drop_last=True)
        self.order = f"as {p} identities x {k}, of {min_images} images or more, over labels {digest(labels)}"

    def _sequence(self, epoch: int) -> Int64Array:
        """(steps * P,) int64: the epoch's identities."""
        identities = len(self._groups.sizes)
        in_round = identities // self._p * self._p
        rounds = -(-self.steps * self._p // in_round)
        base = scramble(stream_base(self.seed, epoch) ^ _ROUNDS)
        shuffles = [permutation(identities, scramble(base + r & (1 << 64) - 1))[:in_round] for r in range(rounds)]
        return np.concatenate(shuffles)[: self.steps * self._p]

    def _counts(self, epoch: int) -> Int64Array:
        return np.bincount(self._sequence(epoch), minlength=len(self._groups.sizes)) * self._k

    def _make_order(self, epoch: int) -> tuple[Int64Array, Int64Array | None]:
        images, repeats = self._by_identity(epoch)
        # The draws lie identity by identity; the v-th visit of an identity takes its v-th K.
        places = np.empty(self.draws // self._k, np.int64)
        places[np.argsort(self._sequence(epoch), kind="stable")] = np.arange(len(places))
        at = (places[:, None] * self._k + np.arange(self._k)).ravel()
        return images[at], repeats[at]
