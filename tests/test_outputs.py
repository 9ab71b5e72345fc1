"""Other forms of a dataset, judged by what reads them: the zarr library, and lerobot's own upgrade from v2.1."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import raw_calvin
import zarr
from dpipe.converters import load_converter
from dpipe.pipeline import lerobot21, outputs, zarr_output
from dpipe.pipeline.lerobot21 import slices
from dpipe.pipeline.outputs import OutputOptions, OutputRequest, OutputResult, estimate, write_output
from dpipe.pipeline.progress import Progress
from dpipe.schemas.errors import DataError, UsageError
from dpipe.streams.dataset import open_dataset
from dpipe.video.mp4 import read_table
from raw_libero import GOAL_TASK, demo_arrays, write_raw, write_suite
from small_datasets import number_of, write_dataset
from trees import run_convert, tree_digest

IMAGE = "observation.images.image"


def write(root: Path, form: str, out: Path, workers: int = 0, **options) -> OutputResult:
    request = OutputRequest(root, form, out, OutputOptions(**options), workers=workers)
    return write_output(request, Progress(quiet=True))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Episodes of 11, 12 and 13 frames in two parts, LIBERO's features; nothing may write to it."""
    base = tmp_path_factory.mktemp("outputs")
    write_suite(base / "raw", demos=3, steps=12)
    return run_convert(base / "raw", base / "dataset", part_frames=25).root


# --- zarr -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_replay_buffer_holds_every_row_and_picture(dataset: Path, tmp_path: Path, zarr_format: int):
    result = write(dataset, "zarr", tmp_path / "set.zarr", zarr_format=zarr_format)
    assert (result.episodes, result.frames, result.unchanged) == (3, 36, False)
    root = zarr.open(str(tmp_path / "set.zarr"), mode="r")
    assert root.metadata.zarr_format == zarr_format
    source = open_dataset(dataset)
    assert root["meta/episode_ends"][:].tolist() == [11, 23, 36]
    assert set(root["data"].keys()) == {"action", "state", "image", "image2", "task_index"}
    rows = source.all_columns(["action", "observation.state", "task_index"])
    for key, name in (("action", "action"), ("state", "observation.state"), ("task_index", "task_index")):
        assert (
            np.array_equal(root[f"data/{key}"][:], rows[name])
            and root[f"data/{key}"].dtype == rows[name].dtype
        )
        assert root[f"data/{key}"].attrs["names"] == list(source.names(name))
    for camera in ("image", "image2"):
        frames = [source.frames(e, f"observation.images.{camera}", 0, n) for e, n in enumerate((11, 12, 13))]
        assert np.array_equal(root[f"data/{camera}"][:], np.concatenate(frames))
    assert root.attrs["tasks"] == [GOAL_TASK.replace("_", " ")] and root.attrs["fps"] == 20
    assert root.attrs["conventions"]["gripper_action"] == {"open": -1, "close": 1}


def test_what_diffusion_policy_asserts_of_a_buffer_holds(dataset: Path, tmp_path: Path):
    """Its ReplayBuffer: `data` and `meta` of arrays alone, all as long as the last end, chunks cut in time only."""
    write(dataset, "zarr", tmp_path / "set.zarr")
    root = zarr.open(str(tmp_path / "set.zarr"), mode="r")
    ends = root["meta/episode_ends"]
    assert all(isinstance(value, zarr.Array) for _, value in root["meta"].members())
    for key, value in root["data"].members():
        assert isinstance(value, zarr.Array) and value.shape[0] == ends[-1], key
        assert value.chunks[1:] == value.shape[1:] and value.chunks[0] > 0
    for name in ("action", "image"):  # what zarr 2, to which it is pinned, looks for
        told = json.loads((tmp_path / f"set.zarr/data/{name}/.zarray").read_text())
        assert told["zarr_format"] == 2 and told["compressor"]["id"] == "zstd" and told["filters"] is None


def test_chunks_that_end_between_episodes_are_whole(dataset: Path, tmp_path: Path, monkeypatch):
    expected = zarr.open(str(write(dataset, "zarr", tmp_path / "a.zarr").root), mode="r")
    monkeypatch.setattr(
        zarr_output, "CHUNK_BYTES", 5 * 32 * 32 * 3
    )  # five pictures: 11, 23 and 36 fall inside
    monkeypatch.setattr(zarr_output, "PIECE_FRAMES", 10)
    monkeypatch.setattr(zarr_output, "BLOCK_FRAMES", 3)
    small = zarr.open(str(write(dataset, "zarr", tmp_path / "b.zarr").root), mode="r")
    assert small["data/image"].chunks[0] == 5
    for key in ("image", "action", "task_index"):
        assert np.array_equal(small[f"data/{key}"][:], expected[f"data/{key}"][:])


