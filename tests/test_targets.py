"""Targets for any trainer: right rows, right padding, bound by content, refused when something differs."""

import json
import multiprocessing
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import dpipe
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dpipe.pipeline.precompute import precompute, read_index
from dpipe.schemas.bfloat16 import float32_to_bfloat16
from dpipe.schemas.contract import BFLOAT16, FIXED_VIEW, ArraySpec, Contract
from dpipe.schemas.errors import DataError, UsageError
from dpipe.streams.arrays import write_array
from dpipe.streams.dataset import open_dataset
from dpipe.streams.targets import EpisodeTable, open_targets, parse_request
from raw_libero import demo_arrays, write_raw
from tiny_dataset import episode_columns, write_tiny
from trees import run_convert

EPISODES = [(0, 30), (1, 45), (2, 20), (3, 25)]
PARTS = [2, 1, 1]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    root = write_tiny(tmp_path_factory.mktemp("tokens") / "set", EPISODES, parts=PARTS)
    precompute(root, ["tokens"], {"tokens": {"probe": "none", "bins": [10, 20], "residual": True}})
    return root


def every_token(root, array="tok_N10"):
    """[T, D] per episode, read with nothing but the index and zarr."""
    zarr = pytest.importorskip("zarr")
    (folder,) = (root / "dpipe/targets/tokens").iterdir()
    index = read_index(folder)
    group = zarr.open_group(folder, mode="r")
    found = []
    for e in range(len(index["content"])):
        part = group[f"{array}/part-{index['part'][e]:05d}-{index['key'][e]}"][:]
        start = index["frame_start"][e]
        found.append(part[start : start + index["frame_rows"][e]])
    return found


def write_target(root, stage, contract, *arrays):
    """A finished target by hand: arrays are (spec, [rows of each episode])."""
    folder = root / "dpipe/targets" / stage / contract["variant"]
    contents = open_dataset(root).contents()
    index = {"content": contents, "episode_index": list(range(len(contents)))}
    index |= {"part": [0] * len(contents), "key": ["k"] * len(contents)}
    index["frames"] = [int(n) for n in open_dataset(root).episodes.length]
    for spec, rows in arrays:
        write_array(folder / spec.name / "part-00000-k", spec, np.concatenate(rows))
        counts = [len(r) for r in rows]
        index[f"{spec.axis}_rows"] = counts
        index[f"{spec.axis}_start"] = [sum(counts[:i]) for i in range(len(counts))]
    index.setdefault("frame_rows", index["frames"])
    index.setdefault("frame_start", [sum(index["frames"][:i]) for i in range(len(contents))])
    pq.write_table(pa.table(index), folder / "episodes.parquet")
    full = Contract(stage=stage, stage_version=1, source="", fps=10, **contract)
    data = {"contract": full.to_json(), "arrays": [spec.to_json() for spec, _ in arrays]}
    (folder / "contract.json").write_text(json.dumps(data))
    return folder


# --- rows and padding --------------------------------------------------------------------------------------


def test_chunks_and_padding_equal_the_slow_loop(tokens):
    targets = open_targets(tokens, ["tokens:N=10"], horizon=6)
    slow = every_token(tokens)
    row = 0
    for e, (_, frames) in enumerate(EPISODES):
        for t in range(frames):
            found = targets.take(index=row)
            for h in range(6):
                np.testing.assert_array_equal(found["tokens"][h], slow[e][min(t + h, frames - 1)])
                assert found["tokens_is_pad"][h] == (t + h >= frames)
            row += 1


def test_rows_and_episode_frame_pairs_are_the_same_question(tokens):
    targets = open_targets(tokens, ["tokens:N=20"], horizon=4)
    rng = np.random.default_rng(0)
    rows = rng.permutation(120)
    ends = np.cumsum([n for _, n in EPISODES])
    episode = np.searchsorted(ends, rows, side="right")
    frame = rows - np.r_[0, ends[:-1]][episode]
    by_row, by_pair = targets.take(index=rows), targets.take(episode=episode, frame=frame)
    assert set(by_row) == {"tokens", "tokens_is_pad"}
    for name in by_row:
        np.testing.assert_array_equal(by_row[name], by_pair[name])
    assert by_row["tokens"].shape == (120, 4, 4) and by_row["tokens_is_pad"].shape == (120, 4)
    square = targets.take(index=rows.reshape(10, 12))
    np.testing.assert_array_equal(square["tokens"].reshape(120, 4, 4), by_row["tokens"])


