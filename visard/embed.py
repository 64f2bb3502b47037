"""Embeddings of a data set: `visard embed MODEL DATA OUT`, and the directory that they are kept in.

In: a model and a data set of aligned crops. Out: OUT with vectors.npy (N, D) float32, norms.npy (N,), ids.txt,
labels.npy (N,) and spec.json (the model's spec and what was done with the mirrored view). Anybody's vectors.npy with
an ids.txt beside it will do for scoring; the other files are optional then.

Under torchrun every process embeds its share of the batches. A batch holds the same images whatever the number of
processes, so the bytes are those of one process where each computes alike: the same machine, threads a process and
batch size. Otherwise they agree as float32 products of another order do (about 1e-6 of a vector's length).

An interrupted run leaves OUT.partial, which the same command continues, with any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as td
import tyro

from visard import dist, embed_journal
from visard.console import Answer, progress, say
from visard.data.dataset import BatchedDataset, FaceDataset, open_dataset
from visard.data.unaligned import unaligned_remark
from visard.device import choose_device
from visard.embed_files import FORMAT, write_sidecars
from visard.embed_files import is_embeddings as is_embeddings
from visard.embed_files import load_embeddings as load_embeddings
from visard.embed_files import save_embeddings as save_embeddings
from visard.errors import Interrupted, UserError
from visard.records import Embeddings, Float32Array, Int64Array, UInt8Array
from visard.runtime import Embedder, Flip, find_model, load

JOURNAL_SECONDS = 5.0
BATCHES_AHEAD = 3
"""Batches decoded while one is embedded."""
DECODING_THREADS = min(4, os.cpu_count() or 1)
"""Decoding runs outside Python's lock."""


Rows = range | Int64Array
"""Rows of a data set: consecutive, or any."""

Some = TypeVar("Some")

Dtype = Literal["float32", "float16"]


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Embeddings of every image of a data set, in its order."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run directory, model directory or .onnx file."""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Data set: prepared directory, image folder, .rec file or `rendered:...`."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Directory to write."""
    flip: Flip = "none"
    """What to do with the mirrored view: nothing, add its embedding, or put it behind (twice the size)."""
    dtype: Dtype = "float32"
    """Of vectors.npy; float16 takes half the room and turns a vector by less than 0.03 degrees."""
    batch_size: int = 64
    """Images at once."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch-size is {self.batch_size}; at least 1 is needed")


def main(config: EmbedConfig) -> Answer:
    """`visard embed`.

    Raises:
        UserError: a model, data set or OUT that cannot be used.
        Interrupted: by Ctrl-C or SIGTERM; what is done is kept.
    """
    if config.out.exists():
        raise UserError(f"{config.out} exists; choose another name or remove it")
    device = choose_device(config.device) if "RANK" in os.environ else None
    if device is not None and device.type == "cuda" and device.index is None:
        device = choose_device(f"cuda:{dist.local_rank()}")
    embedder = load(config.model, config.device if device is None else str(device), batch_size=config.batch_size)
    dataset = open_dataset(config.data, size=embedder.spec.input_size, resize=True, framing=embedder.spec.framing)
    if (remark := unaligned_remark(dataset, config.data)) and os.environ.get("RANK", "0") == "0":
        say(remark)
    model_hash = hash_model(config.model)
    if device is not None:
        dist.init(device)
    try:
        if not dist.is_main():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # rank 0 answers for all
        embeddings = embed_to_directory(
            embedder, dataset, config.out, config.flip, config.batch_size, model_hash, config.dtype
        )
    except KeyboardInterrupt as cause:
        raise Interrupted.by(cause, embed_journal.what_is_kept(_partial(config.out), len(dataset))) from None
    finally:
        dist.close()
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

    In a process group every process calls it with the same arguments: each embeds its share, all get the whole.

    Args:
        embedder: the model.
        dataset: crops of the model's own size; read from several threads.
        flip: "none", "sum" or "concat".
        batch_size: images decoded and embedded at once.
        quiet: without progress.

    Raises:
        UserError: the data set's crops have another size, or an embedding is not finite; in every process.
    """
    vectors = np.zeros((len(dataset), _dim(embedder, flip)), dtype=np.float32)
    mine = _my_share(_batches([(0, len(dataset))], batch_size))
    with _failing_together(), progress(_title(), sum(map(len, mine)), quiet=quiet or not dist.is_main()) as bar:
        for rows, block in _blocks(embedder, dataset, flip, mine):
            vectors[np.asarray(rows)] = block
            bar.advance(len(block))
    _add_up(vectors)
    return Embeddings(vectors, tuple(dataset.ids), _labels(dataset), asdict(embedder.spec), flip)


