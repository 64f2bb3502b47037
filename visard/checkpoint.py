"""Checkpoints of a run: written under a temporary name, renamed when complete, loaded at any world size.

In: a state's tensors and numbers, the backbone, its spec. Out: a run directory

    RUN/recipe.json  metrics.jsonl  log.txt  tensorboard/
    RUN/checkpoints/step_00001000/   state/ (torch.distributed.checkpoint), numbers.json, identities.txt,
                                     model/ (model.safetensors + spec.json: a visard model directory)
    RUN/checkpoints/last.json, best.json   {"checkpoint": "step_00001000", "step": 1000, "score": ...}

All processes must see the run directory on one file system. Killed at any moment, a run keeps every checkpoint that was
complete. Names with a leading dot are unfinished or on their way out; `clean` removes them.
torch.distributed.checkpoint pickles: resume only from a run that you trust (models are safetensors).
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from visard import dist
from visard.errors import FormatError, UserError
from visard.records import ModelSpec
from visard.runtime import find_model as find_model
from visard.runtime import read_spec, save_model

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in a run."""

FORMAT = 1
"""Raised whenever a checkpoint's content changes so that older code could not load it."""


def save(
    run: Path,
    *,
    step: int,
    tensors: dict[str, Any],
    numbers: dict[str, Any],
    backbone: nn.Module,
    spec: ModelSpec,
    identities: Sequence[str],
) -> Path:
    """Writes RUN/checkpoints/step_N and lets last.json name it. Every process calls it; each writes its own tensors.

    Args:
        run: the run directory.
        step: optimizer steps made.
        tensors: nested dict of tensors; plain ones are the same on all processes and written once, DTensors are written
            by shard.
        numbers: JSON values.
        backbone: whose weights become `model/`.
        spec: of the backbone.
        identities: name of every class, in the order of the head's rows.
    """
    final = run / CHECKPOINTS / name_of(step)
    if dist.broadcast_object(final.is_dir()):  # complete, and of the same step of the same run
        return final
    temporary = final.with_name(f".{final.name}.tmp")
    if dist.is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "state").mkdir(parents=True)
    dist.barrier()
    with _quiet_without_processes():
        dcp.save(tensors, checkpoint_id=temporary / "state", no_dist=not dist.active())
    if dist.is_main():
        save_model(backbone, spec, temporary / "model")
        (temporary / "identities.txt").write_text("".join(f"{name}\n" for name in identities), encoding="utf-8")
        content = {"format": FORMAT, "torch": str(torch.__version__), "world_size": dist.world_size(), **numbers}
        (temporary / "numbers.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, final)
        _sync_directory(final.parent)
        point(run, "last", final.name, step=step)
    dist.barrier()
    return final


def load(checkpoint: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """Loads a checkpoint into live tensors and returns its numbers. Every process calls it.

    Args:
        checkpoint: RUN/checkpoints/step_N.
        tensors: as handed to `save`; each is written in place. Extra tensors in the checkpoint are left alone.

    Raises:
        UserError: the checkpoint is of another format or does not fit these tensors.
        FormatError: a damaged file.
    """
    numbers = read_numbers(checkpoint)
    try:
        with _quiet_without_processes():
            dcp.load(tensors, checkpoint_id=checkpoint / "state", no_dist=not dist.active())
    except (CheckpointException, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1][:300]
        raise UserError(
            f"{checkpoint}: its state does not fit this recipe and data ({reason}); resume with those it was made with"
        ) from error
    return numbers


def read_numbers(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's numbers.json. Raises FormatError for a damaged one, UserError for another format."""
    path = checkpoint / "numbers.json"
    try:
        numbers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(path, f"not readable ({error}); resume from another checkpoint") from error
    if not isinstance(numbers, dict) or numbers.get("format") != FORMAT:
        raise UserError(
            f"{path}: not a checkpoint of format {FORMAT}; "
            "it was written by another version of visard: resume with that one"
        )
    return numbers


def name_of(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step_{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p for p in (run / CHECKPOINTS).glob("step_*") if p.is_dir())


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint, also where the process died before last.json could name it."""
    found = checkpoints(run)
    return found[-1] if found else None


def point(run: Path, name: str, checkpoint: str, **values: Any) -> None:
    """Lets RUN/checkpoints/NAME.json name a checkpoint."""
    path = run / CHECKPOINTS / f"{name}.json"
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps({"checkpoint": checkpoint, **values}) + "\n", encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, path)


def pointed(run: Path, name: str) -> str | None:
    """The checkpoint that RUN/checkpoints/NAME.json names, None if there is no such file."""
    path = run / CHECKPOINTS / f"{name}.json"
    if not path.is_file():
        return None
    return str(json.loads(path.read_text(encoding="utf-8"))["checkpoint"])


def prune(run: Path, keep_last: int) -> None:
    """Removes all checkpoints but the newest `keep_last` and the best."""
    keep = {p.name for p in checkpoints(run)[-keep_last:]} | {pointed(run, "best"), pointed(run, "last")}
    for path in checkpoints(run):
        if path.name not in keep:
            _discard(path)


def clean(run: Path) -> None:
    """Removes what an interrupted write or removal left, and lets last.json and best.json name what they should.

    A kill may fall between a checkpoint's rename and that of the file that names it.
    """
    for path in (run / CHECKPOINTS).glob(".*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    newest = latest(run)
    if newest is None:
        return
    numbers = read_numbers(newest)
    point(run, "last", newest.name, step=numbers["step"])
    best = name_of(numbers["best_step"])
    if best != pointed(run, "best") and (run / CHECKPOINTS / best).is_dir():
        point(run, "best", best, step=numbers["best_step"], score=numbers["best_score"])


def checkpoint_of(path: Path) -> Path | None:
    """The checkpoint directory around a model that `find_model` accepts, None if it is a model alone."""
    around = find_model(path).parent
    return around if (around / "numbers.json").is_file() else None


def read_identities(checkpoint: Path) -> list[str]:
    """Names of the head's rows."""
    return (checkpoint / "identities.txt").read_text(encoding="utf-8").splitlines()


def read_spec_of(checkpoint: Path) -> ModelSpec:
    """The spec of a checkpoint's model."""
    return read_spec(checkpoint / "model" / "spec.json")


def read_tensors(checkpoint: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Whole tensors of a checkpoint on the CPU, by their dotted names, such as "head.weight".

    Args:
        checkpoint: RUN/checkpoints/step_N.
        names: which; None = all. Those that the checkpoint lacks are left out.
    """
    known = dcp.FileSystemReader(checkpoint / "state").read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in known.items()
        if isinstance(entry, TensorStorageMetadata) and (names is None or name in names)
    }
    with _quiet_without_processes():
        dcp.load(tensors, checkpoint_id=checkpoint / "state", no_dist=True)
    return tensors


def read_class_centres(checkpoint: Path) -> Tensor | None:
    """(C, D) or (C, K, D) the head's, which are one level deeper in a head that distils; None if it has none."""
    found = read_tensors(checkpoint, {"head.weight", "head.base.weight"})
    return next(iter(found.values()), None)


def _discard(path: Path) -> None:
    """Removes a directory so that a kill half-way leaves nothing that looks complete."""
    if path.exists():
        doomed = path.with_name(f".{path.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    """Forces a file, or all files below a directory, to the disk: a rename must not overtake its content."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with open(file, "rb+") as handle:  # Windows flushes only what may be written
            os.fsync(handle.fileno())


def _sync_directory(path: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _quiet_without_processes() -> Iterator[None]:
    """torch warns each time that one process saves alone; here that is the ordinary case."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
