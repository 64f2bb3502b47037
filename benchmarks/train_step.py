"""Training IResNet-50 on one CPU core: ours against the plain way, stock and with a tuned allocator.

    python benchmarks/train_step.py [--batch 16] [--rounds 5] [--blocks 3 4 14 3] [--classes 1000]

A step is forward, backward and SGD with momentum on random 112 px crops; the head is cross-entropy over normalised
cosines in all ways alike. The plain way is torch's own layers in float32, contiguous; ours adds channels_last, bfloat16
autocast, the PReLU of visard/backbones/prelu.py, the float32 product that the start-up test chooses, and kept memory.
Each way is a process of its own with its own allocator settings; they take turns, step by step, on one core. Given are
the medians of the processor time of a step (which a busy neighbour disturbs least) and of the wall time. The floor is
what the multiply-adds alone (forward, and twice that backward) take at the best rate of a bfloat16 product on this core
in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

# What a user can put before any training command; glibc then keeps freed buffers instead of handing them back.
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**36), "MALLOC_TOP_PAD_": str(2**26)}

# name: (arithmetic, environment, whether the process tunes its own allocator as `visard train` does)
WAYS: dict[str, tuple[str, dict[str, str], bool]] = {
    "plain, stock allocator": ("plain", {}, False),
    "plain, tuned allocator": ("plain", TUNED, False),
    "ours, stock allocator": ("ours", {}, False),
    "ours": ("ours", {}, True),
}
PEER, OURS = "plain, tuned allocator", "ours"
AIM = 1.8


def main() -> int:
    """Prints a table and one line of JSON; exit code 1 if the aim is missed."""
    arguments = parsed(sys.argv[1:])
    if arguments.way:
        serve(arguments)
        return 0
    processes = {name: start(name) for name in WAYS}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    first_losses: list[float] = []
    try:
        for round_number in range(arguments.rounds + 1):
            # Every other round backwards, so that none always follows the same one.
            for name in list(WAYS)[:: 1 if round_number % 2 else -1]:
                measured = ask(processes[name])
                if round_number > 0:
                    times[name].append(measured)
                else:
                    first_losses.append(measured["loss"])
        floor_s = ask(processes[OURS], "floor")["seconds"]
        assert max(first_losses) < 1.05 * min(first_losses), f"the ways do not compute the same: {first_losses}"
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return 0 if report(arguments, times, floor_s) >= AIM else 1


def report(arguments: argparse.Namespace, times: dict[str, list[dict[str, float]]], floor_s: float) -> float:
    """Prints what was measured; gives the ratio of ours to the peer."""
    median = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in times.items()
    }
    print(f"{'':<24}{'img/s (cpu)':>12}{'img/s (wall)':>13}{'s a step':>10}{'page faults':>13}{'peak GB':>9}")
    for name, row in median.items():
        rates = f"{arguments.batch / row['cpu_s']:>12.2f}{arguments.batch / row['wall_s']:>13.2f}{row['cpu_s']:>10.2f}"
        print(f"{name:<24}{rates}{row['faults']:>13,.0f}{row['peak_gb']:>9.2f}")
    print(f"{'floor (bf16 products)':<24}{arguments.batch / floor_s:>12.2f}{'':>13}{floor_s:>10.2f}")
    pairs = zip(times[PEER], times[OURS], strict=True)
    ratio = statistics.median(peer["cpu_s"] / ours["cpu_s"] for peer, ours in pairs)
    print(f"ours / {PEER}: {ratio:.2f} (aim {AIM})")
    print(json.dumps({"ratio": ratio, "aim": AIM, "floor_s": floor_s, "batch": arguments.batch, "median": median}))
    return ratio


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The command line; --way is for the processes that this one starts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--blocks", type=int, nargs=4, default=(3, 4, 14, 3))
    parser.add_argument("--way", default="", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def start(name: str) -> subprocess.Popen[str]:
    """A process that trains in that way whenever it is asked."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    environment |= {"OMP_NUM_THREADS": "1", **WAYS[name][1]}
    command = [sys.executable, __file__, *sys.argv[1:], "--way", name]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(process: subprocess.Popen[str], what: str = "step") -> dict[str, float]:
    """One answer of the process."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(what + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise SystemExit("a measuring process ended; its error is above")
    values: dict[str, float] = json.loads(answer)
    return values


def serve(arguments: argparse.Namespace) -> None:
    """Does a step for every line on standard input, and answers with its times."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    step = prepared(arguments)
    for line in sys.stdin:
        if line.strip() == "floor":
            print(json.dumps({"seconds": floor_seconds(arguments)}), flush=True)
            continue
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        answer = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall, "loss": loss}
        usage = resource.getrusage(resource.RUSAGE_SELF)
        answer |= {"faults": usage.ru_minflt - faults, "peak_gb": usage.ru_maxrss / 1e6}
        print(json.dumps(answer), flush=True)


def prepared(arguments: argparse.Namespace) -> Callable[[], float]:
    """The training step of one way; gives its loss."""
    import torch
    from torch.nn import functional as F  # noqa: N812

    from visard.backbones import build
    from visard.config import IResNetConfig
    from visard.device import choose_float32_matmul, keep_freed_memory

    arithmetic, _, tunes_allocator = WAYS[arguments.way]
    if tunes_allocator:
        keep_freed_memory()
    ours = arithmetic == "ours"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = build(IResNetConfig(blocks=tuple(arguments.blocks)))
    centres = torch.nn.Parameter(torch.randn(arguments.classes, 512) * 0.01)
    images = torch.randn(arguments.batch, 3, 112, 112)
    labels = torch.randint(0, arguments.classes, (arguments.batch,))
    if ours:
        torch.set_float32_matmul_precision(choose_float32_matmul())
        network.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    else:
        for part in list(network.modules()):
            for name, child in part.named_children():
                if isinstance(child, torch.nn.PReLU):
                    setattr(part, name, torch.nn.PReLU(child.num_parameters))
    weights = [p for p in [*network.parameters(), centres] if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.01, momentum=0.9, weight_decay=5e-4)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=ours):
            embeddings = network(images)
        cosines = F.linear(F.normalize(embeddings), F.normalize(centres))
        loss = F.cross_entropy(64 * cosines, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def floor_seconds(arguments: argparse.Namespace) -> float:
    """Three times the network's multiply-adds at the bfloat16 rate of a large product that stays in the cache."""
    import torch

    from visard.backbones import build
    from visard.config import IResNetConfig
    from visard.deploy.macs import count_macs

    with torch.device("meta"):
        macs = count_macs(build(IResNetConfig(blocks=tuple(arguments.blocks))), 112)
    side = 512
    left, right = (torch.randn(side, side).bfloat16() for _ in range(2))
    seconds = []
    for _ in range(50):
        started = time.process_time()
        left @ right
        seconds.append(time.process_time() - started)
    return 3 * macs * arguments.batch * min(seconds) / side**3


if __name__ == "__main__":
    sys.exit(main())
