"""Run stages over a dataset: targets made part by part, resumed by the same command, bound by content.

    <targets>/<stage>/<variant>/
        prepared.json, prepared/*.npy   settled once: normaliser, scales, what they were fitted on
        <array>/part-00000-<key>/       Zarr v3 arrays, one per dataset part (`streams/arrays.py`)
        parts/part-00000-<key>.json     receipt: the part is done, with its episodes' contents and row counts
        report.json, *.png
        episodes.parquet                content -> part, start row and rows, for every episode
        contract.json                   last: its presence means complete

<targets> is <dataset>/dpipe/targets for datasets of ours, else a folder of the workspace. A part's key covers
stage, version, parameters, what was prepared, and the contents of its episodes: a part with a receipt is not
done again, and an episode whose content an older part holds is copied from it, so that adding one episode
computes one episode. Dataset part k and target part k hold the same episodes.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import queue
import shutil
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..schemas.contract import ArraySpec, Contract, canonical_json, digest_of, plain
from ..schemas.errors import DataError, UsageError
from ..stages import (
    DatasetInfo,
    EpisodeView,
    FrameWish,
    Prepared,
    Run,
    Stage,
    build_params,
    load_stage,
)
from ..streams.arrays import ArrayWriter, open_array, write_group
from ..streams.dataset import Dataset, contents_digest, open_dataset
from ..streams.targets import pixel_identity
from .durable import (
    FULL,
    exclusive,
    full_disk,
    remove_temporaries,
    require_space,
    temporary_name,
    write_file,
    write_json,
)
from .execute import Failure, open_executor, stop_requests
from .progress import Progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

TARGETS = Path("dpipe") / "targets"
PREFETCHED_BLOCKS = 2
WAITING_BLOCKS = 4
NEAR_FRAMES = 8  # pictures further apart than this are not read through
COPIED_ROWS = 1024
# Parts below this are synced once, together, before the contract; until then a rerun checks their digests.
DURABLE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class TargetMade:
    """What one stage did to one dataset."""

    stage: str
    variant: str
    folder: Path
    episodes: int
    frames: int
    bytes: int
    computed_episodes: int
    copied_episodes: int
    kept_parts: int
    report: Mapping[str, Any]


# --- the dataset as stages see it ---------------------------------------------------------------------------


@dataclass
class DiskDataset:
    """A `DatasetView` over an opened dataset."""

    dataset: Dataset
    info: DatasetInfo = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ahead: dict[str, _DecodedAhead] = field(default_factory=dict)
    _parts: list[range] = field(default_factory=list)
    _held: int = -1
    _columns: dict[str, NDArray[Any]] = field(default_factory=dict)
    _ends: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        self.info = dataset_info(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def episode(self, position: int) -> DiskEpisode:
        return DiskEpisode(self, range(position, position + 1))

    def stretches(self) -> Iterator[DiskEpisode]:
        return (DiskEpisode(self, part) for part in self.dataset.parts())

    def columns(self, names: Sequence[str], episodes: range) -> dict[str, NDArray[Any]]:
        """Columns of consecutive episodes, out of the part that was read last: parts are read whole."""
        if not self._parts:
            self._parts = self.dataset.parts()
        at = bisect_right(self._parts, episodes.start, key=lambda part: part.start) - 1
        part = self._parts[at]
        if episodes.stop > part.stop:
            return self.dataset.all_columns(names, episodes)
        if self._held != at:
            self._held, self._columns = at, {}
            self._ends = np.cumsum(self.dataset.episodes.length[part.start : part.stop])
        if missing := [name for name in names if name not in self._columns]:
            self._columns |= self.dataset.all_columns(missing, part)
        first = int(self._ends[episodes.start - part.start - 1]) if episodes.start > part.start else 0
        last = int(self._ends[episodes.stop - part.start - 1])
        return {name: self._columns[name][first:last] for name in names}


def dataset_info(dataset: Dataset) -> DatasetInfo:
    embodiment = (dataset.manifest or {}).get("embodiment") or {}
    conventions = (dataset.manifest or {}).get("conventions") or embodiment.get("conventions") or {}
    return DatasetInfo(
        name=dataset.name,
        fps=dataset.fps,
        episodes=len(dataset),
        frames=dataset.total_frames,
        features=dataset.features,
        cameras={camera: dataset.camera_size(camera) for camera in dataset.cameras},
        conventions=conventions,
        splits=dataset.splits,
    )


@dataclass
class DiskEpisode:
    """An `EpisodeView`: columns on demand, frames decoded ahead in a thread of their own.

    It may span several consecutive episodes for a stage that does not care where they begin.
    """

    owner: DiskDataset
    span: range

    @property
    def index(self) -> int:
        return self.span.start

    @property
    def frames(self) -> int:
        return int(self.owner.dataset.episodes.length[self.span.start : self.span.stop].sum())

    @property
    def content(self) -> str:
        return self.owner.dataset.contents()[self.index]

    @property
    def text(self) -> str:
        tasks = self.owner.dataset.episodes.tasks(self.index)
        return tasks[0] if tasks else ""

    def columns(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        found = self.owner.columns(names, self.span)
        return {name: values.reshape(len(values), -1) for name, values in found.items()}

    def images(
        self, camera: str, rows: NDArray[np.int64], block: int, size: tuple[int, int] | None = None
    ) -> Iterator[NDArray[np.uint8]]:
        ahead = self.owner.ahead.get(camera)
        wanted = [(self.index, camera, rows[i : i + block], size) for i in range(0, len(rows), block)]
        if ahead is not None and ahead.serves(wanted):
            for _ in wanted:
                yield ahead.next()
            return
        own = _DecodedAhead(self.owner, wanted)
        try:
            for _ in wanted:
                yield own.next()
        finally:
            own.close()


# episode, camera, rising rows of one block, (height, width) to decode to
Wanted = tuple[int, str, "NDArray[np.int64]", tuple[int, int] | None]


class _DecodedAhead:
    """Blocks of frames decoded in a thread while the caller works on those before, across episodes."""

    def __init__(self, owner: DiskDataset, wanted: Sequence[Wanted]) -> None:
        self._owner, self._wanted = owner, list(wanted)
        self._given = 0
        self._ready: queue.Queue[Any] = queue.Queue(PREFETCHED_BLOCKS)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._decode_all, daemon=True)
        self._thread.start()

    def serves(self, wanted: Sequence[Wanted]) -> bool:
        """Whether these are exactly the next blocks."""
        mine = self._wanted[self._given : self._given + len(wanted)]
        return len(mine) == len(wanted) and all(
            (a[0], a[1], a[3]) == (b[0], b[1], b[3]) and np.array_equal(a[2], b[2])
            for a, b in zip(mine, wanted, strict=True)
        )

    def next(self) -> NDArray[np.uint8]:
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        self._given += 1
        return item

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _decode_all(self) -> None:
        try:
            for wanted in self._wanted:
                if not self._put(self._decode(*wanted)):
                    return
        except BaseException as error:  # noqa: BLE001 - raised again where the block was waited for
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _decode(
        self, episode: int, camera: str, rows: NDArray[np.int64], size: tuple[int, int] | None
    ) -> NDArray[np.uint8]:
        # One decoder per file is kept open by the dataset: two cameras take turns.
        with self._owner.lock:
            dataset = self._owner.dataset
            if dataset.features[camera]["dtype"] == "video":
                first = int(dataset.episodes.cameras[camera].first_frame[episode])
                return dataset.video(episode, camera, size).read(first + rows)
            cuts = np.flatnonzero(np.diff(rows) > NEAR_FRAMES) + 1
            spans = [(run, int(run[0])) for run in np.split(rows, cuts)]
            return np.concatenate(
                [dataset.frames(episode, camera, at, int(run[-1]) + 1)[run - at] for run, at in spans]
            )


class _Direct:
    """Appends blocks where they are made: for parts so small that a thread would cost more."""

    def __init__(self, writers: Mapping[str, ArrayWriter]) -> None:
        self._writers = writers

    def put(self, name: str, rows: NDArray[Any]) -> None:
        self._writers[name].append(rows)

    def finish(self) -> None:
        pass


class _Sink:
    """Appends blocks to arrays in a thread of its own, so that writing hides behind the next block's work."""

    def __init__(self, writers: Mapping[str, ArrayWriter]) -> None:
        self._writers = writers
        self._waiting: queue.Queue[Any] = queue.Queue(WAITING_BLOCKS)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write_all, daemon=True)
        self._thread.start()

    def put(self, name: str, rows: NDArray[Any]) -> None:
        if self._error is not None:
            raise self._error
        self._waiting.put((name, rows))

    def finish(self) -> None:
        """Everything is written; raises what went wrong on the way."""
        self._waiting.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _write_all(self) -> None:
        while (item := self._waiting.get()) is not None:
            if self._error is not None:
                continue  # drain, so that whoever puts never waits for ever
            try:
                self._writers[item[0]].append(item[1])
            except BaseException as error:  # noqa: BLE001 - raised again in the stage's own thread
                self._error = error


