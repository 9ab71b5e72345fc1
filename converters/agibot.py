"""AgiBot World Alpha and Beta: tele-operated AgiBot G1, two arms on a wheeled base, 30 Hz.

Raw tree     task_info/task_<tid>.json; proprio_stats/<tid>/<episode>/proprio_stats.h5;
             observations/<tid>/<episode>/{videos/<camera>_color.mp4, tactile/*.mp4, depth/head_depth_*.png};
             as folders, or in the published tars, which are read in place
Conventions  joints in rad, left arm first; end poses of the flanges in the base frame (x forward, y left, z up),
             quaternions xyzw; head yaw, pitch; waist pitch, lift; gripper *command* 0 open, 1 closed;
             gripper *state* a raw reading that grows when closing, here scaled to 0 open, 1 closed
Action       the files' arm, head and waist "action" equals the state of the same moment, which a policy would
             learn as the identity: `--action auto` takes the next state, and keeps the raw columns beside
Missing      an empty array is an absent quantity, never zeros: masked, or the episode is left out
Source       OpenDriveLab/AgiBot-World 689a18d and its issues, Tavish9/any4lerobot 6937315, one real recording
Licence      CC BY-NC-SA 4.0
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.episode import Dropped, Embodiment, Episode, EpisodeRef, FrameSource, Recording, VideoClip
from ..schemas.errors import DataError
from ..schemas.features import CameraFeature, Feature
from . import Converter
from .agibot_cameras import read_intrinsic, read_poses
from .agibot_files import (
    Place,
    Source,
    find_recordings,
    open_proprio,
    parameter_files,
    proprio_only,
    root_of,
    segments_of,
    sources,
    task_info,
    task_info_path,
)
from .agibot_proprio import (
    ACTION_GROUPS,
    GRIPPER_RANGES,
    OPTIONAL,
    SIDES,
    Raw,
    arm_action_is_state,
    gripper_closed,
    gripper_range,
    load,
    parse_gripper_range,
)
from .depth import PngDepth, decode_png16

FPS = 30
# Variants are datasets, and a dataset has one rule: `--action auto` sets apart recordings whose arms have commands
# of their own, and every setting those whose effectors have none.
COMMANDED, UNTOLD = "-commanded", "-untold"
DEPTH_FAR_M = 5.0

# Tasks of the dexterous hand and of tactile sensors, as any4lerobot lists them; the files decide.
DEXHAND_TASKS = frozenset(
    [
        475,
        536,
        547,
        548,
        549,
        554,
        577,
        578,
        591,
        595,
        608,
        620,
        622,
        660,
        679,
        705,
        710,
        727,
        730,
        731,
        749,
        753,
    ]
)
TACTILE_TASKS = frozenset([666, 675, 676, 677, 694, 737, 774])

HANDS = {"gripper": ("hand_left", "hand_right"), "dexhand": ("hand_left_fisheye", "hand_right_fisheye")}
FISHEYES = (
    "head_center_fisheye",
    "head_left_fisheye",
    "head_right_fisheye",
    "back_left_fisheye",
    "back_right_fisheye",
)


@dataclass(frozen=True)
class Options:
    action: str = field(
        default="auto",
        metadata={
            "choices": ("auto", "next-state", "as-stored"),
            "help": "arms, head and waist: next state where the file's action equals its state; always; never",
        },
    )
    cameras: str = field(
        default="main",
        metadata={
            "choices": ("main", "all"),
            "help": "head and hands (and touch), or the five fisheyes as well",
        },
    )
    depth: bool = field(default=False, metadata={"help": "keep the head's depth as a camera, 8-bit grey"})
    instruction: str = field(
        default="task",
        metadata={
            "choices": ("task", "task-scene"),
            "help": "the task's name, or '<name> | <initial scene>' as any4lerobot writes it",
        },
    )
    gripper_range: str = field(
        default="auto",
        metadata={
            "help": "raw gripper readings OPEN:CLOSED, or auto: 0:120 or the older 35:120 by each episode"
        },
    )
    language_columns: bool = field(
        default=False,
        metadata={
            "help": "segments also in LeRobot's language column, which repeats an episode's list on every frame"
        },
    )


# --- features ---------------------------------------------------------------------------------------------

ARM_NAMES = tuple(f"{side}_arm_joint_{i}" for side in SIDES for i in range(1, 8))
GRIPPER_NAMES = tuple(f"{side}_gripper" for side in SIDES)
HAND_NAMES = tuple(f"{side}_hand_joint_{i}" for side in SIDES for i in range(1, 7))
BODY_NAMES = ("head_yaw", "head_pitch", "waist_pitch", "waist_lift")
END_NAMES = tuple(f"{side}_{part}" for side in SIDES for part in ("x", "y", "z", "qx", "qy", "qz", "qw"))
BASE_NAMES = ("x", "y", "z", "qx", "qy", "qz", "qw")

CAPTURE_TIME = Feature(
    "capture_time_ns",
    "int64",
    ("capture_time_ns",),
    unit="ns",
    description="Unix time of the row, with its jitter",
)
END_POSE = Feature(
    "end_pose", "float32", END_NAMES, unit="m, 1", frame="base", description="flange poses, quaternions xyzw"
)
NEXT_END_POSE = Feature(
    "next_end_pose",
    "float32",
    END_NAMES,
    unit="m, 1",
    frame="base",
    description="flange poses the action leads to",
)
GRIPPER_RAW = Feature(
    "gripper_raw", "float32", GRIPPER_NAMES, unit="actuator", description="gripper readings as recorded"
)
BASE_POSE = Feature(
    "base_pose",
    "float32",
    BASE_NAMES,
    unit="m, 1",
    frame="odometry",
    description="identity where not recorded",
)
BASE_VELOCITY = Feature(
    "base_velocity", "float32", ("x", "yaw"), unit="m/s, rad/s", description="commanded; 0 where not recorded"
)
JOINT_CURRENT = Feature(
    "joint_current",
    "float32",
    ARM_NAMES,
    unit="as recorded",
    description="motor currents; 0 where not recorded",
)
WRENCH = Feature(
    "wrench",
    "float32",
    tuple(f"{side}_{part}" for side in SIDES for part in ("fx", "fy", "fz", "tx", "ty", "tz")),
    unit="N, N m",
    description="0 where not recorded",
)
POSED_CAMERAS = ("head", "hand_left", "hand_right")
POSE_PARTS = ("x", "y", "z", *(f"rot6d_{i}" for i in range(6)))
CAMERA_POSE = Feature(
    "camera_pose",
    "float32",
    tuple(f"{camera}_{part}" for camera in POSED_CAMERAS for part in POSE_PARTS),
    unit="m, 1",
    frame="base",
    description="where the cameras are: x right, y down, z forward (OpenCV); identity where not recorded",
)
RECORDED = Feature("recorded", "bool", OPTIONAL, description="which optional quantities the recording has")
ACTION_SENT = Feature(
    "action_sent", "bool", ACTION_GROUPS, description="whether the control source sent a signal in the frame"
)


def effector_names(variant: str) -> tuple[str, ...]:
    return HAND_NAMES if variant.startswith("dexhand") else GRIPPER_NAMES


def state_feature(variant: str) -> Feature:
    return Feature(
        "observation.state",
        "float32",
        (*ARM_NAMES, *effector_names(variant), *BODY_NAMES),
        unit="rad, m" if variant.startswith("dexhand") else "rad, 1, m",
        description="arm joints, grippers (0 open, 1 closed) or finger joints, head, waist",
    )


def action_feature(variant: str) -> Feature:
    state = state_feature(variant)
    return Feature(
        "action", "float32", state.names, unit=state.unit, description="absolute targets, as the state"
    )


def stored_action_feature(variant: str) -> Feature:
    names = (*ARM_NAMES, *effector_names(variant), *BODY_NAMES, *END_NAMES)
    return Feature(
        "stored_action",
        "float32",
        names,
        unit="rad, m",
        description="the file's action columns; rows not sent hold the state, or an effector's last command",
    )


# --- columns -----------------------------------------------------------------------------------------------


def next_rows(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """Row t + 1 at row t, the last repeated."""
    return array[np.minimum(np.arange(1, len(array) + 1), len(array) - 1)]


def takes_next_state(options: Options, variant: str) -> bool:
    """The one rule of a dataset."""
    return options.action == "next-state" or (options.action == "auto" and COMMANDED not in variant)


def episode_columns(
    raw: Raw, options: Options, variant: str, scale: tuple[float, float]
) -> dict[str, NDArray[Any]]:
    """The columns of one episode; `scale` is (open, closed) of its grippers."""
    frames = raw.frames
    dexterous = variant.startswith("dexhand")
    effector = raw.effector if dexterous else gripper_closed(raw.effector, *scale)
    moved = {"joint": raw.joint, "end": raw.end, "head": raw.head, "waist": raw.waist}
    target = {
        name: next_rows(array) if takes_next_state(options, variant) else raw.action[name]
        for name, array in moved.items()
    }
    command = raw.action["effector"]
    stored = (raw.action["joint"], command, raw.action["head"], raw.action["waist"], raw.action["end"])
    if variant.endswith(UNTOLD):
        command = next_rows(effector) if takes_next_state(options, variant) else effector
    columns: dict[str, NDArray[Any]] = {
        "observation.state": np.concatenate([raw.joint, effector, raw.head, raw.waist], axis=1),
        "action": np.concatenate([target["joint"], command, target["head"], target["waist"]], axis=1),
        END_POSE.name: raw.end,
        NEXT_END_POSE.name: target["end"],
        "stored_action": np.concatenate(stored, axis=1),
    }
    if not dexterous:
        columns[GRIPPER_RAW.name] = raw.effector
    for feature in (BASE_POSE, BASE_VELOCITY, JOINT_CURRENT, WRENCH, CAMERA_POSE):
        columns[feature.name] = raw.optional.get(feature.name, np.zeros((frames, feature.dim)))
    if BASE_POSE.name not in raw.optional:
        columns[BASE_POSE.name][:, 6] = 1.0  # a quaternion of zeros is no rotation
    if CAMERA_POSE.name not in raw.optional:
        columns[CAMERA_POSE.name] = np.tile([0.0, 0, 0, 1, 0, 0, 0, 1, 0], (frames, len(POSED_CAMERAS)))
    columns = {name: column.astype(np.float32) for name, column in columns.items()}
    columns[CAPTURE_TIME.name] = raw.time_ns
    columns[RECORDED.name] = np.tile([name in raw.optional for name in OPTIONAL], (frames, 1))
    columns[ACTION_SENT.name] = raw.sent
    return columns


# --- find, scan, read -------------------------------------------------------------------------------------


def find(raw: Path, options: Options) -> Iterator[Recording]:
    """One recording an episode folder, one an observation tar, in the order of their numbers."""
    parse_gripper_range(options.gripper_range)
    yield from find_recordings(raw)


def scan(recording: Recording, options: Options) -> Sequence[EpisodeRef | Dropped]:
    """Every episode of a recording, its numbers checked and its videos' frames counted."""
    try:
        alone = proprio_only(recording)
        if alone is not None:
            raise DataError(f"{alone} episodes in proprio_stats, but no observations of this task")
        found = sources(recording, options.depth)
    except (DataError, OSError) as error:
        names = tuple(path.name for path in recording.files)
        remedy = "download what is missing, or take this out of the raw folder"
        return [Dropped(recording.name, names, str(error), remedy, recording.split)]
    prefix = "/".join(recording.name.split("/")[:-1])
    return [Scan(f"{prefix}/{source.episode}", recording, source, options).run() for source in found]


