"""Attention, rotary positions and ALiBi, as pure functions on arrays.

Many queries at once are a library's function: jax.nn's through cuDNN where it takes them, else a
block of queries at a time so that no block computes what it may not see. A single query is written
out: on a CPU, XLA would copy and transpose a layer's whole cache for the two small matrix products,
which costs several times what they do; on a GPU the sums that a CPU likes best do the same.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from jaxint8.models.config import DecoderConfig
from jaxint8.vectors import Held, Vectors, decode, encode, spread, spread_size

# Queries of a block: at least so many, and at most so many blocks, each being compiled by itself.
SMALLEST_BLOCK = 128
MOST_BLOCKS = 8


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Attention of t tokens to s slots.

    Args:
        query: float[b, t, heads, head_dim].
        key: the same dtype, [b, s, kv_heads, head_dim]; ``heads`` is a multiple of ``kv_heads``.
        value: as ``key``.
        mask: bool[b, 1, t, s], what each token sees. Where t == s, the tokens are those in the
            slots, and a token sees none after its own; None: it sees all up to its own.
        bias: float32[b or 1, heads, 1, s], added to the scores of each slot (see `alibi_bias`).

    Returns:
        query.dtype[b, t, heads, head_dim]; softmax in float32.
    """
    if bias is None and _cudnn_takes(query, key, value, mask):
        return jax.lax.platform_dependent(
            query, key, value, mask, cuda=_attend_cudnn, default=_attend_in_blocks
        )
    return _attend_in_blocks(query, key, value, mask, bias)


def _attend_cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> jax.Array:
    # Where t == s no token sees a later one: cuDNN then leaves out what lies above the diagonal.
    causal = query.shape[1] == key.shape[1]
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=causal, implementation="cudnn"
        )


def _cudnn_takes(*arrays: jax.Array | None) -> bool:
    """Whether cuDNN is here, and has a kernel for `attend` of these on one device: 16 bits, few dimensions."""
    if not jax.sharding.get_abstract_mesh().empty:
        return False
    try:
        jax.eval_shape(_attend_cudnn, *arrays)
    except (NotImplementedError, RuntimeError, ValueError):
        return False
    return True


