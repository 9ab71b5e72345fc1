"""Sound datasets as other people record them: robots, cameras, writers and habits of all kinds. Helpers.

    VARIANTS    name -> a function that writes one into a folder

Everything is written by lerobot's own writer or tools; nothing of ours is in the way. What the pictures show
follows from the state, late or early by nothing, unless the variant says otherwise.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HEIGHT, WIDTH = 48, 64
VARIANTS: dict[str, Callable[[Path], Path]] = {}


def variant(build: Callable[[Path], Path]) -> Callable[[Path], Path]:
    VARIANTS[build.__name__.replace("_", " ")] = build
    return build


@dataclass(frozen=True)
class Take:
    """One episode: vectors [T, D] by feature, pictures [T, H, W, C] by camera, its sentence."""

    columns: dict[str, np.ndarray]
    pictures: dict[str, np.ndarray]
    task: str = "put the cube into the tray"


def record(
    root: Path,
    takes: Sequence[Take],
    fps: int = 20,
    names: dict[str, Any] | None = None,
    kinds: dict[str, str] | None = None,
    features: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Write with LeRobotDataset, frame by frame as its recorder does."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    first = takes[0]
    told = {
        camera: {
            "dtype": (kinds or {}).get(camera, "video"),
            "shape": pictures.shape[1:],
            "names": ["height", "width", "channels"],
        }
        for camera, pictures in first.pictures.items()
    }
    for name, values in first.columns.items():
        told[name] = {
            "dtype": str(values.dtype),
            "shape": values.shape[1:],
            "names": (names or {}).get(name),
        }
    for name, more in (features or {}).items():
        told[name] = {**told[name], **more}
    made = LeRobotDataset.create("zoo/set", fps=fps, features=told, root=root, **settings)
    for take in takes:
        frames = len(next(iter(take.columns.values())))
        for t in range(frames):
            made.add_frame(
                {name: values[t] for name, values in {**take.columns, **take.pictures}.items()}
                | {"task": take.task}
            )
        made.save_episode()
    made.finalize()
    return root


# --- motion -------------------------------------------------------------------------------------------------


def glide(rng: np.random.Generator, frames: int, dims: int, rests: bool = True) -> np.ndarray:
    """[frames, dims]: from pose to pose with smooth speed, now and then at rest."""
    path, here = [], rng.uniform(-1, 1, dims)
    while len(path) < frames:
        there, steps = rng.uniform(-1, 1, dims), int(rng.integers(12, 26))
        s = np.linspace(0, 1, steps, endpoint=False)[:, None]
        path += list(here + (there - here) * (3 * s**2 - 2 * s**3))
        if rests and rng.random() < 0.5:
            path += [there] * int(rng.integers(2, 10))
        here = there
    return np.array(path[:frames])


def follow(command: np.ndarray, lag: float, rng: np.random.Generator, noise: float = 0.0) -> np.ndarray:
    """The pose of a servo that closes a part of the gap each frame: it trails its command by about `lag` frames."""
    pose = np.empty_like(command)
    pose[0] = command[0]
    for t in range(1, len(command)):
        pose[t] = pose[t - 1] + (command[t - 1] - pose[t - 1]) / lag
    return pose + rng.normal(0, noise, pose.shape)


def grip(rng: np.random.Generator, frames: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """[frames]: open, closed for the middle, open again."""
    first, second = sorted(rng.integers(frames // 6, frames - frames // 6, 2))
    t = np.arange(frames)
    return np.where((t >= first) & (t < max(second, first + 4)), low, high)


def view(
    pose: np.ndarray,
    seed: int,
    height: int = HEIGHT,
    width: int = WIDTH,
    noise: float = 2.0,
    moves: bool = False,
) -> np.ndarray:
    """[T, H, W, 3]: a textured table with an arm whose tip goes where the first two dimensions say.

    `moves`: the camera is on the wrist, so that the table goes by instead. `noise` in grey levels, as sensors have.
    """
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(40, 200, (12, 16, 3))
    table = np.kron(coarse, np.ones((2 * height // 12 + 1, 2 * width // 16 + 1, 1)))
    y, x = np.mgrid[:height, :width]
    frames = np.empty((len(pose), height, width, 3))
    for t, values in enumerate(pose):
        u, v = np.clip(values[:2] if len(values) > 1 else [values[0], 0], -1.2, 1.2)
        if moves:
            top, left = int((v + 1.3) * height / 2.7), int((u + 1.3) * width / 2.7)
            frames[t] = table[top : top + height, left : left + width]
        else:
            frames[t] = table[:height, :width]
            column, row = (u + 1.3) / 2.6 * width, (v + 1.3) / 2.6 * height
            arm = np.abs(x - column - (y - row) * 0.3) < 2.5
            frames[t][arm & (y <= row + 2)] = (60, 60, 70)
            frames[t][(np.abs(x - column) < 5) & (np.abs(y - row) < 4)] = (220, 150, 30)
    return np.clip(frames + rng.normal(0, noise, frames.shape), 0, 255).astype(np.uint8)


def arm_takes(
    seed: int,
    lengths: Sequence[int] = (60, 48, 71, 55, 64),
    dims: int = 6,
    lag: float = 2.5,
    cameras: Sequence[str] = ("front", "wrist"),
    noise: float = 2.0,
    unit: float = 1.0,
    one_table: bool = False,
    **look: Any,
) -> list[Take]:
    """Leader and follower: the action is the leader's joints, the last dimension a gripper of any opening.

    `one_table`: all episodes in one place, each camera with its own view of it.
    """
    takes = []
    for e, frames in enumerate(lengths):
        rng = np.random.default_rng([seed, e])
        leader = glide(rng, frames, dims)
        leader[:, -1] = follow(grip(rng, frames)[:, None], 3.0, rng)[:, 0]
        state = follow(leader, lag, rng, 0.002)
        places = {name: seed * 31 + (97 * c if one_table else e) for c, name in enumerate(cameras)}
        pictures = {
            f"observation.images.{name}": view(state, place, noise=noise, moves=name == "wrist", **look)
            for name, place in places.items()
        }
        columns = {
            "observation.state": (unit * state).astype(np.float32),
            "action": (unit * leader).astype(np.float32),
        }
        takes.append(Take(columns, pictures, ("pick up the cube", "open the drawer")[e % 2]))
    return takes


SO101 = [
    f"{j}.pos" for j in ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
]
BOTH = {"observation.state": SO101, "action": SO101}


# --- robots -------------------------------------------------------------------------------------------------


@variant
def so101_in_degrees(root: Path) -> Path:
    """lerobot's own arms: motors in degrees, two cameras, AV1 as the recorder writes it."""
    return record(root, arm_takes(1, unit=90.0), fps=30, names=BOTH, robot_type="so101_follower")


