"""Dense8bit for Flax NNX: `flax.nnx.Linear` with an int8 kernel.

Codes and scale are variables of the type `Quantized`, not `Param`, so that `nnx.grad` and optimisers that select
parameters pass them by. A fresh layer is all zeros; `Dense8bit.from_linear` converts a trained one.
"""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from jaxint8.dispatch import Implementation
from jaxint8.linear import int8_linear
from jaxint8.outliers import OutlierRule
from jaxint8.partition import Partition
from jaxint8.quantize import Arithmetic, QuantizedMatrix, quantize


class Quantized(nnx.Variable):
    """The type of variables that hold int8 codes and their scales."""


class Dense8bit(nnx.Module):
    """A linear layer with int8 weights and LLM.int8() outlier decomposition (paper, section 3).

    Attributes:
      codes: Quantized int8[n, k].
      scale: Quantized float32[n].
      bias: Param float[n], or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        outliers: OutlierRule | float | None = 6.0,
        outlier_arithmetic: Arithmetic | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        implementation: Implementation | None = None,
        partition: Partition | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes a layer of zeros.

        Args:
          in_features: k.
          out_features: n.
          use_bias: whether a bias is added.
          outliers: Threshold, RelativeThreshold, TopK; a number means Threshold(number); None: no decomposition.
          outlier_arithmetic: "int15", "float" or None for the library's choice; see `jaxint8.int8_linear`.
          dtype: dtype of the computation and output; None keeps that of the input.
          param_dtype: dtype of the bias.
          implementation: "cuda", "cpu", "xla", "reference", or None for the best that exists.
          partition: how x and the layer lie on a mesh, under jit with automatic axes; see `jaxint8.int8_linear`.
          rngs: accepted like any NNX layer's; nothing is drawn from it.
        """
        del rngs
        self.in_features = in_features
        self.out_features = out_features
        self.outliers = outliers
        self.outlier_arithmetic: Arithmetic | None = outlier_arithmetic
        self.dtype = dtype
        self.implementation: Implementation | None = implementation
        self.partition = partition
        self.codes = Quantized(jnp.zeros((out_features, in_features), jnp.int8))
        self.scale = Quantized(jnp.ones((out_features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[..., k] to float[..., n]."""
        if self.dtype is not None:
            x = x.astype(self.dtype)
        return int8_linear(
            x,
            QuantizedMatrix(self.codes[...], self.scale[...]),
            None if self.bias is None else self.bias[...],
            outliers=self.outliers,
            outlier_arithmetic=self.outlier_arithmetic,
            implementation=self.implementation,
            partition=self.partition,
        )

    @classmethod
    def from_linear(
        cls,
        linear: nnx.Linear,
        *,
        outliers: OutlierRule | float | None = 6.0,
        outlier_arithmetic: Arithmetic | None = None,
        implementation: Implementation | None = None,
    ) -> "Dense8bit":
        """Returns a layer with the quantised kernel and the bias of a trained `nnx.Linear`.

        Sharding metadata (`nnx.with_partitioning`) are carried over: those of the kernel exchanged for the codes, which
        are stored [n, k], their output axis for the scale, and for a bias that has none of its own. Arrays lie where
        the kernel lies, on a mesh with explicit axes too.

        Raises:
          TypeError: `linear` is no `nnx.Linear`, or of a subclass, or its kernel no float array.
          ValueError: the kernel is not 2-D, holds a non-finite value, or k is too large for exact int32 sums.
        """
        if type(linear) is not nnx.Linear:
            # What a subclass adds would be lost without a word: nnx.LoRALinear is one.
            hint = (
                ": merge what it adds into a Linear first" if isinstance(linear, nnx.Linear) else ""
            )
            raise TypeError(f"linear: expected an nnx.Linear, got {type(linear).__name__}{hint}")
        layer = cls(
            linear.in_features,
            linear.out_features,
            use_bias=linear.use_bias,
            outliers=outliers,
            outlier_arithmetic=outlier_arithmetic,
            dtype=linear.dtype,
            param_dtype=linear.param_dtype,
            implementation=implementation,
            rngs=nnx.Rngs(0),
        )
        matrix = quantize(linear.kernel[...])
        # New variables: a value split over explicit axes cannot be written into zeros that are not.
        layer.codes, layer.scale = Quantized(matrix.codes), Quantized(matrix.scale)
        if linear.bias is not None:
            # A copy, since a training step may donate the buffers of the linear layer.
            layer.bias = linear.bias.copy(jnp.copy(linear.bias[...]))
        axes, others = _sharding_metadata(linear.kernel)
        if axes is None:
            return layer
        k_axis, n_axis = axes
        layer.codes.set_metadata(out_sharding=(n_axis, k_axis), **others)
        layer.scale.set_metadata(out_sharding=(n_axis,), **others)
        if layer.bias is not None and not layer.bias.get_metadata("out_sharding", None):
            value = _placed_as(matrix.scale, layer.bias[...])
            layer.bias = layer.bias.copy(value, out_sharding=(n_axis,), **others)
        return layer


def _sharding_metadata(kernel: nnx.Variable) -> tuple[tuple[Any, Any] | None, dict[str, Any]]:
    """The names of a kernel's two axes, None without any, and the metadata by which they are read."""
    metadata = kernel.get_metadata()
    others = {name: metadata[name] for name in ("mesh", "sharding_rules") if name in metadata}
    axes = metadata.get("out_sharding")
    axes = getattr(axes, "sharding", axes)  # that of a Format, whose layout is not that of codes
    if isinstance(axes, NamedSharding):
        others["mesh"], axes = axes.mesh, axes.spec
    if not axes:
        return None, others
    k_axis, n_axis = (*axes, None, None)[:2]  # axes at the end may be left out
    return (k_axis, n_axis), others


def _placed_as(scale: jax.Array, bias: jax.Array) -> jax.Array:
    """The bias where the scale lies, so that optimisers, which go by metadata, find it where these say."""
    if isinstance(scale, jax.core.Tracer):  # only explicit axes are known
        sharding = jax.typeof(scale).sharding
        return bias if sharding.mesh.empty else jax.sharding.reshard(bias, sharding)
    return jax.device_put(bias, scale.sharding)
