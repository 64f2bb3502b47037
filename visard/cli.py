"""The `visard` command: finds the command by name, imports only what it needs, and turns a user's mistake into one line.

In: arguments. Out: the command's answer on standard output (JSON with --json), progress and errors on standard error.
Exit codes: 0 the work was done, 2 a mistake in the input or settings, 130 interrupted by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import dataclass

from visard import __version__
from visard.errors import Interrupted, UserError


@dataclass(frozen=True)
class Command:
    """Where a command lives: `module` has `run(arguments: list[str]) -> Answer` or a config dataclass and `main(config) -> Answer`."""

    module: str
    config: str
    line: str


COMMANDS = {
    "prepare": Command("visard.align.prepare", "PrepareConfig", "photographs in folders of identities -> aligned, packed records"),
    "render": Command("visard.data.render", "RenderConfig", "rendered faces to disk"),
    "train": Command("visard.recipes.train", "", "train a recipe: a name or file.py:function"),
    "recipes": Command("visard.recipes.command", "RecipesConfig", "what can be trained, one line each"),
    "embed": Command("visard.embed", "EmbedConfig", "embeddings of a data set"),
    "evaluate": Command("visard.protocols.command", "", "score a model or embeddings: evaluate pairs MODEL DATA"),
    "import": Command("visard.deploy.importing", "ImportConfig", "weights from elsewhere -> a visard model"),
    "export": Command("visard.deploy.export", "ExportConfig", "a run or model -> ONNX, parity proved"),
    "report": Command("visard.report.command", "ReportConfig", "runs and results -> one HTML page"),
    "models": Command("visard.align.models", "", "detector weights: list them, pull them into the cache"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"visard {__version__}")
        return 0
    name = arguments.pop(0)
    if name not in COMMANDS:
        print(f"visard: unknown command {name!r}; `visard --help` lists them", file=sys.stderr)
        return 2
    as_json = "--json" in arguments
    arguments = [a for a in arguments if a != "--json"]
    try:
        answer = _dispatch(name, arguments)
    except UserError as error:
        print(f"visard {name}: {error}", file=sys.stderr)
        return 2
    except Interrupted as interruption:
        print(f"visard {name}: {interruption}", file=sys.stderr)
        return 128 + interruption.signal
    except KeyboardInterrupt:
        print(f"visard {name}: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    print(json.dumps(answer.value, indent=2) if as_json else answer.text)
    return 0


def _dispatch(name: str, arguments: list[str]):  # type: ignore[no-untyped-def]
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    if not command.config:
        return module.run(arguments)
    import tyro

    config = tyro.cli(
        getattr(module, command.config), prog=f"visard {name}", args=arguments, description=command.line
    )
    return module.main(config)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {command.line}" for name, command in COMMANDS.items())
    return (
        f"visard {__version__}: train, evaluate and deploy face-recognition models\n\n"
        f"usage: visard COMMAND [options]\n\n{lines}\n\n"
        "visard COMMAND --help shows a command's options; --json prints its answer as JSON."
    )


if __name__ == "__main__":
    sys.exit(main())
