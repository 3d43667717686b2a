"""Changing a float model to learn about it: dimensions set to zero, attention probabilities, injected outliers.

Zeroing a dimension of a layer's input is zeroing a column of its weight. The surprising fact: scaling by a power of two
is exact in every binary format, so a model with injected outliers gives the same float logits to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxint8.models.attention import alibi_bias, alibi_slopes, rope_tables, rotate
from jaxint8.models.config import DecoderConfig
from jaxint8.models.decoder import Params

# Linear layers that read the hidden state as a norm leaves it.
HIDDEN_SITES = ("qkv", "up")
_NORMS = {"qkv": "attention_norm", "up": "mlp_norm"}


def without(params: Params, dimensions: Sequence[int], sites: Sequence[str]) -> dict[str, Any]:
    """Returns float parameters under which some input dimensions of some layers count for nothing.

    Args:
        params: the parameters; shared but for what changes.
        dimensions: which of a layer's inputs.
        sites: names of layers in a block ("qkv", "up").

    """
    columns = jnp.asarray(list(dimensions), jnp.int32)

    def changed(layer: Mapping[str, Any]) -> dict[str, Any]:
        nodes = {site: layer[site] for site in sites}
        return {
            **layer,
            **{
                site: {**node, "weight": node["weight"].at[:, columns].set(0)}
                for site, node in nodes.items()
            },
        }

    return {**params, "layers": [changed(layer) for layer in params["layers"]]}


def inject(
    config: DecoderConfig, params: Params, dimensions: Sequence[int], factor: float
) -> dict[str, Any]:
    """Returns float parameters of the same function whose hidden states have large dimensions, as those of 6.7B models.

    The weight of each norm before attention and MLP is multiplied by ``factor`` in some dimensions, and the columns
    that read them are divided by it.

    Args:
        config: the architecture, with the norm before the layer.
        params: float parameters; shared but for what changes.
        dimensions: of the hidden state.
        factor: a power of two; then the logits keep their bits.

    Raises:
        ValueError: the architecture has no norm weight to scale, or an argument cannot be.

    """
    mantissa, _ = jnp.frexp(jnp.float32(factor))
    if factor <= 0 or float(mantissa) != 0.5:
        raise ValueError(f"factor: expected a power of two, got {factor:g}")
    if not config.norm_first or not config.norm_affine:
        raise ValueError(f"inject: {config.family} has no norm weight before its linear layers")
    outside = [i for i in dimensions if not 0 <= i < config.hidden_size]
    if outside:
        raise ValueError(f"dimensions: expected 0 to {config.hidden_size - 1}, got {outside}")
    columns = jnp.asarray(list(dimensions), jnp.int32)

    def scaled(values: jax.Array, by: float) -> jax.Array:
        return values.at[..., columns].multiply(jnp.asarray(by, values.dtype))

    def changed(layer: Mapping[str, Any]) -> dict[str, Any]:
        new = dict(layer)
        for site, norm in _NORMS.items():
            new[norm] = {name: scaled(values, factor) for name, values in layer[norm].items()}
            new[site] = {**layer[site], "weight": scaled(layer[site]["weight"], 1 / factor)}
        return new

    return {**params, "layers": [changed(layer) for layer in params["layers"]]}


def top1_probability(
    config: DecoderConfig, params: Params, inputs: Mapping[str, jax.Array]
) -> float:
    """Returns the mean of the largest attention probability over layers, heads and positions.

    Every layer gets its own input, so what ``params`` changes in one does not reach the next (paper, section 4.2).

    Args:
        config: the architecture.
        params: float parameters.
        inputs: what enters the layers, x[b, t, k] by name, as `observe.linear_inputs` returns.

    """
    first = inputs["layers.0.qkv"]
    b, t, _ = first.shape
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
    rope = None
    if config.positions == "rope":
        rope = rope_tables(config, positions, params.get("rope_factors"))
    means = [
        _largest(config, layer["qkv"], inputs[f"layers.{i}.qkv"], rope)
        for i, layer in enumerate(params["layers"])
    ]
    return float(jnp.mean(jnp.stack(means)))


@functools.partial(jax.jit, static_argnums=0)
def _largest(
    config: DecoderConfig,
    layer: Params,
    x: jax.Array,
    rope: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    b, t, _ = x.shape
    rows = (config.heads + config.kv_heads) * config.head_dim
    fused = jnp.einsum("btk,nk->btn", x, layer["weight"][:rows], precision="highest")
    if "bias" in layer:
        fused += layer["bias"][:rows].astype(fused.dtype)[None, None]
    turned = fused.reshape(b, t, -1, config.head_dim)
    if rope is not None:
        turned = rotate(turned, rope)
    group = config.heads // config.kv_heads
    query = turned[:, :, : config.heads].reshape(b, t, config.kv_heads, group, config.head_dim)
    key = turned[:, :, config.heads :]
    causal = jnp.tril(jnp.ones((t, t), bool))[None, None]

    bias = jnp.zeros((1, config.heads, 1, t), jnp.float32)
    if config.positions == "alibi":
        bias = alibi_bias(alibi_slopes(config.heads), jnp.arange(t, dtype=jnp.int32)[None])
    bias = jnp.moveaxis(bias.reshape(1, config.kv_heads, group, 1, t), 1, 0)

    def of_head(parts: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        # One key head at a time: all scores of a layer at once would be the largest array there is.
        q, k, b = (part.astype(jnp.float32) for part in parts)
        scores = jnp.einsum("btgd,bsd->bgts", q, k) * jnp.float32(config.head_dim**-0.5) + b
        share = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
        return jnp.mean(jnp.max(share, axis=-1))

    heads = jnp.moveaxis(query, 2, 0), jnp.moveaxis(key, 2, 0), bias
    return jnp.mean(jax.lax.map(of_head, heads))
