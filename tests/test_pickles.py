"""Index files are read as data: what numpy writes comes back equal, and nothing a pickle names is called."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from dpipe.converters.pickles import load_array, load_object, load_pickle
from dpipe.schemas.errors import DataError
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, scalar_dtypes


def saved(value, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value, **options)
    return buffer.getvalue()


def index_file(windows: int = 3) -> dict:
    """auto_lang_ann as upstream writes it."""
    return {
        "language": {
            "ann": [f"push the block {i}" for i in range(windows)],
            "task": ["push_block"] * windows,
            "emb": np.arange(windows * 4, dtype=np.float32).reshape(windows, 1, 4),
        },
        "info": {"indx": [(np.int64(i), np.int64(i + 64)) for i in range(windows)], "episodes": []},
    }


def test_an_annotation_file_comes_back_equal():
    value = load_object(saved(np.array(index_file(), object)), "auto_lang_ann.npy")
    assert value["language"]["ann"] == ["push the block 0", "push the block 1", "push the block 2"]
    assert value["info"]["indx"] == [(0, 64), (1, 65), (2, 66)]
    assert value["language"]["emb"].dtype == np.float32
    assert value["language"]["emb"].tolist() == index_file()["language"]["emb"].tolist()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol_is_read(protocol):
    value = {
        "emb": np.arange(6.0).reshape(2, 3),
        "x": np.float64(0.5),
        "s": np.str_("word"),
        "f": np.asfortranarray(np.eye(2, 3)),
    }
    back = load_pickle(pickle.dumps(value, protocol), "x")
    assert back["x"] == 0.5 and back["s"] == "word"
    assert np.array_equal(back["emb"], value["emb"]) and np.array_equal(back["f"], value["f"])


@given(arrays(st.one_of(scalar_dtypes()), array_shapes(min_side=0)).filter(lambda a: a.dtype.kind in "biuf"))
def test_plain_arrays_of_any_kind_and_order_come_back_equal(array):
    assert np.array_equal(load_array(saved(array), "x"), array, equal_nan=array.dtype.kind == "f")
    turned = np.asfortranarray(array)
    assert np.array_equal(load_array(saved(turned), "x"), array, equal_nan=array.dtype.kind == "f")
    assert np.array_equal(load_pickle(pickle.dumps(array), "x"), array, equal_nan=array.dtype.kind == "f")


class Runs:
    """A pickle that runs a command when loaded by pickle itself."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {}",), "posix.system"),
        (eval, ("open('{}', 'w')",), "builtins.eval"),
        (np.load, ("{}",), "numpy"),
        (getattr, (np, "load"), "builtins.getattr"),
    ],
)
def test_a_pickle_that_would_run_something_is_refused_by_name(tmp_path: Path, function, arguments, name):
    witness = tmp_path / "witness"
    arguments = tuple(a.format(witness) if isinstance(a, str) else a for a in arguments)
    if function is getattr:
        arguments = ("x", "upper")
    data = saved(np.array({"language": Runs(function, *arguments)}, object))
    with pytest.raises(DataError, match=name):
        load_object(data, "auto_lang_ann.npy")
    assert not witness.exists()


def test_an_array_may_not_claim_more_than_it_carries():
    hostile = pickle.dumps(np.zeros(4))
    assert hostile.count(b"K\x04\x85") == 1  # its shape, (4,)
    with pytest.raises(DataError, match="damaged pickle"):
        load_pickle(hostile.replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85"), "x")
    with pytest.raises(DataError, match="bytes"):
        load_array(saved(np.zeros(4))[:-1], "x")


def test_a_place_in_the_memo_beyond_what_was_read_is_refused_before_room_is_made_for_it():
    """LONG_BINPUT with 2**28 - 1: two gigabytes of places for one None."""
    with pytest.raises(DataError, match="place 268435455 of its memo after 3 bytes"):
        load_pickle(b"\x80\x02Nr\xff\xff\xff\x0f.", "auto_lang_ann.npy")


def test_lists_that_contain_themselves_or_double_without_end_are_refused_or_shared():
    endless: list = []
    endless.append(endless)
    with pytest.raises(DataError, match="contains itself"):
        load_pickle(pickle.dumps(endless), "x")
    doubled: list = ["ha"]
    for _ in range(60):
        doubled = [doubled, doubled]
    assert load_pickle(pickle.dumps(doubled), "x")[0] is not None  # 2^60 words, built once


def test_pickled_objects_are_no_plain_array_and_the_reverse():
    with pytest.raises(DataError, match="pickled objects"):
        load_array(saved(np.array({"a": 1}, object)), "ep_start_end_ids.npy")
    with pytest.raises(DataError, match="expected one pickled object"):
        load_object(saved(np.zeros((2, 2))), "scene_info.npy")


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"\x93NUMPY\1\0\xff\xff{", saved(np.zeros(3))[:40]])
def test_what_is_no_npy_file_is_a_data_error(data):
    with pytest.raises(DataError):
        load_array(data, "x.npy")


@given(st.binary(max_size=200))
def test_noise_never_escapes_as_anything_but_a_data_error(noise):
    with pytest.raises(DataError):
        load_object(saved(np.array({"a": 1}, object))[:128] + b"\x80\x04" + noise, "x")


def test_real_index_files_are_read(sample_data: Path):
    for split, windows in (("training", 5), ("validation", 4)):
        folder = sample_data / "calvin" / "task_D_D" / split
        value = load_object(
            (folder / "lang_annotations" / "auto_lang_ann.npy").read_bytes(), "auto_lang_ann.npy"
        )
        assert len(value["language"]["ann"]) == len(value["info"]["indx"]) == windows
        assert value["language"]["emb"].shape == (windows, 1, 384)
        scene = load_object((folder / "scene_info.npy").read_bytes(), "scene_info.npy")
        assert list(scene) == ["calvin_scene_D"]
    prompts = folder / "lang_annotations" / "embeddings.npy"
    assert len(load_object(prompts.read_bytes(), "embeddings.npy")) == 34
