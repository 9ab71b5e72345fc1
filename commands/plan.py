"""dpipe plan: what a command would do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..schemas.errors import UsageError
from . import load_command

if TYPE_CHECKING:
    pass


@click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def plan(ctx: click.Context, words: tuple[str, ...]) -> None:
    """What a command would do: any of convert, precompute, train with --dry-run.

    \b
    dpipe plan convert libero
    dpipe plan train libra
    """
    if not words or words[0] not in ("convert", "precompute", "train"):
        raise UsageError(
            "plan what? dpipe plan convert SOURCE, dpipe plan precompute STAGE, dpipe plan train RECIPE"
        )
    command = load_command(words[0])
    with command.make_context(words[0], [*words[1:], "--dry-run"], parent=ctx.parent) as inner:
        command.invoke(inner)
