"""Several datasets as one stream, in given proportions, through vectors they have in common.

    stream = open_mixture([Member(libero, 2.0), Member(calvin, 1.0, where="frames > 40")], spec, batch_size=64)
    batch["observation.state"], batch["observation.state_mask"]     # [B, U], [B, U]: which dimensions are real
    batch["dataset"]                                                # [B] number of the member

Proportions   exact in every 4,096 places, to one place; each member goes through all its samples before it
              repeats one (`MixtureOrder`). `proportions` tells what was realised.
Vectors       "names": one dimension per name, in the order the members bring them; a member that lacks a name
              has 0 there and False in the mask. "unified": the layout of `schemas/unified.py`, actions absolute
Statistics    each member's own normaliser, on its native dimensions, before they are aligned
Rates         `spec.fps` makes steps equally long in seconds whatever the recordings' rates
Cameras       by role: `Member.cameras` maps a role to the member's camera; one that is missing is black and
              marked by `<role>_is_missing` [B]

Legend   B samples, H steps, U common dimensions, M members
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.episode import Embodiment
from ..schemas.errors import UsageError, unknown_name
from ..schemas.features import Feature
from ..schemas.normalisers import Normaliser
from ..schemas.unified import DIM, unify_action, unify_state
from .dataset import Dataset, open_dataset
from .health import Health
from .order import MixtureOrder, Shuffle, block_counts
from .source import Batch, Source, StreamSpec
from .stream import Stream, cores, open_source

if TYPE_CHECKING:
    import pyarrow as pa

ALIGNMENTS = ("names", "unified")
STATE, ACTION = "observation.state", "action"


@dataclass(frozen=True)
class Member:
    """One dataset of a mixture. `weight` is relative; None: its number of samples.

    `where` is an SQL condition over its episodes; `cameras` maps roles to its camera names (default: each camera
    is its own role); `normalise` as in `StreamSpec`; `frames` as for `open_stream`.
    """

    dataset: Path | Dataset
    weight: float | None = None
    where: str = ""
    split: str = "train"
    cameras: Mapping[str, str] | None = None
    normalise: Mapping[str, Normaliser] = field(default_factory=dict)
    frames: str = "auto"


def open_mixture(
    members: Sequence[Member],
    spec: StreamSpec,
    batch_size: int = 64,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    shuffle: str | Shuffle = "global",
    last: str = "short",
    align: str = "names",
    threads: int | None = None,
) -> Stream:
    """A stream over several datasets; an epoch has as many samples as they have together."""
    if align not in ALIGNMENTS:
        raise unknown_name("alignment", align, ALIGNMENTS)
    if not members:
        raise UsageError("a mixture has at least one member")
    if spec.normalise:
        raise UsageError("in a mixture each member has its own normalisers: Member(normalise=...)")
    if align == "unified" and any(member.normalise for member in members):
        raise UsageError("unified vectors are in metres and radians: normalise them after the stream")
    if spec.cameras is None and spec.size is None and any(member.frames != "none" for member in members):
        raise UsageError("frames of several datasets need one size: StreamSpec(size=(height, width))")
    opened = [_open_member(member, spec, align) for member in members]
    weights = [
        len(each.source.samples) if member.weight is None else member.weight
        for member, each in zip(members, opened, strict=True)
    ]
    if min(weights) <= 0:
        raise UsageError(
            f"weights of a mixture are above 0, not {weights}\n  Leave out what should not be seen."
        )
    mixture = MixtureSource(opened, weights, align)
    order = shuffle if isinstance(shuffle, Shuffle) else Shuffle(shuffle)
    shared = replace(spec, normalise={})
    return Stream(
        mixture, shared, batch_size, seed, rank, world, order, last, cores() if threads is None else threads
    )


@dataclass(frozen=True)
class _Opened:
    """A member's samples in its own names; `acting` reads the same rows as unified actions need them."""

    source: Source
    spec: StreamSpec
    roles: Mapping[str, str]  # role -> camera
    acting: Source | None = None
    acting_spec: StreamSpec | None = None


def _open_member(member: Member, spec: StreamSpec, align: str) -> _Opened:
    cameras = spec.cameras if member.cameras is None else tuple(member.cameras.values())
    own = replace(spec, normalise=dict(member.normalise), cameras=cameras, torch=False)
    dataset = member.dataset if isinstance(member.dataset, Dataset) else open_dataset(member.dataset)
    episodes = episodes_where(dataset, member.where, member.split) if member.where else None
    names = native_columns(dataset) if align == "unified" else ()
    if align == "unified":
        own = replace(own, columns=names, chunks={})
    source, own = open_source(dataset, own, member.split, member.frames, episodes=episodes)
    roles = dict(member.cameras) if member.cameras is not None else {name: name for name in source.cameras}
    horizon = max(spec.chunks.values(), default=0)
    if align != "unified" or not horizon:
        return _Opened(source, own, roles)
    # State and action are made of the same columns at other frames: those columns again, as chunks. Deltas
    # must not be summed or zeroed: the unified action is absolute, at each step its own.
    chunks = dict.fromkeys(names, horizon)
    acting = replace(own, columns=(), cameras=(), at={}, chunks=chunks, action_columns=(), padding="repeat")
    return _Opened(source, own, roles, Source(dataset, source.rows, source.samples, acting), acting)


