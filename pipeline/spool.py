"""Spool files: one finished episode, waiting for its part to be muxed.

    magic | section bytes ... | footer JSON | footer length (8 bytes) | magic

The footer carries the episode's receipt and where each section lies. A spool file exists under its final name
only when it is complete and durable, so that its presence is the receipt.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import DataError
from .durable import commit, temporary_name

MAGIC = b"DPSPOOL1"
COPY_BLOCK = 1 << 20


@dataclass(frozen=True)
class Section:
    """Bytes [offset, offset + size) of a spool file, an array when `dtype` is given."""

    offset: int
    size: int
    dtype: str = ""
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Spool:
    path: Path
    receipt: Mapping[str, Any]
    sections: Mapping[str, Section]

    def array(self, name: str) -> NDArray[Any]:
        section = self.sections[name]
        with open(self.path, "rb") as file:
            file.seek(section.offset)
            data = file.read(section.size)
        return np.frombuffer(data, section.dtype).reshape(section.shape)

    def pieces(self, name: str, lengths: NDArray[np.integer[Any]]) -> list[bytes]:
        """A section that holds one piece after another."""
        section = self.sections[name]
        with open(self.path, "rb") as file:
            file.seek(section.offset)
            return [file.read(length) for length in lengths.tolist()]


def spool_name(source_id: str) -> str:
    """What an episode's spool file is called, after the number of its part."""
    import xxhash

    return xxhash.xxh3_64_hexdigest(source_id.encode())


def write_spool(
    path: Path,
    receipt: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
    blobs: Mapping[str, BinaryIO],
) -> None:
    """Write one episode: named arrays, and blobs copied from open temporary files (left open, read from 0)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    sections: dict[str, dict[str, Any]] = {}
    with open(temporary, "wb") as file:
        file.write(MAGIC)
        for name, array in arrays.items():
            data = np.ascontiguousarray(array)
            sections[name] = {
                "offset": file.tell(),
                "size": data.nbytes,
                "dtype": data.dtype.str,
                "shape": list(data.shape),
            }
            file.write(data.tobytes())
        for name, blob in blobs.items():
            start = file.tell()
            blob.seek(0)
            while block := blob.read(COPY_BLOCK):
                file.write(block)
            sections[name] = {"offset": start, "size": file.tell() - start}
        footer = json.dumps({"receipt": receipt, "sections": sections}, separators=(",", ":")).encode()
        file.write(footer + len(footer).to_bytes(8, "little") + MAGIC)
    commit(temporary, path)


def read_spool(path: Path) -> Spool:
    """Open a spool file; DataError when it is torn (a disk that lied about fsync)."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - 16))
            tail = file.read(16)
            length = int.from_bytes(tail[:8], "little")
            if tail[8:] != MAGIC or length > size - 24:
                raise ValueError("no footer")
            file.seek(size - 16 - length)
            footer = json.loads(file.read(length))
    except (OSError, ValueError) as error:
        raise DataError(
            f"spool file {path} is torn: {error}; delete it and run the same command again"
        ) from error
    sections = {
        name: Section(s["offset"], s["size"], s.get("dtype", ""), tuple(s.get("shape", ())))
        for name, s in footer["sections"].items()
    }
    return Spool(path, footer["receipt"], sections)
