"""A LeRobot v3.0 dataset opened for reading, whoever wrote it: ours, lerobot's recorder, its aggregate tool.

What differs between writers and is accepted here (see lerobot 0.6.1, `datasets/io_utils.py`)
    vectors     fixed_size_list (recorder), list (aggregate), extension arrays (2-D and more)
    cameras     `video` (mp4 files shared by many episodes) or `image` (bytes in the rows)
    metadata    stats.json may be missing; info.json may carry unknown keys; tasks may lack the pandas index
    names       `actions` and `state` (openpi's converters) answer to `action` and `observation.state`, by which
                policies look for them, where the dataset has nothing of that name: as a conversion renames them

Nothing is written, and opening reads metadata alone: one column per field, no object per episode, so that a
million episodes open within a second. Positions follow lerobot: row i of the concatenated data files has
`index` i, episode e is row e of meta/episodes, task i is row i of meta/tasks.

Shapes: E episodes, T frames of one episode, D dimensions, H x W pixels.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..schemas.claims import refuse_claims
from ..schemas.errors import DataError, UsageError, malformed_as, unknown_name
from ..schemas.features import DEFAULT_FEATURES, POLICY_NAMES

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from numpy.typing import NDArray

    from ..video.decode import VideoReader

CONTENT_COLUMNS = ("action", "observation.state")
FOREIGN_PART_FRAMES = 16_384
MOST_PIXELS = 1 << 26  # of one picture: 8192 x 8192
OPEN_FILES = 16  # Parquet footers and video decoders kept open by one dataset, each
OWN_FOLDER = "dpipe"
_TEMPLATE = re.compile(r"(?:[^{}\\\0]|\{(?:chunk_index|file_index|video_key)(?::0?\d{0,2}d)?\})*")
# What may lie in dpipe/ of a dataset that is not ours: results bound to it, each complete or absent.
GUESTS = {"targets", "shards"}


@dataclass(frozen=True)
class CameraPlaces:
    """Where each episode's frames lie: video file (chunk, file) [E] and first frame inside it [E]."""

    chunk: NDArray[np.int64]
    file: NDArray[np.int64]
    from_timestamp: NDArray[np.float64]
    first_frame: NDArray[np.int64]


@dataclass
class TextColumns:
    """The text columns of meta/episodes, each read when first asked for: opening should not pay for them."""

    paths: tuple[Path, ...]
    _read: dict[str, Any] = field(default_factory=dict, repr=False)

    def column(self, name: str) -> pa.ChunkedArray | None:
        """Column [E] in Arrow ("tasks" is a list<string>), or None where the dataset has none."""
        if name not in self._read:
            import pyarrow as pa
            import pyarrow.parquet as pq

            files = [pq.ParquetFile(path) for path in self.paths]  # looked at when the dataset was opened
            have = all(name in file.schema_arrow.names for file in files)
            pairs = zip(files, self.paths, strict=True)
            tables = [_read_columns(file, path, [name]) for file, path in pairs] if have else []
            self._read[name] = pa.concat_tables(tables).column(name) if have else None
        return self._read[name]

    def value(self, name: str, episode: int) -> Any:
        column = self.column(name)
        return None if column is None else column[episode].as_py()


@dataclass(frozen=True)
class Episodes:
    """meta/episodes as columns [E]."""

    length: NDArray[np.int64]
    first_index: NDArray[np.int64]  # dataset_from_index
    data_chunk: NDArray[np.int64]
    data_file: NDArray[np.int64]
    first_row: NDArray[np.int64]  # of the episode inside its data file
    cameras: Mapping[str, CameraPlaces]
    text: TextColumns

    def __len__(self) -> int:
        return len(self.length)

    def tasks(self, episode: int) -> list[str]:
        return self.text.value("tasks", episode) or []

    def split(self, episode: int) -> str:
        return self.text.value("split", episode) or ""

    def source_id(self, episode: int) -> str:
        return self.text.value("source_id", episode) or ""


