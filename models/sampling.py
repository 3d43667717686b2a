"""Choosing the next token: greedy, or drawn after temperature, top-k and top-p.

Nothing is sorted. The cut of top-k and of top-p is the largest threshold that still keeps enough;
it is found bit by bit in the 32 bits of a float, so k and p are run-time values and the cost is 32
passes over a row of logits instead of a sort of it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

_SIGN = jnp.iinfo(jnp.int32).min


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What to draw from.

    Attributes:
        temperature: divides the logits; 0 is greedy (the most likely token, ties to the lower id),
            for which the other two change nothing.
        top_k: keep the k most likely tokens (and those as likely as the k-th); None keeps all.
        top_p: keep the fewest most likely tokens whose probabilities, after temperature and top-k,
            sum to at least p; None keeps all.

    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        """Checks the arguments."""
        for name in ("temperature", "top_k", "top_p"):
            value = getattr(self, name)
            if value is None and name != "temperature":
                continue
            if (
                not hasattr(value, "__float__")
                or isinstance(value, str)
                or getattr(value, "ndim", 0) > 0
            ):
                raise TypeError(f"{name}: expected a number, got {value!r}")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and >= 0, got {self.temperature}")
        if self.top_k is not None and not (self.top_k >= 1 and self.top_k % 1 == 0):
            raise ValueError(f"top_k must be an integer >= 1 or None, got {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1] or None, got {self.top_p}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
    """A `Sampling` for jit: its numbers are leaves, only which of them are used is compiled in."""

    temperature: jax.Array | None
    top_k: jax.Array | None
    top_p: jax.Array | None

    @classmethod
    def of(cls, sampling: Sampling) -> Draw:
        """Returns the arrays that stand for ``sampling``; no temperature is greedy."""
        if sampling.temperature == 0.0:
            return cls(None, None, None)
        k, p = sampling.top_k, sampling.top_p
        # Below the smallest normal number a float32 counts as 0; a reciprocal, too, is to be above.
        least = jnp.finfo(jnp.float32).tiny
        return cls(
            jnp.float32(np.clip(sampling.temperature, least, 1 / least)),
            None if k is None else jnp.int32(min(k, jnp.iinfo(jnp.int32).max)),
            None if p is None or p == 1.0 else jnp.float32(max(p, least)),
        )


def row_keys(prompts: Sequence[Sequence[int]], seed: int) -> jax.Array:
    """Returns a key for each row, key[b], that depends on the seed (64 bits) and the row's prompt alone.

    Only equal prompts differ by their order, so that asking twice in one batch gives two answers.
    """
    seen: collections.Counter[tuple[int, ...]] = collections.Counter()
    order = []
    for prompt in map(tuple, prompts):
        order.append(seen[prompt])
        seen[prompt] += 1
    with jax.enable_x64(True):  # else the upper half of the seed is dropped
        key = jax.random.key(np.uint64(seed))
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(order, jnp.uint32))


def next_tokens(logits: jax.Array, draw: Draw, keys: jax.Array, step: jax.Array) -> jax.Array:
    """Chooses one token for every row.

    Args:
        logits: float32[b, vocab].
        draw: how.
        keys: key[b], one for each row; what a row draws depends on its own key and logits only.
        step: int32[], how many tokens were drawn before.

    Returns:
        int32[b].

    """
    if draw.temperature is None:
        return first_largest(logits)
    # The largest becomes 0, so that no temperature, however low, makes infinities of several.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / draw.temperature
    k, p = draw.top_k, draw.top_p
    if k is not None:
        logits = _keep(logits, lambda kept: jnp.sum(kept, axis=-1, dtype=jnp.int32) >= k)
    if p is not None:
        share = jax.nn.softmax(logits, axis=-1)
        logits = _keep(logits, lambda kept: jnp.sum(jnp.where(kept, share, 0.0), axis=-1) >= p)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
    # The largest of logits plus Gumbel noise is a draw from their softmax.
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
    return first_largest(logits + noise)


def first_largest(x: jax.Array) -> jax.Array:
    """jnp.argmax of float32[..., n] along n, as each platform likes it best; int32[...]."""
    return jax.lax.platform_dependent(
        x, cpu=_in_two_passes, default=lambda x: jax.lax.argmax(x, x.ndim - 1, jnp.int32)
    )


def _in_two_passes(x: jax.Array) -> jax.Array:
    """Argmax in two passes that XLA's CPU backend can vectorise.

    A third of the time of argmax, whose one pass carries value and index from element to element.
    """
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    largest = (x == jnp.max(x, axis=-1, keepdims=True)) | jnp.isnan(x)
    return jnp.min(jnp.where(largest, index, x.shape[-1]), axis=-1)


def _keep(logits: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Sets to -inf what lies below the largest threshold for which ``enough`` holds.

    Args:
        logits: float32[b, vocab].
        enough: from bool[b, vocab], what is kept, to bool[b]; must not turn true when less is kept.

    Returns:
        float32[b, vocab]; everything is kept where no threshold keeps enough.

    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    # Flipping the magnitude of negative floats makes their bits sort like the floats.
    order = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)

    def try_bit(index: jax.Array, threshold: jax.Array) -> jax.Array:
        bit = jax.lax.shift_right_logical(jnp.int32(_SIGN), index.astype(jnp.int32))
        higher = threshold ^ bit
        return jnp.where(enough(order >= higher[:, None]), higher, threshold)

    lowest = jnp.full(logits.shape[:1], _SIGN, jnp.int32)
    threshold = jax.lax.fori_loop(0, 32, try_bit, lowest)
    return jnp.where(order >= threshold[:, None], logits, -jnp.inf)
