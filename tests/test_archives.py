"""Members of zips and tars read in place: same bytes as the standard library's, names and sizes distrusted."""

import io
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from dpipe.converters.archives import (
    bytes_read_at,
    data_offset,
    index_tar,
    open_read_at,
    read_member,
    safe_name,
    zip_members,
)
from dpipe.schemas.errors import DataError
from hypothesis import given
from hypothesis import strategies as st


def zip_bytes(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED, comment: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.comment = comment
    return buffer.getvalue()


def members_of(data: bytes):
    return {member.name: member for member in zip_members(bytes_read_at(data), len(data))}


@given(
    st.dictionaries(
        st.text("abc/é", min_size=1, max_size=8).filter(lambda n: not n.endswith("/")),
        st.binary(max_size=300),
    ),
    st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
    st.binary(max_size=40).filter(lambda c: b"PK" not in c),
)
def test_every_member_reads_as_zipfile_wrote_it(files, method, comment):
    data = zip_bytes(files, method, comment)
    found = members_of(data)
    assert list(found) == list(files)
    for name, content in files.items():
        assert read_member(bytes_read_at(data), found[name]) == content


def test_a_directory_longer_than_one_block_is_listed_in_full(monkeypatch):
    monkeypatch.setattr("dpipe.converters.archives.DIRECTORY_BLOCK", 100)
    files = {f"episode_{i:07d}.npz": bytes([i]) for i in range(50)}
    assert list(members_of(zip_bytes(files))) == list(files)


def test_zip64_entries_and_directory_are_read():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i in range(3):
            with archive.open(f"{i}.bin", "w", force_zip64=True) as file:
                file.write(bytes([i]) * 5)
    data = buffer.getvalue()
    assert read_member(bytes_read_at(data), members_of(data)["2.bin"]) == b"\2" * 5
    # The same archive with its end record moved into a zip64 one, as archives beyond 4 GiB or 65,535 files have.
    at = data.rindex(b"PK\5\6")
    _, _, _, _, entries, length, offset, _ = struct.unpack("<4s4H2LH", data[at : at + 22])
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, length, offset)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, at, 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    wide = data[:at] + record + locator + end
    assert read_member(bytes_read_at(wide), members_of(wide)["1.bin"]) == b"\1" * 5


def test_zip64_offsets_in_an_entry_are_believed_over_the_short_ones():
    data = zip_bytes({"a": b"payload"}, zipfile.ZIP_STORED)
    directory = data.index(b"PK\1\2")
    entry = bytearray(data[directory : data.rindex(b"PK\5\6")])
    entry[42:46] = b"\xff" * 4  # header offset: look in the extra field
    extra = struct.pack("<2HQ", 1, 8, 0)
    entry[30:32] = struct.pack("<H", len(extra))
    entry += extra
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(entry), directory, 0)
    wide = data[:directory] + bytes(entry) + end
    assert read_member(bytes_read_at(wide), members_of(wide)["a"]) == b"payload"


def test_an_npz_is_read_through_its_place_in_a_larger_zip(tmp_path: Path):
    npz = io.BytesIO()
    np.savez_compressed(npz, actions=np.arange(7.0))
    path = tmp_path / "outer.zip"
    path.write_bytes(
        zip_bytes({"x/first": b"1" * 999, "x/episode_0.npz": npz.getvalue()}, zipfile.ZIP_STORED)
    )
    with open_read_at(path) as (read_at, size):
        outer = {m.name: m for m in zip_members(read_at, size)}["x/episode_0.npz"]
        start = data_offset(read_at, outer)
        inner = {m.name: m for m in zip_members(lambda at, n: read_at(start + at, n), outer.size)}
        array = np.load(io.BytesIO(read_member(lambda at, n: read_at(start + at, n), inner["actions.npy"])))
    assert array.tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a\\b", "C:/x", "a/\0b", ""])
def test_names_that_leave_their_folder_are_refused(name):
    with pytest.raises(DataError, match="refused"):
        safe_name(name)


def test_plain_names_pass_and_lose_a_leading_dot():
    assert safe_name("./648649/videos/head_color.mp4") == "648649/videos/head_color.mp4"
    assert safe_name("a/..b/c") == "a/..b/c"


@pytest.mark.parametrize("cut", [1, 21, 60, 500])
def test_a_zip_cut_short_is_refused(cut):
    data = zip_bytes({"a.bin": bytes(range(256)) * 4}, zipfile.ZIP_STORED)
    with pytest.raises(DataError):
        members_of(data[:-cut])


def test_one_changed_byte_is_noticed():
    data = bytearray(zip_bytes({"a.bin": b"0123456789" * 50}, zipfile.ZIP_STORED))
    member = members_of(bytes(data))["a.bin"]
    data[data_offset(bytes_read_at(bytes(data)), member) + 3] ^= 1
    with pytest.raises(DataError, match="checksum"):
        read_member(bytes_read_at(bytes(data)), member)


def test_a_member_that_inflates_beyond_its_declared_size_is_refused():
    data = zip_bytes({"a": bytes(100_000)})
    member = members_of(data)["a"]
    with pytest.raises(DataError, match="declares"):
        read_member(bytes_read_at(data), member._replace(size=100))
    with pytest.raises(DataError, match="refused"):
        read_member(bytes_read_at(data), member._replace(size=1 << 40))


def test_a_foreign_method_and_encryption_are_refused_by_name():
    data = bytearray(zip_bytes({"a": b"xyz"}, zipfile.ZIP_STORED))
    member = members_of(bytes(data))["a"]
    with pytest.raises(DataError, match="method 93"):
        read_member(bytes_read_at(bytes(data)), member._replace(method=93))
    data[data.index(b"PK\1\2") + 8] |= 1
    with pytest.raises(DataError, match="encrypted"):
        members_of(bytes(data))


def write_tar(path: Path, files: dict[str, bytes], **mode: str) -> None:
    with tarfile.open(path, mode.get("mode", "w")) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_tar_members_are_where_the_index_says(tmp_path: Path):
    files = {"1/videos/head_color.mp4": b"abc" * 400, "1/" + "long" * 60 + "/x": b"y", "2/empty": b""}
    path = tmp_path / "1-2.tar"
    write_tar(path, files)
    index = index_tar(path)
    data = path.read_bytes()
    assert {m.name: data[m.offset : m.offset + m.size] for m in index.members.values()} == files
    assert index.problem == ""


def test_a_torn_tar_keeps_what_is_whole_and_says_where_it_ends(tmp_path: Path):
    path = tmp_path / "1-2.tar"
    write_tar(path, {"1/a": b"a" * 2000, "2/b": b"b" * 2000})
    path.write_bytes(path.read_bytes()[:4000])
    index = index_tar(path)
    assert list(index.members) == ["1/a"]
    assert "2/b" in index.problem


def test_links_in_a_tar_are_no_files(tmp_path: Path):
    path = tmp_path / "l.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("1/videos/head_color.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        info = tarfile.TarInfo("1/a")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"a"))
    assert list(index_tar(path).members) == ["1/a"]


def test_unsafe_names_and_compressed_tars_are_refused(tmp_path: Path):
    bad = tmp_path / "bad.tar"
    write_tar(bad, {"../escape": b"x"})
    with pytest.raises(DataError, match="escape"):
        index_tar(bad)
    packed = tmp_path / "packed.tar"
    write_tar(packed, {"a": b"x"}, mode="w:gz")
    with pytest.raises(DataError, match="unpack it"):
        index_tar(packed)
