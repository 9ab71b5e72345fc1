"""A first look at HDF5 files of an unknown kind: what is in them, and a draft of the map that would convert them.

Everything the draft fills in stands in the files or follows from a recognised layout, with its origin beside it;
what nobody can know from the files is "?" and marked OPEN. Recognised by their structure:

    robomimic   data/demo_*/{actions, obs/*}, `env_args` (JSON) on `data`; mask/train and mask/valid list episodes
    ALOHA       one episode a file: action, observations/{qpos, qvel, images/*}; 7 or 14 joints

Source: robomimic documentation, "Dataset structure"; tonyzhaozh/act 1a39fda `constants.py`, 566cd23
`record_sim_episodes.py` (gripper normalised to 0 closed, 1 open; DT = 0.02)
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..schemas.errors import DataError, UsageError
from .hdf5 import check_dataset, datasets_below, find_group, open_hdf5, read_dataset
from .mapped import OPEN, decode_picture, find_attribute, natural, open_points, picture_layout

if TYPE_CHECKING:
    import h5py

SUFFIXES = (".hdf5", ".h5", ".hdf")
EPISODE_WORDS = re.compile(r"(demo|episode|ep|traj|trajectory|rollout|run|take|trial)_?$", re.IGNORECASE)
ACTION_WORDS = re.compile(r"(^|_)(actions?|commands?|cmd|ctrl|targets?)(_|$)", re.IGNORECASE)
STATE_WORDS = re.compile(r"qpos|joint|ee|tcp|pose|pos|quat|gripper|proprio|state|arm", re.IGNORECASE)
NO_STATE = re.compile(
    r"vel|effort|torque|force|reward|done|time|stamp|depth|label|index|success|termin|object|env|goal|^states$",
    re.IGNORECASE,
)
FPS_WORDS = ("fps", "control_freq", "control_frequency", "frequency", "frame_rate", "hz", "rate")
TEXT_WORDS = ("language_instruction", "instruction", "language", "lang", "task_description", "prompt", "task")
ALOHA_JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")


@dataclass(frozen=True)
class Draft:
    """What was found, as text for the user, and the map file it suggests."""

    report: str
    text: str
    layout: str  # "robomimic", "ALOHA" or "" for one's own
    open: tuple[str, ...]


@dataclass
class _Found:
    """A dataset of the example episode."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str = ""  # camera, action, state, ...
    pictures: tuple[str, int, int] | None = None  # layout, height, width

    @property
    def leaf(self) -> str:
        return self.name.rpartition("/")[2]

    @property
    def width(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64)) if len(self.shape) > 1 else 1


@dataclass
class _Look:
    """What one example episode shows."""

    files: list[Path]
    example: Path
    pattern: str  # of files
    episodes: str  # of groups
    group: str
    found: list[_Found] = field(default_factory=list)
    layout: str = ""
    fps: int = 0
    fps_origin: str = ""
    fps_hint: str = ""
    texts: list[tuple[str, str, str]] = field(default_factory=list)  # (way, name, sentence)
    splits: dict[str, str] = field(default_factory=dict)
    extra_observation: bool = False
    two_valued: dict[int, list[float]] = field(
        default_factory=dict
    )  # dimension of the action: its two values
    robot: str = ""
    controller: str = ""

    def of_kind(self, kind: str) -> list[_Found]:
        return [entry for entry in self.found if entry.kind == kind]


def draft_map(raw: Path) -> Draft:
    """Look at the first file below `raw`; UsageError where there is none."""
    look = _look(raw)
    text = _map_text(look, raw)
    import tomllib

    return Draft(_report(look, raw), text, look.layout, tuple(open_points(tomllib.loads(text))))


# --- looking ----------------------------------------------------------------------------------------------


def _look(raw: Path) -> _Look:
    files = (
        [raw] if raw.is_file() else sorted(_files(raw), key=lambda p: natural(p.relative_to(raw).as_posix()))
    )
    if not files:
        inside = sorted(entry.name for entry in raw.iterdir())[:8] if raw.is_dir() else []
        raise UsageError(
            f"'{raw}' is no source, and no HDF5 files are in it\n  found: {', '.join(inside) or 'nothing'}\n"
            "  known sources: see dpipe convert --help"
        )
    suffix = files[0].suffix
    flat = raw.is_file() or all(path.parent == raw for path in files)
    problem = ""
    for example in files[:20]:  # a file cut short says nothing of the others
        try:
            with open_hdf5(example) as file:
                episodes, group = _episodes(file)
                pattern = f"*{suffix}" if flat else f"**/*{suffix}"
                look = _Look(files, example, pattern, episodes, group)
                _look_into(file, look)
                return look
        except (DataError, OSError) as error:
            problem = problem or str(error)
    raise DataError(f"none of the HDF5 files in {raw} can be read\n  found: {problem}")


