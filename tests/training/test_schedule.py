"""The learning rate at chosen steps of every schedule, and its lengths."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visard.config import ScheduleConfig
from visard.training.schedule import learning_rate, peak_rate, total_steps

COSINE = ScheduleConfig(kind="cosine", epochs=10, warmup_epochs=1)
POLYNOMIAL = ScheduleConfig(kind="polynomial", epochs=10, warmup_epochs=0, power=2)
STEPS = ScheduleConfig(kind="multistep", epochs=10, warmup_epochs=0, milestones=(4, 7.5), gamma=0.1)
COUNTED = ScheduleConfig(kind="multistep", max_steps=100, warmup_epochs=0, milestone_steps=(40, 75), gamma=0.1)
CONSTANT = ScheduleConfig(kind="constant", epochs=10, warmup_epochs=0.5)


@pytest.mark.parametrize(
    ("config", "step", "expected"),
    [
        # warm-up of 10 steps: reached with its last step, above 0 in the first
        (COSINE, 0, 0.04),
        (COSINE, 4, 0.2),
        (COSINE, 9, 0.4),
        (COSINE, 10, 0.4),
        (COSINE, 55, 0.2),
        (COSINE, 99, 0.2 * (1 + math.cos(math.pi * 89 / 90))),
        (POLYNOMIAL, 0, 0.4),
        (POLYNOMIAL, 50, 0.1),
        (POLYNOMIAL, 90, 0.004),
        (STEPS, 39, 0.4),
        (STEPS, 40, 0.04),
        (STEPS, 74, 0.04),
        (STEPS, 75, 0.004),
        (COUNTED, 39, 0.4),
        (COUNTED, 40, 0.04),
        (COUNTED, 75, 0.004),
        (CONSTANT, 1, 0.16),
        (CONSTANT, 5, 0.4),
        (CONSTANT, 99, 0.4),
    ],
)
def test_rate_at_a_step(config: ScheduleConfig, step: int, expected: float) -> None:
    assert learning_rate(step, config, peak=0.4, steps_per_epoch=10) == pytest.approx(expected, abs=1e-12)


def test_lengths() -> None:
    assert total_steps(ScheduleConfig(epochs=2.5), 10) == 25
    assert total_steps(ScheduleConfig(epochs=0.001), 10) == 1
    assert total_steps(ScheduleConfig(epochs=2.5, max_steps=7), 10) == 7


def test_linear_scaling() -> None:
    assert peak_rate(ScheduleConfig(base_batch=512), 0.1, 1024) == pytest.approx(0.2)
    assert peak_rate(ScheduleConfig(), 0.1, 1024) == 0.1


def test_a_run_shorter_than_its_warm_up_is_all_warm_up() -> None:
    config = ScheduleConfig(epochs=10, warmup_epochs=1, max_steps=4)
    rates = [learning_rate(step, config, peak=0.4, steps_per_epoch=10) for step in range(4)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])


@given(st.sampled_from([COSINE, POLYNOMIAL, STEPS, CONSTANT]), st.integers(1, 500), st.data())
def test_rate_stays_between_0_and_the_peak_and_never_rises_after_warm_up(
    config: ScheduleConfig, steps_per_epoch: int, data: st.DataObject
) -> None:
    total = total_steps(config, steps_per_epoch)
    step = data.draw(st.integers(0, total - 1))
    rate = learning_rate(step, config, peak=0.4, steps_per_epoch=steps_per_epoch)
    assert 0 < rate <= 0.4
    if step > config.warmup_epochs * steps_per_epoch:
        assert rate <= learning_rate(step - 1, config, peak=0.4, steps_per_epoch=steps_per_epoch)
