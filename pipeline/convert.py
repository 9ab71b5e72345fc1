"""`dpipe convert`: raw recordings to a LeRobot v3.0 dataset, resumable, appendable, the same bytes every time.

    scan      everything but pixels is checked; the order of new episodes is fixed on disk      catalog, order
    encode    one task an episode: columns and packets into a spool file                        payload
    mux       one task a part, when its episodes are done: packets into part files              payload
    number    global columns and meta/ from the receipts, staged, then moved in one go          finish

A killed run leaves spool files and part receipts; the same command picks them up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..converters import Converter, load_converter
from ..schemas.episode import Dropped, Embodiment, EpisodeRef
from ..schemas.errors import DataError, UsageError
from .catalog import Catalog, Refs, build_catalog, select
from .durable import (
    FULL,
    exclusive,
    full_disk,
    full_disk_as_message,
    remove_temporaries,
    require_space,
    write_json,
)
from .execute import READ_ERRORS, Executor, Failure, StopRequest, Task, open_executor, stop_requests
from .finish import FinishResult, finish, recover
from .payload import (
    EpisodeJob,
    PartJob,
    VideoOptions,
    digest_episode,
    encode_episode,
    file_memo,
    mux_part,
)
from .progress import Progress
from .receipts import COMPARED, Receipts, few_collections, load_receipts
from .spool import read_spool, spool_name, write_spool
from .tables import has_language

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..streams.shard_format import ShardOptions
    from .plan import Step

PART_FRAMES = 16_384
SCAN = "scan.parquet"  # in the journal: the catalogue as the last run found it
SCANNED_HERE = 512  # recordings up to which starting workers would cost more than they save
JOBS_AT_A_TIME = 256
PLANNED_ABOVE_PIXELS = 1e10  # some minutes of one core: below, nobody need be asked
LAYOUT = 2  # raise when the same inputs would give other files


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
    shards: ShardOptions | None = None  # write shards too, from the recorded frames


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
    shards: Path | None = None


@dataclass(frozen=True)
class Order:
    """Which episodes the dataset has, in the order they were taken in, cut into parts; fixed on disk once."""

    files: tuple[str, ...]
    parts: Mapping[int, list[str]]

    @property
    def listed(self) -> set[str]:
        return {source_id for ids in self.parts.values() for source_id in ids}

    def homes(self) -> dict[str, int]:
        """Every episode once, in order -> the part it was first listed in, where its rows belong for good."""
        found: dict[str, int] = {}
        for part, ids in self.parts.items():
            for source_id in ids:
                found.setdefault(source_id, part)
        return found


@dataclass
class _Work:
    """What is left to do, from comparing the catalogue with the receipts."""

    todo: list[tuple[int, int]] = field(default_factory=list)  # encode: (row of the refs, part)
    parts: dict[int, list[str]] = field(default_factory=dict)  # parts not yet muxed -> their episodes
    order: list[str] = field(default_factory=list)  # every episode of the dataset, in its order
    homes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # its part
    gone: list[tuple[str, int]] = field(default_factory=list)  # listed, neither done nor found any more


def convert_all(
    request: ConvertRequest, progress: Progress, agree: Callable[[list[Step]], None] | None = None
) -> list[ConvertResult]:
    """Convert everything a raw folder holds: where recordings differ in their features, a dataset a variant.

    `agree` hears the plan of work that may be large, and raises where it is not wanted.
    """
    from .plan import plan_convert

    begun = time.monotonic()
    with _Lazy(request) as executors:
        catalog = read_catalog(request, progress, executors)
        requests = by_variant(request, catalog)
        if agree is not None and _pixels(catalog.refs, request) > PLANNED_ABOVE_PIXELS:
            agree([plan_convert(each, catalog) for each in requests])
        catalogs = [catalog.of(each.variant) for each in requests]
        del catalog  # each conversion lets go of its own
        return [
            convert(_in_what_is_left(each, begun), progress, catalogs.pop(0), executors) for each in requests
        ]


def _in_what_is_left(request: ConvertRequest, begun: float) -> ConvertRequest:
    """The same with the rest of its time: --max-time is of a command, however many datasets it makes."""
    if request.max_time_s is None:
        return request
    return replace(request, max_time_s=max(1.0, request.max_time_s - (time.monotonic() - begun)))


def _pixels(refs: Refs, request: ConvertRequest) -> int:
    """Of all cameras of all episodes, each as large as in the first with its cameras."""
    mean = float(refs.frames.mean()) if len(refs) else 0.0
    sizes = ((map(request.video.size, cameras), count) for cameras, _, count in refs.camera_sets())
    return round(mean * sum(count * sum(c.height * c.width for c in cameras) for cameras, count in sizes))


def by_variant(request: ConvertRequest, catalog: Catalog) -> list[ConvertRequest]:
    """The request itself where recordings have no variants, else one a variant, named NAME-VARIANT."""
    if set(catalog.variants) <= {""}:
        return [request]
    beside = request.out.parent
    return [
        replace(request, variant=v, name=f"{request.name}-{v}", out=beside / f"{request.out.name}-{v}")
        for v in catalog.variants
    ]


def read_catalog(request: ConvertRequest, progress: Progress, executors: _Lazy | None = None) -> Catalog:
    """Scan the raw folder, with what any dataset made from it remembers.

    With `executors` a conversion begins: what a stop would lose is kept, and the workers that will be needed
    anyway may be started for the scan.
    """
    converter = load_converter(request.source)
    made = [request.out, *sorted(request.out.parent.glob(f"{request.out.name}-*"))]
    caches = [root / "dpipe" / "journal" / SCAN for root in made]
    cache = next((path for path in caches if path.is_file()), None)
    journal = request.out / "dpipe" / "journal"
    if executors is not None and converter.embodiment is not None and (journal / "settings.json").is_file():
        _check_settings(request, converter, journal)  # before workers start: other options scan anew
    # A few are read here sooner than workers are asked; of more, all cores but one would wait.
    here = 2 * request.workers if executors is not None and request.workers else SCANNED_HERE
    with (
        nullcontext(executors) if executors else _Lazy(request) as places,
        stop_requests(request.max_time_s) as stop,
        places.heeding(stop),
    ):

        def executor_for(recordings: int) -> Executor:
            return places.heavy(recordings) if recordings >= here else places.light()

        # Not within a dataset: which there will be, of recordings of several kinds, a scan has yet to find.
        pieces = request.out.with_name(f".{request.out.name}.scan")
        keep = executors is not None
        return build_catalog(
            converter, request.raw, request.options, cache, executor_for, progress, pieces, keep
        )


def convert(
    request: ConvertRequest,
    progress: Progress,
    catalog: Catalog | None = None,
    executors: _Lazy | None = None,
) -> ConvertResult:
    """Run one dataset's conversion to the end, or raise Interrupted with everything finished so far kept."""
    if executors is None:
        with _Lazy(request) as executors:
            return convert(request, progress, catalog, executors)
    converter = load_converter(request.source)
    embodiment_check(request)
    catalog = catalog or read_catalog(request, progress, executors)
    catalog = catalog.of(request.variant)
    journal = request.out / "dpipe" / "journal"
    _refuse_foreign(request.out)
    order = load_order(journal)
    refs = _chosen(catalog, order, request)
    if not len(refs) and not order.parts:
        raise _nothing_left(request, catalog)
    with (
        exclusive(journal, f"convert {converter.name}", share=request.share),
        stop_requests(request.max_time_s) as stop,
        executors.heeding(stop),
        full_disk_as_message(request.out),
    ):
        recover(request.out, stop)
        embodiment = converter.embodiment_of(request.raw, request.options, request.variant)
        _check_settings(request, converter, journal)
        if catalog.fresh or not (journal / SCAN).is_file():
            catalog.remember(journal / SCAN)
        if order_files(journal) != order.files:  # another run got in between
            order = load_order(journal)
            refs = _chosen(catalog, order, request)
        receipts = load_receipts(request.out, COMPARED, stop)
        work = _plan(request, converter, journal, order, refs, receipts)
        del receipts
        if request.finish_only and work.parts:
            raise _unfinished_parts(request, work)
        if request.share:
            work = _share(work, *request.share)
        if work.todo:
            _require_room(request, refs.take([row for row, _ in work.todo]))
            executor = executors.heavy(len(work.todo))
            progress.say(
                f"convert {converter.name}: {len(work.todo)} episodes to do, in {executor.description}"
            )
        else:
            executor = executors.light()
        _run(request, embodiment, refs, work, executor, progress, journal)
        if request.share:
            frames = int(refs.frames[[row for row, _ in work.todo]].sum())
            return ConvertResult(
                request.out, len(work.todo), frames, 0, (), (), len(work.todo), False, finished=False
            )
        notes, left_out = refs.notes, catalog.dropped
        # What follows wants memory of its own, for every episode: let go of what only the comparison needed.
        del order, refs, catalog
        result = finish(
            request.out,
            name=request.name,
            source=converter.name,
            converter_version=converter.version,
            options=asdict(request.options),
            video=request.video,
            embodiment=embodiment,
            order=work.order,
            homes=work.homes,
            scan_dropped=left_out,
            warnings=[note for _, note in notes],
            stop=stop,
            progress=progress,
        )
        shards = _write_shards(request, request.shards, executors, progress) if request.shards else None
        _clean_spool(journal)
    return _result(request, result, len(work.todo), notes, shards)


