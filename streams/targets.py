"""Targets for any trainer: look supervision up by frame, beside whatever loads the frames.

    targets = open_targets("lerobot/libero", ["tokens:N=10", "foresight:cam=image,at=+16"], horizon=10)
    train_set = targets.join(LeRobotDataset(...))         items gain `tokens`, `tokens_is_pad`, `foresight`, ...
    more = targets.take(index=batch["index"])             or by row numbers, or by (episode, frame)

numpy, lazily, without torch or dask; safe under fork and spawn (open maps stay behind and are opened again).

A target is bound to a dataset by what its episodes contain (`streams/dataset.py`, `episode_content`), not by
their numbers: it survives merging, splitting, filtering and the v2.1 export, and serves datasets that dpipe did
not write. An episode without targets is an error when the targets are opened, never a gap later.

A request is `stage:key=value,...`
    at=+16 or at=0|16   frames ahead of the sample (rows of the cache at t + at, the last one repeated)
    as=goal             the name in the result; the stage's by default
    cam=image           the camera;  name=VARIANT  a target by its folder;  array=resid_N10  another array
    length=64           of ragged sequences, padded to it
    anything else       a parameter of the stage or what tells its arrays apart, e.g. N=10

With `horizon` H, arrays that are per-frame actions or tokens become chunks [H, ...]. Every name comes with
`<name>_is_pad`: True where a value repeats beyond the episode or was never valid, so must not be learnt.

Legend   B samples, H steps of a chunk, T frames of an episode
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.bfloat16 import bfloat16_to_float32
from ..schemas.claims import refuse_claims
from ..schemas.contract import BFLOAT16, ArraySpec, Contract, digest_of
from ..schemas.errors import DataError, UsageError, malformed_as, unknown_name
from ..schemas.features import CAMERA_PREFIX, POLICY_NAMES
from .arrays import CompressedRows, open_array

if TYPE_CHECKING:
    from .dataset import Dataset

Batch = dict[str, NDArray[Any]]

# Fields of the contract that must agree between the folders a merged dataset takes one target from.
SHARED_TERMS = (
    *("stage_version", "fps", "params", "model", "weights", "layer"),
    *("preprocessing", "camera", "dtype", "horizon_frames", "normaliser"),
)


@dataclass(frozen=True)
class EpisodeTable:
    """What binding needs of a dataset: each episode's content digest and number of frames, in order."""

    contents: tuple[str, ...]
    lengths: tuple[int, ...]
    name: str = ""

    @property
    def first_rows(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)


@dataclass(frozen=True)
class Request:
    """One parsed `stage:key=value,...`."""

    text: str
    stage: str
    name: str
    at: tuple[int, ...]
    several: bool  # several offsets were asked for: results get an axis for them
    camera: str
    variant: str
    array: str
    length: int
    select: Mapping[str, str]


def parse_request(text: str) -> Request:
    stage, _, rest = text.partition(":")
    words: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key or not value:
            raise UsageError(f"target '{text}': '{part}' is not key=value\n  e.g. foresight:cam=image,at=+16")
        words[key.strip()] = value.strip()
    try:
        at = words.pop("at", "0")
        offsets = tuple(int(offset) for offset in at.split("|"))
        length = int(words.pop("length", "0"))
    except ValueError:
        raise UsageError(
            f"target '{text}': at= and length= take whole numbers, e.g. at=+16 or at=0|16"
        ) from None
    return Request(
        text,
        stage,
        words.pop("as", stage),
        offsets,
        "|" in at,
        words.pop("cam", ""),
        words.pop("name", ""),
        words.pop("array", ""),
        length,
        words,
    )


@dataclass(frozen=True)
class _Folder:
    """One finished target on disk."""

    path: Path
    contract: Contract
    arrays: tuple[ArraySpec, ...]


@dataclass(frozen=True)
class _Places:
    """Where each episode of the dataset has its rows in one target: numbers [E], -1 where it has none."""

    files: tuple[str, ...]  # "<folder number>/part-..." ; one per (folder, part)
    file: NDArray[np.int64]
    start: Mapping[str, NDArray[np.int64]]  # by axis
    rows: Mapping[str, NDArray[np.int64]]


