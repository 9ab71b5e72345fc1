"""Runs in the report: what was trained from what, and its curves. Only files are read, no weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import page, svg
from .numbers import metric_curves, number

# Figures of the machine and the stream, apart from what is learnt.
HEALTH = {
    "samples_per_second": "samples a second",
    "data_wait": "share of the time spent waiting for data",
    "decode_share": "share of the time spent decoding",
    "bytes_per_sample": "bytes read a sample",
    "decoded_frames_per_second": "frames decoded a second",
    "kept_frame_share": "share of frames found decoded in memory",
    "cache_hit_share": "share of remote reads served from the cache",
    "wait_share": "share of the time spent waiting",
}
SCHEDULE = ("lr", "gradient_norm", "phase")


def run_folders(root: Path) -> list[Path]:
    """Runs below a workspace: folders with a config.json of ours."""
    return [path.parent for path in sorted((root / "runs").glob("*/*/config.json"))]


def run_section(folder: Path, anchor: str) -> str:
    name = f"{folder.parent.name} {folder.name}"
    config = _json(folder / "config.json")
    result = _json(folder / "result.json")
    terms: Mapping[str, Any] = config.get("terms", {})
    rows = list(_lines(folder / "metrics.jsonl"))
    parts = [f'<section id="{page.text(anchor)}"><h2>run {page.text(name)}</h2>']
    if result:
        told = ", ".join(f"{key} {number(value)}" for key, value in result.get("metrics", {}).items())
        seconds = float(result.get("seconds", 0))
        parts.append(
            f"<p>{result.get('steps', 0):,} steps in {seconds / 60:.1f} min; at the end {page.text(told)}.</p>"
        )
    else:
        parts.append(
            "<p class=bad>Not finished; the same <code>dpipe train</code> goes on where it stopped.</p>"
        )
    curves = metric_curves(rows)
    learnt = [key for key in curves if key not in HEALTH and key not in SCHEDULE]
    for title, names in (
        ("Training", learnt),
        ("Stream health", [key for key in HEALTH if key in curves]),
        ("Schedule", [key for key in SCHEDULE if key in curves]),
    ):
        cells = []
        for key in names:
            steps, values = curves[key]
            chart = svg.line_chart(key, {key: (steps, values)}, "step", from_zero=title != "Training")
            if chart:
                cells.append(page.cell(key, chart, HEALTH.get(key, f"last {number(float(values[-1]))}")))
        if cells:
            parts.append(f"<h3>{title}</h3>" + page.grid(cells))
    if not curves:
        parts.append("<p class=soft>no metrics were logged</p>")
    facts = [(key, _short(value)) for key, value in terms.items() if key not in ("space", "facts")]
    parts.append(page.folded("How it was trained", page.pairs(facts)) if facts else "")
    return "".join(parts) + "</section>"


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_short(v)}" for key, v in value.items())
    return str(value)


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    """Whole lines of a log that may still be written to."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
