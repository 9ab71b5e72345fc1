"""The catalogue: every episode of a raw folder, checked but for its pixels, remembered between runs.

Scans run as tasks; a recording whose files kept size and time is not opened again. Entries are held as Arrow
columns and become Python objects when one is asked for: a million episodes are some hundred megabytes. A long scan
keeps what it has read in pieces, so that one that is stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property, lru_cache
from pathlib import Path
from sys import intern
from typing import TYPE_CHECKING, Any

import numpy as np

from ..converters import Converter, load_converter
from ..schemas.episode import Dropped, EpisodeRef, Recording, Segment
from ..schemas.errors import DataError
from ..schemas.features import CameraFeature
from .execute import Executor, Failure, Task, attempt
from .payload import file_memo
from .progress import Progress
from .receipts import few_collections
from .tables import numbers_of, read_columns, write_parquet

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

_json = json.JSONEncoder(ensure_ascii=False).encode

RECORDINGS_A_TASK = 64
BATCH = 16_384  # entries turned into columns, or back into objects, at a time
PIECE_S = 30.0  # how much of a scan a kill may cost
EPISODE, LEFT_OUT, EMPTY = 0, 1, 2  # kinds of entries; EMPTY: a recording with nothing in it


class Refs(Sequence[EpisodeRef]):
    """Episodes as columns, in order; an EpisodeRef is made when one is asked for."""

    def __init__(self, table: pa.Table, raw: Path) -> None:
        self.table, self.raw = table, raw

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return self.take(np.arange(len(self))[row])
        if row < 0:
            row += len(self)
        if not 0 <= row < len(self):
            raise IndexError(row)
        return next(self._made(self.table.slice(row, 1)))

    def __iter__(self) -> Iterator[EpisodeRef]:
        for start in range(0, len(self), BATCH):
            yield from self._made(self.table.slice(start, BATCH))

    def _made(self, table: pa.Table) -> Iterator[EpisodeRef]:
        rows = table.select(["fields", "files", "cameras", "frames"]).to_pylist()
        for row in rows:
            value = json.loads(row["fields"])
            value |= {"frames": row["frames"], "cameras": _cameras(row["cameras"])}
            value["files"] = tuple(self.raw / name for name in json.loads(row["files"]))
            value["segments"] = tuple(Segment(**segment) for segment in value["segments"])
            value["warnings"] = tuple(value["warnings"])
            yield EpisodeRef(**value)

    def take(self, rows: NDArray[np.int64] | Sequence[int]) -> Refs:
        if len(rows) == len(self) and (np.diff(rows) == 1).all():
            return self
        return Refs(self.table.unify_dictionaries().take(np.asarray(rows, np.int64)), self.raw)

    @cached_property
    def source_ids(self) -> list[str]:
        return self.table.column("source_id").to_pylist()

    @cached_property
    def frames(self) -> NDArray[np.int64]:
        """[episodes]"""
        return numbers_of(self.table.column("frames"))

    @cached_property
    def row_of(self) -> dict[str, int]:
        return {source_id: row for row, source_id in enumerate(self.source_ids)}

    def texts(self, name: str) -> list[str]:
        """A column of few distinct words: split, variant, instruction, cameras."""
        return shared_texts(self.table.column(name))

    def camera_sets(self) -> Iterator[tuple[tuple[CameraFeature, ...], int, int]]:
        """(cameras, the first episode that has them, episodes that have them)."""
        seen: dict[str, list[int]] = {}
        for row, text in enumerate(self.texts("cameras")):
            known = seen.setdefault(text, [row, 0])
            known[1] += 1
        for text, (row, count) in seen.items():
            yield _cameras(text), row, count

    def memos(self) -> Iterator[str]:
        """[size, time] of each episode's files as they are now, as the JSON text that receipts hold."""
        held, memo = None, ""
        for files in self.paths():
            if files is not held:
                held, memo = files, json.dumps(file_memo(files))
            yield memo

    def paths(self) -> Iterator[tuple[Path, ...]]:
        held, paths = None, ()
        for text in self.texts("files"):
            if text != held:  # episodes of one file follow one another
                held, paths = text, tuple(self.raw / name for name in json.loads(text))
            yield paths

    @cached_property
    def notes(self) -> list[tuple[str, str]]:
        """(source_id, warning) of what is sound enough to convert and odd enough to report."""
        odd = [row for row, is_odd in enumerate(self.table.column("odd").to_pylist()) if is_odd]
        names, fields = self.table.column("source_id"), self.table.column("fields")
        rows = ((names[row].as_py(), fields[row].as_py()) for row in odd)  # filter() imports pyarrow.compute
        return [(source_id, note) for source_id, text in rows for note in json.loads(text)["warnings"]]


