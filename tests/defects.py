"""Single defects: each breaks exactly one thing in something sound, and names the problem it should be found as.

    DEFECTS          every defect, by the sound thing it starts from
    SOUND            what those sound things are, each built once into a folder

Values that are changed as a bad recording would have them leave statistics and contents as a converter would have
written them (`settle`), so that the value itself must be noticed. Helpers, not a test file.
"""

import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from dpipe.pipeline.doctor import Level
from dpipe.pipeline.doctor.mend import mend
from dpipe.streams.dataset import episode_content
from raw_agibot import write_episode as write_agibot
from raw_calvin import write_split
from raw_egodex import poses
from raw_egodex import write_episode as write_egodex
from small_datasets import write_video
from trees import run_convert

FPS, CAMERAS = 20, ("observation.images.image", "observation.images.image2")
FAST, SAMPLED, FULL = Level.FAST, Level.SAMPLED, Level.FULL
DATA, VIDEOS, META = "data/chunk-000", "videos/{}/chunk-000", "meta/episodes/chunk-000/file-000.parquet"


@dataclass(frozen=True)
class Defect:
    """`change` breaks one thing below a copy of the sound thing `base`; `also` cannot but follow from it."""

    name: str
    problem: str
    base: str
    change: Callable[[Path], None]
    level: Level
    also: frozenset[str]


DEFECTS: list[Defect] = []


def defect(problem: str, base: str = "dataset", level: Level = SAMPLED, also: str = "") -> Callable[..., Any]:
    def register(change: Callable[[Path], None]) -> Callable[[Path], None]:
        name = change.__name__.replace("_", " ")
        DEFECTS.append(Defect(name, problem, base, change, level, frozenset(also.split())))
        return change

    return register


# --- the sound things ---------------------------------------------------------------------------------------


def build_raw_libero(folder: Path) -> None:
    """Six demonstrations of the tabletop simulator, in LIBERO's files."""
    from dpipe.samples import write_sample

    write_sample("libero", folder, episodes=6, seed=3, image_size=64, tasks=2)


def build_dataset(folder: Path) -> None:
    """The same, converted: two data files, two cameras, ours."""
    run_convert(sound("raw libero"), folder, part_frames=250)


def build_served(folder: Path) -> None:
    """With targets and shards."""
    from dpipe.pipeline.precompute import precompute
    from dpipe.streams.dataset import open_dataset
    from dpipe.streams.shard_writing import write_shards

    shutil.copytree(sound("dataset"), folder, dirs_exist_ok=True)
    precompute(folder, ["tokens"], {"tokens": {"probe": "none"}})
    write_shards(open_dataset(folder))


def build_foreign(folder: Path) -> None:
    """The same rows and videos without anything of ours, as another writer would leave them."""
    shutil.copytree(sound("dataset"), folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "dpipe")
    edit_table(folder / META, lambda table: table.drop_columns(["split", "source_id"]))


def build_splits(folder: Path) -> None:
    """Play data with a validation split."""
    run_convert(sound("raw calvin"), folder, "calvin")


def build_recorded(folder: Path) -> None:
    """A leader and a follower arm, two cameras, AV1, by lerobot's own recorder."""
    from zoo import BOTH, arm_takes, record

    takes = arm_takes(1, lengths=(60, 52, 71, 58, 64, 66), unit=90.0, one_table=True)
    record(folder, takes, fps=20, names=BOTH)


def build_raw_calvin(folder: Path) -> None:
    windows = [(0, 39, "open the drawer", "open_drawer"), (10, 49, "push the red block", "push_red")]
    for name, first in (("training", 0), ("validation", 700)):
        moved = [(a + first, b + first, text, task) for a, b, text, task in windows]
        write_split(folder / "task_D_D" / name, [(first, first + 59)], moved, change=draw_frames)


def build_raw_egodex(folder: Path) -> None:
    for number in range(3):
        stem = folder / "part1" / "basic_pick_place" / str(number)
        write_egodex(stem, transforms=poses(30, seed=number), frames=30)
        draw_video(stem.with_suffix(".mp4"), 30, seed=number)


def build_raw_agibot(folder: Path) -> None:
    for number in range(3):
        write_agibot(folder, episode=648640 + number, seed=number, frames=60)
        videos = folder / "observations/327" / str(648640 + number) / "videos"
        for camera, path in enumerate(sorted(videos.iterdir())):
            draw_video(path, 60, seed=10 * number + camera)


SOUND: dict[str, Callable[[Path], None]] = {
    "raw libero": build_raw_libero,
    "raw calvin": build_raw_calvin,
    "raw egodex": build_raw_egodex,
    "raw agibot": build_raw_agibot,
    "dataset": build_dataset,
    "served": build_served,
    "foreign": build_foreign,
    "recorded": build_recorded,
    "splits": build_splits,
}
_built: dict[str, Path] = {}
_folder: list[Path] = []


def keep_sound_things_in(folder: Path) -> None:
    """Where `sound` builds, once each; a name decides the source the doctor tells from it."""
    _folder[:] = [folder]
    _built.clear()


def sound(name: str) -> Path:
    if name not in _built:
        parts = name.split()
        path = _folder[0] / "-".join(parts) / (parts[1] if parts[0] == "raw" else "set")
        if not path.exists():
            SOUND[name](path)
        _built[name] = path
    return _built[name]


def broken(one: Defect, folder: Path) -> Path:
    """A copy of the sound thing with the defect in it."""
    source = sound(one.base)
    target = folder / source.name
    shutil.copytree(source, target)
    one.change(target)
    return target


# --- ways to change -----------------------------------------------------------------------------------------


def scene(t: int, seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A slope of grey with a square that walks: no two frames alike, no two seeds either."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([x * 3 % 200 + 20, y * 3 % 200 + 20, (x + y + 37 * seed) % 200 + 20], axis=-1).astype(
        np.uint8
    )
    image[:2] = t % 251, t // 251, 50  # a strip that counts frames
    column, row = (5 * t + 11 * seed) % (width - 12), (3 * t + 7 * seed) % (height - 12)
    image[row : row + 12, column : column + 12] = (240, 40 * (seed % 6), 10)
    return image


def draw_frames(frames: dict[int, dict[str, np.ndarray]]) -> None:
    """Pictures that show something, in place of CALVIN's plain ones."""
    for number, members in frames.items():
        members["rgb_static"] = scene(number, 0)
        members["rgb_gripper"] = scene(number, 1, 40, 40)


def draw_video(path: Path, frames: int, seed: int, fps: int = 30) -> None:
    path.unlink(missing_ok=True)
    write_video(path, [scene(t, seed) for t in range(frames)], fps)


def edit_json(path: Path, change: Callable[[dict], Any]) -> None:
    value = json.loads(path.read_text())
    changed = change(value)
    path.write_text(json.dumps(value if changed is None else changed))


