"""The decoder: one readable forward pass, pure functions on a dict of parameters.

``forward`` is the whole model. What differs between families is a field of `DecoderConfig`; what
differs between float and int8 is the type of a weight: an array ``[n, k]``, or a `QuantizedMatrix`
of the same shape. Nothing else in this file knows which of the two it runs.

The tree (``layers`` is a list, so that the loop below is unrolled: a scan over stacked weights
would copy every layer's weights at every step):

    embedding [vocab, embedding_size]   positions [max_positions + offset, hidden]
    rope_factors [head_dim / 2]   project_in, project_out {weight}
    embedding_norm, final_norm {weight, bias}   lm_head {weight}   int8_head {weight}
    layers[i]: attention_norm, mlp_norm {weight, bias}   qkv, out, up, down {weight, bias}

where ``qkv`` has the rows of q, k, v one below the other, and ``up`` those of gate and up when
gated; ``int8_head`` stands beside the head it was made from, be that ``lm_head`` or (tied) the
``embedding``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxint8.attend import Token, kernel_platforms
from jaxint8.attend import attend as attend_codes
from jaxint8.models.attention import attend, rotate
from jaxint8.models.cache import KVCache, capacity_of, is_coded
from jaxint8.models.config import DecoderConfig, QuantizationConfig
from jaxint8.models.head import most_likely, rescore
from jaxint8.models.linear import activate, apply_norm, as_prologue, block, linear
from jaxint8.models.place import Place, place
from jaxint8.models.placement import Placement
from jaxint8.models.product import product
from jaxint8.models.sampling import first_largest
from jaxint8.models.split import ALONE, HIDDEN, Split
from jaxint8.models.step import attend_one, held, store
from jaxint8.vectors import Held, Vectors, rounded

Params = Mapping[str, Any]


def forward(
    config: DecoderConfig,
    params: Params,
    tokens: jax.Array,
    cache: KVCache | None = None,
    *,
    quantization: QuantizationConfig | None = None,
    placement: Placement | None = None,
    last_only: bool = False,
    greedy: bool = False,
    seen: list[dict[str, jax.Array]] | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Runs the decoder on the next tokens of every row.

    Args:
        config: the architecture; static under jit.
        params: the tree described at the top. Activations have the dtype of ``embedding``; norms,
            softmax and sums of products are float32.
        tokens: int32[b, t]. Without a cache, whole rows from position 0; with one, the t tokens
            that follow those it holds (left padding included, see `KVCache`).
        cache: keys and values of the tokens before; must have room for t more.
        quantization: how `QuantizedMatrix` weights are carried out; static under jit.
        placement: where the parameters lie on a mesh, and then tokens and cache too: b must be a
            multiple of its "data" axis; static under jit.
        last_only: whether only the last token's logits are wanted, to choose the next by: then an
            int8 head's largest logits are exact (see `rescore`); else they all are int8.
        greedy: whether, with ``last_only``, only the token of the largest logit is wanted.
        seen: if a list, what enters the linear layers is appended, a dict by name for each layer;
            with a placement, columns of padding included.

    Returns:
        Logits float32[b, t or 1, vocab] (if ``greedy`` the tokens of the largest, int32[b], ties to the lower
        id), and the cache with the t tokens added (None without one).
        With a placement all t logits of a token have columns of padding (see ``whole_logits``).

    Raises:
        ValueError: ``greedy`` without ``last_only``, or a cache that is not as ``quantization`` says.

    """
    if greedy and not last_only:
        raise ValueError("greedy: expected last_only=True beside it, got last_only=False")
    if cache is not None:
        _check_cache(cache, quantization)
    part = functools.partial(
        _forward, quantization=quantization, last_only=last_only, greedy=greedy
    )
    if placement is None:
        return part(config, params, tokens, cache, seen=seen)
    split = placement.split
    config = dataclasses.replace(placement.local, end_tokens=config.end_tokens)

    def device(
        params: Params, tokens: jax.Array, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache | None, list[dict[str, jax.Array]] | None]:
        inputs = None if seen is None else []
        logits, cache = part(config, params, tokens, cache, seen=inputs, split=split)
        return logits, cache, inputs

    rows = placement.rows_spec
    caches = None if cache is None else placement.cache_specs(cache)
    layers = None if seen is None else [placement.input_specs] * config.layers
    run = jax.shard_map(
        device,
        mesh=placement.mesh,
        in_specs=(placement.param_specs(params), rows, caches),
        out_specs=(rows if last_only else placement.logits_spec, caches, layers),
    )
    logits, cache, inputs = run(params, tokens, cache)
    if seen is not None and inputs is not None:
        seen.extend(inputs)
    return logits, cache


