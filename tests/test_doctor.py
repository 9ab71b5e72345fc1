"""The doctor beyond single defects: other writers' datasets, the command, mending, and the arithmetic of lags."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from defects import (
    DEFECTS,
    FAST,
    FULL,
    SAMPLED,
    broken,
    data_files,
    edit_column,
    edit_json,
    edit_table,
    keep_sound_things_in,
    sound,
)
from dpipe.cli import cli
from dpipe.pipeline.doctor import examine, report_text
from dpipe.pipeline.doctor.lags import chance_of_a_fit, lag_curve, pool_curves
from dpipe.pipeline.doctor.mend import mend
from dpipe.pipeline.doctor.pictures import Motion, follow_curve
from dpipe.pipeline.doctor.recording import hash_rows, rotation_error, rotation_groups
from dpipe.pipeline.doctor.videos import frame_at
from dpipe.schemas.episode import EpisodeRef
from dpipe.schemas.errors import DataError, UsageError
from dpipe.schemas.problems import PROBLEMS, problems_of, sentences_of
from dpipe.streams.dataset import open_dataset
from small_datasets import write_dataset
from trees import run_convert, tree_digest

CAMERA = "observation.images.image"


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    keep_sound_things_in(tmp_path_factory.mktemp("sound"))


def told(path: Path, level=SAMPLED) -> list[str]:
    return [f"{f.problem} {f.where}: {f.what}" for f in examine(path, level).findings if f.severity != "note"]


# --- nothing sound is complained about ----------------------------------------------------------------------


def test_real_recordings_are_sound_raw_and_converted(sample_data: Path, tmp_path: Path):
    for source in ("libero", "calvin"):
        assert told(sample_data / source) == []
        run_convert(sample_data / source, tmp_path / source, source)
        assert told(tmp_path / source) == []
        assert told(tmp_path / source, FULL) == []


def test_actions_beside_their_effect_are_noted_not_blamed_where_that_was_asked_for(tmp_path: Path):
    """LIBERO's pairing as stored: the recipe says so, so it is a note; two frames more are nobody's recipe."""
    from dpipe.converters import load_converter

    options = load_converter("libero").Options(time_pairing="as-stored")
    run_convert(sound("raw libero"), tmp_path / "set", options=options)
    report = examine(tmp_path / "set")
    assert ("time-pairing", "note") in report.counts and report.problems == set()
    (note,) = [f for f in report.findings if f.problem == "time-pairing"]
    assert "1 frames before" in note.what and "time_pairing as-stored" in note.what
    settled = examine(sound("dataset"))
    assert not any(problem == "time-pairing" for problem, _ in settled.counts)
    for path in sorted((tmp_path / "set/data/chunk-000").iterdir()):
        edit_column(path, "action", lambda rows: rows[:2] + rows[:-2])
    assert "time-pairing" in examine(tmp_path / "set").problems


# --- the command --------------------------------------------------------------------------------------------


def dpipe(*words: object):
    return CliRunner().invoke(cli, ["doctor", *map(str, words)])


def test_exit_codes_and_json(tmp_path: Path):
    root = write_dataset(tmp_path / "set", [12, 15], kind="none", stats=False)
    settled = tmp_path / "settled"
    assert dpipe(root, "--fix", "--out", settled).exit_code == 0
    clean = dpipe(settled, "--json")
    assert clean.exit_code == 0
    (report,) = json.loads(clean.stdout)
    assert report["sound"] is True and report["episodes"] == 2 and report["frames"] == 27
    bad = dpipe(root, "--fast", "--json")
    assert bad.exit_code == 1
    (report,) = json.loads(bad.stdout)
    checks = {finding["check"] for finding in report["findings"]}
    assert "statistics" in checks and report["sound"] is False
    assert all(f["why"] and f["remedy"] for f in report["findings"])


def test_warnings_fail_only_when_asked(tmp_path: Path):
    root = tmp_path / "set"
    mend(write_dataset(tmp_path / "raw", [12, 15], kind="none", tasks=("Pick it up", "pick it up.")), root)
    assert dpipe(root, "--fast").exit_code == 0
    strict = dpipe(root, "--fast", "--fail-on", "warn")
    assert strict.exit_code == 1 and "spelt twice" in strict.stdout and "why:" in strict.stdout


def test_words_that_exclude_each_other_are_refused(tmp_path: Path):
    for words in (["--fast", "--full"], ["--out", tmp_path / "x"]):
        assert isinstance(dpipe(tmp_path, *words).exception, UsageError)
    with pytest.raises(UsageError, match="nothing at"):
        examine(tmp_path / "absent")
    with pytest.raises(UsageError, match="--source NAME"):
        examine(tmp_path)


def test_targets_and_shards_can_be_asked_about_alone():
    root = sound("served")
    (target,) = (root / "dpipe/targets/tokens").iterdir()
    (shards,) = (root / "dpipe/shards").iterdir()
    assert examine(target).kind == "targets" and told(target) == []
    assert examine(shards).kind == "shards" and told(shards) == []


def test_raw_recordings_of_every_source_are_told_apart():
    for source in ("libero", "calvin", "egodex", "agibot"):
        report = examine(sound(f"raw {source}"), FAST)
        assert report.kind == f"raw {source} recordings" and report.problems == set()


def test_a_thousand_findings_are_counted_not_listed(tmp_path: Path):
    root = write_dataset(tmp_path / "set", [3] * 40, kind="none", episodes_per_file=1)
    for path in sorted((root / "data/chunk-000").iterdir()):
        path.unlink()
    report = examine(root, FAST)
    assert report.counts["missing-file", "error"] == 40
    assert sum(f.problem == "missing-file" for f in report.findings) == 12
    assert "and 28 more" in report_text(report)


# --- a part of it -------------------------------------------------------------------------------------------


def test_a_condition_looks_at_the_episodes_that_meet_it(tmp_path: Path):
    """One value changed in episode 4: told of episode 4 and of all, not of the others, whose digests are held."""
    import shutil

    root = tmp_path / "set"
    shutil.copytree(sound("dataset"), root)
    starts = open_dataset(root).episodes.length[:4].sum()
    row, at = int(starts) + 5, 0
    for path in data_files(root):
        rows = pq.ParquetFile(path).metadata.num_rows
        if at <= row < at + rows:
            edit_column(path, "action", lambda values, i=row - at: values[i].__setitem__(0, 0.123))
        at += rows
    assert "content" in examine(root).problems
    assert "content" in examine(root, where="episode_index = 4").problems
    assert examine(root, where="episode_index > 4").problems == set()
    report = examine(root, where="frames > 0 AND episode_index IN (1, 3)")
    assert report.problems == set() and report.episodes == 2
    assert report.frames == int(open_dataset(root).episodes.length[[1, 3]].sum())
    spoken = report_text(report)
    assert "where frames > 0 AND episode_index IN (1, 3)" in spoken
    assert report.to_json()["where"] == "frames > 0 AND episode_index IN (1, 3)"


@pytest.mark.parametrize(("base", "level"), [("dataset", FULL), ("served", SAMPLED), ("foreign", SAMPLED)])
def test_a_part_of_something_sound_is_sound(base: str, level):
    report = examine(sound(base), level, where="episode_index <> 0")
    assert report.problems == set() and report.episodes == len(open_dataset(sound(base))) - 1


def test_a_condition_chooses_among_raw_recordings(tmp_path: Path):
    """By what their source says of them; what cannot be read is told, since nothing is known to choose it by."""
    root = sound("raw libero")
    everything = examine(root)
    part = examine(root, where="source_id LIKE '%demo_1'")
    assert 0 < part.episodes < everything.episodes and part.problems == set()
    with pytest.raises(UsageError, match="no recording"):
        examine(root, where="frames > 100000")


def test_conditions_that_make_no_sense_are_refused(tmp_path: Path):
    root = sound("served")
    (target,) = (root / "dpipe/targets/tokens").iterdir()
    for place, words, reason in (
        (root, ["--fast"], "neither"),
        (root, ["--fix", "--out", str(tmp_path / "x")], "whole"),
        (target, [], "whole"),
    ):
        error = dpipe(place, "--where", "frames > 1", *words).exception
        assert isinstance(error, UsageError) and reason in str(error)
    for where, reason in (("frames > 99999", "no episode"), ("colour = 1", "columns: ")):
        with pytest.raises(UsageError, match=reason):
            examine(root, where=where)
    assert not (tmp_path / "x").exists()


# --- mending ------------------------------------------------------------------------------------------------


def test_everything_that_follows_from_the_rest_is_rebuilt(tmp_path: Path):
    import shutil

    root = tmp_path / "set"
    shutil.copytree(sound("dataset"), root)
    before = tree_digest(root)
    for path in sorted((root / "data/chunk-000").iterdir()):
        edit_column(path, "index", lambda rows: [0] * len(rows))
        edit_column(path, "episode_index", lambda rows: [e + 1 for e in rows])
        edit_column(path, "frame_index", lambda rows: [t * 2 for t in rows])
        edit_column(path, "timestamp", lambda rows: [t + 5 for t in rows])
    meta = root / "meta/episodes/chunk-000/file-000.parquet"
    edit_column(meta, "dataset_from_index", lambda rows: [7] * len(rows))
    edit_column(meta, "dataset_to_index", lambda rows: [8] * len(rows))
    edit_table(root / "meta/tasks.parquet", lambda table: table.take([1, 0]).replace_schema_metadata(None))
    edit_json(root / "meta/info.json", lambda info: info.update(total_frames=1, total_episodes=2))
    (root / "meta/stats.json").unlink()
    wrong = tree_digest(root)
    found = examine(root).problems
    assert {"index", "episode-index", "frame-index", "timestamp", "tasks", "totals", "statistics"} <= found
    done = mend(root, tmp_path / "mended")
    assert told(done.root) == []
    assert tree_digest(root) == wrong, "the dataset itself is not touched"
    after = tree_digest(done.root)
    changed = {name for name in before if before[name] != after.get(name)}
    # What was never wrong is the same byte for byte; what was is equal in content.
    assert not any(name.startswith(("videos", "dpipe")) for name in changed)
    a, b = open_dataset(sound("dataset")), open_dataset(done.root)
    assert a.digest() == b.digest() and a.tasks == b.tasks
    old = json.loads((sound("dataset") / "meta/stats.json").read_text())
    new = json.loads((done.root / "meta/stats.json").read_text())
    assert old["action"] == new["action"] and set(old) == set(new)


@pytest.mark.parametrize(
    "name",
    [
        "pictures counted in grey levels",
        "statistics of another episode",
        "tasks without their pandas index",
        "a largest value that was never reached",
    ],
)
def test_a_defect_that_can_be_mended_is(name: str, tmp_path: Path):
    (one,) = [each for each in DEFECTS if each.name == name]
    assert PROBLEMS[one.problem].fixable
    assert told(mend(broken(one, tmp_path), tmp_path / "mended").root) == []


def test_lerobot_reads_what_was_mended_as_it_was_before(tmp_path: Path):
    """Another writer's dataset with its numbering, task table and statistics spoilt: doctor and lerobot agree again."""
    import shutil

    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = tmp_path / "set"
    shutil.copytree(sound("recorded"), root)
    for path in sorted((root / "data/chunk-000").iterdir()):
        edit_column(path, "index", lambda rows: rows[::-1])
        edit_column(path, "timestamp", lambda rows: [t * 1.01 for t in rows])
    edit_table(root / "meta/tasks.parquet", lambda table: table.take([1, 0]))
    edit_json(root / "meta/stats.json", lambda stats: stats["action"]["mean"].__setitem__(0, 4e4))
    assert {"index", "timestamp", "tasks", "statistics"} <= examine(root).problems
    fixed = mend(root, tmp_path / "mended").root
    assert told(fixed, FULL) == []
    before, after = (
        LeRobotDataset("local/set", root=path, video_backend="pyav") for path in (sound("recorded"), fixed)
    )
    assert len(before) == len(after)
    for position in (0, 59, 60, len(before) - 1):
        a, b = before[position], after[position]
        assert set(a) == set(b) and a["task"] == b["task"]
        for name in a:
            assert name == "task" or (a[name] == b[name]).all(), name
    assert np.allclose(
        before.meta.stats["action"]["mean"], after.meta.stats["action"]["mean"], rtol=1e-4, atol=1e-4
    )


