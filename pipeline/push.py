"""`dpipe push`: a dataset to the Hugging Face Hub, after a look at its licence and a question.

What goes up is the plain LeRobot dataset: data/, meta/, videos/ and the card. Our own folder stays at home unless
asked for: targets and shards are large, and few but dpipe can read them. (lerobot's own `push_to_hub` would
upload it with the rest; the journal, of use to this machine alone, never goes.) The repository gets the tag v3.0,
without which lerobot refuses to load it, and is private unless said otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..schemas.errors import DataError, UsageError
from ..streams.dataset import open_dataset
from .facts import facts_of

OWN = "dpipe"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class PushPlan:
    root: Path
    repo_id: str
    licence: str
    files: tuple[str, ...]  # relative to root
    bytes: int
    version: str  # the tag: LeRobot's version of the format
    private: bool
    left: tuple[str, ...]  # patterns of what stays here
    notes: tuple[str, ...]

    def to_text(self) -> str:
        seen = "private" if self.private else "PUBLIC"
        head = (
            f"{self.root.name} -> {self.repo_id}, {seen}: {len(self.files):,} files, {self.bytes / 1e6:,.1f} MB, "
            f"licence {self.licence or 'not told'}"
        )
        return "\n".join([head, *(f"  {note}" for note in self.notes)])


def plan_push(
    root: Path, repo_id: str, accepted: str = "", own: bool = False, private: bool = True
) -> PushPlan:
    """What would go up; UsageError where the licence forbids it or says nothing, unless accepted by its name."""
    if not REPOSITORY.fullmatch(repo_id):
        raise UsageError(f"--repo-id {repo_id}: expected OWNER/NAME")
    dataset = open_dataset(root)
    facts = facts_of(dataset)
    problem, notes = licence_says(facts.licence)
    if problem and accepted != (facts.licence or "unknown"):
        raise UsageError(
            f"{root.name} is not pushed: {problem}\n"
            f"  next: if you have the right to, say so:  --accept-licence {facts.licence or 'unknown'}"
        )
    there, outside = sorted(_files(root)), [path.relative_to(root).as_posix() for path in _leading_out(root)]
    left = (f"{OWN}/journal/*" if own else f"{OWN}/*", ".*", "*/.*", *outside)
    files = [name for name in there if not any(fnmatch(name, pattern) for pattern in left)]
    card = root / "README.md"
    if not card.is_file():
        notes.append("it has no card (README.md): nobody will know what its numbers mean")
    if (root / OWN).is_dir() and not own:
        notes.append(f"{OWN}/ stays here (--with-dpipe sends it); lerobot's own push_to_hub would send it")
    size = sum((root / name).stat().st_size for name in files)
    version = str(dataset.info["codebase_version"])
    return PushPlan(root, repo_id, facts.licence, tuple(files), size, version, private, left, tuple(notes))


def licence_says(licence: str) -> tuple[str, list[str]]:
    """(why it must not be pushed without a word, "" where it may; what to know)."""
    told = licence.lower()
    parts = set(re.split(r"[^a-z]+", told))
    if not told or told in ("unknown", "other"):
        return "its licence is not told", []
    if "nd" in parts:
        return f"{licence} allows no derivatives, and a converted dataset is one", []
    notes = []
    if "nc" in parts:
        notes.append(f"{licence}: not for commercial use, and the copy carries the same terms")
    if "sa" in parts:
        notes.append(f"{licence}: what is made from it carries the same licence")
    return "", notes


def push(plan: PushPlan, endpoint: str = "") -> str:
    """Upload; returns the address. Nothing here asks: the question comes before."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise UsageError("pushing needs huggingface_hub:  pip install huggingface_hub") from error
    api: Any = HfApi(endpoint=endpoint or None)
    try:
        made = api.create_repo(plan.repo_id, repo_type="dataset", private=plan.private, exist_ok=True)
        api.upload_folder(
            repo_id=plan.repo_id,
            repo_type="dataset",
            folder_path=plan.root,
            ignore_patterns=list(plan.left),
            commit_message=f"{plan.root.name}, LeRobot {plan.version}",
        )
        api.create_tag(plan.repo_id, tag=plan.version, repo_type="dataset", exist_ok=True)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DataError(
            f"{plan.repo_id} was not pushed\n  found: {str(error).splitlines()[0] if str(error) else error!r}\n"
            "  next: log in with  hf auth login  , and run the same command: what is up is not sent again"
        ) from error
    return str(made)


def _files(root: Path) -> Iterator[str]:
    return (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def _leading_out(root: Path) -> list[Path]:
    """Links to what lies elsewhere: no part of the dataset, and nobody's business."""
    own = root.resolve()
    return [path for path in root.rglob("*") if path.is_symlink() and not path.resolve().is_relative_to(own)]
