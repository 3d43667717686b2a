"""Attention, rotary positions and ALiBi, as pure functions on arrays.

Many queries at once are a library's function: jax.nn's through cuDNN where it takes them, else a
block of queries at a time so that no block computes what it may not see. A single query's attention to
a cache is in step.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxint8.models.config import DecoderConfig

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
            if parts:  # or a compiler that runs all blocks side by side holds the scores of all
                query, parts[-1] = jax.lax.optimization_barrier((query, parts[-1]))
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
