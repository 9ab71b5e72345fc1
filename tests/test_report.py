"""The report: the numbers behind its pictures, and the page as a browser sees it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from dpipe.cli import cli
from dpipe.pipeline.facts import facts_of
from dpipe.pipeline.report import MOST_BYTES, is_report, write_report
from dpipe.pipeline.report.numbers import (
    change_maps,
    errors_around_switches,
    evenly,
    evenly_by_task,
    histogram,
    instruction_table,
    lengths_histogram,
    metric_curves,
    number,
    oblique,
    pca_colours,
    position_triples,
    ticks,
    truth_of_decisions,
)
from dpipe.pipeline.report.pictures import heat_over
from dpipe.pipeline.report.svg import band, bin_colour, line_chart
from dpipe.pipeline.workspace import Workspace
from dpipe.schemas.errors import UsageError
from dpipe.streams.dataset import open_dataset
from small_datasets import write_dataset
from tiny_dataset import write_tiny

# --- numbers --------------------------------------------------------------------------------------------------


def test_a_histogram_counts_every_finite_value_once():
    told = histogram(np.array([0.0, 1.0, 2.0, 3.0, np.nan, np.inf]), bins=3)
    assert told.counts.tolist() == [1, 1, 2]  # the last bin holds its upper edge
    assert (told.low, told.high, told.left_out) == (0.0, 3.0, 2)
    assert told.marks["q50"] == 1.5


def test_a_column_that_never_moves_is_one_bar_in_the_middle():
    told = histogram(np.full(7, 2.0), bins=4)
    assert told.low < 2.0 < told.high
    assert told.counts.sum() == 7 and np.count_nonzero(told.counts) == 1


def test_lengths_are_counted_in_whole_frames():
    counts, labels = lengths_histogram(np.array([5, 5, 7, 9]), most=30)
    assert counts.tolist() == [2, 0, 1, 0, 1] and labels == ["5", "6", "7", "8", "9"]
    counts, labels = lengths_histogram(np.array([1, 100]), most=10)
    assert counts.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1] and labels[-1] == "91 to 100"


def test_places_are_spread_with_both_ends():
    assert evenly(10, 3) == [0, 4, 9]
    assert evenly(2, 6) == [0, 1]


def test_episodes_shown_are_of_different_instructions_first():
    tasks = ["a"] * 10 + ["b"] + ["c"] * 10
    assert {tasks[e] for e in evenly_by_task(tasks, 3)} == {"a", "b", "c"}
    assert len(evenly_by_task(["a"] * 10, 4)) == 4


def test_points_in_space_are_told_from_rotations():
    names = (
        "ee_x",
        "ee_y",
        "ee_z",
        "rot_x",
        "rot_y",
        "rot_z",
        "left_wrist.x",
        "left_wrist.y",
        "left_wrist.z",
        "x",
    )
    assert position_triples(names) == [("ee", (0, 1, 2)), ("left_wrist", (6, 7, 8))]


def test_the_oblique_view_keeps_up_upright_and_lengths_below_their_own():
    up = oblique(np.array([[0.0, 0.0, 1.0]]))[0]
    assert up[0] == 0 and 0 < up[1] < 1
    points = np.random.default_rng(0).normal(size=(50, 3))
    assert (np.linalg.norm(oblique(points), axis=1) <= np.linalg.norm(points, axis=1) + 1e-12).all()


def test_principal_colours_follow_the_largest_spread():
    # Width 4: the first direction is where tokens differ most, so red orders them as that direction does.
    features = np.zeros((2, 5, 4))
    features[..., 2] = np.arange(10).reshape(2, 5) * 3.0
    colours = pca_colours(features)
    assert colours.shape == (2, 5, 3)
    red = colours[..., 0].reshape(-1).astype(int)
    assert (np.diff(red) >= 0).all() and red[0] == 0 and red[-1] == 255
    assert (colours[..., 1:] == 128).all()  # nothing varies along any other direction


def test_the_map_of_change_is_a_share_of_the_most():
    now = np.zeros((1, 3, 2))
    later = np.array([[[0.0, 0.0], [3.0, 4.0], [0.0, 2.5]]])
    assert change_maps(now, later).tolist() == [[0.0, 1.0, 0.5]]


def test_heat_reddens_only_where_it_is():
    frame = np.full((8, 8, 3), 100, np.uint8)
    heat = np.zeros(4)
    heat[3] = 1.0
    seen = heat_over(frame, heat, (2, 2)).astype(int)
    assert abs(int(seen[0, 0, 0]) - int(seen[0, 0, 2])) <= 2
    assert seen[7, 7, 0] - seen[7, 7, 2] > 100


def test_gripper_errors_are_placed_by_their_distance_from_the_switch():
    closed = np.array([[0], [0], [0], [1], [1], [1]], bool)  # switches at 3
    wrong = np.array([[0], [0], [1], [1], [0], [0]], bool)
    offsets, share, seen = errors_around_switches([wrong], [closed], reach=2)
    assert offsets.tolist() == [-2, -1, 0, 1, 2]
    assert share.tolist() == [0, 1, 1, 0, 0] and seen.tolist() == [1, 1, 1, 1, 1]
    # A frame outside the episode counts for nothing.
    _, share, seen = errors_around_switches([wrong[:4]], [closed[:4]], reach=2)
    assert seen.tolist() == [1, 1, 1, 0, 0]


def test_a_decision_and_its_correction_tell_the_truth():
    wrong, truth = truth_of_decisions(np.array([2.0, 2.0, -1.0, -1.0]), np.array([0.0, -0.6, 0.0, 0.4]))
    assert wrong.tolist() == [False, True, False, True]
    assert truth.tolist() == [True, False, False, True]


def test_instructions_are_counted_by_episode_and_frame():
    rows = instruction_table([["a"], ["b"], ["a", "c"]], np.array([3, 4, 5]))
    assert rows == [("a", 2, 8), ("b", 1, 4), ("c", 1, 5)]


def test_curves_of_a_log_keep_their_steps_and_leave_words_out():
    rows = [{"step": 10, "loss": 2.0, "phase": "one"}, {"step": 20, "loss": 1.0, "done": True}, {"loss": 9.0}]
    curves = metric_curves(rows)
    assert list(curves) == ["loss"]
    assert curves["loss"][0].tolist() == [10, 20] and curves["loss"][1].tolist() == [2, 1]
    many = metric_curves([{"step": i, "loss": float(i)} for i in range(1000)], most=100)
    assert len(many["loss"][0]) == 100 and many["loss"][1].mean() == 499.5


def test_ticks_are_round_and_inside():
    assert ticks(0, 10) == [0, 2.5, 5, 7.5, 10]
    assert ticks(-1, 1, 4) == [-1, -0.5, 0, 0.5, 1]
    assert all(3 <= value <= 3.2 for value in ticks(3, 3.2))


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.25, "0.25"), (5.1e-7, "5.1e-7"), (12345.6, "12,346"), (np.nan, "n/a")]
)
def test_numbers_are_written_short(value: float, text: str):
    assert number(value) == text


def test_bins_are_blue_below_and_vermilion_above_with_white_between():
    low, high = bin_colour(0, 10), bin_colour(9, 10)
    assert int(low[5:7], 16) > int(low[1:3], 16)
    assert int(high[1:3], 16) > int(high[5:7], 16)
    assert bin_colour(255, 10) == "#777"


def test_a_band_has_one_rectangle_for_each_stretch_of_one_bin():
    drawn = band(np.array([0.0, 0.1, 0.9, 0.9]), np.array([5, 5, 9, 9]), 10, "x")
    assert drawn.count("<rect") == 2 and 'width="2"' in drawn


def test_a_line_breaks_where_there_is_no_number():
    drawn = line_chart("t", {"a": ([0, 1, 2, 3], [1, np.nan, 2, 3])})
    (path,) = re.findall(r'class="line s0" d="([^"]+)"', drawn)
    assert path.count("M") == 2
    assert line_chart("t", {"a": ([0, 1], [np.nan, np.nan])}) == ""


# --- the page -------------------------------------------------------------------------------------------------


class Addresses(HTMLParser):
    """Everything the page could fetch, and its tags in order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link", "img", "source", "path", "rect", "circle", "line", "br"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href", "data", "poster", "action") or name.startswith("on"):
                self.found.append(f"{name}={value}")

    def handle_endtag(self, tag):
        if tag not in ("path", "rect", "circle", "line"):
            assert self.open.pop() == tag, f"</{tag}> closes nothing"


