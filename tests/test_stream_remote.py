"""Shards over a network that stalls, breaks off, fails and lies: the right samples, or a plain refusal."""

import json
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
from dpipe.schemas.errors import DataError, UsageError
from dpipe.streams import remote
from dpipe.streams.dataset import open_dataset
from dpipe.streams.order import Shuffle
from dpipe.streams.remote import Cache, RemoteFolder
from dpipe.streams.rows import Fit
from dpipe.streams.shard_writing import write_shards
from dpipe.streams.shards import open_remote_shards
from dpipe.streams.stream import StreamSpec, open_stream
from loopback import serve
from small_datasets import number_of, write_dataset

CAMERA = "observation.images.image"
SPEC = StreamSpec(chunks={"action": 3})
PIECE = 8192


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    root = write_dataset(tmp_path_factory.mktemp("remote") / "set", [40, 70, 30, 60], kind="image")
    with pytest.MonkeyPatch.context() as small:
        small.setattr("dpipe.streams.dataset.FOREIGN_PART_FRAMES", 110)
        return write_shards(open_dataset(root))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES_S", (0.01,))


def cache(tmp_path: Path, **options) -> Cache:
    # Only tests of stalling are impatient: a busy machine may take a second for any answer.
    return Cache(tmp_path / "cache", **{"piece": PIECE, "timeout_s": 60.0, **options})


def assert_right(batch) -> None:
    assert [number_of(frame)[0] for frame in batch[CAMERA]] == batch["index"].tolist()
    assert batch["observation.state"][:, 1].tolist() == batch["frame_index"].tolist()


def test_an_epoch_over_http_is_the_local_one(shards: Path, tmp_path: Path):
    local = list(open_stream(shards, SPEC, batch_size=16, shuffle="global"))
    with serve(shards) as server:
        far = open_stream(server.url, SPEC, batch_size=16, shuffle="global", cache=cache(tmp_path))
        for a, b in zip(local, far, strict=True):
            assert a.keys() == b.keys()
            assert all(np.array_equal(a[name], b[name]) for name in a)
        sent = server.sent
        for batch in far:  # the second epoch comes from the cache
            assert_right(batch)
        assert server.sent == sent
    assert far.health.read()["cache_hit_share"] > 0.5


def test_pieces_are_fetched_once_and_only_where_samples_lie(shards: Path, tmp_path: Path):
    with serve(shards) as server:
        stream = open_stream(server.url, SPEC, batch_size=1, shuffle="none", threads=1, cache=cache(tmp_path))
        before = server.sent
        assert_right(next(iter(stream)))
        fetched = server.sent - before
    whole = sum(path.stat().st_size for path in shards.glob("part-*"))
    assert 0 < fetched <= 4 * PIECE < whole


def test_a_url_is_shuffled_in_blocks_and_says_how_well(shards: Path, tmp_path: Path):
    with serve(shards) as server:
        stream = open_stream(server.url, SPEC, batch_size=8, cache=cache(tmp_path))
        assert stream.shuffle.kind == "block"
        tight = open_stream(
            server.url, SPEC, batch_size=8, shuffle=Shuffle("block", 10, 1), cache=cache(tmp_path)
        )
        assert tight.mixing() < 0.7 < stream.mixing() <= 1.05
        for batch in tight:
            assert_right(batch)


@pytest.mark.parametrize("trouble", ["fail", "truncate", "stall", "garble"])
def test_every_trouble_is_got_over(shards: Path, tmp_path: Path, trouble: str):
    with serve(shards) as server:
        stream = open_stream(
            server.url,
            SPEC,
            batch_size=16,
            threads=1,
            cache=cache(tmp_path, attempts=9, timeout_s=1.0 if trouble == "stall" else 60.0),
        )
        server.trouble += ["", trouble, *[""] * 12, trouble]  # never twice for one piece: that is refused
        seen = []
        for batch in stream:
            assert_right(batch)
            seen += batch["index"].tolist()
        assert sorted(seen) == list(range(200))
        assert server.trouble == []


