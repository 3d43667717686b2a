"""The compiled CPU kernels against the NumPy oracle, every rung, to the bit; the edges first."""

import re
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxint8 import RelativeThreshold, Threshold, TopK, kernels, reference

RUNGS = kernels.available_rungs()
DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
RULES = (
    None,
    Threshold(2.0, "token"),
    Threshold(2.0, "column"),
    RelativeThreshold(3.0, "token"),
    RelativeThreshold(4.0, "column"),
    TopK(1),
    TopK(8),
)
# (m, k, n): nothing in an axis, k around 4, 16 and 64, n around 16 and 64, m around each change of kernel.
SHAPES = (
    (0, 5, 7),
    (5, 0, 7),
    (100, 0, 7),
    (5, 7, 0),
    (1, 1, 1),
    (1, 3, 17),
    (1, 576, 960),
    (1, 1700, 66),
    (2, 64, 16),
    (3, 499, 65),
    (7, 63, 64),
    (8, 65, 15),
    (9, 4096, 33),
    (17, 768, 130),
    (64, 130, 48),
    (519, 129, 70),
)

pytestmark = pytest.mark.skipif(not RUNGS, reason="no compiled CPU kernels")


def activations(rng, m, k, dtype):
    """Rows of several magnitudes with a few large values, and the awkward ones: zeros, -0.0, a constant, NaN, inf."""
    x = rng.standard_normal((m, k)) * np.exp(rng.uniform(-3, 1, (m, 1)))
    x = np.where(rng.random((m, k)) < 0.01, 12 * x, x)
    if m >= 7 and k >= 2:
        x[1], x[2], x[3] = 0.0, -0.0, 3.0
        x[4, k // 2], x[5, k - 1] = np.nan, -np.inf
        x[6] = 6e-8  # subnormal in float16
    return x.astype(dtype)


def weights(rng, n, k):
    return (
        rng.integers(-128, 128, (n, k)).astype(np.int8),
        (rng.random(n) * 0.02).astype(np.float32),
        rng.standard_normal(n).astype(np.float32),
    )


def assert_equal(actual, expected):
    """Same dtype, same values; NaN equals NaN; 0.0 and -0.0 differ."""
    actual = np.asarray(actual)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    wide_actual, wide_expected = actual.astype(np.float64), expected.astype(np.float64)
    np.testing.assert_array_equal(wide_actual, wide_expected)
    number = ~np.isnan(wide_expected)
    np.testing.assert_array_equal(
        np.signbit(wide_actual)[number], np.signbit(wide_expected)[number]
    )


def check(x, codes, scale, bias, rule, rung):
    """Quantises and multiplies with one rung and compares everything with the oracle."""
    for actual, expected in zip(
        kernels.quantize_rows(jnp.asarray(x), rule, rung=rung),
        reference.quantize_rows(x, rule),
        strict=True,
    ):
        assert_equal(actual, expected)
    y = kernels.linear(jnp.asarray(x), codes, scale, bias, rule=rule, rung=rung)
    assert_equal(y, reference.int8_linear(x, codes, scale, bias, rule))


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_rule_equals_the_oracle(rung, shape):
    m, k, n = shape
    rng = np.random.default_rng(m + k + n)
    for i, rule in enumerate(RULES):
        x = activations(rng, m, k, DTYPES[i % 3])
        codes, scale, bias = weights(rng, n, k)
        check(x, codes, scale, bias if i % 2 else None, rule, rung)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_every_dtype_equals_the_oracle(rung, dtype):
    rng = np.random.default_rng(5)
    codes, scale, bias = weights(rng, 33, 200)
    for rule in (None, TopK(4), RelativeThreshold(2.0)):
        check(activations(rng, 12, 200, dtype), codes, scale, bias, rule, rung)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("m", [*range(1, 33), 47, 48, 49, 63, 64, 65, 127, 128, 129])
def test_product_is_exact_for_any_m(rung, m):
    rng = np.random.default_rng(m)
    a = rng.integers(-128, 128, (m, 200)).astype(np.int8)
    codes = rng.integers(-128, 128, (80, 200)).astype(np.int8)
    assert_equal(kernels.product(a, codes, rung=rung), reference.product(a, codes))


@pytest.mark.parametrize("rung", RUNGS)
def test_product_of_extreme_codes_is_exact(rung):
    for k in (4, 63, 4096, 131071):
        for left, right in ((-128, -128), (127, -128), (-127, 127), (-128, 127)):
            a = np.full((2, k), left, np.int8)
            codes = np.full((3, k), right, np.int8)
            expected = np.full((2, 3), left * right * k, np.int64).astype(np.int32)
            assert_equal(kernels.product(a, codes, rung=rung), expected)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize(
    "rule", [Threshold(0.0, "token"), TopK(10_000), TopK(65), Threshold(np.inf)], ids=str
)
def test_all_none_or_many_outliers(rung, m, rule):
    rng = np.random.default_rng(m)
    codes, scale, bias = weights(rng, 20, 700)
    check(activations(rng, m, 700, np.float32), codes, scale, bias, rule, rung)


@pytest.mark.parametrize("rung", RUNGS)
def test_outlier_codes_shrink_before_int32_overflows(rung):
    # 3000 equal outliers: 127 * 16256 * 3000 is about 2.9 times 2^31, so their codes must be smaller.
    x = np.full((2, 3000), 5.0, np.float32)
    codes = np.full((4, 3000), -127, np.int8)
    lo, hi, _ = reference.quantize_rows(x, Threshold(5.0, "token"))
    assert np.sum(128 * hi[0].astype(int) + lo[0]) < 2**31 / 127
    check(x, codes, np.ones(4, np.float32), None, Threshold(5.0, "token"), rung)


@pytest.mark.parametrize("rung", RUNGS)
def test_ties_of_rounding_and_of_selection(rung):
    # x / scale is k + 1/2 for every k, exactly and one unit to either side.
    half = np.arange(-126.5, 127.5, 1.0, dtype=np.float32)
    row = np.concatenate(
        [[np.float32(127)], half, np.nextafter(half, np.inf), np.nextafter(half, -np.inf)]
    )
    odd = np.float32(3.7)
    x = np.stack(
        [row, row * odd, row / odd, row * np.float32(1e-30), row * np.float32(1e30)]
    ).astype(np.float32)
    codes, scale, bias = weights(np.random.default_rng(0), 9, x.shape[1])
    for rule in (None, TopK(7), RelativeThreshold(1.5)):
        check(x, codes, scale, bias, rule, rung)
    flat = np.full(
        (3, 300), -2.0, np.float32
    )  # every magnitude ties: the first columns are the outliers
    flat[1, ::3] = 2.0
    _, hi, _ = kernels.quantize_rows(jnp.asarray(flat), TopK(5), rung=rung)
    assert np.array_equal(np.flatnonzero(np.asarray(hi[0])), np.arange(5))
    check(flat, codes[:, :300], scale, bias, TopK(5), rung)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize(
    "scale", [2.0**-149, 2.0**-126, 2.0**-125, 2.0**-118, 3e-36, 2.0**120, 3e38]
)
def test_tiny_and_huge_rows(rung, scale):
    rng = np.random.default_rng(1)
    x = (rng.uniform(-1, 1, (4, 130)) * scale).astype(np.float32)
    x[2] = np.sign(x[2]) * np.float32(scale)
    codes, _, _ = weights(rng, 5, 130)
    for rule in (
        None,
        TopK(3),
        RelativeThreshold(1.2),
        Threshold(float(np.float32(scale)) / 2, "token"),
    ):
        check(x, codes, np.full(5, 2.0**-100, np.float32), None, rule, rung)


@pytest.mark.parametrize("rung", RUNGS)
def test_a_bad_row_gives_nan_and_leaves_its_neighbours_alone(rung):
    rng = np.random.default_rng(2)
    codes, scale, _ = weights(rng, 40, 96)
    x = rng.standard_normal((12, 96)).astype(np.float32)
    for rule in RULES:
        clean = np.asarray(kernels.linear(np.delete(x, 6, 0), codes, scale, rule=rule, rung=rung))
        for value in (np.nan, np.inf, -np.inf):
            bad = x.copy()
            bad[6, 17] = value
            bad[6, 30] = 1e6  # may cast no vote in a column-scope rule
            y = np.asarray(kernels.linear(bad, codes, scale, rule=rule, rung=rung))
            assert np.isnan(y[6]).all()
            assert np.array_equal(np.delete(y, 6, 0), clean)


@pytest.mark.parametrize("rung", RUNGS)
def test_token_scope_rows_do_not_depend_on_the_batch(rung):
    rng = np.random.default_rng(3)
    codes, scale, bias = weights(rng, 100, 640)
    x = activations(rng, 70, 640, np.float32)
    for rule in (None, Threshold(2.0, "token"), RelativeThreshold(3.0), TopK(8)):
        for arithmetic in ("int15", "float"):
            whole = np.asarray(
                kernels.linear(x, codes, scale, bias, rule=rule, arithmetic=arithmetic, rung=rung)
            )
            for start, stop in ((0, 1), (8, 11), (9, 29), (40, 70)):
                part = kernels.linear(
                    x[start:stop], codes, scale, bias, rule=rule, arithmetic=arithmetic, rung=rung
                )
                assert np.array_equal(np.asarray(part), whole[start:stop], equal_nan=True)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_float_arithmetic(rung, rule):
    rng = np.random.default_rng(4)
    m, k, n = 24, 300, 70
    x = activations(rng, m, k, np.float32)
    codes, scale, bias = weights(rng, n, k)
    for actual, expected in zip(
        kernels.quantize_rows(jnp.asarray(x), rule, "float", rung=rung),
        reference.quantize_rows(x, rule, "float"),
        strict=True,
    ):
        assert_equal(actual, expected)
    y = kernels.linear(x, codes, scale, bias, rule=rule, arithmetic="float", rung=rung)
    expected = reference.int8_linear(x, codes, scale, bias, rule, "float")
    # c outlier terms summed in float32: each term carries 2 roundings, each addition one of at most the partial sum,
    # so the error is below (c + 2) * 2^-24 of the sum of magnitudes; twice that for the two additions after it.
    mask = reference.outlier_mask(x, rule)
    finite = np.isfinite(x).all(axis=1)
    magnitude = np.where(mask, np.abs(np.where(finite[:, None], x, 0)), 0).astype(np.float64)
    terms = magnitude @ np.abs(codes.T * scale[None, :].astype(np.float64))
    count = mask.sum(axis=1, keepdims=True)
    bound = (count + 2) * 2.0**-24 * terms + 3 * 2.0**-24 * (
        np.abs(np.nan_to_num(expected)) + terms + np.abs(bias)
    )
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    assert (np.abs(np.nan_to_num(np.asarray(y)) - np.nan_to_num(expected)) <= bound).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 20),
    k=st.integers(1, 140),
    n=st.integers(1, 40),
    rule=st.sampled_from(RULES),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_any_shape(m, k, n, rule, dtype, seed):
    rng = np.random.default_rng(seed)
    x = activations(rng, m, k, dtype)
    codes, scale, bias = weights(rng, n, k)
    check(x, codes, scale, bias, rule, None)


