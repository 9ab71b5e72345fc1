"""Closed loop: a trained policy moves the tabletop simulator, and succeeds or does not.

    report = evaluate(Path("runs/libra/libero"), episodes=200)

Every episode is a seed: the same scenes and starting moments for every policy, drawn as the sample data draws
theirs (a third of them after a fumble), none of which lies in the sample data (seeds from SEED on).
Environments run in step, so one network call serves them all; the latency table is measured separately, on one
environment, as a robot would meet it. Success is the simulator's own: the named object lies in the named
container and nothing holds it.

Controls  `blind` shows the policy a grey picture, `language=False` an empty instruction; the rest is the same.
Interval  Wilson's score interval at 95 % (Wilson, 1927).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..samples.motion import start
from ..samples.tabletop import Observation, Tabletop
from ..schemas.errors import DataError
from ..streams.rows import Fit
from .loop import Say, write_atomically
from .policy import Policy
from .run import Trained, open_run
from .space import Space

SEED = 1_000_000  # episodes of the sample data are numbered from 0
LIMIT = 160  # steps, 8 s: the scripted expert needs about 70
CAMERAS = {"observation.images.image": "front", "observation.images.image2": "wrist"}
GREY = 128


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
    seed: int
    objects: int
    condition: str
    latency: Mapping[str, Mapping[str, float]]

    @property
    def success(self) -> float:
        return self.successes / self.episodes

    @property
    def message(self) -> str:
        parts = ", ".join(f"{name} {told['median']:.1f} ms" for name, told in self.latency.items())
        return (
            f"{self.recipe}, {self.condition}: {self.successes} of {self.episodes} episodes, "
            f"{self.success:.1%} [{self.low:.1%}, {self.high:.1%}]"
            f"; grasped {self.grasped}, wrong object {self.wrong}" + (f"\n  {parts}" if parts else "")
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
    say: Say = print,
) -> Report:
    """Roll a run's newest checkpoint out; writes evaluation-<condition>.json and .png beside it.

    `options` go to the recipe's policy (libra: `refine=False` executes the planner's bins).
    """
    trained = open_run(run_dir, device)
    policy = trained.recipe.policy(trained.model, seed, **(options or {}))
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
        seed=seed,
        objects=objects,
        condition=condition,
        latency=latency(trained.recipe.policy(trained.model, seed, **(options or {})), table, size),
    )
    name = "evaluation-" + condition.replace(" ", "-")
    write_atomically(run_dir / f"{name}.json", json.dumps(asdict(report), indent=1) + "\n")
    save_strip(run_dir / f"{name}.png", strip)
    return report


RENDERED = 128  # px, as the sample recordings
TOGETHER = 50  # environments in step


def _condition(blind: bool, language: bool, options: Mapping[str, Any]) -> str:
    words = [word for word, on in (("blind", blind), ("no language", not language)) if on]
    words += [f"{name} {value}" for name, value in sorted(options.items())]
    return ", ".join(words).replace(",", "") or "as trained"


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
    """Front views of one episode, for the strip."""

    instruction: str
    frames: list[NDArray[np.uint8]]
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
    """Episodes of `seeds`, in step; `film` collects the first four."""
    check_embodiment(policy.space)
    tables = [Tabletop(objects, RENDERED) for _ in seeds]
    seen = [start(table, seed) for table, seed in zip(tables, seeds, strict=True)]
    texts = [table.instruction if language else "" for table in tables]
    count = len(tables)
    steps = np.full(count, limit)
    done, grasped, wrong = (np.zeros(count, bool) for _ in range(3))
    if film is not None:
        film.extend(
            Filmed(table.instruction, [first.front]) for table, first in zip(tables[:4], seen, strict=False)
        )
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
            if film is not None and i < len(film) and (step % 10 == 9 or done[i]):
                film[i].frames.append(seen[i].front)
                film[i].success = bool(done[i])
        if done.all():
            break
    return [
        Outcome(*map(bool, row[:3]), steps=int(row[3]))
        for row in zip(done, grasped, wrong, steps, strict=True)
    ]


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
