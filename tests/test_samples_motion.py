"""One motion behind every raw format: resampling, words, and agreement of what is stored."""

import json
from fractions import Fraction

import h5py
import numpy as np
import pytest
from dpipe.samples import SAMPLERS, agibot, calvin, egodex, write_sample
from dpipe.samples.libero import write as write_libero
from dpipe.samples.motion import record, resample, split_off, start
from dpipe.samples.panda import link_frames
from dpipe.samples.tabletop import BASE_POSITION, FPS, Tabletop
from dpipe.schemas.errors import UsageError
from dpipe.schemas.rotations import (
    euler_to_matrix,
    matrix_to_rotvec,
    quat_to_matrix,
    rotvec_to_matrix,
)

SEED = 2


@pytest.fixture(scope="module")
def motion():
    return record(SEED, image_size=8)


def test_frames_on_a_sample_are_that_sample_to_the_bit(motion):
    frames = resample(motion, 30)
    for k in range(0, len(frames), 3):  # every 0.1 s
        seen = motion.seen[k * 2 // 3]
        np.testing.assert_array_equal(frames.joint_pos[k], seen.joint_pos)
        np.testing.assert_array_equal(frames.ee_pos[k], seen.ee_pos)
        np.testing.assert_array_equal(frames.ee_rot[k], seen.scene.hand_rot)
        assert frames.finger[k] == seen.gripper_qpos[0]


def test_frames_between_samples_lie_on_the_way_and_their_joints_reach_their_hand(motion):
    frames = resample(motion, 30)
    for k in range(1, len(frames), 5):
        hand = link_frames(frames.joint_pos[k])[7]
        np.testing.assert_allclose(hand[:3, 3] + BASE_POSITION, frames.ee_pos[k], atol=1e-12)
        np.testing.assert_allclose(hand[:3, :3], frames.ee_rot[k], atol=1e-12)
        at = Fraction(k * FPS, 30)
        before, after = motion.seen[int(at)], motion.seen[min(int(at) + 1, len(motion.actions))]
        straight = before.ee_pos + float(at - int(at)) * (after.ee_pos - before.ee_pos)
        np.testing.assert_allclose(frames.ee_pos[k], straight, atol=2e-4)  # joints go straight, not the hand


def test_resampling_at_the_simulators_rate_changes_nothing(motion):
    frames = resample(motion, FPS)
    assert len(frames) == len(motion.seen)
    np.testing.assert_array_equal(frames.ee_pos, [seen.ee_pos for seen in motion.seen])
    np.testing.assert_array_equal(frames.command[1:], motion.actions[:, 6])


def test_all_frames_lie_within_the_motion(motion):
    for fps in (10, 15, 25, 30, 60):
        frames = resample(motion, fps)
        assert (len(frames) - 1) / fps <= len(motion.actions) / FPS < len(frames) / fps


def test_segments_share_their_border_and_cover_the_motion(motion):
    taking, placing = motion.segments
    assert taking.start == 0 and taking.stop == placing.start and placing.stop == len(motion.actions)
    assert motion.instruction == f"{taking.text} and {placing.text}"
    held = [seen.scene.finger < 0.0241 for seen in motion.seen]
    assert held[taking.stop]  # taken by the end of the first, and let go by the end of the second
    assert not held[placing.stop]


def test_motion_starts_where_start_brings_a_table(motion):
    table = Tabletop()
    start(table, SEED)
    np.testing.assert_array_equal(table.state(), motion.states[0])
    for action in motion.actions:
        table.step(action)
    assert table.success and motion.success


def test_clumsy_motion_fails_after_lifting_the_object():
    clumsy = record(SEED, image_size=8, clumsy=True)
    assert not clumsy.success
    lifted = max(seen.scene.object_pos[clumsy.task.target, 2] for seen in clumsy.seen)
    assert lifted > 0.95


def test_held_out_episodes_are_every_nth_and_at_least_one():
    assert split_off(10, 5) == [False] * 4 + [True] + [False] * 4 + [True]
    assert split_off(3, 5) == [False, False, True]
    assert split_off(1, 5) == [False]
    assert split_off(4, 0) == [False] * 4


def test_every_sampler_is_listed_and_refuses_an_empty_order(tmp_path):
    assert set(SAMPLERS) == {"libero", "calvin", "egodex", "agibot"}
    for name in SAMPLERS:
        with pytest.raises(UsageError, match="1 or more"):
            write_sample(name, tmp_path / name, episodes=0, seed=0)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The end-effector of one motion as each raw format stores it, in the tabletop's coordinates.

    name -> (seconds [F], position [F, 3] m, rotation [F, 3, 3], opening [F] 0 to 1)
    """
    folder = tmp_path_factory.mktemp("formats")
    views = {}
    (path,) = write_libero(folder / "libero", 1, SEED, image_size=8)
    with h5py.File(path) as file:
        demo = file["data/demo_0"]
        obs = demo["obs"]
        seconds = demo["states"][:, 0] + 1 / FPS - 0.25
        opening = (obs["gripper_states"][:, 0] - obs["gripper_states"][:, 1]) / 0.08
        views["libero"] = seconds, obs["ee_pos"][:], rotvec_to_matrix(obs["ee_ori"][:]), opening

    calvin.write(folder / "calvin", 1, SEED)
    obs = []
    for path in sorted((folder / "calvin/task_D_D/training").glob("*.npz")):
        with np.load(path) as frame:
            obs.append(frame["robot_obs"])
    obs = np.array(obs)
    offset = _seeds(folder / "calvin")["world_from_tabletop"][:3, 3]
    views["calvin"] = _seconds(obs), obs[:, :3] - offset, euler_to_matrix(obs[:, 3:6]), obs[:, 6] / 0.08

    egodex.write(folder / "egodex", 1, SEED, enlarged=1)
    with h5py.File(folder / "egodex/part2/basic_pick_place/0.hdf5") as file:
        wrist = file["transforms/rightHand"][:].astype(float)
        thumb, index = (file[f"transforms/right{tip}Tip"][:, :3, 3] for tip in ("Thumb", "IndexFinger"))
    world = _seeds(folder / "egodex")["world_from_tabletop"]
    hand = np.linalg.inv(world) @ wrist @ np.linalg.inv(egodex.HAND_FROM_WRIST)
    opening = np.linalg.norm(thumb - index, axis=1) / 0.08
    views["egodex"] = _seconds(hand), hand[:, :3, 3], hand[:, :3, :3], opening

    agibot.write(folder / "agibot", 1, SEED)
    (path,) = (folder / "agibot/proprio_stats").rglob("*.h5")
    with h5py.File(path) as file:
        flange, quat = file["state/end/position"][:, 1], file["state/end/orientation"][:, 1]
        closed = file["state/effector/position"][:, 1] / 120
    rotation = quat_to_matrix(quat)
    grip = flange + 0.143 * rotation[:, :, 2] - _seeds(folder / "agibot")["world_from_tabletop"][:3, 3]
    views["agibot"] = _seconds(flange), grip, rotation, 1 - closed
    return views


def _seconds(rows):
    return np.arange(len(rows)) / 30


def _seeds(raw):
    content = json.loads((raw / "tabletop.json").read_text())
    (episode,) = content["episodes"].values()
    assert episode["seed"] == SEED
    return content | {"world_from_tabletop": np.array(content["world_from_tabletop"])}


def test_every_format_stores_the_same_poses_on_the_common_time_grid(stored, motion):
    for name, (seconds, position, rotation, opening) in stored.items():
        ticks = np.round(seconds * 60).astype(int)
        common = {tick: row for row, tick in enumerate(ticks) if tick % 6 == 0}  # every 0.1 s
        assert len(common) >= len(motion.actions) // 2 - 1, name
        for tick, row in common.items():
            seen = motion.seen[tick // 3]
            np.testing.assert_allclose(position[row], seen.ee_pos, atol=1e-5)
            angle = np.linalg.norm(matrix_to_rotvec(rotation[row] @ seen.scene.hand_rot.T))
            assert angle < 1e-4, name
            assert opening[row] == pytest.approx(seen.gripper_qpos[0] / 0.04, abs=1e-4), name


def test_some_motions_begin_low_after_a_fumble_and_succeed_all_the_same():
    low = 0
    for seed in range(12):
        motion = record(seed, image_size=8)
        assert motion.success, seed
        low += motion.seen[0].ee_pos[2] < 0.96
    assert 1 <= low <= 7
