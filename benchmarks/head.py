"""The classifier: time and memory of a step beside PartialFC_V2's way, plain autograd, and the matrix products alone.

In: nothing. Out: a Markdown table a job, and JSON as the last line.

    python benchmarks/head.py                    all jobs, about ten minutes, up to 19 GB for the peers
    python benchmarks/head.py --job many         one of: many, wide, sampled, step
    python benchmarks/head.py --scale 0.1        a tenth of the classes, for a look

Every measurement is a process of its own (an allocator's habits last as long as its process), one thread, all on one
core, one after the other in turn. Times are of the processor, medians over steps after a first one; memory is the
largest resident size of the process less that before the first step, when the weights are there: above the weights.
The peers:

- PartialFC_V2 restated from its published algorithm: normalised copies of embeddings and weights, the whole logits,
  clamped, CosFace's margin in place, times the scale, a softmax in place, an explicit gradient with the targets as a
  dense matrix; with sampling a copy of the sampled rows, whose gradient autograd scatters into all rows.
- plain autograd: normalise, linear, margin, torch.nn.functional.cross_entropy.

"stock" is how a script of theirs runs; "tuned" has glibc keep freed memory (MALLOC_MMAP_THRESHOLD_,
MALLOC_TRIM_THRESHOLD_), in pages of 2 MB (glibc.malloc.hugetlb), and float32 products by oneDNN
(`set_float32_matmul_precision("medium")`, where that stays float32 here: tried first). Ours keeps freed memory as
`visard train` does, has centres in pages of 2 MB as its heads do, and takes the same float32 products. The
floor is the products alone, 3 x 2 N C D
in the type named, in blocks that fit the cache.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

DIM, SCALE, MARGIN = 512, 64.0, 0.4
JOBS = {
    "many": {"images": 128, "classes": 1_000_000, "rate": 1.0},
    "wide": {"images": 512, "classes": 100_000, "rate": 1.0},
    "sampled": {"images": 128, "classes": 1_000_000, "rate": 0.1},
    "step": {"images": 0, "classes": 1_000_000, "rate": 0.1},
}
WAYS = {
    "many": ["PartialFC stock", "PartialFC tuned", "visard fp32", "visard bf16", "floor fp32", "floor bf16"],
    "wide": [
        "PartialFC stock", "PartialFC tuned", "autograd tuned",
        "visard fp32", "visard bf16", "floor fp32", "floor bf16",
    ],
    "sampled": ["PartialFC stock", "PartialFC tuned", "visard fp32", "visard bf16", "floor fp32", "floor bf16"],
    "step": ["SGD stock", "SGD fused", "visard rows", "floor rows"],
}  # fmt: skip
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": "68719476736",
    "MALLOC_TRIM_THRESHOLD_": "68719476736",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
TITLES = {
    "many": "Forward and backward",
    "wide": "Forward and backward",
    "sampled": "Forward and backward with a sample of 10 %",
    "step": "Optimizer step of 10 % of the rows",
}


def main() -> None:
    """Runs the jobs and prints their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=list(JOBS), action="append", help="which (default: all)")
    parser.add_argument("--scale", type=float, default=1.0, help="part of the classes")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a process")
    parser.add_argument("--rounds", type=int, default=1, help="processes a way, in turn")
    parser.add_argument("--core", type=int, default=0, help="the core that all run on")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child, arguments.scale, arguments.steps)))
        return
    found: dict[str, dict[str, Any]] = {}
    for job in arguments.job or JOBS:
        found[job] = {way: {"seconds": [], "bytes": []} for way in WAYS[job]}
        for _ in range(arguments.rounds):
            for way in WAYS[job]:
                one = run_child(job, way, arguments)
                found[job][way]["seconds"] += one["seconds"]
                found[job][way]["bytes"].append(one["bytes"])
                print(f"  {job}, {way}: {one['seconds']} s, {one['bytes'] / 1e9:.2f} GB", file=sys.stderr, flush=True)
        print_table(job, found[job], arguments.scale)
    print(json.dumps({"torch": torch.__version__, "scale": arguments.scale, "jobs": found}))


