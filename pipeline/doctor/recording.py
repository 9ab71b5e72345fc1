"""What one episode's numbers say, and what all of them say together, whether they lie in a dataset or in raw files.

Checks on one episode need nothing else. What needs the others (whether a gripper is turned round, an episode is
there twice, a column is early) is gathered in a few numbers an episode and judged at the end.

Legend  T frames of an episode, D dimensions, K lags either way, E episodes
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...schemas.problems import ERROR, NOTE, WARN
from ...schemas.statistics import QUANTILES
from ...streams.dataset import CONTENT_COLUMNS, episode_content
from .checks import ALL, EPISODE, Findings, Found, Level, check
from .lags import LagCurve, describe_lag, lag_curve, pool_curves

if TYPE_CHECKING:
    from .subject import Subject

STATE, ACTION = "observation.state", "action"
LAGGED_EPISODES = 64  # whose time pairing is looked at by default, evenly spread
STILL_FRAMES = 10
MOST_ROW_HASHES = 20_000_000  # frames whose rows are compared between splits
GENERIC_NAME = re.compile(r"(?:[a-z]+[_.]?)?\d+", re.I)


@dataclass(frozen=True)
class EpisodeRows:
    """One episode's numeric columns [T, D] with the names of their dimensions where they have some."""

    where: str
    number: int
    split: str
    text: str
    fps: int
    columns: Mapping[str, NDArray[Any]]
    names: Mapping[str, Sequence[str] | None]

    @property
    def frames(self) -> int:
        return min((len(column) for column in self.columns.values()), default=0)

    def floats(self, name: str) -> NDArray[np.float64] | None:
        """A column [T, D] as float64 when it is finite, else None."""
        column = self.columns.get(name)
        if column is None or column.dtype.kind not in "fiub" or not len(column):
            return None
        values = column.astype(np.float64).reshape(len(column), -1)
        return values if np.isfinite(values).all() else None


@dataclass(frozen=True)
class Gripper:
    """One gripper dimension of the action in one episode."""

    episode: int
    dim: int
    low: float
    high: float
    levels: int  # distinct values, counted to 3
    opening: float  # correlation of the command with the opening that follows; nan where that cannot be told