def _attend_in_blocks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None = None,
) -> jax.Array:
    t, s = query.shape[1], key.shape[1]
    if mask is None:
        mask = jnp.tril(jnp.ones((t, t), bool))[None, None]
    block = max(SMALLEST_BLOCK, -(-t // MOST_BLOCKS))
    # In 16 bits Flax would round the scores.
    attend_block = _attend_grouped if query.dtype == jnp.float32 else jax.nn.dot_product_attention
    parts = []
    # The functions themselves mix dtypes (a float32 softmax of bfloat16 products).
    with jax.numpy_dtype_promotion("standard"):
        for first in range(0, t, block):
            last = min(first + block, t)
            seen = last if t == s else s
            parts.append(
                attend_block(
                    query[:, first:last],
                    key[:, :seen],
                    value[:, :seen],
                    bias=None if bias is None else bias[..., :seen],
                    mask=mask[:, :, first:last, :seen],
                )
            )
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _attend_grouped(
    query: jax.Array, key: jax.Array, value: jax.Array, *, bias: jax.Array | None, mask: jax.Array
) -> jax.Array:
    """`attend` by Flax, to which the query heads that share keys are rows of one head.

    jax.nn asks for the product of values and softmax with the values first, for which XLA:CPU
    transposes the whole softmax: a quarter of the time of attention. Flax lets the order be chosen.
    """
    b, t, heads, width = query.shape
    s, kv_heads = key.shape[1:3]
    group = heads // kv_heads

    def grouped(x: jax.Array) -> jax.Array:
        """[b, heads, t or 1, s] as [b, kv_heads, 1, group * t, s]."""
        x = jnp.broadcast_to(x, (b, heads, t, s))
        return x.reshape(b, kv_heads, 1, group * t, s)

    rows = query.reshape(b, t, kv_heads, group, width)
    rows = jnp.transpose(rows, (0, 2, 3, 1, 4)).reshape(b, kv_heads, group * t, 1, width)
    y = nn.dot_product_attention(
        rows,
        jnp.swapaxes(key, 1, 2)[:, :, :, None],
        jnp.swapaxes(value, 1, 2)[:, :, :, None],
        bias=None if bias is None else grouped(bias),
        mask=grouped(mask),
        qk_attn_weights_einsum=_keys_as_they_lie,
        attn_weights_value_einsum=_softmax_first,
    )
    y = y.reshape(b, kv_heads, group, t, width)
    return jnp.transpose(y, (0, 3, 1, 2, 4)).reshape(query.shape)


def _keys_as_they_lie(subscripts: str, query: jax.Array, key: jax.Array) -> jax.Array:
    """The product that Flax calls "...qhd,...khd->...hqk", of one head, along rows of both.

    Flax's own would have XLA:CPU transpose all keys for every block of queries.
    """
    del subscripts
    rows, keys = jnp.squeeze(query, -2), jnp.squeeze(key, -2)
    return jnp.expand_dims(jnp.einsum("...qd,...kd->...qk", rows, keys), -3)


def _softmax_first(subscripts: str, share: jax.Array, value: jax.Array) -> jax.Array:
    """The sum that Flax calls "...hqk,...khd->...qhd", as a product with `share` on the left."""
    del subscripts
    return jnp.swapaxes(jnp.einsum("...hqk,...khd->...hqd", share, value), -2, -3)


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
    put = jax.lax.dynamic_update_slice
    if isinstance(keys, Vectors) or isinstance(values, Vectors):
        assert isinstance(keys, Vectors)
        assert isinstance(values, Vectors)
        new, new_value = encode(spread(key)), encode(value)
        return (
            Vectors(
                put(keys.codes, jnp.swapaxes(new.codes, 1, 2), (0, 0, slot, 0)),
                put(keys.scale, jnp.swapaxes(new.scale, 1, 2), (0, 0, slot)),
            ),
            Vectors(
                put(values.codes, jnp.transpose(new_value.codes, (0, 2, 3, 1)), (0, 0, 0, slot)),
                put(values.scale, jnp.swapaxes(new_value.scale, 1, 2), (0, 0, slot)),
            ),
        )
    new_keys, new_values = jnp.transpose(key, (0, 2, 3, 1)), jnp.swapaxes(value, 1, 2)
    return put(keys, new_keys, (0, 0, 0, slot)), put(values, new_values, (0, 0, slot, 0))


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


def alibi_slopes(heads: int) -> np.ndarray:
    """Returns the slope of every head, float32[heads] (Press et al. 2022, section 3).

    A geometric series from 2^(-8 / heads) for a power of two; other counts take the series of the
    power below, and then every second slope of the power above (the authors' released code).
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4.0 / power * np.arange(1, 2 * (heads - power), 2))
    return np.concatenate([slopes, between]).astype(np.float32)


def alibi_bias(slopes: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns the bias of each slot, float32[b, heads, 1, s], for the slots' positions int32[b, s].

    The bias that a query sees falls with its distance from a slot; that is a rise with the slot's
    position, less what all slots of a query share, which a softmax does not see.
    """
    return slopes[None, :, None, None] * positions[:, None, None].astype(jnp.float32)


def rope_frequencies(config: DecoderConfig) -> np.ndarray:
    """Returns the angle per position of each rotary pair, scaled; float32[head_dim / 2]."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequency = (1.0 / np.float32(config.rope_theta) ** exponent).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    slow = frequency / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return slow
    # How many turns a pair makes over the original context decides between slow and unchanged.
    turns = scaling.original_positions * frequency / np.float32(2 * np.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - share) * slow + share * frequency).astype(np.float32)


def rope_tables(
    config: DecoderConfig, positions: jax.Array, factors: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine of every token's angles, float32[b, t, 1, head_dim / 2] each.

    Args:
        config: the decoder.
        positions: int32[b, t].
        factors: divisors of the frequencies [head_dim / 2], where the checkpoint has them.
    """
    frequency = jnp.asarray(rope_frequencies(config))
    if factors is not None:
        frequency /= factors.astype(jnp.float32)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair (i, i + head_dim / 2) of x[b, t, heads, head_dim] by its angle."""
    cosine, sine = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
