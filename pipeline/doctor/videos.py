"""Video files by their sample tables, without decoding: as many frames as rows, each where its row looks for it.

lerobot finds the frame of a row at from_timestamp + timestamp, to 0.1 ms; ranges are checked against the very
times of the frames in the file, so that a shift of one frame, or a tenth of one, is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...schemas.errors import DataError
from ...schemas.problems import WARN
from .checks import VIDEO, Findings, Found, Level, check
from .subject import Place, Subject, is_there

if TYPE_CHECKING:
    from ...video.mp4 import SampleTable

TOLERANCE_S = 1e-4
ENOUGH_SAMPLES = 16  # equal sizes of so many samples in a row, and the first byte for byte, are no chance

States = Callable[[int], "NDArray[np.float64] | None"]


@dataclass
class VideoFile:
    """One video file of a camera; `seen` is shared by all files of the camera: samples -> who has them."""

    subject: Subject
    camera: str
    place: Place
    table: SampleTable
    seen: dict[bytes, Stretch]
    states: States  # observation.state of an episode: the same numbers may well show the same pictures

    @property
    def where(self) -> str:
        return self.subject.name_of(self.place.path)

    @cached_property
    def times(self) -> NDArray[np.float64]:
        """Seconds at which frames are shown, from the first [n]."""
        return self.table.times / self.table.timescale

    def stamps(self, name: str) -> NDArray[np.float64]:
        """from_timestamp or to_timestamp of the episodes here, in seconds."""
        return self.subject.numbers[f"videos/{self.camera}/{name}"][self.place.episodes].astype(np.float64)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        return self.subject.lengths[self.place.episodes]

    @cached_property
    def first_frames(self) -> NDArray[np.int64]:
        """Number in the file of each episode's first frame, by from_timestamp."""
        return frame_at(self.times, self.stamps("from_timestamp"))

    @property
    def has_stamps(self) -> bool:
        return f"videos/{self.camera}/from_timestamp" in self.subject.numbers


def frame_at(times: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.int64]:
    """The frame shown nearest to each time; beyond the last one, as if frames went on at the same rate."""
    if len(times) < 2:
        return np.zeros(len(wanted), np.int64)
    step = times[-1] / (len(times) - 1) or 1.0
    right = np.clip(np.searchsorted(times, wanted), 1, len(times) - 1)
    near = np.where(wanted - times[right - 1] < times[right] - wanted, right - 1, right)
    outside = (wanted > times[-1] + step / 2) | (wanted < -step / 2)
    finite = np.where(np.isfinite(wanted), np.clip(wanted, -1e9, 1e9), 0)
    return np.where(outside, np.rint(finite / step).astype(np.int64), near)


def open_video_file(
    subject: Subject, camera: str, place: Place, seen: dict[bytes, Stretch], states: States
) -> VideoFile | None:
    """None, and remembered, where the file has no table that makes sense."""
    from ...video.mp4 import read_table

    if not is_there(place.path) or place.path.stat().st_size == 0:
        return None  # `files_are_there` has said so
    try:
        return VideoFile(subject, camera, place, read_table(place.path), seen, states)
    except (DataError, OSError, ValueError, MemoryError) as error:
        subject.broken[place.path] = str(error)
        return None


@check("video-size", VIDEO, Level.SAMPLED)
def pictures_have_the_declared_size(video: VideoFile) -> Findings:
    told = video.subject.features[video.camera]
    shape, names = [int(n) for n in told["shape"]], told.get("names")
    size = shape[:2]
    if isinstance(names, list) and {"height", "width"} <= set(map(str, names)):
        size = [shape[names.index("height")], shape[names.index("width")]]
    elif shape[0] in (1, 3) and shape[2] not in (1, 3):
        size = shape[1:]
    found = [video.table.height, video.table.width]
    if found != size:
        yield Found(
            video.where, f"pictures are {found[0]} x {found[1]}, declared {size[0]} x {size[1]} (H x W)"
        )


@check("video-rate", VIDEO, Level.SAMPLED)
def frames_come_at_the_datasets_rate(video: VideoFile) -> Findings:
    fps = video.table.fps
    if not video.subject.fps:
        return
    if fps is None:
        yield Found(video.where, "its frame rate varies: lerobot counts frames by an average rate")
    elif abs(float(fps) / video.subject.fps - 1) > 1e-6:
        yield Found(video.where, f"{float(fps):g} frames a second, the dataset has {video.subject.fps}")


@check("video-count", VIDEO, Level.SAMPLED)
def the_file_has_its_episodes_frames(video: VideoFile) -> Findings:
    frames, expected = len(video.table.shown), int(video.lengths.sum())
    if frames < expected:
        yield Found(video.where, f"{frames} frames for {expected} rows")
    elif frames > expected:
        yield Found(
            video.where,
            f"{frames} frames for {expected} rows: {frames - expected} belong to no episode",
            WARN,
        )


