"""Numbering last: from the receipts of parts to the tables and meta files of a LeRobot v3.0 dataset.

Everything is staged under `dpipe/staging`, a redo log names every move, then the moves are made with
`meta/info.json` and `dpipe/manifest.json` first taken away and last put back: at any moment the folder is the
old dataset, plainly unfinished, or the new dataset. Videos are never touched here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.episode import Dropped, Embodiment
from ..schemas.errors import DataError
from ..schemas.features import DEFAULT_FEATURES, CameraFeature, Feature
from .durable import POINT, move_file, sync_folder, write_file, write_json
from .payload import VideoOptions, sidecar_file, staged_data, staged_sidecar
from .statistics import arange_statistics, constant_statistics, dataset_statistics, histogram_statistics
from .tables import (
    DATA_PATH,
    EPISODES_PATH,
    EPISODES_PER_FILE,
    STATISTICS,
    data_file,
    data_schema,
    info_json,
    part_place,
    read_columns,
    statistics_type,
    write_parquet,
    write_tasks,
)

if TYPE_CHECKING:
    import pyarrow as pa

STATISTICS_UP_TO = 50_000
"""Episodes beyond which per-episode statistics stay out of meta/: at 13 kB each, lerobot could not hold them."""

NUMBERS = ("episode_index", "index", "task_index")


@dataclass(frozen=True)
class FinishResult:
    episodes: int
    frames: int
    bytes: int
    dropped: tuple[Dropped, ...]
    unchanged: bool


def load_receipts(root: Path) -> dict[str, dict[str, Any]]:
    """What a rerun needs to know of each episode, by source_id; the latest part wins.

    Plain Python values: this is the path of a rerun with nothing to do, and pyarrow's conversions from Python
    import pandas.
    """

    columns = ["source_id", "key", "memo", "raw_digest", "dropped", "remedy", "split", "part"]
    receipts: dict[str, dict[str, Any]] = {}
    for path in _receipt_files(root):
        table = read_columns(path, columns)
        for row in zip(*(table.column(name).to_pylist() for name in columns), strict=True):
            receipts[row[0]] = dict(zip(columns, row, strict=True))
    return receipts


def _receipt_files(root: Path) -> list[Path]:
    journal = root / "dpipe" / "journal"
    finished = journal / "receipts.parquet"
    return [p for p in [finished] if p.is_file()] + sorted((journal / "parts").glob("part-*.parquet"))


def recover(root: Path) -> None:
    """Finish the moves of a run that was killed while it made them."""
    log = root / "dpipe" / "staging" / "moves.json"
    if log.is_file():
        _apply(root, json.loads(log.read_text()))


def finish(
    root: Path,
    *,
    name: str,
    source: str,
    converter_version: int,
    options: Mapping[str, Any],
    video: VideoOptions,
    embodiment: Embodiment,
    order: Sequence[str],
    scan_dropped: Sequence[Dropped],
    warnings: Sequence[str],
) -> FinishResult:
    """Number the episodes of `order` and put the dataset's tables in place; a no-op when nothing changed."""
    known = load_receipts(root)
    dropped = _all_dropped([known[s] for s in order if s in known], scan_dropped)
    alive = [known[s] for s in order if s in known and not known[s]["dropped"]]
    state = _state(alive, dropped, name, source, converter_version, options, video)
    manifest_path = root / "dpipe" / "manifest.json"
    if manifest_path.is_file():
        manifest = json.loads(manifest_path.read_text())
        if manifest.get("state") == state:
            totals = manifest["totals"]
            return FinishResult(totals["episodes"], totals["frames"], totals["bytes"], tuple(dropped), True)
    if not alive:
        listed = "\n".join(f"    {d.source_id}: {d.reason}" for d in dropped[:10])
        raise DataError(f"every episode had to be left out; there is no dataset to write\n  found:\n{listed}")

    receipts = _read_receipts(root)
    rows = {source_id: row for row, source_id in enumerate(receipts.column("source_id").to_pylist())}
    kept = [rows[receipt["source_id"]] for receipt in alive]
    episodes = _Episodes(receipts, kept)
    staging = root / "dpipe" / "staging"
    data = _stage_data(root, episodes, embodiment)
    statistics = _dataset_statistics(data, episodes, embodiment)
    tasks = episodes.tasks
    cameras = [CameraFeature(key, s["height"], s["width"]) for key, s in episodes.streams.items()]
    totals = {"episodes": len(kept), "frames": int(episodes.frames.sum()), "tasks": len(tasks)}
    write_tasks(staging / "meta" / "tasks.parquet", tasks)
    write_json(staging / "meta" / "stats.json", statistics)
    _stage_episodes(staging, episodes, embodiment)
    described = [
        (camera, _stream_info(episodes.streams[camera.key], video, embodiment.fps)) for camera in cameras
    ]
    info = info_json(
        embodiment.features, described, embodiment.robot_type, embodiment.fps, totals, episodes.splits
    )
    write_json(staging / "meta" / "info.json", info, indent=4)
    _stage_own_tables(staging, episodes)
    write_file(
        staging / "dpipe" / "dropped.jsonl",
        "".join(json.dumps(d.to_json(), ensure_ascii=False) + "\n" for d in dropped).encode(),
    )
    size = sum(p.stat().st_size for p in _payload_files(root, episodes))
    manifest = {
        "dpipe": 1,
        "name": name,
        "source": source,
        "converter_version": converter_version,
        "options": dict(options),
        "video": video.to_json(),
        "embodiment": _embodiment_json(embodiment, episodes.variant),
        "conventions": dict(embodiment.conventions),
        "licence": embodiment.licence,
        "splits": episodes.splits,
        "totals": totals | {"bytes": size},
        "cameras": {camera.key: [camera.height, camera.width] for camera in cameras},
        "parts": episodes.part_ranges(),
        "dropped": len(dropped),
        "warnings": list(warnings),
        "state": state,
    }
    from .card import dataset_card

    write_file(staging / "README.md", dataset_card(manifest, tasks, dropped, statistics).encode())
    write_json(staging / "dpipe" / "manifest.json", manifest)
    _stage_receipts(staging, receipts, episodes, embodiment)
    _commit(root, staging)
    return FinishResult(totals["episodes"], totals["frames"], size, tuple(dropped), False)


