"""What options of `visard train` mean for one another: a kind brings its own fields, and none is given for nothing.

In: the recipe before and after the command line. Out: the recipe to override, or a UserError that names the option that
would change nothing.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from visard.config import DistillConfig, HeadConfig, Recipe, from_dict, to_dict
from visard.config_augment import AugmentConfig
from visard.errors import UserError

OF_OPTIMIZER_KINDS = ("momentum", "nesterov", "beta1", "beta2", "eps", "trust")
"""Fields of `OptimConfig` that belong to one kind."""

OF_ANY_TEACHER = ("teacher", "embeddings", "cache", "view")
"""Fields of `DistillConfig` that say which teacher, whatever is learnt from it."""


def with_kinds(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe ready for the kinds that the command line names: fields of the old kinds are gone.

    A new margin keeps the recipe's scale and the gradient's kind, a new way of distilling its teacher; all else is the
    new kind's own default. Sections that fit together only with what else the command line says are not checked here.
    """
    kind = _given(overrides, "--head.margin.kind")
    margin = recipe.head.margin
    if kind not in (None, margin.kind):
        values = {"kind": kind, "scale": margin.scale, "gradient": margin.gradient}
        head = from_dict(HeadConfig, to_dict(recipe.head) | {"margin": values}, where="--head.margin.kind: head")
        recipe = _unchecked(recipe, head=head)
    # Here only the old kind's fields are put back: the new kind may need fields that are yet to come.
    if _given(overrides, "--schedule.kind") not in (None, recipe.schedule.kind):
        schedule = replace(recipe.schedule, kind="constant", milestones=(), milestone_steps=(), gamma=0.1, power=2.0)
        recipe = _unchecked(recipe, schedule=schedule)
    framing = recipe.data.framing
    if _given(overrides, "--data.framing.kind") not in (None, framing.kind):
        data = replace(recipe.data, framing=type(framing)(), resize=False)
        recipe = _unchecked(recipe, data=data)
    optim = recipe.optim
    if _given(overrides, "--optim.kind") not in (None, optim.kind):
        own = {f.name: f.default for f in dataclasses.fields(optim) if f.name in OF_OPTIMIZER_KINDS}
        recipe = _unchecked(recipe, optim=replace(optim, **own))
    method = _given(overrides, "--distill.method")
    if method not in (None, recipe.distill.method):
        # What the old method has filled in is not the new one's own.
        kept = {name: getattr(recipe.distill, name) for name in OF_ANY_TEACHER if method != "none"}
        distill = from_dict(DistillConfig, {"method": method, **kept}, where="--distill.method: distill")
        recipe = _unchecked(recipe, distill=distill)
    sampler = recipe.data.sampler
    if _given(overrides, "--data.sampler.kind") not in (None, sampler.kind):
        recipe = _unchecked(recipe, data=replace(recipe.data, sampler=type(sampler)()))
    return recipe


def refuse_idle(before: Recipe, recipe: Recipe) -> None:
    """Raises UserError for a setting that was changed from `before` and does nothing in `recipe`."""
    run, old = recipe.run, before.run
    _refuse(
        run.evaluate_every != old.evaluate_every and not run.val,
        "run.evaluate_every does nothing without a validation set; name one with --val",
    )
    _refuse(
        run.val_pairs != old.val_pairs and all("::" in entry or entry.endswith(".bin") for entry in run.val),
        "run.val_pairs does nothing: no validation set has its pairs drawn; name one with --val SOURCE",
    )
    _refuse(
        run.init_network != old.init_network and not run.init,
        "run.init_network does nothing without a model to start from; name one with --init",
    )
    _refuse(
        run.init_centres != old.init_centres and not run.init,
        "run.init_centres does nothing without a model to start from; name one with --init",
    )
    _refuse(
        recipe.schedule.epochs != before.schedule.epochs and recipe.schedule.max_steps > 0,
        f"schedule.epochs does nothing while schedule.max_steps is {recipe.schedule.max_steps}; use --epochs",
    )
    queue = recipe.head.queue
    _refuse(
        queue.compensation != before.head.queue.compensation and queue.size == 0,
        "head.queue.compensation does nothing without a queue; give --head.queue.size too",
    )
    distill = recipe.distill
    _refuse(
        recipe.head != before.head and distill.method != "none" and not _has_classes(recipe),
        f"head.* does nothing: distill.method {distill.method} learns no classes here",
    )
    augmented = recipe.data.masks.probability > 0 or any(
        getattr(recipe.data.augment, part.name).probability > 0 for part in dataclasses.fields(recipe.data.augment)
    )
    _refuse(
        distill.view == "augmented" and before.distill.view == "clean" and not augmented,
        "distill.view augmented does nothing without an augmentation; give --augment NAME or --data.masks too",
    )
    source = recipe.data.source
    several = " + " in source or " * " in source or source.endswith(".json") or bool(recipe.data.unlabelled)
    _refuse(
        recipe.data.same_names != before.data.same_names and bool(source) and not several,
        f"data.same_names does nothing: {source} is a single data set; it belongs to several, A + B",
    )
    _refuse_idle_augment(before.data.augment, recipe.data.augment)
    masks, old_masks = recipe.data.masks, before.data.masks
    _refuse(
        masks.probability == 0 and masks != replace(old_masks, probability=0),
        "data.masks: its settings do nothing while its probability is 0; give --data.masks.probability too",
    )


def _has_classes(recipe: Recipe) -> bool:
    return recipe.data.labels == "used" and recipe.distill.has_classes


def _refuse_idle_augment(before: AugmentConfig, augment: AugmentConfig) -> None:
    for part in dataclasses.fields(augment):
        old, new = getattr(before, part.name), getattr(augment, part.name)
        changed = [f.name for f in dataclasses.fields(new) if getattr(new, f.name) != getattr(old, f.name)]
        _refuse(
            new.probability == 0 and bool(set(changed) - {"probability"}),
            f"data.augment.{part.name}.{changed[-1] if changed else ''} does nothing while its probability is 0; "
            f"give --data.augment.{part.name}.probability too",
        )


def _unchecked(recipe: Recipe, **sections: Any) -> Recipe:
    """`dataclasses.replace` without the check that the sections fit together."""
    changed = copy.copy(recipe)
    for name, section in sections.items():
        object.__setattr__(changed, name, section)
    return changed


def _given(overrides: Sequence[str], option: str) -> str | None:
    """The value that the command line has for an option, the last one; None if it has none."""
    value = None
    for position, word in enumerate(overrides):
        name, equals, behind = word.partition("=")
        if name == option:
            value = behind if equals else "".join(overrides[position + 1 : position + 2])
    return value


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise UserError(message)
