"""The sharded head on 1, 2 and 4 processes against the whole problem in float64 in one; and its samples of classes.

Truth is `margin_softmax_whole` in float64 over all images and the classes that took part; naive float32 is a few 1e-7
away from it, so is ours. In float64 ours equals it to rounding.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.heads.sharded_share import Case, batch_of, run
from tests.training import processes
from visard.config import HeadConfig, from_dict
from visard.errors import UserError
from visard.functional.softmax import margin_softmax_whole
from visard.heads.full import FullHead
from visard.heads.margin import first_state, margin_of
from visard.heads.sharded import ShardedHead, largest

ARC = {"kind": "combined", "m2": 0.5, "scale": 16.0}
ADA, CURRICULAR = {"kind": "adaface", "scale": 16.0}, {"kind": "curricularface", "scale": 16.0}
MAG = {"kind": "magface", "l_a": 0.5, "u_a": 4.0, "scale": 16.0}


def sharded(margin: dict[str, Any] = ARC, **settings: Any) -> dict[str, Any]:
    return {"classes": "sharded", "margin": margin, **settings}


CASES = {
    "arcface": Case(sharded()),
    "uneven classes": Case(sharded(), classes=13, images=10),
    "more processes than classes": Case(sharded(), classes=3),
    "fewer images than processes": Case(sharded(), images=3),
    "no positive on some processes": Case(sharded(), labels="one class"),
    "unlabelled images": Case(sharded(), labels="unlabelled"),
    "adaface": Case(sharded(ADA), images=10, labels="unlabelled"),
    "curricularface": Case(sharded(CURRICULAR), images=10),
    "magface": Case(sharded(MAG), images=10),
    "subcentres": Case(sharded(subcentres=3), images=10),
    "conflicts left out": Case(sharded(conflict_cos=0.4), images=12),
    "micro-batches": Case(sharded(), images=12, micro_batches=3),
    "fp16 embeddings": Case(sharded(), half=True),
    "float64": Case(sharded(), classes=13, labels="unlabelled", double=True),
    "float64 magface": Case(sharded(MAG), images=10, labels="unlabelled", double=True),
    "float64 sample of subcentres": Case(
        sharded(CURRICULAR, subcentres=3, sample_rate=0.4, conflict_cos=0.6), classes=60, images=10, double=True
    ),
    "bf16 products": Case(sharded(products="bf16"), classes=40, images=12, dim=32),
    "sample": Case(sharded(sample_rate=0.4), classes=60),
    "sample of micro-batches": Case(sharded(sample_rate=0.5), classes=200, images=12, micro_batches=3),
    "more positives than sample": Case(sharded(sample_rate=0.1), classes=40, images=36),
}
TOLERANCE = {"bf16 products": 2e-2, "fp16 embeddings": 1e-3, **{name: 1e-12 for name in CASES if "float64" in name}}


@pytest.fixture(scope="module", params=[1, 2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """Of every process, what every case gave."""
    world = request.param
    if world == 1:
        return [[run(case) for case in CASES.values()]]
    out: Path = tmp_path_factory.mktemp(f"world{world}")
    arguments = json.dumps([asdict(case) for case in CASES.values()])
    processes.run(world, "-m", "tests.heads.sharded_share", str(out), arguments)
    return [torch.load(out / f"{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize("name", CASES)
def test_equals_the_whole_problem(name: str, results: list[list[dict[str, Any]]]) -> None:
    case, found = CASES[name], [of_rank[list(CASES).index(name)] for of_rank in results]
    emb, weight, labels = (t.double() if t.is_floating_point() else t for t in case.problem())
    config = from_dict(HeadConfig, case.head, where="head")
    rows = torch.arange(case.classes)
    if config.sample_rate < 1:
        rows = torch.cat([of_rank["rows"] for of_rank in found])
        labels = torch.where(labels >= 0, torch.searchsorted(rows, labels), -1)
    emb, taken = emb.requires_grad_(), weight[rows].requires_grad_()
    state = {key: value.double() for key, value in first_state(config.margin).items()}
    conflict = config.conflict_cos if config.conflict_cos < 1 else None
    truth = margin_softmax_whole(
        emb, taken, labels, margin_of(config.margin), scale=16.0, denominator=case.images, state=state,
        conflict_cos=conflict,
    )  # fmt: skip
    truth.loss.backward()
    assert emb.grad is not None
    assert taken.grad is not None
    tolerance = TOLERANCE.get(name, 3e-6)
    assert_near(sum(of_rank["loss"] for of_rank in found), truth.loss, tolerance)
    assert_near(torch.cat([of_rank["emb"] for of_rank in found if of_rank["count"]]), emb.grad, tolerance)
    assert_near(torch.cat([of_rank["grad"] for of_rank in found]), taken.grad, tolerance)
    # The state of the margin is that of all images, the same on every process.
    if case.micro_batches == 1:
        for key, value in truth.state.items():
            for of_rank in found:
                assert of_rank["state"][key].item() == pytest.approx(value.item(), rel=1e-5), key
    counted = sum(of_rank["logs"]["accuracy"].item() * max(1, of_rank["count"]) for of_rank in found)
    if name == "arcface":
        assert counted == pytest.approx(truth.correct.sum().item())


def test_a_sample_holds_the_positives_and_the_rate_a_process(results: list[list[dict[str, Any]]]) -> None:
    name = "sample of micro-batches"
    case, found = CASES[name], [of_rank[list(CASES).index(name)] for of_rank in results]
    drawn = torch.cat([of_rank["rows"] for of_rank in found])
    assert drawn.equal(drawn.unique())
    assert torch.isin(case.problem()[2], drawn).all()
    assert len(drawn) == 100  # half, whatever the number of processes
    crowded = list(CASES).index("more positives than sample")
    positives = CASES["more positives than sample"].problem()[2].unique()
    assert torch.isin(positives, torch.cat([of_rank[crowded]["rows"] for of_rank in results])).all()


@pytest.mark.parametrize("count", [0, 1, 37, 500, 9_999, 10_000])
@pytest.mark.parametrize("raised", [0, 3, 600])
def test_the_largest_keys_are_found(count: int, raised: int) -> None:
    """Uniform keys, some raised by 1 or 2 as the labels' are; of 10,000, also where more are raised than wanted."""
    generator = torch.Generator().manual_seed(count)
    keys = torch.rand(10_000, generator=generator)
    keys[torch.randperm(10_000, generator=generator)[:raised]] += 1.0
    expected = keys.topk(count, sorted=False).indices.sort().values
    assert torch.equal(keys[largest(keys, count)].sort().values, keys[expected].sort().values)
    assert torch.equal(largest(keys, count), largest(keys, count).unique())