def edit_info(root: Path, change: Callable[[dict], Any]) -> None:
    edit_json(root / "meta/info.json", change)


def edit_table(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.ParquetFile(path).read()), path)


def put(table: pa.Table, name: str, values: Any) -> pa.Table:
    """A column replaced, of the type it had."""
    column = pa.array(values, table.schema.field(name).type)
    return table.set_column(table.column_names.index(name), table.schema.field(name), column)


def edit_column(path: Path, name: str, change: Callable[[list], Any]) -> None:
    """A column as a Python list, changed in place or returned anew."""

    def run(table: pa.Table) -> pa.Table:
        values = table.column(name).to_pylist()
        changed = change(values)
        return put(table, name, values if changed is None else changed)

    edit_table(path, run)


def data_files(root: Path) -> list[Path]:
    return sorted((root / DATA).glob("*.parquet"))


def lengths_of(root: Path) -> list[int]:
    return pq.ParquetFile(root / META).read(columns=["length"]).column("length").to_pylist()


def edit_values(root: Path, change: Callable[[list[dict[str, np.ndarray]]], None]) -> None:
    """action and observation.state of every episode [T, D], changed in place; then all that follows from them."""
    lengths, episodes = lengths_of(root), []
    tables = [pq.ParquetFile(path).read() for path in data_files(root)]
    whole = pa.concat_tables(tables)
    start = 0
    names = ("action", "observation.state")
    values = {name: np.array(whole.column(name).to_pylist(), np.float32) for name in names}
    for length in lengths:
        episodes.append({name: values[name][start : start + length] for name in names})
        start += length
    change(episodes)
    start = 0
    for path, table in zip(data_files(root), tables, strict=True):
        rows = slice(start, start + table.num_rows)
        for name in names:
            table = put(table, name, list(values[name][rows]))
        pq.write_table(table, path)
        start += table.num_rows
    settle(root, episodes)


def settle(root: Path, episodes: list[dict[str, np.ndarray]] | None = None) -> None:
    """Statistics and contents as they would be had the dataset been recorded like this."""
    if all(np.isfinite(column).all() for episode in episodes or [] for column in episode.values()):
        mended = root.with_name(root.name + ".mended")
        mend(root, mended)
        shutil.rmtree(root)
        mended.rename(root)
    own = root / "dpipe/episodes.parquet"
    if episodes and own.is_file():
        contents = [episode_content(columns, len(columns["action"])) for columns in episodes]
        edit_column(own, "content", lambda _: contents)


def edit_video(root: Path, camera: str, change: Callable[[list[np.ndarray]], list[np.ndarray]]) -> None:
    """The frames of each episode of one camera [T, H, W, 3], decoded, changed, encoded again."""
    from dpipe.streams.dataset import open_dataset
    from dpipe.video.encode import H264, Encoder
    from dpipe.video.mp4 import write_mp4

    dataset = open_dataset(root)
    places = [dataset.video_path(e, camera) for e in range(len(dataset))]
    frames = change([dataset.frames(e, camera, 0, int(n)) for e, n in enumerate(dataset.episodes.length)])
    for path in sorted(set(places)):
        mine = np.concatenate([f for f, place in zip(frames, places, strict=True) if place == path])
        sink = io.BytesIO()
        encoder = Encoder(H264, mine.shape[1], mine.shape[2], dataset.fps, sink)
        encoder.write(mine)
        clip = encoder.finish()
        path.unlink()
        write_mp4(path, clip.sample_entry, clip.width, clip.height, dataset.fps, [clip.run(sink.getvalue())])


def cut(path: Path, part: float = 0.6) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: int(len(data) * part)])


def flip(path: Path, at: int, bits: int = 0x10) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bits
    path.unlink()
    path.write_bytes(bytes(data))


# --- meta/ --------------------------------------------------------------------------------------------------


@defect("info", level=FAST)
def info_without_fps(root: Path) -> None:
    edit_info(root, lambda info: info.pop("fps") and None)


@defect("info", level=FAST, also="manifest")
def fps_that_is_no_whole_number(root: Path) -> None:
    edit_info(root, lambda info: info.update(fps=19.98))


@defect("unreadable", level=FAST)
def info_cut_short(root: Path) -> None:
    cut(root / "meta/info.json")


@defect("missing-file", level=FAST)
def no_task_table(root: Path) -> None:
    (root / "meta/tasks.parquet").unlink()


@defect("format-version", level=FAST)
def version_two(root: Path) -> None:
    edit_info(root, lambda info: info.update(codebase_version="v2.1"))


@defect("info", level=FAST)
def path_template_that_formats_attributes(root: Path) -> None:
    edit_info(root, lambda info: info.update(data_path="data/{chunk_index.__class__}/{file_index}.parquet"))


@defect("refused", level=FAST)
def path_template_that_climbs_out(root: Path) -> None:
    template = "../elsewhere/{video_key}/{chunk_index:03d}-{file_index:03d}.mp4"
    edit_info(root, lambda info: info.update(video_path=template))


@defect("features", level=FAST)
def a_dtype_that_does_not_exist(root: Path) -> None:
    edit_info(root, lambda info: info["features"]["action"].update(dtype="float33"))


@defect("features", level=FAST)
def a_shape_of_nothing(root: Path) -> None:
    edit_info(root, lambda info: info["features"]["observation.state"].update(shape=[0]))


@defect("features", level=FAST)
def fewer_names_than_dimensions(root: Path) -> None:
    edit_info(root, lambda info: info["features"]["action"]["names"].pop() and None)


@defect("features", level=FAST)
def one_name_for_two_dimensions(root: Path) -> None:
    edit_info(root, lambda info: info["features"]["action"]["names"].__setitem__(1, "delta_x"))


@defect("features", level=FAST, also="statistics")
def a_vector_called_image(root: Path) -> None:
    told = {"dtype": "float32", "shape": [4], "names": list("abcd")}
    edit_info(root, lambda info: info["features"].update({"image_embedding": told}))


@defect("features", level=FAST)
def no_timestamp_declared(root: Path) -> None:
    edit_info(root, lambda info: info["features"].pop("timestamp") and None)


@defect("feature-names", base="foreign", level=FAST)
def names_nested_in_a_group(root: Path) -> None:
    edit_info(root, lambda info: info["features"]["action"].update(names={"motors": [*"abcdef", "gripper"]}))


@defect("feature-names", base="foreign", level=FAST)
def state_and_action_in_another_order(root: Path) -> None:
    names = ["z", "y", "x", "axis_angle_x", "axis_angle_y", "axis_angle_z", "gripper"]
    edit_info(root, lambda info: info["features"]["action"].update(names=names))


