"""Training with a queue of past embeddings: the same run on any number of processes, and after any restart.

Compared are all tensors of the last checkpoint, the queue's among them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.training.conftest import assert_same_bits, weights_of
from tests.training.test_processes import RUN, assert_close, rows, train
from visard import checkpoint

MARGIN = {"kind": "combined", "m2": 0.2, "scale": 16.0}
HEAD = {"classes": "sharded", "margin": MARGIN, "queue": {"size": 27}}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps of 8 images, of which the queue holds a little over 3; no batch norm."""
    out = tmp_path_factory.mktemp("one") / "run"
    train(1, out, batch_norm=False, run=RUN, head=HEAD)
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same steps by two processes."""
    out = tmp_path_factory.mktemp("two") / "run"
    train(2, out, batch_norm=False, run=RUN, head=HEAD)
    return out


def half_of(run: Path, out: Path) -> Path:
    """The run as it was half-way."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "checkpoints" / (checkpoint.pointed(run, "last") or ""))
    return out


def test_queue_and_compensation_change_the_run(one: Path, tmp_path: Path) -> None:
    """Else the other tests would show nothing."""
    weight = weights_of(one)["head.weight"]
    for name, queue in (("none", {}), ("plain", {"size": 27, "compensation": False})):
        other = train(1, tmp_path / name, batch_norm=False, run=RUN, head={**HEAD, "queue": queue})
        assert (other["head.weight"] - weight).abs().max() > 1e-3, name
    assert [row["queue"] for row in rows(one) if row["kind"] == "train"] == [8.0, 26.0, 27.0, 27.0]


def test_two_processes_equal_one(one: Path, two: Path) -> None:
    assert_close(weights_of(two), weights_of(one))


def test_micro_batches_equal_whole_ones(one: Path, tmp_path: Path) -> None:
    for count in (1, 2):
        out = tmp_path / str(count)
        assert_close(train(count, out, batch_norm=False, run={**RUN, "micro_batches": 2}, head=HEAD), weights_of(one))


@pytest.mark.parametrize("count", [1, 4])
def test_the_queue_goes_on_at_another_number_of_processes(count: int, one: Path, two: Path, tmp_path: Path) -> None:
    """6 steps by two processes and 6 by others equal 12 by one."""
    out = half_of(two, tmp_path / "run")
    train(count, out, batch_norm=False, run=RUN, head=HEAD, resume=True)
    assert "going on after step 6" in (out / "log.txt").read_text()
    assert_close(weights_of(out), weights_of(one))


@pytest.mark.parametrize("count", [1, 2])
def test_a_resumed_run_goes_on_to_the_same_bits(count: int, tmp_path: Path) -> None:
    """With batch norm and dropout, a sample of the classes, and a queue that is not yet full at the restart."""
    options = {"head": {**HEAD, "queue": {"size": 75}, "sample_rate": 0.5}, "identities": 60, "images_each": 1}
    whole = train(count, tmp_path / "whole", **options)
    out = half_of(tmp_path / "whole", tmp_path / "parts")
    assert_same_bits(train(count, out, resume=True, **options), whole)
