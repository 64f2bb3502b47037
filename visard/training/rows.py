"""SGD with momentum for some rows of a parameter, at a cost that follows those rows and not all of them.

In: a parameter, its momentum, a `RowGrad`. Out: both moved in place.

A dense step with a gradient that is 0 in most rows reads and writes every row of the parameter, its gradient and its
momentum, and moves them all: momentum and weight decay do not stop at a gradient of 0. Here the other rows keep their
bits. Rows are worked on in blocks that stay in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from visard.records import RowGrad

BLOCK_ELEMENTS = 1 << 17
"""Numbers of a block: 512 KB in float32, so that a block of parameter, momentum and gradient fit the second cache."""

BLOCK_ELEMENTS_GPU = 1 << 26
"""Where launches cost more than memory."""


@dataclass(frozen=True, kw_only=True)
class RowStep:
    """The settings of one step: torch.optim.SGD's.

    Args:
        lr: learning rate.
        momentum: factor of the past, 0 = none.
        weight_decay: added to the gradient, times the parameter.
        nesterov: step along the gradient and the coming momentum.
        divisor: () what the gradient is divided by before all else: loss scale over clipping.
        skip: () 1 = nothing is moved, 0 = all is.
    """

    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool
    divisor: Tensor
    skip: Tensor


@torch.no_grad()
def step_rows(parameter: Tensor, momentum: Tensor | None, gradient: RowGrad, step: RowStep) -> None:
    """torch.optim.SGD's step of `parameter[rows]` and `momentum[rows]`, the other rows untouched.

    Equal to SGD on those rows alone; with `gradient.others_decay` to SGD on all rows with a gradient of 0 for the
    others. torch's fused kernel makes the step, which divides and skips without the host.

    Args:
        parameter: (C, ...) float32; moved.
        momentum: (C, ...) float32; moved. None where there is none.
        gradient: of the rows; may be overwritten.
        step: see `RowStep`.
    """
    if gradient.rows is None:
        _move(parameter, momentum, gradient.grad, step)
        return
    width = max(parameter[:1].numel(), 1)
    block = max(1, (BLOCK_ELEMENTS if parameter.device.type == "cpu" else BLOCK_ELEMENTS_GPU) // width)
    if gradient.others_decay:
        _decay_others(parameter, momentum, gradient.rows, step, block)
    most = min(block, len(gradient.rows))
    values = parameter.new_empty(most, *parameter.shape[1:])
    past = None if momentum is None else torch.empty_like(values)
    for first in range(0, len(gradient.rows), block):
        rows = gradient.rows[first : first + block]
        here = torch.index_select(parameter, 0, rows, out=values[: len(rows)])
        here_past = None
        if momentum is not None and past is not None:
            here_past = torch.index_select(momentum, 0, rows, out=past[: len(rows)])
        _move(here, here_past, gradient.grad[first : first + block], step)
        parameter.index_copy_(0, rows, here)
        if momentum is not None and here_past is not None:
            momentum.index_copy_(0, rows, here_past)


def _move(values: Tensor, past: Tensor | None, gradient: Tensor, step: RowStep) -> None:
    """SGD in place, on tensors of equal shape."""
    if not values.numel():
        return
    sgd(
        [values],
        [gradient],
        [past],
        fused=True,
        grad_scale=step.divisor,
        found_inf=step.skip,
        weight_decay=step.weight_decay,
        momentum=step.momentum,
        lr=step.lr,
        dampening=0.0,
        nesterov=step.nesterov,
        maximize=False,
    )


def _decay_others(parameter: Tensor, momentum: Tensor | None, rows: Tensor, step: RowStep, block: int) -> None:
    """The step of a gradient of 0 for every row but `rows`."""
    others = torch.ones(len(parameter), dtype=torch.bool, device=parameter.device)
    others.index_fill_(0, rows, False)
    for first in range(0, len(parameter), block):
        part = slice(first, first + block)
        values = parameter[part].clone()
        past = None if momentum is None else momentum[part].clone()
        _move(values, past, torch.zeros_like(values), step)
        chosen = others[part].view(-1, *(1,) * (values.ndim - 1))
        parameter[part] = torch.where(chosen, values, parameter[part])
        if momentum is not None and past is not None:
            momentum[part] = torch.where(chosen, past, momentum[part])
