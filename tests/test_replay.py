"""`dpipe replay`: success through the converted dataset is success through the raw actions; mistakes drop it."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from dpipe.converters.libero import Options
from dpipe.pipeline.progress import Progress
from dpipe.pipeline.replay import CONTROLS, control_actions, replay
from dpipe.samples import write_sample
from dpipe.samples.motion import start
from dpipe.samples.tabletop import Tabletop
from dpipe.schemas.errors import DataError
from raw_libero import write_suite
from trees import run_convert

EPISODES = 8
VARIANT = {"calvin": {}, "agibot": {"variant": "gripper"}}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = tmp_path_factory.mktemp("sample") / "libero"
    write_sample("libero", raw, episodes=EPISODES, seed=100, image_size=32)
    return raw


def raw_successes(raw: Path) -> int:
    """Success of every demonstration's raw actions, from the simulator state the raw file starts with."""
    notes = json.loads((raw / "tabletop.json").read_text())["episodes"]
    count = 0
    for name, note in notes.items():
        file, demo = name.rsplit("/", 1)
        table = Tabletop(note["objects"], image_size=8)
        start(table, note["seed"])
        with h5py.File(raw / f"{file}.hdf5", locking=False) as raw_file:
            group = raw_file[f"data/{demo}"]
            table.set_state(group["states"][0])
            for action in group["actions"][()]:
                table.step(action)
        count += table.success
    return count


def rows_by_control(raw: Path, out: Path, **options) -> dict[str, tuple[int, float]]:
    run_convert(raw, out, options=Options(**options))
    result = replay(out, raw, None, Progress(quiet=True))
    assert result.reader == "lerobot"
    assert [row.control for row in result.rows] == list(CONTROLS)
    return {row.control: (row.successes, row.state_error_mm) for row in result.rows}


def test_converted_actions_succeed_as_the_raw_ones_do_and_mistakes_do_not(sample: Path, tmp_path: Path):
    rows = rows_by_control(sample, tmp_path / "set")
    assert rows["as converted"] == (raw_successes(sample), pytest.approx(0, abs=0.01))
    assert rows["as converted"][0] == EPISODES
    for control in CONTROLS[1:]:
        assert rows[control][0] <= EPISODES // 2, control
    assert rows["pairing one frame late"][1] > 5 and rows["pairing one frame early"][1] > 5


def test_the_other_gripper_meaning_replays_as_well(sample: Path, tmp_path: Path):
    assert rows_by_control(sample, tmp_path / "set", gripper="open-one")["as converted"][0] == EPISODES


def test_pairing_as_stored_shows_in_the_replay(sample: Path, tmp_path: Path):
    rows = rows_by_control(sample, tmp_path / "set", time_pairing="as-stored")
    # The first row's action led to its picture: executed from it, everything comes one frame late.
    assert rows["as converted"][0] <= EPISODES // 2
    assert rows["pairing one frame late"][0] == EPISODES


@pytest.mark.parametrize(("source", "options"), [("calvin", {"cut": "play"}), ("agibot", {})])
def test_other_formats_replay_to_the_millimetre_and_their_controls_drop(
    tmp_path: Path, source: str, options: dict
):
    from dpipe.converters import load_converter

    raw = tmp_path / "raw"
    write_sample(source, raw, episodes=3, seed=100)
    done = run_convert(
        raw, tmp_path / "set", source, options=load_converter(source).Options(**options), **VARIANT[source]
    )
    result = replay(done.root, raw, None, Progress(quiet=True))
    rows = {row.control: row for row in result.rows}
    assert rows["as converted"].successes == 3 and rows["as converted"].worst_mm < 0.1
    assert rows["gripper flipped"].successes == 0
    # Absolute targets one frame off follow the same path at another time: the distance tells, not the success.
    for control in ("pairing one frame late", "pairing one frame early"):
        assert rows[control].state_error_mm > 3, control


def test_controls_change_exactly_what_they_say():
    actions = np.arange(21.0).reshape(3, 7)
    assert control_actions(actions, "pairing one frame late")[:, 0].tolist() == [7, 14, 14]
    assert control_actions(actions, "pairing one frame early")[:, 0].tolist() == [0, 0, 7]
    flipped = control_actions(actions, "gripper flipped")
    assert np.array_equal(flipped[:, :6], actions[:, :6]) and np.array_equal(flipped[:, 6], -actions[:, 6])


def test_a_dataset_without_notes_says_what_replay_needs(tmp_path: Path):
    write_suite(tmp_path / "raw", demos=1)
    run_convert(tmp_path / "raw", tmp_path / "set")
    with pytest.raises(DataError, match=r"tabletop\.json"):
        replay(tmp_path / "set", tmp_path / "raw", None, Progress(quiet=True))
