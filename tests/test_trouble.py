"""What goes wrong on machines: killed workers, schedulers gone, full and failing disks, clocks set back.

Each loses nothing: a clear message, and the same command afterwards gives the bytes of an undisturbed run.
"""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dask_by_hand import dask_cluster
from dpipe.converters import libero
from dpipe.pipeline import durable
from dpipe.pipeline.durable import exclusive
from dpipe.pipeline.precompute import precompute
from dpipe.schemas.errors import DataError
from raw_libero import write_suite
from tiny_dataset import write_tiny
from trees import run_convert, tree_digest

DPIPE = Path(sys.executable).parent / "dpipe"
JOURNAL = "dpipe/journal"


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*.mp4")}


# --- workers and schedulers -----------------------------------------------------------------------------------

DEADLY = '''
import os
import signal
from dataclasses import replace
from pathlib import Path

from dpipe.converters import libero

def read(ref, options):
    """demo_1 takes its first worker down, demo_2 every one."""
    mark = Path({mark!r})
    if ref.source_id.endswith("demo_1") and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if ref.source_id.endswith("demo_2") and {always}:
        os.kill(os.getpid(), signal.SIGKILL)
    return libero.CONVERTER.read(ref, options)

CONVERTER = replace(libero.CONVERTER, read=read)
'''


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_worker_costs_nothing_and_what_kills_three_is_left_out(tmp_path: Path):
    write_suite(tmp_path / "raw", demos=4)
    whole = run_convert(tmp_path / "raw", tmp_path / "whole", part_frames=25)
    script = tmp_path / "deadly.py"
    for always in (False, True):
        mark = tmp_path / f"killed-{always}"
        script.write_text(DEADLY.format(mark=str(mark), always=always))
        out = tmp_path / f"out-{always}"
        result = run_convert(tmp_path / "raw", out, str(script), part_frames=25, workers=2)
        assert mark.exists()
        if not always:
            assert result.episodes == 4
            assert tree_digest(out / "videos") == tree_digest(tmp_path / "whole" / "videos")
            assert tree_digest(out / "data") == tree_digest(tmp_path / "whole" / "data")
    (left,) = result.dropped
    assert left.source_id.endswith("demo_2") and "took 3 workers down" in left.reason
    assert result.episodes == whole.episodes - 1


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_scheduler_that_goes_away_stops_the_run_and_a_new_one_goes_on(tmp_path: Path):
    write_suite(tmp_path / "raw", demos=30, steps=30, side=96)
    words = [DPIPE, "convert", "libero", "--raw", tmp_path / "raw", "--name", "set", "--part-frames", "200"]
    command = [*map(str, words), "--out", str(tmp_path / "out")]
    with dask_cluster(tmp_path, workers=1) as (address, processes):
        run = subprocess.Popen([*command, "--scheduler", address], stderr=subprocess.PIPE, text=True)
        spool = tmp_path / "out" / "dpipe" / "spool"
        deadline = time.monotonic() + 60
        while not (spool.is_dir() and any(spool.iterdir())) and time.monotonic() < deadline:
            time.sleep(0.02)
        for process in processes:
            process.kill()
        said = run.communicate(timeout=120)[1]
    assert run.returncode == 1 and "went away" in said and "run the same command again" in said, said
    assert not (tmp_path / "out" / "meta").exists()
    with dask_cluster(tmp_path, workers=1) as (address, _):
        assert subprocess.run([*command, "--scheduler", address], capture_output=True).returncode == 0
    run_convert(tmp_path / "raw", tmp_path / "whole", part_frames=200)
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_dask_workers_started_by_hand_convert_and_precompute_together(tmp_path: Path):
    write_suite(tmp_path / "raw", demos=4)
    run_convert(tmp_path / "raw", tmp_path / "here", part_frames=25)
    with dask_cluster(tmp_path, workers=2) as (address, _):
        run_convert(tmp_path / "raw", tmp_path / "there", part_frames=25, scheduler=address)
        assert tree_digest(tmp_path / "there") == tree_digest(tmp_path / "here")
        precompute(tmp_path / "there", ["stats", "fast"], scheduler=address)
    precompute(tmp_path / "here", ["stats", "fast"])
    assert tree_digest(tmp_path / "there") == tree_digest(tmp_path / "here")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_bytes_do_not_depend_on_one_two_or_four_workers_or_on_parts(tmp_path: Path):
    write_suite(tmp_path / "raw", demos=6)
    run_convert(tmp_path / "raw", tmp_path / "whole", part_frames=25)
    expected = tree_digest(tmp_path / "whole")
    for workers in (1, 2, 4):
        run_convert(tmp_path / "raw", tmp_path / "out", part_frames=25, workers=workers)
        assert tree_digest(tmp_path / "out") == expected
        shutil.rmtree(tmp_path / "out")
    for job in (1, 0):
        run_convert(tmp_path / "raw", tmp_path / "out", part_frames=25, share=(job, 2))
    run_convert(tmp_path / "raw", tmp_path / "out", part_frames=25, finish_only=True)
    assert tree_digest(tmp_path / "out") == expected


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("way", ["SIGINT", "SIGUSR1", "SIGTERM", "--max-time"])
def test_a_request_to_stop_is_met_within_a_minute_and_told_in_events(tmp_path: Path, way: str):
    """Ctrl-C and batch systems signal every process of a job; SIGTERM goes to the command alone."""
    write_suite(tmp_path / "raw", demos=60, steps=60, side=128)
    words = ["convert", "libero", "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--workers", "2"]
    words += ["--name", "set", "--json", *(["--max-time", "1"] if way == "--max-time" else [])]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    run = subprocess.Popen([DPIPE, *map(str, words)], **pipes, text=True, start_new_session=True)
    spool = tmp_path / "out" / "dpipe" / "spool"
    deadline = time.monotonic() + 90
    while way != "--max-time" and not any(spool.glob("*.episode")) and time.monotonic() < deadline:
        time.sleep(0.02)
    if way == "SIGTERM":
        run.send_signal(signal.SIGTERM)
    elif way != "--max-time":
        os.killpg(run.pid, getattr(signal, way))
    out, said = run.communicate(timeout=60)
    events = [json.loads(line) for line in said.splitlines()]  # nothing else, no traceback of a worker
    assert run.returncode == 75 == events[-1]["exit_code"], events
    assert f"stopped by {way}" in events[-1]["text"] and "run the same command again" in events[-1]["text"]
    assert not out and (way == "--max-time" or {"begin", "message"} <= {event["event"] for event in events})
    assert not (tmp_path / "out" / "meta").exists()


