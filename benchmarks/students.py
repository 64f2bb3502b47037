"""Score against parameters, students with a teacher and without: the figure of BigFace's slides.

In: what `all_pairs --json` wrote, and which of its runs are a line. Out: a PNG, and a table on the screen.

    python -m benchmarks.all_pairs DATA RUN... --json scores.json
    python -m benchmarks.students scores.json FIGURE.png --line "alone=RUN,RUN" --line "distilled=RUN,RUN"

Parameters are those of the network, without class centres. A line of one run is a dotted level.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from visard.backbones import build, config_from_dict
from visard.runtime import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", type=Path)
    parser.add_argument("figure", type=Path)
    parser.add_argument("--metric", default="tar@far=0.0001")
    parser.add_argument("--line", action="append", required=True, help="name=RUN,RUN,...")
    options = parser.parse_args()
    scores = json.loads(options.scores.read_text(encoding="utf-8"))
    lines: dict[str, list[tuple[int, float]]] = {}
    for text in options.line:
        name, _, runs = text.partition("=")
        points = [(parameters(Path(run)), score(scores, Path(run).name, options.metric)) for run in runs.split(",")]
        lines[name] = sorted(points)
        for count, value in lines[name]:
            print(f"{name:24s} {count / 1e6:6.2f} M  {options.metric} {value:.4f}")
    draw(lines, options.metric, options.figure)


def score(scores: dict[str, dict[str, float]], run: str, metric: str) -> float:
    """One number of the file."""
    if metric not in scores.get(run, {}):
        raise SystemExit(f"{run}: the scores hold no {metric} of this run; measure it with all_pairs --json")
    return scores[run][metric]


def parameters(run: Path) -> int:
    """Of the network that `visard evaluate` would take from the run."""
    config = config_from_dict(load(run, device="cpu").spec.backbone, where=str(run))
    with torch.device("meta"):
        return sum(p.numel() for p in build(config).parameters())


def draw(lines: dict[str, list[tuple[int, float]]], metric: str, path: Path) -> None:
    """Logarithmic parameters, the score in percent."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), dpi=150)
    for i, (name, points) in enumerate(lines.items()):
        x, y = [count / 1e6 for count, _ in points], [100 * score for _, score in points]
        if len(points) == 1:
            axes.axhline(y[0], color=f"C{i}", linestyle=":", label=f"{name} ({x[0]:.2f} M)")
        else:
            axes.plot(x, y, f"C{i}o-", label=name)
    axes.set(xscale="log", xlabel="parameters of the network, millions", ylabel=f"{metric}, %", ylim=(0, None))
    sizes = sorted({count / 1e6 for points in lines.values() if len(points) > 1 for count, _ in points})
    axes.set_xticks(sizes, [f"{size:.2f}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
