"""Raw LIBERO files small enough to check by hand: `action[t] = t / 100`, pictures whose first pixel is their row.

Not a test file: helpers that test files import with `from raw_libero import ...`.
"""

import json
from pathlib import Path

import h5py
import numpy as np

GOAL_TASK = "put_the_red_cube_in_the_tray"


def demo_arrays(steps: int, seed: int = 0, side: int = 32) -> dict[str, np.ndarray]:
    """Arrays of one demonstration, raw-release pairing: obs[t] is taken after actions[t], states[t] before."""
    rng = np.random.default_rng(seed)
    joints = np.cumsum(rng.uniform(0.02, 0.05, (steps + 1, 7)), axis=0)
    states = np.zeros((steps, 45))
    states[:, 0] = 0.5 + 0.05 * np.arange(steps)
    states[:, 1:8] = joints[:-1]
    ee_pos = np.stack([0.1 + 0.01 * np.arange(steps), np.zeros(steps), np.ones(steps)], axis=1)
    ee_ori = np.tile([3.1, 0.02, -0.01], (steps, 1))
    gripper = np.tile([0.04, -0.04], (steps, 1))
    actions = np.zeros((steps, 7))
    actions[:, 0] = np.arange(steps) / 100
    actions[:, 1] = 0.5
    actions[:, 6] = np.where(np.arange(steps) < steps // 2, -1.0, 1.0)
    quat = np.tile([1.0, 0.0, 0.0, 0.0], (steps, 1))
    # A smooth scene with a square that walks: neighbouring frames are alike, and each can be told from the others.
    grid = np.linspace(40, 200, side)
    picture = np.stack([np.add.outer(grid, np.zeros(side)), np.add.outer(np.zeros(side), grid)], -1)
    frames = np.zeros((steps, side, side, 3), np.uint8)
    frames[..., :2] = picture
    for t in range(steps):
        row, column = divmod((3 * t) % (side * side // 16), side // 4)
        frames[t, 4 * row : 4 * row + 6, 4 * column : 4 * column + 6, 2] = 250
    return {
        "actions": actions,
        "states": states,
        "robot_states": np.concatenate([gripper, ee_pos, quat], axis=1),
        "rewards": np.eye(1, steps, steps - 1, dtype=np.uint8)[0],
        "dones": np.eye(1, steps, steps - 1, dtype=np.uint8)[0],
        "obs/agentview_rgb": frames,
        "obs/eye_in_hand_rgb": frames[:, :, ::-1].copy(),
        "obs/ee_pos": ee_pos,
        "obs/ee_ori": ee_ori,
        "obs/ee_states": np.concatenate([ee_pos, ee_ori], axis=1),
        "obs/gripper_states": gripper,
        "obs/joint_states": joints[1:],
    }


def write_raw(path: Path, demos: dict[int, dict[str, np.ndarray]], regenerated: bool = False) -> Path:
    """One task file; `regenerated`: no attributes, observations taken before their action."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if not regenerated:
            data.attrs["macros_image_convention"] = "opengl"
            data.attrs["num_demos"] = len(demos)
            data.attrs["total"] = sum(len(d["actions"]) for d in demos.values())
            problem = {
                "problem_name": "libero_tabletop_manipulation",
                "language_instruction": "put red in tray",
            }
            data.attrs["problem_info"] = json.dumps(problem)
        for number, arrays in demos.items():
            group = data.create_group(f"demo_{number}")
            if not regenerated:
                group.attrs["num_samples"] = len(arrays["actions"])
                group.attrs["init_state"] = arrays["states"][0] if len(arrays["states"]) else np.zeros(45)
            for name, array in arrays.items():
                stored = array
                if regenerated and name == "obs/joint_states":
                    stored = arrays["states"][:, 1:8]
                group.create_dataset(name, data=stored)
    return path


def write_suite(
    raw: Path, demos: int = 3, steps: int = 12, suite: str = "libero_goal", side: int = 32
) -> Path:
    """A raw folder with one sound task file."""
    arrays = {i: demo_arrays(steps + i, seed=i, side=side) for i in range(demos)}
    return write_raw(raw / suite / f"{GOAL_TASK}_demo.hdf5", arrays)
