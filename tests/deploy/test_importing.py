"""Imported networks against an independent interpreter of the same files, and refusal of what cannot be imported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import visard
from tests.deploy.mxnet_files import interpret, params_bytes, write_mobilefacenet
from visard import cli
from visard.backbones import build
from visard.config import IResNetConfig
from visard.deploy.importing import ImportConfig, import_weights, main
from visard.deploy.mxnet import read_params
from visard.errors import FormatError, UserError
from visard.runtime import load_module

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"blocks": (1, 4, 6, 2)},
    "BroadFace": {"blocks": (2, 3, 1, 2), "side": 5},
    "relu": {"act": "relu", "blocks": (1, 1, 1, 0)},
    "no stage": {"blocks": (0, 0, 0, 0), "width": 16},
    "gamma used": {"blocks": (1, 0, 1, 1), "fix_gamma": False, "embedding_dim": 5},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_embeddings_equal_the_interpreted_graphs(tmp_path: Path, variant: dict[str, Any]) -> None:
    path = write_mobilefacenet(tmp_path, **variant)
    main(ImportConfig(weights=path, out=tmp_path / "model"))
    _assert_same_embeddings(path, tmp_path / "model", size=16 * variant.get("side", 4))
    _, spec = load_module(tmp_path / "model")
    assert tuple(spec.backbone["blocks"]) == variant["blocks"]
    assert (spec.mean, spec.std, spec.colour) == (127.5, 128.0, "RGB")
    assert spec.backbone["norm_eps"] == 1e-3


@pytest.mark.real_data
def test_y1_equals_the_interpreted_graph(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "models" / "mobilefacenet-y1"
    answer = main(ImportConfig(weights=folder, out=tmp_path / "y1"))
    assert answer.value["parameters"] == 1_003_136
    _assert_same_embeddings(folder / "model-0000.params", tmp_path / "y1", size=112)


def test_imported_networks_train(tmp_path: Path) -> None:
    found = import_weights(write_mobilefacenet(tmp_path))
    module, spec = found.module, found.spec
    assert module.training
    embeddings = module(torch.randn(4, 3, spec.input_size, spec.input_size))
    (embeddings * torch.randn_like(embeddings)).sum().backward()
    assert [name for name, value in module.named_parameters() if value.grad is None] == ["norm.weight"]
    assert all(value.grad.abs().max() > 0 for name, value in module.named_parameters() if value.grad is not None)


def _assert_same_embeddings(params: Path, model: Path, size: int) -> None:
    crops = np.random.default_rng(1).integers(0, 256, (3, size, size, 3), np.uint8)
    symbol = next(params.parent.glob("*-symbol.json"))
    truth = interpret(symbol, read_params(params), crops.transpose(0, 3, 1, 2))
    found = visard.load(model, "cpu")(crops)
    assert found.shape == truth.shape
    assert np.abs(found - truth).max() <= 1e-4 * np.abs(truth).max()


def _changed(path: Path, change: Any) -> Path:
    symbol = path.with_name("net-symbol.json")
    graph = json.loads(symbol.read_text())
    change({node["name"]: node for node in graph["nodes"]}, graph["nodes"])
    symbol.write_text(json.dumps(graph))
    return path


def _set(name: str, **attributes: str) -> Any:
    return lambda by_name, nodes: by_name[name]["attrs"].update(attributes)


CHANGES: dict[str, tuple[Any, str]] = {
    "operator": (
        lambda by_name, nodes: by_name["conv_1_relu"].update(op="Softmax"),
        r"cannot import Softmax \(conv_1_relu\)",
    ),
    "stride": (_set("res_3_block0_conv_dw_conv2d", stride="(2, 2)"), "5 convolutions of stride 2"),
    "padding": (_set("dconv_23_conv_dw_conv2d", pad="(0, 0)"), "layer dconv_23_conv_dw_conv2d is"),
    "dilation": (_set("dconv_23_conv_dw_conv2d", dilate="(2, 2)"), "layer dconv_23_conv_dw_conv2d is"),
    "groups": (_set("conv_2_dw_conv2d", num_group="1"), "layer conv_2_dw_conv2d is"),
    "filters": (_set("conv_6sep_conv2d", num_filter="63"), "layer conv_6sep_conv2d is"),
    "one eps": (_set("conv_1_batchnorm", eps="1e-5"), "2 different eps"),
    "last eps": (_set("fc1", eps="1e-3"), "layer fc1 is"),
    "leaky": (_set("conv_1_relu", act_type="leaky"), "layer conv_1_relu is"),
    "bias": (_set("conv_1_conv2d", no_bias="False"), "layer conv_1_conv2d is"),
    "shortcut from elsewhere": (
        lambda by_name, nodes: next(n for n in nodes if n["op"] == "elemwise_add")["inputs"].__setitem__(1, [9, 0, 0]),
        "shortcuts",
    ),
    "branch": (
        lambda by_name, nodes: by_name["conv_6sep_conv2d"]["inputs"].__setitem__(0, [9, 0, 0]),
        "conv_6sep_conv2d does not follow",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_a_graph_that_differs_is_refused_by_the_layers_name(tmp_path: Path, change: Any, message: str) -> None:
    path = _changed(write_mobilefacenet(tmp_path), change)
    with pytest.raises(UserError, match=message):
        import_weights(path)


def test_weights_that_do_not_fit_are_refused_by_the_arrays_name(tmp_path: Path) -> None:
    path = write_mobilefacenet(tmp_path)
    arrays = read_params(path)
    for change, message in (
        (lambda a: a.pop("arg:fc1_weight"), "'fc1_weight' that layer pre_fc1 reads is missing"),
        (
            lambda a: a.update({"arg:fc1_weight": a["arg:fc1_weight"][:, 1:]}),
            r"'fc1_weight' of layer pre_fc1 has shape",
        ),
        (lambda a: a["aux:fc1_moving_var"].fill(np.nan), "'fc1_moving_var' of layer fc1 holds NaN"),
    ):
        damaged = {name: array.copy() for name, array in arrays.items()}
        change(damaged)
        path.write_bytes(params_bytes(damaged))
        with pytest.raises(FormatError, match=message):
            import_weights(path)


def test_user_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_mobilefacenet(tmp_path)
    (tmp_path / "other.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    shutil.copy(path, tmp_path / "empty" / "lone-0000.params")
    model = str(tmp_path / "model")
    for weights, message in (
        (tmp_path / "missing.params", "not found"),
        (tmp_path / "other.txt", "cannot import .txt"),
        (tmp_path / "empty", "lone-symbol.json is not beside it"),
    ):
        assert cli.main(["import", str(weights), model]) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert len(errors) == 1
        assert message in errors[0]
    assert cli.main(["import", str(path), model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] > 0
    assert cli.main(["import", str(path), model]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("wrapped", [False, True])
def test_arcface_torch_state_dicts(tmp_path: Path, wrapped: bool) -> None:
    torch.manual_seed(0)
    config = IResNetConfig(blocks=(1, 2, 1, 1), width=4, embedding_dim=8, input_size=64)
    original = build(config)
    state: dict[str, Any] = original.state_dict()
    if wrapped:
        state = {"epoch": 3, "state_dict_backbone": {f"module.{name}": value for name, value in state.items()}}
    torch.save(state, tmp_path / "backbone.pt")
    found = import_weights(tmp_path / "backbone.pt")
    module, spec = found.module, found.spec
    assert found.centres is None
    assert spec.backbone["blocks"] == [1, 2, 1, 1]
    assert (spec.input_size, spec.embedding_dim, spec.mean, spec.std) == (64, 8, 127.5, 127.5)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(module.eval()(images), original.eval()(images), rtol=0, atol=0)


def test_other_torch_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "backbone.pt"
    path.write_bytes(b"not a zip file")
    with pytest.raises(FormatError, match="not a state dict"):
        import_weights(path)
    torch.save(build(IResNetConfig(width=2)), path)  # pickled code: never run
    with pytest.raises(UserError, match="no tensors in it; expected a state dict"):
        import_weights(path)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a network known here"):
        import_weights(path)
    state = build(IResNetConfig(blocks=(1, 1, 1, 1), width=2, embedding_dim=4)).state_dict()
    state["bn3.weight"] = torch.zeros(1)
    torch.save(state, path)
    with pytest.raises(UserError, match=r"1 tensors differ, first bn3\.weight"):
        import_weights(path)
