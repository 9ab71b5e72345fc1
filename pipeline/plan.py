"""Plans: what a command would do, what it would cost, what is done already and why the rest is not.

Bytes follow from shapes and dtypes; only what a codec makes of pixels is measured, together with the time, on a
pilot: a hundredth of the work, a few episodes at most, done in a temporary folder and thrown away.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..schemas.errors import DataError, UsageError
from ..schemas.features import DEFAULT_FEATURES

if TYPE_CHECKING:
    from .catalog import Catalog, Refs
    from .request import ConvertRequest

PILOT_SHARE, PILOT_EPISODES, PILOT_S = 0.01, 5, 10.0
ASK_BYTES, ASK_S = 50e9, 3600.0
VIDEO_SUFFIXES = {".mp4", ".tar"}  # recordings whose video is copied
BYTES_PER_PIXEL = 0.125  # of video, from above, where nothing was measured: 0.05 at 256 px, h264, g=2
FOOTER_BYTES = 2_000  # Parquet's own bytes an episode: its row group's description and the rounding of pages


@dataclass(frozen=True)
class Step:
    """One step of a plan. Counts are of what is still to do; `seconds` are those of one core."""

    name: str
    needs: str
    makes: str
    episodes: int
    frames: int
    done_episodes: int
    why: tuple[str, ...]  # what is to do, and why: "12 are new"
    read_bytes: int
    write_bytes: int
    files: int
    seconds: float | None = None  # None: nothing to do, or nothing to measure it on
    pilot: str = ""
    cheaper: tuple[str, ...] = ()
    left_out: int = 0
    one_process: bool = False  # a model's forward pass: all threads are its own, more workers change nothing

    def wall(self, workers: int) -> float:
        """Seconds on the clock."""
        return (self.seconds or 0.0) / (1 if self.one_process else max(1, workers))

    @property
    def idle(self) -> bool:
        return self.episodes == 0


def plan_convert(request: ConvertRequest, catalog: Catalog, pilot: bool = True) -> Step:
    """One dataset's conversion, from its scan and what its journal says; nothing is written."""
    from .work import plan_conversion

    found, todo = plan_conversion(request, catalog)
    video, tables = conversion_bytes(request, todo)
    seconds, told = None, ""
    if pilot and len(todo):
        seconds, measured, told = _pilot(request, todo)
        video = measured if measured is not None else video
    waiting = found.todo_episodes - len(found.changed)
    why = (
        (f"{waiting} have no receipt",) if waiting else (),
        (f"{len(found.changed)} changed since: {_few(found.changed)}",) if found.changed else (),
    )
    return Step(
        name=f"convert {found.source}",
        needs=f"{found.recordings} recordings in {request.raw}",
        makes=str(found.root),
        episodes=found.todo_episodes,
        frames=found.todo_frames,
        done_episodes=found.episodes - found.todo_episodes,
        why=sum(why, ()),
        read_bytes=found.raw_bytes,
        write_bytes=video + tables,
        files=found.files,
        seconds=seconds,
        pilot=told,
        cheaper=("--resize WxH", "--where and --limit convert a part of it, a later run the rest"),
        left_out=len(found.dropped),
    )


def conversion_bytes(request: ConvertRequest, todo: Refs) -> tuple[int, int]:
    """(video, tables) to be written for some episodes: video from above, tables by their dtypes."""
    from ..converters import load_converter

    if not len(todo):
        return 0, 0
    frames = int(todo.frames.sum())
    embodiment = load_converter(request.source).embodiment_of(request.raw, request.options, request.variant)
    row = sum(f.dim * np.dtype(f.dtype).itemsize for f in (*embodiment.features, *embodiment.sidecar))
    row += sum(np.dtype(told["dtype"]).itemsize for told in DEFAULT_FEATURES.values())
    tables = frames * row + len(todo) * FOOTER_BYTES
    cameras = next((cameras for cameras, _, _ in todo.camera_sets()), ())
    files = {path for paths in todo.paths() for path in paths if path.suffix in VIDEO_SUFFIXES}
    if files and request.video.video != "transcode" and request.video.resize is None:
        return sum(path.stat().st_size for path in files if path.exists()), tables
    pixels = frames * sum(c.height * c.width for c in map(request.video.size, cameras))
    return int(pixels * BYTES_PER_PIXEL * (5 if request.shards else 1)), tables


