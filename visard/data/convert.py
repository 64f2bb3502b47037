"""`visard convert SRC OUT`: a data set in another format, the encoded images byte for byte, ids and landmarks kept.
With `--size` images are scaled and encoded anew.

In: whatever `open_dataset` takes. Out: OUT, complete or not at all; an interrupted conversion is started anew.

    records  a prepared folder (`train.rec`, which arcface_torch reads too); images are put in order of their identities
    folder   OUT/<identity>/<image>.jpg, with points.csv and images.csv where names need it
    list     the same files and OUT/list.txt, `path TAB label`, with its sidecars
    lst      the same with OUT/list.lst, MXNet's `index TAB label TAB path`
    shards   OUT/000000.tar ... in webdataset's layout
    bin      InsightFace's pair set; the pairs are the source's own, its pairs.txt, or --pairs
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import tyro

from visard.console import Answer, progress
from visard.data.dataset import FaceDataset, PairBinDataset, open_dataset
from visard.data.decode import check, decode
from visard.data.formats import pair_list, sidecars
from visard.data.formats.joined import SameNames
from visard.data.formats.lists import write_list
from visard.data.formats.naming import FileNames, suffix_of
from visard.data.formats.pair_bin import write_bin
from visard.data.formats.shards import ShardWriter
from visard.data.writer import DatasetWriter
from visard.errors import FormatError, UserError
from visard.records import Float32Array, Int64Array, UInt8Array

Kind = Literal["records", "folder", "list", "lst", "shards", "bin"]
LEFT_OUT = "left_out.csv"


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """`visard convert`."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A prepared folder, a folder of identities, a .rec, .bin or .tar file, a list; or several, joined."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Where to write; must not exist."""
    to: Kind | None = None
    """What to write; by default a pair set if OUT ends in .bin, else records."""
    pairs: Path | None = None
    """For bin: lines `left TAB right TAB 1 or 0` of image ids, as `visard pairs make` writes them."""
    skip_broken: bool = False
    """Leave out images that cannot be read, and list them in OUT/left_out.csv, instead of stopping at the first."""
    size: int = 0
    """Scale images to this many pixels (by area) and write them as PNG; 0 keeps them byte for byte."""
    decode: bool = False
    """Decode every image to find more damage; otherwise its header and its end are looked at."""
    same_names: SameNames = "apart"
    """For several sources: whether people of equal names are two or one."""
    shard_megabytes: int = 256
    """For shards: a shard is closed at this size."""

    def __post_init__(self) -> None:
        if self.shard_megabytes < 1:
            raise UserError(f"--shard-megabytes is {self.shard_megabytes}; use at least 1")
        if self.size and not 16 <= self.size <= 1024:
            raise UserError(f"--size is {self.size} px; use 16 to 1024")
        if self.pairs is not None and self.kind != "bin":
            raise UserError("--pairs is only for --to bin")

    @property
    def kind(self) -> Kind:
        return self.to or ("bin" if self.out.suffix == ".bin" else "records")


@dataclass(frozen=True)
class _Image:
    """What is converted."""

    row: int
    id: str
    label: int
    identity: str | None
    data: bytes
    points: Float32Array | None


def main(config: ConvertConfig) -> Answer:
    """Converts everything.

    Raises:
        UserError: OUT exists, or the source cannot be what is asked for.
        FormatError: a broken image, unless `skip_broken`.
    """
    if config.out.exists():
        raise UserError(f"{config.out} exists already; name another place or remove it")
    dataset = open_dataset(
        config.src,
        size=config.size or None,
        resize=bool(config.size),
        same_names=config.same_names,
        tolerant=config.skip_broken,
    )
    if not hasattr(dataset, "encoded"):
        raise UserError(f"{config.src}: its images are no files; `visard render` writes rendered faces to disk")
    _ = dataset.labels  # of a .rec they are read now, so that what is wrong with them is known
    # what opening found wrong is in the list; what reading finds joins it
    problems = list(getattr(dataset, "problems", ()))
    written = _WRITERS[config.kind](config, dataset, problems)
    value = {
        "out": str(config.out),
        "kind": config.kind,
        "images": written,
        "identities": len(dataset.identities),
        "broken": [str(problem) for problem in problems],
    }
    where = f"; {len(problems)} broken left out, see {_list_of_broken(config)}" if problems else ""
    return Answer(value, f"{config.out}: {written:,} images of {len(dataset.identities):,} identities{where}")


def _images(config: ConvertConfig, dataset: Any, rows: Int64Array, problems: list[FormatError]) -> Iterator[_Image]:
    """The images in the order of `rows`, checked; broken ones raise or join `problems`."""
    labels, read = dataset.labels, 0
    with progress("converting", len(rows)) as shown:
        for row in rows.tolist():
            try:
                data = dataset.encoded(row)
                path, offset = dataset.where(row)
                if config.size:
                    data = _as_png(decode(data, config.size, True, path, offset))
                else:
                    (decode if config.decode else check)(data, dataset.size, False, path, offset)
            except FormatError as error:
                if not config.skip_broken:
                    raise
                problems.append(error)
                continue
            finally:
                shown.advance()
            label = int(labels[row])
            identity = None if label < 0 else dataset.identities[label]
            read += 1
            yield _Image(row, dataset.ids[row], label, identity, data, dataset.points(row))
    if not read:
        raise UserError(f"{config.src}: not one image could be read, so nothing is written; `visard inspect` tells why")


def _as_png(image: UInt8Array) -> bytes:
    """(S, S, 3) uint8 RGB as a file without loss."""
    _, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return data.tobytes()


def _write_records(config: ConvertConfig, dataset: FaceDataset, problems: list[FormatError]) -> int:
    """Identities in the order of their labels, those without images too, so that every label stays what it is."""
    identities, begun = dataset.identities, 0
    order = np.argsort(np.where(dataset.labels < 0, len(identities), dataset.labels), kind="stable")
    with DatasetWriter(config.out, dataset.size, _source(config)) as writing:
        for image in _images(config, dataset, order, problems):
            end = len(identities) if image.label < 0 else image.label + 1
            for label in range(begun, end):
                writing.begin(identities[label])
            begun = max(begun, end)
            writing.add(image.id, image.identity, image.data, image.points)
        for label in range(begun, len(identities)):
            writing.begin(identities[label])
        written = writing.images
        _write_pairs(writing.folder, dataset)
        _write_broken(writing.folder, problems)
    return written


def _write_folder(config: ConvertConfig, dataset: FaceDataset, problems: list[FormatError]) -> int:
    renamed, points, any_points = [], [], False
    with _new_folder(config.out) as folder:
        for image, file in _files(config, dataset, folder, problems):
            natural = file.split("/")[0] if "/" in file else None
            if (image.id, image.identity) != (file, natural):
                renamed.append((file, image.id, image.identity or ""))
            points.append(sidecars.points_row(file, image.points))
            any_points |= image.points is not None
        if renamed:
            sidecars.write_table(folder / sidecars.IMAGES, sidecars.IMAGES_HEADER, renamed)
        if any_points:
            sidecars.write_table(folder / sidecars.POINTS, sidecars.POINTS_HEADER, points)
        _write_pairs(folder, dataset)
        _write_broken(folder, problems)
    return len(points)


def _write_list(config: ConvertConfig, dataset: FaceDataset, problems: list[FormatError]) -> int:
    files, ids, labels = [], [], []
    points: list[Float32Array | None] = []
    with _new_folder(config.out) as folder:
        for image, file in _files(config, dataset, folder, problems):
            files.append(file)
            ids.append(image.id)
            labels.append(image.label)
            points.append(image.points)
        place = np.full((len(files), 5, 2), np.nan, np.float32)
        for row, found in enumerate(points):
            if found is not None:
                place[row] = found
        name = "list.lst" if config.kind == "lst" else "list.txt"
        write_list(folder / name, files, np.array(labels, np.int64), ids, dataset.identities, place)
        _write_pairs(folder, dataset)
        _write_broken(folder, problems)
    return len(files)


def _write_shards(config: ConvertConfig, dataset: FaceDataset, problems: list[FormatError]) -> int:
    written = 0
    with ShardWriter(config.out, config.shard_megabytes << 20) as writing:
        for image in _images(config, dataset, np.arange(len(dataset)), problems):
            writing.add(image.id, image.label, image.identity, image.data, image.points)
            written += 1
        _write_pairs(writing.folder, dataset)
        _write_broken(writing.folder, problems)
    return written


def _write_bin(config: ConvertConfig, dataset: FaceDataset, problems: list[FormatError]) -> int:
    """A pair with a broken image is left out."""
    if isinstance(dataset, PairBinDataset):
        rows, same = np.arange(len(dataset)).reshape(-1, 2), dataset.same
    else:
        path = config.pairs or Path(config.src) / pair_list.NAME
        if not path.is_file():
            raise UserError(f"{config.src}: a pair set needs pairs; give a list with --pairs (`visard pairs make`)")
        rows, same = pair_list.read_pair_list(path, dataset.ids)
    needed = np.unique(rows)
    data = {image.row: image.data for image in _images(config, dataset, needed, problems)}
    whole = [k for k, (left, right) in enumerate(rows.tolist()) if left in data and right in data]
    images = [data[row] for k in whole for row in rows[k].tolist()]
    write_bin(config.out, images, same[whole])
    if problems:
        sidecars.write_table(_list_of_broken(config), ("reason",), [[str(problem)] for problem in problems])
    return len(images)


_WRITERS: dict[Kind, Callable[[ConvertConfig, FaceDataset, list[FormatError]], int]] = {
    "records": _write_records,
    "folder": _write_folder,
    "list": _write_list,
    "lst": _write_list,
    "shards": _write_shards,
    "bin": _write_bin,
}


def _files(
    config: ConvertConfig, dataset: FaceDataset, folder: Path, problems: list[FormatError]
) -> Iterator[tuple[_Image, str]]:
    """Writes the images as files below `folder`; gives each with its path there."""
    names, made = FileNames(), {""}
    for image in _images(config, dataset, np.arange(len(dataset)), problems):
        file = names.path(image.row, image.id, image.identity, image.label, suffix_of(image.data))
        parent = file.rpartition("/")[0]
        if parent not in made:
            (folder / parent).mkdir(parents=True, exist_ok=True)
            made.add(parent)
        (folder / file).write_bytes(image.data)
        yield image, file


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its name when the block ends well."""
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # what a killed conversion left
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_pairs(folder: Path, dataset: FaceDataset) -> None:
    """The pairs of a pair set, also of images that were left out: the protocol says which are missing."""
    if isinstance(dataset, PairBinDataset):
        pair_list.write_pair_list(folder / pair_list.NAME, dataset.ids, dataset.same)


def _write_broken(folder: Path, problems: list[FormatError]) -> None:
    if problems:
        sidecars.write_table(folder / LEFT_OUT, ("reason",), [[str(problem)] for problem in problems])


def _list_of_broken(config: ConvertConfig) -> Path:
    return config.out.with_suffix(f".{LEFT_OUT}") if config.kind == "bin" else config.out / LEFT_OUT


def _source(config: ConvertConfig) -> dict[str, Any]:
    """What dataset.json says, with what the source's own says."""
    before = Path(config.src) / "dataset.json"
    told: dict[str, Any] = {"command": "visard convert", "from": config.src}
    if before.is_file():
        told["source"] = json.loads(before.read_text(encoding="utf-8")).get("source", {})
    return told
