"""A token's attention to an int8 cache as one kernel: rotation, codes, storing them, scores, softmax and sum of values.

The kernel exists for what lies between: on a GPU a decoder's attention to one token is several kernels of XLA's, which
read an int8 cache no faster than one of 16 bits. The query is an integer too, as outliers are (128 * hi + lo), and so
are the shares of values, so both products are exact sums of bytes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxint8 import kernels
from jaxint8.shards import vary_like
from jaxint8.vectors import Vectors

TARGET = "jaxint8_attend"
HEAD_DIMS = (64, 128)
QUERIES_MOST = 8
"""The kernels' limits: the dimensions of a head, and how many query heads share keys."""


class Token(NamedTuple):
    """What a token brings to attention.

    Attributes:
      qkv: float[b, (heads + 2 * kv_heads) * d], the heads of q, then those of k, then those of v.
      rope: cosine and sine of its angles, float32[b, d / 2] each, or None without rotary positions.
      start: int32[b], the first slot that is seen.
      slot: int32[], the last: where its own key and value go.
    """

    qkv: jax.Array
    rope: tuple[jax.Array, jax.Array] | None
    start: jax.Array
    slot: jax.Array


def kernel_platforms(width: int, values: Vectors) -> tuple[kernels.Platform, ...]:
    """The platforms that have a kernel for tokens of so many values and a cache int8[b, kv_heads, d, slots]."""
    _, kv_heads, d, slots = values.codes.shape
    queries = width // d - 2 * kv_heads
    if d not in HEAD_DIMS or queries > QUERIES_MOST * kv_heads or slots % 32:
        return ()
    return kernels.platforms(TARGET)


def attend(token: Token, keys: Vectors, values: Vectors) -> tuple[jax.Array, Vectors, Vectors]:
    """Stores a token's key and value and attends to all that it sees; the function of `reference.attend`.

    The arrays of the cache are updated in place where nobody else needs them. Codes and scales have the same bits
    everywhere, for the same ``qkv``. Outputs are those of a softmax in float32 (the tests derive how far off they may
    be): on a CPU a row's bits depend on that row alone, on CUDA also on how many rows there are, which say how many
    blocks share a head.

    Args:
      token: the token.
      keys: codes int8[b, kv_heads, slots, d] of spread keys, scale float32[b, kv_heads, slots].
      values: codes int8[b, kv_heads, d, slots], scale float32[b, kv_heads, slots].

    Returns:
      qkv.dtype[b, heads * d], and keys and values with the token's.
    """
    b, kv_heads, d, _ = values.codes.shape
    heads = token.qkv.shape[-1] // d - 2 * kv_heads
    none = jnp.zeros((0, 0), jnp.float32)
    cosine, sine = (none, none) if token.rope is None else token.rope
    cache = (keys.codes, keys.scale, values.codes, values.scale)
    operands = (token.qkv, cosine, sine, token.start, token.slot.reshape(1), *cache)
    results = [jax.ShapeDtypeStruct((b, heads * d), token.qkv.dtype)]
    results += [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in cache]
    aliases = {5 + i: 1 + i for i in range(len(cache))}
    y, *held = kernels.call_target(TARGET, results, operands, {}, aliases)
    y, *held = (vary_like(a, *operands) for a in (y, *held))
    return y, Vectors(*held[:2]), Vectors(*held[2:])
