"""Text as files hold it, in whatever way they do: the one place where an attribute becomes a sentence."""

from __future__ import annotations

from typing import Any

import numpy as np


def text_of(value: Any) -> str:
    """A value from a file as plain text, "" for what is missing in one of the ways files have for it.

    HDF5 gives str, bytes (`numpy.bytes_`) or an array of one of either, depending on who wrote it; pickles give
    bytes; a missing value may be None, an empty attribute, or the word "None".
    """
    if isinstance(value, np.ndarray | list | tuple):
        inner = np.asarray(value, dtype=object).reshape(-1)
        return text_of(inner[0]) if len(inner) == 1 else ""
    if isinstance(value, bytes | bytearray):
        value = bytes(value).decode("utf-8", "replace")
    if not isinstance(value, str | int | float | np.generic):
        return ""  # None, and h5py's Empty
    text = str(value).strip().strip("\0").strip()
    return "" if text == "None" else text
