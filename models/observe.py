"""Looking inside a decoder: the inputs of its linear layers, for outlier statistics and calibration.

The decoder needs no second forward pass for it: a parameter node may carry a function under "tap",
which its linear layer calls with the input while it is traced. The surprising fact: taps are put in
and collected within one trace, so this works under jit, and what is not used afterwards is never
computed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jaxint8.models.config import DecoderConfig, QuantizationConfig
from jaxint8.models.decoder import Params, forward


def linear_inputs(
    config: DecoderConfig,
    params: Params,
    tokens: jax.Array,
    *,
    quantization: QuantizationConfig | None = None,
) -> dict[str, jax.Array]:
    """Returns what enters each linear layer, x.dtype[b, t, k] by the layer's place in the tree.

    Products of one input are one layer ("layers.3.qkv"), as in the tree of parameters.

    Args:
        config: the architecture.
        params: its parameters, float or int8.
        tokens: int32[b, t], whole rows from position 0.
        quantization: how int8 weights are carried out.

    """
    seen: dict[str, jax.Array] = {}

    def tapped(node: Any, name: str) -> Any:
        if isinstance(node, Mapping):
            children = {key: tapped(value, f"{name}.{key}") for key, value in node.items()}
            if "weight" in node:  # norms have one too, but no linear layer that would call
                children["tap"] = functools.partial(seen.__setitem__, name[1:])
            return children
        if isinstance(node, list):
            return [tapped(value, f"{name}.{i}") for i, value in enumerate(node)]
        return node

    forward(config, tapped(params, ""), tokens, quantization=quantization)
    return seen
