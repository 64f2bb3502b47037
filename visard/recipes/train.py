"""`visard train`: a recipe by name or file.py:function, overridden on the command line, trained into a run directory.

In: arguments. Out: the run directory with checkpoints and logs. The same command works under torchrun.
Parsing imports no torch, so that --help and --dry-run answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import io
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visard.config import BackboneConfig, DataConfig, Recipe, from_dict, to_dict
from visard.config_augment import preset
from visard.console import Answer, say
from visard.errors import UserError
from visard.recipes import load_recipe
from visard.recipes.options import refuse_idle, with_kinds
from visard.recipes.whereabouts import anchored, located
from visard.wording import wording

if TYPE_CHECKING:
    from visard.data.dataset import FaceDataset

USAGE = """usage: visard train RECIPE [options] [--section.field value ...]
       visard train --resume RUN [options]

RECIPE is a name (visard recipes lists them) or file.py:function.

options:
  --data SOURCE       what to train on: prepared data, a folder of identities, a .rec file, rendered:400x20
  --val SET ...       pair sets evaluated while training: SOURCE or SOURCE::PAIRS_FILE
  --out RUN           the run directory to make
  --resume RUN        go on with that run, exactly where it stopped
  --init MODEL        start from the weights of a model or run (and its centres of identities with the same name)
  --augment NAME      none, light, strong or adaface; --data.augment.TRANSFORMATION.SETTING changes one of its values
  --epochs N          length of the run
  --device NAME       auto, cuda, mps or cpu
  --dry-run           print the resolved recipe as JSON and do nothing
  --overfit-batch     train on one batch again and again: does the loss go down? Writes nothing
  --profile           time some steps, print where it goes, write RUN/profile/trace.json, and end
  --json              print the answer as JSON
"""


SHORTCUTS = (
    *("--data", "--out", "--resume", "--init", "--device", "--augment", "--val", "--epochs"),
    *("--dry-run", "--overfit-batch", "--profile"),
)


SAME = (
    ("data", "data", "source"),
    ("out", "run", "out"),
    ("init", "run", "init"),
    ("val", "run", "val"),
    ("device", "run", "device"),
    ("epochs", "schedule", "epochs"),
)
"""Shortcuts, and the section and field that each stands for."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    recipe: Recipe
    resume: bool
    dry_run: bool
    overfit_batch: bool
    profile: bool


def run(arguments: list[str]) -> Answer:
    """The command behind `visard train`."""
    request = parse(arguments)
    if request is None:
        return Answer(value={"usage": USAGE}, text=USAGE)
    recipe = request.recipe
    if request.dry_run:
        values = to_dict(recipe)
        return Answer(value=values, text=json.dumps(values, indent=2))
    if not recipe.data.source:
        raise UserError(f"{recipe.name} has no data of its own; name yours with --data (see docs/own-data.md)")
    return _carry_out(request)


def open_data(config: DataConfig, size: int, *, resize: bool = True) -> FaceDataset:
    """What is trained on, with crops of `size` pixels, for which those on disk may be scaled or not."""
    from visard.data.dataset import open_dataset

    return open_dataset(
        config.source,
        size=size,
        resize=resize,
        same_names=config.same_names,
        tolerant=config.broken == "skip",
        framing=config.framing.kind,
        unlabelled=config.unlabelled,
    )


def recipe_of_run(run: Path, name: str | None = None) -> Recipe:
    """What a run's recipe.json says; with a name it must be a run of that recipe.

    Raises:
        UserError: no run is there, its file is damaged, or it is one of another recipe.
    """
    path = run / "recipe.json"
    if not path.is_file():
        raise UserError(
            f"{run}: no run there ({path.name} is missing); start one with `visard train RECIPE --out {run}`"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); it cannot be resumed") from error
    recipe = from_dict(Recipe, values, where=str(path))
    if name is not None and name != recipe.name and load_recipe(name).name != recipe.name:
        raise UserError(f"{run} is a run of {recipe.name}, not of {name}; leave the name out to go on with it")
    return recipe


