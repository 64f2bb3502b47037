"""The scaling figure: error against parameters, a power law through it, and a band; one line for each test set.

In: runs of several sizes, with the validation sets that they were evaluated on while they were trained, and results of
`visard evaluate` on them. Out: `Html` for the page, and the numbers.
Parameters are all that is trained: the network and the classification weight (BigFace's slides count it too).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from visard import checkpoint
from visard.errors import UserError
from visard.functional.scaling import FLOOR_SIZES, Band, FloatArray, Law, bootstrap, fit_law
from visard.pages import Html, figure, paragraph, section, table
from visard.report import figures
from visard.report.sources import ResultRecord, RunRecord

LEAST_SIZES = 3
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
PLACES = 60


@dataclass(frozen=True, kw_only=True)
class Series:
    """One test set's errors over sizes.

    Args:
        name: of the test set.
        sizes: (K,) parameters, increasing.
        errors: (K,).
        law: through them.
        places: (P,) sizes at which the band is.
        band: None where there are as many sizes as numbers.
    """

    name: str
    sizes: FloatArray
    errors: FloatArray
    law: Law
    places: FloatArray
    band: Band | None


def scaling(runs: Sequence[RunRecord], results: Sequence[ResultRecord], metric: str) -> list[Series]:
    """The laws of a metric, one for each test set that has at least three sizes.

    Args:
        runs: of several sizes.
        results: of `visard evaluate` on these runs; their `model` says which.
        metric: "accuracy", "tar@far=1e-3" ... (the error is what is missing to 1), or "eer" (an error itself).

    Raises:
        UserError: no test set has three sizes with that metric.
    """
    if not runs:
        raise UserError("--scaling needs runs of several sizes; name their folders")
    points: dict[str, list[tuple[int, float]]] = {}
    for run in runs:
        size = parameters_of(run)
        for name, value in _values(run, results, metric).items():
            error = value if metric == "eer" else 1.0 - value
            if error <= 0:
                raise UserError(f"{run.name}: {metric} of {name} leaves no error; a harder test set has a logarithm")
            points.setdefault(name, []).append((size, error))
    usable = {name: sorted(found) for name, found in points.items() if len({n for n, _ in found}) >= LEAST_SIZES}
    if not usable:
        known = ", ".join(f"{name} ({len({n for n, _ in found})})" for name, found in points.items()) or "none"
        raise UserError(
            f"--scaling {metric}: no test set with {LEAST_SIZES} different sizes; "
            f"sets with that metric and their sizes: {known}"
        )
    return [_series(name, found) for name, found in usable.items()]


def parameters_of(run: RunRecord) -> int:
    """All that the run trains, read from its checkpoint: the network's weights, and class centres.

    Raises:
        UserError: no checkpoint.
    """
    name = checkpoint.pointed(run.path, "best") or checkpoint.pointed(run.path, "last")
    if name is None:
        raise UserError(f"{run.path}: no checkpoint in it, so its parameters cannot be counted; train it first")
    folder = run.path / checkpoint.CHECKPOINTS / name
    with safetensors.safe_open(str(folder / "model" / "model.safetensors"), framework="numpy") as weights:
        shapes = [weights.get_slice(key).get_shape() for key in weights.keys() if not key.endswith(STATISTICS)]  # noqa: SIM118
    head, backbone = run.recipe.get("head", {}), run.recipe.get("backbone", {})
    classes = len(checkpoint.read_identities(folder)) * int(head.get("subcentres", 1))
    return int(sum(np.prod(shape) for shape in shapes)) + classes * int(backbone["embedding_dim"])


def scaling_section(series: Sequence[Series], metric: str) -> Html:
    """The figure, and a table of the laws."""
    title = f"{'Equal error rate' if metric == 'eer' else f'1 - {metric}'} against parameters"
    rows = []
    for one in series:
        law, band = one.law, one.band
        exponent = f"{law.b:.3f}" + ("" if band is None else f" ({band.b[0]:.3f} to {band.b[1]:.3f})")
        floor = "–" if len(np.unique(one.sizes)) < FLOOR_SIZES else f"{law.c:.4f}"
        rows.append(
            [
                one.name,
                str(len(one.sizes)),
                f"{one.sizes[0] / 1e6:.3g} to {one.sizes[-1] / 1e6:.3g} M",
                f"{law.a:.4f}",
                exponent,
                floor,
                f"{100 * law.deviation:.1f} %",
            ]
        )
    header = [
        "test set",
        "runs",
        "parameters",
        "error at their middle (less floor)",
        "exponent b",
        "floor c",
        "scatter",
    ]
    return section(
        "Scaling",
        figure(figures.scaling(title, series)),
        table(header, rows),
        paragraph(
            "error = a N^-b, and + c from seven sizes on: least squares of logarithms. N counts the network and the "
            "classification weight. Bands: 95 % of fits to residuals drawn anew, rough with few sizes."
        ),
    )


def numbers(series: Sequence[Series]) -> dict[str, Any]:
    """For --json."""
    return {
        one.name: {
            "parameters": one.sizes.tolist(),
            "errors": one.errors.tolist(),
            "a": one.law.a,
            "b": one.law.b,
            "c": one.law.c,
            "unit": one.law.unit,
            "b_interval": None if one.band is None else one.band.b,
            "c_interval": None if one.band is None else one.band.c,
        }
        for one in series
    }


def _series(name: str, points: Sequence[tuple[int, float]]) -> Series:
    sizes, errors = np.array(points, dtype=np.float64).T
    law = fit_law(sizes, errors, floor=len(np.unique(sizes)) >= FLOOR_SIZES)
    places = np.geomspace(sizes[0] / 1.3, sizes[-1] * 2, PLACES)
    return Series(
        name=name, sizes=sizes, errors=errors, law=law, places=places, band=bootstrap(law, sizes, errors, places)
    )


def _values(run: RunRecord, results: Sequence[ResultRecord], metric: str) -> dict[str, float]:
    """The metric by test set: of the last evaluation during training, and of results on the run."""
    found: dict[str, float] = {}
    ending = f"/{metric}"
    for line in run.val:  # in order of steps, so that the last one stays
        found |= {key.removesuffix(ending): value for key, value in line.items() if key.endswith(ending)}
    for record in results:
        model = Path(str(record.result.settings.get("model", "")))
        value = record.result.metrics.get(metric)
        if value is not None and run.path.resolve() in itertools.chain([model.resolve()], model.resolve().parents):
            found[str(record.result.settings.get("data") or record.result.protocol)] = value
    return {name: value for name, value in found.items() if value is not None}
