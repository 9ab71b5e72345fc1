"""A source at a lower frame rate: `dpipe convert ... --fps N`, for pictures and columns alike.

N divides the recorded rate: k = recorded / N frames are one step, steps begin at frames 0, k, 2k, ... of the
episode, and a tail shorter than a step is left out. Any other N would take frames at uneven moments.

    seen at a moment   state, pictures, everything else      the step's first frame
    targets            where the robot shall be a frame on   the step's last frame, so that the target is reached
                       (`action`, `next_...`, `..._abs`)     when the next step begins
    moves              how far to go in one frame            summed over the step; a gripper's command is its last

A command to a controller of its own rate (LIBERO's OSC) is neither and is refused; where a source does not say
what its actions are, `--actions targets` or `--actions moves` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.chunks import DELTA, dimension_kinds
from ..schemas.episode import (
    Dropped,
    Embodiment,
    Episode,
    EpisodeRef,
    FrameSource,
    Recording,
    Segment,
    VideoClip,
)
from ..schemas.errors import UsageError
from . import Converter

MEANINGS = ("auto", "targets", "moves")


def resampled(converter: Converter, fps: int, actions: str = "auto") -> Converter:
    """The same source with its recordings at `fps` frames a second."""

    def find(raw: Path, options: Any) -> Iterator[Recording]:
        if converter.describe is None:
            describe(raw, options, "")  # what cannot be done is said before anything is opened
        yield from converter.find(raw, options)

    def scan(recording: Recording, options: Any) -> Sequence[EpisodeRef | Dropped]:
        return [
            entry
            if isinstance(entry, Dropped)
            else _shortened(entry, step_frames(_body_of(converter, entry, options).fps, fps))
            for entry in converter.scan(recording, options)
        ]

    def read(ref: EpisodeRef, options: Any) -> Episode:
        every, frames = int(ref.locator["every"]), int(ref.locator["recorded_frames"])
        episode = converter.read(replace(ref, frames=frames), options)
        body = _body_of(converter, ref, options)
        names = {feature.name: feature.names for feature in (*body.features, *body.sidecar)}
        return _thinned(episode, ref, every, column_rules(body, actions), names)

    def describe(raw: Path, options: Any, variant: str) -> Embodiment:
        problem = converter.keeps_rate(options) if converter.keeps_rate else ""
        if problem:
            raise UsageError(f"--fps {fps}: {problem}")
        return _slower(converter.embodiment_of(raw, options, variant), fps, actions)

    return replace(converter, find=find, scan=scan, read=read, describe=describe, rate=fps, actions=actions)


def step_frames(recorded: int, fps: int) -> int:
    """Recorded frames in one step; UsageError where they are not a whole number."""
    if not 1 <= fps <= recorded or recorded % fps:
        whole = ", ".join(str(recorded // k) for k in range(1, 9) if recorded % k == 0)
        raise UsageError(
            f"--fps {fps}: recorded at {recorded}, of which {fps} is no whole part, and frames are neither invented "
            f"nor taken at uneven moments\n  possible: {whole}"
        )
    return recorded // fps


def column_rules(body: Embodiment, actions: str = "auto") -> dict[str, str]:
    """Feature -> "end" or "sum", for those that look ahead; all others are taken at the step's first frame."""
    told = str(body.conventions.get("action", ""))
    meaning = actions
    if actions == "auto":
        words = told + " ".join(name for f in body.features if f.name == "action" for name in f.names)
        if "delta" in words or "relative" in words:
            meaning = "moves"
        elif "absolute" in told or "next" in told:
            meaning = "targets"
        else:
            raise UsageError(
                f"--fps: nothing says whether the actions ('{told or 'unknown'}') are where to be or how far to move, "
                "and the two are resampled differently\n  next: --actions targets, or --actions moves"
            )
    rules: dict[str, str] = {}
    for feature in (*body.features, *body.sidecar):
        if feature.name.startswith("next_") or feature.name == "action_abs":
            rules[feature.name] = "end"
        elif feature.name == "action" or feature.name.startswith(("action.", "actions.")):
            absolute = meaning == "targets" or "abs" in feature.name
            rules[feature.name] = "end" if absolute else "sum"
    return rules


