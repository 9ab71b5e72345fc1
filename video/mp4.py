"""MP4 sample tables: read from anyone's file, written into ours, no decoder in between.

A video of a demonstration is a list of compressed samples and a table that says when each is shown. Joining
episodes therefore needs only the table and the bytes; opening a container through a media library costs more
than copying a two-megabyte clip.

File       boxes [size u32, type 4cc, payload], size 1: 64-bit size follows, size 0: to the end of the parent
Path       moov / trak / mdia / minf / stbl / {stsd stts ctts stss stsc stsz stco|co64}; trak / edts / elst
Source     ISO/IEC 14496-12 (boxes), -15 (avcC, hvcC), AV1-ISOBMFF (av1C), QuickTime File Format (mhlr, alis)

n samples in decode order; times are ticks of the track's timescale. Everything is bounded by the file's size
before it is allocated, since files come from strangers.
"""

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import DataError

MAX_SAMPLES = 1 << 22  # 38 hours at 30 fps; bounds the arrays of a hostile table to 150 MB
MAX_MOOV = 1 << 27  # a full table of MAX_SAMPLES fits
MAX_BOXES = 4096  # children of one box; real files have tens
MAX_SIDE = 16384
MAX_PIXELS = 1 << 26  # 8192 x 8192

TICKS_PER_FRAME = 512  # what ffmpeg gives 30 fps (15360 ticks a second); any fps divides it exactly

# Sample entry type to the codec's canonical name, as lerobot and ffmpeg spell it.
CODECS = {
    b"avc1": "h264",
    b"avc3": "h264",
    b"hvc1": "hevc",
    b"hev1": "hevc",
    b"av01": "av1",
    b"mp4v": "mpeg4",
    b"vp08": "vp8",
    b"vp09": "vp9",
    b"jpeg": "mjpeg",
    b"mjpg": "mjpeg",
}

# lerobot 0.6.1 resumes and re-encodes only these (configs/video.py, VALID_VIDEO_CODECS).
COPYABLE = ("h264", "hevc", "av1")

_IDENTITY = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
_WIDE_FROM = 1 << 32  # bytes from which offsets need 64 bits
_ENTRY_HEADER = 86  # box header 8, SampleEntry 8, VisualSampleEntry 70


@dataclass(frozen=True)
class Edit:
    """One line of an edit list: show `duration` movie ticks from `media_time` media ticks (-1: nothing)."""

    duration: int
    media_time: int
    rate: float


