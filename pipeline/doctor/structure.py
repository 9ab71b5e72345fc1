"""meta/ and the listing of files: whether a reader finds what it looks for, where it looks for it.

Everything here is metadata, and of constant cost an episode: `--fast` runs these checks alone.
Source of the rules: lerobot 0.6.1, `datasets/{dataset_metadata,dataset_reader,io_utils,feature_utils}.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ...schemas.features import DEFAULT_FEATURES
from ...schemas.problems import ERROR, NOTE, WARN
from .checks import TABLES, Findings, Found, check
from .subject import Subject, feature_trouble, is_there, numbers_of, template_trouble

REQUIRED_STATISTICS = ("min", "max", "mean", "std", "count")
QUANTILES = ("q01", "q10", "q50", "q90", "q99")
PLACEHOLDERS = re.compile(
    r"(default|none|null|nan|todo|tbd|test|task|dummy|unknown|n/?a|instruction|language_instruction|\d+|[\W_]+)",
    re.I,
)
LONGEST_INSTRUCTION = 1000  # characters; policies cut at some 50 to 200 tokens


@check("unreadable", TABLES)
def metadata_can_be_read(subject: Subject) -> Findings:
    """info.json, tasks and episodes are there and whole; each file is told once."""
    _ = subject.info, subject.stats, subject.manifest, subject.tasks_table, subject.numbers
    for path, why in subject.broken.items():
        missing = not is_there(path)
        yield Found(subject.name_of(path), why, problem="missing-file" if missing else "unreadable")
    if not subject.episode_files:
        yield Found("meta/episodes", "no table of episodes", problem="missing-file")


@check("info", TABLES)
def info_says_what_readers_need(subject: Subject) -> Findings:
    info = subject.info
    if info is None:
        return
    for name in ("codebase_version", "fps", "features"):
        if name not in info:
            yield Found("meta/info.json", f"no entry '{name}'")
    if "fps" in info and not subject.fps:
        yield Found("meta/info.json", f"fps is {info['fps']!r}, expected a whole number above 0")
    if "features" in info and not isinstance(info["features"], dict):
        yield Found("meta/info.json", f"features is {type(info['features']).__name__}, expected an object")
    for name in ("data_path", "video_path"):
        trouble = template_trouble(info[name]) if info.get(name) is not None else None
        if trouble:
            yield Found(
                "meta/info.json", f"{name} {trouble}", problem="refused" if "refused" in trouble else ""
            )
    if subject.videos and info.get("video_path") is None:
        yield Found("meta/info.json", "video_path is missing, although cameras are stored as video")


@check("format-version", TABLES)
def version_is_three(subject: Subject) -> Findings:
    version = str((subject.info or {}).get("codebase_version", "v3.0"))
    if not version.startswith("v3."):
        yield Found("meta/info.json", f"codebase_version is {version}, expected v3.0")
    storage = (subject.info or {}).get("storage_format", "parquet")
    if storage != "parquet":
        yield Found("meta/info.json", f"storage_format is {storage}, expected Parquet and MP4")


@check("features", TABLES)
def features_are_described(subject: Subject) -> Findings:
    declared = (subject.info or {}).get("features")
    if not isinstance(declared, dict):
        return
    for name, told in declared.items():
        trouble = feature_trouble(told)
        if trouble:
            yield Found(f"meta/info.json, '{name}'", trouble)
            continue
        if "/" in name:
            yield Found(f"meta/info.json, '{name}'", "the name holds a '/', which lerobot refuses")
        if "image" in name and told["dtype"] not in ("video", "image", "string", "language"):
            yield Found(
                f"meta/info.json, '{name}'",
                "a vector's name holds the word 'image': lerobot demands statistics shaped as a picture's of it",
            )
        if name in DEFAULT_FEATURES and told["dtype"] != DEFAULT_FEATURES[name]["dtype"]:
            yield Found(
                f"meta/info.json, '{name}'", f"is {told['dtype']}, expected {DEFAULT_FEATURES[name]['dtype']}"
            )
        shape, names = told["shape"], told.get("names")
        if isinstance(names, list) and told["dtype"] not in ("video", "image") and len(shape) == 1:
            grouped = len(names) == 1 or any(isinstance(entry, list | dict) for entry in names)
            if len(names) != shape[0] and not grouped:  # one name for a whole vector is common
                yield Found(f"meta/info.json, '{name}'", f"{len(names)} names for {shape[0]} dimensions")
            elif len(set(map(str, names))) < len(names):
                twice = next(entry for entry, count in Counter(map(str, names)).items() if count > 1)
                yield Found(f"meta/info.json, '{name}'", f"two dimensions are called '{twice}'")
    for name in DEFAULT_FEATURES:
        if name not in declared:
            yield Found("meta/info.json", f"'{name}' is not declared; lerobot adds it to every dataset")


@check("feature-names", TABLES)
def names_serve_relative_actions(subject: Subject) -> Findings:
    """Names as lerobot's RelativeActionsProcessorStep reads them: `list(names)`, position by position."""
    declared = (subject.info or {}).get("features")
    if not isinstance(declared, dict):
        return
    told = declared.get("action")
    names = told.get("names") if isinstance(told, dict) else None
    nested = isinstance(names, dict) or (
        isinstance(names, list) and any(isinstance(entry, list | dict) for entry in names)
    )
    if nested and "gripper" in str(names).lower():
        yield Found(
            "meta/info.json, 'action'",
            f"names are nested ({str(names)[:80]}): lerobot takes the groups for names, so that no gripper is spared",
        )
    action, state = subject.names("action"), subject.names("observation.state")
    if action and state:
        for i, name in enumerate(action):
            spared = "gripper" in name.lower()
            if not spared and name in state and state.index(name) != i:
                yield Found(
                    "meta/info.json",
                    f"'{name}' is dimension {i} of action but {state.index(name)} of observation.state",
                )
                break


