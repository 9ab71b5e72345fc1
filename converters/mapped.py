"""One's own HDF5 files, described by a map: which datasets are cameras, state and action, and what they mean.

    fps = 20                                  robot_type = "panda"
    [files]        pattern = "*.hdf5"         episodes = "data/demo_*": one group each; "" where a file is one
    [instruction]  text = "...", attribute = "..." (key = "..." in its JSON), dataset = "...", or
                   name = "file" | "folder": the name, its underscores as spaces
    [action]       datasets = ["actions"]     names = [...]; several datasets are joined in order
    [gripper]      open = -1, close = 1       what the action says; no such table: no gripper
    [state]        datasets, names            observation.state
    [cameras.top]  dataset = "obs/top"        colours = "rgb" | "bgr", rotate = 0 | 90 | 180 | 270
    [columns.force]  datasets, names, dtype   more columns, kept beside the dataset

`dpipe convert FOLDER` drafts such a map (`mapped_draft.py`) and marks what the files do not say with "?".
A camera is [T, H, W, 3] or [T, 3, H, W] uint8, or T encoded pictures (JPEG, PNG; padded with zeros, or of
varying length). Layouts of robomimic and ALOHA are recognised by the draft; here they are maps like any other.
"""

from __future__ import annotations

import io
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.episode import Dropped, Embodiment, Episode, EpisodeRef, Recording
from ..schemas.errors import DataError, UsageError, unknown_name
from ..schemas.features import CameraFeature, Feature
from . import MAPPED, Converter
from .hdf5 import find_dataset, find_group, open_hdf5, read_dataset
from .words import text_of

if TYPE_CHECKING:
    import h5py

OPEN = "?"  # what only the person who recorded the files can say
MAGIC = (b"\xff\xd8\xff", b"\x89PNG")
STATE, ACTION = "observation.state", "action"


@dataclass(frozen=True)
class Options:
    map: Mapping[str, Any] = field(default_factory=dict)
    """The map as read from its file: the dataset is made by what it says, wherever it lies."""


# --- the map ----------------------------------------------------------------------------------------------

TABLES = {
    "files": ("pattern", "episodes", "splits", "last_observation"),
    "instruction": ("text", "attribute", "key", "dataset", "name"),
    "action": ("datasets", "names", "meaning", "unit", "frame"),
    "state": ("datasets", "names", "unit", "frame"),
    "gripper": ("open", "close"),
    "cameras": ("dataset", "colours", "rotate"),  # of each
    "columns": ("datasets", "names", "unit", "frame", "dtype"),  # of each
    "conventions": (),
}
SINGLE = ("fps", "fps_origin", "robot_type", "licence")
DTYPES = ("float32", "float64", "int64", "bool")


@dataclass(frozen=True)
class Vector:
    """A column made of datasets joined in order; its names say how wide each joined row is."""

    feature: Feature
    datasets: tuple[str, ...]


@dataclass(frozen=True)
class MapCamera:
    key: str
    dataset: str
    colours: str = "rgb"
    rotate: int = 0


@dataclass(frozen=True)
class Map:
    """A checked map."""

    fps: int
    fps_origin: str
    robot_type: str
    licence: str
    pattern: str
    episodes: str
    splits: Mapping[str, str]
    drops_last_observation: bool
    instruction: Mapping[str, str]
    vectors: tuple[Vector, ...]  # action, state, then more columns
    cameras: tuple[MapCamera, ...]
    conventions: Mapping[str, Any]

    @property
    def sidecar(self) -> tuple[Feature, ...]:
        return tuple(v.feature for v in self.vectors if v.feature.name not in (ACTION, STATE))


def read_map(path: Path) -> dict[str, Any]:
    """A map file as plain values, checked; UsageError says what is wrong or still open."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no map at {path}\n  next: dpipe convert FOLDER drafts one") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    parse_map(values, str(path))
    return values


def open_points(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Entries that still are "?"."""
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += open_points(value, f"{prefix}{name}.")
        elif value == OPEN or (isinstance(value, list) and OPEN in value):
            found.append(f"{prefix}{name}")
    return found


