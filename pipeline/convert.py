"""`dpipe convert`: raw recordings to a LeRobot v3.0 dataset, resumable, appendable, the same bytes every time.

    scan      everything but pixels is checked; the order of new episodes is fixed on disk      catalog, order
    encode    one task an episode: columns and packets into a spool file                        payload
    mux       one task a part, when its episodes are done: packets into part files              payload
    number    global columns and meta/ from the receipts, staged, then moved in one go          finish

A killed run leaves spool files and part receipts; the same command picks them up.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..converters import Converter, load_converter
from ..schemas.episode import Dropped, Embodiment, EpisodeRef
from ..schemas.errors import DataError, UsageError
from .catalog import Catalog, build_catalog, select
from .durable import exclusive, remove_temporaries, require_space, write_file, write_json
from .execute import Executor, Failure, open_executor, stop_requests
from .finish import FinishResult, finish, load_receipts, recover
from .payload import (
    EpisodeJob,
    PartJob,
    VideoOptions,
    digest_episode,
    encode_episode,
    file_memo,
    mux_part,
    receipt_path,
)
from .progress import Progress
from .spool import read_spool

PART_FRAMES = 16_384
LAYOUT = 1  # raise when the same inputs would give other files


@dataclass(frozen=True)
class ConvertRequest:
    """Everything a conversion depends on; `workers`, `scheduler` and `max_time_s` do not change the result."""

    source: str
    raw: Path
    out: Path
    name: str
    options: Any
    variant: str = ""  # of recordings that differ in their features: see convert_all
    video: VideoOptions = field(default_factory=VideoOptions)
    part_frames: int = PART_FRAMES
    where: str | None = None
    limit: int | None = None
    verify: bool = False
    share: tuple[int, int] | None = None  # (i, n): only parts of number i modulo n, and no finishing
    finish_only: bool = False
    workers: int = 0
    scheduler: str | None = None
    max_time_s: float | None = None


@dataclass(frozen=True)
class ConvertResult:
    root: Path
    episodes: int
    frames: int
    bytes: int
    dropped: tuple[Dropped, ...]
    warnings: tuple[str, ...]
    encoded: int  # episodes encoded by this run
    unchanged: bool  # the dataset was already complete
    finished: bool = True  # False for one job of several: dpipe finish numbers what all have made


@dataclass
class _Work:
    """What is left to do, from comparing the catalogue with the receipts."""

    todo: list[EpisodeRef] = field(default_factory=list)  # encode
    parts: dict[int, list[str]] = field(
        default_factory=dict
    )  # part -> source ids, in order, parts not yet muxed
    order: list[str] = field(default_factory=list)  # every episode of the dataset, in its order


def convert_all(request: ConvertRequest, progress: Progress) -> list[ConvertResult]:
    """Convert everything a raw folder holds: where recordings differ in their features, a dataset a variant."""
    catalog = read_catalog(request, progress)
    return [convert(each, progress, catalog) for each in by_variant(request, catalog)]


def by_variant(request: ConvertRequest, catalog: Catalog) -> list[ConvertRequest]:
    """The request itself where recordings have no variants, else one a variant, named NAME-VARIANT."""
    if set(catalog.variants) <= {""}:
        return [request]
    beside = request.out.parent
    return [
        replace(request, variant=v, name=f"{request.name}-{v}", out=beside / f"{request.out.name}-{v}")
        for v in catalog.variants
    ]


def read_catalog(request: ConvertRequest, progress: Progress) -> Catalog:
    """Scan the raw folder, with what any dataset made from it remembers."""
    converter = load_converter(request.source)
    made = [request.out, *sorted(request.out.parent.glob(f"{request.out.name}-*"))]
    caches = [root / "dpipe" / "journal" / "scan.jsonl" for root in made]
    cache = next((path for path in caches if path.is_file()), None)
    with stop_requests(request.max_time_s) as stop:
        return build_catalog(converter, request.raw, request.options, cache, Executor(stop), progress)


def convert(request: ConvertRequest, progress: Progress, catalog: Catalog | None = None) -> ConvertResult:
    """Run one dataset's conversion to the end, or raise Interrupted with everything finished so far kept."""
    converter = load_converter(request.source)
    embodiment_check(request)
    catalog = catalog or read_catalog(request, progress)
    catalog = catalog.of(request.variant)
    journal = request.out / "dpipe" / "journal"
    _refuse_foreign(request.out)
    if not _chosen(catalog, _order(journal), request) and not _order(journal):
        raise _nothing_left(request, catalog)
    with (
        exclusive(journal, f"convert {converter.name}", share=request.share),
        stop_requests(request.max_time_s) as stop,
        _Lazy(stop, request) as executors,
    ):
        recover(request.out)
        embodiment = converter.embodiment_of(request.raw, request.options, request.variant)
        _check_settings(request, converter, journal)
        if catalog.fresh or not (journal / "scan.jsonl").is_file():
            write_file(journal / "scan.jsonl", catalog.memory().encode())
        refs = _chosen(catalog, _order(journal), request)
        by_id = {ref.source_id: ref for ref in refs}
        receipts = load_receipts(request.out)
        work = _plan(request, converter, journal, refs, receipts)
        if request.finish_only and work.parts:
            raise _unfinished_parts(request, work)
        if request.share:
            work = _share(work, *request.share)
        if work.todo:
            need = sum(ref.frames * sum(c.height * c.width for c in ref.cameras) for ref in work.todo) // 8
            require_space(request.out, need, f"converting {len(work.todo)} episodes")
            executor = executors.heavy(len(work.todo))
            progress.say(
                f"convert {converter.name}: {len(work.todo)} episodes to do, in {executor.description}"
            )
        else:
            executor = executors.light()
        _run(request, embodiment, by_id, work, executor, progress, journal)
        if request.share:
            return _shared_result(request, work)
        result = finish(
            request.out,
            name=request.name,
            source=converter.name,
            converter_version=converter.version,
            options=asdict(request.options),
            video=request.video,
            embodiment=embodiment,
            order=work.order,
            scan_dropped=catalog.dropped,
            warnings=[w for ref in refs for w in ref.warnings],
        )
        _clean_spool(journal)
    return _result(request, result, len(work.todo), refs)


