"""Reads what MXNet wrote, without MXNet: `.params` (named arrays) and `-symbol.json` (the graph that uses them).

In: a path. Out: `read_params` -> {"arg:conv_weight": array, "aux:...": array}; `read_symbol` -> operators in order.
A file that does not keep to its format raises FormatError with the byte position; no length in it is believed before
the bytes that it promises are there, so a damaged file makes the reader allocate no more than its own size.

Layout of .params, little endian (MXNet, src/ndarray/ndarray.cc): uint64 0x112, uint64 0, uint64 count, then the arrays;
uint64 count, then the names, each uint64 length + UTF-8 bytes. An array: uint32 magic; int32 storage type (V2 on); the
shape, uint32 rank + int64 sizes (before V1 the magic is the rank and sizes are uint32); int32 device type and number;
int32 value type; values in C order.
"""

from __future__ import annotations

import ast
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visard.errors import FormatError

LIST_MAGIC = 0x112
MAGIC_V1, MAGIC_V2, MAGIC_V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
DENSE = 0
MAX_RANK = 32
# MXNet's type flags; others (bfloat16 and quantised types) are not used for the weights of published networks.
VALUE_TYPES = {0: "<f4", 1: "<f8", 2: "<f2", 3: "|u1", 4: "<i4", 5: "|i1", 6: "<i8"}

Array = NDArray[Any]


@dataclass(frozen=True)
class Operator:
    """One operator of the graph.

    Args:
        op: MXNet's name of the operator ("Convolution").
        name: the node's own name.
        attributes: as written, text by name.
        inputs: for every input the index of the operator that computes it, or the name of the array or "data" it reads.
    """

    op: str
    name: str
    attributes: dict[str, str]
    inputs: tuple[int | str, ...]

    def attribute(self, key: str, default: Any) -> Any:
        """The attribute as a Python value: "(3, 3)" -> (3, 3), "True" -> True, "prelu" -> "prelu"."""
        text = self.attributes.get(key)
        if text is None:
            return default
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text


def read_params(path: str | Path) -> dict[str, Array]:
    """The arrays of a .params file by name ("arg:..." weights, "aux:..." running statistics), in the file's order.

    Raises:
        FormatError: not a .params file, cut short, or damaged.
    """
    cursor = _Cursor(Path(path), Path(path).read_bytes())
    if cursor.unsigned(8) != LIST_MAGIC:
        raise cursor.error("not an MXNet .params file (it begins with 0x112); give the file NAME-0000.params", at=0)
    if cursor.unsigned(8) != 0:
        raise cursor.error("the reserved field is not 0; the file is damaged", at=8)
    # An array takes at least its magic, a rank and a size, so the count is bounded by what is there.
    arrays = [_read_array(cursor) for _ in range(cursor.count(smallest_item=12))]
    names_at = cursor.position
    names = [cursor.text() for _ in range(cursor.count(smallest_item=8))]
    if cursor.position != len(cursor.data):
        raise cursor.error(f"{len(cursor.data) - cursor.position} bytes follow the last name; the file is damaged")
    if len(names) != len(arrays):
        raise cursor.error(f"{len(arrays)} arrays but {len(names)} names; the file is damaged", at=names_at)
    if len(set(names)) != len(names):
        raise cursor.error("an array's name occurs twice; the file is damaged", at=names_at)
    return dict(zip(names, arrays, strict=True))


def read_symbol(path: str | Path) -> tuple[Operator, ...]:
    """The operators of a -symbol.json in execution order (MXNet writes every node after its inputs).

    Raises:
        FormatError: not JSON, or not a graph.
    """
    path = Path(path)
    try:
        nodes = json.loads(path.read_bytes())["nodes"]
        return _operators(nodes)
    except (ValueError, RecursionError) as error:
        raise FormatError(path, f"not a graph as MXNet writes it ({error}); give NAME-symbol.json") from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise FormatError(path, f"not a graph as MXNet writes it (no {error}); give NAME-symbol.json") from error


def _operators(nodes: list[dict[str, Any]]) -> tuple[Operator, ...]:
    sources: list[int | str] = []
    operators: list[Operator] = []
    for node in nodes:
        if node["op"] == "null":
            sources.append(str(node["name"]))
            continue
        # "attrs" since MXNet 1.0; "attr" and "param" before.
        attributes = node.get("attrs") or node.get("attr") or node.get("param") or {}
        inputs = []
        for index, *_ in node["inputs"]:
            if not 0 <= index < len(sources):
                raise ValueError(f"node {node['name']!r} reads node {index}, which does not come before it")
            inputs.append(sources[index])
        sources.append(len(operators))
        texts = {str(key): str(value) for key, value in attributes.items()}
        operators.append(Operator(str(node["op"]), str(node["name"]), texts, tuple(inputs)))
    return tuple(operators)


class _Cursor:
    """A position in the file's bytes that never reads past their end."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.position = path, data, 0

    def error(self, problem: str, *, at: int | None = None) -> FormatError:
        return FormatError(self.path, problem, self.position if at is None else at)

    def take(self, size: int) -> bytes:
        left = len(self.data) - self.position
        if size > left:
            raise self.error(f"{size} bytes expected, {left} are left; the file is cut short or damaged")
        start, self.position = self.position, self.position + size
        return self.data[start : self.position]

    def unsigned(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def count(self, *, smallest_item: int) -> int:
        at, number = self.position, self.unsigned(8)
        left = len(self.data) - self.position
        if number * smallest_item > left:
            raise self.error(
                f"{number} items announced in the {left} bytes left; the file is cut short or damaged", at=at
            )
        return number

    def text(self) -> str:
        at, size = self.position, self.unsigned(8)
        try:
            return self.take(size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error("a name is not UTF-8; the file is damaged", at=at) from error


def _read_array(cursor: _Cursor) -> Array:
    at, magic = cursor.position, cursor.unsigned(4)
    if magic in (MAGIC_V2, MAGIC_V3) and cursor.unsigned(4) != DENSE:
        raise cursor.error("a sparse array; only dense ones are supported", at=at)
    if magic in (MAGIC_V1, MAGIC_V2, MAGIC_V3):
        rank, size_bytes = cursor.unsigned(4), 8
    else:
        rank, size_bytes = magic, 4
    if not 1 <= rank <= MAX_RANK:
        raise cursor.error(f"an array of {rank} dimensions; the file is damaged", at=at)
    shape = struct.unpack(f"<{rank}{'Q' if size_bytes == 8 else 'I'}", cursor.take(rank * size_bytes))
    cursor.take(8)
    flag = cursor.unsigned(4)
    if flag not in VALUE_TYPES:
        raise cursor.error(
            f"value type {flag} is unknown; types {min(VALUE_TYPES)} to {max(VALUE_TYPES)} are supported", at=at
        )
    dtype = np.dtype(VALUE_TYPES[flag])
    values = cursor.take(math.prod(shape) * dtype.itemsize)
    # A size of 0 lets the others be anything, even more than numpy can index.
    if 0 in shape:
        raise cursor.error(f"an empty array {shape}; the file is damaged", at=at)
    return np.frombuffer(values, dtype).reshape(shape).astype(dtype.newbyteorder("="))
