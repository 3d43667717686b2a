"""Products with float weights: the head, and the layers that are kept from int8."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x[..., k] times a float weight [n, k], summed in float32; float32[..., n]."""
    if x.size == x.shape[-1] and x.dtype == jnp.bfloat16:
        # For a single row XLA:CPU would make a float32 copy of all weights at every call.
        return jax.lax.platform_dependent(x, weight, cpu=_product_of_two_rows, default=_product)
    return _product(x, weight)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract, preferred_element_type=jnp.float32)


def _product_of_two_rows(x: jax.Array, weight: jax.Array) -> jax.Array:
    y = _product(jnp.concatenate([x, jnp.zeros_like(x)], axis=-2), weight)
    return jax.lax.slice_in_dim(y, 0, 1, axis=-2)
