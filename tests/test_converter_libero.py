"""converters/libero.py against the rules of the fact sheet; what each quirk would look like if it were got wrong."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from dpipe.converters.libero import (
    CONVERTER,
    Options,
    convert_gripper,
    find,
    instruction_from_file,
    keep_actions,
    read,
    scan,
)
from dpipe.schemas.episode import Dropped, EpisodeRef
from dpipe.schemas.errors import DataError
from raw_libero import GOAL_TASK, demo_arrays, write_raw, write_suite
from scipy.spatial.transform import Rotation


def scan_all(raw: Path, options: Options | None = None) -> list[EpisodeRef | Dropped]:
    options = options or Options()
    return [entry for recording in find(raw, options) for entry in scan(recording, options)]


def only(entries: list[EpisodeRef | Dropped], kind: type) -> list:
    return [entry for entry in entries if isinstance(entry, kind)]


def test_causal_pairing_drops_the_first_action_and_the_last_observation(tmp_path: Path):
    write_suite(tmp_path, demos=1, steps=5)
    (ref,) = scan_all(tmp_path)
    episode = read(ref, Options())
    assert ref.frames == 4
    assert episode.columns["action"][:, 0].tolist() == pytest.approx([0.01, 0.02, 0.03, 0.04])
    assert episode.columns["observation.state"][:, 0].tolist() == pytest.approx([0.10, 0.11, 0.12, 0.13])


def test_as_stored_pairing_keeps_the_rows_of_the_file(tmp_path: Path):
    write_suite(tmp_path, demos=1, steps=5)
    options = Options(time_pairing="as-stored")
    (ref,) = scan_all(tmp_path, options)
    episode = read(ref, options)
    assert episode.columns["action"][:, 0].tolist() == pytest.approx([0, 0.01, 0.02, 0.03, 0.04])
    assert episode.columns["observation.state"][:, 0].tolist() == pytest.approx(
        [0.10, 0.11, 0.12, 0.13, 0.14]
    )


def test_regenerated_files_are_already_causal(tmp_path: Path):
    write_raw(
        tmp_path / "libero_goal" / "a_demo.hdf5", {0: demo_arrays(5), 3: demo_arrays(6, 1)}, regenerated=True
    )
    refs = scan_all(tmp_path)
    assert [ref.source_id for ref in refs] == ["libero_goal/a_demo/demo_0", "libero_goal/a_demo/demo_3"]
    assert [ref.frames for ref in refs] == [5, 6] and refs[0].metadata["kind"] == "regenerated"


def test_demonstrations_are_in_numeric_order(tmp_path: Path):
    write_suite(tmp_path, demos=12, steps=4)
    assert [ref.metadata["demo"] for ref in scan_all(tmp_path)] == list(range(12))


@pytest.mark.parametrize(
    ("stem", "instruction"),
    [
        ("pick_up_the_milk_and_place_it_in_the_basket_demo", "pick up the milk and place it in the basket"),
        ("KITCHEN_SCENE3_turn_on_the_stove_demo", "turn on the stove"),
        ("KITCHEN_SCENE10_close_the_top_drawer_demo", "close the top drawer"),
        ("LIVING_ROOM_SCENE1_pick_it_demo", "pick it"),
        ("put_the_bowl_on_the_stove_view_0_0_100_0_0_initstate_3_noise_5_demo", "put the bowl on the stove"),
        ("put_the_bowl_on_the_stove_table_4_demo", "put the bowl on the stove"),
        ("put_the_bowl_on_the_stove_level2_demo", "put the bowl on the stove"),
        ("put_the_bowl_on_the_stove_add_3 copy 2_demo", "put the bowl on the stove"),
    ],
)
def test_instruction_comes_from_the_file_name(stem: str, instruction: str):
    assert instruction_from_file(stem) == instruction


def test_bddl_wording_is_kept_as_provenance_and_noted(tmp_path: Path):
    write_suite(tmp_path, demos=1)
    (ref,) = scan_all(tmp_path)
    assert ref.instruction == GOAL_TASK.replace("_", " ")
    assert ref.metadata["bddl_instruction"] == "put red in tray" and "put red in tray" in ref.warnings[0]


@pytest.mark.parametrize(
    ("rotation", "index"), [("rot180", np.s_[::-1, ::-1]), ("vflip", np.s_[::-1]), ("raw", np.s_[:])]
)
def test_pictures_are_turned_as_asked(tmp_path: Path, rotation: str, index):
    write_suite(tmp_path, demos=1, steps=4)
    options = Options(image_rotation=rotation)
    (ref,) = scan_all(tmp_path, options)
    frames = read(ref, options).cameras["image"].read(0, 3)  # type: ignore[union-attr]
    stored = demo_arrays(4)["obs/agentview_rgb"]
    assert np.array_equal(frames[1], stored[1][index])


def test_files_turned_by_any4lerobot_come_out_alike(tmp_path: Path):
    arrays = demo_arrays(4)
    upright = dict(arrays) | {
        n: arrays[n][:, ::-1, ::-1] for n in ("obs/agentview_rgb", "obs/eye_in_hand_rgb")
    }
    write_raw(tmp_path / "a" / "libero_goal" / "t_demo.hdf5", {0: arrays}, regenerated=True)
    write_raw(tmp_path / "b" / "libero_goal" / "t_demo.hdf5", {0: upright}, regenerated=True)
    frames = []
    for folder, by in (("a", "openvla"), ("b", "any4lerobot")):
        options = Options(regenerated_by=by)
        (ref,) = scan_all(tmp_path / folder, options)
        frames.append(read(ref, options).cameras["image"].read(0, 4))  # type: ignore[union-attr]
    assert np.array_equal(*frames)


def edit(path: Path, change) -> None:
    with h5py.File(path, "a") as file:
        change(file)


def first_picture(raw: Path, **options) -> np.ndarray:
    chosen = Options(**options)
    (ref,) = scan_all(raw, chosen)
    return read(ref, chosen).cameras["image"].read(1, 2)[0]  # type: ignore[union-attr]


@pytest.mark.parametrize("rotation", ["rot180", "vflip", "raw"])
def test_rows_stored_top_down_come_out_like_those_stored_bottom_up(tmp_path: Path, rotation: str):
    """robosuite's IMAGE_CONVENTION may be set to opencv: the attribute says so, and may be bytes."""
    arrays = demo_arrays(4)
    write_raw(tmp_path / "gl" / "libero_goal" / "t_demo.hdf5", {0: arrays})
    upright = {n: arrays[n][:, ::-1] for n in ("obs/agentview_rgb", "obs/eye_in_hand_rgb")}
    path = write_raw(tmp_path / "cv" / "libero_goal" / "t_demo.hdf5", {0: arrays | upright})
    edit(path, lambda file: file["data"].attrs.__setitem__("macros_image_convention", np.bytes_("opencv")))
    expected = first_picture(tmp_path / "gl", image_rotation=rotation)
    assert np.array_equal(first_picture(tmp_path / "cv", image_rotation=rotation), expected)