def _pilot(request: ConvertRequest, todo: Refs) -> tuple[float, int | None, str]:
    """(core seconds of all of it, bytes of video or None where it is copied, words): some episodes, encoded."""
    from ..converters import load_converter
    from .payload import encode_episode
    from .spool import read_spool
    from .work import episode_job

    converter = load_converter(request.source)
    embodiment = converter.embodiment_of(request.raw, request.options, request.variant)
    count = min(PILOT_EPISODES, max(1, round(PILOT_SHARE * len(todo))), len(todo))
    rows = np.linspace(0, len(todo) - 1, count).astype(int)  # from all over: files differ
    tried, frames, video, copied, started = 0, 0, 0, 0, 0.0
    with tempfile.TemporaryDirectory(prefix="dpipe-pilot-") as folder:
        for number, row in enumerate(rows):
            ref = todo[int(row)]
            job = episode_job(request, ref, "", Path(folder) / f"{number}.episode", embodiment)
            first, started = not started, started or time.perf_counter()
            told = encode_episode(job)
            if first and time.perf_counter() - started < PILOT_S:
                # That was to get warm: of a short episode, imports and the page cache are the larger part.
                started = time.perf_counter()
                told = encode_episode(job)
            tried += 1
            frames += told["frames"]
            spool = read_spool(job.spool)
            for key, camera in spool.receipt.get("cameras", {}).items():
                if camera["kind"] == "encoded":
                    video += spool.blobs[key].size
                else:
                    copied += 1
            if time.perf_counter() - started > PILOT_S:
                break
        took = time.perf_counter() - started
    if not frames:
        return 0.0, None, "the pilot's episodes had to be left out: no estimate of time"
    share = int(todo.frames.sum()) / frames
    words = f"by {tried} episodes, {frames} frames, converted in {took:.1f} s"
    return took * share, None if copied else round(video * share), words


def plan_targets(
    root: Path,
    stages: Sequence[str],
    params: Mapping[str, Mapping[str, Any]],
    out: Path | None,
    name: str = "",
) -> list[Step]:
    """Targets of one dataset that exists: parts that have no receipt, and the bytes their arrays will have."""
    from ..streams.dataset import open_dataset
    from .costs import stage_costs

    dataset = open_dataset(root)
    costs = {cost.stage: cost for cost in stage_costs(root, out, params, stages)}
    steps = []
    for stage in stages:
        cost = costs[stage]
        folder, todo, why = _waiting_parts(dataset, stage, params.get(stage, {}), out, name)
        episodes = sum(map(len, todo))
        lengths = dataset.episodes.length
        frames = int(sum(lengths[part.start : part.stop].sum() for part in todo))
        share = frames / max(1, dataset.total_frames)
        steps.append(
            Step(
                name=f"precompute {stage}",
                needs=f"{root.name}: {len(dataset)} episodes in {root}"
                + (f"; {cost.needs}" if cost.needs else ""),
                makes=str(folder),
                episodes=episodes,
                frames=frames,
                done_episodes=len(dataset) - episodes,
                why=why,
                read_bytes=round(share * _bytes_under(root / "data", root / "videos")),
                write_bytes=round(share * cost.bytes),
                files=len(todo) * (1 if stage == "shards" else 1 + 2 * max(1, cost.arrays)),
                seconds=share * cost.seconds if episodes else None,
                pilot="by a few hundred frames worked on here",
                cheaper=(
                    "pool tokens, a narrower dtype or every k-th frame, where the stage has the option",
                ),
                one_process=cost.one_process,
            )
        )
    return steps


def plan_targets_ahead(conversion: Step, stages: Sequence[str]) -> list[Step]:
    """Targets of a dataset that is not there yet: their cost is measured on its frames, so it is told later."""
    return [
        Step(
            name=f"precompute {stage}",
            needs=f"{conversion.makes}, converted first",
            makes=str(
                Path(conversion.makes) / "dpipe" / ("shards" if stage == "shards" else f"targets/{stage}")
            ),
            episodes=conversion.episodes + conversion.done_episodes,
            frames=conversion.frames,
            done_episodes=0,
            why=("the dataset does not exist yet",),
            read_bytes=conversion.write_bytes,
            write_bytes=0,
            files=0,
            pilot="bytes and time are told once the dataset is there: dpipe plan precompute " + stage,
        )
        for stage in stages
    ]


def plan_training(recipe: str, roots: Sequence[Path], run_dir: Path, steps: int | None) -> Step:
    """The training itself: what it reads and where its run stands; its first steps tell how long the rest takes."""
    from ..streams.dataset import open_dataset

    opened = [open_dataset(root) for root in roots]
    done = (run_dir / "result.json").is_file()
    kept = sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))
    state = f"goes on from {kept[-1]}" if kept else "no checkpoint yet"
    episodes = sum(map(len, opened))
    return Step(
        name=f"train {recipe}",
        needs=", ".join(f"{root.name} and its targets" for root in roots),
        makes=str(run_dir),
        episodes=0 if done else episodes,
        frames=0 if done else sum(dataset.total_frames for dataset in opened),
        done_episodes=episodes if done else 0,
        why=(f"{steps or 'its own number of'} steps, {state}",),
        read_bytes=sum(_bytes_under(root / "data", root / "videos") for root in roots),
        write_bytes=0,
        files=0,
        pilot="the first steps of a run tell how long the rest takes",
    )


