"""The page that `visard mask` shows its work on: some masked images, the first refused ones, counts.

In: each image as it is written, with its line of masks.jsonl, and the report. Out: the HTML of masks.html.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from visard import pages
from visard.data.decode import decode_whole
from visard.recipes.mask import MaskCopyConfig

SHOWN, SHOWN_REFUSED = 96, 24


class Shown:
    """What masks.html shows: some of the images that were to be masked, evenly, and the first refused ones.

    Args:
        config: of the command.
        size: S, of the crops.
        numbers: of the images that were to be masked, in order.
    """

    def __init__(self, config: MaskCopyConfig, size: int, numbers: Sequence[int]) -> None:
        self.masked: list[pages.Html] = []
        self.refused: list[pages.Html] = []
        self._size, self._source = size, config.src
        self._chosen = _spread(numbers, SHOWN)

    def note(self, number: int, line: dict[str, Any], data: bytes) -> None:
        """Takes an image up if it is to be shown."""
        look, refused = line.get("look"), line.get("refused")
        if refused and len(self.refused) < SHOWN_REFUSED:
            self.refused.append(self._thumbnail(refused, line, data))
        elif look is not None and number in self._chosen:
            self.masked.append(self._thumbnail(f"{look['kind']}, {look['wearing']}, {line['tool']}", line, data))

    def _thumbnail(self, caption: str, line: dict[str, Any], data: bytes) -> pages.Html:
        image = decode_whole(data, self._source)
        scale = self._size / max(image.shape[:2])
        if scale != 1:
            width, height = (max(round(scale * side), 1) for side in image.shape[1::-1])
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
        return pages.figure(image, f"{caption} · {line['id']}", suffix=".jpg")


def page_of(config: MaskCopyConfig, report: dict[str, Any], shown: Shown) -> str:
    numbers = [("images", f"{report['images']:,}", ""), ("masked", f"{report['masked']:,}", f"tool: {config.tool}")]
    numbers += [("refused", f"{sum(report['refused'].values()):,}", "left out" if config.refused != "keep" else "kept")]
    if "templates" in report:
        numbers.append(("templates", f"{report['templates']:,}", f"{report['templates_masked']:,} masked"))
    if report["pairs"]:
        numbers.append(("pairs", f"{report['pairs']:,}", f"{config.side} masked"))
    parts = [pages.tiles(numbers)]
    if shown.masked:
        parts.append(pages.section("Masked", pages.grid(shown.masked, small=True)))
    if shown.refused:
        remark = pages.paragraph("Turned too far, or the points are not those of a face: these crops have no mask.")
        parts.append(pages.section("Refused", remark, pages.grid(shown.refused, small=True)))
    return pages.page("Masks", parts, subtitle=config.src)


def _spread(numbers: Sequence[int], count: int) -> set[int]:
    """At most `count` of them, evenly."""
    if len(numbers) <= count:
        return set(numbers)
    return {numbers[round(k)] for k in np.linspace(0, len(numbers) - 1, count).tolist()}
