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
        local: () factor of the rate that is these rows' own; None where the rule has none.
    """

    lr: float
    divisor: Tensor
    skip: Tensor
    local: Tensor | None = None


class Rule(ABC):
    """One kind of optimizer.

    Args:
        config: its settings.
    """

    adapts = False
    """Whether each parameter has a rate of its own: `local_rates` and `adapt` are asked, and `adapt` adds the decay."""

    @abstractmethod
    def __init__(self, config: OptimConfig) -> None: ...

    def local_rates(self, weight_P: Tensor, grad_P: Tensor) -> Tensor:
        """(P,) each parameter's factor of the rate, from its norm and that of its (divided) gradient."""
        raise NotImplementedError(f"{type(self).__name__} has no local rates")

    def adapt(self, weights: list[Tensor], gradients: list[Tensor], local: list[Tensor], divisor: Tensor) -> None:
        """Changes the gradients of dense parameters before torch's optimizer sees, divides and applies them."""
        raise NotImplementedError(f"{type(self).__name__} has no local rates")

    @property
    @abstractmethod
    def names(self) -> dict[str, str]:
        """What is remembered of a parameter: our name -> torch's."""

    @property
    @abstractmethod
    def dense(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """torch's optimizer and its settings, but for rate and weight decay, which groups of parameters have.

        Fused wherever that exists (cpu, cuda, mps): the only one that can skip on the device.
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

    @property
    def dense(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        return torch.optim.SGD, {"momentum": self.momentum, "nesterov": self.nesterov, "fused": True}

    def begin(self, parameter: nn.Parameter, *, rows: bool) -> State:
        # torch makes the buffer in the first step, equal to the gradient; from zeros it becomes the same, and the state
        # has the same keys from the start.
        zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return {ours if rows else theirs: zeros for ours, theirs in self.names.items()}

    def move(self, values: Tensor, state: State, gradient: Tensor, step: RowStep) -> None:
        self.apply(values, state, gradient, step, decay=self.weight_decay, divisor=step.divisor)

    def apply(
        self, values: Tensor, state: State, gradient: Tensor, step: RowStep, *, decay: float, divisor: Tensor
    ) -> None:
        """`move` with another decay and divisor."""
        sgd(
            [values],
            [gradient],
            [state.get("momentum")],
            fused=True,
            grad_scale=divisor,
            found_inf=step.skip,
            weight_decay=decay,
            momentum=self.momentum,
            lr=step.lr,
            dampening=0.0,
            nesterov=self.nesterov,
            maximize=False,
        )


class LarsRule(SgdRule):
    """SGD with momentum whose rate, for each parameter, is a part of how far its gradient could move it.

    local = trust |w| / (|g| + decay |w|), and the momentum takes up local (g + decay w). Batch-norm weights, PReLU
    slopes and biases have no local rate and no decay (unless `decay_norm_and_bias`), as usual. For class centres w and
    g are the rows that take part in the step, of all processes: a centre that is not sampled does not count.
    Where |w| or |g| is 0 the local rate is 1. As in torch's SGD the learning rate is outside of the momentum; in the
    paper it is inside, which differs when it changes.

    Source: You, Gitman, Ginsburg, arXiv:1708.03888, Eq. 6 and algorithm 1.
    """

    adapts = True

    def __init__(self, config: OptimConfig) -> None:
        super().__init__(config)
        self.trust = config.trust

    def local_rates(self, weight_P: Tensor, grad_P: Tensor) -> Tensor:
        local_P = self.trust * weight_P / (grad_P + self.weight_decay * weight_P)
        return torch.where((weight_P > 0) & (grad_P > 0), local_P, 1.0)

    def adapt(self, weights: list[Tensor], gradients: list[Tensor], local: list[Tensor], divisor: Tensor) -> None:
        # torch's optimizer will divide all of it by `divisor`.
        for weight, gradient, rate in zip(weights, gradients, local, strict=True):
            gradient.addcmul_(weight, divisor.to(weight), value=self.weight_decay).mul_(rate)

    def move(self, values: Tensor, state: State, gradient: Tensor, step: RowStep) -> None:
        assert step.local is not None
        gradient = gradient.div_(step.divisor).add_(values, alpha=self.weight_decay).mul_(step.local)
        self.apply(values, state, gradient, step, decay=0.0, divisor=torch.ones_like(step.divisor))


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

    @property
    def dense(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        return torch.optim.Adam, {"betas": (self.beta1, self.beta2), "eps": self.eps, "fused": True}

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


RULES: dict[str, type[Rule]] = {"sgd": SgdRule, "adam": AdamRule, "lars": LarsRule}
"""By `optim.kind`."""
