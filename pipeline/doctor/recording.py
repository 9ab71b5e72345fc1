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
from .lags import SURE, LagCurve, chance_of_a_fit, describe_lag, lag_curve, pool_curves

if TYPE_CHECKING:
    from .subject import Subject

STATE, ACTION = "observation.state", "action"
LAGGED_EPISODES = 64  # whose time pairing is looked at by default, evenly spread
STILL_FRAMES = 10
MOST_ROW_HASHES = 20_000_000  # frames whose rows are compared between splits
UNSTEADY = "rot|angle|euler|quat|gripper|roll|pitch|yaw|vel|speed|acc|force|torque|effort|current|touch|theta"
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
    numbers: list[int] = field(default_factory=list)  # of the episodes in their dataset
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
    paired: list[tuple[NDArray[Any], NDArray[Any]]] = field(default_factory=list)  # action and state of some
    shared: list[str] = field(default_factory=list)  # names that action and state have in common
    fits: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # correlation of namesakes
    gaps: list[tuple[int, NDArray[np.float64]]] = field(default_factory=list)  # median distance of namesakes
    spans: list[tuple[int, NDArray[np.float64]]] = field(default_factory=list)  # what their state spans
    same: list[bool] = field(default_factory=list)  # the action is the state beside it
    grippers: list[Gripper] = field(default_factory=list)
    turns: dict[tuple[str, str, str], list[tuple[int, float]]] = field(default_factory=dict)  # largest angle
    rows: list[NDArray[np.uint64]] = field(default_factory=list)  # hash of each frame's action and state
    quantiles: dict[str, dict[str, tuple[NDArray[Any], NDArray[Any]]]] = field(default_factory=dict)
    rows_are_whole: bool = True  # every data file was read, with as many rows as its episodes have
    doubtful: set[str] = field(default_factory=set)  # columns already found wrong

    def add(self, episode: EpisodeRows) -> None:
        number = len(self.where)
        self.where.append(episode.where)
        self.numbers.append(episode.number)
        self.split.append(episode.split)
        self.text.append(episode.text)
        self.frames.append(episode.frames)
        self.names |= episode.names
        known = {name: episode.columns[name] for name in CONTENT_COLUMNS if name in episode.columns}
        self.content.append(episode_content(known, episode.frames) if known else "")
        if known and sum(self.frames) <= MOST_ROW_HASHES:
            self.rows.append(hash_rows([known[name] for name in sorted(known)]))
        for feature, kind, prefix, largest in largest_angles(episode):
            self.turns.setdefault((feature, kind, prefix), []).append((number, largest))
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
        self._compare_namesakes(number, action, state, episode.names)
        self.same.append(_action_is_state(action, state, episode.names))
        self.grippers += _grippers(number, action, state, episode.names)
        stride = 1 if self.level == Level.FULL else max(1, self.total // LAGGED_EPISODES)
        if number % stride == 0:
            curves = {kind: lag_curve(action, state, kind) for kind in ("delta", "absolute")}
            self.curves.append((number, {kind: c for kind, c in curves.items() if c is not None}))
            if len(self.paired) < LAGGED_EPISODES:
                self.paired.append((action.astype(np.float32), state.astype(np.float32)))

    def _compare_namesakes(
        self,
        number: int,
        action: NDArray[np.float64],
        state: NDArray[np.float64],
        names: Mapping[str, Sequence[str] | None],
    ) -> None:
        """Dimensions that action and state call alike: how they correlate, and how far apart they are."""
        mine, theirs = names.get(ACTION), names.get(STATE)
        if not mine or not theirs or len(action) < STILL_FRAMES:
            return
        shared = [name for name in mine if name in theirs]
        if not shared or len(set(shared)) < len(shared) or (self.shared and self.shared != shared):
            return
        self.shared = shared
        a = action[:, [list(mine).index(name) for name in shared]]
        s = state[:, [list(theirs).index(name) for name in shared]]
        for d, name in enumerate(shared):
            if a[:, d].std() > 1e-9 and s[:, d].std() > 1e-9:
                self.fits.setdefault(name, []).append((number, float(np.corrcoef(a[:, d], s[:, d])[0, 1])))
        self.gaps.append((number, np.median(np.abs(a - s), axis=0)))
        self.spans.append((number, np.ptp(s, axis=0)))

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
    names = episode.names.get(ACTION) or [""] * action.shape[1]
    hands = np.array([_levels(action[:, d]) < 3 or "gripper" in str(n).lower() for d, n in enumerate(names)])
    reach = np.where(hands, 0.0, np.ptp(action, axis=0))  # a hand may work while the arm rests
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
            if kind in ANGLES or not values[:, dims].any():
                continue  # angles are judged together; a hand that is not there is zeros throughout
            with np.errstate(invalid="ignore"):
                bad = np.flatnonzero(rotation_error(kind, values[:, dims]) > 0)
            if len(bad):
                yield Found(
                    f"{episode.where}, frame {bad[0]}",
                    f"'{feature}' {prefix or kind}: {WRONG[kind]} in {len(bad)} frames "
                    f"({np.round(values[bad[0], dims], 3).tolist()})",
                )


ANGLES = ("axis-angle", "euler")
WRONG = {
    "quaternion": "length other than 1",
    "rot6d": "columns not of length 1 and orthogonal",
    "axis-angle": "a turn beyond 2 pi",
    "euler": "an angle beyond 2 pi",
}


def largest_angles(episode: EpisodeRows) -> list[tuple[str, str, str, float]]:
    """(feature, kind, what it is called, largest angle) of every rotation given by angles."""
    found = []
    for feature, names in episode.names.items():
        values = episode.floats(feature) if names else None
        if not names or values is None or values.shape[1] != len(names):
            continue
        for kind, prefix, dims in rotation_groups(names):
            if kind in ANGLES:
                angles = values[:, dims]
                size = np.linalg.norm(angles, axis=1) if kind == "axis-angle" else np.abs(angles).max(axis=1)
                found.append((feature, kind, prefix, float(size.max())))
    return found


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
    raise ValueError(f"{kind} is told by its size alone")


# --- all of them --------------------------------------------------------------------------------------------


@check("rotation", ALL, Level.SAMPLED)
def angles_have_one_unit(gathered: Gathered) -> Findings:
    """Angles beyond a turn in some episodes are in another unit, or wrong; in most of them, they are degrees."""
    for (feature, kind, prefix), found in gathered.turns.items():
        beyond = [(e, largest) for e, largest in found if largest > 2 * np.pi + 0.1]
        if 2 * len(beyond) > len(found) and len(found) > 1:
            largest = max(value for _, value in beyond)
            yield Found(
                "every episode", f"'{feature}' {prefix}: up to {largest:.3g}, so these are degrees", NOTE
            )
            continue
        for e, largest in beyond:
            yield Found(gathered.where[e], f"'{feature}' {prefix}: {WRONG[kind]} ({largest:.3g})")


@check("constant", ALL, Level.SAMPLED)
def something_changes(gathered: Gathered) -> Findings:
    """A whole vector that never changes: in one episode while it does in others, or in all of them.

    Where neither action nor state changes, nothing was done: a habit of people, not a fault of a sensor.
    """
    still = {}
    for name, lows in gathered.lows.items():
        if len({len(low) for low in lows}) == 1 and len(lows) == len(gathered.where):
            low, high = np.array(lows), np.array(gathered.highs[name])
            still[name] = (low == high).all(axis=1) & (np.array(gathered.frames) >= STILL_FRAMES)
    idle = (
        np.logical_and.reduce([*still.values()]) if len(still) == 2 else np.zeros(len(gathered.where), bool)
    )
    for name, own in still.items():
        if own.all():
            yield Found("every episode", f"'{name}' never changes")
            continue
        for e in np.flatnonzero(own):
            what = f"'{name}' never changes in {gathered.frames[e]} frames"
            yield Found(gathered.where[e], what, NOTE if idle[e] else ERROR)
        low, high = np.array(gathered.lows[name]), np.array(gathered.highs[name])
        dims = np.flatnonzero(low.min(axis=0) == high.max(axis=0))
        if len(dims):
            names = gathered.names.get(name)
            listed = ", ".join(str(names[d]) if names and d < len(names) else str(d) for d in dims[:6])
            yield Found("every episode", f"'{name}' never changes in {listed}", NOTE)
    if len(still) == 2:
        yield from _stuck_dimensions(gathered)


def _stuck_dimensions(gathered: Gathered) -> Findings:
    """A joint that stands still in one episode though commanded to move, and moves in all the others."""
    mine, theirs = gathered.names.get(ACTION), gathered.names.get(STATE)
    if not mine or not theirs or len(gathered.where) < 3:
        return
    reach = {name: np.array(gathered.highs[name]) - np.array(gathered.lows[name]) for name in (ACTION, STATE)}
    if reach[ACTION].shape[1] != len(mine) or reach[STATE].shape[1] != len(theirs):
        return
    for d, called in enumerate(theirs):
        if called not in mine or "gripper" in called.lower():
            continue  # a gripper on an object stands still, commanded or not
        commanded, measured = reach[ACTION][:, list(mine).index(called)], reach[STATE][:, d]
        stuck = (measured == 0) & (commanded > 0.2 * np.median(commanded)) & (commanded > 0)
        whole = (reach[STATE] == 0).all(axis=1)
        if 0 < stuck.sum() <= len(stuck) // 3:
            for e in np.flatnonzero(stuck & ~whole):
                yield Found(
                    gathered.where[e],
                    f"observation.state '{called}' never changes, though it is commanded to and does elsewhere",
                )


@check("jump", ALL, Level.SAMPLED)
def the_state_is_continuous(gathered: Gathered) -> Findings:
    """A step across half of what a dimension ever spans, many times any usual step; angles may wrap."""
    lows = gathered.lows.get(STATE, [])
    if len(lows) != len(gathered.largest_step) or not lows or len(lows) != len(gathered.where):
        return
    if len({len(low) for low in lows}) != 1:
        return
    span = np.array(gathered.highs[STATE]).max(axis=0) - np.array(lows).min(axis=0)
    usual = np.median(np.array(gathered.usual_step), axis=0)
    largest = np.array(gathered.largest_step)
    names = gathered.names.get(STATE) or [str(d) for d in range(len(span))]
    if len(names) != len(span):
        return
    steady = np.array([re.search(UNSTEADY, n.lower()) is None for n in names])
    smooth = steady & np.array([re.fullmatch(r"(.*_)?[xyz]|.*(joint|pos).*", n) is not None for n in names])
    # What is called otherwise is judged against itself: a step several times any of the other episodes'.
    ordered = np.sort(largest, axis=0)
    alone = steady & (largest > 4 * ordered[-2]) if len(largest) > 2 else np.zeros_like(largest, bool)
    turns = [np.abs(largest - turn) < 0.06 * turn for turn in (2 * np.pi, 360.0)]  # an angle that wraps
    sudden = (usual > 0) & (largest > 0.5 * span) & (largest > 8 * usual) & ~np.logical_or.reduce(turns)
    for e, d in np.argwhere(sudden & (smooth | alone)):
        yield Found(
            f"{gathered.where[e]}, frame {gathered.largest_at[e][d]}",
            f"observation.state '{names[d]}' steps by {largest[e, d]:.3g}; the usual step is below {usual[d]:.2g}",
        )


@check("contradiction", ALL, Level.SAMPLED)
def commands_and_states_of_one_name_agree(gathered: Gathered) -> Findings:
    """A command follows the state of its own name in all episodes but one, where it is negated, or another's."""
    for name, fits in gathered.fits.items():
        if len(fits) < 3:
            continue
        usual = float(np.median([fit for _, fit in fits]))
        below = [(e, fit) for e, fit in fits if fit < -0.5]
        if usual > 0.8 and len(below) * 3 <= len(fits):
            for e, fit in below:
                yield Found(
                    gathered.where[e],
                    f"action '{name}' runs against the state of that name (correlation {fit:.2f}, {usual:.2f} in "
                    "other episodes)",
                )
    yield from _other_commands(gathered)


def _other_commands(gathered: Gathered) -> Findings:
    """Commands far from the states of their names in one episode, and near in all others.

    What is usual is told by episodes in which the dimension moves. A gripper is not asked: told to close, it stays
    as far open as what it holds is wide, for as long as it holds it.
    """
    if len(gathered.gaps) < 3:
        return
    gaps = np.array([gap for _, gap in gathered.gaps])  # [E, D] in parts of what the state spans
    spans = np.array([reach for _, reach in gathered.spans])
    span = spans.max(axis=0) + 1e-12
    gaps, moves = gaps / span, spans > 0.1 * span
    asked = np.array([re.search("gripper|effector|claw", name.lower()) is None for name in gathered.shared])
    told = asked & (moves.sum(axis=0) >= 3)
    usual = np.array([np.median(gaps[moves[:, d], d]) if told[d] else np.inf for d in range(gaps.shape[1])])
    far = (gaps > 0.25) & (gaps > 6 * usual) & (usual < 0.1)
    if 0 < far.any(axis=1).sum() <= len(gaps) / 3:
        for row in np.flatnonzero(far.any(axis=1)):
            d = int(far[row].argmax())
            yield Found(
                gathered.where[gathered.gaps[row][0]],
                f"action '{gathered.shared[d]}' is {gaps[row, d]:.0%} of its range away from the state of that name, "
                f"{usual[d]:.0%} in other episodes",
            )


FACTORS = {57.29578: "degrees and radians", 1000.0: "metres and millimetres", 100.0: "metres and centimetres"}


@check("units", ALL, Level.SAMPLED)
def episodes_share_their_units(gathered: Gathered) -> Findings:
    """One episode whose every dimension spans a known factor more or less than in the others."""
    lows = gathered.lows.get(STATE, [])
    if len(lows) < 3 or len({len(low) for low in lows}) != 1 or len(lows) != len(gathered.where):
        return
    reach = np.array(gathered.highs[STATE]) - np.array(lows)
    usual = np.median(reach, axis=0)
    moving = usual > 1e-6
    if moving.sum() < 2:
        return
    ratio = (reach[:, moving] + 1e-12) / usual[moving]
    middle = np.median(ratio, axis=1)
    for factor, units in FACTORS.items():
        for sign in (1.0, -1.0):
            away = np.abs(np.log(middle) - sign * np.log(factor))
            alike = (np.abs(np.log(ratio) - sign * np.log(factor)) < np.log(3.0)).mean(axis=1)
            found = np.flatnonzero((away < np.log(1.8)) & (alike > 0.8))
            for e in found if len(found) * 3 <= len(lows) else []:
                yield Found(
                    gathered.where[e],
                    f"observation.state spans {middle[e]:.3g} times what it does elsewhere, as between {units}",
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
    chance = chance_of_a_fit(gathered.paired, kind)
    due = 1 if kind == "absolute" else 0
    # Slow motion fits nearly as well a frame away: a lag of one must be plain.
    plain = pooled.at(pooled.peak) - pooled.at(due) > (0.05 if pooled.lead == -1 else 0.02)
    copied = gathered.same and all(gathered.same)
    agree = sum(abs(c[kind].peak - pooled.peak) <= 1 for _, c in gathered.curves if kind in c)
    if len(gathered.curves) < 3:
        chance = max(chance, SURE)
    plain = plain and agree >= max(len(gathered.curves) * 2 / 3, min(len(gathered.curves), 4))
    late = pooled.lead < 0 and pooled.at(pooled.peak) > chance and not copied
    if late and pooled.lead == -1 and gathered.conventions.get("time_pairing") == "as-stored":
        # Asked for, and one frame is what it gives: said even where the data alone would not be sure of it.
        said = "as its conventions say (time_pairing as-stored)"
        yield Found("every episode", f"{describe_lag(pooled)}, {said}", NOTE)
    elif late and plain:
        yield Found("every episode", describe_lag(pooled), WARN)
    if len(gathered.curves) < 3:
        return
    for number, curves in gathered.curves:
        own = curves.get(kind)
        rest = [c for n, c in gathered.curves if n != number]
        others = pool_curves(rest)
        if own is None or others is None or others[0] != kind or others[1].at(others[1].peak) <= chance:
            continue
        usual = others[1]
        agree = sum(abs(c[kind].peak - usual.peak) <= 1 for c in rest if kind in c)
        far = abs(own.peak - usual.peak) >= 3 and own.at(own.peak) - own.at(usual.peak) > 0.15
        as_sure = own.clear and own.at(own.peak) > usual.at(usual.peak) - 0.2
        if far and as_sure and agree * 3 >= 2 * len(rest) and agree > 1:
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
                span = usual[1] - usual[0]
                far = max(abs(a - b) for a, b in zip(pair, usual, strict=True)) > span / 4
                if pair != usual and far:  # how far to close may well depend on the object
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
                "" if names else NOTE,  # where nothing is named, nothing is misnamed
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
