"""Shards written during conversion: the recorded frames, never decoded again, whatever happens on the way."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from dpipe.pipeline import payload
from dpipe.pipeline.payload import VideoOptions
from dpipe.schemas.errors import Interrupted
from dpipe.streams.dataset import Dataset, open_dataset
from dpipe.streams.health import Health
from dpipe.streams.rows import Fit
from dpipe.streams.shard_format import ShardOptions
from dpipe.streams.shard_writing import encode_frames
from dpipe.streams.shards import ShardRows, check_source
from dpipe.streams.stream import StreamSpec, open_stream
from raw_libero import write_suite
from trees import run_convert, tree_digest

SHARDS = ShardOptions(quality=95)
CAMERAS = ("observation.images.image", "observation.images.image2")


def frames_of(rows: ShardRows, camera: str, count: int) -> np.ndarray:
    out = np.zeros((count, *rows.size(camera), 3), np.uint8)
    rows.frames(camera, np.arange(count), out, Health())
    return out


@pytest.fixture
def no_decoding(monkeypatch):
    """Any frame decoded from the dataset's videos fails the test."""

    def refuse(*_: object) -> None:
        raise AssertionError("a frame was decoded from the dataset")

    monkeypatch.setattr(Dataset, "frames", refuse)


def test_shards_are_made_of_the_recorded_frames_without_decoding(tmp_path: Path, no_decoding):
    raw = write_suite(tmp_path / "raw", demos=3, steps=10)
    result = run_convert(tmp_path / "raw", tmp_path / "out", shards=SHARDS)
    assert result.shards == tmp_path / "out/dpipe/shards" / SHARDS.variant
    assert not (tmp_path / "out/dpipe/spool").exists()
    dataset, rows = open_dataset(tmp_path / "out"), ShardRows(result.shards, Fit())
    check_source(rows, dataset)
    index = np.arange(30)
    values = rows.values(["action", "index"], index)
    assert np.array_equal(values["action"], dataset.all_columns(["action"])["action"])
    assert values["index"].tolist() == index.tolist()
    with h5py.File(raw) as file:
        recorded = file["data/demo_0/obs/agentview_rgb"][:]
    # A frame is shown with the action that follows it, so the last has none; pictures are turned by half.
    upright = recorded[:9, ::-1, ::-1]
    expected = encode_frames(np.ascontiguousarray(upright), rows.size(CAMERAS[0]), 95)
    assert [rows.encoded(CAMERAS[0], row) for row in range(9)] == expected


def test_a_stream_finds_them_and_agrees_with_the_videos(tmp_path: Path):
    write_suite(tmp_path / "raw", demos=2, steps=10)
    run_convert(tmp_path / "raw", tmp_path / "out", shards=SHARDS)
    spec = StreamSpec(chunks={"action": 4})
    ours = open_stream(tmp_path / "out", spec, batch_size=6)
    assert isinstance(ours.source.rows, ShardRows)
    for a, b in zip(ours, open_stream(tmp_path / "out", spec, batch_size=6, frames="video"), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name not in CAMERAS:
                assert np.array_equal(a[name], b[name]), name


def test_the_dataset_is_the_same_with_and_without(tmp_path: Path):
    write_suite(tmp_path / "raw")
    run_convert(tmp_path / "raw", tmp_path / "with", shards=SHARDS)
    run_convert(tmp_path / "raw", tmp_path / "without")
    assert tree_digest(tmp_path / "with", without=("dpipe/shards",)) == tree_digest(tmp_path / "without")


def test_bytes_do_not_depend_on_workers_and_a_rerun_writes_nothing(tmp_path: Path):
    write_suite(tmp_path / "raw", demos=5)
    run_convert(tmp_path / "raw", tmp_path / "a", part_frames=25, shards=SHARDS)
    run_convert(tmp_path / "raw", tmp_path / "b", part_frames=25, shards=SHARDS, workers=2)
    before = tree_digest(tmp_path / "a")
    assert before == tree_digest(tmp_path / "b")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "a/dpipe/shards").rglob("part-*")}
    assert run_convert(tmp_path / "raw", tmp_path / "a", part_frames=25, shards=SHARDS).unchanged
    assert tree_digest(tmp_path / "a") == before
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_a_run_stopped_before_its_shards_makes_them_of_the_recorded_frames_later(
    tmp_path: Path, monkeypatch, no_decoding
):
    from dpipe.pipeline import shards

    write_suite(tmp_path / "raw", demos=3)
    run_convert(tmp_path / "raw", tmp_path / "whole", shards=SHARDS)

    def stop(*_: object, **__: object) -> None:
        raise Interrupted("stopped")

    with monkeypatch.context() as broken, pytest.raises(Interrupted):
        broken.setattr(shards, "fill_shards", stop)
        run_convert(tmp_path / "raw", tmp_path / "out", shards=SHARDS)
    assert run_convert(tmp_path / "raw", tmp_path / "out", shards=SHARDS).encoded == 0
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")


def test_asked_for_afterwards_they_are_decoded_from_the_videos(tmp_path: Path):
    write_suite(tmp_path / "raw", demos=2, steps=10)
    run_convert(tmp_path / "raw", tmp_path / "out")
    result = run_convert(tmp_path / "raw", tmp_path / "out", shards=SHARDS)
    assert result.unchanged and result.encoded == 0
    dataset, rows = open_dataset(tmp_path / "out"), ShardRows(result.shards, Fit())
    decoded = np.concatenate([dataset.frames(e, CAMERAS[0], 0, n) for e, n in enumerate((9, 10))])
    assert np.abs(frames_of(rows, CAMERAS[0], 19).astype(int) - decoded).mean() < 4


def test_pictures_shrink_to_the_short_side_and_to_what_the_video_was_resized_to(tmp_path: Path, no_decoding):
    write_suite(tmp_path / "raw", demos=1, steps=10)
    small = run_convert(tmp_path / "raw", tmp_path / "a", shards=ShardOptions(short_side=16))
    assert ShardRows(small.shards, Fit()).size(CAMERAS[0]) == (16, 16)
    video = VideoOptions(resize=(48, 64))
    resized = run_convert(tmp_path / "raw", tmp_path / "b", shards=ShardOptions(), video=video)
    assert ShardRows(resized.shards, Fit()).size(CAMERAS[0]) == (64, 48)


def test_without_the_wish_no_jpeg_is_made(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(payload, "_Jpegs", None)
    write_suite(tmp_path / "raw", demos=1)
    assert run_convert(tmp_path / "raw", tmp_path / "out").shards is None
    assert not (tmp_path / "out/dpipe/shards").exists()