def class_sums(
    embedder: Embedder, dataset: FaceDataset, classes: range, batch_size: int = 64, *, quiet: bool = False
) -> Float32Array:
    """(C, D) float32: of every class asked for, the sum of its images' embeddings brought to length 1; streamed.

    In a process group every process calls it. Where each asks for other classes, it embeds their images and nothing is
    exchanged; where all ask for all, each embeds its share and the sums are added up.

    Args:
        embedder: the model.
        dataset: crops of the model's own size; unlabelled images are left out.
        classes: which, consecutive.
        batch_size: images decoded and embedded at once.
        quiet: without progress.

    Raises:
        UserError: as `embed_dataset`.
    """
    sums, labels = np.zeros((len(classes), embedder.spec.embedding_dim), np.float32), _labels(dataset)
    wanted = np.flatnonzero((labels >= classes.start) & (labels < classes.stop))
    mine: Sequence[Int64Array] = np.split(wanted, range(batch_size, len(wanted), batch_size))
    everyone = len(classes) == len(dataset.identities)
    if everyone:
        mine = _my_share(mine)
    with _failing_together(), progress(_title(), sum(map(len, mine)), quiet=quiet or not dist.is_main()) as bar:
        for rows, block in _blocks(embedder, dataset, "none", mine):
            lengths = np.linalg.norm(block, axis=1, keepdims=True).clip(min=1e-12)
            np.add.at(sums, labels[rows] - classes.start, block / lengths)
            bar.advance(len(block))
    if everyone:
        total = torch.from_numpy(sums)
        total.copy_(dist.all_reduce_sum(total.to(_collective_device())))
    return sums


def embed_to_directory(
    embedder: Embedder,
    dataset: FaceDataset,
    out: Path,
    flip: Flip,
    batch_size: int,
    model_hash: str,
    dtype: Dtype = "float32",
) -> Embeddings:
    """As `embed_dataset`, written as it is made, and continued where an earlier call was interrupted.

    OUT.partial holds the vectors and a journal of each process: which rows are done, and a key of everything that they
    depend on. With another key it is begun anew. All processes must see it on one file system.

    Args:
        out: directory that appears when all is done.
        model_hash: of the weights, see `hash_model`.
        dtype: of the file.

    Returns:
        The embeddings, memory-mapped from `out`, of that type.

    Raises:
        UserError: as `embed_dataset`; or an embedding is too long for float16.
    """
    partial = _partial(out)
    # Embeddings checks the ids before hours are spent on them.
    nothing = np.empty((len(dataset), 0), np.float32)
    header = Embeddings(nothing, tuple(dataset.ids), _labels(dataset), asdict(embedder.spec), flip, weights=model_hash)
    key = _key(header, model_hash, dtype)
    shape = len(dataset), _dim(embedder, flip)
    rows_done = embed_journal.begin(partial, key, shape, dtype) if dist.is_main() else []
    rows_done = dist.broadcast_object(rows_done)
    vectors = np.lib.format.open_memmap(partial / "vectors.npy", "r+")
    mine = _my_share(_batches(embed_journal.missing(rows_done, len(dataset)), batch_size))
    # Rank 0 has noted what was done before; a share is one stretch of the open rows, with those between.
    noted = rows_done if dist.is_main() else []
    with _failing_together(), progress(_title(), sum(map(len, mine)), quiet=not dist.is_main()) as bar:
        written = time.monotonic()
        try:
            for rows, block in _blocks(embedder, dataset, flip, mine):
                start = int(rows[0])
                if dtype == "float16" and np.abs(block).max() > np.finfo(np.float16).max:
                    raise UserError("an embedding has a component above 65504, which float16 cannot hold; use float32")
                vectors[start : start + len(block)] = block
                noted = embed_journal.union([*noted, (start, start + len(block))])
                bar.advance(len(block))
                if time.monotonic() - written > JOURNAL_SECONDS:
                    vectors.flush()
                    embed_journal.write_journal(partial, key, noted)
                    written = time.monotonic()
        finally:
            vectors.flush()
            embed_journal.write_journal(partial, key, noted)
    if dist.is_main():
        write_sidecars(partial, replace(header, vectors=vectors))
        os.replace(partial, out)
        for journal in embed_journal.journal_files(out):
            journal.unlink()
    dist.barrier()
    vectors = np.load(out / "vectors.npy", mmap_mode="r")
    return replace(header, vectors=vectors)


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
    embedder: Embedder, dataset: FaceDataset, flip: Flip, batches: Sequence[Rows]
) -> Iterator[tuple[Rows, Float32Array]]:
    """(its rows, embeddings) of each batch; the next ones are decoded meanwhile."""
    size = embedder.spec.input_size
    if dataset.size != size:
        raise UserError(
            f"the data set's crops are {dataset.size} px, the model takes {size} px; prepare them with --size {size}"
        )
    # Rendering computes with all of torch's threads by itself.
    threads = 1 if isinstance(dataset, BatchedDataset) else DECODING_THREADS
    pool = ThreadPoolExecutor(threads, "decoding")
    try:
        waiting: deque[Future[UInt8Array]] = deque()
        for number, rows in enumerate(batches):
            while len(waiting) <= BATCHES_AHEAD and number + len(waiting) < len(batches):
                waiting.append(pool.submit(_crops, dataset, batches[number + len(waiting)]))
            block = embedder.embed(waiting.popleft().result(), flip)
            if not np.isfinite(block).all():
                bad = int(rows[int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])])
                raise UserError(
                    f"the model gives a non-finite embedding for {dataset.ids[bad]}; its weights are damaged: "
                    "take an earlier checkpoint or export it again"
                )
            yield rows, block
    finally:
        pool.shutdown(cancel_futures=True)


