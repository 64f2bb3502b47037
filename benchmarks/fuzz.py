"""Damaged files against every parser: each answers with a result or a FormatError, soon and in little memory.

    python benchmarks/fuzz.py [--inputs 120000] [--seed 0] [--only NAME...] [--keep FOLDER]

Small valid files are made for each parser. Inputs are, in this order: a file cut at every byte, every bit of its start
flipped, then random damage (flipped bits, numbers replaced by extreme ones, pieces cut out, doubled, exchanged, random
bytes), until the parser's share of `--inputs` is used. What counts as failure: another exception than UserError, more
than 10 seconds, or more than 512 MiB of new address space. An input that fails is written to `--keep`.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from visard.data import array_cache
from visard.data.convert import ConvertConfig
from visard.data.convert import main as convert
from visard.data.dataset import open_dataset
from visard.data.decode import decode
from visard.data.formats.pair_bin import write_bin
from visard.data.record_index import read_index
from visard.data.recordio import RecordFile, pack, unpack, write_record
from visard.data.text_index import TextOffsets
from visard.data.writer import DatasetWriter
from visard.deploy.mxnet import read_params, read_symbol
from visard.errors import FormatError, UserError
from visard.protocols.pair_files import read_pairs
from visard.records import ModelSpec

SECONDS = 10
MEMORY = 512 << 20
SIZE = 16
EXTREME = [struct.pack(f, v) for f in ("<I", "<Q", ">I") for v in (0, 1, 0x7FFFFFFF, 0xFFFFFFFF)] + [b"\xff" * 8, b"-1"]


@dataclass
class Case:
    """One parser.

    Args:
        files: name -> bytes of a valid set of files.
        damaged: the files that are damaged in turn; the others stay whole.
        read: given the folder; returns anything or raises.
    """

    files: dict[str, bytes]
    damaged: tuple[str, ...]
    read: Callable[[Path], Any]


@dataclass
class Count:
    """What came of a parser's inputs."""

    inputs: int = 0
    accepted: int = 0
    format_errors: int = 0
    other_user_errors: int = 0
    failures: int = 0
    slowest: float = 0.0
    kinds: set[str] = field(default_factory=set)


