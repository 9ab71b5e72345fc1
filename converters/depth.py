"""Depth as a camera: metres as 8-bit grey, and 16-bit PNG files as a frame source.

A picture codec keeps neither 16 bits nor metres, so depth is a view here, exact to one grey level (say 2 cm in
5 m) and to what the codec loses; the distances that grey 0 and 255 stand for are in the dataset's conventions.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import DataError

MILLIMETRES = 1000.0


def depth_to_grey(depth_m: NDArray[np.floating], near_m: float, far_m: float) -> NDArray[np.uint8]:
    """[H, W] metres -> [H, W, 3] grey: 0 at `near_m` and nearer, 255 at `far_m` and farther, linear between."""
    grey = np.rint(np.clip((depth_m - near_m) / (far_m - near_m), 0.0, 1.0) * 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def decode_png16(data: bytes, name: str) -> NDArray[np.float32]:
    """A 16-bit grey PNG of millimetres -> [H, W] metres."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            pixels = np.asarray(image)
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: not a readable PNG ({error})") from error
    if pixels.ndim != 2 or pixels.dtype.kind not in "iu":
        raise DataError(f"{name}: expected 16-bit grey, found {pixels.dtype} {pixels.shape}")
    return (pixels / MILLIMETRES).astype(np.float32)


class PngDepth:
    """Depth pictures in rising order, each (path, offset, size): a file, or a member of a tar."""

    def __init__(
        self, places: Sequence[tuple[Path, int, int]], height: int, width: int, far_m: float
    ) -> None:
        self.places, self.height, self.width, self.far_m = places, height, width, far_m

    def __len__(self) -> int:
        return len(self.places)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        block = np.empty((stop - start, self.height, self.width, 3), np.uint8)
        for i, (path, offset, size) in enumerate(self.places[start:stop]):
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
            depth = decode_png16(data, f"{path.name} at byte {offset}")
            if depth.shape != (self.height, self.width):
                raise DataError(
                    f"{path.name}: depth picture of {depth.shape}, {self.height}x{self.width} before"
                )
            block[i] = depth_to_grey(depth, 0.0, self.far_m)
        return block
