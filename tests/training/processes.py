"""Starts processes as torchrun does: RANK, WORLD_SIZE, LOCAL_RANK and a free port in the environment.

`start` and `finish` have fresh processes, to be sent signals; `run` has forks of one that has imported everything
(`fork_server`), unless fresh ones are asked for.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FORKS = sys.platform == "linux"
_NUMBERS = itertools.count()


def start(count: int, *command: str) -> list[subprocess.Popen[str]]:
    """`python COMMAND` in `count` processes of one group; one process gets no such environment at all."""
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for environment in _environments(count)
    ]


def finish(processes: list[subprocess.Popen[str]], *, seconds: float = 180) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; all are killed if one takes longer."""
    try:
        outputs = [p.communicate(timeout=seconds) for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


def run(count: int, *command: str, seconds: float = 180, fresh: bool = not FORKS) -> list[tuple[int, str, str]]:
    """Starts and finishes; fails if any exit code is not 0."""
    answers = results(count, *command, seconds=seconds, fresh=fresh)
    for code, _, errors in answers:
        assert code == 0, errors[-3000:]
    return answers


def results(count: int, *command: str, seconds: float = 180, fresh: bool = not FORKS) -> list[tuple[int, str, str]]:
    """As `run`, whatever the exit codes are."""
    return finish(start(count, *command), seconds=seconds) if fresh else _forked(count, command, seconds)


def _forked(count: int, command: tuple[str, ...], seconds: float) -> list[tuple[int, str, str]]:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        files = [{name: f"{folder}/{rank}.{name}" for name in ("stdout", "stderr")} for rank in range(count)]
        started = [{"environment": e, **f} for e, f in zip(_environments(count), files, strict=True)]
        number = next(_NUMBERS)
        request = {"number": number, "processes": started, "command": command, "seconds": seconds}
        print(json.dumps(request), file=server.stdin, flush=True)
        answered, codes = -1, []
        while answered != number:  # a test that was stopped has left its answer
            answer = server.stdout.readline()
            assert answer, f"the server of forks has ended: {server.wait()}"
            answered, codes = json.loads(answer)
        if None in codes:
            raise subprocess.TimeoutExpired(list(command), seconds)
        said = [[Path(f[name]).read_text() for name in ("stdout", "stderr")] for f in files]
    return [(code, out, errors) for code, (out, errors) in zip(codes, said, strict=True)]


@lru_cache(maxsize=1)
def _server() -> subprocess.Popen[str]:
    """Started once; it ends with these tests."""
    command = [sys.executable, "-m", "tests.training.fork_server"]
    (environment,) = _environments(1)
    server = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    atexit.register(server.communicate)  # closes its input
    return server


def _environments(count: int) -> list[dict[str, str]]:
    """Of each process of a group; one process gets nothing of a group."""
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if count == 1:
        return [common]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**common, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