def _write_shards(
    request: ConvertRequest, options: ShardOptions, executors: _Lazy, progress: Progress
) -> Path:
    """Shards of the numbered dataset, their JPEGs from the spool files where these are still there."""
    from ..streams.dataset import open_dataset
    from ..streams.shard_format import FOLDER
    from .shards import fill_shards, parts_waiting

    dataset = open_dataset(request.out)
    out = dataset.root / FOLDER / options.variant
    waiting = parts_waiting(dataset, out, options)
    executor = executors.heavy(len(waiting)) if len(waiting) > 1 else executors.light()
    fill_shards(dataset, out, options, waiting, executor, progress, request.out / "dpipe" / "spool")
    return out


def _share(work: _Work, part: int, count: int) -> _Work:
    """What one of `count` independent jobs has to do: every count-th part, whole."""
    parts = {number: ids for number, ids in work.parts.items() if number % count == part}
    return _Work(
        [(row, number) for row, number in work.todo if number in parts],
        parts,
        work.order,
        work.homes,
        [(source_id, number) for source_id, number in work.gone if number in parts],
    )


def _unfinished_parts(request: ConvertRequest, work: _Work) -> DataError:
    listed = ", ".join(map(str, sorted(work.parts)[:20]))
    return DataError(
        f"{request.out} cannot be finished: {len(work.parts)} parts are not done ({listed})\n"
        f"  next: run the jobs of those parts again (--part i/n takes the parts whose number is i modulo n)"
    )


