"""Tests of jaxint8.evaluation.perplexity and .outliers, on models small enough for NumPy."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxint8.evaluation import perplexity
from jaxint8.evaluation.outliers import outlier_fractions
from jaxint8.outliers import RelativeThreshold, Threshold, TopK

VOCAB = 11


def bigram(table, tokens):
    return table[tokens]


@pytest.fixture
def table():
    return np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float32) * 3


@pytest.fixture
def model(table):
    return functools.partial(bigram, jnp.asarray(table))


def ids(n):
    return np.random.default_rng(n).integers(0, VOCAB, n)


def expected_logprobs(table, tokens, window):
    """float64, one window after the other, the first token of each skipped."""
    logs = table.astype(np.float64)
    logs = logs - np.log(np.sum(np.exp(logs), axis=-1, keepdims=True))
    pieces = [tokens[i : i + window] for i in range(0, len(tokens), window)]
    return np.array([logs[a, b] for p in pieces for a, b in itertools.pairwise(p)])


@pytest.mark.parametrize("n", [2, 7, 8, 9, 10, 16, 17, 31])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_matches_float64(model, table, n, batch_size):
    tokens = ids(n)
    score = perplexity.score(model, tokens, window=8, batch_size=batch_size)
    score.validate()
    expected = expected_logprobs(table, tokens, 8)
    assert score.scored == expected.size
    # float32 logits below 16 and a log-sum of 11 of them: a few units in the last place of 16.
    np.testing.assert_allclose(score.logprobs, expected, rtol=0, atol=8 * 16 * 2.0**-24)
    assert score.perplexity == pytest.approx(np.exp(-expected.mean()), rel=1e-5)


def test_the_protocol_scores_8176_of_8192(model):
    score = perplexity.score(model, ids(8192), window=512)
    assert (score.tokens, score.scored) == (8192, 8176)


def test_windows_share_nothing_and_nothing_is_padded():
    calls = []

    def peeking(tokens):
        calls.append(tokens)
        return jnp.zeros((*tokens.shape, VOCAB), jnp.float32)

    tokens = ids(45)
    perplexity.score(peeking, tokens, window=8, batch_size=2)
    assert [call.shape for call in calls] == [(2, 8), (2, 8), (1, 8), (1, 5)]
    np.testing.assert_array_equal(np.concatenate([call.ravel() for call in calls]), tokens)


@pytest.mark.parametrize("n", [40, 20, 8, 5])  # five calls; two and a rest; one; a rest only
def test_speed_is_of_repeated_calls_and_leaves_compilation_out(monkeypatch, n):
    """A clock that the model moves on: 100 s for the first call of a shape, 2 s for any other."""
    now, seen = [0.0], set()

    def slow_at_first(tokens):
        now[0] += 2.0 if tokens.shape in seen else 100.0
        seen.add(tokens.shape)
        return jnp.zeros((*tokens.shape, VOCAB), jnp.float32)

    monkeypatch.setattr(perplexity.time, "perf_counter", lambda: now[0])
    assert perplexity.score(slow_at_first, ids(n), window=8).tokens_per_s == min(n, 8) / 2.0


def test_uniform_model_has_the_perplexity_of_its_vocabulary():
    def uniform(tokens):
        return jnp.zeros((*tokens.shape, VOCAB), jnp.bfloat16)

    assert perplexity.score(uniform, ids(20), window=8).perplexity == pytest.approx(VOCAB, rel=1e-6)


def test_broken_models_give_nan_and_infinity_not_an_error():
    def constant(value, tokens):
        table = jnp.zeros((VOCAB,), jnp.float32).at[0].set(value)
        return jnp.broadcast_to(table, (*tokens.shape, VOCAB))

    ones = np.ones(9, int)
    not_a_number = perplexity.score(functools.partial(constant, np.nan), ones, window=8)
    assert np.isnan(not_a_number.perplexity)
    assert perplexity.score(functools.partial(constant, 1e6), ones, window=8).perplexity == np.inf


def test_progress_counts_every_token_once(model):
    seen = []
    perplexity.score(
        model, ids(21), window=8, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(0, 21), (8, 21), (16, 21), (21, 21)]


def test_mean_abs_logprob_change(model, table):
    tokens = ids(40)
    other = functools.partial(bigram, jnp.asarray(table * np.float32(0.9)))
    a = perplexity.score(model, tokens, window=8)
    b = perplexity.score(other, tokens, window=8)
    change = np.abs(
        expected_logprobs(table * np.float32(0.9), tokens, 8) - expected_logprobs(table, tokens, 8)
    )
    assert perplexity.mean_abs_logprob_change(b, a) == pytest.approx(change.mean(), rel=1e-5)
    assert perplexity.mean_abs_logprob_change(a, a) == 0.0
    with pytest.raises(ValueError, match="baseline: expected 35 scored tokens as in score, got 7"):
        perplexity.mean_abs_logprob_change(a, perplexity.score(model, tokens[:8], window=8))


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], {}, "tokens: expected at least 2 to have one to score, got 0"),
        ([1], {}, "tokens: expected at least 2"),
        ([1, 2], {"window": 1}, "window: expected at least 2 tokens, got 1"),
        ([1, 2], {"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ([[1, 2]], {}, r"tokens: expected int\[n\], got int64\[1, 2\]"),
        ([1.0, 2.0], {}, r"tokens: expected int\[n\], got float64\[2\]"),
        ([1, -1], {}, "tokens: expected ids of 0 or more, got -1"),
        ([1, VOCAB], {}, "tokens: expected ids below the model's vocabulary of 11, got 11"),
    ],
)
def test_bad_arguments(model, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity.score(model, tokens, **options)


def test_logits_of_a_wrong_shape(table):
    with pytest.raises(
        ValueError, match=r"logits: expected float\[1, 2, vocab\], got shape \[1, 2\]"
    ):
        perplexity.score(lambda tokens: jnp.zeros((*tokens.shape,)), [1, 2])


def activations(weights, tokens):
    x = weights[tokens]
    return {"first": x, "second": x[..., :4] * jnp.float32(0.25)}


@pytest.mark.parametrize(
    "rule",
    [None, Threshold(6.0, "column"), Threshold(6.0, "token"), RelativeThreshold(1.5), TopK(2)],
)
def test_outlier_fractions(table, rule):
    weights = table * np.float32(1.5)
    calls = [ids(24).reshape(2, 12), ids(30).reshape(1, 30)]
    model = functools.partial(activations, jnp.asarray(weights))
    shares = outlier_fractions(model, calls, rule)

    def count(x):
        match rule:
            case None:
                return 0
            case Threshold(scope="column"):
                return len(x) * int(np.sum(np.any(np.abs(x) >= 6.0, axis=0)))
            case Threshold():
                return int(np.sum(np.abs(x) >= 6.0))
            case RelativeThreshold(value=value):
                rms = np.sqrt(np.mean(np.square(x.astype(np.float64)), axis=1, keepdims=True))
                return int(np.sum(np.abs(x) >= value * rms))
            case TopK(k=k):
                return len(x) * k
        raise AssertionError(rule)

    rows = [weights[call.ravel()] for call in calls]
    first = sum(count(x) for x in rows)
    second = sum(count(x[:, :4] * np.float32(0.25)) for x in rows)
    assert shares["first"] == first / (54 * VOCAB)
    assert shares["second"] == second / (54 * 4)
    assert shares[""] == (first + second) / (54 * (VOCAB + 4))
    assert (rule is None) == (shares[""] == 0.0)


def test_outlier_fractions_refuses_what_it_cannot_measure():
    with pytest.raises(ValueError, match=r"calls: expected int\[b, t\], got shape \(3,\)"):
        outlier_fractions(lambda t: {"x": t}, [np.zeros(3, int)], None)
    for nothing in ([], [np.zeros((1, 3), int)]):
        with pytest.raises(ValueError, match="activations: expected values that enter a linear"):
            outlier_fractions(lambda t: {}, nothing, None)
