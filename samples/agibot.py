"""AgiBot World raw recordings from the tabletop: the G1's right arm makes the Panda's motion.

Raw tree     task_info/task_<tid>.json, observations/<tid>/<ep>/videos/<cam>_color.mp4,
             proprio_stats/<tid>/<ep>/proprio_stats.h5, parameters/<tid>/<ep>/parameters/camera/*.json;
             `layout` packs them as published (tar shards) or leaves the shards' range folders
Conventions  end poses are the arm's flange in the base frame (x forward, y left, z up), index 0 left, quaternion
             xyzw; the grip site lies 0.143 m out of the flange along its z axis, and the flange has the axes of
             the tabletop's hand; gripper state grows as it closes (0 to 120), gripper action 0 open, 1 closed;
             time stamps ns; 30 fps AV1
Not AgiBot   the left arm rests; the right arm's joints are the Panda's; pictures are rendered at half their size
             and enlarged
Source       formats as described by Tavish9/any4lerobot 6937315 and measured on real files (proprio_stats.h5 of
             the sample data); variants are those of its readers' reports
"""

import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import UsageError, unknown_name
from ..schemas.rotations import matrix_to_quat
from .clip import enlarge, write_clip
from .motion import Frames, Motion, record, resample, seeds_by_task, write_seeds
from .panda import Array
from .render import Camera, Image, Scene, look_at, render, render_with_depth, wrist_pose
from .tabletop import BASE_POSITION, FINGER_OPEN_M

FPS = 30
FLANGE_TO_GRIP_M = 0.143
FIRST_EPISODE = 648_642
FIRST_TASK = 801
START_NS = 1_740_000_000_000_000_000
PANDA_BASE = np.array([0.12, -0.12, 0.60])  # in the G1's base frame, so that its right hand works in reach
WORLD_FROM_TABLETOP = np.eye(4)
WORLD_FROM_TABLETOP[:3, 3] = PANDA_BASE - BASE_POSITION

ENLARGE = 2
HEAD = Camera(240, 320, 161.0)  # real 640 x 480: fx 322
HAND = Camera(240, 320, 163.0)
FISHEYE = Camera(384, 480, 200.0)
# The head camera as measured on a real robot: looking ahead and 54 degrees down.
HEAD_ROTATION = np.array([[0.0, -0.81, 0.59], [-1.0, 0.0, 0.0], [0.0, -0.59, -0.81]])
HEAD_EYE_BASE = np.array([0.40, -0.10, 1.04])
LEFT_EYE_BASE = np.array([0.55, 0.30, 0.85])
LEFT_TARGET_BASE = np.array([0.70, -0.05, 0.60])

LEFT_JOINTS = np.array([-1.2, 0.9, 0.6, -0.7, 0.7, 1.3, 0.2])
LEFT_END = np.array([0.55, 0.30, 0.80])
HEAD_STATE, WAIST_STATE = np.array([0.0, 0.436]), np.array([0.541, 0.284])  # yaw, pitch; pitch, lift
ROBOT_POSITION, ROBOT_QUAT = np.array([0.316, 0.133, 0.0]), np.array([0.0, 0.0, -0.17, 0.98544])

VARIANTS = {
    "base": "effector (N, 2), actions of full length",
    "split-effector": "left_effector and right_effector (N, 1), as in recordings since May 2025",
    "joint16": "joint (N, 16) with the grippers last, effector empty",
    "short": "Alpha: action arrays hold only the frames that `index` lists",
    "long": "corrupt: actions longer than states",
    "no-robot": "robot/* empty",
    "no-end-index": "action/end/index empty",
    "dexhand": "effector (N, 12) rad, fisheye cameras on the hands",
    "tactile": "four tactile videos",
}
LAYOUTS = ("folders", "tars", "ranges")
GRIPPERS = {"omnipicker": (0.0, 120.0), "old": (35.0, 121.0)}  # state when open, when closed


@dataclass(frozen=True)
class Recording:
    """One episode to be written."""

    task_id: int
    episode_id: int
    variant: str
    motion: Motion
    frames: Frames


