"""Kill -9 at ten random moments of one training, resumed each time: the same bits at the end as a run left alone.

Two kills fall into the start of the process, eight into its steps, half of which write a checkpoint.
"""

from __future__ import annotations

import json
import random
import subprocess
import time
from pathlib import Path

import pytest

from tests.training import processes
from tests.training.conftest import assert_same_bits, weights_of
from visard import checkpoint

KILLS, STEPS = 10, 120
OPTIONS = {"max_steps": STEPS, "run": {"save_every": 2, "evaluate_every": 6, "log_every": 1}, "evaluate": True}
TINY = ("-m", "tests.training.train_tiny")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    processes.run(1, *TINY, json.dumps({"out": str(tmp_path / "whole"), **OPTIONS}), seconds=300, fresh=True)
    out = tmp_path / "killed"
    moments = random.Random(7)
    reached = []
    for kill in range(KILLS):
        resume = (out / "recipe.json").exists()
        seen = len((out / "log.txt").read_text()) if (out / "log.txt").exists() else 0
        (process,) = processes.start(
            1, *TINY, json.dumps({"out": str(out), "resume": resume, "delay": 0.02, **OPTIONS})
        )
        if kill % 5 == 0:
            time.sleep(moments.uniform(0, 4))  # while it starts
        else:
            _wait_for_step(out / "log.txt", seen, reached[-1] + moments.randint(3, 14), process)
            time.sleep(moments.uniform(0, 0.15))
        process.kill()
        process.communicate()
        newest = checkpoint.latest(out)
        reached.append(0 if newest is None else checkpoint.read_numbers(newest)["step"])
        for path in checkpoint.checkpoints(out):
            assert checkpoint.read_tensors(path)  # every checkpoint that has its final name is whole
    print("steps on disk after each kill:", reached)
    assert reached == sorted(reached)
    assert reached[-1] < STEPS, "the last kill must find the run at work"
    assert len(set(reached)) > KILLS / 2, reached
    processes.run(1, *TINY, json.dumps({"out": str(out), "resume": True, **OPTIONS}), seconds=300, fresh=True)
    assert_same_bits(weights_of(out), weights_of(tmp_path / "whole"))
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    assert steps == list(range(1, STEPS + 1))
    assert not list((out / "checkpoints").glob(".*"))


def _wait_for_step(log: Path, seen: int, step: int, process: subprocess.Popen[str]) -> None:
    """Until the process has written of that step in log.txt, beyond the `seen` characters from before it."""
    until = time.monotonic() + 120
    while not (log.exists() and f"step {step} epoch" in log.read_text()[seen:]):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.01)
