"""LIBERO: tele-operated table-top manipulation in robosuite, Franka Panda, 20 Hz.

Raw tree     <suite>/<TASK>_demo.hdf5 with data/demo_<i>/{actions, states, robot_states, obs/*}
Kinds        raw release    data has attributes; obs[t] and robot_states[t] are taken *after* actions[t]
             regenerated    no attributes, 256 x 256, gaps in the numbering; obs[t] is taken before actions[t]
             Attributes get lost in copies: where the arm's joints in obs and states tell, they decide (§11 check 5)
Conventions  action = OSC deltas, 1 = 0.05 m and 0.5 rad, world axes, rotation vector; gripper -1 open, +1 close
             (CALVIN: the opposite). Poses in the world frame; orientation as robosuite's axis-angle in [0, 2 pi].
             Stored pictures are upside down (OpenGL rows).
Source       Lifelong-Robot-Learning/LIBERO 8f1084e `scripts/create_dataset.py`; openvla-oft 213c5ff
             `regenerate_libero_dataset.py`; data CC BY 4.0
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.episode import Dropped, Embodiment, Episode, EpisodeRef, Recording
from ..schemas.errors import DataError
from ..schemas.features import CameraFeature, Feature
from ..schemas.rotations import matrix_to_rot6d, rotvec_to_matrix
from . import Converter
from .hdf5 import find_dataset, find_group, kept_open, open_hdf5, read_dataset
from .words import text_of

if TYPE_CHECKING:
    import h5py

FPS = 20
FINGER_TRAVEL = 0.08  # metres between the fingers, fully open: each finger moves 0.04 m
CAMERAS = {"image": "agentview_rgb", "image2": "eye_in_hand_rgb"}
LOW_DIM = {"ee_pos": 3, "ee_ori": 3, "gripper_states": 2, "joint_states": 7}
SCENES = {  # scene class that a suite's tasks are built on (LIBERO benchmark/__init__.py)
    "libero_spatial": ("tabletop",),
    "libero_object": ("floor",),
    "libero_goal": ("tabletop",),
    "libero_10": ("kitchen", "living_room", "study"),
    "libero_90": ("kitchen", "living_room", "study"),
}
ATTRIBUTES = (  # of the group `data` in released files; a regenerated file has none
    "env_name",
    "env_args",
    "problem_info",
    "bddl_file_name",
    "macros_image_convention",
    "num_demos",
    "total",
    "tag",
)
NOOP_NORM = 1e-4  # openvla-oft's threshold on the six arm values


@dataclass(frozen=True)
class Options:
    image_rotation: str = field(
        default="rot180",
        metadata={
            "choices": ("rot180", "vflip", "raw"),
            "help": "turn of the stored pictures: as published checkpoints expect (mirrored), true geometry, none",
        },
    )
    time_pairing: str = field(
        default="causal",
        metadata={
            "choices": ("causal", "as-stored"),
            "help": "pair each observation with the action taken from it, or with the row beside it in the file",
        },
    )
    gripper: str = field(
        default="native",
        metadata={
            "choices": ("native", "open-one"),
            "help": "gripper action as recorded (-1 open, +1 close) or as OpenVLA reads it (1 open, 0 close)",
        },
    )
    drop_noops: bool = field(
        default=False,
        metadata={"help": "leave out frames whose action moves nothing, by openvla-oft's rule"},
    )
    regenerated_by: str = field(
        default="openvla",
        metadata={
            "choices": ("openvla", "any4lerobot"),
            "help": "who made files without attributes: openvla keeps them upside down, any4lerobot turns them",
        },
    )


STATE = Feature(
    "observation.state",
    "float32",
    ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "gripper_left", "gripper_right"),
    unit="m, rad, m",
    frame="world",
    description="grip-site position, hand orientation (robosuite axis-angle, not wrapped), two finger joints",
)
ACTION = Feature(
    "action",
    "float32",
    ("delta_x", "delta_y", "delta_z", "delta_rot_x", "delta_rot_y", "delta_rot_z", "gripper"),
    unit="0.05 m, 0.5 rad, 1",
    frame="world",
    description="OSC pose deltas in controller units from the measured pose, rotation vector applied from the left",
)
JOINTS = Feature(
    "joint_pos",
    "float32",
    tuple(f"joint_{i}" for i in range(1, 8)),
    unit="rad",
    description="Panda arm joints at the observation",
)
NEXT_POSE = Feature(
    "next_ee_pose",
    "float32",
    ("x", "y", "z", *(f"rot6d_{i}" for i in range(6)), "gripper_open"),
    unit="m, 1, 1",
    frame="world",
    description="end-effector pose one frame later (the last repeated), rot6d by columns, gripper 0 closed 1 open",
)


def find(raw: Path, options: Options) -> Iterator[Recording]:
    """Every HDF5 file one folder below `raw` (or directly in it, when `raw` is itself a suite).

    Where there is none, two folders below: the release downloads as one folder of suites.
    """

    def listed(pattern: str) -> list[Path]:
        return sorted(path for path in raw.glob(pattern) if not path.name.startswith("."))  # macOS's ._ files

    paths = listed("*.hdf5") + listed("*/*.hdf5") or listed("*/*/*.hdf5")
    seen: dict[str, Path] = {}
    for path in paths:
        name = f"{path.parent.name}/{path.stem}"
        if name in seen:
            raise DataError(
                f"two files are called {name}: in {seen[name].parent} and {path.parent}\n"
                "  next: convert their folders one by one, with --raw and --name"
            )
        seen[name] = path
    for name, path in seen.items():
        yield Recording(name, "train", (path,))


def scan(recording: Recording, options: Options) -> Sequence[EpisodeRef | Dropped]:
    """All demonstrations of one task file in numeric order, each checked by the rules of the fact sheet §11."""
    (path,) = recording.files
    try:
        with open_hdf5(path) as file:
            return _scan_file(file, recording, options)
    except (DataError, OSError, ValueError, KeyError, RuntimeError) as error:
        return [
            _dropped(recording, "", str(error), "download the file again or take it out of the raw folder")
        ]


def _scan_file(file: h5py.File, recording: Recording, options: Options) -> list[EpisodeRef | Dropped]:
    data = find_group(file, "data")
    if data is None:
        found = ", ".join(repr(name) for name in sorted(file)) or "nothing"
        return [
            _dropped(
                recording,
                "",
                f"no group 'data'; found: {found}",
                "is this a LIBERO demonstration file? see the raw tree in converters/libero.py",
            )
        ]
    demos = sorted((n for n in map(str, data) if re.fullmatch(r"demo_\d+", n)), key=lambda n: int(n[5:]))
    if not demos:
        return [
            _dropped(recording, "", "group 'data' holds no demo_<i>", "take the file out of the raw folder")
        ]
    suite, stem = recording.name.split("/", 1)
    attributes = _attributes(data)
    problem = _json(attributes.get("problem_info"))
    bddl_instruction = text_of(problem.get("language_instruction"))
    scene = text_of(problem.get("problem_name")) or re.sub(r"_SCENE\d+$", "", _scene(stem))
    misplaced = _suite_problem(suite, scene)
    # Paths in released files are not to be trusted, unless they name this very task.
    bddl = Path(text_of(attributes.get("bddl_file_name")))
    elsewhere = bddl.parent.name if {bddl.parent.name, suite} <= SCENES.keys() else suite
    if not misplaced and elsewhere != suite and bddl.stem == stem.removesuffix("_demo"):
        misplaced = f"wrong suite folder: the file is in '{suite}', its bddl file in '{elsewhere}'"
    if misplaced:
        remedy = "move the file to its suite's folder"
        return [*(_dropped(recording, demo, misplaced, remedy) for demo in demos)]

    instruction = instruction_from_file(stem)
    notes: list[str] = []
    if bddl_instruction and bddl_instruction != instruction:
        notes.append(f"file name says '{instruction}', bddl says '{bddl_instruction}'; the file name is used")
    if elsewhere != suite:
        notes.append(f"bddl_file_name says {elsewhere}, the folder {suite}: the folder is used")
    declared = _count(attributes.get("num_demos"))
    if declared is not None and declared != len(demos):
        notes.append(f"attribute num_demos is {declared}, the file holds {len(demos)} demonstrations")

    loaded = {demo: _load(data, demo) for demo in demos}
    total = _count(attributes.get("total"))
    lengths = [len(d["actions"]) for d in loaded.values() if d.get("actions") is not None]
    if total is not None and total != sum(lengths):
        notes.append(f"attribute total is {total}, the demonstrations hold {sum(lengths)} steps")
    polarity = _file_polarity(loaded.values())
    kind, odd = _file_kind(loaded.values(), attributes)
    notes += [odd] if odd else []
    rows = text_of(attributes.get("macros_image_convention")).lower()
    if rows not in ("", "opengl", "opencv"):
        notes.append(f"macros_image_convention is '{rows}': read as opengl, rows bottom-up")

    result: list[EpisodeRef | Dropped] = []
    for demo in demos:
        raw = loaded[demo]
        problems = raw["problems"] or _check_demo(raw, polarity, kind)
        timing = ""
        if not problems:
            timing, conflict = _timing(raw, kind)
            problems = [conflict] if conflict else []
        kept = np.empty(0, np.int64)
        if not problems:
            kept = _rows(raw["actions"], timing, polarity, options)[0]
            if len(kept) == 0:
                problems = [f"no frame left of {len(raw['actions'])} after pairing"]
        if problems:
            result.append(
                _dropped(recording, demo, "; ".join(problems), "replay or download this demonstration again")
            )
            continue
        height, width = raw["pixels"]
        result.append(
            EpisodeRef(
                source_id=f"{recording.name}/{demo}",
                split=recording.split,
                frames=len(kept),
                instruction=instruction,
                files=recording.files,
                cameras=tuple(CameraFeature(key, height, width) for key in CAMERAS),
                group=recording.name,
                metadata={
                    "suite": suite,
                    "scene": _scene(stem),
                    "kind": kind,
                    "demo": int(demo[5:]),
                    "raw_frames": len(raw["actions"]),
                    "bddl_instruction": bddl_instruction,
                },
                locator={"demo": demo, "timing": timing, "polarity": polarity, "kind": kind, "rows": rows},
                warnings=tuple(notes) if demo == demos[0] else (),
            )
        )
    return result


def read(ref: EpisodeRef, options: Options) -> Episode:
    """One demonstration's columns; its pictures are read from the file block by block."""
    (path,) = ref.files
    where = ref.locator
    file = kept_open(path)  # for as long as its pictures are read
    data = find_group(file, "data")
    if data is None:
        raise DataError(f"{ref.source_id}: the file changed while it was converted")
    raw = _load(data, where["demo"], to_check=False)
    if raw["problems"]:
        raise DataError(f"{ref.source_id}: {'; '.join(raw['problems'])}")
    obs_rows, action_rows = _rows(raw["actions"], where["timing"], where["polarity"], options)
    action = raw["actions"].astype(np.float64)
    action[:, 6] = convert_gripper(action[:, 6], where["polarity"], options.gripper)
    state = np.concatenate([raw["ee_pos"], raw["ee_ori"], raw["gripper_states"]], axis=1)
    following = np.minimum(obs_rows + 1, len(state) - 1)
    columns = {
        STATE.name: state[obs_rows].astype(np.float32),
        ACTION.name: action[action_rows].astype(np.float32),
        JOINTS.name: raw["joint_states"][obs_rows].astype(np.float32),
        NEXT_POSE.name: _pose(state[following]).astype(np.float32),
    }
    stored = where["rows"]
    if not stored and where["kind"] == "regenerated" and options.regenerated_by == "any4lerobot":
        stored = "rot180"
    cameras = {
        key: DemoFrames(file, f"data/{where['demo']}/obs/{name}", obs_rows, options.image_rotation, stored)
        for key, name in CAMERAS.items()
    }
    return Episode(ref, columns, cameras)


