"""Perplexity of a language model over a long text, with the log-probability of every scored token.

The text is cut into windows that share nothing, and the first token of a window is context only.
The surprising fact: no window is ever padded. Under a column-scope outlier rule every row of a
call can change every other row's result, so a short last window runs in a call of its own, at its
own length.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxint8.partition import to_host

Logits = Callable[[np.ndarray], jax.Array]
"""tokens int32[b, t] -> float[b, t, vocab]; place t holds the logits of token t + 1."""

Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all), first with 0 done."""


@dataclass(frozen=True)
class Score:
    """What one pass over a text gives.

    Invariants (checked by `validate`): `logprobs` is float32, one natural logarithm per scored
    token in the order of the text; `0 < logprobs.size < tokens`; `tokens_per_s` counts every
    token of a window, scored or not, is a median over calls of the same shape, and leaves
    compilation out.
    """

    logprobs: np.ndarray
    tokens: int
    tokens_per_s: float

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return self.logprobs.size

    @property
    def perplexity(self) -> float:
        """The exponential of the negative mean log-probability; NaN if any of them is."""
        mean = -float(np.sum(self.logprobs, dtype=np.float64)) / self.scored
        try:
            return math.exp(mean)
        except OverflowError:  # a mean above 709 nats: only a broken model
            return math.inf

    def validate(self) -> None:
        """Raises AssertionError where an invariant does not hold."""
        assert self.logprobs.dtype == np.float32 and self.logprobs.ndim == 1
        assert 0 < self.scored < self.tokens
        assert self.tokens_per_s > 0.0


def mean_abs_logprob_change(score: Score, baseline: Score) -> float:
    """The mean of abs(log p - log p of the baseline) over the scored tokens.

    Less noisy than a difference of perplexities, in which gains and losses of single tokens cancel.

    Raises:
      ValueError: the two did not score the same number of tokens.
    """
    if score.scored != baseline.scored:
        raise ValueError(
            f"baseline: expected {score.scored} scored tokens as in score, got {baseline.scored}"
        )
    change = score.logprobs.astype(np.float64) - baseline.logprobs.astype(np.float64)
    return float(np.mean(np.abs(change)))


def score(
    logits: Logits,
    tokens: Sequence[int] | np.ndarray,
    *,
    window: int = 512,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Score:
    """Scores a text, token by token.

    Args:
      logits: the model; called as it is, under no jit but its own (`LanguageModel.logits` has one).
      tokens: token ids of the text, int[n], n >= 2.
      window: tokens per window, >= 2. The first of each window is context and not scored. A last
        window of 2 or more tokens is scored at its own length; a last window of one token has
        nothing to score and is left out.
      batch_size: windows per call. It changes the result of column-scope outlier rules, and
        nothing else.
      progress: told after each call how many tokens are done.

    Returns:
      The log-probabilities of the scored tokens, and the speed of the pass without compilation.

    Raises:
      ValueError: an argument is out of range, the text is too short, a token id is not in the
        vocabulary, or `logits` gives another shape than [b, t, vocab].
    """
    ids = _checked_ids(tokens, window, batch_size)
    calls = cut(ids, window, batch_size)
    total = sum(call.size for call in calls)
    report = progress or (lambda done, total: None)
    report(0, total)
    logprobs: list[np.ndarray] = []
    seconds: list[float] = []
    done = 0
    for call in calls:
        found, time_taken = _timed_logprobs(logits, call, int(ids.max()))
        logprobs.append(found)
        if call.shape == calls[0].shape:
            seconds.append(time_taken)
        done += call.size
        report(done, total)
    # The first call compiled; where no other is like it, it is run again.
    warm = seconds[1:] or [_timed_logprobs(logits, calls[0], int(ids.max()))[1]]
    speed = calls[0].size / float(np.median(warm))
    return Score(logprobs=np.concatenate(logprobs), tokens=total, tokens_per_s=speed)


def cut(ids: np.ndarray, window: int, batch_size: int) -> list[np.ndarray]:
    """A text int[n] as calls int[b, t]: whole windows, batch_size at a time, then the rest."""
    whole = ids.size // window
    full = ids[: whole * window].reshape(whole, window)
    calls = [full[i : i + batch_size] for i in range(0, whole, batch_size)]
    rest = ids[whole * window :]
    return [*calls, rest[None, :]] if rest.size >= 2 else calls


def logprobs(logits: Logits, call: np.ndarray) -> np.ndarray:
    """The log-probabilities of the scored tokens of one call int[b, t], float32[b * (t - 1)]."""
    return _timed_logprobs(logits, call, int(call.max()))[0]


def _timed_logprobs(logits: Logits, call: np.ndarray, highest: int) -> tuple[np.ndarray, float]:
    """The log-probabilities float32[b * (t - 1)] of one call, and the seconds that it took."""
    start = time.perf_counter()
    all_logits = logits(call)
    _check_vocabulary(all_logits, call, highest)
    found = to_host(_token_logprobs(all_logits, call)).ravel()
    return found, time.perf_counter() - start


@jax.jit
def _token_logprobs(all_logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """The log p of tokens[:, 1:] given what stands before: float32[b, t - 1]."""
    all_logits = all_logits.astype(jnp.float32)
    # The last position has no next token: it is given the first, and dropped at the end, which is
    # cheaper than a copy of all logits but the last.
    following = jnp.roll(tokens, -1, axis=1)
    target = jnp.take_along_axis(all_logits, following[..., None], axis=-1)[..., 0]
    return (target - jax.nn.logsumexp(all_logits, axis=-1))[:, :-1]


def _checked_ids(tokens: Sequence[int] | np.ndarray, window: int, batch_size: int) -> np.ndarray:
    ids = np.asarray(tokens)
    if window < 2:
        raise ValueError(f"window: expected at least 2 tokens, got {window}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"tokens: expected int[n], got {ids.dtype}{list(ids.shape)}")
    if ids.size < 2:
        raise ValueError(f"tokens: expected at least 2 to have one to score, got {ids.size}")
    if ids.min() < 0:
        raise ValueError(f"tokens: expected ids of 0 or more, got {ids.min()}")
    return ids.astype(np.int32)


def _check_vocabulary(all_logits: jax.Array, call: np.ndarray, highest: int) -> None:
    """Checks the shape of the logits, and that every id is in it: a gather would not complain."""
    shape = jnp.shape(all_logits)
    if len(shape) != 3 or shape[:2] != call.shape:
        wanted = f"[{call.shape[0]}, {call.shape[1]}, vocab]"
        raise ValueError(f"logits: expected float{wanted}, got shape {list(shape)}")
    if highest >= shape[2]:
        raise ValueError(
            f"tokens: expected ids below the model's vocabulary of {shape[2]}, got {highest}"
        )