def drop_attributes(*names: str):
    def change(file: h5py.File) -> None:
        for name in names or list(file["data"].attrs):
            del file["data"].attrs[name]

    return change


@pytest.mark.parametrize("lost", [(), ("macros_image_convention",)])
def test_a_raw_file_that_lost_its_attributes_is_still_paired_causally(tmp_path: Path, lost: tuple[str, ...]):
    edit(write_suite(tmp_path, demos=2, steps=5), drop_attributes(*lost))
    refs = scan_all(tmp_path)
    assert [(ref.frames, ref.metadata["kind"]) for ref in refs] == [(4, "raw"), (5, "raw")]
    assert lost or "lost them" in refs[0].warnings[0]


def test_the_first_row_a_regenerated_file_copies_is_held_against_nothing(tmp_path: Path):
    arrays = demo_arrays(5)
    arrays["robot_states"][0, 2:5] += 0.3
    write_raw(tmp_path / "libero_goal" / "t_demo.hdf5", {0: arrays}, regenerated=True)
    (ref,) = scan_all(tmp_path)
    assert isinstance(ref, EpisodeRef) and ref.frames == 5


def test_a_regenerated_file_that_kept_its_attributes_is_not_shifted(tmp_path: Path):
    path = write_suite(tmp_path, demos=2, steps=5)

    def align(file: h5py.File) -> None:
        for demo in file["data"].values():
            demo["obs/joint_states"][...] = demo["states"][:, 1:8]

    edit(path, align)
    refs = scan_all(tmp_path)
    assert [(ref.frames, ref.metadata["kind"]) for ref in refs] == [(5, "regenerated"), (6, "regenerated")]
    assert any("precede their row's action" in note for note in refs[0].warnings)


