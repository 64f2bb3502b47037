"""BroadFace: time and memory of the classifier's step by size of queue, beside straightforward ways and the network.

In: nothing. Out: Markdown tables, JSON as the last line; with --figure the memory against the instances seen as a PNG
and its numbers beside it.

    python benchmarks/broadface.py                        the classifier and the network, about fifteen minutes, 6 GB
    python benchmarks/broadface.py --part classifier      one of: classifier, network, memory
    python benchmarks/broadface.py --classes 8500         a tenth of the classes, for a look
    python benchmarks/broadface.py --part memory --figure memory.png

C 85,000 classes, D 512, a mini-batch of 128: the paper's. Every measurement is a process of its own, one thread, all on
one core, one after the other. Times are of the processor, medians over steps after a first one (with a queue of 8,192
and more: of one step), of forward and backward from the mini-batch's embeddings to the gradients, and what fills the
queue; memory is the largest resident size less that before the first step, with the weights and a full queue there
("above the weights" adds the queue itself). The ways beside ours, both with a queue allocated once:

- "plainest": the loss twice, Eq. 8 of the mini-batch with W held, Eq. 9 of all with the embeddings held; the angular
  margin on all N x C cosines, a one-hot mask, torch.nn.functional.cross_entropy.
- "joined": one pass over the concatenated embeddings, the margin on the targets alone, cross_entropy, one backward; the
  embeddings' gradient made right by its factor. The best that plain autograd does with the logits in memory.

"stock" is how a script of theirs runs; "tuned" has glibc keep freed memory and float32 products by oneDNN (see
head.py). Ours does both itself, as `visard train`.

The network: IResNet-50 and -100 at 112 px, bf16 autocast and channels_last as `visard train` computes on a CPU, forward
and backward of a mini-batch of 8, times 16 for 128: its work is proportional to the images. Its memory is measured at
several mini-batches, and from there a straight line, as the paper's Fig. 6 does.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from head import TUNED, relative_error, resident
from torch import Tensor, nn
from torch.nn import functional

DIM, IMAGES, SCALE, MARGIN = 512, 128, 64.0, 0.5
QUEUES = (0, 1024, 2048, 8192, 32768)
PEERS = ("plainest stock", "plainest tuned", "joined stock", "joined tuned")
PEER_QUEUES = (0, 512, 1024)
EXTRAPOLATED = 8192
ONE_STEP = 8192
"""A queue of this size or more makes steps so long that the first, with its fresh pages, is as good as any."""
NETWORKS = {"IResNet-50": (3, 4, 14, 3), "IResNet-100": (3, 13, 30, 3)}
NETWORK_IMAGES = 8
MEMORY_IMAGES = (4, 8, 16, 24)


def main() -> None:
    """Runs the parts and prints their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["classifier", "network", "memory"], action="append", help="default: all")
    parser.add_argument("--classes", type=int, default=85_000)
    parser.add_argument("--steps", type=int, default=3, help="timed steps a process")
    parser.add_argument("--core", type=int, default=0, help="the core that all run on")
    parser.add_argument("--figure", type=Path, help="PNG of the memory; its numbers are written beside it")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child, arguments.classes, arguments.steps)))
        return
    parts = arguments.part or ["classifier", "network", "memory"]
    found: dict[str, Any] = {"torch": torch.__version__, "classes": arguments.classes}
    if "classifier" in parts:
        ours = [(f"visard {kind}", queue) for queue in QUEUES for kind in ("fp32", "bf16")]
        found["classifier"] = run_all(ours + [(way, queue) for way in PEERS for queue in PEER_QUEUES], arguments)
        print_classifier(found["classifier"])
    if "network" in parts:
        found["network"] = run_all([(name, NETWORK_IMAGES) for name in NETWORKS], arguments)
        print_network(found["network"])
    if "memory" in parts:
        ways = [("visard fp32", queue) for queue in QUEUES] + [("IResNet-100", images) for images in MEMORY_IMAGES]
        found["memory"] = run_all(ways, arguments)
        lines = memory_lines(found["memory"])
        print_memory(lines)
        if arguments.figure:
            draw_memory(lines, arguments.figure)
            arguments.figure.with_suffix(".json").write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found))


