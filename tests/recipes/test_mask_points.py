"""`visard mask --points FILE`: 5, 68, 106 and 468 points place the mask; and images that change are masked anew."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visard.cli import main
from visard.data.dataset import open_dataset
from visard.data.rendered import RenderedFaces
from visard.data.writer import DatasetWriter
from visard.functional.face_surface import fit
from visard.masks import template, uv
from visard.pages import encode_image
from visard.recipes.mask import MaskCopyConfig
from visard.recipes.mask_points import listed_points

COUNT = 6
IDS = [f"p{k // 2}/{k}.jpg" for k in range(COUNT)]
OVAL_468 = (454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rendered crops with the true five points; and dense.npy with the true 68."""
    folder = tmp_path_factory.mktemp("points")
    made = RenderedFaces(identities=COUNT, images_per_identity=1, seed=11).render(range(COUNT))
    with DatasetWriter(folder / "data", 112, {"command": "test"}) as writer:
        for k, image_id in enumerate(IDS):
            crop = encode_image(made.images[k].numpy(), quality=97)
            writer.add(image_id, image_id.split("/")[0], crop, made.points[k].numpy())
    np.save(folder / "dense.npy", made.dense.numpy().astype(np.float32))
    return folder


def of_106(points_682: np.ndarray) -> np.ndarray:
    """JD-landmark's order: contour 0..32 from ear to ear, nose 51..65, mouth 84.., pupils 104 and 105."""
    made = np.tile(points_682[30], (106, 1))
    made[:33] = contour(points_682, np.linspace(0, 16, 33))
    made[[104, 105]] = points_682[36:42].mean(0), points_682[42:48].mean(0)
    made[[54, 84, 90, 51, 60]] = points_682[[30, 48, 54, 27, 33]]
    return made


def of_468(points_682: np.ndarray) -> np.ndarray:
    """MediaPipe's mesh: only the vertices that are looked at lie where they should."""
    made = np.tile(points_682[30], (468, 1))
    made[list(OVAL_468)] = contour(points_682, np.linspace(16, 0, 21))
    made[[33, 133, 159, 145]], made[[362, 263, 386, 374]] = points_682[36:42].mean(0), points_682[42:48].mean(0)
    made[[1, 61, 291, 168, 2, 152, 172, 397]] = points_682[[30, 48, 54, 27, 33, 8, 4, 12]]
    return made


def contour(points_682: np.ndarray, places: np.ndarray) -> np.ndarray:
    return np.stack([np.interp(places, np.arange(17), points_682[:17, axis]) for axis in (0, 1)], axis=1)


def images(out: Path) -> list[np.ndarray]:
    data = open_dataset(out)
    return [data.image(data.ids.index(image_id)) for image_id in IDS]


def told(out: Path) -> list[dict[str, Any]]:
    lines = {(line := json.loads(text))["id"]: line for text in (out / "masks.jsonl").read_text().splitlines()}
    return [lines[image_id] for image_id in IDS]


@pytest.mark.parametrize("tool", ["uv", "template"])
def test_points_of_every_order_lay_the_same_mask(source: Path, tmp_path: Path, tool: str) -> None:
    dense = np.load(source / "dense.npy")
    orders = {"68": dense, "106": np.stack([of_106(p) for p in dense]), "468": np.stack([of_468(p) for p in dense])}
    orders["478"] = np.concatenate([orders["468"], np.full((COUNT, 10, 2), 50, np.float32)], axis=1)
    made = {}
    for name, points in orders.items():
        np.save(tmp_path / f"{name}.npy", points.astype(np.float32))
        arguments = ["--points", str(tmp_path / f"{name}.npy"), "--tool", tool, "--kinds", "cloth"]
        assert main(["mask", str(source / "data"), str(tmp_path / name), *arguments]) == 0
        made[name] = images(tmp_path / name)
        assert {line["points"] for line in told(tmp_path / name)} == {"file"}
    assert main(["mask", str(source / "data"), str(tmp_path / "5"), "--tool", tool, "--kinds", "cloth"]) == 0
    five = images(tmp_path / "5")

    def apart(a: list[np.ndarray], b: list[np.ndarray]) -> float:
        return float(np.mean([np.abs(x.astype(int) - y).mean() for x, y in zip(a, b, strict=True)]))

    by_jaw = apart(made["68"], five)
    assert by_jaw > 0.5, "where the jaw is known the mask lies otherwise than by five points"
    assert apart(made["68"], made["106"]) < 0.2 * by_jaw
    # Of a turned head the mesh's vertices count as places on the jaw, the others' contour does not.
    ahead = [k for k in range(COUNT) if abs(fit(dense[k]).yaw) < math.radians(14)]  # type: ignore[union-attr]
    assert len(ahead) >= 2
    # The 2D tool takes its measure at the outline's points, and the mesh has others than the 68.
    allowed = (0.3 if tool == "uv" else 0.75) * by_jaw
    assert apart([made["68"][k] for k in ahead], [made["468"][k] for k in ahead]) < allowed
    assert apart(made["478"], made["468"]) == 0


