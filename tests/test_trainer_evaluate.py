"""Closed loop: the judge is fair, sees what the data showed, and counts honestly."""

# ruff: noqa: E402 - what needs torch is imported once torch is known to be there
import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
from dpipe.samples.motion import record
from dpipe.samples.tabletop import Tabletop
from dpipe.schemas.errors import DataError, UsageError
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

import dpipe.trainer.evaluate as evaluate_module
from dpipe.trainer.evaluate import (
    RENDERED,
    Senses,
    as_recorded,
    check_embodiment,
    check_tabletop,
    evaluate,
    expert_error,
    latency,
    make_policy,
    native_actions,
    roll_out,
    save_strip,
    save_video,
    wilson,
)
from toys import toy_space

CAMERAS = ("observation.images.image", "observation.images.image2")
SEEDS = range(3, 9)


def space(**conventions):
    told = {
        "action": "osc_pose_delta",
        "gripper_action": {"open": -1, "close": 1},
        "image_rotation": "rot180",
    }
    return replace(toy_space(8, 7), cameras=CAMERAS, conventions=told | conventions)


class Replayed:
    """Plays back the expert's own actions of each seed, then holds still; counts how often it looks."""

    def __init__(self, seeds, look_every: int = 10, still: bool = False):
        self.space, self.clock, self.looks = space(), {"replay": []}, 0
        self.motions = [record(seed, 3, 8).actions for seed in seeds]
        self.still, self.look_every = still, look_every
        self.reset()

    def reset(self):
        self.step = 0

    def act(self, images, state, texts):
        if self.step % self.look_every == 0:
            self.looks += len(images["observation.images.image"])
            self.clock["replay"].append(1.0)
        t, self.step = self.step, self.step + 1
        if self.still:
            return np.tile([0.0] * 6 + [-1.0], (len(state), 1))
        return np.stack([m[min(t, len(m) - 1)] for m in self.motions])


def test_the_experts_own_actions_succeed_from_the_judges_starting_states():
    outcomes = roll_out(Replayed(SEEDS), SEEDS, None)
    assert all(outcome.success and outcome.grasped and not outcome.wrong for outcome in outcomes)
    assert all(30 < outcome.steps < 120 for outcome in outcomes)


def test_a_policy_that_does_nothing_never_succeeds():
    outcomes = roll_out(Replayed(SEEDS, still=True), SEEDS, None, limit=30)
    assert not any(outcome.success or outcome.grasped for outcome in outcomes)


def test_frames_are_rendered_only_when_the_policy_looks():
    policy = Replayed(SEEDS, look_every=10, still=True)
    roll_out(policy, SEEDS, None, limit=30)
    assert policy.looks == 3 * len(SEEDS)


def test_a_policy_sees_frames_oriented_and_sized_as_its_data_were():
    seen = Tabletop(3, RENDERED).reset(1)
    upright = seen.front
    for rotation, expected in (("raw", upright[::-1]), ("rot180", upright[:, ::-1]), ("vflip", upright)):
        np.testing.assert_array_equal(as_recorded(upright, {"image_rotation": rotation}), expected)
    senses = Senses([seen], space(), (64, 64), blind=False)
    frames = senses["observation.images.image"]
    assert frames.shape == (1, 64, 64, 3)
    near = np.abs(frames[0].astype(int) - upright[:, ::-1].reshape(64, 2, 64, 2, 3).mean((1, 3))).mean()
    assert near < 4


def test_the_blind_control_shows_one_grey_whatever_stands_on_the_table():
    senses = [Senses([Tabletop(3, RENDERED).reset(s)], space(), (64, 64), blind=True) for s in (1, 2)]
    first, second = (one["observation.images.image"] for one in senses)
    assert np.unique(first).tolist() == [128]
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("meaning", "closing"), [({"open": -1, "close": 1}, 0.4), ({"open": 1, "close": 0}, 0.2)]
)
def test_a_gripper_closes_by_the_conventions_of_the_data(meaning, closing):
    actions = np.zeros((2, 7))
    actions[:, 6] = closing, meaning["open"]
    assert native_actions(actions, {"gripper_action": meaning})[:, 6].tolist() == [1.0, -1.0]


def test_a_robot_the_simulator_is_not_is_refused_with_all_that_differs():
    with pytest.raises(DataError, match=r"action: 47 dimensions(.|\n)*state: 20(.|\n)*cameras: .*ego"):
        check_embodiment(replace(toy_space(20, 47), cameras=("observation.images.ego",)))


def test_wilsons_interval_matches_published_values():
    # Newcombe 1998, table I: 81 of 263 is [0.2553, 0.3662]; 15 of 148 is [0.0624, 0.1605]
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_share_and_mirrors_with_failure(counts):
    won, episodes = counts
    low, high = wilson(won, episodes)
    assert 0 <= low <= won / episodes <= high <= 1 and low < high
    other = wilson(episodes - won, episodes)
    assert other == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_latency_leaves_the_first_call_of_each_part_out():
    policy = Replayed([3], look_every=20)
    policy.clock["replay"] = [99.0]
    found = latency(policy, Tabletop(3, RENDERED), None, steps=60)
    assert found == {"replay": {"calls": 3, "median": 1.0, "p90": 1.0}}


