"""`visard plan RECIPE`: memory of each device, what fits and how large a batch, before anything is started.

In: a recipe with the options of `visard train`, devices and hosts. Out: a table, and with --json every number in bytes.
Nothing is allocated and no image is read: it runs anywhere.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from visard.config import Checkpointing, Recipe
from visard.console import Answer, say
from visard.errors import UserError
from visard.recipes.train import parse as parse_recipe

USAGE = """usage: visard plan RECIPE [options] [--section.field value ...]

Everything that `visard train RECIPE` understands, and:
  --devices N ...     devices of each host, one line each (default 1 2 4 8 16 32 64)
  --hosts H           machines (default 1)
  --batch B           images of a device in a step; default: run.batch_global over all devices
  --identities C      default: those of --data
  --memory GIB        of a device (default 80)
  --reserve GIB       of it for what cannot be counted: context, allocator, kernels' workspaces (default 1)
  --json              print the answer as JSON, in bytes
"""

DEVICES = (1, 2, 4, 8, 16, 32, 64)
MANY_BLOCKS = 150
LEGEND = (
    "weights to activations: of the network; classifier: centres, their momentum and gradient; its work: embeddings,",
    "shares and buffers while the loss is computed; when: the moment of the peak; most images: that fit; sends: a",
    "device in a step; paper's FC: 3 Mem_w + 2 Mem_logits (docs/plan.md)",
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message.removeprefix('argument ')}; `visard plan --help` explains all")


def run(arguments: list[str]) -> Answer:
    """The command behind `visard plan`."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--devices", type=int, nargs="+", default=list(DEVICES))
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--identities", type=int, default=0)
    parser.add_argument("--memory", type=float, default=80.0)
    parser.add_argument("--reserve", type=float, default=1.0)
    if not arguments or arguments[0].startswith("-"):
        if "-h" in arguments or "--help" in arguments:
            return Answer({"usage": USAGE}, USAGE)
        raise UserError("plan what? name a recipe first: visard plan RECIPE; `visard recipes` lists them")
    asked, rest = parser.parse_known_args(arguments[1:])
    if "-h" in rest or "--help" in rest:
        return Answer({"usage": USAGE}, USAGE)
    for name in ("hosts", "identities", "batch"):
        if getattr(asked, name) < (1 if name == "hosts" else 0):
            raise UserError(f"--{name} is {getattr(asked, name)}; it must be at least 1")
    if min(asked.devices) < 1:
        raise UserError(f"--devices is {min(asked.devices)}; at least 1")
    if not asked.memory > asked.reserve >= 0:
        raise UserError(
            f"--memory {asked.memory:g} GiB must be above --reserve {asked.reserve:g} GiB, that not below 0"
        )
    request = parse_recipe([arguments[0], *rest])
    assert request is not None, "a recipe was named"
    recipe = request.recipe
    identities = asked.identities or _identities(recipe)
    if identities < 2:
        raise UserError(f"--identities is {identities}; training needs at least 2")
    return answer(
        recipe,
        identities,
        devices=asked.devices,
        hosts=asked.hosts,
        batch=asked.batch,
        memory_gib=asked.memory,
        reserve_gib=asked.reserve,
    )


