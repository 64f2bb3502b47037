"""What the tests of signals have in common."""

from __future__ import annotations

import signal


def listen_to_ctrl_c() -> None:
    """For a started process: a shell that runs the tests in its background lets them, and all they start, ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
