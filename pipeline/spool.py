"""Spool files: one finished episode, waiting for its part to be muxed.

    magic | arrays ... | blobs ... | footer JSON | its length | length up to the blobs | digest of all before | magic

The three numbers are 8 bytes each; arrays begin at multiples of 8 and are read together, blobs stay on disk. The
footer carries the episode's receipt and where everything lies. A spool file gets its final name when it is
whole, so that its presence is the receipt; a killed process leaves it or does not. Nothing waits for the disk here:
most spool files are joined into their part and gone before the disk would have seen them. What a power cut made of
one is known by the digest, which every reader checks, and that episode is encoded again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import DataError
from .durable import POINT, temporary_name

MAGIC = b"DPSPOOL3"
TAIL = 32  # bytes: length of the footer, length up to the blobs, digest, magic
ALIGNED = 8
COPY_BLOCK = 1 << 20


class Blob(NamedTuple):
    """Bytes [offset, offset + size) of a spool file."""

    offset: int
    size: int


@dataclass(frozen=True)
class Spool:
    path: Path
    receipt: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]
    blobs: Mapping[str, Blob]

    def pieces(self, name: str, lengths: NDArray[np.integer[Any]]) -> list[bytes]:
        """A blob that holds one piece after another."""
        with open(self.path, "rb") as file:
            file.seek(self.blobs[name].offset)
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
) -> int:
    """Write one episode: named arrays, and blobs copied from open temporary files (left open, read from 0).

    The folder must be there. Returns the file's size in bytes.
    """
    import xxhash

    temporary = temporary_name(path)
    head, at = [MAGIC], len(MAGIC)
    told: dict[str, Any] = {"receipt": receipt, "arrays": {}, "blobs": {}}
    for name, array in arrays.items():
        told["arrays"][name] = (at, array.dtype.str, array.shape)
        head += [array.tobytes(), bytes(-array.nbytes % ALIGNED)]
        at += array.nbytes + len(head[-1])
    hasher = xxhash.xxh3_64()
    with open(temporary, "wb") as file:

        def write(data: bytes) -> int:
            hasher.update(data)
            return file.write(data)

        write(b"".join(head))
        until_blobs = at
        for name, blob in blobs.items():
            start = at
            blob.seek(0)
            while block := blob.read(COPY_BLOCK):
                at += write(block)
            told["blobs"][name] = (start, at - start)
        footer = json.dumps(told, separators=(",", ":")).encode()
        write(footer + len(footer).to_bytes(8, "little") + until_blobs.to_bytes(8, "little"))
        file.write(hasher.digest() + MAGIC)
    POINT(f"rename {path.name}")
    temporary.replace(path)
    return at + len(footer) + TAIL


def read_spool(path: Path) -> Spool:
    """Open a spool file and check all of it; DataError when it is torn."""
    import xxhash

    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - TAIL))
            tail = file.read(TAIL)
            footer_size, until_blobs = (int.from_bytes(tail[i : i + 8], "little") for i in (0, 8))
            blobs_size = size - TAIL - footer_size - until_blobs
            if tail[24:] != MAGIC or blobs_size < 0:
                raise ValueError("no footer")
            file.seek(0)
            head = file.read(until_blobs)
            hasher, left = xxhash.xxh3_64(head), blobs_size
            while left and (block := file.read(min(left, COPY_BLOCK))):
                hasher.update(block)
                left -= len(block)
            footer = file.read(footer_size)
            hasher.update(footer + tail[:16])
            if hasher.digest() != tail[16:24]:
                raise ValueError("its bytes are not those its digest was made of")
    except (OSError, ValueError) as error:
        raise DataError(
            f"spool file {path} is torn: {error}; delete it and run the same command again"
        ) from error
    told = json.loads(footer)
    arrays = {
        name: np.frombuffer(head, dtype, math.prod(shape), at).reshape(shape)
        for name, (at, dtype, shape) in told["arrays"].items()
    }
    return Spool(path, told["receipt"], arrays, {name: Blob(*at) for name, at in told["blobs"].items()})
