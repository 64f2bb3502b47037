"""Embedding a data set: order, flips, what is written, interruption at any place, and refusal of what does not fit."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.training import processes
from visard import embed, embed_journal
from visard.cli import main as visard
from visard.config import IResNetConfig
from visard.embed import (
    _batches,
    embed_dataset,
    embed_to_directory,
    load_embeddings,
    save_embeddings,
)
from visard.errors import FormatError, UserError
from visard.records import Embeddings, ModelSpec
from visard.runtime import Embedder

SIZE = 16
SPEC = ModelSpec(backbone={"kind": "onnx"}, input_size=SIZE, embedding_dim=3)


class Crops:
    """Crops of noise, each another."""

    def __init__(self, count: int = 23, size: int = SIZE, suffix: str = "") -> None:
        self.size = size
        self.ids = [f"p{row % 4}/{row}{suffix}.png" for row in range(count)]
        self.labels = np.arange(count, dtype=np.int64) % 4
        self.identities = ["p0", "p1", "p2", "p3"]

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)

    def points(self, index: int) -> None:
        return None


def left_and_right(images: torch.Tensor) -> np.ndarray:
    """Something that a mirror changes: the grey of the left half, of the right half, of the top."""
    pixels = images.float()
    half = SIZE // 2
    parts = [pixels[:, :, :half], pixels[:, :, half:], pixels[:, :half]]
    return torch.stack([part.mean(dim=(1, 2, 3)) for part in parts], dim=1).numpy()


def expected(crops: Crops) -> np.ndarray:
    return left_and_right(torch.from_numpy(np.stack([crops.image(row) for row in range(len(crops))])))


def odd_zeros(images: torch.Tensor) -> np.ndarray:
    """`left_and_right` with a third column of -0.0, which has bits of its own that adding up must keep."""
    vectors: np.ndarray = np.where(np.arange(3) == 2, np.float32(-0.0), left_and_right(images)).astype(np.float32)
    return vectors


class StopsAfter:
    """A forward that is interrupted at its n-th call."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, images: torch.Tensor) -> np.ndarray:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return left_and_right(images)


@pytest.mark.parametrize("batch_size", [1, 5, 23, 64])
def test_every_image_in_its_row_whatever_the_batch(batch_size: int) -> None:
    crops = Crops()
    found = embed_dataset(Embedder(SPEC, left_and_right), crops, "none", batch_size, quiet=True)
    np.testing.assert_allclose(found.vectors, expected(crops), rtol=1e-6)
    assert found.ids == tuple(crops.ids)
    assert (found.labels == crops.labels).all()
    assert ModelSpec(**found.spec) == SPEC


def test_flips() -> None:
    crops = Crops()
    straight = expected(crops)
    mirrored = straight[:, [1, 0, 2]]
    embedder = Embedder(SPEC, left_and_right)
    summed = embed_dataset(embedder, crops, "sum", 7, quiet=True)
    joined = embed_dataset(embedder, crops, "concat", 7, quiet=True)
    np.testing.assert_allclose(summed.vectors, straight + mirrored, rtol=1e-5)
    np.testing.assert_allclose(joined.vectors, np.concatenate([straight, mirrored], axis=1), rtol=1e-5)
    assert (summed.flip, joined.flip) == ("sum", "concat")