@dataclass(frozen=True, eq=False)
class SampleTable:
    """The first video track of one MP4: n samples in decode order.

    `sample_entry` is the stsd entry verbatim (it carries avcC, hvcC or av1C), `offsets` are absolute in
    `path`, also where the MP4 is a member of an archive.
    """

    path: Path
    codec: str
    sample_entry: bytes
    entries: int  # sample descriptions in the track; samples use the first unless the file is odd
    width: int
    height: int
    timescale: int
    movie_timescale: int
    durations: NDArray[np.int64]  # [n] ticks until the next sample is decoded
    compositions: NDArray[np.int64]  # [n] ticks from decode to presentation time
    sync: NDArray[np.bool_]  # [n] decoding can start here
    offsets: NDArray[np.int64]  # [n] absolute file offsets
    sizes: NDArray[np.int64]  # [n] bytes
    edits: tuple[Edit, ...]
    upright: bool  # False when the display matrix turns or mirrors the picture

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def media_times(self) -> NDArray[np.int64]:
        """[n] presentation time of each sample in media ticks, before edits."""
        decode = np.cumsum(self.durations) - self.durations
        return decode + self.compositions

    @cached_property
    def shown(self) -> NDArray[np.int64]:
        """[m] sample numbers in the order they are shown; frame i of the video is sample `shown[i]`.

        m < n when the edit list cuts. Only single edits are followed (with leading empty ones, which delay
        but cut nothing): that is all that recorders and editors write for one clip.
        """
        order = np.argsort(self.media_times, kind="stable")
        edit = self._single_edit()
        if edit is None:
            return order
        times = self.media_times[order]
        inside = times >= edit.media_time
        if edit.duration:  # 0: to the end of the track
            ticks = (edit.duration * self.timescale + self.movie_timescale // 2) // self.movie_timescale
            inside &= times < min(edit.media_time + ticks, (1 << 63) - 1)
        return order[inside]

    @cached_property
    def times(self) -> NDArray[np.int64]:
        """[m] presentation times of the frames shown, in ticks, from 0."""
        times = self.media_times[self.shown]
        return times - times[0] if len(times) else times

    def _single_edit(self) -> Edit | None:
        kept = [edit for edit in self.edits if edit.media_time >= 0]
        return kept[0] if len(kept) == 1 else None

    @property
    def has_edits(self) -> bool:
        """True when the edit list cuts, repeats or changes speed; a shift that hides no frame is none."""
        kept = [edit for edit in self.edits if edit.media_time >= 0]
        if len(kept) > 1 or any(edit.rate != 1 for edit in kept):
            return True
        return len(self.shown) < len(self)

    @cached_property
    def fps(self) -> Fraction | None:
        """The constant frame rate; None when the rate varies.

        A rate is constant when every step is the same, or when the times are those of a whole rate rounded
        to ticks (33, 33, 34 at 1000 ticks a second is 30 fps).
        """
        times = self.times
        if len(times) == 0:
            return None
        if len(times) == 1:
            ticks = int(self.durations[self.shown[0]])
            return Fraction(self.timescale, ticks) if ticks > 0 else None
        steps = np.diff(times)
        if (steps == steps[0]).all():
            return Fraction(self.timescale, int(steps[0])) if steps[0] > 0 else None
        whole = round(self.timescale * (len(times) - 1) / int(times[-1]))
        if whole < 1 or self.timescale < 4 * whole:  # ticks too coarse to tell a late frame from rounding
            return None
        late = times * whole - np.arange(len(times), dtype=np.int64) * self.timescale
        return Fraction(whole) if (np.abs(late) <= whole).all() else None  # each within one tick

    @property
    def keyframe_interval(self) -> int:
        """The longest run of samples from one sync sample to the next: what a random read may decode."""
        starts = np.flatnonzero(self.sync)
        return int(np.diff(np.append(starts, len(self))).max()) if len(starts) else len(self)

    @cached_property
    def ranks(self) -> NDArray[np.int64]:
        """[n] position at which each sample is shown, cuts ignored."""
        ranks = np.empty(len(self), np.int64)
        ranks[np.argsort(self.media_times, kind="stable")] = np.arange(len(self))
        return ranks

    @cached_property
    def has_open_gops(self) -> bool:
        """True when a frame shown before a sync sample is decoded after it, perhaps from frames before."""
        ranks = self.ranks
        lowest_after = np.minimum.accumulate(ranks[::-1])[::-1]
        return bool((lowest_after[self.sync] < ranks[self.sync]).any())


@dataclass(frozen=True, eq=False)
class Run:
    """n samples in decode order, written as one stretch, usually one episode; the first is a sync sample.

    `source` holds them at `offsets`: a file, or bytes. `order` is the position at which each sample is shown
    within the run (None: decode order, no B-frames).
    """

    source: Path | bytes
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    sync: NDArray[np.bool_]
    order: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.sizes)


