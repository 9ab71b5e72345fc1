"""Diffusion and flow matching, as formulas: what is added to an action, what is predicted, how it is sampled.

Diffusion (Libra)   x_k = sqrt(abar_k) a + sqrt(1 - abar_k) eps, cosine schedule (Nichol and Dhariwal, 2021),
                    the network predicts eps or a; sampled by DDIM (Song et al., 2021) without added noise.
Flow (DIAL)         x = tau a + (1 - tau) eps, target a - eps, tau = 1 is data; Euler from tau = 0.
                    LeRobot's pi0 and smolvla run time the other way (t = 1 is noise, target eps - a).
Flow (PFD)          x = (1 - sigma) a + sigma eps, target eps - a, sigma = 5 u / (1 + 4 u), u uniform.

Legend: B batch, H steps, A action dimensions; times are [B].
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (noisy [B, H, A], time [B] in [0, 1]) -> prediction [B, H, A]


def cosine_schedule(levels: int) -> Tensor:
    """[levels] float32: abar_k falling from nearly 1 to nearly 0; a step's beta is at most 0.999."""
    at = torch.arange(levels + 1, dtype=torch.float64) / levels
    bar = torch.cos((at + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - beta, dim=0).float()


def diffuse(clean: Tensor, noise: Tensor, kept: Tensor) -> Tensor:
    """The noisy action at abar = `kept` [B]."""
    kept = kept.view(-1, *[1] * (clean.ndim - 1))
    return kept.sqrt() * clean + (1 - kept).sqrt() * noise


def ddim_sample(
    denoise: Denoiser, noise: Tensor, schedule: Tensor, steps: int, prediction: str, limit: float = 1.0
) -> Tensor:
    """Noise [B, H, A] -> action. The clean estimate is clipped to +-`limit` at each of `steps` steps: the first
    is a small difference of large numbers divided by a still smaller one.
    """
    levels = torch.linspace(len(schedule) - 1, 0, steps, device=noise.device).round().long()
    x, clean = noise, noise
    for i, level in enumerate(levels):
        kept = schedule[level]
        out = denoise(x, (level.float() / len(schedule)).expand(len(x)))
        clean = out if prediction == "sample" else (x - (1 - kept).sqrt() * out) / kept.sqrt()
        clean = clean.clamp(-limit, limit)
        if i + 1 < steps:
            eps = (x - kept.sqrt() * clean) / (1 - kept).sqrt()
            after = schedule[levels[i + 1]]
            x = after.sqrt() * clean + (1 - after).sqrt() * eps
    return clean


def flow_point(clean: Tensor, noise: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """(x at time tau [B], the velocity towards the data a - eps)."""
    tau = tau.view(-1, *[1] * (clean.ndim - 1))
    return tau * clean + (1 - tau) * noise, clean - noise


def beta15_times(uniform: Tensor) -> Tensor:
    """tau = (s - b) / s, b ~ Beta(1.5, 1), s = 0.999, from uniforms: DIAL's code, which favours noisy times.

    Beta(1.5, 1) has distribution function b^1.5; the draw is cut at s so that tau stays in [0, 1].
    """
    s = 0.999
    return (s - uniform.clamp(0, 1) ** (1 / 1.5)).clamp(min=0) / s


def euler_sample(velocity: Denoiser, noise: Tensor, steps: int) -> Tensor:
    """Noise at tau = 0 -> action at tau = 1 in `steps` equal steps."""
    x = noise
    for i in range(steps):
        x = x + velocity(x, torch.full((len(x),), i / steps, device=x.device)) / steps
    return x


def shifted_sigma(uniform: Tensor, shift: float = 5.0) -> Tensor:
    """PFD's noise level: sigma = s u / (1 + (s - 1) u); u = 0.5 gives 2.5 / 3."""
    return shift * uniform / (1 + (shift - 1) * uniform)