# Its queue drops frames that come faster than they are encoded: on a busy machine, any of the default's 30.
STREAMED: dict[str, Any] = {"streaming_encoding": True, "encoder_queue_maxsize": 1000}


@variant
def so101_streamed(root: Path) -> Path:
    return record(root, arm_takes(2, unit=90.0), fps=30, names=BOTH, **STREAMED)


@variant
def pictures_in_the_rows(root: Path) -> Path:
    return record(root, arm_takes(3, lengths=(30, 41, 28)), names=BOTH, use_videos=False, kinds=_images(2))


def _images(count: int) -> dict[str, str]:
    return {f"observation.images.{name}": "image" for name in ("front", "wrist")[:count]}


@variant
def a_servo_that_trails_by_ten_frames(root: Path) -> Path:
    return record(root, arm_takes(4, lag=10.0, lengths=(90, 80, 100, 95)), fps=50, names=BOTH)


@variant
def aloha_with_two_arms(root: Path) -> Path:
    """Fourteen motors in a nested group; one arm moves while the other rests, in half of the episodes each."""
    takes = []
    for e, frames in enumerate((60, 66, 58, 70, 62, 64)):
        rng = np.random.default_rng([50, e])
        leader = np.zeros((frames, 14))
        mine = slice(0, 7) if e % 2 else slice(7, 14)
        leader[:, mine] = glide(rng, frames, 7)
        leader[:, [6, 13]] = np.abs(leader[:, [6, 13]])
        state = follow(leader, 2.5, rng)
        pictures = {
            "observation.images.cam_high": view(state[:, mine], 500 + e, noise=0),
            "observation.images.cam_left_wrist": view(state[:, 0:7], 510 + e, noise=0, moves=True),
            "observation.images.cam_right_wrist": view(state[:, 7:14], 520 + e, noise=0, moves=True),
        }
        columns = {"observation.state": state.astype(np.float32), "action": leader.astype(np.float32)}
        takes.append(Take(columns, pictures))
    names = [f"{side}_{joint}" for side in ("left", "right") for joint in ALOHA]
    return record(root, takes, fps=50, names={"observation.state": names, "action": names})


