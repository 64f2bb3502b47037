"""Crops from a data set as batches: decoded, mirrored, augmented, in the sampler's order, ahead of their step.

In: a `FaceDataset`, `DataConfig`, `EpochSampler` and perhaps an augmentation. Out: `records.Batch` of uint8 crops,
which the device normalises (on the CPU it would cost as much as decoding). What a batch holds follows from (data set,
seed, epoch, step, rank, world size) alone: not from the number of workers, nor from where the run was resumed.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.context
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from visard.config import DataConfig, FramingConfig
from visard.console import say
from visard.data.augment import augmentation, in_order
from visard.data.broken import readable
from visard.data.dataset import BatchedDataset, BatchedPoints, FaceDataset, WritingDataset
from visard.data.decode import crops
from visard.data.framing import Photographs
from visard.data.lines import take
from visard.data.sampler import EpochSampler
from visard.data.slots import Slots
from visard.data.transforms import Augment, Sample, SampleRandom, mirror_points
from visard.device import keep_freed_memory
from visard.errors import FormatError, UserError
from visard.records import Batch, Float32Array, Int64Array, UInt8Array

AHEAD = 2
"""Batches that are made while one is used."""

HELD = 4
"""Batches that the training may hold on to, beyond those that are being made, before more shared memory is taken."""

Extras = Callable[[Int64Array, NDArray[np.bool_]], dict[str, NDArray[Any]]]
"""(indices, flipped) of a batch's images -> arrays that join `Batch.extras`; pickles into worker processes."""

CLEAN = "clean_crop"
"""Name in `Batch.extras` of the crops before they were augmented."""

LEAVE = getattr(signal, "SIGUSR1", None)
"""Ends a worker; where there are no such signals (Windows), a process ends its workers without asking them."""

_Task = tuple[int, Int64Array, Int64Array | None, int | None]
"""Epoch, indices, repeats, and where the crops go in shared memory: a slot, or None for memory of their own."""
_MISSING = np.full((5, 2), np.nan, np.float32)


class Loader:
    """Iterates over the rest of the sampler's epoch; the next iteration goes on with the next epoch.

    The sampler's position moves when a batch is handed out: saved after the step that used the batch, it names the
    step after. workers = 0 loads in a thread of this process, which helps because decoding lets go of the
    interpreter; above 0 in so many processes, which stay between epochs.

    Args:
        dataset: crops; `WritingDataset.images_into` or `BatchedDataset.images` is used where there is one.
        config: flip probability, augmentation and workers.
        sampler: order, seed and position.
        augment: called with each sample, after the flip and before `config.augment`, and its own generator; pickles
            where processes are spawned.
        pin_memory: put batches into page-locked memory, from where copies to a GPU are asynchronous.
        extras: more of each image, looked up where the batch is made.
        keep_clean: hand on the crops as they are before augmentation (mirrored alike), (B, S, S, 3) uint8, as
            `extras["clean_crop"]`; not without an augmentation, where `images` are they. A loader process sends twice
            as much.
    """

    def __init__(
        self,
        dataset: FaceDataset,
        config: DataConfig,
        sampler: EpochSampler,
        augment: Augment | None = None,
        *,
        pin_memory: bool = False,
        extras: Extras | None = None,
        keep_clean: bool = False,
    ) -> None:
        assert sampler.length == len(dataset), (sampler.length, len(dataset))
        self.sampler = sampler
        self._pin_memory = pin_memory
        augment = in_order(augment, augmentation(config.augment))
        self._maker = _BatchMaker(
            dataset,
            sampler.seed,
            config.flip_probability,
            augment,
            skip_broken=config.broken == "skip",
            labels_ignored=config.labels == "ignored",
            extras=extras,
            keep_clean=keep_clean,
            framing=config.framing,
        )
        self.broken: dict[str, int] = {}
        """What was wrong with images that were replaced (`data.broken` = "skip") -> how often."""
        self._processes: DataLoader[dict[str, Any]] | None = None
        self._slots: Slots | None = None
        if config.workers:
            self._slots = Slots(config.workers * AHEAD + HELD, sampler.most_per_rank, dataset.size)
            self._maker.slots = self._slots
            self._processes = DataLoader(
                self._maker,
                batch_size=None,
                sampler=_Tasks(sampler, self._slots),
                num_workers=config.workers,
                multiprocessing_context=_processes_context(),
                collate_fn=_as_it_is,
                worker_init_fn=_start_worker,
                persistent_workers=True,
                prefetch_factor=AHEAD,
                # its own generator: otherwise each epoch takes a number from torch's, and a resumed run differs
                generator=torch.Generator().manual_seed(0),
            )

    def __len__(self) -> int:
        """Steps an epoch."""
        return self.sampler.steps

    def __iter__(self) -> Iterator[Batch]:
        for fields in self._fields():
            self.sampler.advance()
            self._count(fields.pop("broken", ()))
            yield _batch(fields)

    def _fields(self) -> Iterator[dict[str, Any]]:
        if self._processes is None:
            return _ahead(self._make, _Tasks(self.sampler))
        received = map(self._received, _started(self._processes))
        return _ahead(_pinned, received) if self._pin_memory else received

    def _received(self, fields: dict[str, Any]) -> dict[str, Any]:
        slot = fields.pop("slot", None)
        if slot is not None and self._slots is not None:
            fields["images"] = self._slots.hand_out(slot, len(fields["ids"]))
        return fields

    def _count(self, problems: Iterable[str]) -> None:
        for problem in problems:
            if problem not in self.broken:
                say(f"{problem}; the next good image takes its place ({len(self.broken) + 1} broken so far)")
            self.broken[problem] = self.broken.get(problem, 0) + 1

    def _make(self, task: _Task) -> dict[str, Any]:
        fields = self._maker[task]
        return _pinned(fields) if self._pin_memory else fields


