"""teacher: hidden states of a frozen policy's action tokens. What VITA's stage 1 aligns a student to.

    last (default)   h [T, Q, width]        at the newest step of the S frames up to t: for students that see the
                                            present or a fixed history
    full             h [W, S, Q, width]     every window start at stride k, every step: Eq 3 exactly
                     win_start [W] int64, pos [W, S] int16
    mask             bool beside h          True where the frame a token speaks of exists and the state is sound
    a_hat            float16 beside h       the teacher's own decoding, [..., A]; D(h) must return it
    decoder.safetensors                     the decoder: a student's starting point; the teacher is needed no more

One vector per frame is not enough for `full`, because h depends on where the window began. The teacher runs
in eval mode with augmentation off, although Seer trained with random shifts; both are in the contract.

Source: Seer (window S, 3 action queries, post-LayerNorm output), VITA-VLA Sec 3 and Eq 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.contract import FIXED_VIEW, ArraySpec, digest_of
from ..schemas.errors import DataError, UsageError
from . import Block, DatasetInfo, DatasetView, EpisodeView, FrameWish, Prepared, Run, Stage, TargetReader
from .actions import STATE
from .frozen import cameras_of, check_weights, checked_float16, short_name
from .windows import (
    finite_state,
    frame_wishes,
    full_windows,
    label_mask,
    last_windows,
    window_batches,
)

if TYPE_CHECKING:
    from ..models.policies import Teacher

DECODED_WITHIN = 5e-3  # of D(float16 h) from the stored a_hat
CAUSAL_WITHIN = 1e-4


@dataclass(frozen=True)
class Params:
    teacher: str = field(default="", metadata={"help": "embedded:FOLDER or lerobot:FOLDER"})
    mode: str = field(
        default="last",
        metadata={"help": "one state per frame, or every step of every window", "choices": ("last", "full")},
    )
    stride: int = field(default=1, metadata={"help": "frames between window starts, with --mode full"})
    rename: tuple[str, ...] = field(
        default=(), metadata={"help": "THEIRS=OURS, where the teacher calls a camera otherwise"}
    )
    device: str = field(default="cpu", metadata={"help": "where the teacher runs: cpu, cuda", "key": False})
    batch: int = field(default=32, metadata={"help": "windows a forward pass", "key": False})

    def __post_init__(self) -> None:
        if self.stride < 1 or self.batch < 1:
            raise UsageError("--stride and --batch are at least 1")
        if self.stride > 1 and self.mode == "last":
            raise UsageError("--stride belongs to --mode full: the other has one state for every frame")


def open_named(params: Params) -> Teacher:
    from ..models.policies import open_teacher

    if not params.teacher:
        raise UsageError(
            "no teacher given\n  Train the embedded one:  dpipe train teacher\n"
            "  or name a policy:  --teacher lerobot:FOLDER"
        )
    return open_teacher(params.teacher, params.device)


def variant(params: Params, info: DatasetInfo) -> str:
    words = [short_name(params.teacher), params.mode, f"every{params.stride}" * (params.stride > 1)]
    return "-".join(filter(None, words))


def prepare(params: Params, dataset: DatasetView) -> Prepared:
    teacher = open_named(params)
    names, sizes = cameras_of(teacher, params.rename, dataset.info)
    told = teacher.describe()
    facts = {
        "teacher": told,
        "cameras": list(names),
        "window": teacher.window,
        "queries": teacher.queries,
        "width": teacher.width,
        "grippers": list(teacher.grippers),
        "normaliser": teacher.action.to_json(),
        "read_sizes": sizes,
        "decodes": _decodes(teacher),
        "causality_error": causality_error(teacher, dataset, names, sizes, params.batch),
        "augmentation": "off",
    }
    return Prepared(
        facts=facts,
        contract={
            "model": params.teacher,
            "weights": str(told.get("weights", teacher.digest)),
            "layer": str(told.get("layer", "action queries after the last LayerNorm")),
            "preprocessing": digest_of([teacher.digest, sorted(names.items())]),
            "camera": ",".join(names),
            "dtype": "float16",
            "horizon_frames": teacher.queries,
            "horizon_seconds": teacher.queries / dataset.info.fps,
            "normaliser": teacher.action.digest,
            "augmentation": FIXED_VIEW,
        },
    )


def _decodes(teacher: Teacher) -> bool:
    """Whether its last layer can be handed to a student."""
    try:
        teacher.decode(np.zeros((1, 1, teacher.queries, teacher.width), np.float32))
    except UsageError:
        return False
    return True


def causality_error(
    teacher: Teacher,
    dataset: DatasetView,
    names: dict[str, str],
    sizes: Mapping[str, tuple[int, int] | None],
    batch: int,
) -> float:
    """Largest change of step 0 when the later frames of a window are blanked; refused above 1e-4.

    `last` reads short histories from windows whose later steps repeat, which is sound only if they are unseen.
    """
    episode = max((dataset.episode(i) for i in range(min(len(dataset), 16))), key=lambda e: e.frames)
    if teacher.window == 1 or episode.frames < teacher.window:
        return 0.0
    index, _ = full_windows(teacher.window, teacher.window, 1)
    _, images = next(window_batches(episode, list(names), index, max(batch, teacher.window), names, sizes))
    state = finite_state(episode.columns([STATE])[STATE])[0][index]
    whole = teacher.hidden(images, state, [episode.text])
    blank = {camera: frames.copy() for camera, frames in images.items()}
    for frames in blank.values():
        frames[:, 1:] = 0
    other = teacher.hidden(blank, np.where(np.arange(teacher.window)[:, None] > 0, 0, state), [episode.text])
    error = float(np.abs(whole[:, 0] - other[:, 0]).max())
    if error > CAUSAL_WITHIN:
        raise DataError(
            f"the teacher's first step changes by {error:.2g} when later frames change: it is not causal\n"
            "  Its states cannot be cached by window; use a teacher with a window of 1, or another."
        )
    return error


def makes(params: Params, info: DatasetInfo, prepared: Prepared) -> tuple[ArraySpec, ...]:
    facts = prepared.facts
    queries, width, dims = facts["queries"], facts["width"], len(facts["normaliser"]["low"])
    if params.mode == "last":
        shape, axes, axis, every = (queries,), ("query",), "frame", 1
    else:
        shape, axes, axis, every = (facts["window"], queries), ("step", "query"), "window", 0
    stride = {"stride": params.stride} if params.mode == "full" else {}
    told = {**stride, "mask": "mask"}
    specs = [
        ArraySpec("h", (*shape, width), "float16", (*axes, "width"), {**told, "primary": True}, axis, every),
        ArraySpec("mask", shape, "bool", axes, stride, axis, every),
    ]
    if facts["decodes"]:
        specs.append(ArraySpec("a_hat", (*shape, dims), "float16", (*axes, "dim"), told, axis, every))
    if params.mode == "full":
        specs.append(ArraySpec("win_start", (), "int64", (), stride, axis, every))
        specs.append(ArraySpec("pos", (facts["window"],), "int16", ("step",), stride, axis, every))
    return tuple(specs)


def open_run(params: Params, info: DatasetInfo, prepared: Prepared) -> Run:
    teacher = open_named(params)
    check_weights(teacher.describe(), teacher.digest, prepared.contract["weights"], "teacher")
    names, sizes = cameras_of(teacher, params.rename, info)
    decodes = prepared.facts["decodes"]

    def run(episode: EpisodeView) -> Iterator[Block]:
        state, sound = finite_state(episode.columns([STATE])[STATE])
        steps, frames = teacher.window, episode.frames
        last = params.mode == "last"
        if last:
            index, read = last_windows(frames, steps)
            starts = np.arange(frames) - read
        else:
            index, starts = full_windows(frames, steps, params.stride)
            read = np.zeros(0, dtype=np.int64)
        for chosen, images in window_batches(episode, list(names), index, params.batch, names, sizes):
            rows = index[chosen]
            hidden = teacher.hidden(images, state[rows], [episode.text] * len(rows))
            mask = label_mask(starts[chosen], frames, steps, teacher.queries) & np.expand_dims(
                sound[rows], -1
            )
            if last:
                here = np.arange(len(rows)), read[chosen]
                hidden, mask = hidden[here], mask[here]
            else:
                # Steps beyond a short episode repeat its last frame: nothing there is anybody's target.
                real = starts[chosen][:, None] + np.arange(steps) < frames
                mask &= real[..., None]
            learnt: NDArray[np.bool_] = np.any(mask, axis=-1, keepdims=True)
            hidden = np.where(learnt[..., None], hidden, 0)
            block: dict[str, NDArray[Any]] = {"h": checked_float16(hidden), "mask": mask}
            if decodes:
                block["a_hat"] = teacher.decode(hidden).astype(np.float16)
            if not last:
                block["win_start"] = starts[chosen]
                block["pos"] = np.broadcast_to(np.arange(steps, dtype=np.int16), (len(rows), steps))
            yield block

    return run


def report(
    params: Params, dataset: DatasetView, prepared: Prepared, reader: TargetReader, folder: Path
) -> dict[str, Any]:
    """The decoder beside the cache, D(h) against a_hat, and the error of always guessing the mean state."""
    teacher = open_named(params)
    result: dict[str, Any] = dict(prepared.facts)
    thin = max(1, dataset.info.frames // 4096)
    kept, worst, valid, tokens = [], 0.0, 0, 0
    for position in range(len(dataset)):
        hidden, mask = np.asarray(reader.read(position, "h")), np.asarray(reader.read(position, "mask"))
        valid += int(mask.sum())
        tokens += mask.size
        some = hidden[::thin]
        kept.append(some[mask[::thin]])
        if prepared.facts["decodes"]:
            again = teacher.decode(some.astype(np.float32))
            stored = np.asarray(reader.read(position, "a_hat"))[::thin].astype(np.float32)
            worst = max(worst, float(np.abs(again - stored).max(initial=0)))
    states = np.concatenate(kept).astype(np.float64)
    result |= {
        "valid_tokens": valid,
        "masked_tokens": tokens - valid,
        "variance_per_dim": float(states.var(axis=0).mean()) if len(states) else 0.0,
        "largest": float(np.abs(states).max(initial=0)),
    }
    if prepared.facts["decodes"]:
        if worst > DECODED_WITHIN:
            raise DataError(
                f"decoding the stored states misses the teacher's actions by {worst:.3g}, more than {DECODED_WITHIN}"
                "\n  float16 is too coarse for this teacher's states; use another."
            )
        result["decoded_within"] = worst
        temporary = folder / ".decoder.tmp"
        teacher.save_decoder(temporary)
        temporary.replace(folder / "decoder.safetensors")
    return result


def wishes(params: Params, info: DatasetInfo, prepared: Prepared) -> tuple[FrameWish, ...]:
    if params.mode == "full":
        return ()  # with a stride the last frames of an episode may be in no window
    return frame_wishes(prepared.facts["read_sizes"], params.batch)


STAGE = Stage(
    name="teacher",
    version=2,
    Params=Params,
    summary="hidden states of a frozen policy's action tokens",
    recipes=("vita",),
    variant=variant,
    prepare=prepare,
    makes=makes,
    open=open_run,
    report=report,
    uses_model=lambda params: True,
    wishes=wishes,
)
