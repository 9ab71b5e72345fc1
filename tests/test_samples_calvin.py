"""Raw CALVIN folders made from the tabletop are faithful to the format, traps included."""

import hashlib
import io
import zipfile
from itertools import pairwise

import numpy as np
import pytest
import yaml
from dpipe.samples import calvin, write_sample
from dpipe.samples.motion import record, resample
from dpipe.schemas.errors import UsageError
from dpipe.schemas.rotations import euler_to_matrix


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    raw = tmp_path_factory.mktemp("calvin")
    write_sample("calvin", raw, episodes=3, seed=0, validation_every=3)
    return raw / "task_D_D"


def load(path):
    with np.load(path) as frame:
        return {key: frame[key] for key in frame.files}


def annotations(split):
    return np.load(split / "lang_annotations/auto_lang_ann.npy", allow_pickle=True).item()


def test_frames_hold_the_published_arrays_in_the_published_types(folder):
    frame = load(folder / "training/episode_0358482.npz")
    shapes = {key: (value.shape, value.dtype) for key, value in frame.items()}
    assert shapes == {
        "actions": ((7,), np.float64),
        "rel_actions": ((7,), np.float64),
        "robot_obs": ((15,), np.float64),
        "scene_obs": ((24,), np.float64),
        "rgb_static": ((200, 200, 3), np.uint8),
        "rgb_gripper": ((84, 84, 3), np.uint8),
    }
    assert list(frame)[:4] == ["actions", "rel_actions", "robot_obs", "scene_obs"]


def test_every_id_of_a_play_episode_has_its_file_and_ends_are_inclusive(folder):
    for split, count in (("training", 2), ("validation", 1)):
        ids = np.load(folder / split / "ep_start_end_ids.npy")
        lengths = np.load(folder / split / "ep_lens.npy")
        assert ids.shape == (count, 2) and ids.dtype == np.int64
        np.testing.assert_array_equal(lengths, ids[:, 1] - ids[:, 0] + 1)
        files = {int(path.stem.split("_")[1]) for path in (folder / split).glob("episode_*.npz")}
        assert files == {k for first, last in ids for k in range(first, last + 1)}


def test_actions_are_the_next_frames_pose_and_command(folder):
    first, last = np.load(folder / "training/ep_start_end_ids.npy")[0]
    frames = [load(folder / f"training/episode_{k:07d}.npz") for k in range(first, last + 1)]
    for now, after in pairwise(frames):
        np.testing.assert_array_equal(now["actions"][:6], after["robot_obs"][:6])
        assert now["actions"][6] == after["robot_obs"][14]
    for frame in frames:
        difference = frame["actions"][:6] - frame["robot_obs"][:6]
        difference[3:] = (difference[3:] + np.pi) % (2 * np.pi) - np.pi
        limit = np.array([0.02] * 3 + [0.05] * 3)
        np.testing.assert_array_equal(frame["rel_actions"][:6], np.clip(difference, -limit, limit) / limit)
        assert frame["rel_actions"][6] == frame["actions"][6]
        assert frame["robot_obs"][14] in (-1.0, 1.0)


def test_gripper_closes_with_minus_one(folder):
    first, last = np.load(folder / "training/ep_start_end_ids.npy")[0]
    obs = np.array(
        [load(folder / f"training/episode_{k:07d}.npz")["robot_obs"] for k in range(first, last + 1)]
    )
    assert obs[0, 14] == 1.0 and obs[0, 6] == pytest.approx(0.08)
    closed = obs[:, 14] < 0
    assert closed.any() and obs[closed, 6].min() == pytest.approx(0.048)
    narrowing = np.diff(obs[:, 6]) < 0
    assert closed[1:][narrowing].all()


def test_pose_is_the_tabletops_in_calvins_world(folder):
    obs = load(folder / "training/episode_0358482.npz")["robot_obs"]
    frames = resample(record(0, image_size=8), 30)
    np.testing.assert_allclose(obs[:3], frames.ee_pos[0] + [-0.34 + 0.66, -0.46, 0.24 - 0.912])
    np.testing.assert_allclose(euler_to_matrix(obs[3:6]), frames.ee_rot[0], atol=1e-12)
    np.testing.assert_array_equal(obs[7:14], frames.joint_pos[0])


def test_roll_flips_sign_because_the_hand_points_down(tmp_path):
    frames = [resample(record(seed, image_size=8), 30) for seed in range(3)]
    rolls = np.concatenate([[calvin.robot_obs(f, k)[3] for k in range(len(f))] for f in frames])
    assert rolls.min() < -3 and rolls.max() > 3


