"""A layer's part of a cache: storing new tokens, and a single token's attention to all.

A single query is written out: on a CPU, XLA would copy and transpose a layer's whole cache for the two small matrix
products, which costs several times what they do; on a GPU the sums that a CPU likes best do the same. To an int8 cache
it is a kernel where there is one (`jaxint8.attend`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxint8.vectors import Held, Vectors, decode, encode, spread, spread_size


def attend_one(
    query: jax.Array,
    keys: Held,
    values: Held,
    mask: jax.Array,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Attention of one token per row to a cache; sums of products and softmax in float32.

    Args:
        query: float[b, 1, heads, head_dim].
        keys: the same dtype, [b, kv_heads, head_dim, slots], finite in all slots, unseen ones too.
        values: the same dtype, [b, kv_heads, slots, head_dim]. Or both int8, see `_attend_one_coded`.
        mask: bool[b, 1, 1, slots]; every token sees at least one slot.
        bias: float32[b, heads, 1, slots], added to the scores.

    Returns:
        query.dtype[b, 1, heads, head_dim].
    """
    if isinstance(keys, Vectors) or isinstance(values, Vectors):
        assert isinstance(keys, Vectors)
        assert isinstance(values, Vectors)
        return _attend_one_coded(query, keys, values, mask, bias)
    arrays = (query, keys, values, mask, bias)
    return jax.lax.platform_dependent(*arrays, cpu=_attend_one_by_sums, default=_attend_one)


def _attend_one(
    query: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """Two matrix products for each key-value head, the query heads that share it as their rows.

    In bfloat16 the softmax is rounded before the second, as in jax.nn.dot_product_attention; that
    function would hold another copy of the keys, for they lie transposed to what it expects.
    """
    b, _, heads, width = query.shape
    grouped = query.reshape(b, keys.shape[1], heads // keys.shape[1], width)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("bkgd,bkds->bkgs", grouped, keys) * np.float32(width**-0.5)
    if bias is not None:
        scores += bias.reshape(scores.shape)
    share = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    y = product("bkgs,bksd->bkgd", share.astype(values.dtype), values)
    return y.reshape(query.shape).astype(query.dtype)


def _attend_one_by_sums(
    query: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, bias: jax.Array | None
) -> jax.Array:
    b, _, heads, width = query.shape
    group = (b, keys.shape[1], heads // keys.shape[1], width, 1)
    scaled = query.astype(jnp.float32).reshape(group) * np.float32(width**-0.5)
    # Minus infinity is added to what is not seen, which all layers share: with a select of scores, XLA:CPU would not do
    # the products, their maximum and the exponentials in one pass. So scores must be finite: free slots hold zeros.
    seen = jnp.where(mask, np.float32(0), -jnp.inf)
    if bias is not None:
        seen = (seen + bias).reshape(*group[:3], keys.shape[-1])
    scores = jnp.sum(scaled * keys[:, :, None].astype(jnp.float32), axis=3) + seen
    share = jax.nn.softmax(scores, axis=-1)
    y = jnp.sum(share[..., None] * values[:, :, None].astype(jnp.float32), axis=3)
    return y.reshape(query.shape).astype(query.dtype)


def _attend_one_coded(
    query: jax.Array,
    keys: Vectors,
    values: Vectors,
    mask: jax.Array,
    bias: jax.Array | None,
) -> jax.Array:
    """`attend_one` of an int8 cache; the function of `reference.attend`, for any platform.

    Scales stand outside of both products, one for each slot, so that these take codes as they are.

    Args:
        query: float[b, 1, heads, head_dim].
        keys: codes int8[b, kv_heads, slots, head_dim], spread; scale float32[b, kv_heads, slots].
        values: codes int8[b, kv_heads, head_dim, slots]; scale float32[b, kv_heads, slots].
        mask: bool[b, 1, 1, slots]; every token sees at least one slot.
        bias: float32[b, heads, 1, slots], added to the scores.

    Returns:
        query.dtype[b, 1, heads, head_dim].
    """
    b, _, heads, width = query.shape
    kv_heads = values.codes.shape[1]
    grouped = spread(query).astype(query.dtype).reshape(b, kv_heads, heads // kv_heads, width)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("bkgd,bksd->bkgs", grouped, keys.codes.astype(query.dtype))
    scores *= (keys.scale * np.float32(width**-0.5 / spread_size(width)))[:, :, None]
    if bias is not None:
        scores += bias.reshape(scores.shape)
    share = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    # A slot that is not seen has no share of values, be they what they may.
    share = jnp.where(mask, share * values.scale[:, :, None], 0).astype(query.dtype)
    y = product("bkgs,bkds->bkgd", share, values.codes.astype(query.dtype))
    return y.reshape(query.shape).astype(query.dtype)


def store(
    stored: tuple[Held, Held],
    key: jax.Array,
    value: jax.Array,
    slot: jax.Array | int,
) -> tuple[Held, Held]:
    """Writes key and value [b, t, kv_heads, head_dim] of new tokens into a layer's cache."""
    keys, values = stored
    put = jax.lax.dynamic_update_slice_in_dim
    if isinstance(keys, Vectors) or isinstance(values, Vectors):
        assert isinstance(keys, Vectors)
        assert isinstance(values, Vectors)
        new, new_value = encode(spread(key)), encode(value)
        return (
            Vectors(
                put(keys.codes, jnp.swapaxes(new.codes, 1, 2), slot, 2),
                put(keys.scale, jnp.swapaxes(new.scale, 1, 2), slot, 2),
            ),
            Vectors(
                put(values.codes, jnp.transpose(new_value.codes, (0, 2, 3, 1)), slot, 3),
                put(values.scale, jnp.swapaxes(new_value.scale, 1, 2), slot, 2),
            ),
        )
    new_keys, new_values = jnp.transpose(key, (0, 2, 3, 1)), jnp.swapaxes(value, 1, 2)
    return put(keys, new_keys, slot, 3), put(values, new_values, slot, 2)


def held(stored: tuple[Held, Held], dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Returns what a layer's cache holds as key and value ``dtype``[b, slots, kv_heads, head_dim]."""
    keys, values = stored
    if isinstance(keys, Vectors) or isinstance(values, Vectors):
        assert isinstance(keys, Vectors)
        assert isinstance(values, Vectors)
        size = spread_size(keys.codes.shape[-1])
        key = (spread(decode(keys)) * np.float32(1 / size)).astype(dtype)
        across = Vectors(jnp.swapaxes(values.codes, 2, 3), values.scale)
        return jnp.swapaxes(key, 1, 2), jnp.swapaxes(decode(across, dtype), 1, 2)
    return jnp.transpose(keys, (0, 3, 1, 2)), jnp.swapaxes(values, 1, 2)
