"""The chunked margin softmax against the whole one in float64; in float32 with the whole one's own error beside it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from tests.functional.softmax_problem import (
    MARGINS,
    SCALE,
    Problem,
    error,
    gradients,
    problem,
    solved,
)
from visard.functional import softmax_chunked, softmax_pieces, softmax_workspace
from visard.functional.softmax_chunked import Settings, margin_softmax


def assert_equal(
    p: Problem, name: str, settings: Settings | None = None, weighted: bool = False, *, any_angle: bool = False
) -> None:
    """Float64 to rounding; float32 no worse than a few times the whole computation in float32.

    With `any_angle` images may lie within 0.03 rad of their centre's line, where a cosine has half of an angle's digits
    (see `test_ties`): there float32 may also be off by as much as the exact result is at angles rounded so.
    """
    truth, exact = solved(p, name, whole=True, settings=settings, weighted=weighted)
    double, ours = solved(p, name, settings=settings, weighted=weighted)
    for got, right in zip(ours, exact, strict=True):
        assert error(got, right) < 1e-11
    torch.testing.assert_close(double.cos, truth.cos, rtol=0, atol=1e-12)
    assert torch.equal(double.correct, truth.correct)
    assert double.state.keys() == truth.state.keys()
    for key, value in truth.state.items():
        torch.testing.assert_close(double.state[key], value)
    spread = [0.0] * len(exact)
    if any_angle and (1.0 - truth.cos.square()).amin() < 0.03**2:
        angle = (1.0 - truth.cos.square()).clamp(min=2.0**-22).sqrt().amin().item()
        spread = of_rounded_angles(p, name, settings, weighted, exact, angle)
    _, naive = solved(p, name, whole=True, settings=settings, weighted=weighted, dtype=torch.float32)
    _, single = solved(p, name, settings=settings, weighted=weighted, dtype=torch.float32)
    for got, plain, right, chance in zip(single, naive, exact, spread, strict=True):
        # A cosine rounded to 2**-23 changes a probability by s times that.
        assert error(got, right) <= 3 * (error(plain, right) + chance) + 2 * SCALE * 2.0**-23


def of_rounded_angles(
    p: Problem, name: str, settings: Settings | None, weighted: bool, exact: list[Tensor], angle: float
) -> list[float]:
    """By how much the whole in float64 moves, at most of eight times, if directions turn by what a rounded cosine tells
    of the least angle: d cos = 2**-21 (lengths, products and their sum are rounded) is 2**-21 / sin(angle)."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(8):
        emb, weight = (
            t * (1 + 2.0**-21 / angle * (2 * torch.rand(t.shape, generator=generator, dtype=t.dtype) - 1))
            for t in (p.emb.detach(), p.weight.detach())
        )
        moved = Problem(emb, weight, p.labels, p.weights)
        _, results = solved(moved, name, whole=True, settings=settings, weighted=weighted)
        found.append([error(got, right) for got, right in zip(results, exact, strict=True)])
    return [max(column) for column in zip(*found, strict=True)]


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("centres", [1, 3])
@pytest.mark.parametrize("size", [1, 4, 7, 300])
def test_equals_the_whole(name: str, centres: int, size: int, chunks: Callable[[int], None]) -> None:
    chunks(size)
    assert_equal(problem(centres=centres), name)


@pytest.mark.parametrize("name", ["combined", "curricularface", "magface"])
@pytest.mark.parametrize("centres", [1, 3])
def test_equals_the_whole_with_all_settings(name: str, centres: int, chunks: Callable[[int], None]) -> None:
    chunks(4)
    p = problem(images=17, centres=centres, seed=3)
    ignored = torch.arange(23) % 5 == 2
    assert ignored[p.labels[p.labels >= 0]].any()
    assert_equal(p, name, Settings(ignored_C=ignored, conflict_cos=0.6), weighted=True)


