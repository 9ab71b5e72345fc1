"""Raw logs -> Episode, one file per format. Knows schemas and video.

To add a source: write `converters/<name>.py` with `find`, `scan`, `read` and a `CONVERTER`, and add its line to
`SOURCES`. A converter may also live in a file of its own outside the project (docs/tutorial-own-files.md): its
path then stands for its name. Modules load when they are asked for, so that the command line does not pay for h5py.
"""

from __future__ import annotations

import copyreg
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from ..schemas.episode import Dropped, Embodiment, Episode, EpisodeRef, Recording
from ..schemas.errors import UsageError, unknown_name

SOURCES = {
    "libero": "LIBERO demonstrations (HDF5), raw release or regenerated",
    "calvin": "CALVIN play data (one npz per frame), folder or published zip",
    "egodex": "EgoDex human hands (HDF5 + MP4)",
    "agibot": "AgiBot World Alpha and Beta (HDF5 + MP4), folder or tar shards",
    "lerobot": "an existing LeRobot v3.0 or v2.1 dataset",
}
MAPPED = "mapped"  # one's own HDF5 files, described by a map: the source of `dpipe convert FOLDER`


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
    embodiment: Callable[[Any, str], Embodiment] | None
    """What the numbers mean, for given options and variant; None where only the recordings can say it."""
    expects: str
    """The raw tree in a line or two, for the message when nothing was found."""
    describe: Callable[[Path, Any, str], Embodiment] | None = None
    """What the numbers mean by the recordings themselves: raw folder, options, variant. In place of `embodiment`."""
    keeps_rate: Callable[[Any], str] | None = None
    """Why recordings cannot be taken at a lower frame rate under given options, "" where they can (resample.py)."""
    path: str = ""
    """The file of a converter outside the project, set by `load_converter`."""
    rate: int = 0
    """Frames a second asked for, 0 as recorded; with `actions` set by `load_converter`."""
    actions: str = "auto"

    @property
    def address(self) -> str:
        """What loads this converter in another process."""
        return (self.path or self.name) + (f"@{self.rate}:{self.actions}" if self.rate else "")

    def embodiment_of(self, raw: Path, options: Any, variant: str) -> Embodiment:
        if self.describe is not None:
            return self.describe(raw, options, variant)
        assert self.embodiment is not None, "checked when the converter was loaded"
        return self.embodiment(options, variant)


def load_converter(source: str) -> Converter:
    """A converter by its name, or by the path of a Python file that holds one as `CONVERTER`.

    "NAME@15" is the same source at 15 frames a second, "NAME@15:moves" with its actions' meaning said.
    """
    slower = re.fullmatch(r"(.+)@(\d+)(?::(\w+))?", source)
    if slower is not None:
        from .resample import resampled

        return resampled(load_converter(slower[1]), int(slower[2]), slower[3] or "auto")
    if source.endswith(".py"):
        path = Path(source)
        if not path.is_file():
            raise UsageError(f"no converter at {source}\n  next: correct its path in dpipe.toml")
        return _load_file(path, path.stat().st_mtime_ns)
    if source not in (*SOURCES, MAPPED):
        raise unknown_name("source", source, SOURCES)
    return import_module(f".{source}", __name__).CONVERTER


@cache
def _load_file(path: Path, mtime_ns: int) -> Converter:
    """A converter outside the project. Its options travel to workers as words, since they cannot import its class."""
    spec = spec_from_file_location(f"dpipe_converter_{zlib.crc32(str(path).encode()):08x}", path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(
            f"{path} cannot be loaded as a converter: {type(error).__name__}: {error}"
        ) from error
    converter = getattr(module, "CONVERTER", None)
    if not isinstance(converter, Converter) or not (converter.embodiment or converter.describe):
        raise UsageError(
            f"{path} is no converter\n  expected: CONVERTER = Converter(name=..., find=..., scan=..., read=..., "
            f"embodiment=...)\n  found: {type(converter).__name__}\n  see docs/tutorial-own-files.md"
        )
    copyreg.pickle(converter.Options, lambda options: (_options_of, (str(path), asdict(options))))
    return replace(converter, path=str(path))


def _options_of(source: str, values: Mapping[str, Any]) -> Any:
    return load_converter(source).Options(**values)
