"""`visard mask SRC OUT`: masked copies of a data set, a pair set or a template set, with what was put on whom.

In: whatever `open_dataset` takes, perhaps with a list of pairs, or of templates and pairs of these. Out: OUT, complete
or not at all. What is made is kept in OUT.partial until OUT is complete: the same command goes on after any
interruption, and gives the same bytes.

    the crops          a prepared data set, or a folder an identity (`--to folder`); ids and identities as they were
    masks.jsonl        a line an image, in the order of the data set: id, source, tool, points and the whole `Look`, or
                       why the crop was refused ("profile", "points", "outside", "unlike")
    masks.html         the first and the refused ones to look at, with counts; one file
    report.json        settings and counts
    pairs.txt          with `--pairs` (and of a .bin set): the same pairs of the masked images
    meta/              with `--templates`: the lists of the template set, under the names that they had; with `--loose`
                       the list of points

With pairs, OUT holds the images that they name: `--side second` (the protocol "one side masked") keeps the first image
of each pair as it is and gives the second a masked twin, whose id has `.masked` before the suffix, since another pair
may need that image without; `--side both` masks all of them; with two tools the twins are told by the tool's name.
With templates, OUT holds every image, and masks those of the templates on the side that is asked for (`mask_sides`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from visard.console import Answer
from visard.errors import UserError
from visard.masks.records import Kind, Wearing

Tool = Literal["mix", "uv", "template"]
PointsWay = Literal["kept", "template", "detected"]


@dataclass(frozen=True, kw_only=True)
class MaskCopyConfig:
    """`visard mask`."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Aligned crops: a prepared folder, a folder of identities, a .rec, .bin or .tar file, a list."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to make; must not exist."""
    pairs: Path | None = None
    """A list of pairs, in any dialect that `visard evaluate pairs` reads: mask what it names, as `--side` says. With
    --templates: lines TEMPLATE TEMPLATE SAME, as IJB-C's ijbc_template_pair_label.txt."""
    templates: Path | None = None
    """A template set's list of images, lines IMAGE TEMPLATE MEDIA [SUBJECT], as IJB-C's ijbc_face_tid_mid.txt: mask the
    templates in one column of --pairs or in both, keep all else as it is."""
    side: Literal["first", "second", "both"] = "second"
    """With pairs: mask the first of each (with templates the gallery's side), the second (the probe's), or both."""
    tool: Tool = "mix"
    """The 3D tool (uv), the 2D tool (template), or one of them drawn for each image."""
    other_tool: Tool | None = None
    """With --side both: the tool for the second of each pair, if it is another one."""
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
    points: Annotated[str, tyro.conf.arg(metavar="{kept,template,detected}|FILE")] = "kept"
    """Landmarks: those that the data set has (the alignment template's where it has none), the template's for all,
    found anew on the crops by YuNet (the template's where it finds none), or those of a file in pixels of the crops: a
    .npy (N, K, 2) in their order, or lines ID x1 y1 ... xK yK [SCORE]; K = 5, 68, 106 or 468."""
    loose: bool = False
    """SRC is a folder of crops of any shape that are not aligned, as IJB-C's loose_crop: mask each where its face lies.
    Needs points of every image (--points FILE, or a points.csv in SRC); OUT gets a folder of SRC's name."""
    refused: Literal["keep", "leave-out"] = "keep"
    """A crop that cannot be masked (an extreme profile, wrong points) stays as it is, or is left out with its pairs."""
    seed: int = 0
    """Another seed, other masks; each image's depends on seed and image id alone."""
    to: Literal["records", "folder"] | None = None
    """A prepared data set (the default), or image files in a folder for each person; loose crops stay files."""
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
        _check(
            self.points in get_args(PointsWay) or "." in self.points or "/" in self.points,
            f"--points {self.points}: use kept, template, detected, or name a file of points",
        )
        _check(
            not (self.loose and self.points == "template"),
            "--loose and --points template exclude each other: these crops are not aligned to the template",
        )
        _check(not (self.loose and self.to == "records"), "--loose crops have many shapes, records one; leave --to out")


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
    from visard.recipes.mask_points import LooseCrops
    from visard.recipes.mask_sides import plan
    from visard.recipes.mask_writing import write_all

    if config.out.exists() and not partial_of(config.out).is_dir():
        raise UserError(f"{config.out} exists already; name another folder or remove it")
    dataset: Any = LooseCrops(Path(config.src)) if config.loose else open_dataset(config.src)
    report = write_all(config, dataset, plan(config, dataset))
    return Answer(value={"out": str(config.out), **report}, text=_text(config, report))


def _text(config: MaskCopyConfig, report: dict[str, Any]) -> str:
    refused = sum(report["refused"].values())
    parts = [f"{config.out}: {report['images']:,} images, {report['masked']:,} masked"]
    if refused:
        why = ", ".join(f"{count} {reason}" for reason, count in report["refused"].items() if count)
        parts.append(f"{refused:,} refused ({why}), {'left out' if config.refused == 'leave-out' else 'as they were'}")
    if "templates" in report:
        parts.append(f"{report['templates']:,} templates, {report['templates_masked']:,} of them masked")
        if report["renumbered"]:
            parts.append(f"{len(report['renumbered']):,} of them twins of templates that stand on both sides")
    if report["pairs"]:
        where = config.out / ("pairs.txt" if config.templates is None else "meta")
        parts.append(f"{report['pairs']:,} pairs in {where}")
    if report["pairs_left_out"]:
        parts.append(f"{report['pairs_left_out']:,} pairs left out")
    if report.get("lines_left_out"):
        parts.append(f"{report['lines_left_out']:,} lines of {config.templates} left out, whose images are not there")
    return "; ".join(parts) + f"; look at {config.out / 'masks.html'}"


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
