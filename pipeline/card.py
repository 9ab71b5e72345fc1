"""The dataset card: README.md of a dataset, written from its manifest so that the two cannot disagree.

The front matter names the data files, without which Hugging Face `datasets` trips over meta/ and our own folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..schemas.episode import Dropped

SHOWN_TASKS = 20
SHOWN_DROPPED = 20

NOTES = {
    "libero": (
        "To compare with the published set of 1,693 episodes and 273,465 frames (labelled 10 fps, recorded at 20): "
        "it holds the four 10-task suites, replayed without no-ops in the simulator at 256 x 256, failed replays "
        "left out, turned by 180 degrees. Regenerate with openvla-oft's script, then convert that; `--drop-noops` "
        "on raw files drops the same rows without replaying the rest."
    ),
    "egodex": (
        "EgoDex is licensed CC BY-NC-ND: no derivatives. Keep this copy to yourself; dpipe uploads nothing unasked."
    ),
    "agibot": "AgiBot World is licensed CC BY-NC-SA 4.0: what is made from it carries the same licence.",
}


def dataset_card(
    manifest: Mapping[str, Any],
    tasks: Sequence[str],
    dropped: Sequence[Dropped],
    statistics: Mapping[str, Any],
) -> str:
    """Markdown with Hugging Face front matter."""
    totals, body = manifest["totals"], manifest["embodiment"]
    lines = [
        "---",
        f"license: {manifest['licence'] or 'unknown'}",
        "task_categories:",
        "- robotics",
        "tags:",
        "- LeRobot",
        "- dpipe",
        f"- {manifest['source']}",
        "configs:",
        "- config_name: default",
        "  data_files: data/*/*.parquet",
        "---",
        f"# {manifest['name']}",
        "",
        f"{totals['episodes']:,} episodes, {totals['frames']:,} frames, {totals['tasks']} instructions, robot "
        f"`{body['robot_type']}`, {body['fps']} fps ({body['fps_origin']}). LeRobot v3.0, converted from "
        f"{manifest['source']} by dpipe; `dpipe/manifest.json` has the whole recipe.",
        "",
        "## Conventions",
        "",
        "| what | how |",
        "|---|---|",
        *(f"| {_words(name)} | {_value(value)} |" for name, value in manifest["conventions"].items()),
        "",
        "## Features",
        "",
        "| feature | dimensions | unit | frame | meaning |",
        "|---|---|---|---|---|",
    ]
    for name, feature in body["features"].items():
        lines.append(
            f"| `{name}` | {', '.join(feature['names'])} | {feature['unit']} | {feature['frame']} "
            f"| {feature['description']} |"
        )
    for key, (height, width) in manifest["cameras"].items():
        lines.append(f"| `observation.images.{key}` | {height} x {width} RGB video | | | |")
    if body["sidecar"]:
        lines += ["", "Beside the dataset, in `dpipe/columns/` (row by row with `data/`):", ""]
        lines += [f"- `{n}`: {', '.join(f['names'])}. {f['description']}" for n, f in body["sidecar"].items()]
    lines += [
        "",
        "## Splits",
        "",
        *(f"- {split}: episodes {where}" for split, where in manifest["splits"].items()),
    ]
    lines += ["", "## Instructions", "", *(f"- {_escape(task)}" for task in tasks[:SHOWN_TASKS])]
    if len(tasks) > SHOWN_TASKS:
        lines.append(f"- and {len(tasks) - SHOWN_TASKS} more in `meta/tasks.parquet`")
    lines += ["", "## Conversion", "", "| option | value |", "|---|---|"]
    options = {**manifest["options"], **manifest["video"], "converter version": manifest["converter_version"]}
    lines += [f"| {_words(name)} | {_value(value)} |" for name, value in options.items()]
    if manifest["source"] in NOTES:
        lines += ["", NOTES[manifest["source"]]]
    if manifest["warnings"]:
        lines += [
            "",
            "Noticed in the recordings:",
            "",
            *(f"- {_escape(w)}" for w in manifest["warnings"][:SHOWN_TASKS]),
        ]
    if dropped:
        lines += ["", f"## Left out: {len(dropped)}", ""]
        lines += [f"- `{d.source_id}`: {_escape(d.reason)}" for d in dropped[:SHOWN_DROPPED]]
        if len(dropped) > SHOWN_DROPPED:
            lines.append(f"- and {len(dropped) - SHOWN_DROPPED} more in `dpipe/dropped.jsonl`")
    if body["citation"]:
        lines += ["", "## Source", "", body["citation"]]
    return "\n".join(lines) + "\n"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(str(k))} {v}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(str(v) for v in value)
    return _escape(str(value))


def _escape(text: str) -> str:
    """Text from a recording, on one line and without markup of its own."""
    flat = " ".join(text.split())
    return (
        flat.replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
        .replace("|", "\\|")
        .replace("`", "'")
    )
