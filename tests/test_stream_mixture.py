"""Mixtures: proportions kept exactly, vectors aligned by meaning, statistics and rates each member's own."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dpipe.converters import load_converter
from dpipe.schemas.errors import UsageError
from dpipe.schemas.normalisers import fit
from dpipe.schemas.unified import DIM, unify_action, unify_state
from dpipe.streams.dataset import open_dataset
from dpipe.streams.mixture import Member, MixtureSource, embodiment_of, episodes_where, open_mixture
from dpipe.streams.order import MIXTURE_BLOCK, MixtureOrder, Shuffle, block_counts
from dpipe.streams.stream import StreamSpec, open_stream
from hypothesis import given, settings
from hypothesis import strategies as st
from small_datasets import number_of, write_dataset

CAMERA = "observation.images.image"
BARE = StreamSpec(chunks={"action": 3}, cameras=())


def rename(root: Path, column: str, names: list[str]) -> Path:
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    info["features"][column]["names"] = names
    path.write_text(json.dumps(info))
    return root


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Action dimensions (x, y, gripper) and (y, z, gripper)."""
    a = write_dataset(tmp_path / "a", [20, 30], kind="image")
    b = write_dataset(tmp_path / "b", [12, 8, 10], kind="image", fps=20)
    return a, rename(b, "action", ["y", "z", "gripper"])


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(40, 3000), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_members_come_in_their_proportions_and_never_repeat_before_all_were_seen(sizes, seed, data):
    weights = [data.draw(st.floats(0.05, 1.0)) for _ in sizes]
    counts = block_counts(weights)
    assert sum(counts) == MIXTURE_BLOCK
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - MIXTURE_BLOCK * weight / sum(weights)) <= 1
    order = MixtureOrder(Shuffle(), seed, tuple(sizes), counts)
    upto = 2 * MIXTURE_BLOCK + data.draw(st.integers(0, 500))
    samples = order(np.arange(upto))
    member = np.searchsorted(np.cumsum(sizes), samples, side="right")
    assert np.array_equal(np.bincount(member, minlength=len(sizes)), order.drawn(upto))
    for number in range(len(sizes)):
        seen = np.bincount(samples[member == number] - sum(sizes[:number]), minlength=sizes[number])
        assert seen.max() - seen.min() <= 1
    assert np.array_equal(order(np.arange(upto - 37, upto)), samples[-37:])


def test_each_pass_through_a_member_has_each_sample_once():
    order = MixtureOrder(Shuffle(), 3, (64, 1000), (64, MIXTURE_BLOCK - 64))
    samples = order(np.arange(3 * MIXTURE_BLOCK))
    for block in range(3):  # 64 places a block, 64 samples: one pass each
        here = samples[block * MIXTURE_BLOCK : (block + 1) * MIXTURE_BLOCK]
        assert sorted(here[here < 64].tolist()) == list(range(64))


def test_dimensions_meet_by_name_and_the_mask_says_which_are_real(two):
    stream = open_mixture([Member(two[0]), Member(two[1])], BARE, batch_size=40)
    assert isinstance(stream.source, MixtureSource)
    assert stream.source.layout["action"] == ("x", "y", "gripper", "z")
    batch = next(iter(stream))
    assert set(batch["dataset"].tolist()) == {0, 1}
    assert batch["action"].shape == (40, 3, 4)
    for i, number in enumerate(batch["dataset"]):
        native = next(iter(open_stream(two[number], BARE, shuffle="none", batch_size=99)))
        row = native["action"][batch["index"][i]]
        expected = np.zeros((3, 4), np.float32)
        expected[:, [0, 1, 2] if number == 0 else [1, 3, 2]] = row
        assert np.array_equal(batch["action"][i], expected)
        assert batch["action_mask"][i].tolist() == [number == 0, True, True, number == 1]
        assert np.array_equal(batch["action_is_pad"][i], native["action_is_pad"][batch["index"][i]])
        assert batch["task"][i] == ("pick", "place")[batch["episode_index"][i] % 2]


def test_weights_are_realised_and_reported(two):
    stream = open_mixture([Member(two[0], 3), Member(two[1], 1)], BARE, batch_size=64)
    endless = stream.endless()
    seen = np.concatenate([next(endless)["dataset"] for _ in range(128)])  # two blocks
    assert np.bincount(seen).tolist() == [6144, 2048]
    report = stream.source.proportions(endless.stream)
    assert [each["samples"] for each in report] == [6144, 2048]
    assert [each["share"] for each in report] == [0.75, 0.25]
    assert report[0]["passes"] == 6144 / 50


