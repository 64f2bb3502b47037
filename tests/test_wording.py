"""Mistakes on the command line in one line each: what is wrong, what is expected, how the command is called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from visard import quickstart
from visard.cli import COMMANDS, main

WORDS = [(name,) for name, command in COMMANDS.items() if not command.words]
WORDS += [(name, word) for name, command in COMMANDS.items() for word in command.words]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    start = f"visard {arguments[0]}: "
    assert line.startswith(start)
    assert len(line) < 240, line
    return line.removeprefix(start)


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_every_command_names_an_option_that_it_does_not_have(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """First of all, whatever else is missing; the message says where all options are listed."""
    recipe = ("rendered_tiny",) if words in (("train",), ("plan",)) else ()
    line = said(capsys, *words, *recipe, "--zzz", "3")
    assert line.startswith("unknown option --zzz; `visard ")
    assert " --help` lists all" in line


@pytest.mark.parametrize(
    "words", [w for w in WORDS if w[-1] not in ("recipes", "list", "pull", "networks")], ids=" ".join
)
def test_every_command_says_what_is_missing(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    line = said(capsys, *words)
    assert f"usage: visard {' '.join(words)} " in line or f"visard {' '.join(words)} R" in line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("prepare", "SRC and OUT are missing; usage: visard prepare SRC OUT [options]"),
        ("prepare photos", "OUT is missing; usage: visard prepare SRC OUT [options]"),
        ("prepare a b c", "'c' is one argument too many; usage: visard prepare SRC OUT [options]"),
        ("prepare a b --siz 3", "unknown option --siz; did you mean --size?"),
        ("prepare a b --size", "--size needs a value behind it"),
        ("prepare a b --size=big", "--size big: expected a whole number"),
        ("prepare a b --min-score high", "--min-score high: expected a number"),
        ("prepare a b --detector retina", "--detector retina: choose one of mtcnn, yunet"),
        ("prepare a b --aligned yes", "'yes' is one argument too many"),
        ("prepare a b -s", "unknown option -s"),
        ("render out --workers two", "--workers two: expected a whole number"),
        ("convert a b --to zip", "--to zip: choose one of bin, folder, list, lst, records, shards"),
        ("evaluate pairs", "MODEL is missing; usage: visard evaluate pairs MODEL [DATA] [options]"),
        ("evaluate pairs m d --fars low", "--fars low: expected a number"),
        ("evaluate pair m d", "unknown protocol 'pair'; known are pairs, retrieval"),
        ("pairs make d", "OUT is missing; usage: visard pairs make DATA OUT [options]"),
        ("recipes all", "'all' is one argument too many; usage: visard recipes"),
    ],
)
def test_the_line(arguments: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, *arguments.split()).startswith(f"{line};") or said(capsys, *arguments.split()) == line


def test_a_misspelt_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["traim", "x"]) == 2
    said = capsys.readouterr().err
    assert said == "visard: unknown command 'traim'; did you mean train?; `visard --help` lists them\n"


def test_quickstart_deletes_nothing_that_it_did_not_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "visard", lambda words: 3)
    for name, code in (("faces", 3), ("thesis", 2)):
        (tmp_path / "quickstart" / name).mkdir(parents=True)
        assert quickstart.main() == code
    assert capsys.readouterr().err == "quickstart/ holds thesis, which quickstart did not make; move it away\n"
    assert (tmp_path / "quickstart" / "thesis").is_dir()


@pytest.mark.parametrize(
    "environment", [{"COLUMNS": "40"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_the_terminal_does_not_matter(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "visard.cli", "prepare", "a"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.stderr.startswith("visard prepare: OUT is missing; usage: visard prepare SRC OUT [options]")
    assert done.stderr.count("\n") == 1
