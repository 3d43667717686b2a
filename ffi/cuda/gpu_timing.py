"""Timings on a GPU, for gpu_check.py: our kernels alone over m, and the paper's speed table through JAX beside XLA."""

import ctypes
import functools
import itertools
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
from gpu_check import STAGES, find_nvcc, run
from gpu_stages import gpu_executor

import battery
import cuda_executor as tests
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
REPEATS = 9


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


def activations(m: int, k: int, dtype: Any) -> Any:
    """Normal values with a few outlier features and scattered outliers: about 0.1 % of values, 12 % of columns."""
    rng = np.random.default_rng([m, k])
    x = rng.standard_normal((m, k), np.float32)
    columns = rng.permutation(k)
    x[:, columns[: max(1, k // 1000)]] *= 20
    busy = columns[: max(1, k // 8)]
    scattered = rng.random((m, len(busy))) < 0.002
    x[:, busy] = np.where(scattered, 12 * np.sign(x[:, busy]), x[:, busy])
    return x.astype(dtype)


def rules() -> dict[str, Any]:
    """Returns the rules for outliers that are timed, by name."""
    return {
        "none": None,
        "column 6": Threshold(6.0, "column"),
        "relative 6": RelativeThreshold(6.0),
        "top 8": TopK(8),
    }


def bf16_peer() -> Callable[..., float | None]:
    """Returns a function (m, k, n, dtype) -> microseconds of PyTorch's product, or None where it is missing."""
    try:
        import torch
    except ImportError:
        return lambda *_: None

    def peer(m: int, k: int, n: int, dtype: Any = ml_dtypes.bfloat16) -> float:
        kind = getattr(torch, np.dtype(dtype).name)
        copies, calls = copies_and_calls(m, k, n, np.dtype(dtype).itemsize)
        x = torch.randn(m, k, device="cuda", dtype=kind)
        weights = [torch.randn(n, k, device="cuda", dtype=kind) for _ in range(copies)]
        y = torch.empty(m, n, device="cuda", dtype=kind)
        torch.mm(x, weights[0].t(), out=y)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                torch.mm(x, weights[i % copies].t(), out=y)
        return 1e3 * time_torch(graph.replay) / calls

    return peer


def time_torch(calls: Callable[[], None]) -> float:
    """Returns milliseconds of what is queued by ``calls``, the median of several."""
    import torch

    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    calls()
    calls()
    events[0].record()
    for event in events[1:]:
        calls()
        event.record()
    torch.cuda.synchronize()
    return float(np.median([begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]))


def copies_and_calls(m: int, k: int, n: int, item: int) -> tuple[int, int]:
    """Returns how many sets of weights the caches cannot hold, and the calls of a graph worth timing."""
    copies = max(1, min(48, -(-250_000_000 // max(1, n * k * item))))
    least = max(3e-6, 2 * m * n * k / 1e15, n * k * item / 4e12)
    return copies, max(4, copies, min(200, int(6e-4 / least)))


def stage_sizes() -> dict[str, Any]:
    """The paper's speed table in CUDA graphs: our kernels beside PyTorch's bf16 product, each with its own weights."""
    executor, peer = gpu_executor(), bf16_peer()
    rows = []
    for m in (2048, 256, 64, 16, 1):
        for name, d in WIDTHS.items():
            row: dict[str, Any] = {
                "size": name,
                "m": m,
                "k": d,
                "n": 4 * d,
                "bf16": peer(m, d, 4 * d),
            }
            case = case_of(m, d, 4 * d)
            for rule_name, rule in rules().items():
                row[rule_name] = time_native(executor, case, rule)
            rows.append(row)
    return {"rows": rows, "unit": f"microseconds, medians of {REPEATS} replays"}


def stage_sweep() -> dict[str, Any]:
    """Our kernels in CUDA graphs over m, beside PyTorch's bf16 product; and other dtypes and kernels at some m."""
    executor, peer = gpu_executor(), bf16_peer()
    rows = []

    def add(case: battery.Case, label: str, us: float, bf16: float | None) -> None:
        (m, k), n = case.x.shape, case.codes.shape[0]
        row = {"m": m, "k": k, "n": n, "rule": label, "us": us, "bf16": bf16, **_rates(m, k, n, us)}
        rows.append(row)

    for k, n in SWEEP_SHAPES:
        for m in SWEEP_M:
            case, bf16 = case_of(m, k, n), peer(m, k, n)
            for name, rule in rules().items():
                if name in ("none", "relative 6") or (k, n) == SWEEP_SHAPES[0]:
                    add(case, name, time_native(executor, case, rule), bf16)
    k, n = SWEEP_SHAPES[0]
    for m in (1, 16, 256, 2048):
        for dtype in (np.float16, np.float32):
            case, other = case_of(m, k, n, dtype), peer(m, k, n, dtype)
            for name in ("none", "relative 6"):
                us = time_native(executor, case, rules()[name])
                add(case, f"{name} {np.dtype(dtype).name}", us, other)
        case = case_of(m, k, n)
        for name, rule in rules().items():
            add(
                case,
                f"quantise {name}",
                time_native(executor, case, rule, kind=tests.QUANTIZE),
                None,
            )
        for name in ("none", "relative 6"):
            for path, index in (("stream", 0), ("tiled", 1), ("wgmma", 2), ("sparse", 3)):
                if path != "stream" or m <= 16:
                    us = time_native(executor, case, rules()[name], path=index)
                    add(case, f"{path} {name}", us, None)
    return {"rows": rows, "unit": f"medians of {REPEATS} replays"}


@functools.cache
def _weights() -> np.ndarray:
    """Returns codes for the largest layer, which smaller ones take a part of."""
    size = 4 * max(WIDTHS.values()) ** 2
    return np.random.default_rng(0).integers(-127, 128, size, dtype=np.int8)


def case_of(m: int, k: int, n: int, dtype: Any = ml_dtypes.bfloat16) -> battery.Case:
    """Returns a layer with the activations above and random codes."""
    codes = _weights()[: n * k].reshape(n, k)
    return battery.Case(activations(m, k, dtype), codes, np.ones((n,), np.float32), None)


def _rates(m: int, k: int, n: int, microseconds: float) -> dict[str, float]:
    return {
        "tera_ops": 2 * m * n * k / microseconds * 1e-6,
        "tb_per_s": n * k / microseconds * 1e-6,
    }


def time_native(
    executor: Any, case: Any, rule: Any, path: int = -1, kind: int = tests.LINEAR
) -> float:
    """Returns microseconds of a call of our kernels in a CUDA graph, without XLA."""
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
        copies, calls = 1, 30
    else:
        y = np.empty((m, n), case.x.dtype)
        arrays |= {"w": case.codes, "w_scale": case.scale, "y": y}
        copies, calls = copies_and_calls(m, k, n, 1)
    for name, array in arrays.items():
        setattr(call, name, array.ctypes.data)
    microseconds = executor.library.executor_time(ctypes.byref(call), copies, calls, REPEATS)
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


def each(layer: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a jitted function that applies the layer to each of several inputs with its own weights."""
    return jax.jit(lambda xs, ws: [layer(x, w) for x, w in zip(xs, ws, strict=True)])


def int8_layer(rule: Any, implementation: Any) -> Callable[..., Any]:
    """Returns our layer as a function of rows and weights."""
    return lambda x, w: jaxint8.int8_linear(x, w, outliers=rule, implementation=implementation)


def bf16_layer(x: jax.Array, w: jax.Array) -> jax.Array:
    """x[m, k] times w[n, k]."""
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
    x = activations(m, k, ml_dtypes.bfloat16)
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
    methods: dict[str, Any] = {"bf16": (bf16_layer, floats)}
    for rule_name, rule in rules().items():
        methods[f"ours {rule_name}"] = (int8_layer(rule, "cuda"), matrices)
    if name in ("Medium", "6.7B"):
        for rule_name in ("none", "column 6"):
            methods[f"xla {rule_name}"] = (int8_layer(rules()[rule_name], "xla"), matrices)
    row: dict[str, Any] = {"size": name, "m": m, "k": k, "n": n}
    for method, (layer, weights) in methods.items():
        late = time.monotonic() > deadline
        row[method] = None if late else 1e6 * time_jax(each(layer), xs, weights) / copies
    return row
