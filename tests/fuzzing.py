"""Structure-aware fuzzing: files changed where their format has a field, and read as a user's would be.

A target is a sound tree, one file in it, a way to change that file, and the readers that then meet it. A case is
known by (target, seed, number) alone. Readers may refuse, with a message of ours; anything else is a find, and the
changed file is kept in tests/corpus/ to be read again by every test run. Helpers, not a test file.
"""

import io
import json
import pickle
import random
import struct
import tarfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from corruption import build, replace, target_file
from dpipe.pipeline.doctor import Level, examine
from dpipe.schemas.errors import DpipeError

Mutate = Callable[[bytes, random.Random], bytes]
CORPUS = Path(__file__).with_name("corpus")

ODD_NUMBERS = (0, 1, -1, 2, 7, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, -(2**63))
ODD_VALUES = (
    *(
        None,
        True,
        "",
        "x" * 70_000,
        "../../etc/passwd",
        "\0",
        "\ud7ff",
        "{chunk_index}",
        "nan",
        0,
        -1,
        2**31,
        2**70,
    ),
    *(1e308, -0.0, [], {}, [[[[]]]], {"a": {}}, [1, "2", None], [0] * 1000),
)


# --- ways to change a file ----------------------------------------------------------------------------------


def some_bytes(data: bytes, rng: random.Random) -> bytes:
    """The blunt way, mixed in everywhere: bytes changed, cut out, doubled, or the end lost."""
    if not data:
        return b"\0"
    value = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        at, size = rng.randrange(len(value)), rng.choice((1, 2, 4, 8))
        kind = rng.randrange(5)
        if kind == 0:
            value[at] = rng.randrange(256)
        elif kind == 1:
            number = rng.choice(ODD_NUMBERS) & (2 ** (8 * size) - 1)
            value[at : at + size] = number.to_bytes(size, rng.choice(("big", "little")))
        elif kind == 2:
            del value[at : at + rng.randrange(1, 64)]
        elif kind == 3:
            value[at:at] = value[at : at + rng.randrange(1, 64)]
        else:
            del value[at : len(value) if rng.random() < 0.2 else at + 1]
        if not value:
            return b""
    return bytes(value)


