"""Products with float weights: the head, and the layers that are kept from int8."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def product(x: jax.Array, weight: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """x[..., k] times a float weight [n, k], summed in float32 and rounded once; dtype[..., n]."""
    if x.dtype != jnp.bfloat16:
        return _product(x, weight).astype(dtype)
    # For a single row XLA:CPU would make a float32 copy of all weights at every call.
    on_cpu = _product_of_two_rows if x.size == x.shape[-1] else _product
    # And a GPU's libraries, asked for float32, would write it out and read it again to round it.
    return jax.lax.platform_dependent(
        x,
        weight,
        cpu=lambda *arrays: on_cpu(*arrays).astype(dtype),
        default=functools.partial(_product, dtype=dtype),
    )


def _product(x: jax.Array, weight: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract, preferred_element_type=dtype)


def _product_of_two_rows(x: jax.Array, weight: jax.Array) -> jax.Array:
    y = _product(jnp.concatenate([x, jnp.zeros_like(x)], axis=-2), weight)
    return jax.lax.slice_in_dim(y, 0, 1, axis=-2)