# --- one target ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartJob:
    """Everything a worker needs to make one part of one target: paths, names and small values."""

    root: Path
    folder: Path
    stage: str
    params: Any
    part: int
    key: str
    episodes: tuple[int, ...]
    contents: tuple[str, ...]
    terms: str
    """Digest over the whole dataset and what was prepared: a worker that has others open opens these."""
    copies: Mapping[str, Mapping[str, tuple[str, int, int]]]
    """content -> array -> (folder, start row, rows) in an older part of the same target."""
    level: int | None = None


def precompute(
    dataset_root: Path,
    stages: Sequence[str],
    params: Mapping[str, Mapping[str, Any]] | None = None,
    workers: int = 0,
    out: Path | None = None,
    events: Progress | None = None,
    *,
    name: str = "",
    refit: bool = False,
    scheduler: str | None = None,
    max_time_s: float | None = None,
    compress: int | None = None,
) -> list[TargetMade]:
    """Make the targets of `stages` for one dataset; what is already done is not done again.

    `params` holds options by stage; `out` is the targets folder where the dataset's own cannot be used;
    `name` overrides the variant's name (one stage only); `refit` settles normalisers and scales anew from
    today's episodes, which makes every part anew; `compress` is a zstd level.
    """
    events = events or Progress(quiet=True)
    if name and len(stages) != 1:
        raise UsageError("--name names one target\n  Give one stage.")
    dataset = open_dataset(dataset_root)
    if not len(dataset):
        raise DataError(f"{dataset_root} has no episodes\n  There is nothing to precompute from.")
    base = out or own_targets(dataset)
    made = []
    for stage_name in stages:
        if stage_name == "shards":
            told = (params or {}).get(stage_name, {})
            made.append(_shards(dataset, told, workers, out, events, name, scheduler, max_time_s))
            continue
        stage = load_stage(stage_name)
        chosen = build_params(stage, (params or {}).get(stage_name, {}))
        run = _TargetRun(dataset, stage, chosen, base, name, refit, compress, events)
        made.append(run.make(workers, scheduler, max_time_s))
    return made


