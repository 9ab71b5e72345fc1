"""Several embodiments as one run: unified vectors with masks, each dataset scaled by its own statistics.

    result = train_mixed("dial", [Path("lerobot/libero"), Path("lerobot/egodex")], Path("runs/dial/mixed"))

Vectors    state and absolute action in the layout of `schemas/unified.py`; what an embodiment has not is 0, masked
           out of every loss, and told to the policy: its state is the vector and the mask side by side
Scales     per dataset. Positions and joints of the state by mean and deviation, of the action by q01q99; rotations
           (rot6d) as they are; grippers 0 closed, 1 open to [-1, 1], with the same ends for everybody
Clock      the slowest dataset's fps: a step is as long in seconds everywhere, and a target H steps ahead is looked
           up that many seconds ahead in each dataset's own frames
Pictures   by role: main, wrist, wrist_left; one that a dataset has not is black
Share      each dataset by its number of frames, or by `weights`

DIAL mixes people's hands with a humanoid in this way: named slots, padding, a mask (xpeng-robotics/DIAL b611fed,
`data_config_dial.py`). Recipes whose targets live in one dataset's own action space do not mix; `mixing_problem`
says why.

Legend   B samples, H steps, U unified dimensions
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import DataError, UsageError
from ..schemas.features import CAMERA_PREFIX
from ..schemas.normalisers import BOUNDS, RAW, SCALED, Normaliser, make_normaliser
from ..schemas.statistics import Statistics, exact_statistics
from ..schemas.unified import DIM, NAMES, Unified, unify_action, unify_state
from ..streams.dataset import Dataset, open_dataset
from ..streams.mixture import Member, embodiment_of, native_columns, open_mixture
from ..streams.targets import Targets, open_targets, parse_request
from . import open_recipe
from .loop import Options, Phase, Say
from .presets import preset_of
from .recipe import Recipe, TargetFolder, resolve
from .run import TASKS_KEPT, Made, Result, SupervisedBatches, carry_out, dataset_digest, given, target_folders
from .space import STATE, Space

ROLES = ("main", "wrist", "wrist_left")
# Which of a source's cameras plays which part; one-armed robots are right-handed, as in the unified vector.
CAMERA_ROLES: dict[str, dict[str, str]] = {
    "libero": {"main": "image", "wrist": "image2"},
    "calvin": {"main": "top", "wrist": "wrist"},
    "egodex": {"main": "ego"},
    "agibot": {"main": "head", "wrist": "hand_right", "wrist_left": "hand_left"},
    "agibot-dexhand": {"main": "head", "wrist": "hand_right_fisheye", "wrist_left": "hand_left_fisheye"},
}
MIXED_STAGES = frozenset({"foresight"})  # features of pictures by a frozen tower: the same whoever is seen
OWN_SPACE = {
    "tokens": "its tokens are bins of one dataset's own actions",
    "teacher": "its targets are hidden states of a teacher of one dataset's own actions",
    "residuals": "its residuals are taken from an anchor of one dataset's own actions",
    "privileged": "its cache holds actions of a base policy of one dataset",
}
SERVES_A_STAGE = (
    "teacher",
    "anchor",
    "flow",
)  # recipes whose policy computes targets of the dataset it learnt


def mixing_problem(recipe: str) -> str:
    """Why a recipe cannot learn from unified vectors, "" where it can."""
    made = open_recipe(recipe)
    if recipe in SERVES_A_STAGE:
        return "its policy computes targets of the dataset it learns from, in that dataset's own actions"
    requests, _ = made.targets(made.config())
    stages = [parse_request(text).stage for text in requests]
    foreign = [stage for stage in stages if stage not in MIXED_STAGES]
    return OWN_SPACE.get(foreign[0], f"its {foreign[0]} targets belong to one dataset") if foreign else ""


@dataclass(frozen=True)
class Scaled:
    """One dataset of the mixture: what its unified vectors look like, and how they are scaled."""

    name: str
    fps: int
    state: Normaliser
    action: Normaliser
    state_mask: tuple[bool, ...]  # [U]
    action_mask: tuple[bool, ...]  # [U]
    cameras: Mapping[str, str]  # role -> camera

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "fps": self.fps,
            "state": self.state.to_json(),
            "action": self.action.to_json(),
            "state_mask": list(self.state_mask),
            "action_mask": list(self.action_mask),
            "cameras": dict(self.cameras),
        }


def train_mixed(
    recipe: str,
    roots: Sequence[Path],
    run_dir: Path,
    *,
    weights: Mapping[str, float] | None = None,
    steps: int | None = None,
    config: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    split: str = "train",
    targets: Mapping[Path, Path | None] | None = None,
    frames: str = "auto",
    say: Say = print,
    stop_after: int | None = None,
    preset: str = "",
    track: Sequence[str] = (),
    max_time_s: float | None = None,
) -> Result:
    """As `run.train`, on several datasets. `targets` maps a dataset's folder to that of its targets."""
    problem = mixing_problem(recipe)
    if problem:
        raise UsageError(
            f"{recipe} does not mix datasets through the unified vector: {problem}\n"
            f"  next: dpipe train {recipe} --dataset NAME, or dpipe train dial --mix unified"
        )
    made, named = open_recipe(recipe), preset_of(recipe, preset)
    resolved = resolve(recipe, made.config, {**named.config, **(config or {})})
    chosen = resolve("train", Options, {**given(made.options), **named.options, **(options or {})})
    datasets = [open_dataset(root) for root in roots]
    shares = _weights(datasets, weights or {})
    fps = min(dataset.fps for dataset in datasets)
    supervision = [_targets(made, resolved, d, (targets or {}).get(d.root), fps) for d in datasets]
    folders = [target_folders(each) for each in supervision]
    members = [scale(dataset, split) for dataset in datasets]
    space = space_of(members, fps)
    facts = merge_facts(
        [made.facts(resolved, each) for each in folders], [d.total_frames for d in datasets], datasets
    )
    _hold_to_one_tower(folders, datasets)
    spec = made.spec(resolved, space, facts)

    def open_batches(phase: Phase, rank: int, world: int) -> MixedBatches:
        stream = open_mixture(
            [
                Member(
                    dataset,
                    weight,
                    split=split,
                    cameras={CAMERA_PREFIX + role: key for role, key in member.cameras.items()},
                    frames=frames,
                )
                for dataset, weight, member in zip(datasets, shares, members, strict=True)
            ],
            unified_spec(spec, fps),
            chosen.batch_size // (world * chosen.accumulate),
            seed=chosen.seed,
            rank=rank,
            world=world,
            align="unified",
        )
        if rank == 0:
            say(f"stream: {stream.describe()}")
        joins = [lambda index, each=each: made.join(resolved, each, index) for each in supervision]
        return MixedBatches(stream.endless(), members, joins if supervision[0].names else [])

    say(_told(datasets, shares, fps))
    return carry_out(
        Made(
            recipe=made,
            config=resolved,
            options=chosen,
            steps=steps or named.steps or made.steps,
            space=space,
            facts=facts,
            start=folders[0],
            open_batches=open_batches,
            terms={
                "split": split,
                "mix": "unified",
                "datasets": [
                    dataset_digest(dataset) | {"weight": weight}
                    for dataset, weight in zip(datasets, shares, strict=True)
                ],
                "members": [member.to_json() for member in members],
                "targets": {
                    f"{dataset.name}/{name}": contract.digest
                    for dataset, each in zip(datasets, supervision, strict=True)
                    for name, contract in each.contracts.items()
                },
            },
            provenance={
                "dataset_root": str(datasets[0].root),
                "dataset_roots": [str(dataset.root) for dataset in datasets],
                "tasks": list(dict.fromkeys(t for d in datasets for t in d.tasks))[:TASKS_KEPT],
                "contracts": {
                    f"{dataset.name}/{name}": contract.to_json()
                    for dataset, each in zip(datasets, supervision, strict=True)
                    for name, contract in each.contracts.items()
                },
            },
        ),
        run_dir,
        say,
        stop_after,
        track,
        max_time_s,
    )


