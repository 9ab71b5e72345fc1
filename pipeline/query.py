"""`dpipe query`: SQL over every dataset of a workspace, and the one condition language behind every `--where`.

Tables are DuckDB views over the datasets' own Parquet files: only the columns a query names are read. Before a
query is looked at, DuckDB loses access to every other file, to the network, to extensions and to its settings, and
one SELECT is all that runs, which cannot write. So a query from a stranger may be slow, and nothing else.

Nothing here imports pandas or pyarrow unless an answer is wanted as Parquet: a question should not wait for them.

A condition (`--where`) is what may stand behind WHERE over `episodes`: its columns, and what a source recorded of
an episode by its own name (LIBERO's `suite`, AgiBot's `task_id`).
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..schemas.errors import DataError, UsageError, unknown_name
from .workspace import Workspace

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

FORMATS = ("table", "csv", "json", "parquet")
SHOWN_ROWS = 40  # of a table on a terminal
WIDEST = 60  # letters of a cell there
METADATA_SEEN = 2_000  # episodes whose metadata tell which names a source recorded


@dataclass(frozen=True)
class Column:
    name: str
    type: str
    meaning: str
    unit: str = ""


def _columns(text: str) -> tuple[Column, ...]:
    found = []
    for line in text.strip().splitlines():
        name, kind, unit, meaning = (part.strip() for part in line.split("|"))
        found.append(Column(name, kind, meaning, unit))
    return tuple(found)


TABLES: dict[str, tuple[str, tuple[Column, ...]]] = {
    "episodes": (
        "one row an episode; further columns are what the source recorded of it",
        _columns("""
            dataset       | VARCHAR |        | name of the dataset
            episode_index | BIGINT  |        | its number there, from 0
            frames        | BIGINT  | frames | its length
            seconds       | DOUBLE  | s      | its length by the dataset's fps
            split         | VARCHAR |        | train, validation, test: as the recordings were divided
            instruction   | VARCHAR |        | what the robot was told
            source_id     | VARCHAR |        | the recording it comes from; NULL where dpipe did not convert it
            variant       | VARCHAR |        | feature set, where a source has several
            content       | VARCHAR |        | digest of its actions and states; NULL where dpipe did not convert it
            fps           | INTEGER | 1/s    | frames a second of the dataset
        """),
    ),
    "segments": (
        "one row a stretch of an episode with words of its own",
        _columns("""
            dataset       | VARCHAR |        | name of the dataset
            episode_index | BIGINT  |        | the episode it lies in
            start         | BIGINT  | frame  | first frame
            stop          | BIGINT  | frame  | frame after its last
            text          | VARCHAR |        | its words
            task          | VARCHAR |        | the source's own task or skill, '' where it has none
        """),
    ),
    "tasks": (
        "one row an instruction of a dataset",
        _columns("""
            dataset    | VARCHAR |  | name of the dataset
            task_index | BIGINT  |  | its number there
            task       | VARCHAR |  | its words
        """),
    ),
    "features": (
        "one row a column of a dataset",
        _columns("""
            dataset     | VARCHAR   |  | name of the dataset
            feature     | VARCHAR   |  | name of the column
            dtype       | VARCHAR   |  | type of its values; video or image for a camera
            shape       | INTEGER[] |  | of one frame
            names       | VARCHAR[] |  | of its dimensions
            unit        | VARCHAR   |  | NULL where not told
            frame       | VARCHAR   |  | frame of reference; NULL where not told
            description | VARCHAR   |  | NULL where not told
        """),
    ),
    "stats": (
        "one row a dimension: exact statistics over the dataset, in the column's own unit",
        _columns("""
            dataset | VARCHAR |        | name of the dataset
            feature | VARCHAR |        | name of the column
            dim     | INTEGER |        | which dimension, from 0; of a camera its colour
            name    | VARCHAR |        | the dimension's name
            min     | DOUBLE  |        | smallest
            max     | DOUBLE  |        | largest
            mean    | DOUBLE  |        | mean
            std     | DOUBLE  |        | standard deviation
            q01     | DOUBLE  |        | 1st percentile
            q10     | DOUBLE  |        | 10th percentile
            q50     | DOUBLE  |        | median
            q90     | DOUBLE  |        | 90th percentile
            q99     | DOUBLE  |        | 99th percentile
            count   | BIGINT  | frames | frames it is over
        """),
    ),
    "datasets": (
        "one row a dataset",
        _columns("""
            dataset    | VARCHAR |        | its name
            source     | VARCHAR |        | what it was converted from; NULL where dpipe did not convert it
            robot_type | VARCHAR |        | robot
            fps        | INTEGER | 1/s    | frames a second
            episodes   | BIGINT  |        | number of episodes
            frames     | BIGINT  | frames | frames of all of them
            seconds    | DOUBLE  | s      | their length
            bytes      | BIGINT  | B      | of data and video; NULL where dpipe did not convert it
            licence    | VARCHAR |        | licence
            dropped    | BIGINT  |        | recordings left out
            action     | VARCHAR |        | what an action means
            path       | VARCHAR |        | folder
        """),
    ),
    "dropped": (
        "one row a recording that was left out",
        _columns("""
            dataset   | VARCHAR |  | name of the dataset
            source_id | VARCHAR |  | the recording
            split     | VARCHAR |  | its split
            reason    | VARCHAR |  | what is wrong with it
            remedy    | VARCHAR |  | what would mend it
        """),
    ),
    "targets": (
        "one row a precomputed target",
        _columns("""
            dataset        | VARCHAR |        | name of the dataset
            stage          | VARCHAR |        | tokens, foresight, residuals, ...
            variant        | VARCHAR |        | folder of this one
            complete       | BOOLEAN |        | whether it is finished
            episodes       | BIGINT  |        | episodes it holds
            frames         | BIGINT  | frames | frames of them
            bytes          | BIGINT  | B      | of its arrays
            model          | VARCHAR |        | model it comes from, '' where none
            camera         | VARCHAR |        | camera it saw, '' where none
            horizon_frames | BIGINT  | frames | its chunk, 0 where none
            normaliser     | VARCHAR |        | digest of its normaliser
            params         | JSON    |        | options of the stage
            path           | VARCHAR |        | folder
        """),
    ),
    "runs": (
        "one row a training run",
        _columns("""
            recipe     | VARCHAR |   | libra, vita, dial, anchorrefine, pfd
            run        | VARCHAR |   | its name
            dataset    | VARCHAR |   | dataset it learnt from
            complete   | BOOLEAN |   | whether it is finished
            steps      | BIGINT  |   | optimizer steps; so far, where not finished
            seconds    | DOUBLE  | s | time it took
            checkpoint | VARCHAR |   | name of its last checkpoint
            path       | VARCHAR |   | folder
        """),
    ),
    "metrics": (
        "one row a figure that a run logged",
        _columns("""
            recipe | VARCHAR |  | recipe of the run
            run    | VARCHAR |  | its name
            step   | BIGINT  |  | optimizer step
            metric | VARCHAR |  | loss, accuracy, samples_per_second, data_wait, ...
            value  | DOUBLE  |  | its value there
        """),
    ),
}

EXAMPLES = (
    "SELECT dataset, split, count(*) AS episodes, sum(seconds) / 3600 AS hours FROM episodes GROUP BY ALL",
    "SELECT instruction, count(*) AS n FROM episodes WHERE frames > 50 GROUP BY 1 ORDER BY n DESC LIMIT 10",
    "SELECT dataset, name, q01, q99 FROM stats WHERE feature = 'action'",
    "SELECT run, max(step) AS step, arg_max(value, step) AS loss FROM metrics WHERE metric = 'loss' GROUP BY run",
)

# --- asking ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """Rows of one SELECT, with the names and DuckDB types of their columns."""

    names: tuple[str, ...]
    types: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def to_dicts(self) -> list[dict[str, Any]]:
        return [dict(zip(self.names, row, strict=True)) for row in self.rows]


def query(space: Workspace, sql: str, roots: Sequence[Path] = ()) -> Answer:
    """The answer to one SELECT over the datasets given, or over everything in the workspace."""
    return _run(open_views(space, roots), sql)


def select_episodes(root: Path, where: str | None) -> list[int] | None:
    """Numbers of the episodes of a dataset that meet a condition, in order; None where there is no condition."""
    if not where:
        return None
    connection = _connect()
    files = _episodes(connection, [root])
    _lock(connection, files)
    found = evaluate(connection, where, "episode_index")
    if not found:
        raise UsageError(f"--where {where}: no episode of {root.name} meets it")
    return found


def select_rows(episodes: pa.Table, where: str) -> list[int]:
    """Which rows of a table of episodes in memory meet a condition, in order."""
    import numpy as np
    import pyarrow as pa

    connection = _connect()
    if "row" not in episodes.column_names:
        episodes = episodes.append_column("row", pa.array(np.arange(len(episodes))))
    connection.register("episodes", episodes)
    _lock(connection, [])
    return evaluate(connection, where, "row")


def evaluate(connection: duckdb.DuckDBPyConnection, where: str, key: str) -> list[int]:
    """`key` of the rows of `episodes` that meet `where`; UsageError with the columns where it cannot be read."""
    import duckdb

    try:
        # One expression: a condition that closes the bracket to add a statement of its own does not parse.
        statements = connection.extract_statements(f"SELECT {key} FROM episodes WHERE ({where}\n) ORDER BY 1")
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise UsageError(
                f"--where {where}: expected one condition, e.g. \"frames > 50 AND split = 'train'\""
            )
        return [int(row[0]) for row in connection.execute(statements[0]).fetchall()]
    except duckdb.Error as error:
        names = [row[0] for row in connection.execute("DESCRIBE episodes").fetchall()]
        raise UsageError(
            f"--where cannot be evaluated: {_first_line(error)}\n"
            f"  columns: {', '.join(name for name in names if name != 'row')}"
        ) from error


def open_views(space: Workspace, roots: Sequence[Path] = ()) -> duckdb.DuckDBPyConnection:
    """A connection that sees the tables of TABLES and nothing else."""
    connection = _connect()
    chosen = list(roots) or [root for root in space.datasets() if _is_finished(root)]
    files = _episodes(connection, chosen)
    files += _segments(connection, chosen)
    makers: dict[str, tuple[Any, Sequence[Path]]] = {
        "tasks": (_tasks, chosen),
        "features": (_features, chosen),
        "stats": (_stats, chosen),
        "datasets": (_datasets, chosen),
        "dropped": (_dropped, chosen),
        "targets": (lambda root: _targets(space, root), chosen),
        "runs": (_runs, [space.root]),
        "metrics": (_metrics, [space.root]),
    }
    for table, (rows_of, places) in makers.items():
        _fill(connection, table, table, [row for place in places for row in rows_of(place)])
    _lock(connection, files)
    return connection


def _run(connection: duckdb.DuckDBPyConnection, sql: str) -> Answer:
    import duckdb

    try:
        statements = connection.extract_statements(sql)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            found = ", ".join(statement.type.name for statement in statements) or "nothing"
            raise UsageError(f"a query is one SELECT: nothing here can be changed\n  found: {found}")
        done = connection.execute(statements[0])
        told = done.description or []
        return Answer(
            tuple(str(column[0]) for column in told), tuple(str(c[1]) for c in told), done.fetchall()
        )
    except duckdb.Error as error:
        raise UsageError(
            f"{_first_line(error)}\n  tables: {', '.join(TABLES)}\n  columns:  dpipe query --schema"
        ) from error


def _connect() -> duckdb.DuckDBPyConnection:
    import duckdb

    return duckdb.connect(config={"python_enable_replacements": False, "allow_community_extensions": False})


def _lock(connection: duckdb.DuckDBPyConnection, files: Sequence[Path]) -> None:
    """No file but those of the views, no network, no extensions, and no way back."""
    allowed = ", ".join(_quoted(str(path)) for path in files)
    for setting in (
        f"allowed_paths = [{allowed}]",
        "autoinstall_known_extensions = false",
        "autoload_known_extensions = false",
        "enable_external_access = false",
        "lock_configuration = true",
    ):
        connection.execute(f"SET {setting}")


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    near = next((line.strip() for line in lines[1:] if line.startswith(("Candidate", "Did you mean"))), "")
    return f"{lines[0]}  {near}".strip() if lines else type(error).__name__


# --- views ----------------------------------------------------------------------------------------------------


def _is_finished(root: Path) -> bool:
    unfinished = (root / "dpipe" / "journal").is_dir() and not (root / "dpipe" / "manifest.json").is_file()
    return (root / "meta" / "info.json").is_file() and not unfinished


def _episodes(connection: duckdb.DuckDBPyConnection, roots: Sequence[Path]) -> list[Path]:
    """Makes the view `episodes`: dpipe/episodes.parquet of datasets of ours, meta/episodes of others; their files."""
    import duckdb

    parts, files = [], []
    for root in roots:
        info = _read_json(root / "meta" / "info.json")
        fps = int(info.get("fps", 0)) or 1
        own = root / "dpipe" / "episodes.parquet"
        mine = [own] if own.is_file() else sorted((root / "meta" / "episodes").glob("*/*.parquet"))
        if not mine:
            raise DataError(f"{root} has no episodes\n  expected: {root / 'meta/episodes'}")
        mine = [path.resolve() for path in mine]
        files += mine
        source = _parquet(mine)
        try:
            have = {row[0] for row in connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()}
            recorded = _metadata_names(connection, source) if "metadata" in have else []
        except duckdb.Error as error:
            raise DataError(f"episodes of {root} cannot be read\n  found: {_first_line(error)}") from error
        frames = "frames" if "frames" in have else "length"
        told = {
            "dataset": _quoted(_name_of(root)),
            "episode_index": "episode_index",
            "frames": frames,
            "seconds": f"{frames} / {fps}::DOUBLE",
            "split": "split" if "split" in have else _split_case(info),
            "instruction": "instruction" if "instruction" in have else "tasks[1]",
            "source_id": "source_id" if "source_id" in have else "NULL::VARCHAR",
            "variant": "variant" if "variant" in have else "''",
            "content": "content" if "content" in have else "NULL::VARCHAR",
            "fps": str(fps),
        }
        taken = set(told)
        for key, kind in recorded:
            if key not in taken and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
                told[key] = f"json_extract_string(metadata, '$.{key}')::{kind}"
        chosen = ", ".join(f'{expression} AS "{column}"' for column, expression in told.items())
        parts.append(f"SELECT {chosen} FROM {source}")
    if not parts:
        _fill(connection, "_episodes", "episodes", [])
        parts = ["SELECT * FROM _episodes"]
    connection.execute(f"CREATE VIEW episodes AS {' UNION ALL BY NAME '.join(parts)}")
    return files


def _segments(connection: duckdb.DuckDBPyConnection, roots: Sequence[Path]) -> list[Path]:
    _fill(connection, "_segments", "segments", [])
    parts, files = ["SELECT * FROM _segments"], []
    names = ", ".join(column.name for column in TABLES["segments"][1] if column.name != "dataset")
    for root in roots:
        path = (root / "dpipe" / "segments.parquet").resolve()
        if path.is_file():
            files.append(path)
            parts.append(f"SELECT {_quoted(_name_of(root))} AS dataset, {names} FROM {_parquet([path])}")
    connection.execute(f"CREATE VIEW segments AS {' UNION ALL BY NAME '.join(parts)}")
    return files


def _parquet(files: Sequence[Path]) -> str:
    return f"read_parquet([{', '.join(_quoted(str(path)) for path in files)}], union_by_name = true)"


def _metadata_names(connection: duckdb.DuckDBPyConnection, source: str) -> list[tuple[str, str]]:
    """What a source recorded of its episodes, with types, from the first of them: plain values only."""
    kinds: dict[str, set[str]] = {}
    for (value,) in connection.execute(f"SELECT metadata FROM {source} LIMIT {METADATA_SEEN}").fetchall():
        for key, entry in (json.loads(value) if value else {}).items():
            word = {bool: "BOOLEAN", int: "BIGINT", float: "DOUBLE", str: "VARCHAR"}.get(type(entry))
            if word:
                kinds.setdefault(key, set()).add(word)
    return [
        (key, next(iter(k)) if len(k) == 1 else "DOUBLE" if k <= {"BIGINT", "DOUBLE"} else "VARCHAR")
        for key, k in sorted(kinds.items())
    ]


def _split_case(info: Mapping[str, Any]) -> str:
    """The split of an episode by the ranges in info.json, each "first:stop" or several with commas."""
    cases = []
    for split, ranges in (info.get("splits") or {}).items():
        for span in str(ranges).split(","):
            first, _, stop = span.partition(":")
            if first.strip().isdigit() and stop.strip().isdigit():
                cases.append(
                    f"WHEN episode_index >= {int(first)} AND episode_index < {int(stop)} THEN {_quoted(str(split))}"
                )
    return f"CASE {' '.join(cases)} END" if cases else "NULL::VARCHAR"


def _fill(
    connection: duckdb.DuckDBPyConnection, name: str, table: str, rows: Sequence[Mapping[str, Any]]
) -> None:
    """A small table of its own: rows travel as one JSON text, which needs neither pandas nor pyarrow."""
    columns = TABLES[table][1]
    types = ", ".join(f'"{c.name}" {"VARCHAR" if c.type == "JSON" else c.type}' for c in columns)
    connection.execute(f"CREATE TABLE {name} ({types})")
    if not rows:
        return
    form = json.dumps([{c.name: "VARCHAR" if c.type == "JSON" else c.type for c in columns}])
    plain_rows = [{c.name: _plain(row.get(c.name)) for c in columns} for row in rows]
    connection.execute(
        f"INSERT INTO {name} SELECT unnest(from_json(?::JSON, {_quoted(form)}), recursive := true)",
        [json.dumps(plain_rows)],
    )


# --- small tables ---------------------------------------------------------------------------------------------


def _name_of(root: Path) -> str:
    return root.resolve().name


def _tasks(root: Path) -> Iterator[dict[str, Any]]:
    """By position, as lerobot finds a sentence; its column is called after pandas' index by careless writers."""
    import duckdb

    path = root / "meta" / "tasks.parquet"
    if not path.is_file():
        return
    try:
        found = duckdb.connect().execute(f"SELECT * FROM {_parquet([path.resolve()])}")
        names = [column[0] for column in found.description or []]
        rows = found.fetchall()
    except duckdb.Error as error:
        raise DataError(f"{path} cannot be read\n  found: {_first_line(error)}") from error
    text = next((n for n in ("task", "__index_level_0__") if n in names), None)
    for position, row in enumerate(rows):
        told = dict(zip(names, row, strict=True))
        yield {
            "dataset": _name_of(root),
            "task_index": told.get("task_index", position),
            "task": told.get(text) if text else None,
        }