def _result(
    request: ConvertRequest,
    done: FinishResult,
    encoded: int,
    notes: Sequence[tuple[str, str]],
    shards: Path | None,
) -> ConvertResult:
    return ConvertResult(
        root=request.out,
        episodes=done.episodes,
        frames=done.frames,
        bytes=done.bytes,
        dropped=done.dropped,
        warnings=tuple(f"{source_id}: {note}" for source_id, note in notes),
        encoded=encoded,
        unchanged=done.unchanged,
        shards=shards,
    )


def embodiment_check(request: ConvertRequest) -> None:
    """Usage errors that need no data."""
    if request.video.resize and any(side <= 0 or side % 2 for side in request.video.resize):
        width, height = request.video.resize
        raise UsageError(f"--resize {width}x{height}: both sides must be even and positive (yuv420p)")
    if request.part_frames < 1:
        raise UsageError("--part-frames must be at least 1")


@few_collections()
def _compare(
    request: ConvertRequest, converter: Converter, order: Order, refs: Refs, receipts: Receipts
) -> tuple[list[int], list[int]]:
    """Rows of new episodes, and of those whose recording changed since their receipt."""
    listed = order.listed
    base = episode_key_base(converter, request)
    fresh = [row for row, source_id in enumerate(refs.source_ids) if source_id not in listed]
    if not len(receipts):
        return fresh, []
    changed = []
    rows_of, memos, latest = refs.row_of, list(refs.memos()), receipts.latest
    for at, (source_id, (was, memo)) in enumerate(
        zip(receipts.source_ids, receipts.rows(["key", "memo"]), strict=True)
    ):
        row = rows_of.get(source_id)
        if row is None or latest[source_id] != at:
            continue
        key = _key(base, source_id)
        if was == key and memo == memos[row] and not request.verify:
            continue  # as `_valid` says, of a million without asking it
        receipt = receipts.one(at, ("key", "memo", "raw_digest", "dropped"))
        if not _valid(request, receipt, key, memos[row], lambda row=row: refs[row]):
            changed.append(row)
    return fresh, sorted(changed)


