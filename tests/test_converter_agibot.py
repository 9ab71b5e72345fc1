"""AgiBot World: every quirk of the format has a test that fails if it is got wrong."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from dpipe.converters import agibot, load_converter
from dpipe.converters.agibot import Options
from dpipe.converters.agibot_files import segments_of
from dpipe.converters.agibot_proprio import OPTIONAL, gripper_range, load
from dpipe.schemas.episode import Dropped, Episode, EpisodeRef, VideoClip
from dpipe.schemas.errors import DataError, UsageError
from dpipe.schemas.features import check_columns
from PIL import Image
from raw_agibot import EMPTY, MAIN, add_entry, pack, proprio, write_episode, write_h5
from raw_egodex import write_video


def scan_all(raw: Path, **options) -> list[EpisodeRef | Dropped]:
    chosen = Options(**options)
    return [entry for r in agibot.find(raw, chosen) for entry in agibot.scan(r, chosen)]


def only_ref(raw: Path, **options) -> EpisodeRef:
    (entry,) = scan_all(raw, **options)
    assert isinstance(entry, EpisodeRef), entry
    return entry


def only_drop(raw: Path, **options) -> Dropped:
    (entry,) = scan_all(raw, **options)
    assert isinstance(entry, Dropped), entry
    return entry


def episode(raw: Path, **options) -> Episode:
    return agibot.read(only_ref(raw, **options), Options(**options))


def names(variant: str = "gripper") -> tuple[str, ...]:
    return agibot.state_feature(variant).names


# --- layouts ------------------------------------------------------------------------------------------------


def test_state_is_arms_effectors_head_waist_and_action_is_aligned_with_it(tmp_path: Path):
    tree = proprio()
    columns = episode(write_episode(tmp_path, tree=tree)).columns
    state = columns["observation.state"]
    assert state.shape == (60, 20) and len(names()) == 20
    assert names()[14:] == (
        "left_gripper",
        "right_gripper",
        "head_yaw",
        "head_pitch",
        "waist_pitch",
        "waist_lift",
    )
    assert np.allclose(state[:, :14], tree["state/joint/position"])
    assert np.allclose(state[0, 16:], [0.1, 0.4, 0.54, 0.28])
    assert agibot.action_feature("gripper").names == names()


@pytest.mark.parametrize("effector", ["both", "sides", "joints"])
def test_every_layout_of_the_grippers_gives_the_same_columns(tmp_path: Path, effector: str):
    """Variants 1 to 3: effector, left_effector and right_effector, 16 joints with an empty effector."""
    columns = episode(write_episode(tmp_path / effector, effector=effector)).columns
    plain = episode(write_episode(tmp_path / "plain")).columns
    for name, column in plain.items():
        if name not in ("action_sent", "stored_action"):
            assert np.array_equal(columns[name], column), name
    assert columns["observation.state"][45, 14] == 1.0 and columns["action"][25, 14] == 1.0


def test_sixteen_joints_are_two_arms_and_two_grippers(tmp_path: Path):
    columns = episode(write_episode(tmp_path, effector="joints")).columns
    assert np.allclose(columns["observation.state"][:, :14], proprio()["state/joint/position"])
    assert columns["gripper_raw"].max() == 120.0


def test_the_dexterous_hand_is_a_dataset_of_its_own(tmp_path: Path):
    videos = dict.fromkeys(
        ["videos/head_color.mp4", *(f"videos/hand_{s}_fisheye_color.mp4" for s in ("left", "right"))], 60
    )
    tree = proprio(effector="hand")
    write_episode(tmp_path, tree=tree, videos=videos, task=475)
    ref = only_ref(tmp_path)
    assert ref.variant == "dexhand" and not ref.warnings
    assert [camera.key for camera in ref.cameras] == ["head", "hand_left_fisheye", "hand_right_fisheye"]
    columns = episode(tmp_path).columns
    assert columns["observation.state"].shape == (60, 30) and "gripper_raw" not in columns
    assert np.allclose(columns["observation.state"][:, 14:26], tree["state/effector/position"])
    assert np.allclose(columns["action"][:, 14:26], tree["action/effector/position"])
    assert not any("gripper" in name for name in names("dexhand"))


def test_touch_is_a_dataset_of_its_own_with_its_four_sensors(tmp_path: Path):
    videos = {f"videos/{camera}_color.mp4": 60 for camera in MAIN}
    videos |= {f"tactile/{side}_sensor_{i}.mp4": 60 for side in ("left", "right") for i in (1, 2)}
    write_episode(tmp_path, task=666, videos=videos)
    ref = only_ref(tmp_path)
    assert ref.variant == "tactile" and len(ref.cameras) == 7
    assert agibot.embodiment(Options(), ref.variant).name == "agibot-tactile"
    (tmp_path / "observations/666/648649/tactile/left_sensor_1.mp4").unlink()
    assert "no tactile/left_sensor_1.mp4" in only_drop(tmp_path).reason


def test_a_task_listed_as_another_kind_is_noted_and_the_file_believed(tmp_path: Path):
    write_episode(tmp_path, task=475)
    ref = only_ref(tmp_path)
    assert ref.variant == "gripper" and "listed as dexhand" in ref.warnings[0]


# --- actions ------------------------------------------------------------------------------------------------


def test_where_the_arm_action_is_the_state_the_next_state_is_taken_and_the_command_kept(tmp_path: Path):
    tree = proprio()
    write_episode(tmp_path, tree=tree)
    columns = episode(tmp_path).columns
    joint = tree["state/joint/position"].astype(np.float32)
    assert np.array_equal(columns["action"][:-1, :14], joint[1:])
    assert np.array_equal(columns["action"][-1, :14], joint[-1])  # the last repeated
    assert np.array_equal(columns["action"][:, 14:16], tree["action/effector/position"])  # not shifted
    assert np.array_equal(columns["next_end_pose"][:-1], columns["end_pose"][1:])
    assert np.array_equal(columns["stored_action"][:, :14], joint)  # as the file has it
    rule = agibot.embodiment(Options(), "gripper").conventions["action_rule"]
    assert rule == {"arms, head, waist": "next state, the last repeated", "effector": "command as stored"}


def test_as_stored_keeps_the_identity_and_says_what_it_is(tmp_path: Path):
    write_episode(tmp_path)
    ref = only_ref(tmp_path, action="as-stored")
    columns = episode(tmp_path, action="as-stored").columns
    assert np.array_equal(columns["action"][:, :14], columns["observation.state"][:, :14])
    assert "stand still" in ref.warnings[0]
    assert agibot.embodiment(Options(action="as-stored"), "gripper").conventions["action_rule"][
        "arms, head, waist"
    ] == ("as stored in the file")


def lead(tree) -> None:
    tree["action/joint/position"] = tree["action/joint/position"] + 0.05


def test_an_arm_action_of_its_own_makes_another_dataset_so_that_each_has_one_rule(tmp_path: Path):
    write_episode(tmp_path, 648649)
    write_episode(tmp_path, 648650, change=lead)
    same, own = scan_all(tmp_path)
    assert isinstance(same, EpisodeRef) and isinstance(own, EpisodeRef)
    assert (same.variant, own.variant) == ("gripper", "gripper-commanded")
    assert own.metadata["arm_action_is_state"] is False and "0.05 rad" in own.warnings[0]
    columns = agibot.read(own, Options()).columns
    assert np.allclose(columns["action"][:, :14], columns["observation.state"][:, :14] + 0.05, atol=1e-6)
    # Told to, one rule covers both.
    assert {ref.variant for ref in scan_all(tmp_path, action="next-state")} == {"gripper"}  # type: ignore[union-attr]
    forced = agibot.read(own, Options(action="next-state"))
    assert forced.ref.variant == "gripper-commanded"


def test_short_action_arrays_are_scattered_by_their_index_over_the_state(tmp_path: Path):
    """Variant 4, Alpha: M rows for N frames; `end` without an index of its own goes by the joints'."""
    index = np.array([3, 4, 10])

    def shorten(tree):
        for name in ("action/joint/position", "action/end/position", "action/end/orientation"):
            tree[name] = tree[name][index]
        tree["action/joint/position"] = tree["action/joint/position"] + 0.5
        tree["action/joint/index"], tree["action/end/index"] = index, EMPTY

    write_episode(tmp_path, change=shorten)
    columns = episode(tmp_path, action="as-stored").columns
    moved = columns["action"][:, 0] - columns["observation.state"][:, 0]
    assert np.flatnonzero(np.abs(moved) > 0.1).tolist() == [3, 4, 10]
    sent = columns["action_sent"]
    groups = agibot.ACTION_SENT.names
    assert np.flatnonzero(sent[:, groups.index("joint")]).tolist() == [3, 4, 10]
    assert np.flatnonzero(sent[:, groups.index("end")]).tolist() == [3, 4, 10]
    assert sent[:, groups.index("effector")].all()


