"""Receipts: what is known of every finished episode, by part while a run goes on, in one table when it is done.

    journal/parts/part-000000.json         facts of a part's episodes; written last, its presence means muxed
    journal/parts/part-000000.parquet      their statistics and picture histograms
    journal/receipts.parquet               the facts of every episode of the finished dataset
    journal/statistics/from-000000.parquet the statistics of a finished run's parts, up to 256 parts a file

Facts are small and read by every run; statistics are large and pass through `finish` part by part.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..schemas.errors import DataError
from ..schemas.features import Feature
from .durable import write_json
from .statistics import MEASURED
from .tables import STATISTICS, in_turn, numbers_of, read_columns, read_in_turn, write_parquet

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from .execute import StopRequest
    from .spool import Spool

NUMBERS = ("episode_index", "index", "task_index")
WORDS = ("split", "variant", "instruction", "dropped", "remedy", "warnings")
TEXTS = ("source_id", "content", "raw_digest", "key", "memo", "metadata", "segments")
COUNTS = ("frames", "part", "row", "first_frame", "file_part", "row_group", *(f"at_{n}" for n in NUMBERS))
"""part, row: the receipt's place; file_part, row_group: where its rows lie; at_*: the numbers written there."""
COMPARED = ("source_id", "key", "memo", "raw_digest", "dropped", "remedy", "split", "part")

BATCH = 16_384  # receipts held as Python objects at a time
PARTS_PER_FILE = 256
RECEIPTS_A_TASK = 64  # files that a thread reads at a time
STATISTICS_AT_A_TIME = 1024  # episodes, of some kilobytes each


def receipt_schema() -> pa.Schema:
    import pyarrow as pa

    word = pa.dictionary(pa.int32(), pa.string())
    fields = [pa.field(name, pa.string()) for name in TEXTS]
    fields += [pa.field(name, word) for name in WORDS]
    fields += [pa.field(name, pa.int64()) for name in COUNTS]
    return pa.schema([*fields, pa.field("staged", pa.int8())])


def statistics_schema(features: Sequence[str], cameras: Sequence[str]) -> pa.Schema:
    import pyarrow as pa

    fields = [pa.field("part", pa.int64()), pa.field("row", pa.int64())]
    for feature in features:
        for name in STATISTICS:
            value = pa.int64() if name == "count" else pa.float64()
            fields.append(pa.field(f"stats/{feature}/{name}", pa.list_(value)))
    for key in cameras:
        fields.append(pa.field(f"histogram/{key}", pa.list_(pa.int64())))
        fields.append(pa.field(f"counted/{key}", pa.int64()))
    return pa.schema(fields)


# --- a part's receipt, as a worker leaves it ------------------------------------------------------------------


def receipt_path(root: Path, part: int) -> Path:
    return root / "dpipe" / "journal" / "parts" / f"part-{part:06d}.json"


def write_part_receipt(
    root: Path,
    part: int,
    spools: Sequence[Spool],
    features: Sequence[Feature],
    cameras: Sequence[str],
    numbers: Sequence[tuple[int, int, int]],
    streams: Mapping[str, Any],
    files: Mapping[str, int],
) -> None:
    """Statistics, then facts: one row an episode, dropped ones included, so that spool files may go."""
    path = receipt_path(root, part)
    write_part_statistics(path.with_suffix(".parquet"), part, spools, features, cameras)
    rows: list[dict[str, Any]] = []
    first_frame = kept = 0
    for spool in spools:
        receipt = spool.receipt
        dropped = "dropped" in receipt
        row: dict[str, Any] = {
            "source_id": receipt["source_id"],
            "split": receipt["split"],
            "variant": receipt["variant"],
            "frames": 0 if dropped else int(receipt["frames"]),
            "instruction": receipt["instruction"],
            "content": receipt.get("content", ""),
            "raw_digest": receipt.get("raw_digest", ""),
            "key": receipt["key"],
            "memo": json.dumps(receipt["memo"]),
            "metadata": json.dumps(receipt["metadata"], ensure_ascii=False),
            "segments": json.dumps(receipt["segments"], ensure_ascii=False),
            "warnings": json.dumps(receipt["warnings"], ensure_ascii=False),
            "first_frame": first_frame,
            "row_group": -1 if dropped else kept,
            "dropped": receipt.get("dropped", ""),
            "remedy": receipt.get("remedy", ""),
        }
        at = (-1, -1, -1) if dropped else numbers[kept]
        rows.append(row | {f"at_{name}": value for name, value in zip(NUMBERS, at, strict=True)})
        first_frame += row["frames"]
        kept += not dropped
    facts = {"part": part, "episodes": rows, "streams": dict(streams), "files": dict(files)}
    write_json(path, facts, indent=None)


