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
    "vita": "a vision-language student takes over a small action expert: its hidden states, then its job",
    "dial": "one system foresees features of a frozen tower, the other acts to make them so",
    "anchorrefine": "a frozen policy proposes a chunk, a small refiner says what it lacks",
    "pfd": "what a policy would do if it saw the future, distilled into an adapter that does not",
    "teacher": "a small policy by imitation, whose hidden states the teacher stage caches",
    "anchor": "a small policy by imitation, whose chunks the residuals stage corrects",
    "flow": "a small flow policy that sees the future half of the time, base of the privileged stage",
}
_MODULES = {"teacher": "embedded", "anchor": "embedded", "flow": "pfd"}  # others: the module of their name


def open_recipe(name: str) -> "Recipe":
    """A recipe by name; UsageError with the known ones otherwise."""
    from importlib import import_module

    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    module = import_module(f".{_MODULES.get(name, name)}", __name__)
    return getattr(module, name.upper() if name in _MODULES else "RECIPE")
