"""The `visard` command: finds the command by name, imports only what it needs, turns a user's mistake into one line.

In: arguments. Out: the command's answer on standard output (JSON with --json), progress and errors on standard error.
Exit codes: 0 the work was done, 2 a mistake in the input or settings, 130 interrupted by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import io
import json
import os
import re
import select
import sys
from dataclasses import dataclass
from typing import TextIO

from visard import __version__, completion
from visard.console import parse
from visard.errors import Interrupted, UserError
from visard.signals import sigterm_as_ctrl_c


@dataclass(frozen=True)
class Command:
    """Where a command lives.

    Its `module` has a config dataclass and `main(config) -> Answer`, or `run(arguments: list[str]) -> Answer`.
    """

    module: str
    config: str
    line: str
    goes_on: bool = False
    """Whether the same command takes up interrupted work where it stopped."""
    words: tuple[str, ...] = ()
    """What may follow the command's name: protocols, actions."""


DISK_ERRORS = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EROFS", "EFBIG", "EIO") if hasattr(errno, name)}
"""What a write can end with; such an error names no file."""

COMMANDS = {
    "prepare": Command(
        "visard.align.prepare",
        "PrepareConfig",
        "photographs in folders of identities -> aligned, packed records",
        goes_on=True,
    ),
    "render": Command("visard.data.render", "RenderConfig", "rendered faces to disk", goes_on=True),
    "convert": Command("visard.data.convert", "ConvertConfig", "between records, folders, lists, tar shards and .bin"),
    "inspect": Command("visard.data.inspect", "InspectConfig", "counts, histogram, broken and double images, pictures"),
    "mask": Command(
        "visard.recipes.mask", "MaskCopyConfig", "masked copies of a data, pair or template set", goes_on=True
    ),
    "train": Command("visard.recipes.train", "", "train a recipe: a name or file.py:function"),
    "plan": Command("visard.recipes.plan", "", "memory of each device before a recipe is started: plan RECIPE"),
    "networks": Command("visard.deploy.networks", "NetworksConfig", "networks by name, their parameters and MACs"),
    "recipes": Command("visard.recipes.command", "RecipesConfig", "what can be trained, one line each"),
    "embed": Command("visard.embed", "EmbedConfig", "embeddings of a data set", goes_on=True),
    "evaluate": Command(
        "visard.protocols.command",
        "",
        "score a model or embeddings: evaluate pairs MODEL DATA",
        words=("pairs", "retrieval"),
    ),
    "pairs": Command(
        "visard.protocols.make_pairs", "", "draw a list of pairs: pairs make DATA OUT.txt", words=("make",)
    ),
    "import": Command("visard.deploy.importing", "ImportConfig", "weights from elsewhere -> a visard model"),
    "export": Command("visard.deploy.export", "ExportConfig", "a run or model -> ONNX, parity proved"),
    "drift": Command("visard.recipes.drift", "DriftConfig", "how old may a queue's embeddings become, with figures"),
    "report": Command("visard.report.command", "ReportConfig", "runs and results -> one HTML page"),
    "models": Command(
        "visard.align.models", "", "detector weights: list them, pull them into the cache", words=("list", "pull")
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        with sigterm_as_ctrl_c():
            return _run(list(sys.argv[1:] if arguments is None else arguments))
    except BrokenPipeError:
        if not _reader_left():
            raise
        return 0
    finally:
        _reader_left()


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"visard {__version__}")
        return 0
    name, *arguments = map(_at_home, arguments)
    try:
        if name == "--completion":
            print(completion.script(_shell(arguments), _completed_words()))
            return 0
        if name not in COMMANDS:
            meant = "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(name, COMMANDS, 1))
            raise UserError(f"unknown command {name!r}{meant}; `visard --help` lists them")
        as_json = "--json" in arguments
        answer = _dispatch(name, [a for a in arguments if a != "--json"])
    except UserError as error:
        print(f"visard {name}: {error}" if name in COMMANDS else f"visard: {error}", file=sys.stderr)
        return 2
    except Interrupted as interruption:
        print(f"visard {name}: {interruption}", file=sys.stderr)
        return 128 + interruption.signal
    except KeyboardInterrupt as cause:
        goes_on = name in COMMANDS and COMMANDS[name].goes_on
        rest = "the same command goes on where it stopped" if goes_on else "it was not done"
        stopped = Interrupted.by(cause, rest)
        print(f"visard {name}: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except OSError as error:
        if not _is_of_the_file_system(error):
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"visard {name}: {where}{error.strerror}; check the place, its permissions and its room", file=sys.stderr)
        return 2
    print(json.dumps(answer.value, indent=2) if as_json else answer.text)
    return 0


def _at_home(argument: str) -> str:
    """`~/x` and `--option=~/x` as a shell would have read them unquoted."""
    option, equals, value = argument.partition("=")
    if argument.startswith("~/"):
        return os.path.expanduser(argument)
    return (
        option + equals + os.path.expanduser(value) if option.startswith("--") and value.startswith("~/") else argument
    )


def _is_of_the_file_system(error: OSError) -> bool:
    """Whether a path, its permissions or a full disk is the cause; a pipe, socket or library is not."""
    return error.strerror is not None and (error.filename is not None or error.errno in DISK_ERRORS)


def _reader_left() -> bool:
    """Writes out what was printed; whether nobody reads it any more, as in `visard recipes | head -1`."""
    try:
        sys.stdout.flush()
        if not _pipe_is_broken(sys.stdout):
            return False
    except BrokenPipeError:
        pass
    # What is still buffered must have somewhere to go when the interpreter ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _pipe_is_broken(stream: TextIO) -> bool:
    # An unbuffered stream has nothing left to flush after the write that failed, so flushing alone cannot tell.
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # not a file: a test's or a notebook's
        return False
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _dispatch(name: str, arguments: list[str]):  # type: ignore[no-untyped-def]
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    if not command.config:
        return module.run(arguments)
    config = parse(getattr(module, command.config), arguments, command=f"visard {name}", description=command.line)
    return module.main(config)


def _shell(arguments: list[str]) -> str:
    if len(arguments) != 1 or arguments[0] not in completion.SHELLS:
        raise UserError(f"--completion: for which shell? give one of {', '.join(completion.SHELLS)}")
    return arguments[0]


def _completed_words() -> dict[str, list[str]]:
    """What may follow each command: its words, and the options that its help names."""
    from visard.recipes import RECIPES

    words = {"": [*COMMANDS, "--help", "--version", "--completion"]}
    for name, command in COMMANDS.items():
        of_recipe = name in ("train", "plan")
        following = list(RECIPES) if of_recipe else list(command.words)
        # A recipe's help has every field of a run besides the shortcuts; without one only the shortcuts are told.
        words[name] = following + _options([name, *following[: name == "train"]])
        words |= {f"{name} {word}": _options([name, word]) for word in command.words}
    return words


def _options(arguments: list[str]) -> list[str]:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        shown.write(_dispatch(arguments[0], [*arguments[1:], "--help"]).text)
    found = re.findall(r"(?<![\w-])--[a-z][a-z0-9.-]*[a-z0-9]", shown.getvalue())
    return sorted({*found, "--json"} - {"--section.field", "--section.key"})


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {command.line}" for name, command in COMMANDS.items())
    return (
        f"visard {__version__}: train, evaluate and deploy face-recognition models\n\n"
        f"usage: visard COMMAND [options]\n\n{lines}\n\n"
        "visard COMMAND --help shows a command's options; --json prints its answer as JSON.\n"
        f"visard --completion {'|'.join(completion.SHELLS)} prints what makes that shell complete all this."
    )


if __name__ == "__main__":
    sys.exit(main())