def test_large_products_use_several_threads_and_several_chunks():
    rng = np.random.default_rng(6)
    x = activations(rng, 1100, 1024, np.float32)
    codes, scale, bias = weights(rng, 192, 1024)
    for rule in (None, Threshold(4.0), RelativeThreshold(6.0)):
        check(x, codes, scale, bias, rule, None)


def test_more_than_two_to_the_31_elements():
    n, k = 32769, 65536  # codes of 2^31 + 2^16 bytes; only the last row is not zero
    set_last = jax.jit(lambda codes: codes.at[-1].set(1), donate_argnums=0)
    codes = set_last(jnp.zeros((n, k), jnp.int8))
    y = kernels.linear(jnp.ones((1, k), jnp.float32), codes, jnp.ones((n,), jnp.float32))
    assert np.array_equal(np.asarray(y[0, -2:]), np.float32([0, k]))


def test_under_jit_vmap_and_scan():
    rng = np.random.default_rng(7)
    codes, scale, bias = weights(rng, 24, 48)
    x = rng.standard_normal((3, 5, 48)).astype(np.float32)
    expected = np.stack([reference.int8_linear(rows, codes, scale, bias, TopK(2)) for rows in x])

    def layer(rows):
        return kernels.linear(rows, codes, scale, bias, rule=TopK(2))

    assert np.array_equal(jax.jit(jax.vmap(layer))(x), expected)
    _, scanned = jax.lax.scan(lambda carry, rows: (carry, layer(rows)), 0, x)
    assert np.array_equal(scanned, expected)


