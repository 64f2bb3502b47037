"""The training loop: steps, and around them logs, evaluations and checkpoints when they are due.

In: a recipe, a data set, perhaps an evaluation. Out: the run directory. The loop has no features: what is learnt is in
the backbone, the head and the optimizer; what a batch holds is in the loader; a distillation or a queue is a head.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visard import checkpoint, dist
from visard.checkpoint import CHECKPOINTS
from visard.config import Recipe, to_dict
from visard.console import Progress, progress
from visard.data.dataset import FaceDataset
from visard.data.transforms import Augment
from visard.device import choose_device, keep_freed_memory
from visard.errors import Interrupted, UserError
from visard.runtime import Embedder, embedder_of
from visard.training.batch_norm import train_mode
from visard.training.build import Parts, build_parts, numerics
from visard.training.interrupt import Interrupt, listening
from visard.training.logs import Meters, RunLog, Stopwatch, require_wandb
from visard.training.parallel import whole_backbone
from visard.training.schedule import learning_rate, peak_rate, total_steps
from visard.training.step import train_step
from visard.training.teacher import AtSize
from visard.training.watch import Seen, Watch

Evaluate = Callable[[Embedder], dict[str, float]]
"""The network as it is -> metrics by name; the largest "score" among them makes the best checkpoint.

