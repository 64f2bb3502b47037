"""Verification metrics from scores: ROC, TAR at FAR, FNMR at FMR, EER, AUC, fold accuracy, confidence intervals.

In: one similarity a pair, higher = more alike, for genuine pairs (same identity) and impostor pairs (two identities).
Out: rates in 0..1, or None where the data cannot answer ("undefined"): a class is empty, or there are fewer impostors
    than 1/FAR.
A pair is accepted when score >= threshold. Tied scores are accepted or rejected together, so every rate is one that a
threshold can really reach. Everything sorts once, in float64: O(n log n). Infinite scores are allowed, NaN is a
ValueError.

Letters: G genuine scores, I impostor scores, N = G + I, T distinct thresholds, K folds. FAR = FMR and TAR = 1 - FNMR
    here:
failures to find a face are the caller's to count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64Array = NDArray[np.float64]

Z_95 = 1.959963984540054
"""Standard normal quantile of a two-sided 95 % interval."""


@dataclass(frozen=True)
class Roc:
    """All operating points that a threshold can reach, from "accept nothing" to "accept everything".

    Args:
        thresholds: (T + 1,) float64, descending; the first accepts nothing, the others are the distinct scores.
        far: (T + 1,) float64, ascending 0..1, impostors accepted.
        tar: (T + 1,) float64, ascending 0..1, genuine pairs accepted.
    """

    thresholds: Float64Array
    far: Float64Array
    tar: Float64Array


@dataclass(frozen=True)
class OperatingPoint:
    """What one threshold does.

    Args:
        threshold: accept when score >= threshold; NaN accepts nothing (only where an impostor scores +infinity).
        genuine_accepted: of `genuine`.
        impostors_accepted: of `impostors`.
    """

    threshold: float
    genuine_accepted: int
    genuine: int
    impostors_accepted: int
    impostors: int

    @property
    def tar(self) -> float:
        """True accept rate = 1 - FNMR."""
        return self.genuine_accepted / self.genuine

    @property
    def far(self) -> float:
        """False accept rate = FMR, at most the target."""
        return self.impostors_accepted / self.impostors


@dataclass(frozen=True)
class FoldAccuracy:
    """Accuracy on each fold at the threshold that was best on all the others.

    Args:
        accuracies: (K,) float64.
        thresholds: (K,) float64.
    """

    accuracies: Float64Array
    thresholds: Float64Array

    def right(self, scores: ArrayLike, same: ArrayLike, fold: ArrayLike) -> NDArray[np.bool_]:
        """(N,) whether each of the pairs that this was made from is decided rightly at its fold's threshold."""
        _, row_N = np.unique(np.asarray(fold), return_inverse=True)
        return np.asarray((_scores(scores) >= self.thresholds[row_N]) == np.asarray(same, dtype=bool))

    @property
    def mean(self) -> float:
        return float(self.accuracies.mean())

    @property
    def std(self) -> float:
        """Over the folds, dividing by K as the field does (not by K - 1)."""
        return float(self.accuracies.std())


def roc(genuine: ArrayLike, impostor: ArrayLike) -> Roc | None:
    """The exact ROC: a point for every distinct score, none interpolated.

    Equals, for every distinct score t of either class, (mean(impostor >= t), mean(genuine >= t)); sorting once
    instead of counting for every t turns O(N T) into O(N log N).

    Args:
        genuine: (G,) scores.
        impostor: (I,) scores.
    """
    gen_G, imp_I = _sorted(genuine), _sorted(impostor)
    if not len(gen_G) or not len(imp_I):
        return None
    both_N = np.sort(np.concatenate([gen_G, imp_I]), kind="stable")  # two sorted runs: merged in O(N)
    distinct_T = both_N[np.concatenate([[True], both_N[1:] != both_N[:-1]])][::-1]
    accepted_gen = len(gen_G) - np.searchsorted(gen_G, distinct_T, side="left")
    accepted_imp = len(imp_I) - np.searchsorted(imp_I, distinct_T, side="left")
    return Roc(
        thresholds=np.concatenate([[_above(distinct_T[0])], distinct_T]),
        far=np.concatenate([[0.0], accepted_imp / len(imp_I)]),
        tar=np.concatenate([[0.0], accepted_gen / len(gen_G)]),
    )


