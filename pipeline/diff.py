"""`dpipe diff A B`: in what two datasets differ: meaning, counts, statistics, and the first episode that is another.

Episodes are compared by content digest (actions and states), in order; then, of the first that differs, column by
column, to the first frame. Pictures are compared by their packets, which needs no decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..streams.dataset import Dataset, open_dataset
from .rearrange import meaning, splits_of

CLOSE = 1e-6  # relative, of statistics: below it they are one number summed in another order
SHOWN = 12


@dataclass(frozen=True)
class Difference:
    """`where` is a path of words (conventions.action, stats.action.mean[3]); `a` and `b` what each side says."""

    section: str
    where: str
    a: str
    b: str


@dataclass(frozen=True)
class Diff:
    a: str
    b: str
    differences: tuple[Difference, ...]

    @property
    def same(self) -> bool:
        return not self.differences

    def to_text(self) -> str:
        if self.same:
            return f"{self.a} and {self.b} hold the same"
        lines = [f"{self.a} against {self.b}"]
        for section in dict.fromkeys(d.section for d in self.differences):
            own = [d for d in self.differences if d.section == section]
            lines.append(f"{section}:")
            lines += [f"  {d.where}: {d.a} | {d.b}" for d in own[:SHOWN]]
            if len(own) > SHOWN:
                lines.append(f"  and {len(own) - SHOWN} more")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "a": self.a,
            "b": self.b,
            "same": self.same,
            "differences": [vars(d) for d in self.differences],
        }


def diff(first: Path, second: Path) -> Diff:
    a, b = open_dataset(first), open_dataset(second)
    found = [*_meaning(a, b), *_counts(a, b), *_statistics(a, b), *_episodes(a, b)]
    return Diff(str(first), str(second), tuple(found))


def _meaning(a: Dataset, b: Dataset) -> Iterator[Difference]:
    here, there = meaning(a), meaning(b)
    for name in dict.fromkeys([*here, *there]):
        if here.get(name) != there.get(name):
            yield Difference("conventions", name, _word(here.get(name)), _word(there.get(name)))


def _counts(a: Dataset, b: Dataset) -> Iterator[Difference]:
    def counts(dataset: Dataset) -> dict[str, Any]:
        told: dict[str, Any] = {"episodes": len(dataset), "frames": dataset.total_frames}
        splits = splits_of(dataset)
        told |= {f"split {name or 'none'}": splits.count(name) for name in dict.fromkeys(splits)}
        told["instructions"] = len(dataset.tasks)
        told["left out"] = (dataset.manifest or {}).get("dropped")
        return told

    here, there = counts(a), counts(b)
    for name in dict.fromkeys([*here, *there]):
        if here.get(name) != there.get(name):
            yield Difference("counts", name, _word(here.get(name)), _word(there.get(name)))
    only = [t for t in a.tasks if t not in set(b.tasks)], [t for t in b.tasks if t not in set(a.tasks)]
    if only[0] or only[1]:
        yield Difference("counts", "instructions of one alone", _some(only[0]), _some(only[1]))


def _statistics(a: Dataset, b: Dataset) -> Iterator[Difference]:
    for feature in dict.fromkeys([*a.stats, *b.stats]):
        here, there = a.stats.get(feature), b.stats.get(feature)
        if here is None or there is None:
            yield Difference("statistics", feature, _word(here and "there"), _word(there and "there"))
            continue
        names = a.names(feature) if feature in a.features else ()
        for statistic in dict.fromkeys([*here, *there]):
            x, y = (np.asarray(side.get(statistic, []), float).reshape(-1) for side in (here, there))
            if x.shape != y.shape:
                yield Difference(
                    "statistics", f"{feature}.{statistic}", f"{len(x)} numbers", f"{len(y)} numbers"
                )
                continue
            for dim in np.flatnonzero(~np.isclose(x, y, rtol=CLOSE, atol=1e-9, equal_nan=True)).tolist():
                name = names[dim] if len(names) == len(x) and dim < len(names) else str(dim)
                where = f"{feature}.{statistic}" + (f"[{name}]" if len(x) > 1 else "")
                yield Difference("statistics", where, f"{x[dim]:.6g}", f"{y[dim]:.6g}")


def _episodes(a: Dataset, b: Dataset) -> Iterator[Difference]:
    """The first place at which the two are no longer episode by episode the same, and why."""
    contents = a.contents(), b.contents()
    both = min(len(a), len(b))
    for e in range(both):
        if contents[0][e] != contents[1][e]:
            yield from _one_episode(a, b, e, contents)
            return
        for name, here, there in (
            ("instruction", a.episodes.tasks(e), b.episodes.tasks(e)),
            ("source_id", a.episodes.source_id(e), b.episodes.source_id(e)),
        ):
            if here != there and (name == "instruction" or (here and there)):
                yield Difference("first differing episode", f"episode {e}, {name}", _word(here), _word(there))
                return
        camera = _other_pictures(a, b, e)
        if camera:
            where = f"episode {e}, {camera}"
            yield Difference("first differing episode", where, "packets of its video", "other packets")
            return
    if len(a) != len(b):
        longer, rest = (a, "B ends") if len(a) > len(b) else (b, "A ends")
        told = f"{longer.episodes.source_id(both) or longer.episodes.tasks(both)}"
        sides = (told, rest) if longer is a else (rest, told)
        yield Difference("first differing episode", f"episode {both}", *sides)


def _one_episode(
    a: Dataset, b: Dataset, e: int, contents: tuple[Sequence[str], Sequence[str]]
) -> Iterator[Difference]:
    where, section = f"episode {e}", "first differing episode"
    elsewhere = contents[1].index(contents[0][e]) if contents[0][e] in contents[1] else None
    if elsewhere is not None:
        yield Difference(section, where, "is there", f"is its episode {elsewhere}")
    lengths = int(a.episodes.length[e]), int(b.episodes.length[e])
    if lengths[0] != lengths[1]:
        yield Difference(section, f"{where}, frames", f"{lengths[0]}", f"{lengths[1]}")
    shared = [name for name in a.vectors if name in b.vectors]
    here, there = a.columns(shared, e), b.columns(shared, e)
    frames = min(lengths)
    for name in shared:
        x, y = (side[name][:frames].reshape(frames, -1) for side in (here, there))
        if x.shape != y.shape:
            yield Difference(section, f"{where}, {name}", f"{x.shape[1]} dimensions", f"{y.shape[1]}")
            continue
        unlike = ~((x == y) | (np.isnan(x) & np.isnan(y))) if x.dtype.kind == "f" else x != y
        if unlike.any():
            t, dim = (int(i) for i in np.argwhere(unlike)[0])
            names = a.names(name)
            word = names[dim] if dim < len(names) else str(dim)
            share = float(unlike.any(axis=1).mean())
            place = f"{where}, {name}[{word}], first at frame {t}, in {share:.0%} of the frames"
            yield Difference(section, place, f"{x[t, dim]:.7g}", f"{y[t, dim]:.7g}")


def _other_pictures(a: Dataset, b: Dataset, e: int) -> str:
    """The first camera whose packets of an episode differ in sizes or bytes; "" where none does."""
    from ..video.mp4 import copy_run, read_table

    for camera in a.cameras:
        if camera not in b.cameras or {a.features[camera]["dtype"], b.features[camera]["dtype"]} != {"video"}:
            continue
        runs = []
        for dataset in (a, b):
            table = read_table(dataset.video_path(e, camera))
            first = int(dataset.episodes.cameras[camera].first_frame[e])
            runs.append(copy_run(table, first, int(dataset.episodes.length[e])))
        if not np.array_equal(runs[0].sizes, runs[1].sizes):
            return camera
        packets = []
        for run in runs:
            assert isinstance(run.source, Path)
            with open(run.source, "rb") as file:
                spans = zip(run.offsets.tolist(), run.sizes.tolist(), strict=True)
                packets.append([_read(file, offset, size) for offset, size in spans])
        if packets[0] != packets[1]:
            return camera
    return ""


def _read(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _word(value: Any) -> str:
    text = "nothing" if value is None or value == "" else str(value)
    return text if len(text) <= 70 else text[:67] + "..."


def _some(texts: Sequence[str]) -> str:
    if not texts:
        return "none"
    return _word(texts[0]) + (f" and {len(texts) - 1} more" if len(texts) > 1 else "")
