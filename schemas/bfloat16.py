"""bfloat16, which numpy has not: the upper half of a float32, kept as uint16."""

import numpy as np
from numpy.typing import NDArray


def float32_to_bfloat16(values: NDArray[np.floating]) -> NDArray[np.uint16]:
    """float32 -> the bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    wide = np.ascontiguousarray(values, dtype=np.float32)
    bits = wide.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(wide), np.uint16(0x7FC0), rounded)


def bfloat16_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bits -> float32, exactly."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)
