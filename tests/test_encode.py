"""Frames to samples: the quality promised, the same bytes every time, and tables lerobot probes as its own."""

import io
import os
from pathlib import Path

import av
import h5py
import numpy as np
import pytest
from dpipe.schemas.errors import DataError, UsageError
from dpipe.video import encode
from dpipe.video.encode import AV1, H264, Codec, EncodedClip, Encoder
from dpipe.video.mp4 import entry_box, read_table, write_mp4
from hypothesis import given
from hypothesis import strategies as st

CODECS = pytest.mark.parametrize("codec", [H264, AV1], ids=["h264", "av1"])


def moving(frames: int, height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray:
    """[n, H, W, 3]: a coloured texture that moves two pixels a frame."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    texture = blocks.repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(texture, 2 * t, axis=1) for t in range(frames)])


def encoded(codec: Codec, frames: np.ndarray, fps: int = 20, block: int = 1000) -> tuple[EncodedClip, bytes]:
    sink = io.BytesIO()
    encoder = Encoder(codec, *frames.shape[1:3], fps, sink)
    for start in range(0, len(frames), block):
        encoder.write(frames[start : start + block])
    return encoder.finish(), sink.getvalue()


def save(path: Path, clips: list[tuple[EncodedClip, bytes]], fps: int = 20) -> Path:
    first = clips[0][0]
    runs = [clip.run(data) for clip, data in clips]
    write_mp4(path, first.sample_entry, first.width, first.height, fps, runs)
    return path


def pictures(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n] dB of each frame, over RGB."""
    error = ((a.astype(np.float64) - b) ** 2).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / error)


@pytest.fixture(scope="module")
def recordings(sample_data: Path) -> list[np.ndarray]:
    """Both cameras of two LIBERO demonstrations, upright."""
    episodes = []
    for path in sorted((sample_data / "libero").rglob("*.hdf5")):
        with h5py.File(path) as file:
            demo = file["data"][sorted(file["data"])[0]]["obs"]
            episodes += [demo[name][:][:, ::-1] for name in ("agentview_rgb", "eye_in_hand_rgb")]
    return episodes


def test_libero_keeps_the_quality_promised(recordings, tmp_path):
    loss = {}
    for codec in (H264, AV1):
        shown = [pictures(save(tmp_path / "clip.mp4", [encoded(codec, frames)])) for frames in recordings]
        assert [len(frames) for frames in shown] == [len(frames) for frames in recordings]
        loss[codec.name] = np.concatenate([psnr(a, b) for a, b in zip(shown, recordings, strict=True)])
    assert loss["av1"].min() >= 31
    assert loss["av1"].mean() >= 35
    assert loss["h264"].mean() >= loss["av1"].mean() + 1
    assert loss["h264"].min() >= loss["av1"].min() + 1


@CODECS
def test_the_same_frames_give_the_same_bytes_whatever_the_blocks(codec):
    frames = moving(13)
    whole, data = encoded(codec, frames)
    for block in (1, 4):
        again, same = encoded(codec, frames, block=block)
        assert same == data
        assert again.sample_entry == whole.sample_entry
        assert again.sizes.tolist() == whole.sizes.tolist()


@CODECS
def test_views_that_are_not_contiguous_are_encoded_as_they_look(codec):
    frames = moving(6)
    assert encoded(codec, frames[:, ::-1])[1] == encoded(codec, np.ascontiguousarray(frames[:, ::-1]))[1]


@CODECS
def test_every_second_sample_is_a_key_frame(codec):
    clip, data = encoded(codec, moving(7))
    assert clip.sync.tolist() == [True, False, True, False, True, False, True]
    assert clip.sizes.sum() == len(data)