@pytest.mark.parametrize("effector", ["both", "sides", "joints"])
def test_a_gripper_command_that_was_not_sent_again_still_holds(tmp_path: Path, effector: str):
    """A gripper told 1 reads 120: gaps in its commands cannot be filled from its state."""
    index = np.array([5, 22, 45])  # told open, close, open

    groups = {"both": ["effector"], "sides": ["left_effector", "right_effector"], "joints": ["joint"]}[
        effector
    ]

    def shorten(tree):
        for group in groups:
            tree[f"action/{group}/position"] = tree[f"action/{group}/position"][index]
            tree[f"action/{group}/index"] = index

    write_episode(tmp_path, change=shorten, effector=effector)
    command = episode(tmp_path).columns["action"][:, 14]
    assert command.tolist() == [0.0] * 22 + [1.0] * 23 + [0.0] * 15


def test_full_arrays_with_a_shorter_index_stay_full_and_keep_the_index_as_a_mask(tmp_path: Path):
    columns = episode(write_episode(tmp_path)).columns
    assert columns["action_sent"][:, 0].tolist() == [False, False] + [True] * 58


@pytest.mark.parametrize("how", ["empty", "repeats its state"])
def test_grippers_without_a_command_make_a_dataset_of_their_own(tmp_path: Path, how: str):
    """Sixteen joints whose action is their state say nothing of what the grippers were told."""

    def change(tree):
        if how == "empty":
            tree["action/effector/position"] = EMPTY
        else:
            tree["action/joint/position"] = tree["state/joint/position"]

    write_episode(tmp_path, change=change, effector="both" if how == "empty" else "joints")
    ref = only_ref(tmp_path)
    assert ref.variant == "gripper-untold" and ref.metadata["effector_command"] is False
    columns = agibot.read(ref, Options()).columns
    assert np.array_equal(columns["action"][:-1, 14:16], columns["observation.state"][1:, 14:16])
    rule = agibot.embodiment(Options(), ref.variant).conventions["action_rule"]["effector"]
    assert rule == "next state, the last repeated"
    assert [camera.key for camera in ref.cameras] == list(MAIN)