class Scan:
    """One episode under examination; `problems` keep it out, `notes` go with it."""

    def __init__(self, source_id: str, recording: Recording, source: Source, options: Options) -> None:
        self.source_id, self.recording, self.source, self.options = source_id, recording, source, options
        self.root = root_of(recording.files[0])
        self.problems: list[str] = []
        self.notes: list[str] = [source.note] if source.note else []

    def run(self) -> EpisodeRef | Dropped:
        source, info, raw = self.source, None, self.numbers()
        try:
            info = task_info(self.root, source.task, source.episode)
        except (DataError, OSError) as error:
            self.problems.append(str(error))
        if raw is None:
            self.problems += [] if source.places else ["no videos"]
            return self.dropped()
        self.notes += raw.notes
        variant, scale, facts = self.classify(raw)
        cameras = self.cameras(variant, raw.frames)
        depth = self.depth(raw.frames) if self.options.depth else None
        if self.problems or info is None or source.proprio is None:
            return self.dropped()
        segments, odd = segments_of(info.stretches, raw.frames)
        text = info.name
        if self.options.instruction == "task-scene" and info.scene:
            text = f"{info.name} | {info.scene}"
        pictures = depth[1] if depth else []
        poses, known = self.parameters(variant, raw.frames)
        used = [source.proprio, *(place for _, place in cameras), *pictures[:1], *poses.values()]
        files = tuple(dict.fromkeys(place.path for place in used))
        where = {path: i for i, path in enumerate(files)}
        locator: dict[str, Any] = {
            "proprio": [where[source.proprio.path], *source.proprio[1:]],
            "cameras": {camera.key: [where[place.path], *place[1:]] for camera, place in cameras},
            "scale": list(scale),
        }
        if poses:
            locator["poses"] = {name: [where[place.path], *place[1:]] for name, place in poses.items()}
        if known:
            facts["intrinsics"] = known
        sizes = [camera for camera, _ in cameras]
        if depth:
            sizes.append(depth[0])
            names = [[place.path.name, *place[1:]] for place in pictures]
            locator["depth"] = {"file": where[pictures[0].path], "pictures": names}
        gap_ms = float(np.diff(raw.time_ns).max(initial=0)) / 1e6
        metadata = {
            "task_id": source.task,
            "episode_id": source.episode,
            "init_scene": info.scene,
            "arm_action_is_state": arm_action_is_state(raw),
            "largest_gap_ms": round(gap_ms, 3),
        }
        return EpisodeRef(
            source_id=self.source_id,
            split=self.recording.split,
            frames=raw.frames,
            instruction=text,
            files=(*files, task_info_path(self.root, source.task)),
            cameras=tuple(sizes),
            variant=variant,
            group=self.source_id.rsplit("/", 1)[0],
            segments=segments,
            metadata=metadata | facts,
            locator=locator,
            warnings=tuple(self.notes + odd),
        )

    def dropped(self) -> Dropped:
        places = [*self.source.places.values(), *([self.source.proprio] if self.source.proprio else [])]
        names = tuple(sorted({place.path.name for place in places}))[:20]
        remedy = "download this episode again, or leave it out"
        return Dropped(self.source_id, names, "; ".join(self.problems), remedy, self.recording.split)

    def numbers(self) -> Raw | None:
        if self.source.proprio is None:
            self.problems.append("no proprio_stats.h5")
            return None
        try:
            with open_proprio(self.source.proprio) as file:
                raw, problems = load(file)
        except (DataError, OSError, ValueError, KeyError, RuntimeError) as error:
            raw, problems = None, [str(error)]
        self.problems += problems
        return raw

    def classify(self, raw: Raw) -> tuple[str, tuple[float, float], dict[str, Any]]:
        """(variant, gripper readings open and closed, facts) of a recording."""
        task = self.source.task
        touch = task in TACTILE_TASKS or any(name.startswith("tactile/") for name in self.source.places)
        variant = "dexhand" if raw.effector.shape[1] == 12 else "tactile" if touch else "gripper"
        listed = "dexhand" if task in DEXHAND_TASKS else "tactile" if task in TACTILE_TASKS else ""
        if listed and listed != variant:
            self.notes.append(f"task {task} is listed as {listed}, the recording is {variant}")
        facts: dict[str, Any] = {}
        scale = (0.0, 1.0)
        if variant != "dexhand":
            command = raw.action["effector"] if raw.has_command else None
            if command is not None and (command.min() < -0.5 or command.max() > 1.5):
                self.problems.append(
                    f"gripper commands of {command.min():g} to {command.max():g}, expected 0 (open) to 1 (closed)"
                )
            try:
                scale = parse_gripper_range(self.options.gripper_range)
                name, note = self.options.gripper_range, ""
                if scale is None:
                    name, note = gripper_range(raw.effector, command)
                    scale = GRIPPER_RANGES[name]
                facts["gripper_range"] = name
                self.notes += [note] if note else []
            except DataError as error:
                self.problems.append(str(error))
                scale = (0.0, 1.0)
        facts["effector_command"] = raw.has_command
        same = arm_action_is_state(raw)
        if self.options.action == "auto" and not same:
            variant += COMMANDED
            worst = np.abs(raw.action["joint"] - raw.joint).max()
            self.notes.append(
                f"the arms' action differs from their state by up to {worst:.3g} rad: taken as stored"
            )
        if not raw.has_command:
            variant += UNTOLD
            self.notes.append(
                "no effector command was recorded: the action has its reading, by the arms' rule"
            )
        if self.options.action == "as-stored" and same:
            self.notes.append("the arms' action equals their state: a policy would learn to stand still")
        return variant, scale, facts

    def cameras(self, variant: str, frames: int) -> list[tuple[CameraFeature, Place]]:
        """Every camera of the variant, its video's frames counted in its sample table."""
        from ..video.mp4 import read_table

        found, missing = [], []
        for key, name in camera_files(variant, self.options).items():
            place = self.source.places.get(name)
            if place is None:
                missing.append(name)
                continue
            try:
                table = read_table(*place)
            except (DataError, OSError) as error:
                self.problems.append(f"{name}: {error}")
                continue
            if len(table.shown) != frames:
                self.problems.append(f"{name} has {len(table.shown)} frames, the recording {frames}")
            found.append((CameraFeature(key, table.height, table.width), place))
        if missing:
            self.problems.append(f"no {', '.join(missing)}")
        return found

    def parameters(self, variant: str, frames: int) -> tuple[dict[str, Place], dict[str, list[float]]]:
        """(places of the poses of all of POSED_CAMERAS, or none; pinhole constants by camera key)."""
        files = parameter_files(self.root, self.source.task, self.source.episode)
        hands = HANDS["dexhand" if variant.startswith("dexhand") else "gripper"]
        poses, known = {}, {}
        for name, key in zip(POSED_CAMERAS, ("head", *hands), strict=True):
            place = files.get(f"{key}_intrinsic_params.json")
            constants = read_intrinsic(place) if place else None
            if constants is not None:
                known[key] = constants
            place = files.get(f"{key}_extrinsic_params_aligned.json")
            if place is not None:
                found, odd = read_poses(place, frames)
                if found is not None:
                    poses[name] = place
                else:
                    self.notes.append(
                        f"{key}_extrinsic_params_aligned.json has {odd}: no camera poses are kept"
                    )
        return (poses if len(poses) == len(POSED_CAMERAS) else {}), known

    def depth(self, frames: int) -> tuple[CameraFeature, list[Place]] | None:
        names = sorted(
            n for n in self.source.places if n.startswith("depth/head_depth_") and n.endswith(".png")
        )
        places = [self.source.places[name] for name in names]
        if len(places) != frames:
            self.problems.append(
                f"{len(places)} depth pictures for {frames} frames; without --depth it converts"
            )
            return None
        try:
            height, width = decode_png16(places[0].read(), names[0]).shape
        except DataError as error:
            self.problems.append(str(error))
            return None
        return CameraFeature("head_depth", height, width), places


