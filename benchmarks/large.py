"""What a large network's settings cost and save on a CPU: memory above the weights, and images a second, on and off.

    python benchmarks/large.py [--blocks 3 13 40 3] [--width 20] [--images 16] [--steps 4] [--threads 2]
                               [--only NAME ...]

A deep, narrow IResNet (the 59 blocks of ResNet-120 at 56 px) is trained by the trainer's own parts: `build_parts`,
`numerics`, `train_step`. Each setting is a process of its own, or two of them (gloo, half the images and half the
threads each): gradient checkpointing, micro-batches, bfloat16, all of these, ZeRO's stages, and the type in which
gradients are summed. Settings of one process are compared with `plain`, those of two with `2 processes`.

    memory     the most that was resident during the steps, less what was before the network was built (after one step
               of a tiny network, which loads the libraries' code), less the bytes of the whole network and its class
               centres: activations, gradients, momentum, buffers. Of the process that needed most. ZeRO 3 holds half
               of the weights, and ends lower by the other half.
    planned    the same by `visard plan`, which counts tensors: what kernels and the allocator take comes on top.
    images/s   over all processes; the median step of those after the first.

Needs Linux's /proc. The first losses are compared as well: a setting that changed them would not be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from visard.config import (
    DataConfig,
    HeadConfig,
    IResNetConfig,
    MarginConfig,
    OptimConfig,
    Recipe,
    RunConfig,
    ScheduleConfig,
)

MIB = 2**20
SIZE, CLASSES = 56, 1000


class Setting(NamedTuple):
    """Fields of `RunConfig`, the number of processes, and the setting that it is compared with."""

    run: dict[str, Any]
    processes: int = 1
    peer: str = "plain"


TWO = "2 processes"
SETTINGS: dict[str, Setting] = {
    "plain": Setting({}),
    "checkpointing stage": Setting({"checkpointing": "stage"}),
    "checkpointing segment": Setting({"checkpointing": "segment"}),
    "checkpointing block": Setting({"checkpointing": "block"}),
    "2 micro-batches": Setting({"micro_batches": 2}),
    "4 micro-batches": Setting({"micro_batches": 4}),
    "bf16": Setting({"precision": "bf16"}),
    "bf16, segment, 2 micro-batches": Setting({"precision": "bf16", "checkpointing": "segment", "micro_batches": 2}),
    TWO: Setting({}, 2, TWO),
    "ZeRO 1": Setting({"zero": 1}, 2, TWO),
    "ZeRO 2": Setting({"zero": 2}, 2, TWO),
    "ZeRO 3": Setting({"zero": 3}, 2, TWO),
    "ZeRO 3, segment": Setting({"zero": 3, "checkpointing": "segment"}, 2, TWO),
    "gradients summed in bf16": Setting({"gradient_dtype": "bf16"}, 2, TWO),
}


@dataclass(frozen=True)
class RandomCrops:
    """A data set of noise: images of the training's own size cost no rendering and no memory worth counting."""

    count: int
    size: int = SIZE
    identities: tuple[str, ...] = tuple(f"p{number}" for number in range(CLASSES))

    @property
    def ids(self) -> list[str]:
        return [str(index) for index in range(self.count)]

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.arange(self.count, dtype=np.int64) % CLASSES

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> NDArray[np.uint8]:
        return np.random.default_rng(index).integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)

    def points(self, index: int) -> None:
        return None


def main() -> int:
    """Prints the table row by row, and one line of JSON."""
    arguments = parsed(sys.argv[1:])
    if arguments.serve:
        serve(arguments)
        return 0
    if not Path("/proc/self/clear_refs").exists():
        print("benchmarks/large.py reads the peak of resident memory from Linux's /proc", file=sys.stderr)
        return 2
    chosen = {name: setting for name, setting in SETTINGS.items() if not arguments.only or name in arguments.only}
    plans = Plans(arguments)
    print("| setting | processes | memory MiB | to its peer | planned MiB | images/s | to its peer |")
    print("|---|---|---|---|---|---|---|", flush=True)
    rows: dict[str, dict[str, float]] = {}
    for name, setting in chosen.items():
        answers = measured(arguments, name, setting.processes)
        row = {key: max(answer[key] for answer in answers) for key in ("memory", "seconds")}
        row |= {"loss": answers[0]["loss"], "images_per_second": arguments.images / row["seconds"]}
        row["planned"] = plans.above_weights(setting)
        rows[name] = row
        peer = rows.get(setting.peer, row)
        assert abs(row["loss"] / peer["loss"] - 1) < 0.1, f"{name} computes another loss: {row['loss']}, {peer['loss']}"
        ratios = row["memory"] / peer["memory"], row["images_per_second"] / peer["images_per_second"]
        print(
            f"| {name} | {setting.processes} | {row['memory'] / MIB:.0f} | {ratios[0]:.2f} "
            f"| {row['planned'] / MIB:.0f} | {row['images_per_second']:.1f} | {ratios[1]:.2f} |",
            flush=True,
        )
    shape = {name: getattr(arguments, name) for name in ("blocks", "width", "images", "steps", "threads")}
    print(json.dumps({**shape, "size": SIZE, "classes": CLASSES, "settings": rows}))
    return 0


