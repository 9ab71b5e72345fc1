"""What a recipe is: the one value by which `train`, `evaluate` and the command line know it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from ..schemas.contract import Contract
from ..schemas.errors import UsageError, unknown_name
from ..streams.stream import StreamSpec
from .loop import Options, Phase
from .policy import Policy
from .space import Space


@dataclass(frozen=True)
class TargetFolder:
    """One finished target, as a recipe may look into it: its files, its contract, and what was settled first."""

    path: Path
    contract: Contract
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """Functions of a recipe's own `config` (a frozen dataclass whose every field has a default).

    targets    requests for `open_targets`, and the horizon they are chunked to
    facts      what must be known of the targets to build the model (widths, scales): JSON, kept with the run
    spec       what the stream shows, from config, space and facts
    episodes   which of the dataset's episodes to train on, from their content digests; None: all of the split
    build      config, space and facts -> an Objective (see `loop.py`), from nothing but these
    join       a batch's targets, from config, the opened targets and the rows; by default just those
    start      weights taken over from beside the targets, once, before the first step
    phases     the stretches `steps` are divided into
    policy     a trained model -> a Policy
    finish     what a complete run leaves beside its checkpoints, from (model, run folder, the run's terms)
    """

    name: str
    config: type
    targets: Callable[[Any], tuple[list[str], int]]
    spec: Callable[[Any, Space, Mapping[str, Any]], StreamSpec]
    build: Callable[[Any, Space, Mapping[str, Any]], Any]
    phases: Callable[[Any, int], list[Phase]]
    policy: Callable[[Any, int], Policy]
    steps: int = 2000
    options: Options = field(default_factory=Options)
    facts: Callable[[Any, Mapping[str, TargetFolder]], dict[str, Any]] = lambda config, targets: {}
    start: Callable[[Any, Mapping[str, TargetFolder]], None] = lambda model, targets: None
    join: Callable[[Any, Any, Any], dict[str, Any]] = lambda config, targets, index: targets.take(index=index)
    episodes: Callable[[Any, Sequence[str]], Sequence[bool]] | None = None
    finish: Callable[[Any, Path, Mapping[str, Any]], None] = lambda model, run_dir, terms: None


def resolve(kind: str, cls: type, overrides: Mapping[str, Any]) -> Any:
    """A dataclass from its defaults and `overrides`, whose values may be words of a command line."""
    hints = get_type_hints(cls)
    names = [entry.name for entry in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    for name, value in overrides.items():
        key = name.replace("-", "_")
        if key not in names:
            raise unknown_name(f"option of {kind}", key, names)
        values[key] = _parse(f"{kind} {key}", value, hints[key])
    return cls(**values)


def _parse(what: str, value: Any, kind: Any) -> Any:
    if not isinstance(value, str) or kind is str:
        return tuple(value) if isinstance(value, list) else value
    try:
        if kind is bool:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[
                value.lower()
            ]
        if kind in (int, float):
            return kind(value)
        inner = getattr(kind, "__args__", (str,))[0]
        return tuple(inner(part) for part in value.split(",") if part)
    except (KeyError, ValueError):
        raise UsageError(f"{what}: '{value}' is not {getattr(kind, '__name__', kind)}") from None
