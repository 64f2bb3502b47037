"""Shares out work over several processes; nothing is left behind when one of them, or the parent, is killed.

In: picklable items and a picklable `make_task()` that each process calls once, giving `task(item, report)`. Out: the
    counts that
the tasks report, as they come. `multiprocessing.Pool` is not used because it hangs when a worker is killed, and its
workers outlive a killed parent.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from visard.errors import UserError
from visard.signals import SIGNALS, held_back, leave_to_parent

Report = Callable[[int], None]
Task = Callable[[Any, Report], None]


def run_in_processes(make_task: Callable[[], Task], items: Iterable[Any], processes: int) -> Iterator[int]:
    """Runs `task(item, report)` for every item and yields what the tasks report.

    Args:
        make_task: called once in every process; must be picklable with more than one.
        items: started in this order.
        processes: 1 runs in this process.

    Raises:
        UserError: a task raised one, or a process died.
    """
    yield from _run_here(make_task, items) if processes <= 1 else _run_apart(make_task, items, processes)


def _run_here(make_task: Callable[[], Task], items: Iterable[Any]) -> Iterator[int]:
    counts: list[int] = []
    task = make_task()
    for item in items:
        task(item, counts.append)
        yield sum(counts)
        counts.clear()


def _run_apart(make_task: Callable[[], Task], items: Iterable[Any], processes: int) -> Iterator[int]:
    # Spawned, not forked: torch and OpenCV keep threads that do not survive a fork, and it is the same on every system.
    context = multiprocessing.get_context("spawn")
    waiting = iter(items)
    workers: dict[Any, Any] = {}
    try:
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, make_task), daemon=True)
            with held_back():
                process.start()
            theirs.close()
            workers[ours] = process
        while workers:
            ready: list[Any] = wait(list(workers))
            for connection in ready:
                try:
                    kind, value = connection.recv()
                except (EOFError, ConnectionResetError):
                    raise UserError(_obituary(workers[connection])) from None
                if kind == "count":
                    yield value
                elif kind == "error":
                    raise value
                elif (item := next(waiting, None)) is not None:
                    connection.send(item)
                else:
                    connection.send(None)
                    workers.pop(connection).join()
    finally:
        for process in workers.values():
            process.kill()
            process.join()


def _obituary(process: Any) -> str:
    process.join()
    cause = "was killed (out of memory?)" if process.exitcode == -9 else f"ended with exit code {process.exitcode}"
    return f"a worker process {cause}; the same command goes on where it stopped, --processes 1 needs the least memory"


def _work(connection: Connection, make_task: Callable[[], Task]) -> None:
    leave_to_parent(*SIGNALS)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        task = make_task()
        while True:
            connection.send(("ready", None))
            item = connection.recv()
            if item is None:
                return
            task(item, lambda count: connection.send(("count", count)))
    except UserError as error:
        connection.send(("error", UserError(str(error))))


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