def _plan(
    request: ConvertRequest,
    converter: Converter,
    journal: Path,
    order: Order,
    refs: Refs,
    receipts: Receipts,
) -> _Work:
    """Fix the order of new episodes on disk, and find what has no valid receipt yet."""
    fresh, changed = _compare(request, converter, order, refs, receipts)
    parts = dict(order.parts)
    done = set(np.unique(receipts.numbers("part")).tolist())
    if changed:  # a run that was stopped may have listed them already, in parts still to be made
        listed = {source_id for part, ids in parts.items() if part not in done for source_id in ids}
        changed = [row for row in changed if refs.source_ids[row] not in listed]
    if fresh or changed:
        # A changed episode keeps its place; its new payload goes into a new part, listed as a replacement.
        if not order.parts:
            splits = refs.texts("split")
            fresh.sort(key=lambda row: _split_rank(splits[row]))
        new = _parts(refs, [*fresh, *changed], max(parts, default=-1) + 1, request.part_frames)
        batch = {"parts": [{"part": part, "episodes": ids} for part, ids in new.items()]}
        write_json(journal / f"order-{len(order.files):04d}.json", batch, indent=None)
        parts |= new
    base = episode_key_base(converter, request)
    homes = Order((), parts).homes()
    work = _Work(order=list(homes), homes=np.fromiter(homes.values(), np.int64, len(homes)))
    spool = journal.parent / "spool"
    spooled = {path.name for path in spool.iterdir()} if spool.is_dir() else set()
    missing = [part for part in parts if part not in done]
    newest = {s: part for part, ids in parts.items() for s in ids} if missing else {}
    for part in missing:
        ids = parts[part]
        if all(newest[source_id] > part for source_id in ids):
            continue  # made once, and since then every episode of it anew
        work.parts[part] = ids
        for source_id in ids:
            row, path = refs.row_of.get(source_id), _spool_path(spool, source_id, part)
            if path.name in spooled and _spooled(request, path, refs, row, _key(base, source_id)):
                continue
            if row is None:
                work.gone.append((source_id, part))
            else:
                work.todo.append((row, part))
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
    raw_bytes: int  # of the files to read
    files: int  # to be written
    dropped: tuple[Dropped, ...]


def plan_conversion(request: ConvertRequest, catalog: Catalog) -> tuple[ConvertPlan, Refs]:
    """Compare a catalogue with what is done; what is to do, and the episodes of it."""
    converter = load_converter(request.source)
    embodiment_check(request)
    journal = request.out / "dpipe" / "journal"
    if (journal / "settings.json").is_file():
        _check_settings(request, converter, journal)
    catalog = catalog.of(request.variant)
    order = load_order(journal)
    refs = _chosen(catalog, order, request)
    receipts = load_receipts(request.out, COMPARED)
    fresh, changed = _compare(request, converter, order, refs, receipts)
    redo = {*fresh, *changed}
    rows = [row for row, s in enumerate(refs.source_ids) if row in redo or s not in receipts.latest]
    todo = refs.take(rows)
    sizes: dict[str, int] = {}
    for paths in todo.paths():
        for path in paths:
            if str(path) not in sizes:
                sizes[str(path)] = path.stat().st_size if path.exists() else 0
    cameras = next((cameras for cameras, _, _ in refs.camera_sets()), ())
    plan = ConvertPlan(
        source=converter.name,
        root=request.out,
        recordings=catalog.recordings,
        episodes=len(refs),
        frames=int(refs.frames.sum()),
        todo_episodes=len(todo),
        todo_frames=int(todo.frames.sum()),
        changed=tuple(refs.source_ids[row] for row in changed),
        raw_bytes=sum(sizes.values()),
        files=len(_parts(todo, range(len(todo)), 0, request.part_frames)) * (1 + len(cameras)),
        dropped=tuple(catalog.dropped),
    )
    return plan, todo


