"""DIAL: one system imagines what it will see, the other acts to make it so, in the features of one frozen tower.

System 2  image points, the present features, the words and N learned queries through a transformer and an MLP:
          x_t, the foreseen features N x d of the frame H steps ahead
System 1  x_t beside the present features F_t, told apart by type embeddings, mixed by self-attention; a flow
          transformer reads the mixture by turns with its own tokens: the state and H noisy actions
Stage 1   warm-up, decoupled: System 1 is shown the true F_{t+H}, System 2 learns to foresee it (L_world). No
          parameter is shared and no gradient crosses
Stage 2   end to end: System 1 is shown x_t, the loss is the sum. A new run from stage 1's weights, as published

Features are standardised once, with the cache's own mean and deviation, wherever they are used: present, future
and target are one and the same tensor. The tower and its cache are frozen always.

The paper and its code differ; the paper's choice is the default:
    tau         uniform | beta15 (code: favours noise)        half_sum     the losses' mean (code), not sum
    separate_loss_head   a second copy of the projector carries L_world in stage 2 (code), so that it no longer
                         touches the x_t that System 1 gets
Where t + H lies beyond the episode the last frame stands in; `pad_weight` 0 leaves such samples out of L_world.

Source   DIAL (latent world modelling), Secs 3 - 4, code xpeng-robotics/DIAL b611fed.
Legend   B batch, N tokens, k feature width, d width, H steps, A dimensions.
"""

from collections import deque
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..models.blocks import (
    TEXT_LENGTH,
    Attention,
    Block,
    ObservationEncoder,
    StateScale,
    TimeEmbedding,
    feed_forward,
    mlp,
)
from ..models.diffusion import beta15_times, euler_sample, flow_point
from ..models.towers import VisionTower, open_tower
from ..models.vlm import Vlm, words_of
from ..schemas.errors import unknown_name
from ..streams.stream import StreamSpec
from .draws import Draws
from .loop import Objective, Options, Phase
from .losses import masked_mean, valid_steps
from .policy import observe, timed
from .recipe import Recipe, TargetFolder
from .space import STATE, Space


@dataclass(frozen=True)
class Config:
    """Defaults are the tiny policy; the paper has 4 mixing and 16 flow layers of 1536 and N = 64."""

    horizon: int = 16  # H: actions, and frames ahead
    stages: str = "both"  # both | one | two: how the steps are spent (one and two are the ablations)
    width: int = 128
    foresee_layers: int = 2
    mix_layers: int = 2
    flow_layers: int = 4
    heads: int = 4
    vision: str = "conv"  # conv | vit | hf:<folder>
    vlm: str = ""  # hf:<folder>: System 2 is this vision-language model and its N queries
    freeze: tuple[str, ...] = ("vision", "merger", "embeddings")  # or llm, llm[:12]: backbones
    lora: int = 0  # rank of the adapters in the VLM's language model; 0: none
    image_size: int = 64
    points: int = 8
    tau: str = "uniform"  # uniform | beta15
    half_sum: bool = False
    separate_loss_head: bool = False
    pad_weight: float = 1.0
    goal_noise: float = 0.0  # of the true future shown in stage 1
    sample_steps: int = 4
    execute: int = 8  # actions executed before looking again
    noise_draws: int = 4  # flow times per observation [ours]

    def __post_init__(self) -> None:
        for name, known in {"tau": ("uniform", "beta15"), "stages": ("both", "one", "two")}.items():
            if getattr(self, name) not in known:
                raise unknown_name(f"dial {name}", getattr(self, name), known)


class Foresee(nn.Module):
    """System 2: [B, N, k] present features, images and words -> what N queries bring back, [B, N, d].

    With a VLM, d is its width: it sees the images themselves, and the queries stand at the end of its sequence.
    """

    def __init__(self, config: Config, space: Space, tokens: int, channels: int) -> None:
        super().__init__()
        c = config
        self.vlm = Vlm(c.vlm, c.freeze, c.lora) if c.vlm else None
        self.width = c.width if self.vlm is None else self.vlm.width
        if self.vlm is not None:
            self.queries = nn.Parameter(torch.randn(tokens, self.width) * 0.02)
            return
        self.see = ObservationEncoder(
            space.cameras,
            space.state_mean,
            space.state_std,
            c.width,
            c.vision,
            c.image_size,
            c.points,
            with_state=False,
            freeze="vision" in c.freeze,
        )
        self.enter = nn.Linear(channels, c.width)
        self.place = nn.Parameter(torch.randn(tokens, c.width) * 0.02)
        self.queries = nn.Parameter(torch.randn(tokens, c.width) * 0.02)
        self.blocks = nn.ModuleList(Block(c.width, c.heads) for _ in range(c.foresee_layers))
        self.norm = nn.LayerNorm(c.width)

    def forward(self, images: list[Tensor], state: Tensor, text: Tensor, present: Tensor) -> Tensor:
        """What the queries bring back, [B, N, d]: the projector makes features of it."""
        count = len(self.queries)
        if self.vlm is not None:
            asked = self.queries.expand(len(present), -1, -1)
            return self.vlm(images, text[:, TEXT_LENGTH:], asked)[2]
        now = self.enter(present) + self.place
        # A query stands where its token will be, beside the present token of that place.
        asked = (self.queries + self.place).expand(len(present), -1, -1)
        tokens = torch.cat([asked, now, self.see(images, state, text)], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, :count])


