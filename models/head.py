"""The head in int8: all logits from codes, the best of them once more from the float rows.

A head reads every row of its table for each token, so at batch 1 it costs as much as many layers;
in int8 it costs a quarter. The surprising fact is how little has to be corrected: rounding moves a
logit by a few percent of their spread, and 64 exact products cost less than finding the 64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxint8 import kernels
from jaxint8.shards import vary_like

# Logits computed once more. At 4,096 places of the demo text the float head's first choice is always
# among the first 4 by int8 logits, and its first 40, a usual top_k, among the first 58.
CANDIDATES = 64
# Logits of a block of `largest`: few enough that those of the best blocks are one kernel's work on a GPU.
BLOCK = 16


def rescore(logits: jax.Array, x: jax.Array, take: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Puts the exact logits in the place of the largest approximate ones.

    The others keep their approximations, but never above the least exact one: so the candidates
    stay the most likely tokens, and what is greedy, or drawn from the top k of at most CANDIDATES,
    is drawn from exact logits alone.

    The float head's choice j is found whenever fewer than CANDIDATES others come before it in int8;
    with an error of at most E per logit, whenever fewer than CANDIDATES other float logits lie
    above logit j - 2 E. Rounding x by at most a / 2 and row w by at most s / 2 gives
    E = s / 2 * sum(abs(x)) + a / 2 * sum(abs(codes * s)), the largest over the rows.

    Args:
        logits: float32[b, t, vocab], approximate.
        x: float[b, t, k], what enters the head.
        take: from tokens int32[...] to their rows of the head, float[..., k].

    Returns:
        float32[b, t, vocab].

    """
    tokens, exact = _candidates(logits, x, take)
    capped = jnp.minimum(logits, jnp.min(exact, axis=-1, keepdims=True))
    return jnp.put_along_axis(capped, tokens, exact, axis=-1, inplace=False)


def most_likely(
    logits: jax.Array, x: jax.Array, take: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """The tokens of the largest logits of `rescore`, int32[b, t], without a pass over all of them.

    Arguments are those of `rescore`. Of equal logits the lower id's is taken, but only among those that
    were computed once more: where all of these are equal, or one is NaN, other ids have no say.
    """
    tokens, exact = _candidates(logits, x, take)
    first = (exact == jnp.max(exact, axis=-1, keepdims=True)) | jnp.isnan(exact)
    return jnp.min(jnp.where(first, tokens, logits.shape[-1]), axis=-1)


def _candidates(
    logits: jax.Array, x: jax.Array, take: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The tokens of the largest approximate logits int32[b, t, count], and their exact ones, float32."""
    tokens = largest(logits, min(CANDIDATES, logits.shape[-1]))
    rows = take(tokens)
    # x[b, t, k] times rows[b, t, count, k]
    batch = ((2,), (3,)), ((0, 1), (0, 1))
    return tokens, jax.lax.dot_general(x, rows, batch, preferred_element_type=jnp.float32)


def largest(x: jax.Array, count: int) -> jax.Array:
    """Indices of the ``count`` largest of each row, in falling order: int32[..., count].

    As jax.lax.top_k of finite x[..., n], but of equal ones any may be taken. Finding them is most of
    what an int8 head costs beside its product. On CUDA a kernel does, where there is one: XLA's are
    no part of its CUDA graphs, and would cut a step of decoding in three.
    """
    has_kernel = "cuda" in kernels.platforms("jaxint8_largest")
    if x.dtype != jnp.float32 or count > kernels.LARGEST_MOST or not has_kernel:
        return _of_blocks(x, count)
    portable = functools.partial(_of_blocks, count=count)
    x = jax.lax.stop_gradient(x)  # indices have none, and a kernel would be asked for its own
    return jax.lax.platform_dependent(x, default=portable, cuda=_compiled(count))


@functools.cache
def _compiled(count: int) -> Callable[[jax.Array], jax.Array]:
    """The kernel as a function that vmap folds into rows."""

    @jax.custom_batching.custom_vmap
    def call(x: jax.Array) -> jax.Array:
        rows = math.prod(x.shape[:-1])
        found = kernels.largest(x.reshape(rows, x.shape[-1]), count)
        return vary_like(found.reshape(*x.shape[:-1], count), x)

    @call.def_vmap
    def _(size: int, batched: list[bool], x: jax.Array) -> tuple[jax.Array, bool]:
        del size, batched  # of one argument, that is mapped
        return call(x), True

    return call


def _of_blocks(x: jax.Array, count: int) -> jax.Array:
    """`largest` in two selections, which XLA:GPU makes without sorting where equal values may come in any order.

    No element of a block whose largest is not among the ``count`` largest of blocks can be among the
    ``count`` largest of all, so they are found among two short rows.
    """
    n = x.shape[-1]
    if n < 4 * count * BLOCK:
        return _largest(x, count)
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -n % BLOCK)]
    blocks = jnp.pad(x, padding, constant_values=-jnp.inf).reshape(*x.shape[:-1], -1, BLOCK)
    best = _largest(jnp.max(blocks, axis=-1), count)
    kept = jnp.take_along_axis(blocks, best[..., None], axis=-2)
    place = _largest(kept.reshape(*x.shape[:-1], count * BLOCK), count)
    return jnp.take_along_axis(best, place // BLOCK, axis=-1) * BLOCK + place % BLOCK


def _largest(x: jax.Array, count: int) -> jax.Array:
    return jax.lax.top_k(x, count, is_stable=False)[1]
