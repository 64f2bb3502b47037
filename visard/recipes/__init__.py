"""Runs that can be trained: one Python function each, which returns a `Recipe`.

In: a name of the table below, or `file.py:function` for one's own. Out: the recipe.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

from visard.config import Recipe
from visard.errors import UserError

RECIPES = {
    "quickstart": "visard.recipes.rendered:quickstart",
    "rendered_tiny": "visard.recipes.rendered:rendered_tiny",
    "rendered_small": "visard.recipes.rendered:rendered_small",
    "scratch_tiny": "visard.recipes.photographs:scratch_tiny",
    "scratch_small": "visard.recipes.photographs:scratch_small",
    "finetune_mobilefacenet": "visard.recipes.photographs:finetune_mobilefacenet",
    "ms1mv3_r50": "visard.recipes.published:ms1mv3_r50",
    "ms1mv3_r50_tiny": "visard.recipes.published:ms1mv3_r50_tiny",
    "glint360k_r100": "visard.recipes.published:glint360k_r100",
    "glint360k_r100_tiny": "visard.recipes.published:glint360k_r100_tiny",
    "wf42m_pfc02_r100": "visard.recipes.published:wf42m_pfc02_r100",
    "wf42m_pfc02_r100_tiny": "visard.recipes.published:wf42m_pfc02_r100_tiny",
    "adaface_ms1mv2_r50": "visard.recipes.published:adaface_ms1mv2_r50",
    "adaface_ms1mv2_r50_tiny": "visard.recipes.published:adaface_ms1mv2_r50_tiny",
}


def recipe_function(name: str) -> Callable[[], Recipe]:
    """The function behind a recipe's name or `file.py:function`.

    Raises:
        UserError: there is no such recipe, file or function.
    """
    if name in RECIPES:
        module_name, function_name = RECIPES[name].split(":")
        function: Callable[[], Recipe] = getattr(importlib.import_module(module_name), function_name)
        return function
    file, colon, function_name = name.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise UserError(f"recipe {name!r} is unknown; known are {', '.join(RECIPES)}, or give file.py:function")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, function_name, None)  # type: ignore[assignment]
    if not callable(function):
        raise UserError(f"{path}: has no function {function_name!r}")
    return function


def load_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UserError: there is none, or the function returns something else.
    """
    recipe = recipe_function(name)()
    if not isinstance(recipe, Recipe):
        raise UserError(f"{name}: returned {type(recipe).__name__}, a recipe function returns a visard.config.Recipe")
    return recipe
