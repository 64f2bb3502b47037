"""`visard evaluate pairs MODEL|EMBEDDINGS DATA`: from files to files.

In: `PairsConfig`. Out: the result as a table or JSON, and with `--out` a folder with result.json and the hardest pairs
as pictures.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from visard.console import Answer
from visard.errors import UserError
from visard.protocols.drawing import draw_pairs, own_pairs
from visard.protocols.inputs import Scored, scored, write_result
from visard.protocols.pairs import FARS, Missing, Pairs, compare_pairs, evaluate_pairs, far_name, read_pairs
from visard.records import Embeddings, Result
from visard.runtime import Flip


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Are two images of the same person? LFW-style verification in folds."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run directory, model directory, .onnx file or embeddings directory."""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = ""
    """Data set of aligned crops, or a .bin pair set; with embeddings only needed for pictures and a .bin's answers."""
    pairs: Path | None = None
    """List of pairs: LFW's, CALFW's, CPLFW's, AgeDB-30's, CFP's Protocol/Split/FP, or `left right same [fold]`. Without
    one a .bin has its own, and of other data they are drawn from the labels."""
    against: Path | None = None
    """Another model, or its embeddings of the same data: is the difference in accuracy more than luck?"""
    flip: Flip = "none"
    """Mirrored view: not used, its embedding added, or put behind."""
    missing: Missing = "error"
    """Pairs with an image that is not there: an error, left out, or counted as wrong decisions."""
    count: int = 3000
    """Genuine and as many impostor pairs drawn where there is no list."""
    folds: int = 10
    """Folds where the list names none."""
    seed: int = 0
    """Of the draw."""
    fars: tuple[float, ...] = FARS
    """False accept rates to report TAR at."""
    out: Path | None = None
    """Folder for result.json and pictures; written over if it holds an earlier result."""
    pictures: bool = True
    """Write the hardest pairs as pictures into `--out`."""
    examples: int = 24
    """Hardest genuine and impostor pairs kept."""
    batch_size: int = 64
    """Images embedded at once."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""

    def __post_init__(self) -> None:
        if not all(0 < far <= 1 for far in self.fars):
            raise UserError(f"--fars {' '.join(map(str, self.fars))}: each must be above 0 and at most 1")
        if self.batch_size < 1 or self.examples < 0:
            raise UserError("--batch-size must be at least 1 and --examples not negative")
        if self.folds < 2:
            raise UserError(f"--folds is {self.folds}; a threshold is chosen on the other folds, so use at least 2")


def main(config: PairsConfig) -> Answer:
    """The pair protocol from files to files."""
    source = _opened(config, config.model)
    # Before anything is embedded: a mistake in the second name should not cost the first one's time.
    other = None if config.against is None else _opened(config, config.against)
    dataset, ids, pairs = source.dataset, source.ids, None
    if config.pairs is not None:
        pairs = read_pairs(config.pairs, ids, folds=config.folds, allow_missing=config.missing != "error")
    else:
        pairs = own_pairs(dataset, ids, config.folds, config.data)
    drawn = pairs is None
    if pairs is None:
        pairs = draw_pairs(source.labels, ids, config.count, config.folds, config.seed)
    embeddings = source.embed()
    result = evaluate_pairs(embeddings, pairs, fars=config.fars, missing=config.missing, examples=config.examples)
    settings = result.settings | {"model": str(config.model), "data": config.data}
    result = dataclasses.replace(result, settings=settings)
    remarks = _remarks(config, pairs, result, drawn=drawn)
    if other is not None:
        result, remark = _compared(config, result, embeddings, other.embed(), pairs)
        remarks.append(remark)
    if config.out is not None:
        result = write_result(config.out, result, dataset, pictures=config.pictures, what="the hardest pairs")
    return Answer(dataclasses.asdict(result), "\n".join([result_text(result), *remarks]))


def _opened(config: PairsConfig, model: Path) -> Scored:
    return scored(
        model, config.data, protocol="pairs", flip=config.flip, batch_size=config.batch_size, device=config.device
    )


def _compared(
    config: PairsConfig, result: Result, embeddings: Embeddings, against: Embeddings, pairs: Pairs
) -> tuple[Result, str]:
    """The result with the comparison in it, and the comparison in words."""
    if against.flip != embeddings.flip:
        raise UserError(
            f"{config.against}: embeddings with flip {against.flip}, those of {config.model} have {embeddings.flip}; "
            "embed both alike"
        )
    compared = compare_pairs(embeddings, against, pairs, missing=config.missing)
    settings = result.settings | {"against": str(config.against)}
    if compared is None:
        return dataclasses.replace(result, settings=settings), ""
    accuracy, difference, interval = compared
    result = dataclasses.replace(
        result,
        metrics=result.metrics | {"accuracy_against": accuracy, "accuracy_difference": difference},
        intervals=result.intervals | {"accuracy_difference": interval},
        settings=settings,
    )
    low, high = interval
    verdict = "better" if low > 0 else "worse" if high < 0 else "no difference that these pairs could show"
    return result, (
        f"\nagainst {config.against}: accuracy {_percent(accuracy).strip()}, difference {100 * difference:+.3f} "
        f"points, 95 % {100 * low:+.2f} to {100 * high:+.2f} (paired bootstrap): {verdict}"
    )


def result_text(result: Result) -> str:
    """The result as a table for people, undefined rates included."""
    values, counts = result.metrics, result.counts
    head = (
        f"{counts['pairs']:,} pairs ({counts['genuine']:,} genuine, {counts['impostor']:,} impostor) "
        f"of {counts['images']:,} images, {result.settings['folds']} folds, flip {result.settings['flip']}"
    )
    if values["accuracy"] is None:
        kind = "impostor" if counts["genuine"] else "genuine"
        return f"{head}\n\n  undefined: there is no {kind} pair, so no accuracy, EER or TAR at a FAR"
    lines = [
        head,
        "",
        f"  {'accuracy':<18}{_percent(values['accuracy'])} ± {_percent(values['accuracy_std']).strip()}   "
        f"95 % {_interval(result, 'accuracy')}",
        f"  {'  on usual grid':<18}{_percent(values['accuracy_usual_grid'])} ± "
        f"{_percent(values['accuracy_usual_grid_std']).strip()}",
        f"  {'threshold':<18}{_number(values['threshold'])}   cosine, mean over folds",
        f"  {'AUC':<18}{_number(values['auc'])}",
        f"  {'EER':<18}{_percent(values['eer'])}",
    ]
    for far in result.settings["fars"]:
        name = far_name(far)
        label = f"TAR at FAR {name.removeprefix('tar@far=')}"
        if values[name] is None:
            lines.append(
                f"  {label:<18}undefined: {counts['impostor']:,} impostors, at least {1 / far:,.0f} are needed"
            )
        else:
            lines.append(f"  {label:<18}{_percent(values[name])}   95 % {_interval(result, name)}")
    return "\n".join(lines)


def _remarks(config: PairsConfig, pairs: Pairs, result: Result, *, drawn: bool) -> list[str]:
    counts, remarks = result.counts, []
    if counts["pairs_missing"]:
        fate = "left out" if config.missing == "skip" else "counted as wrong"
        remarks.append(
            f"\n{counts['pairs_missing']:,} of {len(pairs):,} pairs name an image that is not there: {fate}."
        )
    if drawn and min(counts["genuine"], counts["impostor"]) < config.count:
        remarks.append(
            f"\n{config.count:,} pairs of each kind were asked for, the data set has {counts['genuine']:,} genuine and "
            f"{counts['impostor']:,} impostor pairs within its folds."
        )
    if drawn and result.settings["folds"] < config.folds:
        remarks.append(f"\n{result.settings['folds']} folds instead of {config.folds}: each needs two identities.")
    return remarks


def _percent(value: float | None) -> str:
    return "undefined" if value is None else f"{100 * value:7.3f} %"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:8.5f}"


def _interval(result: Result, name: str) -> str:
    low, high = result.intervals[name]
    return f"{100 * low:.2f} to {100 * high:.2f} %"