ALOHA = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")


@variant
def pusht(root: Path) -> Path:
    """Two numbers in pixels under a nested name, rewards beside them, small square pictures, 10 fps."""
    takes = []
    for e, frames in enumerate((50, 61, 44, 58)):
        rng = np.random.default_rng([60, e])
        goal = glide(rng, frames, 2, rests=False)
        state = follow(goal, 1.6, rng)
        columns = {
            "observation.state": (256 + 200 * state).astype(np.float32),
            "action": (256 + 200 * goal).astype(np.float32),
            "next.reward": np.linspace(0, 1, frames, dtype=np.float32)[:, None],
            "next.done": (np.arange(frames) == frames - 1)[:, None],
            "next.success": (np.arange(frames) == frames - 1)[:, None],
        }
        takes.append(
            Take(columns, {"observation.image": view(state, 600 + e, 48, 48, noise=0)}, "Push the T")
        )
    names = {name: {"motors": ["motor_0", "motor_1"]} for name in ("observation.state", "action")}
    return record(root, takes, fps=10, names=names)


@variant
def libero_without_names(root: Path) -> Path:
    """Deltas of the hand and a gripper of -1 and 1; one name for the whole vector, as published sets have it."""
    takes = []
    for e, frames in enumerate((60, 52, 70, 57)):
        rng = np.random.default_rng([70, e])
        pose = glide(rng, frames + 1, 6)
        delta = np.clip(np.diff(pose, axis=0) * 8, -1, 1)
        hand = follow(grip(rng, frames, 0.0, 0.04)[:, None], 3.0, rng)
        state = np.concatenate([pose[:-1], hand, -hand], axis=1)
        action = np.concatenate([delta, np.where(hand > 0.02, -1.0, 1.0)], axis=1)
        pictures = {
            "observation.images.image": view(pose[:-1], 700 + e, noise=0),
            "observation.images.wrist_image": view(pose[:-1], 710 + e, noise=0, moves=True),
        }
        columns = {"observation.state": state.astype(np.float32), "action": action.astype(np.float32)}
        takes.append(Take(columns, pictures))
    return record(root, takes, fps=10, names={"observation.state": ["state"], "action": ["actions"]})


@variant
def velocities_and_forces(root: Path) -> Path:
    """A base that is steered by speed, with a wheel's angle that wraps and forces that jump at contact."""
    takes = []
    for e, frames in enumerate((80, 73, 90)):
        rng = np.random.default_rng([80, e])
        speed = glide(rng, frames, 2) * 0.4
        measured = follow(speed, 2.0, rng, 0.01)
        heading = np.cumsum(0.5 * measured[:, 1]) + 3.0
        wheel = (heading + np.pi) % (2 * np.pi) - np.pi
        force = np.where(rng.random(frames) < 0.05, rng.uniform(5, 40, frames), rng.normal(0, 0.2, frames))
        state = np.stack([measured[:, 0], measured[:, 1], wheel, force], axis=1)
        columns = {"observation.state": state.astype(np.float32), "action": speed.astype(np.float32)}
        pictures = {"observation.images.front": view(np.cumsum(measured, axis=0) / 8, 800 + e, moves=True)}
        takes.append(Take(columns, pictures, "drive to the door"))
    names = {
        "observation.state": ["base_vel_x", "base_vel_theta", "steering_joint_pos", "force_z"],
        "action": ["base_vel_x", "base_vel_theta"],
    }
    return record(root, takes, fps=15, names=names)


