"""CALVIN's files: where the frames of a split lie, and what its index files say. No meaning of numbers here.

A split is a folder, or a folder inside the published zip that is read in place. A frame is an npz (itself a
zip) of some 70 to 270 kB; nothing is inflated before it is asked for, and a file asked for by several windows
is read once. The folder, of up to 2.3 million files, is never listed to find frames.
"""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import DataError
from .archives import (
    STORED,
    ReadAt,
    ZipMember,
    bytes_read_at,
    data_offset,
    open_read_at,
    read_member,
    safe_name,
    zip_members,
)
from .pickles import load_array, load_object
from .words import text_of

RAW_SPLITS = ("training", "validation")
FRAME_NAME = re.compile(r"episode_(\d+)\.npz")
PUBLISHED_DIGITS = 7
CACHE_FRAMES = 256  # at most 100 MB; windows are 65 frames at most and come in the order of their starts
HEAD_BYTES, TAIL_BYTES = 4096, 2048  # of an npz: its four vectors lie first, its directory last
LANGUAGE_FOLDERS = (  # the same windows under other sentence embeddings; not every download has every one
    "lang_annotations",
    "lang_paraphrase-MiniLM-L3-v2",
    "lang_all-MiniLM-L6-v2",
    "lang_all-distilroberta-v1",
    "lang_all-mpnet-base-v2",
    "lang_BERT",
    "lang_clip_ViTB32",
    "lang_clip_resnet50",
    "lang_huggingface_distilroberta",
    "lang_huggingface_mpnet",
    "lang_msmarco-bert-base-dot-v5",
)


class Split(Protocol):
    """One of training and validation: index files by name, and the npz of a frame by positioned reads."""

    @property
    def name(self) -> str: ...  # "task_D_D/training"

    @property
    def files(self) -> tuple[Path, ...]: ...  # first where it lies; their size and time tell of changes

    def index_file(self, relative: str) -> bytes | None: ...

    def open(
        self, frame: int
    ) -> AbstractContextManager[tuple[ReadAt, int]]: ...  # may raise FileNotFoundError

    def listed(self) -> NDArray[np.int64]: ...  # ids of all frames there are, sorted; lists the folder

    def frame_name(self, frame: int) -> str: ...


class FolderSplit:
    """A split as it is after unpacking."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        with os.scandir(folder) as entries:  # stops at the first frame
            match = next((m for e in entries if (m := FRAME_NAME.fullmatch(e.name))), None)
        # 7 digits as published, 6 after the 15 Hz down-sampling script.
        self.digits = len(match[1]) if match else PUBLISHED_DIGITS
        self.holds_frames = match is not None

    @property
    def files(self) -> tuple[Path, ...]:
        annotations = [f"{name}/auto_lang_ann.npy" for name in LANGUAGE_FOLDERS] + ["auto_lang_ann.npy"]
        index = [self.folder / name for name in ("ep_start_end_ids.npy", "scene_info.npy", *annotations)]
        return (self.folder, *(path for path in index if path.is_file()))

    def index_file(self, relative: str) -> bytes | None:
        path = self.folder / relative
        return path.read_bytes() if path.is_file() else None

    @contextmanager
    def open(self, frame: int) -> Iterator[tuple[ReadAt, int]]:
        # os.open and a string: pathlib would cost as much as the reading.
        descriptor = os.open(f"{self.folder}/{self.frame_name(frame)}", os.O_RDONLY)
        try:
            yield (lambda offset, count: os.pread(descriptor, count, offset)), os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    def listed(self) -> NDArray[np.int64]:
        ids = array("q")
        with os.scandir(self.folder) as entries:
            for entry in entries:
                match = FRAME_NAME.fullmatch(entry.name)
                if match and len(match[1]) == self.digits:
                    ids.append(int(match[1]))
        return np.sort(np.array(ids, np.int64))

    def frame_name(self, frame: int) -> str:
        return f"episode_{frame:0{self.digits}d}.npz"


class ZipSplit:
    """A split inside a zip; its frames as six columns sorted by id, 48 bytes each: 110 MB for the largest."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name, self.digits = path, name, PUBLISHED_DIGITS
        self.others: dict[str, ZipMember] = {}  # by path inside the split
        self._facts = array("q")
        self._table = np.empty((0, 6), np.int64)

    def add(self, relative: str, member: ZipMember) -> None:
        match = FRAME_NAME.fullmatch(relative)
        if match is None:
            self.others[relative] = member
        else:
            self.digits = len(match[1])
            self._facts.extend((int(match[1]), *member[1:]))

    def finish(self) -> None:
        table = np.array(self._facts, np.int64).reshape(-1, 6)
        self._table = table[np.argsort(table[:, 0], kind="stable")]
        self._facts = array("q")

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def index_file(self, relative: str) -> bytes | None:
        member = self.others.get(relative)
        return None if member is None else read_member(_shared_read_at(self.path), member)

    @contextmanager
    def open(self, frame: int) -> Iterator[tuple[ReadAt, int]]:
        row = int(np.searchsorted(self._table[:, 0], frame))
        if row == len(self._table) or self._table[row, 0] != frame:
            raise FileNotFoundError(self.frame_name(frame))
        member = ZipMember(self.frame_name(frame), *self._table[row, 1:].tolist())
        read_at, size = _shared_read_at(self.path), member.size
        if member.method == STORED:
            start = data_offset(read_at, member)
            yield (lambda at, count: read_at(start + at, max(0, min(count, size - at)))), size
        else:
            yield bytes_read_at(read_member(read_at, member)), size

    def listed(self) -> NDArray[np.int64]:
        return self._table[:, 0]

    def frame_name(self, frame: int) -> str:
        return f"episode_{frame:0{self.digits}d}.npz"