@dataclass
class Dataset:
    """An opened dataset, from `open_dataset`. It pickles: open files are opened again where it arrives."""

    root: Path
    name: str
    info: dict[str, Any]
    fps: int
    features: dict[str, dict[str, Any]]
    stats: dict[str, Any]
    tasks: list[str]
    manifest: dict[str, Any] | None
    episodes: Episodes
    splits: dict[str, tuple[int, int]]
    stored: dict[str, str] = field(default_factory=dict)  # name here -> name in the files, where they differ
    _tables: OrderedDict[Path, pq.ParquetFile] = field(default_factory=OrderedDict, repr=False)
    _videos: OrderedDict[Any, Any] = field(default_factory=OrderedDict, repr=False)
    _contents: list[str] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tables": OrderedDict(), "_videos": OrderedDict()}

    def reopened(self) -> Dataset:
        """The same dataset with open files of its own, for another thread; metadata is shared."""
        return replace(self, _tables=OrderedDict(), _videos=OrderedDict())

    @property
    def renaming(self) -> str:
        """What answers to other names here than in the files, in words; "" where nothing does."""
        return ", ".join(f"'{old}' is read as '{new}'" for new, old in self.stored.items())

    # --- what there is ---------------------------------------------------------------------------------

    @property
    def own_manifest(self) -> dict[str, Any] | None:
        """The manifest of a conversion, which tells the body and its conventions; None where another tool wrote it."""
        return self.manifest if self.manifest and "embodiment" in self.manifest else None

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(name for name, told in self.features.items() if told["dtype"] in ("video", "image"))

    @property
    def vectors(self) -> tuple[str, ...]:
        """Numeric columns of the recording: neither cameras, nor text, nor LeRobot's own numbering."""
        other = {"video", "image", "string", "language"}
        return tuple(
            name
            for name, told in self.features.items()
            if told["dtype"] not in other and name not in DEFAULT_FEATURES
        )

    @property
    def sidecar(self) -> dict[str, dict[str, Any]]:
        """Columns dpipe keeps beside the dataset, described as in info.json; {} where it is not ours."""
        told = (self.manifest or {}).get("embodiment", {}).get("sidecar", {})
        return {
            name: {"dtype": each["dtype"], "shape": [len(each["names"])], "names": each["names"]}
            for name, each in told.items()
        }

    @property
    def total_frames(self) -> int:
        return int(self.episodes.length.sum())

    def __len__(self) -> int:
        return len(self.episodes)

    def names(self, column: str) -> tuple[str, ...]:
        """Names of a column's dimensions; () where the dataset gives none (or nests them)."""
        names = self._feature(column).get("names")
        if isinstance(names, Mapping):  # {"motors": [...]}: one group, as older recordings have it
            names = next(iter(names.values()), []) if len(names) == 1 else []
        return tuple(str(name) for name in names or ())

    def camera_size(self, camera: str) -> tuple[int, int]:
        """(height, width) as declared."""
        told = self._feature(camera)
        shape = [int(n) for n in told["shape"]]
        names = [str(name) for name in told.get("names") or ()]
        if len(names) == 3 and "height" in names and "width" in names:
            return shape[names.index("height")], shape[names.index("width")]
        return (shape[1], shape[2]) if shape[0] in (1, 3) and shape[2] not in (1, 3) else (shape[0], shape[1])

    def episodes_in(self, split: str) -> range:
        """Episodes of a split; "all" is every one of them."""
        if split == "all":
            return range(len(self))
        if split not in self.splits:
            raise unknown_name(f"split of {self.root}", split, [*self.splits, "all"])
        return range(*self.splits[split])

    def parts(self) -> list[range]:
        """Runs of consecutive episodes that are worked on, filed and cached together.

        In datasets of ours a part is a data file, and video and target files hold the same episodes (those of
        tokens, of several parts); in others whole episodes are grouped up to 16,384 frames.
        """
        count = len(self)
        if count == 0:
            return []
        if self.manifest is not None:
            place = self.episodes.data_chunk * 2**32 + self.episodes.data_file
            starts = np.flatnonzero(np.diff(place, prepend=place[0] - 1))
        else:
            starts, ends, first = [0], np.cumsum(self.episodes.length), 0
            while True:
                room = (ends[first - 1] if first else 0) + FOREIGN_PART_FRAMES
                first = max(first + 1, int(np.searchsorted(ends, room, side="right")))
                if first >= count:
                    break
                starts.append(first)
        return [range(int(a), int(b)) for a, b in zip(starts, [*starts[1:], count], strict=True)]

    # --- columns ---------------------------------------------------------------------------------------

    def columns(self, names: Iterable[str], episode: int) -> dict[str, NDArray[Any]]:
        """Columns of one episode: [T, D], [T, ...] for more dimensions, or [T] for scalars and text."""
        return self.all_columns(names, range(episode, episode + 1))

    def all_columns(
        self, names: Iterable[str], episodes: Iterable[int] | None = None
    ) -> dict[str, NDArray[Any]]:
        """The same for many episodes (None: all), one after another; neighbours are read in one go."""
        wanted = list(names)
        for name in wanted:
            if self._feature(name)["dtype"] in ("video", "image"):
                raise UsageError(f"'{name}' is a camera: read it with frames(), not as a column")
        chosen = np.arange(len(self)) if episodes is None else np.asarray(list(episodes), np.int64)
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise IndexError(
                f"episodes 0 to {len(self) - 1} exist in {self.root}, not {chosen.min()} to {chosen.max()}"
            )
        blocks: dict[str, list[NDArray[Any]]] = {name: [] for name in wanted}
        for run in _runs(chosen, self.episodes):
            path = self.data_path(int(chosen[run.start]))
            first = int(self.episodes.first_row[chosen[run.start]])
            last = chosen[run.stop - 1]
            rows = range(first, int(self.episodes.first_row[last] + self.episodes.length[last]))
            beside = [name for name in wanted if name not in self.features]
            for place, group in (
                (path, [name for name in wanted if name in self.features]),
                (self.sidecar_path(int(chosen[run.start])), beside),
            ):
                if not group:
                    continue
                table = self._read_rows(place, rows, group)
                for name in group:
                    told = self._feature(name)
                    blocks[name].append(column_values(table.column(name), told, f"'{name}' in {place}"))
        return {
            name: (
                found[0]
                if len(found) == 1
                else np.concatenate(found)
                if found
                else _empty(self._feature(name))
            )
            for name, found in blocks.items()
        }

    def data_path(self, episode: int) -> Path:
        template = self.info.get("data_path") or "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        chunk, file = int(self.episodes.data_chunk[episode]), int(self.episodes.data_file[episode])
        return self.root / template.format(chunk_index=chunk, file_index=file)

    def sidecar_path(self, episode: int) -> Path:
        """Where dpipe keeps the columns beside an episode's data: the same rows, in a file of the same number."""
        chunk, file = int(self.episodes.data_chunk[episode]), int(self.episodes.data_file[episode])
        return self.root / OWN_FOLDER / f"columns/chunk-{chunk:03d}/file-{file:03d}.parquet"

    def _read_rows(self, path: Path, rows: range, names: Sequence[str]) -> pa.Table:
        table = self._table(path)
        if rows.stop > table.metadata.num_rows:
            raise DataError(
                f"{path} has {table.metadata.num_rows} rows\n"
                f"  expected: at least {rows.stop}, by the lengths in {self.root / 'meta/episodes'}\n"
                f"  The file is cut short, or of another version of the dataset.  dpipe doctor {self.root}"
            )
        given = {self.stored.get(name, name): name for name in names}
        names = list(given)
        missing = [name for name in names if name not in table.schema_arrow.names]
        if missing:
            raise DataError(
                f"{path}: no column '{missing[0]}'\n  found: {', '.join(table.schema_arrow.names)}\n"
                f"  meta/info.json declares it; the dataset is damaged.  dpipe doctor {self.root}"
            )
        _check_single(table, path, names)
        ends = np.cumsum(
            [table.metadata.row_group(group).num_rows for group in range(table.metadata.num_row_groups)]
        )
        first = int(np.searchsorted(ends, rows.start, side="right"))
        last = int(np.searchsorted(ends, rows.stop - 1, side="right"))
        before = int(ends[first - 1]) if first else 0
        refuse_claims(table.metadata, path.stat().st_size, str(path), range(first, last + 1))
        try:
            block = table.read_row_groups(list(range(first, last + 1)), columns=list(names))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: rows {rows.start} to {rows.stop} are damaged\n  found: {_one_line(error)}\n"
                f"  Fetch the file again; see  dpipe doctor {self.root}"
            ) from error
        block = block.rename_columns([given.get(name, name) for name in block.column_names])
        return block.slice(rows.start - before, len(rows))

    def _table(self, path: Path) -> pq.ParquetFile:
        import pyarrow.parquet as pq

        def open_table() -> pq.ParquetFile:
            try:
                return pq.ParquetFile(path, memory_map=False)
            except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
                raise DataError(
                    f"{path} cannot be read as Parquet\n  found: {_one_line(error)}\n"
                    f"  The recording was probably cut short; see  dpipe doctor {self.root}"
                ) from error

        return _kept(self._tables, path, open_table)

    # --- frames ----------------------------------------------------------------------------------------

    def frames(self, episode: int, camera: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Frames [start, stop) of one episode as [n, H, W, 3] RGB, found by number, never by time."""
        length = int(self.episodes.length[episode])
        if not 0 <= start <= stop <= length:
            raise IndexError(f"frames {start} to {stop} of episode {episode}, which has {length}")
        if camera not in self.cameras:
            raise unknown_name(f"camera of {self.root}", camera, self.cameras)
        if start == stop:
            return np.zeros((0, *self.camera_size(camera), 3), np.uint8)
        if self.features[camera]["dtype"] == "image":
            return self._images(episode, camera, start, stop)
        first = int(self.episodes.cameras[camera].first_frame[episode])
        return self.video(episode, camera).read(slice(first + start, first + stop))

    def video(self, episode: int, camera: str, resize: tuple[int, int] | None = None) -> VideoReader:
        """The open video an episode lies in, kept for the next call; `resize` is (height, width)."""
        from ..video.decode import open_video

        path = self.video_path(episode, camera)
        if not path.is_file():
            raise DataError(
                f"no video {path}\n  expected: camera {camera} of episode {episode}\n  Restore the file."
            )
        return _kept(self._videos, (path, resize), lambda: open_video(path, resize=resize))

    def video_path(self, episode: int, camera: str) -> Path:
        template = (
            self.info.get("video_path")
            or "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        )
        place = self.episodes.cameras[camera]
        return self.root / template.format(
            video_key=camera, chunk_index=int(place.chunk[episode]), file_index=int(place.file[episode])
        )

    def _images(self, episode: int, camera: str, start: int, stop: int) -> NDArray[np.uint8]:
        first = int(self.episodes.first_row[episode])
        table = self._read_rows(self.data_path(episode), range(first + start, first + stop), [camera])
        frames = []
        for t, image in enumerate(table.column(camera).to_pylist(), start):
            where = f"{self.data_path(episode)}: episode {episode}, frame {t}, {camera}"
            frames.append(decode_image(encoded_image(image, self.root, where), where))
        return np.stack(frames)

    # --- content ---------------------------------------------------------------------------------------

    def content(self, episode: int) -> str:
        """The episode's content digest, computed from its rows; see `episode_content`."""
        names = [name for name in CONTENT_COLUMNS if name in self.features]
        return episode_content(self.columns(names, episode), int(self.episodes.length[episode]))

    def contents(self, recompute: bool = False) -> list[str]:
        """Every episode's content digest: as recorded at conversion where it was, else computed once."""
        if self._contents is None or recompute:
            recorded = None if recompute else self._recorded_contents()
            self._contents = recorded or self._computed_contents()
        return self._contents

    @property
    def contents_known(self) -> bool:
        """Whether `contents` costs no reading of rows: recorded at conversion, or computed before."""
        if self._contents is None:
            self._contents = self._recorded_contents()
        return self._contents is not None

    def _recorded_contents(self) -> list[str] | None:
        path = self.root / OWN_FOLDER / "episodes.parquet"
        if self.manifest is None or not path.is_file():
            return None
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is damaged\n  found: {_one_line(error)}\n  Convert again.") from error
        refuse_claims(file.metadata, path.stat().st_size, str(path))
        recorded = _read_columns(file, path, ["content"]).column("content").to_pylist()
        return recorded if len(recorded) == len(self) and all(recorded) else None

    def _computed_contents(self) -> list[str]:
        names = [name for name in CONTENT_COLUMNS if name in self.features]
        found = []
        for part in self.parts():
            columns = self.all_columns(names, part)
            lengths = self.episodes.length[part.start : part.stop]
            for stop, length in zip(np.cumsum(lengths), lengths, strict=True):
                rows = slice(int(stop - length), int(stop))
                found.append(
                    episode_content({name: column[rows] for name, column in columns.items()}, int(length))
                )
        return found

    def digest(self) -> str:
        """32 hex digits over all contents in order: what a target's contract calls its source."""
        return contents_digest(self.contents())

    def _feature(self, name: str) -> dict[str, Any]:
        found = self.features.get(name) or self.sidecar.get(name)
        if found is None:
            raise unknown_name(f"column of {self.root}", name, [*self.features, *self.sidecar])
        return found


def episode_content(columns: Mapping[str, NDArray[Any]], frames: int) -> str:
    """32 hex digits (xxh3-128) that say what an episode is, whichever dataset holds it.

    Over `action`, then `observation.state`, where present: the name in UTF-8 and the values as float32 in C
    order; then the number of frames as int64, little-endian. Pixels, names and positions take no part.
    """
    import xxhash

    digest = xxhash.xxh3_128()
    for name in CONTENT_COLUMNS:
        if name in columns:
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(columns[name], "<f4").tobytes())
    digest.update(int(frames).to_bytes(8, "little", signed=True))
    return digest.hexdigest()


