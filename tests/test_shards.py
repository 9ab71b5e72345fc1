"""Shards: Parquet that anyone opens, read by place, equal to what pyarrow reads, refused where damaged."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dpipe.schemas.errors import DataError, UsageError
from dpipe.streams.dataset import open_dataset
from dpipe.streams.health import Health
from dpipe.streams.rows import Fit
from dpipe.streams.shard_format import GROUP_ROWS, Column, ShardOptions, read_values
from dpipe.streams.shard_writing import (
    PartWriter,
    ShardPlan,
    encode_frames,
    finish_shards,
    write_part,
    write_shards,
)
from dpipe.streams.shards import ShardRows, check_source, find_shards
from dpipe.streams.stream import StreamSpec, open_stream
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import serve
from small_datasets import columns_of, number_of, picture, write_dataset

LENGTHS = [5, 700, 3, 40]
STARTS = [0, 5, 705, 708]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A dataset of image columns with shards in two parts, of two episodes each."""
    root = write_dataset(
        tmp_path_factory.mktemp("shards") / "set", LENGTHS, cameras=("image", "image2"), kind="image"
    )
    with pytest.MonkeyPatch.context() as small:
        small.setattr("dpipe.streams.dataset.FOREIGN_PART_FRAMES", 706)
        write_shards(open_dataset(root))
    return root


def shards_of(root: Path) -> Path:
    found = find_shards(open_dataset(root), None)
    assert found is not None
    return found


def test_values_by_place_equal_what_pyarrow_reads(made: Path):
    reader = ShardRows(shards_of(made), Fit())
    theirs = pa.concat_tables(pq.read_table(path) for path in sorted(reader.folder.glob("*.parquet")))
    rows = np.random.default_rng(0).permutation(sum(LENGTHS))
    for name, values in reader.values(reader.columns(), rows).items():
        column = theirs.column(name).combine_chunks()
        flat = np.asarray(column.flatten() if pa.types.is_fixed_size_list(column.type) else column)
        assert np.array_equal(values, flat.reshape(len(rows), *values.shape[1:])[rows]), name
    for camera in reader.cameras():
        jpegs = theirs.column(camera).combine_chunks().field("bytes").to_pylist()
        assert all(reader.encoded(camera, row) == jpegs[row] for row in rows[:100].tolist())


def test_values_are_the_datasets_own(made: Path):
    reader = ShardRows(shards_of(made), Fit())
    for e, length in enumerate(LENGTHS):
        rows = STARTS[e] + np.arange(length)
        for name, values in columns_of(e, length).items():
            assert np.array_equal(reader.values([name], rows)[name], values)
    chunk = reader.values(["index"], np.array([[3, 4, 4], [510, 517, 704]]))["index"]
    assert chunk.tolist() == [[3, 4, 4], [510, 517, 704]]


def test_frames_are_the_right_ones_at_any_size(made: Path):
    rows = np.array([747, 0, 704, 517, 5, 516])
    for fit, size in (
        (Fit(), (40, 60)),
        (Fit((20, 30)), (20, 30)),
        (Fit((64, 64)), (64, 64)),
        (Fit((17, 45)), (17, 45)),
    ):
        reader = ShardRows(shards_of(made), fit)
        for number, camera in enumerate(reader.cameras()):
            out = np.zeros((len(rows), *size, 3), np.uint8)
            reader.frames(camera, rows, out, Health())
            assert [number_of(frame) for frame in out] == [(row, number) for row in rows]


def test_padding_and_cropping_keep_the_aspect():
    frame = np.full((40, 80, 3), 200, np.uint8)
    out = np.full((60, 60, 3), 7, np.uint8)
    Fit((60, 60), "pad").apply(frame, out)
    assert np.all(out[15:45] == 200)
    assert np.all(out[:15] == 0)
    assert np.all(out[45:] == 0)
    halves = np.concatenate([np.zeros((40, 40, 3), np.uint8), np.full((40, 40, 3), 255, np.uint8)], axis=1)
    cropped = np.zeros((40, 40, 3), np.uint8)
    Fit((40, 40), "crop").apply(halves, cropped)
    assert np.all(cropped[:, :20] == 0)
    assert np.all(cropped[:, 20:] == 255)


def test_row_groups_hold_at_most_512_frames_of_one_episode(made: Path):
    lengths = []
    for path in sorted(shards_of(made).glob("*.parquet")):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=["episode_index", "frame_index"])
            assert len(set(rows.column("episode_index").to_pylist())) == 1
            lengths.append(rows.num_rows)
    assert lengths == [5, GROUP_ROWS, 700 - GROUP_ROWS, 3, 40]


