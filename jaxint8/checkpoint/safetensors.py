"""Reads safetensors: single files, and shards under an index.

A file is a little-endian u64, a JSON header of that length, and the bytes of the tensors. The
surprising fact is how much of a hostile or broken header plain JSON lets through (twice the same
name, booleans as numbers, NaN), so everything is checked before the first tensor byte is read.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxint8.checkpoint.base import (
    CheckpointError,
    Entry,
    PositionedFile,
    TensorFile,
    TensorReader,
    check_spans,
    row_span,
)

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
HEADER_MAX = 100_000_000  # bytes; the limit of the format's own implementation
INDEX_NAME = "model.safetensors.index.json"
_Entry = Entry[np.dtype[Any]]


class SafetensorsFile(TensorFile[np.dtype[Any]]):
    """One safetensors file; implements `TensorReader`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.metadata, self._entries = _read_header(self._file)

    def dtype(self, name: str) -> np.dtype[Any]:
        """See `TensorReader`."""
        return self._entry(name).kind

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """See `TensorReader`."""
        entry = self._entry(name)
        where = f"tensor {name!r}"
        first, row, shape = row_span(entry.shape, rows, f"{self.path}: {where}")
        size = entry.kind.itemsize
        data = self._file.read(entry.offset + first * row * size, math.prod(shape) * size, where)
        return data.view(entry.kind).reshape(shape)


class ShardedCheckpoint:
    """Tensors spread over several files; implements `TensorReader`.

    Args:
      path: the directory or index file, for messages.
      files: name of tensor -> the reader that holds it.
      metadata: see `TensorReader`.
    """

    def __init__(
        self, path: Path, files: Mapping[str, TensorReader], metadata: Mapping[str, Any]
    ) -> None:
        self.path = path
        self.metadata = metadata
        self._files = dict(files)
        self.files = list(dict.fromkeys(p for reader in files.values() for p in reader.files))

    def names(self) -> list[str]:
        """See `TensorReader`."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorReader`."""
        return self._reader(name).shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        """See `TensorReader`."""
        return self._reader(name).dtype(name)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """See `TensorReader`."""
        return self._reader(name).read(name, rows)

    def close(self) -> None:
        """See `TensorReader`."""
        for reader in self._files.values():
            reader.close()

    def _reader(self, name: str) -> TensorReader:
        try:
            return self._files[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: has no tensor {name!r}") from None


def open_index(path: str | os.PathLike[str]) -> ShardedCheckpoint:
    """Opens the shards that a ``*.safetensors.index.json`` names.

    Raises:
      CheckpointError: the index is not one, a shard is missing, or a shard lacks a tensor that
        the index puts there.
    """
    path = Path(path)
    try:
        index = _parse_json(path, path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror})") from None
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(
            f"{path}: expected an object 'weight_map' of tensor name to file name"
        )
    shards: dict[str, SafetensorsFile] = {}
    for file in dict.fromkeys(weight_map.values()):
        if file != Path(file).name:
            raise CheckpointError(f"{path}: shard {file!r} is not a plain file name")
        if not (path.parent / file).is_file():
            count = sum(value == file for value in weight_map.values())
            raise CheckpointError(
                f"{path}: shard {file!r} ({count} tensors) is missing from {path.parent}"
            )
        shards[file] = SafetensorsFile(path.parent / file)
    held = {file: set(shard.names()) for file, shard in shards.items()}
    for name, file in weight_map.items():
        if name not in held[file]:
            raise CheckpointError(
                f"{path}: tensor {name!r} should be in {file!r}, which does not hold it"
            )
    metadata = index.get("metadata") or {}
    files: dict[str, TensorReader] = {name: shards[file] for name, file in weight_map.items()}
    return ShardedCheckpoint(path, files, metadata)


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise CheckpointError(f"{path}: the header holds {twice!r} twice")
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: the header is not JSON: {data[:40]!r}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_header(file: PositionedFile) -> tuple[dict[str, str], dict[str, _Entry]]:
    path = file.path
    if file.size < 8:
        raise CheckpointError(
            f"{path}: not a safetensors file ({file.size} bytes, the header alone takes 8)"
        )
    (length,) = struct.unpack("<Q", file.read(0, 8, "header length").tobytes())
    if length > HEADER_MAX or 8 + length > file.size:
        raise CheckpointError(
            f"{path}: the header claims {length} bytes, the file has {file.size}: "
            "truncated, or not safetensors"
        )
    header = _parse_json(path, file.read(8, length, "header").tobytes())
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: expected '__metadata__' to map strings to strings")
    start = 8 + length
    entries = {
        name: _check_entry(path, name, value, start, file.size) for name, value in header.items()
    }
    check_spans(path, entries)
    used = sum(entry.nbytes for entry in entries.values())
    if used != file.size - start:
        raise CheckpointError(f"{path}: the tensors cover {used} of {file.size - start} data bytes")
    return metadata, entries


def _check_entry(path: Path, name: str, value: Any, start: int, size: int) -> _Entry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{where}: expected an object of dtype, shape and data_offsets, got {value!r}"
        )
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where}: unknown dtype {value['dtype']!r}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _is_sizes(shape):
        raise CheckpointError(f"{where}: expected a shape of non-negative integers, got {shape!r}")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: expected two non-negative data_offsets, got {offsets!r}")
    low, high = offsets
    if not low <= high <= size - start:
        raise CheckpointError(
            f"{where}: data_offsets {offsets} do not fit the {size - start} data bytes: "
            "truncated, or a false header"
        )
    expected = math.prod(shape) * dtype.itemsize
    if high - low != expected:
        raise CheckpointError(
            f"{where}: {value['dtype']}{shape} takes {expected} bytes, "
            f"data_offsets {offsets} hold {high - low}"
        )
    return Entry(dtype, tuple(shape), start + low, high - low)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
