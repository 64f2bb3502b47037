"""The learning rate as a pure function of the optimizer step.

In: `ScheduleConfig`, the step, steps an epoch. Out: the rate. Nothing is remembered, so nothing is lost on resume.
Steps are optimizer steps counted from 0, whatever the number of processes or micro-batches; epochs may be fractions.
"""

from __future__ import annotations

import math

from visard.config import ScheduleConfig


def total_steps(config: ScheduleConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run, at least 1."""
    return config.max_steps or max(1, round(config.epochs * steps_per_epoch))


def peak_rate(config: ScheduleConfig, lr: float, batch_global: int) -> float:
    """The rate after warm-up: `lr` at `base_batch` images a step, linear in the batch.

    Source: Goyal et al. (arXiv:1706.02677), the linear scaling rule.
    """
    return lr * batch_global / config.base_batch if config.base_batch else lr


def learning_rate(step: int, config: ScheduleConfig, *, peak: float, steps_per_epoch: int) -> float:
    """The rate of one optimizer step.

    Warm-up rises linearly and reaches `peak` with its last step; the first step already has a rate above 0. After that,
    with t going from 0 to 1 between the end of warm-up and the end of the run: cosine peak * (1 + cos(pi t)) / 2,
    polynomial peak * (1 - t)**power, multistep peak * gamma**(milestones passed), constant peak.

    Args:
        step: number of the step about to be made, from 0.
        config: kind and lengths.
        peak: see `peak_rate`.
        steps_per_epoch: optimizer steps in one pass over the data.
    """
    total = total_steps(config, steps_per_epoch)
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total)
    if step < warmup:
        return peak * (step + 1) / warmup
    t = min((step - warmup) / max(total - warmup, 1), 1.0)
    match config.kind:
        case "cosine":
            return peak * (1.0 + math.cos(math.pi * t)) / 2.0
        case "polynomial":
            return peak * (1.0 - t) ** config.power
        case "multistep":
            passed = [round(m * steps_per_epoch) for m in config.milestones] or config.milestone_steps
            return peak * config.gamma ** sum(step >= m for m in passed)
        case "constant":
            return peak
