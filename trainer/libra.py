"""Libra: a planner names coarse action bins, a refiner diffuses the action they stand for.

Planner   encoder -> H_t; one query per step of the macro chunk (L = M * H steps); bidirectional transformer over
          [queries; H_t]; per step and dimension a choice among N bins, by cross-entropy.
Refiner   its own encoder; H noisy action steps through a diffusion transformer that reads the observation, the
          time and, step by step, the intent: the bins' learned codes.
Between   an intent buffer: one plan serves M refinements, so a step costs T_ref + T_plan / M.

The tiny policy has one pair of eyes for both systems. They also learn to say what the robot's state will be when
its gripper is next told otherwise: where the hand will take hold, or let go (without a gripper, what it will be
`waypoint` steps on). The answer is in every recording,
and both systems read it as one more token. In a first phase the eyes learn nothing else, which is cheap. Without it a
small policy learns when to go down and close long before it learns where, and hardly anything from then on [ours].

In training the refiner looks at frame t + m H, m drawn uniformly from 0 .. M - 1, and gets slice m of the plan
made at t: without it the gap between planning and acting is never trained [ours].

Curriculum: the refiner is first given the true bins. Once the planner's masked accuracy (EMA 0.99) passes tau,
or a sixth of the steps are over, it gets bins sampled from the planner, for good.

phi      implicit   the refiner diffuses the whole normalised action; its output is the action     (default)
         additive   it diffuses the scaled residual N (a - c_y); the action is c_y + r / N
Source   Libra-VLA, Secs 3.2 - 3.3, 4.1, App. B - E; what it leaves open is marked [ours].
Legend   B batch, F observed frames, H steps of a chunk, L = M H, A dimensions, N bins, d width.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.blocks import Block, DiTBlock, ObservationEncoder, StateScale, TimeEmbedding, mlp
from ..models.diffusion import cosine_schedule, ddim_sample, diffuse
from ..models.vlm import Vlm, VlmEncoder, words_of
from ..schemas.errors import unknown_name
from ..streams.stream import StreamSpec
from .draws import Draws
from .loop import Objective, Options, Phase
from .losses import accuracy, masked_mean, mean_over_processes, valid_steps
from .policy import observe, timed
from .recipe import Recipe
from .space import STATE, Space

# phi = additive: a scaled residual is within +-1 of its own bin's centre. On a bin the planner got wrong it
# reaches further; it is cut where it would leave the neighbouring bin [ours].
RESIDUAL_LIMIT = 3.0


@dataclass(frozen=True)
class Config:
    """Defaults are the tiny policy; the paper's are in `presets.py`. [ours] where the paper names no number."""

    bins: int = 10
    chunk: int = 5  # H: steps executed per refinement
    slices: int = 2  # M: refinements per plan
    phi: str = "implicit"  # implicit | additive
    prediction: str = "sample"  # sample: learnt sooner [ours] | epsilon (the paper)
    intent: str = "curriculum"  # curriculum | teacher (true bins throughout) | none
    width: int = 96
    planner_layers: int = 2
    refiner_layers: int = 2
    heads: int = 4
    code_width: int = 16
    vision: str = "conv"  # conv | vit | hf:<folder>
    vlm: str = ""  # hf:<folder>: a vision-language model as the planner's encoder
    freeze: tuple[str, ...] = ("vision",)  # of backbones: vision, merger, embeddings, llm, llm[:12]
    lora: int = 0  # rank of the adapters in the VLM's language model; 0: none
    image_size: int = 64
    points: int = 4
    eyes: str = "one"  # one encoder for both systems [ours] | two: each has its own (the paper)
    waypoint: int = 48  # steps ahead within which the next word to the gripper is sought; 0: not at all
    waypoint_dims: int = 3  # leading numbers of the state that are asked for: where the hand is
    lambda_waypoint: float = 2.0
    look_share: float = 0.35  # of the steps, first: the eyes alone learn, by the waypoint
    look_lr: float = 5e-3  # meanwhile
    levels: int = 100  # of the noise schedule
    sample_steps: int = 10
    noise_draws: int = 4  # noise levels per observation: the encoder's work is shared among them [ours]
    lambda_diff: float = 1.0
    lambda_plan: float = 0.1  # 0: frozen at EMA(L_diff) / EMA(L_plan) after 200 steps [ours]
    tau: float = 0.0  # 0: none but the fallback; `train` passes 0.9 x the probe's top-1 where a report exists
    min_steps: int = 100
    fallback: float = 1 / 6  # of the steps

    def __post_init__(self) -> None:
        choices = {
            "phi": ("implicit", "additive"),
            "prediction": ("epsilon", "sample"),
            "intent": ("curriculum", "teacher", "none"),
            "eyes": ("one", "two"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise unknown_name(f"libra {name}", getattr(self, name), known)

    @property
    def plan_steps(self) -> int:
        return self.chunk * self.slices


# -- curriculum -------------------------------------------------------------------------------------------


@dataclass
class Curriculum:
    """When the refiner starts to live with the planner's own bins: a latch that closes once and never opens.

    `average` is the EMA (0.99, bias-corrected) of the planner's masked token accuracy.
    """

    tau: float
    min_steps: int
    fallback_step: int
    average: float = 0.0
    seen: int = 0
    switched_at: int = -1
    reason: str = ""

    @property
    def switched(self) -> bool:
        return self.switched_at >= 0

    def observe(self, step: int, value: float) -> bool:
        """Count one step's accuracy (`step` from 1); True on the one step at which the latch closes."""
        if self.switched:
            return False
        self.seen += 1
        self.average += (value - self.average) * (1 - 0.99) / (1 - 0.99**self.seen)
        if self.tau > 0 and step >= self.min_steps and self.average > self.tau:
            self.switched_at, self.reason = step, f"accuracy {self.average:.3f} above tau {self.tau:.3f}"
        elif step >= self.fallback_step:
            self.switched_at, self.reason = step, f"fallback at step {step}, accuracy {self.average:.3f}"
        return self.switched


# -- where the hand goes ----------------------------------------------------------------------------------

WAYPOINT_STRIDE = 4  # steps between the states that the stream shows for it


def observed(config: Config) -> tuple[int, ...]:
    """Frames of which planner and refiner get pictures: H apart."""
    return tuple(config.chunk * m for m in range(config.slices))


def answers(config: Config) -> tuple[int, ...]:
    """Frames after t of which the waypoint is shown the state."""
    return tuple(range(WAYPOINT_STRIDE, config.waypoint + 1, WAYPOINT_STRIDE))


def states_shown(config: Config) -> tuple[int, ...]:
    """Both, each once: those observed first."""
    seen = observed(config)
    return seen + tuple(offset for offset in answers(config) if offset not in seen)


def next_word(grip: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """grip bool [B, W, G]: told to close -> the first step after `start` [B] with a new word, and whether any."""
    steps = torch.arange(1, grip.shape[1], device=grip.device)
    new = (grip[:, 1:] != grip[:, :-1]).any(-1) & (steps > start[:, None])
    return new.int().argmax(1) + 1, new.any(1)


class Waypoint(nn.Module):
    """An encoder's tokens -> the state at the gripper's next word, standardised; and that as a token.

    Of the state only its leading `dims`, the hand's position: asked for orientation and fingers as well, which
    no keypoint tells, the eyes need three times as long to find anything.
    """

    def __init__(self, config: Config, space: Space) -> None:
        super().__init__()
        tokens = len(space.cameras) * config.points + 2
        shown = states_shown(config)
        self.places = [shown.index(offset) for offset in answers(config)]  # among the batch's states
        self.scale = StateScale(space.state_mean, space.state_std)
        self.dims = min(config.waypoint_dims, space.state_dim)
        self.say = mlp(tokens * config.width, config.width, self.dims)
        self.token = mlp(2 * self.dims, config.width, config.width)

    def forward(self, seen: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """seen [B, n, d], native state [B, D] -> [B, n + 1, d] and where [B, dims]."""
        where = self.say(seen.flatten(1))
        here = self.scale(state)[:, : self.dims]
        token = self.token(torch.cat([where, where - here], dim=-1))
        return torch.cat([seen, token[:, None]], dim=1), where


# -- networks ---------------------------------------------------------------------------------------------


def make_encoder(config: Config, space: Space) -> ObservationEncoder:
    return ObservationEncoder(
        space.cameras,
        space.state_mean,
        space.state_std,
        config.width,
        config.vision,
        config.image_size,
        config.points,
        freeze="vision" in config.freeze,
    )


def shares_eyes(config: Config) -> bool:
    """A vision-language model plans with its own eyes, whatever the refiner has."""
    return config.eyes == "one" and not config.vlm


def seeks_waypoints(config: Config) -> bool:
    """Only eyes of our own are taught to look: pretrained ones see well enough."""
    return shares_eyes(config) and config.vision == "conv" and config.waypoint > 0


class Planner(nn.Module):
    """An observation's tokens -> logits [B, L, A, N] over the bins of the next L steps."""

    def __init__(self, config: Config, space: Space) -> None:
        super().__init__()
        self.config, self.action_dim = config, space.action_dim
        if config.vlm:
            vlm = Vlm(config.vlm, config.freeze, config.lora)
            self.encoder = VlmEncoder(vlm, space.cameras, space.state_mean, space.state_std, config.width)
        else:
            self.encoder = make_encoder(config, space)
        self.queries = nn.Parameter(torch.randn(config.plan_steps, config.width) * 0.02)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.planner_layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, space.action_dim * config.bins)

    def forward(self, seen: Tensor) -> Tensor:
        tokens = torch.cat([self.queries.expand(len(seen), -1, -1), seen], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        steps = self.norm(tokens[:, : self.config.plan_steps])
        return self.head(steps).unflatten(-1, (self.action_dim, self.config.bins))


class Intent(nn.Module):
    """Bins [B, H, A] -> one token per step [B, H, d].

    The paper's codebook is N x D; here one N x e table serves every dimension, told apart by an embedding of
    the dimension [ours]. Row N stands for a step whose bin is unknown (padding, a value not finite).
    """

    def __init__(self, config: Config, action_dim: int) -> None:
        super().__init__()
        self.codes = nn.Embedding(config.bins + 1, config.code_width)
        self.dimension = nn.Parameter(torch.randn(action_dim, config.code_width) * 0.02)
        self.out = nn.Linear(action_dim * config.code_width, config.width)

    def forward(self, bins: Tensor) -> Tensor:
        return self.out((self.codes(bins) + self.dimension).flatten(-2))


class Refiner(nn.Module):
    """Observation and intent -> context; noisy action and time -> prediction [B, H, A]."""

    def __init__(self, config: Config, space: Space) -> None:
        super().__init__()
        self.config = config
        self.encoder = None if shares_eyes(config) else make_encoder(config, space)
        self.intent = Intent(config, space.action_dim)
        self.enter = nn.Linear(space.action_dim, config.width)
        self.place = nn.Parameter(torch.randn(config.chunk, config.width) * 0.02)
        self.time = TimeEmbedding(config.width)
        self.blocks = nn.ModuleList(
            DiTBlock(config.width, config.heads) for _ in range(config.refiner_layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.leave = nn.Linear(config.width, space.action_dim)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def denoise(self, noisy: Tensor, time: Tensor, seen: Tensor, intent: Tensor | None) -> Tensor:
        """noisy [B, H, A], time [B], intent [B, H, d] -> [B, H, A]; seen [b, n, d] serves B / b rows each."""
        tokens = self.enter(noisy) + self.place
        if intent is not None:
            tokens = tokens + intent
        condition = self.time(time) + seen.mean(dim=1).repeat_interleave(len(noisy) // len(seen), 0)
        for block in self.blocks:
            tokens = block(tokens, condition, seen)
        return self.leave(self.norm(tokens))


def bin_centre(bins: Tensor, count: int) -> Tensor:
    """c_k = -1 + (2 k + 1) / N; an unknown bin stands for 0."""
    return torch.where(bins < count, -1 + (2 * bins.float() + 1) / count, 0.0)


# -- the recipe -------------------------------------------------------------------------------------------


class Libra(Objective):
    """Planner and refiner, trained together. `forward` is one training step's loss."""

    schedule: Tensor  # [levels]: share of the action's variance kept at each noise level

    def __init__(self, config: Config, space: Space) -> None:
        super().__init__()
        self.config, self.space, self.stage = config, space, "train"
        self.planner, self.refiner = Planner(config, space), Refiner(config, space)
        self.waypoint = Waypoint(config, space) if seeks_waypoints(config) and space.cameras else None
        self.register_buffer("schedule", cosine_schedule(config.levels), persistent=False)
        self.curriculum = Curriculum(config.tau, config.min_steps, 0)
        self.balance = _Balance()

    # training

    def forward(self, batch: Mapping[str, Any], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch` as `space.to_tensors` gives it: M observed frames H apart, L tokens, and L actions or more."""
        c = self.config
        part = draws.integers(c.slices)
        to_plan, to_refine, waypoint_loss = self._look(batch, part)
        if self.stage == "look" and waypoint_loss is not None:
            return waypoint_loss, {"waypoint": waypoint_loss.detach()}
        steps = slice(c.plan_steps)
        is_pad = batch["is_pad"][:, steps]
        if "tokens_is_pad" in batch:
            is_pad = is_pad | batch["tokens_is_pad"]
        valid = valid_steps(is_pad, batch["dims"]) & (batch["tokens"] < c.bins)
        bins = batch["tokens"].clamp(max=c.bins)
        logits = self.planner(to_plan)
        entropy = F.cross_entropy(
            logits.flatten(0, 2), bins.clamp(max=c.bins - 1).flatten(), reduction="none"
        )
        plan_loss = masked_mean(entropy.view_as(bins), valid)
        right = accuracy(logits.argmax(-1), bins, valid)

        given = bins
        if self.curriculum.switched and c.intent == "curriculum":
            given = sample_bins(logits.detach(), draws.uniform(c.plan_steps, self.space.action_dim))
        diff_loss = self._diffusion_loss(to_refine, batch["action"][:, steps], valid, given, part, draws)

        weight = c.lambda_plan or self.balance.weight
        loss = c.lambda_diff * diff_loss + weight * plan_loss
        told = {"diffusion": diff_loss.detach(), "plan": plan_loss.detach(), "accuracy": right}
        if waypoint_loss is not None:
            loss = loss + c.lambda_waypoint * waypoint_loss
            told["waypoint"] = waypoint_loss.detach()
        return loss, told

    def _look(self, batch: Mapping[str, Any], part: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the planner sees at t and the refiner at t + part * H, [B, n, d] each; the waypoint's loss."""
        rows, text = torch.arange(len(part), device=part.device), batch["text"]
        first = [frames[:, 0] for frames in batch["images"]], batch["state"][:, 0]
        later = [frames[rows, part] for frames in batch["images"]], batch["state"][rows, part]
        if self.refiner.encoder is not None:
            return self.planner.encoder(*first, text), self.refiner.encoder(*later, text), None
        images = [torch.cat(pair) for pair in zip(first[0], later[0], strict=True)]
        state, text = torch.cat([first[1], later[1]]), torch.cat([text, text])
        if self.waypoint is None:
            to_plan, to_refine = self.planner.encoder(images, state, text).chunk(2)
            return to_plan, to_refine, None
        start = torch.cat([torch.zeros_like(part), part * self.config.chunk])
        wanted, found = self._answers(batch, start)
        if self.stage == "look" and found.any():  # nothing else is asked of the others
            images, state, text = [frames[found] for frames in images], state[found], text[found]
            wanted, found = wanted[found], found[found]
        seen, where = self.waypoint(self.planner.encoder(images, state, text), state)
        loss = masked_mean(F.smooth_l1_loss(where, wanted, reduction="none"), found[:, None])
        if self.stage == "look":
            return seen, seen, loss
        to_plan, to_refine = seen.chunk(2)
        return to_plan, to_refine, loss

    def _answers(self, batch: Mapping[str, Any], start: Tensor) -> tuple[Tensor, Tensor]:
        """For frames t + start [2 B]: the standardised state shown at or just after the word, and whether any."""
        assert self.waypoint is not None
        if self.space.grippers:
            grip = batch["action"][..., list(self.space.grippers)] > 0
            step, found = next_word(torch.cat([grip, grip]), start)
        else:
            step = torch.full_like(start, self.config.waypoint)
            found = torch.ones_like(start, dtype=torch.bool)
        shown = batch["state"][:, self.waypoint.places]  # every WAYPOINT_STRIDE frames after t
        at = ((step - 1) // WAYPOINT_STRIDE).clamp(max=shown.shape[1] - 1)
        rows = torch.arange(len(shown), device=step.device).repeat(2)
        return self.waypoint.scale(shown[rows, at])[:, : self.waypoint.dims], found

    def _diffusion_loss(
        self, seen: Tensor, action: Tensor, valid: Tensor, bins: Tensor, part: Tensor, draws: Draws
    ) -> Tensor:
        """Loss of the refiner, which sees frame t + part * H, over that slice of the chunk."""
        c, refiner = self.config, self.refiner
        rows = torch.arange(len(part), device=part.device)
        steps = part[:, None] * c.chunk + torch.arange(c.chunk, device=part.device)  # [B, H]
        action, bins, valid = (x[rows[:, None], steps] for x in (action, bins, valid))
        target = action
        if c.phi == "additive":
            residual = c.bins * (action.clamp(-1, 1) - bin_centre(bins, c.bins))
            target = residual.clamp(-RESIDUAL_LIMIT, RESIDUAL_LIMIT)
        intent = None if c.intent == "none" else refiner.intent(bins)

        # Every observation serves K = noise_draws noise levels; rows are [B * K] from here on.
        level = draws.integers(c.levels, c.noise_draws).flatten()
        noise = draws.normal(c.noise_draws, *target.shape[1:]).flatten(0, 1)
        target, valid = (x.repeat_interleave(c.noise_draws, 0) for x in (target, valid))
        intent = None if intent is None else intent.repeat_interleave(c.noise_draws, 0)
        noisy = diffuse(target, noise, self.schedule[level])
        out = refiner.denoise(noisy, level.float() / c.levels, seen, intent)
        return masked_mean((out.float() - (noise if c.prediction == "epsilon" else target)) ** 2, valid)

    def begin(self, phase: Phase) -> None:
        """The curriculum's fallback follows from the length of the phase that has one."""
        self.stage = phase.name
        self.curriculum.fallback_step = max(1, round(self.config.fallback * phase.steps))

    def advance(self, step: int, metrics: Mapping[str, Tensor]) -> list[str]:
        """After optimiser step `step` (from 1): move the curriculum on. Returns what is worth a line."""
        if "plan" not in metrics:  # the eyes alone
            return []
        if self.config.lambda_plan == 0 and self.balance.seen < 200:
            self.balance.observe(
                *(float(mean_over_processes(metrics[name])) for name in ("diffusion", "plan"))
            )
        if self.config.intent != "curriculum" or self.curriculum.switched:
            return []
        if self.curriculum.observe(step, float(mean_over_processes(metrics["accuracy"]))):
            return [f"curriculum: intents from the planner after step {step} ({self.curriculum.reason})"]
        return []

    def progress(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights."""
        return {"curriculum": vars(self.curriculum).copy(), "balance": vars(self.balance).copy()}

    def restore(self, progress: Mapping[str, Any]) -> None:
        self.curriculum = Curriculum(**progress["curriculum"])
        self.balance = _Balance(**progress["balance"])

    # acting

    def look(self, images: list[Tensor], state: Tensor, text: Tensor, refining: bool) -> Tensor:
        """One moment as the planner or the refiner sees it."""
        if refining and self.refiner.encoder is not None:
            return self.refiner.encoder(images, state, text)
        seen = self.planner.encoder(images, state, text)
        return seen if self.waypoint is None else self.waypoint(seen, state)[0]

    @torch.no_grad()
    def plan(self, images: list[Tensor], state: Tensor, text: Tensor) -> Tensor:
        """One moment -> the likeliest bins of the next L steps, [B, L, A]."""
        return self.planner(self.look(images, state, text, refining=False)).argmax(-1)

    @torch.no_grad()
    def refine(
        self, images: list[Tensor], state: Tensor, text: Tensor, bins: Tensor, noise: Tensor
    ) -> Tensor:
        """One moment and H rows of the plan -> normalised action [B, H, A] from `noise` [B, H, A]."""
        c, refiner = self.config, self.refiner
        seen = self.look(images, state, text, refining=True)
        intent = None if c.intent == "none" else refiner.intent(bins)
        additive = c.phi == "additive"
        out = ddim_sample(
            lambda x, time: refiner.denoise(x, time, seen, intent),
            noise,
            self.schedule,
            c.sample_steps,
            c.prediction,
            limit=RESIDUAL_LIMIT if additive else 1.0,
        )
        if additive:
            out = bin_centre(bins, c.bins) + out / c.bins
        return out.clamp(-1, 1)


def sample_bins(logits: Tensor, uniform: Tensor) -> Tensor:
    """Categorical draws [..., A] from logits [..., A, N] by inversion of uniforms [..., A]."""
    rising = logits.float().softmax(-1).cumsum(-1)
    return (uniform[..., None] > rising).sum(-1).clamp(max=logits.shape[-1] - 1)


@dataclass
class _Balance:
    """lambda_plan as the ratio of the losses' EMAs (0.99), frozen after 200 steps [ours]."""

    diffusion: float = 0.0
    plan: float = 0.0
    seen: int = 0
    weight: float = 0.1

    def observe(self, diffusion: float, plan: float) -> None:
        self.seen += 1
        rate = (1 - 0.99) / (1 - 0.99**self.seen)
        self.diffusion += (diffusion - self.diffusion) * rate
        self.plan += (plan - self.plan) * rate
        self.weight = self.diffusion / max(self.plan, 1e-8)


# -- asynchronous execution -------------------------------------------------------------------------------


@dataclass
class IntentBuffer:
    """The queue between planner and refiner: rows in order, L in at a time, H out at a time.

    A row is anything (bins [A], or [B, A] of environments in step). Clear it on reset and when the instruction
    changes: a plan for other words is no plan.
    """

    rows: deque[Any] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self.rows)

    def push(self, plan: Iterable[Any]) -> None:
        """Append a plan's rows, first step first."""
        self.rows.extend(plan)

    def pop(self, count: int) -> list[Any]:
        if len(self.rows) < count:
            raise IndexError(f"{count} steps asked of a buffer of {len(self.rows)}")
        return [self.rows.popleft() for _ in range(count)]

    def clear(self) -> None:
        self.rows.clear()


def latency_per_refinement(plan_ms: float, refine_ms: float, slices: int) -> float:
    """(T_plan + M T_ref) / M: what one chunk of actions costs when a plan serves M of them (App. B.1)."""
    return refine_ms + plan_ms / slices


class LibraPolicy:
    """Libra at work on B environments in step: plan, refine M times, plan again. See `policy.Policy`."""

    def __init__(self, model: Libra, seed: int = 0, refine: bool = True) -> None:
        self.model, self.space, self.refine = model.eval(), model.space, refine
        self.generator, self.words = torch.Generator().manual_seed(seed), words_of(model)
        self.intents, self.actions = IntentBuffer(), deque[np.ndarray]()
        self.clock: dict[str, list[float]] = {"plan": [], "refine": []}
        self._texts: list[str] = []

    def reset(self) -> None:
        """Forget plan and actions: the environments start anew."""
        self.intents.clear()
        self.actions.clear()

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, texts: list[str]) -> np.ndarray:
        """uint8 [B, h, w, 3] per camera, [B, D], B instructions -> native actions [B, A] of the next step."""
        if texts != self._texts:
            self.reset()
            self._texts = list(texts)
        if not self.actions:
            seen = observe(self.space, images, state, texts, self.model.schedule.device, self.words)
            if not self.intents:
                with timed(self.clock["plan"]):
                    self.intents.push(self.model.plan(*seen).unbind(1))
            bins = torch.stack(self.intents.pop(self.model.config.chunk), dim=1)
            with timed(self.clock["refine"]):
                normal = self._refined(seen, bins)
            native = self.space.action.denormalise(normal.float().cpu().numpy())
            self.actions.extend(np.moveaxis(native * self.space.mask, 1, 0))
        return self.actions.popleft()

    def _refined(self, seen: tuple[list[Tensor], Tensor, Tensor], bins: Tensor) -> Tensor:
        if not self.refine:
            return bin_centre(bins, self.model.config.bins)
        noise = torch.randn(bins.shape, generator=self.generator).to(bins.device)
        return self.model.refine(*seen, bins, noise)


# -- how `train` and `evaluate` know it -------------------------------------------------------------------


def _spec(config: Config, space: Space, facts: Mapping[str, Any]) -> StreamSpec:
    """M observed frames H apart (frame 0 plans, each may refine), L actions; more of both for the waypoint."""
    at, actions = {}, config.plan_steps
    if seeks_waypoints(config) and space.cameras:
        at = {STATE: states_shown(config)}
        actions = max(actions, config.waypoint + 1)
    size = (config.image_size, config.image_size)
    return StreamSpec(
        columns=(STATE,),
        cameras=space.cameras,
        offsets=observed(config),
        at=at,
        chunks={"action": actions},
        size=size,
    )


def _phases(config: Config, steps: int) -> list[Phase]:
    looking = round(config.look_share * steps) if seeks_waypoints(config) else 0
    train = Phase("train", steps - looking)
    return [Phase("look", looking, config.look_lr), train] if looking else [train]


RECIPE = Recipe(
    name="libra",
    config=Config,
    targets=lambda config: ([f"tokens:N={config.bins}"], config.plan_steps),
    spec=_spec,
    build=lambda config, space, facts: Libra(config, space),
    phases=_phases,
    policy=LibraPolicy,
    steps=1700,  # with the options below, some five minutes of one core
    options=Options(lr=2e-3, ema=0.995),
)
