"""`dpipe export DATASET --for TRAINER`: the exact launch line, the files it misses, and what does not fit.

Facts about trainers, read in their code:
    pi0 pi05 smolvla xvla groot   huggingface/lerobot 0.6.1, `policies/*/configuration_*.py`, `configs/train.py`
    openpi                        Physical-Intelligence/openpi 138701c, `shared/normalize.py`, `training/config.py`
    groot (Isaac-GR00T)           NVIDIA/Isaac-GR00T 0c8fb7d, `experiment/launch_finetune.py`, examples/SO100
    starvla                       starVLA/starVLA 4a381e6, examples/LIBERO/train_files
lerobot's lines are held against the installed package in the tests; of the others only the form is checked.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..schemas.errors import UsageError, unknown_name
from ..schemas.features import CAMERA_PREFIX
from ..streams.dataset import Dataset, open_dataset
from .durable import write_file
from .rearrange import splits_of

STATE, ACTION = "observation.state", "action"
MOST_LISTED = 2_000  # episodes of a split that a command line may name


@dataclass(frozen=True)
class Export:
    """What to type and to write; `problems` say what does not fit, `notes` what is worth knowing."""

    trainer: str
    commands: tuple[str, ...]
    cameras: tuple[tuple[str, str], ...]  # ours -> the trainer's
    normalisation: str
    chunk: int
    files: Mapping[str, str]  # name -> contents
    problems: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Policy:
    """One of lerobot's policies, as its configuration has it."""

    pretrained: str
    chunk: int
    state_most: int
    action_most: int
    normalisation: str
    statistics: tuple[str, ...]  # entries of stats.json that its normaliser needs
    extra: tuple[str, ...] = ()
    slots: int = 0  # cameras the published weights saw; 0: any number


POLICIES = {
    "pi0": Policy("lerobot/pi0_base", 50, 32, 32, "mean and deviation", ("mean", "std"), slots=3),
    "pi05": Policy(
        "lerobot/pi05_base", 50, 32, 32, "1st and 99th percentile to [-1, 1]", ("q01", "q99"), slots=3
    ),
    "smolvla": Policy("lerobot/smolvla_base", 50, 32, 32, "mean and deviation", ("mean", "std"), slots=3),
    "xvla": Policy(
        "lerobot/xvla-base",
        32,
        32,
        20,
        "none: numbers go in as they are",
        (),
        ("--policy.action_mode=auto",),
        3,
    ),
    "groot": Policy("nvidia/GR00T-N1.7-3B", 40, 132, 132, "its own processor", ("min", "max")),
}


def export(root: Path, trainer: str, out: Path) -> Export:
    """How to train `trainer` on the dataset; writes nothing. `out` is where its files will be."""
    if trainer not in TRAINERS:
        raise unknown_name("trainer", trainer, TRAINERS)
    dataset = open_dataset(root, as_stored=True)
    missing = [name for name in (STATE, ACTION) if name not in dataset.vectors]
    if missing:
        raise UsageError(
            f"{dataset.root} has no {' and no '.join(missing)}: no trainer here learns without\n"
            f"  found: {', '.join(dataset.vectors) or 'no vector'}\n"
            f"  next: where they have openpi's names, rename them:  dpipe convert lerobot --raw {dataset.root}"
        )
    return TRAINERS[trainer](dataset, trainer, out)


def write_export(made: Export, out: Path) -> list[Path]:
    """Put the files it misses into `out`; one that is there and says something else is left alone."""
    written = []
    for name, contents in made.files.items():
        path = out / name
        if path.is_file() and path.read_text(encoding="utf-8") != contents:
            raise UsageError(
                f"{path} is there and says something else\n  next: move it, or choose another --out"
            )
        write_file(path, contents.encode())
        written.append(path)
    return written


def export_text(made: Export, written: Sequence[Path]) -> str:
    lines = [*made.commands, ""]
    lines += [f"# camera {ours} -> {theirs}" for ours, theirs in made.cameras]
    lines.append(f"# normalisation: {made.normalisation}; chunk: {made.chunk} frames")
    lines += [f"# {note}" for note in made.notes]
    lines += [f"# wrote {path}" for path in written]
    lines += [f"# DOES NOT FIT: {problem}" for problem in made.problems]
    return "\n".join(lines)