@check("feature-role", TABLES)
def prefixes_mean_what_they_say(subject: Subject) -> Findings:
    for name in subject.vectors:
        if name.startswith("action") and name != "action" and "action" in subject.features:
            yield Found(f"meta/info.json, '{name}'", "becomes a second output of every policy, by its prefix")


@check("totals", TABLES)
def totals_are_sums(subject: Subject) -> Findings:
    info = subject.info or {}
    if not subject.episode_files or "length" not in subject.numbers:
        return
    found = {"total_episodes": len(subject), "total_frames": int(subject.lengths.sum())}
    if subject.tasks_table is not None:
        found["total_tasks"] = len(subject.tasks)
    for name, number in found.items():
        if name in info and info[name] != number:
            yield Found("meta/info.json", f"{name} is {info[name]}, the tables hold {number}")


@check("splits", TABLES)
def splits_are_ranges(subject: Subject) -> Findings:
    splits = subject.splits
    if splits is None:
        declared = (subject.info or {}).get("splits")
        yield Found(
            "meta/info.json", f"splits are {str(declared)[:120]}, expected ranges such as '0:{len(subject)}'"
        )
        return
    if "length" not in subject.numbers:
        return
    count, seen = len(subject), np.zeros(len(subject), np.int64)
    for name, ranges in splits.items():
        for first, stop in ranges:
            if not 0 <= first <= stop <= count:
                yield Found("meta/info.json", f"split '{name}' is {first}:{stop}, there are {count} episodes")
            seen[first:stop] += 1
    if (seen > 1).any():
        yield Found("meta/info.json", f"episode {int(np.flatnonzero(seen > 1)[0])} lies in two splits")
    elif (seen == 0).any() and splits:
        lost = int((seen == 0).sum())
        yield Found("meta/info.json", f"{lost} of {count} episodes are in no split", WARN)
    column = subject.text_column("split")
    if column is not None and not (seen > 1).any():
        own = np.array([entry or "" for entry in column.to_pylist()], "U32")
        wrong = np.flatnonzero((own != subject.split_of) & (subject.split_of != ""))
        if len(wrong):
            e = int(wrong[0])
            yield Found(
                "meta/episodes",
                f"{len(wrong)} episodes are in another split than meta/info.json says, first episode {e}: "
                f"'{own[e]}' and '{subject.split_of[e]}'",
            )


