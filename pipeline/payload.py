"""What workers do: one episode into a spool file, one part's spool files into its video and data files.

Both are pure functions of their job: nothing about ranks, workers or completion order enters what they write.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from ..converters import load_converter
from ..schemas.episode import Embodiment, Episode, EpisodeRef, FrameSource, VideoClip
from ..schemas.errors import DataError
from ..schemas.features import CameraFeature, Feature, check_columns
from .durable import commit, temporary_name
from .receipts import write_part_receipt
from .spool import Spool, read_spool, write_spool
from .statistics import FrameHistogram, sampled_frames, statistics_table
from .tables import data_file, data_schema, episode_table, language_rows, video_file, write_parquet

if TYPE_CHECKING:
    import pyarrow as pa

    from ..streams.shard_format import ShardOptions
    from ..video.mp4 import Run, SampleTable

BLOCK_BYTES = 16 << 20  # pixels held at a time, whatever the resolution
MOST_BLOCK = 64  # frames
SPOOL_IN_MEMORY = 32 << 20


@dataclass(frozen=True)
class VideoOptions:
    """How pictures become video. `resize` is (width, height) in pixels, None keeps the recording's size."""

    codec: str = "h264"
    video: str = "auto"
    resize: tuple[int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "codec": self.codec,
            "video": self.video,
            "resize": list(self.resize) if self.resize else None,
        }

    def size(self, camera: CameraFeature) -> CameraFeature:
        if self.resize is None:
            return camera
        return CameraFeature(camera.key, self.resize[1], self.resize[0], camera.description)


@dataclass(frozen=True)
class EpisodeJob:
    source: str  # name for load_converter
    ref: EpisodeRef
    options: Any
    video: VideoOptions
    embodiment: Embodiment
    key: str
    spool: Path
    shards: ShardOptions | None = None  # JPEGs too, for the shards written when the dataset is numbered


def encode_episode(job: EpisodeJob) -> dict[str, Any]:
    """Read, check, hash and encode one episode; returns {"frames", "bytes", "dropped"}.

    An episode whose pixels turn out bad is recorded in its spool file as dropped, so that a rerun does not try
    it again until its files change.
    """
    _keep_freed_memory()
    converter = load_converter(job.source)
    memo = file_memo(job.ref.files)
    receipt: dict[str, Any] = {
        "source_id": job.ref.source_id,
        "split": job.ref.split,
        "variant": job.ref.variant,
        "frames": job.ref.frames,
        "instruction": job.ref.instruction,
        "metadata": dict(job.ref.metadata),
        "segments": [segment.to_json() for segment in job.ref.segments],
        "warnings": list(job.ref.warnings),
        "key": job.key,
        "memo": memo,
    }
    blobs: dict[str, BinaryIO] = {}
    try:
        episode = converter.read(job.ref, job.options)
        features = (*job.embodiment.features, *job.embodiment.sidecar)
        problems = check_columns(features, dict(episode.columns), episode.frames)
        if problems:
            raise DataError("; ".join(problems))
        arrays, cameras, hashes, histograms = _encode_cameras(episode, job, blobs)
    except DataError as error:
        receipt |= {
            "dropped": str(error),
            "remedy": "copy or record this episode again, then run the same command",
        }
        write_spool(job.spool, receipt, {}, {})
        return {"frames": 0, "bytes": 0, "dropped": str(error)}
    receipt["cameras"] = cameras
    receipt["raw_digest"] = _raw_digest(episode, hashes)
    receipt["content"] = _content(episode)
    arrays["statistics"] = statistics_table([episode.columns[f.name] for f in job.embodiment.features])
    for name, column in episode.columns.items():
        arrays[f"column/{name}"] = column
    for key, histogram in histograms.items():
        arrays[f"histogram/{key}"] = histogram.counts
        cameras[key]["counted"] = histogram.frames
    size = write_spool(job.spool, receipt, arrays, blobs)
    for blob in blobs.values():
        blob.close()
    return {"frames": episode.frames, "bytes": size, "dropped": ""}