def parsed(words: list[str]) -> argparse.Namespace:
    """The command line; --serve is for the processes that this one starts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--blocks", type=int, nargs=4, default=(3, 13, 40, 3))
    parser.add_argument("--width", type=int, default=20)
    parser.add_argument("--images", type=int, default=16, help="of a step, over all processes")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2, help="over all processes")
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=[])
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def recipe_of(arguments: argparse.Namespace, setting: Setting) -> Recipe:
    """CosFace on the deep network; float32 products are not chosen by a measurement, which noise could turn."""
    return Recipe(
        name="large",
        data=DataConfig(source="noise", size=SIZE),
        backbone=IResNetConfig(blocks=tuple(arguments.blocks), width=arguments.width, input_size=SIZE, init="depth"),
        head=HeadConfig(margin=MarginConfig(m1=1.0, m2=0.0, m3=0.4, scale=64.0), classes="sharded"),
        optim=OptimConfig(lr=0.01),
        schedule=ScheduleConfig(kind="constant", max_steps=arguments.steps + 1),
        run=RunConfig(batch_global=arguments.images, device="cpu", float32_matmul="highest", **setting.run),
    )


class Plans:
    """What `visard plan` says of each setting; a network is counted once for each way to compute it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.networks: dict[tuple[str, str], Any] = {}

    def above_weights(self, setting: Setting) -> int:
        """Bytes of a process at the plan's peak, less the whole network and this process's class centres."""
        from visard.training.plan import Layout, count_network, plan

        recipe = recipe_of(self.arguments, setting)
        key = (recipe.run.checkpointing, recipe.run.precision)
        if key not in self.networks:
            self.networks[key] = count_network(recipe.backbone, *key)
        each = -(-self.arguments.images // setting.processes)
        layout = Layout(devices=setting.processes, batch=each, zero=recipe.run.zero, kind="cpu")
        found = plan(recipe, CLASSES, self.networks[key], layout)
        return found.peak - self.networks[key].parameters - found.classifier.weight


def measured(arguments: argparse.Namespace, name: str, processes: int) -> list[dict[str, float]]:
    """What each process of a setting answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(processes):
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(arguments.threads // processes, 1))}
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, __file__, *sys.argv[1:], "--serve", name]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        spoken = [process.communicate()[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    if any(process.returncode for process in started):
        raise SystemExit(f"{name}: a measuring process ended; its error is above")
    return [json.loads(text) for text in spoken]


def serve(arguments: argparse.Namespace) -> None:
    """Trains in one setting, and prints what it took."""
    import torch

    from visard import dist
    from visard.training.loop import process_device

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    recipe = recipe_of(arguments, SETTINGS[arguments.serve])
    device = process_device(recipe)
    dist.init(device)
    try:
        warm_up(recipe, device)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what it is now
        loss, seconds, weights = trained(recipe, device, steps=1 + arguments.steps)
        memory = resident("VmHWM") - before - weights
    finally:
        dist.close()
    print(json.dumps({"loss": loss, "seconds": statistics.median(seconds[1:]), "memory": memory}))


def warm_up(recipe: Recipe, device: Any) -> None:
    """A step of a tiny network: what libraries load and set up for themselves is not the network's memory."""
    import ctypes
    import gc

    from visard import dist

    tiny = replace(recipe.backbone, blocks=(1, 1, 1, 1), width=16, embedding_dim=16)
    least = 2 * dist.world_size() * recipe.run.micro_batches
    trained(replace(recipe, backbone=tiny, run=replace(recipe.run, batch_global=least)), device, steps=1)
    gc.collect()
    # `process_device` makes glibc keep what was freed; of the tiny network that would count for nothing later.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def resident(name: str) -> int:
    """Bytes of this process: VmRSS, what is resident now; VmHWM, the most there was."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def trained(recipe: Recipe, device: Any, steps: int) -> tuple[float, list[float], int]:
    """The first loss, the seconds of each step, and the bytes of the whole network with this process's centres."""
    import torch

    from visard.backbones import build
    from visard.training.batch_norm import train_mode
    from visard.training.build import build_parts, numerics
    from visard.training.memory import bytes_of
    from visard.training.step import train_step

    with torch.device("meta"):
        whole = build(recipe.backbone)
    weights = sum(tensor.nbytes for tensor in (*whole.parameters(), *whole.buffers()))
    parts = build_parts(recipe, RandomCrops(steps * recipe.run.batch_global), device)
    weights += bytes_of(parts.state.head.parameters())
    losses, seconds = [], []
    with ExitStack() as stack:
        stack.enter_context(numerics(recipe, parts.state.float32_matmul))
        train_mode(parts.model, freeze_bn=False)
        parts.state.head.train()
        for _, batch in zip(range(steps), parts.loader, strict=False):
            started = time.perf_counter()
            numbers = train_step(parts, batch, recipe.optim.lr)
            losses.append(numbers.logs["loss"].item())
            seconds.append(time.perf_counter() - started)
            parts.state.step += 1
    assert len(losses) == steps, (len(losses), steps)
    return losses[0], seconds, weights


if __name__ == "__main__":
    sys.exit(main())
