"""`visard mask SRC OUT`: masked copies of a data set or a pair set, with what was put on whom.

In: whatever `open_dataset` takes, perhaps a list of pairs. Out: OUT, complete or not at all. What is made is kept in
OUT.partial until OUT is complete: the same command goes on after any interruption, and gives the same bytes.

    the crops          a prepared data set, or a folder an identity (`--to folder`); ids and identities as they were
    masks.jsonl        a line an image, in the order of the data set: id, source, tool, points and the whole `Look`, or
                       why the crop was refused ("profile", "points", "outside", "unlike")
    masks.html         the first and the refused ones to look at, with counts; one file
    report.json        settings and counts
    pairs.txt          with `--pairs` (and of a .bin set): the same pairs of the masked images

With pairs, OUT holds the images that they name: `--side second` (the protocol "one side masked") keeps the first image
of each pair as it is and gives the second a masked twin, whose id has `.masked` before the suffix, since another pair
may need that image without; `--side both` masks all of them; with two tools the twins are told by the tool's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from visard.console import Answer
from visard.errors import UserError
from visard.masks.records import Kind, Wearing

Tool = Literal["mix", "uv", "template"]
Points = Literal["kept", "template", "detected"]
TWIN = "masked"


@dataclass(frozen=True, kw_only=True)
class MaskCopyConfig:
    """`visard mask`."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Aligned crops: a prepared folder, a folder of identities, a .rec, .bin or .tar file, a list."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to make; must not exist."""
    pairs: Path | None = None
    """A list of pairs, in any dialect that `visard evaluate pairs` reads: mask what it names, as `--side` says."""
    side: Literal["second", "both"] = "second"
    """With pairs: mask the second image of each pair, or both."""
    tool: Tool = "mix"
    """The 3D tool (uv), the 2D tool (template), or one of them drawn for each image."""
    other_tool: Tool | None = None
    """With --side both: the tool for the second image of each pair, if it is another one."""
    probability: float = 1.0
    """Share of the images that get a mask (of those that are to be masked)."""
    kinds: tuple[Kind, ...] = ()
    """Only these, as often among themselves as usual; by default all."""
    wearings: tuple[Wearing, ...] = ()
    """Only worn so: right, under-nose, chin; by default all, mostly right."""
    own: Path | None = None
    """One's own mask, a PNG with transparency, instead of drawn ones; its key points are in a .txt beside it, or in
    --own-points. For the 2D tool."""
    own_points: str = ""
    """"left x,y nose x,y right x,y left-low x,y chin x,y right-low x,y" in the PNG's pixels, in any order."""
    points: Points = "kept"
    """Landmarks: those that the data set has (the alignment template's where it has none), the template's for all, or
    found anew on the crops by YuNet (the template's where it finds none)."""
    refused: Literal["keep", "leave-out"] = "keep"
    """A crop that cannot be masked (an extreme profile, wrong points) stays as it is, or is left out with its pairs."""
    seed: int = 0
    """Another seed, other masks; each image's depends on seed and image id alone."""
    to: Literal["records", "folder"] = "records"
    """A prepared data set, or image files in a folder for each person."""
    quality: int = 95
    """JPEG quality of the crops; masked ones that were drawn to be compressed more have their own."""

    def __post_init__(self) -> None:
        _check(0 <= self.probability <= 1, f"--probability is {self.probability}; use 0 to 1")
        _check(1 <= self.quality <= 100, f"--quality is {self.quality}; use 1 to 100")
        _check(self.seed >= 0, f"--seed is {self.seed}; use 0 or more")
        _check(self.other_tool is None or self.side == "both", "--other-tool belongs to --side both; add it")
        _check(not self.own_points or self.own is not None, "--own-points belongs to --own MASK.png")
        _check(self.own is None or self.tool != "uv", "--own is for the 2D tool; choose --tool template")
        _check(self.own is None or self.other_tool is None, "--own and --other-tool exclude each other")


@dataclass(frozen=True)
class Job:
    """One image of OUT.

    Args:
        row: in the source.
        id: in OUT.
        tool: that masks it; None = it stays as it is.
    """

    row: int
    id: str
    tool: Tool | None


