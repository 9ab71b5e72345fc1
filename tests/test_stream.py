"""What a sample holds: windows, chunks, frames and targets, each at its own frame, from shards and from video."""

import gc
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dpipe.schemas.errors import DataError, UsageError
from dpipe.schemas.normalisers import fit
from dpipe.streams.buffers import Buffers
from dpipe.streams.dataset import open_dataset
from dpipe.streams.order import Shuffle
from dpipe.streams.rows import DatasetRows, Fit
from dpipe.streams.shard_writing import write_shards
from dpipe.streams.shards import ShardRows
from dpipe.streams.source import paired_dims
from dpipe.streams.stream import StreamSpec, cores, open_stream
from dpipe.streams.windows import Samples
from small_datasets import number_of, write_dataset

LENGTHS = [5, 30, 3, 12]
CAMERA = "observation.images.image"
PLAIN = StreamSpec(chunks={"action": 3}, cameras=())


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = write_dataset(
        tmp_path_factory.mktemp("stream") / "set",
        LENGTHS,
        cameras=("image", "image2"),
        splits={"train": "0:3", "test": "3:4"},
    )
    write_shards(open_dataset(root))
    return root


@pytest.fixture(params=["jpeg", "video"])
def frames(request) -> str:
    return request.param


def one(root: Path, spec: StreamSpec, episode: int, frame: int, **options) -> dict:
    """The sample of one frame, as a batch of one."""
    stream = open_stream(root, spec, split="all", batch_size=1, **options)
    sample = int(open_dataset(root).episodes.first_index[episode]) + frame
    return stream.source.read(np.array([sample]), stream.spec, stream.health)


def test_a_sample_is_its_frame(root: Path, frames: str):
    stream = open_stream(root, StreamSpec(chunks={"action": 4}), batch_size=8, frames=frames)
    assert isinstance(stream.source.rows, ShardRows if frames == "jpeg" else DatasetRows)
    seen = 0
    for batch in stream:
        seen += len(batch["index"])
        assert batch["observation.state"].dtype == np.float32
        assert batch["observation.state"].tolist() == [
            [e, t, 0] for e, t in zip(batch["episode_index"], batch["frame_index"], strict=True)
        ]
        for number, camera in enumerate((CAMERA, CAMERA + "2")):
            assert batch[camera].shape == (len(batch["index"]), 40, 60, 3)
            assert [number_of(frame) for frame in batch[camera]] == [(i, number) for i in batch["index"]]
        assert batch["task"] == [("pick", "place")[e % 2] for e in batch["episode_index"]]
    assert seen == 38


def test_chunks_begin_at_the_frame_and_padding_repeats_the_last(root: Path, frames: str):
    batch = one(root, StreamSpec(chunks={"action": 4}), 2, 1, frames=frames)
    assert batch["action"][0, :, 0].tolist() == [1, 2, 2, 2]
    assert batch["action_is_pad"].tolist() == [[False, False, True, True]]
    batch = one(
        root, StreamSpec(chunks={"action": 4, "observation.state": 2}, columns=()), 0, 0, frames=frames
    )
    assert batch["action"][0, :, 0].tolist() == [0, 1, 2, 3]
    assert batch["observation.state"][0].tolist() == [[0, 0, 0], [0, 1, 0]]


def test_a_chunk_may_begin_in_the_past(root: Path):
    batch = one(root, StreamSpec(chunks={"action": 4}, chunk_start=-2), 1, 1)
    assert batch["action"][0, :, 0].tolist() == [0, 0, 1, 2]
    assert batch["action_is_pad"].tolist() == [[True, False, False, False]]


def test_windows_and_the_future_come_in_the_order_asked(root: Path, frames: str):
    spec = StreamSpec(offsets=(-2, 0, 3), chunks={}, cameras=(CAMERA,))
    batch = one(root, spec, 1, 1, frames=frames)
    assert batch["observation.state"][0, :, 1].tolist() == [0, 1, 4]
    assert batch["observation.state_is_pad"].tolist() == [[True, False, False]]
    assert batch[CAMERA].shape == (1, 3, 40, 60, 3)
    assert [number_of(frame)[0] for frame in batch[CAMERA][0]] == [5, 6, 9]
    assert batch[f"{CAMERA}_is_pad"].tolist() == [[True, False, False]]


