"""The work of `visard mask`: crops with masks on, written with their parameters, pairs and a page to look at.

In: the configuration, the opened data set, the images to make, the pairs. Out: the folder, and its report.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from visard import pages
from visard.config_masks import KindShares, WearingShares
from visard.console import progress
from visard.data.formats import sidecars
from visard.data.formats.naming import FileNames
from visard.data.transforms import SampleRandom
from visard.data.writer import DatasetWriter
from visard.errors import UserError
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


@dataclass(frozen=True)
class Made:
    """An image of OUT.

    Args:
        job: what was asked for.
        identity: its person, None = unlabelled.
        label: the same as a number.
        data: the image file.
        points: (5, 2) float32 landmarks that the source has, or None.
        line: what masks.jsonl says.
        thumbnail: (S, S, 3) uint8, or None where it is not shown.
    """

    job: Job
    identity: str | None
    label: int
    data: bytes
    points: Float32Array | None
    line: dict[str, Any]
    thumbnail: UInt8Array | None


def write_all(config: MaskCopyConfig, dataset: Any, jobs: list[Job], listed: Listed) -> dict[str, Any]:
    """Makes and writes every image; the report."""
    labels, people = dataset.labels, len(dataset.identities)
    # Identities one after the other and unlabelled ones last, as records need them.
    order = sorted(range(len(jobs)), key=lambda k: (int(labels[jobs[k].row]) % (people + 1), k))
    counts: Counter[str] = Counter()
    kept: set[int] = set()
    shown: list[Made] = []
    writing = _records if config.to == "records" else _folder
    with writing(config, dataset) as (folder, add):
        with open(folder / "masks.jsonl", "w", encoding="utf-8", errors="surrogateescape", newline="\n") as sidecar:
            for number, made in _make_all(config, dataset, jobs, order):
                refused = made.line.get("refused")
                counts[refused or ("masked" if "look" in made.line else "plain")] += 1
                if made.thumbnail is not None:
                    shown.append(made)
                sidecar.write(json.dumps(made.line, ensure_ascii=False) + "\n")
                if refused and config.refused == "leave-out":
                    continue
                add(made)
                kept.add(number)
        report = {
            "images": len(kept),
            "masked": counts["masked"],
            "refused": {reason: counts[reason] for reason in REFUSALS},
            "pairs": 0,
            "pairs_left_out": 0,
            "settings": _settings(config),
        }
        if listed:
            report |= _write_pairs(config, folder, [job.id for job in jobs], listed, kept)
        if not kept:
            raise UserError(f"{config.src}: every crop was refused, so nothing is written; are these aligned faces?")
        (folder / "report.json").write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        pages.write_page(folder / "masks.html", _page(config, report, shown))
    return report


def _make_all(
    config: MaskCopyConfig, dataset: Any, jobs: Sequence[Job], order: Sequence[int]
) -> Iterator[tuple[int, Made]]:
    """Every image, with its job's number."""
    cv2.setNumThreads(1)
    random = SampleRandom(config.seed, 0)
    points_of = _Points(config, dataset)
    own = None if config.own is None else read_own(config.own, config.own_points, *TEXTURE)
    to_be_shown = _spread([k for k in order if jobs[k].tool is not None], SHOWN)
    refused = 0
    with progress("masking", len(order)) as bar:
        for number in order:
            made = _make(config, dataset, jobs[number], random, points_of, own)
            show = number in to_be_shown
            if made.line.get("refused"):
                refused += 1
                show = refused <= SHOWN_REFUSED
            yield number, made if show else _without_thumbnail(made)
            bar.advance()


def _make(
    config: MaskCopyConfig,
    dataset: Any,
    job: Job,
    random: SampleRandom,
    points_of: _Points,
    own: UInt8Array | None,
) -> Made:
    label = int(dataset.labels[job.row])
    identity = None if label < 0 else dataset.identities[label]
    source = dataset.ids[job.row]
    line: dict[str, Any] = {"id": job.id} | ({} if job.id == source else {"source": source})
    image = dataset.image(job.row)
    data, thumbnail = None, image
    if job.tool is not None:
        generator = random.generator(source)
        drawn, by_uv = generator.random(2).tolist()
        if drawn < config.probability:
            look = draw_look(generator, *_shares(config))
            points, origin = points_of(job.row, image)
            name = "template" if own is not None else "uv" if by_uv < 0.5 else "template"
            name = job.tool if job.tool != "mix" else name
            masked = tool(name)(image, points, look) if own is None else template.wear(image, points, look, own)
            line |= {"tool": name, "points": origin}
            if isinstance(masked, Masked):
                quality = min(config.quality, look.jpeg or 100)
                thumbnail, data = masked.image, _encoded(masked.image, job.id, quality)
                line["look"] = asdict(look)
            else:
                line["refused"] = masked
    if data is None:
        same = hasattr(dataset, "encoded")
        data = dataset.encoded(job.row) if same else _encoded(image, job.id, config.quality)
    return Made(job, identity, label, data, dataset.points(job.row), line, thumbnail)


