"""EgoDex: people's hands at 194 table-top tasks, seen by a headset that tracks every joint; 30 Hz.

Raw tree     <part>/<task>/<N>.hdf5 and .mp4, part one of part1..part5, extra, test; as folders or in the zips
Conventions  transforms/<joint> [N, 4, 4] are poses in the world of the recording session: metres, y up, x right,
             z backward (ARKit); transforms/camera looks along its z, x right, y down (OpenCV)
             rot6d = first column, then second column; layouts list the left hand first, dial18 the right
Action       the state one frame later in the same layout; the last repeated or dropped, as recorded
Confidences  0 to 1 per joint, 0.0032 where a joint was not tracked; absent in older files, hence a mask
Source       arXiv 2505.11709, apple/ml-egodex; layouts: xpeng-robotics/DIAL b611fed, alafumee/H_RDT
Licence      CC BY-NC-ND: non-commercial, no derivatives to be given away
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..schemas.episode import Dropped, Embodiment, Episode, EpisodeRef, Recording, VideoClip
from ..schemas.errors import DataError, UsageError
from ..schemas.features import CameraFeature, Feature
from ..schemas.rotations import invert_pose, matrix_to_rot6d
from ..schemas.unified import hand_to_dial, points_to_dial
from . import Converter
from .archives import (
    STORED,
    ZipMember,
    data_offset,
    inflate,
    open_read_at,
    read_member,
    safe_name,
    zip_members,
)
from .hdf5 import find_group, open_hdf5, read_dataset
from .words import text_of

if TYPE_CHECKING:
    import h5py

FPS = 30
SIDES = ("left", "right")
FINGERS = ("Thumb", "Index", "Middle", "Ring", "Little")
BODY = ("hip", *(f"spine{i}" for i in range(1, 8)), *(f"neck{i}" for i in range(1, 5)))
INTRINSIC = np.array([[736.6339, 0, 960], [0, 736.6339, 540], [0, 0, 1]])  # the same in every published file
CAMERA = "ego"
_BONES = ("Knuckle", "IntermediateBase", "IntermediateTip", "Tip")


def _side_joints(side: str) -> list[str]:
    fingers = [f"{side}{f}Finger{bone}" for f in FINGERS[1:] for bone in ("Metacarpal", *_BONES)]
    thumb = [f"{side}Thumb{bone}" for bone in _BONES]
    return [f"{side}{part}" for part in ("Shoulder", "Arm", "Forearm", "Hand")] + thumb + fingers


JOINTS = tuple(sorted([*BODY, *_side_joints("left"), *_side_joints("right")]))  # 68, as HDF5 lists them


@dataclass(frozen=True)
class Options:
    layout: str = field(
        default="hands",
        metadata={
            "choices": ("hands", "hrdt48", "dial18", "full"),
            "help": "what state and action hold: wrists, fingertips and camera (57); H-RDT's 48; DIAL's 18; all 621",
        },
    )
    frame: str = field(
        default="world",
        metadata={
            "choices": ("world", "camera", "first-camera"),
            "help": "frame of the poses: the session's world, each frame's own camera, the first frame's camera",
        },
    )
    last: str = field(
        default="repeat",
        metadata={
            "choices": ("repeat", "drop"),
            "help": "the last frame has no next state: repeat its own as its action, or leave the frame out",
        },
    )


@dataclass(frozen=True)
class Part:
    """One joint of a layout: its name in the file and in the dataset; position alone, or with rotation."""

    joint: str
    name: str
    rotation: bool

    @property
    def names(self) -> tuple[str, ...]:
        rotation = [f"{self.name}_rot6d_{i}" for i in range(6)] if self.rotation else []
        return (*(f"{self.name}_{axis}" for axis in "xyz"), *rotation)


def tip_joint(side: str, finger: str) -> str:
    return f"{side}{finger}Tip" if finger == "Thumb" else f"{side}{finger}FingerTip"


def _hand(side: str) -> tuple[Part, ...]:
    tips = [Part(tip_joint(side, finger), f"{side}_{finger.lower()}_tip", False) for finger in FINGERS]
    return (Part(f"{side}Hand", f"{side}_wrist", True), *tips)


LAYOUTS: dict[str, tuple[Part, ...]] = {
    "hands": (*_hand("left"), *_hand("right"), Part("camera", "camera", True)),
    "hrdt48": (*_hand("left"), *_hand("right")),
    "dial18": (_hand("right")[0], _hand("left")[0]),
    "full": tuple(Part(joint, joint, True) for joint in sorted(["camera", *JOINTS])),
}

CONFIDENCE = Feature(
    "confidence",
    "float32",
    JOINTS,
    unit="1",
    description="tracking confidence, 0 where the file has none; 0.1 separates tracked from untracked",
)
CONFIDENCE_VALID = Feature(
    "confidence_valid", "bool", JOINTS, description="whether the file carries a confidence for the joint"
)
CAMERA_POSE = Feature(
    "camera_pose",
    "float32",
    ("x", "y", "z", *(f"rot6d_{i}" for i in range(6))),
    unit="m, 1",
    frame="world",
    description="pose of the headset's camera in the session's world, whatever frame the state is in",
)


def find(raw: Path, options: Options) -> Iterator[Recording]:
    """One recording a pair of hdf5 and mp4 (or what there is of it), in numeric order within a task."""
    check_options(options)
    pairs: dict[str, tuple[tuple[Any, ...], Recording]] = {}
    for part, task, folder in _task_folders(raw):
        found: dict[str, list[Path]] = {}
        for path in sorted(folder.iterdir()):
            # macOS leaves ._0.hdf5 beside 0.hdf5 on foreign disks: no recording, whatever its name ends in.
            if path.suffix in (".hdf5", ".mp4") and not path.name.startswith("."):
                found.setdefault(path.stem, []).append(path)
        for stem, files in found.items():
            name = f"{part}/{task}/{stem}"
            if name in pairs:
                other = pairs[name][1].files[0].parent
                raise DataError(
                    f"two episodes are called {name}: in {other} and {folder}\n"
                    "  next: convert their folders one by one, with --raw and --name"
                )
            pairs[name] = (_order(part, task, stem), Recording(name, split_of(part), tuple(files)))
    for path in [raw] if raw.is_file() else sorted(raw.glob("*.zip")):
        try:
            names = sorted({name.rsplit(".", 1)[0] for name in zip_index(path, *_stamp(path))})
        except DataError:
            pairs[path.name] = (("", 0, "", 0, path.name), Recording(path.name, "train", (path,)))
            continue
        for name in names:
            part, task, stem = name.split("/")
            pairs.setdefault(name, (_order(part, task, stem), Recording(name, split_of(part), (path,))))
    for _, recording in sorted(pairs.values(), key=lambda pair: pair[0]):
        yield recording


def check_options(options: Options) -> None:
    if options.layout == "dial18" and options.frame != "world":
        raise UsageError(
            f"--layout dial18 is defined in the world frame, not with --frame {options.frame}\n"
            "  next: leave --frame out, or take another layout"
        )


def split_of(part: str) -> str:
    return part if part in ("test", "extra") else "train"


def _task_folders(raw: Path) -> list[tuple[str, str, Path]]:
    """(part, task, folder): `raw` is a task, a part, holds parts, or holds one folder that does.

    Each folder goes by what is in it, so that a task beside whole parts hides none of them.
    """
    found: list[tuple[str, str, Path]] = []
    level = [raw] if raw.is_dir() else []
    for _ in range(4):
        below: list[Path] = []
        for folder in level:
            if _is_task(folder):
                found.append((folder.parent.name, folder.name, folder))
            else:
                below += sorted(path for path in folder.iterdir() if path.is_dir())
        level = below
    return found


def _is_task(folder: Path) -> bool:
    return any(p.suffix in (".hdf5", ".mp4") and not p.name.startswith(".") for p in folder.iterdir())


def _order(part: str, task: str, stem: str) -> tuple[Any, ...]:
    """Parts, then tasks, then numbers as numbers: 2 before 10."""
    number = int(stem) if stem.isdecimal() else 1 << 62
    return (re.sub(r"\d+", lambda m: m[0].zfill(9), part), 1, task, number, stem)


@lru_cache(maxsize=8)
def zip_index(path: Path, size: int, mtime_ns: int) -> dict[str, ZipMember]:
    """<part>/<task>/<N>.hdf5 and .mp4 of a published zip."""
    members: dict[str, ZipMember] = {}
    try:
        with open_read_at(path) as (read_at, total):
            for member in zip_members(read_at, total):
                name = safe_name(member.name)
                if name.count("/") == 2 and name.endswith((".hdf5", ".mp4")):
                    members[name] = member
    except DataError as error:
        raise DataError(f"{path.name}: {error}") from error
    return members


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def scan(recording: Recording, options: Options) -> Sequence[EpisodeRef | Dropped]:
    """One episode: every pose and attribute checked, the video's frames counted in its sample table."""
    files = tuple(path.name for path in recording.files)
    try:
        locator, video = _locate(recording)
        with _open(recording.files, locator) as file:
            raw = _load(file, LAYOUTS[options.layout], everything=True)
            attributes = _attributes(file)
    except (DataError, OSError, ValueError, KeyError, RuntimeError) as error:
        remedy = "download both files of this episode again, or take them out of the raw folder"
        return [Dropped(recording.name, files, str(error), remedy, recording.split)]
    problems, notes = list(raw.problems), list(raw.notes)
    frames = raw.frames - (1 if options.last == "drop" else 0)
    camera = CameraFeature(CAMERA, 0, 0)
    try:
        with ExitStack() as held:
            if "deflated" in locator:
                file = held.enter_context(inflate(recording.files[0], ZipMember(*locator["deflated"])))
                video = _whole(file)
            camera, facts = _look_at_video(video, raw.frames)
        locator |= {"height": camera.height, "width": camera.width}
        notes += facts
    except (DataError, OSError) as error:
        problems.append(str(error).replace(f"{video[0]}:", f"{recording.name}.mp4:"))
    if frames < 1:
        problems.append(f"{raw.frames} frames leave none with a next state")
    if problems:
        remedy = "download both files of this episode again"
        return [Dropped(recording.name, files, "; ".join(problems), remedy, recording.split)]
    part, task, number = recording.name.split("/")
    text, source = instruction(attributes, task)
    named = text_of(attributes.get("task"))
    if named and named != task:
        notes.append(f"attribute task says '{named}', the folder '{task}'")
    metadata: dict[str, Any] = {
        "part": part,
        "task": task,
        "number": int(number) if number.isdecimal() else -1,
        "raw_frames": raw.frames,
        "instruction_from": source,
        "has_confidence": bool(raw.confidence_valid.any()),
        "intrinsic": [float(raw.intrinsic[i]) for i in ((0, 0), (1, 1), (0, 2), (1, 2))],
    }
    for name in ("type", "llm_type", "environment", "object", "session_name", "annotator_version"):
        if text_of(attributes.get(name)):
            metadata[name] = text_of(attributes[name])
    return [
        EpisodeRef(
            source_id=recording.name,
            split=recording.split,
            frames=frames,
            instruction=text,
            files=recording.files,
            cameras=(camera,),
            group=f"{part}/{task}",
            metadata=metadata,
            locator=locator,
            warnings=tuple(notes),
        )
    ]


