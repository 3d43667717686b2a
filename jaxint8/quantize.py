"""Absmax quantisation of weights and activations, and the type that holds an int8 matrix.

Weights get one scale per output channel, activations one per row ("vector-wise", paper section 3.1). The surprising
fact is that outliers need not leave the integers: with a slightly larger row scale an outlier is the 15-bit integer
128 * hi + lo, and the whole product stays exact in int32.
"""

import dataclasses
from typing import Literal

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxint8.outliers import SMALLEST_SCALE, OutlierRule, finite_rows, outlier_mask
from jaxint8.rounding import divide
from jaxint8.shards import WHOLE, Shards

Arithmetic = Literal["int15", "float"]
Granularity = Literal["channel", "tensor"]

CODE_MAX = 127
OUTLIER_CODE_MAX = 127 * 128
# 127 * sum(abs(codes of a row)) must stay below 2**31 for the int32 sum to be exact.
SUM_OF_CODES_MAX = (2**31 - 1) // CODE_MAX
K_MAX = (2**31 - 1) // CODE_MAX**2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """A float[k, n] kernel as int8 codes and one float32 scale per output channel.

    A pytree whose leaves are ``codes`` and ``scale``: it passes through jit, vmap, scan and device_put, and its leaves
    can be sharded one by one. Leading axes, the same of both, make a stack of matrices, as vmap and scan do.

    Invariants (checked by `validate`):
      codes: int8[n, k]; row i is one contiguous output channel. Codes made by `quantize` lie in [-127, 127]. -128 is
        legal, since other writers use it: its sums are exact too, unless nearly all of a channel is -128 and the codes
        of a row nearly all at their bound (with a thousand outliers or more, or k beyond 132,104).
      scale: float32[n]; kernel[:, i] is about codes[i] * scale[i].
      k * 127**2 < 2**31, so that an int32 sum over k is exact.
    """

    codes: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (k, n) of the kernel that this stands for."""
        n, k = self.codes.shape[-2:]
        return k, n

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return (
            self.codes.size * self.codes.dtype.itemsize
            + self.scale.size * self.scale.dtype.itemsize
        )

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Returns the kernel that the codes stand for, ``dtype``[..., k, n] (computed in float32, rounded once)."""
        rows = self.codes.astype(jnp.float32) * self.scale[..., None]
        return jnp.swapaxes(rows, -1, -2).astype(dtype)


def validate(matrix: QuantizedMatrix) -> None:
    """Raises TypeError or ValueError, naming what is wrong, unless ``matrix`` keeps its static invariants."""
    if not isinstance(matrix, QuantizedMatrix):
        raise TypeError(
            f"w: expected a QuantizedMatrix (see jaxint8.quantize), got {type(matrix).__name__}"
        )
    codes, scale = matrix.codes, matrix.scale
    for name, leaf in (("codes", codes), ("scale", scale)):
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise TypeError(f"w.{name}: expected an array, got {type(leaf).__name__}")
    if codes.dtype != jnp.int8 or codes.ndim != 2:
        raise ValueError(f"w.codes: expected int8[n, k], got {codes.dtype}{list(codes.shape)}")
    if scale.dtype != jnp.float32 or scale.shape != codes.shape[:1]:
        raise ValueError(
            f"w.scale: expected float32[{codes.shape[0]}], got {scale.dtype}{list(scale.shape)}"
        )
    check_k(codes.shape[1])


def check_k(k: int) -> None:
    """Raises ValueError if an int32 sum over k products of 127 * 127 could overflow."""
    if k > K_MAX:
        raise ValueError(f"k: int32 sums are exact up to k = {K_MAX} (k * 127**2 < 2**31), got {k}")


def quantize(kernel: ArrayLike, per: Granularity = "channel") -> QuantizedMatrix:
    """Quantises a kernel by absmax, one scale per output channel (paper, section 3.1, "vector-wise").

    Codes are kernel / scale rounded half to even, with scale = absmax / 127 in float32. An all-zero channel has scale
    1 and codes 0, and so has one whose scale would be subnormal. Runs under jit; on concrete values non-finite weights
    are refused (traced ones give the channel the scale NaN, so that they show in the output).

    Args:
      kernel: float[k, n], float32, bfloat16 or float16.
      per: "channel", or "tensor" for a single scale (the paper's plain absmax, kept for comparison).

    Returns:
      A QuantizedMatrix with shape (k, n).

    Raises:
      TypeError: the kernel is not a float array.
      ValueError: it is not 2-D, holds a non-finite value, or k is too large for exact int32 sums.
    """
    if isinstance(kernel, jax.ShapeDtypeStruct):
        raise TypeError(
            "kernel: expected an array, got a shape alone; jax.eval_shape gives the shapes that come of shapes"
        )
    try:
        kernel = jnp.asarray(kernel)
    except (TypeError, ValueError):
        raise TypeError(f"kernel: expected an array, got {type(kernel).__name__}") from None
    if kernel.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(f"kernel: expected float32, bfloat16 or float16, got {kernel.dtype}")
    if kernel.ndim != 2:
        raise ValueError(f"kernel: expected shape [k, n], got {list(kernel.shape)}")
    if per not in ("channel", "tensor"):
        raise ValueError(f"per: expected 'channel' or 'tensor', got {per!r}")
    check_k(kernel.shape[0])
    matrix = _quantize(kernel, per)
    if not isinstance(matrix.scale, jax.core.Tracer) and bool(jnp.any(jnp.isnan(matrix.scale))):
        channel = int(jnp.argmax(jnp.isnan(matrix.scale)))
        raise ValueError(f"kernel: holds a non-finite value (first in output channel {channel})")
    return matrix


@jax.jit(static_argnames="per")
def _quantize(kernel: jax.Array, per: Granularity) -> QuantizedMatrix:
    rows = kernel.T.astype(jnp.float32)
    finite = finite_rows(rows)
    absmax = jnp.max(jnp.abs(rows), axis=1, keepdims=True, initial=0.0)
    raw = divide(absmax, CODE_MAX)
    if per == "tensor":
        finite = jnp.broadcast_to(jnp.all(finite), finite.shape)
        raw = jnp.broadcast_to(jnp.max(raw, initial=0.0), raw.shape)
    scale, usable = usable_scale(raw)
    codes = _round_clip(jnp.where(usable & finite, rows, 0.0), scale, CODE_MAX).astype(jnp.int8)
    return QuantizedMatrix(codes, jnp.where(finite, scale, jnp.nan)[:, 0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedRows:
    """Activations as integers: x is about scale * (128 * hi + lo).

    Attributes:
      lo: int8[m, k].
      hi: int8[m, k], zero wherever there is no outlier; None if the call has no integer outliers.
      scale: float32[m, 1], NaN in rows that hold a non-finite value.
    """

    lo: jax.Array
    hi: jax.Array | None
    scale: jax.Array


def quantize_rows(
    x: jax.Array,
    rule: OutlierRule | None,
    arithmetic: Arithmetic = "int15",
    per: Literal["row", "tensor"] = "row",
    shards: Shards = WHOLE,
) -> QuantizedRows:
    """Quantises activations (paper, section 3.1), with the outliers as 15-bit integers or left out.

    With "int15" the row scale is max(absmax of the rest / 127, absmax of the outliers / 16256). Where a row has so
    many outliers (about a thousand) that its int32 sum could overflow, 16256 gives way to the largest bound that
    cannot. With "float" the outliers have code 0 and the scale is taken over the rest.

    Args:
      x: float[m, k].
      rule: the outlier rule, or None.
      arithmetic: how outliers are carried out.
      per: "row", or "tensor" for one scale (the paper's plain absmax, kept for comparison).
      shards: what of the whole matrix x is: scales are those of whole rows.

    Returns:
      The codes and row scales.
    """
    k = shards.width(x.shape[1])
    finite = finite_rows(x, shards)
    values = jnp.where(finite, x.astype(jnp.float32), 0.0)
    magnitude = jnp.abs(values)
    bound: jax.Array | int = CODE_MAX
    mask = None
    if rule is None:
        raw = divide(_absmax(magnitude, shards), CODE_MAX)
    else:
        mask = outlier_mask(x, rule, shards)
        raw = divide(_absmax(jnp.where(mask, 0.0, magnitude), shards), CODE_MAX)
        if arithmetic == "float":
            values = jnp.where(mask, 0.0, values)
        else:
            count = shards.sum_of_rows(jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.int32))
            room = (SUM_OF_CODES_MAX - CODE_MAX * (k - count)) // jnp.maximum(count, 1)
            limit = jnp.minimum(room, OUTLIER_CODE_MAX)
            outlier = _absmax(jnp.where(mask, magnitude, 0.0), shards)
            raw = jnp.where(
                count > 0, jnp.maximum(raw, divide(outlier, limit.astype(jnp.float32))), raw
            )
            bound = jnp.where(mask, limit, CODE_MAX)
    if per == "tensor":
        raw = jnp.broadcast_to(shards.max_of_columns(jnp.max(raw, initial=0.0)), raw.shape)
    scale, usable = usable_scale(raw)
    codes = _round_clip(jnp.where(usable, values, 0.0), scale, bound)
    scale = jnp.where(finite, scale, jnp.nan)
    if mask is None or arithmetic == "float":
        return QuantizedRows(codes.astype(jnp.int8), None, scale)
    hi = jnp.where(mask, (codes + 64) >> 7, 0)
    return QuantizedRows((codes - 128 * hi).astype(jnp.int8), hi.astype(jnp.int8), scale)


def _absmax(magnitude: jax.Array, shards: Shards) -> jax.Array:
    return shards.max_of_rows(jnp.max(magnitude, axis=1, keepdims=True, initial=0.0))


def usable_scale(raw: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (scale, usable): a row whose scale would be subnormal counts as zero, with scale 1.

    XLA flushes subnormals on some backends and not on others; counting them as zero everywhere is the only rule that
    gives the same bits.
    """
    usable = raw >= SMALLEST_SCALE
    return jnp.where(usable, raw, 1.0), usable


def _round_clip(values: jax.Array, scale: jax.Array, bound: jax.Array | int) -> jax.Array:
    codes = jnp.round(divide(values, scale)).astype(
        jnp.int32
    )  # |codes| <= 2**14 + 1: the quotient is at most bound * (1 + ulp)
    return jnp.clip(codes, -jnp.asarray(bound, jnp.int32), jnp.asarray(bound, jnp.int32))
