"""What each stage would cost for a dataset: bytes by arithmetic, seconds from a few hundred frames worked on here.

A probe settles normalisers and pilots on a few shortened episodes, makes their rows and throws them away. Its
seconds are those of one process; a stage with a model has all threads, others are divided among workers.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..schemas.errors import DataError, UsageError
from ..stages import STAGES, DatasetInfo, Stage, build_params, load_stage
from ..streams.dataset import Dataset, open_dataset
from ..streams.shard_format import ShardOptions
from ..streams.shard_writing import encode_frames, plan_shards
from .precompute import TARGETS
from .stage_view import DiskDataset, DiskEpisode
from .target_parts import expected_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

PROBE_EPISODES, PROBE_FRAMES = 4, 64  # episodes looked at, and frames of each


@dataclass(frozen=True)
class StageCost:
    """What a stage would cost for a dataset. `seconds` leave out opening a model and the report."""

    stage: str
    summary: str
    recipes: tuple[str, ...]
    bytes: int = 0
    seconds: float = 0.0
    arrays: int = 0
    made: tuple[str, ...] = ()  # variants that exist
    needs: str = ""  # why it cannot run as it stands
    one_process: bool = False  # a model's forward pass, whatever the number of workers


def stage_costs(
    dataset_root: Path,
    out: Path | None = None,
    params: Mapping[str, Mapping[str, Any]] | None = None,
    stages: Sequence[str] = tuple(STAGES),
) -> list[StageCost]:
    """Each stage's cost with its default options, or with `params` by stage."""
    dataset = open_dataset(dataset_root)
    base = out or dataset.root / TARGETS
    shards = dataset.root / "dpipe" / "shards" if out is None else out / "shards"
    costs = []
    for name in stages:
        stage = load_stage(name)
        folder, mark = (shards, "index.json") if name == "shards" else (base / name, "contract.json")
        made = tuple(sorted(path.parent.name for path in folder.glob(f"*/{mark}")))
        told = (name, stage.summary, stage.recipes)
        try:
            chosen = build_params(stage, (params or {}).get(name, {}))
            probe = (
                _probe(stage, chosen, dataset) if isinstance(stage, Stage) else _probe_shards(dataset, chosen)
            )
        except (UsageError, DataError) as error:
            costs.append(StageCost(*told, made=made, needs=str(error)))
            continue
        alone = isinstance(stage, Stage) and stage.uses_model(chosen)
        costs.append(StageCost(*told, *probe, made=made, one_process=alone))
    return costs


def _probe(stage: Stage, params: Any, dataset: Dataset) -> tuple[int, float, int]:
    """(bytes, seconds, arrays) of the whole dataset."""
    lengths = dataset.episodes.length
    view = _FirstFrames(DiskDataset(dataset), min(PROBE_EPISODES, len(dataset)), PROBE_FRAMES)
    prepared = stage.prepare(params, view)
    specs = stage.makes(params, view.info, prepared)
    run = stage.open(params, view.info, prepared)
    list(run(view.episode(0)))  # warm: imports, decoder, page cache
    ragged = {spec.name for spec in specs if not spec.every}
    start, extra = time.perf_counter(), 0
    for position in range(len(view)):
        for block in run(view.episode(position)):
            extra += sum(values.nbytes for name, values in block.items() if name in ragged)
    if stage.report is not None and not specs:  # all its work
        with tempfile.TemporaryDirectory(prefix="dpipe-probe-") as folder:
            stage.report(params, view, prepared, _Nothing(), Path(folder))
    seconds = time.perf_counter() - start
    share = int(lengths.sum()) / max(1, view.info.frames)
    return expected_bytes(specs, lengths) + round(extra * share), seconds * share, len(specs)


def _probe_shards(dataset: Dataset, params: Any) -> tuple[int, float, int]:
    """The same for shards: columns by arithmetic, pictures by coding a few."""
    options = ShardOptions(**asdict(params))
    plan = plan_shards(dataset, options)
    row, seconds = float(sum(column.row_bytes for column in plan.columns)), 0.0
    frames = min(PROBE_FRAMES, int(dataset.episodes.length[0]))
    for camera, size in plan.cameras.items():
        dataset.frames(0, camera, 0, 1)
        start = time.perf_counter()
        coded = encode_frames(dataset.frames(0, camera, 0, frames), size, options.quality)
        seconds += (time.perf_counter() - start) / frames
        row += sum(map(len, coded)) / frames
    return round(row * dataset.total_frames), seconds * dataset.total_frames, 0


class _Nothing:
    """A `TargetReader` for stages that make no array."""

    def read(self, position: int, array: str) -> NDArray[Any]:
        raise AssertionError(f"there is no array '{array}'")


@dataclass
class _FirstFrames:
    """A `DatasetView` of the first few episodes, each cut short."""

    owner: DiskDataset
    count: int
    most: int
    info: DatasetInfo = field(init=False)

    def __post_init__(self) -> None:
        lengths = np.minimum(self.owner.dataset.episodes.length[: self.count], self.most)
        self.info = replace(self.owner.info, episodes=self.count, frames=int(lengths.sum()))

    def __len__(self) -> int:
        return self.count

    def episode(self, position: int) -> _CutEpisode:
        return _CutEpisode(self.owner.episode(position), self.most)

    def stretches(self) -> Iterator[_CutEpisode]:
        return (self.episode(position) for position in range(self.count))


@dataclass
class _CutEpisode:
    """An `EpisodeView` of an episode's first frames."""

    whole: DiskEpisode
    most: int

    def __post_init__(self) -> None:
        self.index, self.content, self.text = self.whole.index, self.whole.content, self.whole.text
        self.frames = min(self.whole.frames, self.most)

    def columns(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        return {name: values[: self.frames] for name, values in self.whole.columns(names).items()}

    def images(
        self, camera: str, rows: NDArray[np.int64], block: int, size: tuple[int, int] | None = None
    ) -> Iterator[NDArray[np.uint8]]:
        return self.whole.images(camera, rows, block, size)
