"""Per-frame arrays: what we write is what zarr reads, and a memory map reads the same."""

import json
import os

import numpy as np
import pytest
from dpipe.schemas.bfloat16 import bfloat16_to_float32, float32_to_bfloat16
from dpipe.schemas.contract import BFLOAT16, ArraySpec
from dpipe.schemas.errors import DataError
from dpipe.streams.arrays import (
    ArrayWriter,
    open_array,
    read_spec,
    write_array,
    write_group,
)
from hypothesis import given, settings
from hypothesis import strategies as st

zarr = pytest.importorskip("zarr")


def sample(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    if dtype == "bool":
        return rng.random(shape) > 0.5
    return (rng.random(shape) * 200).astype(dtype)


@pytest.mark.parametrize("level", [None, 3])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int64", "float16", "float32", "bool"])
@pytest.mark.parametrize("shape", [(1, 3), (10, 7), (5, 4, 300), (33, 64, 40), (7,)])
def test_zarr_reads_what_we_write_and_so_do_we(tmp_path, shape, dtype, level):
    values = sample(shape, dtype)
    path = write_array(tmp_path / "x", ArraySpec("x", shape[1:], dtype), values, level)
    theirs = zarr.open_array(path, mode="r")
    assert theirs.shape == shape and theirs.dtype == values.dtype
    np.testing.assert_array_equal(theirs[:], values)
    ours = open_array(path, verify=True)
    assert ours.shape == shape and len(ours) == shape[0]
    np.testing.assert_array_equal(ours[:], values)
    np.testing.assert_array_equal(ours[np.array([0, shape[0] - 1, 0])], values[[0, -1, 0]])
    np.testing.assert_array_equal(ours[shape[0] - 1], values[-1])


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=8),
    width=st.sampled_from([1, 500, 30_000, 70_000]),
    level=st.sampled_from([None, 1]),
)
def test_rows_may_come_in_any_portions(tmp_path_factory, lengths, width, level):
    folder = tmp_path_factory.mktemp("portions")
    total = sum(lengths)
    values = np.arange(total * width, dtype=np.uint16).reshape(total, width)
    with ArrayWriter(folder / "x", ArraySpec("x", (width,), "uint16"), level) as writer:
        start = 0
        for length in lengths:
            writer.append(values[start : start + length])
            start += length
    path = folder / "x"
    np.testing.assert_array_equal(open_array(path)[:], values)
    np.testing.assert_array_equal(zarr.open_array(path, mode="r")[:], values)
    if level is None:
        whole = write_array(folder / "y", ArraySpec("x", (width,), "uint16"), values)
        files = [p.relative_to(path) for p in sorted(path.rglob("*")) if p.is_file()]
        assert all((path / name).read_bytes() == (whole / name).read_bytes() for name in files)


def test_an_uncompressed_shard_begins_with_the_array_itself(tmp_path):
    values = sample((10, 7), "float32")
    path = write_array(tmp_path / "x", ArraySpec("x", (7,), "float32"), values)
    assert (path / "c.0.0").read_bytes()[: values.nbytes] == values.tobytes()
    assert not open_array(path)[:].flags.writeable


def test_nothing_has_the_final_name_before_the_end(tmp_path):
    spec = ArraySpec("x", (2,), "uint8")
    with pytest.raises(RuntimeError), ArrayWriter(tmp_path / "x", spec) as writer:
        writer.append(np.zeros((3, 2), np.uint8))
        assert not (tmp_path / "x").exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_rows_of_another_kind_are_refused_rather_than_cast(tmp_path):
    writer = ArrayWriter(tmp_path / "x", ArraySpec("x", (2,), "float16"))
    with pytest.raises(ValueError, match="float16"):
        writer.append(np.zeros((1, 2), np.float32))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        writer.append(np.zeros((1, 3), np.float16))
    writer.abort()


def test_a_cut_or_damaged_file_is_refused(tmp_path):
    path = write_array(tmp_path / "x", ArraySpec("x", (4,), "float32"), sample((50, 4), "float32"))
    shard = path / "c.0.0"
    whole = shard.read_bytes()
    os.truncate(shard, len(whole) - 8)
    with pytest.raises(DataError, match="incomplete"):
        open_array(path)
    shard.write_bytes(whole[:-6] + b"\x01\x02" + whole[-4:])
    with pytest.raises(DataError, match="crc32c"):
        open_array(path, verify=True)
    shard.unlink()
    with pytest.raises(DataError, match="incomplete: 0 bytes"):
        open_array(path)
    with pytest.raises(DataError, match="no array at"):
        open_array(tmp_path / "nowhere")


def test_someone_elses_zarr_is_left_to_zarr(tmp_path):
    zarr.create_array(tmp_path / "x", shape=(4, 2), dtype="float32", chunks=(2, 2))
    with pytest.raises(DataError, match="Read it with zarr"):
        open_array(tmp_path / "x")


def test_bfloat16_rounds_as_torch_does_and_is_marked(tmp_path):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.normal(size=5000) * 10.0 ** rng.integers(-30, 30, 5000), [0.0, -0.0, np.inf]]
    )
    values = values.astype(np.float32)
    bits = float32_to_bfloat16(values)
    theirs = torch.from_numpy(values).bfloat16()
    np.testing.assert_array_equal(bits, theirs.view(torch.uint16).numpy())
    np.testing.assert_array_equal(bfloat16_to_float32(bits), theirs.float().numpy())
    assert np.isnan(bfloat16_to_float32(float32_to_bfloat16(np.array([np.nan]))))[0]
    path = write_array(tmp_path / "x", ArraySpec("x", (), BFLOAT16), bits)
    spec, rows = read_spec(path)
    assert spec.dtype == BFLOAT16 and rows == len(values)
    assert open_array(path).dtype == np.uint16


def test_a_folder_of_arrays_opens_as_one_tree(tmp_path):
    write_group(tmp_path / "t", {"stage": "tokens"})
    write_group(tmp_path / "t" / "feat", {})
    values = sample((3, 2), "float32")
    write_array(tmp_path / "t" / "feat" / "part-000", ArraySpec("feat", (2,), "float32", ("d",)), values)
    group = zarr.open_group(tmp_path / "t", mode="r")
    np.testing.assert_array_equal(group["feat/part-000"][:], values)
    assert group.attrs["stage"] == "tokens"
    assert json.loads((tmp_path / "t" / "feat" / "part-000" / "zarr.json").read_text())[
        "dimension_names"
    ] == [
        "frame",
        "d",
    ]


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path):
    import tracemalloc

    row = np.zeros((16, 65_536), np.uint8)
    with ArrayWriter(tmp_path / "x", ArraySpec("x", (65_536,), "uint8")) as writer:
        writer.append(row)
        tracemalloc.start()
        for _ in range(100):
            writer.append(row)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 * row.nbytes
    assert len(open_array(tmp_path / "x")) == 1616
