"""The command line, on top of everything. Heavy imports wait until a command needs them.

Results go to stdout, progress to stderr. Exit codes: 0 done; 1 the data or the run failed; 2 wrong usage;
3 finished, but episodes were left out; 75 stopped on request, run the same command again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .schemas.errors import DpipeError, UsageError, unknown_name

if TYPE_CHECKING:
    from .pipeline.convert import ConvertPlan, ConvertRequest, ConvertResult
    from .pipeline.outputs import OutputRequest
    from .pipeline.progress import Progress
    from .pipeline.workspace import Workspace

LEFT_OUT = 3
ASK_ABOVE_BYTES = 50_000_000_000

# Before numpy is imported anywhere: workers are processes, and idle BLAS threads spin beside them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


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


@dataclass(frozen=True)
class NamedSource:
    """What the word after `convert` stands for."""

    name: str  # of the dataset, unless --name says another
    address: str  # for load_converter
    raw: Path | None = None  # a folder named by itself
    map: Path | None = None  # of HDF5 files of one's own


class SourceGroup(click.Group):
    """`dpipe convert SOURCE`: one command a source, its options made from the converter's own."""

    finish_only = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        from .converters import SOURCES

        return list(SOURCES)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        # The workspace is an option of the command still to be found, and its dpipe.toml may name the source.
        given = [b for a, b in pairwise(args) if a == "--workspace"]
        given += [word.partition("=")[2] for word in args if word.startswith("--workspace=")]
        ctx.meta["workspace"] = Path(given[-1]) if given else None
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        source = _named_source(cmd_name, _workspace(ctx.meta.get("workspace")))
        return _convert_command(source, self.finish_only)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from .converters import SOURCES

        with formatter.section("Sources"):
            own = ("FOLDER", "HDF5 files of your own: drafts a map of them, then converts by --map")
            formatter.write_dl([*SOURCES.items(), own])


class FinishGroup(SourceGroup):
    """`dpipe finish SOURCE`: the same words as the convert whose jobs it ends."""

    finish_only = True


def _named_source(word: str, space: Workspace) -> NamedSource:
    """A source of ours, one that dpipe.toml names, or a folder of HDF5 files."""
    from .converters import MAPPED, SOURCES

    converter = space.converter(word)
    if converter is not None:
        return NamedSource(word, str(converter))
    if space.map(word) is not None:
        return NamedSource(word, MAPPED, map=space.map(word))
    folder = next((p for p in (Path(word), space.root / word) if p.exists()), Path(word))
    if word not in SOURCES and (folder.exists() or len(folder.parts) > 1):
        if not folder.exists():
            raise UsageError(f"no folder '{word}'")
        return NamedSource(folder.resolve().stem, MAPPED, raw=folder)
    if word not in SOURCES:
        raise unknown_name("source", word, [*SOURCES, *space.own_sources()])
    return NamedSource(word, word)


@cli.group(cls=FinishGroup, subcommand_metavar="SOURCE [OPTIONS]")
def finish() -> None:
    """Number what the jobs of a divided conversion have made.

    \b
    dpipe convert libero --part 0/2 && dpipe convert libero --part 1/2
    dpipe finish libero
    """


@cli.group(cls=SourceGroup, subcommand_metavar="SOURCE [OPTIONS]")
def convert() -> None:
    """Raw recordings to a dataset.

    \b
    dpipe convert libero --to lerobot
    dpipe convert libero --to zarr        the same as a replay buffer
    dpipe convert libero --help           the options of one source
    dpipe convert my_logs                 your own HDF5 files: what is in them, and a map to fill in
    """


