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

import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..schemas.contract import ArraySpec, Contract, canonical_json, digest_of, plain
from ..schemas.errors import DataError, UsageError
from ..stages import (
    Prepared,
    Stage,
    build_params,
    load_stage,
)
from ..streams.arrays import open_array, write_group
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
from .stage_view import DiskDataset
from .target_parts import (
    PartJob,
    array_path,
    cut_parts,
    expected_bytes,
    load_prepared,
    make_part,
    read_json,
    receipt_path,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

TARGETS = Path("dpipe") / "targets"


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
    if dataset.renaming:
        events.say(f"{dataset.name}: {dataset.renaming}")
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
            read_json(self.folder / "report.json") if (self.folder / "report.json").is_file() else {},
        )

    def refuse_other_terms(self) -> None:
        """A target of this name made with other options stays what it is."""
        path = self.folder / "prepared.json"
        if not path.is_file():
            return
        found = read_json(path)["terms"]
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
            saved = read_json(path)
            if set(saved["fitted_on"]) & set(self.contents):
                return load_prepared(self.folder, saved)
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
        return load_prepared(self.folder, read_json(path))

    def jobs(self, prepared: Prepared) -> list[PartJob]:
        self.pixels = pixel_identity(self.dataset, str(prepared.contract.get("camera", "")))
        settled = prepared_digest(prepared)
        terms = digest_of([str(self.folder), self.terms, settled, contents_digest(self.contents)])
        jobs = []
        for part, episodes in enumerate(cut_parts(self.dataset, self.stage.pointwise(self.params))):
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
        found = read_json(path)
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
        receipts = [read_json(receipt_path(job)) for job in jobs]
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
            **({"renamed": self.dataset.stored} if self.dataset.stored else {}),
            "episodes": len(self.dataset),
            "frames": self.dataset.total_frames,
            "bytes": sum(receipt["bytes"] for receipt in receipts),
            "parts": [
                {"part": job.part, "key": job.key, "rows": receipt["rows"]}
                for job, receipt in zip(jobs, receipts, strict=True)
            ],
        }
        path = self.folder / "contract.json"
        if path.is_file() and read_json(path) == plain(done) and (self.folder / "episodes.parquet").is_file():
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


def waiting_episodes(
    dataset: Dataset, stage_name: str, params: Mapping[str, Any], base: Path, name: str = ""
) -> tuple[Path, list[range]]:
    """(folder, episodes of the parts still to be made) of a target as it stands; nothing is written."""
    stage = load_stage(stage_name)
    run = _TargetRun(
        dataset, stage, build_params(stage, params), base, name, False, None, Progress(quiet=True)
    )
    run.refuse_other_terms()
    path = run.folder / "prepared.json"
    saved = read_json(path) if path.is_file() else {"fitted_on": []}
    if not set(saved["fitted_on"]) & set(run.contents):
        return run.folder, cut_parts(dataset, stage.pointwise(run.params))
    prepared = load_prepared(run.folder, saved)
    specs = stage.makes(run.params, run.view.info, prepared)
    waiting = [job.episodes for job in run.jobs(prepared) if not run.is_done(job, specs)]
    return run.folder, [range(episodes[0], episodes[-1] + 1) for episodes in waiting]


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


def prepared_digest(prepared: Prepared) -> str:
    digest = hashlib.sha256(canonical_json([prepared.facts, prepared.contract]).encode())
    for name, values in sorted(prepared.arrays.items()):
        digest.update(name.encode())
        digest.update(str(values.dtype).encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:32]


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
        axis = read_json(place / "zarr.json")["dimension_names"][0]
        start, rows = self.index[f"{axis}_start"][position], self.index[f"{axis}_rows"][position]
        return open_array(place)[start : start + rows]


def _finished_keys(folder: Path) -> set[str]:
    """Keys of the parts a finished target names: what they hold has been synced."""
    path = folder / "contract.json"
    return {part["key"] for part in read_json(path)["parts"]} if path.is_file() else set()


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
