"""Catalogue and receipts: nothing is looked at twice, and what is added touches only itself."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dpipe.converters import Converter, load_converter
from dpipe.pipeline import catalog as module
from dpipe.pipeline import finish
from dpipe.pipeline.catalog import build_catalog, select
from dpipe.pipeline.convert import convert, read_catalog
from dpipe.pipeline.execute import Executor, StopRequest
from dpipe.pipeline.precompute import precompute
from dpipe.pipeline.progress import Progress
from dpipe.pipeline.receipts import Receipts, load_receipts
from dpipe.pipeline.request import ConvertRequest
from dpipe.pipeline.statistics import column_statistics, weighted_statistics
from dpipe.schemas.episode import EpisodeRef
from dpipe.schemas.errors import Interrupted
from dpipe.streams.dataset import open_dataset
from hypothesis import given
from hypothesis import strategies as st
from raw_libero import demo_arrays, write_raw, write_suite
from test_faults import folder as in_memory  # noqa: F401 - a fixture
from text_source import text_source
from trees import run_convert, tree_digest

QUIET = Progress(quiet=True)

# One file a hundred episodes: episode n of file f says its own number, and a log what was looked at.
MANY = """
LOG = Path(__file__).with_suffix(".log")

def scan(recording, options):
    LOG.open("a").write(f"scan {recording.name}\\n")
    count = int(recording.files[0].read_text())
    return [
        EpisodeRef(f"{recording.name}/{n:03d}", "train", 4, f"task {n % 3}", recording.files, ())
        for n in range(count)
    ]

def read(ref, options):
    LOG.open("a").write(f"read {ref.source_id}\\n")
    name, _, number = ref.source_id.partition("/")
    state = np.full((4, 2), int(number), np.float32) + np.arange(4, dtype=np.float32)[:, None] / 8
    return Episode(ref, {"observation.state": state, "action": state + len(name)}, {})
"""


def many(folder: Path) -> ConvertRequest:
    return text_source(folder, "many", MANY, part_frames=200)


def test_recordings_of_words_alone_are_converted(tmp_path: Path):
    bare = """
features = ()

def scan(recording, options):
    return [EpisodeRef(f"{recording.name}/{n}", "train", 4, "say", recording.files, ()) for n in range(2)]

def read(ref, options):
    return Episode(ref, {}, {})