def _convert_command(source: NamedSource, finish_only: bool = False) -> click.Command:
    from .converters import MAPPED, load_converter

    converter = load_converter(source.address)
    own = [click.Option(["--map", "map_file"], type=click.Path(path_type=Path), help="What the files mean.")]
    parameters: list[click.Parameter] = [
        click.Option(
            ["--to"],
            type=click.Choice(["lerobot", "lerobot21", "zarr"]),
            default="lerobot",
            show_default=True,
        ),
        click.Option(
            ["--raw"],
            type=click.Path(path_type=Path),
            help=f"Raw folder.  [{source.raw or f'raw/{source.name}'}]",
        ),
        click.Option(["--out"], type=click.Path(path_type=Path), help="Where to write.  [TO/NAME]"),
        click.Option(["--name"], help=f"Name of the dataset.  [{source.name}]"),
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
        click.Option(
            ["--part", "share"], help="i/n: only every n-th part, for job arrays; then dpipe finish."
        ),
        click.Option(["--emit-sbatch"], type=click.IntRange(1), help="Print a SLURM script of N array jobs."),
        click.Option(["--allow-dropped"], is_flag=True, help="Exit 0 although episodes were left out."),
        click.Option(["--no-images"], is_flag=True, help="--to zarr: leave the pictures out."),
        click.Option(
            ["--zarr-format"],
            type=click.Choice(["2", "3"]),
            default="2",
            show_default=True,
            help="--to zarr: 2 is what diffusion-policy code opens.",
        ),
        *(own if converter.name == MAPPED else _options_of(converter.Options)),
    ]
    command = click.Command(
        source.name,
        params=parameters,
        callback=_converting(source, finish_only),
        help=f"Convert {source.name}.\n\n{converter.expects}",
    )
    return running(command)  # type: ignore[return-value]


def _options_of(options_type: type, unset: bool = False) -> list[click.Parameter]:
    """Command-line options from the fields of a dataclass; `unset`: None unless given, words as they are."""
    made: list[click.Parameter] = []
    if unset:
        for item in fields(options_type):
            flag = f"--{item.name.replace('_', '-')}"
            default = item.default if item.default is not MISSING else item.default_factory()  # type: ignore[misc]
            shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
            text = f"{item.metadata.get('help', '')}  [{shown or 'none'}]".strip()
            if isinstance(default, bool):
                made.append(click.Option([f"{flag}/--no-{flag[2:]}"], default=None, help=text))
            else:
                made.append(click.Option([flag], help=text))
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


def _converting(source: NamedSource, finish_only: bool = False) -> Callable[..., None]:
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
        share: str | None,
        emit_sbatch: int | None,
        allow_dropped: bool,
        no_images: bool,
        zarr_format: str,
        workspace: Path | None,
        as_json: bool,
        debug: bool,
        workers: int | None,
        scheduler: str | None,
        where: str | None,
        max_time: float | None,
        yes: bool,
        dry_run: bool,
        map_file: Path | None = None,
        **given: Any,
    ) -> None:
        from .converters import MAPPED, load_converter
        from .pipeline.convert import PART_FRAMES, ConvertRequest, convert_all, options_from_strings
        from .pipeline.outputs import OutputOptions, OutputRequest
        from .pipeline.payload import VideoOptions
        from .pipeline.slurm import parse_share, sbatch_script

        if emit_sbatch:
            words = [
                w for w in _command_words() if not w.startswith("--emit-sbatch") and w != str(emit_sbatch)
            ]
            click.echo(sbatch_script(words, emit_sbatch, _workers(workers), max_time), nl=False)
            return
        space = _workspace(workspace)
        name = name or (raw.resolve().name if raw and source.address == "lerobot" else source.name)
        raw = raw or source.raw or space.raw(source.name)
        if source.address == MAPPED:
            given["map"] = _read_map(source, raw, map_file, space)
        options = options_from_strings(load_converter(source.address).Options, given)
        request = ConvertRequest(
            source=source.address,
            raw=raw.resolve(),
            out=(out if out and to == "lerobot" else space.dataset(name)).resolve(),
            name=name,
            options=options,
            video=VideoOptions(codec, video, _size(resize)),
            part_frames=part_frames or PART_FRAMES,
            where=where,
            limit=limit,
            verify=verify,
            workers=_workers(workers),
            scheduler=scheduler,
            max_time_s=max_time,
            share=parse_share(share) if share else None,
            finish_only=finish_only,
        )
        if dry_run:
            _show_plans(request, as_json)
            return
        results = convert_all(request, _progress(as_json))
        for result in results:
            _show_conversion(source.name, result, as_json)
            if to != "lerobot" and result.finished:
                suffix = result.root.name.removeprefix(request.out.name)  # of a variant
                place = (
                    out.with_name(out.stem + suffix + out.suffix) if out else space.dataset(name + suffix, to)
                )
                settings = OutputOptions(images=not no_images, zarr_format=int(zarr_format))
                wanted = OutputRequest(
                    result.root, to, place.resolve(), settings, _workers(workers), scheduler, max_time
                )
                _write_output(wanted, yes, as_json)
        if any(result.dropped for result in results) and not allow_dropped:
            sys.exit(LEFT_OUT)

    return run