# --- disks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB, or a skip where nobody may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs needs root: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_fills_up_stops_the_run_and_more_room_lets_it_go_on(
    small_disk: Path, tmp_path: Path, monkeypatch
):
    write_suite(tmp_path / "raw", demos=12, steps=20, side=48)
    run_convert(tmp_path / "raw", tmp_path / "whole", part_frames=60)
    monkeypatch.setattr("dpipe.pipeline.convert._require_room", lambda *_: None)  # an estimate may be wrong
    with pytest.raises(DataError, match=r"is full[\s\S]*run the same command again"):
        run_convert(tmp_path / "raw", small_disk / "out", part_frames=60)
    assert not (small_disk / "out" / "meta" / "info.json").exists()
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    result = run_convert(tmp_path / "raw", small_disk / "out", part_frames=60)
    assert result.encoded < 12  # what was done before was kept
    assert tree_digest(small_disk / "out") == tree_digest(tmp_path / "whole")


def test_a_run_that_cannot_fit_is_refused_before_it_starts(tmp_path: Path, monkeypatch):
    write_suite(tmp_path / "raw", demos=3, steps=12, side=32)
    monkeypatch.setattr(
        durable.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000)
    )
    with pytest.raises(DataError, match=r"converting 3 episodes needs about .* GB, 0.00 GB are free"):
        run_convert(tmp_path / "raw", tmp_path / "out")
    assert not (tmp_path / "out" / "dpipe" / "spool").exists()


def test_a_full_disk_while_numbering_is_one_message(tmp_path: Path, monkeypatch):
    write_suite(tmp_path / "raw")
    run_convert(tmp_path / "raw", tmp_path / "whole")

    def full(name: str) -> None:
        if "episodes.parquet" in name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable, "POINT", full)
    with pytest.raises(DataError, match=r"is full[\s\S]*run the same command again"):
        run_convert(tmp_path / "raw", tmp_path / "out")
    monkeypatch.undo()
    run_convert(tmp_path / "raw", tmp_path / "out")
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")


