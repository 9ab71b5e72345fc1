"""The command line, on top of everything. Heavy imports wait until a command needs them.

Results go to stdout, progress to stderr. Exit codes: 0 done; 1 the data or the run failed; 2 wrong usage;
3 finished, but episodes were left out; 75 stopped on request, run the same command again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .schemas.errors import DpipeError, UsageError

if TYPE_CHECKING:
    from .pipeline.progress import Progress
    from .pipeline.workspace import Workspace

LEFT_OUT = 3


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
        click.option("--scheduler", help="Address of a running Dask scheduler, tcp://host:port."),
        click.option(
            "--where", help="SQL condition over episodes, e.g. \"frames > 50 AND split = 'train'\"."
        ),
        click.option("--max-time", type=float, help="Stop cleanly after this many seconds (exit 75)."),
        click.option("--yes", is_flag=True, help="Do not ask before long or large work."),
        click.option("--dry-run", is_flag=True, help="Print what would run, and stop."),
    ]


def running(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of commands that do work."""
    for option in reversed(_run_options()):
        function = option(function)
    return common(function)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="dpipe")
def cli() -> None:
    """From raw robot logs to a trained policy.

    \b
    dpipe convert libero --to lerobot     raw recordings -> LeRobot v3.0 dataset
    dpipe precompute tokens               dataset -> supervision targets
    dpipe train libra                     targets -> policy (builds what is missing)

    Without data of your own:  dpipe sample libero
    """