def _read_map(source: NamedSource, raw: Path, given: Path | None, space: Workspace) -> dict[str, Any]:
    """The map of one's own files; without one a draft is written, never over another, and the command ends."""
    from .converters.mapped import read_map

    path = given or source.map
    if path is not None:
        return read_map(path)
    from .converters.mapped_draft import draft_map
    from .pipeline.durable import write_file

    draft = draft_map(raw)
    places = [space.root / "map.toml", *(space.root / f"map-{i}.toml" for i in range(2, 1000))]
    place = next(p for p in places if not p.exists() or p.read_text(encoding="utf-8") == draft.text)
    if not place.exists():
        write_file(place, draft.text.encode())
    still = f"answer {', '.join(draft.open)} in it" if draft.open else "check it"
    raise UsageError(
        f"{draft.report}\n  drafted: {place}\n  next: {still}, then:  dpipe convert {raw} --map {place}"
    )


def _write_output(request: OutputRequest, yes: bool, as_json: bool) -> None:
    from .pipeline.outputs import estimate, write_output

    size = 0 if request.out.exists() else estimate(request)
    if size > ASK_ABOVE_BYTES and not yes:
        cheaper = "--no-images, --resize WxH, --limit or --where make it smaller"
        text = f"{request.form} of {request.root.name} takes up to {size / 1e9:.0f} GB in {request.out}; {cheaper}"
        if not sys.stdin.isatty():
            raise UsageError(f"{text}\n  next: --yes, if that is what you want")
        click.confirm(f"{text}. Go on?", abort=True, err=True)
    result = write_output(request, _progress(as_json))
    state = "already complete" if result.unchanged else "written"
    text = (
        f"{result.form}: {state}, {result.episodes} episodes, {result.frames} frames, {result.bytes / 1e6:.1f} MB "
        f"in {result.root}" + (f", {result.linked} videos shared" if result.linked else "")
    )
    _result(vars(result) | {"root": str(result.root)}, text, as_json)


def _show_conversion(source: str, result: ConvertResult, as_json: bool) -> None:
    for note in result.warnings:
        click.echo(f"note: {note}", err=True)
    for drop in result.dropped[:20]:
        click.echo(f"left out: {drop.source_id}: {drop.reason}", err=True)
    if not result.finished:
        text = f"{source}: this job's share is done, {result.episodes} episodes encoded; then:  dpipe finish {source}"
        _result({"dataset": str(result.root), "encoded": result.encoded, "finished": False}, text, as_json)
        return
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


def _show_plans(request: ConvertRequest, as_json: bool) -> None:
    from .pipeline.convert import by_variant, plan_conversion, read_catalog

    catalog = read_catalog(request, _progress(as_json))
    for each in by_variant(request, catalog):
        _show_plan(plan_conversion(each, catalog), as_json)


def _show_plan(found: ConvertPlan, as_json: bool) -> None:
    text = (
        f"convert {found.source}: {found.recordings} recordings, {found.episodes} episodes, {found.frames} frames "
        f"into {found.root}\n"
        f"  to do: {found.todo_episodes} episodes, {found.todo_frames} frames, {found.pixels / 1e6:.0f} million "
        f"pixels, {found.raw_bytes / 1e6:.1f} MB to read, {found.files} files to write\n"
        f"  done: {found.episodes - found.todo_episodes} episodes; changed since: {len(found.changed)}; "
        f"to be left out: {len(found.dropped)}"
    )
    facts = {n: v for n, v in vars(found).items() if n not in ("root", "dropped")}
    facts |= {"root": str(found.root), "dropped": [d.to_json() for d in found.dropped]}
    _result(facts, text, as_json)


# --- precompute -----------------------------------------------------------------------------------------------


