"""residuals: anchor plus residual is the action, grippers are carried past 0.5, and the report says how small."""

import shutil

import numpy as np
import pytest
from dpipe.models import policies
from dpipe.pipeline.precompute import precompute
from dpipe.schemas.chunks import chunk_index
from dpipe.schemas.errors import DataError, UsageError
from dpipe.schemas.folds import fold_of, seen_in_training
from dpipe.schemas.normalisers import fit
from dpipe.stages.gripper import decide, gripper_target, logit_of, probability
from dpipe.stages.residuals import compactness, near_switch
from dpipe.streams.targets import open_targets
from hypothesis import given
from hypothesis import strategies as st
from tiny_dataset import ACTION, CAMERA, episode_columns, picture, write_tiny

torch = pytest.importorskip("torch")

K = 5
EPISODES = [(0, 14), (1, 11), (2, 9), (3, 12)]

# --- on paper ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("g", "logit", "p", "s", "target", "moved", "decision"),
    [
        (1, 2.0, 0.880797, 0, 0.0, 0.880797, 1),
        (1, -2.0, 0.119203, 1, 0.480797, 0.6, 1),
        (0, 2.0, 0.880797, -1, -0.480797, 0.4, 0),
        (0, -2.0, 0.119203, 0, 0.0, 0.119203, 0),
        (1, -0.1, 0.475021, 1, 0.124979, 0.6, 1),
        (0, 0.1, 0.524979, -1, -0.124979, 0.4, 0),
        (1, 0.0, 0.5, 1, 0.1, 0.6, 1),
        (0, 0.0, 0.5, 0, 0.0, 0.5, 0),
    ],
)
def test_the_gripper_table(g, logit, p, s, target, moved, decision):
    gripper, logits = np.array([g]), np.array([logit])
    assert probability(logits)[0] == pytest.approx(p, abs=1e-6)
    found = gripper_target(gripper, logits, margin=0.1)
    assert found[0] == pytest.approx(target, abs=1e-6) and np.sign(found[0]) == s
    assert probability(logits)[0] + found[0] == pytest.approx(moved, abs=1e-6)
    assert decide(logits, found)[0] == bool(decision)


@given(st.integers(0, 1), st.floats(-30, 30), st.floats(1e-3, 0.4))
def test_the_correction_always_decides_right_by_the_margin(g, logit, margin):
    gripper, logits = np.array([g]), np.array([logit])
    correction = gripper_target(gripper, logits, margin)
    assert decide(logits, correction)[0] == bool(g)
    if correction[0]:
        assert abs(probability(logits)[0] + correction[0] - 0.5) == pytest.approx(margin, abs=1e-9)


def test_a_probability_returns_to_its_logit():
    np.testing.assert_allclose(logit_of(probability(np.array([-3.0, 0.0, 4.0]))), [-3, 0, 4], atol=1e-9)
    assert np.isfinite(logit_of(np.array([0.0, 1.0]))).all()


def test_compactness_by_hand():
    found = compactness(np.array([[3.0, 4.0], [0.0, 0.0]]))
    assert found == {"mean_norm": 2.5, "trace": 12.5}  # 4.5 + 8


def test_frames_near_a_switch_are_those_within_five_steps():
    gripper = np.zeros((20, 1))
    gripper[10:] = 1
    assert np.flatnonzero(near_switch(gripper)).tolist() == list(range(5, 16))
    assert not near_switch(np.ones((8, 1))).any()


def test_folds_part_the_episodes():
    contents = [np.random.default_rng(i).bytes(16).hex() for i in range(200)]
    folds = [fold_of(c, 4) for c in contents]
    assert set(folds) == {0, 1, 2, 3}
    for k in range(4):
        seen = seen_in_training(contents, k, 4)
        assert [not s for s in seen] == [f == k for f in folds]
    assert all(seen_in_training(contents, 0, 1))


# --- the target --------------------------------------------------------------------------------------------


def save_anchor(place, seed=0, split="train"):
    torch.manual_seed(seed)
    config = policies.PolicyConfig(
        kind="anchor",
        cameras=(CAMERA,),
        state_mean=(0.0,) * 4,
        state_std=(1.0,) * 4,
        action_dim=4,
        grippers=(3,),
        queries=K,
        width=32,
        layers=1,
        heads=2,
        image_size=32,
        points=4,
    )
    rows = np.concatenate([episode_columns(*e)["action"] for e in EPISODES])
    network = policies.EmbeddedPolicy(config)
    policies.save_policy(place, network, fit(rows, names=ACTION), {"seed": seed, "steps": 0, "split": split})
    return place


@pytest.fixture(scope="module")
def anchors(tmp_path_factory):
    base = tmp_path_factory.mktemp("anchors")
    return [save_anchor(base / f"a{i}" / "policy", i) for i in range(2)]


def make(root, anchors, **options):
    names = [f"embedded:{folder}" for folder in anchors]
    (made,) = precompute(root, ["residuals"], {"residuals": {"anchor": names, **options}})
    return made


def truth(e):
    rows = np.concatenate([episode_columns(*x)["action"] for x in EPISODES])
    normal = fit(rows, names=ACTION).normalise(episode_columns(*EPISODES[e])["action"])
    index, is_pad = chunk_index(EPISODES[e][1], K)
    return normal[index], is_pad


