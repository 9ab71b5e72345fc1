"""Shards read over the network: pieces of files kept in a local folder of limited size.

    stream = open_stream("https://host/shards/jpeg256-q90", spec, cache=Cache(Path("/scratch/shards"), 50e9))

Any URL: http and https by the standard library, everything else (s3://, gs://, ...) through fsspec. The index is
fetched whole and checked against its digest. Of the parts only pieces of `piece` bytes are fetched, those that
samples lie in; every frame and every column chunk is checked against the index each time it is read from here,
so that what the network or the disk spoiled is fetched once more and then refused, never handed over.

The folder may be shared by loader workers and by runs: pieces appear under their names whole. Beyond `limit`
bytes the pieces not used for longest are deleted (several processes may exceed it by a piece each); one that
somebody is reading stays readable to them.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..schemas.errors import DataError
from .health import Health

TOUCH_EVERY_S = 60.0  # how exactly "not used for longest" is known
CONNECTIONS = 8
PAUSES_S = (0.1, 0.4, 1.6, 5.0)  # between attempts


@dataclass(frozen=True)
class Cache:
    """Where pieces are kept and how patient to be. A stalled connection is given up after `timeout_s`."""

    folder: Path
    limit: float = 20e9
    piece: int = 4 * 2**20
    timeout_s: float = 20.0
    attempts: int = 5


def is_url(place: object) -> bool:
    return isinstance(place, str) and "://" in place


class RemoteFolder:
    """Files below one URL. It pickles; threads may share it."""

    def __init__(self, url: str, cache: Cache):
        self.url, self.cache = url.rstrip("/"), cache
        self.folder = cache.folder / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.health = Health()
        self._lock, self._room = threading.Lock(), threading.Lock()
        self._busy: dict[str, threading.Lock] = {}
        self._touched: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "cache": self.cache}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state)

    def whole(self, name: str, digest: str | None = None) -> Path:
        """A small file as a local one; checked where its xxh3-128 digest is known, fetched anew where it is not."""
        path = self.folder / name
        if digest is not None and path.is_file() and _digest(path.read_bytes()) == digest:
            return path
        data = self._fetch(name, 0, None)
        if digest is not None and _digest(data) != digest:
            raise DataError(
                f"{self.url}/{name} is not the file its index describes\n"
                f"  expected: digest {digest}; found: {_digest(data)}, {len(data)} bytes\n"
                "  Upload the shards again, index.json last."
            )
        _write(path, data)
        return path

    def read(self, name: str, start: int, stop: int, size: int) -> bytes:
        """Bytes [start, stop) of a file of `size` bytes."""
        piece = self.cache.piece
        parts = []
        for number in range(start // piece, -(-stop // piece)):
            begin, end = max(0, start - number * piece), min(piece, stop - number * piece)
            parts.append(self._read_piece(name, number, size, begin, end))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def prepare(self, spans: Iterable[tuple[str, int, int, int]]) -> None:
        """Fetch the pieces of (name, start, stop, size) that are missing, several at a time."""
        piece = self.cache.piece
        wanted = {
            (name, number, size)
            for name, start, stop, size in spans
            for number in range(start // piece, -(-stop // piece))
        }
        missing = sorted(each for each in wanted if not self._path(each[0], each[1]).is_file())
        if len(missing) > 1:
            with ThreadPoolExecutor(min(CONNECTIONS, len(missing))) as pool:
                list(pool.map(lambda each: self._have(*each), missing))

    def forget(self, name: str, start: int, stop: int) -> None:
        """Delete the pieces a span lies in: what they hold is not what it should be."""
        for number in range(start // self.cache.piece, -(-stop // self.cache.piece)):
            self._path(name, number).unlink(missing_ok=True)

    def _path(self, name: str, number: int) -> Path:
        return self.folder / f"{name}.{number:06d}.piece"

    def _read_piece(self, name: str, number: int, size: int, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of one piece, fetched first where it is missing."""
        path = self._path(name, number)
        while True:
            self.health.count(**{"cache_misses" if self._have(name, number, size) else "cache_hits": 1})
            try:
                file = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue  # deleted by another process since
            try:
                return os.pread(file, end - begin, begin)
            finally:
                os.close(file)

    def _have(self, name: str, number: int, size: int) -> bool:
        """See to it that a piece is there; whether it had to be fetched."""
        path = self._path(name, number)
        start = number * self.cache.piece
        expected = min(self.cache.piece, size - start)
        if self._is_kept(path, expected):
            return False
        with self._lock:
            busy = self._busy.setdefault(path.name, threading.Lock())
        with busy:
            if self._is_kept(path, expected):  # another thread was faster
                return False
            data = self._fetch(name, start, start + expected)
            with self._room:  # else threads would each find room for themselves alone
                self._make_room(len(data))
                _write(path, data)
        with self._lock:
            self._busy.pop(path.name, None)
        return True

    def _is_kept(self, path: Path, expected: int) -> bool:
        try:
            if path.stat().st_size != expected:
                return False
            now = time.monotonic()
            if now - self._touched.get(path.name, -TOUCH_EVERY_S) >= TOUCH_EVERY_S:
                self._touched[path.name] = now
                os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _make_room(self, needed: int) -> None:
        """Delete the pieces used longest ago until `needed` bytes fit. Looked up on disk: others write here too."""
        found = []
        for path in self.cache.folder.glob("*/*.piece"):
            try:
                told = path.stat()
            except FileNotFoundError:
                continue
            found.append((told.st_mtime_ns, told.st_size, path))
        total = needed + sum(size for _, size, _ in found)
        for _, size, path in sorted(found, key=lambda each: each[0]):
            if total <= self.cache.limit:
                return
            path.unlink(missing_ok=True)
            total -= size

    # --- the network -----------------------------------------------------------------------------------

    def _fetch(self, name: str, start: int, stop: int | None) -> bytes:
        """Bytes [start, stop) of a file (stop None: all of it), going on after a connection that broke off."""
        url, data, trouble = f"{self.url}/{name}", b"", ""
        for attempt in range(self.cache.attempts):
            if attempt:
                time.sleep(PAUSES_S[min(attempt, len(PAUSES_S)) - 1])
            try:
                data += self._get(url, start + len(data), stop)
            except _Broken as broken:
                data += broken.got
                trouble = broken.why
                continue
            if stop is None or len(data) == stop - start:
                return data
            trouble = f"{len(data)} bytes instead of {stop - start}"
        raise DataError(
            f"{url} could not be fetched in {self.cache.attempts} attempts\n  found: {trouble}\n"
            "  Check the connection and the server; what was fetched before is kept."
        )

    def _get(self, url: str, start: int, stop: int | None) -> bytes:
        if not url.startswith(("http://", "https://")):
            return self._get_by_fsspec(url, start, stop)
        request = urllib.request.Request(url)
        ranged = stop is not None or start > 0
        if ranged:
            request.add_header("Range", f"bytes={start}-{'' if stop is None else stop - 1}")
        try:
            with urllib.request.urlopen(request, timeout=self.cache.timeout_s) as answer:
                if ranged and answer.status != 206:
                    raise DataError(
                        f"{url}: the server sends whole files only (status {answer.status})\n"
                        "  expected: byte ranges, as any static file server or object store gives them"
                    )
                return _read_all(answer)
        except urllib.error.HTTPError as error:
            if 400 <= error.code < 500 and error.code not in (408, 429):
                raise DataError(
                    f"{url} is not there: the server answers {error.code} {error.reason}"
                ) from error
            raise _Broken(f"the server answers {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException) as error:  # timeouts and refused connections among them
            raise _Broken(f"{type(error).__name__}: {error}") from error

    def _get_by_fsspec(self, url: str, start: int, stop: int | None) -> bytes:
        import fsspec

        files, path = fsspec.core.url_to_fs(url)
        try:
            return files.cat_file(path, start=start, end=stop)
        except FileNotFoundError as error:
            raise DataError(f"{url} is not there") from error
        except OSError as error:
            raise _Broken(f"{type(error).__name__}: {error}") from error


class _Broken(Exception):
    """A transfer that did not come to its end; `got` is what arrived."""

    def __init__(self, why: str, got: bytes = b""):
        super().__init__(why)
        self.why, self.got = why, got


def _read_all(answer: Any) -> bytes:
    """The whole body; a _Broken carries what came before it broke off."""
    parts: list[bytes] = []
    try:
        while block := answer.read1(2**18):
            parts.append(block)
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(f"{type(error).__name__}: {error}", b"".join(parts)) from error
    data = b"".join(parts)
    expected = answer.headers.get("Content-Length")
    if expected is not None and len(data) < int(expected):
        raise _Broken(f"the connection closed after {len(data)} of {expected} bytes", data)
    return data


def _digest(data: bytes) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(data)


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all. Not synced: what a power cut spoils is found by its checksum and fetched again."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