def cut_index(tree) -> None:
    tree["action/joint/position"] = tree["action/joint/position"][:40]


def longer(tree) -> None:
    tree["action/joint/position"] = np.concatenate([tree["action/joint/position"]] * 2)


def drop_rows(name: str):
    def change(tree):
        tree[name] = tree[name][:-1]

    return change


def put(name: str, value):
    def change(tree):
        tree[name] = np.asarray(value)

    return change


def spoil(name: str, at, value):
    def change(tree):
        tree[name] = tree[name].copy()
        tree[name][at] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (longer, "120 rows for 60 frames of state: a corrupt recording"),  # variant 5
        (cut_index, "40 rows for 60 frames and an index of 58"),
        (drop_rows("state/head/position"), "state/head/position has 59 rows, timestamp 60"),
        (put("state/head/position", EMPTY), "state/head/position is missing or empty"),
        (put("state/joint/position", np.zeros((60, 13))), "expected (N, 14) or (N, 16)"),
        (put("state/effector/position", EMPTY), "no effector state"),
        (put("timestamp", np.zeros(0, np.int64)), "timestamp is int64 (0,)"),
        (spoil("timestamp", 5, 0), "timestamp does not rise at row 5"),
        (spoil("state/joint/position", (7, 2), np.nan), "not finite in 1 rows, first at row 7"),
        (spoil("state/end/orientation", (9, 1), 0.0), "no unit quaternion in 1 rows, first 9"),
        (spoil("action/effector/position", (3, 0), 120.0), "expected 0 (open) to 1 (closed)"),
        (spoil("action/joint/index", 3, 0), "not a rising list of rows"),
    ],
)
def test_recordings_that_contradict_themselves_are_left_out(tmp_path: Path, change, words):
    write_episode(tmp_path, change=change)
    assert words in only_drop(tmp_path).reason


# --- missing is not zero ------------------------------------------------------------------------------------