def batches(dataset: FaceDataset, batch_size: int) -> Iterator[Batch]:
    """The whole data set in its own order, as it is: for evaluation. The last batch may be smaller.

    Args:
        batch_size: images a batch.
    """
    maker = _BatchMaker(dataset, 0, 0.0, None)
    starts = range(0, len(dataset), batch_size)
    tasks = ((0, np.arange(at, min(at + batch_size, len(dataset))), None, None) for at in starts)
    for fields in _ahead(maker.__getitem__, tasks):
        yield _batch(fields)


class _BatchMaker(Dataset[dict[str, Any]]):
    """A task -> the fields of a batch as arrays; the same in a thread and in a loader process.

    Attributes:
        slots: where crops are written to in a loader process.
    """

    def __init__(
        self,
        dataset: FaceDataset,
        seed: int,
        flip_probability: float,
        augment: Augment | None,
        *,
        skip_broken: bool = False,
        labels_ignored: bool = False,
        extras: Extras | None = None,
        keep_clean: bool = False,
        framing: FramingConfig | None = None,
    ) -> None:
        self._labels_ignored = labels_ignored
        self._extras, self._keep_clean = extras, keep_clean
        self._framing = framing
        self._dataset, self._seed, self._flip_probability, self._augment = dataset, seed, flip_probability, augment
        self._skip_broken = skip_broken
        self.slots: Slots | None = None
        self._labels: Int64Array | None = None  # asked for once in each process: some data sets compute them
        self._random = SampleRandom(seed, 0)

    def __getitem__(self, task: _Task) -> dict[str, Any]:
        try:
            try:
                return self._make(*task)
            except FormatError:
                if not self._skip_broken:
                    raise
                epoch, indices, repeats, slot = task
                indices, problems = readable(self._dataset, indices)
                return self._make(epoch, indices, repeats, slot) | {"broken": [str(problem) for problem in problems]}
        except UserError as error:  # DataLoader would wrap it in a traceback; `_batch` raises it in the loop
            return {"error": error}

    def _make(self, epoch: int, indices: Int64Array, repeats: Int64Array | None, slot: int | None) -> dict[str, Any]:
        dataset = self._dataset
        ids = take(dataset.ids, indices)
        if self._labels is None:
            self._labels = dataset.labels
        labels = np.full(len(indices), -1, np.int64) if self._labels_ignored else self._labels[indices]
        if self._random.epoch != epoch:
            self._random = SampleRandom(self._seed, epoch)
        random = self._random
        # an image that an epoch draws again is mirrored and augmented anew
        streams = ids if repeats is None else tuple(f"{i}\n{n}" if n else i for i, n in zip(ids, repeats, strict=True))
        flipped = random.flips(streams, self._flip_probability)
        if slot is None or self.slots is None:
            images = crops(len(indices), dataset.size)
        else:
            images = self.slots.rows(slot, len(indices))
        if self._framing is not None and isinstance(dataset, Photographs):
            # a stream of its own: the augmentation's numbers do not depend on it
            for index, stream, image in zip(indices.tolist(), streams, images, strict=True):
                image[...] = dataset.part(index, self._framing, random.generator(f"{stream}\npart"))
            _mirror(images, flipped)
        else:
            _write_images(dataset, indices, flipped, images)
        points = _points(dataset, indices)
        if points is not None:
            points[flipped] = mirror_points(points[flipped], dataset.size)
        extras: dict[str, NDArray[Any]] = {} if self._extras is None else self._extras(indices, flipped)
        if self._augment is not None:
            if self._keep_clean:
                extras[CLEAN] = images.copy()
            given = _given(points, len(ids))
            names = zip(ids, streams, labels.tolist(), flipped.tolist(), strict=True)
            for i, (image_id, stream, label, mirrored) in enumerate(names):
                image = images[i]
                sample = self._augment(Sample(image, given[i], label, image_id, mirrored), random.generator(stream))
                if sample.image is not image:
                    images[i] = sample.image
                for name, value in sample.extras.items():
                    if name not in extras:
                        extras[name] = _zeros(len(ids), value)
                    extras[name][i] = value
                if points is not None and (sample.points is None or sample.points is not given[i]):
                    points[i] = _MISSING if sample.points is None else sample.points
        made = {"labels": labels, "ids": ids, "flipped": flipped, "points": points, "extras": extras}
        return made | ({"images": images} if slot is None else {"slot": slot})


