"""Embeddings of a data set: `visard embed MODEL DATA OUT`, and the directory that they are kept in.

In: a model and a data set of aligned crops. Out: OUT with vectors.npy (N, D) float32, norms.npy (N,), ids.txt,
    labels.npy (N,) and
spec.json (the model's spec and what was done with the mirrored view). Anybody's vectors.npy with an ids.txt beside it
will do for scoring; the other files are optional then.

An interrupted run leaves OUT.partial, which the same command continues. One process embeds; several are not shared
out yet.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from visard.console import Answer, progress, say
from visard.data.dataset import BatchedDataset, FaceDataset, open_dataset
from visard.errors import FormatError, UserError
from visard.records import Embeddings, Float32Array, ModelSpec
from visard.runtime import Embedder, Flip, find_model, load

FORMAT = 1
JOURNAL = "journal.json"
JOURNAL_SECONDS = 5.0
NORM_ROWS = 65536


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Embeddings of every image of a data set, in its order."""

    model: tyro.conf.Positional[Path]
    """Run directory, model directory or .onnx file."""
    data: tyro.conf.Positional[str]
    """Data set: prepared directory, image folder, .rec file or `rendered:...`."""
    out: tyro.conf.Positional[Path]
    """Directory to write."""
    flip: Flip = "none"
    """What to do with the mirrored view: nothing, add its embedding, or put it behind (twice the size)."""
    batch_size: int = 64
    """Images at once."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch-size is {self.batch_size}; at least 1 is needed")


def main(config: EmbedConfig) -> Answer:
    """`visard embed`."""
    if config.out.exists():
        raise UserError(f"{config.out} exists; choose another name or remove it")
    embedder = load(config.model, config.device, batch_size=config.batch_size)
    dataset = open_dataset(config.data, size=embedder.spec.input_size)
    embeddings = embed_to_directory(
        embedder, dataset, config.out, config.flip, config.batch_size, hash_model(config.model)
    )
    count, dim = embeddings.vectors.shape
    people = len(set(embeddings.labels[embeddings.labels >= 0].tolist()))
    value = {"out": str(config.out), "images": count, "embedding_dim": dim, "identities": people, "flip": config.flip}
    return Answer(
        value, f"{config.out}: {count:,} embeddings of {dim} dimensions, {people:,} identities, flip {config.flip}"
    )


def embed_dataset(
    embedder: Embedder, dataset: FaceDataset, flip: Flip = "none", batch_size: int = 64, *, quiet: bool = False
) -> Embeddings:
    """Embeddings in memory, for a data set that fits there.

    Args:
        embedder: the model.
        dataset: crops of the model's own size.
        flip: "none", "sum" or "concat".
        batch_size: images decoded and embedded at once.
        quiet: without progress.

    Raises:
        UserError: the data set's crops have another size, or an embedding is not finite.
    """
    vectors = np.empty((len(dataset), _dim(embedder, flip)), dtype=np.float32)
    with progress("embedding", len(dataset), quiet=quiet) as bar:
        for start, block in _blocks(embedder, dataset, flip, batch_size, 0):
            vectors[start : start + len(block)] = block
            bar.advance(len(block))
    return Embeddings(vectors, tuple(dataset.ids), _labels(dataset), asdict(embedder.spec), flip)


def embed_to_directory(
    embedder: Embedder, dataset: FaceDataset, out: Path, flip: Flip, batch_size: int, model_hash: str
) -> Embeddings:
    """As `embed_dataset`, written as it is made, and continued where an earlier call was interrupted.

    OUT.partial holds the vectors and a journal: how many are done, and a key of everything that they depend on. With
    another key it is begun anew.

    Args:
        out: directory that appears when all is done.
        model_hash: of the weights, see `hash_model`.

    Returns:
        The embeddings, memory-mapped from `out`.
    """
    partial = out.with_name(out.name + ".partial")
    # Embeddings checks the ids before hours are spent on them.
    header = Embeddings(
        np.empty((len(dataset), 0), np.float32), tuple(dataset.ids), _labels(dataset), asdict(embedder.spec), flip
    )
    key = _key(header, model_hash)
    done = _continue_from(partial, key)
    shape = (len(dataset), _dim(embedder, flip))
    if done is None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        done = 0
    path = partial / "vectors.npy"
    fresh = done == 0
    vectors = np.lib.format.open_memmap(path, "w+" if fresh else "r+", np.float32, shape if fresh else None)
    _write_journal(partial, key, done)
    if done:
        say(f"{partial}: going on after {done:,} of {len(dataset):,} images")
    with progress("embedding", len(dataset) - done) as bar:
        written = time.monotonic()
        for start, block in _blocks(embedder, dataset, flip, batch_size, done):
            vectors[start : start + len(block)] = block
            bar.advance(len(block))
            if time.monotonic() - written > JOURNAL_SECONDS:
                vectors.flush()
                _write_journal(partial, key, start + len(block))
                written = time.monotonic()
    vectors.flush()
    _write_sidecars(partial, Embeddings(vectors, header.ids, header.labels, header.spec, flip))
    os.replace(partial, out)
    (out / JOURNAL).unlink()
    return load_embeddings(out)


def save_embeddings(embeddings: Embeddings, directory: str | Path) -> None:
    """Writes an embeddings directory, complete or not at all.

    Raises:
        UserError: the directory exists.
    """
    directory = Path(directory)
    if directory.exists():
        raise UserError(f"{directory} exists; choose another name or remove it")
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        np.save(temporary / "vectors.npy", np.ascontiguousarray(embeddings.vectors, dtype=np.float32))
        _write_sidecars(temporary, embeddings)
        os.replace(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def is_embeddings(path: str | Path) -> bool:
    """Whether `path` is an embeddings directory, as opposed to a model."""
    return (Path(path) / "vectors.npy").is_file()


def load_embeddings(directory: str | Path) -> Embeddings:
    """Embeddings from their directory, the vectors memory-mapped.

    Only vectors.npy and ids.txt are needed; without labels.npy all are unlabelled, without spec.json the model is
    unknown.

    Raises:
        UserError: the directory is not there, or its files do not belong together.
        FormatError: a file does not hold what it should.
    """
    directory = Path(directory)
    if not is_embeddings(directory):
        raise UserError(f"{directory}: no embeddings here (vectors.npy is missing); make them with `visard embed`")
    vectors = _load_array(directory / "vectors.npy", np.floating, 2)
    if vectors.dtype != np.float32:
        vectors = np.asarray(vectors, dtype=np.float32)
    ids_path = directory / "ids.txt"
    if not ids_path.is_file():
        raise UserError(f"{directory}: ids.txt is missing; write one image id a line, in the order of vectors.npy")
    ids = tuple(ids_path.read_text(encoding="utf-8").splitlines())
    labels_path, spec_path = directory / "labels.npy", directory / "spec.json"
    if labels_path.is_file():
        labels = np.asarray(_load_array(labels_path, np.integer, 1), dtype=np.int64)
    else:
        labels = np.full(len(ids), -1, dtype=np.int64)
    spec, flip = _read_spec(spec_path) if spec_path.is_file() else ({}, "none")
    return Embeddings(vectors, ids, labels, spec, flip)


def hash_model(path: str | Path) -> str:
    """SHA-256 of the weights that `path` means (of the files of an .onnx with external data, all)."""
    model = find_model(Path(path))
    if model.is_file():
        files = sorted(model.parent.glob(model.name + "*"))
    else:
        files = [model / "model.safetensors"]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _blocks(
    embedder: Embedder, dataset: FaceDataset, flip: Flip, batch_size: int, first: int
) -> Iterator[tuple[int, Float32Array]]:
    size = embedder.spec.input_size
    if dataset.size != size:
        raise UserError(
            f"the data set's crops are {dataset.size} px, the model takes {size} px; prepare them with --size {size}"
        )
    for start in range(first, len(dataset), batch_size):
        rows = range(start, min(start + batch_size, len(dataset)))
        if isinstance(dataset, BatchedDataset):
            crops = dataset.images(np.array(rows, dtype=np.int64))
        else:
            crops = np.stack([dataset.image(row) for row in rows])
        block = embedder.embed(crops, flip)
        if not np.isfinite(block).all():
            bad = rows[int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])]
            raise UserError(f"the model gives a non-finite embedding for {dataset.ids[bad]}; its weights are damaged")
        yield start, block


def _dim(embedder: Embedder, flip: Flip) -> int:
    return embedder.spec.embedding_dim * (2 if flip == "concat" else 1)


def _labels(dataset: FaceDataset) -> np.ndarray:
    return np.array(dataset.labels, dtype=np.int64)


def _key(header: Embeddings, model_hash: str) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, header.spec, header.flip, model_hash], sort_keys=True).encode())
    digest.update("\n".join(header.ids).encode())
    digest.update(header.labels.tobytes())
    return digest.hexdigest()


def _continue_from(partial: Path, key: str) -> int | None:
    """How many vectors are there already, None if the directory is not there or was made from something else."""
    journal = partial / JOURNAL
    if not journal.is_file() or not (partial / "vectors.npy").is_file():
        return None
    values = json.loads(journal.read_text())
    return int(values["done"]) if values["key"] == key else None


def _write_journal(partial: Path, key: str, done: int) -> None:
    temporary = partial / (JOURNAL + ".tmp")
    temporary.write_text(json.dumps({"key": key, "done": done}))
    os.replace(temporary, partial / JOURNAL)


def _write_sidecars(directory: Path, embeddings: Embeddings) -> None:
    if any("\n" in image_id or "\r" in image_id for image_id in embeddings.ids):
        raise UserError("embeddings: an image id holds a line break; rename the image")
    vectors = embeddings.vectors
    blocks = [vectors[start : start + NORM_ROWS] for start in range(0, len(vectors), NORM_ROWS)]
    norms = [np.linalg.norm(block, axis=1).astype(np.float32) for block in blocks]  # never a second copy of all vectors
    np.save(directory / "norms.npy", np.concatenate([np.empty(0, np.float32), *norms]))
    np.save(directory / "labels.npy", embeddings.labels)
    (directory / "ids.txt").write_text("".join(f"{image_id}\n" for image_id in embeddings.ids), encoding="utf-8")
    spec = {"format": FORMAT, "flip": embeddings.flip, "model": embeddings.spec}
    (directory / "spec.json").write_text(json.dumps(spec, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _load_array(path: Path, kind: type[np.floating[Any]] | type[np.integer[Any]], dimensions: int) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise FormatError(path, f"is not a whole .npy array ({error}); make the embeddings again") from error
    if not np.issubdtype(array.dtype, kind) or array.ndim != dimensions:
        raise FormatError(path, f"expected {dimensions} dimensions of {kind.__name__}, got {array.dtype} {array.shape}")
    return array


def _read_spec(path: Path) -> tuple[dict[str, Any], str]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        spec, flip, version = values["model"], values["flip"], values["format"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise FormatError(
            path, f"is not the spec.json of embeddings ({error}); remove it if the model is unknown"
        ) from error
    if version != FORMAT or flip not in ("none", "sum", "concat"):
        raise FormatError(path, f"format {version!r} with flip {flip!r} is not known; format {FORMAT} is")
    if spec:
        ModelSpec.from_json(json.dumps(spec), where=f"{path}: model")
    return spec, flip
