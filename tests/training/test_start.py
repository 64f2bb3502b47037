"""Starting from weights that others published, and from imported checkpoints with their class centres."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.backbones import published_layouts as layouts
from tests.training.conftest import SIZE, PaintedFaces, tiny_recipe, weights_of, with_steps
from visard.backbones import build
from visard.backbones.slim import slim
from visard.config import IResNetConfig, Recipe, ResNetConfig, RunConfig, ViTConfig, to_dict
from visard.deploy.importing import ImportConfig
from visard.deploy.importing import main as import_main
from visard.errors import UserError
from visard.recipes.train import parse
from visard.runtime import load
from visard.training.loop import train

RESNET = ResNetConfig(blocks=(1, 1, 1, 1), width=4, embedding_dim=16, input_size=32)
IMAGENET = layouts.resnet_layout((1, 1, 1, 1), 4, 10, bottleneck=True)


def still(recipe: Recipe) -> Recipe:
    """One step that moves nothing, so that what was taken can be seen in the checkpoint."""
    return replace(with_steps(recipe, 1), optim=replace(recipe.optim, lr=1e-12))


def of_resnet(out: Path, init: Path, **run: object) -> Recipe:
    recipe = still(tiny_recipe(out, init=str(init), **run))
    return replace(recipe, backbone=RESNET, data=replace(recipe.data, size=32))


def test_torchvisions_weights_start_a_run(tmp_path: Path) -> None:
    pretrained = layouts.random_state(IMAGENET)
    torch.save(pretrained, tmp_path / "resnet.pth")
    run = train(of_resnet(tmp_path / "run", tmp_path / "resnet.pth"), PaintedFaces(size=32))
    new = weights_of(run)
    for name, tensor in pretrained.items():
        if not name.startswith("fc.") and not name.endswith(("running_mean", "running_var", "tracked")):
            torch.testing.assert_close(new[f"backbone.{name}"], tensor, rtol=0, atol=1e-6)
    assert new["backbone.fc.weight"].shape == (16, 128)
    log = (run / "log.txt").read_text()
    count = len(pretrained)
    assert f"{count - 2} of {count} tensors from {tmp_path / 'resnet.pth'}; new are fc.weight, fc.bias" in log
    assert "all 6 class centres are new" in log
    assert "input 32 px RGB crops, (x - 127.5) / 127.5" in log  # 10 classes: whose, nobody knows


def test_a_classifier_of_imagenet_brings_its_preprocessing(tmp_path: Path) -> None:
    """1000 classes: mean and deviation by channel go into the spec of every checkpoint, and the network is fed so."""
    pretrained = layouts.random_state(layouts.resnet_layout((1, 1, 1, 1), 4, 1000, bottleneck=True))
    torch.save(pretrained, tmp_path / "resnet.pth")
    run = train(of_resnet(tmp_path / "run", tmp_path / "resnet.pth"), PaintedFaces(size=32))
    log = (run / "log.txt").read_text()
    assert "new are fc.weight, fc.bias; input 32 px RGB crops, (x - 123.675 116.28 103.53) / 58.395 57.12 57.375" in log
    spec = load(run, "cpu").spec
    assert (spec.mean, spec.std) == ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


def test_the_file_gives_the_network_and_the_recipe_its_size(tmp_path: Path) -> None:
    """On the command line: a ResNet's crop size and dimensions are the recipe's, a face network's are its own."""
    torch.save(layouts.random_state(IMAGENET), tmp_path / "resnet.pth")
    torch.save(layouts.random_state(layouts.vit_layout(16, 2, 24, 5)), tmp_path / "vit.pt")

    def parsed(*arguments: str) -> Recipe:
        request = parse(["quickstart", *arguments])
        assert request is not None
        return request.recipe

    plain = parsed()
    resnet = parsed("--init", str(tmp_path / "resnet.pth"))
    size, dimensions = plain.backbone.input_size, plain.backbone.embedding_dim
    assert resnet.backbone == replace(RESNET, input_size=size, embedding_dim=dimensions)
    vit = parsed("--init", str(tmp_path / "vit.pt"))
    assert vit.backbone == ViTConfig(width=16, depth=2, embedding_dim=24, input_size=45)
    assert vit.data.size == 45


def test_settings_of_training_stay_the_recipes(tmp_path: Path) -> None:
    from visard.backbones.published import config_of, started_config

    found = config_of(layouts.random_state(layouts.vit_layout(16, 2, 24, 5)), where="x.pt")
    wanted = ViTConfig(width=8, heads=4, depth=1, drop_path=0.3, mask_ratio=0.0, checkpointing=True)
    started = started_config(found, wanted)
    assert isinstance(started, ViTConfig)
    assert (started.width, started.depth, started.embedding_dim) == (16, 2, 24)
    assert (started.heads, started.drop_path, started.mask_ratio, started.checkpointing) == (4, 0.3, 0.0, True)
    assert started_config(found, IResNetConfig()) == found


