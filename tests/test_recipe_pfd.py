"""PFD's mechanism: what the future adds can be foretold from the base's own velocity; a shuffled future cannot."""

# ruff: noqa: E402 - what needs torch is imported once torch is known to be there
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dpipe.models.blocks import text_ids
from dpipe.models.diffusion import shifted_sigma
from dpipe.models.flow_policy import FlowPolicy, joint_mask, open_base, save_flow
from dpipe.schemas.errors import UsageError
from dpipe.schemas.noise import NoisyChunks, flow_noise, noised, random_bits, stratified, uniform
from dpipe.schemas.noise import shifted_sigma as numpy_sigma
from dpipe.schemas.normalisers import fit
from dpipe.trainer.draws import Draws
from dpipe.trainer.loop import Phase
from dpipe.trainer.pfd import RECIPE, Config, FlowActor, FlowBase, FlowOptions, Pfd, bell, other_rows
from dpipe.trainer.space import Space, to_tensors
from toys import toy_space, train_phase

ROWS, CHUNK, DRAWS, LATENTS = 3000, 2, 3, (4, 8)
BASE_STEPS, ADAPTER_STEPS = 600, 900


def toy_columns(rows: int, seed: int) -> dict[str, np.ndarray]:
    """Actions are a curved function of the state plus a side nobody sees beforehand; the future shows both."""
    rng = np.random.default_rng(seed)
    state = rng.uniform(-1, 1, (rows, 3)).astype(np.float32)
    side = np.where(rng.random(rows) < 0.5, -1.0, 1.0)
    bent = 4.5 * state[:, :1] + 2.25 * state[:, 1:2] + 0.3 * np.arange(CHUNK)
    action = 0.6 * np.stack([np.sin(bent), np.cos(bent)], -1) + 0.14 * side[:, None, None] * np.array(
        [1.0, -1.0]
    )
    signs = np.sign(np.random.default_rng(0).normal(size=LATENTS[0] * LATENTS[1]))
    return {
        "observation.state": state,
        "action": action.astype(np.float32),
        "action_is_pad": np.zeros((rows, CHUNK), bool),
        "latents": (np.tile(action[:, 0], 16) * signs).reshape(rows, *LATENTS).astype(np.float32),
    }


