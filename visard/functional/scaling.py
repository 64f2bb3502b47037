"""Scaling laws: error = a N^-b, or a N^-b + c, through errors at several sizes, with bands.

In: sizes (parameters) and errors. Out: `Law`, its values at other sizes, and bands by the bootstrap.
Source: Kaplan et al., arXiv:2001.08361, Eq. 1.1 (the law); Henighan et al., arXiv:2010.14701, Eq. 1.1 (with what no
size removes, c); Efron & Tibshirani, An Introduction to the Bootstrap, section 9.4 (residuals). BigFace's slides draw
such a line and give no numbers.

The fit is least squares of the logarithm of the error, so that large and small errors count alike: for given b and c
the best a is a mean, so the search is over b and c alone.

Letters: K sizes, P places at which the law is drawn, S bootstrap samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

STEEPEST = 3.0
"""Largest b that is looked for."""

LOWEST, HIGHEST = -12.0, 6.0
"""Between these log(c / a) is looked for; at the lowest there is no floor to be seen, and c is 0."""

STEPS = 60
"""Of the search; it stands still after some tens."""

FLOOR_SIZES = 7
"""Sizes from which c is worth a try: with fewer, three parameters go through nearly anything."""


@dataclass(frozen=True, kw_only=True)
class Law:
    """error = a * (N / unit) ** -b + c.

    Args:
        a: error above the floor at N = unit, > 0.
        b: exponent, >= 0.
        c: floor, >= 0; 0 where it is not part of the fit.
        unit: the geometric mean of the sizes, so that a is a number of the errors' own kind.
        deviation: root mean square of the logarithms' residuals.
    """

    a: float
    b: float
    c: float
    unit: float
    deviation: float

    def at(self, sizes: FloatArray) -> FloatArray:
        """(P,) errors at (P,) sizes."""
        found: FloatArray = self.a * (np.asarray(sizes, np.float64) / self.unit) ** -self.b + self.c
        return found


@dataclass(frozen=True, kw_only=True)
class Band:
    """What a law could have been.

    Args:
        low: (P,) 2.5 % of the samples are below.
        high: (P,) 2.5 % are above.
        b: 95 % interval of the exponent.
        c: of the floor; (0, 0) without one.
    """

    low: FloatArray
    high: FloatArray
    b: tuple[float, float]
    c: tuple[float, float]


def fit_law(sizes: FloatArray, errors: FloatArray, *, floor: bool = False) -> Law:
    """The law nearest to the errors' logarithms.

    Args:
        sizes: (K,) > 0, at least two different ones; three with a floor.
        errors: (K,) > 0.
        floor: whether c is part of it.

    Raises:
        ValueError: too few sizes, or a size or error that is not above 0.
    """
    sizes, errors = np.asarray(sizes, np.float64), np.asarray(errors, np.float64)
    need = 3 if floor else 2
    if len(np.unique(sizes)) < need:
        raise ValueError(f"{len(np.unique(sizes))} different sizes; a law with {need} numbers needs {need}")
    if not (np.isfinite(sizes).all() and np.isfinite(errors).all() and (sizes > 0).all() and (errors > 0).all()):
        raise ValueError("sizes and errors must be finite and above 0: no logarithm of others")
    return _fit(sizes, np.log(errors)[None, :], floor=floor)[0]


def bootstrap(
    law: Law, sizes: FloatArray, errors: FloatArray, places: FloatArray, *, samples: int = 500, seed: int = 0
) -> Band | None:
    """95 % bands of the curve and its numbers: the law is fitted again to its own values with residuals drawn anew.

    Residuals are widened by sqrt(K / (K - numbers fitted)), because the fit has used up some of their freedom. With few
    sizes the band is a rough one: five sizes have five residuals.

    Args:
        law: what `fit_law` found; one with c = 0 is fitted again without a floor.
        sizes: (K,) as fitted.
        errors: (K,) as fitted.
        places: (P,) sizes at which the band is wanted.
        samples: S.
        seed: of the draw.

    Returns:
        None where no residual is free: as many sizes as numbers.
    """
    sizes, errors = np.asarray(sizes, np.float64), np.asarray(errors, np.float64)
    floor = law.c > 0
    used = 3 if floor else 2
    count = len(sizes)
    if count <= used:
        return None
    fitted = np.log(law.at(sizes))
    residuals = np.log(errors) - fitted
    residuals = (residuals - residuals.mean()) * np.sqrt(count / (count - used))
    drawn = np.random.default_rng(seed).integers(0, count, (samples, count))
    laws = _fit(sizes, fitted + residuals[drawn], floor=floor)
    curves = np.stack([sample.at(places) for sample in laws])
    low, high = np.quantile(curves, (0.025, 0.975), axis=0)
    return Band(
        low=low,
        high=high,
        b=_interval([sample.b for sample in laws]),
        c=_interval([sample.c for sample in laws]),
    )


def _interval(values: list[float]) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def _fit(sizes: FloatArray, log_errors_SK: FloatArray, *, floor: bool) -> list[Law]:
    """One law for each of (S, K) logarithms of errors."""
    unit = float(np.exp(np.log(sizes).mean()))
    log_x_K = np.log(sizes / unit)
    if not floor:
        # A straight line in logarithms; falling or level.
        centred_K = log_x_K - log_x_K.mean()
        b_S = np.maximum(-(log_errors_SK @ centred_K) / (centred_K @ centred_K), 0.0)
        ratio_S = np.zeros_like(b_S)
    else:
        b_S, ratio_S = _search(log_x_K, log_errors_SK)
    shape_SK = np.logaddexp(-b_S[:, None] * log_x_K, _log(ratio_S)[:, None])
    gap_SK = log_errors_SK - shape_SK
    a_S = np.exp(gap_SK.mean(1))
    deviation_S = gap_SK.std(1)
    return [
        Law(a=float(a), b=float(b), c=float(a * ratio), unit=unit, deviation=float(deviation))
        for a, b, ratio, deviation in zip(a_S, b_S, ratio_S, deviation_S, strict=True)
    ]


def _search(log_x_K: FloatArray, log_errors_SK: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(S,) exponents and (S,) floors as a part of a, with the least scatter of the logarithms around them.

    Levenberg-Marquardt in (b, log(c / a)) from the best of a coarse grid: the valley is narrow and slanted.
    """
    start_G2 = np.stack(np.meshgrid(np.linspace(0.0, STEEPEST, 16), np.linspace(LOWEST, HIGHEST, 13)), -1).reshape(
        -1, 2
    )
    scatter_SG = np.stack([_gaps(start, log_x_K, log_errors_SK)[0].var(1) for start in start_G2[:, None, :]], axis=1)
    best_S2 = start_G2[scatter_SG.argmin(1)]
    gap_SK, slope_SK2 = _gaps(best_S2, log_x_K, log_errors_SK)
    least_S = gap_SK.var(1)
    damping_S = np.full(len(least_S), 1e-3)
    for _ in range(STEPS):
        square_S22 = np.einsum("ski,skj->sij", slope_SK2, slope_SK2)
        pull_S2 = np.einsum("ski,sk->si", slope_SK2, gap_SK)
        weight_S2 = damping_S[:, None] * (np.einsum("sii->si", square_S22) + 1e-12)
        step_S2 = np.linalg.solve(square_S22 + weight_S2[:, :, None] * np.eye(2), pull_S2[:, :, None])[:, :, 0]
        tried_S2 = np.clip(best_S2 + step_S2, [0.0, LOWEST], [STEEPEST, HIGHEST])
        tried_SK, tried_slope_SK2 = _gaps(tried_S2, log_x_K, log_errors_SK)
        better_S = tried_SK.var(1) < least_S
        best_S2 = np.where(better_S[:, None], tried_S2, best_S2)
        gap_SK = np.where(better_S[:, None], tried_SK, gap_SK)
        slope_SK2 = np.where(better_S[:, None, None], tried_slope_SK2, slope_SK2)
        least_S = np.where(better_S, tried_SK.var(1), least_S)
        damping_S = np.clip(np.where(better_S, damping_S / 4, damping_S * 4), 1e-12, 1e12)
    return best_S2[:, 0], np.where(best_S2[:, 1] <= LOWEST + 0.1, 0.0, np.exp(best_S2[:, 1]))


def _gaps(at_S2: FloatArray, log_x_K: FloatArray, log_errors_SK: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(S, K) logarithms less the law's, and (S, K, 2) the law's slopes in b and log(c / a); means, that is a, taken
    out."""
    b_S1, ratio_S1 = at_S2[:, :1], at_S2[:, 1:]
    shape_SK = np.logaddexp(-b_S1 * log_x_K, ratio_S1)
    share_SK = np.exp(-b_S1 * log_x_K - shape_SK)  # of the part that falls
    slope_SK2 = np.stack([-log_x_K * share_SK, 1 - share_SK], axis=2)
    gap_SK = log_errors_SK - shape_SK
    return gap_SK - gap_SK.mean(1, keepdims=True), slope_SK2 - slope_SK2.mean(1, keepdims=True)


def _log(values: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore"):
        found: FloatArray = np.log(values)
    return found