def test_files_of_another_network_are_refused(tmp_path: Path, faces: PaintedFaces) -> None:
    torch.save(layouts.random_state(IMAGENET), tmp_path / "resnet.pth")
    with pytest.raises(UserError, match="a network of kind resnet, the recipe's is iresnet"):
        train(still(tiny_recipe(tmp_path / "run", init=str(tmp_path / "resnet.pth"))), faces)
    other = of_resnet(tmp_path / "run", tmp_path / "resnet.pth")
    other = replace(other, backbone=replace(RESNET, width=8))
    with pytest.raises(UserError, match=r"not weights of this resnet: conv1\.weight is missing or of another shape"):
        train(other, PaintedFaces(size=32))
    in_order = of_resnet(tmp_path / "run", tmp_path / "resnet.pth", init_centres="in-order")
    with pytest.raises(UserError, match="visard import"):
        train(in_order, PaintedFaces(size=32))


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    """A model imported from an arcface_torch checkpoint of two ranks, six classes, that fits `tiny_recipe`."""
    folder = tmp_path / "arcface"
    folder.mkdir()
    state = layouts.random_state(layouts.iresnet_layout((1, 1, 1, 1), 4, 16, SIZE // 16))
    for rank in range(2):
        softmax = {"weight": torch.arange(3 * 16).view(3, 16) / 48 + rank}
        content = {"epoch": 1, "global_step": 5, "state_dict_backbone": state, "state_dict_softmax_fc": softmax}
        torch.save(content, folder / f"checkpoint_gpu_{rank}.pt")
    import_main(ImportConfig(weights=folder, out=tmp_path / "model"))
    return tmp_path / "model"


def without_dropout(recipe: Recipe) -> Recipe:
    return replace(recipe, backbone=replace(recipe.backbone, dropout=0.0))


def test_imported_centres_are_taken_in_order_where_asked(tmp_path: Path, imported: Path, faces: PaintedFaces) -> None:
    run = train(without_dropout(still(tiny_recipe(tmp_path / "a", init=str(imported)))), faces)
    assert "have no names; --run.init-centres in-order takes them" in (run / "log.txt").read_text()
    recipe = without_dropout(still(tiny_recipe(tmp_path / "b", init=str(imported), init_centres="in-order")))
    run = train(recipe, faces)
    expected = torch.cat([torch.arange(3 * 16).view(3, 16) / 48 + rank for rank in range(2)])
    torch.testing.assert_close(weights_of(run)["head.weight"], expected, rtol=0, atol=1e-6)
    assert f"all 6 class centres from {imported}, in order" in (run / "log.txt").read_text()
    # Another run, too: here the names would have said so, but a bare .rec file has none.
    numbered = PaintedFaces(identities=tuple(map(str, range(6))))
    recipe = without_dropout(still(tiny_recipe(tmp_path / "c", init=str(run), init_centres="in-order")))
    again = train(recipe, numbered)
    torch.testing.assert_close(weights_of(again)["head.weight"], expected, rtol=0, atol=1e-6)


def test_centres_in_order_must_be_as_many_and_there(tmp_path: Path, imported: Path, faces: PaintedFaces) -> None:
    recipe = without_dropout(still(tiny_recipe(tmp_path / "run", init=str(imported), init_centres="in-order")))
    fewer = PaintedFaces(identities=("a", "b", "c"))
    with pytest.raises(UserError, match=r"class centres of shape \(6, 16\), the head's are \(3, 16\)"):
        train(recipe, fewer)
    (imported / "centres.safetensors").unlink()
    with pytest.raises(UserError, match="has no class centres; leave it at by-name"):
        train(recipe, faces)
    assert RunConfig().init_centres == "by-name"


def test_a_smaller_network_is_cut_out_of_the_model(tmp_path: Path, faces: PaintedFaces) -> None:
    large = still(tiny_recipe(tmp_path / "large"))
    large = replace(large, backbone=replace(large.backbone, blocks=(2, 1, 1, 1), width=6))
    run = train(large, faces)
    small = still(tiny_recipe(tmp_path / "cut", init=str(run), init_network="slim"))
    started = train(small, faces)
    assert load(started, "cpu").spec.backbone == to_dict(small.backbone)
    # A step of nothing moves the running statistics alone.
    source, cut = (
        {name.removeprefix("backbone."): tensor for name, tensor in weights_of(path).items()} for path in (run, started)
    )
    expected = slim({name: source[name] for name in build(large.backbone).state_dict()}, large.backbone, small.backbone)
    for name, tensor in expected.items():
        if not name.endswith(("running_mean", "running_var", "tracked")):
            torch.testing.assert_close(cut[name], tensor, rtol=0, atol=1e-6)
    log = (started / "log.txt").read_text()
    assert f"weights from {run}, cut to " in log


def test_what_slim_is_asked_to_cut_must_be_a_model(tmp_path: Path, faces: PaintedFaces) -> None:
    torch.save(layouts.random_state(IMAGENET), tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"run\.init_network slim cuts a model; `visard import "):
        train(of_resnet(tmp_path / "run", tmp_path / "resnet.pth", init_network="slim"), PaintedFaces(size=32))


def test_on_the_command_line_the_model_gives_all_but_the_sizes(tmp_path: Path, faces: PaintedFaces) -> None:
    large = still(tiny_recipe(tmp_path / "large"))
    run = train(replace(large, backbone=replace(large.backbone, blocks=(2, 1, 1, 1), width=6)), faces)
    sizes = ["--backbone.blocks", "1", "1", "1", "1", "--backbone.width", "5"]
    request = parse(["quickstart", *sizes, "--init", str(run), "--run.init-network", "slim"])
    assert request is not None
    backbone = request.recipe.backbone
    assert isinstance(backbone, IResNetConfig)
    assert (backbone.blocks, backbone.width) == ((1, 1, 1, 1), 5)
    assert (backbone.embedding_dim, backbone.input_size, request.recipe.data.size) == (16, SIZE, SIZE)
    with pytest.raises(UserError, match="none may be larger"):
        parse(["quickstart", "--init", str(run), "--run.init-network", "slim"])
