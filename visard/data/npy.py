"""Memory-maps a `.npy` file of a known type, and trusts nothing in it.

In: the path, the type and shape that it must have. Out: a read-only array. numpy's own reader evaluates the header as
Python, where a damaged one ends in many kinds of exceptions or a huge allocation; ours compares it.

Source: numpy.lib.format, version 1.0.
"""

from __future__ import annotations

import math
import mmap
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visard.errors import FormatError

_START = b"\x93NUMPY\x01\x00"
_HEAD = re.compile(rb"\{'descr': '([<|]\w\d{1,2})', 'fortran_order': False, 'shape': \((\d*(?:, ?\d+)*),?\), \} *\n")


def map_npy(path: Path, shape: tuple[int, ...], dtype: type[np.generic], remedy: str) -> NDArray[Any]:
    """The array of a file.

    Args:
        shape, dtype: what it must have.
        remedy: what to do about a file that has not, for the message.

    Raises:
        FormatError: not such a file.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(len(_START) + 2)
            length = int.from_bytes(start[-2:], "little")
            head = _HEAD.fullmatch(file.read(length))
            if not start.startswith(_START) or head is None:
                raise FormatError(path, f"is not an array that visard wrote; {remedy}")
            found = tuple(int(n) for n in head[2].split(b",") if n)
            if found != shape or head[1].decode() != np.dtype(dtype).str:
                what = f"{head[1].decode()} {found}, expected {np.dtype(dtype).str} {shape}"
                raise FormatError(path, f"is {what}; {remedy}")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise FormatError(path, f"cannot be read ({error}); {remedy}") from error
    at, count = len(_START) + 2 + length, math.prod(shape)
    if at + count * np.dtype(dtype).itemsize != len(data):
        raise FormatError(path, f"has {len(data)} bytes, its header promises another number; {remedy}", len(data))
    return np.frombuffer(data, dtype, count, at).reshape(shape)