def with_cache(network: FlowPolicy, columns: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """What the privileged stage caches for these rows: both branches on the same x, noise and times."""
    rows = len(columns["action"])
    own = random_bits(np.array(seed, dtype=np.uint64), rows)
    seeds, video = random_bits(own, DRAWS), random_bits(own + np.uint64(1), DRAWS)
    t_act, t_vid = (
        stratified(own, DRAWS).astype(np.float32),
        uniform(own + np.uint64(2), DRAWS).astype(np.float32),
    )
    base, rest = [], []
    network.eval()
    with torch.no_grad():
        seen = network.encoder([], torch.from_numpy(columns["observation.state"]), text_ids([""] * rows))
        latents = network.standardise(torch.from_numpy(columns["latents"]))
        for k in range(DRAWS):
            x = torch.from_numpy(
                noised(columns["action"], flow_noise(seeds[:, k], CHUNK, 2), numpy_sigma(t_act[:, k]))
            )
            level = shifted_sigma(torch.from_numpy(t_vid[:, k]))[:, None, None]
            blurred = (1 - level) * latents + level * torch.from_numpy(flow_noise(video[:, k], *LATENTS))
            args = seen, x, torch.from_numpy(t_act[:, k]), blurred, torch.from_numpy(t_vid[:, k])
            own_velocity, _ = network(*args, torch.zeros(rows, dtype=torch.bool))
            teacher, _ = network(*args, torch.ones(rows, dtype=torch.bool))
            base.append(own_velocity.numpy())
            rest.append((teacher - own_velocity).numpy())
    return {
        **columns,
        "privileged_seed": seeds,
        "privileged_t_act": t_act,
        "privileged_v_base": np.stack(base, 1),
        "privileged_resid": np.stack(rest, 1),
        "privileged_is_pad": columns["action_is_pad"],
    }


@pytest.fixture(scope="module")
def world() -> SimpleNamespace:
    space = toy_space(3, 2)
    torch.manual_seed(0)
    options = FlowOptions(chunk=CHUNK, width=32, layers=2, heads=2)
    model = FlowBase(options, space, LATENTS)
    train_phase(model, Phase("train", BASE_STEPS), toy_columns(ROWS, 1), lr=2e-3)
    return SimpleNamespace(
        space=space,
        base=model,
        rows=with_cache(model.network, toy_columns(ROWS, 1), 1),
        held_out=with_cache(model.network, toy_columns(1000, 9), 2),
    )


def adapter(world: SimpleNamespace, **options) -> Pfd:
    torch.manual_seed(1)
    config = Config(**{"width": 192, "time_width": 32, "inputs": "v,t,obs"} | options)
    model = Pfd(config, world.space, {"base": asdict(world.base.network.config)})
    model.base.load_state_dict(world.base.network.state_dict())
    return model


def held_out(model: Pfd, world: SimpleNamespace) -> dict[str, float]:
    batch = to_tensors(world.held_out, world.space, "cpu")
    with torch.no_grad():
        _, metrics = model(batch, Draws.of_step(0, 0, 0, 1000))
    return {name: float(value) for name, value in metrics.items()}


def test_the_future_helps_the_base(world):
    """The residual points from the base's velocity towards the truth."""
    columns = world.held_out
    truth = flow_noise(columns["privileged_seed"], CHUNK, 2) - columns["action"][:, None]
    base = columns["privileged_v_base"]
    teacher = base + columns["privileged_resid"]
    assert ((teacher - truth) ** 2).mean() < 0.98 * ((base - truth) ** 2).mean()


def test_an_adapter_explains_the_aligned_residual_and_not_a_shuffled_one(world):
    shuffled = {
        **world.rows,
        "privileged_resid": world.rows["privileged_resid"][other_rows(np.arange(ROWS), ROWS)],
    }
    explained = []
    for rows in (world.rows, shuffled):
        model = adapter(world, lambda_gt=0.0)
        train_phase(model, Phase("distil", ADAPTER_STEPS), rows, lr=3e-3)
        explained.append(held_out(model, world)["explained"])
    assert explained[0] > 0.2
    assert explained[1] <= 0


def test_the_shuffled_control_swaps_the_residual_and_nothing_else():
    class Cache:
        table = SimpleNamespace(lengths=(4, 6))

        def take(self, index):
            return {"privileged_resid": index * 10, "privileged_v_base": index * 10}

    rows = np.array([0, 3, 9])
    for control, expected in (("none", [0, 30, 90]), ("shuffled", [50, 80, 40])):
        found = RECIPE.join(Config(control=control), Cache(), rows)
        assert found["privileged_resid"].tolist() == expected
        assert found["privileged_v_base"].tolist() == [0, 30, 90]


def test_a_fresh_adapter_changes_nothing(world):
    model = adapter(world)
    state = world.held_out["observation.state"][:50]
    plain, adapted = (FlowActor(model, adapt=adapt).act({}, state, [""] * 50) for adapt in (False, True))
    np.testing.assert_array_equal(plain, adapted)


def test_the_two_distillation_losses_are_one_number_with_different_paths(world):
    model = adapter(world)
    train_phase(model, Phase("distil", 20), world.rows)
    found = held_out(model, world)
    assert found["teacher"] == pytest.approx(found["residual"], rel=1e-4)


def test_the_equal_budget_control_uses_the_actions_alone(world):
    batch = to_tensors({name: value[:64] for name, value in world.rows.items()}, world.space, "cpu")
    model = adapter(world, control="gt-only")
    loss, metrics = model(batch, Draws.of_step(0, 0, 0, 64))
    assert loss.item() == pytest.approx(metrics["gt"].item())
    batch["privileged_resid"] = batch["privileged_resid"] + 1
    assert model(batch, Draws.of_step(0, 0, 0, 64))[0].item() == loss.item()


def test_the_base_stays_frozen(world):
    model = adapter(world)
    train_phase(model, Phase("distil", 20), world.rows)
    for name, value in world.base.network.state_dict().items():
        assert torch.equal(model.base.state_dict()[name], value)


def test_the_base_branch_ignores_the_future_and_the_teacher_branch_reads_it(world):
    network = world.base.network.eval()
    with torch.no_grad():
        seen = network.encoder([], torch.zeros(1, 3), text_ids([""]))
        x, u = torch.randn(1, CHUNK, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
        futures = torch.zeros(1, *LATENTS), torch.ones(1, *LATENTS)
        for visible, same in ((False, True), (True, False)):
            one, other = (network(seen, x, u, future, u, torch.tensor([visible]))[0] for future in futures)
            assert torch.allclose(one, other) == same


def test_the_masks_differ_in_the_actions_view_of_the_future_alone():
    masks = joint_mask(2, 1, 1, torch.tensor([False, True]))[:, 0]
    rows = [["".join("x" if v else "." for v in row) for row in mask.tolist()] for mask in masks]
    assert rows[0] == ["xxx.", "xxx.", "..x.", "..xx"]
    assert rows[1] == ["xxxx", "xxxx", "..x.", "..xx"]


def test_the_noise_level_and_the_bell():
    assert shifted_sigma(torch.tensor(0.5)).item() == pytest.approx(2.5 / 3)
    u = torch.linspace(0, 1, 100_001)
    assert bell(u).mean().item() == pytest.approx(1, abs=1e-4)
    assert bell(torch.tensor([0.0, 1.0])).abs().max() < 1e-5


CAMERA = "observation.images.image"


def test_a_saved_base_speaks_both_velocities_from_frames_the_same_each_time(tmp_path):
    torch.manual_seed(0)
    actions = np.random.default_rng(0).uniform(-1, 1, (50, 2))
    action = fit(actions, names=("x", "y"))
    space = Space((CAMERA,), (0.0,) * 3, (1.0,) * 3, action, fps=20, action_names=("x", "y"))
    options = FlowOptions(chunk=4, future=(2, 5), width=32, heads=2, points=2)
    save_flow(tmp_path, FlowBase(options, space).network, action, {"seed": 0})
    base = open_base(f"embedded:{tmp_path}")
    assert (base.chunk, base.future, base.cameras) == (4, (2, 5), (CAMERA,))
    rng = np.random.default_rng(1)
    now = {CAMERA: rng.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)}
    later = {CAMERA: rng.integers(0, 256, (3, 2, 64, 64, 3), dtype=np.uint8)}
    x = rng.normal(size=(3, 2, 4, 2)).astype(np.float32)  # two draws for each of three frames
    level, seeds = np.full((3, 2), 0.5, np.float32), np.arange(6, dtype=np.uint64).reshape(3, 2)
    draws = x, level, level * np.float32(0.4), seeds
    rest = np.zeros((3, 3)), ["go"] * 3, NoisyChunks(*draws)
    v_base, v_teacher = base.velocities(now, later, *rest)
    assert v_base.shape == v_teacher.shape == (3, 2, 4, 2)
    alone = NoisyChunks(*(part[:, 1:] for part in draws))
    second = base.velocities(now, later, rest[0], rest[1], alone)
    np.testing.assert_allclose(second[0], v_base[:, 1:], atol=1e-6)
    np.testing.assert_allclose(second[1], v_teacher[:, 1:], atol=1e-6)
    again, _ = base.velocities(now, later, *rest)
    np.testing.assert_array_equal(v_base, again)
    other = {CAMERA: 255 - later[CAMERA]}
    other_base, other_teacher = base.velocities(now, other, *rest)
    np.testing.assert_allclose(other_base, v_base, atol=1e-6)
    assert np.abs(other_teacher - v_teacher).max() > 1e-4


def test_a_base_that_is_none_is_refused(tmp_path):
    with pytest.raises(UsageError, match="dpipe train flow"):
        open_base(f"embedded:{tmp_path}")
