"""CALVIN: every quirk of the format has a test that fails if it is got wrong."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from dpipe.converters import calvin, calvin_files, load_converter
from dpipe.converters.calvin import Options
from dpipe.schemas.episode import Dropped, EpisodeRef
from dpipe.schemas.errors import DataError
from dpipe.schemas.features import check_columns
from raw_calvin import play_frames, slow_relative, write_split, zip_dataset
from scipy.spatial.transform import Rotation

WINDOWS = [(112, 118, "close the drawer", "close_drawer"), (104, 110, "open the drawer", "open_drawer")]


def scan_all(raw: Path, **options) -> list[EpisodeRef | Dropped]:
    chosen = Options(**options)
    return [entry for r in calvin.find(raw, chosen) for entry in calvin.scan(r, chosen)]


def episodes(raw: Path, **options) -> list[EpisodeRef]:
    found = scan_all(raw, **options)
    dropped = [entry.reason for entry in found if isinstance(entry, Dropped)]
    assert not dropped, dropped
    return [entry for entry in found if isinstance(entry, EpisodeRef)]


def only_drop(raw: Path, **options) -> Dropped:
    (entry,) = [e for e in scan_all(raw, **options) if isinstance(e, Dropped)]
    return entry


def pixels(ref: EpisodeRef, camera: str, **options) -> list[int]:
    """The value each picture is filled with."""
    source = calvin.read(ref, Options(**options)).cameras[camera]
    block = source.read(0, len(source))
    assert (block == block[:, :1, :1]).all()
    return block[:, 0, 0, 0].tolist()


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A dataset of one play episode, frames 100 to 129, two windows whose rows are not in order."""
    write_split(tmp_path / "raw" / "task_D_D" / "training", [(100, 129)], WINDOWS)
    return tmp_path / "raw"


def test_a_window_includes_its_last_frame_unless_told_otherwise(raw: Path):
    inclusive, exclusive = episodes(raw), episodes(raw, window_end="exclusive")
    assert [ref.frames for ref in inclusive] == [7, 7]
    assert [ref.frames for ref in exclusive] == [6, 6]
    assert pixels(inclusive[0], "top") == [104, 105, 106, 107, 108, 109, 110]
    assert pixels(exclusive[0], "top", window_end="exclusive") == [104, 105, 106, 107, 108, 109]
    assert inclusive[0].metadata["window_end"] == "inclusive"
    assert exclusive[0].metadata["raw_end"] == 110  # what the file says, whichever reading


def test_windows_come_in_the_order_of_their_frames_with_sentence_and_task(raw: Path):
    first, second = episodes(raw)
    assert (first.instruction, first.metadata["task"]) == ("open the drawer", "open_drawer")
    assert second.source_id == "task_D_D/training/0000112-0000118"
    assert [s.to_json() for s in second.segments] == [
        {"start": 0, "stop": 7, "text": "close the drawer", "task": "close_drawer"}
    ]


def test_the_play_cut_keeps_its_windows_as_segments(raw: Path):
    (ref,) = episodes(raw, cut="play")
    assert ref.frames == 30 and ref.instruction == ""
    assert [(s.start, s.stop, s.text) for s in ref.segments] == [
        (4, 11, "open the drawer"),
        (12, 19, "close the drawer"),
    ]
    (exclusive,) = episodes(raw, cut="play", window_end="exclusive")
    assert [(s.start, s.stop) for s in exclusive.segments] == [(4, 10), (12, 18)]
    assert pixels(ref, "wrist", cut="play") == [255 - i for i in range(100, 130)]


