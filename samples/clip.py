"""MP4 files as the published recordings have them, written by FFmpeg's own muxer rather than by ours."""

import os
from collections.abc import Iterable
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..video.encode import kept_schedule

# Fast settings: the pictures are flat, and a sample need not be small. One thread, so that equal inputs give
# equal bytes.
CODECS: dict[str, dict[str, str]] = {
    "libx264": {"preset": "superfast", "crf": "23", "threads": "1"},
    "libx265": {
        "preset": "ultrafast",
        "crf": "26",
        "x265-params": "pools=none:frame-threads=1:log-level=none",
    },
    "libsvtav1": {"preset": "11", "crf": "35", "svtav1-params": "lp=1"},
}


def write_clip(
    path: Path,
    pictures: Iterable[NDArray[np.uint8]],
    fps: int,
    codec: str,
    times: int = 1,
    keyframe_every: int = 30,
) -> int:
    """Encode RGB pictures [H, W, 3] enlarged `times`, yuv420p at a constant rate; returns the frame count.

    Enlarging comes after the change of colour space, which is the dearer the larger the picture.
    """
    import av

    os.environ.setdefault("SVT_LOG", "1")  # read when the encoder starts: errors alone
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = 0
    stream: Any = None
    with av.open(str(path), "w", format="mp4") as container:
        for picture in pictures:
            if stream is None:
                stream = container.add_stream(codec, rate=fps, options=CODECS[codec])
                stream.height, stream.width = picture.shape[0] * times, picture.shape[1] * times
                stream.pix_fmt = "yuv420p"
                stream.gop_size = keyframe_every
                stream.time_base = Fraction(1, fps)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(format="yuv420p")
            if times > 1:
                planes = _enlarge_planes(
                    np.asarray(frame.to_ndarray(), np.uint8), frame.height, frame.width, times
                )
                frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts = frames
            with nullcontext() if frames else kept_schedule():  # the first picture opens the encoder
                container.mux(stream.encode(frame))
            frames += 1
        if stream is not None:
            container.mux(stream.encode(None))
    return frames


def enlarge[T: np.generic](picture: NDArray[T], times: int) -> NDArray[T]:
    """Every pixel `times` squared: a large picture at the price of a small one."""
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def _enlarge_planes(planes: NDArray[np.uint8], height: int, width: int, times: int) -> NDArray[np.uint8]:
    """The three planes of a yuv420p picture, [3/2 H, W] as PyAV lays them out one after the other."""
    flat, quarter = planes.reshape(-1), height * width // 4
    parts = [flat[: 4 * quarter].reshape(height, width)]
    for i in (4, 5):
        parts.append(flat[i * quarter : (i + 1) * quarter].reshape(height // 2, width // 2))
    enlarged = np.concatenate([enlarge(part, times).reshape(-1) for part in parts])
    return enlarged.reshape(height * times * 3 // 2, width * times)
