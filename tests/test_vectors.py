"""Int8 vectors of a cache: codes and sums to the bit of the oracle, and what spreading is for."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxint8 import reference
from jaxint8.vectors import Vectors, decode, encode, rounded, spread, spread_size

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 5, 12, 64, 96, 128])
def test_codes_and_sums_are_the_oracles(d: int, dtype: type) -> None:
    x = np.random.default_rng(d).normal(scale=3, size=(3, 2, 7, d)).astype(dtype)
    x[0, 0, 0] = 0
    sums = jax.jit(spread)(jnp.asarray(x))
    assert sums.dtype == jnp.float32
    np.testing.assert_array_equal(sums, reference.spread(x))
    for vectors in (x, reference.spread(x)):
        found = jax.jit(encode)(jnp.asarray(vectors))
        codes, _, scale = reference.quantize_rows(vectors.reshape(-1, d), None)
        np.testing.assert_array_equal(found.codes, codes.reshape(x.shape))
        np.testing.assert_array_equal(found.scale, scale.reshape(x.shape[:-1]))


def test_spreading_twice_multiplies() -> None:
    assert [spread_size(d) for d in (1, 5, 12, 64, 96, 128)] == [1, 1, 4, 64, 32, 128]
    x = np.random.default_rng(0).integers(-99, 99, (4, 96)).astype(np.float32)
    np.testing.assert_array_equal(spread(spread(jnp.asarray(x))), 32 * x)


def test_a_vector_that_is_not_finite_shows() -> None:
    x = np.ones((3, 64), np.float32)
    x[1, 7] = np.nan
    x[2, 9] = np.inf
    found = encode(spread(jnp.asarray(x)))
    assert np.isnan(found.scale).tolist() == [False, True, True]
    assert not found.codes[1:].any()
    assert np.isnan(rounded(jnp.asarray(x), spreading=True)[1:]).all()


@pytest.mark.parametrize("spreading", [False, True])
def test_rounding_is_within_half_a_code(spreading: bool) -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(50, 96)), jnp.float32)
    held = spread(x) if spreading else x
    half = np.max(np.abs(held), axis=-1, keepdims=True) / 127 / 2
    assert (np.abs(decode(encode(held)) - held) <= half * (1 + 1e-5)).all()
    # Each dimension is a mean, with signs, of 32 that are half a code off at most.
    assert (np.abs(rounded(x, spreading=spreading) - x) <= half * (1 + 1e-4)).all()


def test_spreading_is_for_a_few_large_dimensions() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(100, 64)).astype(np.float32)
    x[:, [3, 40]] *= 20
    plain, spreading = (
        np.sqrt(np.mean((np.asarray(rounded(jnp.asarray(x), spreading=s)) - x) ** 2))
        for s in (False, True)
    )
    assert spreading < plain / 2


def test_vectors_are_a_pytree() -> None:
    vectors = encode(jnp.ones((2, 8)))
    doubled = jax.tree.map(lambda a: a + a, vectors)
    assert isinstance(doubled, Vectors)
    assert doubled.codes.dtype == jnp.int8