def _files(raw: Path) -> Iterator[Path]:
    for path in raw.rglob("*"):
        if path.suffix in SUFFIXES and path.is_file():
            yield path


def _episodes(file: h5py.File) -> tuple[str, str]:
    """(pattern of the groups that are episodes, the first of them); ("", "") where the file is one episode."""
    paths = [name for name, _ in datasets_below(file)]
    for depth in (1, 2, 3):
        families: dict[tuple[str, str], dict[str, list[str]]] = {}
        for path in paths:
            parts = path.split("/")
            number = re.search(r"\d+$", parts[depth - 1]) if len(parts) > depth else None
            if number:
                stem = "/".join(parts[:depth])[: -len(number[0])]
                child = "/".join(parts[:depth])
                family = families.setdefault(("/".join(parts[: depth - 1]), stem), {})
                family.setdefault(child, []).append("/".join(parts[depth:]))
        for (_, stem), family in families.items():
            children = sorted(family, key=natural)
            held = sum(map(len, family.values()))
            alike = sum(set(family[child]) == set(family[children[0]]) for child in children)
            named = EPISODE_WORDS.search(stem.rpartition("/")[2])
            if 2 * held > len(paths) and 2 * alike > len(children) and (named or len(children) > 2):
                return f"{stem}*", children[0]
    return "", ""


def _look_into(file: h5py.File, look: _Look) -> None:
    holder = find_group(file, look.group) if look.group else file
    assert holder is not None, "found by its own datasets"
    for name, dataset in datasets_below(holder):
        entry = _Found(name, tuple(map(int, dataset.shape or ())), str(dataset.dtype))
        look.found.append(entry)
        try:
            check_dataset(dataset)
            layout = picture_layout(dataset)
            if layout and not name.startswith("next_"):  # robomimic keeps every observation twice
                shape = dataset.shape
                size = shape[1:3] if layout == "hwc" else shape[2:4]
                if layout == "encoded":
                    size = decode_picture(np.asarray(dataset[0], np.uint8).tobytes(), name).shape[:2]
                entry.kind, entry.pictures = "camera", (layout, int(size[0]), int(size[1]))
        except DataError as error:
            entry.kind = f"unusable: {error}"
    _sort(look)
    _read_hints(file, look)
    _recognise(file, look)


def _sort(look: _Look) -> None:
    """Guess what each dataset is, by its name and its number of rows."""
    rows = Counter(e.shape[0] for e in look.found if e.shape and e.shape[0] > 1)
    frames = max((e.shape[0] for e in look.of_kind("camera")), default=0)
    if not frames and rows:  # of equally common numbers the larger: observations may be one more than actions
        frames = max(rows, key=lambda count: (rows[count], count))
    numeric = [
        e
        for e in look.found
        if not e.kind and e.shape and e.dtype.startswith(("float", "int", "uint", "bool"))
    ]
    actions = [e for e in numeric if ACTION_WORDS.search(e.leaf) and e.shape[0] in (frames, frames - 1)]
    actions.sort(key=lambda e: (e.leaf not in ("action", "actions"), e.name.count("/"), e.name))
    if actions:
        actions[0].kind = "action"
        look.extra_observation = actions[0].shape[0] == frames - 1
    for entry in numeric:
        if entry.kind or entry.shape[0] != frames or entry.name.startswith("next_"):
            continue
        if len(entry.shape) <= 2 and entry.width <= 64 and not NO_STATE.search(entry.leaf):
            entry.kind = "state" if STATE_WORDS.search(entry.leaf) else "column"
        elif len(entry.shape) <= 2 and entry.width <= 512:
            entry.kind = "column"