@check("tasks", TABLES)
def tasks_are_found_by_row(subject: Subject) -> Findings:
    """`tasks.iloc[task_index].name`: rows in order, and the sentence as pandas index."""
    table = subject.tasks_table
    if table is None:
        return
    names = table.column_names
    if "task_index" not in names or not ({"task", "__index_level_0__"} & set(names)):
        yield Found("meta/tasks.parquet", f"columns are {', '.join(names)}; expected task_index and task")
        return
    order = table.column("task_index").to_pylist()
    wrong = [row for row, index in enumerate(order) if row != index]
    if wrong:
        yield Found(
            "meta/tasks.parquet", f"row {wrong[0]} is task {order[wrong[0]]}; readers take it for {wrong[0]}"
        )
    metadata = (table.schema.metadata or {}).get(b"pandas", b"{}")
    if b'"task"' not in metadata and b'"__index_level_0__"' not in metadata:
        yield Found(
            "meta/tasks.parquet", "the sentence is no pandas index: lerobot returns the number 0 as the task"
        )


@check("instruction", TABLES)
def instructions_are_sentences(subject: Subject) -> Findings:
    yield from odd_instructions(subject.tasks, "meta/tasks.parquet")


def odd_instructions(tasks: list, where: str) -> Findings:
    """What no robot can be told: nothing, placeholders, markup, control characters, one sentence spelt twice."""
    spelt: dict[str, str] = {}
    for task in tasks:
        if not isinstance(task, str):
            yield Found(
                where, f"an instruction is {type(task).__name__} ({task!r}), expected a sentence", ERROR
            )
            continue
        shown = repr(task if len(task) <= 60 else task[:57] + "...")
        if not task.strip():
            yield Found(where, "an instruction is empty", ERROR)
            continue
        if PLACEHOLDERS.fullmatch(task.strip()):
            yield Found(where, f"{shown} is a placeholder, not an instruction")
        elif task != task.strip() or "  " in task:
            yield Found(where, f"{shown} has spaces to spare: it is another sentence than without them")
        if any(ord(character) < 32 or ord(character) == 127 for character in task):
            yield Found(where, f"{shown} holds line breaks or control characters")
        if re.search(r"<\s*/?\s*[a-zA-Z!][^>]*>", task):
            yield Found(where, f"{shown} holds markup")
        if "\ufffd" in task:
            yield Found(where, f"{shown} was decoded wrongly: it holds the replacement character")
        if len(task) > LONGEST_INSTRUCTION:
            yield Found(where, f"{shown} has {len(task)} characters")
        plain = re.sub(r"[\W_]+", " ", task).strip().lower()
        other = spelt.setdefault(plain, task)
        if other != task:
            yield Found(where, f"{other!r} and {shown} are one instruction, spelt twice")


@check("episodes", TABLES)
def episodes_are_rows(subject: Subject) -> Findings:
    """Row e of meta/episodes is episode e, and names its files by numbers."""
    for why in subject.unusable.values():
        yield Found("meta/episodes", why)
    index = subject.numbers.get("episode_index")
    if index is not None:
        wrong = np.flatnonzero(index != np.arange(len(index)))
        if len(wrong):
            yield Found(
                "meta/episodes",
                f"row {wrong[0]} is episode {index[wrong[0]]}: every later row is taken for another episode's",
            )
    length = subject.numbers.get("length")
    if length is not None:
        for e in np.flatnonzero((length < 1) | (length > 1 << 40))[:3]:
            yield Found("meta/episodes", f"episode {e} has {length[e]} frames")
        if not len(length):
            yield Found("meta/episodes", "no episode")


