"""Small policies of our own that supervise others: the embedded teacher and the embedded anchor.

Both are one network. Per observed step: image points, state and words, then the action queries; a transformer
whose trunk ends in a LayerNorm; a decoder on the queries' outputs. As in Seer, queries see the observations of
their own and earlier steps, and nothing sees a query, so that a hidden state is a function of (window, query)
alone.

    teacher   window of S steps, 3 queries per step: token j at step s speaks of the action at s + j
    anchor    one step, K queries: a chunk of K actions

A folder holds policy.json (sizes, cameras, scales, how it was trained) and model.safetensors; nothing else is
needed to run it. `trainer/embedded.py` trains them.

Legend: B batch, S window steps, Q queries per step, K chunk, h width, A action dimensions (G of them grippers).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor, nn

from ..schemas.errors import DataError, UsageError
from ..schemas.normalisers import Normaliser
from .action_decoder import ActionDecoder, save_decoder
from .blocks import Block, ObservationEncoder, text_ids
from .policy_folder import read_folder, write_folder

POLICY_VERSION = 1


class Teacher(Protocol):
    """A frozen policy whose hidden states at its action tokens are to be matched (VITA).

    Actions are in the teacher's own normalised space: arm dimensions in [-1, 1], grippers as probabilities.
    """

    cameras: tuple[str, ...]
    window: int
    queries: int
    width: int
    action: Normaliser
    grippers: tuple[int, ...]
    frame_size: tuple[int, int] | None  # what frames may be averaged down to while they are decoded

    @property
    def digest(self) -> str: ...

    def describe(self) -> dict[str, Any]: ...

    def hidden(
        self, images: Mapping[str, NDArray[np.uint8]], state: NDArray[Any], texts: Sequence[str]
    ) -> NDArray[np.float32]:
        """uint8 [B, S, H, W, 3] per camera, [B, S, D], B instructions -> [B, S, Q, h]."""
        ...

    def decode(self, hidden: NDArray[Any]) -> NDArray[np.float32]:
        """[..., h] -> [..., A]."""
        ...

    def save_decoder(self, path: Path) -> None:
        """The decoder alone, as a student's starting point (see `load_decoder`)."""
        ...


class AnchorPolicy(Protocol):
    """A frozen policy whose action chunk is to be corrected (AnchorRefine)."""

    cameras: tuple[str, ...]
    chunk: int
    window: int  # S frames observed, the newest last; an episode's first stands for those before it
    action: Normaliser
    grippers: tuple[int, ...]
    frame_size: tuple[int, int] | None  # what frames may be averaged down to while they are decoded

    @property
    def digest(self) -> str: ...

    def describe(self) -> dict[str, Any]:
        """`stochastic` says whether another seed gives another chunk."""
        ...

    def act(
        self,
        images: Mapping[str, NDArray[np.uint8]],
        state: NDArray[Any],
        texts: Sequence[str],
        seeds: NDArray[np.int64],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """[B, H, W, 3], [B, D], B instructions, seeds [B] -> arm [B, K, A - G] normalised, logits [B, K, G].

        Frames and states get an axis of S after B where `window` is above 1.
        """
        ...


# -- the network ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolicyConfig:
    """Sizes, and all a folder needs beside weights. `kind` is "teacher" or "anchor"."""

    kind: str
    cameras: tuple[str, ...]
    state_mean: tuple[float, ...]
    state_std: tuple[float, ...]
    action_dim: int
    grippers: tuple[int, ...]
    window: int = 1
    queries: int = 3
    width: int = 128
    layers: int = 2
    heads: int = 4
    vision: str = "conv"
    image_size: int = 64
    points: int = 8

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "PolicyConfig":
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in told.items()
        }
        return cls(**fields)


