"""Memory for batches, used again when the last batch that lay in it is gone.

A batch of frames is megabytes. Taken fresh from the system each time, its pages are mapped and cleared anew,
which cost more than a third of decoding into them where we measured (128 px JPEGs, a virtual machine).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEPT = 16  # buffers of one shape that are remembered; more may be out at a time
# References to a buffer that nobody uses: the list's, the loop variable's, the call's own.
UNUSED = 3


class Buffers:
    """Hands out uint8 arrays; a buffer is free again when no array, view or tensor refers to it any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owned: dict[tuple[int, ...], list[NDArray[np.uint8]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__()

    def take(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """An array of this shape with anything in it."""
        with self._lock:
            owned = self._owned.setdefault(shape, [])
            for buffer in owned:
                # Views and tensors refer to the array that owns the memory, so its count tells of them all.
                if sys.getrefcount(buffer) == UNUSED:
                    return buffer[:]
            fresh = np.empty(shape, np.uint8)
            if len(owned) < KEPT:
                owned.append(fresh)
                return fresh[:]
            return fresh