# --- lerobot --------------------------------------------------------------------------------------------------


def _lerobot(dataset: Dataset, trainer: str, out: Path) -> Export:
    policy = POLICIES[trainer]
    words = [
        "lerobot-train",
        f"--dataset.repo_id=local/{dataset.root.resolve().name}",
        f"--dataset.root={dataset.root.resolve()}",
        f"--policy.type={trainer}",
        f"--policy.{'base_model_path' if trainer == 'groot' else 'pretrained_path'}={policy.pretrained}",
        "--policy.push_to_hub=false",
        f"--policy.chunk_size={policy.chunk}",
        f"--policy.n_action_steps={policy.chunk}",
        *policy.extra,
        "--batch_size=32",
        "--steps=30000",
        f"--output_dir=outputs/{trainer}-{dataset.root.resolve().name}",
    ]
    problems, notes = _fits(dataset, policy.state_most, policy.action_most, policy.statistics)
    words += _episodes(dataset, problems, notes)
    cameras = in_order(dataset)
    roles = ("outside", "wrist or second", "third")
    mapping = tuple((c, f"picture {i + 1}, {roles[min(i, 2)]}") for i, c in enumerate(dataset.cameras))
    if policy.slots and len(cameras) > policy.slots:
        problems.append(f"{len(cameras)} cameras; the published weights saw {policy.slots}")
    if trainer == "xvla":
        absolute = _is_absolute(dataset)
        notes.append(
            "its published head acts in ee6d (two arms of xyz, rot6d, gripper, absolute); --policy.action_mode=auto "
            "pads your action instead and learns it anew" + ("" if absolute else "; yours is an offset")
        )
    if tuple(cameras) != tuple(dataset.cameras):
        notes.append(
            f"cameras go in as the dataset lists them; by their names {cameras[0]} looks like the outside one"
        )
    return Export(
        trainer,
        (_joined(words),),
        mapping,
        policy.normalisation,
        policy.chunk,
        {},
        tuple(problems),
        (*notes, _chunk_note(dataset, policy.chunk)),
    )


def in_order(dataset: Dataset) -> list[str]:
    """Cameras with those that move (wrist, hand) after those that stand, else as the dataset has them."""
    moving = re.compile(r"wrist|hand|gripper|image2")
    return sorted(dataset.cameras, key=lambda name: bool(moving.search(name.removeprefix(CAMERA_PREFIX))))


def _episodes(dataset: Dataset, problems: list[str], notes: list[str]) -> list[str]:
    """--dataset.episodes, where the dataset holds more than its training split."""
    splits = splits_of(dataset)
    chosen = [e for e, split in enumerate(splits) if split == "train"]
    if len(chosen) == len(dataset) or not chosen:
        return []
    if len(chosen) > MOST_LISTED:
        name = dataset.root.resolve().name
        problems.append(
            f"it would train on all {len(dataset)} episodes, not on the {len(chosen)} of split train; first:  "
            f"dpipe select {name} --where \"split = 'train'\" --name {name}-train"
        )
        return []
    notes.append(f"--dataset.episodes are the {len(chosen)} of split train, out of {len(dataset)}")
    return [f"--dataset.episodes={json.dumps(chosen, separators=(',', ':'))}"]


def _fits(
    dataset: Dataset, state_most: int, action_most: int, statistics: Sequence[str]
) -> tuple[list[str], list[str]]:
    problems, notes = [], []
    for name, most in ((STATE, state_most), (ACTION, action_most)):
        dim = int(np.prod(dataset.features[name]["shape"]))
        if dim > most:
            problems.append(f"{name} has {dim} dimensions, the policy takes {most}")
        lacking = [s for s in statistics if s not in dataset.stats.get(name, {})]
        if lacking:
            problems.append(
                f"stats.json has no {', '.join(lacking)} of {name}:  dpipe doctor {dataset.root} --fix  counts them"
            )
    if not dataset.cameras:
        problems.append("no camera: these policies see")
    if not any(dataset.tasks):
        problems.append("no instruction: these policies read")
    return problems, notes


