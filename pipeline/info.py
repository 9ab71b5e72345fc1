"""`dpipe info PATH`: what lies there, told from metadata alone, in less than half a second.

Datasets (v3.0, v2.1, ours unfinished), targets, shards, runs, checkpoints, Zarr trees, workspaces, raw recordings
and single files of them. Nothing is decoded, nothing unpickled, and of large files only their tables are read.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..schemas.errors import MALFORMED, DataError, DpipeError, UsageError

LISTED = 40  # entries of one file or tree
MOST_JSON = 64 << 20


@dataclass(frozen=True)
class Info:
    """What a path is, in one word or two, and what there is to say of it, in order."""

    path: Path
    kind: str
    rows: tuple[tuple[str, str], ...]
    next: str = ""  # a command worth typing

    def to_text(self) -> str:
        width = max((len(name) for name, _ in self.rows), default=0)
        lines = [f"{self.path}: {self.kind}"]
        lines += [f"  {name:{width}s}  {value}".rstrip() for name, value in self.rows]
        return "\n".join([*lines, *([f"  next: {self.next}"] if self.next else [])])

    def to_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "kind": self.kind, "facts": dict(self.rows), "next": self.next}


def describe(path: Path) -> Info:
    if not path.exists():
        raise UsageError(f"nothing at {path}")
    try:
        return _folder(path) if path.is_dir() else _file(path)
    except (*MALFORMED, zipfile.BadZipFile, struct.error) as error:
        words = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is damaged\n  found: {type(error).__name__}: {words}") from error


def _folder(path: Path) -> Info:
    for marker, tell in (
        ("meta/info.json", _dataset),
        ("contract.json", _target),
        ("index.json", _shards),
        ("config.json", _run),
        ("model.safetensors", _checkpoint),
        ("zarr.json", _zarr),
        (".zgroup", _zarr),
        (".zarray", _zarr),
    ):
        if (path / marker).is_file():
            found = tell(path)
            if found is not None:
                return found
    if (path / "dpipe" / "journal").is_dir():
        done = len(list((path / "dpipe" / "journal" / "parts").glob("part-*.parquet")))
        rows = (("parts done", str(done)),)
        return Info(
            path, "unfinished dataset", rows, "the same dpipe convert again; it goes on where it stopped"
        )
    if any((path / name).is_dir() for name in ("lerobot", "raw", "runs")) or (path / "dpipe.toml").is_file():
        return _workspace(path)
    return _raw(path)


# --- folders of ours and of lerobot ---------------------------------------------------------------------------


def _dataset(path: Path) -> Info:
    info = _json(path / "meta" / "info.json")
    own = path / "dpipe" / "manifest.json"
    manifest = _json(own) if own.is_file() else {}
    unfinished = (path / "dpipe" / "journal").is_dir() and not manifest
    version = str(info.get("codebase_version", "?"))
    fps, frames = info.get("fps") or 0, int(info.get("total_frames", 0))
    features: Mapping[str, Mapping[str, Any]] = info.get("features", {})
    rows = [
        ("episodes", f"{int(info.get('total_episodes', 0)):,}"),
        ("frames", f"{frames:,}" + (f", {_duration(frames / fps)} at {fps} fps" if fps else "")),
        ("robot", str(info.get("robot_type") or "not told")),
        ("instructions", f"{int(info.get('total_tasks', 0)):,}"),
        ("splits", ", ".join(f"{name} {span}" for name, span in (info.get("splits") or {}).items())),
    ]
    for name, told in features.items():
        shape = "x".join(map(str, told.get("shape", ())))
        if told.get("dtype") in ("video", "image"):
            codec = (told.get("info") or {}).get("video.codec", "")
            rows.append((name, f"{shape} {told['dtype']}{f', {codec}' if codec else ''}"))
        elif name not in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
            names = told.get("names")
            words = ", ".join(map(str, names)) if isinstance(names, list) else ""
            rows.append((name, _cut(f"{told.get('dtype')} [{shape}] {words}")))
    if manifest:
        totals = manifest.get("totals", {})
        rows.append(("source", f"{manifest.get('source')}, converter {manifest.get('converter_version')}"))
        if "made_from" in manifest:
            made = manifest["made_from"]
            rows.append(("made by", f"{made.get('command')} of {', '.join(made.get('datasets', []))}"))
        conventions = manifest.get("conventions", {})
        rows += [
            (name, _cut(str(conventions[name])))
            for name in ("action", "gripper_action")
            if name in conventions
        ]
        rows.append(("licence", str(manifest.get("licence") or "not told")))
        rows.append(("left out", f"{manifest.get('dropped', 0):,} recordings"))
        rows += [("size", _size(totals["bytes"]))] if "bytes" in totals else []
    for stage in sorted((path / "dpipe" / "targets").glob("*")):
        names = sorted(
            f.name + ("" if (f / "contract.json").is_file() else " (partial)") for f in stage.glob("*/")
        )
        rows += [(f"target {stage.name}", _cut(", ".join(names)))] if names else []
    shards = sorted(f.parent.name for f in (path / "dpipe" / "shards").glob("*/index.json"))
    rows += [("shards", ", ".join(shards))] if shards else []
    kind = f"LeRobot {version} dataset{', converted by dpipe' if manifest else ''}"
    if unfinished:
        kind += ", unfinished"
    step = "the same dpipe convert again" if unfinished else f"dpipe report {path}"
    if version.startswith("v2"):
        step = f"dpipe convert lerobot --raw {path} --to lerobot"
    return Info(path, kind, tuple(rows), step)


def _target(path: Path) -> Info | None:
    done = _json(path / "contract.json")
    if "contract" not in done:
        return None
    terms = done["contract"]
    rows = [
        ("stage", f"{terms['stage']}, variant {terms['variant']}"),
        ("dataset", str(done.get("dataset", ""))),
        ("episodes", f"{done.get('episodes', 0):,}"),
        ("frames", f"{done.get('frames', 0):,} at {terms['fps']} fps"),
        ("size", _size(done.get("bytes", 0))),
    ]
    for name in ("model", "weights", "layer", "camera", "normaliser", "augmentation"):
        rows += [(name, _cut(str(terms[name])))] if terms.get(name) else []
    if terms.get("horizon_frames"):
        rows.append(("horizon", f"{terms['horizon_frames']} frames, {terms['horizon_seconds']:g} s"))
    for spec in done.get("arrays", []):
        shape = "x".join(map(str, spec["shape"])) or "one number"
        rows.append((f"array {spec['name']}", f"{spec['dtype']} [{shape}] a {spec['axis']}"))
    rows += [
        (f"--{name}", _cut(str(value)))
        for name, value in terms.get("params", {}).items()
        if value not in ("", [])
    ]
    return Info(path, "target", tuple(rows))


def _shards(path: Path) -> Info | None:
    index = _json(path / "index.json")
    if "shards" not in index:
        return None
    rows = [
        (name, _cut(_plain(value)))
        for name, value in index.items()
        if name not in ("index", "parts", "arrays")
    ]
    size = sum(f.stat().st_size for f in path.glob("*.parquet"))
    files = len(list(path.glob("*.parquet")))
    return Info(path, "shards", (*rows, ("files", f"{files:,}, {_size(size)}")))


def _run(path: Path) -> Info | None:
    config = _json(path / "config.json")
    terms = config.get("terms")
    if not isinstance(terms, Mapping):
        return _checkpoint(path) if (path / "model.safetensors").is_file() else None
    rows = [("recipe", str(terms.get("recipe", path.parent.name)))]
    for name in ("dataset", "steps", "split"):
        rows += [(name, _cut(_plain(terms[name])))] if name in terms else []
    result = path / "result.json"
    if result.is_file():
        told = _json(result)
        rows.append(
            ("state", f"finished, {told['steps']:,} steps in {_duration(float(told.get('seconds', 0)))}")
        )
        rows += [(name, f"{value:.5g}") for name, value in told.get("metrics", {}).items()]
    else:
        rows.append(("state", "not finished; the same dpipe train goes on"))
        last = _last_line(path / "metrics.jsonl")
        rows += [(name, f"{value:.5g}") for name, value in last.items() if isinstance(value, int | float)]
    steps = sorted(folder.name for folder in (path / "checkpoints").glob("step-*"))
    rows.append(("checkpoints", ", ".join(steps[-4:]) or "none"))
    return Info(path, "run", tuple(rows), f"dpipe report {path}")


def _checkpoint(path: Path) -> Info:
    rows = list(_safetensors(path / "model.safetensors"))
    others = sorted(f.name for f in path.iterdir() if f.is_file() and f.name != "model.safetensors")
    return Info(path, "checkpoint", (*rows, ("beside it", ", ".join(others[:8]) or "nothing")))


def _workspace(path: Path) -> Info:
    rows = []
    for folder in sorted((path / "raw").glob("*/")):
        rows.append((f"raw {folder.name}", f"dpipe info {folder}"))
    for folder in sorted((path / "lerobot").glob("*/")):
        meta = folder / "meta" / "info.json"
        told = _json(meta) if meta.is_file() else {}
        words = (
            f"{told['total_episodes']:,} episodes, {told['total_frames']:,} frames" if told else "unfinished"
        )
        rows.append((f"dataset {folder.name}", words))
    for config in sorted((path / "runs").glob("*/*/config.json")):
        state = "finished" if (config.parent / "result.json").is_file() else "not finished"
        rows.append((f"run {config.parent.parent.name} {config.parent.name}", state))
    return Info(path, "workspace", tuple(rows), f"dpipe status --workspace {path}")


def _raw(path: Path) -> Info:
    """Recordings of a source, told by names; else what the folder holds."""
    found = find_recordings(path)
    inside = sorted(path.iterdir())
    if found is None:
        kinds: dict[str, int] = {}
        for entry in inside[:5000]:
            kind = "folders" if entry.is_dir() else entry.suffix or "files"
            kinds[kind] = kinds.get(kind, 0) + 1
        rows = [("holds", ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())) or "nothing")]
        return Info(
            path,
            "a folder of no kind dpipe knows",
            tuple(rows),
            f"dpipe convert {path}  drafts a map of HDF5 files",
        )
    source, names, more = found
    rows = [
        ("recordings", f"{len(names):,}{' or more' if more else ''}"),
        ("first", ", ".join(names[:3])),
    ]
    return Info(path, f"raw {source} recordings", tuple(rows), f"dpipe plan convert {source} --raw {path}")


def find_recordings(path: Path, most: int = 10_000) -> tuple[str, list[str], bool] | None:
    """(source, names of its recordings, whether there are more) of the source whose layout this is."""
    from ..converters import SOURCES, load_converter

    named = [name for name in SOURCES if name == path.name.lower()]
    for name in [*named, *(name for name in SOURCES if name not in named)]:
        try:
            converter = load_converter(name)
            names: list[str] = []
            for recording in converter.find(path, converter.Options()):
                if len(names) == most:
                    return name, names, True
                names.append(recording.name)
        except (DpipeError, OSError, ImportError, AttributeError):
            continue
        if names:
            return name, names, False
    return None


# --- Zarr -----------------------------------------------------------------------------------------------------


def _zarr(path: Path) -> Info:
    rows = list(_zarr_arrays(path, path))[:LISTED]
    form = "3" if (path / "zarr.json").is_file() else "2"
    single = len(rows) == 1 and rows[0][0] == "."
    return Info(path, f"Zarr format {form} {'array' if single else 'tree'}", tuple(rows))


def _zarr_arrays(root: Path, path: Path) -> Iterator[tuple[str, str]]:
    name = path.relative_to(root).as_posix()
    if (path / "zarr.json").is_file():
        told = _json(path / "zarr.json")
        if told.get("node_type") == "array":
            yield name, f"{told['data_type']} {told['shape']}"
            return
    elif (path / ".zarray").is_file():
        told = _json(path / ".zarray")
        yield name, f"{told['dtype']} {told['shape']} in chunks of {told['chunks']}"
        return
    for child in sorted(path.iterdir()):
        if child.is_dir() and any((child / m).is_file() for m in ("zarr.json", ".zarray", ".zgroup")):
            yield from _zarr_arrays(root, child)


# --- single files ---------------------------------------------------------------------------------------------


def _file(path: Path) -> Info:
    with open(path, "rb") as file:
        head = file.read(16)
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return Info(path, "HDF5 file", tuple(_hdf5(path)), f"dpipe convert {path.parent}  drafts a map of it")
    if head[4:8] == b"ftyp":
        return Info(path, "MP4 video", tuple(_mp4(path)))
    if head.startswith(b"PAR1"):
        return Info(path, "Parquet file", tuple(_parquet(path)))
    if head.startswith(b"PK\x03\x04"):
        return Info(path, "NumPy archive" if path.suffix == ".npz" else "zip archive", tuple(_zip(path)))
    if head.startswith(b"\x93NUMPY"):
        with open(path, "rb") as file:
            return Info(path, "NumPy array", (("array", _npy(file)),))
    kinds: dict[str, tuple[str, Callable[[Path], Iterator[tuple[str, str]]]]] = {
        ".safetensors": ("weights", _safetensors),
        ".json": ("JSON", _json_rows),
        ".jsonl": ("JSON lines", _jsonl),
        ".tar": ("tar archive", _tar),
    }
    if path.suffix in kinds:
        kind, tell = kinds[path.suffix]
        return Info(path, kind, tuple(tell(path)))
    if head[:1] == b"\x80" or path.suffix in (".pkl", ".pickle", ".pt", ".pth"):
        rows = (
            ("size", _size(path.stat().st_size)),
            ("contents", "not looked at: a pickle runs code when opened"),
        )
        return Info(path, "pickle", rows)
    return Info(path, f"{path.suffix or 'a'} file", (("size", _size(path.stat().st_size)),))


def _hdf5(path: Path) -> Iterator[tuple[str, str]]:
    """Groups and datasets in the order of the file, alike neighbours counted, attributes of the root."""
    import h5py

    with h5py.File(path, "r") as file:
        for name, value in list(file.attrs.items())[:8]:
            yield f"@{name}", _cut(str(value))
        yield from list(_hdf5_group(file, "", 0))[:LISTED]


def _hdf5_group(group: Any, prefix: str, depth: int) -> Iterator[tuple[str, str]]:
    import h5py

    names = list(group)
    shown = names if len(names) <= 12 else names[:2]
    for name in shown:
        item = group.get(name)
        place = f"{prefix}{name}"
        if isinstance(item, h5py.Dataset):
            yield place, f"{item.dtype} {list(item.shape)}"
        elif isinstance(item, h5py.Group):
            yield f"{place}/", f"{len(item)} entries"
            if depth < 4:
                yield from _hdf5_group(item, f"{place}/", depth + 1)
    if len(shown) < len(names):
        yield f"{prefix}...", f"{len(names) - len(shown)} more, to {names[-1]}"


def _mp4(path: Path) -> Iterator[tuple[str, str]]:
    from ..video.mp4 import copy_problem, read_table

    table = read_table(path)
    fps = table.fps
    yield "codec", table.codec
    yield "pictures", f"{table.width} x {table.height}"
    yield "frames", f"{len(table.shown):,}" + (f", {_duration(len(table.shown) / float(fps))}" if fps else "")
    yield "fps", f"{float(fps):g}" if fps else "varies"
    yield "key frames", f"one in {table.keyframe_interval}"
    yield "size", _size(path.stat().st_size)
    if fps and fps.denominator == 1:
        yield "copied", copy_problem(table, int(fps)) or "packet by packet, without encoding"


def _parquet(path: Path) -> Iterator[tuple[str, str]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        told = file.metadata
        yield "rows", f"{told.num_rows:,} in {told.num_row_groups:,} row groups"
        fields = list(file.schema_arrow)
        for item in fields[:LISTED]:
            yield item.name, str(item.type)
        if len(fields) > LISTED:
            yield "...", f"{len(fields) - LISTED} more columns"
        yield "size", _size(path.stat().st_size)


def _zip(path: Path) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for member in members[:LISTED]:
            if member.filename.endswith(".npy"):
                with archive.open(member) as file:
                    yield member.filename.removesuffix(".npy"), _npy(file)
            else:
                yield member.filename, _size(member.file_size)
        if len(members) > LISTED:
            yield "...", f"{len(members) - LISTED:,} more"


def _npy(file: Any) -> str:
    """Type and shape from the head of an array; its values are not read."""
    from numpy.lib import format as npy

    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(file)
    return f"{'pickled objects' if dtype.hasobject else dtype} {list(shape)}"


def _safetensors(path: Path) -> Iterator[tuple[str, str]]:
    """The header alone: 8 bytes of its length, then JSON."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MOST_JSON:
            raise DataError(f"{path}: its header claims {length} bytes; refused")
        header = json.loads(file.read(length))
    told = {name: each for name, each in header.items() if name != "__metadata__"}
    count = sum(_product(each["shape"]) for each in told.values())
    kinds = sorted({each["dtype"] for each in told.values()})
    yield "tensors", f"{len(told):,}, {count:,} numbers of {', '.join(kinds)}"
    yield "size", _size(path.stat().st_size)
    groups: dict[str, int] = {}
    for name, each in told.items():
        head = ".".join(name.split(".")[:2])
        groups[head] = groups.get(head, 0) + _product(each["shape"])
    for name, numbers in sorted(groups.items(), key=lambda item: -item[1])[:12]:
        yield name, f"{numbers:,}"


