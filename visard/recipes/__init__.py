"""Runs that can be trained: one Python function each, which returns a `Recipe`.

In: a name of the table below, or `file.py:function` for one's own. Out: the recipe.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import traceback
from collections.abc import Callable, Iterator
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
    "broadface_ms1m_r100": "visard.recipes.broadface:broadface_ms1m_r100",
    "broadface_ms1m_r100_tiny": "visard.recipes.broadface:broadface_ms1m_r100_tiny",
    "broadface_inshop_r50": "visard.recipes.retrieval:broadface_inshop_r50",
    "broadface_inshop_r50_tiny": "visard.recipes.retrieval:broadface_inshop_r50_tiny",
    "broadface_sop_r50": "visard.recipes.retrieval:broadface_sop_r50",
    "broadface_sop_r50_tiny": "visard.recipes.retrieval:broadface_sop_r50_tiny",
    "omniglot_small": "visard.recipes.retrieval:omniglot_small",
    "omniglot_tiny": "visard.recipes.retrieval:omniglot_tiny",
    "masked_finetune": "visard.recipes.masked:masked_finetune",
    "mfr_masks_15": "visard.recipes.masked:mfr_masks_15",
    "mfr_masks_15_tiny": "visard.recipes.masked:mfr_masks_15_tiny",
    "mfr_masks_33": "visard.recipes.masked:mfr_masks_33",
    "mfr_masks_33_tiny": "visard.recipes.masked:mfr_masks_33_tiny",
    "bigface_r240": "visard.recipes.bigface:bigface_r240",
    "bigface_r240_tiny": "visard.recipes.bigface:bigface_r240_tiny",
    "bigface_r600": "visard.recipes.bigface:bigface_r600",
    "bigface_r600_tiny": "visard.recipes.bigface:bigface_r600_tiny",
    "bigface_r1200": "visard.recipes.bigface:bigface_r1200",
    "bigface_r1200_tiny": "visard.recipes.bigface:bigface_r1200_tiny",
    "mfr_wf42m": "visard.recipes.bigface:mfr_wf42m",
    "mfr_wf42m_tiny": "visard.recipes.bigface:mfr_wf42m_tiny",
    "mfr_wf42m_masks33": "visard.recipes.bigface:mfr_wf42m_masks33",
    "mfr_wf42m_masks33_tiny": "visard.recipes.bigface:mfr_wf42m_masks33_tiny",
    "ms1mv3_r50": "visard.recipes.published:ms1mv3_r50",
    "ms1mv3_r50_tiny": "visard.recipes.published:ms1mv3_r50_tiny",
    "glint360k_r100": "visard.recipes.published:glint360k_r100",
    "glint360k_r100_tiny": "visard.recipes.published:glint360k_r100_tiny",
    "wf42m_pfc02_r100": "visard.recipes.published:wf42m_pfc02_r100",
    "wf42m_pfc02_r100_tiny": "visard.recipes.published:wf42m_pfc02_r100_tiny",
    "adaface_ms1mv2_r50": "visard.recipes.published:adaface_ms1mv2_r50",
    "adaface_ms1mv2_r50_tiny": "visard.recipes.published:adaface_ms1mv2_r50_tiny",
    "margindistillation_r100_mobilefacenet": "visard.recipes.distill:margindistillation_r100_mobilefacenet",
    "margindistillation_r100_mobilefacenet_tiny": "visard.recipes.distill:margindistillation_r100_mobilefacenet_tiny",
    "angular_r100_mobilefacenet": "visard.recipes.distill:angular_r100_mobilefacenet",
    "angular_r100_mobilefacenet_tiny": "visard.recipes.distill:angular_r100_mobilefacenet_tiny",
    "margin_kd_r100_mobilefacenet": "visard.recipes.distill:margin_kd_r100_mobilefacenet",
    "margin_kd_r100_mobilefacenet_tiny": "visard.recipes.distill:margin_kd_r100_mobilefacenet_tiny",
    "triplet_l2_r100_mobilefacenet": "visard.recipes.distill:triplet_l2_r100_mobilefacenet",
    "triplet_l2_r100_mobilefacenet_tiny": "visard.recipes.distill:triplet_l2_r100_mobilefacenet_tiny",
    "triplet_cos_r100_mobilefacenet": "visard.recipes.distill:triplet_cos_r100_mobilefacenet",
    "triplet_cos_r100_mobilefacenet_tiny": "visard.recipes.distill:triplet_cos_r100_mobilefacenet_tiny",
    "bigface_distill_r600_r240": "visard.recipes.distill:bigface_distill_r600_r240",
    "bigface_distill_r600_r240_tiny": "visard.recipes.distill:bigface_distill_r600_r240_tiny",
}


def recipe_function(name: str) -> Callable[[], Recipe]:
    """The function behind a recipe's name or `file.py:function`.

    Raises:
        UserError: there is no such recipe, file or function, or the file has a mistake: then its line is named.
    """
    if name in RECIPES:
        module_name, function_name = RECIPES[name].split(":")
        function: Callable[[], Recipe] = getattr(importlib.import_module(module_name), function_name)
        return function
    file, colon, function_name = name.rpartition(":")
    if not colon or not file.endswith(".py"):
        meant = "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(name, RECIPES, 1))
        raise UserError(
            f"recipe {name!r} is unknown{meant}; `visard recipes` lists them; one's own is file.py:function"
        )
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _mistakes_named(path):
        spec.loader.exec_module(module)
    function = getattr(module, function_name, None)  # type: ignore[assignment]
    if not callable(function):
        raise UserError(f"{path}: has no function {function_name!r}")

    def recipe() -> Recipe:
        with _mistakes_named(path):
            return function()

    return functools.wraps(function)(recipe)


def load_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UserError: there is none, or the function returns something else.
    """
    recipe = recipe_function(name)()
    if not isinstance(recipe, Recipe):
        raise UserError(f"{name}: returned {type(recipe).__name__}, a recipe function returns a visard.config.Recipe")
    return recipe


@contextlib.contextmanager
def _mistakes_named(path: Path) -> Iterator[None]:
    """What goes wrong in a user's recipe file is the user's mistake: one line with file, line and what it is."""
    loaded = str(path.absolute())
    try:
        yield
    except UserError:
        raise
    except SyntaxError as error:
        file = path if error.filename in (loaded, None) else error.filename  # or a module that it imports
        where = f"{file}, line {error.lineno}" if error.lineno else file
        raise UserError(f"{where}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == loaded]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        said = " ".join(str(error).split())
        raise UserError(f"{where}: {type(error).__name__}: {said}") from error
