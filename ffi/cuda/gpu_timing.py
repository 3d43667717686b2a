"""Timings on a GPU, for gpu_check.py: our kernels alone over m, and the paper's speed table through JAX beside XLA."""

import ctypes
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import test_cuda_executor as tests
from gpu_check import STAGES, find_nvcc, run
from gpu_stages import gpu_executor

import battery
import jaxint8
from jaxint8 import RelativeThreshold, Threshold, TopK

# The paper's speed table: the first FFN layer of the GPT-3 sizes, d -> 4 d.
WIDTHS = {
    "Small": 768,
    "Medium": 1024,
    "Large": 1536,
    "XL": 2048,
    "2.7B": 2560,
    "6.7B": 4096,
    "13B": 5140,
    "175B": 12288,
}
SWEEP_M = [1, 2, 4, 8, 16, 17, 32, 64, 128, 256, 512, 1024, 2048, 4096]
SWEEP_SHAPES = [(4096, 4096), (4096, 14336)]  # k, n


def stage_probe() -> dict[str, Any]:
    """The machine: GPU, driver, instruction sets of the CPU, versions, copy bandwidth and bf16 matmul rate."""
    query = "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit"
    flags = pathlib.Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16")
    big = jnp.zeros((1 << 30,), jnp.float32)
    copied = time_jax(jax.jit(lambda a: a + 1), big)
    a, b = (jax.random.normal(jax.random.key(i), (8192, 8192), jnp.bfloat16) for i in (0, 1))
    product = time_jax(jax.jit(lambda a, b: a @ b.T), a, b)
    return {
        "gpu": run(["nvidia-smi", query, "--format=csv,noheader"]).strip(),
        "nvcc": run([find_nvcc(), "--version"]).strip().split("\n")[-2],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "cpu": [flag for flag in wanted if flag in flags],
        "cores": os.cpu_count(),
        "copy_tb_per_s": 2 * big.nbytes / copied * 1e-12,
        "bf16_tflop_per_s": 2 * 8192**3 / product * 1e-12,
    }


