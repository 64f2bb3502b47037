"""A worker dies, torchrun starts all of them anew, and the run goes on where its last checkpoint was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.signals import children
from tests.training.conftest import assert_same_bits, weights_of
from tests.training.processes import ROOT
from tests.training.test_processes import train

RUN = {"log_every": 2, "save_every": 2}


@pytest.mark.slow
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    """SIGKILL to one of two after step 4: the end is bit for bit that of a run in which nothing happened."""
    whole = train(2, tmp_path / "whole", run=RUN)
    out = tmp_path / "run"
    options = json.dumps({"out": str(out), "run": RUN, "delay": 0.3})
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
         "-m", "tests.training.train_tiny", options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while not (out / "checkpoints" / "step_00000004").is_dir():
            assert time.monotonic() < until
            assert torchrun.poll() is None, torchrun.communicate()
            time.sleep(0.05)
        workers = [pid for pid in children(torchrun.pid) if "train_tiny" in command_of(pid)]
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        said, _ = torchrun.communicate(timeout=180)
    finally:
        torchrun.kill()
    assert torchrun.returncode == 0, said[-3000:]
    assert "going on after step" in (out / "log.txt").read_text()
    assert_same_bits(weights_of(out), whole)


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
