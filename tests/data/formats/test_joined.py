"""Several data sets as one: weights, names, labels, and that a batch of it is what the sources give."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.formats.crops import S, encoded
from visard.config import DataConfig
from visard.data.dataset import JoinedDataset, open_dataset
from visard.data.formats.joined import Source
from visard.data.loader import Loader, batches
from visard.data.sampler import EpochSampler
from visard.data.writer import DatasetWriter
from visard.errors import FormatError, UserError


def write(path: Path, names: list[str], seed: int) -> Path:
    with DatasetWriter(path, S, {}) as writing:
        for i, name in enumerate(names):
            place = np.full((5, 2), seed + i, np.float32)
            writing.add(f"{name}/{i}.jpg", name, encoded(seed + i), place)
    return path


@pytest.fixture
def two(tmp_path: Path) -> Path:
    write(tmp_path / "a", ["ann", "ann", "bob"], 0)
    write(tmp_path / "b", ["bob", "eve", "eve", "eve"], 10)
    return tmp_path


def test_apart_and_merged(two: Path) -> None:
    source = f"{two}/a + {two}/b"
    data = open_dataset(source)
    assert isinstance(data, JoinedDataset)
    assert list(data.identities) == ["a/ann", "a/bob", "b/bob", "b/eve"]
    assert data.labels.tolist() == [0, 0, 1, 2, 3, 3, 3]
    assert list(data.ids)[:4] == ["a/ann/0.jpg", "a/ann/1.jpg", "a/bob/2.jpg", "b/bob/0.jpg"]
    merged = open_dataset(source, same_names="merge")
    assert list(merged.identities) == ["ann", "bob", "eve"]
    assert merged.labels.tolist() == [0, 0, 1, 1, 2, 2, 2]


def test_numbered_identities_are_never_merged(two: Path) -> None:
    for name in "ab":
        for file in ("dataset.json", "ids.txt", "identities.txt"):
            (two / name / file).unlink()
    data = open_dataset(f"{two}/a + {two}/b", same_names="merge")
    assert list(data.identities) == ["a/0", "a/1", "b/0", "b/1"]


def test_weights(two: Path) -> None:
    data: Any = open_dataset(f"{two}/a * 2 + {two}/b * 0.5")
    assert len(data) == 6 + 2
    assert list(data.ids[:6]) == [f"a/{i}{n}" for n in ("", "#1") for i in ("ann/0.jpg", "ann/1.jpg", "bob/2.jpg")]
    assert len(set(data.ids)) == 8
    assert [data.encoded(i) for i in range(3)] == [data.encoded(i) for i in range(3, 6)]
    assert data.labels.tolist()[:6] == [0, 0, 1] * 2
    assert list(open_dataset(f"{two}/b * 0.5 + {two}/a").ids[:2]) == list(data.ids[6:])  # always the same ones
    more: Any = open_dataset(f"{two}/b * 2.5 + {two}/a")
    assert len(more) == 10 + 3
    assert sorted(i.count("#") for i in more.ids[:10]) == [0] * 4 + [1] * 6
    assert {i.rpartition("#")[2] for i in more.ids[8:10]} == {"2"}


def test_batches_are_what_the_sources_give(two: Path) -> None:
    data = open_dataset(f"{two}/a + {two}/b * 2 + rendered:2x2", size=S)
    (batch,) = batches(data, 100)
    assert len(batch) == len(data) == 3 + 8 + 4
    for i in range(len(data)):
        assert (batch.images[i].numpy() == data.image(i)).all()
        points = data.points(i)
        assert points is not None
        assert batch.points is not None
        np.testing.assert_array_equal(batch.points[i].numpy(), points)
    names = [data.identities[label] for label in batch.labels[-4:]]
    assert names == ["rendered-2x2/0000000"] * 2 + ["rendered-2x2/0000001"] * 2
    config = DataConfig(size=S, flip_probability=0.5)
    seen = [b.ids for b in Loader(data, config, EpochSampler(len(data), 5, 0))]
    assert sorted(i for ids in seen for i in ids) == sorted(data.ids)
    again = pickle.loads(pickle.dumps(data))
    assert (again.image(5) == data.image(5)).all()
    assert list(again.ids) == list(data.ids)


def test_a_json_file_of_sources(two: Path) -> None:
    entries = [{"source": "a", "name": "first", "weight": 2}, {"source": "b"}, {"source": "rendered:1x1"}]
    (two / "mix.json").write_text(json.dumps({"sources": entries, "same_names": "merge"}))
    data = open_dataset(two / "mix.json", size=S)
    assert len(data) == 6 + 4 + 1
    assert data.ids[0] == "first/ann/0.jpg"
    assert list(data.identities) == ["ann", "bob", "eve", "0000000"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "cannot be read as JSON"),
        ([], "expected"),
        ({"sources": [{"source": "a"}], "weights": []}, "expected"),
        ({"sources": [{"source": "a", "weihgt": 2}]}, "unknown key 'weihgt'"),
        ({"sources": [{"source": "a"}], "same_names": "both"}, "same_names is 'both'"),
        ({"sources": []}, "at least one source"),
        ({"sources": [{"source": "a"}, {"source": "../x/a"}]}, "no such file"),
        ({"sources": [{"source": "a"}, {"source": "a"}]}, "two sources have the same name"),
        ({"sources": [{"source": "mix.json"}]}, "is one data set"),
        ({"sources": [{"source": "x + mix.json"}]}, "is one data set"),
        ({"sources": [{"source": "a", "weight": 0}]}, "its weight is 0"),
        ({"sources": [{"source": "a", "weight": 0.1}]}, "leaves none"),
    ],
)
def test_mistakes_are_named(two: Path, value: Any, message: str) -> None:
    (two / "mix.json").write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(UserError, match=message):
        open_dataset(two / "mix.json")


def test_more_mistakes(two: Path) -> None:
    write(two / "c", ["x"], 0)
    with pytest.raises(UserError, match="'two' is no weight"):
        open_dataset(f"{two}/a * two + {two}/b")
    with pytest.raises(UserError, match="a source is missing"):
        open_dataset(f"{two}/a + ")
    with DatasetWriter(two / "big", 2 * S, {}) as writing:
        writing.add("1", "p", encoded(0, size=2 * S))
    with pytest.raises(UserError, match="differ in size"):
        open_dataset(f"{two}/a + {two}/big")
    assert open_dataset(f"{two}/a + {two}/big", size=S, resize=True).image(3).shape == (S, S, 3)
    with pytest.raises(UserError, match="its images are no files"):
        open_dataset(f"{two}/a + rendered:1x1", size=S).encoded(3)  # type: ignore[attr-defined]


def test_a_path_with_a_plus_is_a_path(two: Path) -> None:
    (two / "a").rename(two / "a + b")
    assert len(open_dataset(two / "a + b")) == 3


def test_one_source_is_itself(two: Path) -> None:
    data = open_dataset(two / "a")
    joined = JoinedDataset([Source(name="a", dataset=data)], "merge")
    assert joined.labels.tolist() == data.labels.tolist()
    assert list(joined.identities) == list(data.identities)


def test_a_broken_image_is_named_through_the_join(two: Path) -> None:
    path = two / "b" / "train.rec"
    path.write_bytes(path.read_bytes().replace(b"\xff\xd8\xff", b"\xff\xd8\x00"))
    with pytest.raises(FormatError, match=r"b/train\.rec at byte \d+"):
        open_dataset(f"{two}/a + {two}/b").image(4)
