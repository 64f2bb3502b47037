"""The one way to embed: what goes in, what comes out, which files are found, and what a mistake says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import visard
from visard.backbones import build
from visard.config import IResNetConfig
from visard.errors import FormatError, UserError
from visard.records import ModelSpec
from visard.runtime import Embedder, embedder_of, find_model, load, load_module, save_model, spec_for

CONFIG = IResNetConfig(blocks=(1, 1, 1, 1), width=4, embedding_dim=8, input_size=32)
SPEC = spec_for(CONFIG, origin="test")


@pytest.fixture
def module() -> torch.nn.Module:
    torch.manual_seed(0)
    return build(CONFIG)


@pytest.fixture
def model(tmp_path: Path, module: torch.nn.Module) -> Path:
    return save_model(module, SPEC, tmp_path / "model")


def crops(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)


def test_embeddings_are_the_networks_own(model: Path, module: torch.nn.Module) -> None:
    images = crops(5)
    found = visard.load(model)(images)
    expected = module.eval()(torch.from_numpy(images).permute(0, 3, 1, 2).float().sub(127.5).div(127.5))
    assert found.dtype == np.float32
    assert found.shape == (5, 8)
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-6)


def test_every_kind_of_input_is_the_same(model: Path) -> None:
    embedder = load(model, "cpu")
    images = crops(4)
    expected = embedder(images)
    locked = images.copy()
    locked.flags.writeable = False
    strided = np.concatenate([images, images], axis=2)[:, :, :32]
    for given in (list(images), tuple(images), torch.from_numpy(images), locked, strided):
        np.testing.assert_array_equal(embedder(given), expected)
    assert embedder(images[:0]).shape == embedder([]).shape == (0, 8)
    np.testing.assert_array_equal(locked, images)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_batches_are_split_and_joined(batch_size: int) -> None:
    seen: list[int] = []

    def forward(images: torch.Tensor) -> np.ndarray:
        seen.append(len(images))
        return images.float().mean((1, 2)).numpy()

    images = crops(10)
    found = Embedder(SPEC, forward, batch_size=batch_size)(images)
    np.testing.assert_allclose(found, images.mean((1, 2)), rtol=1e-5)
    assert max(seen) == min(batch_size, 10)
    assert sum(seen) == 10


def test_flip_mirrors_left_and_right(model: Path) -> None:
    embedder = load(model, "cpu")
    images = crops(3)
    straight, mirrored = embedder(images), embedder(np.ascontiguousarray(images[:, :, ::-1]))
    assert np.abs(straight - mirrored).max() > 1e-3
    np.testing.assert_array_equal(embedder.embed(images), straight)
    np.testing.assert_array_equal(embedder.embed(images, "sum"), straight + mirrored)
    np.testing.assert_array_equal(embedder.embed(images, "concat"), np.concatenate([straight, mirrored], axis=1))
    with pytest.raises(UserError, match="flip is 'both'; use none, sum, concat"):
        embedder.embed(images, "both")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (crops(2).astype(np.float32), "expected uint8 grey levels 0..255, got float32"),
        (torch.zeros(2, 32, 32, 3), "expected uint8 grey levels 0..255, got float32"),
        (crops(2)[:, :30], r"S = 32 px, got \(2, 30, 32, 3\).*--size 32"),
        (crops(2)[0], r"S = 32 px, got \(32, 32, 3\)"),
        (crops(2)[..., :1], r"got \(2, 32, 32, 1\)"),
        ([crops(1)[0], crops(1)[0, :8]], r"a list of \(S, S, 3\) with S = 32 px, got \(8, 32, 3\)"),
        ("crops", "expected a numpy array, a torch tensor or a list of arrays, got str"),
    ],
)
def test_wrong_crops_say_what_was_expected(model: Path, given: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(model, "cpu")(given)  # type: ignore[arg-type]


def test_a_live_network_is_evaluated_and_left_training(module: torch.nn.Module) -> None:
    module.bn1.eval()  # type: ignore[union-attr]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    embedder = embedder_of(module, SPEC)
    first = embedder(crops(3))
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    # Not a copy: what the network learns is what the next call uses.
    with torch.no_grad():
        module.fc.bias.add_(1)  # type: ignore[union-attr, operator]
    assert np.abs(embedder(crops(3)) - first).min() > 0.5
    # And the network can still be trained: nothing of it became an inference tensor.
    module(torch.randn(2, 3, 32, 32)).sum().backward()


def test_saved_and_loaded_weights_are_the_same(model: Path, module: torch.nn.Module) -> None:
    module.to(memory_format=torch.channels_last)
    loaded, spec = load_module(model)
    assert spec == SPEC
    assert loaded.training
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in module.state_dict().items())
    assert sorted(path.name for path in model.iterdir()) == ["model.safetensors", "spec.json"]
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_a_model_is_never_overwritten_and_never_half_written(
    model: Path, module: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="exists"):
        save_model(module, SPEC, model)

    def broken(self: ModelSpec) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(ModelSpec, "to_json", broken)
    with pytest.raises(KeyboardInterrupt):
        save_model(module, SPEC, model.with_name("other"))
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_runs_and_checkpoints_are_found(tmp_path: Path, module: torch.nn.Module) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in ("step_00000001", "step_00000002"):
        save_model(module, SPEC, checkpoints / step / "model")
    first, second = (checkpoints / step / "model" for step in ("step_00000001", "step_00000002"))
    with pytest.raises(UserError, match="no model here"):
        find_model(tmp_path / "run")
    (checkpoints / "last.json").write_text(json.dumps({"checkpoint": "step_00000002"}))
    assert find_model(tmp_path / "run") == second
    (checkpoints / "best.json").write_text(json.dumps({"checkpoint": "step_00000001", "score": 0.9}))
    assert find_model(tmp_path / "run") == first
    assert find_model(checkpoints / "step_00000002") == second
    assert load(tmp_path / "run", "cpu")(crops(1)).shape == (1, 8)
    (checkpoints / "best.json").write_text(json.dumps({"checkpoint": "step_00000009"}))
    with pytest.raises(UserError, match="names 'step_00000009'"):
        load(tmp_path / "run")
    for damaged in ("{", "[]", "{}"):
        (checkpoints / "best.json").write_text(damaged)
        with pytest.raises(FormatError, match=r"best\.json"):
            load(tmp_path / "run")


def test_damaged_models_are_named(model: Path) -> None:
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (b"", whole[:100], whole[:-8], b"\xff" * 64):
        weights.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"model\.safetensors: not readable"):
            load(model)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    save_file({name: t for name, t in tensors.items() if name != "fc.weight"}, weights)
    with pytest.raises(FormatError, match=r"missing fc\.weight; not known nothing"):
        load(model)
    save_file({**tensors, "fc.weight": tensors["fc.weight"][:, :5].contiguous()}, weights)
    with pytest.raises(FormatError, match=r"fc\.weight has shape \(8, 5\), expected \(8, 128\)"):
        load(model)
    weights.write_bytes(whole)
    (model / "spec.json").write_text(SPEC.to_json().replace('"input_size": 32', '"input_size": 48', 1))
    with pytest.raises(FormatError, match="differ from the backbone's"):
        load(model)
    (model / "spec.json").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="not a text file"):
        load(model)
    (model / "spec.json").unlink()
    with pytest.raises(UserError, match=r"spec\.json: not found"):
        load(model)


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for path, message in (
        (tmp_path / "nothing", "not found"),
        (tmp_path / "notes.txt", "not a model"),
        (tmp_path, "no model here"),
    ):
        with pytest.raises(UserError, match=message):
            load(path)


def onnx_file(path: Path, *, batch: int | str = "batch", outputs: int = 3) -> Path:
    """A graph written by hand: the mean of each colour over the image, cut to `outputs`."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("GlobalAveragePool", ["pixels"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["e"]),
    ]
    graph = helper.make_graph(
        nodes,
        "mean",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [batch, 3, 32, 32])],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, [batch, outputs])],
        [numpy_helper.from_array(np.eye(3, outputs, dtype=np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


FOREIGN = ModelSpec(backbone={"kind": "onnx"}, input_size=32, embedding_dim=3, colour="BGR", mean=10.0, std=2.0)


@pytest.mark.parametrize("batch", ["batch", 1, 4])
@pytest.mark.parametrize("spec_name", ["net.spec.json", "spec.json"])
def test_foreign_onnx_with_a_spec(tmp_path: Path, batch: int | str, spec_name: str) -> None:
    """Somebody else's file, even one frozen to a batch size, with the preprocessing written down beside it."""
    path = onnx_file(tmp_path / "net.onnx", batch=batch)
    (tmp_path / spec_name).write_text(FOREIGN.to_json())
    images = crops(7)
    expected = (images[..., ::-1].mean((1, 2)) - 10) / 2
    for batch_size in (64, 3):
        found = load(path, "cpu", batch_size=batch_size)(images)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_onnx_mistakes_are_named(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "net.onnx")
    with pytest.raises(UserError, match=r"net\.spec\.json: not found"):
        load(path)
    (tmp_path / "spec.json").write_text(FOREIGN.to_json())
    with pytest.raises(UserError, match="not on 'mps'"):
        load(path, "mps")
    onnx_file(path, outputs=2)
    with pytest.raises(UserError, match=r"gave \(2, 2\) for 2 crops, but its spec says 3 dimensions"):
        load(path, "cpu")(crops(2))
    path.write_bytes(b"no graph")
    with pytest.raises(FormatError, match="ONNX Runtime cannot read it"):
        load(path, "cpu")
    with pytest.raises(UserError, match="is frozen"):
        load_module(path)