class _Episodes:
    """The kept episodes as columns, numbered: one place for every index that is global."""

    def __init__(self, receipts: pa.Table, kept: Sequence[int]) -> None:
        self.receipts = receipts
        self.kept = np.asarray(kept, np.int64)
        self.table = receipts.take(kept)
        self.source_id: list[str] = self.table.column("source_id").to_pylist()
        self.frames = self.table.column("frames").to_numpy().astype(np.int64)
        self.stop = np.cumsum(self.frames)
        self.start = self.stop - self.frames
        self.part = self.table.column("part").to_numpy().astype(np.int64)  # where its pixels are
        self.home = self.table.column("home").to_numpy().astype(np.int64)  # where its rows belong
        self.first_frame = self.table.column("first_frame").to_numpy().astype(np.int64)
        self.split: list[str] = self.table.column("split").to_pylist()
        self.variant: str = self.table.column("variant")[0].as_py()
        self.instruction: list[str] = self.table.column("instruction").to_pylist()
        self.tasks: list[str] = list(dict.fromkeys(self.instruction))
        number = {task: i for i, task in enumerate(self.tasks)}
        self.task_index = np.array([number[text] for text in self.instruction], np.int64)
        self.streams: dict[str, Any] = json.loads(receipts.schema.metadata[b"streams"])
        self.splits = _split_ranges(self.split)

    def __len__(self) -> int:
        return len(self.kept)

    def numbers(self, episode: int) -> tuple[int, int, int]:
        return episode, int(self.start[episode]), int(self.task_index[episode])

    def homes(self) -> Iterator[tuple[int, list[int]]]:
        """Data parts in order, each with its episodes (consecutive numbers by construction)."""
        bounds = np.flatnonzero(np.diff(self.home)) + 1
        for block in np.split(np.arange(len(self)), bounds):
            yield int(self.home[block[0]]), block.tolist()

    def part_ranges(self) -> list[dict[str, int]]:
        return [
            {
                "part": part,
                "first_episode": block[0],
                "episodes": len(block),
                "frames": int(self.frames[block].sum()),
            }
            for part, block in self.homes()
        ]


