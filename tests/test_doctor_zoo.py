"""No false alarm on datasets from anyone: other robots, cameras, codecs, writers and habits (tests/zoo.py)."""

import shutil
from pathlib import Path

import pytest
from dpipe.pipeline.doctor import Level, examine
from trees import tree_digest
from zoo import SO101, VARIANTS, arm_takes, record

# A gripper in a nested group of names: lerobot's relative-action step does misread it, and the doctor says so.
TOLD = {"from version two": {"feature-names"}}


def complaints(root: Path) -> list[str]:
    found = [f for level in Level for f in examine(root, level).findings if f.severity != "note"]
    return [f"{f.severity} {f.problem} {f.where}: {f.what}" for f in found]


@pytest.mark.parametrize("name", VARIANTS)
def test_what_others_record_is_called_sound(name: str, tmp_path: Path):
    root = VARIANTS[name](tmp_path / "set")
    told = [line for line in complaints(root) if line.split()[1] not in TOLD.get(name, set())]
    assert told == []


def test_a_dataset_is_only_read(tmp_path: Path):
    names = {"observation.state": SO101, "action": SO101}
    root = record(tmp_path / "set", arm_takes(0, lengths=(20, 24)), names=names)
    before = {path: path.stat().st_mtime_ns for path in sorted(root.rglob("*"))}
    digest = tree_digest(root)
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert complaints(root) == []
    after = {path: path.stat().st_mtime_ns for path in sorted(root.rglob("*"))}
    assert after == before and tree_digest(root) == digest
    for path in before:
        path.chmod(0o755)
    shutil.rmtree(root)
