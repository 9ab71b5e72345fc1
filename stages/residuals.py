"""residuals: what a frozen anchor policy's chunk lacks. What AnchorRefine's refiner predicts.

    arm          [T, K, Da] float16     the anchor's arm chunk, normalised
    grip_logit   [T, K, G] float32      its gripper logits
    delta        [T, K, Da] float32     a* - anchor, from the anchor before it was rounded
    grip_target  [T, K, G] float32      what carries a wrong gripper decision past 0.5 (`stages/gripper.py`)
    is_pad       [T, K] bool            the step lies beyond the episode, or its action is no number

With --draws n > 1 arrays get an axis of n after T. The space is the anchor's own normalised one and its
normaliser is in the contract. An anchor that draws noise runs from a seed per frame, made from the episode's
content, the frame and the draw: the same wherever the episode lies.

Residuals on the anchor's own training episodes are too small. The report keeps training and held-out episodes
apart; with several anchors (cross-fitting), each episode asks the anchor that has not seen it
(`schemas/folds.py`: anchor k of K is trained without fold k).

Source: AnchorRefine Secs 3.1-3.6, 4.3.3 (formulas reconstructed; see targets in the documentation).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.chunks import chunk_index, window_index
from ..schemas.contract import FIXED_VIEW, ArraySpec, digest_of
from ..schemas.errors import DataError, UsageError
from ..schemas.folds import fold_of
from ..schemas.noise import frame_seeds
from . import Block, DatasetInfo, DatasetView, EpisodeView, FrameWish, Prepared, Run, Stage, TargetReader
from .actions import STATE
from .frozen import cameras_of, check_weights, checked_float16, short_name
from .gripper import MARGIN, gripper_target, probability
from .windows import finite_state, frame_wishes, window_batches

if TYPE_CHECKING:
    from ..models.policies import AnchorPolicy

PILOT_FRAMES, PILOT_DRAWS = 48, 4
SWITCH_STEPS = 5  # a chunk whose frame lies this near a gripper switch is "at a switch"
REPORT_ROWS = 20_000
MOSTLY_NOISE = 0.5  # of Var(delta): above it the residual is the sampler's noise


@dataclass(frozen=True)
class Params:
    anchor: tuple[str, ...] = field(
        default=(), metadata={"help": "embedded:FOLDER or lerobot:FOLDER; several for cross-fitting"}
    )
    chunk: int = field(default=0, metadata={"help": "steps K of the chunk; the anchor's own by default"})
    margin: float = field(default=MARGIN, metadata={"help": "how far past 0.5 a wrong gripper is carried"})
    draws: int = field(default=1, metadata={"help": "chunks per frame, where the anchor draws noise"})
    seed: int = field(default=0, metadata={"help": "seed of the anchor's noise"})
    column: str = field(default="action", metadata={"help": "which column holds the actions"})
    rename: tuple[str, ...] = field(
        default=(), metadata={"help": "THEIRS=OURS, where the anchor calls a camera otherwise"}
    )
    device: str = field(default="cpu", metadata={"help": "where the anchor runs: cpu, cuda", "key": False})
    batch: int = field(default=32, metadata={"help": "frames a forward pass", "key": False})

    def __post_init__(self) -> None:
        if self.draws < 1 or self.batch < 1 or not 0 <= self.chunk <= 50:
            raise UsageError("--draws and --batch are at least 1, --chunk is at most 50")


def open_named(params: Params) -> list[AnchorPolicy]:
    from ..models.policies import open_anchor

    if not params.anchor:
        raise UsageError(
            "no anchor given\n  Train the embedded one:  dpipe train anchor\n"
            "  or name a policy:  --anchor lerobot:FOLDER"
        )
    anchors = [open_anchor(spec, params.device) for spec in params.anchor]
    first = anchors[0]
    for spec, other in zip(params.anchor, anchors, strict=True):
        if (other.cameras, other.chunk, other.action.digest) != (
            first.cameras,
            first.chunk,
            first.action.digest,
        ):
            raise DataError(
                f"anchor {spec} differs from {params.anchor[0]} in cameras, chunk or normaliser\n"
                "  Cross-fitting wants anchors that differ only in what they were trained on."
            )
    return anchors


def variant(params: Params, info: DatasetInfo) -> str:
    parts = [
        short_name(params.anchor[0] if params.anchor else ""),
        f"K{params.chunk}" if params.chunk else "",
    ]
    parts += [f"folds{len(params.anchor)}" if len(params.anchor) > 1 else ""]
    parts += [f"draws{params.draws}" if params.draws > 1 else ""]
    return "-".join(filter(None, parts))


@dataclass(frozen=True)
class Truth:
    """An episode's actions as the anchor means them: chunks of the arm, grippers in {0, 1}, and padding."""

    arm: NDArray[np.float64]  # [T, K, Da]
    gripper: NDArray[np.float64]  # [T, K, G]
    is_pad: NDArray[np.bool_]  # [T, K]