class DemoFrames:
    """One camera of one demonstration: rows `rows` of an HDF5 dataset [T, H, W, 3], turned as asked."""

    def __init__(
        self, file: h5py.File, name: str, rows: NDArray[np.int64], rotation: str, stored: str
    ) -> None:
        self.file, self.name, self.rows = file, name, rows
        self.flips = _flips(rotation, stored)
        dataset = find_dataset(file, name)
        if dataset is None or dataset.ndim != 4:
            raise DataError(f"no pictures '{name}' in {file.filename}")
        self.dataset = dataset
        self.height, self.width = int(self.dataset.shape[1]), int(self.dataset.shape[2])

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        rows = self.rows[start:stop]
        first, last = int(rows[0]), int(rows[-1]) + 1
        try:
            block = self.dataset[first:last]
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"pictures of {self.name} in {self.file.filename} cannot be read: {error}"
            ) from error
        if len(block) != len(rows):  # frames between were left out as no-ops
            block = block[rows - first]
        rows_step, columns_step = self.flips
        turned = block[:, ::rows_step, ::columns_step]
        if columns_step == 1:
            return turned
        # Colour by colour: numpy copies a mirrored row of 3-byte pixels seven times slower than three of bytes.
        frames = np.empty(turned.shape, np.uint8)
        for colour in range(3):
            frames[..., colour] = turned[..., colour]
        return frames


