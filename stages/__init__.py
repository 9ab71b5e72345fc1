"""Episode columns -> new columns, one file per stage. Knows schemas, video and models.

A stage turns an episode's columns and frames into per-frame arrays that supervise a model. To add one: write
`stages/<name>.py` with `Params`, pure functions, `run` and a `STAGE`, and add its line to `STAGES`. Raise its
`version` when the output of an unchanged episode would change. Modules load when they are asked for.

Where files are, which parts are done and who runs them is the pipeline's business: a stage sees one dataset
through `DatasetView` and one episode through `EpisodeView`, and returns arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, get_type_hints

import numpy as np
from numpy.typing import NDArray

from ..schemas.contract import ArraySpec
from ..schemas.errors import UsageError, unknown_name
from ..schemas.features import CAMERA_PREFIX

STAGES = {
    "teacher": "hidden states of a frozen policy's action tokens (vita)",
    "residuals": "what a frozen anchor policy's chunk lacks (anchorrefine)",
    "privileged": "what a flow policy would say if it saw the future (pfd)",
    "foresight": "a frozen vision tower's tokens of every frame (dial)",
    "tokens": "coarse-bin action tokens and the report that chooses N (libra)",
    "fast": "action chunks as a few byte-pair tokens of their cosines (FAST)",
    "stats": "exact statistics of columns, also relative to the chunk start (any trainer)",
    "shards": "JPEG frames and columns as Parquet for fast random reading (any trainer)",
}

Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class DatasetInfo:
    """What a stage may know of a dataset before reading any episode."""

    name: str
    fps: int
    episodes: int
    frames: int
    features: Mapping[str, Mapping[str, Any]]  # as in info.json
    cameras: Mapping[str, tuple[int, int]]  # name -> (height, width); the first is the primary one
    conventions: Mapping[str, Any] = field(default_factory=dict)
    splits: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # name -> episodes [first, stop)

    def names(self, column: str) -> tuple[str, ...]:
        """Names of a column's dimensions; UsageError listing the columns where there is none of that name."""
        feature = self.features.get(column)
        if feature is None or feature["dtype"] in ("video", "image", "string", "language"):
            known = [n for n, f in self.features.items() if f["dtype"].startswith(("float", "int", "uint"))]
            raise unknown_name("column", column, known)
        dim = int(np.prod(feature["shape"]))
        names = feature.get("names")
        if isinstance(names, Mapping) and len(names) == 1:  # {"motors": [...]}, as older recordings have it
            names = next(iter(names.values()))
        flat = list(names) if isinstance(names, Sequence) and len(names) == dim else []
        return tuple(map(str, flat)) or tuple(f"{column}_{d}" for d in range(dim))

    def camera(self, key: str = "") -> str:
        """A camera's full name from its key or name; the primary one by default."""
        if not self.cameras:
            raise UsageError(f"dataset '{self.name}' has no camera\n  This stage reads pixels.")
        if not key:
            return next(iter(self.cameras))
        for name in (key, CAMERA_PREFIX + key):
            if name in self.cameras:
                return name
        raise unknown_name("camera", key, [short_camera(name) for name in self.cameras])


def short_camera(name: str) -> str:
    return name.removeprefix(CAMERA_PREFIX)


@dataclass(frozen=True)
class FrameWish:
    """Every k-th frame of one camera, in blocks: exactly what `EpisodeView.images` is then asked for."""

    camera: str
    every: int
    block: int
    size: tuple[int, int] | None = None  # (height, width) the decoder may average them down to


