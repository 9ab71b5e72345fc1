"""A dataset as the replay buffer that diffusion-policy code reads, written with the zarr library.

    data/<key>          [N, ...] every frame of every episode, one after another
    meta/episode_ends   [E] int64, the row after each episode's last
    keys                action; state, environment_state, ... (without `observation.`); each camera by its own key,
                        [N, H, W, 3] uint8; task_index, whose sentences stand in the group's attributes

Format 2 is the default: diffusion_policy pins zarr 2, which cannot open format 3.
Source: real-stanford/diffusion_policy 0237378 `diffusion_policy/common/replay_buffer.py` (2 MB chunks cut in time
only; everything below `meta` must be an array)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..schemas.features import CAMERA_PREFIX
from ..streams.dataset import Dataset, open_dataset
from .outputs import CHUNK_BYTES, Form, OutputOptions, Task

PIECE_FRAMES = 1024  # about what one task writes of a camera
BLOCK_FRAMES = 64
LEVEL = 3  # zstd; on the LIBERO sample six times smaller at 500 MB/s, Blosc with bit shuffle is no better


@dataclass(frozen=True)
class Array:
    """One array of the buffer: its key, the feature it comes from, its rows."""

    key: str
    feature: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @property
    def chunk_rows(self) -> int:
        return max(1, CHUNK_BYTES // self.row_bytes)


def list_arrays(dataset: Dataset, options: OutputOptions) -> list[Array]:
    """The arrays of a dataset, keys short where that is unambiguous."""
    arrays = []
    for name in (*dataset.vectors, "task_index"):
        told = dataset.features[name]
        shape = tuple(int(n) for n in told["shape"])
        shape = (int(np.prod(shape)),) if name != "task_index" else ()
        arrays.append(Array(name.removeprefix("observation."), name, shape, str(told["dtype"])))
    for name in dataset.cameras if options.images else ():
        height, width = dataset.camera_size(name)
        arrays.append(Array(name.removeprefix(CAMERA_PREFIX), name, (height, width, 3), "uint8"))
    keys = [array.key for array in arrays]
    return [Array(a.feature, a.feature, a.shape, a.dtype) if keys.count(a.key) > 1 else a for a in arrays]


def estimate(dataset: Dataset, options: OutputOptions) -> int:
    return dataset.total_frames * sum(array.row_bytes for array in list_arrays(dataset, options))


def begin(dataset: Dataset, tree: Path, options: OutputOptions, recipe: Mapping[str, Any]) -> list[Task]:
    import zarr

    manifest = dataset.manifest or {}
    arrays = list_arrays(dataset, options)
    attributes = {
        "dpipe": dict(recipe),
        "fps": dataset.fps,
        "tasks": dataset.tasks,
        "splits": {name: list(span) for name, span in dataset.splits.items()},
        "conventions": manifest.get("conventions", {}),
        "licence": manifest.get("licence", ""),
    }
    group = zarr.create_group(str(tree), zarr_format=_format(options.zarr_format), attributes=attributes)
    data, meta = group.create_group("data"), group.create_group("meta")
    ends = np.cumsum(dataset.episodes.length).astype(np.int64)
    made = meta.create_array("episode_ends", shape=ends.shape, dtype="int64", chunks=ends.shape)
    made[:] = ends
    tasks = []
    frames = dataset.total_frames
    for array in arrays:
        rows = min(array.chunk_rows, frames)
        made = data.create_array(
            array.key,
            shape=(frames, *array.shape),
            dtype=array.dtype,
            chunks=(rows, *array.shape),
            compressors=_compressor(options.zarr_format),
        )
        made.attrs.update({"feature": array.feature, "names": list(dataset.names(array.feature))})
        step = rows * max(1, PIECE_FRAMES // rows)
        for start in range(0, frames, step):
            stop = min(start + step, frames)
            tasks.append(Task(write_rows, (dataset.root, tree, array, start, stop), stop - start))
    return tasks


def _format(number: int) -> Any:
    return number


def _compressor(zarr_format: int) -> Any:
    if zarr_format == 2:
        from numcodecs import Zstd

        return Zstd(level=LEVEL)
    from zarr.codecs import ZstdCodec

    return ZstdCodec(level=LEVEL)


def write_rows(root: Path, tree: Path, array: Array, start: int, stop: int) -> None:
    """One task: rows [start, stop) of one array, `start` at a chunk's first row."""
    import zarr

    dataset = _opened(root)
    target = zarr.open_group(str(tree), mode="r+")[f"data/{array.key}"]
    assert isinstance(target, zarr.Array), "made by begin"
    rows = int(target.chunks[0])
    for first in range(start, stop, rows):
        last = min(first + rows, stop)
        block = np.empty((last - first, *array.shape), array.dtype)
        for episode, a, b in _spans(dataset, first, last):
            before = int(dataset.episodes.first_index[episode])
            place = slice(before + a - first, before + b - first)
            if array.feature in dataset.cameras:
                for t in range(a, b, BLOCK_FRAMES):
                    until = min(t + BLOCK_FRAMES, b)
                    frames = dataset.frames(episode, array.feature, t, until)
                    block[before + t - first : before + until - first] = frames
            else:
                values = dataset.columns([array.feature], episode)[array.feature][a:b]
                block[place] = values.reshape(b - a, *array.shape)
        target[first:last] = block


def _spans(dataset: Dataset, first: int, last: int) -> list[tuple[int, int, int]]:
    """(episode, frame a, frame b) of the rows [first, last)."""
    starts, lengths = dataset.episodes.first_index, dataset.episodes.length
    episode = int(np.searchsorted(starts, first, side="right")) - 1
    spans = []
    while episode < len(dataset) and starts[episode] < last:
        begin, length = int(starts[episode]), int(lengths[episode])
        spans.append((episode, max(0, first - begin), min(length, last - begin)))
        episode += 1
    return spans


@lru_cache(maxsize=2)
def _opened(root: Path) -> Dataset:
    return open_dataset(root)


def recipe(out: Path) -> Mapping[str, Any] | None:
    import zarr

    try:
        found = dict(zarr.open_group(str(out), mode="r").attrs).get("dpipe")
    except (OSError, ValueError, KeyError):
        return None
    return found if isinstance(found, Mapping) else None


FORM = Form(estimate=estimate, begin=begin, recipe=recipe)
