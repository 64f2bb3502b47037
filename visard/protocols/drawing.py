"""Pairs drawn from labels, and which pairs a data set comes with: its list, its own, or drawn ones.

In: labels and ids, or a data set and perhaps a list. Out: `Pairs` in folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from visard.data.dataset import FaceDataset, PairBinDataset
from visard.errors import UserError
from visard.protocols.pair_files import Pairs, consecutive_pairs
from visard.records import Int64Array


def draw_pairs(
    labels: ArrayLike,
    ids: Sequence[str],
    count: int = 3000,
    folds: int = 10,
    seed: int = 0,
    *,
    impostors: int | None = None,
) -> Pairs:
    """Genuine and impostor pairs drawn at random, in folds that share no identity.

    The draw depends on ids, labels and seed, not on the order of the rows. Within a fold the genuine pairs are spread
    over its identities as evenly as they have pairs; the impostors are uniform over all pairs of images of two
    identities. No pair comes twice, none is of an image with itself, unlabelled images take no part.

    Args:
        labels: (N,) int64 identity of each image, -1 = unlabelled.
        ids: N image ids.
        count: genuine pairs, and as many impostors, over all folds, as evenly as they have them; fewer if all of them
            together do not have so many.
        folds: at most; fewer where there are not two identities for each.
        seed: of the draw.
        impostors: another number of impostors than `count`.

    Raises:
        UserError: fewer than four identities, or no identity has two images.
    """
    label_N = np.asarray(labels, dtype=np.int64)
    if count < 1 or folds < 2:
        raise UserError(f"pairs: {count} pairs in {folds} folds cannot be drawn; use at least 1 pair and 2 folds")
    by_id = np.argsort(np.asarray(ids, dtype=np.str_), kind="stable") if len(ids) else np.empty(0, np.int64)
    by_id = by_id[label_N[by_id] >= 0]
    # Identities numbered by their first id, so that a data set with other label numbers gives the same pairs.
    names, first = np.unique(label_N[by_id], return_index=True)
    if len(names) < 4:
        raise UserError(
            f"pairs: {len(names)} identities are too few to draw pairs in two folds; at least 4 are needed; "
            "add people, or give a list with --pairs"
        )
    rank = np.empty(len(names), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(names))
    identity = rank[np.searchsorted(names, label_N[by_id])]
    folds = min(folds, len(names) // 2)
    generator = np.random.default_rng([seed, 0x9A1C5])
    fold_of_identity = np.empty(len(names), dtype=np.int64)
    fold_of_identity[generator.permutation(len(names))] = np.arange(len(names)) % folds

    members = []
    for k in range(folds):
        inside = np.flatnonzero(fold_of_identity[identity] == k)
        inside = inside[np.argsort(identity[inside], kind="stable")]
        sizes = np.bincount(identity[inside], minlength=len(names))
        members.append((by_id[inside], sizes[sizes > 0]))
    genuine_quotas = _level(np.array([_genuine_pairs(sizes).sum() for _, sizes in members]), count, generator)
    impostor_quotas = _level(np.array([_impostor_pairs(sizes) for _, sizes in members]), impostors or count, generator)
    parts = []
    for k, (rows, sizes) in enumerate(members):
        genuine = _draw_genuine(sizes, int(genuine_quotas[k]), generator)
        impostor = _draw_impostors(sizes, int(impostor_quotas[k]), generator)
        both = np.concatenate([genuine, impostor])
        same = np.arange(len(both)) < len(genuine)
        parts.append((rows[both[:, 0]], rows[both[:, 1]], same, np.full(len(both), k, dtype=np.int64)))
    left, right, same_all, fold = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if not same_all.any():
        raise UserError(
            "pairs: no identity has two images, so there is no genuine pair to draw; "
            "add images, or give a list with --pairs"
        )
    return Pairs(left, right, same_all, fold, source=f"drawn: count {count}, folds {folds}, seed {seed}")


def hardest_impostors(pairs: Pairs, scores: NDArray[np.float64], count: int) -> Pairs:
    """All genuine pairs, and of the impostors those of the highest scores, as evenly over the folds as they have them.

    Args:
        pairs: with more impostors than are kept.
        scores: (P,) cosine of each.
        count: impostors kept.
    """
    folds = np.unique(pairs.fold)
    candidates = [np.flatnonzero(~pairs.same & (pairs.fold == fold)) for fold in folds]
    quotas = _level(np.array([len(rows) for rows in candidates]), count, np.random.default_rng(0))
    kept = [rows[np.argsort(-scores[rows], kind="stable")[:q]] for rows, q in zip(candidates, quotas, strict=True)]
    chosen = np.sort(np.concatenate([np.flatnonzero(pairs.same), *kept]))
    return pairs.select(chosen)


def own_pairs(dataset: FaceDataset | None, ids: Sequence[str], folds: int, name: str) -> Pairs | None:
    """The pairs that a data set is made of, None for one that is just images.

    Args:
        dataset: perhaps a `.bin` set.
        ids: of the embeddings.
        folds: at most.
        name: the data set's, for the result.

    Raises:
        UserError: the embeddings are not of this set.
    """
    if not isinstance(dataset, PairBinDataset):
        return None
    if list(ids) != list(dataset.ids):
        raise UserError(f"{name}: its images are not those of the {len(ids):,} embeddings; embed this set")
    return consecutive_pairs(dataset.same, folds=folds, source=Path(name).name)


def _genuine_pairs(sizes: Int64Array) -> Int64Array:
    """Pairs within each identity."""
    return sizes * (sizes - 1) // 2


def _impostor_pairs(sizes: Int64Array) -> int:
    """Pairs of images of two identities."""
    return (int(sizes.sum()) ** 2 - int((sizes**2).sum())) // 2


def _draw_genuine(sizes: Int64Array, quota: int, generator: np.random.Generator) -> Int64Array:
    """(Q, 2) rows of a fold whose identities lie one after another with `sizes` images each."""
    available = _genuine_pairs(sizes)
    wanted = _level(available, quota, generator)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    drawn = [np.empty((0, 2), dtype=np.int64)]
    for start, size, there, want in zip(starts, sizes, available, wanted, strict=True):
        if want:
            number = generator.choice(there, size=want, replace=False)
            # Pair number q of `size` images: image b with all before it makes the numbers b (b - 1) / 2 onwards.
            second = np.searchsorted(np.arange(size) * (np.arange(size) - 1) // 2, number, side="right") - 1
            drawn.append(start + np.stack([number - second * (second - 1) // 2, second], axis=1))
    return np.concatenate(drawn)


def _draw_impostors(sizes: Int64Array, quota: int, generator: np.random.Generator) -> Int64Array:
    """(Q, 2) rows of two identities: row r pairs with every row after its own identity's block."""
    total = int(sizes.sum())
    block_end = np.repeat(np.cumsum(sizes), sizes)
    partners = total - block_end
    ends = np.cumsum(partners)
    number = generator.choice(int(ends[-1]), size=quota, replace=False)
    left = np.searchsorted(ends, number, side="right")
    right = block_end[left] + number - (ends[left] - partners[left])
    return np.stack([left, right], axis=1)


def _level(available: Int64Array, quota: int, generator: np.random.Generator) -> Int64Array:
    """How many to take of each so that `quota` are taken in all, as evenly as `available` allows, the rest by lot."""
    quota = min(quota, int(available.sum()))
    low, high = 0, int(available.max(initial=0))
    while low < high:  # the highest level that does not exceed the quota
        middle = (low + high + 1) // 2
        if np.minimum(available, middle).sum() <= quota:
            low = middle
        else:
            high = middle - 1
    taken = np.minimum(available, low)
    more = np.flatnonzero(available > low)
    taken[generator.permutation(more)[: quota - int(taken.sum())]] += 1
    return taken
