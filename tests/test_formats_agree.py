"""One simulated motion written in all four raw formats and converted: the unified vectors are one motion's."""

import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from dpipe.converters import load_converter
from dpipe.samples import agibot, calvin, egodex, libero
from dpipe.schemas.episode import Embodiment, EpisodeRef
from dpipe.schemas.rotations import geodesic_distance, rot6d_to_matrix
from dpipe.schemas.unified import ARKIT_TO_UNIFIED, Unified, unify_action, unify_state

WRIST_TO_GRIP_M = 0.145  # along the hand's z: where the sample's pinch closes
OPTIONS = {"calvin": {"cut": "play"}}


@dataclass(frozen=True)
class Converted:
    """The motion as one format tells it; positions brought to the tabletop's origin."""

    ref: EpisodeRef
    body: Embodiment
    time_s: np.ndarray
    state: Unified
    action: Unified
    origin: np.ndarray  # of the tabletop, in unified axes

    def grip(self, unified: Unified) -> np.ndarray:
        """[T, 3] the point between the fingers, tabletop coordinates."""
        reach = WRIST_TO_GRIP_M if self.body.name == "egodex" else 0.0
        approach = rot6d_to_matrix(unified.slot("right_ee_rot6d"))[:, :, 2]
        return unified.slot("right_ee_pos") + reach * approach - self.origin


def convert(raw: Path, source: str) -> Converted:
    converter = load_converter(source)
    options = converter.Options(**OPTIONS.get(source, {}))
    (ref,) = [ref for recording in converter.find(raw, options) for ref in converter.scan(recording, options)]
    assert isinstance(ref, EpisodeRef), ref
    columns = converter.read(ref, options).columns
    body = converter.embodiment(options, ref.variant)
    facts = json.loads((raw / "tabletop.json").read_text())
    world = np.array(facts["world_from_tabletop"])
    axes = ARKIT_TO_UNIFIED if source == "egodex" else np.eye(3)
    assert np.allclose(axes @ world[:3, :3], np.eye(3))  # every format: x forward, y left, z up
    start = facts["episodes"][ref.source_id]["start_s"]
    time_s = start + np.arange(ref.frames) / body.fps
    return Converted(
        ref, body, time_s, unify_state(body, columns), unify_action(body, columns), axes @ world[:3, 3]
    )


@pytest.fixture(scope="module")
def motion(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Converted]:
    raw = tmp_path_factory.mktemp("raw")
    libero.write(raw / "libero", 1, 0)
    calvin.write(raw / "calvin", 1, 0)
    egodex.write(raw / "egodex", 1, 0, enlarged=1)
    agibot.write(raw / "agibot", 1, 0)
    return {source: convert(raw / source, source) for source in ("libero", "calvin", "egodex", "agibot")}


def common_rows(one: Converted, other: Converted) -> tuple[np.ndarray, np.ndarray]:
    """Rows of both that fall on the same moment: every 0.1 s of 20 and 30 fps."""
    first, second = np.rint(one.time_s * 60).astype(int), np.rint(other.time_s * 60).astype(int)
    _, rows, others = np.intersect1d(first, second, return_indices=True)
    assert len(rows) > 20
    return rows, others


PAIRS = list(combinations(["libero", "calvin", "egodex", "agibot"], 2))


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_hands_are_at_the_same_place_and_turn_at_the_same_moment(motion, one: str, other: str):
    a, b = motion[one], motion[other]
    rows, others = common_rows(a, b)
    distance = np.linalg.norm(a.grip(a.state)[rows] - b.grip(b.state)[others], axis=1)
    assert distance.max() < 1e-5
    turns = [rot6d_to_matrix(c.state.slot("right_ee_rot6d")) for c in (a, b)]
    assert geodesic_distance(turns[0][rows], turns[1][others]).max() < 1e-4


@pytest.mark.parametrize(("one", "other"), [pair for pair in PAIRS if "egodex" not in pair])
def test_grippers_and_arms_agree_where_there_are_any(motion, one: str, other: str):
    a, b = motion[one], motion[other]
    rows, others = common_rows(a, b)
    openings = [c.state.slot("right_gripper_open")[r] for c, r in ((a, rows), (b, others))]
    assert np.abs(openings[0] - openings[1]).max() < 1e-4
    assert openings[0].max() > 0.9 and openings[0].min() < 0.7  # it opens and it holds something
    joints = [c.state.slot("right_arm_joint")[r] for c, r in ((a, rows), (b, others))]
    assert np.abs(joints[0] - joints[1]).max() < 1e-4


@pytest.mark.parametrize(("one", "other"), list(combinations(["calvin", "egodex", "agibot"], 2)))
def test_formats_of_one_rate_have_the_same_targets(motion, one: str, other: str):
    """All three say where the hand is one frame later, one as a next pose, two as a next state."""
    a, b = motion[one], motion[other]
    frames = min(a.ref.frames, b.ref.frames) - 1  # the last has no successor to agree on
    assert np.linalg.norm(a.grip(a.action)[:frames] - b.grip(b.action)[:frames], axis=1).max() < 1e-5
    turns = [rot6d_to_matrix(c.action.slot("right_ee_rot6d")[:frames]) for c in (a, b)]
    assert geodesic_distance(*turns).max() < 1e-4


def test_the_gripper_command_means_the_same_in_three_polarities(motion):
    """LIBERO -1 opens, CALVIN +1 opens, AgiBot 0 opens (and ramps): 1 is open in all, at the same times."""
    turns = []
    for source in ("libero", "calvin", "agibot"):
        command = motion[source].action.slot("right_gripper_open")[:, 0]
        assert (
            command[0] == pytest.approx(1)
            and command.min() == pytest.approx(0)
            and command[-1] == pytest.approx(1)
        )
        turns.append(motion[source].time_s[np.flatnonzero(np.diff(command > 0.25))])
    assert [len(times) for times in turns] == [2, 2, 2]  # closed once, opened once
    assert np.ptp(turns, axis=0).max() < 0.1
    assert not motion["egodex"].action.has("right_gripper_open")


def test_words_agree(motion):
    """The sentence in all; the stretches where a format has them, on one clock within a frame or two."""
    sentence = motion["libero"].ref.instruction
    assert motion["egodex"].ref.instruction == sentence == motion["agibot"].ref.instruction
    calvin_words = {s.text: s for s in motion["calvin"].ref.segments}
    assert sentence in calvin_words  # one window of several
    for segment in motion["agibot"].ref.segments:
        assert segment.text in calvin_words
        other = calvin_words[segment.text]
        assert segment.start < other.stop and other.start < segment.stop
