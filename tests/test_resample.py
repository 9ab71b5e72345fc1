"""`--fps`: every k-th frame, targets reached as the next step begins, moves summed; refused where neither fits."""

import json
from pathlib import Path

import numpy as np
import pytest
import raw_agibot
import raw_calvin
import raw_egodex
from dpipe.converters import load_converter
from dpipe.converters.resample import column_rules, step_frames, thin_column
from dpipe.pipeline.payload import VideoOptions
from dpipe.schemas.errors import UsageError
from dpipe.streams.dataset import open_dataset
from hypothesis import given
from hypothesis import strategies as st
from small_datasets import number_of, write_dataset
from trees import run_convert


@given(frames=st.integers(1, 40), every=st.integers(1, 5))
def test_each_step_is_whole_and_the_three_rules_look_where_they_say(frames: int, every: int):
    steps = frames // every
    values = np.stack([np.arange(frames), np.arange(frames)], axis=1).astype(np.float32)
    names = ("delta_x", "gripper")
    first = np.arange(steps) * every
    assert thin_column(values, steps, every)[:, 0].tolist() == first.tolist()
    assert thin_column(values, steps, every, "end")[:, 0].tolist() == (first + every - 1).tolist()
    summed = thin_column(values, steps, every, "sum", names)
    assert summed[:, 0].tolist() == [sum(range(t, t + every)) for t in first]
    assert summed[:, 1].tolist() == (first + every - 1).tolist()  # a gripper's command is its last


def test_only_whole_parts_of_the_recorded_rate_are_taken():
    assert [step_frames(30, fps) for fps in (30, 15, 10, 1)] == [1, 2, 3, 30]
    for fps in (20, 60, 0):
        with pytest.raises(UsageError, match=r"no whole part.*\n  possible: 30, 15, 10"):
            step_frames(30, fps)


def columns_of(source: str, raw: Path, **options) -> list[tuple]:
    converter = load_converter(source)
    chosen = converter.Options(**options)
    return [
        (ref, converter.read(ref, chosen))
        for recording in converter.find(raw, chosen)
        for ref in converter.scan(recording, chosen)
    ]


def test_a_next_state_is_the_state_of_the_next_step(tmp_path: Path):
    raw_egodex.write_episode(tmp_path / "raw/part2/pour/0", frames=9)
    (whole, full), (ref, thin) = columns_of("egodex", tmp_path / "raw") + columns_of(
        "egodex@15", tmp_path / "raw"
    )
    assert (whole.frames, ref.frames) == (9, 4)
    state = full.columns["observation.state"]
    assert np.array_equal(thin.columns["observation.state"], state[0:8:2])
    assert np.array_equal(thin.columns["action"][:-1], thin.columns["observation.state"][1:])
    assert np.array_equal(thin.columns["action"][-1], state[8])  # the last step's target was recorded
    clip = thin.cameras["ego"]
    assert (len(clip), clip.stride, clip.end) == (4, 2, 7)


def test_calvins_moves_are_summed_and_lead_from_pose_to_pose(tmp_path: Path):
    raw_calvin.write_split(tmp_path / "raw/task_D_D/training", plays=[(100, 121)], windows=[])
    ((_, full),) = columns_of("calvin", tmp_path / "raw", cut="play")
    ((ref, thin),) = columns_of("calvin@10", tmp_path / "raw", cut="play")
    assert ref.frames == 22 // 3
    state, action = thin.columns["observation.state"], thin.columns["action"]
    moved = full.columns["action"][:21].reshape(7, 3, 7)
    assert np.allclose(action[:, :6], moved[:, :, :6].sum(axis=1), atol=1e-6)
    assert np.array_equal(action[:, 6], moved[:, 2, 6])
    assert np.allclose(thin.columns["action_abs"][:-1, :3], state[1:, :3], atol=1e-6)
    unclipped = (np.abs(moved[:-1, :, :3]) < 1).all(axis=(1, 2))
    assert unclipped.any()
    assert np.allclose(action[:-1, :3][unclipped] * 0.02, np.diff(state[:, :3], axis=0)[unclipped], atol=1e-6)
    picture = thin.cameras["top"].read(0, 7)
    assert np.array_equal(picture, full.cameras["top"].read(0, 22)[0:21:3])


