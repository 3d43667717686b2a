"""Decoding and prefill of a LLaMA shape of 8 billion random weights on a GPU, for gpu_check.py: bf16 and int8."""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_check import STAGES

from jaxint8 import QuantizedMatrix
from jaxint8.models.cache import init_cache
from jaxint8.models.config import DecoderConfig, as_quantization
from jaxint8.models.decoder import forward

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=128256,
    hidden_size=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    mlp_size=14336,
    max_positions=8192,
    embedding_size=4096,
    norm="rms",
    norm_epsilon=1e-5,
    positions="rope",
    rope_theta=500000.0,
    activation="silu",
    gated=True,
)
CONTEXT, PROMPT, STEPS, REPEATS = 512, 512, 16, 5
METHODS = {"bf16": None, "int8 relative 6": "relative", "int8 none": "vectorwise"}


def make_params(quantized: bool) -> dict[str, Any]:
    """Returns random weights, made on the device; the head and the embedding are bf16 in both."""
    keys = iter(jax.random.split(jax.random.key(0), 8 * CONFIG.layers + 8))

    def matrix(n: int, k: int) -> Any:
        if quantized:
            codes = jax.random.randint(next(keys), (n, k), -127, 128, jnp.int8)
            return QuantizedMatrix(codes, jnp.full((n,), 0.02 / 73, jnp.float32))
        return 0.02 * jax.random.normal(next(keys), (n, k), jnp.bfloat16)

    def norm() -> dict[str, jax.Array]:
        return {"weight": jnp.ones((CONFIG.hidden_size,), jnp.bfloat16)}

    hidden, mlp = CONFIG.hidden_size, CONFIG.mlp_size
    table = (CONFIG.vocab_size, hidden)
    layers = [
        {
            "attention_norm": norm(),
            "mlp_norm": norm(),
            "qkv": {"weight": matrix(CONFIG.query_size + 2 * CONFIG.key_value_size, hidden)},
            "out": {"weight": matrix(hidden, CONFIG.query_size)},
            "up": {"weight": matrix(2 * mlp, hidden)},
            "down": {"weight": matrix(hidden, mlp)},
        }
        for _ in range(CONFIG.layers)
    ]
    return {
        "embedding": jax.random.normal(next(keys), table, jnp.bfloat16),
        "lm_head": {"weight": 0.02 * jax.random.normal(next(keys), table, jnp.bfloat16)},
        "final_norm": norm(),
        "layers": layers,
    }


@functools.partial(jax.jit, static_argnames="quantization")
def _decode(params: Any, cache: Any, token: jax.Array, quantization: Any) -> jax.Array:
    def step(_: int, carry: Any) -> Any:
        cache, token = carry
        logits, cache = forward(
            CONFIG, params, token[:, None], cache, quantization=quantization, last_only=True
        )
        return cache, jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)

    return jax.lax.fori_loop(0, STEPS, step, (cache, token))[1]


@functools.partial(jax.jit, static_argnames="quantization")
def _prefill(params: Any, tokens: jax.Array, quantization: Any) -> jax.Array:
    return forward(CONFIG, params, tokens, quantization=quantization, last_only=True)[0]


def _median(function: Any, *arguments: Any) -> float:
    """Returns seconds of a call, the median of several after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def stage_decode() -> dict[str, Any]:
    """Tokens per second: STEPS greedy steps after CONTEXT tokens in one jitted loop, and prompts of PROMPT tokens."""
    deadline = time.monotonic() + 0.85 * STAGES["decode"]
    rows: list[dict[str, Any]] = []
    for method, name in METHODS.items():
        quantization = as_quantization(name)
        params = make_params(name is not None)
        jax.block_until_ready(params)
        for batch in (1, 8, 32):
            if time.monotonic() > deadline:
                break
            cache = init_cache(CONFIG, 2 * CONTEXT, jnp.zeros((batch,), jnp.int32), jnp.bfloat16)
            cache = dataclasses.replace(cache, length=jnp.int32(CONTEXT))
            seconds = _median(
                _decode, params, cache, jnp.arange(batch, dtype=jnp.int32), quantization
            )
            row = {"method": method, "batch": batch, "decode_tokens_per_s": STEPS * batch / seconds}
            rows.append(row)
            print(row, flush=True)
            if time.monotonic() > deadline:
                break
            tokens = jax.random.randint(jax.random.key(1), (batch, PROMPT), 0, CONFIG.vocab_size)
            seconds = _median(_prefill, params, tokens, quantization)
            row["prefill_tokens_per_s"] = PROMPT * batch / seconds
            print(row, flush=True)
        del params
    return {"rows": rows, "context": CONTEXT, "prompt": PROMPT, "unit": "tokens per second"}
