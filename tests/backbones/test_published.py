"""Our networks against the published layouts restated: the same names in the same order, the same embeddings."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backbones import published_layouts as layouts
from visard.backbones import build
from visard.backbones.published import check_fit, config_of, read_torch_file, take
from visard.config import BackboneConfig, IRConfig, IResNetConfig, ResNetConfig, ViTConfig
from visard.errors import FormatError, UserError

FULL: dict[str, tuple[layouts.Layout, BackboneConfig]] = {
    "r50": (layouts.iresnet_layout((3, 4, 14, 3), 64, 512, 7), IResNetConfig()),
    "r100": (layouts.iresnet_layout((3, 13, 30, 3), 64, 512, 7), IResNetConfig(blocks=(3, 13, 30, 3))),
    "vit_t": (layouts.vit_layout(256, 12, 512, 12), ViTConfig()),
    "vit_s": (layouts.vit_layout(512, 12, 512, 12), ViTConfig(width=512)),
    "vit_b": (layouts.vit_layout(512, 24, 512, 12), ViTConfig(width=512, depth=24)),
    "vit_l": (layouts.vit_layout(768, 24, 512, 12), ViTConfig(width=768, depth=24)),
    "adaface ir18": (layouts.ir_layout((2, 2, 2, 2), 64, 512, 7), IRConfig(blocks=(2, 2, 2, 2))),
    "adaface ir50": (layouts.ir_layout((3, 4, 14, 3), 64, 512, 7), IRConfig()),
    "adaface ir101": (layouts.ir_layout((3, 13, 30, 3), 64, 512, 7), IRConfig(blocks=(3, 13, 30, 3))),
    "resnet18": (
        layouts.resnet_layout((2, 2, 2, 2), 64, 1000, bottleneck=False),
        ResNetConfig(block="basic", blocks=(2, 2, 2, 2), embedding_dim=1000),
    ),
    "resnet50": (layouts.resnet_layout((3, 4, 6, 3), 64, 1000, bottleneck=True), ResNetConfig(embedding_dim=1000)),
}

Forward = Callable[[layouts.State, Tensor], Tensor]
SMALL: dict[str, tuple[layouts.Layout, Forward, int]] = {
    "iresnet": (layouts.iresnet_layout((1, 2, 1, 2), 8, 16, 4), layouts.iresnet_forward, 64),
    "vit": (layouts.vit_layout(32, 3, 16, 5), layouts.vit_forward, 45),
    "ir": (layouts.ir_layout((1, 2, 1, 2), 8, 16, 4), lambda s, x: layouts.ir_forward(s, x, (1, 2, 1, 2)), 64),
    "resnet": (layouts.resnet_layout((1, 2, 1, 2), 8, 16, bottleneck=True), layouts.resnet_forward, 96),
    "resnet basic": (layouts.resnet_layout((2, 1, 1, 2), 8, 16, bottleneck=False), layouts.resnet_forward, 96),
}


@pytest.mark.parametrize(("layout", "config"), FULL.values(), ids=FULL.keys())
def test_names_shapes_and_order_are_the_published_ones(layout: layouts.Layout, config: BackboneConfig) -> None:
    with torch.device("meta"):
        state = build(config).state_dict()
        found = config_of({name: torch.empty(shape) for name, shape in layout.items()}, where="file")
    assert [(name, tuple(tensor.shape)) for name, tensor in state.items()] == list(layout.items())
    assert found == config


@pytest.mark.parametrize(("layout", "forward", "size"), SMALL.values(), ids=SMALL.keys())
def test_embeddings_are_those_of_the_restated_network(layout: layouts.Layout, forward: Forward, size: int) -> None:
    state = layouts.random_state(layout)
    config = config_of(state, where="file", input_size=size)
    module = build(config)
    check_fit(state, module, where="file")
    module.load_state_dict(state)
    module.double().eval()
    images = torch.randn(3, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    truth = forward({name: tensor.double() for name, tensor in state.items()}, images)
    assert truth.std(0).min() > 1e-3  # the images are told apart, so that equality means something
    with torch.no_grad():
        # ViT's attention and norms work in float32; everything else is float64 here.
        tolerance = 1e-5 if config.kind == "vit" else 1e-10
        found = module(images) if config.kind != "vit" else module.float()(images.float()).double()
    torch.testing.assert_close(found, truth, rtol=tolerance, atol=tolerance * float(truth.abs().max()))


def test_a_wrong_epsilon_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The restated network is sensitive to what the tests above claim to check."""
    layout, forward, size = SMALL["vit"]
    state = {name: t.double() for name, t in layouts.random_state(layout).items()}
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    truth = forward(state, images)
    original = layouts.batch_norm
    monkeypatch.setattr(layouts, "batch_norm", lambda s, n, x, eps: original(s, n, x, 1e-3))
    assert (forward(state, images) - truth).abs().max() > 1e-4 * truth.abs().max()


