"""The two errors that a user can cause, and the interruption. The command line prints their message as one line.

A mistake exits with code 2, an interruption with 128 + the signal's number (130 for Ctrl-C, 143 for SIGTERM).

Anything else that escapes is our defect and keeps its traceback.
"""

from __future__ import annotations

from pathlib import Path
from signal import SIGINT, SIGTERM


class UserError(Exception):
    """A mistake in the input or the settings: the message says what, where and what to do, in one line."""


class FormatError(UserError):
    """A file does not hold what its format promises.

    Args:
        path: the file.
        problem: what is wrong, and what to do.
        offset: byte position in the file at which it was noticed, where known.
    """

    def __init__(self, path: str | Path, problem: str, offset: int | None = None) -> None:
        self.path = Path(path)
        self.problem = problem
        self.offset = offset
        where = f"{path}" if offset is None else f"{path} at byte {offset}"
        super().__init__(f"{where}: {problem}")

    def __reduce__(self) -> tuple[type[FormatError], tuple[Path, str, int | None]]:
        """From a worker process to its parent."""
        return type(self), (self.path, self.problem, self.offset)


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised by the command line where Ctrl-C raises KeyboardInterrupt: both leave by the same doors."""


class Interrupted(Exception):  # noqa: N818 - no error
    """A signal ended the work after what was done had been saved.

    Args:
        message: how to go on, in one line.
        signal: the signal's number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal

    @classmethod
    def by(cls, cause: KeyboardInterrupt, rest: str) -> Interrupted:
        """Of Ctrl-C or SIGTERM; `rest` says what is kept and how to go on."""
        terminated = isinstance(cause, Terminated)
        word, number = ("terminated", SIGTERM) if terminated else ("interrupted", SIGINT)
        return cls(f"{word}; {rest}", number)
