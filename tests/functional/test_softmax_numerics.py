"""The chunked margin softmax in low precision, at the largest scales and class counts, and its memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.functional.softmax_problem import (
    MARGINS,
    SCALE,
    PeakMemory,
    Problem,
    error,
    problem,
    solved,
)
from visard.functional.softmax_chunked import Settings, margin_softmax


@pytest.mark.parametrize(("keep", "name"), [(True, "combined"), (False, "combined"), (False, "curricularface")])
def test_bfloat16_products(keep: bool, name: str) -> None:
    """What `Settings.products` states, at s = 64 and a usual size, half of the images near their centres."""
    p = problem(images=64, classes=5000, dim=256, seed=2, dtype=torch.float32)
    _, exact = solved(p, name, whole=True, scale=64.0)
    rounded = Settings(products=torch.bfloat16, keep=keep)
    _, ours = solved(p, name, settings=rounded, dtype=torch.float32, scale=64.0)
    loss, emb_grad, weight_grad = (
        ((got - right).norm() / right.norm()).item() for got, right in zip(ours, exact, strict=True)
    )
    assert loss < 1e-4
    assert emb_grad < 1e-2
    assert weight_grad < 1e-2


def test_float16_embeddings_under_a_scaler() -> None:
    """The gradient arrives in float16, scaled: what a gradient scaler needs to keep small ones."""
    p = problem(unlabelled=0.0, images=16, dim=32)
    _, exact = solved(p, "combined", whole=True)
    emb = p.emb.half().requires_grad_()
    weight = p.weight.float()
    loss = margin_softmax(emb, weight, p.labels, MARGINS["combined"][0], scale=SCALE, denominator=7).loss
    assert loss.dtype == torch.float32
    (scaled,) = torch.autograd.grad(loss * 256.0, emb)
    assert scaled.dtype == torch.float16
    assert error(loss.detach(), exact[0]) < 1e-3
    assert error(scaled.double() / 256.0, exact[1]) < 5e-3


@pytest.mark.parametrize("products", [None, torch.bfloat16])
def test_half_precision_centres_are_computed_with_in_float32(products: torch.dtype | None) -> None:
    p = problem(dtype=torch.float32)
    p.weight = p.weight.bfloat16().float()
    settings = Settings(products=products)
    _, ours = solved(p, "combined", settings=settings, dtype=torch.float32)
    emb, weight = p.emb.requires_grad_(), p.weight.bfloat16().requires_grad_()
    loss = margin_softmax(
        emb, weight, p.labels, MARGINS["combined"][0], scale=SCALE, denominator=7, settings=settings
    ).loss
    emb_grad, weight_grad = torch.autograd.grad(loss, (emb, weight))
    assert torch.equal(loss.double(), ours[0])
    assert torch.equal(emb_grad.double(), ours[1])
    assert weight_grad.dtype == torch.bfloat16
    assert torch.equal(weight_grad, ours[2].bfloat16())


def test_autocast_changes_nothing() -> None:
    p = problem(dtype=torch.float32)
    _, plain = solved(p, "combined", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, inside = solved(p, "combined", dtype=torch.float32)
    for one, other in zip(plain, inside, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("right", [True, False])
def test_two_classes_at_the_largest_scale(right: bool) -> None:
    """exp(-256) is 0 in float32; loss and gradients still are right."""
    p = Problem(
        torch.tensor([[1.0, 0.2]]),
        torch.tensor([[1.0, 0.0], [-1.0, 0.1]]),
        torch.tensor([int(not right)]),
        torch.ones(1),
    )
    _, exact = solved(p, "combined", whole=True, scale=128.0)
    _, ours = solved(p, "combined", dtype=torch.float32, scale=128.0)
    if right:
        # 1 + exp(-172) is 1 even in float64: the loss of the whole is 0 there.
        assert ours[0].item() == pytest.approx(exact[0].item(), abs=1e-30)
    else:
        assert ours[0].item() == pytest.approx(exact[0].item(), rel=1e-6)
        assert error(ours[1], exact[1]) < 1e-5
        assert error(ours[2], exact[2]) < 1e-5
    assert all(tensor.isfinite().all() for tensor in ours)


@pytest.mark.parametrize("products", [None, torch.bfloat16])
@pytest.mark.parametrize("cos", [1.0, -1.0])
@pytest.mark.parametrize(
    ("name", "scale"), [("plain", 70.0), ("plain", 70.1), ("plain", 128.0), ("curricularface", 35.0)]
)
@pytest.mark.parametrize("factor", [7 * 2.0**20, 1.0, 2.0**-20])
def test_the_largest_and_the_smallest_sums(
    products: torch.dtype | None, cos: float, name: str, scale: float, factor: float
) -> None:
    """All negatives at a cosine of 1, or all at -1, on both sides of `MOST_LOGIT`; the loss scaled up and down."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.tensor([0.0, 1.0]) + 1e-3 * torch.randn(2, 2, generator=generator)
    p = Problem(
        cos * torch.tensor([[0.2, 1.0], [-0.1, 1.0], [0.0, 1.0]]), weight, torch.tensor([0, 1, 0]), torch.ones(3)
    )
    _, exact = solved(p, name, whole=True, scale=scale)
    margin, state = MARGINS[name]
    q = p.to(torch.float32)
    emb, weight = q.emb.requires_grad_(), q.weight.requires_grad_()
    loss = margin_softmax(
        emb, weight, q.labels, margin, scale=scale, denominator=7, state=state, settings=Settings(products=products)
    ).loss
    ours = [loss.detach(), *(g / factor for g in torch.autograd.grad(loss * factor, (emb, weight)))]
    # Of a logit of 70 to 128 bf16 rounds up to 0.25 away. At cos = 1 CurricularFace's slope is bounded (`SIN_FLOOR`).
    worst = 0.3 if products is not None else 2e-4 if name == "plain" else 3e-3
    for got, right in zip(ours, exact, strict=True):
        assert got.isfinite().all()
        assert error(got, right) < worst


