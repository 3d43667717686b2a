"""Loading a model: seconds and peak memory, beside only reading its files.

Every sample is a process of its own, for memory once used by a process may stay with it. The
surprising fact: the peak is read from the kernel's high-water mark after resetting it, which counts
pages of the mapped checkpoint too, as long as they are mapped.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import multiprocessing
import resource
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import AxisType

from jaxint8.cli.methods import METHODS
from jaxint8.evaluation.benchmark import machine, results
from jaxint8.evaluation.benchmark.results import Group, Line
from jaxint8.evaluation.benchmark.timing import Statistic, interleave
from jaxint8.models import load
from jaxint8.models.loading import describe

READING = "reading the file"
LOADED = (("float32", 1), ("llm_int8", 1))
CHUNK_BYTES = 1 << 24
# The most that loading may use beside the model and its largest float tensor.
ALLOWANCE = 300_000_000


@dataclasses.dataclass(frozen=True)
class Loaded:
    """One loading: seconds, growth of the process at its peak, and size of what was made."""

    seconds: float
    peak_bytes: int
    model_bytes: int


def load_group(source: str, rounds: int, loaded: Sequence[tuple[str, int]] = LOADED) -> Group:
    """Measures how long a model takes to load, and how much memory.

    Args:
      source: the model.
      rounds: samples of everything.
      loaded: methods, each with the number of devices that its weights are split over.

    Raises:
      ValueError, OSError: the model cannot be loaded.
    """
    checkpoint = describe(source)
    files = checkpoint_files(checkpoint.reader.path)
    largest = max(4 * math.prod(part.shape) for part in checkpoint.sources.values())
    checkpoint.reader.close()
    samples = {READING: lambda: read_files(files)}
    ways = {_name(method, devices): (method, devices) for method, devices in loaded}
    samples |= {
        name: functools.partial(load_in_process, source, *way) for name, way in ways.items()
    }
    others = machine.Others()
    taken = interleave(samples, rounds)
    size = sum(file.stat().st_size for file in files)
    lines = [_line(name, sampled, size, largest) for name, sampled in taken.items()]
    seconds = {name: [loaded.seconds for loaded in sampled] for name, sampled in taken.items()}
    return Group(
        suite="load",
        what={"file_bytes": size, "largest_float_tensor_bytes": largest},
        lines=lines,
        pairs=results.pairs(seconds, [(name, READING) for name in ways]),
        others=others.cores(),
    )


def _name(method: str, devices: int) -> str:
    return method if devices == 1 else f"{method}, {devices} devices"


def _line(name: str, sampled: list[Loaded], size: int, largest: int) -> Line:
    extra = {}
    if name != READING:
        model = sampled[0].model_bytes
        extra = {
            "peak_bytes": Statistic.of([loaded.peak_bytes for loaded in sampled]).median,
            "model_bytes": model,
            "allowed_bytes": model + largest + ALLOWANCE,
        }
    seconds = [loaded.seconds for loaded in sampled]
    return results.line(name, seconds, per_call=size / 1e6, unit="MB/s of file", extra=extra)


def checkpoint_files(path: Path) -> list[Path]:
    """The files with the tensors: one, or all shards of an index."""
    if path.suffix == ".json":
        return sorted(path.parent.glob("*.safetensors"))
    return [path]


def read_files(files: list[Path]) -> Loaded:
    """Reads files from end to end and keeps nothing."""
    start = time.perf_counter()
    buffer = bytearray(CHUNK_BYTES)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return Loaded(time.perf_counter() - start, 0, 0)


def load_in_process(source: str, method: str, devices: int = 1) -> Loaded:
    """Loads a model in a new process and lets it go."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure_load, source, method, devices).result()


def measure_load(source: str, method: str, devices: int = 1) -> Loaded:
    """Loads a model in this process; the first of a process says most."""
    mesh = None
    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)
        kinds = (AxisType.Auto, AxisType.Auto)
        mesh = jax.make_mesh((1, devices), ("data", "model"), kinds)
    jax.devices()  # starting JAX is not loading
    before = _reset_peak()
    start = time.perf_counter()
    chosen = METHODS[method]
    model = load(source, quantization=chosen.quantization, dtype=chosen.dtype, mesh=mesh)
    jax.block_until_ready(model.params)
    seconds = time.perf_counter() - start
    return Loaded(seconds, max(0, _peak() - before), model.nbytes)


def _reset_peak() -> int:
    """Bytes in use; where possible the high-water mark is set to that."""
    with contextlib.suppress(OSError):  # not Linux, or not allowed: then all before counts too
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """The high-water mark of this process, bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
