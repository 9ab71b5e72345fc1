"""Spool files: one finished episode, waiting for its part to be muxed.

    magic | section bytes ... | footer JSON | footer length (8 bytes) | digest of all before (8 bytes) | magic

The footer carries the episode's receipt and where each section lies. A spool file gets its final name when it is
whole, so that its presence is the receipt; a killed process leaves it or does not. Nothing waits for the disk here:
most spool files are joined into their part and gone before the disk would have seen them. What a power cut made of
one is known by the digest, which every reader checks, and that episode is encoded again.
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
from .durable import POINT, temporary_name

MAGIC = b"DPSPOOL2"
TAIL = 24  # bytes: footer length, digest, magic
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
    import xxhash

    temporary = temporary_name(path)
    if not temporary.parent.is_dir():  # asked first: to be refused a folder costs an exception
        path.parent.mkdir(parents=True, exist_ok=True)
    sections: dict[str, dict[str, Any]] = {}
    hasher = xxhash.xxh3_64()
    with open(temporary, "wb") as file:

        def write(data: bytes) -> None:
            hasher.update(data)
            file.write(data)

        write(MAGIC)
        for name, array in arrays.items():
            data = np.ascontiguousarray(array)
            sections[name] = {
                "offset": file.tell(),
                "size": data.nbytes,
                "dtype": data.dtype.str,
                "shape": list(data.shape),
            }
            write(data.tobytes())
        for name, blob in blobs.items():
            start = file.tell()
            blob.seek(0)
            while block := blob.read(COPY_BLOCK):
                write(block)
            sections[name] = {"offset": start, "size": file.tell() - start}
        footer = json.dumps({"receipt": receipt, "sections": sections}, separators=(",", ":")).encode()
        write(footer + len(footer).to_bytes(8, "little"))
        file.write(hasher.digest() + MAGIC)
    POINT(f"rename {path.name}")
    temporary.replace(path)


def read_spool(path: Path) -> Spool:
    """Open a spool file and check all of it; DataError when it is torn."""
    import xxhash

    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - TAIL))
            tail = file.read(TAIL)
            length = int.from_bytes(tail[:8], "little")
            if tail[16:] != MAGIC or length > size - TAIL - len(MAGIC):
                raise ValueError("no footer")
            file.seek(size - TAIL - length)
            footer = json.loads(file.read(length))
            file.seek(0)
            hasher, left = xxhash.xxh3_64(), size - TAIL + 8
            while left and (block := file.read(min(left, COPY_BLOCK))):
                hasher.update(block)
                left -= len(block)
            if hasher.digest() != tail[8:16]:
                raise ValueError("its bytes are not those its digest was made of")
    except (OSError, ValueError) as error:
        raise DataError(
            f"spool file {path} is torn: {error}; delete it and run the same command again"
        ) from error
    sections = {
        name: Section(s["offset"], s["size"], s.get("dtype", ""), tuple(s.get("shape", ())))
        for name, s in footer["sections"].items()
    }
    return Spool(path, footer["receipt"], sections)