class MixedBatches(SupervisedBatches):
    """A mixture's batches, each row scaled by its dataset's own statistics and given that dataset's targets."""

    def __init__(self, batches: Any, members: Sequence[Scaled], joins: Sequence[Any]) -> None:
        super().__init__(batches, lambda index: {})
        self._members, self._joins = members, joins

    def health(self) -> dict[str, float]:
        """As of any stream, and what share of the samples each dataset has had until now."""
        source, stream = self._batches.stream.source, self._batches.stream
        shares = {f"share_of_{told['dataset']}": told["share"] for told in source.proportions(stream)}
        return super().health() | shares

    def __next__(self) -> dict[str, Any]:
        batch = dict(next(self._batches))
        owner = batch.pop("dataset")
        state, state_mask = batch[STATE], batch.pop(f"{STATE}_mask")
        action, action_mask = batch["action"], batch.pop("action_mask")
        seen = np.zeros(state.shape, np.float32)
        told = np.zeros(action.shape, np.float32)
        for number in np.unique(owner).tolist():
            rows, member = np.flatnonzero(owner == number), self._members[number]
            seen[rows] = member.state.normalise(state[rows])
            told[rows] = member.action.normalise(action[rows])
            for name, values in self._joins[number](batch["index"][rows]).items() if self._joins else ():
                whole = batch.setdefault(name, np.zeros((len(owner), *values.shape[1:]), values.dtype))
                whole[rows] = values
        has = np.broadcast_to(
            state_mask[(slice(None), *[None] * (seen.ndim - 2), slice(None))], seen.shape
        ).astype(np.float32)
        batch[STATE] = np.concatenate([seen * has, has], axis=-1)
        batch["action"] = told * action_mask[:, None]
        batch["action_dims"] = action_mask
        return batch


