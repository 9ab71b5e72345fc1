"""The commands, one module each, imported when one is called: `dpipe --help` reads only this table."""

from __future__ import annotations

from importlib import import_module

import click

from ..schemas.errors import unknown_name

COMMANDS: dict[str, dict[str, str]] = {
    "From recordings to a policy": {
        "sample": "Write raw recordings of a small tabletop simulator into raw/.",
        "convert": "Raw recordings to a dataset.",
        "precompute": "Datasets to supervision targets.",
        "train": "Targets to a policy; what is missing is made first.",
        "finish": "Number what the jobs of a divided conversion have made.",
        "export-policy": "A trained run as a policy that lerobot serves.",
        "evaluate": "A trained policy in the simulator: success, latency, pictures.",
        "compare": "An ablation: a grid of runs in one table and picture.",
        "plan": "What convert, precompute or train would do.",
    },
    "Rearranging": {
        "merge": "One dataset of several; video is copied, not encoded.",
        "split": "A dataset a split, or by shares.",
        "select": "A dataset of the episodes that meet a condition.",
        "push": "A dataset to the Hugging Face Hub, after a look at its licence.",
        "export": "The launch line of somebody else's trainer, and what it misses.",
    },
    "Looking and asking": {
        "status": "What the workspace holds: complete, partial or stale.",
        "doctor": "Is it sound? Datasets, raw recordings, targets, shards.",
        "replay": "Execute converted actions in the simulator.",
        "info": "What lies at a path.",
        "diff": "In what two datasets differ.",
        "query": "SQL over episodes, statistics, targets and runs.",
        "report": "One HTML page of pictures: datasets, targets, runs.",
        "view": "One episode in lerobot's viewer.",
        "picture": "One episode at a glance: frames, actions, coarse bins.",
        "completion": "What makes bash, zsh or fish complete our words.",
    },
}
_MODULES = {"finish": "convert"}  # where the module is not called as the command is


def load_command(name: str) -> click.Command:
    """The command of a name. UsageError with the nearest name where there is none."""
    names = [each for section in COMMANDS.values() for each in section]
    if name not in names:
        raise unknown_name("command", name, names)
    word = name.replace("-", "_")
    module = import_module(f".{_MODULES.get(name, word)}", __name__)
    return getattr(module, word)