def test_attributes_of_any_number_type_compile_to_the_same_call():
    # An attribute of another type must neither fail nor poison the cache for the right one.
    rng = np.random.default_rng(8)
    codes, scale, _ = weights(rng, 8, 16)
    x = rng.standard_normal((2, 16)).astype(np.float32)
    expected = reference.int8_linear(x, codes, scale, None, Threshold(0.25, "token"))
    for value in (0.25, np.float64(0.25), np.float32(0.25)):
        y = kernels.linear(x, codes, scale, rule=Threshold(value, "token"))
        assert np.array_equal(y, expected)
    for k in (3, np.int32(3), np.int64(3)):
        assert kernels.linear(x, codes, scale, rule=TopK(k)).shape == (2, 8)


def test_bad_arguments_are_refused():
    x, codes, scale = np.ones((2, 4), np.float32), np.ones((3, 4), np.int8), np.ones(3, np.float32)
    with pytest.raises(ValueError, match="rung: expected one of .*scalar, got 'sse9'"):
        kernels.linear(x, codes, scale, rung="sse9")
    with pytest.raises(TypeError, match="rule: expected Threshold"):
        kernels.linear(x, codes, scale, rule=6.0)
    with pytest.raises(ValueError, match="arithmetic: expected 'int15' or 'float', got 'fp16'"):
        kernels.linear(x, codes, scale, arithmetic="fp16")
    with pytest.raises(Exception, match=re.escape("codes, scale, bias: expected int8[n, k]")):
        kernels.linear(x, codes[:, :3], scale)
    with pytest.raises(Exception, match="k: expected at most 133144"):
        kernels.product(np.ones((1, 133_145), np.int8), np.ones((1, 133_145), np.int8))


def test_an_extension_for_a_newer_jaxlib_is_refused_before_it_is_registered():
    major, minor = kernels._runtime_ffi_version()
    newer = types.SimpleNamespace(
        __name__="jaxint8._cpu", jaxlib_version="99.0", ffi_version=(major, minor + 1)
    )
    with pytest.raises(ImportError, match=r"jaxint8\._cpu was built for jaxlib 99\.0 .* anew"):
        kernels.check_version(newer)
    older = types.SimpleNamespace(
        __name__="jaxint8._cpu", jaxlib_version="0.1", ffi_version=(major, minor - 1)
    )
    kernels.check_version(older)


def test_what_is_available_is_told():
    assert "cpu" in kernels.available() and "cpu" in kernels.platforms()
    assert kernels.why_not("cpu") == ""
    assert RUNGS[-1] == "scalar" and kernels.cpu_features()["scalar"]
    assert "no compiled tpu kernels" in kernels.why_not("tpu")
