"""The head with a queue against the paper written plainly: five steps in float64, on 1, 2 and 4 processes.

Truth: lists as queues, Eq. 7 in its own words, `broadface_whole` (all logits in memory, autograd of each of the two
losses). In float64 ours equals it to rounding, step by step, whatever the number of processes; in float32 to 1e-5.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.heads.broadface_share import LEARNING_RATE, Case, run
from tests.heads.sharded_share import batch_of
from tests.training import processes
from visard.config import HeadConfig, QueueConfig, from_dict
from visard.errors import UserError
from visard.functional.broadface import broadface_whole, compensated
from visard.heads import broadface, build_head
from visard.heads.broadface import BroadFaceHead
from visard.heads.margin import first_state, margin_of
from visard.heads.queue import EmbeddingQueue
from visard.heads.sharded import ShardedHead

ARC = {"kind": "combined", "m2": 0.5, "scale": 16.0}
ADA, CURRICULAR = {"kind": "adaface", "scale": 16.0}, {"kind": "curricularface", "scale": 16.0}
MAG = {"kind": "magface", "l_a": 0.5, "u_a": 9.0, "scale": 16.0}


def queued(size: int, margin: dict[str, Any] = ARC, compensation: bool = True, **head: Any) -> dict[str, Any]:
    return {
        "classes": "sharded", "margin": margin, "queue": {"size": size, "compensation": compensation}, **head,
    }  # fmt: skip


UNEVEN = (7, 5, 9, 4, 6)
CASES = {
    "never full": Case(queued(100)),
    "wraps around": Case(queued(13), images=UNEVEN),
    "a multiple of the batch": Case(queued(12)),
    "batch larger than the queue": Case(queued(4), images=UNEVEN),
    "one entry": Case(queued(1)),
    "without compensation": Case(queued(13, compensation=False), images=UNEVEN),
    "factor of the loss": Case(queued(13), factor=1024.0),
    "micro-batches": Case(queued(13), images=(8, 12, 8, 12, 8), micro_batches=2),
    "micro-batches of nothing": Case(queued(13), images=(3, 8, 1, 5, 8), micro_batches=3),
    "unlabelled": Case(queued(13), images=UNEVEN, unlabelled=True),
    "unlabelled micro-batches": Case(queued(13), images=(8, 12, 8, 12, 8), micro_batches=2, unlabelled=True),
    "fewer classes than processes": Case(queued(13), classes=3),
    "conflicts left out": Case(queued(13, conflict_cos=0.3)),
    "adaface": Case(queued(13, ADA), images=UNEVEN, unlabelled=True),
    "curricularface": Case(queued(13, CURRICULAR), images=UNEVEN),
    "magface": Case(queued(13, MAG), images=UNEVEN),
    "sample": Case(queued(13, sample_rate=0.5), classes=60, images=UNEVEN, unlabelled=True),
    "sample smaller than the queue": Case(queued(40, sample_rate=0.05), classes=80),
    "float32": Case(queued(13), images=UNEVEN, double=False),
    "bf16": Case(queued(13, products="bf16"), classes=40, dim=64, double=False),
}
TOLERANCE = {"float32": 1e-5, "bf16": 4e-2}


class PlainBroadFace:
    """Sec. 3.2 in lists."""

    def __init__(self, case: Case) -> None:
        self.config = from_dict(HeadConfig, case.head, where="head")
        self.weight = case.centres()
        self.state = {name: value.double() for name, value in first_state(self.config.margin).items()}
        self.entries: list[tuple[Tensor, Tensor, int]] = []

    def step(self, emb: Tensor, labels: Tensor, rows: Tensor) -> Any:
        """Gradients of one step among the classes `rows`, which are then moved, and the queue after it."""
        used, now = [], []
        for e, centre, label in self.entries:
            if label in rows:
                moved = (self.weight[label] - centre) * (e.norm() / centre.norm())
                now.append(e + moved if self.config.queue.compensation else e)
                used.append(label)
        place = {int(row): i for i, row in enumerate(rows)}
        result = broadface_whole(
            emb,
            torch.tensor([place.get(int(label), -1) for label in labels], dtype=torch.int64),
            torch.stack(now) if now else emb[:0],
            torch.tensor([place[label] for label in used], dtype=torch.int64),
            self.weight[rows],
            margin_of(self.config.margin),
            scale=16.0,
            state=self.state,
            conflict_cos=self.config.conflict_cos if self.config.conflict_cos < 1 else None,
        )
        self.weight[rows] -= LEARNING_RATE * result.weight_CD
        self.state = result.state
        self.entries += [(e, self.weight[y].clone(), int(y)) for e, y in zip(emb, labels, strict=True) if y >= 0]
        self.entries = self.entries[-self.config.queue.size :]
        return result, len(used)


@pytest.fixture(scope="module", params=[1, 2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """Of every process, what every step of every case gave."""
    world = request.param
    if world == 1:
        return [[run(case) for case in CASES.values()]]
    out: Path = tmp_path_factory.mktemp(f"world{world}")
    arguments = json.dumps([asdict(case) for case in CASES.values()])
    processes.run(world, "-m", "tests.heads.broadface_share", str(out), arguments)
    return [torch.load(out / f"{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize("name", CASES)
def test_equals_the_paper_step_by_step(name: str, results: list[list[Any]]) -> None:
    case, tolerance = CASES[name], TOLERANCE.get(name, 1e-11)
    plain = PlainBroadFace(case)
    for number in range(len(case.images)):
        found = [of_rank[list(CASES).index(name)][number] for of_rank in results]
        emb, labels = case.step(number)
        truth, used = plain.step(emb, labels, torch.cat([of_rank["rows"] for of_rank in found]))
        assert_near(sum(of_rank["loss"] for of_rank in found), truth.loss, tolerance)
        assert_near(torch.cat([of_rank["emb"] for of_rank in found]), case.factor * truth.emb_BD, tolerance)
        assert_near(torch.cat([of_rank["grad"] for of_rank in found]), case.factor * truth.weight_CD, tolerance)
        for of_rank in found:
            assert of_rank["queue"].item() == used, number
            assert_same_queue(of_rank["state"], plain, tolerance)
            for key, value in plain.state.items():
                assert of_rank["state"][f"margin.{key}"].item() == pytest.approx(value.item(), rel=1e-5)


def assert_same_queue(state: dict[str, Tensor], plain: PlainBroadFace, tolerance: float) -> None:
    """The ring, read from its oldest entry, is the list."""
    filled = int((state["queue.labels"] >= 0).sum())
    assert filled == len(plain.entries)
    order = (state["queue.following"] - filled + torch.arange(filled)) % len(state["queue.labels"])
    assert state["queue.labels"][order].tolist() == [label for _, _, label in plain.entries]
    assert_near(state["queue.embeddings"][order], torch.stack([e for e, _, _ in plain.entries]), tolerance)
    if plain.config.queue.compensation:
        assert_near(state["queue.centres"][order], torch.stack([c for _, c, _ in plain.entries]), tolerance)
    else:
        assert len(state["queue.centres"]) == 0


def test_a_sample_leaves_out_entries_only_where_it_is_too_small(results: list[list[Any]]) -> None:
    """Half of 60 classes hold all of the queue's; of 80 classes a few a process do not hold 24 entries'."""
    roomy, small = (results[0][list(CASES).index(name)] for name in ("sample", "sample smaller than the queue"))
    for before, step in itertools.pairwise(roomy):
        assert step["queue"] == (before["state"]["queue.labels"] >= 0).sum()
    assert 0 < small[-1]["queue"] < (small[-2]["state"]["queue.labels"] >= 0).sum()
    drawn = torch.cat([of_rank[list(CASES).index("sample")][-1]["rows"] for of_rank in results])
    assert len(drawn) == sum(round(30 / len(results)) for _ in results)
    assert drawn.equal(drawn.unique())


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_blocks_of_entries_make_no_difference(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(CASES["wraps around"])
    monkeypatch.setattr(broadface, "BLOCK_MOST", rows)
    for ours, step in zip(run(CASES["wraps around"]), whole, strict=True):
        assert_near(ours["grad"], step["grad"], 1e-12)


def test_logits_made_twice_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where they are too large to keep."""
    whole = run(CASES["wraps around"])
    monkeypatch.setattr(broadface, "BLOCK_BYTES", 0)
    monkeypatch.setattr("visard.functional.softmax_chunked.KEPT_BYTES", 0)
    monkeypatch.setattr("visard.functional.softmax_chunked.KEPT_SHARE", 10**9)
    for ours, step in zip(run(CASES["wraps around"]), whole, strict=True):
        assert_near(ours["grad"], step["grad"], 1e-12)


