"""Features: the named, typed columns of a dataset, as LeRobot v3.0's `info.json` writes them.

Source: huggingface/lerobot 0.6.1, `datasets/feature_utils.py` (names without '/', vectors with flat name
lists). We add a unit and a frame of reference per feature, kept in the manifest, because LeRobot has no
place for them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

CAMERA_PREFIX = "observation.images."

# What openpi's converters call them, and the names by which policies look for them.
POLICY_NAMES = {"actions": "action", "state": "observation.state"}

# The columns LeRobot adds to every row: global order, never part of an episode's own content.
DEFAULT_FEATURES: dict[str, dict[str, Any]] = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}


@dataclass(frozen=True)
class Feature:
    """One low-dimensional column: `shape` is (D,) with one name per dimension, or (1,) for a scalar.

    `unit` and `frame` say what the numbers are ("m", "rad", "1"; "world", "base", "camera"); a feature whose
    dimensions differ says so in words ("m, rad").
    """

    name: str
    dtype: str
    names: tuple[str, ...]
    unit: str = ""
    frame: str = ""
    description: str = ""

    def __post_init__(self) -> None:
        if "/" in self.name or "image" in self.name:
            # lerobot forbids '/' and demands image-shaped statistics of any name with 'image' in it.
            raise ValueError(f"feature name '{self.name}' must contain neither '/' nor 'image'")
        if not self.names:
            raise ValueError(f"feature '{self.name}' has no dimensions")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"feature '{self.name}' names a dimension twice: {self.names}")

    @property
    def dim(self) -> int:
        return len(self.names)

    def to_lerobot(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "shape": [self.dim], "names": list(self.names)}


@dataclass(frozen=True)
class CameraFeature:
    """One camera: `key` is the LeRobot key below `observation.images.`; sizes are pixels."""

    key: str
    height: int
    width: int
    description: str = ""

    @property
    def name(self) -> str:
        return CAMERA_PREFIX + self.key


def check_columns(features: Iterable[Feature], columns: dict[str, np.ndarray], frames: int) -> list[str]:
    """Every problem of an episode's columns against its features, as sentences; [] when sound.

    Columns are [T, D], or [T] for a feature of one dimension; T must equal `frames`; floats must be finite.
    """
    problems: list[str] = []
    known = {feature.name: feature for feature in features}
    for name in sorted(set(known) | set(columns)):
        if name not in columns:
            problems.append(f"column '{name}' is missing")
            continue
        if name not in known:
            problems.append(f"column '{name}' is not declared by the embodiment")
            continue
        feature, column = known[name], columns[name]
        expected = (frames,) if feature.dim == 1 and column.ndim == 1 else (frames, feature.dim)
        if column.shape != expected:
            problems.append(f"'{name}' has shape {column.shape}, expected {expected}")
        elif column.dtype != np.dtype(feature.dtype):
            problems.append(f"'{name}' is {column.dtype}, expected {feature.dtype}")
        elif column.dtype.kind == "f" and not np.isfinite(column).all():
            rows = np.flatnonzero(~np.isfinite(column.reshape(frames, -1)).all(axis=1))
            problems.append(f"'{name}' is not finite in {len(rows)} frames, first at frame {rows[0]}")
    return problems
