"""NumPy files from strangers: plain arrays, and the pickled dictionaries that CALVIN's index files are.

Nothing a pickle names is ever called. It may name the few things that NumPy arrays and scalars are made of,
and each is replaced by a stand-in that checks what it is given and builds the array itself; any other name is
refused with the name in the message.

Source  numpy/lib/format.py (npy 1.0 to 3.0); numpy ndarray.__reduce__ and dtype.__reduce__; Python pickle
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from functools import lru_cache
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import DataError

_HEADER_MAX = 1 << 16
_DTYPE_KINDS = "biufSUO"  # what index files hold; datetimes and records have no place in one


def load_array(data: bytes, name: str) -> NDArray[Any]:
    """A plain npy file; DataError for anything else, pickles included."""
    dtype, shape, fortran, start = _header(data, name)
    if dtype.hasobject:
        raise DataError(f"{name}: expected a plain array, found pickled objects; refused")
    count = math.prod(shape)
    if len(data) - start != count * dtype.itemsize:
        raise DataError(
            f"{name}: header declares {shape} of {dtype}, {count * dtype.itemsize:,} bytes; "
            f"{len(data) - start:,} follow"
        )
    return np.frombuffer(data, dtype, count, start).reshape(shape, order="F" if fortran else "C")


def load_object(data: bytes, name: str) -> Any:
    """The one object pickled in a 0-d npy file: dictionaries, lists, strings, numbers and arrays of them."""
    dtype, shape, _, start = _header(data, name)
    if not dtype.hasobject or shape != ():
        raise DataError(f"{name}: expected one pickled object, found an array of {dtype} {shape}")
    array = load_pickle(data[start:], name)
    if not isinstance(array, np.ndarray) or array.shape != ():
        raise DataError(f"{name}: expected one pickled object, found {type(array).__name__}")
    return array.item()


def load_pickle(data: bytes, name: str) -> Any:
    """Unpickle containers, strings, numbers and NumPy arrays; DataError naming anything else it asks for."""
    try:
        _check_memo(data)
        value = _Restricted(io.BytesIO(data), encoding="latin1").load()
        return _built(value, {})
    except _RefusedError as error:
        raise DataError(
            f"{name}: the pickle asks for '{error}', which no index file needs; refused\n"
            "  next: do not open this file with numpy or pickle either; get it again from the publisher"
        ) from error
    except RecursionError as error:
        raise DataError(f"{name}: the pickle is nested without end; refused") from error
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        raise DataError(f"{name}: damaged pickle ({type(error).__name__}: {error})") from error


def _check_memo(data: bytes) -> None:
    """Places in the unpickler's memo are made up to the highest one named, 8 bytes each: four bytes claim 32 GB.

    Whatever is put there was read before, so no true place is beyond the bytes read.
    """
    for opcode, place, at in pickletools.genops(data):
        puts = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if puts and isinstance(place, int) and place > (at or 0):
            raise ValueError(f"place {place} of its memo after {at} bytes")


class _RefusedError(Exception):
    pass


class _Dtype:
    """Stands in for numpy.dtype while unpickling: only its name and byte order are believed."""

    def __init__(self, name: Any, *_: Any) -> None:
        dtype = np.dtype(name) if isinstance(name, str) else None
        if (
            dtype is None
            or dtype.kind not in _DTYPE_KINDS
            or dtype.names is not None
            or dtype.subdtype is not None
        ):
            raise ValueError(f"dtype {name!r}")
        self.value = dtype

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])


class _Array:
    """Stands in for an ndarray while unpickling; `build` checks sizes before anything is allocated."""

    def __init__(self) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def build(self, seen: dict[int, Any]) -> NDArray[Any]:
        _, shape, dtype, fortran, data = self.state
        order = "F" if fortran else "C"
        count = math.prod(shape)
        if dtype.value.kind == "O":
            if not isinstance(data, list) or len(data) != count:
                raise ValueError(f"object array {shape} of {len(data)} items")
            array = np.empty(count, object)
            for i, item in enumerate(data):
                array[i] = _built(item, seen)
            return array.reshape(shape, order=order)
        raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
        if len(raw) != count * dtype.value.itemsize:
            raise ValueError(f"array {shape} of {dtype.value} from {len(raw)} bytes")
        return np.frombuffer(raw, dtype.value).reshape(shape, order=order).copy()


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _from_buffer(buffer: Any, dtype: _Dtype, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.state = (1, shape, dtype, order == "F", bytes(buffer))
    return array


def _scalar(dtype: _Dtype, data: Any = b"") -> Any:
    raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
    if dtype.value.kind == "O" or len(raw) != dtype.value.itemsize:
        raise ValueError(f"scalar of {dtype.value} from {len(raw)} bytes")
    return np.frombuffer(raw, dtype.value)[0] if raw else dtype.value.type()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):  # the one codec with which protocol 2 writes bytes
        raise ValueError(f"codec {encoding}")
    return text.encode("latin1")


def _ndarray(*_: Any) -> None:
    raise ValueError("a bare numpy.ndarray")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _ndarray,  # passed to _reconstruct, never called
    ("_codecs", "encode"): _encode,
}
for _core in ("numpy.core", "numpy._core"):
    _STAND_INS[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _STAND_INS[f"{_core}.multiarray", "scalar"] = _scalar
    _STAND_INS[f"{_core}.numeric", "_frombuffer"] = _from_buffer


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise _RefusedError(f"{module}.{name}") from None


def _built(value: Any, seen: dict[int, Any]) -> Any:
    """The same containers with every stand-in replaced by its array, shared parts built once."""
    if isinstance(value, str | bytes | bool | int | float | np.generic) or value is None:
        return value
    if id(value) in seen:
        if seen[id(value)] is _UNFINISHED:
            raise ValueError("an object that contains itself")
        return seen[id(value)]
    seen[id(value)] = _UNFINISHED
    if isinstance(value, _Array):
        result: Any = value.build(seen)
    elif isinstance(value, dict):
        result = {_built(key, seen): _built(item, seen) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        result = type(value)(_built(item, seen) for item in value)
    else:
        raise _RefusedError(type(value).__name__)
    seen[id(value)] = result
    return result


_UNFINISHED = object()


def _header(data: bytes, name: str) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """(dtype, shape, Fortran order, offset of the data) of an npy file."""
    if data[:6] != b"\x93NUMPY" or len(data) < 12:
        raise DataError(f"{name}: no npy file ({len(data)} bytes)")
    wide = data[6] > 1
    length = int.from_bytes(data[8:12] if wide else data[8:10], "little")
    start = (12 if wide else 10) + length
    if start > min(len(data), _HEADER_MAX):
        raise DataError(f"{name}: the npy header is cut short")
    try:
        dtype, shape, fortran = _parse_header(data[:start])
    except (ValueError, SyntaxError, TokenError) as error:  # NumPy parses the header as Python source
        raise DataError(f"{name}: damaged npy header ({error})") from error
    return dtype, shape, fortran, start


@lru_cache(maxsize=256)
def _parse_header(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    # Frames repeat a handful of headers endlessly, and NumPy parses each as Python source.
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if any(side < 0 for side in shape):
        raise ValueError(f"shape {shape}")
    return dtype, shape, fortran
