"""LeRobot datasets as a source: v3.0, v2.1 and v2.0, whoever wrote them.

Raw tree     a dataset folder (meta/info.json, data/, videos/), or a folder of such folders, one variant each
Rows         found by their `episode_index` and checked against the episode table; an episode the two disagree
             about is left out. Vectors are lists of any Arrow kind; statistics are not needed.
Cameras      video, whose packets are copied where an episode is whole groups of pictures; or images in the rows
Names        `actions` and `state` without their counterpart (openpi's converters) become `action` and
             `observation.state`, by which policies know them
Tasks        the sentence of the first frame is the instruction; where it changes, every stretch is a segment
Conventions  unknown, so "as recorded", except in datasets of ours, whose manifest comes along
Source       huggingface/lerobot 0.6.1, `datasets/`
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..schemas.episode import (
    Dropped,
    Embodiment,
    Episode,
    EpisodeRef,
    FrameSource,
    Recording,
    Segment,
    VideoClip,
)
from ..schemas.errors import DataError, unknown_name
from ..schemas.features import POLICY_NAMES, CameraFeature, Feature
from ..video.mp4 import SampleTable, read_table
from . import Converter
from .lerobot_files import (
    Camera,
    Source,
    first_line,
    is_dataset,
    open_parquet,
    open_source,
    read_rows,
    to_matrix,
)
from .words import text_of

LATE_S = 1e-3  # time stamps further than this from frame / fps are worth a word
PICTURES = ("PNG", "JPEG", "TIFF", "WEBP")


@dataclass(frozen=True)
class Options:
    leave_out: str = field(
        default="", metadata={"help": "columns and cameras not to carry over, separated by commas"}
    )


def _without(options: Options) -> set[str]:
    return {name.strip() for name in options.leave_out.split(",") if name.strip()}


def _features(source: Source, options: Options) -> list[Feature]:
    return [feature for feature in source.features if feature.name not in _without(options)]


def _renamed(source: Source, options: Options) -> dict[str, str]:
    """Column -> the name a policy looks for, where the dataset has nothing of that name."""
    there = {feature.name for feature in _features(source, options)}
    return {old: new for old, new in POLICY_NAMES.items() if old in there and new not in there}


def _cameras(source: Source, options: Options) -> list[Camera]:
    return [camera for camera in source.cameras if not {camera.name, camera.key} & _without(options)]


# --- finding ----------------------------------------------------------------------------------------------


def find(raw: Path, options: Options) -> Iterator[Recording]:
    """One recording a data file (v3.0) or 64 episodes (v2.x), as the dataset's own tables list them."""
    below = sorted(raw.iterdir()) if raw.is_dir() and not is_dataset(raw) else []
    roots = (
        [("", raw)] if is_dataset(raw) else [(f"{path.name}/", path) for path in below if is_dataset(path)]
    )
    for prefix, root in roots:
        source = open_source(root)
        _check_options(source, options)
        for name, rows in source.recordings():
            files = [source.data_path(row) for row in rows]
            for camera in _cameras(source, options):
                if camera.kind == "video":
                    files += [source.video_path(row, camera.name) for row in rows]
            yield Recording(prefix + name, source.split[rows[0]], (*source.tables, *dict.fromkeys(files)))


def _check_options(source: Source, options: Options) -> None:
    known = [f.name for f in source.features] + [n for c in source.cameras for n in (c.name, c.key)]
    for name in sorted(_without(options) - set(known)):
        raise unknown_name(f"column or camera of {source.root}", name, known)


# --- checking ---------------------------------------------------------------------------------------------