# --- what a mixture is made of -----------------------------------------------------------------------------


def roles_of(dataset: Dataset) -> dict[str, str]:
    """Role -> camera, of a dataset of ours; of others the first camera is the main one."""
    name = str((dataset.manifest or {}).get("embodiment", {}).get("name", ""))
    keys = CAMERA_ROLES.get("-".join(name.split("-")[:2])) or CAMERA_ROLES.get(name.split("-")[0], {})
    found = {
        role: CAMERA_PREFIX + key for role, key in keys.items() if CAMERA_PREFIX + key in dataset.cameras
    }
    return found or dict(zip(("main",), dataset.cameras, strict=False))


def scale(dataset: Dataset, split: str) -> Scaled:
    """Exact statistics of a dataset's unified vectors, and the scales made of them."""
    body, names = embodiment_of(dataset), native_columns(dataset)
    episodes = dataset.episodes_in(split)
    if not len(episodes):
        raise DataError(f"{dataset.root} has no episode in split '{split}'")
    parts = [
        range(max(p.start, episodes.start), min(p.stop, episodes.stop))
        for p in dataset.parts()
        if p.start < episodes.stop and episodes.start < p.stop
    ]

    def unified(unify: Any) -> tuple[Statistics, NDArray[np.bool_], int]:
        masks: list[NDArray[np.bool_]] = []

        def blocks() -> Any:
            for part in parts:
                found: Unified = unify(body, dataset.all_columns(names, part))
                masks.append(found.mask)
                yield found.values.astype(np.float32)

        statistics, rows = exact_statistics(blocks)
        return statistics, masks[0], rows

    state, state_mask, rows = unified(unify_state)
    action, action_mask, _ = unified(unify_action)
    return Scaled(
        dataset.name,
        dataset.fps,
        _normaliser("gr00t_meanstd", state, state_mask, rows, dataset.name),
        _normaliser("q01q99", action, action_mask, rows, dataset.name),
        tuple(state_mask.tolist()),
        tuple(action_mask.tolist()),
        roles_of(dataset),
    )


def _normaliser(
    mode: str, statistics: Statistics, mask: NDArray[np.bool_], rows: int, source: str
) -> Normaliser:
    """Rotations and absent dimensions as they are, grippers between fixed ends, the rest by `mode`."""
    kinds = [
        RAW if not has or "rot6d" in name else BOUNDS if "gripper" in name else SCALED
        for name, has in zip(NAMES, mask.tolist(), strict=True)
    ]
    grippers = np.array([kind == BOUNDS for kind in kinds])
    ends = {
        "min": np.where(grippers, 0.0, statistics["min"]),
        "max": np.where(grippers, 1.0, statistics["max"]),
    }
    return make_normaliser(mode, {**statistics, **ends}, names=NAMES, kinds=kinds, frames=rows, source=source)


def space_of(members: Sequence[Scaled], fps: int) -> Space:
    """What the policy sees and does: scaled unified vectors, so that the space itself scales nothing."""
    known = [role for role in ROLES if any(role in member.cameras for member in members)]
    dims = np.logical_or.reduce([np.array(member.action_mask) for member in members])
    nothing = np.zeros(DIM)
    return Space(
        cameras=tuple(CAMERA_PREFIX + role for role in known),
        state_mean=(0.0,) * (2 * DIM),
        state_std=(1.0,) * (2 * DIM),
        action=make_normaliser("identity", {"zero": nothing}, names=NAMES, kinds=(RAW,) * DIM),
        fps=fps,
        dims=tuple(dims.tolist()),
        action_names=NAMES,
        gripper_one_means="open",
        conventions={"action": "unified", "state": "unified vector and its mask"},
    )


