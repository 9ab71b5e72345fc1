"""MP4 sample tables: what we write reads back, what others write is read, and damage is refused by name."""

import dataclasses
import struct
import tarfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from dpipe.schemas.errors import DataError
from dpipe.video import mp4
from dpipe.video.mp4 import Run, can_join, copy_problem, copy_run, read_table, write_mp4
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ENTRY = mp4.visual_entry(b"avc1", 64, 48, mp4.box(b"avcC", b"\1\x42\0\x1e\xff\xe0\0"))


def record(
    path: Path, frames: int, encoder: str = "libx264", fps: int = 30, audio: bool = False, **options: str
) -> Path:
    """A clip muxed by FFmpeg, 64x48; the picture moves two pixels a frame."""
    container_options = {"movflags": options.pop("movflags")} if "movflags" in options else {}
    with av.open(str(path), "w", options=container_options) as container:
        quiet = {"libx265": {"x265-params": "log-level=none"}}.get(encoder, {})
        video = container.add_stream(encoder, fps, options=quiet | options)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream("aac", 48000) if audio else None
        texture = (
            np.random.default_rng(0).integers(0, 200, (6, 8, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        )
        for t in range(frames):
            picture = np.roll(texture, 2 * t, axis=1)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            if sound is not None:
                silence = av.AudioFrame.from_ndarray(
                    np.zeros((2, 1600), np.float32), format="fltp", layout="stereo"
                )
                silence.sample_rate = 48000
                container.mux(sound.encode(silence))
        container.mux(video.encode(None))
        if sound is not None:
            container.mux(sound.encode(None))
    return path


def pictures(path: Path) -> tuple[list[np.ndarray], list[Fraction]]:
    """Every frame PyAV's own demuxer and decoder give, with its time in seconds."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        return [f.to_ndarray(format="rgb24") for f in frames], [f.pts * stream.time_base for f in frames]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Two clips, 25 and 18 frames, per kind of stream that may be copied."""
    folder = tmp_path_factory.mktemp("clips")
    kinds = {
        "x264, B-frames": ("libx264", {"g": "12", "bf": "3"}),
        "x264, g=2": ("libx264", {"g": "2", "bf": "0"}),
        "x265, closed": ("libx265", {"x265-params": "log-level=none:keyint=10:open-gop=0"}),
        "AV1, g=2": ("libsvtav1", {"g": "2", "preset": "12", "crf": "30"}),
    }
    return {
        name: [
            record(folder / f"{encoder}-{options.get('bf', '')}-{n}.mp4", n, encoder, **options)
            for n in (25, 18)
        ]
        for name, (encoder, options) in kinds.items()
    }


KINDS = ["x264, B-frames", "x264, g=2", "x265, closed", "AV1, g=2"]


# -- what others write is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_agrees_with_what_ffmpeg_demuxes(clips, kind):
    table = read_table(clips[kind][0])
    data = clips[kind][0].read_bytes()
    with av.open(str(clips[kind][0])) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert [data[o : o + s] for o, s in zip(table.offsets, table.sizes, strict=True)] == [
        bytes(p) for p in packets
    ]
    assert table.sync.tolist() == [packet.is_keyframe for packet in packets]
    assert (table.media_times - table.media_times.min()).tolist() == [packet.pts for packet in packets]
    assert (table.width, table.height, table.fps, len(table.shown)) == (64, 48, 30, 25)
    assert not table.has_edits
    assert (np.diff(table.ranks) < 0).any() == (kind in ("x264, B-frames", "x265, closed")), (
        "frames are reordered"
    )


def test_the_table_is_found_at_either_end_of_the_file(tmp_path):
    behind = read_table(record(tmp_path / "behind.mp4", 5))
    # The same packets: encoded again with x264's defaults the same frames may give other bytes.
    with (
        av.open(str(tmp_path / "behind.mp4")) as source,
        av.open(str(tmp_path / "before.mp4"), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    before = read_table(tmp_path / "before.mp4")
    assert behind.sizes.tolist() == before.sizes.tolist()
    assert behind.offsets[0] < before.offsets[0]


def test_audio_is_ignored(tmp_path):
    path = record(tmp_path / "sound.mp4", 20, audio=True)
    table = read_table(path)
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    data = path.read_bytes()
    assert [data[o : o + s] for o, s in zip(table.offsets, table.sizes, strict=True)] == packets
    assert (np.diff(table.offsets) != table.sizes[:-1]).any(), (
        "audio lies between, so the test means something"
    )


def test_a_member_of_a_tar_reads_in_place(tmp_path):
    clip = record(tmp_path / "clip.mp4", 6)
    with tarfile.open(tmp_path / "clips.tar", "w") as archive:
        archive.add(clip, "first.mp4")
        archive.add(clip, "second.mp4")
    with tarfile.open(tmp_path / "clips.tar") as archive:
        member = archive.getmember("second.mp4")
    alone, inside = read_table(clip), read_table(tmp_path / "clips.tar", member.offset_data, member.size)
    assert (inside.offsets - alone.offsets).tolist() == [member.offset_data] * 6
    assert inside.sizes.tolist() == alone.sizes.tolist()


def test_an_edit_list_that_cuts_shows_what_ffmpeg_shows(tmp_path):
    path = record(tmp_path / "cut.mp4", 20, g="5", bf="2")
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 12
    duration, media_time = struct.unpack_from(">Ii", data, at)
    tick = read_table(path).timescale // 30
    struct.pack_into(">Ii", data, at, duration * 10 // 20, media_time + 7 * tick)  # ten frames from frame 7
    path.write_bytes(data)
    table = read_table(path)
    assert table.has_edits
    assert len(table.shown) == 10 == len(pictures(path)[0])
    assert copy_problem(table, 30) == "the edit list cuts frames or changes speed"


@pytest.mark.parametrize(
    ("timescale", "durations", "fps"),
    [
        (15360, [512] * 6, Fraction(30)),
        (30000, [1001] * 6, Fraction(30000, 1001)),
        (1000, [33, 33, 34, 33, 33, 34], Fraction(30)),  # thirds of a second in whole milliseconds
        (1000, [33, 33, 34, 66, 33, 34], None),  # a frame is missing
        (90000, [3000, 3000, 3000, 3300, 2700, 3000], None),  # one comes late
        (30, [1, 1, 2, 1, 1, 1], None),  # a tick is a whole frame: nothing is rounding here
    ],
)
def test_a_constant_rate_is_told_from_a_late_frame(tmp_path, timescale, durations, fps):
    table = read_table(record(tmp_path / "clip.mp4", 6, bf="0"))
    table = dataclasses.replace(table, timescale=timescale, durations=np.array(durations), edits=())
    assert table.fps == fps


# -- what we write ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_joined_clips_show_every_frame_at_its_number_over_fps(tmp_path, clips, kind):
    tables = [read_table(path) for path in clips[kind]]
    assert [copy_problem(table, 30) for table in tables] == [None, None]
    assert can_join(*tables) is None
    out = tmp_path / "joined.mp4"
    size = write_mp4(out, tables[0].sample_entry, 64, 48, 30, [copy_run(table) for table in tables])
    assert size == out.stat().st_size

    got, times = pictures(out)
    expected = [picture for path in clips[kind] for picture in pictures(path)[0]]
    assert times == [Fraction(k, 30) for k in range(43)]
    assert all((a == b).all() for a, b in zip(got, expected, strict=True))
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == stream.base_rate == 30
        assert stream.duration * stream.time_base == Fraction(43, 30)
        assert (stream.start_time, stream.frames) == (0, 43)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decoder", ["pyav", "torchcodec"])
def test_lerobot_reads_joined_clips(tmp_path, clips, kind, decoder):
    torch = pytest.importorskip("torch")
    video_utils = pytest.importorskip("lerobot.datasets.video_utils")
    if decoder == "torchcodec":
        pytest.importorskip("torchcodec.decoders", exc_type=(ImportError, RuntimeError, OSError))
    tables = [read_table(path) for path in clips[kind]]
    out = tmp_path / "joined.mp4"
    write_mp4(out, tables[0].sample_entry, 64, 48, 30, [copy_run(table) for table in tables])
    asked = [0, 3, 11, 12, 13, 24, 25, 26, 40, 42]
    got = video_utils.decode_video_frames(
        out, [k / 30 for k in asked], 1e-4, backend=decoder, return_uint8=True
    )
    expected = [picture for path in clips[kind] for picture in pictures(path)[0]]
    assert torch.equal(got.permute(0, 2, 3, 1), torch.from_numpy(np.stack([expected[k] for k in asked])))


def test_part_of_a_clip_is_copied_where_decoding_can_start(tmp_path, clips):
    path = clips["x264, g=2"][0]
    table = read_table(path)
    assert copy_problem(table, 30, 4, 7) is None
    write_mp4(tmp_path / "part.mp4", table.sample_entry, 64, 48, 30, [copy_run(table, 4, 7)])
    got, _ = pictures(tmp_path / "part.mp4")
    assert all((a == b).all() for a, b in zip(got, pictures(path)[0][4:11], strict=True))
    assert "decoding can start" in copy_problem(table, 30, 5, 7)
    assert "frames 20 to 27 of 25" in copy_problem(table, 30, 20, 7)
    assert "decoded among others" in copy_problem(read_table(clips["x264, B-frames"][0]), 30, 0, 2)


@st.composite
def runs(draw):
    """Runs over one heap of bytes: gaps between samples, any sizes, presentation order shuffled."""
    made = []
    for _ in range(draw(st.integers(1, 4))):
        n = draw(st.integers(1, 8))
        sizes = np.array(draw(st.lists(st.integers(1, 50), min_size=n, max_size=n)), np.int64)
        gaps = np.array(draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)), np.int64)
        sync = np.array([True, *draw(st.lists(st.booleans(), min_size=n - 1, max_size=n - 1))])
        order = draw(st.none() | st.permutations(range(n)))
        offsets = np.cumsum(sizes + gaps) - sizes
        made.append((offsets, sizes, sync, None if order is None else np.array(order, np.int64)))
    return made


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(made=runs(), fps=st.sampled_from([1, 10, 20, 30, 50, 60]), in_file=st.booleans())
def test_what_is_written_reads_back(tmp_path, made, fps, in_file):
    heap = np.random.default_rng(0).integers(0, 256, 1000, np.uint8).tobytes()
    (tmp_path / "heap").write_bytes(heap)
    source = tmp_path / "heap" if in_file else heap
    parts = [Run(source, *part) for part in made]
    write_mp4(tmp_path / "out.mp4", ENTRY, 64, 48, fps, parts)
    table = read_table(tmp_path / "out.mp4")
    data = (tmp_path / "out.mp4").read_bytes()

    expected = [heap[o : o + s] for run in parts for o, s in zip(run.offsets, run.sizes, strict=True)]
    assert [data[o : o + s] for o, s in zip(table.offsets, table.sizes, strict=True)] == expected
    assert table.sync.tolist() == [bool(flag) for run in parts for flag in run.sync]
    first, ranks = 0, []
    for run in parts:
        ranks += [first + int(k) for k in (range(len(run)) if run.order is None else run.order)]
        first += len(run)
    assert table.ranks.tolist() == ranks
    assert table.times.tolist() == [512 * k for k in range(len(ranks))]
    assert table.media_times.min() == 0
    assert len(ranks) == 1 or table.fps == fps
    assert table.sample_entry == mp4.common_entry(ENTRY)


def test_the_bytes_depend_on_the_arguments_alone(tmp_path, clips):
    table = read_table(clips["AV1, g=2"][0])
    for name in ("a", "b"):
        write_mp4(tmp_path / name, table.sample_entry, 64, 48, 30, [copy_run(table)])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_files_above_four_gigabytes_get_wide_offsets(tmp_path, clips, monkeypatch):
    table = read_table(clips["x264, B-frames"][0])
    monkeypatch.setattr(mp4, "_WIDE_FROM", 0)
    write_mp4(tmp_path / "wide.mp4", table.sample_entry, 64, 48, 30, [copy_run(table)])
    data = (tmp_path / "wide.mp4").read_bytes()
    assert b"co64" in data and b"stco" not in data
    again = read_table(tmp_path / "wide.mp4")
    assert (
        data[again.offsets[3] :][: again.sizes[3]]
        == clips["x264, B-frames"][0].read_bytes()[table.offsets[3] :][: table.sizes[3]]
    )
    assert len(pictures(tmp_path / "wide.mp4")[0]) == 25


def test_copying_falls_back_to_reading_where_the_kernel_cannot(tmp_path, clips, monkeypatch):
    table = read_table(clips["x264, g=2"][0])
    write_mp4(tmp_path / "kernel.mp4", table.sample_entry, 64, 48, 30, [copy_run(table)])

    def refuse(*_):
        raise OSError(18, "cross-device")

    monkeypatch.setattr(mp4.os, "copy_file_range", refuse)
    write_mp4(tmp_path / "memory.mp4", table.sample_entry, 64, 48, 30, [copy_run(table)])
    assert (tmp_path / "kernel.mp4").read_bytes() == (tmp_path / "memory.mp4").read_bytes()


def test_a_source_that_shrank_is_refused(tmp_path, clips):
    short = tmp_path / "short.mp4"
    short.write_bytes(clips["x264, g=2"][0].read_bytes())
    table = read_table(short)
    short.write_bytes(short.read_bytes()[: int(table.offsets[-1])])
    with pytest.raises(DataError, match=r"short\.mp4: ended \d+ bytes early"):
        write_mp4(tmp_path / "out.mp4", table.sample_entry, 64, 48, 30, [copy_run(table)])


# -- who may share a file --------------------------------------------------------------------------------------


def test_bit_rate_and_encoder_name_do_not_keep_clips_apart(tmp_path):
    loud = read_table(record(tmp_path / "a.mp4", 8, g="2", bf="0"))
    still = read_table(record(tmp_path / "b.mp4", 2, g="2", bf="0"))
    assert loud.sample_entry != still.sample_entry, "FFmpeg writes the bit rate into the entry"
    assert can_join(loud, still) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"codec": "hevc"}, "codec"),
        ({"width": 66}, "size"),
        ({"timescale": 20 * 512}, "frame rate"),
        ({"sample_entry": mp4.visual_entry(b"avc1", 64, 48, mp4.box(b"avcC", b"other"))}, "encoder settings"),
    ],
)
def test_clips_that_differ_do_not_share_a_file(tmp_path, clips, change, reason):
    table = read_table(clips["x264, g=2"][0])
    assert reason in can_join(table, dataclasses.replace(table, **change))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"codec": "mpeg4"}, "codec is mpeg4"),
        ({"entries": 2}, "2 sample descriptions"),
        ({"upright": False}, "display matrix"),
        ({"timescale": 25 * 512, "edits": ()}, "frame rate is 25"),
        (
            {"durations": np.array([512] * 12 + [600] + [512] * 12), "edits": ()},
            "varies",
        ),
        ({"sync": np.arange(25) == 3}, "decoding can start"),
        ({"sizes": np.zeros(25, np.int64)}, "sample 0 is empty"),
        ({"edits": (mp4.Edit(9, 0, 1.0), mp4.Edit(9, 0, 1.0))}, "edit list"),
        ({"edits": (mp4.Edit(0, 0, 2.0),)}, "edit list"),
    ],
)
def test_a_clip_that_must_not_be_copied_says_why(clips, change, reason):
    table = read_table(clips["x264, g=2"][0])
    assert copy_problem(table, 30) is None
    assert reason in copy_problem(dataclasses.replace(table, **change), 30)


