"""Noise that is a function of a seed and a place: the same on every machine, in any order, without a generator.

A cache that was made with noise keeps seeds instead of noise (PFD: 8 draws of 32 x 7 values a frame would be
ten times the rest). SplitMix64 of (seed + counter) gives the bits; normals are Box and Muller's, computed in
float64 and rounded to float32, so that a library's last bit of log or cos is rounded away with them.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014), constants of SplitMix64.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Seeds = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def random_bits(seeds: Seeds, count: int) -> Seeds:
    """Seeds [...] -> 64 random bits at each of `count` places, [..., count]."""
    places = np.arange(1, count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        z = np.asarray(seeds, dtype=np.uint64)[..., None] + places * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        return z ^ (z >> np.uint64(31))


def uniform(seeds: Seeds, count: int) -> NDArray[np.float64]:
    """[..., count] in [0, 1), multiples of 2^-53: exact."""
    return (random_bits(seeds, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(seeds: Seeds, count: int) -> NDArray[np.float32]:
    """[..., count] standard normal."""
    pairs = -(-count // 2)
    u = uniform(seeds, 2 * pairs)
    radius = np.sqrt(-2 * np.log1p(-u[..., :pairs]))
    angle = 2 * np.pi * u[..., pairs:]
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return both[..., :count].astype(np.float32)


def frame_seeds(content: str, frames: NDArray[np.integer], draw: int, seed: int) -> Seeds:
    """One seed per frame, below 2^63: from what the episode is, not from where it lies."""
    base = hashlib.blake2b(f"{content}:{draw}:{seed}".encode(), digest_size=8).digest()
    start = np.array(int.from_bytes(base, "little"), dtype=np.uint64)
    last = int(np.max(frames, initial=0)) + 1
    return random_bits(start, last)[np.asarray(frames, dtype=np.int64)] >> np.uint64(1)


def stratified(seeds: Seeds, strata: int) -> NDArray[np.float64]:
    """Seeds [...] -> [..., k] times in [0, 1), one in each k-th, in an order of the seed's own."""
    order = np.argsort(random_bits(seeds, 2 * strata)[..., strata:], axis=-1, kind="stable")
    return (order + uniform(seeds, strata)) / strata


def flow_noise(seeds: Seeds, steps: int, dims: int) -> NDArray[np.float32]:
    """The noise of action chunks, [..., H, A], from the seeds a cache kept."""
    return normal(seeds, steps * dims).reshape(*np.shape(seeds), steps, dims)


def shifted_sigma(u: NDArray[np.floating], shift: float = 5.0) -> NDArray[np.float64]:
    """PFD's noise level: sigma = s u / (1 + (s - 1) u); u = 0.5 gives 2.5 / 3."""
    wide = np.asarray(u, dtype=np.float64)
    return shift * wide / (1 + (shift - 1) * wide)


def noised(
    action: NDArray[np.floating], noise: NDArray[np.floating], sigma: NDArray[np.floating]
) -> NDArray[np.float32]:
    """x = (1 - sigma) a + sigma eps for chunks [..., H, A] and levels [...]; what is predicted is eps - a."""
    level = np.asarray(sigma, dtype=np.float64)[..., None, None]
    return ((1 - level) * action + level * noise).astype(np.float32)


@dataclass(frozen=True)
class NoisyChunks:
    """k draws for each of B frames, as a flow policy is asked about them."""

    x: NDArray[np.float32]  # [B, k, H, A], normalised
    u: NDArray[np.float32]  # [B, k], the action's time
    video_u: NDArray[np.float32]  # [B, k], the time of the future frames
    video_seed: Seeds  # [B, k], their noise