class StageCommand(click.Command):
    """`dpipe precompute STAGE...`: the options of the stages named are the command's own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        from .stages import STAGES, load_stage

        named = [word for word in args if word in STAGES]
        known = {name for parameter in self.params for name in parameter.opts}
        made: list[click.Parameter] = []
        for name in named:
            for option in _options_of(load_stage(name).Params, unset=True):
                if not known & set(option.opts):
                    known |= set(option.opts)
                    made.append(option)
        self.params = [*self.params, *made]
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from .stages import STAGES

        with formatter.section("Stages"):
            formatter.write_dl(list(STAGES.items()))


@cli.command(cls=StageCommand)
@click.argument("stages", nargs=-1)
@click.option(
    "--dataset", "datasets", multiple=True, help="Name or folder; may be repeated.  [all of the workspace]"
)
@click.option("--out", type=click.Path(path_type=Path), help="Targets folder, where a dataset is not ours.")
@click.option("--name", default="", help="Name of the target's variant.  [from its options]")
@click.option("--no-deps", is_flag=True, help="Do not convert what is missing.")
@running
def precompute(
    stages: tuple[str, ...],
    datasets: tuple[str, ...],
    out: Path | None,
    name: str,
    no_deps: bool,
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
    """Datasets to supervision targets.

    \b
    dpipe precompute tokens
    dpipe precompute tokens stats --dataset libero
    dpipe precompute tokens --help        the options of one stage
    """
    from dataclasses import fields as fields_of

    from .stages import STAGES, load_stage

    if not stages:
        for stage, summary in STAGES.items():
            click.echo(f"{stage:12s} {summary}")
        return
    for stage in stages:
        load_stage(stage)
    space = _workspace(workspace)
    options = {name: value for name, value in given.items() if value is not None}
    params = {
        stage: {
            n: v for n, v in options.items() if n in {f.name for f in fields_of(load_stage(stage).Params)}
        }
        for stage in stages
    }
    roots = _datasets(space, datasets, as_json, None if no_deps else workers, dry_run)
    if dry_run:
        for root in roots:
            click.echo(f"precompute {' '.join(stages)} of {root}")
        return
    for root in roots:
        _precompute(space, root, list(stages), params, out, name, workers, scheduler, max_time, as_json)


def _precompute(
    space: Workspace,
    root: Path,
    stages: list[str],
    params: dict[str, dict[str, Any]],
    out: Path | None,
    name: str,
    workers: int | None,
    scheduler: str | None,
    max_time: float | None,
    as_json: bool,
) -> None:
    from .pipeline.precompute import precompute as run

    made = run(
        root,
        stages,
        params,
        _workers(workers),
        out or _targets_folder(space, root),
        _progress(as_json),
        name=name,
        scheduler=scheduler,
        max_time_s=max_time,
    )
    for target in made:
        text = (
            f"{target.stage}: {target.variant} of {root.name}, {target.episodes} episodes, {target.frames} frames, "
            f"{target.bytes / 1e6:.2f} MB in {target.folder}; {target.computed_episodes} episodes computed now"
        )
        facts = {n: v for n, v in vars(target).items() if n != "report"} | {"folder": str(target.folder)}
        _result(facts, text, as_json)


def _targets_folder(space: Workspace, root: Path) -> Path | None:
    """None where the dataset keeps its own targets, else targets/<name> of the workspace."""
    ours = (root / "dpipe" / "manifest.json").is_file() and os.access(root / "dpipe", os.W_OK)
    return None if ours else space.targets(root.name)


def _datasets(
    space: Workspace, named: tuple[str, ...], as_json: bool, workers: int | None, dry_run: bool = False
) -> list[Path]:
    """The datasets to work on: those named, else all; a workspace that has only raw recordings converts them."""
    from .converters import SOURCES

    if named:
        return [space.find_dataset(name) for name in named]
    sources = [source for source in (*SOURCES, *space.own_sources()) if space.raw(source).is_dir()]
    made = space.sources_made()
    unmade = [source for source in sources if source not in made]
    if unmade:
        plan = "; ".join(f"dpipe convert {source} --to lerobot" for source in unmade)
        click.echo(f"first: {plan}", err=True)
        for source in unmade if not dry_run else []:
            arguments = ["convert", source, "--workspace", str(space.root), "--allow-dropped"]
            arguments += ["--workers", str(workers)] if workers is not None else []
            cli.main([*arguments, *(["--json"] if as_json else [])], standalone_mode=False)
    roots = space.datasets()
    if not roots and not (dry_run and unmade):
        raise UsageError(
            f"no dataset in {space.root / 'lerobot'} and no recordings in {space.root / 'raw'}\n"
            f"  next: put recordings into raw/<source>/ ({', '.join(SOURCES)}), or make some:  dpipe sample libero"
        )
    return roots


# --- train ----------------------------------------------------------------------------------------------------


class RecipeCommand(click.Command):
    """`dpipe train RECIPE`: the options of the recipe named are the command's own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        from .trainer import RECIPES

        named = [word for word in args if word in RECIPES]
        if named and ("--help" in args or "-h" in args or len(args) > 1):
            from .trainer import open_recipe
            from .trainer.loop import Options

            known = {name for parameter in self.params for name in parameter.opts}
            for options in (open_recipe(named[0]).config, Options):
                made = [o for o in _options_of(options, unset=True) if not known & set(o.opts)]
                known |= {name for option in made for name in option.opts}
                self.params = [*self.params, *made]
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from .trainer import RECIPES

        with formatter.section("Recipes"):
            formatter.write_dl(list(RECIPES.items()))


