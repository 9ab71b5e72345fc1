"""EgoDex: every quirk of the format has a test that fails if it is got wrong."""

import shutil
import tempfile
import zipfile
from fractions import Fraction
from pathlib import Path

import av
import h5py
import numpy as np
import pytest
from dpipe.converters import egodex, load_converter
from dpipe.converters.egodex import JOINTS, Options
from dpipe.pipeline.payload import VideoOptions
from dpipe.schemas.episode import Dropped, Episode, EpisodeRef, VideoClip
from dpipe.schemas.errors import DataError, UsageError
from dpipe.schemas.features import check_columns
from raw_egodex import attributes, joint_names, poses, write_episode, write_video, zip_part
from trees import run_convert, tree_digest


def scan_all(raw: Path, **options) -> list[EpisodeRef | Dropped]:
    chosen = Options(**options)
    return [entry for r in egodex.find(raw, chosen) for entry in egodex.scan(r, chosen)]


def episode(raw: Path, **options) -> Episode:
    (ref,) = scan_all(raw, **options)
    assert isinstance(ref, EpisodeRef), ref
    return egodex.read(ref, Options(**options))


def only_drop(raw: Path, **options) -> Dropped:
    (entry,) = scan_all(raw, **options)
    assert isinstance(entry, Dropped), entry
    return entry


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write_episode(tmp_path / "raw" / "part2" / "basic_pick_place" / "0")
    return tmp_path / "raw"


def column_names(options: Options = Options()) -> tuple[str, ...]:  # noqa: B008 - a frozen value
    return egodex.embodiment(options, "").features[0].names


def test_there_are_68_joints_spelt_as_in_the_files():
    assert len(JOINTS) == 68 and list(JOINTS) == sorted(joint_names())
    assert {"leftThumbTip", "rightLittleFingerMetacarpal", "leftHand"} <= set(JOINTS)


def test_numbers_are_sorted_as_numbers_and_train_comes_before_test(tmp_path: Path):
    for name in ("part2/a/0", "part2/a/2", "part2/a/10", "test/a/0", "part10/a/0"):
        write_episode(tmp_path / name)
    found = [(r.name, r.split) for r in egodex.find(tmp_path, Options())]
    assert found == [
        ("part2/a/0", "train"),
        ("part2/a/2", "train"),
        ("part2/a/10", "train"),
        ("part10/a/0", "train"),
        ("test/a/0", "test"),
    ]


def test_one_task_in_two_parts_keeps_its_episodes_apart(tmp_path: Path):
    write_episode(tmp_path / "part1" / "stack" / "0")
    write_episode(tmp_path / "part4" / "stack" / "0")
    assert [entry.source_id for entry in scan_all(tmp_path)] == ["part1/stack/0", "part4/stack/0"]


def test_the_default_state_is_wrists_fingertips_and_camera_in_the_world_left_hand_first(raw: Path):
    columns, names = episode(raw).columns, column_names()
    state, source = columns["observation.state"], poses(6)
    assert len(names) == 57 == state.shape[1]
    assert names[:9] == (
        "left_wrist_x",
        "left_wrist_y",
        "left_wrist_z",
        *(f"left_wrist_rot6d_{i}" for i in range(6)),
    )
    tips = [name[:-2] for name in names if name.endswith("tip_x")]
    fingers = ["thumb_tip", "index_tip", "middle_tip", "ring_tip", "little_tip"]
    assert tips == [f"{side}_{finger}" for side in ("left", "right") for finger in fingers]
    wrist = source["leftHand"]
    assert np.allclose(state[:, :3], wrist[:, :3, 3])
    # rot6d is the first column, then the second: c0x c0y c0z c1x c1y c1z.
    assert np.allclose(state[:, 3:9], np.concatenate([wrist[:, :3, 0], wrist[:, :3, 1]], axis=1))
    at = names.index("right_little_tip_x")
    assert np.allclose(state[:, at : at + 3], source["rightLittleFingerTip"][:, :3, 3])
    at = names.index("camera_x")
    assert at == 48 and np.allclose(state[:, at : at + 3], source["camera"][:, :3, 3])


def test_the_action_is_the_next_state_and_the_last_is_repeated_not_wrapped(raw: Path):
    columns = episode(raw).columns
    assert np.array_equal(columns["action"][:-1], columns["observation.state"][1:])
    assert np.array_equal(columns["action"][-1], columns["observation.state"][-1])
    assert egodex.embodiment(Options(), "").conventions["last_action"] == "repeats the last state"


