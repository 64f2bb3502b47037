"""Exported files: the same embeddings at every batch size, none where parity fails, nothing private in them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import visard
from tests.backbones.test_networks import TINY
from visard import cli
from visard.backbones import build
from visard.config import (
    BackboneConfig,
    IRConfig,
    IResNetConfig,
    MobileFaceNetConfig,
    ResNetConfig,
    ViTConfig,
)
from visard.deploy.export import BATCHES, TOLERANCE, ExportConfig, Parity, compare, export_onnx, main, weights_hash
from visard.errors import UserError
from visard.records import ModelSpec
from visard.runtime import Embedder, save_model, spec_for

# One of each kind of graph: convolutions, attention, pooling.
FAST: dict[str, BackboneConfig] = {
    "iresnet": IResNetConfig(blocks=(1, 1, 1, 1), width=4, embedding_dim=16, input_size=56),
    "mobilefacenet": MobileFaceNetConfig(blocks=(1, 0, 1, 1), width=8, embedding_dim=16, input_size=64),
    "vit": ViTConfig(width=16, depth=2, heads=2, embedding_dim=16, input_size=36),
    "resnet": ResNetConfig(blocks=(1, 1, 1, 1), width=4, embedding_dim=16, input_size=64),
    "ir": IRConfig(blocks=(1, 1, 1, 2), width=4, embedding_dim=16, input_size=56),
}


@pytest.fixture(scope="module", params=FAST.values(), ids=FAST.keys())
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model directory, the .onnx exported from it), colours and grey levels unlike the defaults."""
    folder = tmp_path_factory.mktemp("exported")
    module = trained(request.param)
    spec = spec_for(request.param, colour="BGR", mean=100.0, std=60.0, origin="test")
    save_model(module, spec, folder / "model")
    answer = main(ExportConfig(model=folder / "model", out=folder / "out" / "net.onnx"))
    assert answer.value["parity"]["crops"] == 7
    assert answer.value["opset"] == 18
    return folder / "model", folder / "out" / "net.onnx"


def trained(config: BackboneConfig) -> nn.Module:
    """A network whose batch norms have statistics and weights of their own, so that nothing cancels."""
    torch.manual_seed(0)
    module = build(config)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d):
            if part.affine and part.weight.requires_grad:
                nn.init.uniform_(part.weight, 0.5, 1.5)
            if part.affine:
                nn.init.normal_(part.bias, 0, 0.2)
    with torch.no_grad():
        for _ in range(3):
            module(torch.randn(8, 3, config.input_size, config.input_size))
    return module


@pytest.mark.parametrize("batch", [1, 2, 7, 70])
def test_the_file_embeds_as_the_model_at_any_batch(exported: tuple[Path, Path], batch: int) -> None:
    model, onnx_file = exported
    reference, other = visard.load(model, "cpu"), visard.load(onnx_file, "cpu", batch_size=70)
    size = reference.spec.input_size
    crops = np.random.default_rng(batch).integers(0, 256, (batch, size, size, 3), np.uint8)
    for flip in ("none", "sum", "concat"):
        np.testing.assert_allclose(other.embed(crops, flip), reference.embed(crops, flip), rtol=1e-3, atol=1e-5)


def test_the_spec_beside_it_keeps_the_preprocessing(exported: tuple[Path, Path]) -> None:
    model, onnx_file = exported
    spec = visard.load(onnx_file, "cpu").spec
    original = visard.load(model, "cpu").spec
    assert (spec.colour, spec.mean, spec.std, spec.origin) == ("BGR", 100.0, 60.0, "test")
    assert (spec.input_size, spec.embedding_dim) == (original.input_size, original.embedding_dim)
    assert spec.backbone["kind"] == "onnx"
    assert spec.backbone["network"] == original.backbone
    assert len(spec.backbone["weights_sha256"]) == 64
    assert sorted(path.name for path in onnx_file.parent.iterdir()) == ["net.onnx", "net.spec.json"]


def test_the_graph_is_standard_and_tells_nothing_of_this_machine(exported: tuple[Path, Path]) -> None:
    import onnx

    graph = onnx.load(exported[1])
    assert [(item.domain, item.version) for item in graph.opset_import] == [("", 18)]
    (given,), (result,) = graph.graph.input, graph.graph.output
    assert (given.name, result.name) == ("input", "embedding")
    assert [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim][:2] == ["batch", 3]
    assert {t.data_type for t in graph.graph.initializer} <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    content = exported[1].read_bytes()
    assert b"site-packages" not in content
    assert str(Path(visard.__file__).parent).encode() not in content
    assert graph.producer_name == "visard"


