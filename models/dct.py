"""The embedded vision tower: low-frequency cosine coefficients of each patch. Fixed, learnt by nobody.

The image is cut into 8 x 8 patches whatever its size. Each patch is projected on the lowest cosines of luma
(20) and of the two chroma planes (6 each), 32 numbers in all. Foresight over it can be learnt and looked
at: `decode` draws the picture the features still hold. It is the default because it needs no download; a
semantic tower is named with  --tower hf:<folder or id>.

The cosines are continuous and a pixel is a square of constant colour, so a coefficient is an exact integral:
phi_0 = 1, phi_u(x) = sqrt(2) cos(pi u x) on a patch of unit length (orthonormal: squared coefficients sum to
at most the mean square of the patch, Bessel). Up to 128 pixels a side no resize is needed, and an image whose
pixels are each repeated k x k has the very same features. Longer sides are averaged down to 128 first, 16
pixels a patch, which the highest cosine (two and a half periods) survives: best while decoding, see `frame_size`.

Colour: ITU-R BT.601 luma in [-0.5, 0.5]; Cb = 0.564 (B - Y), Cr = 0.713 (R - Y), both in [-0.5, 0.5].
"""

import json
from functools import lru_cache
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

GRID = 8  # patches per side: 64 tokens, as many as DIAL takes from its tower at 224 px
LUMA, CHROMA = 20, 6  # coefficients kept of each plane, lowest first
LARGEST = 128  # pixels of a side that are looked at: 1080p would cost a hundred times the decoding

_TO_YCC = np.array(
    [
        [0.299, 0.587, 0.114],
        [-0.564 * 0.299, -0.564 * 0.587, 0.564 * (1 - 0.114)],
        [0.713 * (1 - 0.299), -0.713 * 0.587, -0.713 * 0.114],
    ]
)


def lowest_frequencies(count: int) -> list[tuple[int, int]]:
    """The `count` lowest (u, v), by u + v, then the more balanced pair, then u: a fixed order."""
    side = range(count)
    every = sorted(((u, v) for u in side for v in side), key=lambda f: (f[0] + f[1], abs(f[0] - f[1]), f[0]))
    return every[:count]


@lru_cache(maxsize=16)
def cosine_basis(pixels: int, patches: int, frequencies: int) -> NDArray[np.float64]:
    """[patches * frequencies, pixels]: row (g, u) integrates phi_u over the pixels of patch g."""
    edges = np.arange(pixels + 1) * (patches / pixels)  # pixel edges, in patches
    rows = np.empty((patches, frequencies, pixels))
    for patch in range(patches):
        inside = np.clip(edges - patch, 0.0, 1.0)  # 0 left of the patch, 1 right of it
        rows[patch, 0] = np.diff(inside)
        for u in range(1, frequencies):
            rows[patch, u] = np.diff(np.sin(np.pi * u * inside)) * (np.sqrt(2) / (np.pi * u))
    return rows.reshape(patches * frequencies, pixels)