def _without_thumbnail(made: Made) -> Made:
    return Made(made.job, made.identity, made.label, made.data, made.points, made.line, None)


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
def _records(config: MaskCopyConfig, dataset: Any) -> Iterator[tuple[Path, Any]]:
    with DatasetWriter(config.out, dataset.size, {"command": "visard mask", **_settings(config)}) as writer:
        yield writer.folder, lambda made: writer.add(made.job.id, made.identity, made.data, made.points)


@contextmanager
def _folder(config: MaskCopyConfig, dataset: Any) -> Iterator[tuple[Path, Any]]:
    """A hidden folder beside OUT that takes its name when the block ends well."""
    partial = config.out.parent / f".{config.out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # what a killed command left
    partial.mkdir(parents=True)
    names = FileNames()
    renamed: list[tuple[str, str, str]] = []
    points: list[Any] = []

    def add(made: Made) -> None:
        suffix = "png" if made.data.startswith(b"\x89PNG") else "jpg"
        file = names.path(len(points), made.job.id, made.identity, made.label, suffix)
        (partial / file).parent.mkdir(parents=True, exist_ok=True)
        (partial / file).write_bytes(made.data)
        natural = file.split("/")[0] if "/" in file else None
        if (made.job.id, made.identity) != (file, natural):
            renamed.append((file, made.job.id, made.identity or ""))
        points.append(sidecars.points_row(file, made.points))

    try:
        yield partial, add
        if renamed:
            sidecars.write_table(partial / sidecars.IMAGES, sidecars.IMAGES_HEADER, renamed)
        sidecars.write_table(partial / sidecars.POINTS, sidecars.POINTS_HEADER, points)
        os.replace(partial, config.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_pairs(
    config: MaskCopyConfig, folder: Path, ids: Sequence[str], listed: Listed, kept: set[int]
) -> dict[str, int]:
    whole = [pair for pair in listed if pair[0] in kept and pair[1] in kept]
    if not whole:
        raise UserError(f"{config.pairs or config.src}: of every pair one image was refused; try --refused keep")
    left, right, same, fold = (np.array(column) for column in zip(*whole, strict=True))
    pairs = Pairs(left.astype(np.int64), right.astype(np.int64), same.astype(bool), fold.astype(np.int64))
    sides = "second image" if config.side == "second" else "both images"
    remark = f"{Path(config.pairs or config.src).name}, {sides} masked, seed {config.seed}"
    write_pairs(folder / "pairs.txt", pairs, ids, remark=remark)
    return {"pairs": len(whole), "pairs_left_out": len(listed) - len(whole)}


def _settings(config: MaskCopyConfig) -> dict[str, Any]:
    values = asdict(config)
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items() if key != "out"}


def _page(config: MaskCopyConfig, report: dict[str, Any], shown: Sequence[Made]) -> str:
    masked = [made for made in shown if "look" in made.line]
    refused = [made for made in shown if made.line.get("refused")]
    numbers = [("images", f"{report['images']:,}", ""), ("masked", f"{report['masked']:,}", f"tool: {config.tool}")]
    numbers += [("refused", f"{sum(report['refused'].values()):,}", "left out" if config.refused != "keep" else "kept")]
    if report["pairs"]:
        numbers.append(("pairs", f"{report['pairs']:,}", f"{config.side} masked"))
    parts = [pages.tiles(numbers)]
    if masked:
        parts.append(pages.section("Masked", pages.grid([_thumbnail(made) for made in masked], small=True)))
    if refused:
        remark = pages.paragraph("Turned too far, or the points are not those of a face: these crops have no mask.")
        parts.append(pages.section("Refused", remark, pages.grid([_thumbnail(made) for made in refused], small=True)))
    return pages.page("Masks", parts, subtitle=config.src)


def _thumbnail(made: Made) -> pages.Html:
    line = made.line
    look = line.get("look")
    caption = line["refused"] if look is None else f"{look['kind']}, {look['wearing']}, {line['tool']}"
    assert made.thumbnail is not None
    return pages.figure(made.thumbnail, f"{caption} · {line['id']}", suffix=".jpg")


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
