"""Every kind of network through the whole loop: it learns, in bf16 too, and a resumed run equals an unbroken one."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from tests.training.conftest import PaintedFaces, assert_same_bits, tiny_recipe, weights_of, with_steps
from tests.training.test_resume import stop_at
from visard.backbones import build
from visard.config import BackboneConfig, IRConfig, IResNetConfig, ResNetConfig, ViTConfig
from visard.errors import Interrupted
from visard.training.build import overrun_by_onednn
from visard.training.loop import train

NETWORKS: dict[str, BackboneConfig] = {
    "vit": ViTConfig(width=32, depth=2, heads=4, patch=8, embedding_dim=16, input_size=32, checkpointing=True),
    "resnet": ResNetConfig(blocks=(1, 1, 1, 1), width=8, embedding_dim=16, input_size=32),
    "ir": IRConfig(blocks=(1, 1, 1, 1), width=8, embedding_dim=16, input_size=32, dropout=0.1),
}


@pytest.mark.parametrize("backbone", NETWORKS.values(), ids=NETWORKS.keys())
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns_and_resumes_bit_for_bit(tmp_path: Path, backbone: BackboneConfig, precision: str) -> None:
    faces = PaintedFaces(size=32)
    whole = with_steps(tiny_recipe(tmp_path / "whole", precision=precision, log_every=5), 30)
    whole = replace(whole, backbone=backbone, data=replace(whole.data, size=32))
    train(whole, faces)
    rows = [json.loads(line) for line in (whole.run.out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses[-1] < 0.6 * losses[0]
    parts = replace(whole, run=replace(whole.run, out=tmp_path / "parts"))
    with pytest.raises(Interrupted) as caught:
        train(parts, faces, augment=stop_at(11, parts))
    assert caught.value.signal == signal.SIGTERM
    train(parts, faces, resume=True)
    assert_same_bits(weights_of(whole.run.out), weights_of(parts.run.out))


def test_a_network_too_narrow_for_onednn_trains_in_another_memory_layout(tmp_path: Path) -> None:
    """8 channels and a stride of 2 at 56 px ended in a segmentation fault: oneDNN writes beyond a buffer."""
    recipe = with_steps(tiny_recipe(tmp_path / "run"), 3)
    backbone = IResNetConfig(blocks=(1, 1, 1, 1), width=8, embedding_dim=16, input_size=56)
    run = train(replace(recipe, backbone=backbone, data=replace(recipe.data, size=56)), PaintedFaces(size=56))
    assert "layer1.0.downsample.0 is too narrow" in (run / "log.txt").read_text()
    assert not overrun_by_onednn(build(IResNetConfig()))
    assert not overrun_by_onednn(build(ResNetConfig()))
