"""`visard evaluate PROTOCOL MODEL|EMBEDDINGS DATA`: embeds what is not embedded yet and hands it to the protocol.

In: a model with a data set, or an embeddings directory. Out: the result as a table or JSON, and with `--out` a folder
with result.json and pictures. Each protocol's options are in a module of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from visard.console import Answer, parse
from visard.errors import UserError
from visard.protocols import pairs_command, retrieval_command
from visard.protocols.pairs_command import PairsConfig
from visard.protocols.retrieval_command import RetrievalConfig

PROTOCOLS: dict[str, tuple[type[Any], Callable[[Any], Answer], str]] = {
    "pairs": (PairsConfig, pairs_command.main, "verification of pairs of images, LFW style"),
    "retrieval": (RetrievalConfig, retrieval_command.main, "Recall@K and MAP@R: is the nearest image of the same?"),
}


def run(arguments: list[str]) -> Answer:
    """`visard evaluate`."""
    overview = "\n".join(f"  {name:<10} {line}" for name, (_, _, line) in PROTOCOLS.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        if not arguments:
            raise UserError(f"which protocol? known are {', '.join(PROTOCOLS)}; `visard evaluate --help` explains them")
        usage = "usage: visard evaluate PROTOCOL MODEL|EMBEDDINGS DATA [options]"
        text = f"{usage}\n\n{overview}\n\nvisard evaluate PROTOCOL --help shows its options."
        return Answer({"protocols": list(PROTOCOLS)}, text)
    name, *rest = arguments
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}; known are {', '.join(PROTOCOLS)}")
    config, main, line = PROTOCOLS[name]
    return main(parse(config, rest, command=f"visard evaluate {name}", description=line))
