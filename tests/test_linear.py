"""int8_linear: every implementation against the oracle, its transformations and its gradient."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from battery import (
    DTYPES,
    FEW_RULES,
    FLOAT32_ONLY,
    KINDS,
    RULES,
    SHAPES,
    TOKEN_RULES,
    Case,
    float_bound,
    make,
)
from jaxint8 import QuantizedMatrix, Threshold, TopK, int8_linear, kernels, quantize, reference

IMPLEMENTATIONS = ["xla", *kernels.available()]


def _call(x, codes, scale, bias, rule, arithmetic, implementation):
    return int8_linear(
        x,
        QuantizedMatrix(codes, scale),
        bias,
        outliers=rule,
        outlier_arithmetic=arithmetic,
        implementation=implementation,
    )


_jitted = jax.jit(
    _call, static_argnums=(4, 5, 6)
)  # one cache for all tests: compiling is what takes the time


def linear(case: Case, implementation, rule, arithmetic="int15", jit=True):
    bias = None if case.bias is None else jnp.asarray(case.bias)
    args = (jnp.asarray(case.x), jnp.asarray(case.codes), jnp.asarray(case.scale), bias)
    return (_jitted if jit else _call)(*args, rule, arithmetic, implementation)


def oracle(case: Case, rule, arithmetic="int15"):
    return reference.int8_linear(case.x, case.codes, case.scale, case.bias, rule, arithmetic)


def bits(a) -> np.ndarray:
    """Bit patterns with every NaN alike."""
    a = np.asarray(a)
    a = np.where(np.isnan(a.astype(np.float32)), np.asarray(np.nan, a.dtype), a)
    return a.view(np.uint32 if a.dtype == np.float32 else np.uint16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_equal_the_oracle(shape, implementation):
    case = make(shape)
    for rule in FEW_RULES:
        y = linear(case, implementation, rule)
        np.testing.assert_array_equal(bits(y), bits(oracle(case, rule)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_equal_the_oracle(kind, rule, implementation):
    for dtype in [np.float32] if kind in FLOAT32_ONLY or rule not in FEW_RULES else DTYPES:
        case = make((9, 331, 37), dtype, kind)
        y = linear(case, implementation, rule)
        assert y.dtype == case.x.dtype
        np.testing.assert_array_equal(bits(y), bits(oracle(case, rule)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", FEW_RULES, ids=repr)
def test_float_arithmetic_within_the_derived_bound(rule, implementation):
    for dtype in DTYPES:
        for kind in ("outliers", "ties", "nan", "one_spike"):
            case = make((7, 499, 33), dtype, kind)
            y, expected = (
                np.asarray(linear(case, implementation, rule, "float")),
                oracle(case, rule, "float"),
            )
            bound = float_bound(case, expected, reference.outlier_mask(case.x, rule))
            error = np.abs(y.astype(np.float64) - expected.astype(np.float64))
            np.testing.assert_array_equal(
                np.isnan(y.astype(np.float32)), np.isnan(expected.astype(np.float32))
            )
            assert np.all((error <= bound) | np.isnan(error) | (y == expected))


def test_reference_implementation_is_the_oracle():
    case = make((5, 130, 31))
    y = linear(case, "reference", TopK(4))
    np.testing.assert_array_equal(bits(y), bits(oracle(case, TopK(4))))


def test_thousands_of_outliers_stay_exact():
    """With 16-bit outlier codes everywhere an int32 sum would overflow; the row scale gives way instead."""
    case = make((3, 4096, 16), kind="extreme")
    for implementation in IMPLEMENTATIONS:
        y = linear(case, implementation, Threshold(0.0, "token"))
        np.testing.assert_array_equal(bits(y), bits(oracle(case, Threshold(0.0, "token"))))
    exact = (
        case.x.astype(np.float64) @ (case.codes * case.scale[:, None].astype(np.float64)).T
        + case.bias
    )
    lo, hi, scale = reference.quantize_rows(case.x, Threshold(0.0, "token"))
    total = np.abs(128 * hi.astype(np.int64) + lo).sum(axis=1)
    assert np.all(total * 127 < 2**31)
    flow = np.abs(case.codes * case.scale[:, None].astype(np.float64)).sum(axis=1)
    bound = 0.5 * scale[:, None] * flow[None, :] + 1e-6 * np.abs(
        exact
    )  # half a code step per activation
    assert np.all(np.abs(np.asarray(y) - exact) <= bound)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("arithmetic", ["int15", "float"])
def test_jit_equals_eager(arithmetic, implementation):
    for rule in FEW_RULES:
        for m in (1, 9):
            case = make((m, 331, 37))
            np.testing.assert_array_equal(
                bits(linear(case, implementation, rule, arithmetic)),
                bits(linear(case, implementation, rule, arithmetic, jit=False)),
            )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("arithmetic", ["int15", "float"])
@pytest.mark.parametrize("rule", TOKEN_RULES, ids=repr)
def test_a_row_does_not_see_its_batch(rule, arithmetic, implementation):
    case = make((9, 331, 37), kind="nan")
    together = bits(linear(case, implementation, rule, arithmetic))
    for i in range(len(case.x)):
        alone = Case(case.x[i : i + 1], case.codes, case.scale, case.bias)
        np.testing.assert_array_equal(
            bits(linear(alone, implementation, rule, arithmetic))[0], together[i]
        )


def test_a_non_finite_row_leaves_its_neighbours_alone():
    case = make((4, 64, 8))
    case.x[2, 5] = np.inf
    case.x[2, 6] = 1e6  # would be an outlier column for everyone
    others = Case(case.x[[0, 1, 3]], case.codes, case.scale, case.bias)
    for implementation in IMPLEMENTATIONS:
        y = np.asarray(linear(case, implementation, Threshold(6.0, "column")))
        assert np.all(np.isnan(y[2]))
        expected = linear(others, implementation, Threshold(6.0, "column"))
        np.testing.assert_array_equal(bits(y[[0, 1, 3]]), bits(expected))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", [None, TopK(4), Threshold(6.0, "column")], ids=repr)
def test_leading_axes_vmap_scan_and_remat(rule, implementation):
    rng = np.random.default_rng(0)
    w = quantize(jnp.asarray(rng.normal(size=(40, 12)).astype(np.float32)))
    x = jnp.asarray(rng.normal(size=(3, 5, 40)).astype(np.float32)).at[1, 2, 3].set(30.0)

    def f(x, w=w):
        return int8_linear(x, w, outliers=rule, implementation=implementation)

    whole = f(x)
    assert whole.shape == (3, 5, 12)
    np.testing.assert_array_equal(bits(f(x[0, 0])), bits(f(x[:1, 0])[0]))
    np.testing.assert_array_equal(bits(f(x[:, None, None])), bits(whole[:, None, None]))
    mapped = jax.vmap(f)(x)
    np.testing.assert_array_equal(bits(mapped), bits(jnp.stack([f(row) for row in x])))
    _, scanned = jax.lax.scan(lambda carry, row: (carry, f(row)), 0, x)
    np.testing.assert_array_equal(bits(scanned), bits(mapped))
    np.testing.assert_array_equal(bits(jax.jit(jax.checkpoint(f))(x)), bits(whole))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), w)
    both = jax.vmap(f, in_axes=(None, 0))(x[0], stacked)
    np.testing.assert_array_equal(bits(both[0]), bits(f(x[0])))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_are_those_of_the_dequantised_layer(implementation):
    """Central differences in float64 of x @ dequantised + bias, which is linear: exact up to rounding."""
    rng = np.random.default_rng(1)
    w = quantize(jnp.asarray(rng.normal(size=(24, 10)).astype(np.float32)))
    x = rng.normal(size=(6, 24)).astype(np.float32)
    x[2, 3] = 20
    bias, g = rng.normal(size=10).astype(np.float32), rng.normal(size=(6, 10)).astype(np.float32)

    def loss(x, bias):
        return jnp.sum(int8_linear(x, w, bias, implementation=implementation) * g)

    dx, dbias = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(x), jnp.asarray(bias))
    dense = np.asarray(w.codes, np.float64).T * np.asarray(w.scale, np.float64)
    step = 1e-3

    def dequantised(x, bias):
        return np.sum((x @ dense + bias) * g.astype(np.float64))

    expected = np.zeros(x.shape)
    for index in np.ndindex(*x.shape):
        delta = np.zeros(x.shape)
        delta[index] = step
        up, down = dequantised(x + delta, bias), dequantised(x - delta, bias)
        expected[index] = (up - down) / (2 * step)
    # n products in float32, the g * scale rounding before them, and the differences' own 1e-16 * loss / step.
    flow = np.abs(g * np.asarray(w.scale)) @ np.abs(np.asarray(w.codes, np.float32))
    assert np.all(np.abs(dx - expected) <= 12 * 2**-23 * flow + 1e-10)
    np.testing.assert_allclose(
        dbias, g.sum(axis=0), rtol=0, atol=6 * 2**-23 * np.abs(g).sum(axis=0).max()
    )
    per_row = jax.vmap(jax.grad(lambda row, gr: jnp.sum(int8_linear(row, w) * gr)))(
        jnp.asarray(x), jnp.asarray(g)
    )
    assert np.all(np.abs(per_row - expected) <= 12 * 2**-23 * flow + 1e-10)


def test_gradient_dtypes_follow_the_inputs():
    w = quantize(jnp.ones((8, 4)))
    x = jnp.ones((2, 8), jnp.bfloat16)
    grad = jax.grad(lambda x, b: jnp.sum(int8_linear(x, w, b).astype(jnp.float32)), argnums=(0, 1))
    dx, db = grad(x, jnp.zeros(4, jnp.bfloat16))
    assert dx.dtype == jnp.bfloat16
    assert db.dtype == jnp.bfloat16
    leaves = jax.grad(lambda w: jnp.sum(int8_linear(x, w).astype(jnp.float32)), allow_int=True)(w)
    assert leaves.codes.dtype == jax.dtypes.float0


def test_reaches_the_compiled_kernel_by_default():
    if "cpu" not in kernels.available():
        pytest.skip("no compiled kernel here")
    case = make((4, 64, 8))
    text = (
        jax.jit(lambda x, w: int8_linear(x, w))
        .lower(
            jnp.asarray(case.x), QuantizedMatrix(jnp.asarray(case.codes), jnp.asarray(case.scale))
        )
        .as_text()
    )
    assert "jaxint8_linear" in text


W = QuantizedMatrix(jnp.zeros((4, 8), jnp.int8), jnp.ones(4))
X = jnp.ones((2, 8))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x: expected float32", lambda: int8_linear(jnp.ones((2, 8), jnp.int32), W)),
        (TypeError, "x: expected an array", lambda: int8_linear([1.0] * 8, W)),
        (
            ValueError,
            "x: expected at least one axis",
            lambda: int8_linear(jnp.float32(1) * jnp.ones(()), W),
        ),
        (ValueError, "x: last axis must be k = 8", lambda: int8_linear(jnp.ones((2, 7)), W)),
        (TypeError, "w: expected a QuantizedMatrix", lambda: int8_linear(X, jnp.ones((8, 4)))),
        (
            ValueError,
            "w.codes: expected int8",
            lambda: int8_linear(X, QuantizedMatrix(jnp.ones((4, 8)), jnp.ones(4))),
        ),
        (
            ValueError,
            "w.scale: expected float32",
            lambda: int8_linear(X, QuantizedMatrix(jnp.zeros((4, 8), jnp.int8), jnp.ones(5))),
        ),
        (
            TypeError,
            "w.codes: expected an array, got list",
            lambda: int8_linear(X, QuantizedMatrix([[1]], jnp.ones(4))),
        ),
        (TypeError, "bias: expected an array", lambda: int8_linear(X, W, [0.0] * 4)),
        (TypeError, "partition: expected a Partition", lambda: int8_linear(X, W, partition="data")),
        (ValueError, r"bias: expected float\[4\]", lambda: int8_linear(X, W, jnp.ones(5))),
        (ValueError, "bias: expected float", lambda: int8_linear(X, W, jnp.ones(4, jnp.int32))),
        (TypeError, "outliers: expected", lambda: int8_linear(X, W, outliers="many")),
        (ValueError, "Threshold: value must be", lambda: int8_linear(X, W, outliers=-1.0)),
        (
            ValueError,
            "outlier_arithmetic: expected",
            lambda: int8_linear(X, W, outlier_arithmetic="int4"),
        ),
        (ValueError, "implementation: expected", lambda: int8_linear(X, W, implementation="tpu")),
        (
            ValueError,
            "implementation: 'cuda' is not available",
            lambda: int8_linear(X, W, implementation="cuda"),
        ),
        (
            ValueError,
            "k: int32 sums are exact up to k = 133144",
            lambda: int8_linear(
                jnp.ones((1, 133145)),
                QuantizedMatrix(jnp.zeros((1, 133145), jnp.int8), jnp.ones(1)),
            ),
        ),
    ],
)
def test_errors_name_the_argument(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_bfloat16_rounds_once():
    """The sum of a bfloat16-rounded product and a bias would differ; one rounding of the float32 value does not."""
    case = make((5, 130, 31), ml_dtypes.bfloat16)
    wide = Case(case.x.astype(np.float32), case.codes, case.scale, case.bias)
    expected = oracle(wide, None).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(bits(linear(case, "xla", None)), bits(expected))
