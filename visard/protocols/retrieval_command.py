"""`visard evaluate retrieval MODEL|EMBEDDINGS DATA`: from files to files.

In: `RetrievalConfig`. Out: the result as a table or JSON, and with `--out` a folder with result.json and, as pictures,
the queries whose first image is the most wrong.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from visard.console import Answer
from visard.data.dataset import FaceDataset, JoinedDataset
from visard.data.formats.joined import Source
from visard.embed import is_embeddings
from visard.errors import UserError
from visard.protocols.inputs import Scored, open_for, scored, write_result
from visard.protocols.retrieval import Roles, check_ks, evaluate_retrieval, own_ks, own_roles
from visard.records import ModelSpec, Result
from visard.runtime import Flip


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """Is the nearest image of the same identity? Recall@K and MAP@R."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run directory, model directory, .onnx file or embeddings directory."""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = ""
    """Data set; each image is sought among all others, or as DATA's own list has it (In-Shop's #test). With embeddings
    only needed for pictures and such a list."""
    gallery: str = ""
    """Another data set in which the images of DATA are sought, by identities of the same names."""
    ks: tuple[int, ...] = ()
    """K of Recall@K; none = DATA's own (In-Shop's, SOP's), else 1 2 4 8."""
    flip: Flip = "none"
    """Mirrored view: not used, its embedding added, or put behind."""
    out: Path | None = None
    """Folder for result.json and pictures; written over if it holds an earlier result."""
    pictures: bool = True
    """Write the most wrong answers as pictures into `--out`."""
    examples: int = 24
    """Most wrong answers kept."""
    batch_size: int = 64
    """Images embedded at once."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""

    def __post_init__(self) -> None:
        if self.ks:
            check_ks(self.ks)
        if self.batch_size < 1 or self.examples < 0:
            raise UserError("--batch-size must be at least 1 and --examples not negative")


def main(config: RetrievalConfig) -> Answer:
    """The retrieval protocol.

    Raises:
        UserError: a model or data set that cannot be used, or nothing that could be found.
    """
    source = _source(config)
    roles = _roles(config, source)
    ks = config.ks or own_ks(source.dataset)
    result = evaluate_retrieval(source.embed(), roles, ks=ks, examples=config.examples)
    settings = {"model": str(config.model), "data": config.data, "gallery": config.gallery}
    result = dataclasses.replace(result, settings=result.settings | settings)
    if config.out is not None:
        what = "wrong answers"
        result = write_result(config.out, result, source.dataset, pictures=config.pictures, what=what)
    return Answer(dataclasses.asdict(result), result_text(result))


def result_text(result: Result) -> str:
    """The result as a table for people."""
    counts, values = result.counts, result.metrics
    lines = [
        f"{counts['queries']:,} queries, {counts['gallery']:,} images in the gallery ({result.settings['sets']}), "
        f"{counts['identities']:,} identities, flip {result.settings['flip']}",
        "",
    ]
    for name, value in values.items():
        assert value is not None  # without an answer to any query there is no result
        label = {"map@r": "MAP@R", "r_precision": "R-precision"}.get(name, name.replace("recall", "Recall"))
        low, high = result.intervals[name]
        lines.append(f"  {label:<14}{100 * value:7.3f} %   95 % {100 * low:.2f} to {100 * high:.2f} %")
    if missing := counts["queries_without_answer"]:
        lines.append(f"\n{missing:,} queries have no image of their identity in the gallery and are left out.")
    return "\n".join(lines)


def _source(config: RetrievalConfig) -> Scored:
    if config.gallery and is_embeddings(config.model):
        raise UserError(
            f"{config.model}: embeddings know identities by number only, so those of --gallery cannot be told; "
            "give the model"
        )

    def both(spec: ModelSpec) -> FaceDataset:
        parts = (("query", config.data), ("gallery", config.gallery))
        sources = [Source(name=name, dataset=open_for(spec, data)) for name, data in parts]
        return JoinedDataset(sources, same_names="merge")

    return scored(
        config.model,
        config.data,
        protocol="retrieval",
        flip=config.flip,
        batch_size=config.batch_size,
        device=config.device,
        opened=both if config.gallery else None,
    )


def _roles(config: RetrievalConfig, source: Scored) -> Roles | None:
    """None = every image against all others."""
    dataset = source.dataset
    if config.gallery:
        assert isinstance(dataset, JoinedDataset)  # `_source` joined it
        of_query = np.array([dataset.place(row)[0] == 0 for row in range(len(dataset))])
        labelled = np.asarray(dataset.labels) >= 0
        return Roles(np.flatnonzero(of_query & labelled), np.flatnonzero(~of_query))
    return own_roles(dataset, source.ids)
