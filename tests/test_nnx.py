"""Dense8bit for NNX: conversion of a trained layer, jit, and gradients that pass the codes by."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxint8
from jaxint8 import QuantizedMatrix, TopK, int8_linear


def layer_and_linear(use_bias: bool = True):
    linear = nnx.Linear(12, 5, use_bias=use_bias, rngs=nnx.Rngs(0))
    if use_bias:
        linear.bias[...] = jnp.arange(5.0)
    return jaxint8.nnx.Dense8bit.from_linear(linear, outliers=TopK(2)), linear


def test_converted_layer_equals_int8_linear_and_is_close_to_the_float_one():
    for use_bias in (True, False):
        layer, linear = layer_and_linear(use_bias)
        x = jax.random.normal(jax.random.key(0), (2, 3, 12))
        w = QuantizedMatrix(layer.codes[...], layer.scale[...])
        bias = linear.bias[...] if use_bias else None
        expected = int8_linear(x, w, bias, outliers=TopK(2))
        np.testing.assert_array_equal(nnx.jit(lambda layer, x: layer(x))(layer, x), expected)
        # Half a code step of each operand on every one of the k products.
        step = jnp.max(jnp.abs(x), -1, keepdims=True) / 127
        bound = 0.5 * jnp.sum(jnp.abs(x), -1, keepdims=True) * w.scale.max()
        bound += 0.5 * step * jnp.max(jnp.sum(jnp.abs(w.dequantize()), 0))
        assert np.all(np.abs(expected - linear(x)) <= bound + 1e-5)


def test_gradients_see_the_bias_only():
    layer, _ = layer_and_linear()
    x = jax.random.normal(jax.random.key(0), (4, 12))
    grads = nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)
    assert [path[-1] for path, _ in nnx.to_flat_state(grads)] == ["bias"]


def test_fresh_layer_is_zero_and_dtype_is_kept():
    layer = jaxint8.nnx.Dense8bit(12, 5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    y = layer(jnp.ones((2, 12)))
    assert y.dtype == jnp.bfloat16
    assert not np.any(np.asarray(y, np.float32))
