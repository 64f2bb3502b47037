"""TAR at low FAR over every pair of a small set: what the 3,000 drawn pairs of `visard evaluate pairs` cannot show.

In: models (or runs), a set of aligned crops. Out: a table, and with --json a file: per model TAR at each FAR that the
set supports (1e-6 needs a million impostor pairs), equal error rate and AUC. Models whose names differ only in a last
-SEED are rows of one mean and deviation besides.

    python -m benchmarks.all_pairs DATA RUN... [--fars 1e-6 1e-5 1e-4 1e-3] [--flip none|sum] [--json FILE]

--distractors OTHERS adds the rank-1 rate among strangers as MegaFace defines it: each ordered pair of two images of a
person, one the probe, the other its only match among all images of OTHERS; right if no stranger is as near.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np

from visard.data.dataset import open_dataset
from visard.embed import embed_dataset
from visard.functional import metrics
from visard.runtime import load


def unit_vectors(model: str, data: str, flip: str, batch: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) float32 embeddings of length 1, (N,) labels."""
    embedder = load(Path(model))
    size = embedder.spec.input_size
    found = embed_dataset(embedder, open_dataset(data, size, resize=True), flip, batch)
    return found.vectors / np.linalg.norm(found.vectors, axis=1, keepdims=True), np.asarray(found.labels)


def scores_of(unit: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of all genuine and of all impostor pairs, float32."""
    genuine, impostor = [], []
    for i in range(len(unit) - 1):
        cosines = unit[i + 1 :] @ unit[i]
        same = labels[i + 1 :] == labels[i]
        genuine.append(cosines[same])
        impostor.append(cosines[~same])
    return np.concatenate(genuine), np.concatenate(impostor)


def rank_one(unit: np.ndarray, labels: np.ndarray, strangers: np.ndarray) -> float:
    """Share of the ordered genuine pairs whose cosine is above that of the probe to every stranger."""
    right = pairs = 0
    for i in range(len(unit)):
        nearest = (strangers @ unit[i]).max()
        matches = np.flatnonzero(labels == labels[i])
        cosines = unit[matches[matches != i]] @ unit[i]
        right += int((cosines > nearest).sum())
        pairs += len(cosines)
    return right / pairs


def measure(model: str, data: str, distractors: str, flip: str, fars: list[float]) -> dict[str, float]:
    """Metric -> value; a FAR that the set does not support is left out."""
    unit, labels = unit_vectors(model, data, flip)
    genuine, impostor = scores_of(unit, labels)
    values = {"genuine": float(len(genuine)), "impostor": float(len(impostor))}
    for far, point in zip(fars, metrics.operating_points(genuine, impostor, fars), strict=True):
        if point is not None:
            values[f"tar@far={far:g}"] = point.tar
    for name, value in (("eer", metrics.equal_error_rate(genuine, impostor)), ("auc", metrics.auc(genuine, impostor))):
        assert value is not None, f"{data}: no pair of one person, or none of two"
        values[name] = value
    if distractors:
        values["rank-1"] = rank_one(unit, labels, unit_vectors(model, distractors, flip)[0])
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--fars", type=float, nargs="+", default=[1e-6, 1e-5, 1e-4, 1e-3])
    parser.add_argument("--flip", default="none", choices=["none", "sum"])
    parser.add_argument("--distractors", default="", help="a set of other people")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = [Path(model).name for model in options.models]
    if len(set(names)) < len(names):
        parser.error(f"two models have the same name ({' '.join(names)}); a row would be written over")
    results: dict[str, dict[str, float]] = {}
    for model in options.models:
        results[Path(model).name] = measure(model, options.data, options.distractors, options.flip, options.fars)
        shown = "  ".join(f"{k} {v:.4f}" for k, v in results[Path(model).name].items() if v <= 1)
        print(f"{Path(model).name:28s} {shown}", flush=True)
    groups: dict[str, list[dict[str, float]]] = defaultdict(list)
    for name, values in results.items():
        groups[re.sub(r"-\d+$", "", name)].append(values)
    for name, rows in groups.items():
        if len(rows) > 1:
            shown = "  ".join(
                f"{k} {statistics.mean(r[k] for r in rows):.4f} ± {statistics.stdev(r[k] for r in rows):.4f}"
                for k in rows[0]
                if rows[0][k] <= 1
            )
            print(f"{name:28s} {shown}  ({len(rows)} seeds)")
    if options.json:
        temporary = options.json.with_name(f".{options.json.name}.tmp")
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, options.json)


if __name__ == "__main__":
    main()
