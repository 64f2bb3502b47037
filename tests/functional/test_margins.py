"""Margins against the closed form at known angles, beyond pi and at cos = +-1; gradients against finite differences."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from visard.functional import margins
from visard.functional.margins import SIN_FLOOR, Margin

ARC = functools.partial(margins.arcface, m2=0.5)
COS = functools.partial(margins.cosface, m3=0.35)
ALL = functools.partial(margins.combined, m1=1.35, m2=0.3, m3=0.2)
SPHERE = functools.partial(margins.sphereface, m1=4.0)
MARGINS = {"plain": margins.plain, "cosface": COS, "arcface": ARC, "combined": ALL, "sphereface": SPHERE}


def apply(margin: Margin, cos: Tensor) -> Tensor:
    margined = margin(cos, torch.ones_like(cos), {}, margins.own_batch)
    assert margined.state == {}
    assert margined.regulariser is None
    assert margined.hard is None
    return margined.cos


def slope(margin: Margin, cos: Tensor) -> Tensor:
    cos = cos.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(apply(margin, cos).sum(), cos)
    return gradient


@pytest.mark.parametrize(
    ("margin", "degrees", "expected"),
    [
        (margins.plain, 60.0, 0.5),
        (COS, 60.0, 0.15),
        (functools.partial(margins.arcface, m2=math.pi / 6), 60.0, 0.0),
        (functools.partial(margins.arcface, m2=math.pi / 3), 60.0, -0.5),
        (functools.partial(margins.arcface, m2=math.pi / 3), 0.0, 0.5),
        (functools.partial(margins.combined, m1=2.0, m2=math.pi / 6, m3=0.25), 45.0, -0.75),
        (functools.partial(margins.combined, m1=1.0, m2=0.0, m3=0.25), 90.0, -0.25),
        # Beyond pi: 150 + 60 = 210 degrees, k = 1: -cos(210) - 2 = cos(30) - 2.
        (functools.partial(margins.arcface, m2=math.pi / 3), 150.0, math.cos(math.pi / 6) - 2),
        # 3 * 130 = 390 degrees, k = 2: cos(390) - 4 = cos(30) - 4.
        (functools.partial(margins.combined, m1=3.0, m2=0.0, m3=0.0), 130.0, math.cos(math.pi / 6) - 4),
    ],
)
def test_known_angles(margin: Margin, degrees: float, expected: float) -> None:
    cos = torch.tensor([math.cos(math.radians(degrees))], dtype=torch.float64)
    assert apply(margin, cos).item() == pytest.approx(expected, abs=1e-12)
    assert apply(margin, cos.float()).item() == pytest.approx(expected, abs=3e-6)


@pytest.mark.parametrize("name", MARGINS)
def test_falls_with_the_angle_without_a_jump(name: str) -> None:
    """Strictly monotone from 0 to pi, theta + m = pi included, and no step larger than the slope allows."""
    theta = torch.linspace(0.0, math.pi, 20001, dtype=torch.float64)
    steps = apply(MARGINS[name], theta.cos()).diff()
    assert (steps < 0).all()
    assert steps.abs().max() < 4.1 * (math.pi / 20000)  # |d/d theta psi(m1 theta + m2)| <= m1 <= 4


@pytest.mark.parametrize("name", MARGINS)
def test_gradient_is_exact(name: str) -> None:
    degrees = [3.0, 30.0, 59.0, 90.0, 120.0, 151.0, 152.0, 170.0, 177.0]
    cos = torch.tensor(degrees, dtype=torch.float64).deg2rad().cos().requires_grad_()
    assert torch.autograd.gradcheck(functools.partial(apply, MARGINS[name]), (cos,), eps=1e-7, atol=1e-5)


def test_arcface_slope_at_a_known_angle() -> None:
    """d cos(theta + m) / d cos(theta) = sin(theta + m) / sin(theta): at 30 degrees with m = 60 degrees, 1 / 0.5."""
    cos = torch.tensor([math.cos(math.pi / 6)], dtype=torch.float64)
    assert slope(functools.partial(margins.arcface, m2=math.pi / 3), cos).item() == pytest.approx(2.0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MARGINS)
def test_ends_and_rounding_beyond_them(name: str, dtype: torch.dtype) -> None:
    """At cos = +-1 and one rounding error outside: finite value and slope, the slope within its documented bound."""
    cos = torch.tensor([1.0, -1.0, 1.0 + 3e-7, -1.0 - 3e-7], dtype=dtype)
    value, gradient = apply(MARGINS[name], cos), slope(MARGINS[name], cos)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert (gradient >= 0).all()
    assert gradient.max() <= 4.0 / SIN_FLOOR
    assert value[2].item() == pytest.approx(value[0].item(), abs=1e-6)
    assert value[3].item() == pytest.approx(value[1].item(), abs=1e-6)


def test_multiplicative_margin_keeps_its_limit_at_zero_angle() -> None:
    """cos(4 theta) as a function of cos(theta) has slope 4**2 at theta = 0: the guard must not turn that into 0."""
    assert slope(SPHERE, torch.ones(1)).item() == pytest.approx(16.0, rel=1e-4)


def test_gradient_at_the_embedding_is_bounded() -> None:
    """Slope times |d cos / d emb| <= m1 / |emb|, also a hair from the class centre."""
    centre = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    for angle in (0.0, 1e-9, 1e-6, 1e-4, 1e-2, 1.0, math.pi - 1e-6, math.pi):
        emb = 2.0 * torch.tensor([math.cos(angle), math.sin(angle), 0.0], dtype=torch.float64)
        emb.requires_grad_()
        apply(ARC, (torch.nn.functional.normalize(emb, dim=0) @ centre).unsqueeze(0)).sum().backward()
        assert emb.grad is not None
        assert emb.grad.norm() <= 0.5 * (1 + 1e-9), angle


@settings(max_examples=50, deadline=None)
@given(m1=st.floats(0.5, 4.0), m2=st.floats(0.0, 2.0), m3=st.floats(0.0, 1.0), theta=st.floats(0.01, math.pi - 0.01))
def test_float32_equals_float64(m1: float, m2: float, m3: float, theta: float) -> None:
    margin = functools.partial(margins.combined, m1=m1, m2=m2, m3=m3)
    cos32 = torch.tensor([math.cos(theta)], dtype=torch.float32)
    error = (apply(margin, cos32).double() - apply(margin, cos32.double())).abs().item()
    assert error < 5e-6


@pytest.mark.parametrize("name", ["arcface", "combined", "sphereface"])
def test_straight_through_changes_the_gradient_only(name: str) -> None:
    cos = torch.linspace(-1, 1, 41, dtype=torch.float64)
    estimator = margins.straight_through(MARGINS[name])
    assert torch.equal(apply(estimator, cos), apply(MARGINS[name], cos))
    assert torch.equal(slope(estimator, cos), torch.ones_like(cos))


def test_straight_through_repeats_arcface_torch() -> None:
    """The public code's recipe in the range it handles (theta + m <= pi): arccos, add, cos under no_grad, in place."""
    theta = torch.linspace(0.05, math.pi - 0.55, 30, dtype=torch.float64)
    leaf = theta.cos().requires_grad_()
    logit = leaf * 1.0
    with torch.no_grad():
        logit.arccos_().add_(0.5).cos_()
    (logit * 64.0).square().sum().backward()
    ours = theta.cos().requires_grad_()
    (apply(margins.straight_through(ARC), ours) * 64.0).square().sum().backward()
    assert leaf.grad is not None
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, leaf.grad, rtol=1e-12, atol=1e-12)


