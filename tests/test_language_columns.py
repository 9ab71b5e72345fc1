"""LeRobot's language column behind an option: what lerobot 0.6.1 itself makes of a play episode's windows."""

import json
from pathlib import Path

import pytest
import raw_calvin
from dpipe.converters import load_converter
from dpipe.pipeline.tables import data_schema, language_rows
from dpipe.streams.dataset import open_dataset
from trees import run_convert

WINDOWS = [(102, 106, "open the drawer", "open_drawer"), (105, 109, "push the block", "push_block")]


def test_a_window_holds_until_it_ends_and_the_later_one_wins():
    segments = [
        {"start": 2, "stop": 7, "text": "a"},
        {"start": 5, "stop": 6, "text": "b"},  # inside the first, which comes back after it
        {"start": 8, "stop": 10, "text": "c"},
        {"start": 8, "stop": 9, "text": "d"},  # begins together with c: one row a moment
    ]
    rows = language_rows(segments, 12, 2)
    assert [(row["timestamp"], row["content"]) for row in rows] == [
        (1.0, "a"),
        (2.5, "b"),
        (3.0, "a"),
        (3.5, None),
        (4.0, "c"),
        (5.0, None),
    ]
    assert {row["style"] for row in rows} == {"subtask"}
    assert language_rows([], 5, 2) == []


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    raw_calvin.write_split(folder / "raw/task_D_D/training", [(100, 119), (130, 139)], WINDOWS)
    options = load_converter("calvin").Options(cut="play", language_columns=True)
    run_convert(folder / "raw", folder / "set", "calvin", options=options)
    return folder / "set"


def test_lerobot_opens_the_column_and_says_which_window_is_active(dataset: Path):
    lerobot = pytest.importorskip("lerobot.datasets.lerobot_dataset")
    from lerobot.datasets.language_render import active_at

    opened = lerobot.LeRobotDataset("local/set", root=dataset)
    assert opened.meta.has_language_columns
    said = []
    for i in range(30):
        item = opened[i]
        rows = [dict(row) for row in item["language_persistent"]]
        found = active_at(float(item["timestamp"]), persistent=rows, style="subtask")
        said.append(found["content"] if found else None)
    drawer, block = "open the drawer", "push the block"
    # Frames 102 to 106 and 105 to 109, ends included; the second play episode has no window.
    assert said == [None] * 2 + [drawer] * 3 + [block] * 5 + [None] * 20


def test_the_schema_is_the_one_lerobot_declares(dataset: Path):
    language = pytest.importorskip("lerobot.datasets.language")
    import datasets
    import pyarrow.parquet as pq

    (path,) = (dataset / "data").rglob("*.parquet")
    schema = pq.read_schema(path)
    assert schema.field("language_persistent").type == language.language_persistent_arrow_type()
    told = datasets.Features.from_arrow_schema(schema)
    assert told["language_persistent"] == language.language_persistent_column_feature()
    info = json.loads((dataset / "meta/info.json").read_text())
    wanted = {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in language.language_feature_info()["language_persistent"].items()
    }
    assert info["features"]["language_persistent"] == wanted
    assert "language_persistent" not in data_schema([]).names  # only on request


def test_our_own_reader_takes_it_for_neither_vector_nor_camera(dataset: Path):
    opened = open_dataset(dataset)
    assert "language_persistent" not in (*opened.vectors, *opened.cameras)
    assert opened.columns(["action"], 0)["action"].shape == (20, 7)
