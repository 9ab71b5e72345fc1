"""foresight: a cache of features is the features, at any horizon, and says what its savings cost."""

import json
import shutil

import numpy as np
import pytest
from dpipe.models.dct import DctTower
from dpipe.pipeline import precompute as module
from dpipe.pipeline import stage_view, target_parts
from dpipe.pipeline.precompute import precompute
from dpipe.schemas.contract import FIXED_VIEW
from dpipe.schemas.errors import DataError, UsageError
from dpipe.stages.compress import (
    Code,
    between_frame_variance,
    delta_rms,
    explained_variance,
    fit_pca,
    int8_scale,
    pool_tokens,
    relative_rms,
    unpool_tokens,
)
from dpipe.stages.foresight import Params, crop_frames, read_size, settle
from dpipe.streams.targets import open_targets
from small_datasets import write_dataset
from tiny_dataset import CAMERA, picture, write_tiny
from trees import tree_digest

EPISODES = [(0, 40), (1, 25), (2, 33)]


def make(root, **options):
    (made,) = precompute(root, ["foresight"], {"foresight": {"limit": 9, **options}})
    return made


def features(seed, t, crop="", flip=False):
    frame = crop_frames(picture(seed, t)[None], crop)
    return DctTower().encode(np.ascontiguousarray(frame[:, :, ::-1] if flip else frame))[0][0]


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    root = write_tiny(tmp_path_factory.mktemp("foresight") / "set", EPISODES, parts=[2, 1], camera=True)
    return root, make(root)


# --- the cache ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 16, 39])
def test_foresight_by_indexing_equals_features_of_that_frame(cached, at):
    root, _ = cached
    targets = open_targets(root, [f"foresight:cam=image,at=+{at}"])
    for e, (seed, frames) in enumerate(EPISODES):
        for t in (0, 7, frames - 1):
            found = targets.take(episode=e, frame=t)
            expected = features(seed, min(t + at, frames - 1)).astype(np.float16)
            np.testing.assert_array_equal(found["foresight"], expected)
            assert found["foresight_is_pad"] == (t + at > frames - 1)


def test_the_contract_says_what_was_done(cached):
    root, made = cached
    contract = open_targets(root, ["foresight"]).contracts["foresight"]
    tower = DctTower()
    assert (contract.model, contract.weights, contract.camera) == ("embedded", tower.digest, CAMERA)
    assert (contract.dtype, contract.augmentation) == ("float16", FIXED_VIEW)
    assert made.variant == "embedded-image"
    arrays = json.loads((made.folder / "contract.json").read_text())["arrays"]
    assert arrays[0]["shape"] == [64, 32] and arrays[0]["attributes"]["grid"] == [8, 8]


def test_a_bright_quadrant_lights_the_tokens_of_its_quadrant():
    image = np.zeros((1, 32, 32, 3), np.uint8)
    image[:, :16, 16:] = 255  # top right
    tokens = DctTower().encode(image)[0].reshape(8, 8, -1)[..., 0]
    assert tokens[:4, 4:].min() > tokens[4:].max() and tokens[:4, 4:].min() > tokens[:4, :4].max()


def test_the_report_holds_the_errors_to_beat(cached):
    _, made = cached
    pairs = [(seed, t) for seed, n in EPISODES for t in range(n - 16)]
    now = np.array([features(*p) for p in pairs]).astype(np.float16).astype(np.float64)
    later = np.array([features(s, t + 16) for s, t in pairs]).astype(np.float16).astype(np.float64)
    assert made.report["pairs"] == len(pairs)
    assert made.report["mse_copy_current"] == pytest.approx(((later - now) ** 2).mean(), rel=1e-6)
    mean = later.mean(axis=(0, 1))
    assert made.report["mse_mean_feature"] == pytest.approx(((later - mean) ** 2).mean(), rel=1e-6)
    np.testing.assert_allclose(made.report["feature_mean"], mean, rtol=1e-6, atol=1e-9)
    assert made.report["mse_mean_of_place"] <= made.report["mse_mean_feature"]
    assert (made.folder / "foresight.png").stat().st_size > 1000


def test_killed_and_resumed_is_the_same_and_one_new_episode_is_one_new_episode(tmp_path, monkeypatch):
    root = write_tiny(tmp_path / "set", EPISODES, parts=[1, 1, 1], camera=True)
    whole = make(root)
    expected = tree_digest(whole.folder)
    shutil.rmtree(whole.folder)
    make_part = module.make_part
    with monkeypatch.context() as patch:
        patch.setattr(
            module,
            "make_part",
            lambda job: (_ for _ in ()).throw(KeyboardInterrupt) if job.part else make_part(job),
        )
        with pytest.raises(KeyboardInterrupt):
            make(root)
    assert make(root).kept_parts == 1
    assert tree_digest(whole.folder) == expected
    shutil.rmtree(root / "data")
    write_tiny(root, [*EPISODES, (5, 20)], parts=[4], camera=True)
    added = make(root)
    assert (added.computed_episodes, added.copied_episodes) == (1, 3)
    found = open_targets(root, ["foresight"]).take(episode=[1, 3], frame=[3, 4])["foresight"]
    np.testing.assert_array_equal(found, np.array([features(1, 3), features(5, 4)]).astype(np.float16))


