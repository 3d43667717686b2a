"""convert_params: a trained float model and its 8-bit twin give nearly the same output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxint8 import Dense8bit, RelativeThreshold, convert_params, quantize


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


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "variables: expected a mapping", lambda: convert_params([])),
        (ValueError, "no 'params'", lambda: convert_params({"quant": {}})),
        (ValueError, r"rules\[0\]", lambda: convert_params({"params": {}}, [("a", "int4")])),
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
