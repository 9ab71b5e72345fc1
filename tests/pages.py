"""Documents as programs: the blocks of a Markdown page, run in order in one folder.

`python NAME` and `toml NAME` are files; `sh` and `sh exit=2` are run as typed; `text` holds lines that the block
before must have said, `text NAME` lines that stand in that file, and a `text` before any `sh` is only read.
"""

import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BLOCK = re.compile(r"^```(\w*) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    kind: str
    note: str
    body: str


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in BLOCK.findall(page.read_text(encoding="utf-8"))]


def run_page(page: Path, folder: Path, changed: dict[str, str] | None = None) -> list[str]:
    """What each `sh` block said. `changed`: patterns replaced in commands, where a test can't do as the page does."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DPIPE_WORKSPACE": ".",
    }
    answers: list[str] = []
    said: str | None = None
    for block in blocks(page):
        if block.kind in ("python", "toml"):
            (folder / block.note).write_text(block.body)
        elif block.kind == "sh":
            commands = block.body
            for pattern, instead in (changed or {}).items():
                commands = re.sub(pattern, instead, commands)
            done = subprocess.run(
                ["bash", "-ec", commands],
                capture_output=True,
                text=True,
                cwd=folder,
                env=environment,
                timeout=240,
            )
            said = done.stdout + done.stderr
            assert done.returncode == int(block.note.removeprefix("exit=") or 0), f"{commands}\n{said}"
            answers.append(said)
        elif block.kind == "text" and (block.note or said is not None):
            found = (folder / block.note).read_text() if block.note else said
            assert [line for line in block.body.splitlines() if line not in str(found)] == [], found
    return answers


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
