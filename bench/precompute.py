"""Precompute: does anything beside the model, the decoder and the columns cost time?

    python bench/precompute.py [--rounds 3] [--quick] [--folder DIR] [--tower SPEC] [--device cpu|cuda]

with a model    frames/s of the foresight stage's work on the LIBERO sample's videos, against the tower's forward
                pass alone (frames in memory, same batches) and decoding alone (same blocks). On a CPU the bound
                is 1 / (1 / forward + 1 / decode), on a GPU the slower of the two.
without         rows/s of the tokens stage (its per-episode work, and the whole command with fit and report)
                against reading its column.
reading back    shuffled (t, t + 16) pairs from a cache of 64 kB rows, against a bare memory map of the same bytes.

All contenders take turns in one process; ratios are those within a round. Figures of a GPU are printed with its
name and change no exit code.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent / "tests"))

from dpipe.models.towers import open_tower  # noqa: E402
from dpipe.pipeline import precompute as module  # noqa: E402
from dpipe.pipeline import target_parts  # noqa: E402
from dpipe.pipeline.precompute import precompute  # noqa: E402
from dpipe.pipeline.progress import Progress  # noqa: E402
from dpipe.schemas.contract import ArraySpec  # noqa: E402
from dpipe.stages import load_stage  # noqa: E402
from dpipe.stages.foresight import Params  # noqa: E402
from dpipe.stages.tokens import Params as TokenParams  # noqa: E402
from dpipe.streams.arrays import write_array  # noqa: E402
from dpipe.streams.dataset import open_dataset  # noqa: E402
from dpipe.streams.targets import open_targets  # noqa: E402
from measure import Rounds, report  # noqa: E402
from tiny_dataset import write_tiny  # noqa: E402

BATCH = 32
WITH_MODEL, WITHOUT, READ_BACK = 0.9, 0.5, 0.5


def camera_dataset(folder: Path, episodes: int) -> Path:
    """The simulator's LIBERO sample, converted; made once."""
    from dpipe.samples import write_sample
    from trees import run_convert

    root = folder / f"libero-{episodes}"
    if not (root / "dpipe" / "manifest.json").is_file():
        raw = folder / f"raw-{episodes}"
        write_sample("libero", raw, episodes=episodes, seed=0)
        run_convert(raw, root)
    return root


