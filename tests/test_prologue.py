"""What stands before and behind a layer, in the same call: the bits of separate operations, on every rung and path."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_kernels import DTYPES, RULES, RUNGS, activations, assert_equal, weights

from jaxint8 import (
    QuantizedMatrix,
    RelativeThreshold,
    Threshold,
    TopK,
    kernels,
    models,
    quantize,
    reference,
)
from jaxint8.dispatch import Layer, Operands, entered, one_device
from jaxint8.linear import linear
from jaxint8.models.config import QuantizationConfig
from jaxint8.models.split import ALONE
from jaxint8.prologue import Prologue, RMSNorm, SiluGate, enter, width

PROLOGUES = [RMSNorm(1e-5), SiluGate()]
SHAPES = [(0, 5), (3, 0), (1, 1), (1, 576), (7, 63), (9, 1536), (33, 130)]


def by_name(value):
    return type(value).__name__ if isinstance(value, Prologue) else None


def rows_of(rng, m, k, dtype, prologue):
    """Rows with the awkward ones of `activations`, and some so small or so large that squares would not do."""
    x = activations(rng, m, width(k, prologue), np.float64)
    if m > 8:
        x[7] *= 1e-14
        x[8] *= 1e25 if dtype != np.float16 else 1e3
    norm = rng.standard_normal(k).astype(np.float32) if isinstance(prologue, RMSNorm) else None
    return x.astype(dtype), norm


def expected_rows(x, norm, prologue):
    if isinstance(prologue, RMSNorm):
        return reference.rms_norm(x, norm, prologue.epsilon)
    return reference.silu_gate(x)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("prologue", PROLOGUES, ids=by_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_rows_equal_the_oracle(rung, prologue, dtype):
    for m, k in SHAPES:
        rng = np.random.default_rng([m, k])
        x, norm = rows_of(rng, m, k, dtype, prologue)
        actual = kernels.enter(jnp.asarray(x), norm, prologue, rung=rung)
        assert_equal(actual, expected_rows(x, norm, prologue))


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("prologue", [None, *PROLOGUES], ids=by_name)
@pytest.mark.parametrize("shape", [(1, 576, 70), (4, 130, 65), (40, 200, 33)], ids=str)
def test_layers_equal_separate_operations(rung, prologue, shape):
    m, k, n = shape
    rng = np.random.default_rng(shape)
    for i, rule in enumerate(RULES):
        dtype = DTYPES[i % 3]
        x, norm = rows_of(rng, m, k, dtype, prologue)
        codes, scale, bias = weights(rng, n, k)
        residual = rng.standard_normal((m, n)).astype(dtype)
        residual[0, 0] = np.nan
        rows = x if prologue is None else expected_rows(x, norm, prologue)
        y = reference.int8_linear(rows, codes, scale, bias, rule)
        call = functools.partial(kernels.linear, prologue=prologue, rule=rule, rung=rung)
        assert_equal(call(jnp.asarray(x), codes, scale, bias, norm), y)
        with np.errstate(over="ignore", invalid="ignore"):
            assert_equal(call(jnp.asarray(x), codes, scale, bias, norm, residual), residual + y)


def make(prologue, dtype=np.float32, m=6, k=96, n=40):
    rng = np.random.default_rng(0)
    x, norm = rows_of(rng, m, k, dtype, prologue)
    x = np.where(np.isfinite(x.astype(np.float32)), x, 1).astype(dtype)
    matrix = quantize(rng.standard_normal((k, n)).astype(np.float32))
    bias = rng.standard_normal(n).astype(np.float32)
    residual = rng.standard_normal((m, n)).astype(dtype)
    return jax.tree.map(jnp.asarray, Operands(x, matrix.codes, matrix.scale, bias, norm, residual))


@pytest.mark.parametrize("prologue", PROLOGUES, ids=by_name)
@pytest.mark.parametrize("rule", [None, Threshold(2.0), TopK(4)], ids=str)
def test_every_implementation_under_jit(prologue, rule):
    operands = make(prologue)
    run = lambda name: jax.jit(one_device, static_argnums=1)(  # noqa: E731
        operands, Layer(rule, "int15", name, prologue)
    )
    expected = run("reference")
    np.testing.assert_array_equal(run("cpu" if RUNGS else None), expected)
    # Pure JAX rounds in another order: a code may fall on the other side of a tie, one step of its row.
    rows = entered(operands, Layer(None, "int15", "reference", prologue))
    largest = np.abs(np.asarray(rows)).max(axis=1)
    weight = np.abs(np.asarray(operands.codes) * np.asarray(operands.scale)[:, None]).max()
    step = largest / 127 * weight
    assert np.all(np.abs(run("xla") - expected) <= 3 * step[:, None] + 1e-4)


@pytest.mark.parametrize("prologue", PROLOGUES, ids=by_name)
def test_portable_rows_are_those_of_the_oracle_up_to_float_rounding(prologue):
    operands = make(prologue)
    expected = expected_rows(np.asarray(operands.x), operands.norm, prologue)
    # k + 8 operations, of relative error 2^-24 each, and rsqrt and exp of two units.
    np.testing.assert_allclose(
        enter(operands.x, operands.norm, prologue), expected, rtol=(96 + 12) * 2.0**-24
    )


@pytest.mark.parametrize("prologue", [None, *PROLOGUES], ids=by_name)
def test_gradients_are_those_of_separate_operations(prologue):
    operands = make(prologue)
    layer = Layer(TopK(4), "int15", None, prologue)

    def together(x, bias, norm, residual):
        replaced = operands._replace(x=x, bias=bias, norm=norm, residual=residual)
        return jnp.sum(jnp.sin(linear(replaced, layer)))

    def apart(x, bias, norm, residual):
        rows = enter(x, norm, prologue)
        bare = Layer(TopK(4), "int15", None)
        y = linear(Operands(rows, operands.codes, operands.scale, bias), bare)
        return jnp.sum(jnp.sin(residual + y))

    which = tuple(i for i in range(4) if i != 2 or operands.norm is not None)
    leaves = (operands.x, operands.bias, operands.norm, operands.residual)
    for a, b in zip(
        jax.grad(together, which)(*leaves), jax.grad(apart, which)(*leaves), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("rule", [TopK(4), Threshold(2.0, "column")], ids=str)
@pytest.mark.parametrize("axes", [(0, None), (0, 0), (None, 0)], ids=str)
def test_vmap_is_a_loop(rule, axes):
    operands = make(SiluGate())
    layer = Layer(rule, "int15", None, SiluGate())
    copies = lambda a, axis: a if axis is None else jnp.stack([a, a[::-1]])  # noqa: E731
    x, residual = copies(operands.x, axes[0]), copies(operands.residual, axes[1])
    run = lambda x, r: linear(operands._replace(x=x, residual=r), layer)  # noqa: E731
    pick = lambda a, axis, i: a if axis is None else a[i]  # noqa: E731
    actual = jax.vmap(run, axes)(x, residual)
    for i in range(2):
        expected = run(pick(x, axes[0], i), pick(residual, axes[1], i))
        np.testing.assert_array_equal(actual[i], expected)


def test_one_row_of_bfloat16_does_not_depend_on_the_others():
    operands = make(RMSNorm(1e-6), ml_dtypes.bfloat16)
    layer = Layer(RelativeThreshold(3.0), "int15", None, RMSNorm(1e-6))
    whole = linear(operands, layer)
    alone = linear(operands._replace(x=operands.x[2:3], residual=operands.residual[2:3]), layer)
    np.testing.assert_array_equal(
        np.asarray(alone[0], np.float32), np.asarray(whole[2], np.float32)
    )


def test_an_epsilon_that_the_integers_do_not_carry_is_refused():
    with pytest.raises(ValueError, match="epsilon: expected at least"):
        RMSNorm(0.0)


def test_a_decoder_says_in_one_line_which_kernels_are_missing():
    missing = next(name for name in ("cuda", "cpu") if name not in kernels.available())
    operands = make(None)
    layer = {"weight": QuantizedMatrix(operands.codes, operands.scale)}
    how = QuantizationConfig(implementation=missing)
    with pytest.raises(ValueError, match=f"implementation: '{missing}' is not available"):
        models.linear.linear(operands.x[None], layer, how, ALONE)