def test_an_empty_queue_changes_no_bit() -> None:
    torch.manual_seed(0)
    ours = BroadFaceHead(20, 8, HeadConfig(classes="sharded", queue=QueueConfig(size=5)))
    sharded = ShardedHead(20, 8, HeadConfig(classes="sharded"))
    sharded.load_state_dict({"weight": ours.weight})
    emb, labels = torch.randn(7, 8), torch.randint(20, (7,))
    found = []
    for head in (ours, sharded):
        leaf = emb.clone().requires_grad_()
        head.begin_step(7, labels)
        loss, _ = head(leaf, batch_of(labels))
        (3 * loss).backward()
        found.append((loss.detach(), leaf.grad, head.row_gradients()["weight"].grad))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_compensation_by_hand() -> None:
    """An embedding twice as long as its centre moves twice as far; one of a centre that stood still not at all."""
    past = torch.tensor([[6.0, 8.0], [1.0, 2.0], [1.0, 1.0]])
    then = torch.tensor([[3.0, 4.0], [5.0, 5.0], [0.0, 0.0]])
    now = torch.tensor([[4.0, 4.5], [5.0, 5.0], [0.0, 0.0]])
    assert compensated(past, then, now).tolist() == [[8.0, 9.0], [1.0, 2.0], [1.0, 1.0]]


