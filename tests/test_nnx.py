"""Dense8bit for NNX: conversion of a trained layer, jit, and gradients that pass the codes by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

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


def sharded_linear(axes, **options):
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), axes)
    return nnx.Linear(64, 32, kernel_init=init, rngs=nnx.Rngs(0), **options)


def assert_lies(variable, spec, *, placed=True):
    assert nnx.get_partition_spec(variable).get_value() == spec
    if placed:
        array = variable[...]
        expected = NamedSharding(array.sharding.mesh, spec)
        assert array.sharding.is_equivalent_to(expected, array.ndim)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("axes", [(None, "model"), ("model", None), ("data", "model"), ("model",)])
def test_a_sharded_linear_keeps_its_sharding(axes, kind):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    k_axis, n_axis = (*axes, None)[:2]
    with jax.set_mesh(mesh):
        linear = sharded_linear(axes)
        layers = [jaxint8.nnx.Dense8bit.from_linear(linear)]
        traced = nnx.jit(jaxint8.nnx.Dense8bit.from_linear)(linear)
    layers.append(jaxint8.nnx.Dense8bit.from_linear(linear))  # the mesh is that of the kernel
    x = jax.random.normal(jax.random.key(0), (4, 64))
    expected = int8_linear(x, jaxint8.quantize(np.asarray(linear.kernel[...])))
    for layer in (*layers, traced):
        # Under jit it is the compiler that places what lies along automatic axes.
        placed = layer is not traced or kind == AxisType.Explicit
        assert_lies(layer.codes, P(n_axis, k_axis), placed=placed)
        assert_lies(layer.scale, P(n_axis), placed=placed)
        assert_lies(layer.bias, P(n_axis), placed=placed)
        np.testing.assert_array_equal(layer(x), expected)


def test_a_sharded_linear_without_bias_on_explicit_axes():
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "model"))):
        layer = jaxint8.nnx.Dense8bit.from_linear(sharded_linear((None, "model"), use_bias=False))
    assert layer.bias is None
    assert_lies(layer.codes, P("model", None))


def test_a_bias_keeps_metadata_of_its_own_and_rules_are_carried_over():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rules = (("in", None), ("out", "model"))
    with jax.set_mesh(mesh):
        linear = nnx.Linear(
            64,
            32,
            rngs=nnx.Rngs(0),
            kernel_metadata={"out_sharding": ("in", "out"), "sharding_rules": rules},
            bias_metadata={"out_sharding": ("data",)},
        )
        layer = jaxint8.nnx.Dense8bit.from_linear(linear)
    assert layer.codes.get_metadata("out_sharding") == ("out", "in")
    assert layer.scale.get_metadata("sharding_rules") == rules
    assert_lies(layer.bias, P("data"))


def test_metadata_may_be_a_sharding_or_name_no_mesh_at_all():
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    whole = sharded_linear(NamedSharding(mesh, P(None, "model")))
    assert_lies(jaxint8.nnx.Dense8bit.from_linear(whole).codes, P("model", None))
    later = {"out_sharding": (None, "model"), "eager_sharding": False}
    linear = nnx.Linear(64, 32, kernel_metadata=later, rngs=nnx.Rngs(0))
    for convert in (
        jaxint8.nnx.Dense8bit.from_linear,
        nnx.jit(jaxint8.nnx.Dense8bit.from_linear),
    ):
        assert_lies(convert(linear).bias, P("model"), placed=False)


def test_a_converted_layer_outlives_the_buffers_of_the_linear_one():
    layer, linear = layer_and_linear()
    linear.bias[...].delete()
    assert layer(jnp.ones((2, 12))).shape == (2, 5)


@pytest.mark.parametrize("other", [3, nnx.LinearGeneral(8, 5, rngs=nnx.Rngs(0))])
def test_from_linear_takes_a_linear_only(other):
    with pytest.raises(
        TypeError, match=f"linear: expected an nnx.Linear, got {type(other).__name__}"
    ):
        jaxint8.nnx.Dense8bit.from_linear(other)


def test_what_a_subclass_adds_is_not_dropped():
    linear = nnx.LoRALinear(8, 4, lora_rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"got LoRALinear: merge what it adds into a Linear first"):
        jaxint8.nnx.Dense8bit.from_linear(linear)