def test_a_sound_dataset_comes_back_unchanged(tmp_path: Path):
    done = mend(sound("dataset"), tmp_path / "same")
    assert done.changed == ()
    assert tree_digest(done.root) == tree_digest(sound("dataset"))


def test_nothing_is_guessed_and_nothing_overwritten(tmp_path: Path):
    root = write_dataset(tmp_path / "set", [12, 15], kind="none")
    with pytest.raises(UsageError, match="exists already"):
        mend(root, tmp_path)
    with pytest.raises(UsageError, match="inside the dataset"):
        mend(root, root / "copy")
    edit_table(root / "data/chunk-000/file-000.parquet", lambda table: table.slice(1))
    with pytest.raises(DataError, match="without guessing"):
        mend(root, tmp_path / "mended")
    assert not (tmp_path / "mended").exists() and not list(tmp_path.glob(".mended*"))


def test_videos_are_linked_rather_than_copied(tmp_path: Path):
    source = tmp_path / "set"
    import shutil

    shutil.copytree(sound("dataset"), source)
    done = mend(source, tmp_path / "mended")
    name = f"videos/{CAMERA}/chunk-000/file-000.mp4"
    assert (done.root / name).stat().st_ino == (source / name).stat().st_ino


# --- names --------------------------------------------------------------------------------------------------


