"""Files from strangers: each of these would do harm in a trusting reader; here each is refused by name, unharmed.

The doctor is the door most of them are tried at, since it opens everything a converter or a loader would.
"""

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dpipe.converters.lerobot_files import open_parquet as open_lerobot_rows
from dpipe.converters.mapped import decode_picture
from dpipe.pipeline.doctor import Level, examine
from dpipe.schemas.errors import DataError, DpipeError, UsageError
from dpipe.streams.dataset import decode_image, open_dataset
from raw_agibot import pack, write_episode
from raw_calvin import write_split
from raw_egodex import write_episode as write_egodex
from raw_egodex import zip_part
from raw_libero import demo_arrays, write_raw, write_suite
from small_datasets import write_dataset
from trees import run_convert


def found(path: Path, level: Level = Level.SAMPLED) -> str:
    """Everything the doctor says, a finding a line."""
    return "\n".join(f"{f.problem}: {f.where}: {f.what}" for f in examine(path, level).findings)


class Command:
    """Unpickling this in the usual way runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def pickled(value: object) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})
    return header.getvalue() + pickle.dumps(value)


# --- pickles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["lang_annotations/auto_lang_ann.npy", "scene_info.npy", "ep_start_end_ids.npy"]
)
def test_a_pickle_that_would_run_a_command_runs_nothing(tmp_path: Path, name: str):
    folder = write_split(tmp_path / "calvin/task_D_D/training", [(0, 20)], [(0, 15, "push it", "push")])
    (folder / name).write_bytes(pickled(Command(f"touch {tmp_path / 'harm'}")))
    told = found(tmp_path / "calvin")
    assert not (tmp_path / "harm").exists()
    assert "refused" in told and name.rpartition("/")[2] in told


# --- archives -----------------------------------------------------------------------------------------------


def test_a_tar_that_climbs_out_is_refused(tmp_path: Path):
    raw = write_episode(tmp_path / "agibot")
    pack(raw)
    (archive,) = (raw / "observations/327").glob("*.tar")
    with tarfile.open(archive, "a") as tar:
        member = tarfile.TarInfo("../../../../climbed")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"harm"))
    told = found(raw)
    assert "refused" in told and "climbed" in told
    assert not list(tmp_path.parent.glob("climbed")) and not list(tmp_path.rglob("climbed"))


def test_a_link_in_a_tar_is_no_recording(tmp_path: Path):
    raw = write_episode(tmp_path / "agibot")
    secret = tmp_path / "secret.mp4"
    secret.write_bytes((raw / "observations/327/648649/videos/head_color.mp4").read_bytes())
    (raw / "observations/327/648649/videos/head_color.mp4").unlink()
    pack(raw)
    (archive,) = (raw / "observations/327").glob("*.tar")
    with tarfile.open(archive, "a") as tar:
        member = tarfile.TarInfo("648649/videos/head_color.mp4")
        member.type, member.linkname = tarfile.SYMTYPE, str(secret)
        tar.addfile(member)
    report = examine(raw)
    assert report.episodes == 0 and "missing-file" in report.problems


def test_a_zip_that_climbs_out_is_refused(tmp_path: Path):
    write_egodex(tmp_path / "egodex/part1/task/0")
    path = zip_part(tmp_path / "egodex/part1")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../climbed.hdf5", b"harm")
    for name in ("0.hdf5", "0.mp4"):
        (tmp_path / "egodex/part1/task" / name).unlink()
    told = found(tmp_path / "egodex")
    assert "refused" in told and "climbed" in told
    assert not list(tmp_path.rglob("climbed*"))


def bomb(declared: int, inflated: int) -> bytes:
    """An npz whose member unpacks to `inflated` zero bytes, whatever its directory declares."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(inflated >> 20)) + packer.flush()
    name, crc = b"actions.npy", 0
    local = (
        struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 0, crc, len(packed), declared, len(name), 0) + name
    )
    entry = struct.pack(
        "<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 8, 0, 0, crc, len(packed), declared, len(name), 0, 0, 0, 0, 0, 0
    )
    start = len(local) + len(packed)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(entry) + len(name), start, 0)
    return local + packed + entry + name + end


@pytest.mark.parametrize(("declared", "inflated"), [(200, 64 << 20), (0xFFFFFFF0, 1 << 20)])
def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, declared: int, inflated: int):
    folder = write_split(tmp_path / "calvin/task_D_D/training", [(0, 20)], [(0, 15, "push it", "push")])
    (folder / "episode_0000004.npz").write_bytes(bomb(declared, inflated))
    report = examine(tmp_path / "calvin")
    assert report.problems & {"unreadable", "refused"} and report.episodes == 0
    assert "4" in report.findings[0].what


