"""Named settings of the recipes: the papers' full sizes, as far as the papers name them.

    dpipe train libra --preset paper --dry-run      the parameters, memory and tokens they mean; no data needed
    dpipe train libra --preset paper --lr 1e-4      what is given on the command line goes before the preset

What a paper leaves open is [ours], and each preset says what that is. Backbones are named by their published
checkpoints; `models/architectures.py` knows their sizes, training opens their folders.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..schemas.errors import UsageError, unknown_name
from ..schemas.normalisers import Normaliser
from .space import Space

NAMES = ("paper",)


@dataclass(frozen=True)
class Preset:
    """Overrides of a recipe's `Config` and of the loop's `Options`, its steps, and what is not the paper's."""

    config: Mapping[str, Any]
    options: Mapping[str, Any]
    steps: int
    ours: str


PAPER: dict[str, Preset] = {
    "libra": Preset(
        {
            "bins": 10,
            "chunk": 5,
            "slices": 2,
            "prediction": "epsilon",
            "eyes": "two",
            "waypoint": 0,
            "width": 1024,
            "planner_layers": 12,
            "refiner_layers": 12,
            "heads": 16,
            "code_width": 64,
            "vlm": "hf:OpenGVLab/InternVL2_5-2B",
            "vision": "hf:google/siglip-so400m-patch14-384",
            "freeze": ("vision",),
            "image_size": 448,
            "noise_draws": 1,
            "min_steps": 1000,
        },
        {"batch_size": 128, "lr": 2e-5, "weight_decay": 0.01, "warmup": 1 / 30, "ema": 0.0},
        30_000,
        "heads, width of the bins' codes, SigLIP frozen with InternVL's eyes; chunk and slices are its simulation's",
    ),
    "vita": Preset(
        {
            "vlm": "hf:VITA-MLLM/VITA-1.5",
            "freeze": ("vision", "merger"),
            "align_share": 0.6,
            "tune_lr": 2e-5,
            "image_size": 448,
            "gripper_weight": 0.01,
        },
        {"batch_size": 64, "lr": 1e-4, "precision": "auto", "recompute": True},
        50_000,
        "learning rates, batch and steps (the paper counts 3 epochs of alignment and 2 of tuning); no audio encoder",
    ),
    "dial": Preset(
        {
            "horizon": 16,
            "width": 1536,
            "heads": 32,
            "mix_layers": 4,
            "flow_layers": 16,
            "vlm": "hf:Qwen/Qwen2.5-VL-3B-Instruct",
            "freeze": ("vision", "merger", "embeddings"),
            "image_size": 224,
            "noise_draws": 1,
        },
        {
            "batch_size": 256,
            "lr": 1e-4,
            "weight_decay": 1e-5,
            "betas": (0.95, 0.999),
            "warmup": 0.05,
            "recompute": True,
        },
        40_000,
        "no dropout in the flow transformer (the paper: 0.2); 40,000 steps are few-shot, full runs 160,000",
    ),
    "anchorrefine": Preset(
        {"layers": 4, "heads": 16, "width": 1024},
        {"batch_size": 24, "lr": 1e-4, "schedule": "constant", "weight_decay": 0.01},
        80_000,
        "the refiner's size and learning rate; its anchor is X-VLA, a LeRobot policy that runs outside",
    ),
    "pfd": Preset(
        {"width": 512, "time_width": 256, "lambda_gt": 1.0, "lambda_residual": 0.5, "lambda_teacher": 0.1},
        {"batch_size": 128, "lr": 1e-4, "weight_decay": 0.01},
        20_000,
        "batch (16 a device in the code, devices unstated) and steps (10 epochs in the code)",
    ),
    "teacher": Preset(
        {
            "window": 10,
            "queries": 3,
            "width": 384,
            "layers": 24,
            "heads": 12,
            "points": 7,
            "image_size": 224,
        },
        {"batch_size": 512, "lr": 1e-4},
        60_000,
        "eyes (7 points a camera for Seer's MAE and resampler), batch, learning rate and steps",
    ),
    "anchor": Preset(
        {"chunk": 10, "width": 384, "layers": 12, "heads": 12, "points": 10, "image_size": 224},
        {"batch_size": 256, "lr": 1e-4},
        80_000,
        "eyes (10 points a camera for GR-1's MAE and resampler), learning rate and steps (the paper: 40 epochs)",
    ),
    "flow": Preset(
        {
            "chunk": 32,
            "future": (16, 32),
            "width": 1024,
            "layers": 30,
            "heads": 16,
            "points": 16,
            "image_size": 224,
        },
        {"batch_size": 128, "lr": 1e-4, "weight_decay": 0.01},
        20_000,
        "the action transformer of the released code alone; its video model (5 B parameters) is not here",
    ),
}


