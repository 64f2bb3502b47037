"""`visard plan`: what it takes, what it says, and mistakes in one line."""

from __future__ import annotations

import json
import re

import pytest

from visard.cli import main
from visard.errors import UserError
from visard.recipes.plan import run

TINY = ["rendered_tiny", "--run.device", "cpu"]


def test_the_table_and_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--devices", "1", "4", "--hosts", "2", "--identities", "5000", "--head.classes", "sharded"]
    answer = run(arguments)
    table = answer.text.splitlines()[4:7]
    assert [line.split()[0] for line in table] == ["devices", "2", "2"]
    assert [line.split()[2] for line in table[1:]] == ["1", "4"]
    first, last = answer.value["plans"]
    assert (first["layout"]["batch"], last["layout"]["batch"]) == (16, 4)  # 32 images over 2 and 8 devices
    assert first["fits"]
    assert first["largest_batch"] > 1000
    assert first["peak"] > first["peak_segment"]
    assert "5,000 identities" in answer.text
    assert main(["plan", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(answer.value))


def test_options_of_the_recipe_count() -> None:
    plain, other = (run([*TINY, "--devices", "1", *more]) for more in ([], ["--run.micro-batches", "4"]))
    assert other.value["plans"][0]["activations"] < 0.3 * plain.value["plans"][0]["activations"]
    assert plain.value["identities"] == 60  # of the recipe's own data
    recomputed = run([*TINY, "--devices", "1", "--batch", "8", "--run.checkpointing", "block", "--memory", "2"])
    assert recomputed.value["plans"][0]["layout"]["batch"] == 8
    assert "checkpointing block" in recomputed.text
    assert "peak none" in recomputed.text


def test_devices_that_a_step_is_too_small_for_are_left_out() -> None:
    """32 images a step are shared by 32 processes at most, and by 4 if each needs 2 for each of 4 parts."""
    answer = run(TINY)
    assert [plan["layout"]["devices"] for plan in answer.value["plans"]] == [1, 2, 4, 8, 16, 32]
    assert answer.text.endswith("run.batch_global 32 is too few for 64 devices, each of which needs 1 or more")
    parts = run([*TINY, "--run.micro-batches", "4", "--devices", "4", "8", "16"])
    assert [plan["layout"]["devices"] for plan in parts.value["plans"]] == [4]
    assert "too few for 8, 16 devices, each of which needs 8 or more for 4 micro-batches" in parts.text
    assert "left out" not in run([*TINY, "--devices", "64", "--batch", "32"]).text


def test_what_does_not_fit_is_said() -> None:
    answer = run([*TINY, "--devices", "1", "--memory", "0.02", "--reserve", "0"])
    assert not answer.value["plans"][0]["fits"]
    assert 0 < answer.value["plans"][0]["largest_batch"] < 32


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "plan what"),
        (["--devices", "2"], "plan what"),
        (["rendered_tiny", "--devices", "0"], "--devices is 0; at least 1"),
        (["rendered_tiny", "--hosts", "0"], "--hosts is 0"),
        (["rendered_tiny", "--hosts", "x"], "--hosts: invalid int value: 'x'"),
        (["rendered_tiny", "--memory", "1"], "must be above --reserve 1 GiB"),
        (["rendered_tiny", "--run.zero", "4"], "--run.zero 4: choose one of 0, 1, 2, 3"),
        (["rendered_tiny", "--identities", "1"], "at least 2"),
        (["rendered_tiny", "--batch", "-1"], "--batch is -1"),
        (["rendered_tiny", "--devices", "64"], "run.batch_global 32 is too few for 64 devices"),
        (["rendered_tiny", "--batch", "6", "--run.micro-batches", "4"], "--batch 6 is too few"),
        (["rendered_tiny", "--head.classez", "sharded"], "did you mean --head.classes"),
        (["ms1mv3_r50"], "give --identities or --data"),
    ],
)
def test_mistakes(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        run(arguments)


def test_help() -> None:
    assert "usage: visard plan RECIPE" in run(["--help"]).text
    assert "usage: visard plan RECIPE" in run(["rendered_tiny", "--help"]).text