@dataclass
class Catalog:
    """Entries in the order of their source: episodes, and what cannot be converted."""

    table: pa.Table
    raw: Path
    setting: str
    recordings: int = 0
    fresh: bool = False  # something was scanned now rather than remembered
    variant: str | None = None  # None: all of them
    pieces: Path | None = None  # of scans that were stopped; of no use once all is remembered

    @cached_property
    def refs(self) -> Refs:
        kinds = numbers_of(self.table.column("kind"))
        wanted = kinds == EPISODE
        if self.variant is not None:
            wanted &= np.array([v == self.variant for v in shared_texts(self.table.column("variant"))], bool)
        if wanted.all():
            return Refs(self.table, self.raw)
        return Refs(self.table.filter(_mask(wanted)), self.raw)

    @cached_property
    def dropped(self) -> list[Dropped]:
        """What is left out, of this variant or before its variant was known."""
        kinds = numbers_of(self.table.column("kind"))
        if not (kinds == LEFT_OUT).any():
            return []
        found = []
        for text in self.table.filter(_mask(kinds == LEFT_OUT)).column("fields").to_pylist():
            fact = json.loads(text)
            found.append(Dropped(**fact | {"files": tuple(fact["files"])}))
        return [d for d in found if self.variant is None or d.variant in ("", self.variant)]

    @property
    def variants(self) -> list[str]:
        """Feature sets in the order met; each becomes a dataset of its own."""
        return list(dict.fromkeys(self.refs.texts("variant")))

    def of(self, variant: str) -> Catalog:
        """One variant's episodes, and what was left out before its variant was known."""
        return Catalog(self.table, self.raw, self.setting, self.recordings, self.fresh, variant, self.pieces)

    def remember(self, path: Path) -> None:
        """Keep the scan for the next run."""
        _write_entries(path, self.table, self.setting, self.raw)
        if self.pieces is not None:
            shutil.rmtree(self.pieces, ignore_errors=True)


def scan_recordings(
    source: str, raw: Path, recordings: Sequence[Recording], memos: Sequence[str], options: Any
) -> tuple[list[Any], list[int]]:
    """One scan task: entries as Arrow batches, and how many each recording has. A bug leaves out one recording."""
    converter = load_converter(source)
    made = _Entries(raw)
    counts = []
    for recording, memo in zip(recordings, memos, strict=True):
        outcome = attempt(converter.scan, (recording, options))
        first = made.rows
        made.add(
            recording.name, memo, [_failed(recording, outcome)] if isinstance(outcome, Failure) else outcome
        )
        counts.append(made.rows - first)
    return made.finished(), counts


def _failed(recording: Recording, failure: Failure) -> Dropped:
    files = tuple(path.name for path in recording.files)
    remedy = "look at this file, or report it"
    return Dropped(recording.name, files, failure.message, remedy, recording.split)


@few_collections()
def build_catalog(
    converter: Converter,
    raw: Path,
    options: Any,
    cache: Path | None,
    executor_for: Callable[[int], Executor],
    progress: Progress,
    pieces: Path | None = None,
    keep: bool = False,
) -> Catalog:
    """Find and scan; `cache` is the file of earlier scans, `Catalog.remember` writes the next one.

    `executor_for(n)` is asked for a place to run only where n recordings have to be opened. `pieces` is the folder
    of what scans that did not end have read; this one adds to it where it may `keep` anything.
    """
    if not raw.is_dir() and not raw.is_file():
        raise missing_raw(converter, raw)
    # Options and version may change what a scan finds (pairing, cut): part of what the memory is good for.
    setting = json.dumps([converter.name, converter.version, asdict(options)], sort_keys=True, default=str)
    earlier = sorted(pieces.glob("*.parquet")) if pieces is not None else []
    known, old_spans, memory = _remembered([*([cache] if cache else []), *earlier], raw, setting)
    # Of each recording: rows of the memory, or (-1, its place among the new).
    spans: list[tuple[int, int]] = []
    fresh: list[Recording] = []
    memos: list[str] = []
    files, memo = (), "[]"
    for recording in converter.find(raw, options):
        if recording.files != files:  # members of one archive share theirs
            files, memo = recording.files, intern(json.dumps(file_memo(recording.files)))
        at = known.get(recording.name)
        if at is not None and at[1] == memo:
            spans.append(old_spans[at[0]])
        else:
            spans.append((-1, len(fresh)))
            fresh.append(recording)
            memos.append(memo)
    if not spans:
        raise missing_raw(converter, raw)
    if not fresh and spans == old_spans:
        table = memory
    else:
        hold = None if pieces is None or not keep else _Pieces(pieces, raw, setting)
        scanned = _scan(converter, raw, options, fresh, memos, executor_for, progress, hold)
        table = _in_order(spans, memory, *scanned)
    is_fresh = bool(fresh or earlier) or spans != old_spans
    catalog = Catalog(table, raw, setting, len(spans), is_fresh, pieces=pieces)
    if catalog.fresh:
        _check_unique(catalog.refs.source_ids)
    return catalog