def test_columns_lie_plain_and_uncompressed(made: Path):
    metadata = pq.ParquetFile(shards_of(made) / "part-00000.parquet").metadata
    for i in range(metadata.num_columns):
        column = metadata.row_group(0).column(i)
        if column.path_in_schema != "task":
            assert column.compression == "UNCOMPRESSED"
            assert column.dictionary_page_offset is None


def test_pandas_duckdb_dask_and_hugging_face_open_shards_as_they_are(made: Path, tmp_path: Path, monkeypatch):
    import duckdb
    import pandas

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    pattern = str(shards_of(made) / "*.parquet")
    frame = pandas.read_parquet(shards_of(made) / "part-00000.parquet")
    assert frame["task"].iloc[0] == "pick"
    assert frame["action"].iloc[6].tolist() == [1.0, -1.0, -1.0]
    query = f"select episode_index, count(*), max(action[1]) from '{pattern}' group by 1 order by 1"
    assert duckdb.connect().execute(query).fetchall() == [(e, n, n - 1.0) for e, n in enumerate(LENGTHS)]
    import datasets

    files = {"train": pattern}
    whole = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(whole) == sum(LENGTHS)
    assert number_of(np.asarray(whole[517]["observation.images.image2"])) == (517, 1)
    streamed = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    assert number_of(np.asarray(next(iter(streamed))["observation.images.image"])) == (0, 0)
    dask_frame = pytest.importorskip("dask.dataframe")
    assert len(dask_frame.read_parquet(pattern, columns=["index"])) == sum(LENGTHS)


def test_pandas_dask_and_hugging_face_open_shards_over_fsspec(made: Path):
    import datasets
    import fsspec
    import pandas

    memory = fsspec.filesystem("memory")
    for path in shards_of(made).glob("part-*.parquet"):
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    one = pandas.read_parquet("memory://bucket/part-00001.parquet", columns=["index", "action"])
    assert one["index"].iloc[0] == 705
    dask_frame = pytest.importorskip("dask.dataframe")
    whole = dask_frame.read_parquet("memory://bucket/part-*.parquet", columns=["index"])
    assert whole["index"].sum().compute() == sum(range(sum(LENGTHS)))
    files = {"train": "memory://bucket/part-00001.parquet"}
    streamed = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    assert number_of(np.asarray(next(iter(streamed))["observation.images.image2"])) == (705, 1)


def test_hugging_face_streams_shards_over_http(made: Path):
    import datasets

    with serve(shards_of(made)) as server:
        files = {"train": server.url + "/part-00001.parquet"}
        streamed = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        first = next(iter(streamed))
    assert first["index"] == 705
    assert number_of(np.asarray(first["observation.images.image"])) == (705, 0)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(
        [
            "bool",
            "int8",
            "uint8",
            "int16",
            "uint16",
            "int32",
            "uint32",
            "int64",
            "uint64",
            "float16",
            "float32",
            "float64",
        ]
    ),
    dim=st.integers(0, 9),
    groups=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_type_and_width_is_found_where_it_lies(tmp_path_factory, dtype, dim, groups, seed):
    """`close` proves every place against pyarrow; here single rows are read too."""
    rng = np.random.default_rng(seed)
    plan = ShardPlan(ShardOptions("none"), (Column("a", "int64", 0), Column("x", dtype, dim)), {}, {})
    path = tmp_path_factory.mktemp("any") / "part.parquet"
    writer = PartWriter(path, plan)
    blocks = []
    for count in groups:
        shape = (count, dim) if dim else (count,)
        raw = rng.integers(0, 2000 if dtype == "float16" else 2**31, shape)
        blocks.append((raw % 2).astype(bool) if dtype == "bool" else raw.astype(dtype))
        writer.write({"a": np.arange(count), "x": blocks[-1]}, ["t"] * count, {})
    places = writer.close()
    data = path.read_bytes()
    for g, block in enumerate(blocks):
        row = int(rng.integers(0, len(block)))
        got = read_values(data, int(places["group_values"][g, 1]), plan.columns[1], row, len(block) - row)
        assert got.dtype == np.dtype(dtype)
        assert np.array_equal(got, block[row:])