class FlowLayer(nn.Module):
    """One layer of the flow transformer: attention to the context or among its own tokens, gated by time."""

    recomputable = True

    def __init__(self, width: int, heads: int, cross: bool) -> None:
        super().__init__()
        self.cross = cross
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attention, self.mlp = Attention(width, heads), feed_forward(width)
        self.modulate = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, tokens: Tensor, condition: Tensor, context: Tensor) -> Tensor:
        """tokens [B K, n, d], condition [B K, d], context [B, m, d] shared by the K rows of a sample."""
        a1, b1, g1, a2, b2, g2 = self.modulate(F.silu(condition))[:, None].chunk(6, dim=-1)
        inner = self.norms[0](tokens) * (1 + a1) + b1
        if self.cross:
            rows = inner.reshape(len(context), -1, inner.shape[-1])
            mixed = self.attention(rows, context).reshape(inner.shape)
        else:
            mixed = self.attention(inner)
        tokens = tokens + g1 * mixed
        return tokens + g2 * self.mlp(self.norms[1](tokens) * (1 + a2) + b2)


class Act(nn.Module):
    """System 1: foreseen and present features, the state, noisy actions and time -> velocity [B, H, A]."""

    def __init__(self, config: Config, space: Space, tokens: int, channels: int) -> None:
        super().__init__()
        c = config
        self.norm_goal, self.norm_now = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.enter_goal, self.enter_now = nn.Linear(channels, c.width), nn.Linear(channels, c.width)
        self.kinds = nn.Parameter(torch.randn(2, 1, c.width) * 0.02)  # goal, now
        self.place = nn.Parameter(torch.randn(tokens, c.width) * 0.02)
        self.mix = nn.ModuleList(Block(c.width, c.heads) for _ in range(c.mix_layers))
        self.scale = StateScale(space.state_mean, space.state_std)
        self.state = mlp(space.state_dim, c.width, c.width)
        self.enter = nn.Linear(space.action_dim, c.width)
        self.steps = nn.Parameter(torch.randn(c.horizon, c.width) * 0.02)
        self.time = TimeEmbedding(c.width)
        self.flow = nn.ModuleList(FlowLayer(c.width, c.heads, cross=i % 2 == 0) for i in range(c.flow_layers))
        self.norm = nn.LayerNorm(c.width)
        self.leave = nn.Linear(c.width, space.action_dim)

    def context(self, goal: Tensor, present: Tensor) -> Tensor:
        """[B, N, k] twice -> [B, 2 N, d]."""
        far = self.enter_goal(self.norm_goal(goal)) + self.kinds[0] + self.place
        near = self.enter_now(self.norm_now(present)) + self.kinds[1] + self.place
        tokens = torch.cat([far, near], dim=1)
        for block in self.mix:
            tokens = block(tokens)
        return tokens

    def velocity(self, noisy: Tensor, tau: Tensor, state: Tensor, context: Tensor) -> Tensor:
        """noisy [B K, H, A], tau [B K], state [B, D], context [B, 2 N, d] -> [B K, H, A]."""
        robot = self.state(self.scale(state)).repeat_interleave(len(noisy) // len(state), 0)
        tokens = torch.cat([robot[:, None], self.enter(noisy) + self.steps], dim=1)
        condition = self.time(tau)
        for layer in self.flow:
            tokens = layer(tokens, condition, context)
        return self.leave(self.norm(tokens[:, 1:]))


class Dial(Objective):
    """Both systems. `facts`: tokens, channels, feature mean and std, and how features are made from frames."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: Config, space: Space, facts: Mapping[str, Any]) -> None:
        super().__init__()
        self.config, self.space, self.facts, self.stage = config, space, facts, "warm-up"
        tokens, channels = facts["tokens"], facts["channels"]
        self.foresee = Foresee(config, space, tokens, channels)
        self.projector = mlp(self.foresee.width, self.foresee.width, channels, layers=3)
        self.act = Act(config, space, tokens, channels)
        self.loss_projector = deepcopy(self.projector) if config.separate_loss_head else None
        self.register_buffer("mean", torch.tensor(facts["mean"], dtype=torch.float32))
        self.register_buffer("std", torch.tensor(facts["std"], dtype=torch.float32).clamp(min=1e-6))

    def begin(self, phase: Phase) -> None:
        if phase.name == "end-to-end" and self.loss_projector is not None:
            self.loss_projector.load_state_dict(self.projector.state_dict())
        self.stage = phase.name

    def standardise(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std

    def forward(self, batch: Mapping[str, Any], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch` with `foresight` [B, 2, N, k]: the present features and those H frames ahead."""
        c = self.config
        present, future = self.standardise(batch["foresight"].float()).unbind(1)
        images, state = [frames[:, 0] for frames in batch["images"]], batch["state"][:, 0]
        thought = self.foresee(images, state, batch["text"], present)
        foreseen = self.projector(thought)
        if self.stage == "warm-up":
            goal = future
            if c.goal_noise:
                goal = goal + c.goal_noise * draws.normal(*goal.shape[1:])
            judged = foreseen
        else:
            goal = foreseen
            judged = foreseen if self.loss_projector is None else self.loss_projector(thought.detach())
        weight = torch.ones(len(state), device=state.device)
        if c.pad_weight != 1 and "foresight_is_pad" in batch:
            weight = torch.where(batch["foresight_is_pad"].flatten(1).any(1), c.pad_weight, 1.0)
        world = masked_mean((judged.float() - future) ** 2, weight[:, None, None])
        flow = self._flow_loss(batch, goal, present, state, draws)
        loss = (flow + world) * (0.5 if c.half_sum else 1.0)
        copied = ((present - future) ** 2).mean()
        return loss, {"flow": flow.detach(), "world": world.detach(), "copy_current": copied.detach()}

    def _flow_loss(
        self, batch: Mapping[str, Any], goal: Tensor, present: Tensor, state: Tensor, draws: Draws
    ) -> Tensor:
        k, action = self.config.noise_draws, batch["action"]
        uniform = draws.uniform(k).flatten()
        tau = beta15_times(uniform) if self.config.tau == "beta15" else uniform
        noise = draws.normal(k, *action.shape[1:]).flatten(0, 1)
        noisy, target = flow_point(action.repeat_interleave(k, 0), noise, tau)
        valid = valid_steps(batch["is_pad"], batch["dims"]).expand_as(action).repeat_interleave(k, 0)
        out = self.act.velocity(noisy, tau, state, self.act.context(goal, present))
        return masked_mean((out.float() - target) ** 2, valid)

    @torch.no_grad()
    def imagine(self, images: list[Tensor], state: Tensor, text: Tensor, present: Tensor) -> Tensor:
        """Standardised present features -> standardised foreseen ones, [B, N, k]."""
        return self.projector(self.foresee(images, state, text, present))

    @torch.no_grad()
    def sample(self, goal: Tensor, present: Tensor, state: Tensor, noise: Tensor) -> Tensor:
        """Normalised actions [B, H, A] by Euler steps from `noise`."""
        context = self.act.context(goal, present)
        out = euler_sample(
            lambda x, tau: self.act.velocity(x, tau, state, context), noise, self.config.sample_steps
        )
        return out.clamp(-1, 1)


# -- at work ----------------------------------------------------------------------------------------------


class Features:
    """The cache's features, computed live from a camera's frames on the cache's own terms."""

    def __init__(self, facts: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> None:
        self.facts, self.arrays = facts, arrays

    @cached_property
    def tower(self) -> VisionTower:
        made = self.facts["made"]
        return open_tower(made["tower"], image_size=made["image_size"] or None, tensor=made["tensor"] or None)

    def of(self, frames: NDArray[np.uint8]) -> Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, N, k]: crop, tower, pooling, principal directions."""
        made = self.facts["made"]
        top, bottom, left, right = made["crop"]
        height, width = frames.shape[1:3]
        cut = frames[
            :, round(top * height) : round(bottom * height), round(left * width) : round(right * width)
        ]
        features, (gh, gw) = self.tower.encode(np.ascontiguousarray(cut))
        k = made["pool"]
        pooled = features.reshape(len(cut), gh // k, k, gw // k, k, -1).mean(axis=(2, 4))
        out = torch.from_numpy(pooled.reshape(len(cut), -1, pooled.shape[-1]))
        if "basis" in self.arrays:
            out = (out - self.arrays["mean"]) @ self.arrays["basis"]
        return out


class DialPolicy:
    """Foresee, act for `execute` steps, look again.

    `foresight`: "imagined", or the control "present", where System 1 is shown the present as if it were the goal.
    """

    def __init__(self, model: Dial, seed: int = 0, foresight: str = "imagined") -> None:
        if foresight not in ("imagined", "present"):
            raise unknown_name("dial foresight", foresight, ("imagined", "present"))
        self.foresight = foresight
        self.model, self.space = model.eval(), model.space
        arrays = {name: torch.tensor(value) for name, value in model.facts["arrays"].items()}
        self.features = Features(model.facts, arrays)
        self.generator, self.words = torch.Generator().manual_seed(seed), words_of(model)
        self.clock: dict[str, list[float]] = {"tower": [], "foresee": [], "act": []}
        self.actions = deque[np.ndarray]()

    def reset(self) -> None:
        self.actions.clear()

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, texts: list[str]) -> np.ndarray:
        if not self.actions:
            model, c = self.model, self.model.config
            frames, robot, words = observe(self.space, images, state, texts, model.mean.device, self.words)
            with timed(self.clock["tower"]):
                raw = self.features.of(images[model.facts["camera"]]).to(model.mean.device)
                present = model.standardise(raw)
            with timed(self.clock["foresee"]):
                blind = self.foresight == "present"
                goal = present if blind else model.imagine(frames, robot, words, present)
            with timed(self.clock["act"]):
                shape = (len(robot), c.horizon, self.space.action_dim)
                noise = torch.randn(shape, generator=self.generator).to(robot.device)
                normal = model.sample(goal, present, robot, noise)
            native = self.space.action.denormalise(normal.float().cpu().numpy()) * self.space.mask
            self.actions.extend(np.moveaxis(native[:, : c.execute], 1, 0))
        return self.actions.popleft()


# -- how `train` and `evaluate` know it -------------------------------------------------------------------


def _facts(config: Config, targets: Mapping[str, TargetFolder]) -> dict[str, Any]:
    """Sizes and scales of the cache, and the terms it was made on (so that a policy can make more of it)."""
    import json

    target = targets["foresight"]
    params = target.contract.params
    report = json.loads((target.path / "report.json").read_text())
    rows, columns = target.facts["stored_grid"]
    arrays = {
        name: np.load(target.path / "prepared" / f"{name}.npy").tolist()
        for name in ("mean", "basis")
        if (target.path / "prepared" / f"{name}.npy").is_file()
    }
    spans = [(0.0, 1.0), (0.0, 1.0)]
    for i, span in enumerate(filter(None, params["crop"].split(","))):
        low, high = span.split(":")
        spans[i] = (float(low), float(high))
    return {
        "tokens": rows * columns,
        "channels": int(target.facts["stored_width"]),
        "mean": report["feature_mean"],
        "std": report["feature_std"],
        "camera": target.facts["camera"],
        "made": {
            "tower": params["tower"],
            "tensor": params["tensor"],
            "image_size": params["image_size"],
            "crop": [*spans[0], *spans[1]],
            "pool": params["pool"],
        },
        "arrays": arrays,
        "weights": target.contract.weights,
    }


def _spec(config: Config, space: Space, facts: Mapping[str, Any]) -> StreamSpec:
    size = (config.image_size, config.image_size)
    return StreamSpec(columns=(STATE,), cameras=space.cameras, chunks={"action": config.horizon}, size=size)


def _phases(config: Config, steps: int) -> list[Phase]:
    """Half the steps each, as published (20k + 20k, 80k + 80k)."""
    if config.stages == "one":
        return [Phase("warm-up", steps)]
    if config.stages == "two":
        return [Phase("end-to-end", steps)]
    return [Phase("warm-up", steps // 2), Phase("end-to-end", steps - steps // 2)]


RECIPE = Recipe(
    name="dial",
    config=Config,
    targets=lambda config: ([f"foresight:at=0|{config.horizon}"], 0),
    spec=_spec,
    build=Dial,
    phases=_phases,
    policy=DialPolicy,
    options=Options(lr=1e-3),
    facts=_facts,
)
