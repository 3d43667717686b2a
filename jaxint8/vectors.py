"""Short vectors in int8, one scale each: the keys and values of a cache.

The surprising fact is what a key needs and a value does not: keys have a few dimensions many times as large as the
rest (the outlier features of the paper's section 4, in a head), which would leave few codes for the others. Sums and
differences of all dimensions, a Hadamard transform, spread them evenly, and a product of two vectors that have been
spread alike is that of the vectors times a power of two.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxint8.quantize import quantize_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vectors:
    """Vectors as codes, one scale each: codes * scale, as far as int8 goes.

    A pytree of two arrays, whose axes may be in any order that both agree on.

    Attributes:
      codes: int8, from -127 to 127.
      scale: float32, the axes of ``codes`` but that along a vector; NaN where a vector held a non-finite value.
    """

    codes: jax.Array
    scale: jax.Array


Held = jax.Array | Vectors
"""Keys or values of a layer in a cache: as activations are, or in int8."""


def encode(x: jax.Array) -> Vectors:
    """Quantises vectors by absmax, as rows of activations without outliers are (paper, section 3.1).

    Args:
      x: float[..., d], float32, bfloat16 or float16.

    Returns:
      codes int8[..., d] and scale float32[...]; see `reference.quantize_rows`.
    """
    rows = quantize_rows(x.reshape(-1, x.shape[-1]), None)
    return Vectors(rows.lo.reshape(x.shape), rows.scale.reshape(x.shape[:-1]))


def decode(vectors: Vectors, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Returns the vectors ``dtype``[..., d] that codes int8[..., d] stand for, computed in float32."""
    return (vectors.codes.astype(jnp.float32) * vectors.scale[..., None]).astype(dtype)


def spread_size(d: int) -> int:
    """Returns how many neighbouring dimensions `spread` adds up: the largest power of two that divides d."""
    return d & -d


def spread(x: jax.Array) -> jax.Array:
    """Replaces the dimensions of vectors by sums and differences of them, by turns (a Hadamard transform, unscaled).

    Twice the same gives the vectors times `spread_size`. Additions are in float32 and in a fixed order, neighbours
    first, so the bits are the same everywhere.

    Args:
      x: float[..., d].

    Returns:
      float32[..., d].
    """
    shape, span = x.shape, 1
    x = x.astype(jnp.float32)
    while span < spread_size(shape[-1]):
        pairs = x.reshape(*shape[:-1], shape[-1] // (2 * span), 2, span)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = jnp.stack([first + second, first - second], axis=-2).reshape(shape)
        span *= 2
    return x


def rounded(x: jax.Array, *, spreading: bool = False) -> jax.Array:
    """Returns what is left of vectors float[..., d] once they have been int8, in their dtype.

    Args:
      x: the vectors.
      spreading: whether they are spread while they are codes, as keys are.
    """
    if not spreading:
        return decode(encode(x), x.dtype)
    size = spread_size(x.shape[-1])
    return (spread(decode(encode(spread(x)))) * (1.0 / size)).astype(x.dtype)
