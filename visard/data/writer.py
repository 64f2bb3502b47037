"""Writes a prepared data set: a folder that visard opens at once and that arcface_torch trains from as it is.

In: crops as JPEG bytes (kept as they are), one identity after the other and unlabelled ones last, with id and
landmarks. Out: the folder

    train.rec       record 0: labels (N + 1, N + 1 + C); records 1..N: the images;
                    records N + 1..N + C: first and end key of each identity's images
    train.idx       "key TAB offset" of every record
    property        "C,size,size", as InsightFace's tools expect
    ids.txt         line k (from 0): id of the image in record k + 1
    identities.txt  line c: name of label c
    labels.npy      (N,) int64, -1 = unlabelled
    offsets.npy     (N,) int64, byte offset of the image's record, so that opening reads no index
    points.npy      (N, 5, 2) float32, landmarks in crop pixels, NaN = none
    dataset.json    `DatasetInfo`

N images, C identities. It is built in a hidden folder beside `out` and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

import visard
from visard.data import recordio
from visard.data.lines import Lines, is_name
from visard.errors import FormatError, UserError
from visard.records import Float32Array

FORMAT = 1
"""Version of the folder's layout."""

MAX_IDENTITIES = 1 << 24
"""A record's label is a float32, exact for whole numbers up to here."""

_NO_POINTS = np.full((5, 2), np.nan, "<f4").tobytes()


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """`dataset.json`.

    Args:
        format: version of the layout.
        size: S, crops are S x S pixels.
        images: N.
        identities: C.
        template: what the crops are aligned to.
        source: how the data set was made, for people and for `visard inspect`.
        visard: version that wrote it.
    """

    format: int
    size: int
    images: int
    identities: int
    template: str
    source: dict[str, Any]
    visard: str

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def read(cls, path: Path) -> DatasetInfo:
        """Raises FormatError for anything else than what `to_json` writes."""
        from visard.config import from_dict

        try:
            info = from_dict(cls, json.loads(path.read_text(encoding="utf-8")), where=str(path))
        except (OSError, ValueError) as error:
            raise FormatError(path, f"cannot be read ({error}); prepare the data set again") from error
        if info.format != FORMAT:
            raise FormatError(path, f"has layout {info.format}, this visard reads {FORMAT}; prepare the data set again")
        if min(info.size, info.images, info.identities + 1) < 1:
            raise FormatError(path, "promises no images; prepare the data set again")
        return info