def _read_receipts(root: Path) -> pa.Table:
    """All receipts as one table: the latest of each episode, with where its rows lie and their present numbers.

    Columns beside those of a part receipt: home (the part its rows belong to), file_part, row_group (where its
    rows are now), staged, at_episode_index / at_index / at_task_index (the numbers written there).
    """
    import pyarrow as pa

    homes = _homes(root)
    tables: list[pa.Table] = []
    streams: dict[str, Any] = {}
    finished = root / "dpipe" / "journal" / "receipts.parquet"
    if finished.is_file():
        table = read_columns(finished)
        streams |= json.loads((table.schema.metadata or {}).get(b"streams", b"{}"))
        tables.append(table.replace_schema_metadata(None))
    for path in sorted((root / "dpipe" / "journal" / "parts").glob("part-*.parquet")):
        table = read_columns(path)
        meta = json.loads(table.schema.metadata[b"dpipe"])
        streams = meta["streams"] | streams
        alive = [not reason for reason in table.column("dropped").to_pylist()]
        position = np.cumsum(alive) - 1
        numbers = np.full((len(alive), 3), -1, np.int64)
        numbers[alive] = np.array(meta["numbers"], np.int64).reshape(-1, 3)
        table = table.replace_schema_metadata(None)
        table = table.append_column("file_part", table.column("part"))
        table = table.append_column("row_group", pa.array(position, pa.int64()))
        table = table.append_column("staged", pa.array([True] * len(alive)))
        for column, name in enumerate(NUMBERS):
            table = table.append_column(f"at_{name}", pa.array(numbers[:, column]))
        tables.append(table)
    if not tables:
        raise DataError(f"{root}: no receipts; nothing was converted")
    merged = pa.concat_tables([t.select(tables[0].column_names) for t in tables])
    latest = {source_id: row for row, source_id in enumerate(merged.column("source_id").to_pylist())}
    merged = merged.take(sorted(latest.values()))
    home = [homes.get(s, -1) for s in merged.column("source_id").to_pylist()]
    merged = merged.append_column("home", pa.array(home, pa.int64()))
    return merged.replace_schema_metadata({"streams": json.dumps(streams)})


def _homes(root: Path) -> dict[str, int]:
    """The part each episode was first listed in: its place among the data files, whatever is redone later."""
    homes: dict[str, int] = {}
    for path in sorted((root / "dpipe" / "journal").glob("order-*.json")):
        for part in json.loads(path.read_text())["parts"]:
            for source_id in part["episodes"]:
                homes.setdefault(source_id, part["part"])
    return homes


def _stage_data(root: Path, episodes: _Episodes, embodiment: Embodiment) -> list[Path]:
    """Bring every data part to its final numbers; returns the files in order, staged or already in place."""
    import pyarrow.parquet as pq

    file_part = episodes.table.column("file_part").to_pylist()
    row_group = episodes.table.column("row_group").to_pylist()
    staged = episodes.table.column("staged").to_pylist()
    at = np.stack([episodes.table.column(f"at_{name}").to_numpy() for name in NUMBERS], axis=1)
    schema = data_schema(embodiment.features)
    opened: dict[Path, Any] = {}

    def rows(kind: str, episode: int) -> pa.Table:
        part = file_part[episode]
        if kind == "data":
            path = staged_data(root, part) if staged[episode] else root / data_file(part)
        else:
            path = staged_sidecar(root, part) if staged[episode] else root / sidecar_file(part)
        if path not in opened:
            if len(opened) > 32:
                opened.clear()
            opened[path] = pq.ParquetFile(path)
        return opened[path].read_row_group(row_group[episode])

    files: list[Path] = []
    rewrites: list[tuple[Path, Path]] = []
    for part, block in episodes.homes():
        final, stage = root / data_file(part), staged_data(root, part)
        current = stage if stage.is_file() else final
        groups = _row_groups(current)
        as_is = len(block) == groups and all(
            file_part[e] == part and row_group[e] == i and tuple(at[e]) == episodes.numbers(e)
            for i, e in enumerate(block)
        )
        if as_is:
            files.append(current)
            continue
        # A rewrite reads the very file it replaces: it goes beside it and takes its place when all are written.
        rewritten = stage.with_name(stage.name + ".numbered")
        write_parquet(rewritten, (_renumber(rows("data", e), episodes.numbers(e)) for e in block), schema)
        rewrites.append((rewritten, stage))
        if embodiment.sidecar:
            side = staged_sidecar(root, part)
            beside = side.with_name(side.name + ".numbered")
            first = rows("sidecar", block[0])
            write_parquet(beside, (rows("sidecar", e) for e in block), first.schema)
            rewrites.append((beside, side))
        files.append(stage)
    opened.clear()
    for rewritten, stage in rewrites:
        rewritten.replace(stage)
        sync_folder(stage.parent)
    wanted = {staged_data(root, part) for part, _ in episodes.homes()}
    for path in (root / "dpipe" / "staging" / "data").rglob("*.parquet"):
        if path not in wanted:  # only replacements or dropped episodes: their rows live elsewhere or nowhere
            path.unlink()
    return files


