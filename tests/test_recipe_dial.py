"""DIAL's mechanism: foresight decides the action, and stage 1 keeps the two systems' gradients apart."""

# ruff: noqa: E402 - what needs torch is imported once torch is known to be there
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dpipe.models.diffusion import beta15_times, euler_sample, flow_point
from dpipe.trainer.dial import Config, Dial
from dpipe.trainer.draws import Draws
from dpipe.trainer.loop import Phase
from dpipe.trainer.space import to_tensors
from toys import toy_space, train_phase

ROWS, TOKENS, CHANNELS, HORIZON, GOALS = 6000, 4, 6, 4, 8
STEPS = 350


def toy_columns(rows: int, seed: int) -> dict:
    """A point moves half the way to one of eight goals. Only the instruction names the goal, and only System 2
    reads it; features are a fixed mixture of the position, present and future."""
    fixed = np.random.default_rng(0)
    mixture = fixed.normal(size=(2, TOKENS * CHANNELS))
    goals = np.stack([np.cos(np.arange(GOALS) * np.pi / 4), np.sin(np.arange(GOALS) * np.pi / 4)], 1)
    rng = np.random.default_rng(seed)
    position, chosen = rng.uniform(-1, 1, (rows, 2)), rng.integers(0, GOALS, rows)
    way = 0.5 * (goals[chosen] - position)
    features = np.stack([np.tanh(place @ mixture) for place in (position, position + way)], 1)
    return {
        "observation.state": position.astype(np.float32),
        "action": np.repeat(way[:, None], HORIZON, 1).astype(np.float32),
        "action_is_pad": np.zeros((rows, HORIZON), bool),
        "foresight": features.reshape(rows, 2, TOKENS, CHANNELS).astype(np.float32),
        "task": [f"go to goal number{i}" for i in chosen],
    }


def toy_model(**options) -> Dial:
    torch.manual_seed(0)
    features = toy_columns(ROWS, 1)["foresight"].reshape(-1, CHANNELS)
    facts = {
        "tokens": TOKENS,
        "channels": CHANNELS,
        "mean": features.mean(0).tolist(),
        "std": features.std(0).tolist(),
        "arrays": {},
    }
    small = {
        "width": 32,
        "heads": 2,
        "foresee_layers": 1,
        "mix_layers": 1,
        "flow_layers": 2,
        "noise_draws": 2,
    }
    return Dial(Config(horizon=HORIZON, **small | options), toy_space(2, 2), facts)


def judge(model: Dial) -> dict[str, float]:
    """On fresh samples: foresight error, and action error with foreseen, shuffled and no foresight."""
    batch = to_tensors(toy_columns(1000, 9), model.space, "cpu")
    present, future = model.standardise(batch["foresight"]).unbind(1)
    state = batch["state"][:, 0]
    foreseen = model.imagine([], state, batch["text"], present)
    noise = torch.randn(1000, HORIZON, 2, generator=torch.Generator().manual_seed(0))

    def error(goal):
        return float((model.sample(goal, present, state, noise) - batch["action"]).abs().mean())

    return {
        "world": float(((foreseen - future) ** 2).mean()),
        "copy": float(((present - future) ** 2).mean()),
        "foreseen": error(foreseen),
        "shuffled": error(foreseen[torch.randperm(1000, generator=torch.Generator().manual_seed(1))]),
        "current": error(present),
    }


@pytest.fixture(scope="module")
def stages() -> tuple[dict[str, float], dict[str, float]]:
    """What stage 1 and, from its weights, stage 2 come to."""
    model, columns = toy_model(), toy_columns(ROWS, 1)
    train_phase(model, Phase("warm-up", STEPS), columns)
    first = judge(model)
    train_phase(model, Phase("end-to-end", STEPS), columns, seed=1, lr=5e-4)
    return first, judge(model)


def test_foresight_beats_copying_the_present_by_half(stages):
    for found in stages:
        assert found["world"] < 0.5 * found["copy"]


def test_actions_follow_the_foresight_and_fail_when_it_is_shuffled_or_the_present(stages):
    for found in stages:
        assert found["shuffled"] > 2 * found["foreseen"]
        assert found["current"] > 2 * found["foreseen"]


def test_training_end_to_end_does_not_worsen_the_action_and_keeps_the_foresight(stages):
    first, second = stages
    assert second["foreseen"] <= first["foreseen"]
    assert second["world"] <= 3 * first["world"]