def test_the_training_log_carries_realised_shares_beside_the_streams_health(two):
    pytest.importorskip("torch")
    from dpipe.trainer.mixed import MixedBatches

    batches = MixedBatches(open_mixture([Member(two[0], 3), Member(two[1], 1)], BARE).endless(), [], [])
    for _ in range(64):
        next(batches._batches)
    figures = batches.health()
    assert (figures["share_of_a"], figures["share_of_b"]) == (0.75, 0.25)
    assert figures["samples_per_second"] > 0
    assert batches._batches.stream.describe().startswith("80 samples; a 75.0%, no frames; b 25.0%")


def test_without_weights_members_count_by_their_samples(two):
    stream = open_mixture([Member(two[0]), Member(two[1])], BARE)
    assert stream.samples == 80
    assert stream.order.counts == (2560, 1536)  # 5 to 3


def test_ranks_workers_and_resume_hold_for_mixtures(two):
    def make(rank=0, world=1, batch=7):
        return open_mixture([Member(two[0], 2), Member(two[1], 1)], BARE, batch, 5, rank, world, threads=1)

    def key(batch):
        return list(zip(batch["dataset"].tolist(), batch["index"].tolist(), strict=True))

    alone = [pair for batch in make() for pair in key(batch)]
    assert len(alone) == 80
    ranks = [[pair for batch in make(rank, 3) for pair in key(batch)] for rank in range(3)]
    assert sorted(pair for each in ranks for pair in each) == sorted(alone)
    first = make()
    source = iter(first)
    seen = [pair for _ in range(4) for pair in key(next(source))]
    resumed = make(batch=11)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert seen + [pair for batch in resumed for pair in key(batch)] == alone


def test_each_member_is_normalised_by_its_own_statistics(two):
    own = [
        fit(open_dataset(root).all_columns(["action"])["action"], "minmax", gripper="scaled") for root in two
    ]
    members = [Member(root, normalise={"action": each}) for root, each in zip(two, own, strict=True)]
    batch = next(iter(open_mixture(members, BARE, batch_size=80)))
    for number, root in enumerate(two):
        longest = max(open_dataset(root).episodes.length) - 1
        last = (batch["dataset"] == number) & (batch["frame_index"] == longest)
        first_dim = 0 if number == 0 else 1
        assert last.any()
        assert np.all(batch["action"][last, 0, first_dim] == 1)
    with pytest.raises(UsageError, match="its own normalisers"):
        open_mixture(members, StreamSpec(normalise={"action": own[0]}, cameras=()))


def test_steps_are_equally_long_at_a_common_rate(two):
    """10 and 20 frames per second at 5 steps per second: every 2nd and every 4th frame."""
    spec = StreamSpec(chunks={"observation.state": 3}, columns=(), cameras=(), fps=5)
    batch = next(iter(open_mixture([Member(two[0]), Member(two[1])], spec, batch_size=80)))
    for number, stride in ((0, 2), (1, 4)):
        here = np.flatnonzero((batch["dataset"] == number) & ~batch["observation.state_is_pad"].any(axis=1))
        assert len(here)
        steps = batch["observation.state"][here, :, 1]
        assert np.array_equal(steps, batch["frame_index"][here, None] + np.arange(3) * stride)


def test_moves_are_summed_over_the_frames_between(tmp_path: Path):
    root = write_dataset(tmp_path / "a", [7], kind="none")
    rename(root, "action", ["delta_x", "delta_y", "gripper"])
    spec = StreamSpec(chunks={"action": 3}, cameras=(), fps=5)
    batch = next(iter(open_stream(root, spec, shuffle="none", batch_size=7)))
    # action[t] = (t, -t, gripper: -1 in frames 0 to 2, then 1)
    assert batch["action"][0].tolist() == [[1, -1, -1], [5, -5, 1], [9, -9, 1]]
    assert batch["action"][3].tolist() == [[7, -7, 1], [11, -11, 1], [0, 0, 1]]
    assert batch["action_is_pad"][3].tolist() == [False, False, True]
    assert batch["action_is_pad"][2].tolist() == [False, False, True]
    for rate in (4, 20):
        with pytest.raises(UsageError, match="no whole part"):
            open_stream(root, StreamSpec(chunks={"action": 3}, cameras=(), fps=rate))


def test_conditions_choose_episodes(two):
    dataset = open_dataset(two[0])
    assert episodes_where(dataset, "frames > 20") == [1]
    assert episodes_where(dataset, "task = 'pick' AND seconds <= 2") == [0]
    stream = open_mixture([Member(two[0], where="frames > 20"), Member(two[1], where="episode <> 1")], BARE)
    assert stream.samples == 30 + 22
    with pytest.raises(UsageError, match=r"cannot be evaluated[\s\S]*columns: episode, frames"):
        episodes_where(dataset, "length > 3")
    with pytest.raises(UsageError, match="no episode of a"):
        episodes_where(dataset, "frames > 1000")
    with pytest.raises(UsageError, match="cannot be evaluated"):
        episodes_where(dataset, "episode IN (SELECT 1 FROM read_csv('/etc/passwd'))")