def _json_rows(path: Path) -> Iterator[tuple[str, str]]:
    found = _any_json(path)
    if isinstance(found, Mapping):
        for name, value in list(found.items())[:LISTED]:
            yield str(name), _cut(_plain(value))
    else:
        yield "entries", f"{len(found):,}" if isinstance(found, list) else _cut(str(found))


def _jsonl(path: Path) -> Iterator[tuple[str, str]]:
    with open(path, "rb") as file:
        first = file.readline(1 << 20)
    yield "size", _size(path.stat().st_size)
    yield "first line", _cut(first.decode(errors="replace").strip())


def _tar(path: Path) -> Iterator[tuple[str, str]]:
    import tarfile

    with tarfile.open(path, "r:") as archive:
        for _ in range(LISTED):
            member = archive.next()
            if member is None:
                return
            yield member.name, _size(member.size)
    yield "...", "and more"


# --- words ----------------------------------------------------------------------------------------------------


def _json(path: Path) -> dict[str, Any]:
    found = _any_json(path)
    if not isinstance(found, dict):
        raise DataError(f"{path} is {type(found).__name__}, expected an object")
    return found


def _any_json(path: Path) -> Any:
    if path.stat().st_size > MOST_JSON:
        raise DataError(f"{path} is JSON of {_size(path.stat().st_size)}; too large to look at")
    return json.loads(path.read_text(encoding="utf-8"))


def _last_line(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            return json.loads(line)
        except ValueError:
            continue
    return {}


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)


def _cut(text: str, most: int = 100) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[: most - 3] + "..."


def _product(shape: list[int]) -> int:
    count = 1
    for n in shape:
        count *= int(n)
    return count


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.5:
            return f"{count:.3g} {unit}"
    return f"{count / 1000:.3g} TB"
