"""Weight and activation quantisation against the oracle, and the invariants of QuantizedMatrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from battery import DTYPES, FEW_RULES, FEW_SHAPES, FLOAT32_ONLY, KINDS, RULES, make
from jaxint8 import QuantizedMatrix, TopK, quantize, reference
from jaxint8.quantize import K_MAX, quantize_rows, validate


@pytest.mark.parametrize("arithmetic", ["int15", "float"])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_rows_equal_the_oracle(rule, arithmetic):
    cases = [make(shape) for shape in FEW_SHAPES] if rule in FEW_RULES else []
    cases += [
        make((9, 331, 1), dtype, kind)
        for kind in KINDS
        for dtype in ([np.float32] if kind in FLOAT32_ONLY or rule not in FEW_RULES else DTYPES)
    ]
    for case in cases:
        lo, hi, scale = reference.quantize_rows(case.x, rule, arithmetic)
        rows = jax.jit(quantize_rows, static_argnums=(1, 2))(jnp.asarray(case.x), rule, arithmetic)
        np.testing.assert_array_equal(rows.lo, lo)
        np.testing.assert_array_equal(np.zeros_like(hi) if rows.hi is None else rows.hi, hi)
        np.testing.assert_array_equal(rows.scale[:, 0], scale)


def test_codes_reconstruct_within_half_a_step():
    case = make((9, 331, 1))
    lo, hi, scale = reference.quantize_rows(case.x, TopK(8))
    codes = 128.0 * hi.astype(np.float64) + lo
    error = np.abs(codes * scale[:, None] - case.x)
    assert np.all(error <= 0.5 * scale[:, None] * (1 + 1e-6))
    assert np.abs(lo).max() <= 127
    assert np.abs(hi).max() <= 127


@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_equal_the_oracle(dtype, per):
    rng = np.random.default_rng(2)
    for shape in [(0, 3), (3, 0), (1, 1), (499, 33), (1024, 64)]:
        for scale in (1, 37, 1e-38, 1e30):
            if dtype == np.float16 and scale > 100:
                continue
            kernel = (rng.normal(size=shape) * scale).astype(dtype)
            kernel[:, ::5] = 0
            codes, scales = reference.quantize(kernel, per)
            w = quantize(jnp.asarray(kernel), per)
            np.testing.assert_array_equal(w.codes, codes)
            np.testing.assert_array_equal(w.scale, scales)
            validate(w)


def test_the_type_is_a_pytree_of_the_documented_shape():
    w = quantize(jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)))
    assert w.shape == (6, 4)
    assert w.nbytes == 6 * 4 + 4 * 4
    assert len(jax.tree.leaves(w)) == 2
    assert isinstance(jax.jit(lambda w: w)(w), QuantizedMatrix)
    kernel = w.dequantize(jnp.bfloat16)
    assert kernel.shape == (6, 4)
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        w.dequantize(), reference.dequantize(np.asarray(w.codes), np.asarray(w.scale))
    )


def test_a_stack_is_dequantized_like_its_matrices():
    kernels = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5, 4)), jnp.float32)
    stack = jax.vmap(jax.vmap(quantize))(kernels)
    assert stack.shape == (5, 4)
    expected = [[quantize(kernel).dequantize() for kernel in row] for row in kernels]
    np.testing.assert_array_equal(stack.dequantize(), expected)


def test_int8_takes_a_quarter_of_float32():
    kernel = jnp.ones((4096, 512))
    assert quantize(kernel).nbytes <= 0.26 * kernel.nbytes


def test_quantizing_what_was_dequantized_changes_nothing():
    w = quantize(jnp.asarray(np.random.default_rng(0).normal(size=(64, 40)).astype(np.float32)))
    again = quantize(w.dequantize())
    np.testing.assert_array_equal(w.codes, again.codes)


def test_non_finite_weights_are_refused_and_never_become_codes():
    kernel = jnp.ones((3, 4)).at[1, 2].set(jnp.inf)
    with pytest.raises(ValueError, match="non-finite value .first in output channel 2"):
        quantize(kernel)
    traced = jax.jit(quantize)(kernel)
    assert np.isnan(traced.scale[2])
    assert not np.any(traced.codes[2])
    assert np.all(np.isfinite(traced.scale[jnp.array([0, 1, 3])]))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "kernel: expected float32", lambda: quantize(jnp.ones((2, 2), jnp.int32))),
        (ValueError, r"kernel: expected shape \[k, n\]", lambda: quantize(jnp.ones(3))),
        (TypeError, "kernel: expected an array, got str", lambda: quantize("kernel")),
        (
            TypeError,
            "kernel: .* got a shape alone",
            lambda: quantize(jax.ShapeDtypeStruct((3, 4), jnp.float32)),
        ),
        (ValueError, "per: expected", lambda: quantize(jnp.ones((2, 2)), per="row")),
        (ValueError, "k: int32 sums", lambda: quantize(jnp.ones((K_MAX + 1, 1)))),
    ],
)
def test_errors_name_the_argument(error, message, call):
    with pytest.raises(error, match=message):
        call()
