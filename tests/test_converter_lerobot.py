"""LeRobot datasets as a source: both layouts, every writer's quirks, and what is left out of a damaged one."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dpipe.converters import load_converter
from dpipe.converters.lerobot import CONVERTER, Options
from dpipe.converters.lerobot_files import dimension_names, open_source
from dpipe.pipeline.payload import VideoOptions
from dpipe.schemas.errors import DataError, UsageError
from dpipe.streams.dataset import Dataset, open_dataset
from dpipe.video.mp4 import read_table
from lerobot21_files import write_v21
from raw_libero import write_suite
from small_datasets import columns_of, encode_png, number_of, picture, write_dataset, write_video
from trees import run_convert, tree_digest

CAMERA = "observation.images.image"


def check(dataset: Dataset, lengths: list[int], camera: str = CAMERA) -> None:
    """Every value and every picture of the small datasets, told by their own positions."""
    assert dataset.episodes.length.tolist() == lengths
    first = 0
    for episode, length in enumerate(lengths):
        expected = columns_of(episode, length)
        columns = dataset.columns(expected, episode)
        assert all(np.array_equal(columns[name], expected[name]) for name in expected)
        frames = dataset.frames(episode, camera, 0, length)
        assert [number_of(frame) for frame in frames] == [(first + t, 0) for t in range(length)]
        first += length


def edit_table(path: Path, **columns) -> None:
    """Replace columns of a Parquet file: lists of Python values, or functions of the present ones."""
    table = pq.read_table(path)
    for name, values in columns.items():
        present = table.column(name).to_pylist() if name in table.column_names else None
        made = values(present) if callable(values) else values
        field = table.schema.field(name) if present is not None else name
        array = pa.array(made, table.schema.field(name).type if present is not None else None)
        place = table.column_names.index(name) if present is not None else table.num_columns
        table = (
            table.set_column(place, field, array) if present is not None else table.append_column(name, array)
        )
    pq.write_table(table, path)


def edit_info(root: Path, **entries) -> None:
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | entries))


def reasons(result) -> dict[str, str]:
    return {drop.source_id: drop.reason for drop in result.dropped}


# --- what is out there ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize("aggregate", [False, True])
def test_every_value_and_picture_comes_along(tmp_path: Path, kind: str, aggregate: bool):
    lengths = [6, 7, 8]  # 7: the third episode begins inside a group of pictures
    raw = write_dataset(tmp_path / "raw", lengths, kind=kind, aggregate=aggregate, stats=False)
    result = run_convert(raw, tmp_path / "out", "lerobot")
    assert (result.dropped, result.warnings) == ((), ())
    dataset = open_dataset(tmp_path / "out")
    check(dataset, lengths)
    assert dataset.tasks == ["pick", "place"] and dataset.names("action") == ("x", "y", "gripper")
    assert (dataset.fps, dataset.info["robot_type"]) == (10, "paper")


@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize("version", ["v2.1", "v2.0"])
def test_a_file_an_episode_reads_like_files_of_many(tmp_path: Path, kind: str, version: str):
    lengths = [6, 5, 4]
    write_v21(tmp_path / "old", lengths, kind=kind, version=version, chunks_size=2)
    write_dataset(tmp_path / "new", lengths, kind=kind)
    for name in ("old", "new"):
        assert run_convert(tmp_path / name, tmp_path / f"{name}.out", "lerobot").dropped == ()
    old, new = open_dataset(tmp_path / "old.out"), open_dataset(tmp_path / "new.out")
    check(old, lengths)
    assert old.contents() == new.contents()
    assert old.tasks == new.tasks and old.names("action") == new.names("action") == ("x", "y", "gripper")


def test_packets_are_copied_where_episodes_are_whole_groups_of_pictures(tmp_path: Path):
    raw = write_dataset(tmp_path / "raw", [6, 8, 4, 6], episodes_per_file=2)
    run_convert(raw, tmp_path / "out", "lerobot")
    dataset = open_dataset(tmp_path / "out")
    check(dataset, [6, 8, 4, 6])
    assert "video.g" not in dataset.features[CAMERA]["info"]  # nothing is known of the encoder
    made = packets(tmp_path / "out" / f"videos/{CAMERA}/chunk-000/file-000.mp4")
    given = [packets(raw / f"videos/{CAMERA}/chunk-000/file-{file:03d}.mp4") for file in (0, 1)]
    assert made == given[0] + given[1]


def packets(path: Path) -> list[bytes]:
    table, data = read_table(path), path.read_bytes()
    return [data[o : o + s] for o, s in zip(table.offsets.tolist(), table.sizes.tolist(), strict=True)]


def test_a_part_with_one_clip_that_cannot_be_copied_is_transcoded_whole(tmp_path: Path):
    raw = write_dataset(tmp_path / "raw", [6, 7, 8], episodes_per_file=3)
    run_convert(raw, tmp_path / "out", "lerobot", part_frames=13)  # parts: episodes 0 and 1; episode 2
    dataset = open_dataset(tmp_path / "out")
    check(dataset, [6, 7, 8])
    first, second = (tmp_path / "out" / f"videos/{CAMERA}/chunk-000/file-{f:03d}.mp4" for f in (0, 1))
    assert packets(first) == packets(raw / f"videos/{CAMERA}/chunk-000/file-000.mp4")[:13]
    assert dataset.episodes.cameras[CAMERA].first_frame.tolist() == [0, 6, 0]
    assert read_table(second).keyframe_interval <= 2
    run_convert(raw, tmp_path / "one", "lerobot")
    whole = open_dataset(tmp_path / "one")
    check(whole, [6, 7, 8])
    assert whole.features[CAMERA]["info"]["video.g"] == 2  # encoded here, all of it
    copied = run_convert(raw, tmp_path / "copy", "lerobot", video=VideoOptions(video="copy"))
    assert list(reasons(copied)) == ["episode_000002"] and "--video auto" in copied.dropped[0].reason


def test_recorder_and_aggregate_tool_of_lerobot_itself(tmp_path: Path):
    from lerobot.datasets.aggregate import aggregate_datasets
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features = {
        CAMERA: {"dtype": "video", "shape": (64, 96, 3), "names": ["height", "width", "channels"]},
        "observation.state": {"dtype": "float32", "shape": (3,), "names": ["x", "y", "z"]},
        "action": {"dtype": "float32", "shape": (3,), "names": ["x", "y", "gripper"]},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
    }
    first = 0
    for name, lengths in (("a", [5, 4]), ("b", [6])):
        made = LeRobotDataset.create(
            f"local/{name}", fps=10, features=features, root=tmp_path / name, robot_type="paper"
        )
        for length in lengths:
            episode = [5, 4, 6].index(length)
            values = columns_of(episode, length)
            for t in range(length):
                made.add_frame(
                    {CAMERA: picture(first + t, 0, 64, 96), "next.success": np.array([t == length - 1])}
                    | {key: column[t] for key, column in values.items()}
                    | {"task": f"task {episode % 2}"}
                )
            first += length
            made.save_episode()
        made.finalize()
    aggregate_datasets(
        ["local/a", "local/b"], "local/ab", roots=[tmp_path / "a", tmp_path / "b"], aggr_root=tmp_path / "ab"
    )
    result = run_convert(tmp_path / "ab", tmp_path / "out", "lerobot")
    assert result.dropped == ()
    dataset = open_dataset(tmp_path / "out")
    check(dataset, [5, 4, 6])
    assert dataset.columns(["next.success"], 1)["next.success"].tolist() == [False, False, False, True]
    assert {dataset.episodes.tasks(e)[0] for e in (0, 2)} == {"task 0"}
    assert dataset.features[CAMERA]["info"]["video.codec"] == "av1"  # its packets, not ours
    judge = LeRobotDataset("local/out", root=tmp_path / "out", video_backend="pyav")
    item = judge[9]
    assert len(judge) == 15 and item["task"] == "task 0"
    assert number_of((item[CAMERA].numpy().transpose(1, 2, 0) * 255).round()) == (9, 0)


def test_splits_are_kept_and_train_comes_first(tmp_path: Path):
    raw = write_dataset(
        tmp_path / "raw", [6, 5, 4, 3], kind="none", splits={"validation": "0:1,3:4", "train": "1:3"}
    )
    run_convert(raw, tmp_path / "out", "lerobot")
    dataset = open_dataset(tmp_path / "out")
    assert [dataset.episodes.split(e) for e in range(4)] == ["train", "train", "validation", "validation"]
    assert [dataset.episodes.source_id(e) for e in range(4)] == [f"episode_{e:06d}" for e in (1, 2, 0, 3)]


def test_a_task_that_changes_within_an_episode_becomes_segments(tmp_path: Path):
    raw = write_dataset(tmp_path / "raw", [6, 4], kind="none")
    edit_table(raw / "data/chunk-000/file-000.parquet", task_index=[0, 0, 0, 1, 1, 1, 1, 1, 1, 1])
    run_convert(raw, tmp_path / "out", "lerobot")
    assert open_dataset(tmp_path / "out").episodes.tasks(0) == ["pick"]
    rows = pq.read_table(tmp_path / "out/dpipe/segments.parquet").to_pylist()
    assert [(r["episode_index"], r["start"], r["stop"], r["text"]) for r in rows] == [
        (0, 0, 3, "pick"),
        (0, 3, 6, "place"),
    ]


def test_a_lost_task_table_leaves_the_sentences_of_the_episode_table(tmp_path: Path):
    raw = write_dataset(tmp_path / "raw", [6, 4], kind="none")
    (raw / "meta/tasks.parquet").unlink()
    assert run_convert(raw, tmp_path / "out", "lerobot").dropped == ()
    assert open_dataset(tmp_path / "out").tasks == ["pick", "place"]


def test_names_are_flat_and_one_a_dimension():
    assert dimension_names(["x", "y"], "action", 2) == ("x", "y")
    assert dimension_names({"motors": ["a", "gripper"]}, "action", 2) == ("a", "gripper")
    assert dimension_names({"delta_y": 1, "delta_x": 0}, "action", 2) == ("delta_x", "delta_y")
    assert dimension_names(["x", "x"], "action", 2) == ("action_0", "action_1")
    assert dimension_names(None, "observation.state", 3) == ("state_0", "state_1", "state_2")
    assert dimension_names(["motors"], "action", 2) == ("action_0", "action_1")
    assert dimension_names(None, "next.reward", 1) == ("next_reward",)


@pytest.mark.parametrize("both", [False, True])
def test_state_and_actions_as_openpi_calls_them_become_what_policies_look_for(tmp_path: Path, both: bool):
    """Version 2.0, pictures in the rows, no prefix: how the published LIBERO and CALVIN copies look."""
    raw = write_v21(tmp_path / "raw", [4, 5], kind="image", version="v2.0")
    names = {"observation.images.image": "wrist_image", "observation.state": "state", "action": "actions"}
    for path in sorted((raw / "data").rglob("*.parquet")):
        table = pq.read_table(path)
        plain = table.rename_columns([names.get(name, name) for name in table.column_names])
        pq.write_table(plain.append_column("action", table["action"]) if both else plain, path)
    told = json.loads((raw / "meta/info.json").read_text())["features"]
    features = {names.get(name, name): feature for name, feature in told.items()}
    edit_info(raw, features=features | ({"action": told["action"]} if both else {}))
    run_convert(raw, tmp_path / "out", "lerobot")
    dataset = open_dataset(tmp_path / "out")
    expected = {"observation.state", "action"} | ({"actions"} if both else set())
    assert expected <= set(dataset.info["features"]) and "state" not in dataset.info["features"]
    assert "observation.images.wrist_image" in dataset.info["features"]
    stored = np.stack(pq.read_table(raw / "data/chunk-000/episode_000001.parquet")["actions"].to_numpy())
    assert np.array_equal(dataset.columns(["action"], 1)["action"], stored)
    renamed = dataset.manifest["conventions"]["renamed"]
    assert renamed == {"state": "observation.state"} | ({} if both else {"actions": "action"})


def test_more_dimensions_are_flattened_in_c_order(tmp_path: Path):
    raw = write_dataset(tmp_path / "raw", [4], kind="none")
    edit_table(
        raw / "data/chunk-000/file-000.parquet",
        tactile=[[[t, 1.0, 2.0], [3.0, 4.0, 5.0]] for t in range(4)],
    )
    features = open_source(raw).info["features"]
    edit_info(raw, features=features | {"tactile": {"dtype": "float32", "shape": [2, 3], "names": None}})
    run_convert(raw, tmp_path / "out", "lerobot")
    dataset = open_dataset(tmp_path / "out")
    assert dataset.columns(["tactile"], 0)["tactile"][3].tolist() == [3, 1, 2, 3, 4, 5]
    assert dataset.names("tactile") == tuple(f"tactile_{i}" for i in range(6))


def test_what_cannot_come_along_is_said(tmp_path: Path):
    raw = write_dataset(tmp_path / "raw", [4, 4], kind="none")
    more = {
        "observation.images.depth": {
            "dtype": "video",
            "shape": [40, 60, 1],
            "names": ["height", "width", "channels"],
            "info": {"is_depth_map": True},
        },
        "note": {"dtype": "string", "shape": [1], "names": None},
        "image_features": {"dtype": "float32", "shape": [8], "names": None},
    }
    path = raw / "meta/episodes/chunk-000/file-000.parquet"
    depth = "videos/observation.images.depth"
    edit_table(path, **{f"{depth}/{n}": [0, 0] for n in ("chunk_index", "file_index", "from_timestamp")})
    edit_info(raw, features=open_source(raw).info["features"] | more)
    result = run_convert(raw, tmp_path / "out", "lerobot")
    assert result.dropped == () and len(result.warnings) == 3
    assert any("depth is not carried over" in note for note in result.warnings)
    manifest = json.loads((tmp_path / "out/dpipe/manifest.json").read_text())
    assert manifest["conventions"]["left_out"] == list(more)


def test_datasets_below_one_folder_become_a_dataset_each(tmp_path: Path):
    from dpipe.pipeline.convert import convert_all
    from dpipe.pipeline.progress import Progress
    from dpipe.pipeline.request import ConvertRequest

    write_dataset(tmp_path / "raw/pusht", [4, 4], kind="none")
    write_v21(tmp_path / "raw/aloha", [3], kind="image")
    request = ConvertRequest(
        "lerobot", tmp_path / "raw", tmp_path / "lerobot", "lerobot", Options(), workers=0
    )
    made = convert_all(request, Progress(quiet=True))
    assert [result.root.name for result in made] == ["lerobot-aloha", "lerobot-pusht"]
    assert open_dataset(made[0].root).cameras == (CAMERA,) and open_dataset(made[1].root).cameras == ()
    assert open_dataset(made[1].root).episodes.source_id(1) == "pusht/episode_000001"


def test_a_dataset_of_ours_keeps_its_meaning(tmp_path: Path):
    write_suite(tmp_path / "raw", demos=2, steps=8)
    run_convert(tmp_path / "raw", tmp_path / "first")
    run_convert(tmp_path / "first", tmp_path / "second", "lerobot")
    first, second = open_dataset(tmp_path / "first"), open_dataset(tmp_path / "second")
    assert first.contents() == second.contents()
    was, now = first.manifest, second.manifest
    assert was is not None and now is not None
    assert was["conventions"] == now["conventions"] and was["licence"] == now["licence"]
    assert was["embodiment"] == now["embodiment"]
    columns = [
        pq.read_table(r / "dpipe/columns/chunk-000/file-000.parquet") for r in (first.root, second.root)
    ]
    assert columns[0].equals(columns[1])
    for camera in first.cameras:  # packets copied: not a generation lost
        paths = [d.video_path(0, camera) for d in (first, second)]
        assert packets(paths[0]) == packets(paths[1])


# --- damage -----------------------------------------------------------------------------------------------


def test_an_episode_its_rows_and_table_disagree_about_is_left_out_alone(tmp_path: Path):
    raw = write_dataset(tmp_path / "raw", [6, 5, 4], kind="none")
    edit_table(raw / "meta/episodes/chunk-000/file-000.parquet", length=[6, 7, 4])
    result = run_convert(raw, tmp_path / "out", "lerobot")
    assert reasons(result) == {
        "episode_000001": "file-000.parquet holds 5 rows of it, the episode table says 7"
    }
    assert open_dataset(tmp_path / "out").episodes.length.tolist() == [6, 4]


def test_a_gap_in_the_numbering_does_not_shift_the_episodes_after_it(tmp_path: Path):
    raw = write_dataset(tmp_path / "raw", [6, 5, 4], kind="image", episodes_per_file=3)
    path = raw / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path).take([0, 2]), path)
    run_convert(raw, tmp_path / "out", "lerobot")
    dataset = open_dataset(tmp_path / "out")
    assert dataset.episodes.length.tolist() == [6, 4]
    assert (
        dataset.columns(["observation.state"], 1)["observation.state"][0, 0] == 2
    )  # episode 2 of the source
    assert number_of(dataset.frames(1, CAMERA, 0, 1)[0])[0] == 11


def test_a_data_file_cut_short_costs_only_its_own_episodes(tmp_path: Path):
    raw = write_dataset(tmp_path / "raw", [6, 5, 4], kind="none", episodes_per_file=2)
    path = raw / "data/chunk-000/file-001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    result = run_convert(raw, tmp_path / "out", "lerobot")
    assert (
        list(reasons(result)) == ["episode_000002"]
        and "cannot be read as Parquet" in result.dropped[0].reason
    )
    path.unlink()
    assert "is missing" in run_convert(raw, tmp_path / "again", "lerobot").dropped[0].reason


def test_a_missing_or_short_video_leaves_its_episodes_out(tmp_path: Path):
    raw = write_v21(tmp_path / "raw", [6, 5, 4])
    videos = sorted(raw.rglob("*.mp4"))
    videos[0].unlink()
    write_video(videos[1], [picture(i, 0) for i in range(4)], 10)
    result = run_convert(raw, tmp_path / "out", "lerobot")
    assert reasons(result) == {
        "episode_000000": f"camera 'image': no video chunk-000/{CAMERA}/episode_000000.mp4",
        "episode_000001": "camera 'image': the video has 4 frames, the episode 5",
    }


def test_a_video_with_more_frames_than_rows_is_used_from_its_start_and_says_so(tmp_path: Path):
    raw = write_v21(tmp_path / "raw", [6, 4], extra_frames=2)
    result = run_convert(raw, tmp_path / "out", "lerobot")
    assert len(result.warnings) == 2 and "2 frames beyond the last row" in result.warnings[0]
    check(open_dataset(tmp_path / "out"), [6, 4])


def test_frames_are_found_by_time_where_the_rate_is_not_constant(tmp_path: Path):
    raw = write_dataset(tmp_path / "raw", [6, 5], fps=10, episodes_per_file=2)
    path = raw / f"videos/{CAMERA}/chunk-000/file-000.mp4"
    late_ms = [0, 20, -15, 30, 0, -30, 10, 25, -20, 5, 0]
    write_at(path, [picture(i, 0) for i in range(11)], [100 * i + late for i, late in enumerate(late_ms)])
    assert read_table(path).fps is None
    assert run_convert(raw, tmp_path / "out", "lerobot").dropped == ()
    check(open_dataset(tmp_path / "out"), [6, 5])
    write_at(path, [picture(i // 2, 0) for i in range(22)], [50 * i for i in range(22)])  # every frame twice
    result = CONVERTER.scan(next(CONVERTER.find(raw, Options())), Options())
    assert all("do not follow one another" in entry.reason for entry in result)


def write_at(path: Path, frames: list[np.ndarray], times_ms: list[int]) -> None:
    """An MP4 whose frames are shown at given times."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000, options={"g": "2", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for image, time in zip(frames, times_ms, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = time
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_values_that_are_not_finite_drop_the_episode_and_a_column_may_be_left_out(tmp_path: Path):
    raw = write_dataset(tmp_path / "raw", [6, 5], kind="none")
    reward = {"dtype": "float32", "shape": [1], "names": None}
    edit_info(raw, features=open_source(raw).info["features"] | {"next.reward": reward})
    edit_table(
        raw / "data/chunk-000/file-000.parquet",
        **{"next.reward": [0.0] * 8 + [float("nan")] * 3},
    )
    result = run_convert(raw, tmp_path / "out", "lerobot")
    assert "'next.reward' is not finite in 3 frames, first at frame 2" in reasons(result)["episode_000001"]
    assert "--leave-out" in result.dropped[0].remedy
    kept = run_convert(raw, tmp_path / "kept", "lerobot", options=Options(leave_out="next.reward"))
    assert kept.episodes == 2 and "next.reward" not in open_dataset(tmp_path / "kept").features
    with pytest.raises(UsageError, match=r"next\.rewards.*Did you mean 'next\.reward'"):
        run_convert(raw, tmp_path / "no", "lerobot", options=Options(leave_out="next.rewards"))