def _features(root: Path) -> Iterator[dict[str, Any]]:
    info = _read_json(root / "meta" / "info.json")
    body = _manifest(root).get("embodiment", {})
    told = {**body.get("features", {}), **body.get("sidecar", {})}
    features = {**info.get("features", {})}
    features |= {
        name: {"dtype": each["dtype"], "shape": [len(each["names"])], "names": each["names"]}
        for name, each in body.get("sidecar", {}).items()
    }
    for name, each in features.items():
        more = told.get(name, {})
        names = each.get("names")
        yield {
            "dataset": _name_of(root),
            "feature": name,
            "dtype": each.get("dtype"),
            "shape": [int(n) for n in each.get("shape", [])],
            "names": [str(n) for n in names] if isinstance(names, list) else None,
            "unit": more.get("unit") or None,
            "frame": more.get("frame") or None,
            "description": more.get("description") or None,
        }


def _stats(root: Path) -> Iterator[dict[str, Any]]:
    import numpy as np

    features = _read_json(root / "meta" / "info.json").get("features", {})
    path = root / "meta" / "stats.json"
    for feature, told in (_read_json(path) if path.is_file() else {}).items():
        values = {n: np.asarray(v, np.float64).reshape(-1) for n, v in told.items() if v is not None}
        count = values.pop("count", np.zeros(1))
        names = features.get(feature, {}).get("names")
        camera = features.get(feature, {}).get("dtype") in ("video", "image")
        dims = max((len(v) for v in values.values()), default=0)
        labels = ["red", "green", "blue"] if camera else names if isinstance(names, list) else []
        for dim in range(dims):
            yield {
                "dataset": _name_of(root),
                "feature": feature,
                "dim": dim,
                "name": str(labels[dim]) if dim < len(labels) else feature,
                **{n: float(v[dim]) for n, v in values.items() if dim < len(v) and n in _STATISTICS},
                "count": int(count[0]),
            }


