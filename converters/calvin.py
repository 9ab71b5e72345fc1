"""CALVIN: tele-operated play at a table with drawer, slider, switch, button and three blocks; Franka Panda, 30 Hz.

Raw tree     <dataset>/{training,validation}/episode_<id>.npz, one file a *frame*; ep_start_end_ids.npy names the
             play episodes (both ends inclusive), scene_info.npy their scenes, lang_*/auto_lang_ann.npy the
             language windows; as a folder or inside the published zip
Conventions  poses of the tcp in the world, Euler angles extrinsic xyz; gripper -1 close, +1 open (LIBERO: the
             opposite); `actions[t]` is the pose reached at t + 1, `rel_actions` its clipped, scaled difference
Windows      64 or 33 to 48 frames of a play episode with a sentence; they overlap and cover about 37 % of it
Blocks       in the file in the order of the scene's configuration: B and D red, blue, pink; A pink, blue, red;
             C blue, red, pink. Here always red, blue, pink.
Source       mees/calvin fa03f01, mees/calvin_env 797142c (MIT); checks as in the fact sheet, section 11
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..schemas.episode import Dropped, Embodiment, Episode, EpisodeRef, Recording, Segment
from ..schemas.errors import DataError
from ..schemas.features import CameraFeature, Feature
from ..schemas.rotations import euler_to_matrix, matrix_to_rot6d
from . import Converter
from .calvin_files import (
    CACHE_FRAMES,
    FrameCache,
    Index,
    Npz,
    Split,
    Window,
    find_splits,
    frame_cache,
    open_split,
    open_vectors,
    raw_split,
    read_index,
    read_plays,
)
from .depth import depth_to_grey

FPS = 30
SPLITS = {"training": "train", "validation": "validation"}
MAX_POSITION_M = 0.02  # rel_actions 1.0, calvin_env `to_relative_action`
MAX_ROTATION_RAD = 0.05
SAME_RELATIVE = 1e-4  # 2 micrometres
VECTORS = {"actions": 7, "rel_actions": 7, "robot_obs": 15, "scene_obs": 24}
STATIC_DEPTH_M = (3.0, 7.0)  # seen: 3.7 to 6.2
WRIST_DEPTH_M = (0.0, 2.0)  # the camera's far plane

# Scenes by frame id (inclusive) as published, because scene_info.npy of older downloads is wrong.
# Third-party scan of all downloads (denizyuret/calvin-scripts); borders coincide with episode ends.
SCENE_TABLE: dict[str, tuple[tuple[str, int, int], ...]] = {
    "D": (("D", 0, 611_098),),
    "ABC": (("B", 0, 598_909), ("C", 598_910, 1_191_338), ("A", 1_191_339, 1_795_044)),
    "ABCD": (
        ("D", 0, 611_098),
        ("B", 611_099, 1_210_008),
        ("C", 1_210_009, 1_802_437),
        ("A", 1_802_438, 2_406_143),
    ),
}
LAST_TRAINING_ID = {611_098: "D", 1_795_044: "ABC", 2_406_143: "ABCD"}
LAST_VALIDATION_ID = 420_498
BLOCK_ORDER = {
    "A": ("pink", "blue", "red"),
    "B": ("red", "blue", "pink"),
    "C": ("blue", "red", "pink"),
    "D": ("red", "blue", "pink"),
}
BLOCKS = ("red", "blue", "pink")
PADDED_WINDOWS = 1_087  # validation annotations of ABC and ABCD, padded with repeats


@dataclass(frozen=True)
class Options:
    cut: str = field(
        default="segment",
        metadata={
            "choices": ("segment", "play"),
            "help": "one episode a language window, or one a play episode with its windows as segments",
        },
    )
    window_end: str = field(
        default="inclusive",
        metadata={
            "choices": ("inclusive", "exclusive"),
            "help": "does the last id of a language window belong to it? published LeRobot sets say yes",
        },
    )
    annotations: str = field(
        default="lang_annotations", metadata={"help": "folder of the language annotations inside a split"}
    )
    depth: bool = field(default=False, metadata={"help": "keep depth as two more cameras, 8-bit grey"})
    tactile: bool = field(default=False, metadata={"help": "keep the two tactile sensors as cameras"})
    language_columns: bool = field(
        default=False,
        metadata={
            "help": "windows also in LeRobot's language column, which repeats an episode's list on every frame"
        },
    )


POSE = ("x", "y", "z", "euler_x", "euler_y", "euler_z")
STATE = Feature(
    "observation.state",
    "float32",
    (*POSE, "gripper_width", *(f"joint_{i}" for i in range(1, 8)), "gripper_action"),
    unit="m, rad, m, rad, 1",
    frame="world",
    description="tcp pose, gripper opening, arm joints, last gripper command (-1 close, +1 open)",
)
ENVIRONMENT = Feature(
    "observation.environment_state",
    "float32",
    (
        *("door", "drawer", "button", "switch", "lightbulb", "led"),
        *(f"{block}_block_{name}" for block in BLOCKS for name in POSE),
    ),
    unit="m, m, m, rad, 1, 1, m, rad",
    frame="world",
    description="joints of the table, its two lamps, and the blocks' poses in one order for all scenes",
)
ACTION = Feature(
    "action",
    "float32",
    (*(f"delta_{name}" for name in POSE), "gripper"),
    unit="0.02 m, 0.05 rad, 1",
    frame="world",
    description="rel_actions: difference to the next pose, clipped at one unit; gripper -1 close, +1 open",
)
ACTION_ABS = Feature(
    "action_abs",
    "float32",
    (*POSE, "gripper"),
    unit="m, rad, 1",
    frame="world",
    description="actions: tcp pose of the next frame and the gripper command then in force",
)
EE_ROT6D = Feature(
    "ee_rot6d",
    "float32",
    tuple(f"rot6d_{i}" for i in range(6)),
    frame="world",
    description="orientation in observation.state as two matrix columns: its Euler angles jump at pi",
)
NEXT_POSE = Feature(
    "next_ee_pose",
    "float32",
    ("x", "y", "z", *(f"rot6d_{i}" for i in range(6)), "gripper_open"),
    unit="m, 1, 1",
    frame="world",
    description="action_abs with rot6d by columns and the gripper command as 0 closed, 1 open",
)


# --- what the numbers mean --------------------------------------------------------------------------------


def relative_action(actions: NDArray[np.floating], robot_obs: NDArray[np.floating]) -> NDArray[np.floating]:
    """[T, 7] absolute actions and [T, 15] states -> [T, 7] rel_actions, as calvin_env `to_relative_action`.

    Position differences are clipped at 2 cm and scaled to 1, Euler differences wrapped into [-pi, pi), clipped
    at 0.05 rad and scaled to 1; the gripper passes through.
    """
    position = np.clip(actions[:, :3] - robot_obs[:, :3], -MAX_POSITION_M, MAX_POSITION_M) / MAX_POSITION_M
    turn = (actions[:, 3:6] - robot_obs[:, 3:6] + np.pi) % (2 * np.pi) - np.pi
    rotation = np.clip(turn, -MAX_ROTATION_RAD, MAX_ROTATION_RAD) / MAX_ROTATION_RAD
    return np.concatenate([position, rotation, actions[:, 6:7]], axis=1)


def reorder_blocks(scene_obs: NDArray[np.floating], scene: str) -> NDArray[np.floating]:
    """[T, 24] as stored in `scene` -> [T, 24] with the blocks in the order red, blue, pink."""
    stored = BLOCK_ORDER[scene]
    blocks = [6 + 6 * stored.index(block) + i for block in BLOCKS for i in range(6)]
    return scene_obs[:, [*range(6), *blocks]]


def episode_columns(vectors: Mapping[str, NDArray[np.float64]], scene: str) -> dict[str, NDArray[np.float32]]:
    """The columns of an episode from its raw vectors [T, D]."""
    state, actions = vectors["robot_obs"].copy(), vectors["actions"]
    state[:, 14] = np.where(state[:, 14] > 0, 1.0, -1.0)  # 0 before a recording's first command
    next_pose = (
        actions[:, :3],
        matrix_to_rot6d(euler_to_matrix(actions[:, 3:6])),
        (actions[:, 6:7] > 0).astype(np.float64),
    )
    columns = {
        STATE.name: state,
        ENVIRONMENT.name: reorder_blocks(vectors["scene_obs"], scene),
        ACTION.name: vectors["rel_actions"],
        ACTION_ABS.name: actions,
        EE_ROT6D.name: matrix_to_rot6d(euler_to_matrix(state[:, 3:6])),
        NEXT_POSE.name: np.concatenate(next_pose, axis=1),
    }
    return {name: column.astype(np.float32) for name, column in columns.items()}


def scene_of(
    first: int, last: int, name: str, scenes: Mapping[str, tuple[int, int]], highest_id: int
) -> tuple[str, str]:
    """(scene letter, note) of frames [first, last] of the split `name` ("task_ABC_D/training").

    scene_info.npy says it, the published table checks it. Where they differ, the table is right for a complete
    published split (the known defect) and for a dataset whose name excludes the other scene. Elsewhere, in a
    cut-down or home-made copy, the ids may be its own and scene_info.npy is believed.
    """
    named = re.search(r"task_([A-D]+)_([A-D]+)/", name)
    if raw_split(name) == "training":
        possible = named[1] if named else ""
        published = LAST_TRAINING_ID.get(highest_id, "")
        table = SCENE_TABLE.get(published or possible, ())
    else:
        possible = named[2] if named else ""
        published = "D" if highest_id == LAST_VALIDATION_ID else ""
        table = (("D", 0, 1 << 62),)  # validation is scene D in every published dataset
    stored = _covering(first, last, [(s, a, b) for s, (a, b) in scenes.items()], "scene_info.npy")
    listed = _covering(first, last, table, "the published table")
    if stored and listed and stored != listed:
        believed = listed if published or (possible and stored not in possible) else stored
        source = "the table" if believed == listed else "scene_info.npy"
        note = f"scene_info.npy says scene {stored}, the published table {listed}: {source} is believed"
        return believed, note
    if not stored and not listed:
        raise DataError(
            f"no scene is known for frames {first} to {last}, and the order of the blocks depends on it: "
            "put the published scene_info.npy beside ep_start_end_ids.npy"
        )
    if stored or raw_split(name) == "validation":
        return stored or listed, ""
    return listed, f"scene_info.npy does not name a scene here: {listed} by the published table"


def _covering(first: int, last: int, scenes: Sequence[tuple[str, int, int]], where: str) -> str:
    """The scene that holds all of [first, last], "" where none holds any of it."""
    for scene, a, b in scenes:
        if a <= first and last <= b:
            return scene
    touched = sorted(scene for scene, a, b in scenes if a <= last and first <= b)
    if len(touched) > 1:
        raise DataError(f"frames {first} to {last} lie in scenes {' and '.join(touched)} by {where}")
    return ""


# --- pictures ---------------------------------------------------------------------------------------------


class Camera(NamedTuple):
    """A camera: the member of an npz it comes from, and how that becomes [H, W, 3] uint8."""

    key: str
    member: str
    picture: Callable[[NDArray[Any]], NDArray[np.uint8]]
    ndim: int  # of the member
    kind: str  # of its dtype


def _three(pixels: NDArray[np.uint8], first: int) -> NDArray[np.uint8]:
    return pixels[..., first : first + 3]


def list_cameras(options: Options, wrist: bool) -> list[Camera]:
    """`top` always, `wrist` where the copy has it, depth and touch on request."""
    plain, second = partial(_three, first=0), partial(_three, first=3)
    static = partial(depth_to_grey, near_m=STATIC_DEPTH_M[0], far_m=STATIC_DEPTH_M[1])
    near = partial(depth_to_grey, near_m=WRIST_DEPTH_M[0], far_m=WRIST_DEPTH_M[1])
    cameras = [
        (True, Camera("top", "rgb_static", plain, 3, "u")),
        (wrist, Camera("wrist", "rgb_gripper", plain, 3, "u")),
        (options.depth, Camera("top_depth", "depth_static", static, 2, "f")),
        (options.depth and wrist, Camera("wrist_depth", "depth_gripper", near, 2, "f")),
        # Two sensors in one member, [160, 120, 6]: finger link 10, then link 12.
        (options.tactile, Camera("tactile_1", "rgb_tactile", plain, 3, "u")),
        (options.tactile, Camera("tactile_2", "rgb_tactile", second, 3, "u")),
    ]
    return [camera for wanted, camera in cameras if wanted]


class NpzFrames:
    """One camera of frames [first, first + frames) of a split."""

    def __init__(
        self, cache: FrameCache, first: int, frames: int, camera: Camera, size: CameraFeature
    ) -> None:
        self.cache, self.first, self.frames, self.camera = cache, first, frames, camera
        self.height, self.width = size.height, size.width

    def __len__(self) -> int:
        return self.frames

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        block = np.empty((stop - start, self.height, self.width, 3), np.uint8)
        for t in range(start, stop):
            npz = self.cache.frame(self.first + t)
            try:
                block[t - start] = self.camera.picture(npz.keep(self.camera.member))
            except (DataError, ValueError) as error:
                split = self.cache.split
                raise DataError(f"{split.name}/{split.frame_name(self.first + t)}: {error}") from error
        return block


@dataclass(frozen=True)
class Pictures:
    """The cameras of a play episode, as its first readable frame shows them."""

    cameras: tuple[CameraFeature, ...]
    member_bytes: Mapping[str, int]  # what every other frame must have too
    variant: str = ""
    problem: str = ""  # why there are none


def look_at_pictures(split: Split, ids: NDArray[np.int64], options: Options) -> Pictures:
    problem = ""
    for frame in ids.tolist():
        try:
            with split.open(frame) as (read_at, size):
                npz = Npz(read_at, size)
                wrist = "rgb_gripper" in npz.members
                cameras, member_bytes = [], {}
                for camera in list_cameras(options, wrist):
                    flag = next((name for name in ("depth", "tactile") if name in camera.member), "")
                    if flag and camera.member not in npz.members:
                        raise DataError(
                            f"no '{camera.member}': a stripped copy, which converts without --{flag}"
                        )
                    pixels = npz.array(camera.member)
                    if pixels.ndim != camera.ndim or pixels.dtype.kind != camera.kind:
                        raise DataError(f"'{camera.member}' is {pixels.dtype} {pixels.shape}")
                    height, width, _ = camera.picture(pixels).shape
                    cameras.append(CameraFeature(camera.key, height, width))
                    member_bytes[camera.member] = npz.members[camera.member].size
                return Pictures(tuple(cameras), member_bytes, "" if wrist else "no-wrist")
        except FileNotFoundError:
            continue
        except (DataError, OSError) as error:
            problem = problem or f"{split.frame_name(frame)}: {error}"
    return Pictures((), {}, problem=problem)


# --- checks -----------------------------------------------------------------------------------------------

FAULTS = {
    "missing": "missing",
    "unreadable": "unreadable",
    "not finite": "with values that are not finite",
    "gripper": "with a gripper command other than -1 and +1",
    "rel_actions": "with rel_actions other than those recomputed from actions and robot_obs",
    "next state": "with actions that are not the next frame's pose (a gap, or frames of another recording)",
}


@dataclass
class Vectors:
    """The low-dimensional arrays of n frames (NaN where a frame cannot be read), and what is wrong with which."""

    ids: NDArray[np.int64]
    values: dict[str, NDArray[np.float64]]  # [n, D] by member name
    single: bool = False  # float32 somewhere, where the publisher writes float64
    rounded: bool = False  # rel_actions that are not exactly those recomputed
    faults: dict[str, dict[int, str]] = field(default_factory=lambda: {kind: {} for kind in FAULTS})

    def reasons(self, first: int, last: int) -> tuple[list[str], list[int]]:
        """What is wrong with frames [first, last]: sentences, and the frames they speak of."""
        sentences: list[str] = []
        blamed: set[int] = set()
        for kind, words in FAULTS.items():
            frames = sorted(frame for frame in self.faults[kind] if first <= frame <= last)
            if frames:
                blamed.update(frames)
                detail = self.faults[kind][frames[0]]
                count = f"{len(frames)} frame{'s' if len(frames) > 1 else ''}"
                sentences.append(f"{count} {words}: {id_ranges(frames)}{f' ({detail})' if detail else ''}")
        return sentences, sorted(blamed)


def read_vectors(split: Split, ids: NDArray[np.int64], member_bytes: Mapping[str, int]) -> Vectors:
    """The vectors of frames `ids`, a few kilobytes of each file; `member_bytes` every picture must have."""
    vectors = Vectors(ids, {name: np.full((len(ids), dim), np.nan) for name, dim in VECTORS.items()})
    for row, frame in enumerate(ids.tolist()):
        try:
            with open_vectors(split, frame) as npz:
                _take_vectors(npz, vectors, row)
                for name, expected in member_bytes.items():
                    found = npz.members[name].size if name in npz.members else 0
                    if found != expected:
                        raise DataError(f"'{name}' has {found} bytes, {expected} in the first frame")
        except FileNotFoundError:
            vectors.faults["missing"][frame] = ""
        except (DataError, OSError) as error:
            vectors.faults["unreadable"][frame] = str(error).splitlines()[0]
    return vectors


def _take_vectors(npz: Npz, vectors: Vectors, row: int) -> None:
    for name, dim in VECTORS.items():
        vector = npz.array(name)
        if vector.shape != (dim,) or vector.dtype.kind != "f":
            raise DataError(f"'{name}' is {vector.dtype} {vector.shape}, expected ({dim},) floating point")
        vectors.single |= vector.dtype.itemsize < 8
        vectors.values[name][row] = vector


def check_frames(vectors: Vectors) -> None:
    """Note every frame whose numbers contradict themselves or the next frame (fact sheet, section 11)."""
    ids, values, faults = vectors.ids, vectors.values, vectors.faults
    actions, relative, state = values["actions"], values["rel_actions"], values["robot_obs"]
    finite = np.logical_and.reduce([np.isfinite(array).all(axis=1) for array in values.values()])
    for frame in ids[~finite].tolist():
        if frame not in faults["missing"] and frame not in faults["unreadable"]:
            faults["not finite"][frame] = ""
    for name, gripper, allowed in (
        ("actions", actions[:, 6], (-1.0, 1.0)),
        ("rel_actions", relative[:, 6], (-1.0, 1.0)),
        ("robot_obs", state[:, 14], (-1.0, 0.0, 1.0)),
    ):
        for row in np.flatnonzero(finite & ~np.isin(gripper, allowed)):
            faults["gripper"][int(ids[row])] = f"{name} says {gripper[row]:g}"
    error = np.abs(relative_action(actions, state) - relative).max(axis=1)
    # Exactly 0 in published files; copies that went through float32 round positions of 0.5 m and angles of pi.
    vectors.rounded = bool((finite & (error > 1e-9) & (error <= SAME_RELATIVE)).any())
    for row in np.flatnonzero(finite & (error > SAME_RELATIVE)):
        faults["rel_actions"][int(ids[row])] = f"off by {error[row]:.2g}"
    follows = (np.diff(ids) == 1) & finite[:-1] & finite[1:]
    step = np.abs(actions[:-1, :6] - state[1:, :6]).max(axis=1)
    command = (actions[:-1, 6] > 0) != (state[1:, 14] > 0)
    for row in np.flatnonzero(follows & ((step > 1e-6) | command)):
        faults["next state"][int(ids[row])] = "gripper" if step[row] <= 1e-6 else f"off by {step[row]:.2g}"


def id_ranges(frames: Sequence[int], most: int = 6) -> str:
    """[4, 5, 6, 9] -> "4-6, 9"."""
    runs: list[list[int]] = []
    for frame in frames:
        if runs and frame == runs[-1][1] + 1:
            runs[-1][1] = frame
        else:
            runs.append([frame, frame])
    words = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:most]]
    return ", ".join(words) + (f" and {len(runs) - most} more" if len(runs) > most else "")


# --- find, scan, read -------------------------------------------------------------------------------------


def find(raw: Path, options: Options) -> Iterator[Recording]:
    """One recording a play episode. The only file opened is ep_start_end_ids.npy, which names them."""
    splits, broken = find_splits(raw)
    for path in broken:
        yield Recording(path.name, "train", (path,))  # for scan to say what is wrong
    for split in splits:
        name, files = SPLITS[raw_split(split.name)], split.files
        try:
            plays = read_plays(split)
        except DataError:
            plays = ()
        if not plays:
            yield Recording(split.name, name, files)
        for first, last in plays:
            yield Recording(f"{split.name}/{first:07d}-{last:07d}", name, files)


def scan(recording: Recording, options: Options) -> Sequence[EpisodeRef | Dropped]:
    """The windows of one play episode, or the play episode itself, every number in them checked."""
    match = re.fullmatch(r"(.*/(?:training|validation))(?:/(\d+)-(\d+))?", recording.name)
    try:
        if match is None:
            open_split(recording.files, recording.name)
            raise DataError(f"{recording.name} could not be read before; run the same command again")
        split = open_split(recording.files, match[1])
        index = read_index(recording.files, match[1], options.annotations)
        if match[2] is None:
            raise DataError("ep_start_end_ids.npy lists no play episode")
        return Scan(recording, split, index, (int(match[2]), int(match[3])), options).run()
    except (DataError, OSError) as error:
        remedy = "download it again, or take it out of the raw folder"
        files = tuple(path.name for path in recording.files)
        return [Dropped(recording.name, files, str(error), remedy, recording.split)]


class Cut(NamedTuple):
    """Frames [first, last] that become one episode."""

    source_id: str
    first: int
    last: int
    text: str
    segments: tuple[Segment, ...]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Scan:
    """One play episode under examination."""

    recording: Recording
    split: Split
    index: Index
    play: tuple[int, int]
    options: Options

    def run(self) -> list[EpisodeRef | Dropped]:
        started = windows_from(self.index, *self.play)
        inside = [window for window in started if window.end <= self.play[1]]
        leaving = [window for window in started if window.end > self.play[1]]
        notes, orphans = self.speak_for_split() if self.play == self.spokesman() else ([], [])
        if self.options.cut == "play":
            cuts = [self.cut_play(inside)]
            ids = np.arange(self.play[0], self.play[1] + 1)
            useless = [*leaving, *orphans, *(w for w in inside if self.length(w) <= 0)]
            if useless:
                notes.append(f"{len(useless)} language windows in no play episode are left out")
            lost: list[EpisodeRef | Dropped] = []
        else:
            if not self.index.windows:
                return self.without_windows() if self.play == self.index.plays[0] else []
            cuts = self.cut_windows([window for window in inside if self.length(window) > 0])
            # One frame more than a window has, where the play episode goes on: its last action leads there.
            reach = [np.arange(cut.first, min(cut.last + 1, self.play[1]) + 1) for cut in cuts]
            ids = np.unique(np.concatenate(reach)) if reach else np.empty(0, np.int64)
            first, last = self.play
            lost = [self.drop_window(w, f"leaves its play episode {first}-{last}") for w in leaving]
            lost += [self.drop_window(w, "lies in no play episode") for w in orphans]
            lost += [self.drop_window(w, "holds no frame") for w in inside if self.length(w) <= 0]
        pictures = look_at_pictures(self.split, ids, self.options)
        vectors = read_vectors(self.split, ids, pictures.member_bytes)
        check_frames(vectors)
        if vectors.single:
            notes.append("vectors are float32 where CALVIN writes float64: a re-packed copy")
        elif vectors.rounded:
            notes.append("rel_actions are those recomputed but for rounding: a re-packed copy")
        idle = int((vectors.values["robot_obs"][:, 14] == 0).sum())
        if idle:
            notes.append(
                f"{idle} frames have a last gripper command of 0, read as -1 (close) like the renderer"
            )
        episodes = [self.episode(cut, vectors, pictures, notes) for cut in cuts]
        return hang_notes([*episodes, *lost], list(dict.fromkeys(notes)))

    def cut_play(self, windows: Sequence[Window]) -> Cut:
        first, last = self.play
        segments = tuple(
            Segment(w.start - first, w.start - first + self.length(w), w.text, w.task)
            for w in windows
            if self.length(w) > 0
        )
        metadata = {"raw_start": first, "raw_end": last, "window_end": self.options.window_end}
        return Cut(self.recording.name, first, last, "", segments, metadata)

    def cut_windows(self, windows: Sequence[Window]) -> list[Cut]:
        seen: Counter[tuple[int, int]] = Counter()
        cuts = []
        for w in windows:
            frames = self.length(w)
            seen[w.start, w.end] += 1
            repeat = f"-{seen[w.start, w.end]}" if seen[w.start, w.end] > 1 else ""
            metadata = {
                "task": w.task,
                "raw_start": w.start,
                "raw_end": w.end,
                "window_end": self.options.window_end,
                "play_start": self.play[0],
                "play_end": self.play[1],
            }
            segment = Segment(0, frames, w.text, w.task)
            source_id = f"{self.split.name}/{w.start:07d}-{w.end:07d}{repeat}"
            cuts.append(Cut(source_id, w.start, w.start + frames - 1, w.text, (segment,), metadata))
        return cuts

    def length(self, window: Window) -> int:
        """Frames of a language window under the chosen reading of its end."""
        return window.end - window.start + (1 if self.options.window_end == "inclusive" else 0)

    def episode(
        self, cut: Cut, vectors: Vectors, pictures: Pictures, notes: list[str]
    ) -> EpisodeRef | Dropped:
        """A cut as an episode, or every reason why not."""
        reasons, blamed = vectors.reasons(cut.first, cut.last)
        scene = ""
        try:
            highest = self.index.plays[-1][1]
            scene, note = scene_of(cut.first, cut.last, self.split.name, self.index.scenes, highest)
            notes += [note] if note else []
        except DataError as error:
            reasons.append(str(error))
        if pictures.problem and not pictures.cameras:
            reasons.append(pictures.problem)
        if reasons:
            names = tuple(f"{self.split.name}/{self.split.frame_name(frame)}" for frame in blamed[:20])
            remedy = "download these frames again"
            if pictures.problem and not pictures.cameras and not blamed:
                wanted = [f"--{name}" for name in ("depth", "tactile") if getattr(self.options, name)]
                remedy = f"convert without {' and '.join(wanted)}" if wanted else remedy
            if self.options.cut == "play":
                remedy += "; --cut segment loses only the language windows that hold them"
            return Dropped(cut.source_id, names, "; ".join(reasons), remedy, self.recording.split)
        dataset = self.split.name.rsplit("/", 1)[0]
        facts = {"dataset": dataset, "raw_split": raw_split(self.split.name), "scene": scene}
        if self.index.annotated_by:
            facts["annotations"] = f"{self.index.annotated_by} {self.index.annotated_as}"
        return EpisodeRef(
            source_id=cut.source_id,
            split=self.recording.split,
            frames=cut.last - cut.first + 1,
            instruction=cut.text,
            files=self.recording.files,
            cameras=pictures.cameras,
            variant=pictures.variant,
            group=self.recording.name,
            segments=cut.segments,
            metadata=facts | cut.metadata,
            locator={"split": self.split.name, "first": cut.first, "last": cut.last, "scene": scene},
        )

    def spokesman(self) -> tuple[int, int]:
        """The play episode whose scan also speaks for the split as a whole: the first that yields anything."""
        plays = self.index.plays
        if self.options.cut == "segment":
            return next((play for play in plays if windows_from(self.index, *play)), plays[0])
        return plays[0]

    def speak_for_split(self) -> tuple[list[str], list[Window]]:
        """What is odd about the split as a whole, and windows that no play episode holds. Lists the folder."""
        index, notes = self.index, list(self.index.notes)
        starts, ends = np.array(index.plays).T
        listed = self.split.listed()
        play = np.searchsorted(starts, listed, side="right") - 1
        strays = listed[(play < 0) | (listed > ends[play])].tolist()
        if strays:
            notes.append(f"{len(strays)} stray frames in no play episode are left out: {id_ranges(strays)}")
        expected = int((ends - starts + 1).sum())
        absent = expected - (len(listed) - len(strays))
        if absent:
            notes.append(f"{absent:,} of the {expected:,} frames of {self.split.name} are missing")
        repeated = len(index.windows) - len({window[:4] for window in index.windows})
        if repeated:
            notes.append(f"{repeated} of {len(index.windows)} language windows repeat another word for word")
        if raw_split(self.split.name) == "validation" and len(index.windows) == PADDED_WINDOWS:
            notes.append("1,087 validation windows are those of ABC and ABCD, padded; D's 1,011 are right")
        if not index.annotated_by:
            notes.append("no auto_lang_ann.npy: play without language")
        at = np.searchsorted(starts, [window.start for window in index.windows], side="right") - 1
        orphans = [w for w, i in zip(index.windows, at, strict=True) if i < 0 or w.start > ends[i]]
        return notes, orphans

    def without_windows(self) -> list[EpisodeRef | Dropped]:
        found = f"{self.index.annotated_by} lists none" if self.index.annotated_by else "no auto_lang_ann.npy"
        remedy = "get the language annotations, or convert with --cut play"
        return [Dropped(self.split.name, (), f"no language windows: {found}", remedy, self.recording.split)]

    def drop_window(self, window: Window, reason: str) -> Dropped:
        words = f"language window {window.start}-{window.end} ('{window.text}') {reason}"
        remedy = "take the annotations that belong to this split"
        return Dropped(f"{self.split.name}/window-{window.row}", (), words, remedy, self.recording.split)


def windows_from(index: Index, first: int, last: int) -> Sequence[Window]:
    """The language windows that start in [first, last]."""
    return index.windows[bisect_left(index.windows, (first,)) : bisect_left(index.windows, (last + 1,))]


def hang_notes(found: list[EpisodeRef | Dropped], notes: list[str]) -> list[EpisodeRef | Dropped]:
    """Give what concerns a whole recording to its first episode, or else to its first dropped one."""
    if notes and found:
        at = next((i for i, entry in enumerate(found) if isinstance(entry, EpisodeRef)), 0)
        entry = found[at]
        if isinstance(entry, EpisodeRef):
            found[at] = replace(entry, warnings=tuple(notes))
        else:
            found[at] = replace(entry, reason="; ".join((entry.reason, *notes)))
    return found


def read(ref: EpisodeRef, options: Options) -> Episode:
    """One window or play episode. Frames stay in memory while windows of the group that overlap follow."""
    where = ref.locator
    cache = frame_cache(ref.files, where["split"])
    ids = np.arange(where["first"], where["last"] + 1)
    if len(ids) <= CACHE_FRAMES // 2:  # whole files now, their pictures later from memory
        vectors = Vectors(ids, {name: np.empty((len(ids), dim)) for name, dim in VECTORS.items()})
        for row, frame in enumerate(ids.tolist()):
            _take_vectors(cache.frame(frame), vectors, row)
    else:
        vectors = read_vectors(cache.split, ids, {})
        reasons, _ = vectors.reasons(where["first"], where["last"])
        if reasons:
            raise DataError(f"{ref.source_id}: {'; '.join(reasons)}")
    known = {camera.key: camera for camera in list_cameras(options, wrist=True)}
    cameras = {
        size.key: NpzFrames(cache, int(ids[0]), len(ids), known[size.key], size) for size in ref.cameras
    }
    return Episode(ref, episode_columns(vectors.values, where["scene"]), cameras)


def embodiment(options: Options, variant: str) -> Embodiment:
    conventions: dict[str, Any] = {
        "action": "ee_pose_delta",
        "action_unit": {"position_m": MAX_POSITION_M, "rotation_rad": MAX_ROTATION_RAD},
        "action_clipped": True,
        "action_frame": "world",
        "action_rotation": "per-axis Euler difference",
        "gripper_action": {"open": 1, "close": -1},
        "gripper_width_m": {"open": 0.08, "closed": 0.0},
        "state_frame": "world",
        "state_rotation": "Euler angles, extrinsic xyz",
        "quaternion_order": "xyzw",
        "time_pairing": "actions[t] is the pose of frame t + 1",
        "image_rotation": "none: stored upright",
        "cut": options.cut,
        "window_end": options.window_end,
        "block_order": list(BLOCKS),
    }
    if options.language_columns:
        conventions["language_columns"] = True
    if options.depth:
        conventions["depth_grey"] = {
            "top_depth_m": list(STATIC_DEPTH_M),
            "wrist_depth_m": list(WRIST_DEPTH_M),
            "meaning": "grey 0 at the first distance, 255 at the second, linear between",
        }
    return Embodiment(
        name="calvin",
        robot_type="panda",
        fps=FPS,
        fps_origin="control_freq 30 and record_fps 30 in calvin_env's configuration",
        features=(STATE, ENVIRONMENT, ACTION),
        sidecar=(ACTION_ABS, EE_ROT6D, NEXT_POSE),
        conventions=conventions,
        licence="mit",
        citation="CALVIN: A Benchmark for Language-Conditioned Policy Learning (RA-L 2022)",
    )


CONVERTER = Converter(
    name="calvin",
    version=2,
    Options=Options,
    find=find,
    scan=scan,
    read=read,
    embodiment=embodiment,
    expects="<dataset>/training/{ep_start_end_ids.npy, episode_<id>.npz}, for example task_D_D, or task_D_D.zip",
)
