"""Which episodes a dataset has, in which order and parts, and what of them is still to do.

The order of a dataset's episodes is fixed on disk once (`order-0000.json`, one file a batch of new or changed ones),
before any of them is encoded: numbers depend on it alone, never on who was done first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..converters import Converter, load_converter
from ..schemas.episode import Dropped, Embodiment, EpisodeRef
from ..schemas.errors import DataError
from .catalog import Catalog, Refs, select
from .durable import write_json
from .payload import EpisodeJob, digest_episode, file_memo
from .receipts import COMPARED, Receipts, few_collections, load_receipts
from .request import ConvertRequest, check_request, check_settings, episode_key, episode_key_base
from .spool import read_spool, spool_name

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Order:
    """Which episodes the dataset has, in the order they were taken in, cut into parts; fixed on disk once."""

    files: tuple[str, ...]
    parts: Mapping[int, list[str]]

    @property
    def listed(self) -> set[str]:
        return {source_id for ids in self.parts.values() for source_id in ids}

    def homes(self) -> dict[str, int]:
        """Every episode once, in order -> the part it was first listed in, where its rows belong for good."""
        found: dict[str, int] = {}
        for part, ids in self.parts.items():
            for source_id in ids:
                found.setdefault(source_id, part)
        return found


@dataclass
class Work:
    """What is left to do, from comparing the catalogue with the receipts."""

    todo: list[tuple[int, int]] = field(default_factory=list)  # encode: (row of the refs, part)
    parts: dict[int, list[str]] = field(default_factory=dict)  # parts not yet muxed -> their episodes
    order: list[str] = field(default_factory=list)  # every episode of the dataset, in its order
    homes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # its part
    gone: list[tuple[str, int]] = field(default_factory=list)  # listed, neither done nor found any more


def order_files(journal: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in journal.glob("order-*.json")))


def load_order(journal: Path) -> Order:
    files = order_files(journal)
    batches = (json.loads((journal / name).read_text()) for name in files)
    return Order(files, {part["part"]: part["episodes"] for batch in batches for part in batch["parts"]})


def chosen(catalog: Catalog, order: Order, request: ConvertRequest) -> Refs:
    """Episodes that meet --where and --limit, and those an earlier run has already taken in."""
    refs = catalog.refs
    if request.where or request.limit:
        wanted = {*select(refs, request.where, request.limit).source_ids, *order.listed}
        refs = refs.take([row for row, source_id in enumerate(refs.source_ids) if source_id in wanted])
    _require_one_size(refs, request)
    return refs


def _require_one_size(refs: Refs, request: ConvertRequest) -> None:
    """All episodes have the same cameras of the same size; DataError with the sizes found otherwise."""
    shapes: dict[tuple[Any, ...], int] = {}
    for cameras, row, _ in refs.camera_sets():
        shapes.setdefault(tuple((c.key, c.height, c.width) for c in map(request.video.size, cameras)), row)
    if len(shapes) > 1:
        listed = "\n".join(
            f"    {', '.join(f'{key} {w}x{h}' for key, h, w in shape)}: {refs.source_ids[row]}"
            for shape, row in shapes.items()
        )
        raise DataError(
            f"recordings differ in their pictures, and a dataset has one size a camera\n  found:\n{listed}\n"
            f"  next: --resize WxH brings them to one size, or convert their folders separately with --raw and --name"
        )


def plan_work(
    request: ConvertRequest,
    converter: Converter,
    journal: Path,
    order: Order,
    refs: Refs,
    receipts: Receipts,
) -> Work:
    """Fix the order of new episodes on disk, and find what has no valid receipt yet."""
    fresh, changed = _compare(request, converter, order, refs, receipts)
    parts = dict(order.parts)
    done = set(np.unique(receipts.numbers("part")).tolist())
    if changed:  # a run that was stopped may have listed them already, in parts still to be made
        listed = {source_id for part, ids in parts.items() if part not in done for source_id in ids}
        changed = [row for row in changed if refs.source_ids[row] not in listed]
    if fresh or changed:
        # A changed episode keeps its place; its new payload goes into a new part, listed as a replacement.
        if not order.parts:
            splits = refs.texts("split")
            fresh.sort(key=lambda row: _split_rank(splits[row]))
        new = _parts(refs, [*fresh, *changed], max(parts, default=-1) + 1, request.part_frames)
        batch = {"parts": [{"part": part, "episodes": ids} for part, ids in new.items()]}
        write_json(journal / f"order-{len(order.files):04d}.json", batch, indent=None)
        parts |= new
    base = episode_key_base(converter, request)
    homes = Order((), parts).homes()
    work = Work(order=list(homes), homes=np.fromiter(homes.values(), np.int64, len(homes)))
    spool = journal.parent / "spool"
    spooled = {path.name for path in spool.iterdir()} if spool.is_dir() else set()
    missing = [part for part in parts if part not in done]
    newest = {s: part for part, ids in parts.items() for s in ids} if missing else {}
    for part in missing:
        ids = parts[part]
        if all(newest[source_id] > part for source_id in ids):
            continue  # made once, and since then every episode of it anew
        work.parts[part] = ids
        for source_id in ids:
            row, path = refs.row_of.get(source_id), spool_path(spool, source_id, part)
            if path.name in spooled and _spooled(request, path, refs, row, episode_key(base, source_id)):
                continue
            if row is None:
                work.gone.append((source_id, part))
            else:
                work.todo.append((row, part))
    return work


@few_collections()
def _compare(
    request: ConvertRequest, converter: Converter, order: Order, refs: Refs, receipts: Receipts
) -> tuple[list[int], list[int]]:
    """Rows of new episodes, and of those whose recording changed since their receipt."""
    listed = order.listed
    base = episode_key_base(converter, request)
    fresh = [row for row, source_id in enumerate(refs.source_ids) if source_id not in listed]
    if not len(receipts):
        return fresh, []
    changed = []
    rows_of, memos, latest = refs.row_of, list(refs.memos()), receipts.latest
    for at, (source_id, (was, memo)) in enumerate(
        zip(receipts.source_ids, receipts.rows(["key", "memo"]), strict=True)
    ):
        row = rows_of.get(source_id)
        if row is None or latest[source_id] != at:
            continue
        key = episode_key(base, source_id)
        if was == key and memo == memos[row] and not request.verify:
            continue  # as `_valid` says, of a million without asking it
        receipt = receipts.one(at, ("key", "memo", "raw_digest", "dropped"))
        if not _valid(request, receipt, key, memos[row], lambda row=row: refs[row]):
            changed.append(row)
    return fresh, sorted(changed)


def share_of(work: Work, part: int, count: int) -> Work:
    """What one of `count` independent jobs has to do: every count-th part, whole."""
    parts = {number: ids for number, ids in work.parts.items() if number % count == part}
    return Work(
        [(row, number) for row, number in work.todo if number in parts],
        parts,
        work.order,
        work.homes,
        [(source_id, number) for source_id, number in work.gone if number in parts],
    )


def _parts(refs: Refs, rows: Sequence[int], first: int, part_frames: int) -> dict[int, list[str]]:
    """Cut episodes, in order, into parts of at most `part_frames` frames (one longer episode is a part alone)."""
    parts: dict[int, list[str]] = {}
    part, room = first - 1, -1
    lengths = refs.frames.tolist()
    for row in rows:
        if room < lengths[row] or part < first:
            part, room = part + 1, part_frames
            parts[part] = []
        parts[part].append(refs.source_ids[row])
        room -= lengths[row]
    return parts


def _split_rank(split: str) -> tuple[int, str]:
    """Train first, so that `splits` can name contiguous ranges."""
    return (0 if split == "train" else 1, split)


@dataclass(frozen=True)
class ConvertPlan:
    """What a conversion would do, by arithmetic and a scan; nothing is written."""

    source: str
    root: Path
    recordings: int
    episodes: int  # of the dataset when done
    frames: int
    todo_episodes: int
    todo_frames: int
    changed: tuple[str, ...]
    raw_bytes: int  # of the files to read
    files: int  # to be written
    dropped: tuple[Dropped, ...]


def plan_conversion(request: ConvertRequest, catalog: Catalog) -> tuple[ConvertPlan, Refs]:
    """Compare a catalogue with what is done; what is to do, and the episodes of it."""
    converter = load_converter(request.source)
    check_request(request)
    journal = request.out / "dpipe" / "journal"
    if (journal / "settings.json").is_file():
        check_settings(request, converter, journal)
    catalog = catalog.of(request.variant)
    order = load_order(journal)
    refs = chosen(catalog, order, request)
    receipts = load_receipts(request.out, COMPARED)
    fresh, changed = _compare(request, converter, order, refs, receipts)
    redo = {*fresh, *changed}
    rows = [row for row, s in enumerate(refs.source_ids) if row in redo or s not in receipts.latest]
    todo = refs.take(rows)
    sizes: dict[str, int] = {}
    for paths in todo.paths():
        for path in paths:
            if str(path) not in sizes:
                sizes[str(path)] = path.stat().st_size if path.exists() else 0
    cameras = next((cameras for cameras, _, _ in refs.camera_sets()), ())
    plan = ConvertPlan(
        source=converter.name,
        root=request.out,
        recordings=catalog.recordings,
        episodes=len(refs),
        frames=int(refs.frames.sum()),
        todo_episodes=len(todo),
        todo_frames=int(todo.frames.sum()),
        changed=tuple(refs.source_ids[row] for row in changed),
        raw_bytes=sum(sizes.values()),
        files=len(_parts(todo, range(len(todo)), 0, request.part_frames)) * (1 + len(cameras)),
        dropped=tuple(catalog.dropped),
    )
    return plan, todo


def episode_job(
    request: ConvertRequest, ref: EpisodeRef, key: str, spool: Path, embodiment: Embodiment | None = None
) -> EpisodeJob:
    if embodiment is None:
        converter = load_converter(request.source)
        embodiment = converter.embodiment_of(request.raw, request.options, ref.variant)
    return EpisodeJob(
        request.source, ref, request.options, request.video, embodiment, key, spool, request.shards
    )


def spool_path(spool: Path, source_id: str, part: int) -> Path:
    return spool / f"{part:06d}-{spool_name(source_id)}.episode"


def _valid(
    request: ConvertRequest,
    receipt: Mapping[str, Any],
    key: str,
    memo: str,
    read: Callable[[], EpisodeRef],
) -> bool:
    """A receipt holds when its key matches and the files are as they were, or prove to hold the same episode."""
    if receipt["key"] != key:
        return False
    if not request.verify and receipt["memo"] == memo:
        return True
    if receipt["dropped"]:
        return False  # it failed with other files: worth another try
    ref = read()
    if not all(path.exists() for path in ref.files):
        return True  # discarded after its receipt was durable
    try:
        return digest_episode(episode_job(request, ref, key, Path())) == receipt["raw_digest"]
    except DataError:
        return False


def _spooled(request: ConvertRequest, path: Path, refs: Refs, row: int | None, key: str) -> bool:
    """Whether a spool file holds its episode as the recording is now; one whose recording is gone counts."""
    try:
        receipt = read_spool(path).receipt
    except DataError:
        path.unlink()
        return False
    if row is None:
        return receipt["key"] == key and "dropped" not in receipt
    told = {"key": receipt["key"], "memo": json.dumps(receipt["memo"])}
    told |= {"dropped": receipt.get("dropped", ""), "raw_digest": receipt.get("raw_digest", "")}
    ref = refs[row]
    if _valid(request, told, key, json.dumps(file_memo(ref.files)), lambda: ref):
        return True
    path.unlink()
    return False


def provisional_numbers(work: Work, refs: Refs) -> Callable[[str], tuple[int, int, int]]:
    """Numbers as they come out if nothing more is dropped; `finish` rewrites tables where they do not."""
    rows = np.fromiter((refs.row_of.get(s, -1) for s in work.order), np.int64, len(work.order))
    frames = np.where(rows >= 0, refs.frames[rows] if len(refs) else 0, 0)
    first = np.cumsum(frames) - frames
    tasks: dict[str, int] = {}
    instruction = refs.texts("instruction")
    task = [tasks.setdefault(instruction[row], len(tasks)) if row >= 0 else 0 for row in rows.tolist()]
    place = {source_id: episode for episode, source_id in enumerate(work.order)}

    def numbers(source_id: str) -> tuple[int, int, int]:
        episode = place[source_id]
        return episode, int(first[episode]), task[episode]

    return numbers