def workspace_of(tmp_path: Path, **kinds) -> Workspace:
    for name, arguments in kinds.items():
        write_dataset(tmp_path / "lerobot" / name, **arguments)
    return Workspace(tmp_path)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_the_page_is_whole_and_fetches_nothing(tmp_path: Path):
    space = workspace_of(tmp_path, one={"lengths": [12, 30]}, two={"lengths": [5], "kind": "image"})
    made = write_report(space, (), None)
    assert made.path == tmp_path / "report.html" and made.datasets == 2 and made.bytes < MOST_BYTES
    parser = Addresses()
    parser.feed(read(made.path))
    assert parser.open == []
    outside = [a for a in parser.found if not re.match(r"(src|srcset)=data:image/|href=(#|data:,)", a)]
    assert outside == []
    assert "default-src 'none'" in read(made.path)


def test_words_from_a_recording_stay_words(tmp_path: Path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)> & \"quotes\" 'too'"
    space = workspace_of(tmp_path, one={"lengths": [6, 6], "kind": "none", "tasks": [evil, "b"]})
    text = read(write_report(space, (), None).path)
    assert "<script" not in text and "<img src=x" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_what_the_page_tells_is_what_the_dataset_holds(tmp_path: Path):
    space = workspace_of(tmp_path, one={"lengths": [12, 30, 12], "tasks": ["pick", "place"]})
    text = read(write_report(space, ("one",), tmp_path / "page.html").path)
    assert re.search(r"<td>pick</td><td class=n>2</td><td class=n>24</td>", text)
    assert re.search(r"<td>place</td><td class=n>1</td><td class=n>30</td>", text)
    assert "from 12 to 30 frames, median 12 (1.2 s)" in text
    assert (
        text.count("class=cell") or text.count('class="cell"') >= 6
    )  # three dimensions of action, three of state


