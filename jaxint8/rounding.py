"""Quotients and square roots of float32 that are rounded correctly on every platform.

XLA promises no such thing. On a CPU its operations are IEEE's; a GPU gets instructions that may err by two units in the
last place, and now and then that moves a code, or decides what is an outlier. The surprising fact is how little mends
it: what is left of the dividend is small, so its low 32 bits are all of it, and 24-bit integers say exactly which way
to go.
"""

import jax
import jax.numpy as jnp

# A platform's own result may be off by three units in its last place (PTX allows a division two; by a reciprocal it is
# a little more), which are six where the right one lies below a power of two.
_STEPS = 6
_HIDDEN, _FRACTION, _INFINITY = 1 << 23, (1 << 23) - 1, 0xFF
_SIGN = 0x80000000


def divide(x: jax.Array, divisor: jax.Array | int) -> jax.Array:
    """Returns the correctly rounded quotient x / divisor, broadcasting.

    XLA's algebraic simplifier turns a division by a constant, or by anything broadcast, into a multiplication by the
    rounded reciprocal, which now and then moves a code. A select whose predicate it cannot decide keeps the division.

    Args:
      x: float32.
      divisor: float32, positive and normal, or an integer.

    Returns:
      float32. A quotient below the smallest normal number has no meaning: some platforms flush such numbers.
    """
    by = jnp.where(x == x, jnp.asarray(divisor, jnp.float32), jnp.float32(1))
    x = jnp.broadcast_to(x, by.shape)
    return jax.lax.platform_dependent(
        x, by, cpu=jax.lax.div, default=lambda x, by: correct_quotient(x, by, jax.lax.div(x, by))
    )


def sqrt(x: jax.Array) -> jax.Array:
    """Returns the correctly rounded square root of float32 that are zero or normal numbers, positive or infinite."""
    return jax.lax.platform_dependent(
        x, cpu=jax.lax.sqrt, default=lambda x: correct_root(x, jax.lax.sqrt(x))
    )


def correct_quotient(x: jax.Array, divisor: jax.Array, near: jax.Array) -> jax.Array:
    """Returns what `divide` does from a quotient that is wrong by up to 3 units; all of one shape."""
    x_exponent, x_mantissa = _parts(x)
    exponent, by = _parts(divisor)
    less = x_mantissa < by
    exponent = x_exponent - exponent - less.astype(jnp.int32)
    # The quotient's 24 bits are those of x_mantissa * 2**shift / by.
    shift = jnp.uint32(23) + less.astype(jnp.uint32)
    found = _mantissa_at(near, exponent)
    rest = _signed((x_mantissa << shift) - found * by)
    # No quotient of two numbers of 24 bits lies half-way between two others.
    twice, unit = 2 * rest, by.astype(jnp.int32)
    change = jnp.zeros_like(rest)
    for step in range(1, 2 * _STEPS, 2):
        change += (twice > step * unit).astype(jnp.int32) - (twice < -step * unit).astype(jnp.int32)
    sign = _bits(x) & jnp.uint32(_SIGN)
    return _where_normal(x_exponent, exponent, sign, found + change.astype(jnp.uint32), near)


def correct_root(x: jax.Array, near: jax.Array) -> jax.Array:
    """Returns what `sqrt` does from a root that is wrong by up to 3 units."""
    x_exponent, mantissa = _parts(x)
    exponent = x_exponent >> 1  # of the root: rounded down
    shift = jnp.uint32(23) + (x_exponent & 1).astype(jnp.uint32)
    found = _mantissa_at(near, exponent)
    rest = _signed((mantissa << shift) - found * found)
    found = found.astype(jnp.int32)
    for _ in range(_STEPS):
        # (found + 1/2)**2 is found**2 + found + 1/4, which no integer equals.
        up = rest > found
        rest -= jnp.where(up, 2 * found + 1, 0)
        found += up.astype(jnp.int32)
    for _ in range(_STEPS):
        down = rest <= -found
        rest += jnp.where(down, 2 * found - 1, 0)
        found -= down.astype(jnp.int32)
    return _where_normal(x_exponent, exponent, jnp.uint32(0), found.astype(jnp.uint32), near)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _signed(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (exponent int32, 24 bits uint32): |x| is bits * 2**(exponent - 23), if it is a normal number."""
    bits = _bits(x)
    exponent = ((bits >> 23) & jnp.uint32(_INFINITY)).astype(jnp.int32) - 127
    return exponent, (bits & jnp.uint32(_FRACTION)) | jnp.uint32(_HIDDEN)


def _mantissa_at(near: jax.Array, exponent: jax.Array) -> jax.Array:
    """The bits of a number that may have the exponent beside the one that they are wanted for."""
    own, mantissa = _parts(near)
    return jnp.where(
        own > exponent, mantissa << 1, jnp.where(own < exponent, mantissa >> 1, mantissa)
    )


def _where_normal(
    x_exponent: jax.Array,
    exponent: jax.Array,
    sign: jax.Array,
    mantissa: jax.Array,
    near: jax.Array,
) -> jax.Array:
    """The number with these bits, or ``near`` where it or x is none (zero, infinite, no number)."""
    # Bits that have become 2**24 carry into the exponent.
    magnitude = ((exponent + 127).astype(jnp.uint32) << 23) + (mantissa - jnp.uint32(_HIDDEN))
    made = jax.lax.bitcast_convert_type(sign | magnitude, jnp.float32)
    normal = (x_exponent > -127) & (x_exponent < 128) & (exponent > -127) & (exponent < 128)
    return jnp.where(normal, made, near)