def test_the_last_frame_can_be_left_out_of_columns_and_video(raw: Path):
    short = episode(raw, last="drop")
    assert short.frames == 5 == len(short.cameras["ego"])
    full = episode(raw).columns["observation.state"]
    assert np.array_equal(short.columns["action"], full[1:])
    assert all(len(column) == 5 for column in short.columns.values())


def test_hrdt48_is_the_default_without_the_camera(raw: Path):
    assert column_names(Options(layout="hrdt48")) == column_names()[:48]
    assert np.array_equal(
        episode(raw, layout="hrdt48").columns["observation.state"],
        episode(raw).columns["observation.state"][:, :48],
    )


def test_dial18_is_right_hand_first_with_turned_axes(raw: Path):
    state, source = episode(raw, layout="dial18").columns["observation.state"], poses(6)
    right, left = source["rightHand"][:, :3], source["leftHand"][:, :3]

    def turned(vector):  # p' = (x, -z, y)
        return np.stack([vector[:, 0], -vector[:, 2], vector[:, 1]], axis=1)

    expected = [turned(right[:, :, 3]), -turned(right[:, :, 0]), -turned(right[:, :, 1])]
    expected += [turned(left[:, :, 3]), turned(left[:, :, 0]), -turned(left[:, :, 1])]
    assert np.allclose(state, np.concatenate(expected, axis=1), atol=1e-6)
    with pytest.raises(UsageError, match="world frame"):
        list(egodex.find(raw, Options(layout="dial18", frame="camera")))


def test_full_holds_69_poses_in_sorted_order(raw: Path):
    names = column_names(Options(layout="full"))
    assert len(names) == 621 and names[0] == "camera_x" and names[9] == "hip_x" and names[-9] == "spine7_x"
    state = episode(raw, layout="full").columns["observation.state"]
    for at, joint in enumerate(["camera", *sorted(joint_names())]):
        assert np.allclose(state[:, 9 * at : 9 * at + 3], poses(6)[joint][:, :3, 3])


def test_camera_frame_is_each_frames_own_camera_with_opencv_axes(raw: Path):
    state, source = episode(raw, frame="camera").columns["observation.state"], poses(6)
    for t in range(6):
        inside = np.linalg.inv(source["camera"][t].astype(float)) @ source["leftHand"][t]
        assert np.allclose(state[t, :3], inside[:3, 3], atol=1e-5)
        assert np.allclose(state[t, 3:6], inside[:3, 0], atol=1e-5)
        # The camera itself is kept relative to the first frame's: in its own frame it never moves.
        camera = np.linalg.inv(source["camera"][0].astype(float)) @ source["camera"][t]
        assert np.allclose(state[t, 48:51], camera[:3, 3], atol=1e-5)


def test_first_camera_frame_stands_still(raw: Path):
    state, source = episode(raw, frame="first-camera").columns["observation.state"], poses(6)
    first = np.linalg.inv(source["camera"][0].astype(float))
    for t in range(6):
        assert np.allclose(state[t, :3], (first @ source["leftHand"][t])[:3, 3], atol=1e-5)
    assert np.allclose(state[0, 48:57], [0, 0, 0, 1, 0, 0, 0, 1, 0], atol=1e-5)


@pytest.mark.parametrize("frame", ["world", "camera", "first-camera"])
def test_the_world_pose_of_the_camera_is_kept_whatever_the_frame(raw: Path, frame: str):
    pose = episode(raw, frame=frame).columns["camera_pose"]
    assert np.allclose(pose[:, :3], poses(6)["camera"][:, :3, 3])


def test_confidences_are_kept_for_all_joints(raw: Path):
    columns = episode(raw).columns
    assert columns["confidence_valid"].all()
    assert columns["confidence"][3, 10] == np.float32((10 + 0.03) / 100)


def test_missing_confidences_are_masked_not_invented(tmp_path: Path):
    write_episode(tmp_path / "test" / "a" / "0", confidence=False)
    (ref,) = scan_all(tmp_path)
    assert isinstance(ref, EpisodeRef) and ref.metadata["has_confidence"] is False
    columns = egodex.read(ref, Options()).columns
    assert not columns["confidence_valid"].any() and not columns["confidence"].any()


def test_a_single_missing_confidence_is_masked_alone(raw: Path):
    with h5py.File(raw / "part2/basic_pick_place/0.hdf5", "r+") as file:
        del file["confidences/leftHand"]
    valid = episode(raw).columns["confidence_valid"]
    assert (~valid[0]).sum() == 1 and not valid[0, JOINTS.index("leftHand")]


