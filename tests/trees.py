"""Comparing folders byte for byte, and running conversions from tests. Helpers, not a test file."""

import hashlib
from pathlib import Path

from dpipe.converters import load_converter
from dpipe.pipeline.convert import ConvertResult, convert
from dpipe.pipeline.payload import VideoOptions
from dpipe.pipeline.progress import Progress
from dpipe.pipeline.request import ConvertRequest


def tree_digest(root: Path, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Relative path -> digest of every file below a folder, except paths that start with one of `without`."""
    found = {}
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root).as_posix()
        if path.is_file() and not relative.startswith(without):
            found[relative] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def run_convert(raw: Path, out: Path, source: str = "libero", **changes) -> ConvertResult:
    """A quiet conversion in this process unless `workers` says otherwise."""
    settings = {
        "options": load_converter(source).Options(),
        "video": VideoOptions(),
        "workers": 0,
        "name": "set",
    }
    settings |= changes
    return convert(ConvertRequest(source=source, raw=raw, out=out, **settings), Progress(quiet=True))
