"""A Dask scheduler and its workers as a user starts them by hand, on loopback. Helpers, not a test file."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def dask_cluster(folder: Path, workers: int) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """(address, [scheduler, worker, ...]); what still lives at the end is ended."""
    note = folder / f"scheduler-{time.monotonic_ns()}.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    scheduler = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    started = [subprocess.Popen([*scheduler, "--no-dashboard", "--scheduler-file", note], **quiet)]
    try:
        deadline = time.monotonic() + 60
        while not (note.is_file() and note.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
        address = json.loads(note.read_text())["address"]
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1"]
        for _ in range(workers):
            words = [*worker, "--no-dashboard", "--host", "127.0.0.1"]
            started.append(subprocess.Popen(words, **quiet))
        yield address, started
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(20)
