"""How hard are N bins to predict? The learning-complexity report that helps a person choose N.

    H(Y)      entropy of the tokens in bits (plus Miller-Madow's (K - 1) / (2 n ln 2), K bins used)
    H(Y|S)    cross-entropy, on held-out episodes, of a probe that sees the situation S: an upper bound (as H(Y)
              is, where the probe does worse than that), so
    I(Y;S)    H(Y) - H(Y|S) is a lower bound of what S tells about the plan
    share(N)  I(Y_N;S) / I(Y_256;S): how much of what S can tell is asked of a planner of N bins
    D_res     variance of the residual; D_res|S: held-out squared error of its best guess given S and Y
    dB        10 log10(Var(a) / D_res)

One probe serves every N: it predicts the action as a mixture of logistic distributions, whose mass in a bin
is a difference of two sigmoids (PixelCNN++, arXiv:1701.05517), so that all N are read from one density and
refinement never loses information. S is whatever the caller puts into `situation`: state and task, or frame
features as well, and which step of the chunk is asked for.

A probe that has seen few episodes is surer than it should be. Its density is therefore mixed with the actions'
own, in the share that best explains training episodes it was not fitted on; with fewer than 40 episodes each is
held out once, in four folds; and the spread over held-out episodes stands beside the figures, with a warning in
words where they are too few to choose N by.

Libra-VLA balances planner and refiner at "equal difficulty" but defines no measure; these are our proxies.
Reported, not decided: N at share 0.5 and 0.9, N where the probe's top-1 falls below 0.7, dB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.bins import BIN_GRID, centre, encode

Float = NDArray[np.float64]

FINEST = 256  # the grid the probe is trained on, and the reference of `share`
CELLS = 1280  # fine cells of [-1, 1] for conditional means: a multiple of FINEST and of most N
FEW_EPISODES, FOLDS = 40, 4


def entropy_bits(counts: NDArray[np.integer]) -> float:
    """Entropy of a histogram, with the Miller-Madow correction for the bins it has seen."""
    n = counts.sum()
    p = counts[counts > 0] / n
    return float(-(p * np.log2(p)).sum() + (len(p) - 1) / (2 * n * np.log(2)))


def persistence(tokens: NDArray[np.integer], starts: NDArray[np.bool_]) -> tuple[float, float]:
    """(H(Y_t | Y_t-1) in bits, mean run length) of tokens [n]; `starts` marks first frames of episodes."""
    follow = ~starts
    follow[0] = False
    now, before = tokens[follow].astype(np.int64), tokens[np.flatnonzero(follow) - 1].astype(np.int64)
    if len(now) == 0:
        return 0.0, 1.0
    width = int(tokens.max()) + 1
    joint = np.bincount(before * width + now, minlength=width * width)
    conditional = entropy_bits(joint) - entropy_bits(joint.reshape(width, width).sum(axis=1))
    changes = np.count_nonzero(now != before)
    runs = changes + np.count_nonzero(~follow)
    return max(0.0, conditional), float(len(tokens) / runs)


@dataclass
class Probe:
    """Situation [n, F] -> mixture of `mixtures` logistics for each of D dimensions. Two hidden layers.

    Trained on the likelihood of the finest bins, whose outer ones reach to infinity because actions are
    clipped. numpy alone: the report must not cost a deep-learning framework.
    """

    inputs: int
    dims: int
    hidden: int = 96
    mixtures: int = 6
    seed: int = 0
    weights: list[Float] = field(default_factory=list)
    mean: Float = field(default_factory=lambda: np.zeros(0))
    scale: Float = field(default_factory=lambda: np.ones(0))
    share: Float = field(default_factory=lambda: np.ones(0))  # [D] of the probe in the mixture; rest: `below`
    below: Float = field(default_factory=lambda: np.zeros(0))  # [D, FINEST + 1] the actions' own distribution

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        sizes = [self.inputs, self.hidden, self.hidden, self.dims * self.mixtures * 3]
        for fan_in, fan_out in pairwise(sizes):
            self.weights += [rng.normal(size=(fan_in, fan_out)) / np.sqrt(max(1, fan_in)), np.zeros(fan_out)]
        self.weights[4] *= 0.1
        # Components start spread over [-1, 1] and wide enough to see all of it.
        bias = self.weights[5].reshape(self.dims, 3, self.mixtures)
        bias[:, 1] = np.linspace(-0.8, 0.8, self.mixtures)
        bias[:, 2] = np.log(0.15)

    def parameters(self, situation: Float) -> tuple[Float, Float, Float]:
        """log weights, means, log scales, each [n, D, M]."""
        return self._split(self._forward((situation - self.mean) / self.scale)[-1])

    def bin_probabilities(self, situation: Float, bins: int) -> Float:
        """[n, D, bins]: probability of each bin, the outer ones reaching to infinity."""
        log_weight, mean, log_scale = self.parameters(situation)
        edges = -1 + 2 * np.arange(1, bins) / bins
        z = (edges[:, None] - mean[..., None, :]) * np.exp(-log_scale)[..., None, :]
        below = (_sigmoid(z) * np.exp(log_weight)[..., None, :]).sum(axis=-1)
        if len(self.share):
            at = np.arange(1, bins) * (FINEST / bins)
            own = np.stack([np.interp(at, np.arange(FINEST + 1), line) for line in self.below])
            below = self.share[:, None] * below + (1 - self.share[:, None]) * own
        ends = np.zeros((*below.shape[:-1], 1))
        return np.diff(below, axis=-1, prepend=ends, append=ends + 1)

    def fit(
        self,
        situation: Float,
        actions: Float,
        held_out: NDArray[np.bool_],
        steps: int = 3000,
        batch: int = 512,
        check_share: float = 0.1,
    ) -> int:
        """Adam on rows that are not held out, keeping the weights best on a share of those; returns steps.

        The share is the end of the training rows: whole episodes, but for one that is cut. It also settles how
        far the probe is believed.
        """
        self.mean = situation.mean(axis=0)
        self.scale = np.maximum(situation.std(axis=0), 1e-6)
        inputs = (situation - self.mean) / self.scale
        train = np.flatnonzero(~held_out)
        check = train[len(train) - max(1, int(len(train) * check_share)) :]
        train = train[: len(train) - len(check)] if len(train) > len(check) else train
        check = check[:: max(1, len(check) // 2048)]
        rng = np.random.default_rng(self.seed + 1)
        first = [np.zeros_like(w) for w in self.weights]
        second = [np.zeros_like(w) for w in self.weights]
        best, best_weights, waited, made = np.inf, [w.copy() for w in self.weights], 0, 0
        for step in range(1, steps + 1):
            rows = train[rng.integers(0, len(train), min(batch, len(train)))]
            _, gradient = self._loss(inputs[rows], actions[rows], gradient=True)
            rate = 3e-3 * min(1.0, step / 100) * 0.5 * (1 + np.cos(np.pi * step / steps))
            for w, g, m, v in zip(self.weights, gradient, first, second, strict=True):
                m += 0.1 * (g - m)
                v += 0.01 * (g * g - v)
                w -= rate * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.99**step)) + 1e-8)
            made = step
            if step % 100 == 0:
                loss, _ = self._loss(inputs[check], actions[check], gradient=False)
                if loss < best - 1e-4:
                    best, best_weights, waited = loss, [w.copy() for w in self.weights], 0
                else:
                    waited += 1
                    if waited == 8:
                        break
        self.weights = best_weights
        self._temper(situation, actions, train, check)
        return made

    def _temper(
        self, situation: Float, actions: Float, train: NDArray[np.integer], check: NDArray[np.integer]
    ) -> None:
        """Settle `share`: expectation maximisation of two fixed distributions, dimension by dimension."""
        own = encode(actions[train], FINEST).astype(np.int64)
        counts = np.stack([np.bincount(own[:, d], minlength=FINEST) for d in range(self.dims)]) + 0.5
        shares = counts / counts.sum(axis=1, keepdims=True)
        wanted = encode(actions[check], FINEST).astype(np.int64)
        probe = np.take_along_axis(self.bin_probabilities(situation[check], FINEST), wanted[..., None], 2)
        probe, plain = probe[..., 0] + 1e-12, np.take_along_axis(shares, wanted.T, 1).T
        share = np.full(self.dims, 0.9)
        for _ in range(100):
            joint = share * probe
            share = (joint / (joint + (1 - share) * plain)).mean(axis=0)
        self.below = np.concatenate([np.zeros((self.dims, 1)), np.cumsum(shares, axis=1)], axis=1)
        self.share = share

    def _forward(self, inputs: Float) -> list[Float]:
        w = self.weights
        one = np.tanh(inputs @ w[0] + w[1])
        two = np.tanh(one @ w[2] + w[3])
        return [inputs, one, two, two @ w[4] + w[5]]

    def _split(self, outputs: Float) -> tuple[Float, Float, Float]:
        table = outputs.reshape(len(outputs), self.dims, 3, self.mixtures)
        logits, mean, log_scale = table[:, :, 0], table[:, :, 1], np.clip(table[:, :, 2], -6.0, 2.0)
        log_weight = logits - _logsumexp(logits)
        return log_weight, mean, log_scale

    def _loss(self, inputs: Float, actions: Float, gradient: bool) -> tuple[float, list[Float]]:
        """Mean negative log likelihood (nats) of the finest bins, summed over dims, and its gradient."""
        layers = self._forward(inputs)
        log_weight, mean, log_scale = self._split(layers[-1])
        token = np.clip(np.floor((actions + 1) / 2 * FINEST), 0, FINEST - 1)[..., None]
        inverse = np.exp(-log_scale)
        above = (-1 + 2 * (token + 1) / FINEST - mean) * inverse
        below = (-1 + 2 * token / FINEST - mean) * inverse
        last, zeroth = token == FINEST - 1, token == 0
        s_above, s_below = np.where(last, 1.0, _sigmoid(above)), np.where(zeroth, 0.0, _sigmoid(below))
        mass = np.maximum(s_above - s_below, 1e-9)
        log_joint = log_weight + np.log(mass)
        total = _logsumexp(log_joint)
        loss = float(-total.sum(axis=1).mean())
        if not gradient:
            return loss, []
        share = np.exp(log_joint - total)  # posterior of each component
        d_above, d_below = s_above * (1 - s_above), s_below * (1 - s_below)
        held = mass > 1e-9
        d_mean = np.where(held, share * (d_above - d_below) * inverse / mass, 0.0)
        d_scale = np.where(held, share * (above * d_above - below * d_below) / mass, 0.0)
        # Where a component has no mass at all, pull its mean towards the action instead of letting go of it.
        d_mean = np.where(held, d_mean, share * np.sign(mean - (-1 + (2 * token + 1) / FINEST)) * inverse)
        table = layers[-1].reshape(len(inputs), self.dims, 3, self.mixtures)
        inside = (table[:, :, 2] > -6.0) & (table[:, :, 2] < 2.0)
        d_logit = np.exp(log_weight) - share
        stacked = np.stack([d_logit, d_mean, np.where(inside, d_scale, 0.0)], axis=2)
        d_out = stacked.reshape(len(inputs), -1) / len(inputs)
        w = self.weights
        d_two = (d_out @ w[4].T) * (1 - layers[2] ** 2)
        d_one = (d_two @ w[2].T) * (1 - layers[1] ** 2)
        decay = 1e-5
        return loss, [
            layers[0].T @ d_one + decay * w[0],
            d_one.sum(axis=0),
            layers[1].T @ d_two + decay * w[2],
            d_two.sum(axis=0),
            layers[2].T @ d_out + decay * w[4],
            d_out.sum(axis=0),
        ]


def complexity(
    actions: Float,
    situation: Float,
    episodes: NDArray[np.integer],
    names: Sequence[str],
    sequences: Float | None = None,
    starts: NDArray[np.bool_] | None = None,
    excluded: Sequence[bool] = (),
    grid: Sequence[int] = BIN_GRID,
    seed: int = 0,
    steps: int = 3000,
) -> dict[str, Any]:
    """The report for normalised, finite actions [n, D] and what was known when each was chosen [n, F].

    `episodes` [n] splits train from held-out by whole episodes (a quarter held out). `sequences` [T, D] with
    `starts` [T] are the actions frame by frame, for persistence. `excluded` dimensions (grippers) are
    reported but left out of the means, as are dimensions that hardly move.
    """
    actions = np.clip(np.asarray(actions, dtype=np.float64), -1, 1)
    situation = np.asarray(situation, dtype=np.float64)
    n, dims = actions.shape
    spread = actions.std(axis=0)
    left_out = [bool(excluded[d]) if len(excluded) else False for d in range(dims)]
    kept = [d for d in range(dims) if not left_out[d] and spread[d] > 1e-3]
    scored, tested, made = _held_out_scores(actions, situation, episodes, kept, grid, seed, steps)
    order = sequences if sequences is not None else actions
    begins = starts if starts is not None else np.r_[True, episodes[1:] != episodes[:-1]]
    bins: dict[str, Any] = {}
    for n_bins, scores in scored.items():
        tokens = encode(actions, n_bins)
        per_dim = []
        for d in range(dims):
            counts = np.bincount(tokens[:, d], minlength=n_bins)
            residual = actions[:, d] - centre(tokens[:, d], n_bins)
            entropy = entropy_bits(counts)
            left = min(scores.cross_entropy[d], entropy)
            stay, run = persistence(encode(order[:, d], n_bins), begins)
            variance = float(residual.var())
            per_dim.append(
                {
                    "H": entropy,
                    "H_given_S": left,
                    "cross_entropy": scores.cross_entropy[d],
                    "I": entropy - left,
                    "top1": scores.top1[d],
                    "used": float(np.count_nonzero(counts) / n_bins),
                    "perplexity": float(2**entropy),
                    "D_res": variance,
                    "D_res_given_S": scores.squared_error[d],
                    "dB": float(10 * np.log10(max(spread[d] ** 2, 1e-12) / max(variance, 1e-12))),
                    "H_given_previous": stay,
                    "run_length": run,
                }
            )
        means = {key: _mean(per_dim, key, kept) for key in per_dim[0]} if kept else {}
        bins[str(n_bins)] = {"mean": means, "per_dim": per_dim, "error": scores.error}
    reference = bins[str(FINEST)]["mean"].get("I", 0.0) if kept else 0.0
    for entry in bins.values():
        entry["share"] = entry["mean"]["I"] / reference if kept and reference > 1e-6 else float("nan")
    return {
        "names": list(names),
        "in_means": [names[d] for d in kept],
        "rows": n,
        "held_out_rows": len(tested),
        "held_out_episodes": len(np.unique(episodes[tested])),
        "episodes": len(np.unique(episodes)),
        "probe_steps": made,
        "bins": bins,
        **_reading(bins),
        **_warning(len(np.unique(episodes)), reference, bins),
    }


def hold_outs(episodes: NDArray[np.integer], seed: int) -> list[NDArray[np.bool_]]:
    """Which rows each probe is judged on: a quarter of the episodes, or, of few, all of them in folds.

    Rows of a single episode are split in time instead.
    """
    unique = np.unique(episodes)
    if len(unique) == 1:
        return [np.arange(len(episodes)) >= len(episodes) * 3 // 4]
    mixed = np.random.default_rng(seed).permutation(unique)
    if len(unique) >= FEW_EPISODES:
        return [np.isin(episodes, mixed[: len(unique) // 4])]
    return [np.isin(episodes, mixed[fold::FOLDS]) for fold in range(min(FOLDS, len(unique)))]


@dataclass(frozen=True)
class Scores:
    """What probes reach on held-out rows with one N, per dimension; `error` is that of the mean cross-entropy."""

    cross_entropy: list[float]  # bits
    top1: list[float]
    squared_error: list[float]  # of the residual's conditional mean
    error: float  # standard error over episodes, bits; nan for a single one


def _held_out_scores(
    actions: Float,
    situation: Float,
    episodes: NDArray[np.integer],
    kept: Sequence[int],
    grid: Sequence[int],
    seed: int,
    steps: int,
) -> tuple[dict[int, Scores], NDArray[np.integer], int]:
    """Scores for each N, the rows they are made on, and the steps of the longest fit."""
    dims = actions.shape[1]
    # A hand of 57 dimensions costs eight arms: fewer steps and rows bring the report back to seconds.
    effort = min(1.0, 10 / dims)
    folds = hold_outs(episodes, seed)
    most = max(500, int(4000 * effort)) // len(folds)
    numbers = sorted({*grid, FINEST})
    found: list[dict[int, NDArray[np.float64]]] = []
    rows: list[NDArray[np.integer]] = []
    made = 0
    for held_out in folds:
        probe = Probe(situation.shape[1], dims, seed=seed)
        many = len(folds) == 1
        budget = max(500, int(steps * effort)) // len(folds)  # few episodes are learnt in few steps
        made = max(made, probe.fit(situation, actions, held_out, budget, check_share=0.1 if many else 0.25))
        test = np.flatnonzero(held_out)
        test = test[:: max(1, len(test) // most)]
        rows.append(test)
        found.append(_probe_scores(probe, situation, actions, test, numbers))
    tested = np.concatenate(rows)
    owner = episodes[tested]
    scores = {}
    for n in numbers:
        table = np.concatenate([each[n] for each in found])  # [rows, 3, D]
        bits_each, top1, squared = table.mean(axis=0).tolist()
        bits = table[:, 0, kept].mean(axis=1) if len(kept) else table[:, 0].mean(axis=1)
        of_episode = np.array([bits[owner == e].mean() for e in np.unique(owner)])
        several = len(of_episode) > 1
        error = float(of_episode.std(ddof=1) / np.sqrt(len(of_episode))) if several else float("nan")
        scores[n] = Scores(bits_each, top1, squared, error)
    return scores, tested, made


def _probe_scores(
    probe: Probe, situation: Float, actions: Float, test: NDArray[np.integer], grid: Sequence[int]
) -> dict[int, NDArray[np.float64]]:
    """For each N and row [n, 3, D]: cross-entropy (bits), top-1, squared error of the residual's conditional mean.

    The density over fine cells is the costly part: it is made once a block, for every N.
    """
    dims = actions.shape[1]
    middles = -1 + (2 * np.arange(CELLS) + 1) / CELLS
    cells = {n: encode(middles, n).astype(np.int64) for n in grid}
    firsts = {n: np.flatnonzero(np.r_[True, cell[1:] != cell[:-1]]) for n, cell in cells.items()}
    pieces: dict[int, list[NDArray[np.float64]]] = {n: [np.zeros((0, 3, dims))] for n in grid}
    for rows in _blocks(test, max(16, 30_000 // dims)):
        fine = probe.bin_probabilities(situation[rows], CELLS) + 1e-15
        weighted = fine * middles
        for n in grid:
            wanted = encode(actions[rows], n).astype(np.int64)
            p = probe.bin_probabilities(situation[rows], n)
            given = np.take_along_axis(p, wanted[..., None], 2)[..., 0]
            # E[a | S, bin] from the mass of fine cells inside the bin.
            mean = np.add.reduceat(weighted, firsts[n], axis=2) / np.add.reduceat(fine, firsts[n], axis=2)
            guess = np.take_along_axis(mean, wanted[..., None], 2)[..., 0]
            bits = -np.log2(np.maximum(given, 1e-12))
            pieces[n].append(
                np.stack([bits, p.argmax(axis=2) == wanted, (actions[rows] - guess) ** 2], axis=1)
            )
    return {n: np.concatenate(each) for n, each in pieces.items()}


def _warning(episodes: int, reference: float, bins: dict[str, Any]) -> dict[str, str]:
    """Words where the held-out episodes say too little to choose N by."""
    error = bins[str(FINEST)]["error"]
    if reference <= 1e-6:
        return {
            "warning": "the situation tells nothing of the action on held-out episodes: choose N by dB alone"
        }
    if np.isnan(error) or error > reference / 4:
        told = "unknown" if np.isnan(error) else f"{error:.2f} of {reference:.2f} bits"
        return {
            "warning": f"{episodes} episodes say little: standard error {told}; record more before choosing N"
        }
    return {}


def _reading(bins: dict[str, Any]) -> dict[str, Any]:
    """The four figures a person looks for; None where the grid never gets there."""
    numbers = sorted(map(int, bins))

    def first(condition: Any) -> int | None:
        return next((n for n in numbers if condition(bins[str(n)])), None)

    return {
        "N_at_share_0.5": first(lambda b: b["share"] >= 0.5),
        "N_at_share_0.9": first(lambda b: b["share"] >= 0.9),
        "N_where_top1_below_0.7": first(lambda b: b["mean"] and b["mean"]["top1"] < 0.7),
    }


def _mean(per_dim: Sequence[dict[str, float]], key: str, dims: Sequence[int]) -> float:
    return float(np.mean([per_dim[d][key] for d in dims]))


def _blocks(rows: NDArray[np.integer], size: int) -> Iterator[NDArray[np.integer]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _sigmoid(z: Float) -> Float:
    return 0.5 * (1 + np.tanh(0.5 * z))  # no overflow at either end


def _logsumexp(values: Float) -> Float:
    top = values.max(axis=-1, keepdims=True)
    return top + np.log(np.exp(values - top).sum(axis=-1, keepdims=True))