class DctTower:
    """[B, H, W, 3] uint8 -> [B, 64, 32] float32, at any H and W of at least 8."""

    def __init__(self) -> None:
        self._luma, self._chroma = lowest_frequencies(LUMA), lowest_frequencies(CHROMA)

    @property
    def width(self) -> int:
        return LUMA + 2 * CHROMA

    @property
    def digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(json.dumps(self.describe(), sort_keys=True).encode())

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return GRID, GRID

    def describe(self) -> dict[str, Any]:
        return {
            "tower": "embedded",
            "family": "dct",
            "tensor": "patch cosines",
            "version": 2,
            "grid": [GRID, GRID],
            "width": self.width,
            "luma": [list(f) for f in self._luma],
            "chroma": [list(f) for f in self._chroma],
            "colour": "BT.601, full range, luma minus 0.5",
            "preprocess": {"resize": f"sides above {LARGEST} averaged over area to {LARGEST}", "crop": None},
        }

    def frame_size(self, height: int, width: int) -> tuple[int, int]:
        """The size frames of height x width may be averaged down to while they are decoded."""
        return min(height, LARGEST), min(width, LARGEST)

    def encode(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], tuple[int, int]]:
        images = average(images, self.frame_size(*images.shape[1:3]))
        batch, height, width, _ = images.shape
        rows, columns, chosen = _transforms(height, width)
        # One small product of the same shape for each image: a batch changes no bit of its members.
        pixels = images.reshape(batch, height, width * 3).astype(np.float32)
        table = np.matmul(np.matmul(rows, pixels), columns).reshape(batch, -1)
        features = table[:, chosen].reshape(batch, GRID * GRID, self.width)
        features[:, :, 0] -= 0.5  # luma's own cosine of frequency 0
        return features, (GRID, GRID)

    def decode(self, features: NDArray[Any], height: int, width: int) -> NDArray[np.uint8]:
        """The picture the features hold, uint8 [B, height, width, 3]: for a person to look at."""
        features = np.asarray(features, dtype=np.float64)
        splits = np.split(features, [LUMA, LUMA + CHROMA], axis=-1)
        planes = [
            self._expand(part, chosen, height, width)
            for part, chosen in zip(splits, (self._luma, self._chroma, self._chroma), strict=True)
        ]
        ycc = np.stack(planes, axis=-1)
        ycc[..., 0] += 0.5
        rgb = ycc @ np.linalg.inv(_TO_YCC).T
        return np.clip(np.rint(rgb * 255), 0, 255).astype(np.uint8)

    def _expand(
        self, part: NDArray[np.float64], chosen: list[tuple[int, int]], height: int, width: int
    ) -> NDArray[np.float64]:
        """[B, 64, len(chosen)] -> [B, height, width]: the cosines' values at pixel centres, summed."""
        size = 1 + max(max(pair) for pair in chosen)
        table = np.zeros((part.shape[0], GRID, GRID, size, size))
        u, v = np.array(chosen).T
        table[..., u, v] = part.reshape(part.shape[0], GRID, GRID, -1)
        planes = table.transpose(0, 1, 3, 2, 4).reshape(-1, GRID * size, GRID * size)
        rows, columns = (_samples(n, size).reshape(GRID * size, n) for n in (height, width))
        return rows.T @ planes @ columns


def _samples(pixels: int, size: int) -> NDArray[np.float64]:
    """[GRID, size, pixels]: phi_u of each patch at the pixel centres inside it, 0 outside."""
    where = (np.arange(pixels) + 0.5) * (GRID / pixels)
    patch = np.minimum(where.astype(int), GRID - 1)
    values = np.cos(np.pi * np.arange(size)[:, None] * (where - patch)) * np.sqrt(2)
    values[0] = 1.0
    return np.where(patch == np.arange(GRID)[:, None], 1.0, 0.0)[:, None] * values


def average(images: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """[B, H, W, 3] -> [B, *size, 3], each pixel the mean of the area it covers."""
    if images.shape[1:3] == size:
        return images
    from PIL import Image

    box = Image.Resampling.BOX
    return np.stack([np.asarray(Image.fromarray(image).resize((size[1], size[0]), box)) for image in images])


@lru_cache(maxsize=16)
def _transforms(height: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.intp]]:
    """What makes features of uint8 pixels in two products: rows [G U, height], columns [width 3, G (U + 2 V)].

    Colour is part of `columns`: U cosines of luma and V of each chroma for every patch. The third are the
    places in the flattened result [G U, G (U + 2 V)] of each token's coefficients, in the order of a feature.
    """
    luma, chroma = lowest_frequencies(LUMA), lowest_frequencies(CHROMA)
    side, chroma_side = (1 + max(max(pair) for pair in pairs) for pairs in (luma, chroma))
    rows = cosine_basis(height, GRID, side)
    parts, firsts = [], []
    for plane, kept in zip(_TO_YCC / 255, (side, chroma_side, chroma_side), strict=True):
        firsts.append(sum(part.shape[0] for part in parts))
        basis = cosine_basis(width, GRID, kept)
        parts.append((basis[:, :, None] * plane).reshape(len(basis), width * 3))
    columns = np.concatenate(parts).T
    chosen = [
        (row * side + u) * columns.shape[1] + firsts[plane] + column * kept + v
        for row in range(GRID)
        for column in range(GRID)
        for plane, (pairs, kept) in enumerate(((luma, side), (chroma, chroma_side), (chroma, chroma_side)))
        for u, v in pairs
    ]
    return rows.astype(np.float32), np.ascontiguousarray(columns, np.float32), np.array(chosen)
