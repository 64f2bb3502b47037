"""The Triton softmax against the whole one in float64, beside plain torch's error in the same arithmetic.

On a GPU the compiled kernels; elsewhere Triton's interpreter, which rounds TF32 and bfloat16 operands but multiplies in
float32, and knows nothing of registers, memory and order: what it cannot show is for test_compile.py and for a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.functional.softmax_problem import MARGINS, Problem, error, problem, solved
from visard.functional.margins import HardNegatives
from visard.functional.softmax import margin_softmax_whole
from visard.functional.softmax_chunked import Part, RowBuffer, Settings, margin_softmax
from visard.functional.softmax_pieces import CHUNKED, LogitGradient, Pieces
from visard.functional.softmax_workspace import LEAST_COS, Negatives
from visard.kernels import Tiling, triton_pieces

# Tiles of 64 classes and 16 to 32 images, chunks of 64 classes: several of each in small problems.
SMALL = Tiling(classes=64, images=32, dim=64, chunk_bytes=1, warps=4)


@pytest.fixture(params=[None, SMALL], ids=["whole", "in chunks"])
def pieces(request: pytest.FixtureRequest, device: torch.device) -> Pieces:
    return triton_pieces(device, request.param)


@pytest.fixture
def small(device: torch.device) -> Pieces:
    return triton_pieces(device, SMALL)


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def on(device: torch.device, p: Problem) -> Problem:
    return Problem(*(getattr(p, field.name).to(device) for field in dataclasses.fields(p)))


def assert_equal(p: Problem, name: str, pieces: Pieces, device: torch.device, scale: float = 32.0, **how: Any) -> None:
    """No worse than a few times the whole computation in float32."""
    settings = Settings(keep=False, **how)
    truth, exact = solved(p, name, whole=True, settings=settings, weighted=True, scale=scale)
    _, naive = solved(p, name, whole=True, settings=settings, weighted=True, scale=scale, dtype=torch.float32)
    moved = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in how.items()}
    ours = dataclasses.replace(settings, pieces=pieces, **moved)
    out, got = solved(on(device, p), name, settings=ours, weighted=True, scale=scale, dtype=torch.float32)
    for mine, plain, right in zip(got, naive, exact, strict=True):
        assert error(mine.cpu(), right) <= 4 * error(plain, right) + 4e-6
    torch.testing.assert_close(out.cos.cpu().double(), truth.cos, rtol=0, atol=1e-6)
    assert torch.equal(out.correct.cpu(), truth.correct)


@pytest.mark.parametrize(
    ("images", "classes", "dim"),
    [(1, 2, 5), (7, 5, 32), (33, 130, 48), (7, 257, 64), (33, 257, 130), (1, 130, 64), (33, 2, 130), (7, 1, 5)],
)
def test_equals_the_whole(images: int, classes: int, dim: int, pieces: Pieces, device: torch.device) -> None:
    assert_equal(problem(images, classes, dim), "combined", pieces, device)


@pytest.mark.parametrize("name", MARGINS)
def test_every_margin(name: str, small: Pieces, device: torch.device) -> None:
    assert_equal(problem(20, 70, 16, seed=2), name, small, device)


@pytest.mark.parametrize("name", ["combined", "curricularface"])
@pytest.mark.parametrize("centres", [1, 3])
def test_all_settings(name: str, centres: int, small: Pieces, device: torch.device) -> None:
    p = problem(20, 130, 16, centres, seed=3)
    ignored = torch.arange(130) % 5 == 2
    assert ignored[p.labels[p.labels >= 0]].any()
    assert_equal(p, name, small, device, ignored_C=ignored, conflict_cos=0.5)


@pytest.mark.parametrize("name", ["combined", "curricularface"])
def test_no_negatives(name: str, small: Pieces, device: torch.device) -> None:
    """All that is left of the loss is what a margin adds, and no gradient is NaN."""
    p = problem(7, 9, 5)
    assert_equal(p, name, small, device, ignored_C=torch.ones(9, dtype=torch.bool))
    assert_equal(p, name, small, device, conflict_cos=-1.1)


@pytest.mark.parametrize("right", [True, False])
def test_two_classes_at_the_largest_scale(right: bool, small: Pieces, device: torch.device) -> None:
    p = Problem(
        torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([int(not right)]),
        torch.tensor([1.0]),
    )  # fmt: skip
    assert_equal(p.to(torch.float64), "combined", small, device, scale=128.0)
    out, _ = solved(on(device, p), "plain", settings=Settings(pieces=small), dtype=torch.float32, scale=128.0)
    assert out.loss.item() == pytest.approx(0.0 if right else 256.0 / 7, rel=1e-6, abs=1e-30)


def negatives(device: torch.device, centres: int = 2, hard: bool = True, **changes: Any) -> tuple[Any, LogitGradient]:
    """21 images, 70 of 90 classes; two images have their class elsewhere, one none."""
    generator = torch.Generator().manual_seed(5)
    rand = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    sampled = torch.randperm(90, generator=generator)[:70].sort().values
    own_class = torch.randint(-1, 70, (21,), generator=generator)
    own_class[:3] = -1
    own_row = torch.where(own_class >= 0, own_class * centres + torch.randint(centres, (21,), generator=generator), -1)
    n = Negatives(
        unit_ND=torch.nn.functional.normalize(rand(21, 12) - 0.4).to(device),
        weight_RD=(rand(90 * centres, 12) - 0.5).to(device),
        sampled_C=sampled.to(device),
        centres=centres,
        own_class_N=own_class.to(device),
        own_row_N=own_row.to(device),
        scale=20.0,
        hard=HardNegatives(rand(21).to(device), torch.tensor(0.4, device=device)) if hard else None,
        ignored_C=(rand(70) < 0.2).to(device),
        conflict_cos=0.8,
        products=torch.float32,
    )
    g = LogitGradient(*(part.to(device) for part in (8.0 + rand(21), rand(21), -rand(21), rand(21))))
    return dataclasses.replace(n, **changes), g


def both_gradients(pieces: Pieces, n: Negatives, g: LogitGradient, accumulate: bool = False) -> list[Tensor]:
    unit_grad = torch.full_like(n.unit_ND, 0.25)
    weight_grad = n.unit_ND.new_full((n.classes * n.centres, n.unit_ND.shape[1]), 0.5)
    pieces.gradients(n, g, None, unit_grad, weight_grad, accumulate)
    return [unit_grad, weight_grad]


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("accumulate", [True, False])
def test_pieces_of_a_sample(hard: bool, accumulate: bool, pieces: Pieces, device: torch.device) -> None:
    """Both functions on their own: sampled classes, sub-centres, all settings, adding to what is there."""
    n, g = negatives(device, hard=hard)
    exact, exact_g = doubled(n, g)
    ours, theirs = pieces.sums(n, None), CHUNKED.sums(exact, None)
    log = [sums.shift_N + sums.total_N.log() for sums in (ours, theirs)]
    torch.testing.assert_close(log[0], log[1], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(ours.nearest_N.double(), theirs.nearest_N, rtol=0, atol=1e-6)
    assert ours.total_N.dtype == torch.float64
    got, plain = both_gradients(pieces, n, g, accumulate), both_gradients(CHUNKED, n, g, accumulate)
    truth = both_gradients(CHUNKED, exact, exact_g, accumulate)
    for mine, naive, right in zip(got, plain, truth, strict=True):
        assert error(mine, right) <= 3 * error(naive, right) + 1e-6


def doubled(n: Negatives, g: LogitGradient) -> tuple[Negatives, LogitGradient]:
    """The same problem in float64."""
    hard = n.hard and HardNegatives(*(part.double() for part in n.hard))
    unit_ND, weight_RD = n.unit_ND.double(), n.weight_RD.double()
    wide = dataclasses.replace(n, unit_ND=unit_ND, weight_RD=weight_RD, hard=hard, products=torch.float64)
    return wide, LogitGradient(*(part.double() for part in g))


def test_only_one_gradient(small: Pieces, device: torch.device) -> None:
    n, g = negatives(device)
    unit_grad, weight_grad = both_gradients(small, n, g)
    alone = torch.full_like(unit_grad, 0.25)
    small.gradients(n, g, None, alone, None, False)
    assert torch.equal(alone, unit_grad)
    alone = torch.zeros_like(weight_grad)
    small.gradients(n, g, None, None, alone, False)
    assert torch.equal(alone, weight_grad)


def test_the_same_bits_again(small: Pieces, device: torch.device) -> None:
    n, g = negatives(device)
    first, second = ((*small.sums(n, None), *both_gradients(small, n, g)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_nothing_to_do(small: Pieces, device: torch.device) -> None:
    """A process without classes, and a step without images."""
    nobody = torch.full((21,), -1, device=device)
    no_class = {"own_class_N": nobody, "own_row_N": nobody, "ignored_C": None}
    n, g = negatives(device, sampled_C=torch.empty(0, dtype=torch.int64, device=device), **no_class)
    sums = small.sums(n, None)
    assert (sums.total_N == 0).all()
    assert (sums.nearest_N < LEAST_COS).all()
    unit_grad, _ = both_gradients(small, n, g)
    assert (unit_grad == 0.25).all()
    n, g = negatives(device)
    empty = dataclasses.replace(n, unit_ND=n.unit_ND[:0], own_class_N=n.own_class_N[:0], own_row_N=n.own_row_N[:0])
    assert len(small.sums(empty, None).total_N) == 0
    _, weight_grad = both_gradients(small, empty, LogitGradient(*(part[:0] for part in g)))
    assert (weight_grad == 0).all()


def test_a_step_over_sampled_classes(small: Pieces, device: torch.device) -> None:
    """Through `margin_softmax` with a buffer that two micro-batches add to."""
    p = on(device, problem(20, 90, 12, seed=4))
    sampled = torch.arange(0, 90, 2, device=device)
    labels = torch.where(p.labels >= 0, p.labels // 2, -1)
    margin, state = MARGINS["combined"]
    buffer = RowBuffer()
    part = Part(own_class_N=labels, sampled_C=sampled, gradient=buffer)
    exact = p.weight[sampled].requires_grad_()
    truth = margin_softmax_whole(p.emb, exact, labels, margin, scale=32.0, denominator=7, state=state).loss
    (wanted,) = torch.autograd.grad(truth, exact)
    single = p.to(torch.float32)
    for _ in range(2):
        loss = margin_softmax(
            single.emb, single.weight.requires_grad_(), labels, margin, scale=32.0, denominator=7, state=state,
            settings=Settings(pieces=small, keep=False), part=part,
        ).loss  # fmt: skip
        loss.backward()
    assert error(loss.cpu(), truth.cpu()) < 1e-6
    assert error(buffer.rows().cpu(), 2 * wanted.cpu()) < 4e-6


@pytest.mark.parametrize("name", ["combined", "curricularface"])
def test_bfloat16_products(name: str, pieces: Pieces, device: torch.device) -> None:
    """Cosines are off by 2**-9 of their size, and no more than in plain torch."""
    p = problem(33, 257, 130)
    _, exact = solved(p, name, whole=True)
    _, plain = solved(p, name, settings=Settings(products=torch.bfloat16, keep=False), dtype=torch.float32)
    settings = Settings(products=torch.bfloat16, keep=False, pieces=pieces)
    _, ours = solved(on(device, p), name, settings=settings, dtype=torch.float32)
    for mine, theirs, right in zip(ours, plain, exact, strict=True):
        assert error(mine.cpu(), right) <= 3 * error(theirs, right) + 1e-4
    assert error(ours[1].cpu(), exact[1]) > 1e-5  # it was bfloat16


@pytest.mark.usefixtures("tf32")
def test_tf32_products(pieces: Pieces, device: torch.device) -> None:
    """Products of float32 where torch may use TF32: operands have 11 bits."""
    p = problem(33, 257, 130)
    _, exact = solved(p, "combined", whole=True)
    settings = Settings(keep=False, pieces=pieces)
    _, ours = solved(on(device, p), "combined", settings=settings, dtype=torch.float32)
    for mine, right in zip(ours, exact, strict=True):
        assert error(mine.cpu(), right) < 4e-3
    assert error(ours[1].cpu(), exact[1]) > 2e-6  # it was TF32


def test_centres_in_bfloat16(small: Pieces, device: torch.device) -> None:
    """Stored in bfloat16, they are taken as they are."""
    p = problem(20, 70, 16)
    rounded = p.weight.bfloat16()
    assert_equal(dataclasses.replace(p, weight=rounded.double()), "combined", small, device)
    margin, state = MARGINS["combined"]
    losses = [
        margin_softmax(
            p.emb.float().to(device), w.to(device), p.labels.to(device), margin, scale=32.0, denominator=7, state=state,
            settings=Settings(pieces=small, keep=False),
        ).loss
        for w in (rounded, rounded.float())
    ]  # fmt: skip
    assert torch.equal(losses[0], losses[1])


@pytest.mark.parametrize("where", ["emb", "weight"])
def test_nan_is_not_hidden(where: str, small: Pieces, device: torch.device) -> None:
    p = problem(7, 70, 5, centres=2)
    (p.emb[3] if where == "emb" else p.weight[33, 1])[2] = float("nan")
    out, _ = solved(on(device, p), "plain", settings=Settings(pieces=small, keep=False), dtype=torch.float32)
    assert out.loss.isnan()