@dataclass
class _Pieces:
    """Where a scan keeps what it has read, from time to time."""

    folder: Path
    raw: Path
    setting: str
    kept: int = 0  # tables
    written: int = 0
    at: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        return time.monotonic() - self.at > PIECE_S

    def keep(self, tables: Sequence[pa.Table]) -> None:
        """What came since the last piece. Its name is this process's own: several may scan one folder at once."""
        import pyarrow as pa

        self.at = time.monotonic()
        if len(tables) == self.kept:
            return
        path = self.folder / f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}-{self.written}.parquet"
        _write_entries(path, pa.concat_tables(tables[self.kept :]), self.setting, self.raw)
        self.kept, self.written = len(tables), self.written + 1


def _write_entries(path: Path, table: pa.Table, setting: str, raw: Path) -> None:
    """Entries as a file; words are numbered anew as they come, not in the order in which workers were done."""
    import pyarrow as pa

    schema = entry_schema().with_metadata({"setting": setting, "raw": str(raw)})

    def pieces() -> Iterator[pa.Table]:
        for start in range(0, max(1, table.num_rows), BATCH):
            some = table.slice(start, BATCH).combine_chunks()
            columns = [
                column.cast(column.type.value_type).combine_chunks().dictionary_encode()
                if pa.types.is_dictionary(column.type)
                else column
                for column in some.columns
            ]
            yield pa.Table.from_arrays(columns, schema=schema)

    write_parquet(path, pieces(), schema)


