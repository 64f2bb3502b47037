"""Any ONNX file as a frozen model: run before it is taken, its preprocessing kept; what is no embedding is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import visard
from visard import cli
from visard.deploy.importing import ImportConfig, main
from visard.errors import FormatError, UserError
from visard.runtime import load_module

SIZE, DIMENSIONS = 16, 5


def write(path: Path, *, batch: int | str = "B", size: int | str = SIZE, channels: int = 3, change: str = "") -> Path:
    """mean over pixels -> linear; or a `change` of it that is no embedding."""
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((channels, DIMENSIONS)).astype(np.float32), "w")
    constants = [weight, numpy_helper.from_array(np.array([-1, channels], np.int64), "shape")]
    nodes, source = [], "image"
    if change == "normalises":
        constants.append(numpy_helper.from_array(np.float32(127.5), "grey"))
        nodes.append(helper.make_node("Sub", [source, "grey"], ["centred"]))
        source = "centred"
    if change == "batch":
        nodes.append(helper.make_node("ReduceMean", [source], ["middle"], axes=[0], keepdims=1))
        nodes.append(helper.make_node("Sub", [source, "middle"], ["relative"]))
        source = "relative"
    nodes.append(helper.make_node("GlobalAveragePool", [source], ["pooled"]))
    nodes.append(helper.make_node("Reshape", ["pooled", "shape"], ["flat"]))
    nodes.append(helper.make_node("MatMul", ["flat", "w"], ["linear"]))
    if change == "constant":
        nodes.append(helper.make_node("Sub", ["linear", "linear"], ["embedding"]))
    elif change == "nan":
        nodes.append(helper.make_node("Log", ["linear"], ["embedding"]))
    else:
        nodes.append(helper.make_node("Identity", ["linear"], ["embedding"]))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, channels, size, size])
    results = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [batch, DIMENSIONS])]
    if change == "two":
        results.append(helper.make_tensor_value_info("flat", TensorProto.FLOAT, [batch, channels]))
    if change == "map":
        results = [helper.make_tensor_value_info("pooled", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "test", [image], results, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def embeddings(path: Path, crops: np.ndarray[Any, Any], mean: float, std: float, colour: str) -> np.ndarray[Any, Any]:
    weight = numpy_helper.to_array(onnx.load(path).graph.initializer[0]).astype(np.float64)
    pixels = crops.astype(np.float64)[..., :: 1 if colour == "RGB" else -1]
    return ((pixels - mean) / std).mean((1, 2)) @ weight


@pytest.mark.parametrize("batch", ["B", 1, 2])
@pytest.mark.parametrize("colour", ["RGB", "BGR"])
def test_it_embeds_with_the_given_preprocessing(tmp_path: Path, batch: int | str, colour: Any) -> None:
    path = write(tmp_path / "x.onnx", batch=batch)
    main(ImportConfig(weights=path, out=tmp_path / "model", mean=100, std=60, colour=colour))
    model = visard.load(tmp_path / "model", "cpu")
    crops = np.random.default_rng(1).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
    truth = embeddings(path, crops, 100, 60, colour)
    np.testing.assert_allclose(model(crops), truth, rtol=1e-4, atol=1e-5)
    assert (model.spec.input_size, model.spec.embedding_dim) == (SIZE, DIMENSIONS)
    assert model.spec.backbone["kind"] == "onnx"
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["model.onnx", "spec.json"]
    with pytest.raises(UserError, match="is frozen"):
        load_module(tmp_path / "model")


def test_grey_levels_are_the_fields_unless_the_graph_has_its_own(tmp_path: Path) -> None:
    answer = main(ImportConfig(weights=write(tmp_path / "plain.onnx"), out=tmp_path / "plain"))
    assert "the field's usual 127.5" in answer.text
    spec = visard.load(tmp_path / "plain", "cpu").spec
    assert (spec.mean, spec.std, spec.colour) == (127.5, 127.5, "RGB")
    own = write(tmp_path / "own.onnx", change="normalises")
    answer = main(ImportConfig(weights=own, out=tmp_path / "own"))
    assert "begins with Sub on its input, so mean 0 and std 1" in answer.text
    spec = visard.load(tmp_path / "own", "cpu").spec
    assert (spec.mean, spec.std) == (0, 1)
    (tmp_path / "own.spec.json").write_text(replace(spec, mean=100, std=50, colour="BGR").to_json())
    answer = main(ImportConfig(weights=own, out=tmp_path / "beside"))
    assert "from own.spec.json" in answer.text
    spec = visard.load(tmp_path / "beside", "cpu").spec
    assert (spec.mean, spec.std, spec.colour) == (100, 50, "BGR")
    spec_asked = main(ImportConfig(weights=own, out=tmp_path / "asked", mean=3, std=2)).value["spec"]
    assert (spec_asked["mean"], spec_asked["std"]) == (3, 2)


def test_the_size_is_the_graphs_or_must_be_given(tmp_path: Path) -> None:
    free = write(tmp_path / "free.onnx", size="S")
    with pytest.raises(UserError, match="may have any size; give --input-size"):
        main(ImportConfig(weights=free, out=tmp_path / "model"))
    assert main(ImportConfig(weights=free, out=tmp_path / "model", input_size=24)).value["spec"]["input_size"] == 24
    fixed = write(tmp_path / "fixed.onnx")
    with pytest.raises(UserError, match="its input is 16 x 16 px"):
        main(ImportConfig(weights=fixed, out=tmp_path / "other", input_size=24))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("constant", "the same vector for two random images"),
        ("nan", "NaN or infinity"),
        ("batch", "depends on the batch around it"),
        ("two", r"one image in and one vector out, it has .*'embedding', 'flat'"),
        ("map", r"expected embeddings \(B, D\)"),
    ],
)
def test_what_is_no_embedding_is_refused_and_leaves_nothing(tmp_path: Path, change: str, message: str) -> None:
    path = write(tmp_path / "x.onnx", change=change)
    with pytest.raises(UserError, match=message):
        main(ImportConfig(weights=path, out=tmp_path / "model"))
    assert [p.name for p in tmp_path.iterdir()] == ["x.onnx"]


def test_damaged_files_and_other_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey = write(tmp_path / "grey.onnx", channels=1)
    with pytest.raises(UserError, match=r"expected an input \(B, 3, S, S\)"):
        main(ImportConfig(weights=grey, out=tmp_path / "model"))
    path = write(tmp_path / "x.onnx")
    content = path.read_bytes()
    for cut in (0, 10, len(content) // 2, len(content) - 3):
        path.write_bytes(content[:cut])
        with pytest.raises((FormatError, UserError)):
            main(ImportConfig(weights=path, out=tmp_path / "model"))
    assert cli.main(["import", str(path), str(tmp_path / "model")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="no class centres"):
        main(ImportConfig(weights=path, out=tmp_path / "model", classes=3))
    assert not (tmp_path / "model").exists()