def robot_columns(seed: int, frames: int) -> dict[str, np.ndarray]:
    """LIBERO's widths: 8 of state, 7 of action."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(frames, 15)).astype(np.float32)
    return {"observation.state": values[:, :8], "action": values[:, 8:]}


def column_dataset(folder: Path, rows: int) -> Path:
    root = folder / f"columns-{rows}"
    if not (root / "meta" / "info.json").is_file():
        episodes = [(seed, 250) for seed in range(rows // 250)]
        write_tiny(
            root,
            episodes,
            parts=[64] * (len(episodes) // 64) + [len(episodes) % 64 or 64][: bool(len(episodes) % 64)],
        )
    return root


def timed(work: Callable[[], int]) -> float:
    """Units per second of one run."""
    start = time.perf_counter()
    units = work()
    return units / (time.perf_counter() - start)


def with_model(folder: Path, rounds: Rounds, count: int, episodes: int, tower_spec: str, device: str) -> str:
    """Adds the contenders of one tower; returns its name."""
    root = camera_dataset(folder, episodes)
    name = tower_spec.removeprefix("hf:").rsplit("/", 1)[-1]
    options = {"tower": tower_spec, "device": device, "batch": BATCH, "limit": 9.0}
    shutil.rmtree(root / "dpipe" / "targets", ignore_errors=True)
    (made,) = precompute(root, ["foresight"], {"foresight": options})
    target_parts._OPEN.clear()
    dataset = open_dataset(root)
    camera = dataset.cameras[0]
    params = Params(**options)
    tower = open_tower(tower_spec, device=device)
    frames = dataset.frames(0, camera, 0, BATCH)
    view = module.DiskDataset(dataset)
    total = dataset.total_frames

    def forward() -> int:
        for _ in range(total // BATCH):
            tower.encode(frames)
        return total // BATCH * BATCH

    def decode() -> int:
        fresh = open_dataset(root)
        for e in range(len(fresh)):
            length = int(fresh.episodes.length[e])
            for first in range(0, length, BATCH):
                fresh.frames(e, camera, first, min(first + BATCH, length))
        return total

    jobs = jobs_of(dataset, "foresight", params, root)
    module.make_part(jobs[0])  # the tower is open before the clock starts

    def stage() -> int:
        for job in jobs:
            module.make_part(job)
        return total

    assert view.info.frames == made.frames
    rounds.run(
        count,
        {
            f"{name} forward": lambda: timed(forward),
            f"{name} decode": lambda: timed(decode),
            f"{name} stage": lambda: timed(stage),
        },
    )
    return name


def jobs_of(dataset, stage: str, params, root: Path) -> list[module.PartJob]:
    run = module._TargetRun(
        dataset, load_stage(stage), params, root / "dpipe/targets", "", False, None, Progress(quiet=True)
    )
    jobs = run.jobs(run._prepare())
    (run.folder / "parts").mkdir(parents=True, exist_ok=True)
    return jobs


def without_model(folder: Path, rounds: Rounds, count: int, rows: int) -> None:
    root = column_dataset(folder, rows)
    shutil.rmtree(root / "dpipe" / "targets", ignore_errors=True)
    options = {"tokens": {"probe": "none"}}

    def read() -> int:
        fresh = open_dataset(root)
        for part in fresh.parts():
            fresh.all_columns(["action"], part)
        return fresh.total_frames

    def whole() -> int:
        shutil.rmtree(root / "dpipe" / "targets", ignore_errors=True)
        target_parts._OPEN.clear()
        (made,) = precompute(root, ["tokens"], options)
        return made.frames

    def stage_rate() -> float:
        shutil.rmtree(root / "dpipe" / "targets", ignore_errors=True)
        target_parts._OPEN.clear()
        dataset = open_dataset(root)
        jobs = jobs_of(dataset, "tokens", TokenParams(probe="none"), root)
        return timed(lambda: sum(len(module.make_part(job)["receipt"]["episodes"]) * 250 for job in jobs))

    rounds.run(
        count,
        {
            "columns read": lambda: timed(read),
            "tokens whole command": lambda: timed(whole),
            "tokens stage": stage_rate,
        },
    )


def reading_back(folder: Path, rounds: Rounds, count: int, megabytes: int, pairs: int) -> None:
    """A cache of 64 x 512 float16 rows (64 kB) in the pages of memory, read in a shuffled order."""
    root = folder / f"cache-{megabytes}"
    frames = megabytes * 2**20 // (64 * 512 * 2)
    if not (root / "meta" / "info.json").is_file():
        write_tiny(root, [(0, frames)])
    hand_made(root, frames)
    targets = open_targets(root, ["foresight:as=now", "foresight:at=+16"])
    (shard,) = (root / "dpipe/targets/foresight/hand/feat").glob("part-*/c.0.0.0")
    bare = np.memmap(shard, np.float16, "r", shape=(frames, 64, 512)).view(np.ndarray)
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, frames - 16, BATCH) for _ in range(pairs // BATCH)]

    def ours() -> int:
        for rows in batches:
            targets.take(index=rows)
        return len(batches) * BATCH

    def theirs() -> int:
        for rows in batches:
            bare[rows], bare[rows + 16]
        return len(batches) * BATCH

    found = targets.take(index=batches[0])
    np.testing.assert_array_equal(found["foresight"], bare[batches[0] + 16])
    theirs()
    rounds.run(count, {"bare memory map": lambda: timed(theirs), "targets.take": lambda: timed(ours)})


def hand_made(root: Path, frames: int) -> None:
    import json

    from dpipe.schemas.contract import Contract

    folder = root / "dpipe/targets/foresight/hand"
    if (folder / "contract.json").is_file():
        return
    spec = ArraySpec("feat", (64, 512), "float16", ("token", "channel"), {"primary": True})
    values = np.random.default_rng(0).normal(size=(frames, 64, 512)).astype(np.float16)
    write_array(folder / "feat/part-00000-k", spec, values)
    content = open_dataset(root).contents()
    index = {"content": content, "episode_index": [0], "part": [0], "key": ["k"], "frames": [frames]}
    pq.write_table(
        pa.table({**index, "frame_start": [0], "frame_rows": [frames]}), folder / "episodes.parquet"
    )
    contract = Contract("foresight", "hand", 1, "", 10).to_json()
    (folder / "contract.json").write_text(json.dumps({"contract": contract, "arrays": [spec.to_json()]}))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small data: a look, not a measurement")
    parser.add_argument("--folder", type=Path, default=HERE / "out" / "precompute-data")
    parser.add_argument("--tower", action="append", help="hf:FOLDER or embedded; may be repeated")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=("model", "columns", "read"))
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    rounds, goals = Rounds(), []
    if chosen.only in (None, "model"):
        for spec in chosen.tower or ["embedded", f"hf:{small_tower(chosen.folder)}"]:
            name = with_model(
                chosen.folder, rounds, chosen.rounds, 2 if chosen.quick else 12, spec, chosen.device
            )
            values = rounds.values
            bound = [
                min(f, d) if chosen.device != "cpu" else 1 / (1 / f + 1 / d)
                for f, d in zip(values[f"{name} forward"], values[f"{name} decode"], strict=True)
            ]
            rounds.values[f"{name} bound"] = bound
            goals.append(rounds.ratio(f"{name} of its bound", f"{name} stage", f"{name} bound", WITH_MODEL))
    if chosen.only in (None, "columns"):
        without_model(chosen.folder, rounds, chosen.rounds, 50_000 if chosen.quick else 500_000)
        goals.append(rounds.ratio("tokens of reading columns", "tokens stage", "columns read", WITHOUT))
    if chosen.only in (None, "read"):
        reading_back(chosen.folder, rounds, chosen.rounds, 64 if chosen.quick else 1024, 4096)
        goals.append(rounds.ratio("pairs of a bare map", "targets.take", "bare memory map", READ_BACK))
    return report("precompute", goals, rounds, "per s")


def small_tower(folder: Path) -> Path:
    """A DINOv2 of random weights, small enough for a CPU and large enough to be the work."""
    target = folder / "dinov2-small-random"
    if not (target / "config.json").is_file():
        import torch
        import transformers

        torch.manual_seed(0)
        config = transformers.Dinov2Config(
            hidden_size=192, num_hidden_layers=4, num_attention_heads=3, image_size=112, patch_size=14
        )
        transformers.Dinov2Model(config).eval().save_pretrained(target)
    return target


if __name__ == "__main__":
    sys.exit(main())