def test_no_more_of_a_zip_member_is_inflated_than_it_declares():
    """Refused either way, but everything would have been there first."""
    from dpipe.converters.archives import bytes_read_at, read_member, zip_members

    data = bomb(200, 32 << 20)
    (member,) = zip_members(bytes_read_at(data), len(data))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="other than the 200 bytes"):
            read_member(bytes_read_at(data), member)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_sparse_file_in_a_tar_is_no_recording(tmp_path: Path):
    """Its size is a claim: 4 bytes are stored of 700, and what follows them is not its own."""
    from dpipe.converters.archives import index_tar

    member = tarfile.TarInfo("648649/videos/head_color.mp4")
    member.size = 4
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:410] = b"%011o\0%011o\0" % (0, 4)
    header[483:495] = b"\x80" + (700).to_bytes(11)  # the real size, in base 256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + b"harm".ljust(512, b"\0") + bytes(1024))
    with tarfile.open(tmp_path / "a.tar") as archive:
        (entry,) = archive.getmembers()
        assert entry.issparse() and entry.size == 700
    assert index_tar(tmp_path / "a.tar").members == {}


def test_an_array_that_claims_a_terabyte_is_refused(tmp_path: Path):
    folder = write_split(tmp_path / "calvin/task_D_D/training", [(0, 20)], [(0, 15, "push it", "push")])
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 37,)}
    )
    with zipfile.ZipFile(folder / "episode_0000004.npz", "w") as archive:
        archive.writestr("actions.npy", header.getvalue())
    report = examine(tmp_path / "calvin")
    assert report.problems & {"unreadable", "refused"} and report.episodes == 0


# --- HDF5 ---------------------------------------------------------------------------------------------------


def external_link(file: h5py.File) -> None:
    del file["data/demo_0/actions"]
    file["data/demo_0/actions"] = h5py.ExternalLink("/etc/passwd", "/x")


def soft_link(file: h5py.File) -> None:
    del file["data/demo_0/actions"]
    file["data/demo_0/actions"] = h5py.SoftLink("/data/demo_1/actions")


def external_storage(file: h5py.File) -> None:
    del file["data/demo_0/actions"]
    group = file["data/demo_0"]
    group.create_dataset("actions", (12, 7), "f8", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


def virtual_layout(file: h5py.File) -> None:
    del file["data/demo_0/actions"]
    layout = h5py.VirtualLayout((12, 7), "f8")
    layout[:] = h5py.VirtualSource("/tmp/other.h5", "x", (12, 7))
    file["data/demo_0"].create_virtual_dataset("actions", layout)


def plugin_filter(file: h5py.File) -> None:
    """A filter that HDF5 would look for as a shared object; optional, so that it can be written without it."""
    del file["data/demo_0/actions"]
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((12, 7))
    properties.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, (1, 2))
    space = h5py.h5s.create_simple((12, 7))
    h5py.h5d.create(file["data/demo_0"].id, b"actions", h5py.h5t.IEEE_F64LE, space, properties)


def impossible_size(file: h5py.File) -> None:
    del file["data/demo_0/actions"]
    file["data/demo_0"].create_dataset("actions", (1 << 33, 7), "f8", chunks=(1024, 7), compression="gzip")


@pytest.mark.parametrize(
    "harm", [external_link, soft_link, external_storage, virtual_layout, plugin_filter, impossible_size]
)
def test_hdf5_that_reaches_out_or_swells_is_refused(tmp_path: Path, harm):
    path = write_suite(tmp_path / "libero")
    with h5py.File(path, "r+") as file:
        harm(file)
    report = examine(tmp_path / "libero")
    assert "refused" in report.problems, [f.what for f in report.findings]
    assert report.episodes == 2, "the other demonstrations are read"


# --- pictures and video -------------------------------------------------------------------------------------