def read_table(path: Path, offset: int = 0, size: int | None = None) -> SampleTable:
    """The sample table of the MP4 at `path`, or of `size` bytes at `offset` in it (a tar or zip member)."""
    with open(path, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        stop = total if size is None else offset + size
        if offset < 0 or stop > total or offset >= stop:
            raise DataError(f"{path}: bytes {offset} to {stop} lie outside the file of {total} bytes")
        moov = _find_moov(file.fileno(), path, offset, stop)
    return _parse_moov(moov, path, offset, stop)


def copy_problem(table: SampleTable, fps: int, first_frame: int = 0, frames: int | None = None) -> str | None:
    """Why the given frames (all by default) cannot be copied packet by packet at `fps`; None if they can."""
    last = len(table.shown) if frames is None else first_frame + frames
    if table.codec not in COPYABLE:
        return f"codec is {table.codec}; lerobot resumes only {', '.join(COPYABLE)}"
    if table.entries != 1:
        return f"the track changes its codec settings ({table.entries} sample descriptions)"
    if not table.upright:
        return "the display matrix turns or mirrors the picture"
    if table.has_edits:
        return "the edit list cuts frames or changes speed"
    if table.fps is None:
        return "the frame rate varies"
    if table.fps != fps:
        return f"frame rate is {float(table.fps):g}, the dataset's is {fps}"
    if table.has_open_gops:
        return (
            "its groups of pictures are open: lerobot's torchcodec reader returns wrong frames at their ends"
        )
    if (table.sizes == 0).any():
        return f"sample {int(np.flatnonzero(table.sizes == 0)[0])} is empty"
    if last > len(table.shown) or first_frame < 0 or last <= first_frame:
        return f"frames {first_frame} to {last} of {len(table.shown)} were asked for"
    wanted = table.shown[first_frame:last]
    start = int(wanted.min())
    if int(wanted.max()) - start + 1 != len(wanted):
        return "the frames asked for are decoded among others"
    if not table.sync[start] or table.shown[first_frame] != start:
        return "the first frame is not one that decoding can start at"
    return None


def copy_run(table: SampleTable, first_frame: int = 0, frames: int | None = None) -> Run:
    """The samples of frames [first_frame, first_frame + frames); only for clips without a `copy_problem`."""
    last = len(table.shown) if frames is None else first_frame + frames
    wanted = table.shown[first_frame:last]
    start = int(wanted.min())
    part = slice(start, start + len(wanted))
    order = np.empty(len(wanted), np.int64)
    order[wanted - start] = np.arange(len(wanted))
    in_order = bool((order == np.arange(len(wanted))).all())
    return Run(
        table.path, table.offsets[part], table.sizes[part], table.sync[part], None if in_order else order
    )


def can_join(a: SampleTable, b: SampleTable) -> str | None:
    """Why the samples of `a` and `b` cannot share one file, None if they can."""
    if a.codec != b.codec:
        return f"codec {a.codec} and {b.codec}"
    if (a.width, a.height) != (b.width, b.height):
        return f"size {a.width}x{a.height} and {b.width}x{b.height}"
    if a.fps != b.fps:
        return f"frame rate {a.fps} and {b.fps}"
    if common_entry(a.sample_entry) != common_entry(b.sample_entry):
        return "encoder settings differ (sample descriptions)"
    return None


def common_entry(sample_entry: bytes) -> bytes:
    """`sample_entry` without what belongs to one clip alone: its bit rate (btrt) and its encoder's name."""
    head = bytearray(sample_entry[:_ENTRY_HEADER])
    head[14:16] = (1).to_bytes(2)  # data reference: ours has one, the file itself
    head[50:82] = bytes(32)  # compressorname
    body = b"".join(
        sample_entry[start - header : stop]
        for kind, header, start, stop in _entry_children(sample_entry)
        if kind not in (b"btrt", b"free", b"skip")
    )
    head[0:4] = (len(head) + len(body)).to_bytes(4)
    return bytes(head) + body


def entry_box(sample_entry: bytes, kind: bytes) -> bytes | None:
    """The payload of the box `kind` (avcC, hvcC, av1C, esds) inside a sample entry; None if it has none."""
    for found, _, start, stop in _entry_children(sample_entry):
        if found == kind:
            return sample_entry[start:stop]
    return None


def visual_entry(kind: bytes, width: int, height: int, children: bytes) -> bytes:
    """A stsd entry of type `kind` (avc1, av01) for 24-bit pictures, holding the boxes `children`."""
    body = bytes(6) + (1).to_bytes(2) + bytes(16)
    body += struct.pack(">HHIIIH", width, height, 0x00480000, 0x00480000, 0, 1)  # 72 dpi, one frame a sample
    body += bytes(32) + struct.pack(">Hh", 24, -1)
    return box(kind, body + children)


def box(kind: bytes, *payload: bytes) -> bytes:
    body = b"".join(payload)
    return struct.pack(">I4s", len(body) + 8, kind) + body


def write_mp4(
    path: Path,
    sample_entry: bytes,
    width: int,
    height: int,
    fps: int,
    runs: Sequence[Run],
) -> int:
    """Write the runs one after another as one constant-rate MP4, table first; returns its size in bytes.

    Frame k of the file is shown at exactly k / fps. The bytes depend on the arguments alone, no clock is
    written. One chunk per run. To make the file durable, and to give it its name, is the caller's.
    """
    if not runs or not all(len(run) for run in runs):
        raise ValueError("every part needs a run, and every run a sample")
    for number, run in enumerate(runs):
        if not run.sync[0]:
            raise ValueError(f"run {number} does not start at a sync sample")
    sizes = np.concatenate([run.sizes for run in runs])
    lengths = np.array([len(run) for run in runs])
    chunk_sizes = np.array([int(run.sizes.sum()) for run in runs])
    payload = int(chunk_sizes.sum())
    if len(sizes) > MAX_SAMPLES:
        raise ValueError(f"{len(sizes)} samples in one file; the limit is {MAX_SAMPLES}")

    # Whether offsets need 64 bits depends on the header's size, which differs little: decide generously.
    wide = payload + 24 * len(sizes) + (1 << 16) >= _WIDE_FROM
    ftyp = box(b"ftyp", b"isom", (512).to_bytes(4), b"isom", b"iso4", sample_entry[4:8], b"mp41")
    mdat = (
        struct.pack(">I4sQ", 1, b"mdat", payload + 16) if wide else struct.pack(">I4s", payload + 8, b"mdat")
    )
    chunks = np.cumsum(chunk_sizes) - chunk_sizes
    head = _movie(sample_entry, width, height, fps, runs, sizes, lengths, chunks, wide)
    base = len(ftyp) + len(head) + len(mdat)
    head = _movie(sample_entry, width, height, fps, runs, sizes, lengths, chunks + base, wide)

    with open(path, "wb") as file:
        file.write(ftyp + head + mdat)
        file.flush()
        _copy_runs(file.fileno(), runs)
    return base + payload


def _movie(
    sample_entry: bytes,
    width: int,
    height: int,
    fps: int,
    runs: Sequence[Run],
    sizes: NDArray[np.int64],
    lengths: NDArray[np.int64],
    chunks: NDArray[np.int64],
    wide: bool,
) -> bytes:
    """The moov box: one track, movie and media on the same timescale so that its duration is exact."""
    timescale, duration = fps * TICKS_PER_FRAME, len(sizes) * TICKS_PER_FRAME
    times = struct.pack(">4IIH10x", 0, 0, timescale, duration, 0x10000, 0x100)  # rate 1, volume 1
    mvhd = _full(b"mvhd", 0, 0, times, _IDENTITY, bytes(24), (2).to_bytes(4))  # next track: 2
    track = struct.pack(">5I16x", 0, 0, 1, 0, duration)  # track 1
    tkhd = _full(b"tkhd", 0, 3, track, _IDENTITY, struct.pack(">II", width << 16, height << 16))
    mdhd = _full(b"mdhd", 0, 0, struct.pack(">4IHH", 0, 0, timescale, duration, 0x55C4, 0))  # language und
    hdlr = _full(b"hdlr", 0, 0, struct.pack(">4x4s12x", b"vide") + b"VideoHandler\0")
    vmhd = _full(b"vmhd", 0, 1, bytes(8))
    dinf = box(b"dinf", _full(b"dref", 0, 0, (1).to_bytes(4), _full(b"url ", 0, 1)))
    stbl = [
        _full(b"stsd", 0, 0, (1).to_bytes(4), common_entry(sample_entry)),
        _table(b"stts", np.array([[len(sizes), TICKS_PER_FRAME]])),
    ]
    if any(run.order is not None for run in runs):
        stbl.append(_compositions(runs))
    starts = np.concatenate([run.sync for run in runs])
    if not starts.all():
        stbl.append(_table(b"stss", np.flatnonzero(starts) + 1))
    first = np.flatnonzero(np.diff(lengths, prepend=-1))  # chunks at which the number of samples changes
    stbl.append(_table(b"stsc", np.stack([first + 1, lengths[first], np.ones_like(first)], axis=1)))
    stbl.append(_full(b"stsz", 0, 0, struct.pack(">II", 0, len(sizes)), sizes.astype(">u4").tobytes()))
    kind, width_of = (b"co64", ">u8") if wide else (b"stco", ">u4")
    stbl.append(_full(kind, 0, 0, len(chunks).to_bytes(4), chunks.astype(width_of).tobytes()))
    minf = box(b"minf", vmhd, dinf, box(b"stbl", *stbl))
    return box(b"moov", mvhd, box(b"trak", tkhd, box(b"mdia", mdhd, hdlr, minf)))


def _compositions(runs: Sequence[Run]) -> bytes:
    """ctts version 1: signed offsets, so that the first frame of every run is shown at its decode time."""
    positions = [np.arange(len(run)) for run in runs]
    shifts = np.concatenate(
        [
            place - place if run.order is None else run.order - place
            for run, place in zip(runs, positions, strict=True)
        ]
    )
    starts = np.flatnonzero(np.diff(shifts, prepend=shifts[0] - 1))
    counts = np.diff(np.append(starts, len(shifts)))
    pairs = np.stack([counts, shifts[starts] * TICKS_PER_FRAME], axis=1)
    return _full(b"ctts", 1, 0, len(pairs).to_bytes(4), pairs.astype(">i4").tobytes())


def _full(kind: bytes, version: int, flags: int, *payload: bytes) -> bytes:
    return box(kind, (version << 24 | flags).to_bytes(4), *payload)


def _table(kind: bytes, rows: NDArray[np.int64]) -> bytes:
    return _full(kind, 0, 0, len(rows).to_bytes(4), rows.astype(">u4").tobytes())


def _copy_runs(out: int, runs: Sequence[Run]) -> None:
    """Append every run's bytes to the file descriptor, neighbouring samples in one call."""
    for source, members in groupby(runs, lambda run: run.source):
        spans = (span for run in members for span in _spans(run))
        if isinstance(source, bytes):
            for start, stop in spans:
                _write_all(out, memoryview(source)[start:stop], stop - start, "bytes in memory")
            continue
        with open(source, "rb") as file:
            for start, stop in spans:
                _copy_range(file.fileno(), out, start, stop - start, source)


def _spans(run: Run) -> Iterator[tuple[int, int]]:
    """Where a run's samples lie, neighbours together: (start, stop) in its source."""
    ends = run.offsets + run.sizes
    breaks = np.flatnonzero(run.offsets[1:] != ends[:-1])
    starts, stops = run.offsets[[0, *(breaks + 1)]], ends[[*breaks, -1]]
    return zip(starts.tolist(), stops.tolist(), strict=True)


def _write_all(out: int, data: memoryview, expected: int, origin: object) -> None:
    if len(data) != expected:
        raise DataError(f"{origin}: ended {expected - len(data)} bytes early while its frames were copied")
    while data:
        data = data[os.write(out, data) :]


def _copy_range(source: int, out: int, start: int, count: int, origin: Path) -> None:
    """Append `count` bytes at `start`, inside the kernel where it can (also as a reflink)."""
    while count and hasattr(os, "copy_file_range"):
        try:
            copied = os.copy_file_range(source, out, count, start)
        except OSError:  # across file systems, or one that cannot: through memory below
            break
        if copied == 0:
            break
        start, count = start + copied, count - copied
    while count:
        data = os.pread(source, min(count, 1 << 20), start)
        if not data:
            raise DataError(f"{origin}: ended {count} bytes early while its frames were copied")
        _write_all(out, memoryview(data), len(data), origin)
        start, count = start + len(data), count - len(data)


def _find_moov(file: int, path: Path, offset: int, stop: int) -> bytes:
    """The payload of the top-level moov box, wherever it lies; the boxes between are stepped over."""
    at = offset
    for number in range(MAX_BOXES):
        head = os.pread(file, min(16, stop - at), at)
        if len(head) < 8:
            break
        length, kind = struct.unpack(">I4s", head[:8])
        header = 8
        if length == 1 and len(head) == 16:
            length, header = int.from_bytes(head[8:16]), 16
        elif length == 0:
            length = stop - at
        if number == 0 and not _is_type(kind):
            raise DataError(f"{path}: not an MP4 file; it begins with {head[:8]!r}")
        if length < header:
            raise DataError(
                f"{path}: box {_name(kind)} at byte {at} claims {length} bytes, less than its header"
            )
        if length > stop - at:
            raise DataError(
                f"{path}: box {_name(kind)} at byte {at} claims {length} bytes where {stop - at} are left."
                "  The file is cut short or damaged; fetch it again."
            )
        if kind == b"moov":
            if length > MAX_MOOV:
                raise DataError(f"{path}: its table (moov) claims {length} bytes; the limit is {MAX_MOOV}")
            return os.pread(file, length - header, at + header)
        if kind == b"moof":
            raise DataError(
                f"{path}: fragmented MP4, its table lies in pieces.  Transcode or remux it first."
            )
        at += length
    raise DataError(
        f"{path}: no table (moov box).  The recording was not closed properly, or is no MP4 file."
    )


def _is_type(kind: bytes) -> bool:
    return all(32 <= byte < 127 or byte == 0xA9 for byte in kind)


def _name(kind: bytes) -> str:
    return repr(kind.decode("latin-1"))


class _Boxes:
    """The boxes of a moov in memory: lookups that check every size against the parent's."""

    def __init__(self, data: bytes, path: Path, start: int, stop: int) -> None:
        self.data, self.path, self.start, self.stop = data, path, start, stop

    def children(self, kind: bytes) -> list["_Boxes"]:
        found = _walk(self.data, self.start, self.stop, self.path)
        return [_Boxes(self.data, self.path, start, stop) for name, _, start, stop in found if name == kind]

    def find(self, kind: bytes) -> "_Boxes | None":
        found = self.children(kind)
        return found[0] if found else None

    def need(self, *kinds: bytes) -> "_Boxes":
        here = self
        for kind in kinds:
            found = here.find(kind)
            if found is None:
                raise DataError(f"{self.path}: the video track has no {_name(kind)} box")
            here = found
        return here

    def slice(self, at: int, count: int) -> bytes:
        """`count` payload bytes from `at`."""
        if at + count > self.stop - self.start:
            raise DataError(
                f"{self.path}: a box of {self.stop - self.start} bytes ends before byte {at + count}"
            )
        return self.data[self.start + at : self.start + at + count]

    def number(self, at: int, count: int = 4, signed: bool = False) -> int:
        return int.from_bytes(self.slice(at, count), signed=signed)

    def rows(self, kind: bytes, dtype: str, columns: int, at: int = 4) -> NDArray[np.int64]:
        """A counted table: u32 count at `at`, then [count, columns] of `dtype`; the count must fit."""
        count, width = self.number(at), np.dtype(dtype).itemsize * columns
        room = (self.stop - self.start - at - 4) // width
        if count > room:
            raise DataError(f"{self.path}: {_name(kind)} claims {count} entries, its box has room for {room}")
        raw = np.frombuffer(self.data, dtype, count * columns, self.start + at + 4)
        return raw.astype(np.int64).reshape(count, columns)


def _walk(data: bytes, start: int, stop: int, path: Path | str) -> Iterator[tuple[bytes, int, int, int]]:
    """(type, header size, payload start, payload stop) of the boxes in data[start:stop]."""
    for _ in range(MAX_BOXES):
        if stop - start < 8:  # QuickTime ends some lists with four zero bytes
            return
        length, kind = struct.unpack_from(">I4s", data, start)
        header = 8
        if length == 1 and stop - start >= 16:
            length, header = int.from_bytes(data[start + 8 : start + 16]), 16
        elif length == 0:
            length = stop - start
        if length < header or length > stop - start:
            raise DataError(
                f"{path}: box {_name(kind)} claims {length} bytes where its parent has {stop - start} left"
            )
        yield kind, header, start + header, start + length
        start += length
    raise DataError(f"{path}: more than {MAX_BOXES} boxes in one")


def _entry_children(sample_entry: bytes) -> Iterator[tuple[bytes, int, int, int]]:
    return _walk(sample_entry, _ENTRY_HEADER, len(sample_entry), "sample description")


def _parse_moov(moov: bytes, path: Path, offset: int, stop: int) -> SampleTable:
    root = _Boxes(moov, path, 0, len(moov))
    track = next((trak for trak in root.children(b"trak") if _is_video(trak)), None)
    if track is None:
        raise DataError(f"{path}: no video track")
    if root.find(b"mvex") is not None:
        raise DataError(f"{path}: fragmented MP4, its table lies in pieces.  Transcode or remux it first.")
    media = track.need(b"mdia")
    stbl = media.need(b"minf", b"stbl")
    timescale = _timescale(media.need(b"mdhd"), path)
    sample_entry, entries, width, height = _description(stbl.need(b"stsd"), path)
    _refuse_external(media, path)

    sizes = _sizes(stbl, path, stop - offset)
    n = len(sizes)
    durations = _repeat(stbl.need(b"stts").rows(b"stts", ">u4", 2), n, b"stts", path)
    ctts = stbl.find(b"ctts")
    # Offsets are signed in version 1; in version 0 some writers put negative ones too, as ffmpeg expects.
    compositions = (
        np.zeros(n, np.int64)
        if ctts is None
        else _repeat(
            np.stack([ctts.rows(b"ctts", ">u4", 2)[:, 0], ctts.rows(b"ctts", ">i4", 2)[:, 1]], 1),
            n,
            b"ctts",
            path,
        )
    )
    return SampleTable(
        path=path,
        codec=CODECS.get(sample_entry[4:8], sample_entry[4:8].decode("latin-1").strip()),
        sample_entry=sample_entry,
        entries=entries,
        width=width,
        height=height,
        timescale=timescale,
        movie_timescale=_timescale(root.need(b"mvhd"), path),
        durations=durations,
        compositions=compositions,
        sync=_sync(stbl, n, path),
        offsets=_offsets(stbl, sizes, path, offset, stop),
        sizes=sizes,
        edits=_edits(track),
        upright=_matrix(track.need(b"tkhd")) == _IDENTITY,
    )


def _is_video(track: _Boxes) -> bool:
    handler = track.need(b"mdia", b"hdlr")
    return handler.slice(8, 4) == b"vide"


def _timescale(header: _Boxes, path: Path) -> int:
    """mvhd and mdhd alike: version, flags, two times (32 or 64 bit), timescale."""
    ticks = header.number(20 if header.number(0, 1) == 1 else 12)
    if ticks == 0:
        raise DataError(f"{path}: its timescale is zero, so no frame has a time")
    return ticks


def _matrix(header: _Boxes) -> bytes:
    at = 52 if header.number(0, 1) == 1 else 40
    matrix = bytearray(header.slice(at, 36))
    matrix[24:32] = bytes(8)  # translation places the picture, it does not turn it
    return bytes(matrix)


def _description(stsd: _Boxes, path: Path) -> tuple[bytes, int, int, int]:
    """The first sample entry verbatim, how many there are, and its width and height in pixels."""
    entries = stsd.number(4)
    size = stsd.number(8) if entries else 0
    if size < _ENTRY_HEADER:
        raise DataError(f"{path}: the video track has no sample description")
    entry = stsd.slice(8, size)
    width, height = struct.unpack_from(">HH", entry, 32)
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise DataError(f"{path}: pictures of {width}x{height} pixels; the limit is {MAX_PIXELS} in all")
    for _ in _walk(entry, _ENTRY_HEADER, len(entry), path):  # sizes checked once, where they enter
        pass
    return entry, entries, width, height


def _refuse_external(media: _Boxes, path: Path) -> None:
    """A data reference may name another file; frames are only ever read from this one."""
    dref = media.need(b"minf", b"dinf", b"dref")
    for _, _, start, stop in _walk(dref.data, dref.start + 8, dref.stop, path):
        if stop - start < 4 or not dref.data[start + 3] & 1:
            raise DataError(
                f"{path}: its frames lie in another file (data reference).  Export it self-contained."
            )


def _sizes(stbl: _Boxes, path: Path, room: int) -> NDArray[np.int64]:
    """[n] sample sizes. Together they cannot exceed the file: in a sound one no two samples share bytes."""
    stsz = stbl.find(b"stsz")
    if stsz is not None:
        same, count = stsz.number(4), stsz.number(8)
        if count > min(MAX_SAMPLES, room):
            raise DataError(f"{path}: 'stsz' claims {count} frames in a file of {room} bytes")
        sizes = np.full(count, same, np.int64) if same else stsz.rows(b"stsz", ">u4", 1, at=8)[:, 0]
    else:
        stz2 = stbl.need(b"stz2")
        field, count = stz2.number(7, 1), stz2.number(8)
        if field not in (8, 16) or count > MAX_SAMPLES:
            raise DataError(f"{path}: 'stz2' claims {count} frames of {field}-bit sizes; 8 and 16 are read")
        sizes = stz2.rows(b"stz2", ">u1" if field == 8 else ">u2", 1, at=8)[:, 0]
    if len(sizes) == 0:
        raise DataError(f"{path}: the video track has no frames")
    if int(sizes.sum()) > room:
        raise DataError(f"{path}: its frames add up to {int(sizes.sum())} bytes, the file has {room}")
    return sizes


def _repeat(rows: NDArray[np.int64], n: int, kind: bytes, path: Path) -> NDArray[np.int64]:
    """[count, value] rows as [n] values."""
    total = int(rows[:, 0].sum())
    if total != n:
        raise DataError(f"{path}: {_name(kind)} describes {total} frames, the track has {n}")
    return np.repeat(rows[:, 1], rows[:, 0])


def _sync(stbl: _Boxes, n: int, path: Path) -> NDArray[np.bool_]:
    """[n] True where decoding can start; a track without 'stss' can start anywhere."""
    stss = stbl.find(b"stss")
    if stss is None:
        return np.ones(n, np.bool_)
    numbers = stss.rows(b"stss", ">u4", 1)[:, 0]
    if len(numbers) and (numbers.min() < 1 or numbers.max() > n):
        raise DataError(f"{path}: 'stss' names frame {int(numbers.max())} of {n}")
    sync = np.zeros(n, np.bool_)
    sync[numbers - 1] = True
    return sync


def _offsets(stbl: _Boxes, sizes: NDArray[np.int64], path: Path, offset: int, stop: int) -> NDArray[np.int64]:
    """[n] absolute file offsets from the chunk tables; every sample must lie inside [offset, stop)."""
    stco = stbl.find(b"stco")
    if stco is not None:
        chunks = stco.rows(b"stco", ">u4", 1)[:, 0]
    else:
        chunks = stbl.need(b"co64").rows(b"co64", ">i8", 1)[:, 0]
    stsc = stbl.need(b"stsc").rows(b"stsc", ">u4", 3)
    first, per_chunk = stsc[:, 0], stsc[:, 1]
    rising = len(stsc) > 0 and first[0] == 1 and (np.diff(first) > 0).all() and first[-1] <= len(chunks)
    counts = (
        np.repeat(per_chunk, np.diff(np.append(first, len(chunks) + 1))) if rising else np.zeros(0, np.int64)
    )
    if int(counts.sum()) != len(sizes):
        raise DataError(
            f"{path}: 'stsc' places {int(counts.sum())} frames in {len(chunks)} chunks,"
            f" the track has {len(sizes)}"
        )
    before = np.cumsum(sizes) - sizes
    firsts = np.cumsum(counts) - counts
    filled = counts > 0
    base = chunks[filled] - before[firsts[filled]]
    starts = offset + before + np.repeat(base, counts[filled])
    outside = (starts < offset) | (starts + sizes > stop)
    if outside.any():
        frame = int(np.flatnonzero(outside)[0])
        raise DataError(
            f"{path}: frame {frame} lies at byte {int(starts[frame])}, outside bytes {offset} to {stop}."
            "  The file is cut short or damaged; fetch it again."
        )
    return starts


def _edits(track: _Boxes) -> tuple[Edit, ...]:
    edts = track.find(b"edts")
    elst = edts.find(b"elst") if edts else None
    if elst is None:
        return ()
    wide = elst.number(0, 1) == 1
    rows = elst.rows(b"elst", ">u4", 5 if wide else 3)
    if len(rows) > MAX_BOXES:
        raise DataError(f"{track.path}: an edit list of {len(rows)} entries")
    edits = []
    for number in range(len(rows)):
        at = 8 + number * (20 if wide else 12)
        step = 8 if wide else 4
        rate = elst.number(at + 2 * step, 4, signed=True) / 65536
        edits.append(Edit(elst.number(at, step), elst.number(at + step, step, signed=True), rate))
    return tuple(edits)
