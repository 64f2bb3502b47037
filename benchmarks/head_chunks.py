"""How many centres a chunk of the classifier shall have on a CPU: the time of a step by rows, images and type.

In: nothing. Out: a Markdown table of processor time as a multiple of the fastest size in its line, and JSON as the last
line.

    python benchmarks/head_chunks.py              five sizes, N from 32 to 8,192, both types; about ten minutes
    python benchmarks/head_chunks.py --images 512 of one N
    python benchmarks/head_chunks.py --scale 0.2  a fifth of the classes, for a look
    python benchmarks/head_chunks.py --threads 2  on so many cores, by the clock

One process, by default one thread on one core and the processor's time: the sizes take turns, medians of the turns, so
that an hour's noise meets all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from statistics import median

import torch
from head import DIM, relative_error, visard_step

from visard.device import ask_for_large_pages, keep_freed_memory
from visard.functional import softmax_workspace

ROWS = (256, 512, 1024, 2048, 4096)
WORK, LEAST_CLASSES = 1 << 25, 1 << 14
"""Images times classes of a step: as many products for every number of images, but for the largest."""


def main() -> None:
    """Times the sizes in turns and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[32, 128, 512, 1024, 2048, 4096, 8192], help="N")
    parser.add_argument("--scale", type=float, default=1.0, help="part of the classes")
    parser.add_argument("--turns", type=int, default=5, help="timed steps of each size")
    parser.add_argument("--threads", type=int, default=1, help="threads; more than one are timed by the clock")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, range(arguments.threads))
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("medium")
    if relative_error() > 1e-6:
        torch.set_float32_matmul_precision("highest")
    keep_freed_memory()
    print("| images | type | s | " + " | ".join(f"{rows:,} rows" for rows in ROWS) + " |")
    print("|---" * (3 + len(ROWS)) + "|")
    found = []
    for images in arguments.images:
        for kind in ("float32", "bf16"):
            classes = int(max(WORK // images, LEAST_CLASSES) * arguments.scale)
            seconds = time_sizes(images, classes, bf16=kind == "bf16", turns=arguments.turns, threads=arguments.threads)
            best = min(median(values) for values in seconds.values())
            ratios = " | ".join(f"{median(seconds[rows]) / best:.2f}" for rows in ROWS)
            print(f"| {images:,} | {kind} | {best:.2f} | {ratios} |", flush=True)
            found.append({"images": images, "type": kind, "seconds": seconds})
    print(json.dumps({"torch": torch.__version__, "scale": arguments.scale, "found": found}))


def time_sizes(images: int, classes: int, *, bf16: bool, turns: int, threads: int) -> dict[int, list[float]]:
    """Seconds of the steps of each size, after a first one."""
    clock = time.process_time if threads == 1 else time.perf_counter
    torch.manual_seed(0)
    weight = torch.empty(classes, DIM)
    ask_for_large_pages(weight)
    weight.normal_(0.0, 0.01)
    once = visard_step(weight, torch.randn(images, DIM), torch.randint(classes, (images,)), 1.0, bf16=bf16)
    chosen = softmax_workspace.chunk_classes
    seconds: dict[int, list[float]] = {rows: [] for rows in ROWS}
    try:
        for turn in range(turns + 1):
            for rows in ROWS:
                softmax_workspace.chunk_classes = lambda *_, rows=rows: rows
                started = clock()
                once()
                if turn:
                    seconds[rows].append(round(clock() - started, 4))
            print(f"  {images} images, bf16 {bf16}: turn {turn} of {turns}", file=sys.stderr, flush=True)
    finally:
        softmax_workspace.chunk_classes = chosen
    return seconds


if __name__ == "__main__":
    main()
