"""Three layers in one call: the bits of three calls, on every rung; gradients and maps of separate layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernels import DTYPES, RULES, RUNGS, activations, assert_equal, weights

from jaxint8 import Threshold, TopK, kernels
from jaxint8.block import Block, Weights, _apart, mlp_block
from jaxint8.dispatch import Layer
from jaxint8.linear import linear
from jaxint8.prologue import RMSNorm, SiluGate

NORM = RMSNorm(1e-5)


def make(m, k, h, f, dtype=np.float32, biases=True):
    rng = np.random.default_rng([m, k, h, f])

    def layer(n, k):
        codes, scale, bias = weights(rng, n, k)
        return Weights(codes, scale, bias if biases else None)

    x = activations(rng, m, k, np.float64)
    x = np.where(np.isfinite(x), x, 2.0).astype(dtype)
    residual = rng.standard_normal((m, h)).astype(dtype)
    norm = rng.standard_normal(h).astype(np.float32)
    parts = layer(h, k), layer(2 * f, h), layer(h, f)
    return jax.tree.map(jnp.asarray, Block(x, residual, norm, *parts))


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize(
    "shape",
    # From 73 rows on the gate is part of the layer before it; 600 are several chunks of a block.
    [
        (1, 576, 576, 1536),
        (3, 65, 130, 33),
        (40, 64, 96, 200),
        (73, 65, 130, 33),
        (600, 40, 70, 100),
        (100, 64, 128, 160),
    ],
    ids=str,
)
def test_bits_are_those_of_three_calls(rung, shape):
    for i, rule in enumerate(RULES):
        block = make(*shape, DTYPES[i % 3], i % 2 == 0)
        one = functools.partial(kernels.linear, rule=rule, rung=rung)
        attended = one(block.x, *block.out, None, block.residual)
        gated = one(attended, *block.up, block.norm, prologue=NORM)
        expected = one(gated, *block.down, None, attended, prologue=SiluGate())
        actual = kernels.mlp_block(*block, prologue=NORM, rule=rule, rung=rung)
        assert_equal(actual, np.asarray(expected))


@pytest.mark.parametrize("shape", [(0, 8, 16, 12), (2, 0, 16, 12), (2, 8, 16, 0)], ids=str)
def test_empty_axes(shape):
    block = make(*shape)
    layer = Layer(TopK(4), "int15", None, NORM)
    np.testing.assert_array_equal(mlp_block(block, layer), _apart(block, layer, linear))


@pytest.mark.parametrize("name", [None, "xla", "reference"])
def test_every_implementation_under_jit(name):
    block = make(6, 64, 96, 40)
    layer = Layer(Threshold(2.0), "int15", name, NORM)
    expected = jax.jit(_apart, static_argnums=(1, 2))(block, layer, linear)
    np.testing.assert_array_equal(jax.jit(mlp_block, static_argnums=1)(block, layer), expected)


def test_gradients_are_those_of_three_layers():
    block = make(6, 64, 96, 40)
    layer = Layer(TopK(4), "int15", None, NORM)

    def loss(run, x, residual, norm):
        return jnp.sum(jnp.sin(run(block._replace(x=x, residual=residual, norm=norm), layer)))

    leaves = block.x, block.residual, block.norm
    apart = functools.partial(_apart, run=linear)
    for a, b in zip(
        jax.grad(functools.partial(loss, mlp_block), (0, 1, 2))(*leaves),
        jax.grad(functools.partial(loss, apart), (0, 1, 2))(*leaves),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rule", [TopK(4), Threshold(2.0, "column")], ids=str)
def test_vmap_is_a_loop(rule):
    block = make(6, 64, 96, 40)
    layer = Layer(rule, "int15", None, NORM)
    x = jnp.stack([block.x, block.x[::-1]])
    actual = jax.vmap(lambda x: mlp_block(block._replace(x=x), layer))(x)
    for i in range(2):
        np.testing.assert_array_equal(actual[i], mlp_block(block._replace(x=x[i]), layer))
