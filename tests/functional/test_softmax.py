"""The reference margin softmax against a loss worked out by hand, and its behaviour at the edges of float32."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from visard.functional import margins
from visard.functional.softmax import margin_softmax_whole

ARC = functools.partial(margins.arcface, m2=0.5)


def problem(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    emb = torch.randn(7, 5, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return emb, weight, torch.tensor([0, 10, 3, -1, 3, 7, -1])


def test_equals_the_formula_in_numbers() -> None:
    """Two classes at right angles, the embedding 60 degrees from its own: written out with math.exp."""
    emb = torch.tensor([[2 * math.cos(math.pi / 3), 2 * math.sin(math.pi / 3)]], dtype=torch.float64)
    weight = torch.tensor([[3.0, 0.0], [0.0, 0.1]], dtype=torch.float64)
    out = margin_softmax_whole(emb, weight, torch.tensor([0]), ARC, scale=4.0, denominator=2)
    own, other = 4 * math.cos(math.pi / 3 + 0.5), 4 * math.sin(math.pi / 3)
    assert out.loss.item() == pytest.approx(math.log(1 + math.exp(other - own)) / 2, abs=1e-12)
    assert out.cos.item() == pytest.approx(0.5, abs=1e-12)
    assert not out.correct.item()


def test_gradients_are_exact() -> None:
    emb, weight, labels = problem()

    def loss(e: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return margin_softmax_whole(e, w, labels, ARC, scale=8.0, denominator=7).loss

    assert torch.autograd.gradcheck(loss, (emb, weight), atol=1e-6)


def test_unlabelled_images_cost_and_change_nothing() -> None:
    emb, weight, labels = problem()
    known = labels >= 0
    whole = margin_softmax_whole(emb, weight, labels, ARC, scale=8.0, denominator=7)
    part = margin_softmax_whole(emb[known], weight, labels[known], ARC, scale=8.0, denominator=7)
    torch.testing.assert_close(whole.loss, part.loss)
    (gradient,) = torch.autograd.grad(whole.loss, emb)
    assert (gradient[~known] == 0).all()
    assert (gradient[known] != 0).any(dim=1).all()
    assert (whole.cos[~known] == 0).all()
    assert not whole.correct[~known].any()


def test_nothing_labelled_is_a_zero_loss_with_a_gradient() -> None:
    emb, weight, labels = problem(torch.float32)
    loss = margin_softmax_whole(emb, weight, torch.full_like(labels, -1), ARC, scale=8.0, denominator=7).loss
    loss.backward()
    assert loss.item() == 0
    assert emb.grad is not None
    assert (emb.grad == 0).all()


def test_parts_over_one_denominator_sum_to_the_whole() -> None:
    """What makes k processes x N images equal one x kN: shares are summed, never averaged."""
    emb, weight, labels = problem()
    whole = margin_softmax_whole(emb, weight, labels, ARC, scale=8.0, denominator=7)
    shares = [
        margin_softmax_whole(emb[rows], weight, labels[rows], ARC, scale=8.0, denominator=7).loss
        for rows in (slice(0, 3), slice(3, 7))
    ]
    torch.testing.assert_close(sum(shares), whole.loss, rtol=1e-12, atol=1e-12)


def test_float32_under_autocast() -> None:
    """bf16 autocast around the head must not touch it, and bf16 embeddings are taken as they are."""
    emb, weight, labels = problem(torch.float32)
    plain = margin_softmax_whole(emb, weight, labels, ARC, scale=64.0, denominator=7).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = margin_softmax_whole(emb, weight, labels, ARC, scale=64.0, denominator=7).loss
        rounded = margin_softmax_whole(emb.bfloat16(), weight, labels, ARC, scale=64.0, denominator=7).loss
    assert torch.equal(plain, inside)
    assert rounded.dtype == torch.float32


def test_float32_error_is_that_of_rounding() -> None:
    emb, weight, labels = problem()
    truth = margin_softmax_whole(emb, weight, labels, ARC, scale=64.0, denominator=7).loss
    ours = margin_softmax_whole(emb.float(), weight.float(), labels, ARC, scale=64.0, denominator=7).loss
    assert ours.item() == pytest.approx(truth.item(), rel=2e-6)


@pytest.mark.parametrize("right", [True, False])
def test_two_classes_at_the_largest_scale_do_not_underflow(right: bool) -> None:
    """s = 128, the embedding exactly on a centre: exp(-256) is 0 in float32, loss and gradient still are right."""
    emb = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    label = torch.tensor([0 if right else 1])
    margin = functools.partial(margins.cosface, m3=0.4)
    loss = margin_softmax_whole(emb, weight, label, margin, scale=128.0, denominator=1).loss
    loss.backward()
    assert loss.item() == pytest.approx(0.0 if right else 128 * 2.4, rel=1e-6)
    assert emb.grad is not None
    assert weight.grad is not None
    assert emb.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_embedding_on_its_centre_has_a_finite_gradient_with_arcface() -> None:
    emb = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    margin_softmax_whole(emb, weight, torch.tensor([0, 0]), ARC, scale=64.0, denominator=2).loss.backward()
    assert emb.grad is not None
    assert emb.grad.isfinite().all()
    assert emb.grad.abs().max() <= 64.0


def test_the_nearest_subcentre_counts() -> None:
    """K = 2: the loss is that of each class's nearer centre alone; the farther one has no gradient."""
    emb, _, labels = problem()
    generator = torch.Generator().manual_seed(2)
    pairs = torch.randn(11, 2, 5, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda e, w: margin_softmax_whole(e, w, labels, ARC, scale=8.0, denominator=7).loss, (emb, pairs), atol=1e-6
    )
    for row in range(len(labels)):
        one = emb[row : row + 1]
        cos = torch.nn.functional.cosine_similarity(one.unsqueeze(1), pairs, dim=2)
        nearest = pairs[torch.arange(11), cos.argmax(dim=1)]
        mine = margin_softmax_whole(one, pairs, labels[row : row + 1], ARC, scale=8.0, denominator=7)
        plain = margin_softmax_whole(one, nearest, labels[row : row + 1], ARC, scale=8.0, denominator=7)
        torch.testing.assert_close(mine.loss, plain.loss)
    labelled = margin_softmax_whole(emb[:1], pairs, labels[:1], ARC, scale=8.0, denominator=7).loss
    (gradient,) = torch.autograd.grad(labelled, pairs)
    assert ((gradient != 0).any(dim=2).sum(dim=1) == 1).all()


def test_one_subcentre_is_a_plain_centre() -> None:
    emb, weight, labels = problem(torch.float32)
    plain = margin_softmax_whole(emb, weight, labels, ARC, scale=64.0, denominator=7)
    single = margin_softmax_whole(emb, weight.unsqueeze(1), labels, ARC, scale=64.0, denominator=7)
    assert torch.equal(plain.loss, single.loss)
    assert torch.equal(plain.correct, single.correct)