def test_offsets_repeat_the_last_row_and_mark_it(tokens):
    slow = every_token(tokens)
    both = open_targets(tokens, ["tokens:N=10,at=0|+16"]).take(episode=2, frame=10)
    np.testing.assert_array_equal(both["tokens"], [slow[2][10], slow[2][19]])
    assert both["tokens_is_pad"].tolist() == [False, True]
    back = open_targets(tokens, ["tokens:N=10,at=-3,as=past"]).take(episode=2, frame=1)
    np.testing.assert_array_equal(back["past"], slow[2][0])
    assert back["past_is_pad"]


def test_another_array_is_named_and_requests_live_side_by_side(tokens):
    targets = open_targets(
        tokens, ["tokens:N=10", "tokens:N=20,as=fine", "tokens:array=resid_N10,as=rest"], horizon=2
    )
    assert targets.names == ("tokens", "fine", "rest")
    found = targets.take(index=[0, 1])
    assert found["rest"].dtype == np.float16 and found["fine"].max() > 9
    assert set(targets.contracts) == {"tokens", "fine", "rest"}


def test_what_was_never_valid_is_padding(tmp_path):
    def broken(seed, frames):
        columns = episode_columns(seed, frames)
        if seed == 1:
            columns["action"][3] = np.nan
        return columns

    root = write_tiny(tmp_path / "set", EPISODES, columns=broken)
    precompute(root, ["tokens"], {"tokens": {"probe": "none"}})
    found = open_targets(root, ["tokens"], horizon=4).take(episode=1, frame=1)
    assert found["tokens_is_pad"].tolist() == [False, False, True, False]
    found = open_targets(root, ["tokens"], horizon=4).take(episode=1, frame=43)
    assert found["tokens_is_pad"].tolist() == [False, False, True, True]


def test_rows_outside_the_dataset_are_refused(tokens):
    targets = open_targets(tokens, ["tokens:N=10"])
    for bad in ({"index": 120}, {"index": -1}, {"episode": 2, "frame": 20}, {"episode": 4, "frame": 0}):
        with pytest.raises(IndexError, match="outside the dataset"):
            targets.take(**bad)
    with pytest.raises(UsageError, match="take"):
        targets.take(index=1, episode=2, frame=3)


def test_relative_chunks_are_stored_as_they_are(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES)
    precompute(root, ["tokens"], {"tokens": {"probe": "none", "relative": True, "chunk": 5}})
    found = open_targets(root, ["tokens"], horizon=99).take(episode=0, frame=28)
    assert found["tokens"].shape == (5, 4)
    assert found["tokens_is_pad"].tolist() == [False, False, True, True, True]


# --- what is stored small ----------------------------------------------------------------------------------


