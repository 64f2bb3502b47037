"""Gives tests their processes by fork: `python -m tests.training.fork_server` imports torch once, then forks.

In: a JSON request a line: processes, each with its environment and files for its output, and the command, as behind
`python`. Out: a JSON answer a line: the exit codes, null for what took too long and was killed. A fork begins where a
fresh process is after its imports, which take longer than most of what the tests let a process do, and ends as a fresh
one does: the interpreter joins its threads, calls what is registered for the exit and takes itself down.

What a fork does not show: an import that is missing, what is read from the environment while importing, and its own
hash seed. `processes` has two servers, so that ranks 0 and 1 have two; tests of the start itself take fresh processes.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import sys
import time
from typing import Any

import numpy as np

WARM = (
    "cv2",
    "torch.distributed.checkpoint",
    "torch.distributed.optim",
    "tests.training.conftest",
    "visard.heads.sharded",
    "visard.training.build",
    "visard.training.loop",
    "visard.training.teacher",
)
_PR_SET_PDEATHSIG = 1


def serve(parent: int) -> None:
    """Answers requests until standard input ends, or the process that asks has gone."""
    for name in WARM:
        __import__(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be missing in the forks"
    for line in sys.stdin:
        request = json.loads(line)
        running = {_fork(one, request["command"]): rank for rank, one in enumerate(request["processes"])}
        codes: list[int | None] = [None] * len(running)
        until = time.monotonic() + request["seconds"]
        while running and time.monotonic() < until and os.getppid() == parent:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.005)
        for pid in running:  # too slow
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        print(json.dumps(codes), flush=True)


def _fork(process: dict[str, Any], command: list[str]) -> int:
    """The fork's pid; in the fork it does not return, but leaves as the command does."""
    server = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    # However the server ends, by a signal or for want of memory, its forks end with it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:
        os._exit(1)
    os.environ.clear()
    os.environ.update(process["environment"])
    inputs = os.open(os.devnull, os.O_RDONLY)
    outputs = [os.open(process[name], os.O_WRONLY | os.O_CREAT) for name in ("stdout", "stderr")]
    for target, source in enumerate((inputs, *outputs)):
        os.dup2(source, target)
    np.random.seed()  # of a fresh process it is its own; Python's module does so by itself
    kind, what, *arguments = command
    if kind == "-m":
        sys.argv = [what, *arguments]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *arguments]
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    raise SystemExit


if __name__ == "__main__":
    serve(int(sys.argv[1]))
