"""How far embeddings of past steps are from what the network gives now, and how much of that compensation takes back.

In: a run's parts at a checkpoint, a number of further steps. Out: `Drift`, the measurement behind BroadFace's Fig. 5.
The further steps are ordinary training steps; nothing of them is saved.

Letters: A ages, N images, D embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from visard.console import Progress
from visard.errors import UserError
from visard.functional.broadface import compensated
from visard.records import Batch, Float32Array, Int64Array
from visard.training.batch_norm import train_mode
from visard.training.build import Parts
from visard.training.step import embeddings_of, train_step


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Embeddings of past steps, the newest first.

    Args:
        age: (N,) steps made since.
        label: (N,) class.
        past: (N, D) unit length: as enqueued.
        moved: (N, D) unit length: by Eq. 7 of BroadFace.
        now: (N, D) unit length: what the network gives the same image now.
    """

    age: Int64Array
    label: Int64Array
    past: Float32Array
    moved: Float32Array
    now: Float32Array

    def errors(self) -> tuple[Int64Array, Float32Array, Float32Array]:
        """(A,) ages, increasing; (A,) mean cosine error of past and of compensated embeddings: 1 - cos(them, now)."""
        ages = np.unique(self.age)
        both = [1.0 - (old * self.now).sum(1) for old in (self.past, self.moved)]
        past, moved = (np.array([e[self.age == a].mean() for a in ages], np.float32) for e in both)
        return ages, past, moved


def measure_drift(parts: Parts, batches: Any, *, steps: int, lr: float, bar: Progress) -> Drift:
    """Trains on for `steps` steps, keeping every step's images, and embeds them all again at the end.

    As enqueued: by the network in training mode, with the class centres that the step's update has left. The same
    batches go through the network of the end in training mode too, so that batch norm sees the same images; where a
    network has dropout, its noise is part of both errors at every age.

    Args:
        parts: of a run of one process, at the checkpoint to start from; they are trained.
        batches: iterator over `parts.loader`, which may begin epoch after epoch.
        steps: how many, at least 1.
        lr: constant learning rate.
        bar: is advanced with every step and with every batch that is embedded again.

    Raises:
        UserError: the head has no class centres, or several a class; or a step was not finite.
    """
    head = parts.state.head
    weight = head.class_centres()
    if weight is None or weight.ndim != 2:
        raise UserError(f"{parts.recipe.name}: drift needs a head with one centre a class")
    seen: list[tuple[Batch, Tensor]] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, Batch]) -> None:
        seen.append((arguments[1], arguments[0].detach().float().cpu()))

    train_mode(parts.model, freeze_bn=parts.recipe.run.freeze_bn)
    head.train()
    kept: list[tuple[Batch, Tensor, Tensor]] = []
    with head.register_forward_pre_hook(keep):
        for _ in range(steps):
            numbers = train_step(parts, next(batches), lr)
            parts.state.step += 1
            if numbers.skipped.item():
                raise UserError(f"step {parts.state.step} was not finite; lower --lr ({lr:g})")
            centres = weight.detach().float().cpu()
            kept += [(batch, past, centres[batch.labels.cpu().clamp(min=0)]) for batch, past in seen]
            seen.clear()
            bar.advance()
    of_step = len(kept) // steps
    centres = weight.detach().float().cpu()
    columns: list[tuple[Tensor, ...]] = []
    for place in reversed(range(len(kept))):
        batch, past, then = kept[place]
        with torch.no_grad():
            now = embeddings_of(parts, batch).float().cpu()
        labels = batch.labels.cpu()
        moved = compensated(past, then, centres[labels.clamp(min=0)])
        age = torch.full_like(labels, steps - place // of_step)
        some = labels >= 0
        units = (functional.normalize(v)[some] for v in (past, moved, now))
        columns.append((age[some], labels[some], *units))
        if place % of_step == 0:
            bar.advance()
    joined = [torch.cat(column).numpy() for column in zip(*columns, strict=True)]
    return Drift(age=joined[0], label=joined[1], past=joined[2], moved=joined[3], now=joined[4])
