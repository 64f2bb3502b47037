"""Gives tests their processes by fork: `python -m tests.training.fork_server` imports torch once, then forks.

In: a JSON request a line: its number, processes, each with its environment and files for its output, and the command,
as behind `python`. Out: a JSON answer a line: the request's number and the exit codes. A fork begins where a fresh
process is after its imports, which take longer than most of what the tests let a process do. What tells a fork from a
fresh process (one hash seed for all ranks) is left to the tests that start fresh ones.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import sys
import time
import traceback
from typing import Any

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


def serve() -> None:
    """Answers requests until standard input ends."""
    for name in WARM:
        __import__(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be missing in the forks"
    parent = os.getppid()
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
        print(json.dumps([request["number"], codes]), flush=True)


def _fork(process: dict[str, Any], command: list[str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.clear()
        os.environ.update(process["environment"])
        inputs = os.open(os.devnull, os.O_RDONLY)
        outputs = [os.open(process[name], os.O_WRONLY | os.O_CREAT) for name in ("stdout", "stderr")]
        for target, source in enumerate((inputs, *outputs)):
            os.dup2(source, target)
        code = _run(command)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(command: list[str]) -> int:
    """The exit code of `python COMMAND`, for COMMAND `-m MODULE ARGUMENTS` or `-c CODE`."""
    kind, what, *arguments = command
    try:
        if kind == "-m":
            sys.argv = [what, *arguments]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.argv = ["-c", *arguments]
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    finally:
        atexit._run_exitfuncs()
    return 0


if __name__ == "__main__":
    serve()
