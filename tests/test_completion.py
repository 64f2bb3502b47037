"""Completion scripts: bash sources its own and completes commands, words, options; zsh and fish where they are."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from visard.cli import COMMANDS, main
from visard.completion import SHELLS, script

WORDS = {
    "": ["prepare", "evaluate", "pairs", "--help"],
    "prepare": ["--size", "--score", "--help"],
    "evaluate": ["pairs", "templates", "--help"],
    "evaluate pairs": ["--flip", "--folds", "--help"],
    "pairs": ["make", "--help"],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script of the real commands."""
    path = tmp_path_factory.mktemp("completion") / "visard.bash"
    with path.open("w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", file)
        assert main(["--completion", "bash"]) == 0
    return path


def bash(path: Path, words: Sequence[str]) -> set[str]:
    """What bash offers for the last of `words`, by the function that the script has registered."""
    quoted = " ".join(f"'{word}'" for word in words)
    asked = (
        f"set -u; source '{path}'; complete -p visard >/dev/null || exit 9; "
        f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _visard; "
        'echo ${COMPREPLY[@]+"${COMPREPLY[@]}"}'
    )
    done = subprocess.run(["bash", "--norc", "-c", asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["visard", "pre"], {"prepare"}),
        (["visard", ""], {"prepare", "evaluate", "pairs"}),
        (["visard", "--"], {"--help"}),
        (["visard", "prepare", "--s"], {"--size", "--score"}),
        (["visard", "prepare", ""], set()),
        (["visard", "evaluate", ""], {"pairs", "templates"}),
        (["visard", "evaluate", "pairs", "--f"], {"--flip", "--folds"}),
        (["visard", "evaluate", "pairs", "model", "data", "--fl"], {"--flip"}),
        (["visard", "evaluate", "pairs", "pa"], set()),
        (["visard", "pairs", "m"], {"make"}),
        (["visard", "unknown", "--"], set()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bash_completes(tmp_path: Path, words: list[str], offered: set[str]) -> None:
    path = tmp_path / "visard.bash"
    path.write_text(script("bash", WORDS))
    assert bash(path, words) == offered


def test_bash_knows_every_command_and_its_options(whole: Path) -> None:
    assert bash(whole, ["visard", ""]) == set(COMMANDS)
    assert bash(whole, ["visard", "pre"]) == {"prepare"}
    assert {"--size", "--json", "--help"} <= bash(whole, ["visard", "prepare", "--"])
    assert bash(whole, ["visard", "evaluate", "pairs", "--fl"]) == {"--flip"}
    assert bash(whole, ["visard", "train", "scratch_t"]) == {"scratch_tiny"}
    of_train = bash(whole, ["visard", "train", "x.py:f", "--"])
    assert {"--data", "--resume", "--optim.lr", "--run.no-tensorboard"} <= of_train
    assert not [word for word in of_train if "section" in word]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_read_theirs(shell: str, tmp_path: Path) -> None:
    text = script(shell, WORDS)
    assert "evaluate" in text
    assert "templates" in text
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed here")
    path = tmp_path / "visard"
    path.write_text(text)
    option = {"zsh": "--no-exec", "fish": "--no-execute"}[shell]
    done = subprocess.run([program, option, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [[], ["tcsh"], ["bash", "zsh"]])
def test_another_shell_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion", *arguments]) == 2
    assert f"give one of {', '.join(SHELLS)}" in capsys.readouterr().err
