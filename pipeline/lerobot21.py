"""A dataset as LeRobot v2.1, for trainers that have not moved on, with GR00T's meta/modality.json.

    data/chunk-000/episode_000000.parquet           videos/chunk-000/<camera>/episode_000000.mp4
    meta/info.json, episodes.jsonl, tasks.jsonl, episodes_stats.jsonl, modality.json

A video that holds one episode alone is shared by hard link; of others each episode's packets are copied, which
every dataset of ours allows. `--part-frames 1` makes a dataset whose videos all can be shared.
Source: lerobot 0.6.1 `scripts/convert_dataset_v21_to_v30.py` (what v2.1 is, as its own upgrade reads it);
NVIDIA/Isaac-GR00T 16d0dae `getting_started/examples/so100__modality.json`
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..schemas.errors import DataError
from ..schemas.features import CAMERA_PREFIX
from ..streams.dataset import Dataset, open_dataset
from .durable import hard_link
from .outputs import Form, OutputOptions, Task
from .statistics import FrameHistogram, column_statistics, sampled_frames
from .tables import CHUNK_FILES

DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
RECIPE = "meta/dpipe.json"
STATE, ACTION = "observation.state", "action"


def estimate(dataset: Dataset, options: OutputOptions) -> int:
    files = {dataset.video_path(e, c) for c in _videos(dataset) for e in range(len(dataset))}
    rows = sum(
        int(np.prod(dataset.features[name]["shape"])) * np.dtype(dataset.features[name]["dtype"]).itemsize
        for name in dataset.vectors
    )
    return sum(path.stat().st_size for path in files if path.is_file()) + dataset.total_frames * (rows + 36)


def begin(dataset: Dataset, tree: Path, options: OutputOptions, recipe: Mapping[str, Any]) -> list[Task]:
    count = len(dataset)
    chunks = -(-count // CHUNK_FILES)
    videos = _videos(dataset)
    for chunk in range(chunks):
        (tree / f"data/chunk-{chunk:03d}").mkdir(parents=True)
        for camera in videos:
            (tree / f"videos/chunk-{chunk:03d}" / camera).mkdir(parents=True)
    info = {
        "codebase_version": "v2.1",
        "robot_type": dataset.info.get("robot_type"),
        "total_episodes": count,
        "total_frames": dataset.total_frames,
        "total_tasks": len(dataset.tasks),
        "total_videos": count * len(videos),
        "total_chunks": chunks,
        "chunks_size": CHUNK_FILES,
        "fps": dataset.fps,
        "splits": dict(dataset.info.get("splits") or {"train": f"0:{count}"}),
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if videos else None,
        "features": _known(dataset),
    }
    lengths = dataset.episodes.length.tolist()
    _write_json(tree / "meta/info.json", info)
    _write_lines(
        tree / "meta/tasks.jsonl", [{"task_index": i, "task": t} for i, t in enumerate(dataset.tasks)]
    )
    episodes = [
        {"episode_index": e, "tasks": dataset.episodes.tasks(e), "length": lengths[e]} for e in range(count)
    ]
    _write_lines(tree / "meta/episodes.jsonl", episodes)
    _write_json(tree / "meta/modality.json", modality(dataset))
    _write_json(tree / RECIPE, recipe)
    card = dataset.root / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8").replace("LeRobot v3.0", "LeRobot v2.1")
        (tree / "README.md").write_text(text, encoding="utf-8")
    parts = dataset.parts()
    tasks = [
        Task(write_part, (dataset.root, tree, part.start, part.stop), sum(lengths[part.start : part.stop]))
        for part in parts
    ]
    # Statistics are one file of lines in order: a task of its own rather than one a part.
    return [*tasks, Task(write_statistics, (dataset.root, tree), 0)]


def _known(dataset: Dataset) -> dict[str, Any]:
    """Features that v2.1 has a type for: all but language."""
    return {name: told for name, told in dataset.features.items() if told["dtype"] != "language"}


def _videos(dataset: Dataset) -> list[str]:
    return [name for name in dataset.cameras if dataset.features[name]["dtype"] == "video"]


def modality(dataset: Dataset) -> dict[str, Any]:
    """GR00T's meta/modality.json: slices of state and action by part of the robot, cameras, the instruction."""
    result: dict[str, Any] = {
        part: slices(dataset.names(name) or ("",) * int(np.prod(dataset.features[name]["shape"])))
        for part, name in (("state", STATE), ("action", ACTION))
        if name in dataset.features
    }
    result["video"] = {
        camera.removeprefix(CAMERA_PREFIX): {"original_key": camera} for camera in dataset.cameras
    }
    result["annotation"] = {"human.task_description": {"original_key": "task_index"}}
    return result