def test_a_read_error_stops_after_everything_else_is_done(tmp_path: Path, monkeypatch):
    write_suite(tmp_path / "raw", demos=4)
    run_convert(tmp_path / "raw", tmp_path / "whole", part_frames=25)
    sound = libero.DemoFrames.read

    def failing(self, start: int, stop: int):
        if "demo_1/" in self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "disk")
        return sound(self, start, stop)

    monkeypatch.setattr(libero.DemoFrames, "read", failing)
    with pytest.raises(
        DataError, match=r"1 episodes could not be read[\s\S]*demo_1[\s\S]*Input/output error"
    ):
        run_convert(tmp_path / "raw", tmp_path / "out", part_frames=25)
    monkeypatch.undo()
    result = run_convert(tmp_path / "raw", tmp_path / "out", part_frames=25)
    assert result.encoded == 1 and not result.dropped
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")


# --- clocks and locks -----------------------------------------------------------------------------------------


def test_a_clock_set_back_loses_nothing(tmp_path: Path):
    path = write_suite(tmp_path / "raw")
    run_convert(tmp_path / "raw", tmp_path / "out", limit=2)
    for file in (path, *(p for p in (tmp_path / "out").rglob("*") if p.is_file())):
        os.utime(file, (4e9, 4e9))  # the year 2096: written before the clock was set back
    result = run_convert(tmp_path / "raw", tmp_path / "out")
    assert (result.episodes, result.encoded) == (3, 1)
    assert run_convert(tmp_path / "raw", tmp_path / "out").unchanged


