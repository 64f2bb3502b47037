"""Embedding a data set: order, flips, what is written, interruption at any place, and refusal of what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from visard import embed
from visard.cli import main as visard
from visard.config import IResNetConfig
from visard.embed import embed_dataset, embed_to_directory, load_embeddings, save_embeddings
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