def test_anchor_plus_residual_is_the_action_and_the_gripper_is_carried_over(tmp_path, anchors):
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    made = make(root, anchors[:1])
    targets = open_targets(root, ["residuals"])
    assert set(targets.names) == {f"residuals_{n}" for n in ("arm", "delta", "grip_logit", "grip_target")}
    anchor = policies.open_anchor(f"embedded:{anchors[0]}")
    for e, (seed, frames) in enumerate(EPISODES):
        found = targets.take(episode=e, frame=np.arange(frames))
        chunks, is_pad = truth(e)
        np.testing.assert_array_equal(found["residuals_is_pad"], is_pad)
        pictures = np.stack([picture(seed, t) for t in range(frames)])
        state = episode_columns(seed, frames)["observation.state"]
        arm, logit = anchor.act(
            {CAMERA: pictures}, state, [f"task {seed % 2}"] * frames, np.zeros(frames, int)
        )
        np.testing.assert_allclose(found["residuals_delta"] + arm, chunks[..., :3], atol=1e-6)
        np.testing.assert_allclose(found["residuals_arm"], arm, atol=2e-3)
        np.testing.assert_allclose(found["residuals_grip_logit"], logit, atol=1e-5)
        right = decide(found["residuals_grip_logit"], found["residuals_grip_target"])
        np.testing.assert_array_equal(right, chunks[..., 3:] > 0)
    report = made.report
    everything = report["groups"]["all"]
    assert everything["chunks"] == sum(n - K + 1 for _, n in EPISODES)  # whole chunks only
    raw = np.concatenate(
        [truth(e)[0][: n - K + 1, :, :3].reshape(-1, 3 * K) for e, (_, n) in enumerate(EPISODES)]
    )
    assert everything["raw"] == pytest.approx(compactness(raw))
    assert set(report["groups"]) == {"all", "at_switch", "away_from_switch", "training"}
    assert "cross-fitting" in report["note"] and 0 <= report["gripper_nonzero"] <= 1


def test_each_episode_asks_the_anchor_that_has_not_seen_it(tmp_path, anchors):
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    made = make(root, anchors)
    assert "folds2" in made.folder.name and "held_out" in made.report["groups"]
    alone = []
    for i, folder in enumerate(anchors):
        (one,) = precompute(
            root, ["residuals"], {"residuals": {"anchor": [f"embedded:{folder}"]}}, name=f"alone{i}"
        )
        alone.append(one)
    contents = targets_contents(root)
    both = open_targets(root, [f"residuals:name={made.folder.name},array=delta"])
    for e, content in enumerate(contents):
        k = fold_of(content, 2)
        single = open_targets(root, [f"residuals:name=alone{k},array=delta"])
        np.testing.assert_array_equal(
            both.take(episode=e, frame=3)["residuals"], single.take(episode=e, frame=3)["residuals"]
        )


def targets_contents(root):
    from dpipe.streams.dataset import open_dataset

    return open_dataset(root).contents()


class Noisy:
    """The embedded anchor with noise from the seed, as a flow policy has it."""

    scale = 0.1

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def describe(self):
        return {**self.inner.describe(), "stochastic": True}

    def act(self, images, state, texts, seeds):
        arm, logit = self.inner.act(images, state, texts, seeds)
        noise = np.stack([np.random.default_rng(int(s)).normal(size=arm.shape[1:]) for s in seeds])
        return arm + np.float32(self.scale) * noise.astype(np.float32), logit


def test_an_anchor_that_draws_noise_is_seeded_and_its_noise_reported(tmp_path, anchors, monkeypatch):
    opened = policies.open_anchor
    monkeypatch.setattr(policies, "open_anchor", lambda spec, device="cpu": Noisy(opened(spec, device)))
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    made = make(root, anchors[:1], draws=2)
    targets = open_targets(root, ["residuals:array=delta"])
    found = targets.take(index=np.arange(14))["residuals"]
    assert found.shape == (14, 2, K, 3)
    assert (found[:, 0] - found[:, 1]).std() == pytest.approx(0.1 * np.sqrt(2), rel=0.1)
    noise = made.report["noise"]
    assert noise["between_draws"] == pytest.approx(0.01, rel=0.2) and "warning" not in noise
    shutil.rmtree(made.folder)
    again = make(root, anchors[:1], draws=2)
    np.testing.assert_array_equal(
        open_targets(root, ["residuals:array=delta"]).take(index=np.arange(14))["residuals"], found
    )
    assert again.report["noise"] == noise
    monkeypatch.setattr(Noisy, "scale", 9.0)
    (loud,) = precompute(
        root, ["residuals"], {"residuals": {"anchor": [f"embedded:{anchors[0]}"]}}, name="loud"
    )
    assert "sampler's noise" in loud.report["noise"]["warning"]


def test_anchors_that_do_not_fit_are_refused(tmp_path, anchors):
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    with pytest.raises(UsageError, match="dpipe train anchor"):
        precompute(root, ["residuals"])
    with pytest.raises(UsageError, match="longer than the anchor's own of 5"):
        make(root, anchors[:1], chunk=9)
    with pytest.raises(UsageError, match="always gives the same chunk"):
        make(root, anchors[:1], draws=3)
    other = save_anchor(tmp_path / "other" / "policy")
    import json

    told = json.loads((other / "policy.json").read_text())
    told["action"]["eps"], told["action"].pop("digest")
    told["action"] = {**told["action"], "clip": None}
    (other / "policy.json").write_text(json.dumps(told))
    with pytest.raises(DataError, match="differs from"):
        make(root, [anchors[0], other])


def test_a_shorter_chunk_is_the_beginning_of_the_longer(tmp_path, anchors):
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    long, short = make(root, anchors[:1]), make(root, anchors[:1], chunk=2)
    a = open_targets(root, [f"residuals:name={long.folder.name},array=delta"]).take(index=4)["residuals"]
    b = open_targets(root, [f"residuals:name={short.folder.name},array=delta"]).take(index=4)["residuals"]
    np.testing.assert_array_equal(a[:2], b)
