"""HDF5 from strangers: opened read-only, every dataset checked before a byte of it is read.

A dataset is refused when it lives outside its file (external link, external storage, virtual layout), when it
needs a plugin filter, or when its declared size is beyond what the file could hold.
Source: HDF5 file format 3.0; h5py 3 low-level API.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..schemas.errors import DataError

if TYPE_CHECKING:
    import h5py

# deflate, shuffle, fletcher32, szip, nbit, scaleoffset: built into the library; lzf: into h5py. Anything else is a
# plugin, and plugins are shared objects that HDF5 would load for us.
BUILT_IN_FILTERS = {1, 2, 3, 4, 5, 6, 32000}
# deflate reaches about 1:1030; beyond this a dataset's size is a lie or a bomb.
MOST_INFLATION = 1100


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """The file, read-only and unlocked (network file systems refuse locks); DataError when unreadable."""
    with kept_open(path) as file:
        yield file


def kept_open(path: Path) -> h5py.File:
    """The same for whoever closes it, or lets go of it and of everything in it."""
    import h5py

    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        raise DataError(
            f"{path.name}: not a readable HDF5 file\n  expected: a complete HDF5 file\n"
            f"  found: {path.stat().st_size if path.exists() else 0} bytes, {_first_line(error)}\n"
            f"  where: {path}\n  next: download or copy it again"
        ) from error


def datasets_below(group: h5py.Group, prefix: str = "") -> Iterator[tuple[str, h5py.Dataset]]:
    """Every dataset below a group, by path, hard links only, in sorted order."""
    import h5py

    for name in sorted(group):
        member = _member(group, name)
        if member is None:
            raise DataError(f"'{group.name}/{name}' is a link to nothing; refused")
        if isinstance(member, h5py.Group):
            yield from datasets_below(member, f"{prefix}{name}/")
        elif isinstance(member, h5py.Dataset):
            yield prefix + name, member


def find_group(parent: h5py.Group, path: str) -> h5py.Group | None:
    """The group at a relative path, or None; refuses links that leave the file."""
    import h5py

    member: Any = parent
    for name in path.split("/"):
        if not isinstance(member, h5py.Group):
            return None
        member = _member(member, name)
    return member if isinstance(member, h5py.Group) else None


def find_dataset(parent: h5py.Group, path: str) -> h5py.Dataset | None:
    """The dataset at a relative path, checked as above, or None where there is none or it has no room for a value."""
    import h5py

    head, _, last = path.rpartition("/")
    group = find_group(parent, head) if head else parent
    if group is None:
        return None
    member = _member(group, last)
    if not isinstance(member, h5py.Dataset):
        return None
    check_dataset(member)
    return None if member.shape is None else member


def read_dataset(parent: h5py.Group, path: str) -> np.ndarray | None:
    """The whole dataset in memory, or None where there is none; DataError when its bytes cannot be read."""
    dataset = find_dataset(parent, path)
    if dataset is None:
        return None
    try:
        return np.asarray(dataset[()])
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(f"dataset '{dataset.name}' cannot be read: {_first_line(error)}") from error


def check_dataset(dataset: h5py.Dataset) -> None:
    """Refuse, by name, storage outside the file, plugin filters and impossible sizes."""
    import h5py

    # The list of properties is fetched once: h5py's own `external` and `is_virtual` fetch it again each.
    properties = dataset.id.get_create_plist()
    if properties.get_external_count():
        raise DataError(f"dataset '{dataset.name}' keeps its bytes in another file; refused")
    if properties.get_layout() == h5py.h5d.VIRTUAL:
        raise DataError(f"dataset '{dataset.name}' is virtual, a view of other files; refused")
    filters = properties.get_nfilters()
    for index in range(filters):
        code = properties.get_filter(index)[0]
        if code not in BUILT_IN_FILTERS:
            raise DataError(f"dataset '{dataset.name}' needs HDF5 filter plugin {code}; refused")
    shape = dataset.shape
    declared = math.prod(shape) * dataset.dtype.itemsize if shape else 0
    stored = dataset.id.get_storage_size()
    compressed = filters > 0
    if declared > stored * (MOST_INFLATION if compressed else 1) and declared > 2**20:
        raise DataError(
            f"dataset '{dataset.name}' declares {declared:,} bytes but {stored:,} are stored; refused"
        )


def _member(group: h5py.Group, name: str) -> Any:
    """What a group holds under a name, None where it holds nothing that can be reached; refuses links that leave."""
    import h5py
    from h5py import h5l, h5o  # pyright: ignore[reportAttributeAccessIssue]

    key, links = name.encode("utf-8", "surrogateescape"), group.id.links
    try:
        # What h5py does for a name is mostly to find out, three times over, that it is a plain one.
        plain = "/" not in name and links.exists(key) and links.get_info(key).type == h5l.TYPE_HARD
        if not plain and name not in group:
            return None
        link = None if plain else group.get(name, getlink=True)
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        raise DataError(f"'{group.name}/{name}' cannot be opened: {_first_line(error)}") from error
    if isinstance(link, h5py.ExternalLink):
        raise DataError(f"'{group.name}/{name}' is a link into another file ({link.filename}); refused")
    if isinstance(link, h5py.SoftLink):
        raise DataError(f"'{group.name}/{name}' is a soft link to '{link.path}'; refused")
    try:
        opened = h5o.open(group.id, key)
    except (KeyError, OSError, RuntimeError) as error:
        raise DataError(f"'{group.name}/{name}' cannot be opened: {_first_line(error)}") from error
    if isinstance(opened, h5py.h5d.DatasetID):
        return h5py.Dataset(opened, readonly=True)
    return h5py.Group(opened) if isinstance(opened, h5py.h5g.GroupID) else opened


def _first_line(error: Exception) -> str:
    return str(error).strip().strip("'\"").splitlines()[0] if str(error).strip() else type(error).__name__
