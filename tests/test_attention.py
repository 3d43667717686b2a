"""Attention in blocks and for one query, against the plain definition in float64."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxint8 import reference
from jaxint8.models.attention import (
    MOST_BLOCKS,
    SMALLEST_BLOCK,
    alibi_bias,
    alibi_slopes,
    attend,
)
from jaxint8.models.step import _attend_one, attend_one, held, store
from jaxint8.vectors import Vectors, decode, encode, rounded, spread

# (tokens, heads, kv_heads): one block, a block and a bit, several, more than the most blocks.
SHAPES = [(1, 2, 1), (5, 4, 2), (129, 2, 2), (300, 6, 2), (SMALLEST_BLOCK * MOST_BLOCKS + 37, 2, 1)]


def plain(query, key, value, mask, slopes=None) -> np.ndarray:
    """Softmax(q k / sqrt(d) - slope * distance) v, head by head, in float64."""
    b, t, heads, width = query.shape
    group = heads // key.shape[2]
    out = np.zeros((b, t, heads, width))
    for head in range(heads):
        k, v = (np.asarray(a[:, :, head // group], np.float64) for a in (key, value))
        scores = np.asarray(query[:, :, head], np.float64) @ k.swapaxes(1, 2) / width**0.5
        if slopes is not None:
            rows = np.arange(key.shape[1] - t, key.shape[1])[:, None]
            scores -= slopes[head] * (rows - np.arange(key.shape[1]))
        scores = np.where(mask[:, 0], scores, -np.inf)
        share = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[:, :, head] = share / share.sum(axis=-1, keepdims=True) @ v
    return out


def inputs(t: int, slots: int, heads: int, kv_heads: int) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(t + heads)
    shapes = [(2, t, heads, 8), (2, slots, kv_heads, 8), (2, slots, kv_heads, 8)]
    return tuple(jnp.asarray(rng.normal(size=s) * 2, jnp.float32) for s in shapes)


@pytest.mark.parametrize(("t", "heads", "kv_heads"), SHAPES)
def test_causal(t: int, heads: int, kv_heads: int) -> None:
    query, key, value = inputs(t, t, heads, kv_heads)
    mask = np.tril(np.ones((t, t), bool))[None, None]
    # Sums of up to a thousand float32 terms that are each at most about 8.
    np.testing.assert_allclose(
        jax.jit(attend)(query, key, value, None), plain(query, key, value, mask), atol=2e-5
    )


def test_left_padding_in_blocks() -> None:
    t = 2 * SMALLEST_BLOCK + 9
    query, key, value = inputs(t, t, 2, 1)
    start = np.array([0, 140])
    row, slot = np.arange(t)[:, None], np.arange(t)
    mask = ((slot <= row) & (slot >= start[:, None, None]))[:, None]
    found = jax.jit(attend)(query, key, value, jnp.asarray(mask))
    assert np.isfinite(found).all()
    expected = plain(query, key, value, mask | ~mask.any(axis=-1, keepdims=True))
    np.testing.assert_allclose(found[0], expected[0], atol=2e-5)
    np.testing.assert_allclose(found[1, 140:], expected[1, 140:], atol=2e-5)


def test_tokens_after_others() -> None:
    query, key, value = inputs(7, 50, 4, 2)
    mask = (np.arange(50) <= 30 + np.arange(7)[:, None])[None, None].repeat(2, 0)
    found = jax.jit(attend)(query, key, value, jnp.asarray(mask))
    np.testing.assert_allclose(found, plain(query, key, value, mask), atol=2e-5)


@pytest.mark.parametrize("function", [attend_one, _attend_one], ids=["here", "products"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_one_token(function: Callable[..., jax.Array], heads: int, kv_heads: int) -> None:
    query, key, value = inputs(1, 40, heads, kv_heads)
    mask = np.zeros((2, 1, 1, 40), bool)
    mask[0, ..., 3:31] = True
    mask[1, ..., 30:31] = True
    empty = (jnp.zeros((2, kv_heads, 8, 40)), jnp.zeros((2, kv_heads, 40, 8)))
    keys, values = store(empty, key, value, 0)
    attend = jax.jit(function, static_argnums=4)
    found = attend(query, keys, values, jnp.asarray(mask), None)
    np.testing.assert_allclose(found, plain(query, key, value, mask), atol=2e-5)
    # What is not seen does not matter, as long as it is finite.
    other = (keys.at[..., 31:].set(1e30), values.at[:, :, 31:].set(-7.0))
    assert (attend(query, *other, jnp.asarray(mask), None) == found).all()


def empty_codes(b: int, kv_heads: int, slots: int, d: int) -> tuple[Vectors, Vectors]:
    scale = jnp.zeros((b, kv_heads, slots), jnp.float32)
    return (
        Vectors(jnp.zeros((b, kv_heads, slots, d), jnp.int8), scale),
        Vectors(jnp.zeros((b, kv_heads, d, slots), jnp.int8), scale),
    )


@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(4, 4, 8), (6, 2, 24), (3, 1, 64)])
def test_one_token_of_codes(heads: int, kv_heads: int, d: int) -> None:
    rng = np.random.default_rng(d)
    query, key, value = (
        jnp.asarray(rng.normal(size=(2, t, h, d)) * 2, jnp.float32)
        for t, h in ((1, heads), (40, kv_heads), (40, kv_heads))
    )
    keys, values = store(empty_codes(2, kv_heads, 40, d), key, value, 0)
    assert isinstance(keys, Vectors)
    assert isinstance(values, Vectors)
    np.testing.assert_array_equal(decode(keys), jnp.swapaxes(decode(encode(spread(key))), 1, 2))
    seen = np.zeros((2, 40), bool)
    seen[0, 3:31], seen[1, 30] = True, True
    mask = jnp.asarray(seen)[:, None, None]
    found = jax.jit(attend_one)(query, keys, values, mask)
    parts = [(np.asarray(v.codes), np.asarray(v.scale)) for v in (keys, values)]
    expected = reference.attend(np.asarray(query[:, 0]), *parts, seen)
    np.testing.assert_allclose(found[:, 0], expected, atol=2e-5)
    # And it is what prompts see: attention to what is left of keys and values.
    again = held((keys, values), jnp.float32)
    np.testing.assert_allclose(again[0], rounded(key, spreading=True), atol=1e-5)
    np.testing.assert_array_equal(again[1], rounded(value))
    np.testing.assert_allclose(found, plain(query, *again, np.asarray(mask)), atol=2e-5)
    # What is not seen does not matter, not even where it is no number.
    hidden = jnp.asarray(~seen)[:, None]
    other = [Vectors(v.codes, jnp.where(hidden, jnp.nan, v.scale)) for v in (keys, values)]
    np.testing.assert_array_equal(jax.jit(attend_one)(query, *other, mask), found)


def test_alibi_slopes_are_those_of_the_paper() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    np.testing.assert_allclose(alibi_slopes(16)[:3], [2**-0.5, 2**-1, 2**-1.5], rtol=1e-6)
    # No power of two: the slopes of 8 heads, and every second one of 16.
    twelve = [2.0**-i for i in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    np.testing.assert_allclose(alibi_slopes(12), twelve, rtol=1e-6)


def test_alibi_falls_with_distance() -> None:
    t = SMALLEST_BLOCK + 9
    query, key, value = inputs(t, t, 6, 2)
    bias = alibi_bias(
        jnp.asarray(alibi_slopes(6)), jnp.arange(t, dtype=jnp.int32)[None].repeat(2, 0)
    )
    mask = np.tril(np.ones((t, t), bool))[None, None]
    expected = plain(query, key, value, mask, alibi_slopes(6))
    # The bias reaches 70, whose float32 neighbours are 8e-6 apart.
    np.testing.assert_allclose(jax.jit(attend)(query, key, value, None, bias), expected, atol=5e-5)
    keys, values = jnp.transpose(key, (0, 2, 3, 1)), jnp.swapaxes(value, 1, 2)
    for function in (attend_one, _attend_one):
        last = jax.jit(function)(query[:, -1:], keys, values, jnp.asarray(mask[:, :, -1:]), bias)
        np.testing.assert_allclose(last, expected[:, -1:], atol=5e-5)


def test_bfloat16_is_summed_in_float32() -> None:
    query, key, value = (a.astype(jnp.bfloat16) for a in inputs(1, 200, 2, 1))
    mask = np.ones((2, 1, 1, 200), bool)
    keys, values = jnp.transpose(key, (0, 2, 3, 1)), jnp.swapaxes(value, 1, 2)
    found = jax.jit(attend_one)(query, keys, values, jnp.asarray(mask))
    assert found.dtype == jnp.bfloat16
    expected = plain(query, key, value, mask)
    # One rounding to 8 bits, at the end.
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2**-8, atol=1e-4)
    # As matrix products: one more of every share, which moves no sum by more than 2^-9 of abs(value).
    found = jax.jit(_attend_one)(query, keys, values, jnp.asarray(mask), None)
    moved = 2**-9 * plain(query, key, jnp.abs(value), mask)
    error = np.abs(found.astype(np.float32) - expected)
    assert (error <= 2**-8 * np.abs(expected) + moved + 1e-4).all()
