"""dpipe export-policy: a trained run as a folder that lerobot serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .completion import complete_run
from .evaluate import find_run
from .options import answer, common, open_space


@click.command("export-policy")
@click.argument("run", shell_complete=complete_run)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.  [RUN/lerobot]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the noise the policy starts from.")
@common
def export_policy(
    run: str, out: Path | None, seed: int, workspace: Path | None, as_json: bool, **_: Any
) -> None:
    """A trained run as a policy of lerobot's: select_action(batch), reset().

    \b
    dpipe export-policy libra/libero --out libra-libero
    """
    from ..trainer.export import export_policy as write

    run_dir = find_run(open_space(workspace), run)
    folder = write(run_dir, out or run_dir / "lerobot", seed)
    facts = {"run": str(run_dir), "policy": str(folder), "type": "dpipe"}
    answer(
        facts,
        f"wrote {folder}\n"
        "  import dpipe.trainer.modeling_dpipe\n"
        f'  policy = get_policy_class("dpipe").from_pretrained("{folder}")',
        as_json,
    )
