"""dpipe doctor against the clock: beside one reading by lerobot, and over the metadata of a million episodes.

    python bench/doctor.py [--quick] [--episodes 1000000] [--raw DIR]

Sampled   `dpipe doctor` over the LIBERO sample, converted, in a process of its own; the peer reads every item of the
          same dataset once with lerobot (`dataset[i]` for all i, PyAV), its imports left out. Raw recordings are
          those of ../shared/data or $DPIPE_SAMPLE_DATA, else simulated.
Fast      `dpipe doctor --fast` over synthetic metadata: a million episodes of two cameras, fifty in a file, with
          60,000 files of one byte that only have to be there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from measure import HERE, Goal, Rounds, report

DPIPE = Path(sys.executable).parent / "dpipe"
SAMPLE = Path(os.environ.get("DPIPE_SAMPLE_DATA", HERE.parent.parent / "shared" / "data")) / "libero"
CAMERAS = ("observation.images.image", "observation.images.image2")
IN_A_FILE, LENGTH, FPS = 50, 300, 20
FAST_SECONDS = 10.0
READ = """
import sys, time
import torch
torch.set_num_threads(1)
from lerobot.datasets.lerobot_dataset import LeRobotDataset
dataset = LeRobotDataset("bench/libero", root=sys.argv[1], video_backend="pyav")
started = time.perf_counter()
for position in range(len(dataset)):
    dataset[position]
print(time.perf_counter() - started)
"""


def sample(folder: Path, raw: Path | None) -> Path:
    """The LIBERO sample as a dataset of ours."""
    common = ["--workspace", str(folder)]
    if raw is None:
        subprocess.run(
            [DPIPE, "sample", "libero", "--episodes", "8", *common], check=True, capture_output=True
        )
        raw = folder / "raw" / "libero"
    words = ["convert", "libero", "--raw", str(raw), "--workers", "0", "--allow-dropped", *common]
    subprocess.run([DPIPE, *words], check=True, capture_output=True)
    return folder / "lerobot" / "libero"


def examined(root: Path, *words: str) -> float:
    """Seconds of the whole command, start of Python to exit."""
    started = time.perf_counter()
    subprocess.run([DPIPE, "doctor", str(root), *words], check=True, capture_output=True)
    return time.perf_counter() - started


def read_once(root: Path) -> float:
    """Seconds lerobot takes to read every item, imports and opening left out."""
    run = subprocess.run([sys.executable, "-c", READ, str(root)], check=True, capture_output=True, text=True)
    return float(run.stdout.split()[-1])


def write_metadata(root: Path, episodes: int) -> None:
    """A dataset of `episodes` episodes without payload: every table whole, every other file one byte."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from dpipe.pipeline.tables import write_tasks

    index = {"dtype": "int64", "shape": [1], "names": None}
    vector = {"dtype": "float32", "shape": [7], "names": [*"abcdef", "gripper"]}
    features: dict[str, dict] = {
        **{
            c: {"dtype": "video", "shape": [256, 256, 3], "names": ["height", "width", "channels"]}
            for c in CAMERAS
        },
        "observation.state": vector,
        "action": vector,
        "timestamp": {**index, "dtype": "float32"},
        **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), index),
    }
    tasks = [f"put object {number} into the tray" for number in range(1000)]
    video = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    info = {"codebase_version": "v3.0", "fps": FPS, "features": features, "video_path": video}
    info |= {"data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"}
    info |= {"total_episodes": episodes, "total_frames": episodes * LENGTH, "total_tasks": len(tasks)}
    info |= {"splits": {"train": f"0:{episodes}"}, "chunks_size": 1000, "robot_type": "paper"}
    stats = {}
    for name, told in features.items():
        shape = (3, 1, 1) if told["dtype"] == "video" else tuple(told["shape"])
        levels = {"min": 0.0, "q01": 0.1, "q10": 0.2, "q50": 0.5, "q90": 0.8, "q99": 0.9, "max": 1.0}
        stats[name] = {k: np.full(shape, v).tolist() for k, v in {**levels, "mean": 0.5, "std": 0.2}.items()}
        stats[name]["count"] = [episodes * LENGTH]
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/stats.json").write_text(json.dumps(stats))
    write_tasks(root / "meta/tasks.parquet", tasks)
    number = np.arange(episodes)
    file, within = number // IN_A_FILE, number % IN_A_FILE
    columns: dict[str, object] = {
        "episode_index": number,
        "tasks": pa.ListArray.from_arrays(
            np.arange(episodes + 1, dtype=np.int32), pa.array(tasks).take(pa.array(number % len(tasks)))
        ),
        "length": np.full(episodes, LENGTH),
        "data/chunk_index": file // 1000,
        "data/file_index": file % 1000,
        "dataset_from_index": number * LENGTH,
        "dataset_to_index": (number + 1) * LENGTH,
    }
    for camera in CAMERAS:
        columns |= {f"videos/{camera}/chunk_index": file // 1000, f"videos/{camera}/file_index": file % 1000}
        columns |= {
            f"videos/{camera}/from_timestamp": within * LENGTH / FPS,
            f"videos/{camera}/to_timestamp": (within + 1) * LENGTH / FPS,
        }
    rng = np.random.default_rng(0)
    for name in ("action", "observation.state"):
        for entry in ("min", "max", "mean", "std"):
            flat = pa.array(rng.normal(size=episodes * 7))
            columns[f"stats/{name}/{entry}"] = pa.FixedSizeListArray.from_arrays(flat, 7)
    pq.write_table(
        pa.table(columns), root / "meta/episodes/chunk-000/file-000.parquet", row_group_size=1 << 16
    )
    places = [("data", "parquet"), *((f"videos/{camera}", "mp4") for camera in CAMERAS)]
    for folder, kind in places:
        for part in range(int(file[-1]) + 1):
            path = root / folder / f"chunk-{part // 1000:03d}" / f"file-{part % 1000:03d}.{kind}"
            if part % 1000 == 0:
                path.parent.mkdir(parents=True)
            path.write_bytes(b"\0")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round, a tenth of the episodes")
    parser.add_argument("--episodes", type=int, default=1_000_000)
    parser.add_argument("--raw", type=Path, default=SAMPLE if SAMPLE.is_dir() else None)
    given = parser.parse_args()
    episodes = given.episodes // 10 if given.quick else given.episodes
    rounds, speed = Rounds(), {}
    with tempfile.TemporaryDirectory(prefix="dpipe-doctor-") as name:
        folder = Path(name)
        root = sample(folder, given.raw)
        contenders = {
            "dpipe doctor": lambda: examined(root),
            "dpipe doctor --full": lambda: examined(root, "--full"),
            "lerobot reads it once": lambda: read_once(root),
        }
        rounds.run(1 if given.quick else 3, contenders)
        large = folder / "large"
        write_metadata(large, episodes)
        label = f"dpipe doctor --fast, {episodes:,} episodes"
        rounds.run(1 if given.quick else 3, {label: lambda: examined(large, "--fast")})
    goals = [
        rounds.ratio(
            "reading once with lerobot / dpipe doctor", "lerobot reads it once", "dpipe doctor", 1.0
        ),
        rounds.ratio(
            "reading once with lerobot / dpipe doctor --full",
            "lerobot reads it once",
            "dpipe doctor --full",
            1.0,
        ),
    ]
    slowest = max(rounds.values[label])
    goals.append(Goal(f"{FAST_SECONDS:g} s / --fast over {episodes:,} episodes", FAST_SECONDS / slowest, 1.0))
    return report("doctor", goals, rounds, "s", speed)


if __name__ == "__main__":
    sys.exit(main())