@examples(max_examples=80, deadline=None)
@given(data=st.data())
def test_equals_the_whole_at_any_shape(data: st.DataObject) -> None:
    """From one image of one class in one dimension up, with any settings."""
    draw = data.draw
    classes = draw(st.sampled_from([1, 2, 3, 5, 8, 29, 300]), "classes")
    p = problem(
        images=draw(st.integers(1, 33), "images"),
        classes=classes,
        # One dimension has cosines of +-1 alone: see test_one_dimension.
        dim=draw(st.integers(2, 40), "dim"),
        centres=draw(st.sampled_from([1, 3]), "centres"),
        seed=draw(st.integers(0, 999), "seed"),
        unlabelled=draw(st.sampled_from([0.0, 0.3, 1.0]), "unlabelled"),
    )
    ignored = torch.rand(classes, generator=torch.Generator().manual_seed(classes)) < 0.3
    settings = Settings(
        keep=draw(st.booleans(), "keep"),
        ignored_C=draw(st.sampled_from([None, ignored]), "ignored"),
        conflict_cos=draw(st.sampled_from([None, 0.5, -1.1]), "conflict"),
    )
    with pytest.MonkeyPatch.context() as patch:
        size = draw(st.sampled_from([1, 4, 7, 256]), "chunk")
        patch.setattr(softmax_workspace, "chunk_classes", lambda *_: size)
        # Below 0 no sum is taken as it is: the largest logit so far is subtracted.
        patch.setattr(softmax_workspace, "MOST_LOGIT", draw(st.sampled_from([70.0, -1.0]), "most logit"))
        name, weighted = draw(st.sampled_from(list(MARGINS)), "margin"), draw(st.booleans(), "weighted")
        assert_equal(p, name, settings, weighted, any_angle=True)


def test_one_dimension(chunks: Callable[[int], None]) -> None:
    """All cosines are +-1 and tied: arccos has half of the digits there, and no direction has a gradient."""
    chunks(4)
    p = problem(dim=1)
    _, (truth, _, _) = solved(p, "combined", whole=True)
    _, (loss, emb_grad, weight_grad) = solved(p, "combined")
    torch.testing.assert_close(loss, truth, rtol=1e-6, atol=0)
    assert emb_grad.abs().max() < 1e-9
    assert weight_grad.abs().max() < 1e-9


# A straight-through gradient is not that of its value, on purpose.
@pytest.mark.parametrize("name", sorted(MARGINS.keys() - {"straight_through"}))
@pytest.mark.parametrize("centres", [1, 2])
def test_gradients_are_exact(name: str, centres: int, chunks: Callable[[int], None]) -> None:
    chunks(4)
    p = problem(images=5, classes=9, dim=3, centres=centres, seed=1)
    margin, state = MARGINS[name]
    lengths = p.emb.norm(dim=1, keepdim=True)

    def loss(emb: Tensor, weight: Tensor) -> Tensor:
        # AdaFace takes the quality from the length without a gradient; statistics have none either, and stay.
        if name == "adaface":
            emb = torch.nn.functional.normalize(emb) * lengths
        return margin_softmax(
            emb, weight, p.labels, margin, scale=8.0, denominator=7, state=state, total=torch.zeros_like,
            weights_N=p.weights, settings=Settings(ignored_C=torch.arange(9) == 4),
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (p.emb.requires_grad_(), p.weight.requires_grad_()), atol=1e-6)