def parse(arguments: list[str]) -> Request | None:
    """The request, or None if only help was asked for.

    Raises:
        UserError: an unknown recipe, option or field, or a value that cannot be.
    """
    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    shortcuts, overrides = _shortcuts().parse_known_args(arguments[1:] if name else arguments)
    asked_for_help = "-h" in overrides or "--help" in overrides
    if name is None and shortcuts.resume is None:
        if asked_for_help:
            return None
        raise UserError(
            "train what? `visard recipes` lists the recipes: visard train RECIPE, or file.py:function, or --resume RUN"
        )
    if asked_for_help:
        print(USAGE)
    if shortcuts.resume is None:
        assert name is not None
        recipe = load_recipe(name)
    else:
        recipe = recipe_of_run(Path(shortcuts.resume), name)
        for option in ("out", "init"):
            if getattr(shortcuts, option) is not None:
                raise UserError(f"--{option} cannot be changed by --resume; start a new run to change it")
    saved = recipe
    if shortcuts.augment is not None:
        recipe = replace(recipe, data=replace(recipe.data, augment=preset(shortcuts.augment)))
    overridden = _override(recipe, overrides)
    _check_against_shortcuts(recipe, overridden, shortcuts)
    before, recipe = recipe, _apply(overridden, shortcuts)
    refuse_idle(before, recipe)
    _require_network(to_dict(before.backbone), to_dict(overridden.backbone), recipe)
    if shortcuts.resume is not None:
        data = shortcuts.data is not None or recipe.data.source != saved.data.source
        val = shortcuts.val is not None or recipe.run.val != saved.run.val
        recipe = anchored(recipe, data=data, val=val)
        for change in _changes(to_dict(replace(saved, run=replace(saved.run, out=recipe.run.out))), to_dict(recipe)):
            _say_once(f"changed since the run was started: {change}")
    return Request(recipe, shortcuts.resume is not None, shortcuts.dry_run, shortcuts.overfit_batch, shortcuts.profile)


def _shortcuts() -> argparse.ArgumentParser:
    parser = _OneLineParser(add_help=False, allow_abbrev=False)
    for option in ("--data", "--out", "--resume", "--init", "--device", "--augment"):
        parser.add_argument(option)
    parser.add_argument("--val", nargs="+")
    parser.add_argument("--epochs", type=float)
    for flag in ("--dry-run", "--overfit-batch", "--profile"):
        parser.add_argument(flag, action="store_true")
    return parser


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        message = re.sub(r"argument (--\w+): expected .*", r"\1 needs a value behind it", message)
        message = re.sub(r"argument (--\w+): invalid float value: '(.*)'", r"\1 \2: expected a number", message)
        raise UserError(f"{message}; `visard train --help` explains all")


def _override(recipe: Recipe, overrides: list[str]) -> Recipe:
    """`--section.field value` for any field of the recipe."""
    import tyro

    recipe = with_kinds(recipe, overrides)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            changed, unknown = tyro.cli(
                Recipe,
                default=recipe,
                args=overrides,
                config=(tyro.conf.AvoidSubcommands,),
                prog=f"visard train {recipe.name}",
                return_unknown_args=True,
            )
    except SystemExit as ended:
        if ended.code == 0:
            raise
        raise UserError(f"{wording(said.getvalue())}; `visard train {recipe.name} --help` lists all fields") from None
    if unknown:
        raise UserError(f"{_of_unknown(unknown[0], recipe)}; `visard train {recipe.name} --help` lists all fields")
    return changed


def _of_unknown(word: str, recipe: Recipe) -> str:
    """What to say of a word that is no option: a misspelt one is guessed."""
    option = word.partition("=")[0]
    if not option.startswith("-"):
        return f"{word!r} is one argument too many (the recipe comes first, options have --)"
    meant = difflib.get_close_matches(option.replace("_", "-"), [*_option_names(to_dict(recipe)), *SHORTCUTS], 1)
    return f"unknown option {option}" + (f"; did you mean {meant[0]}?" if meant else "")


