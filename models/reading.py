"""Fills parameters from a checkpoint, block by block, converting to int8 on the way.

Each parameter's buffer is allocated once, in its last form (q, k and v one below the other, codes
int8), and a few threads fill it from the file in blocks of a megabyte: the float model never
exists. The surprising fact is that on a CPU the buffer *is* the parameter: JAX takes over host
memory that is aligned to 64 bytes, without a copy.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress

from jaxint8.checkpoint import TensorReader, bitsandbytes, codes
from jaxint8.models.families import Part, Source
from jaxint8.models.pieces import Piece
from jaxint8.scheme_linear import Matrix, quantize_kernel
from jaxint8.schemes import Scheme

# XLA:CPU takes over buffers with this alignment and copies others.
_ALIGNMENT = 64
# Memory is asked for in pieces of at least this size: for large ones NumPy has the system use huge
# pages, from which a processor reads weights at up to one and a half times the speed.
_SLAB = 32 << 20
# More would wait for memory.
_THREADS_MAX = 8
# Seconds of loading after which a progress bar appears (on a terminal).
_PATIENCE = 1.0


class Pool:
    """Threads that work through blocks of rows, and a progress bar for those who wait.

    Args:
        total: elements that there are to read.
        label: what is done with them, for the bar.
    """

    def __init__(self, total: int, label: str = "loading") -> None:
        """Starts nothing yet."""
        self._executor = concurrent.futures.ThreadPoolExecutor(
            min(_THREADS_MAX, os.cpu_count() or 1)
        )
        self._progress = Progress(console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(label, total=total)
        self._start = time.monotonic()
        self._shown = False
        self._slab = np.empty(0, np.uint8)

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the threads and removes the bar."""
        self._executor.shutdown(cancel_futures=True)
        if self._shown:
            self._progress.stop()

    def run(self, shape: tuple[int, ...], job: Callable[[slice], None], unit: int = 1) -> None:
        """Calls ``job`` with slices that cover the first axis of ``shape``; raises what it raises.

        The slices start at multiples of ``unit``.
        """
        blocks = list(codes.row_blocks(shape, unit=unit))
        row = math.prod(shape[1:])
        for rows, _ in zip(blocks, self._executor.map(job, blocks), strict=True):
            self.advance((rows.stop - rows.start) * row)

    def advance(self, elements: int) -> None:
        """Moves the bar on."""
        self._progress.advance(self._task, elements)
        waited = time.monotonic() - self._start
        if not self._shown and waited > _PATIENCE and sys.stderr.isatty():
            self._progress.start()
            self._shown = True

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Returns an uninitialised array that JAX on a CPU can take over without a copy.

        Small ones share their memory, which is given back when the last of them is gone.
        """
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size + _ALIGNMENT > self._slab.size:
            self._slab = np.empty(max(size + _ALIGNMENT, _SLAB), np.uint8)
        start = -self._slab.ctypes.data % _ALIGNMENT
        array = self._slab[start : start + size].view(dtype).reshape(shape)
        self._slab = self._slab[start + size :]
        return array


def scheme_matrix(reader: TensorReader, source: Source, pool: Pool, scheme: Scheme) -> Matrix:
    """Returns the weights of a linear layer as a rare scheme wants them, on the device.

    For comparisons only, so one float matrix at a time may exist.

    Args:
        reader: the checkpoint.
        source: the parameter's parts, matrices [n, k] one below the other.
        pool: who does it.
        scheme: what says how.

    Raises:
        CheckpointError: a weight is not finite.
        ValueError: the layer is too wide for the scheme.

    """
    target = whole(source)
    (kernel,) = float_arrays(reader, source, [target], pool, np.dtype(np.float32))
    parts = [quantize_kernel(kernel[_held(piece)].T, scheme) for piece in target.pieces]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


@dataclasses.dataclass(frozen=True)
class Target:
    """A part of a parameter that one device holds, on the host while it is filled.

    Attributes:
        shape: of the part.
        pieces: what of the source's parts it holds along ``axis``; what no piece covers is padding.
        axis: 0 for rows (output channels), 1 for columns (inputs).

    """

    shape: tuple[int, ...]
    pieces: list[Piece]
    axis: int = 0


def whole(source: Source) -> Target:
    """Returns all of a parameter as one target."""
    starts = itertools.accumulate((part.shape[0] for part in source.parts), initial=0)
    pieces = [
        Piece(index, 0, part.shape[0], start)
        for index, (part, start) in enumerate(zip(source.parts, starts, strict=False))
    ]
    return Target(source.shape, pieces)


def int8_matrices(
    reader: TensorReader,
    source: Source,
    targets: Sequence[Target],
    pool: Pool,
    per_tensor: bool = False,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns codes int8[n, k] and scales float32[n] of each target, on the host.

    Scales are those of whole rows, also where a target holds some columns only. Parts that are int8
    already (bitsandbytes) keep their codes.

    Args:
        reader: the checkpoint.
        source: the parameter's parts, matrices [n, k] one below the other.
        targets: what to make of it.
        pool: who does it.
        per_tensor: whether all rows of a part share one scale (the paper's plain absmax).

    Raises:
        CheckpointError: a weight is not finite.

    """
    absmax = {}  # by part
    scales = {}
    for part in source.parts:
        if bitsandbytes.is_int8(reader, part.name):
            scales[part.name] = bitsandbytes.read_scale(reader, part.name)
        elif per_tensor:
            absmax[part.name] = _absmax(reader, part)

    def convert(name: str, rows: slice, matrix: np.ndarray, scale: np.ndarray) -> None:
        if name in scales:
            matrix[...] = reader.read(name, rows)
            scale[...] = scales[name][rows]
        else:
            codes.quantize_rows(reader, name, rows, matrix, scale, absmax.get(name))

    made = []
    for target in targets:
        matrix = pool.empty(target.shape, np.int8)
        scale = pool.empty(target.shape[:1], np.float32)
        if _is_padded(target):
            matrix[...], scale[...] = 0, 1
        made.append((matrix, scale))
    _fill(source, targets, made, pool, convert)
    return made


