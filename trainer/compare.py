"""Ablations: a grid of runs judged in closed loop, one table and one picture in the form of the papers' own.

    found = compare(ABLATIONS["libra-bins"], Path("lerobot/libero"), Path("runs"), seeds=(0, 1, 2))
    print(found.table())

A row is one setting; rows that differ only in how the policy acts share their runs. Every run is trained and
judged on the same seeds of the simulator, kept under <runs>/<recipe>/<ablation>-<row>-s<seed>, and done once:
the same call again goes on where it was stopped, and reads what is finished.

What a row shows is the share of successes, mean over seeds with the lowest and the highest. Two rows are told
apart only where these ranges do not overlap; otherwise the table says so. The papers' figures stand beside for
their shape: they come from other robots, other tasks and models a thousand times the size.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..schemas.errors import UsageError, unknown_name
from .loop import Say, write_atomically


@dataclass(frozen=True)
class Row:
    """One setting: what differs in training (`config`) and at work (`policy`); `share` of the steps."""

    label: str
    config: Mapping[str, Any] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    paper: str = ""  # the paper's figure for this row, as printed there


@dataclass(frozen=True)
class Ablation:
    """Rows of one recipe, and what the paper claims of them: that `best` beats the others."""

    name: str
    recipe: str
    question: str
    rows: tuple[Row, ...]
    best: str  # the label the paper finds best
    claim: str  # in words
    source: str


@dataclass(frozen=True)
class Cell:
    """What the seeds of one row reached."""

    label: str
    successes: tuple[int, ...]  # by seed
    episodes: int  # per seed
    latency_ms: float  # of one look at the scene, all parts together, mean over seeds
    paper: str = ""

    @property
    def shares(self) -> list[float]:
        return [won / self.episodes for won in self.successes]

    @property
    def mean(self) -> float:
        return sum(self.shares) / len(self.shares)

    @property
    def range(self) -> tuple[float, float]:
        return min(self.shares), max(self.shares)


@dataclass(frozen=True)
class Comparison:
    """A finished ablation."""

    ablation: Ablation
    cells: tuple[Cell, ...]
    steps: int
    seeds: tuple[int, ...]

    @property
    def verdict(self) -> str:
        """What may be said: the paper's order, another, or none at this scale."""
        best = next(cell for cell in self.cells if cell.label == self.ablation.best)
        others = [cell for cell in self.cells if cell is not best]
        over = [cell for cell in others if apart(best, cell) and best.mean > cell.mean]
        under = [cell for cell in others if apart(best, cell) and best.mean < cell.mean]
        level = [cell for cell in others if not apart(best, cell)]
        told = [f"The paper: {self.ablation.claim}"]
        if over:
            told.append(f"Here {best.label} beats {_listed(over)}.")
        if under:
            told.append(
                f"Here {best.label} loses to {_listed(under)}: this small scale does not show the claim."
            )
        if level:
            seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''} of {best.episodes} episodes"
            told.append(f"Between {best.label} and {_listed(level)}, {seeds} do not decide.")
        return " ".join(told)

    def table(self) -> str:
        """Markdown."""
        a = self.ablation
        lines = [
            f"## {a.name}: {a.question}",
            "",
            f"{a.recipe}, {self.steps} steps, {len(self.seeds)} seeds, {self.cells[0].episodes} episodes each.",
            "",
            "| setting | success, mean (lowest to highest) | ms per look | paper |",
            "|---|---|---|---|",
        ]
        for cell in self.cells:
            low, high = cell.range
            share = f"{cell.mean:.1%} ({low:.1%} to {high:.1%})"
            lines.append(f"| {cell.label} | {share} | {cell.latency_ms:.1f} | {cell.paper} |")
        return "\n".join([*lines, "", self.verdict, "", f"Source of the paper's column: {a.source}"])

    def to_json(self) -> dict[str, Any]:
        cells = [
            {
                "label": cell.label,
                "successes": cell.successes,
                "episodes": cell.episodes,
                "mean": cell.mean,
                "range": cell.range,
                "latency_ms": cell.latency_ms,
                "paper": cell.paper,
            }
            for cell in self.cells
        ]
        told = {"ablation": self.ablation.name, "steps": self.steps, "seeds": self.seeds}
        return told | {"rows": cells, "verdict": self.verdict}


def apart(a: Cell, b: Cell) -> bool:
    """Whether the ranges over seeds leave no doubt which is better (one seed alone never does)."""
    (a_low, a_high), (b_low, b_high) = a.range, b.range
    return len(a.successes) > 1 and (a_low > b_high or b_low > a_high)


