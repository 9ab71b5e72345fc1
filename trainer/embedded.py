"""The embedded teacher and anchor: small policies trained by imitation, so that every stage works unaided.

    teacher   windows of S steps; token j at step s is supervised by the action at s + j (VITA, Seer)
    anchor    a chunk of K actions from one frame

Loss: L1 on the arm's normalised actions plus `gripper_weight` x binary cross-entropy on the grippers, padded
steps left out. A finished run holds policy/, the folder that `models.policies.open_teacher` and `open_anchor`
read; its digest covers the weights and how they were made (seed, steps, threads, data).
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.policies import EmbeddedPolicy, PolicyConfig, save_policy
from ..schemas.folds import seen_in_training
from ..streams.stream import StreamSpec
from .draws import Draws
from .loop import Objective, Options, Phase
from .losses import masked_mean
from .policy import observe, timed
from .recipe import Recipe
from .space import STATE, Space


@dataclass(frozen=True)
class TeacherConfig:
    window: int = 4  # S
    queries: int = 3
    width: int = 128
    layers: int = 2
    heads: int = 4
    vision: str = "conv"  # conv | vit
    image_size: int = 64
    points: int = 8
    gripper_weight: float = 0.01  # Seer's and VITA's


@dataclass(frozen=True)
class AnchorConfig:
    chunk: int = 10  # K
    width: int = 128
    layers: int = 2
    heads: int = 4
    vision: str = "conv"  # conv | vit
    image_size: int = 64
    points: int = 8
    gripper_weight: float = 0.1
    fold: int = 0  # cross-fitting: leave out this fold
    folds: int = 1  # of so many (`schemas/folds.py`)


class Imitation(Objective):
    """An embedded policy and its loss."""

    def __init__(self, config: PolicyConfig, space: Space, gripper_weight: float) -> None:
        super().__init__()
        self.space, self.gripper_weight = space, gripper_weight
        self.network = EmbeddedPolicy(config)

    def forward(self, batch: Mapping[str, Any], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch` with S observed frames from t on, and the actions of t .. t + S + Q - 2."""
        config, decoder = self.network.config, self.network.decoder
        arm, logits = decoder(self.network(batch["images"], batch["state"], batch["text"]))
        # Token j of step s is the action at s + j.
        at = torch.arange(config.window)[:, None] + torch.arange(config.queries)
        action, valid = batch["action"][:, at], ~batch["is_pad"][:, at, None]
        present = valid & batch["dims"] if batch["dims"].ndim == 1 else valid & batch["dims"][:, None, None]
        arm_dims = list(decoder.arm_dims)
        arm_loss = masked_mean((arm - action[..., arm_dims]).abs(), present[..., arm_dims])
        metrics = {"arm": arm_loss.detach()}
        loss = arm_loss
        if decoder.grippers:
            closed = (action[..., list(decoder.grippers)] > 0).float()
            entropy = F.binary_cross_entropy_with_logits(logits, closed, reduction="none")
            gripper_loss = masked_mean(entropy, present[..., list(decoder.grippers)])
            metrics["gripper"] = gripper_loss.detach()
            loss = loss + self.gripper_weight * gripper_loss
        return loss, metrics


class ImitationPolicy:
    """Executes `run` actions of each chunk before looking again (the teacher: the first of its three)."""

    def __init__(self, model: Imitation, seed: int = 0, run: int = 0) -> None:
        self.model, self.space = model.eval(), model.space
        config = model.network.config
        self.run = run or (1 if config.kind == "teacher" else max(1, config.queries // 2))
        self.clock: dict[str, list[float]] = {"policy": []}
        self.actions = deque[np.ndarray]()

    def reset(self) -> None:
        self.actions.clear()

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, texts: list[str]) -> np.ndarray:
        if not self.actions:
            frames, robot, words = observe(
                self.space, images, state, texts, self.model.network.action_queries.device
            )
            with timed(self.clock["policy"]), torch.no_grad():
                hidden = self.model.network([frame[:, None] for frame in frames], robot[:, None], words)[:, 0]
                normal = self.model.network.decoder.actions(hidden[:, : self.run])
            normal[..., list(self.space.grippers)] = normal[..., list(self.space.grippers)] * 2 - 1
            native = self.space.action.denormalise(normal.cpu().numpy()) * self.space.mask
            self.actions.extend(np.moveaxis(native, 1, 0))
        return self.actions.popleft()


def _policy_config(kind: str, config: Any, space: Space, window: int, queries: int) -> PolicyConfig:
    shared = ("width", "layers", "heads", "vision", "image_size", "points")
    return PolicyConfig(
        kind=kind,
        cameras=space.cameras,
        state_mean=space.state_mean,
        state_std=space.state_std,
        action_dim=space.action_dim,
        grippers=space.grippers,
        window=window,
        queries=queries,
        **{name: getattr(config, name) for name in shared},
    )


def _build_teacher(config: TeacherConfig, space: Space, facts: Mapping[str, Any]) -> Imitation:
    made = _policy_config("teacher", config, space, config.window, config.queries)
    return Imitation(made, space, config.gripper_weight)


def _build_anchor(config: AnchorConfig, space: Space, facts: Mapping[str, Any]) -> Imitation:
    return Imitation(_policy_config("anchor", config, space, 1, config.chunk), space, config.gripper_weight)


def _spec(config: TeacherConfig | AnchorConfig, space: Space, facts: Mapping[str, Any]) -> StreamSpec:
    window, queries = (
        (config.window, config.queries) if isinstance(config, TeacherConfig) else (1, config.chunk)
    )
    return StreamSpec(
        columns=(STATE,),
        cameras=space.cameras,
        offsets=tuple(range(window)),
        chunks={"action": window - 1 + queries},
        size=(config.image_size, config.image_size),
    )


def _export(model: Imitation, run_dir: Path, terms: Mapping[str, Any]) -> None:
    training = {
        "steps": terms["steps"],
        "seed": terms["options"]["seed"],
        "options": terms["options"],
        "gripper_weight": model.gripper_weight,
        "fold": [terms["config"].get("fold", 0), terms["config"].get("folds", 1)],
        "threads": torch.get_num_threads(),
        "dataset": terms["dataset"]["digest"],
        "split": terms["split"],
    }
    save_policy(run_dir / "policy", model.network, model.space.action, training)


TEACHER = Recipe(
    name="teacher",
    config=TeacherConfig,
    targets=lambda config: ([], 0),
    spec=_spec,
    build=_build_teacher,
    phases=lambda config, steps: [Phase("train", steps)],
    policy=ImitationPolicy,
    options=Options(lr=1e-3),
    finish=_export,
)
ANCHOR = Recipe(
    name="anchor",
    config=AnchorConfig,
    episodes=lambda config, contents: seen_in_training(contents, config.fold, config.folds),
    targets=lambda config: ([], 0),
    spec=_spec,
    build=_build_anchor,
    phases=lambda config, steps: [Phase("train", steps)],
    policy=ImitationPolicy,
    options=Options(lr=1e-3),
    finish=_export,
)
