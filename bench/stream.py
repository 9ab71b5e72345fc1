"""Reading for training: dpipe's stream against the loaders people use, on the LIBERO sample.

    python bench/stream.py [--rounds 3] [--seconds 3] [--sizes 128,256] [--add] [--quick] [--folder DIR]

Data        the sample's episodes repeated to 50,000 frames (packets copied, nothing encoded twice), two cameras,
            at 128 px as recorded and at 256 px; the JPEGs of the shards are those the other formats carry
Sample      both frames, state, 10 actions, the sentence; batches of 32, shuffled, the same cores for all
Contenders  lerobot     LeRobotDataset, torchcodec, uint8, DataLoader with 0 and with 2 workers
            lerobot-streaming, webdataset, mosaicml: each with 0 and with 2 workers, decoding as documented
            decode      the bound: JPEGs in memory, all cores, one process each, nothing else done
            dpipe       from shards; dpipe-video from the same videos as lerobot
Each contender is a process that stays alive and waits; in every round all take turns, and ratios are those
within a round. WebDataset and mosaicml-streaming run in an environment of their own (made on first use beside
the data; `--peers none` leaves them out, said aloud).

The whole run takes ten minutes. `--sizes 128` and then `--sizes 256 --add` make it in pieces: every round is kept
in out/stream-rounds.json, none chosen, and medians are over all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("SVT_LOG", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
from measure import OUT, Goal, Rounds, machine, report

SAMPLE = Path(os.environ.get("DPIPE_SAMPLE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
CHUNK = 10
BATCH = 32
CORES = len(os.sched_getaffinity(0))
CAMERAS = ("observation.images.image", "observation.images.image2")
LEROBOT = {128: 20.0, 256: 12.0}  # goals over LeRobotDataset
OVER_PEERS, OF_BOUND, VIDEO = 2.0, 0.6, 3.0
FIRST_BATCH_S, ANONYMOUS_MB = 1.0, 500
# Frames of a data or video file: all of them, as lerobot's own writer would have it at these sizes. From several
# files StreamingLeRobotDataset 0.6.1 reads wrong frames and then fails.
FILE_FRAMES = 2**17


# --- contenders: endless iterators over batches, in a process of their own --------------------------------


def dpipe_batches(folder: Path, frames: str) -> Iterator[Any]:
    from dpipe.streams.stream import StreamSpec, open_stream

    spec = StreamSpec(chunks={"action": CHUNK}, torch=True)
    return open_stream(folder / "dataset", spec, batch_size=BATCH, frames=frames, keep=0).endless()


def lerobot_batches(folder: Path, workers: int) -> Iterator[Any]:
    import torch
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    torch.set_num_threads(1)
    dataset = LeRobotDataset(
        "bench/set",
        root=folder / "dataset",
        delta_timestamps={"action": [h / 20 for h in range(CHUNK)]},
        video_backend="torchcodec",
        return_uint8=True,
    )
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    return _for_ever(loader)


def lerobot_streaming_batches(folder: Path, workers: int) -> Iterator[Any]:
    import torch
    from lerobot.datasets.streaming_dataset import StreamingLeRobotDataset

    torch.set_num_threads(1)
    dataset = StreamingLeRobotDataset(
        "bench/set",
        root=folder / "dataset",
        delta_timestamps={"action": [h / 20 for h in range(CHUNK)]},
        return_uint8=True,
    )
    return _for_ever(torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=workers))


def webdataset_batches(folder: Path, workers: int) -> Iterator[Any]:
    import torch
    import webdataset

    torch.set_num_threads(1)
    tars = [str(path) for path in sorted((folder / "webdataset").glob("*.tar"))]
    dataset = (
        webdataset.WebDataset(tars, shardshuffle=len(tars), nodesplitter=None, resampled=True)
        .shuffle(1000)
        .decode("rgb8")
        .to_tuple("0.jpg", "1.jpg", "state.npy", "action.npy", "txt")
        .batched(BATCH)
    )
    return _for_ever(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers))


def mosaicml_batches(folder: Path, workers: int) -> Iterator[Any]:
    import torch
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    torch.set_num_threads(1)
    with contextlib.suppress(FileNotFoundError):  # the other of the two cleans up at the same moment
        clean_stale_shared_memory()

    class Set(StreamingDataset):
        def __getitem__(self, at: int) -> dict[str, Any]:
            item = super().__getitem__(at)
            return {name: np.asarray(value) if name in "01" else value for name, value in item.items()}

    dataset = Set(local=str(folder / "mosaicml"), shuffle=True, batch_size=BATCH)
    return _for_ever(torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=workers))


def _for_ever(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def decode_bound(folder: Path, seconds: float) -> float:
    """Samples (two frames) per second that all cores decode, each from its own list of JPEGs in memory."""
    from multiprocessing import get_context

    context = get_context("fork")
    start, results = context.Barrier(CORES), context.Queue()
    encoded = [jpeg for sample in samples_of(folder, 512) for jpeg in sample["jpegs"]]

    def work() -> None:
        import simplejpeg

        out = np.empty_like(simplejpeg.decode_jpeg(encoded[0]))
        start.wait()
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            for jpeg in encoded[:128]:
                simplejpeg.decode_jpeg(jpeg, "RGB", buffer=out)
            count += 128
        results.put(count / (time.perf_counter() - begin))

    processes = [context.Process(target=work) for _ in range(CORES)]
    for process in processes:
        process.start()
    rate = sum(results.get() for _ in processes)
    for process in processes:
        process.join()
    return rate / len(CAMERAS)


MAKERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    "dpipe": lambda folder: dpipe_batches(folder, "jpeg"),
    "dpipe-video": lambda folder: dpipe_batches(folder, "video"),
    **{f"lerobot-{n}": lambda folder, n=n: lerobot_batches(folder, n) for n in (0, 2)},
    **{f"lerobot-streaming-{n}": lambda folder, n=n: lerobot_streaming_batches(folder, n) for n in (0, 2)},
    **{f"webdataset-{n}": lambda folder, n=n: webdataset_batches(folder, n) for n in (0, 2)},
    **{f"mosaicml-{n}": lambda folder, n=n: mosaicml_batches(folder, n) for n in (0, 2)},
}
PEERS = [f"{name}-{n}" for name in ("lerobot-streaming", "webdataset", "mosaicml") for n in (0, 2)]


def serve(name: str, folder: Path) -> None:
    """The contender's process: for each line (seconds) on stdin, one line (samples/s, anonymous MB) on stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    batches = None if name == "decode" else MAKERS[name](folder)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        seconds = float(line)
        if batches is None:
            rate = decode_bound(folder, seconds)
        else:
            for _ in range(4):
                next(batches)
            begin, count = time.perf_counter(), 0
            while time.perf_counter() - begin < seconds:
                next(batches)
                count += BATCH
            rate = count / (time.perf_counter() - begin)
        print(rate, anonymous_mb(), file=out, flush=True)


