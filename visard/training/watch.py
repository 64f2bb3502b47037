"""Reads a step's flags on the host one step late, so that the host never waits for the step it has just started.

In: `StepNumbers`. Out: the flags of the step before, with its number and the ids of its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from visard.training.step import StepNumbers


@dataclass(frozen=True)
class Seen:
    """What a step's flags said.

    Args:
        step: number of the step, from 1.
        ids: images of this process in it.
        failed: its gradient or loss was not finite.
        stop: some process was asked to stop.
    """

    step: int
    ids: tuple[str, ...]
    failed: bool
    stop: bool


class Watch:
    """Holds the flags of the newest step until they are asked for."""

    def __init__(self) -> None:
        self._waiting: tuple[int, tuple[str, ...], torch.Tensor, torch.cuda.Event | None] | None = None

    def push(self, step: int, ids: tuple[str, ...], numbers: StepNumbers) -> Seen | None:
        """Starts copying a step's flags to the host and returns those of the step before, None at first."""
        before = self.flush()
        flags = torch.stack([numbers.failed, numbers.stop])
        event = None
        if flags.device.type == "cuda":
            host = torch.empty(2, pin_memory=True)
            flags = host.copy_(flags, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._waiting = (step, ids, flags, event)
        return before

    def flush(self) -> Seen | None:
        """The flags that wait, read now: before a checkpoint or an evaluation, which wait for the device anyway."""
        if self._waiting is None:
            return None
        step, ids, flags, event = self._waiting
        self._waiting = None
        if event is not None:
            event.synchronize()
        failed, stop = flags.tolist()
        return Seen(step=step, ids=ids, failed=failed > 0, stop=stop > 0)
