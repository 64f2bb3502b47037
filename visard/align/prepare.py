"""`visard prepare SRC OUT`: photographs in folders of identities -> a prepared data set of aligned crops.

In: SRC/identity/image.jpg; images directly in SRC stay unlabelled. Out: the folder that `visard.data.writer` describes,
and in it

    left_out.csv     id, reason, detail: every photograph that gave no crop
    detections.csv   the face taken in every other one, in photograph pixels; `--detections` reads it
    report.json      settings and counts

Every photograph ends in exactly one of the two lists. Results are kept in OUT.partial a shard at a time until OUT is
complete: the same command goes on after any interruption, and OUT is the same to the byte whatever the number of
processes or stops.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import tyro

import visard
from visard.align import models
from visard.align.crop import CropRule, make_crop
from visard.align.detector import CSV_COLUMNS, Detector, FileDetector, csv_row, read_detections
from visard.align.photographs import Photograph, find_photographs
from visard.align.shards import Job, Outcome, write_shard
from visard.align.workers import Report, Task, run_in_processes
from visard.console import Answer, progress, say
from visard.data.writer import DatasetWriter
from visard.errors import Interrupted, UserError
from visard.kept_work import partial_of

DEFAULT_MIN_SCORE = {"yunet": 0.6, "mtcnn": 0.8, "file": 0.0, "aligned": 0.0}
MIN_FACE_PX = 20


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Photographs in folders of identities -> aligned, packed, indexed crops."""

    src: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Folder with one folder of photographs per person (deeper folders belong to the top one); photographs directly in
    it have no identity."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to make."""
    detector: Literal["yunet", "mtcnn"] = "yunet"
    """Finds the faces; its weights come by `visard models pull`."""
    detections: Path | None = None
    """Boxes and points of another detector (.csv or .jsonl, see docs/align.md) instead of running one."""
    aligned: bool = False
    """SRC holds aligned crops already: only their size is checked and changed."""
    size: int = 112
    """Side of the crops in pixels."""
    quality: int = 95
    """JPEG quality of the crops, 1 to 100."""
    min_score: float | None = None
    """Least confidence of a face; by default 0.6 with yunet, 0.8 with mtcnn, 0 with --detections."""
    min_face_px: int = MIN_FACE_PX
    """Least width of a face's box in the photograph, pixels."""
    processes: int = 0
    """Worker processes; 0 = one a core."""
    overwrite: bool = False
    """Replace OUT, and begin again an unfinished run that had other settings."""

    def __post_init__(self) -> None:
        if not 16 <= self.size <= 1024:
            raise UserError(f"--size is {self.size} px; use 16 to 1024")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality is {self.quality}; use 1 to 100")
        if self.min_score is not None and not 0 <= self.min_score <= 1:
            raise UserError(f"--min-score is {self.min_score}; use 0 to 1")
        if self.min_face_px < 1 or self.processes < 0:
            raise UserError("--min-face-px must be at least 1, --processes at least 0")
        if self.aligned and self.detections is not None:
            raise UserError("--aligned and --detections exclude each other: aligned crops need no points")
        if self.aligned and self.min_score is not None:
            raise UserError("--aligned and --min-score exclude each other: no detector runs on aligned crops")
        if self.aligned and self.min_face_px != MIN_FACE_PX:
            raise UserError("--aligned and --min-face-px exclude each other: no face is measured in aligned crops")
        if self.detector != "yunet" and self.way != self.detector:
            given = "--aligned" if self.aligned else "--detections"
            raise UserError(f"{given} and --detector {self.detector} exclude each other: give one source of points")

    @property
    def way(self) -> str:
        """Where points come from: "yunet", "mtcnn", "file" or "aligned"."""
        return "aligned" if self.aligned else "file" if self.detections is not None else self.detector

    @property
    def least_score(self) -> float:
        return DEFAULT_MIN_SCORE[self.way] if self.min_score is None else self.min_score