def test_one_camera_may_look_elsewhere_than_the_rest(root: Path):
    spec = StreamSpec(chunks={}, at={CAMERA + "2": (0, 16), "observation.state": (-1,)})
    batch = one(root, spec, 1, 20)
    assert batch[CAMERA].shape == (1, 40, 60, 3)
    assert [number_of(frame) for frame in batch[CAMERA + "2"][0]] == [(25, 1), (34, 1)]
    assert batch["observation.state"].tolist() == [[[1, 19, 0]]]


def test_frames_beyond_an_episode_are_its_own_last_one_never_the_next_episodes_first(root: Path, frames: str):
    spec = StreamSpec(chunks={}, offsets=(0, 1, 2), cameras=(CAMERA,))
    for e, last in enumerate(np.cumsum(LENGTHS) - 1):
        batch = one(root, spec, e, LENGTHS[e] - 1, frames=frames)
        assert {number_of(frame)[0] for frame in batch[CAMERA][0]} == {last}


def test_delta_and_relative_actions_are_measured_from_the_state(root: Path):
    """state = (episode, t, 0) and action = (t, -t, gripper) share the names x, y; gripper stays."""
    stored = one(root, StreamSpec(chunks={"action": 3}), 1, 27)["action"][0]
    assert stored.tolist() == [[27, -27, 1], [28, -28, 1], [29, -29, 1]]
    relative = one(root, StreamSpec(chunks={"action": 3}, actions="relative"), 1, 27)["action"][0]
    assert relative.tolist() == [[26, -54, 1], [27, -55, 1], [28, -56, 1]]
    delta = one(root, StreamSpec(chunks={"action": 4}, actions="delta"), 1, 27)
    assert delta["action"][0].tolist() == [[26, -54, 1], [1, -1, 1], [1, -1, 1], [0, 0, 1]]
    assert delta["action_is_pad"][0].tolist() == [False, False, False, True]


def test_padded_steps_of_relative_actions_stand_still_or_repeat(tmp_path: Path):
    moving = write_dataset(tmp_path / "a", [3], kind="none")
    (moving / "dpipe").mkdir()
    manifest = {"dpipe": 1, "name": "a", "conventions": {"action": "osc_pose_delta"}}
    (moving / "dpipe/manifest.json").write_text(json.dumps(manifest))
    spec = StreamSpec(chunks={"action": 3}, cameras=())
    assert one(moving, spec, 0, 1)["action"][0].tolist() == [[1, -1, 1], [2, -2, 1], [0, 0, 1]]
    repeat = one(moving, replace(spec, padding="repeat"), 0, 1)
    assert repeat["action"][0].tolist() == [[1, -1, 1], [2, -2, 1], [2, -2, 1]]
    with pytest.raises(UsageError, match="relative as stored"):
        one(moving, replace(spec, actions="relative"), 0, 1)


def test_actions_are_paired_with_states_by_name_else_by_place():
    absolute = ("absolute",) * 2
    assert paired_dims(("y", "x"), ("x", "y", "z"), absolute) == [1, 0]
    assert paired_dims(("a", "b"), ("x", "y", "z"), absolute) == [0, 1]
    assert paired_dims(("y", "gripper"), ("x", "y"), ("absolute", "gripper")) == [1, 0]
    with pytest.raises(UsageError, match="3 action dimensions, 2 of the state"):
        paired_dims(("a", "b", "c"), ("x", "y"), ("absolute",) * 3)


def test_normalised_columns_are_those_of_the_recorded_normaliser(root: Path):
    actions = open_dataset(root).all_columns(["action"])["action"]
    normaliser = fit(actions, "minmax", names=("x", "y", "gripper"))
    batch = one(root, StreamSpec(chunks={"action": 2}, normalise={"action": normaliser}), 1, 29)
    assert batch["action"].dtype == np.float32
    assert batch["action"][0, 0].tolist() == [1, -1, 1]
    assert np.array_equal(
        batch["action"][0, 0], normaliser.normalise(np.array([29, -29, 1])).astype(np.float32)
    )


