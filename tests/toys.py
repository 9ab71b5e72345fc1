"""Low-dimensional worlds on which a recipe's idea must show within seconds: spaces, samples, a short training."""

import numpy as np
import torch
from dpipe.schemas.normalisers import Normaliser
from dpipe.trainer.draws import Draws
from dpipe.trainer.loop import Phase, learning_rate, parameter_groups
from dpipe.trainer.memory import MemoryBatches
from dpipe.trainer.space import Space, to_tensors


def toy_space(state_dim: int = 3, action_dim: int = 2, grippers: int = 0) -> Space:
    """No camera, actions in [-1, 1] as they are; the last dimensions are grippers."""
    zeros = (0.0,) * action_dim
    native = Normaliser("identity", zeros, zeros, ("scaled",) * action_dim, (False,) * action_dim, 0.0, None)
    names = [f"x{i}" for i in range(action_dim - grippers)] + [f"gripper{i}" for i in range(grippers)]
    return Space((), (0.0,) * state_dim, (1.0,) * state_dim, native, fps=20, action_names=tuple(names))


def train_phase(
    model, phase: Phase, columns: dict, seed: int = 0, batch: int = 64, lr: float = 2e-3
) -> list[str]:
    """One phase of a recipe's objective on rows in memory; the lines it said."""
    torch.set_num_threads(1)
    model.begin(phase)
    rate = phase.lr or lr
    optimiser = torch.optim.AdamW(parameter_groups(model, rate, 0.01), betas=(0.9, 0.95), fused=True)
    batches, news = MemoryBatches(columns, batch, seed), []
    model.train()
    for step in range(phase.steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * group["rate"] * learning_rate(step, phase.steps, 0.05, "cosine")
        loss, metrics = model(
            to_tensors(next(batches), model.space, "cpu"), Draws.of_step(seed, 0, step, batch)
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        news += model.advance(step + 1, metrics)
    model.eval()
    return news


def smooth_actions(state: np.ndarray, steps: int, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """[B, 3] -> [B, steps, 2]: a curved function of the state, later steps further along it."""
    phase = np.arange(steps) * 0.3
    clean = np.stack(
        [0.2 + 0.5 * np.sin(2 * state[:, :1] + phase) ** 2, 0.7 * np.cos(2 * state[:, 1:2] + phase)], -1
    )
    return np.clip(clean + np.random.default_rng(seed).normal(0, noise, clean.shape), -1, 1).astype(
        np.float32
    )
