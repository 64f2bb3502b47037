"""`data.broken = skip`: the next good image, the same at any number of processes, and counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.data.formats.crops import S, encoded
from visard.config import DataConfig
from visard.data.broken import readable
from visard.data.dataset import open_dataset
from visard.data.loader import Loader
from visard.data.sampler import EpochSampler
from visard.data.writer import DatasetWriter
from visard.errors import FormatError

BROKEN = {3, 4, 11}
N = 12


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with DatasetWriter(tmp_path / "set", S, {}) as writing:
        for i in range(N):
            data = encoded(i)
            writing.add(str(i), str(i // 3), data[:-5] if i in BROKEN else data)
    return tmp_path / "set"


def test_the_next_good_one(path: Path) -> None:
    data = open_dataset(path)
    indices, problems = readable(data, np.array([2, 3, 4, 11, 3]))
    assert indices.tolist() == [2, 5, 5, 0, 5]
    assert len(problems) == 4
    assert all("train.rec at byte" in str(problem) for problem in problems)


def test_an_end_to_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visard.data.broken.IN_A_ROW", 2)
    with pytest.raises(FormatError, match="cut off"):
        readable(open_dataset(path), np.array([3]))


def test_the_loader_stops_unless_asked(path: Path) -> None:
    data = open_dataset(path)
    with pytest.raises(FormatError, match="cut off"):
        list(Loader(data, DataConfig(size=S), EpochSampler(N, 4, 0)))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_do_not_depend_on_ranks_or_workers(
    path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data = open_dataset(path)
    config = DataConfig(size=S, broken="skip", workers=workers)
    whole = list(Loader(data, DataConfig(size=S, broken="skip"), EpochSampler(N, 6, 0)))
    shares = [list(Loader(data, config, EpochSampler(N, 6, 0, rank, 2))) for rank in range(2)]
    for step, batch in enumerate(whole):
        ids = shares[0][step].ids + shares[1][step].ids
        assert batch.ids == ids
        assert batch.labels.tolist() == [int(i) // 3 for i in ids]
        images = np.concatenate([share[step].images.numpy() for share in shares])
        assert (batch.images.numpy() == images).all()
    seen = [i for batch in whole for i in batch.ids]
    assert sorted(seen, key=int) == ["0", "0", "1", "2", "5", "5", "5", "6", "7", "8", "9", "10"]
    capsys.readouterr()
    loader = Loader(data, config, EpochSampler(N, 6, 0))
    for _ in range(2):
        list(loader)
    assert sorted(loader.broken.values()) == [2, 2, 2]
    assert capsys.readouterr().err.count("the next good image takes its place") == 3


def test_a_training_run_with_broken_images(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from visard.cli import main as visard

    with DatasetWriter(tmp_path / "faces", 64, {}) as writing:
        for i in range(N):
            data = encoded(i, size=64)
            writing.add(str(i), str(i // 3), data[:-5] if i in BROKEN else data)
    command = ["train", "scratch_tiny", "--data", str(tmp_path / "faces"), "--data.size", "64", "--json"]
    command += ["--backbone.input-size", "64", "--run.batch-global", "4", "--epochs", "1", "--run.no-tensorboard"]
    assert visard([*command, "--out", str(tmp_path / "stopped")]) == 2
    assert "the JPEG is cut off" in capsys.readouterr().err.strip().splitlines()[-1]
    assert visard([*command, "--out", str(tmp_path / "run"), "--data.broken", "skip"]) == 0
    captured = capsys.readouterr()
    assert "the next good image takes its place" in captured.err
    assert json.loads(captured.out)["last"]
