"""int8_linear: the LLM.int8() product of activations and a quantised kernel, with its gradient.

The public function checks its arguments, folds the leading axes into rows, picks an implementation and sets the
derivative at the float edge: through a rounding, automatic differentiation would silently give zero.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxint8.dispatch import (
    Implementation,
    Layer,
    Operands,
    check_available,
    entered,
    integer_product,
    one_device,
    row_codes,
)
from jaxint8.outliers import OutlierRule, as_rule, is_token_scope
from jaxint8.partition import Partition, partition_of
from jaxint8.portable import finish, scaled_product, xla_linear
from jaxint8.prologue import enter
from jaxint8.quantize import Arithmetic, QuantizedMatrix, QuantizedRows, validate
from jaxint8.shards import Shards, add_where_same

Reduction = Literal["exact", "fast"]
FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
# Values of all rows up to which inputs that are split over devices are gathered, with a rule and without one, whose
# only statistic is an absmax. A layer of 14336 -> 4096 on two H200s by relative 6, gathered and by statistics: at 32
# rows 109 and 194 us, at 1,024 329 and 367; without a rule at 8 rows 110 and 111 us, at 1,024 273 and 212.
GATHERED_VALUES, GATHERED_VALUES_WITHOUT_RULE = 1 << 24, 1 << 17


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
    result is the same to the bit on every implementation (only that XLA makes subnormal results 0); with token-scope
    rules (and None) a row's result depends on that row alone.

    A row that holds a non-finite value gives NaN throughout; its neighbours are untouched.

    `jax.export` wants ``export.DisabledSafetyCheck.custom_call("jaxint8_linear")``, and what it makes runs where this
    version of the kernels is; with implementation "xla" it is a program like any other.

    Differentiable in x and bias: dx = (g * scale) @ codes in float32, that is the gradient of the dequantised layer
    (straight through the rounding of x). The int8 leaves of w get no gradient.

    Args:
      x: float32, bfloat16 or float16[..., k], one axis or more; any of them may be 0 long. A NumPy array is taken as
        `jnp.asarray` has it, float64 as float32 unless x64 is enabled.
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
        and adds results in the dtype of x, half the bytes or less and no wait for a scale. Codes err no more by
        Threshold, TopK and None (a part's absmax of the rest is at most the row's), but may by RelativeThreshold,
        which then compares with the rms of the part: of a part that holds many of the outliers, fewer stand out. Each
        of d partial results is rounded once and their sum d - 1 times: at most d * eps / 2 * sum(abs(partial
        results)), for eps of the dtype.

    Returns:
      x.dtype[..., n], split as x over rows and as w over n.

    Raises:
      TypeError: an argument has the wrong type or dtype.
      ValueError: shapes do not fit, k is too large for exact int32 sums, an option is unknown, or the implementation
        asked for does not exist here.
    """
    rule = as_rule(outliers)
    x = jnp.asarray(x) if isinstance(x, np.ndarray) else x
    bias = jnp.asarray(bias) if isinstance(bias, np.ndarray) else bias
    arithmetic = _check(x, w, bias, outlier_arithmetic, implementation)
    if bias is not None:
        bias = bias.astype(jnp.float32)
    if partition is None:
        partition = partition_of(x, w.codes)
    elif not isinstance(partition, Partition):
        raise TypeError(f"partition: expected a Partition, got {type(partition).__name__}")
    if reduction not in ("exact", "fast"):
        raise ValueError(f"reduction: expected 'exact' or 'fast', got {reduction!r}")
    if partition is not None:
        if implementation == "reference":
            raise ValueError("implementation: 'reference' runs on one device, not on a partition")
        partition.check(x.shape, w.shape[1])
        x = partition.place(x, partition.x_spec(x.ndim))
        codes = partition.place(w.codes, partition.codes_spec)
        w = QuantizedMatrix(codes, partition.place(w.scale, partition.n_spec))
        bias = None if bias is None else partition.place(bias, partition.n_spec)
    layer = Layer(rule, arithmetic, implementation)
    return linear(Operands(x, w.codes, w.scale, bias), layer, partition, reduction)


def linear(
    operands: Operands,
    layer: Layer,
    partition: Partition | None = None,
    reduction: Reduction = "exact",
) -> jax.Array:
    """Computes ``residual + int8_linear(prologue(x))``, as one call where there is a kernel. Nothing is checked.

    Args:
      operands: x and residual with any leading axes.
      layer: what is computed. With a partition there may be no prologue and no residual.
      partition: how x and the weights lie on a mesh, or None.
      reduction: see `int8_linear`.

    Returns:
      x.dtype[..., n]; differentiable in x, bias, norm and residual.
    """
    x, n = operands.x, operands.codes.shape[0]
    if partition is not None:
        return _traced_once(operands, layer, partition, reduction)
    y = _traced_once(_folded(operands), layer, None, reduction)
    return y.reshape(*x.shape[:-1], n)