def test_cameras_meet_by_role_and_a_missing_one_is_marked(two):
    spec = StreamSpec(chunks={}, size=(20, 30))
    members = [
        Member(two[0], cameras={"front": CAMERA}),
        Member(two[1], cameras={"side": CAMERA}),
    ]
    batch = next(iter(open_mixture(members, spec, batch_size=80)))
    for role, number in (("front", 0), ("side", 1)):
        assert np.array_equal(batch[f"{role}_is_missing"], batch["dataset"] != number)
        for i in range(80):
            if batch["dataset"][i] == number:
                assert number_of(batch[role][i])[0] == batch["index"][i]
            else:
                assert not batch[role][i].any()
    with pytest.raises(UsageError, match="one size"):
        open_mixture(members, StreamSpec(chunks={}))


def libero_like(root: Path, lengths: list[int]) -> Path:
    """A dataset of LIBERO's embodiment, columns beside it included, of smooth made-up numbers."""
    converter = load_converter("libero")
    body = converter.embodiment(converter.Options(), "")
    write_dataset(root, lengths, kind="none", episodes_per_file=99)
    path = root / "data/chunk-000/file-000.parquet"
    table, total = pq.read_table(path), sum(lengths)
    rng = np.random.default_rng(0)
    beside = {}
    info = json.loads((root / "meta/info.json").read_text())
    for feature in (*body.features, *body.sidecar):
        values = rng.uniform(-1, 1, total * feature.dim).astype(feature.dtype)
        column = pa.FixedSizeListArray.from_arrays(pa.array(values), feature.dim)
        if feature in body.features:
            place = table.column_names.index(feature.name)
            table = table.set_column(place, feature.name, column)
            info["features"][feature.name] = feature.to_lerobot()
        else:
            beside[feature.name] = column
    pq.write_table(table, path)
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "dpipe/columns/chunk-000").mkdir(parents=True)
    pq.write_table(pa.table(beside), root / "dpipe/columns/chunk-000/file-000.parquet")
    told = {
        group: {f.name: {**asdict(f), "names": list(f.names)} for f in getattr(body, group)}
        for group in ("features", "sidecar")
    }
    manifest = {
        "dpipe": 1,
        "name": root.name,
        "conventions": dict(body.conventions),
        "embodiment": {"name": body.name, "robot_type": body.robot_type, "fps_origin": "", **told},
    }
    (root / "dpipe/manifest.json").write_text(json.dumps(manifest))
    return root


def test_unified_vectors_are_those_of_the_schema_at_every_step(tmp_path: Path):
    roots = [libero_like(tmp_path / "one", [9, 6]), libero_like(tmp_path / "two", [5])]
    stream = open_mixture([Member(root) for root in roots], BARE, batch_size=20, align="unified")
    batch = next(iter(stream))
    assert batch["observation.state"].shape == (20, DIM)
    assert batch["action"].shape == (20, 3, DIM)
    for number, root in enumerate(roots):
        dataset = open_dataset(root)
        body = embodiment_of(dataset)
        columns = dataset.all_columns(["observation.state", "action", "joint_pos", "next_ee_pose"])
        state, action = unify_state(body, columns), unify_action(body, columns)
        ends = dataset.episodes.first_index + dataset.episodes.length - 1
        for i in np.flatnonzero(batch["dataset"] == number):
            row = int(batch["index"][i])
            steps = np.minimum(row + np.arange(3), ends[batch["episode_index"][i]])
            assert np.array_equal(batch["observation.state"][i], state.values[row].astype(np.float32))
            assert np.array_equal(batch["action"][i], action.values[steps].astype(np.float32))
            assert np.array_equal(batch["observation.state_mask"][i], state.mask)
            assert np.array_equal(batch["action_mask"][i], action.mask)


def test_a_dataset_that_does_not_say_what_it_means_has_no_unified_vector(two):
    with pytest.raises(UsageError, match="does not say what its numbers mean"):
        open_mixture([Member(two[0])], BARE, align="unified")


def test_nonsense_is_refused(two):
    with pytest.raises(UsageError, match="at least one"):
        open_mixture([], BARE)
    with pytest.raises(UsageError, match="above 0"):
        open_mixture([Member(two[0], 0)], BARE)
    with pytest.raises(UsageError, match="names, unified"):
        open_mixture([Member(two[0])], BARE, align="name")
