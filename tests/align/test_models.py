"""`visard models` against a server on the loopback interface."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from visard.align import models
from visard.align.models import Weights
from visard.cli import main
from visard.errors import UserError

CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """(address, paths asked for)."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path == "/gone":
                self.send_error(404, "Not Found")
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:1000] if self.path == "/short" else CONTENT)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}", asked
        httpd.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("VISARD_MODELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "visard" / "models"


def offer(monkeypatch: pytest.MonkeyPatch, url: str, content: bytes = CONTENT) -> None:
    weights = Weights(
        url=url, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content), detector="yunet", licence="MIT"
    )
    monkeypatch.setattr(models, "WEIGHTS", {"face_detection_yunet_2023mar.onnx": weights})


def test_the_table_is_complete() -> None:
    assert {weights.detector for weights in models.WEIGHTS.values()} == {"yunet", "mtcnn"}
    for weights in models.WEIGHTS.values():
        assert weights.url.startswith("https://")
        assert len(bytes.fromhex(weights.sha256)) == 32
    assert models.YUNET_FILES[0] in models.WEIGHTS


def test_pull_puts_the_file_where_prepare_looks(
    server: tuple[str, list[str]], cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(monkeypatch, f"{server[0]}/file")
    with pytest.raises(UserError, match=r"no yunet weights.*visard models pull yunet.*VISARD_MODELS"):
        models.yunet_paths()
    assert main(["models", "pull"]) == 0
    (path,) = models.yunet_paths()
    assert path == cache / "face_detection_yunet_2023mar.onnx"
    assert path.read_bytes() == CONTENT
    assert main(["models", "pull", "yunet"]) == 0  # it is there already
    assert server[1] == ["/file"]
    assert "there already" in capsys.readouterr().out
    assert [entry.name for entry in cache.iterdir()] == [path.name]


def test_pull_to_another_folder(
    server: tuple[str, list[str]], cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer(monkeypatch, f"{server[0]}/file")
    assert main(["models", "pull", "face_detection_yunet_2023mar.onnx", "--to", str(tmp_path / "here")]) == 0
    assert (tmp_path / "here" / "face_detection_yunet_2023mar.onnx").read_bytes() == CONTENT
    assert not cache.exists()
    monkeypatch.setenv("VISARD_MODELS", str(tmp_path / "here"))
    assert models.yunet_paths() == [tmp_path / "here" / "face_detection_yunet_2023mar.onnx"]


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("/file", b"other", "SHA-256"),
        ("/gone", CONTENT, "404"),
        ("/short", CONTENT, "cannot be reached|SHA-256"),
    ],
)
def test_a_failed_pull_is_one_line_and_leaves_nothing(
    server: tuple[str, list[str]],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    path: str,
    content: bytes,
    message: str,
) -> None:
    offer(monkeypatch, f"{server[0]}{path}", content)
    with pytest.raises(UserError, match=message):
        models.pull()
    assert list(cache.iterdir()) == []
    assert main(["models", "pull"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("visard models: http://127.0.0.1")


def test_no_server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "http://127.0.0.1:9/file")
    with pytest.raises(UserError, match=r"cannot be reached.*VISARD_MODELS"):
        models.pull()


def test_no_server_but_the_folder_serves_already(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file under one of YuNet's other names, in the folder of VISARD_MODELS or in the cache."""
    offer(monkeypatch, "http://127.0.0.1:9/file")
    cache.mkdir(parents=True)
    (cache / "yunet_n_dynamic.onnx").write_bytes(b"x")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "yunet_n_640_640.onnx").write_bytes(b"x")
    assert main(["models", "pull"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"`visard prepare` does not need it: the folder {cache} holds yunet_n_dynamic.onnx" in said
    monkeypatch.setenv("VISARD_MODELS", str(tmp_path / "own"))
    assert main(["models", "pull", "--to", str(tmp_path / "there")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"the folder {tmp_path}/own that VISARD_MODELS names holds yunet_n_640_640.onnx" in said


def test_a_folder_that_cannot_be_written(
    server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer(monkeypatch, f"{server[0]}/file")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        models.pull(to=tmp_path / "file" / "below")


def test_a_file_of_the_users_is_never_replaced(
    server: tuple[str, list[str]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, f"{server[0]}/file")
    cache.mkdir(parents=True)
    mine = cache / "face_detection_yunet_2023mar.onnx"
    mine.write_bytes(b"mine")
    with pytest.raises(UserError, match="other content"):
        models.pull()
    assert mine.read_bytes() == b"mine"
    (row,) = models.list_weights().value["weights"]
    assert row["state"] == "differs"


def test_list_and_unknown_names(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "list"]) == 0
    assert capsys.readouterr().out.count("missing") == 4
    monkeypatch.setenv("VISARD_MODELS", str(tmp_path))
    (tmp_path / "yunet_n_320_320.onnx").write_bytes(b"x")
    assert models.list_weights().value["others"] == ["yunet_n_320_320.onnx"]
    assert models.yunet_paths() == [tmp_path / "yunet_n_320_320.onnx"]
    with pytest.raises(UserError, match=r"'retina'; known are yunet, mtcnn, face_detection"):
        models.pull(("retina",))
    with pytest.raises(UserError, match=r"no mtcnn weights.*pnet\.pt, rnet\.pt, onet\.pt"):
        models.mtcnn_paths()


@pytest.mark.real_data
def test_known_sums_are_those_of_the_real_files(shared_data: Path) -> None:
    for name in ("pnet.pt", "rnet.pt", "onet.pt"):
        data = (shared_data / "models" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == models.WEIGHTS[name].sha256
        assert len(data) == models.WEIGHTS[name].bytes
