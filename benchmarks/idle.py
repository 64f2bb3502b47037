"""How long training waits for its data: IResNet-50 at 112 px from a .rec, one computing thread, one loader process.

    python benchmarks/idle.py [DATA.rec] [--batch 16] [--steps 8] [--images 2048]

The idle share is the time between asking for a batch and having it, over the time of the steps (bf16 autocast,
channels_last, as `visard train` computes on a CPU; a first step is left out). Then the loader alone: what one loader
process gives when nothing else is to do, and from that how many images a second 1, 4 and 8 cores of loading feed
(computed: each loader process works for itself, on records that are in memory). Without DATA, crops of noise with the
JPEG size of real ones are made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from loader import made
from torch.nn import functional as F  # noqa: N812

from visard.backbones import build
from visard.config import DataConfig, IResNetConfig
from visard.data.dataset import RecordDataset
from visard.data.loader import Loader
from visard.data.sampler import EpochSampler
from visard.device import choose_float32_matmul, keep_freed_memory

RATE_ROUNDS = 5


def main() -> None:
    """Prints the idle share and the rates, also as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--images", type=int, default=2048)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.data or made(Path(folder) / "set", arguments.images) / "train.rec"
        data = RecordDataset(path)
        waits, steps = train(data, arguments.batch, arguments.steps)
        rate = loading_rate(data)
    idle, images = sum(waits) / sum(steps), arguments.batch * len(steps) / sum(steps)
    print(f"IResNet-50 at {data.size} px, batch {arguments.batch}, one thread: {images:.2f} images/s")
    print(f"  waiting for data: {1e3 * statistics.median(waits):.2f} ms of a step of {statistics.median(steps):.2f} s")
    print(f"  idle share {100 * idle:.3f} %; longest wait {1e3 * max(waits):.2f} ms")
    print(f"one loader process: {rate:,.0f} images/s, {rate / images:,.0f} times what this thread trains on")
    for cores in (1, 4, 8):
        print(f"  {cores} core{'s' if cores > 1 else ' '} of loading feed {cores * rate:8,.0f} images/s (computed)")
    print(json.dumps({"idle": idle, "trained_a_second": images, "loaded_a_second": rate, "waits_s": waits}))


def loader_of(data: RecordDataset, batch: int) -> Loader:
    return Loader(data, DataConfig(size=data.size, workers=1), EpochSampler(len(data), batch, 0))


def train(data: RecordDataset, batch: int, count: int) -> tuple[list[float], list[float]]:
    """Seconds of waiting, and of each whole step."""
    step = training_step(len(data.identities))
    batches = iter(loader_of(data, batch))
    waits, steps = [], []
    for number in range(count + 1):
        start = time.perf_counter()
        loaded = next(batches)
        waited = time.perf_counter() - start
        step(loaded)
        if number:
            waits.append(waited)
            steps.append(time.perf_counter() - start)
    return waits, steps


def training_step(classes: int) -> Any:
    """Forward, backward, SGD with momentum; the head is cross-entropy over normalised cosines."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(choose_float32_matmul())
    network = build(IResNetConfig(blocks=(3, 4, 14, 3))).to(memory_format=torch.channels_last)
    centres = torch.nn.Parameter(torch.randn(classes, 512) * 0.01)
    optimizer = torch.optim.SGD([*network.parameters(), centres], lr=0.01, momentum=0.9, weight_decay=5e-4)

    def step(batch: Any) -> None:
        pixels = batch.images.permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = network(pixels.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(64 * F.linear(F.normalize(embeddings), F.normalize(centres)), batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def loading_rate(data: RecordDataset) -> float:
    """Images a second of one loader process; an epoch a round, the median."""
    loader, rates = loader_of(data, 128), []
    for _ in range(RATE_ROUNDS + 1):
        start = time.perf_counter()
        images = sum(len(batch) for batch in loader)
        rates.append(images / (time.perf_counter() - start))
    return statistics.median(rates[1:])


if __name__ == "__main__":
    main()
