"""Where a run's data lies when it is resumed: paths are relative to the folder in which the run was started.

In: a recipe as a run's recipe.json has it. Out: the same with paths that hold in the present folder, or a UserError
that names what is gone. `rendered:` and absolute paths are what they are; of `A + B * 2` each part is looked at.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from visard.config import Recipe, RunConfig
from visard.data.parts import MADE, split_part
from visard.errors import UserError

RETRIEVAL = "retrieval"
"""What `run.val` has behind `DATA::` for a set that is searched instead of compared in pairs."""


def located(recipe: Recipe) -> Recipe:
    """The recipe with `data.source`, `run.val`, `run.init` and the teacher as paths from here.

    Looked for first in `run.started_in`, then here (the run was moved to another machine along with its data).

    Raises:
        UserError: the data or a validation set is in neither.
    """
    run = recipe.run
    saved = run.out / "recipe.json"
    source = _each_path(recipe.data.source, lambda path: _found(path, run, saved, "--data SOURCE"))
    val = tuple(_of_entry(entry, lambda path: _found(path, run, saved, "--val SET ...")) for entry in run.val)
    # The start model is only needed by a run that was killed before its first checkpoint; then it is missed by name.
    init = _place(run.init, run) or run.init
    teacher, cache = (_place(path, run) or path for path in (recipe.distill.teacher, recipe.distill.cache))
    distill = replace(recipe.distill, teacher=teacher, cache=cache)
    unlabelled = _each_path(recipe.data.unlabelled, lambda path: _found(path, run, saved, "--data.unlabelled SOURCE"))
    data = replace(recipe.data, source=source, unlabelled=unlabelled)
    return replace(recipe, data=data, run=replace(run, val=val, init=init), distill=distill)


def anchored(recipe: Recipe, *, data: bool, val: bool) -> Recipe:
    """The recipe with absolute paths where they were given just now, in another folder than the run was started in.

    Args:
        recipe: of a resumed run.
        data: `data.source` was given now.
        val: `run.val` was given now.
    """
    if not recipe.run.started_in or _is_here(recipe.run.started_in):
        return recipe
    if data:
        recipe = replace(recipe, data=replace(recipe.data, source=_each_path(recipe.data.source, os.path.abspath)))
    if val:
        entries = tuple(_of_entry(entry, os.path.abspath) for entry in recipe.run.val)
        recipe = replace(recipe, run=replace(recipe.run, val=entries))
    return recipe


def _of_entry(entry: str, change: Callable[[str], str]) -> str:
    """`DATA`, `DATA::retrieval` or `DATA::PAIRS_FILE` with its paths changed."""
    source, separator, pairs = entry.partition("::")
    if pairs and pairs != RETRIEVAL:
        pairs = change(pairs)
    return _each_path(source, change) + separator + pairs


def _each_path(source: str, change: Callable[[str], str]) -> str:
    """A source with its paths changed; what `+` and `*` mean is `open_dataset`'s."""
    if not source or os.path.exists(source):
        return change(source) if source else source
    changed = []
    for part in source.split(" + "):
        path, star, weight = part.strip().rpartition(" * ")
        if not star:
            path, weight = weight, ""
        changed.append((path if path.startswith(MADE) else change(path)) + star + weight)
    return " + ".join(changed)


def _found(path: str, run: RunConfig, saved: Path, option: str) -> str:
    place = _place(path, run)
    if place is None:
        elsewhere = run.started_in and not os.path.isabs(path) and not _is_here(run.started_in)
        where = f"neither in {run.started_in}, where the run was started, nor here" if elsewhere else "not there"
        raise UserError(f"{path}, named in {saved}, is {where}; give its place now with {option}")
    return place


def _place(path: str, run: RunConfig) -> str | None:
    """`path` as it can be opened from here; None if it is nowhere, or none is named."""
    if not path:
        return None
    if run.started_in and not _is_here(run.started_in):
        started = os.path.join(run.started_in, path)
        if _is_there(started):
            return started
    return path if _is_there(path) else None


def _is_there(path: str) -> bool:
    name = os.path.basename(path)
    path, _ = split_part(path)
    return os.path.exists(path) or ("{" in name and os.path.isdir(os.path.dirname(path) or "."))  # shards {000..031}


def _is_here(folder: str) -> bool:
    return os.path.isdir(folder) and os.path.samefile(folder, os.curdir)
