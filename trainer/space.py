"""What a policy sees and does in one dataset: cameras, state, actions, and how their numbers are scaled.

A run keeps its Space in config.json, so that a checkpoint can be rolled out where the dataset is not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..schemas.normalisers import Normaliser

if TYPE_CHECKING:
    import torch

IMAGE = "observation.images."
STATE = "observation.state"


@dataclass(frozen=True)
class Space:
    """`cameras` are full keys; `state_mean` and `state_std` have one entry per state dimension.

    `dims` is False for action dimensions this embodiment does not have (a unified vector's empty slots): they
    carry no loss and are 0 in what the policy returns.
    """

    cameras: tuple[str, ...]
    state_mean: tuple[float, ...]
    state_std: tuple[float, ...]
    action: Normaliser
    fps: int
    dims: tuple[bool, ...] = ()
    action_names: tuple[str, ...] = ()
    gripper_one_means: str = ""  # "open" or "close", where there is a gripper dimension
    conventions: Mapping[str, Any] = field(default_factory=dict)  # the dataset's, from its manifest

    @property
    def state_dim(self) -> int:
        return len(self.state_mean)

    @property
    def action_dim(self) -> int:
        return self.action.dim

    @property
    def mask(self) -> "np.ndarray":
        """[A] bool: dimensions that exist."""
        return np.array(self.dims or (True,) * self.action_dim)

    @property
    def grippers(self) -> tuple[int, ...]:
        """Action dimensions that are grippers, by their name."""
        return tuple(i for i, name in enumerate(self.action_names) if "gripper" in name)

    def to_json(self) -> dict[str, Any]:
        return {
            "cameras": list(self.cameras),
            "state_mean": list(self.state_mean),
            "state_std": list(self.state_std),
            "action": self.action.to_json(),
            "fps": self.fps,
            "dims": list(self.dims),
            "action_names": list(self.action_names),
            "gripper_one_means": self.gripper_one_means,
            "conventions": dict(self.conventions),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Space":
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        return cls(**{**fields, "action": Normaliser.from_json(data["action"])})


def to_tensors(
    batch: Mapping[str, Any],
    space: Space,
    device: "torch.device | str",
    words: "Callable[[Sequence[str]], torch.Tensor] | None" = None,
) -> "dict[str, Any]":
    """A stream's batch (numpy, native units) as what a recipe's `forward` takes.

    state    float32 [B, F, D]      F observed frames, oldest first (F = 1 where the stream has no window)
    images   list, one per camera, of uint8 [B, F, h, w, 3]
    text     int64 [B, L] hashed words, and what else `words` makes of the instructions (`models/vlm.py`)
    action   float32 [B, H, A] normalised;  is_pad bool [B, H];  dims bool [A] or [B, A]
    tokens   int64 [B, H, A] where the stream has them
    others   float32, int64 or bool tensors under their own names
    """
    import torch

    from ..models.blocks import text_ids

    rows = len(batch["action"])
    state = torch.from_numpy(np.asarray(batch[STATE], dtype=np.float32))
    out: dict[str, Any] = {
        "state": state[:, None] if state.ndim == 2 else state,
        "images": [],
        "text": (words or text_ids)(batch.get("task", [""] * rows)),
        "action": torch.from_numpy(space.action.normalise(batch["action"]).astype(np.float32, order="C")),
        "is_pad": torch.from_numpy(np.asarray(batch["action_is_pad"], dtype=bool)),
        "dims": torch.from_numpy(np.asarray(batch.get("action_dims", space.mask), dtype=bool)),
    }
    for camera in space.cameras:
        if camera not in batch:  # the recipe asked its stream for no pixels
            continue
        frames = torch.from_numpy(np.asarray(batch[camera]))
        out["images"].append((frames[:, None] if frames.ndim == 4 else frames).to(device))
    for name, value in batch.items():
        if name in (STATE, "task", "action", "action_is_pad", "action_dims") or name.startswith(IMAGE):
            continue
        array = np.asarray(value)
        if array.dtype.kind in "uib":
            out[name] = torch.from_numpy(array.astype(bool if array.dtype.kind == "b" else np.int64))
        elif array.dtype.kind == "f":
            out[name] = torch.from_numpy(array.astype(np.float32))
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in out.items()}