# --- sample ---------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("names", nargs=-1, required=True)
@click.option("--episodes", type=click.IntRange(1), default=20, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@common
def sample(
    names: tuple[str, ...], episodes: int, seed: int, workspace: Path | None, as_json: bool, **_: Any
) -> None:
    """Write raw recordings of a small tabletop simulator into raw/.

    \b
    dpipe sample libero --episodes 50
    """
    from .samples import write_sample

    space = _workspace(workspace)
    for name in names:
        raw = space.raw(name)
        files = write_sample(name, raw, episodes=episodes, seed=seed)
        size = sum(path.stat().st_size for path in files)
        text = f"{name}: {episodes} simulated episodes in {len(files)} files, {size / 1e6:.1f} MB, in {raw}"
        _result({"source": name, "raw": str(raw), "files": len(files), "bytes": size}, text, as_json)


# --- convert --------------------------------------------------------------------------------------------------


class SourceGroup(click.Group):
    """`dpipe convert SOURCE`: one command a source, its options made from the converter's own."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from .converters import SOURCES

        return list(SOURCES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _convert_command(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from .converters import SOURCES

        with formatter.section("Sources"):
            formatter.write_dl(list(SOURCES.items()))


@cli.group(cls=SourceGroup, subcommand_metavar="SOURCE [OPTIONS]")
def convert() -> None:
    """Raw recordings to a dataset.

    \b
    dpipe convert libero --to lerobot
    dpipe convert libero --help           the options of one source
    """


def _convert_command(source: str) -> click.Command:
    from .converters import load_converter

    converter = load_converter(source)
    parameters: list[click.Parameter] = [
        click.Option(
            ["--to"],
            type=click.Choice(["lerobot", "lerobot21", "zarr"]),
            default="lerobot",
            show_default=True,
        ),
        click.Option(["--raw"], type=click.Path(path_type=Path), help=f"Raw folder.  [raw/{source}]"),
        click.Option(
            ["--out"], type=click.Path(path_type=Path), help="Folder of the dataset.  [lerobot/NAME]"
        ),
        click.Option(["--name"], help=f"Name of the dataset.  [{source}]"),
        click.Option(
            ["--limit"], type=click.IntRange(1), help="Only the first N episodes; a later run appends."
        ),
        click.Option(["--codec"], type=click.Choice(["h264", "av1"]), default="h264", show_default=True),
        click.Option(
            ["--video"], type=click.Choice(["auto", "copy", "transcode"]), default="auto", show_default=True
        ),
        click.Option(["--resize"], help="Picture size as WIDTHxHEIGHT.  [as recorded]"),
        click.Option(["--part-frames"], type=click.IntRange(1), help="Frames in a file.  [16384]"),
        click.Option(
            ["--verify"], is_flag=True, help="Compare contents, not only sizes and times, with what is done."
        ),
        click.Option(["--allow-dropped"], is_flag=True, help="Exit 0 although episodes were left out."),
        *_options_of(converter.Options),
    ]
    command = click.Command(
        source,
        params=parameters,
        callback=_converting(source),
        help=f"Convert {source}.\n\n{converter.expects}",
    )
    return running(command)  # type: ignore[return-value]


def _options_of(options_type: type) -> list[click.Parameter]:
    """Command-line options from the fields of an Options dataclass."""
    made: list[click.Parameter] = []
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


def _converting(source: str) -> Callable[..., None]:
    def run(
        to: str,
        raw: Path | None,
        out: Path | None,
        name: str | None,
        limit: int | None,
        codec: str,
        video: str,
        resize: str | None,
        part_frames: int | None,
        verify: bool,
        allow_dropped: bool,
        workspace: Path | None,
        as_json: bool,
        debug: bool,
        workers: int | None,
        scheduler: str | None,
        where: str | None,
        max_time: float | None,
        yes: bool,
        dry_run: bool,
        **given: Any,
    ) -> None:
        from .converters import load_converter
        from .pipeline.convert import PART_FRAMES, ConvertRequest, convert, options_from_strings
        from .pipeline.payload import VideoOptions

        space = _workspace(workspace)
        options = options_from_strings(load_converter(source).Options, given)
        request = ConvertRequest(
            source=source,
            raw=(raw or space.raw(source)).resolve(),
            out=(out or space.dataset(name or source)).resolve(),
            name=name or source,
            options=options,
            video=VideoOptions(codec, video, _size(resize)),
            part_frames=part_frames or PART_FRAMES,
            where=where,
            limit=limit,
            verify=verify,
            workers=_workers(workers),
            scheduler=scheduler,
            max_time_s=max_time,
        )
        result = convert(request, _progress(as_json))
        for note in result.warnings:
            click.echo(f"note: {note}", err=True)
        for drop in result.dropped[:20]:
            click.echo(f"left out: {drop.source_id}: {drop.reason}", err=True)
        state = "already complete" if result.unchanged else "converted"
        text = (
            f"{source}: {state}, {result.episodes} episodes, {result.frames} frames, {result.bytes / 1e6:.1f} MB in "
            f"{result.root}; {len(result.dropped)} left out"
            + (f" (reasons in {result.root / 'dpipe' / 'dropped.jsonl'})" if result.dropped else "")
        )
        facts = {
            "dataset": str(result.root),
            "episodes": result.episodes,
            "frames": result.frames,
            "bytes": result.bytes,
            "encoded": result.encoded,
            "unchanged": result.unchanged,
            "dropped": [d.to_json() for d in result.dropped],
        }
        _result(facts, text, as_json)
        if result.dropped and not allow_dropped:
            sys.exit(LEFT_OUT)

    return run


# --- replay ---------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("dataset")
@click.option("--raw", type=click.Path(path_type=Path), help="Raw folder with tabletop.json.  [raw/SOURCE]")
@click.option("--limit", type=click.IntRange(1), help="Only the first N episodes.")
@common
def replay(
    dataset: str, raw: Path | None, limit: int | None, workspace: Path | None, as_json: bool, **_: Any
) -> None:
    """Execute converted actions open loop in the tabletop simulator, beside deliberate mistakes.

    \b
    dpipe replay libero
    """
    from .pipeline.replay import replay as run
    from .streams.dataset import open_dataset

    space = _workspace(workspace)
    root = space.find_dataset(dataset)
    source = str((open_dataset(root).manifest or {}).get("source", root.name))
    result = run(root, raw or space.raw(source), limit, _progress(as_json))
    text = (
        f"{result.to_text()}\n{root.name}: {result.rows[0].successes} of {result.rows[0].episodes} episodes succeed "
        f"from converted actions read by {result.reader}, {result.recorded_successes} as recorded"
    )
    _result(result.to_json(), text, as_json)


# --- shared ---------------------------------------------------------------------------------------------------


def _workspace(folder: Path | None) -> Workspace:
    from .pipeline.workspace import open_workspace

    return open_workspace(folder)


def _progress(as_json: bool) -> Progress:
    from .pipeline.progress import Progress

    return Progress(json_events=as_json)


def _workers(given: int | None) -> int:
    if given is not None:
        return given
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise UsageError(f"--resize {text}: expected WIDTHxHEIGHT, for example 256x256")
    return int(width), int(height)


def _result(facts: dict[str, Any], text: str, as_json: bool) -> None:
    click.echo(json.dumps(facts, ensure_ascii=False) if as_json else text)


def main() -> None:
    """Entry point: every error of the user's becomes one message and an exit code."""
    debug = "--debug" in sys.argv
    try:
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Abort:
        click.echo("stopped", err=True)
        sys.exit(75)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        if isinstance(error, click.exceptions.NoSuchOption | click.UsageError) and error.ctx:
            click.echo(error.ctx.get_usage(), err=True)
        click.echo(f"error: {error.format_message()}", err=True)
        sys.exit(2)
    except DpipeError as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if debug:
            raise
        click.echo(
            f"error: {type(error).__name__}: {error}\n"
            "  This is a fault of dpipe; run again with --debug for the traceback.",
            err=True,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
