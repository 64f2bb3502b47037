"""Which images `visard mask` makes: of a whole data set, of the sides of a list of pairs, of a template set.

In: the configuration, the opened data set. Out: `Plan`: the images (`Job`), and the lists that will name them.

One image may be needed bare and masked, or masked by either tool. Pairs: with one side masked, each masked image is a
twin with an id of its own. Templates: an image keeps its id as long as only one version of it is needed. A template
that stands in both columns of the list of pairs, of which only one is masked, is there twice: bare under its number,
masked under a new one (counted on from the highest), which the pairs of the masked column name instead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from visard.data.dataset import PairBinDataset
from visard.data.formats.template_lists import TemplateList, TemplatePairs, read_template_pairs, read_templates
from visard.errors import UserError
from visard.protocols.pair_files import consecutive_pairs, read_pairs, rows_of
from visard.recipes.mask import Job, MaskCopyConfig, Tool

TWIN = "masked"
META = "meta"
"""Folder of a template set's lists, as IJB-C has it."""

Versions = dict[tuple[int, Tool | None], int]
"""(row of an image, tool or None = bare) -> number of its job."""


@dataclass(frozen=True)
class Templates:
    """The template set to be made.

    Args:
        listed: its list; images are ids of the new data set.
        jobs: (L) number of the job that makes each line's image.
        pairs: with the new numbers; None = the set has none.
        renumbered: templates that are there twice: number -> that of the masked one.
        absent: lines whose image the data set does not have, left out.
        absent_pairs: pairs left out with them.
    """

    listed: TemplateList
    jobs: Sequence[int]
    pairs: TemplatePairs | None
    renumbered: dict[int, int]
    absent: int
    absent_pairs: int


@dataclass(frozen=True)
class Plan:
    """What is to be made.

    Args:
        jobs: the images.
        pairs: number of the first image's job, of the second's, same person, fold.
        absent_pairs: pairs left out because an image of theirs is not there.
        templates: of a template set.
    """

    jobs: Sequence[Job]
    pairs: Sequence[tuple[int, int, bool, int]] = ()
    absent_pairs: int = 0
    templates: Templates | None = None


def plan(config: MaskCopyConfig, dataset: Any) -> Plan:
    """The images to be made.

    Raises:
        UserError: lists that are not of this data set, or settings that need a list.
        FormatError: a mistake in a list.
    """
    if config.loose and Path(config.src).resolve().name == META:
        raise UserError(f"{config.src}: OUT keeps its lists under that name; rename the folder")
    if config.templates is not None:
        if config.pairs is None and (config.side != "both" or config.other_tool is not None):
            raise UserError(
                "--templates needs --pairs, the list of pairs of templates, to know the sides; or mask all: --side both"
            )
        names = [path.name for path in (config.templates, config.pairs, Path(config.points)) if path is not None]
        if len(set(names)) != len(names):
            raise UserError(f"{config.templates}: another list is called {config.templates.name} too; rename one")
        return _of_templates(config, config.templates, dataset)
    if config.pairs is None and not isinstance(dataset, PairBinDataset):
        if config.side != "second" or config.other_tool is not None:
            raise UserError("--side and --other-tool need --pairs (or a .bin set); without pairs every image is masked")
        return Plan([Job(row, dataset.ids[row], config.tool) for row in range(len(dataset))])
    return _of_pairs(config, dataset)


def _tools(config: MaskCopyConfig) -> tuple[Tool | None, Tool | None]:
    """Of the first side and of the second; None = it stays as it is."""
    if config.side == "both":
        return config.tool, config.other_tool or config.tool
    return (config.tool, None) if config.side == "first" else (None, config.tool)


def _of_pairs(config: MaskCopyConfig, dataset: Any) -> Plan:
    if config.pairs is not None:
        pairs = read_pairs(config.pairs, dataset.ids, allow_missing=True)
    else:
        pairs = consecutive_pairs(dataset.same, source=Path(config.src).name)
    present = pairs.select(pairs.present)
    if not len(present):
        raise UserError(f"{config.pairs}: none of its pairs has both images in {config.src}; is this the data set?")
    first, second = _tools(config)
    left, right = present.left.tolist(), present.right.tolist()
    jobs, numbers = _jobs(
        [(row, first) for row in left] + [(row, second) for row in right], config, dataset.ids, twins=first != second
    )
    rows = zip(left, right, present.same.tolist(), present.fold.tolist(), strict=True)
    numbered = [(numbers[a, first], numbers[b, second], same, fold) for a, b, same, fold in rows]
    return Plan(jobs, numbered, absent_pairs=len(pairs) - len(present))


