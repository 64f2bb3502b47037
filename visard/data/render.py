"""`visard render OUT`: rendered faces to disk, as a prepared data set, as a folder of crops, or as photographs.

In: how many people and images, a seed. Out: OUT, complete or not at all. Records are written anew after an
interruption; a folder goes on with the images that are missing.

    records        a prepared data set: what `visard prepare` writes, with the true landmarks
    folder         OUT/<identity>/<image>.jpg and OUT/points.csv (id, x and y of the five landmarks in pixels)
    --photographs  the same folder, but of pictures that are not aligned: to play one's own photographs
"""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from visard.console import Answer, progress
from visard.errors import Interrupted, UserError
from visard.signals import held_back, leave_to_parent

# Images a worker makes at once.
BLOCK = 32
# Below, starting processes takes longer than rendering.
WORTH_PROCESSES = 500
SETTINGS = "settings.json"


@dataclass(frozen=True, kw_only=True)
class RenderConfig:
    """`visard render`."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Where to write; must not exist."""
    identities: int = 200
    """How many people."""
    images_per_identity: int = 20
    """How many images of each."""
    size: int = 112
    """Size of a crop in pixels."""
    seed: int = 0
    """Another seed is another population."""
    first_identity: int = 0
    """Number of the first person; take ranges that do not overlap for training and evaluation."""
    format: Literal["records", "folder"] = "records"
    """A prepared data set, or JPEG files in a folder for each person."""
    photographs: bool = False
    """Photographs that are not aligned, in a folder for each person (whatever `format` says)."""
    photograph_size: int = 256
    """Size of a photograph in pixels."""
    strangers: float = 0.1
    """Share of the photographs with a second, smaller face."""
    empty: float = 0.0
    """Share of the photographs with nobody in them."""
    quality: int = 95
    """JPEG quality of the files; the pictures themselves have been through 30 to 97 already."""
    workers: int | None = None
    """Processes that render, of one thread each; 0 renders in this one. By default one a core from 500 images on."""

    def __post_init__(self) -> None:
        _check(1 <= self.quality <= 100, f"--quality is {self.quality}; use 1 to 100")
        _check(self.workers is None or self.workers >= 0, f"--workers is {self.workers}; use 0 or more")
        _check(32 <= self.photograph_size <= 1600, f"--photograph-size is {self.photograph_size} px; use 32 to 1600")
        _check(self.strangers >= 0 and self.empty >= 0, "--strangers and --empty are shares; use 0 to 1")
        only = (self.photograph_size, self.strangers, self.empty) == (256, 0.1, 0.0)
        _check(
            self.photographs or only,
            "--photograph-size, --strangers and --empty belong to --photographs; add it or leave them out",
        )
        _check(self.strangers + self.empty <= 1, "--strangers and --empty together exceed 1; make them smaller")
        for name, least in (("identities", 1), ("images_per_identity", 1), ("first_identity", 0), ("seed", 0)):
            value = getattr(self, name)
            # Image and person numbers are 64-bit.
            _check(least <= value < 2**31, f"--{name.replace('_', '-')} is {value}; use {least} to {2**31 - 1:,}")
        _check(16 <= self.size <= 1024, f"--size is {self.size} px; use 16 to 1024")


def main(config: RenderConfig) -> Answer:
    """Renders and writes everything.

    Raises:
        UserError: OUT exists, or an unfinished OUT has other settings.
        Interrupted: by Ctrl-C or SIGTERM.
    """
    if config.out.exists():
        raise UserError(f"{config.out} exists already; name another folder or remove it")
    images = config.identities * config.images_per_identity
    kind = "photographs" if config.photographs else config.format
    try:
        if kind == "records":
            _write_records(config, images)
        else:
            _write_folder(config, images)
    except KeyboardInterrupt as cause:
        kept = f"what is done is kept in {_partial(config)}, the same command goes on where it stopped"
        rest = "nothing is kept of unfinished records, the same command begins anew" if kind == "records" else kept
        raise Interrupted.by(cause, rest) from None
    value = {
        "out": str(config.out),
        "kind": kind,
        "identities": config.identities,
        "images": images,
        "seed": config.seed,
    }
    return Answer(value, f"{config.out}: {images:,} images of {config.identities:,} people ({kind})")


@dataclass(frozen=True)
class _Made:
    index: int
    jpeg: bytes
    points: NDArray[np.float32]


def _write_records(config: RenderConfig, images: int) -> None:
    from visard.data.writer import DatasetWriter

    source = {"command": "visard render", **_settings(config)}
    ids = _dataset(config)
    with (
        DatasetWriter(config.out, size=config.size, source=source) as writer,
        progress("rendering", images) as shown,
    ):
        for made in _make(config, np.arange(images)):
            writer.add(ids.ids[made.index], ids.ids[made.index].split("/")[0], made.jpeg, made.points)
            shown.advance()