def _row_groups(path: Path) -> int:
    import pyarrow.parquet as pq

    return pq.read_metadata(path).num_row_groups if path.is_file() else -1


def _renumber(table: pa.Table, numbers: tuple[int, int, int]) -> pa.Table:
    import pyarrow as pa

    count = table.num_rows
    values = {
        "episode_index": np.full(count, numbers[0], np.int64),
        "index": np.arange(count, dtype=np.int64) + numbers[1],
        "task_index": np.full(count, numbers[2], np.int64),
    }
    for name, column in values.items():
        table = table.set_column(table.column_names.index(name), table.schema.field(name), pa.array(column))
    return table


def _dataset_statistics(files: Sequence[Path], episodes: _Episodes, embodiment: Embodiment) -> dict[str, Any]:
    """meta/stats.json: exact over every row; pictures over their sampled frames."""

    result: dict[str, Any] = {}
    for key in episodes.streams:
        counts = np.zeros((3, 256), np.int64)
        for value in episodes.table.column(f"histogram/{key}").to_pylist():
            counts += np.asarray(value, np.int64).reshape(3, 256)
        frames = int(np.sum(episodes.table.column(f"counted/{key}").to_numpy()))
        result[f"observation.images.{key}"] = histogram_statistics(counts, frames)

    def chunks(name: str) -> Iterator[NDArray[Any]]:
        for path in files:
            column = read_columns(path, [name]).column(name).combine_chunks()
            flat = column.flatten() if hasattr(column, "flatten") and column.type.num_fields else column
            yield np.asarray(flat).reshape(len(column), -1)

    for feature in embodiment.features:
        result[feature.name] = dataset_statistics(lambda name=feature.name: chunks(name))
    total = int(episodes.frames.sum())
    for name in DEFAULT_FEATURES:
        if name == "index":
            result[name] = arange_statistics(0, total)
        else:
            result[name] = dataset_statistics(lambda name=name: chunks(name))
    return result


