"""Reads GGUF: the header by our own parser, the quantised blocks by the `gguf` package.

The surprising fact: the package's GGUFReader keeps two NumPy arrays for every string of the
vocabulary (160 MB and three seconds for a 135M model), and trusts every length in the file. Parsing
the header is a hundred lines, checks each length against the file, and takes tens of milliseconds.
Reference: the GGUF specification, versions 2 and 3.
"""

import math
import mmap
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from jaxint8.checkpoint.base import (
    CheckpointError,
    Entry,
    TensorFile,
    TensorReader,
    check_spans,
    row_span,
)

PLAIN: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
    GGMLQuantizationType.F64: np.dtype("<f8"),
    GGMLQuantizationType.I8: np.dtype("i1"),
    GGMLQuantizationType.I16: np.dtype("<i2"),
    GGMLQuantizationType.I32: np.dtype("<i4"),
    GGMLQuantizationType.I64: np.dtype("<i8"),
}
# GGUF value types 0..12 without 8 (string) and 9 (array).
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_DIMS_MAX = 4
# Elements dequantised at a time: the package makes several float32 temporaries of this size.
_BLOCK = 1 << 20
_Entry = Entry[GGMLQuantizationType]


class GGUFFile(TensorFile[GGMLQuantizationType]):
    """One GGUF file; implements `TensorReader`. Quantised tensors are read as float32."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.metadata, self._entries = _read_header(self.path, self._file.size)

    def dtype(self, name: str) -> np.dtype[Any]:
        """See `TensorReader`."""
        return PLAIN.get(self._entry(name).kind, np.dtype(np.float32))

    def kind(self, name: str) -> str:
        """Returns the GGML type of a tensor, such as "Q4_1"."""
        return self._entry(name).kind.name

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """See `TensorReader`."""
        entry = self._entry(name)
        where = f"tensor {name!r}"
        first, row, shape = row_span(entry.shape, rows, f"{self.path}: {where}")
        block, size = GGML_QUANT_SIZES[entry.kind]
        if row % block:  # a one-dimensional quantised tensor: its rows are no whole blocks
            return self.read(name)[rows]
        row_bytes = row // block * size
        count = shape[0] if shape else 1
        if entry.kind in PLAIN:
            data = self._file.read(entry.offset + first * row_bytes, count * row_bytes, where)
            return data.view(PLAIN[entry.kind]).reshape(shape)
        out = np.empty((count, row), np.float32)
        step = max(1, _BLOCK // max(1, row))
        for start in range(0, count, step):
            stop = min(count, start + step)
            offset = entry.offset + (first + start) * row_bytes
            data = self._file.read(offset, (stop - start) * row_bytes, where).reshape(
                stop - start, row_bytes
            )
            try:
                out[start:stop] = dequantize(data, entry.kind)
            except NotImplementedError:
                raise CheckpointError(
                    f"{self.path}: {where}: type {entry.kind.name} cannot be dequantised"
                ) from None
        return out.reshape(shape)


def shard_paths(path: Path, metadata: Mapping[str, Any]) -> list[Path]:
    """Returns the files of a split model, of which ``path`` is one; ``path`` if it is not split."""
    count = metadata.get("split.count", 1)
    if type(count) is not int:
        raise CheckpointError(f"{path}: split.count: expected an integer, got {count!r}")
    if count <= 1:
        return [path]
    match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    if not match or int(match[2]) != count:
        raise CheckpointError(
            f"{path}: is part of a model split in {count}, but its name ends not in -N-of-M.gguf"
        )
    paths = [path.with_name(f"{match[1]}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    for part in paths:
        if not part.is_file():
            raise CheckpointError(
                f"{part}: is missing; {path.name} is one of {count} files of the model"
            )
    return paths


def merge(path: Path, readers: list[GGUFFile]) -> tuple[dict[str, TensorReader], Mapping[str, Any]]:
    """Returns name -> reader over the files of a split model, and the metadata of the first."""
    files: dict[str, TensorReader] = {}
    for reader in readers:
        for name in reader.names():
            if name in files:
                raise CheckpointError(f"{path}: tensor {name!r} is in two files of the split model")
            files[name] = reader
    return files, readers[0].metadata


class _Cursor:
    """Reads the header from front to back; every length is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, count: int, what: str) -> int:
        """Moves past ``count`` bytes and returns where they start."""
        start = self.at
        if count > len(self.data) - start:
            raise CheckpointError(
                f"{self.path}: {what} at byte {start} claims {count} bytes, "
                f"{len(self.data) - start} are left: truncated, or a false header"
            )
        self.at += count
        return start

    def number(self, code: str, what: str) -> int:
        (value,) = struct.unpack_from("<" + code, self.data, self.take(struct.calcsize(code), what))
        return value

    def string(self, what: str) -> str:
        count = self.number("Q", what)
        start = self.take(count, what)
        try:
            return str(self.data[start : start + count], "utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8") from None

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind in _SCALARS:
            return self.array(kind, 1, what)[0]
        if kind != _ARRAY:
            raise CheckpointError(f"{self.path}: {what} has the unknown value type {kind}")
        item, count = self.number("I", what), self.number("Q", what)
        if item == _STRING:
            if (
                count > (len(self.data) - self.at) // 8
            ):  # each string takes at least its length field
                self.take(count * 8, what)
            return [self.string(what) for _ in range(count)]
        if item not in _SCALARS:
            raise CheckpointError(
                f"{self.path}: {what} is an array of the unknown value type {item}"
            )
        return self.array(item, count, what)

    def array(self, kind: int, count: int, what: str) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        start = self.take(count * dtype.itemsize, what)
        return np.frombuffer(self.data[start : self.at], dtype).tolist()


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], dict[str, _Entry]]:
    if size < 24:
        raise CheckpointError(f"{path}: not a GGUF file ({size} bytes, the header alone takes 24)")
    # Mapped only while the header is parsed: its pages are given back before any tensor is read.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _parse(_Cursor(path, data))


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, _Entry]]:
    path = cursor.path
    if cursor.data[:4] != b"GGUF":
        raise CheckpointError(f"{path}: not a GGUF file (it starts with {cursor.data[:4]!r})")
    cursor.at = 4
    version = cursor.number("I", "version")
    if version not in (2, 3):
        raise CheckpointError(
            f"{path}: GGUF version {version} is not supported (2 and 3 little-endian are)"
        )
    tensor_count, value_count = (
        cursor.number("Q", "tensor count"),
        cursor.number("Q", "metadata count"),
    )
    metadata: dict[str, Any] = {}
    for i in range(value_count):
        key = cursor.string(f"metadata key {i} of {value_count}")
        if key in metadata:
            raise CheckpointError(f"{path}: the header holds {key!r} twice")
        metadata[key] = cursor.value(cursor.number("I", key), f"metadata {key!r}")
    infos = [_tensor_info(cursor, i, tensor_count) for i in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise CheckpointError(
            f"{path}: general.alignment: expected a power of two, got {alignment!r}"
        )
    start = -(-cursor.at // alignment) * alignment
    entries: dict[str, _Entry] = {}
    for name, kind, shape, offset in infos:
        if name in entries:
            raise CheckpointError(f"{path}: the header holds tensor {name!r} twice")
        entries[name] = _check_entry(path, name, kind, shape, start + offset, len(cursor.data))
    check_spans(path, entries)
    return metadata, entries


def _tensor_info(cursor: _Cursor, i: int, count: int) -> tuple[str, int, tuple[int, ...], int]:
    name = cursor.string(f"name of tensor {i} of {count}")
    what = f"tensor {name!r}"
    axes = cursor.number("I", what)
    if axes > _DIMS_MAX:
        raise CheckpointError(
            f"{cursor.path}: {what} claims {axes} axes, the format has at most {_DIMS_MAX}"
        )
    shape = tuple(cursor.number("Q", what) for _ in range(axes))[
        ::-1
    ]  # the file counts the fastest axis first
    return name, cursor.number("I", what), shape, cursor.number("Q", what)


def _check_entry(
    path: Path, name: str, kind: int, shape: tuple[int, ...], offset: int, size: int
) -> _Entry:
    where = f"{path}: tensor {name!r}"
    try:
        ggml = GGMLQuantizationType(kind)
    except ValueError:
        raise CheckpointError(f"{where}: unknown type {kind}") from None
    block, block_bytes = GGML_QUANT_SIZES[ggml]
    if (shape[-1] if shape else 1) % block:
        raise CheckpointError(
            f"{where}: rows of {shape[-1:]} are not whole {ggml.name} blocks of {block}"
        )
    nbytes = math.prod(shape) // block * block_bytes
    if offset + nbytes > size:
        raise CheckpointError(
            f"{where}: {ggml.name}{list(shape)} takes bytes {offset} to {offset + nbytes}, "
            f"the file has {size}: truncated, or a false header"
        )
    return Entry(ggml, shape, offset, nbytes)