_STATISTICS = {column.name for column in TABLES["stats"][1]}


def _datasets(root: Path) -> Iterator[dict[str, Any]]:
    info, manifest = _read_json(root / "meta" / "info.json"), _manifest(root)
    fps = int(info.get("fps", 0)) or 1
    frames = int(info.get("total_frames", 0))
    yield {
        "dataset": _name_of(root),
        "source": manifest.get("source"),
        "robot_type": info.get("robot_type"),
        "fps": fps,
        "episodes": int(info.get("total_episodes", 0)),
        "frames": frames,
        "seconds": frames / fps,
        "bytes": manifest.get("totals", {}).get("bytes"),
        "licence": manifest.get("licence"),
        "dropped": manifest.get("dropped"),
        "action": manifest.get("conventions", {}).get("action"),
        "path": str(root),
    }


def _dropped(root: Path) -> Iterator[dict[str, Any]]:
    from .facts import read_dropped

    for each in read_dropped(root):
        yield {
            "dataset": _name_of(root),
            "source_id": each.source_id,
            "split": each.split,
            "reason": each.reason,
            "remedy": each.remedy,
        }


def _targets(space: Workspace, root: Path) -> Iterator[dict[str, Any]]:
    for base in (root / "dpipe" / "targets", space.targets(_name_of(root))):
        for folder in sorted(base.glob("*/*")) if base.is_dir() else []:
            path = folder / "contract.json"
            done = _read_json(path) if path.is_file() else {}
            terms = done.get("contract", {})
            yield {
                "dataset": _name_of(root),
                "stage": folder.parent.name,
                "variant": folder.name,
                "complete": bool(done),
                "episodes": done.get("episodes"),
                "frames": done.get("frames"),
                "bytes": done.get("bytes"),
                "model": terms.get("model"),
                "camera": terms.get("camera"),
                "horizon_frames": terms.get("horizon_frames"),
                "normaliser": terms.get("normaliser"),
                "params": json.dumps(terms.get("params", {})),
                "path": str(folder),
            }