def test_frames_larger_than_the_short_side_are_shrunk_and_smaller_ones_are_not(tmp_path: Path):
    root = write_dataset(tmp_path / "a", [2], kind="image", size=(80, 120))
    for side, size in ((40, (40, 60)), (256, (80, 120))):
        write_shards(open_dataset(root), options=ShardOptions(short_side=side))
        folder = root / "dpipe/shards" / ShardOptions(short_side=side).variant
        reader = ShardRows(folder, Fit())
        assert reader.size("observation.images.image") == size
        out = np.zeros((2, *size, 3), np.uint8)
        reader.frames("observation.images.image", np.array([1, 0]), out, Health())
        assert [number_of(frame)[0] for frame in out] == [1, 0]
    assert find_shards(open_dataset(root), None) == root / "dpipe/shards/jpeg256-q90"


def test_jpegs_differ_little_from_the_frames_they_were_made_of():
    y, x = np.mgrid[0:96, 0:128]
    frame = np.stack([x * 2 % 256, y * 2, 128 + 60 * np.sin(x / 9)], -1).astype(np.uint8)
    import simplejpeg

    (encoded,) = encode_frames(frame[None], (96, 128), 90)
    assert np.abs(simplejpeg.decode_jpeg(encoded).astype(int) - frame).mean() < 3


def test_shards_without_pictures_leave_them_to_the_videos(tmp_path: Path):
    root = write_dataset(tmp_path / "a", [6, 9], cameras=("image",))
    write_shards(open_dataset(root), options=ShardOptions(frames="video"))
    folder = root / "dpipe/shards/video"
    assert ShardRows(folder, Fit()).cameras() == ()
    stream = open_stream(root, StreamSpec(chunks={"action": 2}), batch_size=4, shards="video", frames="video")
    for batch in stream:
        assert [number_of(frame)[0] for frame in batch["observation.images.image"]] == batch["index"].tolist()


def test_shards_alone_are_a_dataset(made: Path, tmp_path: Path):
    """Moved away from their dataset, as to another machine."""
    import shutil

    alone = tmp_path / "alone"
    shutil.copytree(shards_of(made), alone)
    spec = StreamSpec(chunks={"action": 3})
    here = list(open_stream(made, spec, batch_size=50))
    there = list(open_stream(alone, spec, batch_size=50))
    for a, b in zip(here, there, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert np.array_equal(a[name], b[name])


def test_a_reader_travels_to_another_process(made: Path):
    reader = ShardRows(shards_of(made), Fit((20, 30)))
    reader.values(["action"], np.array([1]))
    there = pickle.loads(pickle.dumps(reader))
    assert there.values(["index"], np.array([7]))["index"].tolist() == [7]
    assert len(pickle.dumps(reader)) < 1000


def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(tmp_path: Path, monkeypatch):
    root = write_dataset(tmp_path / "a", LENGTHS, kind="image")
    options = ShardOptions(short_side=16)
    dataset = open_dataset(root)
    monkeypatch.setattr("dpipe.streams.dataset.FOREIGN_PART_FRAMES", 60)
    assert len(dataset.parts()) == 3
    whole = write_shards(dataset, tmp_path / "whole", options)
    again = tmp_path / "again"
    write_part(dataset, again, 1, options)
    with pytest.raises(DataError, match="parts 0, 2 of 3 are not written"):
        finish_shards(dataset, again, options)
    with pytest.raises(DataError, match="no finished shards"):
        ShardRows(again, Fit())
    stamp = (again / "part-00001.parquet").stat().st_mtime_ns
    write_shards(dataset, again, options)
    assert (again / "part-00001.parquet").stat().st_mtime_ns == stamp
    names = sorted(
        path.relative_to(whole) for path in whole.rglob("*") if path.suffix != ".npz" and path.is_file()
    )
    assert names
    assert [(whole / name).read_bytes() for name in names] == [(again / name).read_bytes() for name in names]


def test_an_interrupted_part_leaves_nothing_that_looks_finished(tmp_path: Path, monkeypatch):
    root = write_dataset(tmp_path / "a", [5, 6], kind="image")
    dataset = open_dataset(root)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr("dpipe.streams.shard_writing._commit", fail)
        write_shards(dataset, tmp_path / "out")
    assert not list((tmp_path / "out").glob("part-*"))
    assert not (tmp_path / "out" / "index.json").exists()
    assert not list((tmp_path / "out").glob(".*.tmp"))
    write_shards(dataset, tmp_path / "out")
    ShardRows(tmp_path / "out", Fit())


def test_adding_an_episode_rewrites_only_the_last_part(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("dpipe.streams.dataset.FOREIGN_PART_FRAMES", 10)
    out = tmp_path / "out"
    write_shards(open_dataset(write_dataset(tmp_path / "a", [9, 4], kind="image")), out)
    stamps = [path.stat().st_mtime_ns for path in sorted(out.glob("part-*.parquet"))]
    longer = open_dataset(write_dataset(tmp_path / "b", [9, 4, 3], kind="image"))
    with pytest.raises(DataError, match="made from other episodes"):
        check_source(ShardRows(out, Fit()), longer)
    write_shards(longer, out)
    check_source(ShardRows(out, Fit()), longer)
    after = [path.stat().st_mtime_ns for path in sorted(out.glob("part-*.parquet"))]
    assert after[0] == stamps[0]
    assert after[1] != stamps[1]
    assert ShardRows(out, Fit()).values(["episode_index"], np.array([15]))["episode_index"].tolist() == [2]


def test_shards_of_other_contents_are_refused(tmp_path: Path):
    ours = write_dataset(tmp_path / "a", [5, 6], kind="image")
    write_shards(open_dataset(ours))
    path = ours / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("action")
    changed = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(33, np.float32)), 3)
    pq.write_table(table.set_column(place, "action", changed), path)
    with pytest.raises(DataError, match=r"made from other episodes[\s\S]*dpipe precompute shards"):
        open_stream(ours, StreamSpec(chunks={}))


