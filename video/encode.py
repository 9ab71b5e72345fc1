"""Frames in memory to compressed samples: no PNG, no container, one encoder thread per process.

Payload    samples as an MP4 stores them (NAL units behind 4-byte lengths; AV1 temporal units without
           delimiters), appended to a sink, so that `mp4.write_mp4` later copies bytes and writes one table
Pictures   uint8 RGB [n, H, W, 3] to yuv420p, ITU-R BT.601 limited range, untagged: what lerobot writes
           through PyAV and what every decoder assumes of untagged video
Codecs     H264 is the default, AV1 is LeRobot's own setting (lerobot 0.6.1, configs/video.py)
Source     ITU-T H.264 Annex B, ISO/IEC 14496-15 (avcC), AV1 specification 5.3-5.5, AV1-ISOBMFF (av1C)

The same frames give the same bytes; SVT-AV1 and x264 are deterministic with one thread.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import DataError, unknown_name
from .mp4 import Run, box, visual_entry

if TYPE_CHECKING:
    import av


@dataclass(frozen=True)
class Codec:
    """An encoder and its settings, as LeRobot records them in `info.json`."""

    name: str  # canonical: "h264", "av1"
    encoder: str  # ffmpeg's encoder
    crf: int
    preset: int | str
    g: int = 2  # frames from one key frame to the next: a random read decodes at most two
    pix_fmt: str = "yuv420p"
    fast_decode: int = 0
    extra_options: Mapping[str, str] = field(default_factory=dict)

    def options(self) -> dict[str, str]:
        """ffmpeg options for one thread."""
        options = {"g": str(self.g), "crf": str(self.crf), "preset": str(self.preset)}
        if self.encoder == "libsvtav1":
            options["svtav1-params"] = f"fast-decode={self.fast_decode}:lp=1"
        elif self.fast_decode:
            options["tune"] = "fastdecode"  # as lerobot translates it
        return options | {"threads": "1"} | dict(self.extra_options)

    def info(self, height: int, width: int, fps: int) -> dict[str, Any]:
        """The `info` block of a camera feature: what lerobot probes, then its encoder's settings."""
        return {
            "video.height": height,
            "video.width": width,
            "video.codec": self.name,
            "video.pix_fmt": self.pix_fmt,
            "video.fps": fps,
            "video.channels": 3,
            "has_audio": False,
            "video.g": self.g,
            "video.crf": self.crf,
            "video.preset": self.preset,
            "video.fast_decode": self.fast_decode,
            "video.video_backend": "pyav",
            "video.extra_options": dict(self.extra_options),
            "is_depth_map": False,
        }


# Measured on the LIBERO sample, 128x128, one core: mean PSNR of RGB, bytes a frame, microseconds to encode and
# to decode into RGB:
#   AV1 crf 30              36.7 dB  1283  2080  177
#   H264 veryfast crf 19    38.3 dB  1591   340  171
#   the same, fast decode   38.3 dB  1634   277   88    no CABAC, no deblocking
# Adaptive quantisation moves bits to where an eye would look for them and costs 0.6 dB; with a key frame
# every second frame look-ahead finds nothing, so it is off and packets come at once.
H264 = Codec(
    "h264",
    "libx264",
    crf=19,
    preset="veryfast",
    fast_decode=1,
    extra_options={"bf": "0", "aq-mode": "0", "rc-lookahead": "0", "mbtree": "0", "sc_threshold": "0"},
)
AV1 = Codec("av1", "libsvtav1", crf=30, preset=12)
PRESETS = {codec.name: codec for codec in (H264, AV1)}


def codec_named(name: str) -> Codec:
    if name not in PRESETS:
        raise unknown_name("codec", name, PRESETS)
    return PRESETS[name]


def copied_info(codec: str, pix_fmt: str, height: int, width: int, fps: int) -> dict[str, Any]:
    """The `info` block of a camera whose packets were copied: nothing is known of its encoder's settings."""
    return {
        "video.height": height,
        "video.width": width,
        "video.codec": codec,
        "video.pix_fmt": pix_fmt,
        "video.fps": fps,
        "video.channels": 3,
        "has_audio": False,
        "is_depth_map": False,
    }


@dataclass(frozen=True, eq=False)
class EncodedClip:
    """What one `Encoder` appended to its sink: n samples back to back, shown in decode order."""

    sample_entry: bytes
    width: int
    height: int
    sizes: NDArray[np.int64]  # [n] bytes
    sync: NDArray[np.bool_]  # [n]

    def __len__(self) -> int:
        return len(self.sizes)

    def run(self, source: Path | bytes, start: int = 0) -> Run:
        """These samples as `write_mp4` takes them, the first at byte `start` of `source`."""
        return Run(source, start + np.cumsum(self.sizes) - self.sizes, self.sizes, self.sync)