def test_frames_are_fitted_as_declared(root: Path, frames: str):
    for how, shape in (("stretch", (20, 20)), ("pad", (60, 60)), ("crop", (24, 24)), ("stretch", (20, 30))):
        batch = one(root, StreamSpec(chunks={}, size=shape, fit=how, cameras=(CAMERA,)), 1, 3, frames=frames)
        frame = batch[CAMERA][0]
        assert frame.shape == (*shape, 3)
        if how == "stretch":
            assert number_of(frame) == (8, 0)
        if how == "pad":
            assert frame[:9].max() < 16
            assert number_of(frame[10:50]) == (8, 0)


def test_splits_tails_and_chosen_episodes(root: Path):
    assert open_stream(root, split="test").samples == 12
    assert open_stream(root, split="all").samples == 50
    stream = open_stream(root, StreamSpec(tail=4), split="all", batch_size=50, frames="none")
    frames_left = [max(0, n - 4) for n in LENGTHS]
    assert stream.samples == sum(frames_left)
    batch = next(iter(stream))
    assert sorted(zip(batch["episode_index"].tolist(), batch["frame_index"].tolist(), strict=True)) == [
        (e, t) for e, n in enumerate(frames_left) for t in range(n)
    ]
    assert not any(name.startswith("observation.images") for name in batch)
    chosen = open_stream(root, episodes=[3, 0], batch_size=99, frames="none", shuffle="none")
    assert next(iter(chosen))["episode_index"].tolist() == [3] * 12 + [0] * 5
    with pytest.raises(UsageError, match="no sample in 1 episodes"):
        open_stream(root, StreamSpec(tail=5), episodes=[0])


def test_video_and_shards_give_the_same_samples_in_the_same_order(root: Path):
    spec = StreamSpec(chunks={"action": 3}, offsets=(-1, 0))
    ours = open_stream(root, spec, batch_size=7, frames="jpeg")
    theirs = open_stream(root, spec, batch_size=7, frames="video", keep=0)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name in (CAMERA, CAMERA + "2"):
                assert np.abs(a[name].astype(int) - b[name]).mean() < 4
            else:
                assert np.array_equal(a[name], b[name]), name


def test_kept_frames_are_the_decoded_ones(root: Path):
    kept = open_stream(root, StreamSpec(chunks={}), batch_size=7, frames="video")
    plain = open_stream(root, StreamSpec(chunks={}), batch_size=7, frames="video", keep=0)
    for _ in range(2):
        for a, b in zip(kept, plain, strict=True):
            assert np.array_equal(a[CAMERA], b[CAMERA])
    figures = kept.health.totals()
    assert figures["frames_decoded"] == 2 * 38
    assert figures["frames_cached"] == 2 * 38
    assert plain.health.totals()["frames_decoded"] == 4 * 38


def test_tokens_are_read_beside_the_actions(root: Path, tmp_path: Path):
    import shutil

    from dpipe.pipeline.precompute import precompute

    here = tmp_path / "set"
    shutil.copytree(root, here)
    folder = tmp_path / "targets"
    precompute(here, ["tokens"], {"tokens": {"probe": "none"}}, out=folder)
    spec = StreamSpec(chunks={"action": 6}, targets=("tokens:N=10",), cameras=())
    stream = open_stream(here, spec, batch_size=16, targets=folder)
    actions = open_dataset(here).all_columns(["action"])["action"]
    for batch in stream:
        assert batch["tokens"].shape == (len(batch["index"]), 6, 3)
        assert np.array_equal(batch["tokens_is_pad"], batch["action_is_pad"][..., None]) or np.array_equal(
            batch["tokens_is_pad"], batch["action_is_pad"]
        )
        # x runs from 0 to 29: the highest bin at its end, the lowest at its start
        first, last = batch["action"][:, 0, 0] == actions[:, 0].min(), batch["action"][:, 0, 0] == 29
        assert np.all(batch["tokens"][:, 0, 0][last] == 9)
        assert np.all(batch["tokens"][:, 0, 0][first] == 0)