def test_columns_are_what_the_files_hold(raw: Path):
    ref = episodes(raw)[0]
    episode = calvin.read(ref, Options())
    frames = play_frames(100, 129)
    robot = np.array([frames[i]["robot_obs"] for i in range(104, 111)])
    actions = np.array([frames[i]["actions"] for i in range(104, 111)])
    columns = episode.columns
    assert np.array_equal(columns["observation.state"], robot.astype(np.float32))
    assert np.array_equal(columns["action_abs"], actions.astype(np.float32))
    relative = [slow_relative(a, r) for a, r in zip(actions, robot, strict=True)]
    assert np.array_equal(columns["action"], np.array(relative, np.float32))
    matrix = Rotation.from_euler("xyz", robot[:, 3:6]).as_matrix()  # lower case: extrinsic
    assert np.allclose(columns["ee_rot6d"], matrix[:, :, :2].transpose(0, 2, 1).reshape(-1, 6), atol=1e-6)
    following = Rotation.from_euler("xyz", actions[:, 3:6]).as_matrix()
    expected = np.concatenate([actions[:, :3], following[:, :, 0], following[:, :, 1], actions[:, 6:] > 0], 1)
    assert np.allclose(columns["next_ee_pose"], expected, atol=1e-6)
    body = calvin.embodiment(Options(), ref.variant)
    assert check_columns((*body.features, *body.sidecar), dict(columns), ref.frames) == []


def test_gripper_dimensions_are_named_so_and_plus_one_is_open(raw: Path):
    body = calvin.embodiment(Options(), "")
    state, environment, action = body.features
    assert [i for i, name in enumerate(state.names) if "gripper" in name] == [6, 14]
    assert [i for i, name in enumerate(action.names) if "gripper" in name] == [6]
    assert len(environment.names) == 24 and len(state.names) == 15
    assert body.conventions["gripper_action"] == {"open": 1, "close": -1}
    columns = calvin.read(episodes(raw)[1], Options()).columns
    assert columns["action"][0, 6] == 1.0 and columns["action"][-1, 6] == -1.0
    assert columns["next_ee_pose"][0, 9] == 1.0 and columns["next_ee_pose"][-1, 9] == 0.0


@pytest.mark.parametrize("scene", "ABCD")
def test_blocks_stand_in_one_order_whatever_the_scene_stored(tmp_path: Path, scene: str):
    folder = tmp_path / "mine" / "training"
    write_split(folder, [(5, 12)], [(6, 10, "x", "y")], {scene: (0, 50)})
    (ref,) = episodes(tmp_path)
    assert ref.metadata["scene"] == scene
    column = calvin.read(ref, Options()).columns["observation.environment_state"]
    names = calvin.ENVIRONMENT.names
    assert column[0, names.index("red_block_x")] == 1.0
    assert column[0, names.index("blue_block_euler_z")] == 2.0
    assert column[0, names.index("pink_block_x")] == 3.0
    assert column[0, :6].tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_each_play_episode_takes_the_scene_of_its_own_frames(tmp_path: Path):
    scenes = {"B": (0, 19), "A": (20, 60)}
    write_split(tmp_path / "mine" / "training", [(5, 12), (30, 40)], [], scenes)
    assert [ref.metadata["scene"] for ref in episodes(tmp_path, cut="play")] == ["B", "A"]


@pytest.mark.parametrize(
    ("name", "scenes", "first", "highest", "expected", "note"),
    [
        ("task_ABC_D/training", {"B": (0, 598_909)}, 5, 1_795_044, "B", False),
        ("task_ABC_D/training", {"A": (0, 598_909)}, 5, 1_795_044, "B", True),  # downloads before Sep 2022
        ("task_ABCD_D/training", {}, 1_300_000, 2_406_143, "C", True),  # no file: the table, said aloud
        ("renamed/training", {"A": (0, 611_098)}, 53_819, 611_098, "D", True),  # D/training before Feb 2023
        ("task_D_D/training", {"A": (0, 500)}, 5, 500, "D", True),  # its name excludes scene A
        ("task_ABC_D/training", {"A": (0, 500)}, 5, 500, "A", True),  # a small copy may number as it likes
        ("mine/training", {"C": (0, 500)}, 5, 500, "C", False),
        ("task_ABC_D/validation", {}, 37_683, 420_498, "D", False),  # has none by design
    ],
)
def test_the_scene_table_checks_scene_info(name, scenes, first, highest, expected, note):
    scene, said = calvin.scene_of(first, first + 3, name, scenes, highest)
    assert scene == expected
    assert bool(said) is note


