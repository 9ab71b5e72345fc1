"""Per-frame arrays on disk: Zarr v3, one shard per array, written in one pass and read by memory map.

    <array>/zarr.json   shape [T, ...], little-endian, one shard covers everything (Zarr v3 sharding codec)
    <array>/c.0.0...    the shard: inner chunks of a few whole rows in order, then the index
                        (offset and size of each, uint64) and the index's crc32c

Keys are joined by dots: nested folders would be the larger part of the work of making a small array.

Because the inner chunks cover all trailing dimensions and stand in order, the body of an uncompressed shard
is the array itself in C order: a row is one positioned read, and a memory map needs no library. The last
chunk is padded with zeros, as Zarr wants it. With `level` each inner chunk is compressed with zstd; rows then
cost a decompression, and any Zarr reader still opens them.

bfloat16, which numpy has not, is stored as uint16 with the attribute `dpipe_dtype`.

Specification: zarr-specs v3.0 (core, codecs: bytes, zstd, sharding_indexed, crc32c).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.contract import BFLOAT16, ArraySpec
from ..schemas.errors import DataError, malformed_as

# Inner chunks hold at least one row and about this many bytes: small enough that any Zarr reader touches
# little more than the rows it wants, large enough that the index stays below a thousandth of the data.
CHUNK_BYTES = 64 * 1024
SYNC_BYTES = 128 * 2**20

_DTYPES = frozenset(
    [
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "float32",
        "float64",
    ]
)
REMAKE = "Precompute the target again."
_NO_CHUNK = 2**64 - 1  # offset and size of an inner chunk that holds only the fill value


class ArrayWriter:
    """Appends rows to one array in bounded memory; nothing has the final name before `close`.

    The folder appears whole: written under a temporary name, synced, renamed. Leaving the `with` block by an
    exception removes the temporary folder. `digest` (xxh3-128 of the shard) is known after `close`. Without
    `durable` nothing is synced: for many small arrays whose owner syncs once and checks digests before that.
    """

    def __init__(self, path: Path, spec: ArraySpec, level: int | None = None, durable: bool = True):
        import xxhash

        if str(spec.stored) not in _DTYPES:
            raise ValueError(f"array '{spec.name}': no Zarr v3 core type for {spec.dtype}")
        self.path, self.spec, self.level, self.durable = path, spec, level, durable
        self._hash = xxhash.xxh3_128()
        self.rows = 0
        self._unsynced = 0
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        self._shard = shard_of(self._temporary, 1 + len(spec.shape))
        self._file = open(self._shard, "wb")  # noqa: SIM115 - closed by close() or abort()
        # Compressed chunks must be cut as they come; uncompressed ones are only counted at the end.
        self._chunk_rows = max(1, CHUNK_BYTES // max(1, spec.row_bytes))
        self._waiting: list[NDArray[Any]] = []
        self._waiting_rows = 0
        self._sizes: list[int] = []

    def append(self, rows: NDArray[Any]) -> None:
        """Rows [n, ...] in the array's own dtype: nothing is cast. bfloat16 takes its uint16 bits."""
        if rows.shape[1:] != self.spec.shape or rows.dtype != self.spec.stored:
            raise ValueError(
                f"array '{self.spec.name}' takes rows {self.spec.shape} of {self.spec.stored}, "
                f"not {rows.shape[1:]} of {rows.dtype}"
            )
        self.rows += len(rows)
        little = np.ascontiguousarray(rows, dtype=self.spec.stored.newbyteorder("<"))
        if self.level is None:
            self._write(little.data if little.size else b"")
            return
        # A copy, because compressing waits for whole chunks and the caller may reuse its buffer.
        self._waiting.append(little.copy())
        self._waiting_rows += len(rows)
        if self._waiting_rows >= self._chunk_rows:
            self._compress(whole_chunks_only=True)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def _write(self, data: Any) -> None:
        self._hash.update(data)
        self._file.write(data)
        if self.durable:
            # Hand what was written to the disk now and then, so that `close` finds little left to wait for.
            self._unsynced += len(data) if isinstance(data, bytes) else data.nbytes
            if self._unsynced >= SYNC_BYTES:
                self._file.flush()
                os.fdatasync(self._file.fileno())
                self._unsynced = 0

    def close(self) -> Path:
        """Write index and metadata, make them durable, give the array its name."""
        if self.level is not None:
            if not self._sizes:
                self._chunk_rows = max(1, min(self._chunk_rows, self.rows))
            self._compress(whole_chunks_only=False)
        else:
            self._chunk_rows = max(1, min(self._chunk_rows, self.rows))
            padding = -self.rows % self._chunk_rows
            self._write(bytes(padding * self.spec.row_bytes))
            chunk = self._chunk_rows * self.spec.row_bytes
            self._sizes = [chunk] * ((self.rows + padding) // self._chunk_rows)
        if self.rows and self.spec.row_bytes:
            self._write(_index_bytes(self._sizes))
        self._file.flush()
        if self.durable:
            os.fsync(self._file.fileno())
        self._file.close()
        if not (self.rows and self.spec.row_bytes):
            self._shard.unlink()  # an array without elements has no chunks
        _write_text(self._temporary / "zarr.json", json.dumps(self._metadata()), self.durable)
        if self.durable:
            _sync_folder(self._temporary)
        self._temporary.rename(self.path)
        if self.durable:
            _sync_folder(self.path.parent)
        return self.path

    def abort(self) -> None:
        self._file.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _compress(self, whole_chunks_only: bool) -> None:
        from numcodecs.zstd import Zstd

        if not self._waiting:
            return
        codec = Zstd(level=self.level)
        rows = np.concatenate(self._waiting)
        step = self._chunk_rows
        stop = len(rows) // step * step if whole_chunks_only else len(rows)
        for start in range(0, stop, step):
            chunk = rows[start : start + step]
            if len(chunk) < step:
                chunk = np.concatenate([chunk, np.zeros((step - len(chunk), *chunk.shape[1:]), chunk.dtype)])
            packed = codec.encode(np.ascontiguousarray(chunk))
            self._write(packed)
            self._sizes.append(len(packed))
        self._waiting = [rows[stop:]] if stop < len(rows) else []
        self._waiting_rows = len(rows) - stop

    def _metadata(self) -> dict[str, Any]:
        spec = self.spec
        inner: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
        if self.level is not None:
            inner.append({"name": "zstd", "configuration": {"level": self.level, "checksum": False}})
        padded = max(1, math.ceil(self.rows / self._chunk_rows)) * self._chunk_rows
        attributes = dict(spec.attributes)
        if spec.dtype == BFLOAT16:
            attributes["dpipe_dtype"] = BFLOAT16
        axes = spec.axes or tuple(f"axis_{i + 1}" for i in range(len(spec.shape)))
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [self.rows, *spec.shape],
            "data_type": str(spec.stored),
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [padded, *spec.shape]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": False if spec.stored.kind == "b" else 0,
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": [self._chunk_rows, *spec.shape],
                        "codecs": inner,
                        "index_codecs": [
                            {"name": "bytes", "configuration": {"endian": "little"}},
                            {"name": "crc32c"},
                        ],
                        "index_location": "end",
                    },
                }
            ],
            "attributes": attributes,
            "dimension_names": [spec.axis, *axes],
        }


