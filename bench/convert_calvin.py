"""Conversion of CALVIN against lerobot 0.6.1's own writer and against inflating plus a bare encoder.

    python bench/convert_calvin.py [--rounds 3] [--quick]

All make video of the same frames of the same two cameras, whole play episodes, each frame once. lerobot's writer is
fed by `np.load`, file by file, as its users feed it; its time starts after imports. dpipe is timed as its user runs
it, raw files to finished dataset, and the time of a small conversion is subtracted from a large one. The bare peer
inflates the two picture members of every npz with zipfile and encodes them with PyAV, in as many processes as dpipe
has workers; nothing is checked, hashed, counted or written.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import zipfile
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("SVT_LOG", "1")

import numpy as np
from measure import WORKERS, Rounds, convert_seconds, lerobot_seconds, report

SAMPLE = (
    Path(os.environ.get("DPIPE_SAMPLE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    / "calvin"
    / "task_D_D"
    / "training"
)
CAMERAS = ("rgb_static", "rgb_gripper")


def make_raw(folder: Path, copies: int) -> tuple[Path, list[list[Path]]]:
    """A raw tree holding the sample's play episode `copies` times (by link), and the frames of each copy."""
    training = folder / f"raw-{copies}" / "task_D_D" / "training"
    training.mkdir(parents=True)
    first, last = np.load(SAMPLE / "ep_start_end_ids.npy")[0].tolist()
    frames = last - first + 1
    bounds, episodes = [], []
    for copy in range(copies):
        start = first + copy * (frames + 1)
        bounds.append((start, start + frames - 1))
        episodes.append([training / f"episode_{start + i:07d}.npz" for i in range(frames)])
        for i, path in enumerate(episodes[-1]):
            path.symlink_to(SAMPLE / f"episode_{first + i:07d}.npz")
    np.save(training / "ep_start_end_ids.npy", np.array(bounds))
    shutil.copy(SAMPLE / "scene_info.npy", training)
    scenes = {"calvin_scene_D": [first, bounds[-1][1]]}
    np.save(training / "scene_info.npy", np.array(scenes, dtype=object), allow_pickle=True)
    return training.parent.parent, episodes


def lerobot_rate(episodes: list[list[Path]], streaming: bool) -> float:
    """Frames a second of lerobot's writer, fed by np.load."""

    def image(side: int) -> dict[str, object]:
        return {"dtype": "video", "shape": (side, side, 3), "names": ["height", "width", "channels"]}

    features = {"observation.images.top": image(200), "observation.images.wrist": image(84)}
    for name, dim in (("observation.state", 15), ("observation.environment_state", 24), ("action", 7)):
        features[name] = {"dtype": "float32", "shape": (dim,), "names": [f"d{i}" for i in range(dim)]}

    def frame(path: Path) -> dict[str, object]:
        with np.load(path) as npz:
            return {
                "observation.images.top": npz["rgb_static"],
                "observation.images.wrist": npz["rgb_gripper"],
                "observation.state": npz["robot_obs"].astype(np.float32),
                "observation.environment_state": npz["scene_obs"].astype(np.float32),
                "action": npz["rel_actions"].astype(np.float32),
                "task": "play",
            }

    seconds = lerobot_seconds(30, features, (map(frame, paths) for paths in episodes), streaming)
    return sum(map(len, episodes)) / seconds


def inflate_and_encode(paths: list[Path], codec: str) -> int:
    """Both cameras of an episode from its files to packets; returns packet bytes."""
    import av
    from dpipe.video.encode import PRESETS

    preset = PRESETS[codec]
    contexts = []
    for side in (200, 84):
        context = av.CodecContext.create(preset.encoder, "w")
        context.width, context.height, context.pix_fmt = side, side, preset.pix_fmt
        context.time_base, context.framerate = Fraction(1, 30), Fraction(30)
        context.options = preset.options()
        contexts.append((context, side))
    size = 0
    for path in paths:
        with zipfile.ZipFile(path) as npz:
            for (context, side), member in zip(contexts, CAMERAS, strict=True):
                pixels = np.frombuffer(npz.read(f"{member}.npy")[-side * side * 3 :], np.uint8)
                frame = av.VideoFrame.from_ndarray(pixels.reshape(side, side, 3), format="rgb24")
                size += sum(packet.size for packet in context.encode(frame))
    return size + sum(packet.size for context, _ in contexts for packet in context.encode(None))


def bare_rate(episodes: list[list[Path]], codec: str) -> float:
    """Frames a second of that in as many processes as dpipe has workers."""
    with get_context("fork").Pool(WORKERS) as pool:
        pool.starmap(inflate_and_encode, [(episodes[0][:4], codec)] * WORKERS)  # imports and first open
        start = time.perf_counter()
        pool.starmap(inflate_and_encode, [(paths, codec) for paths in episodes], chunksize=1)
        seconds = time.perf_counter() - start
    return sum(map(len, episodes)) / seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round over fewer frames")
    arguments = parser.parse_args()
    copies, rounds = (16, 1) if arguments.quick else (32, arguments.rounds)
    with tempfile.TemporaryDirectory(prefix="dpipe-bench-") as folder:
        small, few = make_raw(Path(folder), 2)
        large, many = make_raw(Path(folder), copies)
        frames = sum(map(len, many)) - sum(map(len, few))

        def dpipe_rate(codec: str) -> float:
            words = ("--cut", "play", "--codec", codec)
            seconds = [convert_seconds("calvin", raw, *words) for raw in (small, large)]
            return frames / (seconds[1] - seconds[0])

        measured = Rounds()
        measured.run(
            rounds,
            {
                "dpipe h264": lambda: dpipe_rate("h264"),
                "inflate and encode h264": lambda: bare_rate(many[:24], "h264"),
                "lerobot png": lambda: lerobot_rate(few, False),
                "lerobot streaming": lambda: lerobot_rate(few, True),
                "dpipe av1": lambda: dpipe_rate("av1"),
                "inflate and encode av1": lambda: bare_rate(many[:12], "av1"),
            },
        )
    goals = [
        measured.ratio("h264 over lerobot's writer fed by np.load", "dpipe h264", "lerobot png", 4),
        measured.ratio("av1 over lerobot's writer fed by np.load", "dpipe av1", "lerobot png", 4),
        measured.ratio(
            "h264 over inflating plus the bare encoder", "dpipe h264", "inflate and encode h264", 0.8
        ),
        measured.ratio(
            "av1 over inflating plus the bare encoder", "dpipe av1", "inflate and encode av1", 0.8
        ),
    ]
    facts = {"workers": WORKERS, "frames": frames, "cut": "play"}
    return report("convert_calvin", goals, measured, "frames/s", facts)


if __name__ == "__main__":
    sys.exit(main())
