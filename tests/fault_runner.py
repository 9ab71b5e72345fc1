"""Run a conversion again and again, leaving the process at one durable step after the other. A script.

    python fault_runner.py SOURCE RAW OUT

For n = 0, 1, 2, ...: start from nothing, `os._exit` at the n-th fsync, rename or unlink; what is on disk must
open or be plainly unfinished; the same command must then give the bytes of an undisturbed run. Prints one JSON
line with the counts. Children are forked from a process that has imported everything and started no thread.
"""

import json
import os
import shutil
import sys
from pathlib import Path

# Imported before forking, so that the children need not: lazy imports are most of a small conversion's time.
import av  # noqa: F401
import h5py  # noqa: F401
import pandas  # noqa: F401
import pyarrow.parquet  # noqa: F401
from dpipe.converters import libero  # noqa: F401
from dpipe.pipeline import card, convert, durable, finish, payload, spool  # noqa: F401
from dpipe.schemas.errors import DataError
from dpipe.streams.dataset import open_dataset
from dpipe.video import encode  # noqa: F401
from trees import run_convert, tree_digest

EXIT = 77


def in_child(source: str, raw: Path, out: Path, leave_at: int | None) -> int:
    """Convert in a forked child; its exit code (EXIT: it left at the fault point)."""
    child = os.fork()
    if child == 0:
        passed = 0

        def point(name: str) -> None:
            nonlocal passed
            if passed == leave_at:
                os._exit(EXIT)
            passed += 1

        durable.POINT = point
        finish.POINT = point
        try:
            run_convert(raw, out, source, part_frames=30)
        except BaseException as error:  # noqa: BLE001 - the parent must hear of it whatever it is
            print(f"child failed: {error!r}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state_on_disk(out: Path) -> str:
    """'unfinished' when nothing claims to be a dataset, else 'complete' after every row was read."""
    if not (out / "meta" / "info.json").exists():
        return "unfinished"
    try:
        dataset = open_dataset(out)
    except DataError as error:
        assert "is unfinished" in str(error), error
        return "unfinished"
    rows = dataset.all_columns(["action", "index"])
    assert (
        len(rows["action"]) == dataset.total_frames and (rows["index"] == range(dataset.total_frames)).all()
    )
    return "complete"


def main() -> None:
    source, raw, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    assert in_child(source, raw, out, None) == 0
    expected = tree_digest(out)
    counts = {"points": 0, "unfinished": 0, "complete": 0}
    while True:
        shutil.rmtree(out)
        code = in_child(source, raw, out, counts["points"])
        if code == 0:
            break
        assert code == EXIT, code
        # Reading starts threads, and a forked child of a threaded process may hang: look from another process.
        looker = os.fork()
        if looker == 0:
            os._exit({"unfinished": 10, "complete": 11}[state_on_disk(out)])
        seen = os.waitstatus_to_exitcode(os.waitpid(looker, 0)[1])
        counts[{10: "unfinished", 11: "complete"}[seen]] += 1
        assert in_child(source, raw, out, None) == 0
        assert tree_digest(out) == expected, f"bytes differ after leaving at point {counts['points']}"
        counts["points"] += 1
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
