"""A trained run as a folder that LeRobot serves.

    export_policy(Path("runs/libra/libero"), Path("exported"))

Files
    config.json, model.safetensors              LeRobot's, of policy type `dpipe` (see `modeling_dpipe.py`)
    policy_preprocessor.json, policy_postprocessor.json
    dpipe_run.json                              the run's own record: dataset, targets, commit

The folder stands alone but for pretrained backbones (`hf:` folders) and LeRobot anchors, which stay where the run
found them. The place where it is served needs dpipe and LeRobot.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..schemas.contract import plain
from ..schemas.errors import DataError, UsageError
from .loop import load_checkpoint, write_atomically
from .run import Trained, open_run
from .space import STATE


def export_policy(run_dir: Path, out: Path, seed: int = 0) -> Path:
    """Write the run's newest checkpoint (its average, where one was kept) to `out`, which must not exist."""
    try:
        from lerobot.configs.types import FeatureType, PolicyFeature

        from .configuration_dpipe import DpipeConfig
        from .modeling_dpipe import DpipePolicy
        from .processor_dpipe import make_dpipe_pre_post_processors
    except ImportError as error:
        raise UsageError(
            f'exporting needs lerobot ({error.name} is missing)\n  Install it:  pip install "dpipe[lerobot]"'
        ) from None
    if out.exists():
        raise UsageError(f"{out} is there already\n  Give the policy a folder of its own:  --out OTHER")
    trained = open_run(run_dir)
    space = trained.space
    size = trained.recipe.spec(trained.config, space, trained.facts).size or (64, 64)
    features = {name: PolicyFeature(FeatureType.VISUAL, (3, *size)) for name in space.cameras}
    features[STATE] = PolicyFeature(FeatureType.STATE, (space.state_dim,))
    config = DpipeConfig(
        input_features=features,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (space.action_dim,))},
        device="cpu",
        terms=json.dumps(_terms(trained, run_dir)),
        seed=seed,
    )
    policy = DpipePolicy(config)
    policy.model.load_state_dict(trained.model.state_dict())
    beside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    policy.save_pretrained(beside)
    for processor in make_dpipe_pre_post_processors(config):
        processor.save_pretrained(beside)
    write_atomically(beside / "dpipe_run.json", json.dumps(plain(trained.provenance), indent=1) + "\n")
    beside.rename(out)
    return out


def _terms(trained: Trained, run_dir: Path) -> Mapping[str, Any]:
    """All that rebuilds the model: what `open_run` reads of a run's folder."""
    saved = load_checkpoint(run_dir / "checkpoints")
    if saved is None:
        raise DataError(f"{run_dir} has no checkpoint")
    return plain(
        {
            "recipe": trained.recipe.name,
            "config": dataclasses.asdict(trained.config),
            "space": trained.space.to_json(),
            "facts": trained.facts,
            "progress": saved.state["progress"],
            "step": trained.step,
        }
    )
