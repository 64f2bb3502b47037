"""What a report is made of, read from disk: runs and results.

In: a run directory (recipe.json, metrics.jsonl) or a result.json or its folder. Out: `RunRecord` and `ResultRecord`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visard.errors import FormatError, UserError
from visard.records import Result


@dataclass(frozen=True)
class RunRecord:
    """A training run.

    Args:
        name: short, unique in the report.
        recipe: recipe.json as it is.
        train: lines of metrics.jsonl of kind "train", in order of steps.
        val: those of kind "val".
        opening: the first lines of log.txt, before the first step: what was trained, where and in which precision.
    """

    name: str
    path: Path
    recipe: dict[str, Any]
    train: tuple[dict[str, Any], ...]
    val: tuple[dict[str, Any], ...]
    opening: str

    @property
    def sets(self) -> tuple[str, ...]:
        """Validation sets with an accuracy, in the order of their first appearance."""
        names = [key.removesuffix("/accuracy") for line in self.val for key in line if key.endswith("/accuracy")]
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class ResultRecord:
    """A protocol's result.

    Args:
        name: short, unique in the report.
        path: result.json; pictures that it names lie beside it.
    """

    name: str
    path: Path
    result: Result


def read_sources(paths: Sequence[Path]) -> tuple[list[RunRecord], list[ResultRecord]]:
    """Every path as what it is.

    Raises:
        UserError: a path that is neither.
        FormatError: a damaged file.
    """
    runs, results = [], []
    for path, name in zip(paths, _names(paths), strict=True):
        if (path / "recipe.json").is_file():
            runs.append(_read_run(path, name))
        elif (path / "result.json").is_file():
            results.append(_read_result(path / "result.json", name))
        elif path.suffix == ".json" and path.is_file():
            results.append(_read_result(path, name))
        else:
            raise UserError(
                f"{path}: neither a run (recipe.json) nor a result (result.json of `visard evaluate --out`)"
            )
    return runs, results


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path that says something, or more of it where two would be called the same."""
    telling = [
        path.parent if path.name == "result.json" else path.with_suffix("") for path in map(Path.absolute, paths)
    ]
    if len(set(telling)) != len(telling):
        raise UserError("the same run or result is named twice; name each once")
    depth = 1
    while len({path.parts[-depth:] for path in telling}) < len(telling):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in telling]


def _read_run(path: Path, name: str) -> RunRecord:
    recipe = _read_json(path / "recipe.json")
    metrics = path / "metrics.jsonl"
    lines = []
    if metrics.is_file():
        texts = metrics.read_text(encoding="utf-8").splitlines()
        for number, text in enumerate(texts, start=1):
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError as error:
                if number == len(texts):  # a run that is being written, or was killed at it
                    break
                raise FormatError(metrics, f"line {number} is not JSON ({error}); remove it") from error
    by_kind = {kind: tuple(line for line in lines if line.get("kind") == kind) for kind in ("train", "val")}
    opening = _opening(path / "log.txt")
    return RunRecord(name=name, path=path, recipe=recipe, train=by_kind["train"], val=by_kind["val"], opening=opening)


def _opening(log: Path) -> str:
    if not log.is_file():
        return ""
    lines = log.read_text(encoding="utf-8").splitlines()
    return "\n".join(itertools.takewhile(lambda line: " step " not in line[:26], lines))


def _read_result(path: Path, name: str) -> ResultRecord:
    return ResultRecord(
        name=name, path=path, result=Result.from_json(path.read_text(encoding="utf-8"), where=str(path))
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise FormatError(path, f"not JSON ({error}); make it again") from error
    if not isinstance(values, dict):
        raise FormatError(path, f"expected an object, got {type(values).__name__}; make it again")
    return values