def test_empty_arrays_are_masked_and_no_quaternion_is_ever_zero(tmp_path: Path):
    """Variant 6: no odometry."""

    def change(tree):
        for name in ("state/robot/position", "state/robot/orientation", "action/robot/velocity"):
            tree[name] = EMPTY

    columns = episode(write_episode(tmp_path, change=change)).columns
    recorded = dict(zip(agibot.RECORDED.names, columns["recorded"][0].tolist(), strict=True))
    assert recorded == dict.fromkeys(agibot.RECORDED.names, False) | {"joint_current": True}
    assert columns["base_pose"][0].tolist() == [0, 0, 0, 0, 0, 0, 1]
    assert not columns["action_sent"][:, agibot.ACTION_SENT.names.index("robot")].any()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("action/robot/velocity", np.zeros(60), "action/robot/velocity is float64 (60,)"),
        ("action/robot/velocity", np.zeros((80, 2)), "80 rows for 60 frames"),
        ("state/end/wrench", np.zeros((60, 14)), "state/end/wrench is float64 (60, 14)"),
        ("state/joint/current_value", np.full((60, 14), np.nan), "current_value is not finite"),
        ("state/robot/position", np.zeros((59, 3)), "59 rows, timestamp 60"),
    ],
)
def test_what_an_episode_can_do_without_never_costs_it(tmp_path: Path, name: str, value, says: str):
    write_episode(tmp_path, change=put(name, value))
    ref = only_ref(tmp_path)
    assert any(says in note and "not kept" in note for note in ref.warnings)
    columns = agibot.read(ref, Options()).columns
    kept = dict(zip(agibot.RECORDED.names, columns["recorded"][0].tolist(), strict=True))
    group = {"robot/v": "base_velocity", "end/w": "wrench", "joint/": "joint_current", "robot/p": "base_pose"}
    assert not kept[next(column for part, column in group.items() if part in name)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_numbers_of_any_width_and_groups_nobody_asked_for_are_read(tmp_path: Path, dtype: type):
    def change(tree):
        for name, array in tree.items():
            if array.dtype == np.float64:
                tree[name] = array.astype(dtype if "orientation" not in name else np.float32)
        tree["timestamp"] = tree["timestamp"].astype(np.uint64)
        tree["state/end/arm_position"] = np.zeros((3, 7))
        tree["state/hand/pressure"] = np.zeros(5)

    ref = only_ref(write_episode(tmp_path, change=change))
    assert ref.variant == "gripper" and not ref.warnings
    assert agibot.read(ref, Options()).columns["capture_time_ns"].dtype == np.int64


def test_keys_that_are_absent_count_as_the_empty_arrays_of_other_files(tmp_path: Path):
    def change(tree):
        for name in list(tree):
            if tree[name].size == 0 or (name.startswith("action/") and "effector" not in name):
                del tree[name]

    ref = only_ref(write_episode(tmp_path, change=change))
    assert ref.variant == "gripper" and "no action for joint, end, head, waist" in ref.warnings[0]
    sent = agibot.read(ref, Options()).columns["action_sent"]
    assert sent[:, agibot.ACTION_SENT.names.index("effector")].all() and not sent[:, 0].any()


def test_a_quaternion_of_zeros_counts_as_not_recorded(tmp_path: Path):
    columns = episode(
        write_episode(tmp_path, change=put("state/robot/orientation", np.zeros((60, 4))))
    ).columns
    assert not columns["recorded"][:, 0].any() and columns["base_pose"][0, 6] == 1.0


def test_what_is_recorded_is_kept(tmp_path: Path):
    write_episode(tmp_path, change=put("state/end/wrench", np.full((60, 12), 3.0)))
    write_parameters(tmp_path, 60)
    columns = episode(tmp_path).columns
    assert columns["recorded"].all()
    assert columns["base_pose"][0].tolist() == pytest.approx([0.3, 0.1, 0, 0, 0, 0.6, 0.8])
    assert columns["base_velocity"][0].tolist() == pytest.approx([0.2, -0.1])
    assert (columns["wrench"] == 3.0).all()


def test_true_times_are_kept_beside_the_nominal_rate(tmp_path: Path):
    tree = proprio()
    tree["timestamp"][30:] += 33_000_000  # one frame was lost
    write_episode(tmp_path, tree=tree)
    ref = only_ref(tmp_path)
    assert np.array_equal(agibot.read(ref, Options()).columns["capture_time_ns"], tree["timestamp"])
    assert 60 < ref.metadata["largest_gap_ms"] < 75


# --- grippers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grippers", "name"), [((0, 120), "0:120"), ((35, 120), "35:120"), ((35, 123), "35:120")]
)
def test_each_gripper_is_scaled_by_its_own_range(tmp_path: Path, grippers, name):
    """Dividing by 120 would show a fully open older gripper as 0.29 closed."""
    write_episode(tmp_path, grippers=grippers)
    ref = only_ref(tmp_path)
    assert ref.metadata["gripper_range"] == name and not ref.warnings
    columns = agibot.read(ref, Options()).columns
    assert columns["observation.state"][0, 14] == 0.0
    assert columns["observation.state"][45, 14] == pytest.approx(1.0, abs=0.05)
    assert columns["gripper_raw"][0, 0] == grippers[0]


def test_a_newer_gripper_that_never_opens_wide_is_told_by_its_commands():
    command = np.full((100, 2), 0.3)
    assert gripper_range(np.full((100, 2), 36.0), command)[0] == "0:120"
    assert gripper_range(np.full((100, 2), 60.5), command)[0] == "35:120"


def test_grippers_that_stay_closed_show_nothing_and_say_so():
    for command in (np.ones((100, 2)), None):
        name, note = gripper_range(np.full((100, 2), 118.0), command)
        assert name == "0:120" and "never open" in note
    assert gripper_range(np.full((100, 2), 36.0), None)[0] == "35:120"


@pytest.mark.parametrize("grippers", [(-0.785, 0.0), (0.0, -0.785), (0.0, 1.0)])
def test_readings_in_radians_or_fractions_are_not_taken_for_a_gripper_that_never_closes(
    tmp_path: Path, grippers
):
    write_episode(tmp_path, grippers=grippers)
    assert "radians perhaps" in only_drop(tmp_path).reason
    columns = episode(tmp_path, gripper_range=f"{grippers[0]}:{grippers[1]}").columns
    assert columns["observation.state"][[0, 45], 14].tolist() == pytest.approx([0.0, 1.0])
    # Left open, or told to close with no time to follow, a newer gripper reads as little.
    still = np.zeros((40, 2))
    assert gripper_range(still - 0.2, still)[0] == "0:120"
    assert gripper_range(still, np.repeat([0.0, 1.0], [35, 5])[:, None].repeat(2, axis=1))[0] == "0:120"


def test_sixteen_joints_may_have_their_commands_beside_them(tmp_path: Path):
    """Readings among the joints, commands in action/effector; or no command, and an action of 14 joints."""

    def beside(tree):
        tree["action/effector/position"] = tree["action/joint/position"][:, 14:]
        tree["action/joint/position"] = tree["state/joint/position"]

    write_episode(tmp_path / "beside", effector="joints", change=beside)
    plain = episode(write_episode(tmp_path / "plain")).columns["action"]
    assert np.array_equal(episode(tmp_path / "beside").columns["action"], plain)

    def fourteen(tree):
        tree["action/joint/position"] = tree["state/joint/position"][:, :14]

    write_episode(tmp_path / "fourteen", effector="joints", change=fourteen)
    assert only_ref(tmp_path / "fourteen").variant == "gripper-untold"