@dataclass
class Gathered:
    """A few numbers of every episode, in order."""

    total: int  # episodes there will be
    level: Level
    subject: Subject | None = None
    conventions: Mapping[str, Any] = field(default_factory=dict)
    names: dict[str, Sequence[str] | None] = field(default_factory=dict)
    where: list[str] = field(default_factory=list)
    split: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    lows: dict[str, list[NDArray[np.float64]]] = field(default_factory=dict)
    highs: dict[str, list[NDArray[np.float64]]] = field(default_factory=dict)
    largest_step: list[NDArray[np.float64]] = field(default_factory=list)  # of the state, by dimension
    largest_at: list[NDArray[np.int64]] = field(default_factory=list)
    usual_step: list[NDArray[np.float64]] = field(default_factory=list)  # 95 % of steps are smaller
    curves: list[tuple[int, Mapping[str, LagCurve]]] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)  # the action is the state beside it
    grippers: list[Gripper] = field(default_factory=list)
    rows: list[NDArray[np.uint64]] = field(default_factory=list)  # hash of each frame's action and state
    quantiles: dict[str, dict[str, tuple[NDArray[Any], NDArray[Any]]]] = field(default_factory=dict)
    rows_are_whole: bool = True  # every data file was read, with as many rows as its episodes have
    doubtful: set[str] = field(default_factory=set)  # columns already found wrong

    def add(self, episode: EpisodeRows) -> None:
        number = len(self.where)
        self.where.append(episode.where)
        self.split.append(episode.split)
        self.text.append(episode.text)
        self.frames.append(episode.frames)
        self.names |= episode.names
        known = {name: episode.columns[name] for name in CONTENT_COLUMNS if name in episode.columns}
        self.content.append(episode_content(known, episode.frames) if known else "")
        if known and sum(self.frames) <= MOST_ROW_HASHES:
            self.rows.append(hash_rows([known[name] for name in sorted(known)]))
        action, state = episode.floats(ACTION), episode.floats(STATE)
        for name, values in ((ACTION, action), (STATE, state)):
            if values is not None:
                self.lows.setdefault(name, []).append(values.min(axis=0))
                self.highs.setdefault(name, []).append(values.max(axis=0))
        if self.subject is not None and not self.subject.ours:
            self._widen_quantiles(episode)
        if state is not None and len(state) > 1:
            steps = np.abs(np.diff(state, axis=0))
            self.largest_step.append(steps.max(axis=0))
            self.largest_at.append(steps.argmax(axis=0) + 1)
            self.usual_step.append(np.quantile(steps, 0.95, axis=0))
        if action is None or state is None or len(action) != len(state):
            return
        self.same.append(_action_is_state(action, state, episode.names))
        self.grippers += _grippers(number, action, state, episode.names)
        stride = 1 if self.level == Level.FULL else max(1, self.total // LAGGED_EPISODES)
        if number % stride == 0:
            curves = {kind: lag_curve(action, state, kind) for kind in ("delta", "absolute")}
            self.curves.append((number, {kind: c for kind, c in curves.items() if c is not None}))

    def _widen_quantiles(self, episode: EpisodeRows) -> None:
        """Smallest and largest quantile of any episode, one place either way: lerobot's lie between.

        Its histograms tell a quantile to the value it falls on, not between two; dataset quantiles are means of
        those of the episodes (0.4 to 0.6.1) or their envelope (0.6.2).
        """
        for name in episode.columns:
            values = episode.floats(name)
            if values is None:
                continue
            ordered, count = np.sort(values, axis=0), len(values)
            known = self.quantiles.setdefault(name, {})
            for entry, q in QUANTILES.items():
                below = ordered[max(0, int(np.floor(q * count)) - 1)]
                above = ordered[min(count - 1, int(np.ceil(q * count)) + 1)]
                low, high = known.get(entry, (below, above))
                known[entry] = (np.minimum(low, below), np.maximum(high, above))


def hash_rows(columns: Sequence[NDArray[Any]]) -> NDArray[np.uint64]:
    """[T] one number a frame over its values as float32: equal rows have equal numbers."""
    words = [
        np.ascontiguousarray(c.reshape(len(c), -1), "<f4").view("<u4").astype(np.uint64) for c in columns
    ]
    together = np.concatenate([w[: min(map(len, words))] for w in words], axis=1)
    factors = np.random.default_rng(8).integers(1, 1 << 63, together.shape[1], dtype=np.uint64) | np.uint64(1)
    mixed = (together + np.uint64(0x9E3779B97F4A7C15)) * factors
    return (mixed ^ (mixed >> np.uint64(29))).sum(axis=1, dtype=np.uint64)


# --- one episode --------------------------------------------------------------------------------------------


@check("not-finite", EPISODE, Level.SAMPLED)
def values_are_finite(episode: EpisodeRows) -> Findings:
    for name, column in episode.columns.items():
        if column.dtype.kind == "f":
            bad = np.flatnonzero(~np.isfinite(column.reshape(len(column), -1)).all(axis=1))
            if len(bad):
                yield Found(
                    f"{episode.where}, frame {bad[0]}", f"'{name}' is not finite in {len(bad)} frames"
                )


@check("stale", EPISODE, Level.SAMPLED)
def the_state_follows(episode: EpisodeRows) -> Findings:
    """A state that repeats itself exactly for a second while commands change is an old one, sent again."""
    state, action = episode.floats(STATE), episode.floats(ACTION)
    if (
        state is None
        or action is None
        or len(state) != len(action)
        or not (np.diff(state, axis=0) != 0).any()
    ):
        return
    still = np.concatenate([[False], (np.diff(state, axis=0) == 0).all(axis=1), [False]])
    edges = np.flatnonzero(np.diff(still.astype(np.int8)))
    reach = np.ptp(action, axis=0)
    for first, stop in zip(edges[::2], edges[1::2], strict=True):
        if stop - first < max(STILL_FRAMES, episode.fps):
            continue
        moved = np.ptp(action[first:stop], axis=0)
        if (moved[reach > 0] > 0.2 * reach[reach > 0]).any():
            yield Found(
                f"{episode.where}, frame {first}",
                f"observation.state repeats itself for {stop - first} frames while the action changes",
            )


@check("rotation", EPISODE, Level.SAMPLED)
def rotations_are_rotations(episode: EpisodeRows) -> Findings:
    """Quaternions of length 1, rot6d of two orthogonal unit columns, angles within a turn; told by their names."""
    for feature, names in episode.names.items():
        column = episode.columns.get(feature)
        if not names or column is None or column.dtype.kind != "f":
            continue
        values = column.astype(np.float64).reshape(len(column), -1)
        if values.shape[1] != len(names):
            continue
        for kind, prefix, dims in rotation_groups(names):
            with np.errstate(invalid="ignore"):
                bad = np.flatnonzero(rotation_error(kind, values[:, dims]) > 0)
            if len(bad):
                yield Found(
                    f"{episode.where}, frame {bad[0]}",
                    f"'{feature}' {prefix or kind}: {WRONG[kind]} in {len(bad)} frames "
                    f"({np.round(values[bad[0], dims], 3).tolist()})",
                )


WRONG = {
    "quaternion": "length other than 1",
    "rot6d": "columns not of length 1 and orthogonal",
    "axis-angle": "a turn beyond 2 pi",
    "euler": "an angle beyond 2 pi",
}


def rotation_groups(names: Sequence[str]) -> list[tuple[str, str, list[int]]]:
    """(kind, what they are called, dimensions) of every rotation the names tell of."""
    patterns = {
        "quaternion": (r"(.*?)(?:q|quat[_.]|quaternion[_.])([xyzw])", "xyzw"),
        "rot6d": (r"(.*?)rot6d_([0-5])", "012345"),
        "axis-angle": (r"(.*?)axis_angle_([xyz])", "xyz"),
        "euler": (r"(.*?)euler_([xyz])", "xyz"),
    }
    groups: list[tuple[str, str, list[int]]] = []
    for kind, (pattern, letters) in patterns.items():
        found: dict[str, dict[str, int]] = {}
        for d, name in enumerate(names):
            match = re.fullmatch(pattern, name)
            if match and "delta" not in name:
                found.setdefault(match[1], {})[match[2]] = d
        groups += [
            (kind, f"{prefix}{kind}", [dims[letter] for letter in letters])
            for prefix, dims in found.items()
            if set(dims) == set(letters)
        ]
    return groups


def rotation_error(kind: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """[T, n] -> [T], above 0 where these are no rotation."""
    if kind == "quaternion":
        return np.abs(np.linalg.norm(values, axis=1) - 1) - 1e-2
    if kind == "rot6d":
        a, b = values[:, :3], values[:, 3:]
        length = np.maximum(np.abs(np.linalg.norm(a, axis=1) - 1), np.abs(np.linalg.norm(b, axis=1) - 1))
        return np.maximum(length, np.abs((a * b).sum(axis=1))) - 1e-2
    if kind == "axis-angle":
        return np.linalg.norm(values, axis=1) - (2 * np.pi + 0.1)
    return np.abs(values).max(axis=1) - (2 * np.pi + 0.1)


# --- all of them --------------------------------------------------------------------------------------------


@check("constant", ALL, Level.SAMPLED)
def something_changes(gathered: Gathered) -> Findings:
    """A whole vector that never changes: in one episode while it does in others, or in all of them."""
    for name, lows in gathered.lows.items():
        if len({len(low) for low in lows}) != 1 or len(lows) != len(gathered.where):
            continue
        low, high = np.array(lows), np.array(gathered.highs[name])
        still = (low == high).all(axis=1) & (np.array(gathered.frames) >= STILL_FRAMES)
        if still.all():
            yield Found("every episode", f"'{name}' never changes")
        else:
            for e in np.flatnonzero(still):
                yield Found(
                    gathered.where[e], f"'{name}' never changes in {gathered.frames[e]} frames", ERROR
                )
        dims = np.flatnonzero(low.min(axis=0) == high.max(axis=0))
        if len(dims) and not still.all():
            names = gathered.names.get(name)
            listed = ", ".join(str(names[d]) if names and d < len(names) else str(d) for d in dims[:6])
            yield Found("every episode", f"'{name}' never changes in {listed}", NOTE)


@check("jump", ALL, Level.SAMPLED)
def the_state_is_continuous(gathered: Gathered) -> Findings:
    """A step across half of what a dimension ever spans, many times any usual step; angles may wrap."""
    lows = gathered.lows.get(STATE, [])
    names = gathered.names.get(STATE)
    if len(lows) != len(gathered.largest_step) or not lows or not names or len(lows) != len(gathered.where):
        return
    if len({len(low) for low in lows}) != 1:
        return
    span = np.array(gathered.highs[STATE]).max(axis=0) - np.array(lows).min(axis=0)
    usual = np.median(np.array(gathered.usual_step), axis=0)
    largest = np.array(gathered.largest_step)
    smooth = np.array([re.fullmatch(r"(.*_)?[xyz]|.*(joint|pos).*", n) is not None for n in names])
    smooth &= np.array([re.search("rot|angle|euler|quat|gripper|roll|pitch|yaw", n) is None for n in names])
    if len(smooth) != len(span):
        return
    for e, d in np.argwhere(smooth & (usual > 0) & (largest > 0.5 * span) & (largest > 8 * usual)):
        yield Found(
            f"{gathered.where[e]}, frame {gathered.largest_at[e][d]}",
            f"observation.state '{names[d]}' steps by {largest[e, d]:.3g}; the usual step is below {usual[d]:.2g}",
        )


@check("action-is-state", ALL, Level.SAMPLED)
def the_action_is_no_copy(gathered: Gathered) -> Findings:
    if gathered.same and all(gathered.same):
        yield Found("every episode", "the action of each frame equals the state beside it, value for value")


@check("time-pairing", ALL, Level.SAMPLED)
def actions_lead_the_state(gathered: Gathered) -> Findings:
    """The command of a frame shows in the states after it, and by as many frames in one episode as in another."""
    found = pool_curves([curves for _, curves in gathered.curves])
    if found is None:
        return
    kind, pooled = found
    if pooled.lead < 0 and pooled.clear and not (gathered.same and all(gathered.same)):
        asked = gathered.conventions.get("time_pairing") == "as-stored"
        yield Found("every episode", describe_lag(pooled), NOTE if asked else WARN)
    if len(gathered.curves) < 3:
        return
    for number, curves in gathered.curves:
        own = curves.get(kind)
        if own is None:
            continue
        others = pool_curves([c for n, c in gathered.curves if n != number])
        if others is None or others[0] != kind:
            continue
        usual = others[1]
        if own.clear and abs(own.peak - usual.peak) >= 3 and own.at(own.peak) - own.at(usual.peak) > 0.15:
            yield Found(
                gathered.where[number],
                f"its actions move the state {own.peak - usual.peak:+d} frames from where they do in other "
                f"episodes (correlation {own.at(own.peak):.2f} there, {own.at(usual.peak):.2f} here)",
            )


@check("gripper-range", ALL, Level.SAMPLED)
def grippers_speak_one_language(gathered: Gathered) -> Findings:
    """Two-valued grippers take the same two values in every episode, and those that the conventions name."""
    declared = gathered.conventions.get("gripper_action")
    allowed = sorted(map(float, declared.values())) if isinstance(declared, dict) and declared else None
    for dim in sorted({gripper.dim for gripper in gathered.grippers}):
        own = [gripper for gripper in gathered.grippers if gripper.dim == dim]
        if allowed and len(allowed) == 2:
            for g in own:
                if g.low < allowed[0] - 1e-3 or g.high > allowed[1] + 1e-3:
                    yield Found(
                        gathered.where[g.episode],
                        f"gripper action spans {g.low:g} to {g.high:g}, the conventions allow {allowed}",
                    )
        pairs: dict[tuple[float, float], list[int]] = {}
        for g in own:
            if g.levels == 2:
                pairs.setdefault((round(g.low, 3), round(g.high, 3)), []).append(g.episode)
        if len(pairs) > 1 and len(own) == sum(map(len, pairs.values())):
            usual = max(pairs, key=lambda pair: len(pairs[pair]))
            for pair, episodes in pairs.items():
                if pair != usual:
                    yield Found(
                        gathered.where[episodes[0]],
                        f"gripper action takes {list(pair)}, in {len(pairs[usual])} other episodes {list(usual)}",
                    )


@check("gripper-polarity", ALL, Level.SAMPLED)
def grippers_agree_on_open(gathered: Gathered) -> Findings:
    """The opening that follows a command: the same way in every episode, and the way the conventions say."""
    declared = gathered.conventions.get("gripper_action")
    for dim in sorted({gripper.dim for gripper in gathered.grippers}):
        told = [g for g in gathered.grippers if g.dim == dim and abs(g.opening) > 0.5]
        if not told:
            continue
        usual = np.sign(np.median([g.opening for g in told]))
        if isinstance(declared, dict) and {"open", "close"} <= set(declared):
            expected = np.sign(float(declared["open"]) - float(declared["close"]))
            if usual == -expected:
                yield Found(
                    "every episode",
                    f"the gripper closes on {declared['open']:g}, which the conventions call open",
                )
        for g in told if len(told) > 2 else []:
            if (
                np.sign(g.opening) == -usual
                and sum(np.sign(o.opening) == usual for o in told) > len(told) / 2
            ):
                yield Found(
                    gathered.where[g.episode], "its gripper command means the opposite of what others' mean"
                )


@check("feature-names", ALL, Level.SAMPLED)
def grippers_are_called_grippers(gathered: Gathered) -> Findings:
    """A two-valued action dimension without a name of its own is most likely a gripper nobody named."""
    names, lows = gathered.names.get(ACTION), gathered.lows.get(ACTION, [])
    if not lows or len({len(low) for low in lows}) != 1:
        return
    low, high = np.array(lows).min(axis=0), np.array(gathered.highs[ACTION]).max(axis=0)
    for dim in sorted({g.dim for g in gathered.grippers if g.levels == 2}):
        unnamed = not names or GENERIC_NAME.fullmatch(names[dim])
        if unnamed and (low[dim], high[dim]) in ((-1.0, 1.0), (0.0, 1.0)):
            yield Found(
                "meta/info.json",
                f"action dimension {dim} takes two values, as a gripper does, but is called "
                f"{names[dim] if names else 'nothing'}: lerobot would make it relative",
            )


@check("duplicate-episode", ALL, Level.SAMPLED)
def no_episode_is_there_twice(gathered: Gathered) -> Findings:
    seen: dict[tuple[str, str], int] = {}
    for e, content in enumerate(gathered.content):
        if not content:
            continue
        first = seen.setdefault((content, gathered.text[e]), e)
        if first != e and gathered.split[first] == gathered.split[e]:
            yield Found(gathered.where[e], f"has the actions, states and words of {gathered.where[first]}")


@check("split-leakage", ALL, Level.SAMPLED)
def splits_share_no_frames(gathered: Gathered) -> Findings:
    """Whole episodes by content, and episodes most of whose frames are frames of another split."""
    splits = sorted(set(gathered.split) - {""})
    if len(splits) < 2:
        return
    home = "train" if "train" in splits else splits[0]
    seen: dict[str, int] = {}
    whole: set[int] = set()
    for e, content in enumerate(gathered.content):
        first = seen.setdefault(content, e) if content else e
        if gathered.split[first] != gathered.split[e]:
            whole.add(e)
            yield Found(
                gathered.where[e],
                f"is {gathered.where[first]} again: '{gathered.split[e]}' and '{gathered.split[first]}'",
            )
    if len(gathered.rows) != len(gathered.where):
        return
    train = [rows for rows, split in zip(gathered.rows, gathered.split, strict=True) if split == home]
    known = np.unique(np.concatenate(train)) if train else np.zeros(0, np.uint64)
    for e, rows in enumerate(gathered.rows):
        if gathered.split[e] in ("", home) or e in whole or len(np.unique(rows)) < STILL_FRAMES:
            continue
        shared = float(np.isin(rows, known).mean())
        if shared > 0.5:
            yield Found(
                gathered.where[e],
                f"{shared:.0%} of its frames are frames of '{home}' ('{gathered.split[e]}')",
            )


# --- parts --------------------------------------------------------------------------------------------------


def _action_is_state(
    action: NDArray[np.float64], state: NDArray[np.float64], names: Mapping[str, Sequence[str] | None]
) -> bool:
    """Every dimension the two share, by name or by position, is equal in every frame, and does change."""
    mine, theirs = names.get(ACTION), names.get(STATE)
    if mine and theirs:
        pairs = [(i, list(theirs).index(name)) for i, name in enumerate(mine) if name in theirs]
        if len(pairs) < max(2, len(mine) // 2):
            return False
    elif action.shape == state.shape:
        pairs = [(i, i) for i in range(action.shape[1])]
    else:
        return False
    a, s = action[:, [i for i, _ in pairs]], state[:, [j for _, j in pairs]]
    return bool(np.array_equal(a, s) and (np.ptp(a, axis=0) > 0).any())


def _grippers(
    number: int,
    action: NDArray[np.float64],
    state: NDArray[np.float64],
    names: Mapping[str, Sequence[str] | None],
) -> list[Gripper]:
    mine = names.get(ACTION)
    found = []
    opening = gripper_opening(state, names.get(STATE))
    for dim in range(action.shape[1]):
        command = action[:, dim]
        levels = _levels(command)
        named = bool(mine) and "gripper" in str(mine[dim]).lower() if mine else False
        if not named and levels != 2:
            continue
        follows = np.nan
        if named and opening is not None and sum("gripper" in str(n).lower() for n in mine or ()) == 1:
            follows = opening_correlation(command, opening)
        low, high = float(command.min()), float(command.max())
        found.append(Gripper(number, dim, low, high, levels, follows))
    return found


def _levels(values: NDArray[np.float64]) -> int:
    return min(3, len(np.unique(values)))


def gripper_opening(state: NDArray[np.float64], names: Sequence[str] | None) -> NDArray[np.float64] | None:
    """[T] how far the gripper is open, where the names tell: a width, or two fingers that part."""
    dims = [
        d
        for d, name in enumerate(names or ())
        if "gripper" in str(name).lower() and "action" not in str(name)
    ]
    called = [str((names or ())[d]) for d in dims]
    if len(dims) == 2 and {"left", "right"} == {name.rsplit("_", 1)[-1] for name in called}:
        left, right = state[:, dims[0]], state[:, dims[1]]
        # Two fingers of one hand mirror each other; two hands do not.
        return left - right if np.allclose(left, -right, atol=0.02) else None
    if len(dims) == 1 and re.search("width|open", called[0]):
        return state[:, dims[0]]
    return None


def opening_correlation(command: NDArray[np.float64], opening: NDArray[np.float64]) -> float:
    """Correlation of a command with the opening a little later; nan where either stands still."""
    best = np.nan
    for delay in range(1, min(16, len(command) // 3)):
        now, later = command[:-delay], opening[delay:]
        if now.std() < 1e-6 or later.std() < 1e-4:
            continue
        found = float(np.corrcoef(now, later)[0, 1])
        best = found if np.isnan(best) or abs(found) > abs(best) else best
    return best