def main(config: PrepareConfig) -> Answer:
    """Runs or goes on with the command.

    Raises:
        UserError: nothing to do, settings that do not fit, something in OUT's or OUT.partial's place.
        Interrupted: by Ctrl-C or SIGTERM; what is done is kept.
    """
    _check_out(config)
    photographs, others = find_photographs(config.src)
    usable = [photograph for photograph in photographs if not _has_line_break(photograph.id)]
    job = Job(partial_of(config.out), usable, _settings(config))
    unusable = [photograph for photograph in photographs if _has_line_break(photograph.id)]
    with _single_threaded(config):
        if config.out.exists() and not _is_empty_folder(config.out) and not config.overwrite:
            if (report := job.finished_report(config.out)) is not None:
                job.clear()
                return Answer(value={"out": str(config.out), **report}, text=_text(config.out, report))
            raise UserError(f"{config.out} exists already; name another folder, or give --overwrite to replace it")
        job.require_own()
        if job.changed_settings() and (config.overwrite or not job.finished()):
            job.clear()
        finished = job.begin()
        try:
            _run(config, job, finished)
        except KeyboardInterrupt as cause:
            raise Interrupted.by(
                cause,
                f"{job.done():,} of {len(job.photographs):,} photographs are done and kept in {job.directory}, "
                "the same command goes on with the others",
            ) from None
        report = _assemble(config, job, unusable, others)
        _move_into_place(job.directory, config.out)
        job.clear()
    return Answer(value={"out": str(config.out), **report}, text=_text(config.out, report))


def _check_out(config: PrepareConfig) -> None:
    """OUT is deleted when it is replaced: it must not hold the photographs, nor be anything but a prepared data set."""
    source, out = config.src.resolve(), config.out.resolve()
    if out == source or out in source.parents:
        raise UserError(f"{config.out} is the folder of the photographs or holds it; name another folder for the crops")
    ours = config.out.is_dir() and (_is_empty_folder(config.out) or (config.out / "dataset.json").is_file())
    if config.overwrite and config.out.exists() and not ours:
        raise UserError(f"{config.out} is not a prepared data set, and is not replaced; name another folder")


def _run(config: PrepareConfig, job: Job, finished: set[int]) -> None:
    done = job.done()
    if finished:
        say(f"goes on: {done:,} of {len(job.photographs):,} photographs are done")
    left = [shard for shard in range(job.shards) if shard not in finished]
    if not left:
        return
    items = ((job.path(shard), job.members(shard)) for shard in left)
    processes = min(config.processes or _cores(), len(left))
    with progress("prepare", len(job.photographs) - done, "photographs") as bar:
        for count in run_in_processes(_MakeTask(config), items, processes):
            bar.advance(count)


@dataclass(frozen=True)
class _MakeTask:
    """Picklable maker of the work that each process does."""

    config: PrepareConfig

    def __call__(self) -> Task:
        config = self.config
        cv2.setNumThreads(1)
        _set_torch_threads(config, 1)
        detector = None if config.aligned else make_detector(config)
        rule = CropRule(
            size=config.size, quality=config.quality, min_score=config.least_score, min_face_px=config.min_face_px
        )

        def task(item: tuple[Path, Sequence[Photograph]], report: Report) -> None:
            path, photographs = item
            outcomes = []
            for photograph in photographs:
                outcomes.append(make_crop(config.src / photograph.id, photograph.id, rule, detector))
                report(1)
            write_shard(path, outcomes)

        return task


def make_detector(config: PrepareConfig) -> Detector:
    """The detector that a configuration names, loaded. Raises UserError where its weights or file are missing."""
    if config.detections is not None:
        return FileDetector(read_detections(config.detections))
    if config.detector == "mtcnn":
        from visard.align.mtcnn import MTCNN

        return MTCNN(*models.mtcnn_paths(), min_face_px=config.min_face_px)
    from visard.align.yunet import YuNet

    return YuNet(models.yunet_paths(), min_score=config.least_score)


def _assemble(
    config: PrepareConfig, job: Job, unusable: Sequence[Photograph], others: dict[str, int]
) -> dict[str, Any]:
    """Writes job.directory/assembled, the whole of OUT, from the finished shards; the report."""
    target = job.directory / "assembled"
    shutil.rmtree(target, ignore_errors=True)  # of a run that was stopped before it was moved into place
    if not any(not outcome.reason for outcome in _outcomes(job)):
        _raise_no_crop(config, job)
    identities = {photograph.id: photograph.identity for photograph in job.photographs}
    people: set[str | None] = set()
    unlabelled = 0
    reasons: Counter[str] = Counter()
    several = 0
    with (
        DatasetWriter(target, config.size, {"command": "prepare", **_settings(config)}) as writer,
        _table(job.directory / "left_out.csv", ("id", "reason", "detail")) as left_out,
        _table(job.directory / "detections.csv", CSV_COLUMNS) as detections,
    ):
        for photograph in unusable:
            reasons["unusable name"] += 1
            left_out.writerow([photograph.id, "unusable name", "a line break in the file name"])
        for outcome in _outcomes(job):
            if outcome.reason:
                reasons[outcome.reason] += 1
                left_out.writerow([outcome.id, outcome.reason, outcome.detail])
                continue
            identity = identities[outcome.id]
            people.add(identity)
            unlabelled += identity is None
            several += outcome.faces > 1
            points = np.array(outcome.points, dtype=np.float32).reshape(5, 2) if outcome.points else None
            writer.add(outcome.id, identity, outcome.jpeg, points)
            if outcome.box:
                detections.writerow(csv_row(outcome.id, outcome.score, outcome.box, outcome.photo_points))
    photographs = len(job.photographs) + len(unusable)
    report = {
        "photographs": photographs,
        "crops": photographs - sum(reasons.values()),
        "identities": len(people - {None}),
        "unlabelled": unlabelled,
        "identities_left_out": len({*identities.values()} - people - {None}),
        "left_out": sum(reasons.values()),
        "reasons": dict(sorted(reasons.items())),
        "several_faces": several,
        "other_files": others,
        "job": job.description,
    }
    for name in ("left_out.csv", *(() if config.aligned else ("detections.csv",))):
        os.replace(job.directory / name, target / name)
    (target / "report.json").write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return report


