"""Libra's mechanisms: intent helps, the curriculum closes the gap between training and acting, once."""
# ruff: noqa: E402 - what needs torch is imported once torch is known to be there

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from dpipe.schemas import bins
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from dpipe.trainer.draws import Draws
from dpipe.trainer.libra import (
    RECIPE,
    Config,
    Curriculum,
    IntentBuffer,
    Libra,
    LibraPolicy,
    Waypoint,
    answers,
    bin_centre,
    latency_per_refinement,
    next_word,
    sample_bins,
    states_shown,
)
from dpipe.trainer.loop import Phase
from dpipe.trainer.losses import valid_steps
from dpipe.trainer.space import to_tensors
from toys import smooth_actions, toy_space, train_phase

STEPS, SAMPLES = 500, 8000


def toy_columns(samples: int, steps: int, observed: int, seed: int) -> dict[str, np.ndarray]:
    """A smooth function of the state with noise of half a bin: what the bins say, the state alone does not."""
    state = np.random.default_rng(seed).uniform(-1, 1, (samples, 3)).astype(np.float32)
    action = smooth_actions(state, steps, noise=0.1, seed=seed)
    return {
        "observation.state": np.repeat(state[:, None], observed, 1),
        "action": action,
        "action_is_pad": np.zeros((samples, steps), bool),
        "tokens": bins.encode(action, 10),
    }


def train_toy(steps: int = STEPS, seed: int = 0, **options) -> Libra:
    torch.manual_seed(seed)
    tiny = {
        "prediction": "epsilon",
        "width": 32,
        "heads": 2,
        "chunk": 2,
        "slices": 1,
        "planner_layers": 1,
        "refiner_layers": 1,
    }
    config = Config(**tiny | options)
    model = Libra(config, toy_space())
    columns = toy_columns(SAMPLES, config.plan_steps, config.slices, 1)
    model.news = train_phase(model, Phase("train", steps), columns, seed)
    return model


def judge(model: Libra, intent: str) -> SimpleNamespace:
    """Noise loss and action error on fresh samples, with the true bins or with the planner's."""
    columns = toy_columns(2000, model.config.plan_steps, model.config.slices, 7)
    batch = to_tensors(columns, model.space, "cpu")
    draws = Draws.of_step(5, 0, 0, 2000)
    c = model.config
    with torch.no_grad():
        moment = [], batch["state"][:, 0], batch["text"]
        logits = model.planner(model.look(*moment, refining=False))
        given = batch["tokens"]
        if intent == "planner":
            given = sample_bins(logits, draws.uniform(c.plan_steps, 2))
        valid = valid_steps(batch["is_pad"], batch["dims"]).expand_as(given)
        seen, part = model.look(*moment, refining=True), torch.zeros(2000, dtype=torch.int64)
        loss = model._diffusion_loss(seen, batch["action"], valid, given, part, draws)
        action = model.refine(*moment, given[:, : c.chunk], draws.normal(c.chunk, 2))
    error = (action - batch["action"][:, : c.chunk]).abs().mean()
    return SimpleNamespace(loss=float(loss), error=float(error))


@pytest.fixture(scope="module")
def teacher() -> Libra:
    return train_toy(intent="teacher")


@pytest.fixture(scope="module")
def curriculum() -> Libra:
    return train_toy(intent="curriculum")


def test_true_intent_lowers_the_noise_loss_by_more_than_a_tenth(teacher):
    without = train_toy(intent="none")
    assert judge(teacher, "true").loss < 0.9 * judge(without, "true").loss


def test_the_curriculum_halves_the_gap_between_the_planners_intent_and_the_true_one(teacher, curriculum):
    def gap(model: Libra) -> float:
        return judge(model, "planner").error - judge(model, "true").error

    assert gap(teacher) > 0.02  # there is a gap to close
    assert gap(curriculum) < gap(teacher) / 2


def test_the_curriculum_switches_exactly_once_and_says_so(curriculum):
    assert len(curriculum.news) == 1
    assert curriculum.curriculum.switched_at == round(STEPS / 6)
    assert "fallback" in curriculum.news[0]


@given(st.lists(st.floats(0, 1), min_size=30, max_size=200), st.floats(0.05, 0.95))
def test_the_latch_closes_at_most_once_whatever_the_accuracy_does(values, tau):
    latch = Curriculum(tau=tau, min_steps=5, fallback_step=len(values))
    closed = [step for step, value in enumerate(values, 1) if latch.observe(step, value)]
    assert len(closed) == 1 and closed[0] >= 5
    assert latch.switched_at == closed[0]


