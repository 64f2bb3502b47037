"""Two short looks at a recipe before it is trained for long: does it learn one batch, and where does its time go?

In: a recipe and a data set. Out: an `Answer`. Neither touches checkpoints or logs of the run, nor makes a teacher's
cache.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, record_function

from visard import dist
from visard.config import Recipe
from visard.console import Answer, progress
from visard.data.dataset import FaceDataset
from visard.errors import UserError
from visard.records import Batch
from visard.training.batch_norm import train_mode
from visard.training.build import Parts, build_parts, numerics
from visard.training.loop import process_device
from visard.training.schedule import peak_rate
from visard.training.step import train_step
from visard.training.teacher import AtSize, require_cache

OVERFIT_STEPS = 200
OVERFIT_TARGET = 0.1
"""Loss to reach, as a share of the first one: a margin softmax that learns at all gets there on one batch."""

PROFILE_WARMUP, PROFILE_STEPS = 3, 8
RANGES = ("data", "forward", "backward", "optimizer")


def overfit_batch(recipe: Recipe, dataset: FaceDataset, at_size: AtSize | None = None) -> Answer:
    """Trains on the first batch alone, at the constant peak rate, until the loss is a tenth of its first value.

    Args:
        recipe: all settings.
        dataset: what would be trained on.
        at_size: see `loop.train`.

    Raises:
        UserError: that was not reached in 200 steps, so labels, learning rate or network are wrong; or a teacher's
            embeddings would have to be written first.
    """
    parts, batch = _first(recipe, dataset, at_size)
    lr = peak_rate(recipe.schedule, recipe.optim.lr, recipe.run.batch_global)
    first = loss = float("nan")
    with (
        numerics(recipe, parts.state.float32_matmul),
        progress("overfit one batch", OVERFIT_STEPS, "steps", quiet=not dist.is_main()) as bar,
    ):
        train_mode(parts.model, freeze_bn=recipe.run.freeze_bn)
        for step in range(1, OVERFIT_STEPS + 1):
            numbers = train_step(parts, batch, lr)
            parts.state.step += 1
            loss = numbers.logs["loss"].item()
            first = loss if step == 1 else first
            bar.advance()
            if step % 20 == 0:
                bar.note(f"step {step} loss {loss:.4f}")
            if numbers.failed.item():
                raise UserError(f"overfit-batch: step {step} is not finite; lower optim.lr ({recipe.optim.lr})")
            if loss <= OVERFIT_TARGET * first:
                break
    found = f"{parts.images_global} images, loss {first:.4f} -> {loss:.4f} in {step} steps"
    if loss > OVERFIT_TARGET * first:
        raise UserError(
            f"overfit-batch: {found}, not below {OVERFIT_TARGET * first:.4f}; "
            "one batch should be learnt by heart: check the labels, optim.lr and the network"
        )
    value = {"first_loss": first, "last_loss": loss, "steps": step, "target": OVERFIT_TARGET * first}
    return Answer(value=value, text=f"learnt one batch by heart: {found} (a tenth was to be reached)")


def profile(recipe: Recipe, dataset: FaceDataset, at_size: AtSize | None = None) -> Answer:
    """Times some steps after a warm-up, then the same under torch's profiler; the trace goes to RUN/profile/trace.json.

    The rate is of the plain steps; shares, table and trace are of the profiled ones. On CUDA the shares are those of
    the host, which queues work ahead of the device: read the table's device times there.

    Args:
        recipe: all settings.
        dataset: what would be trained on.
        at_size: see `loop.train`.

    Raises:
        UserError: a teacher's embeddings would have to be written first.
    """
    parts, _ = _first(recipe, dataset, at_size)
    lr = peak_rate(recipe.schedule, recipe.optim.lr, recipe.run.batch_global)
    batches = _endless(parts)
    activities = [ProfilerActivity.CPU]
    if parts.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    folder = recipe.run.out / "profile"
    with numerics(recipe, parts.state.float32_matmul):
        train_mode(parts.model, freeze_bn=recipe.run.freeze_bn)
        _steps(parts, batches, lr, PROFILE_WARMUP)
        started = time.perf_counter()
        _steps(parts, batches, lr, PROFILE_STEPS)
        seconds = time.perf_counter() - started
        with torch.profiler.profile(activities=activities) as profiler:
            _steps(parts, batches, lr, PROFILE_STEPS)
    rate = PROFILE_STEPS * parts.images_global / seconds
    events = profiler.key_averages()
    spent = {name: sum(e.cpu_time_total for e in events if e.key == f"visard/{name}") for name in RANGES}
    shares = {name: value / max(sum(spent.values()), 1e-9) for name, value in spent.items()}
    if dist.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))
    key = "self_cpu_time_total" if parts.device.type != "cuda" else "self_device_time_total"
    table = events.table(sort_by=key, row_limit=15, max_name_column_width=48)
    line = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    text = f"{table}\n{rate:.1f} images/s over {PROFILE_STEPS} steps; {line}; trace in {folder / 'trace.json'}"
    return Answer(value={"images_per_second": rate, "shares": shares, "trace": str(folder / "trace.json")}, text=text)


def _first(recipe: Recipe, dataset: FaceDataset, at_size: AtSize | None) -> tuple[Parts, Batch]:
    require_cache(recipe)
    parts = build_parts(recipe, dataset, process_device(recipe), at_size=at_size)
    return parts, next(iter(parts.loader))


def _endless(parts: Parts) -> Iterator[Batch]:
    return itertools.chain.from_iterable(itertools.repeat(parts.loader))


def _steps(parts: Parts, batches: Iterator[Batch], lr: float, count: int) -> None:
    for _ in range(count):
        with record_function("visard/data"):
            batch = next(batches)
        train_step(parts, batch, lr)
        parts.state.step += 1
    if parts.device.type == "cuda":
        torch.cuda.synchronize(parts.device)