@defect("feature-names", base="foreign")
def a_gripper_without_its_name(root: Path) -> None:
    names = [f"motor_{i}" for i in range(7)]
    edit_info(root, lambda info: info["features"]["action"].update(names=names))


@defect("feature-role", base="foreign", level=FAST, also="statistics")
def a_second_action(root: Path) -> None:
    told = {"dtype": "float32", "shape": [2], "names": ["a", "b"]}
    edit_info(root, lambda info: info["features"].update({"action_raw": told}))


@defect("totals", level=FAST)
def too_many_frames_in_total(root: Path) -> None:
    edit_info(root, lambda info: info.update(total_frames=info["total_frames"] + 1))


@defect("totals", level=FAST)
def an_episode_less_in_total(root: Path) -> None:
    edit_info(root, lambda info: info.update(total_episodes=info["total_episodes"] - 1))


@defect("splits", level=FAST)
def a_split_beyond_the_episodes(root: Path) -> None:
    edit_info(root, lambda info: info.update(splits={"train": "0:60"}))


@defect("splits", level=FAST, base="foreign")
def splits_that_overlap(root: Path) -> None:
    edit_info(root, lambda info: info.update(splits={"train": "0:4", "test": "3:6"}))


@defect("splits", level=FAST)
def splits_in_words(root: Path) -> None:
    edit_info(root, lambda info: info.update(splits={"train": "all of them"}))


@defect("tasks", level=FAST)
def tasks_in_another_order(root: Path) -> None:
    edit_table(root / "meta/tasks.parquet", lambda table: table.take([1, 0]))


@defect("tasks", level=FAST)
def tasks_without_their_pandas_index(root: Path) -> None:
    edit_table(root / "meta/tasks.parquet", lambda table: table.replace_schema_metadata(None))


def rename_task(root: Path, new: Callable[[list[str]], str]) -> None:
    """Task 0 called otherwise, everywhere."""
    old: list[str] = []

    def run(tasks: list[str]) -> list[str]:
        old.append(tasks[0])
        return [new(tasks), *tasks[1:]]

    edit_column(root / "meta/tasks.parquet", "task", run)
    after = pq.ParquetFile(root / "meta/tasks.parquet").read().column("task").to_pylist()[0]
    edit_column(
        root / META, "tasks", lambda rows: [[after if t == old[0] else t for t in row] for row in rows]
    )


@defect("instruction", level=FAST)
def an_empty_instruction(root: Path) -> None:
    rename_task(root, lambda tasks: "")


@defect("instruction", level=FAST)
def a_placeholder_for_an_instruction(root: Path) -> None:
    rename_task(root, lambda tasks: "default")


@defect("instruction", level=FAST)
def an_instruction_with_markup(root: Path) -> None:
    rename_task(root, lambda tasks: f"<script>alert(1)</script>{tasks[0]}")


@defect("instruction", level=FAST)
def an_instruction_of_two_lines(root: Path) -> None:
    rename_task(root, lambda tasks: f"{tasks[0]}\nrm -rf /")


@defect("instruction", level=FAST)
def one_instruction_spelt_twice(root: Path) -> None:
    rename_task(root, lambda tasks: tasks[1].upper() + ".")


@defect("episodes", level=FAST, base="foreign")
def a_gap_in_the_numbering_of_episodes(root: Path) -> None:
    edit_column(root / META, "episode_index", lambda rows: [*rows[:3], *(e + 1 for e in rows[3:])])


@defect("episodes", level=FAST, base="foreign")
def no_column_for_the_data_file(root: Path) -> None:
    edit_table(root / META, lambda table: table.drop_columns(["data/file_index"]))


@defect("episodes", level=FAST, base="foreign", also="episode-range totals missing-file")
def an_episode_of_negative_length(root: Path) -> None:
    edit_column(root / META, "length", lambda rows: [*rows[:2], -rows[2], *rows[3:]])


@defect("episode-range", level=FAST)
def an_episode_that_begins_a_row_late(root: Path) -> None:
    edit_column(root / META, "dataset_from_index", lambda rows: [*rows[:3], rows[3] + 1, *rows[4:]])


@defect("episode-range", level=FAST)
def an_episode_that_ends_a_row_early(root: Path) -> None:
    edit_column(root / META, "dataset_to_index", lambda rows: [*rows[:3], rows[3] - 1, *rows[4:]])


@defect("episode-tasks", level=FAST)
def a_task_that_is_not_in_the_table(root: Path) -> None:
    edit_column(root / META, "tasks", lambda rows: [["juggle three cubes"], *rows[1:]])


@defect("missing-file", level=FAST)
def no_data_file(root: Path) -> None:
    data_files(root)[1].unlink()


@defect("missing-file", level=FAST)
def no_video_of_one_camera(root: Path) -> None:
    (root / VIDEOS.format(CAMERAS[1]) / "file-001.mp4").unlink()


@defect("missing-file", level=FAST)
def an_empty_video_file(root: Path) -> None:
    (root / VIDEOS.format(CAMERAS[0]) / "file-000.mp4").write_bytes(b"")


@defect("stray-file", level=FAST)
def a_table_of_nobody_among_the_data(root: Path) -> None:
    shutil.copy(data_files(root)[0], root / DATA / "file-007.parquet")


@defect("stray-file", level=FAST)
def a_temporary_video_left_behind(root: Path) -> None:
    (root / VIDEOS.format(CAMERAS[0]) / ".file-002.mp4.123.tmp").write_bytes(b"half")


@defect("statistics", level=FAST)
def no_statistics_of_the_action(root: Path) -> None:
    edit_json(root / "meta/stats.json", lambda stats: stats.pop("action") and None)


@defect("statistics", level=FAST)
def statistics_of_another_shape(root: Path) -> None:
    edit_json(root / "meta/stats.json", lambda stats: stats["action"].update(mean=[0.0]))


@defect("statistics", level=FAST)
def statistics_that_are_nan(root: Path) -> None:
    edit_json(root / "meta/stats.json", lambda stats: stats["action"]["std"].__setitem__(0, float("nan")))


@defect("statistics", level=FAST)
def pictures_counted_in_grey_levels(root: Path) -> None:
    def run(stats: dict) -> None:
        for name, value in stats[CAMERAS[0]].items():
            if name != "count":
                stats[CAMERAS[0]][name] = (np.array(value) * 255).tolist()

    edit_json(root / "meta/stats.json", run)


@defect("statistics", level=FAST)
def no_statistics_at_all(root: Path) -> None:
    (root / "meta/stats.json").unlink()


@defect("statistics")
def a_mean_of_other_data(root: Path) -> None:
    edit_json(root / "meta/stats.json", lambda stats: stats["action"]["mean"].__setitem__(0, 0.31))


@defect("statistics")
def a_quantile_a_little_off(root: Path) -> None:
    edit_json(
        root / "meta/stats.json",
        lambda stats: stats["action"]["q99"].__setitem__(1, stats["action"]["q99"][1] * 0.99),
    )