def _shards(
    dataset: Dataset,
    params: Mapping[str, Any],
    workers: int,
    out: Path | None,
    events: Progress,
    name: str,
    scheduler: str | None,
    max_time_s: float | None,
) -> TargetMade:
    """Shards lie in dpipe/shards of a dataset of ours, in the folder `shards` of another's targets."""
    from .shards import make_shards

    base = dataset.root / "dpipe" / "shards" if out is None else out / "shards"
    folder, written, size = make_shards(dataset, params, base, workers, events, name, scheduler, max_time_s)
    parts = dataset.parts()
    episodes, frames = len(dataset), dataset.total_frames
    now, kept = sum(len(parts[number]) for number in written), len(parts) - len(written)
    return TargetMade("shards", folder.name, folder, episodes, frames, size, now, 0, kept, {})


def own_targets(dataset: Dataset) -> Path:
    """<dataset>/dpipe/targets, where dpipe wrote the dataset and may still write into it."""
    folder = dataset.root / TARGETS
    if dataset.manifest is None or not os.access(dataset.root / "dpipe", os.W_OK):
        why = "was not written by dpipe" if dataset.manifest is None else "cannot be written to"
        raise UsageError(f"{dataset.root} {why}: its targets need another folder\n  Give one with --out.")
    return folder


