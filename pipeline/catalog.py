"""The catalogue: every episode of a raw folder, checked but for its pixels, remembered between runs.

Scans run as tasks; a recording whose files kept size and time is not opened again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..converters import Converter, load_converter
from ..schemas.episode import Dropped, EpisodeRef, Recording, Segment
from ..schemas.errors import DataError, UsageError
from ..schemas.features import CameraFeature
from .execute import Executor, Failure
from .payload import file_memo
from .progress import Progress


@dataclass
class Catalog:
    """Episodes in the order of their source, and those that cannot be converted."""

    refs: list[EpisodeRef] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    recordings: int = 0
    fresh: bool = False  # something was scanned now rather than remembered
    memory: Callable[[], str] = str  # the JSON lines a next run may remember

    @property
    def variants(self) -> list[str]:
        """Feature sets in the order met; each becomes a dataset of its own."""
        return list(dict.fromkeys(ref.variant for ref in self.refs))

    def of(self, variant: str) -> Catalog:
        """One variant's episodes, and what was left out before its variant was known."""
        refs = [ref for ref in self.refs if ref.variant == variant]
        dropped = [d for d in self.dropped if d.variant in ("", variant)]
        return Catalog(refs, dropped, self.recordings, self.fresh, self.memory)


def scan_recording(source: str, recording: Recording, options: Any) -> list[EpisodeRef | Dropped]:
    """One scan task."""
    return list(load_converter(source).scan(recording, options))


def build_catalog(
    converter: Converter,
    raw: Path,
    options: Any,
    cache: Path | None,
    executor: Executor,
    progress: Progress,
) -> Catalog:
    """Find and scan; `cache` is the JSON-lines file of earlier scans, the catalogue's `memory` the next one."""
    if not raw.is_dir() and not raw.is_file():
        raise missing_raw(converter, raw)
    recordings = list(converter.find(raw, options))
    if not recordings:
        raise missing_raw(converter, raw)
    # Options and version may change what a scan finds (pairing, cut): part of what the memory is good for.
    setting = json.dumps([converter.name, converter.version, asdict(options)], sort_keys=True, default=str)
    remembered = _load(cache, raw, setting)
    memos = {recording.name: file_memo(recording.files) for recording in recordings}
    results: dict[str, list[EpisodeRef | Dropped]] = {}
    todo: list[Recording] = []
    for recording in recordings:
        known = remembered.get(recording.name)
        if known is not None and known[0] == memos[recording.name]:
            results[recording.name] = known[1]
        else:
            todo.append(recording)
    progress.begin("scan", len(todo), "recordings")
    by_name = {recording.name: recording for recording in todo}
    for recording in todo:
        executor.submit(recording.name, scan_recording, converter.address, recording, options)
    for name, outcome in executor.results():
        if isinstance(outcome, Failure):
            files = tuple(path.name for path in by_name[name].files)
            outcome = [
                Dropped(name, files, outcome.message, "look at this file, or report it", by_name[name].split)
            ]
        results[name] = list(outcome)
        progress.advance()
    progress.end()
    catalog = Catalog(
        recordings=len(recordings),
        fresh=bool(todo or set(remembered) - set(results)),
        memory=lambda: _memory(raw, setting, recordings, memos, results),
    )
    for recording in recordings:
        for entry in results[recording.name]:
            (catalog.refs if isinstance(entry, EpisodeRef) else catalog.dropped).append(entry)  # type: ignore[arg-type]
    _check_unique(catalog.refs)
    return catalog


def missing_raw(converter: Converter, raw: Path) -> DataError:
    from ..samples import SAMPLERS

    state = "the folder is not there" if not raw.exists() else "nothing in it looks like one"
    sample = f", or make some:  dpipe sample {converter.name}" if converter.name in SAMPLERS else ""
    return DataError(
        f"no {converter.name} recordings in {raw}: {state}\n"
        f"  expected: {converter.expects}\n"
        f"  next: put them there, or name their folder with --raw or in dpipe.toml{sample}"
    )