def says(change: dict, missing: tuple[str, ...] = (), folder: str = "open_the_drawer") -> tuple[str, str]:
    values = attributes("x") | change
    return egodex.instruction({k: v for k, v in values.items() if k not in missing}, folder)


def test_instruction_rule_and_its_fallbacks():
    reversible = {"llm_type": "reversible", "llm_description": "open it", "llm_description2": "close it"}
    assert says(reversible | {"which_llm_description": "1"}) == ("open it", "llm_description")
    assert says(reversible | {"which_llm_description": "2"}) == ("close it", "llm_description2")
    # Of any other type the second description does not count, whatever `which` says.
    assert says({"which_llm_description": "2"})[1] == "llm_description"
    # 'None' is a word in the file, and means missing.
    assert says(reversible | {"which_llm_description": "2", "llm_description2": "None"})[0] == "open it"
    assert says({"llm_description": ""})[0] == "Pick up the stapler."
    llm = ("llm_type", "llm_description", "llm_description2", "which_llm_description")
    assert says({}, llm) == ("Pick up the stapler.", "description")
    assert says({}, (*llm, "description")) == ("open the drawer", "folder name")
    as_bytes = {k: v.encode() if isinstance(v, str) else v for k, v in (attributes("x") | reversible).items()}
    assert egodex.instruction(as_bytes | {"which_llm_description": b"2"}, "x")[0] == "close it"


def test_attributes_are_found_in_a_file_also_as_bytes(tmp_path: Path):
    attrs = {k: v.encode() if isinstance(v, str) else v for k, v in attributes("a").items()}
    write_episode(tmp_path / "test" / "a" / "0", attrs=attrs)
    (ref,) = scan_all(tmp_path)
    assert isinstance(ref, EpisodeRef)
    assert ref.instruction == "Pick up the stapler and place it on the box lid."
    assert ref.metadata["session_name"] == "2025-03-27_16-14-11.mov" and not ref.warnings


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_video_with_one_frame_more_or_less_is_left_out(tmp_path: Path, extra: int):
    write_episode(tmp_path / "part1" / "a" / "0", frames=6, video_frames=6 + extra)
    assert f"the video has {6 + extra} frames, the poses 6" in only_drop(tmp_path).reason


def test_a_video_of_another_rate_is_left_out(tmp_path: Path):
    write_episode(tmp_path / "part1" / "a" / "0", fps=25)
    assert "25 frames a second" in only_drop(tmp_path).reason


def test_the_video_is_taken_as_it_lies_at_its_own_size(raw: Path):
    clip = episode(raw).cameras["ego"]
    path = raw / "part2/basic_pick_place/0.mp4"
    assert clip == VideoClip(path, 0, path.stat().st_size, 0, 6, 48, 64)
    (ref,) = scan_all(raw)
    assert [(c.key, c.height, c.width) for c in ref.cameras] == [("ego", 48, 64)]


def test_halves_of_pairs_are_reported(tmp_path: Path):
    write_episode(tmp_path / "part1" / "a" / "0")
    (tmp_path / "part1/a/0.mp4").unlink()
    write_video(tmp_path / "part1" / "a" / "1.mp4", 3)
    reasons = [entry.reason for entry in scan_all(tmp_path) if isinstance(entry, Dropped)]
    assert reasons == ["0.mp4 is missing beside 0.hdf5", "1.hdf5 is missing beside 1.mp4"]


def test_foreign_files_and_datasets_are_ignored(raw: Path):
    """Other tools write their results into the tree: actions into the hdf5, embeddings beside it."""
    with h5py.File(raw / "part2/basic_pick_place/0.hdf5", "r+") as file:
        file.create_dataset("actions_48d", data=np.zeros((6, 48), np.float32), compression="gzip")
    (raw / "part2/basic_pick_place/0.pt").write_bytes(b"x")
    for name in ("._0.hdf5", "._0.mp4", ".DS_Store"):  # macOS leaves these on foreign disks
        (raw / "part2/basic_pick_place" / name).write_bytes(b"x")
    assert episode(raw).frames == 6


