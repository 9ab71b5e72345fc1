"""PFD: what a flow policy would do if it saw the future, distilled into an adapter that sees none of it.

flow      the base (`dpipe train flow`): a flow policy whose action tokens see the noised future in half of the
          samples. In the published setup the action expert is trained without it, so the teacher's mask is off
          its distribution; masking at random makes both branches honest [ours]
pfd       the adapter, on the cached velocities of the frozen base: v = v_base + g(v_base, u), g three layers
          whose last starts at zero, per action token
Loss      1.0 L_gt + 0.5 L_res + 0.1 L_teacher:  w(u) |v - (eps - a)|^2, |g - r|^2, |v - v_teacher|^2. The last
          two are always the same number: v - v_teacher = g - r
Controls  `shuffled` distils another sample's residual, always the same other one; `gt-only` spends the same steps
          on L_gt alone. They are part of the recipe: for an ideal base E[r | present] = 0, and most apparent gain
          of L_gt is more training

Source    PFD (arXiv 2604.25859), code 338f00b, regime s1; `inputs = v,t,obs` (the present and x as well) and the
          exact bell of w are ours.
Legend    B batch, k draws, K chunk, A action dimensions.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models.blocks import sinusoids
from ..models.diffusion import shifted_sigma
from ..models.flow_policy import EmbeddedFlow, FlowConfig, FlowPolicy, open_base, save_flow
from ..schemas.errors import DataError, unknown_name
from ..schemas.noise import flow_noise
from ..streams.stream import StreamSpec
from .draws import Draws
from .loop import Objective, Options, Phase
from .losses import masked_mean, valid_steps
from .policy import observe, timed
from .recipe import Recipe, TargetFolder
from .space import STATE, Space

CONTROLS = ("none", "shuffled", "gt-only")


def bell(u: Tensor) -> Tensor:
    """w(u): a Gaussian about 0.5 let down to 0 at both ends, of mean 1 over u in [0, 1] [ours]."""
    return (torch.exp(-2 * (u - 0.5) ** 2) - 0.606531) / 0.249093


# -- the base ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlowOptions:
    chunk: int = 16
    future: tuple[int, ...] = (8, 16)  # frames ahead the teacher sees
    peek: float = 0.5  # share of samples that see the future
    video_weight: float = 0.1
    width: int = 128
    layers: int = 2
    heads: int = 4
    vision: str = "conv"  # conv | vit
    image_size: int = 64
    points: int = 8
    sample_steps: int = 8
    execute: int = 8


class FlowBase(Objective):
    """The base policy and its loss."""

    def __init__(self, config: FlowOptions, space: Space, latents: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.config, self.space = config, space
        shared = ("chunk", "future", "width", "layers", "heads", "vision", "image_size", "points")
        self.network = FlowPolicy(
            FlowConfig(
                cameras=space.cameras,
                state_mean=space.state_mean,
                state_std=space.state_std,
                action_dim=space.action_dim,
                latents=latents,
                **{name: getattr(config, name) for name in shared},
            )
        )

    def forward(self, batch: Mapping[str, Any], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch` with the frame t and, after it, the future frames (or `latents` [B, M, c])."""
        network, action = self.network, batch["action"]
        images = [frames[:, 0] for frames in batch["images"]]
        seen = network.encoder(images, batch["state"][:, 0], batch["text"])
        raw = (
            batch["latents"]
            if "latents" in batch
            else network.latents_of([f[:, 1:] for f in batch["images"]])
        )
        latents = network.standardise(raw)
        u, video_u = draws.uniform(), draws.uniform()
        noise, video_noise = draws.normal(*action.shape[1:]), draws.normal(*latents.shape[1:])
        level, video_level = (shifted_sigma(t)[:, None, None] for t in (u, video_u))
        visible = draws.uniform() < self.config.peek
        noisy = (1 - level) * action + level * noise
        blurred = (1 - video_level) * latents + video_level * video_noise
        velocity, video = network(seen, noisy, u, blurred, video_u, visible)
        valid = valid_steps(batch["is_pad"], batch["dims"])
        error = (velocity.float() - (noise - action)) ** 2
        flow = masked_mean(error, valid)
        shown = (video.float() - (video_noise - latents)).square().mean()
        told = {"flow": flow, "video": shown}
        return flow + self.config.video_weight * shown, {name: value.detach() for name, value in told.items()}


# -- the adapter ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    inputs: str = "v,t"  # v,t (code) | v,t,obs (ours)
    control: str = "none"  # none | shuffled | gt-only
    width: int = 512
    time_width: int = 256
    lambda_gt: float = 1.0
    lambda_residual: float = 0.5
    lambda_teacher: float = 0.1
    sample_steps: int = 8
    execute: int = 8

    def __post_init__(self) -> None:
        for name, known in {"inputs": ("v,t", "v,t,obs"), "control": CONTROLS}.items():
            if getattr(self, name) not in known:
                raise unknown_name(f"pfd {name}", getattr(self, name), known)