def _check_cache(cache: KVCache, quantization: QuantizationConfig | None) -> None:
    coded, wanted = isinstance(cache.keys[0], Vectors), is_coded(quantization)
    if coded != wanted:
        kinds = {False: "float", True: "int8"}
        raise ValueError(
            f"cache: expected kv_cache={kinds[wanted]!r} as in the quantization, got {kinds[coded]!r}"
        )


def _forward(
    config: DecoderConfig,
    params: Params,
    tokens: jax.Array,
    cache: KVCache | None,
    *,
    quantization: QuantizationConfig | None,
    last_only: bool,
    greedy: bool,
    seen: list[dict[str, jax.Array]] | None = None,
    split: Split = ALONE,
) -> tuple[jax.Array, KVCache | None]:
    """What one device does in `forward`; ``split`` says what it does together with others."""
    x = split.take(params["embedding"], tokens)
    # Float32 means float32, also where a matrix unit would rather round its inputs.
    precision = "highest" if x.dtype == jnp.float32 else None
    with jax.default_matmul_precision(precision):
        at = place(config, params, tokens, cache, split)
        x = at.only_tokens(x)
        if "project_in" in params:
            x = linear(x, params["project_in"], quantization, split)
        if config.positions == "learned":
            x += jnp.take(
                params["positions"], at.positions + config.position_offset, axis=0, mode="clip"
            )
        if config.embedding_norm:
            x = apply_norm(config, x, params["embedding_norm"])
        if config.embedding_norm or config.positions == "learned":
            x = at.only_tokens(x)
        keys, values = [], []
        x = split.own(x)
        for index, layer in enumerate(params["layers"]):
            stored = None if cache is None else (cache.keys[index], cache.values[index])
            if seen is None:
                x, stored = _traced_once(config, layer, x, at, stored, quantization)
            else:
                x, stored, inputs = _traced_with_inputs(config, layer, x, at, stored, quantization)
                seen.append(inputs)
            if stored is not None:
                keys.append(stored[0])
                values.append(stored[1])
        x = split.whole(x, HIDDEN)
        if config.final_norm:
            x = apply_norm(config, x, params.get("final_norm", {}))
        x = at.only_tokens(x)
        if last_only:
            x = x[:, -1:]
        if "project_out" in params:
            x = linear(x, params["project_out"], quantization, split)
        if cache is not None:
            length = cache.length + tokens.shape[1]
            cache = dataclasses.replace(cache, keys=keys, values=values, length=length)
        return _logits(config, params, x, quantization, last_only, greedy, split), cache


def _layer(
    config: DecoderConfig,
    layer: Params,
    x: jax.Array,
    at: Place,
    stored: tuple[Held, Held] | None,
    quantization: QuantizationConfig | None,
) -> tuple[jax.Array, tuple[Held, Held] | None]:
    """Attention, then MLP, each with its norm before it or (post-norm) after the sum.

    Of x[b, t, hidden] a device has only its own columns where they are gathered (see `Split`).
    """
    attention_norm, mlp_norm = layer.get("attention_norm", {}), layer.get("mlp_norm", {})
    y, stored = _attention(config, layer, x, at, stored, quantization, attention_norm)
    # Only in a layer of no biases are the rows of padding zeros all the way.
    if at.valid is None or not _has_biases(layer):
        done = block(config, layer, y, x, quantization, at.split)
        if done is not None:
            return done, stored
    x = linear(y, layer["out"], quantization, at.split, "out", residual=x)
    x = x if config.norm_first else _normed(config, x, at, attention_norm)
    x = _mlp(config, layer, x, at, quantization, mlp_norm)
    return x if config.norm_first else _normed(config, x, at, mlp_norm), stored


