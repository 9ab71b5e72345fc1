"""Checks and what they find. A check is one small function that yields findings about one kind of thing.

    @check("index", ROWS)                       the problem's name, as in schemas/problems.py, and what is looked at
    def index_is_position(block) -> Findings:

Why a problem matters and what mends it stands with its name, once for every function that can find it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from ...schemas.errors import DpipeError
from ...schemas.problems import ERROR, NOTE, PROBLEMS, WARN

# What a check looks at, in the order in which a dataset is examined.
TABLES = "tables"  # meta/ and the listing of files: `subject.Subject`
ROWS = "rows"  # one data file: `subject.Block`
EPISODE = "episode"  # one episode's columns, of a dataset or a raw recording: `recording.EpisodeRows`
ALL = "all"  # what every episode said together: `recording.Gathered`
VIDEO = "video"  # one video file's sample table: `videos.VideoFile`
PICTURES = "pictures"  # a stretch of one camera, decoded: `pictures.Clip`
SEEN = "seen"  # all stretches of all cameras: `pictures.Seen`
OWN = "own"  # the dpipe/ folder: `subject.Subject`
STAGES = (TABLES, OWN, ROWS, EPISODE, ALL, VIDEO, PICTURES, SEEN)

SHOWN = 12  # findings kept of one problem; the rest are counted


class Level(IntEnum):
    """FAST reads metadata; SAMPLED every row and sample table, and some pictures; FULL decodes everything."""

    FAST = 0
    SAMPLED = 1
    FULL = 2


@dataclass(frozen=True)
class Found:
    """One thing found: where, what was expected and found; `severity` when other than the problem's own."""

    where: str
    what: str
    severity: str = ""
    problem: str = ""  # when other than the check's


Findings = Iterable[Found]


@dataclass(frozen=True)
class Check:
    problem: str
    stage: str
    level: Level
    run: Callable[[Any], Findings]


CHECKS: list[Check] = []


def check(problem: str, stage: str, level: Level = Level.FAST) -> Callable[[Callable[..., Findings]], Any]:
    """Register a function as a check for `problem`."""
    if problem not in PROBLEMS:
        raise KeyError(f"schemas/problems.py does not know '{problem}'")

    def register(function: Callable[..., Findings]) -> Callable[..., Findings]:
        CHECKS.append(Check(problem, stage, level, function))
        return function

    return register


@dataclass(frozen=True)
class Finding:
    """A finding as reported."""

    problem: str
    severity: str
    where: str
    what: str

    @property
    def remedy(self) -> str:
        return PROBLEMS[self.problem].remedy

    @property
    def fixable(self) -> bool:
        return PROBLEMS[self.problem].fixable

    def to_json(self) -> dict[str, Any]:
        told = PROBLEMS[self.problem]
        return {
            "check": self.problem,
            "severity": self.severity,
            "where": self.where,
            "found": self.what,
            "why": told.why,
            "remedy": told.remedy,
            "fixable": told.fixable,
        }


@dataclass
class Report:
    """Everything one examination found."""

    path: Path
    kind: str  # "LeRobot v3.0 dataset", "raw libero recordings", ...
    level: Level
    findings: list[Finding] = field(default_factory=list)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)  # (problem, severity) -> how often
    checks: int = 0
    episodes: int = 0
    frames: int = 0
    seconds: float = 0.0
    where: str = ""  # the condition that chose these episodes

    def add(self, problem: str, found: Found) -> None:
        name = found.problem or problem
        severity = found.severity or PROBLEMS[name].severity
        key = (name, severity)
        self.counts[key] = self.counts.get(key, 0) + 1
        if self.counts[key] <= SHOWN:
            self.findings.append(Finding(name, severity, found.where, found.what))

    def number(self, severity: str) -> int:
        return sum(count for (_, own), count in self.counts.items() if own == severity)

    def fails(self, fail_on: str) -> bool:
        """`fail_on` is "error" or "warn"; notes never fail."""
        return bool(self.number(ERROR)) or (fail_on == WARN and bool(self.number(WARN)))

    def to_json(self, fail_on: str = ERROR) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "kind": self.kind,
            "level": self.level.name.lower(),
            "sound": not self.fails(fail_on),
            "errors": self.number(ERROR),
            "warnings": self.number(WARN),
            "episodes": self.episodes,
            "frames": self.frames,
            "where": self.where or None,
            "checks": self.checks,
            "seconds": round(self.seconds, 3),
            "findings": [finding.to_json() for finding in self.findings],
        }

    @property
    def problems(self) -> set[str]:
        """Names of everything found but notes."""
        return {name for name, severity in self.counts if severity != NOTE}


class Examination:
    """Runs checks over things and collects what they find; a check that trips over damage reports the damage."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self._used: set[Callable[..., Findings]] = set()

    def look(self, stage: str, thing: Any, where: str) -> None:
        for each in CHECKS:
            if each.stage == stage and each.level <= self.report.level:
                self.run(each, thing, where)
        self.report.checks = len(self._used)

    def run(self, each: Check, thing: Any, where: str) -> None:
        self._used.add(each.run)
        try:
            for found in each.run(thing):
                self.report.add(each.problem, found)
        except EXPECTED as error:
            self.report.add(
                "unreadable", Found(where, f"'{each.problem}' could not be checked: {in_a_line(error)}")
            )

    def note(self, problem: str, found: Found) -> None:
        self.report.add(problem, found)


# What damage raises in the libraries underneath, whichever check meets it first.
EXPECTED = (
    *(DpipeError, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError),
    *(ArithmeticError, RuntimeError, MemoryError),
)


def in_a_line(error: BaseException) -> str:
    """An error's words, or its kind where it has none."""
    words = " ".join(str(error).split())
    return words[:300] if words else type(error).__name__
