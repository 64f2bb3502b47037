"""Every kind of data set gives the same crops, labels and points for the same images; damage is named."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visard.data.dataset import FaceDataset, FolderDataset, open_dataset
from visard.data.decode import decode, image_size
from visard.data.formats.encoded import scale_points
from visard.data.lines import Lines
from visard.data.recordio import pack, write_record
from visard.data.writer import DatasetWriter
from visard.errors import FormatError, UserError

S = 24


def picture(seed: int, width: int = S, height: int = S) -> np.ndarray:
    """(height, width, 3) uint8 RGB, smooth, with a red left and a blue right side."""
    rng = np.random.default_rng(seed)
    image = cv2.resize(rng.integers(60, 190, (4, 4, 3), dtype=np.uint8), (width, height))
    image[:, : width // 3] = (220, 20, 30)
    image[:, -width // 3 :] = (30, 20, 220)
    return image


def jpeg(seed: int, width: int = S, height: int = S, suffix: str = ".jpg") -> bytes:
    return cv2.imencode(suffix, picture(seed, width, height)[:, :, ::-1])[1].tobytes()


def points_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, S - 1, (5, 2)).astype(np.float32)


NAMES = [("p0", "0.jpg"), ("p0", "1.jpg"), ("p1", "0.jpg"), ("p2", "0.jpg"), ("p2", "1.jpg")]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    with DatasetWriter(tmp_path / "prepared", S, {}) as writing:
        for seed, (identity, name) in enumerate(NAMES):
            writing.add(f"{identity}/{name}", identity, jpeg(seed), points_of(seed) if seed % 2 else None)
    return tmp_path / "prepared"


@pytest.fixture
def bare(prepared: Path) -> Path:
    for name in ("dataset.json", "ids.txt", "identities.txt", "labels.npy", "offsets.npy", "points.npy"):
        (prepared / name).unlink()
    return prepared


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, (identity, name) in enumerate(NAMES):
        path = tmp_path / "folder" / identity / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(seed))
    return tmp_path / "folder"


def check(data: FaceDataset) -> None:
    """The five pictures, whatever holds them."""
    assert len(data) == len(data.ids) == 5
    assert data.size == S
    assert data.labels.dtype == np.int64
    assert data.labels.tolist() == [0, 0, 1, 2, 2]
    for seed in range(5):
        image = data.image(seed)
        assert image.shape == (S, S, 3)
        assert image.dtype == np.uint8
        expected = cv2.imdecode(np.frombuffer(jpeg(seed), np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
        assert (image == expected).all()
        assert image[:, 2, 0].mean() > 150 > image[:, 2, 2].mean()  # red on the left: RGB, not BGR


def test_prepared(prepared: Path) -> None:
    data = open_dataset(prepared)
    check(data)
    assert list(data.ids) == [f"{identity}/{name}" for identity, name in NAMES]
    assert list(data.identities) == ["p0", "p1", "p2"]
    assert data.points(0) is None
    assert (data.points(3) == points_of(3)).all()
    expected = np.stack([points_of(3), np.full((5, 2), np.nan, np.float32), points_of(1)])
    np.testing.assert_array_equal(data.all_points(np.array([3, 0, 1])), expected)
    check(open_dataset(prepared / "train.rec"))


def test_folder(folder: Path) -> None:
    data = open_dataset(folder)
    check(data)
    assert list(data.ids) == [f"{identity}/{name}" for identity, name in NAMES]
    assert list(data.identities) == ["p0", "p1", "p2"]
    assert data.points(0) is None


@pytest.mark.parametrize("missing", [[], ["property"], ["train.idx"], ["property", "train.idx"]])
def test_bare_records(bare: Path, missing: list[str]) -> None:
    for name in missing:
        (bare / name).unlink()
    data = open_dataset(str(bare / "train.rec"))
    check(data)
    assert list(data.ids) == ["1", "2", "3", "4", "5"]
    assert list(data.identities) == ["0", "1", "2"]
    check(open_dataset(bare))


def write_bare(path: Path, payloads: list[bytes], keys: list[int]) -> Path:
    with open(path, "wb") as file, open(path.with_suffix(".idx"), "w") as index:
        for key, payload in zip(keys, payloads, strict=True):
            index.write(f"{key}\t{file.tell()}\n")
            write_record(file, payload)
    return path


def test_records_without_an_index_record_are_all_images(tmp_path: Path) -> None:
    """As MXNet's im2rec writes them: record 0 is an image, keys in any order, labels perhaps behind the header."""
    payloads = [pack(1.0, 7, jpeg(0)), pack((2.0, 0.5), 0, jpeg(1)), pack(-1.0, 3, jpeg(2))]
    data = open_dataset(write_bare(tmp_path / "any.rec", [payloads[0], pack(2.0, 0, jpeg(1)), payloads[2]], [7, 0, 3]))
    assert list(data.ids) == ["7", "0", "3"]
    assert data.labels.tolist() == [1, 2, -1]
    data = open_dataset(write_bare(tmp_path / "labels.rec", payloads[:2], [7, 5]))
    assert data.labels.tolist() == [1, 2]
    assert data.image(1).shape == (S, S, 3)


