"""`dpipe doctor`: is a dataset sound? Any LeRobot v3.0 dataset, raw recordings, targets or shards.

    checks      a check, its findings, the report           recording, lags   what numbers say
    subject     a dataset as it lies there, sound or not    videos, pictures  what video says
    structure   meta/ and the listing of files              own               the dpipe/ folder
    rows        data files row by row                       raw               recordings before conversion
    mend        `--fix`: rebuild what follows from the rest

Names of problems are shared with the converters: schemas/problems.py.
"""

from __future__ import annotations

import time
from pathlib import Path

from ...schemas.errors import UsageError
from ...schemas.problems import NOTE, PROBLEMS
from . import own, pictures, recording, rows, structure, videos  # noqa: F401 - their checks register themselves
from .checks import CHECKS, Check, Finding, Findings, Found, Level, Report, check

__all__ = ["CHECKS", "Check", "Finding", "Found", "Level", "Report", "check", "examine", "report_text"]


def examine(
    path: Path, level: Level = Level.SAMPLED, source: str | None = None, where: str | None = None
) -> Report:
    """Everything wrong with what lies at `path`; UsageError when that is nothing a doctor knows.

    `where`: an SQL condition; rows, numbers and pictures of the episodes that meet it alone, beside all metadata.
    """
    path = Path(path)
    started = time.perf_counter()
    if where and level == Level.FAST:
        raise UsageError("--where chooses among rows and pictures, and --fast looks at neither")
    report = _examine(path, level, source, where)
    report.where = where or ""
    report.findings.sort(key=lambda finding: ("error", "warn", "note").index(finding.severity))
    report.seconds = time.perf_counter() - started
    return report


def _examine(path: Path, level: Level, source: str | None, where: str | None) -> Report:
    from .dataset import examine_dataset
    from .raw import examine_raw, find_source

    if not path.exists():
        raise UsageError(
            f"nothing at {path}\n  next: name a dataset, a folder of raw recordings, targets or shards"
        )
    if source is None and ((path / "meta").is_dir() or (path / "dpipe").is_dir()):
        return examine_dataset(path, level, where)
    if where and source is None and any((path / n).is_file() for n in ("contract.json", "index.json")):
        raise UsageError(f"{path}: --where is for datasets and recordings; targets and shards are whole")
    if (path / "contract.json").is_file():
        report = Report(path, "targets", level)
        _collect(report, "target", own.examine_target(path, None, Level.FAST))
        _collect(report, "target-values", own.examine_target(path, None, level, values=True))
        return report
    if (path / "index.json").is_file() and (path / "index.bin").is_file():
        report = Report(path, "shards", level)
        _collect(report, "shards", own.examine_shards(path, None, Level.FAST))
        if level > Level.FAST:
            _collect(report, "shards", own.examine_shards(path, None, level))
        return report
    found = source or find_source(path)
    if found is None:
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) if path.is_dir() else "a file"
        raise UsageError(
            f"{path} is no dataset, targets or shards, and no source finds recordings in it\n"
            f"  found: {inside or 'an empty folder'}\n  next: give --source NAME to hear what that source expects"
        )
    return examine_raw(path, found, level, where)


def _collect(report: Report, problem: str, findings: Findings) -> None:
    report.checks += 1
    for found in findings:
        report.add(problem, found)


def report_text(report: Report, fail_on: str = "error", notes: bool = True) -> str:
    """A table for people: what, where, and once for each problem why and what to do."""
    how = {Level.FAST: "metadata only", Level.SAMPLED: "pictures sampled", Level.FULL: "everything decoded"}
    head = f"{report.path.name}: {report.kind}"
    if report.episodes:
        head += f", {report.episodes:,} episodes, {report.frames:,} frames"
    if report.where:
        head += f" where {report.where}"
    lines = [f"{head}; {how[report.level]}, {report.checks} checks in {report.seconds:.1f} s"]
    shown = [f for f in report.findings if notes or f.severity != NOTE]
    for problem in dict.fromkeys(finding.problem for finding in shown):
        own_findings = [finding for finding in shown if finding.problem == problem]
        for finding in own_findings:
            lines.append(f"  {finding.severity:5s}  {problem:18s} {finding.where}: {finding.what}")
        more = sum(n for (name, _), n in report.counts.items() if name == problem) - len(own_findings)
        if more > 0:
            lines.append(f"  {'':5s}  {'':18s} and {more:,} more")
        if any(finding.severity != NOTE for finding in own_findings):
            told = PROBLEMS[problem]
            lines.append(f"  {'':5s}  {'':18s}   why: {told.why}")
            lines.append(f"  {'':5s}  {'':18s}   mend: {told.remedy.replace('PATH', str(report.path))}")
    errors, warnings = report.number("error"), report.number("warn")
    if errors or warnings:
        lines.append(f"{report.path.name}: {errors} errors, {warnings} warnings")
    lines.append(f"{report.path.name}: {'not sound' if report.fails(fail_on) else 'sound'}")
    return "\n".join(lines)
