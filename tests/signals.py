"""What the tests of signals have in common."""

from __future__ import annotations

import signal
from pathlib import Path


def listen_to_ctrl_c() -> None:
    """For a started process: a shell that runs the tests in its background lets them, and all they start, ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def children(pid: int) -> list[int]:
    """Processes that a process has started and that live, by /proc."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
