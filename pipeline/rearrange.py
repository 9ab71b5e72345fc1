"""Datasets made from finished datasets: merge, split, select. Video is copied packet by packet, never decoded.

    merge A B --out C         every episode of both, where conventions, features and fps agree
    split A                   a dataset a split, or by shares
    select A --where ...      the episodes that meet a condition

What an episode is stays what it was: rows bit for bit, packets, split, words, segments, the recording it came
from. So targets computed before still fit: they are bound by content (`streams/targets.py`). Numbers (index,
episode_index, task_index) and statistics are made anew. Episodes of one split stay together, `train` first, in
the order given, because LeRobot's info.json knows a split as one range.

The new dataset is built under a temporary name and renamed when whole.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..schemas.episode import Dropped
from ..schemas.errors import DataError, UsageError
from ..schemas.features import CAMERA_PREFIX, DEFAULT_FEATURES
from ..streams.dataset import Dataset, column_values, contents_digest, open_dataset
from .durable import exclusive, move_file, require_space
from .facts import read_dropped
from .finish import STATISTICS_UP_TO
from .outputs import sync_tree
from .progress import Progress
from .rearrange_parts import Plan, Written, write_rows, write_sidecar, write_video
from .statistics import (
    arange_statistics,
    dataset_statistics,
    histogram_statistics,
    weighted_statistics,
)
from .tables import (
    CHUNK_FILES,
    DATA_PATH,
    EPISODES_PATH,
    EPISODES_PER_FILE,
    STATISTICS,
    VIDEO_PATH,
    data_file,
    part_place,
    read_columns,
    write_parquet,
    write_tasks,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

# More than they need of the processor: they wait for the disk and for the kernel's copies.
FILES_AT_A_TIME = 4

Pictures = dict[str, tuple["NDArray[np.int64]", "NDArray[np.int64]"]]
"""By camera: grey levels [n, 768] and counted frames [n] of every episode."""


@dataclass(frozen=True)
class Made:
    root: Path
    episodes: int
    frames: int
    bytes: int


# --- the three commands ---------------------------------------------------------------------------------------


def merge(roots: Sequence[Path], out: Path, name: str = "", progress: Progress | None = None) -> Made:
    """One dataset of all episodes of several that agree in everything a number's meaning depends on."""
    if len(roots) < 2:
        raise UsageError("merge takes two datasets or more:  dpipe merge A B --out C")
    datasets = [open_dataset(root, as_stored=True) for root in roots]
    refuse_differences(datasets)
    pieces = [(d, e) for d, dataset in enumerate(datasets) for e in range(len(dataset))]
    recipe = {"command": "merge", "datasets": [d.name for d in datasets]}
    return _write(datasets, pieces, out, name or out.name, recipe, progress)


def select(
    root: Path,
    episodes: Sequence[int],
    out: Path,
    name: str = "",
    recipe: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    split: str = "",
) -> Made:
    """The episodes given, in their order; all of `split` where one is named, else of their own."""
    dataset = open_dataset(root, as_stored=True)
    pieces = [(0, int(e)) for e in episodes]
    told = {"command": "select", "datasets": [dataset.name], **(recipe or {})}
    return _write([dataset], pieces, out, name or out.name, told, progress, split)


def split_by_name(dataset: Dataset) -> dict[str, list[int]]:
    """Episodes of each split, in order."""
    found: dict[str, list[int]] = {}
    for episode, split in enumerate(splits_of(dataset)):
        found.setdefault(split or "rest", []).append(episode)
    return found


def split_by_shares(dataset: Dataset, shares: Mapping[str, float]) -> dict[str, list[int]]:
    """Episodes by shares of 1, by their content: one recording falls on the same side in whatever dataset it lies.

    Hence shares hold on average; the last takes what rounding leaves.
    """
    total = sum(shares.values())
    if not shares or min(shares.values()) <= 0 or abs(total - 1) > 1e-9:
        raise UsageError(f"shares are above 0 and add up to 1, not {', '.join(map(str, shares.values()))}")
    bounds = np.cumsum(list(shares.values()))
    place = [int(content[:16], 16) / 2**64 for content in dataset.contents()]
    side = np.minimum(np.searchsorted(bounds, place, side="right"), len(bounds) - 1)
    return {name: np.flatnonzero(side == i).tolist() for i, name in enumerate(shares)}