@lru_cache(maxsize=2)
def _shared_read_at(path: Path) -> ReadAt:
    descriptor = os.open(path, os.O_RDONLY)  # for the life of the worker
    return lambda offset, count: os.pread(descriptor, count, offset)


def find_splits(raw: Path) -> tuple[list[Split], list[Path]]:
    """Every split below `raw`, training first, and the zips that cannot be read.

    `raw` is a dataset's folder, a folder of them, one split alone, or a zip. Where it is none of these, what lies
    one folder further down counts: `calvin/dataset/task_D_D` is what upstream's download script makes.
    """
    below = _folders(raw)
    own = [raw] if raw.name in RAW_SPLITS else []
    datasets = [path / name for path in (raw, *below) for name in RAW_SPLITS]
    found, broken = _splits_at([*own, *datasets], sorted(raw.glob("*.zip")) if raw.is_dir() else [raw])
    if not found and not broken:
        deeper = [inner / name for path in below for inner in _folders(path) for name in RAW_SPLITS]
        found, broken = _splits_at(deeper, sorted(zipped for path in below for zipped in path.glob("*.zip")))
    return sorted(found.values(), key=lambda split: (raw_split(split.name) != "training", split.name)), broken


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    with os.scandir(parent) as entries:  # a split holds millions, whose kind costs nothing here
        return sorted(Path(entry.path) for entry in entries if entry.is_dir())


def _splits_at(folders: Sequence[Path], zips: Sequence[Path]) -> tuple[dict[str, Split], list[Path]]:
    """Those of `folders` that are splits, the splits inside `zips`, and the zips that cannot be read."""
    found: dict[str, Split] = {}
    broken: list[Path] = []
    for folder in filter(Path.is_dir, folders):
        split = FolderSplit(folder, f"{folder.parent.name}/{folder.name}")
        if not split.holds_frames and not (folder / "ep_start_end_ids.npy").is_file():
            continue
        if split.name in found:
            raise DataError(
                f"two folders are called {split.name}: {found[split.name].files[0].parent} and {folder.parent}\n"
                "  next: convert them one by one, with --raw and --name"
            )
        found[split.name] = split
    for path in zips:
        try:
            for split in _zip_splits(path, *_stamp(path)):
                found.setdefault(split.name, split)  # unpacked beside its zip: the folder is read
        except DataError:
            broken.append(path)
    return found, broken


def open_split(files: Sequence[Path], name: str) -> Split:
    """The split a recording or episode lies in, from its files; kept open by each worker."""
    return _open_split(files[0], name, *_stamp(files[0]))


def raw_split(name: str) -> str:
    """ "task_D_D/training" -> "training"."""
    return name.rsplit("/", 1)[1]