def test_a_row_without_a_value_drops_its_episode_and_no_other(tmp_path: Path):
    raw = write_dataset(tmp_path / "raw", [6, 5], kind="none", aggregate=True)
    path = raw / "data/chunk-000/file-000.parquet"
    edit_table(path, action=lambda rows: [None if i == 8 else row for i, row in enumerate(rows)])
    result = run_convert(raw, tmp_path / "out", "lerobot")
    assert reasons(result) == {"episode_000001": "column 'action': 1 of its 5 rows are empty"}
    edit_table(
        path, action=lambda rows: [[1.0, 2.0] if i == 8 else row or [0, 0, 0] for i, row in enumerate(rows)]
    )
    assert (
        "its rows differ in length" in reasons(run_convert(raw, tmp_path / "b", "lerobot"))["episode_000001"]
    )


def test_a_picture_that_cannot_be_decoded_drops_its_episode(tmp_path: Path):
    raw = write_dataset(tmp_path / "raw", [4, 4], kind="image", episodes_per_file=1)
    path = raw / "data/chunk-000/file-001.parquet"
    edit_table(path, **{CAMERA: lambda cells: [c | {"bytes": c["bytes"][:60]} for c in cells]})
    result = run_convert(raw, tmp_path / "out", "lerobot")
    assert "the picture cannot be decoded" in reasons(result)["episode_000001"]
    big = encode_png(np.zeros((400, 600, 3), np.uint8))
    edit_table(path, **{CAMERA: lambda cells: [{"bytes": big, "path": None} for _ in cells]})
    again = run_convert(raw, tmp_path / "b", "lerobot")
    assert "600x400 pixels, declared 60x40" in reasons(again)["episode_000001"]


