"""What a run writes while it works: metrics.jsonl, log.txt, TensorBoard, wandb, and lines above the progress bar.

In: numbers of steps and evaluations. Out: one JSON object a line in metrics.jsonl:

    {"kind": "train", "step", "epoch", "loss", "lr", "gradient_norm", "cos_target", "accuracy", "embedding_norm",
     "skipped", "images_per_second", "data_wait"}: means over the steps since the last such line (`log_every`); "lr" is
     the last step's, "data_wait" the share 0..1 of the time spent waiting for data
    {"kind": "val", "step", "epoch", "score", "<set>/accuracy", ...}: one evaluation

After a resume, lines of steps that are made again are taken out first, so no step is there twice.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from visard import dist
from visard.console import Progress, say
from visard.errors import Interrupted, UserError


class Meters:
    """Means of numbers over steps and processes, summed on the device and read when asked."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def add(self, values: dict[str, Tensor], skipped: Tensor) -> None:
        """One step's numbers; a skipped step (an fp16 overflow) counts in the mean of "skipped" only."""
        for name, value in {**values, "skipped": skipped}.items():
            kept = value if name == "skipped" else torch.where(skipped > 0, torch.zeros_like(value), value)
            self._sums[name] = self._sums[name] + kept if name in self._sums else kept
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Means over processes and the steps since the last reading; {} if there was no step. Waits for the device."""
        totals, steps = self._totals(), self._steps
        self._sums, self._steps = {}, 0
        if not steps:
            return {}
        skipped = totals.pop("skipped")
        means = {name: total / max(steps - skipped, 1) for name, total in totals.items()}
        return {**means, "skipped": skipped / steps}

    def state_dict(self) -> dict[str, Any]:
        """Sums over processes and steps, as JSON values. Every process calls it."""
        return {"steps": self._steps, "sums": self._totals()}

    def load_state_dict(self, values: dict[str, Any], device: torch.device) -> None:
        """Takes the sums up again: rank 0 all of them, times the number of processes they will be divided by."""
        share = dist.world_size() if dist.is_main() else 0
        self._sums = {name: torch.tensor(total * share, device=device) for name, total in values["sums"].items()}
        self._steps = values["steps"]

    def _totals(self) -> dict[str, float]:
        """Sums over steps, averaged over processes."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        stacked = torch.stack([self._sums[name].float() for name in names])
        dist.all_reduce_sum(stacked)
        return dict(zip(names, (stacked / dist.world_size()).tolist(), strict=True))


class Stopwatch:
    """Time of training steps and the share of it spent waiting for data; evaluations and checkpoints are left out."""

    def __init__(self) -> None:
        self._busy = self._waited = 0.0
        self._images = 0
        self._at = time.perf_counter()

    def start(self) -> None:
        """What comes now counts."""
        self._at = time.perf_counter()

    def got_data(self) -> None:
        """The batch is there."""
        now = time.perf_counter()
        self._waited += now - self._at
        self._busy += now - self._at
        self._at = now

    def made_step(self, images: int) -> None:
        """The step is made."""
        now = time.perf_counter()
        self._busy += now - self._at
        self._images += images
        self._at = now

    def read(self) -> dict[str, float]:
        """Rate and share since the last reading."""
        seconds = max(self._busy, 1e-9)
        values = {"images_per_second": self._images / seconds, "data_wait": self._waited / seconds}
        self._busy = self._waited = 0.0
        self._images = 0
        return values


class RunLog:
    """The log files of a run; a context manager. Only rank 0 has one that writes.

    Args:
        run: the run directory.
        step: the step that the run goes on from, 0 for a new one.
        tensorboard: write event files too.
        wandb: project to log to besides, "" = none.
        settings: the recipe, shown there.
        bar: where lines are shown, or None.

    Raises:
        UserError: wandb is asked for and cannot be had.
    """

    def __init__(
        self,
        run: Path,
        step: int,
        *,
        tensorboard: bool,
        wandb: str = "",
        settings: dict[str, Any] | None = None,
        bar: Progress | None = None,
    ) -> None:
        self._metrics = self._text = self._board = self._page = None
        self._bar = bar
        if not dist.is_main():
            return
        if wandb:
            self._page = _open_page(run, wandb, settings or {})
        keep_until(run / "metrics.jsonl", step)
        self._metrics = (run / "metrics.jsonl").open("a", encoding="utf-8")
        self._text = (run / "log.txt").open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._metrics, self._text, self._board):
            if file is not None:
                file.close()
        if self._page is not None:
            self._page.finish(exit_code=0 if error is None or isinstance(error, Interrupted) else 1)

    def note(self, text: str) -> None:
        """A line for people: log.txt and the screen."""
        if self._text is None:
            return
        self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self._text.flush()
        if self._bar is None:
            say(text)
        else:
            self._bar.note(text)

    def record(self, kind: str, step: int, epoch: float, values: dict[str, float]) -> None:
        """Numbers of `kind` "train" or "val" at a step."""
        if self._metrics is None:
            return
        row = {"kind": kind, "step": step, "epoch": round(epoch, 4), **values}
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
        if self._page is not None:
            self._page.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)
        self.note(_line(kind, step, epoch, values))


def require_wandb(project: str) -> None:
    """Raises UserError if a project is named and wandb is not installed; before anything is made of the run."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"run.wandb is {project!r} but wandb is not installed; `pip install wandb`, or leave run.wandb empty"
        )


def _open_page(run: Path, project: str, settings: dict[str, Any]) -> Any:
    """The run's page on wandb; a run that goes on, goes on with its page, which RUN/wandb_id.txt names."""
    import wandb

    path = run / "wandb_id.txt"
    if not path.is_file():
        path.write_text(f"{uuid.uuid4().hex[:8]}\n", encoding="utf-8")
    identity = path.read_text(encoding="utf-8").strip()
    try:
        return wandb.init(project=project, name=run.name, id=identity, resume="allow", dir=str(run), config=settings)
    except wandb.errors.Error as error:
        raise UserError(
            f"wandb: {' '.join(str(error).split()).rstrip('.')}; or set WANDB_MODE=offline, or leave run.wandb empty"
        ) from error


def keep_until(path: Path, step: int) -> None:
    """Takes the lines of later steps, and one that a kill left unfinished, out of a metrics.jsonl."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:
            break
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _line(kind: str, step: int, epoch: float, values: dict[str, float]) -> str:
    if kind == "train":
        parts = ""
        if "distill_loss" in values:
            hard = f"labels {values['hard_loss']:.4f} + " if "hard_loss" in values else ""
            parts = f"({hard}teacher {values['distill_loss']:.4f}) "
        labels = ""
        if "cos_target" in values:  # a head without classes has none
            labels = f"cosine {values['cos_target']:.3f} right {values['accuracy']:.1%} "
        return (
            f"step {step} epoch {epoch:.2f} loss {values['loss']:.4f} {parts}lr {values['lr']:.3g} "
            f"gradient {values['gradient_norm']:.3g} {labels}"
            f"{values['images_per_second']:.0f} img/s, waiting for data {values['data_wait']:.0%}"
        )
    return f"step {step} epoch {epoch:.2f} " + " ".join(f"{name} {value:.4f}" for name, value in values.items())