def _crops(dataset: FaceDataset, rows: Rows) -> UInt8Array:
    if isinstance(dataset, BatchedDataset):
        return dataset.images(np.array(rows, dtype=np.int64))
    return np.stack([dataset.image(int(row)) for row in rows])


def _batches(stretches: Sequence[tuple[int, int]], batch_size: int) -> list[range]:
    """Stretches of rows (first, end), cut into batches from their beginnings."""
    return [
        range(start, min(start + batch_size, end))
        for first, end in stretches
        for start in range(first, end, batch_size)
    ]


def _my_share(batches: Sequence[Some]) -> Sequence[Some]:
    """This process's batches: one after another, as many as any other's or one less."""
    rank, world = dist.rank(), dist.world_size()
    return batches[len(batches) * rank // world : len(batches) * (rank + 1) // world]


def _add_up(vectors: Float32Array) -> None:
    """Every process's rows in every process, in place: the sum over processes of bits that all others left zero."""
    if dist.world_size() == 1:
        return
    bits = torch.from_numpy(vectors.view(np.int32))
    bits.copy_(dist.all_reduce_sum(bits.to(_collective_device())))


def _collective_device() -> torch.device:
    """Where the process group's collectives take their tensors."""
    nccl = dist.active() and td.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


@contextmanager
def _failing_together() -> Iterator[None]:
    """A user's mistake that one process finds is raised in all: the others would wait for it for ever."""
    failure: UserError | None = None
    try:
        yield
    except UserError as error:
        failure = error
    failures = [found for found in dist.all_gather_object(failure) if found is not None]
    if failures:
        raise failures[0]


def _title() -> str:
    return "embedding" if dist.world_size() == 1 else f"embedding, process 1 of {dist.world_size()}"


def _dim(embedder: Embedder, flip: Flip) -> int:
    return embedder.spec.embedding_dim * (2 if flip == "concat" else 1)


def _labels(dataset: FaceDataset) -> np.ndarray:
    return np.array(dataset.labels, dtype=np.int64)


def _key(header: Embeddings, model_hash: str, dtype: Dtype) -> str:
    made_of = [FORMAT, header.spec, header.flip, model_hash, dtype]
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode())
    digest.update("\n".join(header.ids).encode())
    digest.update(header.labels.tobytes())
    return digest.hexdigest()


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")
