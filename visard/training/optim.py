"""The optimizer over backbone and head together: scaling, clipping and the check for finiteness in one step.

In: named parameters with gradients that are already summed over processes, and the row gradients of those that
processes share. Out: moved parameters, and the gradient's norm and whether it was finite, as tensors on the device.

How a kind of optimizer moves and what it remembers is in `rules.py`.

Parameters may be whole on every process (their gradients are the same everywhere), class centres of which a process has
some rows, or DTensors of which it has a shard. Of the latter two each process knows its part of the squared norms
(`squares`), which the loop sums over processes together with the loss.

A step with a gradient that is not finite moves nothing: neither parameters nor momentum, on no process. That is decided
on the device (`found_inf` of torch's fused optimizers), so the host never waits for it; the loop reads the flag one
step late.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from visard import dist
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
        shared_memory: divide what is remembered of whole parameters among the processes (ZeRO, stage 1).
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimConfig,
        *,
        fp16: bool,
        sharded: Collection[str] = (),
        shared_memory: bool = False,
    ) -> None:
        named = {name: p for name, p in parameters if p.requires_grad}
        self.config = config
        self.sharded = {name: named[name] for name in sharded}
        self.parameters = {name: p for name, p in named.items() if name not in self.sharded}
        self._here = {name: local_part(p) for name, p in self.parameters.items()}
        self._decayed = decayed_names(self.parameters, config)
        self._rule = RULES[config.kind](config)
        decay = 0.0 if self._rule.adapts else config.weight_decay
        groups = [
            {"params": [p for name, p in self._here.items() if p.numel() and (name in self._decayed) is yes], **values}
            for yes, values in ((True, {"weight_decay": decay}), (False, {"weight_decay": 0.0}))
        ]
        groups = [group for group in groups if group["params"]]
        kind, settings = self._rule.dense
        self._shared = None
        if shared_memory and dist.world_size() > 1:
            # Imported here: its package compiles functions that torch itself warns of.
            from torch.distributed.optim import ZeroRedundancyOptimizer

            self._shared = ZeroRedundancyOptimizer(groups, optimizer_class=kind, lr=config.lr, **settings)
        self._dense = kind(groups, lr=config.lr, **settings) if self._shared is None else self._shared.optim
        mine = {p for group in self._dense.param_groups for p in group["params"]}
        self._remembered = {name: p for name, p in self._here.items() if p in mine or not p.numel()}
        for p in self._remembered.values():
            self._dense.state[p].update(self._rule.begin(p, rows=False))
        self._rows: dict[str, State] = {name: self._rule.begin(p, rows=True) for name, p in self.sharded.items()}
        device = next(iter(named.values())).device
        self._scale = LossScale(device) if fp16 else None

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss`, scaled if fp16 asks for it."""
        (loss if self._scale is None else loss * self._scale.scale).backward()

    def squares(self, rows: Mapping[str, RowGrad] | None = None) -> Tensor:
        """(Q,) float32 this process's part of squared norms, to be summed over processes and handed to `step`.

        Of what is divided among processes: the square of all gradients, and, where the rule has local rates, the
        squares of each parameter and of each gradient; Q = 0 if nothing is divided.

        Args:
            rows: gradients of the sharded parameters.
        """
        rows = rows or {}
        parts = self._divided(rows)
        if not parts:
            return torch.zeros(0)
        grad_P = torch.stack([square(grad) for grad in parts.values()])
        if not self._rule.adapts:
            return grad_P.sum().view(1)
        weight_P = torch.stack(
            [square(rows_of(self.sharded[name], rows[name]) if name in rows else self._here[name]) for name in parts]
        )
        return torch.cat([grad_P.sum().view(1), weight_P, grad_P])

    def step(
        self, lr: float, loss: Tensor, rows: Mapping[str, RowGrad] | None = None, squares: Tensor | None = None
    ) -> StepReport:
        """Unscales, clips, and moves all parameters if the gradient and the loss are finite; then drops the gradients.

        Args:
            lr: learning rate of this step.
            loss: () the loss over all processes, without gradient: the same on every process, so that all decide alike.
            rows: gradients of the sharded parameters.
            squares: (Q,) see `squares`, summed over processes; None = there are no others.
        """
        rows = rows or {}
        assert rows.keys() == self.sharded.keys(), (rows.keys(), self.sharded.keys())
        squares = self.squares(rows) if squares is None else squares
        for group in (self._shared or self._dense).param_groups:
            group["lr"] = lr
        scale = torch.ones_like(loss) if self._scale is None else self._scale.scale.to(loss)
        whole = {
            name: p.grad for name, p in self.parameters.items() if p.grad is not None and not isinstance(p, DTensor)
        }
        norm = nn.utils.get_total_norm(list(whole.values())) if whole else torch.zeros_like(loss)
        if len(squares):
            norm = torch.hypot(norm, squares[0].sqrt().to(norm))
        norm = norm / scale
        finite = norm.isfinite() & loss.isfinite()
        skipped = (~finite).float()
        divisor = scale.clone()
        if self.config.clip_norm:
            # As torch.nn.utils.clip_grad_norm_ has it.
            divisor = scale / (self.config.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        local = self._adapt(rows, whole, squares, divisor) if self._rule.adapts else {}
        self._dense.grad_scale = torch.where(finite, divisor, 1.0).float()  # type: ignore[attr-defined]
        self._dense.found_inf = skipped  # type: ignore[attr-defined]
        for name, p in self._here.items():
            p.grad = local_part(self.parameters[name].grad)
        (self._shared or self._dense).step()
        for name, gradient in rows.items():
            step = RowStep(lr=lr, divisor=divisor, skip=skipped, local=local.get(name))
            step_rows(self.sharded[name].data, self._rows[name], gradient, self._rule, step)
        failed = skipped
        if self._scale is not None:
            failed = skipped * ((scale <= SMALLEST_SCALE) | ~loss.isfinite()).float()
            self._scale.update(skipped)
        for p in (*self.parameters.values(), *self._here.values()):
            p.grad = None
        return StepReport(norm=norm.float(), skipped=skipped, failed=failed)

    def _divided(self, rows: Mapping[str, RowGrad]) -> dict[str, Tensor]:
        """Name -> this process's part of the gradient, of all parameters that processes divide."""
        found = {name: gradient.grad for name, gradient in rows.items()}
        for name, p in self.parameters.items():
            if isinstance(p, DTensor) and p.grad is not None:
                found[name] = local_part(p.grad)
        return found

    def _adapt(
        self, rows: Mapping[str, RowGrad], whole: Mapping[str, Tensor], squares: Tensor, divisor: Tensor
    ) -> dict[str, Tensor]:
        """Gives dense parameters their local rates, by way of their gradients; returns those of rows, by name."""
        divided = list(self._divided(rows))
        weight_P, grad_P = squares[1:].sqrt().chunk(2) if divided else (squares, squares)
        norms = {name: (weight_P[i], grad_P[i]) for i, name in enumerate(divided)}
        for name, grad in whole.items():
            norms[name] = (square(self.parameters[name]).sqrt(), square(grad).sqrt())
        names = [name for name in norms if name in rows or name in self._decayed]
        if not names:
            return {}
        weight_P, grad_P = (torch.stack([norms[name][i] for name in names]) for i in (0, 1))
        local_P = self._rule.local_rates(weight_P, grad_P / divisor)
        dense = [i for i, name in enumerate(names) if name not in rows]
        self._rule.adapt(
            [self._here[names[i]].data for i in dense],
            [local_part(self.parameters[names[i]].grad) for i in dense],
            [local_P[i] for i in dense],
            divisor,
        )
        return {name: local_P[i] for i, name in enumerate(names) if name in rows}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What is remembered, live: name -> parameter -> tensor. Loading a checkpoint writes into them.

        That of a sharded parameter lies along this process's rows, that of a DTensor in a DTensor. With shared memory
        each process has that of some parameters alone.
        """
        return {
            ours: {
                **{
                    name: like(self._dense.state[p][theirs], self.parameters[name])
                    for name, p in self._remembered.items()
                },
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


def square(tensor: Tensor) -> Tensor:
    """() float32 squared L2 norm."""
    return torch.linalg.vector_norm(tensor.detach()).float().square()


def rows_of(parameter: Tensor, gradient: RowGrad) -> Tensor:
    """The rows of the parameter that a step moves."""
    return parameter.detach() if gradient.rows is None else parameter.detach().index_select(0, gradient.rows)


@overload
def local_part(tensor: nn.Parameter) -> nn.Parameter: ...
@overload
def local_part(tensor: Tensor) -> Tensor: ...
@overload
def local_part(tensor: None) -> None: ...
def local_part(tensor: Tensor | None) -> Tensor | None:
    """This process's part of a DTensor, over the same memory; another tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        here = tensor.to_local()
    return nn.Parameter(here) if isinstance(tensor, nn.Parameter) else here


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """What is remembered of a DTensor's shard as a DTensor over the same memory; a count of steps as it is."""
    if not isinstance(parameter, DTensor) or not tensor.ndim:
        return tensor
    return DTensor.from_local(
        tensor,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def decayed_names(parameters: Mapping[str, Tensor], config: OptimConfig) -> set[str]:
    """Which parameters have weight decay: not norm weights, PReLU slopes and biases, which have one dimension."""
    return {name for name, p in parameters.items() if p.ndim > 1 or config.decay_norm_and_bias}