@dataclass
class _Column:
    """One array in the result: which array of which target, at which offsets, under which name."""

    name: str
    spec: ArraySpec
    request: Request
    folders: tuple[_Folder, ...]
    places: _Places
    horizon: int
    valid: ArraySpec | None
    mask: str  # name of the mask in the result


def open_targets(
    dataset: Any,
    requests: Sequence[str],
    horizon: int = 0,
    targets: Path | str | Sequence[Path | str] | None = None,
    expect: Mapping[str, Mapping[str, Any]] | None = None,
    augmentation: str = "none",
    allow_missing: bool = False,
) -> Targets:
    """Targets of a dataset, ready to be looked up; see the module's text for `requests`.

    `dataset` is a folder, an opened `Dataset`, anything with a `root` (a LeRobotDataset), or an `EpisodeTable`.
    `targets` are folders holding <stage>/<variant>; the dataset's own dpipe/targets by default. `expect` gives
    contract fields by stage ({"tokens": {"normaliser": digest}}); a difference is refused by name, and so is
    an `augmentation` of the pixels that a cached feature cannot follow. With `allow_missing`, episodes
    without targets are an error only when they are looked up.
    """
    table, root, wanted, pixels = _episode_table(dataset)
    bases = _target_folders(targets, root)
    with malformed_as(
        f"a target in {', '.join(map(str, bases))}", "See what is wrong:  dpipe doctor DATASET"
    ):
        columns = _open_columns(
            requests, bases, table, wanted, pixels, horizon, expect, augmentation, allow_missing
        )
    names = [name for column in columns for name in (column.name, column.mask)]
    twice = sorted({column.name for column in columns if names.count(column.name) > 1})
    if twice:
        raise UsageError(f"two targets are called '{twice[0]}'\n  Name one of them:  ...,as=OTHER")
    return Targets(table, columns, root)


def _open_columns(
    requests: Sequence[str],
    bases: Sequence[Path],
    table: EpisodeTable,
    wanted: NDArray[np.int64] | None,
    pixels: Callable[[str], str] | None,
    horizon: int,
    expect: Mapping[str, Mapping[str, Any]] | None,
    augmentation: str,
    allow_missing: bool,
) -> list[_Column]:
    columns: list[_Column] = []
    for text in requests:
        request = parse_request(text)
        folders = _find(request, bases)
        for folder in folders:
            folder.contract.check(str(folder.path), **(expect or {}).get(request.stage, {}))
            folder.contract.check_augmentation(augmentation)
            seen = pixels(folder.contract.camera) if pixels else ""
            if seen and folder.contract.pixels:
                folder.contract.check(str(folder.path), pixels=seen)
        for folder in folders[1:]:
            shared = {name: getattr(folders[0].contract, name) for name in SHARED_TERMS}
            folder.contract.check(str(folder.path), **shared)
        places = _bind(request, folders, table)
        missing = np.flatnonzero(places.file < 0)
        missing = missing if wanted is None else np.intersect1d(missing, wanted)
        if len(missing) and not allow_missing:
            raise DataError(
                f"target '{text}': {len(missing)} of {len(table.contents)} episodes have none, "
                f"first episode {missing[0]}\n  looked in: {', '.join(str(f.path) for f in folders)}\n"
                f"  Add them:  dpipe precompute {request.stage}"
            )
        columns += _columns(request, folders, places, horizon)
    return columns


