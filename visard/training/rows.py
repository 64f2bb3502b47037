"""An optimizer's step for some rows of a parameter, at a cost that follows those rows and not all of them.

In: a parameter, what its optimizer remembers, a `RowGrad`. Out: both moved in place.

A dense step with a gradient that is 0 in most rows reads and writes every row of the parameter, its gradient and its
momentum, and moves them all: momentum and weight decay do not stop at a gradient of 0. Here the other rows keep their
bits. Rows are worked on in blocks that stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visard.records import RowGrad
from visard.training.rules import RowStep, Rule, State

BLOCK_ELEMENTS = 1 << 17
"""Numbers of a block: 512 KB in float32, so that a block of parameter, momentum and gradient fit the second cache."""

BLOCK_ELEMENTS_GPU = 1 << 26
"""Where launches cost more than memory."""


@torch.no_grad()
def step_rows(parameter: Tensor, state: State, gradient: RowGrad, rule: Rule, step: RowStep) -> None:
    """The rule's step of `parameter[rows]` and of `state[...][rows]`, the other rows untouched.

    Equal to the optimizer on those rows alone; with `gradient.others_decay` to the optimizer on all rows with a
    gradient of 0 for the others.

    Args:
        parameter: (C, ...) float32; moved.
        state: name -> (C, ...) float32; moved.
        gradient: of the rows; may be overwritten.
        rule: of the optimizer.
        step: see `RowStep`.
    """
    if gradient.rows is None:
        if parameter.numel():
            rule.move(parameter, state, gradient.grad, step)
        return
    width = max(parameter[:1].numel(), 1)
    block = max(1, (BLOCK_ELEMENTS if parameter.device.type == "cpu" else BLOCK_ELEMENTS_GPU) // width)
    if gradient.others_decay:
        _decay_others(parameter, state, gradient.rows, rule, step, block)
    most = min(block, len(gradient.rows))
    places = {"": parameter, **state}
    held = {name: whole.new_empty(most, *whole.shape[1:]) for name, whole in places.items()}
    for first in range(0, len(gradient.rows), block):
        rows = gradient.rows[first : first + block]
        here = {name: torch.index_select(whole, 0, rows, out=held[name][: len(rows)]) for name, whole in places.items()}
        values = here.pop("")
        rule.move(values, here, gradient.grad[first : first + block], step)
        parameter.index_copy_(0, rows, values)
        for name, past in here.items():
            state[name].index_copy_(0, rows, past)


def _decay_others(parameter: Tensor, state: State, rows: Tensor, rule: Rule, step: RowStep, block: int) -> None:
    """The step of a gradient of 0 for every row but `rows`."""
    others = torch.ones(len(parameter), dtype=torch.bool, device=parameter.device)
    others.index_fill_(0, rows, False)
    for first in range(0, len(parameter), block):
        part = slice(first, first + block)
        values = parameter[part].clone()
        past = {name: whole[part].clone() for name, whole in state.items()}
        rule.move(values, past, torch.zeros_like(values), step)
        for whole, moved in ((parameter, values), *((state[name], past[name]) for name in state)):
            chosen = others[part].view(-1, *(1,) * (whole.ndim - 1))
            whole[part] = torch.where(chosen, moved, whole[part])
