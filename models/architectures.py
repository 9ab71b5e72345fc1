"""Sizes of the papers' backbones, so that a full-size policy can be counted where no weights are.

Each entry is the config.json of the published checkpoint as far as sizes go. Sources: the checkpoints' own
configs; `tests/test_trainer_presets.py` holds the parameter counts to the published ones.
"""

from typing import Any

_INTERN_VIT_300M: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": [448, 448],
    "patch_size": [14, 14],
    "attention_bias": True,
    "use_qk_norm": False,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    # DIAL, System 2 and the tower both systems share
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "model_type": "qwen2_5_vl",
        "vision_config": {
            "model_type": "qwen2_5_vl_vision",
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "patch_size": 14,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "window_size": 112,
        },
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
    },
    # Libra's planner. Its language model is InternLM2, which has the shapes of a Llama; the checkpoint is
    # published in its authors' layout only, so that training takes an InternVL whose name ends in -hf.
    "OpenGVLab/InternVL2_5-2B": {
        "model_type": "internvl",
        "vision_config": _INTERN_VIT_300M,
        "text_config": {
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "vocab_size": 92553,
        },
    },
    # VITA's student: InternViT-300M and Qwen2-7B
    "VITA-MLLM/VITA-1.5": {
        "model_type": "internvl",
        "vision_config": _INTERN_VIT_300M,
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 151936,
        },
    },
    # Libra's refiner
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip",
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
    },
}
