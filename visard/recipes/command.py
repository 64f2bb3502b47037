"""`visard recipes`: what can be trained, one line each.

In: nothing. Out: the name of every recipe, the first sentence of its description and its main settings.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from visard.console import Answer
from visard.recipes import RECIPES, load_recipe, recipe_function


@dataclass(frozen=True, kw_only=True)
class RecipesConfig:
    """No settings."""


def main(config: RecipesConfig) -> Answer:
    """Lists the recipes of this package."""
    rows = []
    for name in RECIPES:
        recipe = load_recipe(name)
        line = (inspect.getdoc(recipe_function(name)) or "").split("\n\n")[0].replace("\n", " ")
        rows.append({"name": name, "what": line, "backbone": recipe.backbone.kind, "size": recipe.data.size})
    width = max(len(str(row["name"])) for row in rows)
    text = "\n".join(f"{row['name']:<{width}}  {row['what']}" for row in rows)
    return Answer(value={"recipes": rows}, text=text)