def test_pictures_can_be_left_out(dataset: Path, tmp_path: Path):
    write(dataset, "zarr", tmp_path / "set.zarr", images=False)
    root = zarr.open(str(tmp_path / "set.zarr"), mode="r")
    assert set(root["data"].keys()) == {"action", "state", "task_index"}
    request = OutputRequest(dataset, "zarr", tmp_path / "set.zarr", OutputOptions(images=False))
    assert estimate(request) == 36 * (7 * 4 + 8 * 4 + 8)
    assert estimate(OutputRequest(dataset, "zarr", tmp_path / "x")) == 36 * (
        7 * 4 + 8 * 4 + 8 + 2 * 32 * 32 * 3
    )


def test_keys_that_would_collide_keep_their_whole_names(tmp_path: Path):
    raw = write_dataset(tmp_path / "raw", [4], cameras=("action", "top"), kind="image")
    write(raw, "zarr", tmp_path / "set.zarr")
    root = zarr.open(str(tmp_path / "set.zarr"), mode="r")
    assert set(root["data"].keys()) == {"action", "observation.images.action", "top", "state", "task_index"}
    assert [number_of(f) for f in root["data/top"][:]] == [(t, 1) for t in range(4)]


def test_bytes_do_not_depend_on_the_number_of_workers(dataset: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(outputs, "WORTH_A_CLUSTER", 1)
    for form in ("zarr", "lerobot21"):
        for workers in (0, 2):
            write(dataset, form, tmp_path / f"{form}-{workers}", workers=workers)
        assert tree_digest(tmp_path / f"{form}-0") == tree_digest(tmp_path / f"{form}-2")


# --- one folder, one recipe -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zarr", "lerobot21"])
def test_a_rerun_finds_it_made_and_another_recipe_is_refused(dataset: Path, tmp_path: Path, form: str):
    out = tmp_path / "out"
    write(dataset, form, out)
    before = tree_digest(out)
    assert write(dataset, form, out).unchanged and tree_digest(out) == before
    with pytest.raises(UsageError, match="images: True then, False now"):
        write(dataset, form, out, images=False)
    other = write_dataset(tmp_path / "other", [4, 4], kind="none")
    with pytest.raises(UsageError, match="episodes: 3 then, 2 now"):
        write(other, form, out)
    assert tree_digest(out) == before
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="dpipe did not write it"):
        write(dataset, form, tmp_path / "mine")


@pytest.mark.parametrize(
    ("form", "module", "function"),
    [("zarr", zarr_output, "write_rows"), ("lerobot21", lerobot21, "write_part")],
)
def test_a_run_that_ends_early_leaves_nothing_that_looks_complete(
    dataset: Path, tmp_path: Path, monkeypatch, form: str, module, function: str
):
    whole, calls = getattr(module, function), []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise DataError("the disk went away")
        whole(*arguments)

    monkeypatch.setattr(module, function, failing)
    with pytest.raises(DataError, match="the disk went away"):
        write(dataset, form, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    monkeypatch.undo()
    write(dataset, form, tmp_path / "out")
    write(dataset, form, tmp_path / "fresh")
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "fresh")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh", "out"]


# --- LeRobot v2.1 -----------------------------------------------------------------------------------------


def packets(path: Path, first: int = 0, count: int | None = None) -> list[bytes]:
    table, data = read_table(path), path.read_bytes()
    stop = len(table) if count is None else first + count
    pairs = zip(table.offsets[first:stop].tolist(), table.sizes[first:stop].tolist(), strict=True)
    return [data[offset : offset + size] for offset, size in pairs]


def test_the_layout_is_that_of_v21(dataset: Path, tmp_path: Path):
    write(dataset, "lerobot21", tmp_path / "old")
    root = tmp_path / "old"
    info = json.loads((root / "meta/info.json").read_text())
    assert info["codebase_version"] == "v2.1" and info["chunks_size"] == 1000 and info["total_chunks"] == 1
    assert (info["total_episodes"], info["total_frames"], info["total_videos"]) == (3, 36, 6)
    lines = [json.loads(line) for line in (root / "meta/episodes.jsonl").read_text().splitlines()]
    sentence = GOAL_TASK.replace("_", " ")
    assert lines == [{"episode_index": e, "tasks": [sentence], "length": 11 + e} for e in range(3)]
    assert json.loads((root / "meta/tasks.jsonl").read_text()) == {"task_index": 0, "task": sentence}
    source = open_dataset(dataset)
    for episode, length in enumerate((11, 12, 13)):
        values = {"episode_chunk": 0, "episode_index": episode, "video_key": IMAGE}
        rows = pq.read_table(root / info["data_path"].format(**values))
        assert rows.num_rows == length and set(rows.column("episode_index").to_pylist()) == {episode}
        assert np.array_equal(
            rows.column("action").to_pylist(), source.columns(["action"], episode)["action"]
        )
        video = root / info["video_path"].format(**values)
        first = int(source.episodes.cameras[IMAGE].first_frame[episode])
        assert packets(video) == packets(source.video_path(episode, IMAGE), first, length)
    stats = [json.loads(line) for line in (root / "meta/episodes_stats.jsonl").read_text().splitlines()]
    assert [line["episode_index"] for line in stats] == [0, 1, 2]
    action = source.columns(["action"], 1)["action"].astype(np.float64)
    assert np.allclose(stats[1]["stats"]["action"]["mean"], action.mean(axis=0))
    assert np.shape(stats[1]["stats"][IMAGE]["mean"]) == (3, 1, 1) and stats[1]["stats"]["action"][
        "count"
    ] == [12]
    assert "LeRobot v2.1" in (root / "README.md").read_text()


