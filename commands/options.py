"""Options that commands share, made once, and how they read and answer."""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..schemas.errors import UsageError

if TYPE_CHECKING:
    from ..pipeline.plan import Step
    from ..pipeline.progress import Progress
    from ..pipeline.workspace import Workspace


OWN_OPTIONS = "dpipe.own_options"  # of one call: of the stages or the recipe it names


def common(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options every command has."""
    for option in reversed(_common_options()):
        function = option(function)
    return function


def _common_options() -> list[Callable[..., Any]]:
    return [
        click.option(
            "--workspace", type=click.Path(path_type=Path), help="Folder to work in.  [DPIPE_WORKSPACE or .]"
        ),
        click.option(
            "--json", "as_json", is_flag=True, help="Machine-readable result, progress as JSON events."
        ),
        click.option("--debug", is_flag=True, help="Show tracebacks."),
    ]


def _run_options() -> list[Callable[..., Any]]:
    return [
        click.option(
            "--workers", type=click.IntRange(0), help="Processes; 0 runs in this one.  [number of cores]"
        ),
        click.option(
            "--scheduler",
            help="A running Dask scheduler, tcp://host:port; or cluster: jobs by [cluster] of dpipe.toml.",
        ),
        click.option(
            "--where", help="SQL condition over episodes, e.g. \"frames > 50 AND split = 'train'\"."
        ),
        click.option("--max-time", type=float, help="Stop cleanly after this many seconds (exit 75)."),
        click.option("--yes", is_flag=True, help="Do not ask before long or large work."),
        click.option("--dry-run", is_flag=True, help="Print what would run, and stop."),
        click.option(
            "--price", type=float, help="--dry-run: price of a core hour, to tell what it would cost."
        ),
    ]


def running(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of commands that do work."""
    for option in reversed(_run_options()):
        function = option(function)
    return common(function)


def options_of(options_type: type, unset: bool = False) -> list[click.Parameter]:
    """Command-line options from the fields of a dataclass; `unset`: None unless given, words as they are.

    An option's help is the field's metadata, or the comment that stands behind the field in the code.
    """
    made: list[click.Parameter] = []
    if unset:
        told = field_comments(options_type)
        for item in fields(options_type):
            flag = f"--{item.name.replace('_', '-')}"
            default = item.default if item.default is not MISSING else item.default_factory()  # type: ignore[misc]
            shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
            text = str(item.metadata.get("help", "")) or told.get(item.name, "")
            text = f"{text}  [{shown or 'none'}]".strip()
            if isinstance(default, bool):
                made.append(click.Option([f"{flag}/--no-{flag[2:]}"], default=None, help=text))
            else:
                choices = "|".join(map(str, item.metadata.get("choices", ())))
                made.append(click.Option([flag], help=text, metavar=choices or _METAVARS[type(default)]))
        return made
    for item in fields(options_type):
        flag = f"--{item.name.replace('_', '-')}"
        help_text = str(item.metadata.get("help", ""))
        choices = item.metadata.get("choices")
        if isinstance(item.default, bool):
            made.append(click.Option([flag], is_flag=True, default=item.default, help=help_text))
        elif choices:
            made.append(
                click.Option(
                    [flag],
                    type=click.Choice(choices),
                    default=item.default,
                    show_default=True,
                    help=help_text,
                )
            )
        else:
            kind = type(item.default) if item.default is not None else str
            made.append(
                click.Option(
                    [flag],
                    type=kind,
                    default=item.default,
                    show_default=item.default is not None,
                    help=help_text,
                )
            )
    return made


def open_space(folder: Path | None) -> Workspace:
    from ..pipeline.workspace import open_workspace

    return open_workspace(folder)


def find_scheduler(space: Workspace, word: str | None) -> str | None:
    """What `--scheduler` stands for in this workspace."""
    from ..pipeline.cluster import scheduler_of

    return scheduler_of(word, space.settings) if word else None


def show_progress(as_json: bool) -> Progress:
    from ..pipeline.progress import Progress

    return Progress(json_events=as_json)


def count_workers(given: int | None) -> int:
    if given is not None:
        return given
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def given_words() -> list[str]:
    return sys.argv[1:]


def parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise UsageError(f"--resize {text}: expected WIDTHxHEIGHT, for example 256x256")
    return int(width), int(height)


def answer(facts: dict[str, Any], text: str, as_json: bool) -> None:
    click.echo(json.dumps(facts, ensure_ascii=False) if as_json else text)


_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", tuple: "A,B,...", type(None): "TEXT"}


def field_comments(kind: type) -> dict[str, str]:
    """The comment behind each field of a dataclass, as written in its source: `steps: int = 5  # of a chunk`.

    So the file that a reader of the code opens and the help that a user reads say the same, once.
    """
    try:
        lines = inspect.getsource(kind).splitlines()
    except (OSError, TypeError):  # a class made on the fly
        return {}
    found: dict[str, str] = {}
    for item in fields(kind):
        for line in lines:
            match = re.match(rf"\s+{item.name}: [^#]*#\s*(.+)$", line)
            if match:
                found[item.name] = match.group(1).replace(" [ours]", "").strip()
    return found


def show_plan(steps: Sequence[Step], workers: int, price: float | None, as_json: bool) -> None:
    """A plan on stdout; DataError where it cannot fit the disk."""
    from ..pipeline.plan import plan_json, plan_text, require_disk

    answer(plan_json(steps, workers, price), plan_text(steps, workers, price), as_json)
    require_disk(steps)


def agree_to(steps: Sequence[Step], workers: int, yes: bool) -> None:
    """Ask before work of more than 50 GB or an hour; refuse where nobody can be asked."""
    from ..pipeline.plan import refuse_or_ask, require_disk

    require_disk(steps)
    text = refuse_or_ask(steps, workers, yes, sys.stdin.isatty())
    if text:
        click.confirm(f"{text}. Go on?", abort=True, err=True)