def splits_of(dataset: Dataset) -> list[str]:
    """The split of every episode: its own column, else the ranges of info.json, else ""."""
    column = dataset.episodes.text.column("split")
    if column is not None:
        return [split or "" for split in column.to_pylist()]
    found = [""] * len(dataset)
    for split, (first, stop) in dataset.splits.items():
        found[first:stop] = [split] * (stop - first)
    return found


# --- what must agree ------------------------------------------------------------------------------------------


def refuse_differences(datasets: Sequence[Dataset]) -> None:
    """UsageError naming every field in which a dataset differs from the first."""
    told = [meaning(dataset) for dataset in datasets]
    lines = []
    for dataset, other in zip(datasets[1:], told[1:], strict=True):
        for name in dict.fromkeys([*told[0], *other]):
            a, b = told[0].get(name), other.get(name)
            if a != b:
                lines.append(f"    {name}: {_shown(a)} in {datasets[0].name}, {_shown(b)} in {dataset.name}")
    if lines:
        more = [f"    and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise UsageError(
            "these datasets do not mean the same by their numbers:\n" + "\n".join([*lines[:20], *more]) + "\n"
            "  next: convert them alike, or train on both with --mix unified"
        )


def meaning(dataset: Dataset) -> dict[str, Any]:
    """What two datasets must share to be one, flat, by names a person can look up."""
    manifest = dataset.own_manifest
    told: dict[str, Any] = {
        "written by": "dpipe" if manifest else "another tool: its conventions are not told",
        "fps": dataset.fps,
        "robot_type": dataset.info.get("robot_type"),
    }
    for name, feature in dataset.features.items():
        told[f"features.{name}.dtype"] = feature["dtype"]
        told[f"features.{name}.shape"] = list(feature["shape"])
        if name not in dataset.cameras:
            told[f"features.{name}.names"] = feature.get("names")
    if manifest is None:
        return told
    for kind in ("features", "sidecar"):
        for name, feature in manifest["embodiment"][kind].items():
            for entry in ("dtype", "names", "unit", "frame"):
                told[f"{kind}.{name}.{entry}"] = feature.get(entry)
    told |= {f"conventions.{name}": value for name, value in manifest["conventions"].items()}
    return told | {"licence": manifest["licence"]}


