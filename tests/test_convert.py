"""Conversions end to end: what lerobot reads, what a rerun does, what a kill leaves."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from dpipe.converters.libero import Options
from dpipe.pipeline.payload import VideoOptions
from dpipe.schemas.errors import DataError, UsageError
from dpipe.streams.dataset import open_dataset
from raw_libero import GOAL_TASK, demo_arrays, write_raw, write_suite
from trees import run_convert, tree_digest


def set_demo(path: Path, demo: int, name: str, value) -> None:
    with h5py.File(path, "a") as file:
        file[f"data/demo_{demo}/{name}"][...] = value


def test_a_dataset_reads_back_as_it_was(tmp_path: Path):
    write_suite(tmp_path / "raw", demos=3, steps=10)
    result = run_convert(tmp_path / "raw", tmp_path / "out")
    assert (result.episodes, result.frames, result.dropped, result.unchanged) == (3, 9 + 10 + 11, (), False)
    dataset = open_dataset(tmp_path / "out")
    rows = dataset.all_columns(["action", "index", "episode_index", "frame_index", "timestamp", "task_index"])
    assert rows["index"].tolist() == list(range(30))
    assert rows["episode_index"].tolist() == [0] * 9 + [1] * 10 + [2] * 11
    assert np.array_equal(rows["timestamp"], (rows["frame_index"] / 20).astype(np.float32))
    expected = np.concatenate([demo_arrays(10 + i, i)["actions"][1:] for i in range(3)]).astype(np.float32)
    assert np.array_equal(rows["action"], expected)
    assert dataset.tasks == [GOAL_TASK.replace("_", " ")]


def test_a_rerun_changes_nothing(tmp_path: Path):
    write_suite(tmp_path / "raw")
    run_convert(tmp_path / "raw", tmp_path / "out")
    before = tree_digest(tmp_path / "out")
    again = run_convert(tmp_path / "raw", tmp_path / "out")
    assert again.unchanged and again.encoded == 0 and tree_digest(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["layout", "converter_version"])
def test_a_dataset_of_another_version_is_left_as_it_is(tmp_path: Path, name: str):
    write_suite(tmp_path / "raw", demos=2)
    run_convert(tmp_path / "raw", tmp_path / "out")
    path = tmp_path / "out" / "dpipe" / "journal" / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: 0}))
    before = tree_digest(tmp_path / "out")
    with pytest.raises(UsageError, match="by another version of dpipe") as refused:
        run_convert(tmp_path / "raw", tmp_path / "out")
    assert ": 0 then, " in str(refused.value) and "another --name" in str(refused.value)
    assert tree_digest(tmp_path / "out") == before


def test_bytes_do_not_depend_on_workers_or_parts_order(tmp_path: Path):
    write_suite(tmp_path / "raw", demos=5)
    run_convert(tmp_path / "raw", tmp_path / "a", workers=0, part_frames=25)
    run_convert(tmp_path / "raw", tmp_path / "b", workers=2, part_frames=25)
    assert tree_digest(tmp_path / "a") == tree_digest(tmp_path / "b")


def test_new_episodes_are_appended_and_touch_nothing_else(tmp_path: Path):
    path = write_suite(tmp_path / "raw", demos=2)
    run_convert(tmp_path / "raw", tmp_path / "out")
    before = tree_digest(tmp_path / "out")
    # Sorted before the first file: still appended after it, because episode numbers are kept.
    write_raw(path.with_name("a_first_task_demo.hdf5"), {0: demo_arrays(9, 7)})
    result = run_convert(tmp_path / "raw", tmp_path / "out")
    after = tree_digest(tmp_path / "out")
    assert result.encoded == 1 and result.episodes == 3
    untouched = [name for name in before if name.startswith(("data/", "videos/"))]
    assert untouched and all(before[name] == after[name] for name in untouched)
    assert open_dataset(tmp_path / "out").episodes.source_id(2) == "libero_goal/a_first_task_demo/demo_0"


def test_limit_then_all_appends(tmp_path: Path):
    write_suite(tmp_path / "raw", demos=4)
    assert run_convert(tmp_path / "raw", tmp_path / "out", limit=2).episodes == 2
    result = run_convert(tmp_path / "raw", tmp_path / "out")
    assert (result.episodes, result.encoded) == (4, 2)


def test_where_selects_by_sql_over_the_catalogue(tmp_path: Path):
    write_suite(tmp_path / "raw", demos=4, steps=10)
    result = run_convert(tmp_path / "raw", tmp_path / "out", where="frames >= 11 AND suite = 'libero_goal'")
    assert result.episodes == 2
    with pytest.raises(UsageError, match=r"columns: .*frames.*suite"):
        run_convert(tmp_path / "raw", tmp_path / "other", where="length > 3")


def test_a_changed_episode_is_redone_in_its_place(tmp_path: Path):
    path = write_suite(tmp_path / "raw", demos=3)
    run_convert(tmp_path / "raw", tmp_path / "out")
    before = tree_digest(tmp_path / "out")
    set_demo(path, 1, "actions", np.where(np.arange(7) == 6, demo_arrays(13, 1)["actions"], 0.25))
    result = run_convert(tmp_path / "raw", tmp_path / "out")
    assert result.encoded == 1 and result.episodes == 3
    dataset = open_dataset(tmp_path / "out")
    assert np.all(dataset.columns(["action"], 1)["action"][:, :6] == np.float32(0.25))
    for episode in (0, 2):
        expected = demo_arrays(12 + episode, episode)["actions"][1:].astype(np.float32)
        assert np.array_equal(dataset.columns(["action"], episode)["action"], expected)
    after = tree_digest(tmp_path / "out")
    assert all(before[name] == after[name] for name in before if name.startswith("videos/"))


def test_a_touched_but_equal_file_is_not_encoded_again(tmp_path: Path):
    path = write_suite(tmp_path / "raw")
    run_convert(tmp_path / "raw", tmp_path / "out")
    path.touch()
    result = run_convert(tmp_path / "raw", tmp_path / "out")
    assert result.encoded == 0 and result.unchanged


def test_a_raw_file_may_be_discarded_after_conversion(tmp_path: Path):
    path = write_suite(tmp_path / "raw", demos=2)
    run_convert(tmp_path / "raw", tmp_path / "out")
    path.unlink()
    write_raw(path.with_name("another_task_demo.hdf5"), {0: demo_arrays(9, 5)})
    result = run_convert(tmp_path / "raw", tmp_path / "out")
    assert (result.episodes, result.encoded) == (3, 1)


def test_other_options_over_a_finished_dataset_are_refused_by_name(tmp_path: Path):
    write_suite(tmp_path / "raw")
    run_convert(tmp_path / "raw", tmp_path / "out")
    with pytest.raises(UsageError, match="--gripper: 'native' then, 'open-one' now"):
        run_convert(tmp_path / "raw", tmp_path / "out", options=Options(gripper="open-one"))
    with pytest.raises(UsageError, match="--codec: 'h264' then, 'av1' now"):
        run_convert(tmp_path / "raw", tmp_path / "out", video=VideoOptions(codec="av1"))


def test_a_folder_that_is_not_ours_is_never_written_to(tmp_path: Path):
    write_suite(tmp_path / "raw")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty"):
        run_convert(tmp_path / "raw", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_bad_episodes_are_left_out_listed_and_said_again(tmp_path: Path):
    bad = demo_arrays(13, 1)
    bad["actions"][4] = np.nan
    write_raw(tmp_path / "raw/libero_goal/t_demo.hdf5", {0: demo_arrays(12), 1: bad, 2: demo_arrays(14, 2)})
    result = run_convert(tmp_path / "raw", tmp_path / "out")
    assert result.episodes == 2 and [d.source_id for d in result.dropped] == ["libero_goal/t_demo/demo_1"]
    (line,) = (tmp_path / "out/dpipe/dropped.jsonl").read_text().splitlines()
    assert "not finite" in json.loads(line)["reason"]
    assert len(run_convert(tmp_path / "raw", tmp_path / "out").dropped) == 1


def test_pixels_that_fail_late_drop_the_episode_and_rewrite_tables_only(tmp_path: Path, monkeypatch):
    from dpipe.converters import libero

    write_suite(tmp_path / "raw", demos=3)
    whole = libero.DemoFrames.read

    def failing(self, start: int, stop: int):
        if "demo_1/" in self.name:
            raise DataError("pictures of demo_1 cannot be read")
        return whole(self, start, stop)

    monkeypatch.setattr(libero.DemoFrames, "read", failing)
    result = run_convert(tmp_path / "raw", tmp_path / "out")
    assert result.episodes == 2 and "pictures of demo_1" in result.dropped[0].reason
    dataset = open_dataset(tmp_path / "out")
    rows = dataset.all_columns(["index", "episode_index"])
    assert rows["index"].tolist() == list(range(11 + 13)) and set(rows["episode_index"]) == {0, 1}
    assert dataset.frames(1, "observation.images.image", 0, 13).shape == (13, 32, 32, 3)


def test_nothing_usable_is_one_clear_error(tmp_path: Path):
    (tmp_path / "raw").mkdir()
    with pytest.raises(DataError, match=r"nothing in it looks like one[\s\S]*dpipe sample libero"):
        run_convert(tmp_path / "raw", tmp_path / "out")
    with pytest.raises(DataError, match="the folder is not there"):
        run_convert(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out" / "meta").exists()


def test_pictures_of_several_sizes_need_a_resize(tmp_path: Path):
    write_suite(tmp_path / "raw", demos=1, side=32)
    write_raw(tmp_path / "raw/libero_goal/big_demo.hdf5", {0: demo_arrays(9, side=48)})
    with pytest.raises(DataError, match="--resize WxH"):
        run_convert(tmp_path / "raw", tmp_path / "out")
    result = run_convert(tmp_path / "raw", tmp_path / "resized", video=VideoOptions(resize=(32, 32)))
    assert result.episodes == 2
    assert open_dataset(tmp_path / "resized").frames(0, "observation.images.image", 0, 2).shape == (
        2,
        32,
        32,
        3,
    )


def test_a_second_run_on_the_same_dataset_stops(tmp_path: Path):
    from dpipe.pipeline.durable import exclusive

    write_suite(tmp_path / "raw")
    with (
        exclusive(tmp_path / "out/dpipe/journal", "convert libero"),
        pytest.raises(DataError, match="another run is working"),
    ):
        run_convert(tmp_path / "raw", tmp_path / "out")


def test_splits_are_contiguous_ranges_with_train_first():
    from dpipe.pipeline.finish import _split_ranges

    assert _split_ranges(["train", "train", "validation"]) == {"train": "0:2", "validation": "2:3"}
    assert _split_ranges(["train", "test", "train"]) == {"train": "0:1,2:3", "test": "1:2"}
