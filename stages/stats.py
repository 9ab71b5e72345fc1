"""stats: exact statistics of every numeric column, as LeRobot names them, and relative to the chunk start.

No array: the result is the report. min, max, mean, std, count, q01, q10, q50, q90, q99 over all frames, exact
(`schemas/statistics.py`), where LeRobot's dataset quantiles are bounds. With --relative --chunk K the action
is an offset from the state at the chunk's start and every unpadded step of every chunk counts: what trainers
of relative actions normalise by (openpi's delta actions, GR00T's `relative_action`), without decoding a frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..schemas.contract import ArraySpec
from ..schemas.errors import UsageError
from ..schemas.features import DEFAULT_FEATURES
from ..schemas.statistics import QUANTILES, exact_statistics
from . import Block, DatasetInfo, DatasetView, EpisodeView, Prepared, Run, Stage, TargetReader
from .actions import fitted_blocks


@dataclass(frozen=True)
class Params:
    columns: tuple[str, ...] = field(
        default=(), metadata={"help": "which columns; every numeric one by default"}
    )
    relative: bool = field(
        default=False, metadata={"help": "the action as offsets from the state at the chunk's start"}
    )
    chunk: int = field(default=0, metadata={"help": "chunk length, with --relative"})

    def __post_init__(self) -> None:
        if self.relative != (self.chunk > 0):
            raise UsageError(
                "--relative and --chunk K belong together: a chunk's start is what is measured from"
            )


def columns_of(params: Params, info: DatasetInfo) -> tuple[str, ...]:
    if params.columns:
        return params.columns
    if params.relative:
        return ("action",)
    numeric = ("float", "int", "uint", "bool")
    return tuple(
        name
        for name, told in info.features.items()
        if told["dtype"].startswith(numeric) and name not in DEFAULT_FEATURES
    )


def variant(params: Params, info: DatasetInfo) -> str:
    name = f"relative{params.chunk}" if params.relative else "absolute"
    return "-".join([name, *(column.replace(".", "_") for column in params.columns)])


def prepare(params: Params, dataset: DatasetView) -> Prepared:
    fps = dataset.info.fps
    return Prepared(contract={"horizon_frames": params.chunk, "horizon_seconds": params.chunk / fps})


def makes(params: Params, info: DatasetInfo, prepared: Prepared) -> tuple[ArraySpec, ...]:
    return ()


def open_run(params: Params, info: DatasetInfo, prepared: Prepared) -> Run:
    def run(episode: EpisodeView) -> Iterator[Block]:
        return iter(())

    return run


def report(
    params: Params, dataset: DatasetView, prepared: Prepared, reader: TargetReader, folder: Path
) -> dict[str, Any]:
    result: dict[str, Any] = {"relative": params.relative, "chunk": params.chunk, "columns": {}}
    for column in columns_of(params, dataset.info):
        blocks = fitted_blocks(dataset, column, params.relative, params.chunk)
        statistics, count = exact_statistics(blocks)
        result["columns"][column] = {
            "names": list(dataset.info.names(column)),
            **{name: statistics[name].tolist() for name in ("min", "max", "mean", "std")},
            "count": [count],
            **{name: statistics[name].tolist() for name in QUANTILES},
            "levels": [int(n) for n in statistics["levels"]],
        }
    return result


STAGE = Stage(
    name="stats",
    version=1,
    Params=Params,
    summary="exact statistics of columns, also relative to the chunk start",
    recipes=(),
    variant=variant,
    prepare=prepare,
    makes=makes,
    open=open_run,
    report=report,
)
