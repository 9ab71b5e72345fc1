"""Conversion of LIBERO against lerobot 0.6.1's own writer and against a bare encoder.

    python bench/convert_libero.py [--rounds 3] [--quick]

All write the same frames of the same two cameras. lerobot's writer gets its frames from memory and its time
starts after imports; dpipe is timed as its user runs it, raw files to finished dataset, and the time of a
conversion of a single episode is subtracted from a large one. The bare encoder is PyAV alone, frames in memory,
in as many processes as dpipe has workers; nothing is read, hashed, counted or written.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("SVT_LOG", "1")

import h5py
import numpy as np
from measure import WORKERS, Goal, Rounds, convert_seconds, lerobot_seconds, report

SAMPLE = (
    Path(os.environ.get("DPIPE_SAMPLE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    / "libero"
)
CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")


def load_demos() -> list[list[np.ndarray]]:
    """Frames of every demonstration, [T, H, W, 3] a camera, as the default options turn them."""
    demos = []
    for path in sorted(SAMPLE.glob("*/*.hdf5")):
        with h5py.File(path, "r") as file:
            for demo in file["data"].values():
                demos.append([np.ascontiguousarray(demo["obs"][c][:-1][:, ::-1, ::-1]) for c in CAMERAS])
    return demos


def make_raw(folder: Path, copies: int) -> tuple[Path, int]:
    """A raw tree holding the sample `copies` times (by link), and its frames."""
    raw = folder / f"raw-{copies}"
    frames = 0
    for suite in sorted(p for p in SAMPLE.iterdir() if p.is_dir()):
        for path in sorted(suite.glob("*.hdf5")):
            for copy in range(copies):
                target = raw / suite.name / f"{path.stem.removesuffix('_demo')}_{copy}_demo.hdf5"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(path)
                with h5py.File(path, "r") as file:
                    frames += sum(len(d["actions"]) - 1 for d in file["data"].values())
    return raw, frames


def dpipe_rate(small: Path, large: Path, small_frames: int, large_frames: int, codec: str) -> float:
    """Steps a second between the small and the large conversion."""
    seconds = [convert_seconds("libero", raw, "--codec", codec) for raw in (small, large)]
    return (large_frames - small_frames) / (seconds[1] - seconds[0])


def lerobot_rate(demos: list[list[np.ndarray]], streaming: bool) -> float:
    """Steps a second of lerobot's writer."""
    shape = demos[0][0].shape[1:]
    image = {"dtype": "video", "shape": shape, "names": ["height", "width", "channels"]}
    features = {f"observation.images.{c}": image for c in ("image", "image2")}
    features |= {
        "observation.state": {"dtype": "float32", "shape": (8,), "names": [f"s{i}" for i in range(8)]},
        "action": {"dtype": "float32", "shape": (7,), "names": [f"a{i}" for i in range(7)]},
    }
    vectors = {"observation.state": np.zeros(8, np.float32), "action": np.zeros(7, np.float32)}
    episodes = (
        (
            {"observation.images.image": a, "observation.images.image2": b, "task": "t", **vectors}
            for a, b in zip(*demo, strict=True)
        )
        for demo in demos
    )
    return sum(len(demo[0]) for demo in demos) / lerobot_seconds(20, features, episodes, streaming)


DEMOS: list[list[np.ndarray]] = []  # inherited by forked encoders: frames must not travel through a pipe


def bare_encode(demo: int, frames: int | None, codec: str) -> int:
    """Encode both cameras of a demonstration with PyAV alone; returns packet bytes."""
    import av
    from dpipe.video.encode import PRESETS

    preset = PRESETS[codec]
    size = 0
    for camera in DEMOS[demo]:
        context = av.CodecContext.create(preset.encoder, "w")
        context.width, context.height, context.pix_fmt = camera.shape[2], camera.shape[1], preset.pix_fmt
        context.time_base, context.framerate = Fraction(1, 20), Fraction(20)
        context.options = preset.options()
        for picture in camera[:frames]:
            size += sum(p.size for p in context.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        size += sum(p.size for p in context.encode(None))
    return size


def bare_rate(demos: list[list[np.ndarray]], codec: str, copies: int) -> float:
    """Steps a second of bare encoders in as many processes as dpipe has workers."""
    DEMOS[:] = demos
    with get_context("fork").Pool(WORKERS) as pool:
        pool.starmap(bare_encode, [(0, 4, codec)] * WORKERS)  # imports and first open
        work = [(demo, None, codec) for _ in range(copies) for demo in range(len(demos))]
        start = time.perf_counter()
        pool.starmap(bare_encode, work, chunksize=1)
        seconds = time.perf_counter() - start
    return copies * sum(len(d[0]) for d in demos) / seconds


def peak_memory(raw: Path, codec: str) -> int:
    """Peak resident memory in MB of a worker's share of a conversion: scan, encode, and mux parts of 900 frames."""
    code = (
        "import pathlib, re, tempfile; from dpipe.cli import cli\n"
        "out = tempfile.mkdtemp()\n"
        f"cli.main(['convert', 'libero', '--raw', {str(raw)!r}, '--out', out + '/set', '--codec', {codec!r}, "
        "'--workers', '0', '--part', '0/1', '--part-frames', '900'], standalone_mode=False)\n"
        # Not getrusage: its peak is inherited from this process, which holds every frame.
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text()).group(1)) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round over fewer frames")
    arguments = parser.parse_args()
    copies, rounds = (4, 1) if arguments.quick else (12, arguments.rounds)
    demos = load_demos()
    with tempfile.TemporaryDirectory(prefix="dpipe-bench-") as folder:
        small, small_frames = make_raw(Path(folder), 1)
        large, large_frames = make_raw(Path(folder), copies)
        measured = Rounds()
        measured.run(
            rounds,
            {
                "dpipe av1": lambda: dpipe_rate(small, large, small_frames, large_frames, "av1"),
                "lerobot png": lambda: lerobot_rate(demos[:3] if arguments.quick else demos, False),
                "bare encoder av1": lambda: bare_rate(demos, "av1", 2),
                "lerobot streaming": lambda: lerobot_rate(demos, True),
                "dpipe h264": lambda: dpipe_rate(small, large, small_frames, large_frames, "h264"),
                "bare encoder h264": lambda: bare_rate(demos, "h264", 4),
            },
        )
        few, many = peak_memory(small, "h264"), peak_memory(large, "h264")
    goals = [
        measured.ratio("av1 over lerobot's PNG path", "dpipe av1", "lerobot png", 5),
        measured.ratio("av1 over lerobot's streaming path", "dpipe av1", "lerobot streaming", 3),
        measured.ratio("av1 over the bare encoder", "dpipe av1", "bare encoder av1", 0.85),
        measured.ratio("h264 over lerobot's PNG path", "dpipe h264", "lerobot png", 16),
        Goal(f"memory of {small_frames} over {large_frames} frames ({few} and {many} MB)", few / many, 0.9),
    ]
    facts = {"workers": WORKERS, "frames": large_frames, "memory_mb": [few, many]}
    return report("convert_libero", goals, measured, "steps/s", facts)


if __name__ == "__main__":
    sys.exit(main())