@CODECS
def test_episodes_encoded_alike_share_a_file_and_start_afresh(codec, tmp_path):
    """The second run decodes to the same pictures alone and behind another: its first sample needs no other."""
    one, two = encoded(codec, moving(9, seed=1)), encoded(codec, moving(8, seed=2))
    assert one[0].sample_entry == two[0].sample_entry
    joined = pictures(save(tmp_path / "joined.mp4", [one, two]))
    alone = pictures(save(tmp_path / "alone.mp4", [two]))
    assert np.array_equal(joined[9:], alone)
    table = read_table(tmp_path / "joined.mp4")
    assert table.sync[9]
    assert not table.has_open_gops


@CODECS
def test_colours_come_back(codec, tmp_path):
    """Flat patches, so that neither chroma subsampling nor the quantiser explains a difference."""
    colours = np.array(
        [[200, 30, 30], [30, 200, 30], [30, 30, 200], [255, 255, 255], [0, 0, 0], [128, 90, 60]]
    )
    frames = np.broadcast_to(colours[:, None, None, :], (6, 64, 64, 3)).astype(np.uint8)
    shown = pictures(save(tmp_path / "clip.mp4", [encoded(codec, frames)]))
    assert np.abs(shown.astype(int) - frames).max() <= 4


@CODECS
def test_lerobot_probes_what_info_says(codec, tmp_path):
    pytest.importorskip("lerobot.datasets.video_utils")
    from lerobot.configs.video import VideoEncoderConfig
    from lerobot.datasets.video_utils import get_video_info

    path = save(tmp_path / "clip.mp4", [encoded(codec, moving(5))])
    info = codec.info(64, 96, 20)
    config = VideoEncoderConfig.from_video_info(info)  # what `resume` would encode with
    assert get_video_info(path, config) == info
    assert list(get_video_info(path, config)) == list(info)


def test_av1_is_lerobots_own_setting():
    pytest.importorskip("lerobot.configs.video")
    from lerobot.configs.video import VideoEncoderConfig

    theirs = VideoEncoderConfig().get_codec_options(encoder_threads=1, as_strings=True)
    assert {key: AV1.options()[key] for key in theirs} == theirs
    assert AV1.pix_fmt == VideoEncoderConfig().pix_fmt


@CODECS
@pytest.mark.parametrize(("height", "width"), [(84, 84), (64, 66), (128, 130)])
def test_any_even_size_is_encoded(codec, height, width, tmp_path):
    frames = np.full((3, height, width, 3), 90, np.uint8)
    shown = pictures(save(tmp_path / "clip.mp4", [encoded(codec, frames)]))
    assert shown.shape == frames.shape
    assert np.abs(shown.astype(int) - 90).max() <= 2


@pytest.mark.parametrize(
    ("height", "width", "remedy"), [(85, 84, "--resize 84x84"), (64, 97, "--resize 96x64")]
)
def test_odd_sides_are_refused_with_the_size_to_use(height, width, remedy):
    with pytest.raises(DataError, match=f"{width}x{height} pixels.*{remedy}"):
        Encoder(H264, height, width, 20, io.BytesIO())


def test_frames_of_another_kind_are_refused():
    encoder = Encoder(H264, 64, 96, 20, io.BytesIO())
    for frames in (moving(2).astype(np.float32), moving(2)[0], moving(2)[..., :1]):
        with pytest.raises(ValueError, match="expected uint8"):
            encoder.write(frames)


def test_frames_of_another_size_are_averaged_down(tmp_path):
    """Each 2x2 block of one colour becomes one pixel of it."""
    small = moving(5, 32, 48)[..., :1].repeat(3, axis=-1)  # grey: chroma is halved, and not in question here
    sink = io.BytesIO()
    encoder = Encoder(H264, 32, 48, 20, sink)
    encoder.write(small.repeat(2, 1).repeat(2, 2))
    shown = pictures(save(tmp_path / "clip.mp4", [(encoder.finish(), sink.getvalue())]))
    alike = pictures(save(tmp_path / "alike.mp4", [encoded(H264, small)]))
    assert np.abs(shown.astype(int) - alike).mean() < 1


