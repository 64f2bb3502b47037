"""Margins that look at more than the target's angle: AdaFace, CurricularFace, MagFace.

In and out: the signature of `margins.Margin`. AdaFace and CurricularFace remember running means (`*_state` makes the
first), which each call brings up to date with the labelled images of the whole optimizer step before it uses them, as
their authors do. `total` gives those images' sums: a head adds up over processes and micro-batches in it, so that the
next state is the same however the step is divided. A sum that is not finite, or of no image, leaves the state as it is.

Letters: B images of a batch. Angles are in radians. cos = +-1 and angles beyond [0, pi] as in `margins.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visard.functional.margins import (
    HardNegatives,
    Margined,
    MarginState,
    Total,
    continued_cosine,
    own_batch,
)

NORM_RANGE = (0.001, 100.0)
"""AdaFace: norms are taken into this range, as in the authors' code."""

SPREAD_FLOOR = 1e-3
"""AdaFace: added to the standard deviation that norms are divided by, as in the authors' code."""


def adaface_state() -> MarginState:
    """The authors' start: a mean norm of 20, and a deviation so wide that all images count as of average quality."""
    return {"norm_mean": torch.tensor(20.0), "norm_std": torch.tensor(100.0)}


def adaface(
    cos_B: Tensor,
    norms_B: Tensor,
    state: MarginState,
    total: Total = own_batch,
    *,
    m: float,
    h: float,
    t_alpha: float,
) -> Margined:
    """psi(theta + g_angle) - g_add: an angular margin for poor images, an additive one for good ones.

    z = clip((norm - mean) / (std / h), -1, 1) tells the quality of an image from its norm, without a gradient;
    g_angle = -m z and g_add = m z + m. z = -1 is ArcFace, 0 CosFace, 1 a negative angular margin.
    Source: AdaFace (arXiv:2204.00964), Sec. 3.3: image quality indicator and adaptive margin function; norms,
    running means and their start as in the authors' code. Deviation: theta + g_angle outside [0, pi] is continued by
    psi, where the authors' code clips it and so gives such images no gradient; cosines are not clipped to +-0.999.

    Args:
        cos_B: (B,) target cosines, [-1, 1].
        norms_B: (B,) lengths of the embeddings; detached.
        state: "norm_mean" and "norm_std", running means of the step's mean and (unbiased) standard deviation.
        total: see `margins.Total`.
        m: margin, > 0; 0.4 in the paper.
        h: concentration, > 0: the part of a standard deviation's step; 0.333 in the paper.
        t_alpha: weight of the present step in the running means, (0, 1]; 0.01 in the authors' code.
    """
    length_B = norms_B.detach().clamp(*NORM_RANGE)
    # Sums of the distance to the running mean: the square of the norm itself would lose its spread to rounding.
    distance_B = length_B - state["norm_mean"]
    count, first, second = total(torch.stack([torch.ones_like(distance_B), distance_B, distance_B.square()]))
    offset = first / count
    variance = (second - count * offset.square()).clamp(min=0.0) / (count - 1.0)
    mean = _moved(state["norm_mean"], state["norm_mean"] + offset, t_alpha)
    std = _moved(state["norm_std"], variance.sqrt(), t_alpha)
    quality_B = ((length_B - mean) / (std + SPREAD_FLOOR) * h).clamp(-1.0, 1.0)
    target_B = continued_cosine(cos_B, 1.0, -m * quality_B) - (m * quality_B + m)
    return Margined(target_B, {"norm_mean": mean, "norm_std": std})


def curricularface_state() -> MarginState:
    """The authors' start: at first hard negatives count less than easy ones."""
    return {"cos_mean": torch.tensor(0.0)}


def curricularface(
    cos_B: Tensor,
    norms_B: Tensor,
    state: MarginState,
    total: Total = own_batch,
    *,
    m: float,
    momentum: float,
) -> Margined:
    """psi(theta + m), and negatives with a cosine above it become cos * (t + cos), t the running mean target cosine.

    Source: CurricularFace (arXiv:2004.00288), Sec. 3.2: positive similarity T, negative similarity N, and t as an
    exponential moving average. The paper's formula gives the present step the weight alpha = 0.99, the authors' code
    0.01; the code's is meant here (`momentum` is the weight of the past). Beyond theta + m = pi the authors' code goes
    on with cos(theta) - m sin(m); psi is continuous.

    Args:
        cos_B: (B,) target cosines, [-1, 1].
        norms_B: (B,) lengths of the embeddings; not used.
        state: "cos_mean", t.
        total: see `margins.Total`.
        m: radians added to the angle, >= 0; 0.5 in the paper.
        momentum: weight of the past in t, [0, 1); 0.99 in the authors' code.
    """
    plain_B = cos_B.detach().clamp(-1.0, 1.0)
    count, cosines = total(torch.stack([torch.ones_like(plain_B), plain_B]))
    lift = _moved(state["cos_mean"], cosines / count, 1.0 - momentum)
    target_B = continued_cosine(cos_B, 1.0, m)
    return Margined(target_B, {"cos_mean": lift}, hard=HardNegatives(target_B.detach(), lift))


def magface(
    cos_B: Tensor,
    norms_B: Tensor,
    state: MarginState,
    total: Total = own_batch,
    *,
    l_a: float,
    u_a: float,
    l_m: float,
    u_m: float,
    lambda_g: float,
) -> Margined:
    """psi(theta + m(a)) with a margin that grows with the norm a, and lambda_g g(a) added to the image's loss.

    m(a) = l_m + (u_m - l_m) (a - l_a) / (u_a - l_a) and g(a) = 1 / a + a / u_a^2, of a taken into [l_a, u_a]: outside,
    the norm has no gradient, as in the authors' code. Inside, the gradient through m(a) is exact: a longer embedding
    has a harder margin, which only a small angle can afford.
    Source: MagFace (arXiv:2103.06627), Sec. 3.2 with the m and g of Sec. 4.1 and the authors' code.

    Args:
        cos_B: (B,) target cosines, [-1, 1].
        norms_B: (B,) lengths of the embeddings, with gradient.
        state: returned as it is.
        total: not used.
        l_a: norm at which the margin is l_m; 10 in the paper.
        u_a: norm at which the margin is u_m, and where g is least; 110 in the paper.
        l_m: radians; 0.45 in the authors' code.
        u_m: radians; 0.8 in the authors' code.
        lambda_g: weight of g; 35 in the authors' code.
    """
    length_B = norms_B.clamp(l_a, u_a)
    margin_B = l_m + (u_m - l_m) / (u_a - l_a) * (length_B - l_a)
    regulariser_B = lambda_g * (1.0 / length_B + length_B / u_a**2)
    return Margined(continued_cosine(cos_B, 1.0, margin_B), state, regulariser=regulariser_B)


def _moved(past: Tensor, present: Tensor, weight: float) -> Tensor:
    """The running mean with `weight` on the present; the past alone where the present is not finite."""
    moved = weight * present + (1.0 - weight) * past
    return torch.where(moved.isfinite(), moved, past)
