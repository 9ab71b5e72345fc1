"""LeRobot v2.1 datasets small enough to check by hand, written without any of our own writing code.

Values and pictures as in `small_datasets`. Not a test file: helpers for test files.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from small_datasets import columns_of, encode_png, picture, write_video


def write_v21(
    root: Path,
    lengths: Sequence[int],
    fps: int = 10,
    kind: str = "video",
    version: str = "v2.1",
    tasks: Sequence[str] = ("pick", "place"),
    size: tuple[int, int] = (40, 60),
    chunks_size: int = 1000,
    extra_frames: int = 0,
    video_fps: int | None = None,
) -> Path:
    """Episode e shows pictures numbered on from those before it; `extra_frames` more in each video than rows."""
    camera = "observation.images.image"
    scalars = ("frame_index", "episode_index", "index", "task_index")
    features: dict = {
        camera: {"dtype": kind, "shape": [*size, 3], "names": ["height", "width", "channel"]},
        "observation.state": {"dtype": "float32", "shape": [3], "names": {"motors": ["x", "y", "z"]}},
        "action": {"dtype": "float32", "shape": [3], "names": {"motors": ["x", "y", "gripper"]}},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        **{name: {"dtype": "int64", "shape": [1], "names": None} for name in scalars},
    }
    chunks = -(-len(lengths) // chunks_size)
    info = {
        "codebase_version": version,
        "robot_type": "paper",
        "total_episodes": len(lengths),
        "total_frames": int(sum(lengths)),
        "total_tasks": len(tasks),
        "total_videos": len(lengths),
        "total_chunks": chunks,
        "chunks_size": chunks_size,
        "fps": fps,
        "splits": {"train": f"0:{len(lengths)}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features,
    }
    (root / "meta").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    lines = [
        {"episode_index": e, "tasks": [tasks[e % len(tasks)]], "length": n} for e, n in enumerate(lengths)
    ]
    _write_lines(root / "meta/episodes.jsonl", lines)
    _write_lines(root / "meta/tasks.jsonl", [{"task_index": i, "task": task} for i, task in enumerate(tasks)])
    first = 0
    for e, length in enumerate(lengths):
        t = np.arange(length)
        columns = {
            name: pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 3)
            for name, values in columns_of(e, length).items()
        }
        columns |= {
            "timestamp": pa.array((t / fps).astype(np.float32)),
            "frame_index": pa.array(t),
            "episode_index": pa.array(np.full(length, e)),
            "index": pa.array(t + first),
            "task_index": pa.array(np.full(length, e % len(tasks))),
        }
        frames = [picture(first + i, 0, *size) for i in range(length + extra_frames)]
        if kind == "image":
            cells = [{"bytes": encode_png(f), "path": f"frame_{i:06d}.png"} for i, f in enumerate(frames)]
            columns[camera] = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        else:
            video = root / f"videos/chunk-{e // chunks_size:03d}/{camera}/episode_{e:06d}.mp4"
            write_video(video, frames, video_fps or fps)
        path = root / f"data/chunk-{e // chunks_size:03d}/episode_{e:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
        first += length
    return root


def _write_lines(path: Path, lines: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
