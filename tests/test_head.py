"""The int8 head: its error stays under a bound, its best logits are exact, its greedy choice is the float head's."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoder import load_case, quantized, run

from jaxint8 import RelativeThreshold, TopK, int8_linear, kernels, quantize
from jaxint8.models import load
from jaxint8.models.config import QUANTIZATIONS, QuantizationConfig
from jaxint8.models.generate import generate_tokens
from jaxint8.models.head import BLOCK, CANDIDATES, largest, most_likely, rescore
from jaxint8.models.sampling import Sampling
from jaxint8.quantize import quantize_rows

GOLDENS = pathlib.Path(__file__).parent / "goldens"
RULES = (None, RelativeThreshold(2.0), TopK(4))
VOCAB, WIDTH = 3000, 64


@functools.cache
def random_head(seed: int, spread: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Rows float32[40, 1, WIDTH] and a head [VOCAB, WIDTH]; heavier tails than a normal's."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(4, size=(40, 1, WIDTH))
    table = rng.standard_t(6, size=(VOCAB, WIDTH)) * rng.uniform(1 / spread, 1, size=(VOCAB, 1))
    return jnp.asarray(x, jnp.float32), jnp.asarray(table, jnp.float32)


@functools.partial(jax.jit, static_argnames="rule")
def both(x: jax.Array, table: jax.Array, rule: RelativeThreshold | None) -> tuple[jax.Array, ...]:
    """Int8 logits, the same rescored, float logits, and the bound of each int8 logit's error."""
    head = quantize(table.T)
    approximate = int8_linear(x, head, outliers=rule)
    exact = jnp.einsum("btk,nk->btn", x, table, precision="highest")
    step = quantize_rows(x[:, 0], rule).scale[:, None]  # the a of `rescore`
    absolute = jnp.sum(jnp.abs(x), axis=-1, keepdims=True)
    weights = jnp.sum(jnp.abs(head.dequantize()), axis=0)
    bound = head.scale[None, None] / 2 * absolute + step / 2 * weights[None, None]
    found = rescore(approximate, x, lambda tokens: jnp.take(table, tokens, axis=0))
    return approximate, found, exact, bound


@pytest.mark.parametrize("rule", RULES)
def test_error_is_under_its_bound(rule: RelativeThreshold | None) -> None:
    x, table = random_head(0)
    approximate, _, exact, bound = both(x, table, rule)
    error = jnp.abs(approximate - exact)
    # The sums of float32 themselves.
    assert float(jnp.max(error - bound * (1 + 1e-5))) < 1e-4
    # And the bound is not idle: errors are far from zero beside it.
    assert float(jnp.max(error / bound)) > 0.2


@pytest.mark.parametrize("rule", RULES)
def test_greedy_is_the_float_heads(rule: RelativeThreshold | None) -> None:
    proven = agree = 0
    for seed in range(5):
        x, table = random_head(seed)
        approximate, found, exact, bound = (np.asarray(a)[:, 0] for a in both(x, table, rule))
        best = exact.argmax(axis=-1)
        # As many as could stand before the best by int8 logits, were every error at its bound.
        reach = exact.max(axis=-1, keepdims=True) - 2 * bound.max(axis=-1, keepdims=True)
        sure = (exact >= reach - 1e-4).sum(axis=-1) <= CANDIDATES
        assert (found.argmax(axis=-1) == best)[sure].all()
        proven += sure.sum()
        # Far beyond what the bound proves: rounding errors do not conspire.
        assert (found.argmax(axis=-1) == best).all()
        agree += (approximate.argmax(axis=-1) == best).sum()
    assert proven > 100
    # Without the exact products the choice would often be another.
    assert agree < 5 * 40


def test_candidates_are_exact_and_stay_ahead() -> None:
    x, table = random_head(3, spread=4.0)
    approximate, found, exact, _ = (np.asarray(a)[:, 0] for a in both(x, table, None))
    for row in range(len(x)):
        chosen = np.argsort(-approximate[row], kind="stable")[:CANDIDATES]
        np.testing.assert_allclose(found[row, chosen], exact[row, chosen], atol=1e-4)
        rest = np.delete(np.arange(VOCAB), chosen)
        least = found[row, chosen].min()
        np.testing.assert_array_equal(found[row, rest], np.minimum(approximate[row, rest], least))


