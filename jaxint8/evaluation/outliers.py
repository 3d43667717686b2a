"""How many activation values an outlier rule takes out of int8, over the layers of any model.

A rule is measured on the values that really enter the layers, so the model says what those are.
The surprising fact: the share depends on the scope far more than on the threshold, since a
column-scope rule takes every value of a column of which one is large.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxint8.outliers import OutlierRule, outlier_mask

Activations = Callable[[jax.Array], Mapping[str, jax.Array]]
"""tokens int32[b, t] -> the input float[..., k] of each linear layer, by the layer's name.

One entry per quantised input: products that share an input (query, key, value) share an entry."""


def outlier_fractions(
    activations: Activations, calls: Sequence[np.ndarray], rule: OutlierRule | None
) -> dict[str, float]:
    """The share of values that `rule` selects, by layer, and over all layers under the name "".

    Args:
      activations: as `Activations`; called as it is, under no jit but its own.
      calls: token ids int[b, t], one or more; a column-scope rule looks at one call at a time.
      rule: an outlier rule; None selects nothing.

    Returns:
      Layer name -> fraction in [0, 1].

    Raises:
      ValueError: a call is not [b, t], or no value enters a linear layer.
    """
    found: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for call in calls:
        if call.ndim != 2:
            raise ValueError(f"calls: expected int[b, t], got shape {call.shape}")
        inputs = activations(jnp.asarray(call, jnp.int32))
        counts = {name: _count(x, rule) for name, x in inputs.items()}
        sizes.update({name: x.size for name, x in inputs.items()})
        found.update({name: int(count) for name, count in counts.items()})
    if not sizes.total():
        raise ValueError("activations: expected values that enter a linear layer, got none")
    shares = {name: found[name] / size for name, size in sizes.items() if size}
    return {"": found.total() / sizes.total(), **shares}


@functools.partial(jax.jit, static_argnums=1)
def _count(x: jax.Array, rule: OutlierRule | None) -> jax.Array:
    return jnp.sum(outlier_mask(x.reshape(-1, x.shape[-1]), rule), dtype=jnp.int32)
