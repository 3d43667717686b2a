"""The layout of bitsandbytes: ``weight`` int8[n, k], ``SCB`` float32[n] and ``weight_format``.

SCB is the absmax of a row, not its scale: kernel = codes * SCB / 127. The surprising fact is that
multiplying a scale by 127 loses nothing: for every float32 absmax, fl(fl(fl(absmax / 127) * 127) /
127) is fl(absmax / 127) (a test tries every mantissa), so what we save and load again is the same
to the bit.
"""

from collections.abc import Callable

import numpy as np

from jaxint8.checkpoint.base import CheckpointError, TensorReader
from jaxint8.checkpoint.writer import Piece, Put

CODE_MAX = np.float32(127)
# Row by row; the other layouts are tilings of GPUs before 2023 that nothing writes any more.
ROW_MAJOR = 0
SUFFIXES = ("SCB", "weight_format")  # of the tensors beside a weight


def is_int8(reader: TensorReader, name: str) -> bool:
    """Whether ``name`` ("... .weight") holds int8 codes.

    Raises:
      CheckpointError: it holds int8, but the scales or the plain row-major layout are missing.
    """
    if reader.dtype(name) != np.int8:
        return False
    where = f"{reader.path}: tensor {name!r}"
    scb = companion(name, "SCB")
    names = set(reader.names())
    if scb not in names:
        raise CheckpointError(f"{where}: int8 codes without their scales ({scb!r} is missing)")
    shape = reader.shape(name)
    if len(shape) != 2 or reader.shape(scb) != shape[:1] or reader.dtype(scb) != np.float32:
        raise CheckpointError(
            f"{where}: expected int8[n, k] with float32[n] scales, got {list(shape)} with "
            f"{reader.dtype(scb)}{list(reader.shape(scb))}"
        )
    layout = companion(name, "weight_format")
    if layout in names and int(reader.read(layout).reshape(-1)[0]) != ROW_MAJOR:
        raise CheckpointError(
            f"{where}: weight_format {int(reader.read(layout).reshape(-1)[0])} is not row-major (0)"
        )
    return True


def companion(name: str, suffix: str) -> str:
    """Names a tensor that belongs to weight ``name``: "a.b.weight", "SCB" -> "a.b.SCB"."""
    return name.removesuffix("weight") + suffix


def read_scale(reader: TensorReader, name: str) -> np.ndarray:
    """Returns float32[n], the scale of each row of int8 weight ``name``; all-zero rows get 1.

    Raises:
      CheckpointError: a scale is not a finite number >= 0.
    """
    absmax = reader.read(companion(name, "SCB"))
    if not np.all(np.isfinite(absmax) & (absmax >= 0)):
        raise CheckpointError(
            f"{reader.path}: tensor {companion(name, 'SCB')!r}: expected finite scales >= 0"
        )
    return np.where(absmax > 0, absmax / CODE_MAX, np.float32(1))


Keep = Callable[[int, np.ndarray, np.ndarray], None]
"""Takes rows of an int8 matrix: the first row, int8[rows, k], and their scales float32[rows]."""


def piece(name: str, shape: tuple[int, ...], make: Callable[[Keep], None]) -> Piece:
    """Returns what a writer needs for int8 weight ``name``: codes, scales and layout together.

    Args:
      name: "... .weight".
      shape: (n, k).
      make: hands every row once to the function that it is given, in any order, from any thread.
    """
    scale, layout = (companion(name, suffix) for suffix in SUFFIXES)

    def fill(put: Put) -> None:
        def keep(row: int, codes: np.ndarray, scales: np.ndarray) -> None:
            put(name, row, codes)
            put(scale, row, absmax_of(scales))

        make(keep)
        put(layout, 0, np.array(ROW_MAJOR, np.uint8))

    tensors = {
        name: (shape, np.dtype(np.int8)),
        scale: (shape[:1], np.dtype(np.float32)),
        layout: ((), np.dtype(np.uint8)),
    }
    return Piece(tensors, fill)


def absmax_of(scale: np.ndarray) -> np.ndarray:
    """Returns float32[n], the SCB that divided by 127 gives ``scale``, an absmax / 127, again."""
    with np.errstate(over="ignore"):
        return np.minimum(scale * CODE_MAX, np.finfo(np.float32).max)
