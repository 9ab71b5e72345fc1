"""Published archives, read where they lie: members of tars and zips by offset, nothing extracted.

A zip is parsed here rather than by `zipfile` for two reasons: an archive of two million frames must be listed
in constant memory, and a frame that is itself a zip (npz) is opened hundreds of thousands of times.
Member names come from strangers: one that would leave its folder is refused, even where it is only looked at.

Source  PKWARE APPNOTE 6.3.10 (zip, zip64); POSIX.1-2017 pax (tar, through `tarfile`)
"""

from __future__ import annotations

import errno
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from ..schemas.errors import DataError

ReadAt = Callable[[int, int], bytes]  # (offset, number of bytes) -> those bytes, fewer at the end

STORED, DEFLATED = 0, 8
DIRECTORY_BLOCK = 4 << 20
INFLATED_BLOCK = 1 << 20
MOST_INFLATION = 1100  # deflate reaches about 1:1030
_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MOST_COMMENT = 1 << 16


class ZipMember(NamedTuple):
    """One file of a zip: `header` is the offset of its local header, `packed` and `size` are bytes."""

    name: str
    header: int
    packed: int
    size: int
    method: int
    crc: int


class TarMember(NamedTuple):
    """One file of a tar: its bytes are [offset, offset + size) of the archive."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class TarIndex:
    """Regular files of a tar by name; `problem` says where a torn archive ends, "" when it is whole."""

    path: Path
    members: dict[str, TarMember]
    problem: str


def safe_name(name: str) -> str:
    """A member name without leading './'; DataError for one that is absolute or climbs out of its folder."""
    plain = name.removeprefix("./")
    parts = plain.rstrip("/").split("/")
    if (
        not plain
        or plain[0] == "/"
        or ".." in parts
        or "\\" in plain
        or "\0" in plain
        or re.match(r"[A-Za-z]:", plain)
    ):
        raise DataError(f"member name {name!r} leaves its folder; refused")
    return plain


@contextmanager
def open_read_at(path: Path) -> Iterator[tuple[ReadAt, int]]:
    """Positioned reads of a file, and its size. One descriptor, safe to share between readers."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield (lambda offset, count: os.pread(descriptor, count, offset)), os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def bytes_read_at(data: bytes) -> ReadAt:
    return lambda offset, count: data[offset : offset + count]


def zip_directory(read_at: ReadAt, size: int, tail: int = 4096) -> tuple[int, int, int]:
    """(offset, bytes, entries) of the central directory; `tail` bytes usually reach its end record."""
    for reach in (tail, _MOST_COMMENT + _END.size):
        start = max(0, size - reach)
        block = read_at(start, size - start)
        at = block.rfind(b"PK\5\6")
        if at >= 0 and len(block) - at >= _END.size:
            break
    else:
        raise DataError(f"no zip directory at the end of its {size:,} bytes; the file is cut short or no zip")
    _, disk, first_disk, _, entries, length, offset, _ = _END.unpack_from(block, at)
    if disk not in (0, 0xFFFF) or first_disk not in (0, 0xFFFF):  # zip64 may leave them to its own record
        raise DataError("the zip is one volume of several; join them first")
    if entries == 0xFFFF or length == 0xFFFFFFFF or offset == 0xFFFFFFFF:
        locator = read_at(max(0, start + at - _END64_LOCATOR.size), _END64_LOCATOR.size)
        if len(locator) == _END64_LOCATOR.size and locator[:4] == b"PK\6\7":
            record = read_at(_END64_LOCATOR.unpack(locator)[2], _END64.size)
            if len(record) != _END64.size or record[:4] != b"PK\6\6":
                raise DataError("the zip64 directory record is missing; the file is damaged")
            *_, entries, length, offset = _END64.unpack(record)
    if offset + length > size:
        raise DataError(
            f"the zip directory ends at byte {offset + length:,} of {size:,}; the file is damaged"
        )
    return offset, length, entries


def zip_members(read_at: ReadAt, size: int, tail: int = 4096) -> Iterator[ZipMember]:
    """Every file of a zip in directory order, folders left out, in constant memory."""
    offset, length, entries = zip_directory(read_at, size, tail)
    buffer, at, done, found = b"", 0, 0, 0
    while found < entries:
        fields = _ENTRY.unpack_from(buffer, at) if len(buffer) - at >= _ENTRY.size else None
        stop = at + _ENTRY.size + sum(fields[10:13]) if fields else 0  # name, extra field, comment
        if fields is None or stop > len(buffer):
            block = read_at(offset + done, min(DIRECTORY_BLOCK, length - done))
            if not block:
                raise DataError(
                    f"the zip directory ends after {found:,} of {entries:,} entries; the file is damaged"
                )
            buffer, at, done = buffer[at:] + block, 0, done + len(block)
            continue
        member = _parse_entry(buffer, at + _ENTRY.size, fields)
        at, found = stop, found + 1
        if not member.name.endswith("/"):
            yield member


def _parse_entry(buffer: bytes, start: int, fields: tuple[Any, ...]) -> ZipMember:
    """A directory entry from its fields of fixed size; its name begins at `start` of the buffer."""
    signature, _, _, flags, method, _, _, crc, packed, size, name_size, extra_size = fields[:12]
    header = fields[16]
    if signature != b"PK\1\2":
        raise DataError("the zip directory is damaged: an entry does not begin where it should")
    raw = buffer[start : start + name_size]
    if size == 0xFFFFFFFF or packed == 0xFFFFFFFF or header == 0xFFFFFFFF:
        extra = buffer[start + name_size : start + name_size + extra_size]
        size, packed, header = _zip64_sizes(extra, size, packed, header)
    # Python's own cp437 is a table walked in Python: a third of the time of listing an npz.
    encoding = "ascii" if raw.isascii() else "utf-8" if flags & 0x800 else "cp437"
    name = raw.decode(encoding, "replace")
    if flags & 1:
        raise DataError(f"member {name!r} is encrypted; refused")
    return ZipMember(name, header, packed, size, method, crc)


