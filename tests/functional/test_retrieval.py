"""Ranks in blocks against a plain float64 reference that sorts the whole score matrix; ties, duplicates, no answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from visard.functional import retrieval
from visard.functional.retrieval import TIE, Retrieved, recall_at, retrieve, unit

Float64Array = NDArray[np.float64]


def reference(
    queries: Float64Array,
    gallery: Float64Array,
    query_labels: NDArray[np.int64],
    gallery_labels: NDArray[np.int64],
    itself: NDArray[np.int64] | None,
    tie: float,
) -> tuple[list[int], list[float], list[float]]:
    """First rank (0 = none), R-precision and average precision at R of each query, by sorting; NaN where R is 0."""
    cosines = (queries / np.linalg.norm(queries, axis=1)[:, None]) @ (
        gallery / np.linalg.norm(gallery, axis=1)[:, None]
    ).T
    first, precision, average = [], [], []
    for q in range(len(queries)):
        columns = [g for g in range(len(gallery)) if itself is None or itself[q] != g]
        right = [gallery_labels[g] == query_labels[q] and query_labels[q] >= 0 for g in columns]
        # a right answer is worth TIE less, and comes after a wrong one of the same worth
        worth = [(-(cosines[q, g] - (tie if r else 0.0)), r) for g, r in zip(columns, right, strict=True)]
        ranked = [r for _, r in sorted(worth)]
        total = sum(right)
        first.append(ranked.index(True) + 1 if total else 0)
        hits = [k for k in range(total) if ranked[k]]
        precision.append(len(hits) / total if total else np.nan)
        average.append(sum(sum(ranked[: k + 1]) / (k + 1) for k in hits) / total if total else np.nan)
    return first, precision, average


@st.composite
def problems(draw: st.DrawFn) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Vectors of small whole numbers, so that exact ties and duplicates are common and no two cosines nearly tie."""
    queries, gallery, size = (draw(st.integers(1, high)) for high in (9, 14, 4))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32)))
    span = draw(st.sampled_from([1, 2, 5]))

    def vectors(count: int) -> NDArray[np.float32]:
        found = numbers.integers(-span, span + 1, (count, size)).astype(np.float32)
        found[(found == 0).all(1), 0] = 1
        return found

    labels = draw(st.integers(0, 5))
    return (
        vectors(queries),
        vectors(gallery),
        numbers.integers(-1, labels + 1, queries),
        numbers.integers(-1, labels + 1, gallery),
    )


def assert_equal(found: Retrieved, expected: tuple[list[int], list[float], list[float]]) -> None:
    assert found.first.tolist() == expected[0]
    np.testing.assert_allclose(found.r_precision, expected[1], rtol=1e-12)
    np.testing.assert_allclose(found.average_precision, expected[2], rtol=1e-12)


@given(problems(), st.booleans(), st.integers(1, 40))
def test_equals_sorting_the_whole_matrix(problem, in_gallery: bool, block: int) -> None:  # type: ignore[no-untyped-def]
    queries, gallery, query_labels, gallery_labels = problem
    itself = None
    if in_gallery:  # some queries are in the gallery themselves
        itself = np.full(len(queries), -1)
        for q in range(0, min(len(queries), len(gallery)), 2):
            gallery[q], gallery_labels[q], itself[q] = queries[q], query_labels[q], q
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "BLOCK_SCORES", block)
        found = retrieve(queries, gallery, query_labels, gallery_labels, itself)
    wide = queries.astype(np.float64), gallery.astype(np.float64)
    # Distinct cosines of these vectors differ by far more than TIE: half of it counts the same ties.
    assert_equal(found, reference(*wide, query_labels, gallery_labels, itself, TIE / 2))