def test_a_page_of_someone_else_is_left_alone(tmp_path: Path):
    space = workspace_of(tmp_path, one={"lengths": [5], "kind": "none"})
    (tmp_path / "report.html").write_text("<html>my own</html>")
    with pytest.raises(UsageError, match="is no dpipe report"):
        write_report(space, (), None)
    assert (tmp_path / "report.html").read_text() == "<html>my own</html>"
    write_report(space, (), None, force=True)
    assert is_report(tmp_path / "report.html")
    write_report(space, (), None)  # ours is written over


def test_a_broken_dataset_is_told_of_and_the_others_shown(tmp_path: Path):
    space = workspace_of(
        tmp_path, good={"lengths": [5], "kind": "none"}, bad={"lengths": [5], "kind": "none"}
    )
    (tmp_path / "lerobot/bad/meta/tasks.parquet").unlink()
    made = write_report(space, (), None)
    assert len(made.problems) == 1 and made.problems[0].startswith("bad: ")
    assert "no task table" in read(made.path) and "Episode lengths" in read(made.path)


def test_a_missing_video_costs_its_pictures_only(tmp_path: Path):
    space = workspace_of(tmp_path, one={"lengths": [8, 8], "episodes_per_file": 1})
    next((tmp_path / "lerobot/one/videos").rglob("file-001.mp4")).unlink()
    text = read(write_report(space, (), None).path)
    assert "no video" in text and "episode 0, frame 7" in text


