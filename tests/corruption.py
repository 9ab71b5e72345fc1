"""One byte changed at random in one file of each kind: what becomes of it. Helpers, and a program of its own.

    python tests/corruption.py FOLDER --count 30 --seed 0 [--kinds NAME ...]     prints a JSON line a kind

found      the doctor, or the reader, says so
harmless   called sound, and everything that is read is what it was
unseen     called sound, values differ, and nothing in the format could tell (no digest exists)
silent     called sound, values differ, although a digest exists: a fault of ours
"""

import argparse
import hashlib
import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from dpipe.pipeline.doctor import Level, examine
from dpipe.schemas.errors import DpipeError

LIMIT_S = 30


@dataclass(frozen=True)
class Kind:
    """A file to damage, and how to read what it holds. `digest`: what is read is covered by one."""

    name: str
    base: str
    pattern: str
    read: Callable[[Path], str] | None
    digest: bool


def digest_of(*arrays: np.ndarray) -> str:
    value = hashlib.sha256()
    for array in arrays:
        value.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return value.hexdigest()


def read_rows(root: Path) -> str:
    """Actions and states as a trainer gets them: their digest is recorded at conversion."""
    from dpipe.streams.dataset import open_dataset

    columns = open_dataset(root).all_columns(["action", "observation.state"])
    return digest_of(*columns.values())


def read_frames(root: Path) -> str:
    from dpipe.streams.dataset import open_dataset

    dataset = open_dataset(root)
    frames = [
        dataset.frames(e, c, 0, int(dataset.episodes.length[e]))
        for e in range(len(dataset))
        for c in dataset.cameras
    ]
    return digest_of(*frames)


def read_shards(root: Path) -> str:
    from dpipe.streams.health import Health
    from dpipe.streams.rows import Fit
    from dpipe.streams.shards import ShardRows

    (folder,) = (root / "dpipe/shards").iterdir()
    rows = ShardRows(folder, Fit(None))
    index = np.arange(int(rows.lengths.sum()))
    values = rows.values(["action", "observation.state", "index"], index)
    camera = rows.cameras()[0]
    out = np.zeros((len(index), *rows.size(camera), 3), np.uint8)
    rows.frames(camera, index, out, Health())
    return digest_of(*values.values(), out)


def read_target(root: Path) -> str:
    from dpipe.streams.targets import open_targets

    batch = open_targets(root, ["tokens"]).take(index=np.arange(20))
    return digest_of(*batch.values())


def read_calvin(root: Path) -> str:
    from dpipe.converters import load_converter

    converter = load_converter("calvin")
    options = converter.Options()
    found = []
    for recording in converter.find(root, options):
        for ref in converter.scan(recording, options):
            episode = converter.read(ref, options)
            found += [*episode.columns.values(), *(c.read(0, len(c)) for c in episode.cameras.values())]
    return digest_of(*found)


KINDS = (
    Kind("data parquet", "served", "data/chunk-000/file-000.parquet", read_rows, True),
    Kind("video mp4", "served", "videos/*/chunk-000/file-000.mp4", read_frames, False),
    Kind("info json", "served", "meta/info.json", read_rows, False),
    Kind("stats json", "served", "meta/stats.json", read_rows, True),
    Kind("tasks parquet", "served", "meta/tasks.parquet", read_rows, True),
    Kind("episodes parquet", "served", "meta/episodes/*/*.parquet", read_rows, True),
    Kind("manifest json", "served", "dpipe/manifest.json", read_rows, True),
    Kind("own parquet", "served", "dpipe/episodes.parquet", read_rows, True),
    Kind("sidecar parquet", "served", "dpipe/columns/*/*.parquet", read_rows, True),
    Kind("target array", "served", "dpipe/targets/*/*/tok*/part-*/c.*", read_target, False),
    Kind("target zarr json", "served", "dpipe/targets/*/*/tok*/part-*/zarr.json", read_target, False),
    Kind("target contract", "served", "dpipe/targets/*/*/contract.json", read_target, False),
    Kind("target index", "served", "dpipe/targets/*/*/episodes.parquet", read_target, False),
    Kind("shard parquet", "served", "dpipe/shards/*/part-*.parquet", read_shards, True),
    Kind("shard index", "served", "dpipe/shards/*/index.bin", read_shards, True),
    Kind("shard json", "served", "dpipe/shards/*/index.json", read_shards, False),
    Kind("libero hdf5", "raw libero", "**/*.hdf5", None, False),
    Kind("calvin npz", "raw calvin", "**/episode_0000004.npz", read_calvin, True),
    Kind("calvin npy", "raw calvin", "**/auto_lang_ann.npy", None, False),
    Kind("egodex hdf5", "raw egodex", "**/0.hdf5", None, False),
    Kind("egodex mp4", "raw egodex", "**/0.mp4", None, False),
    Kind("agibot h5", "raw agibot", "**/proprio_stats.h5", None, False),
    Kind("agibot json", "raw agibot", "**/task_*.json", None, False),
    Kind("agibot tar", "raw agibot", "observations/**/*.tar", None, False),
)