class MixtureSource:
    """Samples of all members, numbered one member after another."""

    def __init__(self, opened: Sequence[_Opened], weights: Sequence[float], align: str):
        self.members, self.align = tuple(opened), align
        self.weights = tuple(float(weight) for weight in weights)
        self.sizes = tuple(len(each.source.samples) for each in opened)
        self.samples = range(sum(self.sizes))
        self.roles = tuple(dict.fromkeys(role for each in opened for role in each.roles))
        self.layout = {} if align == "unified" else _layout(opened)
        self.embodiments = (
            [embodiment_of(each.source.dataset) for each in opened] if align == "unified" else []
        )

    def origin(self) -> str:
        return "; ".join(
            f"{each.source.dataset.name} {weight / sum(self.weights):.1%}, {each.source.origin()}"
            for each, weight in zip(self.members, self.weights, strict=True)
        )

    def order(self, shuffle: Shuffle, seed: int) -> MixtureOrder:
        return MixtureOrder(shuffle, seed, self.sizes, block_counts(self.weights))

    def read(self, samples: NDArray[np.int64], spec: StreamSpec, health: Health) -> Batch:
        """Each member's share read on its own, then put where its samples stand in the batch."""
        ends = np.cumsum(self.sizes)
        owner = np.searchsorted(ends, samples, side="right")
        whole: Batch = {"dataset": owner}
        for number in np.unique(owner).tolist():
            places = np.flatnonzero(owner == number)
            own = samples[places] - (ends[number] - self.sizes[number])
            share = self._share(number, own, health)
            for name, values in share.items():
                if isinstance(values, list):
                    target = whole.setdefault(name, [""] * len(samples))
                    for place, value in zip(places.tolist(), values, strict=True):
                        target[place] = value
                    continue
                if name not in whole:
                    whole[name] = np.zeros((len(samples), *values.shape[1:]), values.dtype)
                whole[name][places] = values
        for role in self.roles:
            if role not in whole and spec.size is not None:
                whole[role] = np.zeros((len(samples), *spec.size, 3), np.uint8)
            missing = np.array([role not in each.roles for each in self.members])
            if missing.any():
                whole[f"{role}_is_missing"] = missing[owner]
        return whole

    def _share(self, number: int, samples: NDArray[np.int64], health: Health) -> Batch:
        member = self.members[number]
        batch = member.source.read(samples, member.spec, health)
        share: Batch = {}
        for role, camera in member.roles.items():
            share[role] = batch.pop(camera)
            if f"{camera}_is_pad" in batch:
                share[f"{role}_is_pad"] = batch.pop(f"{camera}_is_pad")
        if self.align == "unified":
            return share | self._unified(number, samples, batch, health)
        for name, names in self.layout.items():
            values = batch.pop(name, None)
            if values is None:
                continue
            own_names = _dim_names(member.source.dataset, name)
            columns = [names.index(each) for each in own_names]
            wide = np.zeros((*values.shape[: values.ndim - 1], len(names)), np.float32)
            wide[..., columns] = values
            mask = np.zeros((len(samples), len(names)), bool)
            mask[:, columns] = True
            share[name], share[f"{name}_mask"] = wide, mask
        return share | batch

    def _unified(self, number: int, samples: NDArray[np.int64], batch: Batch, health: Health) -> Batch:
        """State at the observed frames and absolute action at each step, [B, ..., DIM] and their masks."""
        member, embodiment = self.members[number], self.embodiments[number]
        names = member.spec.columns
        share = {
            name: values
            for name, values in batch.items()
            if name not in names and not name.endswith("_is_pad")
        }
        share |= _vector(STATE, unify_state, embodiment, {name: batch[name] for name in names}, len(samples))
        if f"{names[0]}_is_pad" in batch:
            share[f"{STATE}_is_pad"] = batch[f"{names[0]}_is_pad"]
        if member.acting is not None and member.acting_spec is not None:
            acted = member.acting.read(samples, member.acting_spec, health)
            share |= _vector(
                ACTION, unify_action, embodiment, {name: acted[name] for name in names}, len(samples)
            )
            share[f"{ACTION}_is_pad"] = acted[f"{names[0]}_is_pad"]
        return share

    def proportions(self, stream: Stream) -> list[dict[str, Any]]:
        """What was handed out so far, by member: samples, share, the share asked for, passes through it."""
        state = stream.state_dict()
        done = state["epoch"] * stream.samples + state["done"] + state["step"] * stream.global_batch
        drawn = self.order(stream.shuffle, stream.seed).drawn(done)
        total = sum(self.weights)
        return [
            {
                "dataset": member.source.dataset.name,
                "samples": int(count),
                "share": float(count / max(1, done)),
                "asked": weight / total,
                "passes": float(count / size),
            }
            for member, count, weight, size in zip(self.members, drawn, self.weights, self.sizes, strict=True)
        ]


