"""merge, split, select: what comes out is sound, opens in lerobot, and holds what went in, packet by packet."""

import errno
import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from dpipe.cli import cli
from dpipe.pipeline import rearrange_parts
from dpipe.pipeline.convert import convert_all
from dpipe.pipeline.doctor import Level, examine, report_text
from dpipe.pipeline.precompute import precompute
from dpipe.pipeline.progress import Progress
from dpipe.pipeline.rearrange import merge, select, split_by_name, split_by_shares
from dpipe.pipeline.request import ConvertRequest
from dpipe.samples import write_sample
from dpipe.schemas.errors import DataError, UsageError
from dpipe.streams.dataset import Dataset, open_dataset
from dpipe.streams.targets import open_targets
from dpipe.video.mp4 import read_table
from small_datasets import number_of, write_dataset


def convert(folder: Path, source: str, name: str, seed: int, episodes: int = 3) -> Path:
    from dpipe.converters import load_converter

    write_sample(source, folder / "raw" / name, episodes=episodes, seed=seed)
    request = ConvertRequest(
        source=source,
        raw=folder / "raw" / name,
        out=folder / "lerobot" / name,
        name=name,
        options=load_converter(source).Options(),
        workers=0,
    )
    (result,) = convert_all(request, Progress(quiet=True))
    return result.root


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two LIBERO datasets of different episodes, and a CALVIN one with segments and two splits."""
    folder = tmp_path_factory.mktemp("datasets")
    return {
        "a": convert(folder, "libero", "a", seed=1),
        "b": convert(folder, "libero", "b", seed=100, episodes=2),
        "calvin": convert(folder, "calvin", "calvin", seed=3),
    }


def packets(dataset: Dataset, camera: str, episode: int) -> bytes:
    table = read_table(dataset.video_path(episode, camera))
    first = int(dataset.episodes.cameras[camera].first_frame[episode])
    samples = table.shown[first : first + int(dataset.episodes.length[episode])]
    data = table.path.read_bytes()
    return b"".join(data[table.offsets[s] : table.offsets[s] + table.sizes[s]] for s in sorted(samples))


def holds(made: Dataset, episode: int, source: Dataset, original: int) -> None:
    """One episode is what it was, but for its numbers."""
    names = [*source.vectors, *source.sidecar]
    now, before = made.columns(names, episode), source.columns(names, original)
    for name in names:
        assert now[name].tobytes() == before[name].tobytes(), name
    for camera in source.cameras:
        if source.features[camera]["dtype"] == "video":
            assert packets(made, camera, episode) == packets(source, camera, original)
    assert made.episodes.tasks(episode) == source.episodes.tasks(original)
    assert made.content(episode) == source.content(original)
    (task,) = set(made.columns(["task_index"], episode)["task_index"].tolist())
    assert made.tasks[task] == source.episodes.tasks(original)[0]


def sound(root: Path) -> None:
    report = examine(root, Level.FULL)
    assert not report.fails("warn"), report_text(report, "warn")


def test_a_merged_dataset_holds_the_episodes_of_both_and_is_sound(converted: dict[str, Path], tmp_path: Path):
    made = merge([converted["a"], converted["b"]], tmp_path / "ab")
    a, b, both = (open_dataset(root) for root in (converted["a"], converted["b"], made.root))
    assert len(both) == len(a) + len(b) == made.episodes
    for e in range(len(a)):
        holds(both, e, a, e)
    for e in range(len(b)):
        holds(both, len(a) + e, b, e)
    sound(made.root)
    manifest = json.loads((made.root / "dpipe/manifest.json").read_text())
    assert manifest["made_from"]["command"] == "merge" and manifest["made_from"]["datasets"] == ["a", "b"]


@pytest.mark.timeout(900)
def test_lerobot_opens_what_was_merged(converted: dict[str, Path], tmp_path: Path):
    pytest.importorskip("lerobot", reason="lerobot is not installed")
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    made = merge([converted["a"], converted["b"]], tmp_path / "ab")
    ours, theirs = open_dataset(made.root), LeRobotDataset("local/ab", root=made.root, video_backend="pyav")
    assert (theirs.num_episodes, theirs.num_frames) == (made.episodes, made.frames)
    for e in (0, made.episodes - 1):
        first, length = int(ours.episodes.first_index[e]), int(ours.episodes.length[e])
        for t in (0, length - 1):
            item = theirs[first + t]
            assert item["task"] == ours.episodes.tasks(e)[0] and int(item["episode_index"]) == e
            seen = (item[ours.cameras[0]].permute(1, 2, 0).numpy() * 255).round().astype(int)
            assert np.abs(seen - ours.frames(e, ours.cameras[0], t, t + 1)[0]).mean() < 3


def test_targets_made_before_fit_the_merged_dataset(converted: dict[str, Path], tmp_path: Path):
    for name in ("a", "b"):
        precompute(converted[name], ["stats", "tokens"], {"tokens": {"bins": "10", "probe": "none"}})
    made = merge([converted["b"], converted["a"]], tmp_path / "ba")
    bases = [converted[name] / "dpipe/targets" for name in ("b", "a")]
    # Two normalisers fitted apart are two codes: taking them for one is refused by name.
    with pytest.raises(DataError, match="normaliser"):
        open_targets(made.root, ["tokens"], targets=bases)
    part = select(converted["a"], [2, 0], tmp_path / "part")
    tokens = open_targets(part.root, ["tokens"], targets=bases[1])
    own = open_targets(converted["a"], ["tokens"])
    for new, old in ((0, 2), (1, 0)):
        frames = np.arange(open_dataset(part.root).episodes.length[new])
        now, before = tokens.take(episode=new, frame=frames), own.take(episode=old, frame=frames)
        assert np.array_equal(now["tokens"], before["tokens"])


def test_statistics_are_those_of_a_conversion(converted: dict[str, Path], tmp_path: Path):
    """All episodes selected again: the same rows, hence the same statistics, exact and of pictures alike."""
    source = open_dataset(converted["a"])
    made = open_dataset(select(converted["a"], range(len(source)), tmp_path / "again").root)
    assert list(made.stats) == list(source.stats)
    for name, told in source.stats.items():
        for statistic, value in told.items():
            assert np.allclose(made.stats[name][statistic], value, rtol=1e-9, atol=1e-12), (name, statistic)
    before, after = (
        pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet") for root in (source.root, made.root)
    )
    assert after.column_names == before.column_names
    for name in before.column_names:
        a, b = after.column(name).to_pylist(), before.column(name).to_pylist()
        same = a == b or np.allclose(np.array(a, float), np.array(b, float), rtol=1e-9, atol=1e-9)
        assert same, name


def test_a_selection_of_a_selection_keeps_its_statistics_of_pictures(
    converted: dict[str, Path], tmp_path: Path
):
    once = select(converted["a"], [0, 1], tmp_path / "once")
    twice = open_dataset(select(once.root, [1], tmp_path / "twice").root)
    direct = open_dataset(select(converted["a"], [1], tmp_path / "direct").root)
    camera = direct.cameras[0]
    assert twice.stats[camera] == direct.stats[camera]


def same_trees(a: Path, b: Path) -> None:
    """Byte for byte, but for where and when they were made."""
    files = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(b) for p in b.rglob("*") if p.is_file())
    for path in files:
        if path.name not in ("manifest.json", "README.md"):
            assert (a / path).read_bytes() == (b / path).read_bytes(), path


@pytest.fixture
def whole_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the few frames that tests have count as worth taking over as they are."""
    monkeypatch.setattr(rearrange_parts, "LEAST_WHOLE", 1)