class DatasetWriter:
    """Context manager that writes a prepared data set; the folder appears on a clean exit only, whole.

    The images of one identity come one after the other: identity ranges need that, and so does a label on first sight.
    Memory is 8 bytes an image and 16 an identity. One writer a target.

    Args:
        out: folder to make; it must not exist or be empty.
        size: S, crops are S x S pixels. Not checked here (that would decode every crop): reading a crop checks it.
        source: how the data set is made, JSON-serialisable.

    Raises:
        UserError: `out` exists; an id comes twice or holds a line break; an identity comes back; no image.
    """

    def __init__(self, out: Path, size: int, source: dict[str, Any]) -> None:
        self.out, self.size, self.source = Path(out), size, source
        if self.out.exists() and not (self.out.is_dir() and not any(self.out.iterdir())):
            raise UserError(f"{self.out} exists already; name another folder or remove it")
        self.folder = self.out.parent / f".{self.out.name}.partial"
        """Where it is built; what else is put there appears with it."""
        self._names: dict[str, int] = {}
        self._starts = array("q")
        self._ids = array("Q")
        self._last: str | None = ""
        self._labelled = 0

    @property
    def images(self) -> int:
        """Images added so far."""
        return len(self._ids)

    def __enter__(self) -> DatasetWriter:
        shutil.rmtree(self.folder, ignore_errors=True)  # what a killed writer left
        self.folder.mkdir(parents=True)
        self._rec = open(self.folder / "train.rec", "wb")
        self._idx = open(self.folder / "train.idx", "w", encoding="ascii", newline="\n")
        # surrogateescape: a file name that is not UTF-8 comes back as it was
        self._ids_file = open(self.folder / "ids.txt", "w", encoding="utf-8", errors="surrogateescape", newline="\n")
        self._labels = _GrowingArray(self.folder / "labels.npy", "<i8", ())
        self._offsets = _GrowingArray(self.folder / "offsets.npy", "<i8", ())
        self._points = _GrowingArray(self.folder / "points.npy", "<f4", (5, 2))
        self._write(0, recordio.pack((0.0, 0.0), 0))  # its place is kept; the numbers are known at the end
        return self

    def begin(self, identity: str) -> None:
        """The next label is this identity's, whether images of it follow or not; `add` calls it where it is needed."""
        _check_line(identity, "identity")
        if identity in self._names or self._last is None:
            raise UserError(
                f"after image {self.images}: identity {identity!r} comes back after {self._last!r}; "
                "add its images one after the other, unlabelled ones last"
            )
        if len(self._names) == MAX_IDENTITIES:
            raise UserError(
                f"more than {MAX_IDENTITIES:,} identities: a record's float32 label cannot hold more; leave some out"
            )
        self._names[identity] = len(self._names)
        self._starts.append(self.images + 1)
        self._last = identity

    def add(self, image_id: str, identity: str | None, jpeg: bytes, points: Float32Array | None = None) -> None:
        """Appends one crop.

        Args:
            image_id: unique; the relative path of the photograph, say.
            identity: name of the person, None = unlabelled; those come last.
            jpeg: the crop as an encoded image file, written untouched.
            points: (5, 2) float32 landmarks in crop pixels, None = unknown.
        """
        _check_line(image_id, "image id")
        if identity is None:
            self._last = None
        elif identity != self._last or not identity:
            self.begin(identity)
        label = -1 if identity is None else len(self._names) - 1
        offset = self._write(self.images + 1, recordio.pack(float(label), self.images + 1, jpeg))
        self._ids.append(_digest(image_id))
        self._ids_file.write(image_id + "\n")
        self._labels.append(label.to_bytes(8, "little", signed=True))
        self._labelled += label >= 0
        self._offsets.append(offset.to_bytes(8, "little"))
        if points is None:
            self._points.append(_NO_POINTS)
        else:
            assert points.shape == (5, 2), points.shape
            self._points.append(points.astype("<f4").tobytes())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _finish(self) -> None:
        images, identities = self.images, len(self._names)
        if not images:
            raise UserError(f"{self.out}: not one image was added, so nothing is written")
        self._check_unique()
        ends = [*self._starts[1:], self._labelled + 1][:identities]
        for k, (first, end) in enumerate(zip(self._starts, ends, strict=True)):
            self._write(images + 1 + k, recordio.pack((float(first), float(end)), images + 1 + k))
        self._rec.seek(0)
        # arcface_torch takes records 1 .. int(label[0]) - 1: above 2**24 round down, so that all of them are images
        labels = (_float32_below(images + 1), _float32_below(images + 1 + identities))
        recordio.write_record(self._rec, recordio.pack(labels, 0))
        (self.folder / "identities.txt").write_bytes(
            "".join(f"{name}\n" for name in self._names).encode("utf-8", "surrogateescape")
        )
        (self.folder / "property").write_text(f"{identities},{self.size},{self.size}\n", encoding="ascii")
        info = DatasetInfo(
            format=FORMAT,
            size=self.size,
            images=images,
            identities=identities,
            template="arcface",
            source=self.source,
            visard=visard.__version__,
        )
        (self.folder / "dataset.json").write_text(info.to_json(), encoding="utf-8")
        self._close()
        Lines.from_file(self.folder / "ids.txt")  # of millions, keeps where the lines end: the first to open need not
        if self.out.exists():
            self.out.rmdir()  # empty, as checked at the start
        os.replace(self.folder, self.out)

    def _close(self) -> None:
        for file in (self._rec, self._idx, self._ids_file, self._labels, self._offsets, self._points):
            file.close()

    def _write(self, key: int, payload: bytes) -> int:
        offset = self._rec.tell()
        recordio.write_record(self._rec, payload)
        self._idx.write(f"{key}\t{offset}\n")
        return offset

    def _check_unique(self) -> None:
        """8 bytes an id are compared, not the ids: 42 million would take gigabytes in a Python set."""
        digests = np.sort(np.frombuffer(self._ids, np.uint64))
        twice = set(digests[1:][digests[1:] == digests[:-1]].tolist())
        if not twice:
            return
        self._ids_file.flush()
        seen: set[str] = set()
        with open(self.folder / "ids.txt", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            for image_id in (line.rstrip("\n") for line in file):
                if _digest(image_id) in twice:
                    if image_id in seen:
                        raise UserError(f"the image id {image_id!r} comes twice; each image needs its own")
                    seen.add(image_id)


class _GrowingArray:
    """A .npy file that grows by rows; numpy leaves room in the header for the first dimension."""

    def __init__(self, path: Path, dtype: str, row: tuple[int, ...]) -> None:
        self._dtype, self._row, self._rows = dtype, row, 0
        self._file = open(path, "wb")  # noqa: SIM115, closed by `close`
        self._write_header()
        self._start = self._file.tell()

    def append(self, row: bytes) -> None:
        self._file.write(row)
        self._rows += 1

    def close(self) -> None:
        if self._file.closed:
            return
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._start
        self._file.close()

    def _write_header(self) -> None:
        shape = (self._rows, *self._row)
        np.lib.format.write_array_header_1_0(self._file, {"descr": self._dtype, "fortran_order": False, "shape": shape})


def _check_line(text: str, what: str) -> None:
    if not is_name(text):
        raise UserError(f"{what} {text!r}: it must not be empty or hold a line break")


def _digest(image_id: str) -> int:
    data = image_id.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _float32_below(value: int) -> float:
    """The largest float32 that is not above `value`."""
    rounded = np.float32(value)
    return float(np.nextafter(rounded, np.float32(0)) if int(rounded) > value else rounded)