def _locate(recording: Recording) -> tuple[dict[str, Any], tuple[Path, int, int]]:
    """What `read` needs beyond the files, and where the video's bytes are: (path, offset, size).

    A published zip stores its videos as they are; where one was packed anew and deflates them, they are inflated
    for each reading, and the place is the zip's.
    """
    first = recording.files[0]
    if first.suffix != ".zip":
        by_kind = {path.suffix: path for path in recording.files}
        for kind in (".hdf5", ".mp4"):
            if kind not in by_kind:
                raise DataError(f"{first.stem}{kind} is missing beside {first.name}")
        if not first.stem.isdecimal():
            raise DataError(f"expected <number>.hdf5, found {first.name}")
        video = by_kind[".mp4"]
        return {}, (video, 0, video.stat().st_size)
    members = zip_index(first, *_stamp(first))
    for kind in (".hdf5", ".mp4"):
        if recording.name + kind not in members:
            raise DataError(f"{recording.name}{kind} is missing in {first.name}")
    video = members[f"{recording.name}.mp4"]
    if video.method != STORED:
        locator = {"hdf5": list(members[f"{recording.name}.hdf5"]), "deflated": list(video)}
        return locator, (first, 0, first.stat().st_size)
    with open_read_at(first) as (read_at, _):
        start = data_offset(read_at, video)
    locator = {"hdf5": list(members[f"{recording.name}.hdf5"]), "video": [start, video.size]}
    return locator, (first, start, video.size)