def run_all(ways: list[tuple[str, int]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures each way at each size in a process of its own, on the one core."""
    found = []
    for way, size in ways:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(TUNED if "tuned" in way else {})}
        command = [sys.executable, __file__, "--child", way, str(size), "--classes", str(arguments.classes)]
        pin = functools.partial(os.sched_setaffinity, 0, {arguments.core})
        done = subprocess.run(
            [*command, "--steps", str(arguments.steps)],
            env=environment, capture_output=True, text=True, preexec_fn=pin, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{way}, {size} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        one = {"way": way, "size": size, **json.loads(done.stdout.splitlines()[-1])}
        print(f"  {way}, {size}: {one['seconds']} s, {one['bytes'] / 1e9:.3f} GB", file=sys.stderr, flush=True)
        found.append(one)
    return found


def measure(way: str, size: str, classes: int, steps: int) -> dict[str, Any]:
    """Seconds of every step after the first; bytes of a step above weights and queue; bytes of the queue."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if "stock" not in way:
        torch.set_float32_matmul_precision("medium")
        assert relative_error() < 1e-6, "medium float32 products are not float32 on this CPU"
    if "stock" not in way and "tuned" not in way:
        from visard.device import keep_freed_memory

        keep_freed_memory()
    if way in NETWORKS:
        once, queue_bytes = network_step(NETWORKS[way], int(size)), 0
    elif way.startswith("visard"):
        once, queue_bytes = visard_step(classes, int(size), bf16=way.endswith("bf16"))
    else:
        once, queue_bytes = peer_step(classes, int(size), joined=way.startswith("joined"))
    before = resident()
    seconds = []
    large = way.startswith("visard") and int(size) >= ONE_STEP
    for _ in range(1 if large else steps + 1):
        started = time.process_time()
        once()
        seconds.append(round(time.process_time() - started, 4))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": seconds[-1:] if large else seconds[1:],
        "bytes": max(0, peak - before),
        "queue_bytes": queue_bytes,
    }


def visard_step(classes: int, queue: int, *, bf16: bool) -> tuple[Callable[[], None], int]:
    """The head on one process, from the embeddings to their gradient and the centres', with a full queue."""
    from visard.config import HeadConfig, MarginConfig, QueueConfig
    from visard.heads import build_head
    from visard.heads.broadface import BroadFaceHead
    from visard.records import Batch

    config = HeadConfig(
        classes="sharded",
        margin=MarginConfig(m2=MARGIN, scale=SCALE),
        queue=QueueConfig(size=queue),
        products="bf16" if bf16 else "fp32",
    )
    head = build_head(classes, DIM, config)
    emb, labels = torch.randn(IMAGES, DIM), torch.randint(classes, (IMAGES,))
    batch = Batch(torch.zeros(IMAGES, 1, 1, 3), labels, tuple(map(str, range(IMAGES))), torch.zeros(IMAGES))
    queue_bytes = 0
    if isinstance(head, BroadFaceHead):
        for first in range(0, queue, IMAGES):  # in portions: freed memory of a whole queue would hide what a step needs
            head.queue.put(*entries(min(IMAGES, queue - first), classes))
        queue_bytes = sum(buffer.nbytes for buffer in head.queue.buffers())

    def once() -> None:
        leaf = emb.detach().requires_grad_()
        head.begin_step(images_global=IMAGES, labels=labels)
        head(leaf, batch)[0].backward()
        head.row_gradients()
        head.after_step()

    return once, queue_bytes


def entries(queue: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, centres and labels of a full queue."""
    return torch.randn(queue, DIM), torch.randn(queue, DIM) * 0.01, torch.randint(classes, (queue,))


def peer_step(classes: int, queue: int, *, joined: bool) -> tuple[Callable[[], None], int]:
    """What plain autograd makes of Eq. 7, 8 and 9 with the logits in memory."""
    weight = nn.Parameter(torch.empty(classes, DIM).normal_(0.0, 0.01))
    emb, labels = torch.randn(IMAGES, DIM).requires_grad_(), torch.randint(classes, (IMAGES,))
    past, past_centres, past_labels = entries(queue, classes)
    first = 0

    def step() -> None:
        nonlocal first
        weight.grad = emb.grad = None
        with torch.no_grad():
            factor = past.norm(dim=1, keepdim=True) / past_centres.norm(dim=1, keepdim=True)
            now = past + factor * (weight[past_labels] - past_centres)
        all_labels = torch.cat([labels, past_labels])
        if joined:
            ratio = (IMAGES + queue) / IMAGES
            both = torch.cat([emb, now])
            cosines = functional.linear(functional.normalize(both), functional.normalize(weight))
            functional.cross_entropy(target_margin(cosines, all_labels), all_labels).backward()
            assert emb.grad is not None
            emb.grad.mul_(ratio)
        else:
            both = torch.cat([emb.detach(), now])
            encoder = functional.cross_entropy(plain_margin(emb, weight.detach(), labels), labels)
            classifier = functional.cross_entropy(plain_margin(both, weight, all_labels), all_labels)
            (encoder + classifier).backward()
        if queue:
            slots = (first + torch.arange(IMAGES)) % queue
            with torch.no_grad():
                past[slots], past_centres[slots], past_labels[slots] = emb, weight[labels], labels
            first = (first + IMAGES) % queue

    return step, past.nbytes + past_centres.nbytes + past_labels.nbytes


def target_margin(cosines: Tensor, labels: Tensor) -> Tensor:
    """Scaled logits with ArcFace's margin on the targets; the cosines' memory is reused."""
    rows = torch.arange(len(labels))
    target = cosines[rows, labels]
    sine = (1.0 - target.square()).clamp(min=0.0).sqrt()
    margined = target * math.cos(MARGIN) - sine * math.sin(MARGIN)
    return cosines.index_put((rows, labels), margined).mul_(SCALE)


def plain_margin(emb: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Scaled logits with ArcFace's margin computed on all cosines and chosen by a one-hot mask."""
    cosines = functional.linear(functional.normalize(emb), functional.normalize(weight))
    sines = (1.0 - cosines.pow(2)).clamp(0.0, 1.0).sqrt()
    margined = cosines * math.cos(MARGIN) - sines * math.sin(MARGIN)
    margined = torch.where(cosines > math.cos(math.pi - MARGIN), margined, cosines - MARGIN * math.sin(MARGIN))
    one_hot = torch.zeros_like(cosines).scatter_(1, labels.unsqueeze(1), 1.0)
    return SCALE * (one_hot * margined + (1.0 - one_hot) * cosines)


def network_step(blocks: tuple[int, int, int, int], images: int) -> Callable[[], None]:
    """Forward and backward of the network alone."""
    from visard.backbones import build
    from visard.config import IResNetConfig

    network = build(IResNetConfig(blocks=blocks, dropout=0.0)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pixels = torch.randn(images, 3, 112, 112).contiguous(memory_format=torch.channels_last)

    def once() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            emb = network(pixels)
        emb.float().square().mean().backward()

    return once


def print_classifier(found: list[dict[str, Any]]) -> None:
    """Ours by size of the queue; the ways beside it, measured and extended in a straight line; ratios at 1,024."""
    seconds = {(one["way"], one["size"]): median(one["seconds"]) for one in found}
    size = {(one["way"], one["size"]): one["bytes"] for one in found}
    held = {one["size"]: one["queue_bytes"] for one in found}
    print(
        "\n| queue | float32, s | bf16, s | float32, GB | bf16, GB | the queue itself, GB |\n|---|---|---|---|---|---|"
    )
    for queue in QUEUES:
        times = " | ".join(f"{seconds['visard ' + kind, queue]:.2f}" for kind in ("fp32", "bf16"))
        memory = " | ".join(f"{size['visard ' + kind, queue] / 1e9:.2f}" for kind in ("fp32", "bf16"))
        print(f"| {queue:,} | {times} | {memory} | {held[queue] / 1e9:.2f} |")
    low, high = PEER_QUEUES[-2:]
    print(
        f"\n| way | {high:,}, s | GB | / float32 | / bf16 | memory / float32 | / bf16 "
        f"| {EXTRAPOLATED:,} by line, s | GB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for way in PEERS:
        ratios = [seconds[way, high] / seconds[f"visard {kind}", high] for kind in ("fp32", "bf16")]
        ratios += [size[way, high] / size[f"visard {kind}", high] for kind in ("fp32", "bf16")]
        far = (EXTRAPOLATED - high) / (high - low)
        extended = [table[way, high] + far * (table[way, high] - table[way, low]) for table in (seconds, size)]
        cells = [seconds[way, high], size[way, high] / 1e9, *ratios, extended[0], extended[1] / 1e9]
        print(f"| {way} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    print(flush=True)


def print_network(found: list[dict[str, Any]]) -> None:
    """Seconds of a mini-batch of 128, scaled."""
    print(f"\n| network | {NETWORK_IMAGES} images, s | {IMAGES} images, s (computed) |\n|---|---|---|")
    for one in found:
        seconds = median(one["seconds"])
        print(f"| {one['way']} | {seconds:.2f} | {seconds * IMAGES / NETWORK_IMAGES:.0f} |")
    print(flush=True)


def memory_lines(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Bytes above the weights against instances seen a step: by mini-batch (and its straight line), and by queue."""
    batch = [(one["size"], one["bytes"]) for one in found if one["way"] in NETWORKS]
    queue = [(one["size"], one["bytes"] + one["queue_bytes"]) for one in found if one["way"] not in NETWORKS]
    mean_x, mean_y = (sum(point[i] for point in batch) / len(batch) for i in (0, 1))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in batch) / sum((x - mean_x) ** 2 for x, _ in batch)
    base = mean_y - slope * mean_x + slope * IMAGES
    return {
        "network": "IResNet-100, 112 px, bf16 autocast",
        "mini_batch": [{"instances": x, "bytes": y} for x, y in batch],
        "bytes_an_image": slope,
        "line": [{"instances": n, "bytes": mean_y + slope * (n - mean_x)} for n in (IMAGES, *QUEUES[1:])],
        "queue": [{"instances": IMAGES + q, "bytes": base + y, "classifier_bytes": y} for q, y in queue],
    }


def print_memory(lines: dict[str, Any]) -> None:
    """The figure's numbers."""
    print("\n| instances | larger mini-batch, GB (line) | queue, GB | of it the classifier |\n|---|---|---|---|")
    for one, other in zip(lines["line"], lines["queue"], strict=True):
        cells = (one["bytes"] / 1e9, other["bytes"] / 1e9, other["classifier_bytes"] / 1e9)
        print(f"| {other['instances']:,} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    print(flush=True)


def draw_memory(lines: dict[str, Any], path: Path) -> None:
    """Memory against instances, as the paper's Fig. 6."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), dpi=150)
    for key, style, label in (
        ("line", "C0:", "larger mini-batch, straight line"),
        ("mini_batch", "C0o-", "larger mini-batch, measured"),
        ("queue", "C3s-", f"mini-batch of {IMAGES} and a queue"),
    ):
        points = [(point["instances"], point["bytes"] / 1e9) for point in lines[key]]
        axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="instances the classifier sees in a step",
        ylabel="memory above the weights, GB",
    )
    axes.set_title(lines["network"], fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
