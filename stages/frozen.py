"""What the stages that run a frozen policy (teacher, residuals, privileged) ask of it and say of it alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import DataError
from . import DatasetInfo
from .windows import read_sizes, renamed


class Seeing(Protocol):
    """The part of a policy that says what it looks at."""

    cameras: tuple[str, ...]
    frame_size: tuple[int, int] | None


def short_name(spec: str) -> str:
    """`embedded:runs/anchor/libero/policy` -> `embedded-libero`, for the folder of a target."""
    kind, _, place = spec.partition(":")
    folder = Path(place)
    name = folder.parent.name if folder.name == "policy" else folder.name
    return "-".join(filter(None, [kind, name.lower()]))


def cameras_of(
    policy: Seeing, rename: Sequence[str], info: DatasetInfo
) -> tuple[dict[str, str], dict[str, tuple[int, int] | None]]:
    """The dataset's name of each of the policy's cameras -> the policy's, and what its frames are decoded to."""
    names = renamed(policy.cameras, rename)
    for camera in names:
        info.camera(camera)
    return names, read_sizes(policy.frame_size, info.cameras, names)


def checked_float16(values: NDArray[np.floating]) -> NDArray[np.float16]:
    if np.abs(values).max(initial=0) > 6e4:
        raise DataError(
            f"a hidden state of {np.abs(values).max():.3g} does not fit float16\n"
            "  The layer taken is not normalised; choose a teacher whose action tokens are."
        )
    return values.astype(np.float16)


def check_weights(told: dict[str, Any], digest: str, wanted: str, what: str) -> None:
    """The weights a target was begun with are the weights it is finished with."""
    found = str(told.get("weights", digest))
    if found != wanted:
        raise DataError(
            f"the {what}'s weights have changed: {found}, the target was made with {wanted}\n"
            "  Put the old ones back, or make another target with --name NEW."
        )
