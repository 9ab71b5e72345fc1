"""Normalisers: each upstream's formula with its edge cases, grippers set aside, digests that notice."""

import json

import numpy as np
import pytest
from dpipe.schemas.errors import DataError, UsageError
from dpipe.schemas.normalisers import (
    MODES,
    Normaliser,
    fit,
    import_normaliser,
    make_normaliser,
)
from dpipe.schemas.statistics import fit_statistics
from hypothesis import given, settings
from hypothesis import strategies as st

# One moving dimension from -0.2 to 0.6 and one that never moves from 0.3.
STATS = {
    "min": [-0.2, 0.3],
    "max": [0.6, 0.3],
    "q01": [-0.2, 0.3],
    "q99": [0.6, 0.3],
    "mean": [0.2, 0.3],
    "std": [0.1, 0.0],
}


def moving(mode: str, value: float) -> float:
    return float(make_normaliser(mode, STATS).normalise(np.array([value, 0.3]))[0])


def still(mode: str, value: float = 0.3) -> float:
    return float(make_normaliser(mode, STATS).normalise(np.array([0.0, value]))[1])


def test_the_default_maps_its_quantiles_to_the_ends_and_clips():
    assert moving("q01q99", 0.2) == pytest.approx(0, abs=1e-7)
    assert moving("q01q99", 0.7) == 1.0
    assert moving("q01q99", -0.2) == -1.0
    assert make_normaliser("q01q99", STATS, clip=None).normalise(np.array([0.7, 0.3]))[0] == pytest.approx(
        1.25
    )


@pytest.mark.parametrize(
    ("mode", "beyond"),
    [
        ("q01q99", 1.0),
        ("minmax", 1.0),
        ("gr00t_minmax", 1.0),
        ("q99_dial", 1.0),
        ("q99_starvla", 2.2),
        ("openpi_quantiles", 4.0),
        ("lerobot_quantiles", 4.0),
        ("lerobot_minmax", 4.0),
    ],
)
def test_each_mode_clips_as_its_owner_does(mode: str, beyond: float):
    assert moving(mode, 1.8) == pytest.approx(beyond, rel=1e-5)


@pytest.mark.parametrize(
    ("mode", "value"),
    [
        ("q01q99", 0.0),
        ("minmax", 0.0),
        ("gr00t_minmax", 0.0),
        ("q99_starvla", 0.3),
        ("q99_dial", 0.3),
        ("gr00t_meanstd", 0.3),
        ("openpi_quantiles", -1.0),
        ("lerobot_quantiles", -1.0),
        ("lerobot_minmax", -1.0),
        ("meanstd", 0.0),
        ("lerobot_meanstd", 0.0),
    ],
)
def test_a_dimension_that_never_moved_gives_what_its_owner_gives(mode: str, value: float):
    assert still(mode) == pytest.approx(value, abs=1e-9)


def test_equal_quantiles_of_a_moving_dimension_are_not_still_under_the_default():
    stats = {**STATS, "q99": [-0.2, 0.3]}  # q01 == q99 but min != max
    normal = make_normaliser("q01q99", stats)
    assert normal.constant == (False, True)
    assert normal.normalise(np.array([[-0.2, 0.3], [-0.1, 0.3]]))[:, 0].tolist() == [-1.0, 1.0]


def test_z_scores_divide_by_std_plus_eps_and_do_not_clip():
    assert moving("meanstd", 0.7) == pytest.approx(0.5 / (0.1 + 1e-6))
    assert moving("lerobot_meanstd", 0.7) == pytest.approx(0.5 / (0.1 + 1e-8))
    assert moving("gr00t_meanstd", 0.7) == pytest.approx(5.0)


def test_statistics_of_a_lerobot_dataset_may_say_how_many_frames_they_count():
    told = {"count": [120], "mean": [1.0, 2.0], "std": [0.5, 4.0], "q10": [0.0, 0.0]}
    normal = make_normaliser("lerobot_meanstd", told, kinds=("scaled",) * 2)
    assert normal.low == (1.0, 2.0) and normal.high == (0.5, 4.0)


