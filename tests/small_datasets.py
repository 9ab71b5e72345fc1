"""LeRobot v3.0 datasets small enough to check by hand, written without any of our own writing code.

Every value is its own position: state[t] = (episode, t, 0), action[t] = (t, -t, gripper), and each picture
shows its global frame number and its camera's number as a checkerboard of bits that survives lossy coding.

Not a test file: helpers that test files import with `from small_datasets import ...`.
"""

import io
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

CELLS = 5  # a picture is CELLS x CELLS squares: 20 bits of frame number, 4 of camera, one always white


def picture(number: int, camera: int, height: int = 40, width: int = 60) -> np.ndarray:
    """[height, width, 3]: squares of 40 or 215, bit by bit."""
    bits = [(number >> b) & 1 for b in range(20)] + [(camera >> b) & 1 for b in range(4)] + [1]
    cells = np.array(bits).reshape(CELLS, CELLS)
    rows = np.arange(height) * CELLS // height
    columns = np.arange(width) * CELLS // width
    grey = np.where(cells[rows][:, columns], 215, 40).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def number_of(frame: np.ndarray) -> tuple[int, int]:
    """(frame number, camera number) a picture of any size shows."""
    height, width = frame.shape[:2]
    centre = (np.arange(CELLS) * 2 + 1) * np.array([[height], [width]]) // (2 * CELLS)
    cells = frame[centre[0]][:, centre[1]].mean(axis=-1) > 127
    bits = cells.reshape(-1)
    assert bits[24], "the corner that is always white is black: this is no picture of ours"
    return (
        int(sum(int(bit) << b for b, bit in enumerate(bits[:20]))),
        int(sum(int(bit) << b for b, bit in enumerate(bits[20:24]))),
    )


def columns_of(episode: int, length: int) -> dict[str, np.ndarray]:
    t = np.arange(length, dtype=np.float32)
    return {
        "observation.state": np.stack([np.full(length, episode, np.float32), t, np.zeros_like(t)], axis=1),
        "action": np.stack([t, -t, np.where(t < length // 2, -1, 1)], axis=1).astype(np.float32),
    }


def write_dataset(
    root: Path,
    lengths: Sequence[int],
    cameras: Sequence[str] = ("image",),
    kind: str = "video",
    fps: int = 10,
    episodes_per_file: int = 2,
    aggregate: bool = False,
    stats: bool = True,
    size: tuple[int, int] = (40, 60),
    splits: dict[str, str] | None = None,
    tasks: Sequence[str] = ("pick", "place"),
    codec: str = "libx264",
) -> Path:
    """`kind` video, image or none; `aggregate`: list<> columns and no Hugging Face metadata."""
    names = [f"observation.images.{camera}" for camera in cameras] if kind != "none" else []
    features: dict = {
        name: {"dtype": kind, "shape": [*size, 3], "names": ["height", "width", "channels"]} for name in names
    }
    features["observation.state"] = {"dtype": "float32", "shape": [3], "names": ["x", "y", "z"]}
    features["action"] = {"dtype": "float32", "shape": [3], "names": ["x", "y", "gripper"]}
    for name, dtype in (
        ("timestamp", "float32"),
        ("frame_index", "int64"),
        ("episode_index", "int64"),
        ("index", "int64"),
        ("task_index", "int64"),
    ):
        features[name] = {"dtype": dtype, "shape": [1], "names": None}
    total = int(sum(lengths))
    info = {
        "codebase_version": "v3.0",
        "fps": fps,
        "features": features,
        "total_episodes": len(lengths),
        "total_frames": total,
        "total_tasks": len(tasks),
        "chunks_size": 1000,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "robot_type": "paper",
        "splits": splits or {"train": f"0:{len(lengths)}"},
    }
    for folder in ("meta/episodes/chunk-000", "data/chunk-000"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    if stats:
        (root / "meta/stats.json").write_text(json.dumps({"action": {"mean": [0, 0, 0]}}))
    index = pd.Index(tasks, name="task")
    pd.DataFrame({"task_index": range(len(tasks))}, index=index).to_parquet(root / "meta/tasks.parquet")

    starts = np.concatenate([[0], np.cumsum(lengths)])
    rows = []
    for file, first in enumerate(range(0, len(lengths), episodes_per_file)):
        members = range(first, min(first + episodes_per_file, len(lengths)))
        tables = [
            _rows(e, lengths[e], starts[e], fps, len(tasks), names, kind, aggregate, size) for e in members
        ]
        path = root / f"data/chunk-000/file-{file:03d}.parquet"
        with pq.ParquetWriter(path, tables[0].schema, compression="snappy") as writer:
            for table in tables:
                writer.write_table(table, row_group_size=max(1, table.num_rows))
        for number, name in enumerate(names if kind == "video" else ()):
            video = root / f"videos/{name}/chunk-000/file-{file:03d}.mp4"
            frames = [picture(i, number, *size) for i in range(starts[members[0]], starts[members[-1] + 1])]
            write_video(video, frames, fps, codec)
        for e in members:
            row = {
                "episode_index": e,
                "tasks": [tasks[e % len(tasks)]],
                "length": int(lengths[e]),
                "data/chunk_index": 0,
                "data/file_index": file,
                "dataset_from_index": int(starts[e]),
                "dataset_to_index": int(starts[e + 1]),
            }
            for name in names if kind == "video" else ():
                row[f"videos/{name}/chunk_index"] = 0
                row[f"videos/{name}/file_index"] = file
                row[f"videos/{name}/from_timestamp"] = float((starts[e] - starts[members[0]]) / fps)
                row[f"videos/{name}/to_timestamp"] = float((starts[e + 1] - starts[members[0]]) / fps)
            rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
    return root


def _rows(e, length, start, fps, tasks, names, kind, aggregate, size) -> pa.Table:
    columns = {}
    for name, values in columns_of(e, length).items():
        flat = pa.array(values.reshape(-1))
        if aggregate:
            columns[name] = pa.ListArray.from_arrays(np.arange(length + 1, dtype=np.int32) * 3, flat)
        else:
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, 3)
    t = np.arange(length)
    columns |= {
        "timestamp": pa.array((t / fps).astype(np.float32)),
        "frame_index": pa.array(t),
        "episode_index": pa.array(np.full(length, e)),
        "index": pa.array(t + start),
        "task_index": pa.array(np.full(length, e % tasks)),
    }
    for number, name in enumerate(names if kind == "image" else ()):
        cells = [{"bytes": encode_png(picture(int(i), number, *size)), "path": f"{i}.png"} for i in t + start]
        columns[name] = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    return pa.table(columns)


def encode_png(frame: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return file.getvalue()


def write_video(path: Path, frames: Sequence[np.ndarray], fps: int, codec: str = "libx264") -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        options = {"g": "2", "crf": "20"} | ({"preset": "12"} if codec == "libsvtav1" else {})
        stream = container.add_stream(codec, rate=Fraction(fps), options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