def operating_points(genuine: ArrayLike, impostor: ArrayLike, fars: Sequence[float]) -> list[OperatingPoint | None]:
    """The highest TAR that a threshold reaches at each FAR without exceeding it; None = undefined.

    Of `I` impostors at most k = floor(FAR x I) may be accepted, so the threshold lies above impostor number k + 1
    (and above all that tie with it), midway to the next higher score of either class. With k = 0 the data cannot tell
    FAR from 0: undefined.

    Args:
        genuine: (G,) scores.
        impostor: (I,) scores.
        fars: targets in (0, 1].
    """
    gen_G, imp_I = _sorted(genuine), _sorted(impostor)
    return [_operating_point(gen_G, imp_I, far) for far in fars]


def tar_at_far(genuine: ArrayLike, impostor: ArrayLike, far: float) -> float | None:
    """Share of genuine pairs accepted where at most `far` of the impostors are; None: fewer impostors than 1 / far."""
    point = operating_points(genuine, impostor, [far])[0]
    return None if point is None else point.tar


def fnmr_at_fmr(genuine: ArrayLike, impostor: ArrayLike, fmr: float) -> float | None:
    """Share of genuine pairs rejected where at most `fmr` of the impostors match; None: fewer than 1 / fmr."""
    point = operating_points(genuine, impostor, [fmr])[0]
    return None if point is None else 1.0 - point.tar


def equal_error_rate(genuine: ArrayLike, impostor: ArrayLike) -> float | None:
    """The rate at which FAR = FNMR.

    The two rarely meet at a score, so the ROC is joined by straight lines between neighbouring points (which a
    decision by lot between the two thresholds reaches) and the crossing with FAR = FNMR is taken. Constant scores
    give 0.5.
    """
    curve = roc(genuine, impostor)
    return None if curve is None else equal_error_rate_of(curve)


def equal_error_rate_of(curve: Roc) -> float:
    """`equal_error_rate` of a ROC that is there already."""
    fnmr = 1.0 - curve.tar
    after = int(np.argmax(curve.far >= fnmr))  # exists: the last point is FAR 1, FNMR 0; never the first: FAR 0, FNMR 1
    before = after - 1
    gap_before = fnmr[before] - curve.far[before]
    gap_after = curve.far[after] - fnmr[after]
    share = gap_before / (gap_before + gap_after)
    return float(curve.far[before] + share * (curve.far[after] - curve.far[before]))


def auc(genuine: ArrayLike, impostor: ArrayLike) -> float | None:
    """Probability that a genuine pair scores above an impostor pair, ties counted half (Mann-Whitney U / (G I)).

    Equals (mean over all G x I of [g > i] + [g == i] / 2) and the area under the ROC; counted in integers, so exact
    before the one division.
    """
    gen_G, imp_I = _sorted(genuine), _sorted(impostor)
    if not len(gen_G) or not len(imp_I):
        return None
    below = np.searchsorted(imp_I, gen_G, side="left").sum(dtype=np.int64)
    not_above = np.searchsorted(imp_I, gen_G, side="right").sum(dtype=np.int64)
    return (int(below) + int(not_above)) / (2 * len(gen_G) * len(imp_I))


def best_accuracy(scores: ArrayLike, same: ArrayLike) -> tuple[float, float] | None:
    """Highest accuracy of any threshold on these very pairs, and that threshold; None without pairs.

    An upper bound, not a result: a result chooses the threshold on other pairs (`fold_accuracy`).
    """
    score_N, same_N = _scores(scores), np.asarray(same, dtype=bool)
    if not len(score_N):
        return None
    order = np.argsort(score_N, kind="stable")
    threshold = _best_threshold(score_N[order], same_N[order])
    return float(np.mean((score_N >= threshold) == same_N)), threshold


