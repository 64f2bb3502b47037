"""Figures of a report as SVG that takes its colours and its type from the page, so that it is right in light and dark.

In: names with points. Out: `Html` with one <svg>. Drawn by matplotlib with stand-in colours, which are exchanged for
    the page's CSS
variables afterwards.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from visard.functional.scaling import Band, FloatArray, Law
from visard.pages import Html, escape

SERIES = 6
"""Colours of the page; further lines repeat them dashed."""

_STAND_INS = {
    "#010101": "var(--ink)",
    "#020202": "var(--quiet)",
    "#030303": "var(--line)",
    **{f"#0400{number:02x}": f"var(--series-{number})" for number in range(1, SERIES + 1)},
}
_INK, _QUIET, _LINE = "#010101", "#020202", "#030303"


class Scaled(Protocol):
    """What `scaling` draws of a test set; `visard.report.scaling.Series` is one."""

    @property
    def name(self) -> str: ...
    @property
    def sizes(self) -> FloatArray: ...
    @property
    def errors(self) -> FloatArray: ...
    @property
    def law(self) -> Law: ...
    @property
    def places(self) -> FloatArray: ...
    @property
    def band(self) -> Band | None: ...


LEGEND_INSIDE = 6
"""More lines than these are named beside the figure."""


@dataclass(frozen=True)
class Line:
    """A named curve; points whose y is None are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]


def curves(title: str, lines: Sequence[Line], *, x_name: str, y_name: str, markers: bool = False) -> Html:
    """Lines over an axis that begins at 0: loss, learning rate, accuracy over epochs."""
    figure, axes = _axes(title, x_name, y_name)
    for place, line in enumerate(lines):
        x, y = _points(line)
        shown = markers or len(x) == 1  # a single point is no line
        axes.plot(x, y, **_style(place), marker="o" if shown else None, markersize=3.5, label=line.name)
    axes.set_xlim(left=0)
    _legend(axes, lines)
    return _svg(figure, title)


def roc(title: str, lines: Sequence[Line]) -> Html:
    """TAR over FAR on a logarithmic axis, drawn as the stairs that the thresholds really reach."""
    figure, axes = _axes(title, "false accept rate", "true accept rate")
    lowest_x, lowest_y = 1.0, 1.0
    for place, line in enumerate(lines):
        x, y = _points(line)
        shown = x > 0
        if shown.any():
            lowest_x = min(lowest_x, float(x[shown].min()))
            lowest_y = min(lowest_y, float(y[shown].min()))
        axes.plot(x[shown], y[shown], **_style(place), drawstyle="steps-post", label=line.name)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.6g} %")
    axes.set_xscale("log")
    axes.set_xlim(min(lowest_x, 0.1), 1.0)
    margin = max((1.0 - lowest_y) * 0.08, 1e-3)
    axes.set_ylim(lowest_y - margin, 1.0 + margin)
    _legend(axes, lines, place="lower right")
    return _svg(figure, title)


def score_histogram(title: str, genuine: Line, impostor: Line, threshold: float | None) -> Html:
    """Both classes' scores as shares of their own class, and the threshold."""
    figure, axes = _axes(title, "cosine", "share of pairs")
    for place, line in enumerate((genuine, impostor)):
        x, y = _points(line)
        shares = y / max(y.sum(), 1)
        colour = _style(place)["color"]
        width = x[1] - x[0] if len(x) > 1 else 1.0
        edges = np.concatenate([x - width / 2, x[-1:] + width / 2])
        axes.stairs(shares, edges, fill=True, color=colour, alpha=0.25)
        axes.stairs(shares, edges, color=colour, linewidth=1.6, label=line.name)
    if threshold is not None:
        axes.axvline(threshold, color=_QUIET, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{threshold:.3f}",
            (threshold, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, -10),
            textcoords="offset points",
            color=_QUIET,
            fontsize=10.5,
        )
    axes.set_ylim(bottom=0)
    # Beside the title: inside, it would cover a class or the threshold, wherever these lie.
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.99), ncols=2, frameon=False, fontsize=11, labelcolor=_INK)
    return _svg(figure, title)


def scaling(title: str, series: Sequence[Scaled]) -> Html:
    """Errors over sizes on two logarithmic axes: points, the law through them, and its band."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = _axes(title, "parameters, the classification weight included", "error")
    for place, one in enumerate(series):
        colour = _style(place)["color"]
        axes.plot(one.places, one.law.at(one.places), **_style(place), label=one.name)
        axes.plot(one.sizes, one.errors, linestyle="", marker="o", markersize=4.5, color=colour)
        if one.band is not None:
            axes.fill_between(one.places, one.band.low, one.band.high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis, text in ((axes.xaxis, lambda v, _: f"{v / 1e6:.4g} M"), (axes.yaxis, lambda v, _: f"{100 * v:.4g} %")):
        axis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0), numticks=20))
        axis.set_major_formatter(text)
        axis.set_minor_formatter(NullFormatter())
    _legend(axes, series)
    return _svg(figure, title)


def _axes(title: str, x_name: str, y_name: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.0, 3.7), dpi=72, layout="constrained")
    figure.patch.set_visible(False)  # the page's own ground shows through, light or dark
    axes = figure.subplots()
    axes.patch.set_visible(False)
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=_INK, pad=10)
    axes.set_xlabel(x_name, color=_QUIET, fontsize=11)
    axes.set_ylabel(y_name, color=_QUIET, fontsize=11)
    axes.tick_params(colors=_QUIET, labelsize=11, length=0, which="both")
    axes.grid(color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_LINE)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 5, 10]))
    return figure, axes


def _points(line: Line) -> tuple[np.ndarray, np.ndarray]:
    there = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None]
    points = np.array(there, dtype=np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _style(place: int) -> dict[str, Any]:
    dashes = ("-", (0, (4, 2)), (0, (1, 1.5)))
    colour = f"#0400{place % SERIES + 1:02x}"
    return {"color": colour, "linewidth": 1.8, "linestyle": dashes[place // SERIES % len(dashes)]}


def _legend(axes: Any, lines: Sequence[object], place: str = "best") -> None:
    if len(lines) > LEGEND_INSIDE:  # beside the curves, where it covers none
        axes.figure.legend(loc="outside right upper", frameon=False, fontsize=9, labelcolor=_INK)
    elif len(lines) > 1:
        axes.legend(loc=place, frameon=False, fontsize=11, labelcolor=_INK)


def _svg(figure: Any, title: str) -> Html:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = io.StringIO()
    # Text stays text, so that it takes the page's type and can be searched.
    # Its ids are made the figure's own, because one page holds many.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "visard", "font.sans-serif": ["DejaVu Sans"]}):
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None, "Creator": None})  # type: ignore[no-untyped-call]
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for stand_in, variable in _STAND_INS.items():
        text = text.replace(stand_in, variable)
    text = re.sub(r"'DejaVu Sans'(, [\w' -]+)*", "inherit", text)
    prefix = f"f{hashlib.sha256(text.encode()).hexdigest()[:8]}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = text.replace('xlink:href="#', f'xlink:href="#{prefix}').replace("url(#", f"url(#{prefix}")
    return Html(text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1))
