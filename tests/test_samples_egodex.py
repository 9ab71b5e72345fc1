"""Raw EgoDex folders made from the tabletop are faithful to the format, traps included."""

import av
import h5py
import numpy as np
import pytest
from dpipe.samples import egodex, write_sample
from dpipe.samples.motion import record, resample
from dpipe.schemas.rotations import is_rotation


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("egodex")
    write_sample("egodex", folder, episodes=2, seed=0, enlarged=1)
    return folder


def shortened(count):
    return lambda motion, fps: resample(motion, fps).first(count)


def instruction_of(attributes) -> str:
    """Apple's rule with its fallbacks, written out on its own."""
    text = {key: value.decode() if isinstance(value, bytes) else value for key, value in attributes.items()}
    if text.get("llm_type") == "reversible" and text.get("which_llm_description") != "1":
        return text["llm_description2"]
    return text.get("llm_description", text["description"])


def test_complete_file_has_138_datasets_of_float32(raw):
    with h5py.File(raw / "part2/basic_pick_place/0.hdf5") as file:
        datasets = {}
        file.visititems(
            lambda name, item: datasets.__setitem__(name, item) if isinstance(item, h5py.Dataset) else None
        )
        assert len(datasets) == 138
        frames = len(file["transforms/camera"])
        for name, dataset in datasets.items():
            assert dataset.dtype == np.float32, name
            group = name.split("/")[0]
            shape = {"camera": (3, 3), "transforms": (frames, 4, 4), "confidences": (frames,)}[group]
            assert dataset.shape == shape
        assert "camera" not in file["confidences"]
        np.testing.assert_allclose(
            file["camera/intrinsic"][:], [[736.6339, 0, 960], [0, 736.6339, 540], [0, 0, 1]], rtol=1e-6
        )


def test_joints_are_named_as_published():
    assert len(egodex.JOINTS) == len(set(egodex.JOINTS)) == 68
    for name in (
        "leftHand",
        "rightIndexFingerTip",
        "rightLittleFingerMetacarpal",
        "leftThumbKnuckle",
        "spine7",
    ):
        assert name in egodex.JOINTS
    assert "rightThumbMetacarpal" not in egodex.JOINTS
    ordered = sorted(["camera", *egodex.JOINTS])
    assert ordered[:4] == ["camera", "hip", "leftArm", "leftForearm"] and ordered[-1] == "spine7"


def test_transforms_are_rigid_and_bones_have_a_hands_sizes(raw):
    with h5py.File(raw / "part2/basic_pick_place/0.hdf5") as file:
        poses = {name: pose[:].astype(float) for name, pose in file["transforms"].items()}
    for name, pose in poses.items():
        assert is_rotation(pose[:, :3, :3]).all(), name
        np.testing.assert_array_equal(pose[:, 3], np.tile([0, 0, 0, 1], (len(pose), 1)))
    for side in ("left", "right"):
        for finger in egodex.FINGERS:
            chain = [poses[f"{side}{finger}Finger{bone}"][:, :3, 3] for bone in egodex.BONES]
            lengths = np.linalg.norm(np.diff(chain, axis=0), axis=-1)
            assert lengths.min() > 0.005 and lengths.max() < 0.09, (side, finger)


def test_world_is_y_up_and_the_camera_looks_forward_and_down(raw):
    with h5py.File(raw / "part2/basic_pick_place/0.hdf5") as file:
        camera = file["transforms/camera"][:].astype(float)
        wrist = file["transforms/rightHand"][:, :3, 3].astype(float)
        hip = file["transforms/hip"][:, :3, 3]
        height = file["transforms/neck4"][:, 1, 3] - hip[:, 1]
    down = camera[:, :3, 1]
    assert (down[:, 1] < -0.5).all()  # the camera's y axis points down
    assert (camera[:, 1, 2] < -0.3).all() and (
        camera[:, 2, 2] < -0.5
    ).all()  # z: down and away from the person
    assert (height > 0.4).all()
    assert wrist[:, 1].min() > 0.8 and wrist[:, 1].max() < 1.2
    assert (wrist[:, 2] < camera[:, 2, 3]).all()  # in front of the head
    assert np.ptp(camera[:, :3, 3], axis=0).max() < 0.05