def fold_accuracy(scores: ArrayLike, same: ArrayLike, fold: ArrayLike, grid: ArrayLike | None = None) -> FoldAccuracy:
    """Accuracy in the LFW manner: each fold is judged at the threshold that maximises accuracy on all the other folds.

    Equals, fold by fold, trying every threshold on the other folds' pairs; one sort serves all folds. Without `grid`
    every threshold that makes a difference is tried, midway between neighbouring scores of the other folds (the judged
    fold has no say); of equally good ones the highest is taken. The field tries a grid of squared distances 0, 0.01 ...
    3.99 between normalised embeddings instead; `usual_grid()` gives it, to compare with published numbers. On LFW's
    6,000 pairs the two differed by two pairs in all (YuNet crops) and by none (MTCNN crops).

    Args:
        scores: (N,) similarities.
        same: (N,) bool, genuine or not.
        fold: (N,) int, any numbering; at least two folds.
        grid: (T,) the only thresholds tried; None = all that matter.

    Source: Huang et al., Labeled Faces in the Wild, UMass TR 07-49, section IV.
    """
    score_N, same_N, fold_N = _scores(scores), np.asarray(same, dtype=bool), np.asarray(fold)
    names_K, fold_N = np.unique(fold_N, return_inverse=True)
    if len(names_K) < 2:
        raise ValueError(f"fold accuracy needs at least two folds, got {len(names_K)}")
    order = np.argsort(score_N, kind="stable")
    score_N, same_N, fold_N = score_N[order], same_N[order], fold_N[order]
    grid_T = None if grid is None else np.sort(_scores(grid))
    accuracies_K, thresholds_K = np.empty(len(names_K)), np.empty(len(names_K))
    for k in range(len(names_K)):
        judged = fold_N == k
        others = ~judged
        if grid_T is None:
            threshold = _best_threshold(score_N[others], same_N[others])
        else:
            threshold = _best_of_grid(score_N[others], same_N[others], grid_T)
        thresholds_K[k] = threshold
        accuracies_K[k] = np.mean((score_N[judged] >= threshold) == same_N[judged])
    return FoldAccuracy(accuracies=accuracies_K, thresholds=thresholds_K)


def usual_grid() -> Float64Array:
    """(400,) cosines 1 - d / 2 of the field's grid: squared distances d = 0, 0.01 ... 3.99 between unit vectors."""
    return np.asarray(1.0 - np.arange(400) * 0.01 / 2.0, dtype=np.float64)


