"""What is written to disk, trap by trap: where LeRobot v3.0 goes wrong without a word if a writer is careless.

lerobot itself judges the whole in test_conformance.py; here each fact has the test that fails when it is got wrong.
"""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dpipe.converters import SOURCES, load_converter
from dpipe.schemas.features import Feature
from raw_libero import demo_arrays, write_raw
from trees import run_convert

FPS = 20
LENGTHS = [9, 10, 11, 8, 7]  # frames of the episodes once paired
CAMERAS = ("observation.images.image", "observation.images.image2")
DEFAULTS = ("timestamp", "frame_index", "episode_index", "index", "task_index")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five episodes of two tasks whose names do not come in the order of the files, in several parts."""
    folder = tmp_path_factory.mktemp("layout")
    demos = [{i: demo_arrays(n + 1, i) for i, n in enumerate(LENGTHS[:3])}]
    demos.append({i: demo_arrays(n + 1, 7 + i) for i, n in enumerate(LENGTHS[3:])})
    write_raw(folder / "raw" / "libero_goal" / "z_last_word_demo.hdf5", demos[0])
    write_raw(folder / "raw" / "libero_object" / "a_first_word_demo.hdf5", demos[1])
    edit_scene(folder / "raw" / "libero_object" / "a_first_word_demo.hdf5")
    run_convert(folder / "raw", folder / "out", part_frames=20)
    return folder / "out"


def edit_scene(path: Path) -> None:
    import h5py

    with h5py.File(path, "a") as file:
        file["data"].attrs["problem_info"] = json.dumps({"problem_name": "libero_floor_manipulation"})


def info(root: Path) -> dict[str, Any]:
    return json.loads((root / "meta" / "info.json").read_text())


def episodes(root: Path) -> list[dict[str, Any]]:
    return pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()


def data_files(root: Path) -> list[Path]:
    return sorted((root / "data").rglob("*"))[1:]


def test_rows_are_typed_as_the_recorder_types_them(root: Path):
    """Lists of fixed size and the `huggingface` metadata: the aggregate tool loses both, and a card must not."""
    schema = pq.read_schema(data_files(root)[0])
    assert schema.field("observation.state").type == pa.list_(pa.float32(), 8)
    assert schema.field("action").type == pa.list_(pa.float32(), 7)
    assert [str(schema.field(name).type) for name in DEFAULTS] == ["float", *["int64"] * 4]
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == schema.names and not set(CAMERAS) & set(features)
    assert features["action"]["length"] == 7 and features["index"]["_type"] == "Value"


def test_an_episode_is_a_row_group_and_rows_stand_in_the_order_of_their_index(root: Path):
    """Readers sort the files' names and take row i for index i; `read_row_group(k)` is episode k of the file."""
    rows = [pq.ParquetFile(path) for path in data_files(root)]
    assert len(rows) > 1
    sizes = [file.metadata.row_group(k).num_rows for file in rows for k in range(file.num_row_groups)]
    assert sizes == LENGTHS
    table = pa.concat_tables([file.read() for file in rows])
    assert table["index"].to_pylist() == list(range(sum(LENGTHS)))
    frames = np.array(table["frame_index"])
    assert np.array_equal(np.array(table["timestamp"]), (frames / FPS).astype(np.float32))


def test_nothing_of_ours_lies_below_data_or_videos(root: Path):
    """Any parquet below data/ becomes rows to lerobot."""
    assert all(path.suffix == ".parquet" and path.parent.name == "chunk-000" for path in data_files(root))
    assert {path.suffix for path in (root / "videos").rglob("*") if path.is_file()} == {".mp4"}
    assert sorted(path.name for path in root.iterdir()) == ["README.md", "data", "dpipe", "meta", "videos"]
    head = (root / "README.md").read_text().split("---")[1]
    assert "data_files: data/*/*.parquet" in head and "license: cc-by-4.0" in head


