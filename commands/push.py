"""dpipe push: a dataset to the Hugging Face Hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ..schemas.errors import UsageError
from .completion import complete_dataset
from .options import answer, common, open_space, say


@click.command()
@click.argument("dataset", shell_complete=complete_dataset)
@click.option("--repo-id", required=True, help="OWNER/NAME on the hub.")
@click.option("--public", is_flag=True, help="Visible to everyone.  [private]")
@click.option("--with-dpipe", is_flag=True, help="Our folder too: manifest, segments, targets, shards.")
@click.option("--accept-licence", default="", help="The licence's name: you have the right to publish this.")
@click.option("--endpoint", default="", help="Another hub's address.  [HF_ENDPOINT or huggingface.co]")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Say what would be sent, and stop.")
@common
def push(
    dataset: str,
    repo_id: str,
    public: bool,
    with_dpipe: bool,
    accept_licence: str,
    endpoint: str,
    yes: bool,
    dry_run: bool,
    workspace: Path | None,
    as_json: bool,
    **_: Any,
) -> None:
    """Upload a dataset as LeRobot loads it, after a look at its licence; dpipe uploads nothing otherwise.

    \b
    dpipe push libero --repo-id me/libero-mine --dry-run
    dpipe push libero --repo-id me/libero-mine --public
    """
    from ..pipeline.push import plan_push
    from ..pipeline.push import push as upload

    root = open_space(workspace).find_dataset(dataset)
    plan = plan_push(root, repo_id, accept_licence, with_dpipe, not public)
    say(plan.to_text(), as_json)
    facts = {"repo_id": repo_id, "files": len(plan.files), "bytes": plan.bytes, "licence": plan.licence}
    if dry_run:
        answer(facts | {"pushed": False}, f"{len(plan.files):,} files would be sent", as_json)
        return
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("nobody here to ask\n  next: --yes, if this is what you want to publish")
        click.confirm("Send it?", abort=True, err=True)
    address = upload(plan, endpoint)
    answer(facts | {"pushed": True, "address": address}, f"pushed to {address}", as_json)
