"""Pair protocol: embeddings with known angles, draws against their promises, and what is said of missing images."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visard.errors import UserError
from visard.functional import metrics
from visard.protocols.pairs import Pairs, draw_pairs, evaluate_pairs, far_name, pair_scores
from visard.records import Embeddings, Result


def at_angles(degrees: list[float], lengths: float = 1.0) -> Embeddings:
    radians = np.deg2rad(degrees)
    vectors = lengths * np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)
    ids = tuple(f"{angle}" for angle in degrees)
    return Embeddings(vectors, ids, np.zeros(len(degrees), np.int64), {})


def make_pairs(rows: list[tuple[int, int, bool, int]]) -> Pairs:
    left, right, same, fold = zip(*rows, strict=True)
    return Pairs(np.array(left), np.array(right), np.array(same), np.array(fold))


def crowd(identities: int = 40, images: int = 6, dim: int = 32, noise: float = 1.0, seed: int = 0) -> Embeddings:
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(identities), images)
    vectors = generator.normal(size=(identities, dim))[labels] + noise * generator.normal(size=(len(labels), dim))
    ids = tuple(f"p{label:03d}/{row}.jpg" for row, label in enumerate(labels))
    return Embeddings(vectors.astype(np.float32), ids, labels, {})


def test_scores_are_cosines_whatever_the_lengths() -> None:
    pairs = make_pairs([(0, 1, True, 0), (0, 2, False, 0), (0, 3, False, 1), (2, 2, True, 1)])
    for length in (1e-3, 1.0, 1e3):
        scores = pair_scores(at_angles([0, 60, 90, 180], length), pairs)
        np.testing.assert_allclose(scores, [0.5, 0.0, -1.0, 1.0], atol=1e-6)


def test_scores_in_float32_are_near_the_float64_truth() -> None:
    embeddings = crowd(dim=512)
    pairs = draw_pairs(embeddings.labels, embeddings.ids, count=500)
    unit = embeddings.vectors.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    truth = (unit[pairs.left] * unit[pairs.right]).sum(axis=1)
    assert np.abs(pair_scores(embeddings, pairs) - truth).max() < 1e-6


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_vector_without_direction_is_named(bad: float) -> None:
    embeddings = at_angles([0, 10, 20, 30])
    embeddings.vectors[2] = bad
    used = make_pairs([(0, 1, True, 0), (2, 3, False, 1)])
    with pytest.raises(UserError, match=r"1 vectors are zero or not finite \(first: 20\)"):
        pair_scores(embeddings, used)
    assert pair_scores(embeddings, make_pairs([(0, 1, True, 0), (1, 3, False, 1)])).shape == (2,)


def test_the_result_is_that_of_the_metrics_on_the_cosines() -> None:
    embeddings = crowd(noise=1.4)
    pairs = draw_pairs(embeddings.labels, embeddings.ids, count=400, seed=5)
    result = evaluate_pairs(embeddings, pairs, fars=(1e-1, 1e-2, 1e-3))
    scores = pair_scores(embeddings, pairs)
    genuine, impostor = scores[pairs.same], scores[~pairs.same]
    folds = metrics.fold_accuracy(scores, pairs.same, pairs.fold)
    assert result.metrics["accuracy"] == folds.mean
    assert 0.7 < folds.mean < 1
    assert result.metrics["accuracy_std"] == folds.std
    assert result.metrics["auc"] == metrics.auc(genuine, impostor)
    assert result.metrics["eer"] == metrics.equal_error_rate(genuine, impostor)
    assert result.metrics["tar@far=1e-2"] == metrics.tar_at_far(genuine, impostor, 1e-2)
    assert result.metrics["tar@far=1e-3"] is None  # 400 impostors
    assert "tar@far=1e-3" not in result.intervals
    assert result.intervals["tar@far=1e-2"][0] < result.metrics["tar@far=1e-2"] < result.intervals["tar@far=1e-2"][1]
    assert result.intervals["reached@far=1e-2"][0] < 1e-2 < result.intervals["reached@far=1e-2"][1]
    assert result.counts == {"images": 240, "pairs": 800, "genuine": 400, "impostor": 400, "pairs_missing": 0}
    assert sum(result.curves["genuine_scores"]["y"]) == sum(result.curves["impostor_scores"]["y"]) == 400
    assert len(result.curves["roc"]["x"]) <= 500
    assert result.settings["folds"] == 10


def test_the_result_survives_json() -> None:
    embeddings = crowd()
    result = evaluate_pairs(embeddings, draw_pairs(embeddings.labels, embeddings.ids, count=100))
    text = result.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = Result.from_json(text)
    assert again.metrics == result.metrics
    assert again.to_json() == text


def test_the_hardest_pairs_are_the_extremes() -> None:
    embeddings = at_angles([0, 10, 50, 90, 95])
    pairs = make_pairs([(0, 1, True, 0), (0, 2, True, 1), (0, 3, False, 0), (2, 3, False, 1), (0, 4, False, 1)])
    result = evaluate_pairs(embeddings, pairs, examples=2)
    genuine, impostor = result.examples["hardest_genuine"], result.examples["hardest_impostor"]
    assert [(e["left"], e["right"]) for e in genuine] == [("0", "50"), ("0", "10")]
    assert [(e["left"], e["right"]) for e in impostor] == [("50", "90"), ("0", "90")]
    assert genuine[0]["score"] == pytest.approx(math.cos(math.radians(50)), abs=1e-6)


def test_missing_images_are_an_error_left_out_or_counted_wrong() -> None:
    embeddings = at_angles([0, 1, 90, 91])
    rows = [(0, 1, True, 0), (0, 2, False, 0), (2, 3, True, 1), (1, 3, False, 1), (0, -1, True, 0), (-1, 3, False, 1)]
    pairs = make_pairs(rows)
    with pytest.raises(UserError, match="2 of 6"):
        evaluate_pairs(embeddings, pairs)
    skipped = evaluate_pairs(embeddings, pairs, missing="skip")
    assert skipped.metrics["accuracy"] == 1.0
    assert (skipped.counts["pairs"], skipped.counts["pairs_missing"]) == (4, 2)
    wrong = evaluate_pairs(embeddings, pairs, missing="wrong")
    assert wrong.metrics["accuracy"] == pytest.approx(2 / 3)
    assert (wrong.counts["pairs"], wrong.counts["pairs_missing"]) == (6, 2)
    # 2 of 3 genuine pairs can be accepted, 1 of 3 impostors always is.
    assert wrong.metrics["tar@far=1e-1"] is None
    half = evaluate_pairs(embeddings, pairs, missing="wrong", fars=(0.5,))
    assert half.metrics["tar@far=5e-1"] == pytest.approx(2 / 3)
    json.loads(wrong.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_one_fold_cannot_be_judged() -> None:
    embeddings = at_angles([0, 1, 90, 91])
    with pytest.raises(UserError, match="one fold"):
        evaluate_pairs(embeddings, make_pairs([(0, 1, True, 7), (1, 2, False, 7)]))
    with pytest.raises(UserError, match="of none of them both images"):
        evaluate_pairs(embeddings, make_pairs([(0, -1, True, 0), (-1, 2, False, 1)]), missing="skip")


@pytest.mark.parametrize("kind", [True, False])
@pytest.mark.parametrize("folds", [1, 2])
def test_with_one_kind_of_pair_every_rate_is_undefined(kind: bool, folds: int) -> None:
    """As in a .bin set without impostors: no crash, no accuracy of 100 %, the scores all the same."""
    embeddings = at_angles([0, 1, 90, 91])
    both = [(0, 1, True, 0), (2, 3, True, 1), (0, 2, False, 0), (1, 3, False, 1)]
    usual = evaluate_pairs(embeddings, make_pairs(both))
    pairs = make_pairs([(a, b, kind, f % folds) for a, b, same, f in both if same == kind])
    result = evaluate_pairs(embeddings, pairs)
    assert result.metrics.keys() == usual.metrics.keys()
    assert set(result.metrics.values()) == {None}
    assert result.intervals == {}
    assert result.counts["pairs"] == 2
    heights = {name: sum(curve["y"]) for name, curve in result.curves.items()}
    assert heights == {"genuine_scores": 2 * kind, "impostor_scores": 2 * (not kind)}
    assert len(result.examples["hardest_genuine"]) == 2 * kind
    assert Result.from_json(result.to_json()) == result


def test_a_threshold_that_accepts_everything_is_written_as_none() -> None:
    embeddings = at_angles([0, 1, 90, 91, 45])
    upside_down = make_pairs([(0, 2, True, 0), (0, 1, False, 0), (1, 3, True, 1), (1, 3, True, 0), (2, 4, True, 1)])
    result = evaluate_pairs(embeddings, upside_down, fars=(1.0,))
    assert result.metrics["tar@far=1e0"] == 1.0
    assert result.metrics["threshold@far=1e0"] is None
    json.loads(result.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_far_names() -> None:
    assert [far_name(f) for f in (0.1, 1e-6, 0.05)] == ["tar@far=1e-1", "tar@far=1e-6", "tar@far=5e-2"]


@given(
    st.lists(st.integers(1, 6), min_size=4, max_size=25).filter(lambda sizes: max(sizes) > 1),
    st.integers(1, 60),
    st.integers(2, 10),
    st.integers(0, 3),
)
def test_drawn_pairs_keep_their_promises(sizes: list[int], count: int, folds: int, seed: int) -> None:
    labels = np.concatenate([np.repeat(np.arange(len(sizes)), sizes), [-1, -1]])
    ids = [f"{row:04d}" for row in range(len(labels))]
    pairs = draw_pairs(labels, ids, count, folds, seed)
    assert (pairs.left != pairs.right).all()
    assert len({frozenset(pair) for pair in zip(pairs.left.tolist(), pairs.right.tolist(), strict=True)}) == len(pairs)
    assert ((labels[pairs.left] == labels[pairs.right]) == pairs.same).all()
    assert min(labels[pairs.left].min(), labels[pairs.right].min()) >= 0
    people = [
        set(labels[pairs.left[pairs.fold == k]]) | set(labels[pairs.right[pairs.fold == k]]) for k in range(folds)
    ]
    assert sum(map(len, people)) == len(set().union(*people)), "an identity is in two folds"
    assert 1 <= pairs.same.sum() <= count
    assert 1 <= (~pairs.same).sum() <= count


def test_a_small_draw_takes_every_pair_there_is() -> None:
    labels = np.repeat(np.arange(4), 3)
    pairs = draw_pairs(labels, [str(row) for row in range(12)], count=10_000, folds=2)
    assert pairs.same.sum() == 4 * 3
    assert (~pairs.same).sum() == 2 * 3 * 3  # in each of two folds, two identities of three images


def test_a_large_draw_is_exact_in_number_and_spread_over_identities() -> None:
    labels = np.repeat(np.arange(100), 20)
    pairs = draw_pairs(labels, [f"{row:05d}" for row in range(2000)], count=3000, folds=10)
    assert pairs.same.sum() == (~pairs.same).sum() == 3000
    assert (np.bincount(pairs.fold[pairs.same]) == 300).all()
    assert (np.bincount(labels[pairs.left[pairs.same]]) == 30).all()


def test_the_draw_depends_on_seed_and_ids_not_on_row_order_or_label_numbers() -> None:
    labels = np.repeat(np.arange(30), 5)
    ids = np.array([f"{row:03d}" for row in range(150)])

    def drawn(labels: np.ndarray, ids: np.ndarray, seed: int) -> list[tuple[str, str, bool, int]]:
        pairs = draw_pairs(labels, ids.tolist(), 200, 5, seed)
        return list(zip(ids[pairs.left], ids[pairs.right], pairs.same.tolist(), pairs.fold.tolist(), strict=True))

    shuffled = np.random.default_rng(1).permutation(150)
    renamed = np.random.default_rng(2).permutation(30) + 7
    first = drawn(labels, ids, 0)
    assert drawn(labels[shuffled], ids[shuffled], 0) == first
    assert drawn(renamed[labels], ids, 0) == first
    assert drawn(labels, ids, 1) != first


def test_too_few_identities_or_images_are_refused() -> None:
    with pytest.raises(UserError, match="3 identities"):
        draw_pairs([0, 0, 1, 1, 2, 2], list("abcdef"))
    with pytest.raises(UserError, match="no identity has two images"):
        draw_pairs([0, 1, 2, 3], list("abcd"))
    with pytest.raises(UserError, match="at least 1 pair and 2 folds"):
        draw_pairs([0, 0, 1, 1, 2, 2, 3, 3], list("abcdefgh"), folds=1)