def flow_gradients(model: Dial, stage: str) -> tuple[float, float]:
    """Size of the flow loss's gradient on System 2, and whether any reaches it at all."""
    model.begin(Phase(stage, 1))
    batch = to_tensors(toy_columns(8, 2), model.space, "cpu")
    present, future = model.standardise(batch["foresight"]).unbind(1)
    foreseen = model.projector(model.foresee([], batch["state"][:, 0], batch["text"], present))
    goal = future if stage == "warm-up" else foreseen
    loss = model._flow_loss(batch, goal, present, batch["state"][:, 0], Draws.of_step(0, 0, 0, 8))
    two = [*model.foresee.parameters(), *model.projector.parameters()]
    found = torch.autograd.grad(loss, two, allow_unused=True)
    reached = [g for g in found if g is not None]
    return sum(float(g.abs().sum()) for g in reached), len(reached)


def test_no_gradient_of_the_action_reaches_system_2_in_stage_1_and_one_does_in_stage_2():
    model = toy_model()
    # Gates of the flow layers start closed; open them as a few steps would.
    for layer in model.act.flow:
        torch.nn.init.normal_(layer.modulate.weight, std=0.1)
    assert flow_gradients(model, "warm-up") == (0, 0)
    assert flow_gradients(model, "end-to-end")[0] > 0


def test_a_whole_step_of_stage_1_moves_the_systems_by_their_own_losses_only():
    model = toy_model()
    model.begin(Phase("warm-up", 1))
    batch = to_tensors(toy_columns(8, 2), model.space, "cpu")
    loss, _ = model(batch, Draws.of_step(0, 0, 0, 8))
    gradients = torch.autograd.grad(loss, list(model.foresee.parameters()), retain_graph=True)
    batch["action"] = batch["action"] + 0.3  # another action: System 2 must not notice
    again, _ = model(batch, Draws.of_step(0, 0, 0, 8))
    for a, b in zip(gradients, torch.autograd.grad(again, list(model.foresee.parameters())), strict=True):
        assert torch.equal(a, b)


def test_a_separate_head_keeps_the_foresight_loss_from_the_shared_projector():
    model = toy_model(separate_loss_head=True)
    model.begin(Phase("end-to-end", 1))
    batch = to_tensors(toy_columns(8, 2), model.space, "cpu")
    present = model.standardise(batch["foresight"])[:, 0]
    thought = model.foresee([], batch["state"][:, 0], batch["text"], present)
    judged = model.loss_projector(thought.detach())
    # It begins as a copy, and its loss reaches neither the shared projector nor what comes before it.
    torch.testing.assert_close(judged, model.projector(thought))
    used = [*model.projector.parameters(), *model.foresee.parameters()]
    assert all(g is None for g in torch.autograd.grad(judged.sum(), used, allow_unused=True))


def test_samples_whose_future_is_padding_can_be_left_out_of_the_foresight_loss():
    model = toy_model(pad_weight=0.0)
    batch = to_tensors(toy_columns(8, 2), model.space, "cpu")
    batch["foresight_is_pad"] = torch.zeros(8, 2, dtype=torch.bool)
    batch["foresight_is_pad"][4:, 1] = True
    _, whole = model(batch, Draws.of_step(0, 0, 0, 8))
    batch["foresight"][4:, 1] += 5.0
    _, other = model(batch, Draws.of_step(0, 0, 0, 8))
    assert whole["world"] == other["world"]


# -- the flow, on paper -----------------------------------------------------------------------------------


def test_the_flow_example_of_the_definition():
    action, noise = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.0, 0.5]])
    x, v = flow_point(action, noise, torch.tensor([0.25]))
    torch.testing.assert_close(x, torch.tensor([[0.25, 0.125]]))
    torch.testing.assert_close(v, torch.tensor([[1.0, -1.5]]))
    torch.testing.assert_close(x + 0.75 * v, action)


def test_euler_steps_along_a_straight_flow_arrive_at_the_data():
    action, noise = torch.tensor([[[0.3]], [[-0.7]]]), torch.randn(2, 1, 1)
    torch.testing.assert_close(euler_sample(lambda x, tau: action - noise, noise, 4), action)


def test_beta_times_lie_in_the_unit_interval_and_favour_noise():
    tau = beta15_times(torch.rand(100_000, generator=torch.Generator().manual_seed(0)))
    assert tau.min() >= 0 and tau.max() <= 1
    # E[b] of Beta(1.5, 1) is 0.6
    assert tau.mean().item() == pytest.approx(1 - 0.6 / 0.999, abs=5e-3)
