"""Writes safetensors: one file or shards with an index; streaming, atomic, checksummed, resumable.

A checkpoint is made in a folder ``.partial`` of its directory and moved when it is complete,
``config.json`` last; a process that is killed can go on after the last file that it finished. The
surprising fact is the order in a file: larger elements come first, because the format allows no
padding and a float32 tensor behind an odd number of int8 codes would otherwise lie unaligned for
every reader that maps it.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxint8.checkpoint.base import CheckpointError, TensorReader, naming
from jaxint8.checkpoint.safetensors import DTYPES, INDEX_NAME

FILE_NAME = "model.safetensors"
# Checksums of all files, as sha256sum writes and checks them.
CHECKSUMS = "SHA256SUMS"
SHARD_BYTES = 5_000_000_000
_STAGING = ".partial"
_PROGRESS = "progress.json"
_CONFIG = "config.json"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Put = Callable[[str, int, np.ndarray], None]
"""Writes rows of a tensor: its name, the first row, the rows. Any order, from any thread."""


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


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tensors that are made together, and so written to one file.

    Attributes:
      tensors: shape and dtype of each by name.
      fill: makes them; must put every row of each just once.
    """

    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
    fill: Callable[[Put], None]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors.values())


def whole(name: str, tensor: ArrayLike) -> Piece:
    """Returns the piece of one tensor, which becomes a host array when the writer comes to it."""
    return Piece(
        {name: (tuple(tensor.shape), np.dtype(tensor.dtype))},
        lambda put: put(name, 0, np.asarray(tensor)),
    )


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
    temporary = path.with_name(f".partial-{secrets.token_hex(8)}")
    try:
        _write_file(temporary, [whole(*item) for item in tensors.items()], metadata or {})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_checkpoint(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, ArrayLike] | Sequence[Piece],
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    *,
    others: Callable[[Path], None] = lambda folder: None,
    source: str | None = None,
    replace: bool = True,
    reused: Callable[[Piece], None] = lambda piece: None,
) -> list[Path]:
    """Writes ``model.safetensors``, or shards of at most ``shard_bytes`` and an index.

    A piece larger than that has a shard of its own. Everything is complete before the first file
    is moved into place, and ``config.json`` is moved last: whoever finds one finds its weights. The
    weights of an older model in the directory are removed, so that it never holds two.

    Args:
      directory: where; made if needed.
      tensors: what, in this order.
      metadata: strings for the header of every file.
      shard_bytes: size at which a file ends and the next begins.
      others: writes what else belongs to the checkpoint, such as config.json, into a folder.
      source: what the tensors are made from, in words that another source never has. With it, a
        later call with the same arguments takes over the files that an interrupted one finished,
        if their checksums are right; without, nothing of an unfinished call is left.
      replace: whether an older model may be replaced.
      reused: told of every piece that was taken over.

    Returns:
      The weight files and the index.

    Raises:
      CheckpointError: another process writes there, there is an older model (and not `replace`),
        or too little room.
      TypeError: a tensor's dtype is not one of the format.
    """
    directory = Path(directory)
    pieces = [whole(*x) for x in tensors.items()] if isinstance(tensors, Mapping) else tensors
    groups = _group(pieces, shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    shards = dict(zip(names if len(groups) > 1 else [FILE_NAME], groups, strict=True))
    header = dict(metadata or {})
    plan = "" if source is None else _plan(source, shards, header)
    existed = directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    with _only_writer(directory):
        sums = _finished(directory, plan)
        old = [p.name for p in directory.iterdir() if _WEIGHTS.fullmatch(p.name)]
        if old and not (replace or sums):
            raise CheckpointError(f"{directory}: there is a model already ({old[0]})")
        try:
            with naming(directory):
                _make(directory, shards, header, sums, plan, reused)
                _complete(directory, shards, header, others, sums, plan)
        except BaseException as error:
            if not plan or isinstance(error, ValueError):
                shutil.rmtree(directory / _STAGING, ignore_errors=True)
                if not existed:
                    with contextlib.suppress(OSError):  # not ours alone any more
                        directory.rmdir()
            raise
    return [directory / name for name in (*shards, *([INDEX_NAME] if len(shards) > 1 else []))]


def _make(
    directory: Path,
    shards: Mapping[str, Sequence[Piece]],
    metadata: Mapping[str, str],
    sums: dict[str, str],
    plan: str,
    reused: Callable[[Piece], None],
) -> None:
    """Writes the weight files that ``sums`` does not have into the staging folder, and adds them."""
    staging = directory / _STAGING
    staging.mkdir(exist_ok=True)
    for left in staging.iterdir():
        if left.name not in sums and left.name != _PROGRESS:
            left.unlink()
    needed = sum(piece.nbytes for file in shards if file not in sums for piece in shards[file])
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise CheckpointError(f"{directory}: {needed} bytes are needed, {free} are free")
    for file, group in shards.items():
        if file in sums:
            for piece in group:
                reused(piece)
            continue
        temporary = staging / f"{file}.tmp"
        _write_file(temporary, group, metadata)
        sums[file] = _sha256(temporary)
        temporary.replace(staging / file)
        _sync(staging)
        if plan:
            state = json.dumps({"plan": plan, "files": sums})
            _write_bytes(staging / _PROGRESS, state.encode())


def _complete(
    directory: Path,
    shards: Mapping[str, Sequence[Piece]],
    metadata: Mapping[str, str],
    others: Callable[[Path], None],
    sums: Mapping[str, str],
    plan: str,
) -> None:
    """Adds index, other files and checksums, and moves everything into place."""
    staging = directory / _STAGING
    if len(shards) > 1:
        total = sum(piece.nbytes for group in shards.values() for piece in group)
        index = {
            "metadata": {**metadata, "total_size": total},
            "weight_map": {n: f for f, group in shards.items() for p in group for n in p.tensors},
        }
        (staging / INDEX_NAME).write_text(json.dumps(index, indent=2))
    others(staging)
    made = sorted(p.name for p in staging.iterdir() if p.name not in (_PROGRESS, CHECKSUMS))
    sums = dict(sums) | {name: _sha256(staging / name) for name in made if name not in sums}
    lines = [f"{sums[name]}  {name}\n" for name in sorted(sums)]
    note = [f"# plan {plan}\n"] if plan else []
    (staging / CHECKSUMS).write_text("".join(note + lines))
    for path in staging.iterdir():
        _sync(path)
    if _CONFIG in made:  # from here on there is no old model any more, and not yet a new one
        (directory / _CONFIG).unlink(missing_ok=True)
    for path in directory.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path.name not in sums:
            path.unlink()
    for name in sorted([*made, CHECKSUMS], key=lambda name: (name == _CONFIG, name)):
        (staging / name).replace(directory / name)
    _sync(directory)
    shutil.rmtree(staging)


def _plan(source: str, shards: Mapping[str, Sequence[Piece]], metadata: Mapping[str, str]) -> str:
    """Names what is to be written and from what: equal plans make equal files."""
    layout = {
        file: {
            name: [str(dtype), *shape]
            for piece in group
            for name, (shape, dtype) in piece.tensors.items()
        }
        for file, group in shards.items()
    }
    return hashlib.sha256(json.dumps([source, layout, metadata]).encode()).hexdigest()


def _finished(directory: Path, plan: str) -> dict[str, str]:
    """Returns name and checksum of the weight files that a call with this plan finished before."""
    found: dict[str, str] = {}
    if plan:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads((directory / _STAGING / _PROGRESS).read_bytes())
            found = state["files"] if state["plan"] == plan else {}
        with contextlib.suppress(OSError):
            first, *lines = (directory / CHECKSUMS).read_text().splitlines() or [""]
            if not found and first == f"# plan {plan}":
                split = (line.split("  ", 1) for line in lines)
                found = {name: digest for digest, name in split if _WEIGHTS.fullmatch(name)}
                found.pop(INDEX_NAME, None)
    for name in list(found):
        staged = directory / _STAGING / name
        if staged.exists() and _sha256(staged) != found[name]:
            staged.unlink()
        kept = staged if staged.exists() else directory / name
        if not kept.exists() or (kept != staged and _sha256(kept) != found[name]):
            del found[name]
    return found


@contextlib.contextmanager
def _only_writer(directory: Path) -> Iterator[None]:
    """Holds a lock on the directory, which ends with the process however that ends."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{directory}: another process is writing there") from None
        yield
    finally:
        os.close(handle)


def _group(pieces: Iterable[Piece], shard_bytes: int) -> list[list[Piece]]:
    groups: list[list[Piece]] = [[]]
    room = shard_bytes
    for piece in pieces:
        if piece.nbytes > room and groups[-1]:
            groups.append([])
            room = shard_bytes
        groups[-1].append(piece)
        room -= piece.nbytes
    return groups


def _write_file(path: Path, pieces: Sequence[Piece], metadata: Mapping[str, str]) -> None:
    """Writes one safetensors file and waits until it is on the disk."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    tensors = {name: what for piece in pieces for name, what in piece.tensors.items()}
    offset = 0
    for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: -item[1][1].itemsize):
        kind = _NAMES.get(dtype)
        if kind is None:
            raise TypeError(f"tensor {name!r}: safetensors has no dtype {dtype}")
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the first tensor starts on a multiple of 8, as is asked
    start = 8 + len(text)
    missing = {name: math.prod(shape) for name, (shape, _) in tensors.items()}
    counting = threading.Lock()
    with naming(path), path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.flush()
        file.truncate(start + offset)

        def put(name: str, row: int, rows: np.ndarray) -> None:
            shape, dtype = tensors[name]
            if rows.dtype != dtype or rows.shape[1:] != shape[1:]:
                raise TypeError(f"tensor {name!r}: {rows.dtype}{rows.shape} is not {dtype}{shape}")
            place = start + header[name]["data_offsets"][0]
            place += row * math.prod(shape[1:]) * dtype.itemsize
            data = memoryview(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))
            while data:  # one call moves at most 2 GiB
                done = os.pwrite(file.fileno(), data, place)
                data, place = data[done:], place + done
            with counting:
                missing[name] -= rows.size

        for piece in pieces:
            piece.fill(put)
            for name in piece.tensors:
                if missing[name]:
                    raise ValueError(f"tensor {name!r}: {missing[name]} elements were not written")
        os.fsync(file.fileno())


def _write_bytes(path: Path, data: bytes) -> None:
    """Replaces a small file; after a crash there is the old one or the new."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(data)
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