@pytest.mark.parametrize("name", ["combined", "curricularface", "magface"])
@pytest.mark.parametrize("wanted", ["emb", "weight"])
@pytest.mark.parametrize("most", [70.0, -1.0])
def test_one_gradient_alone_is_the_same(
    name: str, wanted: str, most: float, chunks: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen backbone, or frozen centres."""
    chunks(4)
    monkeypatch.setattr(softmax_workspace, "MOST_LOGIT", most)
    p = problem()
    _, (_, emb_grad, weight_grad) = solved(p, name)
    margin, state = MARGINS[name]
    tensor = getattr(p, wanted).requires_grad_()
    out = margin_softmax(p.emb, p.weight, p.labels, margin, scale=SCALE, denominator=7, state=state)
    (alone,) = gradients(out.loss, tensor)
    assert torch.equal(alone, emb_grad if wanted == "emb" else weight_grad)


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("products", [None, torch.bfloat16])
@pytest.mark.parametrize("centres", [1, 3])
@pytest.mark.parametrize("most", [70.0, -1.0])
def test_kept_shares_change_no_bit(
    name: str,
    products: torch.dtype | None,
    centres: int,
    most: float,
    chunks: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But for rounding where a maximum is subtracted: what is kept is relative to another one than what is not."""
    chunks(4)
    monkeypatch.setattr(softmax_workspace, "MOST_LOGIT", most)
    p = problem(images=13, classes=30, centres=centres)
    kept, anew = (
        solved(p, name, dtype=torch.float32, settings=Settings(keep=keep, products=products)) for keep in (True, False)
    )
    for one, other in zip(kept[1], anew[1], strict=True):
        assert torch.equal(one, other) or (most < 0 and error(one, other) < (1e-5 if products is None else 2e-2))
    assert torch.equal(kept[0].correct, anew[0].correct)


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("centres", [1, 3])
@pytest.mark.parametrize("most", [70.0, -1.0])
def test_shares_of_some_classes_are_kept(
    name: str, centres: int, most: float, chunks: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where not all fit: 12 of 30 classes here, in whole chunks, and what is not kept is computed anew."""
    chunks(4)
    monkeypatch.setattr(softmax_workspace, "MOST_LOGIT", most)
    monkeypatch.setattr(softmax_chunked, "KEPT_SHARE", 1 << 60)
    monkeypatch.setattr(softmax_chunked, "KEPT_BYTES", 14 * 13 * centres * 8)
    left = []

    def watch(n: softmax_workspace.Negatives, saved: softmax_workspace.Saved | None) -> softmax_pieces.Sums:
        sums = softmax_pieces.negative_sums(n, saved)
        assert saved is not None
        assert saved.share_RN is not None
        left.append((saved.classes, len(saved.share_RN), len(saved.chunk_shifts)))
        return sums

    ignored = torch.arange(30) % 5 == 2
    settings = Settings(
        pieces=softmax_pieces.Pieces(watch, softmax_pieces.gradients), ignored_C=ignored, conflict_cos=0.6
    )
    p = problem(images=13, classes=30, centres=centres)
    _, exact = solved(p, name, whole=True, settings=settings)
    _, ours = solved(p, name, settings=settings)
    assert left == [(14, 12 * centres, 3 if most < 0 else 0)]
    for got, right in zip(ours, exact, strict=True):
        assert error(got, right) < 1e-11


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept(name: str, mode: Callable[[], AbstractContextManager[None]]) -> None:
    """An evaluation's loss needs one product of three."""
    left = []

    def watch(n: softmax_workspace.Negatives, saved: softmax_workspace.Saved | None) -> softmax_pieces.Sums:
        left.append(saved)
        return softmax_pieces.negative_sums(n, saved)

    p = problem()
    settings = Settings(pieces=softmax_pieces.Pieces(watch, softmax_pieces.gradients), keep=True)
    emb, weight = p.emb.requires_grad_(), p.weight.requires_grad_()
    margin, state = MARGINS[name]
    with mode():
        loss = margin_softmax(
            emb, weight, p.labels, margin, scale=SCALE, denominator=7, state=state, settings=settings
        ).loss
    _, exact = solved(problem(), name, whole=True)
    assert loss.item() == pytest.approx(exact[0].item(), rel=1e-9)
    (saved,) = left
    assert saved is not None
    assert saved.share_RN is None
    assert saved.unit_ND is None


def test_many_images_of_a_class_give_the_same_bits_on_several_threads() -> None:
    p = problem(images=128, classes=200, dim=512, unlabelled=0.0, dtype=torch.float32)
    p.labels = torch.arange(128) % 8
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first, *others = (solved(p, "plain", dtype=torch.float32)[1][2] for _ in range(10))
    finally:
        torch.set_num_threads(threads)
    for other in others:
        assert torch.equal(other, first)


def test_own_classes_are_left_out_as_on_a_gpu(chunks: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody may wait to hear which chunk an image's class is in."""
    chunks(4)
    p = problem(images=13, classes=30)
    _, sorted_out = solved(p, "combined", dtype=torch.float32)
    monkeypatch.setattr(softmax_workspace.Workspace, "sort_own_classes", lambda self: None)
    _, in_place = solved(p, "combined", dtype=torch.float32)
    for one, other in zip(sorted_out, in_place, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("most", [70.0, -1.0])
@pytest.mark.parametrize("products", [None, torch.bfloat16])
def test_a_second_backward_pass_is_the_first(
    most: float, products: torch.dtype | None, chunks: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was kept is gone after the first: the second computes it anew."""
    chunks(4)
    monkeypatch.setattr(softmax_workspace, "MOST_LOGIT", most)
    p = problem(dtype=torch.float32)
    emb, weight = p.emb.requires_grad_(), p.weight.requires_grad_()
    settings = Settings(keep=True, products=products)
    loss = margin_softmax(
        emb, weight, p.labels, MARGINS["combined"][0], scale=SCALE, denominator=7, settings=settings
    ).loss
    first = torch.autograd.grad(loss, (emb, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (emb, weight))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other) or (most < 0 and error(one, other) < (1e-5 if products is None else 2e-2))


def test_ties(chunks: Callable[[int], None]) -> None:
    """Two equal classes, and an embedding on its centre: gradients are shared."""
    chunks(2)
    p = problem(unlabelled=0.0)
    p.weight[1] = p.weight[7] = p.weight[0]
    p.labels[:3] = torch.tensor([0, 1, 7])
    p.emb[:2] = 3.0 * p.weight[0]
    truth, exact = solved(p, "curricularface", whole=True)
    out, ours = solved(p, "curricularface")
    # On a centre the cosine is 1, whose arccos has half of the digits.
    for got, right in zip(ours, exact, strict=True):
        assert error(got, right) < 1e-6
    torch.testing.assert_close(out.cos, truth.cos, rtol=0, atol=1e-12)
    _, _, weight_grad = ours
    assert weight_grad.isfinite().all()


def test_tied_subcentres(chunks: Callable[[int], None]) -> None:
    """Of equal centres one gets the gradient, whichever; their sum is that of the whole."""
    chunks(4)
    p = problem(centres=3)
    p.weight[:, 1] = p.weight[:, 0]
    _, exact = solved(p, "combined", whole=True)
    _, ours = solved(p, "combined")
    assert error(ours[1], exact[1]) < 1e-11
    assert error(ours[2][:, :2].sum(1), exact[2][:, :2].sum(1)) < 1e-11
    assert error(ours[2][:, 2], exact[2][:, 2]) < 1e-11


def test_zero_vectors() -> None:
    p = problem()
    p.emb[2] = 0.0
    p.weight[5] = 0.0
    _, (truth, _, _) = solved(p, "combined", whole=True)
    _, (loss, emb_grad, weight_grad) = solved(p, "combined")
    torch.testing.assert_close(loss, truth)
    assert emb_grad.isfinite().all()
    assert weight_grad.isfinite().all()


def test_not_a_number_stays_one() -> None:
    """The optimizer must be able to see it: no exclusion, clamp or mask may hide it."""
    p = problem(unlabelled=0.0)
    p.emb[2, 0] = float("nan")
    _, (loss, emb_grad, weight_grad) = solved(p, "combined")
    assert loss.isnan()
    assert emb_grad[2].isnan().all()
    assert emb_grad[[0, 1, 3]].isfinite().all()
    assert weight_grad.isnan().any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_centre_is_seen_by_every_image(value: float, chunks: Callable[[int], None]) -> None:
    chunks(4)
    p = problem(unlabelled=0.0)
    p.weight[6, 1] = value
    _, (loss, emb_grad, _) = solved(p, "combined")
    assert loss.isnan()
    assert emb_grad.isnan().all()


@pytest.mark.parametrize("scale", [0.5, 64.0])
def test_all_negatives_removed(scale: float) -> None:
    """Nothing to be told apart from: no loss, no gradient, and correct; where what is left out scales up or down."""
    settings = Settings(conflict_cos=-1.1)
    out, (loss, emb_grad, weight_grad) = solved(problem(), "combined", settings=settings, scale=scale)
    assert loss == 0
    assert not emb_grad.any()
    assert not weight_grad.any()
    assert torch.equal(out.correct, problem().labels >= 0)


@pytest.mark.parametrize("most", [70.0, -1.0])
def test_sums_of_no_negatives_are_zero(most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract that other processes' sums and other implementations are combined by, at a scale below 1 too."""
    monkeypatch.setattr(softmax_workspace, "MOST_LOGIT", most)
    p = problem(unlabelled=0.0)
    none = torch.full((9,), -1)
    n = softmax_workspace.Negatives(
        unit_ND=torch.nn.functional.normalize(p.emb), weight_RD=p.weight, own_class_N=none, own_row_N=none, scale=0.5,
        conflict_cos=-1.1, products=torch.float64,
    )  # fmt: skip
    sums = softmax_pieces.negative_sums(n)
    assert not sums.total_N.any()
    assert (sums.nearest_N < softmax_workspace.LEAST_COS).all()
    assert sums.shift_N.isfinite().all()


def test_no_images(chunks: Callable[[int], None]) -> None:
    chunks(4)
    p = problem()
    none = Problem(p.emb[:0], p.weight, p.labels[:0], p.weights[:0])
    out, (loss, emb_grad, weight_grad) = solved(none, "combined", weighted=True)
    assert loss == 0
    assert emb_grad.shape == (0, 5)
    assert weight_grad.shape == p.weight.shape
    assert not weight_grad.any()
    assert out.cos.shape == (0,)


def test_nothing_labelled() -> None:
    out, (loss, emb_grad, weight_grad) = solved(problem(unlabelled=1.0), "magface")
    assert loss == 0
    assert not emb_grad.any()
    assert not weight_grad.any()
    assert not out.correct.any()
