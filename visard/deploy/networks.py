"""`visard networks`: every network by name, its parameters and multiply-adds, counted without any memory for them.

In: names, perhaps another width or crop size. Out: a table, and with one name the options that put it into a recipe.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace
from typing import Any

import torch
import tyro

from visard.backbones import build
from visard.backbones.named import NETWORKS, network
from visard.config import BackboneConfig, IResNetConfig, to_dict
from visard.console import Answer
from visard.deploy.macs import count_macs, count_parameters


@dataclass(frozen=True, kw_only=True)
class NetworksConfig:
    """Sizes of networks."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Which; none = all."""
    input_size: int = 0
    """Crop size in pixels; 0 = each network's own."""
    width: int = 0
    """Channels of the first stage; 0 = each network's own."""
    markdown: bool = False
    """The table as docs/networks.md has it."""


def main(config: NetworksConfig) -> Answer:
    """`visard networks`."""
    chosen = {name: network(name) for name in config.names or NETWORKS}
    sizes = {name: value for name in ("input_size", "width") if (value := getattr(config, name))}
    found = {name: replace(shape, **sizes) for name, shape in chosen.items()}
    counts = {name: size_of(shape) for name, shape in found.items()}
    values: dict[str, Any] = {
        name: {"backbone": to_dict(shape), "parameters": counts[name][0], "macs": counts[name][1]}
        for name, shape in found.items()
    }
    if config.markdown:
        return Answer(values, markdown(found, counts))
    lines = [f"{'network':<24}{'parameters':>13}{'MACs':>10}"]
    lines += [f"{name:<24}{p / 1e6:>11.2f} M{m / 1e9:>8.2f} G" for name, (p, m) in counts.items()]
    if len(found) == 1:
        (shape,) = found.values()
        lines.append(f"in a recipe: backbone={written(shape)}")
        if isinstance(shape, IResNetConfig):  # a recipe's kind of network is its own
            lines.append(f"with a recipe of an IResNet: visard train RECIPE {options(shape)}")
    return Answer(values, "\n".join(lines))


def size_of(shape: BackboneConfig) -> tuple[int, int]:
    """(parameters, multiply-adds an image), counted on the meta device."""
    with torch.device("meta"):
        module = build(shape)
    return count_parameters(module), count_macs(module, shape.input_size)


def markdown(shapes: dict[str, BackboneConfig], counts: dict[str, tuple[int, int]]) -> str:
    """The table of docs/networks.md."""
    lines = ["| network | configuration | parameters | MACs an image |", "|---|---|---|---|"]
    for name, (parameters, macs) in counts.items():
        lines.append(f"| {name} | `{written(shapes[name])}` | {parameters / 1e6:.2f} M | {macs / 1e9:.2f} G |")
    return "\n".join(lines)


def written(shape: BackboneConfig) -> str:
    """The call that makes the configuration: what differs from its defaults."""
    return f"{type(shape).__name__}({', '.join(f'{name}={_text(value)}' for name, value in _changed(shape).items())})"


def options(shape: BackboneConfig) -> str:
    """The options that give a recipe whose network is of the same kind this one."""
    # All fields: the recipe's own may differ from the defaults.
    words = [_option(field.name, getattr(shape, field.name)) for field in dataclasses.fields(shape)]
    return " ".join([*words, f"--data.size {shape.input_size}"])


def _changed(shape: BackboneConfig) -> dict[str, Any]:
    default = type(shape)()
    values = {field.name: getattr(shape, field.name) for field in dataclasses.fields(shape)}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def _text(value: object) -> str:
    return json.dumps(value) if isinstance(value, str) else f"{value}"


def _option(name: str, value: object) -> str:
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--backbone.{name if value else f'no-{name}'}"
    return f"--backbone.{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
