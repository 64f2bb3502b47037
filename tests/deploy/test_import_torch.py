"""Checkpoints of arcface_torch and AdaFace, made from the published layouts: embeddings, centres, and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

import visard
from tests.backbones import published_layouts as layouts
from visard import checkpoint, cli
from visard.backbones import build
from visard.config import IResNetConfig, MobileFaceNetConfig
from visard.deploy.export import ExportConfig
from visard.deploy.export import main as export
from visard.deploy.importing import ImportConfig, import_weights, main
from visard.errors import FormatError, UserError
from visard.runtime import read_centres, read_spec, save_model, spec_for

BLOCKS = (1, 2, 1, 1)
IRESNET = layouts.iresnet_layout(BLOCKS, 8, 16, 4)
VIT = layouts.vit_layout(32, 2, 16, 5)
IR = layouts.ir_layout(BLOCKS, 8, 16, 4)


def write_ranks(folder: Path, world: int, classes: int = 11, state: layouts.State | None = None) -> Tensor:
    """arcface_torch's checkpoint_gpu_0.pt ... as its train_v2.py writes them; returns all centres."""
    folder.mkdir(exist_ok=True)
    centres = torch.randn(classes, 16, generator=torch.Generator().manual_seed(5))
    start = 0
    for rank in range(world):
        rows = classes // world + int(rank < classes % world)
        content = {
            "epoch": 3,
            "global_step": 1200,
            "state_dict_backbone": state or layouts.random_state(IRESNET),
            "state_dict_softmax_fc": {"weight": centres[start : start + rows].clone()},
            "state_optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
            "state_lr_scheduler": {"last_epoch": 1200, "base_lrs": [0.1, 0.1]},
        }
        torch.save(content, folder / f"checkpoint_gpu_{rank}.pt")
        start += rows
    return centres


Forward = Callable[[layouts.State, Tensor], Tensor]