def contents_digest(contents: Iterable[str]) -> str:
    """32 hex digits (xxh3-128) over content digests, in order."""
    import xxhash

    return xxhash.xxh3_128(b"".join(bytes.fromhex(content) for content in contents)).hexdigest()


def encoded_image(image: Any, root: Path, where: str) -> bytes:
    """The bytes of an image cell: plain, or {"bytes", "path"} with either of the two."""
    if isinstance(image, bytes):
        return image
    given = image or {}
    if given.get("bytes"):
        return given["bytes"]
    path = root / (given.get("path") or "")
    if not path.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{where}: its picture is the file {given['path']!r}, outside the dataset; refused")
    if not path.is_file():
        raise DataError(f"{where}: no image\n  expected: bytes, or the file {path}")
    return path.read_bytes()


def decode_image(encoded: bytes, where: str) -> NDArray[np.uint8]:
    """One JPEG, PNG or TIFF as [H, W, 3] RGB; `where` is for the message if it is damaged."""
    import io

    try:
        if encoded[:2] == b"\xff\xd8":
            import simplejpeg

            height, width, _, _ = simplejpeg.decode_jpeg_header(encoded)
            _check_pixels(int(height), int(width), where)
            return simplejpeg.decode_jpeg(encoded, "RGB")
        from PIL import Image

        try:
            # Named, because Pillow's other readers are many, and one of them runs a program (PostScript).
            picture = Image.open(io.BytesIO(encoded), formats=("PNG", "TIFF", "JPEG", "WEBP", "BMP"))
        except Image.DecompressionBombError as error:  # beyond Pillow's own limit already
            raise DataError(f"{where}: {_one_line(error)}; refused") from error
        _check_pixels(picture.height, picture.width, where)
        return np.array(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's PNG reader raises the last
        raise DataError(
            f"{where} cannot be decoded\n  found: {len(encoded)} bytes, {_one_line(error)}"
        ) from error


def _check_pixels(height: int, width: int, where: str) -> None:
    """Before anything is allocated: a header of a few bytes may claim any size."""
    if height * width > MOST_PIXELS:
        raise DataError(
            f"{where}: a picture of {width} x {height} pixels; refused, {MOST_PIXELS:,} is the limit"
        )


# --- opening ------------------------------------------------------------------------------------------------


def open_dataset(root: Path, as_stored: bool = False) -> Dataset:
    """Open the LeRobot v3.0 dataset in folder `root`; DataError says what is missing and what would help.

    `as_stored`: every column by the name it has in the files, for those who work on the files themselves.
    """
    root = Path(root)
    with malformed_as(f"metadata of {root}", f"See what is wrong:  dpipe doctor {root}"):
        return _open_dataset(root, as_stored)


def _open_dataset(root: Path, as_stored: bool) -> Dataset:
    info = _read_info(root)
    manifest = _read_manifest(root)
    features = {str(name): dict(told) for name, told in info["features"].items()}
    for name, told in features.items():
        shape = told.get("shape")
        sides = isinstance(shape, list | tuple) and all(isinstance(n, int) and n >= 0 for n in shape)
        if not isinstance(told.get("dtype"), str) or not sides:
            raise DataError(
                f"{root / 'meta/info.json'}: feature '{name:.80}' has dtype {told.get('dtype')!r:.40} and shape "
                f"{shape!r:.80}\n  expected: the name of a type and a list of whole numbers"
            )
    fps = float(info["fps"])
    if fps <= 0 or fps != int(fps):
        raise DataError(f"{root / 'meta/info.json'}: fps {info['fps']}\n  expected: a whole number above 0")
    videos = [name for name, told in features.items() if told.get("dtype") == "video"]
    episodes = _read_episodes(root, videos, int(fps))
    declared = info.get("total_episodes", len(episodes))
    if declared != len(episodes):
        raise DataError(
            f"{root}: meta/episodes lists {len(episodes)} episodes\n"
            f"  expected: {declared}, by meta/info.json.  The recording was cut short or files are missing."
        )
    stats_path = root / "meta" / "stats.json"
    stats = _read_json(stats_path) if stats_path.is_file() else {}
    foreign = manifest is None and not as_stored
    renamed = {a: b for a, b in POLICY_NAMES.items() if foreign and a in features and b not in features}
    return Dataset(
        root=root,
        name=(manifest or {}).get("name") or root.resolve().name,
        info=info,
        fps=int(fps),
        features={renamed.get(name, name): told for name, told in features.items()},
        stats={renamed.get(name, name): told for name, told in stats.items()},
        tasks=read_tasks(root),
        manifest=manifest,
        episodes=episodes,
        splits=_read_splits(root, info, len(episodes)),
        stored={new: old for old, new in renamed.items()},
    )


def _read_info(root: Path) -> dict[str, Any]:
    path = root / "meta" / "info.json"
    if not path.is_file():
        inside = sorted(entry.name for entry in root.iterdir())[:8] if root.is_dir() else None
        found = "no such folder" if inside is None else ", ".join(inside) or "an empty folder"
        if inside is not None and _own_leavings(root):
            raise _unfinished(root)
        raise DataError(
            f"{root} is not a LeRobot dataset\n  expected: {path}\n  found: {found}\n"
            "  Make one:  dpipe convert SOURCE --to lerobot"
        )
    info = _read_json(path)
    version = str(info.get("codebase_version", "(none)"))
    if not version.startswith("v3."):
        raise DataError(
            f"{root} is a LeRobot dataset of version {version}\n  expected: v3.0\n"
            f"  Convert it:  dpipe convert lerobot --raw {root} --to lerobot"
        )
    storage = info.get("storage_format", "parquet")
    if storage != "parquet":
        raise DataError(
            f"{root} is stored as {storage}\n  expected: Parquet and MP4 files, LeRobot's v3.0 layout"
        )
    for key in ("fps", "features"):
        if key not in info:
            raise DataError(f"{path}: no entry '{key}'\n  found: {', '.join(info)}")
    for key in ("data_path", "video_path"):
        _check_template(info.get(key), f"{path}: {key}")
    return info


def _check_template(template: Any, where: str) -> None:
    """A path template may name chunk, file and camera, and lead nowhere but into the dataset."""
    if template is None:
        return
    sound = isinstance(template, str) and _TEMPLATE.fullmatch(template) is not None
    if not sound or template.startswith("/") or ".." in template.split("/"):
        raise DataError(
            f"{where} is {template!r:.120}; refused\n"
            "  expected: a path below the dataset with {video_key}, {chunk_index:03d} and {file_index:03d}"
        )


def _own_leavings(root: Path) -> bool:
    """True where dpipe/ holds more than results of other datasets' kind but no manifest."""
    folder = root / OWN_FOLDER
    if not folder.is_dir() or (folder / "manifest.json").is_file():
        return False
    inside = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
    return not inside or bool(inside - GUESTS)


def _unfinished(root: Path) -> DataError:
    return DataError(
        f"{root} is unfinished: its conversion was stopped\n"
        f"  expected: {root / OWN_FOLDER / 'manifest.json'}\n"
        "  Run the same dpipe convert again; it goes on where it stopped."
    )


def _read_manifest(root: Path) -> dict[str, Any] | None:
    if _own_leavings(root):
        raise _unfinished(root)
    path = root / OWN_FOLDER / "manifest.json"
    return _read_json(path) if path.is_file() else None


def _read_episodes(root: Path, videos: Sequence[str], fps: int) -> Episodes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    required = ["episode_index", "length", "dataset_from_index", "data/chunk_index", "data/file_index"]
    required += [
        f"videos/{camera}/{name}"
        for camera in videos
        for name in ("chunk_index", "file_index", "from_timestamp")
    ]
    paths = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not paths:
        raise DataError(
            f"{root}: no episodes\n  expected: meta/episodes/chunk-000/file-000.parquet\n"
            "  The recording was cut short before its tables were written."
        )
    tables = []
    for path in paths:
        try:
            file = pq.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} cannot be read as Parquet\n  found: {_one_line(error)}\n"
                "  The recording was cut short."
            ) from error
        refuse_claims(file.metadata, path.stat().st_size, str(path))
        have = file.schema_arrow.names
        missing = [name for name in required if name not in have]
        if missing:
            raise DataError(
                f"{path}: no column '{missing[0]}'\n"
                f"  found: {', '.join(name for name in have if not name.startswith('stats/'))}"
            )
        tables.append(_read_columns(file, path, required))
    table = pa.concat_tables(tables, promote_options="permissive")
    numbers = {name: _values(_whole(table.column(name))) for name in required}
    count = len(numbers["length"])
    wrong = np.flatnonzero(numbers["episode_index"] != np.arange(count))
    if len(wrong):
        raise DataError(
            f"{root / 'meta/episodes'}: row {wrong[0]} is episode {numbers['episode_index'][wrong[0]]}\n"
            f"  expected: episodes 0 to {count - 1} in order; readers find an episode by its row"
        )
    length, first = (
        numbers["length"].astype(np.int64, copy=False),
        numbers["dataset_from_index"].astype(np.int64),
    )
    expected = np.concatenate([[0], np.cumsum(length)[:-1]]) if count else length
    wrong = np.flatnonzero((first != expected) | (length < 1))
    if len(wrong):
        e = int(wrong[0])
        raise DataError(
            f"{root / 'meta/episodes'}: episode {e} has {length[e]} frames from index {first[e]}\n"
            f"  expected: at least one frame, from index {expected[e]}, where the episode before it ends"
        )
    place = numbers["data/chunk_index"].astype(np.int64, copy=False) * 2**32 + numbers[
        "data/file_index"
    ].astype(np.int64)
    if np.any(np.diff(place) < 0):
        raise DataError(
            f"{root / 'meta/episodes'}: episodes go back to an earlier data file\n  expected: file order"
        )
    starts_file = np.diff(place, prepend=-1) != 0
    # Index of the first row of the file each episode lies in, carried forward from the file's first episode.
    file_first = np.maximum.accumulate(np.where(starts_file, first, 0)) if count else first
    cameras = {
        camera: CameraPlaces(
            numbers[f"videos/{camera}/chunk_index"].astype(np.int64, copy=False),
            numbers[f"videos/{camera}/file_index"].astype(np.int64, copy=False),
            numbers[f"videos/{camera}/from_timestamp"].astype(np.float64, copy=False),
            np.rint(numbers[f"videos/{camera}/from_timestamp"].astype(np.float64, copy=False) * fps).astype(
                np.int64, copy=False
            ),
        )
        for camera in videos
    }
    return Episodes(
        length=length,
        first_index=first,
        data_chunk=numbers["data/chunk_index"].astype(np.int64, copy=False),
        data_file=numbers["data/file_index"].astype(np.int64, copy=False),
        first_row=first - file_first,
        cameras=cameras,
        text=TextColumns(tuple(paths)),
    )