@pytest.fixture
def features(tmp_path):
    """Feature [2, 3] of frame t of episode seed is seed + t / 100, in three storages; and ragged ids."""
    root = write_tiny(tmp_path / "set", EPISODES)
    value = [s + np.arange(n)[:, None, None] / 100 + np.zeros((1, 2, 3)) for s, n in EPISODES]
    value = [v.astype(np.float32) for v in value]
    terms = {"camera": "observation.images.image", "augmentation": FIXED_VIEW, "model": "dct"}
    primary = {"primary": True}
    plain = ArraySpec("feat", (2, 3), "float16", (), primary)
    write_target(root, "foresight", {"variant": "a", **terms}, (plain, [v.astype(np.float16) for v in value]))
    brain = ArraySpec("feat", (2, 3), BFLOAT16, (), primary)
    other = {**terms, "camera": "observation.images.wrist"}
    write_target(
        root, "foresight", {"variant": "b", **other}, (brain, [float32_to_bfloat16(v) for v in value])
    )
    sparse = ArraySpec("feat", (2, 3), "int8", (), {**primary, "scale": "scale.npy"}, "kept", 4)
    small = [np.rint(v[::4] * 25).astype(np.int8) for v in value]
    folder = write_target(
        root, "foresight", {"variant": "c", **terms, "params": {"every": 4}}, (sparse, small)
    )
    np.save(folder / "scale.npy", np.full(3, 0.04, np.float32))
    counts = [np.arange(n) % 4 for _, n in EPISODES]
    ids = [np.concatenate([np.full(k, t) for t, k in enumerate(c)]).astype(np.uint16) for c in counts]
    ragged = ArraySpec(
        "ids", (), "uint16", (), {"primary": True, "ragged": {"start": "first", "rows": "count"}}, "id", 0
    )
    starts = [np.r_[0, np.cumsum(c)[:-1]].astype(np.int64) for c in counts]
    write_target(
        root,
        "fast",
        {"variant": "x"},
        (ragged, ids),
        (ArraySpec("first", (), "int64", (), {"auxiliary": True}), starts),
        (ArraySpec("count", (), "int64", (), {"auxiliary": True}), [c.astype(np.int64) for c in counts]),
    )
    return root


def test_any_horizon_of_a_feature_is_a_row_of_one_cache(features):
    targets = open_targets(
        features, ["foresight:name=a,at=+16", "foresight:name=a,as=now", "foresight:name=b,as=brain,at=+7"]
    )
    found = targets.take(episode=[1, 2], frame=[10, 12])
    np.testing.assert_allclose(found["foresight"][:, 0, 0], [1.26, 2.19], atol=2e-3)
    np.testing.assert_allclose(found["now"][:, 1, 2], [1.10, 2.12], atol=2e-3)
    np.testing.assert_allclose(found["brain"][:, 0, 0], [1.17, 2.19], atol=1e-2)
    assert found["brain"].dtype == np.float32
    assert found["foresight_is_pad"].tolist() == [False, True]


def test_a_camera_picks_its_cache(features):
    assert open_targets(features, ["foresight:cam=wrist"]).contracts["foresight"].variant == "b"
    with pytest.raises(UsageError, match="fits 2 targets") as error:
        open_targets(features, ["foresight:cam=image"])
    assert "name=a" in str(error.value) and "name=c: every=4" in str(error.value)
    with pytest.raises(DataError, match="no target 'foresight:cam=head'"):
        open_targets(features, ["foresight:cam=head"])


def test_every_fourth_frame_and_int8_come_back_as_numbers(features):
    found = open_targets(features, ["foresight:every=4"]).take(episode=1, frame=[8, 11, 12])
    assert found["foresight"].dtype == np.float32
    np.testing.assert_allclose(found["foresight"][:, 0, 0], [1.08, 1.08, 1.12], atol=0.021)


def test_ragged_sequences_are_padded_to_the_longest_or_to_what_is_asked(features):
    found = open_targets(features, ["fast"]).take(episode=[0, 1, 1], frame=[2, 7, 4])
    assert found["fast"].tolist() == [[2, 2, 0], [7, 7, 7], [0, 0, 0]]
    assert found["fast_is_pad"].tolist() == [[False, False, True], [False] * 3, [True] * 3]
    assert open_targets(features, ["fast:length=8"]).take(index=3)["fast"].shape == (8,)
    with pytest.raises(DataError, match="longer than length=2"):
        open_targets(features, ["fast:length=2"]).take(index=3)


def test_a_flip_asked_of_a_cached_feature_is_refused_but_not_of_tokens(features, tokens):
    with pytest.raises(DataError, match="augmentation 'flip'"):
        open_targets(features, ["foresight:name=a"], augmentation="flip")
    open_targets(tokens, ["tokens:N=10"], augmentation="flip")