def write_part_statistics(
    path: Path, part: int, spools: Sequence[Spool], features: Sequence[Feature], cameras: Sequence[str]
) -> None:
    import pyarrow as pa

    schema = statistics_schema([f.name for f in features], cameras)
    there = np.array(["dropped" not in spool.receipt for spool in spools], bool)
    kept = [spool for spool in spools if "dropped" not in spool.receipt]
    columns: dict[str, Any] = {"part": np.full(len(spools), part), "row": np.arange(len(spools))}
    for key in cameras:
        counted = np.zeros(len(spools), np.int64)
        counted[there] = [spool.receipt["cameras"][key]["counted"] for spool in kept]
        columns[f"counted/{key}"] = counted
    if kept:
        tables = np.stack([spool.arrays["statistics"] for spool in kept])
        frames = np.array([[spool.receipt["frames"]] for spool in kept], np.int64)
        bounds = np.cumsum([0, *(feature.dim for feature in features)]).tolist()
        for feature, (a, b) in zip(features, pairwise(bounds), strict=True):
            for row, name in enumerate(MEASURED):
                columns[f"stats/{feature.name}/{name}"] = _lists(tables[:, row, a:b], there)
            columns[f"stats/{feature.name}/count"] = _lists(frames, there)
        for key in cameras:
            counts = np.stack([spool.arrays[f"histogram/{key}"] for spool in kept])
            columns[f"histogram/{key}"] = _lists(counts.reshape(len(kept), -1), there)
    arrays = [
        pa.array(columns[field.name], field.type)
        if field.name in columns
        else pa.nulls(len(spools), field.type)
        for field in schema
    ]
    write_parquet(path, [pa.Table.from_arrays(arrays, schema=schema)], schema)


def _lists(values: NDArray[Any], there: NDArray[np.bool_]) -> pa.Array:
    """Rows [kept, D] as lists where `there`, nulls elsewhere."""
    import pyarrow as pa

    ends = np.concatenate([[0], np.cumsum(there)]) * values.shape[1]
    return pa.ListArray.from_arrays(
        pa.array(ends, pa.int32()), pa.array(values.reshape(-1)), mask=pa.array(~there)
    )


# --- all receipts of a dataset --------------------------------------------------------------------------------