def test_parts_are_training_data_and_test_and_extra_stay_apart():
    parts = ("part1", "part5", "test", "extra")
    assert [egodex.split_of(part) for part in parts] == ["train", "train", "test", "extra"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.pop("leftHand"), "lack leftHand"),
        (lambda p: p.__setitem__("hip", p["hip"][:-1]), "transforms/hip has 5 frames, transforms/camera 6"),
        (
            lambda p: p["leftHand"].__setitem__((3, 0, 0), np.nan),
            "leftHand is not finite in 1 frames, first at frame 3",
        ),
        (lambda p: p["rightHand"][:, :3, :3].__imul__(1.2), "transforms/rightHand is no rotation"),
        (lambda p: p["rightHand"][:, :3, 2].__imul__(-1), "transforms/rightHand is no rotation"),
        (
            lambda p: p["camera"].__setitem__((2, 3, 0), 0.5),
            "transforms/camera does not end in the row 0 0 0 1",
        ),
    ],
)
def test_poses_that_are_none_are_left_out(tmp_path: Path, change, words):
    transforms = poses(6)
    change(transforms)
    write_episode(tmp_path / "part1" / "a" / "0", transforms=transforms)
    assert words in only_drop(tmp_path).reason


def test_a_missing_joint_the_layout_does_not_use_is_only_a_note(tmp_path: Path):
    transforms = poses(6)
    del transforms["hip"]
    write_episode(tmp_path / "part1" / "a" / "0", transforms=transforms)
    (ref,) = scan_all(tmp_path)
    assert isinstance(ref, EpisodeRef) and "transforms lack hip" in ref.warnings[0]
    assert "lack hip" in only_drop(tmp_path, layout="full").reason


def test_a_joint_that_was_not_tracked_matters_only_to_a_layout_that_has_it(tmp_path: Path):
    transforms = poses(6)
    transforms["spine3"][2] = np.nan
    transforms["leftLittleFingerMetacarpal"][:] = 0
    write_episode(tmp_path / "part1" / "a" / "0", transforms=transforms)
    (ref,) = scan_all(tmp_path)
    assert isinstance(ref, EpisodeRef) and np.isfinite(egodex.read(ref, Options()).columns["action"]).all()
    assert [note.split()[0] for note in ref.warnings] == [
        "transforms/leftLittleFingerMetacarpal",
        "transforms/spine3",
    ]
    assert "spine3 is not finite" in only_drop(tmp_path, layout="full").reason


def test_a_task_beside_whole_parts_hides_none_of_them(tmp_path: Path):
    for folder in ("part1/a", "part10/a", "part2/a", "test/a", "loose"):
        write_episode(tmp_path / "egodex" / folder / "0", confidence=False)
    for raw in (tmp_path / "egodex", tmp_path):  # also where the parts lie in a folder of their own
        found = [r.name for r in egodex.find(raw, Options()) if "loose" not in r.name]
        assert found == ["part1/a/0", "part2/a/0", "part10/a/0", "test/a/0"]
    assert "egodex/loose/0" in [r.name for r in egodex.find(tmp_path / "egodex", Options())]
    write_episode(tmp_path / "again" / "part1" / "a" / "0", confidence=False)
    with pytest.raises(DataError, match="two episodes are called part1/a/0"):
        list(egodex.find(tmp_path, Options()))


@pytest.mark.parametrize("codec", ["hevc", "b-frames", "uneven"])
def test_videos_of_any_codec_are_counted_frame_for_frame(tmp_path: Path, codec: str):
    """Which codec the publisher took is in no source: nothing may depend on it."""
    stem = write_episode(tmp_path / "part1" / "a" / "0")
    with av.open(stem.with_suffix(".mp4"), "w") as container:
        options = {"x265-params": "log-level=none"} if codec == "hevc" else {"bf": "3", "g": "250"}
        stream = container.add_stream("libx265" if codec == "hevc" else "libx264", rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 600)
        for t, late in enumerate([0, 0, 0, 9 if codec == "uneven" else 0, 0, 0]):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 30 * t, np.uint8), format="rgb24")
            frame.pts, frame.time_base = 20 * t + late, stream.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (ref,) = scan_all(tmp_path)
    assert isinstance(ref, EpisodeRef) and ref.frames == 6
    assert any("rate varies" in note for note in ref.warnings) == (codec == "uneven")


def test_all_problems_of_one_episode_are_told_together(tmp_path: Path):
    transforms = poses(6)
    del transforms["rightHand"]
    transforms["hip"] = transforms["hip"][:-1]
    write_episode(tmp_path / "part1" / "a" / "0", transforms=transforms, video_frames=4)
    reason = only_drop(tmp_path).reason
    assert "rightHand" in reason and "hip" in reason and "the video has 4 frames" in reason


def test_a_torn_file_and_one_of_another_format_are_left_out(raw: Path):
    path = raw / "part2/basic_pick_place/0.hdf5"
    path.write_bytes(path.read_bytes()[:1000])
    assert "not a readable HDF5 file" in only_drop(raw).reason
    with h5py.File(path, "w") as file:
        file.create_group("data")
    assert "no group 'transforms'; found: 'data'" in only_drop(raw).reason


