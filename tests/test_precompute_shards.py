"""`dpipe precompute shards` as its user gets it: made part by part, resumed, with targets as columns."""

from pathlib import Path

import numpy as np
import pytest
from dpipe.pipeline.precompute import precompute
from dpipe.schemas.errors import DataError, UsageError
from dpipe.streams.dataset import open_dataset
from dpipe.streams.rows import Fit
from dpipe.streams.shards import ShardRows
from dpipe.streams.stream import StreamSpec, open_stream
from small_datasets import number_of
from small_datasets import write_dataset as write_foreign
from tiny_dataset import write_tiny


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A dataset of ours in two parts."""
    return write_tiny(tmp_path / "set", [(0, 20), (1, 15), (2, 9)], parts=[2, 1], camera=True)


def test_shards_lie_beside_the_data_and_the_stream_finds_them(root: Path):
    (made,) = precompute(root, ["shards"])
    assert made.folder == root / "dpipe/shards/jpeg256-q90"
    assert (made.computed_episodes, made.kept_parts, made.frames) == (3, 0, 44)
    stream = open_stream(root, StreamSpec(chunks={"action": 3}), batch_size=44)
    assert isinstance(stream.source.rows, ShardRows)
    batch = next(iter(stream))
    columns = open_dataset(root).all_columns(["observation.state", "action"])
    assert np.array_equal(batch["observation.state"], columns["observation.state"][batch["index"]])


def test_running_it_again_writes_nothing_and_killing_it_loses_one_part(root: Path):
    (made,) = precompute(root, ["shards"])
    stamps = {path: path.stat().st_mtime_ns for path in made.folder.glob("part-*")}
    (again,) = precompute(root, ["shards"])
    assert (again.computed_episodes, again.kept_parts) == (0, 2)
    next(made.folder.glob("receipts/part-00001-*")).unlink()
    (made.folder / "index.json").unlink()
    with pytest.raises(DataError, match="no finished shards"):
        open_stream(root, StreamSpec(), frames="jpeg")
    (more,) = precompute(root, ["shards"])
    assert (more.computed_episodes, more.kept_parts) == (1, 1)
    assert (
        made.folder.joinpath("part-00000.parquet").stat().st_mtime_ns
        == stamps[made.folder / "part-00000.parquet"]
    )


def test_options_name_the_variant_and_are_checked(root: Path):
    (made,) = precompute(
        root, ["shards"], {"shards": {"short-side": 16, "quality": "80", "columns": "action"}}
    )
    assert made.variant.startswith("jpeg16-q80-")
    reader = ShardRows(made.folder, Fit())
    assert reader.size("observation.images.image") == (16, 16)
    assert "observation.state" not in reader.columns()
    with pytest.raises(UsageError, match="jpeg"):
        precompute(root, ["shards"], {"shards": {"frames": "png"}})


def test_tokens_become_a_column_that_chunks_like_the_action(root: Path):
    precompute(root, ["tokens"], {"tokens": {"probe": "none"}})
    (made,) = precompute(root, ["shards"], {"shards": {"targets": "tokens:N=10", "frames": "none"}})
    spec = StreamSpec(chunks={"action": 4, "tokens": 4}, cameras=(), targets=("tokens:N=10,as=beside",))
    for batch in open_stream(root, spec, batch_size=16, shards=made.variant):
        assert np.array_equal(batch["tokens"], batch["beside"])
        assert batch["tokens"].dtype == np.uint8
        assert np.array_equal(batch["tokens_is_pad"], batch["action_is_pad"])


def test_a_dataset_of_others_keeps_its_folder_and_is_served_from_ours(tmp_path: Path):
    theirs = write_foreign(tmp_path / "theirs", [6, 4])
    (made,) = precompute(theirs, ["shards"], out=tmp_path / "targets")
    assert made.folder == tmp_path / "targets/shards/jpeg256-q90"
    assert not (theirs / "dpipe").exists()
    stream = open_stream(theirs, StreamSpec(chunks={}), shards=made.folder, batch_size=10)
    batch = next(iter(stream))
    assert [number_of(f)[0] for f in batch["observation.images.image"]] == batch["index"].tolist()


@pytest.mark.slow
def test_workers_make_the_bytes_one_process_makes(root: Path, tmp_path: Path):
    (alone,) = precompute(root, ["shards"], out=tmp_path / "alone")
    (workers,) = precompute(root, ["shards"], out=tmp_path / "workers", workers=2)
    names = sorted(p.name for p in alone.folder.iterdir() if p.is_file())
    assert "index.json" in names
    for name in names:
        assert (alone.folder / name).read_bytes() == (workers.folder / name).read_bytes()
