"""Tests of jaxint8.models.probe: the float function under injection, zeroed inputs, attention probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoder import load_case, run

from jaxint8.models import decoder, probe
from jaxint8.models.observe import linear_inputs


@pytest.mark.parametrize("case", ["llama_gqa_tied", "opt_pre_norm"])
def test_injected_outliers_change_no_bit_of_the_float_function(case):
    config, params, golden = load_case(case)
    tokens = jnp.asarray(golden["tokens"])
    injected = probe.inject(config, params, [3, 17], 64.0)
    before, after = (linear_inputs(config, p, tokens) for p in (params, injected))
    for name, x in before.items():
        expected = np.array(x)
        if name.endswith(("qkv", "up")):
            expected[..., [3, 17]] *= 64
        np.testing.assert_array_equal(after[name], expected)
    np.testing.assert_array_equal(run(config, injected, tokens)[0], run(config, params, tokens)[0])


def test_injection_refuses_what_would_change_the_function():
    config, params, _ = load_case("llama_gqa_tied")
    with pytest.raises(ValueError, match="factor: expected a power of two, got 3"):
        probe.inject(config, params, [0], 3.0)
    with pytest.raises(ValueError, match="dimensions: expected 0 to 31, got .32."):
        probe.inject(config, params, [0, 32], 2.0)
    config, params, _ = load_case("opt_post_norm")
    with pytest.raises(ValueError, match="inject: opt has no norm weight before its linear layers"):
        probe.inject(config, params, [0], 2.0)


def test_without_is_a_zeroed_input():
    config, params, golden = load_case("llama_gqa_tied")
    tokens = jnp.asarray(golden["tokens"])
    zeroed = probe.without(params, [1, 30], ["qkv"])
    norm = params["layers"][0]["attention_norm"]
    silent = {**norm, "weight": norm["weight"].at[jnp.array([1, 30])].set(0)}
    layers = [{**params["layers"][0], "attention_norm": silent}, *zeroed["layers"][1:]]
    expected = run(config, {**params, "layers": layers}, tokens)[0]
    np.testing.assert_allclose(run(config, zeroed, tokens)[0], expected, rtol=0, atol=1e-5)
    assert np.abs(expected - golden["logits"]).max() > 0.01
    np.testing.assert_array_equal(
        run(config, probe.without(params, [], ["qkv"]), tokens)[0], run(config, params, tokens)[0]
    )


@pytest.mark.parametrize("case", ["llama_gqa_tied", "opt_pre_norm", "bloom"])
def test_top1_probability_is_that_of_the_attention(case, monkeypatch):
    """The probabilities that attention uses, read off by giving it one-hot values."""
    config, params, golden = load_case(case)
    tokens = jnp.asarray(golden["tokens"])
    seen = []
    attention = decoder.attend

    def spy(query, key, value, *masks):
        width, slots = key.shape[-1], key.shape[1]
        shares = []
        for first in range(0, slots, width):  # values are as wide as keys, so a few slots at a time
            some = jnp.eye(slots, dtype=query.dtype)[None, :, None, first : first + width]
            with jax.numpy_dtype_promotion("standard"):
                eye = jnp.broadcast_to(some, key.shape)
                shares.append(np.asarray(attention(query, key, eye, *masks)))
        seen.append(np.concatenate(shares, axis=-1).max(axis=-1).mean())
        return attention(query, key, value, *masks)

    monkeypatch.setattr(decoder, "attend", spy)
    with jax.disable_jit():
        inputs = linear_inputs(config, params, tokens)
    monkeypatch.undo()
    assert len(seen) == config.layers
    found = probe.top1_probability(config, params, inputs)
    assert found == pytest.approx(np.mean(seen), abs=1e-5)