def truth_of(actions: NDArray[Any], anchor: AnchorPolicy, chunk: int) -> Truth:
    normal = anchor.action.normalise(actions)
    sound = np.isfinite(normal).all(axis=1).astype(bool)
    normal = np.where(sound[:, None], normal, 0.0)
    index, is_pad = chunk_index(len(actions), chunk)
    grippers = list(anchor.grippers)
    arm = [d for d in range(normal.shape[1]) if d not in anchor.grippers]
    return Truth(
        normal[:, arm][index],
        (normal[:, grippers] > 0).astype(np.float64)[index],
        is_pad | ~sound[index],
    )


def residual_arrays(
    truth: Truth, arm: NDArray[np.floating], logit: NDArray[np.floating], margin: float
) -> dict[str, NDArray[Any]]:
    """The anchor's chunk [..., K, Da] and logits [..., K, G] against the truth -> the arrays of the target."""
    return {
        "arm": checked_float16(arm),
        "grip_logit": logit.astype(np.float32),
        "delta": (truth.arm - arm).astype(np.float32),
        "grip_target": gripper_target(truth.gripper, logit, margin).astype(np.float32),
    }


def prepare(params: Params, dataset: DatasetView) -> Prepared:
    anchors = open_named(params)
    anchor = anchors[0]
    names, sizes = cameras_of(anchor, params.rename, dataset.info)
    chunk = params.chunk or anchor.chunk
    if chunk > anchor.chunk:
        raise UsageError(f"--chunk {chunk} is longer than the anchor's own of {anchor.chunk}")
    if len(dataset.info.names(params.column)) != anchor.action.dim:
        raise DataError(
            f"the anchor acts in {anchor.action.dim} dimensions, '{params.column}' of {dataset.info.name} has "
            f"{len(dataset.info.names(params.column))}\n  Use an anchor that was trained on this action."
        )
    told = [other.describe() for other in anchors]
    stochastic = any(bool(one.get("stochastic")) for one in told)
    if params.draws > 1 and not stochastic:
        raise UsageError(
            "--draws above 1 is for an anchor that draws noise: this one always gives the same chunk"
        )
    facts: dict[str, Any] = {
        "anchors": told,
        "cameras": list(names),
        "read_sizes": sizes,
        "chunk": chunk,
        "arm_dims": [d for d in range(anchor.action.dim) if d not in anchor.grippers],
        "gripper_dims": list(anchor.grippers),
        "normaliser": anchor.action.to_json(),
        "stochastic": stochastic,
    }
    if stochastic:
        facts["noise"] = _noise_share(params, dataset, anchors, names, sizes, chunk)
    weights = [str(one.get("weights", other.digest)) for one, other in zip(told, anchors, strict=True)]
    return Prepared(
        facts=facts,
        contract={
            "model": ",".join(params.anchor),
            "weights": ",".join(weights),
            "layer": "action chunk, normalised",
            "preprocessing": digest_of([[other.digest for other in anchors], sorted(names.items())]),
            "camera": ",".join(names),
            "dtype": "float32",
            "horizon_frames": chunk,
            "horizon_seconds": chunk / dataset.info.fps,
            "normaliser": anchor.action.digest,
            "augmentation": FIXED_VIEW,
            "seed": params.seed,
        },
    )


def makes(params: Params, info: DatasetInfo, prepared: Prepared) -> tuple[ArraySpec, ...]:
    chunk, arm, grip = (prepared.facts[name] for name in ("chunk", "arm_dims", "gripper_dims"))
    draw = (params.draws,) if params.draws > 1 else ()
    axes = ("draw",) if draw else ()
    told = {"mask": "is_pad", "mask_is_pad": True, **({"drawn": True} if draw else {})}
    specs = [
        ArraySpec("arm", (*draw, chunk, len(arm)), "float16", (*axes, "step", "dim"), told),
        ArraySpec("delta", (*draw, chunk, len(arm)), "float32", (*axes, "step", "dim"), told),
    ]
    if grip:
        for name in ("grip_logit", "grip_target"):
            specs.append(
                ArraySpec(name, (*draw, chunk, len(grip)), "float32", (*axes, "step", "gripper"), told)
            )
    specs.append(ArraySpec("is_pad", (chunk,), "bool", ("step",), {"auxiliary": True}))
    return tuple(specs)


