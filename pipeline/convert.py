"""`dpipe convert`: raw recordings to a LeRobot v3.0 dataset, resumable, appendable, the same bytes every time.

    scan      everything but pixels is checked; the order of new episodes is fixed on disk      catalog, work
    encode    one task an episode: columns and packets into a spool file                        payload
    mux       one task a part, when its episodes are done: packets into part files              payload
    number    global columns and meta/ from the receipts, staged, then moved in one go          finish

A killed run leaves spool files and part receipts; the same command picks them up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..converters import load_converter
from ..schemas.episode import Dropped, Embodiment, EpisodeRef
from ..schemas.errors import DataError
from .catalog import Catalog, Refs, build_catalog
from .durable import FULL, exclusive, full_disk, full_disk_as_message, remove_temporaries, require_space
from .execute import READ_ERRORS, Executor, Failure, StopRequest, Task, open_executor, stop_requests
from .finish import FinishResult, finish, recover
from .payload import PartJob, encode_episode, file_memo, mux_part
from .progress import Progress
from .receipts import COMPARED, load_receipts
from .request import ConvertRequest, check_request, check_settings, episode_key, episode_key_base
from .spool import read_spool, write_spool
from .tables import has_language
from .work import (
    Work,
    chosen,
    episode_job,
    load_order,
    order_files,
    plan_work,
    provisional_numbers,
    share_of,
    spool_path,
)

if TYPE_CHECKING:
    from ..streams.shard_format import ShardOptions
    from .plan import Step

SCAN = "scan.parquet"  # in the journal: the catalogue as the last run found it
SCANNED_HERE = 512  # recordings up to which starting workers would cost more than they save
JOBS_AT_A_TIME = 256
PLANNED_ABOVE_PIXELS = 1e10  # some minutes of one core: below, nobody need be asked


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
        check_settings(request, converter, journal)  # before workers start: other options scan anew
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
    check_request(request)
    catalog = catalog or read_catalog(request, progress, executors)
    catalog = catalog.of(request.variant)
    journal = request.out / "dpipe" / "journal"
    _refuse_foreign(request.out)
    order = load_order(journal)
    refs = chosen(catalog, order, request)
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
        check_settings(request, converter, journal)
        if catalog.fresh or not (journal / SCAN).is_file():
            catalog.remember(journal / SCAN)
        if order_files(journal) != order.files:  # another run got in between
            order = load_order(journal)
            refs = chosen(catalog, order, request)
        receipts = load_receipts(request.out, COMPARED, stop)
        work = plan_work(request, converter, journal, order, refs, receipts)
        del receipts
        if request.finish_only and work.parts:
            raise _unfinished_parts(request, work)
        if request.share:
            work = share_of(work, *request.share)
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


def _unfinished_parts(request: ConvertRequest, work: Work) -> DataError:
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


def _run(
    request: ConvertRequest,
    embodiment: Embodiment,
    refs: Refs,
    work: Work,
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
    numbers = provisional_numbers(work, refs)
    spool = journal.parent / "spool"
    spool.mkdir(exist_ok=True)
    progress.begin(f"convert {converter.name}", len(work.todo))
    cameras = next((tuple(c.key for c in cameras) for cameras, _, _ in refs.camera_sets()), None)
    unread: dict[str, str] = {}

    def mux(part: int) -> None:
        ids = work.parts[part]
        spools = [spool_path(spool, source_id, part) for source_id in ids]
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
                path = spool_path(spool, ref.source_id, part)
                job = episode_job(request, ref, episode_key(base, ref.source_id), path, embodiment)
                yield ("episode", (row, part)), encode_episode, (job,)

    for source_id, part in work.gone:
        _record_gone(spool_path(spool, source_id, part), source_id, episode_key(base, source_id), request.raw)
    for part in sorted(missing):
        if not missing[part]:
            mux(part)
    for (kind, name), outcome in executor.results(episodes()):
        if kind == "part":
            if isinstance(outcome, Failure):
                raise DataError(_stopped(request, f"part {name}", outcome))
            # Its receipt is durable: the spool files may go, unless shards are still to be made of them.
            for source_id in work.parts[name] if request.shards is None else ():
                spool_path(spool, source_id, name).unlink(missing_ok=True)
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
                spool_path(spool, ref.source_id, part), ref, episode_key(base, ref.source_id), outcome.message
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


def _spooled_cameras(spools: Sequence[Path]) -> tuple[str, ...]:
    """Camera keys by a finished episode, where every recording is gone."""
    receipts = (read_spool(path).receipt for path in spools if path.is_file())
    return next((tuple(r["cameras"]) for r in receipts if "cameras" in r), ())


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
