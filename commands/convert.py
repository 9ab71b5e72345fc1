"""dpipe convert and dpipe finish: raw recordings to a dataset."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..schemas.errors import UsageError, unknown_name
from .options import (
    Execution,
    agree_to,
    answer,
    given_words,
    open_space,
    options_of,
    parse_size,
    running,
    show_plan,
    show_progress,
)

if TYPE_CHECKING:
    from ..pipeline.convert import ConvertResult
    from ..pipeline.outputs import OutputOptions, OutputRequest
    from ..pipeline.plan import Step
    from ..pipeline.request import ConvertRequest
    from ..pipeline.workspace import Workspace


LEFT_OUT = 3
ASK_ABOVE_BYTES = 50_000_000_000


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
        from ..converters import SOURCES

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
        source = _named_source(cmd_name, open_space(ctx.meta.get("workspace")))
        return _convert_command(source, self.finish_only)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from ..converters import SOURCES

        with formatter.section("Sources"):
            own = ("FOLDER", "HDF5 files of your own: drafts a map of them, then converts by --map")
            formatter.write_dl([*SOURCES.items(), own])


class FinishGroup(SourceGroup):
    """`dpipe finish SOURCE`: the same words as the convert whose jobs it ends."""

    finish_only = True


def _named_source(word: str, space: Workspace) -> NamedSource:
    """A source of ours, one that dpipe.toml names, or a folder of HDF5 files."""
    from ..converters import MAPPED, SOURCES

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


@click.group(cls=FinishGroup, subcommand_metavar="SOURCE [OPTIONS]")
def finish() -> None:
    """Number what the jobs of a divided conversion have made.

    \b
    dpipe convert libero --part 0/2 && dpipe convert libero --part 1/2
    dpipe finish libero
    """


@click.group(cls=SourceGroup, subcommand_metavar="SOURCE [OPTIONS]")
def convert() -> None:
    """Raw recordings to a dataset.

    \b
    dpipe convert libero --to lerobot
    dpipe convert libero --to zarr        the same as a replay buffer
    dpipe convert libero --help           the options of one source
    dpipe convert my_logs                 your own HDF5 files: what is in them, and a map to fill in
    """


def _convert_command(source: NamedSource, finish_only: bool = False) -> click.Command:
    from ..converters import MAPPED, load_converter

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
        click.Option(
            ["--fps"],
            type=click.IntRange(1),
            help="A lower frame rate that divides the recorded one, pictures and columns.  [as recorded]",
        ),
        click.Option(
            ["--actions"],
            type=click.Choice(["auto", "targets", "moves"]),
            default="auto",
            show_default=True,
            help="--fps: whether actions say where to be or how far to move, where the source does not.",
        ),
        click.Option(
            ["--shards"],
            is_flag=True,
            help="Write JPEG shards too, from the recorded frames: no second decoding.",
        ),
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
        *(own if converter.name == MAPPED else options_of(converter.Options)),
    ]
    described = f"Convert {source.name}.\n\n{converter.expects}"
    command = click.command(source.name, help=described)(running(_converting(source, finish_only)))
    command.params[:0] = parameters
    return command


def default_request(space: Workspace, word: str) -> ConvertRequest:
    """What `dpipe convert WORD` means without a further option."""
    from ..converters import MAPPED, load_converter
    from ..pipeline.request import ConvertRequest, options_from_strings

    source = _named_source(word, space)
    raw = source.raw or space.raw(source.name)
    given = {"map": _read_map(source, raw, None, space)} if source.address == MAPPED else {}
    options = options_from_strings(load_converter(source.address).Options, given)
    out = space.dataset(source.name).resolve()
    return ConvertRequest(source.address, raw.resolve(), out, source.name, options)


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
        fps: int | None,
        actions: str,
        shards: bool,
        part_frames: int | None,
        verify: bool,
        share: str | None,
        emit_sbatch: int | None,
        allow_dropped: bool,
        no_images: bool,
        zarr_format: str,
        how: Execution,
        map_file: Path | None = None,
        **given: Any,
    ) -> None:
        from ..converters import MAPPED, load_converter
        from ..pipeline.convert import convert_all
        from ..pipeline.outputs import OutputOptions, OutputRequest
        from ..pipeline.payload import VideoOptions
        from ..pipeline.request import PART_FRAMES, ConvertRequest, options_from_strings
        from ..pipeline.slurm import parse_share, sbatch_script
        from ..streams.shard_format import ShardOptions

        if emit_sbatch:
            words = [w for w in given_words() if not w.startswith("--emit-sbatch") and w != str(emit_sbatch)]
            click.echo(sbatch_script(words, emit_sbatch, how.processes, how.max_time), nl=False)
            return
        space = how.space
        name = name or (raw.resolve().name if raw and source.address == "lerobot" else source.name)
        raw = raw or source.raw or space.raw(source.name)
        if source.address == MAPPED:
            given["map"] = _read_map(source, raw, map_file, space)
        options = options_from_strings(load_converter(source.address).Options, given)
        request = ConvertRequest(
            source=f"{source.address}@{fps}:{actions}" if fps else source.address,
            raw=raw.resolve(),
            out=(out if out and to == "lerobot" else space.dataset(name)).resolve(),
            name=name,
            options=options,
            video=VideoOptions(codec, video, parse_size(resize)),
            part_frames=part_frames or PART_FRAMES,
            where=how.where,
            limit=limit,
            verify=verify,
            workers=how.processes,
            scheduler=how.address,
            max_time_s=how.seconds_left,
            share=parse_share(share) if share else None,
            finish_only=finish_only,
            shards=ShardOptions() if shards else None,
        )
        form = OutputOptions(images=not no_images, zarr_format=int(zarr_format))

        def place_of(root: Path) -> Path:
            """Where another form of a dataset goes, of a variant beside the others."""
            suffix = root.name.removeprefix(request.out.name)
            named = out.with_name(out.stem + suffix + out.suffix) if out else space.dataset(name + suffix, to)
            return named.resolve()

        if how.dry_run:
            steps = plan_request(request, how.as_json)
            if to != "lerobot":
                steps += _plan_form(request, to, place_of, form, how.as_json)
            show_plan(steps, request.workers, how.price, how.as_json)
            return
        results = convert_all(
            request, show_progress(how.as_json), lambda steps: agree_to(steps, request.workers, how.yes)
        )
        for result in results:
            _show_conversion(source.name, result, how.as_json)
            if to != "lerobot" and result.finished:
                place = place_of(result.root)
                wanted = OutputRequest(
                    result.root, to, place, form, how.processes, how.address, how.seconds_left
                )
                _write_output(wanted, how.yes, how.as_json)
        if any(result.dropped for result in results) and not allow_dropped:
            sys.exit(LEFT_OUT)

    return run


def _read_map(source: NamedSource, raw: Path, given: Path | None, space: Workspace) -> dict[str, Any]:
    """The map of one's own files; without one a draft is written, never over another, and the command ends."""
    from ..converters.mapped import read_map

    path = given or source.map
    if path is not None:
        return read_map(path)
    from ..converters.mapped_draft import draft_map
    from ..pipeline.durable import write_file

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
    from ..pipeline.outputs import estimate, write_output

    size = 0 if request.out.exists() else estimate(request)
    if size > ASK_ABOVE_BYTES and not yes:
        cheaper = "--no-images, --resize WxH, --limit or --where make it smaller"
        text = f"{request.form} of {request.root.name} takes up to {size / 1e9:.0f} GB in {request.out}; {cheaper}"
        if not sys.stdin.isatty():
            raise UsageError(f"{text}\n  next: --yes, if that is what you want")
        click.confirm(f"{text}. Go on?", abort=True, err=True)
    result = write_output(request, show_progress(as_json))
    state = "already complete" if result.unchanged else "written"
    text = (
        f"{result.form}: {state}, {result.episodes} episodes, {result.frames} frames, {result.bytes / 1e6:.1f} MB "
        f"in {result.root}" + (f", {result.linked} videos shared" if result.linked else "")
    )
    answer(vars(result) | {"root": str(result.root)}, text, as_json)