def _read_columns(file: pq.ParquetFile, path: Path, names: Sequence[str]) -> pa.Table:
    _check_single(file, path, names)
    try:
        return file.read(columns=list(names))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged\n  found: {_one_line(error)}\n  Restore the file.") from error


def _check_single(file: pq.ParquetFile, path: Path, names: Sequence[str]) -> None:
    have = file.schema_arrow.names
    twice = [name for name in names if have.count(name) > 1]
    if twice:
        raise DataError(f"{path} has {have.count(twice[0])} columns called '{twice[0]}'\n  expected: one")


def read_tasks(root: Path) -> list[str]:
    import pyarrow.parquet as pq

    path = root / "meta" / "tasks.parquet"
    if not path.is_file():
        raise DataError(f"{root}: no task table\n  expected: {path}")
    try:
        file = pq.ParquetFile(path)
        refuse_claims(file.metadata, path.stat().st_size, str(path))
        table = file.read()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged\n  found: {_one_line(error)}\n  Restore the file.") from error
    names = table.column_names
    # The sentence is the pandas index: called `task` by lerobot, `__index_level_0__` by careless writers.
    column = next((name for name in ("task", "__index_level_0__") if name in names), None)
    if column is None:
        raise DataError(f"{path}: no column 'task'\n  found: {', '.join(names)}")
    tasks = table.column(column).to_pylist()
    if "task_index" not in names:
        return tasks
    order = table.column("task_index").to_pylist()
    if sorted(order) != list(range(len(order))):
        raise DataError(f"{path}: task_index is {order[:8]}\n  expected: each of 0 to {len(order) - 1} once")
    by_index = dict(zip(order, tasks, strict=True))
    return [by_index[i] for i in range(len(order))]