def test_readings_of_no_known_gripper_need_the_user(tmp_path: Path):
    write_episode(tmp_path, grippers=(-600.0, 0.0))
    assert "--gripper-range" in only_drop(tmp_path).reason
    columns = episode(tmp_path, gripper_range="-600:0").columns
    assert columns["observation.state"][0, 14] == 0.0 and columns["observation.state"][45, 14] == 1.0
    with pytest.raises(UsageError, match="OPEN:CLOSED"):
        list(agibot.find(tmp_path, Options(gripper_range="wide")))


# --- words --------------------------------------------------------------------------------------------------


def test_the_task_is_the_instruction_and_action_config_its_segments(tmp_path: Path):
    write_episode(tmp_path)
    ref = only_ref(tmp_path)
    assert ref.instruction == "Pickup items in the supermarket"
    assert [s.to_json() for s in ref.segments] == [
        {"start": 8, "stop": 30, "text": "Pick up the apple.", "task": "Pick"},
        {"start": 30, "stop": 55, "text": "Place it in the bag.", "task": "Place"},
    ]
    scene = "The robot stands in front of the fruit stand."
    assert (
        only_ref(tmp_path, instruction="task-scene").instruction
        == f"Pickup items in the supermarket | {scene}"
    )
    assert ref.metadata["init_scene"] == scene


def stretch(start: int, end: int) -> dict:
    return {"start_frame": start, "end_frame": end, "action_text": f"{start}", "skill": "Pick"}


def test_shared_borders_are_half_open_and_inclusive_ones_move_by_one():
    shared, _ = segments_of([stretch(8, 218), stretch(218, 436)], 500)
    assert [(s.start, s.stop) for s in shared] == [(8, 218), (218, 436)]
    inclusive, _ = segments_of([stretch(18, 254), stretch(255, 553)], 600)
    assert [(s.start, s.stop) for s in inclusive] == [(18, 255), (255, 554)]


def test_segments_beyond_the_episode_are_cut_or_left_out_and_said():
    segments, notes = segments_of([stretch(0, 40), stretch(40, 80), stretch(90, 99), {"skill": "x"}], 60)
    assert [(s.start, s.stop) for s in segments] == [(0, 40), (40, 60)]
    assert len(notes) == 3 and "cut at frame 60" in " ".join(notes)


def test_an_episode_without_entry_or_file_is_left_out(tmp_path: Path):
    write_episode(tmp_path, entry={"episode_id": 1})
    assert "task_327.json has no entry for this episode" in only_drop(tmp_path).reason
    (tmp_path / "task_info" / "task_327.json").write_text('{"data": 1}')
    assert "expected a list of entries" in only_drop(tmp_path).reason
    (tmp_path / "task_info" / "task_327.json").unlink()
    assert "task_info/task_327.json is missing" in only_drop(tmp_path).reason


def test_one_odd_entry_of_task_info_costs_no_other_episode(tmp_path: Path):
    write_episode(tmp_path, 5)
    write_episode(tmp_path, 6, entry={"episode_id": "6", "task_name": None})
    path = tmp_path / "task_info" / "task_327.json"
    entries = [*json.loads(path.read_text()), {"episode_id": None}, {"task_name": "x"}, 7]
    path.write_text("\ufeff" + json.dumps(entries), encoding="utf-8")  # as some editors save it
    first, second = scan_all(tmp_path)
    assert isinstance(first, EpisodeRef) and first.source_id == "327/5"
    assert isinstance(second, Dropped) and "no task_name for this episode" in second.reason


def test_entries_without_labels_or_with_fields_of_other_releases_are_read(tmp_path: Path):
    write_episode(tmp_path, entry={"episode_id": 648649, "label_info": None, "key_frame": [1]})
    assert only_ref(tmp_path).segments == ()


# --- videos -------------------------------------------------------------------------------------------------


def test_cameras_are_taken_as_they_lie(tmp_path: Path):
    write_episode(tmp_path)
    clips = episode(tmp_path).cameras
    assert list(clips) == ["head", "hand_left", "hand_right"]
    path = tmp_path / "observations/327/648649/videos/hand_left_color.mp4"
    assert clips["hand_left"] == VideoClip(path, 0, path.stat().st_size, 0, 60, 48, 64)


def test_a_missing_video_is_a_reason_and_all_reasons_are_told(tmp_path: Path):
    write_episode(tmp_path, videos={"videos/head_color.mp4": 59}, change=put("state/head/position", EMPTY))
    reason = only_drop(tmp_path).reason
    assert "state/head/position is missing" in reason
    shutil.rmtree(tmp_path)
    write_episode(tmp_path, videos={"videos/head_color.mp4": 59})
    reason = only_drop(tmp_path).reason
    assert "no videos/hand_left_color.mp4, videos/hand_right_color.mp4" in reason
    assert "videos/head_color.mp4 has 59 frames, the recording 60" in reason