@lru_cache(maxsize=4)
def _open_split(place: Path, name: str, size: int, mtime_ns: int) -> Split:
    if place.is_dir():
        return FolderSplit(place, name)
    for split in _zip_splits(place, size, mtime_ns):
        if split.name == name:
            return split
    raise DataError(f"{place.name} no longer holds '{name}'; it changed while it was converted")


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=2)
def _zip_splits(path: Path, size: int, mtime_ns: int) -> tuple[ZipSplit, ...]:
    """The splits inside a zip, from one pass over its directory."""
    found: dict[str, ZipSplit] = {}
    try:
        with open_read_at(path) as (read_at, total):
            for member in zip_members(read_at, total):
                match = re.fullmatch(r"(?:(.*)/)?(training|validation)/(.+)", safe_name(member.name))
                if match is not None:
                    name = f"{(match[1] or path.stem).split('/')[-1]}/{match[2]}"
                    if name not in found:
                        found[name] = ZipSplit(path, name)
                    found[name].add(match[3], member)
    except DataError as error:
        raise DataError(f"{path.name}: {error}") from error
    for split in found.values():
        split.finish()
    return tuple(found.values())


# --- index files ------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """A language window as stored: frame ids `start` and `end`, row in the annotation file."""

    start: int
    end: int
    text: str
    task: str
    row: int


@dataclass(frozen=True)
class Index:
    """What the index files of one split say; `notes` what is odd about them."""

    plays: tuple[tuple[int, int], ...]  # first and last frame of each play episode, inclusive, sorted
    windows: tuple[Window, ...]  # sorted by start
    scenes: Mapping[str, tuple[int, int]]  # letter -> first and last frame; {} without scene_info.npy
    annotated_by: str  # the file the windows come from, "" where there is none
    annotated_as: str  # digest of that file: labels of ABC and ABCD were wrong before September 2022
    notes: tuple[str, ...]


def read_plays(split: Split) -> tuple[tuple[int, int], ...]:
    """Play episodes (first, last), both inclusive, in rising order."""
    data = split.index_file("ep_start_end_ids.npy")
    if data is None:
        raise DataError(
            "no ep_start_end_ids.npy: the frames of a play episode are those it names, "
            "never those a folder lists, which also holds strays"
        )
    rows = load_array(data, "ep_start_end_ids.npy")
    if rows.dtype.kind not in "iu" or rows.ndim not in (1, 2) or rows.shape[-1] != 2:
        raise DataError(f"ep_start_end_ids.npy is {rows.dtype} {rows.shape}, expected integers (N, 2)")
    plays = sorted((int(first), int(last)) for first, last in rows.reshape(-1, 2))
    for (first, last), (following, _) in zip(plays, [*plays[1:], (1 << 62, 0)], strict=True):
        if not 0 <= first <= last:
            raise DataError(f"ep_start_end_ids.npy: episode {first} to {last} ends before it starts")
        if last >= following:
            raise DataError(f"ep_start_end_ids.npy: episode {first} to {last} overlaps that from {following}")
    return tuple(plays)


def read_index(files: Sequence[Path], name: str, annotations: str) -> Index:
    """The index files of a split, parsed once by each worker while they keep size and time."""
    return _read_index(files[0], name, annotations, tuple(_stamp(path) for path in files))


@lru_cache(maxsize=4)
def _read_index(place: Path, name: str, annotations: str, stamps: tuple[tuple[int, int], ...]) -> Index:
    split = _open_split(place, name, *stamps[0])
    notes: list[str] = []
    plays = read_plays(split)
    lengths = split.index_file("ep_lens.npy")
    if lengths is not None:
        stored = sorted(load_array(lengths, "ep_lens.npy").reshape(-1).tolist())
        if stored != sorted(last - first + 1 for first, last in plays):
            notes.append("ep_lens.npy does not match ep_start_end_ids.npy, which is used")
    scenes = split.index_file("scene_info.npy")
    source, data = _annotations(split, annotations)
    if source and not source.startswith(f"{annotations}/"):
        notes.append(f"no {annotations}/auto_lang_ann.npy; the windows are those of {source}")
    windows = _read_windows(data, source) if data is not None else []
    digest = hashlib.blake2b(data, digest_size=8).hexdigest() if data is not None else ""
    known = _read_scenes(scenes) if scenes else {}
    return Index(plays, tuple(windows), known, source, digest, tuple(notes))


def _annotations(split: Split, wanted: str) -> tuple[str, bytes | None]:
    for name in (
        *(f"{folder}/auto_lang_ann.npy" for folder in (wanted, *LANGUAGE_FOLDERS)),
        "auto_lang_ann.npy",
    ):
        data = split.index_file(name)
        if data is not None:
            return name, data
    return "", None


