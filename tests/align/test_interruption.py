"""`visard prepare` killed at random and at every rename, resumed: the same bytes as undisturbed, nobody left behind."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.align.photos import photograph_folder
from tests.align.test_prepare import contents, prepare
from tests.signals import children, listen_to_ctrl_c
from visard.align.workers import Report, Task, run_in_processes
from visard.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """src, src.jsonl and `whole`, what an undisturbed run makes of them: 49 photographs are 7 shards."""
    base = tmp_path_factory.mktemp("interruption")
    detections = photograph_folder(base / "src", people=6, images=8)
    (base / "src" / "person-3" / "broken.jpg").write_bytes(b"no picture")
    prepare(base / "src", base / "whole", detections=detections)
    return base


def start(folder: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "visard.cli", "prepare", str(folder / "src"), str(out)]
    command += ["--detections", str(folder / "src.jsonl"), *more]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=listen_to_ctrl_c
    )


def finished_shards(out: Path) -> int:
    return len([path for path in out.with_name(f"{out.name}.partial").glob("shard-*") if ".tmp-" not in path.name])


def wait_for_progress(process: subprocess.Popen[bytes], out: Path, more_than: int) -> None:
    """Until another shard is finished, or the process has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None and finished_shards(out) <= more_than:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.001)


def kill_again_and_again(folder: Path, out: Path, *more: str, kills: int, seed: int) -> int:
    """Kills the command at random moments, then lets it end; how many of the kills met it alive."""
    moments, met = random.Random(seed), 0
    for _ in range(kills):
        process = start(folder, out, *more)
        wait_for_progress(process, out, finished_shards(out))
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.communicate()
        met += process.returncode == -signal.SIGKILL
        if out.exists() and not out.with_name(f"{out.name}.partial").exists():
            break
    else:
        process = start(folder, out, *more)
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
    return met


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_and_resumed(folder: Path, tmp_path: Path, processes: int) -> None:
    met = kill_again_and_again(folder, tmp_path / "out", "--processes", str(processes), kills=3, seed=processes)
    assert met >= 1
    assert contents(tmp_path / "out") == contents(folder / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_ten_times(folder: Path, tmp_path: Path, seed: int) -> None:
    kill_again_and_again(folder, tmp_path / "out", "--processes", "2", kills=10, seed=100 + seed)
    assert contents(tmp_path / "out") == contents(folder / "whole")


class Cut(BaseException):
    """Stands for the end of the process: nothing may catch it."""


def cut_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, *, after: bool) -> None:
    """Makes the given call of a function, counted from 1, the last thing that happens."""
    original: Callable[..., Any] = getattr(owner, name)
    counter = iter(range(1, 1_000_000))

    def stop_there(*arguments: Any, **keywords: Any) -> Any:
        last = next(counter) == call
        if last and not after:
            raise Cut
        value = original(*arguments, **keywords)
        if last:
            raise Cut
        return value

    monkeypatch.setattr(owner, name, stop_there)


