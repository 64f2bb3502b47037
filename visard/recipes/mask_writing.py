"""The work of `visard mask`: crops with masks on, written with their parameters, lists and a page to look at.

In: the configuration, the opened data set, what is to be made (`Plan`). Out: the folder, and its report.
Images are made a shard at a time into OUT.partial (`visard.kept_work`), from where the same command goes on; when all
are there, OUT is put together from them and renamed. Each image is kept with a digest of what it was made from: a shard
of which one source has changed meanwhile is made anew.
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
from typing import Any, get_args

import cv2
import numpy as np

import visard
from visard import pages
from visard.config_masks import KindShares, WearingShares
from visard.console import progress, say
from visard.data.formats import sidecars
from visard.data.formats.naming import FileNames, suffix_of
from visard.data.formats.point_lists import PointList
from visard.data.transforms import SampleRandom
from visard.data.writer import DatasetWriter
from visard.errors import Interrupted, UserError
from visard.kept_work import Entry, KeptWork, partial_of, write_shard
from visard.masks import template
from visard.masks.augment import shares_of, tool
from visard.masks.own import read_own
from visard.masks.records import KINDS, REFUSALS, WEARINGS, Look, Masked, Refusal, draw_look
from visard.masks.shapes import TEXTURE
from visard.protocols.pair_files import Pairs, write_pairs
from visard.recipes.mask import Job, MaskCopyConfig, PointsWay
from visard.recipes.mask_page import Shown, page_of
from visard.recipes.mask_points import Points, listed_points, wear_in_place
from visard.recipes.mask_sides import META, Plan, Templates
from visard.records import Float32Array, UInt8Array


def write_all(config: MaskCopyConfig, dataset: Any, plan: Plan) -> dict[str, Any]:
    """Makes and writes every image, or those that an interrupted command has left; the report."""
    points = listed_points(config, dataset.ids)
    maker = _Maker(config, dataset, points)
    labels, people, jobs = dataset.labels, len(dataset.identities), plan.jobs
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
            report = _assemble(config, dataset, plan, order, points, work)
        except _EmptyError:
            work.clear()  # other settings are what helps, and they would not go on with it
            raise
        os.replace(work.directory / ASSEMBLED, config.out)
    work.clear()
    return report


ASSEMBLED = "assembled"
MADE_FROM = "made_from"
"""In the kept work beside each image: the digest of what it was made from."""


class _EmptyError(UserError):
    """What was refused leaves nothing to write."""


def _work(config: MaskCopyConfig, dataset: Any, jobs: Sequence[Job]) -> KeptWork:
    """Where finished images are kept."""
    settings = {**_settings(config), "visard": visard.__version__, "opencv": cv2.__version__}
    files = [] if config.own is None else [config.own, config.own.with_suffix(".txt")]
    if config.points == "detected":
        from visard.align import models

        files += models.yunet_paths()[:1]
    elif config.points not in get_args(PointsWay):
        files.append(Path(config.points))
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
    """Makes the shards that are not there, or of which a source is not what it was."""
    finished = work.begin()
    if changed := [shard for shard in sorted(finished) if not _is_current(maker, jobs, work, shard)]:
        for shard in changed:
            work.path(shard).unlink()
        count = sum(len(work.numbers(shard)) for shard in changed)
        say(f"images have changed since they were masked: {count:,} in {len(changed):,} lots are made anew")
        finished -= set(changed)
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


def _is_current(maker: _Maker, jobs: Sequence[Job], work: KeptWork, shard: int) -> bool:
    """Whether each image of a finished shard was made from what its source is now."""
    chosen = [jobs[number] for number in work.numbers(shard)]
    entries = work.entries(shard, [job.id for job in chosen])
    return all(line.get(MADE_FROM) == maker.source_digest(job) for job, (line, _) in zip(chosen, entries, strict=True))


def _assemble(
    config: MaskCopyConfig,
    dataset: Any,
    plan: Plan,
    order: Sequence[int],
    points: PointList | None,
    work: KeptWork,
) -> dict[str, Any]:
    """Writes the whole of OUT from the finished shards; the report."""
    target = work.directory / ASSEMBLED
    shutil.rmtree(target, ignore_errors=True)  # of a command that was stopped before it was moved into place
    jobs = plan.jobs
    counts: Counter[str] = Counter()
    origins: Counter[str] = Counter()
    kept: set[int] = set()
    worn: set[int] = set()
    shown = Shown(config, dataset.size, [k for k in order if jobs[k].tool is not None])
    writing = _folder if config.loose or config.to == "folder" else _records
    with writing(config, dataset, target) as (folder, add):
        with open(folder / "masks.jsonl", "w", encoding="utf-8", errors="surrogateescape", newline="\n") as sidecar:
            for number, (line, data) in zip(order, _entries(work, [jobs[k].id for k in order]), strict=True):
                del line[MADE_FROM]
                refused = line.get("refused")
                counts[refused or ("masked" if "look" in line else "plain")] += 1
                if "look" in line and not refused:
                    worn.add(number)
                if "points" in line:
                    origins[line["points"]] += 1
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
            "points": dict(sorted(origins.items())),
            "pairs": 0,
            "pairs_left_out": 0,
            "job": work.description,
        }
        if plan.pairs:
            report |= _write_pairs(config, folder, plan, kept)
        if not kept:
            remedy = "are the points of these crops?" if config.loose else "are these aligned faces?"
            raise _EmptyError(f"{config.src}: every crop was refused, so nothing is written; {remedy}")
        made = sorted(kept)
        if plan.templates is not None:
            report |= _write_templates(config, folder, plan, plan.templates, kept, worn)
            made = [number for number in plan.templates.jobs if number in kept]
        if points is not None and points.lines and (config.loose or config.templates is not None):
            _write_points(config, dataset, folder, [jobs[number] for number in made], points)
        (folder / "report.json").write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        pages.write_page(folder / "masks.html", page_of(config, report, shown))
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

    def __init__(self, config: MaskCopyConfig, dataset: Any, points: PointList | None) -> None:
        cv2.setNumThreads(1)
        self._config, self._dataset = config, dataset
        self._random = SampleRandom(config.seed, 0)
        self._shares = _shares(config)
        self._points_of = Points(config, dataset, points)
        self._own = None if config.own is None else read_own(config.own, config.own_points, *TEXTURE)

    def make(self, job: Job) -> Entry:
        """The line of masks.jsonl, and the image file."""
        config, dataset = self._config, self._dataset
        source = dataset.ids[job.row]
        line: dict[str, Any] = {"id": job.id} | ({} if job.id == source else {"source": source})
        line[MADE_FROM] = self.source_digest(job)
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
                masked = self._masked(name, image, points, look)
                line |= {"tool": name} | ({} if points is None else {"points": origin})
                if isinstance(masked, str):
                    line["refused"] = masked
                else:
                    data = _encoded(masked, job.id, min(config.quality, look.jpeg or 100))
                    line["look"] = asdict(look)
        if data is None:
            same = hasattr(dataset, "encoded")
            data = dataset.encoded(job.row) if same else _encoded(image, job.id, config.quality)
        return line, data

    def source_digest(self, job: Job) -> str:
        """Of the image file and of the points that come with it; crops that are rendered are told by their id."""
        digest = hashlib.blake2b(digest_size=8)
        if hasattr(self._dataset, "encoded"):
            digest.update(self._dataset.encoded(job.row))
        points = self._dataset.points(job.row) if job.tool is not None else None
        digest.update(b"" if points is None else points.tobytes())
        return digest.hexdigest()

    def _masked(self, name: str, image: UInt8Array, points: Float32Array | None, look: Look) -> UInt8Array | Refusal:
        """The image with the mask on."""

        def wear(crop: UInt8Array, places: Float32Array) -> Masked | Refusal:
            if self._own is not None:
                return template.wear(crop, places, look, self._own)
            return tool(name)(crop, places, look)

        if self._config.loose:
            return wear_in_place(image, points, wear)
        assert points is not None  # aligned crops have at least the template's
        masked = wear(image, points)
        return masked.image if isinstance(masked, Masked) else masked


def _encoded(image: UInt8Array, image_id: str, quality: int) -> bytes:
    """JPEG, or PNG where the id is that of a PNG file."""
    return pages.encode_image(image, ".png" if image_id.lower().endswith(".png") else ".jpg", quality=quality)


@contextmanager
def _records(config: MaskCopyConfig, dataset: Any, target: Path) -> Iterator[tuple[Path, Any]]:
    with DatasetWriter(target, dataset.size, {"command": "visard mask", **_settings(config)}) as writer:

        def add(job: Job, data: bytes) -> None:
            writer.add(job.id, _identity(dataset, job), data, dataset.points(job.row))

        yield writer.folder, add


@contextmanager
def _folder(config: MaskCopyConfig, dataset: Any, target: Path) -> Iterator[tuple[Path, Any]]:
    target.mkdir()
    images = target / Path(config.src).resolve().name if config.loose else target
    images.mkdir(exist_ok=True)
    names = FileNames()
    renamed: list[tuple[str, str, str]] = []
    points: list[Any] = []

    def add(job: Job, data: bytes) -> None:
        identity = _identity(dataset, job)
        file = names.path(len(points), job.id, identity, int(dataset.labels[job.row]), suffix_of(data))
        (images / file).parent.mkdir(parents=True, exist_ok=True)
        (images / file).write_bytes(data)
        natural = file.split("/")[0] if "/" in file else None
        if (job.id, identity) != (file, natural):
            renamed.append((file, job.id, identity or ""))
        points.append(sidecars.points_row(file, dataset.points(job.row)))

    yield target, add
    if renamed:
        sidecars.write_table(images / sidecars.IMAGES, sidecars.IMAGES_HEADER, renamed)
    if not config.loose or any(len(row) > 1 for row in points):
        sidecars.write_table(images / sidecars.POINTS, sidecars.POINTS_HEADER, points)


def _identity(dataset: Any, job: Job) -> str | None:
    """The person, None = unlabelled."""
    label = int(dataset.labels[job.row])
    return None if label < 0 else dataset.identities[label]


def _write_pairs(config: MaskCopyConfig, folder: Path, plan: Plan, kept: set[int]) -> dict[str, int]:
    whole = [pair for pair in plan.pairs if pair[0] in kept and pair[1] in kept]
    if not whole:
        raise _EmptyError(f"{config.pairs or config.src}: of every pair one image was refused; try --refused keep")
    left, right, same, fold = (np.array(column) for column in zip(*whole, strict=True))
    pairs = Pairs(left.astype(np.int64), right.astype(np.int64), same.astype(bool), fold.astype(np.int64))
    sides = "both images" if config.side == "both" else f"{config.side} image"
    remark = f"{Path(config.pairs or config.src).name}, {sides} masked, seed {config.seed}"
    write_pairs(folder / "pairs.txt", pairs, [job.id for job in plan.jobs], remark=remark)
    return {"pairs": len(whole), "pairs_left_out": plan.absent_pairs + len(plan.pairs) - len(whole)}


def _write_templates(
    config: MaskCopyConfig, folder: Path, plan: Plan, made: Templates, kept: set[int], worn: set[int]
) -> dict[str, Any]:
    """meta/ with the lists of images and of pairs, of what was kept; for the report, which of them wear a mask."""
    assert config.templates is not None
    lines = [line for line, number in enumerate(made.jobs) if number in kept]
    listed = made.listed.take(lines)
    pairs = None if made.pairs is None else made.pairs.among(listed.templates)
    if pairs is not None and not len(pairs):
        raise _EmptyError(f"{config.pairs}: of every pair one template was refused; try --refused keep")
    (folder / META).mkdir()
    listed.write(folder / META / config.templates.name)
    if pairs is not None and config.pairs is not None:
        pairs.write(folder / META / config.pairs.name)
    masked = {int(made.listed.templates[line]) for line in lines if made.jobs[line] in worn}
    return {
        "templates": len(set(listed.templates.tolist())),
        "templates_masked": len(masked),
        "renumbered": {str(old): new for old, new in made.renumbered.items()},
        "lines_left_out": made.absent + len(made.jobs) - len(lines),
        "pairs": len(pairs or ()),
        "pairs_left_out": made.absent_pairs + len(made.pairs or ()) - len(pairs or ()),
    }


def _write_points(config: MaskCopyConfig, dataset: Any, folder: Path, jobs: Sequence[Job], points: PointList) -> None:
    """meta/ with the list of points, whose lines go with those of the template set's list."""
    lines = [points.line(dataset.ids[job.row], job.id) or "" for job in jobs]
    head = f"{points.header}\n" if points.header else ""
    (folder / META).mkdir(exist_ok=True)
    text = head + "".join(lines)
    (folder / META / Path(config.points).name).write_bytes(text.encode("utf-8", "surrogateescape"))


def _settings(config: MaskCopyConfig) -> dict[str, Any]:
    values = asdict(config)
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items() if key != "out"}


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
