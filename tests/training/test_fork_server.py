"""Processes by fork behave as fresh ones do, and none outlives who asked for it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.signals import children, listen_to_ctrl_c
from tests.training import processes

pytestmark = pytest.mark.skipif(not processes.FORKS, reason="tests fork processes on Linux alone")

ENDS = {
    "nothing": "print('said')",
    "exit code": "import sys; sys.exit(3)",
    "reason": "import sys; sys.exit('a reason')",
    "exception": "raise ValueError('lost')",
    "signal": "import os; os.kill(os.getpid(), 11)",
    "at exit": "import atexit, os; atexit.register(os._exit, 7)",
    "thread": "import os, threading, time; threading.Thread(target=lambda: (time.sleep(0.2), os._exit(5))).start()",
}


@pytest.mark.parametrize("code", ENDS.values(), ids=ENDS)
def test_a_fork_ends_as_a_fresh_process_does(code: str) -> None:
    """Exit codes and output; what is registered for the exit runs, threads are waited for."""
    ((forked, *said),) = processes.results(1, "-c", code)
    ((fresh, *expected),) = processes.results(1, "-c", code, fresh=True)
    assert forked == fresh
    assert said[0] == expected[0]
    assert said[1].splitlines()[-1:] == expected[1].splitlines()[-1:]


def test_a_fork_has_the_environment_of_its_test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os; print(os.environ.get('VISARD_TESTED'), os.environ.get('RANK')); os.environ['VISARD_TESTED'] = 'x'"
    )
    monkeypatch.setenv("VISARD_TESTED", "here")
    assert [said for _, said, _ in processes.run(2, "-c", code)] == ["here 0\n", "here 1\n"]
    monkeypatch.delenv("VISARD_TESTED")
    assert [said for _, said, _ in processes.run(1, "-c", code)] == ["None None\n"]


def test_ranks_share_no_accident() -> None:
    """Neither numpy's own random numbers nor the order of sets are the same in two ranks, as in fresh processes."""
    code = "import numpy; print(numpy.random.random(), hash('rank'))"
    first, second, *later = [said.split() for _, said, _ in processes.run(4, "-c", code)]
    assert first[1] != second[1]
    assert len({numbers[0] for numbers in (first, second, *later)}) == 4


def test_what_takes_too_long_is_killed_and_told(tmp_path: Path) -> None:
    code = "import os, sys, time; print('stuck', file=sys.stderr); os.mkdir(sys.argv[1] + str(os.getpid()))"
    with pytest.raises(AssertionError, match=r"exit codes \[None, None\] after 3 s\nstuck"):
        processes.run(2, "-c", f"{code}; time.sleep(60)", f"{tmp_path}/", seconds=3)
    assert len(list(tmp_path.iterdir())) == 2
    assert not any(_lives(int(path.name)) for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["SIGKILL", pytest.param("SIGTERM", marks=pytest.mark.slow), pytest.param("SIGINT", marks=pytest.mark.slow)]
)
def test_nothing_is_left_of_tests_that_are_stopped(name: str) -> None:
    """Whatever ends the tests, the servers and their forks end too."""
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    tests = subprocess.Popen(
        [sys.executable, "-c", f"from tests.training import processes; processes.run(2, '-c', {code!r}, seconds=50)"],
        cwd=processes.ROOT,
        stderr=subprocess.DEVNULL,
        preexec_fn=listen_to_ctrl_c,
    )
    try:
        servers = _wait(lambda: children(tests.pid), count=processes.SERVERS)
        forks = _wait(lambda: [pid for server in servers for pid in children(server)], count=2)
    finally:
        tests.send_signal(signal.Signals[name])
        tests.wait(20)
    until = time.monotonic() + 20
    while any(_lives(pid) for pid in (*servers, *forks)):
        assert time.monotonic() < until
        time.sleep(0.02)


def _wait(found: Callable[[], list[int]], *, count: int) -> list[int]:
    until = time.monotonic() + 60
    while len(pids := found()) < count:
        assert time.monotonic() < until
        time.sleep(0.02)
    return pids


def _lives(pid: int) -> bool:
    """Whether it is there and no mere entry that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
