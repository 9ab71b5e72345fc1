"""AnchorRefine's mechanism: a weak anchor's residual is small and a refiner on it mends more than it spoils."""

# ruff: noqa: E402 - what needs torch is imported once torch is known to be there
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dpipe.models.policies import EmbeddedPolicy, PolicyConfig
from dpipe.stages.gripper import gripper_target
from dpipe.stages.residuals import compactness
from dpipe.trainer.anchorrefine import AnchorRefine, AnchorRefinePolicy, Config
from dpipe.trainer.draws import Draws
from dpipe.trainer.embedded import Imitation
from dpipe.trainer.loop import Phase
from dpipe.trainer.space import to_tensors
from toys import smooth_actions, toy_space, train_phase

ROWS, CHUNK = 6000, 4
NO_WORDS = torch.zeros(1, 48, dtype=torch.int64)
STEPS = 700


def toy_columns(rows: int, seed: int) -> dict[str, np.ndarray]:
    """Two arm dimensions and a gripper over a chunk of four, of a state of four."""
    state = np.random.default_rng(seed).uniform(-1, 1, (rows, 4)).astype(np.float32)
    fine = 0.25 * np.sin(3 * state[:, :1] + 2 * state[:, 1:2] + np.arange(CHUNK))
    arm = np.clip(smooth_actions(state, CHUNK) + fine[..., None], -1, 1)
    bent = 2.5 * state[:, 2:3] + np.sin(3 * state[:, 3:])
    closed = np.where(np.sin(bent + np.arange(CHUNK) * 0.3) > 0, 1.0, -1.0)
    action = np.concatenate([arm, closed[..., None]], -1).astype(np.float32)
    return {"observation.state": state, "action": action, "action_is_pad": np.zeros((rows, CHUNK), bool)}


