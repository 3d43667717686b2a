"""Dense8bit for Flax Linen: `flax.linen.Dense` with an int8 kernel.

The codes live in their own collection, "quant", so that optimisers, weight decay and parameter counts never see them;
only the bias is a parameter. A fresh module is all zeros: weights come from `jaxint8.convert_params`, not from init.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jaxint8.dispatch import Implementation
from jaxint8.linear import int8_linear
from jaxint8.outliers import OutlierRule
from jaxint8.partition import Partition
from jaxint8.quantize import Arithmetic, QuantizedMatrix

COLLECTION = "quant"
Names = tuple[str | None, ...]


class Dense8bit(nn.Module):
    """A linear layer with int8 weights and LLM.int8() outlier decomposition (paper, section 3).

    To take the place of an `nn.Dense` it must have that layer's name. Flax calls layers without one by their class,
    `Dense_0` before and `Dense8bit_0` after, where there are no codes: for those, a class of the same name will do, and
    counts on beside the `nn.Dense` that stay. Else give layers ``name="..."``, or make them in `setup`::

        class Dense(Dense8bit):
            pass

    Attributes:
      features: n, the width of the output.
      use_bias: whether a bias float[n] is added (parameter "bias").
      outliers: Threshold, RelativeThreshold, TopK; a number means Threshold(number); None means no decomposition.
      outlier_arithmetic: "int15", "float", or None for the library's choice; see `jaxint8.int8_linear`.
      dtype: dtype of the computation and output; None keeps that of the input.
      implementation: "cuda", "cpu", "xla", "reference", or None for the best that exists.
      param_dtype: dtype of the bias.
      kernel_axes: logical partition names of the codes [n, k] (output channels first), mapped to axes of a mesh by
        `nn.logical_axis_rules`, without which nothing is constrained; None: no metadata.
      partition: how x and the layer lie on a mesh, under jit with automatic axes; see `jaxint8.int8_linear`.
      bias_init: initialiser of the bias.
    """

    features: int
    use_bias: bool = True
    outliers: OutlierRule | float | None = 6.0
    outlier_arithmetic: Arithmetic | None = None
    dtype: DTypeLike | None = None
    implementation: Implementation | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_axes: tuple[str | None, str | None] | None = None
    partition: Partition | None = None
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[..., k] to float[..., n].

        Raises:
          TypeError: see `jaxint8.int8_linear`.
          ValueError: the collection "quant" has no codes or scale under this layer's path, or not of this shape; or see
            `jaxint8.int8_linear`.
        """
        if jnp.ndim(x) == 0:
            raise ValueError("x: expected at least one axis, got a scalar")
        k = x.shape[-1]
        codes = self._quant("codes", jnp.zeros, (self.features, k), jnp.int8, self.kernel_axes)
        output_axis = None if self.kernel_axes is None else self.kernel_axes[:1]
        scale = self._quant("scale", jnp.ones, (self.features,), jnp.float32, output_axis)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        if self.dtype is not None:
            x = jnp.asarray(x, self.dtype)
        return int8_linear(
            x,
            QuantizedMatrix(codes, scale),
            bias,
            outliers=self.outliers,
            outlier_arithmetic=self.outlier_arithmetic,
            implementation=self.implementation,
            partition=self.partition,
        )

    def _quant(
        self,
        name: str,
        init: Callable[..., jax.Array],
        shape: tuple[int, ...],
        dtype: DTypeLike,
        names: Names | None,
    ) -> jax.Array:
        path = "/".join((*self.path, name))
        if not (self.has_variable(COLLECTION, name) or self.is_mutable_collection(COLLECTION)):
            raise ValueError(
                f"{path}: expected in the collection {COLLECTION!r}, got none; convert_params leaves them under the "
                "name of the nn.Dense layer, so that both need the same one: name=..., setup, or a subclass Dense"
            )
        boxed: Callable[..., Any] = (
            init if names is None else nn.with_logical_partitioning(init, names)
        )
        value = nn.unbox(self.variable(COLLECTION, name, boxed, shape, dtype).value)
        if value.shape != shape:
            raise ValueError(
                f"{path}: expected shape {list(shape)} by features={self.features} and the last axis of x, "
                f"got {list(value.shape)}"
            )
        return value