@cache
def _keep_freed_memory() -> None:
    """Let glibc keep up to 64 MB of what is freed.

    Blocks of frames are some MB: by default each goes back to the system and is faulted in again, zeroed, for the
    next, a twentieth of the time of a conversion.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at the most that glibc would raise it to by itself
        mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD


def digest_episode(job: EpisodeJob) -> str:
    """The digest of an episode as its receipt carries it, without encoding: has a touched file really changed?"""
    episode = load_converter(job.source).read(job.ref, job.options)
    hashes: dict[str, str] = {}
    for key, camera in episode.cameras.items():
        hasher = _new_hash()
        if isinstance(camera, VideoClip):
            _hash_clip(hasher, camera)
        else:
            for start, stop in _blocks(camera):
                hasher.update(np.ascontiguousarray(camera.read(start, stop)))
        hashes[key] = hasher.hexdigest()
    return _raw_digest(episode, hashes)


def _encode_cameras(
    episode: Episode, job: EpisodeJob, blobs: dict[str, BinaryIO]
) -> tuple[dict[str, NDArray[Any]], dict[str, Any], dict[str, str], dict[str, FrameHistogram]]:
    """Frames of every camera, block by block in step, so that cameras stored together are read together."""
    from ..video.encode import PRESETS, Encoder

    arrays: dict[str, NDArray[Any]] = {}
    cameras: dict[str, Any] = {}
    hashes: dict[str, str] = {}
    histograms = {key: FrameHistogram() for key in episode.cameras}
    sources = {key: camera for key, camera in episode.cameras.items() if not isinstance(camera, VideoClip)}
    sizes = {camera.key: camera for camera in map(job.video.size, job.ref.cameras)}
    for key, camera in episode.cameras.items():
        if len(camera) != episode.frames:
            raise DataError(f"camera '{key}' has {len(camera)} frames, the episode {episode.frames}")
        if isinstance(camera, VideoClip):
            cameras[key], hashes[key] = _take_clip(
                key, camera, sizes[key], job, arrays, blobs, histograms[key]
            )
    encoders: dict[str, Encoder] = {}
    jpegs: dict[str, _Jpegs] = {}
    hashers = {key: _new_hash() for key in sources}
    for key in sources:
        blobs[key] = _blob()
        encoders[key] = Encoder(
            PRESETS[job.video.codec], sizes[key].height, sizes[key].width, job.embodiment.fps, blobs[key]
        )
        if job.shards is not None:
            jpegs[key] = _Jpegs(key, sizes[key], job.shards)
    counted = sampled_frames(episode.frames)
    if sources:
        blocks = _blocks(*sources.values())
        cuts = np.searchsorted(counted, [stop for _, stop in blocks[:-1]])
        for (start, stop), sampled in zip(blocks, np.split(counted, cuts), strict=True):
            wanted = sampled - start
            for key, source in sources.items():
                block = np.ascontiguousarray(source.read(start, stop))
                if len(block) != stop - start:
                    raise DataError(f"camera '{key}' ends at frame {start + len(block)} of {episode.frames}")
                hashers[key].update(block)
                histograms[key].add(block, wanted)
                encoders[key].write(block)
                if key in jpegs:
                    jpegs[key].add(block)
    for each in jpegs.values():
        each.keep(arrays, blobs)
    for key, encoder in encoders.items():
        clip = encoder.finish()
        arrays[f"sizes/{key}"], arrays[f"sync/{key}"] = clip.sizes, clip.sync
        cameras[key] = _camera_receipt(sizes[key], clip.sample_entry, "encoded")
        hashes[key] = hashers[key].hexdigest()
    return arrays, cameras, hashes, histograms


def _take_clip(
    key: str,
    clip: VideoClip,
    size: CameraFeature,
    job: EpisodeJob,
    arrays: dict[str, NDArray[Any]],
    blobs: dict[str, BinaryIO],
    histogram: FrameHistogram,
) -> tuple[dict[str, Any], str]:
    """A camera that is already video: its packets by reference when they may be copied, else transcoded."""
    from ..video.decode import open_video, pixel_format, transcode
    from ..video.encode import PRESETS, Encoder
    from ..video.mp4 import common_entry, copy_problem, read_table

    hasher = _new_hash()
    table = read_table(clip.path, clip.offset, clip.size)
    if len(table.shown) < clip.end:
        raise DataError(
            f"camera '{key}': {clip.path.name} holds {len(table.shown)} frames, the episode needs {clip.end}"
        )
    _hash_clip(hasher, clip, table)
    problem = f"one frame in {clip.stride} is used" if clip.stride > 1 else ""
    problem = problem or copy_problem(table, job.embodiment.fps, clip.first_frame, clip.frames)
    if (size.height, size.width) != (table.height, table.width):
        problem = problem or f"resize from {table.width}x{table.height} to {size.width}x{size.height}"
    if job.video.video == "copy" and problem:
        raise DataError(f"camera '{key}': {clip.path.name} cannot be copied ({problem}); use --video auto")
    counted = sampled_frames(clip.frames)
    if job.video.video != "transcode" and not problem:
        # Decoding costs a hundred times a copy: a few frames show the camera's colours well enough.
        few = np.unique(counted[np.round(np.linspace(0, len(counted) - 1, 4)).astype(int)])
        with open_video(clip.path, "pyav", clip.offset, clip.size) as reader:
            histogram.add(reader.read(few + clip.first_frame))
        receipt = _camera_receipt(size, common_entry(table.sample_entry), "copied", table.codec)
        receipt |= {"path": str(clip.path.resolve()), "offset": clip.offset, "size": clip.size}
        receipt |= {"first_frame": clip.first_frame, "frames": clip.frames}
        receipt |= {"pix_fmt": pixel_format(clip.path, clip.offset, clip.size)}
        if clip.held is not None:  # its file goes with the episode
            blobs[key] = clip.held
        return receipt, hasher.hexdigest()
    blobs[key] = _blob()
    encoder = Encoder(PRESETS[job.video.codec], size.height, size.width, job.embodiment.fps, blobs[key])
    shown = set(counted.tolist())
    jpegs = _Jpegs(key, size, job.shards) if job.shards is not None else None
    for number, picture in transcode(clip, encoder, keep=range(clip.frames) if jpegs else shown):
        if number in shown:
            histogram.add(picture[None])
        if jpegs is not None:
            jpegs.add(picture[None])
    if jpegs is not None:
        jpegs.keep(arrays, blobs)
    encoded = encoder.finish()
    arrays[f"sizes/{key}"], arrays[f"sync/{key}"] = encoded.sizes, encoded.sync
    return _camera_receipt(size, encoded.sample_entry, "encoded") | {
        "transcoded": problem
    }, hasher.hexdigest()


class _Jpegs:
    """One camera's frames as the JPEGs of shards, made from the pixels that its video is encoded from."""

    def __init__(self, key: str, size: CameraFeature, options: ShardOptions) -> None:
        self.section, self.quality = jpeg_section(key, options), options.quality
        self.size = options.stored_size(size.height, size.width)
        self.lengths: list[int] = []
        self.blob = _blob()

    def add(self, frames: NDArray[np.uint8]) -> None:
        from ..streams.shard_writing import encode_frames

        for jpeg in encode_frames(frames, self.size, self.quality):
            self.lengths.append(len(jpeg))
            self.blob.write(jpeg)

    def keep(self, arrays: dict[str, NDArray[Any]], blobs: dict[str, BinaryIO]) -> None:
        arrays[f"sizes/{self.section}"], blobs[self.section] = np.array(self.lengths, np.uint32), self.blob


