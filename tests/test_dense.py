"""Dense8bit for Linen: the same numbers as int8_linear, and a good citizen of a Flax model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxint8 import (
    Dense8bit,
    QuantizedMatrix,
    RelativeThreshold,
    convert_params,
    int8_linear,
    quantize,
)


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


def test_the_order_of_its_arguments_is_that_of_the_contract():
    layer = Dense8bit(5, False, None, "float", jnp.bfloat16, "xla")
    assert (layer.use_bias, layer.outliers, layer.outlier_arithmetic) == (False, None, "float")
    assert (layer.dtype, layer.implementation) == (jnp.bfloat16, "xla")


def test_takes_the_floats_of_numpy():
    v = variables()
    x = np.random.default_rng(0).normal(size=(3, 12))
    for dtype in (None, jnp.bfloat16):
        layer = Dense8bit(5, dtype=dtype)
        y = layer.apply(v, x)
        np.testing.assert_array_equal(y, layer.apply(v, jnp.asarray(x, jnp.float32)))
        assert y.dtype == (dtype or jnp.float32)


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
    assert specs["quant"]["codes"] == P("model", None)
    assert specs["quant"]["scale"] == P("model")


def test_partition_names_are_logical():
    layer = Dense8bit(8, kernel_axes=("mlp", "embed"))
    x = jnp.ones((2, 12))
    rules = (("embed", None), ("mlp", "model"))
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        # Like jit of any Flax layer with logical names: shapes, then their shardings, then values.
        shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
        specs = nn.get_partition_spec(shapes)
        assert specs["quant"]["codes"] == P("mlp", "embed")
        shardings = nn.logical_to_mesh_sharding(specs, mesh, rules)
        v = jax.jit(layer.init, out_shardings=shardings)(jax.random.key(0), x)
        assert layer.apply(v, x).shape == (2, 8)
    codes = v["quant"]["codes"]
    assert isinstance(codes, nn.LogicallyPartitioned)
    assert codes.value.sharding.is_equivalent_to(NamedSharding(mesh, P("model", None)), 2)
    with jax.set_mesh(mesh):  # without rules nothing is constrained
        layer.init(jax.random.key(0), x)


def test_layers_that_flax_numbers_are_found_by_a_class_called_dense():
    """Also beside layers that stay float, which have numbers of the same row."""

    class Dense(Dense8bit):
        outliers: RelativeThreshold = RelativeThreshold(6.0)

    class Model(nn.Module):
        kind: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            x = nn.relu(self.kind(32)(x))
            x = nn.Dense(24)(x)
            return self.kind(10)(x)

    x = jax.random.normal(jax.random.key(0), (4, 12))
    v = Model(nn.Dense).init(jax.random.key(1), x)
    converted = convert_params(v, [("Dense_1", "keep"), (".*", "int8")])
    assert set(converted["quant"]) == {"Dense_0", "Dense_2"}

    def int8(x: jax.Array, name: str) -> jax.Array:
        w = QuantizedMatrix(**converted["quant"][name])
        return int8_linear(x, w, converted["params"][name]["bias"], outliers=RelativeThreshold(6.0))

    hidden = nn.Dense(24).apply({"params": v["params"]["Dense_1"]}, nn.relu(int8(x, "Dense_0")))
    assert isinstance(hidden, jax.Array)
    np.testing.assert_array_equal(Model(Dense).apply(converted, x), int8(hidden, "Dense_2"))


def test_a_layer_without_codes_says_what_its_name_has_to_do_with_it():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Dense8bit(5)(x)

    v = {collection: {"Dense_0": tree} for collection, tree in variables().items()}
    with pytest.raises(ValueError, match="Dense8bit_0/codes: .*'quant'.*name of the nn.Dense"):
        Model().apply(v, jnp.ones((2, 12)))
    with pytest.raises(ValueError, match="^scale: expected in the collection 'quant'"):
        Dense8bit(5).apply({"quant": {"codes": jnp.zeros((5, 12), jnp.int8)}}, jnp.ones((2, 12)))


@pytest.mark.parametrize(
    ("codes", "scale", "message"),
    [
        ((32, 12), (32,), r"^codes: expected shape \[5, 12\] by features=5 .*, got \[32, 12\]"),
        ((5, 8), (5,), r"^codes: expected shape \[5, 12\] .*, got \[5, 8\]"),
        ((5, 12), (1,), r"^scale: expected shape \[5\] .*, got \[1\]"),
    ],
)
def test_codes_and_scale_must_fit_the_layer(codes, scale, message):
    v = {"quant": {"codes": jnp.zeros(codes, jnp.int8), "scale": jnp.ones(scale)}}
    with pytest.raises(ValueError, match=message):
        Dense8bit(5, use_bias=False).apply(v, jnp.ones((2, 12)))


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
