"""Decoded pictures: whether a camera saw anything, saw it move when the robot moved, and saw it then.

Frames are thinned as they are decoded (about 48 pixels a side), so that an episode of any length is a small array.
A camera is judged against itself in other episodes: one that looks at a wall is still by nature.

Legend  n frames of a stretch, h x w thinned pixels, S state dimensions
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...schemas.problems import NOTE, WARN
from .checks import PICTURES, SEEN, Findings, Found, Level, check
from .lags import CLEAR, POOLED, LagCurve

THIN_SIDE = 48
BLOCK = 32  # frames decoded at a time
ONE_COLOUR = 1.5  # grey levels of standard deviation below which a picture shows nothing
BLACK, WHITE = 20, 250  # grey levels of a camera that is off or covered, or sees into a lamp
FROZEN_LEVELS = 0.3  # mean difference between two codings of one picture
MOVING_LEVELS = 0.6  # mean difference from frame to frame of a camera that sees something move
STILL_SECONDS = 0.5
LAG_REACH = 10
LATENCY_S = 0.15  # cameras may well be late by less
RIDGE = 0.02  # of the mean variance, against dimensions that move together
SHORTEST_CLIP = 40
FIT_OF_ONE_FRAME = 4.5  # correlation that the best of 21 lags reaches by chance, times the root of the frames
SHORTEST_STILL = 8  # frames from which a stretch says something about standing still
LIKE = 4.0  # speeds within this factor count as the same kind of motion
MOST_COMPARED = 200  # stretches of a camera compared two by two
MANY_WINDOWS = 8  # of any motion, before the end of a video is
ENOUGH_WINDOWS = 3  # of motion like it, before a still stretch is blamed on the camera

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
class Window:
    """Half a second of one camera: how fast each dimension of the state moves [S], and whether pixels do."""

    start: int
    stop: int
    speed: NDArray[np.float64]
    moves: bool  # the state
    seen: bool  # something moves in the picture
    still: bool  # one picture throughout


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
    windows: tuple[Window, ...]
    speeds: NDArray[np.float32] | None  # of each dimension, smoothed [n - 3, S]
    changes: NDArray[np.float64]  # of the picture from frame to frame, smoothed [n - 3]
    differences: NDArray[np.float64]  # the same as measured [n - 1]
    levels: NDArray[np.float64]  # mean grey level of each channel [3]
    pixels: str  # digest of every thinned frame
    samples: NDArray[np.uint8]  # first, middle and last thinned frame

    @property
    def place(self) -> str:
        return f"{self.where}, {self.camera}"


@dataclass
class Seen:
    """What was seen of every camera, to be judged together."""

    glimpses: dict[str, list[Glimpse]] = field(default_factory=dict)
    fps: int = 1

    def add(self, clip: Clip) -> None:
        import xxhash

        self.fps = clip.fps

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
            windows=windows_of(clip, differences),
            speeds=speeds_of(clip),
            changes=smoothed(differences),
            differences=differences,
            levels=clip.thin.reshape(-1, clip.thin.shape[-1]).mean(axis=0),
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
    lengths: NDArray[np.int64],
    level: Level,
    suspects: Mapping[int, int] | None = None,
    most: int = 12,
    budget: int = 2048,
) -> list[tuple[int, range]]:
    """(episode, frames) to decode: all of them, or stretches of a few episodes.

    `suspects` are episodes to look at beside those evenly spread, with the frame that is to be seen.
    """
    if level == Level.FULL:
        return [(e, range(int(n))) for e, n in enumerate(lengths) if n > 0]
    if not int(lengths.sum()):
        return []
    chosen = {int(e): -1 for e in np.linspace(0, len(lengths) - 1, min(most, len(lengths))).round()}
    chosen |= suspects or {}
    left, spans = budget, []
    for number, e in enumerate(
        sorted(chosen, key=lambda e: lengths[e])
    ):  # short ones leave their rest to others
        length = int(lengths[e])
        size = min(length, max(2, left // (len(chosen) - number)))
        middle = chosen[e] if chosen[e] >= 0 else length // 2  # the robot moves in the middle
        start = min(max(0, middle - size // 2), length - size)
        left -= size
        if size:
            spans.append((e, range(start, start + size)))
    return sorted(spans, key=lambda span: span[0])


def frames_affordable(height: int, width: int) -> int:
    """Frames of one camera looked at by default: as many pixels in all, within bounds."""
    return int(np.clip(2048 * (1 << 17) // max(1, height * width), 384, 2048))


# --- one stretch --------------------------------------------------------------------------------------------


@check("video-black", PICTURES, Level.SAMPLED)
def the_camera_sees_something(clip: Clip) -> Findings:
    """Black or white pictures, or some of one colour among others that show something."""
    plain = clip.spread < ONE_COLOUR
    levels = clip.thin.reshape(len(clip.thin), -1).mean(axis=1)
    blank = np.flatnonzero(plain & ((levels < BLACK) | (levels > WHITE) | (not plain.all())))
    if len(blank) >= max(2, len(clip.spread) // 20):
        yield Found(
            f"{clip.place}, frame {clip.start + blank[0]}",
            f"{len(blank)} of {len(clip.spread)} pictures are of one colour (grey level {int(levels[blank[0]])})",
        )


def windows_of(clip: Clip, differences: NDArray[np.float64]) -> tuple[Window, ...]:
    """Half-second windows side by side; none where the state is unknown."""
    size = max(SHORTEST_STILL, round(STILL_SECONDS * clip.fps))
    if clip.state is None or len(clip.thin) < 2:
        return ()
    found = []
    for start in range(0, max(1, len(clip.thin) - size + 1), size):
        stop = min(start + size, len(clip.thin))
        inside = differences[start : stop - 1]
        if stop - start < SHORTEST_STILL or clip.spread[start:stop].max() < ONE_COLOUR:
            continue
        found.append(
            Window(
                clip.start + start,
                clip.start + stop,
                np.abs(np.diff(clip.state[start:stop], axis=0)).mean(axis=0),
                clip.moves(start, stop),
                bool(inside.mean() > MOVING_LEVELS / 2),
                bool(np.sort(inside)[-2] < FROZEN_LEVELS / 3),  # a coder may err once
            )
        )
    return tuple(found)


# --- together -----------------------------------------------------------------------------------------------


@check("video-frozen", SEEN, Level.SAMPLED)
def cameras_that_move_elsewhere_move_here(seen: Seen) -> Findings:
    """One picture for half a second and more, while motion of this very kind is seen to move the picture elsewhere.

    A wrist is still while the other arm works, and an arm may leave the picture: only motion like it tells.
    """
    for camera, glimpses in seen.glimpses.items():
        asked = [g for g in glimpses if g.frames >= SHORTEST_STILL and not g.blank]
        for g in asked:
            elsewhere = [w for other in asked if other is not g for w in other.windows if w.moves]
            still = [w for w in g.windows if w.still and w.moves and _should_be_seen(w, elsewhere)]
            if still and g.frozen:
                yield Found(
                    g.place, f"one picture for all {g.frames} frames looked at, while the state moves"
                )
            elif still and (run := _hung(g, still[0], enough=len(elsewhere))) is not None:
                yield Found(
                    f"{g.place}, frame {g.start + run.start}",
                    f"one picture for {len(run)} frames, while the state moves",
                    WARN,
                )
        stopped = [g for g in asked if g.frozen and g.moving]
        if stopped and len(stopped) == len(asked):
            alike = all(_apart(g.samples[0], asked[0].samples[0]) < 1.0 for g in asked)
            yield Found(
                camera,
                "shows one and the same picture in every episode looked at, while the state moves"
                if alike
                else "shows one picture throughout each episode looked at, while the state moves",
                NOTE if alike else WARN,
            )


def _should_be_seen(window: Window, others: Sequence[Window]) -> bool:
    """Whether most windows of like motion show it: nothing moves faster there, nor all of it much slower."""
    if not others:
        return False
    typical = np.mean([other.speed for other in others], axis=0) + 1e-12
    own = window.speed / typical
    seen = still = 0
    for other in others:
        speed = other.speed / typical
        if (speed <= LIKE * own + 0.1).all() and np.linalg.norm(speed) >= np.linalg.norm(own) / LIKE:
            seen += other.seen
            still += other.still
    return seen >= max(ENOUGH_WINDOWS, 4 * still)


def _hung(glimpse: Glimpse, window: Window, enough: int) -> range | None:
    """Frames of one picture around a still window, where the camera hung: when it goes on, the picture jumps.

    An arm that comes back into the picture comes step by step. What lasts to the end shows neither.
    """
    differences = glimpse.differences
    still = differences < FROZEN_LEVELS / 3
    still[1:-1] |= still[:-2] & still[2:] & (differences[1:-1] < 4 * MOVING_LEVELS)  # a coder may err once
    first = last = window.start - glimpse.start
    while last < len(still) and still[last]:
        last += 1
    while first > 0 and still[first - 1]:
        first -= 1
    run = range(first, last + 1)
    if last == len(still):
        return run if enough >= MANY_WINDOWS else None
    usual = differences[differences > MOVING_LEVELS / 2]
    return run if len(usual) > 4 and differences[last] > 1.5 * np.median(usual) else None


def _unchanged(clip: Clip) -> bool:
    away = np.abs(clip.thin.astype(np.int16) - clip.thin[0].astype(np.int16)).mean(axis=(1, 2, 3))
    return bool(np.quantile(away, 0.9) < FROZEN_LEVELS)  # coders err where another scene follows


@check("video-black", SEEN, Level.SAMPLED)
def cameras_that_see_elsewhere_see_here(seen: Seen) -> Findings:
    """One colour throughout, though not black, where other episodes show something."""
    for glimpses in seen.glimpses.values():
        plain = [g for g in glimpses if g.blank and BLACK <= g.levels.mean() <= WHITE]
        for g in plain if len(glimpses) > 2 * sum(g.blank for g in glimpses) else []:
            yield Found(g.place, f"{g.frames} pictures of one colour (grey level {int(g.levels.mean())})")


@check("video-swapped", SEEN, Level.SAMPLED)
def each_camera_is_called_by_its_name(seen: Seen) -> Findings:
    """Two cameras of an episode that each look like the other one does in all other episodes."""
    cameras = sorted(seen.glimpses)
    for i, a in enumerate(cameras):
        for b in cameras[i + 1 :]:
            mine = {g.number: g for g in seen.glimpses[a]}
            theirs = {g.number: g for g in seen.glimpses[b]}
            both = sorted(set(mine) & set(theirs))
            if len(both) < 3 or mine[both[0]].samples.shape != theirs[both[0]].samples.shape:
                continue
            for e in both:
                rest = [o for o in both if o != e]
                own = [np.median([_look(x[e], x[o]) for o in rest]) for x in (mine, theirs)]
                cross = [
                    np.median([_look(mine[e], theirs[o]) for o in rest]),
                    np.median([_look(theirs[e], mine[o]) for o in rest]),
                ]
                parts = sorted(c / (o + 1e-9) for c, o in zip(cross, own, strict=True))
                if parts[0] < 0.4 and parts[1] < 1.0:  # a camera on a wrist sees something else each time
                    yield Found(
                        mine[e].where, f"{a} shows what {b} shows in other episodes, and the other way round"
                    )


def _look(a: Glimpse, b: Glimpse) -> float:
    """How unlike the middle pictures of two stretches are, in grey levels."""
    return _apart(a.samples[1], b.samples[1])


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
            if g.frozen:
                continue  # a camera that sees nothing move may well see the same nothing twice
            other = by_pixels.setdefault((camera, g.pixels), g)
            if other is not g and other.numbers != g.numbers:
                yield Found(g.place, f"shows the pictures of {other.where}")
    for glimpses in seen.glimpses.values():
        yield from _coded_twice([g for g in glimpses if not g.blank and not g.frozen][:MOST_COMPARED])
    for glimpses in by_place.values():
        for i, a in enumerate(glimpses):
            for b in glimpses[i + 1 :]:
                if a.samples.shape == b.samples.shape and _apart(a.samples, b.samples) < 1.0:
                    yield Found(a.where, f"{b.camera} shows the pictures of {a.camera}")


def _coded_twice(glimpses: Sequence[Glimpse]) -> Findings:
    """The same pictures coded again: equal at the start, and changing by as much from frame to frame."""
    for i, a in enumerate(glimpses):
        for b in glimpses[:i]:
            frames = min(len(a.differences), len(b.differences))
            if (
                a.start != b.start
                or frames < 2 * SHORTEST_STILL
                or a.numbers == b.numbers
                or a.pixels == b.pixels
            ):
                continue
            if a.samples.shape != b.samples.shape or _apart(a.samples[0], b.samples[0]) > 1.0:
                continue
            x, y = a.differences[:frames], b.differences[:frames]
            alike = np.abs(x - y).mean() < 0.1 * x.mean()
            if alike and min(x.std(), y.std()) > 0.1 and np.corrcoef(x, y)[0, 1] > 0.98:
                yield Found(a.place, f"shows the pictures of {b.where}, coded again")
                break


def _apart(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(np.abs(a.astype(np.int16) - b.astype(np.int16)).mean())


@check("video-shifted", SEEN, Level.SAMPLED)
def pictures_move_when_the_state_moves(seen: Seen) -> Findings:
    """Differences between pictures rise and fall with the speed of the state: at once, in every episode.

    How much each dimension moves the picture is learnt from the other episodes, so that nothing fits for free.
    """
    for camera, glimpses in seen.glimpses.items():
        told = motions_of(glimpses)
        if len(told) < 4:
            continue  # of fewer, chance makes a majority
        curves = [follow_curve(told, i, lag=0) for i in range(len(told))]
        pooled = late_curve(told)
        delay = max(3, round(LATENCY_S * seen.fps))
        # A peak at the end of what is looked at is a slope; so is one that hardly rises.
        inside = delay <= abs(pooled.peak) <= LAG_REACH - 2
        if inside and pooled.clear and pooled.at(pooled.peak) - pooled.at(0) > 0.2:
            own = [follow_curve(told, i, pooled.peak) for i in range(len(told))]
            if sum(abs(curve.peak - pooled.peak) <= 1 for curve in own) * 3 >= 2 * len(own):
                fit = f"correlation {pooled.at(pooled.peak):.2f}, {pooled.at(0):.2f} where they stand"
                yield Found(camera, f"{_late(pooled.peak)} ({fit})", WARN)
                continue
        for i, (motion, own) in enumerate(zip(told, curves, strict=True)):
            rest = [curve for j, curve in enumerate(curves) if j != i]
            usual = float(np.median([curve.at(0) for curve in rest]))
            # Chance peaks lie anywhere; those of a camera that sees the robot lie together.
            if usual < CLEAR or sum(abs(curve.peak) <= 2 for curve in rest) * 3 < 2 * len(rest):
                continue
            # Of few frames, some lag fits by chance.
            chance = FIT_OF_ONE_FRAME / np.sqrt(max(1, len(motion.change) - abs(own.peak)))
            if abs(own.peak) >= 3 and own.at(own.peak) > max(CLEAR, usual - 0.2, own.at(0) + 0.3, chance):
                fit = f"correlation {own.at(own.peak):.2f}, {own.at(0):.2f} where they stand"
                yield Found(motion.place, f"{_late(own.peak)} ({fit})")


@dataclass(frozen=True)
class Motion:
    """One stretch: speeds of the state [n, D] and changes of the picture [n], both smoothed."""

    place: str
    speed: NDArray[np.float64]
    change: NDArray[np.float64]

    def paired(self, lag: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """speed[t] beside change[t + lag], each about its mean."""
        n = len(self.change)
        a = self.speed[max(0, -lag) : n - max(0, lag)]
        b = self.change[max(0, lag) : n - max(0, -lag)]
        return a - a.mean(axis=0), b - b.mean()


def motions_of(glimpses: Sequence[Glimpse]) -> list[Motion]:
    """Stretches long enough in which something moves, speeds in the scale of all of them."""
    known = [
        (g, g.speeds) for g in glimpses if g.speeds is not None and not g.frozen and g.changes.std() > 0.05
    ][:MOST_COMPARED]
    if not known or len({speeds.shape[1] for _, speeds in known}) > 1:
        return []
    scale = np.concatenate([speeds for _, speeds in known]).std(axis=0)
    moving = scale > 1e-9
    if not moving.any():
        return []
    return [Motion(g.place, speeds[:, moving] / scale[moving], g.changes) for g, speeds in known]


def weights(motions: Sequence[Motion], without: int, lag: int) -> NDArray[np.float64]:
    """[D] how much each dimension's speed changes the picture, by ridge regression over the other stretches."""
    pairs = [motion.paired(lag) for j, motion in enumerate(motions) if j != without]
    gram = sum(a.T @ a for a, _ in pairs)
    cause = sum(a.T @ b for a, b in pairs)
    dims = motions[0].speed.shape[1]
    return np.linalg.solve(gram + RIDGE * (np.trace(gram) / dims + 1e-9) * np.eye(dims), cause)