def _run_folders(root: Path) -> Iterable[Path]:
    return [path.parent for path in sorted((root / "runs").glob("*/*/config.json"))]


def _runs(root: Path) -> Iterator[dict[str, Any]]:
    for folder in _run_folders(root):
        config = _read_json(folder / "config.json")
        path = folder / "result.json"
        result = _read_json(path) if path.is_file() else {}
        saved = sorted(p.name for p in (folder / "checkpoints").glob("step-*"))
        terms = config.get("terms", {})
        steps = result.get("steps")
        if steps is None and saved:
            steps = int(saved[-1].removeprefix("step-"))
        dataset = config.get("dataset") or terms.get("dataset")
        if isinstance(dataset, Mapping):
            dataset = dataset.get("name") or dataset.get("root")
        yield {
            "recipe": folder.parent.name,
            "run": folder.name,
            "dataset": str(dataset) if dataset else None,
            "complete": bool(result),
            "steps": steps,
            "seconds": result.get("seconds"),
            "checkpoint": result.get("checkpoint") or (saved[-1] if saved else None),
            "path": str(folder),
        }


def _metrics(root: Path) -> Iterator[dict[str, Any]]:
    for folder in _run_folders(root):
        path = folder / "metrics.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                row = json.loads(line)
            except ValueError:  # still being written
                continue
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                    yield {
                        "recipe": folder.parent.name,
                        "run": folder.name,
                        "step": int(row.get("step", -1)),
                        "metric": name,
                        "value": float(value),
                    }