def _scan(
    converter: Converter,
    raw: Path,
    options: Any,
    recordings: list[Recording],
    memos: list[str],
    executor_for: Callable[[int], Executor],
    progress: Progress,
    pieces: _Pieces | None = None,
) -> tuple[pa.Table, list[tuple[int, int]]]:
    """Entries of recordings as columns in the order they came, and each recording's rows among them."""
    import pyarrow as pa

    progress.begin("scan", len(recordings), "recordings")
    size = max(1, min(RECORDINGS_A_TASK, len(recordings) // RECORDINGS_A_TASK))
    batches: list[Any] = []
    tables: list[pa.Table] = []
    spans: list[tuple[int, int]] = [(0, 0)] * len(recordings)
    rows = 0

    def gather() -> None:
        """Many small batches as one: each carries its own dictionaries of words."""
        tables.append(pa.Table.from_batches(batches, entry_schema()).unify_dictionaries().combine_chunks())
        batches.clear()

    def keep(pieces: _Pieces) -> None:
        if batches:
            gather()
        pieces.keep(tables)

    def take(first: int, outcome: tuple[list[Any], list[int]]) -> None:
        nonlocal rows
        batches.extend(outcome[0])
        if sum(batch.num_rows for batch in batches) >= BATCH:
            gather()
        if pieces is not None and pieces.due():
            keep(pieces)
        for at, count in enumerate(outcome[1], first):
            spans[at] = (rows, rows + count)
            rows += count
        progress.advance(len(outcome[1]))

    def task(first: int, last: int) -> Task:
        some, their = recordings[first:last], memos[first:last]
        return ((first, last), scan_recordings, (converter.address, raw, some, their, options))

    tasks = (task(a, min(a + size, len(recordings))) for a in range(0, len(recordings), size))
    if not recordings:
        return pa.Table.from_batches([], entry_schema()), spans
    executor = executor_for(len(recordings))
    try:
        for (first, last), outcome in executor.results(tasks):
            if not isinstance(outcome, Failure):
                take(first, outcome)
            elif last - first > 1:  # one of them takes workers down: find it
                for at in range(first, last):
                    executor.submit(*task(at, at + 1)[:2], *task(at, at + 1)[2])
            else:
                made = _Entries(raw)
                made.add(recordings[first].name, memos[first], [_failed(recordings[first], outcome)])
                take(first, (made.finished(), [1]))
    except BaseException:
        if pieces is not None:
            keep(pieces)
        raise
    progress.end()
    gather()
    return pa.concat_tables(tables), spans


def _in_order(
    spans: Sequence[tuple[int, int]], memory: pa.Table, scanned: pa.Table, new: Sequence[tuple[int, int]]
) -> pa.Table:
    """Remembered and new entries, recording by recording as the source lists them."""
    import pyarrow as pa

    base = memory.num_rows
    runs: list[list[int]] = []
    for start, stop in spans:
        first, last = (start, stop) if start >= 0 else (base + new[stop][0], base + new[stop][1])
        if runs and runs[-1][1] == first:
            runs[-1][1] = last
        else:
            runs.append([first, last])
    both = pa.concat_tables([memory, scanned])
    if len(runs) == 1:
        return both.slice(runs[0][0], runs[0][1] - runs[0][0])
    if len(runs) <= 1000:
        return pa.concat_tables([both.slice(a, b - a) for a, b in runs])
    return both.unify_dictionaries().take(np.concatenate([np.arange(a, b) for a, b in runs]))


class _Entries:
    """Entries of recordings, gathered as rows and turned into Arrow columns now and then."""

    def __init__(self, raw: Path) -> None:
        self.raw, self.rows = raw, 0
        self.batches: list[Any] = []
        self.waiting: list[tuple[Any, ...]] = []

    def add(self, recording: str, memo: str, entries: Sequence[EpisodeRef | Dropped]) -> None:
        for entry in entries or [None]:
            self.waiting.append((recording, memo, *_entry(entry, self.raw)))
            self.rows += 1
        if len(self.waiting) >= BATCH:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        schema = entry_schema()
        columns = zip(*self.waiting, strict=True)
        arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
        self.batches.append(pa.RecordBatch.from_arrays(arrays, schema=schema))
        self.waiting = []

    def finished(self) -> list[Any]:
        if self.waiting:
            self._flush()
        return self.batches


@cache
def entry_schema() -> pa.Schema:
    """Few distinct words are dictionaries; what differs from episode to episode is one JSON text."""
    import pyarrow as pa

    word = pa.dictionary(pa.int32(), pa.string())
    return pa.schema(
        [
            ("recording", word),
            ("memo", word),
            ("kind", pa.int8()),
            ("source_id", pa.string()),
            ("split", word),
            ("variant", word),
            ("frames", pa.int64()),
            ("instruction", word),
            ("cameras", word),
            ("files", word),
            ("odd", pa.bool_()),
            ("fields", pa.string()),
        ]
    )


def _entry(entry: EpisodeRef | Dropped | None, raw: Path) -> tuple[Any, ...]:
    """An entry in the order of `entry_schema`, from its kind on."""
    if isinstance(entry, EpisodeRef):
        told = {
            "source_id": entry.source_id,
            "split": entry.split,
            "variant": entry.variant,
            "instruction": entry.instruction,
            "group": entry.group,
            "segments": [segment.to_json() for segment in entry.segments],
            "metadata": dict(entry.metadata),
            "locator": dict(entry.locator),
            "warnings": list(entry.warnings),
        }
        facts = (entry.source_id, entry.split, entry.variant, entry.frames, entry.instruction)
        where = (_cameras_text(entry.cameras), _files_text(tuple(entry.files), raw))
        return (EPISODE, *facts, *where, bool(entry.warnings), _json(told))
    kind, source_id, fields = EMPTY, "", ""
    if entry is not None:
        fact = entry.to_json()
        del fact["checks"]
        kind, source_id, fields = LEFT_OUT, entry.source_id, _json(fact)
    return (kind, source_id, "", "", 0, "", "", "", False, fields)


@lru_cache(maxsize=1024)
def _cameras(text: str) -> tuple[CameraFeature, ...]:
    return tuple(CameraFeature(**camera) for camera in json.loads(text))


@lru_cache(maxsize=1024)
def _cameras_text(cameras: tuple[CameraFeature, ...]) -> str:
    return json.dumps([asdict(camera) for camera in cameras], ensure_ascii=False)


def shared_texts(column: pa.ChunkedArray) -> list[str]:
    """A column of few distinct words as a list in which equal words of a chunk are one object."""
    words: list[str] = []
    for chunk in column.chunks:
        coded = chunk if hasattr(chunk, "dictionary") else chunk.dictionary_encode()
        known = coded.dictionary.to_pylist()
        words += [known[i] for i in coded.indices.to_pylist()]
    return words


def _mask(wanted: NDArray[np.bool_]) -> Any:
    import pyarrow as pa

    return pa.array(wanted)


def missing_raw(converter: Converter, raw: Path) -> DataError:
    from ..samples import SAMPLERS

    state = "the folder is not there" if not raw.exists() else "nothing in it looks like one"
    sample = f", or make some:  dpipe sample {converter.name}" if converter.name in SAMPLERS else ""
    return DataError(
        f"no {converter.name} recordings in {raw}: {state}\n"
        f"  expected: {converter.expects}\n"
        f"  next: put them there, or name their folder with --raw or in dpipe.toml{sample}"
    )


def select(refs: Refs, where: str | None, limit: int | None) -> Refs:
    """Episodes that meet an SQL condition over the catalogue, then the first `limit` of them."""
    chosen = refs
    if where:
        chosen = refs.take(np.asarray(rows_that_meet(refs, where), np.int64))
    return chosen if limit is None else chosen[:limit]


def rows_that_meet(refs: Sequence[EpisodeRef], where: str) -> list[int]:
    """Which recordings meet an SQL condition, in order."""
    from .query import select_rows

    return select_rows(_sql_table(refs), where)


def _sql_table(refs: Sequence[EpisodeRef]) -> pa.Table:
    """What --where may speak of: the catalogue's columns, and what converters told of each episode."""
    import pyarrow as pa

    pieces = []
    for start in range(0, max(1, len(refs)), BATCH):
        rows = [
            {
                "row": start + row,
                "source_id": ref.source_id,
                "split": ref.split,
                "frames": ref.frames,
                "instruction": ref.instruction,
                "variant": ref.variant,
                **{k: v for k, v in ref.metadata.items() if isinstance(v, str | int | float | bool)},
            }
            for row, ref in enumerate(refs[start : start + BATCH])
        ]
        names = list(dict.fromkeys(name for row in rows for name in row))
        pieces.append(pa.table({name: [row.get(name) for row in rows] for name in names}))
    return pa.concat_tables(pieces, promote_options="permissive")


@lru_cache(maxsize=64)  # members of one archive share theirs
def _files_text(files: tuple[Path, ...], raw: Path) -> str:
    """Paths below the raw folder, relative to it. By their text: pathlib's own is 50 times slower, a million times."""
    below = f"{raw}/"
    return _json([str(path).removeprefix(below) for path in files])


def _remembered(
    files: Sequence[Path], raw: Path, setting: str
) -> tuple[dict[str, tuple[int, str]], list[tuple[int, int]], pa.Table]:
    """Earlier scans: recording -> (its place, its files' memo), rows of each, and the table.

    Where several files speak of a recording the last counts. A torn or foreign file is as good as none.
    """
    import pyarrow as pa

    tables: list[pa.Table] = []
    known: dict[str, tuple[int, str]] = {}
    spans: list[tuple[int, int]] = []
    row = 0
    for path in files:
        table = _entries_of(path, raw, setting)
        if table is None:
            continue
        tables.append(table)
        names, memos = shared_texts(table.column("recording")), shared_texts(table.column("memo"))
        held = None
        for name, memo in zip(names, memos, strict=True):
            if name != held:
                held = name
                known[name] = (len(spans), memo)
                spans.append((row, row))
            spans[-1] = (spans[-1][0], row + 1)
            row += 1
    return known, spans, pa.concat_tables(tables) if tables else pa.Table.from_batches([], entry_schema())


def _entries_of(path: Path, raw: Path, setting: str) -> pa.Table | None:
    """One file of an earlier scan of this folder with these settings."""
    import pyarrow as pa

    if not path.is_file():
        return None
    try:
        table = read_columns(path)
    except (OSError, pa.ArrowInvalid):
        return None
    meta = table.schema.metadata or {}
    told = {"setting": setting, "raw": str(raw)}
    if any(meta.get(name.encode()) != text.encode() for name, text in told.items()):
        return None
    table = table.replace_schema_metadata(None)
    return table if table.schema == entry_schema() else None


def _check_unique(source_ids: Iterable[str]) -> None:
    seen: set[str] = set()
    for source_id in source_ids:
        if source_id in seen:
            raise DataError(
                f"two recordings carry the same name '{source_id}'\n"
                f"  next: rename one of the files, or convert their folders separately with --raw and --name"
            )
        seen.add(source_id)