def _of_templates(config: MaskCopyConfig, path: Path, dataset: Any) -> Plan:
    listed = read_templates(path)
    found = rows_of(listed.images, dataset.ids)
    rows = np.array([found[name] for name in listed.images], np.int64)
    if not (rows >= 0).any():
        raise UserError(
            f"{path}: none of its {len(rows):,} images (first: {listed.images[0]}) is in {config.src}; is this the "
            "data set?"
        )
    pairs, absent_pairs = None, 0
    if config.pairs is not None:
        pairs = read_template_pairs(config.pairs, listed.templates)
        whole = pairs.among(listed.templates[rows >= 0])
        absent_pairs, pairs = len(pairs) - len(whole), whole
        if not len(pairs):
            raise UserError(f"{config.pairs}: none of its pairs has images of both templates in {config.src}")
    there = np.flatnonzero(rows >= 0).tolist()
    versions, renumbered = _versions(config, listed, pairs)
    # What stands in the list, in its order; then the second versions of templates, in that order again.
    of_line = [versions[template] for template in listed.templates.tolist()]
    lines = [(line, of_line[line][0]) for line in there]
    lines += [(line, version) for line in there for version in of_line[line][1:]]
    row_of = rows.tolist()
    wanted = [(row_of[line], tool) for line, (tool, _) in lines]
    unnamed = sorted(set(range(len(dataset))) - set(row_of))
    jobs, numbers = _jobs([*wanted, *((row, None) for row in unnamed)], config, dataset.ids, twins=False)
    made = [numbers[version] for version in wanted]
    new = TemplateList(
        [jobs[number].id for number in made],
        np.array([number for _, (_, number) in lines], np.int64),
        [listed.rest[line] for line, _ in lines],
        listed.separator,
    )
    if pairs is not None and renumbered:
        pairs = _renumbered(config, pairs, renumbered)
    return Plan(jobs, templates=Templates(new, made, pairs, renumbered, len(rows) - len(there), absent_pairs))


def _versions(
    config: MaskCopyConfig, listed: TemplateList, pairs: TemplatePairs | None
) -> tuple[dict[int, list[tuple[Tool | None, int]]], dict[int, int]]:
    """Template -> (tool, number) of each version of it, the one that keeps its number first; the new numbers."""
    first, second = _tools(config)
    tools: dict[int, list[Tool | None]] = defaultdict(list)
    if pairs is None:
        for template in np.unique(listed.templates).tolist():
            tools[template] = [first]  # both sides, by one tool: the only setting without pairs
    else:
        for column, tool in ((pairs.first, first), (pairs.second, second)):
            for template in np.unique(column).tolist():
                if tool not in tools[template]:
                    tools[template].append(tool)
    highest = int(listed.templates.max())
    versions: dict[int, list[tuple[Tool | None, int]]] = {}
    renumbered: dict[int, int] = {}
    for template in np.unique(listed.templates).tolist():
        # The bare one keeps its number.
        of_it = sorted(tools.get(template) or [None], key=lambda tool: tool is not None)
        if len(of_it) == 2:
            renumbered[template] = highest + 1 + len(renumbered)
        versions[template] = [(tool, renumbered[template] if k else template) for k, tool in enumerate(of_it)]
    return versions, renumbered


def _renumbered(config: MaskCopyConfig, pairs: TemplatePairs, renumbered: dict[int, int]) -> TemplatePairs:
    """The pairs with the new numbers in the column whose templates have them: the masked one, of two the second."""
    column = pairs.first if config.side == "first" else pairs.second
    old = np.array(sorted(renumbered), np.int64)
    new = np.array([renumbered[template] for template in old.tolist()], np.int64)
    place = np.minimum(np.searchsorted(old, column), len(old) - 1)
    column = np.where(old[place] == column, new[place], column)
    return replace(pairs, first=column) if config.side == "first" else replace(pairs, second=column)


def _jobs(
    wanted: Sequence[tuple[int, Tool | None]], config: MaskCopyConfig, ids: Sequence[str], *, twins: bool
) -> tuple[list[Job], Versions]:
    """A job for each version of an image, by row.

    Args:
        wanted: versions, in any order and as often as they are named.
        twins: masked images have ids of their own; otherwise only where an image is needed in two versions.
    """
    keys = sorted(dict.fromkeys(wanted), key=lambda key: (key[0], key[1] or ""))
    count: dict[int, int] = defaultdict(int)
    for row, _ in keys:
        count[row] += 1
    jobs = [
        Job(row, _twin(ids[row], tool, config) if twins or count[row] > 1 else ids[row], tool) for row, tool in keys
    ]
    if len({job.id for job in jobs}) != len(jobs):
        raise UserError(f"{config.src}: has images named as masked twins would be (.{TWIN}); rename them")
    return jobs, {key: number for number, key in enumerate(keys)}


def _twin(image_id: str, tool: Tool | None, config: MaskCopyConfig) -> str:
    """`a/b.jpg` -> `a/b.masked.jpg`."""
    if tool is None:
        return image_id
    word = f"{TWIN}-{tool}" if config.side == "both" else TWIN
    stem, dot, suffix = image_id.rpartition(".")
    return f"{stem}.{word}{dot}{suffix}" if dot and "/" not in suffix else f"{image_id}.{word}"
