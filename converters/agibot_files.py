"""AgiBot World's files: which episodes there are, where their bytes lie, what task_info says of them.

    task_info/task_<task>.json
    observations/<task>/<episode>/{videos,tactile,depth}/...     or /<first>-<last>/<episode>/..., or <first>-<last>.tar
    proprio_stats/<task>/<episode>/proprio_stats.h5              or proprio_stats/<first>-<last>.tar
    parameters/<task>/<episode>/parameters/camera/*.json         or parameters/<first>-<last>.tar; not always there

Tars are uncompressed and read in place. The numbers in their names are episode ids; not every id between them is
inside. Episodes without videos, and videos without episode, are common in the release.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..schemas.episode import Recording, Segment
from ..schemas.errors import DataError
from .archives import TarIndex, index_tar
from .hdf5 import open_hdf5
from .words import text_of

if TYPE_CHECKING:
    import h5py

KINDS = ("task_info", "observations", "proprio_stats")
_MEMBER = re.compile(r"(?:.*/)?(\d+)/((?:videos|tactile|depth)/[^/]+)")
_PROPRIO = re.compile(r"(?:.*/)?(\d+)/(\d+)/proprio_stats\.h5")
_PARAMETERS = re.compile(r"(?:.*/)?(\d+)/(\d+)/(?:parameters/)?camera/([^/]+\.json)")
_RANGE = re.compile(r"(\d+)-(\d+)")


class Place(NamedTuple):
    """Bytes [offset, offset + size) of a file: all of it, or a member of a tar."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Source:
    """One episode's files: `places` by name below its folder ("videos/head_color.mp4")."""

    task: int
    episode: int
    proprio: Place | None
    places: Mapping[str, Place]
    note: str = ""


def find_recordings(raw: Path) -> Iterator[Recording]:
    """One recording an episode folder, one an observation tar, in the order of their numbers."""
    for root, prefix in _roots(raw):
        tasks = {int(p.name) for kind in KINDS[1:] for p in _numbered(root / kind)}
        for task in sorted(tasks):
            yield from _find_task(root, prefix, task)


def _roots(raw: Path) -> list[tuple[Path, str]]:
    """(folder that holds the three kinds, prefix of its names): `raw` itself, or releases below it."""
    if not raw.is_dir():
        return []
    if any((raw / kind).is_dir() for kind in KINDS):
        return [(raw, "")]
    below = sorted(path for path in raw.iterdir() if path.is_dir())
    return [(path, f"{path.name}/") for path in below if any((path / kind).is_dir() for kind in KINDS)]


def _find_task(root: Path, prefix: str, task: int) -> Iterator[Recording]:
    observations, proprio = root / "observations" / str(task), root / "proprio_stats" / str(task)
    info = [path for path in [task_info_path(root, task)] if path.is_file()]
    if not observations.is_dir():
        yield Recording(f"{prefix}{task}", "train", (proprio, *info))
        return
    observed, measured = _episodes(observations), _episodes(proprio)
    tars, proprio_tars = _tars(observations), _tars(root / "proprio_stats")
    # Those without a folder whose number a tar covers are that tar's to convert or to report.
    own = observed.keys() | {e for e in measured if not any(a <= e <= b for a, b, _ in tars)}
    for episode in sorted(own):
        files = sorted(observed[episode].glob("*/*.mp4")) if episode in observed else []
        if episode in measured:
            files += sorted(measured[episode].glob("proprio_stats.h5"))
        else:
            files += [path for a, b, path in proprio_tars if a <= episode <= b]
        files = files or [(observed | measured)[episode]]
        yield Recording(f"{prefix}{task}/{episode}", "train", (*files, *info))
    for first, last, path in tars:
        files = [path, *(p for a, b, p in proprio_tars if a <= last and first <= b), *info]
        yield Recording(f"{prefix}{task}/{path.stem}", "train", tuple(files))


def root_of(path: Path) -> Path:
    """The folder that holds observations and proprio_stats, from any path below them."""
    return next(parent.parent for parent in path.parents if parent.name in KINDS)


def proprio_only(recording: Recording) -> int | None:
    """Episodes of a task that has no observations at all; None for any other recording."""
    folder = recording.files[0]
    return len(_episodes(folder)) if folder.parent.name == "proprio_stats" and not folder.suffix else None


