"""Teachers and anchors: hidden states that depend on what they may, chunks that repeat, decoders that travel."""

# ruff: noqa: E402 - what needs torch is imported once torch is known to be there
from pathlib import Path

import numpy as np
import pytest
from dpipe.schemas.errors import DataError, UsageError
from dpipe.schemas.normalisers import fit

torch = pytest.importorskip("torch")

from dpipe.models.action_decoder import load_decoder
from dpipe.models.policies import (
    EmbeddedPolicy,
    PolicyConfig,
    open_anchor,
    open_teacher,
    save_policy,
    visible,
)
from tiny_backbones import CAMERA, save_act

NAMES = ("x", "y", "z", "rx", "ry", "rz", "gripper")


def make_folder(folder: Path, kind: str, seed: int = 0, **sizes) -> Path:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    small = {"width": 32, "layers": 2, "heads": 2, "points": 2}
    config = PolicyConfig(kind, (CAMERA,), (0.0,) * 8, (1.0,) * 8, 7, (6,), **small | sizes)
    actions = np.random.default_rng(0).uniform(-1, 1, (100, 7))
    actions[:, 6] = np.sign(actions[:, 6])
    save_policy(folder, EmbeddedPolicy(config), fit(actions, names=NAMES), {"seed": seed})
    return folder


def window(batch: int, steps: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    images = {CAMERA: rng.integers(0, 256, (batch, steps, 64, 64, 3), dtype=np.uint8)}
    return images, rng.normal(size=(batch, steps, 8)), ["pick up the red cube"] * batch


def test_queries_see_their_own_and_earlier_steps_and_nothing_sees_a_query():
    # Two steps of one observation (o) and two queries (a, b): o0 a0 b0 o1 a1 b1
    expected = [
        "x.....",
        "xx....",
        "x.x...",
        "x..x..",
        "x..xx.",
        "x..x.x",
    ]
    assert ["".join("x" if v else "." for v in row) for row in visible(2, 1, 2, "cpu").tolist()] == expected


def test_a_windows_first_step_ignores_later_frames(tmp_path):
    teacher = open_teacher(f"embedded:{make_folder(tmp_path, 'teacher', window=3)}")
    images, state, texts = window(2, 3)
    whole = teacher.hidden(images, state, texts)
    assert whole.shape == (2, 3, 3, 32)
    blank = {CAMERA: images[CAMERA].copy()}
    blank[CAMERA][:, 1:] = 0
    changed = state.copy()
    changed[:, 1:] = 0
    np.testing.assert_allclose(teacher.hidden(blank, changed, texts)[:, 0], whole[:, 0], atol=1e-5)
    # A shorter window is the longer one's prefix: padding on the right is harmless.
    short = teacher.hidden({CAMERA: images[CAMERA][:, :2]}, state[:, :2], texts)
    np.testing.assert_allclose(short, whole[:, :2], atol=1e-5)


def test_hidden_states_are_layer_normed(tmp_path):
    teacher = open_teacher(f"embedded:{make_folder(tmp_path, 'teacher', window=1)}")
    hidden = teacher.hidden(*window(2, 1))
    np.testing.assert_allclose(hidden.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(hidden.var(-1), 1, atol=1e-2)


def test_the_decoder_beside_a_cache_decodes_half_precision_states_as_the_teacher_does(tmp_path):
    teacher = open_teacher(f"embedded:{make_folder(tmp_path, 'teacher', window=1)}")
    hidden = teacher.hidden(*window(4, 1))
    actions = teacher.decode(hidden)
    assert actions.shape == (4, 1, 3, 7)
    assert (np.abs(actions[..., :6]) <= 1).all() and ((actions[..., 6] > 0) & (actions[..., 6] < 1)).all()
    teacher.save_decoder(tmp_path / "decoder.safetensors")
    alone = load_decoder(tmp_path / "decoder.safetensors")
    half = torch.from_numpy(hidden.astype(np.float16).astype(np.float32))
    with torch.no_grad():
        assert np.abs(alone.actions(half).numpy() - actions).max() < 5e-3


def test_the_anchor_returns_a_normalised_arm_and_gripper_logits(tmp_path):
    anchor = open_anchor(f"embedded:{make_folder(tmp_path, 'anchor', queries=10)}")
    images, state, texts = window(3, 1)
    now = {CAMERA: images[CAMERA][:, 0]}
    arm, logits = anchor.act(now, state[:, 0], texts, np.arange(3))
    assert arm.shape == (3, 10, 6) and logits.shape == (3, 10, 1)
    again, _ = anchor.act(now, state[:, 0], texts, np.arange(3) + 7)
    np.testing.assert_array_equal(arm, again)
    assert anchor.describe()["stochastic"] is False


def test_the_digest_follows_weights_and_how_they_were_made(tmp_path):
    first = open_anchor(f"embedded:{make_folder(tmp_path / 'a', 'anchor')}").digest
    assert open_anchor(f"embedded:{make_folder(tmp_path / 'b', 'anchor')}").digest == first
    assert open_anchor(f"embedded:{make_folder(tmp_path / 'c', 'anchor', seed=1)}").digest != first


def test_a_folder_of_the_other_kind_or_none_is_refused(tmp_path):
    with pytest.raises(UsageError, match="dpipe train teacher"):
        open_teacher(f"embedded:{tmp_path}")
    make_folder(tmp_path, "anchor")
    with pytest.raises(DataError, match="expected an embedded teacher"):
        open_teacher(f"embedded:{tmp_path}")
    with pytest.raises(UsageError, match="known: embedded:<folder>, lerobot:"):
        open_anchor("openvla")


# -- LeRobot ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def act_folder(tmp_path_factory) -> Path:
    """A tiny ACT of the true architecture, saved by lerobot as its users have it."""
    pytest.importorskip("lerobot")
    return save_act(tmp_path_factory.mktemp("act"))


def test_an_act_checkpoint_is_a_teacher_whose_decoder_is_its_last_layer(act_folder, tmp_path):
    teacher = open_teacher(f"lerobot:{act_folder}")
    images, state, texts = window(2, 1)
    hidden = teacher.hidden(images, state, texts)
    assert hidden.shape == (2, 1, 3, 32) and teacher.width == 32
    anchor = open_anchor(f"lerobot:{act_folder}")
    arm, logits = anchor.act({CAMERA: images[CAMERA][:, 0]}, state[:, 0], texts, np.zeros(2, np.int64))
    assert arm.shape == (2, 10, 7) and logits.shape == (2, 10, 0)
    np.testing.assert_allclose(teacher.decode(hidden)[:, 0], arm[:, :3], atol=1e-5)
    teacher.save_decoder(tmp_path / "decoder.safetensors")
    with torch.no_grad():
        reread = load_decoder(tmp_path / "decoder.safetensors").actions(torch.from_numpy(hidden))
    np.testing.assert_allclose(reread[:, 0], arm[:, :3], atol=1e-5)


def test_an_act_checkpoint_brings_the_normaliser_its_postprocessor_inverts(act_folder):
    anchor = open_anchor(f"lerobot:{act_folder}")
    assert anchor.action.mode == "lerobot_meanstd"
    native = anchor.action.denormalise(np.ones((1, 7)))
    np.testing.assert_allclose(native[0], np.arange(7) + 2, atol=1e-6)


def test_a_camera_the_policy_needs_and_the_data_lack_is_named(act_folder):
    with pytest.raises(DataError, match=r"looks through observation.images.image; not there"):
        open_anchor(f"lerobot:{act_folder}").act({}, np.zeros((1, 8)), [""], np.zeros(1, np.int64))
