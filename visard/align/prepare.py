"""`visard prepare SRC OUT`: photographs in folders of identities -> a prepared data set of aligned crops.

In: SRC/identity/image.jpg. Out: the folder that `visard.data.writer` describes, and in it

    left_out.csv     id, reason, detail: every photograph that gave no crop
    detections.csv   the face taken in every other one, in photograph pixels; `--detections` reads it
    report.json      settings and counts

Every photograph ends in exactly one of the two lists. Results are kept in OUT.partial a shard at a time until OUT is complete:
the same command goes on after any interruption, and OUT is the same to the byte whatever the number of processes or stops.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from tyro.conf import Positional

import visard
from visard.align import models
from visard.align.detector import CSV_COLUMNS, Detector, FileDetector, csv_row, largest_central, read_detections
from visard.align.photographs import (
    Photograph,
    UnreadableError,
    decode,
    encode_jpeg,
    find_photographs,
    is_jpeg,
    read_bytes,
)
from visard.align.shards import Job, Outcome, write_shard
from visard.align.workers import Report, Task, run_in_processes
from visard.console import Answer, progress, say
from visard.data.writer import DatasetWriter
from visard.errors import UserError
from visard.functional.geometry import similarity_transform, template, warp_crop, warp_points
from visard.records import UInt8Array

DEFAULT_MIN_SCORE = {"yunet": 0.6, "mtcnn": 0.8, "file": 0.0, "aligned": 0.0}


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Photographs in folders of identities -> aligned, packed, indexed crops."""

    src: Positional[Path]
    """Folder with one folder of photographs per person (deeper folders belong to the top one)."""
    out: Positional[Path]
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
    min_face_px: int = 20
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

    @property
    def way(self) -> str:
        """Where points come from: "yunet", "mtcnn", "file" or "aligned"."""
        return "aligned" if self.aligned else "file" if self.detections is not None else self.detector

    @property
    def least_score(self) -> float:
        return DEFAULT_MIN_SCORE[self.way] if self.min_score is None else self.min_score


def main(config: PrepareConfig) -> Answer:
    """Runs or goes on with the command."""
    photographs, others = find_photographs(config.src)
    usable = [photograph for photograph in photographs if not _has_line_break(photograph.id)]
    job = Job(config.out.with_name(f"{config.out.name}.partial"), usable, _settings(config))
    unusable = [photograph for photograph in photographs if _has_line_break(photograph.id)]
    with _stop_on_sigterm(), _single_threaded():
        if config.out.exists() and not _is_empty_folder(config.out) and not config.overwrite:
            if (report := _finished_report(config.out, job)) is not None:
                # The last run was killed after OUT appeared, while it cleared its work away.
                shutil.rmtree(job.directory)
                return Answer(value={"out": str(config.out), **report}, text=_text(config.out, report))
            raise UserError(f"{config.out} exists already; name another folder, or give --overwrite to replace it")
        if config.overwrite and job.directory.exists() and job.changed_settings():
            shutil.rmtree(job.directory)
        finished = job.begin()
        _run(config, job, finished)
        report = _assemble(config, job, unusable, others)
        _move_into_place(job.directory / "assembled", config.out)
    shutil.rmtree(job.directory)
    return Answer(value={"out": str(config.out), **report}, text=_text(config.out, report))


def _run(config: PrepareConfig, job: Job, finished: set[int]) -> None:
    done = sum(len(job.members(shard)) for shard in finished)
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
        cv2.setNumThreads(1)
        detector = None if self.config.aligned else make_detector(self.config)

        def task(item: tuple[Path, Sequence[Photograph]], report: Report) -> None:
            path, photographs = item
            outcomes = []
            for photograph in photographs:
                outcomes.append(_prepare_one(photograph, self.config, detector))
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


