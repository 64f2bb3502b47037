"""Contact sheets by their pixels; pages by a parser: well-formed, escaped, nothing from outside."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from visard import pages

VOID = {"meta", "img", "br", "wbr", "link", "input", "hr"}


class Checked(HTMLParser):
    """Tags in balance; notes texts and addresses."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(document)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def plain(value: int, height: int = 40, width: int = 40) -> np.ndarray:
    return np.full((height, width, 3), value, dtype=np.uint8)


def test_images_lie_in_rows_with_their_pixels_unchanged() -> None:
    sheet = pages.contact_sheet([plain(value) for value in (10, 20, 30)], columns=2, tile=40)
    step = 40 + pages.GAP
    assert sheet.shape == (pages.GAP + 2 * step, pages.GAP + 2 * step, 3)
    for value, (row, column) in zip((10, 20, 30), ((0, 0), (0, 1), (1, 0)), strict=True):
        y, x = pages.GAP + row * step, pages.GAP + column * step
        assert (sheet[y : y + 40, x : x + 40] == value).all()
    assert (sheet[pages.GAP + step :, pages.GAP + step :] == pages.PAPER).all()


def test_an_image_of_another_shape_is_fitted_in_the_middle() -> None:
    sheet = pages.contact_sheet([plain(0, 20, 80)], tile=40)
    inside = sheet[pages.GAP : -pages.GAP, pages.GAP : -pages.GAP]
    dark = np.flatnonzero((inside == 0).all(axis=(1, 2)))
    assert (dark[0], dark[-1]) == (15, 24)


def test_captions_stay_below_their_image_and_within_its_width() -> None:
    images = [plain(200) for _ in range(3)]
    bare = pages.contact_sheet(images, tile=60)
    long = "a very long name that does not fit/image_0001.jpg"
    sheet = pages.contact_sheet(images, ["", f"+0.5\n{long}", ""], tile=60, title="Ελληνικά")
    assert sheet.shape[0] > bare.shape[0]
    ink = (sheet.astype(int) - pages.PAPER != 0).any(axis=2)
    below = ink[pages.GAP + 30 + 60 + 2 :]
    columns = np.flatnonzero(below.any(axis=0))
    first = pages.GAP + 60 + pages.GAP
    assert first <= columns[0]
    assert columns[-1] <= first + 60
    assert ink[: pages.GAP + 30 - 4].any(), "no title"


def test_a_long_caption_keeps_both_its_ends() -> None:
    font = pages._font(12)
    shown = pages._shorten("Abel_Pacheco/Abel_Pacheco_0004.jpg", 100, font)
    assert font.getlength(shown) <= 100
    assert shown.startswith("Abel")
    assert shown.endswith("4.jpg")
    assert "…" in shown
    assert pages._shorten("short", 100, font) == "short"


def test_a_sheet_needs_images_and_as_many_captions() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        pages.contact_sheet([])
    with pytest.raises(ValueError, match="2 images, but 1 captions"):
        pages.contact_sheet([plain(0), plain(0)], ["one"])


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_images_are_written_whole_and_in_rgb(tmp_path: Path, suffix: str) -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, :, 0] = 255
    pages.write_image(tmp_path / f"red{suffix}", image)
    read = cv2.imread(str(tmp_path / f"red{suffix}"))[:, :, ::-1].astype(int)
    assert np.abs(read - image).max() <= (0 if suffix == ".png" else 3)
    assert [p.name for p in tmp_path.iterdir()] == [f"red{suffix}"]
    with pytest.raises(ValueError, match=r"written as \.jpg or \.png"):
        pages.write_image(tmp_path / "red.gif", image)


def test_a_page_is_well_formed_escaped_and_alone() -> None:
    nasty = '<script>alert("x")</script> & more'
    parts = [
        pages.tiles([(nasty, 1, nasty)]),
        pages.section(
            nasty,
            pages.paragraph(nasty),
            pages.table([nasty, "n"], [[nasty, 1.5]]),
            pages.grid([pages.figure(plain(3), nasty)], small=True),
            pages.details(nasty, pages.code(nasty), opened=True),
        ),
    ]
    document = pages.page(nasty, parts, subtitle=nasty)
    checked = Checked(document)
    assert "script" not in checked.tags
    assert checked.text.count('alert("x")') == 12
    assert all(address.startswith("data:image/") for address in checked.addresses)
    assert "http" not in document
    assert not re.search(r"@import|url\(", document)


def test_markup_is_not_escaped_twice() -> None:
    assert pages.escape(pages.Html("<b>&amp;</b>")) == "<b>&amp;</b>"
    assert pages.escape("<b>") == "&lt;b&gt;"
    assert pages.join([pages.Html("<i></i>"), "<"]) == "<i></i>\n&lt;"


def test_an_image_in_a_page_is_the_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    address = Checked(pages.figure(image)).addresses[0]
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert (decoded[:, :, ::-1] == image).all()


def test_numbers_are_set_right_and_texts_left() -> None:
    table = pages.table(["name", "a", "b"], [["x", 1, 2]])
    assert table.count('class="number"') == 4
    assert pages.table(["name", "text"], [["x", "y"]], texts=2).count('class="number"') == 0
