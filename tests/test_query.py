"""SQL over a workspace: what the tables say, what a query cannot do, and that every --where means the same."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from dpipe.cli import cli
from dpipe.pipeline.query import (
    EXAMPLES,
    TABLES,
    Answer,
    answer_csv,
    answer_json,
    answer_table,
    query,
    schema_text,
    select_episodes,
    select_rows,
)
from dpipe.pipeline.workspace import Workspace
from dpipe.schemas.errors import UsageError
from hypothesis import given, settings
from hypothesis import strategies as st
from small_datasets import write_dataset


def own_tables(root: Path, suites: list[str]) -> None:
    """What a conversion adds: a manifest, dpipe/episodes.parquet with metadata, segments, dropped episodes."""
    folder = root / "dpipe"
    folder.mkdir()
    count = len(suites)
    manifest = {"dpipe": 1, "name": root.name, "source": "libero", "licence": "mit", "dropped": 1}
    manifest["conventions"] = {"action": "ee_delta"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    dropped = {"source_id": "x", "split": "", "files": [], "reason": "torn", "remedy": "copy it again"}
    (folder / "dropped.jsonl").write_text(json.dumps(dropped) + "\n")
    metadata = [json.dumps({"suite": suite, "demo": i, "nested": {"a": 1}}) for i, suite in enumerate(suites)]
    lengths = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").column("length")
    table = pa.table(
        {
            "episode_index": range(count),
            "source_id": [f"raw/{i}" for i in range(count)],
            "split": ["train"] * (count - 1) + ["test"],
            "variant": [""] * count,
            "frames": lengths,
            "instruction": [f"task {i % 2}" for i in range(count)],
            "content": [f"{i:032x}" for i in range(count)],
            "metadata": metadata,
        }
    )
    pq.write_table(table, folder / "episodes.parquet")
    segments = {
        "episode_index": [0, 0],
        "start": [0, 2],
        "stop": [2, 5],
        "text": ["a", "b"],
        "task": ["", "t"],
    }
    pq.write_table(pa.table(segments), folder / "segments.parquet")


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    """`ours` of 3 episodes with everything a conversion writes, `theirs` of 2 without."""
    own_tables(write_dataset(tmp_path / "lerobot/ours", [5, 7, 9], kind="none"), ["spatial", "goal", "goal"])
    write_dataset(tmp_path / "lerobot/theirs", [4, 6], kind="none", splits={"train": "0:1", "val": "1:2"})
    run = tmp_path / "runs/libra/ours"
    (run / "checkpoints/step-000020").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"terms": {"dataset": "ours"}}))
    (run / "metrics.jsonl").write_text('{"step": 10, "loss": 2.0}\n{"step": 20, "loss": 1.5}\n{"step": 3')
    return Workspace(tmp_path)


def rows(space: Workspace, sql: str) -> list[tuple]:
    return query(space, sql).rows


def test_episodes_of_every_dataset_are_one_table(space: Workspace):
    assert rows(
        space, "SELECT dataset, episode_index, frames, seconds, split FROM episodes ORDER BY ALL"
    ) == [
        ("ours", 0, 5, 0.5, "train"),
        ("ours", 1, 7, 0.7, "train"),
        ("ours", 2, 9, 0.9, "test"),
        ("theirs", 0, 4, 0.4, "train"),
        ("theirs", 1, 6, 0.6, "val"),
    ]
    assert rows(space, "SELECT instruction, content FROM episodes WHERE dataset = 'theirs' ORDER BY 1") == [
        ("pick", None),
        ("place", None),
    ]


def test_what_a_source_recorded_is_a_column_of_its_name(space: Workspace):
    assert rows(space, "SELECT dataset, count(*) FROM episodes WHERE suite = 'goal' GROUP BY 1") == [
        ("ours", 2)
    ]
    assert rows(space, "SELECT sum(demo) FROM episodes") == [(3,)]


def test_every_table_has_the_columns_its_description_promises(space: Workspace):
    for table, (_, columns) in TABLES.items():
        found = {name: kind for name, kind, *_ in rows(space, f"DESCRIBE {table}")}
        for column in columns:
            expected = "VARCHAR" if column.type == "JSON" else column.type
            assert found[column.name] == expected, f"{table}.{column.name}"
        assert f"{table}: " in schema_text()


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_run(space: Workspace, example: str):
    assert query(space, example).names


def test_the_other_tables_say_what_lies_there(space: Workspace):
    assert rows(space, "SELECT text, stop - start FROM segments ORDER BY start") == [("a", 2), ("b", 3)]
    assert rows(space, "SELECT source_id, reason FROM dropped") == [("x", "torn")]
    assert rows(space, "SELECT dataset, source, episodes, frames FROM datasets ORDER BY 1") == [
        ("ours", "libero", 3, 21),
        ("theirs", None, 2, 10),
    ]
    assert rows(space, "SELECT task FROM tasks WHERE dataset = 'ours' ORDER BY task_index") == [
        ("pick",),
        ("place",),
    ]
    assert rows(space, "SELECT run, dataset, complete, steps FROM runs") == [("ours", "ours", False, 20)]
    assert rows(space, "SELECT step, value FROM metrics WHERE metric = 'loss' ORDER BY step") == [
        (10, 2.0),
        (20, 1.5),
    ]
    assert rows(
        space, "SELECT DISTINCT name FROM stats WHERE dataset = 'ours' AND feature = 'action' ORDER BY dim"
    ) == [
        ("x",),
        ("y",),
        ("gripper",),
    ]


def test_targets_are_listed_with_their_terms(space: Workspace):
    from dpipe.pipeline.precompute import precompute

    root = space.dataset("theirs")
    precompute(root, ["stats"], out=space.targets("theirs"))
    (row,) = rows(space, "SELECT dataset, stage, complete, episodes FROM targets")
    assert row == ("theirs", "stats", True, 2)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_text('{secret}')",
        "SELECT * FROM '{secret}'",
        "SELECT * FROM read_csv('{secret}')",
        "SELECT * FROM glob('/*')",
        "COPY (SELECT 1) TO '{out}'",
        "CREATE TABLE t AS SELECT 1",
        "DROP VIEW episodes",
        "ATTACH '{out}' AS other",
        "SET enable_external_access = true",
        "INSTALL httpfs",
        "SELECT 1; SELECT 2",
        "EXPORT DATABASE '{out}'",
        "PRAGMA disable_profiling",
        "",
    ],
)
def test_a_query_reads_no_file_and_changes_nothing(space: Workspace, tmp_path: Path, sql: str):
    secret, out = tmp_path / "secret.csv", tmp_path / "out"
    secret.write_text("a,b\n1,2\n")
    with pytest.raises(UsageError):
        query(space, sql.format(secret=secret, out=out))
    assert not out.exists()


def test_a_python_variable_is_no_table(space: Workspace):
    rows_here = pa.table({"a": [1]})
    with pytest.raises(UsageError, match="rows_here"):
        query(space, "SELECT * FROM rows_here")
    assert rows_here.num_rows == 1


def test_a_wrong_column_names_the_nearest_and_a_wrong_table_the_tables(space: Workspace):
    with pytest.raises(UsageError, match='"frames"'):
        query(space, "SELECT framess FROM episodes")
    with pytest.raises(UsageError, match="tables: episodes, segments"):
        query(space, "SELECT * FROM episode")


# --- --where --------------------------------------------------------------------------------------------------


def test_a_condition_chooses_episodes_in_order(space: Workspace):
    assert select_episodes(space.dataset("ours"), "suite = 'goal' AND frames > 5") == [1, 2]
    assert select_episodes(space.dataset("theirs"), "split = 'val'") == [1]
    assert select_episodes(space.dataset("ours"), None) is None


def test_a_condition_that_nothing_meets_says_so(space: Workspace):
    with pytest.raises(UsageError, match="no episode of ours meets it"):
        select_episodes(space.dataset("ours"), "frames > 1000")


@pytest.mark.parametrize(
    "where",
    [
        "true) OR (true",
        "true); DROP VIEW episodes; --",
        "frames > ",
        "nothing = 1",
        "frames > (SELECT",
        "1 ORDER BY 1",
    ],
)
def test_what_is_no_condition_is_refused_with_the_columns(space: Workspace, where: str):
    root = space.dataset("ours")
    if where == "true) OR (true":  # still one condition inside the brackets: it can do no more than choose
        assert select_episodes(root, where) == [0, 1, 2]
        return
    with pytest.raises(UsageError, match="--where"):
        select_episodes(root, where)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(0, 50))
def test_rows_of_a_table_are_chosen_as_python_would(frames: list[int], least: int):
    table = pa.table({"frames": frames, "split": ["train" if f % 2 else "test" for f in frames]})
    expected = [i for i, f in enumerate(frames) if f >= least and f % 2]
    assert select_rows(table, f"frames >= {least} AND split = 'train'") == expected


# --- answers --------------------------------------------------------------------------------------------------

ANSWER = Answer(
    ("name", "n", "x", "list"),
    ("VARCHAR", "BIGINT", "DOUBLE", "INTEGER[]"),
    [('a, "b"', 1, 0.5, [1, 2]), (None, 22, float("nan"), []), ("c\nd", None, 1e-9, None)],
)


def test_csv_reads_back():
    found = list(csv.DictReader(io.StringIO(answer_csv(ANSWER))))
    assert [row["name"] for row in found] == ['a, "b"', "", "c\nd"]
    assert [row["list"] for row in found] == ["[1, 2]", "[]", ""]


def test_json_is_strict():
    found = json.loads(answer_json(ANSWER), parse_constant=lambda word: pytest.fail(word))
    assert found[1] == {"name": None, "n": 22, "x": None, "list": []}


def test_a_table_is_in_line_and_says_what_it_leaves_out():
    lines = answer_table(ANSWER).splitlines()
    assert lines[0].split() == ["name", "n", "x", "list"] and lines[4].startswith("c d")
    assert lines[2].index("1") + 1 == lines[3].index("22") + 2  # numbers end in one column
    many = answer_table(Answer(("n",), ("BIGINT",), [(i,) for i in range(100)]))
    assert many.endswith("and 60 more rows: --format csv or --out shows all")


def test_the_command_writes_what_its_file_is_called(space: Workspace, tmp_path: Path):
    words = ["query", "SELECT dataset, frames FROM episodes ORDER BY ALL", "--workspace", str(space.root)]
    for ending in ("csv", "json", "parquet"):
        told = CliRunner().invoke(cli, [*words, "--out", str(tmp_path / f"a.{ending}")])
        assert told.exit_code == 0 and "5 rows" in told.output, told.output
    frames = [5, 7, 9, 4, 6]
    assert pq.read_table(tmp_path / "a.parquet").column("frames").to_pylist() == frames
    assert [row["frames"] for row in json.loads((tmp_path / "a.json").read_text())] == frames
    assert (tmp_path / "a.csv").read_text().splitlines()[1] == "ours,5"
    again = CliRunner().invoke(cli, [*words, "--out", str(tmp_path / "a.csv")])
    assert isinstance(again.exception, UsageError) and "is there already" in str(again.exception)


def test_statistics_of_a_camera_are_its_colours(tmp_path: Path):
    root = write_dataset(tmp_path / "lerobot/one", [5])
    level = np.full((3, 1, 1), 0.5).tolist()
    (root / "meta/stats.json").write_text(
        json.dumps({"observation.images.image": {"mean": level, "count": [5]}})
    )
    assert rows(Workspace(tmp_path), "SELECT dim, name, mean, count FROM stats") == [
        (0, "red", 0.5, 5),
        (1, "green", 0.5, 5),
        (2, "blue", 0.5, 5),
    ]


def test_every_command_reads_a_condition_with_one_function(space: Workspace):
    """convert and doctor ask over a catalogue, train, select and doctor over a dataset: the same words and refusal."""
    from dpipe.pipeline import catalog

    assert "rows_that_meet" in catalog.select.__code__.co_names
    assert "select_rows" in catalog.rows_that_meet.__code__.co_names
    words = ["--workspace", str(space.root), "--where", "framess > 1"]
    for command in (["select", "ours", "--name", "x"], ["doctor", "ours"]):
        told = CliRunner().invoke(cli, [*command, *words])
        assert isinstance(told.exception, UsageError) and "columns: dataset" in str(told.exception)
    refused = CliRunner().invoke(cli, ["precompute", "stats", "--dataset", "ours", *words])
    assert isinstance(refused.exception, UsageError) and "dpipe select" in str(refused.exception)


def test_training_learns_from_the_episodes_that_meet_the_condition(space: Workspace):
    pytest.importorskip("torch", reason="torch is not installed")
    from types import SimpleNamespace

    from dpipe.streams.dataset import open_dataset
    from dpipe.trainer.run import _episodes

    dataset = open_dataset(space.dataset("ours"))
    only = select_episodes(dataset.root, "suite = 'goal'")
    plain = SimpleNamespace(episodes=None)
    folds = SimpleNamespace(episodes=lambda config, contents: [i != 1 for i in range(len(contents))])
    assert _episodes(plain, None, dataset, "all", None) is None
    assert _episodes(plain, None, dataset, "all", only).tolist() == [1, 2]
    assert _episodes(folds, None, dataset, "all", only).tolist() == [2]
    with pytest.raises(UsageError, match="is left to train on"):
        _episodes(plain, None, dataset, "all", [])