def jpeg_section(key: str, options: ShardOptions) -> str:
    """Where a spool file holds a camera's JPEGs of this size and quality."""
    return f"jpeg/{options.short_side}/{options.quality}/{key}"


def _camera_receipt(size: CameraFeature, sample_entry: bytes, kind: str, codec: str = "") -> dict[str, Any]:
    return {
        "kind": kind,
        "codec": codec,
        "height": size.height,
        "width": size.width,
        "sample_entry": sample_entry.hex(),
    }


@dataclass(frozen=True)
class PartJob:
    """Episodes of one part, in order, with the numbers they get if nothing is dropped."""

    part: int
    root: Path
    spools: tuple[Path, ...]
    features: tuple[Feature, ...]
    sidecar: tuple[Feature, ...]
    cameras: tuple[str, ...]
    fps: int
    video: VideoOptions
    numbers: tuple[tuple[int, int, int], ...]  # episode_index, index, task_index
    language: bool = False  # whether segments also go into LeRobot's language column


def mux_part(job: PartJob) -> dict[str, Any]:
    """Write part files from spool files: videos in place, data staged, the part's receipt last."""
    spools = [read_spool(path) for path in job.spools]
    kept = [spool for spool in spools if "dropped" not in spool.receipt]
    files: dict[str, int] = {}
    streams: dict[str, Any] = {}
    if kept:
        for key in job.cameras:
            relative = video_file(f"observation.images.{key}", job.part)
            streams[key] = _mux_camera(job.root / relative, key, kept, job)
            files[relative] = (job.root / relative).stat().st_size
    numbers = [n for n, spool in zip(job.numbers, spools, strict=True) if "dropped" not in spool.receipt]
    staged = staged_data(job.root, job.part)
    schema = data_schema(job.features, job.language)
    tables = (
        episode_table(
            schema,
            job.features,
            {f.name: spool.arrays[f"column/{f.name}"] for f in job.features},
            int(spool.receipt["frames"]),
            job.fps,
            dict(zip(("episode_index", "index", "task_index"), number, strict=True)),
            language_rows(spool.receipt["segments"], int(spool.receipt["frames"]), job.fps)
            if job.language
            else None,
        )
        for spool, number in zip(kept, numbers, strict=True)
    )
    write_parquet(staged, tables, schema)
    if job.sidecar:
        write_parquet(staged_sidecar(job.root, job.part), *_sidecar(kept, job.sidecar))
    write_part_receipt(job.root, job.part, spools, job.features, job.cameras, numbers, streams, files)
    return {"files": files, "frames": sum(int(s.receipt["frames"]) for s in kept)}