def camera_files(variant: str, options: Options) -> dict[str, str]:
    """Camera key -> file below the episode folder, for a variant."""
    kind = variant.split("-")[0]
    keys = ["head", *HANDS["dexhand" if kind == "dexhand" else "gripper"]]
    if options.cameras == "all":
        keys += FISHEYES
    found = {key: f"videos/{key}_color.mp4" for key in keys}
    if kind == "tactile":
        found |= {f"tactile_{side}_{i}": f"tactile/{side}_sensor_{i}.mp4" for side in SIDES for i in (1, 2)}
    return found


def read(ref: EpisodeRef, options: Options) -> Episode:
    """One episode's columns; its videos are left where they lie."""
    where = ref.locator

    def place(number: int, offset: int, size: int) -> Place:
        return Place(ref.files[number], offset, size)

    with open_proprio(place(*where["proprio"])) as file:
        raw, problems = load(file)
    if raw is None or raw.frames != ref.frames:
        reason = "; ".join(problems) or "the file changed while it was converted"
        raise DataError(f"{ref.source_id}: {reason}")
    if "poses" in where:
        found = [read_poses(place(*where["poses"][name]), raw.frames)[0] for name in POSED_CAMERAS]
        if any(pose is None for pose in found):
            raise DataError(f"{ref.source_id}: camera parameters changed while it was converted")
        known = [np.asarray(pose, np.float64) for pose in found if pose is not None]
        raw.optional[CAMERA_POSE.name] = np.concatenate(known, axis=1)
    opened, closed = where["scale"]
    cameras: dict[str, VideoClip | FrameSource] = {}
    for camera in ref.cameras:
        if camera.key in where["cameras"]:
            clip = place(*where["cameras"][camera.key])
            cameras[camera.key] = VideoClip(*clip, 0, ref.frames, camera.height, camera.width)
        else:
            first = ref.files[where["depth"]["file"]]
            pictures = [
                (first.parent / name if first.suffix == ".png" else first, offset, size)
                for name, offset, size in where["depth"]["pictures"]
            ]
            cameras[camera.key] = PngDepth(pictures, camera.height, camera.width, DEPTH_FAR_M)
    return Episode(ref, episode_columns(raw, options, ref.variant, (opened, closed)), cameras)


