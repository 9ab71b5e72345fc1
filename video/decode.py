"""Compressed samples back to pictures: any frame by its number, in order, each group of pictures once.

Frame i is the i-th picture shown, counted in the sample table (`mp4.SampleTable.shown`); no floating-point
time stamp is ever looked up. Pictures are uint8 RGB [n, H, W, 3], row 0 at the top.

Backends   pyav        samples read by our own table and given to the decoder: no container is probed, so a
                       file opens in a millisecond, also inside a tar
           decord      decord2, the maintained fork (the original cannot decode AV1)
           torchcodec  what lerobot prefers; needs FFmpeg's shared libraries on the machine
Colour     the stream's own matrix and range; BT.601 limited where it is silent, as every player assumes

Damaged samples raise DataError with file and frame. Readers are for one thread; `ReaderCache` keeps a few.
"""

import ctypes
import io
import os
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from ..schemas.episode import VideoClip
from ..schemas.errors import DataError, UsageError, unknown_name
from .encode import AV1, H264, Encoder
from .mp4 import SampleTable, entry_box, read_table, write_mp4

if TYPE_CHECKING:
    import av

# In order of choice. Measured on one core, 20,000 frames of 128x128 in our H.264, random pairs of frames:
# pyav 0.26 ms (opens in 1.3 ms), torchcodec 0.35 ms (30-90 ms, after importing torch), decord 0.70 ms (21 ms).
# In AV1 0.55, 0.59 and 1.0 ms; in sequence all three cost the same.
BACKENDS = ("pyav", "decord", "torchcodec")

MAX_IN_MEMORY = 1 << 28  # decord reads a file-like object whole

# Frames of a wanted one: sorted, distinct numbers in, one [H, W, 3] picture each out.
Frames = Callable[[NDArray[np.int64]], Iterator[NDArray[np.uint8]]]


class VideoReader:
    """The frames of one video. `height` and `width` are those of the pictures returned, after any resize."""

    def __init__(
        self,
        path: Path,
        table: SampleTable,
        backend: str,
        resize: tuple[int, int] | None,
        frames: Frames,
        close: Callable[[], None],
    ) -> None:
        self.path, self.backend = path, backend
        self.codec, self.fps = table.codec, table.fps
        self.height, self.width = resize or (table.height, table.width)
        self.keyframe_interval = table.keyframe_interval
        self._length = len(table.shown)
        self._frames, self._close = frames, close

    def __len__(self) -> int:
        return self._length

    def read(self, indices: "Sequence[int] | NDArray[np.integer] | slice") -> NDArray[np.uint8]:
        """[n, H, W, 3] of the frames asked for, in that order; repeats are decoded once."""
        if isinstance(indices, slice):
            asked = np.arange(*indices.indices(self._length), dtype=np.int64)
        else:
            asked = np.asarray(indices, np.int64)
        if len(asked) and (asked.min() < 0 or asked.max() >= self._length):
            raise IndexError(f"{self.path}: frames {asked.min()} to {asked.max()} asked of {self._length}")
        in_order = bool((asked[1:] > asked[:-1]).all())
        wanted, places = (asked, asked) if in_order else np.unique(asked, return_inverse=True)
        decoded = np.empty((len(wanted), self.height, self.width, 3), np.uint8)
        row = -1
        for row, picture in enumerate(self._frames(wanted)):
            decoded[row] = picture
        if row + 1 != len(wanted):
            raise DataError(f"{self.path}: {self.backend} gave {row + 1} of {len(wanted)} frames")
        return decoded if in_order else decoded[places]

    def blocks(self, n: int) -> Iterator[NDArray[np.uint8]]:
        """All frames in order, n at a time; memory is one block."""
        for start in range(0, self._length, n):
            yield self.read(slice(start, start + n))

    def close(self) -> None:
        self._close()

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_video(
    path: Path,
    backend: str = "auto",
    offset: int = 0,
    size: int | None = None,
    resize: tuple[int, int] | None = None,
) -> VideoReader:
    """A reader of the MP4 at `path`, or of its `size` bytes at `offset`; `resize` is (height, width)."""
    if backend == "auto":
        name = choose_backend()[0]
    elif backend in _OPENERS:
        name = backend
        problem = backend_problem(name)
        if problem:
            raise UsageError(f"video backend '{name}' does not work here: {problem}\n  Use 'auto'.")
    else:
        raise unknown_name("video backend", backend, ("auto", *BACKENDS))
    return _open(path, name, offset, size, resize)


