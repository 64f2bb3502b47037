"""Verification on pairs of images, LFW style: are these two the same person?

In: embeddings (never a model) and pairs: from a list, from a `.bin` set, or drawn from labels. Out: a `Result` with
fold accuracy, AUC, EER, TAR at FARs with intervals, ROC, score histograms and the hardest pairs.

Scores are cosines of the embeddings. The files are read by `pair_files.py`, pairs are drawn by `drawing.py`.

Letters: N images, P pairs, D embedding size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from visard.errors import UserError
from visard.functional import metrics
from visard.protocols.drawing import draw_pairs
from visard.protocols.pair_files import Pairs, read_lfw_pairs, read_pair_list, read_pairs
from visard.records import Embeddings, ModelSpec, Result

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)

__all__ = [
    "FARS",
    "Missing",
    "Pairs",
    "compare_pairs",
    "draw_pairs",
    "evaluate_pairs",
    "far_name",
    "pair_scores",
    "read_lfw_pairs",
    "read_pair_list",
    "read_pairs",
]

Missing = Literal["error", "skip", "wrong"]

CHUNK_PAIRS = 256
"""Pairs scored at once: two blocks of 256 x 512 float32 are 1 MB, still in cache when they are multiplied."""


def pair_scores(embeddings: Embeddings, pairs: Pairs) -> NDArray[np.float64]:
    """(P,) cosines of the pairs, computed in float32 (error about 1e-7).

    Raises:
        UserError: a vector is zero or not finite; the first ids are named.
    """
    scores = np.empty(len(pairs), dtype=np.float64)
    vectors = np.asarray(embeddings.vectors, dtype=np.float32)
    left, right = (np.empty((min(CHUNK_PAIRS, len(pairs)), vectors.shape[1]), dtype=np.float32) for _ in range(2))
    for start in range(0, len(pairs), CHUNK_PAIRS):
        part = slice(start, min(start + CHUNK_PAIRS, len(pairs)))
        size = part.stop - part.start
        # mode="clip" writes straight into `out`; the indices are valid, so nothing is clipped.
        a = np.take(vectors, pairs.left[part], axis=0, out=left[:size], mode="clip")
        b = np.take(vectors, pairs.right[part], axis=0, out=right[:size], mode="clip")
        # A repeated image's norm is computed again: cheaper, from cache, than reading all vectors once more.
        a_norm, b_norm = (np.sqrt(np.einsum("nd,nd->n", x, x)) for x in (a, b))
        usable = np.isfinite(a_norm) & np.isfinite(b_norm) & (a_norm > 0) & (b_norm > 0)
        if not usable.all():
            raise UserError(_name_broken(embeddings, pairs))
        scores[part] = np.einsum("nd,nd->n", a, b) / (a_norm * b_norm)
    return scores


def evaluate_pairs(
    embeddings: Embeddings,
    pairs: Pairs,
    *,
    fars: Sequence[float] = FARS,
    missing: Missing = "error",
    examples: int = 24,
    histogram_bins: int = 80,
) -> Result:
    """Scores the pairs and says everything there is to say about the scores.

    With only genuine or only impostor pairs there is no accuracy and no rate at a FAR: they are None, undefined.

    Args:
        embeddings: of the images that the pairs name.
        pairs: see `Pairs`; at least two folds.
        fars: false accept rates for TAR@FAR; None is answered where there are fewer impostors than 1 / FAR.
        missing: pairs whose image has no embedding: "error"; "skip" leaves them out; "wrong" counts each as a wrong
            decision at any threshold (a genuine pair never accepted, an impostor always), the score of a system that
            must always answer.
        examples: hardest genuine (lowest score) and impostor pairs (highest) kept.
        histogram_bins: between the lowest and the highest score.

    Raises:
        UserError: missing images with "error", no pair that can be scored, fewer than two folds, a zero vector.
    """
    present = pairs.present
    absent = int((~present).sum())
    if absent and missing == "error":
        raise UserError(
            f"pairs: {absent} of {len(pairs)} name an image without an embedding; use missing 'skip' or 'wrong'"
        )
    judged = pairs.select(present)
    _check_answerable(judged)
    scores = pair_scores(embeddings, judged)
    genuine, impostor = scores[judged.same], scores[~judged.same]
    counted = pairs if missing == "wrong" else judged
    counts = {
        "images": len(embeddings.ids),
        "pairs": len(counted),
        "genuine": int(counted.same.sum()),
        "impostor": int((~counted.same).sum()),
        "pairs_missing": absent,
    }
    answerable = bool(len(genuine) and len(impostor))
    values, intervals, curves = _measure(scores, judged, counted, fars) if answerable else (_undefined(fars), {}, {})
    edges = np.histogram_bin_edges(scores, bins=histogram_bins)
    for name, part in (("genuine_scores", genuine), ("impostor_scores", impostor)):
        heights, _ = np.histogram(part, bins=edges)
        centres = (edges[:-1] + edges[1:]) / 2
        curves[name] = _curve("cosine", "pairs", centres, heights)
    return Result(
        protocol="pairs",
        metrics=values,
        counts=counts,
        intervals=intervals,
        curves=curves,
        examples={
            "hardest_genuine": _hardest(embeddings, judged, scores, True, examples),
            "hardest_impostor": _hardest(embeddings, judged, scores, False, examples),
        },
        spec_hash=_spec_hash(embeddings.spec),
        settings={
            "pairs": pairs.source,
            "flip": embeddings.flip,
            "folds": len(np.unique(counted.fold)),
            "missing": missing,
            "fars": list(fars),
            "score": "cosine",
        },
    )


def compare_pairs(
    embeddings: Embeddings, against: Embeddings, pairs: Pairs, *, missing: Missing = "error", seed: int = 0
) -> tuple[float, float, tuple[float, float]] | None:
    """Whether one network is better than another on the same pairs, or has only been lucky.

    Args:
        embeddings: of the images that the pairs name.
        against: of the same images in the same order, by the other network.
        pairs: as `evaluate_pairs` takes them; a pair without embeddings is left out, or wrong for both.
        missing: as in `evaluate_pairs`.
        seed: of the bootstrap.

    Returns:
        The other network's accuracy over all pairs, the difference of both, and its 95 % interval by a paired
        bootstrap (`metrics.paired_difference`); None with only genuine or only impostor pairs.

    Raises:
        UserError: embeddings of other images.
    """
    if tuple(against.ids) != tuple(embeddings.ids):
        raise UserError(
            f"against: {len(against.ids):,} embeddings of other images than the {len(embeddings.ids):,} that are "
            "compared; embed the same data set with both"
        )
    judged = pairs.select(pairs.present)
    if not 0 < judged.same.sum() < len(judged):
        return None
    right, other = (_right(vectors, judged) for vectors in (embeddings, against))
    if missing == "wrong":
        lost = np.zeros(len(pairs) - len(judged), dtype=bool)
        right, other = np.concatenate([right, lost]), np.concatenate([other, lost])
    return (float(other.mean()), *metrics.paired_difference(right, other, seed=seed))


def _right(embeddings: Embeddings, pairs: Pairs) -> NDArray[np.bool_]:
    scores = pair_scores(embeddings, pairs)
    return metrics.fold_accuracy(scores, pairs.same, pairs.fold).right(scores, pairs.same, pairs.fold)


def far_name(far: float) -> str:
    """1e-3 -> "tar@far=1e-3": the name of the metric."""
    mantissa, exponent = f"{far:e}".split("e")
    return f"tar@far={float(mantissa):g}e{int(exponent)}"


def _measure(
    scores: NDArray[np.float64], judged: Pairs, counted: Pairs, fars: Sequence[float]
) -> tuple[dict[str, float | None], dict[str, tuple[float, float]], dict[str, dict[str, Any]]]:
    """Metrics, intervals and curves; pairs that are counted but not judged are wrong at every threshold."""
    unscored = ~counted.present
    genuine = np.concatenate([scores[judged.same], np.full(int((counted.same & unscored).sum()), -np.inf)])
    impostor = np.concatenate([scores[~judged.same], np.full(int((~counted.same & unscored).sum()), np.inf)])
    fold_names, judged_K = np.unique(judged.fold, return_counts=True)
    counted_K = np.array([int((counted.fold == name).sum()) for name in fold_names])
    # A fold of which nothing could be scored has no threshold, but its pairs are wrong all the same.
    lost_folds = len(np.unique(counted.fold)) - len(fold_names)
    folds = metrics.fold_accuracy(scores, judged.same, judged.fold)
    on_grid = metrics.fold_accuracy(scores, judged.same, judged.fold, grid=metrics.usual_grid())
    accuracy_K = np.concatenate([folds.accuracies * (judged_K / counted_K), np.zeros(lost_folds)])
    grid_accuracy_K = np.concatenate([on_grid.accuracies * (judged_K / counted_K), np.zeros(lost_folds)])
    curve = metrics.roc(genuine, impostor)
    assert curve is not None  # both kinds were checked for
    values: dict[str, float | None] = {
        "accuracy": float(accuracy_K.mean()),
        "accuracy_std": float(accuracy_K.std()),
        "accuracy_usual_grid": float(grid_accuracy_K.mean()),
        "accuracy_usual_grid_std": float(grid_accuracy_K.std()),
        "threshold": _usable(float(folds.thresholds.mean())),
        "auc": metrics.auc(genuine, impostor),
        "eer": metrics.equal_error_rate_of(curve),
    }
    intervals: dict[str, tuple[float, float]] = {}
    _add_interval(intervals, "accuracy", round(float(folds.accuracies @ judged_K)), len(counted))
    for far, point in zip(fars, metrics.operating_points(genuine, impostor, fars), strict=True):
        name = far_name(far)
        values[name] = None if point is None else point.tar
        values[name.replace("tar@", "threshold@")] = None if point is None else _usable(point.threshold)
        if point is not None:
            _add_interval(intervals, name, point.genuine_accepted, point.genuine)
            # The FAR that was reached, with the interval that says how well so few impostors know it.
            _add_interval(intervals, name.replace("tar@", "reached@"), point.impostors_accepted, point.impostors)
    curves = {
        "roc": _curve("FAR", "TAR", *metrics.thin_curve(curve, 500)),
        "fold_accuracy": _curve("fold", "accuracy", fold_names, accuracy_K[: len(fold_names)]),
        "fold_thresholds": _curve("fold", "threshold", fold_names, folds.thresholds),
    }
    return values, intervals, curves


def _add_interval(intervals: dict[str, tuple[float, float]], name: str, successes: int, trials: int) -> None:
    interval = metrics.wilson_interval(successes, trials)
    if interval is not None:
        intervals[name] = interval


def _name_broken(embeddings: Embeddings, pairs: Pairs) -> str:
    used = np.unique(np.concatenate([pairs.left, pairs.right]))
    norms = np.linalg.norm(embeddings.vectors[used], axis=1)
    broken = used[~(np.isfinite(norms) & (norms > 0))]
    names = ", ".join(embeddings.ids[row] for row in broken[:3])
    return (
        f"embeddings: {len(broken)} vectors are zero or not finite (first: {names}); "
        "embed these images again or leave them out"
    )


def _check_answerable(pairs: Pairs) -> None:
    if not len(pairs):
        raise UserError("pairs: of none of them both images have an embedding; is this the right data set?")
    if len(np.unique(pairs.fold)) < 2 and 0 < pairs.same.sum() < len(pairs):
        raise UserError(
            "pairs: all are in one fold; a threshold is chosen on the other folds, so number at least 2 of them, "
            "or leave the folds out to have them dealt"
        )


def _undefined(fars: Sequence[float]) -> dict[str, float | None]:
    """The metrics of `_measure` where one kind of pair is lacking."""
    names = ["accuracy", "accuracy_std", "accuracy_usual_grid", "accuracy_usual_grid_std", "threshold", "auc", "eer"]
    for far in fars:
        names += [far_name(far), far_name(far).replace("tar@", "threshold@")]
    return dict.fromkeys(names)


def _hardest(
    embeddings: Embeddings, pairs: Pairs, scores: NDArray[np.float64], same: bool, count: int
) -> list[dict[str, Any]]:
    candidates = np.flatnonzero(pairs.same == same)
    order = np.argsort(scores[candidates] if same else -scores[candidates], kind="stable")
    return [
        {
            "left": embeddings.ids[pairs.left[row]],
            "right": embeddings.ids[pairs.right[row]],
            "score": float(scores[row]),
            "fold": int(pairs.fold[row]),
        }
        for row in candidates[order[:count]]
    ]


def _curve(x_name: str, y_name: str, x: NDArray[Any], y: NDArray[Any]) -> dict[str, Any]:
    return {"x_name": x_name, "y_name": y_name, "x": x.tolist(), "y": [_usable(value) for value in y.tolist()]}


def _usable(value: float) -> float | None:
    """None for the threshold that accepts everything or nothing: infinity is no JSON and no setting."""
    return value if math.isfinite(value) else None


def _spec_hash(spec: dict[str, Any]) -> str:
    return ModelSpec(**spec).hash if spec else ""
