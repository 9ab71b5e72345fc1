"""`accelerate launch -m dpipe.trainer RECIPE DATASET RUN [--steps N] [name=value ...]`: one run on many processes.

The same as `dpipe train` on a finished dataset whose targets are there; words `name=value` are options of the
recipe or of the loop. Nothing is built here: many processes must not all start converting.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from ..schemas.errors import DpipeError, UsageError
from . import RECIPES, open_recipe


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dpipe.trainer", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("recipe", help=", ".join(RECIPES))
    parser.add_argument("dataset", type=Path, help="folder of a finished dataset")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--frames", default="auto", choices=("auto", "jpeg", "video", "none"))
    parser.add_argument("--preset", default="", help="named settings, see presets.py")
    parser.add_argument("--track", default="auto", help="see track.py")
    parser.add_argument("options", nargs="*", help="name=value")
    given = parser.parse_intermixed_args(words)
    try:
        from .run import train

        config, options = divide(given.recipe, given.options)
        result = train(
            given.recipe,
            given.dataset,
            given.run,
            steps=given.steps,
            config=config,
            options=options,
            frames=given.frames,
            preset=given.preset,
            track=given.track.split(","),
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except DpipeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(result.message)
    return 0


def divide(recipe: str, words: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """`name=value` words -> (the recipe's, the loop's)."""
    from .loop import Options

    own = {field.name for field in dataclasses.fields(open_recipe(recipe).config)}
    loop = {field.name for field in dataclasses.fields(Options)} - own
    config: dict[str, str] = {}
    options: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"'{word}' is not name=value")
        name = name.replace("-", "_")
        (options if name in loop else config)[name] = value
    return config, options


if __name__ == "__main__":
    sys.exit(main())
