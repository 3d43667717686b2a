"""Dense8bit for Linen: the same numbers as int8_linear, and a good citizen of a Flax model."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxint8 import Dense8bit, QuantizedMatrix, RelativeThreshold, int8_linear, quantize


def variables(k: int = 12, n: int = 5):
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(k, n)).astype(np.float32))
    w = quantize(kernel)
    return {"params": {"bias": jnp.arange(5.0)}, "quant": {"codes": w.codes, "scale": w.scale}}


def test_equals_int8_linear():
    v = variables()
    x = jax.random.normal(jax.random.key(0), (2, 3, 12)).at[0, 0, 0].set(30)
    w = QuantizedMatrix(**v["quant"])
    for outliers in (6.0, None, RelativeThreshold()):
        y = Dense8bit(5, outliers=outliers).apply(v, x)
        np.testing.assert_array_equal(y, int8_linear(x, w, v["params"]["bias"], outliers=outliers))
    half = Dense8bit(5, dtype=jnp.bfloat16).apply(v, x)
    assert half.dtype == jnp.bfloat16


def test_init_makes_zeros_outside_the_parameters():
    v = Dense8bit(5).init(jax.random.key(0), jnp.ones((2, 12)))
    assert jax.tree.map(lambda a: (a.dtype.name, a.shape), v) == {
        "params": {"bias": ("float32", (5,))},
        "quant": {"codes": ("int8", (5, 12)), "scale": ("float32", (5,))},
    }
    assert "params" not in Dense8bit(5, use_bias=False).init(jax.random.key(0), jnp.ones((2, 12)))


def test_partition_names_reach_the_specs():
    layer = Dense8bit(5, kernel_axes=("model", None))
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((2, 12)))
    specs = nn.get_partition_spec(shapes)
    assert specs["quant"]["codes"] == jax.sharding.PartitionSpec("model", None)
    assert specs["quant"]["scale"] == jax.sharding.PartitionSpec("model")


def test_bias_is_trained_and_codes_are_not():
    v = variables()
    x = jax.random.normal(jax.random.key(0), (4, 12))

    def loss(params):
        return jnp.sum(Dense8bit(5).apply({**v, "params": params}, x) ** 2)

    grads = jax.jit(jax.grad(loss))(v["params"])
    assert set(grads) == {"bias"}
    assert np.all(np.abs(grads["bias"]) > 0)


def test_scans_over_stacked_layers():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return Dense8bit(12, outliers=None)(x), None

    stack = nn.scan(
        Block, variable_axes={"params": 0, "quant": 0}, split_rngs={"params": True}, length=3
    )()
    x = jax.random.normal(jax.random.key(0), (2, 12))
    v = stack.init(jax.random.key(1), x, None)
    w = quantize(jax.random.normal(jax.random.key(2), (12, 12)))
    quant = {"codes": jnp.stack([w.codes] * 3), "scale": jnp.stack([w.scale] * 3)}
    v = {"params": v["params"], "quant": {"Dense8bit_0": quant}}
    y, _ = jax.jit(stack.apply)(v, x, None)
    expected = x
    for _ in range(3):
        expected = int8_linear(expected, w, jnp.zeros(12), outliers=None)
    np.testing.assert_array_equal(y, expected)