def test_a_corrupt_video_is_a_reason(tmp_path: Path):
    write_episode(tmp_path)
    path = tmp_path / "observations/327/648649/videos/head_color.mp4"
    path.write_bytes(path.read_bytes()[:200])
    assert "videos/head_color.mp4" in only_drop(tmp_path).reason


def test_all_cameras_are_asked_for_by_name_and_must_all_be_there(tmp_path: Path):
    names = [*MAIN, *agibot.FISHEYES]
    write_episode(tmp_path, videos={f"videos/{camera}_color.mp4": 60 for camera in names})
    assert len(only_ref(tmp_path, cameras="all").cameras) == 8
    assert len(only_ref(tmp_path).cameras) == 3
    (tmp_path / "observations/327/648649/videos/back_left_fisheye_color.mp4").unlink()
    assert "no videos/back_left_fisheye_color.mp4" in only_drop(tmp_path, cameras="all").reason


def test_numbers_without_videos_and_videos_without_numbers_are_reported(tmp_path: Path):
    write_episode(tmp_path, 1)
    write_episode(tmp_path, 2)
    shutil.rmtree(tmp_path / "observations/327/1")
    shutil.rmtree(tmp_path / "proprio_stats/327/2")
    first, second = scan_all(tmp_path)
    assert (
        isinstance(first, Dropped)
        and first.source_id == "327/1"
        and "no videos/head_color.mp4" in first.reason
    )
    assert isinstance(second, Dropped) and "no proprio_stats.h5" in second.reason


def test_a_task_of_numbers_alone_is_one_line_not_thousands(tmp_path: Path):
    for number in (1, 2, 3):
        write_episode(tmp_path, number)
    shutil.rmtree(tmp_path / "observations")
    assert "3 episodes in proprio_stats, but no observations of this task" in only_drop(tmp_path).reason


def test_depth_is_a_camera_on_request_and_its_pictures_are_counted(tmp_path: Path):
    write_episode(tmp_path)
    folder = tmp_path / "observations/327/648649/depth"
    folder.mkdir()
    for t in range(60):
        Image.fromarray(np.full((4, 6), 1000 * (t % 6), np.uint16)).save(folder / f"head_depth_{t:06d}.png")
    ref = only_ref(tmp_path, depth=True)
    assert [(c.key, c.height, c.width) for c in ref.cameras][-1] == ("head_depth", 4, 6)
    source = agibot.read(ref, Options(depth=True)).cameras["head_depth"]
    assert source.read(0, 6)[:, 0, 0, 0].tolist() == [0, 51, 102, 153, 204, 255]  # type: ignore[union-attr]
    middle = source.read(3, 9)  # type: ignore[union-attr]
    pack(tmp_path)
    packed = agibot.read(only_ref(tmp_path, depth=True), Options(depth=True)).cameras["head_depth"]
    assert np.array_equal(packed.read(3, 9), middle)  # type: ignore[union-attr]
    assert len(only_ref(tmp_path).cameras) == 3


def test_missing_depth_matters_only_to_who_asks(tmp_path: Path):
    write_episode(tmp_path)
    assert "0 depth pictures for 60 frames" in only_drop(tmp_path, depth=True).reason
    assert only_ref(tmp_path).frames == 60


# --- places -------------------------------------------------------------------------------------------------


def write_parameters(raw: Path, frames: int, wrapped: bool = True, nested: bool = True, **changes) -> None:
    """The head's camera at (t / 10, 0, 1), looking along the base's x; the hands' likewise."""
    folder = raw / "parameters/327/648649" / ("parameters/camera" if nested else "camera")
    folder.mkdir(parents=True)
    look = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]  # columns: right in the picture is -y, down -z, forward x
    for camera in ("head", "hand_left", "hand_right"):
        each = [{"rotation_matrix": look, "translation_vector": [t / 10, 0, 1]} for t in range(frames)]
        each = changes.get(camera, each)
        constants = {"fx": 322.0, "fy": 323.0, "ppx": 320.0, "ppy": 240.0, "distortion_model": "none"}
        aligned = [{"extrinsic": entry} for entry in each] if wrapped else each
        told = {"intrinsic": constants} if wrapped else constants
        (folder / f"{camera}_extrinsic_params_aligned.json").write_text(json.dumps(aligned))
        (folder / f"{camera}_intrinsic_params.json").write_text(json.dumps(told))