def test_pictures_may_lie_beside_the_rows_but_not_outside_the_dataset(tmp_path: Path):
    raw = write_dataset(tmp_path / "raw", [4, 4], kind="image", episodes_per_file=1)
    (raw / "images").mkdir()
    for t in range(4):
        (raw / f"images/{t}.png").write_bytes(encode_png(picture(t, 0)))
    (tmp_path / "secret.png").write_bytes(encode_png(picture(5, 0)))
    beside = [{"bytes": None, "path": f"images/{t}.png"} for t in range(4)]
    edit_table(raw / "data/chunk-000/file-000.parquet", **{CAMERA: beside})
    for path in ("../secret.png", str(tmp_path / "secret.png")):
        outside = [{"bytes": None, "path": path}] * 4
        edit_table(raw / "data/chunk-000/file-001.parquet", **{CAMERA: outside})
        result = run_convert(raw, tmp_path / f"out-{len(path)}", "lerobot")
        assert result.episodes == 1 and "is no file of the dataset" in reasons(result)["episode_000001"]


def test_a_path_template_that_leads_out_of_the_dataset_is_refused(tmp_path: Path):
    raw = write_dataset(tmp_path / "raw", [4], kind="none")
    edit_info(raw, data_path="../../{chunk_index}/{file_index}.parquet")
    with pytest.raises(DataError, match="leads out of the dataset"):
        run_convert(raw, tmp_path / "out", "lerobot")
    edit_info(raw, data_path="data/{chunk_index.real.__class__.nothing}.parquet")
    with pytest.raises(DataError, match="a field of another kind"):
        run_convert(raw, tmp_path / "out", "lerobot")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"codebase_version": "v1.6"}, "expected: v3.0, v2.1 or v2.0"),
        ({"fps": 29.97}, "expected: a whole number"),
        ({"storage_format": "lance"}, "stored as lance"),
    ],
)
def test_what_is_no_dataset_we_know_is_refused_by_name(tmp_path: Path, entries: dict, message: str):
    raw = write_dataset(tmp_path / "raw", [4], kind="none")
    edit_info(raw, **entries)
    with pytest.raises(DataError, match=message):
        run_convert(raw, tmp_path / "out", "lerobot")