def test_validation_never_takes_a_scene_from_the_training_folder(tmp_path: Path):
    """ids of the two splits overlap with different content: 30 is scene A in one, D in the other."""
    write_split(tmp_path / "task_ABC_D" / "training", [(20, 40)], [], {"A": (0, 50)})
    write_split(tmp_path / "task_ABC_D" / "validation", [(20, 40)], [], {})
    train, validation = episodes(tmp_path, cut="play")
    assert (train.split, train.metadata["scene"]) == ("train", "A")
    assert (validation.split, validation.metadata["scene"]) == ("validation", "D")
    assert train.source_id != validation.source_id


def test_an_episode_across_two_scenes_or_in_none_is_left_out(tmp_path: Path):
    write_split(tmp_path / "mine" / "training", [(5, 12)], [], {"A": (0, 8), "B": (9, 20)})
    assert "scenes A and B" in only_drop(tmp_path, cut="play").reason
    shutil.rmtree(tmp_path / "mine")
    write_split(tmp_path / "mine" / "training", [(5, 12)], [], {})
    assert "scene_info.npy" in only_drop(tmp_path, cut="play").reason


def test_splits_stay_apart_and_training_comes_first(tmp_path: Path):
    write_split(tmp_path / "task_D_D" / "validation", [(1, 9)], [(2, 6, "v", "t")])
    write_split(tmp_path / "task_D_D" / "training", [(20, 29)], [(22, 26, "t", "t")])
    assert [(ref.split, ref.instruction) for ref in episodes(tmp_path)] == [
        ("train", "t"),
        ("validation", "v"),
    ]


@pytest.mark.parametrize("place", ["", "task_D_D", "task_D_D/training"])
def test_raw_may_be_the_datasets_the_dataset_or_one_split(raw: Path, place: str):
    assert [ref.source_id for ref in episodes(raw / place)] == [ref.source_id for ref in episodes(raw)]


def test_the_width_of_frame_numbers_is_detected(tmp_path: Path):
    write_split(tmp_path / "mine" / "training", [(7, 12)], [(8, 10, "x", "y")], digits=6)
    (ref,) = episodes(tmp_path)
    assert pixels(ref, "top") == [8, 9, 10]


def test_index_rows_may_be_unsorted(tmp_path: Path):
    folder = write_split(tmp_path / "mine" / "training", [(5, 9), (20, 26)])
    np.save(folder / "ep_start_end_ids.npy", np.array([[20, 26], [5, 9]]))
    assert [(r.metadata["raw_start"], r.frames) for r in episodes(tmp_path, cut="play")] == [(5, 5), (20, 7)]


def test_frames_come_from_the_index_and_strays_are_reported(raw: Path):
    folder = raw / "task_D_D" / "training"
    for frame in (99, 130, 131):
        np.savez_compressed(folder / f"episode_{frame:07d}.npz", **play_frames(frame, frame)[frame])
    (ref,) = episodes(raw, cut="play")
    assert ref.frames == 30
    assert "3 stray frames in no play episode are left out: 99, 130-131" in ref.warnings


def test_without_the_index_nothing_is_guessed_from_the_listing(raw: Path):
    (raw / "task_D_D" / "training" / "ep_start_end_ids.npy").unlink()
    assert "no ep_start_end_ids.npy" in only_drop(raw).reason


def spoil(tmp_path: Path, change, **options) -> list[EpisodeRef | Dropped]:
    write_split(tmp_path / "task_D_D" / "training", [(100, 129)], WINDOWS, change=change)
    return scan_all(tmp_path, **options)


def test_a_missing_frame_costs_its_window_alone(tmp_path: Path):
    def change(frames):
        del frames[106], frames[107]

    dropped, kept = spoil(tmp_path, change)
    assert isinstance(dropped, Dropped) and isinstance(kept, EpisodeRef)
    assert "2 frames missing: 106-107" in dropped.reason
    assert dropped.files[0] == "task_D_D/training/episode_0000106.npz"
    assert "2 of the 30 frames" in kept.warnings[0]