def test_open_groups_of_pictures_are_not_copied(tmp_path):
    path = record(
        tmp_path / "open.mp4", 40, "libx265", **{"x265-params": "log-level=none:keyint=10:open-gop=1"}
    )
    table = read_table(path)
    assert table.has_open_gops
    assert "open" in copy_problem(table, 30)


# -- hostile files ---------------------------------------------------------------------------------------------


def find(data: bytes, kind: bytes) -> int:
    """Where the payload of the first box `kind` in the table begins."""
    return data.index(kind, data.index(b"moov")) + 4


def damaged(path: Path, source: Path, change) -> Path:
    data = bytearray(source.read_bytes())
    changed = change(data)
    path.write_bytes(data if changed is None else changed)
    return path


def put(kind: bytes, at: int, layout: str, *values: int):
    def change(data: bytearray) -> None:
        struct.pack_into(layout, data, find(data, kind) + at, *values)

    return change


def widen(data: bytearray) -> bytes:
    """The movie box claims 2^63 bytes."""
    at = find(data, b"moov") - 8
    return bytes(data[:at]) + struct.pack(">I4sQ", 1, b"moov", 1 << 63) + bytes(data[at + 8 :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (widen, "claims 9223372036854775808 bytes"),
        (put(b"moov", -8, ">I", 4), "less than its header"),
        (put(b"stbl", -8, ">I", 1 << 31), "claims 2147483648 bytes where its parent has"),
        (put(b"stsz", 8, ">I", 1 << 31), "claims 2147483648 frames"),
        (put(b"stsz", 4, ">II", 1, 100_000), "claims 100000 frames"),
        (put(b"stts", 4, ">I", 1 << 31), "claims 2147483648 entries"),
        (put(b"stts", 8, ">I", 1 << 31), "describes 2147483648 frames"),
        (put(b"ctts", 4, ">I", 1 << 31), "claims 2147483648 entries"),
        (put(b"stss", 4, ">I", 1 << 31), "claims 2147483648 entries"),
        (put(b"stss", 8, ">I", 99), "names frame 99 of 12"),
        (put(b"stsc", 4, ">I", 1 << 31), "claims 2147483648 entries"),
        (put(b"stsc", 12, ">I", 1 << 31), "places 2147483648 frames"),
        (put(b"stco", 4, ">I", 1 << 31), "claims 2147483648 entries"),
        (put(b"stco", 8, ">I", 1 << 31), "frame 0 lies at byte 2147483648"),
        (put(b"stsz", 12, ">I", 1 << 31), "add up to"),
        (put(b"mdhd", 12, ">I", 0), "timescale is zero"),
        (put(b"mvhd", 12, ">I", 0), "timescale is zero"),
        (put(b"avc1", 24, ">HH", 60000, 60000), "60000x60000 pixels"),
        (put(b"avc1", 24, ">HH", 0, 48), "0x48 pixels"),
        (put(b"avcC", -8, ">I", 1 << 20), "'avcC' claims"),
        (put(b"elst", 4, ">I", 1 << 31), "claims 2147483648 entries"),
        (put(b"url ", 0, ">I", 0), "another file"),
        (put(b"hdlr", 8, ">4s", b"soun"), "no video track"),
        (lambda data: data[: len(data) - 60], "cut short"),
        (lambda data: data[: find(data, b"moov") - 8], "no table"),
        (lambda data: b"", "outside the file of 0 bytes"),
        (lambda data: b"\0\0\0\x08free" * 5000, "no table"),
        (lambda data: b"\x89HDF\r\n\x1a\n" + bytes(100), "not an MP4"),
    ],
)
def test_a_hostile_table_is_refused_by_name(tmp_path, change, message):
    source = record(tmp_path / "sound.mp4", 12, g="4", bf="2")
    read_table(source)  # sound until exactly one thing is broken
    bad = damaged(tmp_path / "bad.mp4", source, change)
    with pytest.raises(DataError) as caught:
        read_table(bad)
    assert "bad.mp4" in str(caught.value)
    assert message in str(caught.value)