def embodiment(options: Options, variant: str) -> Embodiment:
    return Embodiment(
        name="libero",
        robot_type="panda",
        fps=FPS,
        fps_origin="control_freq 20 in env_kwargs of every file and in both collection scripts",
        features=(STATE, ACTION),
        sidecar=(JOINTS, NEXT_POSE),
        conventions={
            "action": "osc_pose_delta",
            "action_unit": {"position_m": 0.05, "rotation_rad": 0.5},
            "action_frame": "world",
            "action_rotation": "rotation vector, applied from the left",
            "gripper_action": {"open": -1, "close": 1}
            if options.gripper == "native"
            else {"open": 1, "close": 0},
            "state_frame": "world",
            "state_rotation": "axis-angle in [0, 2 pi], not canonicalised",
            "quaternion_order": "xyzw",
            "time_pairing": options.time_pairing,
            "image_rotation": options.image_rotation,
            "no_ops": "dropped by openvla-oft's rule" if options.drop_noops else "kept",
        },
        licence="cc-by-4.0",
        citation="LIBERO: Benchmarking Knowledge Transfer for Lifelong Robot Learning (NeurIPS 2023)",
    )


def instruction_from_file(stem: str) -> str:
    """'KITCHEN_SCENE3_turn_on_the_stove_demo' -> 'turn on the stove'.

    LIBERO-Plus writes its perturbation into the name; those tokens are no part of the sentence.
    """
    name = stem.removesuffix("_demo")
    name = re.sub(r"^[A-Z_]*SCENE\d+_", "", name)
    name = re.sub(r" copy( \d+)?$", "", name)
    name = re.sub(r"_(view|initstate|noise|light|table|tb|add|level|language)_?[\d.-]+(_.*)?$", "", name)
    return name.replace("_", " ").strip()