@pytest.mark.parametrize("label", [0.5, float("nan"), -2.0, 3e7])
def test_a_label_that_is_no_identity_is_named(tmp_path: Path, label: float) -> None:
    path = write_bare(tmp_path / "a.rec", [pack(0.0, 1, jpeg(0)), pack(label, 2, jpeg(1))], [1, 2])
    with pytest.raises(FormatError, match="label of record 2"):
        open_dataset(path)


def test_a_property_file_that_disagrees_is_named(bare: Path) -> None:
    for text, message in (("2,24,24", "has label 2"), ("3,24,25", "expected"), ("three,24,24", "expected")):
        (bare / "property").write_text(text)
        with pytest.raises(FormatError, match=message):
            open_dataset(bare)


def test_a_record_file_that_was_cut_off(prepared: Path) -> None:
    data = (prepared / "train.rec").read_bytes()
    (prepared / "train.rec").write_bytes(data[:2000])
    with pytest.raises(FormatError, match=r"train\.rec"):
        open_dataset(prepared)
    (prepared / "dataset.json").unlink()
    with pytest.raises(FormatError, match=r"train\.idx: record \d+ is at byte"):
        open_dataset(prepared)


def test_junk_is_left_out(folder: Path) -> None:
    for name in (".DS_Store", "p0/.DS_Store", "p0/._0.jpg", "p1/Thumbs.db", "p2/notes.txt", "list.txt"):
        (folder / name).write_bytes(b"junk")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "a.jpg").write_bytes(jpeg(9))
    (folder / "nobody").mkdir()
    check(open_dataset(folder))


def test_other_image_formats_nested_folders_and_unlabelled_images(tmp_path: Path) -> None:
    (tmp_path / "p" / "2020").mkdir(parents=True)
    (tmp_path / "p" / "2020" / "a.PNG").write_bytes(jpeg(0, suffix=".png"))
    (tmp_path / "p" / "b.bmp").write_bytes(jpeg(1, suffix=".bmp"))
    (tmp_path / "z.webp").write_bytes(jpeg(2, suffix=".webp"))
    data = open_dataset(tmp_path)
    assert list(data.ids) == ["p/2020/a.PNG", "p/b.bmp", "z.webp"]
    assert data.labels.tolist() == [0, 0, -1]
    assert (data.image(0) == picture(0)).all()
    assert (data.image(1) == picture(1)).all()
    assert data.image(2).shape == (S, S, 3)