def _share(work: _Work, part: int, count: int) -> _Work:
    """What one of `count` independent jobs has to do: every count-th part, whole."""
    parts = {number: ids for number, ids in work.parts.items() if number % count == part}
    mine = {source_id for ids in parts.values() for source_id in ids}
    return _Work([ref for ref in work.todo if ref.source_id in mine], parts, work.order)


def _shared_result(request: ConvertRequest, work: _Work) -> ConvertResult:
    frames = sum(ref.frames for ref in work.todo)
    return ConvertResult(
        request.out, len(work.todo), frames, 0, (), (), len(work.todo), False, finished=False
    )


def _unfinished_parts(request: ConvertRequest, work: _Work) -> DataError:
    listed = ", ".join(map(str, sorted(work.parts)[:20]))
    return DataError(
        f"{request.out} cannot be finished: {len(work.parts)} parts are not done ({listed})\n"
        f"  next: run the jobs of those parts again (--part i/n takes the parts whose number is i modulo n)"
    )


def _result(
    request: ConvertRequest, done: FinishResult, encoded: int, refs: Sequence[EpisodeRef]
) -> ConvertResult:
    return ConvertResult(
        root=request.out,
        episodes=done.episodes,
        frames=done.frames,
        bytes=done.bytes,
        dropped=done.dropped,
        warnings=tuple(f"{ref.source_id}: {note}" for ref in refs for note in ref.warnings),
        encoded=encoded,
        unchanged=done.unchanged,
    )


def embodiment_check(request: ConvertRequest) -> None:
    """Usage errors that need no data."""
    if request.video.resize and any(side <= 0 or side % 2 for side in request.video.resize):
        width, height = request.video.resize
        raise UsageError(f"--resize {width}x{height}: both sides must be even and positive (yuv420p)")
    if request.part_frames < 1:
        raise UsageError("--part-frames must be at least 1")


