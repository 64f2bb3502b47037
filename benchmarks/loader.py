"""Crops to batches on one core: the loader against bare JPEG decoding (floor) and the per-image way (peer).

    python benchmarks/loader.py [DATA] [--images 2048] [--batch 128] [--rounds 9]

The per-image way is what most training code does: decode, mirror, to float, normalise, transpose, one image at a
time, then stack. Ours stops at uint8, as the device normalises. Decoding is measured twice: each crop thrown away (it
never leaves the cache) and a batch of crops kept, as anything that makes batches must; the aim is against the first.
DATA is a prepared data set or .rec file; without one, crops of noise with the JPEG size of real ones are made (about
6 kB at 112 px). Rounds alternate; the medians of the rounds' ratios are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch

from visard.config import DataConfig
from visard.data.dataset import RecordDataset
from visard.data.loader import Loader
from visard.data.sampler import EpochSampler
from visard.data.transforms import SampleRandom
from visard.data.writer import DatasetWriter
from visard.device import keep_freed_memory

AIM_OF_FLOOR = 0.9
AIM_OVER_PEER = 2.0


def main() -> None:
    """Prints the rates and ratios as a table and as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    keep_freed_memory()  # as training on a CPU and the loader's processes do
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.data or made(Path(folder) / "set", arguments.images)
        measure(RecordDataset(path), arguments.images, arguments.batch, arguments.rounds)


def measure(data: RecordDataset, images: int, batch: int, rounds: int) -> None:
    """Times the ways in turn and prints what came out."""
    images = min(images, len(data)) // batch * batch
    encoded = [np.frombuffer(data.encoded(i), np.uint8) for i in range(images)]
    ways: dict[str, Callable[[], None]] = {
        "decode (floor)": lambda: floor(encoded),
        "decode, kept": lambda: kept(encoded, batch),
        "loader": lambda: ours(data, batch, images),
        "per image (peer)": lambda: peer(data, batch, images),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if round_:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    rates = {name: images / statistics.median(times) for name, times in seconds.items()}
    pairs = list(zip(*seconds.values(), strict=True))
    of_floor = statistics.median(f / o for f, _, o, _ in pairs)
    of_kept = statistics.median(k / o for _, k, o, _ in pairs)
    over_peer = statistics.median(p / o for _, _, o, p in pairs)
    kilobytes = sum(map(len, encoded)) / images / 1000
    print(f"{images} crops of {data.size} px, {kilobytes:.1f} kB each, batch {batch}, one core; medians of {rounds}")
    for name, rate in rates.items():
        print(f"  {name:18} {rate:8,.0f} crops/s")
    print(f"  loader / floor     {of_floor:8.3f}   (aim at least {AIM_OF_FLOOR})")
    print(f"  loader / kept      {of_kept:8.3f}")
    print(f"  loader / per image {over_peer:8.2f}   (aim at least {AIM_OVER_PEER})")
    print(
        json.dumps(
            {"rates": rates, "of_floor": of_floor, "of_kept": of_kept, "over_peer": over_peer, "kilobytes": kilobytes}
        )
    )


def floor(encoded: list[np.ndarray]) -> None:
    """Nothing but decoding, from memory, the result thrown away."""
    for data in encoded:
        cv2.imdecode(data, cv2.IMREAD_COLOR)


def kept(encoded: list[np.ndarray], batch: int) -> None:
    """Nothing but decoding, a batch of separate arrays kept at a time."""
    for at in range(0, len(encoded), batch):
        [cv2.imdecode(data, cv2.IMREAD_COLOR_RGB) for data in encoded[at : at + batch]]


def ours(data: RecordDataset, batch: int, images: int) -> None:
    """One epoch: shuffled, mirrored, with labels, ids and points."""
    loader = Loader(data, DataConfig(size=data.size), EpochSampler(len(data), batch, 0))
    done = 0
    for loaded in loader:
        done += len(loaded)
        if done >= images:
            break


def peer(data: RecordDataset, batch: int, images: int) -> None:
    """The same crops as normalised float tensors, image by image."""
    order = np.random.default_rng(0).permutation(len(data))[:images]
    flips = SampleRandom(0, 0).flips([data.ids[int(i)] for i in order], 0.5)
    for at in range(0, images, batch):
        rows = []
        for index, flip in zip(order[at : at + batch], flips[at : at + batch], strict=True):
            image = cv2.imdecode(np.frombuffer(data.encoded(int(index)), np.uint8), cv2.IMREAD_COLOR)
            image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
            if flip:
                image = image[:, ::-1]
            pixels = image.astype(np.float32) / 255
            pixels = (pixels - 0.5) / 0.5
            rows.append(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))))
        torch.stack(rows)


def made(path: Path, images: int) -> Path:
    """Smooth noise whose JPEG files are as long as those of face crops."""
    rng = np.random.default_rng(0)
    with DatasetWriter(path, 112, {"made": "noise"}) as writing:
        for i in range(images):
            coarse = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            image = cv2.resize(coarse, (112, 112), interpolation=cv2.INTER_CUBIC)
            image = cv2.add(image, rng.integers(0, 8, image.shape, dtype=np.uint8))
            jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
            writing.add(f"{i // 16}/{i}.jpg", f"{i // 16}", jpeg, np.full((5, 2), 56, np.float32))
    return path


if __name__ == "__main__":
    main()