def _prepare_one(photograph: Photograph, config: PrepareConfig, detector: Detector | None) -> Outcome:
    """One photograph's crop, or why there is none."""
    try:
        data = read_bytes(config.src / photograph.id)
        image = decode(data)
    except UnreadableError as error:
        return Outcome(id=photograph.id, reason="unreadable", detail=str(error))
    if detector is None:
        return _take_aligned(photograph.id, data, image, config)
    return _align(photograph.id, image, config, detector)


def _take_aligned(image_id: str, data: bytes, image: UInt8Array, config: PrepareConfig) -> Outcome:
    height, width = image.shape[:2]
    if height != width:
        return Outcome(id=image_id, reason="not square", detail=f"{width} x {height} px; aligned crops are square")
    if width != config.size:
        shrinks = width > config.size
        side = (config.size, config.size)
        image = np.asarray(cv2.resize(image, side, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR))
        return Outcome(id=image_id, jpeg=encode_jpeg(image, config.quality))
    keeps = is_jpeg(data) and _stored_upright_rgb(data, image)
    return Outcome(id=image_id, jpeg=data if keeps else encode_jpeg(image, config.quality))


def _align(image_id: str, image: UInt8Array, config: PrepareConfig, detector: Detector) -> Outcome:
    faces = detector.detect(image, image_id)
    confident = [face for face in faces if face.score >= config.least_score]
    face = largest_central(confident)
    if not faces:
        return Outcome(id=image_id, reason="no face", detail=f"in {image.shape[1]} x {image.shape[0]} px")
    if face is None:
        best = max(other.score for other in faces)
        return Outcome(
            id=image_id, reason="low score", detail=f"the best face has {best:.3f}, {config.least_score:g} is asked for"
        )
    if face.box[2] < config.min_face_px:
        return Outcome(
            id=image_id,
            reason="too small",
            detail=f"the face is {face.box[2]:.1f} px wide, {config.min_face_px} are asked for",
        )
    try:
        matrix = similarity_transform(face.points, template(config.size))
    except ValueError as error:
        return Outcome(id=image_id, reason="bad points", detail=str(error))
    return Outcome(
        id=image_id,
        jpeg=encode_jpeg(warp_crop(image, matrix, config.size), config.quality),
        points=tuple(warp_points(face.points, matrix).ravel().tolist()),
        score=face.score,
        box=tuple(face.box.tolist()),
        photo_points=tuple(face.points.ravel().tolist()),
        faces=len(confident),
    )


def _assemble(
    config: PrepareConfig, job: Job, unusable: Sequence[Photograph], others: dict[str, int]
) -> dict[str, Any]:
    """Writes job.directory/assembled, the whole of OUT, from the finished shards; the report."""
    target = job.directory / "assembled"
    shutil.rmtree(target, ignore_errors=True)  # of a run that was stopped before it was moved into place
    identities = {photograph.id: photograph.identity for photograph in job.photographs}
    reasons: Counter[str] = Counter({"unusable name": len(unusable)} if unusable else {})
    left_out, detections = _Table(("id", "reason", "detail")), _Table(CSV_COLUMNS)
    for photograph in unusable:
        left_out.add([photograph.id, "unusable name", "a line break in the file name"])
    people: set[str] = set()
    several = 0
    if not _any_crop(job):
        _raise_no_crop(job)
    with DatasetWriter(target, config.size, {"command": "prepare", **_settings(config)}) as writer:
        for shard in range(job.shards):
            for outcome in job.read(shard):
                if outcome.reason:
                    reasons[outcome.reason] += 1
                    left_out.add([outcome.id, outcome.reason, outcome.detail])
                    continue
                people.add(identities[outcome.id])
                several += outcome.faces > 1
                points = np.array(outcome.points, dtype=np.float32).reshape(5, 2) if outcome.points else None
                writer.add(outcome.id, identities[outcome.id], outcome.jpeg, points)
                if outcome.box:
                    detections.add(csv_row(outcome.id, outcome.score, outcome.box, outcome.photo_points))
    left = sum(reasons.values())
    report = {
        "photographs": len(job.photographs) + len(unusable),
        "crops": len(job.photographs) + len(unusable) - left,
        "identities": len(people),
        "identities_left_out": len(set(identities.values()) - people),
        "left_out": left,
        "reasons": dict(sorted(reasons.items())),
        "several_faces": several,
        "other_files": others,
        "job": job.description,
    }
    left_out.write(target / "left_out.csv")
    if not config.aligned:
        detections.write(target / "detections.csv")
    (target / "report.json").write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return report


