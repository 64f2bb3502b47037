"""The classifier on one GPU: whole logits, chunks of classes in torch, and the Triton kernels; right first, then fast.

    python benchmarks/kernels_gpu.py                       a few minutes; needs Triton and a CUDA GPU
    python benchmarks/kernels_gpu.py --products tf32       float32 products in TF32 instead of bf16
    python benchmarks/kernels_gpu.py --tune                times other tilings at C = 1e6, and each kernel's share
    python benchmarks/kernels_gpu.py --rehearse            tiny sizes on a CPU (TRITON_INTERPRET=1), to test the script

In: nothing. Out: errors against float64 (exit code 1 if the kernels are wrong), a Markdown table, and JSON as the last
line. Without a GPU: one line that says so, exit code 0.

A step is forward and backward, to the gradients of embeddings and centres, ArcFace, D = 512, float32 centres. Times are
medians by CUDA events; "extra GB" is the peak above centres, their gradient and the embeddings. The limit is what the
three products that no way can do without (logits and two gradients) take in torch.mm at the same shapes in the same
type, 65,536 classes at a time; without keeping logits a fourth is needed, so 75 % of the limit is the most to be had.

- whole: normalise, linear, margin, torch.nn.functional.cross_entropy, with autograd; the product in the type named.
- chunked: `margin_softmax` as it is by default. triton: the same with the Triton pieces.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from visard.errors import UserError
from visard.functional.margins import arcface
from visard.functional.margins_adaptive import curricularface
from visard.functional.softmax import margin_softmax_whole
from visard.functional.softmax_chunked import Settings, margin_softmax
from visard.kernels import Tiling, triton_pieces

DIM, SCALE, MARGIN_RAD = 512, 64.0, 0.5
CLASSES = [100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000]
IMAGES = [1024, 8192]
WAYS = ["whole", "chunked", "triton", "limit"]
ARC = functools.partial(arcface, m2=MARGIN_RAD)
CURRICULAR = functools.partial(curricularface, m=MARGIN_RAD, momentum=0.9)
# Of the reference in the same arithmetic, what the kernels may be off by, and beside it what is rounding at any rate.
TIMES_WORSE = {"float32": (4.0, 1e-5), "tf32": (3.0, 1e-3), "bf16": (3.0, 1e-3)}
LIMIT_BLOCK = 65_536
SECONDS_A_CELL = 3.0


def main() -> int:
    """Checks, measures, prints."""
    arguments = parsed()
    if not (torch.cuda.is_available() or arguments.rehearse):
        print("kernels_gpu: there is no CUDA GPU here; nothing was measured")
        return 0
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    try:
        triton_pieces(device)
    except UserError as error:
        print(f"kernels_gpu: {error}")
        return 0
    print(f"{hardware(device)}, torch {torch.__version__}\n")
    if not correct(device, rehearse=arguments.rehearse):
        print("kernels_gpu: the kernels are wrong; nothing was timed")
        return 1
    if arguments.tune:
        tune(arguments, device)
        return 0
    found = []
    for images in arguments.images:
        print(f"\nN = {images:,}, D = {DIM}, products {arguments.products}\n")
        print("| C | " + " | ".join(f"{way} ms" for way in WAYS) + " | whole / triton | limit / triton | extra GB: "
              "whole | chunked | triton |")  # fmt: skip
        print("|---" * (len(WAYS) + 6) + "|")
        for classes in arguments.classes:
            row = {way: measured(way, images, classes, arguments, device) for way in WAYS}
            found.append({"images": images, "classes": classes, **row})
            print_row(classes, row)
    print(json.dumps({"hardware": hardware(device), "products": arguments.products, "cells": found}))
    return 0


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = lambda text: int(float(text))  # noqa: E731
    parser.add_argument("--classes", type=number, nargs="+", help="1e5 ... 3e7 by default")
    parser.add_argument("--images", type=number, nargs="+", help="1024 and 8192 by default")
    parser.add_argument("--products", choices=["bf16", "tf32", "float32"], default="bf16")
    parser.add_argument("--steps", type=int, default=20, help="timed steps, at most")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    arguments.classes = arguments.classes or ([300] if arguments.rehearse else CLASSES)
    arguments.images = arguments.images or ([20] if arguments.rehearse else IMAGES)
    return arguments


def hardware(device: torch.device) -> str:
    """What it runs on."""
    if device.type == "cpu":
        return "a rehearsal on a CPU"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"


def correct(device: torch.device, *, rehearse: bool) -> bool:
    """Prints errors against float64 of loss, embedding gradient and centre gradient; whether all are what they should
    be: those of torch's chunks in the same arithmetic, to a factor."""
    sizes = [(7, 300, 40)] if rehearse else [(1, 2, 5), (33, 1_000, 130), (128, 20_000, 512), (1_000, 100_001, 512)]
    print("Errors against float64, of the kernels and (of torch's chunks):\n")
    print("| N | C | D | products | settings | loss | embeddings | centres | as it should be |")
    print("|---|---|---|---|---|---|---|---|---|")
    fine = True
    for images, classes, dim in sizes:
        for products in TIMES_WORSE:
            for centres in (1, 2) if classes <= 20_000 else (1,):
                fine &= correct_at(images, classes, dim, products, centres, device)
    return fine