def _stage_episodes(staging: Path, episodes: _Episodes, embodiment: Embodiment) -> None:
    """meta/episodes: one row an episode, files of at most EPISODES_PER_FILE rows."""
    import pyarrow as pa

    fps = embodiment.fps
    count = len(episodes)
    chunk, file = zip(*(part_place(int(p)) for p in episodes.home), strict=True)
    columns: dict[str, Any] = {
        "episode_index": pa.array(range(count), pa.int64()),
        "tasks": pa.array([[text] for text in episodes.instruction], pa.list_(pa.string())),
        "length": pa.array(episodes.frames),
        "data/chunk_index": pa.array(chunk, pa.int64()),
        "data/file_index": pa.array(file, pa.int64()),
        "dataset_from_index": pa.array(episodes.start),
        "dataset_to_index": pa.array(episodes.stop),
    }
    video_chunk, video_file_index = zip(*(part_place(int(p)) for p in episodes.part), strict=True)
    for key in episodes.streams:
        prefix = f"videos/observation.images.{key}"
        columns[f"{prefix}/chunk_index"] = pa.array(video_chunk, pa.int64())
        columns[f"{prefix}/file_index"] = pa.array(video_file_index, pa.int64())
        # Frames over fps, not sums of durations: what lerobot's users see drift cannot drift.
        columns[f"{prefix}/from_timestamp"] = pa.array(episodes.first_frame / fps)
        columns[f"{prefix}/to_timestamp"] = pa.array((episodes.first_frame + episodes.frames) / fps)
    if count <= STATISTICS_UP_TO:
        columns |= _episode_statistics(episodes, embodiment)
    columns["meta/episodes/chunk_index"] = pa.array([0] * count, pa.int64())
    columns["meta/episodes/file_index"] = pa.array(np.arange(count) // EPISODES_PER_FILE)
    columns["split"] = pa.array(episodes.split, pa.string())
    columns["source_id"] = pa.array(episodes.source_id, pa.string())
    table = pa.table(columns)
    for index, start in enumerate(range(0, count, EPISODES_PER_FILE)):
        part = table.slice(start, EPISODES_PER_FILE)
        path = staging / EPISODES_PATH.format(chunk_index=0, file_index=index)
        write_parquet(path, [part], table.schema)


def _episode_statistics(episodes: _Episodes, embodiment: Embodiment) -> dict[str, pa.Array]:
    import pyarrow as pa

    result: dict[str, pa.Array] = {}
    for key in episodes.streams:
        histograms = episodes.table.column(f"histogram/{key}").to_pylist()
        counted = episodes.table.column(f"counted/{key}").to_pylist()
        each = [
            histogram_statistics(np.asarray(h, np.int64).reshape(3, 256), n)
            for h, n in zip(histograms, counted, strict=True)
        ]
        for name in STATISTICS:
            values = [statistics[name] for statistics in each]
            result[f"stats/observation.images.{key}/{name}"] = pa.array(values, statistics_type(True, name))
    for feature in embodiment.features:
        for name in STATISTICS:
            column = f"stats/{feature.name}/{name}"
            result[column] = episodes.table.column(column).combine_chunks()
    fps = embodiment.fps
    for name in DEFAULT_FEATURES:
        each = []
        for episode in range(len(episodes)):
            frames = int(episodes.frames[episode])
            if name == "timestamp":
                frame = arange_statistics(0, frames)
                each.append({s: v if s == "count" else [x / fps for x in v] for s, v in frame.items()})
            elif name == "frame_index":
                each.append(arange_statistics(0, frames))
            elif name == "index":
                each.append(arange_statistics(int(episodes.start[episode]), frames))
            else:
                value = episode if name == "episode_index" else int(episodes.task_index[episode])
                each.append(constant_statistics(value, frames))
        for statistic in STATISTICS:
            values = [statistics[statistic] for statistics in each]
            result[f"stats/{name}/{statistic}"] = pa.array(values, statistics_type(False, statistic))
    return result


def _stage_own_tables(staging: Path, episodes: _Episodes) -> None:
    """dpipe/episodes.parquet and dpipe/segments.parquet."""
    import pyarrow as pa

    table = pa.table(
        {
            "episode_index": pa.array(range(len(episodes)), pa.int64()),
            "source_id": pa.array(episodes.source_id, pa.string()),
            "split": pa.array(episodes.split, pa.string()),
            "variant": episodes.table.column("variant").combine_chunks(),
            "frames": pa.array(episodes.frames),
            "instruction": pa.array(episodes.instruction, pa.string()),
            "content": episodes.table.column("content").combine_chunks(),
            "metadata": episodes.table.column("metadata").combine_chunks(),
            "part": pa.array(episodes.home),
            "video_part": pa.array(episodes.part),
            "video_first_frame": pa.array(episodes.first_frame),
        }
    )
    write_parquet(staging / "dpipe" / "episodes.parquet", [table], table.schema)
    schema = pa.schema(
        [
            ("episode_index", pa.int64()),
            ("start", pa.int64()),
            ("stop", pa.int64()),
            ("text", pa.string()),
            ("task", pa.string()),
        ]
    )
    segments = [
        {"episode_index": episode, **segment}
        for episode, text in enumerate(episodes.table.column("segments").to_pylist())
        for segment in json.loads(text)
    ]
    write_parquet(
        staging / "dpipe" / "segments.parquet", [pa.Table.from_pylist(segments, schema=schema)], schema
    )


def _stage_receipts(staging: Path, receipts: pa.Table, episodes: _Episodes, embodiment: Embodiment) -> None:
    """journal/receipts.parquet: every receipt, with where its rows lie once the moves are made."""
    import pyarrow as pa

    count = receipts.num_rows
    located = {name: np.full(count, -1, np.int64) for name in ("file_part", "row_group", *NUMBERS)}
    for part, block in episodes.homes():
        for group, episode in enumerate(block):
            row = int(episodes.kept[episode])
            located["file_part"][row], located["row_group"][row] = part, group
            for name, value in zip(NUMBERS, episodes.numbers(episode), strict=True):
                located[name][row] = value
    table = receipts.drop_columns(["home"])
    replaced = {"file_part": located["file_part"], "row_group": located["row_group"]}
    replaced |= {f"at_{name}": located[name] for name in NUMBERS}
    for name, values in replaced.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    table = table.set_column(table.column_names.index("staged"), "staged", pa.array([False] * count))
    table = table.replace_schema_metadata({"streams": json.dumps(episodes.streams)})
    write_parquet(staging / "dpipe" / "journal" / "receipts.parquet", [table], table.schema)


def _commit(root: Path, staging: Path) -> None:
    """Name every move in a redo log, then make them; `recover` does the same after a kill."""
    last = ["meta/info.json", "dpipe/manifest.json"]
    moves = sorted(
        p.relative_to(staging).as_posix() for p in staging.rglob("*") if p.is_file() and p.name[0] != "."
    )
    moves = [m for m in moves if m not in last and m != "moves.json"] + last
    before = {p.relative_to(root).as_posix() for p in (root / "meta" / "episodes").rglob("*.parquet")}
    stale = sorted(before - set(moves))
    parts = sorted((root / "dpipe" / "journal" / "parts").glob("part-*.parquet"))
    remove = stale + [p.relative_to(root).as_posix() for p in parts]
    write_json(staging / "moves.json", {"moves": moves, "remove": remove})
    _apply(root, {"moves": moves, "remove": remove})


def _apply(root: Path, log: Mapping[str, list[str]]) -> None:
    staging = root / "dpipe" / "staging"
    first = [m for m in log["moves"] if (staging / m).is_file()]
    if "meta/info.json" in first:
        for name in ("dpipe/manifest.json", "meta/info.json"):
            POINT(f"unlink {name}")
            (root / name).unlink(missing_ok=True)
    for name in log["remove"]:
        (root / name).unlink(missing_ok=True)
    for name in first:
        move_file(staging / name, root / name)
    shutil.rmtree(staging)


def _all_dropped(receipts: Sequence[Mapping[str, Any]], scanned: Sequence[Dropped]) -> list[Dropped]:
    late = [
        Dropped(r["source_id"], (), r["dropped"], r["remedy"], r["split"]) for r in receipts if r["dropped"]
    ]
    return sorted([*scanned, *late], key=lambda d: (d.split, d.source_id))


def _state(alive: Sequence[Mapping[str, Any]], dropped: Sequence[Dropped], *settings: Any) -> str:
    """Digest of everything the tables are made from: equal means there is nothing to do."""
    import xxhash

    hasher = xxhash.xxh3_128()
    for receipt in alive:
        hasher.update(f"{receipt['source_id']}\n{receipt['raw_digest']}\n{receipt['part']}\n".encode())
    facts = [d.to_json() for d in dropped]
    plain = [s.to_json() if isinstance(s, VideoOptions) else s for s in settings]
    hasher.update(json.dumps([facts, plain], sort_keys=True, default=str).encode())
    return hasher.hexdigest()


def _split_ranges(splits: Sequence[str]) -> dict[str, str]:
    """{"train": "0:40", "validation": "40:50"}; a split that later runs grew lists its ranges with commas."""
    ranges: dict[str, list[list[int]]] = {}
    for episode, split in enumerate(splits):
        known = ranges.setdefault(split, [])
        if known and known[-1][1] == episode:
            known[-1][1] = episode + 1
        else:
            known.append([episode, episode + 1])
    return {split: ",".join(f"{a}:{b}" for a, b in known) for split, known in ranges.items()}


def _stream_info(stream: Mapping[str, Any], video: VideoOptions, fps: int) -> dict[str, Any]:
    """LeRobot's description of a camera's stream: the encoder's settings, or just the stream where it was copied."""
    from ..video.encode import PRESETS, copied_info

    if stream["kind"] == "encoded":
        return PRESETS[video.codec].info(stream["height"], stream["width"], fps)
    return copied_info(stream["codec"], stream["pix_fmt"], stream["height"], stream["width"], fps)


def _embodiment_json(embodiment: Embodiment, variant: str) -> dict[str, Any]:
    def described(features: Sequence[Feature]) -> dict[str, Any]:
        return {f.name: {k: v for k, v in asdict(f).items() if k != "name"} for f in features}

    return {
        "name": embodiment.name,
        "variant": variant,
        "robot_type": embodiment.robot_type,
        "fps": embodiment.fps,
        "fps_origin": embodiment.fps_origin,
        "features": described(embodiment.features),
        "sidecar": described(embodiment.sidecar),
        "citation": embodiment.citation,
    }


def _payload_files(root: Path, episodes: _Episodes) -> Iterator[Path]:
    chunks = {
        DATA_PATH.format(chunk_index=c, file_index=f) for c, f in map(part_place, map(int, episodes.home))
    }
    for relative in sorted(chunks):
        for path in (root / relative, root / "dpipe" / "staging" / relative):
            if path.is_file():
                yield path
                break
    for path in sorted((root / "videos").rglob("*.mp4")):
        if not path.name.startswith("."):
            yield path