def test_a_missing_frame_costs_a_play_episode_whole_and_the_remedy_says_what_to_do(tmp_path: Path):
    (dropped,) = spoil(tmp_path, lambda frames: frames.pop(120), cut="play")
    assert isinstance(dropped, Dropped)
    assert "1 frame missing: 120" in dropped.reason and "--cut segment" in dropped.remedy


def change_vector(key, at, value):
    def change(frames):
        frames[106][key] = frames[106][key].copy()
        frames[106][key][at] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_vector("robot_obs", 8, np.nan), "not finite: 106"),
        (change_vector("scene_obs", 3, np.inf), "not finite: 106"),
        (
            change_vector("rel_actions", 6, 0.0),
            "gripper command other than -1 and +1: 106 (rel_actions says 0)",
        ),
        (change_vector("rel_actions", 1, 0.123), "rel_actions other than those recomputed"),
        (change_vector("robot_obs", 6, 0.05), None),  # opening width is measured, no rule binds it
    ],
)
def test_numbers_that_contradict_the_format_cost_the_window(tmp_path: Path, change, words):
    first, second = spoil(tmp_path, change)
    assert isinstance(second, EpisodeRef)
    if words is None:
        assert isinstance(first, EpisodeRef)
    else:
        assert isinstance(first, Dropped) and words in first.reason


def test_a_gap_shows_as_an_action_that_is_not_the_next_pose(tmp_path: Path):
    """Frames of another recording under the right names: every file is sound, their order is not."""

    def change(frames):
        other = play_frames(100, 129, seed=9)
        for frame in range(108, 130):
            frames[frame] = other[frame]

    first, second = spoil(tmp_path, change)
    assert (
        isinstance(first, Dropped) and "not the next frame's pose" in first.reason and "107" in first.reason
    )
    assert isinstance(second, EpisodeRef)


def test_the_action_of_a_windows_last_frame_is_checked_against_the_frame_after_it(tmp_path: Path):
    def change(frames):
        other = play_frames(100, 129, seed=9)
        for frame in range(111, 130):
            frames[frame] = other[frame]

    first, _ = spoil(tmp_path, change)
    assert (
        isinstance(first, Dropped)
        and "1 frame with actions that are not the next frame's pose" in first.reason
    )


def test_several_faults_of_one_window_are_told_together(tmp_path: Path):
    def change(frames):
        frames.pop(105)
        change_vector("robot_obs", 8, np.nan)(frames)

    first = spoil(tmp_path, change)[0]
    assert isinstance(first, Dropped)
    assert "missing: 105" in first.reason and "not finite: 106" in first.reason


@pytest.mark.parametrize("keep", [0, 100, 2000])
def test_a_torn_npz_is_found_before_conversion(raw: Path, keep: int):
    path = raw / "task_D_D" / "training" / "episode_0000106.npz"
    path.write_bytes(path.read_bytes()[:keep])
    dropped = only_drop(raw)
    assert "1 frame unreadable: 106" in dropped.reason


def test_a_picture_damaged_inside_is_found_when_it_is_read(raw: Path):
    path = raw / "task_D_D" / "training" / "episode_0000106.npz"
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("rgb_static.npy")
    data = bytearray(path.read_bytes())
    data[info.header_offset + 30 + len(info.filename) + 20 + info.compress_size - 2] ^= 0xFF
    path.write_bytes(data)
    ref = episodes(raw)[0]
    with pytest.raises(calvin.DataError, match="episode_0000106"):
        pixels(ref, "top")


def test_a_first_gripper_command_of_zero_is_read_as_close(tmp_path: Path):
    def change(frames):
        frames[100]["robot_obs"] = frames[100]["robot_obs"].copy()
        frames[100]["robot_obs"][14] = 0.0

    (ref,) = spoil(tmp_path, change, cut="play")
    assert isinstance(ref, EpisodeRef) and any("command of 0" in note for note in ref.warnings)
    assert calvin.read(ref, Options(cut="play")).columns["observation.state"][0, 14] == -1.0


def test_float32_copies_are_accepted_and_named(tmp_path: Path):
    def change(frames):
        for members in frames.values():
            for name in calvin.VECTORS:
                members[name] = members[name].astype(np.float32)

    refs = spoil(tmp_path, change)
    assert all(isinstance(ref, EpisodeRef) for ref in refs)
    assert any("float32" in note for note in refs[0].warnings)


