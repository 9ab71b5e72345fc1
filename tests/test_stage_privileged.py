"""privileged: both branches see the same noise, and the cache alone makes it again.

No base policy ships yet, so the stage is built over one that can be worked out by hand.
"""

import numpy as np
import pytest
from dpipe.pipeline import precompute as module
from dpipe.pipeline import target_parts
from dpipe.pipeline.precompute import precompute
from dpipe.schemas.chunks import chunk_index
from dpipe.schemas.errors import UsageError
from dpipe.schemas.normalisers import fit
from dpipe.stages.privileged import draws_of, make_stage, noisy_chunks
from dpipe.streams.targets import open_targets
from tiny_dataset import ACTION, CAMERA, episode_columns, write_tiny

EPISODES = [(0, 14), (1, 9)]
K, DRAWS, FUTURE = 4, 3, (2, 5)


class ByHand:
    """v_base is x plus its time; the teacher adds the frame number of the last future frame over 100."""

    cameras, chunk, future = (CAMERA,), K, FUTURE
    action = fit(np.concatenate([episode_columns(*e)["action"] for e in EPISODES]), names=ACTION)
    digest, frame_size = "by-hand", None

    def describe(self):
        return {"weights": "w"}

    def velocities(self, images, future, state, texts, noisy):
        assert images[CAMERA].ndim == 4 and future[CAMERA].shape[1] == len(FUTURE)
        base = noisy.x + noisy.u[..., None, None]
        # the test pictures carry their frame number in the first pixel
        return base, base + future[CAMERA][:, -1, 0, 0, 1].astype(np.float32)[:, None, None, None] / 100


@pytest.fixture
def made(tmp_path, monkeypatch):
    stage = make_stage(lambda spec, device: ByHand())
    for place in (module, target_parts):
        monkeypatch.setattr(place, "load_stage", lambda name: stage)
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    (target,) = precompute(root, ["privileged"], {"privileged": {"base": "embedded:x", "draws": DRAWS}})
    return root, target


def test_the_noisy_action_is_made_again_from_the_cache_alone(made):
    root, _ = made
    targets = open_targets(root, ["privileged"])
    for e, (seed, frames) in enumerate(EPISODES):
        found = targets.take(episode=e, frame=np.arange(frames))
        index, is_pad = chunk_index(frames, K)
        chunks = ByHand.action.normalise(episode_columns(seed, frames)["action"])[index]
        np.testing.assert_array_equal(found["privileged_is_pad"], is_pad)
        for k in range(DRAWS):
            times = found["privileged_t_act"][:, k]
            x = noisy_chunks(chunks, found["privileged_seed"][:, k], times)
            expected = x + times[:, None, None]
            np.testing.assert_allclose(found["privileged_v_base"][:, k], expected, atol=4e-3)


def test_the_residual_is_what_the_future_adds(made):
    root, target = made
    targets = open_targets(root, ["privileged:array=resid"])
    for e, (_, frames) in enumerate(EPISODES):
        found = targets.take(episode=e, frame=np.arange(frames))["privileged"]
        last = np.minimum(np.arange(frames) + FUTURE[-1], frames - 1) / 100
        np.testing.assert_allclose(found, np.broadcast_to(last[:, None, None, None], found.shape), atol=2e-3)
    assert target.report["mean_over_draws_share"] == pytest.approx(1, abs=0.02)  # the same in every draw
    assert 0 < target.report["residual_share"] < 1


def test_draws_belong_to_the_episode_and_cover_the_times():
    first, again = (draws_of("ab" * 16, 50, 8, 0) for _ in range(2))
    np.testing.assert_array_equal(first.seed, again.seed)
    assert np.sort((first.t_act * 8).astype(int), axis=1).tolist() == [list(range(8))] * 50
    assert len(np.unique(np.concatenate([first.seed.ravel(), first.video_seed.ravel()]))) == 800
    assert (draws_of("ab" * 16, 20, 8, 0).seed == first.seed[:20]).all()
    assert (draws_of("cd" * 16, 50, 8, 0).seed != first.seed).all()
    assert abs(np.corrcoef(first.t_act.ravel(), first.t_vid.ravel())[0, 1]) < 0.2


def test_no_base_is_said(tmp_path, monkeypatch):
    stage = make_stage(lambda spec, device: ByHand())
    monkeypatch.setattr(module, "load_stage", lambda name: stage)
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    with pytest.raises(UsageError, match="no base policy"):
        precompute(root, ["privileged"])