def test_every_reason_of_a_converter_has_a_name():
    """Sentences as converters write them; none may end up as 'other'."""
    for reason, names in {
        "lengths differ: actions 12, agentview_rgb 11": ("row-count",),
        "'actions' is not finite in 3 steps, first at step 2; gripper action takes [0.5], expected only [-1.0, 1.0]": (
            "not-finite",
            "gripper-range",
        ),
        "the video has 29 frames, the poses 30": ("video-count",),
        "gripper readings of -0.785 to 0 are no actuator's (0 to 120, 35 to 120), radians perhaps": (
            "gripper-range",
        ),
        "task_327.json has no task_name for this episode: it would have no instruction": ("instruction",),
        "wrong suite folder: the file is in 'libero_goal', its bddl file in 'libero_spatial'": ("misplaced",),
        "1 frames missing: 20": ("missing-file",),
        "the pickle asks for 'os.system', which no index file needs; refused\n  next: get it again": (
            "refused",
        ),
        "a.hdf5: not a readable HDF5 file\n  expected: a complete HDF5 file": ("unreadable",),
        "transforms/leftHand is no rotation in 1 frames, first at frame 3": ("rotation",),
    }.items():
        assert problems_of(reason) == names
    assert sentences_of("it is a link; refused\n  next: x") == ["it is a link; refused"]
    assert all(problem.why and problem.remedy for problem in PROBLEMS.values())


