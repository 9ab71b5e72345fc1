"""A million episodes, without pixels: plan, journal, resume check and finish of a synthetic catalogue.

    python bench/scale.py [--episodes 1000000] [--jobs 2]

Every step is a process of its own, measured by the clock and by VmHWM, the kernel's own count of that process's
peak memory. Work of conversions proper is left out: an episode has five frames of two small vectors and no
camera, and parts are written from memory rather than from spool files. What is measured is everything that grows
with the number of episodes: the catalogue, the order, receipts, numbering, tables. A step that is done is not
done again; delete bench/out/scale to start anew.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import OUT, Goal, Rounds, report

HERE = Path(__file__).resolve()
BASE = OUT / "scale"
SHARDS = 1000  # raw files; AgiBot Beta's tars hold about as many episodes each
PART_FRAMES = 64  # thirteen episodes a part, as AgiBot's 1,300 frames an episode give at the usual size
FRAMES = 5
TASKS = 200


# --- a source without pixels ----------------------------------------------------------------------------------


def source() -> Any:
    """The converter: recordings are members of real files, episodes follow from their number."""
    from dataclasses import dataclass

    from dpipe.converters import Converter
    from dpipe.schemas.episode import Embodiment, Episode, EpisodeRef, Recording, Segment
    from dpipe.schemas.features import Feature

    @dataclass(frozen=True)
    class Options:
        pass

    def find(raw: Path, options: Any) -> Iterator[Recording]:
        episodes = int((raw / "episodes.txt").read_text())
        files = sorted(raw.glob("*.shard"))
        for number in range(episodes):
            shard = files[number * len(files) // episodes]
            yield Recording(f"task_{number % TASKS}/{number:07d}", "train", (shard,))

    def scan(recording: Recording, options: Any) -> Sequence[EpisodeRef]:
        number = int(recording.name[-7:])
        metadata = {"task": number % TASKS, "scene": f"kitchen {number % 17}", "operator": number % 93}
        words = ("Reach for the cup on the shelf.", "Pick up the cup with the left arm.", "Place it.")
        segments = tuple(Segment(i, i + 1, text, "pick") for i, text in enumerate(words))
        instruction = f"put object {number % TASKS} where it belongs"
        ref = EpisodeRef(
            recording.name, "train", FRAMES, instruction, recording.files, (), segments=segments,
            metadata=metadata, locator={"member": f"{recording.name}/proprio_stats.h5"},
        )  # fmt: skip
        return (ref,)

    def read(ref: EpisodeRef, options: Any) -> Episode:
        number = int(ref.source_id[-7:])
        state = np.zeros((FRAMES, 20), np.float32)
        state[:, 0], state[:, 1] = number, np.arange(FRAMES)
        return Episode(ref, {"observation.state": state, "action": state[:, ::-1].copy()}, {})

    names = tuple(f"joint_{i}" for i in range(20))
    features = (Feature("observation.state", "float32", names), Feature("action", "float32", names))
    body = Embodiment("synthetic", "none", 30, "made up", features, {"gripper": "none"})
    return Converter("synthetic", 1, Options, find, scan, read, lambda options, variant: body, "*.shard")


if __name__.startswith("dpipe_converter"):
    CONVERTER = source()


def request(**changes: Any) -> Any:
    from dpipe.converters import load_converter
    from dpipe.pipeline.request import ConvertRequest

    options = load_converter(str(HERE)).Options()
    told = {"part_frames": PART_FRAMES, "name": "set"} | changes
    return ConvertRequest(source=str(HERE), raw=BASE / "raw", out=BASE / "set", options=options, **told)


# --- steps, each in a process of its own ----------------------------------------------------------------------


def plan(_: argparse.Namespace) -> dict[str, Any]:
    """What `dpipe plan convert` does: find, scan, compare; nothing is written."""
    from dpipe.pipeline.convert import read_catalog
    from dpipe.pipeline.progress import Progress
    from dpipe.pipeline.work import plan_conversion

    found, _ = plan_conversion(request(), read_catalog(request(), Progress(quiet=True)))
    return {"episodes": found.episodes, "to do": found.todo_episodes, "files": found.files}


def begin(_: argparse.Namespace) -> dict[str, Any]:
    """The first job of so many that its share is one part: scan, order and journal are as a conversion leaves them."""
    from dpipe.pipeline.convert import convert
    from dpipe.pipeline.progress import Progress

    return {"episodes": convert(request(share=(0, 10**9)), Progress(quiet=True)).encoded}


def journal(arguments: argparse.Namespace) -> dict[str, Any]:
    """Receipts and staged rows of every n-th part, as workers would leave them; nothing waits for the disk."""
    from types import SimpleNamespace

    import xxhash
    from dpipe.converters import load_converter
    from dpipe.pipeline.payload import file_memo, staged_data
    from dpipe.pipeline.receipts import receipt_path, write_part_receipt
    from dpipe.pipeline.request import episode_key, episode_key_base
    from dpipe.pipeline.statistics import statistics_table
    from dpipe.pipeline.tables import data_schema, episode_table, write_parquet
    from dpipe.pipeline.work import load_order

    os.fsync = lambda descriptor: None
    number, count = map(int, arguments.share.split("/"))
    asked, converter = request(), load_converter(str(HERE))
    features = converter.embodiment_of(asked.raw, asked.options, "").features
    folder = asked.out / "dpipe" / "journal"
    base = episode_key_base(converter, asked)
    order = load_order(folder)
    first = {name: episode for episode, name in enumerate(order.homes())}
    schema = data_schema(features)
    shards = sorted(asked.raw.glob("*.shard"))
    memos = {shard: file_memo([shard]) for shard in shards}
    arrays: dict[str, Any] = {}
    done = 0
    for part, names in order.parts.items():
        if part % count != number or receipt_path(asked.out, part).is_file():
            continue
        spools, tables, numbers = [], [], []
        for name in names:
            at = int(name[-7:])
            recording = SimpleNamespace(name=name, files=(shards[at * len(shards) // len(first)],))
            (ref,) = converter.scan(recording, asked.options)  # type: ignore[arg-type]
            episode = converter.read(ref, asked.options)
            columns = [episode.columns[feature.name] for feature in features]
            arrays = arrays or {"statistics": statistics_table(columns)}
            digest = xxhash.xxh3_128_hexdigest(name.encode())
            receipt = {
                "source_id": name, "split": "train", "variant": "", "frames": FRAMES, "instruction": ref.instruction,
                "metadata": dict(ref.metadata), "segments": [s.to_json() for s in ref.segments], "warnings": [],
                "key": episode_key(base, name), "memo": memos[ref.files[0]], "raw_digest": digest, "content": digest,
            }  # fmt: skip
            spools.append(SimpleNamespace(receipt=receipt, arrays=arrays))
            numbers.append((first[name], FRAMES * first[name], at % TASKS))
            told = dict(zip(("episode_index", "index", "task_index"), numbers[-1], strict=True))
            tables.append(episode_table(schema, features, episode.columns, FRAMES, 30, told))
        write_parquet(staged_data(asked.out, part), tables, schema)
        write_part_receipt(asked.out, part, spools, features, (), numbers, {}, {})
        done += len(names)
    return {"episodes": done}


def resume(_: argparse.Namespace) -> dict[str, Any]:
    """A killed run started again: catalogue remembered, every receipt compared, until it knows what is left."""
    from dpipe.converters import load_converter
    from dpipe.pipeline.convert import read_catalog
    from dpipe.pipeline.progress import Progress
    from dpipe.pipeline.receipts import COMPARED, load_receipts
    from dpipe.pipeline.work import chosen, load_order, plan_work

    asked = request()
    catalog = read_catalog(asked, Progress(quiet=True)).of("")
    folder = asked.out / "dpipe" / "journal"
    order = load_order(folder)
    refs = chosen(catalog, order, asked)
    converter = load_converter(asked.source)
    work = plan_work(asked, converter, folder, order, refs, load_receipts(asked.out, COMPARED))
    return {"episodes": len(refs), "parts to do": len(work.parts), "scanned again": catalog.fresh}


def finish(_: argparse.Namespace) -> dict[str, Any]:
    from dpipe.pipeline.convert import convert
    from dpipe.pipeline.progress import Progress

    result = convert(request(finish_only=True), Progress(quiet=True))
    return {"episodes": result.episodes, "frames": result.frames, "unchanged": result.unchanged}


def lerobot(_: argparse.Namespace) -> dict[str, Any]:
    """lerobot's own reader of the metadata."""
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

    meta = LeRobotDatasetMetadata("scale/set", root=BASE / "set")
    last = meta.episodes[len(meta.episodes) - 1]
    return {"episodes": meta.total_episodes, "last row ends at": last["dataset_to_index"]}


