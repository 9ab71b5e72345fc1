"""`dpipe status`: every dataset, target and run of a workspace, complete, partial or stale, and why.

complete    nothing is left to do
partial     a command was stopped, or only took a part of what there is: the same command goes on
stale       sound, but made from something that has changed since
unreadable  what is there cannot be opened; the message says why
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..schemas.errors import DpipeError
from ..streams.dataset import Dataset, open_dataset
from .workspace import Workspace


@dataclass(frozen=True)
class State:
    """One line of the table. `state` is complete, partial, stale or unreadable."""

    kind: str
    name: str
    state: str
    detail: str
    path: Path


def workspace_states(space: Workspace) -> list[State]:
    return [*_datasets(space), *_runs(space)]


# --- datasets -------------------------------------------------------------------------------------------------


def _datasets(space: Workspace) -> Iterator[State]:
    for root in space.datasets():
        manifest = root / "dpipe" / "manifest.json"
        if not manifest.is_file() and (root / "dpipe" / "journal").is_dir():
            done, total = _journal_counts(root)
            detail = f"{done} of {total} parts done; run the same dpipe convert again"
            yield State("dataset", root.name, "partial", detail, root)
            continue
        try:
            dataset = open_dataset(root)
        except DpipeError as error:
            yield State("dataset", root.name, "unreadable", str(error).splitlines()[0], root)
            continue
        detail = f"{len(dataset)} episodes, {dataset.total_frames} frames"
        state, why = "complete", ""
        if dataset.manifest:
            detail += f", {dataset.manifest.get('dropped', 0)} left out"
            state, why = _dataset_state(root, dataset.manifest)
        yield State("dataset", root.name, state, f"{detail}; {why}" if why else detail, root)
        yield from _targets(space, root, dataset)


def _dataset_state(root: Path, manifest: dict[str, Any]) -> tuple[str, str]:
    if ahead := _order_ahead(root, manifest):
        return "partial", ahead
    if changed := _raw_changes(root):
        return "stale", f"{changed}; run the same dpipe convert again"
    if waiting := _not_taken_in(root):
        return (
            "partial",
            f"{waiting} episodes of the recordings are not in it (--limit, --where); a later run appends",
        )
    return "complete", ""


def _journal_counts(root: Path) -> tuple[int, int]:
    journal = root / "dpipe" / "journal"
    total = sum(len(json.loads(path.read_text())["parts"]) for path in journal.glob("order-*.json"))
    return len(list((journal / "parts").glob("part-*.json"))), total


def _order_ahead(root: Path, manifest: dict[str, Any]) -> str:
    """Parts listed by a later run that has not finished."""
    done, total = _journal_counts(root)
    known = {part["part"] for part in manifest.get("parts", [])}
    waiting = total - len(known) - done
    spool = root / "dpipe" / "spool"
    if done or spool.is_dir():
        return f"a later run added episodes and has not finished ({max(waiting, 0)} parts to do)"
    return ""


def _raw_changes(root: Path) -> str:
    """Recordings that came or changed since the last run, by names, sizes and times alone; "" where none did.

    Recordings that are gone are no change: they may be discarded once they are converted.
    """
    from ..converters import load_converter
    from .payload import file_memo
    from .tables import read_columns

    journal = root / "dpipe" / "journal"
    if not (journal / "scan.parquet").is_file():
        return ""
    table = read_columns(journal / "scan.parquet", ["recording", "memo"])
    raw = Path((table.schema.metadata or {}).get(b"raw", b"").decode())
    if not raw.exists():
        return ""
    told = json.loads((journal / "settings.json").read_text())
    try:
        converter = load_converter(told["source"])
        known = {item.name for item in fields(converter.Options)}
        options = converter.Options(**{k: v for k, v in told["options"].items() if k in known})
        memos = dict(
            zip(table.column("recording").to_pylist(), table.column("memo").to_pylist(), strict=True)
        )
        new = changed = 0
        for recording in converter.find(raw, options):
            memo = memos.get(recording.name)
            new += memo is None
            changed += memo is not None and memo != json.dumps(file_memo(recording.files))
    except (DpipeError, OSError, TypeError):  # a source of one's own that is not here any more
        return ""
    found = [(new, "new"), (changed, "changed")]
    words = " and ".join(f"{count} {word}" for count, word in found if count)
    return f"recordings in {raw}: {words}" if words else ""


def _not_taken_in(root: Path) -> int:
    """Episodes of the last scan, of this dataset's variant, that no run has listed yet."""
    from .catalog import EPISODE, shared_texts
    from .tables import numbers_of, read_columns
    from .work import load_order

    journal = root / "dpipe" / "journal"
    if not (journal / "scan.parquet").is_file():
        return 0
    table = read_columns(journal / "scan.parquet", ["kind", "variant", "source_id"])
    listed = load_order(journal).listed
    rows = zip(
        numbers_of(table.column("kind")).tolist(),
        shared_texts(table.column("variant")),
        table.column("source_id").to_pylist(),
        strict=True,
    )
    of_variant: dict[str, list[int]] = {}
    for kind, variant, source_id in rows:
        if kind == EPISODE:
            counts = of_variant.setdefault(variant, [0, 0])
            counts[source_id in listed] += 1
    return sum(missing for missing, there in of_variant.values() if there)