def _shown(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


# --- writing --------------------------------------------------------------------------------------------------


def _write(
    datasets: Sequence[Dataset],
    pieces: Sequence[tuple[int, int]],
    out: Path,
    name: str,
    recipe: Mapping[str, Any],
    progress: Progress | None,
    split: str = "",
) -> Made:
    progress = progress or Progress(quiet=True)
    if not pieces:
        raise UsageError("no episode is left to write")
    if out.exists():
        raise UsageError(
            f"{out} is there already\n  next: choose another place with --out, or remove it yourself"
        )
    for dataset in datasets:
        if out.resolve().is_relative_to(dataset.root.resolve()):
            raise UsageError(f"{out} lies inside {dataset.root}\n  next: choose another place with --out")
    plan = _plan(datasets, pieces, split)
    require_space(out, int(_needed_bytes(plan, out)), f"writing {len(pieces)} episodes")
    partial = out.with_name(f".{out.name}.partial")
    with exclusive(partial, f"dpipe {recipe['command']}"):
        tree = partial / "tree"
        shutil.rmtree(tree, ignore_errors=True)  # of a run that was stopped
        tree.mkdir()
        files = (int(plan.part[-1]) + 1) * (1 + len(plan.videos) + (plan.ours and bool(plan.first.sidecar)))
        progress.begin(recipe["command"], files, "files")
        pictures = _pictures(plan)
        with ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
            try:
                rows, others = _begin_files(pool, tree, plan)
                written = [_finished(future, progress) for future in rows]
                _write_meta(tree, plan, written, pictures)  # while video is copied
                for future in others:
                    _finished(future, progress)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        progress.end()
        folders = [tree / "data", tree / "videos", tree / "dpipe" / "columns"]
        size = sum(p.stat().st_size for folder in folders for p in folder.rglob("*") if p.is_file())
        if plan.ours:
            _write_own(tree, plan, name, recipe, size, pictures)
        sync_tree(tree)
        move_file(tree, out)
    shutil.rmtree(partial, ignore_errors=True)
    return Made(out, len(plan.length), int(plan.length.sum()), size)


def _begin_files(
    pool: ThreadPoolExecutor, tree: Path, plan: Plan
) -> tuple[list[Future[Written]], list[Future[None]]]:
    """Every file of every part, which know nothing of one another: those of rows, and the others.

    Rows first: statistics and tables, which wait for all of them, are then made while the disk takes the video.
    """
    parts = plan.parts()
    rows = [pool.submit(write_rows, tree, plan, *part) for part in parts]
    others = [pool.submit(write_video, tree, plan, *part, camera) for part in parts for camera in plan.videos]
    if plan.ours and plan.first.sidecar:
        others += [pool.submit(write_sidecar, tree, plan, *part) for part in parts]
    return rows, others


def _finished(future: Future[Any], progress: Progress) -> Any:
    result = future.result()
    progress.advance()
    return result


def _plan(datasets: Sequence[Dataset], pieces: Sequence[tuple[int, int]], split: str) -> Plan:
    splits = [splits_of(dataset) for dataset in datasets]
    named = [split or splits[d][e] for d, e in pieces]
    # Train first, others as they are met, episodes of no split last.
    order = dict.fromkeys([s for s in ("train",) if s in named] + [s for s in named if s] + [""])
    rank = {split: i for i, split in enumerate(order)}
    chosen = sorted(range(len(pieces)), key=lambda i: rank[named[i]])
    owner = np.array([pieces[i][0] for i in chosen], np.int64)
    episode = np.array([pieces[i][1] for i in chosen], np.int64)
    lengths = [dataset.episodes.length for dataset in datasets]
    length = np.array([lengths[d][e] for d, e in zip(owner, episode, strict=True)], np.int64)
    texts = [_task_texts(dataset) for dataset in datasets]
    of_episode = [texts[d][e] for d, e in zip(owner.tolist(), episode.tolist(), strict=True)]
    # Sentences in the order in which episodes first use them, as a conversion numbers them.
    tasks = list(dict.fromkeys(text for own in of_episode for text in own))
    number = {task: i for i, task in enumerate(tasks)}
    renumber = [np.array([number.get(t, -1) for t in d.tasks] or [0], np.int64) for d in datasets]
    first_task = np.array([number[own[0]] if own else 0 for own in of_episode], np.int64)
    return Plan(datasets, owner, episode, [named[i] for i in chosen], length, tasks, renumber, first_task)


def _task_texts(dataset: Dataset) -> list[list[str]]:
    column = dataset.episodes.text.column("tasks")
    if column is None:
        raise DataError(
            f"{dataset.root}: meta/episodes has no column 'tasks'\n  next: dpipe doctor {dataset.root}"
        )
    return [list(texts or []) for texts in column.to_pylist()]


def _needed_bytes(plan: Plan, out: Path) -> float:
    """Of each source the share of the episodes taken from it, but for videos that are shared with it."""
    there = next(folder for folder in out.resolve().parents if folder.exists())
    shared = np.isin(plan.part, list(plan.whole))
    needed = 0.0
    for d, dataset in enumerate(plan.datasets):
        linked = shared & (dataset.root.stat().st_dev == there.stat().st_dev)
        share = np.count_nonzero((plan.owner == d) & ~linked) / max(1, len(dataset))
        needed += share * _payload_bytes(dataset)
    return needed


def _payload_bytes(dataset: Dataset) -> int:
    told = ((dataset.manifest or {}).get("totals") or {}).get("bytes")
    if told is not None:
        return int(told)
    files = [*dataset.root.glob("data/*/*.parquet"), *dataset.root.glob("videos/**/*.mp4")]
    return sum(path.stat().st_size for path in files)


# --- metadata -------------------------------------------------------------------------------------------------


def _write_meta(tree: Path, plan: Plan, written: Sequence[Written], pictures: Pictures) -> None:
    odd_tasks = {row: told for each in written for row, told in each.odd_tasks.items()}
    write_tasks(tree / "meta" / "tasks.parquet", plan.tasks, sync=False)
    table = _episodes_table(plan, odd_tasks)
    for index, first in enumerate(range(0, len(table), EPISODES_PER_FILE)):
        piece = table.slice(first, EPISODES_PER_FILE)
        path = tree / EPISODES_PATH.format(chunk_index=0, file_index=index)
        write_parquet(path, [piece], piece.schema, sync=False)
    told = _statistics(tree, plan, table, written, pictures)
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(each)}" for name, each in told.items())
    (tree / "meta" / "stats.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    info = dict(plan.first.info)
    info |= {
        "total_episodes": len(plan.length),
        "total_frames": int(plan.length.sum()),
        "total_tasks": len(plan.tasks),
        "chunks_size": CHUNK_FILES,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if plan.videos else None,
        "splits": _ranges(plan.split),
    }
    _write_json(tree / "meta" / "info.json", info, indent=4)


def _write_json(path: Path, value: Any, indent: int = 1) -> None:
    """Without waiting for the disk: the whole tree is synced before it gets its name."""
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def _ranges(splits: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for split in dict.fromkeys(s for s in splits if s):
        first = splits.index(split)
        found[split] = f"{first}:{first + splits.count(split)}"
    return found


def _episodes_table(plan: Plan, odd_tasks: Mapping[int, Mapping[str, Any]]) -> pa.Table:
    """meta/episodes: what sources say of an episode, under its new number and at its new place."""
    import pyarrow as pa

    n = len(plan.length)
    chunk, file = zip(*(part_place(int(p)) for p in plan.part), strict=True)
    places = {
        "episode_index": pa.array(np.arange(n)),
        "tasks": None,
        "length": pa.array(plan.length),
        "data/chunk_index": pa.array(chunk, pa.int64()),
        "data/file_index": pa.array(file, pa.int64()),
        "dataset_from_index": pa.array(plan.start),
        "dataset_to_index": pa.array(plan.start + plan.length),
    }
    first_frame = _first_frames(plan)
    for camera in plan.videos:
        prefix, fps = f"videos/{camera}", plan.first.fps
        places[f"{prefix}/chunk_index"] = places["data/chunk_index"]
        places[f"{prefix}/file_index"] = places["data/file_index"]
        places[f"{prefix}/from_timestamp"] = pa.array(first_frame / fps)
        places[f"{prefix}/to_timestamp"] = pa.array((first_frame + plan.length) / fps)
    ends = {
        "meta/episodes/chunk_index": pa.array(np.zeros(n, np.int64)),
        "meta/episodes/file_index": pa.array(np.arange(n) // EPISODES_PER_FILE),
    }
    kept = _kept_columns(plan, {*places, *ends} - {"tasks"})
    counted = {name.split("/")[1] for name in kept.column_names if name.startswith("stats/")}
    if n > STATISTICS_UP_TO:
        kept = kept.select([name for name in kept.column_names if not name.startswith("stats/")])
        counted = set()
    columns: dict[str, Any] = {name: values for name, values in places.items() if values is not None}
    columns["tasks"] = kept.column("tasks")
    own = _recounted(plan, counted, odd_tasks)
    for name in kept.column_names:
        if name not in ("tasks", "split", "source_id"):
            columns[name] = own.get(name, kept.column(name))
    columns |= ends
    if "split" in kept.column_names:
        columns["split"] = pa.array(plan.split, pa.string())
    if "source_id" in kept.column_names:
        columns["source_id"] = pa.array(source_ids(plan), pa.string())
    order = ["episode_index", "tasks", *[name for name in columns if name not in ("episode_index", "tasks")]]
    return pa.table({name: columns[name] for name in order})


def _first_frames(plan: Plan) -> NDArray[np.int64]:
    """[n] first frame of each episode inside its part's video."""
    new = np.diff(plan.part, prepend=-1) != 0
    base = np.maximum.accumulate(np.where(new, plan.start, 0))
    return plan.start - base


def _kept_columns(plan: Plan, replaced: set[str]) -> pa.Table:
    """Columns of meta/episodes that every source has and that still hold, by the new order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = [sorted((d.root / "meta" / "episodes").glob("*/*.parquet")) for d in plan.datasets]
    schemas = [pq.read_schema(path).names for own in files for path in own]
    shared = set.intersection(*map(set, schemas)) - replaced
    names = [name for name in schemas[0] if name in shared]
    names = [name for name in names if not name.startswith("videos/")]
    tables = []
    for d, own in enumerate(files):
        table = pa.concat_tables([read_columns(path, names) for path in own], promote_options="permissive")
        tables.append(table.replace_schema_metadata(None).take(pa.array(plan.episode[plan.owner == d])))
    merged = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    # Taken by dataset; back into the order of the plan.
    return merged.take(pa.array(np.argsort(np.argsort(plan.owner, kind="stable"), kind="stable")))


def _recounted(
    plan: Plan, counted: set[str], odd_tasks: Mapping[int, Mapping[str, Any]]
) -> dict[str, pa.Array]:
    """stats/ columns of an episode's global numbers, in closed form."""
    import pyarrow as pa

    n = plan.length.astype(np.float64)
    numbers = plan.first_task.astype(np.float64)
    spans = {
        "index": (plan.start.astype(np.float64), n - 1),
        "episode_index": (np.arange(len(n), dtype=np.float64), np.zeros(len(n))),
        "task_index": (numbers, np.zeros(len(n))),
    }
    result: dict[str, pa.Array] = {}
    for name, (low, span) in spans.items():
        if name not in counted:
            continue
        values = {
            "min": low,
            "max": low + span,
            "mean": low + span / 2,
            "std": np.sqrt((n * n - 1) / 12) if name == "index" else np.zeros(len(n)),
            "count": plan.length,
            **{q: low + share * span for q, share in _SHARES.items()},
        }
        for statistic in STATISTICS:
            column = np.array(values[statistic])
            if name == "task_index":
                for row, own in odd_tasks.items():
                    column[row] = own[statistic][0]
            offsets = pa.array(np.arange(len(n) + 1, dtype=np.int32))
            result[f"stats/{name}/{statistic}"] = pa.ListArray.from_arrays(offsets, pa.array(column))
    return result


_SHARES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def source_ids(plan: Plan) -> list[str]:
    """Where each episode came from; where two datasets name one alike, the dataset's name goes before it."""
    named = [_source_ids(dataset) for dataset in plan.datasets]
    own = [named[d][e] for d, e in zip(plan.owner.tolist(), plan.episode.tolist(), strict=True)]
    seen = Counter(own)
    result = []
    for d, name in zip(plan.owner, own, strict=True):
        result.append(f"{plan.datasets[d].name}:{name}" if seen[name] > 1 else name)
    twice = {}
    for i, name in enumerate(result):
        twice[name] = twice.get(name, 0) + 1
        if twice[name] > 1:  # a dataset merged with itself
            result[i] = f"{name} ({twice[name]})"
    return result


def _source_ids(dataset: Dataset) -> list[str]:
    column = dataset.episodes.text.column("source_id")
    return [""] * len(dataset) if column is None else [name or "" for name in column.to_pylist()]


# --- statistics -----------------------------------------------------------------------------------------------


def _statistics(
    tree: Path, plan: Plan, episodes: pa.Table, written: Sequence[Written], pictures: Pictures
) -> dict[str, Any]:
    """meta/stats.json: exact over every row of the new dataset; pictures by what was counted before."""
    files = [tree / data_file(part) for part in range(int(plan.part[-1]) + 1)]

    def blocks(name: str) -> Iterator[NDArray[Any]]:
        if name in plan.counted:
            yield from (each.values[name] for each in written)
            return
        for path in files:
            column = read_columns(path, [name]).column(name)
            yield column_values(column, plan.first.features[name], f"'{name}' in {path}")

    result: dict[str, Any] = {}
    for camera in plan.first.cameras:
        found = _picture_statistics(plan, camera, episodes, pictures)
        if found is not None:
            result[camera] = found
    with ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
        vectors = plan.first.vectors
        exact = pool.map(lambda name: dataset_statistics(lambda: blocks(name)), vectors)
        result.update(zip(vectors, exact, strict=True))
    longest = int(plan.length.max())
    longer = np.cumsum(np.bincount(plan.length, minlength=longest + 1)[::-1])[::-1][1:]
    steps = np.arange(longest, dtype=np.float64)
    stamps = (steps / plan.first.fps).astype(np.float32).astype(np.float64)
    own = {
        "timestamp": weighted_statistics(stamps, longer),
        "frame_index": weighted_statistics(steps, longer),
        "episode_index": weighted_statistics(np.arange(len(plan.length), dtype=np.float64), plan.length),
        "index": arange_statistics(0, int(plan.length.sum())),
        "task_index": dataset_statistics(lambda: blocks("task_index")),
    }
    return result | {name: own[name] for name in DEFAULT_FEATURES if name in plan.first.features}


def _picture_statistics(
    plan: Plan, camera: str, episodes: pa.Table, pictures: Pictures
) -> dict[str, Any] | None:
    """Of one camera: from grey levels counted at conversion; else from statistics of episodes, or of the sources.

    Statistics merge exactly but for the quantiles, which become weighted means; doctor allows for that.
    """
    if camera in pictures:
        levels, frames = pictures[camera]
        return histogram_statistics(levels.sum(axis=0).reshape(3, 256), int(frames.sum()))
    if f"stats/{camera}/mean" in episodes.column_names:
        each = {s: episodes.column(f"stats/{camera}/{s}").to_pylist() for s in STATISTICS}
        rows = [{s: each[s][i] for s in STATISTICS} for i in range(len(episodes))]
        return _merged(rows)
    told = [d.stats.get(camera) for d in plan.datasets]
    if any(not t or "mean" not in t for t in told):
        return None
    frames = [int(plan.length[plan.owner == d].sum()) for d in range(len(told))]
    rows = [dict(t or {}) | {"count": [f]} for t, f in zip(told, frames, strict=True)]
    return _merged(rows)


def _merged(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    weight = np.array([np.asarray(row["count"]).reshape(-1)[0] for row in rows], np.float64)
    share = (weight / weight.sum())[:, None]

    def stacked(name: str) -> NDArray[np.float64]:
        return np.stack([np.asarray(row[name], np.float64).reshape(-1) for row in rows])

    mean = (share * stacked("mean")).sum(axis=0)
    variance = (share * (stacked("std") ** 2 + (stacked("mean") - mean) ** 2)).sum(axis=0)
    found = {
        "min": stacked("min").min(axis=0),
        "max": stacked("max").max(axis=0),
        "mean": mean,
        "std": np.sqrt(variance),
    }
    found |= {q: (share * stacked(q)).sum(axis=0) for q in _SHARES if all(q in row for row in rows)}
    result: dict[str, Any] = {name: values.reshape(-1, 1, 1).tolist() for name, values in found.items()}
    result["count"] = [int(weight.sum())]
    return {name: result[name] for name in STATISTICS if name in result}


def _pictures(plan: Plan) -> Pictures:
    """Histograms of every episode of the plan, of cameras that all sources have counted."""
    found: Pictures = {}
    for camera in plan.videos:
        counted = [histograms(dataset, camera) for dataset in plan.datasets]
        first = next((each for each in counted if each is not None), None)
        if first is None or any(each is None for each in counted):
            continue
        levels = np.empty((len(plan.length), first[0].shape[1]), np.int64)
        frames = np.empty(len(plan.length), np.int64)
        for d, each in enumerate(counted):
            assert each is not None
            mine = plan.owner == d
            levels[mine], frames[mine] = each[0][plan.episode[mine]], each[1][plan.episode[mine]]
        found[camera] = levels, frames
    return found


def histograms(dataset: Dataset, camera: str) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Grey levels [E, 768] and counted frames [E] of every episode, as a conversion or an earlier merge kept them.

    None where they are not kept, or are of more episodes than may be held at once.
    """
    if len(dataset) > STATISTICS_UP_TO or dataset.manifest is None:
        return None
    key = camera.removeprefix(CAMERA_PREFIX)
    wanted = [f"histogram/{key}", f"counted/{key}"]
    table = _own_pictures(dataset, wanted) or _journal_pictures(dataset, wanted)
    if table is None or len(table) != len(dataset) or table.column(wanted[0]).null_count:
        return None
    flat = np.asarray(table.column(wanted[0]).combine_chunks().flatten()).astype(np.int64)
    if len(flat) != 768 * len(dataset):
        return None
    return flat.reshape(len(dataset), 768), np.asarray(table.column(wanted[1]).to_numpy()).astype(np.int64)


def _own_pictures(dataset: Dataset, wanted: Sequence[str]) -> pa.Table | None:
    """From dpipe/pictures.parquet, which a merged dataset has, in the order of its episodes."""
    import pyarrow.parquet as pq

    path = dataset.root / "dpipe" / "pictures.parquet"
    if not path.is_file() or not set(wanted) <= set(pq.read_schema(path).names):
        return None
    return read_columns(path, wanted)


def _journal_pictures(dataset: Dataset, wanted: Sequence[str]) -> pa.Table | None:
    """From the receipts of a conversion (`receipts.py`): found by source_id, kept by part and row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    journal = dataset.root / "dpipe" / "journal"
    receipts, files = journal / "receipts.parquet", sorted((journal / "statistics").glob("from-*.parquet"))
    sources = dataset.episodes.text.column("source_id")
    if not receipts.is_file() or not files or sources is None:
        return None
    if any(not set(wanted) <= set(pq.read_schema(path).names) for path in files):
        return None
    told = read_columns(receipts, ["source_id", "part", "row"]).to_pydict()
    place = {s: (p, r) for s, p, r in zip(told["source_id"], told["part"], told["row"], strict=True)}
    table = pa.concat_tables([read_columns(path, ["part", "row", *wanted]) for path in files])
    parts, rows = table.column("part").to_pylist(), table.column("row").to_pylist()
    at = {pair: i for i, pair in enumerate(zip(parts, rows, strict=True))}
    found = [at.get(place.get(source, (-1, -1)), -1) for source in sources.to_pylist()]
    return None if -1 in found else table.take(found)


# --- our own folder -------------------------------------------------------------------------------------------


def _write_own(
    tree: Path, plan: Plan, name: str, recipe: Mapping[str, Any], size: int, pictures: Pictures
) -> None:
    """dpipe/ of the new dataset: tables by the new numbers, the manifest with where it came from, last."""

    own = tree / "dpipe"
    contents = [d.contents() for d in plan.datasets]
    content = [contents[d][e] for d, e in zip(plan.owner, plan.episode, strict=True)]
    table = _own_episodes(plan, content)
    write_parquet(own / "episodes.parquet", [table], table.schema, sync=False)
    segments = _segments(plan)
    write_parquet(own / "segments.parquet", [segments], segments.schema, sync=False)
    if pictures and set(pictures) == set(plan.videos):
        counted = _pictures_table(plan, pictures)
        write_parquet(own / "pictures.parquet", [counted], counted.schema, sync=False)
    dropped = _dropped(plan)
    lines = "".join(json.dumps(d.to_json(), ensure_ascii=False) + "\n" for d in dropped)
    (own / "dropped.jsonl").write_text(lines, encoding="utf-8")
    manifests = [d.manifest or {} for d in plan.datasets]
    digest = contents_digest(content)
    first_frame = np.unique(plan.part, return_index=True)[1]
    counts = np.diff(np.append(first_frame, len(plan.part)))
    manifest = {
        **manifests[0],
        "name": name,
        "source": _joined([m["source"] for m in manifests]),
        "options": _common([m["options"] for m in manifests]),
        "video": _common([m["video"] for m in manifests]),
        "splits": _ranges(plan.split),
        "totals": {
            "episodes": len(plan.length),
            "frames": int(plan.length.sum()),
            "tasks": len(plan.tasks),
            "bytes": size,
        },
        "parts": [
            {
                "part": part,
                "first_episode": int(first),
                "episodes": int(count),
                "frames": int(plan.length[first : first + count].sum()),
            }
            for part, (first, count) in enumerate(zip(first_frame, counts, strict=True))
        ],
        "dropped": len(dropped),
        "warnings": list(dict.fromkeys(w for m in manifests for w in m["warnings"])),
        "made_from": {**recipe, "digests": [d.digest() for d in plan.datasets]},
        "state": digest,
    }
    from .card import dataset_card

    (tree / "README.md").write_text(dataset_card(manifest, plan.tasks, dropped), encoding="utf-8")
    _write_json(own / "manifest.json", manifest)


def _own_episodes(plan: Plan, content: Sequence[str]) -> pa.Table:
    import pyarrow as pa

    n = len(plan.length)
    texts: dict[str, list[str]] = {}
    for name in ("variant", "metadata", "instruction"):
        columns = [
            read_columns(d.root / "dpipe" / "episodes.parquet", [name]).column(name).to_pylist()
            for d in plan.datasets
        ]
        texts[name] = [columns[d][e] for d, e in zip(plan.owner, plan.episode, strict=True)]
    return pa.table(
        {
            "episode_index": pa.array(np.arange(n)),
            "source_id": pa.array(source_ids(plan), pa.string()),
            "split": pa.array(plan.split, pa.string()),
            "variant": pa.array(texts["variant"], pa.string()),
            "frames": pa.array(plan.length),
            "instruction": pa.array(texts["instruction"], pa.string()),
            "content": pa.array(list(content), pa.string()),
            "metadata": pa.array(texts["metadata"], pa.string()),
            "part": pa.array(plan.part),
            "video_part": pa.array(plan.part),
            "video_first_frame": pa.array(_first_frames(plan)),
        }
    )


def _segments(plan: Plan) -> pa.Table:
    """Segments of the episodes taken, in their order, under the new numbers."""
    import pyarrow as pa

    names = ("episode_index", "start", "stop", "text", "task")
    schema = pa.schema([(n, pa.string() if n in ("text", "task") else pa.int64()) for n in names])
    rows: list[dict[str, Any]] = []
    for d, dataset in enumerate(plan.datasets):
        path = dataset.root / "dpipe" / "segments.parquet"
        if not path.is_file():
            continue
        places: dict[int, list[int]] = {}
        for row in np.flatnonzero(plan.owner == d).tolist():
            places.setdefault(int(plan.episode[row]), []).append(row)
        for segment in read_columns(path, names).to_pylist():
            rows += [segment | {"episode_index": row} for row in places.get(segment["episode_index"], ())]
    rows.sort(key=lambda segment: segment["episode_index"])
    return pa.Table.from_pylist(rows, schema=schema)


def _pictures_table(plan: Plan, pictures: Pictures) -> pa.Table:
    import pyarrow as pa

    count = len(plan.length)
    columns: dict[str, Any] = {"episode_index": pa.array(np.arange(count))}
    offsets = pa.array(np.arange(count + 1, dtype=np.int32) * 768)
    for camera, (levels, frames) in pictures.items():
        key = camera.removeprefix(CAMERA_PREFIX)
        columns[f"histogram/{key}"] = pa.ListArray.from_arrays(offsets, pa.array(levels.reshape(-1)))
        columns[f"counted/{key}"] = pa.array(frames)
    return pa.table(columns)


def _dropped(plan: Plan) -> list[Dropped]:
    """What the conversions had left out is still left out."""
    found = [each for dataset in plan.datasets for each in read_dropped(dataset.root)]
    unique = {(d.split, d.source_id, d.reason): d for d in found}
    return [unique[key] for key in sorted(unique)]


def _joined(words: Sequence[str]) -> str:
    return "+".join(dict.fromkeys(words))


def _common(options: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Options of all; where they differ, each value once, in a list."""
    result: dict[str, Any] = {}
    for name in dict.fromkeys(name for told in options for name in told):
        values = [told.get(name) for told in options]
        different = [v for i, v in enumerate(values) if v not in values[:i]]
        result[name] = different[0] if len(different) == 1 else [v for v in different if v is not None]
    return result