def test_another_size_is_an_error_that_names_the_file(folder: Path, prepared: Path) -> None:
    (folder / "p1" / "0.jpg").write_bytes(jpeg(2, 30, 20))
    data = open_dataset(folder)
    with pytest.raises(UserError, match=r"p1/0\.jpg: 30x20 px, not 24x24.*visard prepare"):
        data.image(2)
    with pytest.raises(UserError, match="24 px, 48 px are asked for"):
        open_dataset(prepared, size=48)
    with pytest.raises(UserError, match="24x24 px, not 48x48"):
        open_dataset(folder, size=48).image(0)
    (folder / "p0" / "0.jpg").write_bytes(jpeg(2, 30, 20))
    with pytest.raises(UserError, match=r"0\.jpg: 30x20 px is not a square crop"):
        open_dataset(folder)


@pytest.mark.parametrize("size", [12, 48])
def test_resize_scales_crop_and_points_alike(prepared: Path, folder: Path, size: int) -> None:
    for source in (prepared, folder):
        data = open_dataset(source, size=size, resize=True)
        assert data.size == size
        assert data.image(1).shape == (size, size, 3)
    points = open_dataset(prepared, size=size, resize=True).points(1)
    assert points is not None
    np.testing.assert_allclose(points, (points_of(1) + 0.5) * size / S - 0.5, rtol=1e-6)
    with pytest.raises(UserError, match="needs a size"):
        open_dataset(prepared, resize=True)


def test_points_scale_as_opencv_scales_pixels() -> None:
    image = np.zeros((24, 24, 3), np.uint8)
    image[8:10, 14:16] = 255  # a spot centred on (14.5, 8.5)
    small = cv2.resize(image, (12, 12), interpolation=cv2.INTER_AREA)
    y, x = np.argwhere(small[:, :, 0])[0]
    np.testing.assert_allclose(scale_points(np.array([[14.5, 8.5]], np.float32), 0.5), [[x, y]])


def test_rendered() -> None:
    data = open_dataset("rendered:3x2,seed=4,first=10", size=32)
    assert (len(data), data.size, data.labels.tolist()) == (6, 32, [0, 0, 1, 1, 2, 2])
    other = open_dataset("rendered:1x2,seed=4,first=11", size=32)
    assert list(other.ids) == list(data.ids[2:4])
    assert (other.image(1) == data.image(3)).all()


@pytest.mark.parametrize(
    "source", ["rendered:", "rendered:5", "rendered:0x3", "rendered:axb", "rendered:5x3,seeds=1", "rendered:5x3,seed=x"]
)
def test_a_rendered_name_that_is_wrong(source: str) -> None:
    with pytest.raises(UserError, match="expected rendered:IDENTITIESxIMAGES"):
        open_dataset(source)


def test_what_is_no_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no images"):
        open_dataset(tmp_path)
    (tmp_path / "a.doc").write_text("a")
    with pytest.raises(UserError, match="not a data set"):
        open_dataset(tmp_path / "a.doc")


def image_sum(job: tuple[FaceDataset, int]) -> int:
    data, index = job
    return int(data.image(index).astype(np.int64).sum())


def test_data_sets_cross_processes(prepared: Path, folder: Path) -> None:
    sets = [open_dataset(prepared), FolderDataset(folder)]
    assert all(len(pickle.dumps(data)) < 2000 for data in sets)
    expected = [image_sum((data, 3)) for data in sets]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(image_sum, [(data, 3) for data in sets]) == expected