def _chunk_note(dataset: Dataset, chunk: int) -> str:
    return f"{chunk} frames at {dataset.fps} fps are {chunk / dataset.fps:.2g} s ahead"


def _is_absolute(dataset: Dataset) -> bool:
    told = str((dataset.manifest or {}).get("conventions", {}).get("action", "")).lower()
    return bool(told) and not any(word in told for word in ("delta", "relative", "offset"))


def _joined(words: Sequence[str]) -> str:
    """A command over several lines, quoted for the shell."""
    return " \\\n    ".join(shlex.quote(word) for word in words)


# --- trainers of LeRobot v2.1 ---------------------------------------------------------------------------------


def _older(dataset: Dataset) -> tuple[str, Path]:
    """The command that makes the v2.1 form, and where it will lie."""
    root = dataset.root.resolve()
    place = root.parent.parent / "lerobot21" / root.name
    source = (dataset.manifest or {}).get("source", "")
    made_from = source if source and "made_from" not in (dataset.manifest or {}) else f"lerobot --raw {root}"
    return f"dpipe convert {made_from} --name {root.name} --to lerobot21", place


def _openpi(dataset: Dataset, trainer: str, out: Path) -> Export:
    root = dataset.root.resolve()
    name = re.sub(r"\W+", "_", root.name)
    convert, place = _older(dataset)
    cameras = in_order(dataset)
    problems, notes = _fits(dataset, 32, 32, ("mean", "std", "q01", "q99"))
    if len(cameras) > 3:
        problems.append(f"{len(cameras)} cameras; the model has 3 pictures")
    slots = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    config = f"pi05_{name}"
    files = {
        f"assets/{config}/local/{name}/norm_stats.json": norm_stats(dataset),
        "openpi_config.py": _openpi_config(dataset, config, name, cameras[:3]),
    }
    notes += [
        "paste openpi_config.py into src/openpi/training/config.py and its TrainConfig into _CONFIGS",
        f"put {place} at $HF_LEROBOT_HOME/local/{name}: openpi pins a lerobot that reads v2.1",
        "norm_stats.json holds exact statistics of rows; compute_norm_stats.py counts an episode's last action "
        "once for every padded step of a chunk",
    ]
    commands = (
        convert,
        f"cp -r {shlex.quote(str(out / 'assets'))} .",
        f"XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 uv run scripts/train.py {config} --exp-name={name}",
    )
    chunk = 10
    return Export(
        trainer,
        commands,
        tuple(zip(cameras[:3], slots, strict=False)),
        "1st and 99th percentile to [-1, 1]",
        chunk,
        files,
        tuple(problems),
        (*notes, _chunk_note(dataset, chunk)),
    )


def norm_stats(dataset: Dataset) -> str:
    """openpi's norm_stats.json: mean, std, q01 and q99 of `state` and `actions`."""
    found = {}
    for theirs, ours in (("state", STATE), ("actions", ACTION)):
        told = dataset.stats.get(ours, {})
        found[theirs] = {
            entry: np.asarray(told[entry], np.float64).reshape(-1).tolist()
            for entry in ("mean", "std", "q01", "q99")
            if entry in told
        }
    return json.dumps({"norm_stats": found}, indent=2) + "\n"