def json_values(data: bytes, rng: random.Random) -> bytes:
    """A value or a key somewhere in the tree replaced, removed or doubled."""
    tree = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        node, steps = tree, rng.randrange(1, 6)
        for _ in range(steps):
            below = node.values() if isinstance(node, dict) else node
            children = [value for value in below if isinstance(value, dict | list) and value]
            if not children or rng.random() < 0.3:
                break
            node = rng.choice(children)
        if isinstance(node, dict) and node:
            key = rng.choice(sorted(node))
            kind = rng.randrange(4)
            if kind == 0:
                del node[key]
            elif kind == 1:
                node[rng.choice(("", "x/y", "image", "a" * 300, key + "2"))] = node.pop(key)
            else:
                node[key] = rng.choice(ODD_VALUES)
        elif isinstance(node, list) and node:
            at = rng.randrange(len(node))
            node[at : at + 1] = rng.choice(([], [rng.choice(ODD_VALUES)], [node[at]] * 2))
        else:
            tree = rng.choice(ODD_VALUES)
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def parquet_table(data: bytes, rng: random.Random) -> bytes:
    """A column dropped, doubled, renamed, retyped, emptied, or with odd values; rows lost or repeated."""
    table = pq.ParquetFile(io.BytesIO(data)).read()
    for _ in range(rng.choice((1, 1, 2))):
        if not table.num_columns:
            break
        at = rng.randrange(table.num_columns)
        field, column = table.schema.field(at), table.column(at)
        kind = rng.randrange(8)
        if kind == 0:
            table = table.remove_column(at)
        elif kind == 1:
            table = table.set_column(at, rng.choice(("", "x/y", field.name + "2")), column)
        elif kind == 2:
            table = table.set_column(
                at, field.name, pa.nulls(table.num_rows, rng.choice((field.type, pa.null())))
            )
        elif kind == 3:
            odd = rng.choice(
                (pa.string(), pa.int8(), pa.float64(), pa.bool_(), pa.binary(), pa.list_(pa.int64()))
            )
            fill = {"string": "x", "binary": b"x", "bool": True}.get(
                str(odd), [] if "list" in str(odd) else 1
            )
            table = table.set_column(at, field.name, pa.array([fill] * table.num_rows, odd))
        elif kind == 4 and (pa.types.is_integer(field.type) or pa.types.is_floating(field.type)):
            values = column.to_pylist()
            if values:
                odd_floats = (*map(float, ODD_NUMBERS), float("nan"), float("inf"), -1e300)
                choices = odd_floats if pa.types.is_floating(field.type) else ODD_NUMBERS
                values[rng.randrange(len(values))] = rng.choice(choices)
            table = table.set_column(at, field, pa.array(values, field.type))
        elif kind == 5:
            table = table.slice(rng.randrange(table.num_rows + 1), rng.randrange(table.num_rows + 1))
        elif kind == 6:
            table = pa.concat_tables([table] * rng.choice((2, 3, 50)))
        else:
            table = table.append_column(field.name, column)  # two columns of one name
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def mp4_boxes(data: bytes, rng: random.Random) -> bytes:
    """A box's size, type or a field in it changed; a box lost or doubled."""
    value = bytearray(data)
    boxes = [i - 4 for i in range(4, len(data) - 4) if data[i : i + 4] in BOX_TYPES]
    if not boxes:
        return some_bytes(data, rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.choice(boxes)
        size = min(struct.unpack_from(">I", data, at)[0], len(data) - at)
        kind = rng.randrange(5)
        if kind == 0:
            struct.pack_into(">I", value, at, rng.choice(ODD_NUMBERS) & 0xFFFFFFFF)
        elif kind == 1:
            value[at + 4 : at + 8] = rng.choice((b"free", b"moof", b"mvex", b"\0\0\0\0", *BOX_TYPES))
        elif kind == 2 and size > 16:
            place = at + 8 + 4 * rng.randrange((size - 12) // 4)
            value[place : place + 4] = struct.pack(">I", rng.choice(ODD_NUMBERS) & 0xFFFFFFFF)
        elif kind == 3 and size > 8:
            value[at : at + 8] = b"\0\0\0\0free"
        else:
            return bytes(value[:at] + value[at : at + size] * 2 + value[at + size :])
        if len(value) < 64:
            break
    return bytes(value)


BOX_TYPES = (
    *(
        b"moov",
        b"trak",
        b"mdia",
        b"minf",
        b"stbl",
        b"stsd",
        b"stts",
        b"ctts",
        b"stss",
        b"stsc",
        b"stsz",
        b"stco",
    ),
    *(b"tkhd", b"mdhd", b"mvhd", b"hdlr", b"dref", b"elst", b"avc1", b"avcC", b"mdat", b"ftyp"),
)


def hdf5_tree(data: bytes, rng: random.Random) -> bytes:
    """A member replaced by another shape, type or kind; removed, linked elsewhere; an attribute made odd."""
    if rng.random() < 0.25:
        return some_bytes(data[:4096], rng) + data[4096:]
    file_bytes = io.BytesIO(data)
    with h5py.File(file_bytes, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        for _ in range(rng.choice((1, 1, 2))):
            name = rng.choice(sorted(names))
            if name not in file:
                continue
            kind = rng.randrange(7)
            if kind < 5:
                del file[name]
            if kind == 1:
                file.create_group(name)
            elif kind == 2:
                shape = rng.choice(((0,), (1,), (3, 4), (12, 7), (12, 3, 3), (2, 2, 2, 2), (), (0, 7)))
                dtype = rng.choice(("f4", "f8", "i1", "u1", "i8", "S3", "c16", "bool", "f2"))
                file.create_dataset(name, data=np.zeros(shape, dtype))
            elif kind == 3:
                file.create_dataset(
                    name, data=rng.choice(("text", b"bytes", 5, float("nan"), h5py.Empty("f4")))
                )
            elif kind == 4:
                links = (h5py.SoftLink("/nowhere"), h5py.SoftLink("/"), h5py.ExternalLink("x.h5", "/x"))
                file[name] = rng.choice(links)
            elif kind == 5 and isinstance(file[name], h5py.Dataset) and file[name].dtype.kind in "fiu":
                values = file[name][()]
                values[...] = np.asarray(rng.choice((0, 1, 200, -1))).astype(values.dtype)
                file[name][...] = values
            else:
                place = rng.choice((file, file[name]))
                attribute = rng.choice([*place.attrs, "task", "num_samples"])
                place.attrs[attribute] = rng.choice(
                    (-1, 2**40, "x" * 300, b"\xff\xfe", np.zeros(3), float("nan"))
                )
    return file_bytes.getvalue()


def npz_members(data: bytes, rng: random.Random) -> bytes:
    """A member of another shape or type, missing, twice, or pickled; else the zip's own fields."""
    if rng.random() < 0.4:
        return zip_fields(data, rng)
    with np.load(io.BytesIO(data)) as file:
        members = {name: file[name] for name in file.files}
    name = rng.choice(sorted(members))
    kind = rng.randrange(5)
    if kind == 0:
        del members[name]
    elif kind == 1:
        members[name] = members[name][..., :-1] if members[name].ndim else np.zeros(3)
    elif kind == 2:
        members[name] = members[name].astype(rng.choice(("f2", "i1", "c16", "U4", "bool")), casting="unsafe")
    elif kind == 3:
        members[name] = np.array([{"a": 1}, None], object)
    else:
        members[name] = np.full_like(members[name], rng.choice((0, 1, 200)))
    sink = io.BytesIO()
    np.savez_compressed(sink, **members)
    return sink.getvalue()


def zip_fields(data: bytes, rng: random.Random) -> bytes:
    """Sizes, offsets, methods, flags and names in the directory, the local headers and the end record."""
    value = bytearray(data)
    places = [
        i for sign in (b"PK\1\2", b"PK\3\4", b"PK\5\6") for i in range(len(data)) if data[i : i + 4] == sign
    ]
    if not places:
        return some_bytes(data, rng)
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.choice(places) + 4 + 2 * rng.randrange(20)
        size = rng.choice((2, 4))
        if at + size <= len(value):
            number = rng.choice((*ODD_NUMBERS, 8, 0xFFFF)) & (2 ** (8 * size) - 1)
            value[at : at + size] = number.to_bytes(size, "little")
    return bytes(value)


def pickled_tree(data: bytes, rng: random.Random) -> bytes:
    """CALVIN's annotations with odd values in their tree, or with opcodes changed."""
    if rng.random() < 0.4:
        head = data.index(b"\n") + 1
        return data[:head] + some_bytes(data[head:], rng)
    tree = np.load(io.BytesIO(data), allow_pickle=True).item()
    odd = rng.choice((*ODD_VALUES, np.zeros(3), np.array([None, {}], object), np.float64("nan"), (), b"x"))
    part = tree[rng.choice(sorted(tree))]
    kind = rng.randrange(3)
    if kind == 0:
        tree[rng.choice(("language", "info", "more"))] = odd
    elif kind == 1:
        part[rng.choice(sorted(part))] = odd
    else:
        values = part[rng.choice(sorted(part))]
        if isinstance(values, list) and values:
            values[rng.randrange(len(values))] = odd
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})
    return header.getvalue() + pickle.dumps(np.array(tree, object), rng.randrange(6))


def tar_headers(data: bytes, rng: random.Random) -> bytes:
    """A member's name, size or kind, checksums made right again; members cut, doubled or lost."""
    if rng.random() < 0.3:
        return some_bytes(data, rng)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = []
        for found in archive.getmembers():
            stream = archive.extractfile(found) if found.isreg() else None
            members.append((found, stream.read() if stream else b""))
    at = rng.randrange(len(members))
    member, content = members[at]
    kind = rng.randrange(5)
    if kind == 0:
        member.name = rng.choice(("../x", "/x", "", "a" * 300, member.name + "/x", "\ud800x", "648649"))
    elif kind == 1:
        member.type = rng.choice(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
        )
        member.linkname, content = "/etc/passwd", b""
    elif kind == 2:
        content = content[: rng.randrange(len(content) + 1)]
    elif kind == 3:
        members.append((member, some_bytes(content, rng)))
    else:
        del members[at]
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", errors="surrogateescape") as archive:
        for info, body in members:
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return sink.getvalue()


# --- readers ------------------------------------------------------------------------------------------------


def read_dataset(root: Path) -> None:
    """As a trainer would: columns and frames of every episode."""
    from dpipe.streams.dataset import open_dataset

    dataset = open_dataset(root)
    dataset.all_columns([name for name in dataset.vectors if dataset.features[name]["dtype"] != "string"])
    dataset.contents(recompute=True)
    for episode in range(min(len(dataset), 4)):
        dataset.episodes.tasks(episode)
        for camera in dataset.cameras:
            dataset.frames(episode, camera, 0, min(4, int(dataset.episodes.length[episode])))


def read_shards(root: Path) -> None:
    from dpipe.streams.health import Health
    from dpipe.streams.rows import Fit
    from dpipe.streams.shards import ShardRows

    (folder,) = (root / "dpipe/shards").iterdir()
    rows = ShardRows(folder, Fit((8, 8)))
    index = np.arange(min(8, int(rows.lengths.sum())))
    rows.values(rows.columns(), index)
    for camera in rows.cameras():
        rows.frames(camera, index, np.zeros((len(index), 8, 8, 3), np.uint8), Health())
    rows.dataset()


def read_target(root: Path) -> None:
    from dpipe.streams.targets import open_targets

    open_targets(root, ["tokens"], horizon=3).take(index=np.arange(4))


def read_raw(source: str) -> Callable[[Path], None]:
    def read(root: Path) -> None:
        from dpipe.converters import load_converter
        from dpipe.schemas.episode import EpisodeRef, VideoClip
        from dpipe.video.decode import open_video

        converter = load_converter(source)
        options = converter.Options()
        for recording in converter.find(root, options):
            for ref in converter.scan(recording, options):
                if not isinstance(ref, EpisodeRef):
                    continue
                try:
                    episode = converter.read(ref, options)
                    for camera in episode.cameras.values():
                        if isinstance(camera, VideoClip):
                            with open_video(camera.path, "auto", camera.offset, camera.size) as reader:
                                reader.read([0, len(reader) - 1])
                        else:
                            camera.read(0, min(4, len(camera)))
                except DpipeError:
                    continue

    return read


def ask_doctor(source: str | None = None) -> Callable[[Path], None]:
    return lambda root: (examine(root, Level.SAMPLED, source), None)[1]


@dataclass(frozen=True)
class Target:
    name: str
    base: str
    pattern: str
    mutate: Mutate
    readers: tuple[Callable[[Path], None], ...]


def _served(name: str, pattern: str, mutate: Mutate, *more: Callable[[Path], None]) -> Target:
    return Target(name, "served", pattern, mutate, (ask_doctor(), *(more or (read_dataset,))))


def _raw(name: str, source: str, pattern: str, mutate: Mutate) -> Target:
    return Target(name, f"raw {source}", pattern, mutate, (read_raw(source), ask_doctor(source)))


TARGETS = {
    target.name: target
    for target in (
        _raw("libero-hdf5", "libero", "**/*.hdf5", hdf5_tree),
        _raw("calvin-npz", "calvin", "**/episode_0000004.npz", npz_members),
        _raw("calvin-annotations", "calvin", "**/auto_lang_ann.npy", pickled_tree),
        _raw("calvin-index", "calvin", "**/ep_start_end_ids.npy", some_bytes),
        _raw("egodex-hdf5", "egodex", "**/0.hdf5", hdf5_tree),
        _raw("egodex-mp4", "egodex", "**/0.mp4", mp4_boxes),
        _raw("agibot-h5", "agibot", "proprio_stats/327/648650/*.h5", hdf5_tree),
        _raw("agibot-json", "agibot", "**/task_*.json", json_values),
        _raw("agibot-tar", "agibot", "observations/**/*.tar", tar_headers),
        _served("lerobot-info", "meta/info.json", json_values),
        _served("lerobot-stats", "meta/stats.json", json_values),
        _served("lerobot-tasks", "meta/tasks.parquet", parquet_table),
        _served("lerobot-episodes", "meta/episodes/*/*.parquet", parquet_table),
        _served("lerobot-data", "data/*/*.parquet", parquet_table),
        _served("lerobot-data-bytes", "data/*/*.parquet", some_bytes),
        _served("lerobot-mp4", "videos/*/chunk-000/file-000.mp4", mp4_boxes),
        _served("own-manifest", "dpipe/manifest.json", json_values),
        _served("own-episodes", "dpipe/episodes.parquet", parquet_table),
        _served("target-contract", "dpipe/targets/*/*/contract.json", json_values, read_target),
        _served("target-index", "dpipe/targets/*/*/episodes.parquet", parquet_table, read_target),
        _served("target-zarr", "dpipe/targets/*/*/tok*/part-*/zarr.json", json_values, read_target),
        _served("shard-json", "dpipe/shards/*/index.json", json_values, read_shards),
        _served("shard-index", "dpipe/shards/*/index.bin", some_bytes, read_shards),
        _served("shard-part", "dpipe/shards/*/part-*.parquet", some_bytes, read_shards),
    )
}


# --- one case -----------------------------------------------------------------------------------------------


def changed(target: Target, sound: bytes, seed: int, number: int) -> bytes:
    rng = random.Random(f"{target.name} {seed} {number}")
    try:
        return target.mutate(sound, rng)
    except (ValueError, TypeError, OverflowError, KeyError, OSError, pa.ArrowException, pickle.PicklingError):
        return some_bytes(sound, rng)  # the format cannot hold what was drawn


def trouble(target: Target, root: Path) -> str:
    """What a reader raises that is no message of ours; "" when all is well."""
    for reader in target.readers:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of numbers beyond float32, by design
                reader(root)
        except DpipeError:
            continue
        except Exception as error:  # noqa: BLE001 - whatever escapes is what is looked for
            place: Any = error.__traceback__
            while place.tb_next is not None:
                place = place.tb_next
            code = place.tb_frame.f_code
            return f"{type(error).__name__}: {error} in {Path(code.co_filename).name}:{code.co_name}"
    return ""


def run_case(target: Target, folder: Path, data: bytes) -> str:
    """Put a changed file into the sound tree, read it, put the sound one back."""
    root = build(folder, target.base)
    path = target_file(root, target.pattern)
    sound = path.read_bytes()
    replace(path, data)
    try:
        return trouble(target, root)
    finally:
        replace(path, sound)


def sound_file(target: Target, folder: Path) -> bytes:
    return target_file(build(folder, target.base), target.pattern).read_bytes()
