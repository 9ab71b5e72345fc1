"""Coarse-bin tokens: which of N equal bins of [-1, 1] an action falls in, and how far from its centre.

    encode    y = clip(floor((a + 1) / 2 * N), 0, N - 1)       Libra-VLA, Eq 3
    centre    c_k = -1 + (2 k + 1) / N                         bin k covers [-1 + 2k/N, -1 + 2(k+1)/N)
    residual  a - c_y, at most 1/N in magnitude once a is clipped to [-1, 1]

Bin edges are decided in float64: stored float32 actions are widened first, so that one action has one
token on every machine. OpenVLA's 256 bins are another code (255 centres) and have their own functions.
"""

import numpy as np
from numpy.typing import NDArray

# The grid of N for which the learning-complexity report is made.
BIN_GRID = (2, 3, 4, 6, 8, 10, 12, 16, 20, 32, 50, 100, 256)

OPENVLA_BINS = 256


def token_dtype(bins: int) -> np.dtype[np.uint8] | np.dtype[np.uint16]:
    """uint8 while a value is left for "invalid", else uint16."""
    if not 2 <= bins <= 65_534:
        raise ValueError(f"between 2 and 65534 bins, not {bins}")
    return np.dtype(np.uint8) if bins <= 254 else np.dtype(np.uint16)


def invalid_token(bins: int) -> int:
    """The token of a value that is not finite: 255 in uint8, 65535 in uint16."""
    return int(np.iinfo(token_dtype(bins)).max)


def encode(actions: NDArray[np.floating], bins: int) -> NDArray[np.unsignedinteger]:
    """Normalised actions [..., D] -> tokens of the same shape; non-finite values get the invalid token."""
    # In place, because over a whole dataset this is what costs; the operations are those of the definition.
    scaled = np.array(actions, dtype=np.float64)
    finite = np.isfinite(scaled)
    sound = bool(finite.all())
    if not sound:
        scaled[~finite] = 0.0
    scaled += 1
    scaled /= 2
    scaled *= bins
    np.floor(scaled, out=scaled)
    np.clip(scaled, 0, bins - 1, out=scaled)
    tokens = scaled.astype(token_dtype(bins))
    if not sound:
        tokens[~finite] = invalid_token(bins)
    return tokens


def centre(tokens: NDArray[np.integer], bins: int) -> NDArray[np.float64]:
    """Tokens -> the centres of their bins, NaN for invalid tokens."""
    wide = np.asarray(tokens, dtype=np.float64)
    return np.where(wide < bins, -1 + (2 * wide + 1) / bins, np.nan)


def residual(actions: NDArray[np.floating], tokens: NDArray[np.integer], bins: int) -> NDArray[np.float64]:
    """What the bin does not say: clipped action minus centre, within +-1/N; NaN at invalid tokens."""
    return np.clip(np.asarray(actions, dtype=np.float64), -1, 1) - centre(tokens, bins)


def encode_openvla(actions: NDArray[np.floating]) -> NDArray[np.uint8]:
    """OpenVLA's 256 edges linspace(-1, 1, 256): index of the last edge at or below a, at most 254.

    Source: openvla `ActionTokenizer` (np.digitize, minus one, clipped to the 255 centres).
    """
    edges = np.linspace(-1.0, 1.0, OPENVLA_BINS)
    index = np.digitize(np.clip(np.asarray(actions, dtype=np.float64), -1, 1), edges) - 1
    tokens = np.clip(index, 0, OPENVLA_BINS - 2).astype(np.uint8)
    tokens[~np.isfinite(actions)] = 255
    return tokens


def centre_openvla(tokens: NDArray[np.integer]) -> NDArray[np.float64]:
    """The middle of the two edges around a token: 255 centres."""
    edges = np.linspace(-1.0, 1.0, OPENVLA_BINS)
    middles = np.append((edges[1:] + edges[:-1]) / 2, np.nan)
    return middles[np.asarray(tokens, dtype=np.int64)]