def write_array(path: Path, spec: ArraySpec, values: NDArray[Any], level: int | None = None) -> Path:
    """A whole array [T, ...] at once."""
    with ArrayWriter(path, spec, level) as writer:
        writer.append(values)
    return path


def write_group(path: Path, attributes: Mapping[str, Any]) -> None:
    """A Zarr group's metadata, so that a folder of arrays opens as one tree."""
    path.mkdir(parents=True, exist_ok=True)
    group = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}
    temporary = path / f".zarr.json.{os.getpid()}.tmp"
    _write_text(temporary, json.dumps(group, indent=1), durable=True)
    temporary.replace(path / "zarr.json")
    _sync_folder(path)


def read_spec(path: Path) -> tuple[ArraySpec, int]:
    """An array's spec and its number of rows, from its metadata alone."""
    with malformed_as(path / "zarr.json", REMAKE):
        data = _metadata_of(path)
        dtype = data["attributes"].get("dpipe_dtype", data["data_type"])
        axis, *axes = data["dimension_names"]
        spec = ArraySpec(path.name, tuple(data["shape"][1:]), dtype, tuple(axes), data["attributes"], axis)
        return spec, int(data["shape"][0])


def shard_of(path: Path, dims: int) -> Path:
    """The one file that holds the rows of an array of so many dimensions."""
    return path / ".".join(["c", *["0"] * dims])


def open_array(path: Path, verify: bool = False) -> NDArray[Any] | CompressedRows:
    """The array [T, ...] as a read-only memory map, or rows decompressed on demand where it is compressed.

    A file shorter or longer than its metadata promises is refused; `verify` also checks the index's crc32c.
    bfloat16 comes as its uint16 bits (`schemas/bfloat16.py`).
    """
    with malformed_as(f"array {path}", REMAKE):
        return _open_array(path, verify)