def test_an_episode_without_frames_is_refused():
    with pytest.raises(ValueError, match="no frame"):
        Encoder(H264, 64, 96, 20, io.BytesIO()).finish()


def test_an_unknown_codec_gets_the_nearest_name():
    assert encode.codec_named("av1") is AV1
    with pytest.raises(UsageError, match="Did you mean 'h264'"):
        encode.codec_named("h265")


def test_memory_does_not_grow_with_the_episode():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    class Nowhere(io.RawIOBase):
        def write(self, data) -> int:
            return len(data)

    frames = moving(50, 128, 128)
    encoder = Encoder(H264, 128, 128, 20, Nowhere())  # pyright: ignore[reportArgumentType]
    for _ in range(4):
        encoder.write(frames)
    before = resident()
    for _ in range(40):
        encoder.write(frames)
    assert resident() - before < 8 << 20
    assert len(encoder.finish()) == 2200


# -- bitstreams --------------------------------------------------------------------------------------------------

# A NAL unit never holds 00 00 01 nor ends in 00 (emulation prevention), so neither do these.
units = st.lists(
    st.binary(min_size=1, max_size=20).filter(
        lambda unit: b"\0\0" not in unit and unit[-1] and unit[0] & 31 != 9
    ),
    min_size=1,
    max_size=5,
)


@given(units=units, long_codes=st.lists(st.booleans(), min_size=5, max_size=5))
def test_start_codes_become_lengths(units, long_codes):
    codes = [b"\0\0\0\1" if long else b"\0\0\1" for long in long_codes]
    stream = b"".join(code + unit for code, unit in zip(codes, units, strict=False))
    sample, found = encode.annex_b_to_sample(stream), []
    while sample:
        size = int.from_bytes(sample[:4])
        found.append(sample[4 : 4 + size])
        sample = sample[4 + size :]
    assert found == units


def leb128(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


@given(obus=st.lists(st.tuples(st.integers(1, 15), st.binary(max_size=300), st.booleans()), max_size=5))
def test_temporal_delimiters_and_padding_are_dropped(obus):
    """Type, payload, extension byte: everything but delimiters, tile lists and padding stays as it is."""
    whole = [
        bytes([kind << 3 | 4 * extended | 2]) + b"\x20" * extended + leb128(len(payload)) + payload
        for kind, payload, extended in obus
    ]
    kept = [data for data, (kind, _, _) in zip(whole, obus, strict=True) if kind not in (2, 8, 15)]
    assert encode.temporal_unit_to_sample(b"".join(whole)) == b"".join(kept)
    assert [payload for _, _, payload in encode.split_obus(b"".join(whole))] == [
        payload for _, payload, _ in obus
    ]


@pytest.mark.parametrize(("codec", "name"), [(H264, b"avcC"), (AV1, b"av1C")])
def test_the_configuration_box_is_the_one_ffmpeg_writes(codec, name, tmp_path):
    frames = moving(4)
    with av.open(str(tmp_path / "theirs.mp4"), "w") as container:
        stream = container.add_stream(codec.encoder, 20, options=codec.options())
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    theirs = read_table(tmp_path / "theirs.mp4")
    clip, data = encoded(codec, frames)
    assert entry_box(clip.sample_entry, name) == entry_box(theirs.sample_entry, name)
    whole = (tmp_path / "theirs.mp4").read_bytes()
    assert data == b"".join(whole[o : o + s] for o, s in zip(theirs.offsets, theirs.sizes, strict=True))


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="this system has no scheduling policies")
def test_encoding_av1_leaves_the_process_scheduled_as_it_was():
    """SVT-AV1 makes a process of root's real-time, at the highest priority, and says nothing."""
    before = os.sched_getscheduler(0)
    encoded(AV1, moving(2))
    tasks = [int(task.name) for task in Path("/proc/self/task").iterdir()]
    assert {os.sched_getscheduler(task) for task in tasks} == {before}
