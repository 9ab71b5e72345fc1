"""privileged: what a flow policy would say if it saw the future. What PFD's adapter learns (frozen base).

    seed             [T, k] uint64        the noise of each draw, by `schemas/noise.py`: kept instead of it
    t_act, t_vid     [T, k] float32       times u in [0, 1): the action's, one in each k-th, and the video's
    v_base           [T, k, H, A] float16 velocity seen from the present
    resid            [T, k, H, A] float16 v_teacher - v_base: the same with (noised) future frames visible
    is_pad           [T, H] bool

The same noisy action, video noise and times go into both branches; only the mask differs. Training an adapter
on this cache needs neither policy nor frames: x is made again from the action, the seed and t_act.

For ideal predictors E[v_teacher | present] = v_base: the residual is 0 on average and only what an imperfect
base misses can be distilled. Hence the controls of recipe pfd (shuffled future, equal budget).

Source: PFD (arXiv 2604.25859), released code 338f00b, regime `s1`; the draws and their storage are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..schemas.chunks import chunk_index
from ..schemas.contract import FIXED_VIEW, ArraySpec, digest_of
from ..schemas.errors import UsageError
from ..schemas.noise import (
    NoisyChunks,
    flow_noise,
    frame_seeds,
    noised,
    random_bits,
    shifted_sigma,
    stratified,
    uniform,
)
from ..schemas.normalisers import Normaliser
from . import Block, DatasetInfo, DatasetView, EpisodeView, FrameWish, Prepared, Run, Stage, TargetReader
from .actions import STATE
from .frozen import cameras_of, check_weights, checked_float16, short_name
from .windows import finite_state, frame_wishes, window_batches


class PrivilegedBase(Protocol):
    """A frozen flow policy that can look at future frames or not; A action dimensions, normalised."""

    cameras: tuple[str, ...]
    chunk: int
    future: tuple[int, ...]  # frames ahead that the teacher branch sees, rising
    action: Normaliser
    frame_size: tuple[int, int] | None  # what frames may be averaged down to while they are decoded

    @property
    def digest(self) -> str: ...

    def describe(self) -> dict[str, Any]: ...

    def velocities(
        self,
        images: Mapping[str, NDArray[np.uint8]],
        future: Mapping[str, NDArray[np.uint8]],
        state: NDArray[Any],
        texts: Sequence[str],
        noisy: NoisyChunks,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """[B, H, W, 3] and [B, F, H, W, 3] per camera, [B, D] -> v_base, v_teacher, each [B, k, K, A]."""
        ...


@dataclass(frozen=True)
class Params:
    base: str = field(default="", metadata={"help": "embedded:FOLDER, a flow policy trained with the future"})
    draws: int = field(default=8, metadata={"help": "noise draws k per frame"})
    seed: int = field(default=0, metadata={"help": "seed of the draws"})
    column: str = field(default="action", metadata={"help": "which column holds the actions"})
    rename: tuple[str, ...] = field(
        default=(), metadata={"help": "THEIRS=OURS, where the base calls a camera otherwise"}
    )
    device: str = field(default="cpu", metadata={"help": "where the base runs: cpu, cuda", "key": False})
    batch: int = field(default=32, metadata={"help": "frames a forward pass", "key": False})

    def __post_init__(self) -> None:
        if self.draws < 1 or self.batch < 1:
            raise UsageError("--draws and --batch are at least 1")


@dataclass(frozen=True)
class FrameDraws:
    """k draws for each of T frames."""

    seed: NDArray[np.uint64]  # [T, k]
    t_act: NDArray[np.float32]
    t_vid: NDArray[np.float32]
    video_seed: NDArray[np.uint64]


def draws_of(content: str, frames: int, draws: int, seed: int) -> FrameDraws:
    """Seeds and times from the episode's content: the action's times stratified over the draws."""
    own = frame_seeds(content, np.arange(frames), 0, seed)
    bits = random_bits(own, 4)
    seeds = random_bits(bits[:, 0], draws)
    return FrameDraws(
        seeds,
        stratified(bits[:, 1], draws).astype(np.float32),
        uniform(bits[:, 2], draws).astype(np.float32),
        random_bits(bits[:, 3], draws),
    )


def noisy_chunks(
    chunks: NDArray[np.floating], seeds: NDArray[np.uint64], times: NDArray[np.floating]
) -> NDArray[np.float32]:
    """Normalised chunks [B, H, A], seeds and times [B] -> x at those times: the same from cache as when made."""
    return noised(chunks, flow_noise(seeds, *chunks.shape[1:]), shifted_sigma(times))


def make_stage(open_base: Callable[[str, str], PrivilegedBase]) -> Stage:
    """The stage over whatever opens a base by name and device."""

    def opened(params: Params) -> PrivilegedBase:
        if not params.base:
            raise UsageError("no base policy given\n  Name one:  --base embedded:FOLDER")
        return open_base(params.base, params.device)

    def prepare(params: Params, dataset: DatasetView) -> Prepared:
        base = opened(params)
        names, sizes = cameras_of(base, params.rename, dataset.info)
        told = base.describe()
        return Prepared(
            facts={
                "base": told,
                "cameras": list(names),
                "read_sizes": sizes,
                "chunk": base.chunk,
                "future": list(base.future),
                "normaliser": base.action.to_json(),
            },
            contract={
                "model": params.base,
                "weights": str(told.get("weights", base.digest)),
                "layer": "velocity of the action",
                "preprocessing": digest_of([base.digest, sorted(names.items())]),
                "camera": ",".join(names),
                "dtype": "float16",
                "horizon_frames": base.chunk,
                "horizon_seconds": base.chunk / dataset.info.fps,
                "normaliser": base.action.digest,
                "augmentation": FIXED_VIEW,
                "seed": params.seed,
            },
        )

    def open_run(params: Params, info: DatasetInfo, prepared: Prepared) -> Run:
        base = opened(params)
        check_weights(base.describe(), base.digest, prepared.contract["weights"], "base policy")
        names, sizes = cameras_of(base, params.rename, info)

        def run(episode: EpisodeView) -> Iterator[Block]:
            normal = base.action.normalise(episode.columns([params.column])[params.column])
            sound = np.isfinite(normal).all(axis=1).astype(bool)
            index, is_pad = chunk_index(episode.frames, base.chunk)
            chunks = np.where(sound[:, None], normal, 0.0)[index]
            is_pad = is_pad | ~sound[index]
            state, _ = finite_state(episode.columns([STATE])[STATE])
            drawn = draws_of(episode.content, episode.frames, params.draws, params.seed)
            ahead = np.arange(episode.frames)[:, None] + np.array([0, *base.future])
            seen = np.minimum(ahead, episode.frames - 1)
            for chosen, images in window_batches(episode, list(names), seen, params.batch, names, sizes):
                now = {camera: frames[:, 0] for camera, frames in images.items()}
                later = {camera: frames[:, 1:] for camera, frames in images.items()}
                rows = np.arange(chosen.start, chosen.stop)
                x = [
                    noisy_chunks(chunks[rows], drawn.seed[rows, k], drawn.t_act[rows, k])
                    for k in range(params.draws)
                ]
                noisy = NoisyChunks(
                    np.stack(x, axis=1), drawn.t_act[rows], drawn.t_vid[rows], drawn.video_seed[rows]
                )
                texts = [episode.text] * len(rows)
                v_base, v_teacher = base.velocities(now, later, state[rows], texts, noisy)
                yield {
                    "seed": drawn.seed[rows],
                    "t_act": drawn.t_act[rows],
                    "t_vid": drawn.t_vid[rows],
                    "v_base": checked_float16(v_base),
                    "resid": checked_float16(v_teacher - v_base),
                    "is_pad": is_pad[rows],
                }

        return run

    return Stage(
        name="privileged",
        version=2,
        Params=Params,
        summary="what a flow policy would say if it saw the future",
        recipes=("pfd",),
        variant=variant,
        prepare=prepare,
        makes=makes,
        open=open_run,
        report=report,
        uses_model=lambda params: True,
        wishes=wishes,
    )


def variant(params: Params, info: DatasetInfo) -> str:
    return "-".join(filter(None, [short_name(params.base), f"draws{params.draws}"]))


def makes(params: Params, info: DatasetInfo, prepared: Prepared) -> tuple[ArraySpec, ...]:
    chunk, dims, k = int(prepared.facts["chunk"]), len(prepared.facts["normaliser"]["low"]), params.draws
    told = {"mask": "is_pad", "mask_is_pad": True}
    velocity = ("draw", "step", "dim")
    return (
        ArraySpec("seed", (k,), "uint64", ("draw",), told),
        ArraySpec("t_act", (k,), "float32", ("draw",), told),
        ArraySpec("t_vid", (k,), "float32", ("draw",), told),
        ArraySpec("v_base", (k, chunk, dims), "float16", velocity, told),
        ArraySpec("resid", (k, chunk, dims), "float16", velocity, told),
        ArraySpec("is_pad", (chunk,), "bool", ("step",), {"auxiliary": True}),
    )


def wishes(params: Params, info: DatasetInfo, prepared: Prepared) -> tuple[FrameWish, ...]:
    return frame_wishes(prepared.facts["read_sizes"], params.batch)


def report(
    params: Params, dataset: DatasetView, prepared: Prepared, reader: TargetReader, folder: Path
) -> dict[str, Any]:
    """How large the residual is beside the velocity, and how much of it is its mean over a frame's draws."""
    base, rest, mean = [], [], []
    thin = max(1, dataset.info.frames // 4096)
    for position in range(len(dataset)):
        whole = np.flatnonzero(~np.asarray(reader.read(position, "is_pad")).any(axis=1))[::thin]
        residual = np.asarray(reader.read(position, "resid"))[whole].astype(np.float64)
        base.append(
            (np.asarray(reader.read(position, "v_base"))[whole].astype(np.float64) ** 2).mean((1, 2, 3))
        )
        rest.append((residual**2).mean((1, 2, 3)))
        mean.append((residual.mean(axis=1) ** 2).mean((1, 2)))
    if not sum(map(len, rest)):
        return {**prepared.facts, "note": "no whole chunk: every episode is shorter than one"}
    powers = [float(np.concatenate(values).mean()) for values in (base, rest, mean)]
    return {
        **prepared.facts,
        "velocity_power": powers[0],
        "residual_power": powers[1],
        "residual_share": powers[1] / max(powers[0], 1e-12),
        "mean_over_draws_share": powers[2] / max(powers[1], 1e-12),
    }


def _open_embedded(spec: str, device: str) -> PrivilegedBase:
    from ..models.flow_policy import open_base

    return open_base(spec, device)


STAGE = make_stage(_open_embedded)