@pytest.mark.parametrize(("wrapped", "nested"), [(True, True), (False, True), (True, False)])
def test_camera_parameters_are_kept_with_and_without_their_wrappers(tmp_path: Path, wrapped, nested):
    write_episode(tmp_path, frames=30)
    write_parameters(tmp_path, 30, wrapped, nested)
    ref = only_ref(tmp_path)
    assert ref.metadata["intrinsics"]["hand_left"] == [322.0, 323.0, 320.0, 240.0]
    columns = agibot.read(ref, Options()).columns
    pose = dict(zip(agibot.CAMERA_POSE.names, columns["camera_pose"][7].tolist(), strict=True))
    assert (pose["head_x"], pose["hand_right_z"]) == (pytest.approx(0.7), 1.0)
    assert [pose[f"head_rot6d_{i}"] for i in range(3)] == [0, -1, 0]  # right in the picture is the base's -y
    assert columns["recorded"][0][OPTIONAL.index("camera_pose")]


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (
            [{"rotation_matrix": np.eye(3).tolist(), "translation_vector": [0, 0, 0]}] * 29,
            "29 entries for 30",
        ),
        (
            [{"rotation_matrix": np.ones((3, 3)).tolist(), "translation_vector": [0, 0, 0]}] * 30,
            "no pose in 30",
        ),
        ([{"rotation": 1}] * 30, "without rotation_matrix"),
    ],
)
def test_camera_parameters_that_are_none_are_noted_and_masked(tmp_path: Path, head, says: str):
    write_episode(tmp_path, frames=30)
    write_parameters(tmp_path, 30, head=head)
    ref = only_ref(tmp_path)
    assert any(says in note for note in ref.warnings)
    columns = agibot.read(ref, Options()).columns
    assert not columns["recorded"][0][OPTIONAL.index("camera_pose")]
    assert columns["camera_pose"][0][:9].tolist() == [0, 0, 0, 1, 0, 0, 0, 1, 0]


def test_tars_are_read_in_place_and_give_what_their_folders_give(tmp_path: Path):
    for number in (648649, 648650):
        write_episode(tmp_path, number, seed=number)
    write_parameters(tmp_path, 60)
    folders = [agibot.read(ref, Options()) for ref in scan_all(tmp_path) if isinstance(ref, EpisodeRef)]
    clips = [folder.cameras["head"].path.read_bytes() for folder in folders]  # type: ignore[union-attr]
    pack(tmp_path)
    refs = scan_all(tmp_path)
    assert [ref.source_id for ref in refs] == ["327/648649", "327/648650"]
    posed = [folder.columns["recorded"][0][OPTIONAL.index("camera_pose")] for folder in folders]
    assert posed == [True, False]
    for ref, expected, data in zip(refs, folders, clips, strict=True):
        assert isinstance(ref, EpisodeRef)
        found = agibot.read(ref, Options())
        for name, column in expected.columns.items():
            assert np.array_equal(found.columns[name], column)
        clip = found.cameras["head"]
        assert isinstance(clip, VideoClip) and clip.path.suffix == ".tar"
        assert clip.path.read_bytes()[clip.offset : clip.offset + clip.size] == data


def test_folders_of_a_tars_range_are_looked_into(tmp_path: Path):
    """Observations are packed as <task>/<range>.tar, the rest as <range>.tar: so lie the folders left behind."""
    write_episode(tmp_path, frames=30)
    write_parameters(tmp_path, 30)
    plain = agibot.read(only_ref(tmp_path), Options()).columns
    episode_folder = tmp_path / "observations/327/648649"
    shutil.move(episode_folder, tmp_path / "observations/327/648642-648700/648649")
    for kind in ("proprio_stats", "parameters"):
        shutil.move(tmp_path / kind / "327", tmp_path / kind / "648533-713949" / "327")
    found = agibot.read(only_ref(tmp_path), Options()).columns
    assert all(np.array_equal(found[name], column) for name, column in plain.items())
    assert found["recorded"][0][OPTIONAL.index("camera_pose")]


def test_numbers_unpacked_beside_packed_videos_are_found_and_missing_ones_told(tmp_path: Path):
    for number in (5, 6, 9):
        write_episode(tmp_path, number)
    shutil.copytree(tmp_path / "proprio_stats/327", tmp_path / "kept")
    shutil.rmtree(tmp_path / "observations/327/6")
    pack(tmp_path)
    (tmp_path / "proprio_stats/5-9.tar").unlink()
    shutil.move(tmp_path / "kept", tmp_path / "proprio_stats/327")
    found = scan_all(tmp_path)
    assert [(e.source_id, isinstance(e, EpisodeRef)) for e in found] == [
        ("327/5", True),
        ("327/6", False),
        ("327/9", True),
    ]


def test_a_torn_tar_converts_what_is_whole_and_says_so(tmp_path: Path):
    for number in (5, 6):
        write_episode(tmp_path, number)
    pack(tmp_path)
    path = tmp_path / "observations/327/5-6.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    first, second = scan_all(tmp_path)
    assert isinstance(first, EpisodeRef) and "5-6.tar ends" in first.warnings[0]
    assert isinstance(second, Dropped)


def test_an_episode_both_packed_and_unpacked_is_converted_once(tmp_path: Path):
    write_episode(tmp_path, 5)
    shutil.copytree(tmp_path / "observations/327/5", tmp_path / "kept")
    pack(tmp_path)
    shutil.move(tmp_path / "kept", tmp_path / "observations/327/5")
    assert [path.suffix for path in only_ref(tmp_path).files[1:4]] == [".mp4"] * 3


