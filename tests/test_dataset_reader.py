"""Opening any LeRobot v3.0 dataset: whoever wrote it, each value and frame by its number, and plain refusals."""

import json
import pickle
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from dpipe.pipeline.rearrange import select
from dpipe.schemas.errors import DataError, DpipeError, UsageError
from dpipe.streams.dataset import Dataset, contents_digest, episode_content, open_dataset
from dpipe.streams.source import StreamSpec
from dpipe.streams.stream import open_stream
from small_datasets import columns_of, number_of, write_dataset

LENGTHS = [5, 7, 3]
STARTS = [0, 5, 12]


@pytest.fixture(params=["recorder", "aggregate", "images"])
def dataset(request, tmp_path: Path) -> Dataset:
    """The same recordings as three kinds of writers leave them."""
    kind = "image" if request.param == "images" else "video"
    root = write_dataset(
        tmp_path / "set",
        LENGTHS,
        cameras=("image", "image2"),
        kind=kind,
        aggregate=request.param == "aggregate",
        stats=request.param == "recorder",
    )
    return open_dataset(root)


def test_what_a_dataset_says_of_itself(dataset: Dataset):
    assert dataset.fps == 10
    assert dataset.cameras == ("observation.images.image", "observation.images.image2")
    assert dataset.vectors == ("observation.state", "action")
    assert dataset.names("action") == ("x", "y", "gripper")
    assert dataset.camera_size("observation.images.image") == (40, 60)
    assert dataset.tasks == ["pick", "place"]
    assert [dataset.episodes.tasks(e) for e in range(3)] == [["pick"], ["place"], ["pick"]]
    assert len(dataset) == 3
    assert dataset.total_frames == 15
    assert dataset.splits == {"train": (0, 3)}
    assert dataset.episodes_in("train") == dataset.episodes_in("all") == range(3)


def test_each_episode_has_its_own_columns(dataset: Dataset):
    for e, length in enumerate(LENGTHS):
        columns = dataset.columns(["observation.state", "action", "index"], e)
        for name, expected in columns_of(e, length).items():
            assert np.array_equal(columns[name], expected)
            assert columns[name].dtype == np.float32
        assert columns["index"].tolist() == list(range(STARTS[e], STARTS[e] + length))


def test_columns_of_many_episodes_follow_one_another_in_the_order_asked(dataset: Dataset):
    whole = dataset.all_columns(["observation.state"])["observation.state"]
    assert np.array_equal(
        whole, np.concatenate([columns_of(e, n)["observation.state"] for e, n in enumerate(LENGTHS)])
    )
    mixed = dataset.all_columns(["index"], [2, 0])["index"]
    assert mixed.tolist() == [12, 13, 14, 0, 1, 2, 3, 4]
    assert dataset.all_columns(["action"], [])["action"].shape == (0, 3)


def test_each_frame_is_found_by_its_number(dataset: Dataset):
    for number, camera in enumerate(dataset.cameras):
        for e, length in enumerate(LENGTHS):
            frames = dataset.frames(e, camera, 0, length)
            assert frames.shape == (length, 40, 60, 3)
            assert [number_of(frame) for frame in frames] == [(STARTS[e] + t, number) for t in range(length)]
    assert number_of(dataset.frames(1, dataset.cameras[0], 3, 4)[0]) == (8, 0)
    assert dataset.frames(1, dataset.cameras[0], 2, 2).shape == (0, 40, 60, 3)
    with pytest.raises(IndexError):
        dataset.frames(1, dataset.cameras[0], 0, 8)


def test_a_dataset_travels_to_another_process_without_its_open_files(dataset: Dataset):
    dataset.frames(0, dataset.cameras[0], 0, 1)
    there = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(there.columns(["action"], 1)["action"], columns_of(1, 7)["action"])
    assert number_of(there.frames(2, dataset.cameras[1], 0, 1)[0]) == (12, 1)


def test_content_is_the_digest_its_definition_gives(dataset: Dataset):
    columns = columns_of(1, 7)
    digest = xxhash.xxh3_128()
    for name in ("action", "observation.state"):
        digest.update(name.encode())
        digest.update(columns[name].tobytes())
    digest.update(np.int64(7).tobytes())
    assert dataset.content(1) == digest.hexdigest() == episode_content(columns, 7)
    assert dataset.contents() == [dataset.content(e) for e in range(3)]
    assert len(set(dataset.contents())) == 3
    assert dataset.digest() == contents_digest(dataset.contents())
    assert dataset.digest() != contents_digest(dataset.contents()[::-1])


