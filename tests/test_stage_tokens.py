"""tokens: its arrays, another trainer's normaliser, chunk-relative actions, and the report that chooses N."""

import json
from itertools import pairwise

import numpy as np
import pytest
from dpipe.pipeline.precompute import precompute, read_index
from dpipe.schemas.bins import BIN_GRID, centre, encode
from dpipe.schemas.errors import DataError, UsageError
from dpipe.schemas.normalisers import fit
from dpipe.stages.complexity import complexity, entropy_bits, persistence
from dpipe.stages.tokens import Params, normalised, residuals
from dpipe.streams.arrays import open_array
from tiny_dataset import ACTION, STATE, episode_columns, write_tiny

EPISODES = [(seed, 30 + seed) for seed in range(6)]


def make(root, **options):
    (made,) = precompute(root, ["tokens"], {"tokens": {"probe": "none", **options}})
    return made


def whole(folder, array):
    (place,) = (folder / array).glob("part-*")
    return np.asarray(open_array(place))


def all_actions():
    return np.concatenate([episode_columns(*e)["action"] for e in EPISODES])


def test_the_normaliser_is_fitted_exactly_over_every_frame(tmp_path):
    made = make(write_tiny(tmp_path / "set", EPISODES))
    expected = fit(all_actions(), names=ACTION)
    saved = json.loads((made.folder / "prepared.json").read_text())["facts"]["normaliser"]
    contract = json.loads((made.folder / "contract.json").read_text())["contract"]
    assert saved["digest"] == expected.digest == contract["normaliser"]
    assert saved["kinds"] == ["scaled", "scaled", "scaled", "binary"]
    np.testing.assert_array_equal(
        whole(made.folder, "tok_N10"), encode(expected.normalise(all_actions()), 10)
    )


def test_a_gripper_takes_the_outer_bins_and_the_residual_adds_up(tmp_path):
    made = make(write_tiny(tmp_path / "set", EPISODES), bins=[2, 10], residual=True)
    tokens, rest = whole(made.folder, "tok_N10"), whole(made.folder, "resid_N10")
    assert set(tokens[:, 3]) == {0, 9} and set(whole(made.folder, "tok_N2")[:, 3]) == {0, 1}
    normal = np.clip(fit(all_actions(), names=ACTION).normalise(all_actions()), -1, 1)
    np.testing.assert_allclose(centre(tokens, 10) + rest, normal, atol=1e-4)
    assert np.abs(rest).max() <= 0.1 + 1e-3


def test_an_action_that_is_no_number_is_marked_and_counted(tmp_path):
    def broken(seed, frames):
        columns = episode_columns(seed, frames)
        if seed == 2:
            columns["action"][5, 1] = np.nan
        return columns

    made = make(write_tiny(tmp_path / "set", EPISODES, columns=broken))
    row = 30 + 31 + 5
    valid = whole(made.folder, "valid")
    assert np.flatnonzero(~valid).tolist() == [row]
    assert whole(made.folder, "tok_N10")[row].tolist() == [255] * 4
    assert made.report["invalid_rows"] == 1


def test_two_percent_of_each_dimension_is_clipped_and_said(tmp_path):
    made = make(write_tiny(tmp_path / "set", EPISODES))
    fractions = made.report["clip_fraction"]
    assert list(fractions) == list(ACTION)
    assert all(0.01 <= fractions[name] <= 0.03 for name in ACTION[:3]) and fractions["gripper"] == 0


def test_the_same_actions_under_another_trainers_clip_are_other_tokens(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES)
    rows = all_actions().astype(np.float64)
    stats = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
    stats |= {"q01": np.quantile(rows, 0.1, axis=0), "q99": np.quantile(rows, 0.9, axis=0)}
    table = {name: values.tolist() for name, values in stats.items()}
    path = tmp_path / "dataset_statistics.json"
    path.write_text(json.dumps({"tiny": {"action": {**table, "mask": [True, True, True, False]}}}))
    theirs = make(root, normaliser_file=str(path), normaliser_kind="starvla", bins=[10])
    ours = make(root)
    assert theirs.variant == "N10-starvla"
    assert (whole(theirs.folder, "tok_N10") != whole(ours.folder, "tok_N10")).any()
    contract = json.loads((theirs.folder / "contract.json").read_text())["contract"]
    assert (
        contract["normaliser"]
        != json.loads((ours.folder / "contract.json").read_text())["contract"]["normaliser"]
    )
    short = {name: values[:3] for name, values in table.items()}
    path.write_text(json.dumps({"tiny": {"action": short}}))
    with pytest.raises(DataError, match="expected: 4, those of 'action'"):
        make(root, normaliser_file=str(path), normaliser_kind="starvla", bins=[20])


