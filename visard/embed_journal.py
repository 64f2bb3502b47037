"""How far unfinished embeddings have come, on disk: OUT.partial with vectors.npy and a journal of each process.

In: stretches of rows, (first, end), that are done. Out: the same after a kill. A journal names a key of everything that
the vectors depend on; with another key they are begun anew. A directory without a journal is somebody else's and stays.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from visard import dist
from visard.console import say
from visard.errors import UserError

JOURNAL = "journal_{rank:05d}.json"


def begin(partial: Path, key: str, shape: tuple[int, int], dtype: str = "float32") -> list[tuple[int, int]]:
    """Makes the directory with vectors.npy, or takes it up.

    Args:
        partial: the directory.
        key: of everything that the vectors depend on.
        shape: (N, D) of vectors.npy.
        dtype: of vectors.npy.

    Returns:
        The stretches of rows that are done.

    Raises:
        UserError: something else is in its place.
    """
    _require_own(partial)
    done = _done_before(partial, key)
    if done:
        say(f"{partial}: going on after {sum(end - first for first, end in done):,} of {shape[0]:,} images")
    else:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        write_journal(partial, key, [])  # before all else: by it a directory is known
        np.lib.format.open_memmap(partial / "vectors.npy", "w+", dtype, shape).flush()
    write_journal(partial, key, done)
    for journal in journal_files(partial):
        if journal.name != JOURNAL.format(rank=0):
            journal.unlink()
    return done


def write_journal(partial: Path, key: str, done: Sequence[tuple[int, int]]) -> None:
    """This process's rows, replacing what it wrote before."""
    path = partial / JOURNAL.format(rank=dist.rank())
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"key": key, "done": done}))
    os.replace(temporary, path)


def what_is_kept(partial: Path, images: int) -> str:
    """For people: how far all processes came, by their journals."""
    journals = [json.loads(path.read_text()) for path in journal_files(partial)]
    done = sum(end - first for first, end in union([(a, b) for values in journals for a, b in values["done"]]))
    return f"{done:,} of {images:,} embeddings are kept in {partial}, the same command goes on with the others"


def union(stretches: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The rows of all stretches, as few of them as possible, in order."""
    joined: list[tuple[int, int]] = []
    for first, end in sorted(stretches):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((first, end))
    return joined


def missing(done: Sequence[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """The stretches of rows 0 to `count` between those that are done."""
    edges = [0, *(edge for stretch in done for edge in stretch), count]
    gaps = zip(edges[::2], edges[1::2], strict=True)
    return [(first, end) for first, end in gaps if end > first]


def journal_files(partial: Path) -> list[Path]:
    """The journal of each process that has worked there."""
    return sorted(partial.glob(JOURNAL.replace("{rank:05d}", "*")))


def _require_own(partial: Path) -> None:
    """Raises UserError for what this module has not made: it would be deleted."""
    if not os.path.lexists(partial) or (partial.is_dir() and (journal_files(partial) or not _others(partial))):
        return
    raise UserError(
        f"{partial} is in the way: unfinished embeddings would be kept there, and this is not visard embed's; "
        "move it away, or name another OUT"
    )


def _others(partial: Path) -> list[Path]:
    """What is there besides the temporary file of a first journal, which a kill may leave alone."""
    first = Path(JOURNAL.format(rank=0)).with_suffix(".tmp").name
    return [path for path in partial.iterdir() if path.name != first]


def _done_before(partial: Path, key: str) -> list[tuple[int, int]]:
    """Stretches of rows that are there already; none if it was made from something else."""
    journals = [json.loads(path.read_text()) for path in journal_files(partial)]
    if not (partial / "vectors.npy").is_file() or any(values["key"] != key for values in journals):
        return []
    return union([(first, end) for values in journals for first, end in values["done"]])
