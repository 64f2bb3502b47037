"""Small crops for the tests of formats: images of noise with ids and names that are hard to keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from visard.data.dataset import open_dataset
from visard.data.writer import DatasetWriter

S = 16

IMAGES: list[tuple[str, str | None]] = [
    ("p0/0.jpg", "p0"),
    ("p0/0_again.png", "p0"),
    ("17", "p1"),
    ("../z.jpg", "a/b"),
    ("é/ü 1.jpg", "é"),
    ("é/tab\tin.name.jpg", "é"),
    (b"caf\xe9/1.jpg".decode("utf-8", "surrogateescape"), b"caf\xe9".decode("utf-8", "surrogateescape")),
    ("x.jpg", None),
    ("18", None),
]
"""(id, identity), unlabelled ones last."""


def encoded(seed: int, suffix: str = ".jpg", size: int = S) -> bytes:
    image = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.imencode(suffix, cv2.resize(image, (size, size)))[1].tobytes()


def points_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, S, (5, 2)).astype(np.float32)


def write_set(path: Path) -> Path:
    """A prepared folder of `IMAGES`; every other one has landmarks."""
    with DatasetWriter(path, S, {"made": "for a test"}) as writing:
        for i, (image_id, identity) in enumerate(IMAGES):
            suffix = ".png" if image_id.endswith(".png") else ".jpg"
            writing.add(image_id, identity, encoded(i, suffix), points_of(i) if i % 2 else None)
    return path


def contents(source: Path | str) -> dict[str, tuple[str | None, bytes, bytes | None]]:
    """id -> (identity, bytes of the image file, bytes of the landmarks)."""
    data: Any = open_dataset(source)
    found = {}
    for i in range(len(data)):
        label, points = int(data.labels[i]), data.points(i)
        identity = None if label < 0 else data.identities[label]
        found[data.ids[i]] = (identity, data.encoded(i), None if points is None else points.tobytes())
    assert len(found) == len(data)
    return found
