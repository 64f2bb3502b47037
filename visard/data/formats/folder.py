"""Crops as files in a folder an identity.

In: the folder, perhaps with `points.csv` and `images.csv` (`sidecars`). Out: `FolderDataset`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from visard.data.formats import sidecars
from visard.data.formats.encoded import EncodedDataset
from visard.data.lines import Lines
from visard.errors import FormatError, UserError
from visard.records import Int64Array

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class FolderDataset(EncodedDataset):
    """`root/<identity>/.../<crop>`; the image id is the path below `root`. Images in `root` itself are unlabelled.

    With `nested`, every folder that holds images is an identity, named by its path below `root`: Omniglot's
    `<alphabet>/<character>`.

    What starts with a dot or is not an image by its suffix (.DS_Store, ._photo.jpg, Thumbs.db, lists) is left out.
    `root/images.csv` may name ids and identities otherwise, `root/points.csv` the landmarks. Order: by path.

    Args:
        root: the folder.
        size, resize: as for `open_dataset`; without a size, that of the first crop.
        nested: identities are the innermost folders instead of the outermost.
    """

    def __init__(self, root: Path, size: int | None = None, resize: bool = False, *, nested: bool = False) -> None:
        self.root, self._resize = Path(root), resize
        files: list[str] = []
        names: list[str] = []
        for entry in _sorted_entries(self.root):
            if entry.is_dir():
                found = [f"{entry.name}/{name}" for name in _images_below(Path(entry.path))]
                files += found
                names += [name.rpartition("/")[0] for name in found] if nested else [entry.name] * len(found)
            elif is_image(entry.name):
                files.append(entry.name)
                names.append("")
        if not files:
            raise UserError(f"{root}: holds no images; expected a folder an identity, such as {root}/NAME/IMAGE.jpg")
        ids = self._renamed(files, names)
        self._files = Lines.from_strings(files)
        self.ids: Sequence[str] = self._files if ids is files else Lines.from_strings(ids)
        places = {name: label for label, name in enumerate(dict.fromkeys(name for name in names if name))}
        self.identities: Sequence[str] = Lines.from_strings(places)
        self.labels: Int64Array = np.array([places[name] if name else -1 for name in names], np.int64)
        self._points = sidecars.read_points(self.root / sidecars.POINTS, files)
        remedy = f"align photographs first with `visard prepare {root} OUT`"
        self.size = self._first_size(remedy) if size is None else size

    def encoded(self, index: int) -> bytes:
        return read_file(self.root / self._files[index])

    def where(self, index: int) -> tuple[Path, int | None]:
        return self.root / self._files[index], None

    def _renamed(self, files: list[str], names: list[str]) -> list[str]:
        """The ids; changes `names` where `images.csv` says so."""
        table = sidecars.read_images(self.root / sidecars.IMAGES)
        if not table:
            return files
        ids = list(files)
        for i, file in enumerate(files):
            if file in table:
                ids[i], names[i] = table[file]
        if len(set(ids)) != len(ids):
            twice = next(i for i in sorted(ids) if ids.count(i) > 1)
            raise FormatError(self.root / sidecars.IMAGES, f"the image id {twice!r} comes twice; each needs its own")
        return ids


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image, and not junk."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def read_file(path: Path) -> bytes:
    """The bytes of a file, or a UserError that names it."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in a name that a list gave
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read ({reason}); check its permissions or leave it out") from error


def _sorted_entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is not junk: hidden files and folders (.DS_Store, ._photo.jpg) are."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def _images_below(folder: Path, prefix: str = "") -> Iterable[str]:
    for entry in _sorted_entries(folder):
        if entry.is_dir():
            yield from _images_below(Path(entry.path), f"{prefix}{entry.name}/")
        elif is_image(entry.name):
            yield prefix + entry.name