def _openpi_config(dataset: Dataset, config: str, name: str, cameras: Sequence[str]) -> str:
    keys = ("observation/image", "observation/wrist_image")
    pictures = dict(zip(keys, cameras, strict=False))
    pictures |= {"observation/wrist_image": cameras[0]} if len(cameras) == 1 else {}
    mapping = {**pictures, "observation/state": STATE, "actions": ACTION, "prompt": "prompt"}
    rows = "\n".join(f"                {key!r}: {value!r}," for key, value in mapping.items())
    dim = int(np.prod(dataset.features[ACTION]["shape"]))
    cut = (
        ""
        if dim == 7
        else f"\n    # LiberoOutputs cuts actions to 7 numbers, yours have {dim}: write outputs of your own."
    )
    return f"""# {dataset.name}: goes into openpi's src/openpi/training/config.py.{cut}
@dataclasses.dataclass(frozen=True)
class {name.title().replace("_", "")}DataConfig(DataConfigFactory):
    @override
    def create(self, assets_dirs: pathlib.Path, model_config: _model.BaseModelConfig) -> DataConfig:
        repack = _transforms.Group(
            inputs=[_transforms.RepackTransform({{
{rows}
            }})]
        )
        data = _transforms.Group(
            inputs=[libero_policy.LiberoInputs(model_type=model_config.model_type)],
            outputs=[libero_policy.LiberoOutputs()],
        )
        return dataclasses.replace(
            self.create_base_config(assets_dirs, model_config),
            repack_transforms=repack,
            data_transforms=data,
            model_transforms=ModelTransformFactory()(model_config),
            action_sequence_keys=("action",),
        )


TrainConfig(
    name={config!r},
    model=pi0_config.Pi0Config(pi05=True, action_horizon=10),
    data={name.title().replace("_", "")}DataConfig(
        repo_id="local/{name}", base_config=DataConfig(prompt_from_task=True)
    ),
    weight_loader=weight_loaders.CheckpointWeightLoader("gs://openpi-assets/checkpoints/pi05_base/params"),
    num_train_steps=30_000,
)
"""


def _groot(dataset: Dataset, trainer: str, out: Path) -> Export:
    """lerobot's own GR00T, and NVIDIA's launcher with the modality files it wants."""
    from .lerobot21 import modality

    own = _lerobot(dataset, trainer, out)
    told = modality(dataset)
    convert, place = _older(dataset)
    chunk = 16
    nvidia = _joined(
        [
            "python",
            "gr00t/experiment/launch_finetune.py",
            "--base-model-path=nvidia/GR00T-N1.6-3B",
            f"--dataset-path={place}",
            "--embodiment-tag=NEW_EMBODIMENT",
            f"--modality-config-path={out / 'modality_config.py'}",
            "--num-gpus=1",
            "--global-batch-size=32",
            "--max-steps=20000",
            f"--output-dir=outputs/groot-{dataset.root.resolve().name}",
        ]
    )
    files = {
        "modality.json": json.dumps(told, indent=4) + "\n",
        "modality_config.py": _groot_config(dataset, told, chunk),
    }
    first = (
        f"# with lerobot\n{own.commands[0]}",
        f"# with Isaac-GR00T (LeRobot v2.1; modality.json comes with it)\n{convert}",
    )
    return Export(
        trainer,
        (*first, nvidia),
        tuple((camera, f"video.{camera.removeprefix(CAMERA_PREFIX)}") for camera in dataset.cameras),
        own.normalisation,
        own.chunk,
        files,
        own.problems,
        (*own.notes, f"Isaac-GR00T's config reads chunks of {chunk}"),
    )


def _groot_config(dataset: Dataset, told: Mapping[str, Any], chunk: int) -> str:
    absolute = "ABSOLUTE" if _is_absolute(dataset) or not dataset.manifest else "DELTA"
    actions = "\n".join(
        f"            ActionConfig(rep=ActionRepresentation.{absolute if 'gripper' not in part else 'ABSOLUTE'}, "
        "type=ActionType.NON_EEF, format=ActionFormat.DEFAULT),"
        for part in told["action"]
    )
    return f'''"""How GR00T reads {dataset.name}; keys are those of meta/modality.json."""

from gr00t.configs.data.embodiment_configs import register_modality_config
from gr00t.data.embodiment_tags import EmbodimentTag
from gr00t.data.types import ActionConfig, ActionFormat, ActionRepresentation, ActionType, ModalityConfig

config = {{
    "video": ModalityConfig(delta_indices=[0], modality_keys={list(told["video"])!r}),
    "state": ModalityConfig(delta_indices=[0], modality_keys={list(told["state"])!r}),
    "action": ModalityConfig(
        delta_indices=list(range({chunk})),
        modality_keys={list(told["action"])!r},
        action_configs=[
{actions}
        ],
    ),
    "language": ModalityConfig(delta_indices=[0], modality_keys=["annotation.human.task_description"]),
}}

register_modality_config(config, embodiment_tag=EmbodimentTag.NEW_EMBODIMENT)
'''