def _read_hints(file: h5py.File, look: _Look) -> None:
    """Rate, sentences and two-valued action dimensions, each with where it stands."""
    for word in FPS_WORDS:
        value = find_attribute(file, look.group, word)
        if isinstance(value, int | float | np.number) and float(value) > 0 and float(value) == int(value):
            look.fps, look.fps_origin = int(value), f"attribute '{word}' of the files"
            break
    for word in TEXT_WORDS:
        value = find_attribute(file, look.group, word)
        if isinstance(value, str | bytes) and len(value):
            text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
            look.texts.append(("attribute", word, text))
    for entry in look.found:
        if entry.leaf in TEXT_WORDS and entry.dtype == "object" and entry.shape in ((), (1,)):
            value = read_dataset(file, f"{look.group}/{entry.name}".lstrip("/"))
            first = np.asarray(value).reshape(-1)[0]
            text = first.decode("utf-8", "replace") if isinstance(first, bytes) else str(first)
            look.texts.append(("dataset", entry.name, text))
        if (
            re.search(r"time|stamp", entry.leaf, re.IGNORECASE)
            and len(entry.shape) == 1
            and entry.shape[0] > 2
        ):
            times = np.asarray(read_dataset(file, f"{look.group}/{entry.name}".lstrip("/")))
            if times.dtype.kind in "fiu":
                step = float(np.median(np.diff(times.astype(np.float64))))
                look.fps_hint = f"'{entry.name}' steps by {step:.6g}"
    actions = look.of_kind("action")
    if actions:
        values = read_dataset(file, f"{look.group}/{actions[0].name}".lstrip("/"))
        if values is not None and values.dtype.kind in "fiub":
            columns = values.reshape(len(values), -1)
            for i in range(columns.shape[1]):
                distinct = np.unique(columns[:, i])
                if len(distinct) == 2:
                    look.two_valued[i] = [float(v) for v in distinct]


def _recognise(file: h5py.File, look: _Look) -> None:
    names = {entry.name for entry in look.found}
    if look.episodes.startswith("data/") and "actions" in names:
        look.layout = "robomimic"
        arguments = _json(find_attribute(file, "data", "env_args"))
        settings = arguments.get("env_kwargs", {})
        rate = settings.get("control_freq")
        if isinstance(rate, int | float) and rate == int(rate) and rate > 0:
            look.fps, look.fps_origin = int(rate), "control_freq in env_args of the files"
        robots = settings.get("robots")
        look.robot = str(robots[0] if isinstance(robots, list) and robots else robots or "")
        controller = settings.get("controller_configs", {})
        if isinstance(controller, dict) and arguments.get("type") == 1:  # robosuite
            look.controller = str(controller.get("type", ""))
            look.controller += "" if controller.get("control_delta", True) else " absolute"
        text = _json(find_attribute(file, look.group, "ep_meta")).get("lang")
        if text:
            look.texts.insert(0, ("attribute", "ep_meta", str(text)))
        masks = {"train": "mask/train", "validation": "mask/valid"}
        look.splits = {split: path for split, path in masks.items() if path in file}
    elif {"action", "observations/qpos"} <= names and not look.episodes:
        action = next(entry for entry in look.found if entry.name == "action")
        if action.width in (7, 14):
            look.layout, look.robot = "ALOHA", "aloha"
            for entry in look.found:
                if entry.kind == "state" and entry.name != "observations/qpos":
                    entry.kind = "column"


def _json(text: Any) -> dict[str, Any]:
    try:
        value = json.loads(text) if isinstance(text, str | bytes) else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


# --- writing ----------------------------------------------------------------------------------------------


def _report(look: _Look, raw: Path) -> str:
    """What was found, for a person."""
    count = len(look.files)
    what = f"each group {look.episodes} is an episode" if look.episodes else "each file is an episode"
    where = f"{look.example.name}" + (f", {look.group}" if look.group else "")
    lines = [f"'{raw}' holds {count} HDF5 file{'s' if count > 1 else ''} of one's own; {what}"]
    if look.layout:
        lines.append(f"  recognised: {look.layout}")
    lines.append(f"  found in {where}:")
    width = min(40, max((len(entry.name) for entry in look.found), default=0))
    for entry in look.found:
        shape = " x ".join(map(str, entry.shape)) or "one value"
        kind = f"   likely {entry.kind}" if entry.kind in ("action", "state") else ""
        if entry.pictures:
            layout, height, wide = entry.pictures
            kind = f"   likely camera, {wide}x{height}" + (", encoded" if layout == "encoded" else "")
        elif entry.kind.startswith("unusable"):
            kind = f"   {entry.kind}"
        lines.append(f"    {entry.name:{width}s}  {shape} {entry.dtype}{kind}")
    return "\n".join(lines)