@pytest.mark.parametrize("size", [CANDIDATES - 1, VOCAB])
def test_the_most_likely_is_the_largest_of_the_rescored(size: int) -> None:
    x, table = random_head(4)
    table = table[:size].at[size // 2].set(table[size // 3])  # equal logits: the lower id
    x = x.at[0, 0].set(jnp.nan)  # and a row of which any token may come, but one of the vocabulary
    x = x.at[1, 0].set(table[size // 3])
    logits = int8_linear(x, quantize(table.T), outliers=None)

    def take(tokens: jax.Array) -> jax.Array:
        return jnp.take(table, tokens, axis=0)

    found = jax.jit(most_likely, static_argnums=2)(logits, x, take)
    expected = jnp.argmax(rescore(logits, x, take), axis=-1)
    assert found.dtype == jnp.int32
    assert (found[1:] == expected[1:]).all()
    assert found[1, 0] == size // 3
    assert 0 <= found[0, 0] < size


def test_a_small_vocabulary_is_all_exact() -> None:
    x, table = random_head(0)
    table = table[: CANDIDATES - 1]
    _, found, exact, _ = both(x, table, None)
    np.testing.assert_allclose(found, exact, atol=1e-4)


def test_bfloat16_rows_are_summed_in_float32() -> None:
    x, table = (a.astype(jnp.bfloat16) for a in random_head(1))
    approximate = jnp.einsum("btk,nk->btn", x, table, preferred_element_type=jnp.float32)
    found = rescore(approximate, x, lambda tokens: jnp.take(table, tokens, axis=0))
    exact = np.asarray(x, np.float64) @ np.asarray(table, np.float64).T
    best = exact.max(axis=-1)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found.max(axis=-1), best, rtol=1e-5)


def with_int8_head(case: str) -> tuple:
    config, params, golden = load_case(case)
    int8 = quantized(params)
    table = params["embedding"] if config.tied_embeddings else params["lm_head"]["weight"]
    return config, int8, {**int8, "int8_head": {"weight": quantize(table.T)}}, golden


@pytest.mark.parametrize(
    ("case", "sampling"),
    [
        ("llama_gqa_tied", Sampling()),
        ("llama_gqa_tied", Sampling(temperature=0.9, top_k=20)),
        ("opt_post_norm", Sampling()),  # whose embedding is narrower than its layers
    ],
)
def test_generation_is_that_of_the_float_head(case: str, sampling: Sampling) -> None:
    config, plain, int8, golden = with_int8_head(case)
    prompts = [row[:11].tolist() for row in golden["tokens"]]
    how: dict = {"quantization": QuantizationConfig(outliers=TopK(4)), "sampling": sampling}
    expected = generate_tokens(config, plain, prompts, 12, **how)
    assert generate_tokens(config, int8, prompts, 12, **how) == expected


def test_logits_of_a_whole_text_are_int8_ones() -> None:
    config, plain, int8, golden = with_int8_head("llama_gqa_tied")
    tokens = jnp.asarray(golden["tokens"])
    how = QuantizationConfig(outliers=TopK(4))
    exact, _ = run(config, plain, tokens, quantization=how)
    found, _ = run(config, int8, tokens, quantization=how)
    error = np.abs(found - exact) / np.std(exact)
    assert 1e-3 < error.max() < 0.1
    last, _ = run(config, int8, tokens, quantization=how, last_only=True)
    best = np.asarray(exact[:, -1:]).max(axis=-1)
    np.testing.assert_allclose(last.max(axis=-1), best, atol=1e-4)
    token, _ = run(config, int8, tokens, quantization=how, last_only=True, greedy=True)
    assert (token == last[:, 0].argmax(axis=-1)).all()


@pytest.mark.parametrize("case", ["llama_gqa_tied", "llama_mha"])
def test_loading(case: str, tmp_path: pathlib.Path) -> None:
    how = dataclasses.replace(QUANTIZATIONS["topk"], lm_head="int8")
    plain, model = (load(GOLDENS / case, quantization=q) for q in ("topk", how))
    config = model.config
    head = model.params["int8_head"]["weight"]
    table = (
        model.params["embedding"] if config.tied_embeddings else model.params["lm_head"]["weight"]
    )
    assert config.tied_embeddings == (case == "llama_gqa_tied")
    expected = quantize(table.T)
    assert (head.codes == expected.codes).all()
    assert (head.scale == expected.scale).all()
    assert model.nbytes == plain.nbytes + head.nbytes
    prompt = [[1, 2, 3]]
    made = (generate_tokens(config, m.params, prompt, 5, quantization=how) for m in (plain, model))
    assert next(made) == next(made)
    # What is saved is the float head; codes are made anew.
    model.save(tmp_path)
    again = load(tmp_path, quantization=how).params["int8_head"]["weight"]
    assert (again.codes == head.codes).all()


@pytest.mark.parametrize(
    ("x", "count", "argument"),
    [
        (jnp.zeros((2, 3, 4)), 2, "x"),
        (jnp.zeros((2, 9), jnp.bfloat16), 2, "x"),
        (jnp.zeros((2, 9)), 10, "count"),
        (jnp.zeros((2, 99)), 65, "count"),
        (jnp.zeros((2, 9)), 0, "count"),
    ],
)
def test_the_kernel_refuses_what_it_cannot_do(x: jax.Array, count: int, argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: expected"):
        kernels.largest(x, count)


@pytest.mark.parametrize("n", [3000, 4 * CANDIDATES * BLOCK, 20011])
def test_the_largest_are_found(n: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.permutation(3 * n).reshape(3, 1, n).astype(np.float32)
    x[1] = -np.sort(-x[1])  # all of the largest in one block
    x[2, 0, -1] = 4 * n  # in the last block, which is not full
    found = jax.jit(largest, static_argnums=1)(jnp.asarray(x), CANDIDATES)
    assert (found == np.argsort(-x, axis=-1)[..., :CANDIDATES]).all()
