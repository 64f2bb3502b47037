"""The work of `visard mask`: crops with masks on, written with their parameters, pairs and a page to look at.

In: the configuration, the opened data set, the images to make, the pairs. Out: the folder, and its report.
Images are made a shard at a time into OUT.partial (`visard.kept_work`), from where the same command goes on; when all
are there, OUT is put together from them and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np

import visard
from visard import pages
from visard.config_masks import KindShares, WearingShares
from visard.console import progress, say
from visard.data.decode import decode
from visard.data.formats import sidecars
from visard.data.formats.naming import FileNames, suffix_of
from visard.data.transforms import SampleRandom
from visard.data.writer import DatasetWriter
from visard.errors import Interrupted, UserError
from visard.kept_work import Entry, KeptWork, partial_of, write_shard
from visard.masks import template
from visard.masks.augment import shares_of, template_points, tool
from visard.masks.own import read_own
from visard.masks.records import KINDS, REFUSALS, WEARINGS, Masked, draw_look
from visard.masks.shapes import TEXTURE
from visard.protocols.pair_files import Pairs, write_pairs
from visard.recipes.mask import Job, MaskCopyConfig
from visard.records import Float32Array, UInt8Array

SHOWN, SHOWN_REFUSED = 96, 24

Listed = Sequence[tuple[int, int, bool, int]]
"""Pairs: number of the first image's job, of the second's, same person, fold."""


def write_all(config: MaskCopyConfig, dataset: Any, jobs: Sequence[Job], listed: Listed) -> dict[str, Any]:
    """Makes and writes every image, or those that an interrupted command has left; the report."""
    maker = _Maker(config, dataset)
    labels, people = dataset.labels, len(dataset.identities)
    # Identities one after the other and unlabelled ones last, as records need them.
    order = sorted(range(len(jobs)), key=lambda k: (int(labels[jobs[k].row]) % (people + 1), k))
    work = _work(config, dataset, [jobs[k] for k in order])
    if config.out.exists():
        report = work.finished_report(config.out)
        if report is None:
            raise UserError(f"{config.out} exists already; name another folder or remove it")
    else:
        _make_missing(maker, [jobs[k] for k in order], work)
        try:
            report = _assemble(config, dataset, jobs, order, listed, work)
        except _EmptyError:
            work.clear()  # other settings are what helps, and they would not go on with it
            raise
        os.replace(work.directory / ASSEMBLED, config.out)
    work.clear()
    return report


ASSEMBLED = "assembled"


class _EmptyError(UserError):
    """What was refused leaves nothing to write."""


def _work(config: MaskCopyConfig, dataset: Any, jobs: Sequence[Job]) -> KeptWork:
    """Where finished images are kept. Another picture under the same id is not noticed."""
    settings = {**_settings(config), "visard": visard.__version__, "opencv": cv2.__version__}
    files = [] if config.own is None else [config.own, config.own.with_suffix(".txt")]
    if config.points == "detected":
        from visard.align import models

        files += models.yunet_paths()[:1]
    settings["files"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}
    return KeptWork(
        partial_of(config.out),
        command="visard mask",
        things="images",
        count=len(jobs),
        keys=(f"{job.id}\0{dataset.ids[job.row]}\0{int(dataset.labels[job.row])}\0{job.tool}" for job in jobs),
        settings=settings,
        again="remove it",
    )


def _make_missing(maker: _Maker, jobs: Sequence[Job], work: KeptWork) -> None:
    """Makes the shards that are not there."""
    finished = work.begin()
    done = work.done()
    if finished:
        say(f"goes on: {done:,} of {len(jobs):,} images are done")
    if len(finished) == work.shards:
        return
    try:
        with progress("masking", len(jobs), done=done) as bar:
            for shard in range(work.shards):
                if shard in finished:
                    continue
                made: list[Entry] = []
                for number in work.numbers(shard):
                    made.append(maker.make(jobs[number]))
                    bar.advance()
                write_shard(work.path(shard), made)
    except KeyboardInterrupt as cause:
        raise Interrupted.by(
            cause,
            f"{work.done():,} of {len(jobs):,} images are done and kept in {work.directory}, the same command goes on "
            "with the others",
        ) from None


def _assemble(
    config: MaskCopyConfig, dataset: Any, jobs: Sequence[Job], order: Sequence[int], listed: Listed, work: KeptWork
) -> dict[str, Any]:
    """Writes the whole of OUT from the finished shards; the report."""
    target = work.directory / ASSEMBLED
    shutil.rmtree(target, ignore_errors=True)  # of a command that was stopped before it was moved into place
    counts: Counter[str] = Counter()
    kept: set[int] = set()
    shown = _Shown(config, dataset.size, [k for k in order if jobs[k].tool is not None])
    writing = _records if config.to == "records" else _folder
    with writing(config, dataset, target) as (folder, add):
        with open(folder / "masks.jsonl", "w", encoding="utf-8", errors="surrogateescape", newline="\n") as sidecar:
            for number, (line, data) in zip(order, _entries(work, [jobs[k].id for k in order]), strict=True):
                refused = line.get("refused")
                counts[refused or ("masked" if "look" in line else "plain")] += 1
                shown.note(number, line, data)
                sidecar.write(json.dumps(line, ensure_ascii=False) + "\n")
                if refused and config.refused == "leave-out":
                    continue
                add(jobs[number], data)
                kept.add(number)
        report = {
            "images": len(kept),
            "masked": counts["masked"],
            "refused": {reason: counts[reason] for reason in REFUSALS},
            "pairs": 0,
            "pairs_left_out": 0,
            "job": work.description,
        }
        if listed:
            report |= _write_pairs(config, folder, [job.id for job in jobs], listed, kept)
        if not kept:
            raise _EmptyError(f"{config.src}: every crop was refused, so nothing is written; are these aligned faces?")
        (folder / "report.json").write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        pages.write_page(folder / "masks.html", _page(config, report, shown))
    return report


def _entries(work: KeptWork, ids: Sequence[str]) -> Iterator[Entry]:
    with progress("writing", len(ids)) as bar:
        for shard in range(work.shards):
            numbers = work.numbers(shard)
            for entry in work.entries(shard, ids[numbers.start : numbers.stop]):
                yield entry
                bar.advance()


class _Maker:
    """Masks one image after the other, each by its own random numbers.

    Raises:
        UserError: an own mask or a detector's weights that are not there.
    """

    def __init__(self, config: MaskCopyConfig, dataset: Any) -> None:
        cv2.setNumThreads(1)
        self._config, self._dataset = config, dataset
        self._random = SampleRandom(config.seed, 0)
        self._shares = _shares(config)
        self._points_of = _Points(config, dataset)
        self._own = None if config.own is None else read_own(config.own, config.own_points, *TEXTURE)

    def make(self, job: Job) -> Entry:
        """The line of masks.jsonl, and the image file."""
        config, dataset = self._config, self._dataset
        source = dataset.ids[job.row]
        line: dict[str, Any] = {"id": job.id} | ({} if job.id == source else {"source": source})
        image = dataset.image(job.row)
        data = None
        if job.tool is not None:
            generator = self._random.generator(source)
            drawn, by_uv = generator.random(2).tolist()
            if drawn < config.probability:
                look = draw_look(generator, *self._shares)
                points, origin = self._points_of(job.row, image)
                name = "template" if self._own is not None else "uv" if by_uv < 0.5 else "template"
                name = job.tool if job.tool != "mix" else name
                if self._own is None:
                    masked = tool(name)(image, points, look)
                else:
                    masked = template.wear(image, points, look, self._own)
                line |= {"tool": name, "points": origin}
                if isinstance(masked, Masked):
                    data = _encoded(masked.image, job.id, min(config.quality, look.jpeg or 100))
                    line["look"] = asdict(look)
                else:
                    line["refused"] = masked
        if data is None:
            same = hasattr(dataset, "encoded")
            data = dataset.encoded(job.row) if same else _encoded(image, job.id, config.quality)
        return line, data


def _encoded(image: UInt8Array, image_id: str, quality: int) -> bytes:
    """JPEG, or PNG where the id is that of a PNG file."""
    return pages.encode_image(image, ".png" if image_id.lower().endswith(".png") else ".jpg", quality=quality)


class _Points:
    """Landmarks of a crop, and where they are from, as `--points` says."""

    PAD = 0.4

    def __init__(self, config: MaskCopyConfig, dataset: Any) -> None:
        self._dataset, self._way = dataset, config.points
        self._template = template_points(dataset.size)
        self._detector: Any = None
        if config.points == "detected":
            from visard.align import models
            from visard.align.yunet import YuNet

            self._detector = YuNet(models.yunet_paths())

    def __call__(self, row: int, image: UInt8Array) -> tuple[Float32Array, str]:
        if self._way == "detected":
            found = self._detected(image)
            return (self._template, "template") if found is None else (found, "detected")
        kept = self._dataset.points(row) if self._way == "kept" else None
        return (self._template, "template") if kept is None else (kept, "kept")

    def _detected(self, image: UInt8Array) -> Float32Array | None:
        from visard.align.detector import largest_central

        pad = round(self.PAD * image.shape[0])  # a crop ends where the face does; detectors expect some room
        padded = cv2.copyMakeBorder(image, pad, pad, pad, pad, cv2.BORDER_REPLICATE)
        face = largest_central(self._detector.detect(padded))
        return None if face is None else (face.points - pad).astype(np.float32)


@contextmanager
def _records(config: MaskCopyConfig, dataset: Any, target: Path) -> Iterator[tuple[Path, Any]]:
    with DatasetWriter(target, dataset.size, {"command": "visard mask", **_settings(config)}) as writer:

        def add(job: Job, data: bytes) -> None:
            writer.add(job.id, _identity(dataset, job), data, dataset.points(job.row))

        yield writer.folder, add


@contextmanager
def _folder(config: MaskCopyConfig, dataset: Any, target: Path) -> Iterator[tuple[Path, Any]]:
    target.mkdir()
    names = FileNames()
    renamed: list[tuple[str, str, str]] = []
    points: list[Any] = []

    def add(job: Job, data: bytes) -> None:
        identity = _identity(dataset, job)
        file = names.path(len(points), job.id, identity, int(dataset.labels[job.row]), suffix_of(data))
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        (target / file).write_bytes(data)
        natural = file.split("/")[0] if "/" in file else None
        if (job.id, identity) != (file, natural):
            renamed.append((file, job.id, identity or ""))
        points.append(sidecars.points_row(file, dataset.points(job.row)))

    yield target, add
    if renamed:
        sidecars.write_table(target / sidecars.IMAGES, sidecars.IMAGES_HEADER, renamed)
    sidecars.write_table(target / sidecars.POINTS, sidecars.POINTS_HEADER, points)


def _identity(dataset: Any, job: Job) -> str | None:
    """The person, None = unlabelled."""
    label = int(dataset.labels[job.row])
    return None if label < 0 else dataset.identities[label]


def _write_pairs(
    config: MaskCopyConfig, folder: Path, ids: Sequence[str], listed: Listed, kept: set[int]
) -> dict[str, int]:
    whole = [pair for pair in listed if pair[0] in kept and pair[1] in kept]
    if not whole:
        raise _EmptyError(f"{config.pairs or config.src}: of every pair one image was refused; try --refused keep")
    left, right, same, fold = (np.array(column) for column in zip(*whole, strict=True))
    pairs = Pairs(left.astype(np.int64), right.astype(np.int64), same.astype(bool), fold.astype(np.int64))
    sides = "second image" if config.side == "second" else "both images"
    remark = f"{Path(config.pairs or config.src).name}, {sides} masked, seed {config.seed}"
    write_pairs(folder / "pairs.txt", pairs, ids, remark=remark)
    return {"pairs": len(whole), "pairs_left_out": len(listed) - len(whole)}


def _settings(config: MaskCopyConfig) -> dict[str, Any]:
    values = asdict(config)
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items() if key != "out"}


class _Shown:
    """What masks.html shows: some of the images that were to be masked, evenly, and the first refused ones.

    Args:
        config: of the command.
        size: S, of the crops.
        numbers: of the images that were to be masked, in order.
    """

    def __init__(self, config: MaskCopyConfig, size: int, numbers: Sequence[int]) -> None:
        self.masked: list[pages.Html] = []
        self.refused: list[pages.Html] = []
        self._size, self._source = size, config.src
        self._chosen = _spread(numbers, SHOWN)

    def note(self, number: int, line: dict[str, Any], data: bytes) -> None:
        """Takes an image up if it is to be shown."""
        look, refused = line.get("look"), line.get("refused")
        if refused and len(self.refused) < SHOWN_REFUSED:
            self.refused.append(self._thumbnail(refused, line, data))
        elif look is not None and number in self._chosen:
            self.masked.append(self._thumbnail(f"{look['kind']}, {look['wearing']}, {line['tool']}", line, data))

    def _thumbnail(self, caption: str, line: dict[str, Any], data: bytes) -> pages.Html:
        image = decode(data, self._size, True, self._source)
        return pages.figure(image, f"{caption} · {line['id']}", suffix=".jpg")


def _page(config: MaskCopyConfig, report: dict[str, Any], shown: _Shown) -> str:
    numbers = [("images", f"{report['images']:,}", ""), ("masked", f"{report['masked']:,}", f"tool: {config.tool}")]
    numbers += [("refused", f"{sum(report['refused'].values()):,}", "left out" if config.refused != "keep" else "kept")]
    if report["pairs"]:
        numbers.append(("pairs", f"{report['pairs']:,}", f"{config.side} masked"))
    parts = [pages.tiles(numbers)]
    if shown.masked:
        parts.append(pages.section("Masked", pages.grid(shown.masked, small=True)))
    if shown.refused:
        remark = pages.paragraph("Turned too far, or the points are not those of a face: these crops have no mask.")
        parts.append(pages.section("Refused", remark, pages.grid(shown.refused, small=True)))
    return pages.page("Masks", parts, subtitle=config.src)


def _shares(config: MaskCopyConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """How often each of `KINDS` and `WEARINGS` is drawn."""
    usual = shares_of(KindShares(), WearingShares())
    chosen = (config.kinds or KINDS, config.wearings or WEARINGS)
    kept = [
        [share if name in some else 0.0 for name, share in zip(names, values, strict=True)]
        for some, names, values in zip(chosen, (KINDS, WEARINGS), usual, strict=True)
    ]
    kinds, wearings = (tuple(share / sum(values) for share in values) for values in kept)
    return kinds, wearings


def _spread(numbers: Sequence[int], count: int) -> set[int]:
    """At most `count` of them, evenly."""
    if len(numbers) <= count:
        return set(numbers)
    return {numbers[round(k)] for k in np.linspace(0, len(numbers) - 1, count).tolist()}