def unified_spec(spec: Any, fps: int) -> Any:
    """The recipe's spec at the common rate; targets are joined here, by each dataset's own rate."""
    from dataclasses import replace

    return replace(spec, fps=float(fps), targets=(), normalise={})


def at_rate(request: str, rate: int, fps: int) -> str:
    """A request's offsets, counted in steps at `fps`, as frames of a dataset that runs at `rate`."""
    parsed = parse_request(request)
    scaled = [round(offset * rate / fps) for offset in parsed.at]
    stage, _, rest = request.partition(":")
    words = [word for word in rest.split(",") if word and not word.strip().startswith("at=")]
    return f"{stage}:{','.join([*words, 'at=' + '|'.join(map(str, scaled))])}"


def _targets(recipe: Recipe, config: Any, dataset: Dataset, folder: Path | None, fps: int) -> Targets:
    requests, horizon = recipe.targets(config)
    main = roles_of(dataset).get("main", "").removeprefix(CAMERA_PREFIX)
    own = [at_rate(text, dataset.fps, fps) for text in requests]
    own = [text if "cam=" in text or not main else f"{text},cam={main}" for text in own]
    expect = {parse_request(text).stage: {"fps": dataset.fps} for text in requests}
    return open_targets(dataset, own, horizon, folder, expect)


def merge_facts(
    facts: Sequence[Mapping[str, Any]], frames: Sequence[int], datasets: Sequence[Dataset]
) -> dict[str, Any]:
    """Facts of one cache over all of them: means and deviations pooled by frames, the rest the same for all."""
    merged = dict(facts[0])
    if "mean" not in merged:
        return merged
    for dataset, each in zip(datasets, facts, strict=True):
        if each.get("arrays"):
            raise UsageError(
                f"{dataset.name}: its features were reduced to directions of their own (--pca), which mean something "
                "else in every dataset\n  next: dpipe precompute foresight, without --pca, for each"
            )
        for name in ("tokens", "channels"):
            if each[name] != merged[name]:
                raise UsageError(
                    f"features of {dataset.name} have {each[name]} {name}, of {datasets[0].name} {merged[name]}\n"
                    "  next: dpipe precompute foresight with the same --tower, --pool and --image-size for each"
                )
    share = np.array(frames, np.float64)[:, None] / sum(frames)
    mean = np.array([each["mean"] for each in facts])
    deviation = np.array([each["std"] for each in facts])
    pooled = (share * mean).sum(axis=0)
    spread = (share * (deviation**2 + (mean - pooled) ** 2)).sum(axis=0)
    return merged | {"mean": pooled.tolist(), "std": np.sqrt(spread).tolist()}


def _hold_to_one_tower(folders: Sequence[Mapping[str, TargetFolder]], datasets: Sequence[Dataset]) -> None:
    """Features of different towers are no one feature."""
    for dataset, each in zip(datasets, folders, strict=True):
        for stage, folder in each.items():
            first = folders[0][stage].contract
            shared = {name: getattr(first, name) for name in ("model", "weights", "layer")}
            folder.contract.check(f"{folder.path} ({dataset.name})", **shared)


def _weights(datasets: Sequence[Dataset], wanted: Mapping[str, float]) -> list[float | None]:
    names = [dataset.name for dataset in datasets]
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        raise UsageError(f"weights name {', '.join(unknown)}\n  known: {', '.join(names)}")
    if wanted and len(wanted) < len(names):
        raise UsageError(
            f"weights are for all datasets or none; missing: {', '.join(sorted(set(names) - set(wanted)))}"
        )
    return [float(wanted[name]) if wanted else None for name in names]


def _told(datasets: Sequence[Dataset], shares: Sequence[float | None], fps: int) -> str:
    amounts = [d.total_frames if share is None else share for d, share in zip(datasets, shares, strict=True)]
    parts = [
        f"{dataset.name} {amount / sum(amounts):.0%}"
        for dataset, amount in zip(datasets, amounts, strict=True)
    ]
    return f"mixing {', '.join(parts)} through the unified vector, {fps} steps a second"