def _open(
    path: Path, name: str, offset: int = 0, size: int | None = None, resize: tuple[int, int] | None = None
) -> VideoReader:
    table = read_table(path, offset, size)
    if len(table.shown) == 0:
        raise DataError(f"{path}: its edit list shows no frame")
    if not table.upright:
        raise DataError(
            f"{path}: the display matrix turns or mirrors the picture.  Re-encode it upright first."
        )
    stop = path.stat().st_size if size is None else offset + size
    frames, close = _OPENERS[name](table, offset, stop - offset, resize)
    return VideoReader(path, table, name, resize, frames, close)


@cache
def choose_backend() -> tuple[str, str]:
    """The first backend that decodes here, and why it was chosen."""
    refused = []
    for name in BACKENDS:
        problem = backend_problem(name)
        if problem is None:
            reason = (
                f"decodes {H264.name} and {AV1.name} here, the fastest of {', '.join(BACKENDS)} that does"
            )
            return name, "; ".join([reason, *refused])
        refused.append(f"not {name}: {problem}")
    raise DataError("no video backend works: " + "; ".join(refused))


@cache
def backend_problem(name: str) -> str | None:
    """Why `name` cannot be used here: it decodes a small H.264 and a small AV1 clip, or says why not.

    The clips lie in a file without a name: a process that is killed while a library tries leaves nothing behind.
    """
    for codec in (H264, AV1):
        grey = np.broadcast_to(np.array([60, 120, 180], np.uint8)[:, None, None, None], (3, 64, 64, 3))
        sink = io.BytesIO()
        encoder = Encoder(codec, 64, 64, 10, sink)
        encoder.write(grey)
        clip = encoder.finish()
        with tempfile.TemporaryFile() as file:
            path = Path(f"/dev/fd/{file.fileno()}")
            write_mp4(path, clip.sample_entry, 64, 64, 10, [clip.run(sink.getvalue())])
            try:
                with _open(path, name) as reader:
                    error = np.abs(reader.read([2, 0]).astype(int) - grey[[2, 0]]).max()
            except Exception as problem:  # noqa: BLE001 - a foreign library may fail in any way; say which
                return f"{codec.name}: {type(problem).__name__}: {str(problem).splitlines()[0][:200]}"
        if error > 4:
            return f"{codec.name}: colours differ by {error} grey levels from what was encoded"
    return None


def pixel_format(path: Path, offset: int = 0, size: int | None = None) -> str:
    """ffmpeg's name of the stored pixels ("yuv420p"), from the first frame."""
    decoder = _SampleDecoder(read_table(path, offset, size))
    try:
        return next(decoder.frames(np.zeros(1, np.int64))).format.name
    finally:
        decoder.close()


