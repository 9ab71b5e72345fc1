"""Raw logs -> Episode, one file per format. Knows schemas and video.

To add a source: write `converters/<name>.py` with `find`, `scan`, `read` and a `CONVERTER`, and add its line to
`SOURCES`. Modules load when they are asked for, so that the command line does not pay for h5py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..schemas.episode import Dropped, Embodiment, Episode, EpisodeRef, Recording
from ..schemas.errors import unknown_name

SOURCES = {
    "libero": "LIBERO demonstrations (HDF5), raw release or regenerated",
    "calvin": "CALVIN play data (one npz per frame), folder or published zip",
    "egodex": "EgoDex human hands (HDF5 + MP4)",
    "agibot": "AgiBot World Alpha and Beta (HDF5 + MP4), folder or tar shards",
    "lerobot": "an existing LeRobot v3.0 or v2.1 dataset",
}


@dataclass(frozen=True)
class Converter:
    """One raw format. The three functions take the format's own `Options`, a frozen dataclass.

    Every field of `Options` has a default and `metadata={"help": ..., "choices": (...)}`; the command line is
    made from them. Raise `version` when the output of an unchanged recording would change.
    """

    name: str
    version: int
    Options: type
    find: Callable[[Path, Any], Iterator[Recording]]
    """Recordings below the raw folder, in the order their episodes get, from names alone."""
    scan: Callable[[Recording, Any], Sequence[EpisodeRef | Dropped]]
    """Every episode of a recording, checked but for pixels; all problems of one episode in one reason."""
    read: Callable[[EpisodeRef, Any], Episode]
    """One episode; raises DataError when a pixel payload turns out unreadable."""
    embodiment: Callable[[Any, str], Embodiment]
    """What the numbers mean, for given options and variant."""
    expects: str
    """The raw tree in a line or two, for the message when nothing was found."""


def load_converter(name: str) -> Converter:
    if name not in SOURCES:
        raise unknown_name("source", name, SOURCES)
    return import_module(f".{name}", __name__).CONVERTER
