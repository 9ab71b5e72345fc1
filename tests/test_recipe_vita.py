"""VITA's mechanism: hidden states aligned first, the imported decoder then needs next to no training."""

# ruff: noqa: E402 - what needs torch is imported once torch is known to be there
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dpipe.models.policies import PolicyConfig
from dpipe.trainer.embedded import Imitation
from dpipe.trainer.loop import Phase
from dpipe.trainer.space import to_tensors
from dpipe.trainer.vita import RECIPE, Config, Vita, VitaPolicy
from toys import smooth_actions, toy_space, train_phase

ROWS, TUNE_STEPS, TUNE_LR = 6000, 300, 2e-4
NO_WORDS = torch.zeros(1, 48, dtype=torch.int64)


@pytest.fixture(scope="module")
def world():
    """State 4, two arm dimensions and a gripper; a teacher trained on it, and its hidden states for every row."""
    space = toy_space(4, 3, grippers=1)
    state = np.random.default_rng(0).uniform(-1, 1, (ROWS, 4)).astype(np.float32)
    closed = np.where(np.sin(3 * state[:, 2:3] + np.arange(3) * 0.3) > 0, 1.0, -1.0)
    action = np.concatenate([smooth_actions(state, 3), closed[..., None]], -1).astype(np.float32)
    columns = {"observation.state": state, "action": action, "action_is_pad": np.zeros((ROWS, 3), bool)}
    torch.manual_seed(0)
    sizes = PolicyConfig(
        "teacher", (), (0.0,) * 4, (1.0,) * 4, 3, (2,), window=1, queries=3, width=32, layers=1, heads=2
    )
    teacher = Imitation(sizes, space, gripper_weight=0.1)
    train_phase(teacher, Phase("train", 800), columns, lr=3e-3)
    with torch.no_grad():
        hidden = teacher.network([], torch.from_numpy(state)[:, None], NO_WORDS.expand(ROWS, -1))[:, 0]
    return space, teacher.network.decoder, {**columns, "teacher": hidden.numpy()}


def student(world, mode: str) -> Vita:
    space, decoder, _ = world
    torch.manual_seed(1)
    config = Config(mode=mode, width=48, layers=1, heads=2, fingers=0, pretrained=True)
    model = Vita(config, space, {"width": 32, "decoder": decoder.describe()})
    if mode != "scratch":
        model.decoder.load_state_dict(decoder.state_dict())
    return model


def errors(model: Vita, columns) -> tuple[float, float]:
    """(arm error, squared distance to the teacher's states)."""
    with torch.no_grad():
        hidden = model.hidden([], torch.from_numpy(columns["observation.state"]), NO_WORDS.expand(ROWS, -1))
        arm, _ = model.decoder(hidden)
    away = (hidden - torch.from_numpy(columns["teacher"])) ** 2
    return float((arm - torch.from_numpy(columns["action"][..., :2])).abs().mean()), float(away.mean())


@pytest.fixture(scope="module")
def aligned(world) -> Vita:
    model = student(world, "two-stage")
    train_phase(model, Phase("align", 700), world[2], lr=3e-3)
    return model


def test_alignment_explains_most_of_the_teachers_states(world, aligned):
    variance = world[2]["teacher"].var(axis=0).mean()
    assert errors(aligned, world[2])[1] < 0.2 * variance


def test_after_alignment_300_steps_beat_reuse_and_scratch_by_more_than_half(world, aligned):
    found = {}
    for mode in ("two-stage", "reuse", "scratch"):
        model = student(world, mode)
        if mode == "two-stage":
            model.load_state_dict(aligned.state_dict())
        train_phase(model, Phase("tune", TUNE_STEPS, TUNE_LR), world[2])
        found[mode] = errors(model, world[2])[0]
    assert found["two-stage"] < 0.5 * found["reuse"]
    assert found["two-stage"] < 0.5 * found["scratch"]


def test_stage_1_trains_state_encoder_token_and_mapper_alone_and_stage_2_all_but_vision(world):
    model = student(world, "two-stage")

    def trained() -> set[str]:
        return {name.split(".")[0] for name, p in model.student.named_parameters() if p.requires_grad} | {
            name for name in ("mapper", "decoder") if next(getattr(model, name).parameters()).requires_grad
        }

    model.begin(Phase("align", 1))
    assert trained() == {"state", "action", "mapper"}
    model.begin(Phase("tune", 1))
    assert trained() == {"state", "action", "blocks", "norm", "mapper", "decoder"}


def test_padded_steps_do_not_pull_on_the_alignment(world):
    model = student(world, "two-stage")
    model.begin(Phase("align", 1))
    rows = {name: value[:4].copy() for name, value in world[2].items()}
    rows["action_is_pad"][:, 2] = True
    other = {**rows, "teacher": rows["teacher"].copy()}
    other["teacher"][:, 2] = 99.0
    losses = [model(to_tensors(given, model.space, "cpu"), None)[0].item() for given in (rows, other)]
    assert losses[0] == losses[1]


def test_the_controls_skip_alignment_and_spend_the_same_steps_on_actions():
    def phases(mode: str) -> list[tuple[str, int]]:
        return [(phase.name, phase.steps) for phase in RECIPE.phases(Config(mode=mode), 1000)]

    assert phases("two-stage") == [("align", 600), ("tune", 400)]
    assert phases("reuse") == phases("scratch") == [("tune", 400)]


def test_the_policy_speaks_native_actions_and_closes_by_probability(world):
    model = student(world, "reuse")
    policy = VitaPolicy(model, run=2)
    state = world[2]["observation.state"][:5]
    first, second, third = (policy.act({}, state, [""] * 5) for _ in range(3))
    assert first.shape == (5, 3) and len(policy.clock["student"]) == 2
    assert not np.array_equal(first, second) and np.array_equal(first, third)
    with torch.no_grad():
        _, logits = model.decoder(model.hidden([], torch.from_numpy(state), NO_WORDS.expand(5, -1)))
    np.testing.assert_array_equal(first[:, 2] > 0, logits[:, 0, 0].numpy() > 0)