def jpeg_claiming(width: int, height: int) -> bytes:
    """A real JPEG whose header says another size."""
    import simplejpeg

    data = bytearray(simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8)))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def png_claiming(width: int, height: int) -> bytes:
    parts = [(b"IHDR", struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b""))]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    "data",
    [jpeg_claiming(60000, 60000), png_claiming(60000, 60000), png_claiming(9000, 9000)],
    ids=["jpeg", "png", "smaller png"],
)
def test_a_picture_of_impossible_size_is_refused_before_it_is_allocated(tmp_path: Path, data: bytes):
    with pytest.raises(DataError, match="refused"):
        decode_image(data, "here")
    with pytest.raises(DataError, match=r"refused|cannot be decoded: Image size"):
        decode_picture(data, "here")
    root = write_dataset(tmp_path / "set", [12], kind="image")
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.ParquetFile(path).read()
    cells = [{"bytes": data, "path": None}] * 12
    camera = "observation.images.image"
    column = pa.array(cells, table.schema.field(camera).type)
    pq.write_table(table.set_column(table.column_names.index(camera), camera, column), path)
    report = examine(root)
    assert "video-damaged" in report.problems and "refused" in found(root)


def test_a_picture_outside_the_dataset_is_not_looked_at(tmp_path: Path):
    root = write_dataset(tmp_path / "set", [12], kind="image")
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.ParquetFile(path).read()
    (tmp_path / "secret.png").write_bytes(table.column("observation.images.image")[0].as_py()["bytes"])
    cells = [{"bytes": None, "path": "../secret.png"}] * 12
    camera = "observation.images.image"
    column = pa.array(cells, table.schema.field(camera).type)
    pq.write_table(table.set_column(table.column_names.index(camera), camera, column), path)
    assert "outside the dataset; refused" in found(root)
    with pytest.raises(DataError, match="outside the dataset; refused"):
        open_dataset(root).frames(0, camera, 0, 1)


def patch_video(root: Path, kind: bytes, at: int, data: bytes) -> None:
    path = root / "videos/observation.images.image/chunk-000/file-000.mp4"
    content = bytearray(path.read_bytes())
    start = content.index(kind, content.index(b"moov")) + 4 + at
    content[start : start + len(data)] = data
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("kind", "at", "data", "words"),
    [
        (b"avc1", 24, struct.pack(">HH", 60000, 60000), "60000x60000"),
        (b"url ", 0, bytes(4), "another file"),
        (b"stsz", 8, struct.pack(">I", 1 << 31), "claims"),
    ],
)
def test_a_video_that_claims_or_refers_too_far_is_refused(tmp_path: Path, kind, at, data, words):
    root = write_dataset(tmp_path / "set", [12])
    patch_video(root, kind, at, data)
    assert words in found(root)


def test_a_table_of_a_gigabyte_is_not_read(tmp_path: Path):
    """A file with a hole where its moov should be costs nobody anything but its reader."""
    from dpipe.video.mp4 import read_table

    path = tmp_path / "hole.mp4"
    path.write_bytes(struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0) + struct.pack(">I4s", 1 << 30, b"moov"))
    os.truncate(path, 16 + (1 << 30))
    with pytest.raises(DataError, match="claims 1073741824 bytes; the limit"):
        read_table(path)


# --- tables and JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "/etc/{chunk_index}/{file_index}",
        "../../{chunk_index}/{file_index}.parquet",
        "data/{chunk_index.__class__.__init__}/{file_index}",
        "data/{chunk_index:>99999999999}/{file_index}",
    ],
)
def test_a_path_template_leads_nowhere_else(tmp_path: Path, template: str):
    root = write_dataset(tmp_path / "set", [12], kind="none")
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | {"data_path": template}))
    assert "data_path" in found(root, Level.FAST)
    with pytest.raises(DataError, match="data_path"):
        open_dataset(root)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"fps": 1e999, "features": {}}', '{"fps": NaN}', "\0\0", ""]
)
def test_json_of_any_kind_is_a_message(tmp_path: Path, text: str):
    root = write_dataset(tmp_path / "set", [12], kind="none")
    (root / "meta/info.json").write_text(text)
    assert examine(root).problems
    with pytest.raises(DpipeError):
        open_dataset(root)


BOMB_ROWS = 8 << 20  # of 8 bytes: half a gigabyte in eight columns, in some hundred kilobytes of run lengths


def write_bomb(path: Path, rows: int = BOMB_ROWS, **columns: int | str | list[float]) -> None:
    """A Parquet file in which every row is the same."""
    one = pa.table({name: pa.array([value]) for name, value in columns.items()})
    block = one.take(pa.array(np.zeros(1 << 18, np.int64)))
    path.unlink(missing_ok=True)
    with pq.ParquetWriter(path, one.schema, compression="zstd") as writer:
        for _ in range(rows >> 18):
            writer.write_table(block)
    assert path.stat().st_size < 2 << 20