def follow_curve(motions: Sequence[Motion], i: int, lag: int) -> LagCurve:
    """How well stretch i's pictures follow its state at each lag, as the others do at `lag`."""
    weight = weights(motions, i, lag)
    return LagCurve(
        "delta", np.array([_fit(motions[i], weight, k) for k in range(-LAG_REACH, LAG_REACH + 1)])
    )


def late_curve(motions: Sequence[Motion]) -> LagCurve:
    """The same for all stretches together, the weights learnt at each lag anew."""
    some = motions[:POOLED]
    values = [
        float(np.mean([_fit(motion, weights(some, i, k), k) for i, motion in enumerate(some)]))
        for k in range(-LAG_REACH, LAG_REACH + 1)
    ]
    return LagCurve("delta", np.array(values))


def _fit(motion: Motion, weight: NDArray[np.float64], lag: int) -> float:
    a, b = motion.paired(lag)
    told = a @ weight
    size = float(np.sqrt((told @ told) * (b @ b)))
    return float(told @ b) / size if size > 1e-12 else 0.0


def _late(lag: int) -> str:
    return f"pictures are {abs(lag)} frames {'late' if lag > 0 else 'early'} against the state"


def speeds_of(clip: Clip) -> NDArray[np.float32] | None:
    """Speed of every dimension of the state, smoothed [n - 3, S]; None where a stretch is too short to tell."""
    if clip.state is None or len(clip.thin) < SHORTEST_CLIP:
        return None
    steps = np.abs(np.diff(clip.state, axis=0))
    return np.stack([smoothed(steps[:, d]) for d in range(steps.shape[1])], axis=1).astype(np.float32)


def smoothed(values: NDArray[Any]) -> NDArray[np.float64]:
    """[n] -> [n - 2] by 1 2 1: coders alternate between better and worse pictures."""
    return (values[:-2] + 2 * values[1:-1] + values[2:]) / 4