def test_a_contract_that_differs_is_refused_by_the_field(features, tokens):
    digest = open_targets(tokens, ["tokens:N=10"]).contracts["tokens"].normaliser
    open_targets(tokens, ["tokens:N=10"], expect={"tokens": {"normaliser": digest}})
    with pytest.raises(DataError, match="normaliser: expected"):
        open_targets(tokens, ["tokens:N=10"], expect={"tokens": {"normaliser": "0" * 32}})
    with pytest.raises(DataError, match=r"camera: expected .*wrist"):
        open_targets(
            features, ["foresight:name=a"], expect={"foresight": {"camera": "observation.images.wrist"}}
        )


# --- binding by content ------------------------------------------------------------------------------------


def test_targets_survive_reordering_filtering_and_merging(tokens, tmp_path):
    slow = every_token(tokens)
    order = [2, 0]
    other = write_tiny(tmp_path / "other", [EPISODES[e] for e in order], ours=False)
    targets = open_targets(other, ["tokens:N=10"], targets=tokens / "dpipe/targets")
    np.testing.assert_array_equal(
        targets.take(index=np.arange(50))["tokens"], np.concatenate([slow[2], slow[0]])
    )

    # Two datasets with targets of their own, merged into one without any.
    second = write_tiny(tmp_path / "second", [(7, 22), (8, 31)])
    (folder,) = (tokens / "dpipe/targets/tokens").iterdir()
    shutil.copytree(folder, second / "dpipe/targets/tokens" / folder.name)  # same normaliser, same terms
    precompute(
        second, ["tokens"], {"tokens": {"probe": "none", "bins": [10, 20], "residual": True}}, name="own"
    )
    merged = write_tiny(tmp_path / "merged", [(8, 31), *EPISODES], ours=False)
    with pytest.raises(DataError, match="normaliser: expected"):
        open_targets(
            merged,
            ["tokens:N=10"],
            targets=[tokens / "dpipe/targets", _only(second, "own")],
        )


def _only(root, name):
    """A targets folder that holds one variant."""
    base = root / "dpipe" / f"only-{name}"
    (base / "tokens").mkdir(parents=True)
    shutil.copytree(root / "dpipe/targets/tokens" / name, base / "tokens" / name)
    return base


def test_one_target_may_come_from_several_folders(tmp_path):
    first = write_tiny(tmp_path / "first", EPISODES[:2])
    second = write_tiny(tmp_path / "second", EPISODES[2:])
    options = {"tokens": {"probe": "none", "normaliser": "identity", "gripper": "raw"}}
    for root in (first, second):
        precompute(root, ["tokens"], options)
    merged = write_tiny(tmp_path / "merged", EPISODES, ours=False)
    folders = [first / "dpipe/targets", second / "dpipe/targets"]
    targets = open_targets(merged, ["tokens:N=10"], targets=folders)
    expected = np.concatenate([*every_token(first), *every_token(second)])
    np.testing.assert_array_equal(targets.take(index=np.arange(120))["tokens"], expected)


@pytest.mark.slow  # importing lerobot is
def test_targets_survive_lerobots_own_delete_split_and_merge(tmp_path):
    pytest.importorskip("lerobot")
    from lerobot.datasets.dataset_tools import delete_episodes, merge_datasets, split_dataset
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    demos = {number: demo_arrays(frames, number) for number, frames in enumerate((9, 7, 8))}
    write_raw(tmp_path / "raw" / "libero_goal" / "pick_demo.hdf5", demos)
    root = tmp_path / "set"
    run_convert(tmp_path / "raw", root)
    base = root / "dpipe" / "targets"
    precompute(root, ["tokens"], {"tokens": {"probe": "none"}})
    own = open_targets(root, ["tokens:N=10"])
    lengths = own.table.lengths
    slow = [own.take(episode=e, frame=np.arange(n))["tokens"] for e, n in enumerate(lengths)]
    whole = LeRobotDataset("local/set", root=root, video_backend="pyav")

    def holds(changed: Path, episodes: list[int]) -> None:
        found = open_targets(changed, ["tokens:N=10"], targets=base)
        assert found.table.lengths == tuple(lengths[e] for e in episodes)
        rows = found.take(index=np.arange(sum(found.table.lengths)))["tokens"]
        np.testing.assert_array_equal(rows, np.concatenate([slow[e] for e in episodes]))

    delete_episodes(whole, [1], output_dir=tmp_path / "fewer", repo_id="local/fewer")
    holds(tmp_path / "fewer", [0, 2])
    parts = split_dataset(whole, {"a": [0, 1], "b": [2]}, output_dir=tmp_path / "parts")
    holds(Path(parts["b"].root), [2])
    merged = merge_datasets([parts["b"], parts["a"]], "local/merged", output_dir=tmp_path / "merged")
    holds(Path(merged.root), [2, 0, 1])


