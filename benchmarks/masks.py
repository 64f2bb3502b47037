"""Masked 112 px crops a second on one core: both tools, beside a bare warp and blend, and the loader with masks.

    python benchmarks/masks.py [--crops 512] [--rounds 9] [--data PREPARED] [--tools template uv] [--loader]
                                [--worn 4096] [--sheet FILE.jpg]

Whole `wear` calls, landmarks given (five, as `visard prepare` keeps them), on one pinned core, processor time, a new
look for every crop. Two rates: of the process's first crops, which draw creases, patterns, prints and views that are
then kept; and as training meets it once `--worn` masks have been put on: medians over rounds, each with looks that no
round before had, some of which still need a plane or a view that was never drawn. The floor, measured in the same
rounds: a ready RGBA mask warped onto the crop by one cv2.warpAffine and blended in float32 as numpy users write it; and
the same with OpenCV's 8-bit operations. The named peer is MaskTheFace, whose published rate with landmarks given is
62-113 images a second.
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
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from visard.config import DataConfig, MaskConfig
from visard.data.dataset import open_dataset
from visard.data.loader import Loader
from visard.data.sampler import EpochSampler
from visard.masks.augment import TOOLS, mask_augment, tool
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
    parser.add_argument("--worn", type=int, default=4096)
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
    pick = np.random.default_rng(0)
    first: dict[str, float] = {}
    for name in TOOLS if arguments.loader else arguments.tools:
        first[name] = len(crops) / seconds(worn(name, crops, pick))
        for _ in range(len(crops), arguments.worn, len(crops)):
            worn(name, crops, pick)()
    ways: dict[str, Callable[[], Callable[[], Any]]] = {n: partial(worn, n, crops, pick) for n in arguments.tools}
    numpy_way, opencv_way = floors([image for image, _ in crops])
    ways |= {"floor, numpy float32": lambda: numpy_way, "floor, OpenCV 8 bit": lambda: opencv_way}
    rates = measured(ways, len(crops), arguments.rounds)
    print(f"112 px, one core, crops a second, medians (fastest) of {arguments.rounds} rounds of {len(crops)} crops")
    for name, (median, best) in rates.items():
        beside = ""
        if name in arguments.tools:
            beside = (
                f"  {median / PEER[1]:5.1f}-{median / PEER[0]:.1f} x MaskTheFace; the first crops {first[name]:,.0f}"
            )
        print(f"  {name:22} {median:8,.0f} ({best:,.0f}){beside}")
    answer: dict[str, Any] = {"crops_per_second": {name: median for name, (median, _) in rates.items()}, "first": first}
    if arguments.loader:
        answer["loader"] = loader_rates(data, arguments.rounds)
    print(json.dumps(answer))


def worn(name: str, crops: list[Any], pick: np.random.Generator) -> Callable[[], int]:
    """Puts masks that were never worn before on all crops; how many were refused."""
    wear = tool(name)
    looks = [draw_look(pick) for _ in crops]

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


def measured(
    ways: dict[str, Callable[[], Callable[[], Any]]], count: int, rounds: int
) -> dict[str, tuple[float, float]]:
    """Crops a second of each way: median and fastest of alternating rounds, after one that warms up.

    Args:
        ways: by name, what makes a round's work ready (not timed) and gives it.
    """
    took: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            spent = seconds(way())
            if round_:
                took[name].append(spent)
    return {name: (count / statistics.median(spent), count / min(spent)) for name, spent in took.items()}


def seconds(work: Callable[[], Any]) -> float:
    """Processor time of it."""
    start = time.process_time()
    work()
    return time.process_time() - start


def loader_rates(data: Any, rounds: int) -> dict[str, float]:
    """Crops a second of the loader in this process, by share of masks: medians of alternating passes, each with its own
    masks, after `--worn` masks of both tools."""
    ratios = (*RATIOS[:1], SELDOM, *RATIOS[1:])
    rates: dict[float, list[float]] = {ratio: [] for ratio in ratios}
    for round_ in range(rounds):
        for ratio in ratios:
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
