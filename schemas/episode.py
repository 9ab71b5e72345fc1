"""Episodes: what a converter finds, checks and reads, whatever the raw format.

    Recording   a raw file (or set of files) found by name alone; nothing opened
    EpisodeRef  one episode in it, everything but pixels already checked; small, pickles, travels to workers
    Dropped     one episode that cannot be converted, with the reason and the remedy
    Episode     the columns in memory and the cameras as sources that read blocks of frames on demand

Shapes: T frames of the episode, H x W pixels, D dimensions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from .features import CameraFeature, Feature
from .problems import problems_of


class FrameSource(Protocol):
    """A camera whose frames we must encode: blocks of RGB, row 0 at the top."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Frames [start, stop) as [n, H, W, 3] uint8 RGB. Called in rising order, at most once per block."""
        ...


@dataclass(frozen=True)
class VideoClip:
    """A camera already recorded as one MP4 file, or as one member of an uncompressed tar or zip.

    `offset` and `size` locate the MP4 inside `path` (0 and the file's size for a plain file). `frames` is the
    number of frames the episode uses: `first_frame` and every `stride`-th after it. `held` is the open file that
    `path` leads to where it has no name of its own: a member inflated for this reading, gone with the clip.
    """

    path: Path
    offset: int
    size: int
    first_frame: int
    frames: int
    height: int
    width: int
    stride: int = 1
    held: BinaryIO | None = field(default=None, compare=False, repr=False, kw_only=True)

    def __len__(self) -> int:
        return self.frames

    @property
    def end(self) -> int:
        """The frame of the file after the last one used."""
        return self.first_frame + (self.frames - 1) * self.stride + 1 if self.frames else self.first_frame


@dataclass(frozen=True)
class Segment:
    """A stretch of an episode with words of its own: frames [start, stop), stop exclusive."""

    start: int
    stop: int
    text: str
    task: str = ""  # the source's own task or skill id, "" where it has none

    def to_json(self) -> dict[str, Any]:
        return {"start": self.start, "stop": self.stop, "text": self.text, "task": self.task}


@dataclass(frozen=True)
class Recording:
    """What `find` lists: a stable name below the raw folder, the split it lies in, the files to open."""

    name: str
    split: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class EpisodeRef:
    """One convertible episode, as `scan` returns it: sound but for its pixels.

    `source_id` is unique in the raw tree and free of absolute paths; `variant` names the feature set where a
    source has several (AgiBot gripper, dexterous hand); refs of one `group` are read by one worker in order,
    so that a converter may share work between them (CALVIN windows that overlap). `cameras` carries pixel
    sizes, which belong to the recording rather than to the source.
    """

    source_id: str
    split: str
    frames: int
    instruction: str
    files: tuple[Path, ...]
    cameras: tuple[CameraFeature, ...]
    variant: str = ""
    group: str = ""
    segments: tuple[Segment, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)  # JSON: suite, scene, raw range, provenance
    locator: Mapping[str, Any] = field(default_factory=dict)  # JSON: what `read` needs beyond the files
    warnings: tuple[str, ...] = ()  # sound enough to convert, odd enough to report


@dataclass(frozen=True)
class Dropped:
    """One episode left out whole: where it is, what is wrong with it, what would mend it."""

    source_id: str
    files: tuple[str, ...]
    reason: str
    remedy: str
    split: str = ""
    variant: str = ""  # "" where the recording did not say

    def to_json(self) -> dict[str, Any]:
        return {
            "source_id": self.source_id,
            "split": self.split,
            "variant": self.variant,
            "files": list(self.files),
            "checks": list(problems_of(self.reason)),
            "reason": self.reason,
            "remedy": self.remedy,
        }


@dataclass(frozen=True)
class Episode:
    """One episode ready to be written: `columns` are [T, D] (or [T]), native to the episode, never global."""

    ref: EpisodeRef
    columns: Mapping[str, NDArray[Any]]
    cameras: Mapping[str, FrameSource | VideoClip]  # by camera key, e.g. "image"

    @property
    def frames(self) -> int:
        return self.ref.frames


@dataclass(frozen=True)
class Embodiment:
    """Robot, cameras and conventions of a dataset: everything needed to know what its numbers mean.

    `features` become LeRobot features; `sidecar` features are kept in `dpipe/` columns because lerobot would
    take them for policy inputs or outputs by their prefix. `conventions` is JSON and complete: gripper
    polarity, rotation form, quaternion order, frame of reference, time pairing, image rotation.
    """

    name: str  # "libero", "agibot-gripper": datasets of one name and convention mix freely
    robot_type: str
    fps: int
    fps_origin: str  # where the figure comes from: never guessed
    features: tuple[Feature, ...]
    conventions: Mapping[str, Any]
    sidecar: tuple[Feature, ...] = ()
    licence: str = ""
    citation: str = ""