def _chosen(catalog: Catalog, order: Order, request: ConvertRequest) -> Refs:
    """Episodes that meet --where and --limit, and those an earlier run has already taken in."""
    refs = catalog.refs
    if request.where or request.limit:
        wanted = {*select(refs, request.where, request.limit).source_ids, *order.listed}
        refs = refs.take([row for row, source_id in enumerate(refs.source_ids) if source_id in wanted])
    _require_one_size(refs, request)
    return refs


def episode_key_base(converter: Converter, request: ConvertRequest) -> str:
    """What of an episode's identity is common to the run: name, version, parameters; never a path."""
    return json.dumps(
        [
            *(LAYOUT, converter.name, converter.version, asdict(request.options), request.video.to_json()),
            *([converter.rate, converter.actions] if converter.rate else []),
        ],
        sort_keys=True,
    )


def _key(base: str, source_id: str) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(f"{base}\n{source_id}".encode())


def _valid(
    request: ConvertRequest,
    receipt: Mapping[str, Any],
    key: str,
    memo: str,
    read: Callable[[], EpisodeRef],
) -> bool:
    """A receipt holds when its key matches and the files are as they were, or prove to hold the same episode."""
    if receipt["key"] != key:
        return False
    if not request.verify and receipt["memo"] == memo:
        return True
    if receipt["dropped"]:
        return False  # it failed with other files: worth another try
    ref = read()
    if not all(path.exists() for path in ref.files):
        return True  # discarded after its receipt was durable
    try:
        return digest_episode(episode_job(request, ref, key, Path())) == receipt["raw_digest"]
    except DataError:
        return False


def episode_job(
    request: ConvertRequest, ref: EpisodeRef, key: str, spool: Path, embodiment: Embodiment | None = None
) -> EpisodeJob:
    if embodiment is None:
        converter = load_converter(request.source)
        embodiment = converter.embodiment_of(request.raw, request.options, ref.variant)
    return EpisodeJob(
        request.source, ref, request.options, request.video, embodiment, key, spool, request.shards
    )


def _spool_path(spool: Path, source_id: str, part: int) -> Path:
    return spool / f"{part:06d}-{spool_name(source_id)}.episode"


def _spooled(request: ConvertRequest, path: Path, refs: Refs, row: int | None, key: str) -> bool:
    """Whether a spool file holds its episode as the recording is now; one whose recording is gone counts."""
    try:
        receipt = read_spool(path).receipt
    except DataError:
        path.unlink()
        return False
    if row is None:
        return receipt["key"] == key and "dropped" not in receipt
    told = {"key": receipt["key"], "memo": json.dumps(receipt["memo"])}
    told |= {"dropped": receipt.get("dropped", ""), "raw_digest": receipt.get("raw_digest", "")}
    ref = refs[row]
    if _valid(request, told, key, json.dumps(file_memo(ref.files)), lambda: ref):
        return True
    path.unlink()
    return False


