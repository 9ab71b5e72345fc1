"""Raw AgiBot folders made from the tabletop are faithful to the format, variants included."""

import json
import tarfile

import av
import h5py
import numpy as np
import pytest
from dpipe.samples import agibot, write_sample
from dpipe.samples.motion import record, resample
from dpipe.schemas.errors import UsageError
from PIL import Image

SPAN = (0.0, 120.0)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agibot")
    write_sample("agibot", folder, episodes=1, seed=0)
    return folder


@pytest.fixture(scope="module")
def episode():
    motion = record(0, image_size=8)
    return motion, resample(motion, 30)


def shortened(count):
    return lambda motion, fps: resample(motion, fps).first(count)


def arrays(episode, variant="base", lead=0, span=SPAN):
    recording = agibot.Recording(801, 648_642, variant, *episode)
    return agibot.proprio_arrays(recording, span, lead)


def test_files_lie_where_the_published_archives_put_them(raw):
    files = {str(path.relative_to(raw)) for path in raw.rglob("*") if path.is_file()}
    place = "801/648642"
    for camera in ("head", "hand_left", "hand_right"):
        assert f"observations/{place}/videos/{camera}_color.mp4" in files
        for kind in ("intrinsic_params", "extrinsic_params", "extrinsic_params_aligned"):
            assert f"parameters/{place}/parameters/camera/{camera}_{kind}.json" in files
    assert f"proprio_stats/{place}/proprio_stats.h5" in files
    assert "task_info/task_801.json" in files


def test_shapes_and_types_are_those_of_a_real_recording(sample_data, episode):
    """Against the real file at hand, which is of the split-effector kind."""
    ours = arrays(episode, "split-effector")
    frames = len(ours["timestamp"])
    with h5py.File(sample_data / "agibot/proprio_stats.h5") as file:
        real = {}
        file.visititems(
            lambda name, item: real.__setitem__(name, item[:]) if isinstance(item, h5py.Dataset) else None
        )
    count = len(real["timestamp"])
    for name, values in real.items():
        if name not in ours:
            continue
        if "wrench" in name or "index" in name or ours[name].size == 0:
            continue  # filled in some releases and empty in others
        expected = tuple(frames if size == count else size for size in values.shape)
        assert ours[name].shape == expected, name
        assert ours[name].dtype == values.dtype, name
    shared = set(real) & set(ours)
    assert len(shared) >= 25 and {"state/left_effector/position", "action/right_effector/index"} <= shared


def test_datasets_are_contiguous_without_attributes_and_absent_ones_empty(raw):
    (path,) = (raw / "proprio_stats").rglob("*.h5")
    with h5py.File(path) as file:
        seen = []
        file.visititems(lambda name, item: seen.append((name, item)))
        for name, item in seen:
            assert not item.attrs
            if isinstance(item, h5py.Dataset):
                assert item.chunks is None and item.compression is None
                if item.size == 0:
                    assert item.shape == (0,) and item.dtype == np.float32, name
        assert file["state/effector/force"].shape == (0,)
        assert file["timestamp"].dtype == np.int64


def test_arm_actions_repeat_the_state_and_the_gripper_is_a_command(episode):
    values = arrays(episode)
    for name in ("joint/position", "end/position", "end/orientation", "head/position", "waist/position"):
        np.testing.assert_array_equal(values[f"action/{name}"], values[f"state/{name}"])
    state, action = values["state/effector/position"], values["action/effector/position"]
    assert state.shape == action.shape
    assert state.min() == 0 and 47 < state[:, 1].max() < 49  # an object of 48 mm keeps the fingers apart
    assert action.min() == 0 and action[:, 1].max() == 1
    assert set(np.unique(action[:, 1])) == {0.0, 0.5, 1.0}
    closing = np.flatnonzero(np.diff(state[:, 1]) > 0)
    assert (action[closing, 1] > 0).all()  # the state grows as it closes, and follows its command


def test_old_gripper_has_its_own_range(episode):
    state = arrays(episode, span=agibot.GRIPPERS["old"])["state/effector/position"]
    assert state.min() == 35 and 69 < state.max() < 70  # 35 + 0.4 * 86


