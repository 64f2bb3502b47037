"""Dataclasses to JSON values and back, exactly; what does not fit is named.

In: a dataclass, or JSON values. Out: the other. `from_dict` rejects an unknown key, a missing key and a wrong type by
name. A union member is told by its `kind`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from visard.errors import UserError

T = TypeVar("T")


def to_dict(value: Any) -> Any:
    """A dataclass as plain JSON values: tuples become lists, paths strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [to_dict(item) for item in value]
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    return value


def from_dict(cls: type[T], values: Any, *, where: str) -> T:
    """The dataclass `cls` from JSON values.

    Args:
        where: file (and field) named in the error.

    Raises:
        UserError: an unknown key, a missing key, a wrong type or an impossible combination.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected an object with the fields of {cls.__name__}, got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(f"{where}: unknown key {key!r}; known are {', '.join(sorted(fields))}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{where}: the key {name!r} is missing")
    # Files from before a field had kinds do not name one: such a field says what they meant.
    filled = {
        key: {"kind": fields[key].metadata["kind"], **value}
        if isinstance(value, dict) and "kind" in fields[key].metadata
        else value
        for key, value in values.items()
    }
    return cls(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in filled.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{where}: {value!r} is not one of {', '.join(map(repr, arguments))}")
        return value
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: expected a list, got {value!r}")
        variadic = origin is list or (len(arguments) == 2 and arguments[1] is Ellipsis)
        if not variadic and len(value) != len(arguments):
            raise UserError(f"{where}: expected {len(arguments)} values, got {len(value)}")
        item_hints = [arguments[0]] * len(value) if variadic else list(arguments)
        return origin(
            _convert(h, item, f"{where}[{i}]") for i, (h, item) in enumerate(zip(item_hints, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected an object, got {value!r}")
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where=where)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (hint is int and isinstance(value, bool)) or not isinstance(value, hint):
        raise UserError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _convert_union(members: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in members:
        return None
    tagged = {
        typing.get_args(typing.get_type_hints(m)["kind"])[0]: m
        for m in members
        if isinstance(m, type) and dataclasses.is_dataclass(m)
    }
    if tagged and isinstance(value, dict):
        kind = value.get("kind")
        if kind not in tagged:
            raise UserError(f"{where}: kind {kind!r} is not one of {', '.join(map(repr, tagged))}")
        return from_dict(tagged[kind], value, where=where)
    for member in members:
        if member is not type(None):
            try:
                return _convert(member, value, where)
            except UserError:
                continue
    raise UserError(f"{where}: {value!r} fits none of {', '.join(getattr(m, '__name__', str(m)) for m in members)}")
