"""Dividing optimizer memory, gradients and parameters among processes changes nothing of what is learnt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import processes
from tests.training.conftest import assert_same_bits, weights_of
from tests.training.test_processes import RUN, TINY, assert_close, rows, train
from visard import checkpoint
from visard.config import RunConfig
from visard.errors import UserError
from visard.runtime import load

SHARDED = {"classes": "sharded", "margin": {"kind": "combined", "m2": 0.2, "scale": 16.0}}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 process x 8 images, 12 steps, no batch norm."""
    out = tmp_path_factory.mktemp("one") / "run"
    train(1, out, batch_norm=False, evaluate=True, run=RUN, head=SHARDED)
    return out


@pytest.mark.parametrize(
    ("count", "zero"), [(2, 1), (2, 2), (2, 3), *(pytest.param(4, z, marks=pytest.mark.slow) for z in (1, 2)), (4, 3)]
)
def test_every_stage_equals_one_process(count: int, zero: int, one: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = {**RUN, "zero": zero, "micro_batches": 2 if count == 2 else 1}
    assert_close(train(count, out, batch_norm=False, evaluate=True, run=run, head=SHARDED), weights_of(one))
    for left, right in zip(rows(one), rows(out), strict=True):
        for key in ("loss", "gradient_norm", "cos_target", "accuracy", "score"):
            assert right.get(key, 0) == pytest.approx(left.get(key, 0), rel=1e-4, abs=1e-5), (left["step"], key)


@pytest.mark.parametrize(
    ("before", "count", "after"),
    [
        (3, 1, 0),
        pytest.param(0, 2, 3, marks=pytest.mark.slow),
        pytest.param(1, 3, 2, marks=pytest.mark.slow),
        pytest.param(2, 3, 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_at_another_stage_and_number_of_processes(
    before: int, count: int, after: int, one: Path, tmp_path: Path
) -> None:
    """6 steps by two processes at one stage and 6 by others at another equal 12 by one."""
    out = tmp_path / "run"
    train(2, out, batch_norm=False, evaluate=True, run={**RUN, "zero": before}, head=SHARDED)
    shutil.rmtree(out / "checkpoints" / "step_00000012")
    run = {**RUN, "zero": after}
    train(count, out, batch_norm=False, evaluate=True, run=run, head=SHARDED, resume=True)
    assert "going on after step 6" in (out / "log.txt").read_text()
    assert_close(weights_of(out), weights_of(one))


def test_stages_share_batch_norm_dropout_and_the_saved_model(tmp_path: Path) -> None:
    """Stage 0 and stage 3 with the real network: equal to rounding, and a resumed stage 3 goes on to the same bits.

    Six steps from one start, and six more from one checkpoint: batch norm over 4 images amplifies the order of sums,
    over twelve by chance of the seed beyond any bound (0.01 to 34 times 1e-2 over five seeds; six: at most 0.07).
    """
    train(2, tmp_path / "plain", run={"channels_last": False})
    run = {"zero": 3, "channels_last": False}  # dropout draws in the order of memory
    divided = train(2, tmp_path / "divided", run=run)
    after_six = [
        checkpoint.read_tensors(tmp_path / name / "checkpoints/step_00000006") for name in ("plain", "divided")
    ]
    shutil.copytree(tmp_path / "divided", tmp_path / "joined")
    shutil.rmtree(tmp_path / "joined" / "checkpoints" / "step_00000012")
    joined = train(2, tmp_path / "joined", run={"channels_last": False}, resume=True)
    for one_stage, other in (after_six, (joined, divided)):
        for name, tensor in one_stage.items():
            bound = 2e-3 if name.startswith("momentum.") else 2e-4
            torch.testing.assert_close(other[name], tensor, rtol=bound, atol=bound, msg=name)
    for left, right in zip(rows(tmp_path / "plain"), rows(tmp_path / "divided"), strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-5 if left["step"] <= 6 else 2e-2)
    shutil.copytree(tmp_path / "divided", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step_00000012")
    assert_same_bits(train(2, tmp_path / "parts", run=run, resume=True), divided)
    assert load(tmp_path / "divided").spec.embedding_dim == 16
    assert checkpoint.find_model(tmp_path / "divided").joinpath("model.safetensors").is_file()


@pytest.mark.parametrize("run", [{"gradient_dtype": "bf16"}, {"gradient_dtype": "bf16", "zero": 3}])
def test_gradients_summed_in_bf16_are_nearly_the_same(run: dict[str, Any], one: Path, tmp_path: Path) -> None:
    found = train(2, tmp_path / "run", batch_norm=False, evaluate=True, run={**RUN, **run}, head=SHARDED)
    expected = weights_of(one)
    assert any((found[name] != expected[name]).any() for name in expected)
    assert_close(found, expected, tolerance=1e-2)


def test_an_overflow_in_an_fp16_sum_is_skipped_everywhere(tmp_path: Path) -> None:
    """A loss scale of 65,536 and float16 sums: the first steps overflow, the scale falls, training goes on."""
    run = {**RUN, "gradient_dtype": "fp16", "precision": "fp16", "log_every": 1}
    out = tmp_path / "run"
    processes.run(2, *TINY, json.dumps({"out": str(out), "run": run, "batch_norm": False, "max_steps": 40}))
    skipped = [row["skipped"] for row in rows(out)]
    losses = [row["loss"] for row in rows(out) if not row["skipped"]]
    assert skipped[0] == 1
    assert skipped[-1] == 0
    assert sum(losses[-6:]) < sum(losses[:6])


def test_an_fp16_sum_without_a_loss_scale_is_refused() -> None:
    with pytest.raises(UserError, match="gradient_dtype fp16 would lose small gradients"):
        RunConfig(gradient_dtype="fp16")