def preset_of(recipe: str, name: str) -> Preset:
    """A preset by name; the empty one where no name is given."""
    if not name:
        return Preset({}, {}, 0, "")
    if name not in NAMES:
        raise unknown_name("preset", name, NAMES)
    if recipe not in PAPER:
        raise UsageError(f"{recipe} has no preset '{name}'\n  recipes that have: {', '.join(PAPER)}")
    return PAPER[recipe]


# -- where there is no data yet ---------------------------------------------------------------------------


def libero_space() -> Space:
    """Two cameras, 8 numbers of state, 7 of action with a gripper: LIBERO's, and the tabletop's."""
    names = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    action = Normaliser("identity", (0.0,) * 7, (0.0,) * 7, ("scaled",) * 7, (False,) * 7, 0.0, None)
    return Space(
        cameras=("observation.images.image", "observation.images.image2"),
        state_mean=(0.0,) * 8,
        state_std=(1.0,) * 8,
        action=action,
        fps=20,
        action_names=names,
    )


@dataclass(frozen=True)
class Supervision:
    """Sizes of the targets a recipe is built for, where none have been made: as the papers have them, or tiny."""

    teacher_width: int = 128
    tokens: int = 64  # of the foreseen features
    channels: int = 32
    chunk: int = 10
    draws: int = 4
    base: Mapping[str, Any] = field(default_factory=dict)


SUPERVISION = {
    "": Supervision(base={"chunk": 16, "future": (8, 16)}),
    "paper": Supervision(384, 64, 2048, 30, 8, dict(PAPER["flow"].config)),
}


def assumed_facts(recipe: str, preset: str, space: Space) -> dict[str, Any]:
    """What `Recipe.facts` reads from finished targets, as sizes alone."""
    from dataclasses import asdict

    from ..models.flow_policy import FlowConfig
    from ..models.policies import PolicyConfig

    sizes, dims = SUPERVISION[preset], space.action_dim
    grippers = list(space.grippers)
    arm = [i for i in range(dims) if i not in grippers]
    if recipe == "vita":
        decoder = {
            "width": sizes.teacher_width,
            "action_dim": dims,
            "grippers": grippers,
            "trunk": True,
            "bounded": True,
        }
        return {"width": sizes.teacher_width, "decoder": decoder}
    if recipe == "dial":
        flat = [0.0] * sizes.channels
        return {"tokens": sizes.tokens, "channels": sizes.channels, "mean": flat, "std": flat, "arrays": {}}
    if recipe == "anchorrefine":
        anchor = None
        if not preset:
            embedded = PolicyConfig(
                "anchor",
                space.cameras,
                space.state_mean,
                space.state_std,
                dims,
                space.grippers,
                1,
                sizes.chunk,
            )
            anchor = asdict(embedded)
        one = [1.0] * len(arm)
        return {
            "spec": "",
            "anchor": anchor,
            "chunk": sizes.chunk,
            "arm_dims": arm,
            "gripper_dims": grippers,
            "delta_std": one,
            "raw_std": one,
            "wrong": 0.05,
            "margin": 0.1,
        }
    if recipe == "pfd":
        base = FlowConfig(space.cameras, space.state_mean, space.state_std, dims, **sizes.base)
        return {"base": asdict(base)}
    return {}
