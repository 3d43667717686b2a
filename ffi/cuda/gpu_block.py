"""The half of a decoder layer behind its attention on a GPU, for gpu_check.py: beside three layers, and bf16."""

import ctypes
import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import test_cuda_block as blocks
from gpu_stages import gpu_executor
from gpu_timing import REPEATS, activations, rules, time_torch

# Of LLaMA 3 8B, and of smaller models: k, h, f.
SHAPES = [(4096, 4096, 14336), (2048, 2048, 5632), (576, 576, 1536)]
ROWS = (1, 2, 4, 8, 16, 32)


def stage_block() -> dict[str, Any]:
    """Microseconds of three layers queued in a row, of the block (RunAll, RunBlock), and of bf16's three products."""
    executor = gpu_executor()
    executor.library.executor_time_block.restype = ctypes.c_double
    peer = bf16_peer()
    rows = []
    for shape in SHAPES:
        for m in ROWS if shape == SHAPES[0] else (1, 8):
            made = _block(m, shape)
            bf16 = peer(m, shape)
            for name, rule in rules().items():
                if name == "column 6":
                    continue
                row = {"size": f"{shape[1]} {name}", "m": m, "bf16": bf16}
                for joined, label in enumerate(("three layers", "block")):
                    row[label] = time_block(executor, made, rule, joined)
                rows.append(row)
    return {"rows": rows, "unit": "microseconds"}


def _block(m: int, shape: tuple[int, int, int]) -> blocks.Block:
    """Returns a block whose rows have outliers like those of the other timings, in all layers."""
    block = blocks.make((m, *shape), ml_dtypes.bfloat16, biases=False)
    return dataclasses.replace(
        block,
        x=activations(m, shape[0], ml_dtypes.bfloat16),
        residual=activations(m, shape[1], ml_dtypes.bfloat16),
    )


def time_block(executor: Any, block: blocks.Block, rule: Any, joined: int) -> float:
    """Returns microseconds of a block in a CUDA graph, without XLA."""
    made, _, _kept = blocks.calls(block, rule)
    copies = _copies(sum(case.codes.nbytes for case in block.layers))
    calls = max(20, copies)
    us = executor.library.executor_time_block(made, joined, copies, calls, REPEATS)
    if us < 0:
        raise RuntimeError(executor.library.executor_error().decode())
    return us


def _copies(bytes_: int) -> int:
    """Sets of weights that the second-level cache cannot hold."""
    return max(2, min(64, -(-400_000_000 // bytes_)))


def bf16_peer() -> Callable[[int, tuple[int, int, int]], float | None]:
    """Returns a function (m, (k, h, f)) -> microseconds of PyTorch's three products, or None where it is missing."""
    try:
        import torch
    except ImportError:
        return lambda *_: None

    def peer(m: int, shape: tuple[int, int, int]) -> float:
        k, h, f = shape
        shapes = [(h, k), (2 * f, h), (h, f)]
        copies = _copies(2 * sum(n * k for n, k in shapes))
        options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        weights = [[torch.randn(*s, **options) for s in shapes] for _ in range(copies)]
        xs = [torch.randn(m, k, **options) for _, k in shapes]
        ys = [torch.empty(m, n, **options) for n, _ in shapes]

        def queue(calls: int) -> None:
            for i in range(calls):
                for x, w, y in zip(xs, weights[i % copies], ys, strict=True):
                    torch.mm(x, w.t(), out=y)

        queue(1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            queue(20)
        return 1e3 * time_torch(graph.replay) / 20

    return peer
