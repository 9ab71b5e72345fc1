"""Stream -> recipe -> checkpoint, one file per recipe; evaluation. Knows schemas, models, streams, samples.

To add a recipe: write `trainer/<name>.py` with a `RECIPE` (see `recipe.py`) and add its line here. Nothing of
torch is imported until a recipe is opened.
"""

from typing import TYPE_CHECKING

from ..schemas.errors import unknown_name

if TYPE_CHECKING:
    from .recipe import Recipe

RECIPES = {
    "libra": "a planner names coarse action bins, a refiner diffuses the action they stand for",
}


def open_recipe(name: str) -> "Recipe":
    """A recipe by name; UsageError with the known ones otherwise."""
    from importlib import import_module

    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return import_module(f".{name}", __name__).RECIPE