All processes call it at the same step with the same network, so that it can share out its work; rank 0's answer counts.
"""


def train(
    recipe: Recipe,
    dataset: FaceDataset,
    *,
    evaluate: Evaluate | None = None,
    augment: Augment | None = None,
    resume: bool = False,
    at_size: AtSize | None = None,
) -> Path:
    """Trains to the end of the schedule and returns the run directory, `recipe.run.out`.

    The best checkpoint is that of the highest score, of equal ones the later; without an evaluation there is none, and
    the last one is the run's model.

    Args:
        recipe: all settings.
        dataset: what is trained on.
        evaluate: called every `run.evaluate_every` steps (0: epochs) and at the end.
        augment: see `data.loader.Loader`.
        resume: go on with the run in `run.out` instead of beginning one; without a complete checkpoint it begins anew.
            So does a process that torchrun started anew, whatever is said here.
        at_size: opens the data set with crops of another size, for a teacher that takes such.

    Raises:
        UserError: the run directory is taken, data and recipe do not fit, or a step was not finite.
        Interrupted: SIGTERM or SIGINT came; a checkpoint is saved.
    """
    run = recipe.run.out
    require_wandb(recipe.run.wandb)
    device = process_device(recipe)
    dist.init(device)
    newest = find_start(run, resume=resume or dist.restarted())
    parts = build_parts(recipe, dataset, device, augment=augment, resume=newest is not None, at_size=at_size)
    meters = Meters()
    if newest is not None:
        parts = load_parts(parts, newest, meters)
    state = parts.state
    # With what was chosen at the start: a run killed before its first checkpoint begins anew with the same numerics.
    write_recipe(run, replace(recipe, run=replace(recipe.run, float32_matmul=state.float32_matmul)))
    total = total_steps(recipe.schedule, len(parts.loader))
    show = progress(f"train {recipe.name}", total, "steps", quiet=not dist.is_main(), done=state.step)
    with (
        numerics(recipe, state.float32_matmul),
        listening(quiet=not dist.is_main()) as interrupt,
        show as bar,
        RunLog(
            run,
            state.step,
            tensorboard=recipe.run.tensorboard,
            wandb=recipe.run.wandb,
            settings=to_dict(recipe),
            bar=bar,
        ) as log,
    ):
        announce(parts, log, total, newest)
        _Loop(parts, log, meters, interrupt, evaluate, total, bar).run()
    return run


@dataclass
class _Loop:
    parts: Parts
    log: RunLog
    meters: Meters
    interrupt: Interrupt
    evaluate: Evaluate | None
    total: int
    bar: Progress

    def run(self) -> None:
        parts, state, schedule = self.parts, self.parts.state, self.parts.recipe.schedule
        peak = peak_rate(schedule, parts.recipe.optim.lr, parts.recipe.run.batch_global)
        watch, stopwatch = Watch(), Stopwatch()
        train_mode(parts.model, freeze_bn=parts.recipe.run.freeze_bn)
        parts.state.head.train()
        while state.step < self.total:
            stopwatch.start()
            for batch in parts.loader:
                stopwatch.got_data()
                lr = learning_rate(state.step, schedule, peak=peak, steps_per_epoch=len(parts.loader))
                numbers = train_step(parts, batch, lr, stop=self.interrupt.signal != 0)
                state.step += 1
                self.meters.add(numbers.logs, numbers.skipped)
                stop = self._judge(watch.push(state.step, batch.ids, numbers))
                stopwatch.made_step(parts.images_global)
                stop |= self._after_step(watch, stopwatch, lr)
                self.bar.advance()
                stopwatch.start()
                if stop and state.step < self.total:
                    self._leave(watch)
                if state.step == self.total:
                    break

    def _after_step(self, watch: Watch, stopwatch: Stopwatch, lr: float) -> bool:
        """Logs, evaluates and saves if due. Returns whether a stop was asked for."""
        run, step, stop = self.parts.recipe.run, self.parts.state.step, False
        if step % run.log_every == 0 or step == self.total:
            # Reading the meters waits for the device; the time belongs to the steps.
            means = self.meters.read()
            stopwatch.made_step(0)
            self.log.record("train", step, self._epoch(), {**means, "lr": lr, **stopwatch.read()})
        evaluate_due = self.evaluate is not None and self._due(run.evaluate_every)
        save_due = self._due(run.save_every)
        if evaluate_due or save_due:
            stop = self._judge(watch.flush())
            best = evaluate_due and self._evaluate()
            if save_due or best:
                self._save()
            if best:
                self._point_at_best()
            self._prune()
        return stop

    def _due(self, every: int) -> bool:
        step = self.parts.state.step
        return step % (every or len(self.parts.loader)) == 0 or step == self.total

    def _epoch(self) -> float:
        return self.parts.state.step / len(self.parts.loader)

    def _whole(self) -> nn.Module:
        return whole_backbone(self.parts.state.backbone, self.parts.recipe.backbone, self.parts.device)

    def _evaluate(self) -> bool:
        """Scores the network, in all processes together. Returns whether it is the best so far."""
        assert self.evaluate is not None
        state = self.parts.state
        metrics = dist.broadcast_object(self.evaluate(embedder_of(self._whole(), self.parts.spec)))
        self.log.record("val", state.step, self._epoch(), metrics)
        if metrics["score"] < state.best_score:
            return False
        state.best_score, state.best_step = metrics["score"], state.step
        return True

    def _save(self) -> None:
        parts, state = self.parts, self.parts.state
        numbers = {**state.numbers(), "meters": self.meters.state_dict()}
        checkpoint.save(
            parts.recipe.run.out,
            step=state.step,
            tensors=state.tensors(),
            numbers=numbers,
            backbone=self._whole(),
            spec=parts.spec,
            identities=parts.identities,
        )

    def _prune(self) -> None:
        if dist.is_main():
            checkpoint.prune(self.parts.recipe.run.out, self.parts.recipe.run.keep_last)

    def _point_at_best(self) -> None:
        state = self.parts.state
        if dist.is_main():
            name = checkpoint.name_of(state.step)
            checkpoint.point(self.parts.recipe.run.out, "best", name, step=state.step, score=state.best_score)
        dist.barrier()

    def _judge(self, seen: Seen | None) -> bool:
        """Stops the run if a step was not finite; otherwise returns whether somebody asked to stop."""
        if seen is None or not seen.failed:
            return seen is not None and seen.stop
        run = self.parts.recipe.run.out
        ids = [name for part in dist.all_gather_object(seen.ids) for name in part]
        if dist.is_main():
            content = {"step": seen.step, "ids": ids}
            _write_json(run / "nonfinite_step.json", content)
        good = checkpoint.latest(run)
        where = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        shown = ", ".join(ids[:4]) + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")
        message = (
            f"step {seen.step} gave a loss or gradient that is not finite and was not applied; its images were {shown} "
            f"(all in {run / 'nonfinite_step.json'}); {where}; try a lower optim.lr, longer warm-up or precision bf16"
        )
        self.log.note(message)
        raise UserError(message)

    def _leave(self, watch: Watch) -> None:
        """Saves and ends because of a signal."""
        self._judge(watch.flush())
        run = self.parts.recipe.run.out
        self._save()
        self._prune()
        number = max(dist.all_gather_object(self.interrupt.signal)) or signal.SIGTERM
        message = f"stopped after step {self.parts.state.step} of {self.total}; go on with: visard train --resume {run}"
        self.log.note(message)
        raise Interrupted(message, number)


def load_parts(parts: Parts, source: Path, meters: Meters) -> Parts:
    """The parts at the step of a checkpoint.

    Raises:
        UserError: the checkpoint is of other identities, another network or another order of samples.
    """
    if checkpoint.read_identities(source) != list(parts.identities):
        raise UserError(
            f"{source}: was trained on other identities than {parts.recipe.data.source} holds now; "
            "resume with the same data, or start a new run with --init"
        )
    numbers = checkpoint.load(source, parts.state.tensors())
    parts.state.load_numbers(numbers)
    meters.load_state_dict(numbers["meters"], parts.device)
    return replace(parts, spec=checkpoint.read_spec_of(source))


def announce(parts: Parts, log: RunLog, total: int, source: Path | None) -> None:
    """Says in the log what is trained, on what, where and from where."""
    recipe, state = parts.recipe, parts.state
    weights = sum(p.numel() for p in state.backbone.parameters()) / 1e6
    log.note(
        f"{recipe.name}: {recipe.backbone.kind} of {weights:.2f} M parameters, {parts.images} images of "
        f"{len(parts.identities)} identities, {total} steps of {parts.images_global} images on {dist.world_size()} x "
        f"{parts.device}, {recipe.run.precision}, float32 products {state.float32_matmul}"
    )
    for note in parts.notes:
        log.note(note)
    if source is not None:
        log.note(f"going on after step {state.step} from {source}")


def process_device(recipe: Recipe) -> torch.device:
    """The device of this process, made ready: under torchrun its own GPU of the machine; a CPU keeps freed memory."""
    device = choose_device(recipe.run.device)
    if device.type == "cuda" and device.index is None:
        device = choose_device(f"cuda:{dist.local_rank()}")
    if device.type == "cpu":
        keep_freed_memory()
    return device


def find_start(run: Path, *, resume: bool) -> Path | None:
    """The checkpoint to go on from, None to begin; what a kill left in the run is tidied away. Every process calls it.

    Raises:
        UserError: there is a run already and it is not to be resumed.
    """
    newest = None
    if dist.is_main():
        if resume:
            checkpoint.clean(run)
        newest = checkpoint.latest(run)
    newest = dist.broadcast_object(newest)
    if newest is not None and not resume:
        raise UserError(f"{run} holds a run already; go on with it by --resume {run}, or name another --out")
    return newest


def write_recipe(run: Path, recipe: Recipe) -> None:
    """Makes the run directory with its recipe.json, once everything that could be wrong with it has been tried."""
    if dist.is_main():
        (run / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        _write_json(run / "recipe.json", to_dict(recipe))
    dist.barrier()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
