"""Writes safetensors: one file or shards with an index, streaming and atomic.

The surprising fact is the order: larger elements come first in a file, because the format allows no
padding and a float32 tensor behind an odd number of int8 codes would otherwise lie unaligned for
every reader that maps it.
"""

import json
import math
import os
import re
import secrets
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxint8.checkpoint.base import TensorReader
from jaxint8.checkpoint.safetensors import DTYPES, INDEX_NAME

FILE_NAME = "model.safetensors"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ArrayLike(Protocol):
    """What the writer takes: a NumPy or JAX array, or a `LazyTensor`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        ...

    @property
    def dtype(self) -> Any:
        """The dtype."""
        ...


class LazyTensor:
    """A tensor of a reader that is read only when the writer comes to it."""

    def __init__(self, reader: TensorReader, name: str) -> None:
        self._reader, self._name = reader, name
        self.shape, self.dtype = reader.shape(name), reader.dtype(name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads the tensor."""
        array = self._reader.read(self._name)
        return array if dtype is None else array.astype(dtype, copy=False)


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, ArrayLike],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one safetensors file; one tensor at a time is turned into a host array.

    The file appears whole or not at all.

    Raises:
      TypeError: a tensor's dtype is not one of the format.
    """
    path = Path(path)
    temporary = _write_temporary(path.parent, tensors, metadata)
    temporary.replace(path)


def write_checkpoint(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, ArrayLike],
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Writes ``model.safetensors``, or shards of at most ``shard_bytes`` and an index.

    A tensor larger than that has a shard of its own. Every file is complete before the first is
    renamed into place; the index comes last. Weights that an earlier save left in the directory
    under these names are removed, so that it never holds two models.

    Returns:
      The paths written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    groups = _group(tensors, shard_bytes)
    if len(groups) == 1:
        names = [FILE_NAME]
    else:
        names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    temporary: list[Path] = []
    try:
        for group in groups:
            part = {name: tensors[name] for name in group}
            temporary.append(_write_temporary(directory, part, metadata))
        if len(groups) > 1:
            total = sum(_nbytes(tensor) for tensor in tensors.values())
            weight_map = {
                name: file for group, file in zip(groups, names, strict=True) for name in group
            }
            index = {
                "metadata": {**(metadata or {}), "total_size": total},
                "weight_map": weight_map,
            }
            temporary.append(_temporary_file(directory, [json.dumps(index, indent=2).encode()]))
            names.append(INDEX_NAME)
        for old in directory.iterdir():
            if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", old.name):
                old.unlink()
        for source, name in zip(temporary, names, strict=True):
            source.replace(directory / name)
    finally:
        for source in temporary:
            source.unlink(missing_ok=True)
    return [directory / name for name in names]


def _group(tensors: Mapping[str, ArrayLike], shard_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    room = shard_bytes
    for name, tensor in tensors.items():
        size = _nbytes(tensor)
        if size > room and groups[-1]:
            groups.append([])
            room = shard_bytes
        groups[-1].append(name)
        room -= size
    return groups


def _nbytes(tensor: ArrayLike) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def _write_temporary(
    directory: Path, tensors: Mapping[str, ArrayLike], metadata: Mapping[str, str] | None
) -> Path:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    ordered = sorted(tensors.items(), key=lambda item: -np.dtype(item[1].dtype).itemsize)
    for name, tensor in ordered:
        kind = _NAMES.get(np.dtype(tensor.dtype))
        if kind is None:
            raise TypeError(f"tensor {name!r}: safetensors has no dtype {tensor.dtype}")
        end = offset + _nbytes(tensor)
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (
        -len(text) % 8
    )  # the first tensor starts on a multiple of 8, as the format asks

    def chunks() -> Iterable[Any]:
        yield struct.pack("<Q", len(text)) + text
        for _, tensor in ordered:
            array = np.ascontiguousarray(
                tensor
            )  # a tensor of the device comes to the host here, and goes again
            yield memoryview(array.reshape(-1).view(np.uint8))

    return _temporary_file(directory, chunks())


def _temporary_file(directory: Path, chunks: Iterable[Any]) -> Path:
    """Writes ``chunks`` to a new file beside its later place; a failure leaves nothing behind."""
    path = directory / f".partial-{secrets.token_hex(8)}"
    try:
        with path.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path
