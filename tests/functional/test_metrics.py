"""Metrics against naive references that count pair by pair and threshold by threshold, with many ties."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visard.functional import metrics

# A few distinct values make ties within and between the classes; a score may be infinite.
tied_score = st.sampled_from([-math.inf, -1.0, -0.25, 0.0, 0.25, 0.5, 1.0, math.inf])
any_score = st.one_of(tied_score, st.floats(-1, 1))
some_scores = st.lists(any_score, min_size=1, max_size=30)


def naive_candidates(scores: np.ndarray) -> list[float]:
    """NaN accepts nothing; every distinct score accepts itself and all above it."""
    return [math.nan, *sorted(set(scores.tolist()), reverse=True)]


def naive_roc(genuine: np.ndarray, impostor: np.ndarray) -> list[tuple[float, float]]:
    both = np.concatenate([genuine, impostor])
    return [
        (sum(float(i >= t) for i in impostor) / len(impostor), sum(float(g >= t) for g in genuine) / len(genuine))
        for t in naive_candidates(both)
    ]


def naive_fold_accuracy(scores: np.ndarray, same: np.ndarray, fold: np.ndarray) -> list[float]:
    """Accuracy of every fold at the best threshold on the others, trying all; the highest of equals."""
    accuracies = []
    for k in np.unique(fold):
        others, judged = fold != k, fold == k
        distinct = sorted(set(scores[others].tolist()))
        middles = [(a + b) / 2 for a, b in pairwise(distinct)]
        candidates = [np.nextafter(distinct[-1], math.inf), *reversed(middles), -math.inf]
        best = max(
            candidates, key=lambda t: sum((s >= t) == y for s, y in zip(scores[others], same[others], strict=True))
        )
        accuracies.append(float(np.mean((scores[judged] >= best) == same[judged])))
    return accuracies


@given(some_scores, some_scores)
def test_roc_is_every_threshold_counted(genuine: list[float], impostor: list[float]) -> None:
    gen, imp = np.array(genuine), np.array(impostor)
    curve = metrics.roc(gen, imp)
    assert curve is not None
    assert list(zip(curve.far, curve.tar, strict=True)) == naive_roc(gen, imp)
    for threshold, far, tar in zip(curve.thresholds, curve.far, curve.tar, strict=True):
        assert np.mean(imp >= threshold) == far
        assert np.mean(gen >= threshold) == tar


@given(some_scores, some_scores, st.sampled_from([1.0, 0.5, 0.3, 0.29, 0.2, 0.1, 0.05, 0.01]))
def test_tar_at_far_is_the_best_point_that_does_not_exceed_the_target(
    genuine: list[float], impostor: list[float], far: float
) -> None:
    gen, imp = np.array(genuine), np.array(impostor)
    point = metrics.operating_points(gen, imp, [far])[0]
    if len(imp) < 1 / far - 1e-9:
        assert point is None
        assert metrics.tar_at_far(gen, imp, far) is None
        assert metrics.fnmr_at_fmr(gen, imp, far) is None
        return
    assert point is not None
    reachable = [tar for reached, tar in naive_roc(gen, imp) if reached <= far + 1e-12]
    assert point.tar == max(reachable)
    assert point.far <= far + 1e-12
    # The threshold it names does what it says.
    assert np.mean(gen >= point.threshold) == point.tar
    assert np.mean(imp >= point.threshold) == point.far
    assert metrics.tar_at_far(gen, imp, far) == point.tar
    assert metrics.fnmr_at_fmr(gen, imp, far) == 1 - point.tar


def test_the_nearest_point_would_exceed_the_target() -> None:
    # 10 impostors, target 0.19: the nearest point on the ROC is 0.2, but only one impostor may pass.
    impostor = np.arange(10) / 10
    point = metrics.operating_points([0.85, 0.95], impostor, [0.19])[0]
    assert point is not None
    assert (point.impostors_accepted, point.genuine_accepted) == (1, 2)
    assert 0.8 < point.threshold <= 0.85


def test_ties_at_the_threshold_are_all_rejected() -> None:
    # One of four may pass, but two tie at the top: neither does, nor the genuine pair that ties with them.
    point = metrics.operating_points([0.9, 0.95], [0.9, 0.9, 0.1, 0.0], [0.25])[0]
    assert point is not None
    assert (point.impostors_accepted, point.genuine_accepted) == (0, 1)


def test_far_with_too_few_impostors_is_undefined_and_with_just_enough_is_not() -> None:
    genuine = [0.5]
    assert metrics.tar_at_far(genuine, np.zeros(999), 1e-3) is None
    assert metrics.tar_at_far(genuine, np.zeros(1000), 1e-3) == 1.0


@pytest.mark.parametrize("far", [0.0, -0.1, 1.5])
def test_far_outside_its_range_is_refused(far: float) -> None:
    with pytest.raises(ValueError, match="FAR is"):
        metrics.tar_at_far([1.0], [0.0], far)


@given(some_scores, some_scores)
def test_auc_is_the_share_of_pairs_of_pairs_in_the_right_order(genuine: list[float], impostor: list[float]) -> None:
    wins = sum((g > i) + (g == i) / 2 for g in genuine for i in impostor)
    assert metrics.auc(genuine, impostor) == wins / (len(genuine) * len(impostor))


@given(some_scores, some_scores)
def test_auc_is_the_area_under_the_roc(genuine: list[float], impostor: list[float]) -> None:
    curve = metrics.roc(genuine, impostor)
    assert curve is not None
    assert metrics.auc(genuine, impostor) == pytest.approx(np.trapezoid(curve.tar, curve.far), abs=1e-12)


@given(some_scores, some_scores)
def test_eer_is_where_the_joined_roc_crosses(genuine: list[float], impostor: list[float]) -> None:
    points = naive_roc(np.array(genuine), np.array(impostor))
    crossings = []
    for (far_a, tar_a), (far_b, tar_b) in pairwise(points):
        gap_a, gap_b = (1 - tar_a) - far_a, (1 - tar_b) - far_b
        if gap_a > 0 >= gap_b:
            crossings.append(far_a + (far_b - far_a) * gap_a / (gap_a - gap_b))
    eer = metrics.equal_error_rate(genuine, impostor)
    assert len(crossings) == 1
    assert eer == pytest.approx(crossings[0], abs=1e-12)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=30), st.lists(st.floats(-1, 1), min_size=2, max_size=30))
def test_rates_do_not_change_with_a_monotone_scale(genuine: list[float], impostor: list[float]) -> None:
    gen, imp = np.round(genuine, 3), np.round(impostor, 3)
    assert metrics.auc(gen, imp) == metrics.auc(8 * gen, 8 * imp)
    assert metrics.equal_error_rate(gen, imp) == metrics.equal_error_rate(8 * gen, 8 * imp)
    # Exchanging the classes and the sign is the same question.
    assert metrics.auc(gen, imp) == metrics.auc(-imp, -gen)


def test_separated_constant_and_reversed_scores() -> None:
    assert metrics.auc([0.9, 0.8], [0.1, 0.2]) == 1.0
    assert metrics.equal_error_rate([0.9, 0.8], [0.1, 0.2]) == 0.0
    assert metrics.auc([0.5] * 3, [0.5] * 4) == 0.5
    assert metrics.equal_error_rate([0.5] * 3, [0.5] * 4) == 0.5
    assert metrics.auc([0.0], [1.0]) == 0.0
    assert metrics.equal_error_rate([0.0], [1.0]) == 1.0


def test_eer_between_two_scores_is_interpolated() -> None:
    # Thresholds 3, 2, 1, 0: (FAR, FNMR) = (0, 1/2), (1/2, 1/2) ...: they meet exactly at a point.
    assert metrics.equal_error_rate([3.0, 1.0], [2.0, 0.0]) == 0.5
    # (0, 1/3) then (1/2, 1/3): they meet at 1/3 on the line between.
    assert metrics.equal_error_rate([3.0, 3.0, 1.0], [2.0, 0.0]) == pytest.approx(1 / 3)


def test_an_empty_class_is_undefined() -> None:
    for genuine, impostor in (([], [0.1]), ([0.1], []), ([], [])):
        assert metrics.roc(genuine, impostor) is None
        assert metrics.auc(genuine, impostor) is None
        assert metrics.equal_error_rate(genuine, impostor) is None
        assert metrics.tar_at_far(genuine, impostor, 1.0) is None
    assert metrics.best_accuracy([], []) is None
    assert metrics.wilson_interval(0, 0) is None


def test_nan_and_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        metrics.auc([0.1, math.nan], [0.2])
    with pytest.raises(ValueError, match="one-dimensional"):
        metrics.auc(np.zeros((2, 2)), [0.2])


@given(st.lists(st.tuples(any_score, st.booleans()), min_size=1, max_size=30))
def test_best_accuracy_is_the_best_of_all_thresholds(pairs: list[tuple[float, bool]]) -> None:
    scores, same = np.array([s for s, _ in pairs]), np.array([y for _, y in pairs])
    found = metrics.best_accuracy(scores, same)
    assert found is not None
    assert found[0] == max(np.mean((scores >= t) == same) for t in naive_candidates(scores))


@given(
    st.lists(st.tuples(st.integers(-8, 8), st.booleans(), st.integers(0, 3)), min_size=2, max_size=40).filter(
        lambda pairs: len({fold for _, _, fold in pairs}) > 1
    )
)
def test_fold_accuracy_is_the_naive_one(pairs: list[tuple[int, bool, int]]) -> None:
    scores = np.array([s / 8 for s, _, _ in pairs])  # eighths: middles are exact and ties frequent
    same, fold = np.array([y for _, y, _ in pairs]), np.array([f for _, _, f in pairs])
    found = metrics.fold_accuracy(scores, same, fold)
    assert found.accuracies.tolist() == naive_fold_accuracy(scores, same, fold)
    assert found.mean == found.accuracies.mean()
    assert found.std == np.std(found.accuracies)


def test_the_judged_fold_has_no_say_in_its_threshold() -> None:
    scores, same = np.array([0.9, 0.1, 0.8, 0.2, 0.5, 0.3]), np.array([True, False] * 3)
    fold = np.array([0, 0, 1, 1, 2, 2])
    before = metrics.fold_accuracy(scores, same, fold).thresholds
    scores[4:] = [-1.0, 1.0]
    after = metrics.fold_accuracy(scores, same, fold).thresholds
    assert before[2] == after[2] == 0.5
    assert before[0] != after[0]


def test_the_usual_grid_is_the_fields_loop() -> None:
    """400 squared distances of unit vectors, d < threshold is accepted, the first of equally good ones is taken."""
    generator = np.random.default_rng(3)
    same = generator.random(600) < 0.5
    scores = np.clip(generator.normal(np.where(same, 0.45, 0.05), 0.15), -1, 1)
    fold = np.arange(600) % 10
    distances = 2 - 2 * scores
    expected = []
    for k in range(10):
        best, best_accuracy = 0.0, -1.0
        for threshold in np.arange(0, 4, 0.01):
            accuracy = np.mean((distances[fold != k] < threshold) == same[fold != k])
            if accuracy > best_accuracy:
                best, best_accuracy = threshold, accuracy
        expected.append(np.mean((distances[fold == k] < best) == same[fold == k]))
    found = metrics.fold_accuracy(scores, same, fold, grid=metrics.usual_grid())
    np.testing.assert_allclose(found.accuracies, expected, rtol=0, atol=1e-15)


def test_one_fold_is_refused() -> None:
    with pytest.raises(ValueError, match="two folds"):
        metrics.fold_accuracy([0.1, 0.2], [True, False], [4, 4])


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_are_the_rates_that_the_score_test_just_accepts(counts: tuple[int, int]) -> None:
    successes, trials = counts
    interval = metrics.wilson_interval(successes, trials)
    assert interval is not None
    low, high = interval
    assert 0 <= low <= successes / trials <= high <= 1
    for bound in {low, high} - {0.0, 1.0}:
        deviation = abs(successes / trials - bound) / math.sqrt(bound * (1 - bound) / trials)
        assert deviation == pytest.approx(metrics.Z_95, rel=1e-6)


def test_wilson_known_value_and_refusal() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263.
    assert metrics.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    with pytest.raises(ValueError, match="successes"):
        metrics.wilson_interval(3, 2)


@given(some_scores, some_scores)
def test_a_small_curve_is_thinned_without_moving_its_line(genuine: list[float], impostor: list[float]) -> None:
    curve = metrics.roc(genuine, impostor)
    assert curve is not None
    far, tar = metrics.thin_curve(curve, 500)
    kept = set(zip(far, tar, strict=True))
    assert kept <= set(zip(curve.far, curve.tar, strict=True))
    assert (far[0], tar[0], far[-1], tar[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(tar, far) == pytest.approx(np.trapezoid(curve.tar, curve.far), abs=1e-12)


def test_a_long_curve_keeps_to_its_budget_and_close_to_the_truth() -> None:
    generator = np.random.default_rng(0)
    curve = metrics.roc(generator.normal(1.5, 1, 20_000), generator.normal(0, 1, 20_000))
    assert curve is not None
    far, tar = metrics.thin_curve(curve, 500)
    assert 300 < len(far) <= 500
    at = np.geomspace(1e-4, 1, 200)
    exact = np.interp(at, curve.far, curve.tar)
    assert np.abs(np.interp(at, far, tar) - exact).max() < 0.01
    with pytest.raises(ValueError, match="at least 4"):
        metrics.thin_curve(curve, 3)


def test_the_paired_bootstrap_is_the_one_over_pairs() -> None:
    """Beside drawing the pairs themselves; only those on which both differ count."""
    rng = np.random.default_rng(3)
    right, other = rng.random(400) < 0.9, rng.random(400) < 0.86
    difference, (low, high) = metrics.paired_difference(right, other, seed=1)
    assert difference == pytest.approx(right.mean() - other.mean())
    rows = rng.integers(0, 400, (4000, 400))
    drawn = (right[rows].astype(float) - other[rows]).mean(axis=1)
    np.testing.assert_allclose((low, high), np.quantile(drawn, [0.025, 0.975]), atol=0.004)
    assert metrics.paired_difference(right, right) == (0.0, (0.0, 0.0))
    swapped = metrics.paired_difference(other, right, seed=1)
    assert swapped[0] == pytest.approx(-difference)
    assert metrics.paired_difference([True], [False]) == (1.0, (1.0, 1.0))
    for wrong in (([], []), ([True], [True, False])):
        with pytest.raises(ValueError, match="the same pairs are needed"):
            metrics.paired_difference(*wrong)


@given(st.integers(0, 10_000))
def test_decisions_give_the_fold_accuracy_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(4, 60))
    scores, same = np.round(rng.normal(size=count), 1), rng.random(count) < 0.5
    fold = np.concatenate([[7, 9], rng.choice([7, 9, 4], count - 2)])
    folds = metrics.fold_accuracy(scores, same, fold)
    right = folds.right(scores, same, fold)
    for row, name in enumerate(np.unique(fold)):
        assert right[fold == name].mean() == pytest.approx(folds.accuracies[row])