@dataclass
class _TargetRun:
    dataset: Dataset
    stage: Stage
    params: Any
    base: Path
    name: str
    refit: bool
    compress: int | None
    events: Progress

    def __post_init__(self) -> None:
        self.view = DiskDataset(self.dataset)
        self.variant = self.name or self.stage.variant(self.params, self.view.info)
        self.folder = self.base / self.stage.name / self.variant
        self.contents = self.dataset.contents()
        self.finished: set[str] = set()
        self.pixels = ""
        self.terms = {
            "stage": self.stage.name,
            "version": self.stage.version,
            "params": {
                entry.name: plain(getattr(self.params, entry.name))
                for entry in fields(self.params)
                if entry.metadata.get("key", True)  # where and how fast it runs changes no target
            },
        }

    def make(self, workers: int, scheduler: str | None, max_time_s: float | None) -> TargetMade:
        self.refuse_other_terms()
        with exclusive(self.folder, f"dpipe precompute {self.stage.name}"):
            remove_temporaries(self.folder)
            _remove_half_arrays(self.folder)
            prepared = self._prepare()
            specs = self.stage.makes(self.params, self.view.info, prepared)
            jobs = self.jobs(prepared)
            self.finished = _finished_keys(self.folder)
            wanted = {job.key: job for job in jobs}
            waiting = [job for job in jobs if not self.is_done(job, specs)]
            require_space(self.folder, self._bytes(specs, waiting), f"dpipe precompute {self.stage.name}")
            copies = self._copies(prepared, specs)
            counts = {"computed": 0, "copied": 0}
            self._announce(waiting, jobs)
            write_group(self.folder, {"dpipe": "target"})
            for spec in specs:
                write_group(self.folder / spec.name, {})
            (self.folder / "parts").mkdir(exist_ok=True)
            if self.stage.uses_model(self.params) and scheduler is None:
                workers = 0  # the model has every thread; decoding runs beside it
            with (
                stop_requests(max_time_s) as stop,
                open_executor(stop, workers if len(waiting) > 1 else 0, scheduler) as executor,
            ):
                for job in waiting:
                    mine = {c: copies[c] for c in job.contents if c in copies}
                    executor.submit(job.key, make_part, _with_copies(job, mine, self.compress))
                for key, result in executor.results():
                    if isinstance(result, Failure):
                        raise _failed(self.stage.name, wanted[key], result)
                    counts["computed"] += result["computed"]
                    counts["copied"] += result["copied"]
                    frames = sum(entry["frames"] for entry in result["receipt"]["episodes"])
                    self.events.advance(len(result["receipt"]["episodes"]), frames, result["bytes"])
            self.events.end()
            contract = self._finish(prepared, specs, jobs)
        return TargetMade(
            self.stage.name,
            self.variant,
            self.folder,
            len(self.dataset),
            self.dataset.total_frames,
            contract["bytes"],
            counts["computed"],
            counts["copied"],
            len(jobs) - len(waiting),
            _read_json(self.folder / "report.json") if (self.folder / "report.json").is_file() else {},
        )

    def refuse_other_terms(self) -> None:
        """A target of this name made with other options stays what it is."""
        path = self.folder / "prepared.json"
        if not path.is_file():
            return
        found = _read_json(path)["terms"]
        if found == self.terms:
            return
        if found["version"] != self.terms["version"]:
            differs = [f"version of the stage: {found['version']} there, {self.terms['version']} now"]
        else:
            differs = [
                f"--{option.replace('_', '-')}: {json.dumps(found['params'].get(option))} there, "
                f"{json.dumps(self.terms['params'].get(option))} now"
                for option in sorted({*found["params"], *self.terms["params"]})
                if found["params"].get(option) != self.terms["params"].get(option)
            ]
        raise UsageError(
            f"target {self.stage.name}/{self.variant} exists with other options\n  "
            + "\n  ".join(differs)
            + f"\n  Give the new one a name of its own (--name NEW), or delete {self.folder}"
        )

    def _prepare(self) -> Prepared:
        path = self.folder / "prepared.json"
        if path.is_file() and not self.refit:
            saved = _read_json(path)
            if set(saved["fitted_on"]) & set(self.contents):
                return _load_prepared(self.folder, saved)
        prepared = self.stage.prepare(self.params, self.view)
        (self.folder / "prepared").mkdir(parents=True, exist_ok=True)
        for name, values in sorted(prepared.arrays.items()):
            temporary = temporary_name(self.folder / "prepared" / f"{name}.npy")
            with open(temporary, "wb") as file:
                np.save(file, values)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.folder / "prepared" / f"{name}.npy")
        write_json(
            path,
            {
                "terms": self.terms,
                "facts": plain(prepared.facts),
                "arrays": sorted(prepared.arrays),
                "contract": plain(prepared.contract),
                "fitted_on": self.contents,
            },
        )
        return _load_prepared(self.folder, _read_json(path))

    def jobs(self, prepared: Prepared) -> list[PartJob]:
        self.pixels = pixel_identity(self.dataset, str(prepared.contract.get("camera", "")))
        settled = prepared_digest(prepared)
        terms = digest_of([str(self.folder), self.terms, settled, contents_digest(self.contents)])
        jobs = []
        for part, episodes in enumerate(self.dataset.parts()):
            contents = tuple(self.contents[e] for e in episodes)
            lengths = [int(self.dataset.episodes.length[e]) for e in episodes]
            text = canonical_json([self.terms, settled, contents, lengths, self.pixels, self.compress])
            key = hashlib.sha256(text.encode()).hexdigest()[:16]
            jobs.append(
                PartJob(
                    self.dataset.root,
                    self.folder,
                    self.stage.name,
                    self.params,
                    part,
                    key,
                    tuple(episodes),
                    contents,
                    terms,
                    {},
                )
            )
        return jobs

    def _copies(
        self, prepared: Prepared, specs: Sequence[ArraySpec]
    ) -> dict[str, dict[str, tuple[str, int, int]]]:
        """content -> array -> where its rows lie in the target as it stands, if it was made on the same terms."""
        path = self.folder / "contract.json"
        if not path.is_file():
            return {}
        found = _read_json(path)
        if found["prepared"] != prepared_digest(prepared) or found["contract"]["pixels"] != self.pixels:
            return {}
        index = read_index(self.folder)
        places: dict[str, dict[str, tuple[str, int, int]]] = {}
        for i, content in enumerate(index.get("content", [])):
            part = f"part-{index['part'][i]:05d}-{index['key'][i]}"
            places[content] = {
                spec.name: (
                    f"{spec.name}/{part}",
                    index[f"{spec.axis}_start"][i],
                    index[f"{spec.axis}_rows"][i],
                )
                for spec in specs
            }
        return places

    def is_done(self, job: PartJob, specs: Sequence[ArraySpec]) -> bool:
        if not receipt_path(job).is_file():
            return False
        return all(
            (array_path(self.folder, spec, job.part, job.key) / "zarr.json").is_file() for spec in specs
        )

    def _bytes(self, specs: Sequence[ArraySpec], jobs: Sequence[PartJob]) -> int:
        lengths = self.dataset.episodes.length
        return sum(expected_bytes(specs, lengths[list(job.episodes)]) for job in jobs)

    def _announce(self, waiting: Sequence[PartJob], jobs: Sequence[PartJob]) -> None:
        if len(waiting) < len(jobs):
            self.events.say(f"{self.stage.name}: {len(jobs) - len(waiting)} of {len(jobs)} parts are done")
        self.events.begin(
            f"precompute {self.stage.name}", sum(len(job.episodes) for job in waiting), "episodes"
        )

    def _finish(
        self, prepared: Prepared, specs: Sequence[ArraySpec], jobs: Sequence[PartJob]
    ) -> dict[str, Any]:
        receipts = [_read_json(receipt_path(job)) for job in jobs]
        index = _index_rows(jobs, receipts, specs)
        contract = Contract(
            stage=self.stage.name,
            variant=self.variant,
            stage_version=self.stage.version,
            source=contents_digest(self.contents),
            fps=self.dataset.fps,
            params=self.terms["params"],
            pixels=self.pixels,
            **prepared.contract,
        )
        done = {
            "dpipe": 1,
            "contract": contract.to_json(),
            "arrays": [spec.to_json() for spec in specs],
            "prepared": prepared_digest(prepared),
            "dataset": self.dataset.name,
            "episodes": len(self.dataset),
            "frames": self.dataset.total_frames,
            "bytes": sum(receipt["bytes"] for receipt in receipts),
            "parts": [
                {"part": job.part, "key": job.key, "rows": receipt["rows"]}
                for job, receipt in zip(jobs, receipts, strict=True)
            ],
        }
        path = self.folder / "contract.json"
        if (
            path.is_file()
            and _read_json(path) == plain(done)
            and (self.folder / "episodes.parquet").is_file()
        ):
            return done
        _sync_file_system(self.folder)
        if self.stage.report is not None:
            self.events.say(f"{self.stage.name}: making its report")
            reader = _DiskReader(self.folder, index)
            facts = self.stage.report(self.params, self.view, prepared, reader, self.folder)
            write_json(self.folder / "report.json", plain(facts))
        _write_index(self.folder / "episodes.parquet", index)
        write_json(path, plain(done))
        _remove_unused(self.folder, specs, jobs)
        return done