def _waiting_parts(
    dataset: Any, stage: str, params: Mapping[str, Any], out: Path | None, name: str
) -> tuple[Path, list[range], tuple[str, ...]]:
    """(folder, episodes of the parts to be made, why) of one target as it stands."""
    from ..stages import build_params, load_stage
    from .precompute import TARGETS, waiting_episodes

    if stage == "shards":
        from ..streams.shard_format import ShardOptions
        from .shards import parts_waiting

        options = ShardOptions(**asdict(build_params(load_stage("shards"), params)))
        base = dataset.root / "dpipe" / "shards" if out is None else out / "shards"
        folder = base / (name or options.variant)
        parts = dataset.parts()
        waiting = [parts[number] for number in parts_waiting(dataset, folder, options)]
    else:
        folder, waiting = waiting_episodes(dataset, stage, params, out or dataset.root / TARGETS, name)
    if not waiting:
        return folder, [], ()
    if not folder.is_dir():
        return folder, waiting, ("it does not exist yet",)
    lacking = sum(map(len, waiting))
    return folder, waiting, (f"{lacking} of {len(dataset)} episodes are in parts without a receipt",)


# --- all steps ------------------------------------------------------------------------------------------------


def require_disk(steps: Sequence[Step]) -> None:
    """Refuse a plan that cannot fit its disk, with the numbers, before anything starts."""
    needed: dict[int, tuple[Path, int]] = {}
    for step in steps:
        folder = Path(step.makes)
        while not folder.exists():
            folder = folder.parent
        device = folder.stat().st_dev
        needed[device] = (folder, needed.get(device, (folder, 0))[1] + step.write_bytes)
    for folder, size in needed.values():
        free = shutil.disk_usage(folder).free
        if size > free:
            listed = "".join(f"\n    {s.name}: {size_text(s.write_bytes)}" for s in steps if s.write_bytes)
            raise DataError(
                f"{size_text(size)} are to be written and {size_text(free)} are free at {folder}{listed}\n"
                "  next: free some space, choose another disk with --workspace, or do less with --where or --limit"
            )


def question(steps: Sequence[Step], workers: int) -> str:
    """What to ask before large or long work; "" where it is neither."""
    size = sum(step.write_bytes for step in steps)
    seconds = sum(step.wall(workers) for step in steps)
    if size <= ASK_BYTES and seconds <= ASK_S:
        return ""
    named = ", ".join(step.name for step in steps if not step.idle)
    cheaper = "; ".join(dict.fromkeys(text for step in steps if not step.idle for text in step.cheaper))
    return f"{named}: {size_text(size)} and about {time_text(seconds)}. Cheaper: {cheaper}"


def refuse_or_ask(steps: Sequence[Step], workers: int, yes: bool, terminal: bool) -> str:
    """The question to put on a terminal; elsewhere it is a refusal. "" where there is nothing to ask."""
    text = question(steps, workers)
    if not text or yes:
        return ""
    if not terminal:
        raise UsageError(f"{text}\n  next: --yes, if that is what you want; --dry-run shows the plan")
    return text


def plan_text(steps: Sequence[Step], workers: int, price: float | None = None) -> str:
    """The plan in words: a block a step, then the sum."""
    lines = []
    for step in steps:
        lines += [step.name, f"  needs   {step.needs}", f"  makes   {step.makes}"]
        left = f"; {step.left_out} episodes are left out" if step.left_out else ""
        done = f"{step.done_episodes} episodes{left}"
        if step.idle:
            lines.append(f"  done    all {done}; nothing to do")
            continue
        lines += [
            f"  done    {done}",
            f"  to do   {step.episodes} episodes, {step.frames} frames ({'; '.join(step.why)})",
            f"  bytes   {size_text(step.read_bytes)} to read, {size_text(step.write_bytes)} to write in "
            f"{step.files} files",
        ]
        if step.seconds is None:
            lines.append(f"  time    {step.pilot or 'not estimated'}")
        else:
            cores = "in one process" if step.one_process else f"on {max(1, workers)} cores"
            lines.append(f"  time    {time_text(step.wall(workers))} {cores}, {step.pilot}")
    return "\n".join([*lines, _total(steps, workers, price)])


def _total(steps: Sequence[Step], workers: int, price: float | None) -> str:
    seconds = sum(step.seconds or 0.0 for step in steps)
    size = sum(step.write_bytes for step in steps)
    wall = time_text(sum(step.wall(workers) for step in steps))
    text = f"in all: {size_text(size)}, {seconds / 3600:.2f} core hours, {wall}"
    return text if price is None else f"{text}, {price * seconds / 3600:.2f} at {price:g} a core hour"


def plan_json(steps: Sequence[Step], workers: int, price: float | None = None) -> dict[str, Any]:
    seconds = sum(step.seconds or 0.0 for step in steps)
    return {
        "steps": [asdict(step) for step in steps],
        "write_bytes": sum(step.write_bytes for step in steps),
        "core_seconds": seconds,
        "wall_seconds": sum(step.wall(workers) for step in steps),
        "cost": None if price is None else price * seconds / 3600,
    }


def size_text(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def time_text(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _bytes_under(*folders: Path) -> int:
    return sum(
        p.stat().st_size for folder in folders if folder.is_dir() for p in folder.rglob("*") if p.is_file()
    )
