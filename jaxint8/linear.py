"""int8_linear: the LLM.int8() product of activations and a quantised kernel, with its gradient.

The public function checks its arguments, folds the leading axes into rows, picks an implementation and sets the
derivative at the float edge: through a rounding, automatic differentiation would silently give zero.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxint8 import kernels, reference
from jaxint8.outliers import OutlierRule, as_rule, is_token_scope
from jaxint8.partition import Partition, partition_of
from jaxint8.portable import Multiply, finish, xla_linear, xla_product
from jaxint8.quantize import Arithmetic, QuantizedMatrix, validate
from jaxint8.shards import Shards, vary_like

Implementation = Literal["cuda", "cpu", "xla", "reference"]
Reduction = Literal["exact", "fast"]
FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def int8_linear(
    x: jax.Array,
    w: QuantizedMatrix,
    bias: jax.Array | None = None,
    *,
    outliers: OutlierRule | float | None = 6.0,
    outlier_arithmetic: Arithmetic | None = None,
    implementation: Implementation | None = None,
    partition: Partition | None = None,
    reduction: Reduction = "exact",
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
      partition: how x and w lie on a mesh of devices. None reads it from the arrays where they know it: on a mesh with
        explicit axes, and outside of jit. Under jit on a mesh with automatic axes it must be given: what is not told
        where it is split is gathered.
      reduction: where k is split over devices, "exact" scales rows by their absmax on all devices and adds int32: with
        "int15" the bits of one device. "fast" lets every device scale and take outliers by its own part of the row
        and adds results in the dtype of x, half the bytes or less and no wait for a scale; beside the error of the
        codes, which is not larger (a part's absmax is at most the row's), each of d partial results is rounded once
        and their sum d - 1 times: at most d * eps / 2 * sum(abs(partial results)), for eps of the dtype.

    Returns:
      x.dtype[..., n], split as x over rows and as w over n.

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
    if partition is None:
        partition = partition_of(x, w.codes)
    if reduction not in ("exact", "fast"):
        raise ValueError(f"reduction: expected 'exact' or 'fast', got {reduction!r}")
    if partition is not None:
        if implementation == "reference":
            raise ValueError("implementation: 'reference' runs on one device, not on a partition")
        partition.check(x.shape, n)
        x = partition.place(x)
        how = (rule, arithmetic, implementation, partition, reduction)
        return _traced_once(x, w.codes, w.scale, bias, *how)
    m = math.prod(x.shape[:-1])
    how = (rule, arithmetic, implementation, None, reduction)
    y = _traced_once(x.reshape(m, k), w.codes, w.scale, bias, *how)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7, 8))
def _linear(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    rule: OutlierRule | None,
    arithmetic: Arithmetic,
    implementation: Implementation | None,
    partition: Partition | None,
    reduction: Reduction,
) -> jax.Array:
    """x.dtype[m, n] from x float[m, k]; the float edge at which the derivative is set."""
    if partition is None:
        return _one_device(x, codes, scale, bias, rule, arithmetic, implementation)

    how = {"rule": rule, "arithmetic": arithmetic, "implementation": implementation}
    local = functools.partial(local_linear, **how, shards=partition.shards, reduction=reduction)

    def part(*arrays: jax.Array) -> jax.Array:
        return partition.same_everywhere(local(*arrays))

    specs = (partition.x_spec(x.ndim), partition.codes_spec, partition.n_spec, partition.n_spec)
    return partition.map(part, specs, partition.y_spec(x.ndim))(x, codes, scale, bias)


def _one_device(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    rule: OutlierRule | None,
    arithmetic: Arithmetic,
    implementation: Implementation | None,
) -> jax.Array:
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


def local_linear(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    *,
    rule: OutlierRule | None,
    arithmetic: Arithmetic,
    implementation: Implementation | None,
    shards: Shards,
    reduction: Reduction = "exact",
) -> jax.Array:
    """What one device of a partition computes, inside a `jax.shard_map`: its part of `int8_linear`.

    Where whole rows are here and no other device has a say in their outliers, that is the fused kernel. Else the
    statistics are made by all devices together, and the kernel multiplies codes.

    Args:
      x: float[..., k]; these rows and columns.
      codes: int8[n, k]; these output channels and columns.
      scale: float32[n], of these output channels.
      bias: float32[n] or None, of these output channels.
      rule: the outlier rule, or None.
      arithmetic: how outliers are carried out; "float" adds them in the order of the columns, device by device.
      implementation: "cuda", "cpu", "xla" or None.
      shards: what of the whole x this is.
      reduction: "exact" or "fast", see `int8_linear`.

    Returns:
      x.dtype[..., n], the same on all devices over which columns are split.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    whole = Shards(rows=shards.rows)
    if not shards.columns and (not shards.rows or is_token_scope(rule)) and shards.k is None:
        y = _one_device(rows, codes, scale, bias, rule, arithmetic, implementation)
    elif reduction == "fast" and shards.columns:
        part = functools.partial(local_linear, rule=rule, arithmetic=arithmetic, shards=whole)
        y = part(rows, codes, scale, None, implementation=implementation)
        y = finish(jax.lax.psum(y, shards.columns).astype(jnp.float32), bias, x.dtype)
    else:
        how = {"rule": rule, "arithmetic": arithmetic, "shards": shards}
        multiply = functools.partial(integer_product, implementation=implementation)
        y = xla_linear(rows, codes, scale, bias, **how, multiply=multiply)
    return y.reshape(*x.shape[:-1], codes.shape[0])


