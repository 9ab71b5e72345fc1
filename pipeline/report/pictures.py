"""Pictures inside the page: WebP as data: addresses, so that nothing is fetched."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...schemas.errors import DpipeError
from .numbers import evenly

if TYPE_CHECKING:
    from ...streams.dataset import Dataset


@dataclass(frozen=True)
class Detail:
    """How much is shown; a page that grows too large is made again with less."""

    episodes: int  # on the contact sheet of a camera
    frames: int  # of each of them
    side: int  # pixels across, of one of those
    moving: int  # frames of a moving preview
    moving_side: int
    quality: int


DETAILS = (
    Detail(6, 6, 150, 40, 224, 68),
    Detail(4, 6, 112, 24, 160, 55),
    Detail(2, 4, 88, 12, 112, 45),
    Detail(1, 3, 72, 0, 0, 35),
)


def picture(frame: NDArray[np.uint8], width: int, quality: int) -> str:
    """One frame [H, W, 3] as a data: address, never larger than it was recorded."""
    buffer = io.BytesIO()
    _shrunk(frame, width).save(buffer, "WEBP", quality=quality, method=4)
    return _address(buffer)


def moving(frames: Sequence[NDArray[np.uint8]], width: int, quality: int, fps: float) -> str:
    """Frames as an endless moving picture."""
    buffer = io.BytesIO()
    first, *rest = [_shrunk(frame, width) for frame in frames]
    first.save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=rest,
        duration=round(1000 / fps),
        loop=0,
        quality=quality,
        method=3,
    )
    return _address(buffer)


def tiles(colours: NDArray[np.uint8], grid: tuple[int, int], side: int = 150) -> str:
    """Colours [N, 3] of a grid of tokens as a picture of plain squares."""
    from PIL import Image

    small = Image.fromarray(colours.reshape(*grid, 3))
    height = max(1, round(side * grid[0] / grid[1]))
    buffer = io.BytesIO()
    small.resize((side, height), Image.Resampling.NEAREST).save(buffer, "PNG", optimize=True)
    return _address(buffer, "png")


def heat_over(
    frame: NDArray[np.uint8], heat: NDArray[np.floating], grid: tuple[int, int]
) -> NDArray[np.uint8]:
    """A frame in grey with `heat` [N] in [0, 1] of a grid of tokens laid over it in vermilion."""
    from PIL import Image

    height, width = frame.shape[:2]
    mask = Image.fromarray(np.round(255 * heat.reshape(grid)).astype(np.uint8))
    share = np.asarray(mask.resize((width, height), Image.Resampling.BICUBIC), np.float64)[..., None] / 255
    grey = np.repeat(frame.mean(axis=-1, keepdims=True) * 0.8 + 30, 3, axis=-1)
    return np.round(grey * (1 - 0.85 * share) + np.array([213, 94, 0]) * 0.85 * share).astype(np.uint8)


@dataclass(frozen=True)
class Strip:
    """Frames of one episode of one camera, as data: addresses."""

    episode: int
    length: int
    task: str
    frames: list[tuple[int, str]]


def contact_sheet(
    dataset: Dataset, camera: str, episodes: Sequence[int], detail: Detail
) -> tuple[list[Strip], list[str]]:
    """Strips of the episodes given, and what could not be decoded."""
    strips, problems = [], []
    for episode in episodes:
        length = int(dataset.episodes.length[episode])
        try:
            shown = [
                (t, picture(dataset.frames(episode, camera, t, t + 1)[0], detail.side, detail.quality))
                for t in evenly(length, detail.frames)
            ]
        except (DpipeError, OSError, ValueError) as error:
            problems.append(f"episode {episode}: {str(error).splitlines()[0]}")
            continue
        strips.append(Strip(episode, length, " / ".join(dataset.episodes.tasks(episode)), shown))
    return strips, problems


def preview(dataset: Dataset, camera: str, episode: int, detail: Detail) -> tuple[str, str, str]:
    """(moving picture, its first frame, words) of a whole episode, sped up where it is long; "" where it cannot be."""
    if not detail.moving:
        return "", "", ""
    length = int(dataset.episodes.length[episode])
    shown = evenly(length, detail.moving)
    try:
        frames = [dataset.frames(episode, camera, t, t + 1)[0] for t in shown]
    except (DpipeError, OSError, ValueError):
        return "", "", ""
    fps = min(10.0, float(dataset.fps))
    speed = (length / dataset.fps) / (len(shown) / fps)
    told = f"episode {episode}, {speed:.1f} times as fast" if speed > 1.05 else f"episode {episode}"
    return (
        moving(frames, detail.moving_side, detail.quality - 8, fps),
        picture(frames[0], detail.moving_side, detail.quality),
        told,
    )


def _shrunk(frame: NDArray[np.uint8], width: int) -> Any:
    from PIL import Image

    image = Image.fromarray(frame)
    if image.width <= width:
        return image
    height = max(1, round(width * image.height / image.width))
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _address(buffer: io.BytesIO, kind: str = "webp") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
