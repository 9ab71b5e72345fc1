"""Raw AgiBot World episodes, shaped and typed as the published files are, empty arrays included.

Not a test file: helpers that test files import with `from raw_agibot import ...`.
"""

import json
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from raw_egodex import write_video

EMPTY = np.zeros(0, np.float32)
MAIN = ("head", "hand_left", "hand_right")
Tree = dict[str, np.ndarray]


def proprio(
    frames: int = 60, seed: int = 0, effector: str = "both", grippers: tuple[float, float] = (0, 120)
) -> Tree:
    """Datasets of one proprio_stats.h5 by path; arm, head and waist actions equal the state, as released.

    `effector`: "both" (N, 2), "sides" (left_effector and right_effector), "joints" (16 joints), "hand" (N, 12).
    Grippers are told 0 (open), then 1, then 0 and follow ten frames later, from `grippers` open to closed.
    """
    rng = np.random.default_rng(seed)
    joint = np.cumsum(rng.normal(0, 0.01, (frames, 14)), axis=0) + np.linspace(-1, 1, 14)
    quat = rng.normal(size=(frames, 2, 4))
    quat /= np.linalg.norm(quat, axis=2, keepdims=True)
    end = rng.uniform(0.2, 0.8, (frames, 2, 3))
    told = np.repeat(((np.arange(frames) // 20) % 2 == 1).astype(float)[:, None], 2, axis=1)
    late = np.concatenate([np.repeat(told[:1], 10, axis=0), told])[:frames]
    opened, closed = grippers
    reading = opened + (closed - opened) * late
    hand = rng.uniform(0, 1, (frames, 12))
    stamps = 1_740_000_000_000_000_000 + np.cumsum(
        np.full(frames, 33_333_333) + rng.integers(-5, 5, frames) * 10**6
    )
    tree: Tree = {
        "timestamp": stamps.astype(np.int64),
        "state/end/position": end,
        "state/end/orientation": quat,
        "state/end/angular": EMPTY,
        "state/end/velocity": EMPTY,
        "state/end/wrench": EMPTY,
        "state/head/position": np.tile([0.1, 0.4], (frames, 1)),
        "state/head/effort": EMPTY,
        "state/head/velocity": EMPTY,
        "state/joint/position": joint,
        "state/joint/current_value": rng.integers(-900, 900, (frames, 14)).astype(float),
        "state/joint/effort": EMPTY,
        "state/joint/velocity": EMPTY,
        "state/robot/position": np.tile([0.3, 0.1, 0.0], (frames, 1)),
        "state/robot/orientation": np.tile([0.0, 0.0, 0.6, 0.8], (frames, 1)),
        "state/robot/orientation_drift": EMPTY,
        "state/robot/position_drift": EMPTY,
        "state/waist/position": np.tile([0.54, 0.28], (frames, 1)),
        "state/waist/effort": EMPTY,
        "state/waist/velocity": EMPTY,
        "action/end/position": end,
        "action/end/orientation": quat,
        "action/end/index": np.arange(2, frames),
        "action/head/position": np.tile([0.1, 0.4], (frames, 1)),
        "action/head/index": np.arange(frames),
        "action/joint/position": joint,
        "action/joint/index": np.arange(2, frames),
        "action/joint/effort": EMPTY,
        "action/joint/velocity": EMPTY,
        "action/robot/velocity": np.tile([0.2, -0.1], (frames, 1)),
        "action/robot/index": np.arange(frames),
        "action/robot/position": EMPTY,
        "action/robot/orientation": EMPTY,
        "action/waist/position": np.tile([0.54, 0.28], (frames, 1)),
        "action/waist/index": np.arange(frames),
    }
    if effector == "sides":
        for i, side in enumerate(("left", "right")):
            tree[f"state/{side}_effector/position"] = reading[:, i : i + 1]
            tree[f"state/{side}_effector/force"] = EMPTY
            tree[f"action/{side}_effector/position"] = told[:, i : i + 1]
            tree[f"action/{side}_effector/index"] = np.arange(frames)
        return tree
    tree["state/effector/force"] = EMPTY
    if effector == "joints":
        tree["state/joint/position"] = np.concatenate([joint, reading], axis=1)
        tree["action/joint/position"] = np.concatenate([joint, told], axis=1)
        tree["state/effector/position"] = tree["action/effector/position"] = EMPTY
    else:
        tree["state/effector/position"] = hand if effector == "hand" else reading
        tree["action/effector/position"] = np.roll(hand, -1, axis=0) if effector == "hand" else told
        tree["action/effector/index"] = np.arange(frames)
    return tree


def write_h5(path: Path, tree: Mapping[str, np.ndarray]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in tree.items():
            file.create_dataset(name, data=array)
    return path


def write_episode(
    raw: Path,
    episode: int = 648649,
    task: int = 327,
    tree: Tree | None = None,
    change: Callable[[Tree], None] = lambda tree: None,
    videos: Mapping[str, int] | None = None,
    entry: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """One episode in all three places; `videos` gives the frames of each file below its folder."""
    tree = proprio(**options) if tree is None else tree
    frames = len(tree["timestamp"])
    change(tree)
    write_h5(raw / "proprio_stats" / str(task) / str(episode) / "proprio_stats.h5", tree)
    folder = raw / "observations" / str(task) / str(episode)
    if videos is None:
        videos = {f"videos/{camera}_color.mp4": frames for camera in MAIN}
    made: dict[int, Path] = {}
    for name, count in videos.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if count in made:
            shutil.copy(made[count], path)
        else:
            write_video(path, count)
            made[count] = path
    add_entry(raw, task, {"episode_id": episode} if entry is None else entry)
    return raw


def add_entry(raw: Path, task: int, entry: Mapping[str, Any]) -> None:
    path = raw / "task_info" / f"task_{task}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = json.loads(path.read_text()) if path.exists() else []
    stretches = [
        {"start_frame": 8, "end_frame": 30, "action_text": "Pick up the apple.", "skill": "Pick"},
        {"start_frame": 30, "end_frame": 55, "action_text": "Place it in the bag.", "skill": "Place"},
    ]
    whole = {
        "task_name": "Pickup items in the supermarket",
        "init_scene_text": "The robot stands in front of the fruit stand.",
        "label_info": {"action_config": stretches},
    }
    path.write_text(json.dumps([*entries, whole | dict(entry)]))


def pack(raw: Path, task: int = 327) -> None:
    """Move a task's episodes into tars as published: observations per task, proprio_stats over tasks."""
    observations = raw / "observations" / str(task)
    episodes = sorted(path for path in observations.iterdir() if path.is_dir())
    name = f"{episodes[0].name}-{episodes[-1].name}.tar"
    with tarfile.open(observations / name, "w") as archive:
        for path in episodes:
            archive.add(path, path.name)
            shutil.rmtree(path)
    proprio_folder = raw / "proprio_stats"
    with tarfile.open(proprio_folder / name, "w") as archive:
        archive.add(proprio_folder / str(task), str(task))
    shutil.rmtree(proprio_folder / str(task))
    parameters = raw / "parameters"
    if parameters.is_dir():
        with tarfile.open(parameters / name, "w") as archive:
            archive.add(parameters / str(task), str(task))
        shutil.rmtree(parameters / str(task))