def _map_text(look: _Look, raw: Path) -> str:
    title = f"{raw.name}: {look.layout} files" if look.layout else raw.name
    lines = [
        f"# What the HDF5 files of {title} mean; drafted from {look.example.name}.",
        '# Answer every "?" marked OPEN, check the rest, then: dpipe convert FOLDER --map THIS_FILE',
        "",
        *_rate_lines(look),
        f"robot_type = {_quoted(_robot(look, raw))}",
        "",
        "[files]",
        f"pattern = {_quoted(look.pattern)}",
        f"episodes = {_quoted(look.episodes)}  "
        + ("# one group each" if look.episodes else "# empty: a file is an episode"),
    ]
    if look.extra_observation:
        lines.append(
            'last_observation = "drop"  # one observation more than actions: nothing was done from it'
        )
    if look.splits:
        inside = ", ".join(f"{split} = {_quoted(path)}" for split, path in look.splits.items())
        lines.append(f"splits = {{ {inside} }}")
    lines += ["", "[instruction]", *_instruction_lines(look), ""]
    names = _action_names(look)
    lines += _vector_lines("action", look.of_kind("action"), names, _action_notes(look))
    lines += ["", *_gripper_lines(look, names)]
    states = look.of_kind("state")
    lines += ["", *_vector_lines("state", states, _state_names(look, states, names), [])]
    taken: set[str] = set()
    for entry in look.of_kind("camera"):
        lines += ["", *_camera_lines(look, entry, _camera_key(entry, taken))]
    columns = look.of_kind("column")
    if columns:
        lines += ["", "# Kept beside the dataset, if you take the # away:"]
    for entry in columns:
        name = re.sub(r"\W", "_", entry.leaf)
        listed = ", ".join(_quoted(n) for n in _names(entry))
        lines.append(f"# [columns.{name}]")
        lines.append(f"# datasets = [{_quoted(entry.name)}]")
        lines.append(f"# names = [{listed}]")
    return "\n".join(lines) + "\n"


def _robot(look: _Look, raw: Path) -> str:
    return re.sub(r"\W+", "_", look.robot or raw.stem).strip("_").lower() or "unknown"


def _rate_lines(look: _Look) -> list[str]:
    if look.fps:
        return [f"fps = {look.fps}", f"fps_origin = {_quoted(look.fps_origin)}"]
    hint = f"; {look.fps_hint}" if look.fps_hint else ""
    if look.layout == "ALOHA":
        hint = "; ALOHA's recorder steps by DT = 0.02 s, which is 50, unless yours was changed"
    return [f'fps = "{OPEN}"  # OPEN: frames a second; the files do not say{hint}']


def _instruction_lines(look: _Look) -> list[str]:
    if not look.texts:
        return [
            f'text = "{OPEN}"  # OPEN: what the robot was told; a sentence for all, or instead of text',
            '#   name = "file" or "folder" (its name as the sentence), attribute = "...", dataset = "..."',
        ]
    way, name, sentence = look.texts[0]
    shown = " ".join(sentence.split())[:80]
    lines = [f"{way} = {_quoted(name)}  # here: {shown}"]
    return [*lines, 'key = "lang"'] if name == "ep_meta" else lines


def _action_notes(look: _Look) -> list[str]:
    if look.controller.startswith("OSC_POSE"):
        absolute = look.controller.endswith("absolute")
        meaning = "osc_pose_absolute" if absolute else "osc_pose_delta"
        return [f'meaning = "{meaning}"  # controller_configs in env_args of the files']
    if look.layout == "ALOHA":
        return ['meaning = "joint_position"  # of the leader arms', 'unit = "rad, 1"']
    return ['meaning = "as recorded"  # better: joint_position, ee_pose_delta, ...']


