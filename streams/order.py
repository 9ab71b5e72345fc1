"""The order of an epoch: which sample stands at position p, computed, never stored.

An order is a bijection of 0 .. n - 1 that depends on (seed, epoch, n) alone, so it is the same for any number
of ranks, workers and threads, and any position can be asked for at once: resuming costs nothing, and no list of
n numbers exists anywhere.

    global shuffle   a Feistel network over the next power of two above n; results beyond n are sent through
                     again until they fall inside (cycle walking), which keeps it a bijection
    block shuffle    for storage where neighbours are cheap: runs of `block` neighbouring samples are dealt in
                     shuffled order into pools of `pool` runs, and each pool is shuffled as a whole

Sources  cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002. Round function: the
finaliser of splitmix64 (Steele, Lea and Flood, 2014).
Legend   n samples, p positions, s samples in dataset order
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]

ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


def mix(*numbers: int) -> int:
    """One 64-bit key from several numbers, unlike the keys of their neighbours."""
    state = 0
    for number in numbers:
        x = (state + _GOLDEN + number) & _MASK
        x = ((x ^ (x >> 30)) * _FIRST) & _MASK
        x = ((x ^ (x >> 27)) * _SECOND) & _MASK
        state = x ^ (x >> 31)
    return state


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser `mix` uses, element by element; multiplication wraps."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Permutation:
    """A bijection of 0 .. n - 1 chosen by `key`, evaluated where asked, in both directions."""

    n: int
    key: int

    @cached_property
    def _halves(self) -> tuple[int, int]:
        """Bits of the low and the high half: together the fewest that hold n - 1, and one each at least."""
        bits = max(2, (self.n - 1).bit_length())
        return bits // 2, bits - bits // 2

    @cached_property
    def _keys(self) -> list[np.uint64]:
        return [np.uint64(mix(self.key, number)) for number in range(ROUNDS)]

    def __call__(self, positions: Positions) -> Positions:
        return self._walk(positions, range(ROUNDS))

    def inverse(self, samples: Positions) -> Positions:
        return self._walk(samples, range(ROUNDS - 1, -1, -1))

    def _walk(self, values: Positions, rounds: range) -> Positions:
        x = np.asarray(values, np.int64).astype(np.uint64)
        if x.size and int(x.max()) >= self.n:  # a negative number is a very large one here
            raise IndexError(f"a permutation of {self.n} has no element {int(np.asarray(values).max())}")
        flat = self._network(x.reshape(-1), rounds)
        outside = np.flatnonzero(flat >= self.n)
        while outside.size:
            flat[outside] = self._network(flat[outside], rounds)
            outside = outside[flat[outside] >= self.n]
        return flat.reshape(x.shape).astype(np.int64)

    def _network(self, x: NDArray[np.uint64], rounds: range) -> NDArray[np.uint64]:
        """Each round XORs one half with a keyed hash of the other, so undoing it is doing it again."""
        low_bits, high_bits = self._halves
        low_mask = np.uint64((1 << low_bits) - 1)
        high_mask = np.uint64((1 << high_bits) - 1)
        low, high = x & low_mask, x >> np.uint64(low_bits)
        for number in rounds:
            if number % 2:
                high = high ^ (_mixed(low + self._keys[number]) & high_mask)
            else:
                low = low ^ (_mixed(high + self._keys[number]) & low_mask)
        return (high << np.uint64(low_bits)) | low


@dataclass(frozen=True)
class Sequential:
    """Samples in dataset order, for evaluation."""

    n: int

    def __call__(self, positions: Positions) -> Positions:
        found = np.asarray(positions, np.int64)
        if found.size and (found.min() < 0 or found.max() >= self.n):
            raise IndexError(f"an order of {self.n} samples has no position {found.max()}")
        return found


@dataclass(frozen=True)
class BlockShuffle:
    """Runs of `block` neighbours, dealt in shuffled order into pools of `pool` runs, each pool shuffled.

    A reader that keeps `pool` runs at hand reads every run once. The last run may be short; where it stands in
    the dealt order is known from the inverse permutation, so every start is arithmetic.
    """

    n: int
    key: int
    block: int
    pool: int

    @property
    def blocks(self) -> int:
        return -(-self.n // self.block)

    @cached_property
    def _deal(self) -> Permutation:
        return Permutation(self.blocks, mix(self.key, 0))

    @cached_property
    def _short(self) -> tuple[int, int]:
        """(place of the last run in the dealt order, samples it lacks)."""
        place = int(self._deal.inverse(np.array([self.blocks - 1]))[0])
        return place, self.blocks * self.block - self.n

    def _start(self, place: NDArray[np.int64]) -> NDArray[np.int64]:
        """Position at which the run at `place` of the dealt order begins."""
        short, lacking = self._short
        return place * self.block - np.where(place > short, lacking, 0)

    def pool_of(self, positions: Positions) -> NDArray[np.int64]:
        """Which pool each position belongs to: what a reader must have at hand."""
        return self._place(np.asarray(positions, np.int64)) // self.pool

    def blocks_of(self, pool: int) -> NDArray[np.int64]:
        """The runs of one pool, by their number in dataset order."""
        return self._deal(np.arange(pool * self.pool, min((pool + 1) * self.pool, self.blocks)))

    def _place(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        short, lacking = self._short
        after = positions >= (short + 1) * self.block - lacking  # behind the short run
        return (positions + np.where(after, lacking, 0)) // self.block

    def __call__(self, positions: Positions) -> Positions:
        asked = np.asarray(positions, np.int64)
        flat = asked.reshape(-1)
        if flat.size and (flat.min() < 0 or flat.max() >= self.n):
            raise IndexError(f"an order of {self.n} samples has no position {flat.max()}")
        result = np.empty_like(flat)
        pools = self.pool_of(flat)
        for pool in np.unique(pools):
            here = pools == pool
            ends = np.array([pool * self.pool, min((pool + 1) * self.pool, self.blocks)])
            first, stop = self._start(ends)
            if ends[1] == self.blocks:
                stop = self.n
            inner = Permutation(int(stop - first), mix(self.key, 1, int(pool)))(flat[here] - first)
            place = self._place(inner + first)
            result[here] = self._deal(place) * self.block + (inner + first - self._start(place))
        return result.reshape(asked.shape)


Order = Permutation | Sequential | BlockShuffle


@dataclass(frozen=True)
class Shuffle:
    """How epochs are ordered: `kind` is "global", "block" or "none"."""

    kind: str = "global"
    block: int = 512
    pool: int = 64

    def of_epoch(self, seed: int, epoch: int, n: int) -> Order:
        if self.kind == "none":
            return Sequential(n)
        key = mix(seed, epoch, n)
        if self.kind == "block":
            return BlockShuffle(n, key, self.block, self.pool)
        return Permutation(n, key)


ORDER_BLOCK = 4096  # positions computed at once: a few numbers cost as much as thousands


class EpochOrder:
    """Samples at absolute positions, epoch * n + p: one epoch's order after another's."""

    def __init__(self, shuffle: Shuffle, seed: int, n: int):
        self.shuffle, self.seed, self.n = shuffle, seed, n
        self._block: tuple[int, int, NDArray[np.int64]] = (-1, 0, np.zeros(0, np.int64))

    def __call__(self, positions: Positions) -> Positions:
        result = np.empty_like(positions)
        epochs = positions // self.n
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            result[here] = self._within(epoch, positions[here] - epoch * self.n)
        return result

    def _within(self, epoch: int, positions: Positions) -> Positions:
        block_epoch, start, block = self._block
        first, last = int(positions.min()), int(positions.max())
        if block_epoch != epoch or first < start or last >= start + len(block):
            start = first // ORDER_BLOCK * ORDER_BLOCK
            stop = min(self.n, max(start + ORDER_BLOCK, last + 1))
            block = self.shuffle.of_epoch(self.seed, epoch, self.n)(np.arange(start, stop, dtype=np.int64))
            self._block = (epoch, start, block)
        return block[positions - start]


class MixtureOrder:
    """Several sets of samples in given proportions, at absolute positions.

    Positions come in blocks of `MIXTURE_BLOCK`; each block deals the same number of places to a set, shuffled
    within the block. The j-th place a set gets, counted from the beginning, is the j-th of its own order, so
    it goes through all of its samples before it repeats one. Samples are numbered set after set.
    """

    def __init__(self, shuffle: Shuffle, seed: int, sizes: tuple[int, ...], counts: tuple[int, ...]):
        self.seed, self.sizes, self.counts = seed, sizes, counts
        self.block = sum(counts)
        self._ends = np.cumsum(counts)
        self._bases = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        self._orders = [EpochOrder(shuffle, mix(seed, number), size) for number, size in enumerate(sizes)]
        self._last_block: tuple[int, NDArray[np.int64], NDArray[np.int64]] = (-1, self._bases, self._bases)

    def __call__(self, positions: Positions) -> Positions:
        member, draws = self._deal(positions)
        result = np.empty_like(positions)
        for number in np.unique(member).tolist():
            here = member == number
            result[here] = self._bases[number] + self._orders[number](draws[here])
        return result

    def _deal(self, positions: Positions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(set, how many places it got before) at positions."""
        blocks, places = np.divmod(positions, self.block)
        member, before = np.empty_like(places), np.empty_like(places)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            owners, ranks = self._dealt_block(block)
            member[here], before[here] = owners[places[here]], ranks[places[here]]
        return member, blocks * np.array(self.counts)[member] + before

    def _dealt_block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each place of a block its set, and how many places before it in the block that set got.

        Counted in the order the places are handed out: a set's passes would overlap otherwise.
        """
        number, owners, ranks = self._last_block
        if number != block:
            shuffled = Permutation(self.block, mix(self.seed, 0xB10C, block))(np.arange(self.block))
            owners = np.searchsorted(self._ends, shuffled, side="right").astype(np.int64)
            ranks = np.empty_like(owners)
            for each in range(len(self.counts)):
                here = owners == each
                ranks[here] = np.arange(int(here.sum()))
            self._last_block = (block, owners, ranks)
        return owners, ranks

    def drawn(self, positions: int) -> NDArray[np.int64]:
        """Samples of each set among the first `positions`: the realised proportions, exactly."""
        whole, rest = divmod(positions, self.block)
        found = whole * np.array(self.counts, np.int64)
        if rest:
            member, _ = self._deal(whole * self.block + np.arange(rest, dtype=np.int64))
            found = found + np.bincount(member, minlength=len(self.counts))
        return found


MIXTURE_BLOCK = 4096


def block_counts(weights: Sequence[float]) -> tuple[int, ...]:
    """Places of a block for each weight, by largest remainder, one at least: off by less than 1 in 4,096."""
    share = np.asarray(weights, np.float64) / float(np.sum(weights)) * MIXTURE_BLOCK
    counts = np.maximum(1, np.floor(share)).astype(np.int64)
    for number in np.argsort(-(share - np.floor(share)), kind="stable"):
        if counts.sum() >= MIXTURE_BLOCK:
            break
        counts[number] += 1
    return tuple(counts.tolist())


def mixing(
    order: Order, groups: Callable[[Positions], NDArray[np.int64]], batch: int, batches: int = 200
) -> float:
    """How well an order mixes: distinct groups in a batch, as a share of what a global shuffle would give.

    `groups` says which group (episode, shard) samples belong to; the share is the mean over up to `batches`
    batches spread over the epoch. 1 means "like a global shuffle", 1 / (groups in a batch) "one
    group at a time".
    """
    last = max(1, order.n // batch)
    starts = np.unique(np.linspace(0, last - 1, min(batches, last)).astype(np.int64)) * batch
    reference = Permutation(order.n, mix(0x5EED))

    def distinct(each: Order) -> float:
        found = [
            len(np.unique(groups(each(np.arange(s, min(s + batch, order.n), dtype=np.int64)))))
            for s in starts
        ]
        return float(np.mean(found))

    return distinct(order) / distinct(reference)
