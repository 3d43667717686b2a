"""What stands before a linear layer and can be part of its call: a norm, or the gate of an MLP.

A kernel that quantises a row has it in registers anyway; a norm or a gate of its own would write it to memory and read
it again. The surprising fact is that no float is added to another here: a sum of squares is one of integers, so the
kernels of every platform give the same bits (`reference.rms_norm`, `reference.silu_gate`). Pure JAX, where there is no
kernel, gives the same function in its own order of operations.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxint8 import reference


@dataclasses.dataclass(frozen=True)
class RMSNorm:
    """A row [k] becomes row / sqrt(mean(row**2) + epsilon) * weight, for a weight float32[k] that is an operand.

    Attributes:
      epsilon: at least `reference.SMALLEST_NORM_EPSILON`, as the squares of smaller rows count as zero.
    """

    epsilon: float

    def __post_init__(self) -> None:
        """Raises ValueError if epsilon is not a number that is large enough."""
        if not self.epsilon >= reference.SMALLEST_NORM_EPSILON:
            least = reference.SMALLEST_NORM_EPSILON
            raise ValueError(f"epsilon: expected at least {least:.3g}, got {self.epsilon}")


@dataclasses.dataclass(frozen=True)
class SiluGate:
    """A row [2 * k], a gate and what it gates, becomes silu(row[:k]) * row[k:]."""


Prologue = RMSNorm | SiluGate


def width(k: int, prologue: Prologue | None) -> int:
    """Returns how many columns a layer of k inputs takes behind the prologue."""
    return 2 * k if isinstance(prologue, SiluGate) else k


def enter(x: jax.Array, norm: jax.Array | None, prologue: Prologue | None) -> jax.Array:
    """Applies a prologue in pure JAX, in float32 with one rounding to the dtype of x at the end.

    Args:
      x: float[..., k], or [..., 2 * k] for a `SiluGate`.
      norm: float[k], the weight of an `RMSNorm`; else None.
      prologue: what to apply, or None.

    Returns:
      x.dtype[..., k].
    """
    if prologue is None:
        return x
    y = x.astype(jnp.float32)
    if isinstance(prologue, SiluGate):
        gate, up = jnp.split(y, 2, axis=-1)
        return (jax.nn.silu(gate) * up).astype(x.dtype)
    assert norm is not None
    mean = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
    y *= jax.lax.rsqrt(mean + np.float32(prologue.epsilon))
    weight = jax.lax.expand_dims(norm.astype(jnp.float32), tuple(range(x.ndim - 1)))
    return (y * weight).astype(x.dtype)