def _write_folder(config: RenderConfig, images: int) -> None:
    partial = _partial(config)
    partial.mkdir(parents=True, exist_ok=True)
    settings = json.dumps(_settings(config), indent=2, sort_keys=True) + "\n"
    kept = partial / SETTINGS
    if kept.exists() and kept.read_text(encoding="utf-8") != settings:
        raise UserError(f"{partial} was begun with other settings; remove it or repeat them")
    _replace(kept, settings.encode())
    dataset = _dataset(config)
    files = [partial / f"{dataset.ids[i]}.jpg" for i in range(images)]
    missing = np.array([i for i, file in enumerate(files) if not file.exists()], np.int64)
    with progress("rendering", images, done=images - len(missing)) as shown:
        for made in _make(config, missing):
            files[made.index].parent.mkdir(exist_ok=True)
            _replace(files[made.index], made.jpeg)
            shown.advance()
    with open(partial / "points.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["id", *(f"{axis}{k}" for k in range(5) for axis in "xy")])
        for start in range(0, images, 4096):
            indices = np.arange(start, min(start + 4096, images))
            for index, points in zip(indices, _true_points(config, dataset, indices), strict=True):
                # A photograph with nobody in it has no points.
                numbers = [] if np.isnan(points).any() else [f"{v:.3f}" for v in points.ravel()]
                table.writerow([f"{dataset.ids[int(index)]}.jpg", *numbers])
    kept.unlink()
    os.replace(partial, config.out)


def _partial(config: RenderConfig) -> Path:
    """Where a folder is made."""
    return config.out.parent / f".{config.out.name}.partial"


def _true_points(config: RenderConfig, dataset: Any, indices: NDArray[np.int64]) -> NDArray[np.float32]:
    if not config.photographs:
        return dataset.all_points(indices)
    points = dataset.photograph_points(indices, config.photograph_size)
    points[_faces(config, indices) == 0] = np.nan
    return points


def _make(config: RenderConfig, indices: NDArray[np.int64]) -> Iterator[_Made]:
    """The images in the order of `indices`, whatever the number of workers."""
    blocks = [indices[start : start + BLOCK] for start in range(0, len(indices), BLOCK)]
    pool: AbstractContextManager[Any]
    workers = config.workers
    if workers is None:
        workers = os.cpu_count() or 1 if len(indices) >= WORTH_PROCESSES else 0
    if workers == 0:
        pool = _one_thread_here()
        made = map(_make_block, ((config, block) for block in blocks))
    else:
        with held_back():
            pool = get_context("spawn").Pool(workers, initializer=_start_worker)
        made = pool.imap(_make_block, [(config, block) for block in blocks])  # type: ignore[attr-defined]
    with pool:
        for block in made:
            yield from block


def _make_block(task: tuple[RenderConfig, NDArray[np.int64]]) -> list[_Made]:
    import cv2

    config, indices = task
    dataset = _dataset(config)
    if config.photographs:
        faces = _faces(config, indices)
        pictures = np.empty((len(indices), config.photograph_size, config.photograph_size, 3), np.uint8)
        for count in np.unique(faces):
            chosen = faces == count
            shots = dataset.photographs(indices[chosen], config.photograph_size, faces=int(count))
            pictures[chosen] = shots.images.numpy()
    else:
        pictures = dataset.images(indices)
    # Crops carry their points into the records; those of photographs are written at the end.
    points = dataset.all_points(indices)
    result = []
    for index, picture, place in zip(indices, pictures, points, strict=True):
        done, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, config.quality])
        assert done, "OpenCV could not encode a picture"
        result.append(_Made(int(index), data.tobytes(), place))
    return result


def _faces(config: RenderConfig, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) how many faces each photograph shows: 0, 1 or 2, as pure a function of its number as its pixels."""
    draw = _dataset(config).latents(indices).uniform("photo faces").numpy()
    return np.where(draw < config.empty, 0, np.where(draw > 1 - config.strangers, 2, 1))


def _dataset(config: RenderConfig) -> Any:
    from visard.data.rendered import RenderedFaces

    return RenderedFaces(
        identities=config.identities,
        images_per_identity=config.images_per_identity,
        seed=config.seed,
        size=config.size,
        first_identity=config.first_identity,
    )


def _settings(config: RenderConfig) -> dict[str, Any]:
    """What decides the pictures."""
    return {key: value for key, value in asdict(config).items() if key not in ("out", "workers")}


def _start_worker() -> None:
    import torch

    leave_to_parent(signal.SIGINT)  # SIGTERM is how a pool ends its workers
    torch.set_num_threads(1)


@contextmanager
def _one_thread_here() -> Iterator[None]:
    """Rendering is many small operations: a second thread mostly waits, at a tenth of the speed on busy cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _replace(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_bytes(data)
    os.replace(beside, path)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
