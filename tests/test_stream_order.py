"""Which samples a stream hands to whom: each once, the same always, from any place on, on any number of ranks."""

import json
import time

import numpy as np
import pytest
from dpipe.schemas.errors import DataError, UsageError
from dpipe.streams.order import EpochOrder, Shuffle
from dpipe.streams.stream import Place, Stream, StreamSpec
from hypothesis import assume, given, settings
from hypothesis import strategies as st


class Numbers:
    """A source whose samples are their own numbers."""

    def __init__(self, count: int):
        self.samples = range(count)

    def order(self, shuffle, seed):
        return EpochOrder(shuffle, seed, len(self.samples))

    def read(self, samples, spec, health):
        return {"index": samples}


def stream(
    count, batch=4, rank=0, world=1, seed=0, last="short", shuffle="global", threads=1, **kind
) -> Stream:
    return Stream(
        Numbers(count), StreamSpec(), batch, seed, rank, world, Shuffle(shuffle, **kind), last, threads
    )


def epoch_of(each: Stream) -> list[list[int]]:
    return [batch["index"].tolist() for batch in each]


def ranks_of(count, batch, world, **options) -> list[Stream]:
    return [stream(count, batch, rank, world, **options) for rank in range(world)]


counts = st.integers(1, 300)
batches = st.integers(1, 17)
worlds = st.integers(1, 9)


@settings(max_examples=200, deadline=None)
@given(
    count=counts,
    batch=batches,
    world=worlds,
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["global", "block", "none"]),
)
def test_ranks_together_see_each_sample_once_an_epoch(count, batch, world, seed, kind):
    ranks = ranks_of(count, batch, world, seed=seed, shuffle=kind, block=7, pool=3)
    for epoch in range(2):
        lengths = [len(each) for each in ranks]
        seen = [epoch_of(each) for each in ranks]
        assert sorted(n for each in seen for found in each for n in found) == list(range(count))
        assert [len(each) for each in seen] == lengths
        sizes = [sum(map(len, each)) for each in seen]
        assert max(sizes) - min(sizes) <= batch
        assert all(len(found) == batch for each in seen for found in each[:-1])
        assert all(each.epoch == epoch + 1 for each in ranks)