def _read_splits(root: Path, info: Mapping[str, Any], count: int) -> dict[str, tuple[int, int]]:
    splits = {}
    for name, span in (info.get("splits") or {"train": f"0:{count}"}).items():
        first, _, last = str(span).partition(":")
        if not (first.isdigit() and last.isdigit() and int(first) <= int(last) <= count):
            raise DataError(
                f"{root / 'meta/info.json'}: split '{name}' is '{span}'\n"
                f"  expected: first:stop, within 0:{count}"
            )
        splits[str(name)] = (int(first), int(last))
    return splits


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON\n  found: {error}\n  Restore the file.") from error


# --- small parts --------------------------------------------------------------------------------------------


def _kept(cache: OrderedDict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    """`cache[key]`, made when absent; the least recently used is closed beyond OPEN_FILES."""
    if key in cache:
        cache.move_to_end(key)
        return cache[key]
    cache[key] = make()
    if len(cache) > OPEN_FILES:
        cache.popitem(last=False)[1].close()
    return cache[key]


def _runs(chosen: NDArray[np.int64], episodes: Episodes) -> list[range]:
    """Positions in `chosen` whose episodes follow one another in one data file."""
    if len(chosen) == 0:
        return []
    follows = np.diff(chosen) == 1
    for place in (episodes.data_chunk[chosen], episodes.data_file[chosen]):
        follows &= np.diff(place) == 0
    starts = [0, *(np.flatnonzero(~follows) + 1).tolist()]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(chosen)], strict=True)]