def target_parts(
    dataset: Dataset, stage_name: str, params: Mapping[str, Any], base: Path, name: str = ""
) -> tuple[Path, list[int]]:
    """(folder, parts still to be made) of a target as it stands; nothing is written."""
    stage = load_stage(stage_name)
    run = _TargetRun(
        dataset, stage, build_params(stage, params), base, name, False, None, Progress(quiet=True)
    )
    run.refuse_other_terms()
    path = run.folder / "prepared.json"
    saved = _read_json(path) if path.is_file() else {"fitted_on": []}
    if not set(saved["fitted_on"]) & set(run.contents):
        return run.folder, list(range(len(dataset.parts())))
    prepared = _load_prepared(run.folder, saved)
    specs = stage.makes(run.params, run.view.info, prepared)
    return run.folder, [job.part for job in run.jobs(prepared) if not run.is_done(job, specs)]


def make_part(job: PartJob) -> dict[str, Any]:
    """Make one part: every array, then its receipt. Runs in a worker; leaves nothing half-named behind."""
    view, stage, run, specs, wishes = _opened(job)
    lengths = view.dataset.episodes.length
    durable = expected_bytes(specs, lengths[list(job.episodes)]) >= DURABLE_BYTES
    paths = {spec.name: array_path(job.folder, spec, job.part, job.key) for spec in specs}
    writers = {spec.name: ArrayWriter(paths[spec.name], spec, job.level, durable) for spec in specs}
    sink = _Sink(writers) if durable else _Direct(writers)
    episodes: list[dict[str, Any]] = []
    mine = [e for e, content in zip(job.episodes, job.contents, strict=True) if content not in job.copies]
    try:
        view.ahead = _decode_ahead(view, wishes, mine)
        for span in _spans(job, stage.pointwise(job.params)):
            stretch = DiskEpisode(view, span)
            contents = job.contents[span.start - job.episodes[0] : span.stop - job.episodes[0]]
            rows = {spec.name: 0 for spec in specs}
            for block in _copied(job, contents[0]) if contents[0] in job.copies else run(stretch):
                for name, values in block.items():
                    sink.put(name, values)
                    rows[name] += len(values)
            _check_rows(stage, specs, rows, stretch)
            for position, content in zip(span, contents, strict=True):
                frames = int(lengths[position])
                # Rows of a stretch belong to its episodes frame by frame, or it would not be pointwise.
                counts = {spec.axis: rows[spec.name] if len(span) == 1 else frames for spec in specs}
                episodes.append({"content": content, "frames": frames, "rows": counts})
        sink.finish()
        for spec in specs:
            if paths[spec.name].exists():  # left by a run that was killed before its receipt
                shutil.rmtree(paths[spec.name])
            writers[spec.name].close()
    except BaseException:
        with contextlib.suppress(BaseException):
            sink.finish()
        for writer in writers.values():
            writer.abort()
        raise
    finally:
        for ahead in view.ahead.values():
            ahead.close()
        view.ahead = {}
    rows = {spec.axis: writers[spec.name].rows for spec in specs}
    size = sum(spec.row_bytes * rows[spec.axis] for spec in specs)
    receipt = {
        "part": job.part,
        "key": job.key,
        "rows": rows,
        "bytes": size,
        "durable": durable,
        "digests": {name: writer.digest for name, writer in writers.items()},
        "episodes": episodes,
    }
    path = receipt_path(job)
    if durable:
        write_json(path, receipt, indent=None)
    else:
        temporary = temporary_name(path)
        temporary.write_text(json.dumps(receipt) + "\n")
        temporary.replace(path)
    return {"receipt": receipt, "computed": len(mine), "copied": len(episodes) - len(mine), "bytes": size}