class EpisodeView(Protocol):
    """One episode while a stage works on it. Rows and frames are local to it, 0 .. frames - 1."""

    @property
    def index(self) -> int:
        """Its place in the dataset."""
        ...

    @property
    def frames(self) -> int: ...

    @property
    def content(self) -> str:
        """Its content digest, whichever dataset it lies in."""
        ...

    @property
    def text(self) -> str:
        """The instruction ("" where there is none)."""
        ...

    def columns(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Native columns, each [T, D] (D = 1 for scalars)."""
        ...

    def images(
        self, camera: str, rows: NDArray[np.int64], block: int, size: tuple[int, int] | None = None
    ) -> Iterator[NDArray[np.uint8]]:
        """The frames `rows` (rising) of a camera as blocks of at most `block`: uint8 RGB [n, H, W, 3].

        The next block is decoded while the caller works on this one. With `size` a video's frames come averaged
        over area to that (height, width), for models that would do so anyway; stored pictures come as they are.
        """
        ...


class DatasetView(Protocol):
    """The episodes a stage works on, in order. Reading columns never decodes a frame."""

    info: DatasetInfo

    def __len__(self) -> int: ...

    def episode(self, position: int) -> EpisodeView: ...

    def stretches(self) -> Iterator[EpisodeView]:
        """The whole dataset as a few long stretches, each seen as though it were one episode: columns only,
        for work that does not care where episodes begin."""
        ...


class TargetReader(Protocol):
    """The arrays just made, for a stage's report."""

    def read(self, position: int, array: str) -> NDArray[Any]:
        """All rows of one episode."""
        ...


@dataclass(frozen=True)
class Prepared:
    """What is settled once for a whole target before any episode: a normaliser, scales, a model's digest.

    It is kept beside the target and reused when episodes are added, so that old rows stay what they are.
    `facts` is JSON, `arrays` are small; `contract` are fields of the `Contract`.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    contract: Mapping[str, Any] = field(default_factory=dict)


Block = Mapping[str, NDArray[Any]]
Run = Callable[[EpisodeView], Iterator[Block]]


@dataclass(frozen=True)
class Stage:
    """One kind of supervision. The functions take the stage's own `Params`, a frozen dataclass.

    Every field of `Params` has a default and `metadata={"help": ..., "choices": (...)}`; the command line is
    made from them.
    """

    name: str
    version: int
    Params: type
    summary: str
    recipes: tuple[str, ...]
    variant: Callable[[Any, DatasetInfo], str]
    """The folder's name under the stage, from the parameters that tell targets apart."""
    prepare: Callable[[Any, DatasetView], Prepared]
    makes: Callable[[Any, DatasetInfo, Prepared], tuple[ArraySpec, ...]]
    open: Callable[[Any, DatasetInfo, Prepared], Run]
    """Open what the work needs (a model), once per worker; the function returned handles one episode and
    yields its rows in order, in blocks of bounded size."""
    report: Callable[[Any, DatasetView, Prepared, TargetReader, Path], dict[str, Any]] | None = None
    """JSON for report.json; pictures go into the folder given."""
    uses_model: Callable[[Any], bool] = lambda params: False
    """Whether the work is a model's forward pass: it then runs in one process, with all its threads."""
    pointwise: Callable[[Any], bool] = lambda params: False
    """Whether a row depends on its own frame alone: `run` is then given many episodes as one."""
    wishes: Callable[[Any, DatasetInfo, Prepared], tuple[FrameWish, ...]] = lambda params, info, prepared: ()
    """The frames it will ask of every episode, so that they are decoded ahead, across episodes."""


def load_stage(name: str) -> Stage:
    if name not in STAGES:
        raise unknown_name("stage", name, STAGES)
    return import_module(f".{name}", __name__).STAGE


def build_params(stage: Stage, options: Mapping[str, Any]) -> Any:
    """The stage's `Params` from options by name, given as values or as the words of a command line."""
    hints = get_type_hints(stage.Params)
    known = {entry.name: entry for entry in fields(stage.Params)}
    values: dict[str, Any] = {}
    for name, given in options.items():
        key = name.replace("-", "_")
        if key not in known:
            raise unknown_name(f"option of {stage.name}", name, [n.replace("_", "-") for n in known])
        values[key] = _as_type(f"--{key.replace('_', '-')}", given, hints[key])
        choices = known[key].metadata.get("choices")
        if choices and values[key] not in choices:
            raise unknown_name(f"value of --{key.replace('_', '-')}", str(given), map(str, choices))
    return stage.Params(**values)


def default_of(entry: Any) -> Any:
    """A dataclass field's default."""
    return entry.default if entry.default is not MISSING else entry.default_factory()


def _as_type(option: str, given: Any, kind: Any) -> Any:
    """Words to values: "10,20" or [10, 20] for a tuple of ints, "true" for a bool."""
    origin = getattr(kind, "__origin__", kind)
    try:
        if origin is tuple:
            inner = kind.__args__[0]
            parts = given.replace(",", " ").split() if isinstance(given, str) else given
            return tuple(_as_type(option, part, inner) for part in ([parts] if np.isscalar(parts) else parts))
        if kind is bool:
            if isinstance(given, bool):
                return given
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[
                str(given).lower()
            ]
        return kind(given)
    except (KeyError, TypeError, ValueError):
        word = getattr(origin, "__name__", str(kind))
        raise UsageError(f"{option} takes a value of type {word}, not {given!r}") from None
