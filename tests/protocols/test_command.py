"""`visard evaluate pairs` from end to end: a model, embeddings, lists, missing images, and what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from visard.cli import main as visard
from visard.config import IResNetConfig
from visard.data.formats.pair_bin import write_bin
from visard.protocols import inputs
from visard.records import Result

PEOPLE, IMAGES, SIZE = 8, 4, 32


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights and a folder of "people": each a colour, with noise."""
    from visard.backbones import build
    from visard.runtime import save_model, spec_for

    folder = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    config = IResNetConfig(blocks=(1, 1, 1, 1), width=8, embedding_dim=16, input_size=SIZE)
    save_model(build(config), spec_for(config), folder / "model")
    generator = np.random.default_rng(0)
    for person in range(PEOPLE):
        (folder / "data" / f"p{person}").mkdir(parents=True)
        face = generator.integers(0, 256, (4, 4, 3))
        for image in range(IMAGES):
            noisy = np.clip(face + generator.normal(0, 30, face.shape), 0, 255).astype(np.uint8)
            smooth = cv2.resize(noisy, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
            cv2.imwrite(str(folder / "data" / f"p{person}" / f"{image}.png"), smooth)
    return folder


def answer(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict:
    assert visard(["evaluate", "pairs", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert visard(["evaluate", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    error = captured.err.strip().splitlines()[-1]
    assert error.startswith("visard evaluate: ")
    return error


def test_a_model_on_drawn_pairs_with_everything_written(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    basic = [made / "model", made / "data", "--count", "40", "--folds", "4", "--out", out]
    value = answer(capsys, *basic, "--examples", "2")
    assert value["counts"]["genuine"] == value["counts"]["impostor"] == 40
    assert value["metrics"]["accuracy"] > 0.9
    assert value["settings"]["folds"] == 4
    assert value["settings"]["data"] == str(made / "data")
    written = Result.from_json((out / "result.json").read_text())
    assert json.loads(written.to_json()) == value
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    kinds = ("genuine", "impostor")
    pictures = [f"pictures/hardest_{kind}_{place:02d}.jpg" for kind in kinds for place in (1, 2)]
    assert names == sorted(["result.json", *(f"hardest_{kind}.jpg" for kind in kinds), *pictures])
    example = value["examples"]["hardest_genuine"][0]
    strip = cv2.imread(str(out / example["picture"]))
    left, right = (cv2.imread(str(made / "data" / example[side])) for side in ("left", "right"))
    assert strip.shape == (SIZE, 2 * SIZE, 3)
    assert np.abs(strip.astype(int) - np.concatenate([left, right], axis=1)).mean() < 6
    again = answer(capsys, *basic, "--no-pictures")
    assert again["metrics"] == value["metrics"]


def test_embeddings_give_the_models_answer(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert visard(["embed", str(made / "model"), str(made / "data"), str(tmp_path / "e"), "--flip", "sum"]) == 0
    capsys.readouterr()
    options = ["--count", "30", "--folds", "3", "--fars", "0.1", "0.01"]
    direct = answer(capsys, made / "model", made / "data", "--flip", "sum", *options)
    stored = answer(capsys, tmp_path / "e", *options)
    assert stored["metrics"] == direct["metrics"]
    assert set(stored["metrics"]) >= {"tar@far=1e-1", "tar@far=1e-2"}
    assert stored["spec_hash"] == direct["spec_hash"] != ""
    error = refused(capsys, "pairs", tmp_path / "e", "--flip", "concat")
    assert "made with flip sum" in error
    shutil.copytree(made / "data" / "p0", tmp_path / "other" / "p0")
    error = refused(capsys, "pairs", tmp_path / "e", tmp_path / "other", *options)
    assert "other: is not what" in error
    assert "such as p1/0.png" in error


def test_two_models_on_the_same_pairs(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The difference is that of both accuracies; a model against itself differs by nothing."""
    from visard.backbones import build
    from visard.runtime import save_model, spec_for

    torch.manual_seed(5)
    config = IResNetConfig(blocks=(1, 1, 1, 1), width=8, embedding_dim=16, input_size=SIZE)
    save_model(build(config), spec_for(config), tmp_path / "other")
    drawn = ["--count", "40", "--folds", "4"]
    first, second = (answer(capsys, m, made / "data", *drawn) for m in (made / "model", tmp_path / "other"))
    both = answer(capsys, made / "model", made / "data", *drawn, "--against", tmp_path / "other")
    values = both["metrics"]
    assert values["accuracy_against"] == pytest.approx(second["metrics"]["accuracy"])
    difference = first["metrics"]["accuracy"] - second["metrics"]["accuracy"]
    assert values["accuracy_difference"] == pytest.approx(difference)
    low, high = both["intervals"]["accuracy_difference"]
    assert low < difference < high
    assert all(first["metrics"][name] == values[name] for name in first["metrics"])
    visard(["embed", str(made / "model"), str(made / "data"), str(tmp_path / "e"), "--flip", "sum"])
    text = ["evaluate", "pairs", str(tmp_path / "e"), *drawn, "--against", str(tmp_path / "e")]
    capsys.readouterr()
    assert visard(text) == 0
    assert "difference +0.000 points, 95 % +0.00 to +0.00 (paired bootstrap): no difference" in capsys.readouterr().out
    error = refused(capsys, "pairs", made / "model", made / "data", "--against", tmp_path / "e")
    assert "embeddings with flip sum" in error
    assert "embed both alike" in error


def test_a_bad_list_is_noticed_before_anything_is_embedded(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "embed_dataset", lambda *_: pytest.fail("embedded in vain"))
    (tmp_path / "pairs.txt").write_text("p0/0.png nobody/1.png 1\n")
    assert "nobody/1.png" in refused(capsys, "pairs", made / "model", made / "data", "--pairs", tmp_path / "pairs.txt")


def test_the_text_says_what_is_undefined_and_what_is_less_than_asked(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert visard(["evaluate", "pairs", str(made / "model"), str(made / "data")]) == 0
    text = capsys.readouterr().out
    assert "accuracy" in text
    assert "TAR at FAR 1e-6   undefined" in text
    assert "at least 1,000,000 are needed" in text
    assert "3,000 pairs of each kind were asked for" in text
    assert "4 folds instead of 10" in text


def test_a_list_with_missing_images(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"p{k}/0 p{k}/1 1 {k % 2}\np{k}/2 p{(k + 1) % PEOPLE}/3 0 {k % 2}\n" for k in range(PEOPLE)]
    (tmp_path / "pairs.txt").write_text("".join(lines) + "p0/0 gone/9 1 0\n")
    basic = [made / "model", made / "data", "--pairs", tmp_path / "pairs.txt"]
    error = refused(capsys, "pairs", *basic)
    assert "gone/9" in error
    assert "--missing skip" in error
    skipped = answer(capsys, *basic, "--missing", "skip")
    wrong = answer(capsys, *basic, "--missing", "wrong")
    assert (skipped["counts"]["pairs"], wrong["counts"]["pairs"]) == (16, 17)
    assert skipped["counts"]["pairs_missing"] == wrong["counts"]["pairs_missing"] == 1
    assert wrong["metrics"]["accuracy"] < skipped["metrics"]["accuracy"]
    assert visard(["evaluate", "pairs", *map(str, basic), "--missing", "wrong"]) == 0
    assert "1 of 17 pairs name an image that is not there: counted as wrong" in capsys.readouterr().out


def test_mistakes_are_one_line(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "which protocol" in refused(capsys)
    assert "unknown protocol 'pear'" in refused(capsys, "pear", "x")
    basic = ["pairs", made / "model", made / "data"]
    assert "name the data set" in refused(capsys, "pairs", made / "model")
    assert "not found" in refused(capsys, "pairs", tmp_path / "none", made / "data")
    assert "no such file of pairs" in refused(capsys, *basic, "--pairs", tmp_path / "p.txt")
    assert "above 0" in refused(capsys, *basic, "--fars", "2.0")
    assert "at least 2" in refused(capsys, *basic, "--folds", "1")


def write_bin_of(folder: Path, same: list[bool], path: Path) -> None:
    """A .bin set of the folder's images: pair k is of persons k and k, or k and k + 1."""
    images = []
    for k, answer in enumerate(same):
        person = k % PEOPLE
        images.append((folder / f"p{person}" / f"{k % IMAGES}.png").read_bytes())
        other = person if answer else (person + 1) % PEOPLE
        images.append((folder / f"p{other}" / f"{(k + 1) % IMAGES}.png").read_bytes())
    write_bin(path, images, same)


def test_a_bin_set_has_its_own_pairs(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = [True, False] * 20
    write_bin_of(made / "data", same, tmp_path / "lfw.bin")
    value = answer(capsys, made / "model", tmp_path / "lfw.bin", "--out", tmp_path / "out", "--examples", "1")
    assert (value["counts"]["genuine"], value["counts"]["impostor"]) == (20, 20)
    assert value["settings"]["folds"] == 10
    assert value["settings"]["pairs"] == "lfw.bin"
    assert value["metrics"]["accuracy"] > 0.8
    assert (tmp_path / "out" / "pictures" / "hardest_genuine_01.jpg").is_file()
    # The same from its embeddings, and no others.
    assert visard(["embed", str(made / "model"), str(tmp_path / "lfw.bin"), str(tmp_path / "e")]) == 0
    capsys.readouterr()
    assert answer(capsys, tmp_path / "e", tmp_path / "lfw.bin")["metrics"] == value["metrics"]
    write_bin_of(made / "data", same[:10], tmp_path / "other.bin")
    error = refused(capsys, "pairs", tmp_path / "e", tmp_path / "other.bin")
    assert "other.bin: is not what" in error


def test_a_bin_set_without_impostors_is_undefined(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bin_of(made / "data", [True] * 6, tmp_path / "genuine.bin")
    out = tmp_path / "out"
    arguments = ["evaluate", "pairs", str(made / "model"), str(tmp_path / "genuine.bin"), "--out", str(out)]
    assert visard(arguments) == 0
    shown = capsys.readouterr().out
    assert "6 pairs (6 genuine, 0 impostor)" in shown
    assert "undefined: there is no impostor pair" in shown
    assert visard(["report", str(out / "result.json"), str(tmp_path / "report.html")]) == 0


def test_help_lists_the_protocols(capsys: pytest.CaptureFixture[str]) -> None:
    assert visard(["evaluate", "--help"]) == 0
    assert "pairs" in capsys.readouterr().out