def _vector(
    name: str, unify: Any, embodiment: Embodiment, columns: Mapping[str, NDArray[Any]], count: int
) -> Batch:
    """Native columns [B, ..., D] -> one unified vector [B, ..., DIM] float32, and its mask [B, DIM]."""
    shape = next(iter(columns.values())).shape[:-1]
    flat = {each: values.reshape(-1, values.shape[-1]) for each, values in columns.items()}
    found = unify(embodiment, flat)
    values = found.values.astype(np.float32).reshape(*shape, DIM)
    return {name: values, f"{name}_mask": np.broadcast_to(found.mask, (count, DIM)).copy()}


def embodiment_of(dataset: Dataset) -> Embodiment:
    """The embodiment a dataset of ours records in its manifest."""
    body = (dataset.manifest or {}).get("embodiment")
    if not body:
        raise UsageError(
            f"{dataset.root} does not say what its numbers mean, so it has no unified vector\n"
            "  Convert it with dpipe, or mix by names."
        )

    def features(told: Mapping[str, Any]) -> tuple[Feature, ...]:
        return tuple(
            Feature(name, each["dtype"], tuple(each["names"]), each.get("unit", ""), each.get("frame", ""))
            for name, each in told.items()
        )

    return Embodiment(
        body["name"],
        body.get("robot_type", ""),
        dataset.fps,
        body.get("fps_origin", ""),
        features(body["features"]),
        (dataset.manifest or {}).get("conventions", {}),
        features(body.get("sidecar", {})),
    )


def native_columns(dataset: Dataset) -> tuple[str, ...]:
    """What unified vectors are made of: every column of more than one dimension, those beside the dataset too."""
    body = embodiment_of(dataset)
    return tuple(feature.name for feature in (*body.features, *body.sidecar) if feature.dim > 1)


def _layout(opened: Sequence[_Opened]) -> dict[str, tuple[str, ...]]:
    """Column -> its common dimensions, in the order the members bring them."""
    found: dict[str, dict[str, None]] = {}
    for each in opened:
        for name in (*each.spec.columns, *each.spec.chunks):
            found.setdefault(name, {}).update(dict.fromkeys(_dim_names(each.source.dataset, name)))
    return {name: tuple(names) for name, names in found.items()}


def _dim_names(dataset: Dataset, column: str) -> tuple[str, ...]:
    """Names of a column's dimensions, its numbers where it has none."""
    names = dataset.names(column)
    told = dataset.features.get(column) or dataset.sidecar[column]
    width = int(np.prod(told["shape"]))
    return names if len(names) == width else tuple(str(d) for d in range(width))


def episodes_where(dataset: Dataset, condition: str, split: str = "all") -> list[int]:
    """Episodes of a split that meet an SQL condition over episode, frames, seconds, task, split and source_id."""
    import duckdb
    import pyarrow as pa

    count = len(dataset)
    table: dict[str, Any] = {
        "episode": np.arange(count),
        "frames": dataset.episodes.length,
        "seconds": dataset.episodes.length / dataset.fps,
        "task": _first_tasks(dataset),
    }
    for name in ("split", "source_id"):
        column = dataset.episodes.text.column(name)
        if column is not None:
            table[name] = column
    episodes = pa.table(table)
    connection = duckdb.connect(config={"enable_external_access": False})
    connection.register("episodes", episodes)
    try:
        rows = connection.execute(
            f"SELECT episode FROM episodes WHERE {condition} ORDER BY episode"
        ).fetchall()
    except duckdb.Error as error:
        raise UsageError(
            f"where '{condition}' cannot be evaluated: {str(error).splitlines()[0]}\n"
            f"  columns: {', '.join(episodes.column_names)}"
        ) from error
    inside = dataset.episodes_in(split)
    chosen = [row for (row,) in rows if row in inside]
    if not chosen:
        raise UsageError(f"no episode of {dataset.name}, split '{split}', meets:  {condition}")
    return chosen


def _first_tasks(dataset: Dataset) -> pa.Array:
    """The first sentence of every episode, "" where it has none."""
    import pyarrow as pa

    column = dataset.episodes.text.column("tasks")
    if column is None:
        return pa.array([""] * len(dataset))
    return pa.array([tasks[0] if tasks else "" for tasks in column.to_pylist()], pa.string())
