"""Retrieval: is the nearest image of the same identity? Recall@K and MAP@R over queries and a gallery.

In: embeddings (never a model), and which of them are queries and which the gallery: either some of them each, as
In-Shop's lists say, or every image against all others (leave one out), as for SOP. Out: a `Result` with Recall@K,
MAP@R and R-precision with intervals, Recall@K over K, and the queries whose first image is the most wrong.

How ranks and ties are counted: `functional/retrieval.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from visard.data.dataset import FaceDataset
from visard.errors import UserError
from visard.functional.metrics import Z_95, wilson_interval
from visard.functional.retrieval import Retrieved, recall_at, retrieve
from visard.records import Embeddings, Int64Array, ModelSpec, Result

KS = (1, 2, 4, 8)
"""Recall@K where neither the user nor the data set names K."""

CURVE_POINTS = 60


@dataclass(frozen=True)
class Roles:
    """Which images are looked for, and among which.

    Args:
        queries: (Q,) int64 rows of the embeddings.
        gallery: (G,) int64 rows; an image that is in both is not an answer to itself.
    """

    queries: Int64Array
    gallery: Int64Array

    def __post_init__(self) -> None:
        for what, rows in (("queries", self.queries), ("gallery", self.gallery)):
            if len(np.unique(rows)) != len(rows):
                raise UserError(f"retrieval: an image comes twice among the {what}; name each once")
            if not len(rows):
                raise UserError(f"retrieval: there are no {what}; is this the right data set?")


def own_roles(dataset: FaceDataset | None, ids: Sequence[str]) -> Roles | None:
    """Who is who by a data set's own list, None for one that has none: every image against all others.

    Args:
        dataset: perhaps with `sought`, see `RetrievalList`.
        ids: of the embeddings.
    """
    sought = getattr(dataset, "sought", None)
    if dataset is None or sought is None:
        return None
    by_id = dict(zip(dataset.ids, sought.tolist(), strict=True))
    of_query = np.array([by_id[image_id] for image_id in ids])
    return Roles(np.flatnonzero(of_query), np.flatnonzero(~of_query))


def own_ks(dataset: FaceDataset | None) -> tuple[int, ...]:
    """K of Recall@K as results on this data set are published, else `KS`."""
    return getattr(dataset, "ks", None) or KS


def leave_one_out(labels: Int64Array) -> Roles:
    """Every labelled image as a query to all other images."""
    queries = np.flatnonzero(np.asarray(labels) >= 0)
    if not len(queries):
        raise UserError("retrieval: no image has a label, so there is nothing to find; use data with identities")
    return Roles(queries, np.arange(len(labels)))


def evaluate_retrieval(
    embeddings: Embeddings, roles: Roles | None = None, *, ks: Sequence[int] = KS, examples: int = 24
) -> Result:
    """Ranks the gallery for every query and says everything there is to say about the ranks.

    A query without an answer in the gallery is counted in `queries_without_answer` and in nothing else.

    Args:
        embeddings: of queries and gallery.
        roles: who is who; None = every image against all others.
        ks: of Recall@K.
        examples: queries kept whose first image is wrong, by how much nearer it is than the first right one.

    Raises:
        UserError: no query has an answer, or a vector is zero or not finite.
    """
    check_ks(ks)
    roles, everyone = (leave_one_out(embeddings.labels), True) if roles is None else (roles, False)
    found = _retrieve(embeddings, roles)
    answerable = found.answerable
    if not answerable.any():
        raise UserError(
            f"retrieval: none of the {len(roles.queries):,} queries has another image of its identity in the gallery; "
            "is this the right data set?"
        )
    asked = int(answerable.sum())
    metrics: dict[str, float | None] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for k in ks:
        recalled = recall_at(found, k)
        metrics[f"recall@{k}"] = recalled / asked
        interval = wilson_interval(recalled, asked)
        assert interval is not None  # a query was asked
        intervals[f"recall@{k}"] = interval
    for name, values in (("map@r", found.average_precision), ("r_precision", found.r_precision)):
        metrics[name], intervals[name] = _mean(values[answerable])
    return Result(
        protocol="retrieval",
        metrics=metrics,
        counts={
            "images": len(np.union1d(roles.queries, roles.gallery)),
            "queries": len(roles.queries),
            "queries_without_answer": len(roles.queries) - asked,
            "gallery": len(roles.gallery),
            "identities": len(np.unique(embeddings.labels[roles.queries])),
            **{f"recalled@{k}": recall_at(found, k) for k in ks},
        },
        intervals=intervals,
        curves={"recall": _recall_curve(found, len(roles.gallery))},
        examples={"first_is_wrong": _most_wrong(embeddings, roles, found, examples)},
        spec_hash=ModelSpec(**embeddings.spec).hash if embeddings.spec else "",
        settings={
            "sets": "leave one out" if everyone else "queries and gallery",
            "flip": embeddings.flip,
            "ks": list(ks),
            "score": "cosine",
        },
    )


def check_ks(ks: Sequence[int]) -> None:
    """Raises UserError unless these are ranks."""
    if not ks or min(ks) < 1 or len(set(ks)) != len(ks):
        raise UserError(
            f"ks {' '.join(map(str, ks)) or '(none)'}: give different ranks of at least 1, such as 1 10 100"
        )


def _retrieve(embeddings: Embeddings, roles: Roles) -> Retrieved:
    whole = len(roles.gallery) == len(embeddings.ids) and bool((roles.gallery == np.arange(len(roles.gallery))).all())
    gallery = embeddings.vectors if whole else embeddings.vectors[roles.gallery]
    queries = gallery if np.array_equal(roles.queries, roles.gallery) else embeddings.vectors[roles.queries]
    place = np.full(len(embeddings.ids), -1, np.int64)
    place[roles.gallery] = np.arange(len(roles.gallery))
    labels = np.asarray(embeddings.labels)
    try:
        return retrieve(queries, gallery, labels[roles.queries], labels[roles.gallery], place[roles.queries])
    except ValueError:
        used = np.union1d(roles.queries, roles.gallery)
        norms = np.linalg.norm(np.asarray(embeddings.vectors[used], np.float64), axis=1)
        broken = used[~(np.isfinite(norms) & (norms > 0))]
        names = ", ".join(embeddings.ids[row] for row in broken[:3])
        raise UserError(
            f"embeddings: {len(broken)} vectors are zero or not finite (first: {names}); "
            "embed these images again or leave them out"
        ) from None


def _mean(values: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Mean over queries, and its interval from their spread (normal, so wide of the mark for a few queries)."""
    mean = float(values.mean())
    half = Z_95 * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 1.0
    return mean, (max(0.0, mean - half), min(1.0, mean + half))


def _recall_curve(found: Retrieved, size: int) -> dict[str, Any]:
    """Recall@K at ranks that grow by factors, up to the whole gallery."""
    ranks = np.sort(found.first[found.answerable])
    ks = np.unique(np.round(np.geomspace(1, size, CURVE_POINTS)).astype(np.int64))
    recall = np.searchsorted(ranks, ks, side="right") / len(ranks)
    return {"x_name": "K", "y_name": "Recall@K", "x": ks.tolist(), "y": recall.tolist()}


def _most_wrong(embeddings: Embeddings, roles: Roles, found: Retrieved, count: int) -> list[dict[str, Any]]:
    wrong = np.flatnonzero(found.first > 1)
    excess = found.wrong_score[wrong] - found.right_score[wrong]
    ids = embeddings.ids
    return [
        {
            "left": ids[roles.queries[query]],
            "right": ids[roles.gallery[found.wrong[query]]],
            "score": float(found.wrong_score[query]),
            "answer": ids[roles.gallery[found.right[query]]],
            "answer_score": float(found.right_score[query]),
            "answer_rank": int(found.first[query]),
        }
        for query in wrong[np.argsort(-excess, kind="stable")[:count]].tolist()
    ]
