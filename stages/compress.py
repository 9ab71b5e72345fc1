"""Smaller features, and what each saving costs: numbers before anybody trains on them.

    float16    relative error 2e-4; overflows above 65504, and vision transformers do have massive activations
    bfloat16   1.7e-3, never overflows
    int8       per channel, scale from a pilot: 9e-3 even with outlier channels (per token those would cost 0.14)
    PCA        over d, fitted on the pilot's tokens
    pooling    k x k neighbouring tokens averaged

rel-RMS is ||q(F) - F|| / ||F||. A policy learns what changes, so the measure that decides is delta-RMS, the
same on F_{t+H} - F_t: a static background makes any code look good. Shapes: B frames, N = gh gw tokens, d wide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..schemas.bfloat16 import bfloat16_to_float32, float32_to_bfloat16
from ..schemas.contract import BFLOAT16
from ..schemas.errors import DataError, UsageError

Features = NDArray[np.float32]

FLOAT16_SAFE = 6e4  # above this float16 is too near its end, 65504
STORAGES = ("auto", "float16", "bfloat16", "float32", "int8")


@dataclass(frozen=True)
class Code:
    """How features are stored: pooled, then projected, then rounded. `basis` is [d, k], `scale` [k]."""

    storage: str  # float16, bfloat16, float32 or int8
    pool: int = 1
    mean: NDArray[np.float32] | None = None
    basis: NDArray[np.float32] | None = None
    scale: NDArray[np.float32] | None = None

    def project(self, features: Features, grid: tuple[int, int]) -> Features:
        """[B, N, d] -> [B, N', k] before rounding."""
        pooled = pool_tokens(features, grid, self.pool)
        if self.basis is None or self.mean is None:
            return pooled
        return ((pooled - self.mean) @ self.basis).astype(np.float32)

    def store(self, projected: Features) -> NDArray[np.generic]:
        """Rounded to what is kept; float16 that would overflow is refused."""
        if self.storage == "float16":
            check_float16(projected)
            return projected.astype(np.float16)
        if self.storage == BFLOAT16:
            return float32_to_bfloat16(projected)
        if self.storage == "int8":
            assert self.scale is not None
            return np.clip(np.rint(projected / self.scale), -127, 127).astype(np.int8)
        return projected.astype(np.float32)

    def restore(self, stored: NDArray[np.generic], grid: tuple[int, int]) -> Features:
        """What was stored, as features [B, N, d] of the tower: for measuring what was lost."""
        if self.storage == BFLOAT16:
            values = bfloat16_to_float32(stored.astype(np.uint16))
        elif self.storage == "int8":
            assert self.scale is not None
            values = stored.astype(np.float32) * self.scale
        else:
            values = stored.astype(np.float32)
        if self.basis is not None and self.mean is not None:
            values = values @ self.basis.T + self.mean
        return unpool_tokens(values, grid, self.pool)

    def stored_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        return grid[0] // self.pool, grid[1] // self.pool


def pool_tokens(features: Features, grid: tuple[int, int], pool: int) -> Features:
    """[B, gh gw, d] -> [B, (gh / k) (gw / k), d]: means of k x k neighbours."""
    if pool == 1:
        return features
    rows, columns = grid
    if rows % pool or columns % pool:
        raise UsageError(f"--pool {pool} does not divide the tower's grid of {rows} x {columns} tokens")
    batch, _, width = features.shape
    blocks = features.reshape(batch, rows // pool, pool, columns // pool, pool, width)
    return blocks.mean(axis=(2, 4)).reshape(batch, -1, width)


def unpool_tokens(features: Features, grid: tuple[int, int], pool: int) -> Features:
    """Each pooled token back at its k x k places."""
    if pool == 1:
        return features
    batch, _, width = features.shape
    table = features.reshape(batch, grid[0] // pool, grid[1] // pool, width)
    return table.repeat(pool, axis=1).repeat(pool, axis=2).reshape(batch, -1, width)


def fit_pca(tokens: NDArray[np.floating], components: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean [d] and leading directions [d, k] of tokens [n, d]; each direction's largest entry is positive."""
    if not 1 <= components <= tokens.shape[1]:
        raise UsageError(f"--pca takes 1 to {tokens.shape[1]} components, not {components}")
    mean = tokens.mean(axis=0, dtype=np.float64)
    centred = tokens.astype(np.float64) - mean
    _, vectors = np.linalg.eigh(centred.T @ centred / len(tokens))
    basis = vectors[:, ::-1][:, :components]
    basis = basis * np.sign(np.take_along_axis(basis, np.abs(basis).argmax(axis=0)[None], axis=0))
    return mean.astype(np.float32), basis.astype(np.float32)


def int8_scale(projected: Features) -> NDArray[np.float32]:
    """Per channel [k]: the largest magnitude of the pilot, with a tenth of room, over 127 steps."""
    largest = np.abs(projected).reshape(-1, projected.shape[-1]).max(axis=0)
    return np.where(largest > 0, largest * 1.1 / 127, 1.0).astype(np.float32)


def overflows_float16(features: Features) -> bool:
    return bool(np.abs(features).max(initial=0) > FLOAT16_SAFE)


def check_float16(features: Features) -> None:
    if overflows_float16(features):
        raise DataError(
            f"a feature of {np.abs(features).max():.3g} does not fit float16 (up to {FLOAT16_SAFE:g})\n"
            "  Store them otherwise:  --storage bfloat16"
        )


def relative_rms(approximate: Features, exact: Features) -> float:
    """||approximate - exact|| / ||exact|| over everything."""
    difference = np.linalg.norm((approximate - exact).astype(np.float64))
    return float(difference / max(np.linalg.norm(exact.astype(np.float64)), 1e-30))


def delta_rms(code: Callable[[Features], Features], now: Features, later: Features) -> float:
    """Relative error of what changes: ||q(later) - q(now) - (later - now)|| / ||later - now||."""
    return relative_rms(code(later) - code(now), later - now)


def explained_variance(tokens: Features, mean: NDArray[np.float32], basis: NDArray[np.float32]) -> float:
    """Share of the tokens' variance [..., d] about `mean` that the directions keep."""
    centred = (tokens - mean).reshape(-1, tokens.shape[-1]).astype(np.float64)
    return float(((centred @ basis) ** 2).sum() / max((centred**2).sum(), 1e-30))


def between_frame_variance(
    features: Features, episodes: NDArray[np.integer], basis: NDArray[np.float32]
) -> float:
    """The same for what moves: tokens [B, N, d] minus the mean of their place over their episode's frames."""
    moving = features.astype(np.float64)
    for episode in np.unique(episodes):
        here = episodes == episode
        moving[here] -= moving[here].mean(axis=0)
    flat = moving.reshape(-1, features.shape[-1])
    return float(((flat @ basis) ** 2).sum() / max((flat**2).sum(), 1e-30))