def _option_names(values: dict[str, Any], prefix: str = "--") -> list[str]:
    """`--section.field` of every field."""
    names = []
    for key, value in values.items():
        name = prefix + key.replace("_", "-")
        names += _option_names(value, f"{name}.") if isinstance(value, dict) else [name]
    return names


def _check_against_shortcuts(before: Recipe, overridden: Recipe, shortcuts: argparse.Namespace) -> None:
    """Raises UserError where a shortcut would silently win over a `--section.field` given besides."""
    max_steps = overridden.schedule.max_steps
    if shortcuts.epochs is not None and max_steps != before.schedule.max_steps:
        raise UserError(f"--epochs and --schedule.max-steps {max_steps} exclude each other; give one length")
    if shortcuts.overfit_batch and shortcuts.profile:
        raise UserError("--overfit-batch and --profile exclude each other; run one after the other")
    if shortcuts.resume is not None:
        for name in ("out", "init", "init_network", "init_centres"):
            if getattr(overridden.run, name) != getattr(before.run, name):
                raise UserError(f"run.{name} cannot be changed by --resume; start a new run to change it")
    elif overridden.run.started_in != before.run.started_in:
        raise UserError("run.started_in is written by visard train itself; leave it out")
    for shortcut, section, field in SAME:
        given = getattr(shortcuts, shortcut) is not None
        if given and getattr(getattr(overridden, section), field) != getattr(getattr(before, section), field):
            raise UserError(f"--{shortcut} and --{section}.{field} are the same; give one")


def _apply(recipe: Recipe, shortcuts: argparse.Namespace) -> Recipe:
    run: dict[str, Any] = {}
    if shortcuts.out is not None:
        run["out"] = Path(shortcuts.out)
    if shortcuts.resume is not None:
        run["out"] = Path(shortcuts.resume)
    if shortcuts.val is not None:
        run["val"] = tuple(shortcuts.val)
    if shortcuts.init is not None:
        run["init"] = shortcuts.init
    if shortcuts.device is not None:
        run["device"] = shortcuts.device
    # through from_dict, because a shortcut's text has not been checked against the field's type yet
    changed = from_dict(type(recipe.run), to_dict(replace(recipe.run)) | to_dict(run), where="command line")
    recipe = replace(recipe, run=changed)
    if shortcuts.data is not None:
        recipe = replace(recipe, data=replace(recipe.data, source=shortcuts.data))
    if shortcuts.epochs is not None:
        recipe = replace(recipe, schedule=replace(recipe.schedule, epochs=shortcuts.epochs, max_steps=0))
    if recipe.run.init and shortcuts.resume is None:
        recipe = _shape_of(recipe, Path(recipe.run.init))
    return recipe


def _require_network(before: dict[str, Any], given: dict[str, Any], recipe: Recipe) -> None:
    """Raises UserError where the network of --init would silently win over a --backbone.FIELD."""
    taken = to_dict(recipe.backbone)
    for key in given:
        if given[key] != before.get(key) and given[key] != taken.get(key):
            cut = ", or cut a smaller network out of it by --run.init-network slim"
            whose = f"{recipe.run.init} ({taken.get(key, 'it has none')})"
            raise UserError(
                f"backbone.{key} {given[key]} is not that of {whose}, whose network is taken as it is; leave it out"
                + (cut if key in ("blocks", "width") else "")
            )


def _changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Fields that differ, as "section.field old -> new"."""
    found = []
    for key in new:
        if isinstance(new[key], dict) and isinstance(old.get(key), dict):
            found += _changes(old[key], new[key], f"{prefix}{key}.")
        elif new[key] != old.get(key):
            found.append(f"{prefix}{key} {old.get(key)} -> {new[key]}")
    return found


def _say_once(text: str) -> None:
    """A line on standard error, of one process only: torchrun's environment tells before there is a process group."""
    if os.environ.get("RANK", "0") == "0":
        say(text)


