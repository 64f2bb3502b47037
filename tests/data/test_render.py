"""`visard render`: what lies on disk is what the data set shows; interrupted work leaves nothing half-written and goes
on.
"""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

from visard.cli import main as command
from visard.data import render
from visard.data.dataset import open_dataset
from visard.data.render import RenderConfig, main
from visard.data.rendered import RenderedFaces
from visard.errors import Interrupted, UserError


def small(out, **settings):
    return RenderConfig(**{"out": out, "identities": 3, "images_per_identity": 2, "size": 48, **settings})


def read_points(path):
    with open(path / "points.csv", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    return {row[0]: np.array(row[1:], float).reshape(-1, 2) for row in rows}


def test_records_are_a_prepared_data_set(tmp_path):
    answer = main(small(tmp_path / "out", first_identity=5))
    data, expected = open_dataset(tmp_path / "out"), RenderedFaces(3, 2, size=48, first_identity=5)
    assert list(data.ids) == list(expected.ids)
    assert data.labels.tolist() == expected.labels.tolist()
    for k in range(6):
        np.testing.assert_allclose(data.points(k), expected.points(k), atol=1e-3)
        assert np.abs(data.image(k).astype(int) - expected.image(k)).mean() < 3
    assert answer.value["images"] == 6


def test_folder_holds_the_same_images_and_points(tmp_path):
    main(small(tmp_path / "out", format="folder"))
    expected = RenderedFaces(3, 2, size=48)
    points = read_points(tmp_path / "out")
    assert sorted(points) == [f"{name}.jpg" for name in expected.ids]
    for k, name in enumerate(expected.ids):
        image = cv2.imread(str(tmp_path / "out" / f"{name}.jpg"))[..., ::-1]
        assert np.abs(image.astype(int) - expected.image(k)).mean() < 3
        np.testing.assert_allclose(points[f"{name}.jpg"], expected.points(k), atol=2e-3)
    assert len(open_dataset(tmp_path / "out", size=48)) == 6


def test_photographs_show_nobody_somebody_or_two(tmp_path):
    config = small(tmp_path / "out", photographs=True, photograph_size=96, identities=10, strangers=0.4, empty=0.3)
    main(config)
    points = read_points(tmp_path / "out")
    faces = render._faces(config, np.arange(20))
    assert set(faces.tolist()) == {0, 1, 2}
    assert [len(p) for p in points.values()] == [5 if count else 0 for count in faces]
    assert all(((p > 0) & (p < 95)).all() for p in points.values())
    picture = cv2.imread(str(tmp_path / "out" / next(iter(points))))
    assert picture.shape == (96, 96, 3)


def test_processes_change_nothing(tmp_path):
    main(small(tmp_path / "one", format="folder"))
    main(small(tmp_path / "two", format="folder", workers=1))
    one, two = (sorted(p for p in (tmp_path / name).rglob("*") if p.is_file()) for name in ("one", "two"))
    assert [p.name for p in one] == [p.name for p in two]
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


class StopError(Exception):
    pass


def stop_after(monkeypatch, blocks):
    """Rendering breaks off after so many blocks, as by a power cut."""
    make = render._make_block
    made = []

    def breaks(task):
        if len(made) == blocks:
            raise StopError
        made.append(task)
        return make(task)

    monkeypatch.setattr(render, "_make_block", breaks)
    monkeypatch.setattr(render, "BLOCK", 2)
    return made


def test_an_interrupted_folder_goes_on(tmp_path, monkeypatch):
    config = small(tmp_path / "out", format="folder")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(StopError):
            main(config)
    assert not config.out.exists()
    with monkeypatch.context() as patch:
        made = stop_after(patch, 100)
        main(config)
        assert sum(len(indices) for _, indices in made) == 2
    assert len(open_dataset(config.out, size=48)) == 6
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not [p for p in config.out.rglob("*") if p.suffix not in (".jpg", ".csv") and p.is_file()]


def test_an_unfinished_folder_of_other_settings_is_not_continued(tmp_path, monkeypatch):
    config = small(tmp_path / "out", format="folder")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(StopError):
            main(config)
    with pytest.raises(UserError, match="other settings"):
        main(replace(config, seed=1))


def test_interrupted_records_leave_nothing(tmp_path, monkeypatch):
    config = small(tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(StopError):
            main(config)
    assert not list(tmp_path.iterdir())
    main(config)
    assert len(open_dataset(config.out)) == 6


@pytest.mark.parametrize(
    ("format", "said"), [("records", "nothing is kept"), ("folder", "kept in .*.out.partial, the same command goes on")]
)
def test_ctrl_c_says_what_is_left(tmp_path, monkeypatch, format, said):
    def interrupted(task):
        raise KeyboardInterrupt

    monkeypatch.setattr(render, "_make_block", interrupted)
    with pytest.raises(Interrupted, match=said):
        main(small(tmp_path / "out", format=format))
    assert [p.name for p in tmp_path.iterdir()] == ([] if format == "records" else [".out.partial"])


def test_an_existing_target_is_not_touched(tmp_path):
    with pytest.raises(UserError, match="exists already"):
        main(small(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"identities": 0}, "--identities is 0"),
        ({"first_identity": -1}, "--first-identity is -1"),
        ({"seed": 2**63}, "--seed is 9223372036854775808"),
        ({"quality": 0}, "--quality is 0"),
        ({"size": 4}, "--size is 4"),
        ({"photograph_size": 8, "photographs": True}, "--photograph-size is 8"),
        ({"empty": 0.5}, "--photograph-size, --strangers and --empty belong to --photographs"),
        ({"workers": -1}, "--workers is -1"),
        ({"strangers": float("nan"), "photographs": True}, "are shares"),
        ({"strangers": 0.7, "empty": 0.6, "photographs": True}, "exceed 1"),
    ],
)
def test_impossible_settings_are_named(tmp_path, settings, message):
    with pytest.raises(UserError, match=f"^{message}" if message.startswith("-") else message):
        small(tmp_path / "out", **settings)


def test_command_line(tmp_path, capsys):
    arguments = [
        "render",
        str(tmp_path / "out"),
        "--identities",
        "2",
        "--images-per-identity",
        "1",
        "--size",
        "32",
        "--json",
    ]
    assert command(arguments) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 2
    assert command(arguments) == 2
    assert "exists already" in capsys.readouterr().err