def _compare(
    request: ConvertRequest,
    converter: Converter,
    batches: Sequence[dict[str, Any]],
    refs: Sequence[EpisodeRef],
    receipts: dict[str, dict[str, Any]],
) -> tuple[list[EpisodeRef], list[EpisodeRef]]:
    """(new episodes, episodes whose recording changed since their receipt)."""
    listed = {source_id for batch in batches for part in batch["parts"] for source_id in part["episodes"]}
    key = episode_key_base(converter, request)
    fresh = [ref for ref in refs if ref.source_id not in listed]
    changed = [
        ref
        for ref in refs
        if ref.source_id in receipts and not _valid(request, ref, receipts[ref.source_id], key)
    ]
    return fresh, changed


def _plan(
    request: ConvertRequest,
    converter: Converter,
    journal: Path,
    refs: Sequence[EpisodeRef],
    receipts: dict[str, dict[str, Any]],
) -> _Work:
    """Fix the order of new episodes on disk, and find what has no valid receipt yet."""
    batches = _order(journal)
    fresh, changed = _compare(request, converter, batches, refs, receipts)
    if fresh or changed:
        # A changed episode keeps its place; its new payload goes into a new part, listed as a replacement.
        first = max((part["part"] for batch in batches for part in batch["parts"]), default=-1) + 1
        new = sorted(fresh, key=lambda ref: _split_rank(ref.split)) if not batches else fresh
        batch = {"parts": _parts([*new, *changed], first, request.part_frames)}
        write_json(journal / f"order-{len(batches):04d}.json", batch, indent=None)
        batches.append(batch)
    key = episode_key_base(converter, request)
    parts = {part["part"]: part["episodes"] for batch in batches for part in batch["parts"]}
    done = {receipt["part"] for receipt in receipts.values()}
    by_id = {ref.source_id: ref for ref in refs}
    work = _Work(order=list(dict.fromkeys(s for ids in parts.values() for s in ids)))
    for part, ids in parts.items():
        if part in done or receipt_path(request.out, part).is_file():
            continue
        work.parts[part] = ids
        for source_id in ids:
            ref = by_id.get(source_id)
            if ref is not None and not _spooled(request, journal, ref, key, part):
                work.todo.append(ref)
    return work


@dataclass(frozen=True)
class ConvertPlan:
    """What a conversion would do, by arithmetic and a scan; nothing is written."""

    source: str
    root: Path
    recordings: int
    episodes: int  # of the dataset when done
    frames: int
    todo_episodes: int
    todo_frames: int
    changed: tuple[str, ...]
    pixels: int  # of the frames to do, all cameras
    raw_bytes: int  # of the files to read
    files: int  # to be written
    dropped: tuple[Dropped, ...]


def plan_conversion(request: ConvertRequest, catalog: Catalog) -> ConvertPlan:
    """Compare a catalogue with what is done."""
    converter = load_converter(request.source)
    embodiment_check(request)
    journal = request.out / "dpipe" / "journal"
    if (journal / "settings.json").is_file():
        _check_settings(request, converter, journal)
    catalog = catalog.of(request.variant)
    batches = _order(journal)
    refs = _chosen(catalog, batches, request)
    receipts = load_receipts(request.out)
    fresh, changed = _compare(request, converter, batches, refs, receipts)
    redo = {ref.source_id for ref in (*fresh, *changed)}
    todo = [ref for ref in refs if ref.source_id in redo or ref.source_id not in receipts]
    cameras = len(refs[0].cameras) if refs else 0
    sizes = {path: path.stat().st_size for ref in todo for path in ref.files if path.exists()}
    return ConvertPlan(
        source=converter.name,
        root=request.out,
        recordings=catalog.recordings,
        episodes=len(refs),
        frames=sum(ref.frames for ref in refs),
        todo_episodes=len(todo),
        todo_frames=sum(ref.frames for ref in todo),
        changed=tuple(ref.source_id for ref in changed),
        pixels=sum(
            ref.frames * c.height * c.width for ref in todo for c in map(request.video.size, ref.cameras)
        ),
        raw_bytes=sum(sizes.values()),
        files=len(_parts(todo, 0, request.part_frames)) * (1 + cameras),
        dropped=tuple(catalog.dropped),
    )