@contextmanager
def kept_schedule() -> Iterator[None]:
    """Open an encoder without letting it change how this process is scheduled.

    SVT-AV1 asks for SCHED_FIFO at priority 99 whenever it may, which is whenever it runs as root, as in most
    containers: the process and all its later threads would then starve everything else on the machine.
    """
    if not hasattr(os, "sched_getscheduler") or not Path("/proc/self/task").is_dir():
        yield
        return
    policy, param = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        for task in [int(entry.name) for entry in Path("/proc/self/task").iterdir()]:
            with suppress(ProcessLookupError):
                if os.sched_getscheduler(task) != policy:
                    os.sched_setscheduler(task, policy, param)


class Encoder:
    """One camera of one episode: `write` blocks of frames in order, then `finish`. Holds a frame or two.

    Both sides must be even (yuv420p halves them); anything else is refused rather than padded, since padding
    would shift every pixel coordinate a policy learns.
    """

    def __init__(self, codec: Codec, height: int, width: int, fps: int, sink: BinaryIO) -> None:
        # SVT-AV1 logs its settings on every open; SVT_LOG is read by the library when it starts.
        os.environ.setdefault("SVT_LOG", "1")
        import av
        from av.codec.context import Flags
        from av.error import FFmpegError
        from av.video.reformatter import VideoReformatter

        if height < 2 or width < 2 or height % 2 or width % 2:
            raise DataError(
                f"frames of {width}x{height} pixels: {codec.pix_fmt} needs even sides."
                f"  Resize them: --resize {max(2, width - width % 2)}x{max(2, height - height % 2)}"
            )
        context: av.VideoCodecContext = av.CodecContext.create(codec.encoder, "w")  # pyright: ignore[reportAssignmentType]
        context.width, context.height, context.pix_fmt = width, height, codec.pix_fmt
        context.time_base, context.framerate = Fraction(1, fps), Fraction(fps)
        context.options = codec.options()
        context.flags |= Flags.global_header  # parameter sets in the sample entry, not in every key frame
        try:
            with kept_schedule():
                context.open()
        except FFmpegError as error:
            raise DataError(
                f"{codec.encoder} cannot encode {width}x{height} pixels at {fps} fps: {error}."
                "  Use --codec h264, or a larger --resize."
            ) from error
        self.codec, self.height, self.width, self.fps = codec, height, width, fps
        self._context, self._sink = context, sink
        self._reformatter = VideoReformatter()  # keeps its scaler: making one costs more than using it
        self._frame = av.VideoFrame.from_numpy_buffer
        self._written = 0
        self._sizes: list[int] = []
        self._sync: list[bool] = []

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Encode [n, H, W, 3] RGB; frames of another size are resized in the pass that makes them yuv."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise ValueError(f"expected uint8 [n, H, W, 3], got {frames.dtype} {frames.shape}")
        smaller = frames.shape[1] > self.height or frames.shape[2] > self.width
        for picture in np.ascontiguousarray(frames):
            frame = self._reformatter.reformat(
                self._frame(picture, format="rgb24"),
                width=self.width,
                height=self.height,
                format=self.codec.pix_fmt,
                interpolation="AREA" if smaller else "BILINEAR",
            )
            self.write_frame(frame)

    def write_frame(self, frame: "av.VideoFrame") -> None:
        """Encode one picture that already has the encoder's size and pixel format."""
        if (frame.height, frame.width, frame.format.name) != (self.height, self.width, self.codec.pix_fmt):
            raise ValueError(
                f"expected {self.width}x{self.height} {self.codec.pix_fmt},"
                f" got {frame.width}x{frame.height} {frame.format.name}"
            )
        frame.pts, frame.time_base = self._written, self._context.time_base
        frame.pict_type = 0  # a transcoded frame remembers its old type, and the encoder would follow it
        self._written += 1
        self._take(self._context.encode(frame))

    def finish(self) -> EncodedClip:
        if self._written == 0:
            raise ValueError("no frame was written")
        self._take(self._context.encode(None))
        if len(self._sizes) != self._written:
            raise DataError(f"{self.codec.encoder} returned {len(self._sizes)} of {self._written} frames")
        extradata = self._context.extradata
        assert extradata is not None, "opened with a global header"
        del self._context  # libx264 keeps some MB until it is closed, and the caller may keep this object
        make_entry = avc_entry if self.codec.name == "h264" else av1_entry
        return EncodedClip(
            make_entry(extradata, self.width, self.height),
            self.width,
            self.height,
            np.array(self._sizes, np.int64),
            np.array(self._sync, np.bool_),
        )

    def _take(self, packets: "list[av.Packet]") -> None:
        to_sample = annex_b_to_sample if self.codec.name == "h264" else temporal_unit_to_sample
        for packet in packets:
            # Sizes and flags are stored in order; a reordering encoder would silently shuffle frames.
            if packet.pts != len(self._sizes):
                raise DataError(
                    f"{self.codec.encoder} returned frame {packet.pts}, expected {len(self._sizes)}"
                )
            sample = to_sample(bytes(packet))
            self._sink.write(sample)
            self._sizes.append(len(sample))
            self._sync.append(packet.is_keyframe)


