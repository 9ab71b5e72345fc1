"""Runs that are divided, stopped and scaled out: the same bytes, or a clear word and a way on."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from dpipe.pipeline.execute import Executor, Failure, StopRequest, open_executor
from dpipe.pipeline.slurm import parse_share, sbatch_script
from dpipe.schemas.errors import DataError, Interrupted, UsageError
from raw_libero import demo_arrays, write_raw, write_suite
from trees import run_convert, tree_digest

DPIPE = Path(sys.executable).parent / "dpipe"


def dpipe(*words: object, **settings) -> subprocess.CompletedProcess[str]:
    return subprocess.run([DPIPE, *map(str, words)], capture_output=True, text=True, **settings)


def test_a_divided_conversion_gives_the_bytes_of_a_whole_one(tmp_path: Path):
    write_suite(tmp_path / "raw", demos=5)
    run_convert(tmp_path / "raw", tmp_path / "whole", part_frames=25)
    for job in (2, 0, 1):
        partial = run_convert(tmp_path / "raw", tmp_path / "divided", part_frames=25, share=(job, 3))
        assert not partial.finished
        if job != 1:
            with pytest.raises(DataError, match="parts are not done"):
                run_convert(tmp_path / "raw", tmp_path / "divided", part_frames=25, finish_only=True)
    run_convert(tmp_path / "raw", tmp_path / "divided", part_frames=25, finish_only=True)
    assert tree_digest(tmp_path / "divided") == tree_digest(tmp_path / "whole")


def test_jobs_of_one_division_run_beside_each_other_but_not_beside_the_whole(tmp_path: Path):
    from dpipe.pipeline.durable import exclusive

    with exclusive(tmp_path, "a", share=(0, 2)):
        with exclusive(tmp_path, "b", share=(1, 2)):
            pass
        with pytest.raises(DataError, match="another run"), exclusive(tmp_path, "a", share=(0, 2)):
            pass
        with pytest.raises(DataError, match="another run"), exclusive(tmp_path, "whole"):
            pass
    with (
        exclusive(tmp_path, "whole"),
        pytest.raises(DataError, match="another run"),
        exclusive(tmp_path, "a", share=(0, 2)),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_a_dead_process_is_taken_over(tmp_path: Path):
    from dpipe.pipeline.durable import exclusive

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = os.uname().nodename
    (tmp_path / "running.lock").write_text(json.dumps({"host": host, "pid": dead.pid, "what": "convert"}))
    with exclusive(tmp_path, "mine"):
        assert json.loads((tmp_path / "running.lock").read_text())["what"] == "mine"


def test_shares_are_parsed_or_refused():
    assert parse_share("3/16") == (3, 16)
    for wrong in ("16/16", "3", "a/b", "-1/4"):
        with pytest.raises(UsageError, match="expected i/n"):
            parse_share(wrong)


def test_the_sbatch_script_is_one_a_shell_accepts():
    script = sbatch_script(["convert", "libero", "--raw", "/data/a b"], 8, 4, 7200)
    assert "#SBATCH --array=0-7" in script and "--raw '/data/a b'" in script and "02:00:00" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_an_executor_reports_failures_and_honours_a_stop():
    stop = StopRequest()
    executor = Executor(stop)
    executor.submit("good", divmod, 7, 2)
    executor.submit("bad", divmod, 7, 0)
    results = executor.results()
    assert next(results) == ("good", (3, 1))
    key, failure = next(results)
    assert key == "bad" and isinstance(failure, Failure) and "ZeroDivisionError" in failure.message
    executor.submit("never", divmod, 1, 1)
    stop.set("SIGTERM")
    with pytest.raises(Interrupted, match="run the same command again"):
        next(results)


@pytest.mark.slow
def test_local_workers_leave_no_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with open_executor(StopRequest(), workers=1, scheduler=None) as executor:
        executor.submit("a", abs, -3)
        assert dict(executor.results()) == {"a": 3}
        assert list(tmp_path.iterdir())  # Dask keeps its locks somewhere while it runs
    assert not list(tmp_path.iterdir())


def test_sigterm_drains_exits_75_and_the_rerun_gives_the_same_bytes(tmp_path: Path):
    write_suite(tmp_path / "raw", demos=40, steps=40, side=128)
    words = [
        "convert",
        "libero",
        "--raw",
        tmp_path / "raw",
        "--part-frames",
        "400",
        "--workers",
        "0",
        "--name",
        "set",
    ]
    assert dpipe(*words, "--out", tmp_path / "whole").returncode == 0
    run = subprocess.Popen(
        [DPIPE, *map(str, words), "--out", str(tmp_path / "out")], stderr=subprocess.PIPE, text=True
    )
    spool = tmp_path / "out" / "dpipe" / "spool"
    deadline = time.monotonic() + 60
    while not (spool.is_dir() and any(spool.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 75 and "run the same command again" in said, said
    assert not (tmp_path / "out" / "meta").exists()
    assert dpipe(*words, "--out", tmp_path / "out").returncode == 0
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")


def test_the_command_line_says_what_was_made_and_what_was_left_out(tmp_path: Path):
    bad = demo_arrays(13, 1)
    bad["actions"][4, 0] = 2.0
    write_raw(tmp_path / "raw/libero/libero_goal/t_demo.hdf5", {0: demo_arrays(12), 1: bad})
    words = ("convert", "libero", "--to", "lerobot", "--workspace", tmp_path, "--workers", "0")
    done = dpipe(*words)
    assert done.returncode == 3, done.stderr
    assert "1 episodes, 11 frames" in done.stdout and "1 left out" in done.stdout
    assert "left out: libero_goal/t_demo/demo_1: actions beyond [-1, 1]" in done.stderr
    assert dpipe(*words).returncode == 3  # a property of the dataset: said again
    assert dpipe(*words, "--allow-dropped").returncode == 0
    facts = json.loads(dpipe(*words, "--json").stdout)
    assert facts["unchanged"] and facts["dropped"][0]["source_id"] == "libero_goal/t_demo/demo_1"
    told = dpipe("status", "--workspace", tmp_path).stdout
    assert "dataset  complete   libero: 1 episodes, 11 frames, 1 left out" in told


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("convert", "libera"), 2, "Did you mean 'libero'?"),
        (("convert", "libero", "--codec", "vp9"), 2, "'vp9' is not one of"),
        (("convert", "libero", "--resize", "big"), 2, "expected WIDTHxHEIGHT"),
        (("convert", "libero"), 1, "dpipe sample libero"),
        (("precompute", "tokenz"), 2, "Did you mean 'tokens'?"),
        (("train", "libre"), 2, "Did you mean 'libra'?"),
        (("train", "libra"), 2, "dpipe sample libero"),
        (("replay", "nothing"), 2, "no dataset 'nothing'"),
    ],
)
def test_wrong_words_get_one_message_and_no_traceback(tmp_path: Path, words, code: int, says: str):
    done = dpipe(*words, "--workspace", tmp_path)
    assert done.returncode == code and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_plan_writes_nothing(tmp_path: Path):
    write_suite(tmp_path / "raw" / "libero", demos=2)
    before = tree_digest(tmp_path)
    done = dpipe("plan", "convert", "libero", "--workspace", tmp_path)
    assert done.returncode == 0 and "to do   2 episodes, 23 frames" in done.stdout, done.stdout + done.stderr
    assert tree_digest(tmp_path) == before


def test_help_answers_without_heavy_imports():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dpipe.cli", "--help"], capture_output=True, text=True
    )
    loaded = {
        line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line
    }
    assert done.returncode == 0 and "dpipe train libra" in done.stdout
    assert not loaded & {"numpy", "torch", "pyarrow", "h5py", "av", "dask", "distributed", "pandas"}


def test_a_rerun_with_nothing_to_do_imports_neither_torch_nor_distributed_nor_pandas(tmp_path: Path):
    write_suite(tmp_path / "raw", demos=2)
    out = ["--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), "--name", "set"]
    assert dpipe("convert", "libero", *out, "--workers", "0").returncode == 0
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dpipe.cli", "convert", "libero", *out],
        capture_output=True,
        text=True,
    )
    loaded = {
        line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line
    }
    assert done.returncode == 0 and "already complete" in done.stdout
    assert not loaded & {"torch", "distributed", "pandas", "h5py", "av"}