def test_copies_that_went_through_float32_are_accepted_and_a_wrong_pairing_is_not(tmp_path: Path):
    def rounded(frames):
        for members in frames.values():
            for name in calvin.VECTORS:
                members[name] = members[name].astype(np.float32).astype(np.float64)

    refs = spoil(tmp_path / "rounded", rounded)
    assert all(isinstance(ref, EpisodeRef) for ref in refs)
    assert any("but for rounding" in note for note in refs[0].warnings)
    drops = spoil(tmp_path / "wrong", change_vector("rel_actions", 1, 0.0002))
    assert isinstance(drops[0], Dropped) and "those recomputed" in drops[0].reason


def test_members_stored_without_compression_and_foreign_ones_beside_them_are_read(tmp_path: Path):
    folder = write_split(tmp_path / "task_D_D" / "training", [(100, 129)], WINDOWS)
    expected = calvin.read(episodes(tmp_path)[0], Options()).columns
    for path in folder.glob("episode_*.npz"):
        members = dict(np.load(path))
        np.savez(path, rel_actions_gripper=np.zeros(7), **dict(reversed(members.items())))
    (folder / "._episode_0000100.npz").write_bytes(b"resource fork")
    (folder / "statistics.yaml").write_text("robot_obs: !!python/object:os.system {}")
    found = calvin.read(episodes(tmp_path)[0], Options()).columns
    assert all(np.array_equal(found[name], column) for name, column in expected.items())


@pytest.mark.parametrize("loose", ["arrays", "bytes"])
def test_annotations_are_read_however_they_were_pickled(tmp_path: Path, loose: str):
    """Lists of tuples as published; arrays, bytes and no embeddings where a script wrote them again."""
    folder = write_split(tmp_path / "task_D_D" / "training", [(100, 129)], WINDOWS)
    path = folder / "lang_annotations" / "auto_lang_ann.npy"
    told = np.load(path, allow_pickle=True).item()
    sentences = told["language"]["ann"]
    told["info"] = {"indx": np.array(told["info"]["indx"])}
    if loose == "bytes":
        sentences = [sentence.encode() for sentence in sentences]
    told["language"] = {"ann": np.array(sentences), "task": told["language"]["task"]}
    np.save(path, np.array(told, object))
    refs = episodes(tmp_path)
    assert [(ref.instruction, ref.frames) for ref in refs] == [(w[2], 7) for w in sorted(WINDOWS)]


@pytest.mark.parametrize("packed", [False, True])
def test_a_dataset_one_folder_further_down_is_found_and_two_of_one_name_are_refused(
    tmp_path: Path, packed: bool
):
    raw = tmp_path / "raw"
    split = write_split(raw / "dataset" / "task_D_D" / "training", [(100, 129)], WINDOWS)
    if packed:
        zip_dataset(split.parent)
        shutil.rmtree(split.parent)
    assert [ref.source_id.split("/")[0] for ref in episodes(raw)] == ["task_D_D", "task_D_D"]
    write_split(raw / "copy" / "task_D_D" / "training", [(100, 129)], WINDOWS)
    if not packed:
        with pytest.raises(DataError, match="one by one"):
            episodes(raw)


def test_a_window_that_leaves_its_play_episode_is_dropped_by_name(tmp_path: Path):
    windows = [(5, 9, "inside", "t"), (8, 12, "over the end", "t"), (40, 44, "nowhere", "t")]
    write_split(tmp_path / "mine" / "training", [(5, 10), (20, 30)], windows)
    found = scan_all(tmp_path)
    assert [e.instruction for e in found if isinstance(e, EpisodeRef)] == ["inside"]
    reasons = [e.reason for e in found if isinstance(e, Dropped)]
    assert "'over the end'" in reasons[0] and "leaves its play episode 5-10" in reasons[0]
    assert "'nowhere'" in reasons[1] and "no play episode" in reasons[1]
    first, second = episodes(tmp_path, cut="play")
    assert [s.text for s in first.segments] == ["inside"] and second.segments == ()
    assert "2 language windows in no play episode are left out" in first.warnings


