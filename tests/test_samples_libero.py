"""Raw LIBERO files made from the tabletop are faithful to the format, traps included."""

import hashlib
import json

import h5py
import numpy as np
import pytest
from dpipe.samples import write_sample
from dpipe.samples.motion import is_no_op, record, seeds_by_task
from dpipe.samples.render import render_front
from dpipe.samples.tabletop import Tabletop
from dpipe.schemas.errors import DataError, UsageError

OBS = {
    "agentview_rgb": ((128, 128, 3), np.uint8),
    "eye_in_hand_rgb": ((128, 128, 3), np.uint8),
    "ee_pos": ((3,), np.float64),
    "ee_ori": ((3,), np.float64),
    "ee_states": ((6,), np.float64),
    "gripper_states": ((2,), np.float64),
    "joint_states": ((7,), np.float64),
}
ROOT = {
    "actions": ((7,), np.float64),
    "states": ((97,), np.float64),
    "robot_states": ((9,), np.float64),
    "rewards": ((), np.uint8),
    "dones": ((), np.uint8),
}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    raw = tmp_path_factory.mktemp("released") / "libero"
    return raw, write_sample("libero", raw, episodes=4, seed=0)


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory):
    raw = tmp_path_factory.mktemp("regenerated") / "libero"
    return raw, write_sample("libero", raw, episodes=3, seed=0, regenerated=True, tasks=1, image_size=64)


def test_demonstrations_have_the_published_datasets_shapes_types_and_storage(released):
    _, paths = released
    for path in paths:
        with h5py.File(path) as file:
            assert list(file) == ["data"]
            for demo in file["data"].values():
                assert set(demo) == {*ROOT, "obs"} and set(demo["obs"]) == set(OBS)
                frames = int(demo.attrs["num_samples"])
                for group, expected in ((demo, ROOT), (demo["obs"], OBS)):
                    for name, (shape, dtype) in expected.items():
                        dataset = group[name]
                        assert dataset.shape == (frames, *shape), name
                        assert dataset.dtype == dtype, name
                        assert dataset.chunks is None and dataset.compression is None


def test_attributes_are_those_of_the_published_files(released):
    _, paths = released
    path = next(path for path in paths if path.parent.name == "libero_goal")
    with h5py.File(path) as file:
        attributes = dict(file["data"].attrs)
        demos = list(file["data"].values())
        assert set(attributes) == {
            "env_name",
            "env_args",
            "problem_info",
            "bddl_file_name",
            "macros_image_convention",
            "num_demos",
            "total",
            "tag",
        }
        assert attributes["macros_image_convention"] == "opengl" and attributes["tag"] == "libero-v1"
        assert attributes["num_demos"] == len(demos) and attributes["num_demos"].dtype == np.int64
        assert attributes["total"] == sum(len(demo["actions"]) for demo in demos)
        arguments = json.loads(attributes["env_args"])
        assert arguments["env_kwargs"]["control_freq"] == 20
        assert arguments["env_kwargs"]["controller_configs"]["output_max"] == [0.05] * 3 + [0.5] * 3
        for demo in demos:
            assert set(demo.attrs) == {"num_samples", "init_state", "model_file"}
            np.testing.assert_array_equal(demo.attrs["init_state"], demo["states"][0])
            assert 58_000 < len(demo.attrs["model_file"]) < 91_000
            assert demo.attrs["model_file"].startswith("<mujoco")


def test_file_names_carry_the_instruction_and_some_bddl_files_say_it_otherwise(tmp_path):
    paths = write_sample("libero", tmp_path, episodes=9, seed=0, image_size=8)
    styles, differs = set(), set()
    for path in paths:
        stem = path.name.removesuffix("_demo.hdf5")
        scene, _, rest = stem.rpartition("SCENE10_")
        styles.add(scene)
        instruction = rest.replace("_", " ")
        assert instruction.startswith("pick up the ")
        assert path.parent.name == ("libero_10" if scene else "libero_goal")
        with h5py.File(path) as file:
            said = json.loads(file["data"].attrs["problem_info"])["language_instruction"]
        assert said in (instruction, instruction.replace("pick up", "pick"))
        differs.add(said != instruction)
    assert styles == {"", "KITCHEN_"}
    assert differs == {True, False}