def _mux_camera(path: Path, key: str, spools: Sequence[Spool], job: PartJob) -> dict[str, Any]:
    """One camera's packets of a part in one file; a copied clip that does not fit its neighbours is transcoded."""
    from ..video.mp4 import Run, copy_run, read_table, write_mp4

    cameras = [_in_spool(spool, key) for spool in spools]
    settings = {(camera["sample_entry"], camera["height"], camera["width"]) for camera in cameras}
    mixed = len(settings) > 1
    if mixed and job.video.video != "auto":
        raise DataError(
            f"camera '{key}' changes codec settings or size within part {job.part}; convert with --video transcode"
        )
    runs: list[Run] = []
    first = cameras[0]
    made_here: list[Path] = []
    for spool, camera in zip(spools, cameras, strict=True):
        if camera["kind"] == "encoded":
            sizes = spool.arrays[f"sizes/{key}"]
            offsets = spool.blobs[key].offset + np.cumsum(sizes) - sizes
            runs.append(Run(spool.path, offsets, sizes, spool.arrays[f"sync/{key}"]))
            first = camera if mixed else first
        elif mixed:
            made_here.append(temporary_name(spool.path.with_name(f"{spool.path.name}.{key}")))
            first, run = _transcode_to(made_here[-1], key, camera, job)
            runs.append(run)
        else:
            table = read_table(Path(camera["path"]), camera["offset"], camera["size"])
            runs.append(copy_run(table, camera["first_frame"], camera["frames"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    write_mp4(temporary, bytes.fromhex(first["sample_entry"]), first["width"], first["height"], job.fps, runs)
    commit(temporary, path)
    for leftover in made_here:
        leftover.unlink()
    return {
        name: first[name] for name in ("kind", "codec", "height", "width", "sample_entry") if name in first
    } | {"pix_fmt": first.get("pix_fmt", "yuv420p")}


def _in_spool(spool: Spool, key: str) -> Mapping[str, Any]:
    """A camera's receipt; its clip, where the spool file itself holds it, as a stretch of that."""
    camera, blob = spool.receipt["cameras"][key], spool.blobs.get(key)
    if camera["kind"] != "copied" or blob is None:
        return camera
    return {**camera, "path": str(spool.path), "offset": blob.offset, "size": blob.size}


def _transcode_to(
    path: Path, key: str, camera: Mapping[str, Any], job: PartJob
) -> tuple[dict[str, Any], Run]:
    """Encode a clip whose packets were to be copied, as the part's other clips are; its receipt and its run."""
    from ..video.decode import transcode
    from ..video.encode import PRESETS, Encoder

    places = ("offset", "size", "first_frame", "frames", "height", "width")
    clip = VideoClip(Path(camera["path"]), *(int(camera[name]) for name in places))
    with open(path, "wb") as sink:
        encoder = Encoder(PRESETS[job.video.codec], clip.height, clip.width, job.fps, sink)
        for _ in transcode(clip, encoder):
            pass
        encoded = encoder.finish()
    size = CameraFeature(key, clip.height, clip.width)
    return _camera_receipt(size, encoded.sample_entry, "encoded"), encoded.run(path)


def _sidecar(spools: Sequence[Spool], features: Sequence[Feature]) -> tuple[list[pa.Table], pa.Schema]:
    """`dpipe/columns` tables: what stands beside the dataset, one row group an episode, no global numbers."""
    import pyarrow as pa

    fields = [
        pa.field(f.name, t if f.dim == 1 else pa.list_(t, f.dim))
        for f in features
        for t in [pa.from_numpy_dtype(np.dtype(f.dtype))]
    ]
    schema = pa.schema(fields)
    tables = []
    for spool in spools:
        arrays = []
        for feature in features:
            flat = pa.array(spool.arrays[f"column/{feature.name}"].reshape(-1))
            arrays.append(flat if feature.dim == 1 else pa.FixedSizeListArray.from_arrays(flat, feature.dim))
        tables.append(pa.Table.from_arrays(arrays, schema=schema))
    return tables, schema


def staged_data(root: Path, part: int) -> Path:
    return root / "dpipe" / "staging" / data_file(part)


def sidecar_file(part: int) -> str:
    return "dpipe/columns/" + data_file(part).removeprefix("data/")


def staged_sidecar(root: Path, part: int) -> Path:
    return root / "dpipe" / "staging" / sidecar_file(part)


def file_memo(files: Sequence[Path]) -> list[list[int]]:
    """[size, mtime in ns] of each file: cheap to compare, and only ever a reason to look closer."""
    memo = []
    for path in files:
        try:
            status = path.stat()
        except OSError:
            memo.append([-1, -1])
        else:
            memo.append([status.st_size, status.st_mtime_ns])
    return memo


def _blocks(*sources: FrameSource) -> list[tuple[int, int]]:
    frames = len(sources[0])
    pixels = max(source.height * source.width * 3 for source in sources)
    size = max(1, min(BLOCK_BYTES // pixels, MOST_BLOCK))
    return [(start, min(start + size, frames)) for start in range(0, frames, size)]


def _blob() -> BinaryIO:
    return cast("BinaryIO", tempfile.SpooledTemporaryFile(max_size=SPOOL_IN_MEMORY))


def _new_hash() -> Any:
    import xxhash

    return xxhash.xxh3_128()


def _hash_clip(hasher: Any, clip: VideoClip, table: SampleTable | None = None) -> None:
    """The bytes a clip's pictures come from: its file, or of a file shared by episodes the packets of this one."""
    from ..video.mp4 import read_table

    table = table or read_table(clip.path, clip.offset, clip.size)
    spans = [(clip.offset, clip.size)]
    if 0 < clip.frames < len(table.shown):
        wanted = table.shown[clip.first_frame : clip.end]
        if not len(wanted):
            raise DataError(
                f"{clip.path.name} holds {len(table.shown)} frames, {clip.first_frame} is the first needed"
            )
        first, last = int(wanted.min()), int(wanted.max())
        start = int(np.flatnonzero(table.sync[: first + 1]).max(initial=0))  # where decoding begins
        hasher.update((first - start).to_bytes(8))
        packets = slice(start, last + 1)
        spans = list(zip(table.offsets[packets].tolist(), table.sizes[packets].tolist(), strict=True))
    with open(clip.path, "rb") as file:
        for offset, left in spans:
            file.seek(offset)
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                hasher.update(block)
                left -= len(block)


def _raw_digest(episode: Episode, camera_hashes: Mapping[str, str]) -> str:
    """Digest of everything the episode was made of, pixels included."""
    hasher = _new_hash()
    ref = episode.ref
    facts = [
        ref.source_id,
        ref.split,
        ref.instruction,
        dict(ref.metadata),
        [s.to_json() for s in ref.segments],
    ]
    hasher.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name in sorted(episode.columns):
        column = np.ascontiguousarray(episode.columns[name])
        hasher.update(f"{name} {column.dtype.str} {column.shape}".encode())
        hasher.update(column)
    for key in sorted(camera_hashes):
        hasher.update(f"{key} {camera_hashes[key]}".encode())
    return hasher.hexdigest()


def _content(episode: Episode) -> str:
    from ..streams.dataset import episode_content

    return episode_content(episode.columns, episode.frames)