def _manifest(root: Path) -> dict[str, Any]:
    path = root / "dpipe" / "manifest.json"
    return _read_json(path) if path.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read\n  found: {_first_line(error)}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is {type(found).__name__}, expected an object")
    return found


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


# --- answering ------------------------------------------------------------------------------------------------


def write_answer(answer: Answer, form: str, out: Path | None) -> str:
    """The answer as text for a terminal (table, csv, json), or "" where it went into `out`."""
    if form not in FORMATS:
        raise unknown_name("format", form, FORMATS)
    if out is not None and out.exists():
        raise UsageError(f"{out} is there already; choose another name with --out")
    if form == "parquet":
        if out is None:
            raise UsageError("--format parquet needs a file:  --out answer.parquet")
        _write(out, answer_parquet(answer))
        return ""
    text = {"table": answer_table, "csv": answer_csv, "json": answer_json}[form](answer)
    if out is None:
        return text
    _write(out, (text + "\n").encode())
    return ""


def _write(path: Path, data: bytes) -> None:
    from .durable import write_file

    write_file(path, data)


def answer_parquet(answer: Answer) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(zip(*answer.rows, strict=True)) or [()] * len(answer.names)
    buffer = io.BytesIO()
    arrays = [pa.array(column) for column in columns]
    pq.write_table(pa.Table.from_arrays(arrays, names=list(answer.names)), buffer)
    return buffer.getvalue()


