"""`visard pairs make DATA OUT.txt`: one's own list of genuine and impostor pairs, in folds that share no identity.

In: a data set with identities; for hard impostors its embeddings too. Out: a list `left right same fold` that
`visard evaluate pairs --pairs` and `--val DATA::LIST` read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from visard.console import Answer, parse
from visard.data.dataset import open_dataset
from visard.embed import load_embeddings
from visard.errors import UserError
from visard.protocols.drawing import draw_pairs, hardest_impostors
from visard.protocols.pair_files import Pairs, write_pairs
from visard.protocols.pairs import pair_scores

USAGE = """usage: visard pairs make DATA OUT.txt [options]

  make     draw genuine and impostor pairs of a data set, in folds that share no identity

visard pairs make --help shows its options."""

POOL = 20
"""Impostors drawn for each hard one that is kept: of all pairs, the hardest twentieth."""


@dataclass(frozen=True, kw_only=True)
class MakePairsConfig:
    """A list of pairs of one's own data."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Data set with identities."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The list to write."""
    count: int = 3000
    """Genuine and as many impostor pairs; fewer if the data set has not so many."""
    folds: int = 10
    """Folds that share no identity; fewer if there are not two identities for each."""
    seed: int = 0
    """Of the draw."""
    negatives: Literal["random", "hard"] = "random"
    """Impostors at random, or the twentieth that `--embeddings` finds most alike."""
    embeddings: Path | None = None
    """Embeddings directory of the data set, for hard impostors."""

    def __post_init__(self) -> None:
        if (self.negatives == "hard") != (self.embeddings is not None):
            raise UserError(
                "--negatives hard and --embeddings DIR belong together; make them with `visard embed MODEL DATA DIR`"
            )


def run(arguments: list[str]) -> Answer:
    """`visard pairs`."""
    if arguments[:1] in (["-h"], ["--help"]):
        return Answer({"usage": USAGE}, USAGE)
    if arguments[:1] != ["make"]:
        raise UserError(
            "do what with pairs? `visard pairs make DATA OUT.txt` draws them; `visard pairs --help` says more"
        )
    return make(parse(MakePairsConfig, arguments[1:], command="visard pairs make"))


def make(config: MakePairsConfig) -> Answer:
    """Draws and writes the list."""
    if config.out.exists():
        raise UserError(f"{config.out} exists; choose another name or remove it")
    dataset = open_dataset(config.data)
    if config.embeddings is None:
        pairs = draw_pairs(dataset.labels, dataset.ids, config.count, config.folds, config.seed)
    else:
        pairs = _hard_pairs(config, dataset.labels, list(dataset.ids), config.embeddings)
    genuine, folds = int(pairs.same.sum()), len(np.unique(pairs.fold))
    value = {
        "out": str(config.out),
        "genuine": genuine,
        "impostor": len(pairs) - genuine,
        "folds": folds,
        "identities": len(np.unique(dataset.labels[np.concatenate([pairs.left, pairs.right])])),
    }
    kinds = f"{genuine:,} genuine and {len(pairs) - genuine:,} {config.negatives} impostor pairs"
    line = f"{kinds} of {value['identities']:,} identities in {folds} folds that share none"
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_pairs(config.out, pairs, dataset.ids, remark=f"{line}; {Path(config.data).name}, seed {config.seed}")
    less = "" if genuine == len(pairs) - genuine == config.count else f"; {config.count:,} of each were asked for"
    return Answer(value, f"{config.out}: {line}{less}")


def _hard_pairs(config: MakePairsConfig, labels: np.ndarray, ids: list[str], directory: Path) -> Pairs:
    embeddings = load_embeddings(directory)
    rows = {image_id: row for row, image_id in enumerate(embeddings.ids)}
    absent = [image_id for image_id in ids if image_id not in rows]
    if absent:
        raise UserError(
            f"{directory}: has no embedding of {len(absent):,} images of {config.data} (first: {absent[0]}); "
            "embed that data set again"
        )
    random = draw_pairs(labels, ids, config.count, config.folds, config.seed)
    # The folds depend on seed and identities alone, so the pool's are the same.
    pool = draw_pairs(labels, ids, config.count, config.folds, config.seed, impostors=POOL * config.count)
    genuine, impostors = random.select(random.same), pool.select(~pool.same)
    left, right, same, fold = (
        np.concatenate([getattr(part, name) for part in (genuine, impostors)])
        for name in ("left", "right", "same", "fold")
    )
    to_row = np.array([rows[image_id] for image_id in ids], dtype=np.int64)
    scores = pair_scores(embeddings, Pairs(to_row[left], to_row[right], same, fold))
    return hardest_impostors(Pairs(left, right, same, fold), scores, config.count)
