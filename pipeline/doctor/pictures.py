"""Decoded pictures: whether a camera saw anything, saw it move when the robot moved, and saw it then.

Frames are thinned as they are decoded (about 48 pixels a side), so that an episode of any length is a small array.
A camera is judged against itself in other episodes: one that looks at a wall is still by nature.

Legend  n frames of a stretch, h x w thinned pixels, S state dimensions
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...schemas.problems import WARN
from .checks import PICTURES, SEEN, Findings, Found, Level, check
from .lags import LagCurve

THIN_SIDE = 48
BLOCK = 32  # frames decoded at a time
ONE_COLOUR = 1.5  # grey levels of standard deviation below which a picture shows nothing
FROZEN_LEVELS = 0.3  # mean difference between two codings of one picture
MOVING_LEVELS = 0.6  # mean difference from frame to frame of a camera that sees something move
STILL_SECONDS = 0.5
LAG_REACH = 10
MOST_MOVING = 8  # state dimensions whose speed is set against the pictures
SHORTEST_CLIP = 40
SHORTEST_STILL = 8  # frames from which a stretch says something about standing still

Reader = Callable[[int, int], NDArray[np.uint8]]  # frames [start, stop) of an episode


@dataclass(frozen=True)
class Clip:
    """Frames [start, start + n) of one camera of one episode, thinned: [n, h, w, 3]."""

    where: str
    number: int
    camera: str
    start: int
    fps: int
    thin: NDArray[np.uint8]
    spread: NDArray[np.float64]  # standard deviation of each whole picture [n]
    state: NDArray[np.float64] | None  # [n, S]
    total_motion: NDArray[np.float64] | None  # reach of each state dimension in the whole episode [S]

    @property
    def place(self) -> str:
        return f"{self.where}, {self.camera}"

    def differences(self) -> NDArray[np.float64]:
        """Mean difference of each frame from the one before [n - 1]."""
        return np.abs(np.diff(self.thin.astype(np.int16), axis=0)).mean(axis=(1, 2, 3))

    def moves(self, first: int, stop: int) -> bool:
        """Whether the state crosses a sixth of what it does in the episode, within these frames."""
        if self.state is None or self.total_motion is None or stop - first < 2:
            return False
        reach = np.ptp(self.state[first:stop], axis=0)
        large = self.total_motion > 1e-3
        return bool((reach[large] > self.total_motion[large] / 6).any())


@dataclass(frozen=True)
class Glimpse:
    """What is kept of a clip once it has been looked at: a video of any length in some 30 kB."""

    where: str
    number: int
    camera: str
    start: int
    frames: int
    numbers: str  # digest of the state in these frames: equal numbers may well show equal pictures
    blank: bool
    moving: bool  # the state moves throughout
    frozen: bool  # the picture never changes
    energy: float  # mean difference from frame to frame
    curve: LagCurve | None
    pixels: str  # digest of every thinned frame
    samples: NDArray[np.uint8]  # first, middle and last thinned frame

    @property
    def place(self) -> str:
        return f"{self.where}, {self.camera}"


@dataclass
class Seen:
    """What was seen of every camera, to be judged together."""

    glimpses: dict[str, list[Glimpse]] = field(default_factory=dict)

    def add(self, clip: Clip) -> None:
        import xxhash

        differences, last = clip.differences(), len(clip.thin) - 1
        glimpse = Glimpse(
            where=clip.where,
            number=clip.number,
            camera=clip.camera,
            start=clip.start,
            frames=len(clip.thin),
            numbers="" if clip.state is None else xxhash.xxh3_128_hexdigest(np.ascontiguousarray(clip.state)),
            blank=bool(clip.spread.max() < ONE_COLOUR),
            moving=clip.moves(0, len(clip.thin)),
            frozen=_unchanged(clip),
            energy=float(differences.mean()) if len(differences) else 0.0,
            curve=motion_curve(clip),
            pixels=xxhash.xxh3_128_hexdigest(np.ascontiguousarray(clip.thin)),
            samples=clip.thin[[0, last // 2, last]].copy(),
        )
        self.glimpses.setdefault(clip.camera, []).append(glimpse)


def watch(
    read: Reader,
    span: range,
    where: str,
    number: int,
    camera: str,
    fps: int,
    state: NDArray[np.float64] | None,
) -> Clip:
    """Decode frames `span` of one camera, block by block, and keep them thinned."""
    thin, spread = [], []
    for start in range(span.start, span.stop, BLOCK):
        frames = read(start, min(start + BLOCK, span.stop))
        step = max(1, round(min(frames.shape[1:3]) / THIN_SIDE))
        few = frames[:, ::step, ::step]
        thin.append(np.ascontiguousarray(few))
        spread.append(few.reshape(len(few), -1).astype(np.float32).std(axis=1))
    inside = state is not None and len(state) >= span.stop
    return Clip(
        where=where,
        number=number,
        camera=camera,
        start=span.start,
        fps=fps,
        thin=np.concatenate(thin),
        spread=np.concatenate(spread).astype(np.float64),
        state=state[span.start : span.stop] if state is not None and inside else None,
        total_motion=np.ptp(state, axis=0) if state is not None and inside else None,
    )


def choose_spans(
    lengths: NDArray[np.int64], level: Level, suspects: Sequence[int] = (), most: int = 8, budget: int = 384
) -> list[tuple[int, range]]:
    """(episode, frames) to decode: all of them, or stretches of a few episodes, suspects among them."""
    if level == Level.FULL:
        return [(e, range(int(n))) for e, n in enumerate(lengths) if n > 0]
    total = int(lengths.sum())
    if not total:
        return []
    budget = max(64, min(budget, total * 2 // 5))
    chosen = set(np.linspace(0, len(lengths) - 1, min(most, len(lengths))).round().astype(int).tolist())
    chosen |= set(suspects)
    each = max(2, budget // len(chosen))
    spans = []
    for e in sorted(chosen):
        length = int(lengths[e])
        start = max(0, (length - each) // 2)  # the robot moves in the middle
        if length:
            spans.append((int(e), range(start, min(length, start + each))))
    return spans


# --- one stretch --------------------------------------------------------------------------------------------


@check("video-black", PICTURES, Level.SAMPLED)
def the_camera_sees_something(clip: Clip) -> Findings:
    blank = np.flatnonzero(clip.spread < ONE_COLOUR)
    if len(blank) >= max(2, len(clip.spread) // 20):
        level = int(clip.thin[blank[0]].mean())
        yield Found(
            f"{clip.place}, frame {clip.start + blank[0]}",
            f"{len(blank)} of {len(clip.spread)} pictures are of one colour (grey level {level})",
        )


@check("video-frozen", PICTURES, Level.SAMPLED)
def the_camera_does_not_stop(clip: Clip) -> Findings:
    """A stretch of one and the same picture in a video that otherwise moves, while the state goes on."""
    differences = clip.differences()
    if not len(differences) or np.median(differences) < MOVING_LEVELS / 2 or clip.spread.max() < ONE_COLOUR:
        return
    for first, stop in still_runs(differences):
        dark = clip.spread[first:stop].max() < ONE_COLOUR
        if not dark and stop - first >= max(8, STILL_SECONDS * clip.fps) and clip.moves(first, stop):
            yield Found(
                f"{clip.place}, frame {clip.start + first}",
                f"one picture for {stop - first} frames, while the state moves",
                WARN,
            )


def still_runs(differences: NDArray[np.float64]) -> list[tuple[int, int]]:
    """[first, stop) frames of each run of pictures that do not differ."""
    still = np.concatenate([[False], differences < FROZEN_LEVELS / 3, [False]])
    edges = np.flatnonzero(np.diff(still.astype(np.int8)))
    return [(int(a), int(b) + 1) for a, b in zip(edges[::2], edges[1::2], strict=True)]


# --- together -----------------------------------------------------------------------------------------------


@check("video-frozen", SEEN, Level.SAMPLED)
def cameras_that_move_elsewhere_move_here(seen: Seen) -> Findings:
    """An episode in which a camera shows one picture throughout, though it moves in others; or in none at all."""
    for camera, glimpses in seen.glimpses.items():
        asked = [g for g in glimpses if g.frames >= SHORTEST_STILL and not g.blank]
        stopped = [g for g in asked if g.frozen and g.moving]
        if any(g.energy > MOVING_LEVELS / 2 for g in asked):
            for g in stopped:
                yield Found(
                    g.place, f"one picture for all {g.frames} frames looked at, while the state moves"
                )
        elif len(stopped) == len(asked) > 1:
            yield Found(camera, "shows one picture in every episode looked at, while the state moves", WARN)


def _unchanged(clip: Clip) -> bool:
    away = np.abs(clip.thin.astype(np.int16) - clip.thin[0].astype(np.int16)).mean(axis=(1, 2, 3))
    return bool(away.max() < FROZEN_LEVELS)


@check("video-repeated", SEEN, Level.SAMPLED)
def each_video_is_its_own(seen: Seen) -> Findings:
    """Two cameras that show the same pictures, and two episodes that do though their numbers differ."""
    by_place: dict[tuple[int, int], list[Glimpse]] = {}
    by_pixels: dict[tuple[str, str], Glimpse] = {}
    for camera, glimpses in seen.glimpses.items():
        for g in glimpses:
            if g.blank or g.frames < SHORTEST_STILL:
                continue
            by_place.setdefault((g.number, g.start), []).append(g)
            other = by_pixels.setdefault((camera, g.pixels), g)
            if other is not g and other.numbers != g.numbers:
                yield Found(g.place, f"shows the pictures of {other.where}")
    for glimpses in by_place.values():
        for i, a in enumerate(glimpses):
            for b in glimpses[i + 1 :]:
                if a.samples.shape == b.samples.shape and _apart(a.samples, b.samples) < 1.0:
                    yield Found(a.where, f"{b.camera} shows the pictures of {a.camera}")


def _apart(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(np.abs(a.astype(np.int16) - b.astype(np.int16)).mean())


@check("video-shifted", SEEN, Level.SAMPLED)
def pictures_move_when_the_state_moves(seen: Seen) -> Findings:
    """Differences between pictures rise and fall with the speed of the state: at once, in every episode."""
    for camera, glimpses in seen.glimpses.items():
        curves = [(g, g.curve) for g in glimpses if g.curve is not None]
        if not curves:
            continue
        pooled = LagCurve("delta", np.mean([curve.values for _, curve in curves], axis=0))
        together = sum(abs(curve.peak - pooled.peak) <= 1 for _, curve in curves)
        far = abs(pooled.peak) >= 3 and pooled.at(pooled.peak) - pooled.at(0) > 0.2
        if pooled.clear and far and together >= max(3, len(curves) * 2 / 3):
            yield Found(camera, f"{_told(pooled.peak, 0)} (correlation {pooled.at(pooled.peak):.2f})", WARN)
        for glimpse, own in curves if len(curves) > 2 else []:
            others = LagCurve("delta", np.mean([c.values for g, c in curves if g is not glimpse], axis=0))
            if not own.clear or not others.clear or abs(others.peak) > 2 or abs(own.peak - others.peak) < 3:
                continue
            # Chance peaks lie anywhere; those of a camera that sees the robot lie together in most episodes.
            agree = sum(abs(c.peak - others.peak) <= 2 and c.clear for g, c in curves if g is not glimpse)
            if agree * 2 > len(curves) - 1 and own.at(own.peak) - own.at(others.peak) > 0.2:
                yield Found(
                    glimpse.place,
                    f"{_told(own.peak, others.peak)} (correlation {own.at(own.peak):.2f}, "
                    f"{own.at(others.peak):.2f} where other episodes have it)",
                )


def _told(lag: int, usual: int) -> str:
    side = "late" if lag > usual else "early"
    return f"pictures are {abs(lag - usual)} frames {side} against the state"


def motion_curve(clip: Clip) -> LagCurve | None:
    """How well speeds of the state at t foretell the pictures' change at t + lag; None where little moves."""
    if clip.state is None or len(clip.thin) < SHORTEST_CLIP or clip.total_motion is None:
        return None
    steps = np.abs(np.diff(clip.state, axis=0))
    moving = np.argsort(-steps.std(axis=0) * (clip.total_motion > 1e-3), kind="stable")[:MOST_MOVING]
    moving = moving[steps[:, moving].std(axis=0) > 1e-9]
    change = smoothed(clip.differences())
    if not len(moving) or change.std() < 0.05:
        return None
    speed = np.stack([smoothed(steps[:, d]) / clip.total_motion[d] for d in moving], axis=1)
    reach = min(LAG_REACH, len(speed) // 4)
    values = np.zeros(2 * LAG_REACH + 1)
    for lag in range(-reach, reach + 1):
        a = speed[max(0, -lag) : len(speed) - max(0, lag)]
        b = change[max(0, lag) : len(change) - max(0, -lag)]
        values[lag + LAG_REACH] = multiple_correlation(a, b)
    return LagCurve("delta", values)


def multiple_correlation(causes: NDArray[np.float64], effect: NDArray[np.float64]) -> float:
    """How well columns [n, S] together foretell [n]: 0 to 1, less what as many columns of noise would."""
    n, dims = causes.shape
    a, b = causes - causes.mean(axis=0), effect - effect.mean()
    total = float(b @ b)
    if n <= dims + 2 or total < 1e-12:
        return 0.0
    rest = b - a @ np.linalg.lstsq(a, b, rcond=1e-9)[0]
    adjusted = 1 - (float(rest @ rest) / (n - dims - 1)) / (total / (n - 1))
    return float(np.sqrt(max(0.0, adjusted)))


def smoothed(values: NDArray[Any]) -> NDArray[np.float64]:
    """[n] -> [n - 2] by 1 2 1: coders alternate between better and worse pictures."""
    return (values[:-2] + 2 * values[1:-1] + values[2:]) / 4
