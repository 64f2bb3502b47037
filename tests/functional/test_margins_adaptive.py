"""AdaFace, CurricularFace and MagFace against numbers worked out by hand, their gradients, state and edges.

The running means are compared with torch's own mean and std over the whole step; gradients with finite differences in
float64.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from visard.functional import margins
from visard.functional.margins import Margin, MarginState, Total, own_batch
from visard.functional.margins_adaptive import (
    adaface,
    adaface_state,
    curricularface,
    curricularface_state,
    magface,
)
from visard.functional.softmax import margin_softmax_whole

ADA = functools.partial(adaface, m=0.4, h=0.333, t_alpha=0.01)
CURRICULAR = functools.partial(curricularface, m=0.5, momentum=0.99)
MAG = functools.partial(magface, l_a=10.0, u_a=110.0, l_m=0.45, u_m=0.8, lambda_g=35.0)
ALL: dict[str, tuple[Margin, MarginState]] = {
    "adaface": (ADA, {"norm_mean": torch.tensor(22.0), "norm_std": torch.tensor(3.0)}),
    "curricularface": (CURRICULAR, {"cos_mean": torch.tensor(0.3)}),
    "magface": (MAG, {}),
}


def frozen(values_KB: Tensor) -> Tensor:
    """A step without images: the state stays as it is."""
    return torch.zeros(len(values_KB), dtype=values_KB.dtype)


def double(state: MarginState) -> MarginState:
    return {name: value.double() for name, value in state.items()}


@pytest.mark.parametrize(
    ("norm", "angle", "additive"),
    [
        (20.0, 0.0, 0.4),  # average: CosFace
        (14.0, 0.4, 0.0),  # h = 1/2, two deviations of 3 below: z = -1, ArcFace
        (2.0, 0.4, 0.0),  # further below: clipped
        (23.0, -0.2, 0.6),  # one deviation above: z = 1/2
        (26.0, -0.4, 0.8),
        (90.0, -0.4, 0.8),
    ],
)
def test_adaface_at_known_norms(norm: float, angle: float, additive: float) -> None:
    state = {"norm_mean": torch.tensor(20.0).double(), "norm_std": torch.tensor(2.999, dtype=torch.float64)}
    margin = functools.partial(adaface, m=0.4, h=0.5, t_alpha=0.01)
    theta = torch.tensor([1.1], dtype=torch.float64)
    got = margin(theta.cos(), torch.tensor([norm], dtype=torch.float64), state, frozen).cos
    assert got.item() == pytest.approx(math.cos(1.1 + angle) - additive, abs=1e-9)


def test_adaface_moves_its_means_before_it_uses_them() -> None:
    """t_alpha = 1 leaves nothing of the past: norms 10 and 30 have mean 20 and unbiased deviation 14.142..."""
    margin = functools.partial(adaface, m=0.4, h=0.5, t_alpha=1.0)
    norms = torch.tensor([10.0, 30.0], dtype=torch.float64)
    cos = torch.zeros(2, dtype=torch.float64)
    out = margin(cos, norms, double(adaface_state()), own_batch)
    assert out.state["norm_mean"].item() == pytest.approx(20.0)
    assert out.state["norm_std"].item() == pytest.approx(math.sqrt(200))
    z = 10 / (math.sqrt(200) + 1e-3) * 0.5
    expected = [math.cos(math.pi / 2 + 0.4 * z) - (0.4 - 0.4 * z), math.cos(math.pi / 2 - 0.4 * z) - (0.4 + 0.4 * z)]
    assert out.cos.tolist() == pytest.approx(expected, abs=1e-12)


def test_adaface_state_is_an_exponential_moving_average_of_clipped_norms() -> None:
    state, mean, std = adaface_state(), 20.0, 100.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        norms = 25 + 8 * torch.randn(16, generator=generator)
        norms[0], norms[1] = 0.0, 1000.0
        state = ADA(torch.zeros(16), norms, state, own_batch).state
        clipped = norms.double().clamp(0.001, 100)
        mean = 0.01 * clipped.mean().item() + 0.99 * mean
        std = 0.01 * clipped.std().item() + 0.99 * std
    assert state["norm_mean"].item() == pytest.approx(mean, rel=1e-5)
    assert state["norm_std"].item() == pytest.approx(std, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(offset=st.floats(0.0, 90.0), spread=st.floats(1e-3, 5.0))
def test_adaface_spread_survives_float32(offset: float, spread: float) -> None:
    """Sums are of distances to the running mean, so a small spread around a large norm is not lost."""
    norms = (offset + spread * torch.randn(64, generator=torch.Generator().manual_seed(1))).clamp(0.001, 100)
    state = {"norm_mean": norms.mean() + spread, "norm_std": torch.tensor(1.0)}
    out = adaface(torch.zeros(64), norms, state, own_batch, m=0.4, h=0.333, t_alpha=1.0)
    assert out.state["norm_std"].item() == pytest.approx(norms.double().std().item(), rel=2e-3, abs=1e-5)


def test_curricularface_at_known_angles() -> None:
    """The target as ArcFace; t = 0.99 * 0.3 + 0.01 * mean(cos); negatives above the target with margin are raised."""
    cos = torch.tensor([0.5, 0.1], dtype=torch.float64)
    out = CURRICULAR(cos, torch.ones(2), {"cos_mean": torch.tensor(0.3).double()}, own_batch)
    expected = torch.cos(cos.arccos() + 0.5)
    torch.testing.assert_close(out.cos, expected)
    assert out.hard is not None
    assert out.hard.lift.item() == pytest.approx(0.99 * 0.3 + 0.01 * 0.3)
    assert torch.equal(out.hard.lift, out.state["cos_mean"])
    torch.testing.assert_close(out.hard.threshold, expected)
    assert not out.hard.threshold.requires_grad


def test_curricularface_in_the_softmax() -> None:
    """Three classes by hand: the hard negative becomes cos (t + cos), the easy one stays."""
    emb = torch.tensor([[0.6, 0.6, math.sqrt(0.28)]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [-1.0, 0, 0]], dtype=torch.float64)
    out = margin_softmax_whole(
        emb, weight, torch.tensor([0]), CURRICULAR, scale=8.0, denominator=1, state={"cos_mean": torch.tensor(0.5)}
    )
    t = 0.99 * 0.5 + 0.01 * 0.6
    logits = [8 * math.cos(math.acos(0.6) + 0.5), 8 * 0.6 * (t + 0.6), 8 * -0.6]
    expected = math.log(sum(math.exp(x - logits[0]) for x in logits))
    assert out.loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("norm", "margin", "g"),
    [
        (5.0, 0.45, 0.1 + 10 / 12100),
        (10.0, 0.45, 0.1 + 10 / 12100),
        (60.0, 0.625, 1 / 60 + 60 / 12100),
        (110.0, 0.8, 2 / 110),
        (400.0, 0.8, 2 / 110),
    ],
)
def test_magface_at_known_norms(norm: float, margin: float, g: float) -> None:
    norms = torch.tensor([norm], dtype=torch.float64, requires_grad=True)
    out = MAG(torch.tensor([math.cos(0.7)], dtype=torch.float64), norms, {}, own_batch)
    assert out.cos.item() == pytest.approx(math.cos(0.7 + margin), abs=1e-12)
    assert out.regulariser is not None
    assert out.regulariser.item() == pytest.approx(35 * g)
    (by_norm,) = torch.autograd.grad(out.cos.sum(), norms, retain_graph=True)
    inside = 10 <= norm <= 110
    assert by_norm.item() == pytest.approx(-math.sin(0.7 + margin) * 0.35 / 100 if inside else 0.0, abs=1e-12)
    (drawn,) = torch.autograd.grad(out.regulariser.sum(), norms)
    assert drawn.item() == pytest.approx(35 * (1 / 110**2 - 1 / norm**2) if inside else 0.0, abs=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_exact(name: str) -> None:
    """Of the whole loss, in embeddings (norms included) and centres; AdaFace's norms have none by definition."""
    margin, state = ALL[name]
    generator = torch.Generator().manual_seed(3)
    emb = (8 * torch.randn(6, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(7, 5, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0, 6, 3, -1, 2, 2])

    def quality_kept(cos: Tensor, norms: Tensor, state: MarginState, total: Total) -> margins.Margined:
        # What is detached on purpose is held for the finite differences: t, AdaFace's quality and running means.
        return margin(cos, fixed if name == "adaface" else norms, state, frozen)

    fixed = emb.detach().norm(dim=1)

    def loss(e: Tensor, w: Tensor) -> Tensor:
        return margin_softmax_whole(e, w, labels, quality_kept, scale=8.0, denominator=5, state=double(state)).loss

    assert torch.autograd.gradcheck(loss, (emb, weight), atol=1e-6)
    (held,) = torch.autograd.grad(loss(emb, weight), emb)
    real = margin_softmax_whole(
        emb, weight, labels, functools.partial(_frozen_state, margin), scale=8.0, denominator=5, state=double(state)
    )
    torch.testing.assert_close(torch.autograd.grad(real.loss, emb)[0], held)


def _frozen_state(margin: Margin, cos: Tensor, norms: Tensor, state: MarginState, total: Total) -> margins.Margined:
    return margin(cos, norms, state, frozen)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("straight", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edges_are_finite(name: str, straight: bool, dtype: torch.dtype) -> None:
    """Embeddings on a centre, opposite to it, and of length zero: values, gradients and state stay finite."""
    margin, state = ALL[name]
    emb = torch.tensor([[1.0, 0], [-1.0, 0], [0, 0], [300.0, 0], [-1e-6, 0]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[1.0, 0], [0, 1.0]], dtype=dtype, requires_grad=True)
    margin = margins.straight_through(margin) if straight else margin
    out = margin_softmax_whole(
        emb, weight, torch.zeros(5, dtype=torch.int64), margin, scale=64.0, denominator=5, state=state
    )
    out.loss.backward()
    assert out.loss.isfinite()
    assert emb.grad is not None
    assert weight.grad is not None
    assert emb.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    assert all(value.isfinite() for value in out.state.values())


@pytest.mark.parametrize("name", ALL)
def test_falls_with_the_angle(name: str) -> None:
    """Whatever the norm, a larger angle never gives a larger target cosine, 0 and pi included."""
    margin, state = ALL[name]
    theta = torch.linspace(0.0, math.pi, 5001, dtype=torch.float64)
    for norm in (1.0, 20.0, 60.0, 200.0):
        cos = margin(theta.cos(), torch.full_like(theta, norm), double(state), frozen).cos
        assert (cos.diff() < 0).all()
        assert cos.diff().abs().max() < 1.01 * math.pi / 5000


@pytest.mark.parametrize("name", ALL)
def test_straight_through_changes_the_cosines_gradient_only(name: str) -> None:
    margin, state = ALL[name]
    cos = torch.linspace(-0.9, 0.9, 7, dtype=torch.float64, requires_grad=True)
    norms = torch.linspace(12.0, 60.0, 7, dtype=torch.float64, requires_grad=True)
    exact = margin(cos, norms, double(state), own_batch)
    straight = margins.straight_through(margin)(cos, norms, double(state), own_batch)
    assert torch.equal(exact.cos, straight.cos)
    assert exact.state == straight.state
    assert torch.equal(torch.autograd.grad(straight.cos.sum(), cos, retain_graph=True)[0], torch.ones_like(cos))
    if name == "magface":
        ours, expected = (torch.autograd.grad(m.cos.sum(), norms)[0] for m in (straight, exact))
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", ["adaface", "curricularface"])
def test_unlabelled_images_leave_no_trace_in_the_state(name: str) -> None:
    margin, state = ALL[name]
    emb = 9 * torch.randn(8, 4, generator=torch.Generator().manual_seed(5))
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(6))
    labels = torch.tensor([0, 1, -1, 2, -1, 0, 1, 2])
    whole = margin_softmax_whole(emb, weight, labels, margin, scale=8.0, denominator=6, state=state)
    known = labels >= 0
    part = margin_softmax_whole(emb[known], weight, labels[known], margin, scale=8.0, denominator=6, state=state)
    torch.testing.assert_close(whole.state, part.state)
    torch.testing.assert_close(whole.loss, part.loss)


def test_magface_regularises_labelled_images_only() -> None:
    emb = torch.full((3, 4), 10.0)
    weight = torch.eye(4)
    with_one, without = (
        margin_softmax_whole(emb, weight, labels, MAG, scale=8.0, denominator=2).loss
        for labels in (torch.tensor([0, -1, 1]), torch.tensor([-1, -1, -1]))
    )
    plain = margin_softmax_whole(
        emb, weight, torch.tensor([0, -1, 1]), functools.partial(MAG, lambda_g=0.0), scale=8.0, denominator=2
    ).loss
    assert without.item() == 0
    assert (with_one - plain).item() == pytest.approx(35 * (1 / 20 + 20 / 110**2), rel=1e-5)


@pytest.mark.parametrize("name", ["adaface", "curricularface"])
@pytest.mark.parametrize("case", ["nan", "nothing labelled"])
def test_a_broken_step_leaves_the_state(name: str, case: str) -> None:
    """An fp16 overflow is skipped by the optimizer; it must not stay in the running means for ever."""
    margin, state = ALL[name]
    emb = torch.randn(3, 4)
    labels = torch.tensor([0, 1, 1])
    if case == "nan":
        emb[1] = float("nan")
    else:
        labels = torch.full_like(labels, -1)
    out = margin_softmax_whole(emb, torch.randn(2, 4), labels, margin, scale=8.0, denominator=3, state=state)
    assert out.state == state


def test_one_labelled_image_has_a_mean_but_no_deviation() -> None:
    out = ADA(torch.zeros(1), torch.tensor([50.0]), adaface_state(), own_batch)
    assert out.state["norm_mean"].item() == pytest.approx(20.3)
    assert out.state["norm_std"].item() == 100.0


def test_first_states() -> None:
    assert {k: v.item() for k, v in adaface_state().items()} == {"norm_mean": 20.0, "norm_std": 100.0}
    assert {k: v.item() for k, v in curricularface_state().items()} == {"cos_mean": 0.0}