def test_fingertips_and_hand_appear_in_the_picture_at_their_projection(raw):
    stem = raw / "part2/basic_pick_place/0"
    with h5py.File(stem.with_suffix(".hdf5")) as file:
        camera = file["transforms/camera"][:].astype(float)
        thumb = file["transforms/rightThumbTip"][:, :3, 3].astype(float)
        index = file["transforms/rightIndexFingerIntermediateTip"][:, :3, 3].astype(float)
        intrinsic = file["camera/intrinsic"][:]
    with av.open(str(stem.with_suffix(".mp4"))) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(pictures) == len(camera)  # one pose per frame
    seen = 0
    for k in range(0, len(pictures), 10):
        for point in (thumb[k], index[k]):
            local = camera[k, :3, :3].T @ (point - camera[k, :3, 3])
            column, row = (intrinsic @ (local / local[2]))[:2] / 4
            row, column = int(row), int(column)
            patch = pictures[k][max(0, row - 3) : row + 4, max(0, column - 3) : column + 4].astype(float)
            skin = (patch[..., 0] > 1.15 * patch[..., 2]) & (patch[..., 0] < 2.2 * patch[..., 2])
            seen += patch.size > 0 and skin.any()
    assert seen > len(pictures) // 10


def test_video_runs_at_30_fps_with_as_many_frames_as_poses(raw):
    for part in ("part2", "test"):
        stem = raw / part / "basic_pick_place/0"
        with av.open(str(stem.with_suffix(".mp4"))) as container:
            stream = container.streams.video[0]
            assert stream.average_rate == 30 and stream.codec_context.name == "h264"
            assert (stream.codec_context.width, stream.codec_context.height) == (480, 270)
            assert not container.streams.audio
            frames = sum(1 for _ in container.decode(video=0))
        with h5py.File(stem.with_suffix(".hdf5")) as file:
            assert len(file["transforms/camera"]) == frames


def test_published_size_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setattr(egodex, "resample", shortened(4))
    write_sample("egodex", tmp_path, episodes=1, seed=0)
    with av.open(str(tmp_path / "part2/basic_pick_place/0.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.width, context.height) == (1920, 1080)


def test_attributes_differ_in_form_and_always_yield_the_instruction():
    motion = record(1, image_size=8)
    forms = [egodex.attributes(motion, *kind) for kind in egodex.KINDS]
    assert all(instruction_of(form) == motion.instruction for form in forms)
    plain, first, second, as_bytes, old, unsure, _ = forms
    assert plain["llm_description2"] == "None"
    assert first["llm_description"] == second["llm_description2"] == motion.instruction
    assert first["llm_description2"] == second["llm_description"] != motion.instruction
    assert isinstance(as_bytes["llm_description"], bytes)
    assert not [key for key in old if key.startswith("llm_")]
    assert unsure["annotator_version"] == "0.1"
    assert isinstance(plain["which_llm_description"], str)


def test_a_seventh_of_the_files_lacks_confidences_and_the_rest_is_bimodal(raw, tmp_path, monkeypatch):
    assert [kind[3] for kind in egodex.KINDS].count(False) == 1
    with h5py.File(raw / "part2/basic_pick_place/0.hdf5") as file:
        right = file["confidences/rightHand"][:]
        left = file["confidences/leftHand"][:]
    for values in (left, right):
        lost = np.isclose(values, 0.0032)
        assert lost.any() and (values[~lost] >= 0.2).all() and values.max() <= 1
    assert np.isclose(left, 0.0032).mean() > np.isclose(right, 0.0032).mean()
    monkeypatch.setattr(egodex, "KINDS", (egodex.KINDS[5],))
    monkeypatch.setattr(egodex, "resample", shortened(3))
    write_sample("egodex", tmp_path, episodes=1, seed=0, enlarged=1)
    with h5py.File(tmp_path / "part2/basic_pick_place/0.hdf5") as file:
        assert "confidences" not in file and file["transforms/camera"].shape == (3, 4, 4)


def test_numbers_count_up_within_each_part(tmp_path, monkeypatch):
    monkeypatch.setattr(egodex, "resample", shortened(2))
    paths = write_sample("egodex", tmp_path, episodes=13, seed=0, enlarged=1, test_every=13)
    train = [path.stem for path in paths if "part2" in path.parts and path.suffix == ".hdf5"]
    assert train == [str(i) for i in range(12)]  # "10" and "11" sort before "2" as words
    assert [path.stem for path in paths if "test" in path.parts] == ["0", "0"]
