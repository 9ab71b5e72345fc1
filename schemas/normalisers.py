"""Normalisers: how native action values become the numbers a policy predicts, named, recorded and hashed.

A target made under one normaliser is another target under the next, so a `Normaliser` is a value: every
number that shapes its output is a field, `digest` covers them all, and targets refuse to load beside another.

Each dimension has a kind
    scaled   the mode's formula, its clip, and its own answer where the data never changed
    binary   a two-valued gripper: +1 above the midpoint of `low` and `high`, else -1; never a quantile
    bounds   a gripper that opens by degrees: [low, high] to [-1, 1], clipped
    raw      passed through (OpenVLA's gripper in [0, 1])

Modes, for scaled dimensions (a: value; lo, hi: the statistics named)
    q01q99             2 (a - q01) / (q99 - q01 + 1e-8) - 1, clip +-1; 0 where min == max       OpenVLA
    q99_starvla        2 (a - q01) / (q99 - q01) - 1, clip +-2.2; a where q01 == q99            starVLA
    q99_dial           the same, clip +-1                                              DIAL's GR00T, GR00T q99
    openpi_quantiles   2 (a - q01) / (q99 - q01 + 1e-6) - 1, no clip                            openpi
    lerobot_quantiles  2 (a - q01) / (q99 - q01 or 1e-8) - 1, no clip                           lerobot 0.6.1
    minmax             2 (a - min) / (max - min + 1e-8) - 1, clip +-1; 0 where min == max
    gr00t_minmax       2 (a - min) / (max - min) - 1, clip +-1; 0 where min == max              GR00T
    lerobot_minmax     2 (a - min) / (max - min or 1e-8) - 1, no clip                           lerobot 0.6.1
    meanstd            (a - mean) / (std + 1e-6), no clip                                       GO-1, openpi
    gr00t_meanstd      (a - mean) / std, no clip; a where std == 0                              GR00T
    lerobot_meanstd    (a - mean) / (std + 1e-8), no clip                                       lerobot 0.6.1
    identity           a, which must already lie in [-1, 1]

Arithmetic is float64 and so is the result: bin edges are decided on it. Shapes: [..., D], D dimensions.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DataError, UsageError, unknown_name
from .statistics import STATISTICS, Blocks, exact_statistics

SCALED = "scaled"
BINARY = "binary"
BOUNDS = "bounds"
RAW = "raw"


@dataclass(frozen=True)
class Mode:
    """One upstream's formula: which statistics, what joins the divisor, what a still dimension gives."""

    low: str  # statistic subtracted: "q01", "min" or "mean"
    high: str  # "q99", "max" or "std"
    eps: float  # added to the divisor, always or only where it is 0 (`eps_if_zero`)
    clip: float | None
    constant: str  # a still dimension: "zero", "raw" or "formula"
    constant_test: tuple[str, str]  # the two statistics whose equality means "still"
    eps_if_zero: bool = False


MODES: dict[str, Mode] = {
    "q01q99": Mode("q01", "q99", 1e-8, 1.0, "zero", ("min", "max")),
    "q99_starvla": Mode("q01", "q99", 0.0, 2.2, "raw", ("q01", "q99")),
    "q99_dial": Mode("q01", "q99", 0.0, 1.0, "raw", ("q01", "q99")),
    "openpi_quantiles": Mode("q01", "q99", 1e-6, None, "formula", ("q01", "q99")),
    "lerobot_quantiles": Mode("q01", "q99", 1e-8, None, "formula", ("q01", "q99"), eps_if_zero=True),
    "minmax": Mode("min", "max", 1e-8, 1.0, "zero", ("min", "max")),
    "gr00t_minmax": Mode("min", "max", 0.0, 1.0, "zero", ("min", "max")),
    "lerobot_minmax": Mode("min", "max", 1e-8, None, "formula", ("min", "max"), eps_if_zero=True),
    "meanstd": Mode("mean", "std", 1e-6, None, "formula", ("mean", "mean")),
    "gr00t_meanstd": Mode("mean", "std", 0.0, None, "raw", ("std", "zero")),
    "lerobot_meanstd": Mode("mean", "std", 1e-8, None, "formula", ("mean", "mean")),
    "identity": Mode("zero", "zero", 0.0, None, "raw", ("zero", "zero")),
}

