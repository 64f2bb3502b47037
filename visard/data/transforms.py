"""What is done to a crop before it is trained on, drawn from (seed, epoch, image id) and from nothing else.

In: a `Sample` and a generator of its own. Out: a new `Sample`. The draw of an image does not depend on the batch it
is in, the process that loads it, the number of processes or what was loaded before; so a resumed run sees what an
unbroken one sees.

An augmentation is any callable `augment(sample, generator) -> Sample` that keeps size and dtype; a frozen dataclass
whose fields are its settings pickles into worker processes. It uses no other randomness than `generator`, and does not
keep it: the next sample gets the same object, set to its own stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visard.records import Float32Array, UInt8Array

UInt64Array = NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_MIRRORED = np.array([1, 0, 2, 4, 3])
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Sample:
    """One crop on its way into a batch.

    Args:
        image: (S, S, 3) uint8 RGB.
        points: (5, 2) float32 landmarks in crop pixels, or None.
        label: identity's number, -1 = unlabelled.
        id: image id.
        flipped: whether the crop was mirrored (image and points are mirrored already).
        extras: what augmentations tell about the crop, by name: numbers, or arrays of the same shape for every crop;
            the batch has them in its own extras. Nothing at first.
    """

    image: UInt8Array
    points: Float32Array | None
    label: int
    id: str
    flipped: bool
    extras: Mapping[str, Any] = field(default_factory=dict)


Augment = Callable[[Sample, np.random.Generator], Sample]


class SampleRandom:
    """Counter-based randomness of one data pass: a function of (seed, epoch, image id), without state.

    Args:
        seed: of the run, 0 or more.
        epoch: pass over the data, from 0.
    """

    def __init__(self, seed: int, epoch: int) -> None:
        self.epoch = epoch
        self._base = stream_base(seed, epoch)
        self._bits = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._bits)
        self._state: Any = self._bits.state

    def flips(self, ids: Sequence[str], probability: float) -> NDArray[np.bool_]:
        """(B,) bool, whether each image is mirrored."""
        uniform = (scramble_array(id_keys(ids) ^ np.uint64(self._base)) >> np.uint64(11)) * 2.0**-53
        return uniform < probability

    def generator(self, image_id: str) -> np.random.Generator:
        """One image's generator at the start of its stream; always the same object, since a new one takes 9 us."""
        state = self._state["state"]
        state["key"][:] = self._base, int(id_keys((image_id,))[0])
        state["counter"][:] = 0
        self._state.update(buffer_pos=4, has_uint32=0, uinteger=0)
        self._bits.state = self._state
        return self._generator


def mirror(sample: Sample) -> Sample:
    """The sample seen in a mirror: the right eye becomes the left one."""
    points = None if sample.points is None else mirror_points(sample.points, sample.image.shape[1])
    image = np.ascontiguousarray(sample.image[:, ::-1])
    return Sample(image, points, sample.label, sample.id, not sample.flipped, sample.extras)


def mirror_points(points: Float32Array, size: int) -> Float32Array:
    """Landmarks of the mirrored crop.

    Args:
        points: (..., 5, 2) float32 pixels: left eye, right eye, nose tip, left and right mouth corner.
        size: width of the crop, pixels.

    Returns:
        mirrored: (..., 5, 2) float32; x becomes size - 1 - x, left and right change places.
    """
    mirrored = points[..., _MIRRORED, :].copy()
    mirrored[..., 0] = size - 1 - mirrored[..., 0]
    return mirrored


def id_keys(ids: Sequence[str]) -> UInt64Array:
    """(B,) uint64: 64 bits of BLAKE2b of each id, the same on every machine (0.3 us an id)."""
    new, digests = hashlib.blake2b(digest_size=8).copy, []
    for i in ids:  # a copy is set up in a quarter less time than a state of its own
        state = new()
        state.update(i.encode("utf-8", "surrogateescape"))
        digests.append(state.digest())
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def stream_base(seed: int, epoch: int) -> int:
    """64 bits that name the data pass; not symmetric in seed and epoch, so that neighbouring runs share no pass."""
    return scramble(scramble(seed) + epoch & _MASK)


def scramble_array(values: UInt64Array) -> UInt64Array:
    """Element-wise `scramble`."""
    z = values + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def scramble(value: int) -> int:
    """SplitMix64's output function: a bijection of 64-bit words whose result looks random.

    Source: Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators (OOPSLA 2014), with Stafford's mix 13.
    """
    z = value + _GOLDEN & _MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return z ^ z >> 31
