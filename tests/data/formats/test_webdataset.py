"""webdataset itself reads the shards written here, and its shards are read here; skipped where it is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.formats.crops import S, encoded, points_of
from visard.data.dataset import open_dataset
from visard.data.formats.shards import ShardWriter

N = 11


@pytest.fixture
def wds() -> Any:
    return pytest.importorskip("webdataset", reason="webdataset is not installed")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own
def test_webdataset_reads_what_is_written_here(tmp_path: Path, wds: Any) -> None:
    with ShardWriter(tmp_path / "shards", shard_bytes=12_000) as writing:
        for i in range(N):
            points = points_of(i) if i % 3 else None
            writing.add(f"p{i // 4}/{i}.jpg", i // 4, f"p{i // 4}", encoded(i), points)
    names = sorted(map(str, (tmp_path / "shards").glob("*.tar")))
    assert len(names) > 1
    raw = list(wds.WebDataset(names, shardshuffle=False))
    assert [sample["jpg"] for sample in raw] == [encoded(i) for i in range(N)]
    assert [int(sample["cls"]) for sample in raw] == [i // 4 for i in range(N)]
    decoded = list(wds.WebDataset(names, shardshuffle=False).decode().to_tuple("cls", "json"))
    for i, (label, known) in enumerate(decoded):
        assert label == i // 4
        assert known["id"] == f"p{i // 4}/{i}.jpg"
        assert known["identity"] == f"p{i // 4}"
        assert ("points" in known) == bool(i % 3)
        if i % 3:
            np.testing.assert_allclose(known["points"], points_of(i))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_its_shards_are_read_here(tmp_path: Path, wds: Any) -> None:
    with wds.ShardWriter(str(tmp_path / "theirs-%06d.tar"), maxcount=4, verbose=0) as sink:
        for i in range(N):
            known = {"id": f"x/{i}", "identity": f"who {i // 4}", "points": points_of(i).tolist()}
            sink.write({"__key__": f"sample{i:06d}", "jpg": encoded(i), "cls": i // 4, "json": known})
    data: Any = open_dataset(str(tmp_path / "theirs-{000000..000002}.tar"))
    assert len(data) == N
    assert data.size == S
    assert list(data.ids) == [f"x/{i}" for i in range(N)]
    assert data.labels.tolist() == [i // 4 for i in range(N)]
    assert list(data.identities) == [f"who {k}" for k in range(3)]
    for i in range(N):
        assert data.encoded(i) == encoded(i)
        np.testing.assert_allclose(data.points(i), points_of(i), rtol=1e-6)