@check("video-range", VIDEO, Level.SAMPLED)
def every_row_finds_its_frame(video: VideoFile) -> Findings:
    """Ranges begin on a frame, last as long as their rows, share no frame, and end inside the file."""
    fps = video.subject.fps
    if not video.has_stamps or not fps or video.table.fps != fps:
        return
    start = video.stamps("from_timestamp")
    first, total = video.first_frames, len(video.table.shown)
    for i, e in enumerate(video.place.episodes):
        if not np.isfinite(start[i]):
            yield Found(video.where, f"episode {e}: from_timestamp is {start[i]}")
            return
        off = start[i] - (video.times[first[i]] if 0 <= first[i] < total else first[i] / fps)
        if abs(off) > TOLERANCE_S:
            yield Found(
                video.where,
                f"episode {e} begins at {start[i]:.6f} s, {off * 1e3:+.2f} ms from frame {first[i]} (0.1 is allowed)",
            )
        elif first[i] < 0 or first[i] + video.lengths[i] > total:
            yield Found(
                video.where,
                f"episode {e} takes frames {first[i]} to {first[i] + video.lengths[i]}, the file has {total}",
            )
    if f"videos/{video.camera}/to_timestamp" in video.subject.numbers:
        span = video.stamps("to_timestamp") - start
        wrong = np.flatnonzero(~(np.abs(span - video.lengths / fps) < 0.5 / fps))
        if len(wrong):
            i = int(wrong[0])
            yield Found(
                video.where,
                f"episode {video.place.episodes[i]} spans {span[i]:.4f} s, its {video.lengths[i]} frames last "
                f"{video.lengths[i] / fps:.4f} s",
            )
    order = np.argsort(first, kind="stable")
    ends = (first + video.lengths)[order]
    shared = np.flatnonzero(first[order][1:] < ends[:-1])
    if len(shared):
        a, b = video.place.episodes[order[shared[0]]], video.place.episodes[order[shared[0] + 1]]
        yield Found(
            video.where,
            f"episodes {a} and {b} share {int(ends[shared[0]] - first[order][shared[0] + 1])} frames",
        )
    gaps = np.flatnonzero(first[order] != np.concatenate([[0], ends[:-1]]))
    if len(gaps) and not len(shared) and total == int(video.lengths.sum()):
        i = int(order[gaps[0]])
        yield Found(
            video.where,
            f"episode {video.place.episodes[i]} begins at frame {first[i]}, after frames of nobody",
        )


@check("video-info", VIDEO, Level.SAMPLED)
def info_describes_the_stream(video: VideoFile) -> Findings:
    info: dict[str, Any] = video.subject.features[video.camera].get("info") or {}
    found = {
        "video.codec": video.table.codec,
        "video.height": video.table.height,
        "video.width": video.table.width,
    }
    if video.table.fps is not None:
        found["video.fps"] = float(video.table.fps)
    for name, value in found.items():
        told = info.get(name)
        if told is None or told == value:
            continue
        if name == "video.codec" and {str(told), str(value)} <= {
            "av1",
            "libdav1d",
            "libsvtav1",
            "libaom-av1",
        }:
            continue
        if name == "video.fps" and video.table.fps != video.subject.fps:
            continue  # `frames_come_at_the_datasets_rate` has said so
        yield Found(video.where, f"info says {name} {told}, the stream {value}")


@check("video-repeated", VIDEO, Level.SAMPLED)
def no_video_serves_two_episodes(video: VideoFile) -> Findings:
    """Two episodes whose samples are the very same for as long as both last, though their numbers differ."""
    if not video.has_stamps:
        return
    total = len(video.table.shown)
    for e, first, length in zip(video.place.episodes, video.first_frames, video.lengths, strict=True):
        if length < ENOUGH_SAMPLES or first < 0 or first + length > total:
            continue
        stretch = Stretch(int(e), video.place.path, video.table, int(first), int(length))
        if not stretch.varied:
            continue  # a camera that sees nothing move writes equal samples by nature
        other = video.seen.setdefault(stretch.signature(ENOUGH_SAMPLES), stretch)
        frames = min(stretch.length, other.length)
        same = other is stretch or (
            frames > 2 * ENOUGH_SAMPLES and stretch.signature(frames) != other.signature(frames)
        )
        if not same and not _same_start(video.states(other.episode), video.states(int(e)), frames):
            yield Found(video.where, f"episode {e} shows the video of episode {other.episode}, byte for byte")


@dataclass(frozen=True)
class Stretch:
    """The samples of one episode in a video file, as they are shown."""

    episode: int
    path: Path
    table: SampleTable
    first: int
    length: int

    @property
    def varied(self) -> bool:
        """Whether samples differ in size as those of a moving picture do."""
        return len(np.unique(self.table.sizes[self._samples(self.length)])) > max(4, self.length // 8)

    def _samples(self, frames: int) -> NDArray[np.int64]:
        return self.table.shown[self.first : self.first + frames]

    def signature(self, frames: int) -> bytes:
        """Sizes of the first `frames` samples, and the bytes of the first and the last."""
        samples = self._samples(frames)
        found = [self.table.sizes[samples].tobytes()]
        with open(self.path, "rb") as file:
            for sample in (samples[0], samples[-1]):
                file.seek(int(self.table.offsets[sample]))
                found.append(file.read(int(self.table.sizes[sample])))
        return b"".join(found)


def _same_start(a: NDArray[np.float64] | None, b: NDArray[np.float64] | None, frames: int) -> bool:
    if a is None or b is None:
        return False
    return np.array_equal(a[:frames], b[:frames])