def _linear_forward(x, codes, scale, bias, *how):
    empty = jnp.zeros((0,), x.dtype)  # carries the dtype of dx
    return _linear(x, codes, scale, bias, *how), (codes, scale, bias, empty)


def _linear_backward(rule, arithmetic, implementation, partition, reduction, residuals, g):
    del rule, arithmetic, implementation, reduction
    codes, scale, bias, empty = residuals

    def part(
        g: jax.Array, codes: jax.Array, scale: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        g = g.astype(jnp.float32)
        dx = jax.lax.dot_general(
            g * jnp.expand_dims(scale, tuple(range(g.ndim - 1))),
            codes.astype(jnp.float32),
            (((g.ndim - 1,), (0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
        )
        dbias = None if bias is None else jnp.sum(g, axis=tuple(range(g.ndim - 1)))
        if partition is not None:
            dx = jax.lax.psum(dx, partition.n_axes) if partition.n_axes else dx
            if dbias is not None and partition.row_axes:
                dbias = jax.lax.psum(dbias, partition.row_axes)
        return dx.astype(empty.dtype), dbias

    if partition is not None:
        specs = (partition.y_spec(g.ndim), partition.codes_spec, partition.n_spec)
        part = partition.map(part, specs, (partition.x_spec(g.ndim), partition.n_spec))
    dx, dbias = part(g, codes, scale)
    return dx, np.zeros(codes.shape, jax.dtypes.float0), jnp.zeros_like(scale), dbias


_linear.defvjp(_linear_forward, _linear_backward)

# Layers of one shape share a trace and a lowering: with many layers that is seconds, and a call outside of jit is a
# call of what has been compiled.
_traced_once = jax.jit(_linear, static_argnums=(4, 5, 6, 7, 8))


@functools.cache
def _compiled(
    rule: OutlierRule | None, arithmetic: Arithmetic, platform: kernels.Platform
) -> Callable[..., jax.Array]:
    """The kernel as a function that vmap folds into rows, where a row's result does not depend on the others."""

    @jax.custom_batching.custom_vmap
    def call(x: jax.Array, codes: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
        y = kernels.linear(
            x, codes, scale, bias, rule=rule, arithmetic=arithmetic, platform=platform
        )
        return vary_like(y, *jax.tree.leaves((x, codes, scale, bias)))

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


def integer_product(
    a: jax.Array, codes: jax.Array, *, implementation: Implementation | None
) -> jax.Array:
    """A `Multiply` by the kernels."""
    if implementation == "xla":
        return xla_product(a, codes)
    if implementation is not None:
        return _compiled_product(implementation)(a, codes)
    platforms = {platform: _compiled_product(platform) for platform in kernels.platforms()}
    return jax.lax.platform_dependent(a, codes, default=xla_product, **platforms)


@functools.cache
def _compiled_product(platform: kernels.Platform) -> Multiply:
    """The kernel as a function that vmap folds into rows."""

    @jax.custom_batching.custom_vmap
    def call(a: jax.Array, codes: jax.Array) -> jax.Array:
        return vary_like(kernels.product(a, codes, platform=platform), a, codes)

    @call.def_vmap
    def _(size: int, batched: list[bool], a: jax.Array, codes: jax.Array) -> tuple[jax.Array, bool]:
        if not batched[1]:
            _, m, k = a.shape
            return call(a.reshape(size * m, k), codes).reshape(size, m, codes.shape[0]), True
        if batched[0]:
            return jax.lax.map(lambda both: call(*both), (a, codes)), True
        return jax.lax.map(lambda one: call(a, one), codes), True

    return call


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
