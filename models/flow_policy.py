"""The embedded flow policy of PFD: one network, two masks. The teacher's action tokens may look at the future.

    base      action tokens see action tokens and the present
    teacher   the same, and the (noised) latents of frames to come

Same weights, same noisy action, same noisy latents, same times: only the mask differs. Latents are the embedded
tower's cosines (`dct.py`) of each future frame, pooled to 4 x 4 places and standardised; their noise is a
function of a seed, so a cache made twice is the same cache.

Velocity  x = (1 - sigma) a + sigma eps, predicted eps - a, sigma = 5 u / (1 + 4 u), u in [0, 1]
Source    PFD (arXiv 2604.25859), released code 338f00b: the joint masks and the shifted noise level.
Legend    B batch, F future frames, M latents, c channels of one, K chunk, A action dimensions, d width.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor, nn

from ..schemas.errors import UsageError
from ..schemas.noise import NoisyChunks, flow_noise
from ..schemas.normalisers import Normaliser
from .blocks import Block, ObservationEncoder, TimeEmbedding, text_ids, to_pixels
from .dct import GRID, DctTower
from .diffusion import shifted_sigma
from .policy_folder import read_folder, write_folder

FLOW_VERSION = 1
LATENT_GRID = 4
STANDARDISED_AFTER = 50  # steps whose latents set mean and deviation, then fixed


@dataclass(frozen=True)
class FlowConfig:
    """Sizes, and all a folder needs beside weights. `latents` overrides (M, c) where there is no camera."""

    cameras: tuple[str, ...]
    state_mean: tuple[float, ...]
    state_std: tuple[float, ...]
    action_dim: int
    chunk: int = 16
    future: tuple[int, ...] = (8, 16)
    width: int = 128
    layers: int = 2
    heads: int = 4
    vision: str = "conv"
    image_size: int = 64
    points: int = 8
    latents: tuple[int, ...] = ()

    @property
    def latent_shape(self) -> tuple[int, int]:
        if self.latents:
            return self.latents[0], self.latents[1]
        return len(self.future) * len(self.cameras) * LATENT_GRID**2, DctTower().width

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "FlowConfig":
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in told.items()}
        return cls(**fields)


class FlowPolicy(nn.Module):
    """Velocity of the action, with the future visible or not."""

    latent_mean: Tensor
    latent_var: Tensor
    counted: Tensor

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = c = config
        count, channels = c.latent_shape
        self.encoder = ObservationEncoder(
            c.cameras, c.state_mean, c.state_std, c.width, c.vision, c.image_size, c.points
        )
        self.enter = nn.Linear(c.action_dim, c.width)
        self.steps = nn.Parameter(torch.randn(c.chunk, c.width) * 0.02)
        self.enter_latent = nn.Linear(channels, c.width)
        self.places = nn.Parameter(torch.randn(count, c.width) * 0.02)
        self.time, self.video_time = TimeEmbedding(c.width), TimeEmbedding(c.width)
        self.blocks = nn.ModuleList(Block(c.width, c.heads) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width)
        self.leave, self.leave_latent = nn.Linear(c.width, c.action_dim), nn.Linear(c.width, channels)
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_var", torch.ones(channels))
        self.register_buffer("counted", torch.zeros((), dtype=torch.int64))

    def latents_of(self, future: Sequence[Tensor]) -> Tensor:
        """uint8 [B, F, h, w, 3] per camera -> raw latents [B, M, c]: cosines of each frame, pooled to 4 x 4."""
        found = []
        for frames in future:
            pixels = to_pixels(frames.flatten(0, 1), self.config.image_size).permute(0, 2, 3, 1)
            images = ((pixels + 0.5) * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
            features = torch.from_numpy(DctTower().encode(images)[0]).to(self.steps.device)
            k = GRID // LATENT_GRID
            pooled = features.view(len(images), LATENT_GRID, k, LATENT_GRID, k, -1).mean(dim=(2, 4))
            found.append(pooled.reshape(len(frames), -1, pooled.shape[-1]))
        return torch.cat(found, dim=1)

    def standardise(self, latents: Tensor) -> Tensor:
        """Raw latents -> mean 0, deviation 1 by channel; the first steps of training settle the two."""
        if self.training and int(self.counted) < STANDARDISED_AFTER:
            self.counted += 1
            flat = latents.detach().flatten(0, -2)
            self.latent_mean.lerp_(flat.mean(0), 1 / float(self.counted))
            self.latent_var.lerp_(flat.var(0), 1 / float(self.counted))
        return (latents - self.latent_mean) / self.latent_var.sqrt().clamp(min=1e-6)

    def forward(
        self, seen: Tensor, noisy: Tensor, u: Tensor, latents: Tensor, video_u: Tensor, visible: Tensor
    ) -> tuple[Tensor, Tensor]:
        """seen [B, n, d], x [B, K, A], u [B], noisy latents [B, M, c], u [B], visible [B] bool
        -> velocity of the action [B, K, A] and of the latents [B, M, c]."""
        actions = self.enter(noisy) + self.steps + self.time(u)[:, None]
        future = self.enter_latent(latents) + self.places + self.video_time(video_u)[:, None]
        tokens = torch.cat([actions, seen, future], dim=1)
        mask = joint_mask(actions.shape[1], seen.shape[1], future.shape[1], visible)
        for block in self.blocks:
            tokens = block(tokens, mask)
        tokens = self.norm(tokens)
        count = actions.shape[1]
        return self.leave(tokens[:, :count]), self.leave_latent(tokens[:, count + seen.shape[1] :])


def joint_mask(actions: int, seen: int, future: int, visible: Tensor) -> Tensor:
    """Who may look at whom, bool [B, 1, n, n], tokens in the order action, present, future.

    The present sees itself; the future sees itself and the present; actions see actions and the present, and
    the future where `visible` [B]. Nothing but actions sees actions, so the branches share all but the actions.
    """
    kind = torch.cat([torch.full((n,), i) for i, n in enumerate((actions, seen, future))]).to(visible.device)
    of, at = kind[:, None], kind[None, :]
    always = ((of == 0) & (at <= 1)) | ((of == 1) & (at == 1)) | ((of == 2) & (at >= 1))
    peeking = (of == 0) & (at == 2)
    return (always | (peeking & visible[:, None, None]))[:, None]


class EmbeddedFlow:
    """A folder of weights, opened: what the privileged stage runs (`stages.privileged.PrivilegedBase`)."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        stored = read_folder(folder, "flow", FLOW_VERSION, "flow")
        self.config = FlowConfig.from_json(stored.config)
        self.network = FlowPolicy(self.config)
        self.network.load_state_dict(stored.weights)
        self.network.to(device).eval().requires_grad_(False)
        self.action, self._training, self._weights = stored.action, stored.training, stored.digest
        self.cameras, self.chunk, self.future = self.config.cameras, self.config.chunk, self.config.future
        self.frame_size: tuple[int, int] | None = (self.config.image_size, self.config.image_size)
        self._device = device

    @property
    def digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(json.dumps(self.describe(), sort_keys=True).encode())

    def describe(self) -> dict[str, Any]:
        return {
            "policy": "embedded flow",
            **asdict(self.config),
            "weights": self._weights,
            "action_normaliser": self.action.digest,
            "training": self._training,
        }

    def velocities(
        self,
        images: Mapping[str, NDArray[np.uint8]],
        future: Mapping[str, NDArray[np.uint8]],
        state: NDArray[Any],
        texts: Sequence[str],
        noisy: NoisyChunks,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See `PrivilegedBase`: v_base and v_teacher, each [B, k, K, A]; a frame is encoded once for all draws."""
        network, device = self.network, self._device

        def tensor(values: NDArray[Any]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device)

        with torch.inference_mode():
            frames = [tensor(images[camera]) for camera in self.cameras]
            robot = tensor(np.asarray(state, dtype=np.float32))
            seen = network.encoder(frames, robot, text_ids(texts).to(device))
            raw = network.standardise(network.latents_of([tensor(future[camera]) for camera in self.cameras]))
            batch, draws = noisy.u.shape
            noise = tensor(flow_noise(noisy.video_seed.reshape(-1), *self.config.latent_shape))
            video_u = tensor(noisy.video_u.reshape(-1))
            level = shifted_sigma(video_u)[:, None, None]
            latents = (1 - level) * raw.repeat_interleave(draws, 0) + level * noise
            x, u = tensor(noisy.x.reshape(batch * draws, *noisy.x.shape[2:])), tensor(noisy.u.reshape(-1))
            args = seen.repeat_interleave(draws, 0), x, u, latents, video_u
            visible = torch.zeros(batch * draws, dtype=torch.bool, device=device)
            base, _ = network(*args, visible)
            teacher, _ = network(*args, ~visible)
        shape = noisy.x.shape
        return base.float().cpu().numpy().reshape(shape), teacher.float().cpu().numpy().reshape(shape)


def save_flow(folder: Path, network: FlowPolicy, action: Normaliser, training: Mapping[str, Any]) -> None:
    """Write a folder that `open_base` reads."""
    write_folder(folder, "flow", FLOW_VERSION, network, network.config, action, training)


def open_base(spec: str, device: str = "cpu") -> EmbeddedFlow:
    """`embedded:<folder>`: LeRobot has no policy trained with a visible future."""
    kind, _, rest = spec.partition(":")
    if kind == "embedded" and rest:
        return EmbeddedFlow(Path(rest), device)
    raise UsageError(f"unknown base policy '{spec}'\n  known: embedded:<folder>, made by  dpipe train flow")