def _open_array(path: Path, verify: bool) -> NDArray[Any] | CompressedRows:
    data = _metadata_of(path)
    shape = tuple(int(n) for n in data["shape"])
    if data["data_type"] not in _DTYPES or min(shape, default=-1) < 0:
        raise DataError(f"array {path}: {data['data_type']} {shape}\n  {REMAKE}")
    dtype = np.dtype(data["data_type"]).newbyteorder("<")
    sharding = data["codecs"][0]["configuration"]
    chunk_rows = int(sharding["chunk_shape"][0])
    shard_rows = int(data["chunk_grid"]["configuration"]["chunk_shape"][0])
    if chunk_rows < 1 or shard_rows < 1:
        raise DataError(f"array {path}: chunks of {chunk_rows} rows in shards of {shard_rows}\n  {REMAKE}")
    chunks = shard_rows // chunk_rows
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    shard = shard_of(path, len(shape))
    index_bytes = 16 * chunks + 4
    size = _size_of(shard)
    compressed = len(sharding["codecs"]) > 1
    body = chunks * chunk_rows * math.prod(shape[1:]) * dtype.itemsize
    if (
        size < index_bytes
        or shape[0] > chunks * chunk_rows
        or (not compressed and size != body + index_bytes)
    ):
        raise DataError(
            f"array {path} is incomplete: {size} bytes, expected "
            f"{'at least ' if compressed else ''}{index_bytes if compressed else body + index_bytes}\n"
            "  Precompute the target again; the same command goes on from what is sound."
        )
    if compressed or verify:
        index = _read_index(shard, chunks, verify)
        if compressed:
            return CompressedRows(shard, shape, dtype, chunk_rows, index)
    mapped = np.memmap(shard, dtype=dtype, mode="r", shape=shape)
    # A plain array over the map: indexing a np.memmap costs several microseconds a row.
    return mapped.view(np.ndarray)


class CompressedRows:
    """Rows of a compressed shard: only the inner chunks asked for are read and decompressed."""

    def __init__(
        self,
        shard: Path,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        chunk_rows: int,
        index: NDArray[np.uint64],
    ):
        self.shape, self.dtype = shape, dtype
        self._shard, self._chunk_rows, self._index = shard, chunk_rows, index

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        if isinstance(rows, slice):
            wanted = np.arange(*rows.indices(len(self)))
        else:
            wanted = np.asarray(rows)
            if wanted.dtype == bool:
                wanted = np.flatnonzero(wanted)
            if ((wanted < -len(self)) | (wanted >= len(self))).any():
                raise IndexError(f"row beyond an array of {len(self)}")
            wanted = np.where(wanted < 0, wanted + len(self), wanted)
        flat = wanted.reshape(-1)
        result = np.empty((len(flat), *self.shape[1:]), self.dtype)
        chunk_of = flat // self._chunk_rows
        for chunk in np.unique(chunk_of):
            here = chunk_of == chunk
            result[here] = self._chunk(int(chunk))[flat[here] % self._chunk_rows]
        return result.reshape((*wanted.shape, *self.shape[1:]))

    def _chunk(self, chunk: int) -> NDArray[Any]:
        from numcodecs.zstd import Zstd

        offset, size = int(self._index[chunk, 0]), int(self._index[chunk, 1])
        plain = np.empty((self._chunk_rows, *self.shape[1:]), self.dtype)
        with open(self._shard, "rb") as file:
            if offset + size > os.fstat(file.fileno()).st_size:
                raise DataError(f"{self._shard}: its index names bytes beyond its end\n  {REMAKE}")
            file.seek(offset)
            packed = file.read(size)
        try:
            # Into room of the size it must have: what the bytes claim to unpack to is not believed.
            Zstd().decode(packed, plain.view(np.uint8).reshape(-1))
        except (RuntimeError, ValueError) as error:
            raise DataError(f"{self._shard}: chunk {chunk} is damaged: {error}\n  {REMAKE}") from error
        return plain


def _index_bytes(sizes: Sequence[int]) -> bytes:
    import google_crc32c

    stops = np.cumsum(sizes, dtype=np.uint64)
    index = np.empty((len(sizes), 2), "<u8")
    index[:, 1] = sizes
    index[:, 0] = stops - index[:, 1]
    plain = index.tobytes()
    return plain + google_crc32c.value(plain).to_bytes(4, "little")


def _read_index(shard: Path, chunks: int, verify: bool) -> NDArray[np.uint64]:
    import google_crc32c

    with open(shard, "rb") as file:
        file.seek(-(16 * chunks + 4), os.SEEK_END)
        data = file.read()
    if verify and google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise DataError(f"the index of {shard} fails its crc32c\n  The file is damaged: precompute it again.")
    index = np.frombuffer(data[:-4], "<u8").reshape(chunks, 2)
    if (index == _NO_CHUNK).any():
        raise DataError(f"{shard} leaves chunks out, which dpipe never does\n  Read it with zarr instead.")
    return index


def _metadata_of(path: Path) -> dict[str, Any]:
    try:
        data = json.loads((path / "zarr.json").read_text())
    except FileNotFoundError:
        raise DataError(f"no array at {path}\n  Precompute the target that holds it.") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path / 'zarr.json'} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise DataError(f"{path / 'zarr.json'} is {type(data).__name__}, expected an object")
    codecs = data.get("codecs", [])
    keys = data.get("chunk_key_encoding")
    ours = keys == {"name": "default", "configuration": {"separator": "."}} and len(codecs) == 1
    if data.get("node_type") != "array" or not ours or codecs[0].get("name") != "sharding_indexed":
        raise DataError(
            f"{path} is not an array dpipe wrote (one shard, Zarr v3)\n  Read it with zarr instead."
        )
    return data


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _write_text(path: Path, text: str, durable: bool) -> None:
    with open(path, "w") as file:
        file.write(text + "\n")
        if durable:
            file.flush()
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
