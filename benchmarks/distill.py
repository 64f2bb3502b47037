"""Time of forward and backward with each distillation method beside the plain student's, in one run.

`python benchmarks/distill.py`: a narrow IResNet at 56 px, 64 images a step, 2,500 classes, random crops and a random
teacher of the same shape; cached (embeddings handed in) and beside. Prints the median of each and its ratio to plain;
methods take turns, step by step, so that a busy machine slows all alike.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace

import torch

from visard.backbones import build
from visard.config import DistillConfig, HeadConfig, IResNetConfig, MarginConfig
from visard.heads import build_head
from visard.heads.distill import TEACHER, DistillHead
from visard.records import Batch

CLASSES, IMAGES, DIM, SIZE = 2500, 64, 128, 56
METHODS = ("margin", "angular", "bigface", "margin-kd", "soft-target", "triplet-l2", "triplet-cos", "relational")


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = IResNetConfig(blocks=(1, 2, 2, 1), width=24, embedding_dim=DIM, input_size=SIZE)
    student, teacher = build(network), build(network).eval().requires_grad_(False)
    config = HeadConfig(margin=MarginConfig(m2=0.5))
    heads = {"plain": build_head(CLASSES, DIM, config)}
    for method in METHODS:
        distill = DistillConfig(method=method, teacher="random")  # type: ignore[arg-type]
        base = build_head(CLASSES, DIM, config) if distill.has_classes else None
        heads[method] = DistillHead(base, distill, DIM, DIM, 3)
        if distill.needs_teacher_centres:
            heads[method].set_teacher_centres(torch.randn(CLASSES, DIM))  # type: ignore[operator]
    heads["bigface beside"] = heads["bigface"]
    pixels = torch.randn(IMAGES, 3, SIZE, SIZE)
    batch = Batch(
        images=torch.zeros(IMAGES, 1, 1, 3, dtype=torch.uint8),
        labels=torch.arange(IMAGES) // 4,
        ids=tuple(map(str, range(IMAGES))),
        flipped=torch.zeros(IMAGES, dtype=torch.bool),
        extras={TEACHER: torch.randn(IMAGES, DIM)},
    )
    times: dict[str, list[float]] = {name: [] for name in heads}
    for number in range(rounds + 1):
        for name, head in heads.items():
            started = time.perf_counter()
            taught = batch
            if name.endswith("beside"):
                with torch.no_grad():
                    taught = replace(batch, extras={TEACHER: teacher(pixels)})
            head.begin_step(IMAGES, batch.labels, IMAGES)
            loss, _ = head(student(pixels), head.prepare(taught))
            loss.backward()
            head.after_step()
            student.zero_grad()
            head.zero_grad()
            if number:
                times[name].append(time.perf_counter() - started)
    plain = statistics.median(times["plain"])
    for name, values in times.items():
        print(f"{name:<16} {statistics.median(values) * 1e3:8.1f} ms  {statistics.median(values) / plain:5.2f} x plain")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
