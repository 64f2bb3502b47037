"""The directory that embeddings are kept in: written complete or not at all, read memory-mapped.

In: `Embeddings`. Out: DIR with vectors.npy (N, D), norms.npy (N,), ids.txt, labels.npy (N,) and spec.json (the model's
spec, the hash of its weights and what was done with the mirrored view); and back.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from visard.errors import FormatError, UserError
from visard.records import Embeddings, ModelSpec

FORMAT = 1
NORM_ROWS = 65536


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
        write_sidecars(temporary, embeddings)
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
    text = ids_path.read_text(encoding="utf-8", errors="surrogateescape")
    ids = tuple(text.removesuffix("\n").split("\n")) if text else ()
    labels_path, spec_path = directory / "labels.npy", directory / "spec.json"
    if labels_path.is_file():
        labels = np.asarray(_load_array(labels_path, np.integer, 1), dtype=np.int64)
    else:
        labels = np.full(len(ids), -1, dtype=np.int64)
    spec, flip, weights = read_spec(spec_path) if spec_path.is_file() else ({}, "none", "")
    return Embeddings(vectors, ids, labels, spec, flip, weights)


def write_sidecars(directory: Path, embeddings: Embeddings) -> None:
    """Writes all files but vectors.npy.

    Raises:
        UserError: an id that cannot be a line.
    """
    if any("\n" in image_id or "\r" in image_id for image_id in embeddings.ids):
        raise UserError("embeddings: an image id holds a line break; rename the image")
    vectors = embeddings.vectors
    blocks = [vectors[start : start + NORM_ROWS] for start in range(0, len(vectors), NORM_ROWS)]
    norms = [np.linalg.norm(block.astype(np.float32), axis=1) for block in blocks]  # never a second copy of all vectors
    np.save(directory / "norms.npy", np.concatenate([np.empty(0, np.float32), *norms]))
    np.save(directory / "labels.npy", embeddings.labels)
    text = "".join(f"{image_id}\n" for image_id in embeddings.ids)
    (directory / "ids.txt").write_text(text, encoding="utf-8", errors="surrogateescape", newline="\n")
    spec = {"format": FORMAT, "flip": embeddings.flip, "model": embeddings.spec, "weights": embeddings.weights}
    (directory / "spec.json").write_text(json.dumps(spec, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _load_array(path: Path, kind: type[np.floating[Any]] | type[np.integer[Any]], dimensions: int) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise FormatError(path, f"is not a whole .npy array ({error}); make the embeddings again") from error
    if not np.issubdtype(array.dtype, kind) or array.ndim != dimensions:
        raise FormatError(
            path,
            f"expected {dimensions} dimensions of {kind.__name__}, got {array.dtype} {array.shape}; make them again",
        )
    return array


def read_spec(path: Path) -> tuple[dict[str, Any], str, str]:
    """The model's spec, what was done with the mirrored view, the hash of the weights."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        spec, flip, version = values["model"], values["flip"], values["format"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise FormatError(
            path, f"is not the spec.json of embeddings ({error}); remove it if the model is unknown"
        ) from error
    if version != FORMAT or flip not in ("none", "sum", "concat"):
        raise FormatError(path, f"format {version!r} with flip {flip!r} is not known, format {FORMAT} is; embed again")
    if spec:
        ModelSpec.from_json(json.dumps(spec), where=f"{path}: model")
    return spec, flip, str(values.get("weights", ""))
