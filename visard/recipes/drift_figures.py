"""Pictures of how past embeddings drift, after BroadFace's Fig. 5.

In: a measured `Drift`. Out: PNG files.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from visard.records import Float32Array, Int64Array
from visard.training.drift import Drift

PAST, MOVED, NOW = "0.6", "#e07b00", "#1f5fbf"
"""Colours of past, compensated and current embeddings, as in the paper's figures."""


def draw_errors(ages: Int64Array, past: Float32Array, moved: Float32Array, path: Path) -> None:
    """Mean cosine error over age, without and with compensation (Fig. 5a)."""
    figure, axes = _figure(6.4, 3.8)
    axes.plot(ages, past, color=PAST, label="as enqueued")
    axes.plot(ages, moved, color=MOVED, label="compensated")
    axes.set(xlabel="age, steps", ylabel="mean cosine error", xlim=(0, ages[-1]), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, path)


def draw_plane(drift: Drift, classes: int, path: Path) -> list[int]:
    """Past, compensated and current embeddings of a few classes (Fig. 5b); returns the classes.

    The paper draws t-SNE of 64 steps' past. Here the plane is that of the two directions in which the current
    embeddings differ most (PCA), so that distances can be compared, and lines join what belongs to one image.

    Args:
        drift: the measurement.
        classes: how many: those with the most images in the oldest half of the ages.
        path: of the PNG.
    """
    old = drift.age > drift.age.max() / 2
    labels, counts = np.unique(drift.label[old], return_counts=True)
    chosen = labels[np.argsort(-counts, kind="stable")[:classes]]
    shown = old & np.isin(drift.label, chosen)
    centre = drift.now[shown].mean(0)
    _, _, axes_DD = np.linalg.svd(drift.now[shown] - centre, full_matrices=False)
    plane = axes_DD[:2].T
    past, moved, now = ((v[shown] - centre) @ plane for v in (drift.past, drift.moved, drift.now))
    figure, axes = _figure(6.4, 5.6)
    for a, b, colour in ((past, now, PAST), (moved, now, MOVED)):
        for start, end in zip(a, b, strict=True):
            axes.plot(*zip(start, end, strict=True), color=colour, linewidth=0.5, alpha=0.6, zorder=1)
    for points, colour, name, marker in (
        (past, PAST, "as enqueued", "o"), (moved, MOVED, "compensated", "^"), (now, NOW, "now", "o"),
    ):  # fmt: skip
        axes.scatter(*points.T, s=16, color=colour, marker=marker, label=name, zorder=2)
    axes.set(xlabel="first principal component", ylabel="second")
    axes.set_aspect("equal", adjustable="datalim")
    ages = drift.age[shown]
    axes.set_title(f"{shown.sum()} images of {len(chosen)} classes, {ages.min()} to {ages.max()} steps old", fontsize=9)
    axes.legend(frameon=False)
    _save(figure, path)
    return [int(label) for label in chosen]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
