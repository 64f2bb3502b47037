"""Retrieval from embeddings: at which rank the answers come, Recall@K and MAP@R, without the whole score matrix.

In: vectors and labels of queries and gallery. Out: of each query how many right answers there are, the rank of the
first, its R-precision and average precision at R, and the two nearest images, right and wrong.

Scores are cosines of float32 vectors. An answer that scores no more than `TIE` above a wrong image is ranked behind it:
ties never favour the answer, and whether two equal images tie does not depend on the order in which a product's terms
are added. So ranks follow from the vectors alone, not from the order of rows or the size of blocks.

Letters: Q queries, G gallery images, D embedding size, B queries of a block, R right answers of a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visard.records import Float32Array, Int64Array

TIE = 2.0**-19
"""Cosines that differ by no more (1.9e-6) are equal: 32 units in the last place of a float32 just below 1. Two products
of 512 terms, each off by at most 6e-7 (measured, all terms positive), stay within it."""

BLOCK_SCORES = 1 << 23
"""Scores held at once: 32 MB. All of 60,499 images against each other would be 14.6 GB."""

Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class Retrieved:
    """What became of each query.

    Args:
        relevant: (Q,) int64, R: gallery images with the query's label, the query itself not counted.
        first: (Q,) int64, rank of the best of these, from 1; 0 where R is 0.
        r_precision: (Q,) float64, share of right answers among the first R; NaN where R is 0.
        average_precision: (Q,) float64, mean over the first R places of the precision there if the image there is
            right, else 0; NaN where R is 0. Its mean over queries is MAP@R.
        right: (Q,) int64, the nearest right gallery image, -1 = none.
        right_score: (Q,) float64, its cosine, NaN = none.
        wrong: (Q,) int64, the nearest wrong one, -1 = none.
        wrong_score: (Q,) float64, its cosine, NaN = none.
    """

    relevant: Int64Array
    first: Int64Array
    r_precision: Float64Array
    average_precision: Float64Array
    right: Int64Array
    right_score: Float64Array
    wrong: Int64Array
    wrong_score: Float64Array

    @property
    def answerable(self) -> NDArray[np.bool_]:
        """(Q,) whether the gallery holds an answer at all; the others have no place in any mean."""
        return self.relevant > 0


def retrieve(
    query_QD: Float32Array,
    gallery_GD: Float32Array,
    query_labels: Int64Array,
    gallery_labels: Int64Array,
    itself: Int64Array | None = None,
) -> Retrieved:
    """Ranks the gallery for every query.

    Equals, with cos_QG the whole score matrix, sorting each row, wrong images first among equals (see `TIE`). Held at
    once are `BLOCK_SCORES` of it, and instead of sorting, what is ahead of the first answer is counted and only the R
    best wrong images are taken out.

    Args:
        query_QD: (Q, D) float32, any length but 0.
        gallery_GD: (G, D) float32, likewise; may be the same array.
        query_labels: (Q,) int64, -1 = unlabelled: no answer exists.
        gallery_labels: (G,) int64, -1 = unlabelled: a wrong answer to every query.
        itself: (Q,) int64, the query's own row in the gallery, which takes no part; -1 or None = it is not there.

    Raises:
        ValueError: a vector is zero or not finite.

    Source: Musgrave, Belongie, Lim, A Metric Learning Reality Check (arXiv:2003.08505), 3.2: MAP@R. Recall@K is
    Jegou, Douze, Schmid's (TPAMI 2011) for one answer: whether any of the first K is right.
    """
    count, size = len(query_QD), len(gallery_GD)
    same = gallery_GD is query_QD
    gallery_GD = unit(gallery_GD)
    query_QD = gallery_GD if same else unit(query_QD)
    by_label = np.argsort(gallery_labels, kind="stable")
    sorted_labels = np.asarray(gallery_labels)[by_label]
    starts = np.searchsorted(sorted_labels, query_labels, side="left")
    ends = np.where(np.asarray(query_labels) < 0, starts, np.searchsorted(sorted_labels, query_labels, side="right"))
    found = Retrieved(
        relevant=np.zeros(count, np.int64),
        first=np.zeros(count, np.int64),
        r_precision=np.full(count, np.nan),
        average_precision=np.full(count, np.nan),
        right=np.full(count, -1, np.int64),
        right_score=np.full(count, np.nan),
        wrong=np.full(count, -1, np.int64),
        wrong_score=np.full(count, np.nan),
    )
    block = max(1, BLOCK_SCORES // max(size, 1))
    for begin in range(0, count if size else 0, block):
        rows = range(begin, min(begin + block, count))
        score_BG = query_QD[rows.start : rows.stop] @ gallery_GD.T
        answers = [by_label[starts[q] : ends[q]] for q in rows]
        if itself is not None:
            own = itself[rows.start : rows.stop]
            present = np.flatnonzero(own >= 0)
            score_BG[present, own[present]] = -np.inf
            answers = [a[a != o] for a, o in zip(answers, own.tolist(), strict=True)]
        _rank(score_BG, answers, rows.start, found)
    return found


def recall_at(found: Retrieved, k: int) -> int:
    """Queries whose first K images hold an answer; over `answerable` queries it makes Recall@K."""
    return int(np.count_nonzero((found.first > 0) & (found.first <= k)))


def unit(vectors: Float32Array) -> Float32Array:
    """(N, D) float32 vectors at length 1.

    Raises:
        ValueError: one is zero or not finite.
    """
    vectors = np.asarray(vectors, dtype=np.float32)
    # The sum of squares in float64: it neither overflows nor vanishes for any float32 but subnormal ones.
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise ValueError("a vector is zero or not finite")
    result: Float32Array = (vectors / lengths[:, None]).astype(np.float32)
    return result


def _rank(score_BG: Float32Array, answers: Sequence[Int64Array], begin: int, found: Retrieved) -> None:
    """Fills `found` from row `begin` on; overwrites the scores.

    Args:
        score_BG: cosines; -inf for what takes no part.
        answers: of each query the columns that are right.
    """
    best_right = np.full(len(answers), np.inf, np.float32)
    right_scores = []
    for row, columns in enumerate(answers):
        scores = score_BG[row, columns]
        if len(columns):
            nearest = int(scores.argmax())
            found.right[begin + row], found.right_score[begin + row] = columns[nearest], scores[nearest]
            best_right[row] = scores[nearest]
        right_scores.append(np.sort(scores)[::-1])
        score_BG[row, columns] = -np.inf
    wrong = score_BG.argmax(1)
    wrong_score = score_BG[np.arange(len(answers)), wrong]
    there = np.isfinite(wrong_score)
    end = begin + len(answers)
    found.wrong[begin:end][there], found.wrong_score[begin:end][there] = wrong[there], wrong_score[there]
    ahead = np.count_nonzero(score_BG >= (best_right - np.float32(TIE))[:, None], axis=1)
    # An answer among the first R has fewer than R wrong images ahead of it, so the R best of these decide.
    most = min(max(map(len, answers)), score_BG.shape[1])
    if most:
        score_BG.partition(score_BG.shape[1] - most, axis=1)
    top = np.sort(score_BG[:, score_BG.shape[1] - most :], axis=1)
    for row, scores in enumerate(right_scores):
        r = len(scores)
        if not r:
            continue
        order = np.arange(1, r + 1)
        places = order + most - np.searchsorted(top[row], scores - np.float32(TIE), side="left")
        inside = places <= r
        query = begin + row
        found.relevant[query], found.first[query] = r, 1 + ahead[row]
        found.r_precision[query] = np.count_nonzero(inside) / r
        found.average_precision[query] = float((order[inside] / places[inside]).sum()) / r
