"""A LeRobot v3.0 dataset of a few episodes, written with pyarrow alone. Helpers, not a test file.

Values are their own position where that helps: state[t] counts frames, pictures carry the frame number.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

STATE = ("x", "y", "z", "gripper_width")
ACTION = ("x", "y", "z", "gripper")
CAMERA = "observation.images.image"


def episode_columns(seed: int, frames: int) -> dict[str, np.ndarray]:
    """Smooth absolute actions and the state one step behind; a two-valued gripper."""
    rng = np.random.default_rng(seed)
    path = np.cumsum(rng.normal(size=(frames + 1, 3)) * 0.05, axis=0)
    gripper = np.where(np.arange(frames + 1) % 14 < 7, -1.0, 1.0)
    state = np.column_stack([path[:-1], 0.02 * (1 - gripper[:-1])])
    return {
        "observation.state": state.astype(np.float32),
        "action": np.column_stack([path[1:], gripper[1:]]).astype(np.float32),
    }


def picture(seed: int, frame: int, size: int = 32) -> np.ndarray:
    """A gradient that moves with the frame; its top-left pixel is (seed, frame, 7)."""
    y, x = np.mgrid[:size, :size]
    image = np.stack([(x * 5 + frame * 9) % 256, (y * 5 + seed * 31) % 256, (x + y) * 3 % 256], axis=-1)
    image = image.astype(np.uint8)
    image[0, 0] = (seed % 256, frame % 256, 7)
    return image


def write_tiny(
    root: Path,
    episodes: Sequence[tuple[int, int]],
    parts: Sequence[int] = (),
    ours: bool = True,
    camera: bool = False,
    fps: int = 10,
    columns=episode_columns,
    size: int = 32,
    text=lambda seed: f"task {seed % 2}",
) -> Path:
    """Episodes (seed, frames); `parts` are numbers of episodes per data file (one file by default)."""
    parts = list(parts) or [len(episodes)]
    assert sum(parts) == len(episodes)
    names = {"observation.state": STATE, "action": ACTION}
    widths = {name: values.shape[1] for name, values in columns(0, 2).items()}
    features = {
        name: {
            "dtype": "float32",
            "shape": [width],
            "names": list(names[name]) if width == len(names[name]) else [f"d{i}" for i in range(width)],
        }
        for name, width in widths.items()
    }
    features |= {
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        **{
            name: {"dtype": "int64", "shape": [1], "names": None}
            for name in ("frame_index", "episode_index", "index", "task_index")
        },
    }
    if camera:
        features[CAMERA] = {
            "dtype": "image",
            "shape": [size, size, 3],
            "names": ["height", "width", "channels"],
        }
    texts = sorted({text(seed) for seed, _ in episodes})
    rows, first, episode = [], 0, 0
    for part, count in enumerate(parts):
        tables = []
        for _ in range(count):
            seed, frames = episodes[episode]
            data = columns(seed, frames)
            table = {
                name: pa.FixedSizeListArray.from_arrays(
                    pa.array(values.ravel(), pa.float32()), values.shape[1]
                )
                for name, values in data.items()
            }
            table |= {
                "timestamp": pa.array(np.arange(frames) / fps, pa.float32()),
                "frame_index": np.arange(frames),
                "episode_index": np.full(frames, episode),
                "index": np.arange(first, first + frames),
                "task_index": np.full(frames, texts.index(text(seed))),
            }
            if camera:
                pngs = [{"bytes": _png(picture(seed, t, size)), "path": None} for t in range(frames)]
                table[CAMERA] = pa.array(pngs, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
            tables.append(pa.table(table))
            rows.append(
                {
                    "episode_index": episode,
                    "tasks": [text(seed)],
                    "length": frames,
                    "data/chunk_index": 0,
                    "data/file_index": part,
                    "dataset_from_index": first,
                    "dataset_to_index": first + frames,
                }
            )
            first += frames
            episode += 1
        _write(root / f"data/chunk-000/file-{part:03d}.parquet", pa.concat_tables(tables))
    _write(root / "meta/episodes/chunk-000/file-000.parquet", pa.Table.from_pylist(rows))
    tasks = pd.DataFrame({"task_index": range(len(texts))}, index=pd.Index(texts, name="task"))
    tasks.to_parquet(root / "meta/tasks.parquet")
    info = {
        "codebase_version": "v3.0",
        "fps": fps,
        "features": features,
        "total_episodes": len(rows),
        "total_frames": first,
        "total_tasks": len(texts),
        "splits": {"train": f"0:{len(rows)}"},
        "robot_type": "tiny",
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "video_path": None,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    if ours:
        (root / "dpipe").mkdir(exist_ok=True)
        (root / "dpipe/manifest.json").write_text(json.dumps({"dpipe": 1, "name": root.name}))
    return root


def _write(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