def test_the_largest_of_keys_that_are_not_spread_evenly() -> None:
    """Fewer above the bound than wanted, and ties."""
    keys = torch.zeros(1000)
    keys[::7] = 0.5
    place = largest(keys, 200)
    assert torch.equal(place, place.unique())
    assert len(place) == 200
    assert (keys[place] == 0.5).sum() == 143


def test_the_sample_follows_the_generator() -> None:
    """The loop seeds it from (seed, step, rank), so a resumed run draws the same classes."""
    head = ShardedHead(1000, 4, HeadConfig(classes="sharded", sample_rate=0.1))
    labels = torch.tensor([3, 998])

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        head.begin_step(images_global=2, labels=labels)
        head(torch.ones(2, 4), batch_of(labels))[0].detach()
        assert head._sample is not None
        return head._sample

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    counts = torch.zeros(1000)
    for seed in range(300):
        counts[drawn(seed)] += 1
    assert counts[3] == counts[998] == 300
    others = counts[[i for i in range(1000) if i not in (3, 998)]]
    # Binomial with p = 98 / 998: mean 29.5, standard deviation 5.2.
    assert others.mean().item() == pytest.approx(300 * 98 / 998)
    assert others.std().item() == pytest.approx(5.2, rel=0.15)
    assert others.max() < 29.5 + 6 * 5.2


def test_several_micro_batches_need_the_labels_of_the_step() -> None:
    head = ShardedHead(100, 4, HeadConfig(classes="sharded", sample_rate=0.1))
    head.begin_step(images_global=2)
    emb = torch.randn(1, 4, requires_grad=True)
    head(emb, batch_of(torch.tensor([3])))[0].backward()
    assert head._sample is not None
    assert 3 in head._sample
    with pytest.raises(AssertionError, match="labels of them all"):
        head(emb, batch_of(torch.tensor([4])))


def test_same_start_as_the_full_head() -> None:
    torch.manual_seed(5)
    full = FullHead(2500, 3, HeadConfig())
    torch.manual_seed(5)
    ours = ShardedHead(2500, 3, HeadConfig(classes="sharded"))
    assert torch.equal(full.weight, ours.weight)
    assert full.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_autograd_sees_no_gradient_of_the_centres() -> None:
    head = ShardedHead(50, 4, HeadConfig(classes="sharded"))
    head.begin_step(images_global=2)
    emb = torch.randn(2, 4, requires_grad=True)
    head(emb, batch_of(torch.tensor([3, 7])))[0].backward()
    assert head.weight.grad is None
    assert emb.grad is not None
    assert head.row_gradients()["weight"].grad.shape == (50, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sample_rate": 0.5}, "needs head.classes sharded"),
        ({"classes": "sharded", "sample_rate": 0.0}, "above 0 to 1"),
        ({"classes": "sharded", "unsampled": "decayed"}, "below 1"),
        ({"conflict_cos": 0.0}, "above 0 to 1"),
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HeadConfig(**wrong)


def assert_near(ours: Tensor, truth: Tensor, tolerance: float) -> None:
    error = (ours.double() - truth).abs().max().item() / max(truth.abs().max().item(), 1e-12)
    assert error <= tolerance, (error, tolerance)
