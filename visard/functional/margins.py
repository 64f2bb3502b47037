"""The margins of margin-softmax losses: what is done to the cosine between an embedding and its own class centre.

In: `cos_B`, the target cosines; `norms_B`, the lengths of the embeddings; `state`, what a margin remembers between
steps. Out: the target cosines to use in the softmax, the next state, and a regulariser to add to the loss (a scalar, 0
for most). All share this signature (`Margin`), so that a softmax takes any; those here need neither norms nor state.

Letters: B images of a batch. Angles are in radians.

The gradient is exact: d margin(cos) / d cos of the function that the value comes from. `straight_through` turns a
margin into arcface_torch's estimator, whose gradient is that of the plain cosine.

cos = +-1. d theta / d cos = -1 / sin(theta) is infinite there, so sin(theta) in that denominator is never taken below
`SIN_FLOOR`; the slope is at most m1 / SIN_FLOOR. The gradient that reaches the embedding is that slope times
|d cos / d emb| = sin(theta) / |emb|, hence at most m1 / |emb| at any angle. Cosines outside [-1, 1] by rounding are
treated as +-1.

theta_m = m1 * theta + m2 > pi. The cosine would rise again and reward a worse angle, so it is continued by
psi(theta_m) = (-1)^k cos(theta_m) - 2k with k = floor(theta_m / pi): continuous, and falling all the way.
Source: SphereFace (arXiv:1704.08063), Eq. 7, with theta_m in place of its m * theta. arcface_torch does not continue at
all; the ArcFace authors' MXNet code subtracts a constant instead (cos(theta) - m sin(m)), which jumps at the seam.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

MarginState = dict[str, Tensor]
"""What a margin remembers between steps (running means and the like), by name; empty for the margins here."""

Margin = Callable[[Tensor, Tensor, MarginState], tuple[Tensor, MarginState, Tensor]]
"""(cos_B, norms_B, state) -> (cos_B with the margin, next state, regulariser)."""

SIN_FLOOR = 2.0**-11
"""Smallest sin(theta) a slope is divided by: below, float32 cosines, 2**-24 apart under 1, hardly tell angles apart."""


def plain(cos_B: Tensor, norms_B: Tensor, state: MarginState) -> tuple[Tensor, MarginState, Tensor]:
    """No margin: normalised softmax. Source: NormFace (arXiv:1704.06369).

    Args:
        cos_B: (B,) target cosines, [-1, 1].
        norms_B: (B,) lengths of the embeddings; not used.
        state: returned as it is.
    """
    return cos_B, state, cos_B.new_zeros(())


def cosface(cos_B: Tensor, norms_B: Tensor, state: MarginState, *, m3: float) -> tuple[Tensor, MarginState, Tensor]:
    """cos(theta) - m3. Source: CosFace (arXiv:1801.09414), Eq. 4.

    Args:
        cos_B: (B,) target cosines, [-1, 1].
        norms_B: (B,) lengths of the embeddings; not used.
        state: returned as it is.
        m3: what is taken off the cosine, >= 0; 0.35 or 0.4 in practice.
    """
    return cos_B - m3, state, cos_B.new_zeros(())


def arcface(cos_B: Tensor, norms_B: Tensor, state: MarginState, *, m2: float) -> tuple[Tensor, MarginState, Tensor]:
    """psi(theta + m2), which is cos(theta + m2) up to theta + m2 = pi. Source: ArcFace (arXiv:1801.07698), Eq. 3.

    Args:
        cos_B: (B,) target cosines, [-1, 1].
        norms_B: (B,) lengths of the embeddings; not used.
        state: returned as it is.
        m2: radians added to the angle, >= 0; 0.5 in the paper.
    """
    return combined(cos_B, norms_B, state, m1=1.0, m2=m2, m3=0.0)


def combined(
    cos_B: Tensor, norms_B: Tensor, state: MarginState, *, m1: float, m2: float, m3: float
) -> tuple[Tensor, MarginState, Tensor]:
    """psi(m1 * theta + m2) - m3 with all three active together. Source: ArcFace (arXiv:1801.07698), Eq. 4.

    Args:
        cos_B: (B,) target cosines, [-1, 1].
        norms_B: (B,) lengths of the embeddings; not used.
        state: returned as it is.
        m1: factor of the angle, > 0.
        m2: radians added to the angle, >= 0.
        m3: what is taken off the cosine, >= 0.
    """
    if m1 == 1.0 and m2 == 0.0:
        return cosface(cos_B, norms_B, state, m3=m3)
    c_B = cos_B.detach().clamp(-1.0, 1.0)
    sin_B = ((1.0 - c_B) * (1.0 + c_B)).sqrt()
    theta_m_B = m1 * torch.atan2(sin_B, c_B) + m2
    k_B = torch.floor(theta_m_B / math.pi)
    sign_B = 1.0 - 2.0 * torch.remainder(k_B, 2.0)
    value_B = sign_B * theta_m_B.cos() - 2.0 * k_B - m3
    # The slope's own angle keeps the same distance from 0 and pi as its denominator, so that m1 * theta alone tends to
    # its limit m1**2 at cos = 1 instead of 0.
    safe_sin_B = sin_B.clamp(min=SIN_FLOOR)
    slope_B = m1 * (m1 * torch.atan2(safe_sin_B, c_B) + m2).sin().abs() / safe_sin_B
    return _with_slope(value_B, slope_B, cos_B), state, cos_B.new_zeros(())


def straight_through(margin: Margin) -> Margin:
    """`margin` with the gradient of the plain cosine: arcface_torch's estimator; its margin is applied under no_grad.

    It differs from the exact gradient by the factor sin(theta) / sin(theta + m2) for ArcFace, not at all for CosFace.
    The value is that of `margin`, so unlike arcface_torch's it keeps falling beyond theta + m = pi.
    """

    def estimator(cos_B: Tensor, norms_B: Tensor, state: MarginState) -> tuple[Tensor, MarginState, Tensor]:
        value_B, next_state, regulariser = margin(cos_B, norms_B, state)
        return _with_slope(value_B.detach(), torch.ones_like(cos_B), cos_B), next_state, regulariser

    return estimator


def _with_slope(value_B: Tensor, slope_B: Tensor, cos_B: Tensor) -> Tensor:
    """`value_B` with d value / d cos = `slope_B`; the added term is exactly 0. First derivatives only."""
    return value_B + slope_B * (cos_B - cos_B.detach())