def build(folder: Path, base: str) -> Path:
    """The smallest sound things of each kind."""
    from defects import draw_frames, draw_video
    from raw_libero import demo_arrays, write_raw
    from trees import run_convert

    name = base.removeprefix("raw ")
    root = folder / base.replace(" ", "-") / name
    if root.exists():
        return root
    if base in ("raw libero", "served"):
        raw = folder / "raw-libero/libero"
        if not raw.exists():
            arrays = {i: demo_arrays(12 + i, seed=i, side=16) for i in range(2)}
            write_raw(raw / "libero_goal/put_the_red_cube_in_the_tray_demo.hdf5", arrays)
        if base == "served":
            from dpipe.pipeline.precompute import precompute
            from dpipe.streams.dataset import open_dataset
            from dpipe.streams.shard_writing import write_shards

            run_convert(raw, root)
            precompute(root, ["tokens"], {"tokens": {"probe": "none"}})
            write_shards(open_dataset(root))
    elif base == "raw calvin":
        from raw_calvin import write_split

        write_split(root / "task_D_D/training", [(0, 20)], [(0, 15, "push it", "push")], change=draw_frames)
    elif base == "raw egodex":
        from raw_egodex import write_episode

        draw_video(write_episode(root / "part1/task/0", frames=12).with_suffix(".mp4"), 12, seed=0)
    else:
        from raw_agibot import pack, write_episode

        write_episode(root, frames=40)
        for number, path in enumerate(sorted((root / "observations/327/648649/videos").iterdir())):
            draw_video(path, 40, seed=number)
        pack(root)
        write_episode(root, episode=648650, frames=40, seed=1)
        for number, path in enumerate(sorted((root / "observations/327/648650/videos").iterdir())):
            draw_video(path, 40, seed=number + 9)
    return root


def target_file(root: Path, pattern: str) -> Path:
    """The largest file that fits, so that there is something to damage."""
    return max((p for p in sorted(root.glob(pattern)) if p.is_file()), key=lambda path: path.stat().st_size)


def outcome(kind: Kind, root: Path, before: str) -> str:
    source = kind.base.removeprefix("raw ") if kind.base.startswith("raw") else None
    try:
        report = examine(root, Level.SAMPLED, source)
        if report.problems:
            return "found"
        after = kind.read(root) if kind.read else before
    except DpipeError:
        return "found"
    if after == before and kind.read:
        return "harmless"
    return "silent" if kind.digest else "unseen"


def run_kind(folder: Path, kind: Kind, count: int, seed: int, first: int = 0) -> dict[str, object]:
    """Change `count` bytes, one after another, each put back; what became of them, the slowest, the memory."""
    root = build(folder, kind.base)
    path = target_file(root, kind.pattern)
    sound = path.read_bytes()
    before = kind.read(root) if kind.read else ""
    rng = random.Random(f"{kind.name} {seed}")
    counts: Counter[str] = Counter()
    slowest, silent = 0.0, []
    for number in range(first + count):
        at, bits = rng.randrange(len(sound)), rng.randrange(1, 256)
        if number < first:
            continue
        damaged = bytearray(sound)
        damaged[at] ^= bits
        replace(path, bytes(damaged))
        started = time.perf_counter()
        signal.alarm(LIMIT_S)
        try:
            became = outcome(kind, root, before)
        except Exception as error:  # noqa: BLE001 - whatever escapes is what this program looks for
            became = f"crash {type(error).__name__}: {error} (byte {at} ^ {bits})"
        finally:
            signal.alarm(0)
            replace(path, sound)
        slowest = max(slowest, time.perf_counter() - started)
        counts[became] += 1
        if became == "silent":
            silent.append((at, bits))
    return {
        "kind": kind.name,
        "bytes": len(sound),
        "counts": dict(counts),
        "slowest_s": round(slowest, 2),
        "peak_mb": peak_memory() >> 20,
        "silent_at": silent,
    }


def peak_memory() -> int:
    """The most memory this process has held, in bytes. The kernel's own count, because getrusage's starts from
    what the parent held before it ran this program."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found.group(1)) << 10


def replace(path: Path, data: bytes) -> None:
    """A new file under the name: maps of the old one stay what they were. Its time always differs."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_bytes(data)
    os.utime(temporary, ns=(time.time_ns(), time.time_ns()))
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=[kind.name for kind in KINDS])
    given = parser.parse_args()
    for kind in KINDS:
        if kind.name in given.kinds:
            print(json.dumps(run_kind(given.folder, kind, given.count, given.seed, given.first)), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    main()
