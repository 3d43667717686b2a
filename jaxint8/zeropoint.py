"""Zeropoint quantisation (paper, section 2.1): codes over [min, max] with an offset, and the product of such codes.

The surprising fact: the range of a row always contains 0. So an outlier that is taken out has the code -zp and adds
(-zp + zp) * w = 0 to the product exactly: the decomposition needs no second product, the zeropoint itself is an int8,
and the int32 sum cannot overflow. The paper's equations (2) and (3) are misprinted (they do not reach [-127, 127]);
what stands here is the reading under which its equations (4) and (5) hold.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxint8.dispatch import Implementation, integer_product
from jaxint8.outliers import finite_rows
from jaxint8.quantize import CODE_MAX, usable_scale
from jaxint8.rounding import divide

# 254 * 254 * k < 2**31: what a zeropoint product's int32 sum can hold.
ZEROPOINT_K_MAX = (2**31 - 1) // (2 * CODE_MAX) ** 2


def check_k(k: int) -> None:
    """Raises ValueError if an int32 sum over k products of 254 * 254 could overflow."""
    if k > ZEROPOINT_K_MAX:
        raise ValueError(
            f"k: zeropoint sums are exact in int32 up to k = {ZEROPOINT_K_MAX}, got {k}"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ZeropointRows:
    """Rows as integers with an offset: x is about scale * (codes + zero).

    Attributes:
      codes: int8[m, k] in [-127, 127].
      scale: float32[m, 1], NaN in rows that hold a non-finite value (their codes are 0).
      zero: int32[m, 1] in [-127, 127].
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array


def quantize_zeropoint(x: jax.Array, per: Literal["row", "tensor"] = "row") -> ZeropointRows:
    """Quantises rows over [min, max], widened to contain 0 (paper, section 2.1, equations (1) to (3) corrected).

    scale = (max - min) / 254, zero = round(min / scale) + 127, codes = round(x / scale) - zero, clipped to
    [-127, 127]. A row whose scale would be subnormal counts as zero.

    Args:
      x: float[m, k], activations, or a kernel's output channels.
      per: a scale and a zeropoint per row, or the same for all.

    Returns:
      The codes, scales and zeropoints.
    """
    finite = finite_rows(x)
    values = jnp.where(finite, x.astype(jnp.float32), 0.0)
    levels = 2 * CODE_MAX
    # Rows are divided before they are joined: XLA would multiply one number for all by a reciprocal.
    high = divide(jnp.max(values, axis=1, keepdims=True, initial=0.0), levels)
    lowest = jnp.min(values, axis=1, keepdims=True, initial=0.0)
    low = divide(lowest, levels)
    if per == "tensor":
        high = jnp.broadcast_to(jnp.max(high, initial=0.0), high.shape)
        low = jnp.broadcast_to(jnp.min(low, initial=0.0), low.shape)
    # Two quotients, for the difference of two large numbers could overflow.
    scale, usable = usable_scale(high - low)
    first = jnp.round(divide(lowest, scale))
    if per == "tensor":
        first = jnp.broadcast_to(jnp.min(first, initial=0.0), first.shape)
    usable &= finite
    zero = jnp.where(usable, first.astype(jnp.int32) + CODE_MAX, 0)
    zero = jnp.clip(zero, -CODE_MAX, CODE_MAX)
    steps = jnp.round(divide(jnp.where(usable, values, 0.0), scale)).astype(jnp.int32)
    codes = jnp.clip(steps - zero, -CODE_MAX, CODE_MAX).astype(jnp.int8)
    return ZeropointRows(codes, jnp.where(finite, scale, jnp.nan), zero)


def zeropoint_product(
    a: ZeropointRows,
    codes: jax.Array,
    zero: jax.Array,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Returns the exact int32[m, n] sum of (a.codes + a.zero) * (codes + zero), as the paper's equation (5).

    One int8 product; the other three terms are sums of rows, which wrap in int32 but whose total cannot.

    Args:
      a: rows int8[m, k].
      codes: int8[n, k].
      zero: int32[n].
      implementation: as for `int8_linear`.
    """
    k = codes.shape[1]
    row_sum = jnp.sum(a.codes, axis=1, keepdims=True, dtype=jnp.int32)
    channel_sum = jnp.sum(codes, axis=1, dtype=jnp.int32)[None, :]
    zero = zero[None, :]
    return (
        integer_product(a.codes, codes, implementation=implementation)
        + row_sum * zero
        + a.zero * channel_sum
        + jnp.int32(k) * (a.zero * zero)
    )
