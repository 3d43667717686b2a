"""The layer in pure JAX: two int8 products and an epilogue, for any platform and for any part of a split matrix.

The surprising fact is that "float" outliers are a loop over columns and not a product: so a row's bits do not depend on
the rows beside it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxint8.outliers import OutlierRule, outlier_mask
from jaxint8.quantize import Arithmetic, QuantizedRows, quantize_rows
from jaxint8.shards import WHOLE, Shards

# Outlier columns that one step of the float path adds; a step reads and writes all of y, so a few at once pay.
COLUMNS_PER_STEP = 8

Multiply = Callable[[jax.Array, jax.Array], jax.Array]
"""int8[m, k], int8[n, k] -> their exact product int32[m, n]."""


def xla_product(a: jax.Array, codes: jax.Array) -> jax.Array:
    """A single row is doubled: for a matrix-vector product XLA's CPU backend converts all of the weights to int32."""
    left = jnp.concatenate([a, jnp.zeros_like(a)]) if a.shape[0] == 1 else a
    sums = jax.lax.dot_general(
        left, codes, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )
    return sums[: a.shape[0]]


def product(rows: QuantizedRows, codes: jax.Array, multiply: Multiply = xla_product) -> jax.Array:
    """Returns the exact int32[m, n] product of quantised rows and int8[n, k] codes: ((hi . w) << 7) + lo . w.

    lo and hi are stacked into one product, so the weights are read once.
    """
    if rows.hi is None:
        return multiply(rows.lo, codes)
    m = rows.lo.shape[0]
    sums = multiply(jnp.concatenate([rows.lo, rows.hi]), codes)
    return sums[:m] + (sums[m:] << 7)


def xla_linear(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    *,
    rule: OutlierRule | None,
    arithmetic: Arithmetic,
    shards: Shards = WHOLE,
    multiply: Multiply = xla_product,
) -> jax.Array:
    """The portable implementation: float[m, k], int8[n, k], float32[n] -> x.dtype[m, n]; see `int8_linear`."""
    rows = quantize_rows(x, rule, arithmetic, shards=shards)
    y = scaled_product(rows, codes, scale, shards=shards, multiply=multiply)
    if rule is not None and arithmetic == "float":
        outliers = jnp.where(outlier_mask(x, rule, shards), x.astype(jnp.float32), 0.0)
        y = shards.in_turn(lambda y: _add_outlier_columns(y, outliers, codes, scale), y)
    return finish(y, bias, x.dtype)


def scaled_product(
    rows: QuantizedRows,
    codes: jax.Array,
    scale: jax.Array,
    *,
    shards: Shards = WHOLE,
    multiply: Multiply = xla_product,
) -> jax.Array:
    """Returns float32[m, n], the product of quantised rows and weights in the units of both."""
    sums = shards.sum_of_rows(product(rows, codes, multiply))
    return (sums.astype(jnp.float32) * rows.scale) * scale[None, :]


def finish(y: jax.Array, bias: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """Adds the bias to float32[m, n] and rounds once; barriers keep the compiler from fusing into an FMA."""
    if bias is not None:
        y = jax.lax.optimization_barrier(y) + bias[None, :]
    # Else a caller's sum with another float32 array would become an FMA with the last product here.
    return jax.lax.optimization_barrier(y.astype(dtype))


def _add_outlier_columns(
    y: jax.Array, outliers: jax.Array, codes: jax.Array, scale: jax.Array
) -> jax.Array:
    """Adds outliers float32[m, k] @ dequantised weights to y, in ascending order of column.

    A loop over the columns that hold an outlier: exact for any number of them with static shapes, and elementwise, so
    a row's bits do not depend on the other rows (a matrix product would pick its order of summation by m).
    """
    k = outliers.shape[1]
    if k == 0 or y.size == 0:
        return y
    used = jnp.any(outliers != 0, axis=0)
    count = jnp.sum(used, dtype=jnp.int32)
    order = jnp.argsort(~used, stable=True)  # the columns in use first, ascending

    def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        step, y = state
        for lane in range(COLUMNS_PER_STEP):
            position = step * COLUMNS_PER_STEP + lane
            column = order[jnp.minimum(position, k - 1)]
            value = jnp.where(position < count, outliers[:, column], 0.0)
            weight = scale * codes[:, column].astype(jnp.float32)
            y = y + value[:, None] * weight[None, :]
        return step + 1, y

    return jax.lax.while_loop(
        lambda state: state[0] * COLUMNS_PER_STEP < count, body, (jnp.int32(0), y)
    )[1]