class Receipts:
    """Facts as Arrow batches in the order they were made; an episode that was redone has several, the last counts."""

    def __init__(self, batches: Sequence[pa.RecordBatch], streams: Mapping[str, Any]) -> None:
        self.batches = [batch for batch in batches if batch.num_rows]
        self.streams = dict(streams)
        self.starts = np.cumsum([0, *(batch.num_rows for batch in self.batches)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def source_ids(self) -> list[str]:
        return [text for batch in self.batches for text in batch.column("source_id").to_pylist()]

    @cached_property
    def latest(self) -> dict[str, int]:
        """source_id -> row of the receipt that counts."""
        return {source_id: row for row, source_id in enumerate(self.source_ids)}

    def keep(self, names: Sequence[str]) -> None:
        """Drop all other columns: of a million episodes the texts are half a gigabyte."""
        self.batches = [batch.select(list(names)) for batch in self.batches]
        for name in ("source_ids", "latest"):
            vars(self).pop(name, None)

    def numbers(self, name: str) -> NDArray[Any]:
        """A column of numbers, [receipts]."""
        return numbers_of([batch.column(name) for batch in self.batches])

    def texts(self, name: str) -> list[str]:
        """A column of few distinct words."""
        words: list[str] = []
        for batch in self.batches:
            coded = batch.column(name)
            known = coded.dictionary.to_pylist()
            words += [known[i] for i in coded.indices.to_pylist()]
        return words

    def rows(self, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """Receipts one after the other as plain values."""
        for batch in self.batches:
            yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)

    def one(self, row: int, names: Sequence[str]) -> dict[str, Any]:
        """A receipt's facts."""
        batch = int(np.searchsorted(self.starts, row, side="right")) - 1
        at = row - int(self.starts[batch])
        return {name: self.batches[batch].column(name)[at].as_py() for name in names}

    def column(self, name: str, rows: NDArray[np.int64]) -> pa.Array:
        """A column at `rows`, in their order: batch by batch, so that no column is copied whole."""
        import pyarrow as pa

        of = np.searchsorted(self.starts, rows, side="right") - 1
        pieces, places = [], []
        for batch in np.unique(of):
            here = np.flatnonzero(of == batch)
            taken = self.batches[batch].column(name).take(pa.array(rows[here] - self.starts[batch]))
            pieces.append(taken.dictionary_decode() if hasattr(taken, "dictionary") else taken)
            places.append(here)
        joined = pa.concat_arrays(pieces)
        order = np.argsort(np.concatenate(places), kind="stable")
        return joined if (np.diff(order) == 1).all() else joined.take(pa.array(order))


@contextmanager
def few_collections() -> Iterator[None]:
    """Lists of a million words hold no cycles, and looking for some takes a tenth of the time to make them."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@few_collections()
def load_receipts(
    root: Path, columns: Sequence[str] | None = None, stop: StopRequest | None = None
) -> Receipts:
    """What earlier runs have made; `columns` where not all facts are needed.

    A finished dataset's are read without conversions from Python, which import pandas.
    """
    journal = root / "dpipe" / "journal"
    batches: list[Any] = []
    streams: dict[str, Any] = {}
    finished = journal / "receipts.parquet"
    if finished.is_file():
        table = read_columns(finished, columns)
        streams |= json.loads((table.schema.metadata or {}).get(b"streams", b"{}"))
        batches += table.replace_schema_metadata(None).to_batches()
    loose = _loose_files(journal, ".json")
    for start in range(0, len(loose), 1024):
        if stop is not None:
            stop.check()
        batch, found = _loose(loose[start : start + 1024], columns)
        batches.append(batch)
        streams = found | streams
    return Receipts(batches, streams)


def _loose_files(journal: Path, suffix: str) -> list[str]:
    """What parts have left, in their order. As text: of 80,000 paths pathlib makes and compares some seconds."""
    folder = journal / "parts"
    names = os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208
    return [f"{folder}/{name}" for name in sorted(names) if name[:5] == "part-" and name.endswith(suffix)]


def _contents(paths: Sequence[str]) -> list[bytes]:
    """Of many small files; several are asked for at once, since a disk that is asked one by one answers slowly."""

    def read(some: Sequence[str]) -> list[bytes]:
        texts = []
        for path in some:
            with open(path, "rb", buffering=0) as file:
                texts.append(file.read())
        return texts

    return [text for texts in in_turn(read, paths, RECEIPTS_A_TASK) for text in texts]


def _loose(paths: Sequence[str], columns: Sequence[str] | None) -> tuple[pa.RecordBatch, dict[str, Any]]:
    import pyarrow as pa

    schema = receipt_schema()
    if columns is not None:
        schema = pa.schema([schema.field(name) for name in columns])
    parts: list[int] = []
    rows: list[int] = []
    episodes: list[dict[str, Any]] = []
    streams: dict[str, Any] = {}
    for path, text in zip(paths, _contents(paths), strict=True):
        try:
            facts = json.loads(text)
        except ValueError as error:
            raise DataError(
                f"receipt {path} is torn: {error}; delete it and run the same command again"
            ) from error
        streams = facts["streams"] | streams
        count = len(facts["episodes"])
        parts += [facts["part"]] * count
        rows += range(count)
        episodes += facts["episodes"]
    told: dict[str, Sequence[int]] = {
        "part": parts, "file_part": parts, "row": rows, "staged": [1] * len(parts)
    }  # fmt: skip
    arrays = [
        pa.array(told.get(field.name) or [episode[field.name] for episode in episodes], field.type)
        if episodes
        else pa.array([], field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema), streams


# --- statistics -----------------------------------------------------------------------------------------------


def read_statistics(root: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Statistics of every receipt ever made, some parts at a time."""
    import pyarrow.parquet as pq

    journal = root / "dpipe" / "journal"
    for path in sorted((journal / "statistics").glob("from-*.parquet")):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns)
    yield from read_in_turn(_loose_statistics(journal), columns)


def stage_statistics(root: Path, staging: Path, stop: StopRequest) -> None:
    """Bring the statistics of loose parts together, in the order of parts; those of earlier runs stay."""
    loose = _loose_statistics(root / "dpipe" / "journal")
    folder = staging / "dpipe" / "journal" / "statistics"

    def stage(paths: Sequence[str]) -> None:
        stop.check()
        first = Path(paths[0]).stem.removeprefix("part-")
        schema = read_columns(paths[0]).schema
        tables = (read_columns(path, use_threads=False) for path in paths)
        same = (t if t.schema.equals(schema) else t.cast(schema) for t in tables)
        write_parquet(folder / f"from-{first}.parquet", _together(same), schema)

    for _ in in_turn(stage, loose, PARTS_PER_FILE):
        pass


def _together(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Small tables as larger ones: of a dozen episodes, a row group costs more to write than its numbers."""
    import pyarrow as pa

    some: list[pa.Table] = []
    for table in tables:
        some.append(table)
        if sum(t.num_rows for t in some) >= STATISTICS_AT_A_TIME:
            yield pa.concat_tables(some).combine_chunks()
            some = []
    if some:
        yield pa.concat_tables(some).combine_chunks()


def _loose_statistics(journal: Path) -> list[str]:
    """Statistics of parts that have their receipt: without one they are half of what a killed worker wrote."""
    receipts = {path.removesuffix(".json") for path in _loose_files(journal, ".json")}
    return [path for path in _loose_files(journal, ".parquet") if path.removesuffix(".parquet") in receipts]
