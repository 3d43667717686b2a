"""The key-value cache of a decoder: preallocated arrays that a jitted step updates in place.

Attention reads a layer's whole arrays, so a step costs as much as the cache is *long*, not as much
as it could become: a cache starts as long as the prompt and grows by a half when full. Rows of
a batch are aligned at their ends (left padding), so that one scalar says where the next token of
every row goes.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxint8.models.config import DecoderConfig, QuantizationConfig
from jaxint8.vectors import Held, Vectors

# Shorter caches save nothing: at this length a step's attention is a few percent of its time, and
# every length is a program to compile.
SMALLEST_CAPACITY = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer.

    Invariants: slots ``start[row] <= slot < length`` of a row hold its tokens, in order; slots
        before
    are padding; those from ``length`` on are free. A row's token in slot ``s`` has position
    ``s - start[row]``.
    """

    # One array for each layer, keys [b, kv_heads, head_dim, capacity], values [b, kv_heads,
    # capacity, head_dim]: heads outside, an axis to shard; and for a single query both products of
    # attention then run along the last axis, which a vector unit reads without a transpose.
    # Or int8 vectors: keys (spread) [b, kv_heads, capacity, head_dim], values [b, kv_heads,
    # head_dim, capacity], what is added up last, as products of int8 want it; scale [b, kv_heads,
    # capacity].
    keys: list[Held]
    values: list[Held]
    # int32[b]: padding slots of each row.
    start: jax.Array
    # int32[]: slots in use, the same for every row.
    length: jax.Array

    @property
    def capacity(self) -> int:
        """Slots in all."""
        return capacity_of(self.values[0])


def capacity_of(values: Held) -> int:
    """Returns the slots of a layer's values."""
    return values.scale.shape[2] if isinstance(values, Vectors) else values.shape[2]


def is_coded(quantization: QuantizationConfig | None) -> bool:
    """Whether a decoder's attention sees int8 keys and values."""
    return quantization is not None and quantization.kv_cache == "int8"


def init_cache(
    config: DecoderConfig,
    capacity: int,
    start: jax.Array,
    dtype: DTypeLike,
    quantization: QuantizationConfig | None = None,
) -> KVCache:
    """Returns an empty cache.

    Args:
        config: the decoder.
        capacity: slots per row.
        start: int32[b], how many tokens of left padding each row will have.
        dtype: dtype of keys and values that are not int8, that of the activations.
        quantization: how the decoder is carried out, which says whether they are.

    """
    rows, heads, width = start.shape[0], config.kv_heads, config.head_dim
    coded = is_coded(quantization)
    lengthwise, across = (rows, heads, capacity, width), (rows, heads, width, capacity)

    def empty(shape: tuple[int, ...]) -> Held:
        if not coded:
            return jnp.zeros(shape, dtype)
        scale = jnp.zeros((rows, heads, capacity), jnp.float32)
        return Vectors(jnp.zeros(shape, jnp.int8), scale)

    return KVCache(
        keys=[empty(lengthwise if coded else across) for _ in range(config.layers)],
        values=[empty(across if coded else lengthwise) for _ in range(config.layers)],
        start=start.astype(jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def grow_cache(cache: KVCache, capacity: int) -> KVCache:
    """Returns the same cache with more free slots (one copy; amortised when capacities double)."""

    def longer(held: jax.Array, axis: int) -> jax.Array:
        extra = (0, capacity - held.shape[axis])
        return jnp.pad(held, [extra if i == axis else (0, 0) for i in range(held.ndim)])

    def grown(held: Held, axis: int) -> Held:
        if isinstance(held, Vectors):  # its slots are the other of the last two axes
            return Vectors(longer(held.codes, 5 - axis), longer(held.scale, 2))
        return longer(held, axis)

    return dataclasses.replace(
        cache, keys=[grown(k, 3) for k in cache.keys], values=[grown(v, 2) for v in cache.values]
    )


def capacity_for(length: int) -> int:
    """Returns the capacity of a cache that must hold ``length`` slots: four for each power of two.

    Every step reads what is beyond ``length`` in vain.
    """
    step = max(SMALLEST_CAPACITY // 2, (1 << (length - 1).bit_length()) // 8)
    return max(SMALLEST_CAPACITY, -(-length // step) * step)


def rounded_length(length: int, smallest: int) -> int:
    """Returns the next power of two, or one and a half of one; both at least ``smallest``.

    Every length is a program to compile, and what is beyond ``length`` is computed in vain.
    """
    power = max(smallest, 1 << (length - 1).bit_length())
    shorter = power // 4 * 3
    return shorter if shorter >= smallest and length <= shorter else power
