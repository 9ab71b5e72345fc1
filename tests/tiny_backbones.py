"""Tiny random backbones of the true architectures, in folders as their users have them: weights and tokenizer."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CAMERA = "observation.images.image"
WORDS = ["<unk>", "<img>", "</img>", "task", "0", "1", "2", "pick", "up", "the", "red", "blue", "cube"]
IMAGE, BEGIN, END = 60, 61, 62  # Qwen's own marks
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_qwen(folder: Path) -> Path:
    """Qwen2.5-VL: windows of attention, merged patches, positions in time, row and column."""
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 48,
        "fullatt_block_indexes": [1],
        "window_size": 112,
    }
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]}}
    marks = {"image_token_id": IMAGE, "vision_start_token_id": BEGIN, "vision_end_token_id": END}
    config = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=TEXT | rope, **marks)
    return _save(transformers.Qwen2_5_VLForConditionalGeneration(config), folder)


def save_internvl(folder: Path) -> Path:
    """InternVL in transformers' layout: shuffled patches through a projector, positions in a row."""
    config = transformers.InternVLConfig(
        vision_config=VIT | {"image_size": 56, "patch_size": 14}, text_config=TEXT, image_token_id=IMAGE
    )
    return _save(transformers.InternVLForConditionalGeneration(config), folder)


def save_siglip(folder: Path) -> Path:
    text = {**VIT, "vocab_size": 64}
    config = transformers.SiglipConfig(
        vision_config=VIT | {"image_size": 42, "patch_size": 14}, text_config=text
    )
    return _save(transformers.SiglipModel(config), folder)


def _save(model: transformers.PreTrainedModel, folder: Path) -> Path:
    torch.manual_seed(0)
    model.init_weights()
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return folder


def save_act(folder: Path, state: int = 8, action: int = 7) -> Path:
    """ACT, saved by lerobot with its processors, whose statistics are as lerobot's datasets have them.

    `count` is one number for all dimensions, and the first of them in the file.
    """
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors

    torch.manual_seed(0)
    config = ACTConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (state,)),
            CAMERA: PolicyFeature(FeatureType.VISUAL, (3, 64, 64)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (action,))},
        chunk_size=10,
        n_action_steps=10,
        dim_model=32,
        n_heads=2,
        dim_feedforward=64,
        n_encoder_layers=1,
        n_vae_encoder_layers=1,
        pretrained_backbone_weights=None,
        device="cpu",
    )
    stats = {
        "observation.state": {"mean": torch.zeros(state), "std": torch.ones(state)},
        CAMERA: {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)},
        "action": {
            "count": torch.tensor([16]),
            "mean": torch.arange(float(action)),
            "std": torch.full((action,), 2.0),
        },
    }
    for part in (ACTPolicy(config), *make_pre_post_processors(config, dataset_stats=stats)):
        part.save_pretrained(folder)
    return folder
