"""Real photographs, where they are at hand: an outside network on LFW's pairs, and MTCNN killed and resumed.

The network was trained by others on crops of another implementation, so that its published accuracy is only reached
with the right alignment, preprocessing, weights and protocol together: 99.50 %, and 99.43 on an independent path.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.align.test_prepare import contents
from visard.cli import main

LEAST_ACCURACY = 0.992

pytestmark = pytest.mark.real_data


def visard(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def lfw(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs of the official pairs."""
    folder = tmp_path_factory.mktemp("lfw")
    with tarfile.open(shared_data / "lfw-pairs.tar") as archive:
        archive.extractall(folder, filter="data")
    (inner,) = folder.iterdir()
    return inner


@pytest.fixture(scope="module")
def network(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MobileFaceNet y1, imported; its export lies beside it."""
    folder = tmp_path_factory.mktemp("network")
    visard("import", shared_data / "models" / "mobilefacenet-y1", folder / "y1")
    visard("export", folder / "y1", folder / "y1.onnx")
    return folder


def accuracy(model: Path, crops: Path, shared_data: Path, out: Path) -> float:
    pairs = shared_data / "lfw-pairs.txt"
    visard("evaluate", "pairs", model, crops, "--pairs", pairs, "--flip", "sum", "--out", out, "--no-pictures")
    result = json.loads((out / "result.json").read_text())
    assert result["counts"]["pairs"] == 6000
    assert result["settings"]["folds"] == 10
    found: float = result["metrics"]["accuracy"]
    return found


@pytest.fixture(scope="module", params=["yunet", "mtcnn"])
def crops(
    request: pytest.FixtureRequest, shared_data: Path, lfw: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """LFW prepared with each detector."""
    out = tmp_path_factory.mktemp("crops") / request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISARD_MODELS", str(shared_data / "models"))
        visard("prepare", lfw, out, "--detector", request.param)
    yield out
    shutil.rmtree(out)


@pytest.mark.timeout(1800)
def test_an_outside_network_has_its_accuracy_on_lfw(
    shared_data: Path, network: Path, crops: Path, tmp_path: Path
) -> None:
    assert json.loads((crops / "report.json").read_text())["left_out"] == 0
    assert accuracy(network / "y1", crops, shared_data, tmp_path / "torch") >= LEAST_ACCURACY


@pytest.mark.timeout(1800)
def test_its_export_has_the_same_accuracy(shared_data: Path, network: Path, crops: Path, tmp_path: Path) -> None:
    assert accuracy(network / "y1.onnx", crops, shared_data, tmp_path / "onnx") >= LEAST_ACCURACY


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_mtcnn_killed_and_resumed_gives_the_same_folder(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times kill -9 at random moments, on the first 25 people of celeba300."""
    monkeypatch.setenv("VISARD_MODELS", str(shared_data / "models"))
    with tarfile.open(shared_data / "celeba300.tar") as archive:
        archive.extractall(tmp_path / "all", filter="data")
    (inner,) = (tmp_path / "all").iterdir()
    source = tmp_path / "src"
    for person in sorted(inner.iterdir())[:25]:
        shutil.copytree(person, source / person.name)
    visard("prepare", source, tmp_path / "whole", "--detector", "mtcnn", "--processes", "1")

    out, moments, met = tmp_path / "out", random.Random(0), 0
    command = shlex.join([sys.executable, "-m", "visard.cli", "prepare", str(source), str(out), "--detector", "mtcnn"])
    for processes in (1, 2, 2, 1):
        before = len(list(tmp_path.glob("out.partial/shard-*")))
        process = subprocess.Popen(
            shlex.split(f"{command} --processes {processes}"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 300
        while process.poll() is None and len(list(tmp_path.glob("out.partial/shard-*"))) <= before:
            assert time.monotonic() < until
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.5))
        process.kill()
        met += process.wait() == -signal.SIGKILL
    assert met == 4, "the work was done before it was killed often enough"
    assert not out.exists()
    visard("prepare", source, out, "--detector", "mtcnn", "--processes", "2")
    assert contents(out) == contents(tmp_path / "whole")
