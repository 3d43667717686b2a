"""convert_params: a trained float model and its 8-bit twin give nearly the same output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxint8 import Dense8bit, RelativeThreshold, convert_params, quantize
from jaxint8.convert import DEFAULT_RULES


class Mlp(nn.Module):
    dense: type[nn.Module] = nn.Dense
    options: tuple = ()

    @nn.compact
    def __call__(self, x):
        options = dict(self.options)
        x = nn.LayerNorm(name="norm")(x)
        x = nn.relu(self.dense(64, name="up", **options)(x))
        x = self.dense(16, use_bias=False, name="down", **options)(x)
        return nn.Dense(10, name="lm_head")(x)


def test_a_converted_model_runs_in_its_8bit_twin():
    x = jax.random.normal(jax.random.key(1), (8, 32))
    v = Mlp().init(jax.random.key(0), x)
    converted = convert_params(v)
    assert set(converted["quant"]) == {"up", "down"}
    assert "kernel" in converted["params"]["lm_head"]
    assert "kernel" not in converted["params"]["up"]
    assert converted["params"]["up"]["bias"] is v["params"]["up"]["bias"]
    twin = Mlp(Dense8bit, (("outliers", RelativeThreshold()),))
    wanted = jax.tree.map(
        lambda a: (a.shape, a.dtype), jax.eval_shape(twin.init, jax.random.key(0), x)
    )
    assert jax.tree.map(lambda a: (a.shape, a.dtype), converted) == wanted
    y, expected = jax.jit(twin.apply)(converted, x), Mlp().apply(v, x)
    assert np.linalg.norm(y - expected) <= 0.02 * np.linalg.norm(expected)
    w = quantize(v["params"]["up"]["kernel"])
    np.testing.assert_array_equal(converted["quant"]["up"]["codes"], w.codes)


def test_rules_choose_and_the_first_match_decides():
    v = Mlp().init(jax.random.key(0), jnp.ones((1, 32)))
    converted = convert_params(v, [("up$", "keep"), ("lm_head|up|down", "int8")])
    assert set(converted["quant"]) == {"down", "lm_head"}
    assert set(v["params"]["down"]) == {"kernel"}  # the input is not changed


def test_stacked_kernels_and_partition_metadata():
    kernel = nn.Partitioned(jnp.ones((3, 8, 4)), ("layers", "in", "out"))
    converted = convert_params({"params": {"block": {"kernel": kernel}}})
    codes = converted["quant"]["block"]["codes"]
    assert codes.names == ("layers", "out", "in")
    assert codes.value.shape == (3, 4, 8)
    assert converted["quant"]["block"]["scale"].names == ("layers", "out")


class Mixed(nn.Module):
    dense: type[nn.Module] = nn.Dense
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3,), use_bias=self.use_bias, name="conv")(x)
        x = nn.MultiHeadDotProductAttention(4, use_bias=self.use_bias, name="attention")(x)
        return self.dense(8, name="up")(x)


@pytest.mark.parametrize("use_bias", [True, False])
def test_kernels_of_other_layers_stay(use_bias):
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))
    v = Mixed(use_bias=use_bias).init(jax.random.key(0), x)
    # A kernel without a bias beside it does not tell what it is: a rule must.
    rules = [(r"(^|/)(conv|attention)(/|$)", "keep"), *DEFAULT_RULES]
    converted = convert_params(v) if use_bias else convert_params(v, rules)
    assert set(converted["quant"]) == {"up"}
    y = Mixed(Dense8bit, use_bias=use_bias).apply(converted, x)
    expected = Mixed(use_bias=use_bias).apply(v, x)
    assert np.linalg.norm(y - expected) <= 0.02 * np.linalg.norm(expected)


class Block(nn.Module):
    dense: type[nn.Module]
    use_bias: bool

    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(self.dense(8, use_bias=self.use_bias, name="up")(x)), None


def scanned(dense, use_bias, axis=0):
    axes = {"params": axis, "quant": axis}
    stack = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)
    return stack(dense, use_bias)


@pytest.mark.parametrize("use_bias", [True, False])
def test_scanned_layers_are_converted_by_default(use_bias):
    x = jax.random.normal(jax.random.key(1), (4, 8))
    v = scanned(nn.Dense, use_bias).init(jax.random.key(0), x, None)
    y, _ = scanned(Dense8bit, use_bias).apply(convert_params(v), x, None)
    expected, _ = scanned(nn.Dense, use_bias).apply(v, x, None)
    assert np.linalg.norm(y - expected) <= 0.02 * np.linalg.norm(expected)


def test_layers_scanned_over_another_axis_stay():
    x = jnp.ones((4, 8))
    v = scanned(nn.Dense, True, axis=1).init(jax.random.key(0), x, None)
    assert v["params"]["up"]["kernel"].shape == (8, 3, 8)
    with pytest.raises(
        ValueError, match=r"no kernel was converted: .*\[layers, n\].* paths are up"
    ):
        convert_params(v)
    v["params"]["other"] = {"kernel": jnp.ones((8, 4))}
    converted = convert_params(v)
    assert set(converted["quant"]) == {"other"}
    assert converted["params"]["up"]["kernel"] is v["params"]["up"]["kernel"]


def test_logical_names_stay_logical():
    init = nn.with_logical_partitioning(
        nn.initializers.lecun_normal(), ("embed", "mlp"), rules=(("mlp", "model"),)
    )
    x = jnp.ones((2, 8))
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        v = nn.Dense(4, kernel_init=init).init(jax.random.key(0), x)
        quant = convert_params(v)["quant"]
        for name, names in (("codes", ("mlp", "embed")), ("scale", ("mlp",))):
            assert isinstance(quant[name], nn.LogicallyPartitioned)
            assert quant[name].names == names
            assert quant[name].rules == (("mlp", "model"),)
        codes = jax.jit(nn.unbox)(quant["codes"])
        assert codes.sharding.is_equivalent_to(NamedSharding(mesh, P("model", None)), 2)
        assert Dense8bit(4).apply(convert_params(v), x).shape == (2, 4)


def test_partition_names_at_the_end_may_be_left_out():
    kernel = nn.Partitioned(jnp.ones((8, 4)), ("in",))
    quant = convert_params({"params": {"block": {"kernel": kernel}}})["quant"]["block"]
    assert quant["codes"].names == (None, "in")
    assert quant["scale"].names == (None,)


def test_everything_else_is_passed_on_as_it_is():
    bias, odd = jnp.ones(3), {"kernel": {}, "bias": None}
    v = {
        "params": {0: {"kernel": jnp.ones((2, 3)), "bias": bias}, "odd": odd, "empty": {}},
        "quant": {"earlier": {}},
    }
    converted = convert_params(v, [("^0$", "int8")])
    assert converted["params"] == {0: {"bias": bias}, "odd": odd, "empty": {}}
    assert converted["quant"][0]["codes"].shape == (3, 2)
    assert converted["quant"]["earlier"] == {}


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "variables: expected a mapping", lambda: convert_params([])),
        (ValueError, "no 'params'", lambda: convert_params({"quant": {}})),
        (TypeError, "rules: expected .* got None", lambda: convert_params({"params": {}}, None)),
        (ValueError, r"rules\[0\]", lambda: convert_params({"params": {}}, [("a", "int4")])),
        (ValueError, "no 'params'", lambda: convert_params({"quant": {}, 0: {}})),
        (TypeError, r"\['params'\]: .* got NoneType", lambda: convert_params({"params": None})),
        (TypeError, r"\['params'\]: .* got list", lambda: convert_params({"params": []})),
        (
            TypeError,
            r"\['quant'\]: .* got list",
            lambda: convert_params({"params": {"kernel": jnp.ones((2, 2))}, "quant": []}),
        ),
        (
            ValueError,
            r"rules\[0\]: expected a regular expression, got 1",
            lambda: convert_params({"params": {}}, [(1, "int8")]),
        ),
        (
            ValueError,
            r"block/kernel: expected at least one layer, got \[0, 2, 3\]",
            lambda: convert_params({"params": {"block": {"kernel": jnp.ones((0, 2, 3))}}}),
        ),
        (
            ValueError,
            "no kernel was converted.*paths are 1, a",
            lambda: convert_params({"params": {"a": {"b": 1}, 1: {"b": 1}}}),
        ),
        (
            ValueError,
            "bad regular expression",
            lambda: convert_params({"params": {}}, [("(", "int8")]),
        ),
        (
            ValueError,
            "no kernel was converted",
            lambda: convert_params({"params": {"a": {"kernel": jnp.ones((2, 2))}}}, []),
        ),
        (
            ValueError,
            "block/up/kernel: holds a non-finite",
            lambda: convert_params(
                {"params": {"block": {"up": {"kernel": jnp.full((2, 2), jnp.nan)}}}}
            ),
        ),
    ],
)
def test_errors_name_rule_or_path(error, message, call):
    with pytest.raises(error, match=message):
        call()
