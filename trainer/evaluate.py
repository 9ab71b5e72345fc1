"""Closed loop: a trained policy moves the tabletop simulator, and succeeds or does not.

    report = evaluate(Path("runs/libra/libero"), episodes=200)

Only runs trained on the tabletop's own recordings are judged: nothing else says what the instructions mean.
Every episode is a seed: the same scenes and starting moments for every policy, drawn as the sample data draws
theirs (a third of them after a fumble), none of which lies in the sample data (seeds from SEED on).
Environments run in step, so one network call serves them all; the latency table is measured separately, on one
environment, as a robot would meet it. Success is the simulator's own: the named object lies in the named
container and nothing holds it.

Beside it stands the error of single actions: on the expert's own episodes of later seeds, how far the action that
the policy would take is from the one the expert took. It tells policies apart that all fail in closed loop.

Controls  `blind` shows the policy a grey picture, `language=False` an empty instruction; the rest is the same.
Interval  Wilson's score interval at 95 % (Wilson, 1927).
"""

import inspect
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..samples.clip import write_clip
from ..samples.motion import record, start
from ..samples.tabletop import COLOURS, FPS, GOALS, SHAPES, Observation, Tabletop
from ..schemas.errors import DataError, UsageError
from ..streams.dataset import open_dataset
from ..streams.rows import Fit
from .loop import Say, write_atomically
from .policy import Policy
from .run import Trained, open_run
from .space import Space

SEED = 1_000_000  # episodes of the sample data are numbered from 0
LIMIT = 160  # steps, 8 s: the scripted expert needs about 70
CAMERAS = {"observation.images.image": "front", "observation.images.image2": "wrist"}
GREY = 128
FILMED = 4  # episodes of the strip and the video
# What the tabletop asks for, in the wordings its recordings have.
SENTENCE = re.compile(
    f"pick (up )?the ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) and ({'|'.join(GOALS.values())})"
)


@dataclass(frozen=True)
class Report:
    """What an evaluation found. `latency` is milliseconds by part of the policy, on one environment."""

    run: str
    recipe: str
    step: int
    episodes: int
    successes: int
    low: float
    high: float
    grasped: int  # the named object was held at some moment
    wrong: int  # another object was
    mean_steps: float  # of the successful episodes
    arm_error: float  # mean |action - expert's| of the six arm dimensions, in the simulator's units
    gripper_error: float  # share of gripper commands unlike the expert's
    seed: int
    objects: int
    condition: str
    latency: Mapping[str, Mapping[str, float]]

    @property
    def success(self) -> float:
        return self.successes / self.episodes

    @property
    def file_name(self) -> str:
        return "evaluation-" + self.condition.replace(" ", "-")

    def files(self, run_dir: Path) -> list[Path]:
        """What the evaluation left in the run's folder."""
        names = (f"{self.file_name}.{kind}" for kind in ("json", "png", "mp4"))
        return [run_dir / name for name in names if (run_dir / name).is_file()]

    @property
    def message(self) -> str:
        parts = ", ".join(f"{name} {told['median']:.1f} ms" for name, told in self.latency.items())
        return (
            f"{self.recipe}, {self.condition}: {self.successes} of {self.episodes} episodes, "
            f"{self.success:.1%} [{self.low:.1%}, {self.high:.1%}]"
            f"; grasped {self.grasped}, wrong object {self.wrong}\n"
            f"  off the expert's actions by {self.arm_error:.3f} (arm), {self.gripper_error:.1%} (gripper)"
            + (f"\n  {parts}" if parts else "")
        )


@dataclass(frozen=True)
class Outcome:
    """How one episode ended."""

    success: bool
    grasped: bool
    wrong: bool
    steps: int


def wilson(successes: int, episodes: int, z: float = 1.959964) -> tuple[float, float]:
    """Score interval of a proportion: never beyond [0, 1], and not empty at 0 or 1."""
    if episodes == 0:
        return 0.0, 1.0
    p, n = successes / episodes, episodes
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Rounding must not push the share itself out of its interval.
    return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))


