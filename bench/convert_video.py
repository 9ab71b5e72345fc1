"""Video conversion against its bounds: `cp` for packet copy, bare PyAV for transcoding.

    python bench/convert_video.py [--quick] [--folder DIR]

Clips   AgiBot-like  640x480 AV1, 30 fps, 30 s         EgoDex-like  1920x1080 H.264, 30 fps, 4 s
Goals   packet copy >= 0.4 of `cp` of the same bytes and >= 30 x decoding and encoding again;
        transcoding to 256x256 >= 0.8 of bare decode -> resize -> encode in as many processes

Contestants take turns in every round; figures are medians over rounds, in one run on one machine. Our copy
reads each clip's sample table, checks it and writes one joined file. It is held against `cp` when neither waits
for the disk and when both do; a conversion waits, and the ratio to re-encoding is taken so.
"""

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from dpipe.pipeline.durable import sync_path
from dpipe.schemas.episode import VideoClip
from dpipe.video.decode import transcode
from dpipe.video.encode import AV1, H264, Codec, Encoder
from dpipe.video.mp4 import can_join, copy_problem, copy_run, read_table, write_mp4
from measure import WORKERS, Goal, Rounds, report

COPY_OVER_CP, COPY_OVER_REENCODE, TRANSCODE_OVER_BARE = 0.4, 30.0, 0.8
FPS = 30


def camera_frame(t: int, height: int, width: int, noise: np.ndarray) -> np.ndarray:
    """[H, W, 3]: a textured table, two things moving over it, sensor noise."""
    y, x = np.mgrid[0:height, 0:width]
    picture = np.stack(
        [96 + 40 * np.sin(x / 37) + 20 * np.sin(y / 11), 110 + 50 * np.sin((x + y) / 23), 90 + y / 9], -1
    )
    for size, speed, colour in ((height // 6, 3, (200, 40, 40)), (height // 9, 5, (30, 60, 190))):
        top, left = (t * speed) % (height - size), (t * 2 * speed) % (width - size)
        picture[top : top + size, left : left + size] = colour
    shift = t * 7 % 64
    picture += noise[shift : shift + height, shift : shift + width, None]
    return picture.clip(0, 255).astype(np.uint8)


def make_clip(path: Path, codec: Codec, height: int, width: int, frames: int, grain: float) -> None:
    """A clip as a recorder leaves it: muxed by FFmpeg, table at the end, its own time base."""
    import av

    noise = np.random.default_rng(0).normal(0, grain, (height + 64, width + 64))
    still = [camera_frame(t, height, width, noise) for t in range(min(frames, 60))]  # then there and back
    still += still[::-1]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec.encoder, FPS, options=codec.options() | {"g": "30"})
        stream.width, stream.height, stream.pix_fmt = width, height, codec.pix_fmt
        for t in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(still[t % len(still)], format="rgb24")))
        container.mux(stream.encode(None))


def packet_copy(clips: list[Path], out: Path, sync: bool) -> None:
    """What a conversion does with clips that need no transcoding: tables, checks, one joined file."""
    tables = [read_table(clip) for clip in clips]
    for table in tables:
        problem = copy_problem(table, FPS) or can_join(tables[0], table)
        if problem:
            raise SystemExit(f"{table.path}: {problem}")
    first, runs = tables[0], [copy_run(table) for table in tables]
    write_mp4(out, first.sample_entry, first.width, first.height, FPS, runs)
    if sync:
        sync_path(out)


def cp(clips: list[Path], folder: Path, sync: bool) -> None:
    subprocess.run(["cp", *map(str, clips), str(folder)], check=True)
    if sync:
        subprocess.run(["sync", *(str(folder / clip.name) for clip in clips)], check=True)


def ours(clip: Path, frames: int, height: int, width: int) -> int:
    """Frames of `clip` transcoded to H.264 by dpipe, [height, width]."""
    source = VideoClip(clip, 0, clip.stat().st_size, 0, frames, 0, 0)
    encoder = Encoder(H264, height, width, FPS, io.BytesIO())
    for _ in transcode(source, encoder):
        pass
    return len(encoder.finish())