def write(
    raw: Path,
    episodes: int,
    seed: int,
    *,
    tasks: int | None = None,
    objects: int = 3,
    variants: tuple[str, ...] = ("base",),
    gripper: str = "omnipicker",
    layout: str = "folders",
    depth: bool = False,
    fisheye: bool = False,
    lead_frames: int = 0,
) -> list[Path]:
    """Write `episodes` recordings, a task id per instruction, `variants` taken in turn.

    `depth` adds 16-bit PNGs of the head camera; `fisheye` the five fisheye cameras; `lead_frames` lets the
    arm's action run that far ahead of its state, where real files repeat the state itself.
    """
    for variant in variants:
        if variant not in VARIANTS:
            raise unknown_name("AgiBot variant", variant, VARIANTS)
    if gripper not in GRIPPERS or layout not in LAYOUTS:
        raise UsageError(
            f"sample agibot: gripper '{gripper}', layout '{layout}'\n"
            f"  known: grippers {', '.join(GRIPPERS)}; layouts {', '.join(LAYOUTS)}"
        )
    if episodes < 1:
        raise UsageError(f"sample agibot: episodes must be 1 or more, not {episodes}")
    chosen = seeds_by_task(episodes, seed, tasks, objects)
    task_ids = {instruction: FIRST_TASK + i for i, instruction in enumerate(chosen)}
    order = sorted((one, instruction) for instruction, seeds in chosen.items() for one in seeds)
    store = _Store(raw, layout, [FIRST_EPISODE + i for i in range(episodes)])
    seeds: dict[str, dict[str, Any]] = {}
    info: dict[int, list[dict[str, Any]]] = {}
    for i, (one, instruction) in enumerate(order):
        motion = record(one, objects, image_size=8)
        recording = Recording(
            task_ids[instruction],
            FIRST_EPISODE + i,
            variants[i % len(variants)],
            motion,
            resample(motion, FPS),
        )
        _write_videos(store, recording, fisheye, depth)
        place = f"{recording.task_id}/{recording.episode_id}"
        proprio = proprio_arrays(recording, GRIPPERS[gripper], lead_frames)
        store.put(f"proprio_stats/{place}/proprio_stats.h5", lambda path, p=proprio: _write_h5(path, p))
        _write_parameters(store, recording)
        info.setdefault(recording.task_id, []).append(_task_info(recording))
        seeds[place] = {
            "seed": one,
            "objects": objects,
            "frames": len(recording.frames),
            "start_s": 0.0,
            "success": motion.success,
            "variant": recording.variant,
        }
    paths = store.close()
    for task_id, entries in info.items():
        path = raw / "task_info" / f"task_{task_id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(entries, indent=2, ensure_ascii=False))
        paths.append(path)
    write_seeds(raw, FPS, WORLD_FROM_TABLETOP, seeds)
    return paths


class _Store:
    """Files by their path after extraction; `tars` packs them as published, `ranges` keeps the range folder."""

    def __init__(self, raw: Path, layout: str, ids: list[int]) -> None:
        self.raw, self.layout = raw, layout
        self.span = f"{ids[0]}-{ids[-1]}"
        self.paths: list[Path] = []
        self.tars: dict[Path, tarfile.TarFile] = {}

    def put(self, path: str, write_file: Callable[[Path], Any]) -> None:
        kind, task, rest = path.split("/", 2)
        if self.layout == "ranges" and kind == "observations":
            path = f"{kind}/{task}/{self.span}/{rest}"
        target = self.raw / path
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target)
        if self.layout != "tars":
            self.paths.append(target)
            return
        inside_task = kind == "observations"  # one shard per task there, one for all tasks elsewhere
        shard = (
            self.raw / kind / task / f"{self.span}.tar"
            if inside_task
            else self.raw / kind / f"{self.span}.tar"
        )
        if shard not in self.tars:
            self.tars[shard] = tarfile.open(shard, "w")  # noqa: SIM115 - closed by close()
        content = target.read_bytes()
        member = tarfile.TarInfo(rest if inside_task else f"{task}/{rest}")
        member.size = len(content)
        self.tars[shard].addfile(member, BytesIO(content))
        target.unlink()
        for folder in target.parents:  # what the tar has swallowed leaves no empty folders
            if folder == shard.parent or any(folder.iterdir()):
                break
            folder.rmdir()

    def close(self) -> list[Path]:
        for shard, tar in self.tars.items():
            tar.close()
            self.paths.append(shard)
        return self.paths