def transcode(
    clip: VideoClip, encoder: Encoder, keep: Collection[int] = (), stride: int = 1
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Decode a clip and encode it again at the encoder's size, every `stride`-th frame, each decoded once.

    Pictures stay in YUV from decoder to encoder. Yields (frame, RGB [H, W, 3]) of the output frames numbered in
    `keep`, as they will be seen but for the encoder's loss: what statistics need. Run it to its end, then call
    `encoder.finish()`.
    """
    table = read_table(clip.path, clip.offset, clip.size)
    last, stride = clip.end, clip.stride * stride
    if clip.first_frame < 0 or last > len(table.shown):
        raise DataError(
            f"{clip.path}: frames {clip.first_frame} to {last} are needed, the video has {len(table.shown)}"
        )
    if not table.upright:
        raise DataError(f"{clip.path}: the display matrix turns the picture.  Re-encode it upright first.")
    scaler, painter = _Painter(encoder.height, encoder.width, encoder.codec.pix_fmt), _Painter()
    decoder = _SampleDecoder(table)
    try:
        wanted = np.arange(clip.first_frame, last, stride, dtype=np.int64)
        for number, frame in enumerate(decoder.frames(wanted)):
            scaled = scaler.convert(frame)
            encoder.write_frame(scaled)
            if number in keep:
                yield number, painter.picture(scaled, stored=False)
    finally:
        decoder.close()


class ReaderCache:
    """Open readers, the least recently used closed first. One per process and thread; a fork starts empty."""

    def __init__(self, max_open: int = 16, backend: str = "auto") -> None:
        if max_open < 1:
            raise ValueError(f"max_open is {max_open}; at least one reader must stay open")
        self.max_open, self.backend = max_open, backend
        self.hits = self.misses = 0
        self._open: OrderedDict[tuple[Any, ...], VideoReader] = OrderedDict()
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self._open)

    def get(
        self,
        path: Path,
        offset: int = 0,
        size: int | None = None,
        resize: tuple[int, int] | None = None,
    ) -> VideoReader:
        if self._process != os.getpid():  # decoders must not be shared with the parent
            self._open, self._process = OrderedDict(), os.getpid()
        key = (path, offset, size, resize)
        reader = self._open.get(key)
        if reader is None:
            self.misses += 1
            reader = self._open[key] = open_video(path, self.backend, offset, size, resize)
            while len(self._open) > self.max_open:
                self._open.popitem(last=False)[1].close()
        else:
            self.hits += 1
            self._open.move_to_end(key)
        return reader

    def clear(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return {"max_open": self.max_open, "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


# -- pyav ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Order:
    """What random access needs of a sample table; 17 bytes a frame where frames are shown as decoded."""

    shown: NDArray[np.int64] | None  # None: frame i is sample i
    ranks: NDArray[np.int64] | None  # None: sample j is shown j-th
    starts: NDArray[np.int64]  # samples decoding can start at
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]

    @staticmethod
    def of(table: SampleTable) -> "_Order":
        count = np.arange(len(table))
        straight = len(table.shown) == len(table) and bool((table.shown == count).all())
        starts = np.flatnonzero(table.sync)
        return _Order(
            None if straight else table.shown,
            None if straight else table.ranks,
            starts if len(starts) else np.zeros(1, np.int64),
            table.offsets,
            table.sizes,
        )

    def sample(self, frame: int) -> int:
        return frame if self.shown is None else int(self.shown[frame])

    def rank(self, sample: int) -> int:
        return sample if self.ranks is None else int(self.ranks[sample])

    def start(self, sample: int) -> int:
        """The sample to begin decoding at for `sample`.

        The last sync sample before it, unless `sample` is shown before that one (an open group of pictures):
        then it may also need the group before.
        """
        place = int(np.searchsorted(self.starts, sample, side="right")) - 1
        while place > 0 and self.rank(int(self.starts[place])) > self.rank(sample):
            place -= 1
        return int(self.starts[max(place, 0)])


class _SampleDecoder:
    """ffmpeg's decoder fed from a sample table; goes on where it stopped when the next frame lies ahead."""

    def __init__(self, table: SampleTable) -> None:
        self.path, self.height, self.width = table.path, table.height, table.width
        self.order = _Order.of(table)
        self._context = _decoder_context(table)
        self._file = os.open(table.path, os.O_RDONLY)
        self._restart(0)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        # `os` is None once Python is leaving, which closes files by itself.
        if hasattr(self, "_file") and os is not None:
            self.close()

    def _restart(self, sample: int) -> None:
        self._next, self._last, self._drained = sample, -1, False  # sample to feed; rank last given out
        self._ready: list[av.VideoFrame] = []

    def frames(self, wanted: NDArray[np.int64]) -> "Iterator[av.VideoFrame]":
        """The frames `wanted` (sorted, distinct), as the decoder gives them."""
        from av.error import FFmpegError

        for index in wanted.tolist():
            sample = self.order.sample(index)
            rank, start = self.order.rank(sample), self.order.start(sample)
            if self._drained or rank <= self._last or start > self._next or self._next == 0:
                self._context.flush_buffers()
                self._restart(start)
            try:
                found = self._advance(rank)
            except FFmpegError as error:
                self._restart(0)
                raise DataError(
                    f"{self.path}: frame {index} cannot be decoded ({error.strerror}).  The file is damaged:"
                    " fetch it again, or leave the episode out."
                ) from error
            if found is None or found.is_corrupt:
                self._restart(0)
                raise DataError(
                    f"{self.path}: frame {index} is damaged: the decoder gave"
                    f" {'nothing' if found is None else 'a patched picture'} for it.  Fetch the file again."
                )
            if (found.height, found.width) != (self.height, self.width):
                raise DataError(
                    f"{self.path}: frame {index} is {found.width}x{found.height} pixels,"
                    f" the file's table says {self.width}x{self.height}"
                )
            yield found

    def _advance(self, rank: int) -> "av.VideoFrame | None":
        """Feed samples until the picture shown `rank`-th comes out; None when it never does."""
        import av

        total = len(self.order.sizes)
        while True:
            while self._ready:
                frame = self._ready.pop(0)
                self._last = cast(int, frame.pts)
                if self._last == rank:
                    return frame
                if self._last > rank:
                    return None
            if self._drained:
                return None
            if self._next == total:
                self._ready, self._drained = self._context.decode(None), True
                continue
            size = int(self.order.sizes[self._next])
            data = os.pread(self._file, size, int(self.order.offsets[self._next]))
            if len(data) < size:
                return None
            packet = av.Packet(data)
            packet.pts = packet.dts = self.order.rank(self._next)
            self._next += 1
            self._ready = self._context.decode(packet)


def _decoder_context(table: SampleTable) -> "av.VideoCodecContext":
    """A decoder that stops at damage instead of patching over it, and never allocates more than the table says."""
    import av
    from av.error import FFmpegError

    configuration = {"h264": b"avcC", "hevc": b"hvcC", "av1": b"av1C", "mpeg4": b"esds"}.get(table.codec)
    name = "libdav1d" if table.codec == "av1" and "libdav1d" in av.codecs_available else table.codec
    try:
        context = cast("av.VideoCodecContext", av.CodecContext.create(name, "r"))
    except ValueError as error:
        raise DataError(f"{table.path}: codec '{table.codec}' has no decoder here") from error
    if configuration is not None:
        extradata = entry_box(table.sample_entry, configuration)
        if extradata is None:
            raise DataError(f"{table.path}: its {table.codec} track has no {configuration.decode()} box")
        context.extradata = _mpeg4_configuration(extradata) if configuration == b"esds" else extradata
    context.options = {
        "err_detect": "explode",
        # coded pictures are padded to whole blocks and edges
        "max_pixels": str((table.width + 256) * (table.height + 256)),
        # with B-frames: wait as long as the standard allows, or the decoder drops what comes out of order
        "strict": "1" if (np.diff(table.ranks) < 0).any() else "0",
    }
    context.thread_count = 1  # several processes decode at once; dav1d then also gives each picture at once
    try:
        context.open()
    except FFmpegError as error:
        raise DataError(
            f"{table.path}: the {table.codec} decoder refuses the file's settings ({error.strerror})."
            "  The file is damaged: fetch it again."
        ) from error
    return context


def _mpeg4_configuration(esds: bytes) -> bytes:
    """The DecoderSpecificInfo (tag 5) of an esds box: ISO/IEC 14496-1, nested descriptors with 7-bit sizes."""
    at, skip = 4, {3: 3, 4: 13}  # ES_Descriptor (no flags) and DecoderConfigDescriptor headers
    while at < len(esds):
        tag, size, at = esds[at], 0, at + 1
        for _ in range(4):
            byte = esds[at] if at < len(esds) else 0
            size, at = size << 7 | byte & 127, at + 1
            if byte < 128:
                break
        if tag == 5:
            return esds[at : at + size]
        at += skip.get(tag, size)
    return b""


class _Painter:
    """Decoder frames to another size and pixel format, in the stream's own colours; keeps its scaler."""

    def __init__(self, height: int = 0, width: int = 0, pix_fmt: str = "rgb24") -> None:
        from av.video.reformatter import VideoReformatter

        self._size, self._pix_fmt = (height, width), pix_fmt
        self._reformatter = VideoReformatter()

    def convert(self, frame: "av.VideoFrame", stored: bool = True) -> "av.VideoFrame":
        """`stored` frames carry their stream's colour tags; others are BT.601 limited, as our encoder takes."""
        height, width = self._size if self._size[0] else (frame.height, frame.width)
        smaller = height < frame.height or width < frame.width
        colour: dict[str, Any] = {}
        if stored:
            # ffmpeg's numbers (AVColorSpace 1 BT.709, 4 FCC, 7 SMPTE 240M, 9 BT.2020) are swscale's too
            matrix = frame.colorspace if frame.colorspace in (1, 4, 7, 9) else 5  # BT.601
            full = frame.color_range == 2 or frame.format.name.startswith("yuvj")
            colour = {
                "src_colorspace": int(matrix),
                "dst_colorspace": 5,
                "src_color_range": 2 if full else 1,
                "dst_color_range": 1,
            }
        return self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format=self._pix_fmt,
            interpolation="AREA" if smaller else "BILINEAR",
            **colour,
        )

    def picture(self, frame: "av.VideoFrame", stored: bool = True) -> NDArray[np.uint8]:
        """[H, W, 3]; a view that lives as long as it is held."""
        plane = self.convert(frame, stored).planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        return rows[:, : plane.width * 3].reshape(plane.height, plane.width, 3)