def _spans(job: PartJob, pointwise: bool) -> Iterator[range]:
    """Episodes to work on one by one; runs of new ones together where a row depends on its frame alone."""
    start = job.episodes[0]
    while start < job.episodes[0] + len(job.episodes):
        stop = start + 1
        if pointwise and job.contents[start - job.episodes[0]] not in job.copies:
            end = job.episodes[0] + len(job.episodes)
            while stop < end and job.contents[stop - job.episodes[0]] not in job.copies:
                stop += 1
        yield range(start, stop)
        start = stop


def _copied(job: PartJob, content: str) -> Iterator[dict[str, NDArray[Any]]]:
    """An episode's rows from an older part of the same target."""
    for name, (place, start, rows) in job.copies[content].items():
        old = open_array(job.folder / place)
        for first in range(start, start + rows, COPIED_ROWS):
            yield {name: np.asarray(old[first : min(first + COPIED_ROWS, start + rows)])}


def _decode_ahead(
    view: DiskDataset, wishes: Sequence[FrameWish], episodes: Sequence[int]
) -> dict[str, _DecodedAhead]:
    ahead = {}
    for wish in wishes:
        wanted: list[Wanted] = []
        for e in episodes:
            rows = np.arange(0, int(view.dataset.episodes.length[e]), wish.every)
            cuts = range(0, len(rows), wish.block)
            wanted += [(e, wish.camera, rows[i : i + wish.block], wish.size) for i in cuts]
        ahead[wish.camera] = _DecodedAhead(view, wanted)
    return ahead


