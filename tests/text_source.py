"""A source without pictures, of text files, where a test needs many episodes or chosen numbers in them."""

from pathlib import Path

from dpipe.converters import load_converter
from dpipe.pipeline.request import ConvertRequest

HEAD = """
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpipe.converters import Converter
from dpipe.schemas.episode import Embodiment, Episode, EpisodeRef, Recording
from dpipe.schemas.errors import DataError
from dpipe.schemas.features import Feature

@dataclass(frozen=True)
class Options:
    pass

def find(raw, options):
    for path in sorted(raw.glob("*.txt")):
        yield Recording(path.stem, "train", (path,))

features = (Feature("observation.state", "float32", ("x", "y")), Feature("action", "float32", ("x", "y")))
sidecar = ()
"""

TAIL = """
body = Embodiment("{name}", "none", 10, "by hand", features, {{}}, sidecar=sidecar)
CONVERTER = Converter("{name}", 1, Options, find, scan, read, lambda options, variant: body, "*.txt")
"""


def text_source(folder: Path, name: str, scan_and_read: str, part_frames: int) -> ConvertRequest:
    """A converter of `raw/*.txt`, one recording a file, from the text of its functions `scan` and `read`.

    An episode has 4 frames of state and action, two numbers each; the text may set `sidecar`.
    """
    script = folder / f"{name}.py"
    script.write_text(HEAD + scan_and_read + TAIL.format(name=name))
    (folder / "raw").mkdir(exist_ok=True)
    options = load_converter(str(script)).Options()
    return ConvertRequest(
        str(script), folder / "raw", folder / "out", "out", options, part_frames=part_frames
    )