# --- running it again -------------------------------------------------------------------------------------


def test_a_source_that_grew_is_appended_and_nothing_else_encoded(tmp_path: Path):
    raw = write_dataset(tmp_path / "raw", [6, 5], kind="image", episodes_per_file=3)
    run_convert(raw, tmp_path / "out", "lerobot")
    before = tree_digest(tmp_path / "out")
    assert run_convert(raw, tmp_path / "out", "lerobot").unchanged
    write_dataset(raw, [6, 5, 4], kind="image", episodes_per_file=3)
    result = run_convert(raw, tmp_path / "out", "lerobot")
    assert (result.episodes, result.encoded) == (3, 1)
    after = tree_digest(tmp_path / "out")
    assert all(after[name] == before[name] for name in before if name.startswith(("data/", "videos/")))
    check(open_dataset(tmp_path / "out"), [6, 5, 4])


def test_other_features_over_a_finished_dataset_are_refused_by_name(tmp_path: Path):
    raw = write_dataset(tmp_path / "raw", [6, 5], kind="none")
    run_convert(raw, tmp_path / "out", "lerobot")
    features = open_source(raw).info["features"]
    features["action"]["names"] = ["a", "b", "c"]
    edit_info(raw, features=features)
    with pytest.raises(UsageError, match=r"features of action: \['x', 'y', 'gripper'\] then"):
        run_convert(raw, tmp_path / "out", "lerobot")