@given(st.integers(0, 2**32), st.integers(2, 60), st.integers(2, 40))
def test_leave_one_out_of_random_vectors(seed: int, count: int, size: int) -> None:
    """Cosines of float32 may put two images in the other order only where they differ by less than TIE."""
    numbers = np.random.default_rng(seed)
    vectors = numbers.standard_normal((count, size)).astype(np.float32)
    labels = numbers.integers(0, max(2, count // 4), count)
    itself = np.arange(count)
    found = retrieve(vectors, vectors, labels, labels, itself)
    wide = vectors.astype(np.float64)
    kind, strict = (reference(wide, wide, labels, labels, itself, tie) for tie in (0.0, 2 * TIE))
    assert all(a <= b <= c for a, b, c in zip(kind[0], found.first.tolist(), strict[0], strict=True))
    for values, best, worst in zip((found.r_precision, found.average_precision), kind[1:], strict[1:], strict=True):
        there = ~np.isnan(values)
        assert (values[there] <= np.array(best)[there] + 1e-12).all()
        assert (values[there] >= np.array(worst)[there] - 1e-12).all()


@given(st.integers(0, 2**32), st.integers(1, 300))
def test_neither_the_order_of_rows_nor_of_sums_matters(seed: int, block: int) -> None:
    """Every vector is there three times: what a product adds up first differs with its place, and the ranks do not."""
    numbers = np.random.default_rng(seed)
    vectors = np.repeat(numbers.standard_normal((7, 96)).astype(np.float32), 3, axis=0)
    labels = np.tile([0, 0, 1], 7)
    order = numbers.permutation(21)
    found = retrieve(vectors, vectors, labels, labels, np.arange(21))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "BLOCK_SCORES", block)
        mixed = retrieve(vectors[order], vectors[order], labels[order], labels[order], np.arange(21))
    for name in ("relevant", "first", "r_precision", "average_precision"):
        assert (getattr(found, name)[order] == getattr(mixed, name)).all(), name


def test_a_tie_does_not_favour_the_answer() -> None:
    """A network that gives the same vector to everything finds nothing."""
    same = np.ones((6, 3), np.float32)
    labels = np.array([0, 0, 0, 1, 1, 1])
    found = retrieve(same, same, labels, labels, np.arange(6))
    assert found.first.tolist() == [4] * 6
    assert (found.average_precision == 0).all()
    assert recall_at(found, 3) == 0
    assert recall_at(found, 4) == 6


def test_by_hand() -> None:
    """Angles 0 (query), 10 wrong, 20 right, 30 right, 40 wrong, 50 right degrees: R = 3, right at 2 and 3 of 3."""
    angle = np.radians([10, 20, 30, 40, 50])
    gallery = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32) * np.array(
        [[3], [0.1], [1], [9], [2]]
    )
    labels = np.array([8, 7, 7, 8, 7])
    found = retrieve(np.array([[5.0, 0.0]], np.float32), gallery.astype(np.float32), np.array([7]), labels)
    assert (found.relevant[0], found.first[0]) == (3, 2)
    assert found.r_precision[0] == pytest.approx(2 / 3)
    assert found.average_precision[0] == pytest.approx((1 / 2 + 2 / 3) / 3)
    assert (found.right[0], found.wrong[0]) == (1, 0)
    assert found.right_score[0] == pytest.approx(np.cos(np.radians(20)))
    assert found.wrong_score[0] == pytest.approx(np.cos(np.radians(10)))


def test_queries_without_an_answer_and_a_gallery_of_nothing_else() -> None:
    vectors = np.eye(3, dtype=np.float32)
    found = retrieve(vectors, vectors, np.array([0, 5, -1]), np.array([0, 0, -1]))
    assert found.relevant.tolist() == [2, 0, 0]
    assert found.first.tolist() == [1, 0, 0]
    assert found.answerable.tolist() == [True, False, False]
    assert np.isnan(found.average_precision[1:]).all()
    assert found.right.tolist() == [0, -1, -1]
    alone = retrieve(vectors[:1], vectors[:1], np.array([0]), np.array([0]), np.array([0]))
    assert (alone.relevant[0], alone.first[0], alone.wrong[0]) == (0, 0, -1)
    only_right = retrieve(vectors[:1], vectors, np.array([0]), np.zeros(3, np.int64))
    assert (only_right.first[0], only_right.wrong[0], only_right.average_precision[0]) == (1, -1, 1.0)
    nothing = retrieve(vectors, np.empty((0, 3), np.float32), np.zeros(3, np.int64), np.empty(0, np.int64))
    assert not nothing.answerable.any()


def test_the_whole_matrix_is_never_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products have at most BLOCK_SCORES numbers, or one query's."""
    monkeypatch.setattr(retrieval, "BLOCK_SCORES", 1000)
    sizes: list[int] = []
    rank = retrieval._rank
    monkeypatch.setattr(retrieval, "_rank", lambda scores, *rest: (sizes.append(scores.size), rank(scores, *rest)))
    vectors = np.random.default_rng(0).standard_normal((90, 8)).astype(np.float32)
    retrieve(vectors, vectors, np.arange(90) % 9, np.arange(90) % 9, np.arange(90))
    assert max(sizes) == 990
    assert sum(sizes) == 8100


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_vector_without_direction_is_refused(bad: float) -> None:
    vectors = np.ones((3, 2), np.float32)
    vectors[1] = bad
    with pytest.raises(ValueError, match="zero or not finite"):
        unit(vectors)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_lengths_neither_overflow_nor_vanish(scale: float) -> None:
    np.testing.assert_allclose(unit(np.full((1, 4), scale, np.float32)), 0.5, rtol=1e-6)


def test_rounding_stays_below_a_tie() -> None:
    """Cosines of 512 terms in float32 against float64."""
    vectors = np.abs(np.random.default_rng(0).standard_normal((400, 512))).astype(np.float32)
    exact = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1)[:, None]
    error = np.abs(unit(vectors) @ unit(vectors).T - exact @ exact.T).max()
    assert error < TIE / 2