# --- targets and shards ---------------------------------------------------------------------------------------


def _targets(space: Workspace, root: Path, dataset: Dataset) -> Iterator[State]:
    contents: set[str] | None = None
    bases = (root / "dpipe" / "targets", space.targets(root.name))
    for folder in (folder for base in bases if base.is_dir() for folder in sorted(base.glob("*/*"))):
        if folder.parent.name == "shards" or not folder.is_dir():
            continue
        stage, name = folder.parent.name, f"{root.name} {folder.parent.name} {folder.name}"
        again = f"run dpipe precompute {stage} again"
        if not (folder / "contract.json").is_file():
            done = len(list((folder / "parts").glob("part-*.json")))
            detail = f"{done} parts done; {again}"
            yield State("target", name, "partial", detail, folder)
            continue
        contents = contents if contents is not None else set(dataset.contents())
        lacking = len(contents - _bound(folder))
        if lacking:
            yield State("target", name, "stale", f"{lacking} episodes have no rows; {again}", folder)
        elif older := _older_stage(folder, stage):
            yield State("target", name, "stale", f"{older}; {again} under another --name", folder)
        else:
            yield State("target", name, "complete", f"{len(dataset)} episodes", folder)
    for base in (root / "dpipe" / "shards", space.targets(root.name) / "shards"):
        for folder in sorted(p for p in base.glob("*") if p.is_dir()):
            yield _shards(root, folder, dataset)


def _shards(root: Path, folder: Path, dataset: Dataset) -> State:
    name = f"{root.name} shards {folder.name}"
    if not (folder / "index.json").is_file():
        done = len(list(folder.glob("part-*.parquet")))
        detail = f"{done} of {len(dataset.parts())} parts done; run dpipe precompute shards again"
        return State("shards", name, "partial", detail, folder)
    if json.loads((folder / "index.json").read_text())["source"] != dataset.digest():
        detail = "made from other episodes; run dpipe precompute shards again"
        return State("shards", name, "stale", detail, folder)
    return State("shards", name, "complete", f"{len(dataset)} episodes", folder)


def _older_stage(folder: Path, stage: str) -> str:
    """Why a target's stage would make other rows today; "" where it would not."""
    from ..stages import STAGES, load_stage

    made = json.loads((folder / "contract.json").read_text())["contract"].get("stage_version")
    now = load_stage(stage).version if stage in STAGES else made
    return f"made by version {made} of the stage, which is at {now}" if made != now else ""


def _bound(folder: Path) -> set[str]:
    from .tables import read_columns

    index = folder / "episodes.parquet"
    return set(read_columns(index, ["content"]).column("content").to_pylist()) if index.is_file() else set()


# --- runs -----------------------------------------------------------------------------------------------------


def _runs(space: Workspace) -> Iterator[State]:
    for folder in sorted((space.root / "runs").glob("*/*")):
        if not (folder / "config.json").is_file():
            continue
        name = f"{folder.parent.name} {folder.name}"
        result = folder / "result.json"
        if not result.is_file():
            steps = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
            detail = f"last checkpoint {steps[-1] if steps else 'none'}; run the same dpipe train again"
            yield State("run", name, "partial", detail, folder)
            continue
        told = json.loads(result.read_text())
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in told.get("metrics", {}).items())
        detail = f"{told['steps']} steps, {numbers}"
        if why := _run_changes(space, folder):
            yield State("run", name, "stale", f"{detail}; {why}", folder)
        else:
            yield State("run", name, "complete", detail, folder)


def _run_changes(space: Workspace, folder: Path) -> str:
    """Whether a run's dataset holds other episodes by now."""
    terms = json.loads((folder / "config.json").read_text()).get("terms", {})
    told = terms.get("dataset")
    digest = told.get("digest") if isinstance(told, dict) else told
    root = space.dataset(folder.name)
    if not isinstance(digest, str) or not digest or not root.is_dir():
        return ""
    try:
        now = open_dataset(root).digest()
    except DpipeError:
        return f"{root.name} cannot be opened any more"
    return (
        "" if now == digest else f"{root.name} holds other episodes by now; train again under another --name"
    )
