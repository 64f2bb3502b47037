"""What masks in training cost on clean faces and gain on masked ones: the trade-off of the SenseTime paper's Table 6.

In: what `all_pairs --json` wrote of a clean data set and of its masked copy, and which runs are seeds of one setting.
Out: a PNG, clean against masked error, and a table on the screen.

    python -m benchmarks.all_pairs CLEAN RUN... --json clean.json
    python -m benchmarks.all_pairs MASKED RUN... --json masked.json
    python -m benchmarks.tradeoff clean.json masked.json FIGURE.png --setting "15 %=RUN,RUN" --setting "35 %=RUN,RUN"
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clean", type=Path)
    parser.add_argument("masked", type=Path)
    parser.add_argument("figure", type=Path)
    parser.add_argument("--metric", default="eer", help="an error, or tar@far=..., of which 1 - it is drawn")
    parser.add_argument("--setting", action="append", required=True, help="name=RUN,RUN,... of several seeds")
    options = parser.parse_args()
    scores = [json.loads(path.read_text(encoding="utf-8")) for path in (options.clean, options.masked)]
    settings: dict[str, list[tuple[float, float]]] = {}
    for text in options.setting:
        name, _, runs = text.partition("=")
        settings[name] = [
            (error(scores[0], run, options.metric), error(scores[1], run, options.metric)) for run in runs.split(",")
        ]
    for name, points in settings.items():
        print(f"{name:16s} clean {spread([clean for clean, _ in points])}  masked {spread([m for _, m in points])}")
    draw(settings, options.metric, options.figure)


def error(scores: dict[str, dict[str, float]], run: str, metric: str) -> float:
    """In percent; of a rate that should be high, what it lacks."""
    name = Path(run).name
    if metric not in scores.get(name, {}):
        raise SystemExit(f"{name}: the scores hold no {metric} of this run; measure it with all_pairs --json")
    value = scores[name][metric]
    return 100 * (value if metric == "eer" else 1 - value)


def spread(values: list[float]) -> str:
    """Mean and half the range, which for two seeds is all there is to say."""
    return f"{statistics.mean(values):6.2f} ± {(max(values) - min(values)) / 2:.2f} %"


def draw(settings: dict[str, list[tuple[float, float]]], metric: str, path: Path) -> None:
    """Each seed a small point, each setting's mean a large one, joined in the order given."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), dpi=150)
    means = [tuple(statistics.mean(column) for column in zip(*points, strict=True)) for points in settings.values()]
    axes.plot(*zip(*means, strict=True), color="0.7", zorder=1)
    for i, (name, points) in enumerate(settings.items()):
        axes.plot(*zip(*points, strict=True), f"C{i}.", markersize=5)
        axes.plot(*means[i], f"C{i}o", markersize=9, label=name)
    what = "EER" if metric == "eer" else f"100 - {metric}"
    axes.set(xlabel=f"clean faces: {what}, %", ylabel=f"masked faces: {what}, %")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