@pytest.mark.parametrize("value", [np.array([3]), np.bytes_("3"), h5py.Empty("i8"), "three"])
def test_counts_come_in_every_way_an_attribute_is_written(tmp_path: Path, value):
    def change(file: h5py.File) -> None:
        file["data"].attrs["num_demos"] = value
        file["data/demo_0"].attrs["num_samples"] = np.array([5])
        file["data"].attrs["problem_info"] = np.bytes_(file["data"].attrs["problem_info"])

    edit(write_suite(tmp_path, demos=3, steps=5), change)
    refs = only(scan_all(tmp_path), EpisodeRef)
    assert len(refs) == 3 and refs[0].metadata["bddl_instruction"] == "put red in tray"
    assert not any("num_demos" in note for note in refs[0].warnings)


@pytest.mark.parametrize("packed", [{"compression": "gzip", "shuffle": True}, {"compression": "lzf"}, {}])
def test_storage_and_what_else_a_copy_holds_change_nothing(tmp_path: Path, packed: dict):
    """Chunked, compressed, in single precision, with depth, a mask and without what is redundant."""
    write_suite(tmp_path / "plain", demos=1, steps=5)
    path = write_suite(tmp_path / "copy", demos=1, steps=5)

    def change(file: h5py.File) -> None:
        demo = file["data/demo_0"]
        for camera in ("agentview", "eye_in_hand"):
            frames = demo[f"obs/{camera}_rgb"][()]
            del demo[f"obs/{camera}_rgb"]
            demo["obs"].create_dataset(f"{camera}_rgb", data=frames, chunks=(1, *frames.shape[1:]), **packed)
            demo[f"obs/{camera}_depth"] = np.zeros((*frames.shape[:3], 1), np.float32)
        single = demo["obs/ee_states"][()].astype(np.float32)
        for name in ("robot_states", "rewards", "dones", "obs/ee_states"):
            del demo[name]
        demo["obs/ee_states"] = single
        file["mask/train"] = np.array([b"demo_0"])

    edit(path, change)
    (plain,), (copy,) = scan_all(tmp_path / "plain"), scan_all(tmp_path / "copy")
    assert (plain.frames, plain.metadata) == (copy.frames, copy.metadata)
    expected, found = read(plain, Options()), read(copy, Options())
    assert all(np.array_equal(found.columns[n], column) for n, column in expected.columns.items())
    for camera in ("image", "image2"):
        assert np.array_equal(found.cameras[camera].read(0, 4), expected.cameras[camera].read(0, 4))


def test_suites_are_found_inside_a_downloads_folder_and_never_twice_under_one_name(tmp_path: Path):
    write_suite(tmp_path / "LIBERO-datasets", demos=1)
    assert [ref.source_id.split("/")[0] for ref in scan_all(tmp_path)] == ["libero_goal"]
    write_suite(tmp_path / "second-copy", demos=1)
    with pytest.raises(DataError, match="one by one"):
        scan_all(tmp_path)


def test_poses_keep_robosuites_axis_angle_beyond_pi(tmp_path: Path):
    """A hand that points down sits near (3.14, 0, 0), and norms above pi occur: never wrapped."""
    arrays = demo_arrays(5)
    arrays["obs/ee_ori"][:] = [3.4, 0.1, -0.2]
    arrays["obs/ee_states"][:, 3:] = arrays["obs/ee_ori"]
    write_raw(tmp_path / "libero_goal" / "t_demo.hdf5", {0: arrays})
    (ref,) = scan_all(tmp_path)
    columns = read(ref, Options()).columns
    assert columns["observation.state"][0, 3:6].tolist() == pytest.approx([3.4, 0.1, -0.2])
    turned = Rotation.from_rotvec([3.4, 0.1, -0.2]).as_matrix()
    assert np.allclose(columns["next_ee_pose"][0, 3:9], turned[:, :2].T.reshape(-1), atol=1e-6)