@pytest.mark.usefixtures("whole_parts")
def test_whole_parts_share_their_videos_with_the_sources(converted: dict[str, Path], tmp_path: Path):
    made = merge([converted["a"], converted["b"]], tmp_path / "ab")
    a, b, both = (open_dataset(root) for root in (converted["a"], converted["b"], made.root))
    for camera in both.cameras:
        assert both.video_path(0, camera).samefile(a.video_path(0, camera))
        assert both.video_path(len(a), camera).samefile(b.video_path(0, camera))
    for e in range(len(a)):
        holds(both, e, a, e)
    for e in range(len(b)):
        holds(both, len(a) + e, b, e)
    assert both.data_path(0).read_bytes() == a.data_path(0).read_bytes()  # no number in it changed
    assert not both.data_path(0).samefile(a.data_path(0))  # tables are edited in place by many tools
    sound(made.root)


@pytest.mark.usefixtures("whole_parts")
def test_videos_are_copied_where_a_disk_has_no_hard_links(
    converted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    roots = [converted["a"], converted["b"]]
    linked = merge(roots, tmp_path / "linked")
    monkeypatch.setattr("os.link", Mock(side_effect=OSError(errno.EXDEV, "Invalid cross-device link")))
    copied = merge(roots, tmp_path / "copied")
    same_trees(linked.root, copied.root)
    assert not any(p.stat().st_nlink > 1 for p in copied.root.rglob("*.mp4"))


@pytest.mark.usefixtures("whole_parts")
@pytest.mark.parametrize("episodes", [[2, 1, 0], [0, 1], [1, 2], [0, 1, 2, 0]])
def test_a_part_in_another_order_or_not_in_full_is_written_anew(
    converted: dict[str, Path], tmp_path: Path, episodes: list[int]
):
    source = open_dataset(converted["a"])
    made = open_dataset(select(converted["a"], episodes, tmp_path / "some").root)
    for new, old in enumerate(episodes):
        holds(made, new, source, old)
        stored = made.columns(["index", "episode_index", "frame_index"], new)
        assert set(stored["episode_index"].tolist()) == {new}
        assert (stored["index"] - made.episodes.first_index[new] == stored["frame_index"]).all()
    groups = pq.read_metadata(made.data_path(len(made) - 1))
    rows = [groups.row_group(g).num_rows for g in range(groups.num_row_groups)]
    assert rows == made.episodes.length.tolist()[-len(rows) :]


def test_columns_too_large_to_hold_are_read_again_for_statistics(
    converted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    held = select(converted["a"], [0, 2], tmp_path / "held")
    monkeypatch.setattr(rearrange_parts, "HELD_BYTES", 0)
    read = select(converted["a"], [0, 2], tmp_path / "read")
    same_trees(held.root, read.root)


def test_segments_and_splits_come_along(converted: dict[str, Path], tmp_path: Path):
    source = open_dataset(converted["calvin"])
    whole = pq.read_table(source.root / "dpipe/segments.parquet").to_pylist()
    chosen = sorted({s["episode_index"] for s in whole})[-1:] or [len(source) - 1]
    made = open_dataset(select(converted["calvin"], [*chosen, 0], tmp_path / "two").root)
    sound(made.root)
    order = [made.episodes.source_id(e) for e in range(len(made))]
    assert sorted(order) == sorted(source.episodes.source_id(e) for e in {*chosen, 0})
    segments = pq.read_table(made.root / "dpipe/segments.parquet").to_pylist()
    wanted = [s for s in whole if s["episode_index"] in {*chosen, 0}]
    assert sorted(s["text"] for s in segments) == sorted(s["text"] for s in wanted)
    for segment in segments:
        assert segment["stop"] <= made.episodes.length[segment["episode_index"]]


def test_splits_stay_together_whatever_the_order(tmp_path: Path):
    root = write_dataset(tmp_path / "x", [4, 5, 6, 7], splits={"train": "0:2", "val": "2:4"})
    made = open_dataset(select(root, [3, 0, 2, 1], tmp_path / "y").root)
    assert made.splits == {"train": (0, 2), "val": (2, 4)}
    assert made.episodes.length.tolist() == [4, 5, 7, 6]  # train first, each split in the order asked for


def test_shares_put_an_episode_on_the_same_side_in_every_dataset(converted: dict[str, Path], tmp_path: Path):
    made = merge([converted["b"], converted["a"]], tmp_path / "ba")
    shares = {"train": 0.6, "test": 0.4}
    both, a = open_dataset(made.root), open_dataset(converted["a"])
    side = {both.contents()[e]: name for name, own in split_by_shares(both, shares).items() for e in own}
    for name, own in split_by_shares(a, shares).items():
        assert all(side[a.contents()[e]] == name for e in own)
    with pytest.raises(UsageError, match="add up to 1"):
        split_by_shares(a, {"train": 0.6, "test": 0.6})


@pytest.mark.parametrize(
    ("field", "change"),
    [
        (
            "conventions.gripper_action",
            lambda m: m["conventions"].update(gripper_action={"open": 1, "close": -1}),
        ),
        ("licence", lambda m: m.update(licence="cc-by-nc-4.0")),
        ("features.action.unit", lambda m: m["embodiment"]["features"]["action"].update(unit="inch")),
    ],
)
def test_what_means_something_else_is_not_merged(
    converted: dict[str, Path], tmp_path: Path, field: str, change
):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(converted["b"], other)
    path = other / "dpipe/manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=field):
        merge([converted["a"], other], tmp_path / "ab")
    assert not (tmp_path / "ab").exists()


def test_datasets_of_others_merge_where_their_features_agree(tmp_path: Path):
    one = write_dataset(tmp_path / "one", [6, 8, 4], cameras=("image", "wrist"), aggregate=True)
    two = write_dataset(tmp_path / "two", [4, 7], cameras=("image", "wrist"), tasks=("place", "push"))
    made = open_dataset(merge([one, two], tmp_path / "both").root)
    assert made.tasks == ["pick", "place", "push"] and made.manifest is None
    sources = (open_dataset(one), open_dataset(two))
    for e, (source, original) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        holds(made, e, sources[source], original)
        for number, camera in enumerate(made.cameras):
            first = int(sources[source].episodes.first_index[original])
            assert number_of(made.frames(e, camera, 3, 4)[0]) == (first + 3, number)
    slower = write_dataset(tmp_path / "slow", [5], cameras=("image", "wrist"), fps=5)
    with pytest.raises(UsageError, match="fps: 10 in one, 5 in slow"):
        merge([one, slower], tmp_path / "no")
    lacking = write_dataset(tmp_path / "lacking", [5])
    with pytest.raises(UsageError, match=r"observation\.images\.wrist"):
        merge([one, lacking], tmp_path / "no")


def test_pictures_in_rows_are_copied_byte_by_byte(tmp_path: Path):
    root = write_dataset(tmp_path / "x", [4, 5], kind="image")
    made = open_dataset(select(root, [1], tmp_path / "y").root)
    assert number_of(made.frames(0, made.cameras[0], 2, 3)[0]) == (6, 0)
    cells = [pq.read_table(r / "data/chunk-000/file-000.parquet") for r in (root, made.root)]
    camera = made.cameras[0]
    assert cells[1].column(camera).to_pylist() == cells[0].column(camera).to_pylist()[4:]


def test_codec_settings_that_differ_get_parts_of_their_own(tmp_path: Path):
    one = write_dataset(tmp_path / "one", [6], codec="libx264")
    two = write_dataset(tmp_path / "two", [5], codec="libsvtav1")
    made = open_dataset(merge([one, two], tmp_path / "both").root)
    assert [made.video_path(e, made.cameras[0]).name for e in (0, 1)] == ["file-000.mp4", "file-001.mp4"]
    assert [number_of(made.frames(e, made.cameras[0], 1, 2)[0])[0] for e in (0, 1)] == [1, 1]


def test_nothing_is_written_over_or_left_half_done(converted: dict[str, Path], tmp_path: Path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="is there already"):
        select(converted["a"], [0], tmp_path / "there")
    with pytest.raises(UsageError, match="lies inside"):
        select(converted["a"], [0], converted["a"] / "inside")
    with pytest.raises(UsageError, match="no episode"):
        select(converted["a"], [], tmp_path / "none")
    broken = write_dataset(tmp_path / "broken", [4, 5], episodes_per_file=1)
    next((broken / "videos").rglob("file-001.mp4")).unlink()
    with pytest.raises(DataError, match="no video"):
        select(broken, [0, 1], tmp_path / "from_broken")
    assert not (tmp_path / "from_broken").exists()


def test_the_commands_say_what_they_made(converted: dict[str, Path], tmp_path: Path):
    def run(*words: object) -> str:
        told = CliRunner().invoke(cli, [*map(str, words), "--workspace", str(tmp_path)])
        assert told.exit_code == 0, (told.output, told.exception)
        return told.output

    assert "merge: 5 episodes" in run("merge", converted["a"], converted["b"], "--name", "both")
    assert "select: 2 episodes" in run("select", "both", "--where", "episode_index < 2", "--name", "few")
    out = run("split", "both", "--into", "x=0.5,y=0.5")
    counts = [int(line.split(": ")[1].split()[0]) for line in out.splitlines() if line.startswith("split")]
    assert sum(counts) == 5 and len(counts) == 2
    root = tmp_path / "lerobot"
    assert open_dataset(root / "both-x").splits == {"x": (0, counts[0])}
    assert set(split_by_name(open_dataset(root / "both"))) == {"train"}