def open_run(params: Params, info: DatasetInfo, prepared: Prepared) -> Run:
    anchors = open_named(params)
    for anchor, wanted in zip(anchors, prepared.contract["weights"].split(","), strict=True):
        check_weights(anchor.describe(), anchor.digest, wanted, "anchor")
    names, sizes = cameras_of(anchors[0], params.rename, info)
    chunk = int(prepared.facts["chunk"])

    def run(episode: EpisodeView) -> Iterator[Block]:
        anchor = anchors[fold_of(episode.content, len(anchors))]
        truth = truth_of(episode.columns([params.column])[params.column], anchor, chunk)
        for rows, draws in anchor_chunks(params, episode, anchor, names, sizes, chunk, params.draws):
            part = Truth(truth.arm[rows], truth.gripper[rows], truth.is_pad[rows])
            each = [residual_arrays(part, arm, logit, params.margin) for arm, logit in draws]
            block = (
                each[0] if params.draws == 1 else {n: np.stack([e[n] for e in each], axis=1) for n in each[0]}
            )
            if not prepared.facts["gripper_dims"]:
                block = {name: values for name, values in block.items() if not name.startswith("grip")}
            yield {**block, "is_pad": part.is_pad}

    return run


def anchor_chunks(
    params: Params,
    episode: EpisodeView,
    anchor: AnchorPolicy,
    names: dict[str, str],
    sizes: Mapping[str, tuple[int, int] | None],
    chunk: int,
    draws: int,
    rows: NDArray[np.int64] | None = None,
) -> Iterator[tuple[NDArray[np.int64], list[tuple[NDArray[np.float32], NDArray[np.float32]]]]]:
    """Blocks of frames, and for each draw the anchor's arm [B, K, Da] and gripper logits [B, K, G]."""
    wanted = np.arange(episode.frames) if rows is None else rows
    state, _ = finite_state(episode.columns([STATE])[STATE])
    seen = window_index(episode.frames, anchor.window)[0][wanted]
    for part, windows in window_batches(episode, list(names), seen, params.batch, names, sizes):
        here = wanted[part]
        images, robot = windows, state[seen[part]]
        if anchor.window == 1:
            images, robot = {camera: frames[:, 0] for camera, frames in windows.items()}, robot[:, 0]
        texts = [episode.text] * len(here)
        found = []
        for draw in range(draws):
            seeds = frame_seeds(episode.content, here, draw, params.seed).astype(np.int64)
            arm, logit = anchor.act(images, robot, texts, seeds)
            found.append((arm[:, :chunk], logit[:, :chunk]))
        yield here, found


def _noise_share(
    params: Params,
    dataset: DatasetView,
    anchors: list[AnchorPolicy],
    names: dict[str, str],
    sizes: Mapping[str, tuple[int, int] | None],
    chunk: int,
) -> dict[str, Any]:
    """How much of the residual's variance lies between draws of one frame: on a pilot of frames."""
    between, spread = [], []
    per_episode = max(1, PILOT_FRAMES // min(len(dataset), 8))
    for position in np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), 8)).astype(int)):
        episode = dataset.episode(int(position))
        anchor = anchors[fold_of(episode.content, len(anchors))]
        rows = np.unique(
            np.linspace(0, episode.frames - 1, min(per_episode, episode.frames)).astype(np.int64)
        )
        truth = truth_of(episode.columns([params.column])[params.column], anchor, chunk)
        asked = params, episode, anchor, names, sizes, chunk, PILOT_DRAWS, rows
        for here, draws in anchor_chunks(*asked):
            delta = np.stack([truth.arm[here] - arm for arm, _ in draws])  # [draws, B, K, Da]
            valid = ~truth.is_pad[here]
            between.append(delta.var(axis=0, ddof=1)[valid])
            spread.append(delta[0][valid])
    noise = float(np.concatenate(between).mean())
    total = float(np.concatenate(spread).var())
    share = noise / max(total, 1e-12)
    told: dict[str, Any] = {"between_draws": noise, "var_delta": total, "share": share, "draws": PILOT_DRAWS}
    if share > MOSTLY_NOISE:
        told["warning"] = (
            f"{share:.0%} of the residual's variance is the sampler's noise: a refiner would learn little else. "
            "Use a deterministic anchor, or average several draws."
        )
    return told


# --- report -------------------------------------------------------------------------------------------------