def test_flags_of_the_last_row_are_no_success(tmp_path: Path):
    """Upstream writes the last row's 1 whatever happened, and a file without rewards is as good."""
    arrays = demo_arrays(5)
    arrays["rewards"][:] = arrays["dones"][:] = 0
    write_raw(tmp_path / "libero_goal" / "t_demo.hdf5", {0: arrays})
    (ref,) = scan_all(tmp_path)
    assert ref.frames == 4 and not {"success", "reward", "rewards"} & {*ref.metadata}


def test_simulator_states_of_any_width_convert_side_by_side(tmp_path: Path):
    for number, width in enumerate((45, 110)):
        arrays = demo_arrays(5)
        arrays["states"] = np.pad(arrays["states"], ((0, 0), (0, width - 45)))
        write_raw(tmp_path / "libero_10" / f"STUDY_SCENE{number}_t_demo.hdf5", {0: arrays}, regenerated=True)
    refs = scan_all(tmp_path)
    # One sentence for two scenes: the table of tasks merges them, so the scene is kept beside it.
    assert [(r.instruction, r.metadata["scene"]) for r in refs] == [
        ("t", "STUDY_SCENE0"),
        ("t", "STUDY_SCENE1"),
    ]
    assert not any("states" in name for name in read(refs[1], Options()).columns)


def test_gripper_meanings():
    native = np.array([-1.0, 1.0])  # open, close
    assert convert_gripper(native, "close-one", "native").tolist() == [-1, 1]
    assert convert_gripper(native, "close-one", "open-one").tolist() == [1, 0]
    transformed = np.array([1.0, 0.0])  # open, close
    assert convert_gripper(transformed, "open-one", "native").tolist() == [-1, 1]
    assert convert_gripper(transformed, "open-one", "open-one").tolist() == [1, 0]


def test_a_mixture_of_gripper_meanings_is_refused(tmp_path: Path):
    arrays = demo_arrays(8)
    arrays["actions"][3, 6] = 0.0
    write_raw(tmp_path / "libero_goal" / "t_demo.hdf5", {0: arrays, 1: demo_arrays(8, 1)})
    entries = scan_all(tmp_path)
    (dropped,) = only(entries, Dropped)
    assert "gripper action takes [" in dropped.reason and len(only(entries, EpisodeRef)) == 1


def test_noop_rule_is_upstreams():
    actions = np.zeros((6, 7))
    actions[:, 6] = [-1, -1, 1, 1, 1, -1]
    actions[4, 0] = 0.5
    # Row 0: no predecessor, only its norm counts. Row 1 likewise, nothing is kept yet. Rows 2, 3: still none kept.
    assert keep_actions(actions).tolist() == [False, False, False, False, True, True]
    actions[0, 0] = 0.5
    assert keep_actions(actions).tolist() == [True, False, True, False, True, True]


def test_dropping_noops_drops_the_frames_they_are_paired_with(tmp_path: Path):
    arrays = demo_arrays(8)
    arrays["actions"][3, :6] = 0
    write_raw(tmp_path / "libero_goal" / "t_demo.hdf5", {0: arrays})
    options = Options(drop_noops=True)
    (ref,) = scan_all(tmp_path, options)
    episode = read(ref, options)
    assert episode.columns["action"][:, 0].tolist() == pytest.approx([0.01, 0.02, 0.04, 0.05, 0.06, 0.07])
    frames = episode.cameras["image"].read(0, ref.frames)  # type: ignore[union-attr]
    assert np.array_equal(frames[2], demo_arrays(8)["obs/agentview_rgb"][3, ::-1, ::-1])


def test_next_pose_is_the_pose_one_frame_later(tmp_path: Path):
    write_suite(tmp_path, demos=1, steps=5)
    (ref,) = scan_all(tmp_path)
    columns = read(ref, Options()).columns
    assert columns["next_ee_pose"][:, 0].tolist() == pytest.approx([0.11, 0.12, 0.13, 0.14])
    assert columns["next_ee_pose"][0, 9] == 1.0  # fingers 0.08 m apart


def break_length(arrays: dict[str, np.ndarray]) -> None:
    arrays["obs/ee_pos"] = arrays["obs/ee_pos"][:-1]