def test_a_lock_from_the_future_is_held_while_it_is_refreshed_and_taken_over_when_it_is_not(tmp_path: Path):
    lock = tmp_path / "running.lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "what": "convert"}))
    os.utime(lock, (4e9, 4e9))
    refreshing = threading.Timer(0.05, os.utime, (lock, (4e9 + 1, 4e9 + 1)))
    refreshing.start()
    with pytest.raises(DataError, match="another run"), exclusive(tmp_path, "mine", stale_s=1.0):
        pass
    with exclusive(tmp_path, "mine", stale_s=1.0):
        assert json.loads(lock.read_text())["what"] == "mine"
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_stops_where_the_file_system_knows_no_locks(tmp_path: Path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    for name in ("flock", "lockf", "fcntl"):
        monkeypatch.setattr(fcntl, name, no_locks)
    write_suite(tmp_path / "raw")
    other = {"host": "elsewhere", "pid": 1, "what": "convert libero"}
    (tmp_path / "out" / JOURNAL).mkdir(parents=True)
    (tmp_path / "out" / JOURNAL / "running.lock").write_text(json.dumps(other))
    with pytest.raises(
        DataError, match=r"another run is working on [\s\S]*convert libero by process 1 on elsewhere"
    ):
        run_convert(tmp_path / "raw", tmp_path / "out")
    (tmp_path / "out" / JOURNAL / "running.lock").unlink()
    assert run_convert(tmp_path / "raw", tmp_path / "out").episodes == 3


# --- late drops, discarded recordings -------------------------------------------------------------------------


def test_a_late_drop_in_the_middle_rewrites_tables_only(tmp_path: Path, monkeypatch):
    path = write_suite(tmp_path / "raw", demos=5)
    run_convert(tmp_path / "raw", tmp_path / "out", part_frames=25)
    videos = inodes(tmp_path / "out" / "videos")

    def failing(self, start: int, stop: int):
        raise DataError("pictures cannot be read any more")

    import h5py

    with h5py.File(path, "a") as file:
        file["data/demo_2/obs/agentview_rgb"][0] += 1  # changed, and now unreadable
    sound = libero.DemoFrames.read
    monkeypatch.setattr(
        libero.DemoFrames,
        "read",
        lambda self, a, b: failing(self, a, b) if "demo_2/" in self.name else sound(self, a, b),
    )
    result = run_convert(tmp_path / "raw", tmp_path / "out", part_frames=25)
    assert (result.episodes, len(result.dropped)) == (4, 1)
    assert inodes(tmp_path / "out" / "videos") == videos
    from dpipe.streams.dataset import open_dataset

    rows = open_dataset(tmp_path / "out").all_columns(["index", "episode_index"])
    assert rows["index"].tolist() == list(range(11 + 12 + 14 + 15)) and set(rows["episode_index"]) == {
        0,
        1,
        2,
        3,
    }


def test_a_recording_discarded_once_its_receipt_is_durable_is_not_read_again(tmp_path: Path, monkeypatch):
    from raw_libero import demo_arrays, write_raw

    first = write_raw(tmp_path / "raw/libero_goal/a_demo.hdf5", {0: demo_arrays(12)})
    write_raw(tmp_path / "raw/libero_goal/b_demo.hdf5", {0: demo_arrays(12, 1)})
    shutil.copytree(tmp_path / "raw", tmp_path / "kept")
    run_convert(tmp_path / "kept", tmp_path / "whole", part_frames=11)
    run_convert(tmp_path / "raw", tmp_path / "out", part_frames=11, share=(0, 2))  # the first part alone
    first.unlink()
    read: list[str] = []
    sound = libero.CONVERTER.read
    monkeypatch.setattr(libero, "CONVERTER", _reading(read, sound))
    result = run_convert(tmp_path / "raw", tmp_path / "out", part_frames=11)
    assert result.episodes == 2 and not result.dropped
    assert read == ["libero_goal/b_demo/demo_0"]
    assert tree_digest(tmp_path / "out" / "videos") == tree_digest(tmp_path / "whole" / "videos")


@pytest.mark.parametrize("harm", ["nothing", "one bit", "zeros", "cut"])
def test_a_spool_file_that_a_power_cut_tore_is_made_anew(tmp_path: Path, monkeypatch, harm: str):
    write_suite(tmp_path / "raw", demos=2, steps=8, side=16)
    run_convert(tmp_path / "raw", tmp_path / "whole")
    read: list[str] = []
    sound = libero.CONVERTER.read

    def failing(ref, options):
        if ref.source_id.endswith("demo_1"):
            raise RuntimeError("the power goes")
        return sound(ref, options)

    with monkeypatch.context() as until:
        until.setattr(libero, "CONVERTER", _reading(read, failing))
        with pytest.raises(DataError, match="the power goes"):
            run_convert(tmp_path / "raw", tmp_path / "out")
    (spool,) = (tmp_path / "out/dpipe/spool").glob("*.episode")
    held = bytearray(spool.read_bytes())
    if harm == "one bit":
        held[len(held) // 3] ^= 1
    elif harm == "zeros":  # a page whose place was given out and never written
        held[: len(held) // 2] = bytes(len(held) // 2)
    spool.write_bytes(held[:-9] if harm == "cut" else held)
    monkeypatch.setattr(libero, "CONVERTER", _reading(read, sound))
    read.clear()
    run_convert(tmp_path / "raw", tmp_path / "out")
    again = ["libero_goal/a_demo/demo_0"] if harm != "nothing" else []
    assert [name[-6:] for name in read] == [name[-6:] for name in again] + ["demo_1"]
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")


def _reading(read: list[str], sound):
    from dataclasses import replace

    def noting(ref, options):
        read.append(ref.source_id)
        return sound(ref, options)

    return replace(libero.CONVERTER, read=noting)


def test_a_recording_removed_before_it_was_converted_is_left_out_by_name(tmp_path: Path):
    from raw_libero import demo_arrays, write_raw

    write_raw(tmp_path / "raw/libero_goal/a_demo.hdf5", {0: demo_arrays(12)})
    second = write_raw(tmp_path / "raw/libero_goal/b_demo.hdf5", {0: demo_arrays(12, 1)})
    run_convert(tmp_path / "raw", tmp_path / "out", part_frames=11, share=(0, 2))
    second.unlink()
    result = run_convert(tmp_path / "raw", tmp_path / "out", part_frames=11)
    assert result.episodes == 1 and "no longer in" in result.dropped[0].reason
    write_raw(second, {0: demo_arrays(12, 1)})
    assert run_convert(tmp_path / "raw", tmp_path / "out", part_frames=11).episodes == 2


def test_a_target_on_a_full_disk_is_one_message(tmp_path: Path, monkeypatch):
    from dpipe.streams import arrays

    root = write_tiny(tmp_path / "set", [(0, 9)])

    def full(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(arrays.ArrayWriter, "close", full)
    with pytest.raises(DataError, match=r"is full[\s\S]*run the same command again"):
        precompute(root, ["fast"])
    monkeypatch.undo()
    (made,) = precompute(root, ["fast"])
    assert made.computed_episodes == 1
