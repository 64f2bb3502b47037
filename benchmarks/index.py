"""Opening a bare `.rec` of the size of WebFace42M: the first time (from the text of its index) and every time after.

    python benchmarks/index.py [--images 42474558] [--identities 2059906] [--folder DIR] [--prepared]

Makes a real `.rec` whose records hold a header, a label and four bytes instead of an image (1.7 GB at the default
size), its `.idx` as text and `property`; then opens it in fresh processes, which print their own times and memory.
RssAnon is what the process itself allocated; RssFile the pages of mapped files that it touched, which the system may
take back. The first reading of the labels passes over the whole index and every record, and keeps both as arrays.
`--prepared` also writes and opens the arrays of a prepared folder of that size. The aim: open in under 2 s and under
1 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CHUNK = 1 << 20
AIM_SECONDS, AIM_BYTES = 2.0, 10**9

RECORD = np.dtype(
    [
        ("magic", "<u4"),
        ("word", "<u4"),
        ("flag", "<u4"),
        ("label", "<f4"),
        ("id", "<u8"),
        ("id2", "<u8"),
        ("image", "<u4"),
    ]
)
RANGE = np.dtype(
    [*[(name, RECORD[name]) for name in ("magic", "word", "flag", "label", "id", "id2")], ("range", "<f4", 2)]
)

OPEN = """
import json, sys, time
from pathlib import Path
import numpy
from visard.data.dataset import open_dataset

def memory():
    rows = (line.split() for line in open("/proc/self/status"))
    return {row[0][:-1]: int(row[1]) * 1024 for row in rows if row[0] in ("VmHWM:", "RssAnon:", "RssFile:")}

before = memory()
start, cpu = time.perf_counter(), time.process_time()
data = open_dataset(sys.argv[1])
opened, cpu = time.perf_counter() - start, time.process_time() - cpu
after = memory()
start, labels_cpu = time.perf_counter(), time.process_time()
labels = data.labels
index = len(data) // 2
values = [len(data), len(data.identities), data.ids[index], int(labels[index]), data.identities[int(labels[index])]]
labelled, labels_cpu = time.perf_counter() - start, time.process_time() - labels_cpu
found = {"open_s": opened, "open_cpu_s": cpu, "labels_s": labelled, "labels_cpu_s": labels_cpu, "values": values}
print(json.dumps(found | {"before": before, "opened": after, "used": memory()}))
"""


def main() -> None:
    """Prints times and memory of each opening, and whether the aim is reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--images", type=int, default=42_474_558)
    parser.add_argument("--identities", type=int, default=2_059_906)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--prepared", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = make(Path(folder), arguments.images, arguments.identities)
        sizes = ", ".join(f"{p.name} {p.stat().st_size / 1e6:,.0f} MB" for p in sorted(Path(folder).iterdir()))
        print(f"{arguments.images:,} images of {arguments.identities:,} identities: {sizes}")
        report("first time, from the text", opened(path))
        report("again, from kept arrays", opened(path))
        if arguments.prepared:
            path.with_suffix(".idx").unlink()
            make_prepared(Path(folder), arguments.images, arguments.identities)
            report("prepared folder, first time", opened(Path(folder)))
            report("prepared folder, again", opened(Path(folder)))