def split_annex_b(data: bytes) -> Iterator[bytes]:
    """NAL units between start codes 00 00 01; zeros before a start code belong to it."""
    start = data.find(b"\0\0\1")
    while start >= 0:
        stop = data.find(b"\0\0\1", start + 3)
        unit = data[start + 3 : stop if stop >= 0 else len(data)].rstrip(b"\0")
        if unit:
            yield unit
        start = stop


def annex_b_to_sample(data: bytes) -> bytes:
    """An H.264 access unit with start codes -> NAL units behind 4-byte lengths; delimiters are dropped."""
    units = (unit for unit in split_annex_b(data) if unit[0] & 31 != 9)
    return b"".join(len(unit).to_bytes(4) + unit for unit in units)


def avc_entry(parameter_sets: bytes, width: int, height: int) -> bytes:
    """The avc1 sample entry of 8-bit 4:2:0 H.264 whose SPS and PPS stand in `parameter_sets` (Annex B)."""
    units = list(split_annex_b(parameter_sets))
    sps = [unit for unit in units if unit[0] & 31 == 7]
    pps = [unit for unit in units if unit[0] & 31 == 8]
    if len(sps) != 1 or not pps:
        raise ValueError(f"expected one SPS and a PPS, found {len(sps)} and {len(pps)}")
    record = (
        b"\1" + sps[0][1:4] + b"\xff\xe1"
    )  # version, profile, compatibility, level; 4-byte lengths; 1 SPS
    record += len(sps[0]).to_bytes(2) + sps[0] + bytes([len(pps)])
    record += b"".join(len(unit).to_bytes(2) + unit for unit in pps)
    if sps[0][1] in (100, 110, 122, 144):  # High profiles say chroma format 4:2:0 and 8 bits again
        record += b"\xfd\xf8\xf8\0"
    return visual_entry(b"avc1", width, height, box(b"avcC", record))


def split_obus(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """(type, whole OBU, its payload) of a low-overhead AV1 stream."""
    at = 0
    while at < len(data):
        head = data[at]
        body = at + 1 + (head >> 2 & 1)  # extension byte
        size = len(data) - body
        if head & 2:
            size, shift = 0, 0
            while True:  # leb128
                byte = data[body]
                size |= (byte & 127) << shift
                body, shift = body + 1, shift + 7
                if byte < 128:
                    break
        yield head >> 3 & 15, data[at : body + size], data[body : body + size]
        at = body + size


def temporal_unit_to_sample(data: bytes) -> bytes:
    """A temporal unit without delimiter (2), tile list (8) and padding (15), as AV1-ISOBMFF 2.4 asks."""
    return b"".join(whole for kind, whole, _ in split_obus(data) if kind not in (2, 8, 15))


def av1_entry(sequence_header: bytes, width: int, height: int) -> bytes:
    """The av01 sample entry of 8-bit 4:2:0 AV1; `sequence_header` holds the sequence header OBU."""
    found = [(whole, payload) for kind, whole, payload in split_obus(sequence_header) if kind == 1]
    if len(found) != 1:
        raise ValueError(f"expected one sequence header, found {len(found)}")
    whole, payload = found[0]
    profile, level, tier = _sequence_level(payload)
    # marker 1 and version 1; profile and level; tier, 8 bits, colour, 4:2:0 with unknown chroma position
    record = bytes([0x81, profile << 5 | level, tier << 7 | 0x0C, 0]) + whole
    return visual_entry(b"av01", width, height, box(b"av1C", record))


def _sequence_level(payload: bytes) -> tuple[int, int, int]:
    """seq_profile, seq_level_idx[0] and seq_tier[0] of an AV1 sequence header (5.5.1)."""
    bits = int.from_bytes(payload)
    left = 8 * len(payload)

    def take(count: int) -> int:
        nonlocal left
        left -= count
        return bits >> left & ((1 << count) - 1)

    profile, _still, reduced = take(3), take(1), take(1)
    if reduced:
        return profile, take(5), 0
    if take(1):  # timing_info: 2 x 32 bits, equal_picture_interval
        raise ValueError("an encoder that writes timing information needs more of the header read")
    take(1)  # initial_display_delay_present_flag
    take(5)  # operating_points_cnt_minus_1
    take(12)  # operating_point_idc[0]
    level = take(5)
    return profile, level, take(1) if level > 7 else 0
