"""Correctly rounded quotients and roots from those of a platform that is wrong by some units in the last place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxint8 import rounding

COUNT = 200_000


def floats(rng, least, most, count=COUNT):
    """Normal positive float32 of all mantissas, those near the ends of a binade more often than by chance."""
    mantissa = rng.integers(0, 1 << 23, count)
    edge = rng.integers(-3, 4, count) % (1 << 23)
    mantissa = np.where(rng.random(count) < 0.2, edge, mantissa)
    exponent = rng.integers(least + 127, most + 128, count)
    return (exponent << 23 | mantissa).astype(np.uint32).view(np.float32)


def moved(y, units):
    """The float so many units in the last place further from zero (magnitudes are bit patterns)."""
    return (y.view(np.uint32) + np.int64(units)).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("units", range(-3, 4))
def test_a_quotient_is_mended(units):
    rng = np.random.default_rng(units + 3)
    x, by = floats(rng, -40, 40), floats(rng, -40, 40)
    by[::3] = rng.choice(np.float32([127, 4095, 16256, 576, 4096, 3, 1]), by[::3].size)
    x[::2] *= np.float32(-1)
    # Quotients next to powers of two, where units change.
    x[::5] = by[::5] * floats(rng, 0, 0, x[::5].size)
    right = x / by
    made = jax.jit(rounding.correct_quotient)(x, by, moved(right, units))
    np.testing.assert_array_equal(made, right)


@pytest.mark.parametrize("units", range(-3, 4))
def test_a_root_is_mended(units):
    rng = np.random.default_rng(units + 3)
    x = floats(rng, -120, 120)
    x[::3] = rng.integers(1, 4096, x[::3].size).astype(np.float32) ** 2  # exact roots
    right = np.sqrt(x)
    made = jax.jit(rounding.correct_root)(x, moved(right, units))
    np.testing.assert_array_equal(made, right)


def test_what_is_no_normal_number_is_what_the_platform_makes_of_it():
    x = np.float32([0, -0.0, np.inf, -np.inf, np.nan, 3e38, 1e-38])
    by = np.float32([3, 3, 3, 3, 3, 1e-3, 1e30])
    near = np.float32([0, -0.0, np.inf, -np.inf, np.nan, np.inf, 0])
    made = np.asarray(rounding.correct_quotient(x, by, near))
    np.testing.assert_array_equal(made.view(np.uint32), near.view(np.uint32))
    roots = np.float32([0, np.inf, np.nan])
    np.testing.assert_array_equal(rounding.correct_root(roots, roots), roots)


def test_shapes_are_broadcast_and_a_constant_stays_a_divisor():
    """127 and 49 have reciprocals that are wrong for some x."""
    x = np.arange(1, 5000, dtype=np.float32)[:, None]
    for divisor in (127, 49, np.float32([[7, 49, 127]])):
        made = jax.jit(lambda x, d=divisor: rounding.divide(x, jnp.asarray(d)))(x)
        np.testing.assert_array_equal(made, x / np.float32(divisor))
    np.testing.assert_array_equal(jax.jit(rounding.sqrt)(x), np.sqrt(x))