def test_the_v21_layout_is_bound_too(tokens, tmp_path):
    root = tmp_path / "v21"
    for e, (seed, frames) in enumerate(EPISODES):
        columns = {
            name: pa.array(values.tolist(), pa.list_(pa.float32()))
            for name, values in episode_columns(seed, frames).items()
        }
        path = root / f"data/chunk-000/episode_{e:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
    (root / "meta").mkdir()
    (root / "meta/info.json").write_text(
        json.dumps({"codebase_version": "v2.1", "total_episodes": 4, "chunks_size": 1000, "fps": 10})
    )
    targets = open_targets(root, ["tokens:N=10"], targets=tokens / "dpipe/targets")
    np.testing.assert_array_equal(
        targets.take(index=np.arange(120))["tokens"], np.concatenate(every_token(tokens))
    )


def test_an_episode_without_targets_is_named_at_once(tokens, tmp_path):
    other = write_tiny(tmp_path / "other", [*EPISODES, (5, 12)])
    with pytest.raises(DataError, match=r"1 of 5 episodes have none, first episode 4"):
        open_targets(other, ["tokens:N=10"], targets=tokens / "dpipe/targets")
    late = open_targets(other, ["tokens:N=10"], targets=tokens / "dpipe/targets", allow_missing=True)
    late.take(episode=0, frame=0)
    with pytest.raises(DataError, match="episode 4 has none"):
        late.take(episode=4, frame=0)


def test_twins_take_their_own_rows(tmp_path):
    root = write_tiny(tmp_path / "set", [(0, 10), (1, 12), (0, 10)])
    spec = ArraySpec("feat", (), "float32", (), {"primary": True})
    rows = [np.full(10, 1.0), np.full(12, 2.0), np.full(10, 3.0)]  # same actions, other pictures
    write_target(root, "foresight", {"variant": "a"}, (spec, [r.astype(np.float32) for r in rows]))
    found = open_targets(root, ["foresight"]).take(episode=[0, 1, 2], frame=[0, 0, 0])
    assert found["foresight"].tolist() == [1.0, 2.0, 3.0]


def test_a_table_of_contents_is_enough(tokens):
    data = open_dataset(tokens)
    table = EpisodeTable(tuple(data.contents()), tuple(int(n) for n in data.episodes.length))
    targets = open_targets(table, ["tokens:N=10"], targets=tokens / "dpipe/targets")
    assert targets.take(index=0)["tokens"].shape == (4,)
    with pytest.raises(UsageError, match="give targets=FOLDER"):
        open_targets(table, ["tokens:N=10"])


# --- beside other loaders ----------------------------------------------------------------------------------


class Frames:
    """Someone's map-style dataset: items by global position."""

    fps = 10

    def __init__(self, keys=("episode_index", "frame_index", "index")):
        self.keys = keys
        self.places = [(e, t) for e, (_, n) in enumerate(EPISODES) for t in range(n)]

    def __len__(self):
        return len(self.places)

    def __getitem__(self, position):
        e, t = self.places[position]
        item = {"episode_index": e, "frame_index": t, "index": position, "x": float(position)}
        return {key: item[key] for key in (*self.keys, "x")}


