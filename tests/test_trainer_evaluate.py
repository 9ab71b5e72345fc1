"""Closed loop: the judge is fair, sees what the data showed, and counts honestly."""

# ruff: noqa: E402 - what needs torch is imported once torch is known to be there
from dataclasses import replace

import numpy as np
import pytest
from dpipe.samples.motion import record
from dpipe.samples.tabletop import Tabletop
from dpipe.schemas.errors import DataError
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from dpipe.trainer.evaluate import (
    RENDERED,
    Senses,
    as_recorded,
    check_embodiment,
    latency,
    native_actions,
    roll_out,
    save_strip,
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