def test_windows_have_published_lengths_overlap_and_end_on_stored_frames(folder):
    overlaps = False
    for split in ("training", "validation"):
        stored = annotations(folder / split)
        ids = np.load(folder / split / "ep_start_end_ids.npy")
        texts, spans = stored["language"]["ann"], stored["info"]["indx"]
        assert stored["info"]["episodes"] == []
        assert stored["language"]["emb"].shape == (len(texts), 1, 384)
        assert stored["language"]["emb"].dtype == np.float32
        assert len(stored["language"]["task"]) == len(texts) == len(spans) == 3 * len(ids)
        for start, end in spans:
            assert isinstance(start, np.int64)
            assert end - start == 64 or 33 <= end - start <= 48
            assert any(first <= start and end <= last for first, last in ids)
        assert spans != sorted(spans)
        assert texts[0] == f"{texts[1]} and {texts[2]}"
        overlaps |= spans[0][0] < spans[1][1]  # the task's window and the taking
    assert overlaps


def test_blocks_stand_in_each_scenes_own_order(tmp_path):
    write_sample("calvin", tmp_path, episodes=4, seed=0, dataset="task_ABC_D", validation_every=4)
    split = tmp_path / "task_ABC_D/training"
    info = np.load(split / "scene_info.npy", allow_pickle=True).item()
    assert info == {
        "calvin_scene_B": [0, 598_909],
        "calvin_scene_C": [598_910, 1_191_338],
        "calvin_scene_A": [1_191_339, 1_795_044],
    }
    order = {"B": (0, 1, 2), "C": (1, 0, 2), "A": (2, 1, 0)}
    for seed, first, scene in ((0, 0, "B"), (1, 598_910, "C"), (2, 1_191_339, "A")):
        blocks = load(split / f"episode_{first:07d}.npz")["scene_obs"][6:].reshape(3, 6)
        objects = record(seed, image_size=8).seen[0].scene.object_pos + calvin.WORLD_FROM_TABLETOP[:3, 3]
        np.testing.assert_allclose(blocks[:, :3], objects[list(order[scene])])
    # Validation is scene D with ids of its own: the same id stands for other frames there.
    other = load(tmp_path / "task_ABC_D/validation/episode_0000000.npz")["robot_obs"]
    assert not np.array_equal(other, load(split / "episode_0000000.npz")["robot_obs"])
    assert not (tmp_path / "task_ABC_D/validation/scene_info.npy").exists()


def test_zip_holds_the_same_bytes_as_the_folder(folder, tmp_path):
    (path,) = write_sample("calvin", tmp_path, episodes=3, seed=0, validation_every=3, zipped=True)
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        assert all(name.startswith("task_D_D/") for name in names)
        assert len(names) == sum(1 for file in folder.rglob("*") if file.is_file())
        for name in names[:: len(names) // 40]:
            assert archive.read(name) == (folder.parent / name).read_bytes(), name
        frame = np.load(io.BytesIO(archive.read("task_D_D/training/episode_0358482.npz")))
        assert frame["robot_obs"].shape == (15,)


def test_depth_is_metric_and_tactile_noisy_where_asked_for(tmp_path):
    raw = tmp_path / "calvin"
    write_sample("calvin", raw, episodes=1, seed=0, depth=True, tactile=True, digits=6)
    frame = load(raw / "task_D_D/training/episode_358482.npz")
    assert frame["depth_static"].shape == (200, 200) and frame["depth_static"].dtype == np.float32
    assert frame["depth_static"].min() > 3.4 and frame["depth_static"].max() <= 10
    assert frame["depth_gripper"].shape == (84, 84) and 0.01 < frame["depth_gripper"].min() < 0.2
    assert frame["rgb_tactile"].shape == (160, 120, 6)
    assert 6 < frame["rgb_tactile"].astype(float).std() < 8
    assert frame["depth_tactile"].shape == (160, 120, 2) and not frame["depth_tactile"].any()


def test_stray_frames_belong_to_no_episode(tmp_path):
    write_sample("calvin", tmp_path, episodes=1, seed=0, dataset="task_ABCD_D", strays=True)
    split = tmp_path / "task_ABCD_D/training"
    ids = np.load(split / "ep_start_end_ids.npy")
    for stray in (37_682, 53_818, 244_284, 420_498):
        assert (split / f"episode_{stray:07d}.npz").exists()
        assert not any(first <= stray <= last for first, last in ids)


def test_statistics_are_those_of_the_frames(folder):
    text = yaml.safe_load((folder / "training/statistics.yaml").read_text())
    ids = np.load(folder / "training/ep_start_end_ids.npy")
    obs = np.array(
        [
            load(folder / f"training/episode_{k:07d}.npz")["robot_obs"]
            for first, last in ids
            for k in range(first, last + 1)
        ]
    )
    np.testing.assert_allclose(text["robot_obs"][0]["mean"], obs.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(text["robot_obs"][0]["std"], obs.std(axis=0), atol=1e-6)
    assert len(text["scene_obs"][0]["mean"]) == 24 and len(text["act_max_bound"]) == 7


def test_equal_seeds_give_equal_bytes(folder, tmp_path):
    paths = write_sample("calvin", tmp_path, episodes=3, seed=0, validation_every=3)
    for path in paths[::29]:
        other = folder.parent / path.relative_to(tmp_path)
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest()


def test_unknown_dataset_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="known: task_D_D"):
        write_sample("calvin", tmp_path, episodes=1, seed=0, dataset="task_E")
