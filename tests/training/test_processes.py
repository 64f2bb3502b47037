"""Several gloo processes against one: gradients are summed, the state is one, a signal stops all of them alike."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import processes, train_tiny
from tests.training.conftest import assert_same_bits, weights_of
from visard import checkpoint

TINY = ("-m", "tests.training.train_tiny")

# 12 steps with momentum: the sums of gradients are the same but for their order in float32.
TOLERANCE = 2e-5
RUN = {"log_every": 3}


def train(count: int, out: Path, *, fresh: bool = not processes.FORKS, **options: Any) -> dict[str, torch.Tensor]:
    """A run by `count` processes; a single one is this, which need not be started."""
    everything = {"out": str(out), **options}
    if count == 1:
        assert train_tiny.main(everything) == 0
    else:
        processes.run(count, *TINY, json.dumps(everything), fresh=fresh)
    return weights_of(out)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 process x 8 images, 12 steps, no batch norm."""
    out = tmp_path_factory.mktemp("one") / "run"
    train(1, out, batch_norm=False, evaluate=True, run=RUN)
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 fresh processes x 4 images, 12 steps, no batch norm: what elsewhere forks do."""
    out = tmp_path_factory.mktemp("two") / "run"
    options = {"out": str(out), "batch_norm": False, "evaluate": True, "run": RUN}
    processes.run(2, *TINY, json.dumps(options), fresh=True)
    return out


def test_two_processes_equal_one(one: Path, two: Path) -> None:
    """2 x 4 images against 1 x 8 for 12 steps, with clipping, decay and momentum at work.

    Averaged instead of summed, gradients would be half as large: the tolerance is 4 orders of magnitude below that.
    """
    assert_close(weights_of(two), weights_of(one))
    for left, right in zip(rows(one), rows(two), strict=True):
        assert left["kind"] == right["kind"]
        for key in ("step", "loss", "gradient_norm", "cos_target", "accuracy", "embedding_norm", "lr", "score"):
            assert right.get(key, 0) == pytest.approx(left.get(key, 0), rel=1e-4, abs=1e-5), (left["step"], key)


def test_rank_0_alone_evaluates_and_writes(two: Path) -> None:
    assert [(row["kind"], row["step"]) for row in rows(two)] == [
        ("train", 3), ("train", 6), ("val", 6), ("train", 9), ("train", 12), ("val", 12),
    ]  # fmt: skip
    assert checkpoint.pointed(two, "best") == "step_00000012"
    assert checkpoint.read_numbers(two / "checkpoints" / "step_00000012")["world_size"] == 2


def test_one_process_goes_on_where_two_stopped(one: Path, two: Path, tmp_path: Path) -> None:
    """6 steps by two processes and 6 by one equal 12 by one."""
    out = tmp_path / "run"
    shutil.copytree(two, out)
    shutil.rmtree(out / "checkpoints" / "step_00000012")
    train(1, out, batch_norm=False, evaluate=True, run=RUN, resume=True)
    assert "going on after step 6" in (out / "log.txt").read_text()
    assert_close(weights_of(out), weights_of(one))


def test_resume_with_two_processes_is_exact(tmp_path: Path) -> None:
    """With batch norm and dropout: SIGTERM to one of two; both leave at the same step and go on to the same bits."""
    whole = train(2, tmp_path / "whole")
    out = tmp_path / "parts"
    both = processes.start(2, *TINY, json.dumps({"out": str(out), "delay": 0.15}))
    _wait_for("step 4 ", out / "log.txt", both)
    both[1].send_signal(signal.SIGTERM)
    results = processes.finish(both)
    assert [code for code, _, _ in results] == [143, 143], results
    stopped = checkpoint.read_numbers(checkpoint.latest(out) or Path())["step"]
    assert 0 < stopped < 12
    assert f"stopped after step {stopped} of 12; go on with: visard train --resume {out}" in results[0][2]
    assert_same_bits(train(2, out, resume=True, fresh=True), whole)


def assert_close(
    left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], *, tolerance: float = TOLERANCE
) -> None:
    assert left.keys() == right.keys()
    for name in left:
        error = (left[name] - right[name]).abs().max().item()
        assert error <= tolerance * max(1.0, right[name].abs().max().item()), (name, error)


def _wait_for(text: str, path: Path, running: list[Any]) -> None:
    until = time.monotonic() + 60
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < until
        assert all(p.poll() is None for p in running), running[0].communicate()
        time.sleep(0.05)
