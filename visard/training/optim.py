"""The optimizer over backbone and head together: scaling, clipping and the check for finiteness in one step.

In: named parameters with gradients that are already summed over processes, and the row gradients of those that
processes share. Out: moved parameters, and the gradient's norm and whether it was finite, as tensors on the device.

How a kind of optimizer moves and what it remembers is in `rules.py`.

A step with a gradient that is not finite moves nothing: neither parameters nor momentum, on no process. That is decided
on the device (`found_inf` of torch's fused optimizers), so the host never waits for it; the loop reads the flag one
step late.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visard.config import OptimConfig
from visard.records import RowGrad
from visard.training.rows import step_rows
from visard.training.rules import RULES, RowStep, State

SMALLEST_SCALE = 1.0
"""At a larger scale the scaler cures an fp16 overflow by skipping the step and halving the scale; here it cannot."""


@dataclass(frozen=True)
class StepReport:
    """What an optimizer step found; scalars on the device, float32.

    Args:
        norm: () L2 norm of the gradient of all parameters, before clipping; not finite if the gradient is not.
        skipped: () 1 if nothing was moved.
        failed: () 1 if nothing was moved and no smaller loss scale can help.
    """

    norm: Tensor
    skipped: Tensor
    failed: Tensor


class LossScale:
    """torch.amp.GradScaler's factor of the loss for fp16, and its rule, driven by one flag for all parameters.

    GradScaler itself looks at the gradients of one torch optimizer in one process: an overflow in another process's
    class centres would move some parameters and not others.

    Args:
        device: where the numbers are.
    """

    START, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), self.START, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, skipped: Tensor) -> None:
        """Halves the factor after a step that was skipped, doubles it after `INTERVAL` in a row that were not."""
        good = (self.good_steps + 1) * (1 - skipped)
        grown = good >= self.INTERVAL
        self.scale *= torch.where(skipped > 0, self.BACKOFF, torch.where(grown, self.GROWTH, 1.0))
        self.good_steps = torch.where(grown, 0.0, good)


class Optimizer:
    """torch.optim's update for named parameters, with clipping by the global norm and a loss scale for fp16.

    Args:
        parameters: name -> parameter; those without `requires_grad` are left out. Names are the keys of the state.
        config: kind and settings.
        fp16: scale the loss, with a scale that adapts itself.
        sharded: names of the parameters whose gradients are handed to `step` as rows; each process has its own rows.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimConfig,
        *,
        fp16: bool,
        sharded: Collection[str] = (),
    ) -> None:
        named = {name: p for name, p in parameters if p.requires_grad}
        self.config = config
        self.sharded = {name: named[name] for name in sharded}
        self.parameters = {name: p for name, p in named.items() if name not in self.sharded}
        decayed, plain = split_decay(self.parameters, config)
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self._rule = RULES[config.kind](config)
        self._dense = self._rule.dense([group for group in groups if group["params"]])
        for p in self.parameters.values():
            self._dense.state[p].update(self._rule.begin(p, rows=False))
        self._rows: dict[str, State] = {name: self._rule.begin(p, rows=True) for name, p in self.sharded.items()}
        device = next(iter(named.values())).device
        self._scale = LossScale(device) if fp16 else None

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss`, scaled if fp16 asks for it."""
        (loss if self._scale is None else loss * self._scale.scale).backward()

    def step(
        self,
        lr: float,
        loss: Tensor,
        rows: Mapping[str, RowGrad] | None = None,
        rows_square: Tensor | None = None,
    ) -> StepReport:
        """Unscales, clips, and moves all parameters if the gradient and the loss are finite; then drops the gradients.

        Args:
            lr: learning rate of this step.
            loss: () the loss over all processes, without gradient: the same on every process, so that all decide alike.
            rows: gradients of the sharded parameters.
            rows_square: () `square_of` those, summed over processes; None = there are no others, or no such parameter.
        """
        rows = rows or {}
        assert rows.keys() == self.sharded.keys(), (rows.keys(), self.sharded.keys())
        for group in self._dense.param_groups:
            group["lr"] = lr
        scale = torch.ones_like(loss) if self._scale is None else self._scale.scale.to(loss)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if rows:
            norm = torch.hypot(norm, (square_of(rows) if rows_square is None else rows_square).sqrt())
        norm = norm / scale
        finite = norm.isfinite() & loss.isfinite()
        skipped = (~finite).float()
        divisor = scale.clone()
        if self.config.clip_norm:
            # As torch.nn.utils.clip_grad_norm_ has it.
            divisor = scale / (self.config.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        self._dense.grad_scale = torch.where(finite, divisor, 1.0).float()
        self._dense.found_inf = skipped
        self._dense.step()
        step = RowStep(lr=lr, divisor=divisor, skip=skipped)
        for name, gradient in rows.items():
            step_rows(self.sharded[name].data, self._rows[name], gradient, self._rule, step)
        failed = skipped
        if self._scale is not None:
            failed = skipped * ((scale <= SMALLEST_SCALE) | ~loss.isfinite()).float()
            self._scale.update(skipped)
        self._dense.zero_grad(set_to_none=True)
        return StepReport(norm=norm.float(), skipped=skipped, failed=failed)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What is remembered, live: name -> parameter -> tensor. Loading a checkpoint writes into them.

        That of a sharded parameter lies along this process's rows.
        """
        return {
            ours: {
                **{name: self._dense.state[p][theirs] for name, p in self.parameters.items()},
                **{name: state[ours] for name, state in self._rows.items()},
            }
            for ours, theirs in self._rule.names.items()
        }

    def scaler_state(self) -> dict[str, Any]:
        """The loss scale's numbers; {} without one."""
        if self._scale is None:
            return {}
        return {"scale": self._scale.scale.item(), "good_steps": self._scale.good_steps.item()}

    def load_scaler_state(self, values: dict[str, Any]) -> None:
        """Takes up `scaler_state`'s numbers."""
        if self._scale is not None and values:
            self._scale.scale.fill_(values["scale"])
            self._scale.good_steps.fill_(values["good_steps"])


def square_of(rows: Mapping[str, RowGrad]) -> Tensor:
    """() float32 squared L2 norm of this process's row gradients."""
    return torch.stack([torch.linalg.vector_norm(r.grad).float() for r in rows.values()]).square().sum()


def split_decay(
    parameters: dict[str, nn.Parameter], config: OptimConfig
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with and without weight decay: norm weights, PReLU slopes and biases are those of one dimension."""
    if config.decay_norm_and_bias:
        return list(parameters.values()), []
    values = parameters.values()
    return [p for p in values if p.ndim > 1], [p for p in values if p.ndim <= 1]