@dataclass
class Targets:
    """Opened targets, from `open_targets`. Pickles small: maps are opened again where it arrives."""

    table: EpisodeTable
    columns: list[_Column]
    root: Path | None = None
    _dataset: Dataset | None = field(default=None, repr=False)
    _open: dict[Path, NDArray[Any] | CompressedRows] = field(default_factory=dict, repr=False)
    _scales: dict[Path, NDArray[Any]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._first = self.table.first_rows
        self._length = np.asarray(self.table.lengths, dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}, "_scales": {}, "_dataset": None}

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the result, without their masks."""
        return tuple(column.name for column in self.columns)

    @property
    def contracts(self) -> dict[str, Contract]:
        """What each name was made from."""
        return {column.name: column.folders[0].contract for column in self.columns}

    def take(self, index: Any = None, *, episode: Any = None, frame: Any = None) -> Batch:
        """Targets of a batch [B], by row in the dataset (LeRobot's `index`) or by episode and frame.

        Whatever numpy can read is accepted, tensors included. A single number gives results without the B.
        """
        if (index is None) == (episode is None) or (episode is None) != (frame is None):
            raise UsageError("take() wants index=..., or episode=... and frame=...")
        if index is not None:
            rows = np.asarray(index, dtype=np.int64)
            flat = rows.reshape(-1)
            episodes = np.searchsorted(self._first, flat, side="right") - 1
            frames = flat - self._first[episodes]
            outside = (flat < 0) | (frames >= self._length[episodes])
        else:
            pair = np.broadcast_arrays(np.asarray(episode, dtype=np.int64), np.asarray(frame, dtype=np.int64))
            rows = pair[0]
            episodes, frames = rows.reshape(-1), pair[1].reshape(-1)
            known = (episodes >= 0) & (episodes < len(self._length))
            outside = ~known
            outside[known] = (frames[known] < 0) | (frames[known] >= self._length[episodes[known]])
        if outside.any():
            i = int(np.flatnonzero(outside)[0])
            where = (
                f"row {rows.reshape(-1)[i]}"
                if index is not None
                else f"episode {episodes[i]}, frame {frames[i]}"
            )
            raise IndexError(f"{where} is outside the dataset's {len(self._length)} episodes")
        result: Batch = {}
        for column in self.columns:
            with malformed_as(f"target '{column.request.text}'", f"dpipe precompute {column.request.stage}"):
                self._fill(result, column, episodes, frames)
        return {name: values.reshape((*rows.shape, *values.shape[1:])) for name, values in result.items()}

    def join(self, dataset: Any) -> Joined:
        """`dataset` with the targets in every item; length, attributes and batched reading are its own."""
        return Joined(dataset, self)

    def _fill(
        self, result: Batch, column: _Column, episodes: NDArray[np.int64], frames: NDArray[np.int64]
    ) -> None:
        request, spec = column.request, column.spec
        offsets = np.array(request.at, dtype=np.int64)
        steps = np.arange(column.horizon) if column.horizon else np.zeros(1, dtype=np.int64)
        # [B, offsets, steps]
        wanted = frames[:, None, None] + offsets[:, None] + steps
        length = self._length[episodes][:, None, None]
        beyond = (wanted < 0) | (wanted >= length)
        local = np.clip(wanted, 0, length - 1)
        owner = np.broadcast_to(episodes[:, None, None], local.shape)
        if "ragged" in spec.attributes:
            values, is_pad = self._ragged(column, owner[:, 0, 0], local[:, 0, 0])
            result[column.name], result[column.mask] = values, is_pad | beyond[:, 0]
            return
        values = self._gather(column, spec, owner, local)
        is_pad = beyond
        if column.valid is not None:
            own = self._gather(column, column.valid, owner, local)
            own = own if spec.attributes.get("mask_is_pad") else ~own
            extra = own.ndim - beyond.ndim
            is_pad = beyond.reshape(beyond.shape + (1,) * extra) | own
        result[column.name] = _squeeze(values, request.several, column.horizon)
        mask = _squeeze(is_pad, request.several, column.horizon)
        # Arrays of one request share a mask: padded is what any of them cannot vouch for.
        result[column.mask] = result[column.mask] | mask if column.mask in result else mask

    def _gather(
        self, column: _Column, spec: ArraySpec, episodes: NDArray[np.int64], local: NDArray[np.int64]
    ) -> NDArray[Any]:
        """Rows of an array for local frames of any shape: [..., *row]."""
        if "compute" in spec.attributes:
            return self._computed(column, spec, episodes, local)
        places = column.places
        if spec.every:
            row = local // spec.every
        else:
            stride = int(spec.attributes.get("stride", 1))
            row = np.minimum(local // stride, places.rows[spec.axis][episodes] - 1)
        row = places.start[spec.axis][episodes] + row
        files = places.file[episodes]
        used = np.unique(files)
        if len(used) and used[0] < 0:
            lost = int(episodes.reshape(-1)[np.flatnonzero(files.reshape(-1) < 0)[0]])
            raise DataError(f"target '{column.request.text}': episode {lost} has none")
        if len(used) == 1:
            values = np.asarray(self._array(column, spec, int(used[0]))[row])
        else:
            values = np.empty((*row.shape, *spec.shape), spec.stored)
            for file in used:
                here = files == file
                values[here] = self._array(column, spec, int(file))[row[here]]
        return self._decoded(column, spec, values)

    def _computed(
        self, column: _Column, spec: ArraySpec, episodes: NDArray[np.int64], local: NDArray[np.int64]
    ) -> NDArray[Any]:
        """An in-loop target: the frames are decoded here and its stage computes what a cache would hold."""
        from .dataset import open_dataset

        if self.root is None:
            raise UsageError(
                f"target '{column.request.text}' is computed from frames: give the dataset's folder"
            )
        if self._dataset is None:
            self._dataset = open_dataset(self.root)
        folder = column.folders[0]
        # Named by the target, not imported: reading targets must not need the stages' models.
        compute = import_module(f"...stages.{spec.attributes['compute']}", __name__).compute_in_loop
        pairs = np.stack([episodes.reshape(-1), local.reshape(-1)], axis=1)
        unique, back = np.unique(pairs, axis=0, return_inverse=True)
        camera = folder.contract.camera
        frames = self._frames(self._dataset, camera, unique, spec.attributes.get("read_size"))
        values = compute(folder.path, frames)[back.reshape(-1)]
        return values.reshape((*local.shape, *spec.shape))

    def _frames(
        self, dataset: Dataset, camera: str, pairs: NDArray[np.int64], size: Sequence[int] | None
    ) -> NDArray[np.uint8]:
        """Frames of (episode, frame) pairs [n, 2], sorted, as the stage itself would read them."""
        if dataset.features[camera]["dtype"] != "video":
            found = [dataset.frames(int(e), camera, int(t), int(t) + 1) for e, t in pairs]
            return np.concatenate(found)
        first = dataset.episodes.cameras[camera].first_frame
        wanted = None if size is None else (int(size[0]), int(size[1]))
        each = [pairs[pairs[:, 0] == e] for e in np.unique(pairs[:, 0])]
        return np.concatenate(
            [dataset.video(int(p[0, 0]), camera, wanted).read(int(first[p[0, 0]]) + p[:, 1]) for p in each]
        )

    def _array(self, column: _Column, spec: ArraySpec, file: int) -> NDArray[Any] | CompressedRows:
        number, _, part = column.places.files[file].partition("/")
        path = column.folders[int(number)].path / spec.name / part
        if path not in self._open:
            self._open[path] = open_array(path)
        return self._open[path]

    def _decoded(self, column: _Column, spec: ArraySpec, values: NDArray[Any]) -> NDArray[Any]:
        """What was stored small, as the numbers it stands for."""
        if spec.dtype == BFLOAT16:
            return bfloat16_to_float32(values)
        scale = spec.attributes.get("scale")
        if scale is None:
            return values
        path = column.folders[0].path / scale
        if path not in self._scales:
            self._scales[path] = np.load(path)
        return values.astype(np.float32) * self._scales[path]

    def _ragged(
        self, column: _Column, episodes: NDArray[np.int64], local: NDArray[np.int64]
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Sequences [B, L] of their own lengths, padded with zeros; L is the longest, or what was asked for."""
        spec, names = column.spec, column.spec.attributes["ragged"]
        arrays = {a.name: a for a in column.folders[0].arrays}
        first = self._gather(column, arrays[names["start"]], episodes, local).astype(np.int64)
        count = self._gather(column, arrays[names["rows"]], episodes, local).astype(np.int64)
        longest = column.request.length or int(count.max(initial=0))
        if count.max(initial=0) > longest:
            raise DataError(
                f"target '{column.request.text}': a sequence of {count.max()} is longer than length={longest}"
            )
        values = np.zeros((len(local), longest), spec.stored)
        base = column.places.start[spec.axis][episodes]
        for i in range(len(local)):
            array = self._array(column, spec, int(column.places.file[episodes[i]]))
            start = int(base[i] + first[i])
            values[i, : count[i]] = array[start : start + int(count[i])]
        return values, np.arange(longest) >= count[:, None]


class Joined:
    """A map-style dataset whose items carry targets; everything else is the dataset's own."""

    def __init__(self, dataset: Any, targets: Targets):
        self.dataset, self.targets = dataset, targets

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> dict[str, Any]:
        item = self.dataset[position]
        return {**item, **self.targets.take(**self._place(item, position))}

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """A whole batch at once, as torch's loader asks for it: one look-up per target instead of B."""
        fetch = getattr(self.dataset, "__getitems__", None)
        items = fetch(positions) if fetch else [self.dataset[position] for position in positions]
        if not items:
            return []
        places = [self._place(item, position) for item, position in zip(items, positions, strict=True)]
        batch = self.targets.take(**{key: np.array([place[key] for place in places]) for key in places[0]})
        return [{**item, **{name: v[i] for name, v in batch.items()}} for i, item in enumerate(items)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[position] for position in range(len(self)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("dataset", "targets"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def _place(self, item: Mapping[str, Any], position: int) -> dict[str, int]:
        """By the item's own episode and frame, else its row, else its position in an unfiltered dataset."""
        if "episode_index" in item and "frame_index" in item:
            return {"episode": int(item["episode_index"]), "frame": int(item["frame_index"])}
        if "index" in item:
            return {"index": int(item["index"])}
        total = sum(self.targets.table.lengths)
        if len(self.dataset) != total:
            raise UsageError(
                f"items carry neither episode_index and frame_index nor index, and the dataset's {len(self.dataset)} "
                f"items are not the {total} frames the targets are bound to\n"
                "  Join before the transform that drops those keys, or use targets.take(episode=..., frame=...)."
            )
        return {"index": int(position)}


def _squeeze(values: NDArray[Any], several: bool, horizon: int) -> NDArray[Any]:
    """[B, offsets, steps, ...] without the axes nobody asked for."""
    values = values if horizon else values[:, :, 0]
    return values if several else values[:, 0]


def _columns(request: Request, folders: tuple[_Folder, ...], places: _Places, horizon: int) -> list[_Column]:
    """Which arrays a request means: the one named, the primary one that fits, or all that fit."""
    arrays = folders[0].arrays
    if request.array:
        chosen = [spec for spec in arrays if spec.name == request.array]
        if not chosen:
            raise unknown_name(f"array of {request.stage}", request.array, [spec.name for spec in arrays])
    else:
        fitting = [spec for spec in arrays if _selects(spec, request.select)]
        chosen = [spec for spec in fitting if spec.attributes.get("primary")] or [
            spec for spec in fitting if not spec.attributes.get("auxiliary")
        ]
        if len(chosen) > 1 and all(spec.attributes.get("primary") for spec in chosen):
            told = ", ".join(f"{k}={v}" for spec in chosen for k, v in spec.attributes["select"].items())
            raise UsageError(f"target '{request.text}' could be any of {told}\n  Say which.")
    by_name = {spec.name: spec for spec in arrays}
    columns = []
    for spec in chosen:
        alone = len(chosen) == 1
        valid = by_name.get(spec.attributes.get("mask", ""))
        columns.append(
            _Column(
                name=request.name if alone else f"{request.name}_{spec.name}",
                spec=spec,
                request=request,
                folders=folders,
                places=places,
                horizon=horizon if spec.attributes.get("chunked") else 0,
                valid=valid,
                mask=f"{request.name}_is_pad",
            )
        )
    return columns


def _selects(spec: ArraySpec, select: Mapping[str, str]) -> bool:
    own = spec.attributes.get("select", {})
    return all(str(own[key]) == value for key, value in select.items() if key in own)


def _find(request: Request, bases: Sequence[Path]) -> tuple[_Folder, ...]:
    """The finished targets a request means, at most one per folder; DataError listing what there is."""
    every = [folder for base in bases for folder in _finished(base, request.stage)]
    fitting = [folder for folder in every if _fits(folder, request)]
    if not fitting:
        there = [f"{folder.path.name}: {_terms(folder)}" for folder in every]
        raise DataError(
            f"no target '{request.text}' in {', '.join(map(str, bases))}\n  found: "
            + ("\n         ".join(there) or f"no finished target of stage {request.stage}")
            + f"\n  Make it:  dpipe precompute {request.stage}"
        )
    found: list[_Folder] = []
    for base in bases:
        here = [folder for folder in fitting if folder.path.parent.parent == base]
        if len(here) > 1:
            names = "\n         ".join(f"name={folder.path.name}: {_terms(folder)}" for folder in here)
            raise UsageError(f"target '{request.text}' fits {len(here)} targets in {base}\n  found: {names}")
        found += here
    return tuple(found)


def _finished(base: Path, stage: str) -> list[_Folder]:
    found = []
    for path in sorted((base / stage).glob("*/contract.json")):
        with malformed_as(path, f"Precompute the target again:  dpipe precompute {stage}"):
            data = json.loads(path.read_text())
            arrays = tuple(ArraySpec.from_json(spec) for spec in data["arrays"])
            found.append(_Folder(path.parent, Contract.from_json(data["contract"]), arrays))
    return found


def _fits(folder: _Folder, request: Request) -> bool:
    contract = folder.contract
    if request.variant and request.variant != folder.path.name:
        return False
    if request.camera and request.camera.removeprefix(CAMERA_PREFIX) != contract.camera.removeprefix(
        CAMERA_PREFIX
    ):
        return False
    selectors = {key for spec in folder.arrays for key in spec.attributes.get("select", {})}
    for key, value in request.select.items():
        if key in selectors:
            if not any(str(spec.attributes.get("select", {}).get(key)) == value for spec in folder.arrays):
                return False
        elif key in contract.params:
            if _as_word(contract.params[key]) != value:
                return False
        elif str(getattr(contract, key, None)) != value:
            return False
    return True


def _as_word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "|".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _terms(folder: _Folder) -> str:
    told = {**folder.contract.params, "camera": folder.contract.camera, "model": folder.contract.model}
    return ", ".join(
        f"{key}={_as_word(value)}" for key, value in told.items() if value not in ("", None, 0, [])
    )


def _bind(request: Request, folders: Sequence[_Folder], table: EpisodeTable) -> _Places:
    """Content to content: the i-th episode of one content in the dataset takes the i-th of the target's."""
    import pyarrow.parquet as pq

    files: list[str] = []
    places: dict[str, list[tuple[int, dict[str, tuple[int, int]], int]]] = {}
    axes = sorted({spec.axis for spec in folders[0].arrays} | {"frame"})
    for number, folder in enumerate(folders):
        path = folder.path / "episodes.parquet"
        try:
            file = pq.ParquetFile(path)
            refuse_claims(file.metadata, path.stat().st_size, str(path))
            index = file.read().to_pydict()
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is damaged\n  found: {error}\n  Precompute the target again.") from error
        wanted = [
            "content",
            "part",
            "key",
            "frames",
            *(f"{axis}_{n}" for axis in axes for n in ("start", "rows")),
        ]
        lost = [name for name in wanted if name not in index]
        if lost:
            raise DataError(
                f"{path}: no column '{lost[0]}'\n  found: {', '.join(index)}\n  Precompute it again."
            )
        known: dict[str, int] = {}
        with malformed_as(path, f"Precompute the target again:  dpipe precompute {request.stage}"):
            for i, content in enumerate(index["content"]):
                if not str(index["key"][i]).isalnum():
                    raise DataError(f"{path}: row {i} names part {index['key'][i]!r:.80}; refused")
                part = f"{number}/part-{index['part'][i]:05d}-{index['key'][i]}"
                if part not in known:
                    known[part] = len(files)
                    files.append(part)
                spans = {
                    axis: (int(index[f"{axis}_start"][i]), int(index[f"{axis}_rows"][i])) for axis in axes
                }
                places.setdefault(content, []).append((known[part], spans, int(index["frames"][i])))
    count = len(table.contents)
    file = np.full(count, -1, dtype=np.int64)
    start = {axis: np.zeros(count, dtype=np.int64) for axis in axes}
    rows = {axis: np.zeros(count, dtype=np.int64) for axis in axes}
    seen: dict[str, int] = {}
    for e, (content, length) in enumerate(zip(table.contents, table.lengths, strict=True)):
        if content not in places:
            continue
        nth = min(seen.get(content, 0), len(places[content]) - 1)
        seen[content] = seen.get(content, 0) + 1
        number, spans, frames = places[content][nth]
        if frames != length:
            raise DataError(f"target '{request.text}': episode {e} has {length} frames, its target {frames}")
        file[e] = number
        for axis, (first, n) in spans.items():
            start[axis][e], rows[axis][e] = first, n
    return _Places(tuple(files), file, start, rows)


def _target_folders(targets: Any, root: Path | None) -> list[Path]:
    if targets is None:
        if root is None:
            raise UsageError("an EpisodeTable has no folder of its own: give targets=FOLDER")
        return [root / "dpipe" / "targets"]
    if isinstance(targets, (str, Path)):
        return [Path(targets)]
    return [Path(folder) for folder in targets]


def pixel_identity(dataset: Dataset, cameras: str) -> str:
    """What a dataset says of some cameras' pixels: sizes, and how pictures were turned or cut.

    Contents are action and state alone, so that this is what tells two conversions of one recording apart.
    `cameras` are names joined by commas; "" where there are none, or one is not in this dataset.
    """
    names = [name for name in cameras.split(",") if name]
    if not names or not set(names) <= set(dataset.cameras):
        return ""
    conventions = (dataset.manifest or {}).get("conventions") or {}
    turned = {name: value for name, value in conventions.items() if "image" in name}
    return digest_of([[list(dataset.camera_size(name)) for name in names], turned])


def _episode_table(
    dataset: Any,
) -> tuple[EpisodeTable, Path | None, NDArray[np.int64] | None, Callable[[str], str] | None]:
    """(contents and lengths, root folder, episodes in use where filtered, what its cameras' pixels are)."""
    from .dataset import Dataset, open_dataset

    if isinstance(dataset, EpisodeTable):
        return dataset, None, None, None
    wanted = None
    if not isinstance(dataset, (str, Path, Dataset)):
        used = getattr(dataset, "episodes", None)
        wanted = np.asarray(list(used), dtype=np.int64) if isinstance(used, (list, tuple, range)) else None
        root = getattr(dataset, "root", None) or getattr(getattr(dataset, "meta", None), "root", None)
        if root is None:
            raise UsageError(
                f"cannot tell which dataset a {type(dataset).__name__} is: it has no root\n"
                "  Give the dataset's folder, or an EpisodeTable of contents and lengths."
            )
        dataset = root
    if not isinstance(dataset, Dataset):
        folder = Path(dataset)
        if _version(folder).startswith("v2."):
            return _table_of_v21(folder), folder, wanted, None
        dataset = open_dataset(folder)
    opened = dataset
    pixels = None if opened.manifest is None else lambda camera: pixel_identity(opened, camera)
    return _table_of(opened), opened.root, wanted, pixels


def _table_of(dataset: Dataset) -> EpisodeTable:
    lengths = tuple(int(n) for n in dataset.episodes.length)
    return EpisodeTable(tuple(dataset.contents()), lengths, dataset.name)


def _version(root: Path) -> str:
    path = root / "meta" / "info.json"
    return str(json.loads(path.read_text()).get("codebase_version", "")) if path.is_file() else ""


def _table_of_v21(root: Path) -> EpisodeTable:
    """Contents of a LeRobot v2.1 dataset: one Parquet file per episode, named by info.json's template."""
    import pyarrow.parquet as pq

    from .dataset import CONTENT_COLUMNS, episode_content

    info = json.loads((root / "meta" / "info.json").read_text())
    template = info.get("data_path", "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet")
    contents, lengths = [], []
    for e in range(int(info["total_episodes"])):
        chunk = e // int(info.get("chunks_size", 1000))
        file = pq.ParquetFile(root / template.format(episode_chunk=chunk, episode_index=e))
        have = file.schema_arrow.names
        stored = {new: old for old, new in POLICY_NAMES.items() if old in have} | {n: n for n in have}
        names = {name: stored[name] for name in CONTENT_COLUMNS if name in stored}
        table = file.read(columns=list(names.values()))
        columns = {n: np.array(table.column(old).to_pylist(), dtype=np.float32) for n, old in names.items()}
        lengths.append(file.metadata.num_rows)
        contents.append(episode_content(columns, lengths[-1]))
    return EpisodeTable(tuple(contents), tuple(lengths), root.name)
