"""Reports: from run folders and results to one page; every number that is shown is looked up in its source."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.test_pages import Checked
from visard.cli import main as visard
from visard.config import Recipe, to_dict
from visard.errors import FormatError, UserError
from visard.pages import write_image
from visard.protocols.pairs import draw_pairs, evaluate_pairs
from visard.records import Embeddings, Result
from visard.report import figures
from visard.report.figures import Line
from visard.report.sources import read_sources


def make_run(folder: Path, epochs: int = 4, sets: tuple[str, ...] = ("unseen",)) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(to_dict(Recipe(name="tiny <b>"))))
    (folder / "log.txt").write_text(
        "2026-01-01 00:00:00 tiny: 3 M parameters on 1 x cpu\n2026-01-01 00:00:01 step 1 epoch 0\n"
    )
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 10 * epochs + 1):
            row = {
                "kind": "train",
                "step": step,
                "epoch": step / 10,
                "loss": 40.0 - step,
                "lr": 0.1,
                "cos_target": 0.01 * step,
            }
            file.write(json.dumps({**row, "gradient_norm": 2.0, "images_per_second": 100.0 + step}) + "\n")
            if step % 10 == 0:
                scores = {f"{name}/accuracy": 0.5 + 0.01 * step for name in sets}
                file.write(json.dumps({"kind": "val", "step": step, "epoch": step / 10, "score": 0.5, **scores}) + "\n")
    return folder


def make_result(folder: Path, *, pictures: bool = True, noise: float = 1.5) -> Result:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(40), 6)
    vectors = generator.normal(size=(40, 16))[labels] + noise * generator.normal(size=(240, 16))
    ids = tuple(f"person_{label:02d}/person_{label:02d}_{row}.jpg" for row, label in enumerate(labels))
    embeddings = Embeddings(vectors.astype(np.float32), ids, labels, {})
    result = evaluate_pairs(embeddings, draw_pairs(labels, ids, 400), fars=(1e-1, 1e-2, 1e-3), examples=3)
    (folder / "pictures").mkdir(parents=True)
    for kind, examples in result.examples.items():
        for place, example in enumerate(examples):
            if pictures:
                example["picture"] = f"pictures/{kind}_{place}.jpg"
                write_image(folder / example["picture"], np.full((8, 16, 3), 99, np.uint8))
    (folder / "result.json").write_text(result.to_json())
    return result


def test_a_run_and_a_result_on_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", sets=("unseen", "other"))
    result = make_result(tmp_path / "evaluation")
    out = tmp_path / "pages" / "report.html"
    arguments = ["report", str(run), str(tmp_path / "evaluation" / "result.json"), str(out), "--json"]
    assert visard(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"out": str(out), "runs": ["run"], "results": ["evaluation"]}
    document = out.read_text()
    page = Checked(document)
    accuracy, deviation = result.metrics["accuracy"], result.metrics["accuracy_std"]
    assert f"{100 * accuracy:.2f} ± {100 * deviation:.2f} %" in page.text
    assert f"{100 * result.metrics['tar@far=1e-2']:.2f} %" in page.text
    assert f"{result.metrics['threshold@far=1e-2']:.4f}" in page.text
    assert "TAR at FAR 1e-3 undefined" in page.text
    assert "90.00 %" in page.text  # the best accuracy of the run
    assert "121" in page.text  # the median of 101 ... 140 images a second
    assert "tiny: 3 M parameters on 1 x cpu" in page.text
    assert "step 1 epoch 0" not in page.text
    assert "tiny <b>" in page.text
    assert page.tags.count("svg") == 8  # loss, accuracy, cosine, rate, gradient, speed; ROC, scores
    assert page.tags.count("img") == 6
    assert all(a.startswith(("data:image/", "#")) for a in page.addresses)
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]


def test_several_runs_and_results_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name / "run")
        make_result(tmp_path / name / "evaluation", pictures=False)
    out = tmp_path / "report.html"
    paths = [str(tmp_path / name / kind) for kind in ("run", "evaluation") for name in ("a", "b")]
    assert visard(["report", *paths, str(out)]) == 0
    page = Checked(out.read_text())
    for name in ("a/run", "b/run", "a/evaluation", "b/evaluation", "a/run: unseen", "Scores of a/evaluation"):
        assert name in page.text
    assert page.tags.count("img") == 0


def test_the_ids_within_the_drawings_are_each_drawings_own(tmp_path: Path) -> None:
    lines = [Line("one", [0, 1, 2], [1.0, 0.5, 0.2])]
    drawings = [figures.curves(title, lines, x_name="x", y_name="y", markers=True) for title in ("first", "second")]
    first, second = (set(re.findall(r'\bid="([^"]+)"', drawing)) for drawing in drawings)
    assert first
    assert not first & second
    for drawing, ids in zip(drawings, (first, second), strict=True):
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', drawing))
        assert used
        assert used <= ids


def test_drawings_take_the_pages_colours_and_nothing_else() -> None:
    lines = [Line(f"line {place}", [0, 1], [0.0, place]) for place in range(8)]
    stairs = Line("genuine", [0.1, 0.2, 0.3], [1, 2, 3]), Line("impostor", [0.1, 0.2, 0.3], [5, 1, 0])
    for drawing in (
        figures.curves("t", lines, x_name="x", y_name="y"),
        figures.roc("t", [Line("roc", [0.0, 0.01, 1.0], [0.2, 0.6, 1.0])]),
        figures.score_histogram("t", *stairs, 0.25),
    ):
        assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", drawing)) == set()
        assert "var(--series-1)" in drawing
        assert "var(--line)" in drawing
        Checked(drawing)


def test_a_title_in_a_drawing_is_escaped() -> None:
    drawing = figures.curves('<i> "&', [Line("<b>", [0, 1], [0, 1]), Line("b", [0], [1])], x_name="x", y_name="y")
    assert "<i>" not in drawing
    assert "<b>" not in drawing
    Checked(drawing)


def test_a_curve_may_have_undefined_points() -> None:
    assert "svg" in figures.curves("t", [Line("a", [0, 1, 2], [1.0, None, 2.0])], x_name="x", y_name="y")
    assert "svg" in figures.curves("t", [Line("a", [0], [None])], x_name="x", y_name="y")


def test_a_run_that_has_only_begun_or_was_cut_off(tmp_path: Path) -> None:
    run = make_run(tmp_path / "new", epochs=1)
    (run / "metrics.jsonl").unlink()
    (run / "log.txt").unlink()
    assert visard(["report", str(run), str(tmp_path / "new.html")]) == 0
    assert "svg" not in Checked((tmp_path / "new.html").read_text()).tags
    cut = make_run(tmp_path / "cut", epochs=1)
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 11')
    runs, _ = read_sources([cut])
    assert runs[0].train[-1]["step"] == 10
    (cut / "metrics.jsonl").write_text('{"kind"\n{"kind": "train"}\n')
    with pytest.raises(FormatError, match="line 1 is not JSON"):
        read_sources([cut])


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")

    def refused(*arguments: str) -> str:
        assert visard(["report", *arguments]) == 2
        return capsys.readouterr().err

    assert "must end in .html" in refused(str(run), str(tmp_path / "x.pdf"))
    assert "at least one run or result" in refused(str(tmp_path / "x.html"))
    assert "neither a run" in refused(str(tmp_path / "none"), str(tmp_path / "x.html"))
    assert "named twice" in refused(str(run), str(run), str(tmp_path / "x.html"))
    (run / "recipe.json").write_text("[]")
    with pytest.raises(FormatError, match="expected an object"):
        read_sources([run])
    make_result(tmp_path / "r")
    next((tmp_path / "r" / "pictures").iterdir()).unlink()
    assert "named by" in refused(str(tmp_path / "r"), str(tmp_path / "x.html"))
    assert not (tmp_path / "x.html").exists()
    (tmp_path / "r" / "result.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_sources([tmp_path / "r"])