def test_a_map_style_view_has_the_same_samples(root: Path):
    stream = open_stream(root, StreamSpec(chunks={"action": 2}), batch_size=5)
    view = stream.map_style()
    assert len(view) == 38
    item = view[6]
    assert item["index"] == 6
    assert item["action"].tolist() == [[1, -1, -1], [2, -2, -1]]
    assert item["task"] == "place"
    assert number_of(item[CAMERA]) == (6, 0)
    several = view.__getitems__([3, 37, 0])
    assert [each["index"] for each in several] == [3, 37, 0]
    assert view[-1]["index"] == 37
    with pytest.raises(IndexError):
        view[38]


def test_unknown_names_are_refused_when_the_stream_is_opened(root: Path):
    for spec, word in (
        (StreamSpec(columns=("observation.stat",)), r"observation\.state"),
        (StreamSpec(chunks={"actions": 3}), "action"),
        (StreamSpec(cameras=("observation.images.top",)), "image2"),
        (StreamSpec(at={"nothing": (0,)}), "nothing"),
    ):
        with pytest.raises(UsageError, match=word):
            open_stream(root, spec, frames="video")
    for options in (
        {"actions": "absolut"},
        {"fit": "squash"},
        {"offsets": ()},
        {"chunks": {"action": 0}},
        {"columns": ("action",)},
    ):
        with pytest.raises(UsageError):
            StreamSpec(**options)
    with pytest.raises(UsageError, match="jpeg"):
        open_stream(root, frames="jpg")


def test_asking_for_jpegs_without_shards_says_how_to_make_them(tmp_path: Path):
    root = write_dataset(tmp_path / "a", [3], kind="image")
    with pytest.raises(DataError, match=r"no finished shards[\s\S]*dpipe precompute shards"):
        open_stream(root, frames="jpeg")


def test_a_stream_says_where_its_frames_come_from_and_which_decoder_was_chosen_why(root: Path):
    assert open_stream(root, frames="none").describe() == "38 samples; no frames"
    shards = open_stream(root, frames="jpeg", shuffle=Shuffle("block", 5, 2)).describe()
    assert re.fullmatch(
        r"38 samples; frames from JPEG shards in .*/jpeg256-q90; block shuffle that .*", shards
    )
    video = open_stream(root, frames="video").describe()
    assert re.search(r"videos of .*set, decoded by pyav \(decodes h264 and av1 here, the fastest of", video)


def test_health_counts_what_was_done(root: Path):
    stream = open_stream(root, StreamSpec(chunks={}), batch_size=8, frames="jpeg", threads=2)
    for _ in stream:
        pass
    totals = stream.health.totals()
    assert totals["samples"] == 38
    assert totals["batches"] == 5
    assert totals["frames_decoded"] == 76
    assert 76 * 300 < totals["bytes_read"] < 76 * 2000
    assert totals["decode_s"] > 0
    figures = stream.health.read()
    assert figures["bytes_per_sample"] == totals["bytes_read"] / 38
    assert figures["samples_per_second"] > 0
    assert 0 <= figures["wait_share"] <= 1
    assert stream.health.read()["samples_per_second"] == 0


def test_a_damaged_frame_stops_the_epoch_and_says_where(root: Path, tmp_path: Path):
    import shutil

    here = tmp_path / "set"
    shutil.copytree(root, here)
    part = here / "dpipe/shards/jpeg256-q90/part-00000.parquet"
    rows = ShardRows(part.parent, open_stream(root).source.rows.fit)
    data = bytearray(part.read_bytes())
    data[int(rows._arrays["frame_offset"][17, 0]) + 200] ^= 4
    part.write_bytes(data)
    with pytest.raises(DataError, match=rf"{re.escape(str(part))}: episode 1, frame 12, {CAMERA} is damaged"):
        for _ in open_stream(here, StreamSpec(chunks={}), batch_size=4, threads=3):
            pass


def test_a_damaged_frame_of_a_video_is_named_by_its_episode(root: Path, tmp_path: Path):
    """The two groups of pictures around row 17, frame 12 of episode 1, are overwritten."""
    import shutil

    from dpipe.video.mp4 import read_table

    here = tmp_path / "set"
    shutil.copytree(root, here)
    path = here / f"videos/{CAMERA}/chunk-000/file-000.mp4"
    table = read_table(path)
    data = bytearray(path.read_bytes())
    for sample in range(17, len(table)):
        start, size = int(table.offsets[sample]), int(table.sizes[sample])
        data[start + 8 : start + size] = b"\xff" * (size - 8)
    path.write_bytes(data)
    expected = rf"episode 1, frame (1[2-9]|2\d), {CAMERA}: {re.escape(str(path))}: frame \d+ "
    with pytest.raises(DataError, match=expected):
        for _ in open_stream(here, StreamSpec(chunks={}), batch_size=5, frames="video", threads=2):
            pass