def main(config: MaskCopyConfig) -> Answer:
    """Masks everything.

    Raises:
        UserError: OUT exists, the settings do not fit the source, or something else than this command's unfinished work
            is in OUT.partial.
        FormatError: a broken image, an own mask or a list of pairs with a mistake.
        Interrupted: by Ctrl-C or SIGTERM; what is done is kept.
    """
    from visard.data.dataset import open_dataset
    from visard.kept_work import partial_of
    from visard.recipes.mask_writing import write_all

    if config.out.exists() and not partial_of(config.out).is_dir():
        raise UserError(f"{config.out} exists already; name another folder or remove it")
    dataset = open_dataset(config.src)
    pairs = _pairs_of(config, dataset)
    _check(
        pairs is not None or (config.side == "second" and config.other_tool is None),
        "--side and --other-tool need --pairs (or a .bin set); without pairs every image is masked",
    )
    jobs, listed = _jobs(config, dataset, pairs)
    report = write_all(config, dataset, jobs, listed)
    return Answer(value={"out": str(config.out), **report}, text=_text(config, report))


def _pairs_of(config: MaskCopyConfig, dataset: Any) -> Any:
    from visard.data.dataset import PairBinDataset
    from visard.protocols.pair_files import consecutive_pairs, read_pairs

    if config.pairs is not None:
        return read_pairs(config.pairs, dataset.ids, allow_missing=True)
    if isinstance(dataset, PairBinDataset):
        return consecutive_pairs(dataset.same, source=Path(config.src).name)
    return None


def _jobs(config: MaskCopyConfig, dataset: Any, pairs: Any) -> tuple[list[Job], list[tuple[int, int, bool, int]]]:
    """The images of OUT, and the pairs as (number of the first job, of the second, same, fold)."""
    if pairs is None:
        return [Job(row, dataset.ids[row], config.tool) for row in range(len(dataset))], []
    first: Tool | None = config.tool if config.side == "both" else None
    second: Tool = config.other_tool or config.tool
    present = pairs.select(pairs.present)
    if not len(present):
        raise UserError(f"{config.pairs}: none of its pairs has both images in {config.src}; is this the data set?")
    wanted: dict[tuple[int, Tool | None], None] = {}
    for left, right in zip(present.left.tolist(), present.right.tolist(), strict=True):
        wanted[left, first] = None
        wanted[right, second] = None
    keys = sorted(wanted, key=lambda key: (key[0], str(key[1] or "")))
    twins = config.side == "second" or config.other_tool not in (None, config.tool)
    jobs = [Job(row, _twin(dataset.ids[row], tool, config) if twins else dataset.ids[row], tool) for row, tool in keys]
    if len({job.id for job in jobs}) != len(jobs):
        raise UserError(f"{config.src}: has images named as masked twins would be (.{TWIN}); rename them")
    number = {key: k for k, key in enumerate(keys)}
    rows = zip(*(values.tolist() for values in (present.left, present.right, present.same, present.fold)), strict=True)
    return jobs, [(number[left, first], number[right, second], same, fold) for left, right, same, fold in rows]


def _twin(image_id: str, tool: Tool | None, config: MaskCopyConfig) -> str:
    """`a/b.jpg` -> `a/b.masked.jpg`."""
    if tool is None:
        return image_id
    word = TWIN if config.side == "second" else f"{TWIN}-{tool}"
    stem, dot, suffix = image_id.rpartition(".")
    return f"{stem}.{word}{dot}{suffix}" if dot and "/" not in suffix else f"{image_id}.{word}"


def _text(config: MaskCopyConfig, report: dict[str, Any]) -> str:
    refused = sum(report["refused"].values())
    parts = [f"{config.out}: {report['images']:,} images, {report['masked']:,} masked"]
    if refused:
        why = ", ".join(f"{count} {reason}" for reason, count in report["refused"].items() if count)
        parts.append(f"{refused:,} refused ({why}), {'left out' if config.refused == 'leave-out' else 'as they were'}")
    if report["pairs"]:
        parts.append(f"{report['pairs']:,} pairs in {config.out / 'pairs.txt'}")
    if report["pairs_left_out"]:
        parts.append(f"{report['pairs_left_out']:,} pairs left out")
    return "; ".join(parts) + f"; look at {config.out / 'masks.html'}"


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