def test_observations_are_recorded_after_the_action_and_states_before(released):
    raw, paths = released
    seeds = json.loads((raw / "tabletop.json").read_text())["episodes"]
    with h5py.File(paths[0]) as file:
        demo = file["data/demo_0"]
        source = f"{paths[0].parent.name}/{paths[0].stem}/demo_0"
        table = Tabletop()
        table.reset(seeds[source]["seed"])
        for t in (0, 11, 30):
            table.set_state(demo["states"][t])
            after = table.step(demo["actions"][t])
            np.testing.assert_array_equal(demo["obs/joint_states"][t], after.joint_pos)
            np.testing.assert_array_equal(demo["obs/joint_states"][t], demo["states"][t + 1][1:8])
            np.testing.assert_array_equal(demo["obs/agentview_rgb"][t], after.front[::-1])
            np.testing.assert_array_equal(demo["obs/eye_in_hand_rgb"][t], after.wrist[::-1])
        times = demo["states"][:, 0]
        np.testing.assert_allclose(np.diff(times), 0.05, atol=1e-9)
        assert times[0] == pytest.approx(0.25)  # the first five steps are cut


def test_proprioception_is_redundant_as_upstream_has_it(released):
    _, paths = released
    with h5py.File(paths[0]) as file:
        demo = file["data/demo_0"]
        obs, robot = demo["obs"], demo["robot_states"][:]
        np.testing.assert_array_equal(obs["ee_states"][:], np.hstack([obs["ee_pos"][:], obs["ee_ori"][:]]))
        np.testing.assert_array_equal(robot[:, :2], obs["gripper_states"][:])
        np.testing.assert_array_equal(robot[:, 2:5], obs["ee_pos"][:])
        np.testing.assert_allclose(np.linalg.norm(robot[:, 5:], axis=1), 1.0)
        assert np.abs(obs["ee_ori"][:, 0] - np.pi).max() < 0.5  # the hand points down
        for name in ("rewards", "dones"):
            values = demo[name][:]
            assert values[-1] == 1 and not values[:-1].any()
        actions = demo["actions"][:]
        assert np.abs(actions[:, :6]).max() <= 0.9375 and set(actions[:, 6]) == {-1.0, 1.0}


def test_stored_pictures_are_upside_down(released):
    raw, paths = released
    seeds = json.loads((raw / "tabletop.json").read_text())["episodes"]
    source = f"{paths[0].parent.name}/{paths[0].stem}/demo_0"
    motion = record(seeds[source]["seed"])
    with h5py.File(paths[0]) as file:
        stored = file["data/demo_0/obs/agentview_rgb"][5]
    upright = render_front(motion.seen[6].scene, 128)
    assert np.array_equal(stored[::-1], upright)
    assert not np.array_equal(stored, upright) and not np.array_equal(stored[::-1, ::-1], upright)


def test_bddl_content_is_written_on_request_alone(tmp_path):
    path = write_sample("libero", tmp_path, episodes=1, seed=0, bddl_content=True, image_size=32)[0]
    with h5py.File(path) as file:
        assert "(:language Pick up the " in file["data"].attrs["bddl_file_content"]


def test_a_failed_demonstration_is_marked_done_all_the_same(tmp_path):
    path = write_sample("libero", tmp_path, episodes=2, seed=0, tasks=1, fail_every=2, image_size=32)[0]
    seeds = json.loads((tmp_path / "tabletop.json").read_text())["episodes"]
    assert [entry["success"] for entry in seeds.values()] == [True, False]
    with h5py.File(path) as file:
        assert file["data/demo_1/dones"][-1] == 1


