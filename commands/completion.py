"""dpipe completion: what a shell needs to complete our words."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

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
    from ..pipeline.workspace import open_workspace

    given = ctx.params.get("workspace")
    space = open_workspace(Path(given) if given else None)
    names = [root.name for root in space.datasets() if root.name.startswith(incomplete)]
    return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]