def scan(recording: Recording, options: Options) -> Sequence[EpisodeRef | Dropped]:
    """Every episode of a recording: its rows against the episode table, its frames against the video's table."""
    source = open_source(recording.files[0].parents[1])
    parts = recording.name.split("/")
    own = 2 if source.is_v3 else 1
    variant = "/".join(parts[:-own])
    rows = source.rows("/".join(parts[-own:]))
    result: list[EpisodeRef | Dropped] = []
    tables: dict[Path, SampleTable | str] = {}
    by_path: dict[Path, list[int]] = {}
    for row in rows:
        by_path.setdefault(source.data_path(row), []).append(row)
    for path, members in by_path.items():
        found = _look_at_rows(source, path, members, options)
        for row in members:
            result.append(_scan_episode(source, row, variant, found[row], tables, options))
    return result


class _Rows(NamedTuple):
    """What the data file says of one episode."""

    rows: range
    tasks: NDArray[np.int64] | None  # [T] task_index
    problems: list[str]
    notes: list[str]


def _look_at_rows(source: Source, path: Path, members: Sequence[int], options: Options) -> dict[int, _Rows]:
    """Rows, tasks and problems of every episode whose rows lie in one data file, column by column."""
    wanted = _features(source, options)
    images = [camera.name for camera in _cameras(source, options) if camera.kind == "image"]
    try:
        file = open_parquet(path)
        have = set(file.schema_arrow.names)
        missing = [f.name for f in wanted if f.name not in have] + [n for n in images if n not in have]
        if missing:
            raise DataError(f"{path.name} has no column {', '.join(map(repr, missing))}")
        place = _column(file, "episode_index") if "episode_index" in have else None
        frame = _column(file, "frame_index") if "frame_index" in have else None
        task = _column(file, "task_index") if "task_index" in have else None
        time = _column(file, "timestamp", "float64") if "timestamp" in have else None
    except DataError as error:
        return {row: _Rows(range(0), None, [str(error)], []) for row in members}
    if place is None:  # only where a file is an episode can the rows do without
        place = np.full(file.metadata.num_rows, source.number[members[0]] if not source.is_v3 else -1)
    order = np.argsort(place, kind="stable")
    found: dict[int, _Rows] = {}
    for row in members:
        number, length = int(source.number[row]), int(source.length[row])
        start, stop = np.searchsorted(place[order], [number, number + 1])
        rows, problems, notes = order[start:stop], [], []
        if len(rows) != length or not length:
            problems.append(f"{path.name} holds {len(rows)} rows of it, the episode table says {length}")
        elif rows[-1] - rows[0] + 1 != length:
            problems.append(f"its rows lie apart in {path.name}")
        elif frame is not None and not np.array_equal(frame[rows], np.arange(length)):
            problems.append(f"frame_index in {path.name} does not count from 0 to {length - 1}")
        elif time is not None:
            late = float(np.abs(time[rows] - time[rows[0]] - np.arange(length) / source.fps).max())
            if late > LATE_S:
                notes.append(f"time stamps are up to {late:.3g} s off frame / fps; they are written anew")
        at = range(int(rows[0]), int(rows[0]) + length) if not problems else range(0)
        found[row] = _Rows(at, task[rows] if task is not None else None, problems, notes)
    for feature in wanted:
        _check_column(file, feature, found)
    return found