def test_a_table_of_more_values_than_its_bytes_hold_is_not_read(tmp_path: Path):
    root = write_dataset(tmp_path / "set", [12], kind="none")
    sound = tmp_path / "sound.parquet"
    for name, columns in {
        "meta/tasks.parquet": {"task_index": 0, "task": "push"},
        "meta/episodes/chunk-000/file-000.parquet": {
            "episode_index": 0,
            "length": 12,
            "dataset_from_index": 0,
            "dataset_to_index": 12,
            "data/chunk_index": 0,
            "data/file_index": 0,
        },
    }.items():
        sound.write_bytes((root / name).read_bytes())
        write_bomb(root / name, **columns)
        before = peak()
        with pytest.raises(DataError, match=r"claims [\d,]+ values in [\d,]+ bytes; refused"):
            open_dataset(root)
        for level in Level:
            assert re.search(r"claims [\d,]+ values", found(root, level)), level
        assert peak() - before < 64 << 20, "nothing was allocated for it"
        (root / name).write_bytes(sound.read_bytes())


def test_rows_of_more_values_than_their_bytes_hold_are_not_read(tmp_path: Path):
    """Where the tables agree that an episode is so long, and in a list of one row."""
    root = write_dataset(tmp_path / "set", [12], kind="none")
    rows = pq.ParquetFile(root / "data/chunk-000/file-000.parquet").read()
    (first,) = rows.slice(0, 1).to_pylist()
    meta = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.ParquetFile(meta).read()
    for name in ("length", "dataset_to_index"):
        column = pa.array([BOMB_ROWS], pa.int64())
        table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, meta)
    write_bomb(root / "data/chunk-000/file-000.parquet", **first)
    before = peak()
    assert "refused" in found(root)
    with pytest.raises(DataError, match="refused"):
        open_dataset(root).columns(["action"], 0)
    with pytest.raises(DataError, match="refused"):
        open_lerobot_rows(root / "data/chunk-000/file-000.parquet")
    assert peak() - before < 64 << 20, "nothing was allocated for it"


def test_a_row_of_more_elements_than_its_bytes_hold_is_not_read(tmp_path: Path):
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table({"action": [np.zeros(8 << 20, np.float32)]}), path, compression="zstd")
    with pytest.raises(DataError, match="claims 8,388,608 values"):
        open_lerobot_rows(path)


def test_rows_that_no_episode_has_are_not_read(tmp_path: Path):
    """A footer with more rows than meta/episodes tells of, however many bytes they are."""
    from dpipe.pipeline.doctor.subject import Subject

    root = write_dataset(tmp_path / "set", [12], kind="none")
    path = root / "data/chunk-000/file-000.parquet"
    rows = pq.ParquetFile(path).read()
    pq.write_table(pa.concat_tables([rows] * (1 << 13)), path)
    subject = Subject(root, Level.SAMPLED)
    (place,) = subject.data_places
    block = subject.block(place)
    assert block is not None and block.rows == 12 << 13 and not block.columns
    assert "row-count" in examine(root).problems


def peak() -> int:
    """The most memory this process has held so far, in bytes."""
    match = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert match
    return int(match.group(1)) << 10


# --- words --------------------------------------------------------------------------------------------------


def test_an_instruction_never_reaches_a_path_a_shell_or_a_page_as_it_is(tmp_path: Path):
    """The sentence of a LIBERO task is its file's name, so that a hostile one is a file's name, too."""
    evil = 'x_$(touch harm)_`touch harm`_<img src=x onerror=alert(1)>_"; rm -rf ~;'
    arrays = {0: demo_arrays(12), 1: demo_arrays(13, seed=1)}
    write_raw(tmp_path / "raw/libero/libero_goal" / f"{evil}_demo.hdf5", arrays)
    run_convert(tmp_path / "raw/libero", tmp_path / "set")
    assert not list(tmp_path.rglob("harm"))
    card = (tmp_path / "set/README.md").read_text()
    assert "<img" not in card and "`touch" not in card
    names = {path.name for path in (tmp_path / "set").rglob("*")}
    assert not any("harm" in name or "<" in name for name in names)
    dataset = open_dataset(tmp_path / "set")
    assert "$(touch harm)" in dataset.tasks[0], "the words themselves are kept"
    assert "instruction" in examine(tmp_path / "set").problems
    assert "\n" not in dataset.tasks[0]