@settings(max_examples=100, deadline=None)
@given(strings=st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"])), max_size=20))
def test_lines_are_the_strings(strings: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes("".join(f"{s}\n" for s in strings).encode())
    for lines in (
        Lines.from_strings(strings),
        Lines.from_file(path),
        pickle.loads(pickle.dumps(Lines.from_file(path))),
    ):
        assert list(lines) == strings
        assert lines[1:3] == strings[1:3]
        assert [lines[-1 - i] for i in range(len(strings))] == strings[::-1]
        with pytest.raises(IndexError):
            lines[len(strings)]


def test_lines_that_are_cut_off(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntw")
    with pytest.raises(FormatError, match="cut off in its last line"):
        Lines.from_file(tmp_path / "a.txt")
    with pytest.raises(FormatError, match="is missing"):
        Lines.from_file(tmp_path / "b.txt")


def test_a_broken_jpeg_is_named_with_its_record(tmp_path: Path) -> None:
    half = jpeg(1)[:300]
    path = write_bare(tmp_path / "a.rec", [pack(0.0, 1, jpeg(0)), pack(0.0, 2, half), pack(0.0, 3, b"")], [1, 2, 3])
    data = open_dataset(path)
    offset = int((tmp_path / "a.idx").read_text().splitlines()[1].split("\t")[1])
    with pytest.raises(FormatError, match=rf"a\.rec at byte {offset}: .*(cut off|read)"):
        data.image(1)
    with pytest.raises(FormatError, match="is empty"):
        data.image(2)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_truncated_at_every_byte_is_refused(suffix: str) -> None:
    data = jpeg(0, suffix=suffix)
    for length in range(len(data)):
        with pytest.raises(FormatError, match=f"file{suffix}"):
            decode(data[:length], S, False, f"file{suffix}")


@pytest.mark.parametrize("resize", [False, True])
@settings(max_examples=200, deadline=None)
@given(bits=st.lists(st.integers(0, 8 * len(jpeg(0)) - 1), min_size=1, max_size=4))
def test_flipped_bits_give_a_crop_or_an_error(resize: bool, bits: list[int]) -> None:
    damaged = bytearray(jpeg(0))
    for bit in bits:
        damaged[bit // 8] ^= 1 << bit % 8
    try:
        image = decode(bytes(damaged), S, resize, "a.jpg")
    except UserError:
        return
    assert image.shape == (S, S, 3)


@settings(max_examples=200, deadline=None)
@given(data=st.one_of(st.binary(max_size=80), st.binary(max_size=80).map(lambda b: b"\xff\xd8\xff" + b)))
def test_random_bytes_are_no_image(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode(data, S, True, "a.jpg")


def test_a_huge_image_is_refused_before_it_is_decoded() -> None:
    data = bytearray(jpeg(0))
    at = data.find(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 20_000, 20_000)
    with pytest.raises(FormatError, match="claims 20000x20000 px"):
        decode(bytes(data), S, True, "a.jpg")


def test_header_sizes_equal_decoded_sizes() -> None:
    for suffix in (".jpg", ".png", ".bmp", ".webp"):
        assert image_size(jpeg(0, 40, 30, suffix), "a") == (40, 30)
    progressive = cv2.imencode(".jpg", picture(0, 40, 30), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    assert image_size(progressive, "a") == (40, 30)
    assert decode(cv2.imencode(".jpg", picture(0)[:, :, 0])[1].tobytes(), S, False, "grey.jpg").shape == (S, S, 3)


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root and Windows may read anything")
def test_an_unreadable_file_is_named(folder: Path) -> None:
    data = open_dataset(folder)
    (folder / "p1" / "0.jpg").chmod(0)
    with pytest.raises(UserError, match=r"p1/0\.jpg: cannot be read"):
        data.image(2)


def test_a_file_that_went_away_is_named(folder: Path) -> None:
    data = open_dataset(folder)
    (folder / "p1" / "0.jpg").unlink()
    with pytest.raises(UserError, match=r"p1/0\.jpg: cannot be read"):
        data.image(2)


@pytest.mark.real_data
def test_real_files(shared_data: Path) -> None:
    data = open_dataset(shared_data / "formats" / "mxnet-recordio" / "train.rec")
    assert (len(data), data.size) == (16, 300)
    assert sorted(map(int, data.ids)) == list(range(16))
    assert all(data.image(i).std() > 20 for i in range(16))
    crops = open_dataset(shared_data / "formats" / "paddle-small-dataset" / "small_dataset" / "images")
    assert (len(crops), set(crops.labels.tolist())) == (10, {-1})
    assert crops.image(0).shape == (crops.size, crops.size, 3)
    assert io.BytesIO(crops.encoded(0)).read(2) == b"\xff\xd8"  # type: ignore[attr-defined]