def _normed(config: DecoderConfig, x: jax.Array, at: Place, norm: Params) -> jax.Array:
    """A norm behind the sum."""
    return at.split.own(apply_norm(config, at.split.whole(x, HIDDEN), norm))


def with_wide_norms(params: Params) -> dict[str, Any]:
    """The same parameters with the weights of norms in float32, as `forward` multiplies them.

    For whoever runs many steps: 16-bit ones are converted by each step, two kernels a layer of a GPU.
    """

    def wide(tree: Params) -> dict[str, Any]:
        return {
            name: jax.tree.map(lambda a: a.astype(jnp.float32), node)
            if name.endswith("_norm")
            else node
            for name, node in tree.items()
        }

    return {**wide(params), "layers": [wide(layer) for layer in params["layers"]]}


# Layers of one shape are traced once and called; XLA sees through the call.
_traced_once = jax.jit(_layer, static_argnums=(0, 5))


@functools.partial(jax.jit, static_argnums=(0, 5))
def _traced_with_inputs(
    config: DecoderConfig,
    layer: Params,
    x: jax.Array,
    at: Place,
    stored: tuple[Held, Held] | None,
    quantization: QuantizationConfig | None,
) -> tuple[jax.Array, tuple[Held, Held] | None, dict[str, jax.Array]]:
    """A layer, and what enters its linear layers; `linear` calls the taps while it is traced."""
    inputs: dict[str, jax.Array] = {}
    tapped = {
        name: {**node, "tap": functools.partial(inputs.__setitem__, name)}
        for name, node in layer.items()
    }
    x, stored = _layer(config, tapped, x, at, stored, quantization)
    return x, stored, inputs


def _enters(
    config: DecoderConfig, layer: Params, x: jax.Array, at: Place, norm: Params
) -> tuple[jax.Array, dict[str, Any]]:
    """What enters the first linear layer behind a norm: x, and the prologue that is still to do.

    Zeros are put into rows of padding, unless they hold zeros already: in a layer of no biases
    nothing else comes of zeros.
    """
    x = at.split.whole(x, HIDDEN)
    prologue, weight = as_prologue(config, norm) if config.norm_first else (None, None)
    if config.norm_first and prologue is None:
        return at.only_tokens(apply_norm(config, x, norm)), {}
    x = at.only_tokens(x) if _has_biases(layer) else x
    return x, {"prologue": prologue, "norm": weight}


def _has_biases(layer: Params) -> bool:
    return any("bias" in node for node in layer.values())


def _attention(
    config: DecoderConfig,
    layer: Params,
    x: jax.Array,
    at: Place,
    stored: tuple[Held, Held] | None,
    quantization: QuantizationConfig | None,
    norm: Params,
) -> tuple[jax.Array, tuple[Held, Held] | None]:
    """Attention of x[b, t, hidden] to itself, or to a cache that it is added to; before ``out``."""
    b, t, _ = x.shape
    y, before = _enters(config, layer, x, at, norm)
    # Heads of q, then those of k, then those of v.
    fused = linear(y, layer["qkv"], quantization, at.split, **before)
    attend_all = functools.partial(_attend_all, config, quantization)
    kernels = {} if stored is None or t > 1 else _kernels(config, at, fused, stored)
    if not kernels:
        y, stored = attend_all(fused, at, stored)
    else:
        y, stored = jax.lax.platform_dependent(fused, at, stored, default=attend_all, **kernels)
    return at.only_tokens(y.reshape(b, t, config.query_size)), stored