def _starvla(dataset: Dataset, trainer: str, out: Path) -> Export:
    from .lerobot21 import modality

    told = modality(dataset)
    root = dataset.root.resolve()
    name = re.sub(r"\W+", "_", root.name)
    convert, place = _older(dataset)
    chunk = 8
    problems, notes = _fits(dataset, 10_000, 10_000, ("min", "max"))
    command = _joined(
        [
            "accelerate",
            "launch",
            "--config_file=starVLA/config/deepseeds/deepspeed_zero2.yaml",
            "starVLA/training/train_unified.py",
            "--config_yaml=examples/LIBERO/train_files/starvla_cotrain_libero.yaml",
            "--framework.name=QwenOFT",
            f"--framework.action_model.future_action_window_size={chunk - 1}",
            f"--datasets.vla_data.data_root_dir={place.parent}",
            f"--datasets.vla_data.data_mix={name}",
            f"--run_id={name}",
        ]
    )
    notes.append(
        f"put data_config.py into examples/{name}/train_files/data_registry/; its mixture is '{name}'"
    )
    notes.append("actions are scaled to [-1, 1] by minimum and maximum, grippers left as they are")
    return Export(
        trainer,
        (convert, command),
        tuple((camera, f"video.{camera.removeprefix(CAMERA_PREFIX)}") for camera in dataset.cameras),
        "minimum and maximum to [-1, 1]",
        chunk,
        {
            "modality.json": json.dumps(told, indent=4) + "\n",
            "data_config.py": _starvla_config(told, name, root.name, chunk),
        },
        tuple(problems),
        (*notes, _chunk_note(dataset, chunk)),
    )


def _starvla_config(told: Mapping[str, Any], name: str, folder: str, chunk: int) -> str:
    video = [f"video.{key}" for key in told["video"]]
    action = [f"action.{key}" for key in told["action"]]
    scaled = {key: "min_max" for key in action if "gripper" not in key}
    return f'''"""{folder} for starVLA: keys are those of meta/modality.json."""

from starVLA.dataloader.gr00t_lerobot.datasets import ModalityConfig
from starVLA.dataloader.gr00t_lerobot.embodiment_tags import EmbodimentTag
from starVLA.dataloader.gr00t_lerobot.transform.base import ComposedModalityTransform
from starVLA.dataloader.gr00t_lerobot.transform.state_action import StateActionToTensor, StateActionTransform

ACTIONS = {action!r}


class DataConfig:
    def modality_config(self):
        return {{
            "video": ModalityConfig(delta_indices=[0], modality_keys={video!r}),
            "action": ModalityConfig(delta_indices=list(range({chunk})), modality_keys=ACTIONS),
            "language": ModalityConfig(delta_indices=[0], modality_keys=["annotation.human.task_description"]),
        }}

    def transform(self):
        scaled = StateActionTransform(apply_to=ACTIONS, normalization_modes={scaled!r})
        return ComposedModalityTransform(transforms=[StateActionToTensor(apply_to=ACTIONS), scaled])


ROBOT_TYPE_CONFIG_MAP = {{"{name}": DataConfig()}}
ROBOT_TYPE_TO_EMBODIMENT_TAG = {{"{name}": EmbodimentTag.NEW_EMBODIMENT}}
DATASET_NAMED_MIXTURES = {{"{name}": [("{folder}", 1.0, "{name}")]}}
'''


TRAINERS: dict[str, Callable[[Dataset, str, Path], Export]] = {
    "pi0": _lerobot,
    "pi05": _lerobot,
    "smolvla": _lerobot,
    "xvla": _lerobot,
    "groot": _groot,
    "openpi": _openpi,
    "starvla": _starvla,
}