def test_runs_have_their_curves_even_while_they_are_written(tmp_path: Path):
    folder = tmp_path / "runs/libra/mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"terms": {"recipe": "libra", "steps": 40}}))
    lines = [json.dumps({"step": s, "loss": 1 / s, "data_wait": 0.1, "lr": 1e-3}) for s in (10, 20, 30)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 40, "lo')
    made = write_report(Workspace(tmp_path), (), None)
    text = read(made.path)
    assert made.runs == 1 and "run libra mine" in text and "Not finished" in text
    assert "Stream health" in text and "share of the time spent waiting for data" in text
    (folder / "result.json").write_text(json.dumps({"steps": 40, "metrics": {"loss": 0.25}, "seconds": 60}))
    assert "40 steps in 1.0 min; at the end loss 0.25" in read(
        write_report(Workspace(tmp_path), (), None).path
    )


def test_tokens_and_foresight_are_drawn(tmp_path: Path):
    from dpipe.pipeline.precompute import precompute

    root = write_tiny(tmp_path / "lerobot/one", [(s, 40) for s in range(6)], camera=True)
    precompute(root, ["tokens", "foresight"], {"tokens": {"bins": "4,10"}, "foresight": {"at": "5"}})
    text = read(write_report(Workspace(tmp_path), (), None).path)
    assert "which of 10 bins" in text and "How many bins?" in text
    assert "three principal components" in text and "within 5 frames" in text
    assert "no picture of it" not in text


def test_residuals_are_drawn_with_the_errors_the_anchor_made(tmp_path: Path):
    """The note's share of wrong decisions is counted from the target's own arrays."""
    pytest.importorskip("torch", reason="torch is not installed")
    from dpipe.pipeline.precompute import precompute
    from dpipe.streams.targets import open_targets
    from test_stage_residuals import EPISODES, K, save_anchor

    root = write_tiny(tmp_path / "lerobot/one", EPISODES, camera=True)
    anchor = save_anchor(tmp_path / "anchor" / "policy")
    precompute(root, ["residuals"], {"residuals": {"anchor": (f"embedded:{anchor}",)}})
    text = read(write_report(Workspace(tmp_path), (), None).path)
    assert (
        "Mean length of a chunk" in text
        and "Deviation by dimension" in text
        and "no picture of it" not in text
    )
    targets = open_targets(root, ["residuals:array=grip_target"])
    frames = sum(length for _, length in EPISODES)
    wrong = targets.take(index=np.arange(frames))["residuals"].reshape(frames, K, 1)[:, 0] != 0
    assert f"{number(float(wrong.mean()))} over all frames" in text
    switches = sum((length > 6) + (length > 13) for _, length in EPISODES)  # the command changes at 6 and 13
    assert f", {switches} switches" in text


def test_nothing_to_report_says_what_to_do(tmp_path: Path):
    with pytest.raises(UsageError, match="nothing to report"):
        write_report(Workspace(tmp_path), (), None)


def test_the_command_answers_in_json(tmp_path: Path):
    workspace_of(tmp_path, one={"lengths": [5], "kind": "none"})
    told = CliRunner().invoke(cli, ["report", "--workspace", str(tmp_path), "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.output)["datasets"] == 1


def test_facts_of_a_stranger_say_what_is_not_told(tmp_path: Path):
    root = write_dataset(tmp_path / "x", [5], kind="none")
    (root / "README.md").write_text("---\nlicense: cc-by-4.0\ntags: [x]\n---\nlicense: other\n")
    facts = facts_of(open_dataset(root))
    assert (
        facts.licence == "cc-by-4.0" and facts.conventions == () and "not written by dpipe" in facts.summary
    )


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_complaint_or_request(tmp_path: Path, width: int):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine: the page is not looked at in a browser")
    space = workspace_of(tmp_path, one={"lengths": [12, 30], "tasks": ["a" * 200, "b"]})
    made = write_report(space, (), None)
    # A probe at the end of a copy: what overflows sideways, and whether every picture was decoded.
    probe = (
        "<script>addEventListener('load',()=>{const d=document.documentElement;"
        "document.title=JSON.stringify({wide:d.scrollWidth-innerWidth,"
        "broken:[...document.images].filter(i=>i.complete&&!i.naturalWidth).length,images:document.images.length,"
        "asked:performance.getEntriesByType('resource').filter(e=>!e.name.startsWith('data:')).length})})</script>"
    )
    copy = tmp_path / "probed.html"
    page = read(made.path).replace(
        "style-src 'unsafe-inline'", "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    )
    copy.write_text(
        page.replace("</body>", probe + "</body>").replace('loading="lazy"', ""), encoding="utf-8"
    )
    done = subprocess.run(
        [
            *(
                chromium,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--enable-logging=stderr",
                "--dump-dom",
            ),
            *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000", copy.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stderr[-2000:]
    seen = json.loads(title.group(1).replace("&quot;", '"'))
    assert seen["images"] >= 12 and seen["broken"] == 0 and seen["asked"] == 0
    assert seen["wide"] <= 0, "the page is wider than its window"
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