def test_a_range_folder_left_by_unpacking_is_looked_into(tmp_path: Path):
    write_episode(tmp_path, 743559, task=475)
    inner = tmp_path / "observations/475/702578-743685"
    inner.mkdir()
    shutil.move(tmp_path / "observations/475/743559", inner / "743559")
    assert only_ref(tmp_path).source_id == "475/743559"


def test_episodes_and_tasks_come_in_the_order_of_their_numbers(tmp_path: Path):
    for task, number in ((1000, 3), (327, 10), (327, 9)):
        write_episode(tmp_path, number, task=task)
    assert [ref.source_id for ref in scan_all(tmp_path)] == ["327/9", "327/10", "1000/3"]


def test_releases_side_by_side_keep_their_names(tmp_path: Path):
    for release in ("AgiBotWorld-Alpha", "AgiBotWorld-Beta"):
        write_episode(tmp_path / release, 5)
    assert [ref.source_id for ref in scan_all(tmp_path)] == [
        "AgiBotWorld-Alpha/327/5",
        "AgiBotWorld-Beta/327/5",
    ]


def test_a_torn_proprio_file_is_a_reason(tmp_path: Path):
    write_episode(tmp_path)
    path = tmp_path / "proprio_stats/327/648649/proprio_stats.h5"
    path.write_bytes(path.read_bytes()[:500])
    assert "not a readable HDF5 file" in only_drop(tmp_path).reason


@pytest.mark.parametrize("effector", ["both", "hand"])
@pytest.mark.parametrize("action", ["auto", "next-state", "as-stored"])
def test_columns_match_their_declaration(tmp_path: Path, effector: str, action: str):
    hands = ("hand_left_fisheye", "hand_right_fisheye") if effector == "hand" else ("hand_left", "hand_right")
    videos = {f"videos/{camera}_color.mp4": 60 for camera in ("head", *hands)}
    write_episode(tmp_path, effector=effector, videos=videos)
    ref = only_ref(tmp_path, action=action)
    found, body = episode(tmp_path, action=action), agibot.embodiment(Options(action=action), ref.variant)
    assert check_columns((*body.features, *body.sidecar), dict(found.columns), found.frames) == []
    assert body.licence == "cc-by-nc-sa-4.0" and body.fps == 30 and body.robot_type == "a2d"


def test_a_file_that_changed_after_the_scan_is_refused(tmp_path: Path):
    write_episode(tmp_path)
    ref = only_ref(tmp_path)
    write_h5(tmp_path / "proprio_stats/327/648649/proprio_stats.h5", proprio(50))
    with pytest.raises(DataError, match="changed"):
        agibot.read(ref, Options())


def test_the_converter_is_listed(tmp_path: Path):
    assert load_converter("agibot").name == "agibot"
    assert list(agibot.find(tmp_path, Options())) == []


# --- the real recording -------------------------------------------------------------------------------------


def test_the_real_recording_is_read_in_full(sample_data: Path, tmp_path: Path):
    source = sample_data / "agibot" / "proprio_stats.h5"
    with h5py.File(source) as file:
        raw, problems = load(file)
        stored = {
            name: file[name][()] for name in ("state/joint/position", "state/end/orientation", "timestamp")
        }
        index = file["action/joint/index"][()]
    assert problems == [] and raw is not None and raw.frames == 1990
    # Every populated array of the file is somewhere in what was read.
    assert np.array_equal(raw.joint, stored["state/joint/position"])
    assert np.array_equal(raw.end.reshape(-1, 2, 7)[:, :, 3:], stored["state/end/orientation"])
    assert set(raw.optional) == {"base_pose", "base_velocity", "joint_current", "wrench"}
    assert np.array_equal(np.flatnonzero(raw.sent[:, 0]), index) and len(index) == 1925
    assert raw.notes == []

    folder = tmp_path / "proprio_stats" / "327" / "1"
    folder.mkdir(parents=True)
    shutil.copy(source, folder)
    videos = tmp_path / "observations" / "327" / "1" / "videos"
    videos.mkdir(parents=True)
    write_video(videos / "head_color.mp4", 1990)
    for camera in MAIN[1:]:
        shutil.copy(videos / "head_color.mp4", videos / f"{camera}_color.mp4")
    add_entry(tmp_path, 327, {"episode_id": 1})
    ref = only_ref(tmp_path)
    assert ref.variant == "gripper" and ref.frames == 1990
    assert ref.metadata["gripper_range"] == "0:120" and ref.metadata["arm_action_is_state"] is True
    columns = agibot.read(ref, Options()).columns
    assert np.array_equal(columns["capture_time_ns"], stored["timestamp"])
    assert np.array_equal(columns["action"][:-1, :14], columns["observation.state"][1:, :14])
    state, command = columns["observation.state"][:, 14], columns["action"][:, 14]
    assert state.min() >= 0 and state.max() <= 1
    # A closing gripper follows its command some ten frames later: same sense, not the opposite.
    assert np.corrcoef(command[:-10], state[10:])[0, 1] > 0.8
    assert json.dumps(ref.locator) and json.dumps(ref.metadata)
