"""What travels with weights: preprocessing by channel, and what older spec.json files say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from visard.backbones import build
from visard.config import ResNetConfig
from visard.deploy.export import compare, export_onnx
from visard.errors import UserError
from visard.records import ModelSpec
from visard.runtime import load, load_module, save_model, spec_for

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def spec(**values: object) -> ModelSpec:
    return ModelSpec(backbone={}, input_size=16, embedding_dim=4, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("colour", ["RGB", "BGR"])
def test_three_levels_are_those_of_red_green_and_blue(colour: str) -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8))
    expected = ((images.double() - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    if colour == "BGR":
        expected = expected.flip(1)
    pixels = spec(mean=MEAN, std=STD, colour=colour).normalise(images)
    torch.testing.assert_close(pixels.double(), expected, rtol=0, atol=1e-6)
    assert pixels.is_contiguous(memory_format=torch.channels_last)


def test_three_equal_levels_are_one() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8))
    assert torch.equal(spec(mean=(127.5,) * 3, std=(127.5,) * 3).normalise(images), spec().normalise(images))


def test_json_and_back() -> None:
    by_channel = spec(mean=MEAN, std=STD, template="none")
    assert ModelSpec.from_json(by_channel.to_json()) == by_channel
    assert ModelSpec(**json.loads(by_channel.to_json())).hash == by_channel.hash
    assert by_channel.framing == "photograph"
    assert by_channel.contract == (
        "16 px RGB centres of photographs, (x - 123.675 116.28 103.53) / 58.395 57.12 57.375"
    )
    older = {"backbone": {}, "input_size": 112, "embedding_dim": 4, "mean": 127.5, "std": 128}
    read = ModelSpec.from_json(json.dumps(older))
    assert (read.mean, read.std, read.framing) == (127.5, 128.0, "crop")
    assert read.contract == "112 px RGB crops, (x - 127.5) / 128"


@pytest.mark.parametrize("values", [{"std": (1.0, 0.0, 1.0)}, {"std": 0.0}, {"template": "dlib"}])
def test_impossible_specs_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(UserError, match="spec: "):
        spec(**values)


@pytest.mark.parametrize("mean", [[1.0, 2.0], ["a", 1.0, 2.0], "127"])
def test_other_levels_are_refused(mean: object) -> None:
    values = {"backbone": {}, "input_size": 112, "embedding_dim": 4, "mean": mean}
    with pytest.raises(UserError, match="mean"):
        ModelSpec.from_json(json.dumps(values))


def test_an_exported_network_is_fed_by_channel_too(tmp_path: Path) -> None:
    config = ResNetConfig(block="basic", blocks=(1, 1, 1, 1), width=8, embedding_dim=8, input_size=32)
    torch.manual_seed(0)
    module = build(config)
    save_model(module, spec_for(config, mean=MEAN, std=STD), tmp_path / "model")
    module, found = load_module(tmp_path / "model")
    parity = export_onnx(module, found, tmp_path / "model.onnx")
    assert parity.direction < 1e-4
    assert load(tmp_path / "model.onnx", "cpu").spec.mean == MEAN
    again = compare(load(tmp_path / "model", "cpu"), load(tmp_path / "model.onnx", "cpu"))
    assert again.direction < 1e-4