def _outcomes(job: Job) -> Iterator[Outcome]:
    for shard in range(job.shards):
        yield from job.read(shard)


@contextlib.contextmanager
def _table(path: Path, header: Sequence[str]) -> Iterator[Any]:
    """A csv writer whose file takes file names that are not UTF-8 as they are."""
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        yield writer


def _raise_no_crop(config: PrepareConfig, job: Job) -> None:
    counts = Counter(outcome.reason for outcome in _outcomes(job))
    first = next(_outcomes(job))
    job.clear()
    if set(counts) == {"not listed"}:
        raise UserError(
            f"{config.detections} names none of the {len(job.photographs):,} photographs; its ids must be their paths "
            f"below {config.src}, such as {first.id}"
        )
    raise UserError(
        f"none of the {len(job.photographs):,} photographs gave a crop: {_listed(counts)}; "
        f"the first, {first.id}: {first.detail}"
    )


def _move_into_place(work: Path, out: Path) -> None:
    """Renames `work`/assembled to `out`; where `out` exists it steps aside into `work`, which is cleared at the end."""
    if out.exists():
        shutil.rmtree(work / "replaced", ignore_errors=True)  # of a run that was stopped between the two renames
        os.replace(out, work / "replaced")
    os.replace(work / "assembled", out)


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """Everything that changes the output, as JSON values."""
    settings: dict[str, Any] = {
        "points": config.way,
        "size": config.size,
        "quality": config.quality,
        "visard": visard.__version__,
        "opencv": cv2.__version__,
    }
    if config.aligned:
        return settings
    settings |= {"min_score": config.least_score, "min_face_px": config.min_face_px}
    if config.detections is not None:
        files, kind = [config.detections], "detections"
        if not config.detections.is_file():
            raise UserError(f"{config.detections}: no such file of detections; check the name given to --detections")
    else:
        files, kind = models.mtcnn_paths() if config.detector == "mtcnn" else models.yunet_paths()[:1], "weights"
    settings[kind] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return settings


def _text(out: Path, report: dict[str, Any]) -> str:
    lines = [
        f"{out}: {report['crops']:,} crops of {report['identities']:,} identities "
        f"from {report['photographs']:,} photographs"
    ]
    if report["several_faces"]:
        lines.append(f"{report['several_faces']:,} photographs show several faces: the largest central one was taken")
    if report["left_out"]:
        lines.append(f"{report['left_out']:,} left out ({_listed(report['reasons'])}): {out / 'left_out.csv'}")
    if report["identities_left_out"]:
        lines.append(f"{report['identities_left_out']:,} identities have no crop")
    if report["other_files"]:
        lines.append(f"other files passed over: {_listed(report['other_files'])}")
    if report["unlabelled"]:
        lines.append(
            f"{report['unlabelled']:,} crops have no identity (their photographs lie directly in SRC): "
            "nothing is learnt from them; put each into its person's folder"
        )
    elif report["identities"] == 1 and report["crops"] > 1:
        lines.append("there is one identity only: is SRC the folder that holds the people's folders?")
    return "\n".join(lines)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _has_line_break(name: str) -> bool:
    return "\n" in name or "\r" in name


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _single_threaded(config: PrepareConfig) -> Iterator[None]:
    """One thread a process, put back after it: cores are shared out by processes, and sums come out the same
    everywhere."""
    before = cv2.getNumThreads(), _set_torch_threads(config, 1)
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before[0])
        _set_torch_threads(config, before[1])


def _set_torch_threads(config: PrepareConfig, threads: int) -> int:
    """The number of threads there was; torch is imported only for the detector that needs it."""
    if config.way != "mtcnn":
        return threads
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    return before
