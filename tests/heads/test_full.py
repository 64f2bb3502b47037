"""The plain head: its loss is this process's share of the global mean, its logs stay on the device."""

from __future__ import annotations

import pytest
import torch

from visard.config import HeadConfig, MarginConfig
from visard.functional import margins
from visard.functional.softmax import margin_softmax_whole
from visard.functional.softmax_pieces import Pieces, gradients, negative_sums
from visard.heads import build_head
from visard.heads.full import FullHead
from visard.heads.margin import margin_of
from visard.records import Batch


def make_batch(labels: list[int]) -> Batch:
    count = len(labels)
    return Batch(
        images=torch.zeros(count, 2, 2, 3, dtype=torch.uint8),
        labels=torch.tensor(labels),
        ids=tuple(f"image{i}" for i in range(count)),
        flipped=torch.zeros(count, dtype=torch.bool),
    )


@pytest.fixture
def head() -> FullHead:
    torch.manual_seed(0)
    return FullHead(9, 6, HeadConfig(margin=MarginConfig(m2=0.4, scale=16.0)))


def test_centres_are_drawn_small() -> None:
    weight = FullHead(500, 100, HeadConfig()).weight
    assert weight.shape == (500, 100)
    assert weight.std().item() == pytest.approx(0.01, rel=0.02)


def test_loss_is_the_mean_over_the_step(head: FullHead) -> None:
    torch.manual_seed(1)
    emb, batch = torch.randn(4, 6), make_batch([0, 8, -1, 3])
    loss, logs = head(emb, batch)
    expected = margin_softmax_whole(
        emb, head.weight, batch.labels, margin_of(MarginConfig(m2=0.4)), scale=16.0, denominator=4
    )
    torch.testing.assert_close(loss, expected.loss)
    assert logs["cos_target"].item() == pytest.approx(expected.cos.sum().item() / 3)
    assert set(logs) == {"cos_target", "accuracy", "embedding_norm"}
    assert not any(value.requires_grad for value in logs.values())


def test_micro_batches_sum_to_the_step(head: FullHead) -> None:
    torch.manual_seed(1)
    emb, labels = torch.randn(6, 6), [0, 8, 1, 3, 3, 2]
    whole, _ = head(emb, make_batch(labels))
    head.begin_step(images_global=6)
    shares = head(emb[:2], make_batch(labels[:2]))[0] + head(emb[2:], make_batch(labels[2:]))[0]
    head.after_step()
    torch.testing.assert_close(shares, whole)


def test_accuracy_counts_labelled_images_only(head: FullHead) -> None:
    emb = head.weight.detach()[[2, 3, 4]].clone()
    _, logs = head(emb, make_batch([2, 7, -1]))
    assert logs["accuracy"].item() == 0.5


@pytest.mark.parametrize("gradient", ["exact", "straight-through"])
def test_margin_of_a_configuration(gradient: str) -> None:
    config = MarginConfig(m1=1.2, m2=0.3, m3=0.1, gradient=gradient)  # type: ignore[arg-type]
    cos = torch.tensor([0.3], requires_grad=True)
    value = margin_of(config)(cos, torch.ones(1), {}, margins.own_batch).cos
    expected = margins.combined(cos, torch.ones(1), {}, m1=1.2, m2=0.3, m3=0.1).cos
    assert torch.equal(value, expected)
    (ours,), (exact,) = torch.autograd.grad(value, cos), torch.autograd.grad(expected, cos)
    assert torch.equal(ours, exact) == (gradient == "exact")


@pytest.mark.parametrize("classes", ["replicated", "sharded"])
def test_the_kernels_asked_for_are_used(classes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether Triton is there or not; what they compute is tested in tests/kernels."""
    theirs = Pieces(negative_sums, gradients)
    monkeypatch.setattr("visard.kernels.triton_pieces", lambda device: theirs)
    config = HeadConfig(kernel="triton", products="bf16", classes=classes)  # type: ignore[arg-type]
    settings = build_head(9, 6, config).settings
    assert settings.pieces is theirs
    assert settings.keep is False
    assert settings.products == torch.bfloat16


def test_all_parameters_are_replicated(head: FullHead) -> None:
    assert [id(p) for p in head.replicated_parameters()] == [id(head.weight)]