def test_a_dropped_episode_is_listed_under_the_doctors_names(tmp_path: Path):
    from raw_libero import demo_arrays, write_raw

    arrays = {i: demo_arrays(12, seed=i) for i in range(2)}
    arrays[1]["actions"][3, 2] = np.nan
    raw = write_raw(tmp_path / "raw/libero_goal/put_the_red_cube_in_the_tray_demo.hdf5", arrays).parent.parent
    result = run_convert(raw, tmp_path / "out")
    (line,) = (tmp_path / "out/dpipe/dropped.jsonl").read_text().splitlines()
    assert json.loads(line)["checks"] == ["not-finite"] == list(problems_of(result.dropped[0].reason))
    assert "not-finite" in examine(raw).problems


def variants_of(raw: Path) -> set[str]:
    from dpipe.converters import load_converter

    converter = load_converter("agibot")
    options = converter.Options()
    refs = [ref for recording in converter.find(raw, options) for ref in converter.scan(recording, options)]
    return {ref.variant for ref in refs if isinstance(ref, EpisodeRef)}


@pytest.mark.parametrize(
    "name",
    [
        "a nan in a demonstration",
        "a camera a frame short",
        "two arrays that should agree",
        "a frame that is missing",
        "a hand turned inside out",
        "a video a frame short",
        "a joint that is nan",
        "an agibot camera that is missing",
    ],
)
def test_conversion_and_doctor_give_a_defect_the_same_name(name: str, tmp_path: Path):
    (one,) = [each for each in DEFECTS if each.name == name]
    raw = broken(one, tmp_path)
    source = one.base.removeprefix("raw ")
    variant = {"variant": next(iter(variants_of(raw)))} if source == "agibot" else {}
    run_convert(raw, tmp_path / "out", source, **variant)
    lines = [json.loads(line) for line in (tmp_path / "out/dpipe/dropped.jsonl").read_text().splitlines()]
    said = {check for line in lines for check in line["checks"]}
    assert one.problem in said and said <= examine(raw).problems


# --- arithmetic ---------------------------------------------------------------------------------------------


def test_the_lag_of_a_delayed_action_is_the_delay():
    rng = np.random.default_rng(0)
    state = np.cumsum(np.cumsum(rng.normal(size=(80, 2)), axis=0), axis=0)
    delta = np.diff(state, axis=0, append=state[-1:])  # action[t] takes the state from t to t + 1
    for delay in (-4, 0, 3):
        curve = lag_curve(np.roll(delta, delay, axis=0), state, "delta")
        assert curve is not None and curve.peak == -delay and curve.lead == -delay
    pose = np.roll(state, -1, axis=0)  # the next pose
    found = pool_curves([{"absolute": curve} for curve in [lag_curve(pose, state, "absolute")] if curve])
    assert found is not None and found[1].peak == 1 and found[1].lead == 0


def test_nothing_is_concluded_from_short_or_still_episodes():
    assert lag_curve(np.zeros((10, 2)), np.zeros((10, 2)), "delta") is None
    assert lag_curve(np.zeros((60, 2)), np.random.default_rng(0).normal(size=(60, 2)), "delta") is None


