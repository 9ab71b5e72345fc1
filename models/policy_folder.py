"""A folder of weights that dpipe trained: model.safetensors, and <mark>.json that says how to run them.

The JSON is written last: where it is, the weights are complete. It holds the format's version under the mark's own
name, the network's config, the normaliser of its actions, and how the weights came about (seed, steps, threads,
data).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from ..schemas.errors import DataError, UsageError
from ..schemas.normalisers import Normaliser

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class PolicyFolder:
    """What was read: the network's config as JSON, its weights by name, and their digest."""

    config: dict[str, Any]
    action: Normaliser
    training: dict[str, Any]
    weights: "dict[str, Tensor]"
    digest: str


def read_folder(folder: Path, mark: str, version: int, recipe: str) -> PolicyFolder:
    """A folder that `write_folder` wrote; `recipe` is what trains such a policy."""
    from safetensors.torch import load_file

    path = folder / f"{mark}.json"
    if not path.is_file():
        raise UsageError(
            f"no {recipe} policy in {folder}\n  expected {path.name}; make one:  dpipe train {recipe}"
        )
    told = json.loads(path.read_text())
    if told.get(mark) != version:
        raise DataError(f"{path}: version {told.get(mark)}; this dpipe reads {version}")
    weights = load_file(folder / WEIGHTS)
    hasher = xxhash.xxh3_128()
    for name, value in sorted(weights.items()):
        hasher.update(name.encode())
        hasher.update(value.contiguous().numpy().tobytes())
    return PolicyFolder(
        told["config"], Normaliser.from_json(told["action"]), told["training"], weights, hasher.hexdigest()
    )


def write_folder(
    folder: Path,
    mark: str,
    version: int,
    network: "nn.Module",
    config: Any,
    action: Normaliser,
    training: Mapping[str, Any],
) -> None:
    """Weights and description, each under a temporary name until it is whole; `config` is a dataclass."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous().cpu() for name, value in network.state_dict().items()}
    save_file(weights, folder / f".{WEIGHTS}.tmp")
    (folder / f".{WEIGHTS}.tmp").rename(folder / WEIGHTS)
    told = {mark: version, "config": asdict(config), "action": action.to_json(), "training": dict(training)}
    (folder / f".{mark}.json.tmp").write_text(json.dumps(told, indent=1) + "\n")
    (folder / f".{mark}.json.tmp").rename(folder / f"{mark}.json")
