"""Template sets: images grouped into templates (all that is known of one appearance of a person), and pairs of these.

In: the lists that IJB-B and IJB-C are handed round with, as InsightFace's protocol reads them. Out: `TemplateList`,
`TemplatePairs`; and the same lists written.

    ijbc_face_tid_mid.txt         IMAGE TEMPLATE MEDIA [SUBJECT]    an image or crop a line; MEDIA: still or video
    ijbc_template_pair_label.txt  TEMPLATE TEMPLATE SAME            a comparison a line; SAME: 1 or 0

Between the columns are spaces, tabs or commas; templates are whole numbers. In IJB's lists the first template of a pair
is the gallery's, the second the probe's.

L lines of the list, P pairs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from visard.errors import FormatError, UserError
from visard.records import Int64Array

IMAGES_EXPECTED = "expected 'IMAGE TEMPLATE MEDIA' or 'IMAGE TEMPLATE MEDIA SUBJECT', the template a whole number"
PAIRS_EXPECTED = "expected 'TEMPLATE TEMPLATE SAME', two whole numbers and 1 or 0"


@dataclass(frozen=True, eq=False)
class TemplateList:
    """Which image belongs to which template; an image may belong to several.

    Args:
        images: L names.
        templates: (L,) int64.
        rest: L texts, what a line says behind the template (media, perhaps subject), as it was written.
        separator: between the columns.
    """

    images: Sequence[str]
    templates: Int64Array
    rest: Sequence[str]
    separator: str = " "

    def take(self, lines: Sequence[int]) -> TemplateList:
        """Some of the lines."""
        chosen = np.array(lines, np.int64)
        images, rest = [self.images[line] for line in lines], [self.rest[line] for line in lines]
        return replace(self, images=images, templates=self.templates[chosen], rest=rest)

    def write(self, path: Path) -> None:
        """Writes the list as it was read."""
        between = self.separator
        rows = zip(self.images, self.templates.tolist(), self.rest, strict=True)
        with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            file.writelines(f"{image}{between}{template}{between}{rest}\n" for image, template, rest in rows)


@dataclass(frozen=True, eq=False)
class TemplatePairs:
    """Comparisons of templates. Equal rows of the arrays belong together.

    Args:
        first: (P,) int64 template; IJB's gallery side.
        second: (P,) int64 template; the probe side.
        same: (P,) int64, 1 = one person.
        separator: between the columns.
    """

    first: Int64Array
    second: Int64Array
    same: Int64Array
    separator: str = " "

    def __len__(self) -> int:
        return len(self.first)

    def among(self, templates: Int64Array) -> TemplatePairs:
        """Those of which both are among `templates`."""
        kept = np.isin(self.first, templates) & np.isin(self.second, templates)
        return replace(self, first=self.first[kept], second=self.second[kept], same=self.same[kept])

    def write(self, path: Path) -> None:
        """Writes the list as it was read."""
        between = self.separator
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            for at in range(0, len(self), 1 << 16):  # millions of pairs as Python numbers would take gigabytes
                columns = (values[at : at + (1 << 16)].tolist() for values in (self.first, self.second, self.same))
                file.writelines(f"{a}{between}{b}{between}{same}\n" for a, b, same in zip(*columns, strict=True))


def read_templates(path: Path) -> TemplateList:
    """The list of images.

    Raises:
        UserError: no such file.
        FormatError: a line that is none, one that comes twice, or no line at all.
    """
    with _opened(path, "name the list of images, such as ijbc_face_tid_mid.txt") as file:
        text = file.read().decode("utf-8-sig", "surrogateescape")
    separator = _separator(text)
    images: list[str] = []
    templates: list[int] = []
    rest: list[str] = []
    seen: set[tuple[str, int]] = set()
    width = 0
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        columns = line.split() if separator == " " else [column.strip() for column in line.split(separator)]
        width = width or len(columns)
        if len(columns) != width or width not in (3, 4) or not all(columns) or not _is_whole(columns[1]):
            raise FormatError(path, f"line {number}: {line[:60]!r}; {IMAGES_EXPECTED}")
        image, template = columns[0], int(columns[1])
        if (image, template) in seen:
            raise FormatError(path, f"line {number}: {image!r} comes twice in template {template}; keep one of them")
        seen.add((image, template))
        images.append(image)
        templates.append(template)
        rest.append(separator.join(columns[2:]))
    if not images:
        raise FormatError(path, f"holds no images; {IMAGES_EXPECTED}")
    return TemplateList(images, np.array(templates, np.int64), rest, separator)


def read_template_pairs(path: Path, templates: Int64Array) -> TemplatePairs:
    """The list of pairs; of IJB-C's 15.7 million in seconds.

    Args:
        path: the list.
        templates: (L,) those that have images.

    Raises:
        UserError: no such file.
        FormatError: a line that is none, one with a template that has no images, or no line at all.
    """
    with _opened(path, "name the list of pairs of templates, such as ijbc_template_pair_label.txt") as file:
        separator = _separator(file.read(4096).decode("utf-8-sig", "replace"))
    first, second, same = np.ascontiguousarray(_numbers(path, "," if separator == "," else None).T)
    known = np.unique(templates)
    for column in (first, second):
        strange = ~np.isin(column, known)
        if strange.any():
            row = int(strange.argmax())
            raise FormatError(
                path,
                f"pair {row + 1} ({first[row]} {second[row]}): template {column[row]} has no images in the list of "
                "images; give the two lists of one protocol",
            )
    return TemplatePairs(first, second, same, separator)


def _numbers(path: Path, delimiter: str | None) -> Int64Array:
    """(P, 3) int64. The lines are looked at one by one only if something is wrong with them."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of a file without lines
            found = np.loadtxt(path, dtype=np.int64, ndmin=2, delimiter=delimiter, encoding="utf-8-sig")
    except ValueError:
        found = np.empty((0, 0), np.int64)
    if found.size and found.shape[1] == 3 and found.min() >= 0 and found[:, 2].max() <= 1:
        return found
    whole = False
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            words = [word.strip() for word in line.partition("#")[0].strip().split(delimiter)]
            good = len(words) == 3 and _is_whole(words[0]) and _is_whole(words[1]) and words[2] in ("0", "1")
            if any(words) and not good:
                raise FormatError(path, f"line {number}: {line.strip()[:60]!r}; {PAIRS_EXPECTED}")
            whole |= good
    raise FormatError(path, "is not UTF-8 throughout; save it so" if whole else f"holds no pairs; {PAIRS_EXPECTED}")


def _opened(path: Path, remedy: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error


def _separator(text: str) -> str:
    """Of the first line that is no remark."""
    first = next((line for line in text.split("\n", 64) if line.strip() and not line.startswith("#")), "")
    return "\t" if "\t" in first else "," if "," in first else " "


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 18
