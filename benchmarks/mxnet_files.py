"""Files written here, read by real MXNet, and the other way round; and what MXNet's way of loading costs.

    python benchmarks/mxnet_files.py PYTHON [--data PREPARED] [--images 2048]

PYTHON is the interpreter of another environment that has mxnet 1.9.1, numpy < 1.24 and opencv (MXNet does not run
beside the numpy of visard). Checked byte for byte: records of every kind (whole, in parts, with the magic inside, one
label, several, none), the index, a prepared folder read as MXFaceDataset reads it, and a pair set. Then a process of
each, on one core: images a second of MXFaceDataset's way (read_idx, unpack, imdecode, PIL, mirror, tensor, normalise)
and of visard's loader on the same file, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = struct.pack("<I", 0xCED7230A)
ROUNDS = 5


def main() -> None:
    """Runs both sides and prints what was compared."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("python", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--side", choices=("write", "read", "rate"))
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.side:  # in the other environment
        {"write": mxnet_writes, "read": mxnet_reads, "rate": mxnet_rate}[arguments.side](arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        exchange(arguments.python, Path(folder), arguments.data)
        rates(arguments.python, Path(folder), arguments.data or Path(folder) / "set", arguments.images)


def payloads() -> list[tuple[Any, bytes]]:
    """(label or labels, image bytes) of records of every kind."""
    generator = np.random.RandomState(0)
    pieces = [b"", b"a", b"abcd", MAGIC, MAGIC * 3, b"abc" + MAGIC, b"abcd" + MAGIC + b"e", bytes(100_000)]
    pieces += [generator.bytes(n) for n in (1, 2, 3, 4, 5, 1000)]
    pieces += [generator.bytes(4 * n) + MAGIC + generator.bytes(m) for n, m in ((0, 0), (1, 1), (3, 4), (9, 2))]
    labels: list[Any] = [3.0, 0.0, -1.0, (1.0, 2.0), (5.0,), (0.5, 1.5, 2.5, 16777216.0)]
    return [(labels[i % len(labels)], piece) for i, piece in enumerate(pieces)]


def exchange(python: Path, folder: Path, data: Path | None) -> None:
    """Writes on each side and compares."""
    from visard.data.record_index import read_index
    from visard.data.recordio import RecordFile, pack, write_record

    ours = folder / "ours.rec"
    with open(ours, "wb") as rec, open(ours.with_suffix(".idx"), "w") as idx:
        for key, (label, image) in enumerate(payloads()):
            idx.write(f"{key}\t{rec.tell()}\n")
            write_record(rec, pack(label, key, image))
    other(python, "write", folder)
    theirs = folder / "theirs.rec"
    same = (
        ours.read_bytes() == theirs.read_bytes(),
        ours.with_suffix(".idx").read_bytes() == theirs.with_suffix(".idx").read_bytes(),
    )
    print(f"{len(payloads())} records of every kind: .rec equal {same[0]}, .idx equal {same[1]} (written by both)")
    keys, offsets = read_index(theirs.with_suffix(".idx"))
    file = RecordFile(theirs)
    good = 0
    for key, at in zip(keys.tolist(), offsets.tolist(), strict=True):
        label, image = payloads()[key]
        record = file.record(at)
        wanted = list(label) if isinstance(label, tuple) else [label]
        good += record.image == image and record.labels.tolist() == wanted and record.id == key
    print(f"read here, written by MXNet: {good} of {len(keys)} records with the same image bytes, labels and number")
    good = sum(payload == file.payload(at) for at, payload in file.scan())
    print(f"  and {good} without the index")
    pictures_of_mxnet(theirs.with_name("pictures.rec"))
    if data is None:
        make_set(folder / "set")
    print(other(python, "read", folder, data or folder / "set"), end="")


def pictures_of_mxnet(path: Path) -> None:
    from visard.data.dataset import open_dataset

    data: Any = open_dataset(path)
    hashes = json.loads(path.with_suffix(".json").read_text())
    good = sum(sum_of(data.encoded(i)) == hashes[i] for i in range(len(data)))
    print(f"pack_img of MXNet: {good} of {len(hashes)} JPEG files byte for byte; labels {data.labels.tolist()}")


def make_set(path: Path) -> None:
    """A prepared folder of noise, and a pair set of it."""
    import cv2

    from visard.data.formats.pair_bin import write_bin
    from visard.data.writer import DatasetWriter

    generator = np.random.default_rng(0)
    images = []
    with DatasetWriter(path, 112, {"made": "noise"}) as writing:
        for i in range(2048):
            coarse = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            image = cv2.resize(coarse, (112, 112), interpolation=cv2.INTER_CUBIC)
            image = cv2.add(image, generator.integers(0, 8, image.shape, dtype=np.uint8))
            images.append(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes())
            writing.add(f"{i // 16}/{i}.jpg", f"{i // 16}", images[-1])
    write_bin(path.with_name("pairs.bin"), images[:40], [i % 2 == 0 for i in range(20)])
    path.with_name("images.json").write_text(json.dumps([sum_of(image) for image in images]))


def other(python: Path, side: str, folder: Path, data: Path | None = None, images: int = 0) -> str:
    """This script in the other environment."""
    command = [python, __file__, python, "--side", side, "--folder", folder, "--images", str(images)]
    command += ["--data", data] if data else []
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side} failed there:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def sum_of(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def mxnet_writes(arguments: argparse.Namespace) -> None:
    import cv2
    import mxnet as mx

    def start(name: str) -> Any:
        path = arguments.folder / name
        return mx.recordio.MXIndexedRecordIO(str(path.with_suffix(".idx")), str(path), "w")

    writer = start("theirs.rec")
    for key, (label, image) in enumerate(payloads()):
        header = mx.recordio.IRHeader(0, label, key, 0)
        writer.write_idx(key, mx.recordio.pack(header, image))
    writer.close()
    writer, hashes = start("pictures.rec"), []
    for key in range(8):
        image = cv2.resize(np.random.RandomState(key).randint(0, 256, (5, 5, 3)).astype(np.uint8), (112, 112))
        packed = mx.recordio.pack_img(mx.recordio.IRHeader(0, float(key // 3), key, 0), image, quality=95)
        hashes.append(sum_of(mx.recordio.unpack(packed)[1]))
        writer.write_idx(key, packed)
    writer.close()
    (arguments.folder / "pictures.json").write_text(json.dumps(hashes))


def mxnet_reads(arguments: argparse.Namespace) -> None:
    """Our records as MXNet sees them, the folder as MXFaceDataset does, and the pair set as load_bin does."""
    import mxnet as mx

    print(f"mxnet {mx.__version__}, numpy {np.__version__}, python {sys.version.split()[0]}")
    path = arguments.folder / "ours.rec"
    reader = mx.recordio.MXIndexedRecordIO(str(path.with_suffix(".idx")), str(path), "r")
    good = 0
    for key, (label, image) in enumerate(payloads()):
        header, found = mx.recordio.unpack(reader.read_idx(key))
        wanted = list(label) if isinstance(label, tuple) else [label]
        good += found == image and np.atleast_1d(header.label).tolist() == wanted and header.id == key
    print(
        f"read by MXNet, written here: {good} of {len(payloads())} records with the same image bytes, labels and number"
    )
    sequential = mx.recordio.MXRecordIO(str(path), "r")
    count = 0
    while sequential.read() is not None:
        count += 1
    print(f"  and {count} in sequence, without the index")
    reader, numbers = open_faces(mx, arguments.data)
    labels = [mx.recordio.unpack(reader.read_idx(int(key))) for key in numbers]
    expected = arguments.folder / "images.json"
    hashes = json.loads(expected.read_text()) if expected.exists() else []
    if hashes:
        good = sum(sum_of(image) == hashes[i] for i, (_, image) in enumerate(labels))
        print(
            f"as MXFaceDataset reads the prepared folder: {len(numbers)} images, {good} byte for byte, labels ", end=""
        )
        print("as written" if [int(h.label) for h, _ in labels] == [i // 16 for i in range(len(labels))] else "DIFFER")
        with open(arguments.folder / "pairs.bin", "rb") as file:
            images, same = pickle.load(file, encoding="bytes")
        good = sum(sum_of(image) == hashes[i] for i, image in enumerate(images))
        decoded = mx.image.imdecode(images[0]).shape
        print(
            f"pair set as load_bin reads it: {good} of {len(images)} images, {sum(same)} of {len(same)} same, {decoded}"
        )
    header = mx.recordio.unpack(reader.read_idx(0))[0]
    ranges = [
        mx.recordio.unpack(reader.read_idx(k))[0].label for k in range(int(header.label[0]), int(header.label[1]))
    ]
    told = all(int(labels[int(a) - 1][0].label) == k and int(b) > int(a) for k, (a, b) in enumerate(ranges))
    print(f"  record 0: {header.label.tolist()}; {len(ranges)} identity ranges, each of its own label: {told}")


def open_faces(mx: Any, folder: Path) -> tuple[Any, np.ndarray]:
    """The reader and the keys of the images, as arcface_torch finds them."""
    reader = mx.recordio.MXIndexedRecordIO(str(folder / "train.idx"), str(folder / "train.rec"), "r")
    header, _ = mx.recordio.unpack(reader.read_idx(0))
    return reader, np.array(range(1, int(header.label[0]))) if header.flag > 0 else np.array(list(reader.keys))


def mxnet_rate(arguments: argparse.Namespace) -> None:
    """Images a second, in batches of 128, image by image as a torch DataLoader without workers would."""
    import mxnet as mx
    from PIL import Image

    pin()
    reader, keys = open_faces(mx, arguments.data)
    order = np.random.RandomState(0).permutation(len(keys))[: arguments.images]
    flips = np.random.RandomState(1).rand(len(order)) < 0.5
    try:
        import torch
    except ImportError:
        torch = None
    start, cpu = time.perf_counter(), time.process_time()
    for at in range(0, len(order), 128):
        rows = []
        for row, flip in zip(order[at : at + 128], flips[at : at + 128]):  # noqa: B905, an old Python may run this
            data = mx.recordio.unpack(reader.read_idx(int(keys[row])))[1]
            image = Image.fromarray(mx.image.imdecode(data).asnumpy())
            if flip:
                image = image.transpose(Image.FLIP_LEFT_RIGHT)
            pixels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)).astype(np.float32) / 255
            rows.append((pixels - 0.5) / 0.5 if torch is None else torch.from_numpy(pixels).sub_(0.5).div_(0.5))
        _ = np.stack(rows) if torch is None else torch.stack(rows)
    print(len(order) / (time.perf_counter() - start), len(order) / (time.process_time() - cpu))


def rates(python: Path, folder: Path, data: Path, images: int) -> None:
    """Both ways in turns; the ratio is of the same round."""
    import cv2
    import torch

    from visard.config import DataConfig
    from visard.data.dataset import RecordDataset
    from visard.data.loader import Loader
    from visard.data.sampler import EpochSampler
    from visard.device import keep_freed_memory

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    keep_freed_memory()  # as training on a CPU and the loader's processes do
    pin()
    dataset = RecordDataset(data)
    loader = Loader(dataset, DataConfig(size=dataset.size), EpochSampler(len(dataset), 128, 0))
    theirs, ours = [], []
    for _ in range(ROUNDS):
        theirs.append([float(rate) for rate in other(python, "rate", folder, data, images).split()[-2:]])
        start, cpu, done = time.perf_counter(), time.process_time(), 0
        while done < images:
            for batch in loader:
                done += len(batch)
        ours.append([done / (time.perf_counter() - start), done / (time.process_time() - cpu)])
    for clock, what in enumerate(("by the clock", "by processor time")):
        ratio = statistics.median(o[clock] / t[clock] for o, t in zip(ours, theirs, strict=True))
        slow, fast = (statistics.median(rates[clock] for rates in side) for side in (theirs, ours))
        print(
            f"one core, {dataset.size} px, medians of {ROUNDS}, {what}: MXFaceDataset's way {slow:,.0f} images/s",
            end="",
        )
        print(f", visard's loader {fast:,.0f} images/s; ratio {ratio:.1f}")


def pin() -> None:
    """One and the same core on both sides."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


if __name__ == "__main__":
    main()