def test_index_lists_the_frames_in_which_the_arm_was_sent_something(episode):
    values = arrays(episode)
    frames = len(values["timestamp"])
    sent = values["action/joint/index"]
    assert sent[0] == 24 and len(sent) < frames - 24
    assert len(values["action/effector/index"]) == frames
    assert len(values["action/joint/position"]) == frames


def test_time_stamps_are_nanoseconds_with_jitter_and_one_gap(episode):
    steps = np.diff(arrays(episode)["timestamp"])
    assert arrays(episode)["timestamp"][0] > 1.7e18
    assert 33.0e6 < np.median(steps) < 34.4e6
    assert (steps > 60e6).sum() == 1 and steps.min() > 14e6 and steps.std() > 1e6


def test_variants_differ_from_the_base_as_reported(episode):
    base = arrays(episode)
    frames = len(base["timestamp"])
    split = arrays(episode, "split-effector")
    assert "state/effector/position" not in split
    np.testing.assert_array_equal(
        split["state/right_effector/position"][:, 0], base["state/effector/position"][:, 1]
    )
    assert len(split["action/left_effector/index"]) < frames

    wide = arrays(episode, "joint16")
    assert wide["state/joint/position"].shape == (frames, 16) and wide["state/effector/position"].size == 0
    np.testing.assert_array_equal(wide["state/joint/position"][:, 14:], base["state/effector/position"])

    short = arrays(episode, "short")
    index = short["action/joint/index"]
    assert len(short["action/joint/position"]) == len(index) < frames
    np.testing.assert_array_equal(short["action/end/position"], base["action/end/position"][index])
    assert short["state/joint/position"].shape == (frames, 14)

    assert len(arrays(episode, "long")["action/joint/position"]) == frames + 5
    still = arrays(episode, "no-robot")
    assert still["state/robot/position"].size == still["state/robot/orientation"].size == 0
    assert arrays(episode, "no-end-index")["action/end/index"].size == 0
    hands = arrays(episode, "dexhand")
    assert hands["state/effector/position"].shape == hands["action/effector/position"].shape == (frames, 12)


def test_a_leading_action_is_the_state_to_come(episode):
    values = arrays(episode, lead=2)
    np.testing.assert_array_equal(values["action/joint/position"][:-2], values["state/joint/position"][2:])


def test_end_pose_is_the_flange_14_cm_above_the_grip(episode):
    _, frames = episode
    values = arrays(episode)
    quat = values["state/end/orientation"][:, 1]
    np.testing.assert_allclose(np.linalg.norm(quat, axis=1), 1.0)
    grip = values["state/end/position"][:, 1] + 0.143 * frames.ee_rot[:, :, 2]
    np.testing.assert_allclose(grip - agibot.WORLD_FROM_TABLETOP[:3, 3], frames.ee_pos, atol=1e-12)
    assert (values["state/end/position"][:, 0, 1] > 0).all()  # left arm on the left
    assert (values["state/end/position"][:, 1, 1] < 0.1).all()


def test_videos_are_av1_480p_at_30_fps_with_a_frame_per_row(raw):
    (path,) = (raw / "proprio_stats").rglob("*.h5")
    with h5py.File(path) as file:
        rows = len(file["timestamp"])
    for video in sorted((raw / "observations").rglob("*.mp4")):
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            context = stream.codec_context
            assert stream.codec_tag == "av01" or "av1" in context.name or "dav1d" in context.name
            assert (context.width, context.height, context.pix_fmt) == (640, 480, "yuv420p")
            assert stream.average_rate == 30
            assert sum(1 for _ in container.decode(video=0)) == rows


def test_segments_share_borders_and_leave_a_tail(raw, episode):
    (entry,) = json.loads((raw / "task_info/task_801.json").read_text())
    motion, frames = episode
    assert entry["episode_id"] == 648_642 and entry["task_name"] == motion.instruction
    first, second = entry["label_info"]["action_config"]
    assert first["start_frame"] > 0 and first["end_frame"] == second["start_frame"]
    assert second["end_frame"] < len(frames)
    assert f"{first['action_text']} and {second['action_text']}" == motion.instruction
    assert (first["skill"], second["skill"]) == ("Pick", "Place")