def _absmax(reader: TensorReader, part: Part) -> np.ndarray:
    absmax = np.zeros(1, np.float32)
    for rows in codes.row_blocks(part.stored_shape):
        largest = codes.absmax_of_rows(reader, part.name, rows).max(initial=0)
        np.maximum(absmax, largest, out=absmax)
    return absmax


def float_arrays(
    reader: TensorReader,
    source: Source,
    targets: Sequence[Target],
    pool: Pool,
    dtype: np.dtype[Any],
) -> list[np.ndarray]:
    """Returns each target as ``dtype``, on the host.

    Args:
        reader: the checkpoint.
        source: the parameter's parts, one below the other; int8 ones (bitsandbytes) are
            dequantised.
        targets: what to make of it.
        pool: who does it.
        dtype: float32 or bfloat16.

    Raises:
        CheckpointError: a value is not finite, or not in ``dtype``.

    """
    scales = {
        part.name: bitsandbytes.read_scale(reader, part.name)
        for part in source.parts
        if bitsandbytes.is_int8(reader, part.name)
    }

    def convert(name: str, rows: slice, array: np.ndarray) -> None:
        if name in scales:
            array[...] = reader.read(name, rows).astype(np.float32) * scales[name][rows, None]
        else:
            array[...] = codes.read_floats(reader, name, rows, dtype)

    made = []
    for target in targets:
        array = pool.empty(target.shape, dtype)
        if _is_padded(target):
            array[...] = 0
        made.append((array,))
    _fill(source, targets, made, pool, convert)
    return [array for (array,) in made]


def _fill(
    source: Source,
    targets: Sequence[Target],
    made: Sequence[tuple[np.ndarray, ...]],
    pool: Pool,
    convert: Callable[..., None],
) -> None:
    """Fills the arrays of each target; ``convert(name, rows, *arrays)`` makes rows of a tensor."""
    for target, arrays in zip(targets, made, strict=True):
        for piece in target.pieces if target.axis == 0 else ():
            part, held = source.parts[piece.part], _held(piece)
            into = [array[held] for array in arrays]

            def fill(rows: slice, part=part, into=into, first=piece.start) -> None:
                wanted = slice(first + rows.start, first + rows.stop)
                for run, own in part.runs(wanted):
                    held = slice(own.start - first, own.stop - first)
                    convert(part.name, run, *(array[held] for array in into))

            pool.run((_size(piece), *part.shape[1:]), fill)
            for array in arrays:
                array[held] = part.arrange(array[held])
    by_columns = [pair for pair in zip(targets, made, strict=True) if pair[0].axis == 1]
    if not by_columns:
        return
    part = source.parts[0]

    def scatter(rows: slice) -> None:
        """Converts whole rows, and hands each target its columns of them."""
        shape = (rows.stop - rows.start, part.shape[1])
        blocks = [np.empty(shape[: array.ndim], array.dtype) for array in by_columns[0][1]]
        convert(part.name, rows, *blocks)
        for target, arrays in by_columns:
            for array, block in zip(arrays, blocks, strict=True):
                if array.ndim == 1:
                    array[rows] = block
                    continue
                for piece in target.pieces:
                    array[rows, _held(piece)] = block[:, piece.start : piece.stop]

    pool.run(part.shape, scatter)


def _held(piece: Piece) -> slice:
    """Where a piece stands on the device."""
    return slice(piece.at, piece.at + _size(piece))


def _size(piece: Piece) -> int:
    return piece.stop - piece.start


def _is_padded(target: Target) -> bool:
    return sum(map(_size, target.pieces)) < target.shape[target.axis]