class _Tasks(Sampler[_Task]):
    """The steps that are left of the sampler's epoch, when the first of them is asked for."""

    def __init__(self, sampler: EpochSampler, slots: Slots | None = None) -> None:
        self._sampler, self._slots = sampler, slots

    def __iter__(self) -> Iterator[_Task]:
        sampler, slots = self._sampler, self._slots
        if slots is not None:  # DataLoader asks once its processes have done, or thrown away, what they had to do
            slots.reclaim()
        epoch = sampler.epoch
        for step in range(sampler.step, sampler.steps):
            indices = sampler.batch(epoch, step)
            slot = None if slots is None else slots.reserve(len(indices))
            yield epoch, indices, sampler.repeats(epoch, step), slot


def _write_images(dataset: FaceDataset, indices: Int64Array, flipped: NDArray[np.bool_], images: UInt8Array) -> None:
    """Writes the crops into `images`, (B, S, S, 3) uint8, mirrored where `flipped`."""
    if isinstance(dataset, WritingDataset):
        dataset.images_into(indices, images, flipped)
        return
    if isinstance(dataset, BatchedDataset):
        images[...] = dataset.images(indices)
    else:
        for index, image in zip(indices.tolist(), images, strict=True):
            image[...] = dataset.image(index)
    _mirror(images, flipped)


def _mirror(images: UInt8Array, flipped: NDArray[np.bool_]) -> None:
    """Mirrors the crops where `flipped`, in place."""
    for row in np.flatnonzero(flipped).tolist():
        image = images[row]
        cv2.flip(image, 1, dst=image)


def _points(dataset: FaceDataset, indices: Int64Array) -> Float32Array | None:
    """(B, 5, 2) float32 with NaN for an image without landmarks; None if no image has any."""
    if isinstance(dataset, BatchedPoints):
        points = dataset.all_points(indices)
    else:
        found = [dataset.points(i) for i in indices.tolist()]
        points = np.array([_MISSING if p is None else p for p in found], np.float32).reshape(-1, 5, 2)
    return None if np.isnan(points).all() else points


def _zeros(count: int, like: Any) -> NDArray[Any]:
    """`count` numbers or arrays of the kind of `like`, all 0."""
    like = np.asarray(like)
    return np.zeros((count, *like.shape), like.dtype)


def _given(points: Float32Array | None, count: int) -> list[Float32Array | None]:
    """Of each image; None of those that have none."""
    if points is None:
        return [None] * count
    missing = np.isnan(points).any(axis=(1, 2)).tolist()
    return [None if none else some for none, some in zip(missing, points, strict=True)]


def _ahead(make: Callable[[_Task], dict[str, Any]], tasks: Iterable[_Task]) -> Iterator[dict[str, Any]]:
    """`map(make, tasks)`, made in a thread up to `AHEAD` results before they are asked for."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="visard-loader")
    waiting: deque[Future[dict[str, Any]]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(make, task))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pinned(fields: dict[str, Any]) -> dict[str, Any]:
    """Arrays as tensors in page-locked memory."""
    return _as_tensors(fields, lambda tensor: tensor.pin_memory())


def _batch(fields: dict[str, Any]) -> Batch:
    if "error" in fields:
        raise fields["error"]
    return Batch(**_as_tensors(fields, lambda tensor: tensor))


def _as_tensors(fields: dict[str, Any], put: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """Arrays as tensors, `put` somewhere; those among the extras too."""
    tensors = {k: put(torch.from_numpy(v)) if isinstance(v, np.ndarray) else v for k, v in fields.items()}
    if tensors.get("extras"):
        tensors["extras"] = _as_tensors(tensors["extras"], put)
    return tensors


def _as_it_is(fields: Any) -> Any:
    """Instead of DataLoader's collation; a named function, so that it pickles."""
    return fields


def _start_worker(_: int) -> None:
    cv2.setNumThreads(1)
    keep_freed_memory()  # 5 us a crop: otherwise every batch gets fresh pages from the system
    # Ctrl-C and job schedulers signal the whole group: the training saves and then ends its workers itself.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if LEAVE is not None:
        signal.signal(LEAVE, lambda *_: os._exit(0))


def _started(processes: DataLoader[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """`iter(processes)`, whose workers leave when this process exits; its SIGTERM they ignore, and it would wait."""
    before = set(multiprocessing.active_children())
    running = iter(processes)
    for worker in set(multiprocessing.active_children()) - before:
        atexit.register(_end, worker.pid)
    return running


def _end(pid: int) -> None:
    if LEAVE is not None and pid in {child.pid for child in multiprocessing.active_children()}:
        os.kill(pid, LEAVE)


def _processes_context() -> multiprocessing.context.BaseContext:
    """How workers are started: never by forking this process, whose threads (OpenMP, the prefetch) may hold locks.

    Forking it was seen to hang for ever once torch had computed in it. The fork server imports torch once for all.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    return context
