"""Tests of jaxint8.models.observe: the inputs it returns are those that the layers multiply."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoder import load_case, quantized, run

from jaxint8.models.config import QuantizationConfig
from jaxint8.models.decoder import forward
from jaxint8.models.observe import linear_inputs


@pytest.mark.parametrize(
    ("case", "more"),
    [
        ("llama_gqa_tied", {}),
        ("opt_pre_norm", {}),
        ("opt_post_norm", {"project_in": 20, "project_out": 32}),
    ],
)
def test_every_linear_layer_is_seen_by_name(case, more):
    config, params, golden = load_case(case)
    inputs = linear_inputs(config, params, jnp.asarray(golden["tokens"]))
    widths = {"qkv": 32, "out": 32, "up": 32, "down": 48}
    places = {f"layers.{i}.{name}": k for i in range(config.layers) for name, k in widths.items()}
    shape = golden["tokens"].shape
    assert {name: x.shape for name, x in inputs.items()} == {
        name: (*shape, k) for name, k in {**places, **more}.items()
    }


def test_inputs_are_what_the_weights_multiply():
    """With one token, the gradient of a weight is that of its bias times the input."""
    config, params, _ = load_case("opt_pre_norm")
    tokens = jnp.array([[7]], jnp.int32)
    gradient = jax.grad(lambda params: jnp.sum(forward(config, params, tokens)[0] ** 2))(params)
    for name, x in linear_inputs(config, params, tokens).items():
        _, i, site = name.split(".")
        layer = gradient["layers"][int(i)][site]
        expected = np.outer(layer["bias"], x)
        # One product in float32, its terms rounded in another order.
        scale = np.max(np.abs(expected))
        np.testing.assert_allclose(layer["weight"], expected, rtol=0, atol=1e-5 * scale)


def test_works_under_jit_on_int8_and_changes_no_result():
    config, params, golden = load_case("llama_gqa_tied")
    params, how = quantized(params), QuantizationConfig(outliers=None)
    tokens = jnp.asarray(golden["tokens"])
    before = run(config, params, tokens, quantization=how)[0]
    inputs = jax.jit(linear_inputs, static_argnums=0, static_argnames="quantization")
    jitted = inputs(config, params, tokens, quantization=how)
    for name, x in linear_inputs(config, params, tokens, quantization=how).items():
        np.testing.assert_allclose(jitted[name], x, rtol=0, atol=1e-4)
    assert "tap" not in params["layers"][0]["qkv"]
    np.testing.assert_array_equal(run(config, params, tokens, quantization=how)[0], before)
