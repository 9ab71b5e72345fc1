"""How many frames lie between a command and the motion it causes, by cross-correlation.

An action that is a delta correlates with the step the state takes after it; an action that is a pose correlates,
in its own steps, with those of the state. Where the correlation peaks tells how the two columns are paired:

    delta     action[t] against state[t + k + 1] - state[t + k]; sound data peak at k >= 0
    absolute  action[t + 1] - action[t] against state[t + k + 1] - state[t + k]; at k >= 1, as the next pose has

Legend  T frames, A action dimensions, S state dimensions, lags k from -K to K
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FARTHEST = 12  # frames either way
SHORTEST = 24  # frames of an episode worth asking
MOST_DIMS = 32  # of each vector; more cost time and tell nothing new
CLEAR = 0.5  # correlation below which nothing is concluded
CLEARLY = 0.05  # by which a fit must exceed what other episodes give
SURE = 0.9  # correlation that is none of chance, whatever other episodes give: they may be alike
MOST_PAIRINGS, POOLED = 4, 16  # ways to pair episodes wrongly, and episodes in each


@dataclass(frozen=True)
class LagCurve:
    """Mean correlation at each lag [2 K + 1], over the action dimensions that follow the state at all."""

    kind: str
    values: NDArray[np.float64]

    @property
    def peak(self) -> int:
        """The lag of the largest correlation, in frames; of equal ones the one nearest to where it should be."""
        reach = len(self.values) // 2
        lags = np.arange(-reach, reach + 1)
        near = np.abs(lags - (1 if self.kind == "absolute" else 0))
        return int(lags[np.lexsort((near, -np.round(self.values, 6)))[0]])

    @property
    def lead(self) -> int:
        """Frames by which the action is ahead of what the state then does; below 0 it comes too late."""
        return self.peak - (1 if self.kind == "absolute" else 0)

    @property
    def clear(self) -> bool:
        return bool(self.values.max() >= CLEAR)

    def at(self, lag: int) -> float:
        reach = len(self.values) // 2
        return float(self.values[lag + reach]) if -reach <= lag <= reach else 0.0


def lag_curve(action: NDArray[np.float64], state: NDArray[np.float64], kind: str) -> LagCurve | None:
    """[T, A] and [T, S] -> the curve, None where too little moves to tell."""
    frames = len(action)
    if frames < SHORTEST:
        return None
    reach = min(FARTHEST, frames // 4)
    cause = action[:-1] if kind == "delta" else np.diff(action, axis=0)
    effect = np.diff(state, axis=0)
    # Two-valued columns (grippers) say when, but once or twice an episode.
    cause = cause[:, [d for d in range(cause.shape[1]) if len(np.unique(cause[:, d])) > 3]][:, :MOST_DIMS]
    effect = effect[:, np.ptp(effect, axis=0) > 0][:, :MOST_DIMS]
    if not cause.shape[1] or not effect.shape[1]:
        return None
    found = np.stack(
        [_correlation(cause, effect, lag) for lag in range(-reach, reach + 1)]
    )  # [2 K + 1, A, S]
    best = np.abs(found).max(axis=0)
    partner = best.argmax(axis=1)
    strength = best[np.arange(len(partner)), partner]
    told = strength >= CLEAR
    if not told.any():
        return None
    curve = np.abs(found[:, np.flatnonzero(told), partner[told]]).mean(axis=1)
    padded = np.zeros(2 * FARTHEST + 1)
    padded[FARTHEST - reach : FARTHEST + reach + 1] = curve
    return LagCurve(kind, padded)


def _correlation(cause: NDArray[np.float64], effect: NDArray[np.float64], lag: int) -> NDArray[np.float64]:
    """[n, A], [n, S] -> [A, S] correlation of cause[t] with effect[t + lag]; 0 where one stands still."""
    n = len(cause)
    a = cause[max(0, -lag) : n - max(0, lag)]
    b = effect[max(0, lag) : n - max(0, -lag)]
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    size = np.sqrt(np.outer((a**2).sum(axis=0), (b**2).sum(axis=0)))
    return np.divide(a.T @ b, size, out=np.zeros_like(size), where=size > 1e-12)


def pool_curves(curves: Sequence[Mapping[str, LagCurve]]) -> tuple[str, LagCurve] | None:
    """The kind that fits most, and its mean curve over episodes; None where no episode says anything."""
    pooled = {}
    for kind in ("delta", "absolute"):
        found = [each[kind].values for each in curves if kind in each]
        if found:
            pooled[kind] = LagCurve(kind, np.mean(found, axis=0))
    if not pooled:
        return None
    kind = max(pooled, key=lambda name: pooled[name].values.max())
    return kind, pooled[kind]


def chance_of_a_fit(pairs: Sequence[tuple[NDArray[np.floating], NDArray[np.floating]]], kind: str) -> float:
    """The pooled correlation that actions reach with states of other episodes, and some more; at least CLEAR."""
    best = 0.0
    for apart in range(1, min(len(pairs), MOST_PAIRINGS + 1)):
        curves = []
        for i, (action, _) in enumerate(pairs[:POOLED]):
            state = pairs[(i + apart) % len(pairs)][1]
            frames = min(len(action), len(state))
            curve = lag_curve(action[:frames].astype(np.float64), state[:frames].astype(np.float64), kind)
            curves.append({} if curve is None else {kind: curve})
        found = pool_curves(curves)
        best = max(best, found[1].at(found[1].peak) if found else 0.0)
    return max(CLEAR, min(best + CLEARLY, SURE))


def describe_lag(curve: LagCurve) -> str:
    due = 1 if curve.kind == "absolute" else 0
    return (
        f"{curve.kind} actions fit the state's motion best {-curve.lead} frames before they are given "
        f"(correlation {curve.at(curve.peak):.2f}, {curve.at(due):.2f} where they stand)"
    )
