"""Options that commands share, made once, and how they read and answer."""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..schemas.errors import UsageError

if TYPE_CHECKING:
    from ..pipeline.plan import Step
    from ..pipeline.progress import Progress
    from ..pipeline.workspace import Workspace


OWN_OPTIONS = "dpipe.own_options"  # of one call: of the stages or the recipe it names


@dataclass(frozen=True)
class Execution:
    """How a command is to do its work: the options that `running` adds, as one value."""

    workspace: Path | None = None
    as_json: bool = False
    debug: bool = False  # cli.main reads it from the words, for errors that come before any option is parsed
    workers: int | None = None  # None: one a core
    scheduler: str | None = None
    where: str | None = None  # SQL over episodes
    max_time: float | None = None  # seconds
    yes: bool = False
    dry_run: bool = False
    price: float | None = None  # of a core hour
    begun: float = field(default_factory=time.monotonic, init=False)

    @property
    def processes(self) -> int:
        """`workers`, or as many as there are cores."""
        return self.workers if self.workers is not None else count_cores()

    @property
    def seconds_left(self) -> float | None:
        """Of `--max-time`, over all that one command does in turn."""
        return None if self.max_time is None else max(1.0, self.max_time - (time.monotonic() - self.begun))

    def words(self) -> list[str]:
        """The same for a command that this one runs first: all but what chooses episodes."""
        words = ["--workspace", str(self.space.root)]
        words += ["--workers", str(self.workers)] if self.workers is not None else []
        words += ["--scheduler", self.scheduler] if self.scheduler else []
        words += ["--max-time", f"{self.seconds_left:.0f}"] if self.max_time is not None else []
        words += ["--json"] if self.as_json else []
        return [*words, *(["--yes"] if self.yes else [])]

    @cached_property
    def space(self) -> Workspace:
        return open_space(self.workspace)

    @cached_property
    def address(self) -> str | None:
        """What `--scheduler` stands for in this workspace."""
        from ..pipeline.cluster import scheduler_of

        return scheduler_of(self.scheduler, self.space.settings) if self.scheduler else None


class OwnOptionsCommand(click.Command):
    """A command with further options by what its words name: `dpipe precompute STAGE`, `dpipe train RECIPE`."""

    def own_options(self, args: Sequence[str]) -> Iterable[type]:
        """Dataclasses whose fields are options of this call."""
        raise NotImplementedError

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        known = {flag for parameter in self.params for flag in parameter.opts}
        made: list[click.Parameter] = []
        for kind in self.own_options(args):
            for option in options_of(kind, unset=True):
                if not known & set(option.opts):
                    known |= set(option.opts)
                    made.append(option)
        # Beside the call and not in the command, which outlives it.
        ctx.meta[OWN_OPTIONS] = made
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *ctx.meta.get(OWN_OPTIONS, [])]


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
    """Options of commands that do work, handed to the function as one Execution named `how`."""

    @wraps(function)
    def bundled(*args: Any, **given: Any) -> Any:
        how = Execution(**{item.name: given.pop(item.name) for item in fields(Execution) if item.init})
        return function(*args, how=how, **given)

    for option in reversed(_run_options()):
        bundled = option(bundled)
    return common(bundled)


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


def show_progress(as_json: bool) -> Progress:
    from ..pipeline.progress import Progress

    return Progress(json_events=as_json)


def say(text: str, as_json: bool) -> None:
    """One line of news on stderr; with --json an event, so that every line there can be parsed."""
    show_progress(as_json).say(text)


def count_cores() -> int:
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
