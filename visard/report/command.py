"""`visard report RUN... OUT.html`: runs and results on one page.

In: run directories, result.json files or their folders. Out: one HTML file with curves, tables and pictures in it.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tyro

from visard import __version__
from visard.console import Answer
from visard.errors import UserError
from visard.pages import write_page
from visard.report.page import document
from visard.report.scaling import numbers, scaling, scaling_section
from visard.report.sources import read_sources

PACKAGES = ("torch", "numpy", "opencv-python-headless", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """One HTML page of runs and results."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Runs and results, then the page to write: RUN... OUT.html."""
    title: str = ""
    """Heading; by default the names of what it is about."""
    scaling: str = ""
    """Metric whose error is drawn and fitted over the runs' parameters: accuracy, eer, tar@far=1e-3 ...; "" = none."""

    def __post_init__(self) -> None:
        if len(self.paths) < 2:
            raise UserError("name at least one run or result, then the page to write: visard report RUN... OUT.html")
        if self.paths[-1].suffix.lower() not in (".html", ".htm"):
            raise UserError(f"{self.paths[-1]}: the last name is the page to write and must end in .html")


def main(config: ReportConfig) -> Answer:
    """`visard report`."""
    *sources, out = config.paths
    runs, results = read_sources(sources)
    title = config.title or ", ".join([*(run.name for run in runs), *(result.name for result in results)])
    subtitle = f"visard {__version__} · {time.strftime('%d %B %Y, %H:%M')}"
    series = scaling(runs, results, config.scaling) if config.scaling else []
    more = [scaling_section(series, config.scaling)] if series else []
    page = document(runs, results, title=title, subtitle=subtitle, machine=machine_text(), more=more)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_page(out, page)
    size_kb = len(page.encode()) / 1000
    value: dict[str, Any] = {"out": str(out), "runs": [r.name for r in runs], "results": [r.name for r in results]}
    laws = [f"{one.name}: error = {one.law.a:.4f} (N / {one.law.unit:.3g})^-{one.law.b:.3f}" for one in series]
    laws = [line + (f" + {one.law.c:.4f}" if one.law.c else "") for line, one in zip(laws, series, strict=True)]
    if series:
        value["scaling"] = numbers(series)
    return Answer(value, "\n".join([f"{out}: {len(runs)} runs, {len(results)} results, {size_kb:,.0f} kB", *laws]))


def machine_text() -> str:
    """Hardware and software of the machine that writes the page."""
    lines = [
        "The page was written on:",
        f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} CPU cores{_processor()}",
        f"Python {platform.python_version()}, visard {__version__}",
        ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
    ]
    return "\n".join(lines)


def _version(package: str) -> str:
    """A package may be there under another name (opencv-python for its headless build)."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed by this name"


def _processor() -> str:
    """The processor's name where the system tells it in a file (Linux)."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return ""
    names = [line.partition(":")[2].strip() for line in path.read_text().splitlines() if line.startswith("model name")]
    return f", {names[0]}" if names else ""