def test_the_points_of_the_file_are_what_the_tools_get(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list in any order, with some images missing: these keep the points of the data set, and the report tells."""
    dense = np.load(source / "dense.npy")
    listed = [4, 1, 3]
    lines = [" ".join([IDS[k], *(f"{v:.6f}" for v in dense[k].ravel()), "0.98"]) for k in listed]
    (tmp_path / "points.txt").write_text("\n".join(lines))
    given: list[np.ndarray] = []

    def wear(image: Any, points: Any, look: Any) -> Any:
        given.append(points)
        return template.wear(image, points, look)

    monkeypatch.setattr("visard.recipes.mask_writing.tool", lambda name: wear)
    assert main(["mask", str(source / "data"), str(tmp_path / "out"), "--points", str(tmp_path / "points.txt")]) == 0
    before = open_dataset(source / "data")
    for k in range(COUNT):
        assert np.allclose(given[k], dense[k] if k in listed else before.points(k), atol=1e-4)  # type: ignore[arg-type]
    assert [line["points"] for line in told(tmp_path / "out")] == ["file" if k in listed else "kept" for k in range(6)]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["points"] == {"file": 3, "kept": 3}


def test_of_two_images_but_for_the_suffix_the_one_of_that_name_is_meant(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a.jpg " + "9 " * 10 + "\na.png " + "5 " * 10 + "\n")
    found = listed_points(MaskCopyConfig(src="x", out=tmp_path, points=str(tmp_path / "p.txt")), ["a.jpg"])
    assert found is not None
    assert found.points(0, "a.jpg")[0, 0] == 9  # type: ignore[index]


def test_rows_of_nan_have_no_points(source: Path, tmp_path: Path) -> None:
    dense = np.load(source / "dense.npy")
    dense[2] = np.nan
    np.save(tmp_path / "some.npy", dense)
    assert main(["mask", str(source / "data"), str(tmp_path / "out"), "--points", str(tmp_path / "some.npy")]) == 0
    assert [line["points"] for line in told(tmp_path / "out")].count("kept") == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("no", None, "--points no: use kept, template, detected, or name a file"),
        ("no.txt", None, "no.txt: there is no such file"),
        ("p.txt", "", "holds no points"),
        ("p.txt", "p0/0.jpg 1 2 3\n", "line 1: 3 numbers behind the id; expected lines 'ID x1 y1"),
        ("p.txt", "p0/0.jpg " + "9 " * 10 + "\np0/1.jpg " + "9 " * 136, "136 numbers behind the id, 10 in the lines"),
        ("p.txt", "p0/0.jpg " + "9 " * 9 + "x\n", "line 1: could not convert string to float: 'x'"),
        ("p.txt", "p0/0.jpg " + "9 " * 10 + "\np0/0.jpg " + "8 " * 10, "line 2: 'p0/0.jpg' comes again with other"),
        ("p.txt", "p0/0.jpg " + "0.5 " * 10, "fractions of the image, not pixels; multiply them"),
        ("p.txt", "p0/0.jpg " + "1e7 " * 10, "which are no pixels"),
        ("p.txt", "q/0.jpg " + "9 " * 10, "none of its 1 images (first: q/0.jpg) is in"),
        ("p.csv", "id,x1,y1,x2,y2,x3,y3,x4,y4,x5,y5\np0/0.jpg,1,2,3\n", "line 2: has fewer columns than the header"),
        ("p.npy", b"junk", "is no array that can be read"),
        ("p.npy", (COUNT, 7, 2), "expected floats (N, K, 2), K one of 5, 68, 106, 468, 478"),
        ("p.npy", (3, 5, 2), "has points for 3 images, the data set has 6"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    source: Path, tmp_path: Path, name: str, content: Any, said: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if isinstance(content, tuple):
        np.save(name, np.full(content, 50, np.float32))
    elif content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["mask", str(source / "data"), "out", "--points", name]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not Path("out").exists()
    assert not Path("out.partial").exists()


def test_an_image_that_changed_is_masked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the middle; then one picture is another under the same name, of the same size in bytes."""
    faces = RenderedFaces(identities=20, images_per_identity=1, seed=3, size=64)
    files = []
    for k in range(20):
        file = tmp_path / "data" / f"p{k:02d}" / "a.png"
        file.parent.mkdir(parents=True)
        file.write_bytes(encode_image(faces.image(k), ".png"))
        files.append(file)
    arguments = ["mask", str(tmp_path / "data"), str(tmp_path / "out"), "--tool", "uv"]
    worn: list[int] = []

    def stopped(image: Any, points: Any, look: Any) -> Any:
        worn.append(1)
        if len(worn) == 18:
            raise KeyboardInterrupt
        return uv.wear(image, points, look)

    with monkeypatch.context() as patch:
        patch.setattr("visard.recipes.mask_writing.tool", lambda name: stopped)
        assert main(arguments) == 130
        files[2].write_bytes(files[19].read_bytes())
        capsys.readouterr()
        worn.clear()
        assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "images have changed since they were masked: 8 in 1 lots are made anew" in said
    assert "goes on: 8 of 20 images are done" in said
    assert len(worn) == 8 + 4
    assert main([*arguments[:2], str(tmp_path / "whole"), *arguments[3:]]) == 0
    assert (tmp_path / "out" / "train.rec").read_bytes() == (tmp_path / "whole" / "train.rec").read_bytes()
    assert "made_from" not in (tmp_path / "out" / "masks.jsonl").read_text()