def test_agibot_steps_end_where_the_next_begins_and_its_raw_columns_stay_rows(tmp_path: Path):
    raw_agibot.write_episode(tmp_path / "raw", frames=30)
    ((_, full),) = columns_of("agibot", tmp_path / "raw")
    ((ref, thin),) = columns_of("agibot@15", tmp_path / "raw")
    body = load_converter("agibot").embodiment_of(Path(), load_converter("agibot").Options(), "gripper")
    joints = [i for i, name in enumerate(body.features[1].names) if "joint" in name]
    assert np.array_equal(
        thin.columns["action"][:-1][:, joints], thin.columns["observation.state"][1:][:, joints]
    )
    assert np.array_equal(thin.columns["stored_action"], full.columns["stored_action"][0:30:2])
    assert np.array_equal(thin.columns["capture_time_ns"], full.columns["capture_time_ns"][0:30:2])
    assert ref.metadata["recorded_frames"] == 30


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ("libero", {}, "commands to a controller that runs at 20 Hz"),
        ("agibot", {"action": "as-stored"}, "as-stored keeps rows as they are"),
        ("egodex", {}, "30, of which 20 is no whole part"),
    ],
)
def test_what_would_be_wrong_is_refused_before_anything_is_read(
    tmp_path: Path, source: str, options, says: str
):
    rate = 20 if source == "egodex" else 10
    converter = load_converter(f"{source}@{rate}")
    with pytest.raises(UsageError, match=says):
        next(iter(converter.find(tmp_path, converter.Options(**options))), None)


def test_a_dataset_that_does_not_say_what_its_actions_are_is_asked_about(tmp_path: Path):
    write_dataset(tmp_path / "raw", [12, 9], fps=10)
    converter = load_converter("lerobot@5")
    with pytest.raises(UsageError, match=r"where to be or how far to move.*\n.*--actions targets"):
        converter.embodiment_of(tmp_path / "raw", converter.Options(), "")
    told = load_converter("lerobot@5:targets").embodiment_of(tmp_path / "raw", converter.Options(), "")
    assert told.fps == 5 and column_rules(told, "targets")["action"] == "end"
    run_convert(tmp_path / "raw", tmp_path / "set", "lerobot@5:targets")
    ours, theirs = open_dataset(tmp_path / "set"), open_dataset(tmp_path / "raw")
    assert ours.episodes.length.tolist() == [6, 4]
    assert np.array_equal(
        ours.columns(["action"], 0)["action"], theirs.columns(["action"], 0)["action"][1:12:2]
    )
    camera = ours.cameras[0]
    seen = [number_of(frame)[0] for frame in ours.frames(1, camera, 0, 4)]
    assert seen == [12, 14, 16, 18]  # the second episode's frames 0, 2, 4, 6


def test_the_rule_is_recorded_and_another_rate_over_a_finished_dataset_is_refused(tmp_path: Path):
    raw_egodex.write_episode(tmp_path / "raw/part2/pour/0", frames=20)
    result = run_convert(tmp_path / "raw", tmp_path / "set", "egodex@15", video=VideoOptions())
    assert (result.episodes, result.frames) == (1, 10)
    manifest = json.loads((tmp_path / "set/dpipe/manifest.json").read_text())
    assert manifest["source"] == "egodex"
    told = manifest["conventions"]["resampled"]
    assert told["recorded_fps"] == 30 and told["every"] == 2
    assert told["columns"] == {"action": "last frame of the step"}
    dataset = open_dataset(tmp_path / "set")
    assert dataset.fps == 15 and dataset.frames(0, dataset.cameras[0], 0, 10).shape[0] == 10
    with pytest.raises(UsageError, match="fps: 15 then, 10 now"):
        run_convert(tmp_path / "raw", tmp_path / "set", "egodex@10")
    again = run_convert(tmp_path / "raw", tmp_path / "set", "egodex@15")
    assert again.unchanged


def test_an_episode_shorter_than_a_step_is_left_out_by_name(tmp_path: Path):
    raw_egodex.write_episode(tmp_path / "raw/part2/pour/0", frames=3)
    converter = load_converter("egodex@5")
    (recording,) = converter.find(tmp_path / "raw", converter.Options())
    (entry,) = converter.scan(recording, converter.Options())
    assert "less than one step of 6" in entry.reason