def test_identical_windows_stay_apart_and_word_for_word_repeats_are_reported(tmp_path: Path):
    windows = [(5, 9, "push", "t"), (5, 9, "shove", "t"), (5, 9, "push", "t")]
    write_split(tmp_path / "mine" / "training", [(5, 10)], windows)
    refs = episodes(tmp_path)
    assert len({ref.source_id for ref in refs}) == 3
    assert sorted(ref.instruction for ref in refs) == ["push", "push", "shove"]
    assert "1 of 3 language windows repeat another word for word" in refs[0].warnings


@pytest.mark.parametrize("language", ["lang_clip_resnet50", "."])
def test_annotations_of_other_embeddings_or_old_layouts_serve_when_the_usual_are_missing(
    tmp_path: Path, language
):
    write_split(tmp_path / "mine" / "training", [(5, 10)], [(5, 9, "push", "t")], language=language)
    (ref,) = episodes(tmp_path)
    assert any("no lang_annotations/auto_lang_ann.npy" in note for note in ref.warnings)


def test_which_annotations_were_read_is_recorded_since_older_ones_had_wrong_colours(raw: Path):
    path = next(raw.rglob("training/lang_annotations/auto_lang_ann.npy"))
    digest = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    told = {ref.metadata["annotations"] for ref in episodes(raw)}
    assert told == {f"lang_annotations/auto_lang_ann.npy {digest}"}


def test_padded_validation_annotations_are_named(tmp_path: Path):
    """ABC and ABCD: 1,087 windows, most of them repeats of a few."""
    windows = [(100, 110, "open the drawer", "open_drawer")] * 1087
    write_split(tmp_path / "task_ABC_D/validation", [(100, 119)], windows)
    notes = [note for entry in scan_all(tmp_path) for note in getattr(entry, "warnings", ())]
    assert any("1,087 validation windows are those of ABC and ABCD" in note for note in notes)
    assert any("1086 of 1087 language windows repeat" in note for note in notes)


def test_without_annotations_the_way_out_is_named_and_play_still_converts(tmp_path: Path):
    write_split(tmp_path / "mine" / "training", [(5, 10)], language=None)
    assert "--cut play" in only_drop(tmp_path).remedy
    (ref,) = episodes(tmp_path, cut="play")
    assert ref.segments == () and any("without language" in note for note in ref.warnings)


def test_a_hostile_annotation_file_is_refused_by_name(raw: Path):
    class Runs:
        def __reduce__(self):
            return os.system, ("true",)

    np.save(raw / "task_D_D/training/lang_annotations/auto_lang_ann.npy", np.array({"a": Runs()}, object))
    assert "posix.system" in only_drop(raw).reason


def test_every_npz_is_read_once_however_many_windows_cover_it(tmp_path: Path, monkeypatch):
    windows = [(100 + i, 164 + i, f"window {i}", "t") for i in range(0, 20, 2)]
    write_split(tmp_path / "mine" / "training", [(100, 190)], windows)
    refs = episodes(tmp_path)
    assert len({ref.group for ref in refs}) == 1
    opened: list[int] = []
    original = calvin_files.FolderSplit.open

    def counted(self, frame):
        opened.append(frame)
        return original(self, frame)

    monkeypatch.setattr(calvin_files.FolderSplit, "open", counted)
    for ref in refs:
        episode = calvin.read(ref, Options())
        for start in range(0, ref.frames, 16):  # as the pipeline does: cameras in step, block by block
            for source in episode.cameras.values():
                source.read(start, min(start + 16, ref.frames))
    assert sorted(opened) == list(range(100, 183))


