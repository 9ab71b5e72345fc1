"""What a Parquet file claims to hold, against the bytes that are there: before anything is allocated for it.

Run lengths cost next to nothing to write and all memory to read: a file of some kilobytes may hold a thousand
million equal values. Recordings are never like that; something in them moves, or at least counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .errors import DataError

FREE_VALUES = 1 << 22  # whatever the size of the file
MOST_VALUES_A_BYTE = 64  # a recording in which nothing but its numbering changes has some twenty


def refuse_claims(metadata: Any, size: int, where: str, groups: Iterable[int] | None = None) -> None:
    """DataError where a file of `size` bytes claims more values than that; `groups`: those to be read, else all.

    `metadata` is pyarrow's of the file.
    """
    claimed = 0
    for number in range(metadata.num_row_groups) if groups is None else groups:
        group = metadata.row_group(number)
        claimed += sum(
            max(group.num_rows, group.column(column).num_values) for column in range(metadata.num_columns)
        )
    if claimed > FREE_VALUES + MOST_VALUES_A_BYTE * size:
        raise DataError(
            f"{where} claims {claimed:,} values in {size:,} bytes; refused\n"
            "  next: get the file again, or leave it out"
        )