def _chosen(catalog: Catalog, batches: Sequence[dict[str, Any]], request: ConvertRequest) -> list[EpisodeRef]:
    """Episodes that meet --where and --limit, and those an earlier run has already taken in."""
    listed = {source_id for batch in batches for part in batch["parts"] for source_id in part["episodes"]}
    wanted = {ref.source_id for ref in select(catalog.refs, request.where, request.limit)} | listed
    return _of_one_size([ref for ref in catalog.refs if ref.source_id in wanted], request)


def episode_key_base(converter: Converter, request: ConvertRequest) -> str:
    """What of an episode's identity is common to the run: name, version, parameters; never a path."""
    return json.dumps(
        [LAYOUT, converter.name, converter.version, asdict(request.options), request.video.to_json()],
        sort_keys=True,
    )


def _key(base: str, source_id: str) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(f"{base}\n{source_id}".encode())


def _valid(request: ConvertRequest, ref: EpisodeRef, receipt: dict[str, Any], base: str) -> bool:
    """A receipt holds when its key matches and the files are as they were, or prove to hold the same episode."""
    if receipt["key"] != _key(base, ref.source_id):
        return False
    if not request.verify and json.loads(receipt["memo"]) == file_memo(ref.files):
        return True
    if receipt["dropped"]:
        return False  # it failed with other files: worth another try
    if not all(path.exists() for path in ref.files):
        return True  # discarded after its receipt was durable
    try:
        return digest_episode(_job(request, ref, base, Path())) == receipt["raw_digest"]
    except DataError:
        return False


def _job(
    request: ConvertRequest, ref: EpisodeRef, base: str, spool: Path, embodiment: Embodiment | None = None
) -> EpisodeJob:
    if embodiment is None:
        converter = load_converter(request.source)
        embodiment = converter.embodiment_of(request.raw, request.options, ref.variant)
    return EpisodeJob(
        request.source, ref, request.options, request.video, embodiment, _key(base, ref.source_id), spool
    )


def _spool_path(journal: Path, source_id: str, part: int) -> Path:
    import xxhash

    return journal.parent / "spool" / f"{part:06d}-{xxhash.xxh3_64_hexdigest(source_id.encode())}.episode"


def _spooled(request: ConvertRequest, journal: Path, ref: EpisodeRef, base: str, part: int) -> bool:
    path = _spool_path(journal, ref.source_id, part)
    if not path.is_file():
        return False
    try:
        receipt = read_spool(path).receipt
    except DataError:
        path.unlink()
        return False
    as_receipt = dict(receipt) | {"memo": json.dumps(receipt["memo"]), "dropped": receipt.get("dropped", "")}
    if _valid(request, ref, as_receipt, base):
        return True
    path.unlink()
    return False


