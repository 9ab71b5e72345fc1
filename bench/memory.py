"""Peak memory of a worker on the longest recordings there are: under 1 GB each.

    python bench/memory.py [--quick]

A play episode of 40,000 frames (CALVIN's longest has 44,087; files of one content under many names), converted
whole, and again with LeRobot's language column; a 1080p clip of five minutes (EgoDex has shorter ones, others do
not), copied, transcoded at its size, and transcoded to 256 x 256. Each is one process that scans, encodes, joins and
numbers, measured by the kernel's own count of it (VmHWM: `ru_maxrss` would be inherited from this one).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
from measure import Goal, Rounds, report

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from raw_calvin import play_frames, slow_relative, write_split
from raw_egodex import joint_names

LIMIT_MB = 1000
# Told without a goal: 400 windows on each of 40,000 frames are 32 million entries of one row group, which whoever
# reads the episode holds as well.
LANGUAGE = "the same with language columns"
CODE = """
import re, sys
from pathlib import Path
from dpipe.cli import cli
cli.main(sys.argv[1:], standalone_mode=False)
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))
"""


def write_play(raw: Path, frames: int) -> None:
    """One play episode whose frames are one file under many names: a robot that stands still."""
    folder = raw / "mine" / "training"
    frame = play_frames(0, 0)[0]
    frame["actions"] = np.concatenate([frame["robot_obs"][:6], frame["robot_obs"][14:]])
    frame["rel_actions"] = slow_relative(frame["actions"], frame["robot_obs"])
    y, x = np.mgrid[0:200, 0:200]
    frame["rgb_static"] = np.stack([x, y, (x + y) // 2], axis=-1).astype(np.uint8)
    frame["rgb_gripper"] = frame["rgb_static"][:84, :84].copy()
    windows = [(t, t + 64, f"do the thing number {t}", "thing") for t in range(100, frames - 100, 100)]
    write_split(folder, [(0, frames - 1)], windows, change=dict.clear)
    np.savez_compressed(folder / "episode_0000000.npz", **frame)
    for i in range(1, frames):
        os.link(folder / "episode_0000000.npz", folder / f"episode_{i:07d}.npz")


def write_clip(raw: Path, frames: int) -> None:
    """One EgoDex episode of 1080p: a few seconds encoded once, their packets again and again."""
    import av
    from dpipe.video.mp4 import copy_run, read_table, write_mp4

    folder = raw / "part1" / "wait"
    folder.mkdir(parents=True)
    short, each = folder.parent / "short.mp4", min(150, frames)
    y, x = np.mgrid[0:1080, 0:1920]
    still = np.stack([x // 8, y // 5, (x + y) // 12], axis=-1).astype(np.uint8)
    with av.open(str(short), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "superfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 1920, 1080, "yuv420p", 30
        for t in range(each):
            still[:, (8 * t) % 1800 : (8 * t) % 1800 + 60] ^= 64
            container.mux(stream.encode(av.VideoFrame.from_ndarray(still, format="rgb24")))
        container.mux(stream.encode(None))
    table = read_table(short)
    runs = [copy_run(table, 0, each)] * (frames // each)
    write_mp4(folder / "0.mp4", table.sample_entry, 1920, 1080, 30, runs)
    short.unlink()
    with h5py.File(folder / "0.hdf5", "w") as file:
        pose = np.tile(np.eye(4, dtype=np.float32), (len(runs) * each, 1, 1))
        for joint in ("camera", *joint_names()):
            file.create_dataset(f"transforms/{joint}", data=pose)
        file.attrs["llm_description"] = "wait"


def peak_mb(*words: str) -> float:
    """Peak resident memory in MB of one conversion in one process."""
    with tempfile.TemporaryDirectory(prefix="dpipe-bench-") as out:
        command = [sys.executable, "-c", CODE, "convert", *words, "--out", f"{out}/set", "--workers", "0"]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        peak = int(done.stdout.splitlines()[-1]) / 1000
    print(f"  {' '.join(words)}: {peak:.0f} MB, {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the frames")
    quick = parser.parse_args().quick
    play, clip = (4_000, 900) if quick else (40_000, 9_000)
    with tempfile.TemporaryDirectory(prefix="dpipe-bench-") as folder:
        raw = Path(folder)
        write_play(raw / "calvin", play)
        write_clip(raw / "egodex", clip)
        calvin = ("calvin", "--raw", f"{raw}/calvin", "--cut", "play")
        egodex = ("egodex", "--raw", f"{raw}/egodex")
        peaks = {
            f"play episode of {play:,} frames": peak_mb(*calvin),
            LANGUAGE: peak_mb(*calvin, "--language-columns"),
            f"1080p clip of {clip:,} frames, copied": peak_mb(*egodex, "--video", "copy"),
            "the same transcoded": peak_mb(*egodex, "--video", "transcode"),
            "the same transcoded to 256x256": peak_mb(*egodex, "--resize", "256x256"),
        }
    goals = [
        Goal(f"{LIMIT_MB} MB over its peak: {name}", LIMIT_MB / peak, 1)
        for name, peak in peaks.items()
        if name != LANGUAGE
    ]
    measured = Rounds({name: [peak] for name, peak in peaks.items()})
    return report("memory", goals, measured, "MB")


if __name__ == "__main__":
    sys.exit(main())
