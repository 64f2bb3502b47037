"""What each transformation of `visard.data.augment` costs a crop, on one core.

    python benchmarks/augment.py [--size 112] [--crops 400] [--rounds 7] [--sheet FILE.jpg]

Each is used on every crop (rendered faces), alone; the time of drawing the numbers is subtracted and given by itself.
Rounds alternate; medians of processor time. --sheet also writes a contact sheet: a row of examples a transformation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch

from visard.config_augment import PRESETS, AugmentConfig
from visard.data.augment import NAMES, Augmentation
from visard.data.dataset import open_dataset
from visard.data.transforms import Augment, Sample, SampleRandom
from visard.records import UInt8Array

SHEET_COLUMNS = 8


def main() -> None:
    """Prints microseconds a crop as a table and as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--crops", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sheet", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    samples = crops(arguments.size, min(arguments.crops, 64))
    if arguments.sheet:
        cv2.imwrite(str(arguments.sheet), sheet(samples)[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 82])
    ways: dict[str, Augment] = {name: Augmentation(only(name, 1.0)) for name in NAMES}
    ways |= {f"preset {name}": Augmentation(config) for name, config in PRESETS.items() if name != "none"}
    ways["drawing"] = Augmentation(AugmentConfig())
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(arguments.rounds + 1):
        for name, way in ways.items():
            took = timed(way, samples, arguments.crops)
            if round_:  # the first one warms up
                seconds[name].append(took)
    micros = {name: 1e6 * statistics.median(times) / arguments.crops for name, times in seconds.items()}
    cost = {name: value - (0 if name == "drawing" else micros["drawing"]) for name, value in micros.items()}
    print(f"{arguments.size} px, one core, microseconds a crop it is used on; medians of {arguments.rounds}")
    for name, value in cost.items():
        print(f"  {name:18} {value:7.1f}")
    print(json.dumps({"size": arguments.size, "microseconds": cost}))


def crops(size: int, count: int) -> list[Sample]:
    """Rendered faces of different people."""
    data = open_dataset(f"rendered:{count}x1", size=size)
    return [Sample(data.image(i), data.points(i), int(data.labels[i]), data.ids[i], False) for i in range(count)]


def only(name: str, probability: float) -> AugmentConfig:
    """One transformation, with the ranges it has in the strongest preset."""
    part = replace(getattr(PRESETS["strong"], name), probability=probability)
    return replace(AugmentConfig(), **{name: part})


def timed(way: Augment, samples: list[Sample], count: int) -> float:
    """Seconds of processor time for `count` crops, each with its own numbers."""
    random = SampleRandom(0, 0)
    start = time.process_time()
    for i in range(count):
        way(samples[i % len(samples)], random.generator(str(i)))
    return time.process_time() - start


def sheet(samples: list[Sample]) -> UInt8Array:
    """A row of examples for each transformation and preset, its name and the landmarks drawn in."""
    rows = [labelled("as it is", samples[:SHEET_COLUMNS])]
    ways: dict[str, Callable[[Sample, np.random.Generator], Sample]] = {n: Augmentation(only(n, 1.0)) for n in NAMES}
    ways |= {f"preset {name}": Augmentation(PRESETS[name]) for name in ("light", "strong", "adaface")}
    random = SampleRandom(0, 0)
    for name, way in ways.items():
        rows.append(labelled(name, [way(s, random.generator(s.id)) for s in samples[:SHEET_COLUMNS]]))
    return np.concatenate(rows)


def labelled(name: str, samples: list[Sample]) -> UInt8Array:
    """The crops side by side behind their name."""
    size = samples[0].image.shape[0]
    label = np.full((size, size + 20, 3), 255, np.uint8)
    cv2.putText(label, name, (3, size // 2), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    images = [label]
    for sample in samples:
        image = sample.image.copy()
        for x, y in sample.points if sample.points is not None else ():
            cv2.circle(image, (round(float(x)), round(float(y))), 1, (0, 255, 0), -1)
        images.append(image)
    return np.concatenate(images, axis=1)


if __name__ == "__main__":
    main()