@check("episode-range", TABLES)
def ranges_follow_one_another(subject: Subject) -> Findings:
    first, stop = subject.numbers.get("dataset_from_index"), subject.numbers.get("dataset_to_index")
    if "length" not in subject.numbers:
        return
    expected = subject.first_index
    if first is not None and len(first) == len(expected):
        wrong = np.flatnonzero(first != expected)
        if len(wrong):
            e = int(wrong[0])
            yield Found(
                "meta/episodes",
                f"episode {e} begins at index {first[e]}, the one before ends at {expected[e]}",
            )
    if first is not None and stop is not None and len(first) == len(stop) == len(expected):
        wrong = np.flatnonzero(stop - first != subject.lengths)
        if len(wrong):
            e = int(wrong[0])
            yield Found(
                "meta/episodes",
                f"episode {e} spans {first[e]} to {stop[e]}, {stop[e] - first[e]} frames; its length is "
                f"{subject.lengths[e]}",
            )


@check("episode-length", TABLES)
def episodes_have_frames_to_learn_from(subject: Subject) -> Findings:
    short = np.flatnonzero(subject.numbers.get("length", np.zeros(0)) == 1)
    if len(short):
        yield Found(
            "meta/episodes", f"{len(short)} episodes of a single frame, first episode {short[0]}", NOTE
        )


@check("episode-tasks", TABLES)
def tasks_of_episodes_are_known(subject: Subject) -> Findings:
    import pyarrow as pa
    import pyarrow.compute

    pc: Any = pyarrow.compute  # its functions are made at run time
    column = subject.text_column("tasks")
    if column is None:
        if subject.episode_files and subject.numbers:
            yield Found("meta/episodes", "no column 'tasks'")
        return
    if not subject.tasks:
        return
    flat = (
        pc.list_flatten(column)
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        else column
    )
    for text in sorted(set(map(str, flat.unique().to_pylist())) - set(map(str, subject.tasks)))[:3]:
        yield Found("meta/episodes", f"'{text[:60]}' is not in meta/tasks.parquet")
    if flat is not column:
        none = np.flatnonzero(numbers_of(pc.list_value_length(column)) == 0)
        if len(none):
            yield Found("meta/episodes", f"episode {none[0]} has no task")
    unused = set(map(str, subject.tasks)) - set(map(str, flat.unique().to_pylist()))
    if unused:
        yield Found("meta/tasks.parquet", f"{len(unused)} tasks of no episode", NOTE)


@check("missing-file", TABLES)
def files_are_there(subject: Subject) -> Findings:
    sizes = subject.listed
    for place in [
        *subject.data_places,
        *(p for camera in subject.videos for p in subject.video_places(camera)),
    ]:
        size = sizes.get(place.name, -1)
        if size <= 0 and place.path not in subject.broken:
            episodes = f"{len(place.episodes)} episodes from {place.episodes[0]}"
            what = "no such file" if size < 0 else "an empty file"
            yield Found(place.name, f"{what}; expected {episodes}")
    if subject.features and not (subject.root / "meta" / "stats.json").is_file():
        yield Found("meta/stats.json", "no such file: policies cannot normalise", problem="statistics")


@check("stray-file", TABLES)
def no_file_is_unaccounted_for(subject: Subject) -> Findings:
    """Files no table names. lerobot joins every Parquet file two folders below data/, so those are worse."""
    if not subject.data_places or not subject.features:
        return  # which files are named cannot be told
    named = {place.name for place in subject.data_places} | set(map(subject.name_of, subject.episode_files))
    named |= {place.name for camera in subject.videos for place in subject.video_places(camera)}
    named |= {"meta/info.json", "meta/stats.json", "meta/tasks.parquet"}
    for name in subject.listed:
        if name in named:
            continue
        parts = name.split("/")
        if parts[0] == "data" and name.endswith(".parquet") and len(parts) == 3:
            yield Found(name, "lerobot reads it as rows of the dataset, which no episode has", ERROR)
        elif parts[0] != "meta" or parts[1] == "episodes":
            yield Found(name, _kind_of_stray(Path(name)))