def anonymous_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return float("nan")


class Contender:
    def __init__(self, name: str, folder: Path, python: str):
        self.name = name
        command = [python, __file__, "--serve", name, "--folder", str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.memory = 0.0

    def wait_until_ready(self) -> None:
        self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} died (exit {self.process.wait()}); its own words are above")
        return line

    def measure(self, seconds: float) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        rate, memory = map(float, self._answer().split())
        self.memory = max(self.memory, memory)
        return rate

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


# --- data ---------------------------------------------------------------------------------------------------


def prepare(folder: Path, size: int, frames: int) -> Path:
    """The dataset at `size` px repeated to at least `frames` frames, and its shards."""
    folder = folder / f"{size}px-{frames}"
    if (folder / "complete").is_file():
        return folder
    print(f"  preparing {frames} frames at {size} px in {folder}", file=sys.stderr, flush=True)
    from dpipe.streams.dataset import open_dataset

    workspace = folder / "workspace"
    (workspace / "raw").mkdir(parents=True, exist_ok=True)
    if not (workspace / "raw" / "libero").exists():
        (workspace / "raw" / "libero").symlink_to(SAMPLE / "libero")
    words = ["convert", "libero", "--to", "lerobot", "--workspace", str(workspace)]
    if size != 128:
        words += ["--resize", f"{size}x{size}"]
    dpipe = [sys.executable, "-c", "import sys; from dpipe.cli import main; sys.exit(main())"]
    if not (workspace / "lerobot" / "libero" / "dpipe" / "manifest.json").is_file():
        subprocess.run([*dpipe, *words], check=True, stdout=sys.stderr)
    source = open_dataset(workspace / "lerobot" / "libero")
    repeat_dataset(source.root, folder / "dataset", -(-frames // source.total_frames))
    write_shards_in_processes(folder / "dataset")
    (folder / "complete").touch()
    return folder


def repeat_dataset(source: Path, target: Path, copies: int) -> None:
    """The episodes of `source` again and again: rows with new numbers, packets copied."""
    import shutil

    import pyarrow as pa
    import pyarrow.parquet as pq
    from dpipe.streams.dataset import open_dataset
    from dpipe.video.mp4 import copy_run, read_table, write_mp4

    dataset = open_dataset(source)
    shutil.rmtree(target, ignore_errors=True)
    (target / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    (target / "data" / "chunk-000").mkdir(parents=True)
    order = list(range(len(dataset))) * copies
    lengths = dataset.episodes.length[order]
    first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    file_of = first // FILE_FRAMES
    table = pq.read_table(source / "data/chunk-000/file-000.parquet")
    rows = []
    for file in np.unique(file_of).tolist():
        members = np.flatnonzero(file_of == file)
        with pq.ParquetWriter(target / f"data/chunk-000/file-{file:03d}.parquet", table.schema) as writer:
            for e in members.tolist():
                start, length = int(dataset.episodes.first_index[order[e]]), int(lengths[e])
                block = table.slice(start, length)
                for name, values in (
                    ("index", np.arange(first[e], first[e] + length)),
                    ("episode_index", np.full(length, e)),
                ):
                    block = block.set_column(
                        block.schema.get_field_index(name), name, pa.array(values, pa.int64())
                    )
                writer.write_table(block.cast(table.schema), row_group_size=length)
        for camera in dataset.cameras:
            runs = []
            for e in members.tolist():
                video = read_table(dataset.video_path(order[e], camera))
                runs.append(
                    copy_run(
                        video, int(dataset.episodes.cameras[camera].first_frame[order[e]]), int(lengths[e])
                    )
                )
            path = target / f"videos/{camera}/chunk-000/file-{file:03d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            height, width = dataset.camera_size(camera)
            write_mp4(path, video.sample_entry, width, height, dataset.fps, runs)
        for e in members.tolist():
            row = {
                "episode_index": e,
                "tasks": dataset.episodes.tasks(order[e]),
                "length": int(lengths[e]),
                "data/chunk_index": 0,
                "data/file_index": file,
                "dataset_from_index": int(first[e]),
                "dataset_to_index": int(first[e] + lengths[e]),
            }
            for camera in dataset.cameras:
                begin = float(first[e] - first[members[0]]) / dataset.fps
                row |= {
                    f"videos/{camera}/chunk_index": 0,
                    f"videos/{camera}/file_index": file,
                    f"videos/{camera}/from_timestamp": begin,
                    f"videos/{camera}/to_timestamp": begin + int(lengths[e]) / dataset.fps,
                }
            rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), target / "meta/episodes/chunk-000/file-000.parquet")
    info = dataset.info | {
        "total_episodes": len(order),
        "total_frames": int(lengths.sum()),
        "splits": {"train": f"0:{len(order)}"},
    }
    (target / "meta/info.json").write_text(json.dumps(info))
    for name in ("stats.json", "tasks.parquet"):
        shutil.copy(source / "meta" / name, target / "meta" / name)


def _write_one(job: tuple[Path, int]) -> None:
    from dpipe.streams.dataset import open_dataset
    from dpipe.streams.shard_format import FOLDER, ShardOptions
    from dpipe.streams.shard_writing import write_part

    root, number = job
    options = ShardOptions()
    write_part(open_dataset(root), root / FOLDER / options.variant, number, options)


def write_shards_in_processes(root: Path) -> None:
    from multiprocessing import get_context

    from dpipe.streams.dataset import open_dataset
    from dpipe.streams.shard_writing import write_shards

    with get_context("spawn").Pool(CORES) as pool:
        pool.map(_write_one, [(root, number) for number in range(len(open_dataset(root).parts()))])
    write_shards(open_dataset(root))


def samples_of(folder: Path, count: int | None = None) -> Iterator[dict[str, Any]]:
    """What the other formats carry, read back from the shards."""
    from dpipe.streams.dataset import open_dataset
    from dpipe.streams.rows import Fit
    from dpipe.streams.shards import ShardRows, find_shards
    from dpipe.streams.windows import Samples

    dataset = open_dataset(folder / "dataset")
    shards = find_shards(dataset, None)
    assert shards is not None
    reader = ShardRows(shards, Fit())
    episodes = np.arange(len(dataset))
    samples = Samples.of(episodes, dataset.episodes.first_index, dataset.episodes.length)
    for n in range(len(samples) if count is None else count):
        place = samples.locate(np.array([n]))
        rows, _ = place.rows_at(np.arange(CHUNK))
        values = reader.values(["action"], rows) | reader.values(
            ["observation.state", "task_index"], place.row
        )
        yield {
            "jpegs": [reader.encoded(camera, int(place.row[0])) for camera in CAMERAS],
            "state": values["observation.state"][0],
            "action": values["action"][0],
            "task": dataset.tasks[int(values["task_index"][0])],
        }


def write_peers(folder: Path) -> None:
    """WebDataset tars and MDS shards of the same samples; runs in the peers' environment."""
    import io

    import webdataset
    from PIL import Image
    from streaming import MDSWriter
    from streaming.base.format.mds.encodings import JPEG

    if (folder / "peers-complete").is_file():
        return

    class AsIs(JPEG):
        """The JPEG as it is: encoding it again would make it another sample."""

        def encode(self, obj: Any) -> bytes:
            return obj.data

    import streaming.base.format.mds.encodings as encodings

    encodings._encodings["jpeg"] = AsIs

    class Encoded(Image.Image):
        def __init__(self, data: bytes):
            super().__init__()
            self.data = data

    (folder / "webdataset").mkdir(exist_ok=True)
    action, state = next(samples_of(folder, 1))["action"], next(samples_of(folder, 1))["state"]
    columns = {
        "0": "jpeg",
        "1": "jpeg",
        "state": f"ndarray:float32:{state.size}",
        "action": f"ndarray:float32:{action.shape[0]},{action.shape[1]}",
        "task": "str",
    }
    import shutil

    shutil.rmtree(folder / "mosaicml", ignore_errors=True)
    with (
        webdataset.ShardWriter(str(folder / "webdataset" / "%05d.tar"), maxcount=2000, verbose=0) as tars,
        MDSWriter(out=str(folder / "mosaicml"), columns=columns, compression=None) as mds,
    ):
        for n, sample in enumerate(samples_of(folder)):
            arrays = {}
            for name in ("state", "action"):
                file = io.BytesIO()
                np.save(file, sample[name])
                arrays[f"{name}.npy"] = file.getvalue()
            jpegs = {f"{i}.jpg": data for i, data in enumerate(sample["jpegs"])}
            tars.write({"__key__": f"{n:09d}", **jpegs, **arrays, "txt": sample["task"]})
            pictures = {str(i): Encoded(data) for i, data in enumerate(sample["jpegs"])}
            mds.write(
                {**pictures, "state": sample["state"], "action": sample["action"], "task": sample["task"]}
            )
    (folder / "peers-complete").touch()


def peers_python(folder: Path, given: str) -> str | None:
    """An interpreter with WebDataset and mosaicml-streaming; torch and numpy are borrowed from ours."""
    if given == "none":
        return None
    if given:
        return given
    environment = folder / "peers"
    python = environment / "bin" / "python"
    if (environment / "complete").is_file():
        return str(python)
    import site

    uv = [str(Path(sys.executable).parent / "uv")]
    try:
        subprocess.run(
            [*uv, "venv", "-q", "--clear", "--python", sys.executable, str(environment)], check=True
        )
        own = environment / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        ours = "; ".join(f"site.addsitedir({folder!r})" for folder in site.getsitepackages())
        (own / "borrowed.pth").write_text(f"import site; {ours}\n")
        install = [*uv, "pip", "install", "-q", "--python", str(python)]
        subprocess.run([*install, "--no-deps", "webdataset", "mosaicml-streaming"], check=True, timeout=300)
        needed = ["braceexpand", "brotli", "python-snappy", "zstd", "catalogue"]
        subprocess.run([*install, *needed], check=True, timeout=300)
        subprocess.run([str(python), "-c", "import webdataset, streaming"], check=True)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"  WebDataset and mosaicml-streaming are left out: {error}", file=sys.stderr)
        return None
    (environment / "complete").touch()
    return str(python)


