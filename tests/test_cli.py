"""The command line: every command is there, mistakes are one line and exit code 2, help is fast."""

from __future__ import annotations

import errno
import importlib
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.signals import listen_to_ctrl_c
from visard import __version__
from visard.backbones import build
from visard.cli import COMMANDS, main
from visard.config import IResNetConfig
from visard.console import Answer
from visard.runtime import save_model, spec_for


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "visard.cli", *arguments], capture_output=True, text=True)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


def test_help_answers_in_half_a_second() -> None:
    """Processor time, which a busy machine does not stretch."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    seconds = []
    for _ in range(3):
        before = spent()
        assert run("--help").returncode == 0
        seconds.append(spent() - before)
    assert statistics.median(seconds) < 0.5


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"visard {__version__}\n"


def test_no_command_shows_the_overview_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: visard COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_there(name: str) -> None:
    module = importlib.import_module(COMMANDS[name].module)
    assert hasattr(module, COMMANDS[name].config or "run")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main([name, "--help"])
    except SystemExit as left:  # the parser's own way out
        code = left.code
    assert code == 0
    assert f"visard {name}" in capsys.readouterr().out


def test_a_process_of_its_own_gives_the_same_help_and_the_same_exit_codes() -> None:
    """What the other tests see of `main` is what a shell sees."""
    shown = run("prepare", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "visard prepare" in shown.stdout
    wrong = run("embed", "no-such-model", "no-such-data", "out")
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    assert len(wrong.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("prepare", "no-such-folder", "out"),
        ("prepare", "--no-such-option"),
        ("prepare", "only-a-source"),
        ("render", "out", "--size", "big"),
        ("render", "out", "--format", "no-such-format"),
        ("train", "no_such_recipe"),
        ("train", "rendered_tiny", "--optim.lr", "-1"),
        ("train", "rendered_tiny", "--optim.no-such", "1"),
        ("train", "scratch_small"),
        ("train", "--resume", "no-such-run"),
        ("embed", "no-such-model", "no-such-data", "out"),
        ("evaluate",),
        ("evaluate", "no-such-protocol"),
        ("evaluate", "pairs", "no-such-model", "rendered:2x2"),
        ("import", "no-such-weights", "out"),
        ("export", "no-such-run", "out.onnx"),
        ("report", "no-such-run", "out.html"),
        ("models", "pull", "no-such-model"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_named_and_exits_with_2(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, "one line"
    assert said[0].startswith("visard")
    assert not list(tmp_path.iterdir()), "a mistake must leave nothing behind"


@pytest.mark.parametrize(
    "arguments",
    [
        ("render", "file/out", "--identities", "1", "--images-per-identity", "1", "--size", "16"),
        ("render", "file/out", "--identities", "1", "--images-per-identity", "1", "--size", "16", "--format=folder"),
        ("train", "scratch_tiny", "--data", "rendered:4x8", "--out", "file/run", "--epochs", "1"),
        ("embed", "model", "rendered:1x1", "file/out"),
        ("export", "model", "file/out.onnx"),
        ("pairs", "make", "rendered:4x2", "file/pairs.txt"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_place_that_cannot_be_written_is_named(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    network = IResNetConfig(blocks=(1, 1, 1, 1), width=4, embedding_dim=8, input_size=16)
    save_model(build(network), spec_for(network, origin="test"), tmp_path / "model")
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"visard {arguments[0]}: ")
    assert "file" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model"]


def test_a_full_disk_is_no_defect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(name: str, arguments: list[str]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("visard.cli._dispatch", full)
    assert main(["recipes"]) == 2
    assert "visard recipes: No space left on device" in capsys.readouterr().err


def test_an_error_without_a_file_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str, arguments: list[str]) -> None:
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    monkeypatch.setattr("visard.cli._dispatch", fails)
    with pytest.raises(ConnectionResetError):
        main(["recipes"])


def test_a_quoted_tilde_is_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    given: list[str] = []
    monkeypatch.setattr("visard.cli._dispatch", lambda name, arguments: given.extend(arguments) or Answer({}, ""))
    assert main(["prepare", "~/src", "--detections=~/d.csv", "a~/b", "~"]) == 0
    assert given == [f"{tmp_path}/src", f"--detections={tmp_path}/d.csv", "a~/b", "~"]


@pytest.mark.parametrize("arguments", [("--help",), ("recipes",), ("recipes", "--json"), ("embed", "--help")])
def test_a_reader_that_leaves_is_no_mistake(arguments: tuple[str, ...]) -> None:
    """As `visard ... | head -1`: nothing on standard error, and the exit code of work that was done."""
    process = subprocess.Popen(
        [sys.executable, "-m", "visard.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 0


def test_a_broken_pipe_of_its_own_is_a_defect_not_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str, arguments: list[str]) -> None:
        raise BrokenPipeError("a worker process has gone")

    monkeypatch.setattr("visard.cli._dispatch", fails)
    with pytest.raises(BrokenPipeError, match="worker"):
        main(["recipes"])


@pytest.mark.parametrize(("name", "said"), [("embed", "goes on where it stopped"), ("export", "it was not done")])
def test_an_interruption_says_whether_the_command_goes_on(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str, arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("visard.cli._dispatch", interrupted)
    assert main([name]) == 130
    assert said in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(
    ("number", "word", "code"), [(signal.SIGTERM, "terminated", 143), (signal.SIGINT, "interrupted", 130)]
)
@pytest.mark.parametrize(
    ("command", "working", "said"),
    [
        (
            "render out --identities 400 --size 32 --format folder --workers 2",
            ".out.partial/*/*.jpg",
            "what is done is kept in .out.partial, the same command goes on where it stopped",
        ),
        (
            "render out --identities 400 --size 32 --workers 0",
            ".out.partial/train.rec",
            "nothing is kept of unfinished records, the same command begins anew",
        ),
        (
            "embed model rendered:400x20 out",
            "out.partial/journal_00000.json",
            "of 8,000 embeddings are kept in out.partial, the same command goes on with the others",
        ),
    ],
    ids=["render folder", "render records", "embed"],
)
def test_a_signal_ends_a_command_with_one_line_that_says_what_is_kept(
    command: str, working: str, said: str, number: signal.Signals, word: str, code: int, tmp_path: Path
) -> None:
    """To the whole group, as a terminal sends Ctrl-C: no traceback of a worker either."""
    network = IResNetConfig(blocks=(1, 1, 1, 1), width=4, embedding_dim=8, input_size=16)
    save_model(build(network), spec_for(network, origin="test"), tmp_path / "model")
    process = subprocess.Popen(
        [sys.executable, "-m", "visard.cli", *command.split()],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=listen_to_ctrl_c,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    until = time.monotonic() + 60
    while not list(tmp_path.glob(working)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors
    lines = [line for line in errors.splitlines() if ", " not in line or "/s" not in line]  # progress
    assert len(lines) == 1, errors
    assert lines[0].startswith(f"visard {command.split()[0]}: {word}; ")
    assert lines[0].endswith(said)
    assert output == ""


def test_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)["recipes"]} >= {"rendered_tiny", "quickstart"}
