"""tyro's framed explanation of a mistake on the command line -> one line that a newcomer understands.

In: the frame, the config dataclass, the arguments. Out: what is wrong and what is expected, with the usage where an
argument is missing or one too many.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence
from typing import Any

EXPECTED = {"INT": "a whole number", "FLOAT": "a number", "PATH": "a path", "BOOL": "True or False"}
"""tyro's names of types."""


def wording(box: str, *, usage: str = "", positional: Sequence[str] = ()) -> str:
    """One line for a frame.

    Args:
        box: what tyro wrote to standard error; without UTF-8 the frame is drawn in other characters.
        usage: how the command is called, "visard prepare SRC OUT [options]"; "" says nothing about it.
        positional: names of the arguments without "--", as in the usage.
    """
    parts = [" ".join(re.sub("[│|╭╮╰╯]", " ", part).split()) for part in re.split("[─-]{4,}", box)]
    _, said, *more = [part for part in parts if part] or ["", " ".join(box.split())]
    behind = f"; usage: {usage}" if usage else ""
    if said.startswith("Missing from"):
        missing = [name for name in positional if re.search(rf"^\W*{re.escape(name)}\W*$", box, re.MULTILINE)]
        return f"{' and '.join(missing) or 'an argument'} {'are' if len(missing) > 1 else 'is'} missing{behind}"
    if found := re.match(r"Missing value for argument '([^']*)'\. Expected (\d+)", said):
        name, count = found[1], int(found[2])
        if name.startswith("-"):
            return f"{name} needs {'a value' if count == 1 else f'{count} values'} behind it"
        return f"{name.upper()} is missing{behind}"
    if found := re.match(r"invalid choice '(.*)' for argument '([^']*)'\. Expected one of \((.*)\)", said):
        choices = sorted({choice.strip(" '") for choice in found[3].split(",")} - {"", "None"})
        return f"{found[2]} {found[1]}: choose one of {', '.join(choices)}"
    if found := re.match(r"Error parsing ([^:]*): (.*)", said):
        return _value(found[1], found[2], " ".join(more))
    if found := re.match(r"Unrecognized options: (.*)", said):
        return _unrecognised(found[1].split(", ")[0], more, behind)
    return said.rstrip(".")


def usage_of(kind: type[Any], command: str) -> tuple[str, tuple[str, ...]]:
    """How a command is called, and the names of its arguments without "--"."""
    fields = dataclasses.fields(kind)
    names = {f.name: name for f in fields if (name := _positional(kind, f.name))}
    words = [names[f.name] if _is_required(f) else f"[{names[f.name]}]" for f in fields if f.name in names]
    options = ["[options]"] if len(names) < len(fields) else []
    return " ".join([command, *words, *options]), tuple(names.values())


def unknown_option(kind: type[Any], arguments: Sequence[str]) -> str | None:
    """What to say of the first `--option` that `kind` does not have, before anything else is wrong with the rest."""
    known = {"--help"}
    for f in dataclasses.fields(kind):
        if not _positional(kind, f.name):
            name = f.name.replace("_", "-")
            known |= {f"--{name}", f"--no-{name}"} if f.type in (bool, "bool") else {f"--{name}"}
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name != "--" and name not in known:
            return _unknown(argument.partition("=")[0], difflib.get_close_matches(name, sorted(known), 1))
    return None


def _unknown(option: str, meant: Sequence[str]) -> str:
    return f"unknown option {option}" + (f"; did you mean {meant[0]}?" if meant else "")


def _unrecognised(first: str, more: Sequence[str], behind: str) -> str:
    if not first.startswith("-"):
        return f"{first!r} is one argument too many{behind}"
    found = re.search(r"Perhaps you meant: (--[\w.-]+)", " ".join(more))
    return _unknown(first, [found[1]] if found else [])


def _value(option: str, said: str, helptext: str) -> str:
    """A value of the wrong type: what it is, and what is expected by the help's name of the type."""
    given = re.search(r"\['(.*?)'\]|'([^']*)'", said)
    value = next((text for text in given.groups() if text is not None), "") if given else ""
    word = next((name for name in re.findall("[A-Z]+", f"{said} {helptext}") if name in EXPECTED), "")
    return f"{option} {value}: expected {EXPECTED[word]}" if word else f"{option}: {said}"


def _positional(kind: type[Any], name: str) -> str:
    """The name in the usage of an argument without "--", "" for an option."""
    import tyro

    hint = typing.get_type_hints(kind, include_extras=True)[name]
    metadata = getattr(hint, "__metadata__", ())
    if tyro.conf.Positional not in metadata:
        return ""
    metavar = next((m for item in metadata if (m := getattr(item, "metavar", None))), None)
    return metavar or name.upper()


def _is_required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