# Numbers --------------------------------------------------------------------------------------------------


def flange_position(frames: Frames) -> Array:
    """[F, 3] m in the base frame."""
    grip = frames.ee_pos + WORLD_FROM_TABLETOP[:3, 3]
    return grip - FLANGE_TO_GRIP_M * frames.ee_rot[:, :, 2]


def _gripper_action(frames: Frames) -> Array:
    """[F] 0 open to 1 closed: what is commanded from each frame to the next.

    Ramped over two frames, because the real signal is not binary.
    """
    wanted = (np.append(frames.command[1:], frames.command[-1]) > 0).astype(np.float64)
    action = np.empty_like(wanted)
    level = 0.0
    for k, goal in enumerate(wanted):
        level += float(np.clip(goal - level, -0.5, 0.5))
        action[k] = level
    return action


EMPTY = np.zeros(0, np.float32)


def proprio_arrays(recording: Recording, span: tuple[float, float], lead: int) -> dict[str, NDArray[Any]]:
    """Path -> array of `proprio_stats.h5`, absent quantities as empty float32."""
    frames, variant = recording.frames, recording.variant
    count = len(frames)
    rng = np.random.default_rng([recording.motion.seed, 0xA61])

    def still(value: Array) -> Array:
        return np.broadcast_to(value, (count, *value.shape)).astype(np.float64)

    end_position = np.stack([still(LEFT_END), flange_position(frames)], axis=1)
    left_quat = matrix_to_quat(np.diag([1.0, -1.0, -1.0]))
    end_quat = np.stack([still(left_quat), matrix_to_quat(frames.ee_rot)], axis=1)
    joints = np.concatenate([still(LEFT_JOINTS), frames.joint_pos], axis=1)
    closed = 1.0 - frames.finger / FINGER_OPEN_M
    grip_state = np.stack([np.full(count, span[0]), span[0] + closed * (span[1] - span[0])], axis=1)
    grip_action = np.stack([np.zeros(count), _gripper_action(frames)], axis=1)
    if variant == "dexhand":
        curl = np.linspace(0.2, 1.2, 6)
        grip_state = np.concatenate([still(0.1 * curl), closed[:, None] * curl], axis=1)
        grip_action = np.concatenate([still(0.1 * curl), grip_action[:, 1:] * curl], axis=1)

    state: dict[str, NDArray[Any]] = {
        "effector/position": grip_state,
        "effector/force": EMPTY,
        "end/position": end_position,
        "end/orientation": end_quat,
        "end/angular": EMPTY,
        "end/velocity": EMPTY,
        "end/wrench": EMPTY,
        "head/position": still(HEAD_STATE),
        "head/effort": EMPTY,
        "head/velocity": EMPTY,
        "joint/position": joints,
        "joint/current_value": np.round(rng.normal(0, 800, (count, 14))),
        "joint/effort": EMPTY,
        "joint/velocity": EMPTY,
        "robot/position": still(ROBOT_POSITION),
        "robot/orientation": still(ROBOT_QUAT / np.linalg.norm(ROBOT_QUAT)),
        "robot/orientation_drift": EMPTY,
        "robot/position_drift": EMPTY,
        "waist/position": still(WAIST_STATE),
        "waist/effort": EMPTY,
        "waist/velocity": EMPTY,
    }
    every = np.arange(count, dtype=np.int64)
    ahead = np.minimum(every + lead, count - 1)
    # Frames in which the control source sent something: not the first 24, and a few gaps.
    sent = every[(every >= 24) & (every % 29 != 0)]
    action: dict[str, NDArray[Any]] = {
        "effector/position": grip_action,
        "effector/force": EMPTY,
        "effector/index": every,
        "end/position": end_position[ahead],
        "end/orientation": end_quat[ahead],
        "end/index": sent,
        "head/position": still(HEAD_STATE),
        "head/index": every,
        "joint/position": joints[ahead],
        "joint/index": sent,
        "joint/effort": EMPTY,
        "joint/velocity": EMPTY,
        "robot/velocity": np.zeros((count, 2)),
        "robot/index": every,
        "robot/position": EMPTY,
        "robot/orientation": EMPTY,
        "waist/position": still(WAIST_STATE),
        "waist/index": every,
    }
    _apply_variant(variant, state, action, every, sent)
    steps = np.full(count, 1e9 / FPS) + rng.uniform(-5e6, 5e6, count)
    steps[count // 2] = 66e6  # one frame was lost
    steps[0] = 0
    arrays: dict[str, NDArray[Any]] = {"timestamp": START_NS + np.cumsum(steps).astype(np.int64)}
    arrays |= {f"state/{name}": value for name, value in state.items()}
    arrays |= {f"action/{name}": value for name, value in action.items()}
    return arrays


def _apply_variant(
    variant: str,
    state: dict[str, NDArray[Any]],
    action: dict[str, NDArray[Any]],
    every: NDArray[np.int64],
    sent: NDArray[np.int64],
) -> None:
    if variant == "split-effector":
        for group in (state, action):
            both = group.pop("effector/position")
            del group["effector/force"]
            for i, side in enumerate(("left", "right")):
                group[f"{side}_effector/position"] = both[:, i : i + 1]
                group[f"{side}_effector/force"] = EMPTY
        del action["effector/index"]
        action["left_effector/index"] = action["right_effector/index"] = sent
    elif variant == "joint16":
        for group in (state, action):
            both = group["effector/position"]
            group["joint/position"] = np.concatenate([group["joint/position"], both], axis=1)
            group["effector/position"] = EMPTY
        action["effector/index"] = EMPTY
    elif variant == "short":
        for name in ("effector", "end", "head", "joint", "waist"):
            for key in (f"{name}/position", f"{name}/orientation"):
                if key in action:
                    action[key] = action[key][sent]
            action[f"{name}/index"] = sent
        action["robot/velocity"], action["robot/index"] = action["robot/velocity"][sent], sent
    elif variant == "long":
        for key in ("joint/position", "end/position", "end/orientation"):
            action[key] = np.concatenate([action[key], action[key][-5:]])
    elif variant == "no-robot":
        for group, names in ((state, ("position", "orientation")), (action, ("velocity", "index"))):
            for name in names:
                group[f"robot/{name}"] = EMPTY
    elif variant == "no-end-index":
        action["end/index"] = EMPTY


def _write_h5(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file.create_dataset(name, data=values)


def _task_info(recording: Recording) -> dict[str, Any]:
    """The entry of one episode: its segments share borders, start a little late and leave a tail."""
    count = len(recording.frames)
    taking, placing = recording.motion.segments
    border = -(-taking.stop * FPS // 20)
    actions = [
        {"start_frame": 4, "end_frame": border, "action_text": taking.text, "skill": taking.skill},
        {"start_frame": border, "end_frame": count - 3, "action_text": placing.text, "skill": placing.skill},
    ]
    return {
        "episode_id": recording.episode_id,
        "label_info": {"action_config": actions},
        "task_name": recording.motion.instruction,
        "init_scene_text": "The robot stands at a wooden table with coloured objects, a tray and a plate.",
    }


# Pictures -------------------------------------------------------------------------------------------------


def _to_tabletop(point_base: Array) -> Array:
    return point_base - WORLD_FROM_TABLETOP[:3, 3]


def _head_view(_: Scene) -> tuple[Array, Array]:
    return _to_tabletop(HEAD_EYE_BASE), HEAD_ROTATION / np.linalg.norm(HEAD_ROTATION, axis=0)


def _left_view(_: Scene) -> tuple[Array, Array]:
    eye = _to_tabletop(LEFT_EYE_BASE)
    return eye, look_at(eye, _to_tabletop(LEFT_TARGET_BASE))


View = Callable[[Scene], tuple[Array, Array]]


def _frames_of(scenes: Iterable[Scene], camera: Camera, view: View, wearer: str) -> Iterator[Image]:
    for scene in scenes:
        yield render(scene, camera, *view(scene), wearer)


def _write_videos(store: _Store, recording: Recording, fisheye: bool, depth: bool) -> None:
    dexterous = recording.variant == "dexhand"
    hand = "fisheye_color" if dexterous else "color"
    hand_camera = FISHEYE if dexterous else HAND
    views: dict[str, tuple[Camera, View, str]] = {
        "head_color": (HEAD, _head_view, "torso"),
        f"hand_left_{hand}": (hand_camera, _left_view, "torso"),
        f"hand_right_{hand}": (hand_camera, wrist_pose, "hand"),
    }
    if fisheye:
        for name in ("head_center", "head_left", "head_right", "back_left", "back_right"):
            views[f"{name}_fisheye_color"] = (FISHEYE, _head_view, "torso")
    folder = f"observations/{recording.task_id}/{recording.episode_id}"
    scenes = recording.frames.scenes
    for name, (camera, view, wearer) in views.items():
        pictures = _frames_of(scenes, camera, view, wearer)
        store.put(
            f"{folder}/videos/{name}.mp4",
            lambda path, p=pictures: write_clip(path, p, FPS, "libsvtav1", ENLARGE),
        )
    if recording.variant == "tactile":
        for side in ("left", "right"):
            for sensor in (1, 2):
                gel = _gel(recording, side)
                store.put(
                    f"{folder}/tactile/{side}_sensor_{sensor}.mp4",
                    lambda path, p=gel: write_clip(path, p, FPS, "libsvtav1"),
                )
    if depth:
        for k, scene in enumerate(scenes):
            metres = render_with_depth(scene, HEAD, *_head_view(scene), wearer="torso")[1]
            millimetres = np.round(enlarge(metres, ENLARGE) * 1000).astype(np.uint16)
            store.put(
                f"{folder}/depth/head_depth_{k:06d}.png", lambda path, d=millimetres: _write_png(path, d)
            )


def _gel(recording: Recording, side: str) -> Iterator[Image]:
    """[700, 400, 3] tactile pictures: grey, with a dark spot while the right gripper holds something."""
    for finger, command in zip(recording.frames.finger, recording.frames.command, strict=True):
        picture = np.full((700, 400, 3), 120, np.uint8)
        if side == "right" and command > 0 and abs(finger - 0.024) < 1e-6:
            picture[250:450, 100:300] = 60
        yield picture


def _write_png(path: Path, values: NDArray[np.uint16]) -> None:
    from PIL import Image as Pillow

    Pillow.fromarray(values).save(path)


def _write_parameters(store: _Store, recording: Recording) -> None:
    folder = f"parameters/{recording.task_id}/{recording.episode_id}/parameters/camera"
    for name, camera, view in (
        ("head", HEAD, _head_view),
        ("hand_left", HAND, _left_view),
        ("hand_right", HAND, wrist_pose),
    ):
        focal = camera.focal_px * ENLARGE
        intrinsic = {
            "fx": focal,
            "fy": focal,
            "ppx": camera.width * ENLARGE / 2,
            "ppy": camera.height * ENLARGE / 2,
            "distortion_model": "none",
            "k1": 0.0,
            "k2": 0.0,
            "k3": 0.0,
            "p1": 0.0,
            "p2": 0.0,
        }
        aligned = [_extrinsic(*view(scene)) for scene in recording.frames.scenes]
        _put_json(store, f"{folder}/{name}_intrinsic_params.json", {"intrinsic": intrinsic})
        _put_json(store, f"{folder}/{name}_extrinsic_params.json", aligned[0])
        _put_json(store, f"{folder}/{name}_extrinsic_params_aligned.json", aligned)


def _extrinsic(eye: Array, rotation: Array) -> dict[str, Any]:
    """Camera to base; OpenCV axes, as on the real robot."""
    position = eye + WORLD_FROM_TABLETOP[:3, 3]
    return {"extrinsic": {"rotation_matrix": rotation.tolist(), "translation_vector": position.tolist()}}


def _put_json(store: _Store, path: str, value: Any) -> None:
    store.put(path, lambda target: target.write_text(json.dumps(value)))
