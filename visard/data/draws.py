"""Draws that a seed repeats on any machine: shuffles of numbers, and of the images of identities.

In: labels, counts and the names of random streams. Out: indices. What a sampler makes of them is in `sampler.py`.

Letters: N images, C identities that have images.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np

from visard.data.transforms import UInt64Array, scramble_array
from visard.errors import UserError
from visard.records import Int64Array

_CHUNK = 1 << 21
"""Images shuffled at once: bounds the memory beside the order itself."""


@dataclass(frozen=True)
class Groups:
    """Images by identity: `images[starts[c] : starts[c] + sizes[c]]` are those of the c-th identity that has enough."""

    images: Int64Array
    starts: Int64Array
    sizes: Int64Array

    @classmethod
    def of(cls, labels: Int64Array, min_images: int) -> Groups:
        labels = np.asarray(labels)
        images = np.argsort(labels, kind="stable")[int((labels < 0).sum()) :]
        if not len(images):
            raise UserError("no image has an identity, so none can be drawn by identity; use data.sampler.kind uniform")
        changes = np.flatnonzero(np.diff(labels[images])) + 1
        starts = np.concatenate([[0], changes])
        sizes = np.diff(np.append(starts, len(images)))
        enough = sizes >= min_images
        return cls(images, starts[enough], sizes[enough])

    def draw(
        self, drawn: Int64Array, counts: Int64Array, lasts: Int64Array, base: int
    ) -> tuple[Int64Array, Int64Array]:
        """The next draws of each identity.

        Args:
            drawn: (C,) draws of each before.
            counts: (C,) draws of each now.
            lasts: (C,) draws that one shuffle lasts; beyond the identity's images it begins again in the same order.
            base: names the stream of shuffles.

        Returns:
            images: (sum of counts,) int64, identity by identity.
            repeats: (sum of counts,) int64, different for draws of one image.
        """
        load = np.cumsum(np.maximum(self.sizes, counts))
        cuts = np.searchsorted(load, np.arange(_CHUNK, int(load[-1]), _CHUNK))
        edges = np.unique(np.concatenate([[0], cuts, [len(self.sizes)]])).tolist()
        parts = [
            self._draw(slice(a, b), drawn[a:b], counts[a:b], lasts[a:b], base) for a, b in itertools.pairwise(edges)
        ]
        images, repeats = zip(*parts, strict=True)
        return np.concatenate(images), np.concatenate(repeats)

    def _draw(
        self, part: slice, drawn: Int64Array, counts: Int64Array, lasts: Int64Array, base: int
    ) -> tuple[Int64Array, Int64Array]:
        starts, sizes = self.starts[part], self.sizes[part]
        first = drawn // lasts
        shuffles = np.where(counts > 0, (drawn + counts - 1) // lasts - first + 1, 0)
        # All shuffles that are needed, one after the other, sorted by random numbers in one go.
        owner, nth = _runs(shuffles)
        shuffle, inside = _runs(sizes[owner])
        images = self.images[starts[owner][shuffle] + inside]
        names = scramble_array((first[owner] + nth).astype(np.uint64) + np.uint64(base))
        keys: UInt64Array = scramble_array(images.astype(np.uint64) ^ names[shuffle])
        order = np.argsort(shuffle.astype(np.uint64) << np.uint64(32) | keys >> np.uint64(32), kind="stable")
        shuffled = images[order]
        shuffle_start = np.cumsum(sizes[owner]) - sizes[owner]
        first_of_owner = np.cumsum(shuffles) - shuffles
        who, nth = _runs(counts)
        number = drawn[who] + nth
        later, place = number // lasts[who] - first[who], number % lasts[who]
        drawn_images = shuffled[shuffle_start[first_of_owner[who] + later] + place % sizes[who]]
        return drawn_images, later * -(-lasts[who] // sizes[who]) + place // sizes[who]


def permutation(length: int, base: int) -> Int64Array:
    """Indices in the order of their scrambled numbers, which are distinct since scrambling is a bijection.

    `Generator.permutation` is faster, but numpy may change its stream from one version to the next.
    """
    return np.argsort(scramble_array(np.arange(length, dtype=np.uint64) + np.uint64(base)))


def digest(labels: Int64Array) -> str:
    return hashlib.blake2b(np.ascontiguousarray(labels, "<i8").tobytes(), digest_size=4).hexdigest()


def _runs(lengths: Int64Array) -> tuple[Int64Array, Int64Array]:
    """[2, 0, 3] -> [0, 0, 2, 2, 2] and [0, 1, 0, 1, 2]."""
    which = np.repeat(np.arange(len(lengths)), lengths)
    return which, np.arange(len(which)) - (np.cumsum(lengths) - lengths)[which]
