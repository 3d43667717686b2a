"""One linear layer of a decoder, whatever its weight is, with what stands before and behind it.

What differs between float and int8 is the type of a weight: an array ``[n, k]``, or a matrix of
codes of the same shape. The surprising fact: norm, gate and residual are told to the layer instead
of being done beside it, for an int8 kernel does them in the same pass over its rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxint8 import QuantizedMatrix
from jaxint8.block import Block, Weights, mlp_block
from jaxint8.dispatch import Layer, Operands, check_available, entered
from jaxint8.linear import linear as int8_linear
from jaxint8.linear import local_linear
from jaxint8.models.config import DecoderConfig, QuantizationConfig
from jaxint8.models.product import product
from jaxint8.models.split import Split
from jaxint8.outliers import as_rule
from jaxint8.prologue import Prologue, RMSNorm, SiluGate, enter
from jaxint8.reference import SMALLEST_NORM_EPSILON
from jaxint8.scheme_linear import SchemeMatrix, scheme_linear

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def linear(
    x: jax.Array,
    layer: Mapping[str, Any],
    quantization: QuantizationConfig | None,
    split: Split,
    module: str | None = None,
    *,
    prologue: Prologue | None = None,
    norm: jax.Array | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Computes ``residual + prologue(x) @ weight.T + bias``, each sum rounded; x.dtype[b, t, n].

    Args:
        x: float[b, t, k], or [b, t, 2 * k] for a `SiluGate`.
        layer: weight [n, k] of any kind, perhaps a bias [n], perhaps a tap (see observe.py).
        quantization: how int8 weights are carried out.
        split: what other devices do.
        module: the name of a layer whose inputs many devices made (see `Split`), else None.
        prologue: what x goes through first, or None.
        norm: float[k], the weight of an `RMSNorm`.
        residual: x.dtype[b, t, n], or None; where rows are gathered, a device's columns of it and of the result.

    """
    weight, bias = layer["weight"], layer.get("bias")
    bias = None if bias is None else bias.astype(jnp.float32)
    how = quantization or QuantizationConfig()
    check_available(how.implementation)
    if isinstance(weight, QuantizedMatrix) and (split or how.native):
        norm = None if norm is None else norm.astype(jnp.float32)
        operands = Operands(x, weight.codes, weight.scale, bias, norm, residual)
        arithmetic = how.outlier_arithmetic or "int15"
        kernel = Layer(as_rule(how.outliers), arithmetic, how.implementation, prologue)
        if split.gathers(module):
            operands, kernel = _entered(operands, kernel)
            operands = operands._replace(x=split.whole(operands.x, module))
        if "tap" in layer:
            operands, kernel = _tapped(layer["tap"], operands, kernel)
        if split:
            shards = split.shards(module)
            return local_linear(operands, kernel, shards=shards, reduction=how.reduction)
        return int8_linear(operands, kernel)
    x = split.whole(enter(x, norm, prologue), module)
    if "tap" in layer:
        layer["tap"](x)
    if isinstance(weight, QuantizedMatrix | SchemeMatrix):
        assert not split  # such schemes are refused when loading onto a mesh
        y = scheme_linear(x, weight, bias, scheme=how, implementation=how.implementation)
    elif bias is None and not split:
        y = product(x, weight, x.dtype)
    else:
        y = split.sum(product(x, weight), module)
        y = (y if bias is None else y + bias[None, None]).astype(x.dtype)
    return y if residual is None else residual + y


def _tapped(
    tap: Callable[[jax.Array], None], operands: Operands, kernel: Layer
) -> tuple[Operands, Layer]:
    """Hands out the rows that the kernel quantises, and the rest of the layer to carry out."""
    operands, rest = _entered(operands, kernel)
    tap(operands.x)
    return operands, rest


def _entered(operands: Operands, kernel: Layer) -> tuple[Operands, Layer]:
    """Does the prologue, and returns the rest of the layer to carry out."""
    if kernel.prologue is None:
        return operands, kernel
    x = operands.x
    rows = entered(operands._replace(x=x.reshape(-1, x.shape[-1])), kernel)
    rows = rows.reshape(*x.shape[:-1], -1)
    rest = dataclasses.replace(kernel, prologue=None)
    return operands._replace(x=rows, norm=None), rest


def block(
    config: DecoderConfig,
    layer: Mapping[str, Any],
    x: jax.Array,
    residual: jax.Array,
    quantization: QuantizationConfig | None,
    split: Split,
) -> jax.Array | None:
    """What follows attention in a layer as one call, or None if it has to be done step by step.

    Args:
        config: the architecture.
        layer: out, mlp_norm, up and down.
        x: float[b, t, query_size], what attention gave.
        residual: x.dtype[b, t, hidden].
        quantization: how int8 weights are carried out.
        split: what other devices do.

    """
    nodes = [layer[name] for name in ("out", "up", "down")]
    prologue, norm = as_prologue(config, layer.get("mlp_norm", {}))
    how = quantization or QuantizationConfig()
    if split or norm is None or not config.norm_first or not how.native:
        return None
    if not config.gated or config.activation != "silu" or any("tap" in node for node in nodes):
        return None
    if not all(isinstance(node["weight"], QuantizedMatrix) for node in nodes):
        return None
    check_available(how.implementation)
    weights = []
    for node in nodes:
        bias = node.get("bias")
        bias = None if bias is None else bias.astype(jnp.float32)
        weights.append(Weights(node["weight"].codes, node["weight"].scale, bias))
    arithmetic = how.outlier_arithmetic or "int15"
    kernel = Layer(as_rule(how.outliers), arithmetic, how.implementation, prologue)
    return mlp_block(Block(x, residual, norm.astype(jnp.float32), *weights), kernel)


def as_prologue(
    config: DecoderConfig, layer: Mapping[str, Any]
) -> tuple[RMSNorm, jax.Array] | tuple[None, None]:
    """Returns a norm as a prologue and its weight, or Nones if it is none that a kernel knows."""
    rms = config.norm == "rms" and set(layer) == {"weight"}
    if not rms or config.norm_epsilon < SMALLEST_NORM_EPSILON:
        return None, None
    return RMSNorm(config.norm_epsilon), layer["weight"]


def apply_norm(config: DecoderConfig, x: jax.Array, layer: Mapping[str, Any]) -> jax.Array:
    """Normalises the last axis in float32; x.dtype of the same shape."""
    y = x.astype(jnp.float32)
    if config.norm == "layer":
        y -= jnp.mean(y, axis=-1, keepdims=True)
    # A layer norm's variance is the mean square of what is left.
    y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + config.norm_epsilon)
    if "weight" in layer:
        y *= layer["weight"].astype(jnp.float32)[None, None]
    if "bias" in layer:
        y += layer["bias"].astype(jnp.float32)[None, None]
    return y.astype(x.dtype)


def activate(config: DecoderConfig, x: jax.Array) -> tuple[jax.Array, Prologue | None]:
    """Applies the MLP's activation to x[b, t, n], or returns x and the prologue that stands for it."""
    if config.gated and config.activation == "silu":
        return x, SiluGate()
    y = x.astype(jnp.float32)
    gate = ACTIVATIONS[config.activation](y[..., : config.mlp_size])
    y = gate * y[..., config.mlp_size :] if config.gated else gate
    return y.astype(x.dtype), None