def run_child(job: str, way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures one way in a process of its own, on the one core."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(TUNED if "tuned" in way else {})}
    command = [sys.executable, __file__, "--child", job, way, "--scale", str(arguments.scale)]
    command += ["--steps", str(arguments.steps), "--core", str(arguments.core)]
    pin = functools.partial(os.sched_setaffinity, 0, {arguments.core})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, preexec_fn=pin, check=False)
    if done.returncode:
        raise SystemExit(f"{job}, {way} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def print_table(job: str, found: dict[str, Any], scale: float) -> None:
    """A Markdown table with ratios to the first way."""
    shape = JOBS[job]
    classes = int(shape["classes"] * scale)
    where = f"C {classes:,}, D {DIM}" + (f", N {shape['images']}" if shape["images"] else "")
    first = median(found[WAYS[job][0]]["seconds"])
    print(f"\n{TITLES[job]}: {where}\n")
    print(f"| way | s a step (least to most) | {WAYS[job][0]} / this | GB above the weights |")
    print("|---|---|---|---|")
    for way, values in found.items():
        seconds, size = values["seconds"], max(values["bytes"])
        spread = f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        memory = "" if way.startswith("floor") else f"{size / 1e9:.2f}"
        print(f"| {way} | {spread} | {first / median(seconds):.1f} | {memory} |")
    print(flush=True)


def measure(job: str, way: str, scale: float, steps: int) -> dict[str, Any]:
    """Seconds of every step after the first, and bytes above the weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = JOBS[job]
    classes, rate, images = int(shape["classes"] * scale), shape["rate"], int(shape["images"])
    if "stock" not in way:
        torch.set_float32_matmul_precision("medium")
        assert relative_error() < 1e-6, (
            "medium float32 products are not float32 on this CPU: the comparison says nothing"
        )
    if way.startswith("visard"):
        from visard.device import keep_freed_memory

        keep_freed_memory()
    maker = make_step if job == "step" else make_head
    before, once = maker(way, images, classes, rate)
    seconds = []
    for _ in range(steps + 1):
        started = time.process_time()
        once()
        seconds.append(round(time.process_time() - started, 4))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds[1:], "bytes": max(0, peak - before)}


def relative_error() -> float:
    """Of a float32 product as it is set now, against float64: 4e-7 for float32, 4e-3 for bf16."""
    left, right = torch.randn(256, DIM), torch.randn(DIM, 256)
    truth = left.double() @ right.double()
    return float(((left @ right).double() - truth).norm() / truth.norm())


def make_head(way: str, images: int, classes: int, rate: float) -> tuple[int, Callable[[], None]]:
    """Resident bytes with the weights there, and what makes one forward and backward pass."""
    weight = torch.empty(classes, DIM)
    if way.startswith("visard"):
        from visard.device import ask_for_large_pages

        ask_for_large_pages(weight)  # as `new_centres` does
    weight.normal_(0.0, 0.01)
    emb = torch.randn(images, DIM)
    labels = torch.randint(classes, (images,))
    sample = max(images, int(rate * classes))
    if way.startswith("visard"):
        return resident(), visard_step(weight, emb, labels, rate, bf16=way.endswith("bf16"))
    if way.startswith("floor"):
        return resident(), products(weight[:sample], emb, bf16=way.endswith("bf16"))
    parameter, emb = nn.Parameter(weight), emb.requires_grad_()

    def partial_fc() -> None:
        parameter.grad = emb.grad = None
        rows, target = parameter, labels
        if rate < 1:
            index, target = draw(classes, sample, labels)
            rows = parameter[index]
        logits = functional.linear(functional.normalize(emb), functional.normalize(rows)).clamp(-1, 1)
        InPlaceSoftmax.apply(cosface(logits, target), target).backward()  # type: ignore[no-untyped-call]

    def autograd() -> None:
        parameter.grad = emb.grad = None
        cosines = functional.linear(functional.normalize(emb), functional.normalize(parameter))
        margin = torch.full((images, 1), -MARGIN)
        functional.cross_entropy(SCALE * cosines.scatter_add(1, labels.unsqueeze(1), margin), labels).backward()

    return resident(), autograd if way.startswith("autograd") else partial_fc


def cosface(cosines: Tensor, labels: Tensor) -> Tensor:
    """The peer's margin: off the target's cosine in place, then all times the scale, in new memory."""
    cosines[torch.arange(len(labels)), labels] -= MARGIN
    return cosines * SCALE


class InPlaceSoftmax(torch.autograd.Function):
    """The peer's loss: the softmax in the logits' own memory; its gradient with the targets as a dense matrix."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        logits.sub_(logits.amax(1, keepdim=True)).exp_()
        logits.div_(logits.sum(1, keepdim=True))
        ctx.save_for_backward(logits, labels)
        return logits.gather(1, labels.unsqueeze(1)).clamp_min(1e-30).log_().mean().neg()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        probabilities, labels = ctx.saved_tensors
        targets = torch.zeros_like(probabilities).scatter_(1, labels.unsqueeze(1), 1.0)
        probabilities[torch.arange(len(labels))] -= targets  # theirs leaves out the images of other processes' classes
        return probabilities.div_(len(labels)) * grad.item(), None


def draw(classes: int, sample: int, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The peer's sample: the largest of random numbers, raised for the labels' classes; and labels among it."""
    numbers = torch.rand(classes)
    numbers[labels.unique()] = 2.0
    index = numbers.topk(sample).indices.sort().values
    return index, torch.searchsorted(index, labels)


def visard_step(weight: Tensor, emb: Tensor, labels: Tensor, rate: float, *, bf16: bool) -> Callable[[], None]:
    """The sharded head on one process, from the embeddings to their gradient and the rows'."""
    from visard.config import HeadConfig, MarginConfig
    from visard.heads.sharded import ShardedHead
    from visard.records import Batch

    margin = MarginConfig(m2=0.0, m3=MARGIN, scale=SCALE)
    config = HeadConfig(classes="sharded", sample_rate=rate, margin=margin, products="bf16" if bf16 else "fp32")
    head = ShardedHead(2, DIM, config)
    head.num_classes, head.rows, head.weight = len(weight), range(len(weight)), nn.Parameter(weight)
    count = len(labels)
    batch = Batch(torch.zeros(count, 1, 1, 3), labels, tuple(map(str, range(count))), torch.zeros(count))

    def once() -> None:
        leaf = emb.detach().requires_grad_()
        head.begin_step(images_global=count, labels=labels)
        head(leaf, batch)[0].backward()
        head.row_gradients()

    return once


def products(weight: Tensor, emb: Tensor, *, bf16: bool) -> Callable[[], None]:
    """What no way can do without: logits, embedding gradient, centre gradient, block by block, results unused."""
    kind = torch.bfloat16 if bf16 else torch.float32
    block = 2048 if len(emb) <= 128 else 512
    emb, rows = emb.to(kind), weight[:block].to(kind)
    logits, unit, centre = torch.empty(len(emb), block, dtype=kind), torch.empty_like(emb), torch.empty_like(rows)

    def once() -> None:
        for _ in range(-(-len(weight) // block)):
            torch.mm(emb, rows.T, out=logits)
            torch.mm(logits, rows, out=unit)
            torch.mm(logits.T, emb, out=centre)

    return once


def make_step(way: str, images: int, classes: int, rate: float) -> tuple[int, Callable[[], None]]:
    """Resident bytes with weights and momentum there, and what moves the sampled rows once."""
    rows = torch.randperm(classes)[: int(rate * classes)].sort().values
    gradient = torch.randn(len(rows), DIM)
    parameter = nn.Parameter(torch.empty(classes, DIM).normal_(0.0, 0.01))
    if way.startswith("floor"):
        pair = torch.empty(2, len(rows), DIM)
        return resident(), lambda: torch.mul(pair, 0.9, out=pair)  # read and write as much as parameter and momentum
    if way.startswith("visard"):
        from visard.config import OptimConfig
        from visard.records import RowGrad
        from visard.training.rows import step_rows
        from visard.training.rules import RowStep, SgdRule

        state = {"momentum": torch.zeros_like(parameter).add_(0.0)}
        rule = SgdRule(OptimConfig(momentum=0.9, weight_decay=5e-4))
        step = RowStep(lr=0.1, divisor=torch.tensor(1.0), skip=torch.tensor(0.0))
        return resident(), lambda: step_rows(parameter.data, state, RowGrad(rows, gradient), rule, step)
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, weight_decay=5e-4, fused="fused" in way or None)
    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter).add_(0.0)

    def dense() -> None:
        # What autograd makes of the gradient of `weight[rows]`.
        parameter.grad = torch.zeros_like(parameter).index_put_((rows,), gradient, accumulate=True)
        optimizer.step()

    return resident(), dense


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