def _run(
    request: ConvertRequest,
    embodiment: Embodiment,
    by_id: dict[str, EpisodeRef],
    work: _Work,
    executor: Executor,
    progress: Progress,
    journal: Path,
) -> None:
    """Encode what is missing; mux a part as soon as its last episode is in."""
    converter = load_converter(request.source)
    base = episode_key_base(converter, request)
    part_of = {source_id: part for part, ids in work.parts.items() for source_id in ids}
    missing = {part: set(ids) for part, ids in work.parts.items()}
    todo = {ref.source_id for ref in work.todo}
    for part in missing:
        missing[part] &= todo
    numbers = _provisional_numbers(work.order, by_id, work.parts)
    progress.begin(f"convert {converter.name}", len(work.todo))
    lost: dict[str, str] = {}

    def mux(part: int) -> None:
        ids = work.parts[part]
        spools = [_spool_path(journal, source_id, part) for source_id in ids]
        job = PartJob(
            part=part,
            root=request.out,
            spools=tuple(path for path in spools if path.is_file()),
            features=embodiment.features,
            sidecar=embodiment.sidecar,
            cameras=_camera_keys(by_id, ids),
            fps=embodiment.fps,
            video=request.video,
            numbers=tuple(
                numbers[source_id] for source_id, path in zip(ids, spools, strict=True) if path.is_file()
            ),
        )
        executor.submit(("part", part), mux_part, job)

    for part in sorted(missing):
        if not missing[part]:
            mux(part)
    for ref in work.todo:
        part = part_of[ref.source_id]
        job = _job(request, ref, base, _spool_path(journal, ref.source_id, part), embodiment)
        executor.submit(("episode", ref.source_id), encode_episode, job)
    for (kind, name), outcome in executor.results():
        if isinstance(outcome, Failure):
            if kind == "part" or not outcome.killed_workers:
                raise DataError(f"{kind} {name}: {outcome.message}")
            lost[name] = outcome.message
            _record_lost(
                _spool_path(journal, name, part_of[name]), by_id[name], _key(base, name), outcome.message
            )
        if kind == "episode":
            facts = {} if isinstance(outcome, Failure) else outcome
            progress.advance(1, facts.get("frames", 0), facts.get("bytes", 0))
            part = part_of[name]
            missing[part].discard(name)
            if not missing[part]:
                mux(part)
    progress.end()


def _record_lost(path: Path, ref: EpisodeRef, key: str, reason: str) -> None:
    from .spool import write_spool

    receipt = {
        "source_id": ref.source_id,
        "split": ref.split,
        "variant": ref.variant,
        "frames": ref.frames,
        "instruction": ref.instruction,
        "metadata": dict(ref.metadata),
        "segments": [],
        "warnings": [],
        "key": key,
        "memo": file_memo(ref.files),
        "dropped": reason,
        "remedy": "convert it alone with --workers 0 to see what happens",
    }
    write_spool(path, receipt, {}, {})


def _provisional_numbers(
    order: Sequence[str], by_id: dict[str, EpisodeRef], parts: dict[int, list[str]]
) -> dict[str, tuple[int, int, int]]:
    """Numbers as they come out if nothing more is dropped; `finish` rewrites tables where they do not."""
    numbers: dict[str, tuple[int, int, int]] = {}
    tasks: dict[str, int] = {}
    index = 0
    for episode, source_id in enumerate(order):
        ref = by_id.get(source_id)
        if ref is None:
            numbers[source_id] = (episode, index, 0)
            continue
        numbers[source_id] = (episode, index, tasks.setdefault(ref.instruction, len(tasks)))
        index += ref.frames
    return numbers


def _camera_keys(by_id: dict[str, EpisodeRef], ids: Sequence[str]) -> tuple[str, ...]:
    for source_id in ids:
        if source_id in by_id:
            return tuple(camera.key for camera in by_id[source_id].cameras)
    return ()


def _parts(refs: Sequence[EpisodeRef], first: int, part_frames: int) -> list[dict[str, Any]]:
    """Cut episodes, in order, into parts of at most `part_frames` frames (one longer episode is a part alone)."""
    parts: list[dict[str, Any]] = []
    frames = 0
    for ref in refs:
        if not parts or frames + ref.frames > part_frames:
            parts.append({"part": first + len(parts), "episodes": []})
            frames = 0
        parts[-1]["episodes"].append(ref.source_id)
        frames += ref.frames
    return parts


def _order(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(journal.glob("order-*.json"))]


def _split_rank(split: str) -> tuple[int, str]:
    """Train first, so that `splits` can name contiguous ranges."""
    return (0 if split == "train" else 1, split)


def _of_one_size(refs: Sequence[EpisodeRef], request: ConvertRequest) -> list[EpisodeRef]:
    """The refs, all with the same cameras of the same size; DataError with the sizes found otherwise."""
    shapes: dict[tuple[Any, ...], str] = {}
    for ref in refs:
        shape = tuple((c.key, c.height, c.width) for c in map(request.video.size, ref.cameras))
        shapes.setdefault(shape, ref.source_id)
    if len(shapes) > 1:
        listed = "\n".join(
            f"    {', '.join(f'{key} {w}x{h}' for key, h, w in shape)}: {source_id}"
            for shape, source_id in shapes.items()
        )
        raise DataError(
            f"recordings differ in their pictures, and a dataset has one size a camera\n  found:\n{listed}\n"
            f"  next: --resize WxH brings them to one size, or convert their folders separately with --raw and --name"
        )
    return list(refs)