def expected_bytes(specs: Sequence[ArraySpec], lengths: NDArray[np.int64]) -> int:
    """Of arrays whose rows follow from the number of frames; ragged ones are not foreseen."""
    return sum(int((-(-lengths // spec.every)).sum()) * spec.row_bytes for spec in specs if spec.every)


def _check_rows(
    stage: Stage, specs: Sequence[ArraySpec], rows: Mapping[str, int], episode: EpisodeView
) -> None:
    """Arrays of one axis have the same rows, and as many as their spec says: else frames and targets part."""
    for spec in specs:
        axis = next(rows[other.name] for other in specs if other.axis == spec.axis)
        expected = spec.rows(episode.frames) if spec.every else axis
        if rows[spec.name] != expected:
            raise AssertionError(
                f"stage {stage.name} made {rows[spec.name]} rows of {spec.name} for episode {episode.index} "
                f"of {episode.frames} frames, not {expected}"
            )


Opened = tuple[DiskDataset, Stage, Run, tuple[ArraySpec, ...], tuple[FrameWish, ...]]
_OPEN: dict[tuple[Path, str], Opened] = {}


def _opened(job: PartJob) -> Opened:
    """The dataset and the stage's model, opened once per worker and target."""
    name = (job.root, job.terms)
    if name not in _OPEN:
        _OPEN.clear()
        stage = load_stage(job.stage)
        view = DiskDataset(open_dataset(job.root))
        prepared = _load_prepared(job.folder, _read_json(job.folder / "prepared.json"))
        run = stage.open(job.params, view.info, prepared)
        told = (job.params, view.info, prepared)
        _OPEN[name] = (view, stage, run, stage.makes(*told), stage.wishes(*told))
    return _OPEN[name]


def _with_copies(job: PartJob, copies: Mapping[str, Any], level: int | None) -> PartJob:
    return PartJob(**{**job.__dict__, "copies": copies, "level": level})


def _failed(stage: str, job: PartJob, failure: Failure) -> Exception:
    if isinstance(failure.error, OSError) and failure.error.errno in FULL:
        return DataError(full_disk(job.folder))
    if failure.error is not None:
        return failure.error if isinstance(failure.error, Exception) else RuntimeError(failure.message)
    return DataError(
        f"precompute {stage}: part {job.part} (episodes {job.episodes[0]} to {job.episodes[-1]}) failed\n"
        f"  {failure.message}\n  Finished parts are kept: run the same command again once it is mended."
    )


# --- files of a target --------------------------------------------------------------------------------------


def array_path(folder: Path, spec: ArraySpec, part: int, key: str) -> Path:
    return folder / spec.name / f"part-{part:05d}-{key}"


def receipt_path(job: PartJob) -> Path:
    return job.folder / "parts" / f"part-{job.part:05d}-{job.key}.json"


def prepared_digest(prepared: Prepared) -> str:
    digest = hashlib.sha256(canonical_json([prepared.facts, prepared.contract]).encode())
    for name, values in sorted(prepared.arrays.items()):
        digest.update(name.encode())
        digest.update(str(values.dtype).encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:32]


def _load_prepared(folder: Path, saved: Mapping[str, Any]) -> Prepared:
    arrays = {name: np.load(folder / "prepared" / f"{name}.npy") for name in saved["arrays"]}
    return Prepared(saved["facts"], arrays, saved["contract"])


def _index_rows(
    jobs: Sequence[PartJob], receipts: Sequence[Mapping[str, Any]], specs: Sequence[ArraySpec]
) -> dict[str, list[Any]]:
    """The columns of episodes.parquet: one row per episode, start and rows along every axis."""
    axes = sorted({spec.axis for spec in specs} | {"frame"})
    names = ["content", "episode_index", "part", "key", "frames"]
    columns: dict[str, list[Any]] = {name: [] for name in names}
    columns |= {f"{axis}_{what}": [] for axis in axes for what in ("start", "rows")}
    for job, receipt in zip(jobs, receipts, strict=True):
        at = dict.fromkeys(axes, 0)
        for position, entry in zip(job.episodes, receipt["episodes"], strict=True):
            columns["content"].append(entry["content"])
            columns["episode_index"].append(position)
            columns["part"].append(job.part)
            columns["key"].append(job.key)
            columns["frames"].append(entry["frames"])
            for axis in axes:
                rows = entry["rows"].get(axis, entry["frames"])
                columns[f"{axis}_start"].append(at[axis])
                columns[f"{axis}_rows"].append(rows)
                at[axis] += rows
    return columns


def _write_index(path: Path, columns: Mapping[str, list[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(dict(columns)), sink, compression="zstd")
    write_file(path, sink.getvalue().to_pybytes())


def read_index(folder: Path) -> dict[str, list[Any]]:
    """A finished target's index by column; {} where there is none yet."""
    path = folder / "episodes.parquet"
    if not path.is_file():
        return {}
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read().to_pydict()


@dataclass
class _DiskReader:
    """A `TargetReader` over the arrays as the index places them."""

    folder: Path
    index: Mapping[str, list[Any]]

    def read(self, position: int, array: str) -> NDArray[Any]:
        place = self.folder / array / f"part-{self.index['part'][position]:05d}-{self.index['key'][position]}"
        axis = _read_json(place / "zarr.json")["dimension_names"][0]
        start, rows = self.index[f"{axis}_start"][position], self.index[f"{axis}_rows"][position]
        return open_array(place)[start : start + rows]


def _finished_keys(folder: Path) -> set[str]:
    """Keys of the parts a finished target names: what they hold has been synced."""
    path = folder / "contract.json"
    return {part["key"] for part in _read_json(path)["parts"]} if path.is_file() else set()


def _sync_file_system(folder: Path) -> None:
    """Make every file below a folder durable at once: one call where many small syncs would queue."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) == 0:
            return
    except AttributeError:  # not Linux
        pass
    finally:
        os.close(descriptor)
    for path in sorted(folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_unused(folder: Path, specs: Sequence[ArraySpec], jobs: Sequence[PartJob]) -> None:
    """Delete parts no index names any more: the older form of parts that were made anew."""
    keep = {f"part-{job.part:05d}-{job.key}" for job in jobs}
    for spec in specs:
        for path in sorted((folder / spec.name).glob("part-*")):
            if path.name not in keep:
                shutil.rmtree(path)
    for path in sorted((folder / "parts").glob("part-*.json")):
        if path.stem not in keep:
            path.unlink()


def _remove_half_arrays(folder: Path) -> None:
    for path in sorted(folder.glob("*/.part-*.tmp")):
        shutil.rmtree(path, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
