"""Numbering: minutes of a million episodes, so it is stopped anywhere, goes on, and reads each file once."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from dpipe.pipeline import convert as convert_module
from dpipe.pipeline import finish as finish_module
from dpipe.pipeline.convert import convert
from dpipe.pipeline.execute import StopRequest, stop_requests
from dpipe.pipeline.progress import Progress
from dpipe.pipeline.request import ConvertRequest
from dpipe.pipeline.tables import FILES_A_TASK, READERS, read_columns, read_in_turn, write_parquet
from dpipe.schemas.errors import Interrupted
from dpipe.streams.dataset import open_dataset
from text_source import text_source
from trees import tree_digest

QUIET = Progress(quiet=True)
DPIPE = Path(sys.executable).parent / "dpipe"
# Two episodes a part; an episode is a number, and one below zero fails when it is read.
NUMBERS = """
def scan(recording, options):
    episodes = recording.files[0].read_text().split()
    return [
        EpisodeRef(f"{recording.name}/{n}", "train", 4, f"task {n % 2}", recording.files, (), locator={"x": x})
        for n, x in enumerate(episodes)
    ]

def read(ref, options):
    x = float(ref.locator["x"])
    if x < 0:
        raise DataError("x below zero")
    state = x + np.arange(8, dtype=np.float32).reshape(4, 2)
    return Episode(ref, {"observation.state": state, "action": -state, "force": state[:, :1].copy()}, {})

sidecar = (Feature("force", "float32", ("z",)),)
"""


def numbers(folder: Path, **files: str) -> ConvertRequest:
    asked = text_source(folder, "numbers", NUMBERS, part_frames=8)
    for name, text in files.items():
        (asked.raw / f"{name}.txt").write_text(text)
    return asked


class StopAt(StopRequest):
    """Asked to stop just before the n-th look."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def check(self) -> None:
        self.left -= 1
        if self.left == -1:
            self.set("SIGTERM")
        super().check()


def first_time(folder: Path) -> ConvertRequest:
    """Parts are made and not numbered; then one episode changes, and one that had not been read fails."""
    asked = numbers(folder, a="1 2 3", b="4 5")
    convert(replace(asked, share=(0, 2)), QUIET)
    return numbers(folder, a="1 9 3", b="4 -5")


def grown(folder: Path) -> ConvertRequest:
    """A finished dataset whose recordings have changed since, and become more."""
    convert(numbers(folder, a="1 2 3", b="4 5"), QUIET)
    return numbers(folder, a="1 9 3", b="4 5", c="6")


@pytest.mark.slow
@pytest.mark.parametrize("prepared", [first_time, grown])
def test_a_conversion_stopped_at_any_look_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch, prepared):
    asked = prepared(tmp_path)
    shutil.copytree(asked.out, tmp_path / "before")
    before = tree_digest(asked.out, without=("dpipe/journal", "dpipe/staging", "dpipe/spool"))
    looks = StopAt(-1)

    @contextmanager
    def ours(_: float | None):
        yield looks

    with monkeypatch.context() as until:
        until.setattr(convert_module, "stop_requests", ours)
        convert(asked, QUIET)
    whole, count = tree_digest(asked.out), -1 - looks.left
    episodes = 6 if before else 4
    assert open_dataset(asked.out).all_columns(["index"])["index"].tolist() == list(range(4 * episodes))
    assert count > 20
    for number in range(0, count, 2):
        shutil.rmtree(asked.out)
        shutil.copytree(tmp_path / "before", asked.out)
        looks = StopAt(number)
        with monkeypatch.context() as until:
            until.setattr(convert_module, "stop_requests", ours)
            with pytest.raises(Interrupted, match="stopped by SIGTERM; run the same command again"):
                convert(asked, QUIET)
        if (asked.out / "meta/info.json").exists():
            left = tree_digest(asked.out, without=("dpipe/journal", "dpipe/staging", "dpipe/spool"))
            assert left == before, number
        convert(asked, QUIET)
        assert tree_digest(asked.out) == whole, number


def test_what_is_read_for_statistics_may_be_more_than_memory_holds(tmp_path: Path, monkeypatch):
    asked = numbers(tmp_path, a=" ".join(map(str, range(40))))
    convert(asked, QUIET)
    opened: list[str] = []

    def reading(paths, columns=None):
        opened.extend(map(str, paths))
        yield from read_in_turn(paths, columns)

    monkeypatch.setattr(finish_module, "HELD_BYTES", 64)
    monkeypatch.setattr(finish_module, "BLOCK_BYTES", 24)
    monkeypatch.setattr(finish_module, "read_in_turn", reading)
    convert(replace(asked, out=tmp_path / "on disk"), QUIET)
    assert len(opened) == len(set(opened)) == 20  # parts, each once for both columns
    assert tree_digest(tmp_path / "on disk") == tree_digest(asked.out)


