"""Where the time of a decoding step goes on a GPU, for gpu_check.py: the kernels of a few layers of the 8B shape."""

import collections
import dataclasses
import pathlib
import re
import tempfile
from typing import Any

import jax
from gpu_decode import BATCHES, CONFIG, METHODS, Decoding, make_params, with_head
from jax.profiler import ProfileData

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
            jax.block_until_ready(steps())
            with tempfile.TemporaryDirectory() as folder:
                with jax.profiler.trace(folder):
                    jax.block_until_ready(steps())
                events = _events(pathlib.Path(folder))
            rows.append({"method": method, "batch": batch, "layers": LAYERS, **_by_kernel(events)})
        del params
    return {"rows": rows}


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
