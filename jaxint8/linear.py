"""int8_linear: the LLM.int8() product of activations and a quantised kernel, with its gradient.

The public function checks its arguments, folds the leading axes into rows, picks an implementation and sets the
derivative at the float edge: through a rounding, automatic differentiation would silently give zero. Portable ("xla")
code for both ways of carrying out the outlier part stands here as well; it is two int8 products and an epilogue.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxint8 import kernels, reference
from jaxint8.outliers import OutlierRule, as_rule, is_token_scope, outlier_mask
from jaxint8.quantize import Arithmetic, QuantizedMatrix, QuantizedRows, quantize_rows, validate

Implementation = Literal["cuda", "cpu", "xla", "reference"]
FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
# Outlier columns that one step of the float path adds; a step reads and writes all of y, so a few at once pay.
COLUMNS_PER_STEP = 8


def int8_linear(
    x: jax.Array,
    w: QuantizedMatrix,
    bias: jax.Array | None = None,
    *,
    outliers: OutlierRule | float | None = 6.0,
    outlier_arithmetic: Arithmetic | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Computes ``x @ kernel + bias`` in int8, the outliers of ``x`` at higher precision (paper, sections 3.1, 3.2).

    Rows of x are scaled to int8, the product with the codes of w runs in int8 with exact int32 sums, and both scales
    and the bias are applied in float32 with one rounding to the dtype of x at the end. With "int15" arithmetic the
    result is the same to the bit on every implementation; with token-scope rules (and None) a row's result depends on
    that row alone.

    A row that holds a non-finite value gives NaN throughout; its neighbours are untouched.

    Differentiable in x and bias: dx = (g * scale) @ codes in float32, that is the gradient of the dequantised layer
    (straight through the rounding of x). The int8 leaves of w get no gradient.

    Args:
      x: float32, bfloat16 or float16[..., k], one axis or more; any of them may be 0 long.
      w: a QuantizedMatrix of shape (k, n).
      bias: float[n] or None; added in float32 before the one rounding.
      outliers: Threshold, RelativeThreshold or TopK; a number means Threshold(number); None means no decomposition.
      outlier_arithmetic: "int15" (an outlier is the integer 128 * hi + lo, all sums in int32), "float" (the paper: a
        floating-point product of the outliers with the dequantised weights), or None for the library's choice, int15.
      implementation: "cuda", "cpu" (compiled kernels), "xla" (pure JAX, anywhere), "reference" (NumPy through a
        callback, for tests), or None for the best that exists on the platform that the computation is compiled for.

    Returns:
      x.dtype[..., n].

    Raises:
      TypeError: an argument has the wrong type or dtype.
      ValueError: shapes do not fit, k is too large for exact int32 sums, an option is unknown, or the implementation
        asked for does not exist here.
    """
    rule = as_rule(outliers)
    arithmetic = _check(x, w, bias, outlier_arithmetic, implementation)
    k, n = w.shape
    if bias is not None:
        bias = bias.astype(jnp.float32)
    m = math.prod(x.shape[:-1])
    y = _traced_once(x.reshape(m, k), w.codes, w.scale, bias, rule, arithmetic, implementation)
    return y.reshape(*x.shape[:-1], n)