def _run(
    request: ConvertRequest,
    embodiment: Embodiment,
    refs: Refs,
    work: _Work,
    executor: Executor,
    progress: Progress,
    journal: Path,
) -> None:
    """Encode what is missing; mux a part as soon as its last episode is in."""
    if not work.parts:
        return
    converter = load_converter(request.source)
    base = episode_key_base(converter, request)
    missing = dict.fromkeys(work.parts, 0)
    for _, part in work.todo:
        missing[part] += 1
    numbers = _provisional_numbers(work, refs)
    spool = journal.parent / "spool"
    spool.mkdir(exist_ok=True)
    progress.begin(f"convert {converter.name}", len(work.todo))
    cameras = next((tuple(c.key for c in cameras) for cameras, _, _ in refs.camera_sets()), None)
    unread: dict[str, str] = {}

    def mux(part: int) -> None:
        ids = work.parts[part]
        spools = [_spool_path(spool, source_id, part) for source_id in ids]
        there = [path.is_file() for path in spools]
        job = PartJob(
            part=part,
            root=request.out,
            spools=tuple(path for path, is_there in zip(spools, there, strict=True) if is_there),
            features=embodiment.features,
            sidecar=embodiment.sidecar,
            cameras=cameras if cameras is not None else _spooled_cameras(spools),
            fps=embodiment.fps,
            video=request.video,
            numbers=tuple(numbers(s) for s, is_there in zip(ids, there, strict=True) if is_there),
            language=has_language(embodiment),
        )
        executor.submit(("part", part), mux_part, job)

    def episodes() -> Iterator[Task]:
        for start in range(0, len(work.todo), JOBS_AT_A_TIME):
            some = work.todo[start : start + JOBS_AT_A_TIME]
            for ref, (row, part) in zip(refs.take([row for row, _ in some]), some, strict=True):
                path = _spool_path(spool, ref.source_id, part)
                job = episode_job(request, ref, _key(base, ref.source_id), path, embodiment)
                yield ("episode", (row, part)), encode_episode, (job,)

    for source_id, part in work.gone:
        _record_gone(_spool_path(spool, source_id, part), source_id, _key(base, source_id), request.raw)
    for part in sorted(missing):
        if not missing[part]:
            mux(part)
    for (kind, name), outcome in executor.results(episodes()):
        if kind == "part":
            if isinstance(outcome, Failure):
                raise DataError(_stopped(request, f"part {name}", outcome))
            # Its receipt is durable: the spool files may go, unless shards are still to be made of them.
            for source_id in work.parts[name] if request.shards is None else ():
                _spool_path(spool, source_id, name).unlink(missing_ok=True)
            continue
        row, part = name
        if isinstance(outcome, Failure):
            ref = refs[row]
            if isinstance(outcome.error, OSError) and outcome.error.errno in READ_ERRORS:
                unread[ref.source_id] = outcome.message  # the others first; its part waits
                continue
            if not outcome.killed_workers:
                raise DataError(_stopped(request, f"episode {ref.source_id}", outcome))
            _record_lost(
                _spool_path(spool, ref.source_id, part), ref, _key(base, ref.source_id), outcome.message
            )
            outcome = {}
        progress.advance(1, outcome.get("frames", 0), outcome.get("bytes", 0))
        missing[part] -= 1
        if not missing[part]:
            mux(part)
    progress.end()
    if unread:
        listed = "".join(f"\n    {source_id}: {why}" for source_id, why in list(unread.items())[:10])
        raise DataError(
            f"{len(unread)} episodes could not be read{listed}\n"
            "  Everything else is done: run the same command again once the disk answers. What stays unreadable "
            "is left out when its files are moved away."
        )


def _stopped(request: ConvertRequest, what: str, failure: Failure) -> str:
    if isinstance(failure.error, OSError) and failure.error.errno in FULL:
        return full_disk(request.out)
    return f"{what}: {failure.message}"


def _record_lost(path: Path, ref: EpisodeRef, key: str, reason: str) -> None:
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


def _record_gone(path: Path, source_id: str, key: str, raw: Path) -> None:
    """A recording that an earlier run had listed, removed before it was converted."""
    receipt = {"source_id": source_id, "key": key, "frames": 0, "memo": [], "metadata": {}}
    receipt |= {"split": "", "variant": "", "instruction": "", "segments": [], "warnings": []}
    receipt |= {"dropped": f"its recording is no longer in {raw}", "remedy": "put it back, or leave it so"}
    write_spool(path, receipt, {}, {})


def _provisional_numbers(work: _Work, refs: Refs) -> Callable[[str], tuple[int, int, int]]:
    """Numbers as they come out if nothing more is dropped; `finish` rewrites tables where they do not."""
    rows = np.fromiter((refs.row_of.get(s, -1) for s in work.order), np.int64, len(work.order))
    frames = np.where(rows >= 0, refs.frames[rows] if len(refs) else 0, 0)
    first = np.cumsum(frames) - frames
    tasks: dict[str, int] = {}
    instruction = refs.texts("instruction")
    task = [tasks.setdefault(instruction[row], len(tasks)) if row >= 0 else 0 for row in rows.tolist()]
    place = {source_id: episode for episode, source_id in enumerate(work.order)}

    def numbers(source_id: str) -> tuple[int, int, int]:
        episode = place[source_id]
        return episode, int(first[episode]), task[episode]

    return numbers


def _spooled_cameras(spools: Sequence[Path]) -> tuple[str, ...]:
    """Camera keys by a finished episode, where every recording is gone."""
    receipts = (read_spool(path).receipt for path in spools if path.is_file())
    return next((tuple(r["cameras"]) for r in receipts if "cameras" in r), ())