def _nothing_left(request: ConvertRequest, catalog: Catalog) -> DataError:
    reasons = "\n".join(f"    {d.source_id}: {d.reason}" for d in catalog.dropped[:10])
    if catalog.refs:
        return DataError(f"no episode of {request.raw} meets --where {request.where!r}")
    return DataError(
        f"none of the {catalog.recordings} recordings in {request.raw} can be converted\n  found:\n{reasons}"
    )


def _refuse_foreign(out: Path) -> None:
    if (out / "meta").exists() and not (out / "dpipe").exists():
        raise DataError(
            f"{out} is a dataset that dpipe did not write; choose another place with --name or --out"
        )
    if out.exists() and not (out / "dpipe").exists() and any(out.iterdir()):
        raise DataError(f"{out} is not empty; choose another place with --name or --out")


def _check_settings(request: ConvertRequest, converter: Converter, journal: Path) -> None:
    """Remember what this dataset is made with; refuse to go on with anything else."""
    path = journal / "settings.json"
    settings = {
        "layout": LAYOUT,
        "name": request.name,
        "source": converter.name,
        "converter_version": converter.version,
        "options": asdict(request.options),
        "video": request.video.to_json(),
        "part_frames": request.part_frames,
    }
    if converter.describe is not None:
        body = converter.describe(request.raw, request.options, request.variant)
        settings |= {"features": {f.name: list(f.names) for f in body.features}, "fps": body.fps}
    settings = json.loads(json.dumps(settings))
    if not path.is_file():
        write_json(path, settings)
        return
    before = json.loads(path.read_text())
    differing = _differences(before, settings)
    if differing:
        raise UsageError(
            f"{request.out} was made with other options:\n"
            + "\n".join(f"    {name}: {was!r} then, {now!r} now" for name, was, now in differing)
            + "\n  next: use the same options, or another --name"
        )


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    result: list[tuple[str, Any, Any]] = []
    for name in sorted(set(before) | set(now)):
        was, is_now = before.get(name), now.get(name)
        if isinstance(was, dict) and isinstance(is_now, dict):
            result += _differences(was, is_now, "--" if name in ("options", "video") else f"{name} of ")
        elif was != is_now:
            shown = name.replace("_", "-") if prefix == "--" else name
            result.append((prefix + shown, was, is_now))
    return result


def _clean_spool(journal: Path) -> None:
    spool = journal.parent / "spool"
    if spool.is_dir():
        for path in spool.iterdir():
            path.unlink()
        spool.rmdir()
    remove_temporaries(journal.parent.parent)


class _Lazy:
    """Executors made when first needed: a rerun with nothing to do must not start a cluster."""

    def __init__(self, stop: Any, request: ConvertRequest) -> None:
        self.stop, self.request = stop, request
        self.entered: Executor | None = None

    def __enter__(self) -> _Lazy:
        return self

    def __exit__(self, *error: object) -> None:
        if self.entered is not None:
            self.entered.__exit__(*error)

    def light(self) -> Executor:
        """For scans and numbering: the cluster if it is there already, else this process."""
        return self.entered or Executor(self.stop)

    def heavy(self, tasks: int) -> Executor:
        if self.entered is None:
            workers = (
                min(self.request.workers, tasks) if self.request.scheduler is None else self.request.workers
            )
            self.entered = open_executor(self.stop, workers, self.request.scheduler)
            self.entered.__enter__()
        return self.entered


def options_from_strings(options_type: type, given: dict[str, Any]) -> Any:
    """An Options value from command-line words, checked against each field's choices."""
    known = {f.name: f for f in fields(options_type)}
    values: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        choices = known[name].metadata.get("choices")
        if choices and value not in choices:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected one of {', '.join(choices)}")
        values[name] = value
    return options_type(**values)
