"""The margins of margin-softmax losses: what is done to the cosine between an embedding and its own class centre.

In: `cos_B`, the target cosines; `norms_B`, the lengths of the embeddings; `state`, what a margin remembers between
steps; `total`, which sums over the images of the whole optimizer step. Out: `Margined`. All share this signature
(`Margin`), so that a softmax takes any. Those here need neither norms nor state; AdaFace, CurricularFace and MagFace,
which do, are in `margins_adaptive.py`.

Letters: B images of a batch, C classes (or any chunk or shard of them), K sums. Angles are in radians.

The gradient is exact: d margin(cos) / d cos of the function that the value comes from. `straight_through` turns a
margin into arcface_torch's estimator, whose gradient is that of the plain cosine.

cos = +-1. d theta / d cos = -1 / sin(theta) is infinite there, so sin(theta) in that denominator is never taken below
`SIN_FLOOR`; the slope is at most m1 / SIN_FLOOR. The gradient that reaches the embedding is that slope times
|d cos / d emb| = sin(theta) / |emb|, hence at most m1 / |emb| at any angle. Cosines outside [-1, 1] by rounding are
treated as +-1.

theta_m = m1 * theta + m2 > pi. The cosine would rise again and reward a worse angle, so it is continued by
psi(theta_m) = (-1)^k cos(theta_m) - 2k with k = floor(theta_m / pi): continuous, and falling all the way, below 0 too
(where a negative m2 leads: psi = 2 - cos). Source: SphereFace (arXiv:1704.08063), Eq. 7, with theta_m in place of its
m * theta. arcface_torch does not continue at all; the ArcFace authors' MXNet code subtracts a constant instead
(cos(theta) - m sin(m)), which jumps at the seam.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MarginState = dict[str, Tensor]
"""What a margin remembers between steps (running means), by name: () float32 each; empty for the margins here."""

Total = Callable[[Tensor], Tensor]
"""(K, B) values of this batch's images -> (K,) sums over the labelled images of the whole step. Without gradient."""


class HardNegatives(NamedTuple):
    """What becomes of the cosines to other classes: see `harden`. Neither has a gradient.

    Args:
        threshold: (B,) negatives of an image with a cosine above this are hard.
        lift: () t; a hard negative becomes cos * (t + cos).
    """

    threshold: Tensor
    lift: Tensor


class Margined(NamedTuple):
    """What a margin gives.

    Args:
        cos: (B,) the target cosines to use in the softmax, with gradient.
        state: the next state; the statistics of this step are in it, and `cos` was made with it.
        regulariser: (B,) what each image adds to its own loss, with gradient; None = nothing.
        hard: how to change the negatives; None = leave them.
    """

    cos: Tensor
    state: MarginState
    regulariser: Tensor | None = None
    hard: HardNegatives | None = None


Margin = Callable[[Tensor, Tensor, MarginState, Total], Margined]
"""(cos_B, norms_B, state, total) -> Margined."""


def own_batch(values_KB: Tensor) -> Tensor:
    """The `Total` where the batch is the whole step and every image is labelled."""
    return values_KB.sum(1)


SIN_FLOOR = 2.0**-11
"""Smallest sin(theta) a slope is divided by: below, float32 cosines, 2**-24 apart under 1, hardly tell angles apart."""


def plain(cos_B: Tensor, norms_B: Tensor, state: MarginState, total: Total = own_batch) -> Margined:
    """No margin: normalised softmax. Source: NormFace (arXiv:1704.06369).

    Args:
        cos_B: (B,) target cosines, [-1, 1].
        norms_B: (B,) lengths of the embeddings; not used.
        state: returned as it is.
        total: not used.
    """
    return Margined(cos_B, state)


def cosface(cos_B: Tensor, norms_B: Tensor, state: MarginState, total: Total = own_batch, *, m3: float) -> Margined:
    """cos(theta) - m3. Source: CosFace (arXiv:1801.09414), Eq. 4.

    Args:
        cos_B: (B,) target cosines, [-1, 1].
        norms_B: (B,) lengths of the embeddings; not used.
        state: returned as it is.
        total: not used.
        m3: what is taken off the cosine, >= 0; 0.35 or 0.4 in practice.
    """
    return Margined(cos_B - m3, state)


def arcface(cos_B: Tensor, norms_B: Tensor, state: MarginState, total: Total = own_batch, *, m2: float) -> Margined:
    """psi(theta + m2), which is cos(theta + m2) up to theta + m2 = pi. Source: ArcFace (arXiv:1801.07698), Eq. 3.

    Args:
        cos_B: (B,) target cosines, [-1, 1].
        norms_B: (B,) lengths of the embeddings; not used.
        state: returned as it is.
        total: not used.
        m2: radians added to the angle, >= 0; 0.5 in the paper.
    """
    return combined(cos_B, norms_B, state, m1=1.0, m2=m2, m3=0.0)