@pytest.mark.parametrize("keys", [("episode_index", "frame_index"), ("index",), ()])
def test_joining_adds_to_items_and_delegates_the_rest(tokens, keys):
    targets = open_targets(tokens, ["tokens:N=10"], horizon=3)
    joined = targets.join(Frames(keys))
    assert len(joined) == 120 and joined.fps == 10
    slow = np.concatenate(every_token(tokens))
    assert joined[70]["x"] == 70.0
    np.testing.assert_array_equal(joined[70]["tokens"][0], slow[70])
    batch = joined.__getitems__([5, 70, 119])
    assert [item["x"] for item in batch] == [5.0, 70.0, 119.0]
    for item, row in zip(batch, (5, 70, 119), strict=True):
        np.testing.assert_array_equal(item["tokens"], joined[row]["tokens"])
    with pytest.raises(AttributeError):
        _ = joined.nothing_of_the_kind


def test_a_filtered_dataset_without_keys_is_refused_rather_than_guessed(tokens):
    frames = Frames(())
    frames.places = frames.places[:50]
    with pytest.raises(UsageError, match="carry neither"):
        open_targets(tokens, ["tokens:N=10"]).join(frames)[3]


def _child(targets, rows, queue):
    queue.put(targets.take(index=rows)["tokens"].tolist())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_read_what_the_parent_reads(tokens, method):
    targets = open_targets(tokens, ["tokens:N=10"], horizon=3)
    rows = list(range(0, 120, 7))
    expected = targets.take(index=rows)["tokens"].tolist()  # the maps are open before the child starts
    assert len(pickle.dumps(targets)) < 20_000
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_child, args=(targets, rows, queue))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join()


def test_neither_torch_nor_dask_is_imported(tokens):
    code = (
        "import sys, dpipe; t = dpipe.open_targets(sys.argv[1], ['tokens:N=10'], horizon=5);"
        "t.take(index=[1, 2]); print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'dask', 'lerobot'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tokens)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.slow  # importing lerobot is
def test_lerobots_dataset_and_torchs_loader_carry_the_targets(tokens):
    torch = pytest.importorskip("torch")
    pytest.importorskip("lerobot")
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    steps = [i / 10 for i in range(4)]
    frames = LeRobotDataset("tiny", root=tokens, delta_timestamps={"action": steps})
    joined = dpipe.open_targets(frames, ["tokens:N=10"], horizon=4).join(frames)
    slow = every_token(tokens)
    item = joined[30 + 44]
    assert item["task"] == "task 1" and item["tokens_is_pad"].tolist() == item["action_is_pad"].tolist()
    loader = torch.utils.data.DataLoader(joined, batch_size=16, shuffle=True, num_workers=2)
    seen = 0
    for batch in loader:
        assert batch["tokens"].shape[1:] == (4, 4)
        assert torch.equal(batch["tokens_is_pad"], batch["action_is_pad"])
        for e, t, row in zip(batch["episode_index"], batch["frame_index"], batch["tokens"], strict=True):
            np.testing.assert_array_equal(row[0].numpy(), slow[int(e)][int(t)])
            seen += 1
    assert seen == 120
    taken = open_targets(tokens, ["tokens:N=10"]).take(index=torch.tensor([3, 4]))
    np.testing.assert_array_equal(taken["tokens"], slow[0][3:5])
    part = LeRobotDataset("tiny", root=tokens, episodes=[2, 3])
    joined = dpipe.open_targets(part, ["tokens:N=10"]).join(part)
    np.testing.assert_array_equal(joined[0]["tokens"], slow[2][0])


def test_requests_that_cannot_be_read_are_refused():
    assert parse_request("foresight:cam=image,at=+16").at == (16,)
    for bad, word in (("tokens:N", "key=value"), ("tokens:at=soon", "whole numbers")):
        with pytest.raises(UsageError, match=word):
            parse_request(bad)


def test_two_results_of_one_name_are_refused(tokens):
    with pytest.raises(UsageError, match="two targets are called 'tokens'"):
        open_targets(tokens, ["tokens:N=10", "tokens:N=20"])
    with pytest.raises(UsageError, match="could be any of N=10, N=20"):
        open_targets(tokens, ["tokens"])
    with pytest.raises(UsageError, match="unknown array of tokens"):
        open_targets(tokens, ["tokens:array=tok_N11"])