def break_nan(arrays: dict[str, np.ndarray]) -> None:
    arrays["actions"][4, 2] = np.nan


def break_range(arrays: dict[str, np.ndarray]) -> None:
    arrays["actions"][4, 2] = 1.5


def break_empty(arrays: dict[str, np.ndarray]) -> None:
    for name in arrays:
        arrays[name] = arrays[name][:0]


def break_missing(arrays: dict[str, np.ndarray]) -> None:
    del arrays["obs/joint_states"]


def break_camera(arrays: dict[str, np.ndarray]) -> None:
    del arrays["obs/eye_in_hand_rgb"]


def break_proprio(arrays: dict[str, np.ndarray]) -> None:
    """`create_dataset.py --no-proprio`."""
    for name in ("ee_pos", "ee_ori", "ee_states", "gripper_states", "joint_states"):
        del arrays[f"obs/{name}"]


def break_black(arrays: dict[str, np.ndarray]) -> None:
    arrays["obs/agentview_rgb"] = np.zeros_like(arrays["obs/agentview_rgb"])


def break_ee_states(arrays: dict[str, np.ndarray]) -> None:
    arrays["obs/ee_states"][2, 0] += 0.1


def break_robot_states(arrays: dict[str, np.ndarray]) -> None:
    arrays["robot_states"][:, 2] += 0.1


def break_timing(arrays: dict[str, np.ndarray]) -> None:
    arrays["obs/joint_states"] = arrays["states"][:, 1:8].copy()


def break_integers(arrays: dict[str, np.ndarray]) -> None:
    arrays["actions"] = arrays["actions"].astype(np.int32)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (break_length, "lengths differ: actions 13, ee_pos 12"),
        (break_nan, "'actions' is not finite in 1 steps, first at step 4"),
        (break_range, "actions beyond [-1, 1] in 1 steps, first at step 4"),
        (break_empty, "no steps"),
        (break_missing, "missing 'obs/joint_states'"),
        (break_camera, "missing 'obs/eye_in_hand_rgb'"),
        (break_proprio, "missing 'obs/ee_pos', 'obs/ee_ori', 'obs/gripper_states', 'obs/joint_states'"),
        (break_black, "picture of a single colour"),
        (break_ee_states, "'ee_states' is not 'ee_pos' followed by 'ee_ori'"),
        (break_robot_states, "'robot_states' and 'ee_pos' disagree"),
        (break_timing, "taken before the action of their row"),
        (break_integers, "'actions' is int32"),
    ],
)
def test_one_bad_demonstration_is_left_out_with_its_reason(tmp_path: Path, harm, says: str):
    bad = demo_arrays(13, 1)
    harm(bad)
    write_raw(tmp_path / "libero_goal" / "t_demo.hdf5", {0: demo_arrays(12), 1: bad, 2: demo_arrays(14, 2)})
    entries = scan_all(tmp_path)
    (dropped,) = only(entries, Dropped)
    assert dropped.source_id == "libero_goal/t_demo/demo_1" and says in dropped.reason and dropped.remedy
    assert [ref.metadata["demo"] for ref in only(entries, EpisodeRef)] == [0, 2]


def test_all_problems_of_one_demonstration_come_together(tmp_path: Path):
    bad = demo_arrays(13, 1)
    break_nan(bad)
    break_length(bad)
    write_raw(tmp_path / "libero_goal" / "t_demo.hdf5", {1: bad})
    (dropped,) = scan_all(tmp_path)
    assert "lengths differ" in dropped.reason and "not finite" in dropped.reason


def test_bad_files_are_left_out_whole(tmp_path: Path):
    write_suite(tmp_path, demos=1)
    with h5py.File(tmp_path / "libero_goal" / "no_data_demo.hdf5", "w") as file:
        file.create_group("demos")
    whole = (tmp_path / "libero_goal" / f"{GOAL_TASK}_demo.hdf5").read_bytes()
    (tmp_path / "libero_goal" / "torn_demo.hdf5").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "libero_goal" / "empty_demo.hdf5").write_bytes(b"")
    dropped = {entry.source_id: entry.reason for entry in only(scan_all(tmp_path), Dropped)}
    assert "no group 'data'; found: 'demos'" in dropped["libero_goal/no_data_demo"]
    assert "not a readable HDF5 file" in dropped["libero_goal/torn_demo"]
    assert "not a readable HDF5 file" in dropped["libero_goal/empty_demo"]


