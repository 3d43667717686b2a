"""Every scheme of Table 1 against the oracle: integers with ==, float outliers within a derived bound."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from battery import KINDS, float_bound, make
from jaxint8 import RelativeThreshold, Threshold, TopK, reference
from jaxint8.scheme_linear import SchemeMatrix, quantize_kernel, scheme_linear
from jaxint8.schemes import SCHEMES, Scheme, parse
from jaxint8.zeropoint import ZEROPOINT_K_MAX, check_k, quantize_zeropoint, zeropoint_product

MORE = {
    "llm_int8:float_weights": parse("llm_int8:float_weights"),
    "llm_int8_zeropoint:token": parse("llm_int8_zeropoint:token"),
    "weights_only, zeropoint": dataclasses.replace(SCHEMES["weights_only"], numbers="zeropoint"),
}
# Inputs whose sums stay finite in float32: for the others see the integers.
MODERATE = ["outliers", "no_bias", "nan", "zero_rows", "ties", "one_spike"]

rows = jax.jit(quantize_zeropoint, static_argnums=1)
linear = jax.jit(scheme_linear, static_argnames=("scheme", "implementation"))


def kernel_of(case):
    """A float[k, n] kernel with an all-zero channel, one without negative values, and a spread of scales."""
    kernel = np.ascontiguousarray(case.codes.astype(np.float32).T) * case.scale
    kernel += np.random.default_rng(0).normal(size=kernel.shape).astype(np.float32) * 0.01
    kernel[:, ::5] = 0
    kernel[:, 1::5] = np.abs(kernel[:, 1::5])
    return kernel


@pytest.mark.parametrize("per", ["row", "tensor"])
@pytest.mark.parametrize("kind", KINDS)
def test_zeropoint_rows_equal_the_oracle(kind, per):
    for case in [make((9, 331, 1), kind=kind), make((1, 1, 1), kind=kind)]:
        x = np.abs(case.x) if kind == "no_bias" else case.x  # one-sided rows too
        codes, scale, zero = reference.quantize_zeropoint(x, per)
        got = rows(jnp.asarray(x), per)
        np.testing.assert_array_equal(got.codes, codes)
        np.testing.assert_array_equal(got.scale[:, 0], scale)
        np.testing.assert_array_equal(got.zero[:, 0], zero)
        assert np.abs(zero).max() <= 127 and np.abs(codes.astype(int)).max() <= 127
        finite = np.isfinite(scale)
        back = (codes.astype(np.float64) + zero[:, None]) * scale[:, None]
        # Half a step, and at the ends of the range half a step more, where the rounded ends stand 255 apart.
        error = np.abs(back - x)[finite] / np.maximum(scale[finite, None], 2.0**-125)
        assert kind == "tiny" or np.all(error <= 1.0 + 1e-4)


def test_zeropoint_uses_the_whole_range_of_one_sided_rows():
    x = np.linspace(0, 1, 255, dtype=np.float32)[None]
    codes, scale, zero = reference.quantize_zeropoint(x)
    assert (codes.min(), codes.max(), zero[0]) == (-127, 127, 127)
    assert scale[0] == np.float32(1) / np.float32(254)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_equation_5_equals_equation_4(implementation):
    """Exact at the largest magnitudes that there are: all terms of one sign, where int32 is nearest to its end."""
    rng = np.random.default_rng(3)
    a = rng.integers(-127, 128, (4, 640)).astype(np.int8)
    b = rng.integers(-127, 128, (6, 640)).astype(np.int8)
    a[0], b[0] = 127, 127
    a_zero = np.array([127, -127, 5, 0], np.int32)
    b_zero = np.array([127, -127, 3, 0, 1, -2], np.int32)
    left = dataclasses.replace(rows(jnp.zeros((4, 640)), "row"), codes=a, zero=a_zero[:, None])
    got = zeropoint_product(left, jnp.asarray(b), jnp.asarray(b_zero), implementation)
    np.testing.assert_array_equal(got, reference.zeropoint_product(a, a_zero, b, b_zero))
    assert got[0, 0] == 254 * 254 * 640


@pytest.mark.parametrize("name", [*SCHEMES, *MORE])
def test_layers_equal_the_oracle(name):
    scheme = {**SCHEMES, **MORE}[name]
    for kind in MODERATE:
        case = make((17, 331, 19), kind=kind)
        kernel = kernel_of(case)
        w = quantize_kernel(jnp.asarray(kernel), scheme)
        bias = None if case.bias is None else jnp.asarray(case.bias)
        got = np.asarray(linear(jnp.asarray(case.x), w, bias, scheme=scheme))
        expected = reference.scheme_linear(case.x, w, case.bias, scheme)
        exact = scheme.activations != "float" and (scheme.outliers is None or scheme.native)
        if exact:
            np.testing.assert_array_equal(got, expected)
            continue
        zero = np.asarray(getattr(w, "zero", np.zeros(19, np.int32)))
        steps = np.asarray(w.codes, np.int32) + zero[:, None]
        wide = np.abs(kernel.T).max() if scheme.outlier_weights == "float" else 0
        bounded = dataclasses.replace(
            case,
            x=np.nan_to_num(case.x, nan=0, posinf=0, neginf=0),
            codes=np.abs(steps) + np.ceil(wide / np.asarray(w.scale))[:, None],
            scale=np.asarray(w.scale),
        )
        mask = reference.outlier_mask(case.x, scheme.outliers)
        mask |= scheme.activations == "float"
        good = np.isfinite(expected)
        bound = float_bound(bounded, np.where(good, expected, 0), mask)
        assert np.array_equal(good, np.isfinite(got))
        assert np.all(np.abs(got[good] - expected[good]) <= bound[good])


def test_outliers_taken_out_add_exactly_nothing():
    """Zeropoint rows without their outlier columns give the sums of a narrower layer."""
    case = make((9, 331, 19))
    scheme = SCHEMES["llm_int8_zeropoint"]
    w = quantize_kernel(jnp.asarray(kernel_of(case)), scheme)
    assert isinstance(w, SchemeMatrix)
    mask = reference.outlier_mask(case.x, scheme.outliers)
    rest = rows(jnp.where(mask, 0, case.x), "row")
    kept = ~mask.any(axis=0)
    assert 0 < kept.sum() < kept.size
    narrow = dataclasses.replace(rest, codes=rest.codes[:, kept])
    np.testing.assert_array_equal(
        zeropoint_product(rest, w.codes, w.zero),
        zeropoint_product(narrow, w.codes[:, kept], w.zero),
    )


def test_float_weights_are_those_of_outliers_only():
    """With everything an outlier the layer is the float one; with nothing it is the int8 one."""
    case = make((5, 64, 7))
    kernel = jnp.asarray(kernel_of(case))
    every = parse("llm_int8:0:token:float_weights")
    got = linear(jnp.asarray(case.x), quantize_kernel(kernel, every), scheme=every)
    exact = case.x.astype(np.float64) @ np.asarray(kernel, np.float64)
    flow = np.abs(case.x).astype(np.float64) @ np.abs(np.asarray(kernel, np.float64))
    assert np.all(np.abs(got - exact) <= 70 * np.finfo(np.float32).eps * flow)
    none = parse("llm_int8:inf:float_weights")
    got = linear(jnp.asarray(case.x), quantize_kernel(kernel, none), scheme=none)
    plain = SCHEMES["vectorwise"]
    expected = linear(jnp.asarray(case.x), quantize_kernel(kernel, plain), scheme=plain)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", ["absmax", "llm_int8_zeropoint", "weights_only"])
def test_the_gradient_is_that_of_the_dequantised_layer(name):
    scheme = SCHEMES[name]
    case = make((2, 3, 4))
    w = quantize_kernel(jnp.asarray(kernel_of(case)), scheme)
    x, bias = jnp.asarray(case.x)[None], jnp.asarray(case.bias)
    g = jnp.asarray(np.random.default_rng(1).normal(size=(1, 2, 4)).astype(np.float32))

    def loss(x, bias):
        return jnp.sum(g * scheme_linear(x, w, bias, scheme=scheme))

    dx, dbias = jax.grad(loss, (0, 1))(x, bias)
    np.testing.assert_allclose(dx, g @ w.dequantize().T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dbias, g.sum((0, 1)), rtol=1e-5)


@pytest.mark.parametrize("name", ["absmax", "zeropoint", "weights_only"])
def test_shapes_and_dtypes(name):
    scheme = SCHEMES[name]
    w = quantize_kernel(jnp.ones((3, 4), jnp.bfloat16), scheme)
    assert w.shape == (3, 4)
    for shape in [(3,), (0, 3), (2, 1, 3)]:
        for dtype in (jnp.bfloat16, jnp.float32):
            y = scheme_linear(jnp.ones(shape, dtype), w, scheme=scheme)
            assert (y.shape, y.dtype) == ((*shape[:-1], 4), dtype)
            # 3 ones times weights of one: exact in every scheme but for the rounding of 127 * (1 / 127).
            np.testing.assert_allclose(y.astype(jnp.float32), 3.0, rtol=1e-2)


@pytest.mark.parametrize(
    ("name", "outliers", "more"),
    [
        ("llm_int8:4", Threshold(4.0), {}),
        ("llm_int8:token:8", Threshold(8.0, "token"), {}),
        (
            "relative:8:column:float",
            RelativeThreshold(8.0, "column"),
            {"outlier_arithmetic": "float"},
        ),
        ("topk:16:int15", TopK(16), {"outlier_arithmetic": "int15"}),
        ("llm_int8:float_weights", Threshold(6.0), {"outlier_weights": "float"}),
        ("vectorwise", None, {}),
    ],
)
def test_names_with_options(name, outliers, more):
    assert parse(name) == Scheme(outliers=outliers, **more)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int4", "'int4' is not one of absmax, zeropoint, rowwise, vectorwise,"),
        ("topk:token", "option 'token' does not go with topk .it takes a whole number"),
        ("topk:8:16", "'topk:8:16': expected one number, got '8' and '16'"),
        ("relative:token:column", "expected one scope, got 'token' and 'column'"),
        ("topk:x", "option 'x' does not go with topk .it takes a whole number"),
        ("llm_int8:-1", "option '-1' does not go with llm_int8 .*must be >= 0"),
        ("vectorwise:4", "option '4' does not go with vectorwise .it has no outliers"),
        ("vectorwise:float_weights", "needs a rule"),
        ("llm_int8_zeropoint:int15", "option 'int15' does not go with llm_int8_zeropoint"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(ValueError, match=message):
        parse(name)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match='activations="float" has no outlier decomposition'):
        Scheme(activations="float")
    with pytest.raises(ValueError, match="numbers must be one of 'absmax', 'zeropoint', got 'nf4'"):
        Scheme(numbers="nf4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="k: zeropoint sums are exact in int32 up to k = 33286"):
        check_k(ZEROPOINT_K_MAX + 1)
    scheme = SCHEMES["zeropoint"]
    plain = quantize_kernel(jnp.ones((3, 4)), SCHEMES["vectorwise"])
    with pytest.raises(TypeError, match="w: expected the SchemeMatrix"):
        scheme_linear(jnp.ones((1, 3)), plain, scheme=scheme)
    w = quantize_kernel(jnp.ones((3, 4)), scheme)
    assert isinstance(w, SchemeMatrix)
    with pytest.raises(ValueError, match=r"x: expected float\[..., 3\]"):
        scheme_linear(jnp.ones((1, 2)), w, scheme=scheme)
    with pytest.raises(ValueError, match="needs the float kernel"):
        scheme_linear(jnp.ones((1, 3)), w, scheme=parse("llm_int8:float_weights"))