def _show_conversion(source: str, result: ConvertResult, as_json: bool) -> None:
    progress = show_progress(as_json)
    for note in result.warnings:
        progress.say(f"note: {note}")
    for drop in result.dropped[:20]:
        progress.say(f"left out: {drop.source_id}: {drop.reason}")
    if not result.finished:
        text = f"{source}: this job's share is done, {result.episodes} episodes encoded; then:  dpipe finish {source}"
        answer({"dataset": str(result.root), "encoded": result.encoded, "finished": False}, text, as_json)
        return
    state = "already complete" if result.unchanged else "converted"
    text = (
        f"{source}: {state}, {result.episodes} episodes, {result.frames} frames, {result.bytes / 1e6:.1f} MB in "
        f"{result.root}"
        + (f" and shards in {result.shards}" if result.shards else "")
        + f"; {len(result.dropped)} left out"
        + (f" (reasons in {result.root / 'dpipe' / 'dropped.jsonl'})" if result.dropped else "")
    )
    facts = {
        "dataset": str(result.root),
        "episodes": result.episodes,
        "frames": result.frames,
        "bytes": result.bytes,
        "encoded": result.encoded,
        "unchanged": result.unchanged,
        "shards": str(result.shards) if result.shards else None,
        "dropped": [d.to_json() for d in result.dropped],
    }
    answer(facts, text, as_json)


def _plan_form(
    request: ConvertRequest,
    to: str,
    place_of: Callable[[Path], Path],
    form: OutputOptions,
    as_json: bool,
) -> list[Step]:
    """The steps from datasets to another form of them."""
    from ..pipeline.convert import by_variant, read_catalog
    from ..pipeline.outputs import plan_output

    catalog = read_catalog(request, show_progress(as_json))
    return [plan_output(r, catalog, to, place_of(r.out), form) for r in by_variant(request, catalog)]


def plan_request(request: ConvertRequest, as_json: bool) -> list[Step]:
    """The steps of a conversion, a dataset each."""
    from ..pipeline.convert import by_variant, read_catalog
    from ..pipeline.plan import plan_convert

    catalog = read_catalog(request, show_progress(as_json))
    return [plan_convert(each, catalog) for each in by_variant(request, catalog)]