@variant
def unused_dimensions(root: Path) -> Path:
    """An arm in a body's vector: joints that never move, a second hand of zeros, its quaternion too."""
    takes = []
    for e, take in enumerate(arm_takes(9, lengths=(50, 61, 47, 55))):
        frames = len(take.columns["action"])
        joints = take.columns["observation.state"][:, :6]
        rest = np.zeros((frames, 8), np.float32)
        rest[:, 6] = 0.3
        state = np.concatenate([joints, rest], axis=1)
        action = np.concatenate([take.columns["action"], np.zeros((frames, 3), np.float32)], axis=1)
        takes.append(Take({"observation.state": state, "action": action}, take.pictures, f"task {e} of many"))
    names = {
        "observation.state": [
            *SO101,
            "left_qx",
            "left_qy",
            "left_qz",
            "left_qw",
            "waist",
            "neck",
            "torso",
            "left_gripper",
        ],
        "action": [*SO101, "wheel_x", "wheel_y", "lift"],
    }
    return record(root, takes, fps=25, names=names)


@variant
def angles_in_degrees(root: Path) -> Path:
    """A pose whose rotation vector and Euler angles are degrees in every episode: unusual, and meant."""
    takes = []
    for e, frames in enumerate((60, 55, 66)):
        rng = np.random.default_rng([90, e])
        goal = glide(rng, frames, 6) * [0.3, 0.3, 0.3, 80, 80, 80]
        state = follow(goal, 2.5, rng)
        columns = {"observation.state": state.astype(np.float32), "action": goal.astype(np.float32)}
        takes.append(Take(columns, {"observation.images.front": view(state[:, :2] * 3, 900 + e)}))
    names = ["x", "y", "z", "euler_x", "euler_y", "euler_z"]
    return record(root, takes, names={"observation.state": names, "action": names})


@variant
def coarse_encoders_and_long_rests(root: Path) -> Path:
    """Joints to a degree, a person who waits for seconds and then only opens and closes the hand."""
    takes = []
    for e, frames in enumerate((110, 120, 105)):
        rng = np.random.default_rng([100, e])
        joints = np.concatenate([glide(rng, frames - 60, 5), np.zeros((60, 5))])
        joints[frames - 60 :] = joints[frames - 61]
        hand = np.where(np.arange(frames) % 30 < 15, 0.0, 1.0)[:, None]
        state = np.round(follow(joints, 2.0, rng) * 60)
        action = np.concatenate([np.round(joints * 60), hand], axis=1)
        columns = {"observation.state": state.astype(np.float32), "action": action.astype(np.float32)}
        takes.append(Take(columns, {"observation.images.front": view(state / 60, 1000 + e)}))
    return record(root, takes, names={"observation.state": SO101[:5], "action": SO101})


@variant
def widths_that_fit_the_object(root: Path) -> Path:
    """A gripper told how far to close: another two values in every episode."""
    takes = []
    for e, (frames, width) in enumerate(((60, 0.021), (64, 0.034), (58, 0.012), (70, 0.027))):
        rng = np.random.default_rng([110, e])
        joints = glide(rng, frames, 3)
        hand = grip(rng, frames, width, 0.08)[:, None]
        action = np.concatenate([joints, hand], axis=1)
        columns = {"observation.state": follow(action, 2.0, rng).astype(np.float32)}
        columns["action"] = action.astype(np.float32)
        shown = view(columns["observation.state"], 1100 + e)
        takes.append(Take(columns, {"observation.images.front": shown}))
    names = ["x", "y", "z", "gripper_width"]
    return record(root, takes, names={"observation.state": names, "action": names})


@variant
def an_episode_in_which_nothing_is_done(root: Path) -> Path:
    """The person waited for the recording to end: neither command nor joints change, the picture only hums."""
    takes = arm_takes(12, lengths=(55, 60, 52, 58))
    still = {name: np.repeat(values[:1], 40, axis=0) for name, values in takes[1].columns.items()}
    pictures = {
        name: view(np.repeat(still["observation.state"], 1, axis=0), 1200, moves="wrist" in name)
        for name in takes[1].pictures
    }
    takes[1] = Take(still, pictures, takes[1].task)
    return record(root, takes, names=BOTH)


