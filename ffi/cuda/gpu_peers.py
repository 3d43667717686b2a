"""Other int8 layers beside ours on a GPU, for gpu_check.py: XLA's, and bitsandbytes' where it is installed."""

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from gpu_check import STAGES
from gpu_timing import (
    REPEATS,
    SWEEP_M,
    SWEEP_SHAPES,
    WIDTHS,
    activations,
    bf16_layer,
    bf16_peer,
    copies_and_calls,
    each,
    int8_layer,
    rules,
    time_jax,
    time_torch,
)

from jaxint8 import QuantizedMatrix

# Sets of weights in one program of XLA's: those of the smallest layers fit into the L2 cache.
MOST_COPIES = 16

Bitsandbytes = Callable[[int, int, int, float], float]


def stage_peers() -> dict[str, Any]:
    """Layers with outliers by PyTorch in bf16 and by bitsandbytes."""
    bf16, peer = bf16_peer(), bitsandbytes_peer()
    rows = _rows()
    for row in rows:
        shape = row["m"], row["k"], row["n"]
        row["bf16"] = bf16(*shape)
        for threshold in (0.0, 6.0) if peer else ():
            row[f"bitsandbytes {threshold:g}"] = peer(*shape, threshold) if peer else None
    return {"rows": rows, "unit": f"microseconds, medians of {REPEATS} replays"}


def stage_xla() -> dict[str, Any]:
    """Layers with outliers by XLA alone, in bf16 and in int8, as far as the time for compiling them goes."""
    deadline = time.monotonic() + 0.9 * STAGES["xla"]
    order = [1, 2048, 16, 256]  # the rest after them
    rows = sorted(_rows(), key=lambda row: [*order, row["m"]].index(row["m"]))
    for row in rows:
        for method in ("bf16", "none", "relative 6"):
            late = time.monotonic() > deadline
            row[method] = None if late else _xla(row["m"], row["k"], row["n"], method)
    return {"rows": rows, "unit": "microseconds per layer"}


def _rows() -> list[dict[str, Any]]:
    """The sizes of the paper's table, then the shapes that are swept."""
    names = {(d, 4 * d): name for name, d in WIDTHS.items()}
    shapes = [(m, d, 4 * d) for m in (2048, 256, 64, 16, 1) for d in WIDTHS.values()]
    shapes += [(m, k, n) for k, n in SWEEP_SHAPES for m in SWEEP_M]
    return [{"size": names.get((k, n), f"{k}->{n}"), "m": m, "k": k, "n": n} for m, k, n in shapes]


def bitsandbytes_peer() -> Bitsandbytes | None:
    """Returns a function (m, k, n, threshold) -> microseconds of bitsandbytes' product, or None where it is missing.

    Its activations are float16. Without outliers the calls are replayed as a CUDA graph; with them it asks the GPU how
    many there are and waits for the answer, which no graph can hold: then they are queued one by one.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    import bitsandbytes
    import torch

    @torch.inference_mode()
    def peer(m: int, k: int, n: int, threshold: float) -> float:
        copies, _ = copies_and_calls(m, k, n, 1)
        x = torch.from_numpy(activations(m, k, np.float16)).cuda()
        states = [bitsandbytes.MatmulLtState() for _ in range(copies)]
        for state in states:
            state.CB = torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8)
            state.SCB = torch.ones(n, device="cuda")
            state.threshold, state.has_fp16_weights = threshold, False

        def calls() -> None:
            for state in states:
                bitsandbytes.matmul(x, state.CB, state=state)

        calls()
        torch.cuda.synchronize()
        if threshold == 0:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                calls()
            return 1e3 * time_torch(graph.replay) / copies
        return 1e3 * time_torch(calls) / copies

    return peer


def _xla(m: int, k: int, n: int, method: str) -> float:
    """Returns microseconds of a layer under jit, of several with their own weights in one program."""
    copies = min(MOST_COPIES, copies_and_calls(m, k, n, 1)[0])
    x = activations(m, k, ml_dtypes.bfloat16)
    xs = [jnp.asarray(np.roll(x, i, axis=0)) for i in range(copies)]
    keys = jax.random.split(jax.random.key(k), copies)
    if method == "bf16":
        floats = [jax.random.normal(key, (n, k), jnp.bfloat16) for key in keys]
        return 1e6 * time_jax(each(bf16_layer), xs, floats) / copies
    codes = [jax.random.randint(key, (n, k), -127, 128, jnp.int8) for key in keys]
    weights = [QuantizedMatrix(c, jnp.full((n,), 1e-3, jnp.float32)) for c in codes]
    return 1e6 * time_jax(each(int8_layer(rules()[method], "xla")), xs, weights) / copies