@defect("statistics", base="foreign")
def a_quantile_no_merging_gives(root: Path) -> None:
    edit_json(
        root / "meta/stats.json",
        lambda stats: stats["action"]["q50"].__setitem__(0, stats["action"]["q99"][0]),
    )


@defect("statistics", base="foreign")
def a_largest_value_that_was_never_reached(root: Path) -> None:
    edit_json(root / "meta/stats.json", lambda stats: stats["observation.state"]["max"].__setitem__(2, 9.0))


@defect("episode-statistics")
def statistics_of_another_episode(root: Path) -> None:
    edit_column(root / META, "stats/action/mean", lambda rows: [rows[1], rows[0], *rows[2:]])


# --- rows ---------------------------------------------------------------------------------------------------


@defect("columns", base="foreign")
def a_column_that_was_dropped(root: Path) -> None:
    edit_table(data_files(root)[0], lambda table: table.drop_columns(["observation.state"]))


@defect("columns")
def a_vector_of_another_width(root: Path) -> None:
    def run(table: pa.Table) -> pa.Table:
        values = [row[:6] for row in table.column("action").to_pylist()]
        return table.set_column(
            table.column_names.index("action"), "action", pa.array(values, pa.list_(pa.float32(), 6))
        )

    edit_table(data_files(root)[0], run)


@defect("columns")
def a_value_that_is_missing(root: Path) -> None:
    edit_column(data_files(root)[0], "observation.state", lambda rows: rows.__setitem__(7, None))


@defect("columns")
def numbers_stored_as_text(root: Path) -> None:
    def run(table: pa.Table) -> pa.Table:
        text = pa.array([str(t) for t in table.column("timestamp").to_pylist()])
        return table.set_column(table.column_names.index("timestamp"), "timestamp", text)

    edit_table(data_files(root)[0], run)


@defect("row-count")
def a_row_that_was_lost(root: Path) -> None:
    edit_table(data_files(root)[0], lambda table: pa.concat_tables([table.slice(0, 9), table.slice(10)]))


@defect("row-count")
def a_row_that_is_there_twice(root: Path) -> None:
    edit_table(data_files(root)[1], lambda table: pa.concat_tables([table.slice(0, 10), table.slice(9)]))


@defect("index")
def indices_from_the_middle_shifted(root: Path) -> None:
    edit_column(data_files(root)[1], "index", lambda rows: [*rows[:20], *(i + 1 for i in rows[20:])])


@defect("index")
def indices_that_begin_anew_in_each_file(root: Path) -> None:
    edit_column(data_files(root)[1], "index", lambda rows: [i - rows[0] for i in rows])


@defect("episode-index")
def a_frame_given_to_another_episode(root: Path) -> None:
    edit_column(data_files(root)[0], "episode_index", lambda rows: [1, *rows[1:]])


@defect("frame-index")
def frames_counted_from_one(root: Path) -> None:
    edit_column(data_files(root)[0], "frame_index", lambda rows: [t + 1 for t in rows])


@defect("timestamp")
def timestamps_that_drift(root: Path) -> None:
    edit_column(data_files(root)[0], "timestamp", lambda rows: [t * 1.001 for t in rows])


@defect("timestamp")
def one_late_timestamp(root: Path) -> None:
    edit_column(data_files(root)[0], "timestamp", lambda rows: [*rows[:30], rows[30] + 0.01, *rows[31:]])


@defect("task-index")
def a_task_number_beyond_the_table(root: Path) -> None:
    edit_column(data_files(root)[0], "task_index", lambda rows: [*rows[:3], 7, *rows[4:]])


@defect("task-index")
def frames_with_the_other_instruction(root: Path) -> None:
    edit_column(data_files(root)[0], "task_index", lambda rows: [1 - rows[0], *rows[1:]])


@defect("unreadable")
def a_data_file_cut_short(root: Path) -> None:
    cut(data_files(root)[1])


# --- numbers ------------------------------------------------------------------------------------------------


@defect("not-finite", also="content statistics episode-statistics")
def one_nan_in_the_action(root: Path) -> None:
    edit_values(root, lambda episodes: episodes[2]["action"].__setitem__((5, 3), np.nan))


@defect("not-finite", also="content statistics episode-statistics")
def an_infinite_joint(root: Path) -> None:
    edit_values(root, lambda episodes: episodes[1]["observation.state"].__setitem__((8, 2), np.inf))


@defect("constant")
def a_state_that_never_changes(root: Path) -> None:
    def run(episodes: list) -> None:
        episodes[3]["observation.state"][:] = episodes[3]["observation.state"][0]

    edit_values(root, run)


@defect("stale", also="jump")
def a_state_sent_again_for_two_seconds(root: Path) -> None:
    def run(episodes: list) -> None:
        episodes[2]["observation.state"][8:48] = episodes[2]["observation.state"][8]

    edit_values(root, run)


@defect("jump")
def a_state_that_jumps_for_one_frame(root: Path) -> None:
    def run(episodes: list) -> None:
        low = min(e["observation.state"][:, 0].min() for e in episodes)
        high = max(e["observation.state"][:, 0].max() for e in episodes)
        state = episodes[2]["observation.state"]
        state[30, 0] = low if state[30, 0] > (low + high) / 2 else high

    edit_values(root, run)


@defect("action-is-state", base="foreign", also="gripper-polarity")
def an_action_that_copies_the_state(root: Path) -> None:
    edit_info(
        root,
        lambda info: info["features"]["action"].update(
            names=info["features"]["observation.state"]["names"][:7]
        ),
    )

    def run(episodes: list) -> None:
        for episode in episodes:
            episode["action"][:] = episode["observation.state"][:, :7]

    edit_values(root, run)


@defect("time-pairing")
def actions_of_one_episode_late_by_six_frames(root: Path) -> None:
    edit_values(root, lambda episodes: shift(episodes[3]["action"], 6))


@defect("time-pairing", also="gripper-polarity")
def all_actions_late_by_three_frames(root: Path) -> None:
    edit_values(root, lambda episodes: [shift(episode["action"], 3) for episode in episodes] and None)


def shift(column: np.ndarray, frames: int) -> None:
    """Delay a column in place; the first row is repeated."""
    column[frames:] = column[:-frames].copy()
    column[:frames] = column[0]


@defect("gripper-range", base="foreign")
def one_episode_with_the_gripper_as_zero_and_one(root: Path) -> None:
    def run(episodes: list) -> None:
        episodes[4]["action"][:, 6] = (episodes[4]["action"][:, 6] + 1) / 2

    edit_values(root, run)


@defect("gripper-range")
def a_gripper_command_beyond_its_conventions(root: Path) -> None:
    def run(episodes: list) -> None:
        episodes[1]["action"][:, 6] *= 2

    edit_values(root, run)