# --- cameras ------------------------------------------------------------------------------------------------


@variant
def a_camera_that_sees_nothing_move(root: Path) -> Path:
    """A simulated camera turned to the wall: not one pixel ever changes, in no episode."""
    takes = arm_takes(20, cameras=("front",), noise=0.0)
    wall = view(np.zeros((1, 2)), 2000, noise=0.0)
    for take in takes:
        take.pictures["observation.images.wall"] = np.repeat(wall, len(take.columns["action"]), axis=0)
    return record(root, takes, names=BOTH)


@variant
def a_robot_that_waits_before_it_moves(root: Path) -> Path:
    """A simulator's equal first second in every episode, pixel for pixel, with numbers that differ a little."""
    takes = []
    for e, take in enumerate(arm_takes(21, lengths=(70, 62, 80, 66), cameras=("front",), noise=0.0)):
        lead = 24
        state = np.concatenate(
            [np.zeros((lead, 6)), take.columns["observation.state"] - take.columns["observation.state"][0]]
        )
        action = np.concatenate([np.zeros((lead, 6)), take.columns["action"] - take.columns["action"][0]])
        state[:lead] += np.random.default_rng(e).normal(0, 1e-5, (lead, 6))
        shown = view(np.where(np.arange(len(state))[:, None] < lead, 0, state), 2100, noise=0.0)
        columns = {"observation.state": state.astype(np.float32), "action": action.astype(np.float32)}
        takes.append(Take(columns, {"observation.images.front": shown}, take.task))
    return record(root, takes, names=BOTH)


@variant
def an_arm_that_leaves_the_picture(root: Path) -> Path:
    """A camera over the tray: in the first half of each episode the arm is elsewhere."""
    takes = []
    for e, take in enumerate(arm_takes(22, lengths=(100, 90, 96), cameras=("front",), noise=0.0)):
        state = take.columns["observation.state"].astype(np.float64)
        away = np.arange(len(state)) < len(state) // 2
        shown = view(np.where(away[:, None], 0.0, state), 2200 + e, noise=0.0)
        takes.append(Take(take.columns, {"observation.images.tray": shown}, take.task))
    return record(root, takes, names=BOTH)


@variant
def one_colour_a_frame(root: Path) -> Path:
    """Pictures that only count frames, as people write to try a pipeline."""
    takes = []
    for take in arm_takes(23, lengths=(30, 41, 36), cameras=()):
        frames = len(take.columns["action"])
        levels = (40 + 4 * np.arange(frames))[:, None, None, None]
        shown = np.broadcast_to(levels, (frames, HEIGHT, WIDTH, 3)).astype(np.uint8)
        takes.append(Take(take.columns, {"observation.images.front": shown}, take.task))
    return record(root, takes, names=BOTH)


@variant
def noise_for_everything(root: Path) -> Path:
    """Random numbers and random pictures that have nothing to do with each other."""
    takes = []
    for e, frames in enumerate((30, 48, 62, 41, 55)):
        rng = np.random.default_rng([24, e])
        columns = {
            "observation.state": rng.normal(size=(frames, 6)).astype(np.float32),
            "action": rng.normal(size=(frames, 6)).astype(np.float32),
        }
        shown = rng.integers(0, 256, (frames, HEIGHT, WIDTH, 3), np.uint8)
        takes.append(Take(columns, {"observation.images.front": shown}))
    return record(root, takes, names=BOTH)


@variant
def walks_beside_a_clockwork(root: Path) -> Path:
    """Random walks, and pictures that move on their own: whatever fits does so by chance."""
    from defects import scene

    takes = []
    for e, frames in enumerate((34, 29, 41, 52, 45)):
        rng = np.random.default_rng([25, e])
        path = np.cumsum(rng.normal(0, 0.05, (frames + 1, 3)), axis=0)
        columns = {
            "observation.state": path[:-1].astype(np.float32),
            "action": path[1:].astype(np.float32),
        }
        takes.append(
            Take(columns, {"observation.images.front": np.stack([scene(t, e) for t in range(frames)])})
        )
    names = ["x", "y", "gripper"]
    return record(root, takes, fps=10, names={"observation.state": names, "action": names})