def sphereface(cos_B: Tensor, norms_B: Tensor, state: MarginState, total: Total = own_batch, *, m1: float) -> Margined:
    """psi(m1 * theta). Source: SphereFace (arXiv:1704.08063), Eq. 7, on a normalised embedding with a fixed scale.

    The paper multiplies by the embedding's length instead of a scale, and blends the margin in with a decaying lambda.

    Args:
        cos_B: (B,) target cosines, [-1, 1].
        norms_B: (B,) lengths of the embeddings; not used.
        state: returned as it is.
        total: not used.
        m1: factor of the angle, > 0; 4 in the paper, 1.35 is common with a scale of 64.
    """
    return combined(cos_B, norms_B, state, m1=m1, m2=0.0, m3=0.0)


def combined(
    cos_B: Tensor,
    norms_B: Tensor,
    state: MarginState,
    total: Total = own_batch,
    *,
    m1: float,
    m2: float,
    m3: float,
) -> Margined:
    """psi(m1 * theta + m2) - m3 with all three active together. Source: ArcFace (arXiv:1801.07698), Eq. 4.

    Args:
        cos_B: (B,) target cosines, [-1, 1].
        norms_B: (B,) lengths of the embeddings; not used.
        state: returned as it is.
        total: not used.
        m1: factor of the angle, > 0.
        m2: radians added to the angle, >= 0.
        m3: what is taken off the cosine, >= 0.
    """
    if m1 == 1.0 and m2 == 0.0:
        return cosface(cos_B, norms_B, state, m3=m3)
    return Margined(continued_cosine(cos_B, m1, m2) - m3, state)


def continued_cosine(cos_B: Tensor, m1: float, m2: float | Tensor) -> Tensor:
    """psi(m1 * theta + m2) of theta = arccos(cos), with its exact gradient in the cosine and in m2.

    First derivatives only.

    Args:
        cos_B: (B,) cosines; outside [-1, 1] they count as +-1.
        m1: factor of the angle, > 0.
        m2: radians added to the angle, of any sign: one for all or (B,) one each, with a gradient if it has one.
    """
    c_B = cos_B.detach().clamp(-1.0, 1.0)
    shift = m2.detach() if isinstance(m2, Tensor) else m2
    sin_B = ((1.0 - c_B) * (1.0 + c_B)).sqrt()
    theta_m_B = m1 * torch.atan2(sin_B, c_B) + shift
    k_B = torch.floor(theta_m_B / math.pi)
    sign_B = 1.0 - 2.0 * torch.remainder(k_B, 2.0)
    value_B = sign_B * theta_m_B.cos() - 2.0 * k_B
    # The slope's own angle keeps the same distance from 0 and pi as its denominator, so that m1 * theta alone tends to
    # its limit m1**2 at cos = 1 instead of 0.
    safe_sin_B = sin_B.clamp(min=SIN_FLOOR)
    slope_B = m1 * (m1 * torch.atan2(safe_sin_B, c_B) + shift).sin().abs() / safe_sin_B
    value_B = _with_slope(value_B, slope_B, cos_B)
    return _with_slope(value_B, -theta_m_B.sin().abs(), m2) if isinstance(m2, Tensor) else value_B


def harden(cos_BC: Tensor, hard: HardNegatives) -> Tensor:
    """Negatives above their image's threshold become cos * (t + cos); element by element, so any chunk or shard of the
    classes may be done alone. Source: CurricularFace (arXiv:2004.00288), Sec. 3.2, the function N(t, cos).

    Args:
        cos_BC: (B, C) cosines; what becomes of the target's column does not matter, the margin replaces it.
        hard: threshold and t.
    """
    return torch.where(cos_BC > hard.threshold.unsqueeze(1), cos_BC * (hard.lift + cos_BC), cos_BC)


def straight_through(margin: Margin) -> Margin:
    """`margin` with the gradient of the plain cosine: arcface_torch's estimator; its margin is applied under no_grad.

    It differs from the exact gradient by the factor sin(theta) / sin(theta + m2) for ArcFace, not at all for CosFace.
    The value is that of `margin`, so unlike arcface_torch's it keeps falling beyond theta + m = pi. A gradient that
    the margin has in the norms (MagFace), and what it does to negatives, stay exact.
    """

    def estimator(cos_B: Tensor, norms_B: Tensor, state: MarginState, total: Total = own_batch) -> Margined:
        margined = margin(cos_B.detach(), norms_B, state, total)
        return margined._replace(cos=_with_slope(margined.cos, torch.ones_like(cos_B), cos_B))

    return estimator


def _with_slope(value_B: Tensor, slope_B: Tensor, by_B: Tensor) -> Tensor:
    """`value_B` with d value / d by = `slope_B` besides its other gradients; the added term is exactly 0."""
    return value_B + slope_B * (by_B - by_B.detach())