def parse_map(values: Mapping[str, Any], where: str = "the map") -> Map:
    """Plain values to a Map; every problem in one UsageError."""
    still_open = open_points(values)
    if still_open:
        raise UsageError(
            f"{where} has open points: {', '.join(still_open)}\n"
            "  next: put in what they are; a robot without gripper needs no [gripper] table"
        )
    problems: list[str] = []

    def table(name: str) -> Mapping[str, Any]:
        value = values.get(name, {})
        if not isinstance(value, Mapping):
            problems.append(f"[{name}] must be a table")
            return {}
        return value

    known = [*TABLES, *SINGLE]
    for name in sorted(set(values) - set(known)):
        problems.append(str(unknown_name("entry", name, known)).replace("\n", ";"))
    for name, entries in TABLES.items():
        inside = table(name)
        nested = name in ("cameras", "columns")
        for key, inner in inside.items() if nested else [("", inside)]:
            title = f"[{name}.{key}]" if nested else f"[{name}]"
            if not isinstance(inner, Mapping):
                problems.append(f"{title} must be a table")
            elif entries:
                for extra in sorted(set(inner) - set(entries)):
                    problems.append(f"{title} knows {', '.join(entries)}, not '{extra}'")
    fps = values.get("fps")
    if not isinstance(fps, int) or isinstance(fps, bool) or not 0 < fps < 10_000:
        problems.append(f"fps is {fps!r}, expected a whole number of frames a second")
    files, instruction, gripper = table("files"), table("instruction"), table("gripper")
    ways = [name for name in ("text", "attribute", "dataset", "name") if instruction.get(name)]
    if len(ways) != 1:
        problems.append("[instruction] needs one of text, attribute, dataset, name")
    if instruction.get("name") not in (None, "file", "folder"):
        problems.append('[instruction] name is "file" or "folder"')
    if gripper and set(gripper) != {"open", "close"}:
        problems.append("[gripper] needs open and close")
    if "action" not in values:
        problems.append("[action] is missing")
    vectors = []
    for name, inner in [
        (ACTION, table("action")),
        (STATE, table("state")),
        *((str(name), inner) for name, inner in table("columns").items() if isinstance(inner, Mapping)),
    ]:
        if inner:
            try:
                vectors.append(_vector(name, inner))
            except ValueError as error:
                problems.append(str(error))
    cameras = []
    for key, inner in table("cameras").items():
        if isinstance(inner, Mapping):
            camera = MapCamera(str(key), str(inner.get("dataset", "")), **_picked(inner, "colours", "rotate"))
            cameras.append(camera)
            if not camera.dataset or "/" in camera.key:
                problems.append(f"[cameras.{key}] needs a dataset, and a key without '/'")
            if camera.colours not in ("rgb", "bgr") or camera.rotate not in (0, 90, 180, 270):
                problems.append(f'[cameras.{key}]: colours "rgb" or "bgr", rotate 0, 90, 180 or 270')
    if gripper and vectors and not any("gripper" in name for name in vectors[0].feature.names):
        problems.append(
            "[gripper] is given, but no dimension of the action is named so; call one '...gripper'"
        )
    if problems:
        raise UsageError(f"{where}: {len(problems)} problems\n" + "\n".join(f"    {p}" for p in problems))
    conventions: dict[str, Any] = {"action": table("action").get("meaning", "as recorded")}
    if gripper:
        conventions["gripper_action"] = {"open": gripper["open"], "close": gripper["close"]}
    conventions["time_pairing"] = "the action of a row is taken from the observation of the same row"
    conventions["image_rotation"] = {c.key: c.rotate for c in cameras if c.rotate} or "none"
    return Map(
        fps=int(fps or 0),
        fps_origin=str(values.get("fps_origin", "given in the map")),
        robot_type=str(values.get("robot_type", "unknown")),
        licence=str(values.get("licence", "")),
        pattern=str(files.get("pattern", "**/*.hdf5")),
        episodes=str(files.get("episodes", "")).strip("/"),
        splits={str(k): str(v) for k, v in files.get("splits", {}).items()},
        drops_last_observation=files.get("last_observation") == "drop",
        instruction={str(k): str(v) for k, v in instruction.items()},
        vectors=tuple(vectors),
        cameras=tuple(cameras),
        conventions=conventions | dict(table("conventions")),
    )