def test_decoding_runs_ahead_across_episodes_in_order(tmp_path, monkeypatch):
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    asked = []
    frames = module.Dataset.frames
    monkeypatch.setattr(module.Dataset, "frames", lambda self, *a: (asked.append(a), frames(self, *a))[1])
    params = Params(batch=8, limit=9)
    info = module.DiskDataset(module.open_dataset(root))
    ahead = stage_view.decode_ahead(info, (stage_view.FrameWish(CAMERA, 1, params.batch),), [0, 1, 2])[CAMERA]
    info.ahead = {CAMERA: ahead}
    for e, (seed, n) in enumerate(EPISODES):
        seen = np.concatenate(list(info.episode(e).images(CAMERA, np.arange(n), 8)))
        assert [tuple(frame[0, 0]) for frame in seen] == [(seed, t, 7) for t in range(n)]
    assert len(asked) == sum(-(-n // 8) for _, n in EPISODES)  # each block once
    ahead.close()


def test_a_damaged_frame_stops_the_stage_with_its_message(tmp_path, monkeypatch):
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    frames = module.Dataset.frames

    def damaged(self, episode, camera, start, stop):
        if episode == 2:
            raise DataError("frame 7 of episode 2 cannot be decoded")
        return frames(self, episode, camera, start, stop)

    made = make(root)
    shutil.rmtree(made.folder / "parts")
    (made.folder / "contract.json").unlink()
    monkeypatch.setattr(module.Dataset, "frames", damaged)
    target_parts._OPEN.clear()
    with pytest.raises(DataError, match="frame 7 of episode 2"):
        make(root)


# --- views, crops, every k-th ------------------------------------------------------------------------------


def test_every_fourth_frame_serves_the_frames_after_it(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    made = make(root, every=4)
    found = open_targets(root, ["foresight:at=+16"]).take(episode=0, frame=[0, 3, 9])["foresight"]
    for value, t in zip(found, (16, 16, 24), strict=True):
        np.testing.assert_array_equal(value, features(0, t).astype(np.float16))
    assert made.bytes == sum(-(-n // 4) for _, n in EPISODES) * 64 * 32 * 2


def test_a_crop_is_cut_before_the_tower_and_named_in_the_refusal(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    make(root, crop="0.17:0.83")
    targets = open_targets(root, ["foresight"], expect={"foresight": {"params": {"crop": "0.17:0.83"}}})
    np.testing.assert_array_equal(
        targets.take(index=5)["foresight"], features(0, 5, "0.17:0.83").astype(np.float16)
    )
    with pytest.raises(DataError, match=r'params.crop: expected "0.3:1", found "0.17:0.83"'):
        open_targets(root, ["foresight"], expect={"foresight": {"params": {"crop": "0.3:1"}}})
    assert crop_frames(np.zeros((1, 100, 50, 3), np.uint8), "0.3:1,0.1:0.5").shape == (1, 70, 20, 3)
    with pytest.raises(UsageError, match="must grow"):
        Params(crop="0.8:0.2")


def test_a_flip_needs_a_view_of_its_own(tmp_path, cached):
    with pytest.raises(DataError, match="augmentation 'flip'"):
        open_targets(cached[0], ["foresight"], augmentation="flip")
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    make(root, views=("identity", "flip"))
    targets = open_targets(
        root, ["foresight:view=flip,as=f", "foresight:view=identity,as=i"], augmentation="flip"
    )
    found = targets.take(index=3)
    np.testing.assert_array_equal(found["f"], features(0, 3, flip=True).astype(np.float16))
    np.testing.assert_array_equal(found["i"], features(0, 3).astype(np.float16))
    # features do not commute with flips: mirroring the tokens is not encoding the mirrored picture
    mirrored = found["i"].reshape(8, 8, 32)[:, ::-1].reshape(64, 32)
    assert relative_rms(mirrored.astype(np.float32), found["f"].astype(np.float32)) > 0.05


def test_pictures_turned_another_way_are_other_pixels(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    first = make(root)
    manifest = {"dpipe": 1, "name": "set", "conventions": {"image_rotation": "rot180"}}
    (root / "dpipe/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="pixels: expected"):
        open_targets(root, ["foresight"])
    again = make(root)  # same actions, other pictures: nothing is taken over
    assert (again.computed_episodes, again.copied_episodes) == (3, 0)
    assert first.folder == again.folder
    open_targets(root, ["foresight"])


def test_an_unknown_camera_is_named(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    with pytest.raises(UsageError, match="unknown camera 'wrist'"):
        make(root, camera="wrist")


# --- video ---------------------------------------------------------------------------------------------------


def test_large_video_is_decoded_at_the_size_the_tower_looks_at_by_stage_and_loader_alike(tmp_path):
    root = write_dataset(tmp_path / "set", [9, 7], size=(240, 320))
    out = tmp_path / "targets"
    (made,) = precompute(root, ["foresight"], {"foresight": {"limit": 9, "at": 2}}, out=out)
    (inside,) = precompute(root, ["foresight"], {"foresight": {"at": 2, "in_loop": True}}, out=out)
    assert made.report["read_size"] == [128, 128]
    stored = open_targets(root, ["foresight:at=+2,in_loop=false"], targets=out).take(index=[3, 12])
    live = open_targets(root, ["foresight:at=+2,in_loop=true"], targets=out).take(index=[3, 12])
    dataset = module.open_dataset(root)
    for value, loader, (episode, frame) in zip(
        stored["foresight"], live["foresight"], ((0, 5), (1, 5)), strict=True
    ):
        first = int(dataset.episodes.cameras[CAMERA].first_frame[episode])
        small = dataset.video(episode, CAMERA, (128, 128)).read([first + frame])
        exact = DctTower().encode(small)[0][0]
        np.testing.assert_array_equal(value, exact.astype(np.float16))
        np.testing.assert_array_equal(loader, exact)
        # the whole frame, averaged by the tower itself, differs by the rounding of grey levels
        whole = DctTower().encode(dataset.frames(episode, CAMERA, frame, frame + 1))[0][0]
        assert relative_rms(whole, exact) < 0.02
    assert inside.bytes == 0


def test_a_crop_is_read_so_large_that_the_tower_loses_nothing(tmp_path):
    tower = DctTower()
    assert read_size(tower, Params(), (1080, 1920)) == (128, 128)
    assert read_size(tower, Params(crop="0.2:0.7,0.25:0.75"), (1080, 1920)) == (256, 256)
    assert read_size(tower, Params(), (128, 100)) is None  # nothing to average


# --- in the loop -------------------------------------------------------------------------------------------


def test_without_a_cache_the_loader_computes_the_same(tmp_path, cached):
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    made = make(root, in_loop=True)
    assert made.bytes == 0
    inside = open_targets(root, ["foresight:at=0|+16"]).take(index=[3, 44, 3])
    stored = open_targets(cached[0], ["foresight:at=0|+16"]).take(index=[3, 44, 3])
    assert inside["foresight"].dtype == np.float32
    np.testing.assert_allclose(inside["foresight"], stored["foresight"], atol=1e-3)
    np.testing.assert_array_equal(inside["foresight_is_pad"], stored["foresight_is_pad"])


# --- what savings cost -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gaussian():
    return np.random.default_rng(0).normal(size=(64, 16, 32)).astype(np.float32)


@pytest.mark.parametrize(
    ("storage", "expected"), [("float16", 2.1e-4), ("bfloat16", 1.7e-3), ("int8", 9e-3), ("float32", 0)]
)
def test_rounding_errors_are_those_of_the_format(gaussian, storage, expected):
    code = Code(storage, scale=int8_scale(gaussian) if storage == "int8" else None)
    error = relative_rms(code.restore(code.store(gaussian), (4, 4)), gaussian)
    assert error == pytest.approx(expected, rel=0.5, abs=1e-9)


def test_outlier_channels_do_not_spoil_int8_per_channel(gaussian):
    wild = gaussian.copy()
    wild[..., :4] *= 40
    code = Code("int8", scale=int8_scale(wild))
    back = code.restore(code.store(wild), (4, 4))
    assert relative_rms(back[..., 4:], wild[..., 4:]) < 1.5e-2


def test_float16_that_would_overflow_becomes_bfloat16_or_is_refused(gaussian):
    massive = gaussian.copy()
    massive[0, 0, 0] = 7e4
    code, measured = settle(Params(limit=1), (4, 4), massive[:32], massive[32:], np.zeros(32, int))
    assert code.storage == "bfloat16" and measured["largest"] == pytest.approx(7e4)
    with pytest.raises(DataError, match="--storage bfloat16"):
        settle(Params(storage="float16", limit=1), (4, 4), massive[:32], massive[32:], np.zeros(32, int))


def test_pooling_averages_neighbours_and_must_fit_the_grid():
    grid = np.arange(16, dtype=np.float32).reshape(1, 16, 1)
    pooled = pool_tokens(grid, (4, 4), 2)
    assert pooled[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    assert (
        unpool_tokens(pooled, (4, 4), 2)[0, :, 0].tolist()
        == np.repeat(np.repeat([[2.5, 4.5], [10.5, 12.5]], 2, 0), 2, 1).ravel().tolist()
    )
    with pytest.raises(UsageError, match="--pool 3 does not divide"):
        pool_tokens(grid, (4, 4), 3)


def test_pca_keeps_what_varies_and_says_how_much_of_what_moves():
    rng = np.random.default_rng(0)
    still = rng.normal(size=(1, 16, 1)) * np.array([10.0, 0, 0, 0])  # a background that never moves
    moving = rng.normal(size=(50, 16, 1)) * np.array([0, 1.0, 0, 0])
    features = (still + moving).astype(np.float32)
    mean, basis = fit_pca(features.reshape(-1, 4), 1)
    np.testing.assert_allclose(np.abs(basis[:, 0]), [1, 0, 0, 0], atol=0.05)
    tokens = features.reshape(-1, 4)
    assert explained_variance(tokens, mean, basis) > 0.95
    assert between_frame_variance(features, np.zeros(50, int), basis) < 0.05
    code = Code("float32", 1, mean, basis)
    now, later = features[:25], features[25:]

    def through(x):
        return code.restore(code.store(code.project(x, (4, 4))), (4, 4))

    assert relative_rms(through(features), features) < 0.2
    assert delta_rms(through, now, later) > 0.9
    full = Code("float32", 1, *fit_pca(tokens, 4))
    np.testing.assert_allclose(full.restore(full.project(features, (4, 4)), (4, 4)), features, atol=1e-4)


def test_a_saving_that_loses_what_changes_is_refused_with_its_figure(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    with pytest.raises(DataError, match=r"delta-RMS\), more than 0.1") as error:
        precompute(root, ["foresight"], {"foresight": {"pca": 1}})
    assert "rel-RMS" in str(error.value)
    assert not list((root / "dpipe/targets/foresight").glob("*/contract.json"))
    made = make(root, storage="int8", pool=2, pca=20)
    measured = made.report["measured"]
    assert {"rel_rms", "delta_rms", "explained_variance", "explained_between_frames"} <= set(measured)
    assert made.bytes == sum(n for _, n in EPISODES) * 16 * 20
    found = open_targets(root, ["foresight:name=" + made.variant]).take(index=[0, 50])["foresight"]
    assert found.shape == (2, 16, 20) and found.dtype == np.float32
    prepared = {p.stem: np.load(p) for p in (made.folder / "prepared").glob("*.npy")}
    back = unpool_tokens(found @ prepared["basis"].T + prepared["mean"], (8, 8), 2)
    exact = unpool_tokens(pool_tokens(features(0, 0)[None], (8, 8), 2), (8, 8), 2)
    assert relative_rms(back[:1], exact) < 0.2


# --- real architectures ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_dinov2(tmp_path_factory):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        intermediate_size=32,
    )
    folder = tmp_path_factory.mktemp("dinov2")
    transformers.Dinov2Model(config).eval().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_changed_weights_are_refused_by_name(tmp_path, tiny_dinov2):
    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_dinov2, tmp_path / "tower")
    root = write_tiny(tmp_path / "set", EPISODES, parts=[2, 1], camera=True)
    made = make(root, tower=f"hf:{folder}", image_size=28, batch=16)
    contract = open_targets(root, ["foresight"]).contracts["foresight"]
    assert contract.model == f"hf:{folder}"
    found = open_targets(root, ["foresight:at=+3"]).take(index=0)["foresight"]
    from dpipe.models.towers import open_tower

    exact = open_tower(f"hf:{folder}", image_size=28).encode(picture(0, 3)[None])[0][0]
    np.testing.assert_allclose(found, exact, atol=5e-3)
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[0]
    save_file({**weights, name: weights[name] + torch.ones_like(weights[name])}, folder / "model.safetensors")
    changed = open_tower(f"hf:{folder}", image_size=28)
    with pytest.raises(DataError, match="weights: expected"):
        open_targets(
            root, ["foresight"], expect={"foresight": {"weights": str(changed.describe()["weights"])}}
        )
    shutil.rmtree(made.folder / "parts")
    (made.folder / "contract.json").unlink()
    target_parts._OPEN.clear()
    with pytest.raises(DataError, match="weights have changed"):
        make(root, tower=f"hf:{folder}", image_size=28, batch=16)