def _check(
    x: jax.Array,
    w: QuantizedMatrix,
    bias: jax.Array | None,
    arithmetic: Arithmetic | None,
    implementation: Implementation | None,
) -> Arithmetic:
    """Raises on arguments that do not fit; returns the arithmetic to use."""
    validate(w)
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(f"x: expected an array, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"x: expected float32, bfloat16 or float16, got {x.dtype}")
    if x.ndim < 1:
        raise ValueError("x: expected at least one axis, got a scalar")
    k, n = w.shape
    if x.shape[-1] != k:
        raise ValueError(
            f"x: last axis must be k = {k} to fit w of shape {w.shape}, got {list(x.shape)}"
        )
    if bias is not None and (bias.dtype not in FLOATS or bias.shape != (n,)):
        raise ValueError(f"bias: expected float[{n}], got {bias.dtype}{list(bias.shape)}")
    if arithmetic not in ("int15", "float", None):
        raise ValueError(
            f"outlier_arithmetic: expected 'int15', 'float' or None, got {arithmetic!r}"
        )
    if implementation not in ("cuda", "cpu", "xla", "reference", None):
        raise ValueError(
            f"implementation: expected 'cuda', 'cpu', 'xla', 'reference' or None, got {implementation!r}"
        )
    if implementation in ("cuda", "cpu") and implementation not in kernels.available():
        raise ValueError(
            f"implementation: {implementation!r} is not available: {kernels.why_not(implementation)}"
        )
    return arithmetic or "int15"


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _linear(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    rule: OutlierRule | None,
    arithmetic: Arithmetic,
    implementation: Implementation | None,
) -> jax.Array:
    """x.dtype[m, n] from x float[m, k]; the float edge at which the derivative is set."""
    portable = functools.partial(xla_linear, rule=rule, arithmetic=arithmetic)
    if implementation == "xla":
        return portable(x, codes, scale, bias)
    if implementation == "reference":
        return _reference_linear(x, codes, scale, bias, rule, arithmetic)
    if implementation == "cuda" and arithmetic == "float":
        return portable(x, codes, scale, bias)  # has no CUDA kernel
    if implementation is not None:
        return _compiled(rule, arithmetic, implementation)(x, codes, scale, bias)
    platforms = {
        platform: _compiled(rule, arithmetic, platform)
        for platform in kernels.platforms()
        if not (platform == "cuda" and arithmetic == "float")
    }
    return jax.lax.platform_dependent(x, codes, scale, bias, default=portable, **platforms)


def _linear_forward(x, codes, scale, bias, rule, arithmetic, implementation):
    y = _linear(x, codes, scale, bias, rule, arithmetic, implementation)
    empty = jnp.zeros((0,), x.dtype)  # carries the dtype of dx
    return y, (codes, scale, bias, empty)


def _linear_backward(rule, arithmetic, implementation, residuals, g):
    del rule, arithmetic, implementation
    codes, scale, bias, empty = residuals
    g = g.astype(jnp.float32)
    dx = jax.lax.dot_general(
        g * scale[None, :],
        codes.astype(jnp.float32),
        (((1,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
    )
    dbias = None if bias is None else jnp.sum(g, axis=0)
    return (
        dx.astype(empty.dtype),
        np.zeros(codes.shape, jax.dtypes.float0),
        jnp.zeros_like(scale),
        dbias,
    )


_linear.defvjp(_linear_forward, _linear_backward)

# Layers of one shape share a trace and a lowering: with many layers that is seconds, and a call outside of jit is a
# call of what has been compiled.
_traced_once = jax.jit(_linear, static_argnums=(4, 5, 6))


@functools.cache
def _compiled(
    rule: OutlierRule | None, arithmetic: Arithmetic, platform: kernels.Platform
) -> Callable[..., jax.Array]:
    """The kernel as a function that vmap folds into rows, where a row's result does not depend on the others."""

    @jax.custom_batching.custom_vmap
    def call(x: jax.Array, codes: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
        return kernels.linear(
            x, codes, scale, bias, rule=rule, arithmetic=arithmetic, platform=platform
        )

    @call.def_vmap
    def _(
        size: int,
        batched: list[bool],
        x: jax.Array,
        codes: jax.Array,
        scale: jax.Array,
        bias: jax.Array | None,
    ) -> tuple[jax.Array, bool]:
        if is_token_scope(rule) and not any(jax.tree.leaves(batched[1:])):
            _, m, k = x.shape
            y = call(x.reshape(size * m, k), codes, scale, bias)
            return y.reshape(size, m, codes.shape[0]), True
        args = (x, codes, scale, bias)
        mapped = [a for a, b in zip(args, batched, strict=True) if b is True]

        def one(part: list[jax.Array]) -> jax.Array:
            parts = iter(part)
            return call(
                *(next(parts) if b is True else a for a, b in zip(args, batched, strict=True))
            )

        return jax.lax.map(one, mapped), True

    return call


def absmax_linear(x: jax.Array, w: QuantizedMatrix, bias: jax.Array | None = None) -> jax.Array:
    """The paper's plain absmax layer (section 2.1), kept for comparison: one scale for all of the activations.

    Args:
      x: float[..., k].
      w: a QuantizedMatrix of shape (k, n), made with `quantize(kernel, per="tensor")`.
      bias: float[n] or None.

    Returns:
      x.dtype[..., n].
    """
    _check(x, w, bias, None, None)
    k, n = w.shape
    rows = quantize_rows(x.reshape(math.prod(x.shape[:-1]), k), None, per="tensor")
    y = (product(rows, w.codes).astype(jnp.float32) * rows.scale) * w.scale[None, :]
    y = finish(y, None if bias is None else bias.astype(jnp.float32), x.dtype)
    return y.reshape(*x.shape[:-1], n)


def xla_linear(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    *,
    rule: OutlierRule | None,
    arithmetic: Arithmetic,
) -> jax.Array:
    """The portable implementation: float[m, k], int8[n, k], float32[n] -> x.dtype[m, n]; see `int8_linear`."""
    rows = quantize_rows(x, rule, arithmetic)
    y = (product(rows, codes).astype(jnp.float32) * rows.scale) * scale[None, :]
    if rule is not None and arithmetic == "float":
        outliers = jnp.where(outlier_mask(x, rule), x.astype(jnp.float32), 0.0)
        y = _add_outlier_columns(y, outliers, codes, scale)
    return finish(y, bias, x.dtype)


def finish(y: jax.Array, bias: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """Adds the bias to float32[m, n] and rounds once; the barrier keeps the compiler from fusing into an FMA."""
    if bias is not None:
        y = jax.lax.optimization_barrier(y) + bias[None, :]
    return y.astype(dtype)


def product(rows: QuantizedRows, codes: jax.Array) -> jax.Array:
    """Returns the exact int32[m, n] product of quantised rows and int8[n, k] codes: ((hi . w) << 7) + lo . w.

    lo and hi are stacked into one product, so the weights are read once; a single row is doubled, because XLA's CPU
    backend converts the whole weight to int32 for a matrix-vector product (14 times slower than float).
    """
    m = rows.lo.shape[0]
    if rows.hi is not None:
        left = jnp.concatenate([rows.lo, rows.hi])
    else:
        left = jnp.concatenate([rows.lo, jnp.zeros_like(rows.lo)]) if m == 1 else rows.lo
    sums = jax.lax.dot_general(
        left, codes, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )
    return sums[:m] if rows.hi is None else sums[:m] + (sums[m:] << 7)


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


def _reference_linear(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    rule: OutlierRule | None,
    arithmetic: Arithmetic,
) -> jax.Array:
    def call(x, codes, scale, bias):
        x, codes, scale = np.asarray(x), np.asarray(codes), np.asarray(scale)
        bias = None if bias is None else np.asarray(bias)
        return reference.int8_linear(x, codes, scale, bias, rule, arithmetic)

    shape = jax.ShapeDtypeStruct((x.shape[0], codes.shape[0]), x.dtype)
    return jax.pure_callback(call, shape, x, codes, scale, bias, vmap_method="sequential")
