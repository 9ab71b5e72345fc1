"""The dpipe/ folder: manifest, contents, sidecar columns, segments, targets and shards against the dataset.

Digests exist here, so that what is silent elsewhere is not: contents tell rows that changed, checksums shards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...schemas.contract import ArraySpec, Contract
from ...schemas.errors import DataError, DpipeError
from ...schemas.problems import NOTE, WARN
from ...streams.dataset import GUESTS, contents_digest
from .checks import ALL, EXPECTED, OWN, Findings, Found, Level, check, in_a_line
from .recording import Gathered
from .subject import OWN_FOLDER, Subject, rows_of

MOST_TARGET_ROWS = 1 << 20  # rows of one target array whose values are looked at, unless everything is


@check("unfinished", OWN)
def the_manifest_was_written(subject: Subject) -> Findings:
    folder = subject.root / OWN_FOLDER
    if not folder.is_dir() or subject.ours:
        return
    inside = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
    if not inside or inside - GUESTS:
        yield Found(OWN_FOLDER, "no manifest.json, which is written last: the conversion was stopped")


@check("manifest", OWN)
def the_manifest_fits(subject: Subject) -> Findings:
    manifest, where = subject.manifest, f"{OWN_FOLDER}/manifest.json"
    if not subject.ours or manifest is None:
        return
    for name in ("dpipe", "name", "source", "embodiment", "conventions", "totals"):
        if name not in manifest:
            yield Found(where, f"no entry '{name}'")
    totals = manifest.get("totals")
    if isinstance(totals, dict) and "length" in subject.numbers:
        for name, number in (("episodes", len(subject)), ("frames", int(subject.lengths.sum()))):
            if name in totals and totals[name] != number:
                yield Found(where, f"{totals[name]} {name}, meta/episodes has {number}")
    embodiment = manifest.get("embodiment")
    told = embodiment.get("fps") if isinstance(embodiment, dict) else None
    if told is not None and subject.fps and told != subject.fps:
        yield Found(where, f"{told} fps, meta/info.json says {subject.fps}")
    described = embodiment.get("features") if isinstance(embodiment, dict) else None
    for name, told in (described or {}).items() if isinstance(described, dict) else ():
        names = subject.names(name)
        if names is None or len(set(names)) < len(names) or not isinstance(told, dict):
            continue  # names that are no names have been told
        if list(told.get("names") or names) != names:
            yield Found(where, f"'{name}' has other dimension names than in meta/info.json")


@check("own-table", OWN)
def own_tables_speak_of_the_same_episodes(subject: Subject) -> Findings:
    """dpipe/episodes.parquet row by row beside meta/episodes, video ranges to the frame among them."""
    if not subject.ours or "length" not in subject.numbers:
        return
    path = subject.root / OWN_FOLDER / "episodes.parquet"
    table = subject.read_table(path)
    where = subject.name_of(path)
    if table is None:
        yield Found(where, subject.broken[path], problem="unreadable" if path.exists() else "missing-file")
        return
    if table.num_rows != len(subject):
        yield Found(where, f"{table.num_rows} rows, meta/episodes has {len(subject)}")
        return
    expected: dict[str, Any] = {"episode_index": np.arange(len(subject)), "frames": subject.lengths}
    for name, values in expected.items():
        if name in table.column_names:
            wrong = np.flatnonzero(rows_of(table.column(name), 1)[:, 0] != values)
            if len(wrong):
                yield Found(where, f"{name} of row {wrong[0]} is not that of meta/episodes")
    column = subject.text_column("source_id")
    if column is not None and "source_id" in table.column_names:
        own = table.column("source_id")
        if not column.combine_chunks().equals(own.combine_chunks()):
            yield Found(where, "source_id differs from meta/episodes")
    if subject.fps and "video_first_frame" in table.column_names:
        first = rows_of(table.column("video_first_frame"), 1)[:, 0]
        for camera in subject.videos:
            start = subject.numbers.get(f"videos/{camera}/from_timestamp")
            if start is None or len(start) != len(first):
                continue
            wrong = np.flatnonzero(~(np.abs(start * subject.fps - first) < 1e-3))
            if len(wrong):
                e = int(wrong[0])
                yield Found(
                    "meta/episodes",
                    f"episode {e}, {camera}: begins at frame {start[e] * subject.fps:.3f}, was written at {first[e]}",
                    problem="video-range",
                )


@check("segments", OWN)
def segments_lie_in_their_episodes(subject: Subject) -> Findings:
    path = subject.root / OWN_FOLDER / "segments.parquet"
    if not subject.ours or "length" not in subject.numbers:
        return
    table = subject.read_table(path)
    if table is None:
        where, why = subject.name_of(path), subject.broken[path]
        yield Found(where, why, problem="unreadable" if path.exists() else "missing-file")
        return
    episode, start, stop = (
        rows_of(table.column(name), 1)[:, 0] for name in ("episode_index", "start", "stop")
    )
    known = (episode >= 0) & (episode < len(subject))
    length = np.where(known, subject.lengths[np.where(known, episode, 0)], 0)
    wrong = np.flatnonzero(~known | (start < 0) | (stop <= start) | (stop > length))
    if len(wrong):
        row = int(wrong[0])
        yield Found(
            f"{subject.name_of(path)}, row {row}",
            f"frames {start[row]} to {stop[row]} of episode {episode[row]}, which has {length[row]}",
        )
    empty = [row for row, text in enumerate(table.column("text").to_pylist()) if not str(text or "").strip()]
    if empty:
        yield Found(f"{subject.name_of(path)}, row {empty[0]}", "a segment without words", WARN)


@check("sidecar", OWN, Level.SAMPLED)
def sidecar_columns_fit_the_rows(subject: Subject) -> Findings:
    """dpipe/columns holds the same rows as data/, file by file; floats are finite."""
    embodiment = (subject.manifest or {}).get("embodiment")
    declared = embodiment.get("sidecar") if isinstance(embodiment, dict) else None
    if not declared:
        return
    folder = subject.root / OWN_FOLDER / "columns"
    for place in filter(subject.concerns, subject.data_places):
        path = folder / place.path.relative_to(subject.root / "data")
        table = subject.read_table(path)
        if table is None:
            yield Found(
                subject.name_of(path), subject.broken[path], problem="" if path.exists() else "missing-file"
            )
            continue
        expected = int(subject.lengths[place.episodes].sum())
        if table.num_rows != expected:
            yield Found(subject.name_of(path), f"{table.num_rows} rows, its episodes have {expected}")
        for name, told in declared.items():
            if name not in table.column_names:
                yield Found(subject.name_of(path), f"no column '{name}'")
                continue
            values = rows_of(table.column(name), len(told["names"]))
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
                yield Found(
                    f"{subject.name_of(path)}, row {row}", f"'{name}' is not finite", problem="not-finite"
                )


@check("dropped", OWN)
def what_was_left_out_is_listed(subject: Subject) -> Findings:
    if not subject.ours or subject.manifest is None:
        return
    path = subject.root / OWN_FOLDER / "dropped.jsonl"
    lines = [line for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []
    told = subject.manifest.get("dropped", 0)
    if told != len(lines):
        yield Found(subject.name_of(path), f"{len(lines)} lines, the manifest counts {told}")
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line)
            whole = isinstance(entry, dict) and {"source_id", "reason"} <= set(entry)
        except ValueError:
            whole = False
        if not whole:
            yield Found(f"{subject.name_of(path)}, line {number + 1}", "no JSON with source_id and reason")


@check("card", OWN)
def the_card_names_the_data_files(subject: Subject) -> Findings:
    """Without it `datasets.load_dataset` trips over meta/ and dpipe/."""
    if not subject.ours:
        return
    path = subject.root / "README.md"
    text = path.read_text(errors="replace")[:8192] if path.is_file() else ""
    if "data_files: data/" not in text:
        yield Found("README.md", "its front matter does not name data/*/*.parquet")


@check("content", ALL, Level.SAMPLED)
def rows_are_those_that_were_converted(gathered: Gathered) -> Findings:
    """The digest recorded at conversion, against one computed from the rows."""
    subject = gathered.subject
    if subject is None or not subject.ours or len(gathered.content) != gathered.total:
        return
    if gathered.doubtful & {"action", "observation.state"}:
        return  # a column that cannot be read whole has been told
    path = subject.root / OWN_FOLDER / "episodes.parquet"
    table = subject.read_table(path)
    if table is None or "content" not in table.column_names or table.num_rows != len(subject):
        return
    recorded = table.column("content").to_pylist()
    found = zip(gathered.numbers, gathered.content, strict=True)
    wrong = [e for e, content in found if content and recorded[e] != content]
    if wrong:
        yield Found(f"episode {wrong[0]}", f"{len(wrong)} episodes hold other values than were converted")


# --- targets and shards -------------------------------------------------------------------------------------


@check("target", OWN)
def targets_are_whole(subject: Subject) -> Findings:
    base = subject.root / OWN_FOLDER / "targets"
    for folder in sorted(base.glob("*/*")) if base.is_dir() else []:
        if folder.is_dir() and not folder.name.startswith("."):
            yield from examine_target(folder, subject, Level.FAST)


@check("target-values", OWN, Level.SAMPLED)
def values_of_targets_make_sense(subject: Subject) -> Findings:
    base = subject.root / OWN_FOLDER / "targets"
    for folder in sorted(base.glob("*/*")) if base.is_dir() else []:
        if folder.is_dir() and not folder.name.startswith("."):
            yield from examine_target(folder, subject, subject.level, values=True)


@check("target-episodes", ALL, Level.SAMPLED)
def targets_are_bound_to_these_episodes(gathered: Gathered) -> Findings:
    subject = gathered.subject
    base = None if subject is None else subject.root / OWN_FOLDER / "targets"
    if subject is None or base is None or not base.is_dir() or not any(gathered.content):
        return
    for path in sorted(base.glob("*/*/episodes.parquet")):
        table = subject.read_table(path)
        if table is None or "content" not in table.column_names:
            continue
        bound = set(table.column("content").to_pylist())
        found = zip(gathered.numbers, gathered.content, strict=True)
        missing = [e for e, content in found if content not in bound]
        if missing:
            yield Found(
                subject.name_of(path.parent),
                f"{len(missing)} of {len(gathered.content)} episodes have no target, first episode {missing[0]}",
            )


def examine_target(folder: Path, subject: Subject | None, level: Level, values: bool = False) -> Findings:
    """One finished target: contract, index, arrays; with `values`, whether its numbers make sense."""
    where = subject.name_of(folder) if subject else str(folder)
    path = folder / "contract.json"
    if not path.is_file():
        if not values:
            yield Found(where, "no contract.json, which is written last: the stage was stopped", NOTE)
        return
    try:
        data = json.loads(path.read_text())
        contract = Contract.from_json(data["contract"])
        specs = [ArraySpec.from_json(spec) for spec in data["arrays"]]
    except (*EXPECTED, RecursionError) as error:
        if not values:
            problem = "refused" if "; refused" in str(error) else "target-contract"
            yield Found(f"{where}/contract.json", in_a_line(error), problem=problem)
        return
    if values:
        yield from _target_values(folder, where, specs, level)
        return
    if subject is not None:
        yield from _contract_fits(contract, subject, f"{where}/contract.json")
    if folder.parent.name != contract.stage:
        yield Found(f"{where}/contract.json", f"made by '{contract.stage}', filed as '{folder.parent.name}'")
    yield from _target_arrays(folder, where, specs)


def _contract_fits(contract: Contract, subject: Subject, where: str) -> Findings:
    if subject.fps and contract.fps and contract.fps != subject.fps:
        yield Found(
            where, f"made at {contract.fps} fps, the dataset has {subject.fps}", problem="target-contract"
        )
    seconds = contract.horizon_frames / contract.fps if contract.fps else 0.0
    if contract.horizon_seconds and abs(seconds - contract.horizon_seconds) > 1e-6:
        yield Found(
            where,
            f"a horizon of {contract.horizon_frames} frames and {contract.horizon_seconds:g} s at {contract.fps} fps",
            problem="target-contract",
        )
    known = {camera.rpartition(".")[2] for camera in subject.cameras} | set(subject.cameras) | {""}
    if contract.camera not in known and contract.camera.rpartition(".")[2] not in known:
        yield Found(
            where, f"made from camera '{contract.camera}', which is not here", problem="target-contract"
        )
    path = subject.root / OWN_FOLDER / "episodes.parquet"
    if not subject.ours or not path.is_file():
        return
    table = subject.read_table(path)
    if table is None or "content" not in table.column_names:
        return
    contents = [content or "" for content in table.column("content").to_pylist()]
    if contract.source and all(contents) and contract.source != contents_digest(contents):
        yield Found(where, "made from other episodes than the dataset holds now", problem="target-episodes")


def _target_index(folder: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(folder / "episodes.parquet").read().to_pydict()


def _target_arrays(folder: Path, where: str, specs: list[ArraySpec]) -> Findings:
    """The index places every episode inside arrays that are there, as large as they say, with sound indices."""
    from ...streams.arrays import open_array, read_spec

    try:
        index = _target_index(folder)
        count = len(index["content"])
        for axis in sorted({spec.axis for spec in specs if "compute" not in spec.attributes} | {"frame"}):
            _ = index[f"{axis}_start"], index[f"{axis}_rows"], index["frames"], index["part"], index["key"]
    except (*EXPECTED, DpipeError) as error:
        yield Found(f"{where}/episodes.parquet", in_a_line(error))
        return
    parts = sorted({(index["part"][e], index["key"][e]) for e in range(count)})
    for row, key in enumerate(index["key"]):
        if not str(key).isalnum():
            yield Found(f"{where}/episodes.parquet", f"row {row} names part {key!r:.80}", problem="refused")
            return
    for spec in specs:
        if "compute" in spec.attributes:
            continue  # made in the loader, nothing lies on disk
        for part, key in parts:
            name = f"{spec.name}/part-{int(part):05d}-{key}"
            try:
                own, rows = read_spec(folder / name)
                open_array(folder / name, verify=True)
            except (*EXPECTED, DpipeError) as error:
                yield Found(f"{where}/{name}", in_a_line(error))
                continue
            if (own.shape, own.dtype) != (spec.shape, spec.dtype):
                yield Found(
                    f"{where}/{name}",
                    f"rows are {own.dtype} {own.shape}, the contract says {spec.dtype} {spec.shape}",
                    problem="target-contract",
                )
            axis = spec.axis
            used = [
                index[f"{axis}_start"][e] + index[f"{axis}_rows"][e]
                for e in range(count)
                if (index["part"][e], index["key"][e]) == (part, key) and f"{axis}_start" in index
            ]
            if used and max(used) != rows:
                yield Found(f"{where}/{name}", f"{rows} rows, the index of episodes ends at {max(used)}")


def _target_values(folder: Path, where: str, specs: list[ArraySpec], level: Level) -> Findings:
    from ...streams.arrays import open_array

    for spec in specs:
        for path in sorted((folder / spec.name).glob("part-*")):
            try:
                array = open_array(path)
                rows = len(array) if level == Level.FULL else min(len(array), MOST_TARGET_ROWS)
                step = max(1, (64 << 20) // max(1, spec.row_bytes))
                for first in range(0, rows, step):
                    yield from _values_trouble(
                        spec, np.asarray(array[first : min(first + step, rows)]), first, where
                    )
            except (*EXPECTED, DataError):
                break  # `targets_are_whole` has said so


def _values_trouble(spec: ArraySpec, values: np.ndarray, first: int, where: str) -> Iterator[Found]:
    if spec.dtype == "bfloat16":
        bad = (values & 0x7F80) == 0x7F80
    elif values.dtype.kind == "f":
        bad = ~np.isfinite(values)
    else:
        bins = (
            spec.attributes.get("select", {}).get("N")
            if isinstance(spec.attributes.get("select"), dict)
            else None
        )
        if (
            values.dtype.kind not in "iu"
            or not str(bins or "").isdigit()
            or not spec.attributes.get("chunked")
        ):
            return
        reserved = np.iinfo(values.dtype).max
        bad = (values >= int(str(bins))) & (values != reserved)
    if bad.any():
        row = first + int(np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1))[0])
        what = "is not finite" if values.dtype.kind == "f" or spec.dtype == "bfloat16" else "is no bin it has"
        yield Found(f"{where}/{spec.name}, row {row}", f"a value {what}")


@check("shards", OWN)
def shards_are_whole(subject: Subject) -> Findings:
    base = subject.root / OWN_FOLDER / "shards"
    for folder in sorted(base.iterdir()) if base.is_dir() else []:
        if folder.is_dir() and not folder.name.startswith("."):
            yield from examine_shards(folder, subject, Level.FAST)


@check("shards", OWN, Level.SAMPLED)
def shards_hold_what_was_written(subject: Subject) -> Findings:
    """Digests of every shard file: one pass over their bytes."""
    base = subject.root / OWN_FOLDER / "shards"
    for folder in sorted(base.iterdir()) if base.is_dir() else []:
        if folder.is_dir() and (folder / "index.json").is_file():
            yield from examine_shards(folder, subject, Level.SAMPLED)


def examine_shards(folder: Path, subject: Subject | None, level: Level) -> Findings:
    from ...streams.shard_format import read_index

    where = subject.name_of(folder) if subject else str(folder)
    if not (folder / "index.json").is_file():
        if level == Level.FAST:
            yield Found(where, "no index.json, which is written last: the shards are unfinished", NOTE)
        return
    try:
        index = read_index(folder)
        files = [(str(part["file"]), int(part["bytes"]), str(part["digest"])) for part in index["parts"]]
        table = index["index"]
        files.append((str(table["file"]), -1, str(table["digest"])))
        source, frames = str(index["source"]), int(index["frames"])
        if level == Level.FAST and all((folder / name).is_file() for name, _, _ in files):
            _open_shards(folder)
    except (*EXPECTED, RecursionError) as error:
        if level == Level.FAST:
            refused = "refused" if "; refused" in str(error) else ""
            yield Found(f"{where}/index.json", in_a_line(error), problem=refused)
        return
    for name, size, digest in files:
        path = folder / name
        if not path.is_file():
            if level == Level.FAST:
                yield Found(f"{where}/{name}", "no such file")
        elif level == Level.FAST:
            if size >= 0 and path.stat().st_size != size:
                yield Found(f"{where}/{name}", f"{path.stat().st_size} bytes, expected {size}")
        elif file_digest(path) != digest:
            yield Found(f"{where}/{name}", "its bytes are not those that were written (xxh3-128 differs)")
    if level != Level.FAST or subject is None:
        return
    if "length" in subject.numbers and frames != int(subject.lengths.sum()):
        yield Found(f"{where}/index.json", f"{frames} frames, the dataset has {int(subject.lengths.sum())}")
    path = subject.root / OWN_FOLDER / "episodes.parquet"
    recorded = subject.read_table(path) if subject.ours and path.is_file() else None
    if recorded is not None and "content" in recorded.column_names:
        contents = [content or "" for content in recorded.column("content").to_pylist()]
        if all(contents) and contents_digest(contents) != source:
            yield Found(f"{where}/index.json", "made from other episodes than the dataset holds now")


def _open_shards(folder: Path) -> None:
    """Raises whatever a trainer would hear."""
    import pyarrow.parquet as pq

    from ...streams.rows import Fit
    from ...streams.shards import ShardRows

    rows = ShardRows(folder, Fit(None))
    for part in rows.index["parts"][:1]:
        stored = set(pq.ParquetFile(folder / part["file"]).schema_arrow.names)
        lost = sorted({*rows.columns(), *rows.cameras()} - stored)
        if lost:
            raise DataError(f"'{lost[0]}' is no column of {part['file']}")
    for name in rows.columns():
        rows.values([name], np.zeros(1, np.int64))
    rows.dataset()


def file_digest(path: Path) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