def test_a_run_exports_its_best_checkpoint(tmp_path: Path) -> None:
    spec = spec_for(FAST["iresnet"])
    module = trained(FAST["iresnet"])
    for step in ("step_00000001", "step_00000002"):
        with torch.no_grad():
            next(module.parameters()).mul_(1.5)
        save_model(module, spec, tmp_path / "run" / "checkpoints" / step / "model")
        if step.endswith("1"):
            best = weights_hash(module)
    for name, step in (("best", "step_00000001"), ("last", "step_00000002")):
        (tmp_path / "run" / "checkpoints" / f"{name}.json").write_text(json.dumps({"checkpoint": step}))
    main(ExportConfig(model=tmp_path / "run", out=tmp_path / "net.onnx"))
    assert visard.load(tmp_path / "net.onnx", "cpu").spec.backbone["weights_sha256"] == best


def test_failed_parity_leaves_nothing_and_keeps_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is given another grey-level mean behind the exporter's back: parity must notice."""
    module = trained(FAST["iresnet"])
    module.bn1.eval()  # type: ignore[union-attr]
    modes, weights, precision = _modes(module), weights_hash(module), torch.get_float32_matmul_precision()
    out = tmp_path / "net.onnx"
    out.write_bytes(b"older")
    original = ModelSpec.to_json

    def wrong(self: ModelSpec) -> str:
        return original(self).replace('"mean": 127.5', '"mean": 120.0')

    monkeypatch.setattr(ModelSpec, "to_json", wrong)
    with pytest.raises(UserError, match=r"not written: ONNX Runtime is .* off the network; the limit is 1e-05"):
        export_onnx(module, spec_for(FAST["iresnet"]), out)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    assert out.read_bytes() == b"older"
    # And the network is as it was, with whatever parts were training.
    assert _modes(module) == modes
    assert weights_hash(module) == weights
    assert torch.get_float32_matmul_precision() == precision


def _modes(module: nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]


def test_nan_never_counts_as_parity(monkeypatch: pytest.MonkeyPatch, exported: tuple[Path, Path]) -> None:
    import onnx

    from visard.deploy import export

    module = trained(FAST["iresnet"])
    spec = spec_for(FAST["iresnet"])
    monkeypatch.setattr(export, "_graph", lambda module, spec: onnx.load(exported[1]))
    nan = Parity(direction=float("nan"), length=0.0, crops=1, batches=BATCHES)
    for parity in (nan, dataclasses.replace(nan, direction=0.0, length=float("nan"))):
        monkeypatch.setattr(export, "compare", lambda *_, parity=parity: parity)
        with pytest.raises(UserError, match="not written"):
            export_onnx(module, spec, exported[1].with_name("nan.onnx"))
    assert not exported[1].with_name("nan.onnx").exists()


def test_real_crops_are_compared_too() -> None:
    spec = spec_for(FAST["iresnet"])

    def mean_colour(images: torch.Tensor) -> np.ndarray:
        return images.float().mean((1, 2)).repeat(1, 6)[:, :16].numpy() + 1

    def wrong_on_black(images: torch.Tensor) -> np.ndarray:
        embeddings = mean_colour(images)
        embeddings[(images.sum((1, 2, 3)) == 0).numpy(), 0] += 1
        return embeddings

    black = np.zeros((3, 56, 56, 3), np.uint8)
    reference, other = Embedder(spec, mean_colour), Embedder(spec, wrong_on_black)
    assert compare(reference, other) == Parity(direction=0.0, length=0.0, crops=7, batches=BATCHES)
    found = compare(reference, other, black)
    assert found.crops == 10
    assert found.direction > 0.01 > TOLERANCE


def test_user_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "frozen.onnx").write_bytes(b"")
    for model, out, message in (
        (tmp_path / "none", tmp_path / "net.onnx", "not found"),
        (tmp_path, tmp_path / "net.onnx", "no model here"),
        (tmp_path, tmp_path / "net.pb", "must end in .onnx or .pt"),
        (tmp_path / "frozen.onnx", tmp_path / "net.onnx", "is frozen"),
    ):
        assert cli.main(["export", str(model), str(out)]) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert len(errors) == 1
        assert message in errors[0]
    with torch.device("meta"):
        huge = build(IResNetConfig(width=400))
    with pytest.raises(UserError, match="at most 2 GB"):
        export_onnx(huge, spec_for(IResNetConfig(width=400)), tmp_path / "net.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [*TINY.values(), IResNetConfig(), MobileFaceNetConfig(blocks=(2, 8, 16, 4), embedding_dim=128)],
    ids=[*TINY, "iresnet50", "BroadFace"],
)
def test_every_network_exports(config: BackboneConfig, tmp_path: Path) -> None:
    parity = export_onnx(trained(config), spec_for(config), tmp_path / "net.onnx")
    assert max(parity.direction, parity.length) <= TOLERANCE


@pytest.mark.real_data
def test_y1_exports_with_parity(tmp_path: Path, shared_data: Path) -> None:
    from visard.deploy.importing import ImportConfig
    from visard.deploy.importing import main as import_main

    import_main(ImportConfig(weights=shared_data / "models" / "mobilefacenet-y1", out=tmp_path / "y1"))
    answer = main(ExportConfig(model=tmp_path / "y1", out=tmp_path / "y1.onnx"))
    assert answer.value["parity"]["direction"] <= TOLERANCE