"""
    asked = text_source(tmp_path, "bare", bare, part_frames=200)
    (asked.raw / "a.txt").write_text("")
    assert convert(asked, QUIET).episodes == 2
    assert open_dataset(asked.out).total_frames == 8


def log(folder: Path) -> list[str]:
    path = folder / "many.log"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def here(stop: StopRequest | None = None):
    return lambda count: Executor(stop or StopRequest())


# --- only what is new -----------------------------------------------------------------------------------------


def test_five_more_episodes_touch_those_five_and_the_metadata(in_memory: Path):  # noqa: F811
    asked = many(in_memory)
    for file in range(5):
        (asked.raw / f"file{file}.txt").write_text("100")
    assert convert(asked, QUIET).encoded == 500
    assert precompute(asked.out, ["fast"])[0].computed_episodes == 500
    log(in_memory)
    before = tree_digest(asked.out)
    (asked.raw / "more.txt").write_text("5")
    result = convert(asked, QUIET)
    assert (result.episodes, result.encoded) == (505, 5)
    assert sorted(log(in_memory)) == ["read more/" + f"{n:03d}" for n in range(5)] + ["scan more"]
    (target,) = precompute(asked.out, ["fast"])
    assert (target.computed_episodes, target.copied_episodes) == (5, 0)
    after = tree_digest(asked.out)
    changed = {name for name in before if before[name] != after.get(name)}
    assert not any(name.startswith(("data/", "dpipe/targets/fast/")) and "/part-" in name for name in changed)
    assert not any(name.startswith(("data/", "videos/", "dpipe/journal/statistics/")) for name in changed)
    index = open_dataset(asked.out).all_columns(["index"])["index"]
    assert index.tolist() == list(range(2020))


def test_a_recording_whose_files_did_not_change_is_not_opened_again(tmp_path: Path):
    asked = many(tmp_path)
    for file in range(3):
        (asked.raw / f"file{file}.txt").write_text("2")
    convert(asked, QUIET)
    log(tmp_path)
    (asked.raw / "file1.txt").write_text("3 ")
    assert convert(asked, QUIET).encoded == 1
    lines = log(tmp_path)
    assert [line for line in lines if line.startswith("scan")] == ["scan file1"]
    # The two old ones of that file were read to see whether they had changed, and not written anew.
    assert [line for line in lines if line.startswith("read")] == [f"read file1/{n:03d}" for n in range(3)]


def test_a_changed_parameter_or_stage_version_redoes_what_depends_on_it(tmp_path: Path, monkeypatch):
    from dpipe import stages
    from dpipe.pipeline import precompute as running

    asked = many(tmp_path)
    (asked.raw / "file.txt").write_text("3")
    convert(asked, QUIET)
    (first,) = precompute(asked.out, ["fast"])
    assert precompute(asked.out, ["fast"])[0].computed_episodes == 0
    newer = replace(stages.load_stage("fast"), version=99)
    monkeypatch.setattr(running, "load_stage", lambda name: newer)
    (again,) = precompute(asked.out, ["fast"], name="newer")
    assert again.computed_episodes == first.computed_episodes == 3


# --- columns and objects --------------------------------------------------------------------------------------


def test_entries_come_back_from_columns_as_they_were(tmp_path: Path):
    raw = tmp_path / "raw"
    write_suite(raw, demos=3)
    bad = demo_arrays(9, 5)
    bad["actions"][2] = np.nan
    write_raw(raw / "libero_goal" / "bad_demo.hdf5", {0: bad})
    converter = load_converter("libero")
    options = converter.Options()
    expected = [e for r in converter.find(raw, options) for e in converter.scan(r, options)]
    found = build_catalog(converter, raw, options, None, here(), QUIET)
    assert list(found.refs) == [e for e in expected if isinstance(e, EpisodeRef)]
    assert found.dropped == [e for e in expected if not isinstance(e, EpisodeRef)]
    found.remember(tmp_path / "scan.parquet")

    def never(recording, options):
        raise AssertionError("scanned again")

    unread: Converter = replace(converter, scan=never)
    again = build_catalog(unread, raw, options, tmp_path / "scan.parquet", here(), QUIET)
    assert not again.fresh and list(again.refs) == list(found.refs) and again.dropped == found.dropped
    some = select(again.refs, "frames >= 13 AND suite = 'libero_goal'", None)
    assert [ref.frames for ref in some] == [13]
    assert again.refs[-1] == list(found.refs)[-1] and again.refs[1:].source_ids == again.refs.source_ids[1:]


def test_a_torn_memory_of_scans_is_as_good_as_none(tmp_path: Path):
    write_suite(tmp_path / "raw")
    run_convert(tmp_path / "raw", tmp_path / "out")
    path = tmp_path / "out/dpipe/journal/scan.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    assert run_convert(tmp_path / "raw", tmp_path / "out").unchanged


def test_scans_in_batches_find_the_recording_that_takes_workers_down(tmp_path: Path, monkeypatch):
    from dpipe.pipeline.execute import Failure

    asked = many(tmp_path)
    for file in range(9):
        (asked.raw / f"file{file}.txt").write_text("1")
    monkeypatch.setattr(module, "RECORDINGS_A_TASK", 3)

    class Deadly(Executor):
        def results(self, tasks=()) -> Iterator:
            for key, result in super().results(tasks):
                first, last = key
                deadly = first <= 4 < last
                yield key, Failure("took 3 workers down", killed_workers=True) if deadly else result

    found = build_catalog(
        load_converter(asked.source),
        asked.raw,
        asked.options,
        None,
        lambda count: Deadly(StopRequest()),
        QUIET,
    )
    assert [d.source_id for d in found.dropped] == ["file4"] and "3 workers" in found.dropped[0].reason
    assert found.refs.source_ids == [f"file{n}/000" for n in range(9) if n != 4]


def test_a_stopped_scan_goes_on_where_it_was_and_gives_the_same_bytes(tmp_path: Path, monkeypatch):
    asked = many(tmp_path)
    for file in range(9):
        (asked.raw / f"file{file}.txt").write_text("2")
    convert(replace(asked, out=tmp_path / "whole"), QUIET)

    class Stopped(Executor):
        """Out of time after four scans; answers come back in another order than they were asked for."""

        def results(self, tasks=()) -> Iterator:
            for done, result in enumerate(reversed(list(super().results(tasks)))):
                if done == 4:
                    raise Interrupted("stopped by SIGTERM")
                yield result

    monkeypatch.setattr(module, "PIECE_S", -1.0)  # a piece after every answer
    kept = tmp_path / ".out.scan"
    with monkeypatch.context() as until:
        until.setattr("dpipe.pipeline.convert.Executor", Stopped)
        with pytest.raises(Interrupted):
            read_catalog(asked, QUIET)
        assert not kept.exists()  # a plan writes nothing
        for pieces in (4, 8):
            with pytest.raises(Interrupted):
                convert(asked, QUIET)
            assert len(list(kept.iterdir())) == pieces
    torn = sorted(kept.iterdir())[0]
    torn.write_bytes(torn.read_bytes()[:-5])  # scanned again, no harm
    log(tmp_path)
    convert(asked, QUIET)
    assert sum(line.startswith("scan") for line in log(tmp_path)) == 2
    assert not kept.exists()
    assert tree_digest(asked.out) == tree_digest(tmp_path / "whole")


def test_what_a_scan_keeps_does_not_depend_on_the_order_in_which_workers_are_done(tmp_path: Path):
    asked = many(tmp_path)
    for file in range(9):
        (asked.raw / f"file{file}.txt").write_text(str(file % 3))
    converter = load_converter(asked.source)

    class Backwards(Executor):
        def results(self, tasks=()) -> Iterator:
            yield from reversed(list(super().results(tasks)))

    for name, kind in (("forwards", Executor), ("backwards", Backwards)):
        found = build_catalog(
            converter, asked.raw, asked.options, None, lambda count, kind=kind: kind(StopRequest()), QUIET
        )
        found.remember(tmp_path / name)
    assert (tmp_path / "forwards").read_bytes() == (tmp_path / "backwards").read_bytes()


def test_receipts_are_the_same_loose_and_finished(tmp_path: Path):
    asked = replace(many(tmp_path), part_frames=8)
    (asked.raw / "file.txt").write_text("5")
    for job in range(2):
        convert(replace(asked, share=(job, 2)), QUIET)
    facts = ("source_id", "key", "memo", "content", "frames", "part", "row", "row_group", "at_index")

    def told(receipts: Receipts) -> list:
        return list(receipts.rows(facts))

    loose = load_receipts(asked.out)
    assert [row[0] for row in told(loose)] == [f"file/{n:03d}" for n in range(5)]
    names = {path.name for path in (asked.out / "dpipe/journal/parts").iterdir()}
    assert names == {f"part-{n:06d}.{kind}" for n in range(3) for kind in ("json", "parquet")}
    convert(replace(asked, finish_only=True), QUIET)
    assert told(load_receipts(asked.out)) == told(loose)
    assert not list((asked.out / "dpipe/journal/parts").iterdir())


def test_statistics_of_episodes_are_the_same_in_one_pass_or_beyond_the_limit_none(
    tmp_path: Path, monkeypatch
):
    write_suite(tmp_path / "raw", demos=3)
    run_convert(tmp_path / "raw", tmp_path / "few")
    monkeypatch.setattr(finish, "STATISTICS_UP_TO", 2)
    run_convert(tmp_path / "raw", tmp_path / "many")
    from dpipe.pipeline.tables import read_columns

    def columns(root: Path) -> list[str]:
        return read_columns(root / "meta/episodes/chunk-000/file-000.parquet").column_names

    assert any(name.startswith("stats/") for name in columns(tmp_path / "few"))
    assert not any(name.startswith("stats/") for name in columns(tmp_path / "many"))
    few, many_ = (json.loads((tmp_path / n / "meta/stats.json").read_text()) for n in ("few", "many"))
    assert few == many_ and few["timestamp"]["count"] == [11 + 12 + 13]


@given(st.dictionaries(st.integers(-5, 50), st.integers(0, 9), min_size=1).filter(lambda d: any(d.values())))
def test_weighted_statistics_are_those_of_the_rows_written_out(counts: dict[int, int]):
    values = np.array(sorted(counts), np.float64)
    weights = np.array([counts[int(v)] for v in values], np.int64)
    found, expected = weighted_statistics(values, weights), column_statistics(np.repeat(values, weights))
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