def answer(
    recipe: Recipe,
    identities: int,
    *,
    devices: list[int],
    hosts: int,
    batch: int,
    memory_gib: float,
    reserve_gib: float,
) -> Answer:
    """The plan of a recipe for several numbers of devices.

    Args:
        recipe: what would be trained.
        identities: C.
        devices: of each host, a line each.
        hosts: machines.
        batch: images of a device; 0 = the recipe's batch over all of them.
        memory_gib: of a device.
        reserve_gib: of it, for what cannot be counted.
    """
    from visard.training.memory import GIB
    from visard.training.plan import Layout, count_network, largest_batch, plan

    level = recipe.run.checkpointing
    other: Checkpointing = "segment" if level == "none" else "none"
    blocks = sum(getattr(recipe.backbone, "blocks", ()))
    if blocks > MANY_BLOCKS:
        say(f"counting a network of {blocks} blocks takes up to a minute or two")
    networks = {name: count_network(recipe.backbone, name, recipe.run.precision) for name in (level, other)}
    kind = "cpu" if recipe.run.device == "cpu" else "cuda"
    room = int((memory_gib - reserve_gib) * GIB)
    rows, values = [], []
    devices, left_out = _startable(recipe, devices, hosts, batch)
    for count in devices:
        each = batch or -(-recipe.run.batch_global // (count * hosts))
        layout = Layout(devices=count, hosts=hosts, batch=each, zero=recipe.run.zero, kind=kind)
        found = plan(recipe, identities, networks[level], layout)
        instead = plan(recipe, identities, networks[other], layout)
        most = largest_batch(recipe, identities, networks[level], layout, room)
        head = found.classifier
        cells = [
            f"{hosts} x {count}" if hosts > 1 else str(count),
            str(each),
            *(
                f"{value / GIB:.2f}"
                for value in (
                    found.parameters,
                    found.gradients,
                    found.optimizer,
                    found.activations,
                    head.weight + head.state + head.gradient,
                    head.queue,
                    head.passing,
                    found.peak,
                )
            ),
            found.moment,
            "yes" if found.peak <= room else "no",
            str(most),
            f"{instead.peak / GIB:.2f}",
            f"{found.sent / GIB:.2f}",
            f"{found.paper / GIB:.2f}",
        ]
        rows.append(cells)
        values.append(
            {**asdict(found), "fits": found.peak <= room, "largest_batch": most, f"peak_{other}": instead.peak}
        )
    header = [
        *("devices", "images", "weights", "gradients", "optimizer", "activations", "classifier", "queue", "its work"),
        *("peak", "when", "fits", "most images", f"peak {other}", "sends", "paper's FC"),
    ]
    mib = GIB / 1024
    kept = {name: network.kept[1] / mib for name, network in networks.items()}
    lines = [
        f"{recipe.name}: {recipe.backbone.kind}, {networks[level].trained / 4e6:.2f} M trained parameters, "
        f"{identities:,} identities, {recipe.run.precision}, checkpointing {level}, "
        f"{recipe.run.micro_batches} micro-batches, ZeRO {recipe.run.zero}",
        f"an image's activations: {', '.join(f'{value:.1f} MiB ({name})' for name, value in kept.items())}",
        f"GiB a device; fits: in {memory_gib:g} GiB less {reserve_gib:g}",
        "",
        *_aligned([header, *rows]),
        "",
        *LEGEND,
    ]
    if left_out:
        lines.append(left_out)
    if recipe.distill.method != "none":
        lines.append("not counted: the teacher (distill)")
    value = {
        "recipe": recipe.name,
        "identities": identities,
        "checkpointing": level,
        "memory_gib": memory_gib,
        "reserve_gib": reserve_gib,
        "networks": {name: asdict(network) for name, network in networks.items()},
        "plans": values,
    }
    return Answer(value, "\n".join(lines))


def _startable(recipe: Recipe, devices: list[int], hosts: int, batch: int) -> tuple[list[int], str]:
    """Those numbers of devices with which training would start, and a line about the others.

    Raises:
        UserError: there are none.
    """
    parts = recipe.run.micro_batches
    least = 1 if parts == 1 else 2 * parts
    usable = [count for count in devices if (batch or recipe.run.batch_global // (count * hosts)) >= least]
    others = ", ".join(str(count * hosts) for count in devices if count not in usable)
    if not others:
        return usable, ""
    given = f"--batch {batch}" if batch else f"run.batch_global {recipe.run.batch_global}"
    line = f"{given} is too few for {others} devices, each of which needs {least} or more"
    line += f" for {parts} micro-batches" if parts > 1 else ""
    if not usable:
        raise UserError(f"{line}; raise it")
    return usable, f"left out: {line}"


def _identities(recipe: Recipe) -> int:
    """Of the recipe's data, which is opened but not read."""
    from visard.data.dataset import open_dataset

    data = recipe.data
    if not data.source:
        raise UserError(f"{recipe.name} has no data of its own; give --identities or --data")
    dataset = open_dataset(data.source, size=data.size, resize=True, same_names=data.same_names)
    return len(dataset.identities)


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