def test_no_gradient_runs_through_compensation() -> None:
    """Finite differences of Eq. 9 with the entries held where they are, not moving along with W."""
    torch.manual_seed(1)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    e, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 2])
    moved = compensated(e, torch.randn(4, 3, dtype=torch.float64), weight[labels])
    assert not moved.requires_grad
    config = HeadConfig(classes="sharded")

    def gradients(at: Tensor) -> Any:
        return broadface_whole(e[:2], labels[:2], moved, labels, at, margin_of(config.margin), scale=16.0)

    step = 1e-6 * torch.randn(5, 3, dtype=torch.float64)
    ahead, behind = (gradients(weight.detach() + s * step).classifier_loss for s in (1, -1))
    along = (gradients(weight).weight_CD * step).sum()
    assert along.item() == pytest.approx((ahead - behind).item() / 2, rel=1e-6)


def test_the_state_is_taken_between_steps_and_goes_on_to_the_same_bits() -> None:
    def head_of() -> BroadFaceHead:
        torch.manual_seed(2)
        return BroadFaceHead(20, 8, HeadConfig(classes="sharded", queue=QueueConfig(size=12)))

    def steps(head: BroadFaceHead, numbers: range) -> None:
        for number in numbers:
            g = torch.Generator().manual_seed(number)
            emb = torch.randn(5, 8, generator=g).requires_grad_()
            labels = torch.randint(-1, 20, (5,), generator=g)
            head.begin_step(5, labels)
            head(emb, batch_of(labels))[0].backward()
            with torch.no_grad():
                head.weight -= head.row_gradients()["weight"].grad
            head.after_step()

    whole, first, second = head_of(), head_of(), head_of()
    steps(whole, range(8))
    steps(first, range(4))
    second.load_state_dict(first.state_dict())
    steps(second, range(4, 8))
    assert second.state_dict().keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    whole.begin_step(1)
    whole(torch.ones(1, 8), batch_of(torch.tensor([3])))
    with pytest.raises(AssertionError, match="within a step"):
        whole.state_dict()


def test_a_step_that_is_only_looked_at_leaves_nothing() -> None:
    head = BroadFaceHead(20, 8, HeadConfig(classes="sharded", queue=QueueConfig(size=12)))
    with torch.no_grad():
        head(torch.ones(2, 8), batch_of(torch.tensor([3, 4])))
    head.after_step()
    assert head.queue.reach == 0
    assert (head.queue.labels == -1).all()


def test_embeddings_that_are_not_finite_do_not_enter() -> None:
    queue = EmbeddingQueue(QueueConfig(size=4), 2)
    emb = torch.tensor([[1.0, 1.0], [float("inf"), 0.0], [float("nan"), 0.0], [2.0, 2.0]])
    queue.put(emb, emb, torch.tensor([5, 6, 7, 8]))
    assert queue.labels.tolist() == [5, 8, -1, -1]
    assert queue.embeddings[:2].tolist() == [[1.0, 1.0], [2.0, 2.0]]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.lists(st.lists(st.integers(-1, 5), max_size=12), max_size=6))
def test_the_ring_is_the_last_labelled_ones(size: int, steps: list[list[int]]) -> None:
    queue = EmbeddingQueue(QueueConfig(size=size), 1)
    expected: list[tuple[float, int]] = []
    count = 0
    for labels in steps:
        emb = torch.arange(count, count + len(labels), dtype=torch.float32).unsqueeze(1)
        count += len(labels)
        queue.put(emb, emb + 0.5, torch.tensor(labels, dtype=torch.int64))
        entered = zip(emb.flatten().tolist(), labels, strict=True)
        expected = (expected + [(e, y) for e, y in entered if y >= 0])[-size:]
        filled = queue.labels >= 0
        order = (queue.following - len(expected) + torch.arange(len(expected))) % size
        assert filled.sum() == len(expected)
        assert queue.labels[order].tolist() == [y for _, y in expected]
        assert queue.embeddings[order, 0].tolist() == [e for e, _ in expected]
        assert queue.centres[order, 0].tolist() == [e + 0.5 for e, _ in expected]
        assert queue.reach == min(size, count)


def test_the_configuration_chooses_the_head() -> None:
    assert isinstance(build_head(5, 4, HeadConfig(classes="sharded", queue=QueueConfig(size=2))), BroadFaceHead)
    assert type(build_head(5, 4, HeadConfig(classes="sharded"))) is ShardedHead


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"queue": QueueConfig(size=4)}, "head.queue.size needs head.classes sharded"),
        ({"queue": QueueConfig(size=4), "classes": "sharded", "subcentres": 2}, "a queue needs 1 sub-centre"),
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HeadConfig(**wrong)
    with pytest.raises(UserError, match="must not be negative"):
        QueueConfig(size=-1)


def assert_near(ours: Tensor, truth: Tensor, tolerance: float) -> None:
    error = (ours.double() - truth).abs().max().item() / max(truth.abs().max().item(), 1e-12)
    assert error <= tolerance, (error, tolerance)