@cli.command(cls=RecipeCommand)
@click.argument("recipe")
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps.  [the recipe's own]")
@click.option("--dataset", "datasets", multiple=True, help="Name or folder.  [the workspace's only group]")
@click.option("--name", help="Name of the run.  [the dataset's]")
@click.option(
    "--frames", type=click.Choice(["auto", "jpeg", "video", "none"]), default="auto", show_default=True
)
@click.option("--no-deps", is_flag=True, help="Do not build what is missing.")
@running
def train(
    recipe: str,
    steps: int | None,
    datasets: tuple[str, ...],
    name: str | None,
    frames: str,
    no_deps: bool,
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
    """Targets to a policy; datasets and targets that are missing are made first.

    \b
    dpipe train libra
    dpipe train libra --steps 500 --dataset libero
    dpipe train libra --help              the options of one recipe
    """
    from .pipeline.groups import group_datasets, one_group
    from .trainer import RECIPES, open_recipe

    if recipe not in RECIPES:
        open_recipe(recipe)
    space = _workspace(workspace)
    configured = tuple(space.settings.get("train", {}).get(recipe, {}).get("datasets", ()))
    roots = _datasets(space, datasets or configured, as_json, None if no_deps else workers, dry_run)
    group = one_group(group_datasets(roots), recipe)
    if len(group.datasets) > 1:
        listed = ", ".join(root.name for root in group.datasets)
        raise UsageError(f"{recipe}: name one of {listed} with --dataset, or merge them first")
    root = next(iter(group.datasets))
    missing = _missing_targets(space, root, recipe, given)
    if frames in ("auto", "jpeg") and _wants_shards(root):
        missing["shards"] = {}
    run_dir = space.run(recipe, name or root.name)
    if missing:
        click.echo(f"first: dpipe precompute {' '.join(missing)} --dataset {root.name}", err=True)
    if dry_run:
        click.echo(f"train {recipe} on {root} into {run_dir}")
        return
    if missing and not no_deps:
        for stage, params in missing.items():
            _precompute(space, root, [stage], {stage: params}, None, "", workers, scheduler, None, as_json)
    from .trainer.loop import Options
    from .trainer.run import train as run

    known = {item.name for item in fields(Options)}
    chosen = {key: value for key, value in given.items() if value is not None}
    result = run(
        recipe,
        root,
        run_dir,
        steps=steps,
        config={key: value for key, value in chosen.items() if key not in known},
        options={key: value for key, value in chosen.items() if key in known},
        targets=_targets_folder(space, root),
        frames=frames,
        say=lambda text: click.echo(text, err=True),
    )
    facts = {
        "run": str(result.run_dir),
        "recipe": recipe,
        "steps": result.steps,
        "metrics": dict(result.metrics),
    }
    _result(
        facts | {"checkpoint": str(result.checkpoint)}, f"{result.message}\n  run: {result.run_dir}", as_json
    )


def _wants_shards(root: Path) -> bool:
    """Whether training would decode video for every batch although shards could be written beside it."""
    from .streams.dataset import open_dataset
    from .streams.shards import find_shards

    dataset = open_dataset(root)
    ours = dataset.manifest is not None and os.access(root / "dpipe", os.W_OK)
    return ours and bool(dataset.cameras) and find_shards(dataset, dataset.cameras) is None


def _missing_targets(
    space: Workspace, root: Path, recipe: str, given: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Stages the recipe needs and the dataset has not, each with the options its request names."""
    from .trainer import open_recipe
    from .trainer.recipe import resolve

    made = open_recipe(recipe)
    names = {item.name for item in fields(made.config)}
    config = resolve(recipe, made.config, {k: v for k, v in given.items() if v is not None and k in names})
    requests, _ = made.targets(config)
    base = _targets_folder(space, root) or root / "dpipe" / "targets"
    missing: dict[str, dict[str, Any]] = {}
    for request in requests:
        stage = request.partition(":")[0]
        if not (base / stage).is_dir() or not any((base / stage).iterdir()):
            missing[stage] = {}
    return missing


# --- status ---------------------------------------------------------------------------------------------------


@cli.command()
@common
def status(workspace: Path | None, as_json: bool, **_: Any) -> None:
    """Every dataset, target and run of the workspace: complete, partial or stale, and why."""
    from .pipeline.status import workspace_states

    states = workspace_states(_workspace(workspace))
    if as_json:
        click.echo(json.dumps([vars(s) | {"path": str(s.path)} for s in states]))
        return
    for s in states:
        click.echo(f"{s.kind:8s} {s.state:10s} {s.name}: {s.detail}")
    if not states:
        click.echo("nothing yet: dpipe convert SOURCE --to lerobot")


# --- plan -----------------------------------------------------------------------------------------------------


@cli.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def plan(words: tuple[str, ...]) -> None:
    """What a command would do: any of convert, precompute, train with --dry-run.

    \b
    dpipe plan convert libero
    dpipe plan train libra
    """
    if not words or words[0] not in ("convert", "precompute", "train"):
        raise UsageError(
            "plan what? dpipe plan convert SOURCE, dpipe plan precompute STAGE, dpipe plan train RECIPE"
        )
    cli.main([*words, "--dry-run"], standalone_mode=False)


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


# --- doctor ---------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--fast", is_flag=True, help="Metadata only: seconds for a million episodes.")
@click.option("--full", is_flag=True, help="Decode every frame.  [some frames of some episodes]")
@click.option(
    "--fail-on",
    type=click.Choice(["warn", "error"]),
    default="error",
    show_default=True,
    help="The least that makes the exit code 1.",
)
@click.option("--fix", is_flag=True, help="Write a copy with statistics, numbering and task table rebuilt.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of that copy.  [PATH-fixed]")
@click.option("--source", help="Whose raw recordings these are.  [told from the folder]")
@common
def doctor(
    paths: tuple[str, ...],
    fast: bool,
    full: bool,
    fail_on: str,
    fix: bool,
    out: Path | None,
    source: str | None,
    workspace: Path | None,
    as_json: bool,
    **_: Any,
) -> None:
    """Is it sound? Any LeRobot v3.0 dataset, raw recordings, targets or shards; exit 0 sound, 1 defects.

    \b
    dpipe doctor libero
    dpipe doctor ~/datasets/pusht --full --fail-on warn
    dpipe doctor raw/egodex
    """
    from .pipeline.doctor import Level, examine, report_text
    from .pipeline.doctor.mend import fixed_folder, mend

    if (fast and full) or (out is not None and not fix):
        raise UsageError("--fast and --full exclude each other, and --out belongs to --fix")
    space = _workspace(workspace)
    level = Level.FAST if fast else Level.FULL if full else Level.SAMPLED
    reports = []
    for given in paths:
        path = space.dataset(given) if space.dataset(given).is_dir() else Path(given)
        if fix:
            done = mend(path, out or fixed_folder(path))
            click.echo(
                f"{path.name}: rebuilt {', '.join(done.changed) or 'nothing'} in {done.root}", err=True
            )
            path = done.root
        reports.append(examine(path, level, source))
        if not as_json:
            click.echo(report_text(reports[-1], fail_on))
    if as_json:
        click.echo(json.dumps([report.to_json(fail_on) for report in reports], ensure_ascii=False))
    if any(report.fails(fail_on) for report in reports):
        sys.exit(1)


# --- picture --------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("dataset")
@click.option("--episode", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--bins", type=click.IntRange(2, 256), default=10, show_default=True, help="Coarse bins a dimension."
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="PNG to write.  [DATASET-EPISODE.png in the workspace]"
)
@common
def picture(
    dataset: str, episode: int, bins: int, out: Path | None, workspace: Path | None, as_json: bool, **_: Any
) -> None:
    """One picture of one episode: its frames, its actions and the coarse bins they fall in.

    \b
    dpipe picture libero --episode 3
    """
    from .pipeline.picture import draw_episode
    from .streams.dataset import open_dataset

    space = _workspace(workspace)
    root = space.find_dataset(dataset)
    path = out or space.root / f"{root.name}-{episode:03d}.png"
    draw_episode(open_dataset(root), episode, path, bins)
    _result({"picture": str(path)}, f"episode {episode} of {root.name}: {path}", as_json)


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


def _command_words() -> list[str]:
    return sys.argv[1:]


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