@variant
def depth_beside_colour(root: Path) -> Path:
    """Depth in millimetres, coded as twelve bits of HEVC without loss."""
    takes = arm_takes(26, lengths=(24, 30, 27), cameras=("front",))
    for take in takes:
        grey = take.pictures["observation.images.front"].mean(axis=-1, keepdims=True)
        take.pictures["observation.images.front_depth"] = (500 + 10 * grey).astype(np.uint16)
    depth = {"observation.images.front_depth": {"info": {"is_depth_map": True}}}
    return record(root, takes, names=BOTH, features=depth)


@variant
def depth_in_the_rows(root: Path) -> Path:
    takes = arm_takes(27, lengths=(14, 20), cameras=("front",))
    for take in takes:
        grey = take.pictures["observation.images.front"].mean(axis=-1, keepdims=True)
        take.pictures["observation.images.front_depth"] = (500 + 10 * grey).astype(np.uint16)
    depth = {"observation.images.front_depth": {"info": {"is_depth_map": True}}}
    kinds = {"observation.images.front": "image", "observation.images.front_depth": "image"}
    return record(root, takes, names=BOTH, use_videos=False, kinds=kinds, features=depth)


# --- codecs and files ---------------------------------------------------------------------------------------


@variant
def h264_with_long_groups_and_b_frames(root: Path) -> Path:
    from lerobot.configs.video import RGBEncoderConfig

    encoder = RGBEncoderConfig(vcodec="h264", g=250, crf=23, preset="medium", extra_options={"bf": 3})
    return record(root, arm_takes(30), names=BOTH, rgb_encoder=encoder)


@variant
def av1_with_long_groups(root: Path) -> Path:
    """SVT-AV1's own hierarchy of pictures, shown in another order than coded."""
    from lerobot.configs.video import RGBEncoderConfig

    encoder = RGBEncoderConfig(vcodec="libsvtav1", g=160, crf=35, preset=10)
    return record(root, arm_takes(31), names=BOTH, rgb_encoder=encoder)


@variant
def hevc(root: Path) -> Path:
    from lerobot.configs.video import RGBEncoderConfig

    encoder = RGBEncoderConfig(vcodec="hevc", g=30, crf=28, preset="fast")
    return record(root, arm_takes(32, lengths=(40, 52, 47)), names=BOTH, rgb_encoder=encoder)


@variant
def several_files_and_episodes_a_file(root: Path) -> Path:
    """Files of some hundred kilobytes: data and videos are cut at different episodes."""
    return record(
        root,
        arm_takes(33, lengths=(40, 52, 47, 60, 33, 45, 58), noise=12.0),
        names=BOTH,
        video_files_size_in_mb=1,
        data_files_size_in_mb=1,
    )


@variant
def episodes_of_one_to_three_frames(root: Path) -> Path:
    return record(root, arm_takes(34, lengths=(1, 3, 2, 1, 3)), names=BOTH)


@variant
def one_episode(root: Path) -> Path:
    return record(root, arm_takes(35, lengths=(45,)), names=BOTH)


@variant
def one_camera_one_frame(root: Path) -> Path:
    return record(root, arm_takes(36, lengths=(1,), cameras=("front",)), names=BOTH)


@variant
def no_camera(root: Path) -> Path:
    return record(root, arm_takes(37, lengths=(200, 180, 220), cameras=()), names=BOTH)


@variant
def wide_doubles_and_matrices(root: Path) -> Path:
    """float64 columns, an integer one, a matrix, and a sentence a frame."""
    takes = []
    for e, take in enumerate(arm_takes(38, lengths=(30, 36), cameras=())):
        frames = len(take.columns["action"])
        rng = np.random.default_rng(e)
        more = {
            "observation.effort": rng.normal(size=(frames, 6)),
            "observation.tactile": rng.normal(size=(frames, 2, 3)).astype(np.float32),
            "observation.button": rng.integers(0, 4, (frames, 1)),
        }
        takes.append(Take({**take.columns, **more}, {}, take.task))
    return record(root, takes, names=BOTH)