def _open_pyav(
    table: SampleTable, offset: int, size: int, resize: tuple[int, int] | None
) -> tuple[Frames, Callable[[], None]]:
    decoder, painter = _SampleDecoder(table), _Painter(*(resize or (0, 0)))

    def frames(wanted: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
        for frame in decoder.frames(wanted):
            yield painter.picture(frame)

    return frames, decoder.close


# -- decord and torchcodec ----------------------------------------------------------------------------------


class _Slice(io.RawIOBase):
    """The bytes [offset, offset + size) of a file, as a file of their own."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        super().__init__()
        self._file = os.open(path, os.O_RDONLY)
        self._offset, self._size, self._at = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        data = os.pread(self._file, count, self._offset + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        if not self.closed:
            os.close(self._file)
        super().close()


def _import_decord() -> Any:
    """decord, its libraries kept to itself.

    It loads its FFmpeg with global symbols; a torchcodec imported later then decodes AV1 with half of one and
    half of the other and the process dies (seen with dav1d 7 and 6).
    """
    if "decord" not in sys.modules:
        shared = ctypes.RTLD_GLOBAL
        ctypes.RTLD_GLOBAL = ctypes.RTLD_LOCAL  # pyright: ignore[reportAttributeAccessIssue]
        try:
            import decord
        finally:
            ctypes.RTLD_GLOBAL = shared  # pyright: ignore[reportAttributeAccessIssue]
    import decord

    return decord


# Those decord2 3.4 returns every frame of: it stops in HEVC with B-frames, and seeks wrongly in MPEG-4 part 2.
_DECORD_CODECS = ("h264", "av1")


def _open_decord(
    table: SampleTable, offset: int, size: int, resize: tuple[int, int] | None
) -> tuple[Frames, Callable[[], None]]:
    if table.codec not in _DECORD_CODECS or table.has_open_gops:
        kind = f"{table.codec} with open groups of pictures" if table.has_open_gops else table.codec
        raise DataError(f"{table.path}: decord does not read every frame of {kind}; use the pyav backend")
    decord = _import_decord()
    whole = offset == 0 and size == table.path.stat().st_size
    if not whole and size > MAX_IN_MEMORY:
        raise DataError(f"{table.path}: decord would read {size} bytes into memory; use the pyav backend")
    source = str(table.path) if whole else _Slice(table.path, offset, size)
    try:
        reader = decord.VideoReader(source, num_threads=1)
    except (decord.DECORDError, RuntimeError) as error:
        raise DataError(f"{table.path}: decord cannot open it: {str(error).splitlines()[0]}") from error
    _same_length(table, len(reader), "decord")

    def frames(wanted: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
        for block in _bounded(wanted):
            try:
                pictures = reader.get_batch(block.tolist()).asnumpy()
            except (decord.DECORDError, RuntimeError) as error:
                raise _damaged(table.path, block, "decord", error) from error
            yield from _resized(pictures, resize)

    return frames, lambda: None


def _open_torchcodec(
    table: SampleTable, offset: int, size: int, resize: tuple[int, int] | None
) -> tuple[Frames, Callable[[], None]]:
    from torchcodec.decoders import VideoDecoder

    source = _Slice(table.path, offset, size)
    try:
        # "exact" scans the packets; "approximate" trusts an average rate and misses in open groups of pictures
        decoder = VideoDecoder(source, seek_mode="exact", dimension_order="NHWC", num_ffmpeg_threads=1)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{table.path}: torchcodec cannot open it: {str(error).splitlines()[0]}") from error
    _same_length(table, len(decoder), "torchcodec")

    def frames(wanted: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
        for block in _bounded(wanted):
            try:
                pictures = decoder.get_frames_at(indices=block.tolist()).data.numpy()
            except (RuntimeError, IndexError) as error:
                raise _damaged(table.path, block, "torchcodec", error) from error
            yield from _resized(pictures, resize)

    return frames, source.close


def _bounded(wanted: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """At most 32 frames a call: these backends return a whole batch at once."""
    for start in range(0, len(wanted), 32):
        yield wanted[start : start + 32]


def _same_length(table: SampleTable, found: int, backend: str) -> None:
    if found != len(table.shown):
        raise DataError(
            f"{table.path}: {backend} counts {found} frames, the file's table shows {len(table.shown)}."
            "  Use the pyav backend, which follows the table."
        )


def _damaged(path: Path, block: NDArray[np.int64], backend: str, error: Exception) -> DataError:
    return DataError(
        f"{path}: one of frames {block[0]} to {block[-1]} cannot be decoded by {backend}"
        f" ({str(error).splitlines()[0][:200]}).  The file is damaged: fetch it again."
    )


def _resized(pictures: NDArray[np.uint8], resize: tuple[int, int] | None) -> Iterator[NDArray[np.uint8]]:
    """[n, H, W, 3] one by one, scaled in RGB."""
    if resize is None or pictures.shape[1:3] == resize:
        yield from pictures
        return
    import av

    painter = _Painter(*resize)
    for picture in pictures:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        yield painter.picture(frame, stored=False)


_OPENERS: dict[str, Callable[..., tuple[Frames, Callable[[], None]]]] = {
    "pyav": _open_pyav,
    "decord": _open_decord,
    "torchcodec": _open_torchcodec,
}