def correct_at(images: int, classes: int, dim: int, products: str, centres: int, device: torch.device) -> bool:
    """One row. With two centres a class: hard negatives, ignored classes and the conflict filter, too."""
    generator = torch.Generator(device).manual_seed(images)
    shape = (classes, dim) if centres == 1 else (classes, centres, dim)
    weight = torch.randn(shape, generator=generator, device=device, dtype=torch.float64)
    emb = torch.randn(images, dim, generator=generator, device=device, dtype=torch.float64)
    labels = torch.randint(-1, classes, (images,), generator=generator, device=device)
    near = torch.arange(images, device=device) % 2 == 0
    own = weight.view(classes, centres, dim)[labels.clamp(min=0), 0]
    emb = torch.where(near.unsqueeze(1), 0.5 * emb + own, emb)
    margin, state = (ARC, {}) if centres == 1 else (CURRICULAR, {"cos_mean": torch.tensor(0.3, device=device)})
    ignored = None if centres == 1 else torch.arange(classes, device=device) % 7 == 3
    conflict = None if centres == 1 else 0.7
    same = {"scale": 32.0, "denominator": images}

    def results(pieces_settings: Settings | None) -> list[Tensor]:
        dtype = torch.float64 if pieces_settings is None else torch.float32
        e, w = emb.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        if pieces_settings is None:
            out = margin_softmax_whole(
                e, w, labels, margin, state=state, ignored_C=ignored, conflict_cos=conflict, **same
            )
        else:
            out = margin_softmax(e, w, labels, margin, state=state, settings=pieces_settings, **same)
        return [out.loss.detach(), *torch.autograd.grad(out.loss, (e, w))]

    kind = torch.bfloat16 if products == "bf16" else None
    chunked = Settings(products=kind, keep=False, ignored_C=ignored, conflict_cos=conflict)
    with product_precision(products):
        truth, plain = results(None), results(chunked)
        ours = results(dataclasses.replace(chunked, pieces=triton_pieces(device)))
    errors = [[relative(got, right) for got, right in zip(way, truth, strict=True)] for way in (ours, plain)]
    times, floor = TIMES_WORSE[products]
    fine = all(mine <= times * theirs + floor for mine, theirs in zip(*errors, strict=True))
    cells = " | ".join(f"{mine:.1e} ({theirs:.1e})" for mine, theirs in zip(*errors, strict=True))
    what = "plain" if centres == 1 else "all, 2 centres"
    print(
        f"| {images:,} | {classes:,} | {dim} | {products} | {what} | {cells} | {'yes' if fine else 'NO'} |", flush=True
    )
    return fine


class product_precision:  # noqa: N801 - reads as a function
    """What torch's float32 products are made of, inside a `with`."""

    def __init__(self, products: str) -> None:
        self.name = "highest" if products == "float32" else "high"

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.name)

    def __exit__(self, *_: object) -> None:
        torch.set_float32_matmul_precision(self.before)


def relative(got: Tensor, truth: Tensor) -> float:
    """|got - truth| / |truth|; inf for a NaN."""
    error = ((got.double() - truth).norm() / truth.norm().clamp(min=1e-12)).item()
    return error if error == error else float("inf")


def measured(
    way: str,
    images: int,
    classes: int,
    arguments: argparse.Namespace,
    device: torch.device,
    tiling: Tiling | None = None,
) -> dict[str, float] | None:
    """Milliseconds of a step and extra GB; None if it does not fit."""
    if device.type == "cuda":
        gc.collect()  # what the traceback of a step that did not fit held
        torch.cuda.empty_cache()
    try:
        emb, weight, labels = tensors(images, classes, device)
        before = allocated(device)
        with product_precision(arguments.products):
            once = step_of(way, emb, weight, labels, arguments.products, tiling)
            milliseconds = timed(once, arguments.steps, device)
    except torch.cuda.OutOfMemoryError:
        return None
    return {"ms": milliseconds, "extra_gb": max(peak(device) - before - weight.nbytes, 0) / 1e9}