def _read_scenes(data: bytes) -> dict[str, tuple[int, int]]:
    value = load_object(data, "scene_info.npy")
    scenes: dict[str, tuple[int, int]] = {}
    for name, ids in value.items() if isinstance(value, dict) else ():
        match = re.fullmatch(r"(?:calvin_)?scene_([A-D])", str(name))
        try:
            first, last = (int(frame) for frame in ids)
        except (TypeError, ValueError, OverflowError):
            first, last = 0, -1
        if match is None or last < first:
            raise DataError(
                f"scene_info.npy: expected calvin_scene_<A-D> and two ids, found {str(name)[:80]!r}: {str(ids)[:80]}"
            )
        scenes[match[1]] = (first, last)
    if not scenes:
        raise DataError("scene_info.npy names no scene")
    return scenes


def _read_windows(data: bytes, source: str) -> list[Window]:
    value = load_object(data, source)
    try:
        texts = [text_of(text) for text in value["language"]["ann"]]
        tasks = [text_of(task) for task in value["language"]["task"]]
        ids = [(int(start), int(end)) for start, end in value["info"]["indx"]]
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise DataError(
            f"{source}: expected language/ann, language/task and info/indx ({error!r})"
        ) from error
    if not len(texts) == len(tasks) == len(ids):
        raise DataError(f"{source}: {len(texts)} sentences, {len(tasks)} tasks, {len(ids)} windows")
    rows = zip(ids, texts, tasks, strict=True)
    return sorted(Window(a, b, text, task, row) for row, ((a, b), text, task) in enumerate(rows))


# --- one frame --------------------------------------------------------------------------------------------


class Npz:
    """The members of one frame's file; `keep` remembers what it inflated."""

    __slots__ = ("_arrays", "members", "read_at")

    def __init__(self, read_at: ReadAt, size: int) -> None:
        self.read_at = read_at
        self.members = {m.name.removesuffix(".npy"): m for m in zip_members(read_at, size, TAIL_BYTES)}
        self._arrays: dict[str, NDArray[Any]] = {}

    def array(self, key: str) -> NDArray[Any]:
        member = self.members.get(key)
        if member is None:
            raise DataError(f"no '{key}'; found {', '.join(sorted(self.members)) or 'nothing'}")
        return load_array(read_member(self.read_at, member), key)

    def keep(self, key: str) -> NDArray[Any]:
        if key not in self._arrays:
            self._arrays[key] = self.array(key)
        return self._arrays[key]


@contextmanager
def open_vectors(split: Split, frame: int) -> Iterator[Npz]:
    """A frame's npz of which only both ends are read: enough for its vectors and its directory."""
    with split.open(frame) as (read_at, size):
        head = read_at(0, min(HEAD_BYTES, size))
        tail_at = max(len(head), size - TAIL_BYTES)
        tail = read_at(tail_at, size - tail_at)

        def read(offset: int, count: int) -> bytes:
            if offset + count <= len(head):
                return head[offset : offset + count]
            at = offset - tail_at
            return tail[at : at + count] if at >= 0 else read_at(offset, count)

        yield Npz(read, size)


class FrameCache:
    """Frames of one split: whole files, read once and kept while overlapping windows ask for them."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self._kept: OrderedDict[int, Npz] = OrderedDict()

    def frame(self, frame: int) -> Npz:
        if frame in self._kept:
            self._kept.move_to_end(frame)
            return self._kept[frame]
        name = f"{self.split.name}/{self.split.frame_name(frame)}"
        try:
            with self.split.open(frame) as (read_at, size):
                npz = Npz(bytes_read_at(read_at(0, size)), size)
        except FileNotFoundError:
            raise DataError(f"{name} is missing") from None
        except (DataError, OSError) as error:
            raise DataError(f"{name} cannot be read: {error}") from error
        self._kept[frame] = npz
        if len(self._kept) > CACHE_FRAMES:
            self._kept.popitem(last=False)
        return npz


def frame_cache(files: Sequence[Path], name: str) -> FrameCache:
    """The worker's cache of a split's frames."""
    return _frame_cache(files[0], name, *_stamp(files[0]))


@lru_cache(maxsize=1)
def _frame_cache(place: Path, name: str, size: int, mtime_ns: int) -> FrameCache:
    return FrameCache(_open_split(place, name, size, mtime_ns))
