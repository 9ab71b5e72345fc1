"""The contract of a target: everything that must agree before its numbers may supervise a model.

It is written beside the target, last, and checked whenever the target is opened. A field that differs stops
the loader with its name; a field the reader does not ask about is not compared.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from .errors import DataError

CONTRACT_VERSION = 1

# What a student's own input may do while its target stays what it is.
FIXED_VIEW = "fixed view of the future, student input may be augmented"
NO_PIXELS = "no pixels: any augmentation"


BFLOAT16 = "bfloat16"
FILE_NAME = re.compile(r"\w[\w.-]*", re.ASCII)  # of a file that data may name: no way out of its folder


@dataclass(frozen=True)
class ArraySpec:
    """What one array of a target is, whatever its length: the shape of a row, its dtype, its axes' names.

    An episode of T frames has ceil(T / every) rows along `axis`; `every` 0 means a number of rows the stage
    alone knows (windows, ids of ragged sequences). dtype is a numpy name or "bfloat16", stored as uint16.
    `attributes` are JSON for readers: `select` names what tells this array from its sisters ({"N": 10}),
    `chunked` that a reader gathers it along a horizon, `mask` which array says where it is valid.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    axis: str = "frame"
    every: int = 1

    @property
    def stored(self) -> np.dtype[Any]:
        return np.dtype("uint16" if self.dtype == BFLOAT16 else self.dtype)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.stored.itemsize

    def rows(self, frames: int) -> int:
        """Rows of an episode of so many frames."""
        return math.ceil(frames / self.every) if self.every else 0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape), "axes": list(self.axes)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ArraySpec":
        """Its name, and the file of its scales, are looked for below the target; DataError where they lead away."""
        scale = (data.get("attributes") or {}).get("scale", "x")  # of integers: prepared/scale.npy
        for name in (data["name"], *(scale.split("/") if isinstance(scale, str) else (scale,))):
            if not isinstance(name, str) or FILE_NAME.fullmatch(name) is None:
                raise DataError(
                    f"an array of the target is called {name!r:.80}, which is no file of it; refused"
                )
        return cls(**{**data, "shape": tuple(data["shape"]), "axes": tuple(data["axes"])})


@dataclass(frozen=True)
class Contract:
    """What a target was made from, and how it may be used.

    Empty strings and zeros mean "does not apply". `horizon_seconds` stands beside `horizon_frames` because a
    chunk of 16 frames is another thing at another fps. `params` holds every option of the stage.
    """

    stage: str
    variant: str
    stage_version: int
    source: str  # digest over the contents of the episodes, in order
    fps: int
    params: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""  # how it was named: "dct", "hf:Qwen/...", "lerobot:folder"
    weights: str = ""  # digest of the weights
    layer: str = ""
    preprocessing: str = ""  # digest of decode, crop, resize, pixel scaling
    camera: str = ""
    pixels: str = ""  # digest of the camera's size and of how its pictures were turned
    dtype: str = ""
    horizon_frames: int = 0
    horizon_seconds: float = 0.0
    normaliser: str = ""  # digest
    augmentation: str = NO_PIXELS
    seed: int = -1
    version: int = CONTRACT_VERSION

    @property
    def digest(self) -> str:
        return digest_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "params": dict(self.params)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Contract":
        known = {entry.name for entry in fields(cls)}
        if data.get("version") != CONTRACT_VERSION:
            raise DataError(
                f"target contract of version {data.get('version')}; this dpipe reads {CONTRACT_VERSION}\n"
                "  Precompute the target again, or use the dpipe that wrote it."
            )
        return cls(**{name: value for name, value in data.items() if name in known})

    def check(self, where: str = "", **expected: Any) -> None:
        """Raise DataError naming every field that is not what the reader expects; an unknown name is our bug.

        `params` may be given in part: `params={"bins": [10]}` compares that option alone.
        """
        found = self.to_json()
        wrong: list[str] = []
        for name, wanted in expected.items():
            if name not in found:
                raise KeyError(f"a contract has no field '{name}'")
            if name == "params":
                for option, value in dict(wanted).items():
                    have = self.params.get(option)
                    if plain(have) != plain(value):
                        wrong.append(f"params.{option}: expected {_show(value)}, found {_show(have)}")
            elif plain(found[name]) != plain(wanted):
                wrong.append(f"{name}: expected {_show(wanted)}, found {_show(found[name])}")
        if wrong:
            place = f" in {where}" if where else ""
            raise DataError(
                f"target {self.stage}/{self.variant}{place} was made under other terms:\n  "
                + "\n  ".join(wrong)
                + f"\n  Make one that fits:  dpipe precompute {self.stage} --name NEW"
            )

    def check_augmentation(self, wanted: str) -> None:
        """Refuse a change of the pixels (flip, crop, colour) that a cached feature cannot follow.

        Features do not commute with flips (cosine 0.87 between the feature of a flipped image and the flipped
        feature, modern-yolonas#50), so a cache of one view serves that view alone.
        """
        if wanted in ("", "none") or self.augmentation == NO_PIXELS:
            return
        allowed = [view.strip() for view in self.augmentation.removeprefix("views:").split(",")]
        if self.augmentation.startswith("views:") and wanted in allowed:
            return
        raise DataError(
            f"augmentation '{wanted}' asked of target {self.stage}/{self.variant}, which holds: "
            f"{self.augmentation}\n  Augment the student's input only, or cache the view as well."
        )


def digest_of(value: Any) -> str:
    """32 hex digits over a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:32]


def canonical_json(data: Any) -> str:
    """One text per value: keys sorted, no spaces, tuples as lists. Digests are taken over it."""
    return json.dumps(plain(data), sort_keys=True, separators=(",", ":"), allow_nan=False)


def plain(value: Any) -> Any:
    """The JSON form of a value: tuples as lists, mappings as dicts, paths and numpy scalars as theirs."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return value.item() if hasattr(value, "item") else str(value)


def _show(value: Any) -> str:
    text = json.dumps(plain(value))
    return text if len(text) <= 80 else text[:77] + "..."
