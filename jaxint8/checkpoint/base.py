"""What checkpoint readers have in common: the error, the interface, files read by position.

The surprising fact: nothing is memory-mapped. Pages of a mapping that were touched count as
resident memory until the kernel is told otherwise, so a mapped 30 GB checkpoint looks like 30 GB of
use; positioned reads into a buffer of the caller's size do not, and cost the same copy that the
conversion to int8 would make anyway.
"""

import contextlib
import dataclasses
import math
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message is one line naming the file and any tensor."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within, an OSError names the file: the system's own, of a write that fails for want of room, do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


class TensorReader(Protocol):
    """Named tensors of a checkpoint, read one at a time or by rows."""

    @property
    def path(self) -> Path:
        """The file or directory, for messages."""
        ...

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What is kept beside the tensors: strings in safetensors, typed values in GGUF."""
        ...

    def names(self) -> list[str]:
        """Returns the tensor names, in file order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor, slowest axis first."""
        ...

    def dtype(self, name: str) -> np.dtype[Any]:
        """Returns the dtype of what `read` returns."""
        ...

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Returns a tensor, or the rows ``rows`` (of the first axis) of it, as an array of its own.

        Raises:
          CheckpointError: there is no such tensor, or the file has become shorter.
        """
        ...

    def close(self) -> None:
        """Closes the files. Arrays that were read stay valid."""
        ...


class PositionedFile:
    """A file opened for reading at given offsets; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened ({error.strerror})") from None
        self.size = os.fstat(self._fd).st_size
        self.close = weakref.finalize(self, os.close, self._fd)  # a second call does nothing

    def read(self, offset: int, count: int, what: str) -> np.ndarray:
        """Returns uint8[count] from ``offset``; ``what`` names it if the file ends too early."""
        if not self.close.alive:
            raise ValueError(f"{self.path}: {what}: the checkpoint has been closed")
        buffer = np.empty(count, np.uint8)
        view = memoryview(buffer)
        done = 0
        while done < count:  # one call moves at most 2 GiB
            with naming(self.path):
                got = os.preadv(self._fd, [view[done:]], offset + done)
            if got == 0:
                raise CheckpointError(
                    f"{self.path}: {what}: expected {count} bytes at {offset}, "
                    f"the file ends after {done} of them"
                )
            done += got
        return buffer


def row_span(
    shape: tuple[int, ...], rows: slice | None, where: str
) -> tuple[int, int, tuple[int, ...]]:
    """Resolves ``rows`` of a tensor.

    Returns:
      (first row, elements in a row, shape of the result); a missing ``rows`` means all of them.
    """
    if rows is None:
        return 0, math.prod(shape[1:]), shape
    if not shape:
        raise CheckpointError(f"{where}: rows asked of a tensor without axes")
    start, stop, step = rows.indices(shape[0])
    if step != 1:
        raise ValueError(f"rows: expected a slice with step 1, got {rows}")
    return start, math.prod(shape[1:]), (max(0, stop - start), *shape[1:])


@dataclasses.dataclass(frozen=True, slots=True)
class Entry[Kind]:
    """Where a tensor lies: what the format calls its elements, shape, first byte in the file, bytes."""

    kind: Kind
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def check_spans(path: Path, entries: Mapping[str, Entry[Any]]) -> None:
    """Raises CheckpointError if two of the tensors overlap."""
    end, last = 0, ""
    for low, high, name in sorted((e.offset, e.offset + e.nbytes, n) for n, e in entries.items()):
        if low < high:
            if low < end:
                raise CheckpointError(f"{path}: tensors {last!r} and {name!r} overlap in the file")
            end, last = high, name


class TensorFile[Kind]:
    """What readers of one file share; with `dtype` and `read` a `TensorReader`."""

    metadata: Mapping[str, Any]
    _entries: Mapping[str, Entry[Kind]]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the file; reading its header is left to the format."""
        self.path = Path(path)
        self.files = [self.path]
        self._file = PositionedFile(self.path)

    def names(self) -> list[str]:
        """See `TensorReader`."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorReader`."""
        return self._entry(name).shape

    def close(self) -> None:
        """See `TensorReader`."""
        self._file.close()

    def _entry(self, name: str) -> Entry[Kind]:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: has no tensor {name!r}") from None