DEFAULT_MODE = "q01q99"

# How far an "identity" action may stray beyond [-1, 1] before it is refused: float32 rounding, no more.
IDENTITY_SLACK = 1e-6


@dataclass(frozen=True)
class Normaliser:
    """One column's normaliser; see the module text for modes and kinds. Tuples have one entry per dimension.

    `low` and `high` are the mode's two statistics (mean and std for the z-scores), for grippers the two ends.
    `constant` marks scaled dimensions that never changed in the data. `frames` and `source` say what it was
    fitted on; they are provenance and no part of the digest, since they change no value.
    """

    mode: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    kinds: tuple[str, ...]
    constant: tuple[bool, ...]
    eps: float
    clip: float | None
    names: tuple[str, ...] = ()
    frames: int = 0
    source: str = ""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown_name("normaliser", self.mode, MODES)
        if not len(self.low) == len(self.high) == len(self.kinds) == len(self.constant):
            raise ValueError("low, high, kinds and constant must have one entry per dimension")
        if set(self.kinds) - {SCALED, BINARY, BOUNDS, RAW}:
            raise ValueError(f"unknown kinds in {self.kinds}")

    @property
    def dim(self) -> int:
        return len(self.low)

    @property
    def mask(self) -> tuple[bool, ...]:
        """True where the mode's formula applies: every dimension but grippers and passed-through ones."""
        return tuple(kind == SCALED for kind in self.kinds)

    @property
    def digest(self) -> str:
        """32 hex digits over everything that changes a value."""
        shaping = {name: getattr(self, name) for name in ("mode", "kinds", "constant", "eps", "clip")}
        shaping |= {end: [float(value).hex() for value in getattr(self, end)] for end in ("low", "high")}
        text = json.dumps(shaping, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def normalise(self, values: NDArray[np.generic]) -> NDArray[np.float64]:
        """Native [..., D] -> normalised [..., D] float64, a view of [D, ...]. Non-finite values stay non-finite."""
        native = self._checked(values)
        others = {d: native[d].copy() for d, kind in enumerate(self.kinds) if kind != SCALED}
        result = self._formula(native)
        for d, own in others.items():
            kind, low, high = self.kinds[d], self.low[d], self.high[d]
            if kind == BINARY:
                two = np.where(own > (low + high) / 2, 1.0, -1.0)
                result[d] = np.where(np.isfinite(own), two, own)
            elif kind == BOUNDS:
                result[d] = np.clip(2 * (own - low) / (high - low if high > low else 1.0) - 1, -1.0, 1.0)
            else:
                result[d] = own
        return np.moveaxis(result, 0, -1)

    def denormalise(self, values: NDArray[np.generic]) -> NDArray[np.float64]:
        """Normalised [..., D] -> native [..., D]; exact inverse of what was neither clipped nor constant."""
        normal = self._shaped(values).astype(np.float64)
        low, high = np.array(self.low), np.array(self.high)
        mode = MODES[self.mode]
        if mode.low == "mean":
            scaled = normal * self._divisor() + low
        elif self.mode == "identity":
            scaled = normal
        else:
            scaled = (normal + 1) / 2 * self._divisor() + low
        if mode.constant == "zero":
            scaled = np.where(self.constant, low, scaled)
        elif mode.constant == "raw":
            scaled = np.where(self.constant, normal, scaled)
        binary = np.where(np.isfinite(normal), np.where(normal > 0, high, low), normal)
        bounds = (normal + 1) / 2 * np.where(high > low, high - low, 1.0) + low
        kinds = np.array(self.kinds)
        return np.select([kinds == BINARY, kinds == BOUNDS, kinds == RAW], [binary, bounds, normal], scaled)

    def clipped(self, values: NDArray[np.generic]) -> NDArray[np.bool_]:
        """Where native values [..., D] lie beyond what the clip keeps; the fastest motion usually does."""
        native = self._checked(values)
        if self.clip is None:
            return np.zeros(values.shape, dtype=bool)
        beyond = np.abs(self._formula(native, clip=False)) > self.clip * (1 + 1e-12)
        return np.moveaxis(beyond, 0, -1) & np.array(self.mask)

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "digest": self.digest,
            "kinds": list(self.kinds),
            "mask": list(self.mask),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Normaliser":
        """Read what `to_json` wrote; a digest that no longer fits its numbers is refused."""
        fields = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        fields |= {name: tuple(fields[name]) for name in ("low", "high", "kinds", "constant", "names")}
        normaliser = cls(**fields)
        if data.get("digest", normaliser.digest) != normaliser.digest:
            raise DataError(
                f"normaliser '{normaliser.mode}': its numbers give digest {normaliser.digest}, "
                f"the record says {data['digest']}\n  The file was edited by hand; fit it again."
            )
        return normaliser

    def _formula(self, native: NDArray[np.float64], clip: bool = True) -> NDArray[np.float64]:
        """The mode's formula on every dimension of [D, ...], in place: fresh memory is what costs."""
        mode = MODES[self.mode]
        if self.mode == "identity":
            return native
        still = {d: native[d].copy() for d in np.flatnonzero(self.constant).tolist()}
        column = (self.dim,) + (1,) * (native.ndim - 1)
        result = native
        result -= np.array(self.low).reshape(column)
        if mode.low != "mean":
            result *= 2
        result /= self._divisor().reshape(column)
        if mode.low != "mean":
            result -= 1
        for d, own in still.items() if mode.constant != "formula" else ():
            answer = 0.0 if mode.constant == "zero" else own
            result[d] = np.where(np.isfinite(own), answer, result[d])
        if self.clip is not None and clip:
            np.clip(result, -self.clip, self.clip, out=result)
        return result

    def _divisor(self) -> NDArray[np.float64]:
        """What scaled values are divided by; 1 where the mode answers a still dimension without dividing."""
        mode = MODES[self.mode]
        low, high = np.array(self.low), np.array(self.high)
        span = high if mode.low == "mean" else high - low
        span = np.where(span == 0, self.eps, span) if mode.eps_if_zero else span + self.eps
        # Dimensions of another kind, and still ones under a mode without eps, are never read from here.
        return np.where(span == 0, 1.0, span)

    def _shaped(self, values: NDArray[np.generic]) -> NDArray[np.generic]:
        given = np.asarray(values)
        if given.ndim == 0 or given.shape[-1] != self.dim:
            raise ValueError(f"values of shape {given.shape} for a normaliser of {self.dim} dimensions")
        return given

    def _checked(self, values: NDArray[np.generic]) -> NDArray[np.float64]:
        """[..., D] -> a copy [D, ...]: an operation with a number a dimension is far quicker along long rows."""
        native = np.array(np.moveaxis(self._shaped(values), -1, 0), dtype=np.float64, order="C")
        if self.mode == "identity":
            flat = native.reshape(self.dim, -1)
            worst = np.where(np.isfinite(flat), np.abs(flat), 0.0).max(axis=1, initial=0.0)
            worst = np.where(self.mask, worst, 0.0)
            if (worst > 1 + IDENTITY_SLACK).any():
                dim = int(worst.argmax())
                name = self.names[dim] if self.names else f"dimension {dim}"
                raise DataError(
                    f"normaliser 'identity' needs values in [-1, 1]; {name} reaches {worst[dim]:g}\n"
                    "  Choose another:  --normaliser q01q99  (or minmax)"
                )
        return native


def make_normaliser(
    mode: str,
    statistics: Mapping[str, Sequence[float] | NDArray[np.generic]],
    names: Sequence[str] = (),
    kinds: Sequence[str] = (),
    gripper: str = "auto",
    clip: float | str | None = "mode",
    frames: int = 0,
    source: str = "",
) -> Normaliser:
    """A normaliser from per-dimension statistics (`min max mean std q01 q99`; the mode reads what it needs).

    What else stands among them is passed over: a lerobot dataset's own also say `count`, one number for all.
    Dimensions whose name contains `gripper` are left out of the mode: `gripper` is binary, bounds, raw or
    scaled; auto means binary when the statistics say two values (`levels` == 2, or ends of -1/1 or 0/1 where
    nothing is said) and bounds otherwise. `kinds` overrides it all, one per dimension.
    """
    if mode not in MODES:
        raise unknown_name("normaliser", mode, MODES)
    if gripper not in ("auto", BINARY, BOUNDS, RAW, SCALED):
        raise unknown_name("gripper normalisation", gripper, ("auto", BINARY, BOUNDS, RAW, SCALED))
    rule = MODES[mode]
    stats = {
        name: np.asarray(values, dtype=np.float64).reshape(-1)
        for name, values in statistics.items()
        if name in STATISTICS
    }
    dim = len(next(iter(stats.values()), kinds))
    stats["zero"] = np.zeros(dim)
    chosen = tuple(kinds) or _kinds_from_names(names, dim, gripper, stats)
    needed = {rule.low, rule.high, *rule.constant_test} if SCALED in chosen else set()
    needed |= {"min", "max"} if {BINARY, BOUNDS} & set(chosen) else set()
    if missing := sorted(needed - set(stats)):
        raise DataError(
            f"normaliser '{mode}' needs the statistics {', '.join(sorted(needed - {'zero'}))}\n"
            f"  found: {', '.join(sorted(set(stats) - {'zero'}))}; missing: {', '.join(missing)}\n"
            "  Recompute them:  dpipe precompute stats"
        )
    of_kind = np.array(chosen)
    ends = {end: stats.get(end, np.zeros(dim)) for end in ("min", "max")}
    zero = np.zeros(dim)
    choices = [of_kind == SCALED, of_kind == RAW]
    low = np.select(choices, [stats.get(rule.low, zero), zero], ends["min"]).tolist()
    high = np.select(choices, [stats.get(rule.high, zero), zero], ends["max"]).tolist()
    for d in np.flatnonzero(of_kind == BINARY):
        low[d], high[d] = _binary_levels(low[d], high[d])
    still = zero.astype(bool)
    if rule.constant != "formula":
        still = (stats[rule.constant_test[0]] == stats[rule.constant_test[1]]) & (of_kind == SCALED)
    return Normaliser(
        mode=mode,
        low=tuple(low),
        high=tuple(high),
        kinds=tuple(str(kind) for kind in chosen),
        constant=tuple(bool(value) for value in still),
        eps=rule.eps,
        clip=rule.clip if isinstance(clip, str) else clip,
        names=tuple(names),
        frames=frames,
        source=source,
    )


def _kinds_from_names(
    names: Sequence[str], dim: int, gripper: str, stats: Mapping[str, NDArray[np.float64]]
) -> tuple[str, ...]:
    if names and len(names) != dim:
        raise ValueError(f"{len(names)} names for {dim} dimensions")
    kinds = []
    for d in range(dim):
        if not names or "gripper" not in names[d]:
            kinds.append(SCALED)
        elif gripper != "auto":
            kinds.append(gripper)
        elif "levels" in stats:
            kinds.append(BINARY if stats["levels"][d] <= 2 else BOUNDS)
        elif "min" in stats and "max" in stats:
            ends = (stats["min"][d], stats["max"][d])
            kinds.append(BINARY if ends in ((-1, 1), (0, 1)) else BOUNDS)
        else:
            kinds.append(SCALED)
    return tuple(kinds)


def _binary_levels(low: float, high: float) -> tuple[float, float]:
    """The two values a gripper command takes.

    Values within [-1, 1] or [0, 1] belong to those conventions even when a small data set shows only one of
    them: the threshold is then 0 or 0.5, never the one value seen.
    """
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    if low >= -1 and high <= 1:
        return -1.0, 1.0
    return low, high


def fit(
    data: NDArray[np.generic],
    mode: str = DEFAULT_MODE,
    names: Sequence[str] = (),
    gripper: str = "auto",
    source: str = "",
) -> Normaliser:
    """A normaliser fitted exactly on native values [N, D]."""
    return fit_blocks(lambda: [data], mode, names, gripper, source)


def fit_blocks(
    blocks: Blocks,
    mode: str = DEFAULT_MODE,
    names: Sequence[str] = (),
    gripper: str = "auto",
    source: str = "",
) -> Normaliser:
    """The same on rows that come in blocks [n, D] and may not fit in memory; `blocks` is called again."""
    statistics, rows = exact_statistics(blocks)
    return make_normaliser(mode, statistics, names=names, gripper=gripper, frames=rows, source=source)


# --- normalisers of other trainers ------------------------------------------------------------------------

# What each file is asked for, and the mode its owner applies to it by default.
IMPORTERS = {
    "dpipe": "a norm.json of ours",
    "openpi": "norm_stats.json: openpi_quantiles or meanstd",
    "lerobot": "meta/stats.json: lerobot_meanstd, lerobot_minmax or lerobot_quantiles",
    "gr00t": "dataset_statistics.json or stats.json: gr00t_minmax, q99_dial or gr00t_meanstd",
    "starvla": "dataset_statistics.json: gr00t_minmax, q99_starvla, q99_dial or gr00t_meanstd",
}


def import_normaliser(
    path: Path,
    kind: str,
    mode: str = "",
    column: str = "action",
    names: Sequence[str] = (),
    key: str = "",
) -> Normaliser:
    """The normaliser another trainer would use, from its own statistics file.

    `kind` is one of IMPORTERS; `mode` defaults to that trainer's own default. `key` picks the data set or
    embodiment where a file holds several (starVLA's `unnorm_key`, GR00T's embodiment tag). The file's `mask`
    (False: passed through) is honoured. Nothing is set aside for grippers: these trainers scale them as the
    rest, unless their mask says otherwise.
    """
    if kind not in IMPORTERS:
        raise unknown_name("normaliser file", kind, IMPORTERS)
    data = _read_json(path)
    if kind == "dpipe":
        return Normaliser.from_json(data)
    if kind == "openpi":
        table = _descend(path, data, "norm_stats")
        table = _descend(path, table, {"action": "actions", "observation.state": "state"}.get(column, column))
        mode = mode or ("openpi_quantiles" if table.get("q01") is not None else "meanstd")
    elif kind == "lerobot":
        table = _descend(path, data, column)
        mode = mode or "lerobot_meanstd"
    else:
        table = _gr00t_table(path, data, column, key)
        mode = mode or ("gr00t_minmax" if kind == "gr00t" else "q99_starvla")
    statistics = {
        name: np.asarray(table[name], dtype=np.float64).reshape(-1)
        for name in ("min", "max", "mean", "std", "q01", "q99")
        if table.get(name) is not None
    }
    if not statistics:
        raise DataError(f"{path}: no statistics of '{column}'\n  found: {', '.join(map(str, table))}")
    dim = len(next(iter(statistics.values())))
    mask = table.get("mask")
    kinds = [SCALED if mask is None or mask[d] else RAW for d in range(dim)]
    return make_normaliser(mode, statistics, names=names, kinds=kinds, source=f"{kind}:{path.name}")


def _gr00t_table(path: Path, data: Mapping[str, Any], column: str, key: str) -> Mapping[str, Any]:
    """GR00T and starVLA nest: [data set or embodiment] -> modality -> [joint group] -> statistic.

    Joint groups are concatenated in the order of the file, which is the order of the concatenated vector.
    """
    modality = {"observation.state": "state"}.get(column, column)
    if column in data and _is_table(data[column]):
        return data[column]  # GR00T's own stats.json has LeRobot's layout
    if modality not in data:
        if not key and len(data) == 1:
            key = next(iter(data))
        if key not in data:
            raise UsageError(
                f"{path}: which data set?  found: {', '.join(sorted(data))}\n"
                "  Name one with --normaliser-key."
            )
        data = data[key]
    table = _descend(path, data, modality)
    if _is_table(table):
        return table
    groups = [table[name] for name in table]
    shared = set.intersection(*(set(group) for group in groups))
    return {name: np.concatenate([np.ravel(group[name]) for group in groups]) for name in sorted(shared)}


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) and bool({"min", "q01", "mean"} & set(value))


def _descend(path: Path, data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if name not in data:
        raise DataError(f"{path}: no entry '{name}'\n  found: {', '.join(map(str, data)) or '(nothing)'}")
    return data[name]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(
            f"no normaliser file {path}\n  Name an existing one with --normaliser-file."
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