def _activations(m: int, k: int, dtype: Any) -> Any:
    """Normal values with a few outlier features and scattered outliers: about 0.1 % of values, 12 % of columns."""
    rng = np.random.default_rng([m, k])
    x = rng.standard_normal((m, k), np.float32)
    columns = rng.permutation(k)
    x[:, columns[: max(1, k // 1000)]] *= 20
    busy = columns[: max(1, k // 8)]
    scattered = rng.random((m, len(busy))) < 0.002
    x[:, busy] = np.where(scattered, 12 * np.sign(x[:, busy]), x[:, busy])
    return x.astype(dtype)


def _rules() -> dict[str, Any]:

    return {
        "none": None,
        "column 6": Threshold(6.0, "column"),
        "relative 6": RelativeThreshold(6.0),
        "top 8": TopK(8),
    }


def stage_sweep() -> dict[str, Any]:
    """Our kernels alone, in a CUDA graph over many weights (so that they come from device memory): microseconds."""
    executor = gpu_executor()
    rows = []
    for k, n in SWEEP_SHAPES:
        rng = np.random.default_rng([k, n])
        codes = rng.integers(-127, 128, (n, k), dtype=np.int8)
        scale = np.ones((n,), np.float32)
        for m in SWEEP_M:
            case = battery.Case(_activations(m, k, ml_dtypes.bfloat16), codes, scale, None)
            for name, rule in _rules().items():
                if name not in ("none", "relative 6") and (k, n) != (4096, 4096):
                    continue
                microseconds = _time_native(executor, case, rule)
                rows.append(
                    {
                        "m": m,
                        "k": k,
                        "n": n,
                        "rule": name,
                        "us": microseconds,
                        **_rates(m, k, n, microseconds),
                    }
                )
        if (k, n) == (4096, 4096):
            case = battery.Case(_activations(2048, k, ml_dtypes.bfloat16), codes, scale, None)
            for name, rule in _rules().items():
                for label, options in (("quantise", {"kind": 0}), ("tiled", {"path": 1})):
                    us = _time_native(executor, case, rule, **options)
                    rates = _rates(2048, k, 0 if "kind" in options else n, us)
                    row = {"m": 2048, "k": k, "n": n, "rule": f"{label} {name}", "us": us, **rates}
                    rows.append(row)
    return {"rows": rows}


def _rates(m: int, k: int, n: int, microseconds: float) -> dict[str, float]:
    moved = n * k + 2 * m * (k + n)
    return {
        "tera_ops": 2 * m * n * k / microseconds * 1e-6,
        "tb_per_s": moved / microseconds * 1e-6,
    }


def _time_native(
    executor: Any, case: Any, rule: Any, path: int = -1, kind: int = tests.LINEAR
) -> float:
    (m, k), n = case.x.shape, case.codes.shape[0]
    call = tests.Call(
        kind=kind,
        type=tests.TYPES[case.x.dtype],
        m=m,
        k=k,
        n=n,
        path=path,
        **executor._options(rule),
    )
    arrays = {"x": np.ascontiguousarray(case.x)}
    if kind == tests.QUANTIZE:
        arrays |= {"lo": np.empty((m, k), np.int8), "hi": np.empty((m, k), np.int8)}
        arrays["row_scale"] = np.empty((m,), np.float32)
    else:
        y = np.empty((m, n), case.x.dtype)
        arrays |= {"w": case.codes, "w_scale": case.scale, "y": y}
    for name, array in arrays.items():
        setattr(call, name, array.ctypes.data)
    copies = max(1, min(24, -(-300_000_000 // (n * k))))
    repeats = max(2, min(20, int(2e13 // (copies * m * n * k))))
    microseconds = executor.library.executor_time(ctypes.byref(call), copies, repeats)
    if microseconds < 0:
        raise RuntimeError(
            f"{case.x.shape} {n} {rule}: {executor.library.executor_error().decode()}"
        )
    return microseconds


def time_jax(function: Callable[..., Any], *arguments: Any, least: float = 0.03) -> float:
    """Returns seconds per call: calls queued one after the other, at least ``least`` seconds of them."""
    for _ in range(3):
        jax.block_until_ready(function(*arguments))
    begin = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    once = time.perf_counter() - begin
    repeats = max(3, int(least / once))
    begin = time.perf_counter()
    for _ in range(repeats):
        result = function(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) / repeats


def _each(layer: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a jitted function that applies the layer to each of several inputs with its own weights."""
    return jax.jit(lambda xs, ws: [layer(x, w) for x, w in zip(xs, ws, strict=True)])


def _ours(rule: Any, implementation: str) -> Callable[..., Any]:
    return lambda x, w: jaxint8.int8_linear(x, w, outliers=rule, implementation=implementation)


def _bf16(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))


def stage_layers() -> dict[str, Any]:
    """The paper's speed table through JAX: bf16 by XLA, int8 by XLA, ours; each op with its own weights."""
    deadline = time.monotonic() + 0.9 * STAGES["layers"]
    rows = []
    for m in (2048, 256, 16, 1):
        for name, d in WIDTHS.items():
            if m in (2048, 1) or name in ("Medium", "6.7B", "175B"):
                rows.append(_layer_row(name, m, d, deadline))
    return {"rows": rows, "unit": "microseconds per layer"}


def _layer_row(name: str, m: int, d: int, deadline: float) -> dict[str, Any]:
    k, n = d, 4 * d
    copies = max(1, min(32, -(-200_000_000 // (n * k))))
    x = _activations(m, k, ml_dtypes.bfloat16)
    xs = [jnp.asarray(np.roll(x, i, axis=0)) for i in range(copies)]
    keys = jax.random.split(jax.random.key(d), copies)
    matrices = [
        jaxint8.QuantizedMatrix(
            jax.random.randint(key, (n, k), -127, 128, jnp.int8),
            jnp.full((n,), 1e-3, jnp.float32),
        )
        for key in keys
    ]
    floats = [matrix.dequantize(jnp.bfloat16).T.copy() for matrix in matrices]
    methods = {"bf16": (_bf16, floats)}
    for rule_name, rule in _rules().items():
        methods[f"ours {rule_name}"] = (_ours(rule, "cuda"), matrices)
    if name in ("Medium", "6.7B"):
        for rule_name in ("none", "column 6"):
            methods[f"xla {rule_name}"] = (_ours(_rules()[rule_name], "xla"), matrices)
    row: dict[str, Any] = {"size": name, "m": m, "k": k, "n": n}
    for method, (layer, weights) in methods.items():
        late = time.monotonic() > deadline
        row[method] = None if late else 1e6 * time_jax(_each(layer), xs, weights) / copies
    return row