EVIL = 'x](http://a.example) <img src=x onerror=alert(1)> `rm` | "; rm -rf ~; $(touch harm)'


def test_names_from_other_peoples_datasets_reach_the_card_without_markup(tmp_path: Path):
    """Feature names, dimension names and splits are words of strangers as much as instructions are."""
    root = write_dataset(tmp_path / "raw", [12, 13], kind="none", tasks=(EVIL,), splits={EVIL: "0:2"})
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["action"]["names"] = [EVIL, "y", "gripper"]
    (root / "meta/info.json").write_text(json.dumps(info))
    run_convert(root, tmp_path / "set", "lerobot")
    card = (tmp_path / "set/README.md").read_text()
    assert "touch harm" in card, "the words are shown"
    assert "<img" not in card and "`rm`" not in card and "x](" not in card
    rows = [line for line in card.splitlines() if line.startswith("| `action`")]
    assert len(rows) == 1 and rows[0].replace("\\|", "").count("|") == 6, "no cell of a table was opened"


def test_names_from_other_peoples_datasets_reach_the_report_without_markup(tmp_path: Path):
    """Dimension names stand in its charts, too, which are another language than its page."""
    from dpipe.pipeline.report import write_report
    from dpipe.pipeline.workspace import Workspace

    root = write_dataset(tmp_path / "lerobot/set", [12, 13], kind="none", tasks=(EVIL,))
    info = json.loads((root / "meta/info.json").read_text())
    for feature in ("action", "observation.state"):
        names = info["features"][feature]["names"]
        info["features"][feature]["names"] = [EVIL, *names[1:]]
    (root / "meta/info.json").write_text(json.dumps(info))
    page = write_report(Workspace(tmp_path), (), None).path.read_text()
    assert "touch harm" in page, "the words are shown"
    assert "<img src=x" not in page


def test_a_script_for_slurm_quotes_every_word():
    import shlex

    from dpipe.pipeline.slurm import sbatch_script

    script = sbatch_script(["convert", "libero", "--where", EVIL], 4, 2, None)
    (line,) = [line for line in script.splitlines() if line.startswith("dpipe convert")]
    assert EVIL in shlex.split(line.partition(" --workers")[0])
    with pytest.raises(UsageError, match="line break"):
        sbatch_script(["convert", "libero", "--where", "x\ntouch harm"], 4, 2, None)


@pytest.mark.parametrize("decode", [decode_image, decode_picture])
def test_a_picture_that_is_a_program_is_no_picture(monkeypatch: pytest.MonkeyPatch, decode):
    """Pillow would hand PostScript to Ghostscript."""
    asked = []

    def run(*given: object, **more: object) -> None:
        asked.append(given)
        raise OSError("Ghostscript was asked")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", run)
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n(harm) run\n%%EOF\n"
    with pytest.raises(DataError, match="cannot be decoded"):
        decode(program, "here")
    assert not asked