def test_pictures_follow_the_dimensions_that_moved_them_in_other_episodes():
    """The picture changes with the first of three dimensions; in the last episode, five frames late."""
    rng = np.random.default_rng(1)
    told = []
    for late in (0, 0, 0, 5):
        speed = np.abs(np.cumsum(rng.normal(size=(80, 3)), axis=0))
        told.append(Motion("", speed, np.roll(speed[:, 0], late) + rng.normal(0, 0.1, 80)))
    peaks = [follow_curve(told, i, lag=0).peak for i in range(4)]
    assert peaks == [0, 0, 0, 5]
    unrelated = [Motion("", m.speed, np.abs(np.cumsum(rng.normal(size=80)))) for m in told]
    fits = [follow_curve(unrelated, i, lag=0).at(0) for i in range(4)]
    assert np.median(fits) < 0.5


def test_an_idle_joint_says_nothing_of_what_is_usual_nor_does_a_gripper_that_holds_something():
    """Command and state in other units: equal where both are nothing, apart in the one episode that moves."""
    from dpipe.pipeline.doctor.recording import Gathered, commands_and_states_of_one_name_agree

    def gathered(reach: list[float], gap: list[float], name: str = "elbow") -> Gathered:
        found = Gathered(total=len(reach), level=SAMPLED, where=[f"episode {e}" for e in range(len(reach))])
        found.shared = [name]
        found.spans = [(e, np.array([value])) for e, value in enumerate(reach)]
        found.gaps = [(e, np.array([value])) for e, value in enumerate(gap)]
        return found

    assert list(commands_and_states_of_one_name_agree(gathered([0, 0, 0, 80], [0, 0, 0, 100]))) == []
    apart = [80, 70, 75, 80], [1, 1, 2, 100]
    (one,) = commands_and_states_of_one_name_agree(gathered(*apart))
    assert one.where == "episode 3"
    assert list(commands_and_states_of_one_name_agree(gathered(*apart, "right_gripper"))) == []


def test_some_lag_of_few_frames_fits_by_chance():
    """A stretch whose pictures seem early by seven frames is told of when it is long, not when it is short."""
    from dpipe.pipeline.doctor.pictures import FIT_OF_ONE_FRAME, SHORTEST_CLIP

    assert FIT_OF_ONE_FRAME / np.sqrt(SHORTEST_CLIP - 7) > 0.7 > FIT_OF_ONE_FRAME / np.sqrt(50)


def test_a_fit_is_held_against_that_of_episodes_paired_wrongly():
    rng = np.random.default_rng(2)
    pairs = [(rng.normal(size=(60, 2)), rng.normal(size=(60, 2))) for _ in range(4)]
    assert chance_of_a_fit(pairs, "delta") < 0.8
    one = np.cumsum(rng.normal(size=(60, 2)), axis=0)
    alike = [(np.diff(one, axis=0, append=one[-1:]), one)] * 4
    assert chance_of_a_fit(alike, "delta") == pytest.approx(0.9)


def test_times_find_the_frame_shown_nearest():
    times = np.arange(5) / 10
    wanted = np.array([0.0, 0.1, 0.1501, 0.4, 0.5, -0.2])
    assert frame_at(times, wanted).tolist() == [0, 1, 2, 4, 5, -2]


def test_equal_rows_have_equal_hashes_and_others_do_not():
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    values[3] = values[0]
    hashes = hash_rows([values])
    assert hashes[0] == hashes[3] and len(set(hashes.tolist())) == 3
    assert hash_rows([values[:, ::-1]])[0] != hashes[0]


def test_rotations_are_told_by_their_names():
    names = [
        "x",
        "left_rot6d_0",
        *(f"left_rot6d_{i}" for i in range(1, 6)),
        "qx",
        "qy",
        "qz",
        "qw",
        "gripper",
    ]
    assert [(kind, dims) for kind, _, dims in rotation_groups(names)] == [
        ("quaternion", [7, 8, 9, 10]),
        ("rot6d", [1, 2, 3, 4, 5, 6]),
    ]
    assert rotation_error("quaternion", np.array([[0, 0, 0.6, 0.8], [0, 0, 0, 0]]))[1] > 0
    assert (rotation_error("rot6d", np.array([[1.0, 0, 0, 0, 1, 0]])) <= 0).all()
    assert (rotation_error("rot6d", np.array([[1.0, 0, 0, 0.5, 0.8, 0]])) > 0).all()