def compactness(rows: NDArray[np.floating]) -> dict[str, float]:
    """Flattened chunks [n, K Da]: mean length and trace of the covariance (ddof 1), Sec 4.3.3."""
    flat = np.asarray(rows, dtype=np.float64)
    trace = float(flat.var(axis=0, ddof=1).sum()) if len(flat) > 1 else 0.0
    return {"mean_norm": float(np.linalg.norm(flat, axis=1).mean()), "trace": trace}


def near_switch(gripper: NDArray[np.floating], steps: int = SWITCH_STEPS) -> NDArray[np.bool_]:
    """[T, G] in {0, 1} -> [T]: whether any gripper switches within `steps` frames."""
    at = np.flatnonzero((gripper[1:] != gripper[:-1]).any(axis=1)) + 1
    t = np.arange(len(gripper))
    return (np.abs(t[:, None] - at) <= steps).any(axis=1).astype(bool)


def report(
    params: Params, dataset: DatasetView, prepared: Prepared, reader: TargetReader, folder: Path
) -> dict[str, Any]:
    """Compactness raw against residual, by phase and dimension, training apart from held-out episodes."""
    facts = prepared.facts
    anchor = open_named(params)[0]
    thin = max(1, dataset.info.frames // REPORT_ROWS)
    groups: dict[str, dict[str, list[NDArray[Any]]]] = {}
    wrong = steps = 0
    trained = _training_episodes(facts["anchors"], dataset.info)
    for position in range(len(dataset)):
        episode = dataset.episode(position)
        truth = truth_of(episode.columns([params.column])[params.column], anchor, int(facts["chunk"]))
        delta = np.asarray(reader.read(position, "delta"))
        delta = delta[:, 0] if params.draws > 1 else delta
        whole = (np.arange(len(delta)) % thin == 0) & ~truth.is_pad.any(axis=1)
        switch = near_switch(truth.gripper[:, 0]) if facts["gripper_dims"] else np.zeros(len(delta), bool)
        seen = "held_out" if len(params.anchor) > 1 or position not in trained else "training"
        for name, chosen in (
            ("all", whole),
            ("at_switch", whole & switch),
            ("away_from_switch", whole & ~switch),
            (seen, whole),
        ):
            entry = groups.setdefault(name, {"raw": [], "residual": []})
            entry["raw"].append(truth.arm[chosen])
            entry["residual"].append(delta[chosen])
        if facts["gripper_dims"]:
            logit = np.asarray(reader.read(position, "grip_logit"))
            logit = logit[:, 0] if params.draws > 1 else logit
            missed = (probability(logit) > 0.5) != (truth.gripper > 0.5)
            wrong += int(missed[~truth.is_pad].sum())
            steps += int((~truth.is_pad).sum()) * missed.shape[-1]
    result: dict[str, Any] = {**facts, "groups": {}}
    for name, entry in groups.items():
        raw, rest = np.concatenate(entry["raw"]), np.concatenate(entry["residual"])
        if len(raw) == 0:
            continue
        a, b = compactness(raw.reshape(len(raw), -1)), compactness(rest.reshape(len(rest), -1))
        result["groups"][name] = {
            "chunks": len(raw),
            "raw": a,
            "residual": b,
            "norm_ratio": b["mean_norm"] / max(a["mean_norm"], 1e-12),
            "trace_ratio": b["trace"] / max(a["trace"], 1e-12),
        }
        if name == "all":
            result["delta_std"] = rest.reshape(-1, rest.shape[-1]).std(axis=0).tolist()
            result["raw_std"] = raw.reshape(-1, raw.shape[-1]).std(axis=0).tolist()
    if steps:
        result["gripper_nonzero"] = wrong / steps
    if "held_out" not in result["groups"]:
        result["note"] = (
            "every episode was in the anchor's training: residuals are smaller than a refiner will meet. "
            "Train anchors without a fold each (cross-fitting) and give them all with --anchor."
        )
    return result


def _training_episodes(anchors: list[dict[str, Any]], info: DatasetInfo) -> range:
    """The episodes an embedded anchor says it was trained on: those of its split; all, where it says nothing."""
    split = str((anchors[0].get("training") or {}).get("split", "all"))
    return range(*info.splits.get(split, (0, info.episodes)))


def wishes(params: Params, info: DatasetInfo, prepared: Prepared) -> tuple[FrameWish, ...]:
    return frame_wishes(prepared.facts["read_sizes"], params.batch)


STAGE = Stage(
    name="residuals",
    version=2,
    Params=Params,
    summary="what a frozen anchor policy's chunk lacks",
    recipes=("anchorrefine",),
    variant=variant,
    prepare=prepare,
    makes=makes,
    open=open_run,
    report=report,
    uses_model=lambda params: True,
    wishes=wishes,
)