@pytest.mark.parametrize("wrapper", ["", "module.", "model.", "net."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_wrapped_names_are_unwrapped(tmp_path: Path, wrapper: str, suffix: str) -> None:
    state = layouts.random_state(SMALL["ir"][0])
    path = tmp_path / f"weights{suffix}"
    wrapped = {wrapper + name: tensor for name, tensor in state.items()}
    if suffix == ".pt":
        torch.save({"state_dict": wrapped} if wrapper else wrapped, path)
    else:
        import safetensors.torch

        safetensors.torch.save_file(wrapped, path)
    file = read_torch_file(path)
    assert file.wrapper == wrapper
    assert file.tensors.keys() == state.keys()
    assert all(torch.equal(file.tensors[name], state[name]) for name in state)


class Explosive:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code of the file was run')",)


class Callback:
    def __init__(self) -> None:
        self.best = 0.5


class Config(dict[str, int]):
    """As easydict and Lightning keep settings."""


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    import numpy as np

    state = layouts.random_state(SMALL["ir"][0])
    path = tmp_path / "checkpoint.ckpt"
    besides = [Explosive(), Callback(), Config(a=1), np.float64(0.5), np.dtype("f4")]
    torch.save({"state_dict": state, "callbacks": {Callback: besides[1]}, "besides": besides}, path)
    file = read_torch_file(path)
    assert file.tensors.keys() == state.keys()
    with pytest.raises(SystemExit):
        torch.load(path, weights_only=False)


def test_older_files_of_torch_are_read(tmp_path: Path) -> None:
    state = layouts.random_state(SMALL["vit"][0])
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_torch_file(tmp_path / "old.pth").tensors.keys() == state.keys()


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_are_format_errors(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "damaged.pt"
    torch.save({"a.weight": torch.arange(300.0)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for cut in range(0, len(content) - 1, 37):
        path.write_bytes(content[:cut])
        with pytest.raises(UserError):
            read_torch_file(path)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        at, bit = (int(torch.randint(n, (), generator=generator)) for n in (len(content), 8))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        with contextlib.suppress(UserError):  # anything else would escape
            read_torch_file(path)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"state_dict": [1]}, torch.zeros(3)])
def test_other_contents_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match="state dict"):
        read_torch_file(tmp_path / "other.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": torch.zeros(2)}))
    with pytest.raises(FormatError):
        read_torch_file(tmp_path / "plain.pt")