STEPS = {
    "plan": plan,
    "begin": begin,
    "journal": journal,
    "resume": resume,
    "finish": finish,
    "again": finish,
    "lerobot": lerobot,
}


def high_water_mb() -> float:
    """Peak resident memory of this process alone, as the kernel counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def run(step: str, name: str, *words: str) -> dict[str, Any]:
    """A step's time, memory and answer; remembered, so that the whole may be run in pieces."""
    kept = BASE / f"{name}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    command = [sys.executable, str(HERE), "--step", step, *words]
    environment = os.environ | {"DPIPE_QUIET": "1"}
    started, busy = time.monotonic(), processor_s()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        sys.exit(f"scale: {name} failed ({done.returncode})")
    told = json.loads(done.stdout.splitlines()[-1]) | {"seconds": time.monotonic() - started}
    told["processor seconds"] = processor_s() - busy
    kept.write_text(json.dumps(told) + "\n")
    print(f"  {name}: {told}", file=sys.stderr, flush=True)
    return told


def processor_s() -> float:
    """Of processes that ended: what a step costs on a machine that does nothing else."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def files_by_kind(root: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for path in root.rglob("*"):
        if path.is_file():
            relative = path.relative_to(root)
            kind = "/".join(relative.parts[:2] if relative.parts[0] == "dpipe" else relative.parts[:1])
            counts[kind] = counts.get(kind, 0) + 1
    return dict(sorted(counts.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=1_000_000)
    parser.add_argument(
        "--jobs", type=int, default=8, help="jobs the parts are divided among, one after the other"
    )
    parser.add_argument("--only", choices=list(STEPS), help="stop after this step")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--share", default="0/1", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="100,000 episodes")
    arguments = parser.parse_args()
    arguments.episodes = 100_000 if arguments.quick else arguments.episodes
    if arguments.step:
        told = STEPS[arguments.step](arguments)
        print(json.dumps(told | {"peak MB": high_water_mb()}))
        return 0
    raw = BASE / "raw"
    if not (raw / "episodes.txt").is_file() or int((raw / "episodes.txt").read_text()) != arguments.episodes:
        shutil.rmtree(BASE, ignore_errors=True)
        raw.mkdir(parents=True)
        for number in range(SHARDS):
            (raw / f"{number:04d}.shard").write_bytes(b"")
        (raw / "episodes.txt").write_text(str(arguments.episodes))
    told = {"plan": run("plan", "plan"), "begin": run("begin", "begin")}
    for job in range(arguments.jobs):
        told[f"journal {job}"] = run("journal", f"journal-{job}", "--share", f"{job}/{arguments.jobs}")
    told["files before"] = files_by_kind(BASE / "set")
    for step in ("resume", "finish", "again", "lerobot"):
        if step == "finish" and "files before" in told:
            counted = BASE / "files-before.json"
            if not counted.is_file():
                counted.write_text(json.dumps(told["files before"]))
            told["files before"] = json.loads(counted.read_text())
        told[step] = run(step, step)
        if arguments.only == step:
            return 0
    after = files_by_kind(BASE / "set")
    meta = sum(p.stat().st_size for p in (BASE / "set" / "meta").rglob("*") if p.is_file())
    values = Rounds({name: [told[name]["seconds"]] for name in STEPS if name in told})
    peak = max(told[name]["peak MB"] for name in ("plan", "begin", "resume", "finish", "again"))
    goals = [
        Goal(f"plan in {told['plan']['seconds']:.0f} s; 60 over that", 60 / told["plan"]["seconds"], 1),
        Goal(
            f"resume check in {told['resume']['seconds']:.0f} s; 30 over that",
            30 / told["resume"]["seconds"],
            1,
        ),
        Goal(f"peak memory {peak:.0f} MB; 2,000 over that", 2000 / peak, 1),
        Goal(
            f"lerobot holds meta/ in {told['lerobot']['peak MB']:.0f} MB; 2,000 over that",
            2000 / told["lerobot"]["peak MB"],
            1,
        ),
    ]
    facts = {"episodes": arguments.episodes, "steps": told, "files after": after, "meta MB": meta / 1e6}
    return report("scale", goals, values, "s", facts)


if __name__ == "__main__":
    sys.exit(main())
