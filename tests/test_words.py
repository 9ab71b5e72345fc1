"""Sentences as files hold them: str, bytes, arrays of one, nothing at all; never `b'...'` and never "None"."""

import json
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import raw_agibot
import raw_calvin
import raw_egodex
from dpipe.converters import load_converter
from dpipe.converters.words import text_of
from dpipe.schemas.episode import EpisodeRef
from hypothesis import given
from hypothesis import strategies as st
from small_datasets import write_dataset

SENTENCE = "pick up the cup, s'il vous plaît"
HELD = {
    "str": SENTENCE,
    "bytes": SENTENCE.encode(),
    "fixed": np.bytes_(SENTENCE.encode()),
    "array of one": np.array([SENTENCE], dtype=h5py.string_dtype()),
    "array of one, fixed": np.array([SENTENCE.encode()]),
    "table of one": np.array([[SENTENCE.encode()]]),
    "padded": np.bytes_(SENTENCE.encode() + b"\0\0"),
}


@pytest.mark.parametrize("value", HELD.values(), ids=HELD)
def test_every_way_of_holding_a_sentence_gives_it(value):
    assert text_of(value) == SENTENCE


@pytest.mark.parametrize(
    "value", [None, "", b"", "None", b"None", " ", np.array([]), h5py.Empty("S1"), ["a", "b"]]
)
def test_what_is_missing_is_empty(value):
    assert text_of(value) == ""


@given(st.text())
def test_bytes_and_text_say_the_same(text: str):
    assert text_of(text.encode("utf-8", "surrogatepass")) == text_of(
        text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    )


def refs_of(source: str, raw: Path, **options) -> list[EpisodeRef]:
    converter = load_converter(source)
    chosen = converter.Options(**options)
    found = [
        entry for recording in converter.find(raw, chosen) for entry in converter.scan(recording, chosen)
    ]
    assert all(isinstance(entry, EpisodeRef) for entry in found), found
    return found  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("value", HELD.values(), ids=HELD)
def test_egodex_attributes_in_any_form(tmp_path: Path, value):
    attrs = {
        "llm_type": value.__class__(b"reversible") if isinstance(value, bytes) else "reversible",
        "which_llm_description": np.array([b"2"]),
        "llm_description": "the other way round",
        "llm_description2": value,
    }
    raw_egodex.write_episode(tmp_path / "part1/pour/0", attrs=attrs)
    (ref,) = refs_of("egodex", tmp_path)
    assert (ref.instruction, ref.metadata["instruction_from"]) == (SENTENCE, "llm_description2")


def test_calvin_annotations_as_bytes(tmp_path: Path):
    split = raw_calvin.write_split(tmp_path / "task_D_D/training", [(100, 119)], [(102, 106, "a", "b")])
    annotations = {
        "language": {
            "ann": [np.bytes_(SENTENCE.encode())],
            "task": [b"lift_block"],
            "emb": np.zeros((1, 1, 4)),
        },
        "info": {"indx": [(102, 106)], "episodes": []},
    }
    np.save(split / "lang_annotations/auto_lang_ann.npy", np.array(annotations, object))
    (ref,) = refs_of("calvin", tmp_path)
    assert ref.instruction == SENTENCE and ref.metadata["task"] == "lift_block"
    assert ref.segments[0].text == SENTENCE


def test_agibot_entries_without_words(tmp_path: Path):
    entry = {"episode_id": 7, "task_name": SENTENCE, "init_scene_text": None}
    entry["label_info"] = {
        "action_config": [{"start_frame": 1, "end_frame": 5, "action_text": None, "skill": "Pick"}]
    }
    raw_agibot.write_episode(tmp_path, episode=7, entry=entry, frames=30)
    (ref,) = refs_of("agibot", tmp_path, instruction="task-scene")
    assert ref.instruction == SENTENCE and ref.segments[0].text == "Pick"


@pytest.mark.parametrize("kind", ["bytes", "null"])
def test_lerobot_tasks_as_bytes_or_missing(tmp_path: Path, kind: str):
    write_dataset(tmp_path / "set", [5, 4])
    path = tmp_path / "set/meta/tasks.parquet"
    count = pq.read_table(path).num_rows
    words = [SENTENCE.encode()] * count if kind == "bytes" else [None] * count
    table = pa.table(
        {"task_index": range(count), "task": pa.array(words, pa.binary() if kind == "bytes" else pa.string())}
    )
    pq.write_table(table, path)
    said = {ref.instruction for ref in refs_of("lerobot", tmp_path / "set")}
    assert said == ({SENTENCE} if kind == "bytes" else {""})


@pytest.mark.parametrize("value", HELD.values(), ids=HELD)
@pytest.mark.parametrize("where", ["attribute", "dataset"])
def test_a_map_takes_sentences_in_any_form(tmp_path: Path, where: str, value):
    with h5py.File(tmp_path / "demo.hdf5", "w") as file:
        group = file.create_group("data/demo_0")
        group["actions"] = np.zeros((4, 2), np.float32)
        group["state"] = np.zeros((4, 2), np.float32)
        group["rgb"] = np.zeros((4, 16, 16, 3), np.uint8)
        if where == "attribute":
            group.attrs["lang"] = value
        else:
            group["lang"] = (
                value if not isinstance(value, str) else np.array(value, dtype=h5py.string_dtype())
            )
    told = {
        "fps": 10,
        "robot_type": "arm",
        "files": {"pattern": "*.hdf5", "episodes": "data/demo_*"},
        "instruction": {where: "lang"},
        "action": {"datasets": ["actions"], "names": ["x", "y"]},
        "state": {"datasets": ["state"], "names": ["x", "y"]},
        "cameras": {"top": {"dataset": "rgb"}},
    }
    (ref,) = refs_of("mapped", tmp_path, map=json.loads(json.dumps(told)))
    assert ref.instruction == SENTENCE