def evaluate(
    run_dir: Path,
    *,
    episodes: int = 200,
    seed: int = SEED,
    objects: int = 3,
    blind: bool = False,
    language: bool = True,
    limit: int = LIMIT,
    device: str = "cpu",
    options: Mapping[str, Any] | None = None,
    video: bool = False,
    say: Say = print,
) -> Report:
    """Roll a run's newest checkpoint out; writes evaluation-<condition>.json and .png beside it.

    `options` go to the recipe's policy (libra: `refine=False` executes the planner's bins). `video` writes
    evaluation-<condition>.mp4 too.
    """
    trained = open_run(run_dir, device)
    check_tabletop(trained, run_dir)
    policy = make_policy(trained, seed, options or {})
    size = frame_size(trained)
    table = Tabletop(objects, RENDERED)
    condition = _condition(blind, language, options or {})
    strip: list[Filmed] = []
    outcomes: list[Outcome] = []
    for first in range(0, episodes, TOGETHER):
        seeds = range(seed + first, seed + min(episodes, first + TOGETHER))
        film = strip if first == 0 else None
        outcomes += roll_out(policy, seeds, size, objects, blind, language, limit, film)
        won = sum(outcome.success for outcome in outcomes)
        say(f"evaluate {condition}: {len(outcomes)} of {episodes} episodes, {won} successful")
    successes = sum(outcome.success for outcome in outcomes)
    low, high = wilson(successes, episodes)
    later = range(seed + episodes, seed + episodes + EXPERT_EPISODES)
    arm_error, gripper_error = expert_error(policy, later, size, objects, blind, language)
    report = Report(
        run=run_dir.name,
        recipe=trained.recipe.name,
        step=trained.step,
        episodes=episodes,
        successes=successes,
        low=low,
        high=high,
        grasped=sum(outcome.grasped for outcome in outcomes),
        wrong=sum(outcome.wrong for outcome in outcomes),
        mean_steps=float(np.mean([o.steps for o in outcomes if o.success] or [0])),
        arm_error=arm_error,
        gripper_error=gripper_error,
        seed=seed,
        objects=objects,
        condition=condition,
        latency=latency(make_policy(trained, seed, options or {}), table, size),
    )
    name = report.file_name
    write_atomically(run_dir / f"{name}.json", json.dumps(asdict(report), indent=1) + "\n")
    save_strip(run_dir / f"{name}.png", strip)
    if video:
        save_video(run_dir / f"{name}.mp4", strip)
    return report


RENDERED = 128  # px, as the sample recordings
TOGETHER = 50  # environments in step
EXPERT_EPISODES, EXPERT_STRIDE = 20, 4  # for the error of single actions


def _condition(blind: bool, language: bool, options: Mapping[str, Any]) -> str:
    words = [word for word, on in (("blind", blind), ("no language", not language)) if on]
    words += [f"{name} {value}" for name, value in sorted(options.items())]
    return ", ".join(words).replace(",", "") or "as trained"


def make_policy(trained: Trained, seed: int, options: Mapping[str, Any]) -> Policy:
    """The recipe's policy; UsageError where it has no such option."""
    known = set(inspect.signature(trained.recipe.policy).parameters) - {"model", "seed"}
    if unknown := sorted(set(options) - known):
        told = f"has {', '.join(sorted(known))}" if known else "has none"
        raise UsageError(f"{trained.recipe.name} has no option {', '.join(unknown)} at work: it {told}")
    return trained.recipe.policy(trained.model, seed, **options)


def frame_size(trained: Trained) -> tuple[int, int] | None:
    """(height, width) the stream fitted frames to in training."""
    return trained.recipe.spec(trained.config, trained.space, trained.facts).size


# -- between simulator and policy -------------------------------------------------------------------------


class Senses(Mapping[str, NDArray[np.uint8]]):
    """The cameras of environments in step, rendered when a policy looks: most steps of a chunk it does not."""

    def __init__(self, seen: Sequence[Observation], space: Space, size: tuple[int, int] | None, blind: bool):
        self._seen, self._space, self._fit, self._blind = seen, space, Fit(size), blind

    def __getitem__(self, camera: str) -> NDArray[np.uint8]:
        frames = []
        for seen in self._seen:
            frame = getattr(seen, CAMERAS[camera])
            if self._blind:
                frame = np.full_like(frame, GREY)
            frame = as_recorded(frame, self._space.conventions)
            height, width = self._fit.size or frame.shape[:2]
            out = np.empty((height, width, 3), np.uint8)
            self._fit.apply(np.ascontiguousarray(frame), out)
            frames.append(out)
        return np.stack(frames)

    def __iter__(self) -> Iterator[str]:
        return iter(self._space.cameras)

    def __len__(self) -> int:
        return len(self._space.cameras)