def test_files_that_are_opened_ahead_come_in_their_order(tmp_path: Path):
    paths = [tmp_path / f"{n}.parquet" for n in range(2 * READERS * FILES_A_TASK + 1)]
    for n, path in enumerate(paths):
        table = pa.table({"n": [n], "twice": [2 * n]})
        write_parquet(path, [table], table.schema)
    for some in (paths, paths[:3], []):
        found = [table.to_pydict() for table in read_in_turn(some, ["n"])]
        assert found == [read_columns(path, ["n"]).to_pydict() for path in some]


def test_a_request_to_stop_that_came_too_late_is_heard_by_what_follows():
    with stop_requests(None) as first:
        first.check()
        os.kill(os.getpid(), signal.SIGUSR1)
    with stop_requests(None) as second, pytest.raises(Interrupted, match="stopped by SIGUSR1"):
        second.check()
    with stop_requests(None) as third:
        third.check()


SLOWLY = """
import sys, time
from dpipe.pipeline import finish
reading = finish.read_in_turn
def slowly(paths, columns=None):
    print("numbering", flush=True)
    for table in reading(paths, columns):
        time.sleep(1)
        yield table
finish.read_in_turn = slowly
sys.argv[0] = "dpipe"
from dpipe.cli import main
main()
"""


@pytest.mark.parametrize("way", ["SIGINT", "SIGUSR1", "SIGTERM", "--max-time"])
def test_numbering_that_takes_long_stops_soon_and_exits_75(tmp_path: Path, way: str):
    asked = numbers(tmp_path, a=" ".join(map(str, range(80))))  # of 40 files, 40 seconds of such reading
    made = tmp_path / "lerobot" / "numbers"
    convert(replace(asked, out=made, name="numbers", share=(0, 1)), QUIET)
    settings = f'[sources.numbers]\nconverter = "{asked.source}"\nraw = "{asked.raw}"\n'
    (tmp_path / "dpipe.toml").write_text(settings)
    words = ["finish", "numbers", "--workspace", str(tmp_path), "--workers", "0", "--part-frames", "8"]
    run = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *words, *(["--max-time", "3"] if way == "--max-time" else [])],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert run.stdout is not None
    if way != "--max-time":
        assert run.stdout.readline() == "numbering\n"
        run.send_signal(getattr(signal, way))
    asked_at = time.monotonic()
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 75 and f"stopped by {way}" in said and "run the same command again" in said, said
    assert time.monotonic() - asked_at < 30
    assert not (made / "meta" / "info.json").exists() and not (made / "dpipe" / "manifest.json").exists()
    again = subprocess.run([DPIPE, *words], capture_output=True, text=True)
    assert again.returncode == 0 and "80 episodes" in again.stdout, again.stderr
    rows = open_dataset(made).all_columns(["index", "observation.state"])
    assert np.array_equal(rows["index"], np.arange(320))
    assert np.array_equal(rows["observation.state"][::4, 0], np.arange(80))


def test_a_part_that_is_dropped_whole_leaves_the_others_pictures_counted(tmp_path: Path):
    filmed = """
from dpipe.schemas.features import CameraFeature

class Grey:
    height = width = 32

    def __init__(self, level):
        self.level = level

    def __len__(self):
        return 4

    def read(self, start, stop):
        return np.full((stop - start, 32, 32, 3), self.level, np.uint8)

def scan(recording, options):
    at, cameras = recording.files, (CameraFeature("image", 32, 32),)
    return [
        EpisodeRef(f"{recording.name}/{n}", "train", 4, "look", at, cameras, locator={"x": int(x)})
        for n, x in enumerate(at[0].read_text().split())
    ]

def read(ref, options):
    if ref.locator["x"] < 0:
        raise DataError("x below zero")
    still = np.zeros((4, 2), np.float32)
    return Episode(ref, {"observation.state": still, "action": still}, {"image": Grey(ref.locator["x"])})
"""
    asked = text_source(tmp_path, "filmed", filmed, part_frames=8)
    (asked.raw / "a.txt").write_text("-1 -1 51 51 102")
    assert (convert(asked, QUIET).episodes, convert(asked, QUIET).unchanged) == (3, True)
    rows = pa.concat_tables(
        pa.parquet.read_table(path) for path in sorted((asked.out / "meta/episodes").rglob("*.parquet"))
    )
    assert rows.column("stats/observation.images.image/count").to_pylist() == [[4], [4], [4]]
    mean = open_dataset(asked.out).stats["observation.images.image"]["mean"]
    assert np.ravel(mean) == pytest.approx((51 + 51 + 102) / 3 / 255, abs=0.01)