@settings(max_examples=100, deadline=None)
@given(count=counts, batch=batches, world=worlds)
def test_the_last_uneven_batch_follows_its_rule(count, batch, world):
    rest = count % (batch * world)
    short = [epoch_of(each) for each in ranks_of(count, batch, world)]
    assert [len(each) for each in short] == [
        count // (batch * world) + (rest > rank) for rank in range(world)
    ]
    drop = [epoch_of(each) for each in ranks_of(count, batch, world, last="drop")]
    assert all(len(found) == batch for each in drop for found in each)
    assert {len(each) for each in drop} == {count // (batch * world)}
    assert len({n for each in drop for found in each for n in found}) == count - rest


@settings(max_examples=100, deadline=None)
@given(count=st.integers(15, 300), batch=batches, world=worlds, steps=st.integers(1, 40))
def test_endless_batches_are_full_and_each_epoch_has_each_sample_once(count, batch, world, steps):
    ranks = [each.endless() for each in ranks_of(count, batch, world)]
    found = [[next(each) for _ in range(steps)] for each in ranks]
    positions = np.stack([[b["position"] for b in each] for each in found])  # [world, steps, batch]
    assert np.array_equal(np.sort(positions.reshape(-1)), np.arange(steps * batch * world))
    for epoch in range(steps * batch * world // count):
        ours = [
            n
            for each in found
            for b in each
            for n, p in zip(b["index"], b["position"], strict=True)
            if p // count == epoch
        ]
        assert sorted(ours) == list(range(count))


@settings(max_examples=150, deadline=None)
@given(
    count=counts,
    batch=batches,
    workers=st.integers(1, 6),
    seed=st.integers(0, 999),
    last=st.sampled_from(["short", "drop"]),
)
def test_the_order_is_the_same_for_any_number_of_workers(count, batch, workers, seed, last):
    alone = epoch_of(stream(count, batch, seed=seed, last=last))
    shares = []
    for worker in range(workers):
        each = stream(count, batch, seed=seed, last=last)
        shares.append(
            [b["index"].tolist() for b in each.run(lambda place: place.epoch == 0, worker, workers)]
        )
    in_turn = [shares[i % workers][i // workers] for i in range(len(alone))]
    assert in_turn == alone
    assert sum(map(len, shares)) == len(alone)


@settings(max_examples=200, deadline=None)
@given(count=counts, batch=batches, world=worlds, data=st.data())
def test_a_stream_resumed_anywhere_sees_the_same_remaining_samples(count, batch, world, data):
    rank = data.draw(st.integers(0, world - 1))
    steps = data.draw(st.integers(0, 40))
    whole = stream(count, batch, rank, world).endless()
    for _ in range(steps):
        next(whole)
    state = json.loads(json.dumps(whole.state_dict()))
    assert len(json.dumps(state)) < 400
    after = [next(whole)["index"].tolist() for _ in range(10)]
    resumed = stream(count, batch, rank, world).endless()
    resumed.load_state_dict(state)
    assert [next(resumed)["index"].tolist() for _ in range(10)] == after


@settings(max_examples=200, deadline=None)
@given(count=counts, batch=batches, world=worlds, other_batch=batches, other_world=worlds, data=st.data())
def test_a_stream_resumed_on_other_ranks_sees_exactly_what_was_left(
    count, batch, world, other_batch, other_world, data
):
    steps = data.draw(st.integers(0, count // (batch * world)))
    seen: list[int] = []
    ranks = ranks_of(count, batch, world)
    for each in ranks:
        source = iter(each)
        for _ in range(steps):
            seen += next(source)["index"].tolist()
    states = [each.state_dict() for each in ranks]
    assert all(state == states[0] for state in states)
    rest: list[int] = []
    for each in ranks_of(count, other_batch, other_world):
        each.load_state_dict(states[0])
        if each.epoch == 0:
            rest += [n for found in epoch_of(each) for n in found]
    assert sorted(seen + rest) == list(range(count))


@settings(max_examples=100, deadline=None)
@given(
    count=counts,
    shapes=st.lists(st.tuples(batches, worlds, st.integers(0, 12)), min_size=2, max_size=4),
)
def test_endless_batches_go_on_over_any_changes_of_ranks(count, shapes):
    """Epochs run into one another: the positions of all ranks and runs together have no gap and no repeat."""
    state, found = None, []
    for batch, world, steps in shapes:
        ranks = [each.endless() for each in ranks_of(count, batch, world)]
        for each in ranks:
            if state is not None:
                each.load_state_dict(state)
            found += [next(each) for _ in range(steps)]
        state = json.loads(json.dumps(ranks[0].state_dict()))
        assert all(each.state_dict() == state for each in ranks)
    total = sum(batch * world * steps for batch, world, steps in shapes)
    positions = np.concatenate([np.zeros(0, np.int64), *(b["position"] for b in found)])
    samples = np.concatenate([np.zeros(0, np.int64), *(b["index"] for b in found)])
    assert sorted(positions.tolist()) == list(range(total))
    for epoch in range(total // count):
        assert sorted(samples[positions // count == epoch].tolist()) == list(range(count))


@settings(max_examples=100, deadline=None)
@given(count=counts, batch=batches, world=worlds, other_batch=batches, other_world=worlds, data=st.data())
def test_dropping_the_rest_loses_less_than_one_global_batch_also_on_other_ranks(
    count, batch, world, other_batch, other_world, data
):
    steps = data.draw(st.integers(0, count // (batch * world)))
    seen: list[int] = []
    ranks = ranks_of(count, batch, world, last="drop")
    for each in ranks:
        source = iter(each)
        for _ in range(steps):
            seen += next(source)["index"].tolist()
    state = ranks[0].state_dict()
    if state["epoch"] == 0:
        for each in ranks_of(count, other_batch, other_world, last="drop"):
            each.load_state_dict(state)
            if each.epoch == 0:
                seen += [n for found in epoch_of(each) for n in found]
    assert len(seen) == len(set(seen))
    assert count - len(seen) < max(batch * world, other_batch * other_world)


@settings(max_examples=100, deadline=None)
@given(count=counts, batch=batches, world=worlds, data=st.data())
def test_the_state_after_a_batch_needs_only_the_batch(count, batch, world, data):
    """As with loader workers: another process made the batch, this one knows where the stream stands."""
    rank = data.draw(st.integers(0, world - 1))
    each = stream(count, batch, rank, world)
    found = list(each)
    assume(found)
    stop = data.draw(st.integers(0, len(found) - 1))
    resumed = stream(count, batch, rank, world)
    resumed.load_state_dict(resumed.state_after(found[stop]))
    rest = [b["index"].tolist() for b in resumed] if resumed.epoch == 0 else []
    assert rest == [b["index"].tolist() for b in found[stop + 1 :]]


def test_eight_ranks_of_four_workers_over_uneven_shards_see_each_sample_once():
    """12,347 samples in blocks that divide nothing; every (rank, worker) pair killed once and resumed."""
    count, batch, world, workers = 12_347, 8, 8, 4
    seen: list[int] = []
    for rank in range(world):
        for worker in range(workers):
            each = stream(count, batch, rank, world, shuffle="block", block=509, pool=5)
            share = each.run(lambda place: place.epoch == 0, worker, workers)
            for _ in range(11 + rank + worker):
                seen += next(share)["index"].tolist()
            state, turn = each.state_dict(), each.turn
            share.close()
            again = stream(count, batch, rank, world, shuffle="block", block=509, pool=5)
            again.load_state_dict(state)
            for found in again.run(lambda place: place.epoch == 0, worker, workers, turn):
                seen += found["index"].tolist()
    assert sorted(seen) == list(range(count))


def test_threads_change_nothing_but_the_time():
    assert epoch_of(stream(101, 7, threads=1)) == epoch_of(stream(101, 7, threads=4))
    source = iter(stream(101, 7, threads=4))
    next(source)


def test_the_place_is_that_of_the_batch_handed_over_not_of_those_made_ahead():
    each = stream(100, 10, threads=4)
    source = iter(each)
    for step in range(1, 5):
        next(source)
        assert (each.state_dict()["done"] + 10 * each.state_dict()["step"]) == 10 * step
    source.close()
    rest = epoch_of(each)
    assert len(rest) == 6


def test_stopping_in_the_middle_of_an_epoch_and_iterating_again_goes_on():
    each = stream(30, 10)
    first = next(iter(each))["index"].tolist()
    assert len(each) == 2
    assert sorted(first + [n for found in epoch_of(each) for n in found]) == list(range(30))
    assert each.epoch == 1


def test_epochs_differ_and_can_be_chosen():
    each = stream(50, 50)
    first, second = epoch_of(each), epoch_of(each)
    assert first != second
    each.set_epoch(0)
    assert epoch_of(each) == first


def test_any_place_of_a_huge_epoch_is_reached_at_once():
    begin = time.perf_counter()
    each = stream(10**9, 256, 3, 64)
    state = each.state_dict() | {"step": 50_000, "epoch": 17}
    each.load_state_dict(state)
    next(iter(each))
    assert time.perf_counter() - begin < 1


def test_states_of_other_streams_are_refused_by_the_field():
    each = stream(100)
    for other, word in (
        (stream(101), "samples: expected 101, found 100"),
        (stream(100, seed=1), "seed: expected 1, found 0"),
        (stream(100, shuffle="none"), "shuffle"),
    ):
        with pytest.raises(DataError, match=word):
            other.load_state_dict(each.state_dict())


def test_nonsense_is_refused():
    for options in ({"batch": 0}, {"rank": 2, "world": 2}, {"world": 0}, {"last": "pad"}):
        with pytest.raises(UsageError):
            stream(10, **options)
    with pytest.raises(UsageError, match="no end of an epoch"):
        iter(stream(10, last="carry"))
    with pytest.raises(UsageError, match="do not fill one batch"):
        next(stream(3, batch=4, last="drop").endless())


def test_an_error_in_a_thread_reaches_the_consumer():
    class Broken(Numbers):
        def read(self, samples, spec, health):
            if 7 in samples:
                raise DataError("part-00000.parquet: episode 3, frame 7 is damaged")
            return {"index": samples}

    each = Stream(Broken(20), StreamSpec(), 5, 0, 0, 1, Shuffle("none"), "short", 3)
    source = iter(each)
    assert next(source)["index"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="episode 3, frame 7"):
        next(source)
    assert each.state_dict()["step"] == 1


def test_positions_of_a_place_are_dealt_in_turn():
    ranks = ranks_of(10, 2, 2)
    assert [each.positions(Place(1, 0, 1)).tolist() for each in ranks] == [[14, 16], [15, 17]]
    assert [each.positions(Place(0, 0, 2)).tolist() for each in ranks] == [[8], [9]]
