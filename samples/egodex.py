"""EgoDex raw recordings from the tabletop: a person's right hand takes the gripper's path.

Raw tree     part2/<task>/<N>.hdf5 and <N>.mp4, test/<task>/...; N from 0, not padded
Conventions  every transform is world from joint [4, 4] float32; world y up, z towards the person; the camera's
             axes are OpenCV's (x right, y down, z forward); 30 fps, frame i belongs to pose i
Hand         a pinch: thumb and index stand where the gripper's pads are. The wrist is rigid to the gripper
             (HAND_FROM_WRIST), with EgoDex's axes for a right hand: x away from the fingers, z to the thumb
Not EgoDex   pictures are of the simulator, rendered at 480 x 270 and enlarged; the left hand rests; no audio
Source       formats of Apple's EgoDex (arXiv 2505.11709) as its readers describe them; all data here is made up
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import UsageError
from ..schemas.rotations import make_pose
from .clip import write_clip
from .motion import Frames, Motion, record, resample, seeds_by_task, split_off, write_seeds
from .panda import Array
from .render import Camera, Image, look_at, render
from .tabletop import TABLE_Z

FPS = 30
WIDTH, HEIGHT, FOCAL_PX = 1920, 1080, 736.6339  # the same in every EgoDex file
ENLARGE = 4
TASK_FOLDER = "basic_pick_place"

# Tabletop axes (x forward, y left, z up) to ARKit's (x right, y up, z backward), table at 0.83 m.
WORLD_FROM_TABLETOP = np.array(
    [
        [0.0, -1.0, 0.0, 0.05],
        [0.0, 0.0, 1.0, -0.07],
        [-1.0, 0.0, 0.0, -0.75],
        [0.0, 0.0, 0.0, 1.0],
    ]
)
HEAD_EYE = np.array([-0.45, 0.05, TABLE_Z + 0.30])  # tabletop coordinates
HEAD_TARGET = np.array([-0.08, 0.0, TABLE_Z])
# The wrist in the gripper's frame (x along the pads, y the fingers' sliding axis, z out of the hand).
HAND_FROM_WRIST = np.array(
    [
        [0.0, 1.0, 0.0, 0.0],
        [0.0, 0.0, -1.0, 0.0],
        [-1.0, 0.0, 0.0, -0.145],
        [0.0, 0.0, 0.0, 1.0],
    ]
)

FINGERS = ("Index", "Middle", "Ring", "Little")
BONES = ("Metacarpal", "Knuckle", "IntermediateBase", "IntermediateTip", "Tip")
THUMB_BONES = ("Knuckle", "IntermediateBase", "IntermediateTip", "Tip")
BODY = ("hip", *(f"spine{i}" for i in range(1, 8)), *(f"neck{i}" for i in range(1, 5)))


def side_joints(side: str) -> list[str]:
    """The 28 joints of `left` or `right`, arm first."""
    fingers = [f"{side}{finger}Finger{bone}" for finger in FINGERS for bone in BONES]
    thumb = [f"{side}Thumb{bone}" for bone in THUMB_BONES]
    return [f"{side}{part}" for part in ("Shoulder", "Arm", "Forearm", "Hand")] + thumb + fingers


JOINTS = (*BODY, *side_joints("left"), *side_joints("right"))


def write(
    raw: Path,
    episodes: int,
    seed: int,
    *,
    tasks: int | None = None,
    objects: int = 3,
    enlarged: int = ENLARGE,
    codec: str = "libx264",
    test_every: int = 5,
    uniform: bool = False,
) -> list[Path]:
    """Write `episodes` recordings, of which every `test_every`-th goes to `test/`.

    Pictures are 480 x 270 times `enlarged`; 4 gives EgoDex's 1920 x 1080, for which the stored intrinsics hold.
    Attributes vary from file to file as in the real data (see `attributes`) and one file in seven lacks
    confidences, unless `uniform`.
    """
    if episodes < 1:
        raise UsageError(f"sample egodex: episodes must be 1 or more, not {episodes}")
    chosen = sorted(one for seeds in seeds_by_task(episodes, seed, tasks, objects).values() for one in seeds)
    counts = {"part2": 0, "test": 0}
    paths: list[Path] = []
    seeds: dict[str, dict[str, Any]] = {}
    for one, held in zip(chosen, split_off(episodes, test_every), strict=True):
        part = "test" if held else "part2"
        number = counts[part]
        counts[part] += 1
        motion = record(one, objects, image_size=8)
        frames = resample(motion, FPS)
        stem = raw / part / TASK_FOLDER / str(number)
        stem.parent.mkdir(parents=True, exist_ok=True)
        cameras = _cameras(one, len(frames))
        pictures = _pictures(frames, cameras)
        paths += [stem.with_suffix(".hdf5"), stem.with_suffix(".mp4")]
        write_clip(paths[-1], pictures, FPS, codec, enlarged)
        kind = 0 if uniform else number % len(KINDS)
        _write_hdf5(paths[-2], motion, frames, cameras, KINDS[kind])
        seeds[f"{part}/{TASK_FOLDER}/{number}"] = {
            "seed": one,
            "objects": objects,
            "frames": len(frames),
            "start_s": 0.0,
            "success": motion.success,
            "instruction": motion.instruction,
        }
    write_seeds(raw, FPS, WORLD_FROM_TABLETOP, seeds)
    return paths


def _cameras(seed: int, frames: int) -> Array:
    """[F, 4, 4] tabletop from camera: a head that looks at the table and sways by a centimetre."""
    rng = np.random.default_rng([seed, 0xEE])
    phase = rng.uniform(0, 2 * np.pi, 3)
    poses = []
    for k in range(frames):
        sway = 0.012 * np.sin(2 * np.pi * k / FPS * np.array([0.11, 0.17, 0.07]) + phase)
        eye = HEAD_EYE + sway
        poses.append(make_pose(look_at(eye, HEAD_TARGET + 0.3 * sway), eye))
    return np.array(poses)


def _pictures(frames: Frames, cameras: Array) -> Iterator[Image]:
    small = Camera(HEIGHT // ENLARGE, WIDTH // ENLARGE, FOCAL_PX / ENLARGE)
    for scene, camera in zip(frames.scenes, cameras, strict=True):
        yield render(scene, small, camera[:3, 3].copy(), camera[:3, :3].copy(), "person")


def wrist_poses(frames: Frames) -> Array:
    """[F, 4, 4] tabletop from right wrist."""
    return make_pose(frames.ee_rot, frames.ee_pos) @ HAND_FROM_WRIST


def skeleton(frames: Frames, cameras: Array) -> dict[str, Array]:
    """Joint name -> [F, 4, 4] tabletop from joint, all 68."""
    count = len(frames)
    poses: dict[str, Array] = {}
    _add_right_hand(poses, frames)
    _add_left_hand(poses, count)
    head = cameras[:, :3, 3]
    upright = np.broadcast_to(np.eye(3), (count, 3, 3))
    neck = head + np.array([-0.08, 0.0, -0.14])
    hip = head + np.array([-0.12, 0.0, -0.72])
    for i, name in enumerate(BODY):
        poses[name] = make_pose(upright, hip + (neck - hip) * (i / (len(BODY) - 1)))
    for side, sign in (("left", 1.0), ("right", -1.0)):
        wrist = poses[f"{side}Hand"][:, :3, 3]
        shoulder = neck + np.array([0.0, sign * 0.05, -0.06])
        arm = neck + np.array([0.0, sign * 0.18, -0.10])
        elbow = (arm + wrist) / 2 + np.array([0.0, sign * 0.05, -0.10])
        for part, place in (("Shoulder", shoulder), ("Arm", arm), ("Forearm", elbow)):
            poses[f"{side}{part}"] = make_pose(upright, place)
    return poses


def _add_right_hand(poses: dict[str, Array], frames: Frames) -> None:
    wrist = wrist_poses(frames)
    turn = wrist[:, :3, :3]
    along, slide, out = (frames.ee_rot[:, :, i] for i in range(3))
    opening = frames.finger[:, None]
    tips: dict[str, Array] = {
        "Thumb": frames.ee_pos - slide * opening,
        "Index": frames.ee_pos + slide * opening,
    }
    for i, finger in enumerate(("Middle", "Ring", "Little"), start=1):
        tips[finger] = tips["Index"] - along * (0.019 * i) - out * (0.004 * i)
    _add_fingers(poses, "right", wrist[:, :3, 3], turn, out, along, slide, tips)


def _add_left_hand(poses: dict[str, Array], count: int) -> None:
    """A resting left hand: x towards the fingers, y out of the palm, z opposite the thumb."""
    out = np.array([0.8, 0.0, -0.6])  # towards the fingers
    thumb = np.array([0.0, -1.0, 0.0])
    turn = np.stack([out, np.cross(-thumb, out), -thumb], axis=1)
    sway = 0.004 * np.sin(2 * np.pi * 0.2 * np.arange(count) / FPS)[:, None]
    place = np.array([-0.34, 0.20, TABLE_Z + 0.13]) + sway * np.array([1.0, 0.5, 0.3])
    grip = place + 0.145 * out
    slide, along = -turn[:, 1], thumb
    tips: dict[str, Array] = {
        "Thumb": grip - slide * 0.03 + thumb * 0.03,
        "Index": grip + slide * 0.01 + thumb * 0.02,
    }
    for i, finger in enumerate(("Middle", "Ring", "Little"), start=1):
        tips[finger] = tips["Index"] - along * (0.019 * i)
    out, along, slide = (np.broadcast_to(axis, (count, 3)) for axis in (out, along, slide))
    _add_fingers(poses, "left", place, np.broadcast_to(turn, (count, 3, 3)), out, along, slide, tips)


def _add_fingers(
    poses: dict[str, Array],
    side: str,
    wrist: Array,
    turn: Array,
    out: Array,
    along: Array,
    slide: Array,
    tips: dict[str, Array],
) -> None:
    """Chains of bones from the wrist [F, 3] to each tip [F, 3], 2 to 4 cm a bone, all turned like the wrist."""
    poses[f"{side}Hand"] = make_pose(turn, wrist)
    root = wrist + out * 0.025 - slide * 0.02
    for bone, share in zip(THUMB_BONES, (0.0, 0.35, 0.7, 1.0), strict=True):
        poses[f"{side}Thumb{bone}"] = make_pose(turn, root + (tips["Thumb"] - root) * share)
    for i, finger in enumerate(FINGERS):
        side_step = along * (0.015 - 0.019 * i)
        knuckle = wrist + out * 0.075 + side_step + slide * 0.012
        places = [wrist + out * 0.03 + side_step * 0.6, knuckle]
        places += [knuckle + (tips[finger] - knuckle) * share for share in (0.45, 0.75, 1.0)]
        for bone, place in zip(BONES, places, strict=True):
            poses[f"{side}{finger}Finger{bone}"] = make_pose(turn, place)


# What files differ in, one after the other: (llm_type, which description, text form, confidences).
KINDS = (
    ("reset", "1", "text", True),
    ("reversible", "1", "text", True),
    ("reversible", "2", "text", True),
    ("reset", "1", "bytes", True),
    ("reset", "1", "description", True),  # an older file: no llm_* attributes
    ("reset", "1", "text", False),
    ("reset-free", "1", "text", True),
)


def _write_hdf5(
    path: Path, motion: Motion, frames: Frames, cameras: Array, kind: tuple[str, str, str, bool]
) -> None:
    import h5py

    poses = {"camera": cameras, **skeleton(frames, cameras)}
    rng = np.random.default_rng([motion.seed, 0xC0])
    with h5py.File(path, "w") as file:
        intrinsic = [[FOCAL_PX, 0, WIDTH / 2], [0, FOCAL_PX, HEIGHT / 2], [0, 0, 1]]
        file["camera/intrinsic"] = np.array(intrinsic, np.float32)
        for name, pose in poses.items():
            file[f"transforms/{name}"] = (WORLD_FROM_TABLETOP @ pose).astype(np.float32)
        if kind[3]:
            for name in JOINTS:
                file[f"confidences/{name}"] = _confidences(rng, len(frames), name)
        for name, value in attributes(motion, *kind).items():
            file.attrs[name] = value


def _confidences(rng: np.random.Generator, count: int, joint: str) -> NDArray[np.float32]:
    """Two modes, as measured: 0.0032 where not tracked (more often on the idle left hand), else 0.2 to 1."""
    lost = rng.random(count) < (0.5 if joint.startswith("left") else 0.1)
    return np.where(lost, 0.0032, rng.uniform(0.2, 1.0, count)).astype(np.float32)


def attributes(motion: Motion, kind: str, which: str, form: str, confidences: bool) -> dict[str, Any]:
    """The file's attributes; whatever their form, the instruction rule finds the motion's instruction."""
    body = motion.task.bodies[motion.task.target]
    container = motion.task.container
    other = f"take the {body.colour} {body.shape} from the {container} and put it on the table"
    common = {
        "annotated": True,
        "annotator_version": "0.3" if confidences and form != "description" else "0.1",
        "task": TASK_FOLDER,
        "type": "reset" if kind == "reset-free" else kind,
        "description": motion.instruction,
        "environment": (
            f"table:wood, position:standing, background:grey, from:table, to:{container}, hand:right"
        ),
        "object": f"object:{body.shape}, color:{body.colour}",
        "extra": f"S{motion.seed}",
        "session_name": f"2025-03-{1 + motion.seed % 28:02d}_10-00-00.mov",
    }
    if form == "description":
        return common
    first, second = (motion.instruction, "None")
    if kind == "reversible":
        first, second = (motion.instruction, other) if which == "1" else (other, motion.instruction)
        common["description"], common["description2"] = first, second
    texts = {
        "llm_type": kind,
        "llm_description": first,
        "llm_description2": second,
        "which_llm_description": which,
    }
    if form == "bytes":
        return {
            **{k: np.bytes_(v) if isinstance(v, str) else v for k, v in common.items()},
            **{k: np.bytes_(v) for k, v in texts.items()},
        }
    import h5py

    words = h5py.string_dtype()
    return {
        **common,
        **texts,
        "llm_verbs": np.array(["pick", "place"], dtype=words),
        "llm_objects": np.array([body.shape], dtype=words),
    }
