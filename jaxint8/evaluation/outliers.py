"""How many activation values an outlier rule takes out of int8, over the layers of any model.

A rule is measured on the values that really enter the layers, so the model says what those are.
The surprising fact: the share depends on the scope far more than on the threshold, since a
column-scope rule takes every value of a column of which one is large.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxint8.outliers import OutlierRule, outlier_mask

Activations = Callable[[jax.Array], Mapping[str, jax.Array]]
"""tokens int32[b, t] -> the input float[..., k] of each linear layer, by the layer's name.

One entry per quantised input: products that share an input (query, key, value) share an entry."""


def outlier_fractions(
    activations: Activations, tokens: np.ndarray, rule: OutlierRule | None
) -> dict[str, float]:
    """The share of values that `rule` selects, by layer, and over all layers under the name "".

    Args:
      activations: as `Activations`. As in `perplexity.score`, a pytree (`jax.tree_util.Partial`)
        keeps its arrays out of the executable.
      tokens: int[b, t], one call.
      rule: an outlier rule; None selects nothing.

    Returns:
      Layer name -> fraction in [0, 1].

    Raises:
      ValueError: tokens is not [b, t], or there is no linear layer.
    """
    if np.ndim(tokens) != 2:
        raise ValueError(f"tokens: expected int[b, t], got shape {np.shape(tokens)}")
    leaf = jax.tree_util.all_leaves([activations])
    model = jax.tree_util.Partial(activations) if leaf else activations
    ids = np.asarray(tokens, np.int32)
    sizes = {
        name: math.prod(x.shape)
        for name, x in jax.eval_shape(model, jax.ShapeDtypeStruct(ids.shape, jnp.int32)).items()
    }
    if not any(sizes.values()):
        raise ValueError("activations: expected the input of at least one linear layer, got none")

    @jax.jit
    def counts(model: Activations, tokens: jax.Array) -> dict[str, jax.Array]:
        # Counted under the same jit as the model, so that no layer's input outlives its use.
        return {
            name: jnp.sum(outlier_mask(x.reshape(-1, x.shape[-1]), rule), dtype=jnp.int32)
            for name, x in model(tokens).items()
        }

    found = {name: int(count) for name, count in counts(model, ids).items()}
    shares = {name: found[name] / size for name, size in sizes.items() if size}
    return {"": sum(found.values()) / sum(sizes.values()), **shares}