def thin_column(
    values: NDArray[Any], steps: int, every: int, rule: str = "", names: Sequence[str] = ()
) -> NDArray[Any]:
    """[T, D] -> [steps, D] under a rule of `column_rules`, "" for what is seen at a moment."""
    whole = values[: steps * every].reshape(steps, every, *values.shape[1:])
    if rule == "end":
        return whole[:, -1]
    if rule == "sum":
        moves = np.array([kind == DELTA for kind in dimension_kinds(names, delta=True)])
        return np.where(moves, whole.sum(axis=1, dtype=values.dtype), whole[:, -1])
    return whole[:, 0]


@dataclass(frozen=True)
class EveryKth:
    """Every k-th frame of a camera that is read in blocks."""

    source: FrameSource
    every: int
    frames: int

    @property
    def height(self) -> int:
        return self.source.height

    @property
    def width(self) -> int:
        return self.source.width

    def __len__(self) -> int:
        return self.frames

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        picked = [self.source.read(t * self.every, t * self.every + 1) for t in range(start, stop)]
        return np.concatenate(picked) if picked else self.source.read(0, 0)


def _body_of(converter: Converter, ref: EpisodeRef, options: Any) -> Embodiment:
    """What the numbers of an episode mean as recorded; a LeRobot dataset says it, and is the first file's."""
    if converter.describe is None:
        return converter.embodiment_of(Path(), options, ref.variant)
    root = next(folder for folder in ref.files[0].parents if (folder / "meta" / "info.json").is_file())
    return converter.embodiment_of(root, options, "")


def _shortened(ref: EpisodeRef, every: int) -> EpisodeRef | Dropped:
    steps = ref.frames // every
    if steps < 1:
        names = tuple(path.name for path in ref.files[:20])
        reason = f"{ref.frames} frames are less than one step of {every}"
        return Dropped(ref.source_id, names, reason, "convert it at its own rate", ref.split, ref.variant)
    segments = [
        Segment(round(s.start / every), min(steps, round(s.stop / every)), s.text, s.task)
        for s in ref.segments
    ]
    return replace(
        ref,
        frames=steps,
        segments=tuple(s for s in segments if s.start < s.stop),
        metadata={**ref.metadata, "recorded_frames": ref.frames},
        locator={**ref.locator, "every": every, "recorded_frames": ref.frames},
    )


def _thinned(
    episode: Episode,
    ref: EpisodeRef,
    every: int,
    rules: Mapping[str, str],
    names: Mapping[str, Sequence[str]],
) -> Episode:
    columns = {
        name: thin_column(values, ref.frames, every, rules.get(name, ""), names.get(name, ()))
        for name, values in episode.columns.items()
    }
    cameras: dict[str, FrameSource | VideoClip] = {
        key: replace(camera, frames=ref.frames, stride=every)
        if isinstance(camera, VideoClip)
        else EveryKth(camera, every, ref.frames)
        for key, camera in episode.cameras.items()
    }
    return Episode(ref, columns, cameras)


def _slower(body: Embodiment, fps: int, actions: str) -> Embodiment:
    every = step_frames(body.fps, fps)
    rules = column_rules(body, actions)
    words = {"end": "last frame of the step", "sum": "moves summed over the step, gripper its last"}
    told = {
        "recorded_fps": body.fps,
        "every": every,
        "columns": {name: words[rule] for name, rule in sorted(rules.items())},
        "others": "first frame of the step",
    }
    origin = f"every {every} of {body.fps} recorded frames a second; {body.fps_origin}"
    return replace(body, fps=fps, fps_origin=origin, conventions={**body.conventions, "resampled": told})
