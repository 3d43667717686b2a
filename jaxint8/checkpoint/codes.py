"""Float rows to int8 codes on the host, block by block, while a checkpoint is read.

The numbers are those of `jaxint8.quantize` and of the oracle to the bit (absmax / 127 per output
channel, true division, round half to even); only the memory differs: one block of float scratch per
thread. The surprising fact is the block: a megabyte, which stays in the core's own cache, is more
than twice as fast as sixteen, where every step of the arithmetic waits for memory.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxint8.checkpoint.base import CheckpointError, TensorReader
from jaxint8.reference import CODE_MAX, SMALLEST_SCALE

BLOCK_ELEMENTS = 1 << 18  # of float32: 1 MB
_CODE_MAX = np.float32(CODE_MAX)


def row_blocks(
    shape: tuple[int, ...], elements: int = BLOCK_ELEMENTS, unit: int = 1
) -> Iterator[slice]:
    """Yields slices of the first axis that hold about ``elements`` values each.

    Each slice starts at a multiple of ``unit`` rows.
    """
    step = max(1, elements // max(1, math.prod(shape[1:]) * unit)) * unit
    for start in range(0, shape[0], step):
        yield slice(start, min(shape[0], start + step))


def read_floats(reader: TensorReader, name: str, rows: slice, dtype: Any) -> np.ndarray:
    """Returns rows of a float tensor as ``dtype``, rounded to nearest; an array of its own.

    Raises:
      CheckpointError: one of the values is not finite, or not in ``dtype``.
    """
    with np.errstate(over="ignore"):
        values = reader.read(name, rows).astype(dtype, copy=False)
    finite = np.isfinite(values)
    if not finite.all():
        raise _not_finite(reader, name, rows, finite.reshape(len(finite), -1).all(axis=1))
    return values


def absmax_of_rows(reader: TensorReader, name: str, rows: slice) -> np.ndarray:
    """Returns float32[rows], the largest magnitude of each row of a matrix.

    Raises:
      CheckpointError: a weight is not finite.
    """
    return _absmax(reader, name, rows)[1]


def quantize_rows(
    reader: TensorReader,
    name: str,
    rows: slice,
    codes: np.ndarray,
    scale: np.ndarray,
    absmax: np.ndarray | None = None,
) -> None:
    """Quantises the rows ``rows`` of a float matrix [n, k] into ``codes`` and ``scale``.

    Args:
      reader: the checkpoint.
      name: the tensor.
      rows: which of its rows.
      codes: int8[rows, k], written.
      scale: float32[rows], written.
      absmax: float32[1], shared by all rows; None for one per row (paper, section 3.1).

    Raises:
      CheckpointError: a weight is not finite.
    """
    values, own = _absmax(reader, name, rows)
    raw = np.broadcast_to(own if absmax is None else absmax, own.shape) / _CODE_MAX
    # Below that a channel counts as zero: scale 1, codes 0 (see jaxint8.quantize).
    usable = raw >= SMALLEST_SCALE
    scale[...] = np.where(usable, raw, np.float32(1))
    values[~usable] = 0
    np.divide(values, scale[:, None], out=values)
    np.rint(values, out=values)
    np.clip(values, -_CODE_MAX, _CODE_MAX, out=values)
    codes[...] = values


def _absmax(reader: TensorReader, name: str, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(over="ignore"):  # a float64 out of range becomes infinite, and is refused
        values = reader.read(name, rows).astype(np.float32, copy=False)
    absmax = np.max(np.abs(values), axis=1, initial=np.float32(0))
    finite = np.isfinite(absmax)
    if not finite.all():
        raise _not_finite(reader, name, rows, finite)
    return values, absmax


def _not_finite(
    reader: TensorReader, name: str, rows: slice, finite: np.ndarray
) -> CheckpointError:
    row = (rows.start or 0) + int(np.argmin(finite))
    return CheckpointError(f"{reader.path}: tensor {name!r}: row {row} holds a non-finite value")
