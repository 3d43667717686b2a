"""A token's attention to an int8 cache on a GPU, for gpu_check.py: against the oracle, and its time in a CUDA graph."""

import ctypes
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import test_cuda_attend
from gpu_decode import CONFIG, make_params
from gpu_stages import gpu_executor
from gpu_timing import REPEATS

import cuda_executor as tests
from jaxint8 import RelativeThreshold
from jaxint8.models.cache import init_cache
from jaxint8.models.config import QuantizationConfig
from jaxint8.models.decoder import forward
from jaxint8.models.generate import generate_tokens

# Query heads, key-value heads and dimensions: LLaMA 3 8B, LLaMA 2 7B, SmolLM2.
HEADS = ((32, 8, 128), (32, 32, 128), (9, 3, 64))
# Caches that are read in turn, so that no other cache of the GPU holds them.
CACHED = 200 << 20


def stage_attend() -> dict[str, Any]:
    """Microseconds of a token's attention by sequences and slots, all but 64 in use, and TB/s of the cache."""
    executor = gpu_executor()
    rows = []
    for heads, kv_heads, d in HEADS:
        for slots in (128, 640, 2048, 8192):
            for b in (1, 8, 32):
                read = b * kv_heads * (slots - 64) * (2 * d + 8)
                if read > 1 << 30:
                    continue
                us = _time(executor, (b, kv_heads, heads // kv_heads, d, slots, slots - 65, 0))
                size = f"{heads}/{kv_heads} x {d}"
                rows.append(
                    {"size": size, "m": b, "slots": slots, "us": us, "TB/s": read / us * 1e-6}
                )
    return {"rows": rows, "unit": "microseconds"}


def _time(executor: tests.Executor, shape: tuple[int, ...]) -> float:
    b, kv_heads, queries, d, slots, slot, _ = shape
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (b, kv_heads, slots, d), np.int8)
    scale = rng.uniform(0.01, 0.02, (b, kv_heads, slots)).astype(np.float32)
    qkv = rng.normal(size=(b, (queries + 2) * kv_heads * d)).astype(np.float16)
    rope = rng.uniform(-1, 1, (2, b, d // 2)).astype(np.float32)
    values = codes.reshape(b, kv_heads, d, slots)
    start = np.zeros(b, np.int32)
    step = tests.Step(qkv, (rope[0], rope[1]), start, slot, (codes, scale), (values, scale))
    call, arrays = executor.attend_call(step)
    copies = max(1, min(40, CACHED // (2 * codes.nbytes)))
    executor.library.executor_time_attend.restype = ctypes.c_double
    us = executor.library.executor_time_attend(ctypes.byref(call), copies, max(40, copies), REPEATS)
    assert arrays
    if us < 0:
        raise RuntimeError(executor.library.executor_error().decode())
    return us


def check_attend() -> dict[str, Any]:
    """Generation with an int8 cache, whose steps are kernels in CUDA graphs, against whole prompts, which have none."""
    config = dataclasses.replace(CONFIG, layers=2, hidden_size=1024, mlp_size=2048, vocab_size=4096)
    config = dataclasses.replace(config, embedding_size=1024)
    params = make_params(True, config)
    how = QuantizationConfig(outliers=RelativeThreshold(6.0), kv_cache="int8")
    prompts = [np.random.default_rng(n).integers(0, 4096, n).tolist() for n in (70, 3, 40)]
    tokens = generate_tokens(config, params, prompts, 100, quantization=how)
    # Alone a sequence has more blocks to a head.
    alone = generate_tokens(config, params, prompts[:1], 100, quantization=how)
    failures = []
    for prompt, made in zip([*prompts, prompts[0]], [*tokens, *alone], strict=True):
        logits = _logits(params, jnp.asarray([prompt + made[:-1]]), config, how)[len(prompt) - 1 :]
        chosen = logits[jnp.arange(len(made)), jnp.asarray(made)]
        worst = float(jnp.max(jnp.max(logits, axis=-1) - chosen))
        if worst > 0.1 * float(jnp.std(logits)):
            failures.append(f"attend: {worst} below the largest logit after {len(prompt)} tokens")
    cache = init_cache(config, 128, jnp.zeros((1,), jnp.int32), jnp.bfloat16, how)
    step = jax.jit(functools.partial(forward, config, quantization=how))
    if "jaxint8_attend" not in step.lower(params, jnp.zeros((1, 1), jnp.int32), cache).as_text():
        failures.append("attend: not the kernel")
    return {"cases": 5, "failures": failures}


@functools.partial(jax.jit, static_argnames=("config", "how"))
def _logits(params: Any, tokens: jax.Array, config: Any, how: Any) -> jax.Array:
    return forward(config, params, tokens, quantization=how)[0][0]


def native_attend(executor: tests.Executor, quick: bool) -> tuple[int, list[str]]:
    """Attends in many shapes and types; returns how many and what differs from the oracle."""
    shapes = [shape for shape in test_cuda_attend.SHAPES if not quick or shape[4] <= 512]
    if not quick:
        shapes += [
            (32, 8, 4, 128, 640, 600, 0),
            (8, 8, 4, 128, 640, 639, 0),
            (1, 8, 4, 128, 8192, 8000, 0),
        ]
        shapes += [
            (5, 3, 3, 64, 2048, 1500, 0),
            (2, 32, 1, 128, 1024, 700, 0),
            (1, 1, 8, 128, 32768, 32767, 0),
        ]
    failures, count = [], 0
    for shape in shapes:
        for dtype in test_cuda_attend.TYPES:
            step = test_cuda_attend.make(shape, dtype)
            for attempt in range(1 if quick else 3):
                count += 1
                try:
                    test_cuda_attend.expect(executor, step)
                except (AssertionError, tests.ExecutorError) as error:
                    failures.append(f"attend {shape} {dtype} run {attempt}: {str(error)[:300]}")
    return count, failures
