"""Starts processes as torchrun does: RANK, WORLD_SIZE, LOCAL_RANK and a free port in the environment.

`start` and `finish` have fresh processes, to be sent signals; `run` has forks of two that have imported everything
(`fork_server`), unless fresh ones are asked for.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FORKS = sys.platform == "linux"


def start(count: int, *command: str) -> list[subprocess.Popen[str]]:
    """`python COMMAND` in `count` processes of one group; one process gets no such environment at all."""
    started = [
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
    for process in started:
        atexit.register(process.kill)  # for a test that fails before it finishes them
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
    shares = [slice(first, count, SERVERS) for first in range(min(count, SERVERS))]
    codes: list[int | None] = [None] * count
    with tempfile.TemporaryDirectory() as folder:
        files = [{name: f"{folder}/{rank}.{name}" for name in ("stdout", "stderr")} for rank in range(count)]
        started = [{"environment": e, **f} for e, f in zip(_environments(count), files, strict=True)]
        try:
            for number, share in enumerate(shares):
                _server(number).ask({"processes": started[share], "command": command, "seconds": seconds})
            for number, share in enumerate(shares):
                codes[share] = _server(number).answer()
        except BaseException:  # a test that is stopped: its forks end with the servers, the next test has new ones
            _stop()
            raise
        said = [[Path(f[name]).read_text() for name in ("stdout", "stderr")] for f in files]
    results = [(code, out, errors) for code, (out, errors) in zip(codes, said, strict=True) if code is not None]
    assert len(results) == count, f"exit codes {codes} after {seconds} s\n" + "\n".join(e[-3000:] for _, e in said)
    return results


class _Server:
    """A process of `fork_server`; its own errors are kept, to be told when it ends."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `stop`)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.fork_server", str(os.getpid())],
            env=_environments(1)[0],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
        )

    def ask(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # of a server that has ended; the missing answer tells why
            print(json.dumps(request), file=self._process.stdin, flush=True)

    def answer(self) -> list[int | None]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise AssertionError(f"the server of forks has ended: {self._errors.read()[-3000:]}")
        codes: list[int | None] = json.loads(line)
        return codes

    def stop(self) -> None:
        self._process.kill()
        with suppress(BrokenPipeError):
            self._process.communicate()
        self._errors.close()


SERVERS = 2
"""Ranks 0 and 1 are forks of two: what depends on the order of a set differs between them, as between fresh ones."""
_SERVERS: list[_Server] = []


def _server(number: int) -> _Server:
    """Started when first asked for; they end with these tests."""
    while len(_SERVERS) <= number:
        _SERVERS.append(_Server())
    return _SERVERS[number]


@atexit.register
def _stop() -> None:
    while _SERVERS:
        _SERVERS.pop().stop()


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