def test_a_clip_in_a_shared_file_is_known_by_its_own_packets(tmp_path: Path):
    from dpipe.pipeline.payload import _hash_clip, _new_hash
    from dpipe.schemas.episode import VideoClip
    from dpipe.video.mp4 import copy_run, write_mp4

    tables = {}
    for name, number in (("a", 0), ("b", 4), ("c", 8)):
        write_video(tmp_path / f"{name}.mp4", [picture(number + i, 0) for i in range(4)], 10)
        tables[name] = read_table(tmp_path / f"{name}.mp4")
    digests = {}
    for joined in ("ab", "ac", "ba"):
        path = tmp_path / f"{joined}.mp4"
        runs = [copy_run(tables[name]) for name in joined]
        write_mp4(path, tables["a"].sample_entry, 60, 40, 10, runs)
        hasher = _new_hash()
        first = 4 * joined.index("a")
        _hash_clip(hasher, VideoClip(path, 0, path.stat().st_size, first, 4, 40, 60))
        digests[joined] = hasher.hexdigest()
    assert digests["ab"] == digests["ac"] == digests["ba"]
    other = _new_hash()
    path = tmp_path / "ab.mp4"
    _hash_clip(other, VideoClip(path, 0, path.stat().st_size, 4, 4, 40, 60))
    assert other.hexdigest() != digests["ab"]


def test_targets_of_a_dataset_that_is_not_ours_lie_beside_it(tmp_path: Path):
    from dpipe.cli import cli

    raw = write_dataset(tmp_path / "disk/theirs", [20, 20])
    before = tree_digest(raw)
    words = ["precompute", "tokens", "--dataset", raw, "--workspace", tmp_path / "space", "--workers", 0]
    cli.main([str(word) for word in words], standalone_mode=False)
    assert tree_digest(raw) == before
    assert list((tmp_path / "space/targets/theirs/tokens").iterdir())


def test_a_folder_without_a_dataset_is_not_offered_a_sample_that_does_not_exist(tmp_path: Path):
    (tmp_path / "raw").mkdir()
    with pytest.raises(DataError, match="no lerobot recordings") as caught:
        run_convert(tmp_path / "raw", tmp_path / "out", "lerobot")
    assert "dpipe sample" not in str(caught.value)


def test_the_contract_is_complete():
    converter = load_converter("lerobot")
    assert converter.name == "lerobot" and converter.describe is not None and converter.embodiment is None
