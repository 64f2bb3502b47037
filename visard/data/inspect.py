"""`visard inspect DATA`: what a data set holds, what is broken in it, and what it holds twice.

In: whatever `open_dataset` takes. Out: counts, a histogram of images per identity, broken images and sets of images
with equal bytes. With --out DIR also inspect.json, broken.csv, duplicates.csv and contact_sheet.jpg there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from visard.console import Answer, progress
from visard.data.dataset import FaceDataset, PairBinDataset, open_dataset
from visard.data.decode import check
from visard.data.formats.joined import SameNames
from visard.data.formats.sidecars import write_table
from visard.errors import FormatError, UserError
from visard.pages import contact_sheet, write_image
from visard.records import Int64Array

BAR = 40
SHOWN = 10
"""Broken images and duplicates that are printed; all of them are in the tables of --out."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """`visard inspect`."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A prepared folder, a folder of identities, a .rec, .bin or .tar file, a list; or several, joined."""
    out: Path | None = None
    """Folder for inspect.json, broken.csv, duplicates.csv and contact_sheet.jpg; written over."""
    decode: bool = True
    """Decode every image; without it, its header and its end are looked at (about ten times faster)."""
    duplicates: bool = True
    """Compare the images' bytes."""
    pictures: int = 48
    """Images on the contact sheet, drawn over all identities."""
    seed: int = 0
    """Of that draw."""
    same_names: SameNames = "apart"
    """For several sources: whether people of equal names are two or one."""

    def __post_init__(self) -> None:
        if not 0 <= self.pictures <= 1000:
            raise UserError(f"--pictures is {self.pictures}; use 0 to 1000")


@dataclass(frozen=True)
class _Found:
    """What a pass over the images found.

    Args:
        broken: what is wrong, by the image's row; -1 for what was lost before there was a row.
        digests: (N,) uint64 of the content, valid where an image is not broken.
        kilobytes: mean size of an encoded image, None where there are no files.
        landmarks: images that have them.
    """

    broken: list[tuple[int, str]]
    digests: np.ndarray
    kilobytes: float | None
    landmarks: int


def main(config: InspectConfig) -> Answer:
    """Looks at every image once, and at those again whose digests are equal."""
    dataset = open_dataset(config.data, same_names=config.same_names, tolerant=True)
    labels = dataset.labels  # before the images: reading the labels of a .rec finds what is wrong with them
    found = _look(config, dataset)
    sets = _equal(dataset, found) if config.duplicates else []
    across = [rows for rows in sets if len(set(labels[rows].tolist())) > 1]
    per_identity = np.bincount(labels[labels >= 0], minlength=len(dataset.identities))
    histogram = _histogram(per_identity)
    value: dict[str, Any] = {
        "data": config.data,
        "kind": type(dataset).__name__,
        "size": dataset.size,
        "images": len(dataset),
        "identities": len(dataset.identities),
        "identities_without_images": int((per_identity == 0).sum()),
        "unlabelled": int((labels < 0).sum()),
        "with_landmarks": found.landmarks,
        "kilobytes_per_image": found.kilobytes,
        "images_per_identity": _summary(per_identity),
        "histogram": [{"images": name, "identities": count} for name, count in histogram],
        "broken": len(found.broken),
        "duplicate_sets": len(sets) if config.duplicates else None,
        "duplicates_across_identities": len(across) if config.duplicates else None,
    }
    if isinstance(dataset, PairBinDataset):
        value |= {"genuine_pairs": int(dataset.same.sum()), "impostor_pairs": int((~dataset.same).sum())}
    if config.out is not None:
        _write(config, dataset, found, sets, value)
    return Answer(value, _text(config, dataset, found, sets, value, histogram))


def _look(config: InspectConfig, dataset: Any) -> _Found:
    broken = [(-1, str(problem)) for problem in getattr(dataset, "problems", ())]
    named = {text for _, text in broken}
    digests = np.zeros(len(dataset), np.uint64)
    files, size, landmarks = hasattr(dataset, "encoded"), 0, 0
    with progress("inspecting", len(dataset)) as shown:
        for row in range(len(dataset)):
            shown.advance()
            try:
                data = dataset.encoded(row) if files else dataset.image(row).tobytes()
                if files and config.decode:
                    dataset.image(row)
                elif files:
                    check(data, dataset.size, False, *dataset.where(row))
            except UserError as error:  # broken, or of another size than the others
                if str(error) not in named:
                    broken.append((row, str(error)))
                data = b""
            size += len(data)
            if config.duplicates and data:
                digests[row] = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1
            landmarks += dataset.points(row) is not None
    kilobytes = size / len(dataset) / 1000 if files else None
    return _Found(broken, digests, kilobytes, landmarks)


def _equal(dataset: Any, found: _Found) -> list[list[int]]:
    """Sets of rows with the same bytes: 8 bytes of digest find them, the bytes themselves decide."""
    order = np.argsort(found.digests, kind="stable")
    ordered = found.digests[order]
    candidates: dict[int, list[int]] = defaultdict(list)
    again = np.flatnonzero(ordered[1:] == ordered[:-1])
    for place in np.unique(np.concatenate([again, again + 1])).tolist():
        if ordered[place]:  # 0 = broken
            candidates[int(ordered[place])].append(int(order[place]))
    sets = []
    for rows in candidates.values():
        by_content: dict[bytes, list[int]] = defaultdict(list)
        for row in rows:
            data = dataset.encoded(row) if hasattr(dataset, "encoded") else dataset.image(row).tobytes()
            by_content[hashlib.blake2b(data).digest()].append(row)
        sets += [same for same in by_content.values() if len(same) > 1]
    return sorted(sets)


