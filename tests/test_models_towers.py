"""Vision towers: the embedded one on paper, the transformers ones tiny but of the true architecture."""

import json
from pathlib import Path

import numpy as np
import pytest
from dpipe.models.dct import DctTower, lowest_frequencies
from dpipe.models.towers import open_tower
from dpipe.schemas.errors import DataError, UsageError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]}}


def _qwen25():
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 48,
        "fullatt_block_indexes": [1],
        "window_size": 112,
    }
    config = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=TEXT | ROPE)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3():
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 48,
        "deepstack_visual_indexes": [0, 1],
        "num_position_embeddings": 256,
    }
    config = transformers.Qwen3VLConfig(vision_config=vision, text_config=TEXT | ROPE | {"head_dim": 12})
    return transformers.Qwen3VLForConditionalGeneration(config)


def _siglip():
    text = {**VIT, "vocab_size": 64}
    return transformers.SiglipModel(
        transformers.SiglipConfig(vision_config=VIT | {"image_size": 384, "patch_size": 14}, text_config=text)
    )


def _internvl():
    config = transformers.InternVLConfig(
        vision_config=VIT | {"image_size": 112, "patch_size": 14}, text_config=TEXT
    )
    return transformers.InternVLForConditionalGeneration(config)


def _dinov2():
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14
    )
    return transformers.Dinov2WithRegistersModel(config)