def test_identity_refuses_values_beyond_one_and_names_the_dimension():
    normal = make_normaliser("identity", STATS, names=("x", "y"))
    assert normal.normalise(np.array([[0.5, -1.0]])).tolist() == [[0.5, -1.0]]
    with pytest.raises(DataError, match=r"y reaches 1\.2"):
        normal.normalise(np.array([[0.5, -1.2]]))


def test_a_gripper_is_mapped_to_plus_and_minus_one_and_left_out_of_the_quantiles():
    data = np.array([[0.0, -1.0], [1.0, 1.0], [2.0, -0.999]])
    normal = fit(data, names=("x", "gripper"))
    assert normal.kinds == ("scaled", "bounds")  # three values: it opens by degrees
    two_valued = fit(data[:2], names=("x", "gripper"))
    assert two_valued.kinds == ("scaled", "binary") and two_valued.mask == (True, False)
    values = two_valued.normalise(np.array([[1.0, 0.99], [1.0, -0.2], [1.0, 0.0]]))
    assert values[:, 1].tolist() == [1.0, -1.0, -1.0]
    assert two_valued.denormalise(values)[:, 1].tolist() == [1.0, -1.0, -1.0]


def test_a_gripper_that_never_closed_keeps_the_threshold_of_its_convention():
    always_open = fit(np.array([[-1.0], [-1.0]]), names=("gripper",))
    assert always_open.normalise(np.array([[-1.0], [1.0]])).ravel().tolist() == [-1.0, 1.0]
    zero_one = fit(np.array([[0.0], [1.0]]), names=("gripper",))
    assert zero_one.normalise(np.array([[0.0], [0.4], [0.6]])).ravel().tolist() == [-1.0, -1.0, 1.0]
    assert zero_one.denormalise(np.array([[-1.0], [1.0]])).ravel().tolist() == [0.0, 1.0]


def test_a_gripper_by_degrees_keeps_its_degrees():
    normal = fit(np.array([[35.0], [77.5], [120.0]]), names=("gripper_mm",))
    assert normal.normalise(np.array([[35.0], [77.5], [120.0], [130.0]])).ravel().tolist() == [-1, 0, 1, 1]
    assert normal.denormalise(np.array([[0.5]])).item() == pytest.approx(98.75)


