"""With --json every line of a command can be parsed: results on stdout, news on stderr, neither among the other."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from dpipe.cli import cli

COMMANDS = {  # in this order: each works on what those before it made
    "convert": ["convert", "libero", "--to", "lerobot", "--workers", "0"],
    "convert again": ["convert", "libero", "--to", "lerobot", "--workers", "0"],
    "precompute": ["precompute", "tokens", "stats", "--workers", "0"],
    "shards": ["precompute", "shards", "--workers", "0"],
    "train": ["train", "libra", "--steps", "2", "--yes", "--workers", "0"],
    "evaluate": ["evaluate", "libra", "--episodes", "1"],
    "compare": ["compare", "libra-bins", "--dry-run"],
    "doctor": ["doctor", "libero", "--fast"],
    "select": ["select", "libero", "--where", "episode_index = 0", "--name", "one"],
    "merge": ["merge", "libero", "one", "--name", "both"],
    "info": ["info", "lerobot/libero"],
    "status": ["status"],
    "report": ["report"],
    "plan": ["plan", "convert", "libero"],
}


def test_every_line_of_every_command_is_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    sampled = CliRunner().invoke(cli, ["sample", "libero", "--episodes", "2", "--json"])
    assert sampled.exit_code == 0 and json.loads(sampled.stdout)["source"] == "libero"
    for name, words in COMMANDS.items():
        told = CliRunner().invoke(cli, [*words, "--json"], catch_exceptions=False)
        assert told.exit_code == 0, (name, told.output)
        results = [json.loads(line) for line in told.stdout.splitlines()]
        assert results and all(isinstance(each, dict | list) for each in results), name
        assert all("event" in json.loads(line) for line in told.stderr.splitlines()), name
