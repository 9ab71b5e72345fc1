"""Means over what counts: padded steps and absent dimensions never weigh in."""

import torch
import torch.distributed as dist
from torch import Tensor


def masked_mean(loss: Tensor, valid: Tensor) -> Tensor:
    """sum(loss * valid) / max(1, sum(valid)); `valid` broadcasts to the shape of `loss`.

    On several processes the divisor is the global count over the number of processes, so that the gradients'
    average is that of one process with the whole batch, whatever padding each happened to get.
    """
    weight = valid.to(loss.dtype).expand_as(loss)
    count = weight.sum()
    if dist.is_available() and dist.is_initialized():
        count = count.detach().clone()
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return (loss * weight).sum() / count.clamp(min=1)


def mean_over_processes(value: Tensor) -> Tensor:
    """A metric's mean over processes, the same number on each."""
    if dist.is_available() and dist.is_initialized():
        value = value.detach().clone()
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


def valid_steps(is_pad: Tensor, dims: Tensor | None = None) -> Tensor:
    """is_pad [B, H] and an optional mask of dimensions [A] or [B, A] -> valid [B, H, A or 1]."""
    steps = ~is_pad.bool()[..., None]
    if dims is None:
        return steps
    return steps & (dims.bool() if dims.ndim == 1 else dims.bool()[:, None])


def accuracy(predicted: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """Share of valid labels predicted."""
    with torch.no_grad():
        return masked_mean((predicted == labels).float(), valid)