def _whole(file: BinaryIO) -> tuple[Path, int, int]:
    """(path, offset, size) of an open file, for those who open it themselves."""
    return Path(f"/dev/fd/{file.fileno()}"), 0, os.fstat(file.fileno()).st_size


@contextmanager
def _open(files: Sequence[Path], locator: Mapping[str, Any]) -> Iterator[h5py.File]:
    """The episode's HDF5, on disk or inside a zip (half a megabyte, read whole)."""
    import h5py

    if "hdf5" not in locator:
        with open_hdf5(next(path for path in files if path.suffix == ".hdf5")) as file:
            yield file
        return
    member = ZipMember(*locator["hdf5"])
    with open_read_at(files[0]) as (read_at, _):
        data = read_member(read_at, member)
    try:
        file = h5py.File(io.BytesIO(data), "r")
    except OSError as error:
        raise DataError(f"{member.name}: not a readable HDF5 file") from error
    with file:
        yield file


@dataclass
class Raw:
    """One episode's numbers; `problems` when it cannot be used."""

    frames: int
    poses: dict[str, NDArray[np.float64]]  # joint -> [N, 4, 4] in the world
    confidence: NDArray[np.float32]  # [N, 68]
    confidence_valid: NDArray[np.bool_]  # [68]
    intrinsic: NDArray[np.float64]
    problems: list[str]
    notes: list[str]