def test_nothing_reaches_for_the_network_unasked(tmp_path: Path):
    """Sample, convert, precompute, doctor and status, in a process in which every connection is refused."""
    code = """
import socket, sys
from pathlib import Path

tried = []
def refuse(name):
    def call(*given, **more):
        tried.append((name, given[1:2]))
        raise OSError("no network here")
    return call
for name in ("connect", "connect_ex", "sendto", "bind"):
    setattr(socket.socket, name, refuse(name))
socket.create_connection = refuse("create_connection")
socket.getaddrinfo = refuse("getaddrinfo")

from dpipe.cli import cli
space = ["--workspace", sys.argv[1]]
for words in (
    ["sample", "libero", "--episodes", "2", *space],
    ["convert", "libero", "--workers", "0", *space],
    ["precompute", "tokens", "stats", "--workers", "0", *space],
    ["doctor", "libero", "--full", *space],
    ["doctor", str(Path(sys.argv[1]) / "raw/libero"), *space],
    ["status", *space],
):
    try:
        cli(words, standalone_mode=True)
    except SystemExit as end:
        assert not end.code, (words, end.code)
assert not tried, tried
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]


def test_a_condition_over_episodes_reads_no_file(tmp_path: Path):
    from dpipe.pipeline.query import select_rows

    episodes = pa.table({"frames": [1, 2]})
    assert select_rows(episodes, "frames = 2") == [1]
    (tmp_path / "secret.csv").write_text("a\n1\n")
    with pytest.raises(UsageError):
        select_rows(episodes, f"frames IN (SELECT a FROM read_csv('{tmp_path / 'secret.csv'}'))")


# --- our own folder -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../set/meta/info.json", "/etc/passwd", "..", ".hidden", "a\\b", "a/b"])
@pytest.mark.parametrize("entry", ["part", "index"])
def test_shards_name_no_file_outside_their_folder(tmp_path: Path, name: str, entry: str):
    from dpipe.streams.rows import Fit
    from dpipe.streams.shard_writing import write_shards
    from dpipe.streams.shards import ShardRows

    root = write_dataset(tmp_path / "set", [12], kind="none")
    folder = write_shards(open_dataset(root), tmp_path / "shards")
    index = json.loads((folder / "index.json").read_text())
    (index["parts"][0] if entry == "part" else index["index"])["file"] = name
    (folder / "index.json").write_text(json.dumps(index))
    assert "refused" in examine(folder).problems
    with pytest.raises(DataError, match="outside its folder"):
        ShardRows(folder, Fit(None))


def break_part(folder: Path) -> None:
    path = folder / "episodes.parquet"
    table = pq.ParquetFile(path).read()
    keys = pa.array(["../../../../harm"] * len(table))
    pq.write_table(table.set_column(table.column_names.index("key"), "key", keys), path)


def break_array(folder: Path) -> None:
    told = json.loads((folder / "contract.json").read_text())
    told["arrays"][0]["name"] = "../../../../harm"
    (folder / "contract.json").write_text(json.dumps(told))


def break_scale(folder: Path) -> None:
    told = json.loads((folder / "contract.json").read_text())
    told["arrays"][0]["attributes"]["scale"] = "/etc/passwd"
    (folder / "contract.json").write_text(json.dumps(told))


@pytest.mark.parametrize("harm", [break_part, break_array, break_scale])
def test_targets_name_no_file_outside_their_folder(tmp_path: Path, harm):
    from dpipe.pipeline.precompute import precompute
    from dpipe.streams.targets import open_targets
    from tiny_dataset import write_tiny

    root = write_tiny(tmp_path / "set", [(0, 24)])
    precompute(root, ["tokens"], {"tokens": {"probe": "none", "bins": [10]}})
    (folder,) = (root / "dpipe/targets/tokens").iterdir()
    assert "refused" not in examine(folder).problems
    harm(folder)
    assert "refused" in examine(folder).problems
    with pytest.raises(DataError, match="refused"):
        open_targets(root, ["tokens"]).take(index=np.arange(2))


def test_weights_that_claim_a_header_of_a_terabyte_are_not_read(tmp_path: Path):
    from dpipe.pipeline.info import describe

    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(DataError, match="claims 1099511627776 bytes; refused"):
        describe(path)


def test_an_index_fetched_from_a_stranger_writes_nothing_outside_the_cache(tmp_path: Path):
    from dpipe.streams.remote import Cache
    from dpipe.streams.rows import Fit
    from dpipe.streams.shard_writing import write_shards
    from dpipe.streams.shards import open_remote_shards

    root = write_dataset(tmp_path / "set", [12], kind="none")
    folder = write_shards(open_dataset(root), tmp_path / "site/shards")
    (tmp_path / "site/harm").write_bytes((folder / "index.bin").read_bytes())
    index = json.loads((folder / "index.json").read_text())
    index["index"]["file"] = "../harm"
    (folder / "index.json").write_text(json.dumps(index))
    cache = Cache(tmp_path / "cache")
    with pytest.raises(DataError, match="outside its folder"):
        open_remote_shards(folder.as_uri(), cache, Fit(None))
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["index.json"]


def test_checkpoints_are_loaded_as_weights_only():
    """Every torch.load of the package says so; a pickled checkpoint could run anything."""
    import ast

    for path in sorted(Path(__file__).resolve().parent.parent.glob("*/**/*.py")):
        if ".venv" in path.parts or "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            called = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called == "torch.load":
                assert given.get("weights_only") == "True", f"{path}:{node.lineno}"
            if called in ("np.load", "numpy.load"):
                assert given.get("allow_pickle", "False") == "False", f"{path}:{node.lineno}"
            if called == "yaml.load":
                assert "Safe" in ast.unparse(node), f"{path}:{node.lineno}"
            assert given.get("shell") != "True", f"{path}:{node.lineno}"
            assert called not in ("os.system", "os.popen", "pickle.load", "pickle.loads"), (
                f"{path}:{node.lineno}"
            )
