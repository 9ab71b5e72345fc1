"""AgiBot's camera parameters: pinhole constants, and where each camera is in every frame.

    <camera>_intrinsic_params.json             {"intrinsic": {fx, fy, ppx, ppy, ...}}, or without the wrapper
    <camera>_extrinsic_params_aligned.json     one {"extrinsic": {rotation_matrix, translation_vector}} a frame

Extrinsics lead from the camera to the robot's base; cameras look along z, x right, y down (OpenCV), as geometry on
real episodes shows (fact sheet, section 9). Some tasks' values are known to be wrong (issues 6 and 28): what is no
rotation, or not one a frame, is not taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.rotations import matrix_to_rot6d
from .agibot_files import Place


def read_intrinsic(place: Place) -> list[float] | None:
    """[fx, fy, cx, cy] in pixels, None where the file says something else."""
    told = _json(place)
    told = told.get("intrinsic", told) if isinstance(told, Mapping) else {}
    try:
        values = [float(told[name]) for name in ("fx", "fy", "ppx", "ppy")]
    except (KeyError, TypeError, ValueError):
        return None
    return values if np.isfinite(values).all() and min(values[:2]) > 0 else None


def read_poses(place: Place, frames: int) -> tuple[NDArray[np.floating] | None, str]:
    """([T, 9] position in the base and rot6d, "") of a camera, or (None, what is odd about it)."""
    told = _json(place)
    if not isinstance(told, Sequence) or len(told) != frames:
        count = f"{len(told)} entries" if isinstance(told, Sequence) else "no list"
        return None, f"{count} for {frames} frames"
    try:
        each = [entry.get("extrinsic", entry) for entry in told]
        turn = np.array([entry["rotation_matrix"] for entry in each], np.float64).reshape(frames, 3, 3)
        place_m = np.array([entry["translation_vector"] for entry in each], np.float64).reshape(frames, 3)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None, "entries without rotation_matrix and translation_vector"
    error = np.abs(turn.transpose(0, 2, 1) @ turn - np.eye(3)).max(axis=(1, 2))
    sound = np.isfinite(place_m).all(axis=1) & (error < 1e-3) & (np.linalg.det(turn) > 0)
    if not sound.all():
        return None, f"no pose in {int((~sound).sum())} of {frames} entries"
    return np.concatenate([place_m, matrix_to_rot6d(turn)], axis=1), ""


def _json(place: Place) -> Any:
    try:
        return json.loads(place.read())
    except (ValueError, OSError, RecursionError):
        return None