def test_what_is_nearly_known_is_named() -> None:
    layout = layouts.vit_layout(16, 1, 8, 4)
    tensors = layouts.random_state({k: v for k, v in layout.items() if k != "feature.2.weight"})
    with pytest.raises(UserError, match=r"nearly arcface_torch's ViT, but 'feature\.2\.weight' is missing"):
        config_of(tensors, where="x.pt")
    tensors = layouts.random_state(layout | {"pos_embed": (1, 17, 16)})
    with pytest.raises(UserError, match="17 values over 1 channels is not square"):
        config_of(tensors, where="x.pt")
    tensors = layouts.random_state(layouts.ir_layout((1, 1, 1, 1), 4, 8, 2))
    tensors["body.3.res_layer.4.weight"] = torch.zeros(128, 1, 1, 1)
    with pytest.raises(UserError, match="bottleneck and SE variants are not supported"):
        config_of(tensors, where="x.pt")
    with pytest.raises(UserError, match=r"x\.pt: not a network known here \(its tensors begin with stem\.weight\)"):
        config_of({"stem.weight": torch.zeros(1)}, where="x.pt")


@pytest.mark.parametrize(
    ("layout", "sizes", "not_possible"),
    [
        (layouts.iresnet_layout((1, 1, 1, 1), 4, 8, 7), {0: 112, 97: 97, 112: 112}, (96, 113)),
        (layouts.vit_layout(8, 1, 8, 12), {0: 112, 108: 108, 116: 116}, (107, 117)),
        (layouts.vit_layout(8, 1, 8, 7), {0: 63, 71: 71}, (72,)),
        (layouts.resnet_layout((1, 1, 1, 1), 4, 8, bottleneck=False), {0: 224, 112: 112}, ()),
    ],
)
def test_the_crop_size_is_read_from_shapes(
    layout: layouts.Layout, sizes: dict[int, int], not_possible: tuple[int, ...]
) -> None:
    tensors = layouts.random_state(layout)
    for asked, found in sizes.items():
        assert config_of(tensors, where="x.pt", input_size=asked).input_size == found
    for size in not_possible:
        with pytest.raises(UserError, match=f"not of {size}"):
            config_of(tensors, where="x.pt", input_size=size)


def test_a_classifier_is_left_and_everything_else_is_taken() -> None:
    """ImageNet's ResNet as the start of an embedding network."""
    pretrained = layouts.random_state(layouts.resnet_layout((1, 1, 1, 1), 4, 10, bottleneck=True))
    module = build(ResNetConfig(blocks=(1, 1, 1, 1), width=4, embedding_dim=16, input_size=64))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    taken, left = take(pretrained, module, "resnet", where="x.pth")
    assert left == ["fc.weight", "fc.bias"]
    after = module.state_dict()
    assert all(torch.equal(after[name], pretrained[name]) for name in taken)
    assert all(torch.equal(after[name], before[name]) for name in left)
    assert sorted(taken + left) == sorted(after)
    # The same number of outputs: the layer is taken, too. Half a layer never is.
    same = build(ResNetConfig(blocks=(1, 1, 1, 1), width=4, embedding_dim=10, input_size=64))
    assert take(pretrained, same, "resnet", where="x.pth")[1] == []
    halved = {name: tensor for name, tensor in pretrained.items() if name != "fc.weight"}
    assert take(halved, same, "resnet", where="x.pth")[1] == ["fc.weight", "fc.bias"]
    # Files of torch before 1.0.
    uncounted = {name: tensor for name, tensor in pretrained.items() if "num_batches" not in name}
    assert all(name.endswith("tracked") for name in take(uncounted, same, "resnet", where="x.pth")[1])
    for change, message in (
        ({"layer9.0.conv1.weight": torch.zeros(1)}, r"layer9\.0\.conv1\.weight is not of this network"),
        ({"conv1.weight": torch.zeros(1)}, r"conv1\.weight is missing or of another shape"),
    ):
        with pytest.raises(UserError, match=message):
            take(pretrained | change, module, "resnet", where="x.pth")


def test_nan_is_refused() -> None:
    state = layouts.random_state(SMALL["vit"][0])
    module = build(config_of(state, where="x.pt"))
    state["norm.bias"][3] = torch.nan
    with pytest.raises(UserError, match=r"x\.pt: norm\.bias holds NaN"):
        check_fit(state, module, where="x.pt")