def test_a_video_of_one_episode_is_shared_not_copied(tmp_path: Path):
    write_suite(tmp_path / "raw", demos=2, steps=8)
    run_convert(tmp_path / "raw", tmp_path / "set", part_frames=1)
    result = write(tmp_path / "set", "lerobot21", tmp_path / "old")
    source = open_dataset(tmp_path / "set")
    assert result.linked == 4
    for episode in range(2):
        video = tmp_path / f"old/videos/chunk-000/{IMAGE}/episode_{episode:06d}.mp4"
        assert video.samefile(source.video_path(episode, IMAGE))


def test_lerobots_own_upgrade_reads_it_back(dataset: Path, tmp_path: Path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.scripts.convert_dataset_v21_to_v30 import convert_dataset

    write(dataset, "lerobot21", tmp_path / "old")
    convert_dataset("local/old", root=tmp_path / "old", push_to_hub=False)
    source, again = open_dataset(dataset), open_dataset(tmp_path / "old")
    assert again.contents() == source.contents() and again.tasks == source.tasks
    judge = LeRobotDataset("local/old", root=tmp_path / "old", video_backend="pyav")
    assert len(judge) == 36
    for index in (0, 10, 11, 22, 23, 35):
        item = judge[index]
        episode, t = int(item["episode_index"]), int(item["frame_index"])
        frame = source.frames(episode, IMAGE, t, t + 1)[0]
        assert np.abs(item[IMAGE].numpy().transpose(1, 2, 0) * 255 - frame).mean() < 1
        assert item["task"] == source.tasks[0]


def test_our_own_reader_of_v21_gives_the_dataset_back(dataset: Path, tmp_path: Path):
    write(dataset, "lerobot21", tmp_path / "old")
    run_convert(tmp_path / "old", tmp_path / "again", "lerobot")
    source, again = open_dataset(dataset), open_dataset(tmp_path / "again")
    assert again.contents() == source.contents() and again.names("action") == source.names("action")
    for episode, length in enumerate((11, 12, 13)):
        assert np.array_equal(
            again.frames(episode, IMAGE, 0, length), source.frames(episode, IMAGE, 0, length)
        )


def test_a_dataset_of_others_without_statistics_gets_them(tmp_path: Path):
    raw = write_dataset(tmp_path / "raw", [6, 4, 4], stats=False, aggregate=True)
    write(raw, "lerobot21", tmp_path / "old")
    lines = [
        json.loads(line) for line in (tmp_path / "old/meta/episodes_stats.jsonl").read_text().splitlines()
    ]
    assert lines[1]["stats"]["observation.state"]["max"] == [1.0, 3.0, 0.0]
    assert lines[1]["stats"][IMAGE]["count"] == [4]
    odd = write_dataset(tmp_path / "odd", [5, 4])
    with pytest.raises(DataError, match="convert the dataset with dpipe convert lerobot first"):
        write(odd, "lerobot21", tmp_path / "none")


def test_modality_names_the_parts_of_the_robot(dataset: Path, tmp_path: Path):
    write(dataset, "lerobot21", tmp_path / "old")
    told = json.loads((tmp_path / "old/meta/modality.json").read_text())
    assert told["state"] == {"single_arm": {"start": 0, "end": 6}, "gripper": {"start": 6, "end": 8}}
    assert told["action"] == {"single_arm": {"start": 0, "end": 6}, "gripper": {"start": 6, "end": 7}}
    assert told["video"]["image2"] == {"original_key": "observation.images.image2"}
    assert told["annotation"]["human.task_description"] == {"original_key": "task_index"}
    arms = [f"{side}_{joint}" for side in ("left", "right") for joint in ("waist", "elbow", "gripper")]
    assert slices(arms) == {
        "left_arm": {"start": 0, "end": 2},
        "left_gripper": {"start": 2, "end": 3},
        "right_arm": {"start": 3, "end": 5},
        "right_gripper": {"start": 5, "end": 6},
    }
    assert list(slices(["x", "gripper", "y", "gripper_2"])) == [
        "single_arm",
        "gripper",
        "single_arm_2",
        "gripper_2",
    ]


# --- typed ------------------------------------------------------------------------------------------------


def typed(*words: object) -> int:
    """The command in this process; its exit code."""
    from dpipe.cli import cli

    try:
        return cli.main([str(word) for word in words], standalone_mode=False) or 0
    except SystemExit as left:
        return int(left.code or 0)


def test_convert_makes_the_dataset_first_and_then_its_form(tmp_path: Path, capsys):
    write_suite(tmp_path / "raw/libero", demos=2, steps=8)
    common = ("--workspace", tmp_path, "--workers", 0)
    assert typed("convert", "libero", "--to", "zarr", *common) == 0
    said = capsys.readouterr().out.splitlines()
    assert "libero: converted" in said[0] and "zarr: written, 2 episodes" in said[1]
    assert (tmp_path / "lerobot/libero/dpipe/manifest.json").is_file()
    assert zarr.open(str(tmp_path / "zarr/libero.zarr"), mode="r")["data/action"].shape == (7 + 8, 7)
    assert typed("convert", "libero", "--to", "lerobot21", "--json", *common) == 0
    facts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert facts[0]["unchanged"] and facts[1]["root"] == str(tmp_path / "lerobot21/libero")
    elsewhere = tmp_path / "else.zarr"
    assert typed("convert", "libero", "--to", "zarr", "--out", elsewhere, "--no-images", *common) == 0
    assert "image" not in zarr.open(str(elsewhere), mode="r")["data"]


@pytest.mark.parametrize("form", ["zarr", "lerobot21"])
def test_a_dry_run_tells_both_steps_and_writes_nothing(tmp_path: Path, capsys, form: str):
    write_suite(tmp_path / "raw/libero", demos=2, steps=8)
    common = ("convert", "libero", "--to", form, "--workspace", tmp_path, "--workers", 0)
    assert typed(*common, "--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["steps"]
    assert [step["name"] for step in told] == ["convert libero", f"convert --to {form}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]
    frames = 7 + 8
    pixels = 2 * 3 * 32 * 32 if form == "zarr" else 0
    assert told[1]["frames"] == frames and told[1]["write_bytes"] >= frames * (pixels + 4 * 15)
    assert typed(*common) == 0
    capsys.readouterr()
    assert typed(*common, "--dry-run", "--json") == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])["steps"]
    assert [step["episodes"] for step in again] == [0, 0]


def test_v21_leaves_the_language_column_out_that_it_has_no_type_for(tmp_path: Path):
    windows = [(102, 106, "open the drawer", "open_drawer")]
    raw_calvin.write_split(tmp_path / "raw/task_D_D/training", [(100, 119)], windows)
    options = load_converter("calvin").Options(cut="play", language_columns=True)
    run_convert(tmp_path / "raw", tmp_path / "set", "calvin", options=options)
    made = write(tmp_path / "set", "lerobot21", tmp_path / "old")
    info = json.loads((made.root / "meta/info.json").read_text())
    assert "language_persistent" not in info["features"]
    (path,) = (made.root / "data").rglob("*.parquet")
    assert "language_persistent" not in pq.read_schema(path).names


def test_a_grown_dataset_is_not_written_over_an_old_buffer(tmp_path: Path):
    path = write_suite(tmp_path / "raw/libero", demos=1, steps=8)
    common = ("--workspace", tmp_path, "--workers", 0)
    assert typed("convert", "libero", "--to", "zarr", *common) == 0
    write_raw(path.with_name("another_task_demo.hdf5"), {0: demo_arrays(6)})
    with pytest.raises(UsageError, match="episodes: 1 then, 2 now"):
        typed("convert", "libero", "--to", "zarr", *common)


def test_large_buffers_are_asked_about_with_cheaper_ways(tmp_path: Path, monkeypatch):
    import dpipe.commands.convert

    write_suite(tmp_path / "raw/libero", demos=1, steps=8)
    monkeypatch.setattr(dpipe.commands.convert, "ASK_ABOVE_BYTES", 1000)
    common = ("convert", "libero", "--to", "zarr", "--workspace", tmp_path, "--workers", 0)
    with pytest.raises(UsageError, match=r"--no-images, --resize[\s\S]*--yes"):
        typed(*common)
    assert not (tmp_path / "zarr").exists()
    assert typed(*common, "--yes") == 0
