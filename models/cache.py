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

from jaxint8.models.config import DecoderConfig

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
    keys: list[jax.Array]
    values: list[jax.Array]
    # int32[b]: padding slots of each row.
    start: jax.Array
    # int32[]: slots in use, the same for every row.
    length: jax.Array

    @property
    def capacity(self) -> int:
        """Slots in all."""
        return self.values[0].shape[2]


def init_cache(config: DecoderConfig, capacity: int, start: jax.Array, dtype: DTypeLike) -> KVCache:
    """Returns an empty cache.

    Args:
        config: the decoder.
        capacity: slots per row.
        start: int32[b], how many tokens of left padding each row will have.
        dtype: dtype of keys and values, that of the activations.

    """
    rows, heads, width = start.shape[0], config.kv_heads, config.head_dim
    return KVCache(
        keys=[jnp.zeros((rows, heads, width, capacity), dtype) for _ in range(config.layers)],
        values=[jnp.zeros((rows, heads, capacity, width), dtype) for _ in range(config.layers)],
        start=start.astype(jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def grow_cache(cache: KVCache, capacity: int) -> KVCache:
    """Returns the same cache with more free slots (one copy; amortised when capacities double)."""
    none, extra = (0, 0), (0, capacity - cache.capacity)
    return dataclasses.replace(
        cache,
        keys=[jnp.pad(k, (none, none, none, extra)) for k in cache.keys],
        values=[jnp.pad(v, (none, none, extra, none)) for v in cache.values],
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