def _vector(name: str, told: Mapping[str, Any]) -> Vector:
    datasets, names = told.get("datasets"), told.get("names")
    for entry, value in (("datasets", datasets), ("names", names)):
        if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
            raise ValueError(f"'{name}' needs {entry}, a list of words")
    dtype = told.get("dtype", "float32")
    if dtype not in DTYPES:
        raise ValueError(f"'{name}' is of dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    unit, frame = str(told.get("unit", "")), str(told.get("frame", ""))
    return Vector(Feature(name, dtype, tuple(names or ()), unit, frame), tuple(datasets or ()))


def _picked(told: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: told[name] for name in names if name in told}


# --- finding and checking ---------------------------------------------------------------------------------


def find(raw: Path, options: Options) -> Iterator[Recording]:
    """Every file that meets the map's pattern, numbers counted as numbers."""
    told = parse_map(options.map)
    files = (
        [raw]
        if raw.is_file()
        else [p for p in raw.glob(told.pattern) if p.is_file() and not p.name.startswith(".")]
    )
    base = raw.parent if raw.is_file() else raw
    for path in sorted(files, key=lambda p: natural(p.relative_to(base).as_posix())):
        yield Recording(path.relative_to(base).with_suffix("").as_posix(), "train", (path,))


def natural(text: str) -> list[tuple[int, int | str]]:
    """A sorting key in which 2 comes before 10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", text) if part]


def episode_groups(file: h5py.File, pattern: str) -> list[str]:
    """Paths of the groups that meet a pattern such as "data/demo_*", one `*` pattern a level; [""] for none."""
    found = [""]
    for level in pattern.split("/") if pattern else []:
        below = []
        for path in found:
            group = find_group(file, path) if path else file
            names = [str(name) for name in group] if group is not None else []
            below += [_join(path, n) for n in sorted(names, key=natural) if fnmatchcase(n, level)]
        below = [path for path in below if find_group(file, path) is not None]
        found = below
    return found


def scan(recording: Recording, options: Options) -> Sequence[EpisodeRef | Dropped]:
    """Every episode of one file, checked but for its pixels."""
    (path,) = recording.files
    told = parse_map(options.map)
    remedy = "correct the map where it does not fit this file, or take the file out of the folder"
    try:
        with open_hdf5(path) as file:
            groups = episode_groups(file, told.episodes)
            if not groups:
                raise DataError(
                    f"no group meets '{told.episodes}'; found: {', '.join(sorted(file)) or 'nothing'}"
                )
            splits = _splits(file, told)
            result: list[EpisodeRef | Dropped] = []
            for group in groups:
                source_id = f"{recording.name}/{group}" if group else recording.name
                split = splits.get(group.rpartition("/")[2], recording.split)
                looked = _look(file, group, told)
                text, problem = _instruction(file, group, path, told)
                problems = looked.problems + ([problem] if problem else [])
                if problems:
                    result.append(Dropped(source_id, (path.name,), "; ".join(problems), remedy, split))
                    continue
                result.append(
                    EpisodeRef(
                        source_id=source_id,
                        split=split,
                        frames=looked.frames,
                        instruction=text,
                        files=recording.files,
                        cameras=tuple(
                            CameraFeature(key, height, width) for key, height, width in looked.cameras
                        ),
                        metadata={"file": recording.name, "group": group},
                        locator={"group": group},
                    )
                )
            return result
    except (DataError, OSError, ValueError, KeyError, RuntimeError) as error:
        return [Dropped(recording.name, (path.name,), str(error), remedy, recording.split)]


@dataclass
class _Look:
    frames: int = 0
    cameras: list[tuple[str, int, int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def _look(file: h5py.File, group: str, told: Map) -> _Look:
    """Lengths, shapes and values of one episode against the map."""
    look = _Look()
    lengths: dict[str, int] = {}
    for vector in told.vectors:
        try:
            columns = [_numbers(file, group, name) for name in vector.datasets]
            width = sum(column.shape[1] for column in columns)
            if width != vector.feature.dim:
                shapes = ", ".join(f"'{n}' {c.shape}" for n, c in zip(vector.datasets, columns, strict=True))
                look.problems.append(
                    f"{shapes}: {width} values a row, the map names {vector.feature.dim} for {vector.feature.name}"
                )
            for name, column in zip(vector.datasets, columns, strict=True):
                lengths[name] = len(column)
                bad = np.flatnonzero(~np.isfinite(column).all(axis=1))
                if len(bad):
                    look.problems.append(f"'{name}' is not finite in {len(bad)} rows, first at row {bad[0]}")
        except DataError as error:
            look.problems.append(str(error))
    for camera in told.cameras:
        try:
            frames = open_pictures(file, _join(group, camera.dataset))
            height, width = frames.height, frames.width
            turned = camera.rotate in (90, 270)
            look.cameras.append((camera.key, width if turned else height, height if turned else width))
            lengths[camera.dataset] = len(frames)
        except DataError as error:
            look.problems.append(str(error))
    actions = next(
        (lengths[n] for v in told.vectors for n in v.datasets if v.feature.name == ACTION and n in lengths), 0
    )
    allowed = {actions, actions + 1} if told.drops_last_observation else {actions}
    wrong = {name: n for name, n in lengths.items() if n not in allowed}
    if wrong:
        listed = ", ".join(f"'{name}' {n}" for name, n in wrong.items())
        hint = ""
        if set(wrong.values()) == {actions + 1}:
            hint = ' (one more than actions: last_observation = "drop" in [files] leaves the last one out)'
        look.problems.append(f"lengths differ: the action has {actions} rows, {listed}{hint}")
    elif not actions:
        look.problems.append("the episode has no rows")
    look.frames = actions
    return look


def _join(group: str, name: str) -> str:
    return f"{group}/{name}".strip("/")


def _numbers(file: h5py.File, group: str, name: str) -> NDArray[Any]:
    """A dataset of numbers as [T, D]; a scalar a row is D = 1, more dimensions are joined in C order."""
    values = read_dataset(file, _join(group, name))
    if values is None:
        raise DataError(f"no dataset '{_join(group, name)}'")
    if values.dtype.kind not in "fiub" or not values.ndim:
        raise DataError(f"'{name}' is {values.dtype} {values.shape}, expected rows of numbers")
    return values.reshape(len(values), -1)


def _splits(file: h5py.File, told: Map) -> dict[str, str]:
    """{name of an episode's group: split} by datasets that list them (robomimic's `mask/train`, `mask/valid`)."""
    result: dict[str, str] = {}
    for split, path in told.splits.items():
        listed = read_dataset(file, path)
        for name in np.asarray(listed).reshape(-1).tolist() if listed is not None else []:
            result[text_of(name)] = split
    return result


def _instruction(file: h5py.File, group: str, path: Path, told: Map) -> tuple[str, str]:
    """(instruction, "") or ("", what is missing)."""
    way = told.instruction
    if "text" in way:
        return way["text"], ""
    if "name" in way:
        name = path.stem if way["name"] == "file" else path.parent.name
        return name.replace("_", " ").strip(), ""
    if "dataset" in way:
        value = read_dataset(file, _join(group, way["dataset"]))
        text = text_of(np.asarray(value).reshape(-1)[:1]) if value is not None else ""
        return text, "" if text else f"no sentence in dataset '{way['dataset']}'"
    value = find_attribute(file, group, way["attribute"])
    if value is not None and "key" in way:
        try:
            value = json.loads(text_of(value)).get(way["key"])
        except (ValueError, AttributeError):
            value = None
    text = text_of(value)
    return text, "" if text else f"no sentence in attribute '{way['attribute']}'"


def find_attribute(file: h5py.File, group: str, name: str) -> Any:
    """An attribute of an episode's group, or of the nearest group above it that has one of that name."""
    while True:
        holder = find_group(file, group) if group else file
        if holder is not None and name in holder.attrs:
            return holder.attrs[name]
        if not group:
            return None
        group = group.rpartition("/")[0]


# --- reading ----------------------------------------------------------------------------------------------


def read(ref: EpisodeRef, options: Options) -> Episode:
    """One episode's columns; pictures are read from the file block by block."""
    (path,) = ref.files
    told, group = parse_map(options.map), ref.locator["group"]
    columns: dict[str, NDArray[Any]] = {}
    with open_hdf5(path) as file:
        for vector in told.vectors:
            rows = [_numbers(file, group, name)[: ref.frames] for name in vector.datasets]
            columns[vector.feature.name] = np.concatenate(rows, axis=1).astype(vector.feature.dtype)
    cameras = {c.key: MapFrames(path, _join(group, c.dataset), ref.frames, c) for c in told.cameras}
    return Episode(ref, columns, cameras)


class MapFrames:
    """One camera of one episode, turned and coloured as the map says; the file is open while it is read."""

    def __init__(self, path: Path, name: str, frames: int, camera: MapCamera) -> None:
        import h5py

        self.camera, self.frames = camera, frames
        self.file = h5py.File(path, "r", locking=False)
        self.pictures = open_pictures(self.file, name)
        height, width = self.pictures.height, self.pictures.width
        self.height, self.width = (width, height) if camera.rotate in (90, 270) else (height, width)

    def __len__(self) -> int:
        return self.frames

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        block = self.pictures.read(start, stop)
        if self.camera.colours == "bgr":
            block = block[..., ::-1]
        return np.rot90(block, self.camera.rotate // 90, axes=(1, 2))


@dataclass
class Pictures:
    """A dataset of pictures of one size: `layout` is "hwc", "chw" or "encoded"."""

    dataset: h5py.Dataset
    layout: str
    height: int
    width: int

    def __len__(self) -> int:
        return int(self.dataset.shape[0])

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """[n, H, W, 3] as stored, colours included."""
        try:
            rows = self.dataset[start:stop]
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"pictures of '{self.dataset.name}' cannot be read: {error}") from error
        if self.layout == "hwc":
            return rows
        if self.layout == "chw":
            return np.moveaxis(rows, 1, -1)
        block = np.empty((len(rows), self.height, self.width, 3), np.uint8)
        for t, row in enumerate(rows):
            picture = decode_picture(
                np.asarray(row, np.uint8).tobytes(), f"'{self.dataset.name}', row {start + t}"
            )
            if picture.shape != block.shape[1:]:
                raise DataError(
                    f"'{self.dataset.name}', row {start + t}: {picture.shape[1]}x{picture.shape[0]} pixels, "
                    f"the first row has {self.width}x{self.height}"
                )
            block[t] = picture
        return block


def open_pictures(file: h5py.File, name: str) -> Pictures:
    """The pictures at `name`; DataError where it holds none."""
    dataset = find_dataset(file, name)
    if dataset is None:
        raise DataError(f"no dataset '{name}'")
    layout = picture_layout(dataset)
    if layout is None:
        raise DataError(
            f"'{name}' is {dataset.dtype} {dataset.shape}: no pictures; expected uint8 [T, H, W, 3], [T, 3, H, W] "
            "or rows of JPEG or PNG"
        )
    if layout == "hwc":
        return Pictures(dataset, layout, int(dataset.shape[1]), int(dataset.shape[2]))
    if layout == "chw":
        return Pictures(dataset, layout, int(dataset.shape[2]), int(dataset.shape[3]))
    first = decode_picture(np.asarray(dataset[0], np.uint8).tobytes(), f"'{name}', row 0")
    return Pictures(dataset, layout, first.shape[0], first.shape[1])


def picture_layout(dataset: h5py.Dataset) -> str | None:
    """How a dataset holds pictures, by its shape and, where they are encoded, its first bytes."""
    import h5py

    shape, dtype = dataset.shape, dataset.dtype
    if not shape or shape[0] == 0:
        return None
    if dtype == np.uint8 and len(shape) == 4 and min(shape) > 0:
        return "hwc" if shape[3] == 3 else "chw" if shape[1] == 3 else None
    bytes_a_row = dtype == np.uint8 and len(shape) == 2 and shape[1] > 100
    varying = len(shape) == 1 and h5py.check_vlen_dtype(dtype) == np.uint8
    if not (bytes_a_row or varying):
        return None
    head = np.asarray(dataset[0], np.uint8)[:4].tobytes()
    return "encoded" if head.startswith(MAGIC) else None


def decode_picture(encoded: bytes, where: str) -> NDArray[np.uint8]:
    """A JPEG or PNG, perhaps padded with zeros, as [H, W, 3]."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG")) as image:
            if image.width * image.height > 1 << 26:
                raise DataError(f"{where}: {image.width}x{image.height} pixels; refused")
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: the picture cannot be decoded: {error}") from error


# --- meaning ----------------------------------------------------------------------------------------------


def embodiment(options: Options, variant: str) -> Embodiment:
    told = parse_map(options.map)
    return Embodiment(
        name=told.robot_type,
        robot_type=told.robot_type,
        fps=told.fps,
        fps_origin=told.fps_origin,
        features=tuple(v.feature for v in told.vectors if v.feature.name in (STATE, ACTION)),
        sidecar=told.sidecar,
        conventions=told.conventions,
        licence=told.licence,
    )


CONVERTER = Converter(
    name=MAPPED,
    version=1,
    Options=Options,
    find=find,
    scan=scan,
    read=read,
    embodiment=embodiment,
    expects="HDF5 files that meet the pattern in the map's [files] table",
)