def _load(file: h5py.File, layout: Sequence[Part], everything: bool) -> Raw:
    """Poses and confidences of a file; `everything` reads and checks joints the layout leaves out, too."""
    transforms = find_group(file, "transforms")
    if transforms is None:
        found = ", ".join(repr(name) for name in sorted(file)) or "nothing"
        raise DataError(f"no group 'transforms'; found: {found}. Is this an EgoDex file?")
    needed = {part.joint for part in layout} | {"camera"}
    problems: list[str] = []
    notes: list[str] = []
    poses: dict[str, NDArray[np.float64]] = {}
    missing = [joint for joint in ("camera", *JOINTS) if joint not in transforms]
    lacking = sorted(needed & set(missing))
    if lacking:
        problems.append(f"transforms lack {', '.join(lacking)}")
    elif missing:
        notes.append(f"transforms lack {', '.join(missing)}, which the layout does not use")
    frames = 0
    for joint in ("camera", *JOINTS):
        if joint in missing or not (everything or joint in needed):
            continue
        array = read_dataset(transforms, joint)
        if array is None or array.ndim != 3 or array.shape[1:] != (4, 4) or array.dtype.kind != "f":
            found = "a group" if array is None else f"{array.dtype} {array.shape}"
            problems.append(f"transforms/{joint} is {found}, expected floating point (N, 4, 4)")
            continue
        frames = frames or len(array)
        if len(array) != frames:
            problems.append(f"transforms/{joint} has {len(array)} frames, transforms/camera {frames}")
            continue
        poses[joint] = array.astype(np.float64)
        problem = _pose_problem(poses[joint])
        if problem and joint in needed:
            problems.append(f"transforms/{joint} {problem}")
        elif problem:
            notes.append(f"transforms/{joint} {problem}; the layout does not use it")
    if not frames and not problems:
        problems.append("the episode has no frames")
    confidence, valid, conflicts = _load_confidence(file, frames)
    problems += conflicts
    intrinsic = read_dataset(file, "camera/intrinsic")
    if intrinsic is None or intrinsic.shape != (3, 3):
        notes.append("no camera/intrinsic: the published constant is recorded")
        intrinsic = INTRINSIC
    elif not np.allclose(intrinsic, INTRINSIC, atol=1e-3):
        notes.append(f"camera/intrinsic differs from the published constant: fx {intrinsic[0, 0]:g}")
    return Raw(frames, poses, confidence, valid, intrinsic.astype(np.float64), problems, notes)


