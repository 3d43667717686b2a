"""What a decoder layer does behind its attention, three linear layers and what lies between, as one call.

For a single token each of these layers takes some microseconds, and between two calls memory is idle: threads are
woken, kernels launched. In one call the next weights are on their way while rows are quantised. The bits are those of
three calls of `jaxint8.linear.linear`, to which this comes down where there is no kernel.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxint8 import kernels
from jaxint8.dispatch import Layer, Operands, has_kernel, one_device
from jaxint8.linear import linear
from jaxint8.prologue import SiluGate
from jaxint8.shards import vary_like


class Weights(NamedTuple):
    """A linear layer: codes int8[n, k], scale float32[n], bias float32[n] or None."""

    codes: jax.Array
    scale: jax.Array
    bias: jax.Array | None = None


class Block(NamedTuple):
    """The arrays of ``attended + down(SiluGate(up(RMSNorm(attended))))``, ``attended = residual + out(x)``.

    Attributes:
      x: float[..., k], what attention gave.
      residual: x.dtype[..., h], the stream that it is added to.
      norm: float32[h].
      out: of shape (k, h).
      up: of shape (h, 2 * f), the gate's channels first.
      down: of shape (f, h).
    """

    x: jax.Array
    residual: jax.Array
    norm: jax.Array
    out: Weights
    up: Weights
    down: Weights


def mlp_block(block: Block, layer: Layer) -> jax.Array:
    """Computes a block on one device.

    Args:
      block: its arrays.
      layer: how its linear layers are carried out; the prologue is the `RMSNorm` before ``up``.

    Returns:
      x.dtype[..., h]; differentiable as the three layers are.
    """
    x, residual = block.x, block.residual
    m = math.prod(x.shape[:-1])
    residual = residual.reshape(m, residual.shape[-1])
    rows = block._replace(x=x.reshape(m, x.shape[-1]), residual=residual)
    return _traced_once(rows, layer).reshape(block.residual.shape)


def _apart(
    block: Block, layer: Layer, run: Callable[[Operands, Layer], jax.Array] = one_device
) -> jax.Array:
    bare = dataclasses.replace(layer, prologue=None)
    gate = dataclasses.replace(layer, prologue=SiluGate())
    attended = run(Operands(block.x, *block.out, residual=block.residual), bare)
    gated = run(Operands(attended, *block.up, norm=block.norm), layer)
    return run(Operands(gated, *block.down, residual=attended), gate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _block(block: Block, layer: Layer) -> jax.Array:
    apart = functools.partial(_apart, layer=layer)
    implementation = layer.implementation
    if implementation in ("reference", "xla"):
        return apart(block)
    if implementation is not None:
        return _compiled(layer, implementation)(block)
    platforms = {platform: _compiled(layer, platform) for platform in kernels.platforms()}
    return jax.lax.platform_dependent(block, default=apart, **platforms)


def _forward(block: Block, layer: Layer) -> tuple[jax.Array, Block]:
    return _block(block, layer), block


def _backward(layer: Layer, block: Block, gradient: jax.Array) -> tuple[Block]:
    _, pull = jax.vjp(functools.partial(_apart, layer=layer, run=linear), block)
    return pull(gradient)


_block.defvjp(_forward, _backward)

_traced_once = jax.jit(_block, static_argnums=1)


@functools.cache
def _compiled(layer: Layer, platform: kernels.Platform) -> Callable[[Block], jax.Array]:
    """The kernel as a function that vmap takes apart into its layers."""
    alone = dataclasses.replace(layer, implementation=platform)
    if not has_kernel(layer, platform):
        return functools.partial(_apart, layer=alone)

    @jax.custom_batching.custom_vmap
    def call(block: Block) -> jax.Array:
        assert layer.prologue is not None
        how = {"rule": layer.rule, "arithmetic": layer.arithmetic}
        y = kernels.mlp_block(*block, prologue=layer.prologue, **how, platform=platform)
        return vary_like(y, *jax.tree.leaves(block))

    @call.def_vmap
    def _(size: int, batched: list[Block], block: Block) -> tuple[jax.Array, bool]:
        axes = jax.tree.map(lambda b: 0 if b else None, batched[0])
        apart = functools.partial(_apart, layer=alone)
        return jax.vmap(apart, (axes,), axis_size=size)(block), True

    return call