def _shape_of(recipe: Recipe, model: Path) -> Recipe:
    """The recipe with the network and crop size of the model that it starts from."""
    from visard.backbones import config_from_dict
    from visard.backbones.published import SUFFIXES, config_of, read_torch_file, started_config
    from visard.backbones.slim import slimmed
    from visard.runtime import find_model, read_spec

    if model.is_file() and model.suffix in SUFFIXES:
        of_file = config_of(read_torch_file(model).tensors, where=str(model))
        return _with_network(recipe, started_config(of_file, recipe.backbone), model)
    found = find_model(model)
    if found.suffix == ".onnx":
        raise UserError(f"{model}: an ONNX file is frozen; give --init the run or model directory it was exported from")
    spec_path = found / "spec.json"
    backbone = config_from_dict(read_spec(spec_path).backbone, where=f"{spec_path}: backbone")
    if recipe.run.init_network == "slim":
        backbone = slimmed(backbone, recipe.backbone)
    return _with_network(recipe, backbone, model)


def _with_network(recipe: Recipe, backbone: BackboneConfig, model: Path) -> Recipe:
    if backbone == recipe.backbone:
        return recipe
    _say_once(f"network and crop size of {model}: {to_dict(backbone)}")
    data: DataConfig = replace(recipe.data, size=backbone.input_size)
    return replace(recipe, backbone=backbone, data=data)


def _require_own_run(recipe: Recipe) -> None:
    """A process that torchrun started anew goes on with the run that its group began, and with no other.

    A group that was refused because OUT held a run already is started anew too, and would otherwise take that run up.

    Raises:
        UserError: OUT holds a run with other settings.
    """
    if not (recipe.run.out / "recipe.json").is_file():
        return
    there = recipe_of_run(recipe.run.out)
    # What "auto" has chosen is written down at the start.
    there = replace(there, run=replace(there.run, float32_matmul=recipe.run.float32_matmul))
    if differ := _changes(to_dict(there), to_dict(recipe)):
        raise UserError(
            f"{recipe.run.out} holds another run already ({', '.join(differ[:3])}); go on with it by --resume "
            f"{recipe.run.out}, or name another --out"
        )


def _carry_out(request: Request) -> Answer:
    from visard import dist
    from visard.checkpoint import pointed
    from visard.data.unaligned import unaligned_remark
    from visard.recipes.evaluation import validation
    from visard.training.checks import overfit_batch, profile
    from visard.training.loop import process_device, train

    recipe = request.recipe
    if request.resume:
        paths = located(recipe)
        recipe = replace(recipe, run=replace(recipe.run, init=paths.run.init), distill=paths.distill)
    else:
        recipe = paths = replace(recipe, run=replace(recipe.run, started_in=os.getcwd()))
        if dist.restarted():
            _require_own_run(recipe)

    opened = functools.partial(open_data, paths.data)
    dataset = opened(recipe.data.size, resize=recipe.data.resize)
    if remark := unaligned_remark(dataset, recipe.data.source):
        _say_once(remark)
    dist.init(process_device(recipe))
    try:
        if not dist.is_main():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # rank 0 answers for all
        if request.overfit_batch:
            return overfit_batch(recipe, dataset, opened)
        if request.profile:
            return profile(recipe, dataset, opened)
        run = train(recipe, dataset, evaluate=validation(paths), resume=request.resume, at_size=opened)
        best, last = pointed(run, "best"), pointed(run, "last")
        value = {"run": str(run), "best": best, "last": last}
        text = f"{run}: {'best ' + best + ', ' if best else ''}last {last}"
        return Answer(value=value, text=text)
    finally:
        dist.close()
