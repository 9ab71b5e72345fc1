"""MP4 files as the published recordings have them, written by FFmpeg's own muxer rather than by ours."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Fast settings: the pictures are flat, and a sample need not be small. One thread, so that equal inputs give
# equal bytes.
CODECS: dict[str, dict[str, str]] = {
    "libx264": {"preset": "veryfast", "crf": "23", "threads": "1"},
    "libx265": {
        "preset": "ultrafast",
        "crf": "26",
        "x265-params": "pools=none:frame-threads=1:log-level=none",
    },
    "libsvtav1": {"preset": "11", "crf": "35", "svtav1-params": "lp=1"},
}


def write_clip(
    path: Path, pictures: Iterable[NDArray[np.uint8]], fps: int, codec: str, keyframe_every: int = 30
) -> int:
    """Encode RGB pictures [H, W, 3], yuv420p at a constant rate; returns the number of frames."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    frames = 0
    stream: Any = None
    with av.open(str(path), "w", format="mp4") as container:
        for picture in pictures:
            if stream is None:
                stream = container.add_stream(codec, rate=fps, options=CODECS[codec])
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = "yuv420p"
                stream.gop_size = keyframe_every
                stream.time_base = Fraction(1, fps)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = frames
            container.mux(stream.encode(frame))
            frames += 1
        if stream is not None:
            container.mux(stream.encode(None))
    return frames


def enlarge[T: np.generic](picture: NDArray[T], times: int) -> NDArray[T]:
    """Every pixel `times` squared: a large picture at the price of a small one."""
    return picture.repeat(times, axis=0).repeat(times, axis=1)
