"""A workspace: the folder in which the three commands find everything without further words.

raw/<source>/        recordings as published      [sources.<source>] raw = "..." in dpipe.toml
lerobot/<name>/      converted datasets           zarr/<name>.zarr likewise
targets/<name>/      targets of datasets that are not ours or cannot be written to
runs/<recipe>/<name>/
dpipe.toml           optional
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..schemas.errors import UsageError


@dataclass(frozen=True)
class Workspace:
    root: Path
    settings: Mapping[str, Any] = field(default_factory=dict)

    def raw(self, source: str) -> Path:
        configured = self._source(source).get("raw")
        return self.root / configured if configured else self.root / "raw" / source

    def own_sources(self) -> list[str]:
        """Sources that dpipe.toml adds: [sources.<name>] with a converter of one's own, or a map."""
        sources = self.settings.get("sources", {})
        return [name for name in sources if self.converter(name) or self.map(name)]

    def converter(self, source: str) -> Path | None:
        """[sources.<source>] converter = "my_lab.py": a converter outside the project."""
        configured = self._source(source).get("converter")
        return self.root / configured if configured else None

    def map(self, source: str) -> Path | None:
        """[sources.<source>] map = "map.toml": HDF5 files of one's own."""
        configured = self._source(source).get("map")
        return self.root / configured if configured else None

    def _source(self, source: str) -> Mapping[str, Any]:
        return self.settings.get("sources", {}).get(source, {})

    def dataset(self, name: str, form: str = "lerobot") -> Path:
        return self.root / form / (f"{name}.zarr" if form == "zarr" else name)

    def targets(self, name: str) -> Path:
        return self.root / "targets" / name

    def run(self, recipe: str, name: str) -> Path:
        return self.root / "runs" / recipe / name

    def datasets(self) -> list[Path]:
        """Every LeRobot dataset of the workspace, finished or not, by name."""
        folder = self.root / "lerobot"
        if not folder.is_dir():
            return []
        return sorted(p for p in folder.iterdir() if (p / "meta").is_dir() or (p / "dpipe").is_dir())

    def sources_made(self) -> set[str]:
        """Sources of which the workspace holds a finished dataset, under whatever name."""
        manifests = [root / "dpipe" / "manifest.json" for root in self.datasets()]
        return {json.loads(path.read_text()).get("source", "") for path in manifests if path.is_file()}

    def find_dataset(self, name_or_folder: str) -> Path:
        """A dataset by name in this workspace, or by folder; UsageError listing what there is."""
        folder = self.dataset(name_or_folder)
        if folder.is_dir():
            return folder
        given = Path(name_or_folder)
        if (given / "meta").is_dir() or (given / "dpipe").is_dir():
            return given
        names = [p.name for p in self.datasets()]
        known = ", ".join(names) or "(none yet: dpipe convert SOURCE --to lerobot)"
        nearest = get_close_matches(name_or_folder, names, n=1)
        hint = f"  Did you mean '{nearest[0]}'?" if nearest else ""
        raise UsageError(f"no dataset '{name_or_folder}' in {self.root / 'lerobot'}{hint}\n  found: {known}")


def open_workspace(folder: Path | None) -> Workspace:
    """--workspace, else DPIPE_WORKSPACE, else the current folder."""
    root = (folder or Path(os.environ.get("DPIPE_WORKSPACE", "."))).resolve()
    config = root / "dpipe.toml"
    if not config.is_file():
        return Workspace(root)
    try:
        return Workspace(root, tomllib.loads(config.read_text()))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{config} is not valid TOML: {error}") from error
