"""Decoding and prefill of a LLaMA shape of 8 billion random weights on a GPU, for gpu_check.py: bf16 and int8."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_check import STAGES
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxint8 import QuantizedMatrix, RelativeThreshold, TopK, quantize
from jaxint8.models import generate
from jaxint8.models.cache import capacity_for, init_cache
from jaxint8.models.config import DecoderConfig, QuantizationConfig
from jaxint8.models.decoder import forward
from jaxint8.models.placement import Placement
from jaxint8.models.sampling import Draw, Sampling

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
# One call of the loop makes all tokens but the first, as when 128 are asked for: the call itself takes about as long
# as a step, however many it makes.
CONTEXT, PROMPT, STEPS, REPEATS = 512, 512, 127, 5
_RELATIVE = QuantizationConfig(outliers=RelativeThreshold(6.0))
METHODS = {
    "bf16": None,
    "int8 relative 6": _RELATIVE,
    "int8 top 8": QuantizationConfig(outliers=TopK(8)),
    "int8 none": QuantizationConfig(outliers=None),
    "int8 relative 6, int8 head": dataclasses.replace(_RELATIVE, lm_head="int8"),
    "int8 relative 6, int8 head and cache": dataclasses.replace(
        _RELATIVE, lm_head="int8", kv_cache="int8"
    ),
}
BATCHES = (1, 8, 32)


def make_params(quantized: bool, config: DecoderConfig = CONFIG) -> dict[str, Any]:
    """Returns random weights, made on the device; the head and the embedding are bf16 in both."""
    keys = iter(jax.random.split(jax.random.key(0), 8 * config.layers + 8))

    def matrix(n: int, k: int) -> Any:
        if quantized:
            codes = jax.random.randint(next(keys), (n, k), -127, 128, jnp.int8)
            return QuantizedMatrix(codes, jnp.full((n,), 0.02 / 73, jnp.float32))
        return 0.02 * jax.random.normal(next(keys), (n, k), jnp.bfloat16)

    def norm() -> dict[str, jax.Array]:
        return {"weight": jnp.ones((config.hidden_size,), jnp.bfloat16)}

    hidden, mlp = config.hidden_size, config.mlp_size
    table = (config.vocab_size, hidden)
    layers = [
        {
            "attention_norm": norm(),
            "mlp_norm": norm(),
            "qkv": {"weight": matrix(config.query_size + 2 * config.key_value_size, hidden)},
            "out": {"weight": matrix(hidden, config.query_size)},
            "up": {"weight": matrix(2 * mlp, hidden)},
            "down": {"weight": matrix(hidden, mlp)},
        }
        for _ in range(config.layers)
    ]
    return {
        "embedding": jax.random.normal(next(keys), table, jnp.bfloat16),
        "lm_head": {"weight": 0.02 * jax.random.normal(next(keys), table, jnp.bfloat16)},
        "final_norm": norm(),
        "layers": layers,
    }


def with_head(params: dict[str, Any], quantization: QuantizationConfig | None) -> dict[str, Any]:
    """Returns the parameters with an int8 head beside the other where the method has one."""
    if quantization is None or quantization.lm_head == "float":
        return params
    return {**params, "int8_head": {"weight": jax.jit(quantize)(params["lm_head"]["weight"].T)}}


def _random(key: jax.Array, like: jax.Array) -> jax.Array:
    """What may stand in a cache: keys or values, or codes and scales of them."""
    if like.dtype == jnp.int8:
        return jax.random.randint(key, like.shape, -127, 128, jnp.int8)
    if like.ndim == 3:
        return jax.random.uniform(key, like.shape, like.dtype, 0.01, 0.03)
    return jax.random.normal(key, like.shape, like.dtype)


class Decoding:
    """Greedy generation after CONTEXT random tokens a row, ``steps`` tokens at every call."""

    def __init__(
        self,
        params: Any,
        quantization: Any,
        batch: int,
        config: DecoderConfig = CONFIG,
        steps: int = STEPS,
        placement: Placement | None = None,
    ) -> None:
        """Fills a cache as long as generation would make it."""
        self._params = params
        self._steps = jnp.int32(steps)
        self._length, self._step = jnp.int32(CONTEXT), jnp.int32(1)
        self._how = {"config": config, "quantization": quantization, "placement": placement}
        capacity = capacity_for(CONTEXT + STEPS)
        start = jnp.zeros((batch,), jnp.int32)
        held = config if placement is None else placement.cache_config
        cache = init_cache(held, capacity, start, jnp.bfloat16, quantization)
        leaves, tree = jax.tree.flatten((cache.keys, cache.values))
        keys = jax.random.split(jax.random.key(2), len(leaves))
        filled = [_random(key, leaf) for key, leaf in zip(keys, leaves, strict=True)]
        k, v = jax.tree.unflatten(tree, filled)
        cache = dataclasses.replace(cache, keys=k, values=v)
        state = generate._State(
            cache=cache,
            token=jnp.arange(batch, dtype=jnp.int32),
            done=jnp.zeros((batch,), bool),
            step=self._step,
            keys=jax.random.split(jax.random.key(3), batch),
        )
        if placement is not None:
            whole = NamedSharding(placement.mesh, P())
            shardings = dataclasses.replace(
                jax.tree.map(lambda _: whole, state),
                cache=jax.tree.map(
                    lambda spec: NamedSharding(placement.mesh, spec), placement.cache_specs(cache)
                ),
            )
            state = jax.device_put(state, shardings)
        self._state = state

    def __call__(self) -> jax.Array:
        """Makes the tokens."""
        draw = Draw.of(Sampling())
        cache = dataclasses.replace(self._state.cache, length=jnp.copy(self._length))
        state = dataclasses.replace(self._state, cache=cache, step=jnp.copy(self._step))
        self._state, made = generate._decode(
            self._params, state, self._steps, draw, burst=generate.BURST, **self._how
        )
        return made


@functools.partial(jax.jit, static_argnames="quantization")
def _prefill(params: Any, tokens: jax.Array, quantization: Any) -> jax.Array:
    return forward(CONFIG, params, tokens, quantization=quantization, last_only=True)[0]


def median(function: Callable[[], Any]) -> float:
    """Returns seconds of a call, the median of several after one that compiles."""
    jax.block_until_ready(function())
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def _prefilling(params: Any, quantization: Any, batch: int) -> float:
    tokens = jax.random.randint(jax.random.key(1), (batch, PROMPT), 0, CONFIG.vocab_size)
    return PROMPT * batch / median(lambda: _prefill(params, tokens, quantization))


def stage_decode() -> dict[str, Any]:
    """Tokens per second: STEPS steps of generation's loop after CONTEXT tokens, and prompts of PROMPT tokens."""
    begin = time.monotonic()
    deadline = begin + 0.85 * STAGES["decode"]
    rows: list[dict[str, Any]] = []
    params, quantized = None, None
    for method, quantization in METHODS.items():
        if params is None or quantized != (quantization is not None):
            params, quantized = None, quantization is not None  # never two sets at once
            params = jax.block_until_ready(make_params(quantized))
        weights = with_head(params, quantization)
        for batch in BATCHES:
            row: dict[str, Any] = {"method": method, "batch": batch}
            if time.monotonic() < deadline:
                seconds = median(Decoding(weights, quantization, batch))
                row["decode_tokens_per_s"] = STEPS * batch / seconds
            if time.monotonic() < deadline and weights is params:  # a prompt has one head row
                row["prefill_tokens_per_s"] = _prefilling(weights, quantization, batch)
            rows.append(row)
            print(row, f"after {time.monotonic() - begin:.0f} s", flush=True)
        del weights
    sizes = {"context": CONTEXT, "steps": STEPS, "prompt": PROMPT}
    return {"rows": rows, **sizes, "unit": "tokens per second"}