def slices(names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Neighbouring dimensions of one part of the robot: {"left_arm": {"start": 0, "end": 6}, ...}.

    A part is the side a name begins with (left, right) and gripper, hand or arm by the words in it; a part that
    comes again gets a number.
    """
    result: dict[str, dict[str, int]] = {}
    last = ""
    for i, name in enumerate(names):
        words = re.split(r"[^a-z]+", name.lower())
        side = next((word for word in words[:1] if word in ("left", "right")), "")
        kind = (
            "gripper"
            if "gripper" in name.lower()
            else "hand"
            if set(words) & {"hand", "tip", "finger"}
            else "arm"
        )
        part = f"{side}_{kind}" if side else "single_arm" if kind == "arm" else kind
        if part != last or not result:
            key, number = part, 2
            while key in result:
                key, number = f"{part}_{number}", number + 1
            result[key] = {"start": i, "end": i}
        result[next(reversed(result))]["end"] = i + 1
        last = part
    return result


# --- tasks ------------------------------------------------------------------------------------------------


def write_part(root: Path, tree: Path, start: int, stop: int) -> None:
    """One task: the files of episodes [start, stop)."""
    import pyarrow.parquet as pq

    dataset = _opened(root)
    known = _known(dataset)
    for episode in range(start, stop):
        numbers = {"episode_chunk": episode // CHUNK_FILES, "episode_index": episode}
        path = dataset.data_path(episode)
        first = int(dataset.episodes.first_row[episode])
        length = int(dataset.episodes.length[episode])
        table = _rows(path, first, length)
        later = [name for name in table.column_names if name not in known]
        table = table.drop_columns(later)  # v2.1 knows no such column
        pq.write_table(table, tree / DATA_PATH.format(**numbers), compression="snappy", use_dictionary=True)
        for camera in _videos(dataset):
            target = tree / VIDEO_PATH.format(**numbers, video_key=camera)
            _write_video(dataset, episode, camera, target)


def _rows(path: Path, first: int, length: int) -> Any:
    """An episode's rows with the schema's Hugging Face description; every column of ours is also one of v2.1."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        ends = np.cumsum([file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)])
        a = int(np.searchsorted(ends, first, side="right"))
        b = int(np.searchsorted(ends, first + length - 1, side="right"))
        table = file.read_row_groups(list(range(a, b + 1)))
    return table.slice(first - (int(ends[a - 1]) if a else 0), length)


def _write_video(dataset: Dataset, episode: int, camera: str, target: Path) -> None:
    from ..video.mp4 import copy_problem, copy_run, read_table, write_mp4

    source = dataset.video_path(episode, camera)
    table = read_table(source)
    first = int(dataset.episodes.cameras[camera].first_frame[episode])
    length = int(dataset.episodes.length[episode])
    if first == 0 and length == len(table.shown):
        if not hard_link(source, target):
            shutil.copyfile(source, target)
        return
    problem = copy_problem(table, dataset.fps, first, length)
    if problem:
        raise DataError(
            f"{source}: the frames of episode {episode} cannot be cut out ({problem})\n"
            "  next: convert the dataset with dpipe convert lerobot first, then to this form"
        )
    write_mp4(
        target,
        table.sample_entry,
        table.width,
        table.height,
        dataset.fps,
        [copy_run(table, first, length)],
    )


def write_statistics(root: Path, tree: Path) -> None:
    """One task: meta/episodes_stats.jsonl, from the dataset's own table where it has one."""
    dataset = _opened(root)
    with open(tree / "meta/episodes_stats.jsonl", "w", encoding="utf-8") as file:
        for episode, statistics in enumerate(_statistics(dataset)):
            file.write(json.dumps({"episode_index": episode, "stats": statistics}) + "\n")


def _statistics(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Per episode {feature: {min, max, mean, std, count}}: v2.1 has no quantiles."""
    import pyarrow.parquet as pq

    names = [
        name for name in dataset.features if dataset.features[name]["dtype"] not in ("string", "language")
    ]
    kept = ("min", "max", "mean", "std", "count")
    wanted = [f"stats/{name}/{statistic}" for name in names for statistic in kept]
    for path in sorted((dataset.root / "meta/episodes").glob("*/*.parquet")):
        with pq.ParquetFile(path) as file:
            have = set(file.schema_arrow.names)
            columns = ["episode_index", *(name for name in wanted if name in have)]
            for batch in file.iter_batches(256, columns=columns):
                for row in batch.to_pylist():
                    yield {
                        name: {s: row[f"stats/{name}/{s}"] for s in kept}
                        if all(row.get(f"stats/{name}/{s}") is not None for s in kept)
                        else _computed(dataset, int(row["episode_index"]), name, kept)
                        for name in names
                    }


def _computed(dataset: Dataset, episode: int, name: str, kept: Sequence[str]) -> dict[str, Any]:
    """Statistics of one feature of one episode that the dataset does not give (beyond 50,000 episodes, or ever)."""
    if name not in dataset.cameras:
        values = dataset.columns([name], episode)[name]
        return {s: v for s, v in column_statistics(values).items() if s in kept}
    histogram = FrameHistogram()
    for t in sampled_frames(int(dataset.episodes.length[episode])).tolist():
        histogram.add(dataset.frames(episode, name, t, t + 1))
    return {s: v for s, v in histogram.statistics().items() if s in kept}


@lru_cache(maxsize=2)
def _opened(root: Path) -> Dataset:
    return open_dataset(root)


def recipe(out: Path) -> Mapping[str, Any] | None:
    try:
        return json.loads((out / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


FORM = Form(estimate=estimate, begin=begin, recipe=recipe)