def _listed(cells: Sequence[Cell]) -> str:
    labels = [cell.label for cell in cells]
    return labels[0] if len(labels) == 1 else ", ".join(labels[:-1]) + " and " + labels[-1]


# -- running ----------------------------------------------------------------------------------------------


def run_name(ablation: Ablation, row: Row, seed: int) -> str:
    """Rows that train alike share a run, named after the first of them."""
    first = next(r for r in ablation.rows if (r.config, r.share) == (row.config, row.share))
    words = "".join(c if c.isalnum() else "-" for c in first.label.lower()).strip("-")
    return f"{ablation.name}-{words}-s{seed}"


def compare(
    ablation: Ablation,
    dataset_root: Path,
    runs: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int | None = None,
    episodes: int = 100,
    config: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    targets: Path | None = None,
    frames: str = "auto",
    say: Say = print,
) -> Comparison:
    """Train and judge what is missing, then put it together; `config` and `options` hold for every row."""
    from . import open_recipe
    from .evaluate import evaluate
    from .run import train

    full = steps or open_recipe(ablation.recipe).steps
    cells = []
    for row in ablation.rows:
        reports = []
        for seed in seeds:
            run_dir = runs / ablation.recipe / run_name(ablation, row, seed)
            say(f"{ablation.name}: {row.label}, seed {seed}")
            train(
                ablation.recipe,
                dataset_root,
                run_dir,
                steps=max(1, round(full * row.share)),
                config={**(config or {}), **row.config},
                options={**(options or {}), "seed": seed},
                targets=targets,
                frames=frames,
                say=say,
            )
            kept = run_dir / f"compared-{_digest(row.policy, episodes)}.json"
            if not kept.is_file():
                report = evaluate(run_dir, episodes=episodes, options=row.policy, say=say)
                latency = sum(part["median"] for part in report.latency.values())
                told = {"successes": report.successes, "episodes": episodes, "latency_ms": latency}
                write_atomically(kept, json.dumps(told) + "\n")
            reports.append(json.loads(kept.read_text()))
        cells.append(
            Cell(
                row.label,
                tuple(report["successes"] for report in reports),
                episodes,
                sum(report["latency_ms"] for report in reports) / len(reports),
                row.paper,
            )
        )
    return Comparison(ablation, tuple(cells), full, tuple(seeds))


def _digest(policy: Mapping[str, Any], episodes: int) -> str:
    words = [f"{name}-{value}" for name, value in sorted(policy.items())]
    return "-".join(["episodes", str(episodes), *words])


def vary(recipe: str, words: Sequence[str]) -> Ablation:
    """An ablation of one's own: every combination of `name=value,value` words."""
    from itertools import product

    axes: list[list[tuple[str, str]]] = []
    for word in words:
        name, _, values = word.partition("=")
        if not values:
            raise UsageError(f"--vary {word}: expected NAME=VALUE,VALUE, for example bins=2,10,50")
        axes.append([(name.replace("-", "_"), value) for value in values.split(",")])
    rows = [
        Row(" ".join(f"{name} {value}" for name, value in choice), dict(choice)) for choice in product(*axes)
    ]
    names = "-".join(word.partition("=")[0] for word in words)
    return Ablation(
        f"{recipe}-by-{names}", recipe, f"what {names} does", tuple(rows), rows[0].label, "nothing.", "none"
    )


# -- the picture ------------------------------------------------------------------------------------------

BAR, SIDE, GAP = 460, 190, 30  # px: full length of a bar, room for labels, height of a row
COLOUR, DOT = "#0072B2", "#000000"