def _load_confidence(
    file: h5py.File, frames: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_], list[str]]:
    """[N, 68] confidences, which of the joints have one, and problems. Absent ones are 0 and invalid."""
    confidence = np.zeros((frames, len(JOINTS)), np.float32)
    valid = np.zeros(len(JOINTS), bool)
    problems: list[str] = []
    group = find_group(file, "confidences")
    if group is None:
        return confidence, valid, problems
    for i, joint in enumerate(JOINTS):
        array = read_dataset(group, joint)
        if array is None or array.shape == (0,):
            continue
        if array.shape != (frames,):
            problems.append(f"confidences/{joint} has shape {array.shape}, expected ({frames},)")
        elif not np.isfinite(array).all():
            problems.append(f"confidences/{joint} is not finite")
        else:
            confidence[:, i], valid[i] = array, True
    return confidence, valid, problems


def _pose_problem(poses: NDArray[np.float64]) -> str:
    """Why [N, 4, 4] are not rigid poses, "" when they are (to float32 accuracy)."""
    bad = np.flatnonzero(~np.isfinite(poses).all(axis=(1, 2)))
    if len(bad):
        return f"is not finite in {len(bad)} frames, first at frame {bad[0]}"
    rotation = poses[:, :3, :3]
    error = np.abs(rotation.transpose(0, 2, 1) @ rotation - np.eye(3)).max(axis=(1, 2))
    bad = np.flatnonzero((error > 1e-3) | (np.linalg.det(rotation) < 0))
    if len(bad):
        return f"is no rotation in {len(bad)} frames, first at frame {bad[0]}"
    bad = np.flatnonzero((np.abs(poses[:, 3] - [0, 0, 0, 1]) > 1e-6).any(axis=1))
    return (
        f"does not end in the row 0 0 0 1 in {len(bad)} frames, first at frame {bad[0]}" if len(bad) else ""
    )


def _look_at_video(video: tuple[Path, int, int], poses: int) -> tuple[CameraFeature, list[str]]:
    """The camera, and what is odd about its video; DataError unless it has one frame a pose."""
    from ..video.mp4 import read_table

    table = read_table(*video)
    frames = len(table.shown)
    if frames != poses:
        raise DataError(f"the video has {frames} frames, the poses {poses}")
    notes = []
    if table.fps is None:
        notes.append("the video's frame rate varies; its frames are taken one by one, as the poses are")
    elif abs(float(table.fps) / FPS - 1) > 0.001:
        raise DataError(f"the video runs at {float(table.fps):g} frames a second, expected {FPS}")
    return CameraFeature(CAMERA, table.height, table.width), notes


def instruction(attributes: Mapping[str, Any], folder: str) -> tuple[str, str]:
    """(sentence, where it comes from).

    Apple's rule: a reversible task has two descriptions, of which `which_llm_description` names the one that was
    done. Then llm_description, description, and the folder's name.
    """
    which = "llm_description"
    if (
        text_of(attributes.get("llm_type")) == "reversible"
        and text_of(attributes.get("which_llm_description")) != "1"
    ):
        which = "llm_description2"
    for name in (which, "llm_description", "description"):
        if text_of(attributes.get(name)):
            return text_of(attributes[name]), name
    return folder.replace("_", " "), "folder name"


def _attributes(file: h5py.File) -> dict[str, Any]:
    """Root attributes that are single values, also where a writer wrapped them in an array of one."""
    return {name: value for name, value in file.attrs.items() if np.size(value) == 1}


def read(ref: EpisodeRef, options: Options) -> Episode:
    """One episode's columns; its video is left where it lies."""
    layout = LAYOUTS[options.layout]
    with _open(ref.files, ref.locator) as file:
        raw = _load(file, layout, everything=False)
    if raw.problems or raw.frames != ref.metadata["raw_frames"]:
        raise DataError(
            f"{ref.source_id}: {'; '.join(raw.problems) or 'the file changed while it was converted'}"
        )
    state = state_vector(raw.poses, options)
    columns: dict[str, NDArray[Any]] = {
        "observation.state": state[: ref.frames],
        "action": state[np.minimum(np.arange(1, ref.frames + 1), len(state) - 1)],
        CONFIDENCE.name: raw.confidence[: ref.frames],
        CONFIDENCE_VALID.name: np.tile(raw.confidence_valid, (ref.frames, 1)),
        CAMERA_POSE.name: _pose_vector(raw.poses["camera"])[: ref.frames],
    }
    for name in ("observation.state", "action", CAMERA_POSE.name):
        columns[name] = columns[name].astype(np.float32)
    video = next((path for path in ref.files if path.suffix in (".mp4", ".zip")), ref.files[0])
    held = inflate(video, ZipMember(*ref.locator["deflated"])) if "deflated" in ref.locator else None
    video, offset, size = (
        _whole(held) if held else (video, *ref.locator.get("video", (0, video.stat().st_size)))
    )
    height, width = ref.locator["height"], ref.locator["width"]
    clip = VideoClip(video, offset, size, 0, ref.frames, height, width, held=held)
    return Episode(ref, columns, {CAMERA: clip})


