"""`visard train`: recipes by name and file, overrides, mistakes in one line, and whole runs through the command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.training.conftest import PaintedFaces, assert_same_bits, weights_of
from tests.training.processes import ROOT
from visard.cli import main
from visard.config import Recipe, to_dict
from visard.errors import UserError
from visard.recipes import RECIPES, load_recipe
from visard.recipes.train import parse

RECIPE_FILE = '''
from dataclasses import replace
from pathlib import Path
from visard.config import *

def tiny():
    """Four blocks at 16 px."""
    return Recipe(
        name="tiny",
        data=DataConfig(source="", size=16),
        backbone=IResNetConfig(blocks=(1, 1, 1, 1), width=4, embedding_dim=16, input_size=16),
        head=HeadConfig(margin=MarginConfig(m2=0.2, scale=16.0)),
        optim=OptimConfig(lr=0.05),
        schedule=ScheduleConfig(epochs=2, warmup_epochs=0.5),
        run=RunConfig(
            batch_global=8, log_every=4, tensorboard=False, device="cpu", float32_matmul="highest", val_pairs=20
        ),
    )

def nothing():
    return 3
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.py, and painted faces as folders of PNG files: faces/ to train on, others/ to validate on."""
    root = tmp_path_factory.mktemp("work")
    (root / "tiny.py").write_text(RECIPE_FILE)
    for name, faces in (
        ("faces", PaintedFaces()),
        ("others", PaintedFaces(first=50, identities=tuple(f"other{i}" for i in range(6)))),
    ):
        for index, image_id in enumerate(faces.ids):
            path = root / name / image_id
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), np.ascontiguousarray(faces.image(index)[:, :, ::-1]))
    return root


