"""The small head that VITA reuses: hidden states in, an action out; and its file.

Legend: h width of the hidden state, A action dimensions, G of them grippers.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..schemas.errors import DataError


class ActionDecoder(nn.Module):
    """Hidden state -> arm and gripper: two layers h/2 with ReLU, then tanh for the arm, a logit for grippers.

    Seer's decoder ends in a sigmoid; here it is left off, so that losses take logits, and `actions` puts it on.
    Without `trunk` and `bounded` it is one linear map, as ACT's head is.
    """

    def __init__(
        self,
        width: int,
        action_dim: int,
        grippers: Sequence[int],
        trunk: bool = True,
        bounded: bool = True,
    ) -> None:
        super().__init__()
        self.width, self.action_dim, self.grippers = width, action_dim, tuple(grippers)
        self.bounded = bounded
        self.arm_dims = tuple(i for i in range(action_dim) if i not in self.grippers)
        half = width // 2
        layers = [nn.Linear(width, half), nn.ReLU(), nn.Linear(half, half), nn.ReLU()] if trunk else []
        self.trunk = nn.Sequential(*layers)
        inner = half if trunk else width
        self.arm = nn.Linear(inner, len(self.arm_dims))
        self.gripper = nn.Linear(inner, len(self.grippers)) if self.grippers else None

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[..., h] -> arm [..., A - G], gripper logits [..., G]."""
        inner = self.trunk(hidden)
        arm = self.arm(inner)
        logits = inner[..., :0] if self.gripper is None else self.gripper(inner)
        return arm.tanh() if self.bounded else arm, logits

    def actions(self, hidden: Tensor) -> Tensor:
        """[..., h] -> [..., A]: arm, and the probability of gripper = 1, each in its place."""
        arm, logits = self(hidden)
        out = arm.new_empty(*arm.shape[:-1], self.action_dim)
        out[..., list(self.arm_dims)] = arm
        if self.grippers:
            out[..., list(self.grippers)] = logits.sigmoid()
        return out

    def describe(self) -> dict[str, Any]:
        return {
            "width": self.width,
            "action_dim": self.action_dim,
            "grippers": list(self.grippers),
            "trunk": len(self.trunk) > 0,
            "activation": "relu",
            "bounded": self.bounded,  # tanh on the arm
            "gripper": "logit: apply a sigmoid",
        }


def save_decoder(decoder: ActionDecoder, path: Path) -> None:
    """One safetensors file, its description in the header."""
    from safetensors.torch import save_file

    save_file(
        {name: value.contiguous().cpu() for name, value in decoder.state_dict().items()},
        path,
        {"decoder": json.dumps(decoder.describe())},
    )


def load_decoder(path: Path) -> ActionDecoder:
    """What `save_decoder` wrote."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, framework="pt") as stored:
        told = json.loads((stored.metadata() or {}).get("decoder", "null"))
    if told is None:
        raise DataError(f"{path} is no action decoder: its header has no description")
    decoder = ActionDecoder(
        told["width"], told["action_dim"], told["grippers"], told["trunk"], told["bounded"]
    )
    decoder.load_state_dict(load_file(path))
    return decoder