def test_any_damaged_byte_of_a_frame_or_value_is_found(made: Path, tmp_path: Path):
    """One flipped bit anywhere in the values: the sample that reads it says which episode and frame."""
    import shutil

    folder = tmp_path / "s"
    shutil.copytree(shards_of(made), folder)
    reader = ShardRows(folder, Fit())
    out = np.zeros((1, 40, 60, 3), np.uint8)
    camera = "observation.images.image2"
    places = reader._arrays
    rng = np.random.default_rng(1)
    for row in (3, 600, 710):
        part = int(np.searchsorted(places["part_first"], row, side="right")) - 1
        path = folder / f"part-{part:05d}.parquet"
        sound = path.read_bytes()
        group = int(np.searchsorted(places["group_first"], row, side="right")) - 1
        k = reader.columns().index("action")
        spots = {
            "frame": int(places["frame_offset"][row, 1]) + int(rng.integers(places["frame_length"][row, 1])),
            "value": int(places["group_values"][group, k])
            + int(rng.integers(12 * int(places["group_first"][group + 1] - places["group_first"][group]))),
        }
        episode = [e for e, start in enumerate(STARTS) if start <= row][-1]
        for kind, spot in spots.items():
            damaged = bytearray(sound)
            damaged[spot] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            fresh = ShardRows(folder, Fit())
            with pytest.raises(DataError, match=rf"part-{part:05d}\.parquet.*episode {episode}, frame"):
                if kind == "frame":
                    fresh.frames(camera, np.array([row]), out, Health())
                else:
                    fresh.values(["action"], np.array([row]))
            path.write_bytes(sound)


def test_missing_short_and_foreign_files_are_refused(made: Path, tmp_path: Path):
    import shutil

    folder = tmp_path / "s"
    shutil.copytree(shards_of(made), folder)
    part = folder / "part-00001.parquet"
    sound = part.read_bytes()
    part.write_bytes(sound[:-1])
    with pytest.raises(DataError, match=f"has {len(sound) - 1} bytes\n  expected: {len(sound)}"):
        ShardRows(folder, Fit()).values(["index"], np.array([706]))
    part.unlink()
    with pytest.raises(DataError, match="no shard"):
        ShardRows(folder, Fit()).values(["index"], np.array([706]))
    os.truncate(folder / "index.bin", 100)
    with pytest.raises(DataError, match="cut short"):
        ShardRows(folder, Fit())
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"shards": 99}))
    with pytest.raises(DataError, match="version 99"):
        ShardRows(folder, Fit())


def test_options_are_checked_by_name(tmp_path: Path):
    with pytest.raises(UsageError, match="jpeg"):
        ShardOptions(frames="jpg")
    with pytest.raises(UsageError, match="quality"):
        ShardOptions(quality=0)
    dataset = open_dataset(write_dataset(tmp_path / "a", [3], kind="none"))
    with pytest.raises(UsageError, match=r"observation\.state"):
        write_shards(dataset, options=ShardOptions(columns=("observation.stat",)))


def test_pictures_of_the_helper_survive_jpeg():
    (encoded,) = encode_frames(picture(123_456, 5)[None], (40, 60), 90)
    import simplejpeg

    assert number_of(simplejpeg.decode_jpeg(encoded)) == (123_456, 5)
