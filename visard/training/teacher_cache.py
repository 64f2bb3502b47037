"""A teacher's embeddings of a data set on disk: checked against data set and teacher, then read row by row.

In: an embeddings directory, as `visard embed TEACHER DATA DIR --flip concat` writes it, and the data set that is
trained on. Out: `TeacherCache`: (indices, flipped) -> the embeddings of those images, of the view that training sees.

vectors.npy stays mapped: a batch reads its rows and no others, so 42 million embeddings of 512 float16 numbers (43 GB,
86 GB with the mirrored view) need no memory but the page cache. Image ids are compared in blocks; where the directory
has them in another order, or more of them, 8 bytes an image say where each is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visard.data.dataset import FaceDataset
from visard.data.lines import Lines, take
from visard.data.transforms import id_keys
from visard.embed_files import read_spec
from visard.errors import FormatError, UserError
from visard.records import Float32Array, Int64Array

BLOCK = 1 << 16
"""Rows at once wherever all are looked at."""

PROBES = 8
"""Images that the teacher embeds anew to see whether the cache is of it and of these images."""

PROBE_COS = 0.999
"""Cosine that both embeddings must have: float16, other devices and other batches leave more than 0.9999."""


class TeacherCache:
    """Embeddings by row of the data set; pickles into loader processes as its path.

    Args:
        directory: of embeddings.
        dataset: whose images it must have.

    Raises:
        UserError: it is not of this data set: images are missing.
        FormatError: a damaged file.
    """

    def __init__(self, directory: Path, dataset: FaceDataset) -> None:
        self.directory = directory
        if not (directory / "vectors.npy").is_file():
            raise UserError(
                f"{directory}: no embeddings here (vectors.npy is missing); make them with "
                "`visard embed TEACHER DATA DIR --flip concat`"
            )
        if not (directory / "spec.json").is_file():
            raise UserError(f"{directory}: spec.json is missing; `visard embed` writes it, embed again")
        _, self.flip, self.weights = read_spec(directory / "spec.json")
        self._vectors: NDArray[Any] | None = None
        count, width = self.vectors().shape
        ids = Lines.from_file(directory / "ids.txt")
        if len(ids) != count:
            raise FormatError(directory, f"{count} vectors but {len(ids)} ids; make the embeddings again")
        self._rows = matching_rows(ids, dataset.ids, where=str(directory))
        self.dim: int = width // 2 if self.flip == "concat" else width

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_vectors": None}

    def vectors(self) -> NDArray[Any]:
        """vectors.npy, mapped."""
        if self._vectors is None:
            path = self.directory / "vectors.npy"
            try:
                self._vectors = np.load(path, mmap_mode="r", allow_pickle=False)
            except (ValueError, EOFError, OSError) as error:
                raise FormatError(path, f"is not a whole .npy array ({error}); make the embeddings again") from error
            if self._vectors.ndim != 2 or not np.issubdtype(self._vectors.dtype, np.floating):
                raise FormatError(path, f"holds {self._vectors.dtype} {self._vectors.shape}, not embeddings")
        return self._vectors

    def rows(self, indices: Int64Array, flipped: NDArray[np.bool_]) -> Float32Array:
        """(n, E) float32 embeddings of images of the data set, of the mirrored view where `flipped`.

        A directory with one view alone (flip none or sum) gives that for both.
        """
        found = np.asarray(self.vectors()[self._places(indices)], dtype=np.float32)
        if self.flip != "concat":
            return found
        return np.where(flipped[:, None], found[:, self.dim :], found[:, : self.dim])

    def both_views(self, indices: Int64Array) -> Float32Array:
        """(n, E) float32 sum of the views' directions, each of length 1."""
        views = [self.rows(indices, np.full(len(indices), flipped)) for flipped in (False, True)]
        units = [view / np.linalg.norm(view, axis=1, keepdims=True).clip(min=1e-12) for view in views]
        return np.asarray(units[0] + units[1], dtype=np.float32)

    def class_sums(self, labels: Int64Array, classes: range) -> Float32Array:
        """(C, E) float32: of each of these classes the sum of its images' directions, of both views; streamed."""
        sums = np.zeros((len(classes), self.dim), np.float64)
        wanted = np.flatnonzero((labels >= classes.start) & (labels < classes.stop))
        for start in range(0, len(wanted), BLOCK):
            indices = wanted[start : start + BLOCK]
            np.add.at(sums, labels[indices] - classes.start, self.both_views(indices))
        return sums.astype(np.float32)

    def second_moment(self, images: int, most: int = 1 << 16) -> NDArray[np.float64]:
        """(E, E) float64 sum of t t^T of the directions of at most `most` images, evenly spaced in the data set."""
        indices = np.unique(np.linspace(0, images - 1, min(images, most)).astype(np.int64))
        moment = np.zeros((self.dim, self.dim))
        for start in range(0, len(indices), 4096):
            views = self.both_views(indices[start : start + 4096]).astype(np.float64)
            moment += views.T @ views
        return moment

    def check(self, embedded: Float32Array, probes: Int64Array, ids: Sequence[str], teacher: str) -> None:
        """Compares what the teacher gives now with what the cache has.

        Args:
            embedded: (n, E) or (n, 2 E) the teacher's embeddings of `probes`, of the views that the cache has.
            probes: (n,) rows of the data set.
            ids: the data set's.
            teacher: for the message.

        Raises:
            UserError: they differ.
        """
        kept = np.asarray(self.vectors()[self._places(probes)], dtype=np.float32)
        if kept.shape != embedded.shape:
            given = embedded.shape[1] * self.dim // kept.shape[1]
            raise UserError(f"{self.directory}: holds {self.dim} dimensions, {teacher} gives {given}")
        lengths = np.linalg.norm(kept, axis=1) * np.linalg.norm(embedded, axis=1)
        cos = (kept * embedded).sum(1) / lengths.clip(min=1e-12)
        worst = int(cos.argmin())
        if not cos[worst] >= PROBE_COS:
            raise UserError(
                f"{self.directory}: holds other embeddings than {teacher} gives now (image {ids[int(probes[worst])]}: "
                f"cosine {cos[worst]:.3f}); the model or the images have changed: embed again"
            )

    def _places(self, indices: Int64Array) -> Int64Array:
        """Rows of vectors.npy."""
        return indices if self._rows is None else self._rows[indices]


