"""Pictures and pages for people: contact sheets, and HTML pages that are one file with nothing outside it.

In: uint8 RGB images, texts and numbers, handed in. Out: an image, or HTML that follows the reader's light or dark
    setting, fits a
telephone and loads nothing. Every text is escaped unless it is `Html`, which these functions make.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from visard.records import UInt8Array

PAPER, INK, QUIET = (250, 250, 248), (32, 34, 38), (110, 114, 122)
"""Contact sheet colours: ground, captions' first line, further lines."""

GAP = 10
CAPTION_PX = 12
LINE_PX = 16


class Html(str):
    """Markup: put into a page as it is."""


def contact_sheet(
    images: Sequence[UInt8Array],
    captions: Sequence[str] = (),
    *,
    columns: int = 8,
    tile: int | tuple[int, int] = 112,
    title: str = "",
) -> UInt8Array:
    """A grid of images with captions below them.

    Args:
        images: (h, w, 3) uint8 RGB each, of any sizes; fitted into the tile with their proportions kept.
        captions: one an image or none at all; a line break begins a further, quieter line, what is too long is cut in
            the middle.
        columns: images a row.
        tile: width and height in pixels, one number for a square.
        title: above the grid.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    from PIL import Image, ImageDraw

    if not images:
        raise ValueError("a contact sheet needs at least one image")
    if captions and len(captions) != len(images):
        raise ValueError(f"{len(images)} images, but {len(captions)} captions")
    width, height = (tile, tile) if isinstance(tile, int) else tile
    columns = min(columns, len(images))
    caption_lines = max((caption.count("\n") + 1 for caption in captions), default=0)
    cell = height + (caption_lines * LINE_PX + 4 if caption_lines else 0) + GAP
    rows = -(-len(images) // columns)
    top = GAP + (30 if title else 0)
    canvas = np.empty((top + rows * cell, GAP + columns * (width + GAP), 3), dtype=np.uint8)
    canvas[:] = PAPER
    for place, image in enumerate(images):
        x, y = GAP + place % columns * (width + GAP), top + place // columns * cell
        fitted = _fit(image, width, height)
        h, w = fitted.shape[:2]
        y_inside, x_inside = y + (height - h) // 2, x + (width - w) // 2
        canvas[y_inside : y_inside + h, x_inside : x_inside + w] = fitted
    sheet = Image.fromarray(canvas)
    draw, font = ImageDraw.Draw(sheet), _font(CAPTION_PX)
    if title:
        title_font = _font(16)
        draw.text((GAP, GAP), _shorten(title, canvas.shape[1] - 2 * GAP, title_font), font=title_font, fill=INK)
    for place, caption in enumerate(captions):
        x, y = GAP + place % columns * (width + GAP), top + place // columns * cell + height + 3
        for line, text in enumerate(caption.split("\n")):
            fill = INK if line == 0 else QUIET
            draw.text((x, y + line * LINE_PX), _shorten(text, width, font), font=font, fill=fill)
    return np.asarray(sheet)


def write_image(path: str | Path, image: UInt8Array, *, quality: int = 92) -> None:
    """Writes (H, W, 3) uint8 RGB as the suffix says (.jpg or .png), under its name only when whole."""
    path = Path(path)
    _replace(path, encode_image(image, path.suffix, quality=quality))


def encode_image(image: UInt8Array, suffix: str = ".jpg", *, quality: int = 92) -> bytes:
    """(H, W, 3) uint8 RGB as the bytes of a .jpg or .png file."""
    if suffix not in (".jpg", ".jpeg", ".png"):
        raise ValueError(f"{suffix!r}: pictures are written as .jpg or .png")
    options = [cv2.IMWRITE_PNG_COMPRESSION, 9] if suffix == ".png" else [cv2.IMWRITE_JPEG_QUALITY, quality]
    done, data = cv2.imencode(suffix, np.ascontiguousarray(image[:, :, ::-1]), options)
    assert done, image.shape
    return data.tobytes()


def escape(value: Any) -> Html:
    """A text made harmless; `Html` stays as it is."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(parts: Sequence[Any]) -> Html:
    """Parts one after another."""
    return Html("\n".join(escape(part) for part in parts))


def section(title: str, *parts: Any) -> Html:
    """A heading with what belongs to it."""
    return Html(f"<section>\n<h2>{escape(title)}</h2>\n{join(parts)}\n</section>")


def paragraph(text: Any) -> Html:
    """Running text."""
    return Html(f"<p>{escape(text)}</p>")


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]], *, texts: int = 1) -> Html:
    """A table that scrolls by itself where the page is too narrow.

    Args:
        header: a name each column.
        rows: cells.
        texts: so many first columns are text, set to the left; the others are numbers, set to the right.
    """

    def line(cells: Sequence[Any], tag: str) -> str:
        sides = ["" if i < texts else ' class="number"' for i in range(len(cells))]
        return "".join(f"<{tag}{side}>{escape(cell)}</{tag}>" for side, cell in zip(sides, cells, strict=True))

    head = f"<thead><tr>{line(header, 'th')}</tr></thead>"
    body = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return Html(f'<div class="scroll"><table>\n{head}\n<tbody>\n{body}\n</tbody></table></div>')


def tiles(values: Sequence[tuple[Any, Any, Any]]) -> Html:
    """The few numbers that matter, large.

    Args:
        values: name, number, remark.
    """
    cells = "\n".join(
        f'<div class="tile"><span class="name">{escape(name)}</span><span class="value">{escape(value)}</span>'
        f'<span class="remark">{escape(remark)}</span></div>'
        for name, value, remark in values
    )
    return Html(f'<div class="tiles">\n{cells}\n</div>')