def wilson_interval(successes: int, trials: int, z: float = Z_95) -> tuple[float, float] | None:
    """Confidence interval of a rate from independent trials at a fixed threshold; None without trials.

    Never leaves 0..1 and stays honest at 0 and at all successes. It knows nothing of the threshold's own uncertainty
    nor of pairs that share an identity, which make the truth wider.

    Source: Wilson, JASA 22 (1927), p. 209.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials")
    if trials == 0:
        return None
    rate = successes / trials
    scale = 1.0 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


def thin_curve(curve: Roc, points: int = 500) -> tuple[Float64Array, Float64Array]:
    """FAR and TAR of at most `points` operating points, fit for a linear and for a logarithmic FAR axis.

    Points in the middle of a horizontal or vertical run are dropped first: the drawn line does not change. If the
    corners alone are too many, those nearest to evenly spaced TAR and to evenly spaced log FAR are kept, with both
    ends.
    """
    if points < 4:
        raise ValueError(f"a curve needs at least 4 points, got {points}")
    far, tar = curve.far, curve.tar
    flat = (far[1:-1] == far[:-2]) & (far[1:-1] == far[2:]) | (tar[1:-1] == tar[:-2]) & (tar[1:-1] == tar[2:])
    keep = np.flatnonzero(np.concatenate([[True], ~flat, [True]]))
    if len(keep) > points:
        far, tar = far[keep], tar[keep]
        half = (points - 2) // 2
        first_far = far[np.argmax(far > 0)]
        by_far = np.searchsorted(far, np.geomspace(first_far, 1.0, half), side="right") - 1
        by_tar = np.searchsorted(tar, np.linspace(0.0, 1.0, half), side="left")
        chosen = np.unique(np.concatenate([[0, len(keep) - 1], by_far, by_tar]))
        keep = keep[chosen]
    return curve.far[keep], curve.tar[keep]


def _scores(values: ArrayLike) -> Float64Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"scores must be one-dimensional, got shape {array.shape}")
    if np.isnan(array).any():
        raise ValueError("a score is NaN; the embeddings hold a zero or non-finite vector")
    return array


def _sorted(values: ArrayLike) -> Float64Array:
    return np.sort(_scores(values))


def _operating_point(gen_G: Float64Array, imp_I: Float64Array, far: float) -> OperatingPoint | None:
    if not 0 < far <= 1:
        raise ValueError(f"FAR is {far}; it must be above 0 and at most 1")
    count = len(imp_I)
    allowed = min(count, math.floor(far * count * (1 + 1e-12)))  # 0.29 * 100 is 28.999999999999996
    if allowed == 0 or not len(gen_G):
        return None
    if allowed == count:
        return OperatingPoint(-math.inf, len(gen_G), len(gen_G), count, count)
    barred = imp_I[count - allowed - 1]
    first_gen = int(np.searchsorted(gen_G, barred, side="right"))
    first_imp = int(np.searchsorted(imp_I, barred, side="right"))
    higher = [scores[first] for scores, first in ((gen_G, first_gen), (imp_I, first_imp)) if first < len(scores)]
    threshold = _between(float(barred), float(min(higher))) if higher else _above(float(barred))
    return OperatingPoint(threshold, len(gen_G) - first_gen, len(gen_G), count - first_imp, count)


def _best_threshold(score_N: Float64Array, same_N: NDArray[np.bool_]) -> float:
    """Of ascending scores. Cutting before position p accepts p..N-1; correct = impostors below + genuine from p on."""
    if not len(score_N):
        raise ValueError("no pairs to choose a threshold on")
    correct = np.empty(len(score_N) + 1, dtype=np.int64)
    correct[0] = same_N.sum()
    np.cumsum(np.where(same_N, -1, 1), out=correct[1:])
    correct[1:] += correct[0]
    possible = np.ones(len(correct), dtype=bool)
    possible[1:-1] = score_N[1:] != score_N[:-1]  # a cut between ties is no threshold
    correct[~possible] = -1
    cut = len(correct) - 1 - int(np.argmax(correct[::-1]))
    if cut == 0:
        return -math.inf
    if cut == len(score_N):
        return _above(float(score_N[-1]))
    return _between(float(score_N[cut - 1]), float(score_N[cut]))


def _best_of_grid(score_N: Float64Array, same_N: NDArray[np.bool_], grid_T: Float64Array) -> float:
    genuine, impostor = score_N[same_N], score_N[~same_N]
    rejected = np.searchsorted(impostor, grid_T, side="left")
    accepted = len(genuine) - np.searchsorted(genuine, grid_T, side="left")
    correct_T = rejected + accepted
    return float(grid_T[len(grid_T) - 1 - int(np.argmax(correct_T[::-1]))])


def _between(lower: float, upper: float) -> float:
    """A threshold above `lower` that still accepts `upper`: the middle, or `upper` itself where there is no middle."""
    middle = lower + (upper - lower) / 2
    return middle if lower < middle <= upper else upper


def _above(highest: float) -> float:
    """A threshold that accepts nothing: the next number, or NaN (no comparison with it holds) above infinity."""
    return math.nan if highest == math.inf else float(np.nextafter(highest, math.inf))


def paired_difference(
    right: ArrayLike, other_right: ArrayLike, samples: int = 10_000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """How much more often one system decides rightly than another on the same pairs, with its 95 % interval.

    The percentile bootstrap over pairs: only the pairs on which the two disagree tell, so a sample is a draw of how
    many of each kind of disagreement there are, which is the same as drawing pairs with replacement. Pairs that share
    a person are taken as independent, so the truth is wider.

    Args:
        right: (N,) bool, N >= 1; whether the decision was right.
        other_right: (N,) bool, of the other system.
        samples: bootstrap samples.
        seed: of the draw.

    Returns:
        The difference of both accuracies, in -1 ... 1, and the ends of its interval.

    Source: Efron, Bootstrap Methods: Another Look at the Jackknife, Annals of Statistics 7, 1979.
    """
    right_N, other_N = np.asarray(right, dtype=bool), np.asarray(other_right, dtype=bool)
    if right_N.shape != other_N.shape or right_N.ndim != 1 or not len(right_N):
        raise ValueError(f"decisions of shapes {right_N.shape} and {other_N.shape}; the same pairs are needed")
    gained, lost = int((right_N & ~other_N).sum()), int((other_N & ~right_N).sum())
    count = len(right_N)
    shares = np.array([gained, lost, count - gained - lost]) / count
    drawn = np.random.default_rng(seed).multinomial(count, shares, size=samples)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / count, [0.025, 0.975])
    return (gained - lost) / count, (float(low), float(high))