def _column(file: Any, name: str, dtype: str = "int64") -> NDArray[Any]:
    try:
        return to_matrix(file.read(columns=[name]).column(name), 1, dtype)
    except DataError as error:
        raise DataError(f"column '{name}': {error}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"column '{name}' cannot be read: {first_line(error)}") from error


def _check_column(file: Any, feature: Feature, found: Mapping[int, _Rows]) -> None:
    """Add to each episode what is wrong with one of its columns; the whole file at once where nothing is."""
    try:
        column = file.read(columns=[feature.name]).column(feature.name)
    except (OSError, ValueError) as error:
        for rows in found.values():
            rows.problems.append(f"column '{feature.name}' cannot be read: {first_line(error)}")
        return
    try:
        whole = to_matrix(column, feature.dim, feature.dtype)
    except DataError:
        whole = None
    for rows in found.values():
        if not len(rows.rows):
            continue
        try:
            values = (
                to_matrix(column.slice(rows.rows.start, len(rows.rows)), feature.dim, feature.dtype)
                if whole is None
                else whole[rows.rows.start : rows.rows.stop]
            )
        except DataError as error:
            rows.problems.append(f"column '{feature.name}': {error}")
            continue
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
            rows.problems.append(
                f"'{feature.name}' is not finite in {len(bad)} frames, first at frame {bad[0]}"
            )


def _scan_episode(
    source: Source,
    row: int,
    variant: str,
    found: _Rows,
    tables: dict[Path, SampleTable | str],
    options: Options,
) -> EpisodeRef | Dropped:
    number = int(source.number[row])
    source_id = f"{variant}/episode_{number:06d}" if variant else f"episode_{number:06d}"
    problems, notes = list(found.problems), list(found.notes)
    if int(np.count_nonzero(source.number == number)) > 1:
        problems.append(f"the episode table lists episode {number} twice")
    data = source.data_path(row)
    files, firsts, sizes = [data], {}, []
    for camera in _cameras(source, options):
        if camera.kind == "image":
            sizes.append(CameraFeature(camera.key, camera.height, camera.width))
            continue
        path = source.video_path(row, camera.name)
        try:
            table = _table(path, tables)
            firsts[camera.name] = [len(files), *_frames_of(source, row, camera, table, notes)]
            sizes.append(CameraFeature(camera.key, table.height, table.width))
            files.append(path)
        except DataError as error:
            problems.append(f"camera '{camera.key}': {error}")
    if problems:
        relative = tuple(path.relative_to(source.root).as_posix() for path in (data,))
        remedy = "fetch these files again, or record the episode again"
        if any("not finite" in p or "column '" in p for p in problems):
            remedy += "; --leave-out NAME converts the dataset without a column"
        return Dropped(source_id, relative, "; ".join(problems), remedy, source.split[row], variant)
    instruction, segments = _sentences(source, row, found.tasks, notes)
    if row == 0:
        notes += [f"left out of the dataset: {entry}" for entry in source.left_out]
        notes += [f"column '{old}' is called '{new}' here" for old, new in _renamed(source, options).items()]
    metadata: dict[str, Any] = {"episode_index": number}
    if source.source_id[row]:
        metadata["recorded_as"] = source.source_id[row]
    return EpisodeRef(
        source_id=source_id,
        split=source.split[row],
        frames=int(source.length[row]),
        instruction=instruction,
        files=tuple(files),
        cameras=tuple(sizes),
        variant=variant,
        group=data.relative_to(source.root).as_posix(),
        segments=segments,
        metadata=metadata,
        locator={
            "up": len(data.relative_to(source.root).parts) - 1,
            "rows": [found.rows.start, found.rows.stop],
            "videos": firsts,
            "row": row,
        },
        warnings=tuple(notes),
    )


def _table(path: Path, tables: dict[Path, SampleTable | str]) -> SampleTable:
    """The sample table of a video file, read once for all its episodes; also a failure is remembered."""
    if path not in tables:
        try:
            if not path.is_file():
                raise DataError(f"no video {'/'.join(path.parts[-3:])}")
            tables[path] = read_table(path)
        except DataError as error:
            tables[path] = str(error)
    table = tables[path]
    if isinstance(table, str):
        raise DataError(table)
    return table


def _frames_of(
    source: Source, row: int, camera: Camera, table: SampleTable, notes: list[str]
) -> tuple[int, int, int]:
    """(first frame in the video, height, width) of an episode's frames; DataError where they are not all there."""
    length, shown = int(source.length[row]), len(table.shown)
    if not source.is_v3:
        if shown < length:
            raise DataError(f"the video has {shown} frames, the episode {length}")
        if shown > length:
            notes.append(f"camera '{camera.key}': {shown - length} frames beyond the last row are not used")
        return 0, table.height, table.width
    begin_s = float(source.videos[camera.name].from_timestamp[row])
    if table.fps == source.fps:
        first = round(begin_s * source.fps)
    else:  # the rate varies or is mislabelled: lerobot takes the frame nearest in time, and so do we
        seconds = table.times / table.timescale
        wanted = begin_s + np.arange(length) / source.fps
        halfway = (seconds[1:] + seconds[:-1]) / 2
        nearest = np.searchsorted(halfway, wanted)
        first = int(nearest[0])
        if not np.array_equal(nearest, first + np.arange(length)):
            raise DataError("the frames at its time stamps do not follow one another: the frame rate varies")
    if first + length > shown:
        raise DataError(
            f"the video ends at frame {shown}, the episode needs frames {first} to {first + length}"
        )
    return first, table.height, table.width


def _sentences(
    source: Source, row: int, tasks: NDArray[np.int64] | None, notes: list[str]
) -> tuple[str, tuple[Segment, ...]]:
    """(instruction, segments) of an episode, from the task of every frame, else from the episode table."""
    listed = [text_of(text) for text in source.episode_tasks[row]]
    own = source.segments.get(int(source.number[row]), ())
    if tasks is None or not set(tasks.tolist()) <= set(source.tasks):
        if not listed:
            notes.append("no task is known; its instruction is empty")
        return listed[0] if listed else "", own
    bounds = [0, *(np.flatnonzero(np.diff(tasks)) + 1).tolist(), len(tasks)]
    runs = [Segment(start, stop, source.tasks[int(tasks[start])]) for start, stop in pairwise(bounds)]
    return runs[0].text, own or (tuple(runs) if len(runs) > 1 else ())


# --- reading ----------------------------------------------------------------------------------------------


def read(ref: EpisodeRef, options: Options) -> Episode:
    """One episode's columns; its frames are left in their videos, or decoded from the rows block by block."""
    where = ref.locator
    data = ref.files[0]
    root = data.parents[where["up"]]
    source = open_source(root)
    rows = range(*where["rows"])
    renamed = _renamed(source, options)
    found = _read_columns(data, rows, _features(source, options))
    columns = {renamed.get(name, name): values for name, values in found.items()}
    if source.sidecar:
        columns |= _read_columns(source.sidecar_path(where["row"]), rows, source.sidecar)
    cameras: dict[str, FrameSource | VideoClip] = {}
    for camera in _cameras(source, options):
        if camera.kind == "image":
            cameras[camera.key] = ImageRows(root, data, rows, camera)
        else:
            place, first, height, width = where["videos"][camera.name]
            path = ref.files[place]
            cameras[camera.key] = VideoClip(path, 0, path.stat().st_size, first, ref.frames, height, width)
    return Episode(ref, columns, cameras)


def _read_columns(path: Path, rows: range, features: Sequence[Feature]) -> dict[str, NDArray[Any]]:
    table = read_rows(path, rows, [feature.name for feature in features])
    return {f.name: np.ascontiguousarray(to_matrix(table.column(f.name), f.dim, f.dtype)) for f in features}


class ImageRows:
    """One camera stored as encoded pictures in the rows of a Parquet file; read in rising order."""

    def __init__(self, root: Path, path: Path, rows: range, camera: Camera) -> None:
        self.root, self.path, self.rows, self.camera = root, path, rows, camera
        self.height, self.width = camera.height, camera.width
        self._cells, self._at = self._from_start(), 0

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        if start < self._at:
            self._cells, self._at = self._from_start(), 0
        block = np.empty((stop - start, self.height, self.width, 3), np.uint8)
        while self._at < stop:
            cell = next(self._cells, None)
            if self._at >= start:
                where = f"{self.path.name}, row {self.rows.start + self._at}, {self.camera.name}"
                block[self._at - start] = self._picture(cell, where)
            self._at += 1
        return block

    def _from_start(self) -> Iterator[Any]:
        file = open_parquet(self.path)
        first = 0
        groups = []
        before = 0
        for group in range(file.metadata.num_row_groups):
            stop = first + file.metadata.row_group(group).num_rows
            if stop <= self.rows.start:
                before = stop
            elif first < self.rows.stop:
                groups.append(group)
            first = stop
        skip = self.rows.start - before
        for batch in file.iter_batches(16, row_groups=groups, columns=[self.camera.name]):
            column = batch.column(0)
            for position in range(min(skip, len(column)), len(column)):
                yield column[position].as_py()
            skip = max(0, skip - len(column))

    def _picture(self, cell: Any, where: str) -> NDArray[np.uint8]:
        """An encoded picture, plain or {"bytes", "path"} with either of the two, as [H, W, 3] RGB."""
        from PIL import Image

        told: dict[str, Any] = {"bytes": cell} if isinstance(cell, bytes) else cell or {}
        try:
            encoded = told.get("bytes") or self._beside(str(told.get("path") or "")).read_bytes()
            with Image.open(io.BytesIO(encoded), formats=PICTURES) as image:
                if (image.height, image.width) != (self.height, self.width):
                    raise DataError(
                        f"{where}: {image.width}x{image.height} pixels, declared {self.width}x{self.height}"
                    )
                if image.mode not in ("RGB", "RGBA", "L", "P", "1"):
                    raise DataError(f"{where}: a picture of mode {image.mode}, expected 8-bit colour or grey")
                return np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{where}: the picture cannot be decoded: {first_line(error)}") from error

    def _beside(self, relative: str) -> Path:
        path = os.path.normpath(relative)
        if not relative or path.startswith(("/", "..")):
            raise DataError(f"{self.path.name}: no picture, and '{relative}' is no file of the dataset")
        return self.root / path


# --- meaning ----------------------------------------------------------------------------------------------


def describe(raw: Path, options: Options, variant: str) -> Embodiment:
    """What the dataset says of itself; a dataset of ours also says what its numbers mean."""
    source = open_source(raw / variant if variant else raw)
    body = source.manifest.get("embodiment", {})
    robot = str(body.get("robot_type") or source.info.get("robot_type") or "unknown")
    conventions: dict[str, Any] = dict(source.manifest.get("conventions", {})) or {
        "action": "as recorded",
        "time_pairing": "as recorded",
        "image_rotation": "as recorded",
    }
    left_out = [entry.partition(":")[0] for entry in source.left_out] + sorted(_without(options))
    if left_out:
        conventions["left_out"] = left_out
    renamed = _renamed(source, options)
    if renamed:
        conventions["renamed"] = renamed
    return Embodiment(
        name=str(body.get("name") or (robot if robot != "unknown" else source.root.name)),
        robot_type=robot,
        fps=source.fps,
        fps_origin=str(body.get("fps_origin") or f"fps in the {source.version} dataset's meta/info.json"),
        features=tuple(replace(f, name=renamed.get(f.name, f.name)) for f in _features(source, options)),
        sidecar=source.sidecar,
        conventions=conventions,
        licence=str(source.manifest.get("licence") or _card_licence(source.root)),
        citation=str(body.get("citation") or ""),
    )


def _card_licence(root: Path) -> str:
    """`license:` in the front matter of the dataset card, "" where there is none."""
    card = root / "README.md"
    if not card.is_file():
        return ""
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = re.search(r"^license:\s*([\w.+-]+)\s*$", front[1], re.MULTILINE) if front else None
    return found[1] if found and found[1] != "unknown" else ""


CONVERTER = Converter(
    name="lerobot",
    version=2,
    Options=Options,
    find=find,
    scan=scan,
    read=read,
    embodiment=None,
    describe=describe,
    expects="a LeRobot v3.0 or v2.1 dataset (meta/info.json, data/, videos/), or a folder of them",
)
