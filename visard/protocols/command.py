"""`visard evaluate PROTOCOL MODEL|EMBEDDINGS DATA`: embeds what is not embedded yet and hands it to the protocol.

In: a model with a data set, or an embeddings directory. Out: the result as a table or JSON, and with `--out` a folder
with result.json and the hardest pairs as pictures.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from visard.console import Answer, parse, say
from visard.data.dataset import FaceDataset, open_dataset
from visard.data.unaligned import unaligned_remark
from visard.embed import embed_dataset, is_embeddings, load_embeddings
from visard.errors import UserError
from visard.pages import contact_sheet, write_image
from visard.protocols.drawing import draw_pairs, own_pairs
from visard.protocols.pairs import FARS, Missing, Pairs, evaluate_pairs, far_name, read_pairs
from visard.records import Embeddings, Int64Array, Result
from visard.runtime import Flip, load

SHEET_COLUMNS = 6


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


PROTOCOLS = {"pairs": (PairsConfig, "verification of pairs of images, LFW style")}


def run(arguments: list[str]) -> Answer:
    """`visard evaluate`."""
    overview = "\n".join(f"  {name:<8} {line}" for name, (_, line) in PROTOCOLS.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        if not arguments:
            raise UserError(f"which protocol? known are {', '.join(PROTOCOLS)}; `visard evaluate --help` explains them")
        usage = "usage: visard evaluate PROTOCOL MODEL|EMBEDDINGS DATA [options]"
        text = f"{usage}\n\n{overview}\n\nvisard evaluate PROTOCOL --help shows its options."
        return Answer({"protocols": list(PROTOCOLS)}, text)
    name, *rest = arguments
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}; known are {', '.join(PROTOCOLS)}")
    config, line = PROTOCOLS[name]
    return evaluate(parse(config, rest, command=f"visard evaluate {name}", description=line))


def evaluate(config: PairsConfig) -> Answer:
    """The pair protocol from files to files."""
    source = _source(config)
    dataset, ids, pairs = source.dataset, source.ids, None
    if config.pairs is not None:
        pairs = read_pairs(config.pairs, ids, folds=config.folds, allow_missing=config.missing != "error")
    else:
        pairs = own_pairs(dataset, ids, config.folds, config.data)
    drawn = pairs is None
    if pairs is None:
        pairs = draw_pairs(source.labels, ids, config.count, config.folds, config.seed)
    result = evaluate_pairs(source.embed(), pairs, fars=config.fars, missing=config.missing, examples=config.examples)
    settings = result.settings | {"model": str(config.model), "data": config.data}
    result = dataclasses.replace(result, settings=settings)
    remarks = _remarks(config, pairs, result, drawn=drawn)
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        if config.pictures and dataset is not None:
            result = _write_pictures(config.out, result, dataset)
        elif config.pictures:
            say("no pictures of the hardest pairs: name the data set after the embeddings to get them")
        temporary = config.out / f".result.json.{os.getpid()}.tmp"
        temporary.write_text(result.to_json(), encoding="utf-8")
        os.replace(temporary, config.out / "result.json")
    return Answer(dataclasses.asdict(result), "\n".join([result_text(result), *remarks]))


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


@dataclass(frozen=True)
class _Source:
    """What is scored. The pairs are looked up in the ids before anything is embedded, which may take hours."""

    ids: Sequence[str]
    labels: Int64Array
    dataset: FaceDataset | None
    embed: Callable[[], Embeddings]


def _source(config: PairsConfig) -> _Source:
    if is_embeddings(config.model):
        embeddings = load_embeddings(config.model)
        if config.flip not in ("none", embeddings.flip):
            raise UserError(
                f"{config.model}: these embeddings were made with flip {embeddings.flip}, not {config.flip}; "
                f"embed again with --flip {config.flip}"
            )
        dataset = open_dataset(config.data) if config.data else None
        if dataset is not None and (strangers := set(embeddings.ids) - set(dataset.ids)):
            raise UserError(
                f"{config.data}: is not what {config.model} was made from: {len(strangers):,} of its images are not in "
                f"it, such as {min(strangers)}; name the data set that was embedded"
            )
        return _Source(embeddings.ids, embeddings.labels, dataset, lambda: embeddings)
    if not config.data:
        raise UserError("name the data set after the model: visard evaluate pairs MODEL DATA")
    embedder = load(config.model, config.device, batch_size=config.batch_size)
    crops = open_dataset(config.data, size=embedder.spec.input_size, resize=True)
    if remark := unaligned_remark(crops, config.data):
        say(remark)
    return _Source(
        tuple(crops.ids), crops.labels, crops, lambda: embed_dataset(embedder, crops, config.flip, config.batch_size)
    )


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


def _write_pictures(out: Path, result: Result, dataset: FaceDataset) -> Result:
    """hardest_genuine.jpg and hardest_impostor.jpg as sheets, and each pair by itself for the report."""
    rows = {image_id: row for row, image_id in enumerate(dataset.ids)}
    (out / "pictures").mkdir(exist_ok=True)
    examples: dict[str, list[dict[str, Any]]] = {}
    for kind, found in result.examples.items():
        strips, captions, entries = [], [], []
        for place, example in enumerate(found):
            absent = [example[side] for side in ("left", "right") if example[side] not in rows]
            if absent:
                raise UserError(
                    f"the data set has no image {absent[0]!r}; name the one that the embeddings were made of"
                )
            strip = np.concatenate([dataset.image(rows[example[side]]) for side in ("left", "right")], axis=1)
            name = f"pictures/{kind}_{place + 1:02d}.jpg"
            write_image(out / name, strip)
            strips.append(strip)
            captions.append(f"{example['score']:+.3f}\n{example['left']}\n{example['right']}")
            entries.append({**example, "picture": name})
        if strips:
            size = strips[0].shape[0]
            title = f"{kind.replace('_', ' ')} pairs, cosine"
            sheet = contact_sheet(strips, captions, columns=SHEET_COLUMNS, tile=(2 * size, size), title=title)
            write_image(out / f"{kind}.jpg", sheet)
        examples[kind] = entries
    return dataclasses.replace(result, examples=examples)


def _percent(value: float | None) -> str:
    return "undefined" if value is None else f"{100 * value:7.3f} %"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:8.5f}"


def _interval(result: Result, name: str) -> str:
    low, high = result.intervals[name]
    return f"{100 * low:.2f} to {100 * high:.2f} %"