@pytest.mark.parametrize(
    ("layout", "forward", "size"),
    [
        (IRESNET, layouts.iresnet_forward, 64),
        (VIT, layouts.vit_forward, 45),
        (IR, lambda state, x: layouts.ir_forward(state, x, BLOCKS), 64),
    ],
    ids=["iresnet", "vit", "ir"],
)
def test_the_imported_model_gives_the_published_codes_embeddings(
    tmp_path: Path, layout: layouts.Layout, forward: Forward, size: int
) -> None:
    state = layouts.random_state(layout)
    torch.save(state, tmp_path / "model.pt")
    main(ImportConfig(weights=tmp_path / "model.pt", out=tmp_path / "model"))
    crops = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
    # arcface_torch's preprocessing: ToTensor, then (x - 0.5) / 0.5.
    images = (torch.from_numpy(crops).permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.5
    truth = forward({name: tensor.double() for name, tensor in state.items()}, images).numpy()
    found = visard.load(tmp_path / "model", "cpu")(crops)
    np.testing.assert_allclose(found, truth, rtol=0, atol=2e-6 * np.abs(truth).max())


@pytest.mark.parametrize(("world", "classes"), [(1, 11), (2, 11), (4, 11), (8, 11), (4, 12), (3, 2)])
def test_all_ranks_centres_are_joined_in_order(tmp_path: Path, world: int, classes: int) -> None:
    centres = write_ranks(tmp_path / "run", world, classes)
    answer = main(ImportConfig(weights=tmp_path / "run", out=tmp_path / "model", classes=classes))
    assert answer.value["centres"] == classes
    found = read_centres(tmp_path / "model")
    assert found is not None
    assert torch.equal(found, centres)
    assert answer.text.endswith(f"{classes} class centres from {world} ranks")
    # Any rank's file means all of them.
    named = import_weights(tmp_path / "run" / f"checkpoint_gpu_{world - 1}.pt")
    assert named.centres is not None
    assert torch.equal(named.centres, centres)


def test_ten_ranks_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    centres = write_ranks(tmp_path / "run", 12, 30)
    found = import_weights(tmp_path / "run").centres
    assert found is not None
    assert torch.equal(found, centres)


def test_an_incomplete_set_of_ranks_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_ranks(run, 4)
    (run / "checkpoint_gpu_2.pt").rename(tmp_path / "away.pt")
    with pytest.raises(UserError, match=r"checkpoint_gpu_2\.pt is missing, but there is one of rank 3"):
        import_weights(run)
    (tmp_path / "away.pt").rename(run / "checkpoint_gpu_2.pt")
    (run / "checkpoint_gpu_0.pt").rename(tmp_path / "away.pt")
    with pytest.raises(UserError, match=r"checkpoint_gpu_0\.pt is missing"):
        import_weights(run)
    (tmp_path / "away.pt").rename(run / "checkpoint_gpu_0.pt")
    # The last rank gone: only the number of classes can tell.
    (run / "checkpoint_gpu_3.pt").unlink()
    with pytest.raises(UserError, match=r"9 class centres, but --classes says 11; files of the last ranks"):
        import_weights(run, classes=11)
    assert "checks that no later rank's file is missing" in import_weights(run).notes[0]


def test_mixed_runs_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_ranks(run, 2)
    path = run / "checkpoint_gpu_1.pt"
    original = torch.load(path)
    torch.save(original | {"global_step": 1300}, path)
    with pytest.raises(UserError, match=r"gpu_1\.pt: of epoch 3, step 1300, but checkpoint_gpu_0\.pt is of .* 1200"):
        import_weights(run)
    torch.save(original | {"state_dict_softmax_fc": {"weight": torch.zeros(9, 16)}}, path)
    with pytest.raises(UserError, match="ranks' files are missing or mixed"):
        import_weights(run)
    torch.save({key: value for key, value in original.items() if key != "state_dict_softmax_fc"}, path)
    with pytest.raises(FormatError, match="no class centres"):
        import_weights(run)
    torch.save(original | {"state_dict_softmax_fc": {"weight": torch.full((5, 16), torch.nan)}}, path)
    with pytest.raises(UserError, match="NaN"):
        import_weights(run)


def test_adafaces_checkpoint(tmp_path: Path) -> None:
    """Lightning's file: names after "model.", a centre a column after "head.", BGR."""
    state = layouts.random_state(IR)
    kernel = torch.randn(16, 5)
    names = {f"model.{name}": tensor for name, tensor in state.items()}
    names |= {"head.kernel": kernel, "head.t": torch.zeros(1), "head.batch_mean": torch.zeros(1)}
    torch.save({"epoch": 25, "state_dict": names, "hyper_parameters": {"lr": 0.1}}, tmp_path / "adaface_ir18.ckpt")
    main(ImportConfig(weights=tmp_path / "adaface_ir18.ckpt", out=tmp_path / "model"))
    spec = read_spec(tmp_path / "model" / "spec.json")
    assert (spec.colour, spec.mean, spec.std, spec.backbone["kind"]) == ("BGR", 127.5, 127.5, "ir")
    assert spec.origin.startswith("imported from AdaFace")
    centres = read_centres(tmp_path / "model")
    assert centres is not None
    assert torch.equal(centres, kernel.T)
    # Its own preprocessing, restated: RGB image, turned round, ((x / 255) - 0.5) / 0.5.
    crops = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    images = torch.from_numpy(((crops[..., ::-1] / 255.0) - 0.5) / 0.5).permute(0, 3, 1, 2)
    truth = layouts.ir_forward({k: v.double() for k, v in state.items()}, images, BLOCKS).numpy()
    found = visard.load(tmp_path / "model", "cpu")(crops)
    np.testing.assert_allclose(found, truth, rtol=0, atol=2e-6 * np.abs(truth).max())


def test_cvlfaces_names_and_asked_preprocessing(tmp_path: Path) -> None:
    torch.save({f"net.{name}": t for name, t in layouts.random_state(IR).items()}, tmp_path / "model.pt")
    config = ImportConfig(weights=tmp_path / "model.pt", out=tmp_path / "model", colour="BGR", mean=0, std=255)
    main(config)
    spec = read_spec(tmp_path / "model" / "spec.json")
    assert (spec.colour, spec.mean, spec.std) == ("BGR", 0, 255)
    assert spec.origin.startswith("imported from CVLface")
    assert import_weights(tmp_path / "model.pt").spec.colour == "RGB"


@pytest.mark.parametrize("layout", [IRESNET, VIT, IR], ids=["iresnet", "vit", "ir"])
def test_export_and_import_are_inverse(tmp_path: Path, layout: layouts.Layout) -> None:
    state = layouts.random_state(layout)
    torch.save(state, tmp_path / "model.pt")
    torch.save({"weight": torch.randn(7, 16)}, tmp_path / "model.softmax_fc.pt")
    main(ImportConfig(weights=tmp_path / "model.pt", out=tmp_path / "first"))
    answer = export(ExportConfig(model=tmp_path / "first", out=tmp_path / "back" / "model.pt"))
    assert answer.value["centres"] == 7
    exported = torch.load(tmp_path / "back" / "model.pt", weights_only=True)
    assert list(exported) == list(layout)
    assert all(torch.equal(exported[name], state[name]) for name in layout)
    assert all(exported[name].dtype == state[name].dtype for name in layout)
    centres = torch.load(tmp_path / "back" / "model.softmax_fc.pt", weights_only=True)["weight"]
    assert torch.equal(centres, read_centres(tmp_path / "first"))  # type: ignore[arg-type]
    main(ImportConfig(weights=tmp_path / "back", out=tmp_path / "second"))
    for name in ("model.safetensors", "centres.safetensors"):
        first, second = (safetensors.torch.load_file(tmp_path / d / name) for d in ("first", "second"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    # A later export without centres leaves none that seem to belong to it.
    (tmp_path / "first" / "centres.safetensors").unlink()
    export(ExportConfig(model=tmp_path / "first", out=tmp_path / "back" / "model.pt"))
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["model.pt"]


@pytest.mark.parametrize("distils", [False, True])
def test_a_runs_centres_are_exported(distils: bool, tmp_path: Path) -> None:
    config = IResNetConfig(blocks=(1, 1, 1, 1), width=4, embedding_dim=8, input_size=16)
    module, weight = build(config), torch.randn(5, 8)
    head = {"weight": weight}
    checkpoint.save(
        tmp_path / "run",
        step=1,
        tensors={"backbone": dict(module.state_dict()), "head": {"base": head} if distils else head},
        numbers={"step": 1},
        backbone=module,
        spec=spec_for(config),
        identities=[f"person {i}" for i in range(5)],
    )
    answer = export(ExportConfig(model=tmp_path / "run", out=tmp_path / "model.pt"))
    assert (answer.value["layout"], answer.value["centres"]) == ("arcface_torch", 5)
    found = import_weights(tmp_path / "model.pt")
    assert found.centres is not None
    assert torch.equal(found.centres, weight)
    assert found.spec.backbone == spec_for(config).backbone


def test_user_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(layouts.random_state(IRESNET), tmp_path / "model.pt")
    config = MobileFaceNetConfig(width=8, embedding_dim=8, input_size=32)
    save_model(build(config), spec_for(config), tmp_path / "mobile")
    (tmp_path / "several").mkdir()
    for name in ("a.pt", "b.pth"):
        (tmp_path / "several" / name).write_bytes(b"")
    weights, out = str(tmp_path / "model.pt"), str(tmp_path / "out")
    for arguments, message in (
        (["import", weights, out, "--classes", "5"], "no class centres, but --classes says 5"),
        (["import", weights, out, "--input-size", "112"], "takes crops of about 64 px, not of 112"),
        (["import", weights, out, "--std", "0"], "must be above 0"),
        (["import", str(tmp_path / "several"), out], "2 files with weights in this folder"),
        (["export", str(tmp_path / "mobile"), f"{out}.pt"], "no other code knows the tensors of a mobilefacenet"),
        (["export", str(tmp_path / "mobile"), f"{out}.pt", "--crops", "x"], "--crops is for .onnx"),
    ):
        assert cli.main(arguments) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert len(errors) == 1, errors
        assert message in errors[0]
    assert not (tmp_path / "out").exists()
    assert cli.main(["import", weights, out, "--input-size", "60", "--json"]) == 0
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (value["centres"], value["spec"]["input_size"]) == (0, 60)
