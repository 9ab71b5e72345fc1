"""Run one subject again and again, leaving the process at one durable step after the other. A script.

    python fault_runner.py SUBJECT FOLDER      SUBJECT: a source's or a stage's name

For n = 0, 1, 2, ...: start anew, `os._exit` at the n-th fsync, rename or unlink of the run, whoever calls it; what
is on disk must open or be plainly unfinished; the same run must then give the bytes of an undisturbed one. Prints
one JSON line with the counts. Children are forked from a process that has imported everything and started no
thread.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # no thread may be there when we fork

# Imported before forking, so that the children need not: lazy imports are most of a small run's time.
import av  # noqa: F401
import h5py  # noqa: F401
import pandas  # noqa: F401
import pyarrow.parquet  # noqa: F401
from dpipe.converters import SOURCES
from dpipe.pipeline import card, convert, durable, finish, payload, plan, spool  # noqa: F401
from dpipe.pipeline.precompute import precompute
from dpipe.schemas.errors import DataError
from dpipe.streams.dataset import open_dataset
from dpipe.streams.targets import open_targets
from dpipe.video import encode  # noqa: F401
from trees import run_convert, tree_digest

EXIT = 77
OPERATIONS = ("fsync", "rename", "replace", "unlink")


# --- subjects -------------------------------------------------------------------------------------------------


def write_source(source: str, raw: Path) -> None:
    """Two small episodes as published."""
    if source == "libero":
        from raw_libero import write_suite

        write_suite(raw, demos=2, steps=6, side=16)
    elif source == "calvin":
        from raw_calvin import write_split

        write_split(raw / "training", [(0, 5), (6, 11)], [(1, 4, "lift the block", "lift_block")])
    elif source == "egodex":
        from raw_egodex import write_episode

        for number in range(2):
            write_episode(raw / "part1" / "stack_cups" / str(number), frames=5, confidence=False)
    elif source == "agibot":
        import raw_agibot

        for number in range(2):
            raw_agibot.write_episode(raw, 648649 + number)
    else:
        from small_datasets import write_dataset

        write_dataset(raw, [5, 4])


def write_stage(stage: str, folder: Path) -> dict[str, Any]:
    """A small dataset in folder/set, and the stage's options; policies are small and untrained."""
    from tiny_dataset import CAMERA, write_tiny

    write_tiny(folder / "set", [(0, 7), (1, 5)], parts=[1, 1], camera=True)
    kinds = {
        "teacher": ("teacher", "teacher"),
        "residuals": ("anchor", "anchor"),
        "privileged": ("base", "flow"),
    }
    if stage == "tokens":
        return {"probe": "none"}
    if stage == "foresight":
        return {"limit": 9}
    if stage not in kinds:
        return {}
    import numpy as np
    import torch
    from dpipe.models.policies import EmbeddedPolicy, PolicyConfig, save_policy
    from dpipe.schemas.normalisers import fit
    from tiny_dataset import ACTION, episode_columns

    torch.set_num_threads(1)
    option, kind = kinds[stage]
    shape = {"width": 32, "heads": 2, "image_size": 32, "points": 4, "action_dim": 4}
    shape |= {"cameras": (CAMERA,), "state_mean": (0.0,) * 4, "state_std": (1.0,) * 4, "layers": 1}
    rows = np.concatenate([episode_columns(0, 7)["action"], episode_columns(1, 5)["action"]])
    terms = {"seed": 0, "steps": 0, "split": "train"}
    if kind == "flow":
        from dpipe.models.flow_policy import FlowConfig, FlowPolicy, save_flow

        network = FlowPolicy(FlowConfig(**shape, chunk=3, future=(1, 2)))
        save_flow(folder / "policy", network, fit(rows, names=ACTION), terms)
    else:
        config = PolicyConfig(
            kind=kind, grippers=(3,), queries=3, **shape, **({"window": 3} if kind == "teacher" else {})
        )
        save_policy(folder / "policy", EmbeddedPolicy(config), fit(rows, names=ACTION), terms)
    return {option: f"embedded:{folder / 'policy'}"}