def test_a_file_in_the_wrong_suite_folder_is_left_out(tmp_path: Path):
    write_suite(tmp_path, demos=1, suite="libero_object")
    write_suite(tmp_path, demos=1, suite="downloads")
    reasons = sorted(entry.reason for entry in only(scan_all(tmp_path), Dropped))
    assert "folder 'downloads' is no LIBERO suite" in reasons[0]
    assert "wrong suite folder: 'libero_object' holds floor scenes, this file is 'tabletop'" in reasons[1]


def test_a_file_without_attributes_tells_its_scene_by_its_name(tmp_path: Path):
    for suite in ("libero_goal", "libero_90"):
        write_raw(tmp_path / suite / "KITCHEN_SCENE3_t_demo.hdf5", {0: demo_arrays(5)}, regenerated=True)
    (dropped,) = only(scan_all(tmp_path), Dropped)
    assert "'libero_goal' holds tabletop scenes, this file is 'kitchen'" in dropped.reason


def test_a_bddl_path_of_another_suite_is_noted_and_not_believed(tmp_path: Path):
    path = write_suite(tmp_path, demos=1)
    for said, noted in (("libero_spatial/x.bddl", True), ("chiliocosm/bddl_files/libero_100/x.bddl", False)):
        edit(path, lambda file, said=said: file["data"].attrs.__setitem__("bddl_file_name", said))
        (ref,) = scan_all(tmp_path)
        assert ref.metadata["suite"] == "libero_goal"
        assert any("bddl_file_name says" in note for note in ref.warnings) == noted
    itself = np.bytes_(f"libero/libero/bddl_files/libero_spatial/{GOAL_TASK}.bddl")
    edit(path, lambda file: file["data"].attrs.__setitem__("bddl_file_name", itself))
    (dropped,) = scan_all(tmp_path)
    assert "wrong suite folder" in dropped.reason and "'libero_spatial'" in dropped.reason


def test_links_out_of_the_file_are_refused(tmp_path: Path):
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["actions"] = np.zeros((12, 7))
    path = write_suite(tmp_path, demos=1)
    with h5py.File(path, "a") as file:
        del file["data/demo_0/actions"]
        file["data/demo_0/actions"] = h5py.ExternalLink(str(secret), "actions")
    (dropped,) = scan_all(tmp_path)
    assert "link into another file" in dropped.reason and "refused" in dropped.reason


def test_the_real_recordings_scan_without_a_single_complaint(sample_data: Path):
    entries = scan_all(sample_data / "libero")
    assert only(entries, Dropped) == []
    assert len(entries) == 8 and sum(ref.metadata["raw_frames"] for ref in entries) == 924
    assert {ref.instruction for ref in entries} == {
        "put the cream cheese in the bowl",
        "pick up the cream cheese and place it in the basket",
    }


def test_real_values_are_the_raw_ones_cast_to_float32(sample_data: Path):
    for pairing, shift in (("causal", 1), ("as-stored", 0)):
        options = Options(time_pairing=pairing)
        for ref in scan_all(sample_data / "libero", options):
            columns = read(ref, options).columns
            with h5py.File(ref.files[0], locking=False) as file:
                demo = file[f"data/demo_{ref.metadata['demo']}"]
                actions = demo["actions"][shift:].astype(np.float32)
                state = np.concatenate(
                    [demo["obs/ee_states"][()], demo["obs/gripper_states"][()]], axis=1
                ).astype(np.float32)
            assert np.array_equal(columns["action"], actions)
            assert np.array_equal(columns["observation.state"], state[: len(state) - shift])


def test_embodiment_records_the_choices_made():
    assert CONVERTER.embodiment(Options(), "").fps == 20  # published copies that say 10 hold the same rows
    said = CONVERTER.embodiment(replace(Options(), gripper="open-one", drop_noops=True), "").conventions
    assert said["gripper_action"] == {"open": 1, "close": 0} and said["time_pairing"] == "causal"
    assert said["image_rotation"] == "rot180" and "openvla-oft" in said["no_ops"]