def anchor_chunk(network: EmbeddedPolicy, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        words = NO_WORDS.expand(len(state), -1)
        hidden = network([], torch.from_numpy(state)[:, None], words)[:, 0]
        arm, logits = network.decoder(hidden)
    return arm.numpy(), logits.numpy()


def with_residuals(network: EmbeddedPolicy, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the residuals stage caches for these rows."""
    arm, logits = anchor_chunk(network, columns["observation.state"])
    closed = (columns["action"][..., 2:] > 0).astype(np.float64)
    return {
        **columns,
        "residuals_arm": arm,
        "residuals_delta": columns["action"][..., :2] - arm,
        "residuals_grip_logit": logits,
        "residuals_grip_target": gripper_target(closed, logits).astype(np.float32),
        "residuals_is_pad": columns["action_is_pad"],
    }


@pytest.fixture(scope="module")
def world() -> SimpleNamespace:
    """A weak anchor (one layer, 200 steps), its residuals, and the facts a run would read beside them."""
    space, columns = toy_space(4, 3, grippers=1), toy_columns(ROWS, 1)
    torch.manual_seed(0)
    sizes = PolicyConfig(
        "anchor", (), (0.0,) * 4, (1.0,) * 4, 3, (2,), window=1, queries=CHUNK, width=32, layers=1, heads=2
    )
    anchor = Imitation(sizes, space, gripper_weight=1.0)
    train_phase(anchor, Phase("train", 200), columns)
    rows = with_residuals(anchor.network, columns)
    delta = rows["residuals_delta"]
    facts = {
        "spec": "embedded:toy",
        "anchor": asdict(sizes),
        "chunk": CHUNK,
        "arm_dims": [0, 1],
        "gripper_dims": [2],
        "delta_std": delta.reshape(-1, 2).std(0).tolist(),
        "raw_std": columns["action"][..., :2].reshape(-1, 2).std(0).tolist(),
        "wrong": float((rows["residuals_grip_target"] != 0).mean()),
        "margin": 0.1,
    }
    return SimpleNamespace(space=space, anchor=anchor.network, rows=rows, facts=facts)


def refiner(world: SimpleNamespace, **options) -> AnchorRefine:
    torch.manual_seed(1)
    model = AnchorRefine(Config(heads=2, **options), world.space, world.facts)
    model.take_over(world.anchor)
    return model


def judge(model: AnchorRefine, refine: bool = True) -> SimpleNamespace:
    """On fresh rows: arm error and gripper decisions of the whole policy."""
    columns = toy_columns(2000, 9)
    policy = AnchorRefinePolicy(model, refine=refine)
    policy.run = CHUNK
    state = columns["observation.state"]
    actions = np.stack([policy.act({}, state, [""] * 2000) for _ in range(CHUNK)], 1)
    error = np.abs(actions[..., :2] - columns["action"][..., :2]).mean()
    return SimpleNamespace(error=error, right=(actions[..., 2] > 0) == (columns["action"][..., 2] > 0))


@pytest.fixture(scope="module")
def refined(world) -> AnchorRefine:
    model = refiner(world)
    train_phase(model, Phase("refine", STEPS), world.rows)
    return model


def test_the_residual_is_less_than_half_of_the_action(world):
    flat = world.rows["action"][..., :2].reshape(ROWS, -1)
    raw, rest = compactness(flat), compactness(world.rows["residuals_delta"].reshape(ROWS, -1))
    assert rest["mean_norm"] < 0.5 * raw["mean_norm"]


def test_an_untrained_refiner_is_exactly_the_anchor(world):
    model = refiner(world)
    arm, _ = anchor_chunk(world.anchor, toy_columns(2000, 9)["observation.state"])
    alone, whole = judge(model, refine=False), judge(model)
    assert alone.error == whole.error
    assert np.array_equal(alone.right, whole.right)
    expected = np.abs(arm - toy_columns(2000, 9)["action"][..., :2]).mean()
    assert whole.error == pytest.approx(expected, rel=1e-5)


def test_refining_a_weak_anchor_lowers_its_error_by_a_fifth_or_more(refined):
    assert judge(refined).error < 0.8 * judge(refined, refine=False).error


def test_gripper_decisions_turn_right_three_times_as_often_as_wrong(refined):
    before, after = judge(refined, refine=False).right, judge(refined).right
    mended, spoilt = (~before & after).sum(), (before & ~after).sum()
    assert mended > 3 * spoilt


def test_phase_2_leaves_the_anchor_as_it_was(world, refined):
    for name, value in world.anchor.state_dict().items():
        assert torch.equal(refined.anchor.state_dict()[name], value)


def test_the_control_trains_the_anchor_on_and_the_refiner_not_at_all(world):
    model = refiner(world, mode="continue")
    train_phase(model, Phase("continue", 40), world.rows)
    changed = {
        name
        for name, value in model.anchor.state_dict().items()
        if not torch.equal(value, world.anchor.state_dict()[name])
    }
    assert any(name.startswith("blocks") for name in changed)
    assert not model.delta.weight.any()
    assert judge(model).error == judge(model, refine=False).error


def test_the_direct_control_starts_at_nothing_and_learns_the_action_itself(world):
    model = refiner(world, mode="direct")
    mean_size = np.abs(toy_columns(2000, 9)["action"][..., :2]).mean()
    assert judge(model).error == pytest.approx(mean_size, rel=1e-5)
    train_phase(model, Phase("direct", 150), world.rows)
    assert judge(model).error < 0.6 * mean_size


@pytest.mark.parametrize(("mode", "first"), [("refine", 0.2), ("direct", 0.5)])
def test_a_dimension_that_never_moves_in_the_data_is_not_magnified(world, mode, first):
    facts = {**world.facts, "raw_std": [0.5, 0.0], "delta_std": [0.2, 1e-3]}
    model = AnchorRefine(Config(heads=2, mode=mode), world.space, facts)
    assert model.scale.tolist() == pytest.approx([first, 1.0])


def test_the_mean_keeps_right_decisions_and_pos_weight_lifts_the_others(world):
    batch = to_tensors({name: value[:64] for name, value in world.rows.items()}, world.space, "cpu")
    target = batch["residuals_grip_target"]
    _, plain = refiner(world)(batch, Draws.of_step(0, 0, 0, 64))
    _, lifted = refiner(world, pos_weight=5.0)(batch, Draws.of_step(0, 0, 0, 64))
    # Zero heads: the loss is the standardised target squared, most of it zero.
    size = refiner(world).gripper_scale
    assert float(plain["gripper"]) == pytest.approx(float((target**2).mean()) / size**2, rel=1e-5)
    assert float(lifted["gripper"]) == pytest.approx(5 * float(plain["gripper"]), rel=1e-5)
    assert float(plain["wrong"]) == pytest.approx(float((target != 0).float().mean()), rel=1e-6)


def test_reading_the_anchors_output_is_an_option(world):
    assert refiner(world).enter is None
    model = refiner(world, concat_anchor=True)
    torch.nn.init.normal_(model.delta.weight)
    state = torch.zeros(1, 4)
    arm = torch.zeros(1, CHUNK, 2)
    with torch.no_grad():
        one, _ = model.refine([], state, NO_WORDS, arm, torch.zeros(1, CHUNK, 1))
        other, _ = model.refine([], state, NO_WORDS, arm + 1, torch.zeros(1, CHUNK, 1))
    assert not torch.equal(one, other)