def test_spec_and_stream_travel_to_another_process(root: Path):
    stream = open_stream(root, StreamSpec(chunks={"action": 2}), batch_size=5)
    next(iter(stream))
    there = pickle.loads(pickle.dumps(stream))
    assert there.state_dict() == stream.state_dict()
    for a, b in zip(stream, there, strict=True):
        assert np.array_equal(a["index"], b["index"])


def test_samples_find_their_place_again():
    samples = Samples.of(np.array([4, 1]), np.array([100, 10]), np.array([5, 3]))
    places = samples.locate(np.arange(8))
    assert places.episode.tolist() == [4] * 5 + [1] * 3
    assert places.row.tolist() == [100, 101, 102, 103, 104, 10, 11, 12]
    back = samples.place_of_rows(places.row)
    assert back.frame.tolist() == places.frame.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    with pytest.raises(IndexError):
        samples.place_of_rows(np.array([13]))


def test_buffers_are_used_again_only_when_nobody_looks():
    buffers = Buffers()
    first = buffers.take((4, 4))
    place = first.__array_interface__["data"][0]
    view = first[1:].reshape(-1)
    del first
    second = buffers.take((4, 4))
    assert second.__array_interface__["data"][0] != place
    del view
    third = buffers.take((4, 4))
    assert third.__array_interface__["data"][0] == place
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(third)[2:]
    del third
    assert buffers.take((4, 4)).__array_interface__["data"][0] != place
    del tensor
    assert buffers.take((4, 4)).__array_interface__["data"][0] == place


def test_batches_kept_by_the_consumer_are_never_written_again(root: Path):
    kept = list(open_stream(root, StreamSpec(chunks={}), batch_size=2, threads=3))
    for batch in kept:
        assert [number_of(frame)[0] for frame in batch[CAMERA]] == batch["index"].tolist()


def anonymous_kb() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1])
    pytest.skip("this system does not tell anonymous memory")


def _worker_memory(root: Path, copies: int) -> list[int]:
    """Anonymous memory after each of three epochs."""
    length = open_dataset(root).episodes.length
    episodes = np.tile(np.arange(len(length)), copies)
    stream = open_stream(
        root, StreamSpec(chunks={"action": 4}), episodes=episodes, batch_size=16, frames="jpeg", threads=1
    )
    figures = []
    for _ in range(3):
        for _ in stream:
            pass
        gc.collect()
        figures.append(anonymous_kb())
    return figures


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")  # noqa: PTH110
def test_memory_of_a_worker_is_flat_over_epochs_and_independent_of_size(root: Path):
    context = multiprocessing.get_context("spawn")
    figures = {}
    for copies in (4, 40):
        # No time limit: a busy machine takes minutes; a worker that dies raises here.
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            figures[copies] = pool.submit(_worker_memory, root, copies).result()
    for epochs in figures.values():
        assert max(epochs) - min(epochs) < 2_000
    assert abs(figures[40][-1] - figures[4][-1]) < 4_000


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Path:
    """311 frames in eleven episodes, as shards of 97, 40, 69, 8 and 97 rows."""
    lengths = [97, 1, 39, 44, 25, 3, 5, 40, 31, 20, 6]
    root = write_dataset(tmp_path_factory.mktemp("uneven") / "set", lengths, kind="none")
    with pytest.MonkeyPatch.context() as small:
        small.setattr("dpipe.streams.dataset.FOREIGN_PART_FRAMES", 97)
        write_shards(open_dataset(root))
    return root