def select(refs: Sequence[EpisodeRef], where: str | None, limit: int | None) -> list[EpisodeRef]:
    """Episodes that meet an SQL condition over the catalogue, then the first `limit` of them."""
    chosen = list(refs)
    if where:
        import duckdb
        import pyarrow as pa

        rows = [
            {
                "row": row,
                "source_id": ref.source_id,
                "split": ref.split,
                "frames": ref.frames,
                "instruction": ref.instruction,
                "variant": ref.variant,
                **{k: v for k, v in ref.metadata.items() if isinstance(v, str | int | float | bool)},
            }
            for row, ref in enumerate(refs)
        ]
        episodes = pa.Table.from_pylist(rows)
        try:
            connection = duckdb.connect(config={"enable_external_access": False})
            connection.register("episodes", episodes)
            found = connection.execute(f"SELECT row FROM episodes WHERE {where} ORDER BY row").fetchall()
        except duckdb.Error as error:
            raise UsageError(
                f"--where cannot be evaluated: {str(error).splitlines()[0]}\n"
                f"  columns: {', '.join(n for n in episodes.column_names if n != 'row')}"
            ) from error
        chosen = [refs[row] for (row,) in found]
    return chosen if limit is None else chosen[:limit]


def ref_to_json(ref: EpisodeRef | Dropped, raw: Path) -> dict[str, Any]:
    if isinstance(ref, Dropped):
        return {"dropped": ref.to_json()}
    value = asdict(ref)
    value["files"] = [_relative(path, raw) for path in ref.files]
    return value


def ref_from_json(value: dict[str, Any], raw: Path) -> EpisodeRef | Dropped:
    if "dropped" in value:
        fact = value["dropped"]
        return Dropped(**fact | {"files": tuple(fact["files"])})
    value = dict(value)
    value["files"] = tuple(raw / name for name in value["files"])
    value["cameras"] = tuple(CameraFeature(**camera) for camera in value["cameras"])
    value["segments"] = tuple(Segment(**segment) for segment in value["segments"])
    value["warnings"] = tuple(value["warnings"])
    return EpisodeRef(**value)


def _relative(path: Path, raw: Path) -> str:
    return path.relative_to(raw).as_posix() if path.is_relative_to(raw) else path.as_posix()


def _load(
    cache: Path | None, raw: Path, setting: str
) -> dict[str, tuple[list[list[int]], list[EpisodeRef | Dropped]]]:
    """Remembered scans by recording; a torn or foreign cache is as good as none."""
    if cache is None or not cache.is_file():
        return {}
    remembered: dict[str, tuple[list[list[int]], list[EpisodeRef | Dropped]]] = {}
    try:
        with open(cache, encoding="utf-8") as file:
            if json.loads(next(file)) != {"setting": setting, "raw": str(raw)}:
                return {}
            for line in file:
                entry = json.loads(line)
                refs = [ref_from_json(value, raw) for value in entry["entries"]]
                remembered[entry["recording"]] = (entry["memo"], refs)
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return {}
    return remembered


def _memory(
    raw: Path,
    setting: str,
    recordings: Iterable[Recording],
    memos: dict[str, list[list[int]]],
    results: dict[str, list[EpisodeRef | Dropped]],
) -> str:
    lines = [json.dumps({"setting": setting, "raw": str(raw)})]
    for recording in recordings:
        entry = {
            "recording": recording.name,
            "memo": memos[recording.name],
            "entries": [ref_to_json(ref, raw) for ref in results[recording.name]],
        }
        lines.append(json.dumps(entry, ensure_ascii=False))
    return "\n".join(lines) + "\n"


def _check_unique(refs: Sequence[EpisodeRef]) -> None:
    seen: set[str] = set()
    for ref in refs:
        if ref.source_id in seen:
            raise DataError(
                f"two recordings carry the same name '{ref.source_id}'\n"
                f"  next: rename one of the files, or convert their folders separately with --raw and --name"
            )
        seen.add(ref.source_id)
