"""SIGTERM and SIGINT ask a run to save and leave instead of ending it.

In: a block to guard. Out: `Interrupt.signal`, 0 until one of them came. A second SIGINT ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from visard.console import say

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
    """Whether somebody asked the run to stop.

    Args:
        signal: number of the first signal that came, 0 = none.
    """

    def __init__(self) -> None:
        self.signal = 0


@contextmanager
def listening(*, quiet: bool = False) -> Iterator[Interrupt]:
    """Catches SIGTERM and SIGINT inside the block; the handlers from before are put back after it.

    Worker processes that are forked inside keep the default behaviour. Outside the main thread, where Python allows no
    handlers, nothing is caught.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner or (interrupt.signal == signal.SIGINT and number == signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        interrupt.signal = interrupt.signal or number
        if not quiet:
            say(f"{signal.Signals(number).name}: saving a checkpoint, then leaving")

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
