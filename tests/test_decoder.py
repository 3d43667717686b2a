"""The decoder against Hugging Face, against itself with a cache, and against itself in int8."""

import dataclasses
import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxint8 import QuantizedMatrix, RelativeThreshold, Threshold, kernels, quantize
from jaxint8.checkpoint import open_checkpoint
from jaxint8.models.attention import rope_frequencies
from jaxint8.models.cache import init_cache
from jaxint8.models.config import DecoderConfig, QuantizationConfig
from jaxint8.models.decoder import forward
from jaxint8.models.families import family_from_hf

GOLDENS = pathlib.Path(__file__).parent / "goldens"
CASES = sorted(path.parent.name for path in GOLDENS.glob("*/golden.npz"))
# Both sides sum about a hundred float32 products per output over a handful of layers; logits are
# of order 1 to 10.
TOLERANCE = 1e-4


@functools.cache
def load_case(case: str) -> tuple[DecoderConfig, dict, dict[str, np.ndarray]]:
    """Reads config, float32 parameters and goldens; by the weight map alone, not by the loader."""
    described = json.loads((GOLDENS / case / "config.json").read_text())
    family = family_from_hf(described)
    config = family.config_from_hf(described)
    reader = open_checkpoint(GOLDENS / case)
    tensors = {name: reader.read(name) for name in reader.names()}
    params = build(family.weight_map(config), tensors)
    with np.load(GOLDENS / case / "golden.npz") as golden:
        return config, params, dict(golden)


def build(weight_map: dict, tensors: dict[str, np.ndarray]) -> dict:
    """Fills the tree that a weight map describes."""
    params: dict = {"layers": []}
    for path, source in weight_map.items():
        node = params
        for key, following in itertools.pairwise(path):
            if isinstance(node, list):
                node.extend({} for _ in range(key + 1 - len(node)))
                node = node[key]
            else:
                node = node.setdefault(key, [] if isinstance(following, int) else {})
        value = np.concatenate([p.arrange(p.take(tensors[p.name])) for p in source.parts])
        assert value.shape == source.shape, path
        node[path[-1]] = jnp.asarray(value)
    return params


run = jax.jit(forward, static_argnums=0, static_argnames=("quantization", "last_only", "greedy"))