def test_tasks_carry_pandas_index_and_stand_where_their_number_says(root: Path):
    """Row i is task i by position; without pandas' index lerobot reads the number 0 as the sentence."""
    import pandas

    table = pq.read_table(root / "meta" / "tasks.parquet")
    assert json.loads(table.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    tasks = pandas.read_parquet(root / "meta" / "tasks.parquet")
    assert tasks["task_index"].tolist() == [0, 1]
    assert [tasks.iloc[i].name for i in (0, 1)] == ["z last word", "a first word"]  # first seen, not sorted
    assert [row["tasks"] for row in episodes(root)] == [["z last word"]] * 3 + [["a first word"]] * 2


def test_episodes_stand_in_order_and_their_times_are_counted_not_summed(root: Path):
    """Seconds inside their own file, from 0 in each, exactly frames / fps: sums of durations drift."""
    rows = episodes(root)
    assert [row["episode_index"] for row in rows] == list(range(5))
    assert [row["dataset_from_index"] for row in rows] == [0, 9, 19, 30, 38]
    assert [row["length"] for row in rows] == LENGTHS
    for camera in CAMERAS:
        at: dict[int, int] = {}
        for row in rows:
            file = row[f"videos/{camera}/file_index"]
            start = at.get(file, 0)
            at[file] = start + row["length"]
            assert row[f"videos/{camera}/from_timestamp"] == float(Fraction(start, FPS))
            assert row[f"videos/{camera}/to_timestamp"] == float(Fraction(at[file], FPS))
        assert len(at) > 1
        for file, frames in at.items():
            with av.open(root / f"videos/{camera}/chunk-000/file-{file:03d}.mp4") as container:
                stream = container.streams.video[0]
                assert stream.average_rate == FPS and stream.frames == frames
                assert sum(1 for _ in container.decode(video=0)) == frames


def test_the_columns_of_the_episode_table_come_as_lerobot_writes_them(root: Path):
    names = pq.read_schema(root / "meta/episodes/chunk-000/file-000.parquet").names
    assert names[:7] == [
        "episode_index",
        "tasks",
        "length",
        "data/chunk_index",
        "data/file_index",
        "dataset_from_index",
        "dataset_to_index",
    ]
    keys = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    assert names[7:15] == [f"videos/{camera}/{key}" for camera in CAMERAS for key in keys]
    assert {"meta/episodes/chunk_index", "meta/episodes/file_index"} < set(names)


def test_info_says_what_lerobot_knows_and_nothing_else(root: Path):
    """Unknown keys are dropped with a warning: what is ours stands in our own folder."""
    told = info(root)
    known = (
        "codebase_version fps features total_episodes total_frames total_tasks chunks_size robot_type splits"
    )
    known += " data_files_size_in_mb video_files_size_in_mb data_path video_path"
    assert set(told) == set(known.split())
    assert (told["codebase_version"], told["fps"], told["splits"]) == ("v3.0", FPS, {"train": "0:5"})
    assert isinstance(told["fps"], int)  # never 20.0
    assert set(told["features"]) == {*CAMERAS, *DEFAULTS, "observation.state", "action"}
    video = told["features"][CAMERAS[0]]
    assert video["names"] == ["height", "width", "channels"] and video["shape"] == [32, 32, 3]
    assert video["info"]["video.codec"] == "h264" and video["info"]["video.fps"] == FPS


def test_counts_of_statistics_are_frames_and_pictures_lie_between_0_and_1(root: Path):
    """The streaming recorder counts pixels: mixed with any other dataset, its means would weigh a thousandfold."""
    stats = json.loads((root / "meta" / "stats.json").read_text())
    assert set(stats) == set(info(root)["features"])
    assert all(stats[name]["count"] == [sum(LENGTHS)] for name in ("action", *DEFAULTS))
    for camera in CAMERAS:
        assert 0 < stats[camera]["count"][0] <= sum(LENGTHS)
        assert np.shape(stats[camera]["mean"]) == (3, 1, 1)
        assert 0 <= np.min(stats[camera]["min"]) < np.max(stats[camera]["max"]) <= 1
    # Of 0 to 44. lerobot 0.6.1 averages the episodes' quantiles (18.0), 0.6.2 takes their envelope (0.08).
    assert (stats["index"]["q01"][0], stats["index"]["q99"][0]) == (pytest.approx(0.44), pytest.approx(43.56))


@pytest.mark.parametrize("name", ["observation.image_features", "observation.state/left", "target_image"])
def test_names_that_lerobot_stumbles_over_cannot_be_given(name: str):
    """'/' is forbidden, and statistics of anything called `...image...` must have the shape of a picture's."""
    with pytest.raises(ValueError, match="image"):
        Feature(name, "float32", ("x",))


@pytest.mark.parametrize("source", [name for name in SOURCES if name != "lerobot"])
def test_state_and_action_alone_are_policy_features_and_their_names_are_flat_words(source: str):
    """Keys that begin with observation or action become inputs and outputs, whatever they hold; a relative action
    is taken by position, and the gripper is left out by the word in its name."""
    converter = load_converter(source)
    assert converter.embodiment is not None
    for variant in ("", "dexhand", "tactile") if source == "agibot" else ("",):
        body = converter.embodiment(converter.Options(), variant)
        keys = [feature.name for feature in body.features]
        assert keys in (
            ["observation.state", "action"],
            ["observation.state", "observation.environment_state", "action"],
        )
        assert not any(f.name.startswith(("observation.", "action.")) for f in body.sidecar)
        for feature in (*body.features, *body.sidecar):
            assert all(isinstance(word, str) and word and "/" not in word for word in feature.names)
            assert len(set(feature.names)) == feature.dim
        grips = [word for word in body.features[-1].names if "grip" in word or "finger" in word]
        assert all("gripper" in word for word in grips)
        assert bool(grips) == (
            source in ("libero", "calvin") or (variant in ("", "tactile") and source == "agibot")
        )
