"""dpipe completion: what a shell needs to complete our words."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem, get_completion_class

if TYPE_CHECKING:
    from ..pipeline.workspace import Workspace

WHERE = {
    "bash": "dpipe completion bash >> ~/.bashrc",
    "zsh": "dpipe completion zsh >> ~/.zshrc",
    "fish": "dpipe completion fish > ~/.config/fish/completions/dpipe.fish",
}


@click.command()
@click.argument("shell", type=click.Choice(list(WHERE)))
def completion(shell: str) -> None:
    """Print what makes a shell complete commands, options, datasets and files; put it where the shell reads it.

    \b
    dpipe completion bash >> ~/.bashrc
    dpipe completion fish > ~/.config/fish/completions/dpipe.fish
    """
    whole = click.get_current_context().find_root().command
    made = get_completion_class(shell)
    assert made is not None, "click knows all three"
    click.echo(f"# {WHERE[shell]}")
    click.echo(made(whole, {}, "dpipe", "_DPIPE_COMPLETE").source())


def complete_dataset(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Datasets of the workspace by name; where none begins so, files."""
    return _beginning(incomplete, (root.name for root in _space(ctx).datasets()))


def complete_run(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Runs of the workspace as RECIPE/NAME; where none begins so, files."""
    runs = _space(ctx).root / "runs"
    return _beginning(incomplete, (folder.relative_to(runs).as_posix() for folder in runs.glob("*/*")))


def complete_stage(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from ..stages import STAGES

    return [CompletionItem(name, help=text) for name, text in STAGES.items() if name.startswith(incomplete)]


def complete_recipe(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from ..trainer import RECIPES

    return [CompletionItem(name, help=text) for name, text in RECIPES.items() if name.startswith(incomplete)]


def _space(ctx: click.Context) -> Workspace:
    from .options import open_space

    given = ctx.params.get("workspace")
    return open_space(Path(given) if given else None)


def _beginning(incomplete: str, names: Iterable[str]) -> list[CompletionItem]:
    found = sorted(name for name in names if name.startswith(incomplete))
    return [CompletionItem(name) for name in found] or [CompletionItem(incomplete, type="file")]