def draw_comparison(found: Comparison, path: Path) -> None:
    """A bar per row, a dot per seed, on a scale of 0 to 100 %."""
    from PIL import Image, ImageDraw, ImageFont

    height = 80 + GAP * len(found.cells)
    image = Image.new("RGB", (SIDE + BAR + 60, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    draw.text(
        (12, 10),
        f"{found.ablation.name}: success, a dot a seed",
        fill="black",
        font=ImageFont.load_default(15),
    )
    for tenth in range(0, 11, 2):
        x = SIDE + BAR * tenth / 10
        draw.line((x, 36, x, height - 30), fill="#dddddd")
        draw.text((x - 10, height - 26), f"{tenth * 10} %", fill="black", font=font)
    for number, cell in enumerate(found.cells):
        top = 42 + GAP * number
        draw.text((12, top + 2), cell.label[:28], fill="black", font=font)
        draw.rectangle((SIDE, top, SIDE + BAR * cell.mean, top + GAP - 12), fill=COLOUR)
        for share in cell.shares:
            x, y = SIDE + BAR * share, top + (GAP - 12) / 2
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=DOT, outline="white")
    image.save(path)


# -- the papers' ablations --------------------------------------------------------------------------------

# VITA's controls skip the first stage; they get its steps, at its learning rate, for the second.
WHOLE = {"align_share": 0.0, "tune_lr": 1e-3}
LIBRA = "Libra-VLA (arXiv 2604.24921)"

ABLATIONS: dict[str, Ablation] = {
    ablation.name: ablation
    for ablation in (
        Ablation(
            "libra-bins",
            "libra",
            "how coarse the plan is (N bins)",
            tuple(Row(f"N = {n}", {"bins": n}, paper="best" if n == 10 else "") for n in (2, 5, 10, 20, 50)),
            "N = 10",
            "success over N is an inverted U that peaks at N = 10.",
            f"{LIBRA}, abstract and Sec 4.3; its figures per N are not at hand, their shape is.",
        ),
        Ablation(
            "libra-slices",
            "libra",
            "how many refinements one plan serves (M)",
            tuple(
                Row(f"M = {m}", {"slices": m}, paper=f"{92 + 60 / m:.0f} ms" if m > 1 else "")
                for m in (1, 2, 3, 4)
            ),
            "M = 2",
            "M = 2 is its choice in simulation; latency falls as 92 + 60 / M ms.",
            f"{LIBRA}, Sec 4.1 and Table 6, whose rows that formula reproduces.",
        ),
        Ablation(
            "libra-refine",
            "libra",
            "what the refiner adds to the plan",
            (
                Row("plan and refine"),
                Row("plan alone", policy={"refine": False}),
                Row("no intent", {"intent": "none"}),
            ),
            "plan and refine",
            "coarse intent and refinement together beat either alone.",
            f"{LIBRA}, Sec 4.3; no figures at hand.",
        ),
        Ablation(
            "libra-intent",
            "libra",
            "whose intents the refiner learns from",
            (
                Row("curriculum", {"intent": "curriculum"}),
                Row("teacher forcing", {"intent": "teacher"}),
                Row("no intent", {"intent": "none"}),
            ),
            "curriculum",
            "the curriculum beats teacher forcing.",
            f"{LIBRA}, Table 5; no figures at hand.",
        ),
        Ablation(
            "anchorrefine",
            "anchorrefine",
            "what the refiner adds to its anchor",
            (
                Row("refine", {"mode": "refine"}),
                Row("anchor alone", {"mode": "refine"}, {"refine": False}),
                Row("refine, anchor read", {"mode": "refine", "concat_anchor": True}),
                Row("direct", {"mode": "direct"}),
                Row("continue the anchor", {"mode": "continue"}),
            ),
            "refine",
            "refining beats the anchor by up to 7.8 points, and not reading the anchor's output beats reading it, "
            "82.3 against 79.6.",
            "AnchorRefine (arXiv 2604.17787), abstract and Sec 4; `continue the anchor` is our control.",
        ),
        Ablation(
            "vita",
            "vita",
            "what aligning to a teacher first is worth",
            (
                Row("two stages", {"mode": "two-stage"}),
                Row("decoder reused", {"mode": "reuse", **WHOLE}),
                Row("from scratch", {"mode": "scratch", **WHOLE}),
            ),
            "two stages",
            "aligning first, then tuning, beats training from scratch.",
            "VITA-VLA (arXiv 2510.09607), Sec 4; here all three take the same number of steps.",
        ),
        Ablation(
            "dial",
            "dial",
            "what foresight and the second stage are worth",
            (
                Row("both stages", {"stages": "both"}),
                Row("warm-up alone", {"stages": "one"}),
                Row("no warm-up", {"stages": "two"}),
                Row("no foresight at work", {"stages": "both"}, {"foresight": "present"}),
            ),
            "both stages",
            "a decoupled warm-up and then end-to-end training beats either alone; System 1 acts on the foresight.",
            "DIAL (arXiv 2603.29844), Sec 4; no figures at hand.",
        ),
    )
}


def ablation_named(name: str) -> Ablation:
    if name not in ABLATIONS:
        raise unknown_name("ablation", name, ABLATIONS)
    return ABLATIONS[name]
