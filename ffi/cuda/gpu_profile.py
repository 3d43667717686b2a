"""Where the time of a decoding step goes on a GPU, for gpu_check.py: the kernels of a few layers of the 8B shape.

And of an int8 head the choice of logits alone, beside XLA's selection.
"""

import collections
import ctypes
import dataclasses
import functools
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_decode import BATCHES, CONFIG, METHODS, Decoding, make_params, with_head
from gpu_stages import gpu_executor
from gpu_timing import REPEATS
from jax.profiler import ProfileData

import cuda_executor as tests
from jaxint8.models.head import CANDIDATES, _of_blocks, largest

# Beside them a step has one embedding and one head.
LAYERS = 4
STEPS = 16
SHOWN = 16


def stage_profile() -> dict[str, Any]:
    """The kernels of a step by time: bf16, and int8 with outliers, with a float head and with one in int8."""
    config = dataclasses.replace(CONFIG, layers=LAYERS)
    rows = []
    for method in ("bf16", "int8 relative 6", "int8 relative 6, int8 head"):
        quantization = METHODS[method]
        params = with_head(make_params(quantization is not None, config), quantization)
        for batch in BATCHES:
            steps = Decoding(params, quantization, batch, config, STEPS)
            found = _by_kernel(_traced(steps))
            rows.append({"method": method, "batch": batch, "layers": LAYERS, **found})
        del params
    return {"rows": rows}


def stage_largest() -> dict[str, Any]:
    """Microseconds of choosing the candidates of an int8 head: our kernels in a CUDA graph, and what XLA runs.

    Of what XLA runs the kernels' own time, without what lies between them.
    """
    executor = gpu_executor()
    rows = []
    for m in (1, 2, 8, 32, 256):
        shape = (m, CONFIG.vocab_size)
        x = np.random.default_rng(m).gumbel(scale=3, size=shape).astype(np.float32)
        row: dict[str, Any] = {"size": f"{shape[1]}", "m": m, "in a graph": _time(executor, x)}
        for name, function in (("by XLA", largest), ("XLA's own", _of_blocks)):
            run = functools.partial(
                jax.jit(function, static_argnums=1), jnp.asarray(x[:, None]), CANDIDATES
            )
            calls = _by_kernel(_traced(functools.partial(_repeat, run)))
            row[name] = sum(kernel["us"] for kernel in calls["kernels"])
        rows.append(row)
    for name in ("rising", "equal"):
        x = np.zeros((1, CONFIG.vocab_size), np.float32)
        x += np.arange(CONFIG.vocab_size, dtype=np.float32) * np.float32(name == "rising")
        rows.append({"size": f"all {name}", "m": 1, "in a graph": _time(executor, x)})
    return {"rows": rows, "unit": "microseconds"}


def _repeat(run: Callable[[], jax.Array]) -> list[jax.Array]:
    return [run() for _ in range(STEPS)]


def _time(executor: tests.Executor, x: np.ndarray) -> float:
    """Returns microseconds of our kernels, calls one behind the other in a CUDA graph."""
    y = np.empty((len(x), CANDIDATES), np.int32)
    call = tests.Call(kind=tests.LARGEST, m=len(x), k=x.shape[1], n=CANDIDATES)
    call.x, call.y = x.ctypes.data, y.ctypes.data
    microseconds = executor.library.executor_time(ctypes.byref(call), 1, 30, REPEATS)
    if microseconds < 0:
        raise RuntimeError(executor.library.executor_error().decode())
    return microseconds


def _traced(run: Callable[[], Any]) -> list[tuple[float, float, str]]:
    """Returns the kernels of a run, as `_events` does, after one that compiles."""
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        return _events(pathlib.Path(folder))


def _events(folder: pathlib.Path) -> list[tuple[float, float, str]]:
    """Returns (start, duration, name) of every kernel of a trace, in nanoseconds and in order."""
    trace = ProfileData.from_file(str(next(folder.rglob("*.xplane.pb"))))
    lines = [line for plane in trace.planes if "GPU" in plane.name for line in plane.lines]
    streams = [line for line in lines if line.name.startswith("Stream")]
    return sorted((e.start_ns, e.duration_ns, e.name) for line in streams for e in line.events)


def _by_kernel(events: list[tuple[float, float, str]]) -> dict[str, Any]:
    """Microseconds of a step from the first kernel to the last, and those of the slowest kernels.

    A kernel's own time ends where the next one's begins to count: kernels that are launched before
    the one before them has ended overlap it.
    """
    spent: dict[str, float] = collections.defaultdict(float)
    calls: dict[str, int] = collections.defaultdict(int)
    end = begin = events[0][0]
    for start, duration, name in events:
        name = _short(name)
        calls[name] += 1
        spent[name] += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    slowest = sorted(spent, key=lambda name: -spent[name])[:SHOWN]
    kernels = [
        {"name": name, "us": spent[name] / STEPS * 1e-3, "calls": calls[name] / STEPS}
        for name in slowest
    ]
    return {"us": (end - begin) / STEPS * 1e-3, "kernels": kernels}


def _short(name: str) -> str:
    """Our kernels by the struct that they run, XLA's by what their names say."""
    ours = re.search(r"cuda::(\w+Kernel)", name)
    return ours.group(1) if ours else re.sub(r"_\d+$", "", name)[:60]