def _histogram(per_identity: Int64Array) -> list[tuple[str, int]]:
    """Identities by how many images they have, in ranges that double."""
    if not len(per_identity):
        return []
    rows = []
    low = 0
    while low <= int(per_identity.max()):
        high = low if low < 2 else 2 * low - 1
        count = int(((per_identity >= low) & (per_identity <= high)).sum())
        if count or low > 0:
            rows.append((str(low) if low == high else f"{low}-{high}", count))
        low = high + 1
    return rows


def _summary(per_identity: Int64Array) -> dict[str, float] | None:
    if not len(per_identity):
        return None
    quarter, median, three = np.percentile(per_identity, [25, 50, 75]).tolist()
    return {
        "least": int(per_identity.min()),
        "quarter": quarter,
        "median": median,
        "three_quarters": three,
        "most": int(per_identity.max()),
        "mean": float(per_identity.mean()),
    }


def _text(
    config: InspectConfig,
    dataset: FaceDataset,
    found: _Found,
    sets: list[list[int]],
    value: dict[str, Any],
    histogram: list[tuple[str, int]],
) -> str:
    per = value["images_per_identity"]
    lines = [
        f"{config.data}: {value['images']:,} images of {value['identities']:,} identities, {dataset.size} px"
        + ("" if found.kilobytes is None else f", {found.kilobytes:.1f} kB an image")
        + f"; {value['unlabelled']:,} unlabelled, {found.landmarks:,} with landmarks"
    ]
    if "genuine_pairs" in value:
        lines.append(f"{value['genuine_pairs']:,} genuine and {value['impostor_pairs']:,} impostor pairs")
    if per is not None:
        lines += [
            "",
            f"images an identity: {per['least']} to {per['most']}, median {per['median']:g}, mean {per['mean']:.1f}",
        ]
        most = max(count for _, count in histogram)
        width = max(len(name) for name, _ in histogram)
        lines += [f"  {name:>{width}}  {'#' * -(-BAR * count // most):<{BAR}}  {count:,}" for name, count in histogram]
    lines += ["", f"broken: {len(found.broken):,}"]
    lines += [f"  {text}" for _, text in found.broken[:SHOWN]] + _more(len(found.broken), config)
    if config.duplicates:
        across = value["duplicates_across_identities"]
        lines.append(f"sets of images with equal bytes: {len(sets):,}, of these over several identities: {across:,}")
        lines += ["  " + " = ".join(_named(dataset, row) for row in rows[:4]) for rows in sets[:SHOWN]]
        lines += _more(len(sets), config)
    return "\n".join(lines)


def _more(count: int, config: InspectConfig) -> list[str]:
    if count <= SHOWN:
        return []
    return [f"  and {count - SHOWN:,} more" + ("" if config.out else "; --out DIR lists them all")]


def _named(dataset: FaceDataset, row: int) -> str:
    label = int(dataset.labels[row])
    return f"{dataset.ids[row]} ({dataset.identities[label] if label >= 0 else 'unlabelled'})"


def _write(
    config: InspectConfig, dataset: FaceDataset, found: _Found, sets: list[list[int]], value: dict[str, Any]
) -> None:
    assert config.out is not None
    config.out.mkdir(parents=True, exist_ok=True)
    rows = [(dataset.ids[row] if row >= 0 else "", text) for row, text in found.broken]
    _table(config.out / "broken.csv", ("id", "problem"), rows)
    if config.duplicates:
        labels, names = dataset.labels, dataset.identities
        entries = [
            (str(number), dataset.ids[row], names[labels[row]] if labels[row] >= 0 else "")
            for number, same in enumerate(sets)
            for row in same
        ]
        _table(config.out / "duplicates.csv", ("set", "id", "identity"), entries)
    if config.pictures:
        _write_sheet(config, dataset, found)
    settings = {key: str(item) for key, item in dataclasses.asdict(config).items()}
    _replace(config.out / "inspect.json", json.dumps(value | {"settings": settings}, indent=2) + "\n")


def _write_sheet(config: InspectConfig, dataset: FaceDataset, found: _Found) -> None:
    """Images at random, one an identity as long as there are identities left."""
    bad = {row for row, _ in found.broken}
    generator = np.random.default_rng(config.seed)
    order = generator.permutation(len(dataset))
    _, firsts = np.unique(dataset.labels[order], return_index=True)
    ahead = generator.permutation(order[firsts])
    behind = order[~np.isin(order, ahead)]
    chosen = [row for row in np.concatenate([ahead, behind]).tolist() if row not in bad]
    images, captions = [], []
    for row in chosen:
        if len(images) == config.pictures:
            break
        try:
            images.append(dataset.image(row))
        except FormatError:  # without --decode, damage inside an image shows only here
            continue
        label = int(dataset.labels[row])
        captions.append(f"{dataset.identities[label] if label >= 0 else 'unlabelled'}\n{dataset.ids[row]}")
    if images:
        title = f"{len(images)} of {len(dataset):,} images of {len(dataset.identities):,} identities"
        write_image(config.out / "contact_sheet.jpg", contact_sheet(images, captions, title=title))  # type: ignore[operator]


def _table(path: Path, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_table(partial, header, rows)
    os.replace(partial, path)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(text, encoding="utf-8", errors="surrogateescape")
    os.replace(partial, path)