def embodiment(options: Options, variant: str) -> Embodiment:
    variant = variant or "gripper"
    dexterous = variant.startswith("dexhand")
    rule = "next state, the last repeated" if takes_next_state(options, variant) else "as stored in the file"
    sidecar = [CAPTURE_TIME, END_POSE, NEXT_END_POSE, stored_action_feature(variant), ACTION_SENT]
    sidecar += [] if dexterous else [GRIPPER_RAW]
    sidecar += [BASE_POSE, BASE_VELOCITY, JOINT_CURRENT, WRENCH, CAMERA_POSE, RECORDED]
    conventions: dict[str, Any] = {
        "action": "joint_pos_absolute",
        "action_rule": {
            "arms, head, waist": rule,
            "effector": rule if variant.endswith(UNTOLD) else "command as stored",
        },
        "gripper_action": "none" if dexterous else {"open": 0, "close": 1},
        "gripper_state": "none"
        if dexterous
        else "raw reading scaled by the gripper's own range to 0 open, 1 closed",
        "state_frame": "joints",
        "camera_pose": "camera to base; x right, y down, z forward (OpenCV); rot6d by columns",
        "end_pose_frame": "base: x forward, y left, z up; arm flanges, z out of the hand",
        "quaternion_order": "xyzw",
        "arm_order": "left, right",
        "waist": "pitch rad, lift m",
        "time_pairing": "row i belongs to video frame i; capture_time_ns keeps the true times",
        "image_rotation": "none: stored upright",
        "missing": "masked in 'recorded', never zeros taken for data",
    }
    if options.language_columns:
        conventions["language_columns"] = True
    if options.depth:
        conventions["depth_grey"] = {"head_depth_m": [0.0, DEPTH_FAR_M], "meaning": "grey 0 to 255, linear"}
    return Embodiment(
        name=f"agibot-{variant}",
        robot_type="a2d",
        fps=FPS,
        fps_origin="nominal rate of cameras and recorder; capture_time_ns has a median step of 33 to 34 ms",
        features=(state_feature(variant), action_feature(variant)),
        sidecar=tuple(sidecar),
        conventions=conventions,
        licence="cc-by-nc-sa-4.0",
        citation="AgiBot World Colosseo: A Large-Scale Manipulation Platform (2025)",
    )


def keeps_rate(options: Options) -> str:
    if options.action == "as-stored":
        return "--action as-stored keeps rows as they are; next-state or auto says where the robot shall be"
    return ""


CONVERTER = Converter(
    name="agibot",
    version=3,
    Options=Options,
    find=find,
    scan=scan,
    read=read,
    embodiment=embodiment,
    keeps_rate=keeps_rate,
    expects=(
        "task_info/task_<id>.json, observations/<id>/<episode>/videos/head_color.mp4 and "
        "proprio_stats/<id>/<episode>/proprio_stats.h5, or the published tars in these folders"
    ),
)
