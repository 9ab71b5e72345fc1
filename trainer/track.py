"""Metrics beside metrics.jsonl: TensorBoard and Weights & Biases, where they are installed.

    auto          TensorBoard if there is one                                                      (default)
    tensorboard   event files in <run>/tensorboard; a resumed run drops what came after its checkpoint
    wandb         one W&B run per run folder, resumed under its own id; WANDB_MODE=offline stays local
    none          neither

What is tracked is no term of a run: it may differ from call to call.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ..schemas.errors import UsageError, unknown_name

TRACKERS = ("auto", "tensorboard", "wandb", "none")


class Tracker(Protocol):
    """`write` takes a row of metrics.jsonl."""

    def write(self, values: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, run_dir: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first + 1)

    def write(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name not in ("step", "phase"):
                self._writer.add_scalar(name, value, values["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    def __init__(self, run_dir: Path, first: int) -> None:
        import wandb  # pyright: ignore[reportMissingImports] - where it is installed

        settled = run_dir / "config.json"
        terms = json.loads(settled.read_text())["terms"] if settled.is_file() else {}
        name = "-".join(run_dir.absolute().parts[-2:])
        self._run = wandb.init(
            project="dpipe", id=name, name=name, dir=str(run_dir), config=terms, resume="allow"
        )

    def write(self, values: Mapping[str, Any]) -> None:
        self._run.log({k: v for k, v in values.items() if k != "step"}, step=values["step"])

    def close(self) -> None:
        self._run.finish()


def open_trackers(names: Sequence[str], run_dir: Path, first: int = 0) -> list[Tracker]:
    """Trackers by name, continuing after step `first`; a name asked for must be installed."""
    wanted: list[str] = []
    for name in names:
        if name not in TRACKERS:
            raise unknown_name("tracker", name, TRACKERS)
        if name == "auto":
            wanted += ["tensorboard"] if find_spec("tensorboard") else []
        elif name != "none":
            if find_spec(name) is None:
                raise UsageError(f"--track {name}: it is not installed\n  Install it:  pip install {name}")
            wanted.append(name)
    make = {"tensorboard": TensorBoard, "wandb": WandB}
    return [make[name](run_dir, first) for name in dict.fromkeys(wanted)]