def _kernels(
    config: DecoderConfig, at: Place, fused: jax.Array, stored: tuple[Held, Held]
) -> dict[str, Callable[..., tuple[jax.Array, tuple[Held, Held]]]]:
    """By platform, `_attend_all` of one token and an int8 cache as a kernel."""
    if not isinstance(stored[1], Vectors) or at.bias is not None:
        return {}

    def attend_kernel(
        fused: jax.Array, at: Place, stored: tuple[Vectors, Vectors]
    ) -> tuple[jax.Array, tuple[Held, Held]]:
        b = fused.shape[0]
        assert at.start is not None
        rope = None if at.rope is None else (at.rope[0].reshape(b, -1), at.rope[1].reshape(b, -1))
        token = Token(fused.reshape(b, -1), rope, at.start, jnp.asarray(at.slot))
        y, keys, values = attend_codes(token, *stored)
        return y.reshape(b, 1, -1, config.head_dim), (keys, values)

    platforms = kernel_platforms(fused.shape[-1], stored[1])
    return dict.fromkeys(platforms, attend_kernel)


def _attend_all(
    config: DecoderConfig,
    quantization: QuantizationConfig | None,
    fused: jax.Array,
    at: Place,
    stored: tuple[Held, Held] | None,
) -> tuple[jax.Array, tuple[Held, Held] | None]:
    """Attention [b, t, heads, head_dim] behind the product fused[b, t, (heads + 2 * kv_heads) * head_dim]."""
    b, t, _ = fused.shape
    fused = fused.reshape(b, t, -1, config.head_dim)
    turning = config.heads + config.kv_heads
    turned = fused[:, :, :turning]
    if at.rope is not None:
        turned = rotate(turned, at.rope)
    query, key = turned[:, :, : config.heads], turned[:, :, config.heads :]
    value = fused[:, :, turning:]
    if stored is not None:
        stored = store(stored, key, value, at.slot)
    if stored is None or t == capacity_of(stored[1]):  # a cache that t tokens fill was empty before
        if is_coded(quantization):
            key, value = rounded(key, spreading=True), rounded(value)
        y = attend(query, key, value, at.mask, at.bias)
    elif t == 1:
        y = attend_one(query, *stored, at.mask, at.bias)
    else:
        y = attend(query, *held(stored, fused.dtype), at.mask, at.bias)
    return y, stored


def _mlp(
    config: DecoderConfig,
    layer: Params,
    x: jax.Array,
    at: Place,
    quantization: QuantizationConfig | None,
    norm: Params,
) -> jax.Array:
    """Adds the MLP to x[b, t, hidden]."""
    y, before = _enters(config, layer, x, at, norm)
    y = linear(y, layer["up"], quantization, at.split, **before)
    y, prologue = activate(config, y)
    y = at.only_tokens(y) if _has_biases(layer) else y
    return linear(y, layer["down"], quantization, at.split, "down", prologue=prologue, residual=x)


def _logits(
    config: DecoderConfig,
    params: Params,
    x: jax.Array,
    quantization: QuantizationConfig | None,
    last_only: bool,
    greedy: bool,
    split: Split,
) -> jax.Array:
    """Logits float32[b, t, vocab] of x[b, t, embedding_size], or the last one's token, as `forward` returns them."""
    table = params["embedding"] if config.tied_embeddings else params["lm_head"]["weight"]
    if "int8_head" in params:
        # In float32, for in bfloat16 the best logits would often be equal.
        logits = linear(x.astype(jnp.float32), params["int8_head"], quantization, split)
    else:
        logits = product(x, table)
    if not last_only:
        return logits
    logits = split.whole_vocabulary(logits)
    if "int8_head" in params:
        take = functools.partial(split.take, table)
        return most_likely(logits, x, take)[:, 0] if greedy else rescore(logits, x, take)
    return first_largest(logits[:, 0]) if greedy else logits