def test_two_frames_are_enough_and_one_is_not_when_the_last_is_dropped(tmp_path: Path):
    write_episode(tmp_path / "part1" / "a" / "0", frames=1)
    assert episode(tmp_path).frames == 1
    assert "leave none with a next state" in only_drop(tmp_path, last="drop").reason


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_gives_what_its_folder_gives(raw: Path, tmp_path: Path, method: int):
    write_episode(raw / "part2" / "basic_pick_place" / "10")
    write_episode(raw / "part2" / "basic_pick_place" / "2")
    folder = [egodex.read(ref, Options()) for ref in scan_all(raw) if isinstance(ref, EpisodeRef)]
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    zip_part(raw / "part2", method).rename(zipped / "part2.zip")
    refs = scan_all(zipped)
    assert [ref.source_id for ref in refs] == [f"part2/basic_pick_place/{i}" for i in (0, 2, 10)]
    for ref, expected in zip(refs, folder, strict=True):
        assert isinstance(ref, EpisodeRef)
        found = egodex.read(ref, Options())
        for name, column in expected.columns.items():
            assert np.array_equal(found.columns[name], column)
        clip, original = found.cameras["ego"], expected.cameras["ego"]
        assert isinstance(clip, VideoClip) and isinstance(original, VideoClip)
        data = clip.path.read_bytes()[clip.offset : clip.offset + clip.size]
        assert data == original.path.read_bytes()


@pytest.mark.parametrize("video", ["copy", "transcode"])
def test_a_zip_that_deflates_its_videos_converts_to_the_same_bytes(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, video: str
):
    write_episode(raw / "part2" / "basic_pick_place" / "2")
    roots, spare = [], tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        zipped = tmp_path / f"raw{method}"
        zipped.mkdir()
        zip_part(raw / "part2", method).rename(zipped / "part2.zip")
        options = VideoOptions(video=video)
        roots.append(
            run_convert(zipped, tmp_path / f"out{method}", "egodex", name="same", video=options).root
        )
        assert not list(spare.iterdir())
    stored, deflated = (tree_digest(root, without=("dpipe/journal", "dpipe/manifest")) for root in roots)
    assert stored == deflated and any(name.endswith(".mp4") for name in stored)


def test_a_deflated_video_that_is_damaged_or_lies_about_its_size_is_left_out_by_name(raw: Path):
    path = zip_part(raw / "part2", zipfile.ZIP_DEFLATED)
    shutil.rmtree(raw / "part2")
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        member = next(info for info in archive.infolist() if info.filename.endswith(".mp4"))
    damaged = bytearray(whole)
    damaged[member.header_offset + 200] ^= 0xFF
    path.write_bytes(damaged)
    assert "0.mp4" in only_drop(raw).reason
    entry = whole.rindex(member.filename.encode()) - 46  # where the directory speaks of it
    lying = bytearray(whole)
    lying[entry + 24 : entry + 28] = (member.file_size - 1).to_bytes(4, "little")
    path.write_bytes(lying)
    assert "inflates to other bytes" in only_drop(raw).reason


@pytest.mark.parametrize("place", ["", "part2", "part2/basic_pick_place"])
def test_raw_may_be_all_parts_one_part_or_one_task(raw: Path, place: str):
    (ref,) = scan_all(raw / place)
    assert ref.source_id == "part2/basic_pick_place/0"


@pytest.mark.parametrize("layout", ["hands", "hrdt48", "dial18", "full"])
@pytest.mark.parametrize("last", ["repeat", "drop"])
def test_columns_match_their_declaration(raw: Path, layout: str, last: str):
    options = Options(layout=layout, last=last)
    found, body = episode(raw, layout=layout, last=last), egodex.embodiment(options, "")
    assert check_columns((*body.features, *body.sidecar), dict(found.columns), found.frames) == []
    assert body.features[0].names == body.features[1].names
    assert body.licence == "cc-by-nc-nd" and body.fps == 30


def test_a_file_that_changed_after_the_scan_is_refused(raw: Path):
    (ref,) = scan_all(raw)
    assert isinstance(ref, EpisodeRef)
    write_episode(raw / "part2" / "basic_pick_place" / "0", frames=9)
    with pytest.raises(DataError, match="changed"):
        egodex.read(ref, Options())


def test_the_converter_is_listed(tmp_path: Path):
    assert load_converter("egodex").name == "egodex"
    assert list(egodex.find(tmp_path, Options())) == []