@defect("gripper-polarity")
def one_episode_with_the_gripper_turned_round(root: Path) -> None:
    def run(episodes: list) -> None:
        episodes[4]["action"][:, 6] *= -1

    edit_values(root, run)


@defect("gripper-polarity")
def every_gripper_against_the_conventions(root: Path) -> None:
    def run(episodes: list) -> None:
        for episode in episodes:
            episode["action"][:, 6] *= -1

    edit_values(root, run)


@defect("rotation")
def orientations_in_degrees(root: Path) -> None:
    def run(episodes: list) -> None:
        episodes[2]["observation.state"][:, 3:6] *= 180 / np.pi

    edit_values(root, run)


@defect("rotation", base="foreign")
def quaternions_of_no_length(root: Path) -> None:
    names = ["x", "y", "z", "qx", "qy", "qz", "qw", "gripper_right"]
    edit_info(root, lambda info: info["features"]["observation.state"].update(names=names))

    def run(episodes: list) -> None:
        for episode in episodes:
            episode["observation.state"][:, 3:7] = (0, 0, 0.6, 0.8)
        episodes[0]["observation.state"][3, 3:7] = 0

    edit_values(root, run)


@defect("split-leakage", base="splits")
def training_frames_in_validation(root: Path) -> None:
    def run(episodes: list) -> None:
        train, validation = episodes[0], episodes[-1]
        for name in train:
            validation[name][:] = train[name][: len(validation[name])]

    edit_values(root, run)


@defect("duplicate-episode", base="raw libero")
def a_demonstration_that_is_there_twice(root: Path) -> None:
    with h5py.File(libero_file(root), "r+") as file:
        file.copy("data/demo_0", "data/demo_99")


# --- video --------------------------------------------------------------------------------------------------


def table_edit(root: Path, camera: str, name: str, change: Callable[[list], Any]) -> None:
    edit_column(root / META, f"videos/{camera}/{name}", change)


@defect("video-size")
def another_size_declared(root: Path) -> None:
    edit_info(root, lambda info: info["features"][CAMERAS[0]].update(shape=[96, 64, 3]))


