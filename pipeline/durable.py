"""Files that are whole or absent: temporary name, fsync, rename, fsync of the folder.

Every byte dpipe keeps goes through `write_file` or `commit`, so that fault injection has one place to stand:
`POINT` is called before each step that a power cut could separate from the next.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..schemas.errors import DataError

TEMPORARY = ".tmp"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _no_fault(name: str) -> None:
    pass


POINT: Callable[[str], None] = _no_fault  # tests put an exit here


def commit(temporary: Path, final: Path) -> None:
    """Make a finished temporary file durable under its final name, replacing what stood there."""
    POINT(f"fsync {final.name}")
    sync_path(temporary)
    POINT(f"rename {final.name}")
    temporary.replace(final)
    sync_folder(final.parent)


def write_file(path: Path, data: bytes) -> None:
    """Write bytes so that the file is either the old one or the new one, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    temporary.write_bytes(data)
    commit(temporary, path)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """JSON with sorted keys left as given: callers order them for the reader."""
    write_file(path, (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode())


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no reader globs; one per process, so that two writers cannot meet."""
    return path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")


def sync_folder(folder: Path) -> None:
    sync_path(folder)


def sync_path(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_file(source: Path, target: Path) -> None:
    """Rename a durable file to another place on the same file system, durably."""
    target.parent.mkdir(parents=True, exist_ok=True)
    POINT(f"rename {target.name}")
    source.replace(target)
    sync_folder(target.parent)


def hard_link(source: Path, target: Path) -> bool:
    """Give a file (what a symbolic link leads to) a second name; False on another disk, or on one without links."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        return False
    return True


def remove_temporaries(folder: Path) -> None:
    """Delete what killed writers left below a folder: only names that `temporary_name` makes."""
    for path in folder.rglob(f".*{TEMPORARY}"):
        if path.is_file():
            path.unlink(missing_ok=True)


@contextmanager
def full_disk_as_message(folder: Path) -> Iterator[None]:
    """A disk that fills up while we write is one message; what is durable stays, and the same command goes on."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DataError(full_disk(folder)) from error


def full_disk(folder: Path) -> str:
    return (
        f"the disk of {folder} is full\n"
        "  What is finished is kept: free some space, then run the same command again."
    )


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse work that cannot fit the disk, before it starts, with the numbers."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DataError(
            f"{what} needs about {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free at {existing}\n"
            f"  next: free some space, choose another disk with --workspace, or convert less with --where or --limit"
        )


@contextmanager
def exclusive(
    folder: Path, what: str, stale_s: float = 60.0, share: tuple[int, int] | None = None
) -> Iterator[None]:
    """Hold a dataset for one run; a second run on it says so and stops.

    Jobs (i, n) of one division exclude their own twins and every run of the whole, not one another.

    A lock file made by O_EXCL works where network file systems know no locks. It carries host and process and is
    refreshed while held: one whose process is gone (same host) or that has not moved for `stale_s` (another
    host) is taken over.
    """
    import threading

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("running.lock" if share is None else f"running-{share[0]}-of-{share[1]}.lock")
    for other in [folder / "running.lock"] if share else sorted(folder.glob("running-*.lock")):
        owner = _lock_owner(other)
        if owner is not None and not _is_abandoned(other, owner, stale_s):
            raise _held(folder, other, owner)
        other.unlink(missing_ok=True)
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "what": what}
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            break
        except FileExistsError:
            owner = _lock_owner(path)
            if owner is None or not _is_abandoned(path, owner, stale_s):
                if owner is None and not path.exists():
                    continue  # released between our two looks
                raise _held(folder, path, owner or {}) from None
            _take_away(path, owner)
    with os.fdopen(descriptor, "w") as file:
        json.dump(mine, file)
    released = threading.Event()

    def refresh() -> None:
        while not released.wait(stale_s / 6):
            try:
                os.utime(path)
            except OSError:
                return

    threading.Thread(target=refresh, daemon=True).start()
    try:
        yield
    finally:
        released.set()
        path.unlink(missing_ok=True)


def _held(folder: Path, path: Path, owner: dict[str, Any]) -> DataError:
    return DataError(
        f"another run is working on {folder.parent}\n"
        f"  found: {owner.get('what', '?')} by process {owner.get('pid', '?')} on {owner.get('host', '?')}\n"
        f"  next: wait for it; if it is gone for good, delete {path}"
    )


def _lock_owner(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _is_abandoned(path: Path, owner: dict[str, Any], stale_s: float) -> bool:
    if owner.get("host") == socket.gethostname():
        try:
            os.kill(int(owner.get("pid", 0)), 0)
        except ProcessLookupError:
            return True
        except (PermissionError, ValueError):
            return False
        return False
    try:
        held = path.stat().st_mtime
        age = _now(path.parent) - held
        if age >= -stale_s:
            return age > stale_s
        # A lock from the future: the clock was set back. A living owner refreshes it soon.
        time.sleep(stale_s / 5)
        return path.stat().st_mtime == held
    except OSError:
        return False


def _now(folder: Path) -> float:
    """The time as the folder's own file server has it: clocks of two hosts may differ by more than a lock's age."""
    probe = folder / f".now.{socket.gethostname()}.{os.getpid()}{TEMPORARY}"
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink(missing_ok=True)
    return now


def _take_away(path: Path, owner: dict[str, Any]) -> None:
    """Remove an abandoned lock, unless another run was faster and this is already its own."""
    taken = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        path.rename(taken)
    except FileNotFoundError:
        return
    if _lock_owner(taken) != owner and not path.exists():
        taken.rename(path)
        return
    taken.unlink(missing_ok=True)
