"""Files for images: the path that an image id and an identity give, where they can be one.

In: ids and identities of any spelling. Out: paths "IDENTITY/.../NAME.jpg" below a folder, unique and harmless anywhere.
"""

from __future__ import annotations

from visard.data.formats.folder import IMAGE_SUFFIXES

_FORBIDDEN = frozenset('\\:*?"<>|') | {chr(c) for c in range(32)}
_LONGEST = 200


class FileNames:
    """Gives each image a path; one object a folder, so that no path is given twice."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def path(self, number: int, image_id: str, identity: str | None, label: int, suffix: str) -> str:
        """The id itself where `FolderDataset` would read id and identity back from it, else a number.

        Args:
            number: of the image, used where the id cannot be a path.
            image_id, identity, label: of the image; identity None = unlabelled.
            suffix: of the image's format, without the dot.
        """
        folder = "" if identity is None else identity if _harmless(identity) else f"label_{label:08d}"
        parts = image_id.split("/")
        fits = len(parts) == 1 if identity is None else len(parts) > 1 and parts[0] == folder
        path = image_id
        if not (fits and all(map(_harmless, parts)) and image_id.lower().endswith(IMAGE_SUFFIXES)):
            path = f"{folder}/{number:09d}.{suffix}" if folder else f"{number:09d}.{suffix}"
        while path.lower() in self._given:  # also where capitals are the same file
            path = f"{path.rpartition('.')[0]}_.{path.rpartition('.')[2]}"
        self._given.add(path.lower())
        return path


def suffix_of(image: bytes) -> str:
    """jpg, png, webp or bmp, by the file's first bytes."""
    if image.startswith(b"\x89PNG"):
        return "png"
    if image.startswith(b"RIFF") and image[8:12] == b"WEBP":
        return "webp"
    return "bmp" if image.startswith(b"BM") else "jpg"


def _harmless(part: str) -> bool:
    """One name of a path that any system and any list can hold, and that is not junk by its name."""
    return (
        bool(part)
        and part == part.strip()
        and not part.startswith((".", "#"))
        and not part.endswith(".")
        and "/" not in part
        and _FORBIDDEN.isdisjoint(part)
        and len(part.encode("utf-8", "surrogateescape")) <= _LONGEST
    )
