"""`visard drift RUN OUT`: how old may a queue's embeddings become? BroadFace's Fig. 5 for a run of one's own.

In: a run directory, its data. Out: OUT/drift.json (error by age), OUT/drift.png (Fig. 5a) and OUT/plane.png (Fig. 5b).
The run goes on training in memory for some steps; its directory is left as it is.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from visard.config import Recipe, from_dict, to_dict
from visard.console import Answer, progress
from visard.errors import UserError
from visard.recipes.train import open_data, recipe_of_run
from visard.recipes.whereabouts import anchored, located


@dataclass(frozen=True, kw_only=True)
class DriftConfig:
    """Error of past embeddings by age, with and without BroadFace's compensation."""

    run: tyro.conf.Positional[Path]
    """A run directory; its newest checkpoint is where it goes on."""
    out: tyro.conf.Positional[Path]
    """Folder for drift.json, drift.png and plane.png."""
    steps: int = 64
    """Steps to go on for: the greatest age."""
    lr: float = 0.0
    """Learning rate of these steps; 0 = the schedule's at the checkpoint's last step."""
    data: str = ""
    """What to train on, if not the run's own data."""
    device: str = ""
    """Where to compute; by default as the run did."""
    classes: int = 8
    """Classes in the plane: of the oldest half, those with the most images."""

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise UserError(f"--steps is {self.steps}; use at least 2")
        if self.lr < 0:
            raise UserError(f"--lr is {self.lr}; it must not be negative")
        if self.classes < 1:
            raise UserError(f"--classes is {self.classes}; use at least 1")


def main(config: DriftConfig) -> Answer:
    """`visard drift`."""
    from visard import checkpoint, dist
    from visard.recipes import drift_figures
    from visard.training.build import build_parts, numerics
    from visard.training.drift import measure_drift
    from visard.training.logs import Meters
    from visard.training.loop import load_parts, process_device
    from visard.training.schedule import learning_rate, peak_rate
    from visard.training.teacher import require_cache

    if dist.world_size() > 1 or os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("drift is measured by one process; start it without torchrun")
    recipe = _recipe(config)
    newest = checkpoint.latest(config.run)
    if newest is None:
        raise UserError(f"{config.run}: no checkpoint there; train it first")
    require_cache(recipe)
    opened = functools.partial(open_data, recipe.data)
    dataset = opened(recipe.data.size, resize=recipe.data.resize)
    fresh = build_parts(recipe, dataset, process_device(recipe), resume=True, at_size=opened)
    parts = load_parts(fresh, newest, Meters())
    step, per_epoch = parts.state.step, len(parts.loader)
    peak = peak_rate(recipe.schedule, recipe.optim.lr, recipe.run.batch_global)
    lr = config.lr or learning_rate(max(step - 1, 0), recipe.schedule, peak=peak, steps_per_epoch=per_epoch)
    if lr < peak * 1e-6:
        raise UserError(f"{config.run}: its learning rate had fallen to {lr:g} at step {step}; give one with --lr")
    with numerics(recipe, parts.state.float32_matmul), progress("drift", 2 * config.steps, "batches") as bar:
        drift = measure_drift(parts, _endless(parts.loader), steps=config.steps, lr=lr, bar=bar)
    ages, past, moved = drift.errors()
    value: dict[str, Any] = {
        "run": str(config.run),
        "step": step,
        "lr": lr,
        "batch_global": parts.images_global,
        "age": ages.tolist(),
        "cosine_error": [round(float(e), 6) for e in past],
        "cosine_error_compensated": [round(float(e), 6) for e in moved],
    }
    config.out.mkdir(parents=True, exist_ok=True)
    drift_figures.draw_errors(ages, past, moved, config.out / "drift.png")
    value["classes"] = drift_figures.draw_plane(drift, config.classes, config.out / "plane.png")
    path = config.out / "drift.json"
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    half = len(ages) // 2
    lines = [f"{config.out}: drift.json, drift.png, plane.png; lr {lr:g} from step {step}"]
    for place in dict.fromkeys((0, half, len(ages) - 1)):
        lines.append(
            f"age {ages[place]:>4} steps: cosine error {past[place]:.4f}, with compensation {moved[place]:.4f}"
        )
    return Answer(value, "\n".join(lines))


def _recipe(config: DriftConfig) -> Recipe:
    """The run's recipe, with what the command line changes and paths from here."""
    recipe = recipe_of_run(config.run)
    recipe = replace(recipe, run=replace(recipe.run, out=config.run))
    if config.data:
        recipe = replace(recipe, data=replace(recipe.data, source=config.data))
    if config.device:
        run = from_dict(type(recipe.run), {**to_dict(recipe.run), "device": config.device}, where="--device")
        recipe = replace(recipe, run=replace(recipe.run, device=run.device))
    recipe = replace(recipe, run=replace(recipe.run, val=()))
    return located(anchored(recipe, data=bool(config.data), val=False))


def _endless(loader: Any) -> Iterator[Any]:
    """Epoch after epoch."""
    return itertools.chain.from_iterable(loader for _ in itertools.count())