def test_relative_tokens_are_offsets_from_the_state_at_the_chunks_start(tmp_path):
    assert STATE[:3] == ACTION[:3]  # paired by name
    made = make(write_tiny(tmp_path / "set", EPISODES), relative=True, chunk=4)
    assert made.variant == "N10-q01q99-relative4"
    tokens, valid = whole(made.folder, "tok_N10"), whole(made.folder, "valid")
    assert tokens.shape[1:] == (4, 4) and valid.shape[1:] == (4,)
    offsets, steps = [], []
    for e in EPISODES:
        columns = episode_columns(*e)
        for t in range(e[1]):
            for h in range(min(4, e[1] - t)):
                offset = columns["action"][t + h].astype(np.float64)
                offset[:3] -= columns["observation.state"][t, :3]
                offsets.append(offset)
                steps.append((t, h))
    normaliser = fit(np.array(offsets), names=ACTION)
    saved = json.loads((made.folder / "prepared.json").read_text())["facts"]["normaliser"]
    assert saved["digest"] == normaliser.digest
    np.testing.assert_array_equal(tokens[valid], encode(normaliser.normalise(np.array(offsets)), 10))
    index = read_index(made.folder)
    last = index["frame_start"][0] + index["frame_rows"][0] - 1
    assert valid[last].tolist() == [True, False, False, False]


def test_relative_needs_a_chunk_and_bins_are_numbers_of_bins():
    with pytest.raises(UsageError, match="belong together"):
        Params(relative=True)
    with pytest.raises(UsageError, match="belong together"):
        Params(chunk=4)
    with pytest.raises(UsageError, match="between 2 and 65534"):
        Params(bins=(1,))
    with pytest.raises(UsageError, match="different numbers"):
        Params(bins=(10, 10))


def test_reconstruction_starts_from_the_clipped_action():
    normaliser = fit(np.linspace(0, 1, 101)[:, None], mode="minmax")
    normal = normalised(np.array([[7.0], [0.52]]), normaliser)
    tokens = encode(normal, 10)
    assert tokens.ravel().tolist() == [9, 5]
    assert residuals(normal, tokens, 10)[0, 0] == pytest.approx(0.1, abs=1e-3)  # clipped to 1, centre 0.9