def sources(recording: Recording, depth: bool) -> list[Source]:
    """The episodes of a recording, in numeric order."""
    *_, task_name, last_name = recording.name.split("/")
    root, task = root_of(recording.files[0]), int(task_name)
    observations = root / "observations" / task_name
    match = _RANGE.fullmatch(last_name)
    if match is None:
        episode = int(last_name)
        folder = _episodes(observations).get(episode)
        places = _folder_places(folder, depth) if folder is not None else {}
        return [Source(task, episode, _proprio(root, task, episode, episode).get(episode), places)]
    index = _index(recording.files[0], depth)
    unpacked = _episodes(observations)
    proprio = _proprio(root, task, int(match[1]), int(match[2]))
    grouped: dict[int, dict[str, Place]] = {episode: {} for episode in proprio}
    for name, member in index.members.items():
        found = _MEMBER.fullmatch(name)
        if found:
            place = Place(index.path, member.offset, member.size)
            grouped.setdefault(int(found[1]), {})[found[2]] = place
    if not grouped:
        raise DataError("no episode in it: expected <episode>/videos/*.mp4")
    return [
        Source(task, episode, proprio.get(episode), grouped[episode], index.problem)
        for episode in sorted(grouped)
        if episode not in unpacked
    ]


def _folder_places(folder: Path, depth: bool) -> dict[str, Place]:
    kinds = ("videos", "tactile", "depth") if depth else ("videos", "tactile")
    paths = [path for kind in kinds for path in sorted((folder / kind).glob("*.*"))]
    return {f"{path.parent.name}/{path.name}": _whole(path) for path in paths}


def _proprio(root: Path, task: int, first: int, last: int) -> dict[int, Place]:
    """proprio_stats.h5 of the task's episodes in [first, last], from folders, then from tars."""
    found: dict[int, Place] = {}
    for episode, folder in _episodes(root / "proprio_stats" / str(task)).items():
        path = folder / "proprio_stats.h5"
        if first <= episode <= last and path.is_file():
            found[episode] = _whole(path)
    for a, b, path in _tars(root / "proprio_stats"):
        if a <= last and first <= b:
            for name, member in _index(path, False).members.items():
                match = _PROPRIO.fullmatch(name)
                if match and int(match[1]) == task and first <= int(match[2]) <= last:
                    found.setdefault(int(match[2]), Place(path, member.offset, member.size))
    return found


def parameter_files(root: Path, task: int, episode: int) -> dict[str, Place]:
    """An episode's camera parameters by file name, {} where a copy lacks them."""
    parent = root / "parameters"
    folder = _episodes(parent / str(task)).get(episode)
    for place in (folder / "parameters" / "camera", folder / "camera") if folder else ():
        if place.is_dir():
            return {path.name: _whole(path) for path in sorted(place.glob("*.json"))}
    found: dict[str, Place] = {}
    for first, last, path in _tars(parent):
        if first <= episode <= last:
            for name, member in _index(path, False).members.items():
                match = _PARAMETERS.fullmatch(name)
                if match and (int(match[1]), int(match[2])) == (task, episode):
                    found[match[3]] = Place(path, member.offset, member.size)
    return found