def test_a_written_directory_is_read_back_mapped(tmp_path: Path) -> None:
    crops = Crops()
    made = embed_to_directory(Embedder(SPEC, left_and_right), crops, tmp_path / "e", "sum", 5, "abc")
    again = load_embeddings(tmp_path / "e")
    assert isinstance(again.vectors, np.memmap)
    np.testing.assert_array_equal(again.vectors, made.vectors)
    assert (again.ids, again.spec, again.flip) == (tuple(crops.ids), made.spec, "sum")
    np.testing.assert_allclose(np.load(tmp_path / "e" / "norms.npy"), np.linalg.norm(made.vectors, axis=1), rtol=1e-6)
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == [
        "ids.txt",
        "labels.npy",
        "norms.npy",
        "spec.json",
        "vectors.npy",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["e"]
    save_embeddings(again, tmp_path / "copy")
    for file in (tmp_path / "e").iterdir():
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("calls", [0, 1, 3, 4])
def test_an_interrupted_run_goes_on_where_it_stopped(
    tmp_path: Path, calls: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embed, "JOURNAL_SECONDS", 0.0)
    crops, out = Crops(), tmp_path / "e"
    with pytest.raises(KeyboardInterrupt):
        embed_to_directory(Embedder(SPEC, StopsAfter(calls)), crops, out, "none", 5, "abc")
    assert not out.exists()
    rest = StopsAfter(5 - calls)
    found = embed_to_directory(Embedder(SPEC, rest), crops, out, "none", 5, "abc")
    assert rest.left == 0, "batches were embedded again"
    said = f"going on after {5 * calls} of 23 images"
    assert (said in capsys.readouterr().err) == (calls > 0)
    np.testing.assert_allclose(found.vectors, expected(crops), rtol=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def test_what_is_no_unfinished_work_of_its_own_is_not_deleted(tmp_path: Path) -> None:
    partial = tmp_path / "e.partial"
    partial.mkdir()
    (partial / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match=r"e.partial is in the way: .*; move it away, or name another OUT"):
        embed_to_directory(Embedder(SPEC, left_and_right), Crops(), tmp_path / "e", "none", 5, "abc")
    assert [path.name for path in partial.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    "left", [(), ("journal_00000.tmp",), ("journal_00000.json",), ("journal_00000.json", "vectors.npy")]
)
def test_a_kill_at_the_very_beginning_is_taken_up(tmp_path: Path, left: tuple[str, ...]) -> None:
    """The folder alone, a journal being written, a journal, and vectors that were not laid out yet."""
    partial = tmp_path / "e.partial"
    with pytest.raises(KeyboardInterrupt):
        embed_to_directory(Embedder(SPEC, StopsAfter(0)), Crops(), tmp_path / "e", "none", 5, "abc")
    (partial / "vectors.npy").write_bytes(b"\x93NUMPY")
    shutil.copy(partial / "journal_00000.json", partial / "journal_00000.tmp")
    for path in list(partial.iterdir()):
        if path.name not in left:
            path.unlink()
    found = embed_to_directory(Embedder(SPEC, left_and_right), Crops(), tmp_path / "e", "none", 5, "abc")
    np.testing.assert_allclose(found.vectors, expected(Crops()), rtol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


@pytest.mark.parametrize("changed", ["weights", "flip", "ids"])
def test_what_was_made_from_something_else_is_begun_anew(
    tmp_path: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "JOURNAL_SECONDS", 0.0)
    out = tmp_path / "e"
    with pytest.raises(KeyboardInterrupt):
        embed_to_directory(Embedder(SPEC, StopsAfter(3)), Crops(), out, "none", 5, "abc")
    crops = Crops(suffix="x") if changed == "ids" else Crops()
    found = embed_to_directory(
        Embedder(SPEC, lambda images: -left_and_right(images)),
        crops,
        out,
        "concat" if changed == "flip" else "none",
        5,
        "other" if changed == "weights" else "abc",
    )
    np.testing.assert_allclose(found.vectors[:, :3], -expected(crops), rtol=1e-6)


def test_crops_of_another_size_and_embeddings_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="20 px, the model takes 16 px"):
        embed_dataset(Embedder(SPEC, left_and_right), Crops(size=20), quiet=True)
    values = np.array([[1, 1, 1], [np.nan, 1, 1], [1, 1, 1]], np.float32)
    with pytest.raises(UserError, match=r"non-finite embedding for p1/1\.png"):
        embed_dataset(Embedder(SPEC, lambda images: values), Crops(3), batch_size=3, quiet=True)


def test_vectors_and_ids_from_elsewhere_are_enough(tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", np.eye(3))
    with pytest.raises(UserError, match=r"ids\.txt is missing"):
        load_embeddings(tmp_path)
    (tmp_path / "ids.txt").write_text("a\nb\nc\n")
    found = load_embeddings(tmp_path)
    assert found.vectors.dtype == np.float32
    assert found.labels.tolist() == [-1, -1, -1]
    assert (found.ids, found.spec, found.flip) == (("a", "b", "c"), {}, "none")


def test_damaged_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vectors\.npy is missing"):
        load_embeddings(tmp_path)
    good = Embeddings(np.eye(3, dtype=np.float32), ("a", "b", "c"), np.zeros(3, np.int64), {})

    def broken(name: str, content: bytes) -> Path:
        folder = tmp_path / name
        save_embeddings(good, folder)
        (folder / name).write_bytes(content)
        return folder

    with pytest.raises(FormatError, match="not a whole"):
        load_embeddings(broken("vectors.npy", b"\x93NUMPY"))
    with pytest.raises(UserError, match="do not belong together"):
        load_embeddings(broken("ids.txt", b"a\nb\n"))
    with pytest.raises(FormatError, match=r"not the spec\.json"):
        load_embeddings(broken("spec.json", b"{"))
    np.save(tmp_path / "float.npy", np.zeros(3))
    with pytest.raises(FormatError, match="expected 1 dimensions of integer"):
        load_embeddings(broken("labels.npy", (tmp_path / "float.npy").read_bytes()))


def test_an_id_with_a_line_break_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    odd = Embeddings(np.eye(2, dtype=np.float32), ("a\nb", "c"), np.zeros(2, np.int64), {})
    with pytest.raises(UserError, match="line break"):
        save_embeddings(odd, tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import cv2

    from visard.backbones import build
    from visard.runtime import load, save_model, spec_for

    config = IResNetConfig(blocks=(1, 1, 1, 1), width=8, embedding_dim=16, input_size=32)
    torch.manual_seed(0)
    save_model(build(config), spec_for(config), tmp_path / "model")
    crops = Crops(6, size=32)
    for row, image_id in enumerate(crops.ids):
        (tmp_path / "data" / image_id).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "data" / image_id), crops.image(row)[:, :, ::-1])
    arguments = [
        "embed",
        str(tmp_path / "model"),
        str(tmp_path / "data"),
        str(tmp_path / "e"),
        "--flip",
        "concat",
        "--json",
    ]
    assert visard(arguments) == 0
    assert json.loads(capsys.readouterr().out) == {
        "out": str(tmp_path / "e"),
        "images": 6,
        "embedding_dim": 32,
        "identities": 4,
        "flip": "concat",
    }
    found = load_embeddings(tmp_path / "e")
    row = crops.ids.index(found.ids[2])
    straight = load(tmp_path / "model")([crops.image(row)])[0]
    np.testing.assert_allclose(found.vectors[2, :16], straight, atol=1e-4)
    assert visard(arguments) == 2
    assert "exists; choose another name" in capsys.readouterr().err
    assert visard([*arguments[:3], str(tmp_path / "e2"), "--batch-size", "0"]) == 2


def shared(count: int, **options: object) -> list[tuple[int, str, str]]:
    return processes.results(count, "-m", "tests.embed_share", json.dumps(options, default=str))


def test_several_processes_give_the_bytes_of_one(tmp_path: Path) -> None:
    """23 images in 5 batches over 3 processes, and in 2 batches, so that one process has none: each has the whole."""
    for batch_size in (5, 20):
        whole = embed_dataset(Embedder(SPEC, odd_zeros), Crops(), "none", batch_size, quiet=True).vectors
        results = shared(3, out=tmp_path / "v", directory=False, batch_size=batch_size)
        assert [code for code, _, _ in results] == [0, 0, 0], results
        for rank in range(3):
            assert np.load(tmp_path / f"v.{rank}.npy").tobytes() == whole.tobytes()


def test_a_share_that_was_interrupted_is_taken_up_by_another_number_of_processes(tmp_path: Path) -> None:
    """Of 5 batches rank 0 makes one of its two, rank 1 two of its three; one process makes the other two."""
    out = tmp_path / "e"
    codes = [code for code, _, _ in shared(2, out=out, directory=True, stop_after=[1, 2])]
    assert codes == [130, 130]
    assert sorted(p.name for p in (tmp_path / "e.partial").iterdir()) == [
        "journal_00000.json",
        "journal_00001.json",
        "vectors.npy",
    ]
    code, _, errors = shared(1, out=out, directory=True, stop_after=[2])[0]
    assert code == 0, errors
    assert "going on after 15 of 23 images" in errors
    np.testing.assert_allclose(load_embeddings(out).vectors[:, :2], expected(Crops())[:, :2], rtol=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def test_a_mistake_that_one_process_finds_ends_all(tmp_path: Path) -> None:
    results = shared(2, out=tmp_path / "e", directory=True, bad=22)
    assert [code for code, _, _ in results] == [2, 2]
    for _, said, _ in results:
        assert "non-finite embedding for p2/22.png" in said
    assert not (tmp_path / "e").exists()


def test_torchrun_embed(tmp_path: Path) -> None:
    """The command under torchrun: one answer, one directory, the bytes of one process."""
    import cv2

    from visard.backbones import build
    from visard.runtime import save_model, spec_for

    config = IResNetConfig(blocks=(1, 1, 1, 1), width=8, embedding_dim=16, input_size=32)
    save_model(build(config), spec_for(config), tmp_path / "model")
    crops = Crops(11, size=32)
    for row, image_id in enumerate(crops.ids):
        (tmp_path / "data" / image_id).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "data" / image_id), crops.image(row)[:, :, ::-1])
    command = ["-m", "visard.cli", "embed", str(tmp_path / "model"), str(tmp_path / "data")]
    options = ["--batch-size", "3", "--device", "cpu", "--json"]
    processes.run(1, *command, str(tmp_path / "one"), *options)
    answers = [said for _, said, _ in processes.run(2, *command, str(tmp_path / "two"), *options)]
    assert json.loads(answers[0])["images"] == 11
    assert answers[1] == ""
    for name in ("vectors.npy", "norms.npy", "ids.txt", "labels.npy", "spec.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


class WatchedCrops(Crops):
    """Notes which rows have been decoded, and in which thread."""

    def __init__(self) -> None:
        super().__init__(60)
        self.decoded: dict[int, str] = {}

    def image(self, index: int) -> np.ndarray:
        self.decoded[index] = threading.current_thread().name
        return super().image(index)


def test_the_next_batches_are_decoded_while_one_is_embedded() -> None:
    crops = WatchedCrops()
    first = threading.Event()

    def forward(images: torch.Tensor) -> np.ndarray:
        if not first.is_set():
            first.set()
            until = time.monotonic() + 20
            while len(crops.decoded) < 20 and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(0.2)  # in which one too many would come
            assert len(crops.decoded) == 20  # BATCHES_AHEAD more of 5 each
        return left_and_right(images)

    found = embed_dataset(Embedder(SPEC, forward), crops, "none", 5, quiet=True)
    np.testing.assert_allclose(found.vectors, expected(Crops(60)), rtol=1e-6)
    assert threading.current_thread().name not in crops.decoded.values()


def test_an_image_that_cannot_be_decoded_is_the_error_of_the_call() -> None:
    class Damaged(Crops):
        def image(self, index: int) -> np.ndarray:
            if index == 17:
                raise FormatError("p1/17.png", "the JPEG is cut off")
            return super().image(index)

    with pytest.raises(FormatError, match=r"p1/17\.png: the JPEG is cut off"):
        embed_dataset(Embedder(SPEC, left_and_right), Damaged(), "none", 5, quiet=True)
    assert not [thread for thread in threading.enumerate() if "decoding" in thread.name]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=6), st.integers(1, 7), st.integers(1, 4))
def test_what_is_open_is_done_once(done: list[tuple[int, int]], batch_size: int, world: int) -> None:
    """Whatever was done before: the batches of all shares are exactly the rows that were not."""
    stretches = embed_journal.union([(min(pair), max(pair)) for pair in done if pair[0] != pair[1]])
    rows_done = [row for first, end in stretches for row in range(first, end)]
    assert rows_done == sorted({row for pair in done for row in range(min(pair), max(pair))})
    batches = _batches(embed_journal.missing(stretches, 30), batch_size)
    shares = [batches[len(batches) * r // world : len(batches) * (r + 1) // world] for r in range(world)]
    assert [row for share in shares for rows in share for row in rows] == sorted(set(range(30)) - set(rows_done))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_ids_with_odd_characters_survive_the_directory(tmp_path: Path) -> None:
    ids = ("a b/1.jpg", "caf\u00e9/\u2028.jpg", "bytes\udcff.jpg", "tab\t.jpg")
    save_embeddings(Embeddings(np.eye(4, dtype=np.float32), ids, np.zeros(4, np.int64), {}), tmp_path / "e")
    assert load_embeddings(tmp_path / "e").ids == ids