@defect("video-rate")
def a_video_at_another_rate(root: Path) -> None:
    path = root / VIDEOS.format(CAMERAS[0]) / "file-000.mp4"
    data = path.read_bytes()
    path.unlink()
    at = data.index(b"mdhd") + 16
    (ticks,) = struct.unpack_from(">I", data, at)
    path.write_bytes(data[:at] + struct.pack(">I", ticks * 25 // 20) + data[at + 4 :])


@defect("video-count", also="video-range")
def a_frame_lost_in_the_video(root: Path) -> None:
    edit_video(root, CAMERAS[0], lambda frames: [np.delete(frames[0], 20, axis=0), *frames[1:]])


@defect("video-count")
def a_frame_too_many_at_the_end(root: Path) -> None:
    edit_video(root, CAMERAS[0], lambda frames: [*frames[:-1], np.concatenate([frames[-1], frames[-1][-1:]])])


@defect("video-range")
def an_episode_half_a_frame_off(root: Path) -> None:
    table_edit(root, CAMERAS[0], "from_timestamp", lambda rows: [*rows[:1], rows[1] + 0.5 / FPS, *rows[2:]])


@defect("video-range", base="foreign")
def an_episode_a_frame_off(root: Path) -> None:
    for name in ("from_timestamp", "to_timestamp"):
        table_edit(root, CAMERAS[0], name, lambda rows: [*rows[:1], rows[1] + 1 / FPS, *rows[2:]])


@defect("video-range", base="foreign", also="video-shifted")
def two_episodes_with_each_others_video(root: Path) -> None:
    for name in ("from_timestamp", "to_timestamp"):
        table_edit(root, CAMERAS[0], name, lambda rows: [rows[1], rows[0], *rows[2:]])


@defect("video-range")
def an_end_that_does_not_fit_the_rows(root: Path) -> None:
    table_edit(root, CAMERAS[1], "to_timestamp", lambda rows: [*rows[:2], rows[2] - 0.2, *rows[3:]])


@defect("video-info")
def another_codec_in_the_info(root: Path) -> None:
    edit_info(root, lambda info: info["features"][CAMERAS[0]]["info"].update({"video.codec": "hevc"}))


@defect("unreadable")
def a_video_cut_short(root: Path) -> None:
    cut(root / VIDEOS.format(CAMERAS[0]) / "file-001.mp4")


@defect("video-damaged", level=FULL)
def samples_of_a_video_overwritten(root: Path) -> None:
    from dpipe.video.mp4 import read_table

    path = root / VIDEOS.format(CAMERAS[0]) / "file-000.mp4"
    table = read_table(path)
    data = bytearray(path.read_bytes())
    first, size = int(table.offsets[10]), int(table.sizes[10])
    data[first + 5 : first + size] = bytes(size - 5)
    path.unlink()
    path.write_bytes(bytes(data))


@defect("video-black")
def a_camera_that_saw_nothing(root: Path) -> None:
    edit_video(root, CAMERAS[1], lambda frames: [*frames[:2], np.zeros_like(frames[2]), *frames[3:]])


@defect("video-black", level=FULL)
def some_black_frames_in_between(root: Path) -> None:
    def run(frames: list) -> list:
        frames[1][30:40] = 0
        return frames

    edit_video(root, CAMERAS[0], run)


@defect("video-frozen", also="video-shifted")
def a_camera_that_stood_still(root: Path) -> None:
    edit_video(
        root,
        CAMERAS[1],
        lambda frames: [*frames[:3], np.repeat(frames[3][:1], len(frames[3]), axis=0), *frames[4:]],
    )


@defect("video-frozen", level=FULL, also="video-shifted")
def a_camera_that_hung_for_a_second(root: Path) -> None:
    def run(frames: list) -> list:
        frames[2][10:40] = frames[2][10]
        return frames

    edit_video(root, CAMERAS[1], run)


@defect("video-repeated", also="statistics")
def one_camera_for_two(root: Path) -> None:
    for path in sorted((root / VIDEOS.format(CAMERAS[0])).iterdir()):
        shutil.copy(path, root / VIDEOS.format(CAMERAS[1]) / path.name)


@defect("video-range", base="foreign", also="video-shifted video-repeated")
def an_episode_that_points_at_anothers_video(root: Path) -> None:
    """As merging tools wrote it: two episodes find their frames in one place."""
    lengths = lengths_of(root)
    table_edit(root, CAMERAS[0], "from_timestamp", lambda rows: [rows[0], rows[0], *rows[2:]])
    table_edit(root, CAMERAS[0], "to_timestamp", lambda rows: [rows[0], lengths[1] / FPS, *rows[2:]])


@defect("video-repeated")
def an_episode_that_shows_another_ones_video(root: Path) -> None:
    """Its samples are copies of the first ones of the longest episode in its file."""
    from dpipe.video.mp4 import Run, read_table, write_mp4

    path = root / VIDEOS.format(CAMERAS[0]) / "file-000.mp4"
    table, lengths = read_table(path), lengths_of(root)[:3]
    starts = np.cumsum([0, *lengths[:-1]])
    long = int(np.argmax(lengths))
    short = (long + 1) % 3
    places = [starts[long] if e == short else starts[e] for e in range(3)]
    spans = [slice(int(a), int(a) + n) for a, n in zip(places, lengths, strict=True)]
    source = path.read_bytes()
    runs = [Run(source, table.offsets[s], table.sizes[s], table.sync[s]) for s in spans]
    path.unlink()
    write_mp4(path, table.sample_entry, table.width, table.height, FPS, runs)


@defect("video-shifted", level=FULL)
def a_video_late_by_eight_frames(root: Path) -> None:
    def run(frames: list) -> list:
        late = np.concatenate([np.repeat(frames[3][:1], 8, axis=0), frames[3][:-8]])
        return [*frames[:3], late, *frames[4:]]

    edit_video(root, CAMERAS[1], run)


# --- an arm recorded by lerobot -----------------------------------------------------------------------------

VIEWS = ("observation.images.front", "observation.images.wrist")


def edit_episode(root: Path, number: int, change: Callable[[np.ndarray, np.ndarray], Any]) -> None:
    """action and observation.state of one episode [T, D], changed in place."""

    def run(episodes: list) -> None:
        change(episodes[number]["action"], episodes[number]["observation.state"])

    edit_values(root, run)


def film(root: Path, camera: str, change: Callable[[list[np.ndarray]], list[np.ndarray]]) -> None:
    """As `edit_video`, and the description follows the new codec."""
    edit_video(root, camera, change)
    edit_info(root, lambda info: info["features"][camera]["info"].update({"video.codec": "h264"}))


@defect("contradiction", base="recorded")
def one_joint_commanded_the_wrong_way_round(root: Path) -> None:
    edit_episode(root, 1, lambda action, _: np.negative(action[:, 1], out=action[:, 1]))


@defect("contradiction", base="recorded")
def two_joints_exchanged_in_one_episode(root: Path) -> None:
    def change(action: np.ndarray, state: np.ndarray) -> None:
        action[:, [0, 1]] = action[:, [1, 0]]

    edit_episode(root, 1, change)


@defect("contradiction", base="recorded")
def commands_of_one_episode_in_radians(root: Path) -> None:
    edit_episode(root, 2, lambda action, _: np.multiply(action, np.pi / 180, out=action))


@defect("contradiction", base="recorded")
def a_gripper_commanded_the_wrong_way_round(root: Path) -> None:
    edit_episode(root, 3, lambda action, _: np.subtract(90, action[:, 5], out=action[:, 5]))


@defect("units", base="recorded")
def one_episode_in_radians(root: Path) -> None:
    def change(action: np.ndarray, state: np.ndarray) -> None:
        action *= np.pi / 180
        state *= np.pi / 180

    edit_episode(root, 2, change)


@defect("constant", base="recorded", also="contradiction")
def a_joint_whose_sensor_is_dead(root: Path) -> None:
    edit_episode(root, 1, lambda _, state: state[:, 2].fill(state[0, 2]))


@defect("constant", base="recorded", also="video-shifted time-pairing contradiction")
def commands_that_were_not_recorded(root: Path) -> None:
    edit_episode(root, 1, lambda action, _: action.fill(0))


@defect("jump", base="recorded", also="contradiction time-pairing")
def a_joint_that_is_elsewhere_from_the_middle_on(root: Path) -> None:
    def change(_: np.ndarray, state: np.ndarray) -> None:
        state[len(state) // 2 :, 0] += 400

    edit_episode(root, 1, change)


@defect("time-pairing", base="recorded", also="contradiction video-shifted")
def states_of_one_episode_late_by_six_frames(root: Path) -> None:
    edit_episode(root, 2, lambda _, state: shift(state, 6))


@defect("statistics", base="recorded")
def colours_of_another_camera(root: Path) -> None:
    def run(stats: dict) -> None:
        for entry in ("mean", "q50"):
            stats[VIEWS[0]][entry] = (np.array(stats[VIEWS[0]][entry]) * 0.6).tolist()

    edit_json(root / "meta/stats.json", run)


@defect("video-frozen", base="recorded")
def a_camera_that_hung_to_the_end(root: Path) -> None:
    def run(frames: list) -> list:
        frames[2][30:] = frames[2][30]
        return frames

    film(root, VIEWS[1], run)


@defect("video-frozen", base="recorded", also="video-shifted")
def a_camera_that_showed_one_picture(root: Path) -> None:
    film(root, VIEWS[0], lambda f: [*f[:2], np.repeat(f[2][:1], len(f[2]), axis=0), *f[3:]])


@defect("video-black", base="recorded")
def a_camera_behind_grey_cardboard(root: Path) -> None:
    film(root, VIEWS[0], lambda f: [*f[:2], np.full_like(f[2], 120), *f[3:]])


@defect("video-shifted", base="recorded")
def pictures_of_one_episode_late_by_five(root: Path) -> None:
    film(
        root,
        VIEWS[0],
        lambda f: [*f[:2], np.concatenate([np.repeat(f[2][:1], 5, axis=0), f[2][:-5]]), *f[3:]],
    )


@defect("video-shifted", base="recorded")
def pictures_of_every_episode_late_by_five(root: Path) -> None:
    film(root, VIEWS[0], lambda f: [np.concatenate([np.repeat(x[:1], 5, axis=0), x[:-5]]) for x in f])


@defect("video-swapped", base="recorded", also="video-shifted")
def two_cameras_exchanged_in_one_episode(root: Path) -> None:
    from dpipe.streams.dataset import open_dataset

    dataset = open_dataset(root)
    shown = [dataset.frames(1, camera, 0, int(dataset.episodes.length[1])) for camera in VIEWS]
    for camera, other in zip(VIEWS, shown[::-1], strict=True):
        film(root, camera, lambda f, other=other: [f[0], other, *f[2:]])


# --- our own folder -----------------------------------------------------------------------------------------


@defect("unfinished", level=FAST)
def no_manifest(root: Path) -> None:
    (root / "dpipe/manifest.json").unlink()


@defect("unreadable", level=FAST)
def a_manifest_cut_short(root: Path) -> None:
    cut(root / "dpipe/manifest.json")


@defect("manifest", level=FAST)
def a_manifest_of_fewer_episodes(root: Path) -> None:
    edit_json(root / "dpipe/manifest.json", lambda m: m["totals"].update(episodes=3))


@defect("content")
def a_value_changed_after_conversion(root: Path) -> None:
    contents: list[str] = []
    edit_column(root / "dpipe/episodes.parquet", "content", lambda rows: contents.extend(rows))

    def run(episodes: list) -> None:
        episodes[2]["action"][20, 0] += 0.001

    edit_values(root, run)
    edit_column(root / "dpipe/episodes.parquet", "content", lambda _: contents)


@defect("own-table", level=FAST)
def an_episode_of_another_length_in_our_table(root: Path) -> None:
    edit_column(root / "dpipe/episodes.parquet", "frames", lambda rows: [rows[0] + 1, *rows[1:]])


@defect("segments", base="splits", level=FAST)
def a_segment_beyond_its_episode(root: Path) -> None:
    edit_column(root / "dpipe/segments.parquet", "stop", lambda rows: [rows[0] + 500, *rows[1:]])


@defect("sidecar")
def a_sidecar_row_lost(root: Path) -> None:
    edit_table(root / "dpipe/columns/chunk-000/file-000.parquet", lambda table: table.slice(1))


@defect("not-finite")
def a_nan_beside_the_dataset(root: Path) -> None:
    path = root / "dpipe/columns/chunk-000/file-000.parquet"
    edit_column(path, "joint_pos", lambda rows: rows.__setitem__(4, [float("nan")] * 7))


@defect("dropped", level=FAST)
def a_drop_without_a_reason(root: Path) -> None:
    edit_json(root / "dpipe/manifest.json", lambda m: m.update(dropped=2))


@defect("card", level=FAST)
def a_card_without_its_front_matter(root: Path) -> None:
    (root / "README.md").write_text("# a dataset\n")


def target_of(root: Path) -> Path:
    return next((root / "dpipe/targets/tokens").iterdir())


@defect("target-contract", base="served", level=FAST)
def a_target_made_at_another_rate(root: Path) -> None:
    edit_json(target_of(root) / "contract.json", lambda data: data["contract"].update(fps=10))


@defect("target-contract", base="served", level=FAST)
def a_contract_of_a_later_version(root: Path) -> None:
    edit_json(target_of(root) / "contract.json", lambda data: data["contract"].update(version=99))


@defect("target", base="served", level=FAST)
def a_target_array_cut_short(root: Path) -> None:
    cut(largest(target_of(root), "c.*"))


@defect("target", base="served", level=FAST)
def a_target_index_that_fails_its_checksum(root: Path) -> None:
    path = largest(target_of(root), "c.*")
    flip(path, path.stat().st_size - 8)


@defect("target-episodes", base="served", level=FAST)
def a_target_made_from_other_episodes(root: Path) -> None:
    edit_json(target_of(root) / "contract.json", lambda data: data["contract"].update(source="0" * 32))


@defect("target-episodes", base="served")
def an_episode_without_its_target(root: Path) -> None:
    edit_column(target_of(root) / "episodes.parquet", "content", lambda rows: ["0" * 32, *rows[1:]])


@defect("target-values", base="served")
def a_token_that_is_no_bin(root: Path) -> None:
    path = largest(target_of(root), "c.*")
    data = bytearray(path.read_bytes())
    data[50] = 77
    path.write_bytes(bytes(data))


@defect("shards", base="served")
def a_byte_of_a_shard_changed(root: Path) -> None:
    path = next((root / "dpipe/shards").glob("*/part-*.parquet"))
    flip(path, path.stat().st_size // 2)


@defect("shards", base="served", level=FAST)
def a_shard_that_is_gone(root: Path) -> None:
    next((root / "dpipe/shards").glob("*/part-*.parquet")).unlink()


@defect("shards", base="served", level=FAST)
def shards_of_other_episodes(root: Path) -> None:
    edit_json(next((root / "dpipe/shards").glob("*/index.json")), lambda index: index.update(source="0" * 32))


@defect("refused", base="served", level=FAST)
def shards_that_name_a_file_elsewhere(root: Path) -> None:
    path = next((root / "dpipe/shards").glob("*/index.json"))
    edit_json(path, lambda index: index["parts"][0].update(file="../../../meta/info.json"))


def largest(folder: Path, pattern: str) -> Path:
    return max(folder.rglob(pattern), key=lambda path: path.stat().st_size if path.is_file() else -1)


# --- raw LIBERO ---------------------------------------------------------------------------------------------


def libero_file(root: Path) -> Path:
    return sorted(root.rglob("*.hdf5"))[0]


def edit_hdf5(path: Path, name: str, change: Callable[[np.ndarray], Any]) -> None:
    """One dataset, changed in place or returned anew."""
    with h5py.File(path, "r+") as file:
        value = file[name][()]
        changed = change(value)
        value = value if changed is None else changed
        del file[name]
        file.create_dataset(name, data=value)


@defect("columns", base="raw libero")
def a_file_without_its_data(root: Path) -> None:
    with h5py.File(libero_file(root), "r+") as file:
        file.move("data", "meta")


@defect("columns", base="raw libero")
def a_camera_that_was_not_recorded(root: Path) -> None:
    with h5py.File(libero_file(root), "r+") as file:
        del file["data/demo_0/obs/eye_in_hand_rgb"]


@defect("not-finite", base="raw libero")
def a_nan_in_a_demonstration(root: Path) -> None:
    edit_hdf5(libero_file(root), "data/demo_0/actions", lambda a: a.__setitem__((4, 1), np.nan))


@defect("row-count", base="raw libero")
def a_camera_a_frame_short(root: Path) -> None:
    edit_hdf5(libero_file(root), "data/demo_0/obs/agentview_rgb", lambda a: a[:-1])


@defect("gripper-range", base="raw libero")
def a_gripper_half_open(root: Path) -> None:
    edit_hdf5(libero_file(root), "data/demo_0/actions", lambda a: a.__setitem__((9, 6), 0.5))


@defect("misplaced", base="raw libero")
def a_file_in_another_suite(root: Path) -> None:
    path = libero_file(root)
    (root / "libero_object").mkdir()
    path.rename(root / "libero_object" / path.name)


@defect("time-pairing", base="raw libero")
def observations_from_before_their_action(root: Path) -> None:
    with h5py.File(libero_file(root), "r") as file:
        before = file["data/demo_0/states"][()][:, 1:8]
    edit_hdf5(libero_file(root), "data/demo_0/obs/joint_states", lambda _: before)


@defect("unreadable", base="raw libero")
def a_recording_cut_short(root: Path) -> None:
    cut(libero_file(root))


@defect("refused", base="raw libero")
def a_dataset_in_another_file(root: Path) -> None:
    with h5py.File(libero_file(root), "r+") as file:
        del file["data/demo_0/actions"]
        file["data/demo_0/actions"] = h5py.ExternalLink("/etc/passwd", "/actions")


@defect("video-black", base="raw libero")
def a_camera_that_was_covered(root: Path) -> None:
    edit_hdf5(libero_file(root), "data/demo_0/obs/eye_in_hand_rgb", lambda a: a[1:].fill(0))


@defect("contradiction", base="raw libero")
def two_arrays_that_should_agree(root: Path) -> None:
    edit_hdf5(libero_file(root), "data/demo_0/obs/ee_states", lambda a: a.__setitem__((3, 0), 9.0))


@defect("missing-file", base="raw libero", level=FAST)
def an_empty_recording(root: Path) -> None:
    libero_file(root).write_bytes(b"")


# --- raw CALVIN ---------------------------------------------------------------------------------------------


def calvin_frame(root: Path, number: int = 20) -> Path:
    return root / f"task_D_D/training/episode_{number:07d}.npz"


def edit_frame(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    with np.load(path) as file:
        members = {name: file[name].copy() for name in file.files}
    change(members)
    np.savez_compressed(path, **members)


@defect("missing-file", base="raw calvin")
def a_frame_that_is_missing(root: Path) -> None:
    calvin_frame(root).unlink()


@defect("unreadable", base="raw calvin")
def a_frame_cut_short(root: Path) -> None:
    cut(calvin_frame(root))


@defect("contradiction", base="raw calvin")
def relative_actions_of_another_frame(root: Path) -> None:
    edit_frame(calvin_frame(root), lambda members: members["rel_actions"].__setitem__(0, 0.123))


@defect("contradiction", base="raw calvin")
def a_frame_of_another_recording(root: Path) -> None:
    shutil.copy(calvin_frame(root, 35), calvin_frame(root, 20))


@defect("gripper-range", base="raw calvin", also="contradiction")
def a_gripper_that_says_zero(root: Path) -> None:
    edit_frame(
        calvin_frame(root),
        lambda members: [members[n].__setitem__(6, 0.0) for n in ("actions", "rel_actions")] and None,
    )


@defect("not-finite", base="raw calvin")
def a_nan_in_a_frame(root: Path) -> None:
    edit_frame(calvin_frame(root), lambda members: members["scene_obs"].__setitem__(3, np.nan))


@defect("segments", base="raw calvin")
def a_window_beyond_its_play_episode(root: Path) -> None:
    path = root / "task_D_D/training/lang_annotations/auto_lang_ann.npy"
    annotations = np.load(path, allow_pickle=True).item()
    annotations["info"]["indx"][1] = (40, 99)
    np.save(path, np.array(annotations, object))


@defect("refused", base="raw calvin")
def an_index_that_runs_a_command(root: Path) -> None:
    class Command:
        def __reduce__(self):
            return (os.system, ("true",))

    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|O", "fortran_order": False, "shape": ()})
    path = root / "task_D_D/training/lang_annotations/auto_lang_ann.npy"
    path.write_bytes(buffer.getvalue() + pickle.dumps(Command()))


@defect("split-leakage", base="raw calvin")
def validation_copied_from_training(root: Path) -> None:
    for number in range(60):
        shutil.copy(calvin_frame(root, number), root / f"task_D_D/validation/episode_{700 + number:07d}.npz")


# --- raw EgoDex ---------------------------------------------------------------------------------------------


def egodex(root: Path, suffix: str, number: int = 1) -> Path:
    return root / "part1/basic_pick_place" / f"{number}{suffix}"


@defect("missing-file", base="raw egodex")
def poses_without_a_video(root: Path) -> None:
    egodex(root, ".mp4").unlink()


@defect("video-count", base="raw egodex")
def a_video_a_frame_short(root: Path) -> None:
    draw_video(egodex(root, ".mp4"), 29, seed=1)


@defect("video-rate", base="raw egodex")
def a_video_of_25_frames_a_second(root: Path) -> None:
    draw_video(egodex(root, ".mp4"), 30, seed=1, fps=25)


def mirror(poses: np.ndarray) -> None:
    poses[3, :3, 0] *= -1


@defect("rotation", base="raw egodex")
def a_hand_turned_inside_out(root: Path) -> None:
    edit_hdf5(egodex(root, ".hdf5"), "transforms/leftHand", mirror)


@defect("not-finite", base="raw egodex")
def a_hand_that_is_nan(root: Path) -> None:
    edit_hdf5(egodex(root, ".hdf5"), "transforms/rightHand", lambda a: a.__setitem__((2, 0, 3), np.nan))


@defect("missing-file", base="raw egodex")
def a_hand_that_was_not_tracked(root: Path) -> None:
    with h5py.File(egodex(root, ".hdf5"), "r+") as file:
        del file["transforms/leftHand"]


@defect("columns", base="raw egodex")
def confidences_of_another_length(root: Path) -> None:
    edit_hdf5(egodex(root, ".hdf5"), "confidences/leftHand", lambda a: a[:-2])


@defect("unreadable", base="raw egodex")
def a_video_whose_table_is_gone(root: Path) -> None:
    cut(egodex(root, ".mp4"), 0.5)


@defect("video-black", base="raw egodex")
def a_headset_in_its_box(root: Path) -> None:
    egodex(root, ".mp4").unlink()
    write_video(egodex(root, ".mp4"), [np.zeros((48, 64, 3), np.uint8)] * 30, 30)


# --- raw AgiBot ---------------------------------------------------------------------------------------------


def agibot(root: Path, relative: str = "", number: int = 1) -> Path:
    kind = "observations" if relative.startswith("videos") else "proprio_stats"
    return root / kind / "327" / str(648640 + number) / (relative or "proprio_stats.h5")


@defect("missing-file", base="raw agibot")
def an_agibot_camera_that_is_missing(root: Path) -> None:
    agibot(root, "videos/hand_left_color.mp4").unlink()


@defect("video-count", base="raw agibot")
def an_agibot_video_a_frame_short(root: Path) -> None:
    draw_video(agibot(root, "videos/head_color.mp4"), 59, seed=10)


@defect("unreadable", base="raw agibot")
def an_agibot_recording_cut_short(root: Path) -> None:
    cut(agibot(root))


@defect("not-finite", base="raw agibot")
def a_joint_that_is_nan(root: Path) -> None:
    edit_hdf5(agibot(root), "state/joint/position", lambda a: a.__setitem__((5, 2), np.nan))


@defect("row-count", base="raw agibot")
def joints_of_another_length(root: Path) -> None:
    edit_hdf5(agibot(root), "state/joint/position", lambda a: a[:-3])


@defect("video-repeated", base="raw agibot", level=FULL)
def the_left_camera_for_the_right(root: Path) -> None:
    shutil.copy(agibot(root, "videos/hand_left_color.mp4"), agibot(root, "videos/hand_right_color.mp4"))