def test_aligned_extrinsics_follow_the_hand(raw, episode):
    folder = raw / "parameters/801/648642/parameters/camera"
    aligned = json.loads((folder / "hand_right_extrinsic_params_aligned.json").read_text())
    assert len(aligned) == len(episode[1])
    values = arrays(episode)
    eyes = np.array([item["extrinsic"]["translation_vector"] for item in aligned])
    away = np.linalg.norm(eyes - values["state/end/position"][:, 1], axis=1)
    np.testing.assert_allclose(away, away[0], atol=1e-9)  # rigid in the flange's frame
    static = json.loads((folder / "head_extrinsic_params_aligned.json").read_text())
    assert static[0] == static[-1]
    intrinsic = json.loads((folder / "head_intrinsic_params.json").read_text())["intrinsic"]
    assert intrinsic["fx"] == 322 and intrinsic["ppx"] == 320 and intrinsic["ppy"] == 240


def test_tar_shards_hold_what_folders_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(agibot, "resample", shortened(40))
    write_sample("agibot", tmp_path / "folders", episodes=2, seed=0, tasks=1)
    write_sample("agibot", tmp_path / "tars", episodes=2, seed=0, tasks=1, layout="tars")
    raw = tmp_path / "tars"
    assert {str(path.relative_to(raw)) for path in raw.rglob("*") if path.is_file()} == {
        "observations/801/648642-648643.tar",
        "parameters/648642-648643.tar",
        "proprio_stats/648642-648643.tar",
        "task_info/task_801.json",
        "tabletop.json",
    }
    with tarfile.open(raw / "observations/801/648642-648643.tar") as tar:
        member = tar.extractfile("648643/videos/head_color.mp4")
        folder = tmp_path / "folders/observations/801/648643/videos/head_color.mp4"
        assert member is not None and member.read() == folder.read_bytes()
    with tarfile.open(raw / "proprio_stats/648642-648643.tar") as tar:
        assert "801/648642/proprio_stats.h5" in tar.getnames()


def test_range_folders_remain_in_some_extractions(tmp_path, monkeypatch):
    monkeypatch.setattr(agibot, "resample", shortened(40))
    write_sample("agibot", tmp_path, episodes=1, seed=0, layout="ranges")
    assert (tmp_path / "observations/801/648642-648642/648642/videos/head_color.mp4").exists()
    assert (tmp_path / "proprio_stats/801/648642/proprio_stats.h5").exists()


def test_other_sensors_come_with_their_variants(tmp_path, monkeypatch):
    monkeypatch.setattr(agibot, "resample", shortened(26))
    write_sample("agibot", tmp_path, episodes=2, seed=0, variants=("dexhand", "tactile"), depth=True)
    first, second = (tmp_path / f"observations/80{i}/64864{1 + i}" for i in (1, 2))
    names = {path.name for path in (first / "videos").iterdir()}
    assert names == {"head_color.mp4", "hand_left_fisheye_color.mp4", "hand_right_fisheye_color.mp4"}
    with av.open(str(first / "videos/hand_right_fisheye_color.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.width, context.height) == (960, 768)
    tactile = sorted(path.name for path in (second / "tactile").iterdir())
    assert tactile == [f"{side}_sensor_{i}.mp4" for side in ("left", "right") for i in (1, 2)]
    with av.open(str(second / "tactile/left_sensor_1.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.width, context.height) == (400, 700)
    depth = np.asarray(Image.open(first / "depth/head_depth_000000.png"))
    assert depth.shape == (480, 640) and depth.dtype == np.uint16
    assert 300 < np.median(depth[240:]) < 900  # millimetres to the table
    assert len(list((first / "depth").iterdir())) == 26


def test_unknown_variants_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'joint16'"):
        write_sample("agibot", tmp_path, episodes=1, seed=0, variants=("joint6",))
    with pytest.raises(UsageError, match="grippers omnipicker, old"):
        write_sample("agibot", tmp_path, episodes=1, seed=0, gripper="claw")
