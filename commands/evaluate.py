"""dpipe evaluate: a trained policy in the simulator's closed loop."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..schemas.errors import UsageError
from .completion import complete_run
from .options import answer, common, open_space, say

if TYPE_CHECKING:
    from ..pipeline.workspace import Workspace


@click.command()
@click.argument("run", shell_complete=complete_run)
@click.option(
    "--episodes", type=click.IntRange(1), default=200, show_default=True, help="How many, each its own seed."
)
@click.option(
    "--seed", type=int, default=1_000_000, show_default=True, help="Of the first episode; data count from 0."
)
@click.option("--objects", type=click.IntRange(1, 6), default=3, show_default=True, help="On the table.")
@click.option("--blind", is_flag=True, help="Control: grey pictures.")
@click.option("--no-language", is_flag=True, help="Control: no instruction.")
@click.option("--no-refine", is_flag=True, help="libra, anchorrefine: the plan or the anchor alone acts.")
@click.option("--video", is_flag=True, help="An mp4 beside the strip of pictures.")
@click.option("--device", default="cpu", show_default=True, help="Where the policy runs.")
@common
def evaluate(
    run: str,
    episodes: int,
    seed: int,
    objects: int,
    blind: bool,
    no_language: bool,
    no_refine: bool,
    video: bool,
    device: str,
    workspace: Path | None,
    as_json: bool,
    **_: Any,
) -> None:
    """Roll a policy out in the tabletop simulator: success with its interval, latency, pictures.

    \b
    dpipe evaluate libra/libero
    dpipe evaluate libra/libero --episodes 50 --blind
    """
    from ..trainer.evaluate import evaluate as judge

    run_dir = find_run(open_space(workspace), run)
    report = judge(
        run_dir,
        episodes=episodes,
        seed=seed,
        objects=objects,
        blind=blind,
        language=not no_language,
        device=device,
        options={"refine": False} if no_refine else {},
        video=video,
        say=lambda text: say(text, as_json),
    )
    facts = asdict(report) | {
        "success": report.success,
        "files": [str(path) for path in report.files(run_dir)],
    }
    written = "\n".join(f"  {path}" for path in report.files(run_dir))
    answer(facts, f"{report.message}\n{written}", as_json)


def find_run(space: Workspace, given: str) -> Path:
    """A run as RECIPE/NAME, as RECIPE where it has one run only, or by folder."""
    runs = space.root / "runs"
    known = sorted(path.parent for path in runs.glob("*/*/config.json"))
    named = [path for path in known if given in (f"{path.parent.name}/{path.name}", path.parent.name)]
    if len(named) == 1:
        return named[0]
    if (Path(given) / "config.json").is_file():
        return Path(given)
    listed = ", ".join(f"{path.parent.name}/{path.name}" for path in known) or "(none: dpipe train RECIPE)"
    raise UsageError(f"{'several runs are' if named else 'no run'} '{given}' in {runs}\n  found: {listed}")