def test_demo_groups_beyond_ten_are_listed_alphabetically_by_hdf5(tmp_path):
    path = write_sample("libero", tmp_path, episodes=11, seed=0, tasks=1, image_size=8)[0]
    with h5py.File(path) as file:
        assert list(file["data"])[:3] == ["demo_0", "demo_1", "demo_10"]
        assert file["data"].attrs["num_demos"] == 11


def test_state_width_depends_on_the_scene(tmp_path):
    path = write_sample("libero", tmp_path, episodes=1, seed=0, objects=2, image_size=8)[0]
    with h5py.File(path) as file:
        assert file["data/demo_0/states"].shape[1] == 97 - 13


def test_regenerated_files_have_no_attributes_gaps_and_no_no_ops(regenerated):
    raw, (path,) = regenerated
    with h5py.File(path) as file:
        assert not file["data"].attrs
        assert sorted(file["data"]) == ["demo_0", "demo_2"]  # demo_1 failed
        for demo in file["data"].values():
            assert not demo.attrs
            last = None
            for action in demo["actions"][:]:
                assert not is_no_op(action, last)
                last = action
    outcomes = json.loads((raw / f"{path.parent.name}_metainfo.json").read_text())
    (demos,) = outcomes.values()
    assert [demos[f"demo_{i}"]["success"] for i in range(3)] == [True, False, True]


def test_regenerated_observations_stand_before_the_action(regenerated):
    _, (path,) = regenerated
    with h5py.File(path) as file:
        demo = file["data/demo_0"]
        joints, states = demo["obs/joint_states"][:], demo["states"][:]
        np.testing.assert_array_equal(joints[1:], states[1:, 1:8])
        np.testing.assert_allclose(np.diff(states[1:, 0]), 0.05, atol=1e-9)  # no-ops are not stepped
        assert states[1, 0] - states[0, 0] == pytest.approx(0.55)  # ten dummy steps, then the first action


def test_regenerated_pictures_are_256_wide_by_default_and_still_upside_down(tmp_path):
    (path,) = write_sample("libero", tmp_path, episodes=1, seed=0, regenerated=True, tasks=1)
    with h5py.File(path) as file:
        stored, states = file["data/demo_0/obs/agentview_rgb"][1], file["data/demo_0/states"][1]
    table = Tabletop(image_size=256)
    table.reset(0)
    np.testing.assert_array_equal(stored, table.set_state(states).front[::-1])


def test_equal_seeds_give_equal_bytes(tmp_path):
    digests = []
    for name in ("first", "second"):
        paths = write_sample("libero", tmp_path / name, episodes=2, seed=3, image_size=16)
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in paths])
    assert digests[0] == digests[1]


def test_seeds_are_shared_out_over_a_limited_number_of_tasks():
    chosen = seeds_by_task(6, seed=10, tasks=2)
    assert [len(seeds) for seeds in chosen.values()] == [3, 3]
    assert min(min(seeds) for seeds in chosen.values()) == 10
    table = Tabletop()
    for instruction, seeds in chosen.items():
        for seed in seeds:
            table.reset(seed)
            assert table.instruction == instruction
    everything = seeds_by_task(6, seed=10).values()
    assert sorted(seed for seeds in everything for seed in seeds) == list(range(10, 16))


def test_existing_recordings_are_never_overwritten(released):
    raw, paths = released
    before = paths[0].read_bytes()
    with pytest.raises(DataError, match="already holds recordings"):
        write_sample("libero", raw, episodes=1, seed=0)
    assert paths[0].read_bytes() == before


def test_unknown_names_and_empty_orders_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'libero'"):
        write_sample("liberro", tmp_path, episodes=1, seed=0)
    with pytest.raises(UsageError, match="1 or more"):
        write_sample("libero", tmp_path, episodes=0, seed=0)
