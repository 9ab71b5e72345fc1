"""AnchorRefine: a frozen policy proposes a chunk, a small refiner says what it lacks.

Anchor    any policy that speaks chunks (`dpipe train anchor`, or LeRobot's); its chunks are cached
Refiner   the anchor's own observation tokens, frozen; queries that start as the anchor's; a small transformer;
          two heads that start at zero, so that training starts exactly at the anchor:
              delta   what is to be added to the arm, in units of its own deviation
              c       what is to be added to the gripper's probability, likewise
          arm = anchor + delta;   gripper = 1[p + c > 0.5]
Loss      mean squared error of the standardised delta + lambda x that of the standardised c. Most c* are 0, because
          most gripper decisions are right; the mean keeps them all (the paper), `pos_weight` lifts the others

`mode` names the controls, at equal steps: `refine`; `direct`, the same refiner predicting the action itself;
`continue`, the anchor merely trained on. With an anchor of ample capacity `continue` is the one to beat.

A LeRobot anchor shares no observation tokens: the refiner then has an encoder of its own, which trains.

Source   AnchorRefine, Secs 3.1 - 3.6, 4.3; margin, lambda and learning rate are ours. The refiner does not read
         the anchor's output (Sec 3.4 and the ablation; App. A.3.2 says otherwise): `concat_anchor` lets it.
Legend   B batch, K chunk, A dimensions: arm Da, grippers G; d width.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.blocks import Block, ObservationEncoder
from ..models.policies import AnchorPolicy, EmbeddedAnchor, EmbeddedPolicy, PolicyConfig, open_anchor
from ..schemas.errors import DataError, UsageError, unknown_name
from ..streams.stream import StreamSpec
from .draws import Draws
from .loop import Objective, Options, Phase
from .losses import masked_mean
from .policy import observe, timed
from .recipe import Recipe, TargetFolder
from .space import STATE, Space


@dataclass(frozen=True)
class Config:
    mode: str = "refine"  # refine | direct | continue
    layers: int = 2
    heads: int = 4
    lambda_gripper: float = 1.0
    pos_weight: float = 1.0  # of the decisions the anchor gets wrong
    concat_anchor: bool = False
    width: int = 128  # with a LeRobot anchor; an embedded one's own otherwise
    vision: str = "conv"  # with a LeRobot anchor: conv | vit | hf:<folder>, frozen
    image_size: int = 64
    run: int = 0  # steps executed of a chunk; 0: half

    def __post_init__(self) -> None:
        if self.mode not in ("refine", "direct", "continue"):
            raise unknown_name("anchorrefine mode", self.mode, ("refine", "direct", "continue"))


class AnchorRefine(Objective):
    """Refiner on a frozen anchor. `facts`: the anchor's sizes, chunk, dimensions, the delta's deviation."""

    scale: (
        Tensor  # [Da] deviation of delta (of the action itself in mode `direct`); 1 where the data never move
    )

    def __init__(self, config: Config, space: Space, facts: Mapping[str, Any]) -> None:
        super().__init__()
        self.config, self.space, self.facts = config, space, facts
        self.chunk, self.arm_dims, self.gripper_dims = (
            facts["chunk"],
            facts["arm_dims"],
            facts["gripper_dims"],
        )
        told = facts["anchor"]
        if told is not None:
            self.anchor = EmbeddedPolicy(PolicyConfig.from_json(told))
            width, self.encoder = told["width"], None
        else:
            self.anchor, width = None, config.width
            self.encoder = ObservationEncoder(
                space.cameras, space.state_mean, space.state_std, width, config.vision, config.image_size
            )
        self.queries = nn.Parameter(torch.randn(self.chunk, width) * 0.02)
        inner = len(self.arm_dims) + len(self.gripper_dims)
        self.enter = nn.Linear(inner, width) if config.concat_anchor else None
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.delta = nn.Linear(width, len(self.arm_dims))
        self.correction = nn.Linear(width, len(self.gripper_dims)) if self.gripper_dims else None
        for head in (self.delta, self.correction):
            if head is not None:
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
        raw = torch.tensor(facts["raw_std"], dtype=torch.float32)
        spread = raw if config.mode == "direct" else torch.tensor(facts["delta_std"], dtype=torch.float32)
        # Where the data never move (an arm at rest) the residual is the anchor's own bias: dividing by how little
        # that varies would make it the loudest part of the loss.
        self.register_buffer("scale", torch.where(raw < 1e-6, 1.0, spread.clamp(min=1e-6)))
        # About the deviation of c*: a share w of the decisions is off by 0.25 + m on average, the rest by 0.
        self.gripper_scale = max(0.02, facts["wrong"] ** 0.5 * (0.25 + facts["margin"]))

    def begin(self, phase: Phase) -> None:
        going_on = self.config.mode == "continue"
        self.requires_grad_(not going_on)
        if self.anchor is not None:
            self.anchor.requires_grad_(going_on)

    def take_over(self, anchor: EmbeddedPolicy) -> None:
        """The anchor's weights, and its queries as the refiner's."""
        assert self.anchor is not None
        self.anchor.load_state_dict(anchor.state_dict())
        with torch.no_grad():
            self.queries.copy_(anchor.action_queries[: self.chunk])

    def refine(
        self, images: list[Tensor], state: Tensor, text: Tensor, arm: Tensor, logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One moment and the anchor's chunk -> delta [B, K, Da] and c [B, K, G], both standardised."""
        if self.anchor is not None:
            with torch.no_grad():
                seen = self.anchor.encoder(images, state, text) + self.anchor.steps[:1]
        else:
            assert self.encoder is not None
            seen = self.encoder(images, state, text)
        asked = self.queries.expand(len(seen), -1, -1)
        if self.enter is not None:
            asked = asked + self.enter(torch.cat([arm, logits.sigmoid()], dim=-1))
        tokens = torch.cat([asked, seen], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        steps = self.norm(tokens[:, : self.chunk])
        return self.delta(steps), logits[..., :0] if self.correction is None else self.correction(steps)

    def forward(self, batch: Mapping[str, Any], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch` with `residuals_arm`, `_delta`, `_grip_logit`, `_grip_target` and `_is_pad`."""
        images, state = [frames[:, 0] for frames in batch["images"]], batch["state"][:, 0]
        valid = ~(batch["is_pad"] | batch["residuals_is_pad"])[..., None]
        if self.config.mode == "continue":
            return self._imitate(images, state, batch, valid)
        arm = batch["residuals_arm"]
        logits = batch.get("residuals_grip_logit", arm[..., :0])
        delta, correction = self.refine(images, state, batch["text"], arm, logits)
        wanted = batch["residuals_delta"]
        if self.config.mode == "direct":
            wanted = batch["action"][..., self.arm_dims]
        arm_loss = masked_mean((delta - wanted / self.scale) ** 2, valid)
        if not self.gripper_dims:
            return arm_loss, {"delta": arm_loss.detach()}
        target = batch["residuals_grip_target"]
        wrong = target != 0
        weight = torch.where(wrong, self.config.pos_weight, 1.0)
        gripper_loss = masked_mean(weight * (correction - target / self.gripper_scale) ** 2, valid)
        loss = arm_loss + self.config.lambda_gripper * gripper_loss
        told = {"delta": arm_loss, "gripper": gripper_loss, "wrong": masked_mean(wrong.float(), valid)}
        return loss, {name: value.detach() for name, value in told.items()}

    def _imitate(
        self, images: list[Tensor], state: Tensor, batch: Mapping[str, Any], valid: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The control: the anchor's own loss, for as many steps as the refiner would have had."""
        if self.anchor is None:
            raise UsageError(
                "mode 'continue' trains an embedded anchor on; a LeRobot policy trains in lerobot"
            )
        hidden = self.anchor([frame[:, None] for frame in images], state[:, None], batch["text"])[:, 0]
        arm, logits = self.anchor.decoder(hidden[:, : self.chunk])
        arm_loss = masked_mean((arm - batch["action"][..., self.arm_dims]).abs(), valid)
        if not self.gripper_dims:
            return arm_loss, {"arm": arm_loss.detach()}
        closed = (batch["action"][..., self.gripper_dims] > 0).float()
        entropy = F.binary_cross_entropy_with_logits(logits, closed, reduction="none")
        gripper_loss = masked_mean(entropy, valid)
        return arm_loss + 0.1 * gripper_loss, {"arm": arm_loss.detach(), "gripper": gripper_loss.detach()}

    def combine(self, arm: Tensor, logits: Tensor, delta: Tensor, correction: Tensor) -> Tensor:
        """Anchor and refiner -> normalised actions [B, K, A], grippers -1 or +1."""
        base = torch.zeros_like(arm) if self.config.mode == "direct" else arm
        out = arm.new_zeros(*arm.shape[:-1], self.space.action_dim)
        out[..., self.arm_dims] = base + delta * self.scale
        if self.gripper_dims:
            out[..., self.gripper_dims] = torch.where(
                logits.sigmoid() + correction * self.gripper_scale > 0.5, 1.0, -1.0
            )
        return out


# -- at work ----------------------------------------------------------------------------------------------


class AnchorRefinePolicy:
    """The live anchor, then the refiner. `refine=False` is the anchor alone (and what `continue` made of it)."""

    def __init__(self, model: AnchorRefine, seed: int = 0, refine: bool = True) -> None:
        self.model, self.space, self.seed = model.eval(), model.space, seed
        self.refine = refine and model.config.mode != "continue"
        self.run = model.config.run or max(1, model.chunk // 2)
        self.clock: dict[str, list[float]] = {"anchor": [], "refine": []}
        self.actions = deque[np.ndarray]()
        self.foreign: AnchorPolicy | None = open_anchor(model.facts["spec"]) if model.anchor is None else None

    def reset(self) -> None:
        self.actions.clear()

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, texts: list[str]) -> np.ndarray:
        if not self.actions:
            seen = observe(self.space, images, state, texts, self.model.scale.device)
            with timed(self.clock["anchor"]):
                arm, logits = self._anchor(images, state, texts, seen)
            delta, correction = torch.zeros_like(arm), torch.zeros_like(logits)
            if self.refine:
                with timed(self.clock["refine"]), torch.no_grad():
                    delta, correction = self.model.refine(*seen, arm, logits)
            normal = self.model.combine(arm, logits, delta, correction)[:, : self.run]
            native = self.space.action.denormalise(normal.float().cpu().numpy()) * self.space.mask
            self.actions.extend(np.moveaxis(native, 1, 0))
        return self.actions.popleft()

    def _anchor(
        self,
        images: Mapping[str, np.ndarray],
        state: np.ndarray,
        texts: list[str],
        seen: tuple[list[Tensor], Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        chunk, network = self.model.chunk, self.model.anchor
        if network is None:
            assert self.foreign is not None
            seeds = np.full(len(state), self.seed, dtype=np.int64)
            arm, logits = (torch.from_numpy(part) for part in self.foreign.act(images, state, texts, seeds))
            return arm[:, :chunk], logits[:, :chunk]
        frames, robot, words = seen
        with torch.no_grad():
            hidden = network([frame[:, None] for frame in frames], robot[:, None], words)[:, 0, :chunk]
            return network.decoder(hidden)


# -- how `train` and `evaluate` know it -------------------------------------------------------------------


def _facts(config: Config, targets: Mapping[str, TargetFolder]) -> dict[str, Any]:
    import json

    target = targets["residuals"]
    report = json.loads((target.path / "report.json").read_text())
    spec = target.contract.model.split(",")[0]
    anchor = None
    if spec.startswith("embedded:"):
        anchor = asdict(_embedded(spec, target).config)
    return {
        "spec": spec,
        "anchor": anchor,
        "chunk": int(target.facts["chunk"]),
        "arm_dims": target.facts["arm_dims"],
        "gripper_dims": target.facts["gripper_dims"],
        "delta_std": report["delta_std"],
        "raw_std": report["raw_std"],
        "wrong": float(report.get("gripper_nonzero", 0.0)),
        "margin": float(target.contract.params["margin"]),
    }


def _embedded(spec: str, target: TargetFolder) -> EmbeddedAnchor:
    anchor = open_anchor(spec)
    assert isinstance(anchor, EmbeddedAnchor)
    wanted = target.contract.weights.split(",")[0]
    if anchor.describe()["weights"] != wanted:
        raise DataError(
            f"the anchor in {spec} is not the one the residuals were made with\n"
            f"  expected weights {wanted}, found {anchor.describe()['weights']}\n"
            "  Put the old ones back, or make the residuals again:  dpipe precompute residuals --name NEW"
        )
    return anchor


def _start(model: AnchorRefine, targets: Mapping[str, TargetFolder]) -> None:
    if model.anchor is not None:
        model.take_over(_embedded(model.facts["spec"], targets["residuals"]).network)


def _spec(config: Config, space: Space, facts: Mapping[str, Any]) -> StreamSpec:
    size = facts["anchor"]["image_size"] if facts["anchor"] else config.image_size
    return StreamSpec(
        columns=(STATE,), cameras=space.cameras, chunks={"action": facts["chunk"]}, size=(size, size)
    )


RECIPE = Recipe(
    name="anchorrefine",
    config=Config,
    targets=lambda config: (["residuals"], 0),
    spec=_spec,
    build=AnchorRefine,
    phases=lambda config, steps: [Phase(config.mode, steps)],
    policy=AnchorRefinePolicy,
    options=Options(lr=1e-3),
    facts=_facts,
    start=_start,
)