def test_content_does_not_depend_on_the_writer(tmp_path: Path):
    digests = {
        open_dataset(write_dataset(tmp_path / str(i), LENGTHS, **options)).digest()
        for i, options in enumerate(
            [{"kind": "none"}, {"kind": "none", "aggregate": True}, {"kind": "image", "episodes_per_file": 1}]
        )
    }
    assert len(digests) == 1


def test_parts_are_whole_episodes_up_to_their_size(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("dpipe.streams.dataset.FOREIGN_PART_FRAMES", 10)
    dataset = open_dataset(write_dataset(tmp_path / "a", [4, 4, 4, 25, 1, 9], kind="none"))
    assert dataset.parts() == [range(2), range(2, 3), range(3, 4), range(4, 6)]
    ours = write_dataset(tmp_path / "b", [4, 4, 4, 25, 1], kind="none", episodes_per_file=2)
    _manifest(ours)
    assert open_dataset(ours).parts() == [range(2), range(2, 4), range(4, 5)]


def test_splits_are_ranges_of_episodes(tmp_path: Path):
    root = write_dataset(tmp_path / "a", LENGTHS, kind="none", splits={"train": "0:2", "test": "2:3"})
    dataset = open_dataset(root)
    assert dataset.episodes_in("test") == range(2, 3)
    with pytest.raises(UsageError, match="known: all, test, train"):
        dataset.episodes_in("tests")


def test_scalars_lists_and_grids_come_in_their_shapes(tmp_path: Path):
    """lerobot stores booleans, 2-D features and text too; `datasets` writes the former as extension arrays."""
    root = write_dataset(tmp_path / "a", [4], kind="none")
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    grid = np.arange(4 * 6, dtype=np.float32).reshape(4, 2, 3)
    for name, column, told in (
        ("grid", pa.array(grid.tolist()), {"dtype": "float32", "shape": [2, 3]}),
        ("done", pa.array([False, False, True, True]), {"dtype": "bool", "shape": [1]}),
        ("level", pa.array([[1.0]] * 4), {"dtype": "float64", "shape": [1]}),
        ("note", pa.array(["a", "b", "c", "d"]), {"dtype": "string", "shape": [1]}),
    ):
        table = table.append_column(name, column)
        _change_info(
            root, lambda info, name=name, told=told: info["features"].update({name: told | {"names": None}})
        )
    pq.write_table(table, path)
    columns = open_dataset(root).columns(["grid", "done", "level", "note"], 0)
    assert np.array_equal(columns["grid"], grid)
    assert columns["done"].tolist() == [False, False, True, True]
    assert columns["level"].tolist() == [1.0] * 4
    assert columns["note"].tolist() == ["a", "b", "c", "d"]


def test_row_groups_that_no_reader_asked_for_are_not_read(tmp_path: Path):
    """Garbage in another episode's row group goes unnoticed: it is never touched."""
    root = write_dataset(tmp_path / "a", [50, 50], kind="none")
    path = root / "data/chunk-000/file-000.parquet"
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = (
        column.data_page_offset if column.dictionary_page_offset is None else column.dictionary_page_offset
    )
    data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(data)
    dataset = open_dataset(root)
    assert np.array_equal(
        dataset.columns(["observation.state"], 0)["observation.state"], columns_of(0, 50)["observation.state"]
    )
    with pytest.raises((OSError, DpipeError)):
        dataset.columns(["observation.state"], 1)


def test_a_column_that_is_a_camera_or_unknown_is_refused_by_name(dataset: Dataset):
    with pytest.raises(UsageError, match="camera"):
        dataset.columns(["observation.images.image"], 0)
    with pytest.raises(UsageError, match=r"observation\.state"):
        dataset.columns(["observation.stat"], 0)
    with pytest.raises(UsageError, match="image2"):
        dataset.frames(0, "observation.images.image3", 0, 1)
    with pytest.raises(IndexError):
        dataset.columns(["action"], 3)


def _manifest(root: Path, **content: object) -> None:
    (root / "dpipe").mkdir(exist_ok=True)
    (root / "dpipe/manifest.json").write_text(json.dumps({"dpipe": 1, "name": "mine", **content}))


def _change_info(root: Path, change) -> None:
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def _change_episodes(root: Path, **columns: list) -> None:
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(path).to_pydict()
    pq.write_table(pa.table({**rows, **columns}), path)


def test_our_own_folder_names_the_dataset_and_marks_it_complete(tmp_path: Path):
    root = write_dataset(tmp_path / "a", [3], kind="none")
    assert open_dataset(root).manifest is None
    assert open_dataset(root).name == "a"
    (root / "dpipe/targets").mkdir(parents=True)  # targets of a dataset that is not ours
    assert open_dataset(root).manifest is None
    (root / "dpipe/journal").mkdir()
    with pytest.raises(DataError, match="is unfinished"):
        open_dataset(root)
    _manifest(root)
    assert open_dataset(root).name == "mine"


DEFECTS = {
    "no folder": (lambda root: (root / "meta").rename(root / "elsewhere"), "is not a LeRobot dataset"),
    "old version": (
        lambda root: _change_info(root, lambda info: info.update(codebase_version="v2.1")),
        r"version v2\.1[\s\S]*dpipe convert lerobot",
    ),
    "no fps": (lambda root: _change_info(root, lambda info: info.pop("fps")), "no entry 'fps'"),
    "fps 0": (lambda root: _change_info(root, lambda info: info.update(fps=0)), "fps 0"),
    "lance": (
        lambda root: _change_info(root, lambda info: info.update(storage_format="lance")),
        "stored as lance",
    ),
    "split beyond": (
        lambda root: _change_info(root, lambda info: info.update(splits={"train": "0:9"})),
        "split 'train' is '0:9'",
    ),
    "not JSON": (lambda root: (root / "meta/info.json").write_text("{"), "is not JSON"),
    "no episodes": (
        lambda root: (root / "meta/episodes/chunk-000/file-000.parquet").unlink(),
        "no episodes",
    ),
    "fewer episodes": (
        lambda root: _change_info(root, lambda info: info.update(total_episodes=4)),
        r"lists 3 episodes[\s\S]*expected: 4",
    ),
    "gap": (lambda root: _change_episodes(root, episode_index=[0, 1, 3]), "row 2 is episode 3"),
    "overlap": (
        lambda root: _change_episodes(root, dataset_from_index=[0, 4, 12]),
        "episode 1 has 7 frames from index 4",
    ),
    "no frames": (lambda root: _change_episodes(root, length=[5, 7, 0]), "episode 2 has 0 frames"),
    "no tasks": (lambda root: (root / "meta/tasks.parquet").unlink(), "no task table"),
    "footer lost": (
        lambda root: (root / "meta/episodes/chunk-000/file-000.parquet").write_bytes(b"PAR1 cut"),
        "cannot be read as Parquet",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_damaged_dataset_is_refused_with_its_reason(tmp_path: Path, defect: str):
    root = write_dataset(tmp_path / "a", LENGTHS, kind="none")
    damage, message = DEFECTS[defect]
    damage(root)
    with pytest.raises(DataError, match=message):
        open_dataset(root)


DATA_DEFECTS = {
    "data cut short": (
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        "cannot be read as Parquet",
    ),
    "rows missing": (lambda path: pq.write_table(pq.read_table(path).slice(0, 8), path), "has 8 rows"),
    "column missing": (
        lambda path: pq.write_table(pq.read_table(path).drop(["action"]), path),
        "no column 'action'",
    ),
    "ragged": (
        lambda path: pq.write_table(
            pq.read_table(path)
            .drop(["action"])
            .append_column("action", pa.array([[1.0]] * 6 + [[1.0, 2.0]] * 6)),
            path,
        ),
        "rows of different lengths",
    ),
    "wrong width": (
        lambda path: pq.write_table(
            pq.read_table(path).drop(["action"]).append_column("action", pa.array([[1.0]] * 12)), path
        ),
        r"expected: \(3,\) in each",
    ),
    "null": (
        lambda path: pq.write_table(
            pq.read_table(path)
            .drop(["action"])
            .append_column("action", pa.array([None] + [[1.0, 2.0, 3.0]] * 11)),
            path,
        ),
        "1 of 12 values are missing",
    ),
}


@pytest.mark.parametrize("defect", DATA_DEFECTS)
def test_a_damaged_data_file_is_refused_with_its_reason(tmp_path: Path, defect: str):
    root = write_dataset(tmp_path / "a", LENGTHS, kind="none")
    damage, message = DATA_DEFECTS[defect]
    damage(root / "data/chunk-000/file-000.parquet")
    with pytest.raises(DataError, match=message):
        open_dataset(root).all_columns(["action"], [0, 1])


def test_a_missing_video_and_a_damaged_image_are_named(tmp_path: Path):
    videos = open_dataset(write_dataset(tmp_path / "v", [3]))
    videos.video_path(0, videos.cameras[0]).unlink()
    with pytest.raises(DataError, match=r"no video .*file-000\.mp4"):
        videos.frames(0, videos.cameras[0], 0, 1)
    root = write_dataset(tmp_path / "i", [3], kind="image")
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    cells = table.column("observation.images.image").to_pylist()
    cells[1]["bytes"] = cells[1]["bytes"][:60]
    place = table.column_names.index("observation.images.image")
    kept = table.schema.field(place)
    pq.write_table(table.set_column(place, kept, pa.array(cells, kept.type)), path)
    images = open_dataset(root)
    with pytest.raises(DataError, match=r"episode 0, frame 1, observation\.images\.image cannot be decoded"):
        images.frames(0, images.cameras[0], 0, 3)


def test_a_million_episodes_open_within_a_second(tmp_path: Path):
    """Metadata alone: no row of data/ is there to be read."""
    count = 1_000_000
    root = write_dataset(tmp_path / "a", [1], cameras=("image",), kind="none")
    lengths = np.random.default_rng(0).integers(50, 300, count)
    first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    for file, start in enumerate(range(0, count, 250_000)):
        part = slice(start, start + 250_000)
        table = pa.table(
            {
                "episode_index": np.arange(count)[part],
                "tasks": pa.array([["pick"]] * 250_000),
                "length": lengths[part],
                "data/chunk_index": first[part] // 2**14 // 1000,
                "data/file_index": first[part] // 2**14 % 1000,
                "dataset_from_index": first[part],
                "dataset_to_index": first[part] + lengths[part],
            }
        )
        pq.write_table(
            table, root / f"meta/episodes/chunk-000/file-{file:03d}.parquet", row_group_size=50_000
        )
    _change_info(root, lambda info: info.update(total_episodes=count, splits={"train": f"0:{count}"}))
    begin = time.perf_counter()
    dataset = open_dataset(root)
    spent = time.perf_counter() - begin
    assert dataset.total_frames == lengths.sum()
    assert len(dataset.parts()) > 1000
    assert spent < 1.0


@pytest.mark.slow
def test_a_dataset_of_lerobots_recorder_reads_as_lerobot_reads_it(tmp_path: Path):
    lerobot = pytest.importorskip("lerobot.datasets.lerobot_dataset")
    features = {
        "observation.state": {"dtype": "float32", "shape": (3,), "names": ["x", "y", "z"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["x", "gripper"]},
        "grid": {"dtype": "float32", "shape": (2, 2), "names": None},
        "observation.images.top": {
            "dtype": "video",
            "shape": (64, 64, 3),
            "names": ["height", "width", "channels"],
        },
    }
    written = lerobot.LeRobotDataset.create(
        "a/b", fps=10, features=features, root=tmp_path / "a", use_videos=True
    )
    for e in range(2):
        for t in range(4 + e):
            written.add_frame(
                {
                    "observation.state": np.array([e, t, 0], np.float32),
                    "action": np.array([t, e], np.float32),
                    "grid": np.full((2, 2), t, np.float32),
                    "observation.images.top": np.full((64, 64, 3), 20 * (t + 5 * e), np.uint8),
                    "task": f"task {e}",
                }
            )
        written.save_episode()
    written.finalize()
    theirs = lerobot.LeRobotDataset("a/b", root=tmp_path / "a")
    ours = open_dataset(tmp_path / "a")
    assert len(theirs) == ours.total_frames == 9
    columns = ours.all_columns(["observation.state", "action", "grid", "timestamp", "task_index"])
    frames = np.concatenate([ours.frames(e, "observation.images.top", 0, 4 + e) for e in range(2)])
    for i in range(9):
        item = theirs[i]
        for name, values in columns.items():
            assert np.array_equal(item[name].numpy(), values[i])
        assert item["task"] == ours.tasks[columns["task_index"][i]]
        difference = item["observation.images.top"].permute(1, 2, 0).numpy() * 255 - frames[i]
        assert np.abs(difference).mean() < 1


def test_columns_beside_the_data_are_read_like_the_others(tmp_path: Path):
    root = write_dataset(tmp_path / "a", LENGTHS, kind="none")
    beside = {"joint_pos": {"dtype": "float32", "names": ["a", "b"]}}
    _manifest(root, embodiment={"sidecar": beside})
    folder = root / "dpipe/columns/chunk-000"
    folder.mkdir(parents=True)
    for file, rows in enumerate((12, 3)):
        values = np.arange(rows * 2, dtype=np.float32) + 100 * file
        column = pa.FixedSizeListArray.from_arrays(pa.array(values), 2)
        pq.write_table(pa.table({"joint_pos": column}), folder / f"file-{file:03d}.parquet")
    dataset = open_dataset(root)
    assert dataset.names("joint_pos") == ("a", "b")
    assert "joint_pos" not in dataset.vectors
    columns = dataset.all_columns(["joint_pos", "index"], [2, 1])
    assert columns["joint_pos"][[0, 3]].tolist() == [[100, 101], [10, 11]]
    assert columns["index"].tolist() == [12, 13, 14, 5, 6, 7, 8, 9, 10, 11]


def as_openpi_names(root: Path) -> Path:
    """The same dataset with `actions` and `state`, as openpi's converters write them."""
    theirs = {"action": "actions", "observation.state": "state"}
    for path in [*root.glob("data/*/*.parquet"), *root.glob("meta/episodes/*/*.parquet")]:
        table = pq.read_table(path)
        names = ["/".join(theirs.get(word, word) for word in name.split("/")) for name in table.column_names]
        pq.write_table(table.rename_columns(names).replace_schema_metadata(None), path)
    for name in ("info", "stats"):
        path = root / f"meta/{name}.json"
        told = json.loads(path.read_text())
        inner = told["features"] if name == "info" else told
        renamed = {theirs.get(key, key): value for key, value in inner.items()}
        path.write_text(json.dumps({**told, "features": renamed} if name == "info" else renamed))
    return root


def test_openpi_names_are_read_by_the_names_policies_look_for(tmp_path: Path):
    ours = open_dataset(write_dataset(tmp_path / "ours", [4, 5]))
    root = as_openpi_names(write_dataset(tmp_path / "theirs", [4, 5]))
    theirs = open_dataset(root)
    assert set(theirs.features) == set(ours.features) and set(theirs.stats) == set(ours.stats)
    assert theirs.contents() == ours.contents()  # so targets of the one fit the other
    for name in ("action", "observation.state"):
        assert np.array_equal(theirs.columns([name], 1)[name], ours.columns([name], 1)[name])
        assert theirs.names(name) == ours.names(name)
    assert theirs.stored == {"action": "actions", "observation.state": "state"}
    assert "'actions' is read as 'action'" in theirs.renaming and not ours.renaming
    assert set(open_dataset(root, as_stored=True).features) >= {"actions", "state"}
    stream = open_stream(root, StreamSpec(chunks={"action": 2}), batch_size=4)
    assert "'state' is read as 'observation.state'" in stream.describe()
    batch = next(iter(stream))
    assert batch["action"].shape == (4, 2, 3) and batch["observation.state"].shape == (4, 3)


def test_a_name_that_is_taken_stays_with_its_column(tmp_path: Path):
    root = as_openpi_names(write_dataset(tmp_path / "x", [4]))
    for path in root.glob("data/*/*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.append_column("action", table.column("state")), path)
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["action"] = info["features"]["state"]
    (root / "meta/info.json").write_text(json.dumps(info))
    both = open_dataset(root)
    assert both.stored == {"observation.state": "state"} and {"action", "actions"} <= set(both.features)
    assert np.array_equal(*both.columns(["action", "observation.state"], 0).values())
    made = open_dataset(select(root, [0], tmp_path / "selected").root)  # files keep their own names
    assert made.stored == both.stored and made.contents() == both.contents()
