"""What each kind of optimizer remembers, and how it moves: a rule for dense parameters and for rows alike.

In: `OptimConfig`. Out: a `Rule`: torch's fused optimizer for dense parameters, and `move` for a block of rows with the
same arithmetic. A new kind is a class here and a line in `RULES`; scaling, clipping, skipping and the state's names are
`optim.py`'s.

What a rule remembers of a parameter has the same names for dense parameters and for rows, and lies along the rows, so
that a checkpoint loads where other rows are on other processes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from visard.config import OptimConfig

State = dict[str, Tensor]
"""What is remembered of one parameter, by name."""


@dataclass(frozen=True, kw_only=True)
class RowStep:
    """What is the same for all rows of a step.

    Args:
        lr: learning rate.
        divisor: () what the gradient is divided by before all else: loss scale over clipping.
        skip: () 1 = nothing is moved, 0 = all is.
    """

    lr: float
    divisor: Tensor
    skip: Tensor


class Rule(ABC):
    """One kind of optimizer.

    Args:
        config: its settings.
    """

    @abstractmethod
    def __init__(self, config: OptimConfig) -> None: ...

    @property
    @abstractmethod
    def names(self) -> dict[str, str]:
        """What is remembered of a parameter: our name -> torch's."""

    @abstractmethod
    def dense(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """torch's optimizer, fused wherever that exists (cpu, cuda, mps): the only one that can skip on the device.

        Args:
            groups: with their weight decay; the rate is set before every step.
        """

    @abstractmethod
    def begin(self, parameter: nn.Parameter, *, rows: bool) -> State:
        """What is remembered before the first step; by torch's names for a dense parameter, by ours for rows."""

    @abstractmethod
    def move(self, values: Tensor, state: State, gradient: Tensor, step: RowStep) -> None:
        """Moves rows and what is remembered of them, in place.

        Args:
            values: (R, ...) float32 rows.
            state: of these rows.
            gradient: (R, ...), not divided yet; may be overwritten.
            step: see `RowStep`.
        """


class SgdRule(Rule):
    """SGD with momentum: torch.optim.SGD."""

    def __init__(self, config: OptimConfig) -> None:
        self.momentum, self.nesterov, self.weight_decay = config.momentum, config.nesterov, config.weight_decay

    @property
    def names(self) -> dict[str, str]:
        return {"momentum": "momentum_buffer"} if self.momentum else {}

    def dense(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, momentum=self.momentum, nesterov=self.nesterov, fused=True)

    def begin(self, parameter: nn.Parameter, *, rows: bool) -> State:
        # torch makes the buffer in the first step, equal to the gradient; from zeros it becomes the same, and the state
        # has the same keys from the start.
        zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return {ours if rows else theirs: zeros for ours, theirs in self.names.items()}

    def move(self, values: Tensor, state: State, gradient: Tensor, step: RowStep) -> None:
        sgd(
            [values],
            [gradient],
            [state.get("momentum")],
            fused=True,
            grad_scale=step.divisor,
            found_inf=step.skip,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            lr=step.lr,
            dampening=0.0,
            nesterov=self.nesterov,
            maximize=False,
        )


class AdamRule(Rule):
    """Adam with weight decay added to the gradient: torch.optim.Adam, not AdamW.

    A row that a step does not sample is not touched, its count of steps neither: each row is a parameter of its own to
    torch.optim.Adam, stepped when it is sampled. One count for all would correct the bias of a row's first moments as
    if they were old ones, and make its first step up to 1 / (1 - beta2) ** 0.5 = 32 times too long.

    Source: Kingma, Ba, arXiv:1412.6980, algorithm 1.
    """

    def __init__(self, config: OptimConfig) -> None:
        self.beta1, self.beta2, self.eps, self.weight_decay = (
            config.beta1,
            config.beta2,
            config.eps,
            config.weight_decay,
        )

    @property
    def names(self) -> dict[str, str]:
        return {"momentum": "exp_avg", "second_moment": "exp_avg_sq", "steps": "step"}

    def dense(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Adam(groups, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)

    def begin(self, parameter: nn.Parameter, *, rows: bool) -> State:
        momentum, second = (torch.zeros_like(parameter, memory_format=torch.preserve_format) for _ in range(2))
        count = (len(parameter),) if rows else ()
        steps = torch.zeros(count, dtype=torch.float32, device=parameter.device)
        by_name = {"momentum": momentum, "second_moment": second, "steps": steps}
        return by_name if rows else {theirs: by_name[ours] for ours, theirs in self.names.items()}

    def move(self, values: Tensor, state: State, gradient: Tensor, step: RowStep) -> None:
        each_row = (-1, *(1,) * (values.ndim - 1))
        gradient = gradient.div_(step.divisor).add_(values, alpha=self.weight_decay)
        steps = state["steps"] + 1
        momentum = torch.lerp(state["momentum"], gradient, 1 - self.beta1)
        second = (state["second_moment"] * self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        # 1 - beta ** steps, whose leading digits cancel in float32 while steps are few.
        first_left, second_left = (-torch.expm1(steps * math.log(b)).view(each_row) for b in (self.beta1, self.beta2))
        length = (second / second_left).sqrt_().add_(self.eps)
        moved = values - (step.lr / first_left) * momentum / length
        skip = step.skip > 0
        new = {"momentum": momentum, "second_moment": second, "steps": steps}
        for old, changed in ((values, moved), *((state[name], new[name]) for name in new)):
            old.copy_(torch.where(skip, old, changed))


RULES: dict[str, type[Rule]] = {"sgd": SgdRule, "adam": AdamRule}
"""By `optim.kind`."""
