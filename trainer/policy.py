"""Policies at work: what `evaluate` and the LeRobot export ask of a trained recipe."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..models.blocks import text_ids
from .space import Space


class Policy(Protocol):
    """B environments that are reset together and stepped together (B = 1 on a robot).

    `clock` holds the milliseconds of every call of each part ("plan", "refine", ...), for the latency table.
    """

    space: Space
    clock: dict[str, list[float]]

    def reset(self) -> None: ...

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, texts: list[str]) -> np.ndarray:
        """uint8 [B, h, w, 3] per camera, [B, D], B instructions -> native actions [B, A] of the next step."""
        ...


def observe(
    space: Space,
    images: Mapping[str, np.ndarray],
    state: np.ndarray,
    texts: list[str],
    device: torch.device | str,
    words: Callable[[Sequence[str]], Tensor] = text_ids,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """What encoders take: images in the space's order, state float32, `words` as the model reads them."""
    frames = [torch.from_numpy(np.ascontiguousarray(images[camera])).to(device) for camera in space.cameras]
    robot = torch.from_numpy(np.asarray(state, dtype=np.float32)).to(device)
    return frames, robot, words(texts).to(device)


@contextmanager
def timed(record: list[float]) -> Iterator[None]:
    """Append the milliseconds of the block to `record`."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    record.append((time.perf_counter() - begin) * 1000)