def convert_gripper(gripper: NDArray[np.float64], polarity: str, target: str) -> NDArray[np.float64]:
    """Gripper actions from 'close-one' (-1 open, +1 close) or 'open-one' (1 open, 0 close) to `target`.

    'native' is close-one; 'open-one' clips to [0, 1] and inverts, as openvla-oft's transform does.
    """
    if target == "open-one":
        return gripper if polarity == "open-one" else 1.0 - np.clip(gripper, 0.0, 1.0)
    return 1.0 - 2.0 * gripper if polarity == "open-one" else gripper


def keep_actions(actions: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of [T, 7] actions openvla-oft keeps: a no-op moves nothing and repeats the last kept gripper value.

    The first row has no predecessor, so only its norm is tested.
    """
    still = np.linalg.norm(actions[:, :6], axis=1) < NOOP_NORM
    keep = np.ones(len(actions), bool)
    last: float | None = None
    for t, moving in enumerate(~still):
        keep[t] = moving or (last is not None and actions[t, 6] != last)
        if keep[t]:
            last = actions[t, 6]
    return keep


def _rows(
    actions: NDArray[np.float64], timing: str, polarity: str, options: Options
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(observation row, action row) of every frame to keep.

    With observations taken after the action of their row, the action taken *from* obs[t] stands in row t + 1:
    the first action and the last observation have no partner.
    """
    shift = 1 if timing == "after" and options.time_pairing == "causal" else 0
    action_rows = np.arange(shift, len(actions))
    if options.drop_noops:
        action_rows = action_rows[keep_actions(actions)[shift:]]
    return action_rows - shift, action_rows


def _seen_timing(raw: dict[str, Any]) -> tuple[str, float, float]:
    """('after' | 'before' | '', joint distances): is obs[t] taken after or before actions[t]? §11 check 5.

    `states[t]` always precedes actions[t], so the arm joints tell. A demonstration in which the arm stands still
    shows nothing.
    """
    states, joints = raw.get("states"), raw.get("joint_states")
    if raw["problems"] or states is None or joints is None:
        return "", 0.0, 0.0
    if states.shape[1] < 8 or not 2 <= len(states) == len(joints):
        return "", 0.0, 0.0
    arm = states[:, 1:8]
    with np.errstate(all="ignore"):  # infinities are the next check's to report
        after = float(np.abs(joints[:-1] - arm[1:]).mean())
        before = float(np.abs(joints - arm).mean())
    least, most = min(after, before), max(after, before)
    if not most >= 1e-6 or least > 0.5 * most:  # also where values are not finite
        return "", after, before
    return ("after" if after < before else "before"), after, before


def _file_kind(demos: Iterable[dict[str, Any]], attributes: Mapping[str, Any]) -> tuple[str, str]:
    """('raw' | 'regenerated', note): by the attributes, unless most demonstrations show the other kind's timing."""
    told = "raw" if any(name in attributes for name in ATTRIBUTES) else "regenerated"
    seen = Counter(_seen_timing(raw)[0] for raw in demos)
    if seen["after"] > seen["before"] and told != "raw":
        return "raw", "no attributes, yet observations follow their row's action: a raw file that lost them"
    if seen["before"] > seen["after"] and told == "raw":
        return (
            "regenerated",
            "a raw file's attributes, yet observations precede their row's action: regenerated",
        )
    return told, ""


def _timing(raw: dict[str, Any], kind: str) -> tuple[str, str]:
    """('after' | 'before', conflict) of one demonstration of a file of some kind."""
    expected = "after" if kind == "raw" else "before"
    seen, after, before = _seen_timing(raw)
    if seen in ("", expected):
        return expected, ""
    return seen, (
        f"observations are taken {seen} the action of their row (joint distance {after:.2g} after, "
        f"{before:.2g} before), but the file looks like a {kind} one, where they are taken {expected} it"
    )


def _check_demo(raw: dict[str, Any], polarity: str, kind: str) -> list[str]:
    """Every problem of one demonstration, from its low-dimensional data and picture shapes."""
    actions = raw["actions"]
    frames = len(actions)
    problems: list[str] = []
    if frames == 0:
        return ["the demonstration has no steps"]
    if actions.ndim != 2 or actions.shape[1] != 7:
        return [f"'actions' has shape {actions.shape}, expected (T, 7)"]
    lengths = {name: n for name, n in raw["lengths"].items() if n != frames}
    if lengths:
        listed = ", ".join(f"{name} {n}" for name, n in sorted(lengths.items()))
        problems.append(f"lengths differ: actions {frames}, {listed}")
    for name in ("actions", *LOW_DIM):
        bad = np.flatnonzero(~np.isfinite(raw[name].reshape(len(raw[name]), -1)).all(axis=1))
        if len(bad):
            problems.append(f"'{name}' is not finite in {len(bad)} steps, first at step {bad[0]}")
    if np.isfinite(actions).all():
        beyond = np.flatnonzero((np.abs(actions) > 1).any(axis=1))
        if len(beyond):
            problems.append(
                f"actions beyond [-1, 1] in {len(beyond)} steps, first at step {beyond[0]} "
                f"({actions[beyond[0]].round(3).tolist()})"
            )
        allowed = (0.0, 1.0) if polarity == "open-one" else (-1.0, 1.0)
        odd = sorted(set(np.unique(actions[:, 6])) - set(allowed))
        if odd and not len(beyond):
            problems.append(f"gripper action takes {odd[:4]}, expected only {list(allowed)}")
    if raw["num_samples"] is not None and raw["num_samples"] != frames:
        problems.append(f"attribute num_samples is {raw['num_samples']}, 'actions' has {frames} steps")
    if lengths:
        return problems
    if raw["ee_states"] is not None:
        joined = np.concatenate([raw["ee_pos"], raw["ee_ori"]], axis=1)
        if not np.allclose(raw["ee_states"], joined, rtol=0, atol=1e-6, equal_nan=True):  # may be float32
            problems.append("'ee_states' is not 'ee_pos' followed by 'ee_ori'")
    robot = raw["robot_states"]
    # A regenerated file copies its first robot_states row from the original, which was not simulated again.
    if robot is not None and kind == "raw" and robot.shape[1] == 9:
        if not np.allclose(robot[:, :2], raw["gripper_states"], atol=1e-6, equal_nan=True):
            problems.append("'robot_states' and 'gripper_states' disagree")
        elif not np.allclose(robot[:, 2:5], raw["ee_pos"], atol=1e-6, equal_nan=True):
            problems.append("'robot_states' and 'ee_pos' disagree")
    return problems


def _load(data: h5py.Group, demo: str, to_check: bool = True) -> dict[str, Any]:
    """Low-dimensional arrays, lengths and picture size of one demonstration; 'problems' when it cannot be used.

    Without `to_check` only what becomes columns: a scan has looked at the rest.
    """
    raw: dict[str, Any] = {"problems": [], "lengths": {}, "actions": None}
    try:
        group = find_group(data, demo)
        obs = find_group(group, "obs") if group is not None else None
        if group is None or obs is None:
            raw["problems"] = [f"no group '{demo}/obs'"]
            return raw
        missing = [name for name in ("actions",) if name not in group]
        missing += [f"obs/{name}" for name in (*LOW_DIM, *CAMERAS.values()) if name not in obs]
        if missing:
            raw["problems"] = [f"missing {', '.join(repr(name) for name in missing)}"]
            return raw
        for name in ("actions", *(("states", "robot_states") if to_check else ())):
            raw[name] = _floats(group, name)
        for name in (*LOW_DIM, *(("ee_states",) if to_check else ())):
            raw[name] = _floats(obs, name)
        if raw["actions"] is None or raw["actions"].ndim == 0:
            raw["problems"].append("'actions' is no array, expected (T, 7)")
            raw["actions"] = None
        for name, dim in LOW_DIM.items():
            shape = None if raw[name] is None else raw[name].shape
            if shape is None or len(shape) != 2 or shape[1] != dim:
                raw["problems"].append(f"'obs/{name}' has shape {shape}, expected (T, {dim})")
        if not to_check:
            return raw
        for name in ("states", "robot_states", "ee_states"):
            if raw[name] is not None and raw[name].ndim != 2:
                raw["problems"].append(f"'{name}' has shape {raw[name].shape}, expected two dimensions")
        sizes = set()
        for name in CAMERAS.values():
            frames = find_dataset(obs, name)
            if frames is None or frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
                shape = None if frames is None else (frames.shape, str(frames.dtype))
                raw["problems"].append(f"'obs/{name}' is {shape}, expected (T, H, W, 3) uint8")
            else:
                raw["lengths"][name] = int(frames.shape[0])
                sizes.add((int(frames.shape[1]), int(frames.shape[2])))
                first = frames[0] if frames.shape[0] > 1 else None
                if first is not None and not np.any(first != first[:1, :1]):
                    raw["problems"].append(f"'obs/{name}' starts with a picture of a single colour")
        if len(sizes) > 1:
            raw["problems"].append(f"the cameras differ in size: {sorted(sizes)}")
        raw["pixels"] = next(iter(sizes), (0, 0))
        for name in ("rewards", "dones"):
            flags = find_dataset(group, name)
            if flags is not None and flags.shape:
                raw["lengths"][name] = int(flags.shape[0])
        for name in ("states", "robot_states", "ee_states", *LOW_DIM):
            if raw[name] is not None and raw[name].ndim:
                raw["lengths"][name] = len(raw[name])
        raw["num_samples"] = _count(group.attrs.get("num_samples"))
    except (DataError, OSError, ValueError, KeyError, RuntimeError) as error:
        raw["problems"] = [str(error)]
    return raw


def _floats(group: h5py.Group, name: str) -> NDArray[Any] | None:
    array = read_dataset(group, name)
    if array is not None and array.dtype.kind != "f":
        raise DataError(f"'{name}' is {array.dtype}, expected floating point")
    return array


def _file_polarity(demos: Any) -> str:
    """'close-one' for gripper actions in {-1, +1}, 'open-one' where the whole file holds {0, 1} with both."""
    values: set[float] = set()
    for raw in demos:
        if raw["actions"] is not None and raw["actions"].ndim == 2 and raw["actions"].shape[1] == 7:
            values |= set(np.unique(raw["actions"][:, 6]))
    return "open-one" if 0.0 in values and -1.0 not in values else "close-one"


def _suite_problem(suite: str, problem_name: str) -> str:
    if not re.fullmatch(r"libero_\w+", suite):
        return (
            f"folder '{suite}' is no LIBERO suite; expected <suite>/<TASK>_demo.hdf5 with a suite such as "
            f"{', '.join(SCENES)}"
        )
    # libero_kitchen_tabletop_manipulation, but also libero_tabletop_manipulation and libero_floor_manipulation
    scene = (
        problem_name.lower().removeprefix("libero_").removesuffix("_manipulation").removesuffix("_tabletop")
    )
    if problem_name and suite in SCENES and scene not in SCENES[suite]:
        return (
            f"wrong suite folder: '{suite}' holds {' / '.join(SCENES[suite])} scenes, this file is '{scene}'"
        )
    return ""


def _pose(state: NDArray[np.float64]) -> NDArray[np.floating[Any]]:
    """[T, 8] state -> [T, 10] xyz, rot6d, gripper_open in [0, 1]."""
    rot6d = matrix_to_rot6d(rotvec_to_matrix(state[:, 3:6]))
    opening = np.clip((state[:, 6:7] - state[:, 7:8]) / FINGER_TRAVEL, 0.0, 1.0)
    return np.concatenate([state[:, :3], rot6d, opening], axis=1)


def _flips(rotation: str, stored: str) -> tuple[int, int]:
    """(row step, column step) from a stored picture to the asked one.

    `stored`: rows bottom-up as robosuite's "opengl" (all else), top-down as its "opencv", or already "rot180".
    """
    rows, columns = {"rot180": (-1, -1), "vflip": (-1, 1), "raw": (1, 1)}[rotation]
    return {"opencv": (-rows, columns), "rot180": (-rows, -columns)}.get(stored, (rows, columns))


def _count(value: Any) -> int | None:
    """An attribute that counts, None where it is missing or says no number."""
    try:
        return int(text_of(value))
    except ValueError:
        return None


def _attributes(data: h5py.Group) -> dict[str, Any]:
    return dict(data.attrs.items())


def _json(text: Any) -> dict[str, Any]:
    try:
        value = json.loads(text_of(text) or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _scene(stem: str) -> str:
    match = re.match(r"^([A-Z_]*SCENE\d+)_", stem)
    return match.group(1) if match else ""


def _dropped(recording: Recording, demo: str, reason: str, remedy: str) -> Dropped:
    source_id = f"{recording.name}/{demo}" if demo else recording.name
    return Dropped(source_id, tuple(path.name for path in recording.files), reason, remedy, recording.split)


def keeps_rate(options: Options) -> str:
    return (
        "its actions are commands to a controller that runs at 20 Hz, and neither their sum nor every k-th of them "
        "is what was done\n  next: convert at 20 frames a second; evaluate and deploy at 20 Hz"
    )


CONVERTER = Converter(
    name="libero",
    version=2,
    Options=Options,
    find=find,
    scan=scan,
    read=read,
    embodiment=embodiment,
    keeps_rate=keeps_rate,
    expects="<suite>/<TASK>_demo.hdf5, for example libero_goal/open_the_middle_drawer_of_the_cabinet_demo.hdf5",
)
