"""The dataset card: README.md of a dataset, written from its facts so that the two cannot disagree.

The front matter names the data files, without which Hugging Face `datasets` trips over meta/ and our own folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..schemas.episode import Dropped
from .facts import Facts, facts_of_manifest

SHOWN_TASKS = 20
SHOWN_DROPPED = 20


def dataset_card(manifest: Mapping[str, Any], tasks: Sequence[str], dropped: Sequence[Dropped]) -> str:
    """Markdown with Hugging Face front matter."""
    return card_of(facts_of_manifest(manifest, tasks, dropped))


def card_of(facts: Facts) -> str:
    lines = [
        "---",
        f"license: {facts.licence or 'unknown'}",
        "task_categories:",
        "- robotics",
        "tags:",
        "- LeRobot",
        "- dpipe",
        f"- {facts.source}",
        "configs:",
        "- config_name: default",
        "  data_files: data/*/*.parquet",
        "---",
        f"# {facts.name}",
        "",
        facts.summary,
        "",
        "## Conventions",
        "",
        "| what | how |",
        "|---|---|",
        *(f"| {_escape(name)} | {_escape(value)} |" for name, value in facts.conventions),
        "",
        "## Features",
        "",
        "| feature | dimensions | unit | frame | meaning |",
        "|---|---|---|---|---|",
    ]
    for feature in facts.features:
        lines.append(
            f"| `{_escape(feature.name)}` | {_escape(', '.join(feature.names))} | {_escape(feature.unit)} "
            f"| {_escape(feature.frame)} | {_escape(feature.description)} |"
        )
    lines += [f"| `{_escape(name)}` | {size} | | | |" for name, size in facts.cameras]
    if facts.sidecar:
        lines += ["", "Beside the dataset, in `dpipe/columns/` (row by row with `data/`):", ""]
        lines += [
            f"- `{_escape(f.name)}`: {_escape(', '.join(f.names))}. {_escape(f.description)}"
            for f in facts.sidecar
        ]
    lines += ["", "## Splits", "", *(f"- {_escape(split)}: {where}" for split, where in facts.splits)]
    lines += ["", "## Instructions", "", *(f"- {_escape(task)}" for task in facts.tasks[:SHOWN_TASKS])]
    if len(facts.tasks) > SHOWN_TASKS:
        lines.append(f"- and {len(facts.tasks) - SHOWN_TASKS} more in `meta/tasks.parquet`")
    lines += ["", "## Conversion", "", "| option | value |", "|---|---|"]
    lines += [f"| {name} | {_escape(value)} |" for name, value in facts.conversion]
    if facts.note:
        lines += ["", facts.note]
    if facts.warnings:
        lines += ["", "Noticed in the recordings:", ""]
        lines += [f"- {_escape(w)}" for w in facts.warnings[:SHOWN_TASKS]]
    if facts.dropped:
        lines += ["", f"## Left out: {len(facts.dropped)}", ""]
        lines += [f"- `{_escape(d.source_id)}`: {_escape(d.reason)}" for d in facts.dropped[:SHOWN_DROPPED]]
        if len(facts.dropped) > SHOWN_DROPPED:
            lines.append(f"- and {len(facts.dropped) - SHOWN_DROPPED} more in `dpipe/dropped.jsonl`")
    if facts.citation:
        lines += ["", "## Source", "", facts.citation]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    """Text from a recording, on one line and without markup of its own."""
    flat = " ".join(text.split())
    return (
        flat.replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
        .replace("|", "\\|")
        .replace("[", "\\[")
        .replace("]", "\\]")
        .replace("`", "'")
    )
