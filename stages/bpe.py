"""Byte-pair encoding over small integers, fitted and applied with numpy.

Symbols 0 .. A - 1 are the alphabet; merge i makes symbol A + i of its two parts. Fitting takes the most frequent
neighbouring pair each time (the smallest pair where counts tie), never across sequences. Encoding applies the
merges in the order they were made, each from left to right: what a standard encoder does by always merging the
earliest-made pair it finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
BREAK = -1  # stands between sequences, so that no pair reaches across


def fit_merges(sequences: Sequence[NDArray[np.integer]], alphabet: int, vocabulary: int) -> Ids:
    """Merges [M, 2] that make up to `vocabulary` symbols; fewer where no pair occurs twice."""
    flat = _joined(sequences)
    merges: list[tuple[int, int]] = []
    while alphabet + len(merges) < vocabulary:
        left, right = flat[:-1].astype(np.int64), flat[1:].astype(np.int64)
        inside = (left >= 0) & (right >= 0)
        width = alphabet + len(merges)
        counts = np.bincount(left[inside] * width + right[inside], minlength=1)
        best = int(counts.argmax())
        if counts[best] < 2:
            break
        pair = (best // width, best % width)
        flat = _merged(flat, *pair, width)
        merges.append(pair)
    return np.array(merges, dtype=np.int32).reshape(-1, 2)


def encode(sequences: Sequence[NDArray[np.integer]], merges: Ids, alphabet: int) -> list[Ids]:
    """Each sequence of alphabet symbols as merged symbols."""
    if not len(sequences):
        return []
    flat = _joined(sequences)
    for made, (left, right) in enumerate(merges.tolist(), alphabet):
        flat = _merged(flat, left, right, made)
    breaks = np.flatnonzero(flat == BREAK)
    return [flat[a + 1 : b] for a, b in pairwise(breaks)]


def decode(ids: NDArray[np.integer], merges: Ids, alphabet: int) -> Ids:
    """Back to alphabet symbols."""
    spelt = spellings(merges, alphabet)
    return np.concatenate([np.zeros(0, np.int32), *(spelt[i] for i in ids.tolist())])


def spellings(merges: Ids, alphabet: int) -> list[Ids]:
    """Every symbol as the alphabet symbols it stands for."""
    spelt = [np.array([i], dtype=np.int32) for i in range(alphabet)]
    for left, right in merges.tolist():
        spelt.append(np.concatenate([spelt[left], spelt[right]]))
    return spelt


def _joined(sequences: Sequence[NDArray[np.integer]]) -> Ids:
    between = np.array([BREAK], dtype=np.int32)
    pieces = [between]
    for sequence in sequences:
        pieces += [np.asarray(sequence, dtype=np.int32), between]
    return np.concatenate(pieces)


def _merged(flat: Ids, left: int, right: int, made: int) -> Ids:
    """Every `left right`, from the left and not overlapping, replaced by `made`."""
    at = np.flatnonzero((flat[:-1] == left) & (flat[1:] == right))
    if len(at) == 0:
        return flat
    if left == right:
        # In a run a a a the first pair wins, then every second place after it.
        run = np.r_[True, np.diff(at) != 1]
        place = np.arange(len(at)) - np.maximum.accumulate(np.where(run, np.arange(len(at)), 0))
        at = at[place % 2 == 0]
    merged = flat.copy()
    merged[at] = made
    keep = np.ones(len(flat), dtype=bool)
    keep[at + 1] = False
    return merged[keep]