def column_values(column: pa.ChunkedArray, told: Mapping[str, Any], where: str) -> NDArray[Any]:
    """Arrow column -> [n], [n, D] or [n, ...]; lists of any Arrow kind, all of the declared size."""
    import pyarrow as pa

    array = _whole(column)
    rows = len(array)
    if isinstance(array, pa.ExtensionArray):  # datasets registers its 2-D and larger arrays when imported
        array = array.storage
    if array.null_count:
        raise DataError(f"{where}: {array.null_count} of {rows} values are missing\n  expected: none")
    if (
        pa.types.is_string(array.type)
        or pa.types.is_large_string(array.type)
        or pa.types.is_struct(array.type)
    ):
        if told["dtype"] not in ("string", "language"):
            raise DataError(f"{where}: {array.type}\n  expected: {told['dtype']}, by meta/info.json")
        return array.to_numpy(zero_copy_only=False)
    nested = False
    while (
        pa.types.is_list(array.type)
        or pa.types.is_large_list(array.type)
        or pa.types.is_fixed_size_list(array.type)
    ):
        nested = True
        if pa.types.is_fixed_size_list(array.type):  # `flatten` would import pyarrow.compute, for 0.2 s
            width = array.type.list_size
            array = array.values.slice(array.offset * width, len(array) * width)
            continue
        if len(np.unique(array.value_lengths())) > 1:
            raise DataError(f"{where}: rows of different lengths\n  expected: {list(told['shape'])} in each")
        array = array.flatten()
    if array.null_count:
        raise DataError(f"{where}: {array.null_count} elements are missing\n  expected: none")
    if not pa.types.is_primitive(array.type):
        if told["dtype"] not in ("string", "language"):
            raise DataError(f"{where}: {array.type}\n  expected: {told['dtype']}, by meta/info.json")
        return np.array(column.to_pylist(), dtype=object)
    values = _values(array)
    if not nested:
        return values
    shape = tuple(int(n) for n in told["shape"])
    if len(values) != rows * int(np.prod(shape)):
        raise DataError(
            f"{where}: {len(values)} elements in {rows} rows\n  expected: {shape} in each, by meta/info.json"
        )
    return values if shape == (1,) else values.reshape(rows, *shape)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    import pyarrow as pa

    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _values(array: pa.Array) -> NDArray[Any]:
    """Numbers of an Arrow array without nulls, in place (`to_numpy` would import pandas first)."""
    import pyarrow as pa

    buffer = array.buffers()[1]
    if pa.types.is_boolean(array.type):
        bits = np.unpackbits(np.frombuffer(buffer, np.uint8), bitorder="little")
        return bits[array.offset : array.offset + len(array)].astype(bool)
    dtype = np.dtype(array.type.to_pandas_dtype())
    if not len(array):
        return np.zeros(0, dtype)
    return np.frombuffer(buffer, dtype, len(array), array.offset * dtype.itemsize)


def _empty(told: Mapping[str, Any]) -> NDArray[Any]:
    shape = tuple(int(n) for n in told["shape"])
    dtype = object if told["dtype"] in ("string", "language") else np.dtype(told["dtype"])
    return np.zeros((0, *(() if shape == (1,) else shape)), dtype)


def _one_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
