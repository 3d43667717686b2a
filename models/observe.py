"""Looking inside a decoder: the inputs of its linear layers, for outlier statistics and calibration.

It is the decoder's own forward pass. The surprising fact: it is quick without a jit around it, for
each layer runs as one compiled call, and all layers share that call; so it costs the compilation of
one layer, and no more than the inputs of one pass are kept.
"""

from __future__ import annotations

import functools

import jax
import numpy as np

from jaxint8.models.config import DecoderConfig, QuantizationConfig
from jaxint8.models.context import around, for_caller
from jaxint8.models.decoder import Params, forward
from jaxint8.models.placement import Placement


def linear_inputs(
    config: DecoderConfig,
    params: Params,
    tokens: jax.Array,
    *,
    quantization: QuantizationConfig | None = None,
    placement: Placement | None = None,
) -> dict[str, jax.Array]:
    """Returns what enters each linear layer, x.dtype[b, t, k] by the layer's place in the tree.

    Products of one input are one layer ("layers.3.qkv"), as in the tree of parameters. The head is
    not among them.

    Args:
        config: the architecture.
        params: its parameters, float or int8.
        tokens: int32[b, t], whole rows from position 0.
        quantization: how int8 weights are carried out.
        placement: where the parameters lie on a mesh; None on one device. Then the whole pass is one
            compiled call.

    """
    if placement is not None:
        filled = placement.fill_rows(np.asarray(tokens))
        with around(placement):
            found = _on_mesh(params, filled, len(tokens), config, quantization, placement)
        return {name: for_caller(x, placement) for name, x in found.items()}
    found = {}
    bridges = {
        name: {**params[name], "tap": functools.partial(found.__setitem__, name)}
        for name in ("project_in", "project_out")
        if name in params
    }
    seen: list[dict[str, jax.Array]] = []
    forward(config, {**params, **bridges}, tokens, quantization=quantization, seen=seen)
    for index, inputs in enumerate(seen):
        found.update({f"layers.{index}.{name}": x for name, x in inputs.items()})
    return found


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _on_mesh(
    params: Params,
    tokens: jax.Array,
    count: int,
    config: DecoderConfig,
    quantization: QuantizationConfig | None,
    placement: Placement,
) -> dict[str, jax.Array]:
    seen: list[dict[str, jax.Array]] = []
    forward(config, params, tokens, quantization=quantization, placement=placement, seen=seen)
    return {
        f"layers.{index}.{name}": placement.without_padding(name, x)[:count]
        for index, inputs in enumerate(seen)
        for name, x in inputs.items()
    }
