"""How much noise int8 adds to each linear layer's product, on the inputs that the float model gives it.

The signal is the float product, the noise its difference from the int8 one. The surprising fact: the noise is worst
where values are small throughout, for there an absolute threshold finds no outlier and one large value sets the scale.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxint8.evaluation.outliers import Activations
from jaxint8.scheme_linear import quantize_kernel, scheme_linear
from jaxint8.schemes import Scheme


def signal_to_noise(
    activations: Activations,
    calls: Sequence[np.ndarray],
    weights: Mapping[str, jax.Array],
    schemes: Mapping[str, Scheme],
) -> dict[str, dict[str, float]]:
    """Measures the product of every layer under every scheme.

    Args:
      activations: what enters the layers.
      calls: token ids int[b, t].
      weights: float[n, k] by the layer's name; layers without an entry are left out.
      schemes: the schemes by name.

    Returns:
      Scheme -> layer -> 10 log10(sum of squares of the signal / that of the noise), decibels; inf without noise.
    """
    sums = {scheme: {name: np.zeros(2) for name in weights} for scheme in schemes}
    for call in calls:
        inputs = activations(jnp.asarray(call, jnp.int32))
        for name, weight in weights.items():
            x = inputs[name].reshape(-1, inputs[name].shape[-1])
            for label, scheme in schemes.items():
                sums[label][name] += np.asarray(_squares(x, weight, scheme), np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            label: {name: float(10 * np.log10(s[0] / s[1])) for name, s in by_layer.items()}
            for label, by_layer in sums.items()
        }


@functools.partial(jax.jit, static_argnums=2)
def _squares(x: jax.Array, weight: jax.Array, scheme: Scheme) -> jax.Array:
    """float32[2]: sums of squares of signal and noise."""
    exact = jax.lax.dot_general(
        x, weight, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    ).astype(jnp.float32)
    y = scheme_linear(x, quantize_kernel(weight.T, scheme), scheme=scheme).astype(jnp.float32)
    return jnp.stack([jnp.sum(jnp.square(exact)), jnp.sum(jnp.square(y - exact))])