def subject(
    name: str, folder: Path
) -> tuple[Callable[[], None], Callable[[], None], Callable[[], bool], Path]:
    """(start anew, run, whether what is there is complete, the folder whose bytes count)."""
    if name in SOURCES:
        raw, out = folder / "raw", folder / "out"
        write_source(name, raw)

        def restart() -> None:
            shutil.rmtree(out, ignore_errors=True)

        def run() -> None:
            frames = 6 if name in ("libero", "calvin") else 100
            run_convert(raw, out, name, part_frames=frames, variant="gripper" if name == "agibot" else "")

        return restart, run, lambda: dataset_is_complete(out), out
    options = write_stage(name, folder)
    root, work = folder / "set", folder / "work"
    if name == "foresight":  # its first run remembers the tower's digest, outside of the dataset
        shutil.copytree(root, work)
        precompute(work, [name], {name: options})

    def restart_target() -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(root, work)

    def run_target() -> None:
        precompute(work, [name], {name: options})

    return restart_target, run_target, lambda: target_is_complete(work, name), work


def dataset_is_complete(out: Path) -> bool:
    """False when nothing claims to be a dataset, True after every row was read."""
    if not (out / "meta" / "info.json").exists():
        return False
    try:
        dataset = open_dataset(out)
    except DataError as error:
        assert "is unfinished" in str(error), error
        return False
    rows = dataset.all_columns(["action", "index"])
    assert len(rows["action"]) == dataset.total_frames
    assert (rows["index"] == range(dataset.total_frames)).all()
    return True


def target_is_complete(root: Path, stage: str) -> bool:
    """False where the loader says that the target is not there, True after every row was read."""
    dataset = open_dataset(root)
    if stage == "shards":
        from dpipe.streams.shards import find_shards

        return find_shards(dataset, dataset.cameras) is not None
    if not any((root / "dpipe" / "targets" / stage).glob("*/contract.json")):
        return False
    targets = open_targets(root, [stage])
    for episode in range(len(dataset)):
        assert targets.take(episode=episode, frame=0) is not None
    return True


# --- faults ---------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], Any], leave_at: int | None) -> int:
    """Run in a forked child; its exit code (EXIT: it left at the fault point)."""
    child = os.fork()
    if child == 0:
        if leave_at is not None:
            leave(leave_at)
        try:
            code = work()
        except BaseException as error:  # noqa: BLE001 - the parent must hear of it whatever it is
            print(f"child failed: {error!r}", file=sys.stderr)
            os._exit(1)
        os._exit(code or 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def leave(at: int) -> None:
    """Leave this process before its `at`-th operation: a kill between any two of them."""
    passed = 0

    def wrapped(operation: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*words: Any, **more: Any) -> Any:
            nonlocal passed
            if passed == at:
                os._exit(EXIT)
            passed += 1
            return operation(*words, **more)

        return guarded

    for name in OPERATIONS:
        setattr(os, name, wrapped(getattr(os, name)))


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    restart, run, is_complete, out = subject(name, folder)
    restart()
    assert in_child(run, None) == 0
    expected = tree_digest(out)
    assert in_child(lambda: 11 if is_complete() else 10, None) == 11
    counts = {"points": 0, "unfinished": 0, "complete": 0}
    while True:
        restart()
        code = in_child(run, counts["points"])
        if code == 0:
            break
        assert code == EXIT, code
        # Reading starts threads, and a forked child of a threaded process may hang: look from another process.
        seen = in_child(lambda: 11 if is_complete() else 10, None)
        counts[{10: "unfinished", 11: "complete"}[seen]] += 1
        assert in_child(run, None) == 0
        found = tree_digest(out)
        changed = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
        assert not changed, f"bytes differ after leaving at point {counts['points']}: {changed}"
        counts["points"] += 1
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