def test_a_long_play_episode_keeps_a_bounded_number_of_frames(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(calvin_files, "CACHE_FRAMES", 8)
    write_split(tmp_path / "mine" / "training", [(100, 149)])
    (ref,) = episodes(tmp_path, cut="play")
    episode = calvin.read(ref, Options(cut="play"))
    source = episode.cameras["top"]
    got = [source.read(t, t + 5)[:, 0, 0, 0].tolist() for t in range(0, 50, 5)]
    assert np.concatenate(got).tolist() == list(range(100, 150))
    assert len(source.cache._kept) == 8


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_the_published_zip_converts_as_its_unpacked_folder_does(raw: Path, tmp_path: Path, method):
    write_split(raw / "task_D_D" / "validation", [(300, 309)], [(301, 305, "look", "t")])
    folder = [(ref, calvin.read(ref, Options())) for ref in episodes(raw)]
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    zip_dataset(raw / "task_D_D", method).rename(zipped / "task_D_D.zip")
    refs = episodes(zipped)
    assert [ref.source_id for ref in refs] == [ref.source_id for ref, _ in folder]
    assert [ref.split for ref in refs] == ["train", "train", "validation"]
    for ref, (_, expected) in zip(refs, folder, strict=True):
        episode = calvin.read(ref, Options())
        for name, column in expected.columns.items():
            assert np.array_equal(episode.columns[name], column)
        for key, source in expected.cameras.items():
            assert np.array_equal(episode.cameras[key].read(0, ref.frames), source.read(0, ref.frames))


def test_a_frame_missing_from_the_zip_and_a_torn_zip_are_reported(raw: Path, tmp_path: Path):
    (raw / "task_D_D/training/episode_0000106.npz").unlink()
    path = zip_dataset(raw / "task_D_D")
    shutil.rmtree(raw / "task_D_D")
    assert "1 frame missing: 106" in only_drop(raw).reason
    path.write_bytes(path.read_bytes()[:-30])
    assert "task_D_D.zip" in only_drop(raw).reason


def test_an_unpacked_folder_is_read_instead_of_its_zip(raw: Path):
    zip_dataset(raw / "task_D_D")
    assert all(ref.files[0].is_dir() for ref in episodes(raw))


def test_a_copy_without_the_wrist_camera_is_a_dataset_of_its_own(tmp_path: Path):
    def change(frames):
        for members in frames.values():
            for name in ("rgb_gripper", "rgb_tactile", "depth_static", "depth_gripper"):
                del members[name]

    refs = spoil(tmp_path, change)
    assert {ref.variant for ref in refs} == {"no-wrist"}
    assert [camera.key for camera in refs[0].cameras] == ["top"]


def test_a_single_frame_without_a_camera_is_a_fault(tmp_path: Path):
    dropped, kept = spoil(tmp_path, lambda frames: frames[106].pop("rgb_gripper"))
    assert isinstance(dropped, Dropped) and "'rgb_gripper' has 0 bytes" in dropped.reason
    assert isinstance(kept, EpisodeRef)


def test_depth_and_touch_are_cameras_on_request(raw: Path):
    options = {"depth": True, "tactile": True}
    ref = episodes(raw, **options)[0]
    assert {camera.key: (camera.height, camera.width) for camera in ref.cameras} == {
        "top": (12, 12),
        "wrist": (6, 6),
        "top_depth": (12, 12),
        "wrist_depth": (6, 6),
        "tactile_1": (10, 8),
        "tactile_2": (10, 8),
    }
    cameras = calvin.read(ref, Options(**options)).cameras
    assert cameras["tactile_1"].read(0, 1)[0, 0, 0].tolist() == [0, 1, 2]
    assert cameras["tactile_2"].read(0, 1)[0, 0, 0].tolist() == [3, 4, 5]
    assert cameras["top_depth"].read(0, 1)[0, 0, 0].tolist() == [128, 128, 128]  # 5 m of 3 to 7
    assert cameras["wrist_depth"].read(0, 1)[0, 0, 0].tolist() == [64, 64, 64]  # 0.5 m of 0 to 2
    assert [camera.key for camera in episodes(raw)[0].cameras] == ["top", "wrist"]


def test_depth_asked_for_and_not_there_is_a_reason(tmp_path: Path):
    def change(frames):
        for members in frames.values():
            del members["depth_static"]

    found = spoil(tmp_path, change, depth=True)
    assert all(isinstance(entry, Dropped) and "no 'depth_static'" in entry.reason for entry in found)
    assert "converts without --depth" in found[0].reason
    assert isinstance(found[0], Dropped) and found[0].remedy == "convert without --depth"


def test_the_converter_is_listed_and_says_what_it_expects(tmp_path: Path):
    converter = load_converter("calvin")
    assert converter.name == "calvin" and "ep_start_end_ids.npy" in converter.expects
    assert list(converter.find(tmp_path, Options())) == []
    assert converter.embodiment(Options(), "").fps == 30


MEMORY = """
import re, sys
from pathlib import Path
from dpipe.converters import calvin
options = calvin.Options(cut="play")
(recording,) = calvin.find(Path(sys.argv[1]), options)
(ref,) = calvin.scan(recording, options)
episode = calvin.read(ref, options)
for start in range(0, ref.frames // 8, 64):
    for source in episode.cameras.values():
        source.read(start, start + 64)
# Not getrusage: its peak is inherited from the process that started this one.
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)
print(ref.frames, int(peak) // 1024)
"""


@pytest.mark.slow
def test_a_play_episode_of_40_000_frames_stays_under_a_gigabyte(tmp_path: Path):
    """Frames of a robot that stands still are one file under many names."""
    folder = tmp_path / "mine" / "training"
    frame = play_frames(0, 0)[0]
    frame["actions"] = np.concatenate([frame["robot_obs"][:6], frame["robot_obs"][14:]])
    frame["rel_actions"] = slow_relative(frame["actions"], frame["robot_obs"])
    rng = np.random.default_rng(0)
    frame["rgb_static"] = rng.integers(0, 40, (200, 200, 3), np.uint8)
    frame["rgb_gripper"] = rng.integers(0, 40, (84, 84, 3), np.uint8)
    write_split(folder, [(0, 39_999)], change=dict.clear)
    np.savez_compressed(folder / "episode_0000000.npz", **frame)
    for i in range(1, 40_000):
        os.link(folder / "episode_0000000.npz", folder / f"episode_{i:07d}.npz")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, check=True
    )
    frames, megabytes = map(int, done.stdout.split())
    assert frames == 40_000
    assert megabytes < 1000