def test_margins_that_mean_the_same_are_the_same() -> None:
    cos = torch.linspace(-1, 1, 101)
    assert torch.equal(apply(functools.partial(margins.combined, m1=1.0, m2=0.5, m3=0.0), cos), apply(ARC, cos))
    assert torch.equal(apply(functools.partial(margins.combined, m1=1.0, m2=0.0, m3=0.35), cos), apply(COS, cos))
    assert torch.equal(apply(functools.partial(margins.combined, m1=1.0, m2=0.0, m3=0.0), cos), cos)
    assert torch.equal(apply(functools.partial(margins.combined, m1=4.0, m2=0.0, m3=0.0), cos), apply(SPHERE, cos))


def test_sphereface_is_the_papers_psi() -> None:
    """Eq. 7 with k counted by hand: m = 4 at 20, 60, 100 and 170 degrees, k = 0, 1, 2 and 3."""
    degrees = torch.tensor([20.0, 60.0, 100.0, 170.0], dtype=torch.float64)
    expected = [math.cos(math.radians(4 * d)) * (-1) ** k - 2 * k for k, d in enumerate(degrees.tolist())]
    assert apply(SPHERE, degrees.deg2rad().cos()).tolist() == pytest.approx(expected, abs=1e-12)


def test_a_negative_shift_goes_on_rising_to_angle_zero() -> None:
    """Below theta + m2 = 0 the cosine would fall again: psi = 2 - cos there."""
    theta = torch.linspace(0.0, math.pi, 5001, dtype=torch.float64)
    value = margins.continued_cosine(theta.cos(), 1.0, -0.4)
    assert value[0].item() == pytest.approx(2 - math.cos(0.4), abs=1e-12)
    assert (value.diff() < 0).all()
    assert value.diff().abs().max() < 1.01 * math.pi / 5000


def test_shift_has_its_exact_gradient() -> None:
    cos = torch.tensor([0.9, 0.3, -0.5, -0.95, 0.99], dtype=torch.float64, requires_grad=True)
    shift = torch.tensor([0.4, -0.3, 0.8, 0.7, -0.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c, m: margins.continued_cosine(c, 1.5, m), (cos, shift), atol=1e-5)


def test_harden_at_known_cosines_and_in_chunks() -> None:
    """Above the threshold cos (t + cos), at and below it nothing; any split of the classes gives the same."""
    cos = torch.tensor([[0.5, 0.2, -0.4], [0.5, 0.8, 0.1]], dtype=torch.float64, requires_grad=True)
    hard = margins.HardNegatives(torch.tensor([0.2, 0.6], dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64))
    whole = margins.harden(cos, hard)
    expected = [[0.5 * 0.8, 0.2, -0.4], [0.5, 0.8 * 1.1, 0.1]]
    torch.testing.assert_close(whole.detach(), torch.tensor(expected, dtype=torch.float64))
    chunks = torch.cat([margins.harden(cos[:, i : i + 1], hard) for i in range(3)], dim=1)
    assert torch.equal(whole, chunks)
    (gradient,) = torch.autograd.grad(whole.sum(), cos)
    slopes = [[0.3 + 2 * 0.5, 1.0, 1.0], [1.0, 0.3 + 2 * 0.8, 1.0]]
    torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=torch.float64))