def _kind_of_stray(path: Path) -> str:
    temporary = path.name.startswith(".") or path.suffix in (".tmp", ".incomplete", ".lock")
    return "left behind by a writer that was stopped" if temporary else "named by no table"


@check("file-order", TABLES)
def data_files_are_in_order(subject: Subject) -> Findings:
    """lerobot joins data files in the order of their names; episodes must come in the same order."""
    if "length" not in subject.numbers:
        return
    by_name = sorted(subject.data_places, key=lambda place: place.name)
    order = np.concatenate([place.episodes for place in by_name]) if by_name else np.zeros(0, np.int64)
    wrong = np.flatnonzero(order != np.arange(len(order)))
    if len(wrong):
        e = int(order[wrong[0]])
        yield Found(
            "meta/episodes", f"read by name, the data files give episode {e} where {wrong[0]} should follow"
        )


@check("statistics", TABLES)
def statistics_are_complete(subject: Subject) -> Findings:
    """Every numeric feature and camera has its statistics, in the shape lerobot demands, and in order."""
    stats = subject.stats
    if stats is None:
        return
    for name, told in subject.features.items():
        if told["dtype"] in ("string", "language"):
            continue
        own = stats.get(name)
        if not isinstance(own, dict):
            yield Found("meta/stats.json", f"no statistics of '{name}'")
            continue
        missing = [entry for entry in REQUIRED_STATISTICS if entry not in own]
        if missing:
            yield Found("meta/stats.json", f"'{name}' lacks {', '.join(missing)}")
            continue
        yield from statistics_trouble(name, told, own)


def statistics_trouble(name: str, told: dict, own: dict) -> Findings:
    camera = told["dtype"] in ("video", "image")
    values = {}
    for entry in (*REQUIRED_STATISTICS[:4], *(q for q in QUANTILES if q in own)):
        try:
            values[entry] = np.asarray(own[entry], np.float64)
        except (TypeError, ValueError):
            yield Found("meta/stats.json", f"'{name}' {entry} is {str(own[entry])[:60]}, expected numbers")
            return
        shape = values[entry].shape
        right = (
            shape[1:] == (1, 1) and len(shape) == 3
            if camera
            # lerobot 0.6.1 counts a matrix's statistics over its rows, too
            else values[entry].size == np.prod(told["shape"])
            or (len(told["shape"]) > 1 and values[entry].size == told["shape"][-1])
        )
        if not right:
            expected = "(channels, 1, 1)" if camera else str(tuple(told["shape"]))
            yield Found("meta/stats.json", f"'{name}' {entry} has shape {shape}, expected {expected}")
            return
        if not np.isfinite(values[entry]).all():
            yield Found("meta/stats.json", f"'{name}' {entry} is not finite")
            return
    # lerobot's quantiles come from histograms, its mean and std from float32 sums
    slack = 0.02 * (values["max"] - values["min"])
    slack = slack + 1e-5 * (np.abs(values["max"]) + np.abs(values["min"])) + 1e-6
    order = [values[entry] for entry in ("min", *QUANTILES, "max") if entry in values]
    if any((low > high + slack).any() for low, high in pairwise(order)):
        yield Found("meta/stats.json", f"'{name}': min, quantiles and max do not rise")
    if (values["std"] < 0).any() or (values["mean"] > values["max"] + slack).any():
        yield Found("meta/stats.json", f"'{name}': a mean or std that no column can have")
    if camera and not told.get("info", {}).get("is_depth_map") and (values["max"] > 1 + 1e-6).any():
        yield Found(
            "meta/stats.json", f"'{name}' has levels up to {values['max'].max():g}; lerobot divides by 255"
        )
