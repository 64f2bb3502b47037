"""Crops to batches on one core: the loader against bare JPEG decoding (floor) and the per-image ways (peers).

    python benchmarks/loader.py [DATA] [--images 2048] [--batch 128] [--rounds 9]

The floor is the faster of OpenCV and simplejpeg as they are called, decoding the images of the loader's epoch from
memory in the loader's order, each crop thrown away. The lowest floor is simplejpeg writing to an odd address, which
keeps libjpeg-turbo from writing past the cache (`visard.data.decode.crops`). The per-image way is what most training
code does: decode, mirror, to float, normalise, transpose, one image at a time, then stack; on arrays, and by PIL,
ToTensor and Normalize as arcface_torch does it. Ours stops at uint8, as the device normalises; it is measured in a
thread of this process and in one loader process, all on the same core. DATA is a prepared data set or .rec file;
without one, crops of noise with the JPEG size of real ones are made (about 6 kB at 112 px). Rounds alternate; printed
are medians by the clock and of the rounds' ratios; "cpu" is processor time (of this process), which a busy neighbour
disturbs least.
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
from PIL import Image

from visard.config import DataConfig
from visard.data.dataset import RecordDataset
from visard.data.decode import crops, simplejpeg
from visard.data.loader import Loader
from visard.data.sampler import EpochSampler
from visard.data.transforms import SampleRandom
from visard.data.writer import DatasetWriter
from visard.device import keep_freed_memory

AIM_OF_FLOOR = 0.9
AIM_OVER_PEER = 2.0
LOWEST = "decode (to odd address)"


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
        count, target = arguments.images // arguments.batch * arguments.batch, Path(folder) / "set"
        path = copied(arguments.data, target, count) if arguments.data else made(target, count)
        measure(RecordDataset(path), arguments.batch, arguments.rounds)


def measure(data: RecordDataset, batch: int, rounds: int) -> None:
    """Times the ways in turn, an epoch each, so that nothing is made ahead at another's cost; prints what came out."""
    images = len(data)
    thread, process = loader_of(data, batch, 0), loader_of(data, batch, 1)
    encoded: list[bytes] = []
    order, flips = np.empty(0, np.int64), np.empty(0, bool)
    ways: dict[str, Callable[[], None]] = {
        "decode (OpenCV)": lambda: opencv(encoded),
        "loader": lambda: epoch(thread),
        "loader, one process": lambda: epoch(process),
        "per image (arrays)": lambda: peer(data, order, flips, batch),
        "per image (PIL)": lambda: peer_pil(data, order, flips, batch),
    }
    if simplejpeg is not None:
        buffer, odd = np.empty((data.size, data.size, 3), np.uint8), crops(1, data.size)[0]
        ways["decode (simplejpeg)"] = lambda: direct(encoded, buffer)
        ways[LOWEST] = lambda: direct(encoded, odd)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        sampler = thread.sampler
        order = np.concatenate([sampler.batch(sampler.epoch, step) for step in range(sampler.steps)])
        encoded = [data.encoded(i) for i in order.tolist()]
        flips = SampleRandom(0, 0).flips([data.ids[i] for i in order.tolist()], 0.5)
        for name, way in ways.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            way()
            if round_:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - start_cpu)
    report(
        seconds, cpu, images, f"{images} crops of {data.size} px, {sum(map(len, encoded)) / images / 1000:.1f} kB each"
    )


def report(seconds: dict[str, list[float]], cpu: dict[str, list[float]], images: int, what: str) -> None:
    """Rates, and the ratios that there are aims for."""
    print(f"{what}, one core; medians of {len(seconds['loader'])} rounds")
    rates = {name: images / statistics.median(times) for name, times in seconds.items()}
    for name, rate in rates.items():
        print(f"  {name:23} {rate:8,.0f} crops/s   {1e6 * statistics.median(cpu[name]) / images:6.1f} us cpu a crop")

    def ratio(times: dict[str, list[float]], above: list[str], below: str) -> float:
        rows = zip(zip(*(times[name] for name in above), strict=True), times[below], strict=True)
        return statistics.median(min(row) / other for row, other in rows)

    floors = [n for n in rates if n.startswith("decode") and n != LOWEST]
    peers = [n for n in rates if n.startswith("per image")]
    ratios = {
        "loader / floor": ratio(seconds, floors, "loader"),
        "loader / floor (cpu)": ratio(cpu, floors, "loader"),
        "loader, one process / floor": ratio(seconds, floors, "loader, one process"),
        **({"loader / lowest floor": ratio(seconds, [LOWEST], "loader")} if LOWEST in seconds else {}),
        **{f"loader / {name}": ratio(seconds, [name], "loader") for name in peers},
    }
    for name, value in ratios.items():
        print(f"  {name:28} {value:6.3f}   (aim at least {AIM_OF_FLOOR if 'floor' in name else AIM_OVER_PEER})")
    print(json.dumps({"rates": rates, "ratios": ratios}))


def opencv(encoded: list[bytes]) -> None:
    """Nothing but decoding, from memory, the result thrown away."""
    for data in encoded:
        cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)


def direct(encoded: list[bytes], image: np.ndarray) -> None:
    """The same with simplejpeg, always into the same memory."""
    for data in encoded:
        simplejpeg.decode_jpeg(data, "RGB", buffer=image)


def loader_of(data: RecordDataset, batch: int, processes: int) -> Loader:
    """Shuffled, mirrored, with labels, ids and points."""
    return Loader(data, DataConfig(size=data.size, workers=processes), EpochSampler(len(data), batch, 0))


def epoch(loader: Loader) -> None:
    """All of its batches once."""
    for _ in loader:
        pass


def peer(data: RecordDataset, order: np.ndarray, flips: np.ndarray, batch: int) -> None:
    """The same crops as normalised float tensors, image by image."""
    for at in range(0, len(order), batch):
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


def peer_pil(data: RecordDataset, order: np.ndarray, flips: np.ndarray, batch: int) -> None:
    """The same as arcface_torch does it: decode, PIL, mirror, then torchvision's ToTensor and Normalize, restated."""
    half = torch.full((3, 1, 1), 0.5)
    for at in range(0, len(order), batch):
        rows = []
        for index, flip in zip(order[at : at + batch], flips[at : at + batch], strict=True):
            decoded = cv2.imdecode(np.frombuffer(data.encoded(int(index)), np.uint8), cv2.IMREAD_COLOR_RGB)
            image = Image.fromarray(decoded)
            if flip:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
            rows.append(pixels.sub_(half).div_(half))
        torch.stack(rows)


def copied(source: Path, path: Path, images: int) -> Path:
    """The first images of another data set."""
    data = RecordDataset(source)
    with DatasetWriter(path, data.size, {"made": str(source)}) as writing:
        for i in range(min(images, len(data))):
            label = int(data.labels[i])
            writing.add(data.ids[i], data.identities[label], data.encoded(i), data.points(i))
    return path


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
