"""What a command shows: progress on standard error while it works, its answer on standard output at the end.

In: counts. Out: a rich bar with rate and time left on a terminal, otherwise a plain line every few seconds; nothing
when quiet.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from visard.errors import UserError
from visard.wording import unknown_option, usage_of, wording

PLAIN_LINE_SECONDS = 10.0


@dataclass(frozen=True)
class Answer:
    """What a command found.

    Args:
        value: JSON-serialisable; printed by `--json`.
        text: the same for people.
    """

    value: dict[str, Any]
    text: str


class Progress:
    """Counts work done; made by `progress`."""

    def __init__(self, total: int | None, unit: str, done: int = 0) -> None:
        self.total, self.unit, self.done = total, unit, done
        self._started, self._done_before = time.monotonic(), done

    def advance(self, count: int = 1) -> None:
        """`count` more units are done."""
        self.done += count

    def note(self, text: str) -> None:
        """A line that stays, above the bar."""
        say(text)

    def line(self) -> str:
        """Rate and time left in words."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (self.done - self._done_before) / seconds
        if self.total is None:
            return f"{self.done:,} {self.unit}, {rate:,.1f}/s"
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        left_text = f"{left:,.0f} s left" if left != float("inf") else "time left unknown"
        return f"{self.done:,}/{self.total:,} {self.unit}, {rate:,.1f}/s, {left_text}"


class _PlainProgress(Progress):
    def __init__(self, total: int | None, unit: str, done: int, title: str) -> None:
        super().__init__(total, unit, done)
        self._title, self._last = title, time.monotonic()

    def advance(self, count: int = 1) -> None:
        super().advance(count)
        now = time.monotonic()
        if now - self._last >= PLAIN_LINE_SECONDS:
            self._last = now
            say(f"{self._title}: {self.line()}")


class _RichProgress(Progress):
    def __init__(self, total: int | None, unit: str, done: int, bar: Any, task: Any) -> None:
        super().__init__(total, unit, done)
        self._bar, self._task = bar, task

    def advance(self, count: int = 1) -> None:
        super().advance(count)
        self._bar.update(self._task, completed=self.done, speed=self.line())

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)


@contextlib.contextmanager
def progress(
    title: str, total: int | None, unit: str = "images", *, quiet: bool = False, done: int = 0
) -> Iterator[Progress]:
    """A counter to `advance` inside the block.

    Args:
        title: what is being done.
        total: units expected, None if unknown.
        unit: what is counted, plural.
        quiet: show nothing (ranks above 0, tests).
        done: units that were done before, in a run that is resumed; the rate leaves them out.
    """
    if quiet:
        yield Progress(total, unit, done)
        return
    if not sys.stderr.isatty():
        plain = _PlainProgress(total, unit, done, title)
        yield plain
        say(f"{title}: {plain.line()}")
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bar

    with Bar(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[speed]}"),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task(title, total=total, completed=done, speed="")
        yield _RichProgress(total, unit, done, bar, task)


def parse(kind: Any, arguments: list[str], *, command: str, description: str | None = None) -> Any:
    """`kind` from `arguments`, by tyro; help is shown and ends the program, a mistake becomes one line.

    Args:
        kind: a config dataclass.
        arguments: what follows the command's name.
        command: what the user typed before them, "visard prepare".
        description: the first line of the help.

    Raises:
        UserError: an option that does not exist, a missing or impossible value.
    """
    import tyro

    if found := unknown_option(kind, arguments):
        raise UserError(f"{found}; `{command} --help` lists all")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=command, args=arguments, description=description)
    except SystemExit as ended:
        if not ended.code:
            raise
        usage, positional = usage_of(kind, command)
        raise UserError(
            f"{wording(said.getvalue(), usage=usage, positional=positional)}; `{command} --help` explains all"
        ) from None


def say(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)