FAMILIES = {
    "qwen2_5_vl": _qwen25,
    "qwen3_vl": _qwen3,
    "siglip": _siglip,
    "internvl": _internvl,
    "dinov2": _dinov2,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """One folder per family, as `save_pretrained` writes it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("towers")
    for name, make in FAMILIES.items():
        make().save_pretrained(root / name)
    return {name: root / name for name in FAMILIES}


def _quadrant(size: int, row: int, column: int) -> np.ndarray:
    """A grey image with one quadrant white."""
    image = np.full((1, size, size, 3), 60, np.uint8)
    half = size // 2
    image[0, row * half : (row + 1) * half, column * half : (column + 1) * half] = 255
    return image


# -- the embedded tower -----------------------------------------------------------------------------------


def test_the_lowest_frequencies_come_in_a_fixed_order():
    assert lowest_frequencies(6) == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0)]


def test_a_flat_colour_has_its_luma_and_chroma_and_nothing_else():
    image = np.full((1, 32, 32, 3), (255, 0, 0), np.uint8)
    features, grid = DctTower().encode(image)
    assert grid == (8, 8) and features.shape == (1, 64, 32) and features.dtype == np.float32
    # Y(red) - 0.5 = -0.201; Cb = -0.564 * 0.299; Cr = 0.713 * 0.701
    expected = np.zeros(32)
    expected[[0, 20, 26]] = -0.201, -0.168636, 0.499813
    np.testing.assert_allclose(features[0], np.tile(expected, (64, 1)), atol=1e-6)


def test_a_vertical_ramp_is_told_by_the_first_vertical_cosine_only():
    image = np.repeat(np.repeat(np.arange(64, dtype=np.uint8)[:, None, None], 64, 1), 3, 2)[None]
    features = DctTower().encode(image)[0][0]
    # Within a patch luma rises by 8 / 255, and x sqrt(2) cos(pi x) integrates to -2 sqrt(2) / pi^2
    # (8 steps of constant colour come close to the straight line).
    assert features[0, 2] == pytest.approx(-8 / 255 * 2 * np.sqrt(2) / np.pi**2, rel=0.02)
    np.testing.assert_allclose(features[:, 1], 0, atol=1e-6)


def test_repeating_each_pixel_leaves_the_features_unchanged():
    small = np.random.default_rng(0).integers(0, 256, (2, 24, 40, 3), dtype=np.uint8)
    large = small.repeat(3, axis=1).repeat(2, axis=2)
    np.testing.assert_allclose(DctTower().encode(small)[0], DctTower().encode(large)[0], atol=2e-6)


def test_features_keep_most_of_a_smooth_picture():
    y, x = np.mgrid[0:64, 0:64] / 63
    image = np.stack([255 * x, 255 * y, 255 * (0.5 + 0.5 * np.sin(6 * x * y))], -1).astype(np.uint8)[None]
    tower = DctTower()
    back = tower.decode(tower.encode(image)[0], 64, 64)
    assert np.abs(back.astype(int) - image.astype(int)).mean() < 3


def test_one_image_or_a_batch_give_the_same_features():
    images = np.random.default_rng(1).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
    together = DctTower().encode(images)[0]
    alone = np.concatenate([DctTower().encode(image[None])[0] for image in images])
    np.testing.assert_allclose(together, alone, atol=1e-7)


# -- transformers towers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "tensor", "width", "tokens"),
    [
        ("qwen2_5_vl", "merged", 48, 64),
        ("qwen2_5_vl", "premerge", 32, 256),
        ("qwen3_vl", "merged", 48, 49),
        ("qwen3_vl", "deepstack", 144, 49),
        ("siglip", "patches", 32, 256),
        ("internvl", "projector", 48, 64),
        ("internvl", "shuffled", 128, 64),
        ("internvl", "raw", 32, 256),
        ("dinov2", "patches", 32, 256),
    ],
)
def test_a_224_px_image_has_the_tokens_of_the_table_and_a_bright_quadrant_stays_in_place(
    checkpoints, family, tensor, width, tokens
):
    tower = open_tower(f"hf:{checkpoints[family]}", image_size=224, tensor=tensor)
    dark = tower.encode(np.full((1, 224, 224, 3), 60, np.uint8))[0]
    for row, column in ((0, 1), (1, 0)):
        features, (gh, gw) = tower.encode(_quadrant(224, row, column))
        assert features.shape == (1, tokens, width) == (1, gh * gw, tower.width)
        change = np.linalg.norm(features - dark, axis=-1).reshape(gh, gw)
        # An even count per quadrant: a grid of 7 gives up its middle row and column.
        half = gh // 2
        parts = {
            (r, c): change[r * (gh - half) :, c * (gw - half) :][:half, :half].mean()
            for r in (0, 1)
            for c in (0, 1)
        }
        assert max(parts, key=lambda key: parts[key]) == (row, column)


@pytest.mark.parametrize(("pixels", "tokens"), [(200, 49), (224, 64), (256, 81), (448, 256)])
def test_qwen25_tokens_follow_the_frame_rounded_to_28_px(checkpoints, pixels, tokens):
    tower = open_tower(f"hf:{checkpoints['qwen2_5_vl']}")
    features, (gh, gw) = tower.encode(np.zeros((1, pixels, pixels, 3), np.uint8))
    assert features.shape[1] == gh * gw == tokens


def test_qwen3_enlarges_a_224_px_frame_to_its_minimum_area(checkpoints):
    tower = open_tower(f"hf:{checkpoints['qwen3_vl']}")
    assert tower.grid(224, 224) == (8, 8) == tower.grid(256, 256)
    assert tower.grid(448, 448) == (14, 14)


def test_siglip_at_384_has_729_tokens(checkpoints):
    tower = open_tower(f"hf:{checkpoints['siglip']}")
    assert tower.encode(np.zeros((1, 100, 120, 3), np.uint8))[0].shape == (1, 729, 32)


def test_qwen25_equals_the_model_called_through_its_own_processor(checkpoints):
    from transformers import Qwen2VLImageProcessor

    image = np.random.default_rng(2).integers(0, 256, (2, 200, 260, 3), dtype=np.uint8)
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoints["qwen2_5_vl"]).eval()
    inputs = Qwen2VLImageProcessor()(list(image), return_tensors="pt")
    with torch.no_grad():
        upstream = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
    ours = open_tower(f"hf:{checkpoints['qwen2_5_vl']}").encode(image)[0]
    np.testing.assert_allclose(ours.reshape(-1, 48), upstream.numpy(), atol=1e-5)


def test_qwen25_premerge_undoes_the_window_order(checkpoints):
    """Merging the raster-ordered tokens by hand gives the model's own merged ones."""
    image = np.random.default_rng(3).integers(0, 256, (1, 252, 252, 3), dtype=np.uint8)
    tower = open_tower(f"hf:{checkpoints['qwen2_5_vl']}", tensor="premerge")
    before, (gh, gw) = tower.encode(image)
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoints["qwen2_5_vl"]).eval()
    cells = before.reshape(gh // 2, 2, gw // 2, 2, -1).transpose(0, 2, 1, 3, 4).reshape(gh * gw, -1)
    with torch.no_grad():
        merged = model.model.visual.merger(torch.from_numpy(np.ascontiguousarray(cells))).numpy()
    after = open_tower(f"hf:{checkpoints['qwen2_5_vl']}").encode(image)[0][0]
    np.testing.assert_allclose(merged, after, atol=1e-5)


def test_internvl_equals_the_models_own_image_features(checkpoints):
    image = np.random.default_rng(4).integers(0, 256, (2, 112, 112, 3), dtype=np.uint8)
    tower = open_tower(f"hf:{checkpoints['internvl']}")
    model = transformers.InternVLForConditionalGeneration.from_pretrained(checkpoints["internvl"]).eval()
    with torch.no_grad():
        upstream = model.model.get_image_features(
            tower.frames.pixels(torch.from_numpy(image)),
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
        ).pooler_output
    np.testing.assert_allclose(tower.encode(image)[0], upstream.numpy(), atol=1e-5)


def test_the_digest_names_weights_tensor_and_preprocessing(checkpoints, tmp_path):
    base = open_tower(f"hf:{checkpoints['qwen2_5_vl']}").digest
    assert open_tower(f"hf:{checkpoints['qwen2_5_vl']}").digest == base
    assert open_tower(f"hf:{checkpoints['qwen2_5_vl']}", tensor="premerge").digest != base
    assert open_tower(f"hf:{checkpoints['qwen2_5_vl']}", image_size=224).digest != base
    model = _qwen25()
    model.save_pretrained(tmp_path / "other")
    assert open_tower(f"hf:{tmp_path / 'other'}").digest != base


def test_a_checkpoint_without_the_tower_is_refused(checkpoints, tmp_path):
    folder = tmp_path / "headless"
    folder.mkdir()
    (folder / "config.json").write_text((checkpoints["qwen2_5_vl"] / "config.json").read_text())
    from safetensors.torch import save_file

    save_file({"lm_head.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"missing \d+ of \d+ tensors"):
        open_tower(f"hf:{folder}")


def test_an_unknown_tower_or_architecture_is_named_with_the_known_ones(tmp_path):
    with pytest.raises(UsageError, match="embedded, hf:"):
        open_tower("clip")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    with pytest.raises(UsageError, match=r"Did you mean 'qwen2_5_vl'|Did you mean 'qwen3_vl'"):
        open_tower(f"hf:{tmp_path}")