def as_recorded(frame: NDArray[np.uint8], conventions: Mapping[str, Any]) -> NDArray[np.uint8]:
    """An upright frame as the dataset has it: LIBERO stores it upside down, and rot180 mirrors it back."""
    rotation = conventions.get("image_rotation", "vflip")
    return {"raw": frame[::-1], "rot180": frame[:, ::-1], "vflip": frame}[rotation]


def robot_state(seen: Observation) -> NDArray[np.float64]:
    """[8]: position, axis-angle, two fingers: LIBERO's observation.state."""
    return np.concatenate([seen.ee_pos, seen.ee_rotvec, seen.gripper_qpos]).astype(np.float64)


def native_actions(actions: NDArray[np.float64], conventions: Mapping[str, Any]) -> NDArray[np.float64]:
    """[B, 7] as the dataset writes them -> as the simulator takes them: gripper -1 open, +1 close."""
    meaning = conventions.get("gripper_action", {"open": -1, "close": 1})
    native = np.array(actions, dtype=np.float64)
    middle = (meaning["open"] + meaning["close"]) / 2
    closing = (native[:, 6] - middle) * (meaning["close"] - meaning["open"]) > 0
    native[:, 6] = np.where(closing, 1.0, -1.0)
    return native


def check_tabletop(trained: Trained, run_dir: Path) -> None:
    """The run's dataset is one of the tabletop's, told by its instructions."""
    check_embodiment(trained.space)
    root = Path(trained.provenance.get("dataset_root", ""))
    tasks = trained.provenance.get("tasks")
    if tasks is None and (root / "meta").is_dir():  # a run of before its tasks were kept
        tasks = open_dataset(root).tasks
    strange = [task for task in tasks or () if not SENTENCE.fullmatch(task.lower())]
    if strange or not tasks:
        found = f"'{strange[0]}'" if strange else f"no instructions, and no dataset in {root}"
        raise DataError(
            f"{run_dir} was not trained on the tabletop's recordings\n"
            f"  expected instructions like 'pick up the red cube and {GOALS['tray']}', found {found}\n"
            "  Closed loop needs the simulator the data come from; for this policy take its own, through\n"
            "  lerobot's interface.  Recordings that can be judged here:  dpipe sample libero"
        )


def check_embodiment(space: Space) -> None:
    """Only what the simulator's robot has and does can be rolled out in it."""
    problems = []
    if space.conventions.get("action", "osc_pose_delta") != "osc_pose_delta" or space.action_dim != 7:
        problems.append(f"action: {space.action_dim} dimensions, {space.conventions.get('action', '?')}")
    if space.state_dim != 8:
        problems.append(f"state: {space.state_dim} dimensions")
    if unknown := [camera for camera in space.cameras if camera not in CAMERAS]:
        problems.append(f"cameras: {', '.join(unknown)}")
    if problems:
        raise DataError(
            "the tabletop simulator is a Panda as LIBERO records it: state 8, OSC pose deltas 7, "
            "cameras image and image2\n  found " + "; ".join(problems)
        )


@dataclass
class Filmed:
    """What the cameras saw of one episode, step by step, for strip and video."""

    instruction: str
    frames: list[NDArray[np.uint8]]  # front views
    wrist: list[NDArray[np.uint8]]
    success: bool = False


def roll_out(
    policy: Policy,
    seeds: Sequence[int],
    size: tuple[int, int] | None,
    objects: int = 3,
    blind: bool = False,
    language: bool = True,
    limit: int = LIMIT,
    film: list[Filmed] | None = None,
) -> list[Outcome]:
    """Episodes of `seeds`, in step; `film` collects the first FILMED of them."""
    check_embodiment(policy.space)
    tables = [Tabletop(objects, RENDERED) for _ in seeds]
    seen = [start(table, seed) for table, seed in zip(tables, seeds, strict=True)]
    texts = [table.instruction if language else "" for table in tables]
    count = len(tables)
    steps = np.full(count, limit)
    done, grasped, wrong = (np.zeros(count, bool) for _ in range(3))
    if film is not None:
        first = zip(tables[:FILMED], seen, strict=False)
        film.extend(Filmed(table.instruction, [one.front], [one.wrist]) for table, one in first)
    policy.reset()
    for step in range(limit):
        senses = Senses(seen, policy.space, size, blind)
        state = np.stack([robot_state(one) for one in seen])
        actions = native_actions(policy.act(senses, state, texts), policy.space.conventions)
        for i in np.flatnonzero(~done):
            seen[i] = tables[i].step(actions[i])
            held = tables[i].held
            grasped[i] |= held == tables[i].task.target
            wrong[i] |= held is not None and held != tables[i].task.target
            if tables[i].success:
                done[i], steps[i] = True, step + 1
            if film is not None and i < len(film):
                film[i].frames.append(seen[i].front)
                film[i].wrist.append(seen[i].wrist)
                film[i].success = bool(done[i])
        if done.all():
            break
    return [
        Outcome(*map(bool, row[:3]), steps=int(row[3]))
        for row in zip(done, grasped, wrong, steps, strict=True)
    ]