def figure(content: Html | UInt8Array, caption: Any = "", *, suffix: str = ".png") -> Html:
    """A drawing (`Html` with an svg) or an image (uint8 RGB), with its caption."""
    if not isinstance(content, Html):
        height, width = content.shape[:2]
        uri = data_uri(encode_image(content, suffix), suffix)
        content = Html(f'<img src="{uri}" width="{width}" height="{height}" alt="{escape(caption)}">')
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return Html(f"<figure>{content}{below}</figure>")


def grid(parts: Sequence[Html], *, small: bool = False) -> Html:
    """Figures side by side, as many as fit; `small` for thumbnails."""
    return Html(f'<div class="grid{" small" if small else ""}">\n{join(parts)}\n</div>')


def details(summary: Any, body: Any, *, opened: bool = False) -> Html:
    """Something that is folded away until it is asked for."""
    state = " open" if opened else ""
    return Html(f"<details{state}><summary>{escape(summary)}</summary>\n{escape(body)}\n</details>")


def code(text: str) -> Html:
    """Text in type of one width, line by line."""
    return Html(f"<pre>{html.escape(text)}</pre>")


def data_uri(data: bytes, suffix: str) -> str:
    """An image file's bytes as an address that holds them."""
    kind = "png" if suffix == ".png" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def page(title: str, parts: Sequence[Html], *, subtitle: Any = "") -> str:
    """A whole HTML document."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header><h1>{escape(title)}</h1><p class="subtitle">{escape(subtitle)}</p></header>\n'
        f"{join(parts)}\n</main>\n</body>\n</html>\n"
    )


def write_page(path: str | Path, document: str) -> None:
    """Writes a page under its name only when whole."""
    _replace(Path(path), document.encode("utf-8"))


STYLE = """
:root {
  --paper: #fcfcfb; --card: #ffffff; --ink: #1c1f24; --quiet: #636a75; --line: #e3e4e1;
  --series-1: #2f6bd8; --series-2: #d9622b; --series-3: #1f9d78;
  --series-4: #9a4fc4; --series-5: #b58a00; --series-6: #cf3f6b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181c; --card: #1d2025; --ink: #e8e9eb; --quiet: #9aa1ac; --line: #31353d;
    --series-1: #7aa7ff; --series-2: #ff9a66; --series-3: #4fd0a8;
    --series-4: #c58cec; --series-5: #e0bd4a; --series-6: #ff86a8;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.02em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 44px 0 12px; padding-top: 18px; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 28px 0 8px; overflow-wrap: anywhere; }
p { margin: 0 0 12px; max-width: 72ch; }
.subtitle { color: var(--quiet); margin: 6px 0 0; }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; font-size: 0.9rem; min-width: 50%; }
th { text-align: left; font-weight: 600; color: var(--quiet); }
th, td { padding: 6px 20px 6px 0; white-space: nowrap; vertical-align: baseline; border-bottom: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: 0; }
th.number, td.number { text-align: right; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0; }
.tile {
  display: flex; flex-direction: column; padding: 14px 16px;
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
}
.tile .name, .tile .remark { font-size: 0.8rem; color: var(--quiet); }
.tile .value { font-size: 1.6rem; font-weight: 600; letter-spacing: -0.02em; white-space: nowrap; }
table, .tile .value { font-variant-numeric: tabular-nums; }
.grid { display: grid; gap: 20px; margin: 16px 0; }
.grid { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.grid.small { grid-template-columns: repeat(auto-fill, minmax(144px, 1fr)); gap: 14px; }
figure { margin: 0; min-width: 0; }
.grid:not(.small) > figure {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px;
}
figure img, figure svg { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.small figure img { width: 100%; border-radius: 6px; }
figcaption { font-size: 0.8rem; line-height: 1.4; color: var(--quiet); margin-top: 6px; overflow-wrap: anywhere; }
figcaption b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
details {
  margin: 12px 0; padding: 10px 16px; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
}
summary { cursor: pointer; font-weight: 600; }
pre { margin: 10px 0; overflow-x: auto; font: 0.8rem/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (max-width: 600px) {
  main { padding: 24px 16px 60px; }
  h1 { font-size: 1.5rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
  th, td { padding-right: 12px; }
  .grid.small { grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)); }
}
@media print { figure, .tile { break-inside: avoid; } }
"""


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _fit(image: UInt8Array, width: int, height: int) -> UInt8Array:
    assert image.ndim == 3, image.shape
    assert image.shape[2] == 3, image.shape
    assert image.dtype == np.uint8, image.dtype
    scale = min(width / image.shape[1], height / image.shape[0])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    if size == (image.shape[1], image.shape[0]):
        return image
    kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, size, interpolation=kind), dtype=np.uint8)


def _font(size: int) -> Any:
    """DejaVu Sans, which comes with matplotlib: the drawing library's own font lacks most of the world's letters."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _shorten(text: str, width: int, font: Any) -> str:
    """The text, cut in the middle until it is at most `width` pixels wide: a file's number is at its end."""
    kept = len(text)
    shown = text
    while kept > 1 and font.getlength(shown) > width:
        kept -= 1
        shown = text[: kept - kept // 2] + "…" + text[len(text) - kept // 2 :]
    return shown
