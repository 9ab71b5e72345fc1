"""Raw CALVIN splits small enough to check by hand: the picture of frame i is filled with i modulo 256.

Not a test file: helpers that test files import with `from raw_calvin import ...`. Vectors obey the format's own
rules: `actions[t]` is the pose of frame t + 1, `rel_actions` its clipped difference.
"""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

Frame = dict[str, np.ndarray]
BLOCK_STORED = {"A": "pink blue red", "B": "red blue pink", "C": "blue red pink", "D": "red blue pink"}
BLOCK_VALUE = {"red": 1.0, "blue": 2.0, "pink": 3.0}


def play_frames(first: int, last: int, scene: str = "D", seed: int = 0) -> dict[int, Frame]:
    """Frames of one play episode; its roll crosses pi, its steps exceed what a relative action can hold."""
    rng = np.random.default_rng([seed, first])
    count = last - first + 1
    pose = np.cumsum(rng.normal(0, 0.012, (count + 1, 6)), axis=0)
    pose[:, 3] = (np.pi + np.cumsum(rng.normal(0, 0.03, count + 1)) + np.pi) % (2 * np.pi) - np.pi
    robot = np.zeros((count + 1, 15))
    robot[:, :6] = pose
    robot[:, 6] = np.linspace(0.08, 0.0, count + 1)
    robot[:, 7:14] = rng.normal(0, 1, (count + 1, 7))
    robot[:, 14] = np.where(np.arange(count + 1) < count // 2, 1.0, -1.0)
    scene_obs = np.zeros(24)
    scene_obs[:6] = np.arange(6) / 10
    for slot, block in enumerate(BLOCK_STORED[scene].split()):
        scene_obs[6 + 6 * slot : 12 + 6 * slot] = BLOCK_VALUE[block]
    frames: dict[int, Frame] = {}
    for t in range(count):
        actions = np.concatenate([robot[t + 1, :6], robot[t + 1, 14:15]])
        frames[first + t] = {
            "actions": actions,
            "rel_actions": slow_relative(actions, robot[t]),
            "robot_obs": robot[t],
            "scene_obs": scene_obs,
            "rgb_static": np.full((12, 12, 3), (first + t) % 256, np.uint8),
            "rgb_gripper": np.full((6, 6, 3), 255 - (first + t) % 256, np.uint8),
            "rgb_tactile": np.stack([np.full((10, 8), c, np.uint8) for c in range(6)], axis=-1),
            "depth_static": np.full((12, 12), 5.0, np.float32),
            "depth_gripper": np.full((6, 6), 0.5, np.float32),
        }
    return frames


def slow_relative(actions: np.ndarray, robot_obs: np.ndarray) -> np.ndarray:
    """calvin_env's definition, one number at a time."""
    out = []
    for i in range(3):
        out.append(max(-0.02, min(0.02, actions[i] - robot_obs[i])) / 0.02)
    for i in range(3, 6):
        turn = (actions[i] - robot_obs[i] + np.pi) % (2 * np.pi) - np.pi
        out.append(max(-0.05, min(0.05, turn)) / 0.05)
    return np.array([*out, actions[6]])


def write_split(
    folder: Path,
    plays: Sequence[tuple[int, int]],
    windows: Sequence[tuple[int, int, str, str]] = (),
    scenes: dict[str, tuple[int, int]] | None = None,
    change: Callable[[dict[int, Frame]], None] = lambda frames: None,
    digits: int = 7,
    language: str | None = "lang_annotations",
) -> Path:
    """One of training and validation: play episodes (first, last), windows (start, end, sentence, task).

    `change` may alter or remove frames before they are written.
    """
    (folder / ".hydra").mkdir(parents=True)
    letters = {"D": (0, 1 << 40)} if scenes is None else scenes
    frames: dict[int, Frame] = {}
    for first, last in plays:
        scene = next((s for s, (a, b) in letters.items() if a <= first <= b), "D")
        frames |= play_frames(first, last, scene)
    change(frames)
    for frame, members in frames.items():
        np.savez_compressed(folder / f"episode_{frame:0{digits}d}.npz", **members)
    np.save(folder / "ep_start_end_ids.npy", np.array(plays, np.int64))
    np.save(folder / "ep_lens.npy", np.array([b - a + 1 for a, b in plays], np.int64))
    if scenes is None or scenes:
        named = {f"calvin_scene_{s}": [a, min(b, plays[-1][1])] for s, (a, b) in letters.items()}
        np.save(folder / "scene_info.npy", np.array(named, object))
    if language is not None:
        annotations = {
            "language": {
                "ann": [w[2] for w in windows],
                "task": [w[3] for w in windows],
                "emb": np.zeros((len(windows), 1, 4), np.float32),
            },
            "info": {"indx": [(np.int64(w[0]), np.int64(w[1])) for w in windows], "episodes": []},
        }
        (folder / language).mkdir(exist_ok=True)
        np.save(folder / language / "auto_lang_ann.npy", np.array(annotations, object))
    return folder


def zip_dataset(folder: Path, method: int = zipfile.ZIP_STORED) -> Path:
    """The dataset `folder` as its publisher packs it, beside it; the folder itself is left."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    return path