def _zip64_sizes(extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            body = extra[at + 4 : at + 4 + length]
            values = iter(struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8]))
            try:
                size = next(values) if size == 0xFFFFFFFF else size
                packed = next(values) if packed == 0xFFFFFFFF else packed
                header = next(values) if header == 0xFFFFFFFF else header
            except StopIteration:
                raise DataError("a zip64 entry lacks its sizes; the file is damaged") from None
            return size, packed, header
        at += 4 + length
    return size, packed, header


def data_offset(read_at: ReadAt, member: ZipMember) -> int:
    """Where a zip member's bytes begin; its local header has its own lengths of name and extra field."""
    header = read_at(member.header, _LOCAL.size)
    if len(header) != _LOCAL.size or header[:4] != b"PK\3\4":
        raise DataError(f"'{member.name}': no zip header at byte {member.header:,}; the file is damaged")
    name_size, extra_size = _LOCAL.unpack(header)[9:11]
    return member.header + _LOCAL.size + name_size + extra_size


def read_packed(read_at: ReadAt, member: ZipMember) -> bytes:
    """A zip member's bytes as they lie in the archive."""
    packed = read_at(data_offset(read_at, member), member.packed)
    if len(packed) != member.packed:
        raise DataError(
            f"'{member.name}' has {len(packed):,} of {member.packed:,} bytes; the file is cut short"
        )
    return packed


def unpack(member: ZipMember, packed: bytes) -> bytes:
    """Inflate and check a zip member. Never makes more bytes than the directory declares."""
    if member.method == STORED:
        data = packed
    else:
        _require_inflatable(member)
        try:
            data = zlib.decompressobj(-15).decompress(packed, member.size + 1)
        except zlib.error as error:
            raise DataError(f"'{member.name}' cannot be inflated: {error}") from error
    if len(data) != member.size:
        raise DataError(f"'{member.name}' holds other than the {member.size:,} bytes its directory declares")
    if zlib.crc32(data) != member.crc:
        raise DataError(f"'{member.name}' does not match its checksum; the file is damaged")
    return data


def _require_inflatable(member: ZipMember) -> None:
    """Refuse a member that zlib cannot read, or whose declared size no deflate stream of its bytes can have."""
    if member.method != DEFLATED:
        raise DataError(
            f"'{member.name}' is packed by method {member.method}; only stored and deflated are read"
        )
    if member.size > MOST_INFLATION * member.packed + 64:
        raise DataError(f"'{member.name}' declares {member.size:,} bytes from {member.packed:,}; refused")


def read_member(read_at: ReadAt, member: ZipMember) -> bytes:
    """A zip member's bytes, inflated and checked."""
    return unpack(member, read_packed(read_at, member))


def inflate(path: Path, member: ZipMember) -> BinaryIO:
    """A deflated member as an open file without a name, checked; it is gone when closed, or with its process."""
    _require_inflatable(member)
    with ExitStack() as until_whole:
        file = cast("BinaryIO", until_whole.enter_context(tempfile.TemporaryFile()))
        try:
            with open_read_at(path) as (read_at, _):
                _inflate(read_at, member, file)
            file.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DataError(
                f"no room in {tempfile.gettempdir()} for '{member.name}', {member.size:,} bytes when inflated\n"
                "  next: free some, set TMPDIR, or unpack the zip"
            ) from error
        until_whole.pop_all()
    return file


def _inflate(read_at: ReadAt, member: ZipMember, file: BinaryIO) -> None:
    """Block by block; never more bytes than the directory declares."""
    at, left, size, crc = data_offset(read_at, member), member.packed, 0, 0
    unpacker = zlib.decompressobj(-15)
    while not unpacker.eof and size <= member.size:
        packed = unpacker.unconsumed_tail or read_at(at, min(left, INFLATED_BLOCK))
        if not unpacker.unconsumed_tail:
            at, left = at + len(packed), left - len(packed)
        try:
            block = unpacker.decompress(packed, INFLATED_BLOCK)
        except zlib.error as error:
            raise DataError(f"'{member.name}' cannot be inflated: {error}") from error
        if not packed and not block:
            break
        size, crc = size + len(block), zlib.crc32(block, crc)
        file.write(block)
    if size != member.size or crc != member.crc:
        raise DataError(
            f"'{member.name}' inflates to other bytes than its directory declares; the file is damaged"
        )


def index_tar(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> TarIndex:
    """The regular files of an uncompressed tar whose names are `wanted`. Links are no files of ours."""
    import tarfile

    members: dict[str, TarMember] = {}
    size, seen = path.stat().st_size, 0
    try:
        with tarfile.open(path, "r:") as archive:
            while (entry := archive.next()) is not None:
                # Or it keeps every header: a hundred megabytes for a shard with depth.
                archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                seen += 1
                if not entry.isreg() or entry.issparse():
                    continue
                name = safe_name(entry.name)
                if entry.offset_data + entry.size > size:
                    return TarIndex(path, members, f"{path.name} ends in the middle of '{name}'")
                if wanted(name):
                    members[name] = TarMember(name, entry.offset_data, entry.size)
    except tarfile.ReadError as error:
        if not seen:
            raise DataError(
                f"{path.name} is no uncompressed tar ({error})\n"
                f"  where: {path}\n  next: unpack it (members of a compressed tar have no place of their own)"
            ) from error
        return TarIndex(path, members, f"{path.name} ends early, after {len(members):,} files")
    return TarIndex(path, members, "")
