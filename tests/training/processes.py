"""Starts processes as torchrun does: RANK, WORLD_SIZE, LOCAL_RANK and a free port in the environment."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def start(count: int, *command: str) -> list[subprocess.Popen[str]]:
    """`python COMMAND` in `count` processes of one group; one process gets no such environment at all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = []
    for rank in range(count):
        group = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        started.append(
            subprocess.Popen(
                [sys.executable, *command],
                env={**common, **(group if count > 1 else {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
        )
    return started


def finish(processes: list[subprocess.Popen[str]], *, seconds: float = 180) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; all are killed if one takes longer."""
    try:
        outputs = [p.communicate(timeout=seconds) for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


def run(count: int, *command: str, seconds: float = 180) -> list[tuple[int, str, str]]:
    """Starts and finishes; fails if any exit code is not 0."""
    results = finish(start(count, *command), seconds=seconds)
    for code, _, errors in results:
        assert code == 0, errors[-3000:]
    return results