def bare(clip: Path, frames: int, height: int, width: int) -> int:
    """The same with nothing but PyAV: decode, resize, encode, packets thrown away."""
    import av

    context = av.CodecContext.create(H264.encoder, "w")
    context.width, context.height, context.pix_fmt = width, height, H264.pix_fmt
    context.time_base, context.framerate, context.options = Fraction(1, FPS), Fraction(FPS), H264.options()
    done = 0
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            scaled = frame.reformat(width, height, H264.pix_fmt, interpolation="AREA")
            scaled.pts, scaled.time_base, scaled.pict_type = done, Fraction(1, FPS), 0
            context.encode(scaled)
            done += 1
            if done == frames:
                break
    context.encode(None)
    return done


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def clean(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def bench_copy(
    rounds: Rounds, name: str, clips: list[Path], frames: int, size: tuple[int, int], folder: Path, turns: int
) -> list[Goal]:
    target, again = folder / "target", min(frames, 60)
    stretch = again / (frames * len(clips))  # a stretch of one clip stands for encoding all again
    megabytes = sum(clip.stat().st_size for clip in clips) / 1e6

    def speed(call: Callable[[], object], share: float = 1.0) -> Callable[[], float]:
        def measure() -> float:
            clean(target)
            return megabytes * share / seconds(call)

        return measure

    rounds.run(
        turns,
        {
            f"{name} cp": speed(lambda: cp(clips, target, False)),
            f"{name} copy": speed(lambda: packet_copy(clips, target / "joined.mp4", False)),
            f"{name} cp, synced": speed(lambda: cp(clips, target, True)),
            f"{name} copy, synced": speed(lambda: packet_copy(clips, target / "joined.mp4", True)),
            f"{name} re-encode": speed(lambda: bare(clips[0], again, *size), stretch),
        },
    )
    synced = f"{name} copy, synced"
    return [
        rounds.ratio(f"{name}: copy of cp", f"{name} copy", f"{name} cp", COPY_OVER_CP),
        rounds.ratio(f"{name}: copy of cp, both synced", synced, f"{name} cp, synced", COPY_OVER_CP),
        rounds.ratio(f"{name}: copy over re-encoding", synced, f"{name} re-encode", COPY_OVER_REENCODE),
    ]


def bench_transcode(
    rounds: Rounds, name: str, clip: Path, frames: int, turns: int, processes: int
) -> list[Goal]:
    """Two stretches a process, whose bytes on disk are what is counted."""
    jobs = [clip] * (2 * processes)
    megabytes = clip.stat().st_size / 1e6 * frames / len(read_table(clip)) * len(jobs)
    constant = [frames] * len(jobs), [256] * len(jobs), [256] * len(jobs)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for call in (ours, bare):  # start the processes and import, outside the clock
            list(pool.map(call, [clip] * processes, [2] * processes, [256] * processes, [256] * processes))

        def speed(call: Callable[..., int]) -> Callable[[], float]:
            return lambda: megabytes / seconds(lambda: list(pool.map(call, jobs, *constant)))

        rounds.run(turns, {f"{name} bare transcoding": speed(bare), f"{name} transcoding": speed(ours)})
    label = f"{name}: transcoding of bare in {processes} processes"
    return [rounds.ratio(label, f"{name} transcoding", f"{name} bare transcoding", TRANSCODE_OVER_BARE)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shorter clips and fewer rounds")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--processes", type=int, default=WORKERS)
    options = parser.parse_args()
    os.environ.setdefault("SVT_LOG", "1")  # read when the encoder starts: errors alone
    turns = 3 if options.quick else 7
    rounds, goals = Rounds(), []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="dpipe-bench-") as name:
        folder = Path(name)
        # grain and crf are set for bit rates like the originals', 2 to 5 Mbit/s
        for label, codec, height, width, frames, grain in (
            ("agibot", AV1, 480, 640, 300 if options.quick else 900, 8),
            ("egodex", replace(H264, crf=22), 1080, 1920, 120, 4),
        ):
            original = folder / f"{label}.mp4"
            make_clip(original, codec, height, width, frames, grain)
            clips = [folder / f"{label}-{number:02d}.mp4" for number in range(24)]
            for clip in clips:
                shutil.copyfile(original, clip)
            os.sync()
            goals += bench_copy(rounds, label, clips, frames, (height, width), folder, turns)
            stretch = min(frames, 60 if options.quick else 120)
            goals += bench_transcode(rounds, label, original, stretch, min(turns, 5), options.processes)
    return report("convert_video", goals, rounds, "MB/s", {"clips": 24})


if __name__ == "__main__":
    sys.exit(main())
