"""Damaged files against every parser, by the script that does it at length."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz.py"


def fuzz(inputs: int, tmp_path: Path) -> dict[str, dict[str, float]]:
    command = [sys.executable, str(SCRIPT), "--inputs", str(inputs), "--keep", str(tmp_path / "failed")]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(counts: dict[str, dict[str, float]], least: int) -> None:
    assert len(counts) > 20
    for name, count in counts.items():
        assert count["inputs"] >= least, name
        assert count["failures"] == 0, name
        assert count["accepted"] > 0, name  # the inputs are near enough to valid files
        assert count["format_errors"] + count["other_user_errors"] > 0, name


def test_some_thousand_inputs(tmp_path: Path) -> None:
    check(fuzz(4800, tmp_path), 100)


@pytest.mark.slow
def test_a_hundred_thousand_inputs(tmp_path: Path) -> None:
    check(fuzz(100_000, tmp_path), 4000)
