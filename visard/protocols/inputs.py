"""What `visard evaluate` scores, embeddings that are there or a data set to be embedded, and what it writes.

In: MODEL|EMBEDDINGS and DATA as the user names them. Out: `Scored`, whose ids and labels are known before anything is
embedded (which may take hours), and the folder of `--out` with result.json and pictures.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from visard.console import say
from visard.data.dataset import FaceDataset, open_dataset
from visard.data.unaligned import unaligned_remark
from visard.embed import embed_dataset, is_embeddings, load_embeddings
from visard.errors import UserError
from visard.pages import contact_sheet, write_image
from visard.records import Embeddings, Int64Array, ModelSpec, Result
from visard.runtime import Flip, load

SHEET_COLUMNS = 6

Open = Callable[[ModelSpec], FaceDataset]
"""Crops as a model needs them."""


@dataclass(frozen=True)
class Scored:
    """What is scored.

    Args:
        ids: N image ids.
        labels: (N,) int64, -1 = unlabelled.
        dataset: the images; None where embeddings came without.
        embed: gives the embeddings, in the order of `ids`.
    """

    ids: Sequence[str]
    labels: Int64Array
    dataset: FaceDataset | None
    embed: Callable[[], Embeddings]


def scored(
    model: Path, data: str, *, protocol: str, flip: Flip, batch_size: int, device: str, opened: Open | None = None
) -> Scored:
    """Opens MODEL|EMBEDDINGS and DATA.

    Args:
        model: run, model directory, .onnx file or embeddings directory.
        data: data set; may be "" with embeddings.
        protocol: named in an error.
        flip, batch_size, device: of the embedding.
        opened: opens DATA for a model; None = `open_dataset`.

    Raises:
        UserError: embeddings with another flip or of another data set, or a model without data.
    """
    if is_embeddings(model):
        embeddings = load_embeddings(model)
        if flip not in ("none", embeddings.flip):
            raise UserError(
                f"{model}: these embeddings were made with flip {embeddings.flip}, not {flip}; "
                f"embed again with --flip {flip}"
            )
        dataset = _open_embedded(data, embeddings) if data else None
        if dataset is not None and (strangers := set(embeddings.ids) - set(dataset.ids)):
            raise UserError(
                f"{data}: is not what {model} was made from: {len(strangers):,} of its images are not in "
                f"it, such as {min(strangers)}; name the data set that was embedded"
            )
        return Scored(embeddings.ids, embeddings.labels, dataset, lambda: embeddings)
    if not data:
        raise UserError(f"name the data set after the model: visard evaluate {protocol} MODEL DATA")
    embedder = load(model, device, batch_size=batch_size)
    crops = open_for(embedder.spec, data) if opened is None else opened(embedder.spec)
    if remark := unaligned_remark(crops, data):
        say(remark)
    return Scored(tuple(crops.ids), crops.labels, crops, lambda: embed_dataset(embedder, crops, flip, batch_size))


def open_for(spec: ModelSpec, data: str) -> FaceDataset:
    """A data set as the model needs it."""
    return open_dataset(data, size=spec.input_size, resize=True, framing=spec.framing)


def _open_embedded(data: str, embeddings: Embeddings) -> FaceDataset:
    """The data set that embeddings are of, as their model saw it where it is known."""
    return open_for(ModelSpec(**embeddings.spec), data) if embeddings.spec else open_dataset(data)


def write_result(out: Path, result: Result, dataset: FaceDataset | None, *, pictures: bool, what: str) -> Result:
    """OUT/result.json and, where there is a data set, the pictures of its examples.

    Args:
        pictures: asked for.
        what: the examples, for people.

    Returns:
        The result, whose examples name their pictures.
    """
    out.mkdir(parents=True, exist_ok=True)
    if pictures and dataset is not None:
        result = _write_pictures(out, result, dataset)
    elif pictures:
        say(f"no pictures of {what}: name the data set after the embeddings to get them")
    temporary = out / f".result.json.{os.getpid()}.tmp"
    temporary.write_text(result.to_json(), encoding="utf-8")
    os.replace(temporary, out / "result.json")
    return result


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