def main() -> None:
    """Prints the counts a parser; exit code 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--inputs", type=int, default=120_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"))
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        cases = {n: c for n, c in made(Path(folder)).items() if not arguments.only or n in arguments.only}
        share = -(-arguments.inputs // len(cases))
        limit = memory_limit()
        counts = {}
        for name, case in cases.items():
            counts[name] = run(name, case, share, arguments.seed, Path(folder) / "work", arguments.keep)
            print(line(name, counts[name]), flush=True)
    total = Count(*(sum(getattr(c, k) for c in counts.values()) for k in list(vars(Count()))[:5]))
    total.slowest = max(c.slowest for c in counts.values())
    print(line("total", total))
    print(f"address space limited to {limit >> 20} MiB, {MEMORY >> 20} above the start")
    print(json.dumps({n: {k: v for k, v in vars(c).items() if k != "kinds"} for n, c in counts.items()}))
    sys.exit(1 if total.failures else 0)


def line(name: str, count: Count) -> str:
    """One row of the table."""
    return (
        f"{name:18} {count.inputs:8,} inputs  {count.accepted:7,} read  {count.format_errors:7,} FormatError  "
        f"{count.other_user_errors:6,} other UserError  {count.failures:3} failures  slowest {count.slowest:.3f} s"
    )


def run(name: str, case: Case, share: int, seed: int, work: Path, keep: Path) -> Count:
    """Feeds one parser."""
    count, generator = Count(), random.Random(f"{seed} {name}")
    signal.signal(signal.SIGALRM, late)
    for _, (file, data) in zip(range(share), inputs(case, share, generator), strict=False):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        for other, whole in case.files.items():
            path = work / other
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data if other == file else whole)
        count.inputs += 1
        start = time.perf_counter()
        signal.alarm(SECONDS)
        try:
            case.read(work)
            count.accepted += 1
        except FormatError:
            count.format_errors += 1
        except UserError:
            count.other_user_errors += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            kind = traceback.format_exc().splitlines()[-1][:100] + traceback.format_exc().splitlines()[-3]
            count.failures += 1
            if kind not in count.kinds:
                count.kinds.add(kind)
                traceback.print_exc()
                keep.mkdir(parents=True, exist_ok=True)
                kept = keep / f"{name}.{count.failures}.{Path(file).name}"
                kept.write_bytes(data)
                print(f"{name}: {file} damaged, kept as {kept}", flush=True)
        finally:
            signal.alarm(0)
        count.slowest = max(count.slowest, time.perf_counter() - start)
    return count


def inputs(case: Case, share: int, generator: random.Random) -> Iterator[tuple[str, bytes]]:
    """(file, damaged bytes): cut at every byte, bits flipped one by one, then at random."""
    budget = max(1, share // 4 // len(case.damaged))
    for file in case.damaged:
        data = case.files[file]
        step = max(1, len(data) // budget)
        yield from ((file, data[:length]) for length in range(0, len(data), step))
    for file in case.damaged:
        data = case.files[file]
        for bit in range(min(8 * len(data), budget)):
            yield file, flipped(data, bit)
    while True:
        file = generator.choice(case.damaged)
        data = case.files[file]
        for _ in range(generator.choice((1, 1, 1, 2, 4, 16))):
            data = damage(data, generator)
        yield file, data


def flipped(data: bytes, bit: int) -> bytes:
    """One bit the other way."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def damage(data: bytes, generator: random.Random) -> bytes:
    """One random change."""
    if not data:
        return generator.randbytes(generator.randrange(1, 20))
    at = generator.randrange(len(data))
    end = min(len(data), at + generator.choice((1, 2, 4, 8, 16, 64, 512)))
    kind = generator.randrange(8)
    if kind <= 1:
        return flipped(data, generator.randrange(8 * len(data)))
    if kind == 2:
        value = generator.choice(EXTREME)
        return data[:at] + value + data[at + len(value) :]
    if kind == 3:
        return data[:at] + data[end:]
    if kind == 4:
        return data[:end] + data[at:]
    if kind == 5:
        return data[:at] + generator.randbytes(end - at) + data[end:]
    if kind == 6:
        other = generator.randrange(len(data))
        piece = data[other : other + end - at]
        return data[:at] + piece + data[at + len(piece) :]
    return data[:at]