def test_the_latch_needs_the_average_above_tau_and_the_minimum_of_steps():
    latch = Curriculum(tau=0.5, min_steps=3, fallback_step=1000)
    assert [latch.observe(step, 0.6) for step in (1, 2, 3, 4)] == [False, False, True, False]
    slow = Curriculum(tau=0.5, min_steps=1, fallback_step=1000)
    # One good step after many bad ones does not move an average of a hundred.
    assert not any(slow.observe(step, 0.0) for step in range(1, 101))
    assert not slow.observe(101, 1.0)


def test_additive_phi_returns_the_action_from_its_residual_exactly():
    action = torch.tensor([[0.37, -0.37, 0.999, -1.0, 0.0]])
    token = torch.from_numpy(bins.encode(action.numpy(), 10).astype(np.int64))
    residual = 10 * (action - bin_centre(token, 10))
    assert residual.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(bin_centre(token, 10) + residual / 10, action)
    assert bin_centre(torch.tensor([10]), 10).item() == 0  # unknown


@pytest.mark.parametrize("phi", ["implicit", "additive"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_either_phi_and_either_prediction_learn_the_action(phi, prediction):
    model = train_toy(steps=250, phi=phi, prediction=prediction, intent="teacher")
    # Two draws from one bin differ by a third of its width on average, 0.067: additive starts from there.
    assert judge(model, "true").error < (0.08 if phi == "additive" else 0.12)


def test_the_refiner_is_trained_on_every_slice_of_the_plan():
    model = Libra(Config(width=32, heads=2, chunk=2, slices=3), toy_space())
    batch = to_tensors(toy_columns(16, 6, 3, 0), model.space, "cpu")
    seen = set()
    original = model.refiner.intent.forward

    def spy(given):
        seen.update(tuple(row.flatten().tolist()) for row in given)
        return original(given)

    model.refiner.intent.forward = spy
    for step in range(8):
        model(batch, Draws.of_step(0, 0, step, 16))
    slices = batch["tokens"].unflatten(1, (3, 2))
    for m in range(3):
        assert {tuple(row.flatten().tolist()) for row in slices[:, m]} & seen


def test_padded_steps_and_absent_dimensions_carry_no_loss():
    model = Libra(Config(width=32, heads=2, chunk=2, slices=2), toy_space())
    columns = toy_columns(8, 4, 2, 0)
    columns["action_is_pad"][:, 3:] = True
    columns["action_dims"] = np.array([True, False])
    changed = {name: value.copy() for name, value in columns.items()}
    changed["action"][:, 3:] = 0.123
    changed["tokens"][:, 3:] = 4
    changed["tokens"][..., 1] = 255
    losses = []
    for version in (columns, changed):
        _, metrics = model(to_tensors(version, model.space, "cpu"), Draws.of_step(0, 0, 0, 8))
        losses.append(float(metrics["plan"]))
    assert losses[0] == losses[1]


def test_sampled_bins_follow_the_logits():
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(20_000, 3)
    drawn = sample_bins(logits, torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    shares = torch.bincount(drawn, minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.25, 0.25]), atol=0.02, rtol=0)


# -- asynchronous execution -------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 40))
def test_plans_are_made_once_per_m_refinements_and_read_in_order(slices, chunk, refinements):
    buffer, plans, read = IntentBuffer(), 0, []
    for _ in range(refinements):
        if not buffer:
            buffer.push(range(plans * slices * chunk, (plans + 1) * slices * chunk))
            plans += 1
        read += buffer.pop(chunk)
    assert plans == -(-refinements // slices)
    assert read == list(range(refinements * chunk))


def test_latency_fits_the_papers_table_6():
    figures = [latency_per_refinement(60, 92, m) for m in (2, 3, 4, 5)]
    assert [round(value) for value in figures] == [122, 112, 107, 104]
    assert [round(100 * (1 - value / 220), 1) for value in figures] == [44.5, 49.1, 51.4, 52.7]


class _Counted(Libra):
    plans = refinements = 0

    def plan(self, *seen):
        self.plans += 1
        return super().plan(*seen)

    def refine(self, *seen):
        self.refinements += 1
        return super().refine(*seen)


def test_the_policy_plans_once_per_m_chunks_and_again_after_a_reset_or_new_words():
    model = _Counted(Config(width=32, heads=2, chunk=2, slices=3, sample_steps=2), toy_space())
    policy = LibraPolicy(model)
    state = np.zeros((4, 3), np.float32)
    for _ in range(7):  # 4 chunks of 2: one step into the fourth
        assert policy.act({}, state, ["a"] * 4).shape == (4, 2)
    assert (model.plans, model.refinements) == (2, 4)
    policy.reset()
    policy.act({}, state, ["a"] * 4)
    assert (model.plans, model.refinements) == (3, 5)
    policy.act({}, state, ["b"] * 4)
    assert (model.plans, model.refinements) == (4, 6)
    assert len(policy.clock["plan"]) == 4 and len(policy.clock["refine"]) == 6


# -- one pair of eyes, and where the hand goes ------------------------------------------------------------


def test_the_next_word_to_a_gripper_is_sought_after_the_frame_that_asks():
    grip = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)[..., None]
    step, found = next_word(grip, torch.tensor([0, 0, 0]))
    assert found.tolist() == [True, False, True] and step[found].tolist() == [2, 4]
    later, found = next_word(grip, torch.tensor([2, 2, 4]))  # the word at step 2 has been said by then
    assert found.tolist() == [True, False, False] and later[found].tolist() == [4]


def test_states_are_shown_once_each_and_every_answer_among_them():
    config = Config(chunk=5, slices=5, waypoint=24)  # frame 20 is both observed and an answer
    shown = states_shown(config)
    assert len(set(shown)) == len(shown) and shown[:5] == (0, 5, 10, 15, 20)
    assert answers(config) == (4, 8, 12, 16, 20, 24) and set(answers(config)) < set(shown)


def seeing_space():
    space = toy_space(state_dim=2, action_dim=2, grippers=1)
    return replace(space, cameras=("observation.images.front",))


def test_the_waypoint_is_the_state_shown_at_or_just_after_the_word():
    config = Config(width=16, heads=2, waypoint=12, chunk=2, slices=2, image_size=8)
    model = Libra(config, seeing_space())
    offsets = np.array(states_shown(config))
    state = np.repeat(offsets[None, :, None], 2, axis=2).astype(
        np.float32
    )  # a state is its own frame's number
    action = np.zeros((1, 13, 2), np.float32)
    action[0, :7, 1] = -1
    action[0, 7:, 1] = 1  # told to close at step 7; the next state shown is that of frame 8
    batch = {"state": torch.from_numpy(state), "action": torch.from_numpy(action)}
    wanted, found = model._answers(batch, torch.tensor([0, 2]))
    assert found.all() and (wanted == 8).all()
    assert not model._answers(batch, torch.tensor([8, 9]))[1].any()  # no word after frame 8


@pytest.mark.parametrize(
    ("change", "shared", "sought"),
    [({}, True, True), ({"eyes": "two"}, False, False), ({"waypoint": 0}, True, False)],
)
def test_one_encoder_serves_both_systems_unless_each_is_to_have_its_own(change, shared, sought):
    model = Libra(Config(width=16, heads=2, image_size=8, **change), seeing_space())
    assert (model.refiner.encoder is None) == shared
    assert isinstance(model.waypoint, Waypoint) == sought


def test_a_robot_without_a_gripper_aims_at_the_last_state_shown():
    space = replace(toy_space(2, 2), cameras=("observation.images.front",))
    model = Libra(Config(width=16, heads=2, waypoint=12, chunk=2, slices=2, image_size=8), space)
    state = np.repeat(np.array(states_shown(model.config))[None, :, None], 2, axis=2).astype(np.float32)
    batch = {"state": torch.from_numpy(state), "action": torch.zeros(1, 13, 2)}
    wanted, found = model._answers(batch, torch.tensor([0, 2]))
    assert found.all() and (wanted == 12).all()


def test_the_eyes_learn_first_and_the_curriculum_counts_the_steps_after():
    looking, acting = RECIPE.phases(Config(look_share=0.3), 1000)
    assert (looking.name, looking.steps, acting.steps) == ("look", 300, 700)
    assert [phase.name for phase in RECIPE.phases(Config(eyes="two"), 1000)] == ["train"]
    model = Libra(Config(width=16, heads=2, image_size=8), seeing_space())
    model.begin(looking)
    assert model.advance(1, {"waypoint": torch.tensor(0.1)}) == []
    model.begin(acting)
    assert model.curriculum.fallback_step == round(700 / 6)


def test_pictures_end_with_the_frames_acted_on_while_states_go_on():
    spec = RECIPE.spec(Config(), seeing_space(), {})
    assert spec.offsets_of("observation.images.front") == (0, 5)
    assert spec.offsets_of("observation.state")[-1] == 48 and spec.chunks == {"action": 49}
    assert RECIPE.spec(Config(eyes="two"), seeing_space(), {}).chunks == {"action": 10}