def test_goldens_exist() -> None:
    assert len(CASES) == 9


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_hugging_face(case: str) -> None:
    config, params, golden = load_case(case)
    logits, cache = run(config, params, jnp.asarray(golden["tokens"]))
    assert cache is None
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, golden["logits"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_cache_changes_nothing(case: str) -> None:
    config, params, golden = load_case(case)
    tokens = jnp.asarray(golden["tokens"])
    cache = init_cache(config, 32, jnp.zeros((2,), jnp.int32), jnp.float32)
    parts, at = [], 0
    for length in (10, 1, 1, 6, 6):  # a prompt, single tokens, several at once
        logits, cache = run(config, params, tokens[:, at : at + length], cache)
        parts.append(logits)
        at += length
    assert cache is not None
    assert int(cache.length) == 24
    np.testing.assert_allclose(
        jnp.concatenate(parts, axis=1), golden["logits"], atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize("case", ["llama_gqa_tied", "opt_pre_norm", "bloom"])
def test_an_int8_cache_holds_what_prompts_see(case: str) -> None:
    config, params, golden = load_case(case)
    how = QuantizationConfig(outliers=None, kv_cache="int8")
    tokens = jnp.asarray(golden["tokens"])
    whole, _ = run(config, params, tokens, quantization=how)
    cache = init_cache(config, 32, jnp.zeros((2,), jnp.int32), jnp.float32, how)
    parts, at = [], 0
    for length in (10, 1, 1, 6, 6):
        logits, cache = run(config, params, tokens[:, at : at + length], cache, quantization=how)
        parts.append(logits)
        at += length
    # Float rounding moves a code now and then, by which a logit moves less than by all of int8.
    found = jnp.concatenate(parts, axis=1)
    moved = np.abs(whole - golden["logits"])
    assert 1e-3 < moved.mean() < 0.03
    assert np.abs(found - whole).mean() < moved.mean() / 10


@pytest.mark.skipif("cpu" not in kernels.platforms(), reason="no compiled CPU kernels")
def test_a_token_and_an_int8_cache_take_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    config, params, golden = load_case("llama_gqa_tied")
    config = dataclasses.replace(config, head_dim=64)  # as kernels have it
    rng, wide = np.random.default_rng(0), 64 * (config.heads + 2 * config.kv_heads)

    def weight(n: int, k: int) -> dict[str, jax.Array]:
        return {"weight": jnp.asarray(rng.normal(size=(n, k)) / np.sqrt(k), jnp.float32)}

    hidden = params["embedding"].shape[1]
    layers = [
        {**layer, "qkv": weight(wide, hidden), "out": weight(hidden, 64 * config.heads)}
        for layer in params["layers"]
    ]
    params = {**params, "layers": layers}
    how = QuantizationConfig(outliers=None, kv_cache="int8")
    tokens = jnp.asarray(golden["tokens"])
    start = jnp.asarray([0, 3], jnp.int32)

    def steps() -> tuple[jax.Array, bool]:
        cache = init_cache(config, 32, start, jnp.float32, how)
        _, cache = run(config, params, tokens[:, :10], cache, quantization=how)
        text = run.lower(config, params, tokens[:, :1], cache, quantization=how).as_text()
        logits = []
        for at in range(10, 20):
            one = tokens[:, at : at + 1]
            found, cache = run(config, params, one, cache, quantization=how)
            logits.append(found)
        return jnp.concatenate(logits), "jaxint8_attend" in text

    jax.clear_caches()
    found, has_kernel = steps()
    assert has_kernel
    monkeypatch.setattr("jaxint8.models.decoder.kernel_platforms", lambda *_: ())
    jax.clear_caches()
    portable, has_kernel = steps()
    assert not has_kernel
    jax.clear_caches()
    # Both hold the same codes but for those that a float rounding moves.
    assert np.abs(found - portable).mean() < 1e-3 * np.abs(portable).mean()


def test_a_cache_of_another_kind_is_refused() -> None:
    config, params, golden = load_case("llama_mha")
    tokens, start = jnp.asarray(golden["tokens"]), jnp.zeros((2,), jnp.int32)
    how = QuantizationConfig(kv_cache="int8")
    with pytest.raises(ValueError, match="cache: expected kv_cache='float' .* got 'int8'"):
        run(config, params, tokens, init_cache(config, 32, start, jnp.float32, how))
    with pytest.raises(ValueError, match="cache: expected kv_cache='int8' .* got 'float'"):
        run(config, params, tokens, init_cache(config, 32, start, jnp.float32), quantization=how)
    with pytest.raises(ValueError, match="implementation must be one of None, 'cuda', .*got 'gpu'"):
        QuantizationConfig(implementation="gpu")
    with pytest.raises(ValueError, match="kv_cache must be one of 'float', 'int8', got 'int4'"):
        QuantizationConfig(kv_cache="int4")  # type: ignore[arg-type]


def left_padded(rows: list[np.ndarray], filler: int) -> tuple[jnp.ndarray, jnp.ndarray]:
    longest = max(map(len, rows))
    start = [longest - len(row) for row in rows]
    tokens = [np.concatenate([np.full(s, filler), row]) for s, row in zip(start, rows, strict=True)]
    return jnp.asarray(np.stack(tokens), jnp.int32), jnp.asarray(start, jnp.int32)


@pytest.mark.parametrize("case", ["llama_rope_llama3", "opt_post_norm", "opt_pre_norm", "bloom"])
def test_ragged_batch_equals_each_row_alone(case: str) -> None:
    config, params, golden = load_case(case)
    lengths = (3, 24, 1, 11)
    rows = [golden["tokens"][i % 2, :length] for i, length in enumerate(lengths)]
    tokens, start = left_padded(rows, filler=5)
    cache = init_cache(config, 32, start, jnp.float32)
    logits, _ = run(config, params, tokens, cache)
    for i, length in enumerate(lengths):
        np.testing.assert_allclose(
            logits[i, 24 - length :], golden["logits"][i % 2, :length], atol=TOLERANCE, rtol=0
        )


def test_last_only_is_the_last() -> None:
    config, params, golden = load_case("opt_post_norm")
    tokens = jnp.asarray(golden["tokens"])
    last, _ = run(config, params, tokens, last_only=True)
    assert last.shape == (2, 1, config.vocab_size)
    np.testing.assert_allclose(last, golden["logits"][:, -1:], atol=TOLERANCE, rtol=0)
    token, _ = run(config, params, tokens, last_only=True, greedy=True)
    assert token.dtype == jnp.int32
    assert (token == last[:, 0].argmax(axis=-1)).all()
    with pytest.raises(ValueError, match="last_only"):
        run(config, params, tokens, greedy=True)


def test_neighbours_do_not_change_a_row() -> None:
    config, params, golden = load_case("llama_gqa_tied")
    tokens = jnp.asarray(golden["tokens"])
    other = tokens.at[1].set(7)
    one, _ = run(config, params, tokens)
    two, _ = run(config, params, other)
    assert (one[0] == two[0]).all()
    assert not (one[1] == two[1]).all()


@jax.jit
def quantized(params: dict) -> dict:
    """Every linear layer in int8; the head stays float, as it does by default."""
    tree = {**params, "layers": []}
    for layer in params["layers"]:
        tree["layers"].append(
            {
                name: {**leaves, "weight": quantize(leaves["weight"].T)}
                if name in ("qkv", "out", "up", "down")
                else leaves
                for name, leaves in layer.items()
            }
        )
    for name in ("project_in", "project_out"):
        if name in params:
            tree[name] = {"weight": quantize(params[name]["weight"].T)}
    return tree


def is_matrix(leaf: object) -> bool:
    return isinstance(leaf, QuantizedMatrix)


@pytest.mark.parametrize("case", ["llama_biases", "llama_gqa_tied", "opt_post_norm"])
def test_int8_is_the_dequantised_model_but_for_rounded_activations(case: str) -> None:
    config, params, golden = load_case(case)
    tokens = jnp.asarray(golden["tokens"])
    int8 = quantized(params)
    # With every value an outlier, rows are 15-bit integers: half a step of absmax / 16256 each.
    fine = QuantizationConfig(outliers=Threshold(0.0, "token"), outlier_arithmetic="int15")
    plain = QuantizationConfig(outliers=None)
    dequantised = jax.tree.map(
        lambda leaf: leaf.dequantize().T if is_matrix(leaf) else leaf, int8, is_leaf=is_matrix
    )
    expected, _ = run(config, dequantised, tokens)
    size = float(jnp.std(expected))
    errors = [
        float(jnp.max(jnp.abs(run(config, int8, tokens, quantization=q)[0] - expected))) / size
        for q in (fine, plain)
    ]
    # Rounding noise of a code is 1 / sqrt(12) steps; absmax / 127 over the rms of about absmax / 3
    # makes it 0.7 % of a value at 8 bits. Ten products in a row and the tail of 4,608 logits allow
    # ten times that; 15 bits are 128 times finer.
    assert errors[1] < 0.3
    assert errors[0] < 0.3 / 64
    assert errors[0] < errors[1] / 16
    # The weights were really rounded.
    assert float(jnp.max(jnp.abs(expected - golden["logits"]))) > 1e-3


def test_stacking_rows_does_not_change_codes() -> None:
    _, params, _ = load_case("llama_gqa_tied")
    fused = params["layers"][0]["qkv"]["weight"]
    whole = quantize(fused.T)
    for rows in (slice(0, 32), slice(32, 48), slice(48, 64)):
        part = quantize(fused[rows].T)
        assert (part.codes == whole.codes[rows]).all()
        assert (part.scale == whole.scale[rows]).all()


@pytest.mark.parametrize(
    "how",
    [
        QuantizationConfig(outliers=Threshold(1.0, "column")),
        QuantizationConfig(outliers=RelativeThreshold(1.5, "column")),
        QuantizationConfig(outliers=None, activations="tensor"),
    ],
)
def test_padding_does_not_vote(how: QuantizationConfig) -> None:
    # Column-scope rules look at every row of a call, so padding has to be out of their sight.
    config, params, golden = load_case("opt_post_norm")
    int8 = quantized(params)
    rows = [golden["tokens"][0, :20], golden["tokens"][1, :9]]
    outcomes = []
    for filler in (0, 17):
        tokens, start = left_padded(rows, filler)
        cache = init_cache(config, 20, start, jnp.float32)
        outcomes.append(run(config, int8, tokens, cache, quantization=how)[0])
    assert (outcomes[0][0] == outcomes[1][0]).all()
    assert (outcomes[0][1, 11:] == outcomes[1][1, 11:]).all()


def test_bfloat16() -> None:
    config, params, golden = load_case("llama_gqa_tied")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    cache = init_cache(config, 24, jnp.zeros((2,), jnp.int32), jnp.bfloat16)
    logits, cache = run(config, half, jnp.asarray(golden["tokens"]), cache)
    assert logits.dtype == jnp.float32
    assert cache is not None
    assert cache.keys[0].dtype == jnp.bfloat16
    # Relative rounding of 2**-9 at a few dozen places, against logits of standard deviation 1.4.
    error = np.abs(logits - golden["logits"])
    assert error.mean() < 0.03
    assert error.max() > TOLERANCE


def test_llama3_scaling_has_three_ranges() -> None:
    config, _, _ = load_case("llama_rope_llama3")
    plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    scaled = rope_frequencies(config)
    ratio = plain / scaled
    assert ratio[0] == 1
    assert ratio[-1] == 8
    assert ((ratio > 1) & (ratio < 8)).any()
    assert (np.diff(ratio) >= 0).all()


def test_rope_factors_divide_frequencies() -> None:
    # A GGUF file holds llama3 scaling as divisors; the two forms must agree.
    config, params, golden = load_case("llama_rope_llama3")
    plain = dataclasses.replace(config, rope_scaling=None, rope_factors=True)
    factors = rope_frequencies(dataclasses.replace(config, rope_scaling=None)) / rope_frequencies(
        config
    )
    logits, _ = run(
        plain, {**params, "rope_factors": jnp.asarray(factors)}, jnp.asarray(golden["tokens"])
    )
    np.testing.assert_allclose(logits, golden["logits"], atol=TOLERANCE, rtol=0)
    without, _ = run(plain, params, jnp.asarray(golden["tokens"]))
    assert float(jnp.max(jnp.abs(without - golden["logits"]))) > 0.05


def test_weights_are_arguments() -> None:
    # A closed-over weight would become a constant of the program.
    config, params, golden = load_case("llama_mha")
    text = run.lower(config, params, jnp.asarray(golden["tokens"])).as_text()
    assert "dense_resource" not in text
    assert max(map(len, text.splitlines())) < 20_000
