"""VITA: a vision-language student takes over a small action expert, first its hidden states, then its job.

Student   image points, words, a state token (arm and gripper each through a linear map) and one action token
          repeated three times, which position alone tells apart; a transformer; a mapper to the teacher's width
Stage 1   align: mean squared distance of mapper(student) to the cached hidden states of the teacher's three
          action tokens. Trains state encoder, action token and mapper; the teacher is not in memory
Stage 2   tune: the teacher's decoder, imported with the cache, speaks the actions; L1 on the arm + 0.01 x
          binary cross-entropy on the gripper. All trains but the vision

`mode` names the controls: `two-stage`; `reuse`, the imported decoder without alignment; `scratch`, neither. All
spend the same steps in stage 2.

Vision and transformer are frozen in stage 1, and vision in stage 2, if they come pretrained; the tiny student
starts from nothing, so there is nothing to keep and all of it trains in both [ours].

Source   VITA-VLA, Secs 3.2 - 3.4, Table 5; the mapper's activation (GELU) is ours. Losses are means over
         dimensions where the paper sums.
Legend   B batch, Q = 3 action tokens, h teacher width, d student width, A dimensions (G of them grippers).
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.action_decoder import ActionDecoder, load_decoder
from ..models.blocks import TEXT_LENGTH, Block, ObservationEncoder, StateScale, mlp, sinusoids
from ..models.vlm import Vlm, words_of
from ..schemas.errors import unknown_name
from ..streams.stream import StreamSpec
from .draws import Draws
from .loop import Objective, Options, Phase
from .losses import masked_mean
from .policy import observe, timed
from .recipe import Recipe, TargetFolder
from .space import STATE, Space

MODES = ("two-stage", "reuse", "scratch")


@dataclass(frozen=True)
class Config:
    mode: str = "two-stage"  # two-stage | reuse | scratch
    align_share: float = 0.6  # of the steps: 3 epochs of 5 in the paper
    tune_lr: float = 2e-4
    pretrained: bool = False  # freeze what the paper freezes
    fingers: int = 2  # last dimensions of the state that are the gripper's
    width: int = 128
    layers: int = 2
    heads: int = 4
    vision: str = "conv"  # conv | vit | hf:<folder>
    vlm: str = ""  # hf:<folder>: the student is this vision-language model, frozen in stage 1
    freeze: tuple[str, ...] = ("vision",)  # of backbones: vision, merger, embeddings, llm, llm[:12]
    lora: int = 0  # rank of the adapters in the VLM's language model; 0: none
    image_size: int = 64
    points: int = 8
    gripper_weight: float = 0.01

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown_name("vita mode", self.mode, MODES)


class StateEncoder(nn.Module):
    """[B, D] native state -> [B, d]: arm and fingers (the last dimensions) apart, then together (Sec 3.2)."""

    def __init__(self, space: Space, fingers: int, width: int) -> None:
        super().__init__()
        self.scale = StateScale(space.state_mean, space.state_std)
        self.split = [space.state_dim - fingers, fingers]
        self.parts = nn.ModuleList(nn.Linear(size, width) for size in self.split if size)
        self.both = nn.Linear(width * len(self.parts), width)

    def forward(self, state: Tensor) -> Tensor:
        pieces = [piece for piece in self.scale(state).split(self.split, dim=-1) if piece.shape[-1]]
        inner = [part(piece) for part, piece in zip(self.parts, pieces, strict=True)]
        return self.both(torch.cat(inner, dim=-1))


class Student(nn.Module):
    """One moment -> the width-d outputs at the three action tokens [B, 3, d].

    With a VLM, d is its width: the state and action tokens stand at the end of its sequence, and its own layers
    and last norm are the transformer.
    """

    def __init__(self, config: Config, space: Space, fingers: int) -> None:
        super().__init__()
        self.vlm = Vlm(config.vlm, config.freeze, config.lora) if config.vlm else None
        self.width = width = config.width if self.vlm is None else self.vlm.width
        self.see = None
        if self.vlm is None:
            self.see = ObservationEncoder(
                space.cameras,
                space.state_mean,
                space.state_std,
                width,
                config.vision,
                config.image_size,
                config.points,
                with_state=False,
                freeze="vision" in config.freeze,
            )
        self.state = StateEncoder(space, fingers, width)
        self.action = nn.Parameter(torch.randn(width) * 0.02)
        own = self.vlm is None
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.layers if own else 0))
        self.norm = nn.LayerNorm(width) if own else nn.Identity()

    def forward(self, images: list[Tensor], state: Tensor, text: Tensor) -> Tensor:
        place = sinusoids(torch.arange(1.0, 4.0, device=state.device), len(self.action))
        actions = (self.action + place).expand(len(state), -1, -1)
        if self.vlm is not None:
            added = torch.cat([self.state(state)[:, None], actions], dim=1)
            return self.vlm(images, text[:, TEXT_LENGTH:], added)[2][:, -3:]
        assert self.see is not None
        tokens = torch.cat([self.see(images, state, text), self.state(state)[:, None], actions], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, -3:])


class Vita(Objective):
    """Student, mapper and decoder. `facts`: teacher width and the decoder's description."""

    def __init__(self, config: Config, space: Space, facts: Mapping[str, Any]) -> None:
        super().__init__()
        self.config, self.space, self.stage = config, space, "align"
        told = facts["decoder"]
        self.student = Student(config, space, min(config.fingers, space.state_dim))
        self.mapper = mlp(self.student.width, facts["width"], facts["width"], layers=3)
        self.decoder = ActionDecoder(
            told["width"], told["action_dim"], told["grippers"], told["trunk"], told["bounded"]
        )

    def begin(self, phase: Phase) -> None:
        self.stage = phase.name
        self.requires_grad_(True)
        if self.stage == "align":
            self.decoder.requires_grad_(False)
        if self.student.vlm is not None:
            self.student.vlm.requires_grad_(self.stage == "tune")
        elif self.config.pretrained:
            assert self.student.see is not None
            self.student.see.requires_grad_(False)
            self.student.blocks.requires_grad_(self.stage == "tune")
            self.student.norm.requires_grad_(self.stage == "tune")

    def forward(self, batch: Mapping[str, Any], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch` with the actions of t .. t + 2 and, for stage 1, `teacher` [B, 3, h]."""
        hidden = self.hidden(
            [frames[:, 0] for frames in batch["images"]], batch["state"][:, 0], batch["text"]
        )
        valid = ~batch["is_pad"][:, :3, None]
        if self.stage == "align":
            if "teacher_is_pad" in batch:
                pad = batch["teacher_is_pad"]
                valid = valid & ~(pad if pad.ndim == 2 else pad[:, None]).expand(-1, 3)[..., None]
            loss = masked_mean((hidden - batch["teacher"]) ** 2, valid)
            return loss, {"alignment": loss.detach()}
        arm, logits = self.decoder(hidden)
        action, arm_dims = batch["action"][:, :3], list(self.decoder.arm_dims)
        present = valid & (batch["dims"] if batch["dims"].ndim == 1 else batch["dims"][:, None])
        arm_loss = masked_mean((arm - action[..., arm_dims]).abs(), present[..., arm_dims])
        if not self.decoder.grippers:
            return arm_loss, {"arm": arm_loss.detach()}
        closed = (action[..., list(self.decoder.grippers)] > 0).float()
        entropy = F.binary_cross_entropy_with_logits(logits, closed, reduction="none")
        gripper_loss = masked_mean(entropy, present[..., list(self.decoder.grippers)])
        loss = arm_loss + self.config.gripper_weight * gripper_loss
        return loss, {"arm": arm_loss.detach(), "gripper": gripper_loss.detach()}

    def hidden(self, images: list[Tensor], state: Tensor, text: Tensor) -> Tensor:
        """[B, 3, h]: what the student takes the teacher's hidden states to be."""
        return self.mapper(self.student(images, state, text))


class VitaPolicy:
    """Executes `run` of the three actions before looking again."""

    def __init__(self, model: Vita, seed: int = 0, run: int = 3) -> None:
        self.model, self.space, self.run = model.eval(), model.space, run
        self.words = words_of(model)
        self.clock: dict[str, list[float]] = {"student": []}
        self.actions = deque[np.ndarray]()

    def reset(self) -> None:
        self.actions.clear()

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, texts: list[str]) -> np.ndarray:
        if not self.actions:
            seen = observe(self.space, images, state, texts, self.model.student.action.device, self.words)
            with timed(self.clock["student"]), torch.no_grad():
                normal = self.model.decoder.actions(self.model.hidden(*seen)[:, : self.run])
            grippers = list(self.model.decoder.grippers)
            normal[..., grippers] = normal[..., grippers] * 2 - 1
            native = self.space.action.denormalise(normal.cpu().numpy()) * self.space.mask
            self.actions.extend(np.moveaxis(native, 1, 0))
        return self.actions.popleft()


def _spec(config: Config, space: Space, facts: Mapping[str, Any]) -> StreamSpec:
    size = (config.image_size, config.image_size)
    return StreamSpec(columns=(STATE,), cameras=space.cameras, chunks={"action": 3}, size=size)


def _phases(config: Config, steps: int) -> list[Phase]:
    align = round(config.align_share * steps)
    tune = Phase("tune", steps - align, config.tune_lr)
    return [Phase("align", align), tune] if config.mode == "two-stage" else [tune]


def _facts(config: Config, targets: Mapping[str, TargetFolder]) -> dict[str, Any]:
    decoder = load_decoder(_decoder_file(targets))
    return {"width": decoder.width, "decoder": decoder.describe()}


def _start(model: Vita, targets: Mapping[str, TargetFolder]) -> None:
    """Take over the teacher's decoder, unless the control starts from scratch."""
    if model.config.mode != "scratch":
        model.decoder.load_state_dict(load_decoder(_decoder_file(targets)).state_dict())


def _decoder_file(targets: Mapping[str, TargetFolder]) -> Path:
    return targets["teacher"].path / "decoder.safetensors"


RECIPE = Recipe(
    name="vita",
    config=Config,
    targets=lambda config: (["teacher"], 0),
    spec=_spec,
    build=Vita,
    phases=_phases,
    policy=VitaPolicy,
    options=Options(lr=1e-3),
    facts=_facts,
    start=_start,
)