def test_eight_ranks_of_four_workers_read_every_row_of_uneven_shards_once(uneven: Path):
    parts = [
        told["rows"] for told in ShardRows(next((uneven / "dpipe/shards").iterdir()), Fit()).index["parts"]
    ]
    assert sum(parts) == 311 and len(set(parts)) > 3
    for shuffle in (Shuffle(), Shuffle("block", 10, 3)):
        seen: list[int] = []
        for rank in range(8):
            for worker in range(4):
                stream = open_stream(uneven, PLAIN, "all", 3, rank=rank, world=8, shuffle=shuffle, threads=1)
                for batch in stream.run(lambda place: place.epoch == 0, worker, 4):
                    seen += batch["index"].tolist()
                    assert batch["observation.state"][:, 1].tolist() == batch["frame_index"].tolist()
        assert sorted(seen) == list(range(311))


PROGRAM = """
import json, os, sys
from dpipe.streams.stream import StreamSpec, open_stream
spec = StreamSpec(chunks={"action": 3}, cameras=())
stream = open_stream(sys.argv[1], spec, "all", 4, rank=1, world=3).endless()
if len(sys.argv) > 2:
    stream.load_state_dict(json.loads(sys.argv[2]))
for _ in range(200):
    print(json.dumps([next(stream)["index"].tolist(), stream.state_dict()]), flush=True)
"""


def test_a_killed_process_resumed_sees_the_same_remaining_samples(uneven: Path):
    """SIGKILL in the middle of an epoch; the new process goes on from the last state it had told."""

    def start(*state: str) -> subprocess.Popen:
        words = [sys.executable, "-c", PROGRAM, str(uneven), *state]
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)

    undisturbed = open_stream(uneven, PLAIN, "all", 4, rank=1, world=3).endless()
    expected = [next(undisturbed)["index"].tolist() for _ in range(90)]
    seen: list[list[int]] = []
    state: list[str] = []
    for steps in (37, 53):  # 26 batches an epoch
        process = start(*state)
        lines = [json.loads(process.stdout.readline()) for _ in range(steps)]
        process.kill()
        process.wait()
        process.stdout.close()
        seen += [batch for batch, _ in lines]
        state = [json.dumps(lines[-1][1])]
        assert len(state[0]) < 300
    assert seen == expected


def test_neither_torch_nor_dask_nor_pandas_is_imported(root: Path):
    program = (
        "import sys\n"
        "from dpipe.streams.stream import StreamSpec, open_stream\n"
        f"next(iter(open_stream({str(root)!r}, StreamSpec(chunks={{'action': 3}}))))\n"
        "print([name for name in ('torch', 'dask', 'pandas') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


def test_the_default_number_of_threads_is_the_cores_this_process_may_use():
    assert 1 <= cores() <= 8


@pytest.mark.slow
def test_windows_agree_with_lerobots_own_reading(root: Path):
    """Every low-dimensional value the same; frames within 1 grey level from video and 4 from JPEG, each its own."""
    torch = pytest.importorskip("torch")
    lerobot = pytest.importorskip("lerobot.datasets.lerobot_dataset")
    torch.set_num_threads(1)
    times = {"action": [h / 10 for h in range(4)], "observation.state": [-0.2, 0.0], CAMERA: [-0.1, 0.0]}
    theirs = lerobot.LeRobotDataset("a/b", root=root, delta_timestamps=times, return_uint8=True)
    spec = StreamSpec(
        chunks={"action": 4},
        at={"observation.state": (-2, 0), CAMERA: (-1, 0)},
        cameras=(CAMERA,),
        padding="repeat",
        torch=True,
    )
    for frames, limit in (("video", 1), ("jpeg", 4)):
        ours = open_stream(root, spec, split="all", batch_size=16, frames=frames).map_style()
        assert len(ours) == len(theirs)
        for i in range(0, len(theirs), 3):
            a, b = ours[i], theirs[i]
            for name in (
                "action",
                "action_is_pad",
                "observation.state",
                "observation.state_is_pad",
                f"{CAMERA}_is_pad",
            ):
                assert torch.equal(a[name], b[name]), (name, i)
            assert int(a["index"]) == int(b["index"])
            assert a["task"] == b["task"]
            expected = b[CAMERA].permute(0, 2, 3, 1).int()
            assert (a[CAMERA].int() - expected).abs().float().mean() < limit
            assert [number_of(f.numpy()) for f in a[CAMERA]] == [
                number_of(f.numpy().astype(np.uint8)) for f in expected
            ]