def _parts(refs: Refs, rows: Sequence[int], first: int, part_frames: int) -> dict[int, list[str]]:
    """Cut episodes, in order, into parts of at most `part_frames` frames (one longer episode is a part alone)."""
    parts: dict[int, list[str]] = {}
    part, room = first - 1, -1
    lengths = refs.frames.tolist()
    for row in rows:
        if room < lengths[row] or part < first:
            part, room = part + 1, part_frames
            parts[part] = []
        parts[part].append(refs.source_ids[row])
        room -= lengths[row]
    return parts


def order_files(journal: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in journal.glob("order-*.json")))


def load_order(journal: Path) -> Order:
    files = order_files(journal)
    batches = (json.loads((journal / name).read_text()) for name in files)
    return Order(files, {part["part"]: part["episodes"] for batch in batches for part in batch["parts"]})


def _split_rank(split: str) -> tuple[int, str]:
    """Train first, so that `splits` can name contiguous ranges."""
    return (0 if split == "train" else 1, split)


def _require_one_size(refs: Refs, request: ConvertRequest) -> None:
    """All episodes have the same cameras of the same size; DataError with the sizes found otherwise."""
    shapes: dict[tuple[Any, ...], int] = {}
    for cameras, row, _ in refs.camera_sets():
        shapes.setdefault(tuple((c.key, c.height, c.width) for c in map(request.video.size, cameras)), row)
    if len(shapes) > 1:
        listed = "\n".join(
            f"    {', '.join(f'{key} {w}x{h}' for key, h, w in shape)}: {refs.source_ids[row]}"
            for shape, row in shapes.items()
        )
        raise DataError(
            f"recordings differ in their pictures, and a dataset has one size a camera\n  found:\n{listed}\n"
            f"  next: --resize WxH brings them to one size, or convert their folders separately with --raw and --name"
        )


def _require_room(request: ConvertRequest, todo: Refs) -> None:
    from .plan import conversion_bytes

    require_space(request.out, sum(conversion_bytes(request, todo)), f"converting {len(todo)} episodes")


def _nothing_left(request: ConvertRequest, catalog: Catalog) -> DataError:
    reasons = "\n".join(f"    {d.source_id}: {d.reason}" for d in catalog.dropped[:10])
    remedies = "\n  or: ".join(dict.fromkeys(d.remedy for d in catalog.dropped[:10]))
    if len(catalog.refs):
        return DataError(f"no episode of {request.raw} meets --where {request.where!r}")
    return DataError(
        f"none of the {catalog.recordings} recordings in {request.raw} can be converted\n  found:\n{reasons}\n"
        f"  next: {remedies}"
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
    if converter.rate:
        settings |= {"fps": converter.rate, "actions": converter.actions}
    if converter.embodiment is None:
        body = converter.embodiment_of(request.raw, request.options, request.variant)
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
    """Executors made when first needed: a rerun with nothing to do must not start a cluster.

    A conversion's scan and its datasets share one, each with its own ear for requests to stop: between them
    whoever is asked to agree can still be interrupted.
    """

    def __init__(self, request: ConvertRequest) -> None:
        self.request, self.stop = request, StopRequest()
        self.entered: Executor | None = None
        self.workers = 0

    def __enter__(self) -> _Lazy:
        return self

    def __exit__(self, *error: object) -> None:
        if self.entered is not None:
            self.entered.__exit__(*error)
            self.entered = None

    @contextmanager
    def heeding(self, stop: StopRequest) -> Iterator[None]:
        """What runs within stops when asked by `stop`."""
        self.stop = stop
        if self.entered is not None:
            self.entered.stop = stop
        yield

    def light(self) -> Executor:
        """For scans and numbering: the cluster if it is there already, else this process."""
        return self.entered or Executor(self.stop)

    def heavy(self, tasks: int) -> Executor:
        given = self.request.workers
        workers = min(given, tasks) if self.request.scheduler is None else given
        # Those there may have been enough for a smaller dataset before this one.
        if self.entered is not None and self.workers < workers:
            self.__exit__()
        if self.entered is None:
            self.entered, self.workers = open_executor(self.stop, workers, self.request.scheduler), workers
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