def opened(path: Path) -> dict:
    """Opens in a process of its own."""
    done = subprocess.run([sys.executable, "-c", OPEN, str(path)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def report(title: str, found: dict) -> None:
    """One line for people, one of JSON."""
    own, then = (1e-6 * (found[at]["RssAnon"] - found["before"]["RssAnon"]) for at in ("opened", "used"))
    peak, later = (1e-6 * found[at]["VmHWM"] for at in ("opened", "used"))
    good = found["open_s"] < AIM_SECONDS and found["opened"]["VmHWM"] < AIM_BYTES
    print(
        f"{title}: open {found['open_s']:.4f} s ({found['open_cpu_s']:.4f} s of the processor), "
        f"own memory +{own:.0f} MB, peak of the process {peak:.0f} MB; "
        f"aim {AIM_SECONDS:g} s and {AIM_BYTES / 1e9:g} GB: {'reached' if good else 'NOT REACHED'}"
    )
    print(
        f"  then labels {found['labels_s']:.2f} s ({found['labels_cpu_s']:.2f} s of the processor), own memory "
        f"+{then:.0f} MB, mapped {1e-6 * found['used']['RssFile']:.0f} MB, peak of the process {later:.0f} MB"
    )
    print(f"  {json.dumps(found)}", flush=True)


def make(folder: Path, images: int, identities: int) -> Path:
    """train.rec, train.idx and property, as InsightFace has them, with four bytes for every image."""
    start = time.perf_counter()
    edges = np.linspace(1, images + 1, identities + 1).astype(np.int64)
    offset = 0
    with open(folder / "train.rec", "wb") as rec, open(folder / "train.idx", "wb") as idx:

        def write(rows: np.ndarray, first: int) -> None:
            nonlocal offset
            rows["magic"], rows["word"] = 0xCED7230A, rows.itemsize - 8
            rows["id"] = np.arange(first, first + len(rows))
            rec.write(rows.tobytes())
            counts = np.arange(len(rows))
            idx.write(lines(first + counts, offset + rows.itemsize * counts))
            offset += rows.nbytes

        zero = np.zeros(1, RANGE)
        zero["flag"], zero["range"] = 2, (below(images + 1), below(images + 1 + identities))
        write(zero, 0)
        for at in range(0, images, CHUNK):
            rows = np.zeros(min(CHUNK, images - at), RECORD)
            rows["label"] = np.searchsorted(edges, np.arange(at + 1, at + 1 + len(rows)), "right") - 1
            write(rows, at + 1)
        for at in range(0, identities, CHUNK):
            rows = np.zeros(min(CHUNK, identities - at), RANGE)
            rows["flag"] = 2
            rows["range"] = np.stack([edges[at : at + len(rows)], edges[at + 1 : at + 1 + len(rows)]], 1)
            write(rows, images + 1 + at)
    (folder / "property").write_text(f"{identities},112,112\n")
    print(f"made in {time.perf_counter() - start:.0f} s")
    return folder / "train.rec"


def lines(keys: np.ndarray, places: np.ndarray) -> bytes:
    """ "key TAB offset" of each, ten times faster than by an f-string.

    Args:
        keys, places: (n,) int64, increasing.
    """
    text, start = [], 0
    while start < len(keys):
        widths = [len(str(numbers[start])) for numbers in (keys, places)]
        ends = [int(np.searchsorted(n, 10**width)) for n, width in zip((keys, places), widths, strict=True)]
        rows = np.empty((min(ends) - start, sum(widths) + 2), np.uint8)  # as long as neither gets another digit
        rows[:, widths[0]], rows[:, -1] = ord("\t"), ord("\n")
        for numbers, last in ((keys, widths[0] - 1), (places, -2)):
            rest = numbers[start : min(ends)]
            for place in range(widths[0] if numbers is keys else widths[1]):
                rest, digits = rest // 10, rest % 10
                rows[:, last - place] = digits + ord("0")
        text.append(rows.tobytes())
        start = min(ends)
    return b"".join(text)


def make_prepared(folder: Path, images: int, identities: int) -> None:
    """What `DatasetWriter` puts beside train.rec."""
    edges = np.linspace(0, images, identities + 1).astype(np.int64)
    labels = np.searchsorted(edges, np.arange(images), "right") - 1
    np.save(folder / "labels.npy", labels)
    np.save(folder / "offsets.npy", RANGE.itemsize + RECORD.itemsize * np.arange(images))
    np.lib.format.open_memmap(folder / "points.npy", "w+", np.float32, (images, 5, 2))
    with open(folder / "ids.txt", "w") as file:
        for at in range(0, images, CHUNK):
            rows = zip(labels[at : at + CHUNK].tolist(), range(at, images), strict=False)
            file.write("".join(f"{label}/{row}.jpg\n" for label, row in rows))
    (folder / "identities.txt").write_text("".join(f"person {k}\n" for k in range(identities)))
    info = {"format": 1, "size": 112, "images": images, "identities": identities, "template": "arcface", "source": {}}
    (folder / "dataset.json").write_text(json.dumps(info | {"visard": ""}))


def below(value: int) -> np.float32:
    """As the writers of such files round: never above."""
    rounded = np.float32(value)
    return np.nextafter(rounded, np.float32(0)) if int(rounded) > value else rounded


if __name__ == "__main__":
    main()