class EmbeddedPolicy(nn.Module):
    """The network of the teacher and of the anchor; see the module text."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = c = config
        self.encoder = ObservationEncoder(
            c.cameras, c.state_mean, c.state_std, c.width, c.vision, c.image_size, c.points
        )
        self.action_queries = nn.Parameter(torch.randn(c.queries, c.width) * 0.02)
        self.steps = nn.Parameter(torch.randn(c.window, c.width) * 0.02)
        self.blocks = nn.ModuleList(Block(c.width, c.heads) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width)
        self.decoder = ActionDecoder(c.width, c.action_dim, c.grippers)

    def forward(self, images: Sequence[Tensor], state: Tensor, text: Tensor) -> Tensor:
        """uint8 [B, S, h, w, 3] per camera, [B, S, D], words [B, L] -> hidden [B, S, Q, h]; S <= window."""
        batch, steps = state.shape[:2]
        seen = self.encoder(
            [frames.flatten(0, 1) for frames in images],
            state.flatten(0, 1),
            text.repeat_interleave(steps, 0),
        ).unflatten(0, (batch, steps))
        place = self.steps[:steps, None]
        queries = (self.action_queries + place).expand(batch, -1, -1, -1)
        tokens = torch.cat([seen + place, queries], dim=2)  # [B, S, n + Q, h]
        mask = visible(steps, seen.shape[2], self.config.queries, tokens.device)
        flat = tokens.flatten(1, 2)
        for block in self.blocks:
            flat = block(flat, mask)
        return self.norm(flat).unflatten(1, tokens.shape[1:3])[:, :, seen.shape[2] :]


def visible(steps: int, seen: int, queries: int, device: torch.device | str) -> Tensor:
    """Who may look at whom, bool [S (n + Q), S (n + Q)]: observations of the own and earlier steps, and oneself."""
    step = torch.arange(steps, device=device).repeat_interleave(seen + queries)
    is_query = (torch.arange(seen + queries, device=device) >= seen).repeat(steps)
    return ((step[None] <= step[:, None]) & ~is_query[None]) | torch.eye(
        len(step), dtype=torch.bool, device=device
    )


# -- a folder of weights, opened --------------------------------------------------------------------------


class _Opened:
    """What teacher and anchor share once a folder is open."""

    def __init__(self, folder: Path, kind: str, device: str) -> None:
        stored = read_folder(folder, "policy", POLICY_VERSION, kind)
        if stored.config["kind"] != kind:
            raise DataError(f"{folder}: expected an embedded {kind}, found '{stored.config['kind']}'")
        config = PolicyConfig.from_json(stored.config)
        self.network = EmbeddedPolicy(config)
        self.network.load_state_dict(stored.weights)
        self.network.to(device).eval().requires_grad_(False)
        self.action, self._training, self._weights = stored.action, stored.training, stored.digest
        self.config, self._device = config, device
        self.cameras, self.grippers, self.width = config.cameras, config.grippers, config.width
        self.frame_size: tuple[int, int] | None = (config.image_size, config.image_size)

    @property
    def digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(json.dumps(self.describe(), sort_keys=True).encode())

    def describe(self) -> dict[str, Any]:
        return {
            "policy": "embedded",
            **asdict(self.config),
            "weights": self._weights,
            "action_normaliser": self.action.digest,
            "training": self._training,
            "augmentation": "off",
            "stochastic": False,
        }

    def _run(
        self, images: Mapping[str, NDArray[np.uint8]], state: NDArray[Any], texts: Sequence[str]
    ) -> Tensor:
        frames = [
            torch.from_numpy(np.ascontiguousarray(images[name])).to(self._device) for name in self.cameras
        ]
        robot = torch.from_numpy(np.asarray(state, dtype=np.float32)).to(self._device)
        with torch.inference_mode():
            return self.network(frames, robot, text_ids(texts).to(self._device))


class EmbeddedTeacher(_Opened):
    """`Teacher` from a folder."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        super().__init__(folder, "teacher", device)
        self.window, self.queries = self.config.window, self.config.queries

    def hidden(
        self, images: Mapping[str, NDArray[np.uint8]], state: NDArray[Any], texts: Sequence[str]
    ) -> NDArray[np.float32]:
        return self._run(images, state, texts).float().cpu().numpy()

    def decode(self, hidden: NDArray[Any]) -> NDArray[np.float32]:
        with torch.inference_mode():
            values = torch.from_numpy(np.asarray(hidden, dtype=np.float32)).to(self._device)
            return self.network.decoder.actions(values).cpu().numpy()

    def save_decoder(self, path: Path) -> None:
        save_decoder(self.network.decoder, path)


class EmbeddedAnchor(_Opened):
    """`AnchorPolicy` from a folder; it draws nothing, so seeds change nothing."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        super().__init__(folder, "anchor", device)
        self.chunk, self.window = self.config.queries, 1

    def act(
        self,
        images: Mapping[str, NDArray[np.uint8]],
        state: NDArray[Any],
        texts: Sequence[str],
        seeds: NDArray[np.int64],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        steps = {name: np.asarray(images[name])[:, None] for name in self.cameras}
        hidden = self._run(steps, np.asarray(state)[:, None], texts)[:, 0]
        with torch.inference_mode():
            arm, logits = self.network.decoder(hidden)
        return arm.float().cpu().numpy(), logits.float().cpu().numpy()


def save_policy(
    folder: Path, network: EmbeddedPolicy, action: Normaliser, training: Mapping[str, Any]
) -> None:
    """Write a folder that `open_teacher` and `open_anchor` read. `training` is part of the digest."""
    write_folder(folder, "policy", POLICY_VERSION, network, network.config, action, training)


def open_teacher(spec: str, device: str = "cpu") -> Teacher:
    """`embedded:<folder>` or `lerobot:<folder or id>`."""
    kind, _, rest = spec.partition(":")
    if kind == "embedded" and rest:
        return EmbeddedTeacher(Path(rest), device)
    if kind == "lerobot" and rest:
        from .lerobot_policy import LeRobotTeacher

        return LeRobotTeacher(rest, device)
    raise UsageError(f"unknown teacher '{spec}'\n  known: embedded:<folder>, lerobot:<folder or id>")


def open_anchor(spec: str, device: str = "cpu") -> AnchorPolicy:
    """`embedded:<folder>` or `lerobot:<folder or id>`."""
    kind, _, rest = spec.partition(":")
    if kind == "embedded" and rest:
        return EmbeddedAnchor(Path(rest), device)
    if kind == "lerobot" and rest:
        from .lerobot_policy import LeRobotAnchor

        return LeRobotAnchor(rest, device)
    raise UsageError(f"unknown anchor '{spec}'\n  known: embedded:<folder>, lerobot:<folder or id>")