def answer_json(answer: Answer) -> str:
    """A list with one object a row; numbers that are none become null."""
    rows = [{name: _plain(value) for name, value in row.items()} for row in answer.to_dicts()]
    return json.dumps(rows, ensure_ascii=False)


def answer_csv(answer: Answer) -> str:
    import csv

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(answer.names)
    for row in answer.rows:
        writer.writerow(
            ["" if v is None else json.dumps(v) if isinstance(v, list | dict) else v for v in row]
        )
    return buffer.getvalue().rstrip("\n")


def answer_table(answer: Answer) -> str:
    """Columns in line, numbers to the right; long cells and long answers are cut, and say so."""
    names = answer.names
    rows = [[_cell(value) for value in row] for row in answer.rows[:SHOWN_ROWS]]
    right = [_NUMBER.match(kind) is not None for kind in answer.types]
    widths = [max([len(name), *(len(row[i]) for row in rows)]) for i, name in enumerate(names)]

    def line(cells: Sequence[str]) -> str:
        placed = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
        return "  ".join(placed).rstrip()

    lines = [line(names), "  ".join("-" * w for w in widths), *map(line, rows)]
    more = len(answer.rows) - len(rows)
    if more > 0:
        lines.append(f"and {more:,} more rows: --format csv or --out shows all")
    return "\n".join(lines)