def _numbered(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return [path for path in parent.iterdir() if path.is_dir() and path.name.isdecimal()]


def _episodes(parent: Path) -> dict[int, Path]:
    """<episode> folders, also one level deeper, where an extraction kept the tar's range as a folder.

    Tars of observations hold episodes, <task>/<range>/<episode>; the others hold tasks, <range>/<task>/<episode>.
    """
    found = {int(path.name): path for path in _numbered(parent)}
    for folder in [*_ranges(parent), *(path / parent.name for path in _ranges(parent.parent))]:
        for path in _numbered(folder):
            found.setdefault(int(path.name), path)
    return found


def _ranges(parent: Path) -> list[Path]:
    """Folders called after a tar, <first>-<last>."""
    return sorted(path for path in parent.glob("*-*") if path.is_dir() and _RANGE.fullmatch(path.name))


def _tars(parent: Path) -> list[tuple[int, int, Path]]:
    """(first episode, last episode, path) of the tars in a folder."""
    matches = [(_RANGE.fullmatch(path.stem), path) for path in parent.glob("*.tar")]
    return sorted((int(match[1]), int(match[2]), path) for match, path in matches if match)


def _whole(path: Path) -> Place:
    return Place(path, 0, path.stat().st_size)


def _index(path: Path, depth: bool) -> TarIndex:
    status = path.stat()
    return _read_index(path, status.st_size, status.st_mtime_ns, depth)


@lru_cache(maxsize=64)
def _read_index(path: Path, size: int, mtime_ns: int, depth: bool) -> TarIndex:
    # Depth pictures are a hundred times as many as the rest: listed only when they are wanted.
    kinds = (".mp4", ".h5", ".json", ".png") if depth else (".mp4", ".h5", ".json")
    return index_tar(path, lambda name: name.endswith(kinds))


@contextmanager
def open_proprio(place: Place) -> Iterator[h5py.File]:
    """proprio_stats.h5, on disk or as a tar's member (a few megabytes, read whole)."""
    import h5py

    if place.path.suffix == ".h5":
        with open_hdf5(place.path) as file:
            yield file
        return
    try:
        file = h5py.File(io.BytesIO(place.read()), "r")
    except OSError as error:
        raise DataError(f"proprio_stats.h5 in {place.path.name}: not a readable HDF5 file") from error
    with file:
        yield file


# --- task_info --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskInfo:
    """An episode's entry; `stretches` are its action_config as written."""

    name: str
    scene: str
    stretches: tuple[Any, ...]


def task_info_path(root: Path, task: int) -> Path:
    return root / "task_info" / f"task_{task}.json"


def task_info(root: Path, task: int, episode: int) -> TaskInfo:
    """What task_info says of an episode; DataError where it says nothing."""
    path = task_info_path(root, task)
    if not path.is_file():
        raise DataError(f"task_info/{path.name} is missing: without it the episode has no instruction")
    status = path.stat()
    entries = _read_task_info(path, status.st_size, status.st_mtime_ns)
    if episode not in entries:
        raise DataError(f"{path.name} has no entry for this episode (withdrawn?)")
    if not entries[episode].name:
        raise DataError(f"{path.name} has no task_name for this episode: it would have no instruction")
    return entries[episode]


@lru_cache(maxsize=8)
def _read_task_info(path: Path, size: int, mtime_ns: int) -> dict[int, TaskInfo]:
    """Entries by episode; those that say no episode are passed over, as no episode can miss them."""
    found: dict[int, TaskInfo] = {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(entries, list) or (entries and not any(isinstance(e, dict) for e in entries)):
            raise TypeError(f"found {type(entries).__name__}")
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path.name}: expected a list of entries with episode_id, task_name, label_info ({error!r})"
        ) from error
    for entry in entries:
        told = entry if isinstance(entry, dict) else {}
        try:
            episode = int(told["episode_id"])
        except (KeyError, TypeError, ValueError):
            continue
        label = told.get("label_info")
        stretches = label.get("action_config") if isinstance(label, dict) else None
        name, scene = text_of(told.get("task_name")), text_of(told.get("init_scene_text"))
        found[episode] = TaskInfo(name, scene, tuple(stretches) if isinstance(stretches, list) else ())
    return found


def segments_of(stretches: Sequence[Any], frames: int) -> tuple[tuple[Segment, ...], list[str]]:
    """action_config as segments, stop exclusive, clipped to the episode; and what was odd about it.

    Borders are shared (8 to 218, 218 to 436) or, in some files, inclusive (18 to 254, 255 to 553): where every
    border is of the second kind, stops move by one.
    """
    rows: list[tuple[int, int, str, str]] = []
    notes: list[str] = []
    for entry in stretches:
        try:
            skill = text_of(entry.get("skill"))
            text = text_of(entry.get("action_text")) or skill
            rows.append((int(entry["start_frame"]), int(entry["end_frame"]), text, skill))
        except (KeyError, TypeError, ValueError, AttributeError):
            notes.append("an action_config entry without start_frame and end_frame is left out")
    rows.sort(key=lambda row: row[:2])
    steps = [following[0] - row[1] for row, following in pairwise(rows)]
    extra = 1 if steps and all(step == 1 for step in steps) else 0
    segments: list[Segment] = []
    for start, end, text, skill in rows:
        stop = min(end + extra, frames)
        if start < 0 or start >= stop:
            notes.append(
                f"action_config {start}-{end} ('{text}') holds none of the {frames} frames: left out"
            )
            continue
        if end > frames:
            notes.append(f"action_config {start}-{end} ('{text}') is cut at frame {frames}")
        segments.append(Segment(start, stop, text, skill))
    return tuple(segments), notes
