"""LeRobot policies that draw noise, of the true architectures but tiny, opened from the folders lerobot saves."""

# ruff: noqa: E402 - what needs torch is imported once torch is known to be there
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from dpipe.pipeline.precompute import precompute
from dpipe.schemas.chunks import chunk_index
from dpipe.schemas.errors import DataError, UsageError
from dpipe.streams.targets import open_targets
from tiny_dataset import CAMERA, episode_columns, write_tiny

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

from dpipe.models.policies import open_anchor, open_teacher
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors

EPISODES = [(0, 9), (1, 7)]
SIDE = 64  # the diffusion backbone halves it five times
FEATURES = {
    "input_features": {
        "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
        CAMERA: PolicyFeature(FeatureType.VISUAL, (3, SIDE, SIDE)),
    },
    "output_features": {"action": PolicyFeature(FeatureType.ACTION, (4,))},
}


def save(folder: Path, policy, config) -> Path:
    """Weights, config and both processors, as `lerobot-train` leaves them."""
    rows = np.concatenate([episode_columns(*e)["action"] for e in EPISODES])
    action = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
    plain = {"min": np.zeros(4), "max": np.ones(4), "mean": np.zeros(4), "std": np.ones(4)}
    grey = {name: np.full((3, 1, 1), value) for name, value in (("mean", 0.5), ("std", 0.5), ("min", 0.0))}
    stats = {"action": action, "observation.state": plain, CAMERA: {**grey, "max": np.ones((3, 1, 1))}}
    tensors = {
        key: {name: torch.tensor(np.asarray(v, np.float32)) for name, v in table.items()}
        for key, table in stats.items()
    }
    for part in (policy, *make_pre_post_processors(config, dataset_stats=tensors)):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory) -> Path:
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = DiffusionConfig(
        **FEATURES,
        n_obs_steps=2,
        horizon=8,
        n_action_steps=4,
        down_dims=(16, 32),
        n_groups=4,
        spatial_softmax_num_keypoints=4,
        diffusion_step_embed_dim=16,
        crop_shape=None,
        num_inference_steps=2,
        pretrained_backbone_weights=None,
        device="cpu",
    )
    return save(tmp_path_factory.mktemp("diffusion"), DiffusionPolicy(config), config)


@pytest.fixture
def smolvla(tmp_path, monkeypatch) -> Path:
    """A SmolVLA over a SmolVLM of a few numbers; the VLM's picture processor, which needs another package, is
    stood in for by the three token ids the policy takes from it."""
    transformers = pytest.importorskip("transformers")
    from lerobot.policies.smolvla import smolvlm_with_expert
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    backbone = tmp_path / "backbone"
    words = Tokenizer(
        models.WordLevel({"[PAD]": 0, "[UNK]": 1, "task": 2, "0": 3, "1": 4}, unk_token="[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(backbone)
    text = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 16,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
    }
    transformers.SmolVLMConfig(
        text_config=text, vision_config=vision, scale_factor=2, image_token_id=15, pad_token_id=0
    ).save_pretrained(backbone)
    ids = SimpleNamespace(fake_image_token_id=5, global_image_token_id=6)
    stand_in = SimpleNamespace(from_pretrained=lambda folder: SimpleNamespace(tokenizer=ids))
    monkeypatch.setattr(smolvlm_with_expert, "AutoProcessor", stand_in)
    config = SmolVLAConfig(
        **FEATURES,
        vlm_model_name=str(backbone),
        chunk_size=6,
        n_action_steps=6,
        num_steps=2,
        num_vlm_layers=2,
        resize_imgs_with_padding=(64, 64),
        device="cpu",
    )
    return save(tmp_path / "smolvla", SmolVLAPolicy(config), config)


def residuals(root, folder, **options):
    told = {"anchor": (f"lerobot:{folder}",), **options}
    (made,) = precompute(root, ["residuals"], {"residuals": told})
    return made


def check_residuals(root, folder, chunk: int) -> None:
    """Anchor plus residual is the normalised action, whatever the noise, and the noise is the frame's own."""
    anchor = open_anchor(f"lerobot:{folder}")
    found = open_targets(root, ["residuals"]).take(index=np.arange(16))
    assert found["residuals_delta"].shape == (16, chunk, 4)
    rows = []
    for seed, frames in EPISODES:
        index, _ = chunk_index(frames, chunk)
        rows.append(anchor.action.normalise(episode_columns(seed, frames)["action"])[index])
    whole = found["residuals_arm"].astype(np.float32) + found["residuals_delta"]
    valid = ~found["residuals_is_pad"]
    np.testing.assert_allclose(whole[valid], np.concatenate(rows)[valid], atol=4e-3)


def test_a_diffusion_policy_is_an_anchor_that_looks_back_and_repeats_its_noise(tmp_path, diffusion):
    anchor = open_anchor(f"lerobot:{diffusion}")
    assert (anchor.chunk, anchor.window, anchor.stochastic) == (4, 2, True)
    assert anchor.action.mode == "lerobot_minmax"
    root = write_tiny(tmp_path / "set", EPISODES, camera=True, size=SIDE)
    made = residuals(root, diffusion, batch=5)
    assert made.report["stochastic"] and made.report["noise"]["share"] > 0
    check_residuals(root, diffusion, 4)
    first = open_targets(root, ["residuals:array=delta"]).take(index=np.arange(16))["residuals"]
    residuals(root, diffusion, batch=16, chunk=2)
    again = open_targets(root, ["residuals:array=delta,chunk=2"]).take(index=np.arange(16))["residuals"]
    np.testing.assert_allclose(again, first[:, :2], atol=1e-5)


def test_a_diffusion_policy_has_no_token_state_to_teach(diffusion):
    with pytest.raises(UsageError, match="no hidden state per action token"):
        open_teacher(f"lerobot:{diffusion}")


def test_weights_that_do_not_fit_are_refused_however_the_policy_loads_them(tmp_path, diffusion):
    import shutil

    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(diffusion, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, other / "model.safetensors")
    with pytest.raises(DataError, match="do not fit its config"):
        open_anchor(f"lerobot:{other}")


@pytest.mark.slow
def test_smolvla_teaches_with_what_enters_its_last_layer_and_anchors_from_a_seed(tmp_path, smolvla):
    teacher, anchor = open_teacher(f"lerobot:{smolvla}"), open_anchor(f"lerobot:{smolvla}")
    assert (anchor.chunk, anchor.window, anchor.stochastic) == (6, 1, True)
    assert teacher.describe()["layer"] == "model.action_out_proj"
    rng = np.random.default_rng(0)
    images = {CAMERA: rng.integers(0, 256, (2, 1, SIDE, SIDE, 3), dtype=np.uint8)}
    state, texts = rng.normal(size=(2, 1, 4)).astype(np.float32), ["task 0", "task 1"]
    hidden = teacher.hidden(images, state, texts)
    assert hidden.shape == (2, 1, 3, teacher.width)
    np.testing.assert_array_equal(hidden, teacher.hidden(images, state, texts))  # noise from the seed
    with pytest.raises(UsageError, match="a step of denoising, not an action"):
        teacher.decode(hidden)
    root = write_tiny(tmp_path / "set", EPISODES, camera=True, size=SIDE)
    residuals(root, smolvla, batch=4)
    check_residuals(root, smolvla, 6)
    (made,) = precompute(root, ["teacher"], {"teacher": {"teacher": f"lerobot:{smolvla}"}})
    assert made.report["width"] == teacher.width and not made.report["decodes"]
    assert not (made.folder / "decoder.safetensors").exists() and not (made.folder / "a_hat").exists()