# --- the report --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worked_example():
    """s ~ U[-1, 1], a = 0.8 sin 2s + N(0, 0.05): the case whose information is known."""
    rng = np.random.default_rng(0)
    n = 12_000
    s = rng.uniform(-1, 1, (n, 1))
    a = 0.8 * np.sin(2 * s) + rng.normal(size=(n, 1)) * 0.05
    return complexity(a, s, np.arange(n) // 100, ["a"], steps=1500)


def test_information_about_the_action_saturates_while_its_entropy_goes_on_rising(worked_example):
    bins = worked_example["bins"]
    order = [str(n) for n in BIN_GRID]
    told = [bins[n]["mean"]["I"] for n in order]
    left = [bins[n]["mean"]["H_given_S"] for n in order]
    rest = [bins[n]["mean"]["D_res"] for n in order]
    assert all(b > a - 0.01 for a, b in pairwise(told))
    assert abs(bins["256"]["mean"]["I"] - bins["50"]["mean"]["I"]) < 0.05
    assert left == sorted(left) and rest == sorted(rest, reverse=True)
    for n, expected in (("2", 0.96), ("4", 1.77), ("10", 2.39), ("20", 2.69), ("50", 2.81), ("256", 2.85)):
        assert bins[n]["mean"]["I"] == pytest.approx(expected, abs=0.06)
    for n, expected in (("2", 0.99), ("4", 0.96), ("10", 0.75), ("20", 0.59), ("50", 0.30), ("256", 0.07)):
        assert bins[n]["mean"]["top1"] == pytest.approx(expected, abs=0.04)
    for n, expected in (("2", 0.04), ("4", 0.15), ("10", 0.74), ("20", 1.27), ("50", 2.43), ("256", 4.74)):
        assert bins[n]["mean"]["H_given_S"] == pytest.approx(expected, abs=0.06)
    assert "warning" not in worked_example and bins["256"]["error"] < 0.05


def test_the_report_names_the_bins_where_it_turns(worked_example):
    assert worked_example["N_at_share_0.5"] in (3, 4)
    assert worked_example["N_at_share_0.9"] in (12, 16, 20)
    assert worked_example["N_where_top1_below_0.7"] in (12, 16)
    shares = [worked_example["bins"][str(n)]["share"] for n in BIN_GRID]
    assert shares[-1] == 1.0 and max(shares) <= 1.02


def test_a_probe_of_few_episodes_claims_nothing_it_cannot_show_and_says_so():
    """Twelve episodes, each at an action of its own: what one teaches is wrong of the next."""
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(12), 40)
    place = rng.uniform(-1, 1, 12)[owner]
    actions = np.clip(place + rng.normal(size=480) * 0.02, -1, 1)[:, None]
    situation = np.stack([rng.normal(size=480), np.sin(40 * place)], axis=1)
    found = complexity(actions, situation, owner, ["a"], steps=500)
    assert found["held_out_episodes"] == 12
    for entry in found["bins"].values():
        mean = entry["mean"]
        assert mean["H_given_S"] <= mean["H"] and 0 <= mean["I"] <= mean["H"]
    assert "episodes say little" in found["warning"] or "tells nothing" in found["warning"]


def test_what_the_situation_says_reduces_the_residual_too(worked_example):
    for n in ("2", "4", "10"):
        mean = worked_example["bins"][n]["mean"]
        assert mean["D_res_given_S"] < mean["D_res"]


@pytest.mark.parametrize("bins", [2, 10, 50])
def test_entropy_of_uniform_tokens_and_of_their_residual_make_one_bit(bins):
    a = np.random.default_rng(0).uniform(-1, 1, 200_000)
    tokens = encode(a, bins)
    entropy = entropy_bits(np.bincount(tokens, minlength=bins))
    assert entropy == pytest.approx(np.log2(bins), abs=2e-3)
    # the residual is uniform on a bin of width 2/N: h(a|Y) = log2(2/N), and h(a) = H(Y) + h(a|Y) = 1 bit
    width = 2 / bins
    rest = a - centre(tokens, bins)
    cells = np.bincount(np.clip(((rest / width + 0.5) * 64).astype(int), 0, 63), minlength=64)
    assert entropy + entropy_bits(cells) + np.log2(width / 64) == pytest.approx(1.0, abs=5e-3)


def test_miller_madow_pays_for_the_bins_seen():
    counts = np.array([5, 5, 0])
    assert entropy_bits(counts) == pytest.approx(1 + 1 / (2 * 10 * np.log(2)))


def test_persistence_counts_runs_inside_episodes_only():
    tokens = np.array([1, 1, 1, 2, 2, 1, 1, 1], dtype=np.uint8)
    starts = np.array([True, False, False, False, False, True, False, False])
    stay, run = persistence(tokens, starts)
    assert run == pytest.approx(8 / 3)  # 1 1 1 | 2 2 | 1 1 1
    assert 0 <= stay < 1.2
    alternating = np.tile(np.array([0, 1], dtype=np.uint8), 500)
    assert persistence(alternating, np.arange(1000) == 0) == (pytest.approx(0.0, abs=0.01), 1.0)


def test_the_report_of_a_dataset_comes_with_a_picture(tmp_path):
    from PIL import Image

    root = write_tiny(tmp_path / "set", [(seed, 60) for seed in range(8)])
    (made,) = precompute(root, ["tokens"], {"tokens": {"bins": [7]}})
    found = made.report["complexity"]
    assert found["in_means"] == ["x", "y", "z"]  # the gripper is reported, not averaged
    assert set(found["bins"]) == {str(n) for n in (*BIN_GRID, 7)}
    assert found["held_out_episodes"] == 8  # of so few, each is held out once
    picture = np.asarray(Image.open(made.folder / "complexity.png"))
    assert picture.shape[0] > 400 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 5
