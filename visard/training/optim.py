"""SGD with momentum over backbone and head together: scaling, clipping and the check for finiteness in one step.

In: named parameters with gradients that are already summed over processes. Out: moved parameters, and the gradient's
norm and whether it was finite, as tensors on the device.

A step with a gradient that is not finite moves nothing: neither parameters nor momentum. That is decided on the device
(`found_inf` of torch's fused optimizers), so the host never waits for it; the loop reads the flag one step late.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visard.config import OptimConfig

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


class Optimizer:
    """torch.optim.SGD's update for named parameters, with clipping by the global norm and a loss scaler for fp16.

    Args:
        parameters: name -> parameter; those without `requires_grad` are left out. Names are the keys of the state.
        config: SGD's settings.
        fp16: scale the loss, with a scale that adapts itself.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, *, fp16: bool) -> None:
        self.parameters = {name: p for name, p in parameters if p.requires_grad}
        self.clip_norm = config.clip_norm
        decayed, plain = split_decay(self.parameters, config)
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        # The kernel is fused wherever it exists (cpu, cuda, mps): the only one that can skip on the device.
        self._sgd = torch.optim.SGD(
            [group for group in groups if group["params"]],
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            fused=True,
        )
        if config.momentum:
            for p in self.parameters.values():
                # torch makes the buffer in the first step, equal to the gradient; from zeros it becomes the same, and
                # the state has the same keys from the start.
                self._sgd.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        device = next(iter(self.parameters.values())).device
        self._scaler = torch.amp.GradScaler(device.type) if fp16 else None

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss`, scaled if fp16 asks for it."""
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def step(self, lr: float, loss: Tensor) -> StepReport:
        """Unscales, clips, and moves all parameters if the gradient and the loss are finite; then drops the gradients.

        Args:
            lr: learning rate of this step.
            loss: () the loss over all processes, without gradient: the same on every process, so that all decide alike.
        """
        for group in self._sgd.param_groups:
            group["lr"] = lr
        scale = torch.ones_like(loss)
        if self._scaler is not None:
            scale = self._scaler.scale(scale)
            self._scaler.unscale_(self._sgd)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        finite = norm.isfinite() & loss.isfinite()
        if self.clip_norm:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip_norm, norm)
        skipped = (~finite).float()
        if self._scaler is None:
            self._sgd.found_inf = skipped
            self._sgd.step()
            failed = skipped
        else:
            self._scaler.step(self._sgd)
            self._scaler.update()
            failed = skipped * ((scale <= SMALLEST_SCALE) | ~loss.isfinite()).float()
        self._sgd.zero_grad(set_to_none=True)
        return StepReport(norm=norm.float(), skipped=skipped, failed=failed)

    def momentum(self) -> dict[str, Tensor]:
        """The live momentum buffers by parameter name: loading a checkpoint writes into them."""
        if not self._sgd.param_groups[0]["momentum"]:
            return {}
        return {name: self._sgd.state[p]["momentum_buffer"] for name, p in self.parameters.items()}

    def scaler_state(self) -> dict[str, Any]:
        """The loss scaler's numbers; {} without one."""
        return {} if self._scaler is None else self._scaler.state_dict()

    def load_scaler_state(self, values: dict[str, Any]) -> None:
        """Takes up `scaler_state`'s numbers."""
        if self._scaler is not None and values:
            self._scaler.load_state_dict(values)


def split_decay(
    parameters: dict[str, nn.Parameter], config: OptimConfig
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with and without weight decay: norm weights, PReLU slopes and biases are those of one dimension."""
    if config.decay_norm_and_bias:
        return list(parameters.values()), []
    values = parameters.values()
    return [p for p in values if p.ndim > 1], [p for p in values if p.ndim <= 1]