def test_the_strip_has_a_row_per_episode(tmp_path):
    from PIL import Image

    film = []
    roll_out(Replayed(SEEDS), SEEDS, None, film=film)
    assert [episode.success for episode in film] == [True] * 4
    save_strip(tmp_path / "strip.png", film)
    assert Image.open(tmp_path / "strip.png").size == (9 * 128, 4 * 144)


def test_the_video_shows_every_step_of_all_filmed_episodes_and_holds_the_last(tmp_path):
    import av

    film = []
    roll_out(Replayed(SEEDS, still=True), SEEDS, None, film=film, limit=12)
    film[1].frames, film[1].wrist = film[1].frames[:5], film[1].wrist[:5]  # ended early
    save_video(tmp_path / "film.mp4", film)
    with av.open(str(tmp_path / "film.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 20
    assert len(frames) == 13 and frames[0].shape == (256, 512, 3)
    held = np.abs(frames[-1][:128, 128:256].astype(int) - film[1].frames[-1].astype(int)).mean()
    assert held < 8  # the codec's loss, not another picture


class Oracle(Replayed):
    """Answers with the expert's actions at the moments it is asked about, `off` in every arm dimension."""

    def __init__(self, seeds, off: float):
        super().__init__(seeds)
        self.answers = np.concatenate([motion[::4] for motion in self.motions])
        self.answers = self.answers + np.array([off] * 6 + [0.0])

    def act(self, images, state, texts):
        return self.answers


def test_the_error_of_single_actions_is_how_far_the_arm_is_off():
    assert expert_error(Oracle(SEEDS, 0.0), SEEDS, None) == (0.0, 0.0)
    assert expert_error(Oracle(SEEDS, 0.25), SEEDS, None) == pytest.approx((0.25, 0.0))


def trained(tasks):
    return SimpleNamespace(space=space(), provenance={"tasks": tasks, "dataset_root": "/nowhere"})


def test_runs_on_other_data_than_the_tabletops_are_refused_by_their_instructions(tmp_path):
    check_tabletop(trained(["pick up the red cube and place it in the tray"]), tmp_path)
    check_tabletop(trained(["Pick the blue cylinder and place it on the plate"]), tmp_path)
    with pytest.raises(DataError, match=r"expected instructions like(.|\n)*found 'open the drawer'"):
        check_tabletop(
            trained(["pick up the red cube and place it in the tray", "open the drawer"]), tmp_path
        )
    with pytest.raises(DataError, match="no dataset in /nowhere"):
        check_tabletop(trained(None), tmp_path)


def test_an_option_that_a_recipes_policy_lacks_is_refused_with_those_it_has():
    def policy(model, seed=0, refine=True): ...

    run = SimpleNamespace(recipe=SimpleNamespace(name="libra", policy=policy), model=None)
    make_policy(run, 0, {"refine": False})
    with pytest.raises(UsageError, match=r"no option run at work: it has refine"):
        make_policy(run, 0, {"run": 3})


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A run as `train` leaves it, its weights as they were drawn, in a workspace of its own."""
    from dpipe.trainer.libra import Config, Libra
    from dpipe.trainer.loop import save_checkpoint

    config = Config(width=16, heads=2, points=2, image_size=16, sample_steps=1)
    names = (*tuple("xyzabc"), "gripper")
    room = replace(space(), action_names=names)
    torch.manual_seed(0)
    model = Libra(config, room)
    run_dir = tmp_path_factory.mktemp("workspace") / "runs" / "libra" / "tiny"
    state = {"step": 7, "optimiser": {}, "progress": model.progress(), "batches": [], "average": 0}
    save_checkpoint(run_dir / "checkpoints", 7, model, None, state, 1)
    terms = {"recipe": "libra", "config": asdict(config), "space": room.to_json(), "facts": {}}
    told = {"terms": terms, "tasks": ["pick up the red cube and place it in the tray"]}
    (run_dir / "config.json").write_text(json.dumps(told))
    return run_dir


def test_an_evaluation_leaves_its_numbers_its_strip_and_its_video(untrained, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(evaluate_module, "EXPERT_EPISODES", 1)
    report = evaluate(untrained, episodes=3, limit=6, video=True, say=lambda text: None)
    assert (report.step, report.episodes, report.successes, report.condition) == (7, 3, 0, "as trained")
    assert (report.low, report.high) == wilson(0, 3) and report.arm_error > 0
    assert set(report.latency) == {"plan", "refine"}
    assert [path.suffix for path in report.files(untrained)] == [".json", ".png", ".mp4"]
    kept = json.loads((untrained / "evaluation-as-trained.json").read_text())
    assert kept["successes"] == 0 and kept["low"] == report.low
    assert Image.open(untrained / "evaluation-as-trained.png").size == (9 * 128, 3 * 144)
    blind = evaluate(untrained, episodes=1, limit=2, blind=True, language=False, say=lambda text: None)
    assert blind.condition == "blind no language"


def test_the_command_finds_a_run_by_recipe_and_name_and_lists_what_there_is(untrained):
    from dpipe.commands.evaluate import find_run
    from dpipe.pipeline.workspace import open_workspace

    workspace = open_workspace(untrained.parents[2])
    assert find_run(workspace, "libra/tiny") == find_run(workspace, "libra") == untrained
    assert find_run(workspace, str(untrained)) == untrained
    with pytest.raises(UsageError, match="found: libra/tiny"):
        find_run(workspace, "vita")
