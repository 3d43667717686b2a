"""Where the tokens of a call stand: positions, what each may see, and the tables that follow from them.

Computed once for all layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxint8.models.attention import alibi_bias, alibi_slopes, rope_tables
from jaxint8.models.cache import KVCache
from jaxint8.models.config import DecoderConfig
from jaxint8.models.split import Split


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Place:
    """Where the tokens of one call stand, computed once for all layers."""

    # int32[]: slot of the cache where the first token goes.
    slot: jax.Array | int
    # int32[b, t] position of each token in its row; padding counts as 0.
    positions: jax.Array
    # int32[b]: the first slot that is no padding; None without a cache.
    start: jax.Array | None
    # bool[b, 1, t, slots]: what each token attends to; None when that is plainly causal.
    mask: jax.Array | None
    # float32[b, t, 1, head_dim / 2] each, or None without rotary positions.
    rope: tuple[jax.Array, jax.Array] | None
    # float32[b or 1, heads, 1, slots], or None without ALiBi.
    bias: jax.Array | None
    # bool[b, t, 1], False for padding; None when there is none.
    valid: jax.Array | None
    split: Split = dataclasses.field(metadata={"static": True})

    def only_tokens(self, x: jax.Array) -> jax.Array:
        """Puts zeros in the rows of padding.

        What a padding row holds can reach no other row through float arithmetic, but it would
        through outlier columns and tensor-wide scales, which look at every row of a call.
        """
        return x if self.valid is None else jnp.where(self.valid, x, jnp.zeros((), x.dtype))


def place(
    config: DecoderConfig,
    params: Mapping[str, Any],
    tokens: jax.Array,
    cache: KVCache | None,
    split: Split,
) -> Place:
    """Returns where int32[b, t] tokens stand: from position 0, or behind those of a cache."""
    b, t = tokens.shape
    offsets = jax.lax.broadcasted_iota(jnp.int32, (b, t), 1)
    if cache is None:
        slot, positions, mask, valid = 0, offsets, None, None
        seen = offsets[:1]
    else:
        slot, start = cache.length, cache.start[:, None]
        slots = slot + offsets
        positions = jnp.maximum(slots - start, 0)
        every = jax.lax.broadcasted_iota(jnp.int32, (1, 1, cache.capacity), 2)
        mask = ((every <= slots[:, :, None]) & (every >= start[:, :, None]))[:, None]
        seen = every[:, 0] - start
        # One token at a time is never padding.
        valid = (slots >= start)[:, :, None] if t > 1 else None
    factors = params.get("rope_factors")
    rope = None
    if config.positions == "rope":
        # Behind a barrier, or XLA computes every angle again in each head of each layer.
        rope = jax.lax.optimization_barrier(rope_tables(config, positions, factors))
    bias = None
    if config.positions == "alibi":
        bias = alibi_bias(split.of_heads(alibi_slopes, config.heads), seen)
    first = None if cache is None else cache.start
    return Place(slot, positions, first, mask, rope, bias, valid, split)
