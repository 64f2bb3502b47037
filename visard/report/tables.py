"""Numbers of runs and results as texts and tables.

In: `RunRecord` and `ResultRecord`. Out: cells, and `Html` tables. What is undefined is called so, never left empty.
"""

from __future__ import annotations

from collections.abc import Sequence

from visard.pages import Html, table
from visard.records import Result
from visard.report.sources import ResultRecord, RunRecord

METRICS = {
    "accuracy": "accuracy",
    "accuracy_usual_grid": "accuracy on the usual grid",
    "auc": "AUC",
    "eer": "equal error rate",
    "threshold": "threshold (cosine)",
}

RATES = ("accuracy", "eer", "tar@", "reached@")
"""Metrics shown in per cent, by the beginning of their names."""

BESIDE = ("_std", "threshold@")
"""Metrics that stand beside another one and get no row of their own, by end or beginning."""


def percent(value: float | None, digits: int = 2) -> str:
    return "undefined" if value is None else f"{100 * value:.{digits}f} %"


def metric_name(name: str) -> str:
    """For people: "tar@far=1e-3" -> "TAR at FAR 1e-3"."""
    if name.startswith("tar@far="):
        return f"TAR at FAR {name.removeprefix('tar@far=')}"
    return METRICS.get(name, name.replace("_", " "))


def metric_value(name: str, value: float | None) -> str:
    """A rate in per cent, another number with five digits, None as "undefined"."""
    if value is None or name.startswith(RATES):
        return percent(value)
    return f"{value:.5g}"


def spread(mean: float, deviation: float) -> str:
    """A rate with its deviation over folds."""
    return f"{100 * mean:.2f} ± {100 * deviation:.2f} %"


def accuracy_cell(result: Result) -> str:
    """Mean and deviation over folds."""
    value, deviation = result.metrics.get("accuracy"), result.metrics.get("accuracy_std")
    if value is None:
        return "–"
    return percent(value) if deviation is None else spread(value, deviation)


def summary_table(results: Sequence[ResultRecord]) -> Html:
    """One line a result, a column for each FAR at which any of them has an answer."""
    answered = (name for r in results for name, value in r.result.metrics.items() if value is not None)
    fars = list(dict.fromkeys(name for name in answered if name.startswith("tar@")))
    header = ["result", "accuracy", "EER", "AUC", *(metric_name(name) for name in fars), "pairs"]
    rows = []
    for record in results:
        values = record.result.metrics
        rates = [metric_value(name, values[name]) if name in values else "–" for name in ("eer", "auc", *fars)]
        rows.append([record.name, accuracy_cell(record.result), *rates, f"{record.result.counts.get('pairs', 0):,}"])
    return table(header, rows)


def metric_table(result: Result) -> Html:
    """Every metric of one result with its interval, and for a TAR its threshold."""
    rows = []
    for name, value in result.metrics.items():
        if name.endswith(BESIDE) or name.startswith(BESIDE):
            continue
        interval = result.intervals.get(name)
        between = "–" if interval is None else f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f} %"
        deviation = result.metrics.get(f"{name}_std")
        shown = metric_value(name, value) if deviation is None or value is None else spread(value, deviation)
        threshold = result.metrics.get(name.replace("tar@", "threshold@")) if name.startswith("tar@") else None
        rows.append([metric_name(name), shown, between, "–" if threshold is None else f"{threshold:.4f}"])
    return table(["metric", "value", "95 % interval", "threshold"], rows)


def settings_table(result: Result) -> Html:
    """Everything that changes the numbers, and how many images and pairs they come from."""
    rows = [[name.replace("_", " "), _plain(value)] for name, value in result.settings.items()]
    rows += [[name.replace("_", " "), f"{value:,}"] for name, value in result.counts.items()]
    if result.spec_hash:
        rows.append(["model spec", result.spec_hash])
    return table(["setting", "value"], rows, texts=2)


def run_table(runs: Sequence[RunRecord]) -> Html:
    """One line a run: how far it got, what it scored."""
    sets = list(dict.fromkeys(name for run in runs for name in run.sets))
    header = ["run", "recipe", "epochs", "steps", "loss", "images/s", *(f"best on {name}" for name in sets)]
    rows = []
    for run in runs:
        last = run.train[-1] if run.train else {}
        best = [best_accuracy(run, name) for name in sets]
        rows.append(
            [
                run.name,
                str(run.recipe.get("name", "–")),
                _cell(last.get("epoch"), ".1f"),
                _cell(last.get("step"), ",d"),
                _cell(last.get("loss"), ".3f"),
                _cell(middle_rate(run), ",.0f"),
                *("–" if value is None else percent(value) for value in best),
            ]
        )
    return table(header, rows, texts=2)


def best_accuracy(run: RunRecord, name: str) -> float | None:
    """Of one validation set over the run."""
    values = [line[f"{name}/accuracy"] for line in run.val if f"{name}/accuracy" in line]
    return max(values, default=None)


def middle_rate(run: RunRecord) -> float | None:
    """Median of the images a second; the first line, with its warm-up, counts like any other."""
    rates = sorted(line["images_per_second"] for line in run.train if "images_per_second" in line)
    return rates[len(rates) // 2] if rates else None


def _cell(value: float | None, style: str) -> str:
    return "–" if value is None else format(value, style)


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