# --- the real recording -------------------------------------------------------------------------------------


def test_relative_actions_of_the_real_sample_are_recomputed_without_error(sample_data: Path):
    worst, frames = 0.0, 0
    for path in sorted((sample_data / "calvin").glob("task_D_D/*/episode_*.npz")):
        with np.load(path) as npz:
            recomputed = calvin.relative_action(npz["actions"][None], npz["robot_obs"][None])[0]
            worst = max(worst, float(np.abs(recomputed - npz["rel_actions"]).max()))
            frames += 1
    assert frames == 154 + 97
    assert worst == 0.0


def test_the_real_sample_converts_in_both_cuts(sample_data: Path):
    raw = sample_data / "calvin"
    segments, plays = episodes(raw), episodes(raw, cut="play")
    assert [ref.frames for ref in segments] == [39, 34, 65, 65, 39, 65, 65, 65, 37]
    assert [(ref.frames, len(ref.segments)) for ref in plays] == [(154, 5), (97, 4)]
    assert not any(ref.warnings for ref in [*segments, *plays])
    (play,) = [calvin.read(ref, Options(cut="play")) for ref in plays[:1]]
    for ref in segments[:5]:
        window = calvin.read(ref, Options())
        at = ref.metadata["raw_start"] - 358_482
        rows = slice(at, at + ref.frames)
        for name, column in window.columns.items():
            assert np.array_equal(column, play.columns[name][rows])
        assert np.array_equal(window.cameras["wrist"].read(0, 4), play.cameras["wrist"].read(at, at + 4))
    # Inside a play episode each action leads to the next state.
    assert np.array_equal(play.columns["action_abs"][:-1, :6], play.columns["observation.state"][1:, :6])
    # The hand points down: third column of its rotation along -z.
    rot6d = play.columns["ee_rot6d"].astype(float)
    assert (np.cross(rot6d[:, :3], rot6d[:, 3:])[:, 2] < -0.8).all()