def _action_names(look: _Look) -> list[str]:
    actions = look.of_kind("action")
    if not actions:
        return []
    width = actions[0].width
    if look.layout == "ALOHA":
        return _aloha_names(width)
    if look.controller.startswith("OSC_POSE") and width % 7 == 0:
        prefix = "" if look.controller.endswith("absolute") else "delta_"
        arms = [""] if width == 7 else [f"arm{i}_" for i in range(width // 7)]
        axes = [f"{prefix}{axis}" for axis in ("x", "y", "z", "rot_x", "rot_y", "rot_z")]
        return [f"{arm}{name}" for arm in arms for name in (*axes, "gripper")]
    names = _names(actions[0])
    if len(look.two_valued) == 1 and width > 1:
        names[next(iter(look.two_valued))] = "gripper"
    return names


def _aloha_names(width: int) -> list[str]:
    sides = ("left", "right") if width == 14 else ("arm",)
    return [f"{side}_{joint}" for side in sides for joint in ALOHA_JOINTS]


def _gripper_lines(look: _Look, names: Sequence[str]) -> list[str]:
    if look.layout == "ALOHA":
        return ["[gripper]", "open = 1  # normalised by ALOHA's constants.py: 0 closed, 1 open", "close = 0"]
    if look.controller:
        return ["[gripper]", "open = -1  # robosuite's grippers: -1 opens, 1 closes", "close = 1"]
    at = [i for i, name in enumerate(names) if "gripper" in name]
    seen = "; ".join(
        f"{names[i]} takes {values[0]:g} and {values[1]:g}" for i, values in look.two_valued.items()
    )
    note = "of the action, when it opens" if at else "call the action's gripper dimension '...gripper' above"
    return [
        "[gripper]  # delete these three lines if there is none",
        f'open = "{OPEN}"  # OPEN: the value {note}' + (f" ({seen})" if seen else ""),
        f'close = "{OPEN}"  # OPEN',
    ]


def _state_names(look: _Look, states: Sequence[_Found], action_names: Sequence[str]) -> list[str]:
    if look.layout == "ALOHA":
        return list(action_names)
    return [name for entry in states for name in _names(entry)]


def _vector_lines(
    table: str, entries: Sequence[_Found], names: Sequence[str], notes: Sequence[str]
) -> list[str]:
    if not entries:
        return [
            f"[{table}]" + ("" if table == "action" else "  # delete this table if there is none"),
            f'datasets = ["{OPEN}"]  # OPEN: which of the datasets; none looks like it',
            f'names = ["{OPEN}"]  # OPEN: one a value',
        ]
    listed = ", ".join(_quoted(entry.name) for entry in entries)
    return [
        f"[{table}]",
        f"datasets = [{listed}]",
        f"names = [{', '.join(map(_quoted, names))}]",
        *notes,
    ]


def _names(entry: _Found) -> list[str]:
    """Names of a dataset's values: axes where the name says position or quaternion, else numbers."""
    leaf = re.sub(r"\W", "_", entry.leaf)
    short = re.sub(r"^robot0_|(?<=action|ommand|target)s$", "", leaf)
    if entry.width == 1:
        return [short]
    if entry.width == 3 and re.search(r"(^|_)pos(ition)?$", short):
        return [f"{short}_{axis}" for axis in "xyz"]
    if entry.width == 4 and short.endswith("quat") and leaf.startswith("robot0_"):  # robosuite: xyzw
        return [f"{short}_{axis}" for axis in "xyzw"]
    return [f"{short}_{i}" for i in range(entry.width)]


def _camera_key(entry: _Found, taken: set[str]) -> str:
    parts = entry.name.split("/")
    leaf = parts[-1]
    if leaf.lower() in ("rgb", "image", "images", "color", "colour", "data") and len(parts) > 1:
        leaf = parts[-2]
    key = re.sub(r"\W", "_", re.sub(r"[_-]?(image|rgb|color)s?$", "", leaf) or leaf)
    while key in taken:
        key += "_2"
    taken.add(key)
    return key


def _camera_lines(look: _Look, entry: _Found, key: str) -> list[str]:
    lines = [f"[cameras.{key}]", f"dataset = {_quoted(entry.name)}"]
    if entry.pictures and entry.pictures[0] == "encoded":
        if look.layout == "ALOHA":
            lines.append(
                'colours = "bgr"  # cv2.imencode was given RGB; look at a picture before you trust it'
            )
        else:
            lines.append('colours = "rgb"  # "bgr" if red and blue turn out swapped')
    return lines


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