def _finished_report(out: Path, job: Job) -> dict[str, Any] | None:
    """The report in `out` if `out` is what this job makes and the job's work directory is still there."""
    if not job.directory.is_dir():
        return None
    try:
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return report if isinstance(report, dict) and report.get("job") == job.description else None


def _any_crop(job: Job) -> bool:
    return any(not outcome.reason for shard in range(job.shards) for outcome in job.read(shard))


def _raise_no_crop(job: Job) -> None:
    counts = Counter(outcome.reason for shard in range(job.shards) for outcome in job.read(shard))
    first = next(outcome for outcome in job.read(0))
    shutil.rmtree(job.directory)
    raise UserError(
        f"none of the {len(job.photographs):,} photographs gave a crop: {_listed(counts)}; the first, {first.id}: {first.detail}"
    )


def _move_into_place(made: Path, out: Path) -> None:
    """Renames `made` to `out`; where `out` exists it steps aside first and is deleted last."""
    aside = out.with_name(f"{out.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if out.exists():
        os.replace(out, aside)
    os.replace(made, out)
    shutil.rmtree(aside, ignore_errors=True)


class _Table:
    """CSV rows gathered in memory as text."""

    def __init__(self, header: Sequence[str]) -> None:
        self._text = io.StringIO(newline="")
        self._writer = csv.writer(self._text, lineterminator="\n")
        self._writer.writerow(header)

    def add(self, row: Sequence[str]) -> None:
        self._writer.writerow(row)

    def write(self, path: Path) -> None:
        path.write_bytes(self._text.getvalue().encode("utf-8", "surrogateescape"))


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
    files = {
        "yunet": lambda: models.yunet_paths()[:1],
        "mtcnn": models.mtcnn_paths,
        "file": lambda: [config.detections],
    }[config.way]()
    settings["weights" if config.way != "file" else "detections"] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
    return settings


def _text(out: Path, report: dict[str, Any]) -> str:
    lines = [
        f"{out}: {report['crops']:,} crops of {report['identities']:,} identities from {report['photographs']:,} photographs"
    ]
    if report["several_faces"]:
        lines.append(f"{report['several_faces']:,} photographs show several faces: the largest central one was taken")
    if report["left_out"]:
        lines.append(f"{report['left_out']:,} left out ({_listed(report['reasons'])}): {out / 'left_out.csv'}")
    if report["identities_left_out"]:
        lines.append(f"{report['identities_left_out']:,} identities have no crop")
    if report["other_files"]:
        lines.append(f"other files passed over: {_listed(report['other_files'])}")
    if report["identities"] == 1 and report["crops"] > 1:
        lines.append("there is one identity only: is SRC the folder that holds the people's folders?")
    return "\n".join(lines)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _stored_upright_rgb(data: bytes, image: UInt8Array) -> bool:
    """Whether a reader that ignores EXIF sees the same picture in three channels."""
    raw = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    return raw is not None and np.array_equal(raw, image)


def _has_line_break(name: str) -> bool:
    return "\n" in name or "\r" in name


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _single_threaded() -> Iterator[None]:
    """One OpenCV thread a process: the cores are shared out by processes, and sums come out the same everywhere."""
    threads = cv2.getNumThreads()
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


@contextlib.contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """SIGTERM leaves by the same door as Ctrl-C, so that workers are stopped and the terminal is put right."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
