"""Every command in the bash blocks of README.md and of `PAGES` is run, on rendered people's photographs.

The detector's weights are no part of the project, so `prepare` gets the rendered truth as another detector's points
(`--detections`); with the weights at hand the same page runs through YuNet.
Training is cut to a few steps: what is tested is that what the page says can be typed.
"""

from __future__ import annotations

import csv
import re
import shlex
import shutil
from pathlib import Path

import pytest

from visard.align import models
from visard.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/own-data.md", "docs/masks.md", "docs/distill.md")
CALLED = {"photographs": ("anna", "boris", "eva"), "others": ("clara", "dan", "fay", "gil")}


def commands(page: str) -> list[str]:
    """The visard commands in the page's bash blocks, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip().startswith("visard ")]


def render_photographs(folder: str, first_identity: int) -> None:
    """OUT/<name>/{a,b,c,...}.jpg and `OUT.csv` with the true points in the form of a detector's."""
    names = CALLED[folder]
    arguments = f"render {folder} --photographs --identities {len(names)} --images-per-identity 5 --strangers 0"
    assert main(shlex.split(f"{arguments} --first-identity {first_identity}")) == 0
    renamed = {}
    for person, name in zip(sorted(p for p in Path(folder).iterdir() if p.is_dir()), names, strict=True):
        for image, letter in zip(sorted(person.iterdir()), "abcde", strict=True):
            renamed[f"{person.name}/{image.name}"] = f"{name}/{letter}.jpg"
            image.rename(image.with_name(f"{letter}.jpg"))
        person.rename(person.with_name(name))
    truth = Path(folder, "points.csv")
    with truth.open(newline="") as source, Path(f"{folder}.csv").open("w", newline="") as target:
        reader, writer = csv.reader(source), csv.writer(target)
        next(reader)
        writer.writerow(["id", *(f"{axis}{k}" for k in range(1, 6) for axis in "xy")])
        writer.writerows([renamed[image_id], *points] for image_id, *points in reader)
    truth.unlink()


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reader's folder, rendered once."""
    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        render_photographs("photographs", 500)
        render_photographs("others", 900)
    return folder


@pytest.fixture
def photographs(rendered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of it to work in."""
    shutil.copytree(rendered, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def run_page(page: str, monkeypatch: pytest.MonkeyPatch, *, true_points: bool) -> None:
    pairs = re.search(r"```text pairs.txt\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    if pairs:
        Path("pairs.txt").write_text(pairs.group(1))
    found = commands(page)
    assert found
    for line in found:
        words = shlex.split(line)[1:]
        if words[0] == "prepare" and true_points:
            words += ["--detections", f"{words[1]}.csv"]
        if words[0] == "train" and "--resume" not in words:
            words += ["--schedule.max-steps", "3", "--run.batch-global", "4"]
            words += ["--run.val-pairs", "20"] if "--val" in words else []
        if words[:2] == ["models", "pull"]:
            # The download itself is tested against a loopback server in tests/align.
            assert set(words[2:]) <= {w.detector for w in models.WEIGHTS.values()} | set(models.WEIGHTS)
            continue
        assert main(words) == 0, line


@pytest.mark.usefixtures("photographs")
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_page_runs(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page(page, monkeypatch, true_points=True)


@pytest.mark.real_data
@pytest.mark.usefixtures("photographs")
def test_the_page_runs_through_a_detector(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISARD_MODELS", str(shared_data / "models"))
    run_page("docs/own-data.md", monkeypatch, true_points=False)


def test_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split("train scratch_tiny --data rendered:4x6 --out run --schedule.max-steps 1")) == 0
    assert main(["export", "run", "mine.onnx"]) == 0
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/own-data.md").read_text(), re.DOTALL)
    assert code
    names: dict[str, object] = {}
    exec(compile(code.group(1), "docs/own-data.md", "exec"), names)
    assert isinstance(names["similarity"], float)


@pytest.mark.parametrize("page", [*sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md")), "README.md"])
def test_the_page_names_what_exists(page: str) -> None:
    """Commands named in any page are commands; links to other pages and pictures lead somewhere."""
    text = (ROOT / page).read_text()
    for name in re.findall(r"`visard ([a-z]+)", text):
        assert name in COMMANDS, name
    for link in re.findall(r"\]\(([^)#]+)", text):
        if not link.startswith("http"):
            assert ((ROOT / page).parent / link).exists(), link