def tensors(images: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, centres, labels: random ones, the same each time."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.empty(classes, DIM, device=device).normal_(0.0, 0.01, generator=generator).requires_grad_()
    emb = torch.randn(images, DIM, generator=generator, device=device).requires_grad_()
    return emb, weight, torch.randint(classes, (images,), generator=generator, device=device)


def step_of(
    way: str, emb: Tensor, weight: Tensor, labels: Tensor, products: str, tiling: Tiling | None
) -> Callable[[], None]:
    """What makes one step."""
    kind = torch.bfloat16 if products == "bf16" else None
    if way == "limit":
        return products_alone(emb.detach(), weight.detach(), kind or torch.float32)
    if way == "whole":

        def loss() -> Tensor:
            with torch.autocast(emb.device.type, torch.bfloat16, enabled=kind is not None):
                cos = functional.linear(functional.normalize(emb), functional.normalize(weight))
            own = cos.float().gather(1, labels.unsqueeze(1)).squeeze(1)
            logits = SCALE * cos.float().scatter(1, labels.unsqueeze(1), ARC(own, own, {}).cos.unsqueeze(1))
            return functional.cross_entropy(logits, labels)
    else:
        settings = Settings(products=kind)
        if way == "triton":
            settings = Settings(products=kind, keep=False, pieces=triton_pieces(emb.device, tiling))

        def loss() -> Tensor:
            return margin_softmax(
                emb, weight, labels, ARC, scale=SCALE, denominator=len(emb), settings=settings
            ).loss  # fmt: skip

    def once() -> None:
        emb.grad = weight.grad = None
        loss().backward()

    return once


def products_alone(emb: Tensor, weight: Tensor, kind: torch.dtype) -> Callable[[], None]:
    """The three products, block by block, results unused."""
    block = min(LIMIT_BLOCK, len(weight))
    emb, rows = emb.to(kind), weight[:block].to(kind)
    share, unit, centre = emb.new_empty(len(emb), block), torch.empty_like(emb), torch.empty_like(rows)

    def once() -> None:
        for first in range(0, len(weight), block):
            size = min(block, len(weight) - first)
            part = share.view(-1)[: len(emb) * size].view(len(emb), size)
            torch.mm(emb, rows[:size].T, out=part)
            torch.mm(part, rows[:size], out=unit)
            torch.mm(part.T, emb, out=centre[:size])

    return once


def timed(once: Callable[[], None], steps: int, device: torch.device) -> float:
    """Median milliseconds, after two steps that are not counted; at least three, or as many as fit some seconds."""
    for _ in range(2):
        once()
    found: list[float] = []
    started = time.perf_counter()
    while len(found) < 3 or (len(found) < steps and time.perf_counter() - started < SECONDS_A_CELL):
        if device.type == "cpu":
            begin = time.perf_counter()
            once()
            found.append(1e3 * (time.perf_counter() - begin))
            continue
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        once()
        events[1].record()
        events[1].synchronize()
        found.append(events[0].elapsed_time(events[1]))
    return median(found)


def allocated(device: torch.device) -> int:
    """Bytes of tensors; the peak is counted from here."""
    if device.type == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak(device: torch.device) -> int:
    """The most bytes of tensors there were."""
    return 0 if device.type == "cpu" else torch.cuda.max_memory_allocated(device)


def print_row(classes: int, row: dict[str, dict[str, float] | None]) -> None:
    """One line of the table; - is what does not fit."""
    times = {way: cell["ms"] if cell else None for way, cell in row.items()}
    cells = [f"{value:.2f}" if value is not None else "-" for value in times.values()]
    for over in ("whole", "limit"):
        top, below = times[over], times["triton"]
        share = top / below if top is not None and below is not None else None
        cells.append("-" if share is None else f"{share:.2f}" if over == "whole" else f"{100 * share:.0f} %")
    for way in ("whole", "chunked", "triton"):
        cell = row[way]
        cells.append(f"{cell['extra_gb']:.2f}" if cell else "-")
    print(f"| {classes:,} | " + " | ".join(cells) + " |", flush=True)


def tune(arguments: argparse.Namespace, device: torch.device) -> None:
    """Times tilings, and the kernels of the default one."""
    from triton.runtime.errors import OutOfResources

    classes = 300 if arguments.rehearse else 1_000_000
    base = Tiling()
    changes: list[dict[str, Any]] = [
        {}, {"registers": 128}, {"registers": 168}, {"stages": 2}, {"stages": 4}, {"stages": 4, "depth_bytes": 64},
        {"warps": 4}, {"warps": 4, "images": 64}, {"warps": 4, "classes": 64}, {"classes": 256}, {"dim": 256},
        {"images": 256}, {"chunk_bytes": 1 << 25}, {"chunk_bytes": 1 << 26}, {"chunk_bytes": 1 << 28},
    ]  # fmt: skip
    for images in arguments.images:
        print(f"\nN = {images:,}, C = {classes:,}, D = {DIM}, products {arguments.products}\n")
        print("| tiling | ms |\n|---|---|")
        for change in changes[: 2 if arguments.rehearse else None]:
            try:
                cell = measured("triton", images, classes, arguments, device, dataclasses.replace(base, **change))
            except OutOfResources as error:
                print(f"| {change or 'default'} | {error} |", flush=True)
                continue
            print(f"| {change or 'default'} | {cell['ms']:.2f} |" if cell else f"| {change} | - |", flush=True)
        if device.type == "cuda":
            print_kernels(images, classes, arguments, device)


def print_kernels(images: int, classes: int, arguments: argparse.Namespace, device: torch.device) -> None:
    """Milliseconds of each kernel in one step."""
    emb, weight, labels = tensors(images, classes, device)
    with product_precision(arguments.products):
        once = step_of("triton", emb, weight, labels, arguments.products, None)
        once()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            once()
            torch.cuda.synchronize(device)
    print("\n| kernel | ms | launches |\n|---|---|---|")
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)
    for row in rows[:12]:
        print(f"| {row.key[:70]} | {row.self_device_time_total / 1e3:.2f} | {row.count} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