def prepare_million(folder: Path, source: Path) -> Path:
    """A dataset of a million frames by its metadata: every file is a link to one of `source`'s, again and again."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from dpipe.streams.dataset import open_dataset

    target = folder / "million" / "dataset"
    if (folder / "million" / "complete").is_file():
        return target
    dataset = open_dataset(source)
    whole = int(dataset.episodes.data_file[-1]) + 1
    copies = -(-1_000_000 // dataset.total_frames)
    episodes = pq.read_table(source / "meta/episodes/chunk-000/file-000.parquet").to_pydict()
    count, frames = len(dataset), dataset.total_frames
    table: dict[str, Any] = {}
    for name, values in episodes.items():
        step = {"episode_index": count, "dataset_from_index": frames, "dataset_to_index": frames}.get(name, 0)
        step = whole if name.endswith("file_index") else step
        table[name] = [v + copy * step if step else v for copy in range(copies) for v in values]
    for folder_name in ("meta/episodes/chunk-000", "data/chunk-000"):
        (target / folder_name).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), target / "meta/episodes/chunk-000/file-000.parquet")
    info = dataset.info | {
        "total_episodes": count * copies,
        "total_frames": frames * copies,
        "splits": {"train": f"0:{count * copies}"},
    }
    (target / "meta/info.json").write_text(json.dumps(info))
    for name in ("stats.json", "tasks.parquet"):
        _link(source / "meta" / name, target / "meta" / name)
    for number in range(copies * whole):
        _link(
            source / f"data/chunk-000/file-{number % whole:03d}.parquet",
            target / f"data/chunk-000/file-{number:03d}.parquet",
        )
        for camera in dataset.cameras:
            name = f"videos/{camera}/chunk-000/file-{number % whole:03d}.mp4"
            _link(source / name, target / f"videos/{camera}/chunk-000/file-{number:03d}.mp4")
    (folder / "million" / "complete").touch()
    return target


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.hardlink_to(source)


FIRST_BATCH = """
import sys, time
import numpy, pyarrow.parquet, simplejpeg, av
from dpipe.streams.stream import StreamSpec, open_stream
begin = time.perf_counter()
stream = open_stream(sys.argv[1], StreamSpec(chunks={"action": 10}), batch_size=32)
batches = stream.endless()
next(batches)
print(time.perf_counter() - begin, stream.samples)
"""


def first_batch(dataset: Path) -> float:
    """Seconds from the end of the imports to the first batch."""
    found = subprocess.run(
        [sys.executable, "-c", FIRST_BATCH, str(dataset)], check=True, capture_output=True, text=True
    )
    seconds, samples = found.stdout.split()
    assert int(samples) >= 1_000_000
    return float(seconds)


# --- the run ------------------------------------------------------------------------------------------------


def contenders(folder: Path, peers: str | None) -> list[Contender]:
    """Everyone who reads `folder`, waiting for a turn."""
    own = ["dpipe", "dpipe-video", "decode", "lerobot-0", "lerobot-2"]
    own += [name for name in PEERS if name.startswith("lerobot")]
    foreign = [name for name in PEERS if not name.startswith("lerobot")] if peers is not None else []
    if foreign:
        words = [peers, __file__, "--write-peers", "--folder", str(folder)]
        subprocess.run(words, check=True, stdout=sys.stderr)
    return [
        *(Contender(name, folder, sys.executable) for name in own),
        *(Contender(name, folder, peers) for name in foreign),
    ]


def measure(folder: Path, size: int, peers: str | None, rounds: int, seconds: float, kept: Kept) -> None:
    """Rounds of all contenders at one size, added to what is kept."""
    here, everyone = Rounds(), contenders(folder, peers)
    try:
        for each in everyone:  # all have begun by now
            each.wait_until_ready()
        here.run(rounds, {each.name: lambda each=each: each.measure(seconds) for each in everyone})
    finally:
        for each in everyone:
            each.close()
    for each in everyone:
        kept.add(f"{each.name} {size}px", here.values[each.name])
        if each.name.startswith("dpipe"):
            kept.add("anonymous MB", [each.memory])


@dataclass
class Kept:
    """Figures by name from this run and, with --add, from earlier ones over as many frames on this machine."""

    path: Path
    frames: int
    figures: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def begin(cls, path: Path, frames: int, add: bool) -> Kept:
        if not add or not path.is_file():
            return cls(path, frames)
        told = json.loads(path.read_text())
        if (told["machine"], told["frames"]) != (machine(), frames):
            raise SystemExit(f"{path} is of {told['frames']} frames on {told['machine']}: leave --add out")
        return cls(path, frames, told["figures"])

    def add(self, name: str, values: list[float]) -> None:
        self.figures.setdefault(name, []).extend(values)

    def save(self) -> None:
        self.path.parent.mkdir(exist_ok=True)
        told = {"machine": machine(), "frames": self.frames, "figures": self.figures}
        self.path.write_text(json.dumps(told, indent=1) + "\n")

    def sizes(self) -> list[int]:
        return [size for size in LEROBOT if f"dpipe {size}px" in self.figures]


def goals_of(kept: Kept, values: Rounds) -> list[Goal]:
    """Every goal that the figures speak of; `values` gets the rounds, the best of several contenders too."""
    values.values |= {name: list(found) for name, found in kept.figures.items() if name.endswith("px")}
    goals = []
    for size in kept.sizes():
        for group, names in (("lerobot", ["lerobot-0", "lerobot-2"]), ("peers", PEERS)):
            there = [f"{name} {size}px" for name in names if f"{name} {size}px" in values.values]
            # Round by round, the figures of the contender whose median is highest.
            values.values[f"best of {group} {size}px"] = values.values[max(there, key=values.median)]
        for goal, ours, theirs, least in (
            (f"over LeRobotDataset at {size} px", "dpipe", "best of lerobot", LEROBOT[size]),
            (f"from video over LeRobotDataset at {size} px", "dpipe-video", "best of lerobot", VIDEO),
            (f"of the JPEG-decode bound at {size} px", "dpipe", "decode", OF_BOUND),
            (f"over the best other loader at {size} px", "dpipe", "best of peers", OVER_PEERS),
        ):
            goals.append(values.ratio(goal, f"{ours} {size}px", f"{theirs} {size}px", least))
    first = statistics.median(kept.figures["first batch s"])
    goals.append(
        Goal(
            f"first batch over a million frames in {first:.2f} s; 1 s over that", 1 / first, 1 / FIRST_BATCH_S
        )
    )
    memory = max(kept.figures["anonymous MB"])
    goals.append(Goal(f"anonymous memory {memory:.0f} MB; 500 MB over that", ANONYMOUS_MB / memory, 1.0))
    return goals


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="each contender's turn")
    parser.add_argument("--frames", type=int, default=50_000)
    parser.add_argument("--sizes", default="128,256")
    parser.add_argument("--add", action="store_true", help="add these rounds to those of earlier runs")
    parser.add_argument("--prepare", action="store_true", help="only make the data")
    parser.add_argument("--quick", action="store_true", help="6,000 frames, two short rounds")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent / "out" / "stream")
    parser.add_argument("--peers", default="", help="python with webdataset and mosaicml-streaming, or none")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--write-peers", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.folder)
        return 0
    if options.write_peers:
        write_peers(options.folder)
        return 0
    frames, rounds, seconds = options.frames, options.rounds, options.seconds
    if options.quick:
        frames, rounds, seconds = 6_000, 2, 1.5
    options.folder.mkdir(parents=True, exist_ok=True)
    peers = peers_python(options.folder, options.peers)
    folders = {size: prepare(options.folder, size, frames) for size in map(int, options.sizes.split(","))}
    million = prepare_million(options.folder, next(iter(folders.values())) / "dataset")
    if options.prepare:
        for folder in folders.values():
            if peers is not None:
                subprocess.run([peers, __file__, "--write-peers", "--folder", str(folder)], check=True)
        return 0
    kept = Kept.begin(OUT / "stream-rounds.json", frames, options.add)
    for size, folder in folders.items():
        measure(folder, size, peers, rounds, seconds, kept)
        kept.save()
    kept.add("first batch s", [first_batch(million) for _ in range(3)])
    kept.save()
    values = Rounds()
    goals = goals_of(kept, values)
    return report("stream", goals, values, "samples/s", {"peers": peers is not None, "frames": frames})


if __name__ == "__main__":
    sys.exit(main())