def state_vector(poses: Mapping[str, NDArray[np.float64]], options: Options) -> NDArray[np.floating]:
    """World poses [N, 4, 4] by joint -> [N, D] in the chosen layout and frame."""
    if options.layout == "dial18":
        return np.concatenate([_dial_wrist(poses[f"{side}Hand"], side) for side in ("right", "left")], axis=1)
    camera_world = invert_pose(poses["camera"])
    first_world = camera_world[:1]
    blocks = []
    for part in LAYOUTS[options.layout]:
        pose = poses[part.joint]
        if options.frame == "first-camera" or (options.frame == "camera" and part.joint == "camera"):
            pose = first_world @ pose  # a camera is nowhere in its own frame: say where it is from the first
        elif options.frame == "camera":
            pose = camera_world @ pose
        vector = _pose_vector(pose)
        blocks.append(vector if part.rotation else vector[:, :3])
    return np.concatenate(blocks, axis=1)


def _pose_vector(pose: NDArray[np.float64]) -> NDArray[np.floating]:
    """[N, 4, 4] -> [N, 9] position and rot6d."""
    return np.concatenate([pose[:, :3, 3], matrix_to_rot6d(pose[:, :3, :3])], axis=1)


def _dial_wrist(pose: NDArray[np.float64], side: str) -> NDArray[np.floating]:
    rot6d = matrix_to_rot6d(hand_to_dial(pose[:, :3, :3], side))
    return np.concatenate([points_to_dial(pose[:, :3, 3]), rot6d], axis=1)


def embodiment(options: Options, variant: str) -> Embodiment:
    check_options(options)
    names = tuple(name for part in LAYOUTS[options.layout] for name in part.names)
    world = "x right, y forward, z up" if options.layout == "dial18" else "x right, y up, z backward (ARKit)"
    frame = {
        "world": "world of the session",
        "camera": "camera of the same frame; the camera's own pose: camera of the first frame",
        "first-camera": "camera of the first frame",
    }[options.frame]
    features = tuple(
        Feature(name, "float32", names, unit="m, 1", frame=options.frame, description=words)
        for name, words in (
            ("observation.state", "positions, and orientations as rot6d by columns"),
            ("action", "the state one frame later"),
        )
    )
    return Embodiment(
        name="egodex",
        robot_type="human_hands",
        fps=FPS,
        fps_origin="poses and video at 30 Hz (arXiv 2505.11709); the video's own rate is checked",
        features=features,
        sidecar=(CONFIDENCE, CONFIDENCE_VALID, CAMERA_POSE),
        conventions={
            "action": "next_state",
            "last_action": "repeats the last state" if options.last == "repeat" else "last frame left out",
            "layout": options.layout,
            "frame": options.frame,
            "state_frame": frame,
            "axes": world if options.frame == "world" else "x right, y down, z forward (OpenCV)",
            "hand_axes": "DIAL: right [-c0, -c1], left [c0, -c1]"
            if options.layout == "dial18"
            else "as recorded",
            "state_rotation": "rot6d: first column, then second column",
            "quaternion_order": "none",
            "gripper_action": "none",
            "hand_order": "right, left" if options.layout == "dial18" else "left, right",
            "time_pairing": "row i belongs to video frame i",
            "image_rotation": "none: stored upright",
            "comparable_across": "one recording session: heading and origin are its own",
        },
        licence="cc-by-nc-nd",
        citation="EgoDex: Learning Dexterous Manipulation from Large-Scale Egocentric Video (arXiv 2505.11709)",
    )


CONVERTER = Converter(
    name="egodex",
    version=2,
    Options=Options,
    find=find,
    scan=scan,
    read=read,
    embodiment=embodiment,
    expects="<part>/<task>/<N>.hdf5 with <N>.mp4, for example part2/basic_pick_place/0.hdf5, or the published zips",
)