def test_a_fragmented_file_is_refused_with_its_remedy(tmp_path):
    for flags in ("frag_keyframe+empty_moov", "frag_keyframe"):
        path = record(tmp_path / f"{flags}.mp4", 12, movflags=flags)
        with pytest.raises(DataError, match=r"fragmented MP4.*Transcode or remux"):
            read_table(path)


def test_any_single_changed_byte_is_refused_or_harmless(tmp_path):
    """Whatever one byte of the table says, reading it ends in a table or in a message."""
    source = record(tmp_path / "sound.mp4", 12, g="4", bf="2").read_bytes()
    start = source.index(b"moov") - 4
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(source)
        data[int(rng.integers(start, len(data)))] = int(rng.integers(256))
        (tmp_path / "bad.mp4").write_bytes(data)
        try:
            table = read_table(tmp_path / "bad.mp4")
        except DataError:
            continue
        assert (table.offsets + table.sizes <= len(data)).all()
        copy_problem(table, 30)


def test_a_bomb_of_boxes_ends_early(tmp_path):
    moov = mp4.box(b"moov", b"\0\0\0\x08free" * 10_000)
    (tmp_path / "bomb.mp4").write_bytes(mp4.box(b"ftyp", b"isom") + moov)
    with pytest.raises(DataError, match="more than 4096 boxes"):
        read_table(tmp_path / "bomb.mp4")


def test_compact_sizes_are_read(tmp_path):
    """stz2 with 16-bit fields, as some recorders write."""
    write_mp4(
        tmp_path / "plain.mp4",
        ENTRY,
        64,
        48,
        30,
        [Run(bytes(600), np.array([0, 100, 350]), np.array([100, 250, 7]), np.array([True, False, False]))],
    )
    data = (tmp_path / "plain.mp4").read_bytes()
    at = data.index(b"stsz") - 4
    compact = mp4.box(b"stz2", bytes(7), b"\x10", (3).to_bytes(4), struct.pack(">3H", 100, 250, 7))
    padding = 20 + 12 - len(compact)
    assert padding == 6
    compact = compact[:4] + compact[4:] + bytes(padding)
    compact = (len(compact)).to_bytes(4) + compact[4:]  # same length as before, so that offsets hold
    (tmp_path / "compact.mp4").write_bytes(data[:at] + compact + data[at + len(compact) :])
    assert read_table(tmp_path / "compact.mp4").sizes.tolist() == [100, 250, 7]
