"""Kill -9 at ten random moments of one training, resumed each time: the same bits at the end as a run left alone.

The moments are drawn over the whole life of the process: start-up, steps, the writing of checkpoints (one every second
step).
"""

from __future__ import annotations

import json
import random
import shutil
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
    started = time.monotonic()
    processes.run(1, *TINY, json.dumps({"out": str(tmp_path / "whole"), **OPTIONS}), seconds=300)
    life = time.monotonic() - started
    out = tmp_path / "killed"
    moments = random.Random(7)
    reached = []
    for _ in range(KILLS):
        resume = (out / "recipe.json").exists()
        (process,) = processes.start(
            1, *TINY, json.dumps({"out": str(out), "resume": resume, "delay": 0.05, **OPTIONS})
        )
        time.sleep(moments.uniform(0.6, 1.6) * life)
        process.kill()
        process.communicate()
        newest = checkpoint.latest(out)
        reached.append(0 if newest is None else checkpoint.read_numbers(newest)["step"])
        for path in checkpoint.checkpoints(out) if out.exists() else []:
            assert checkpoint.read_tensors(path)  # every checkpoint that has its final name is whole
    assert sorted(reached) == reached
    print("steps on disk after each kill:", reached)
    processes.run(1, *TINY, json.dumps({"out": str(out), "resume": True, **OPTIONS}), seconds=300)
    assert_same_bits(weights_of(out), weights_of(tmp_path / "whole"))
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    assert steps == list(range(1, STEPS + 1))
    assert not list((out / "checkpoints").glob(".*"))
    shutil.rmtree(out)