def test_exact_statistics_equal_numpy_over_every_row():
    data = np.random.default_rng(0).normal(size=(1001, 3)).astype(np.float32)
    stats = fit_statistics(data)
    wide = data.astype(np.float64)
    for name, q in (("q01", 0.01), ("q10", 0.1), ("q50", 0.5), ("q90", 0.9), ("q99", 0.99)):
        np.testing.assert_array_equal(stats[name], np.quantile(wide, q, axis=0))
    np.testing.assert_allclose(stats["mean"], wide.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(stats["std"], wide.std(axis=0), rtol=1e-12)
    assert stats["levels"].tolist() == [3, 3, 3]


@settings(max_examples=60)
@given(mode=st.sampled_from(sorted(MODES)), seed=st.integers(0, 2**16))
def test_denormalising_undoes_normalising_where_nothing_was_clipped(mode: str, seed: int):
    rng = np.random.default_rng(seed)
    data = np.concatenate([rng.uniform(-1, 1, (50, 3)), np.full((50, 1), 0.25)], axis=1)
    data[:, 2] = np.where(data[:, 2] > 0, 1.0, -1.0)
    normal = fit(data, mode=mode, names=("x", "y", "gripper", "w"))
    kept = ~normal.clipped(data).any(axis=1)
    assert kept.any()
    back = normal.denormalise(normal.normalise(data))[kept]
    np.testing.assert_allclose(back, data[kept], atol=1e-7)


def test_what_was_clipped_is_counted_per_dimension():
    normal = make_normaliser("q01q99", STATS)
    beyond = normal.clipped(np.array([[0.7, 0.3], [0.6, 0.3], [-0.3, 9.0]]))
    assert beyond.tolist() == [[True, False], [False, False], [True, False]]


def test_non_finite_values_stay_visible():
    normal = fit(np.array([[0.0, -1.0, 5.0], [1.0, 1.0, 5.0]]), names=("x", "gripper", "still"))
    assert np.isnan(normal.normalise(np.full((1, 3), np.nan))).all()


def test_the_digest_covers_every_number_and_survives_json():
    normal = make_normaliser("q01q99", STATS)
    again = Normaliser.from_json(json.loads(json.dumps(normal.to_json())))
    assert again == normal and again.digest == normal.digest
    assert make_normaliser("q99_dial", STATS).digest != normal.digest
    assert make_normaliser("q01q99", STATS, clip=None).digest != normal.digest
    nudged = {**STATS, "q99": [np.nextafter(0.6, 1), 0.3]}
    assert make_normaliser("q01q99", nudged).digest != normal.digest
    assert make_normaliser("q01q99", STATS, source="elsewhere", frames=9).digest == normal.digest
    with pytest.raises(DataError, match="edited by hand"):
        Normaliser.from_json({**normal.to_json(), "eps": 0.5})


def test_unknown_modes_and_missing_statistics_are_named():
    with pytest.raises(UsageError, match="Did you mean 'q01q99'"):
        make_normaliser("q01_q99", STATS)
    with pytest.raises(DataError, match="missing: q01, q99"):
        make_normaliser("q99_dial", {"min": [0.0], "max": [1.0]})


def test_the_normaliser_of_openpi_gives_openpis_numbers(tmp_path):
    path = tmp_path / "norm_stats.json"
    stats = {name: STATS[name] for name in ("mean", "std", "q01", "q99")}
    path.write_text(json.dumps({"norm_stats": {"actions": stats, "state": stats}}))
    value = np.array([[0.9, 0.3]])
    quantiles = import_normaliser(path, "openpi")
    assert quantiles.normalise(value)[0, 0] == pytest.approx((0.9 + 0.2) / (0.8 + 1e-6) * 2 - 1)
    zscore = import_normaliser(path, "openpi", mode="meanstd")
    assert zscore.normalise(value)[0, 0] == pytest.approx(0.7 / (0.1 + 1e-6))
    assert import_normaliser(path, "openpi", column="observation.state").dim == 2


def test_the_normalisers_of_lerobot_equal_lerobots_own_step(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("lerobot")
    from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.processor import NormalizerProcessorStep
    from lerobot.processor.converters import create_transition

    path = tmp_path / "stats.json"
    path.write_text(json.dumps({"action": STATS}))
    data = np.array([0.9, 0.3])
    for ours, theirs in (
        ("lerobot_meanstd", NormalizationMode.MEAN_STD),
        ("lerobot_minmax", NormalizationMode.MIN_MAX),
        ("lerobot_quantiles", NormalizationMode.QUANTILES),
    ):
        step = NormalizerProcessorStep(
            features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(2,))},
            norm_map={FeatureType.ACTION: theirs},
            stats={"action": {name: torch.tensor(value) for name, value in STATS.items()}},
            dtype=torch.float64,
        )
        transition = create_transition(action=torch.tensor(data, dtype=torch.float64))
        expected = next(value for key, value in step(transition).items() if str(key.value) == "action")
        found = import_normaliser(path, "lerobot", mode=ours).normalise(data)
        # only the moving dimension: the still one divides the float32 rounding of 0.3 by 1e-8
        np.testing.assert_allclose(found[0], expected.numpy()[0], rtol=1e-6)


def test_grouped_statistics_are_joined_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "dataset_statistics.json"
    arm = {name: [values[0]] for name, values in STATS.items()}
    hand = {name: [values[1]] for name, values in STATS.items()}
    path.write_text(json.dumps({"franka": {"action": {"arm": arm, "hand": hand}}}))
    assert import_normaliser(path, "gr00t").low == (-0.2, 0.3)
    assert import_normaliser(path, "gr00t").mode == "gr00t_minmax"
    combined = {**STATS, "mask": [True, False]}
    path.write_text(json.dumps({"franka": {"action": combined}, "other": {"action": combined}}))
    with pytest.raises(UsageError, match="franka, other"):
        import_normaliser(path, "starvla")
    normal = import_normaliser(path, "starvla", key="franka")
    assert normal.clip == 2.2 and normal.kinds == ("scaled", "raw")
