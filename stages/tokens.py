"""tokens: which of N equal bins each normalised action falls in. Libra's planner predicts it.

    tok_N<N>    [T, D] uint8 (uint16 above 254 bins), one array for every N asked for; 255 or 65535: no number
    resid_N<N>  [T, D] float16, with --residual: clipped action minus the bin's centre
    valid       [T] bool, False where an action is not finite

A token depends on its own frame alone, so chunks are gathered at load and no length is baked in. With
--relative an action means its offset from the state at the chunk's start: then tokens are [T, K, D], `valid`
is [T, K], and the normaliser is fitted on those offsets.

Definition: Libra-VLA, Eq 3 (`schemas/bins.py`). The report: `stages/complexity.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.bins import BIN_GRID, encode, invalid_token, residual, token_dtype
from ..schemas.contract import ArraySpec
from ..schemas.errors import UsageError
from ..schemas.normalisers import DEFAULT_MODE, IMPORTERS, MODES, Normaliser
from . import Block, DatasetInfo, DatasetView, EpisodeView, Prepared, Run, Stage, TargetReader
from .actions import STATE, Reference, normaliser_for, reference_of, relative_chunks
from .charts import line_charts
from .complexity import complexity

REPORT_ROWS = 40_000  # frames the probe sees: more changes the third digit and costs minutes
SEQUENCE_ROWS = 400_000  # frames read for persistence


@dataclass(frozen=True)
class Params:
    bins: tuple[int, ...] = field(
        default=(10,), metadata={"help": "numbers of bins, every one made at once: 10,20,50"}
    )
    column: str = field(default="action", metadata={"help": "which column is cut into bins"})
    normaliser: str = field(
        default=DEFAULT_MODE, metadata={"help": "how actions become [-1, 1]", "choices": tuple(MODES)}
    )
    gripper: str = field(
        default="auto",
        metadata={
            "help": "gripper dimensions: two values, by degrees, as they are, or like the rest",
            "choices": ("auto", "binary", "bounds", "raw", "scaled"),
        },
    )
    normaliser_file: str = field(
        default="", metadata={"help": "another trainer's statistics instead of ours"}
    )
    normaliser_kind: str = field(
        default="", metadata={"help": "whose file it is", "choices": ("", *IMPORTERS)}
    )
    normaliser_key: str = field(
        default="", metadata={"help": "which data set or embodiment inside that file"}
    )
    relative: bool = field(
        default=False, metadata={"help": "offsets of absolute actions from the state at the chunk's start"}
    )
    chunk: int = field(default=0, metadata={"help": "chunk length, with --relative"})
    residual: bool = field(
        default=False, metadata={"help": "store the residual as well (it can be recomputed)"}
    )
    probe: str = field(
        default="state",
        metadata={"help": "what the report's probe sees, or no probe", "choices": ("state", "none")},
    )
    report_chunk: int = field(
        default=10, metadata={"help": "steps of a plan the report averages over (M x H of the trainer)"}
    )

    def __post_init__(self) -> None:
        if not self.bins or len(set(self.bins)) != len(self.bins):
            raise UsageError(f"--bins takes different numbers of bins, not {list(self.bins)}")
        if self.relative != (self.chunk > 0):
            raise UsageError(
                "--relative and --chunk K belong together: a chunk's start is what is measured from"
            )
        for n in self.bins:
            try:
                token_dtype(n)
            except ValueError as error:
                raise UsageError(f"--bins: {error}") from None


def normalised(actions: NDArray[Any], normaliser: Normaliser) -> NDArray[np.float64]:
    """Native actions [..., D] -> normalised; a row with a value that is not finite is NaN throughout."""
    result = normaliser.normalise(actions)
    finite = np.isfinite(result)
    if not finite.all():
        result[~finite.all(axis=-1)] = np.nan
    return result


def residuals(normal: NDArray[np.float64], tokens: NDArray[np.integer], bins: int) -> NDArray[np.float16]:
    """Clipped action minus the centre of its bin, 0 where invalid."""
    return np.nan_to_num(residual(normal, tokens, bins)).astype(np.float16)


def variant(params: Params, info: DatasetInfo) -> str:
    name = "N" + "-".join(map(str, sorted(params.bins)))
    name += f"-{params.normaliser_kind or 'file'}" if params.normaliser_file else f"-{params.normaliser}"
    name += f"-{params.column.replace('.', '_')}" if params.column != "action" else ""
    return name + (f"-relative{params.chunk}" if params.relative else "")


def prepare(params: Params, dataset: DatasetView) -> Prepared:
    normaliser = normaliser_for(
        dataset,
        params.column,
        params.normaliser,
        params.gripper,
        params.normaliser_file,
        params.normaliser_kind,
        params.normaliser_key,
        params.relative,
        params.chunk,
    )
    fps = dataset.info.fps
    return Prepared(
        facts={"normaliser": normaliser.to_json()},
        contract={
            "normaliser": normaliser.digest,
            "dtype": str(token_dtype(max(params.bins))),
            "horizon_frames": params.chunk,
            "horizon_seconds": params.chunk / fps,
        },
    )


def makes(params: Params, info: DatasetInfo, prepared: Prepared) -> tuple[ArraySpec, ...]:
    dims = len(info.names(params.column))
    shape, axes = ((params.chunk, dims), ("step", "dim")) if params.relative else ((dims,), ("dim",))
    specs = []
    for n in sorted(params.bins):
        facts = {"select": {"N": n}, "chunked": not params.relative, "mask": "valid"}
        dtype = str(token_dtype(n))
        specs.append(
            ArraySpec(
                f"tok_N{n}", shape, dtype, axes, {**facts, "invalid": invalid_token(n), "primary": True}
            )
        )
        if params.residual:
            specs.append(ArraySpec(f"resid_N{n}", shape, "float16", axes, facts))
    specs.append(ArraySpec("valid", shape[:-1], "bool", axes[:-1], {"chunked": not params.relative}))
    return tuple(specs)


def open_run(params: Params, info: DatasetInfo, prepared: Prepared) -> Run:
    normaliser = Normaliser.from_json(prepared.facts["normaliser"])
    reference = reference_of(info, params.column) if params.relative else None

    def run(episode: EpisodeView) -> Iterator[Block]:
        actions, inside = _actions(params, episode, reference)
        normal = normalised(actions, normaliser)
        block: dict[str, NDArray[Any]] = {"valid": np.isfinite(normal[..., 0]) & inside}
        for n in params.bins:
            block[f"tok_N{n}"] = encode(normal, n)
            if params.residual:
                block[f"resid_N{n}"] = residuals(normal, block[f"tok_N{n}"], n)
        yield block

    return run


def _actions(
    params: Params, episode: EpisodeView, reference: Reference | None
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """What is tokenised, [T, D] or [T, K, D], and where it lies inside the episode, [T] or [T, K]."""
    if reference is None:
        actions = episode.columns([params.column])[params.column]
        return actions, np.ones(len(actions), dtype=bool)
    columns = episode.columns([params.column, STATE])
    chunks, is_pad = relative_chunks(columns[params.column], columns[STATE], reference, params.chunk)
    return chunks, ~is_pad


def report(
    params: Params, dataset: DatasetView, prepared: Prepared, reader: TargetReader, folder: Path
) -> dict[str, Any]:
    """Clip fraction, invalid frames, tokens used; and, with a probe, the learning-complexity report."""
    normaliser = Normaliser.from_json(prepared.facts["normaliser"])
    names = dataset.info.names(params.column)
    reference = reference_of(dataset.info, params.column) if params.relative else None
    clipped, steps, invalid = np.zeros(len(names)), 0, 0
    odd_gripper = 0
    whole = dataset.stretches() if reference is None else map(dataset.episode, range(len(dataset)))
    for stretch in whole:
        actions, inside = _actions(params, stretch, reference)
        finite = np.isfinite(actions).all(axis=-1)
        rows = actions[finite & inside]
        clipped += normaliser.clipped(rows).sum(axis=0)
        steps += len(rows)
        invalid += int((~finite & inside).sum())
        binary = [d for d, kind in enumerate(normaliser.kinds) if kind == "binary"]
        ends = np.array([[normaliser.low[d], normaliser.high[d]] for d in binary]).reshape(len(binary), 2)
        odd_gripper += int((np.abs(rows[:, binary, None] - ends).min(axis=-1, initial=np.inf) > 1e-3).sum())
    result: dict[str, Any] = {
        "normaliser": normaliser.mode,
        "rows": steps,
        "invalid_rows": invalid,
        "clip_fraction": dict(zip(names, (clipped / max(1, steps)).tolist(), strict=True)),
        "gripper_values_off_their_two_levels": odd_gripper,
    }
    if params.probe == "none" or steps < 200:
        return result
    table = _probe_table(params, dataset, normaliser, reference)
    excluded = [kind != "scaled" for kind in normaliser.kinds]
    found = complexity(
        table.actions,
        table.situation,
        table.episodes,
        names,
        sequences=table.sequences,
        starts=table.starts,
        excluded=excluded,
        grid=_report_grid(params),
    )
    result["complexity"] = found
    _picture(folder / "complexity.png", dataset.info.name, found)
    return result


def _report_grid(params: Params) -> list[int]:
    return sorted({*BIN_GRID, *(n for n in params.bins if n <= max(BIN_GRID))})


@dataclass(frozen=True)
class _ProbeTable:
    """What the report is made from: n (frame, step) pairs, and T frames in sequence."""

    actions: NDArray[np.float64]  # [n, D] normalised, at step h of the chunk that begins at the row's frame
    situation: NDArray[np.float64]  # [n, F] state and instruction at that frame, and h
    episodes: NDArray[np.int64]  # [n]
    sequences: NDArray[np.float64]  # [T, D] normalised, for persistence
    starts: NDArray[np.bool_]  # [T] first frames of episodes


def _probe_table(
    params: Params, dataset: DatasetView, normaliser: Normaliser, reference: Reference | None
) -> _ProbeTable:
    """One (frame, step) pair for each of up to REPORT_ROWS frames, the step drawn evenly from the chunk.

    The instruction is a one-hot of up to 64 (more share slots). How far into the episode a frame lies is left
    out: a policy does not know it. A large dataset is thinned evenly, first to every k-th episode.
    """
    chunk = params.chunk or params.report_chunk
    has_state = STATE in dataset.info.features
    episodes_read = range(0, len(dataset), max(1, dataset.info.frames // SEQUENCE_ROWS))
    every = max(1, dataset.info.frames // episodes_read.step // REPORT_ROWS)
    rng = np.random.default_rng(0)
    slots: dict[str, int] = {}
    pieces: list[tuple[NDArray[Any], ...]] = []
    for position in episodes_read:
        episode = dataset.episode(position)
        values, _ = _actions(params, episode, reference)
        now = values if reference is None else values[:, 0]
        finite = np.isfinite(now).all(axis=-1)
        last = len(now) - 1
        frames = np.arange(0, len(now), every)
        step = rng.integers(0, chunk, len(frames))
        frames, step = frames[frames + step <= last], step[frames + step <= last]
        wanted = values[frames + step] if reference is None else values[frames, step]
        sound = np.isfinite(wanted).all(axis=-1)
        frames, step, wanted = frames[sound], step[sound], wanted[sound]
        state = episode.columns([STATE])[STATE] if has_state else np.zeros((episode.frames, 1))
        seen = np.nan_to_num(state[frames].astype(np.float64))
        slot = np.full(len(frames), slots.setdefault(episode.text, len(slots)) % 64)
        when = step[:, None] / chunk
        pieces.append(
            (
                normaliser.normalise(wanted),
                np.concatenate([seen, when, when**2], axis=1),
                slot,
                np.full(len(frames), position),
                normaliser.normalise(now[finite]),
                np.arange(int(finite.sum())) == 0,
            )
        )
    actions, seen, slot, owner, sequences, starts = (
        np.concatenate(column) for column in zip(*pieces, strict=True)
    )
    one_hot = np.eye(min(64, max(1, len(slots))))[slot]
    return _ProbeTable(actions, np.concatenate([seen, one_hot], axis=1), owner, sequences, starts)


HALF, MOST, UNSURE = "#9AA0A6", "#56B4E9", "#E69F00"  # what the marked numbers of bins are marked for


def _picture(path: Path, name: str, found: dict[str, Any]) -> None:
    """The report for a person: four curves over N, and in words where they turn."""
    numbers = sorted(map(int, found["bins"]))
    entries = [found["bins"][str(n)] for n in numbers]
    if not entries[0]["mean"]:
        return

    def line(key: str) -> list[float]:
        return [entry["mean"][key] for entry in entries]

    panels = [
        ("bits per number: all, told by the situation, left open",
         {"H(Y) all": line("H"), "I(Y;S) told": line("I"), "H(Y|S) left open": line("H_given_S")}),
        ("share of what the situation can tell that N bins ask for", {"share": [e["share"] for e in entries]}),
        ("planner: how often its first guess is the bin", {"top-1": line("top1")}),
        ("refiner: dB by which the residual is smaller than the action", {"dB": line("dB")}),
    ]  # fmt: skip
    half, most, unsure = (
        found[key] for key in ("N_at_share_0.5", "N_at_share_0.9", "N_where_top1_below_0.7")
    )
    marks: dict[int, list[str]] = {}
    for n, colour in ((half, HALF), (unsure, UNSURE), (most, MOST)):
        if n is not None:
            marks.setdefault(n, []).append(colour)
    notes = [
        f"{found['held_out_episodes']} held-out of {found['episodes']} episodes; means over "
        f"{len(found['in_means'])} of {len(found['names'])} numbers: {', '.join(found['in_means'][:9])}",
        f"grey: half of what can be told is asked of the planner from N = {half or 'none'}; "
        f"blue: nine tenths from N = {most or 'none'}; more bins add noise only",
        f"orange: the planner's first guess is right less than 7 times in 10 from N = {unsure or 'none'}",
    ]
    if "warning" in found:
        notes.append(f"caution: {found['warning']}")
    line_charts(path, f"{name}: how many bins?", panels, numbers, "N bins", notes=notes, marks=marks)


STAGE = Stage(
    name="tokens",
    version=1,
    Params=Params,
    summary="coarse-bin action tokens and the report that chooses N",
    recipes=("libra",),
    variant=variant,
    prepare=prepare,
    makes=makes,
    open=open_run,
    report=report,
    pointwise=lambda params: not params.relative,
)
