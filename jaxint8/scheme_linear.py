"""scheme_linear: a linear layer under any scheme of the paper's Table 1, in portable JAX where no kernel does it.

The surprising fact: only the int8 product has to be fast and exact, and that is one function for all schemes; what
differs are the integers that go in and the constants that the sums are multiplied with.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxint8.dispatch import Implementation, integer_product
from jaxint8.linear import int8_linear
from jaxint8.outliers import as_rule, outlier_mask
from jaxint8.portable import finish
from jaxint8.quantize import QuantizedMatrix, quantize, quantize_rows
from jaxint8.schemes import Scheme
from jaxint8.zeropoint import check_k, quantize_zeropoint, zeropoint_product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SchemeMatrix:
    """A float[k, n] kernel as codes and what else a scheme needs; scale * (codes + zero) stands for it.

    Attributes:
      codes: int8[n, k] in [-127, 127].
      scale: float32[n].
      zero: int32[n] in [-127, 127], the zeropoint of each channel.
      kernel: float[n, k], the weights before quantisation, for outlier_weights="float"; else None.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array
    kernel: jax.Array | None

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (k, n) of the kernel that this stands for."""
        return self.codes.shape[1], self.codes.shape[0]

    def dequantize(self) -> jax.Array:
        """Returns float32[k, n]."""
        return dequantized(self.codes, self.scale, self.zero).T


Matrix = QuantizedMatrix | SchemeMatrix


def quantize_kernel(kernel: ArrayLike, scheme: Scheme) -> Matrix:
    """Quantises a kernel as a scheme wants it (paper, sections 2.1 and 3.1).

    Args:
      kernel: float[k, n].
      scheme: the scheme.

    Returns:
      A QuantizedMatrix where that says all there is, else a SchemeMatrix; of shape (k, n).

    Raises:
      TypeError, ValueError: as `quantize`; or k is too large for the int32 sum of a zeropoint product.
    """
    kernel = jnp.asarray(kernel)
    per = "tensor" if scheme.weights == "tensor" else "channel"
    matrix = quantize(kernel, per)  # also checks the kernel
    if scheme.numbers == "absmax" and scheme.outlier_weights == "int8":
        return matrix
    codes, scale = matrix.codes, matrix.scale
    zero = jnp.zeros(codes.shape[:1], jnp.int32)
    if scheme.numbers == "zeropoint":
        check_k(kernel.shape[0])
        rows = quantize_zeropoint(kernel.T, "tensor" if per == "tensor" else "row")
        codes, scale, zero = rows.codes, rows.scale[:, 0], rows.zero[:, 0]
    return SchemeMatrix(codes, scale, zero, kernel.T if scheme.outlier_weights == "float" else None)


def dequantized(codes: jax.Array, scale: jax.Array, zero: jax.Array | None = None) -> jax.Array:
    """Returns float32[n, k], the weights that codes int8[n, k] stand for."""
    steps = codes.astype(jnp.float32)
    if zero is not None:
        steps += zero.astype(jnp.float32)[:, None]
    return steps * scale[:, None]


def scheme_linear(
    x: jax.Array,
    w: Matrix,
    bias: jax.Array | None = None,
    *,
    scheme: Scheme,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Computes ``x @ kernel + bias`` as a scheme says; `int8_linear` for all of Table 1.

    Integers are exact and equal `reference.py` with ``==``. Outliers in "float" are one float32 product, the
    dequantised result is rounded to the dtype of x once. The gradient is that of the dequantised layer.

    Args:
      x: float32, bfloat16 or float16[..., k].
      w: what `quantize_kernel` made of the kernel for this scheme.
      bias: float[n] or None.
      scheme: the scheme.
      implementation: as for `int8_linear`.

    Returns:
      x.dtype[..., n].

    Raises:
      TypeError, ValueError: as `int8_linear`, or the matrix was made for another scheme.
    """
    if scheme.native:
        arithmetic = scheme.outlier_arithmetic
        return int8_linear(
            x,
            w,  # pyright: ignore[reportArgumentType] (int8_linear names another type)
            bias,
            outliers=scheme.outliers,
            outlier_arithmetic=arithmetic,
            implementation=implementation,
        )
    if scheme.numbers == "zeropoint" or scheme.outlier_weights == "float":
        if not isinstance(w, SchemeMatrix):
            raise TypeError(f"w: expected the SchemeMatrix of {scheme}, got {type(w).__name__}")
        if scheme.outlier_weights == "float" and w.kernel is None:
            raise ValueError('w: outlier_weights="float" needs the float kernel, got None')
    k, n = w.shape
    if x.ndim < 1 or x.shape[-1] != k:
        raise ValueError(f"x: expected float[..., {k}] to fit w of {w.shape}, got {list(x.shape)}")
    if bias is not None:
        bias = bias.astype(jnp.float32)
    y = _portable(x.reshape(math.prod(x.shape[:-1]), k), w, bias, scheme, implementation)
    return y.reshape(*x.shape[:-1], n)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _portable(
    x: jax.Array,
    w: Matrix,
    bias: jax.Array | None,
    scheme: Scheme,
    implementation: Implementation | None,
) -> jax.Array:
    zero = w.zero if isinstance(w, SchemeMatrix) else None
    if scheme.activations == "float":
        weights = dequantized(w.codes, w.scale, zero).astype(x.dtype)
        return finish(_float_product(x, weights), bias, x.dtype)
    rule = as_rule(scheme.outliers)
    mask = outlier_mask(x, rule)
    rest = jnp.where(mask, jnp.zeros((), x.dtype), x)
    per = "tensor" if scheme.activations == "tensor" else "row"
    if scheme.numbers == "zeropoint":
        assert zero is not None
        rows = quantize_zeropoint(rest, per)
        acc, row_scale = zeropoint_product(rows, w.codes, zero, implementation), rows.scale
    else:
        rows = quantize_rows(rest, None, per=per)
        acc, row_scale = (
            integer_product(rows.lo, w.codes, implementation=implementation),
            rows.scale,
        )
    y = (acc.astype(jnp.float32) * row_scale) * w.scale[None, :]
    if rule is not None:
        kernel = w.kernel if isinstance(w, SchemeMatrix) else None
        weights = dequantized(w.codes, w.scale, zero) if kernel is None else kernel
        outliers = jnp.where(mask, x.astype(jnp.float32), 0.0)
        y = jax.lax.optimization_barrier(y) + _float_product(outliers, weights.astype(jnp.float32))
    return finish(y, bias, x.dtype)


def _float_product(x: jax.Array, weights: jax.Array) -> jax.Array:
    """float32[m, n] of x[m, k] and weights[n, k], both of one dtype; float32 is not rounded further."""
    highest = jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(
        x, weights, (((1,), (1,)), ((), ())), precision=highest, preferred_element_type=jnp.float32
    )


def _forward(x, w, bias, scheme, implementation):
    return _portable(x, w, bias, scheme, implementation), (w, bias, jnp.zeros((0,), x.dtype))


def _backward(scheme, implementation, residuals, g):
    del scheme, implementation
    w, bias, empty = residuals
    g = g.astype(jnp.float32)
    weights = dequantized(w.codes, w.scale, w.zero if isinstance(w, SchemeMatrix) else None)
    dx = _float_product(g, weights.T)
    # The matrix gets no gradient: float0 is what JAX calls that for integers.
    nothing = jax.tree.map(
        lambda leaf: (
            jnp.zeros_like(leaf)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else np.zeros(leaf.shape, jax.dtypes.float0)
        ),
        w,
    )
    return dx.astype(empty.dtype), nothing, None if bias is None else jnp.sum(g, axis=0)


_portable.defvjp(_forward, _backward)