class Adapter(nn.Module):
    """g: velocity [B, K, A], time [B] (and what the present looks like [B, d], and x) -> correction [B, K, A]."""

    def __init__(self, config: Config, action_dim: int, seen_width: int) -> None:
        super().__init__()
        self.time_width, self.observant = config.time_width, config.inputs == "v,t,obs"
        inner = action_dim + config.time_width + (seen_width + action_dim if self.observant else 0)
        self.layers = nn.Sequential(
            nn.Linear(inner, config.width), nn.SiLU(), nn.Linear(config.width, config.width), nn.SiLU()
        )
        self.last = nn.Linear(config.width, action_dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(
        self, velocity: Tensor, u: Tensor, seen: Tensor | None = None, x: Tensor | None = None
    ) -> Tensor:
        steps = velocity.shape[1]
        parts = [velocity, sinusoids(u * 1000, self.time_width)[:, None].expand(-1, steps, -1)]
        if self.observant:
            assert seen is not None and x is not None
            parts += [seen[:, None].expand(-1, steps, -1), x]
        return self.last(self.layers(torch.cat(parts, dim=-1)))


class Pfd(Objective):
    """The frozen base and its adapter. `facts`: where the base is, and its sizes."""

    def __init__(self, config: Config, space: Space, facts: Mapping[str, Any]) -> None:
        super().__init__()
        self.config, self.space, self.facts = config, space, facts
        self.base = FlowPolicy(FlowConfig.from_json(facts["base"]))
        self.adapter = Adapter(config, space.action_dim, facts["base"]["width"])

    def begin(self, phase: Phase) -> None:
        self.base.requires_grad_(False)

    def forward(self, batch: Mapping[str, Any], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch` with `privileged_seed`, `_t_act` [B, k], `_v_base`, `_resid` [B, k, K, A], `_is_pad` [B, K]."""
        c, action = self.config, batch["action"]
        count = batch["privileged_t_act"].shape[1]
        seeds = batch["privileged_seed"].cpu().numpy().astype(np.uint64)
        noise = torch.from_numpy(flow_noise(seeds, *action.shape[1:])).to(action.device).flatten(0, 1)
        u = batch["privileged_t_act"].flatten()
        base, residual = batch["privileged_v_base"].flatten(0, 1), batch["privileged_resid"]
        residual = residual.flatten(0, 1)
        clean = action.repeat_interleave(count, 0)
        seen, x = self._seen(batch, count, clean, noise, u)
        correction = self.adapter(base, u, seen, x)
        is_pad = batch["is_pad"] | batch["privileged_is_pad"]
        valid = valid_steps(is_pad, batch["dims"]).expand_as(action).repeat_interleave(count, 0)
        final = base + correction
        truth = masked_mean(bell(u)[:, None, None] * (final - (noise - clean)) ** 2, valid)
        distilled = masked_mean((correction - residual) ** 2, valid)
        taught = masked_mean((final - (base + residual)) ** 2, valid)
        loss = c.lambda_gt * truth
        if c.control != "gt-only":
            loss = loss + c.lambda_residual * distilled + c.lambda_teacher * taught
        # About the mean: shuffling keeps the residual's mean, so explaining that is no evidence of a future.
        spread = masked_mean((residual - residual.mean(dim=0)) ** 2, valid)
        told = {"gt": truth, "residual": distilled, "teacher": taught, "explained": 1 - distilled / spread}
        return loss, {name: value.detach() for name, value in told.items()}

    def _seen(
        self, batch: Mapping[str, Any], count: int, clean: Tensor, noise: Tensor, u: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The present's mean token [B k, d] and x [B k, K, A], where the adapter reads them."""
        if not self.adapter.observant:
            return None, None
        with torch.no_grad():
            images = [frames[:, 0] for frames in batch["images"]]
            seen = self.base.encoder(images, batch["state"][:, 0], batch["text"]).mean(dim=1)
        level = shifted_sigma(u)[:, None, None]
        return seen.repeat_interleave(count, 0), (1 - level) * clean + level * noise


# -- at work ----------------------------------------------------------------------------------------------


class FlowActor:
    """Euler steps from noise to action, with or without the adapter; the future is never seen here."""

    def __init__(self, model: "FlowBase | Pfd", seed: int = 0, adapt: bool = True) -> None:
        self.model, self.space = model.eval(), model.space
        self.network = model.base if isinstance(model, Pfd) else model.network
        self.adapter = model.adapter if isinstance(model, Pfd) and adapt else None
        self.generator = torch.Generator().manual_seed(seed)
        self.clock: dict[str, list[float]] = {"flow": []}
        self.actions = deque[np.ndarray]()

    def reset(self) -> None:
        self.actions.clear()

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, texts: list[str]) -> np.ndarray:
        if not self.actions:
            seen = observe(self.space, images, state, texts, self.network.steps.device)
            with timed(self.clock["flow"]):
                normal = self.sample(*seen)[:, : self.model.config.execute]
            native = self.space.action.denormalise(normal.float().cpu().numpy()) * self.space.mask
            self.actions.extend(np.moveaxis(native, 1, 0))
        return self.actions.popleft()

    @torch.no_grad()
    def sample(self, images: list[Tensor], state: Tensor, text: Tensor) -> Tensor:
        """[B, K, A] normalised."""
        network, rows = self.network, len(state)
        seen = network.encoder(images, state, text)
        chunk, dims = network.config.chunk, network.config.action_dim
        x = torch.randn(rows, chunk, dims, generator=self.generator).to(state.device)
        blank = state.new_zeros(rows, *network.config.latent_shape)
        hidden = torch.zeros(rows, dtype=torch.bool, device=state.device)
        times = torch.linspace(1, 0, self.model.config.sample_steps + 1, device=state.device)
        levels = shifted_sigma(times)
        for i in range(self.model.config.sample_steps):
            u = times[i].expand(rows)
            velocity, _ = network(seen, x, u, blank, torch.ones_like(u), hidden)
            if self.adapter is not None:
                velocity = velocity + self.adapter(velocity, u, seen.mean(dim=1), x)
            x = x + (levels[i + 1] - levels[i]) * velocity
        return x.clamp(-1, 1)


def other_rows(index: np.ndarray, total: int) -> np.ndarray:
    """The row whose future each row is given in the control: half the dataset away, the same every time."""
    return (index + total // 2) % total


def _join(config: Config, targets: Any, index: np.ndarray) -> dict[str, Any]:
    """The cache's rows; in the shuffled control the residual is another row's, and all else the sample's own."""
    found = targets.take(index=index)
    if config.control == "shuffled":
        other = targets.take(index=other_rows(index, sum(targets.table.lengths)))
        found["privileged_resid"] = other["privileged_resid"]
    return found


# -- how `train` and `evaluate` know them -----------------------------------------------------------------


def _flow_spec(config: FlowOptions, space: Space, facts: Mapping[str, Any]) -> StreamSpec:
    size = (config.image_size, config.image_size)
    return StreamSpec(
        columns=(STATE,),
        cameras=space.cameras,
        at=dict.fromkeys(space.cameras, (0, *config.future)),
        chunks={"action": config.chunk},
        size=size,
    )


def _export(model: FlowBase, run_dir: Path, terms: Mapping[str, Any]) -> None:
    training = {
        "steps": terms["steps"],
        "seed": terms["options"]["seed"],
        "options": terms["options"],
        "peek": model.config.peek,
        "threads": torch.get_num_threads(),
        "dataset": terms["dataset"]["digest"],
        "split": terms["split"],
    }
    save_flow(run_dir / "policy", model.network, model.space.action, training)


FLOW = Recipe(
    name="flow",
    config=FlowOptions,
    targets=lambda config: ([], 0),
    spec=_flow_spec,
    build=lambda config, space, facts: FlowBase(config, space),
    phases=lambda config, steps: [Phase("train", steps)],
    policy=FlowActor,
    options=Options(lr=1e-3),
    finish=_export,
)


def _base(target: TargetFolder) -> EmbeddedFlow:
    base = open_base(target.contract.model)
    if base.describe()["weights"] != target.contract.weights:
        raise DataError(
            f"the base in {target.contract.model} is not the one the cache was made with\n"
            f"  expected weights {target.contract.weights}, found {base.describe()['weights']}\n"
            "  Put the old one back, or cache again:  dpipe precompute privileged --name NEW"
        )
    return base


def _start(model: Pfd, targets: Mapping[str, TargetFolder]) -> None:
    model.base.load_state_dict(_base(targets["privileged"]).network.state_dict())


def _spec(config: Config, space: Space, facts: Mapping[str, Any]) -> StreamSpec:
    side = facts["base"]["image_size"]
    # Without `obs` the adapter needs no pixel: the cache and the actions are all it sees.
    cameras = space.cameras if config.inputs == "v,t,obs" else ()
    return StreamSpec(
        columns=(STATE,), cameras=cameras, chunks={"action": facts["base"]["chunk"]}, size=(side, side)
    )


RECIPE = Recipe(
    name="pfd",
    config=Config,
    targets=lambda config: (["privileged"], 0),
    spec=_spec,
    build=Pfd,
    phases=lambda config, steps: [Phase("distil", steps)],
    policy=FlowActor,
    options=Options(lr=1e-3),
    facts=lambda config, targets: {"base": asdict(_base(targets["privileged"]).config)},
    start=_start,
    join=_join,
)