def _folded(operands: Operands) -> Operands:
    """The same with all but the last axis of x and residual as one."""
    m = math.prod(operands.x.shape[:-1])
    residual = operands.residual
    if residual is not None:
        residual = residual.reshape(m, residual.shape[-1])
    return operands._replace(x=operands.x.reshape(m, operands.x.shape[-1]), residual=residual)


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
    if bias is not None and not isinstance(bias, jax.Array | np.ndarray):
        raise TypeError(f"bias: expected an array or None, got {type(bias).__name__}")
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
    check_available(implementation)
    return arithmetic or "int15"


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _linear(
    operands: Operands, layer: Layer, partition: Partition | None, reduction: Reduction
) -> jax.Array:
    """x.dtype[m, n] from x float[m, k]; the float edge at which the derivative is set."""
    if partition is None:
        return one_device(operands, layer)

    def part(*arrays: jax.Array) -> jax.Array:
        local = Operands(*arrays)
        return partition.same_everywhere(
            local_linear(local, layer, shards=partition.shards, reduction=reduction)
        )

    x, codes, scale, bias, _, _ = operands
    specs = (partition.x_spec(x.ndim), partition.codes_spec, partition.n_spec, partition.n_spec)
    return partition.map(part, specs, partition.y_spec(x.ndim))(x, codes, scale, bias)


def local_linear(
    operands: Operands, layer: Layer, *, shards: Shards, reduction: Reduction = "exact"
) -> jax.Array:
    """What one device of a partition computes, inside a `jax.shard_map`: its part of `linear`.

    Where whole rows are here and no other device has a say in their outliers, that is the fused kernel. Else few rows
    are gathered, the statistics of many are made by all devices together, and the kernel multiplies codes.

    Args:
      operands: these rows, columns and output channels; x and residual with any leading axes. Where columns are split
        and a prologue is a norm, they would not be enough: such a norm stands outside.
      layer: what is computed; "float" outliers are added in the order of the columns, device by device.
      shards: what of the whole x this is.
      reduction: "exact" or "fast", see `int8_linear`.

    Returns:
      x.dtype[..., n], the same on all devices over which columns are split.
    """
    folded = _folded(operands)
    y = _local(folded, layer, shards, reduction)
    return y.reshape(*operands.x.shape[:-1], operands.codes.shape[0])


def _local(operands: Operands, layer: Layer, shards: Shards, reduction: Reduction) -> jax.Array:
    """`local_linear` of x[m, k]."""
    token_scope = not shards.rows or is_token_scope(layer.rule)
    if not shards.columns and token_scope and shards.k is None:
        return one_device(operands, layer)
    rows = entered(operands, layer)
    inner = dataclasses.replace(layer, prologue=None)
    _, codes, scale, bias, _, residual = operands
    if reduction == "fast" and shards.columns:
        part = Operands(rows, codes, scale)
        y = _local(part, inner, Shards(rows=shards.rows), "exact")
        y = finish(jax.lax.psum(y, shards.columns).astype(jnp.float32), bias, rows.dtype)
    else:
        multiply = functools.partial(integer_product, implementation=layer.implementation)
        how: dict[str, Any] = {"shards": shards, "multiply": multiply}
        held = rows.shape[1]
        width = dataclasses.replace(shards, k=None).width(held)
        most = GATHERED_VALUES if layer.rule else GATHERED_VALUES_WITHOUT_RULE
        few = rows.shape[0] * width <= most and width == shards.width(held)  # no padding
        if shards.columns and token_scope and few and layer.arithmetic == "int15":
            # A device that sees whole rows needs no statistics of the others, which are rounds of messages one after
            # the other: what a step of decoding would wait for.
            made = row_codes(shards.whole_rows(rows), inner)
            own = functools.partial(shards.own_columns, held=held)
            hi = None if made.hi is None else own(made.hi)
            made = QuantizedRows(own(made.lo), hi, made.scale)
            y = finish(scaled_product(made, codes, scale, **how), bias, rows.dtype)
        else:
            how |= {"rule": layer.rule, "arithmetic": layer.arithmetic}
            y = xla_linear(rows, codes, scale, bias, **how)
    return y if residual is None else residual + y


def _linear_forward(
    operands: Operands, layer: Layer, partition: Partition | None, reduction: Reduction
) -> tuple[jax.Array, Operands]:
    # Without a prologue only the dtype of x is needed again, and which devices of a user's shard_map differ in it.
    x, residual = operands.x, operands.residual
    if layer.prologue is None:
        x = x[:0]
    kept = operands._replace(x=x, residual=None if residual is None else residual[:0])
    return _linear(operands, layer, partition, reduction), kept


def _linear_backward(
    layer: Layer,
    partition: Partition | None,
    reduction: Reduction,
    operands: Operands,
    gradient: jax.Array,
) -> tuple[Operands]:
    del reduction
    x, codes, scale, bias, norm, residual = operands

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
        return dx.astype(x.dtype), dbias

    if partition is not None:
        specs = (partition.y_spec(gradient.ndim), partition.codes_spec, partition.n_spec)
        part = partition.map(part, specs, (partition.x_spec(gradient.ndim), partition.n_spec))
    dx, dbias = part(gradient, codes, scale)
    dnorm = None
    if layer.prologue is not None:
        _, pull = jax.vjp(functools.partial(enter, prologue=layer.prologue), x, norm)
        dx, dnorm = pull(dx)
    nothing = np.zeros(codes.shape, jax.dtypes.float0)
    dresidual = None if residual is None else gradient
    cotangents = (dx, jnp.zeros_like(scale), dbias, dnorm, dresidual)
    dx, dscale, dbias, dnorm, dresidual = map(
        add_where_same, cotangents, (x, scale, bias, norm, residual)
    )
    return (Operands(dx, nothing, dscale, dbias, dnorm, dresidual),)  # pyright: ignore[reportArgumentType] (float0 is NumPy's)


_linear.defvjp(_linear_forward, _linear_backward)

# Layers of one shape share a trace and a lowering: with many layers that is seconds, and a call outside of jit is a
# call of what has been compiled.
_traced_once = jax.jit(_linear, static_argnums=(1, 2, 3))
