"""Pictures by number: every backend agrees with FFmpeg's own reading, each group once, damage by name."""

import dataclasses
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import av
import numpy as np
import pytest
from dpipe.schemas.episode import VideoClip
from dpipe.schemas.errors import DataError, UsageError
from dpipe.video import decode
from dpipe.video.decode import BACKENDS, ReaderCache, backend_problem, choose_backend, open_video, transcode
from dpipe.video.encode import AV1, H264, Codec, Encoder
from dpipe.video.mp4 import read_table, write_mp4
from hypothesis import given, settings
from hypothesis import strategies as st

FRAMES = 23


def moving(frames: int, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """[n, H, W, 3]: a coloured texture that moves two pixels a frame."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return np.stack([np.roll(blocks.repeat(8, 0).repeat(8, 1), 2 * t, axis=1) for t in range(frames)])


def save(path: Path, codec: Codec, frames: np.ndarray, fps: int = 20) -> Path:
    """Frames written by our own encoder and table."""
    sink = io.BytesIO()
    encoder = Encoder(codec, *frames.shape[1:3], fps, sink)
    encoder.write(frames)
    clip = encoder.finish()
    write_mp4(path, clip.sample_entry, clip.width, clip.height, fps, [clip.run(sink.getvalue())])
    return path


def record(path: Path, encoder: str, frames: int = FRAMES, **options: str) -> Path:
    """A clip muxed by FFmpeg."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, 30, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for picture in moving(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def pictures(path: Path) -> np.ndarray:
    """Every frame as PyAV's demuxer and decoder give it."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


QUIET = "log-level=none"
KINDS = ["ours h264", "ours av1", "x264 B-frames", "x265 closed", "x265 open", "AV1 long", "MPEG-4"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return {
        "ours h264": save(folder / "h264.mp4", H264, moving(FRAMES)),
        "ours av1": save(folder / "av1.mp4", AV1, moving(FRAMES)),
        "x264 B-frames": record(folder / "b.mp4", "libx264", g="9", bf="3"),
        "x265 closed": record(
            folder / "265.mp4", "libx265", **{"x265-params": f"{QUIET}:keyint=10:open-gop=0"}
        ),
        "x265 open": record(
            folder / "open.mp4", "libx265", **{"x265-params": f"{QUIET}:keyint=10:open-gop=1"}
        ),
        "AV1 long": record(folder / "long.mp4", "libsvtav1", g="60", preset="12", crf="35"),
        "MPEG-4": record(folder / "part2.mp4", "mpeg4", g="9", bf="2"),
    }


def usable(backend: str) -> None:
    problem = backend_problem(backend)
    if problem:
        pytest.skip(f"{backend} does not work here: {problem}")


# Pairs a backend declines rather than answer wrongly.
DECLINED = {("decord", "x265 open"), ("decord", "x265 closed"), ("decord", "MPEG-4")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_frame_is_the_one_ffmpeg_shows(clips, backend, kind):
    usable(backend)
    if (backend, kind) in DECLINED:
        with pytest.raises(DataError, match=r"decord does not read every frame.*use the pyav backend"):
            open_video(clips[kind], backend)
        return
    expected = pictures(clips[kind])
    with open_video(clips[kind], backend) as reader:
        assert len(reader) == FRAMES
        assert (reader.height, reader.width) == (48, 64)
        assert np.array_equal(reader.read(slice(None)), expected)
        for asked in ([22], [0], [9, 10], [21, 3, 3, 12], list(range(22, -1, -1)), []):
            assert np.array_equal(reader.read(asked), expected[asked].reshape(-1, 48, 64, 3)), asked


@pytest.mark.parametrize("kind", KINDS)
def test_any_order_of_reads_gives_the_same_pictures(clips, kind):
    """The decoder goes on where it stopped, jumps, or starts again: never a picture of another number."""
    expected = pictures(clips[kind])
    reader = open_video(clips[kind], "pyav")
    number = st.integers(0, FRAMES - 1)

    @settings(deadline=None, max_examples=40)
    @given(reads=st.lists(st.lists(number, max_size=6), max_size=6))
    def check(reads: list[list[int]]) -> None:
        for asked in reads:
            assert np.array_equal(reader.read(asked), expected[asked].reshape(-1, 48, 64, 3))

    check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("codec", [H264, AV1], ids=["h264", "av1"])
def test_the_number_of_a_frame_is_exact(tmp_path, backend, codec):
    """Frame i is a flat grey of level 10 + i, over several hundred frames and odd rates."""
    usable(backend)
    grey = (10 + np.arange(230)).astype(np.uint8)
    frames = np.broadcast_to(grey[:, None, None, None], (230, 64, 64, 3))
    reader = open_video(save(tmp_path / "grey.mp4", codec, frames, fps=29), backend)
    asked = np.random.default_rng(0).permutation(230)
    levels = np.rint(reader.read(asked).mean(axis=(1, 2, 3)))
    assert np.abs(levels - grey[asked]).max() <= 1
    assert (np.diff(levels[np.argsort(asked)]) >= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_member_of_a_tar_is_read_in_place(clips, tmp_path, backend):
    usable(backend)
    with tarfile.open(tmp_path / "clips.tar", "w") as archive:
        archive.add(clips["MPEG-4"], "other.mp4")
        archive.add(clips["ours av1"], "wanted.mp4")
    with tarfile.open(tmp_path / "clips.tar") as archive:
        member = archive.getmember("wanted.mp4")
    with open_video(tmp_path / "clips.tar", backend, member.offset_data, member.size) as reader:
        assert np.array_equal(reader.read([0, 22, 7]), pictures(clips["ours av1"])[[0, 22, 7]])


def test_blocks_cover_the_video_once_in_order(clips):
    blocks = list(open_video(clips["x264 B-frames"]).blocks(7))
    assert [len(block) for block in blocks] == [7, 7, 7, 2]
    assert np.array_equal(np.concatenate(blocks), pictures(clips["x264 B-frames"]))


def test_each_sample_is_decoded_once_when_reading_in_order(clips, monkeypatch):
    """Windows that walk forward through long groups of pictures never go back to a key frame."""
    fed = []
    real = os.pread
    monkeypatch.setattr(decode.os, "pread", lambda file, size, at: fed.append(at) or real(file, size, at))
    reader = open_video(clips["AV1 long"], "pyav")
    fed.clear()
    for start in range(0, 20, 4):
        reader.read([start, start + 1])
    assert len(fed) == len(set(fed)) <= FRAMES


def test_a_jump_ahead_skips_the_groups_between(clips, monkeypatch):
    fed = []
    real, offsets = os.pread, read_table(clips["ours h264"]).offsets
    reader = open_video(clips["ours h264"], "pyav")
    monkeypatch.setattr(decode.os, "pread", lambda file, size, at: fed.append(at) or real(file, size, at))
    reader.read([3])
    reader.read([18, 19])
    assert fed == offsets[[2, 3, 18, 19]].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_resizing_averages(tmp_path, backend):
    """Every 4x4 block has one colour, so each small pixel is that colour, edges and chroma aside."""
    usable(backend)
    frames = moving(4, 96, 128)[:, :, :, :1].repeat(3, -1)
    path = save(tmp_path / "clip.mp4", H264, frames)
    with open_video(path, backend) as full, open_video(path, backend, resize=(24, 32)) as small:
        expected = full.read(slice(None)).reshape(4, 24, 4, 32, 4, 3).mean(axis=(2, 4))
        shown = small.read(slice(None))
    assert shown.shape == (4, 24, 32, 3)
    assert np.abs(shown - expected).mean() < 1.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("matrix", ["ITU709", "ITU601"])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
def test_the_stream_s_own_colours_are_honoured(tmp_path, backend, matrix, full):
    """BT.709 read as BT.601 turns pure green 37 levels off: only the tags tell."""
    usable(backend)
    colours = np.array([[0, 200, 0], [200, 0, 0], [0, 0, 200], [120, 120, 120]], np.uint8)
    frames = np.ascontiguousarray(np.broadcast_to(colours[:, None, None, :], (4, 48, 64, 3)))
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", 30, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_range = (1 if matrix == "ITU709" else 5), (2 if full else 1)
        for picture in frames:
            rgb = av.VideoFrame.from_ndarray(picture, format="rgb24")
            yuv = rgb.reformat(
                format="yuv420p",
                src_colorspace="ITU601" if matrix == "ITU709" else "ITU709",  # unequal, or PyAV sets neither
                dst_colorspace=matrix,
                src_color_range="JPEG" if full else "MPEG",
                dst_color_range="JPEG" if full else "MPEG",
            )
            yuv.colorspace, yuv.color_range = (1 if matrix == "ITU709" else 5), (2 if full else 1)
            container.mux(stream.encode(yuv))
        container.mux(stream.encode(None))
    shown = open_video(tmp_path / "clip.mp4", backend).read(slice(None))
    assert np.abs(shown.astype(int) - frames).max() <= 4
    if backend == "pyav":
        _, again = transcoded(clip_of(tmp_path / "clip.mp4", frames=4), tmp_path / "out.mp4")
        assert np.abs(again.astype(int) - frames).max() <= 5, "our own encodings are untagged BT.601"


def test_an_edit_list_is_followed(clips, tmp_path):
    data = bytearray(clips["x264 B-frames"].read_bytes())
    at = data.index(b"elst") + 12
    table = read_table(clips["x264 B-frames"])
    tick = table.timescale // 30
    media_time = int.from_bytes(data[at + 4 : at + 8]) + 5 * tick
    data[at : at + 8] = (table.movie_timescale * 8 // 30).to_bytes(4) + media_time.to_bytes(4)
    (tmp_path / "cut.mp4").write_bytes(data)
    with open_video(tmp_path / "cut.mp4", "pyav") as reader:
        assert len(reader) == 8
        assert np.array_equal(reader.read(slice(None)), pictures(clips["x264 B-frames"])[5:13])
    if backend_problem("decord") is None:
        with pytest.raises(DataError, match=r"decord counts 23 frames.*shows 8.*Use the pyav backend"):
            open_video(tmp_path / "cut.mp4", "decord")


# -- choosing ----------------------------------------------------------------------------------------------------


def test_auto_is_the_first_backend_that_decodes_here(clips, monkeypatch):
    assert choose_backend()[0] == "pyav"
    assert open_video(clips["ours av1"]).backend == "pyav"
    choose_backend.cache_clear()
    monkeypatch.setattr(decode, "backend_problem", lambda name: "no AV1" if name == "pyav" else None)
    try:
        name, reason = choose_backend()
    finally:
        choose_backend.cache_clear()
    assert name == "decord"
    assert "not pyav: no AV1" in reason


def test_an_unknown_backend_lists_the_known():
    with pytest.raises(
        UsageError, match=r"(?s)unknown video backend 'decor'.*known: auto, decord, pyav, torchcodec"
    ):
        open_video(Path("clip.mp4"), "decor")


def test_a_backend_that_cannot_be_used_says_why(clips, monkeypatch):
    monkeypatch.setattr(decode, "backend_problem", lambda name: "h264: ImportError: libavutil.so.58")
    with pytest.raises(
        UsageError, match=r"'torchcodec' does not work here: h264: ImportError: libavutil\.so\.58"
    ):
        open_video(clips["ours h264"], "torchcodec")


def test_decord_and_torchcodec_live_in_one_process(clips):
    """decord's libraries are loaded with local symbols; global ones crash torchcodec's AV1 decoder."""
    usable("decord")
    usable("torchcodec")
    code = (
        "import sys; from pathlib import Path; from dpipe.video.decode import open_video\n"
        "path = Path(sys.argv[1])\n"
        "a = open_video(path, 'decord').read([5, 6]); b = open_video(path, 'torchcodec').read([5, 6])\n"
        "assert (a == b).all()"
    )
    done = subprocess.run([sys.executable, "-c", code, clips["ours av1"]], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-500:]


# -- damage ------------------------------------------------------------------------------------------------------


def test_frames_that_do_not_exist_are_refused(clips):
    reader = open_video(clips["ours h264"])
    for asked in ([23], [-1], [0, 99]):
        with pytest.raises(IndexError, match=r"h264\.mp4: frames .* asked of 23"):
            reader.read(asked)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["ours h264", "ours av1"])
def test_a_damaged_frame_is_named_and_the_others_still_read(clips, tmp_path, backend, kind):
    usable(backend)
    table, data = read_table(clips[kind]), bytearray(clips[kind].read_bytes())
    at, size = int(table.offsets[12]), int(table.sizes[12])
    data[at + 5 : at + size] = bytes(size - 5)
    (tmp_path / "bad.mp4").write_bytes(data)
    expected = pictures(clips[kind])
    try:
        reader = open_video(tmp_path / "bad.mp4", backend)
        with pytest.raises(DataError) as caught:
            reader.read([12])
    except DataError as error:  # decord already refuses to open it
        assert backend == "decord"
        assert "bad.mp4" in str(error)
        return
    assert "bad.mp4" in str(caught.value)
    assert "12" in str(caught.value)
    if backend == "pyav":
        assert np.array_equal(reader.read([4, 20]), expected[[4, 20]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_byte_ends_in_pictures_or_a_message(clips, tmp_path, kind):
    data, rng = clips[kind].read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(30):
        bad = bytearray(data)
        bad[int(rng.integers(len(bad)))] ^= 1 << int(rng.integers(8))
        (tmp_path / "bad.mp4").write_bytes(bad)
        try:
            with open_video(tmp_path / "bad.mp4", "pyav") as reader:
                reader.read(slice(0, FRAMES))
        except DataError as error:
            refused += 1
            assert "bad.mp4" in str(error)
    assert refused > 0


def test_a_stream_larger_than_its_table_says_is_not_decoded(tmp_path):
    """The table claims 64x48; the samples inside are 1024x768. Neither allocated nor returned."""
    large = save(tmp_path / "large.mp4", H264, np.zeros((2, 768, 1024, 3), np.uint8))
    data = bytearray(large.read_bytes())
    at = data.index(b"avc1", data.index(b"stsd")) + 28
    data[at : at + 4] = (64).to_bytes(2) + (48).to_bytes(2)
    large.write_bytes(data)
    with pytest.raises(DataError, match=r"large\.mp4"):
        open_video(large, "pyav").read([0])


def test_a_turned_picture_is_refused(clips, tmp_path):
    data = bytearray(clips["ours h264"].read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    matrix = [0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000]  # a quarter turn, as phones write
    data[at : at + 36] = b"".join(value.to_bytes(4, signed=True) for value in matrix)
    (tmp_path / "turned.mp4").write_bytes(data)
    with pytest.raises(DataError, match="display matrix"):
        open_video(tmp_path / "turned.mp4")


# -- transcoding -------------------------------------------------------------------------------------------------


def clip_of(path: Path, first: int = 0, frames: int = FRAMES) -> VideoClip:
    return VideoClip(path, 0, path.stat().st_size, first, frames, 48, 64)


def transcoded(clip: VideoClip, path: Path, height: int = 48, width: int = 64, **options):
    sink = io.BytesIO()
    encoder = Encoder(H264, height, width, 30, sink)
    kept = list(transcode(clip, encoder, **options))
    done = encoder.finish()
    write_mp4(path, done.sample_entry, width, height, 30, [done.run(sink.getvalue())])
    return kept, pictures(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_transcoded_clip_keeps_frames_and_order(clips, tmp_path, kind):
    kept, shown = transcoded(clip_of(clips[kind], 3, 17), tmp_path / "out.mp4", keep=(0, 16))
    source = pictures(clips[kind])[3:20].astype(int)
    distance = np.abs(shown[:, None].astype(int) - source[None]).mean(axis=(2, 3, 4))
    assert distance.argmin(axis=1).tolist() == list(range(17))
    assert [number for number, _ in kept] == [0, 16]
    assert np.array_equal(kept[0][1], source[0])
    assert np.array_equal(kept[1][1], source[16])


def test_every_kth_frame_is_taken(clips, tmp_path):
    _, shown = transcoded(clip_of(clips["x264 B-frames"]), tmp_path / "out.mp4", stride=4)
    source = pictures(clips["x264 B-frames"])[::4].astype(int)
    assert len(shown) == 6
    distance = np.abs(shown[:, None].astype(int) - source[None]).mean(axis=(2, 3, 4))
    assert distance.argmin(axis=1).tolist() == list(range(6))


def test_a_transcoded_clip_has_the_encoder_s_size_and_the_same_bytes_again(clips, tmp_path):
    for name in ("a.mp4", "b.mp4"):
        kept, shown = transcoded(clip_of(clips["AV1 long"]), tmp_path / name, 24, 32, keep=range(FRAMES))
        assert shown.shape == (FRAMES, 24, 32, 3)
        assert np.abs(np.stack([p for _, p in kept]).astype(int) - shown).mean() < 8
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_clip_shorter_than_its_rows_is_refused(clips):
    clip = dataclasses.replace(clip_of(clips["ours h264"]), frames=FRAMES + 1)
    with pytest.raises(DataError, match=r"h264\.mp4: frames 0 to 24 are needed, the video has 23"):
        list(transcode(clip, Encoder(H264, 48, 64, 30, io.BytesIO())))


# -- the cache ---------------------------------------------------------------------------------------------------


def test_the_reader_used_longest_ago_is_closed_first(clips):
    cache = ReaderCache(max_open=2)
    first = cache.get(clips["ours h264"])
    second = cache.get(clips["ours av1"])
    assert cache.get(clips["ours h264"]) is first
    cache.get(clips["MPEG-4"])
    assert len(cache) == 2
    assert cache.get(clips["ours h264"]) is first
    assert cache.get(clips["ours av1"]) is not second
    assert (cache.hits, cache.misses) == (2, 4)
    with pytest.raises(OSError):
        second.read([0])  # closed: a stale reference fails rather than hold the file
    cache.clear()
    assert len(cache) == 0


def test_a_cache_travels_to_a_worker_empty(clips):
    cache = ReaderCache(max_open=3)
    cache.get(clips["ours h264"])
    copy = pickle.loads(pickle.dumps(cache))
    assert (len(copy), copy.max_open) == (0, 3)


def test_a_forked_process_opens_its_own_readers(clips):
    cache = ReaderCache()
    mine = cache.get(clips["ours h264"])
    child = os.fork()
    if child == 0:
        fresh = cache.get(clips["ours h264"])
        os._exit(0 if fresh is not mine and fresh.read([3]).shape == (1, 48, 64, 3) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(cache.get(clips["ours h264"]).read([3])[0], pictures(clips["ours h264"])[3])


def test_the_stored_pixel_format_is_named(clips, tmp_path):
    assert decode.pixel_format(clips["x265 closed"]) == "yuv420p"


def test_a_probe_leaves_nothing_behind_even_when_it_dies_half_way(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen: list[list[Path]] = []
    opened = decode._open

    def look(path: Path, name: str, *rest: object) -> object:
        seen.append(list(tmp_path.iterdir()))  # what would stay if a library took the process down here
        return opened(path, name, *rest)

    monkeypatch.setattr(decode, "_open", look)
    assert decode.backend_problem.__wrapped__("pyav") is None
    assert seen == [[], []] and not list(tmp_path.iterdir())
