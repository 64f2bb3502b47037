"""The evaluation during training: pair accuracy or Recall@K on validation sets, composed from embed and protocols.

In: `run.val`, such as "faces-of-others", "lfw::pairs.txt", "agedb_30.bin" or "characters::retrieval". Out: the callable
that `training.loop.train` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from visard import dist
from visard.config import Recipe
from visard.console import say
from visard.data.dataset import FaceDataset, open_dataset
from visard.data.parts import MADE
from visard.data.unaligned import unaligned_remark
from visard.embed import embed_dataset
from visard.errors import UserError
from visard.protocols.drawing import draw_pairs, own_pairs
from visard.protocols.pairs import Pairs, evaluate_pairs, read_pairs
from visard.protocols.retrieval import evaluate_retrieval, own_ks, own_roles
from visard.recipes.whereabouts import RETRIEVAL
from visard.records import Embeddings, Float32Array, Int64Array, Result, UInt8Array
from visard.runtime import Embedder

KEEP_BYTES = 512 * 2**20
"""Crops of a validation set up to this size stay in memory: decoding or rendering them again costs more each time."""

LOGGED = ("accuracy", "auc", "eer", "tar@far=1e-2", "tar@far=1e-3")
"""Metrics of a set of pairs that are logged, where they are defined."""


def validation(recipe: Recipe) -> Callable[[Embedder], dict[str, float]] | None:
    """What to call with the network, None if the recipe names no validation set.

    The score is the mean over the sets of their accuracy or Recall@1 (a set without impostor pairs has none).
    Embeddings are of the plain view (no flip), as the fastest. In a process group every process calls it, and embeds a
    share.

    Raises:
        UserError: a set or its pairs cannot be used; found before training starts.
    """
    sets = [_open(entry, recipe) for entry in recipe.run.val]
    if not sets:
        return None
    names = [s.name for s in sets]
    if len(set(names)) != len(names):
        raise UserError(f"run.val: two sets have the same name ({', '.join(names)}); rename a folder")

    scored = {s.name: s.score for s in sets if s.score}
    for one in sets:
        if one.name not in scored and dist.is_main():
            say(f"run.val: {one.name} has only one kind of pair; its accuracy is undefined and not in the score")
    if not scored:
        raise UserError("run.val: no set has genuine and impostor pairs; name one that has both, or none")

    def evaluate(embedder: Embedder) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for one in sets:
            found = one.judge(embed_dataset(embedder, one.images, quiet=True)).metrics
            logged = one.logged or tuple(found)
            metrics |= {f"{one.name}/{key}": value for key in logged if (value := found.get(key)) is not None}
        return {"score": float(np.mean([metrics[f"{name}/{key}"] for name, key in scored.items()])), **metrics}

    return evaluate


@dataclass(frozen=True)
class _ValidationSet:
    """One entry of `run.val`.

    Args:
        name: its metrics are logged as NAME/metric.
        images: what is embedded.
        judge: its embeddings -> the protocol's result.
        score: the metric that counts, "" = none.
        logged: metrics that are logged where they are defined; () = all.
    """

    name: str
    images: _Chosen
    judge: Callable[[Embeddings], Result]
    score: str
    logged: tuple[str, ...]


def _open(entry: str, recipe: Recipe) -> _ValidationSet:
    source, _, how = entry.partition("::")
    dataset = open_dataset(source, size=recipe.data.size, resize=True, framing=recipe.data.framing.kind)
    if dist.is_main() and (remark := unaligned_remark(dataset, source)):
        say(remark)
    name = source.partition(",")[0].replace(":", "_") if source.startswith(MADE) else Path(source).stem
    name = name.partition("#")[0]
    if how == RETRIEVAL:
        return _retrieval_set(name, dataset)
    if how:
        pairs = read_pairs(how, dataset.ids)
    elif (own := own_pairs(dataset, dataset.ids, 10, source)) is not None:
        pairs = own
    else:
        pairs = draw_pairs(dataset.labels, dataset.ids, count=recipe.run.val_pairs, seed=recipe.run.seed)
    used = np.unique(np.concatenate([pairs.left, pairs.right]))
    left, right = np.searchsorted(used, pairs.left), np.searchsorted(used, pairs.right)
    chosen = Pairs(left, right, pairs.same, pairs.fold, pairs.source)
    score = "accuracy" if 0 < chosen.same.sum() < len(chosen) else ""

    def judge(embeddings: Embeddings) -> Result:
        return evaluate_pairs(embeddings, chosen, examples=0)

    return _ValidationSet(name, _Chosen(dataset, used), judge, score, LOGGED)


def _retrieval_set(name: str, dataset: FaceDataset) -> _ValidationSet:
    roles, ks = own_roles(dataset, dataset.ids), own_ks(dataset)

    def judge(embeddings: Embeddings) -> Result:
        return evaluate_retrieval(embeddings, roles, ks=ks, examples=0)

    return _ValidationSet(name, _Chosen(dataset, np.arange(len(dataset))), judge, "recall@1", ())


class _Chosen:
    """Some images of a data set, kept in memory once they are decoded if they are small enough.

    Args:
        dataset: the whole.
        rows: (n,) int64, which images.
    """

    def __init__(self, dataset: FaceDataset, rows: Int64Array) -> None:
        self._dataset, self._rows = dataset, rows
        self.ids: Sequence[str] = tuple(dataset.ids[int(row)] for row in rows)
        self.labels: Int64Array = dataset.labels[rows]
        self.identities, self.size = dataset.identities, dataset.size
        keep = len(rows) * self.size**2 * 3 <= KEEP_BYTES
        self._kept: dict[int, UInt8Array] | None = {} if keep else None

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, index: int) -> UInt8Array:
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        image = self._dataset.image(int(self._rows[index]))
        if self._kept is not None:
            self._kept[index] = image
        return image

    def points(self, index: int) -> Float32Array | None:
        return self._dataset.points(int(self._rows[index]))