@pytest.fixture
def work(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A fresh working directory that sees the files."""
    for name in ("tiny.py", "faces", "others"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe_of(*arguments: str) -> Recipe:
    request = parse(list(arguments))
    assert request is not None
    return request.recipe


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_name_a_line_and_its_own_run(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.run.out == Path("runs") / name


def test_recipe_from_a_file(work: Path) -> None:
    assert recipe_of("tiny.py:tiny", "--data", "faces").backbone.width == 4


def test_overrides_and_shortcuts() -> None:
    recipe = recipe_of(
        *("rendered_tiny", "--optim.lr", "0.3", "--backbone.blocks", "1", "2", "1", "1", "--data.resize"),
        *("--val", "a", "b::pairs.txt", "--out", "runs/x", "--data", "faces", "--epochs", "1.5", "--device", "cpu"),
        *("--head.margin.m2", "0.1", "--run.no-tensorboard", "--schedule.kind", "multistep"),
        *("--schedule.milestones", "1", "1.25"),
    )
    assert recipe.optim.lr == 0.3
    assert recipe.backbone.blocks == (1, 2, 1, 1)
    assert recipe.data.resize
    assert recipe.data.source == "faces"
    assert recipe.run.val == ("a", "b::pairs.txt")
    assert recipe.run.out == Path("runs/x")
    assert not recipe.run.tensorboard
    assert recipe.head.margin.m2 == 0.1
    assert (recipe.schedule.epochs, recipe.schedule.milestones) == (1.5, (1.0, 1.25))
    assert recipe.optim.momentum == load_recipe("rendered_tiny").optim.momentum


def test_another_kind_leaves_the_old_ones_fields_behind() -> None:
    multistep = "adaface_ms1mv2_r50_tiny"
    schedule = recipe_of(multistep, "--schedule.kind", "cosine").schedule
    assert (schedule.kind, schedule.milestones) == ("cosine", ())
    assert schedule.epochs == load_recipe(multistep).schedule.epochs
    schedule = recipe_of(multistep, "--schedule.kind=polynomial", "--schedule.power", "3").schedule
    assert (schedule.kind, schedule.power, schedule.milestones) == ("polynomial", 3, ())
    stairs = ("--schedule.kind", "multistep", "--schedule.milestones", "1", "2", "--schedule.gamma", "0.5")
    schedule = recipe_of("ms1mv3_r50_tiny", *stairs).schedule
    assert (schedule.kind, schedule.milestones, schedule.gamma) == ("multistep", (1, 2), 0.5)
    balanced = ("--data.sampler.kind", "balanced", "--data.sampler.power", "0.5")
    assert recipe_of("rendered_tiny", *balanced).data.sampler.power == 0.5


def test_a_setting_of_the_recipe_that_waits_for_an_option_is_no_mistake() -> None:
    assert recipe_of("ms1mv3_r50").run.evaluate_every == 2000
    assert recipe_of("scratch_tiny", "--val", "others", "--run.evaluate-every", "5").run.evaluate_every == 5
    jpeg = recipe_of("rendered_tiny", "--augment", "light", "--data.augment.jpeg.probability", "0").data.augment.jpeg
    assert jpeg.probability == 0


def test_dry_run_prints_the_recipe_and_needs_no_torch() -> None:
    code = (
        "import sys; from visard.cli import main;"
        "code = main(['train', 'rendered_tiny', '--dry-run', '--epochs', '3']);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schedule"]["epochs"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such"], "recipe 'no_such' is unknown; `visard recipes` lists them"),
        (["scratch_smal"], "recipe 'scratch_smal' is unknown; did you mean scratch_small?"),
        (["no_such.py:f"], "no_such.py: there is no such file"),
        (["tiny.py:absent"], "tiny.py: has no function 'absent'"),
        (["tiny.py:nothing"], "tiny.py:nothing: returned int, a recipe function returns"),
        (["rendered_tiny", "--optim.rate", "1"], "unknown option --optim.rate"),
        (["rendered_tiny", "--optim.momentun", "1"], "unknown option --optim.momentun; did you mean --optim.momentum?"),
        (["rendered_tiny", "--dataa", "x"], "unknown option --dataa; did you mean --data?"),
        (["rendered_tiny", "--data"], "--data needs a value behind it"),
        (["rendered_tiny", "--backbone.blocks", "1", "2"], "--backbone.blocks needs 4 values behind it"),
        (["rendered_tiny", "stray"], "'stray' is one argument too many (the recipe comes first"),
        (["rendered_tiny", "--optim.lr", "fast"], "--optim.lr fast: expected a number"),
        (["rendered_tiny", "--optim.lr", "-1"], "optim.lr is -1.0; it must be above 0"),
        (["rendered_tiny", "--epochs", "many"], "--epochs many: expected a number"),
        (["rendered_tiny", "--device", "tpu"], "command line: device: 'tpu' is not one of 'auto', 'cuda'"),
        (["rendered_tiny", "--data.size", "64"], "backbone.input_size 56 and data.size 64 differ"),
        (["rendered_tiny", "--schedule.power", "3"], "schedule.power belongs to kind polynomial"),
        (["rendered_tiny", "--schedule.gamma", "0.5"], "schedule.gamma belongs to kind multistep"),
        (["scratch_tiny", "--data", "faces", "--run.evaluate-every", "5"], "run.evaluate_every does nothing without"),
        (["scratch_tiny", "--data", "faces", "--run.val-pairs", "50"], "run.val_pairs does nothing: no validation"),
        (["rendered_tiny", "--val", "others::p.txt", "--run.val-pairs", "50"], "run.val_pairs does nothing: no valid"),
        (["rendered_tiny", "--run.init-network", "slim"], "run.init_network does nothing without a model"),
        (["rendered_tiny", "--run.init-centres", "in-order"], "run.init_centres does nothing without a model"),
        (["rendered_tiny", "--data.same-names", "merge"], "data.same_names does nothing: rendered:60x16 is a single"),
        (
            ["rendered_tiny", "--schedule.max-steps", "5", "--schedule.epochs", "7"],
            "schedule.epochs does nothing while schedule.max_steps is 5; use --epochs",
        ),
        (
            ["rendered_tiny", "--schedule.max-steps", "5", "--epochs", "7"],
            "--epochs and --schedule.max-steps 5 exclude",
        ),
        (["rendered_tiny", "--schedule.epochs", "6", "--epochs", "7"], "--epochs and --schedule.epochs are the same"),
        (["rendered_tiny", "--run.out", "a", "--out", "b"], "--out and --run.out are the same; give one"),
        (["rendered_tiny", "--run.started-in", "a"], "run.started_in is written by visard train itself"),
        (["rendered_tiny", "--overfit-batch", "--profile"], "--overfit-batch and --profile exclude each other"),
        (
            ["rendered_tiny", "--data.augment.jpeg.quality", "10", "20"],
            "data.augment.jpeg.quality does nothing while its probability is 0; give --data.augment.jpeg.probability",
        ),
        (["rendered_tiny", "--init", "nowhere"], "nowhere: not found; expected a run"),
        (["rendered_tiny", "--data", "nowhere"], "nowhere: there is no such file or folder"),
        (["rendered_tiny", "--val", "nowhere"], "nowhere: there is no such file or folder"),
        (["tiny.py:tiny"], "tiny has no data of its own; name yours with --data"),
        (["tiny.py:tiny", "--data", "faces", "--val", "others", "others"], "run.val: two sets have the same name"),
        (["--resume", "nowhere"], "nowhere: no run there (recipe.json is missing)"),
        ([], "train what? `visard recipes` lists the recipes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: list[str], message: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(work.rglob("*"))
    assert main(["train", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"visard train: {message}"), shown.err
    assert shown.err.count("\n") == 1
    assert sorted(work.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def tiny(:\n    pass\n", "wrong.py, line 1: invalid syntax"),
        ("x = 1\n  y = 2\n", "wrong.py, line 2: unexpected indent"),
        ("x = 1\nimport no_such_module\n", "wrong.py, line 2: ModuleNotFoundError: No module named 'no_such_module'"),
        ("\n\nfrom visard.config import Nothing\n", "wrong.py, line 3: ImportError: cannot import name 'Nothing'"),
        (
            "from visard.config import *\n\ndef tiny():\n    return Recipe(name=nam)\n",
            "wrong.py, line 4: NameError: name",
        ),
        (
            "from visard.config import *\ndef tiny():\n    return Recipe(\n    name='a', optim=OptimConfig(rate=1))\n",
            "wrong.py, line 4: TypeError: OptimConfig.__init__() got an unexpected keyword argument 'rate'",
        ),
        ("def tiny(size):\n    return size\n", "wrong.py: TypeError: tiny() missing 1 required positional argument"),
        ("from visard.config import *\ndef tiny():\n    OptimConfig(lr=-1)\n", "optim.lr is -1; it must be above 0"),
        ("x = '\0'\n", "wrong.py"),
        ("raise SystemExit(3)\n", "wrong.py, line 1: SystemExit: 3"),
    ],
)
def test_a_mistake_in_a_recipe_file_names_its_line(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong.py").write_text(text)
    assert main(["train", "wrong.py:tiny"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"visard train: {message}")
    assert said.count("\n") == 1


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    assert "visard train RECIPE" in capsys.readouterr().out


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["train", *arguments, "--json"]) == 0
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return value


def test_a_run_with_validation_resumed_longer_and_used_to_start_another(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [f"person{i}/{a}.png person{j}/{b}.png {int(i == j)}" for i in range(6) for j in (i, (i + 1) % 6)
             for a, b in ((0, 1), (2, 3))]  # fmt: skip
    Path("pairs.txt").write_text("\n".join(pairs) + "\n")
    done = answer(capsys, "tiny.py:tiny", "--data", "faces", "--out", "run", "--val", "others", "faces::pairs.txt")
    assert done["run"] == "run"
    assert done["last"] == "step_00000012"
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    val = [row for row in rows if row["kind"] == "val"]
    assert [row["step"] for row in val] == [6, 12]
    assert val[0]["score"] == pytest.approx((val[0]["others/accuracy"] + val[0]["faces/accuracy"]) / 2)

    assert main(["train", "tiny.py:tiny", "--data", "faces", "--out", "run"]) == 2
    assert "run holds a run already; go on with it by --resume run" in capsys.readouterr().err
    assert main(["train", "rendered_tiny", "--resume", "run"]) == 2
    assert "run is a run of tiny, not of rendered_tiny" in capsys.readouterr().err
    for option in ("--run.out", "--run.init"):
        assert main(["train", "--resume", "run", option, "elsewhere"]) == 2
        assert f"{option[2:]} cannot be changed by --resume" in capsys.readouterr().err
    assert main(["train", "--resume", "run", "--out", "elsewhere"]) == 2
    assert "--out cannot be changed by --resume" in capsys.readouterr().err

    assert main(["train", "--resume", "run", "--epochs", "3", "--optim.lr", "0.01", "--data", "others"]) == 2
    assert "was trained on other identities" in capsys.readouterr().err
    assert json.loads(Path("run/recipe.json").read_text())["data"]["source"] == "faces"
    assert main(["train", "--resume", "run", "--epochs", "3", "--json"]) == 0
    shown = capsys.readouterr()
    assert "changed since the run was started: schedule.epochs 2.0 -> 3.0" in shown.err
    assert json.loads(shown.out)["last"] == "step_00000018"
    # The network of --init is taken with its size, whatever the recipe has; but not against what is asked for.
    second = ("--data", "faces", "--out", "second", "--init", "run", "--schedule.max-steps", "1")
    assert main(["train", "tiny.py:tiny", *second, "--backbone.width", "8"]) == 2
    error = capsys.readouterr().err
    assert "backbone.width 8 is not that of run (4), whose network is taken as it is; leave it out, or cut" in error
    assert not Path("second").exists()
    started = answer(capsys, "rendered_tiny", *second, "--backbone.width", "4")
    assert started["last"] == "step_00000001"
    assert json.loads(Path("second/recipe.json").read_text())["backbone"]["width"] == 4
    assert "6 of 6 class centres from run" in Path("second/log.txt").read_text()


def test_a_run_goes_on_from_another_folder(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Relative data and validation sets are those of the folder in which the run was started."""
    Path("pairs.txt").write_text("other0/0.png other0/1.png 1\nother0/0.png other1/0.png 0\n"
                                 "other2/0.png other2/1.png 1\nother2/0.png other3/0.png 0\n")  # fmt: skip
    sets = ("--data", "faces + rendered:2x4", "--val", "others", "faces", "--epochs", "1")
    answer(capsys, "tiny.py:tiny", *sets, "--out", "run")
    assert json.loads(Path("run/recipe.json").read_text())["run"]["started_in"] == str(work)
    elsewhere = work / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(["train", "--resume", "../run", "--epochs", "2"]) == 0
    shown = capsys.readouterr().err
    assert [line for line in shown.splitlines() if line.startswith("changed")] == [
        "changed since the run was started: schedule.epochs 1.0 -> 2.0"
    ]
    saved = json.loads((work / "run" / "recipe.json").read_text())
    assert saved["data"]["source"] == "faces + rendered:2x4"
    assert saved["run"]["val"] == ["others", "faces"]

    # What is given now is meant from here, and holds from everywhere afterwards.
    (elsewhere / "given").symlink_to(work / "others")
    again = ("--resume", "../run", "--epochs", "3", "--val", "given::../pairs.txt")
    assert main(["train", *again]) == 0
    saved = json.loads((work / "run" / "recipe.json").read_text())
    assert saved["run"]["val"] == [f"{elsewhere}/given::{work}/pairs.txt"]
    capsys.readouterr()

    # Moved along with its data to another machine: found here.
    (work / "faces").rename(elsewhere / "faces")
    assert main(["train", "--resume", "../run", "--epochs", "4"]) == 0
    capsys.readouterr()

    (elsewhere / "faces").rename(work / "hidden")
    assert main(["train", "--resume", "../run", "--epochs", "5"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"visard train: faces, named in ../run/recipe.json, is neither in {work}, where the run was started, nor here; "
        "give its place now with --data SOURCE"
    )
    assert main(["train", "--resume", "../run", "--epochs", "5", "--data", "nowhere"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{elsewhere}/nowhere, named in ../run/recipe.json, is not there; give its place now with --data" in said
    monkeypatch.chdir(work)
    (work / "others").rename(work / "gone")
    (work / "hidden").rename(work / "faces")
    assert main(["train", "--resume", "run", "--epochs", "5"]) == 2
    assert "is not there; give its place now with --val SET ..." in capsys.readouterr().err


def test_a_run_killed_before_its_first_checkpoint_begins_anew_from_another_folder(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then the model that it starts from is needed again."""
    answer(capsys, "tiny.py:tiny", "--data", "faces", "--out", "first", "--epochs", "1")
    answer(capsys, "tiny.py:tiny", "--data", "faces", "--out", "run", "--init", "first", "--epochs", "1")
    whole = weights_of(Path("run"))
    shutil.rmtree("run/checkpoints")
    (work / "elsewhere").mkdir()
    monkeypatch.chdir(work / "elsewhere")
    assert main(["train", "--resume", "../run"]) == 0
    assert_same_bits(weights_of(Path("../run")), whole)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((30, 40), "1 of 48 images looked at are not square (such as person3/2.png, 40x30 px): these seem to be"),
        ((40, 40), "its images have different sizes (16 to 40 px): these seem to be photographs, not aligned crops"),
    ],
)
def test_photographs_that_are_not_aligned_are_remarked_everywhere(
    shape: tuple[int, int], said: str, folder: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "faces", "photographs")
    assert cv2.imwrite("photographs/person3/2.png", np.zeros((*shape, 3), np.uint8))
    remedy = "`visard prepare photographs OUT` makes aligned crops"
    length = ("--schedule.max-steps", "1", "--data.resize")
    for arguments in (
        ["train", "tiny.py:tiny", "--data", "photographs", "--out", "run", *length],
        ["train", "tiny.py:tiny", "--data", "faces", "--val", "photographs", "--out", "run2", *length],
        ["evaluate", "pairs", "run", "photographs", "--count", "20"],
        ["embed", "run", "photographs", "out"],
    ):
        assert main(arguments) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("photographs: ")]
        assert len(lines) == 1, arguments
        assert said in lines[0]
        assert lines[0].endswith(remedy)
    assert main(["train", "tiny.py:tiny", "--data", "faces", "--val", "others", "--out", "run3", *length]) == 0
    assert "aligned" not in capsys.readouterr().err


def test_overfit_batch(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = answer(capsys, "tiny.py:tiny", "--data", "faces", "--overfit-batch")
    assert value["last_loss"] <= value["target"] == pytest.approx(0.1 * value["first_loss"])
    assert main(["train", "tiny.py:tiny", "--data", "faces", "--overfit-batch", "--optim.lr", "1e-9"]) == 2
    assert "overfit-batch: 8 images, loss " in capsys.readouterr().err.splitlines()[-1]
    assert not Path("runs").exists()


def test_profile(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = answer(capsys, "tiny.py:tiny", "--data", "faces", "--out", "run", "--profile")
    assert sum(value["shares"].values()) == pytest.approx(1)
    assert set(value["shares"]) == {"data", "forward", "backward", "optimizer"}
    assert all(share > 0 for share in value["shares"].values())
    assert value["images_per_second"] > 0
    assert json.loads(Path(value["trace"]).read_text())["traceEvents"]
    assert [p.name for p in Path("run").iterdir()] == ["profile"]


def test_ctrl_c_reaches_the_whole_group(work: Path) -> None:
    """Loader workers too get the signal: exit code 130 and how to go on; resumed, the run ends as if left alone."""
    command = [sys.executable, "-m", "visard.cli", "train", "tiny.py:tiny", "--data", "faces", "--epochs", "10"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--out", "run", "--data.workers", "1"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    log = Path("run/log.txt")
    until = time.monotonic() + 60
    while not (log.exists() and "step 4" in log.read_text()):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "go on with: visard train --resume run" in errors.splitlines()[-1]
    assert main(["train", "--resume", "run", "--data.workers", "0"]) == 0
    assert main([*command[3:], "--out", "whole"]) == 0
    assert_same_bits(weights_of(Path("run")), weights_of(Path("whole")))


def test_torchrun(work: Path) -> None:
    """The same command under torchrun: two processes, one answer."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
            *("-m", "visard.cli", "train", "tiny.py:tiny", "--data", "faces", "--out", "run", "--val", "others"),
            *("--epochs", "1", "--json"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == {"run": "run", "best": "step_00000006", "last": "step_00000006"}
    assert "6 steps of 8 images on 2 x cpu" in Path("run/log.txt").read_text()


def test_a_group_that_was_started_anew_takes_up_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun starts anew whatever ended with an error, be it that OUT held somebody's run."""
    out = tmp_path / "run"
    out.mkdir()
    request = parse(["rendered_tiny", "--out", str(out), "--optim.lr", "0.3"])
    assert request is not None
    before = json.dumps(to_dict(request.recipe))
    (out / "recipe.json").write_text(before)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(["train", "rendered_tiny", "--out", str(out)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"visard train: {out} holds another run already (optim.lr 0.3 -> ")
    assert error.endswith(f"go on with it by --resume {out}, or name another --out")
    assert (out / "recipe.json").read_text() == before


def test_shortcut_values_are_checked_like_fields() -> None:
    with pytest.raises(UserError, match="is not one of"):
        parse(["rendered_tiny", "--device", "quantum"])