@pytest.mark.parametrize("overwrite", [False, True])
def test_cut_off_before_and_after_every_rename(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """Every file comes into being by os.replace: a run cut off on either side of any of them is resumed."""
    detections = folder / "src.jsonl"
    out, whole = tmp_path / "out", contents(folder / "whole")
    calls = 0
    for call in range(1, 100):
        cuts = 0
        for after in (False, True):
            shutil.rmtree(out, ignore_errors=True)
            if overwrite:
                out.mkdir()
                (out / "dataset.json").write_text("of an older data set")
            with monkeypatch.context() as patch:
                cut_at(patch, os, "replace", call, after=after)
                try:
                    prepare(folder / "src", out, detections=detections, overwrite=overwrite)
                except Cut:
                    cuts += 1
            if cuts:
                prepare(folder / "src", out, detections=detections, overwrite=overwrite)
            assert contents(out) == whole
            assert [path.name for path in tmp_path.iterdir()] == ["out"]
        if not cuts:
            break
        calls = call
    assert calls >= 7 + 3  # the shards, the two tables and OUT itself


@pytest.mark.parametrize("call", [1, 4, 7, 8])
def test_cut_off_while_the_work_is_cleared_away(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """After the first shard, in their midst, after the last, and between the record and its folder."""
    detections = folder / "src.jsonl"
    with monkeypatch.context() as patch:
        cut_at(patch, Path, "unlink", call, after=True)
        with pytest.raises(Cut):
            prepare(folder / "src", tmp_path / "out", detections=detections)
    assert (tmp_path / "out.partial").exists()
    assert prepare(folder / "src", tmp_path / "out", detections=detections)["crops"] == 48
    assert contents(tmp_path / "out") == contents(folder / "whole")
    assert not (tmp_path / "out.partial").exists()


def stop_halfway(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        cut_at(patch, os, "replace", 6, after=True)
        with pytest.raises(Cut):
            prepare(folder / "src", out, detections=folder / "src.jsonl")
    assert finished_shards(out) == 5


def test_nothing_is_done_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_halfway(folder, tmp_path / "out", monkeypatch)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("shard-*")}
    with monkeypatch.context() as patch:
        cut_at(patch, os, "replace", 1, after=True)
        with pytest.raises(Cut):
            prepare(folder / "src", tmp_path / "out", detections=folder / "src.jsonl")
    assert finished_shards(tmp_path / "out") == 6
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    prepare(folder / "src", tmp_path / "out", detections=folder / "src.jsonl")
    assert "goes on: 40 of 49 photographs are done" in capsys.readouterr().err
    assert contents(tmp_path / "out") == contents(folder / "whole")


def test_other_settings_do_not_go_on_with_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_halfway(folder, tmp_path / "out", monkeypatch)
    with pytest.raises(UserError, match=r"unfinished run with other quality, size; .*--overwrite"):
        prepare(folder / "src", tmp_path / "out", detections=folder / "src.jsonl", size=64, quality=80)
    assert finished_shards(tmp_path / "out") == 5
    prepare(folder / "src", tmp_path / "out", detections=folder / "src.jsonl", quality=80, overwrite=True)
    assert contents(tmp_path / "out")["train.rec"] != contents(folder / "whole")["train.rec"]


def test_other_photographs_do_not_go_on_with_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "src"
    shutil.copytree(folder / "src", source)
    shutil.copy(folder / "src.jsonl", tmp_path / "src.jsonl")
    stop_halfway(tmp_path, tmp_path / "out", monkeypatch)
    (source / "person-0" / "0.jpg").unlink()
    with pytest.raises(UserError, match="unfinished run with other photographs"):
        prepare(source, tmp_path / "out", detections=tmp_path / "src.jsonl")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "strange",
    [
        {"out.partial/letter.txt": "dear"},
        {"out.partial/shard-0000000": "mine", "out.partial/letters/1.txt": "dear"},
        {"out.partial/job.json": '{"title": "my job"}'},
        {"out.partial/job.json": "[]"},
        {"out.partial": "a file"},
    ],
    ids=lambda strange: " ".join(strange),
)
def test_a_work_directory_of_others_is_not_touched(
    folder: Path, tmp_path: Path, strange: dict[str, str], overwrite: bool
) -> None:
    for name, text in strange.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"out.partial is in the way: .*; move it away, or name another OUT"):
        prepare(folder / "src", tmp_path / "out", detections=folder / "src.jsonl", overwrite=overwrite)
    assert {name: (tmp_path / name).read_text() for name in strange} == strange
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_what_others_lay_into_the_work_or_beside_it_stays(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_halfway(folder, tmp_path / "out", monkeypatch)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dataset.json").write_text("of an older data set")
    for place in ("out.partial", "out.replaced"):
        (tmp_path / place / "letters").mkdir(parents=True)
        (tmp_path / place / "letters" / "1.txt").write_text("dear")
    prepare(folder / "src", tmp_path / "out", detections=folder / "src.jsonl", overwrite=True)
    assert "out.partial is left: it holds letters" in capsys.readouterr().err
    assert contents(tmp_path / "out") == contents(folder / "whole")
    for place in ("out.partial", "out.replaced"):
        assert [path.name for path in (tmp_path / place).iterdir()] == ["letters"]
        assert (tmp_path / place / "letters" / "1.txt").read_text() == "dear"


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_leave_with_their_exit_code_and_are_resumed(
    folder: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = start(folder, tmp_path / "out", "--processes", "2")
    wait_for_progress(process, tmp_path / "out", 0)
    os.killpg(process.pid, number)
    _, errors = process.communicate()
    assert process.returncode == code, errors.decode()
    assert b"Traceback" not in errors
    word = "terminated" if number == signal.SIGTERM else "interrupted"
    assert re.fullmatch(
        rf"visard prepare: {word}; [1-9]\d* of 49 photographs are done and kept in .*/out\.partial, "
        "the same command goes on with the others",
        errors.decode().splitlines()[-1],
    )
    again = start(folder, tmp_path / "out", "--processes", "2")
    _, errors = again.communicate()
    assert again.returncode == 0, errors.decode()
    assert contents(tmp_path / "out") == contents(folder / "whole")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_workers_do_not_outlive_a_killed_command(folder: Path, tmp_path: Path) -> None:
    process = start(folder, tmp_path / "out", "--processes", "2")
    wait_for_progress(process, tmp_path / "out", 0)
    left = children(process.pid)
    process.kill()
    process.communicate()
    assert len(left) >= 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in left):
        assert time.monotonic() < deadline, "workers live on"
        time.sleep(0.01)


def make_deadly_task() -> Task:
    def task(item: int, report: Report) -> None:
        if item == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        report(1)

    return task


def make_clumsy_task() -> Task:
    def task(item: int, report: Report) -> None:
        raise UserError(f"item {item} is bad")

    return task


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_worker_that_dies_is_an_error_not_a_hang() -> None:
    with pytest.raises(UserError, match=r"worker process was killed \(out of memory\?\); the same command goes on"):
        list(run_in_processes(make_deadly_task, range(8), 2))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_workers_mistake_reaches_the_user(processes: int) -> None:
    with pytest.raises(UserError, match=r"item [01] is bad"):
        list(run_in_processes(make_clumsy_task, range(2), processes))