@pytest.mark.parametrize(
    ("trouble", "word"),
    [
        ("fail", "503"),
        ("truncate", "closed after|IncompleteRead"),
        ("stall", "[Tt]imed? ?out"),
        ("garble", "damaged"),
    ],
)
def test_trouble_without_end_is_refused_with_its_reason(
    shards: Path, tmp_path: Path, trouble: str, word: str
):
    with serve(shards, stall_s=5.0) as server:
        patience = 0.5 if trouble == "stall" else 60.0
        stream = open_stream(
            server.url, SPEC, batch_size=4, threads=1, cache=cache(tmp_path, timeout_s=patience, attempts=2)
        )
        server.trouble += [trouble] * 500
        with pytest.raises(DataError, match=word) as refused:
            next(iter(stream))
        assert server.url in str(refused.value)


def test_a_broken_transfer_goes_on_where_it_stopped(shards: Path, tmp_path: Path):
    name, size = "part-00000.parquet", (shards / "part-00000.parquet").stat().st_size
    with serve(shards) as server:
        folder = RemoteFolder(server.url, cache(tmp_path, piece=size))
        server.trouble.append("truncate")
        assert folder.read(name, 0, size, size) == (shards / name).read_bytes()
        assert server.sent == size  # half, then the other half


def test_what_is_spoiled_on_disk_is_fetched_again(shards: Path, tmp_path: Path):
    with serve(shards) as server:
        first = open_stream(server.url, SPEC, batch_size=50, threads=1, cache=cache(tmp_path))
        for batch in first:
            assert_right(batch)
        pieces = sorted((tmp_path / "cache").glob("*/part-*.piece"))
        for path in pieces[::3]:
            path.write_bytes(bytes(path.stat().st_size))
        pieces[1].write_bytes(b"short")
        again = open_stream(server.url, SPEC, batch_size=50, threads=1, cache=cache(tmp_path))
        for batch in again:
            assert_right(batch)


def held_bytes(folder: Path) -> int:
    """Bytes of the pieces; one that another thread deletes while we count is gone."""
    total = 0
    for path in folder.glob("*/*.piece"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def test_the_cache_keeps_to_its_limit(shards: Path, tmp_path: Path):
    limit = 6 * PIECE
    with serve(shards) as server:
        stream = open_stream(server.url, SPEC, batch_size=8, threads=2, cache=cache(tmp_path, limit=limit))
        for batch in stream:
            assert_right(batch)
            assert held_bytes(tmp_path / "cache") <= limit


def test_threads_share_a_folder_and_fetch_each_piece_once(shards: Path, tmp_path: Path):
    name, size = "part-00000.parquet", (shards / "part-00000.parquet").stat().st_size
    expected = (shards / name).read_bytes()
    with serve(shards) as server:
        folder = RemoteFolder(server.url, cache(tmp_path))
        wrong = []

        def read(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for start in rng.integers(0, size - 300, 60).tolist():
                if folder.read(name, start, start + 300, size) != expected[start : start + 300]:
                    wrong.append(start)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert server.sent <= size + PIECE


def test_an_index_that_does_not_fit_is_refused(shards: Path, tmp_path: Path):
    import shutil

    here = tmp_path / "shards"
    shutil.copytree(shards, here)
    index = json.loads((here / "index.json").read_text())
    index["index"]["digest"] = "0" * 32
    (here / "index.json").write_text(json.dumps(index))
    with (
        serve(here) as server,
        pytest.raises(DataError, match=r"index\.bin is not the file its index describes"),
    ):
        open_stream(server.url, SPEC, cache=cache(tmp_path))


def test_what_is_not_there_is_said_at_once(tmp_path: Path):
    with serve(tmp_path) as server, pytest.raises(DataError, match="404"):
        open_stream(server.url, SPEC, cache=cache(tmp_path, attempts=99))
    with pytest.raises(UsageError, match="cache=Cache"):
        open_stream("http://127.0.0.1:9/shards", SPEC)


def test_other_urls_go_through_fsspec(shards: Path, tmp_path: Path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        if path.is_file():
            memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    for batch in open_stream("memory://bucket", SPEC, batch_size=32, cache=cache(tmp_path)):
        assert_right(batch)
    with pytest.raises(DataError, match="is not there"):
        open_stream("memory://elsewhere", SPEC, cache=cache(tmp_path))


def test_a_remote_reader_travels_to_another_process(shards: Path, tmp_path: Path):
    with serve(shards) as server:
        reader = pickle.loads(pickle.dumps(open_remote_shards(server.url, cache(tmp_path), Fit())))
        assert reader.values(["index"], np.array([150, 3]))["index"].tolist() == [150, 3]