def expert_error(
    policy: Policy,
    seeds: Sequence[int],
    size: tuple[int, int] | None,
    objects: int = 3,
    blind: bool = False,
    language: bool = True,
) -> tuple[float, float]:
    """(mean |arm action - expert's|, share of gripper commands unlike the expert's) on the expert's episodes."""
    seen, texts, wanted = [], [], []
    for seed in seeds:
        motion = record(seed, objects, RENDERED)
        moments = range(0, len(motion.actions), EXPERT_STRIDE)
        seen += [motion.seen[t] for t in moments]
        texts += [motion.instruction if language else ""] * len(moments)
        wanted.append(motion.actions[moments])
    expert = np.concatenate(wanted)
    policy.reset()
    state = np.stack([robot_state(one) for one in seen])
    told = policy.act(Senses(seen, policy.space, size, blind), state, texts)
    actions = native_actions(told, policy.space.conventions)
    policy.reset()
    arm = np.abs(actions[:, :6] - expert[:, :6]).mean()
    return float(arm), float((actions[:, 6] != expert[:, 6]).mean())


def latency(
    policy: Policy, table: Tabletop, size: tuple[int, int] | None, steps: int = 60
) -> dict[str, dict[str, float]]:
    """Milliseconds of each part of the policy on one environment, after the first call of each."""
    seen = start(table, SEED - 1)
    policy.reset()
    for times in policy.clock.values():
        times.clear()
    for _ in range(steps):
        action = policy.act(
            Senses([seen], policy.space, size, False), robot_state(seen)[None], [table.instruction]
        )
        seen = table.step(native_actions(action, policy.space.conventions)[0])
    result = {}
    for name, times in policy.clock.items():
        if len(times) > 1:
            warm = np.array(times[1:])
            result[name] = {
                "calls": len(times),
                "median": float(np.median(warm)),
                "p90": float(np.quantile(warm, 0.9)),
            }
    return result


def save_strip(path: Path, episodes: Sequence[Filmed], columns: int = 9) -> None:
    """One row of front views per episode, evenly spaced in time, its instruction and outcome above."""
    from PIL import Image, ImageDraw

    if not episodes:
        return
    tile, gap = RENDERED, 16
    picture = Image.new("RGB", (columns * tile, len(episodes) * (tile + gap)), "white")
    draw = ImageDraw.Draw(picture)
    for row, episode in enumerate(episodes):
        top = row * (tile + gap)
        told = "done" if episode.success else "not done"
        draw.text((4, top + 2), f"{episode.instruction}: {told}", fill="black")
        chosen = (
            np.linspace(0, len(episode.frames) - 1, min(columns, len(episode.frames))).round().astype(int)
        )
        for column, index in enumerate(chosen):
            picture.paste(Image.fromarray(episode.frames[index]), (column * tile, top + gap))
    beside = path.with_name(f".{path.name}.tmp.png")
    picture.save(beside)
    beside.rename(path)


def save_video(path: Path, episodes: Sequence[Filmed]) -> None:
    """The filmed episodes side by side at the simulator's rate, front views above, the hand's below."""
    if not episodes:
        return
    last = max(len(episode.frames) for episode in episodes)

    def picture(step: int) -> NDArray[np.uint8]:
        """An episode that has ended keeps its last frame."""
        columns = [
            np.concatenate([views[min(step, len(views) - 1)] for views in (episode.frames, episode.wrist)])
            for episode in episodes
        ]
        return np.concatenate(columns, axis=1)

    beside = path.with_name(f".{path.stem}.tmp.mp4")
    write_clip(beside, (picture(step) for step in range(last)), FPS, "libx264")
    beside.rename(path)