# --- tools --------------------------------------------------------------------------------------------------


@variant
def merged(root: Path) -> Path:
    from lerobot.datasets.aggregate import aggregate_datasets

    parts = [
        record(root.with_name(f"{root.name}-{n}"), arm_takes(40 + n, lengths=(33, 40)), names=BOTH)
        for n in (0, 1)
    ]
    aggregate_datasets(["zoo/a", "zoo/b"], "zoo/set", roots=parts, aggr_root=root)
    return root


@variant
def with_episodes_deleted(root: Path) -> Path:
    from lerobot.datasets.dataset_tools import delete_episodes
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    whole = record(root.with_name(f"{root.name}-0"), arm_takes(42, lengths=(33, 40, 29, 36)), names=BOTH)
    dataset = LeRobotDataset("zoo/whole", root=whole, video_backend="pyav")
    delete_episodes(dataset, [1], output_dir=root, repo_id="zoo/set")
    return root


@variant
def split_off(root: Path) -> Path:
    from lerobot.datasets.dataset_tools import split_dataset
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    whole = record(root.with_name(f"{root.name}-0"), arm_takes(43, lengths=(33, 40, 29, 36)), names=BOTH)
    dataset = LeRobotDataset("zoo/whole", root=whole, video_backend="pyav")
    split_dataset(
        dataset, {"first": [0, 1], "second": [2, 3]}, output_dir=root.with_name(f"{root.name}-parts")
    )
    shutil.copytree(root.with_name(f"{root.name}-parts") / "second", root)
    return root


@variant
def in_the_cache_of_the_hub(root: Path) -> Path:
    """Every file a link into a folder of blobs, as huggingface_hub leaves a snapshot."""
    whole = record(root.with_name(f"{root.name}-0"), arm_takes(44, lengths=(33, 40)), names=BOTH)
    blobs = root.with_name(f"{root.name}-blobs")
    blobs.mkdir()
    for number, path in enumerate(sorted(p for p in whole.rglob("*") if p.is_file())):
        shutil.copy(path, blobs / str(number))
        link = root / path.relative_to(whole)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / str(number))
    return root


@variant
def from_version_two(root: Path) -> Path:
    """lerobot's own conversion of a v2.1 dataset."""
    import json

    from lerobot.scripts import convert_dataset_v21_to_v30 as tool
    from lerobot21_files import write_v21

    old = write_v21(root.with_name(f"{root.name}-0"), [30, 41, 36])
    lines = []
    for e in range(3):
        stats = {}
        import pyarrow.parquet as pq

        table = pq.ParquetFile(old / f"data/chunk-000/episode_{e:06d}.parquet").read()
        for name in (
            "observation.state",
            "action",
            "timestamp",
            "frame_index",
            "episode_index",
            "index",
            "task_index",
        ):
            values = np.array(table.column(name).to_pylist(), np.float64).reshape(table.num_rows, -1)
            stats[name] = {
                "min": values.min(0).tolist(),
                "max": values.max(0).tolist(),
                "mean": values.mean(0).tolist(),
                "std": values.std(0).tolist(),
                "count": [table.num_rows],
            }
        camera = {k: [[[v]]] * 3 for k, v in {"min": 0.15, "max": 0.85, "mean": 0.27, "std": 0.22}.items()}
        stats["observation.images.image"] = {**camera, "count": [table.num_rows]}
        lines.append(json.dumps({"episode_index": e, "stats": stats}))
    (old / "meta/episodes_stats.jsonl").write_text("\n".join(lines) + "\n")
    tool.convert_info(old, root, 100, 200)
    tool.convert_tasks(old, root)
    data = tool.convert_data(old, root, 100)
    videos = tool.convert_videos(old, root, 200)
    tool.convert_episodes_metadata(old, root, data, videos)
    return root
