"""Fills parameters from a checkpoint, block by block, converting to int8 on the way.

Each parameter's buffer is allocated once, in its last form (q, k and v one below the other, codes
int8), and a few threads fill it from the file in blocks of a megabyte: the float model never
exists. The surprising fact is that on a CPU the buffer *is* the parameter: JAX takes over host
memory that is aligned to 64 bytes, without a copy.
"""

from __future__ import annotations

import concurrent.futures
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress

from jaxint8 import QuantizedMatrix
from jaxint8.checkpoint import TensorReader, bitsandbytes, codes
from jaxint8.models.families import Part, Source
from jaxint8.scheme_linear import Matrix, quantize_kernel
from jaxint8.schemes import Scheme

# XLA:CPU takes over buffers with this alignment and copies others.
_ALIGNMENT = 64
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
        self._total = total
        self._executor = concurrent.futures.ThreadPoolExecutor(
            min(_THREADS_MAX, os.cpu_count() or 1)
        )
        self._progress = Progress(console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(label, total=total)
        self._start = time.monotonic()
        self._shown = False

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


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns an uninitialised array that JAX on a CPU can take over without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def linear_matrix(reader: TensorReader, source: Source, pool: Pool, scheme: Scheme) -> Matrix:
    """Returns the weights of a linear layer as a scheme wants them; on the host but for rare schemes.

    Args:
        reader: the checkpoint.
        source: the parameter's parts, matrices [n, k] one below the other.
        pool: who does it.
        scheme: what says how.

    Raises:
        CheckpointError: a weight is not finite.
        ValueError: the layer is too wide for the scheme.

    """
    if scheme.numbers == "absmax" and scheme.outlier_weights == "int8":
        return int8_matrix(reader, source, pool, per_tensor=scheme.weights == "tensor")
    # For comparisons only, so one float matrix at a time may exist.
    kernel = float_array(reader, source, pool, np.dtype(np.float32))
    parts = [quantize_kernel(kernel[rows].T, scheme) for _, rows in _parts(source)]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def int8_matrix(
    reader: TensorReader, source: Source, pool: Pool, per_tensor: bool = False
) -> QuantizedMatrix:
    """Returns a parameter as codes int8[n, k] and scales float32[n], both on the host.

    Parts that are int8 already (bitsandbytes) keep their codes.

    Args:
        reader: the checkpoint.
        source: the parameter's parts, matrices [n, k] one below the other.
        pool: who does it.
        per_tensor: whether all rows of a part share one scale (the paper's plain absmax).

    Raises:
        CheckpointError: a weight is not finite.

    """
    matrix, scales = aligned_empty(source.shape, np.int8), aligned_empty(source.shape[:1], "f4")
    for part, rows in _parts(source):
        if bitsandbytes.is_int8(reader, part.name):
            _copy_codes(reader, part, pool, matrix[rows], scales[rows])
        else:
            _make_codes(reader, part, pool, matrix[rows], scales[rows], per_tensor)
        if part.interleaved_heads:
            matrix[rows] = part.arrange(matrix[rows])
            scales[rows] = part.arrange(scales[rows])
    return QuantizedMatrix(matrix, scales)  # pyright: ignore[reportArgumentType] (not yet JAX's)


def _make_codes(
    reader: TensorReader,
    part: Part,
    pool: Pool,
    matrix: np.ndarray,
    scales: np.ndarray,
    per_tensor: bool,
) -> None:
    absmax = np.zeros(1, np.float32) if per_tensor else None
    if absmax is not None:
        for rows in codes.row_blocks(part.stored_shape):
            largest = codes.absmax_of_rows(reader, part.name, rows).max(initial=0)
            np.maximum(absmax, largest, out=absmax)

    def fill(rows: slice) -> None:
        for run, own in part.runs(rows):
            codes.quantize_rows(reader, part.name, run, matrix[own], scales[own], absmax)

    pool.run(part.shape, fill)


def _copy_codes(
    reader: TensorReader, part: Part, pool: Pool, matrix: np.ndarray, scales: np.ndarray
) -> None:
    scales[...] = part.take(bitsandbytes.read_scale(reader, part.name))

    def fill(rows: slice) -> None:
        for run, own in part.runs(rows):
            matrix[own] = reader.read(part.name, run)

    pool.run(matrix.shape, fill)


def float_array(
    reader: TensorReader, source: Source, pool: Pool, dtype: np.dtype[Any]
) -> np.ndarray:
    """Returns a parameter as ``dtype``, on the host.

    Args:
        reader: the checkpoint.
        source: the parameter's parts, one below the other; int8 ones (bitsandbytes) are
            dequantised.
        pool: who does it.
        dtype: float32 or bfloat16.

    Raises:
        CheckpointError: a value is not finite, or not in ``dtype``.

    """
    array = aligned_empty(source.shape, dtype)
    for part, where in _parts(source):
        _fill_floats(reader, part, pool, array[where])
        if part.interleaved_heads:
            array[where] = part.arrange(array[where])
    return array


def _fill_floats(reader: TensorReader, part: Part, pool: Pool, array: np.ndarray) -> None:
    name = part.name
    scales = bitsandbytes.read_scale(reader, name) if bitsandbytes.is_int8(reader, name) else None

    def fill(rows: slice) -> None:
        for run, own in part.runs(rows):
            if scales is None:
                array[own] = codes.read_floats(reader, name, run, array.dtype)
            else:
                array[own] = reader.read(name, run).astype(np.float32) * scales[run, None]

    pool.run(array.shape, fill)


def _parts(source: Source) -> Iterator[tuple[Part, slice]]:
    """Yields each part with the rows of the parameter that are its."""
    start = 0
    for part in source.parts:
        yield part, slice(start, start + part.shape[0])
        start += part.shape[0]
