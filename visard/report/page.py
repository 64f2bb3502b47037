"""One HTML page of runs and results, with everything in it.

In: what `sources` read. Out: a document: numbers first, then curves, then pictures, then what is needed to repeat it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePosixPath

from visard.errors import UserError
from visard.pages import Html, code, data_uri, details, escape, figure, grid, join, page, paragraph, section, tiles
from visard.records import Result
from visard.report import figures, tables
from visard.report.figures import Line
from visard.report.sources import ResultRecord, RunRecord

KINDS = {
    "hardest_genuine": "Hardest genuine pairs: the same person, scored lowest",
    "hardest_impostor": "Hardest impostor pairs: two people, scored highest",
}


def document(
    runs: Sequence[RunRecord],
    results: Sequence[ResultRecord],
    *,
    title: str,
    subtitle: str,
    machine: str,
    more: Sequence[Html] = (),
) -> str:
    """The page.

    Args:
        runs, results: in the order in which they are shown.
        title: its heading.
        subtitle: below it.
        machine: hardware and software in lines.
        more: sections after the tiles.
    """
    parts = [_tiles(runs, results), *more]
    if runs:
        parts.append(section("Training", tables.run_table(runs), grid(_training_figures(runs))))
    if results:
        parts.append(section("Verification", tables.summary_table(results), grid(_result_figures(results))))
        parts += [_result_section(record) for record in results]
    parts.append(section("To repeat it", *_recipes(runs), details("Machine and software", code(machine))))
    return page(title, parts, subtitle=subtitle)


def _tiles(runs: Sequence[RunRecord], results: Sequence[ResultRecord]) -> Html:
    """Of the first result and the first run: most reports have one of each. Where there are several, they are named."""
    shown: list[tuple[str, str, str]] = []
    of_result = f" of {results[0].name}" if len(results) > 1 else ""
    of_run = f" of {runs[0].name}" if len(runs) > 1 else ""
    if results:
        result = results[0].result
        values = result.metrics
        remark = f"{result.counts.get('pairs', 0):,} pairs, flip {result.settings.get('flip', 'none')}"
        deviation = values.get("accuracy_std")
        if deviation is not None:
            remark = f"± {100 * deviation:.2f} over folds, {remark}"
        shown.append((f"verification accuracy{of_result}", tables.percent(values.get("accuracy")), remark))
        if values.get("eer") is not None:
            shown.append((f"equal error rate{of_result}", tables.percent(values["eer"]), f"AUC {values['auc']:.5f}"))
        strictest = [name for name, value in values.items() if name.startswith("tar@") and value is not None]
        if strictest:
            name = strictest[-1]
            low, high = result.intervals[name]
            interval = f"95 %: {100 * low:.1f} to {100 * high:.1f} %"
            shown.append((tables.metric_name(name) + of_result, tables.percent(values[name]), interval))
    if runs:
        run = runs[0]
        if run.train:
            last = run.train[-1]
            shown.append(
                (f"training loss{of_run}", f"{last['loss']:.3f}", f"step {last['step']:,}, epoch {last['epoch']:.1f}")
            )
        rate = tables.middle_rate(run)
        if rate is not None:
            shown.append((f"training speed{of_run}", f"{rate:,.0f}", f"images a second, {run.recipe.get('name', '')}"))
    return tiles(shown)


def _training_figures(runs: Sequence[RunRecord]) -> list[Html]:
    drawn = []
    wanted = (
        ("loss", "Loss", "loss"),
        ("cos_target", "Cosine to the own class centre", "mean cosine"),
        ("lr", "Learning rate", "learning rate"),
        ("gradient_norm", "Gradient norm before clipping", "L2 norm"),
        ("images_per_second", "Speed", "images/s"),
    )
    for key, title, y_name in wanted:
        lines = [_history(run, key) for run in runs if any(key in row for row in run.train)]
        if lines:
            drawn.append(figure(figures.curves(title, lines, x_name="epoch", y_name=y_name)))
    accuracies = []
    for run in runs:
        for name in run.sets:
            rows = [row for row in run.val if f"{name}/accuracy" in row]
            label = name if len(runs) == 1 else f"{run.name}: {name}"
            accuracies.append(Line(label, [r["epoch"] for r in rows], [100 * r[f"{name}/accuracy"] for r in rows]))
    if accuracies:
        title = "Pair accuracy" if len(accuracies) > 1 else f"Pair accuracy on {accuracies[0].name}"
        picture = figures.curves(title, accuracies, x_name="epoch", y_name="accuracy, %", markers=True)
        drawn.insert(1, figure(picture))
    return drawn


def _history(run: RunRecord, key: str) -> Line:
    rows = [row for row in run.train if key in row]
    return Line(run.name, [row["epoch"] for row in rows], [row[key] for row in rows])


def _result_figures(results: Sequence[ResultRecord]) -> list[Html]:
    drawn = []
    rocs = [_line(record.name, record.result, "roc") for record in results if "roc" in record.result.curves]
    if rocs:
        drawn.append(figure(figures.roc("Receiver operating characteristic", rocs)))
    for record in results:
        result = record.result
        if {"genuine_scores", "impostor_scores"} <= result.curves.keys():
            title = "Scores" if len(results) == 1 else f"Scores of {record.name}"
            genuine, impostor = (_line(kind, result, f"{kind}_scores") for kind in ("genuine", "impostor"))
            picture = figures.score_histogram(title, genuine, impostor, result.metrics.get("threshold"))
            drawn.append(figure(picture))
    return drawn


def _line(name: str, result: Result, curve: str) -> Line:
    return Line(name, result.curves[curve]["x"], result.curves[curve]["y"])


def _result_section(record: ResultRecord) -> Html:
    parts: list[Html] = [tables.metric_table(record.result)]
    for kind, examples in record.result.examples.items():
        pictures = [_pair(record, example) for example in examples if "picture" in example]
        if pictures:
            parts += [Html(f"<h3>{escape(KINDS.get(kind, kind.replace('_', ' ')))}</h3>"), grid(pictures, small=True)]
    parts.append(details("Settings and counts", tables.settings_table(record.result)))
    return section(f"{record.name}: {record.result.protocol}", *parts)


def _pair(record: ResultRecord, example: dict[str, object]) -> Html:
    path = record.path.parent / str(example["picture"])
    if not path.is_file():
        raise UserError(f"{path}: named by {record.path} but not there; evaluate again with --out")
    image = Html(f'<img src="{data_uri(path.read_bytes(), path.suffix)}" alt="" loading="lazy">')
    left, right = (_short_id(str(example[side])) for side in ("left", "right"))
    return figure(image, Html(f"<b>{example['score']:+.3f}</b><br>{left}<br>{right}"))


def _short_id(image_id: str) -> Html:
    """Without suffix, without a folder whose name the file repeats, and with places to break at."""
    path = PurePosixPath(image_id)
    shown = path.stem if path.stem.startswith(path.parent.name) and path.parent.name else str(path.with_suffix(""))
    return Html(escape(shown).replace("_", "_<wbr>").replace("/", "/<wbr>"))


def _recipes(runs: Sequence[RunRecord]) -> list[Html]:
    if not runs:
        return [paragraph("The settings are with each result above.")]
    return [details(f"Recipe of {run.name}", join([code(run.opening), code(_recipe(run))])) for run in runs]


def _recipe(run: RunRecord) -> str:
    return f"{run.path / 'recipe.json'}\n{json.dumps(run.recipe, indent=2)}"
