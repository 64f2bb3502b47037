"""Masked 112 px crops a second on one core: both tools, beside a bare warp and blend, and the loader with masks.

    python benchmarks/masks.py [--crops 512] [--rounds 9] [--data PREPARED] [--tools template uv] [--loader]
                                [--sheet FILE.jpg]

Whole `wear` calls, landmarks given (five, as `visard prepare` keeps them), a new look for every crop, on one pinned
core. The floor, measured in the same rounds: a ready RGBA mask warped onto the crop by one cv2.warpAffine and blended
in float32 as numpy users write it; and the same with OpenCV's 8-bit operations. Medians over rounds of processor time.
The named peer is MaskTheFace, whose published rate with landmarks given is 62-113 images a second.
--loader: crops a second of `data.loader` with masks on 0, 15 and 35 % of the crops, both tools mixed, and with the
augmentation in place but no masks.
--sheet: a picture of every kind of mask worn by rendered faces, for the documentation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from visard.config import DataConfig, MaskConfig
from visard.data.dataset import open_dataset
from visard.data.loader import Loader
from visard.data.sampler import EpochSampler
from visard.masks.augment import mask_augment, tool
from visard.masks.records import COLOURS, KINDS, WEARINGS, Look, Masked, draw_look
from visard.masks.texture import texture
from visard.records import UInt8Array

PEER = (62, 113)
RATIOS = (0.0, 0.15, 0.35)
SELDOM = 1e-9
"""Of which no mask comes: what the augmentation costs a crop that it leaves alone."""
LOADED = 1024
"""Crops of a pass of the loader."""


def main() -> None:
    """Prints rates as a table and as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--crops", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--data", default="")
    parser.add_argument("--tools", nargs="+", default=["template", "uv"])
    parser.add_argument("--loader", action="store_true")
    parser.add_argument("--sheet", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if arguments.sheet:
        cv2.imwrite(str(arguments.sheet), sheet(arguments.tools)[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 84])
        return
    data = open_dataset(arguments.data or f"rendered:{arguments.crops}x1", size=112)
    rows = np.linspace(0, len(data) - 1, arguments.crops).astype(int).tolist()
    crops = [(data.image(row), data.points(row)) for row in rows]
    looks = [draw_look(np.random.default_rng(k)) for k in range(len(crops))]
    ways: dict[str, Callable[[], Any]] = {name: worn(name, crops, looks) for name in arguments.tools}
    ways["floor, numpy float32"], ways["floor, OpenCV 8 bit"] = floors([image for image, _ in crops])
    rates = measured(ways, len(crops), arguments.rounds)
    print(f"112 px, one core, crops a second, medians (fastest) of {arguments.rounds} rounds of {len(crops)} crops")
    for name, (median, best) in rates.items():
        beside = f"  {median / PEER[1]:5.1f}-{median / PEER[0]:.1f} x MaskTheFace" if name in arguments.tools else ""
        print(f"  {name:22} {median:8,.0f} ({best:,.0f}){beside}")
    answer: dict[str, Any] = {"crops_per_second": {name: median for name, (median, _) in rates.items()}}
    if arguments.loader:
        answer["loader"] = loader_rates(data, arguments.rounds)
    print(json.dumps(answer))


def worn(name: str, crops: list[Any], looks: list[Look]) -> Callable[[], int]:
    """All crops with their masks on; how many were refused."""
    wear = tool(name)

    def run() -> int:
        refused = 0
        for (image, points), look in zip(crops, looks, strict=True):
            refused += not isinstance(wear(image, points, look), Masked)
        return refused

    return run


def floors(images: list[UInt8Array]) -> tuple[Callable[[], None], Callable[[], None]]:
    """A ready mask warped and blended, without fitting, drawing, light or shadow."""
    flat = texture(Look(kind="surgical"), 96, 128)
    matrix = np.array([[0.55, 0.02, 20.0], [-0.02, 0.55, 58.0]])
    flags = cv2.INTER_LINEAR

    def numpy_way() -> None:
        for image in images:
            laid = cv2.warpAffine(flat, matrix, (112, 112), flags=flags).astype(np.float32)
            alpha = laid[..., 3:] / 255
            (image * (1 - alpha) + laid[..., :3] * alpha).astype(np.uint8)

    def opencv_way() -> None:
        for image in images:
            laid = cv2.warpAffine(flat, matrix, (112, 112), flags=flags)
            alpha = cv2.cvtColor(cv2.extractChannel(laid, 3), cv2.COLOR_GRAY2RGB)
            over = cv2.multiply(cv2.cvtColor(laid, cv2.COLOR_RGBA2RGB), alpha, scale=1 / 255)
            cv2.add(over, cv2.multiply(image, cv2.bitwise_not(alpha), scale=1 / 255))

    return numpy_way, opencv_way


def measured(ways: dict[str, Callable[[], Any]], count: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Crops a second of each way: median and fastest of alternating rounds, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if round_:
                seconds[name].append(time.process_time() - start)
    return {name: (count / statistics.median(took), count / min(took)) for name, took in seconds.items()}


def loader_rates(data: Any, rounds: int) -> dict[str, float]:
    """Crops a second of the loader in this process, by share of masks: medians of alternating passes.

    Each pass goes over the same masks twice, and the second time is taken: views, creases and patterns are drawn when
    first worn (some 10 ms each, a few hundred in all), once in a run.
    """
    ratios = (*RATIOS[:1], SELDOM, *RATIOS[1:])
    rates: dict[float, list[float]] = {ratio: [] for ratio in ratios}
    for round_ in range(rounds):
        for ratio in ratios:
            loader_pass(data, ratio, round_)
            rates[ratio].append(loader_pass(data, ratio, round_))
    medians = {f"{ratio:g}": statistics.median(values) for ratio, values in rates.items()}
    for ratio, value in medians.items():
        print(f"  loader, masks on {100 * float(ratio):6.2g} % {value:8,.0f} crops a second")
    return medians


def loader_pass(data: Any, ratio: float, seed: int) -> float:
    """Crops a second of processor time, of the first batches of a pass."""
    masks = MaskConfig(probability=ratio)
    loader = Loader(
        data, DataConfig(source="", masks=masks), EpochSampler(len(data), 64, seed=seed), mask_augment(masks)
    )
    start, images = time.process_time(), 0
    for batch in itertools.islice(loader, LOADED // 64):
        images += len(batch)
    return images / (time.process_time() - start)


def sheet(tools: list[str]) -> UInt8Array:
    """Every kind of mask on rendered faces: a row for each wearing and tool."""
    data = open_dataset("rendered:120x1", size=112)
    rng = np.random.default_rng(5)
    rows = []
    for name in tools:
        wear = tool(name)
        for wearing in WEARINGS:
            row: list[UInt8Array] = []
            index = 0 if not rows else 12 * len(rows)
            while len(row) < 12:
                kinds = KINDS if wearing == "right" else ("surgical", "cloth", "kn95", "bandana")
                kind = kinds[len(row) % len(kinds)]
                look = draw_look(rng)
                colour = COLOURS[kind][int(rng.integers(len(COLOURS[kind])))]
                points = data.points(index)
                assert points is not None
                masked = wear(data.image(index), points, replace(look, kind=kind, wearing=wearing, colour=colour))
                index += 1
                if isinstance(masked, Masked):
                    row.append(masked.image)
            rows.append(np.concatenate(row, axis=1))
    return np.concatenate(rows)


if __name__ == "__main__":
    main()
