"""Training with class centres divided over processes: the same run as with all centres everywhere, on any number."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.training.conftest import assert_same_bits, weights_of
from tests.training.test_processes import RUN, assert_close, rows, train

MARGIN = {"kind": "combined", "m2": 0.2, "scale": 16.0}
SHARDED = {"classes": "sharded", "margin": MARGIN}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All six centres in the one process there is, 12 steps, no batch norm."""
    out = tmp_path_factory.mktemp("full") / "run"
    train(1, out, batch_norm=False, run=RUN)
    return out


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six centres over four processes: 2, 2, 2 and none."""
    out = tmp_path_factory.mktemp("four") / "run"
    train(4, out, batch_norm=False, run=RUN, head=SHARDED)
    return out


def test_four_processes_that_share_the_classes_equal_one_that_has_all(full: Path, four: Path) -> None:
    assert_close(weights_of(four), weights_of(full))
    for left, right in zip(rows(full), rows(four), strict=True):
        for key in ("loss", "gradient_norm", "cos_target", "accuracy"):
            assert right[key] == pytest.approx(left[key], rel=1e-4, abs=1e-5), (left["step"], key)


def test_one_process_alone_equals_the_full_head(full: Path, tmp_path: Path) -> None:
    assert_close(train(1, tmp_path / "run", batch_norm=False, run=RUN, head=SHARDED), weights_of(full))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_centres_and_momentum_go_on_at_another_number_of_processes(
    count: int, full: Path, four: Path, tmp_path: Path
) -> None:
    """6 steps by four processes and 6 by others equal 12 by one."""
    out = tmp_path / "run"
    shutil.copytree(four, out)
    shutil.rmtree(out / "checkpoints" / "step_00000012")
    train(count, out, batch_norm=False, run=RUN, head=SHARDED, resume=True)
    assert "going on after step 6" in (out / "log.txt").read_text()
    assert_close(weights_of(out), weights_of(full))


def test_shares_that_differ_by_more_than_an_image(tmp_path: Path) -> None:
    """Batches of three identities with four images each: two processes have 4 and 8 of the 12."""
    by_identity = {"run": {**RUN, "batch_global": 12}, "sampler": {"kind": "identities"}, "batch_norm": False}
    one, two = (train(count, tmp_path / str(count), head=SHARDED, **by_identity) for count in (1, 2))
    assert_close(two, one)


def test_a_sampled_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Half of 60 classes a step, drawn from (seed, step, rank), with batch norm and dropout besides; 14 steps."""
    sampled = {"head": {**SHARDED, "sample_rate": 0.5}, "identities": 60, "images_each": 1}
    whole = train(2, tmp_path / "whole", **sampled)
    assert whole["head.weight"].shape == (60, 16)
    out = tmp_path / "parts"
    shutil.copytree(tmp_path / "whole", out)
    shutil.rmtree(out / "checkpoints" / "step_00000014")
    assert_same_bits(train(2, out, resume=True, **sampled), whole)
    # The same seed on one process draws other classes: it is another run, but one of the same kind.
    alone = train(1, tmp_path / "alone", **sampled)
    assert (alone["head.weight"] != whole["head.weight"]).any()


@pytest.mark.slow
def test_adam_goes_on_at_another_number_of_processes(tmp_path: Path) -> None:
    """6 steps by three processes and 6 by two equal 12 by one: moments and counts of steps lie along the classes."""
    adam = {"batch_norm": False, "run": RUN, "optim": {"kind": "adam"}, "lr": 0.003}
    whole = train(1, tmp_path / "whole", **adam)
    out = tmp_path / "run"
    train(3, out, head=SHARDED, **adam)
    shutil.rmtree(out / "checkpoints" / "step_00000012")
    parts = train(2, out, head=SHARDED, resume=True, **adam)
    assert "going on after step 6" in (out / "log.txt").read_text()
    assert parts["steps.head.weight"].tolist() == [12] * 6
    for name, tensor in parts.items():
        if name != "steps.head.weight":  # in one process it is one count for all classes
            torch.testing.assert_close(tensor, whole[name], rtol=2e-3, atol=2e-4)