def memory_limit() -> int:
    """No more new address space than MEMORY from here on."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = now + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return limit


class TooLateError(Exception):
    """A parser took more than SECONDS."""


def late(*_: Any) -> None:
    raise TooLateError(f"more than {SECONDS} s")


def use(source: Path | str, *, tolerant: bool = False) -> None:
    """Opens a data set and takes everything out of it."""
    dataset: Any = open_dataset(source, tolerant=tolerant)
    _ = dataset.labels, dataset.identities[:50], dataset.problems if hasattr(dataset, "problems") else ()
    problem: UserError | None = None
    for index in range(min(len(dataset), 50)):
        try:
            _ = dataset.ids[index], dataset.points(index), dataset.image(index)
        except FormatError as error:
            problem = error
    if problem is not None:
        raise problem


def both(source: Path) -> None:
    """Strictly, and as far as it can be read."""
    try:
        use(source)
    finally:
        use(source, tolerant=True)


def made(folder: Path) -> dict[str, Case]:
    """The parsers with valid files for each."""
    images = [picture(i) for i in range(5)]
    points = np.random.default_rng(0).uniform(0, SIZE, (5, 5, 2)).astype(np.float32)
    with DatasetWriter(folder / "set", SIZE, {"made": "for fuzzing"}) as writing:
        for i, image in enumerate(images):
            writing.add(f"p{i // 2}/{i}.jpg", f"p{i // 2}", image, points[i] if i % 2 else None)
    for kind in ("folder", "list", "lst", "shards"):
        convert(ConvertConfig(src=str(folder / "set"), out=folder / kind, to=kind))  # type: ignore[arg-type]
    prepared, listed, lst = (files_of(folder / kind) for kind in ("set", "list", "lst"))
    bare = {name: prepared[name] for name in ("train.rec", "train.idx", "property")}
    (folder / "parts.rec").write_bytes(b"")
    with open(folder / "parts.rec", "wb") as file:
        for payload in (pack(1.0, 1, images[0][:40]), pack((2.0, 3.0), 2, b"ab" + struct.pack("<I", 0xCED7230A) * 2)):
            write_record(file, payload)
        write_record(file, pack(3.0, 0xCED7230A, b"x" * 9))
    parts = (folder / "parts.rec").read_bytes()
    cases = {
        "rec": Case({"a.rec": parts}, ("a.rec",), lambda f: records(f / "a.rec")),
        "idx": Case({"a.idx": prepared["train.idx"]}, ("a.idx",), lambda f: read_index(f / "a.idx")),
        "idx, mapped": Case({"a.idx": prepared["train.idx"]}, ("a.idx",), lambda f: mapped_index(f / "a.idx")),
        "rec+idx+property": Case(bare, tuple(bare), lambda f: both(f / "train.rec")),
        "rec alone": Case({"train.rec": bare["train.rec"]}, ("train.rec",), lambda f: both(f / "train.rec")),
        "prepared folder": Case(prepared, tuple(n for n in prepared if n not in ("train.idx", "property")), both),
        "tar shards": Case(files_of(folder / "shards"), ("000000.tar",), use),
        "pax tar": Case({"a.tar": pax_tar(folder, images)}, ("a.tar",), lambda f: use(f / "a.tar")),
        "list": Case(listed, tuple(n for n in listed if n.startswith("list.")), lambda f: use(f / "list.txt")),
        "lst": Case(lst, tuple(n for n in lst if n.startswith("list.")), lambda f: use(f / "list.lst")),
        "folder tables": Case(tables(folder, images), ("points.csv", "images.csv"), use),
        "images": Case(
            encoded(), tuple(encoded()), lambda f: [decode(p.read_bytes(), SIZE, True, p) for p in sorted(f.iterdir())]
        ),
        "sources json": Case(sources(images), ("mix.json",), lambda f: use(f / "mix.json")),
        "array cache": Case(*cache(folder)),
        "params": Case({"a.params": params()}, ("a.params",), lambda f: read_params(f / "a.params")),
        "symbol json": Case({"a.json": symbol()}, ("a.json",), lambda f: read_symbol(f / "a.json")),
        "spec json": Case(
            {"spec.json": spec()}, ("spec.json",), lambda f: ModelSpec.from_json(text_of(f / "spec.json"))
        ),
        "pairs of lfw": Case({"p.txt": b"2\t2\n" + (b"a\t1\t2\n" * 2 + b"a\t1\tb\t2\n" * 2) * 2}, ("p.txt",), pairs),
        "pairs, own": Case({"p.txt": b"a/1.jpg\ta/2.jpg\t1\t0\na/1.jpg\tb/1.jpg\t0\t1\n" * 4}, ("p.txt",), pairs),
    }
    for name, data in pickles(folder, images).items():
        cases[f"bin {name}"] = Case({"a.bin": data}, ("a.bin",), lambda f: use(f / "a.bin"))
    return cases


def records(path: Path) -> None:
    """All ways into a record file, the tolerant one first."""
    file = RecordFile(path)
    problems: list[FormatError] = []
    offsets = np.array([offset for offset, _ in file.scan(problems)], np.int64)
    file.first_labels(offsets, problems)
    for offset, payload in file.scan():
        unpack(payload, path, offset)
        file.image(offset)


def mapped_index(path: Path) -> None:
    """All offsets, the same one by one as at once."""
    offsets = TextOffsets.of(path)
    if offsets is None:
        raise FormatError(path, "has to be read as a whole")
    assert [offsets[i] for i in range(len(offsets))] == offsets.read().tolist()


def pairs(folder: Path) -> None:
    read_pairs(folder / "p.txt", ["a/a_0001", "a/a_0002", "b/b_0002", "a/1.jpg", "a/2.jpg", "b/1.jpg"])


def text_of(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def picture(seed: int, suffix: str = ".jpg") -> bytes:
    image = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.imencode(suffix, cv2.resize(image, (SIZE, SIZE)))[1].tobytes()


def encoded() -> dict[str, bytes]:
    return {f"a{suffix}": picture(0, suffix) for suffix in (".jpg", ".png", ".bmp", ".webp")}


def tables(folder: Path, images: list[bytes]) -> dict[str, bytes]:
    points = (folder / "folder" / "points.csv").read_bytes()
    names = b'file,id,identity\np0/0.jpg,17,Anna\np0/1.jpg,"a ""b"".jpg",p0\n'
    files = {f"p{i // 2}/{i}.jpg": image for i, image in enumerate(images)}
    return files | {"points.csv": points, "images.csv": names}


def sources(images: list[bytes]) -> dict[str, bytes]:
    entries = [{"source": "x", "name": "one", "weight": 2.0}, {"source": "y"}]
    text = json.dumps({"sources": entries, "same_names": "merge"}).encode()
    return {"x/p/0.jpg": images[0], "y/p/1.jpg": images[1], "mix.json": text}


def pickles(folder: Path, images: list[bytes]) -> dict[str, bytes]:
    write_bin(folder / "a.bin", images[:4], [True, False])
    arrays = [np.frombuffer(image, np.uint8) for image in images[:4]]
    pixels = [np.full((SIZE, SIZE, 3), i, np.uint8) for i in range(2)]
    found = {"of bytes": (folder / "a.bin").read_bytes()}
    for protocol in (0, 2, 5):
        found[f"of arrays, {protocol}"] = pickle.dumps((arrays, [np.True_, False]), protocol)
    return found | {
        "of pixels": pickle.dumps((pixels, np.array([True])), 4),
        "protocol 0": pickle.dumps((images[:2], [True]), 0),
    }


def pax_tar(folder: Path, images: list[bytes]) -> bytes:
    import io
    import tarfile

    with tarfile.open(folder / "pax.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for i, image in enumerate(images[:3]):
            for name, data in ((f"{'é' * 60}/{i}.jpg", image), (f"{'é' * 60}/{i}.cls", b"%d" % i)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return (folder / "pax.tar").read_bytes()


def cache(folder: Path) -> tuple[dict[str, bytes], tuple[str, ...], Callable[[Path], Any]]:
    """The stamp would refuse a copy of the source, so the source stays and only the cache is damaged."""
    source = folder / "source"
    source.write_bytes(b"source")
    array_cache.save((source,), "test", {"a": np.arange(9), "b": np.zeros((3, 2), np.float32)})
    kept = source.with_name("source.test.cache")

    def read(work: Path) -> None:
        kept.write_bytes((work / "a.cache").read_bytes())
        arrays = array_cache.load((source,), "test")
        if arrays is None:
            raise FormatError(kept, "not used")
        [array.sum() for array in arrays.values()]

    return {"a.cache": kept.read_bytes()}, ("a.cache",), read


def params() -> bytes:
    def array(values: np.ndarray) -> bytes:
        shape = struct.pack(f"<I{values.ndim}q", values.ndim, *values.shape)
        return struct.pack("<Ii", 0xF993FAC9, 0) + shape + struct.pack("<iii", 1, 0, 0) + values.tobytes()

    arrays = [np.ones((2, 3), "<f4"), np.zeros(4, "<f4")]
    names = [b"arg:a_weight", b"aux:b"]
    data = struct.pack("<QQQ", 0x112, 0, 2) + b"".join(map(array, arrays)) + struct.pack("<Q", 2)
    return data + b"".join(struct.pack("<Q", len(n)) + n for n in names)


def symbol() -> bytes:
    nodes = [
        {"op": "null", "name": "data", "inputs": []},
        {"op": "null", "name": "w", "inputs": []},
        {"op": "Convolution", "name": "c", "attrs": {"kernel": "(3, 3)"}, "inputs": [[0, 0, 0], [1, 0, 0]]},
    ]
    return json.dumps({"nodes": nodes, "heads": [[2, 0, 0]]}).encode()


def spec() -> bytes:
    return ModelSpec(backbone={"kind": "onnx"}, input_size=112, embedding_dim=8).to_json().encode()


if __name__ == "__main__":
    main()