_NUMBER = re.compile(r"U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?$|DOUBLE|FLOAT|DECIMAL|NUMBER")


def schema_text() -> str:
    """Every table, its columns, types and units, and queries to begin with."""
    lines = []
    for table, (meaning, columns) in TABLES.items():
        lines += [f"{table}: {meaning}"]
        for column in columns:
            unit = f" [{column.unit}]" if column.unit else ""
            lines.append(f"    {column.name:15s} {column.type:10s} {column.meaning}{unit}")
        lines.append("")
    lines += ["Try:", *(f'    dpipe query "{example}"' for example in EXAMPLES)]
    return "\n".join(lines)


def schema_json() -> dict[str, Any]:
    return {
        "tables": {
            table: {"meaning": meaning, "columns": [vars(column) for column in columns]}
            for table, (meaning, columns) in TABLES.items()
        },
        "examples": list(EXAMPLES),
    }


def _plain(value: Any) -> Any:
    if (isinstance(value, float) and value != value) or value in (float("inf"), float("-inf")):
        return None
    if isinstance(value, str | int | float | bool | type(None)):
        return value
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    number = getattr(value, "__float__", None)
    return float(value) if number is not None else str(value)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    text = " ".join(str(value).split())
    return text if len(text) <= WIDEST else text[: WIDEST - 3] + "..."