def probes_of(images: int) -> Int64Array:
    """(n,) rows that are looked at by `check`, evenly spaced."""
    return np.unique(np.linspace(0, images - 1, min(images, PROBES)).astype(np.int64))


def matching_rows(ids: Sequence[str], wanted: Sequence[str], *, where: str) -> Int64Array | None:
    """(N,) int64 where each wanted id is among `ids`; None if they are the same in the same order.

    Raises:
        UserError: some are missing.
    """
    blocks = [range(start, min(start + BLOCK, len(wanted))) for start in range(0, len(wanted), BLOCK)]
    if len(ids) == len(wanted) and all(take(ids, _at(block)) == take(wanted, _at(block)) for block in blocks):
        return None
    there_blocks = [range(start, min(start + BLOCK, len(ids))) for start in range(0, len(ids), BLOCK)]
    keys = np.concatenate([id_keys(take(ids, _at(block))) for block in there_blocks])
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    rows = np.empty(len(wanted), np.int64)
    missing: list[str] = []
    count = 0
    for block in blocks:
        names = take(wanted, _at(block))
        place = np.searchsorted(keys, id_keys(names)).clip(max=len(keys) - 1)
        found = order[place]
        there = take(ids, found)
        wrong = [name for name, other in zip(names, there, strict=True) if name != other]
        count += len(wrong)
        missing += wrong[: 3 - len(missing)]
        rows[block.start : block.stop] = found
    if count:
        raise UserError(
            f"{where}: {count:,} of the {len(wanted):,} images that are trained on have no embedding there "
            f"({', '.join(missing)}{' ...' if count > len(missing) else ''}); the data set has changed, or it is "
            "another: embed it again"
        )
    return rows


def _at(block: range) -> Int64Array:
    return np.arange(block.start, block.stop)