def test_a_tiny_loss_keeps_its_digits() -> None:
    """log(1 + exp(-30)): the log-sum-exp of a whole row of logits would be rounded to the target's, and give 0."""
    p = Problem(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0]), torch.ones(1))
    _, (loss, _, _) = solved(p, "plain", dtype=torch.float32, scale=30.0)
    assert loss.item() * 7 == pytest.approx(math.exp(-30), rel=1e-5)


def extra_memory(classes: int, images: int, keep: bool, name: str = "combined", centres: int = 1) -> int:
    """Bytes at the peak of forward and backward, less the gradient of the centres, which is a result."""
    p = problem(images, classes, 32, centres, dtype=torch.float32)
    emb, weight = p.emb.requires_grad_(), p.weight.requires_grad_()
    margin, state = MARGINS[name]
    with PeakMemory() as memory:
        margin_softmax(
            emb, weight, p.labels, margin, scale=SCALE, denominator=7, state=state, settings=Settings(keep=keep)
        ).loss.backward()
    return memory.peak - weight.nbytes


@pytest.mark.parametrize("name", ["combined", "curricularface"])
@pytest.mark.parametrize("centres", [1, 3])
def test_memory_does_not_grow_with_the_classes(name: str, centres: int, chunks: Callable[[int], None]) -> None:
    """O((N + chunk) D + N chunk), where a logit matrix would take N C and the normalised centres C D."""
    chunks(64)
    small, large = (extra_memory(classes, 48, False, name, centres) for classes in (512, 4096))
    assert large <= small + 4096
    floats = (48 + 64 * centres) * 32 + 48 * 64 * centres
    assert large <= 4 * 8 * floats
    logits = 4 * 48 * 4096 * centres
    assert extra_memory(4096, 48, True, name, centres) == pytest.approx(large + logits, rel=0.2)


def truth_in_blocks(p: Problem, scale: float, block: int) -> tuple[Tensor, Tensor]:
    """Loss (over 7) and embedding gradient of a plain softmax in float64, block by block, for (N, C) too large."""
    unit, length = p.emb.double(), p.emb.double().norm(dim=1, keepdim=True)
    unit = unit / length
    logits = []
    for rows in p.weight.split(block):
        logits.append((scale * unit @ torch.nn.functional.normalize(rows.double()).T).logsumexp(1))
    shift = torch.stack(logits).logsumexp(0)
    own = torch.nn.functional.normalize(p.weight[p.labels].double())
    loss = (shift - scale * (unit * own).sum(1)).sum() / 7
    grad = -own
    for rows in p.weight.split(block):
        centres = torch.nn.functional.normalize(rows.double())
        grad = grad + (scale * unit @ centres.T - shift.unsqueeze(1)).exp() @ centres
    grad = grad - unit * (grad * unit).sum(1, keepdim=True)
    return loss, scale * grad / length / 7


def large(images: int, classes: int, dim: int) -> Problem:
    """Images at cosines of about 0.5 to their centres: losses of about 1 to 10."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(classes, dim, generator=generator)
    labels = torch.randint(classes, (images,), generator=generator)
    emb = weight[labels] + 1.7 * torch.randn(images, dim, generator=generator)
    return Problem(emb, weight, labels, torch.ones(images))


@pytest.mark.slow
@pytest.mark.parametrize(("images", "classes", "dim"), [(16, 1_000_000, 64), (4, 10_000_000, 16)])
def test_no_mass_is_lost_over_millions_of_classes(images: int, classes: int, dim: int) -> None:
    p = large(images, classes, dim)
    truth, emb_truth = truth_in_blocks(p, 64.0, 250_000)
    emb, weight = p.emb.requires_grad_(), p.weight.requires_grad_()
    loss = margin_softmax(emb, weight, p.labels, MARGINS["plain"][0], scale=64.0, denominator=7).loss
    loss.backward()
    assert emb.grad is not None
    assert weight.grad is not None
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    # Rounded directions, 6e-8, tell in the gradient s**2 times; the whole computation in float32 has the same error.
    assert error(emb.grad, emb_truth) < 1e-4
    assert weight.grad.isfinite().all()


@pytest.mark.slow
def test_equal_classes_share_the_gradient_of_ten_millions() -> None:
    """All other classes are equal: each negative's share is 1 / C, and the loss log(1 + (C - 1) exp(-s (1 - cos)))."""
    classes = 10_000_000
    weight = torch.zeros(classes, 2)
    weight[:, 1] = 1.0
    weight[0] = torch.tensor([1.0, 0.0])
    weight.requires_grad_()
    emb = torch.tensor([[1.0, 0.0]])
    loss = margin_softmax(emb, weight, torch.tensor([0]), MARGINS["plain"][0], scale=8.0, denominator=1).loss
    loss.backward()
    mass = (classes - 1) * math.exp(-8.0)
    assert loss.item() == pytest.approx(math.log1p(mass), rel=1e-6)
    assert weight.grad is not None
    assert weight.grad[1:, 0].double().sum().item() == pytest.approx(8.0 * mass / (1 + mass), rel=1e-5)
