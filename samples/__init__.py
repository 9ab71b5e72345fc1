"""The tabletop simulator and one raw-format writer per source: a converter's inverse.

To add a format: write `samples/<name>.py` with `write(raw, episodes, seed, **options) -> list[Path]` and add
its line to `SAMPLERS`. Modules load when asked for, so that the command line does not pay for h5py.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from ..schemas.errors import DataError, unknown_name

SAMPLERS: dict[str, str] = {
    "libero": "LIBERO demonstrations: HDF5 with upside-down images, observation after the action, 20 Hz",
    "calvin": "CALVIN play data: one npz per frame with index files and language windows, 30 Hz",
    "egodex": "EgoDex: a person's hand on the gripper's path, HDF5 skeleton and 1080p MP4, 30 fps",
    "agibot": "AgiBot World: proprio_stats.h5 with three AV1 cameras and task_info, 30 fps",
}


def write_sample(name: str, raw: Path, episodes: int, seed: int, **options: Any) -> list[Path]:
    """Write `episodes` tabletop episodes in the raw format `name` below `raw`; returns the files written.

    Episode seeds count up from `seed`. `options` are the format's own keyword arguments. Nothing is ever
    overwritten: a folder that already holds files is refused.
    """
    if name not in SAMPLERS:
        raise unknown_name("sample", name, SAMPLERS)
    present = (
        next((path for path in sorted(raw.rglob("*")) if path.is_file()), None) if raw.is_dir() else None
    )
    if present is not None:
        raise DataError(
            f"sample {name}: {raw} already holds recordings, first {present.relative_to(raw)}\n"
            "  Nothing is overwritten: remove the folder, or name another with --raw."
        )
    return import_module(f".{name}", __name__).write(raw, episodes=episodes, seed=seed, **options)
