"""shards: the dataset again as Parquet made for random reading, frames as JPEG. For any trainer, and for speed.

Its output is files rather than per-frame arrays: `streams/shard_format.py` says what lies in them,
`streams/shard_writing.py` writes them, a part of the dataset at a time; the pipeline runs the parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Params:
    frames: str = field(
        default="jpeg",
        metadata={
            "help": "pictures as JPEG, left in the videos, or left out",
            "choices": ("jpeg", "video", "none"),
        },
    )
    short_side: int = field(
        default=256, metadata={"help": "shrink frames whose shorter side has more pixels"}
    )
    quality: int = field(default=90, metadata={"help": "of the JPEGs, 1 to 100"})
    columns: tuple[str, ...] = field(
        default=(), metadata={"help": "numeric columns to take: action,observation.state"}
    )
    targets: tuple[str, ...] = field(
        default=(), metadata={"help": "small per-frame targets to take as columns: tokens:N=10"}
    )


@dataclass(frozen=True)
class FileStage:
    """A stage whose output is files of its own; `name`, `Params` and `summary` are as in `Stage`."""

    name: str
    version: int
    Params: type
    summary: str
    recipes: tuple[str, ...] = ()
    uses_model: Callable[[Any], bool] = lambda params: False


STAGE = FileStage(
    "shards", 1, Params, "JPEG frames and columns as Parquet for fast random reading (any trainer)"
)
